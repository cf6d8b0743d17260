//! The C ABI: check, cast, call, map the error. No logic lives here.
//!
//! Every entry point is a panic boundary. What fails returns a status and leaves a message for
//! [`moe_hot_error`]. A handle that is null, freed or foreign is an error, never undefined behaviour, and so is an
//! argument that is null or misaligned. Undefined is only what no library can see: memory that is not there or not as
//! large as said, and userdata of nodes that is not what [`moe_hot_op_data`] gave.

#![allow(non_camel_case_types)]

use std::{
    cell::RefCell,
    ffi::{CStr, CString, c_char, c_int, c_void},
    panic::{AssertUnwindSafe, catch_unwind},
    ptr,
    sync::Arc,
};

use crate::{
    cold::{Activation, Layer, Matrix, join_bound, kernel},
    config,
    context::{Context, StepError},
    device::{SlotMemory, cuda, host},
    ggml::ggml_tensor,
    handles::Handles,
    log::{self, Level, log},
    model::{Model, Offer},
    registry, view,
};

/// How a call ended.
#[repr(C)]
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum moe_hot_status {
    /// It did what was asked.
    MOE_HOT_OK = 0,
    /// An argument is null, out of range or not allowed.
    MOE_HOT_INVALID_ARGUMENT = 1,
    /// The call does not fit the state of its object.
    MOE_HOT_STATE = 2,
    /// The step's output must not be used.
    MOE_HOT_FAILED = 3,
    /// A bug in the library; it was contained.
    MOE_HOT_INTERNAL = 4,
}
use moe_hot_status::{MOE_HOT_FAILED, MOE_HOT_INTERNAL, MOE_HOT_INVALID_ARGUMENT, MOE_HOT_OK, MOE_HOT_STATE};

/// What lies between the first and the last projection of an expert.
#[repr(C)]
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum moe_hot_activation {
    /// `act(gate) * up` by `gated`: SwiGLU, GeGLU.
    MOE_HOT_GATED = 0,
    /// `act(up)` by `unary`, no gate.
    MOE_HOT_UNARY = 1,
    /// `relu(up)^2`, no gate.
    MOE_HOT_RELU_SQR = 2,
}

/// One projection of all experts of a layer, in host memory.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct moe_hot_matrix {
    /// First byte of expert 0; null when the layer has no such matrix.
    pub data: *const c_void,
    /// First byte of the buffer that they are in, which the device gets to know as a whole; null: only the matrix.
    pub buffer: *const c_void,
    /// Its size.
    pub buffer_bytes: usize,
    /// `ggml_type` of the weights.
    pub type_: i32,
    /// Elements of a row (ne[0]).
    pub n_in: i64,
    /// Rows of an expert (ne[1]).
    pub n_out: i64,
    /// Bytes from a row to the next (nb[1]).
    pub row_bytes: usize,
    /// Bytes from an expert to the next (nb[2]).
    pub expert_bytes: usize,
    /// `ggml_type_traits_cpu.vec_dot` of the type.
    pub vec_dot: Option<
        unsafe extern "C" fn(
            n: c_int,
            s: *mut f32,
            bs: usize,
            x: *const c_void,
            bx: usize,
            y: *const c_void,
            by: usize,
            nrc: c_int,
        ),
    >,
    /// `from_float` of the type's `vec_dot_type`; null when that is f32.
    pub from_float: Option<unsafe extern "C" fn(x: *const f32, y: *mut c_void, k: i64)>,
    /// Bytes of an activation row of n_in elements in `vec_dot_type`.
    pub act_row_bytes: usize,
}

/// A MoE layer that passes the bridge's predicate.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct moe_hot_layer {
    /// Layer index in the model.
    pub il: i32,
    /// Experts of the layer.
    pub n_expert: i32,
    /// Experts a token is routed to.
    pub n_used: i32,
    /// Gate projection; null data when merged or absent.
    pub gate: moe_hot_matrix,
    /// Up projection, or gate and up rows one after the other.
    pub up: moe_hot_matrix,
    /// Down projection.
    pub down: moe_hot_matrix,
    /// Whether `up` holds gate and up.
    pub merged: bool,
    /// Which `moe_hot_activation`.
    pub activation: i32,
    /// ggml's vector function for MOE_HOT_GATED.
    pub gated: Option<unsafe extern "C" fn(n: c_int, y: *mut f32, x: *const f32, g: *const f32)>,
    /// ggml's vector function for MOE_HOT_UNARY.
    pub unary: Option<unsafe extern "C" fn(n: c_int, y: *mut f32, x: *const f32)>,
    /// PCI address of the CUDA device that computes the layer, as ggml's device_id; null: the CPU does.
    pub device: *const c_char,
    /// Largest ubatch for which the device's MUL_MAT_ID skips negative ids with these weights; 0: any.
    pub max_tokens: u32,
}

