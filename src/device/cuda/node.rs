//! Enqueues the kernels of the two nodes. Called when ggml enqueues a node: eagerly, or once for a graph
//! that is replayed from then on.

use std::{ffi::c_void, ptr, time::Duration};

use cudarc::driver::sys::{self, CUdeviceptr, CUfunction, CUlaunchAttribute, CUlaunchConfig, CUstream};

use super::{
    driver::{CudaError, cu},
    port::Port,
};
use crate::ggml::ggml_tensor;

const DISPATCH_THREADS: u32 = 512;
const JOIN_THREADS: u32 = 256;

/// Addresses of a kernel's arguments.
macro_rules! args {
    ($($arg:expr),* $(,)?) => { [$(ptr::from_ref(&$arg).cast_mut().cast::<c_void>()),*] };
}

fn launch(
    port: &Port,
    kernel: CUfunction,
    stream: CUstream,
    (blocks, threads, shared_bytes): (u32, u32, u32),
    args: &mut [*mut c_void],
) -> Result<(), CudaError> {
    // SAFETY: a plain C structure; the attribute's value is set below.
    let mut early: CUlaunchAttribute = unsafe { std::mem::zeroed() };
    early.id = sys::CUlaunchAttributeID::CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION;
    early.value.programmaticStreamSerializationAllowed = 1;
    let config = CUlaunchConfig {
        gridDimX: blocks,
        gridDimY: 1,
        gridDimZ: 1,
        blockDimX: threads,
        blockDimY: 1,
        blockDimZ: 1,
        sharedMemBytes: shared_bytes,
        hStream: stream,
        attrs: &mut early,
        numAttrs: u32::from(port.device().early_launch),
    };
    cu!(cuLaunchKernelEx(&config, kernel, args.as_mut_ptr(), ptr::null_mut()))
}

/// The second plane of DISPATCH's result, `[n_used, n_tokens]` i32: what goes over the link. Null when there is none.
fn link_ids(ids: &ggml_tensor) -> *mut c_void {
    if ids.ne[2] < 2 {
        return ptr::null_mut();
    }
    ids.data.cast::<u8>().wrapping_add(ids.nb[2]).cast()
}

/// Enqueues DISPATCH; tensors as for [`crate::device::host::dispatch`], in device memory. Where the device reads
/// experts over the link the result has a second plane with their ids, -1 for all others.
///
/// # Errors
/// As the driver says.
///
/// # Safety
/// `dst` and its sources are as the bridge builds them; `stream` belongs to the port's device.
pub unsafe fn dispatch(
    port: &Port,
    layer: usize,
    dst: &ggml_tensor,
    stream: *mut c_void,
    bound: Duration,
) -> Result<(), CudaError> {
    // SAFETY: the bridge gives both sources.
    let (cur, selected) = unsafe { (&*dst.src[0], &*dst.src[1]) };
    let kernel_port = port.kernel_port(bound);
    let (usage, map, table, layer): (CUdeviceptr, CUdeviceptr, CUdeviceptr, u32) =
        (port.usage(layer), port.map(layer), port.table(layer), layer as u32);
    let (cur_stride, n_embd) = ((cur.nb[2] / size_of::<f32>()) as u32, cur.ne[0] as u32);
    let selected_stride = (selected.nb[1] / size_of::<i32>()) as u32;
    let (n_used, n_tokens) = (selected.ne[0] as u32, selected.ne[1] as u32);
    let link_ids = link_ids(dst);
    let mut args = args![
        kernel_port,
        usage,
        map,
        table,
        layer,
        cur.data,
        cur_stride,
        n_embd,
        selected.data,
        selected_stride,
        n_used,
        n_tokens,
        dst.data,
        link_ids,
    ];
    launch(port, port.device().dispatch, stream.cast(), (1, DISPATCH_THREADS, n_used * n_tokens), &mut args)
}

/// Enqueues JOIN; tensors as for [`crate::device::host::join`], in device memory, the ids with both planes. A third
/// source has the rows that came over the link, in a tensor of the result's shape.
///
/// # Errors
/// As the driver says.
///
/// # Safety
/// As for [`dispatch`].
pub unsafe fn join(
    port: &Port,
    layer: usize,
    dst: &ggml_tensor,
    stream: *mut c_void,
    bound: Duration,
) -> Result<(), CudaError> {
    // SAFETY: the bridge gives both sources.
    let slot_ids = unsafe { &*dst.src[1] };
    // SAFETY: null or a tensor.
    let linked = unsafe { dst.src[2].as_ref() }.map_or(ptr::null_mut(), |t| t.data);
    let link_ids = link_ids(slot_ids);
    let kernel_port = port.kernel_port(bound);
    let usage: CUdeviceptr = port.usage(layer);
    let stride = |nb: usize| (nb / size_of::<f32>()) as u32;
    let (row_stride, token_stride) = (stride(dst.nb[1]), stride(dst.nb[2]));
    let (n_embd, n_used, n_tokens) = (dst.ne[0] as u32, dst.ne[1] as u32, dst.ne[2] as u32);
    let mut args = args![
        kernel_port,
        usage,
        slot_ids.data,
        link_ids,
        linked,
        dst.data,
        row_stride,
        token_stride,
        n_embd,
        n_used
    ];
    launch(port, port.device().join, stream.cast(), (n_used * n_tokens, JOIN_THREADS, 0), &mut args)
}
