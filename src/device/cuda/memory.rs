//! Memory of the device, pinned memory of the host, and host memory that others own and we register.

use std::{ffi::c_void, ptr, sync::Arc, time::Instant};

use cudarc::driver::sys::{self, CUdeviceptr, CUmemAccessDesc, CUmemAllocationProp, CUresult};
use parking_lot::Mutex;

use super::driver::{CudaError, Device, Stream, check, cu};
use crate::fault;

/// ggml may clear or read a little behind a tensor whose rows do not fill a multiple of 512 elements.
const TAIL: usize = 4096;

/// Bytes of a copy that the link is measured with.
const MEASURED_BYTES: usize = 32 << 20;

/// Memory that may go again is mapped in chunks of a 64th of the range, within these bounds: small enough to be given back
/// bit by bit, and not thousands of them. What stays is one chunk: so an H200 decodes with all experts in VRAM 6 % faster,
/// whatever the size of the chunks (2 MiB to 1 GiB were tried; a kernel that only reads sees no difference).
const MOST_CHUNKS: usize = 64;
const LARGEST_CHUNK: usize = 64 << 20;

/// Device memory in a reserved range of addresses: what is mapped there changes, the addresses do not.
///
/// The end of the range always has memory, although the slots before it may have none: ggml clears what lies behind a
/// tensor.
pub struct VideoMemory {
    device: Arc<Device>,
    address: CUdeviceptr,
    reserved: usize,
    granularity: usize,
    /// Bytes that are mapped at a time, at most.
    largest: usize,
    mapped: Mutex<Mapped>,
}

#[derive(Default)]
struct Mapped {
    /// From the start on, one behind the other.
    chunks: Vec<Chunk>,
    /// At the end, once there.
    end: Option<Chunk>,
    /// Bytes that were asked for.
    bytes: usize,
}

/// What one call of the driver has allocated and mapped.
struct Chunk {
    handle: sys::CUmemGenericAllocationHandle,
    at: usize,
    size: usize,
}

impl VideoMemory {
    /// Addresses for `capacity` bytes, and zeroed memory for the first `bytes`. `stays`: none of it will go, so that it need
    /// not be mapped bit by bit.
    ///
    /// # Errors
    /// The driver's, above all when there is no memory; nothing stays allocated then.
    pub fn new(device: Arc<Device>, capacity: usize, bytes: usize, stays: bool) -> Result<Self, CudaError> {
        device.bind()?;
        let properties = properties(&device);
        let mut granularity = 0;
        cu!(cuMemGetAllocationGranularity(
            &mut granularity,
            &properties,
            sys::CUmemAllocationGranularity_flags::CU_MEM_ALLOC_GRANULARITY_MINIMUM
        ))?;
        let reserved = (capacity + TAIL).next_multiple_of(granularity);
        let chunk = (reserved / MOST_CHUNKS).clamp(granularity, LARGEST_CHUNK).next_multiple_of(granularity);
        let largest = if stays { reserved } else { chunk };
        let mut address = 0;
        cu!(cuMemAddressReserve(&mut address, reserved, 0, 0, 0))?;
        // from here on `drop` gives back what there is
        let memory =
            VideoMemory { device, address, reserved, granularity, largest, mapped: Mutex::default() };
        let end = memory.end_at(capacity);
        memory.mapped.lock().end = Some(memory.map(end, reserved - end)?);
        memory.resize(bytes)?;
        Ok(memory)
    }

    /// Where the part begins that always has memory.
    fn end_at(&self, capacity: usize) -> usize {
        capacity / self.granularity * self.granularity
    }

    /// Gives memory back or adds some, so that the first `bytes` bytes have it.
    ///
    /// # Errors
    /// As the driver says; nothing has changed then.
    pub fn resize(&self, bytes: usize) -> Result<(), CudaError> {
        self.device.bind()?;
        let mapped = &mut *self.mapped.lock();
        let end = mapped.end.as_ref().map_or(self.reserved, |e| e.at);
        // a little behind the last slot, too: ggml may read there
        let needed = (bytes + TAIL).next_multiple_of(self.granularity).min(end);
        let had = mapped.chunks.len();
        let mut to = mapped.chunks.last().map_or(0, |p| p.at + p.size);
        if needed > to && fault::strikes_once("alloc") {
            check("cuMemCreate", CUresult::CUDA_ERROR_OUT_OF_MEMORY)?;
        }
        while to < needed {
            let size = self.largest.min(needed - to);
            match self.map(to, size) {
                Ok(chunk) => mapped.chunks.push(chunk),
                Err(e) => {
                    mapped.chunks.drain(had..).for_each(|p| self.unmap(&p));
                    return Err(e);
                }
            }
            to += size;
        }
        while let Some(chunk) = mapped.chunks.pop_if(|c| c.at >= needed) {
            self.unmap(&chunk);
        }
        mapped.bytes = bytes;
        Ok(())
    }

