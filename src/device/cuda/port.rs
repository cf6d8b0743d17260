//! What a context shares with the kernels: the mailbox in mapped host memory, the map and the epoch in
//! device memory. Layouts are those of kernels/moe_hot.cu.
//!
//! All of it is allocated once and keeps its address while the context lives, because a captured CUDA
//! graph repeats the addresses of its capture.

use std::{mem::size_of, ptr, sync::Arc, time::Duration};

use cudarc::driver::sys::CUdeviceptr;
use parking_lot::Mutex;

use super::{
    driver::{CudaError, Device, Stream, cu},
    memory::Pinned,
};
use crate::{
    cold::Layer,
    lanes::Sample,
    mailbox::{Answer, Remote, RemoteRequest},
    usage::StepUsage,
};

/// Marks a routed expert without a slot in a usage record, and one that was read over the link.
const COLD_BIT: u32 = 1 << 31;
const LINK_BIT: u32 = 1 << 30;

/// The kernels' `Usage`; ids and waiting times follow.
#[repr(C)]
struct UsageHeader {
    n_rows: u32,
    n_tokens: u32,
    span_ns: u32,
    pad: [u32; 13],
}

/// The kernels' `Port`, passed by value with every launch.
#[repr(C)]
#[derive(Clone, Copy)]
pub(super) struct KernelPort {
    request: CUdeviceptr,
    act: CUdeviceptr,
    answers: CUdeviceptr,
    out: CUdeviceptr,
    error: CUdeviceptr,
    epoch: CUdeviceptr,
    gave_up: CUdeviceptr,
    posted_ns: CUdeviceptr,
    bound_ns: u64,
    max_rows: u32,
    act_stride: u32,
    out_stride: u32,
}

/// Why JOIN gave up, as the kernels write it.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Fault {
    /// No answer within the bound.
    TimedOut,
    /// A row was answered as failed.
    RowFailed,
}

/// Sizes of a context's shared memory.
#[derive(Clone, Copy, Debug)]
pub struct PortShape {
    /// Wired layers.
    pub n_layers: usize,
    /// Most experts of a layer.
    pub n_expert: usize,
    /// Most tokens of a ubatch on the hot path.
    pub max_tokens: usize,
    /// Most experts a token.
    pub n_used: usize,
    /// Longest activation row, in elements.
    pub n_in: usize,
    /// Longest output row, in elements.
    pub n_out: usize,
}

impl PortShape {
    /// What `layers` need for ubatches of up to `max_tokens` tokens.
    pub fn new(layers: &[Layer], max_tokens: usize) -> Self {
        let max = |f: &dyn Fn(&Layer) -> usize| layers.iter().map(f).max().unwrap_or(0);
        PortShape {
            n_layers: layers.len(),
            n_expert: max(&|l| l.n_expert),
            max_tokens,
            n_used: max(&|l| l.n_used),
            n_in: max(&|l| l.n_embd()),
            n_out: max(&|l| l.down.n_out),
        }
    }
}

/// One context's end of the hand-off.
pub struct Port {
    device: Arc<Device>,
    stream: Stream,
    shape: PortShape,
    /// Request, activations, answers, output rows, error, usage records: written by one side each.
    shared: Arc<Pinned>,
    /// What the copy of map and tables reads from.
    shadow: Pinned,
    /// Map of all layers, how each divides its cold rows, then epoch, failure mark and clock.
    on_device: CUdeviceptr,
    layout: Layout,
    /// Versions of map and tables that the device has.
    seen: Mutex<(u64, u64)>,
}

// SAFETY: the shared memory is written by the device, by the workers and by the thread that runs steps,
// each in its own part and in the order that the protocol gives.
unsafe impl Send for Port {}
// SAFETY: as above.
unsafe impl Sync for Port {}

/// Offsets in `shared` and `on_device`, in bytes.
#[derive(Clone, Copy, Debug)]
struct Layout {
    act: usize,
    act_stride: usize,
    answers: usize,
    out: usize,
    out_stride: usize,
    error: usize,
    usage: usize,
    usage_stride: usize,
    bytes: usize,
    /// On the device.
    tables: usize,
    epoch: usize,
    gave_up: usize,
    posted: usize,
    device_bytes: usize,
}

const LINE: usize = 128;

