//! What is fuzzed: a function a target, from bytes to nothing. It must return: a panic is a finding, and so is memory
//! above the bound that the target states.
//!
//! The binaries in `fuzz_targets` give these functions to libFuzzer; `tests/fuzzed.rs` runs them over `corpus`.

pub mod abi;
pub mod config;
pub mod http;
pub mod memory;
pub mod profile;
pub mod replay;
pub mod trace;