    /// Maps `size` zeroed bytes at the offset `at`.
    fn map(&self, at: usize, size: usize) -> Result<Chunk, CudaError> {
        let properties = properties(&self.device);
        let mut handle = 0;
        cu!(cuMemCreate(&mut handle, size, &properties, 0))?;
        let address = self.address + at as u64;
        if let Err(e) = cu!(cuMemMap(address, size, 0, handle, 0)) {
            let _ = cu!(cuMemRelease(handle));
            return Err(e);
        }
        let chunk = Chunk { handle, at, size };
        let access = CUmemAccessDesc {
            location: properties.location,
            flags: sys::CUmemAccess_flags::CU_MEM_ACCESS_FLAGS_PROT_READWRITE,
        };
        // on a stream that waits for no other
        let cleared = cu!(cuMemSetAccess(address, size, &access, 1)).and_then(|()| {
            let stream = Stream::new(self.device.clone(), true)?;
            cu!(cuMemsetD8Async(address, 0, size, stream.raw()))?;
            stream.synchronize()
        });
        match cleared {
            Ok(()) => Ok(chunk),
            Err(e) => {
                self.unmap(&chunk);
                Err(e)
            }
        }
    }

    fn unmap(&self, chunk: &Chunk) {
        let _ = cu!(cuMemUnmap(self.address + chunk.at as u64, chunk.size));
        let _ = cu!(cuMemRelease(chunk.handle));
    }

    /// First byte, in the device's addresses.
    pub fn ptr(&self) -> *mut u8 {
        self.address as *mut u8
    }

    /// Bytes that have addresses behind [`VideoMemory::ptr`], tail included.
    pub fn capacity(&self) -> usize {
        self.reserved
    }

    /// Bytes that were asked for.
    pub fn bytes(&self) -> usize {
        self.mapped.lock().bytes
    }

    /// Copies the bytes from `at` on to `out`, which ends within the memory; nobody writes to them meanwhile. On a
    /// stream of its own, which waits for no other: one of ggml's may be capturing a graph.
    ///
    /// # Errors
    /// As the driver says.
    pub fn read(&self, at: usize, out: &mut [u8]) -> Result<(), CudaError> {
        let bytes = self.bytes();
        assert!(at + out.len() <= bytes, "{} bytes from {at} on of {bytes}", out.len());
        let stream = Stream::new(self.device.clone(), true)?;
        let from = self.address + at as u64;
        cu!(cuMemcpyDtoHAsync_v2(out.as_mut_ptr().cast(), from, out.len(), stream.raw()))?;
        stream.synchronize()
    }
}

impl Drop for VideoMemory {
    fn drop(&mut self) {
        if self.device.bind().is_err() {
            return;
        }
        let Mapped { chunks, end, .. } = std::mem::take(self.mapped.get_mut());
        chunks.iter().chain(&end).for_each(|p| self.unmap(p));
        let _ = cu!(cuMemAddressFree(self.address, self.reserved));
    }
}

fn properties(device: &Device) -> CUmemAllocationProp {
    // SAFETY: a plain C structure for which zeros mean the defaults.
    let mut p: CUmemAllocationProp = unsafe { std::mem::zeroed() };
    p.type_ = sys::CUmemAllocationType::CU_MEM_ALLOCATION_TYPE_PINNED;
    p.location.type_ = sys::CUmemLocationType::CU_MEM_LOCATION_TYPE_DEVICE;
    p.location.id = device.handle();
    p
}

/// Zeroed page-locked host memory that the device reads and writes in place.
pub struct Pinned {
    device: Arc<Device>,
    host: *mut u8,
    on_device: CUdeviceptr,
    bytes: usize,
}

// SAFETY: plain memory; who may touch which part when is the business of its users.
unsafe impl Send for Pinned {}
// SAFETY: as above.
unsafe impl Sync for Pinned {}

