//! Row kernels: rows of one expert's matrix times a few activations, at the speed of memory.
//!
//! Against ggml's dot products, which most of the time wait for their own instructions, they differ in three ways:
//!
//! - The activation is *prepared* once: put into the order in which the weights' nibbles come out of a register,
//!   with its scales spread to the lanes, and with what an offset of the weights adds, so that unsigned weights and
//!   signed activations meet in one exact integer instruction.
//! - A thread reads one contiguous stream and asks for what comes next a few KiB ahead. (Four rows at a time are
//!   faster from a cache and slower from memory: the hardware prefetcher loses the streams.)
//! - Weights are decoded once for all activations.
//!
//! Activations keep ggml's format (`from_float`), and integers are summed exactly, so a product differs from ggml's
//! only by the order in which its blocks are added up.

#[cfg(target_arch = "x86_64")]
mod avx512;

use super::kernel::Target;
use crate::ggml;

/// Activations that a kernel multiplies while it holds a row: as many as keep their sums in registers.
const MAX_AT_ONCE: usize = 4;
/// Of registers and cache lines.
const ALIGN: usize = 64;

/// Rows of a matrix that follow each other in memory.
#[derive(Clone, Copy, Debug)]
pub struct Rows {
    /// The first.
    pub first: *const u8,
    /// How many.
    pub n: usize,
    /// From one to the next; what a row has.
    pub row_bytes: usize,
    /// Elements of a row.
    pub n_in: usize,
    /// Bytes that a prefetch is ahead of the reading; 0: none.
    pub ahead: usize,
}

/// The kernel of one weight type.
#[derive(Clone, Copy, Debug)]
pub struct RowKernel {
    /// The type's name, and the instructions that it needs.
    pub name: &'static str,
    /// Bytes of a prepared activation of so many elements, a multiple of 64.
    pub act_bytes: fn(usize) -> usize,
    /// Prepares an activation of so many elements from ggml's format.
    prepare: unsafe fn(usize, *const u8, *mut u8),
    /// Multiplies with up to `MAX_AT_ONCE` prepared activations.
    multiply: unsafe fn(&Rows, &[Target]),
}

impl RowKernel {
    /// The fastest kernel for rows of `n_in` weights of type `ty` on this CPU. `row_bytes` and `act_row_bytes` are
    /// what ggml says of a row and of its activation: formats that are not those that kernels know get none.
    pub fn find(ty: i32, n_in: usize, row_bytes: usize, act_row_bytes: usize) -> Option<RowKernel> {
        RowKernel::all(ty, n_in, row_bytes, act_row_bytes).next()
    }

    /// As `find`, all that this CPU can run, the fastest first.
    pub fn all(
        ty: i32,
        n_in: usize,
        row_bytes: usize,
        act_row_bytes: usize,
    ) -> impl Iterator<Item = RowKernel> {
        let blocks = |block: usize, bytes: usize| n_in.is_multiple_of(block).then_some(n_in / block * bytes);
        let known = Format::of(ty).is_some_and(|f| {
            let act = if f.block == 32 { blocks(32, 34) } else { blocks(256, 292) };
            blocks(f.block, f.bytes) == Some(row_bytes) && act == Some(act_row_bytes)
        });
        SETS.iter()
            .filter(move |_| known)
            .filter(|set| (set.is_available)())
            .filter_map(move |set| (set.kernel)(ty))
    }

    /// Prepares an activation.
    ///
    /// # Safety
    /// `act` is one of `n_in` elements in ggml's format, `out` is aligned to 64 bytes and has `act_bytes(n_in)`.
    pub unsafe fn prepare(&self, n_in: usize, act: *const u8, out: *mut u8) {
        debug_assert!(out.addr().is_multiple_of(ALIGN));
        // SAFETY: passed on; `find` checked the CPU.
        unsafe { (self.prepare)(n_in, act, out) };
    }

    /// Multiplies `rows` with every target's activation.
    ///
    /// # Safety
    /// Rows are there, activations are prepared by this kernel, outputs have room for `rows.n` elements.
    pub unsafe fn multiply(&self, rows: &Rows, targets: &[Target]) {
        for targets in targets.chunks(MAX_AT_ONCE) {
            // SAFETY: passed on; `find` checked the CPU.
            unsafe { (self.multiply)(rows, targets) };
        }
    }
}

/// Kernels that need the same instructions.
struct InstructionSet {
    is_available: fn() -> bool,
    kernel: fn(i32) -> Option<RowKernel>,
}

/// The fastest first.
const SETS: &[InstructionSet] = &[
    #[cfg(target_arch = "x86_64")]
    InstructionSet { is_available: avx512::is_available, kernel: avx512::kernel },
];

/// Blocks of a weight type.
struct Format {
    /// Elements of a block.
    block: usize,
    /// Bytes of one.
    bytes: usize,
}

impl Format {
    /// Of the types that kernels exist for.
    fn of(ty: i32) -> Option<Format> {
        let (block, bytes) = match ty as u32 {
            ggml::GGML_TYPE_Q4_0 | ggml::GGML_TYPE_IQ4_NL => (32, 18),
            ggml::GGML_TYPE_Q8_0 => (32, 34),
            ggml::GGML_TYPE_MXFP4 => (32, 17),
            ggml::GGML_TYPE_Q4_K => (256, 144),
            ggml::GGML_TYPE_Q5_K => (256, 176),
            ggml::GGML_TYPE_Q6_K => (256, 210),
            ggml::GGML_TYPE_IQ4_XS => (256, 136),
            _ => return None,
        };
        Some(Format { block, bytes })
    }
}

/// `kvalues_iq4nl`, moved to unsigned bytes.
const IQ4_VALUES: [u8; 16] =
    moved([-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113]);
/// `kvalues_mxfp4`, twice what the format says, moved to unsigned bytes.
const MXFP4_VALUES: [u8; 16] = moved([0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12]);
/// By how much.
const TABLE_OFFSET: i32 = 128;

const fn moved(values: [i8; 16]) -> [u8; 16] {
    let mut out = [0; 16];
    let mut i = 0;
    while i < 16 {
        out[i] = (values[i] as u8) ^ 0x80;
        i += 1;
    }
    out
}
