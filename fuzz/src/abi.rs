//! Calls of the C ABI in any order, legal or not, against a model of what is legal.
//!
//! Handles are null, live, freed or foreign, pointers null or misaligned, layers whole or broken in one way. Every
//! status is the model's; [`MOE_HOT_INTERNAL`], a panic that was contained, is never it. Steps are computed as ggml
//! does, and every row is checked.
//!
//! Left out is what no library can see: strings without an end, memory that is not there, userdata of a freed context.

use std::{
    collections::BTreeMap,
    ffi::{CStr, CString, c_char, c_int, c_void},
    mem::zeroed,
    ptr,
    rc::Rc,
    sync::LazyLock,
};

use arbitrary::{Arbitrary, Unstructured};
use moe_hot::{
    config::{AutoOff, Config, Options},
    device::{cuda, host},
    ffi::{moe_hot_activation::*, moe_hot_status::*, *},
    ggml::ggml_tensor,
    policy::PolicySpec,
};

use super::{
    config::OPTIONS,
    http::{self, Request, Settings},
};

const N_EMBD: usize = 32;
const MAX_EXPERTS: usize = 8;
/// Most calls: long inputs find nothing that short ones do not.
const MAX_CALLS: usize = 64;
/// Most steps that [`Call::Decode`] makes, over all calls.
const MAX_DECODED: u32 = 2000;

/// Weights that layers are made of.
pub(super) struct Weights {
    n_ff: usize,
    activation: moe_hot_activation,
    merged: bool,
    gate: Vec<f32>,
    up: Vec<f32>,
    down: Vec<f32>,
}

static WEIGHTS: LazyLock<[Weights; 6]> = LazyLock::new(|| {
    let mut state = 1u32;
    let mut noise = |n: usize| -> Vec<f32> {
        let mut next = || {
            state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            (state >> 8) as f32 / (1 << 24) as f32 - 0.5
        };
        (0..n).map(|_| next()).collect()
    };
    let mut weights = |n_ff: usize, activation: moe_hot_activation, merged: bool| {
        let n = MAX_EXPERTS * N_EMBD * n_ff;
        let gated = activation == MOE_HOT_GATED;
        Weights {
            n_ff,
            activation,
            merged,
            gate: noise(if gated && !merged { n } else { 0 }),
            up: noise(if merged { 2 * n } else { n }),
            down: noise(n),
        }
    };
    [
        weights(32, MOE_HOT_GATED, false),
        weights(32, MOE_HOT_GATED, false),
        weights(48, MOE_HOT_GATED, false),
        weights(32, MOE_HOT_UNARY, false),
        weights(32, MOE_HOT_RELU_SQR, false),
        weights(32, MOE_HOT_GATED, true),
    ]
});

fn dot(x: &[f32], y: &[f32]) -> f32 {
    x.iter().zip(y).map(|(x, y)| x * y).sum()
}

unsafe extern "C" fn vec_dot(
    n: c_int,
    s: *mut f32,
    _: usize,
    x: *const c_void,
    _: usize,
    y: *const c_void,
    _: usize,
    _: c_int,
) {
    let row = |p: *const c_void| {
        // SAFETY: the engine gives rows of n elements.
        unsafe { std::slice::from_raw_parts(p.cast::<f32>(), n as usize) }
    };
    // SAFETY: the engine gives room for one element.
    unsafe { *s = dot(row(x), row(y)) };
}

fn silu(x: f32) -> f32 {
    x / (1.0 + (-x).exp())
}

unsafe extern "C" fn swiglu(n: c_int, y: *mut f32, x: *const f32, g: *const f32) {
    for i in 0..n as usize {
        // SAFETY: the engine gives rows of n elements.
        unsafe { *y.add(i) = silu(*x.add(i)) * *g.add(i) };
    }
}

unsafe extern "C" fn unary(n: c_int, y: *mut f32, x: *const f32) {
    for i in 0..n as usize {
        // SAFETY: the engine gives rows of n elements.
        unsafe { *y.add(i) = silu(*x.add(i)) };
    }
}

impl Weights {
    fn matrices(&self) -> impl Iterator<Item = &[f32]> {
        [&self.gate, &self.up, &self.down].into_iter().filter(|m| !m.is_empty()).map(Vec::as_slice)
    }

    /// The part of `matrix` that belongs to an expert.
    fn expert<'a>(&self, matrix: &'a [f32], expert: usize) -> &'a [f32] {
        let n = matrix.len() / MAX_EXPERTS;
        &matrix[expert * n..][..n]
    }

    /// What the expert makes of `x`.
    fn output(&self, expert: usize, x: &[f32]) -> Vec<f32> {
        let rows = |m, x: &[f32]| -> Vec<f32> {
            self.expert(m, expert).chunks(x.len()).map(|row| dot(row, x)).collect()
        };
        let mut up = rows(&self.up, x);
        let hidden: Vec<f32> = match self.activation {
            MOE_HOT_UNARY => up.iter().map(|x| silu(*x)).collect(),
            MOE_HOT_RELU_SQR => up.iter().map(|x| x.max(0.0) * x.max(0.0)).collect(),
            MOE_HOT_GATED => {
                let gate = if self.merged { up.drain(..self.n_ff).collect() } else { rows(&self.gate, x) };
                gate.iter().zip(&up).map(|(g, u)| silu(*g) * u).collect()
            }
        };
        rows(&self.down, &hidden)
    }
}

/// A handle by where it comes from.
#[derive(Arbitrary, Clone, Copy, Debug)]
enum Handle {
    Null,
    /// One of those that were given, freed or not.
    Given(u8),
    /// An address of ours, odd or not.
    Address(bool),
    Number(usize),
}

/// A place for an answer.
#[derive(Arbitrary, Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Out {
    Valid,
    Null,
    /// Where the type has an alignment.
    Misaligned,
}

#[derive(Arbitrary, Clone, Copy, Debug)]
enum Broken {
    Whole,
    NullDescription,
    MisalignedDescription,
    NoUp,
    NoDown,
    NoDot,
    NoFunction,
    /// A gate where there must be none, or none where there must be one.
    Gate,
    UnknownActivation(i32),
    Index(i32),
    Experts(i32),
    Used(i32),
    RowsIn(i64),
    RowsOut(i64),
    RowBytes(usize),
    ExpertBytes(usize),
    /// More experts than an address space has room for.
    Huge,
    Device,
    NotUtf8,
}

