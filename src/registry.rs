//! Which model has which pool. llama.cpp knows models by address; the pool outlives contexts, so that
//! the hot set survives from one to the next.

use std::{
    collections::BTreeMap,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
};

use parking_lot::{Mutex, RwLock};

use crate::{
    config::Config,
    log::{Level, log},
    model::Model,
};

struct Entry {
    model: Arc<Model>,
    contexts: usize,
}

static MODELS: Mutex<BTreeMap<usize, Entry>> = Mutex::new(BTreeMap::new());
static NEXT_ID: AtomicU64 = AtomicU64::new(1);

/// A number that no other context has.
pub fn next_id() -> u64 {
    NEXT_ID.fetch_add(1, Ordering::Relaxed)
}

/// The pool of the model at `key` for one more context. A pool that no context uses is made anew when
/// the options have changed; one in use stays as it is, and that is said.
pub fn attach(key: usize, config: Config) -> Arc<Model> {
    let mut models = MODELS.lock();
    let fresh = |config| Entry { model: Arc::new(Model::new(config)), contexts: 0 };
    let entry = models.entry(key).or_insert_with(|| fresh(config.clone()));
    if entry.contexts == 0 && *entry.model.config() != config {
        *entry = fresh(config);
    } else if entry.contexts > 0 && entry.model.is_active() {
        let (slots, n) = (entry.model.n_slots(), entry.contexts);
        let s = if n == 1 { "" } else { "s" };
        log!(
            Level::Info,
            "moe-hot: this context shares the {slots} slots of its model with {n} other context{s}"
        );
        if *entry.model.config() != config {
            let requested = entry.model.config().requested();
            log!(
                Level::Warn,
                "moe-hot: the options have changed, but the model's slots are in use: {requested} and all else stays"
            );
        }
    }
    entry.contexts += 1;
    entry.model.clone()
}

/// Held while somebody looks at models who is no context of theirs.
static VISITED: RwLock<()> = RwLock::new(());

/// Calls `f` with the models that have slots. None of them is freed meanwhile.
pub fn visit<T>(f: impl FnOnce(&[Arc<Model>]) -> T) -> T {
    let _visited = VISITED.read();
    let models = MODELS.lock();
    let active: Vec<_> = models.values().map(|e| &e.model).filter(|m| m.is_active()).cloned().collect();
    drop(models);
    f(&active)
}

/// A context of `model` at `key` is gone. By now there may be another model at that address.
pub fn detach(key: usize, model: &Arc<Model>) {
    if let Some(entry) = MODELS.lock().get_mut(&key).filter(|e| Arc::ptr_eq(&e.model, model)) {
        entry.contexts -= 1;
    }
}

/// The model at `key` is gone.
pub fn forget(key: usize) {
    let entry = MODELS.lock().remove(&key);
    // who visits it is done with it soon, and its weights are there until we return
    drop(VISITED.write());
    // outside the lock: dropping a pool joins its threads
    drop(entry);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_context_that_outlives_its_model_leaves_the_next_one_alone() {
        const KEY: usize = 0x1000;
        let old = attach(KEY, Config::default());
        forget(KEY);
        let new = attach(KEY, Config::default());
        detach(KEY, &old);
        assert_eq!(MODELS.lock()[&KEY].contexts, 1);
        detach(KEY, &new);
        assert_eq!(MODELS.lock()[&KEY].contexts, 0);
        forget(KEY);
    }
}
