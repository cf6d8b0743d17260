//! moe-hot: keeps the experts in use in fast memory while llama.cpp decodes, computes the others beside
//! it, and follows the text as it moves.
//!
//! `ffi` is the door; behind it `registry` finds a `model`'s pool (`slots`, `policy`, `transfer`), and
//! each llama_context has a `context` with its `mailbox` and its engine (`cold`). `device` runs the two
//! nodes that llama.cpp's graph gets for each MoE layer.

#![warn(missing_docs)]
#![deny(unsafe_op_in_unsafe_fn)]

pub mod budget;
pub mod cold;
pub mod config;
pub mod context;
#[cfg(feature = "cli")]
pub mod cost;
pub mod device;
pub mod fault;
pub mod ffi;
pub mod ggml;
#[cfg(feature = "cli")]
pub mod gguf;
pub mod handles;
#[cfg(feature = "cli")]
pub mod heatmap;
pub mod judge;
pub mod lanes;
pub mod log;
pub mod mailbox;
#[cfg(feature = "cli")]
pub mod measure;
pub mod model;
#[cfg(test)]
mod model_loom;
pub mod planner;
#[cfg(feature = "cli")]
pub mod plot;
pub mod policy;
pub mod profile;
pub mod registry;
pub mod replay;
pub mod slots;
pub mod sync;
pub mod telemetry;
pub mod trace;
pub mod transfer;
pub mod usage;
pub mod verify;
pub mod view;
pub mod warm;
