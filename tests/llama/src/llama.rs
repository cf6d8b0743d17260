//! libllama, as far as the tests need it.
//!
//! The options of the expert cache belong to the process, and so does the log. Whoever wants to use the
//! library therefore takes it [`Exclusive`]ly: models, contexts and options hang on that guard, so tests
//! that run in one process follow each other.

use std::{
    ffi::{CStr, CString, c_char, c_void},
    fmt::Display,
    marker::PhantomData,
    path::Path,
    ptr,
    sync::{
        Mutex, MutexGuard, OnceLock, PoisonError,
        atomic::{AtomicBool, Ordering},
    },
};

use crate::{paths, sys};

/// A line of the log.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Line {
    /// Severity by ggml's numbers: 1 debug, 2 info, 3 warning, 4 error.
    pub level: u32,
    /// The text, without its line end.
    pub text: String,
}

struct Log {
    lines: Vec<Line>,
    /// The last line has not ended yet.
    open: bool,
}

static LOG: Mutex<Log> = Mutex::new(Log { lines: Vec::new(), open: false });
static IN_USE: Mutex<()> = Mutex::new(());

fn log() -> MutexGuard<'static, Log> {
    LOG.lock().unwrap_or_else(PoisonError::into_inner)
}

unsafe extern "C" fn collect(level: sys::ggml_log_level, text: *const c_char, _user_data: *mut c_void) {
    // SAFETY: ggml passes a zero-terminated string.
    let text = unsafe { CStr::from_ptr(text) }.to_string_lossy();
    let mut log = log();
    for part in text.split_inclusive('\n') {
        if !log.open {
            log.lines.push(Line { level, text: String::new() });
        }
        log.open = !part.ends_with('\n');
        if let Some(last) = log.lines.last_mut() {
            last.text.push_str(part.trim_end_matches('\n'));
        }
    }
}

/// The loaded library.
pub struct Llama {
    api: sys::Llama,
}

impl Llama {
    /// The library of the build under test, loaded once a process.
    ///
    /// # Panics
    /// When there is no such library.
    pub fn get() -> &'static Llama {
        static LLAMA: OnceLock<Llama> = OnceLock::new();
        LLAMA.get_or_init(|| {
            let path = paths::build_dir().join("bin/libllama.so");
            assert!(path.is_file(), "{} is missing: run scripts/build first", path.display());
            // SAFETY: libllama's initialisers have no preconditions.
            let api = unsafe { sys::Llama::new(&path) };
            let api = api.unwrap_or_else(|e| panic!("cannot load {}: {e}", path.display()));
            // SAFETY: the callback lives as long as the process; the backend is initialised once.
            unsafe {
                api.llama_log_set(Some(collect), ptr::null_mut());
                api.llama_backend_init();
            }
            Llama { api }
        })
    }

    /// Whether it was built with the expert cache.
    pub fn has_moe_hot(&self) -> bool {
        // SAFETY: the function has no preconditions; it is called only if it is there.
        self.api.llama_moe_hot_supported.is_ok() && unsafe { self.api.llama_moe_hot_supported() }
    }

    /// The library for one test. Waits until no other test of the process has it.
    pub fn exclusive(&'static self) -> Exclusive {
        let guard = IN_USE.lock().unwrap_or_else(PoisonError::into_inner);
        let exclusive = Exclusive { api: &self.api, has_moe_hot: self.has_moe_hot(), _guard: guard };
        exclusive.off();
        exclusive.take_log();
        exclusive
    }
}

/// Options of the expert cache.
#[derive(Clone, Debug)]
pub struct Hot {
    /// Slots a layer.
    pub k: u32,
    /// Decoded tokens between two plans.
    pub interval: u32,
    /// What gets a slot.
    pub policy: &'static str,
    /// Threads beside ggml's own.
    pub workers: u32,
    /// Ubatches of more tokens take the stock graph.
    pub pp_bypass: Option<u32>,
}

impl Default for Hot {
    fn default() -> Self {
        Hot { k: 0, interval: 1, policy: "decay", workers: 0, pp_bypass: None }
    }
}

impl Display for Hot {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let Hot { k, interval, policy, workers, .. } = self;
        write!(f, "K {k}, interval {interval}, {policy}, {workers} workers")?;
        self.pp_bypass.map_or(Ok(()), |n| write!(f, ", bypass above {n} tokens"))
    }
}

