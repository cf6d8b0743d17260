//! Between runs: the profile that a model starts from, and the one that it leaves.

use std::{
    io,
    path::{Path, PathBuf},
    thread::JoinHandle,
};

use crate::{
    config::Config,
    log::{Level, log},
    profile::{Profile, ProfileError, Tally},
};

/// Decoded tokens after which the profile is written again: what a crash can cost. Some ten answers.
const SAVE_EVERY: u64 = 4096;

/// Whose experts are counted.
#[derive(Clone, Debug)]
pub struct Subject {
    /// Hash of the model's routers.
    pub model: u64,
    /// What it is called, for people.
    pub name: String,
    /// `(il, n_expert)` of the layers on the hot path.
    pub layers: Vec<(u16, u16)>,
}

/// Uses by token of each expert, by layer.
pub type Heat = Vec<Vec<f32>>;

/// Reads `--moe-hot-profile`. What cannot be used is said, and the run starts without: a profile changes how fast
/// it is at the start, and nothing else.
pub fn load(config: &Config, subject: &Subject) -> Option<(Profile, Heat)> {
    let path = config.profile.as_ref()?;
    let used = Profile::load(path).and_then(|p| {
        let heat = p.heat_for(subject.model, &subject.layers)?;
        Ok((p, heat))
    });
    match used {
        Ok(x) => Some(x),
        Err(ProfileError::Io { source, .. })
            if source.kind() == io::ErrorKind::NotFound && config.profile_out.as_ref() == Some(path) =>
        {
            log!(Level::Info, "moe-hot: {} is not there yet, the slots start empty", path.display());
            None
        }
        Err(e) => {
            log!(Level::Error, "moe-hot: --moe-hot-profile {}: {e}; the slots start empty", path.display());
            None
        }
    }
}

/// Counts uses for `--moe-hot-profile-out`, and writes them there.
pub struct Keeper {
    subject: Subject,
    path: PathBuf,
    tally: Tally,
    saved: u64,
    saving: Option<JoinHandle<()>>,
}

impl Keeper {
    /// Continues what is at the path, else `from`. `None` without the option, or when there is something that is
    /// not to be lost.
    pub fn new(config: &Config, subject: Subject, from: Option<&Profile>) -> Option<Self> {
        let path = config.profile_out.clone()?;
        let mut tally = Tally::new(&subject.layers);
        let there = match Profile::load(&path) {
            Ok(p) => Some(p),
            Err(ProfileError::Io { source, .. }) if source.kind() == io::ErrorKind::NotFound => None,
            Err(e) => {
                refuse(&path, &e);
                return None;
            }
        };
        if let Some(p) = there.as_ref().or(from)
            && let Err(e) = tally.resume(p, subject.model)
        {
            refuse(&path, &e);
            return None;
        }
        let saved = tally.tokens();
        Some(Keeper { subject, path, tally, saved, saving: None })
    }

    /// As [`Tally::observe`]. Now and then a thread writes the file.
    pub fn observe(&mut self, n_tokens: u32, ids: &[Vec<u16>]) {
        self.tally.observe(n_tokens, ids);
        let at_rest = self.saving.as_ref().is_none_or(JoinHandle::is_finished);
        if self.tally.tokens() - self.saved >= SAVE_EVERY && at_rest {
            self.saved = self.tally.tokens();
            let (profile, path) = (self.profile(), self.path.clone());
            let save = move || save(&profile, &path);
            self.saving = std::thread::Builder::new().name("moe-hot-profile".into()).spawn(save).ok();
        }
    }

    /// Writes the file now; where it is.
    ///
    /// # Errors
    /// Names the file and says why it cannot be written.
    pub fn save(&mut self) -> Result<&Path, String> {
        if let Some(saving) = self.saving.take() {
            saving.join().ok();
        }
        self.profile().save(&self.path).map_err(|e| e.to_string())?;
        self.saved = self.tally.tokens();
        Ok(&self.path)
    }

    fn profile(&self) -> Profile {
        self.tally.profile(self.subject.model, &self.subject.name)
    }
}

impl Drop for Keeper {
    fn drop(&mut self) {
        if let Some(saving) = self.saving.take() {
            saving.join().ok();
        }
        if self.tally.tokens() > self.saved {
            save(&self.profile(), &self.path);
        }
    }
}

fn refuse(path: &Path, why: &ProfileError) {
    let path = path.display();
    log!(
        Level::Error,
        "moe-hot: --moe-hot-profile-out {path}: {why}; it is left as it is, and nothing is written"
    );
}

fn save(profile: &Profile, path: &Path) {
    if let Err(e) = profile.save(path) {
        log!(Level::Error, "moe-hot: --moe-hot-profile-out: {e}");
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn subject(model: u64) -> Subject {
        Subject { model, name: "test".into(), layers: vec![(3, 4)] }
    }

    fn config(path: &Path) -> Config {
        Config { profile: Some(path.into()), profile_out: Some(path.into()), ..Config::default() }
    }

    #[test]
    fn a_run_leaves_what_the_next_one_starts_from() {
        let folder = tempfile::tempdir().unwrap();
        let config = config(&folder.path().join("p.json"));
        assert!(load(&config, &subject(7)).is_none(), "nothing there yet");

        let mut keeper = Keeper::new(&config, subject(7), None).unwrap();
        keeper.observe(1, &[vec![2, 1]]);
        keeper.observe(1, &[vec![2, 0]]);
        drop(keeper);

        let (profile, heat) = load(&config, &subject(7)).expect("was written at the end");
        assert_eq!(profile.tokens, 2);
        assert!(heat[0][2] > heat[0][1] && heat[0][3] == 0.0, "{heat:?}");

        let mut keeper = Keeper::new(&config, subject(7), None).unwrap();
        keeper.observe(1, &[vec![3, 3]]);
        drop(keeper);
        let (profile, heat) = load(&config, &subject(7)).unwrap();
        assert_eq!(profile.tokens, 3, "continued");
        assert!(heat[0][2] > 0.0 && heat[0][3] > 0.0, "{heat:?}");
    }

    #[test]
    fn what_is_no_profile_of_the_model_is_neither_used_nor_replaced() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("p.json");
        let config = config(&path);
        let mut keeper = Keeper::new(&config, subject(7), None).unwrap();
        keeper.observe(1, &[vec![2, 1]]);
        drop(keeper);
        assert!(load(&config, &subject(8)).is_none() && Keeper::new(&config, subject(8), None).is_none());

        std::fs::write(&path, "a letter").unwrap();
        assert!(load(&config, &subject(7)).is_none() && Keeper::new(&config, subject(7), None).is_none());
        assert_eq!(std::fs::read_to_string(&path).unwrap(), "a letter");
    }

    #[test]
    fn a_long_run_writes_now_and_then() {
        let folder = tempfile::tempdir().unwrap();
        let config = config(&folder.path().join("p.json"));
        let mut keeper = Keeper::new(&config, subject(7), None).unwrap();
        for _ in 0..SAVE_EVERY {
            keeper.observe(1, &[vec![0, 1]]);
        }
        keeper.saving.take().expect("is being written").join().unwrap();
        assert_eq!(load(&config, &subject(7)).unwrap().0.tokens, SAVE_EVERY);
    }
}
