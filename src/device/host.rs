//! Slots in host memory; DISPATCH and JOIN run on ggml's CPU threads.
//!
//! The reference device: everything but the kernels is what the GPU path runs on, and its output must
//! equal stock llama.cpp bit for bit.

use std::{
    io, ptr, slice,
    sync::atomic::{AtomicUsize, Ordering},
};

use crate::{
    cold::{ColdRow, EngineError},
    context::Context,
    fault,
    ggml::ggml_tensor,
    sync,
};

/// Largest ubatch that takes the hot path, in tokens.
///
/// Up to 7 rows of an expert ggml's CPU backend computes each with `vec_dot`, as the cold engine does.
/// At 8 rows it changes to a tiled kernel for K-quants, which adds in another order: the two would no
/// longer agree to the last bit (ggml-cpu/tiled/tiled.cpp, `ggml_tiled_min_batch`).
pub const MAX_TOKENS: u32 = 7;

/// Memory is given back in pages. ggml wants 32 bytes, huge pages and registration want pages.
const PAGE: usize = 4096;

/// A range of addresses of which the first part is used, zeroed when it comes.
pub struct HostMemory {
    ptr: *mut u8,
    reserved: usize,
    bytes: AtomicUsize,
}

// SAFETY: plain memory; who may touch which part when is the business of `slots`.
unsafe impl Send for HostMemory {}
// SAFETY: as above.
unsafe impl Sync for HostMemory {}

impl HostMemory {
    /// Addresses for `reserved` bytes, of which `bytes` may be used.
    ///
    /// # Errors
    /// Says why there are none.
    pub fn new(reserved: usize, bytes: usize) -> Result<Self, String> {
        let reserved = reserved.max(1).next_multiple_of(PAGE);
        let (access, flags) = (
            libc::PROT_READ | libc::PROT_WRITE,
            libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE,
        );
        // SAFETY: a new mapping, in nobody's way.
        let ptr = unsafe { libc::mmap(ptr::null_mut(), reserved, access, flags, -1, 0) };
        if ptr == libc::MAP_FAILED {
            return Err(io::Error::last_os_error().to_string());
        }
        let memory = HostMemory { ptr: ptr.cast(), reserved, bytes: AtomicUsize::new(0) };
        sync::memory::watch(memory.ptr, reserved);
        memory.resize(bytes)?;
        Ok(memory)
    }

    /// Lets the first `bytes` bytes be used, and gives back what is behind them.
    ///
    /// # Errors
    /// Says why not; nothing has changed then.
    pub fn resize(&self, bytes: usize) -> Result<(), String> {
        if bytes > self.reserved {
            return Err(format!("{bytes} bytes are more than the {} that have addresses", self.reserved));
        }
        let before = self.bytes();
        if bytes > before && fault::strikes_once("alloc") {
            return Err("a fault was injected".into());
        }
        let from = bytes.next_multiple_of(PAGE);
        if before > from {
            // SAFETY: our own mapping, and nobody uses this part of it any more (the caller's promise). Pages that are
            // used again are zero.
            let status =
                unsafe { libc::madvise(self.ptr.add(from).cast(), before - from, libc::MADV_DONTNEED) };
            if status != 0 {
                return Err(io::Error::last_os_error().to_string());
            }
        }
        self.bytes.store(bytes, Ordering::Relaxed);
        Ok(())
    }

    /// First byte.
    pub fn ptr(&self) -> *mut u8 {
        self.ptr
    }

    /// Bytes that have addresses.
    pub fn capacity(&self) -> usize {
        self.reserved
    }

    /// Bytes that may be used.
    pub fn bytes(&self) -> usize {
        self.bytes.load(Ordering::Relaxed)
    }

    /// Copies the bytes from `at` on to `out`, which ends within the memory; nobody writes to them meanwhile.
    pub fn read(&self, at: usize, out: &mut [u8]) {
        assert!(at + out.len() <= self.bytes(), "{} bytes from {at} on of {}", out.len(), self.bytes());
        sync::memory::reads(self.ptr().wrapping_add(at), out.len());
        // SAFETY: the bytes are in the memory, and `out` is not.
        unsafe { self.ptr().add(at).copy_to_nonoverlapping(out.as_mut_ptr(), out.len()) };
    }
}

impl Drop for HostMemory {
    fn drop(&mut self) {
        // SAFETY: mapped in `new` with this size; nobody uses it any more.
        unsafe { libc::munmap(self.ptr.cast(), self.reserved) };
    }
}

