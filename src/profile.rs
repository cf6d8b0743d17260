//! Heat of experts kept between runs: which experts a model's users used, so that the next start need not
//! find out from nothing.
//!
//! A profile is advice. It may change what a run has in its slots at the start and never what it computes,
//! so a bad one is refused with a reason and the run goes on without.
//!
//! # Format, version 1
//!
//! ```text
//! {"format":"moe-hot profile","version":1,"model":"0123456789abcdef","name":"Qwen3 30B A3B","tokens":81234,
//!  "layers":[{"il":0,"heat":[0.0078125,...]},...]}
//! ```
//!
//! `model` is the [`RouterHash`] of the model's router tensors and of nothing else. Who quantises a model
//! leaves the routers as they are, so all quantisations of a model have one hash and share their profiles:
//! the routers choose the experts, whatever type those have. A fine-tuned model has another.

use std::{
    fs::{self, File, Permissions},
    io::{self, Read, Write},
    os::unix::fs::PermissionsExt,
    path::Path,
};

use serde::{Deserialize, Deserializer, Serialize, Serializer, de::Error};
use xxhash_rust::xxh64::Xxh64;

use crate::fault;

const FORMAT: &str = "moe-hot profile";
const VERSION: u64 = 1;
/// Most bytes of a file that is read. 94 layers of 512 experts need well under one million.
const MAX_BYTES: u64 = 16 << 20;

/// Tokens after which a use counts half in a [`Tally`]. A policy's memory follows the text and is gone with
/// it; what is worth a file is what all texts of a user have in common. 8192 tokens are some ten answers:
/// no single one decides, and a change of what the model is used for shows within a day.
pub const HALF_LIFE_TOKENS: f64 = 8192.0;

/// Where the weight of a token is set back to 1. Rare, every 2.7 million tokens, and as far from the end of
/// f64 as a ubatch of five million.
const MAX_WEIGHT: f64 = 1e100;

/// Why a profile cannot be read, written or used.
#[derive(Debug, thiserror::Error)]
pub enum ProfileError {
    /// The system refuses.
    #[error("{path}: {source}")]
    Io {
        /// The file.
        path: String,
        /// Why.
        source: io::Error,
    },
    /// A device, a folder or a pipe is not to be replaced by a profile.
    #[error("{path}: is there and not a regular file")]
    NotAFile {
        /// What it is about.
        path: String,
    },
    /// It is too large to be a profile.
    #[error("{path}: larger than {MAX_BYTES} bytes, the most that a profile may have")]
    TooLarge {
        /// The file.
        path: String,
    },
    /// It is no JSON.
    #[error("{path}: not JSON: {source}")]
    Json {
        /// The file.
        path: String,
        /// What and where.
        source: serde_json::Error,
    },
    /// It is something else.
    #[error("{path}: its format is {found}, expected \"{FORMAT}\"")]
    Foreign {
        /// The file.
        path: String,
        /// Its format.
        found: String,
    },
    /// It is from another version.
    #[error("{path}: profile of version {found}, expected version {VERSION}")]
    Version {
        /// The file.
        path: String,
        /// Its version.
        found: String,
    },
    /// A field is missing, has the wrong type or is too large for it.
    #[error("{path}: not a profile: {source}")]
    Fields {
        /// The file.
        path: String,
        /// What and where.
        source: serde_json::Error,
    },
    /// Heat that no run can have measured.
    #[error("{path}: layer {il}, expert {expert}: heat {found}, expected a finite number of at least 0")]
    Heat {
        /// The file.
        path: String,
        /// Layer index in the model.
        il: u16,
        /// Expert of the layer.
        expert: usize,
        /// Its heat.
        found: f32,
    },
    /// A layer has two entries.
    #[error("{path}: layer {il} is there twice")]
    Twice {
        /// The file.
        path: String,
        /// Layer index in the model.
        il: u16,
    },
    /// It is about another model.
    #[error(
        "the profile is of another model: {name:?} with router hash {found:016x}, this model has {expected:016x}"
    )]
    OtherModel {
        /// Name in the profile.
        name: String,
        /// Hash in the profile.
        found: u64,
        /// Hash of the model.
        expected: u64,
    },
    /// A layer has another number of experts.
    #[error("the profile has {found} experts in layer {il}, this model has {expected}")]
    Experts {
        /// Layer index in the model.
        il: u16,
        /// Experts in the profile.
        found: usize,
        /// Experts in the model.
        expected: u16,
    },
}