/// The slots of a layer's class: matrix i (gate, up, down; absent ones left out) of slot s is at
/// `data[i] + s * expert_bytes`.
#[repr(C)]
pub struct moe_hot_slots {
    /// Number of slots that there are addresses for; DISPATCH gives out those that have memory.
    pub n_slots: u32,
    /// Number of matrices, 2 or 3.
    pub n_matrices: u32,
    /// First byte of slot 0 by matrix.
    pub data: [*mut c_void; 3],
    /// Size by matrix.
    pub bytes: [usize; 3],
    /// Whether `data` are addresses of the layer's device.
    pub on_device: bool,
    /// Addresses in the device's space where it reads expert 0 of the layer in place, by matrix, the others behind
    /// it; null when it does not.
    pub link: [*mut c_void; 3],
    /// Not negative: all experts of the layer have their slots for good, expert e slot `resident + e`,
    /// and the nodes are not needed.
    pub resident: i32,
}

/// Counters since the context was created or reset; see `telemetry::Stats`.
#[repr(C)]
#[derive(Default)]
pub struct moe_hot_stats {
    /// Slots a layer, after clamping.
    pub k: i32,
    /// Layers on the hot path.
    pub n_layers: i32,
    /// Slots of all classes.
    pub n_slots: i32,
    /// Bytes of all slots.
    pub slot_bytes: u64,
    /// Ubatches on the hot path.
    pub n_steps: u64,
    /// Their tokens.
    pub n_tokens: u64,
    /// Routed experts that had a slot.
    pub n_hits: u64,
    /// Routed experts that had none.
    pub n_misses: u64,
    /// Experts copied into a slot.
    pub n_uploads: u64,
    /// Bytes of those copies.
    pub upload_bytes: u64,
    /// Experts that lost their slot.
    pub n_evictions: u64,
    /// Plans made.
    pub n_rebalances: u64,
    /// Time of plans on the decode thread, in us.
    pub rebalance_us: u64,
    /// Time JOIN worked or waited for cold experts, in us.
    pub join_wait_us: u64,
    /// Thread time spent computing cold experts, in us.
    pub worker_busy_us: u64,
}

/// One llama_context on its model's pool. A handle, not an address: one that was freed is refused, and never given
/// again.
pub struct moe_hot_context(());

/// What a handle stands for.
struct Attached {
    model: Arc<Model>,
    key: usize,
    /// Made by activation. The ops point to it: declared last, and boxed.
    ops: Box<[Op]>,
    context: Option<Arc<Context>>,
}

static CONTEXTS: Handles<Attached> = Handles::new();

/// What a node of one layer gets as its userdata.
struct Op {
    context: Arc<Context>,
    layer: usize,
}

thread_local! {
    static ERROR: RefCell<CString> = RefCell::default();
    static TEXT: RefCell<CString> = RefCell::default();
    static RESPONSE: RefCell<[CString; 3]> = RefCell::default();
}

fn c_text(text: &str) -> CString {
    CString::new(text.replace('\0', " ")).expect("no zero bytes left")
}

/// A string for the caller, valid until the next one on this thread.
fn hand_out(text: &str) -> *const c_char {
    TEXT.with_borrow_mut(|t| {
        *t = c_text(text);
        t.as_ptr()
    })
}

fn fail(status: moe_hot_status, text: &str) -> moe_hot_status {
    ERROR.with_borrow_mut(|e| *e = c_text(text));
    status
}

/// Runs an entry point's body; a panic becomes MOE_HOT_INTERNAL.
fn guard(f: impl FnOnce() -> moe_hot_status) -> moe_hot_status {
    catch_unwind(AssertUnwindSafe(f)).unwrap_or_else(|panic| {
        let text = panic
            .downcast_ref::<String>()
            .map(String::as_str)
            .or_else(|| panic.downcast_ref::<&str>().copied())
            .unwrap_or("panic");
        fail(MOE_HOT_INTERNAL, &format!("moe-hot: internal error: {text}"))
    })
}

/// What the handle `$ctx` stands for, or return MOE_HOT_INVALID_ARGUMENT.
macro_rules! live {
    ($ctx:ident) => {
        match CONTEXTS.get($ctx.addr()) {
            Some(c) => c,
            None if $ctx.is_null() => return fail(MOE_HOT_INVALID_ARGUMENT, "moe-hot: ctx is null"),
            None => return fail(MOE_HOT_INVALID_ARGUMENT, NO_CONTEXT),
        }
    };
}
const NO_CONTEXT: &str = "moe-hot: ctx is no context: it was freed, or is from elsewhere";

/// `$p` as a reference, or return MOE_HOT_INVALID_ARGUMENT.
macro_rules! deref {
    ($p:ident, $how:ident) => {{
        if !$p.is_aligned() {
            return fail(MOE_HOT_INVALID_ARGUMENT, concat!("moe-hot: ", stringify!($p), " is misaligned"));
        }
        // SAFETY: the caller hands in what is valid for that, or null.
        match unsafe { $p.$how() } {
            Some(r) => r,
            None => return fail(MOE_HOT_INVALID_ARGUMENT, concat!("moe-hot: ", stringify!($p), " is null")),
        }
    }};
}

/// The `$n` elements at `$p`, or return MOE_HOT_INVALID_ARGUMENT.
macro_rules! elements {
    ($p:ident, $n:expr) => {{
        let (first, n) = (deref!($p, as_ref), $n);
        if n > isize::MAX as usize / size_of_val(first) {
            let why = format!(concat!("moe-hot: there are no {} ", stringify!($p)), n);
            return fail(MOE_HOT_INVALID_ARGUMENT, &why);
        }
        // SAFETY: neither null nor misaligned, and no larger than an object can be; the caller gives that many.
        unsafe { std::slice::from_raw_parts($p, n) }
    }};
}