impl Pinned {
    /// `bytes` bytes.
    ///
    /// # Errors
    /// As the driver says.
    pub fn new(device: Arc<Device>, bytes: usize) -> Result<Self, CudaError> {
        device.bind()?;
        let mut host = ptr::null_mut();
        let flags = sys::CU_MEMHOSTALLOC_PORTABLE | sys::CU_MEMHOSTALLOC_DEVICEMAP;
        cu!(cuMemHostAlloc(&mut host, bytes.max(1), flags))?;
        // from here on `drop` frees it
        let mut memory = Pinned { device, host: host.cast(), on_device: 0, bytes };
        cu!(cuMemHostGetDevicePointer_v2(&mut memory.on_device, host, 0))?;
        // SAFETY: just allocated with this size.
        unsafe { ptr::write_bytes(memory.host, 0, bytes) };
        Ok(memory)
    }

    /// First byte for the CPU.
    pub fn host(&self) -> *mut u8 {
        self.host
    }

    /// First byte for the device.
    pub fn on_device(&self) -> CUdeviceptr {
        self.on_device
    }

    /// Size in bytes.
    pub fn bytes(&self) -> usize {
        self.bytes
    }
}

impl Drop for Pinned {
    fn drop(&mut self) {
        if self.device.bind().is_ok() {
            let _ = cu!(cuMemFreeHost(self.host.cast()));
        }
    }
}

/// Host memory that others own and the device reads in place.
pub struct Registration {
    device: Arc<Device>,
    /// First byte and size of what can be read in one piece, sorted; no two overlap.
    ranges: Vec<Range>,
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
struct Range {
    start: usize,
    bytes: usize,
    /// We registered it, else whoever allocated it.
    ours: bool,
}

/// The longest start of some bytes that can be copied in one way.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Piece {
    /// The device reads this many bytes in place.
    Direct(usize),
    /// These must be staged.
    Staged(usize),
}

impl Registration {
    /// Nothing registered yet.
    pub fn new(device: Arc<Device>) -> Self {
        Registration { device, ranges: Vec::new() }
    }

    /// Registers the pages of `bytes` bytes at `first`; they are only read.
    fn add(&mut self, first: usize, bytes: usize) -> Result<(), CudaError> {
        if fault::strikes("register") {
            check("cuMemHostRegister", CUresult::CUDA_ERROR_OUT_OF_MEMORY)?;
        }
        let register = |flags| {
            // SAFETY: the range is the caller's, who keeps it until we are dropped.
            unsafe { sys::cuMemHostRegister_v2(first as *mut c_void, bytes, flags) }
        };
        let flags = sys::CU_MEMHOSTREGISTER_PORTABLE | sys::CU_MEMHOSTREGISTER_DEVICEMAP;
        // a mapped file cannot be written to; not every platform knows the flag
        let mut status = register(flags | sys::CU_MEMHOSTREGISTER_READ_ONLY);
        if status == CUresult::CUDA_ERROR_INVALID_VALUE || status == CUresult::CUDA_ERROR_NOT_SUPPORTED {
            status = register(flags);
        }
        check("cuMemHostRegister", status)?;
        self.ranges.push(Range { start: first, bytes, ours: true });
        Ok(())
    }

    /// Whether somebody has pinned the memory at `first` already.
    fn is_pinned(first: usize) -> Result<bool, CudaError> {
        // asked for several at once, the driver has an answer for memory that it does not know: 0
        let mut kind = 0u32;
        let mut attribute = sys::CUpointer_attribute::CU_POINTER_ATTRIBUTE_MEMORY_TYPE;
        let mut value = ptr::from_mut(&mut kind).cast::<c_void>();
        cu!(cuPointerGetAttributes(1, &mut attribute, &mut value, first as CUdeviceptr))?;
        Ok(kind == sys::CUmemorytype::CU_MEMORYTYPE_HOST as u32)
    }

    /// Registers `ranges` of first byte and size, sorted, one after the other; `progress` hears before each how
    /// many bytes are done and how many come next.
    ///
    /// # Errors
    /// The first that the driver refuses, or that the limit of locked memory does not allow; the rest is not
    /// tried, and what is registered stays so.
    pub fn add_all(
        &mut self,
        ranges: &[(usize, usize)],
        mut progress: impl FnMut(usize, usize),
    ) -> Result<(), CudaError> {
        self.device.bind()?;
        let mut done = 0;
        for (start, bytes) in merge(ranges, page_bytes()) {
            if Self::is_pinned(start)? {
                self.ranges.push(Range { start, bytes, ours: false });
            } else {
                progress(done, bytes);
                self.add(start, bytes)?;
            }
            done += bytes;
        }
        Ok(())
    }

    /// How the first of `bytes` bytes at `first` get to the device.
    pub fn piece(&self, first: usize, bytes: usize) -> Piece {
        piece(&self.ranges, first, bytes)
    }