#[derive(Arbitrary, Clone, Copy, Debug)]
struct Offered {
    weights: u8,
    few_experts: bool,
    n_used: u8,
    max_tokens: u8,
    broken: Broken,
}

/// A string argument; none: null.
pub(super) type Text<'a> = Option<&'a [u8]>;

#[derive(Arbitrary, Debug)]
enum Name<'a> {
    Known(u8),
    Other(Text<'a>),
}

#[derive(Arbitrary, Debug)]
enum Call<'a> {
    OptionSet {
        name: Name<'a>,
        value: Text<'a>,
        number: Option<u8>,
    },
    OptionGet {
        name: Name<'a>,
    },
    Enabled {
        out: Out,
    },
    SetLog {
        on: bool,
    },
    Create {
        model: u8,
        out: Out,
    },
    Free {
        ctx: Handle,
    },
    ModelFree {
        model: u8,
    },
    Offer {
        ctx: Handle,
        layer: Offered,
    },
    Router {
        ctx: Handle,
        il: i32,
        bytes: Option<&'a [u8]>,
        huge: bool,
    },
    Skip {
        ctx: Handle,
        il: i32,
        reason: Text<'a>,
    },
    Activate {
        ctx: Handle,
        n_threads: i32,
        name: Text<'a>,
        out: Out,
    },
    Find {
        ctx: Handle,
        weights: u8,
    },
    MaxTokens {
        ctx: Handle,
    },
    GetSlots {
        ctx: Handle,
        layer: i32,
        out: Out,
    },
    OpData {
        ctx: Handle,
        layer: i32,
    },
    /// A whole step, as the bridge and ggml make it.
    Step {
        ctx: Handle,
        n_tokens: u8,
        seed: u8,
        sequences: bool,
    },
    StepBegin {
        ctx: Handle,
        n_tokens: u32,
        out: Out,
        misaligned: bool,
    },
    StepWork {
        ctx: Handle,
    },
    PromptRouted {
        ctx: Handle,
        layer: i32,
        ids: Option<Vec<i32>>,
        misaligned: bool,
        huge: bool,
    },
    StepEnd {
        ctx: Handle,
    },
    GetStats {
        ctx: Handle,
        out: Out,
    },
    ResetStats {
        ctx: Handle,
    },
    Texts {
        ctx: Handle,
    },
    GraphVersion {
        ctx: Handle,
    },
    Observes {
        ctx: Handle,
        n_tokens: u32,
    },
    Links {
        ctx: Handle,
        n_tokens: u32,
    },
    GiveBack {
        device: Text<'a>,
        bytes: usize,
    },
    Http {
        request: Request<'a>,
        out: Out,
    },
    /// Steps of one token, which may find that slots do not pay.
    Decode {
        ctx: Handle,
        n: u8,
    },
    /// A step during which settings change, and another context computes.
    Meanwhile {
        ctx: Handle,
        other: Handle,
        n_tokens: u8,
        seed: u8,
        settings: Settings<'a>,
    },
}

/// A layer of a pool, as it was offered.
#[derive(Clone, Copy)]
pub(super) struct Wired {
    pub weights: usize,
    pub il: i32,
    pub n_expert: usize,
    pub n_used: usize,
    max_tokens: u32,
}

impl Wired {
    /// Elements of an expert by matrix, which those have in common that share slots.
    fn shape(&self) -> [usize; 3] {
        let w = &WEIGHTS[self.weights];
        [&w.gate, &w.up, &w.down].map(|m| m.len() / MAX_EXPERTS)
    }

    pub fn expert_bytes(&self) -> usize {
        self.shape().iter().sum::<usize>() * size_of::<f32>()
    }
}

/// Layers that share slots.
pub(super) struct Class {
    pub layers: Vec<usize>,
    /// Experts of all of them.
    pub n_keys: usize,
    /// Slots that it has; `None` when a step ran while they were changed: then it is known at the next change.
    pub open: Option<usize>,
    /// A context was told that all experts have their slots for good.
    pub resident: bool,
}

/// What the model knows of a pool.
pub(super) struct Pool {
    pub layers: Vec<Wired>,
    /// One of them is on a GPU that is not there.
    on_device: bool,
    pub active: Option<bool>,
    contexts: usize,
    /// Of those below it is made on activation.
    pub classes: Vec<Class>,
    pub name: String,
    pub interval: u32,
    pub policy: PolicySpec,
    pub frozen: bool,
    /// No context can find that slots do not pay.
    pub always: bool,
}

impl Pool {
    fn new(config: &Config) -> Self {
        Pool {
            layers: Vec::new(),
            on_device: false,
            active: None,
            contexts: 0,
            classes: Vec::new(),
            name: String::new(),
            interval: config.rebalance_interval,
            policy: config.policy_of(false),
            frozen: false,
            always: config.auto_off != AutoOff::On,
        }
    }

    /// Groups the layers, with the slots that `config` asks for.
    fn activate(&mut self, config: &Config, name: &str) {
        self.name = name.into();
        for layer in 0..self.layers.len() {
            let shape = self.layers[layer].shape();
            match self.classes.iter_mut().find(|c| self.layers[c.layers[0]].shape() == shape) {
                Some(class) => class.layers.push(layer),
                None => {
                    self.classes.push(Class { layers: vec![layer], n_keys: 0, open: None, resident: false })
                }
            }
        }
        for class in &mut self.classes {
            let experts = || class.layers.iter().map(|l| self.layers[*l].n_expert);
            class.n_keys = experts().sum();
            let each = config.slots_of(experts().max().unwrap_or(0) as u32) as usize;
            let open = class.n_keys.min(each * class.layers.len());
            class.open = Some(open);
            class.resident = open == class.n_keys;
        }
    }

    pub fn class_of(&self, layer: usize) -> &Class {
        self.classes.iter().find(|c| c.layers.contains(&layer)).expect("each layer has one")
    }

    /// Where the experts of a layer begin among those of its class.
    fn first(&self, layer: usize) -> usize {
        let members = &self.class_of(layer).layers;
        members.iter().take_while(|l| **l != layer).map(|l| self.layers[*l].n_expert).sum()
    }