/// A string argument, or return MOE_HOT_INVALID_ARGUMENT.
macro_rules! text {
    ($p:ident) => {{
        let bytes = deref!($p, as_ref);
        // SAFETY: not null; the caller gives a zero-terminated string.
        match unsafe { CStr::from_ptr(bytes) }.to_str() {
            Ok(s) => s,
            Err(_) => {
                return fail(MOE_HOT_INVALID_ARGUMENT, concat!("moe-hot: ", stringify!($p), " is not UTF-8"));
            }
        }
    }};
}

/// The message of this thread's last call that failed; valid until the next one fails.
#[unsafe(no_mangle)]
pub extern "C" fn moe_hot_error() -> *const c_char {
    ERROR.with_borrow(|e| e.as_ptr())
}

/// Sets the receiver of messages: `level` is a ggml_log_level, `text` has no line end. Null: none. It must not call
/// this library.
///
/// # Safety
/// `callback` may be called from any thread until it is replaced.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn moe_hot_set_log(
    callback: Option<unsafe extern "C" fn(level: i32, text: *const c_char, user_data: *mut c_void)>,
    user_data: *mut c_void,
) {
    log::set_sink(callback, user_data);
}

/// Sets an option by its flag name without dashes ("moe-hot-k"). Null: back to environment or default.
/// A value that is not allowed is refused, with a message that names option, value and what is allowed.
///
/// # Safety
/// The strings are zero-terminated.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn moe_hot_option_set(name: *const c_char, value: *const c_char) -> moe_hot_status {
    guard(|| {
        let name = text!(name);
        let value = if value.is_null() { None } else { Some(text!(value)) };
        match config::set(name, value) {
            Ok(()) => MOE_HOT_OK,
            Err(e) => fail(MOE_HOT_INVALID_ARGUMENT, &e.to_string()),
        }
    })
}

/// The value of an option in effect, from flag, environment or default. Null on error. Valid until the
/// next text is asked for on this thread.
///
/// # Safety
/// `name` is zero-terminated.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn moe_hot_option_get(name: *const c_char) -> *const c_char {
    let mut value = ptr::null();
    guard(|| {
        let name = text!(name);
        match config::get(name) {
            Ok(v) => {
                value = hand_out(&v);
                MOE_HOT_OK
            }
            Err(e) => fail(MOE_HOT_INVALID_ARGUMENT, &e.to_string()),
        }
    });
    value
}

/// Writes what the options now in effect say.
///
/// # Safety
/// `out` is null or valid for a write.
unsafe fn of_config<T>(out: *mut T, say: impl FnOnce(&config::Config) -> T) -> moe_hot_status {
    guard(|| {
        let out = deref!(out, as_mut);
        match config::snapshot() {
            Ok(c) => {
                *out = say(&c);
                MOE_HOT_OK
            }
            Err(e) => fail(MOE_HOT_INVALID_ARGUMENT, &e.to_string()),
        }
    })
}

/// Whether slots are asked for. Fails when an option in the environment is not allowed.
///
/// # Safety
/// `enabled` is null or valid for a write.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn moe_hot_enabled(enabled: *mut bool) -> moe_hot_status {
    // SAFETY: as promised.
    unsafe { of_config(enabled, |c| c.enabled()) }
}

/// Bytes of slots that the options ask for in layers of `n_expert` experts, one expert of each of which takes
/// `expert_bytes` together; 0 when they ask for as many as there is memory for, or for none. Fails when an option in
/// the environment is not allowed.
///
/// # Safety
/// `bytes` is null or valid for a write.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn moe_hot_wanted(expert_bytes: u64, n_expert: u32, bytes: *mut u64) -> moe_hot_status {
    // SAFETY: as promised.
    unsafe { of_config(bytes, |c| c.wanted(expert_bytes, n_expert)) }
}

/// Attaches a context to the pool of `model` (any address that identifies the model), which is made
/// when there is none. With a pool that is not active yet, offer layers and activate.
///
/// # Safety
/// `out` is null or valid for a write. What is returned is freed with `moe_hot_context_free`.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn moe_hot_context_create(
    model: *const c_void,
    out: *mut *mut moe_hot_context,
) -> moe_hot_status {
    guard(|| {
        let out = deref!(out, as_mut);
        *out = ptr::null_mut();
        if model.is_null() {
            return fail(MOE_HOT_INVALID_ARGUMENT, "moe-hot: model is null");
        }
        let config = match config::snapshot() {
            Ok(c) => c,
            Err(e) => return fail(MOE_HOT_INVALID_ARGUMENT, &e.to_string()),
        };
        let key = model as usize;
        let model = registry::attach(key, config);
        let handle = CONTEXTS.add(Attached { model, key, ops: Box::default(), context: None });
        *out = ptr::without_provenance_mut(handle);
        MOE_HOT_OK
    })
}

/// Frees a context; null is allowed, and what is no context is left alone. No step of it may be running, and the
/// userdata of its nodes is gone with it.
///
/// # Safety
/// No node of it is run again.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn moe_hot_context_free(ctx: *mut moe_hot_context) {
    guard(|| {
        if let Some(ctx) = CONTEXTS.remove(ctx.addr()) {
            let (key, model) = (ctx.key, ctx.model.clone());
            drop(ctx);
            registry::detach(key, &model);
        } else if !ctx.is_null() {
            return fail(MOE_HOT_INVALID_ARGUMENT, NO_CONTEXT);
        }
        MOE_HOT_OK
    });
}

