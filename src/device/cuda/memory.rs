//! Memory of the device, pinned memory of the host, and host memory that others own and we register.

use std::{ffi::c_void, ptr, sync::Arc};

use cudarc::driver::sys::{self, CUdeviceptr, CUmemAccessDesc, CUmemAllocationProp, CUresult};

use super::driver::{CudaError, Device, check, cu};

/// Page size of the host, to which registrations are rounded.
const PAGE: usize = 4096;
/// ggml may clear or read a little behind a tensor whose rows do not fill a multiple of 512 elements.
const TAIL: usize = 4096;

/// Device memory in a reserved range of addresses: what is mapped there can change, the addresses cannot.
pub struct VideoMemory {
    device: Arc<Device>,
    address: CUdeviceptr,
    reserved: usize,
    mapped: usize,
    chunks: Vec<(sys::CUmemGenericAllocationHandle, usize)>,
    bytes: usize,
}

impl VideoMemory {
    /// `bytes` zeroed bytes.
    ///
    /// # Errors
    /// The driver's, above all when there is no memory; nothing stays allocated then.
    pub fn new(device: Arc<Device>, bytes: usize) -> Result<Self, CudaError> {
        device.bind()?;
        let properties = properties(&device);
        let mut granularity = 0;
        cu!(cuMemGetAllocationGranularity(
            &mut granularity,
            &properties,
            sys::CUmemAllocationGranularity_flags::CU_MEM_ALLOC_GRANULARITY_MINIMUM
        ))?;
        let reserved = (bytes + TAIL).next_multiple_of(granularity);
        let mut address = 0;
        cu!(cuMemAddressReserve(&mut address, reserved, 0, 0, 0))?;
        // from here on `drop` gives back what there is
        let mut memory = VideoMemory { device, address, reserved, mapped: 0, chunks: Vec::new(), bytes };
        memory.grow(reserved)?;
        cu!(cuMemsetD8_v2(address, 0, reserved))?;
        Ok(memory)
    }

    /// Maps memory up to `to` bytes, in one chunk.
    fn grow(&mut self, to: usize) -> Result<(), CudaError> {
        let size = to - self.mapped;
        let properties = properties(&self.device);
        let mut handle = 0;
        cu!(cuMemCreate(&mut handle, size, &properties, 0))?;
        let at = self.address + self.mapped as u64;
        if let Err(e) = cu!(cuMemMap(at, size, 0, handle, 0)) {
            let _ = cu!(cuMemRelease(handle));
            return Err(e);
        }
        self.chunks.push((handle, size));
        self.mapped += size;
        let access = CUmemAccessDesc {
            location: properties.location,
            flags: sys::CUmemAccess_flags::CU_MEM_ACCESS_FLAGS_PROT_READWRITE,
        };
        cu!(cuMemSetAccess(at, size, &access, 1))
    }

    /// First byte, in the device's addresses.
    pub fn ptr(&self) -> *mut u8 {
        self.address as *mut u8
    }

    /// Bytes that may be used behind [`VideoMemory::ptr`], tail included.
    pub fn capacity(&self) -> usize {
        self.mapped
    }

    /// Bytes that were asked for.
    pub fn bytes(&self) -> usize {
        self.bytes
    }
}

impl Drop for VideoMemory {
    fn drop(&mut self) {
        if self.device.bind().is_err() {
            return;
        }
        let mut at = self.address;
        for (handle, size) in self.chunks.drain(..) {
            let _ = cu!(cuMemUnmap(at, size));
            let _ = cu!(cuMemRelease(handle));
            at += size as u64;
        }
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

/// Host memory that others own, made known to the driver so that copies from it need no staging.
pub struct Registration {
    device: Arc<Device>,
    ranges: Vec<(usize, usize)>,
}

/// How a range became readable for the device.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Reach {
    /// We registered it.
    Registered,
    /// It was pinned already, by whoever allocated it.
    Pinned,
}

impl Registration {
    /// Nothing registered yet.
    pub fn new(device: Arc<Device>) -> Self {
        Registration { device, ranges: Vec::new() }
    }

    /// Registers the pages of `bytes` bytes at `first`; they are only read.
    ///
    /// # Errors
    /// The driver refuses, or the limit of locked memory is reached.
    pub fn add(&mut self, first: *const u8, bytes: usize) -> Result<Reach, CudaError> {
        self.device.bind()?;
        let mut kind = 0u32;
        let attribute = sys::CUpointer_attribute::CU_POINTER_ATTRIBUTE_MEMORY_TYPE;
        let known = cu!(cuPointerGetAttribute(
            ptr::from_mut(&mut kind).cast::<c_void>(),
            attribute,
            first as CUdeviceptr
        ));
        if known.is_ok() && kind == sys::CUmemorytype::CU_MEMORYTYPE_HOST as u32 {
            return Ok(Reach::Pinned);
        }
        let start = first as usize / PAGE * PAGE;
        let size = (first as usize + bytes).next_multiple_of(PAGE) - start;
        let register = |flags| {
            // SAFETY: the range is the caller's, who keeps it until we are dropped.
            unsafe { sys::cuMemHostRegister_v2(start as *mut c_void, size, flags) }
        };
        let flags = sys::CU_MEMHOSTREGISTER_PORTABLE | sys::CU_MEMHOSTREGISTER_DEVICEMAP;
        // a mapped file cannot be written to; not every platform knows the flag
        let mut status = register(flags | sys::CU_MEMHOSTREGISTER_READ_ONLY);
        if status == CUresult::CUDA_ERROR_INVALID_VALUE || status == CUresult::CUDA_ERROR_NOT_SUPPORTED {
            status = register(flags);
        }
        check("cuMemHostRegister", status)?;
        self.ranges.push((start, size));
        Ok(Reach::Registered)
    }

    /// Registers `ranges` of first byte and size, sorted. Neighbours that share a page or touch become one
    /// registration: no page can be registered twice.
    ///
    /// # Errors
    /// The first that the driver refuses; the rest is not tried.
    pub fn add_all(&mut self, ranges: &[(usize, usize)]) -> Result<(), CudaError> {
        let mut merged: Vec<(usize, usize)> = Vec::new();
        for &(first, bytes) in ranges {
            match merged.last_mut() {
                Some((start, end)) if first / PAGE * PAGE < end.next_multiple_of(PAGE) + 1 => {
                    *end = (*end).max(first + bytes);
                    debug_assert!(*start <= first);
                }
                _ => merged.push((first, first + bytes)),
            }
        }
        for (start, end) in merged {
            self.add(start as *const u8, end - start)?;
        }
        Ok(())
    }

    /// Bytes that we have registered.
    pub fn bytes(&self) -> usize {
        self.ranges.iter().map(|r| r.1).sum()
    }
}

impl Drop for Registration {
    fn drop(&mut self) {
        if self.device.bind().is_ok() {
            for (start, _) in self.ranges.drain(..) {
                let _ = cu!(cuMemHostUnregister(start as *mut c_void));
            }
        }
    }
}