    /// Slots of all classes, where they are known.
    pub fn open(&self) -> Option<usize> {
        self.classes.iter().map(|c| c.open).sum()
    }
}

/// What the model knows of a live context.
struct Context {
    key: u8,
    pool: usize,
    active: bool,
    /// By layer, since activation: where its experts are that have their slots for good.
    resident: Vec<Option<usize>>,
    /// Tokens of the hot step that runs.
    begun: Option<u64>,
    /// Hits and misses since the last reset.
    uses: u64,
    /// Of its graphs. Odd: slots are not used for now.
    version: u64,
    /// Its last step was of one token.
    decoded: bool,
}

unsafe extern "C" fn receive(_level: i32, text: *const c_char, user_data: *mut c_void) {
    assert_eq!(user_data as usize, 7);
    // SAFETY: the library gives a string.
    assert!(unsafe { CStr::from_ptr(text) }.to_bytes().starts_with(b"moe-hot: "));
}

/// The model: what the library must know.
#[derive(Default)]
pub(super) struct World {
    options: Options,
    pub pools: Vec<(Config, Pool)>,
    /// Pool by the address of its model.
    pub models: BTreeMap<u8, usize>,
    given: Vec<usize>,
    live: BTreeMap<usize, Context>,
    decoded: u32,
    /// Bytes of reasons for layers that are skipped, which answers have again.
    pub reasons: usize,
    /// Who changes a size while a step runs waits in vain for two seconds: once is enough.
    pub waited: bool,
}

/// Something with an address.
static ADDRESS: [u64; 2] = [0; 2];

pub(super) fn c_string(text: Text<'_>) -> Option<CString> {
    let text = text?;
    let end = text.iter().position(|b| *b == 0).unwrap_or(text.len());
    Some(CString::new(&text[..end]).expect("it ends at the first zero byte"))
}

pub(super) fn pointer(text: &Option<CString>) -> *const c_char {
    text.as_ref().map_or(ptr::null(), |t| t.as_ptr())
}

pub(super) fn utf8(text: &Option<CString>) -> Option<&str> {
    text.as_ref()?.to_str().ok()
}

/// Where an answer of type `T` goes.
pub(super) fn place<T>(out: Out, at: &mut [T; 2]) -> *mut T {
    match out {
        Out::Valid => at.as_mut_ptr(),
        Out::Null => ptr::null_mut(),
        // one byte later; of a type without an alignment that is still valid
        Out::Misaligned => at.as_mut_ptr().wrapping_byte_add(1),
    }
}

pub(super) fn usable<T>(out: Out) -> bool {
    out == Out::Valid || (out == Out::Misaligned && align_of::<T>() == 1)
}

fn error() -> String {
    // SAFETY: valid until the next call fails.
    unsafe { CStr::from_ptr(moe_hot_error()) }.to_str().expect("messages are UTF-8").to_string()
}

#[track_caller]
pub(super) fn expect(status: moe_hot_status, expected: moe_hot_status) {
    assert_eq!(status, expected, "last error: {}", error());
    assert!(status == MOE_HOT_OK || !error().is_empty());
}

pub(super) fn check(ok: bool) -> moe_hot_status {
    if ok { MOE_HOT_OK } else { MOE_HOT_INVALID_ARGUMENT }
}

/// Runs the calls, then frees what is left.
pub fn run(data: &[u8]) {
    let Ok(calls) = Vec::<Call>::arbitrary_take_rest(Unstructured::new(data)) else { return };
    // the options and what the view shows are the process's
    let mut other = http::alone();
    other.take();
    let mut world = World::default();
    for call in calls.into_iter().take(MAX_CALLS) {
        world.call(call);
    }
}

impl Drop for World {
    fn drop(&mut self) {
        if std::thread::panicking() {
            return;
        }
        for handle in self.given.clone() {
            self.free(handle);
        }
        for model in self.models.keys() {
            moe_hot_model_free(model_address(*model));
        }
        for (name, _) in OPTIONS {
            let name = CString::new(name).expect("no zero byte");
            // SAFETY: a string.
            expect(unsafe { moe_hot_option_set(name.as_ptr(), ptr::null()) }, MOE_HOT_OK);
        }
        // SAFETY: none is called.
        unsafe { moe_hot_set_log(None, ptr::null_mut()) };
    }
}

fn model_address(model: u8) -> *const c_void {
    // any address names a model; 0 none
    ptr::without_provenance(usize::from(model % 4) * 64)
}

impl World {
    fn handle(&self, handle: Handle) -> usize {
        match handle {
            Handle::Null => 0,
            Handle::Given(i) if self.given.is_empty() => usize::from(i) << 20,
            Handle::Given(i) => self.given[usize::from(i) % self.given.len()],
            Handle::Address(odd) => ADDRESS.as_ptr().addr() + usize::from(odd),
            Handle::Number(n) => n,
        }
    }

    fn config(&self) -> Result<Config, ()> {
        self.options.snapshot(|_| None).map_err(|_| ())
    }

    /// The step of a context that runs ends.
    fn close(&mut self, handle: usize) {
        let Some(ctx) = self.live.get_mut(&handle) else { return };
        if let Some(n_tokens) = ctx.begun.take() {
            let layers = &self.pools[ctx.pool].1.layers;
            let resident = layers.iter().zip(&ctx.resident).filter(|(_, first)| first.is_some());
            ctx.uses += n_tokens * resident.map(|(l, _)| l.n_used as u64).sum::<u64>();
        }
    }

    fn free(&mut self, handle: usize) {
        // SAFETY: no node of it is run later.
        unsafe { moe_hot_context_free(ptr::without_provenance_mut(handle)) };
        let Some(ctx) = self.live.remove(&handle) else { return };
        if self.models.get(&ctx.key) == Some(&ctx.pool) {
            self.pools[ctx.pool].1.contexts -= 1;
        }
    }

    fn max_tokens(&self, ctx: &Context) -> u32 {
        let pool = &self.pools[ctx.pool].1;
        if pool.active != Some(true) {
            return cuda::MAX_TOKENS;
        }
        if ctx.version % 2 == 1 {
            return 0;
        }
        self.most_tokens(ctx.pool)
    }