/// Heat of one layer.
#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
pub struct ProfileLayer {
    /// Layer index in the model.
    pub il: u16,
    /// `heat[expert]`: its share of the layer's uses, as [`Tally::shares`] has it.
    pub heat: Vec<f32>,
}

/// Which experts of a model were in use.
#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
pub struct Profile {
    /// [`RouterHash`] of the model's routers; 16 hexadecimal digits in the file.
    #[serde(serialize_with = "write_hex", deserialize_with = "read_hex")]
    pub model: u64,
    /// The model's name, for people.
    pub name: String,
    /// Tokens that the heat is from.
    pub tokens: u64,
    /// Layers in any order, each once.
    pub layers: Vec<ProfileLayer>,
}

/// A profile with what tells it from other JSON.
#[derive(Serialize)]
struct Document<'a> {
    format: &'a str,
    version: u64,
    #[serde(flatten)]
    profile: &'a Profile,
}

/// What is read first, for the right message.
#[derive(Deserialize)]
#[serde(expecting = "an object")]
struct Head {
    #[serde(default)]
    format: serde_json::Value,
    #[serde(default)]
    version: serde_json::Value,
}

fn write_hex<S: Serializer>(model: &u64, s: S) -> Result<S::Ok, S::Error> {
    s.serialize_str(&format!("{model:016x}"))
}

fn read_hex<'de, D: Deserializer<'de>>(d: D) -> Result<u64, D::Error> {
    let text = String::deserialize(d)?;
    // from_str_radix takes a sign too
    let digits = text.len() == 16 && text.bytes().all(|b| b.is_ascii_hexdigit());
    u64::from_str_radix(&text, 16)
        .ok()
        .filter(|_| digits)
        .ok_or_else(|| D::Error::custom(format!("model {text:?}, expected 16 hexadecimal digits")))
}

fn io_error(path: &Path) -> impl Fn(io::Error) -> ProfileError + '_ {
    move |source| ProfileError::Io { path: path.display().to_string(), source }
}

/// A value of the head, short enough for a message.
fn shown(value: &serde_json::Value) -> String {
    if value.is_null() { "missing".into() } else { value.to_string().chars().take(40).collect() }
}

impl Profile {
    /// Reads the profile at `path`.
    ///
    /// # Errors
    /// Any [`ProfileError`] but the two about another model; each names the file.
    pub fn load(path: &Path) -> Result<Self, ProfileError> {
        Self::read(File::open(path).map_err(io_error(path))?, path)
    }

    /// As [`Profile::load`], of what is at `path` or could be.
    ///
    /// # Errors
    /// As there.
    pub fn read(file: impl Read, path: &Path) -> Result<Self, ProfileError> {
        let mut bytes = Vec::new();
        file.take(MAX_BYTES + 1).read_to_end(&mut bytes).map_err(io_error(path))?;
        let name = || path.display().to_string();
        if bytes.len() as u64 > MAX_BYTES {
            return Err(ProfileError::TooLarge { path: name() });
        }
        let fields = |source| ProfileError::Fields { path: name(), source };
        let json = |source| ProfileError::Json { path: name(), source };
        let head: Head =
            serde_json::from_slice(&bytes).map_err(|e| if e.is_data() { fields(e) } else { json(e) })?;
        if head.format != FORMAT {
            return Err(ProfileError::Foreign { path: name(), found: shown(&head.format) });
        }
        if head.version != VERSION {
            return Err(ProfileError::Version { path: name(), found: shown(&head.version) });
        }
        // JSON it is by now, and says so: a number that no f32 holds is an error of syntax to serde_json
        let profile: Profile = serde_json::from_slice(&bytes).map_err(fields)?;
        profile.check(path)?;
        Ok(profile)
    }

