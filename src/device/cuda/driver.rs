//! The driver, one device of it, and the kernels.

use std::{
    ffi::{CStr, CString, c_char, c_int, c_void},
    fmt::{self, Display, Formatter},
    ptr,
    sync::{Arc, OnceLock},
};

use cudarc::driver::{
    result::DriverError,
    sys::{self, CUcontext, CUdevice, CUfunction, CUmodule, CUresult, CUstream},
};

use crate::fault;

/// The fat binary with the kernels; `None` in a library that was built without nvcc.
#[cfg(moe_hot_kernels)]
static KERNELS: Option<&[u8]> = Some(include_bytes!(concat!(env!("OUT_DIR"), "/moe_hot.fatbin")));
#[cfg(not(moe_hot_kernels))]
static KERNELS: Option<&[u8]> = None;

/// Oldest driver the kernels' toolkit works with, as `cuDriverGetVersion` counts.
const MIN_DRIVER: c_int = 12_000;

/// Whether this library contains the kernels.
pub fn kernels_built() -> bool {
    KERNELS.is_some()
}

/// A failed call into the driver, or why there was none.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
pub enum CudaError {
    /// A call failed.
    #[error("{call}: {why}")]
    Call {
        /// The driver's function.
        call: &'static str,
        /// The driver's words.
        why: String,
    },
    /// There is no usable driver, device or kernel.
    #[error("{0}")]
    Missing(String),
}

impl CudaError {
    /// Whether the device has no memory left.
    pub fn is_out_of_memory(&self) -> bool {
        matches!(self, CudaError::Call { why, .. } if why.starts_with("CUDA_ERROR_OUT_OF_MEMORY"))
    }
}

/// Turns the driver's status into a result that names the call.
pub(super) fn check(call: &'static str, status: CUresult) -> Result<(), CudaError> {
    if status == CUresult::CUDA_SUCCESS {
        return Ok(());
    }
    let error = DriverError(status);
    let text =
        |s: Result<&CStr, DriverError>| s.map_or("unknown error", |s| s.to_str().unwrap_or("?")).to_owned();
    Err(CudaError::Call {
        call,
        why: format!("{}: {}", text(error.error_name()), text(error.error_string())),
    })
}

/// Calls a driver function and names it in the error.
macro_rules! cu {
    ($f:ident($($arg:expr),* $(,)?)) => {
        // SAFETY: the arguments are valid for the call, as argued where the macro is used.
        $crate::device::cuda::driver::check(stringify!($f), unsafe { cudarc::driver::sys::$f($($arg),*) })
    };
}
pub(super) use cu;

/// Loads and initialises the driver, once a process.
fn init() -> Result<(), CudaError> {
    static DONE: OnceLock<Result<(), CudaError>> = OnceLock::new();
    DONE.get_or_init(|| {
        // SAFETY: looks for a library.
        if !unsafe { sys::is_culib_present() } {
            return Err(CudaError::Missing("there is no CUDA driver (libcuda)".into()));
        }
        cu!(cuInit(0))?;
        let mut version = 0;
        cu!(cuDriverGetVersion(&mut version))?;
        let version = fault::armed("driver").map_or(version, |v| v as c_int);
        if version < MIN_DRIVER {
            return Err(CudaError::Missing(format!(
                "the CUDA driver is too old: it supports CUDA {}, needed is {}",
                Version(version),
                Version(MIN_DRIVER)
            )));
        }
        Ok(())
    })
    .clone()
}

/// A version, as `cuDriverGetVersion` counts.
pub(super) struct Version(c_int);

impl Display for Version {
    fn fmt(&self, f: &mut Formatter<'_>) -> fmt::Result {
        write!(f, "{}.{}", self.0 / 1000, self.0 % 1000 / 10)
    }
}

/// Of CUDA, that the driver supports.
#[cfg(feature = "cli")]
pub(super) fn version() -> Result<Version, CudaError> {
    init()?;
    let mut version = 0;
    cu!(cuDriverGetVersion(&mut version))?;
    Ok(Version(version))
}