    /// Largest ubatch of the hot path while slots are used.
    fn most_tokens(&self, pool: usize) -> u32 {
        let (config, pool) = &self.pools[pool];
        let limits = pool.layers.iter().map(|l| l.max_tokens).filter(|n| *n > 0);
        limits.chain(config.pp_bypass).chain([host::MAX_TOKENS]).min().expect("at least one")
    }

    /// Whether a step of the pool runs.
    pub fn runs(&self, pool: usize) -> bool {
        self.live.values().any(|c| c.pool == pool && c.begun.is_some())
    }

    #[allow(clippy::too_many_lines)]
    fn call(&mut self, call: Call<'_>) {
        match call {
            Call::OptionSet { name, value, number } => self.option_set(&name, value, number),
            Call::OptionGet { name } => {
                let name = option_name(&name);
                // SAFETY: a string or null.
                let value = unsafe { moe_hot_option_get(pointer(&name)) };
                let expected = utf8(&name).and_then(|n| self.options.get(n, |_| None).ok());
                // SAFETY: valid until the next text.
                let value = (!value.is_null()).then(|| unsafe { CStr::from_ptr(value) }.to_str().unwrap());
                assert_eq!(value, expected.as_deref());
            }
            Call::Enabled { out } => {
                let mut at = [false; 2];
                // SAFETY: a place of that type, or null.
                let status = unsafe { moe_hot_enabled(place(out, &mut at)) };
                expect(status, check(usable::<bool>(out)));
                if usable::<bool>(out) {
                    assert_eq!(at.contains(&true), self.config().unwrap().enabled());
                }
                let mut bytes = [u64::MAX; 2];
                // SAFETY: a place of that type, or null.
                let status = unsafe { moe_hot_wanted(1 << 20, 64, place(out, &mut bytes)) };
                expect(status, check(usable::<u64>(out)));
                if usable::<u64>(out) {
                    assert_eq!(bytes, [self.config().unwrap().wanted(1 << 20, 64), u64::MAX]);
                }
            }
            Call::SetLog { on } => {
                let f = on.then_some(receive as _);
                // SAFETY: it stands any call.
                unsafe { moe_hot_set_log(f, ptr::without_provenance_mut(7)) };
            }
            Call::Create { model, out } => self.create(model % 4, out),
            Call::Free { ctx } => self.free(self.handle(ctx)),
            Call::ModelFree { model } => {
                moe_hot_model_free(model_address(model));
                self.models.remove(&(model % 4));
            }
            Call::Offer { ctx, layer } => self.offer(self.handle(ctx), layer),
            Call::Router { ctx, il, bytes, huge } => {
                let ctx = self.handle(ctx);
                let data = bytes.map_or(ptr::null(), <[u8]>::as_ptr);
                let n = if huge { usize::MAX } else { bytes.map_or(0, <[u8]>::len) };
                // SAFETY: as many bytes as said, or more than there can be.
                let status = unsafe { moe_hot_router(handle(ctx), il, data.cast(), n) };
                expect(status, check(self.live.contains_key(&ctx) && bytes.is_some() && !huge));
            }
            Call::Skip { ctx, il, reason } => {
                let ctx = self.handle(ctx);
                let reason = c_string(reason);
                self.reasons += reason.as_ref().map_or(0, |r| r.count_bytes());
                // SAFETY: a string or null.
                let status = unsafe { moe_hot_skip(handle(ctx), il, pointer(&reason)) };
                expect(status, check(self.live.contains_key(&ctx) && utf8(&reason).is_some()));
            }
            Call::Activate { ctx, n_threads, name, out } => {
                self.activate(self.handle(ctx), n_threads, &c_string(name), out);
            }
            Call::Find { ctx, weights } => {
                let ctx = self.handle(ctx);
                let weights = usize::from(weights) % WEIGHTS.len();
                let down = WEIGHTS[weights].down.as_ptr();
                // SAFETY: an address.
                let found = unsafe { moe_hot_find(handle(ctx), down.cast()) };
                let layer = self
                    .live
                    .get(&ctx)
                    .filter(|c| c.active)
                    .and_then(|c| self.pools[c.pool].1.layers.iter().position(|l| l.weights == weights));
                assert_eq!(found, layer.map_or(-1, |l| l as i32));
            }
            Call::MaxTokens { ctx } => {
                let ctx = self.handle(ctx);
                // SAFETY: a handle.
                let n = unsafe { moe_hot_max_tokens(handle(ctx)) };
                assert_eq!(n, self.live.get(&ctx).map_or(0, |c| self.max_tokens(c)));
            }
            Call::GetSlots { ctx, layer, out } => self.get_slots(self.handle(ctx), layer, out),
            Call::OpData { ctx, layer } => {
                let ctx = self.handle(ctx);
                // SAFETY: a handle.
                let op = unsafe { moe_hot_op_data(handle(ctx), layer) };
                assert_eq!(!op.is_null(), self.layer(ctx, layer).is_some());
            }
            Call::Step { ctx, n_tokens, seed, sequences } => {
                self.step(self.handle(ctx), 1 + n_tokens % 9, seed, sequences, None);
            }
            Call::StepBegin { ctx, n_tokens, out, misaligned } => {
                let sequences = vec![3u64; if n_tokens > 64 { 0 } else { n_tokens as usize + 1 }];
                // longer than an address space has room for, or as long as said
                let at = match (sequences.is_empty(), misaligned) {
                    (true, _) => ptr::null(),
                    (false, shift) => sequences.as_ptr().cast::<i32>().wrapping_byte_add(usize::from(shift)),
                };
                let legal = sequences.is_empty() || !misaligned;
                self.step_begin(self.handle(ctx), n_tokens, at, legal, out);
            }
            Call::StepWork { ctx } => {
                let ctx = self.handle(ctx);
                // SAFETY: a handle.
                expect(unsafe { moe_hot_step_work(handle(ctx)) }, check(self.live.contains_key(&ctx)));
            }
            Call::PromptRouted { ctx, layer, ids, misaligned, huge } => {
                let ctx = self.handle(ctx);
                let n = ids.as_ref().map_or(0, Vec::len);
                let mut room = ids.clone().unwrap_or_default();
                room.push(0);
                let at = ids.as_ref().map_or(ptr::null(), |_| room.as_ptr());
                let at = if misaligned { at.wrapping_byte_add(1) } else { at };
                let n = if huge { usize::MAX } else { n };
                // SAFETY: as many ids as said, or more than there can be.
                let status = unsafe { moe_hot_prompt_routed(handle(ctx), layer, at, n) };
                let legal = self.layer(ctx, layer).is_some() && ids.is_some() && !misaligned && !huge;
                let inactive = self.live.get(&ctx).is_some_and(|c| !c.active);
                expect(status, check(legal || inactive));
            }
            Call::StepEnd { ctx } => {
                let ctx = self.handle(ctx);
                // SAFETY: a handle.
                expect(unsafe { moe_hot_step_end(handle(ctx)) }, check(self.live.contains_key(&ctx)));
                self.close(ctx);
            }
            Call::GetStats { ctx, out } => self.get_stats(self.handle(ctx), out),
            Call::ResetStats { ctx } => {
                let ctx = self.handle(ctx);
                // SAFETY: a handle.
                expect(unsafe { moe_hot_reset_stats(handle(ctx)) }, check(self.live.contains_key(&ctx)));
                if let Some(ctx) = self.live.get_mut(&ctx) {
                    ctx.uses = 0;
                }
            }
            Call::Texts { ctx } => {
                let ctx = self.handle(ctx);
                let active = self.live.get(&ctx).is_some_and(|c| c.active);
                for text in [moe_hot_status_text, moe_hot_summary] {
                    // SAFETY: a handle.
                    let text = unsafe { text(handle(ctx)) };
                    assert_eq!(!text.is_null(), active);
                    // SAFETY: valid until the next text.
                    assert!(!active || !unsafe { CStr::from_ptr(text) }.to_str().unwrap().is_empty());
                }
            }
            Call::GraphVersion { ctx } => {
                let ctx = self.handle(ctx);
                // SAFETY: a handle.
                let version = unsafe { moe_hot_graph_version(handle(ctx)) };
                assert_eq!(version, self.live.get(&ctx).map_or(0, |c| c.version));
            }
            Call::Observes { ctx, n_tokens } => {
                let ctx = self.handle(ctx);
                // SAFETY: a handle.
                let observes = unsafe { moe_hot_observes(handle(ctx), n_tokens) };
                let Some(c) = self.live.get(&ctx).filter(|c| c.active) else { return assert!(!observes) };
                let prompt = self.pools[c.pool].1.always || n_tokens > self.most_tokens(c.pool);
                // between two trials nothing is worth knowing
                assert!(observes == prompt || (c.version % 2 == 1 && !observes));
            }
            Call::Links { ctx, n_tokens } => {
                let ctx = self.handle(ctx);
                // SAFETY: a handle.
                let links = unsafe { moe_hot_links(handle(ctx), n_tokens) };
                assert!(links, "in host memory there is no link to do without");
            }
            Call::GiveBack { device, bytes } => {
                let device = c_string(device);
                // SAFETY: a string or null.
                let given = unsafe { moe_hot_give_back(pointer(&device), bytes) };
                assert!(!given, "there are no slots on a device");
            }
            Call::Http { request, out } => self.http(&request, out),
            Call::Decode { ctx, n } => {
                let ctx = self.handle(ctx);
                for _ in 0..u32::from(n) * 3 {
                    if self.decoded == MAX_DECODED {
                        return;
                    }
                    self.decoded += 1;
                    self.token(ctx);
                }
            }
            Call::Meanwhile { ctx, other, n_tokens, seed, settings } => {
                let (ctx, other) = (self.handle(ctx), self.handle(other));
                let pool = |ctx: &usize| self.live.get(ctx).filter(|c| c.active).map(|c| c.pool);
                if ctx == other || pool(&ctx).is_none() || pool(&ctx) != pool(&other) {
                    return;
                }
                self.step(ctx, 1 + n_tokens % 7, seed, false, Some((other, &settings)));
            }
        }
    }

