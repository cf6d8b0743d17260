//! The expert matrices of a layer and the row operations on them.

use std::ffi::{c_int, c_void};

use super::rows::{Numerics, RowKernel, Rows};

/// ggml's dot product of one weight row with one converted activation row
/// (`ggml_type_traits_cpu.vec_dot`, always with `nrc = 1` and strides 0).
pub type VecDot =
    unsafe extern "C" fn(c_int, *mut f32, usize, *const c_void, usize, *const c_void, usize, c_int);
/// ggml's conversion of f32 activations to the format a dot product takes (`from_float`).
pub type FromFloat = unsafe extern "C" fn(*const f32, *mut c_void, i64);
/// `y[i] = act(x[i]) * g[i]`, ggml's vector function.
pub type GatedFn = unsafe extern "C" fn(c_int, *mut f32, *const f32, *const f32);
/// `y[i] = act(x[i])`, ggml's vector function.
pub type UnaryFn = unsafe extern "C" fn(c_int, *mut f32, *const f32);

/// One projection of all experts of a layer in host memory: `[n_in, n_out, n_expert]` in ggml's order.
#[derive(Clone, Copy, Debug)]
pub struct Matrix {
    /// First byte of expert 0.
    pub data: *const u8,
    /// First byte and size of the buffer that `data` is in, where known.
    pub buffer: Option<(usize, usize)>,
    /// ggml type of the weights; only compared, to tell slot classes apart.
    pub ty: i32,
    /// Elements of a row.
    pub n_in: usize,
    /// Rows of an expert.
    pub n_out: usize,
    /// Bytes from a row to the next.
    pub row_bytes: usize,
    /// Bytes from an expert to the next.
    pub expert_bytes: usize,
    /// Dot product of this weight type.
    pub vec_dot: VecDot,
    /// Conversion of an activation row; `None` when the dot product takes f32 as it is.
    pub from_float: Option<FromFloat>,
    /// Bytes of a converted activation row of `n_in` elements.
    pub act_row_bytes: usize,
    /// What multiplies instead of `vec_dot`, if anything.
    pub kernel: Option<RowKernel>,
    /// Bytes that prefetches are ahead of the reading; 0: none.
    pub ahead: usize,
}

// SAFETY: `data` is only read, and the model that owns it outlives every user: the layer is dropped
// with the pool, which the bridge frees before the weights.
unsafe impl Send for Matrix {}
// SAFETY: as above; all access is read-only.
unsafe impl Sync for Matrix {}

impl Matrix {
    /// First byte of `row` of `expert`.
    pub fn row(&self, expert: usize, row: usize) -> *const u8 {
        debug_assert!(row < self.n_out);
        self.data.wrapping_add(expert * self.expert_bytes + row * self.row_bytes)
    }

    /// Uses our kernel for the type on this CPU, if there is one. Before the first activation is converted.
    pub fn use_row_kernel(&mut self, numerics: Numerics) {
        self.kernel = RowKernel::find(self.ty, self.n_in, self.row_bytes, numerics);
    }

    /// Prefetches `ahead` bytes before they are read, if the experts are large enough for that.
    pub fn prefetch(&mut self, ahead: usize) {
        if default_ahead(self.expert_bytes) > 0 {
            self.ahead = ahead;
        }
    }

    /// Bytes of what [`Matrix::convert`] writes.
    pub fn converted_bytes(&self) -> usize {
        self.kernel.map_or(self.act_row_bytes, |k| (k.act_bytes)(self.n_in))
    }

    /// Converts an activation for [`Matrix::multiply`]; false when that takes it as it is.
    ///
    /// # Safety
    /// `act` has `n_in` elements; `out` has `converted_bytes` and is aligned to 64.
    pub unsafe fn convert(&self, act: *const f32, out: *mut u8) -> bool {
        let Some(from_float) = self.from_float else { return false };
        // SAFETY: the caller vouches for both rows.
        unsafe {
            match &self.kernel {
                None => from_float(act, out.cast(), self.n_in as i64),
                Some(k) => k.prepare(self.n_in, act, out),
            }
        }
        true
    }

    /// Rows `first` to `end` of `expert` times each of some activations: element i of a target's output is that of
    /// row `first + i`. The weights are read once.
    ///
    /// # Safety
    /// Expert and rows are in range; every activation is converted for this matrix, every output has room for
    /// `end - first` elements.
    pub unsafe fn multiply(&self, expert: usize, first: usize, end: usize, targets: &[Target]) {
        let n = end - first;
        // A thread reads one row after the other, but rows cross pages, where the hardware's own prefetch stops.
        let ahead = self.ahead;
        // all at once: one after the other, each would be waited for
        for line in (0..ahead.min(n * self.row_bytes)).step_by(LINE) {
            prefetch_line(self.row(expert, first).wrapping_add(line));
        }
        if let Some(kernel) = &self.kernel {
            let first = self.row(expert, first);
            let rows = Rows { first, n, row_bytes: self.row_bytes, n_in: self.n_in, ahead };
            // SAFETY: passed on.
            unsafe { kernel.multiply(&rows, targets) };
            return;
        }
        let n_in = self.n_in as c_int;
        let weights = |i: usize| self.row(expert, first).wrapping_add(i * self.row_bytes);
        let dots = |i: usize| {
            for t in targets {
                // SAFETY: the caller vouches for the rows, the bridge for a `vec_dot` that fits the type.
                unsafe { (self.vec_dot)(n_in, t.out.add(i), 0, weights(i).cast(), 0, t.act.cast(), 0, 1) };
            }
        };
        let n_ahead = if ahead > 0 { n.saturating_sub(ahead.div_ceil(self.row_bytes)) } else { 0 };
        for i in 0..n_ahead {
            for line in (0..self.row_bytes).step_by(LINE) {
                prefetch_line(weights(i).wrapping_add(ahead + line));
            }
            dots(i);
        }
        (n_ahead..n).for_each(dots);
    }
}