    /// Writes the profile to `path`, whole or not at all: whoever reads sees the old file or the new one,
    /// and so does the next start after a crash. A file that is there keeps its mode, a link its place.
    ///
    /// # Errors
    /// [`ProfileError::Io`], [`ProfileError::NotAFile`]; [`ProfileError::Heat`] and [`ProfileError::Twice`]
    /// for what [`Profile::load`] would refuse. What was there is there still.
    pub fn save(&self, path: &Path) -> Result<(), ProfileError> {
        self.check(path)?;
        let io_error = io_error(path);
        // a rename would replace a link, or a device
        let target = fs::canonicalize(path).unwrap_or_else(|_| path.to_owned());
        // as a new file: the umask still applies
        let mut permissions = Permissions::from_mode(0o666);
        match fs::metadata(&target) {
            Ok(m) if m.is_file() => permissions = m.permissions(),
            Ok(_) => return Err(ProfileError::NotAFile { path: path.display().to_string() }),
            Err(e) if e.kind() == io::ErrorKind::NotFound => {}
            Err(e) => return Err(io_error(e)),
        }
        let folder = target.parent().filter(|f| !f.as_os_str().is_empty()).unwrap_or(Path::new("."));

        let document = Document { format: FORMAT, version: VERSION, profile: self };
        let mut bytes = serde_json::to_vec(&document).map_err(|e| io_error(e.into()))?;
        bytes.push(b'\n');
        // is removed when it is dropped before it got its name
        let mut file = tempfile::Builder::new()
            .prefix(".moe-hot-profile-")
            .permissions(permissions.clone())
            .tempfile_in(folder)
            .map_err(&io_error)?;
        fault::io("file").and_then(|()| file.write_all(&bytes)).map_err(&io_error)?;
        if target.exists() {
            // exactly, whatever the umask is
            file.as_file().set_permissions(permissions).map_err(&io_error)?;
        }
        file.as_file().sync_all().map_err(&io_error)?;
        file.persist(&target).map_err(|e| io_error(e.error))?;
        // the name is in the folder; some file systems cannot sync one, and the file is whole either way
        File::open(folder).and_then(|f| f.sync_all()).ok();
        Ok(())
    }

    /// Heat of the experts of `layers`, each `(il, n_expert)`, of a model with router hash `model`. Layers
    /// that the profile lacks have heat 0, and those that it has beside them are ignored: another run had
    /// more layers on the hot path, or fewer.
    ///
    /// # Errors
    /// [`ProfileError::OtherModel`], [`ProfileError::Experts`].
    pub fn heat_for(&self, model: u64, layers: &[(u16, u16)]) -> Result<Vec<Vec<f32>>, ProfileError> {
        if self.model != model {
            let (name, found) = (self.name.clone(), self.model);
            return Err(ProfileError::OtherModel { name, found, expected: model });
        }
        let heat = |&(il, n_expert): &(u16, u16)| match self.layers.iter().find(|l| l.il == il) {
            None => Ok(vec![0.0; n_expert.into()]),
            Some(l) if l.heat.len() == usize::from(n_expert) => Ok(l.heat.clone()),
            Some(l) => Err(ProfileError::Experts { il, found: l.heat.len(), expected: n_expert }),
        };
        layers.iter().map(heat).collect()
    }

    fn check(&self, path: &Path) -> Result<(), ProfileError> {
        let mut seen = std::collections::HashSet::new();
        for l in &self.layers {
            if !seen.insert(l.il) {
                return Err(ProfileError::Twice { path: path.display().to_string(), il: l.il });
            }
            if let Some(expert) = l.heat.iter().position(|h| !h.is_finite() || *h < 0.0) {
                let path = path.display().to_string();
                return Err(ProfileError::Heat { path, il: l.il, expert, found: l.heat[expert] });
            }
        }
        Ok(())
    }
}