    /// A step of one token without its nodes.
    fn token(&mut self, ctx: usize) {
        self.step_begin(ctx, 1, ptr::null(), true, Out::Valid);
        let live = check(self.live.contains_key(&ctx));
        // SAFETY: a handle.
        expect(unsafe { moe_hot_step_work(handle(ctx)) }, live);
        // SAFETY: a handle.
        expect(unsafe { moe_hot_step_end(handle(ctx)) }, live);
        self.close(ctx);
    }

    /// Layer `layer` of an active context.
    fn layer(&self, ctx: usize, layer: i32) -> Option<Wired> {
        let ctx = self.live.get(&ctx).filter(|c| c.active)?;
        self.pools[ctx.pool].1.layers.get(usize::try_from(layer).ok()?).copied()
    }

    /// A model of three layers in two classes, with half of their experts in slots; its context.
    pub fn small_model(&mut self) -> usize {
        self.option("moe-hot-k", "4");
        self.option("moe-hot-threads", "1");
        self.create(1, Out::Valid);
        let ctx = self.given[0];
        for weights in [0, 1, 3] {
            let broken = Broken::Whole;
            self.offer(ctx, Offered { weights, few_experts: false, n_used: 1, max_tokens: 0, broken });
        }
        self.activate(ctx, 1, &c_string(Some(b"small")), Out::Valid);
        ctx
    }

    /// Sets an option that is there to what is allowed.
    pub fn option(&mut self, name: &str, value: &str) {
        self.option_set(&Name::Other(Some(name.as_bytes())), Some(value.as_bytes()), None);
    }

    fn option_set(&mut self, name: &Name<'_>, value: Text<'_>, number: Option<u8>) {
        let name = option_name(name);
        let number = number.map(|n| n.to_string());
        let mut value = c_string(number.as_ref().map(String::as_bytes).or(value));
        // what would reach the file system or start hundreds of threads is one of a few values
        let among: &[&str] = match utf8(&name) {
            Some("moe-hot-profile" | "moe-hot-profile-out" | "moe-hot-trace") => &["", "/nowhere/file"],
            // more than all experts here
            Some("moe-hot-vram") => &["0", "1", "many"],
            Some("moe-hot-threads") => &["0", "1", "2", "auto", "-1", "513"],
            _ => &[],
        };
        if let (Some(v), false) = (&value, among.is_empty()) {
            let at = v.as_bytes().iter().map(|b| usize::from(*b)).sum::<usize>() % among.len();
            value = Some(CString::new(among[at]).expect("no zero byte"));
        }
        // SAFETY: strings or null.
        let status = unsafe { moe_hot_option_set(pointer(&name), pointer(&value)) };
        let legal = match (utf8(&name), &value) {
            (None, _) => false,
            (Some(name), None) => self.options.set(name, None).is_ok(),
            (Some(name), Some(v)) => v.to_str().is_ok_and(|v| self.options.set(name, Some(v)).is_ok()),
        };
        expect(status, check(legal));
    }

