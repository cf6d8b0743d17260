//! What the tests of this crate share: libllama behind a safe wrapper, the test models, and the token
//! sequences that are decoded with and without expert slots.
//!
//! Which libllama: `MOE_HOT_BUILD_DIR`, else `build/` of the project. It is loaded at run time and may be
//! a build without the expert cache; [`Llama::has_moe_hot`] tells.

#![warn(missing_docs)]

pub mod compare;
mod llama;
pub mod models;
pub mod paths;
pub mod replayed;
pub mod schedule;
pub mod server;

#[allow(
    dead_code,
    unsafe_op_in_unsafe_fn,
    non_camel_case_types,
    non_snake_case,
    non_upper_case_globals,
    clippy::all
)]
mod sys {
    include!(concat!(env!("OUT_DIR"), "/llama.rs"));
}

pub use llama::{
    Adapter, Context, ContextOptions, Exclusive, Hot, Input, Line, Llama, LoadOptions, Logits, Model, Stats,
};