/// An activation row, and where its products go.
#[derive(Clone, Copy, Debug)]
pub struct Target {
    /// Converted for the matrix.
    pub act: *const u8,
    /// The product with the first row.
    pub out: *mut f32,
}

/// Distance of a prefetch: what a core reads from memory while a line is on its way.
const PREFETCH_BYTES: usize = 3 << 10;
/// Experts of fewer bytes in a matrix are not prefetched: a unit reads little more than a page of them, and the
/// instructions would cost more than they bring.
const PREFETCH_FROM_BYTES: usize = 128 << 10;

/// Bytes that prefetches are ahead in a matrix of such experts, where nothing was measured.
pub fn default_ahead(expert_bytes: usize) -> usize {
    if expert_bytes < PREFETCH_FROM_BYTES { 0 } else { PREFETCH_BYTES }
}

/// 64-byte aligned bytes, as kernels want converted activations.
#[repr(C, align(64))]
#[derive(Clone, Copy, Default)]
pub struct Line([u64; 8]);

/// Of a cache line.
const LINE: usize = 64;

#[inline]
fn prefetch_line(at: *const u8) {
    #[cfg(target_arch = "x86_64")]
    // SAFETY: a hint that reads nothing, whatever the address.
    unsafe {
        std::arch::x86_64::_mm_prefetch::<{ std::arch::x86_64::_MM_HINT_T0 }>(at.cast());
    }
    #[cfg(not(target_arch = "x86_64"))]
    let _ = at;
}

/// What lies between the first and the last projection.
#[derive(Clone, Copy, Debug)]
pub enum Activation {
    /// `act(gate) * up`: SwiGLU, GeGLU.
    Gated(GatedFn),
    /// `act(up)`, no gate matrix.
    Unary(UnaryFn),
    /// `relu(up)^2`, no gate matrix.
    ReluSqr,
}

impl Activation {
    /// Applies the activation to `n` elements: `gate` is read and overwritten with the result.
    ///
    /// ggml runs a vector body and a scalar tail that round differently, so a part of a row gives the
    /// bits of the whole row only if it starts where a vector does; the engine cuts rows so.
    ///
    /// # Safety
    /// `x` is valid for `n` reads and writes; `up` for `n` reads when the activation is gated.
    pub unsafe fn apply(&self, n: usize, x: *mut f32, up: *const f32) {
        match self {
            // SAFETY: ggml loads an element of both operands before it stores the result's, so the
            // output may be the first operand; the caller vouches for the lengths.
            Activation::Gated(f) => unsafe { f(n as c_int, x, x, up) },
            // SAFETY: as above.
            Activation::Unary(f) => unsafe { f(n as c_int, x, x) },
            Activation::ReluSqr => {
                // SAFETY: the caller vouches for `n` elements.
                for v in unsafe { std::slice::from_raw_parts_mut(x, n) } {
                    // written as ggml writes relu, so that NaN becomes 0 here as well
                    let r = if *v > 0.0 { *v } else { 0.0 };
                    *v = r * r;
                }
            }
        }
    }
}

/// The experts of one MoE layer.
#[derive(Clone, Debug)]
pub struct Layer {
    /// Layer index in the model, for messages and traces.
    pub il: i32,
    /// Experts of the layer.
    pub n_expert: usize,
    /// Experts a token is routed to.
    pub n_used: usize,
    /// Gate projection; `None` when gate and up are one matrix, or there is no gate.
    pub gate: Option<Matrix>,
    /// Up projection; with `merged`, gate rows first, up rows after them.
    pub up: Matrix,
    /// Down projection.
    pub down: Matrix,
    /// Whether `up` holds both projections (`ffn_gate_up_exps`).
    pub merged: bool,
    /// The activation between them.
    pub activation: Activation,
}

impl Layer {
    /// Width of the expert's hidden layer.
    pub fn n_ff(&self) -> usize {
        self.down.n_in
    }

    /// Width of the residual stream.
    pub fn n_embd(&self) -> usize {
        self.up.n_in
    }

    /// The matrices of the layer in the order gate, up, down.
    pub fn matrices(&self) -> impl Iterator<Item = &Matrix> {
        self.gate.iter().chain([&self.up, &self.down])
    }

    /// The matrices, to be changed.
    pub fn matrices_mut(&mut self) -> impl Iterator<Item = &mut Matrix> {
        self.gate.iter_mut().chain([&mut self.up, &mut self.down])
    }

    /// Bytes of one expert over all its matrices.
    pub fn expert_bytes(&self) -> usize {
        self.matrices().map(|m| m.expert_bytes).sum()
    }
}