    fn create(&mut self, model: u8, out: Out) {
        let mut at = [ptr::without_provenance_mut(1); 2];
        // SAFETY: a place of that type, or null.
        let status = unsafe { moe_hot_context_create(model_address(model), place(out, &mut at)) };
        let legal = out == Out::Valid && model > 0;
        expect(status, check(legal));
        if !legal {
            assert!(out != Out::Valid || at[0].is_null());
            return;
        }
        let config = self.config().unwrap();
        let pools = &mut self.pools;
        let pool = self.models.entry(model).or_insert(usize::MAX);
        // one that nobody uses is made anew for other options
        if pools.get(*pool).is_none_or(|(c, p)| p.contexts == 0 && *c != config) {
            *pool = pools.len();
            let pool = Pool::new(&config);
            pools.push((config, pool));
        }
        pools[*pool].1.contexts += 1;
        let handle = at[0].addr();
        assert!(!self.given.contains(&handle), "a handle is never given twice");
        self.given.push(handle);
        let ctx = Context {
            key: model,
            pool: *pool,
            active: false,
            resident: Vec::new(),
            begun: None,
            uses: 0,
            version: 0,
            decoded: false,
        };
        self.live.insert(handle, ctx);
    }

    fn offer(&mut self, ctx: usize, o: Offered) {
        let weights = usize::from(o.weights) % WEIGHTS.len();
        let w = &WEIGHTS[weights];
        let n_expert = if o.few_experts { 4 } else { MAX_EXPERTS };
        let n_used = 1 + usize::from(o.n_used) % 4;
        let max_tokens = u32::from(o.max_tokens % 12);
        let matrix = |data: &[f32], n_in: usize| {
            // SAFETY: null pointers and zeros are values of all its fields.
            let mut m: moe_hot_matrix = unsafe { zeroed() };
            if !data.is_empty() {
                m.data = data.as_ptr().cast();
            }
            m.n_in = n_in as i64;
            m.n_out = (data.len() / MAX_EXPERTS / n_in) as i64;
            m.row_bytes = n_in * size_of::<f32>();
            m.expert_bytes = data.len() / MAX_EXPERTS * size_of::<f32>();
            m.vec_dot = Some(vec_dot);
            m.act_row_bytes = m.row_bytes;
            m
        };
        let mut layer = moe_hot_layer {
            il: weights as i32,
            n_expert: n_expert as i32,
            n_used: n_used as i32,
            gate: matrix(&w.gate, N_EMBD),
            up: matrix(&w.up, N_EMBD),
            down: matrix(&w.down, w.n_ff),
            merged: w.merged,
            activation: w.activation as i32,
            gated: Some(swiglu),
            unary: Some(unary),
            device: ptr::null(),
            max_tokens,
        };
        let mut legal = false;
        match o.broken {
            Broken::Whole => legal = true,
            Broken::NullDescription | Broken::MisalignedDescription => {}
            Broken::NoUp => layer.up.data = ptr::null(),
            Broken::NoDown => layer.down.data = ptr::null(),
            Broken::NoDot => layer.down.vec_dot = None,
            Broken::NoFunction => {
                (layer.gated, layer.unary) = (None, None);
                legal = w.activation == MOE_HOT_RELU_SQR;
            }
            Broken::Gate if w.gate.is_empty() => layer.gate = layer.up,
            Broken::Gate => layer.gate.data = ptr::null(),
            Broken::UnknownActivation(a) => layer.activation = if (0..3).contains(&a) { 3 } else { a },
            Broken::Index(il) => {
                layer.il = il;
                legal = u16::try_from(il).is_ok();
            }
            Broken::Experts(n) => layer.n_expert = if n >= n_used as i32 { n | 1 << 16 } else { n },
            Broken::Used(n) => layer.n_used = if n > 0 { n.max(n_expert as i32 + 1) } else { n },
            Broken::RowsIn(n) => {
                layer.up.n_in = n;
                legal = n == N_EMBD as i64;
            }
            Broken::RowsOut(n) => {
                layer.down.n_out = n;
                legal = n == N_EMBD as i64;
            }
            Broken::RowBytes(n) => {
                layer.down.row_bytes = n;
                legal = n == w.n_ff * size_of::<f32>();
            }
            Broken::ExpertBytes(n) => {
                layer.down.expert_bytes = n;
                legal = n == N_EMBD * w.n_ff * size_of::<f32>();
            }
            Broken::Huge => {
                layer.down.row_bytes = isize::MAX as usize / N_EMBD;
                layer.down.expert_bytes = layer.down.row_bytes * N_EMBD;
            }
            Broken::Device => {
                layer.device = c"ffff:ff:1f.7".as_ptr();
                legal = true;
            }
            Broken::NotUtf8 => layer.device = c"\xff".as_ptr(),
        }
        let at = match o.broken {
            Broken::NullDescription => ptr::null(),
            Broken::MisalignedDescription => ptr::from_ref(&layer).wrapping_byte_add(1),
            _ => &layer,
        };
        // SAFETY: what it describes is there, or it is refused before anything is read.
        let status = unsafe { moe_hot_offer(handle(ctx), at) };
        let Some(ctx) = self.live.get(&ctx) else { return expect(status, MOE_HOT_INVALID_ARGUMENT) };
        expect(status, check(legal));
        let pool = &mut self.pools[ctx.pool].1;
        let known = pool.layers.iter().any(|l| l.weights == weights);
        if legal && !known && pool.active.is_none() {
            pool.layers.push(Wired { weights, il: layer.il, n_expert, n_used, max_tokens });
            pool.on_device |= matches!(o.broken, Broken::Device);
        }
    }