/// The right to use the library, with all options at their defaults.
pub struct Exclusive {
    api: &'static sys::Llama,
    has_moe_hot: bool,
    _guard: MutexGuard<'static, ()>,
}

/// How a model is loaded.
#[derive(Clone, Copy, Default)]
pub struct LoadOptions {
    /// Lets ggml repack weights for its fastest kernels. Off by default: repacked weights give other last
    /// bits, and the cache keeps experts as they are.
    pub repack: bool,
    /// All layers on the GPU, their experts in host memory. The build must be one for CUDA.
    pub gpu: bool,
}

/// What `--cpu-moe` keeps in host memory.
const EXPERTS: &CStr = c"\\.ffn_(up|down|gate|gate_up)_exps";

impl Exclusive {
    /// Sets an option of the expert cache, `None`: back to the environment or the default.
    ///
    /// # Errors
    /// What the library says.
    pub fn set(&self, name: &str, value: Option<&str>) -> Result<(), String> {
        if !self.has_moe_hot {
            return Err("this build has no expert cache".into());
        }
        let name = CString::new(name).expect("no zero bytes");
        let value = value.map(|v| CString::new(v).expect("no zero bytes"));
        // SAFETY: both strings live through the call.
        let ok = unsafe {
            self.api
                .llama_moe_hot_set_option(name.as_ptr(), value.as_ref().map_or(ptr::null(), |v| v.as_ptr()))
        };
        if ok { Ok(()) } else { Err(self.error()) }
    }

    /// The value of an option in effect.
    ///
    /// # Errors
    /// What the library says.
    pub fn option(&self, name: &str) -> Result<String, String> {
        if !self.has_moe_hot {
            return Err("this build has no expert cache".into());
        }
        let name = CString::new(name).expect("no zero bytes");
        // SAFETY: the string lives through the call.
        let value = unsafe { self.api.llama_moe_hot_get_option(name.as_ptr()) };
        // SAFETY: null or valid until the next call on this thread.
        unsafe { text(value) }.ok_or_else(|| self.error())
    }

    /// What llama-server would answer: status and body.
    pub fn http(&self, method: &str, path: &str, body: &str) -> (i32, String) {
        let [method, path] = [method, path].map(|t| CString::new(t).expect("no zero bytes"));
        // SAFETY: the strings live through the call; the answer is valid until the next one on this thread.
        unsafe {
            let r = self.api.llama_moe_hot_http(
                method.as_ptr(),
                path.as_ptr(),
                body.as_ptr().cast(),
                body.len(),
                true,
            );
            (r.status, text(r.body).unwrap_or_default())
        }
    }

    fn error(&self) -> String {
        // SAFETY: as in `option`.
        unsafe { text(self.api.llama_moe_hot_error()) }.unwrap_or_default()
    }

    /// Sets all options.
    ///
    /// # Panics
    /// When one is refused.
    pub fn hot(&self, hot: &Hot) {
        for (name, value) in [
            ("moe-hot-k", hot.k.to_string()),
            ("moe-hot-rebalance-interval", hot.interval.to_string()),
            ("moe-hot-policy", hot.policy.into()),
            ("moe-hot-threads", hot.workers.to_string()),
            ("moe-hot-pp-bypass", hot.pp_bypass.map_or("auto".into(), |n| n.to_string())),
        ] {
            self.set(name, Some(&value)).unwrap_or_else(|e| panic!("{e}"));
        }
    }

    /// Takes all options back.
    pub fn off(&self) {
        if self.has_moe_hot {
            for name in [
                "k",
                "rebalance-interval",
                "policy",
                "threads",
                "link",
                "kernels",
                "pp-bypass",
                "profile",
                "profile-out",
                "trace",
            ] {
                self.set(&format!("moe-hot-{name}"), None).unwrap_or_else(|e| panic!("{e}"));
            }
        }
    }

    /// What was logged since the last call.
    pub fn take_log(&self) -> Vec<Line> {
        std::mem::take(&mut log().lines)
    }