/// The model is gone: drops its pool once no context uses it. The weights must outlive this call.
#[unsafe(no_mangle)]
pub extern "C" fn moe_hot_model_free(model: *const c_void) {
    guard(|| {
        registry::forget(model as usize);
        MOE_HOT_OK
    });
}

/// Offers a layer that may take the hot path.
///
/// # Safety
/// `layer` is null or describes weights that outlive the pool.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn moe_hot_offer(
    ctx: *mut moe_hot_context,
    layer: *const moe_hot_layer,
) -> moe_hot_status {
    guard(|| {
        let ctx = live!(ctx);
        let desc = deref!(layer, as_ref);
        let device = desc.device;
        let device = if device.is_null() { None } else { Some(text!(device).to_string()) };
        match to_layer(desc) {
            Ok(layer) => {
                ctx.model.offer(Offer { layer, device, max_tokens: desc.max_tokens });
                MOE_HOT_OK
            }
            Err(why) => fail(MOE_HOT_INVALID_ARGUMENT, &format!("moe-hot: layer {}: {why}", desc.il)),
        }
    })
}

/// The router of layer `il`, whether the layer takes the hot path or not: `bytes` bytes at `weights`, as in the model
/// file. The routers of all MoE layers tell models apart.
///
/// # Safety
/// `ctx` is null or from `moe_hot_context_create`; `weights` is null or has that many bytes.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn moe_hot_router(
    ctx: *mut moe_hot_context,
    il: i32,
    weights: *const c_void,
    bytes: usize,
) -> moe_hot_status {
    guard(|| {
        let ctx = live!(ctx);
        let weights = weights.cast::<u8>();
        ctx.model.router(il, elements!(weights, bytes));
        MOE_HOT_OK
    })
}

/// Notes that layer `il` takes the stock graph, and why.
///
/// # Safety
/// `reason` is a zero-terminated string.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn moe_hot_skip(
    ctx: *mut moe_hot_context,
    il: i32,
    reason: *const c_char,
) -> moe_hot_status {
    guard(|| {
        let ctx = live!(ctx);
        ctx.model.skip(il, text!(reason));
        MOE_HOT_OK
    })
}

/// Makes the pool from the layers that were offered, or joins the one there is, and logs what was
/// requested and what is active. `n_threads`: ggml's CPU threads in this context. `name`: what people call the model.
/// `active`: whether this context has slots.
///
/// # Safety
/// `name` is a zero-terminated string; `active` is null or valid for a write.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn moe_hot_activate(
    ctx: *mut moe_hot_context,
    n_threads: i32,
    name: *const c_char,
    active: *mut bool,
) -> moe_hot_status {
    guard(|| {
        let handle = ctx.addr();
        let ctx = live!(ctx);
        let active = deref!(active, as_mut);
        *active = false;
        let is_active = || fail(MOE_HOT_STATE, "moe-hot: the context is active already");
        if ctx.context.is_some() {
            return is_active();
        }
        let name = deref!(name, as_ref);
        // SAFETY: not null; the caller gives a zero-terminated string.
        let name = unsafe { CStr::from_ptr(name) }.to_string_lossy();
        if !ctx.model.activate(n_threads.max(0) as usize, &name) {
            return MOE_HOT_OK;
        }
        let context = match Context::new(registry::next_id(), ctx.model.clone()) {
            Ok(c) => Arc::new(c),
            Err(e) => {
                log!(Level::Warn, "moe-hot: this context takes the stock graph: {e}");
                return MOE_HOT_OK;
            }
        };
        let (model, key) = (ctx.model.clone(), ctx.key);
        let ops = (0..model.layers().len()).map(|layer| Op { context: context.clone(), layer }).collect();
        let wired = Attached { model, key, ops, context: Some(context) };
        // another thread may have been faster
        match CONTEXTS.replace(handle, wired, |old| old.context.is_none()) {
            Ok(_) => {
                *active = true;
                MOE_HOT_OK
            }
            Err(_) => is_active(),
        }
    })
}

/// Index of the hot layer with these down weights, or -1.
///
/// # Safety
/// `ctx` is null or from `moe_hot_context_create`.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn moe_hot_find(ctx: *const moe_hot_context, down_data: *const c_void) -> i32 {
    let mut found = -1;
    guard(|| {
        let ctx = live!(ctx);
        if ctx.context.is_some() {
            found = ctx.model.find(down_data.cast()).map_or(-1, |i| i as i32);
        }
        MOE_HOT_OK
    });
    found
}

/// Largest ubatch of the hot path, in tokens; 0 after a step that failed because a thread is stuck, as long
/// as it is.
///
/// # Safety
/// `ctx` is null or from `moe_hot_context_create`.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn moe_hot_max_tokens(ctx: *const moe_hot_context) -> u32 {
    let mut n = 0;
    guard(|| {
        let ctx = live!(ctx);
        n = ctx.context.as_ref().map_or_else(|| ctx.model.max_tokens(), |active| active.max_tokens());
        MOE_HOT_OK
    });
    n
}