impl Layout {
    fn new(s: &PortShape) -> Self {
        let rows = s.max_tokens * s.n_used;
        let mut at = 0;
        let mut take = |bytes: usize| {
            let start = at;
            at += bytes.next_multiple_of(LINE);
            start
        };
        let f32s = |n: usize| (n * size_of::<f32>()).next_multiple_of(LINE);
        // the request is at the start
        take(size_of::<RemoteRequest>() + rows * size_of::<u32>());
        let (act_stride, out_stride) = (f32s(s.n_in), f32s(s.n_out));
        let act = take(s.max_tokens * act_stride);
        let answers = take(rows * size_of::<Answer>());
        let out = take(rows * out_stride);
        let error = take(size_of::<u32>());
        let usage_stride = (size_of::<UsageHeader>() + 2 * rows * size_of::<u32>()).next_multiple_of(LINE);
        let usage = take(s.n_layers * usage_stride);
        let bytes = take(0);
        let tables = (s.n_layers * s.n_expert * size_of::<i32>()).next_multiple_of(LINE);
        let epoch = (tables + s.n_layers * (rows + 1)).next_multiple_of(LINE);
        Layout {
            act,
            act_stride,
            answers,
            out,
            out_stride,
            error,
            usage,
            usage_stride,
            bytes,
            tables,
            epoch,
            gave_up: epoch + LINE,
            posted: epoch + 2 * LINE,
            device_bytes: epoch + 3 * LINE,
        }
    }
}

impl Port {
    /// Shared memory of `shape`.
    ///
    /// # Errors
    /// As the driver says.
    pub fn new(device: Arc<Device>, shape: PortShape) -> Result<Self, CudaError> {
        let layout = Layout::new(&shape);
        let shared = Arc::new(Pinned::new(device.clone(), layout.bytes)?);
        let shadow = Pinned::new(device.clone(), layout.epoch)?;
        let stream = Stream::new(device.clone(), false)?;
        let mut on_device = 0;
        cu!(cuMemAlloc_v2(&mut on_device, layout.device_bytes))?;
        // from here on `drop` frees it
        let port = Port { device, stream, shape, shared, shadow, on_device, layout, seen: Mutex::default() };
        cu!(cuMemsetD8_v2(on_device, 0, layout.device_bytes))?;
        cu!(cuMemsetD8_v2(on_device, 0xff, shape.n_layers * shape.n_expert * size_of::<i32>()))?;
        Ok(port)
    }

    /// The workers' end.
    pub fn remote(&self) -> Remote {
        let at = |offset: usize| self.shared.host().wrapping_add(offset);
        Remote {
            request: at(0).cast(),
            act: at(self.layout.act).cast(),
            act_stride: self.layout.act_stride,
            answers: at(self.layout.answers).cast(),
            out: at(self.layout.out).cast(),
            out_stride: self.layout.out_stride,
            max_rows: self.max_rows(),
            memory: self.shared.clone(),
        }
    }

    pub(super) fn device(&self) -> &Device {
        &self.device
    }

    pub(super) fn kernel_port(&self, bound: Duration) -> KernelPort {
        let at = |offset: usize| self.shared.on_device() + offset as u64;
        KernelPort {
            request: at(0),
            act: at(self.layout.act),
            answers: at(self.layout.answers),
            out: at(self.layout.out),
            error: at(self.layout.error),
            epoch: self.on_device + self.layout.epoch as u64,
            gave_up: self.on_device + self.layout.gave_up as u64,
            posted_ns: self.on_device + self.layout.posted as u64,
            bound_ns: bound.as_nanos() as u64,
            max_rows: self.max_rows() as u32,
            act_stride: (self.layout.act_stride / size_of::<f32>()) as u32,
            out_stride: (self.layout.out_stride / size_of::<f32>()) as u32,
        }
    }

    /// The map of a layer in device memory.
    pub(super) fn map(&self, layer: usize) -> CUdeviceptr {
        self.on_device + (layer * self.shape.n_expert * size_of::<i32>()) as u64
    }

    /// In device memory: how many of c cold rows of a layer go over the link.
    pub(super) fn table(&self, layer: usize) -> CUdeviceptr {
        self.on_device + (self.layout.tables + layer * (self.max_rows() + 1)) as u64
    }

    /// Rows of a layer at most.
    pub fn max_rows(&self) -> usize {
        self.shape.max_tokens * self.shape.n_used
    }

    /// The usage record of a layer, for the device.
    pub(super) fn usage(&self, layer: usize) -> CUdeviceptr {
        self.shared.on_device() + (self.layout.usage + layer * self.layout.usage_stride) as u64
    }