/// Devices that the driver shows.
#[cfg(feature = "cli")]
pub(super) fn n_devices() -> Result<c_int, CudaError> {
    init()?;
    let mut n = 0;
    cu!(cuDeviceGetCount(&mut n))?;
    Ok(n)
}

/// The PCI address of a device.
fn address(device: CUdevice) -> Result<String, CudaError> {
    let mut pci: [c_char; 32] = [0; 32];
    cu!(cuDeviceGetPCIBusId(pci.as_mut_ptr(), pci.len() as c_int, device))?;
    // SAFETY: the driver ends it with a zero.
    Ok(unsafe { CStr::from_ptr(pci.as_ptr()) }.to_string_lossy().into_owned())
}

/// A device with its primary context, which is the one ggml works in, and the kernels in it.
pub struct Device {
    handle: CUdevice,
    context: CUcontext,
    module: CUmodule,
    pub(super) dispatch: CUfunction,
    pub(super) join: CUfunction,
    /// Whether kernels may start before their predecessor has ended, and wait inside.
    pub(super) early_launch: bool,
}

// SAFETY: handles of the driver, which may be used from any thread.
unsafe impl Send for Device {}
// SAFETY: as above.
unsafe impl Sync for Device {}

impl Device {
    /// The device at a PCI address, as ggml names it (`0000:01:00.0`).
    ///
    /// # Errors
    /// No driver, no such device, no kernels in this library, or none for this device.
    pub fn open(pci: &str) -> Result<Arc<Self>, CudaError> {
        let Some(kernels) = KERNELS else {
            return Err(CudaError::Missing(
                "this library was built without CUDA kernels (scripts/build --cuda)".into(),
            ));
        };
        init()?;
        let address =
            CString::new(pci).map_err(|_| CudaError::Missing(format!("'{pci}' is no PCI address")))?;
        let mut handle = 0;
        cu!(cuDeviceGetByPCIBusId(&mut handle, address.as_ptr()))?;
        let mut device = Device::of(handle)?;
        device.bind()?;
        cu!(cuModuleLoadData(&mut device.module, kernels.as_ptr().cast::<c_void>()))?;
        let module = device.module;
        for (function, name) in
            [(&mut device.dispatch, c"moe_hot_dispatch"), (&mut device.join, c"moe_hot_join")]
        {
            cu!(cuModuleGetFunction(function, module, name.as_ptr()))?;
        }
        device.early_launch =
            device.attribute(sys::CUdevice_attribute::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR)? >= 9;
        Ok(Arc::new(device))
    }

    /// A device without kernels.
    fn of(handle: CUdevice) -> Result<Self, CudaError> {
        let mut context = ptr::null_mut();
        cu!(cuDevicePrimaryCtxRetain(&mut context, handle))?;
        // from here on `drop` releases what there is
        Ok(Device {
            handle,
            context,
            module: ptr::null_mut(),
            dispatch: ptr::null_mut(),
            join: ptr::null_mut(),
            early_launch: false,
        })
    }

    /// The device of this index, to look at: it has no kernels.
    #[cfg(feature = "cli")]
    pub(super) fn bare(index: c_int) -> Result<Arc<Self>, CudaError> {
        init()?;
        let mut handle = 0;
        cu!(cuDeviceGet(&mut handle, index))?;
        Device::of(handle).map(Arc::new)
    }

    /// The first device that the driver shows.
    ///
    /// # Errors
    /// As [`Device::open`].
    pub fn first() -> Result<Arc<Self>, CudaError> {
        init()?;
        Device::open(&address(0)?)
    }

    /// Makes the context current on the calling thread.
    ///
    /// # Errors
    /// As the driver says.
    pub fn bind(&self) -> Result<(), CudaError> {
        cu!(cuCtxSetCurrent(self.context))
    }

