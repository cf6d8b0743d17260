//! Slots in VRAM; DISPATCH and JOIN are kernels on ggml's stream.
//!
//! The driver is loaded at run time, so a build with CUDA support runs on a machine without a GPU. The
//! kernels come from `kernels/moe_hot.cu`, compiled by nvcc when `scripts/build --cuda` asks for it.

mod copier;
mod driver;
#[cfg(feature = "cli")]
pub mod look;
#[cfg(feature = "cli")]
pub mod measure;
mod memory;
mod node;
mod port;

/// Largest ubatch that takes the hot path, in tokens: up to there ggml has vector kernels, which need no
/// more than a guard to skip an expert.
pub const MAX_TOKENS: u32 = 8;

/// Uses of experts for each one that a plan may upload. The link is idle but for activations and rows, and a copy over it
/// takes about as long as two uses on the CPU: a quarter of the time at most.
pub const USES_PER_UPLOAD: u32 = 8;

pub use copier::CudaCopier;
pub use driver::{CudaError, Device, Stream, kernels_built};
pub use memory::{Piece, Pinned, Registration, VideoMemory};
pub use node::{dispatch, join};
pub use port::{Fault, Port, PortShape};
