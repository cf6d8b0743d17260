//! What a device, its link and its memory can do, for `moe-hot probe`.

use std::{
    ffi::c_void,
    io::{self, Write as _},
    os::fd::AsRawFd,
    ptr,
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU32, Ordering},
    },
    time::{Duration, Instant},
};

use cudarc::driver::sys::{CUdeviceptr, CUfunction, CUmodule};

use super::{
    driver::{CudaError, Device, Stream, cu},
    memory::{Pinned, Registration, VideoMemory},
};
use crate::measure;

#[cfg(moe_hot_kernels)]
static KERNELS: &[u8] = include_bytes!(concat!(env!("OUT_DIR"), "/probe.fatbin"));
#[cfg(not(moe_hot_kernels))]
static KERNELS: &[u8] = &[];

/// The kind of host memory that a model's experts are in.
pub const REGISTERED_FILE: &str = "registered file";
/// Bytes of a copy to the device.
const COPY_BYTES: usize = 256 << 20;
/// Bytes that a kernel reads of host memory in one go, at most.
const IN_PLACE_BYTES: usize = 1 << 30;
/// Bytes that a kernel reads of the device's memory, at most.
const VIDEO_BYTES: usize = 2 << 30;
const ROUNDS: usize = 3;
const THREADS: u32 = 512;
/// Blocks that read host memory: few are enough for the link, and leave the others to experts in VRAM.
const BLOCKS: [u32; 6] = [1, 2, 4, 8, 16, 32];
const ROUND_TRIPS: u32 = 5000;
const BOUND: Duration = Duration::from_secs(1);

/// The device's side of a machine. Rates in bytes a ns, which is GB/s.
#[derive(Clone, PartialEq, Debug)]
pub struct Figures {
    /// Name of the device.
    pub name: String,
    /// Copies to the device, by kind of host memory.
    pub copies: Vec<(&'static str, f64)>,
    /// Reading of registered host memory by a kernel, by its number of blocks.
    pub in_place: Vec<(u32, f64)>,
    /// Reading of the same memory at once: by threads, and by the kernel over the link.
    pub at_once: AtOnce,
    /// From a flag that the device raises to the CPU's answer that it sees, in us.
    pub round_trip_us: f64,
    /// Reading of the device's own memory.
    pub video: f64,
}

/// What both read that share the host's memory.
#[derive(Clone, Copy, PartialEq, Debug)]
pub struct AtOnce {
    /// Threads of the CPU.
    pub n_threads: usize,
    /// What they read.
    pub cpu: f64,
    /// What the device reads over the link.
    pub gpu: f64,
}

struct Kernels {
    device: Arc<Device>,
    module: CUmodule,
    read: CUfunction,
    round_trips: CUfunction,
}

impl Drop for Kernels {
    fn drop(&mut self) {
        if self.device.bind().is_ok() {
            let _ = cu!(cuModuleUnload(self.module));
        }
    }
}

/// Addresses of a kernel's arguments.
macro_rules! args {
    ($($arg:expr),* $(,)?) => { [$(ptr::from_ref(&$arg).cast_mut().cast::<c_void>()),*] };
}

impl Kernels {
    fn load(device: Arc<Device>) -> Result<Self, CudaError> {
        device.bind()?;
        let mut module = ptr::null_mut();
        cu!(cuModuleLoadData(&mut module, KERNELS.as_ptr().cast()))?;
        let mut kernels = Kernels { device, module, read: ptr::null_mut(), round_trips: ptr::null_mut() };
        cu!(cuModuleGetFunction(&mut kernels.read, module, c"moe_hot_read".as_ptr()))?;
        cu!(cuModuleGetFunction(&mut kernels.round_trips, module, c"moe_hot_round_trips".as_ptr()))?;
        Ok(kernels)
    }