    /// Loads a model.
    ///
    /// # Errors
    /// The end of the log.
    pub fn load(&self, path: &Path, options: LoadOptions) -> Result<Model<'_>, String> {
        let file = CString::new(path.to_str().expect("path is UTF-8")).expect("no zero bytes");
        let mut no_devices = [ptr::null_mut()];
        // SAFETY: the function has no preconditions.
        let mut params = unsafe { self.api.llama_model_default_params() };
        params.use_extra_bufts = options.repack;
        // SAFETY: the function has no preconditions.
        let host = unsafe { self.api.ggml_backend_cpu_buffer_type() };
        let experts = sys::llama_model_tensor_buft_override { pattern: EXPERTS.as_ptr(), buft: host };
        let end = sys::llama_model_tensor_buft_override { pattern: ptr::null(), buft: ptr::null_mut() };
        let overrides = [experts, end];
        if options.gpu {
            params.n_gpu_layers = 999;
            params.tensor_buft_overrides = overrides.as_ptr();
        } else {
            params.devices = no_devices.as_mut_ptr();
            params.n_gpu_layers = 0;
        }
        // SAFETY: what the parameters point to lives through the call.
        let model = unsafe { self.api.llama_model_load_from_file(file.as_ptr(), params) };
        if model.is_null() {
            return Err(format!("{} does not load: {}", path.display(), last_lines()));
        }
        // SAFETY: the model is valid.
        let n_vocab = unsafe { self.api.llama_vocab_n_tokens(self.api.llama_model_get_vocab(model)) };
        Ok(Model {
            api: self.api,
            has_moe_hot: self.has_moe_hot,
            model,
            n_vocab: n_vocab as usize,
            _use: PhantomData,
        })
    }
}

/// The string at `s`, if any.
///
/// # Safety
/// `s` is null or a zero-terminated string.
unsafe fn text(s: *const c_char) -> Option<String> {
    // SAFETY: the caller's.
    (!s.is_null()).then(|| unsafe { CStr::from_ptr(s) }.to_string_lossy().into_owned())
}

fn last_lines() -> String {
    let log = log();
    let lines: Vec<_> = log.lines.iter().filter(|l| l.level >= 3).map(|l| l.text.as_str()).collect();
    lines[lines.len().saturating_sub(5)..].join(" | ")
}

/// A loaded model.
pub struct Model<'a> {
    api: &'static sys::Llama,
    has_moe_hot: bool,
    model: *mut sys::llama_model,
    n_vocab: usize,
    _use: PhantomData<&'a Exclusive>,
}

// SAFETY: llama.cpp only reads a model once it is loaded; contexts of different threads may share it.
unsafe impl Sync for Model<'_> {}

/// A LoRA adapter of a model.
pub struct Adapter<'a> {
    adapter: *mut sys::llama_adapter_lora,
    _model: PhantomData<&'a ()>,
}

/// How a context is made.
#[derive(Clone, Copy, Debug)]
pub struct ContextOptions {
    /// Tokens of all sequences.
    pub n_ctx: u32,
    /// Most tokens of one graph.
    pub n_ubatch: u32,
    /// Most sequences.
    pub n_seq_max: u32,
    /// Whether sequences share the cells of one cache.
    pub kv_unified: bool,
    /// ggml's threads.
    pub n_threads: i32,
}

impl Default for ContextOptions {
    fn default() -> Self {
        ContextOptions { n_ctx: 1024, n_ubatch: 512, n_seq_max: 1, kv_unified: false, n_threads: 1 }
    }
}