/// Counts uses with a long memory, for a profile.
///
/// Each token gives every layer a weight of 1, which the experts it is routed to share; a weight halves
/// every [`HALF_LIFE_TOKENS`]. Rather than to let all weights fade in every step, new ones grow: only the
/// quotients count, and a step costs what it routes.
#[derive(Clone, Debug)]
pub struct Tally {
    layers: Vec<TallyLayer>,
    /// Weight of the last token.
    weight: f64,
    tokens: u64,
}

#[derive(Clone, Debug)]
struct TallyLayer {
    il: u16,
    sums: Vec<f64>,
}

impl Tally {
    /// Nothing counted yet; `layers` are `(il, n_expert)`.
    pub fn new(layers: &[(u16, u16)]) -> Self {
        let layer = |&(il, n): &(u16, u16)| TallyLayer { il, sums: vec![0.0; n.into()] };
        Tally { layers: layers.iter().map(layer).collect(), weight: 1.0, tokens: 0 }
    }

    /// Continues from `profile`, so that a short run does not replace what long ones found. Layers that the
    /// profile lacks begin at nothing. Called before anything is observed.
    ///
    /// # Errors
    /// As [`Profile::heat_for`], for a model with router hash `model`.
    pub fn resume(&mut self, profile: &Profile, model: u64) -> Result<(), ProfileError> {
        let layers: Vec<_> = self.layers.iter().map(|l| (l.il, l.sums.len() as u16)).collect();
        let heat = profile.heat_for(model, &layers)?;
        // weight of the profile's tokens now: the sum of 2^(-t/half-life) over t = 0 .. tokens
        let fade = |tokens: f64| (-tokens / HALF_LIFE_TOKENS).exp2();
        let total = (1.0 - fade(profile.tokens as f64)) / (1.0 - fade(1.0));
        for (layer, heat) in self.layers.iter_mut().zip(heat) {
            let sum: f64 = heat.iter().map(|h| f64::from(*h)).sum();
            if sum > 0.0 {
                for (s, h) in layer.sums.iter_mut().zip(heat) {
                    *s += self.weight * total * (f64::from(h) / sum);
                }
            }
        }
        self.tokens = self.tokens.saturating_add(profile.tokens);
        Ok(())
    }

    /// One ubatch of `n_tokens` tokens; `ids[layer]` are the experts routed in it, in the order of `layers`
    /// of [`Tally::new`]. Its tokens are of one age.
    pub fn observe(&mut self, n_tokens: u32, ids: &[Vec<u16>]) {
        self.tokens = self.tokens.saturating_add(n_tokens.into());
        self.weight *= (f64::from(n_tokens) / HALF_LIFE_TOKENS).exp2();
        for (layer, ids) in self.layers.iter_mut().zip(ids) {
            let share = self.weight * f64::from(n_tokens) / ids.len().max(1) as f64;
            for id in ids {
                layer.sums[usize::from(*id)] += share;
            }
        }
        if self.weight > MAX_WEIGHT {
            self.layers.iter_mut().flat_map(|l| &mut l.sums).for_each(|s| *s /= self.weight);
            self.weight = 1.0;
        }
    }

    /// Tokens counted, those resumed from included.
    pub fn tokens(&self) -> u64 {
        self.tokens
    }

    /// `shares[layer][expert]`: its part of the layer's uses, 1 over the layer; 0 in one without uses.
    pub fn shares(&self) -> Vec<Vec<f32>> {
        let shares = |l: &TallyLayer| {
            let sum: f64 = l.sums.iter().sum();
            let sum = if sum > 0.0 { sum } else { 1.0 };
            l.sums.iter().map(|s| (s / sum) as f32).collect()
        };
        self.layers.iter().map(shares).collect()
    }