    /// Brings the device's map up to version `map`, and `tables` to theirs; `fill(layer, map)` writes one layer's
    /// slots, `tables` has `max_rows + 1` entries a layer. Called while no step of this context is running.
    ///
    /// # Errors
    /// As the driver says; the device's map must not be used then.
    pub fn update(
        &self,
        version: (u64, u64),
        fill: impl Fn(usize, &mut [i32]),
        tables: &[u8],
    ) -> Result<(), CudaError> {
        let mut seen = self.seen.lock();
        if *seen == version {
            return Ok(());
        }
        assert_eq!(tables.len(), self.shape.n_layers * (self.max_rows() + 1), "a table a layer");
        self.device.bind()?;
        let n = self.shape.n_expert;
        for layer in 0..self.shape.n_layers {
            // SAFETY: the shadow holds a map of `n` entries a layer, and the last copy has ended.
            let map =
                unsafe { std::slice::from_raw_parts_mut(self.shadow.host().cast::<i32>().add(layer * n), n) };
            fill(layer, map);
        }
        // SAFETY: the shadow has room for them behind the map.
        unsafe {
            let at = self.shadow.host().add(self.layout.tables);
            ptr::copy_nonoverlapping(tables.as_ptr(), at, tables.len());
        }
        let bytes = self.layout.epoch;
        cu!(cuMemcpyHtoDAsync_v2(self.on_device, self.shadow.host().cast(), bytes, self.stream.raw()))?;
        // 10 us, and only in steps that follow a change: cheaper than teaching ggml's stream to wait for ours
        self.stream.synchronize()?;
        *seen = version;
        Ok(())
    }

    /// Adds what the step has routed to `usage`, and for a single token what each layer measured to `samples`;
    /// how long JOIN waited, over all layers. `took_ns` tells how long a layer's cold experts took the CPU. Called
    /// when the step has ended.
    pub fn harvest(
        &self,
        usage: &mut StepUsage,
        samples: &mut Vec<Sample>,
        took_ns: impl Fn(usize) -> u32,
    ) -> Duration {
        let mut waited = Duration::ZERO;
        let max_rows = self.max_rows();
        for layer in 0..self.shape.n_layers {
            let record =
                self.shared.host().wrapping_add(self.layout.usage + layer * self.layout.usage_stride);
            let header = record.cast::<UsageHeader>();
            // SAFETY: the record is in the shared memory, and the kernels that write it have ended.
            let n_rows = unsafe { ptr::read_volatile(&raw const (*header).n_rows) } as usize;
            if n_rows == 0 {
                continue;
            }
            let rows = record.wrapping_add(size_of::<UsageHeader>()).cast::<u32>();
            // SAFETY: as above.
            let (n_tokens, span_ns) = unsafe {
                (
                    ptr::read_volatile(&raw const (*header).n_tokens),
                    ptr::read_volatile(&raw const (*header).span_ns),
                )
            };
            let mut sample =
                Sample { layer, on_cpu: 0, on_link: 0, span_ns, wait_ns: 0, cpu_ns: took_ns(layer) };
            for row in 0..n_rows.min(max_rows) {
                // SAFETY: as above.
                let (id, wait) = unsafe {
                    (ptr::read_volatile(rows.add(row)), ptr::read_volatile(rows.add(max_rows + row)))
                };
                usage.ids[layer].push((id & !(COLD_BIT | LINK_BIT)) as u16);
                match (id & COLD_BIT != 0, id & LINK_BIT != 0) {
                    (false, _) => usage.hits += 1,
                    (true, false) => {
                        sample.on_cpu += 1;
                        sample.wait_ns = sample.wait_ns.max(wait);
                    }
                    (true, true) => sample.on_link += 1,
                }
            }
            usage.cold[layer] += sample.on_cpu + sample.on_link;
            usage.linked += u64::from(sample.on_link);
            waited += Duration::from_nanos(sample.wait_ns.into());
            if n_tokens == 1 {
                samples.push(sample);
            }
            // SAFETY: as above.
            unsafe { ptr::write_volatile(&raw mut (*header).n_rows, 0) };
        }
        waited
    }

    /// Why JOIN gave up in the step that has ended, if it did; resets the mark.
    ///
    /// # Errors
    /// The mark could not be reset.
    pub fn take_fault(&self) -> Result<Option<Fault>, CudaError> {
        let error = self.shared.host().wrapping_add(self.layout.error).cast::<u32>();
        // SAFETY: in the shared memory; the kernels that write it have ended.
        let fault = match unsafe { ptr::read_volatile(error) } {
            0 => return Ok(None),
            1 => Fault::TimedOut,
            _ => Fault::RowFailed,
        };
        // SAFETY: as above.
        unsafe { ptr::write_volatile(error, 0) };
        self.device.bind()?;
        cu!(cuMemsetD8_v2(self.on_device + self.layout.gave_up as u64, 0, size_of::<u32>()))?;
        Ok(Some(fault))
    }
}

impl Drop for Port {
    fn drop(&mut self) {
        if self.device.bind().is_ok() {
            let _ = cu!(cuMemFree_v2(self.on_device));
        }
    }
}

// the request's header is shared with the kernels and with the workers
// loom's atomics are larger, and no device is in its models
#[cfg(not(loom))]
const _: () = assert!(size_of::<RemoteRequest>() == 64 && std::mem::offset_of!(RemoteRequest, epoch) == 0);
const _: () = assert!(size_of::<UsageHeader>() == 64);