impl Model<'_> {
    /// Tokens of the vocabulary, the length of a row of logits.
    pub fn n_vocab(&self) -> usize {
        self.n_vocab
    }

    /// The tokens of `text`.
    ///
    /// # Panics
    /// When the model has no tokeniser.
    pub fn tokens(&self, text: &str) -> Vec<i32> {
        let mut tokens = vec![0; text.len() + 8];
        // SAFETY: the buffers are as long as said.
        let n = unsafe {
            let vocab = self.api.llama_model_get_vocab(self.model);
            let (len, max) = (text.len() as i32, tokens.len() as i32);
            self.api.llama_tokenize(vocab, text.as_ptr().cast(), len, tokens.as_mut_ptr(), max, false, false)
        };
        tokens
            .truncate(usize::try_from(n).expect("the model has a tokeniser and the buffer is large enough"));
        tokens
    }

    /// Loads a LoRA adapter.
    ///
    /// # Errors
    /// The end of the log.
    pub fn adapter(&self, path: &Path) -> Result<Adapter<'_>, String> {
        let file = CString::new(path.to_str().expect("path is UTF-8")).expect("no zero bytes");
        // SAFETY: the model is valid; it frees the adapter with itself.
        let adapter = unsafe { self.api.llama_adapter_lora_init(self.model, file.as_ptr()) };
        if adapter.is_null() {
            return Err(format!("{} does not load: {}", path.display(), last_lines()));
        }
        Ok(Adapter { adapter, _model: PhantomData })
    }

    /// Makes a context, with the options of the expert cache that are set now.
    ///
    /// # Errors
    /// The end of the log.
    pub fn context(&self, options: ContextOptions) -> Result<Context<'_>, String> {
        // SAFETY: the function has no preconditions.
        let mut params = unsafe { self.api.llama_context_default_params() };
        params.n_ctx = options.n_ctx;
        params.n_batch = options.n_ctx;
        params.n_ubatch = options.n_ubatch;
        params.n_seq_max = options.n_seq_max;
        params.kv_unified = options.kv_unified;
        params.n_threads = options.n_threads;
        params.n_threads_batch = options.n_threads;
        // SAFETY: the model is valid and outlives the context.
        let ctx = unsafe { self.api.llama_init_from_model(self.model, params) };
        if ctx.is_null() {
            return Err(format!("there is no context: {}", last_lines()));
        }
        Ok(Context {
            api: self.api,
            has_moe_hot: self.has_moe_hot,
            ctx,
            n_vocab: self.n_vocab,
            _model: PhantomData,
        })
    }
}

impl Drop for Model<'_> {
    fn drop(&mut self) {
        // SAFETY: contexts and adapters borrow the model, so there are none left.
        unsafe { self.api.llama_model_free(self.model) };
    }
}

/// A token to decode.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Input {
    /// The token.
    pub token: i32,
    /// Its position in its sequence.
    pub pos: i32,
    /// Its sequence.
    pub seq: i32,
    /// Whether its logits are wanted.
    pub output: bool,
}

/// The logits of the tokens of a batch whose logits were wanted, in the order of the batch.
#[derive(Clone, Debug)]
pub struct Logits {
    /// Row by row, `[n_outputs][n_vocab]`.
    pub values: Vec<f32>,
    /// Length of a row.
    pub n_vocab: usize,
}

impl Logits {
    /// The logits of output `i`.
    pub fn row(&self, i: usize) -> &[f32] {
        &self.values[i * self.n_vocab..(i + 1) * self.n_vocab]
    }

    /// The most likely token after output `i`; the first of equals.
    pub fn argmax(&self, i: usize) -> i32 {
        let mut best = 0;
        let row = self.row(i);
        for (token, value) in row.iter().enumerate() {
            if *value > row[best] {
                best = token;
            }
        }
        best as i32
    }
}

/// Counters of the expert cache; see `llama_moe_hot_stats`.
#[derive(Clone, Copy, PartialEq, Eq, Default, Debug)]
#[allow(missing_docs)]
pub struct Stats {
    pub k: i32,
    pub n_layers: i32,
    pub n_slots: i32,
    pub slot_bytes: u64,
    pub n_steps: u64,
    pub n_tokens: u64,
    pub n_hits: u64,
    pub n_misses: u64,
    pub n_uploads: u64,
    pub upload_bytes: u64,
    pub n_evictions: u64,
    pub n_rebalances: u64,
}

/// A context of a model.
pub struct Context<'a> {
    api: &'static sys::Llama,
    has_moe_hot: bool,
    ctx: *mut sys::llama_context,
    n_vocab: usize,
    _model: PhantomData<&'a ()>,
}

// SAFETY: a context is not bound to a thread, and all calls that use it take it mutably or only read counters.
unsafe impl Send for Context<'_> {}