    /// What is known by now about the model with router hash `model`. Layers without uses are left out.
    pub fn profile(&self, model: u64, name: &str) -> Profile {
        let layers = self.layers.iter().zip(self.shares());
        let layers = layers
            .filter(|(l, _)| l.sums.iter().any(|s| *s > 0.0))
            .map(|(l, heat)| ProfileLayer { il: l.il, heat })
            .collect();
        Profile { model, name: name.into(), tokens: self.tokens, layers }
    }
}

/// Tells models apart by their routers: XXH64 with seed 0 over `u16 il, u64 bytes, bytes` of each router,
/// numbers little-endian. The same on every platform and in every version; depends on the order, so
/// layers go in by rising `il`.
#[derive(Clone)]
pub struct RouterHash(Xxh64);

impl RouterHash {
    /// Of no router yet.
    pub fn new() -> Self {
        RouterHash(Xxh64::new(0))
    }

    /// Adds the weights of layer `il`'s router.
    pub fn add(&mut self, il: u16, bytes: &[u8]) -> &mut Self {
        self.0.update(&il.to_le_bytes());
        // so that no byte can pass from one router to the next
        self.0.update(&(bytes.len() as u64).to_le_bytes());
        self.0.update(bytes);
        self
    }

    /// The hash of what was added.
    pub fn finish(&self) -> u64 {
        self.0.digest()
    }
}

impl Default for RouterHash {
    fn default() -> Self {
        Self::new()
    }
}