    pub(super) fn handle(&self) -> CUdevice {
        self.handle
    }

    fn attribute(&self, which: sys::CUdevice_attribute) -> Result<c_int, CudaError> {
        let mut value = 0;
        cu!(cuDeviceGetAttribute(&mut value, which, self.handle))?;
        Ok(value)
    }

    /// Its name, as the driver has it.
    ///
    /// # Errors
    /// As the driver says.
    pub fn name(&self) -> Result<String, CudaError> {
        let mut name: [c_char; 128] = [0; 128];
        cu!(cuDeviceGetName(name.as_mut_ptr(), name.len() as c_int, self.handle))?;
        // SAFETY: the driver ends it with a zero.
        Ok(unsafe { CStr::from_ptr(name.as_ptr()) }.to_string_lossy().into_owned())
    }

    /// Its PCI address.
    #[cfg(feature = "cli")]
    pub(super) fn pci(&self) -> Result<String, CudaError> {
        address(self.handle)
    }

    /// Its compute capability.
    #[cfg(feature = "cli")]
    pub(super) fn capability(&self) -> Result<(u32, u32), CudaError> {
        let major = self.attribute(sys::CUdevice_attribute::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR)?;
        let minor = self.attribute(sys::CUdevice_attribute::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR)?;
        Ok((major.unsigned_abs(), minor.unsigned_abs()))
    }

    /// How many blocks run at once, at least.
    ///
    /// # Errors
    /// As the driver says.
    pub fn n_multiprocessors(&self) -> Result<u32, CudaError> {
        let n = self.attribute(sys::CUdevice_attribute::CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT)?;
        Ok(n.unsigned_abs())
    }

    /// Free and total bytes of device memory.
    ///
    /// # Errors
    /// As the driver says.
    pub fn memory(&self) -> Result<(usize, usize), CudaError> {
        self.bind()?;
        let (mut free, mut total) = (0, 0);
        cu!(cuMemGetInfo_v2(&mut free, &mut total))?;
        Ok((free, total))
    }
}

impl Drop for Device {
    fn drop(&mut self) {
        // at process exit the driver may be gone: nothing to say then
        if self.bind().is_ok() && !self.module.is_null() {
            let _ = cu!(cuModuleUnload(self.module));
        }
        let _ = cu!(cuDevicePrimaryCtxRelease_v2(self.handle));
    }
}

/// A stream of our own, beside ggml's.
pub struct Stream {
    device: Arc<Device>,
    raw: CUstream,
}

// SAFETY: a handle of the driver.
unsafe impl Send for Stream {}
// SAFETY: as above.
unsafe impl Sync for Stream {}

impl Stream {
    /// A stream that waits for no other; `low` for work that decode comes before.
    ///
    /// # Errors
    /// As the driver says.
    pub fn new(device: Arc<Device>, low: bool) -> Result<Self, CudaError> {
        device.bind()?;
        let (mut least, mut greatest) = (0, 0);
        cu!(cuCtxGetStreamPriorityRange(&mut least, &mut greatest))?;
        let mut raw = ptr::null_mut();
        let flags = sys::CUstream_flags::CU_STREAM_NON_BLOCKING as u32;
        cu!(cuStreamCreateWithPriority(&mut raw, flags, if low { least } else { greatest }))?;
        Ok(Stream { device, raw })
    }

    /// The driver's handle.
    pub fn raw(&self) -> CUstream {
        self.raw
    }

    /// The device it is on.
    pub fn device(&self) -> &Arc<Device> {
        &self.device
    }

    /// Waits for all that was enqueued.
    ///
    /// # Errors
    /// As the driver says; also what failed in the work itself.
    pub fn synchronize(&self) -> Result<(), CudaError> {
        cu!(cuStreamSynchronize(self.raw))
    }
}

impl Drop for Stream {
    fn drop(&mut self) {
        if self.device.bind().is_ok() {
            let _ = cu!(cuStreamDestroy_v2(self.raw));
        }
    }
}