/// Bytes of host memory by the system's name for them, such as MemAvailable; `None` where it does not tell.
pub fn memory(name: &str) -> Option<u64> {
    let text = std::fs::read_to_string("/proc/meminfo").ok()?;
    let line = text.lines().find_map(|l| l.strip_prefix(name)?.strip_prefix(':'))?;
    line.trim().strip_suffix("kB")?.trim().parse::<u64>().ok().map(|kib| kib << 10)
}

/// `(ne, nb)` of a tensor as sizes.
fn shape(t: &ggml_tensor) -> ([usize; 4], [usize; 4]) {
    (t.ne.map(|n| n as usize), t.nb)
}

/// DISPATCH: `slot_ids[n_used, n_tokens] = map[selected]`, -1 where there is no slot; counts every id;
/// posts what is cold. Sources: activations `[n_embd, 1, n_tokens]` f32, selected experts
/// `[n_used, n_tokens]` i32 (rows `nb[1]` apart: a view of the sorted ids of all experts).
///
/// # Safety
/// `dst` and its sources are as the bridge builds them and have their data.
pub unsafe fn dispatch(ctx: &Context, layer: usize, dst: &ggml_tensor) {
    // SAFETY: the bridge gives both sources.
    let (cur, selected) = unsafe { (&*dst.src[0], &*dst.src[1]) };
    let ([n_used, n_tokens, ..], nb) = shape(selected);
    let (_, cur_nb) = shape(cur);
    // SAFETY: DISPATCH's result is contiguous and only this thread writes it.
    let slot_ids = unsafe { slice::from_raw_parts_mut(dst.data.cast::<i32>(), n_used * n_tokens) };

    let model = ctx.model();
    let map = model.map(layer);
    let mut usage = ctx.usage();
    let mut cold = ctx.cold_list();
    cold.clear();
    for t in 0..n_tokens {
        // SAFETY: row `t` of the selected experts holds `n_used` ids.
        let ids =
            unsafe { slice::from_raw_parts(selected.data.cast::<u8>().add(t * nb[1]).cast::<i32>(), n_used) };
        for (k, &id) in ids.iter().enumerate() {
            let row = t * n_used + k;
            let slot = map.slot(id as usize);
            slot_ids[row] = slot;
            usage.ids[layer].push(id as u16);
            if slot < 0 {
                cold.push(ColdRow { expert: id as u32, token: t as u32, row: row as u32 });
            }
        }
    }
    usage.cold[layer] += cold.len() as u32;
    usage.hits += (n_used * n_tokens - cold.len()) as u64;
    drop(usage);
    if !cold.is_empty() {
        if let Some(ms) = fault::armed("slow") {
            std::thread::sleep(std::time::Duration::from_millis(ms));
        }
        // SAFETY: nodes run in order, so the request before was finished by its JOIN; the activations
        // are `n_tokens` rows of `n_embd`.
        unsafe {
            ctx.engine().post(layer, n_tokens, &cold, |t| cur.data.cast::<u8>().add(t * cur_nb[2]).cast())
        };
    }
}

/// JOIN, in place on the down projection's output `[n_embd, n_used, n_tokens]` f32: helps until the
/// cold rows of the layer are there, then fills exactly those. Every thread of the graph calls it with
/// its index `ith` of `nth`.
///
/// # Errors
/// When the cold engine failed or gave up; the cold rows are zero then, and the step must fail.
///
/// # Safety
/// `dst` is the bridge's JOIN node: `src[0]` the experts, `src[1]` the slot ids of the layer's DISPATCH.
pub unsafe fn join(ctx: &Context, dst: &ggml_tensor, ith: usize, nth: usize) -> Result<(), EngineError> {
    // SAFETY: the bridge gives both sources.
    let slot_ids = unsafe { &*dst.src[1] };
    let ([n_embd, n_used, n_tokens, _], nb) = shape(dst);
    // SAFETY: written by DISPATCH before.
    let slot_ids = unsafe { slice::from_raw_parts(slot_ids.data.cast::<i32>(), n_used * n_tokens) };
    if slot_ids.iter().all(|s| *s >= 0) {
        return Ok(());
    }
    let ready = ctx.wait_cold(ith == 0);
    for (row, _) in slot_ids.iter().enumerate().filter(|(_, s)| **s < 0).skip(ith).step_by(nth) {
        let at = (row / n_used) * nb[2] + (row % n_used) * nb[1];
        // SAFETY: the row lies in the tensor, and only this thread writes it.
        let out = unsafe { slice::from_raw_parts_mut(dst.data.cast::<u8>().add(at).cast::<f32>(), n_embd) };
        match ready {
            // SAFETY: the request is finished and asked for every cold row; the next is posted by the
            // next DISPATCH, after all threads have left this node.
            Ok(()) => out.copy_from_slice(unsafe { ctx.engine().output(row, n_embd) }),
            Err(_) => out.fill(0.0),
        }
    }
    ready
}
