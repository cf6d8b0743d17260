//! Where slots live and who runs the two node kernels.

pub mod cuda;
pub mod host;

use std::sync::Arc;

use crate::fault;

/// Where the slots of a model are.
#[derive(Clone)]
pub enum Device {
    /// In host memory.
    Host,
    /// In VRAM.
    Cuda(Arc<cuda::Device>),
}

impl Device {
    /// Whether the slots are in VRAM.
    pub fn is_gpu(&self) -> bool {
        matches!(self, Device::Cuda(_))
    }

    /// Bytes that are free there beside `slots` bytes of slots.
    ///
    /// # Errors
    /// Says why that is not known.
    pub fn free(&self, slots: u64) -> Result<u64, String> {
        if let Some(mib) = fault::armed("vram") {
            return Ok((mib << 20).saturating_sub(slots));
        }
        match self {
            Device::Host => host::memory("MemAvailable")
                .ok_or_else(|| "the system does not tell what memory is available".into()),
            Device::Cuda(d) => d.memory().map(|(free, _)| free as u64).map_err(|e| e.to_string()),
        }
    }

    /// Uses of experts for each one that a plan may upload.
    pub fn uses_per_upload(&self) -> u32 {
        match self {
            // A copy reads and writes as many bytes as a use reads, in the memory that decode is waiting
            // for: the swaps cost decode about 3% at most, also while the slots are being filled.
            Device::Host => 64,
            Device::Cuda(_) => cuda::USES_PER_UPLOAD,
        }
    }
}

/// Memory of slots: a range of addresses, of which the first part has memory, zeroed when it comes.
pub enum SlotMemory {
    /// In host memory.
    Host(host::HostMemory),
    /// In VRAM.
    Cuda(cuda::VideoMemory),
}

impl std::fmt::Debug for SlotMemory {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{} of {} bytes at {:p}", self.bytes(), self.capacity(), self.ptr())
    }
}

impl SlotMemory {
    /// Addresses for `reserved` bytes on `device`, and memory for the first `bytes`; `stays`: none of it will go.
    ///
    /// # Errors
    /// Says why there is no such memory.
    pub fn new(device: &Device, reserved: usize, bytes: usize, stays: bool) -> Result<Self, String> {
        match device {
            Device::Host => host::HostMemory::new(reserved, bytes).map(SlotMemory::Host),
            Device::Cuda(d) => cuda::VideoMemory::new(d.clone(), reserved, bytes, stays)
                .map(SlotMemory::Cuda)
                .map_err(|e| e.to_string()),
        }
    }

    /// Gives memory back or adds some, so that the first `bytes` bytes have it. Nobody uses what goes.
    ///
    /// # Errors
    /// Says why there is no such memory; nothing has changed then.
    pub fn resize(&self, bytes: usize) -> Result<(), String> {
        match self {
            SlotMemory::Host(m) => m.resize(bytes),
            SlotMemory::Cuda(m) => m.resize(bytes).map_err(|e| e.to_string()),
        }
    }

    /// First byte, in the device's addresses.
    pub fn ptr(&self) -> *mut u8 {
        match self {
            SlotMemory::Host(m) => m.ptr(),
            SlotMemory::Cuda(m) => m.ptr(),
        }
    }

    /// Copies the bytes from `at` on to `out`, which ends within the memory; nobody writes to them meanwhile.
    ///
    /// # Errors
    /// Says why the device does not give them.
    pub fn read(&self, at: usize, out: &mut [u8]) -> Result<(), String> {
        match self {
            SlotMemory::Host(m) => {
                m.read(at, out);
                Ok(())
            }
            SlotMemory::Cuda(m) => m.read(at, out).map_err(|e| e.to_string()),
        }
    }

    /// Bytes that there are addresses for.
    pub fn capacity(&self) -> usize {
        match self {
            SlotMemory::Host(m) => m.capacity(),
            SlotMemory::Cuda(m) => m.capacity(),
        }
    }

    /// Bytes that have memory.
    pub fn bytes(&self) -> usize {
        match self {
            SlotMemory::Host(m) => m.bytes(),
            SlotMemory::Cuda(m) => m.bytes(),
        }
    }
}