    /// Where the device reads `bytes` bytes at `first` in place, if it can.
    pub fn on_device(&self, first: usize, bytes: usize) -> Option<CUdeviceptr> {
        if self.piece(first, bytes) != Piece::Direct(bytes) {
            return None;
        }
        self.device.bind().ok()?;
        let mut address = 0;
        cu!(cuMemHostGetDevicePointer_v2(&mut address, first as *mut c_void, 0)).ok()?;
        Some(address)
    }

    /// Bytes a ns that a copy into `to` moves over the link, `None` without a source. Overwrites the memory.
    ///
    /// # Errors
    /// As the driver says.
    pub fn copy_rate(&self, to: &VideoMemory) -> Result<Option<f64>, CudaError> {
        let Some(from) = self.ranges.iter().max_by_key(|r| r.bytes) else { return Ok(None) };
        let bytes = from.bytes.min(to.bytes()).min(MEASURED_BYTES);
        let stream = Stream::new(self.device.clone(), false)?;
        let mut best = 0.0f64;
        for _ in 0..3 {
            let start = Instant::now();
            cu!(cuMemcpyHtoDAsync_v2(to.address, from.start as *const c_void, bytes, stream.raw()))?;
            stream.synchronize()?;
            best = best.max(bytes as f64 / start.elapsed().as_nanos().max(1) as f64);
        }
        Ok(Some(best))
    }

    /// Bytes that we have registered.
    pub fn bytes(&self) -> usize {
        self.ranges.iter().filter(|r| r.ours).map(|r| r.bytes).sum()
    }
}

impl Drop for Registration {
    fn drop(&mut self) {
        if self.device.bind().is_ok() {
            for r in self.ranges.drain(..).filter(|r| r.ours) {
                let _ = cu!(cuMemHostUnregister(r.start as *mut c_void));
            }
        }
    }
}

fn page_bytes() -> usize {
    // SAFETY: has no preconditions.
    usize::try_from(unsafe { libc::sysconf(libc::_SC_PAGESIZE) }).unwrap_or(4096)
}

/// The whole pages of `ranges`, which are sorted. Neighbours that touch or share a page become one: no page
/// can be registered twice.
fn merge(ranges: &[(usize, usize)], page: usize) -> Vec<(usize, usize)> {
    let mut out: Vec<(usize, usize)> = Vec::new();
    for &(first, bytes) in ranges {
        let (start, end) = (first / page * page, (first + bytes).next_multiple_of(page));
        match out.last_mut() {
            Some((s, n)) if start <= *s + *n => *n = (*n).max(end - *s),
            _ => out.push((start, end - start)),
        }
    }
    out
}

fn piece(ranges: &[Range], first: usize, bytes: usize) -> Piece {
    let next = ranges.partition_point(|r| r.start <= first);
    let inside = next.checked_sub(1).map(|i| ranges[i]).filter(|r| first < r.start + r.bytes);
    match (inside, ranges.get(next)) {
        // the driver copies from one registration at a time
        (Some(r), _) => Piece::Direct(bytes.min(r.start + r.bytes - first)),
        (None, Some(r)) => Piece::Staged(bytes.min(r.start - first)),
        (None, None) => Piece::Staged(bytes),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ranges_that_share_a_page_are_registered_once() {
        let page = 100;
        let ranges = [(10, 50), (120, 30), (199, 2), (400, 100), (500, 1), (700, 300)];
        assert_eq!(merge(&ranges, page), [(0, 300), (400, 200), (700, 300)]);
        assert_eq!(merge(&[(0, 1000), (200, 10)], page), [(0, 1000)]);
        assert_eq!(merge(&[], page), []);
    }

    #[test]
    fn a_copy_is_cut_where_registrations_meet_and_end() {
        let range = |start, bytes| Range { start, bytes, ours: true };
        let ranges = [range(100, 50), range(150, 50), range(300, 10)];
        let mut pieces = Vec::new();
        let (mut at, end) = (90, 320);
        while at < end {
            let p = piece(&ranges, at, end - at);
            let (Piece::Direct(n) | Piece::Staged(n)) = p;
            pieces.push(p);
            at += n;
        }
        use Piece::{Direct, Staged};
        assert_eq!(pieces, [Staged(10), Direct(50), Direct(50), Staged(100), Direct(10), Staged(10)]);
        assert_eq!(piece(&ranges, 120, 5), Direct(5));
        assert_eq!(piece(&[], 120, 5), Staged(5));
    }
}