/// Changes when graphs that were built before must not be used again: where ubatches take the hot path that did not or
/// the other way round, and where they take it with other nodes.
///
/// # Safety
/// `ctx` is null or from `moe_hot_context_create`.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn moe_hot_graph_version(ctx: *const moe_hot_context) -> u64 {
    let mut version = 0;
    guard(|| {
        version = live!(ctx).context.as_ref().map_or(0, |c| c.graph_version());
        MOE_HOT_OK
    });
    version
}

/// Whether `moe_hot_prompt_routed` should be told what a ubatch of `n_tokens` tokens routes that does not take the hot
/// path.
///
/// # Safety
/// `ctx` is null or from `moe_hot_context_create`.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn moe_hot_observes(ctx: *const moe_hot_context, n_tokens: u32) -> bool {
    let mut observes = false;
    guard(|| {
        observes = live!(ctx).context.as_ref().is_some_and(|c| c.observes(n_tokens));
        MOE_HOT_OK
    });
    observes
}

/// Whether the graph of a ubatch of `n_tokens` tokens should have nodes for what the device reads over the link. When that
/// changes, so does `moe_hot_graph_version`.
///
/// # Safety
/// `ctx` is null or from `moe_hot_context_create`.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn moe_hot_links(ctx: *const moe_hot_context, n_tokens: u32) -> bool {
    let mut links = true;
    guard(|| {
        links = live!(ctx).context.as_ref().is_none_or(|c| c.links(n_tokens));
        MOE_HOT_OK
    });
    links
}

/// The slots of hot layer `layer`.
///
/// # Safety
/// `out` is null or valid for a write.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn moe_hot_get_slots(
    ctx: *const moe_hot_context,
    layer: i32,
    out: *mut moe_hot_slots,
) -> moe_hot_status {
    guard(|| {
        let ctx = live!(ctx);
        let out = deref!(out, as_mut);
        let Some(context) = ctx.context.as_ref().filter(|_| layer >= 0 && (layer as usize) < ctx.ops.len())
        else {
            return fail(MOE_HOT_INVALID_ARGUMENT, &format!("moe-hot: there is no hot layer {layer}"));
        };
        let class = ctx.model.class_of(layer as usize);
        *out = moe_hot_slots {
            n_slots: class.capacity,
            n_matrices: class.memory.len() as u32,
            data: [ptr::null_mut(); 3],
            bytes: [0; 3],
            on_device: false,
            link: [ptr::null_mut(); 3],
            resident: context.resident_from(layer as usize).map_or(-1, |first| first as i32),
        };
        for (i, m) in class.memory.iter().enumerate() {
            out.data[i] = m.ptr().cast();
            out.bytes[i] = m.capacity();
            out.on_device = matches!(**m, SlotMemory::Cuda(_));
        }
        for (out, address) in out.link.iter_mut().zip(ctx.model.link(layer as usize)) {
            *out = *address as *mut c_void;
        }
        MOE_HOT_OK
    })
}

/// The userdata of the nodes of hot layer `layer`; null when there is none. Lives as long as `ctx`.
///
/// # Safety
/// `ctx` is null or from `moe_hot_context_create`.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn moe_hot_op_data(ctx: *const moe_hot_context, layer: i32) -> *mut c_void {
    let mut data = ptr::null_mut();
    guard(|| {
        let ctx = live!(ctx);
        if let Some(op) = usize::try_from(layer).ok().and_then(|layer| ctx.ops.get(layer)) {
            data = ptr::from_ref(op).cast_mut().cast();
        }
        MOE_HOT_OK
    });
    data
}

/// A ubatch of `n_tokens` tokens is about to be computed, each of the sequence in `sequences` or, where that is null,
/// all of sequence 0: swaps that are ready become visible, and the next are planned when their time has come.
/// `hot`: whether it may use slots; then it must be ended. MOE_HOT_FAILED: it must not be computed.
///
/// # Safety
/// `ctx` is null or from `moe_hot_context_create`; `sequences` is null or has `n_tokens` elements; `hot` is null or valid
/// for a write.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn moe_hot_step_begin(
    ctx: *mut moe_hot_context,
    n_tokens: u32,
    sequences: *const i32,
    hot: *mut bool,
) -> moe_hot_status {
    guard(|| {
        let ctx = live!(ctx);
        let hot = deref!(hot, as_mut);
        *hot = false;
        let Some(c) = &ctx.context else { return MOE_HOT_OK };
        // an id is not negative, so it has the same value as a u32
        let sequences = sequences.cast::<u32>();
        let sequences = if sequences.is_null() { &[] } else { elements!(sequences, n_tokens as usize) };
        match c.step_begin(n_tokens, sequences) {
            Ok(h) => {
                *hot = h;
                MOE_HOT_OK
            }
            Err(e) => fail(MOE_HOT_FAILED, &format!("moe-hot: {e}")),
        }
    })
}

/// The graph of the ubatch has been launched: the policies work while the device computes.
///
/// # Safety
/// `ctx` is null or from `moe_hot_context_create`.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn moe_hot_step_work(ctx: *mut moe_hot_context) -> moe_hot_status {
    guard(|| {
        if let Some(c) = &live!(ctx).context {
            c.step_work();
        }
        MOE_HOT_OK
    })
}