    fn activate(&mut self, ctx: usize, n_threads: i32, name: &Option<CString>, out: Out) {
        let mut at = [false; 2];
        // SAFETY: a string or null; a place of that type, or null.
        let status = unsafe { moe_hot_activate(handle(ctx), n_threads, pointer(name), place(out, &mut at)) };
        let id = ctx;
        let (Some(ctx), true) = (self.live.get_mut(&ctx), usable::<bool>(out)) else {
            return expect(status, MOE_HOT_INVALID_ARGUMENT);
        };
        if ctx.active {
            return expect(status, MOE_HOT_STATE);
        }
        expect(status, check(name.is_some()));
        let (config, pool) = &mut self.pools[ctx.pool];
        if let Some(name) = name {
            let can =
                config.enabled() && !pool.layers.is_empty() && !pool.on_device && config.trace.is_none();
            if pool.active.is_none() && can {
                pool.activate(config, &name.to_string_lossy());
            }
            ctx.active = *pool.active.get_or_insert(can);
        }
        assert_eq!(at.contains(&true), ctx.active);
        if ctx.active {
            self.learn_residents(id);
        }
    }

    /// Which layers have all their experts in slots for good is told when a context gets active.
    fn learn_residents(&mut self, id: usize) {
        let ctx = self.live.get_mut(&id).expect("it is active");
        let pool = &mut self.pools[ctx.pool].1;
        for layer in 0..pool.layers.len() {
            let resident = slots(id, layer).resident;
            let first = pool.first(layer);
            let class = pool.classes.iter_mut().find(|c| c.layers.contains(&layer)).expect("each has one");
            // slots that came later may have got the experts in their order, or not
            let may = class.open.is_none_or(|open| open == class.n_keys);
            assert!(resident == -1 && !class.resident || resident == first as i32 && may);
            class.resident = resident >= 0;
            if class.resident {
                class.open = Some(class.n_keys);
            }
            ctx.resident.push(class.resident.then_some(first));
        }
    }

    fn get_slots(&mut self, ctx: usize, layer: i32, out: Out) {
        // SAFETY: null pointers and zeros are values of all its fields.
        let mut at: [moe_hot_slots; 2] = unsafe { zeroed() };
        // SAFETY: a place of that type, or null.
        let status = unsafe { moe_hot_get_slots(handle(ctx), layer, place(out, &mut at)) };
        let wired = self.layer(ctx, layer).filter(|_| out == Out::Valid);
        expect(status, check(wired.is_some()));
        let Some(wired) = wired else { return };
        let ctx = &self.live[&ctx];
        let n_slots = self.pools[ctx.pool].1.class_of(layer as usize).n_keys as u32;
        let resident = ctx.resident[layer as usize];
        let [slots, _] = at;
        assert_eq!((slots.n_slots, slots.on_device), (n_slots, false));
        assert_eq!(slots.resident, resident.map_or(-1, |first| first as i32));
        let matrices: Vec<_> = WEIGHTS[wired.weights].matrices().collect();
        assert_eq!(slots.n_matrices as usize, matrices.len());
        for (i, m) in matrices.iter().enumerate() {
            assert_eq!(slots.bytes[i], size_of_val(*m) / MAX_EXPERTS * n_slots as usize);
            assert!(!slots.data[i].is_null() && slots.link[i].is_null());
        }
    }

    fn step_begin(
        &mut self,
        ctx: usize,
        n_tokens: u32,
        sequences: *const i32,
        legal: bool,
        out: Out,
    ) -> bool {
        let mut at = [false; 2];
        // SAFETY: a sequence for each token, or null; a place of that type, or null.
        let status = unsafe { moe_hot_step_begin(handle(ctx), n_tokens, sequences, place(out, &mut at)) };
        let usable = usable::<bool>(out);
        let active = self.live.get(&ctx).map(|c| c.active);
        let ok = usable && active.is_some_and(|active| legal || !active);
        expect(status, check(ok));
        let hot = at.contains(&true);
        if ok {
            let ctx_now = &self.live[&ctx];
            assert_eq!(hot, ctx_now.active && n_tokens <= self.max_tokens(ctx_now));
            self.close(ctx);
            self.judge(ctx, n_tokens == 1);
            if let Some(ctx) = self.live.get_mut(&ctx).filter(|_| hot) {
                ctx.begun = Some(n_tokens.into());
            }
        } else {
            assert!(!hot);
        }
        hot
    }

    /// Graphs must be built anew only where a context finds out whether slots pay: when one decoded token follows another.
    fn judge(&mut self, id: usize, decodes: bool) {
        let ctx = self.live.get_mut(&id).expect("a step of it begins");
        // SAFETY: a handle.
        let version = unsafe { moe_hot_graph_version(handle(id)) };
        let may = decodes && ctx.decoded && ctx.active && !self.pools[ctx.pool].1.always;
        assert!(version == ctx.version || (may && version == ctx.version + 1));
        (ctx.version, ctx.decoded) = (version, decodes);
    }