/// [`RouterHash`] of `(il, bytes)` of all routers, by rising `il`.
pub fn hash_routers<'a>(routers: impl IntoIterator<Item = (u16, &'a [u8])>) -> u64 {
    let mut hash = RouterHash::new();
    for (il, bytes) in routers {
        hash.add(il, bytes);
    }
    hash.finish()
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use tempfile::tempdir;

    use super::*;

    fn profile() -> Profile {
        let layer = |il, heat: &[f32]| ProfileLayer { il, heat: heat.into() };
        Profile {
            model: 0x0123_4567_89ab_cdef,
            name: "a \"model\"".into(),
            tokens: 81234,
            layers: vec![layer(3, &[0.25, 0.75]), layer(1, &[0.0, 1.0, 0.1])],
        }
    }

    /// What loading a file with `text` says, the file called `FILE` and any column `N`.
    fn refusal(text: &str) -> String {
        let dir = tempdir().unwrap();
        let path = dir.path().join("p.json");
        fs::write(&path, text).unwrap();
        let message = Profile::load(&path).unwrap_err().to_string().replace(path.to_str().unwrap(), "FILE");
        match message.split_once(" at line 1 column ") {
            Some((message, column)) if column.parse::<u32>().is_ok() => {
                format!("{message} at line 1 column N")
            }
            _ => message,
        }
    }

    fn with_layers(layers: &str) -> String {
        format!(
            r#"{{"format":"moe-hot profile","version":1,"model":"0123456789abcdef","name":"","tokens":0,"layers":[{layers}]}}"#
        )
    }

    fn names(dir: &Path) -> Vec<String> {
        let mut names: Vec<_> =
            fs::read_dir(dir).unwrap().map(|e| e.unwrap().file_name().into_string().unwrap()).collect();
        names.sort();
        names
    }

    #[test]
    fn the_format_is_as_documented() {
        let dir = tempdir().unwrap();
        let path = dir.path().join("p.json");
        let mut p = profile();
        p.save(&path).unwrap();
        assert_eq!(
            fs::read_to_string(&path).unwrap(),
            concat!(
                r#"{"format":"moe-hot profile","version":1,"model":"0123456789abcdef","name":"a \"model\"","tokens":81234,"#,
                r#""layers":[{"il":3,"heat":[0.25,0.75]},{"il":1,"heat":[0.0,1.0,0.1]}]}"#,
                "\n"
            )
        );
        assert_eq!(Profile::load(&path).unwrap(), p);
        (p.tokens, p.layers) = (u64::MAX, vec![]);
        p.save(&path).unwrap();
        assert_eq!(Profile::load(&path).unwrap(), p);
        assert_eq!(names(dir.path()), ["p.json"]);
    }

    #[test]
    #[cfg_attr(miri, ignore = "the system's messages are others there")]
    fn every_bad_file_has_its_message() {
        let good = with_layers(r#"{"il":0,"heat":[1.0]}"#);
        let cases = [
            (String::new(), "FILE: not JSON: EOF while parsing a value at line 1 column N"),
            (good[..good.len() - 1].into(), "FILE: not JSON: EOF while parsing an object at line 1 column N"),
            (with_layers(r#"{"il":0,"heat":[NaN]}"#), "FILE: not JSON: expected value at line 1 column N"),
            (
                with_layers(r#"{"il":0,"heat":[1e999]}"#),
                "FILE: not a profile: number out of range at line 1 column N",
            ),
            (
                "7".into(),
                "FILE: not a profile: invalid type: integer `7`, expected an object at line 1 column N",
            ),
            ("{}".into(), "FILE: its format is missing, expected \"moe-hot profile\""),
            (r#"{"format":"gguf"}"#.into(), "FILE: its format is \"gguf\", expected \"moe-hot profile\""),
            (
                r#"{"format":"moe-hot profile"}"#.into(),
                "FILE: profile of version missing, expected version 1",
            ),
            (
                good.replace("\"version\":1", "\"version\":2"),
                "FILE: profile of version 2, expected version 1",
            ),
            (
                good.replace("0123456789abcdef", "+123456789abcdef"),
                "FILE: not a profile: model \"+123456789abcdef\", expected 16 hexadecimal digits at line 1 column N",
            ),
            (
                good.replace("\"tokens\":0,", ""),
                "FILE: not a profile: missing field `tokens` at line 1 column N",
            ),
            (
                with_layers(r#"{"il":0,"heat":[null]}"#),
                "FILE: not a profile: invalid type: null, expected f32 at line 1 column N",
            ),
            (
                with_layers(r#"{"il":70000,"heat":[]}"#),
                "FILE: not a profile: invalid value: integer `70000`, expected u16 at line 1 column N",
            ),
            (
                with_layers(r#"{"il":5,"heat":[1.0,-0.5]}"#),
                "FILE: layer 5, expert 1: heat -0.5, expected a finite number of at least 0",
            ),
            (
                with_layers(r#"{"il":5,"heat":[1e300]}"#),
                "FILE: not a profile: number out of range at line 1 column N",
            ),
            (with_layers(r#"{"il":5,"heat":[]},{"il":5,"heat":[1]}"#), "FILE: layer 5 is there twice"),
            (
                " ".repeat(MAX_BYTES as usize + 1),
                "FILE: larger than 16777216 bytes, the most that a profile may have",
            ),
        ];
        for (text, message) in cases {
            assert_eq!(refusal(&text), message, "{}", &text[..text.len().min(200)]);
        }
        let path = Path::new("/nowhere/p.json");
        assert_eq!(
            Profile::load(path).unwrap_err().to_string(),
            "/nowhere/p.json: No such file or directory (os error 2)"
        );
    }

    #[test]
    fn what_load_refuses_is_not_saved() {
        let dir = tempdir().unwrap();
        let path = dir.path().join("p.json");
        for heat in [f32::NAN, f32::INFINITY, -1.0] {
            let mut p = profile();
            p.layers[1].heat[2] = heat;
            assert_eq!(
                p.save(&path).unwrap_err().to_string(),
                format!(
                    "{}: layer 1, expert 2: heat {heat}, expected a finite number of at least 0",
                    path.display()
                )
            );
        }
        let mut p = profile();
        p.layers[1].il = 3;
        assert!(matches!(p.save(&path), Err(ProfileError::Twice { il: 3, .. })));
        assert_eq!(names(dir.path()), [""; 0]);
    }

    #[test]
    #[cfg_attr(miri, ignore = "calls setfsuid, which Miri does not know")]
    fn an_old_file_survives_a_save_that_fails() {
        let dir = tempdir().unwrap();
        let path = dir.path().join("p.json");
        let old = profile();
        old.save(&path).unwrap();
        let new = Profile { tokens: 1, ..profile() };
        let set_mode = |mode| fs::set_permissions(dir.path(), Permissions::from_mode(mode)).unwrap();

        set_mode(0o555);
        let failed = std::thread::scope(|s| {
            let save = || {
                // SAFETY: no memory is involved; Linux sets it for this thread alone, and the thread ends.
                // Root could write to the folder whatever its mode.
                unsafe { libc::setfsuid(65534) };
                new.save(&path)
            };
            s.spawn(save).join().unwrap()
        });
        set_mode(0o755);
        let Err(ProfileError::Io { path: named, source }) = failed else { panic!("{failed:?}") };
        assert_eq!((named, source.kind()), (path.display().to_string(), io::ErrorKind::PermissionDenied));
        assert_eq!(names(dir.path()), ["p.json"], "nothing is left behind");
        assert_eq!(Profile::load(&path).unwrap(), old);

        let missing = dir.path().join("missing/p.json");
        let Err(ProfileError::Io { source, .. }) = new.save(&missing) else { panic!("saved") };
        assert_eq!(source.kind(), io::ErrorKind::NotFound);
        assert!(matches!(new.save(dir.path()), Err(ProfileError::NotAFile { .. })));
        assert!(matches!(new.save(Path::new("/dev/null")), Err(ProfileError::NotAFile { .. })));
        assert_eq!(names(dir.path()), ["p.json"]);
    }

    #[test]
    fn a_file_keeps_its_mode_and_a_link_its_place() {
        let dir = tempdir().unwrap();
        let (path, link) = (dir.path().join("p.json"), dir.path().join("link.json"));
        profile().save(&path).unwrap();
        // what any new file has
        fs::write(dir.path().join("other"), "").unwrap();
        let mode = |name: &str| fs::metadata(dir.path().join(name)).unwrap().permissions().mode() & 0o777;
        assert_eq!(mode("p.json"), mode("other"));

        fs::set_permissions(&path, Permissions::from_mode(0o666)).unwrap();
        std::os::unix::fs::symlink("p.json", &link).unwrap();
        let new = Profile { tokens: 1, ..profile() };
        new.save(&link).unwrap();
        assert!(fs::symlink_metadata(&link).unwrap().is_symlink());
        assert_eq!((Profile::load(&path).unwrap(), mode("p.json")), (new, 0o666));
    }

    #[test]
    fn heat_is_for_the_same_model_only() {
        let p = profile();
        let heat = p.heat_for(p.model, &[(0, 4), (1, 3)]).unwrap();
        assert_eq!(heat, [vec![0.0; 4], vec![0.0, 1.0, 0.1]], "layer 0 is missing, layer 3 is beside");
        assert_eq!(
            p.heat_for(2, &[]).unwrap_err().to_string(),
            "the profile is of another model: \"a \\\"model\\\"\" with router hash 0123456789abcdef, this model has 0000000000000002"
        );
        assert_eq!(
            p.heat_for(p.model, &[(1, 4)]).unwrap_err().to_string(),
            "the profile has 3 experts in layer 1, this model has 4"
        );
    }

    #[test]
    fn a_router_hash_is_the_same_everywhere() {
        let bytes: Vec<u8> = (0..100).collect();
        // from another implementation of XXH64
        assert_eq!(RouterHash::new().add(0, &[1, 2, 3]).add(7, &bytes).finish(), 0x978e_9b49_e919_1b1c);
        assert_eq!(hash_routers([(0, &[1, 2, 3][..]), (7, &bytes)]), 0x978e_9b49_e919_1b1c);
        let others = [
            hash_routers([(0, &[1, 2, 3][..]), (8, &bytes)]),
            hash_routers([(7, &bytes[..]), (0, &[1, 2, 3])]),
            hash_routers([(0, &[1, 2][..]), (7, &bytes)]),
            hash_routers([]),
        ];
        assert!(!others.contains(&0x978e_9b49_e919_1b1c));
    }

    #[test]
    fn a_short_run_does_not_replace_a_long_one() {
        let routed = |t: &mut Tally, expert, tokens| (0..tokens).for_each(|_| t.observe(1, &[vec![expert]]));
        let layers = [(5, 4)];
        let mut whole = Tally::new(&layers);
        routed(&mut whole, 1, 20_000);
        let saved = whole.profile(9, "m");
        routed(&mut whole, 2, 500);

        let mut resumed = Tally::new(&layers);
        resumed.resume(&saved, 9).unwrap();
        routed(&mut resumed, 2, 500);
        assert_eq!(resumed.tokens(), 20_500);
        for (a, b) in whole.shares()[0].iter().zip(&resumed.shares()[0]) {
            assert!((a - b).abs() < 1e-6, "{a} {b}");
        }
        assert!(matches!(Tally::new(&layers).resume(&saved, 8), Err(ProfileError::OtherModel { .. })));
    }

    #[test]
    fn a_tally_stands_any_number_of_tokens() {
        let mut t = Tally::new(&[(0, 3), (1, 2)]);
        for _ in 0..4000 {
            t.observe(4096, &[vec![0, 2, 2, 2], vec![]]);
        }
        assert_eq!(t.shares(), [vec![0.25, 0.0, 0.75], vec![0.0, 0.0]]);
        let p = t.profile(1, "m");
        assert_eq!((p.tokens, p.layers.len(), p.layers[0].il), (4000 * 4096, 1, 0), "no heat for layer 1");
    }

    proptest! {
        #[test]
        fn a_profile_comes_back_as_it_was(
            model: u64,
            name: String,
            tokens: u64,
            layers in prop::collection::btree_map(any::<u16>(), prop::collection::vec(0f32..=f32::MAX, 0..20), 0..8),
        ) {
            let layers = layers.into_iter().map(|(il, heat)| ProfileLayer { il, heat }).collect();
            let p = Profile { model, name, tokens, layers };
            let dir = tempdir().unwrap();
            let path = dir.path().join("p.json");
            p.save(&path).unwrap();
            prop_assert_eq!(Profile::load(&path).unwrap(), p);
        }

        /// No bytes make it panic.
        #[test]
        fn any_file_is_read_or_refused(at in 0..200usize, byte: u8) {
            let mut text = with_layers(r#"{"il":5,"heat":[0.5,1e3]},{"il":6,"heat":[]}"#).into_bytes();
            let at = at % text.len();
            text[at] = byte;
            let dir = tempdir().unwrap();
            let path = dir.path().join("p.json");
            fs::write(&path, text).unwrap();
            match Profile::load(&path) {
                Ok(p) => p.save(&path).unwrap(),
                Err(e) => prop_assert!(e.to_string().contains("p.json: ")),
            }
        }

        #[test]
        fn a_tally_is_what_a_naive_one_is(
            // from a step of one token to ones that make it set its weights back
            steps in prop::collection::vec((1..200_000u32, prop::collection::vec(prop::collection::vec(0..6u16, 0..5), 2)), 1..60),
        ) {
            let mut tally = Tally::new(&[(0, 6), (1, 6)]);
            let mut naive = [[0f64; 6]; 2];
            for (n_tokens, ids) in &steps {
                tally.observe(*n_tokens, ids);
                for (sums, ids) in naive.iter_mut().zip(ids) {
                    for s in sums.iter_mut() {
                        *s *= 0.5f64.powf(f64::from(*n_tokens) / HALF_LIFE_TOKENS);
                    }
                    for id in ids {
                        sums[usize::from(*id)] += f64::from(*n_tokens) / ids.len() as f64;
                    }
                }
            }
            for (shares, naive) in tally.shares().iter().zip(&naive) {
                let sum: f64 = naive.iter().sum();
                for (a, b) in shares.iter().zip(naive) {
                    let b = if sum > 0.0 { b / sum } else { 0.0 };
                    prop_assert!((f64::from(*a) - b).abs() < 1e-6, "{} {}", a, b);
                }
            }
        }
    }
}