/// What hot layer `layer` routed in a ubatch that did not use slots, a prompt: the `n` expert ids in `ids`, the tokens
/// one after the other. Once for each layer before `moe_hot_step_end`. Tells the policy what to start from.
///
/// # Safety
/// `ctx` is null or from `moe_hot_context_create`; `ids` is null or has `n` elements.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn moe_hot_prompt_routed(
    ctx: *mut moe_hot_context,
    layer: i32,
    ids: *const i32,
    n: usize,
) -> moe_hot_status {
    guard(|| {
        let ctx = live!(ctx);
        let Some(c) = &ctx.context else { return MOE_HOT_OK };
        let Some(layer) = usize::try_from(layer).ok().filter(|l| *l < ctx.ops.len()) else {
            return fail(MOE_HOT_INVALID_ARGUMENT, &format!("moe-hot: there is no hot layer {layer}"));
        };
        c.prompt_routed(layer, elements!(ids, n));
        MOE_HOT_OK
    })
}

/// The ubatch has been computed, all its nodes included and its device idle. MOE_HOT_FAILED: its output must not be used.
///
/// # Safety
/// `ctx` is null or from `moe_hot_context_create`.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn moe_hot_step_end(ctx: *mut moe_hot_context) -> moe_hot_status {
    guard(|| match live!(ctx).context.as_ref().map_or(Ok(()), |c| c.step_end()) {
        Ok(()) => MOE_HOT_OK,
        Err(e) => fail(MOE_HOT_FAILED, &format!("moe-hot: {e}")),
    })
}

/// The counters of a context. MOE_HOT_STATE when it has no slots.
///
/// # Safety
/// `out` is null or valid for a write.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn moe_hot_get_stats(
    ctx: *const moe_hot_context,
    out: *mut moe_hot_stats,
) -> moe_hot_status {
    guard(|| {
        let ctx = live!(ctx);
        let out = deref!(out, as_mut);
        *out = moe_hot_stats::default();
        let Some(c) = &ctx.context else { return fail(MOE_HOT_STATE, "moe-hot: the context has no slots") };
        let s = c.stats();
        *out = moe_hot_stats {
            k: ctx.model.slots_per_layer() as i32,
            n_layers: ctx.model.layers().len() as i32,
            n_slots: ctx.model.n_slots() as i32,
            slot_bytes: ctx.model.slot_bytes(),
            n_steps: s.steps,
            n_tokens: s.tokens,
            n_hits: s.hits,
            n_misses: s.misses,
            n_uploads: s.uploads,
            upload_bytes: s.upload_bytes,
            n_evictions: s.evictions,
            n_rebalances: s.rebalances,
            rebalance_us: s.rebalance_us,
            join_wait_us: s.join_wait_us,
            worker_busy_us: s.worker_busy_us,
        };
        MOE_HOT_OK
    })
}

/// Sets the counters of a context to zero.
///
/// # Safety
/// `ctx` is null or from `moe_hot_context_create`.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn moe_hot_reset_stats(ctx: *mut moe_hot_context) -> moe_hot_status {
    guard(|| {
        if let Some(c) = &live!(ctx).context {
            c.reset_stats();
        }
        MOE_HOT_OK
    })
}

fn context_text(ctx: *const moe_hot_context, text: impl FnOnce(&Context) -> String) -> *const c_char {
    let mut out = ptr::null();
    guard(|| {
        match &live!(ctx).context {
            Some(c) => out = hand_out(&text(c)),
            None => return fail(MOE_HOT_STATE, "moe-hot: the context has no slots"),
        }
        MOE_HOT_OK
    });
    out
}

/// What was requested and what is active, in one line. Null when the context has no slots. Valid until
/// the next text is asked for on this thread.
///
/// # Safety
/// `ctx` is null or from `moe_hot_context_create`.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn moe_hot_status_text(ctx: *const moe_hot_context) -> *const c_char {
    context_text(ctx, |c| c.model().status().into())
}

/// The counters in one line; otherwise as `moe_hot_status_text`.
///
/// # Safety
/// `ctx` is null or from `moe_hot_context_create`.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn moe_hot_summary(ctx: *const moe_hot_context) -> *const c_char {
    context_text(ctx, |c| format!("moe-hot: {}", c.stats()))
}

/// An answer to an HTTP client.
#[repr(C)]
pub struct moe_hot_response {
    /// HTTP status.
    pub status: i32,
    /// Type of the body.
    pub content_type: *const c_char,
    /// Value of the header Content-Security-Policy; null: none.
    pub security_policy: *const c_char,
    /// The body, zero-terminated.
    pub body: *const c_char,
}

