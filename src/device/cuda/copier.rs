//! Copies experts into slots on a stream of low priority.

use std::{ptr, sync::Arc};

use cudarc::driver::sys::{self, CUdeviceptr, CUevent};

use super::{
    driver::{CudaError, Device, Stream, cu},
    memory::{Piece, Pinned, Registration},
};
use crate::transfer::{Copier, Order};

/// Halves of the staging ring: one is filled while the other is on the link.
const HALVES: usize = 2;
/// Bytes of a half.
const HALF: usize = 4 << 20;

/// The copier of a device. What the driver knows is copied from where it is, the rest goes through a pinned
/// ring.
pub struct CudaCopier {
    stream: Stream,
    done: CUevent,
    sources: Arc<Registration>,
    staging: Option<Staging>,
    bound: bool,
}

struct Staging {
    memory: Pinned,
    free: [CUevent; HALVES],
    next: usize,
}

// SAFETY: handles of the driver; used by the copy thread alone.
unsafe impl Send for CudaCopier {}

fn event() -> Result<CUevent, CudaError> {
    let mut e = ptr::null_mut();
    // the copy thread sleeps while it waits: spinning would take a core from the workers
    let flags = sys::CUevent_flags::CU_EVENT_BLOCKING_SYNC as u32
        | sys::CUevent_flags::CU_EVENT_DISABLE_TIMING as u32;
    cu!(cuEventCreate(&mut e, flags))?;
    Ok(e)
}

impl CudaCopier {
    /// A copier from `sources`, which stay registered while it lives, and from other memory.
    ///
    /// # Errors
    /// As the driver says.
    pub fn new(device: &Arc<Device>, sources: Arc<Registration>) -> Result<Self, CudaError> {
        let stream = Stream::new(device.clone(), true)?;
        Ok(CudaCopier { stream, done: event()?, sources, staging: None, bound: false })
    }

    fn enqueue(
        &mut self,
        mut src: *const u8,
        mut dst: CUdeviceptr,
        mut bytes: usize,
    ) -> Result<(), CudaError> {
        while bytes > 0 {
            let piece = self.sources.piece(src as usize, bytes);
            let (Piece::Direct(n) | Piece::Staged(n)) = piece;
            match piece {
                Piece::Direct(_) => cu!(cuMemcpyHtoDAsync_v2(dst, src.cast(), n, self.stream.raw()))?,
                Piece::Staged(_) => self.stage(src, dst, n)?,
            }
            src = src.wrapping_add(n);
            dst += n as u64;
            bytes -= n;
        }
        Ok(())
    }

    fn stage(&mut self, mut src: *const u8, mut dst: CUdeviceptr, mut bytes: usize) -> Result<(), CudaError> {
        if self.staging.is_none() {
            let memory = Pinned::new(self.stream.device().clone(), HALVES * HALF)?;
            self.staging = Some(Staging { memory, free: [event()?, event()?], next: 0 });
        }
        let s = self.staging.as_mut().expect("made above");
        while bytes > 0 {
            let n = bytes.min(HALF);
            let half = s.next;
            s.next = (s.next + 1) % HALVES;
            cu!(cuEventSynchronize(s.free[half]))?;
            let staged = s.memory.host().wrapping_add(half * HALF);
            // SAFETY: the half is free, and the order's owner vouches for the source.
            unsafe { ptr::copy_nonoverlapping(src, staged, n) };
            cu!(cuMemcpyHtoDAsync_v2(dst, staged.cast(), n, self.stream.raw()))?;
            cu!(cuEventRecord(s.free[half], self.stream.raw()))?;
            src = src.wrapping_add(n);
            dst += n as u64;
            bytes -= n;
        }
        Ok(())
    }

    fn run(&mut self, order: &Order) -> Result<(), CudaError> {
        if !self.bound {
            self.stream.device().bind()?;
            self.bound = true;
        }
        for m in &order.moves {
            self.enqueue(m.src, m.dst as CUdeviceptr, m.bytes)?;
        }
        cu!(cuEventRecord(self.done, self.stream.raw()))?;
        cu!(cuEventSynchronize(self.done))
    }
}

impl Copier for CudaCopier {
    fn copy(&mut self, order: &Order) -> Result<(), String> {
        self.run(order).map_err(|e| {
            // what was enqueued before the failure must not arrive later, in a slot that is used again
            let _ = self.stream.synchronize();
            e.to_string()
        })
    }
}

impl Drop for CudaCopier {
    fn drop(&mut self) {
        if self.stream.device().bind().is_err() {
            return;
        }
        let _ = self.stream.synchronize();
        let free = self.staging.iter().flat_map(|s| s.free);
        for e in free.chain([self.done]) {
            let _ = cu!(cuEventDestroy_v2(e));
        }
    }
}
