//! Where slots live and who runs the two node kernels.

pub mod cuda;
pub mod host;

use std::sync::Arc;

/// Where the slots of a model are.
#[derive(Clone)]
pub enum Device {
    /// In host memory.
    Host,
    /// In VRAM.
    Cuda(Arc<cuda::Device>),
}

impl Device {
    /// Uses of experts for each one that a plan may upload.
    pub fn uses_per_upload(&self) -> u32 {
        match self {
            // A copy reads and writes as many bytes as a use reads, in the memory that decode is waiting
            // for: the swaps cost decode about 3% at most, also while the slots are being filled.
            Device::Host => 64,
            // The link is idle but for activations and rows, and a copy over it takes about as long as two
            // uses on the CPU: a quarter of the time at most.
            Device::Cuda(_) => 8,
        }
    }
}

/// Memory of slots: fixed address, zeroed.
pub enum SlotMemory {
    /// In host memory.
    Host(host::HostMemory),
    /// In VRAM.
    Cuda(cuda::VideoMemory),
}

impl SlotMemory {
    /// `bytes` bytes on `device`.
    ///
    /// # Errors
    /// Says why there is no such memory.
    pub fn new(device: &Device, bytes: usize) -> Result<Self, String> {
        match device {
            Device::Host => {
                host::HostMemory::new(bytes).map(SlotMemory::Host).ok_or_else(|| "there is no memory".into())
            }
            Device::Cuda(d) => {
                cuda::VideoMemory::new(d.clone(), bytes).map(SlotMemory::Cuda).map_err(|e| e.to_string())
            }
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

    /// Bytes that may be used there.
    pub fn capacity(&self) -> usize {
        match self {
            SlotMemory::Host(m) => m.bytes(),
            SlotMemory::Cuda(m) => m.capacity(),
        }
    }

    /// Bytes of all slots.
    pub fn bytes(&self) -> usize {
        match self {
            SlotMemory::Host(m) => m.bytes(),
            SlotMemory::Cuda(m) => m.bytes(),
        }
    }
}