/// Answers GET and POST /moe-hot, GET /moe-hot/ (a page), and gives the parts of GET /props (JSON) and of GET /metrics
/// (Prometheus' text format), for all models of the process. `body`: `n_body` bytes. `writable`: whether changes are
/// allowed. Valid until the next call on this thread. May be called from any thread at any time.
///
/// # Safety
/// `method` and `path` are zero-terminated strings; `body` is null or has `n_body` bytes; `out` is null or valid for a
/// write.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn moe_hot_http(
    method: *const c_char,
    path: *const c_char,
    body: *const c_void,
    n_body: usize,
    writable: bool,
    out: *mut moe_hot_response,
) -> moe_hot_status {
    guard(|| {
        let out = deref!(out, as_mut);
        let (method, path) = (text!(method), text!(path));
        let body = body.cast::<u8>();
        let body = if body.is_null() { &[] } else { elements!(body, n_body) };
        let r = view::request(method, path, body, writable);
        RESPONSE.with_borrow_mut(|held| {
            *held = [r.content_type, r.security_policy.unwrap_or_default(), &r.body].map(c_text);
            *out = moe_hot_response {
                status: r.status.into(),
                content_type: held[0].as_ptr(),
                security_policy: if r.security_policy.is_some() { held[1].as_ptr() } else { ptr::null() },
                body: held[2].as_ptr(),
            };
        });
        MOE_HOT_OK
    })
}

/// The device with PCI address `device` has no memory for `bytes` bytes: slots there are given back, at once. Whether that
/// was possible, and it is worth another try. Not while a step of the calling thread runs.
///
/// # Safety
/// `device` is null or a zero-terminated string.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn moe_hot_give_back(device: *const c_char, bytes: usize) -> bool {
    let mut given = false;
    guard(|| {
        let device = text!(device);
        given = registry::visit(|models| models.iter().any(|m| m.give_back(device, bytes as u64)));
        MOE_HOT_OK
    });
    given
}

/// The DISPATCH node (`ggml_custom_op_t`): sources activations `[n_embd, 1, n_tokens]` f32 and selected
/// experts `[n_used, n_tokens]` i32; result `[n_used, n_tokens]` i32, the slot or -1. One task.
///
/// # Safety
/// Called by ggml on a node that the bridge built with the userdata of `moe_hot_op_data`.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn moe_hot_dispatch(
    dst: *mut ggml_tensor,
    ith: c_int,
    _nth: c_int,
    userdata: *mut c_void,
) {
    if ith != 0 {
        return;
    }
    // SAFETY: the bridge passes what `moe_hot_op_data` gave, which lives as long as the context.
    let op = unsafe { &*userdata.cast::<Op>() };
    let done = catch_unwind(AssertUnwindSafe(|| {
        // SAFETY: ggml gives a node with its sources computed.
        unsafe { host::dispatch(&op.context, op.layer, &*dst) };
    }));
    if done.is_err() {
        op.context.fail(crate::cold::EngineError::Failed);
    }
}

/// The JOIN node (`ggml_custom_op_t`), in place on the down projection's output `[n_embd, n_used,
/// n_tokens]` f32; second source the slot ids. Any number of tasks.
///
/// # Safety
/// As for `moe_hot_dispatch`.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn moe_hot_join(dst: *mut ggml_tensor, ith: c_int, nth: c_int, userdata: *mut c_void) {
    // SAFETY: as in `moe_hot_dispatch`.
    let op = unsafe { &*userdata.cast::<Op>() };
    let joined = catch_unwind(AssertUnwindSafe(|| {
        // SAFETY: as in `moe_hot_dispatch`.
        unsafe { host::join(&op.context, &*dst, ith as usize, nth as usize) }
    }));
    match joined {
        Ok(Ok(())) => {}
        Ok(Err(e)) => op.context.fail(e),
        Err(_) => op.context.fail(crate::cold::EngineError::Failed),
    }
}

/// Runs `enqueue` for a node in VRAM; what fails fails the step.
///
/// # Safety
/// As for `moe_hot_cuda_dispatch`.
unsafe fn on_device(
    dst: *mut ggml_tensor,
    userdata: *mut c_void,
    enqueue: impl FnOnce(&cuda::Port, usize, &ggml_tensor) -> Result<(), cuda::CudaError>,
) {
    // SAFETY: the bridge passes what `moe_hot_op_data` gave, which lives as long as the context.
    let op = unsafe { &*userdata.cast::<Op>() };
    let enqueued = catch_unwind(AssertUnwindSafe(|| match op.context.port() {
        // SAFETY: ggml gives a node.
        Some(port) => enqueue(port, op.layer, unsafe { &*dst }).map_err(StepError::from),
        None => Err(StepError::Misplaced),
    }));
    match enqueued {
        Ok(Ok(())) => {}
        Ok(Err(e)) => op.context.fail(e),
        Err(_) => op.context.fail(crate::cold::EngineError::Failed),
    }
}

/// Enqueues the DISPATCH node on `stream`, a `cudaStream_t` (`ggml_backend_cuda_custom_op_t`). Tensors as
/// for `moe_hot_dispatch`, in device memory.
///
/// # Safety
/// Called by ggml on a node that the bridge built with the userdata of `moe_hot_op_data`.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn moe_hot_cuda_dispatch(
    dst: *mut ggml_tensor,
    stream: *mut c_void,
    userdata: *mut c_void,
) {
    // SAFETY: passed on.
    unsafe {
        on_device(dst, userdata, |port, layer, dst| cuda::dispatch(port, layer, dst, stream, join_bound()))
    };
}

/// Enqueues the JOIN node, otherwise as `moe_hot_cuda_dispatch`.
///
/// # Safety
/// As for `moe_hot_cuda_dispatch`.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn moe_hot_cuda_join(
    dst: *mut ggml_tensor,
    stream: *mut c_void,
    userdata: *mut c_void,
) {
    // SAFETY: passed on.
    unsafe {
        on_device(dst, userdata, |port, layer, dst| cuda::join(port, layer, dst, stream, join_bound()))
    };
}