    /// All of a step; the rows are those that the experts give, the slots hold what they should. `meanwhile`: once the
    /// first layer has its slots, settings change and another context decodes.
    pub fn step(
        &mut self,
        ctx: usize,
        n_tokens: u8,
        seed: u8,
        sequences: bool,
        mut meanwhile: Option<(usize, &Settings<'_>)>,
    ) {
        let ids_of: Vec<i32> = (0..n_tokens).map(|t| i32::from(t % 3)).collect();
        let at = if sequences { ids_of.as_ptr() } else { ptr::null() };
        let hot = self.step_begin(ctx, n_tokens.into(), at, true, Out::Valid);
        let n_tokens = usize::from(n_tokens);
        let seed = usize::from(seed);
        let wired: Rc<[Wired]> = match self.live.get(&ctx).filter(|c| c.active) {
            Some(c) => self.pools[c.pool].1.layers.as_slice().into(),
            None => Rc::new([]),
        };
        for (layer, l) in wired.iter().enumerate() {
            let mut ids: Vec<i32> = Vec::new();
            for t in 0..n_tokens {
                ids.extend((0..l.n_used).map(|k| ((seed + 3 * t + k) % l.n_expert) as i32));
            }
            if hot {
                self.nodes(ctx, layer, *l, n_tokens, &mut ids, &mut meanwhile);
            } else {
                // SAFETY: as many ids.
                let status =
                    unsafe { moe_hot_prompt_routed(handle(ctx), layer as i32, ids.as_ptr(), ids.len()) };
                expect(status, MOE_HOT_OK);
            }
        }
        let live = check(self.live.contains_key(&ctx));
        // SAFETY: a handle.
        expect(unsafe { moe_hot_step_work(handle(ctx)) }, live);
        // SAFETY: a handle.
        expect(unsafe { moe_hot_step_end(handle(ctx)) }, live);
        self.close(ctx);
    }

    /// The nodes of a layer as ggml runs them, if the bridge would build them.
    fn nodes(
        &mut self,
        ctx: usize,
        layer: usize,
        l: Wired,
        n_tokens: usize,
        ids: &mut [i32],
        meanwhile: &mut Option<(usize, &Settings<'_>)>,
    ) {
        let slots = slots(ctx, layer);
        let w = &WEIGHTS[l.weights];
        let holds = |slot: usize, expert: usize| {
            for (data, m) in slots.data.iter().zip(w.matrices()) {
                let want = w.expert(m, expert);
                // SAFETY: the slot is in the memory, and nobody writes to one that a step may read.
                let got = unsafe {
                    std::slice::from_raw_parts(data.cast::<f32>().add(slot * want.len()), want.len())
                };
                assert!(got == want, "slot {slot} does not hold expert {expert}");
            }
        };
        assert_eq!(usize::try_from(slots.resident).ok(), self.live[&ctx].resident[layer]);
        if let Ok(first) = usize::try_from(slots.resident) {
            return ids.iter().for_each(|id| holds(first + *id as usize, *id as usize));
        }
        self.live.get_mut(&ctx).expect("it has layers").uses += ids.len() as u64;
        // SAFETY: a handle.
        let op = unsafe { moe_hot_op_data(handle(ctx), layer as i32) };
        let mut act: Vec<f32> =
            (0..n_tokens * N_EMBD).map(|i| ((i * 7 + layer) % 13) as f32 / 13.0 - 0.5).collect();
        let mut slot_ids = vec![i32::MIN; ids.len()];
        const LEFT_ALONE: f32 = 1e30;
        let mut out = vec![LEFT_ALONE; ids.len() * N_EMBD];
        let mut t_cur = tensor(&mut act, [N_EMBD, 1, n_tokens]);
        let mut t_ids = tensor(ids, [l.n_used, n_tokens, 1]);
        let mut t_slot = tensor(&mut slot_ids, [l.n_used, n_tokens, 1]);
        let mut t_out = tensor(&mut out, [N_EMBD, l.n_used, n_tokens]);
        (t_slot.src[0], t_slot.src[1]) = (&mut t_cur, &mut t_ids);
        (t_out.src[0], t_out.src[1]) = (&mut t_out, &mut t_slot);
        // SAFETY: nodes as the bridge builds them, with their data.
        unsafe { moe_hot_dispatch(&mut t_slot, 0, 1, op) };
        if let Some((other, settings)) = meanwhile.take() {
            self.set(settings);
            // what has ended there must not reach what is read here
            for _ in 0..3 {
                self.token(other);
            }
        }
        // SAFETY: as above.
        unsafe { moe_hot_join(&mut t_out, 0, 1, op) };
        for (row, (&expert, &slot)) in ids.iter().zip(&slot_ids).enumerate() {
            let got = &out[row * N_EMBD..][..N_EMBD];
            if slot < 0 {
                let x = &act[row / l.n_used * N_EMBD..][..N_EMBD];
                let want = w.output(expert as usize, x);
                let near = |(a, b): (&f32, &f32)| (a - b).abs() <= 1e-4 * (1.0 + b.abs());
                assert!(got.iter().zip(&want).all(near), "expert {expert}: {got:?}, not {want:?}");
                continue;
            }
            assert!(got.iter().all(|x| *x == LEFT_ALONE) && (slot as u32) < slots.n_slots);
            holds(slot as usize, expert as usize);
        }
    }

    fn get_stats(&mut self, ctx: usize, out: Out) {
        let mut at = [moe_hot_stats::default(), moe_hot_stats::default()];
        // SAFETY: a place of that type, or null.
        let status = unsafe { moe_hot_get_stats(handle(ctx), place(out, &mut at)) };
        let (Some(ctx), Out::Valid) = (self.live.get(&ctx), out) else {
            return expect(status, MOE_HOT_INVALID_ARGUMENT);
        };
        if !ctx.active {
            return expect(status, MOE_HOT_STATE);
        }
        expect(status, MOE_HOT_OK);
        let [stats, _] = at;
        let pool = &self.pools[ctx.pool].1;
        assert_eq!((stats.n_hits + stats.n_misses, stats.n_layers as usize), (ctx.uses, pool.layers.len()));
        if let Some(open) = pool.open() {
            assert_eq!((stats.n_slots as usize, stats.k as usize), (open, open / pool.layers.len()));
        }
    }
}

fn handle(ctx: usize) -> *mut moe_hot_context {
    ptr::without_provenance_mut(ctx)
}

/// The slots of a layer that is there.
fn slots(ctx: usize, layer: usize) -> moe_hot_slots {
    // SAFETY: null pointers and zeros are values of all its fields.
    let mut slots: moe_hot_slots = unsafe { zeroed() };
    // SAFETY: a place of that type.
    expect(unsafe { moe_hot_get_slots(handle(ctx), layer as i32, &mut slots) }, MOE_HOT_OK);
    slots
}

fn option_name(name: &Name<'_>) -> Option<CString> {
    match name {
        Name::Known(i) => c_string(Some(OPTIONS[usize::from(*i) % OPTIONS.len()].0.as_bytes())),
        Name::Other(text) => c_string(*text),
    }
}

/// A contiguous tensor of three dimensions.
fn tensor<T>(data: &mut [T], ne: [usize; 3]) -> ggml_tensor {
    // SAFETY: null pointers and zeros are values of all its fields.
    let mut t: ggml_tensor = unsafe { zeroed() };
    t.data = data.as_mut_ptr().cast();
    t.ne = [ne[0] as i64, ne[1] as i64, ne[2] as i64, 1];
    let size = size_of::<T>();
    t.nb = [size, size * ne[0], size * ne[0] * ne[1], size * ne[0] * ne[1] * ne[2]];
    t
}
