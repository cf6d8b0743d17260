//! The synthetic test models: one of every architecture, weight type and special case, made by
//! `scripts/gen-moe-gguf --test-set` and kept in `.cache/test-models`.

use std::{path::PathBuf, process::Command, sync::OnceLock};

use serde::Deserialize;

use crate::paths::{root, shipped_model};

/// A model, as the generator's index describes it. Adapters are entries too, with `arch` "lora".
#[derive(Clone, Debug, Deserialize)]
pub struct TestModel {
    /// Path of the file.
    pub file: PathBuf,
    /// Architecture by the generator's name.
    pub arch: String,
    /// Weight type of the experts.
    #[serde(rename = "type")]
    pub weight_type: String,
    /// Experts of a layer, 0 for a dense model.
    #[serde(default)]
    pub n_expert: u32,
    /// Experts a token.
    #[serde(default)]
    pub n_used: u32,
    /// Layers that have experts.
    #[serde(default)]
    pub n_moe_layer: u32,
    /// Whether every MoE layer may take the hot path.
    pub supported: bool,
    /// Of an adapter: the file of its model.
    #[serde(default)]
    pub base: Option<String>,
}

impl TestModel {
    /// File name without its ending.
    pub fn name(&self) -> String {
        self.file.file_stem().expect("a file has a name").to_string_lossy().into_owned()
    }

    /// Slots a layer to test with: the smallest pool, one in which experts come and go, and all.
    pub fn ks(&self) -> [u32; 3] {
        let middle = (2 * self.n_used).min(self.n_expert / 2).max(2);
        [1, middle, self.n_expert]
    }
}

/// All synthetic models and adapters. The generator runs once a process, and writes only what is missing or
/// was made by another version of itself.
///
/// # Panics
/// When the generator fails.
pub fn test_set() -> &'static [TestModel] {
    static SET: OnceLock<Vec<TestModel>> = OnceLock::new();
    SET.get_or_init(|| {
        let dir = root().join(".cache/test-models");
        let python = root().join(".venv/bin/python");
        assert!(python.exists(), "{} is missing: run scripts/setup first", python.display());
        let out = Command::new(python)
            .arg(root().join("scripts/gen-moe-gguf"))
            .arg("--test-set")
            .arg(&dir)
            .output();
        let out = out.expect("python can be started");
        assert!(out.status.success(), "gen-moe-gguf --test-set: {}", String::from_utf8_lossy(&out.stderr));
        let index = std::fs::read(dir.join("index.json")).expect("the generator writes an index");
        let mut set: Vec<TestModel> = serde_json::from_slice(&index).expect("the index is a list of models");
        for m in &mut set {
            m.file = dir.join(&m.file);
        }
        set
    })
}

/// The synthetic model or adapter of this name.
///
/// # Panics
/// When there is none.
pub fn named(name: &str) -> &'static TestModel {
    test_set().iter().find(|m| m.name() == name).unwrap_or_else(|| panic!("the test set has no model {name}"))
}

/// The trained model.
pub fn shipped() -> TestModel {
    TestModel {
        file: shipped_model(),
        arch: "qwen3moe".into(),
        weight_type: "Q4_0".into(),
        n_expert: 64,
        n_used: 8,
        n_moe_layer: 6,
        supported: true,
        base: None,
    }
}