impl Context<'_> {
    /// Decodes a batch; gives the logits that it asks for.
    ///
    /// # Errors
    /// What `llama_decode` returned.
    pub fn decode(&mut self, batch: &[Input]) -> Result<Logits, String> {
        let mut token: Vec<_> = batch.iter().map(|i| i.token).collect();
        let mut pos: Vec<_> = batch.iter().map(|i| i.pos).collect();
        let mut n_seq_id = vec![1; batch.len()];
        let mut seq: Vec<_> = batch.iter().map(|i| i.seq).collect();
        let mut seq_id: Vec<_> = seq.iter_mut().map(ptr::from_mut).collect();
        let mut logits: Vec<_> = batch.iter().map(|i| i8::from(i.output)).collect();
        let raw = sys::llama_batch {
            n_tokens: batch.len() as i32,
            token: token.as_mut_ptr(),
            embd: ptr::null_mut(),
            pos: pos.as_mut_ptr(),
            n_seq_id: n_seq_id.as_mut_ptr(),
            seq_id: seq_id.as_mut_ptr(),
            logits: logits.as_mut_ptr(),
        };
        // SAFETY: the context is valid and the arrays are `n_tokens` long.
        let status = unsafe { self.api.llama_decode(self.ctx, raw) };
        if status != 0 {
            return Err(format!(
                "llama_decode of {} tokens returned {status}: {}",
                batch.len(),
                last_lines()
            ));
        }
        let mut values = Vec::with_capacity(batch.len() * self.n_vocab);
        for (i, _) in batch.iter().enumerate().filter(|(_, input)| input.output) {
            // SAFETY: logits were asked for at this index; a row has `n_vocab` values.
            let row = unsafe {
                let row = self.api.llama_get_logits_ith(self.ctx, i as i32);
                assert!(!row.is_null(), "no logits at {i}");
                std::slice::from_raw_parts(row, self.n_vocab)
            };
            values.extend_from_slice(row);
        }
        Ok(Logits { values, n_vocab: self.n_vocab })
    }

    /// Applies adapters, each with scale 1; none: back to the plain model.
    ///
    /// # Panics
    /// When the library refuses them.
    pub fn set_adapters(&mut self, adapters: &[&Adapter<'_>]) {
        let mut raw: Vec<_> = adapters.iter().map(|a| a.adapter).collect();
        let mut scales = vec![1.0f32; raw.len()];
        // SAFETY: the adapters belong to the context's model; the arrays are as long as said.
        let status = unsafe {
            self.api.llama_set_adapters_lora(self.ctx, raw.as_mut_ptr(), raw.len(), scales.as_mut_ptr())
        };
        assert_eq!(status, 0, "llama_set_adapters_lora");
    }

    /// Lets `abort` decide, again and again, whether a decode that runs is given up; `None`: never.
    pub fn set_abort(&mut self, abort: Option<&'static AtomicBool>) {
        unsafe extern "C" fn asked(data: *mut c_void) -> bool {
            // SAFETY: `set_abort` passes a static.
            unsafe { &*data.cast::<AtomicBool>() }.load(Ordering::Relaxed)
        }
        let data = abort.map_or(ptr::null_mut(), |a| ptr::from_ref(a).cast_mut().cast());
        // SAFETY: the context is valid, and what the callback looks at is never freed.
        unsafe { self.api.llama_set_abort_callback(self.ctx, abort.map(|_| asked as _), data) };
    }

    /// Forgets all sequences.
    pub fn clear(&mut self) {
        // SAFETY: the context is valid.
        unsafe { self.api.llama_memory_clear(self.api.llama_get_memory(self.ctx), true) };
    }

    /// Counters since the context was made; `None` when it has no slots.
    pub fn stats(&self) -> Option<Stats> {
        if !self.has_moe_hot {
            return None;
        }
        // SAFETY: plain numbers and a bool, for all of which zero is a value.
        let mut s: sys::llama_moe_hot_stats = unsafe { std::mem::zeroed() };
        // SAFETY: both pointers are valid.
        let ok = unsafe { self.api.llama_moe_hot_get_stats(self.ctx, &raw mut s) };
        assert_eq!(ok, s.active, "counters without slots, or slots without counters");
        ok.then_some(Stats {
            k: s.k,
            n_layers: s.n_layers,
            n_slots: s.n_slots,
            slot_bytes: s.slot_bytes,
            n_steps: s.n_steps,
            n_tokens: s.n_tokens,
            n_hits: s.n_hits,
            n_misses: s.n_misses,
            n_uploads: s.n_uploads,
            upload_bytes: s.upload_bytes,
            n_evictions: s.n_evictions,
            n_rebalances: s.n_rebalances,
        })
    }

    /// What was requested and what is active, in one line; `None` without slots.
    pub fn status(&self) -> Option<String> {
        // SAFETY: the context is valid; the text until the next call on this thread.
        self.has_moe_hot.then(|| unsafe { text(self.api.llama_moe_hot_status(self.ctx)) }).flatten()
    }
}

impl Drop for Context<'_> {
    fn drop(&mut self) {
        // SAFETY: made by `llama_init_from_model`, freed once.
        unsafe { self.api.llama_free(self.ctx) };
    }
}
