//! The cold engine: computes the experts that have no slot, from the host copy of their weights.
//!
//! - `kernel`: what an expert's three matrices are and how a row of each is multiplied.
//! - `engine`: one layer's request cut into units that any thread can take, and the rows they make.
//! - `rows`: row kernels of our own for the common weight types, faster than ggml's.
//! - `pool`: the worker threads that take them, spinning while decode runs, parked when it stops.
//! - `placement`, `probe`: which CPUs they run on, how many they are, and how far ahead they fetch.
//!
//! With ggml's kernels its numbers are ggml's own: every dot product, conversion and activation goes through the
//! function pointers that ggml's CPU backend uses for the same tensor, on the same operands.

pub mod engine;
pub mod kernel;
pub mod placement;
pub mod pool;
pub mod probe;
pub mod rows;

pub use engine::{ColdRow, Engine, EngineError, join_bound};
pub use kernel::{Activation, Layer, Matrix};
pub use pool::WorkerPool;
