//! What there is of driver and devices, whether or not this library has kernels: for `moe-hot doctor`.

use std::sync::Arc;

use super::{
    driver::{self, CudaError, Device},
    measure::MappedFile,
    memory::Registration,
};

/// Bytes that are registered as a try.
const TRY_BYTES: usize = 1 << 20;

/// A driver that can be used, and its devices.
#[derive(Clone, Debug)]
pub struct Found {
    /// Version of CUDA that the driver supports.
    pub driver: String,
    /// In the driver's order.
    pub cards: Vec<Card>,
}

/// A device.
#[derive(Clone, Debug)]
pub struct Card {
    /// Its name, as the driver has it.
    pub name: String,
    /// PCI address.
    pub pci: String,
    /// Compute capability.
    pub capability: (u32, u32),
    /// Bytes of its memory.
    pub total: usize,
    /// Of them, free.
    pub free: usize,
    /// Whether a mapped file registers, as that of a model.
    pub registers: Result<(), String>,
}

/// Looks at the machine.
///
/// # Errors
/// No driver, one that is too old, or what it says of a device.
pub fn look() -> Result<Found, CudaError> {
    let n = driver::n_devices()?;
    let cards = (0..n).map(|i| card(&Device::bare(i)?)).collect::<Result<_, _>>()?;
    Ok(Found { driver: driver::version()?.to_string(), cards })
}

fn card(device: &Arc<Device>) -> Result<Card, CudaError> {
    let (free, total) = device.memory()?;
    Ok(Card {
        name: device.name()?,
        pci: device.pci()?,
        capability: device.capability()?,
        total,
        free,
        registers: registers(device),
    })
}

fn registers(device: &Arc<Device>) -> Result<(), String> {
    let file = MappedFile::new(&vec![1; TRY_BYTES]).map_err(|e| format!("a file cannot be mapped: {e}"))?;
    let mut registration = Registration::new(device.clone());
    registration.add_all(&[(file.first as usize, file.bytes)], |_, _| ()).map_err(|e| e.to_string())
}