    /// Bytes a ns that `blocks` blocks read, `bytes` at `data`.
    fn read(
        &self,
        stream: &Stream,
        blocks: u32,
        data: CUdeviceptr,
        bytes: usize,
        sum: &VideoMemory,
    ) -> Result<f64, CudaError> {
        let (n, sum) = ((bytes / 16) as u64, sum.ptr());
        let mut args = args![data, n, sum];
        let start = Instant::now();
        cu!(cuLaunchKernel(
            self.read,
            blocks,
            1,
            1,
            THREADS,
            1,
            1,
            0,
            stream.raw(),
            args.as_mut_ptr(),
            ptr::null_mut()
        ))?;
        stream.synchronize()?;
        Ok(bytes as f64 / start.elapsed().as_nanos() as f64)
    }

    /// us a round trip.
    fn round_trips(&self, stream: &Stream) -> Result<f64, CudaError> {
        let flags = Pinned::new(self.device.clone(), 4096)?;
        // SAFETY: aligned, zeroed, and alive as long as `flags`; the device writes them as words.
        let flag = |i: usize| unsafe { &*flags.host().cast::<AtomicU32>().add(i) };
        let (address, bound) = (flags.on_device(), BOUND.as_nanos() as u64);
        let mut args = args![address, ROUND_TRIPS, bound];
        let stop = AtomicBool::new(false);
        let seconds = std::thread::scope(|s| {
            s.spawn(|| {
                while !stop.load(Ordering::Relaxed) {
                    flag(16).store(flag(0).load(Ordering::Acquire), Ordering::Release);
                    std::hint::spin_loop();
                }
            });
            let start = Instant::now();
            let launched = cu!(cuLaunchKernel(
                self.round_trips,
                1,
                1,
                1,
                1,
                1,
                1,
                0,
                stream.raw(),
                args.as_mut_ptr(),
                ptr::null_mut()
            ));
            let ended = launched.and_then(|()| stream.synchronize());
            stop.store(true, Ordering::Relaxed);
            ended.map(|()| start.elapsed().as_secs_f64())
        })?;
        if flag(32).load(Ordering::Relaxed) != 0 {
            return Err(CudaError::Missing("the CPU's answer to a flag did not reach the device".into()));
        }
        Ok(seconds * 1e6 / f64::from(ROUND_TRIPS))
    }
}

/// The best of a few rounds: others only ever slow a measurement down.
fn best(mut measure: impl FnMut() -> Result<f64, CudaError>) -> Result<f64, CudaError> {
    (0..ROUNDS).try_fold(0.0f64, |best, _| Ok(best.max(measure()?)))
}

/// Bytes a ns of copies of `bytes` bytes at `from`.
fn copy(stream: &Stream, to: &VideoMemory, from: *const u8, bytes: usize) -> Result<f64, CudaError> {
    best(|| {
        let start = Instant::now();
        cu!(cuMemcpyHtoDAsync_v2(to.ptr() as CUdeviceptr, from.cast(), bytes, stream.raw()))?;
        stream.synchronize()?;
        Ok(bytes as f64 / start.elapsed().as_nanos() as f64)
    })
}

/// A file in memory, mapped to be read, as llama.cpp maps a model.
pub(super) struct MappedFile {
    pub(super) first: *mut u8,
    pub(super) bytes: usize,
    _file: std::fs::File,
}

impl MappedFile {
    pub(super) fn new(data: &[u8]) -> io::Result<Self> {
        let mut file = tempfile::tempfile()?;
        file.write_all(data)?;
        // SAFETY: a new mapping of a file that is as long.
        let first = unsafe {
            libc::mmap(ptr::null_mut(), data.len(), libc::PROT_READ, libc::MAP_SHARED, file.as_raw_fd(), 0)
        };
        if first == libc::MAP_FAILED {
            return Err(io::Error::last_os_error());
        }
        Ok(MappedFile { first: first.cast(), bytes: data.len(), _file: file })
    }
}

impl Drop for MappedFile {
    fn drop(&mut self) {
        // SAFETY: mapped by us, and nobody has it any more.
        unsafe { libc::munmap(self.first.cast(), self.bytes) };
    }
}

/// Measures the first device, with `data` as the host's memory that threads and device read; the threads at once with
/// the device for `time`.
///
/// # Errors
/// No usable device, or what the driver says.
pub fn measure(data: &[u8], n_threads: usize, time: Duration) -> Result<Figures, CudaError> {
    let device = Device::first()?;
    let kernels = Kernels::load(device.clone())?;
    let stream = Stream::new(device.clone(), false)?;
    let sum = VideoMemory::new(device.clone(), 4096, 4096, true)?;

    let (free, _) = device.memory()?;
    let bytes = VIDEO_BYTES.min(free / 2).max(1 << 20);
    let video = VideoMemory::new(device.clone(), bytes, bytes, true)?;
    let blocks = 8 * device.n_multiprocessors()?;
    let read_video = || kernels.read(&stream, blocks, video.ptr() as CUdeviceptr, video.bytes(), &sum);
    read_video()?; // loads the kernel, and wakes the device
    let video_rate = best(read_video)?;

    let bytes = COPY_BYTES.min(data.len()).min(video.bytes());
    let mut copies = vec![("pageable", copy(&stream, &video, data.as_ptr(), bytes)?)];
    let pinned = Pinned::new(device.clone(), bytes)?;
    copies.push(("pinned", copy(&stream, &video, pinned.host(), bytes)?));
    drop(pinned);
    let file = MappedFile::new(&data[..bytes])
        .map_err(|e| CudaError::Missing(format!("a temporary file cannot be mapped: {e}")))?;
    copies.push(("mapped file", copy(&stream, &video, file.first, bytes)?));
    let mut registered_file = Registration::new(device.clone());
    registered_file.add_all(&[(file.first as usize, bytes)], |_, _| ())?;
    copies.push((REGISTERED_FILE, copy(&stream, &video, file.first, bytes)?));
    drop(registered_file);
    drop(file);

    let shared = data.len().min(IN_PLACE_BYTES);
    let mut registered = Registration::new(device.clone());
    registered.add_all(&[(data.as_ptr() as usize, shared)], |_, _| ())?;
    copies.push(("registered", copy(&stream, &video, data.as_ptr(), bytes)?));
    let first = data.as_ptr() as usize;
    let address = registered.on_device(first, shared);
    let address = address
        .ok_or_else(|| CudaError::Missing("the device does not read registered memory in place".into()))?;
    let in_place = |blocks: u32| kernels.read(&stream, blocks, address, shared, &sum);
    let in_place: Vec<(u32, f64)> =
        BLOCKS.into_iter().map(|b| Ok((b, best(|| in_place(b))?))).collect::<Result<_, CudaError>>()?;
    let &(blocks, _) =
        in_place.iter().max_by(|a, b| a.1.total_cmp(&b.1)).expect("there are counts of blocks");

    let mut at_once = AtOnce { n_threads, cpu: 0.0, gpu: 0.0 };
    for _ in 0..ROUNDS {
        let (cpu, gpu) = measure::read(data, n_threads, || {
            let (start, mut n) = (Instant::now(), 0);
            while start.elapsed() < time {
                kernels.read(&stream, blocks, address, shared, &sum)?;
                n += 1;
            }
            Ok::<_, CudaError>((n * shared) as f64 / start.elapsed().as_nanos() as f64)
        });
        let gpu = gpu?;
        if cpu + gpu > at_once.cpu + at_once.gpu {
            at_once = AtOnce { n_threads, cpu, gpu };
        }
    }
    kernels.round_trips(&stream)?;
    let round_trip_us = (0..ROUNDS)
        .try_fold(f64::INFINITY, |best, _| Ok::<_, CudaError>(best.min(kernels.round_trips(&stream)?)))?;
    Ok(Figures { name: device.name()?, copies, in_place, at_once, round_trip_us, video: video_rate })
}
