//! ggml from build/bin (MOE_HOT_BUILD_DIR): what its CPU backend does with rows of a weight type.

#![allow(dead_code, reason = "each user takes a part")]

use std::{
    ffi::{c_int, c_void},
    path::PathBuf,
};

use moe_hot::cold::{Matrix, kernel};

/// `ggml_type_traits_cpu`.
#[repr(C)]
pub struct Traits {
    pub from_float: Option<kernel::FromFloat>,
    pub vec_dot: Option<kernel::VecDot>,
    pub vec_dot_type: c_int,
    nrows: i64,
}

/// `ggml_type_traits`.
#[repr(C)]
struct BaseTraits {
    type_name: *const i8,
    blck_size: i64,
    blck_size_interleave: i64,
    type_size: usize,
    is_quantized: bool,
    to_float: Option<unsafe extern "C" fn(*const c_void, *mut f32, i64)>,
}

pub struct Ggml {
    cpu: libloading::Library,
    base: libloading::Library,
}

impl Ggml {
    /// `None` when there is no build.
    pub fn load() -> Option<Self> {
        let dir = std::env::var_os("MOE_HOT_BUILD_DIR")
            .map_or_else(|| PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("build"), PathBuf::from);
        // SAFETY: ggml's libraries do nothing on load that a test minds.
        unsafe {
            let base = libloading::Library::new(dir.join("bin/libggml-base.so")).ok()?;
            let cpu = libloading::Library::new(dir.join("bin/libggml-cpu.so")).ok()?;
            cpu.get::<unsafe extern "C" fn()>(b"ggml_cpu_init").ok()?();
            Some(Ggml { cpu, base })
        }
    }

    pub fn traits(&self, ty: i32) -> &Traits {
        // SAFETY: the signature is the header's; the table is static.
        unsafe {
            let get: libloading::Symbol<unsafe extern "C" fn(c_int) -> *const Traits> =
                self.cpu.get(b"ggml_get_type_traits_cpu").unwrap();
            &*get(ty)
        }
    }

    pub fn row_bytes(&self, ty: i32, n: usize) -> usize {
        // SAFETY: the signature is the header's.
        unsafe {
            let get: libloading::Symbol<unsafe extern "C" fn(c_int, i64) -> usize> =
                self.base.get(b"ggml_row_size").unwrap();
            get(ty, n as i64)
        }
    }

    /// A matrix over `data` as the bridge describes one; multiplied by ggml.
    pub fn matrix(&self, data: *const u8, ty: i32, n_in: usize, n_out: usize) -> Matrix {
        let t = self.traits(ty);
        let row_bytes = self.row_bytes(ty, n_in);
        Matrix {
            buffer: None,
            data,
            ty,
            n_in,
            n_out,
            row_bytes,
            expert_bytes: n_out * row_bytes,
            vec_dot: t.vec_dot.unwrap(),
            from_float: self.traits(t.vec_dot_type).from_float,
            act_row_bytes: self.row_bytes(t.vec_dot_type, n_in),
            kernel: None,
            ahead: kernel::default_ahead(n_out * row_bytes),
        }
    }

    /// Rows of `n_in` elements in a weight type.
    pub fn quantize(&self, ty: i32, values: &[f32], n_in: usize) -> Vec<u8> {
        let rows = values.len() / n_in;
        let mut out = vec![0; rows * self.row_bytes(ty, n_in)];
        type Quantize =
            unsafe extern "C" fn(c_int, *const f32, *mut c_void, i64, i64, i64, *const f32) -> usize;
        // SAFETY: the signature is the header's, the sizes are those of the slices.
        unsafe {
            let quantize: libloading::Symbol<Quantize> = self.base.get(b"ggml_quantize_chunk").unwrap();
            quantize(
                ty,
                values.as_ptr(),
                out.as_mut_ptr().cast(),
                0,
                rows as i64,
                n_in as i64,
                std::ptr::null(),
            );
        }
        out
    }

    /// What a row of a type stands for.
    pub fn values(&self, ty: i32, row: &[u8], n: usize) -> Vec<f32> {
        let mut out = vec![0.0; n];
        // SAFETY: the signature is the header's, the table is static, and the row has `n` elements.
        unsafe {
            let get: libloading::Symbol<unsafe extern "C" fn(c_int) -> *const BaseTraits> =
                self.base.get(b"ggml_get_type_traits").unwrap();
            ((*get(ty)).to_float.unwrap())(row.as_ptr().cast(), out.as_mut_ptr(), n as i64);
        }
        out
    }
}