/// What a DISPATCH node in VRAM is created with (`ggml_custom_op_t`). Runs only when the node was
/// scheduled on the CPU by mistake: the step fails.
///
/// # Safety
/// As for `moe_hot_dispatch`.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn moe_hot_cuda_dispatch_key(
    _dst: *mut ggml_tensor,
    _ith: c_int,
    _nth: c_int,
    userdata: *mut c_void,
) {
    // SAFETY: as in `moe_hot_dispatch`.
    unsafe { &*userdata.cast::<Op>() }.context.fail(StepError::Misplaced);
}

/// The same for JOIN; a function of its own, because nodes are told apart by it.
///
/// # Safety
/// As for `moe_hot_dispatch`.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn moe_hot_cuda_join_key(
    dst: *mut ggml_tensor,
    ith: c_int,
    nth: c_int,
    userdata: *mut c_void,
) {
    if ith + 1 == nth {
        // SAFETY: passed on.
        unsafe { moe_hot_cuda_dispatch_key(dst, ith, nth, userdata) };
    }
}

fn to_matrix(m: &moe_hot_matrix, what: &str) -> Result<Option<Matrix>, String> {
    if m.data.is_null() {
        return Ok(None);
    }
    let size = |v: i64, name: &str| {
        usize::try_from(v)
            .ok()
            .filter(|v| *v > 0)
            .ok_or(format!("{what} has {name} = {v}, expected more than 0"))
    };
    let (n_in, n_out) = (size(m.n_in, "n_in")?, size(m.n_out, "n_out")?);
    // slots have no gaps between rows, and no type has less than a bit an element
    if n_out.checked_mul(m.row_bytes) != Some(m.expert_bytes) || m.row_bytes < n_in.div_ceil(8) {
        let (row, expert) = (m.row_bytes, m.expert_bytes);
        return Err(format!(
            "{what} has {row} bytes a row and {expert} an expert, for {n_out} rows of {n_in}"
        ));
    }
    Ok(Some(Matrix {
        data: m.data.cast(),
        buffer: (!m.buffer.is_null()).then_some((m.buffer as usize, m.buffer_bytes)),
        ty: m.type_,
        n_in,
        n_out,
        row_bytes: m.row_bytes,
        expert_bytes: m.expert_bytes,
        vec_dot: m.vec_dot.ok_or(format!("{what} has no vec_dot"))?,
        from_float: m.from_float,
        act_row_bytes: m.act_row_bytes,
        kernel: None,
        ahead: kernel::default_ahead(m.expert_bytes),
    }))
}

fn to_layer(l: &moe_hot_layer) -> Result<Layer, String> {
    use moe_hot_activation::{MOE_HOT_GATED, MOE_HOT_RELU_SQR, MOE_HOT_UNARY};
    const GATED: i32 = MOE_HOT_GATED as i32;
    const UNARY: i32 = MOE_HOT_UNARY as i32;
    const RELU_SQR: i32 = MOE_HOT_RELU_SQR as i32;
    if u16::try_from(l.il).is_err() {
        return Err(format!("its index is not from 0 to {}", u16::MAX));
    }
    let gate = to_matrix(&l.gate, "gate")?;
    let up = to_matrix(&l.up, "up")?.ok_or("up is missing")?;
    let down = to_matrix(&l.down, "down")?.ok_or("down is missing")?;
    let n_ff = if l.merged { up.n_out / 2 } else { up.n_out };
    let activation = match l.activation {
        GATED => Activation::Gated(l.gated.ok_or("there is no gated function")?),
        UNARY => Activation::Unary(l.unary.ok_or("there is no unary function")?),
        RELU_SQR => Activation::ReluSqr,
        other => return Err(format!("there is no activation {other}")),
    };
    if matches!(activation, Activation::Gated(_)) != (gate.is_some() || l.merged) {
        return Err("gate and activation do not fit together".into());
    }
    if l.merged && (gate.is_some() || up.n_out % 2 != 0) || down.n_in != n_ff || down.n_out != up.n_in {
        return Err("the shapes of gate, up and down do not fit together".into());
    }
    if let Some(g) = &gate {
        // the activation is converted once, for up
        if (g.ty, g.n_in, g.n_out) != (up.ty, up.n_in, up.n_out) {
            return Err("gate and up differ in type or shape".into());
        }
    }
    let (n_expert, n_used) = (l.n_expert, l.n_used);
    if n_used < 1 || n_expert < n_used || n_expert > i32::from(u16::MAX) {
        return Err(format!("{n_used} of {n_expert} experts a token are not possible"));
    }
    let (n_expert, n_used) = (n_expert as usize, n_used as usize);
    let matrices = || gate.iter().chain([&up, &down]);
    if matrices().any(|m| m.expert_bytes > isize::MAX as usize / n_expert) {
        return Err(format!("{n_expert} experts are larger than an address space"));
    }
    if let Some(g) = gate.as_ref().filter(|g| g.row_bytes != up.row_bytes) {
        return Err(format!("gate has {} bytes a row and up {}", g.row_bytes, up.row_bytes));
    }
    Ok(Layer { il: l.il, n_expert, n_used, gate, up, down, merged: l.merged, activation })
}
