//! Requests to the view: what it shows is what the model of `abi` knows, what it refuses has a reason and changes nothing,
//! and what it changes the model follows.
//!
//! As a target of its own: requests as text, `METHOD PATH`, a line end and the body, with a line `---` between two and a
//! `!` in front where changes are not allowed, to a process with one small model, which decodes between them.

use std::{
    collections::BTreeMap,
    ffi::{CStr, c_char},
    ptr,
};

use arbitrary::Arbitrary;
use base64::{Engine as _, prelude::BASE64_STANDARD};
use moe_hot::{
    config::usual_policy,
    ffi::{moe_hot_status::*, *},
    policy::PolicySpec,
};
use parking_lot::{Mutex, MutexGuard};
use serde_json::{Map, Value};

use super::{
    abi::{Class, Out, Pool, Text, Wired, World, c_string, expect, place, pointer, usable, utf8},
    memory::bounded,
};

/// An answer is built as a tree, as text, and as the caller's: three times the page, with room to grow.
const FIXED: usize = 256 << 10;
/// What was sent is quoted, six bytes for one that must be escaped, and a string that grows is there twice.
const PER_BYTE: usize = 64;
/// Each metric names each model.
const PER_BYTE_OF_NAMES: usize = 512;
/// The tables of `predict` at [`MAX_RANK`].
const PER_CLASS: usize = 3 << 20;
/// Its default. Larger ones are valid, and slow.
const MAX_RANK: u32 = 512;
/// As src/view/mod.rs and docs/trust.md say.
const MAX_BODY: usize = 16 << 10;
/// Most requests of an input.
const MAX_REQUESTS: usize = 32;

#[derive(Arbitrary, Debug)]
enum Method<'a> {
    Get,
    Post,
    Other(Text<'a>),
}

#[derive(Arbitrary, Debug)]
enum Path<'a> {
    State,
    Page,
    Props,
    Metrics,
    Other(Text<'a>),
}

#[derive(Arbitrary, Debug)]
enum Body<'a> {
    None,
    /// No bytes at an address, or more of them than there can be.
    Odd {
        huge: bool,
    },
    Raw(&'a [u8]),
    Settings(Settings<'a>),
    /// Settings, with spaces up to a size around the limit.
    Long(Settings<'a>, i8),
}

/// Arguments of a request.
#[derive(Arbitrary, Debug)]
pub struct Request<'a> {
    method: Method<'a>,
    path: Path<'a>,
    body: Body<'a>,
    writable: bool,
}

#[derive(Arbitrary, Debug)]
enum Number {
    Small(u8),
    Any(i64),
    Fraction(f32),
    None,
}

#[derive(Arbitrary, Debug)]
enum Named<'a> {
    Given(u8),
    Other(&'a str),
}

#[derive(Arbitrary, Debug)]
enum Policy<'a> {
    Known(u8),
    Other(&'a str),
}

/// What makes settings something else.
#[derive(Arbitrary, Debug)]
enum Twist {
    None,
    Unknown,
    Array,
    Twice,
    Trailing,
}

/// The body of POST /moe-hot.
#[derive(Arbitrary, Debug)]
pub struct Settings<'a> {
    model: Option<Named<'a>>,
    k: Option<Number>,
    vram_mib: Option<Number>,
    interval: Option<Number>,
    policy: Option<Policy<'a>>,
    frozen: Option<bool>,
    save_profile: Option<bool>,
    twist: Option<Twist>,
}

const POLICIES: [&str; 10] = [
    "auto",
    "decay",
    "lru",
    "lfu",
    "static",
    "lfru",
    "s3fifo",
    "predict",
    "predict:margin=0.2:shared=off",
    "none",
];

impl From<&Number> for Value {
    fn from(n: &Number) -> Value {
        match n {
            Number::Small(n) => (*n).into(),
            Number::Any(n) => (*n).into(),
            Number::Fraction(n) => (*n).into(),
            Number::None => Value::Null,
        }
    }
}

impl Settings<'_> {
    fn text(&self, names: &[&str]) -> String {
        let mut fields = Map::new();
        let mut add = |name: &str, value: Option<Value>| {
            if let Some(value) = value {
                fields.insert(name.into(), value);
            }
        };
        let named = |n: &Named<'_>| match n {
            Named::Given(i) if !names.is_empty() => names[usize::from(*i) % names.len()].into(),
            Named::Given(_) => "nobody".into(),
            Named::Other(name) => (*name).into(),
        };
        let policy = |p: &Policy<'_>| match p {
            Policy::Known(i) => POLICIES[usize::from(*i) % POLICIES.len()].into(),
            Policy::Other(name) => (*name).into(),
        };
        add("model", self.model.as_ref().map(named));
        add("k", self.k.as_ref().map(Value::from));
        add("vram_mib", self.vram_mib.as_ref().map(Value::from));
        add("interval", self.interval.as_ref().map(Value::from));
        add("policy", self.policy.as_ref().map(policy));
        add("frozen", self.frozen.map(Value::from));
        add("save_profile", self.save_profile.map(Value::from));
        if matches!(self.twist, Some(Twist::Unknown)) {
            add("slots", Some(1.into()));
        }
        let text = Value::from(fields.clone()).to_string();
        match self.twist {
            None | Some(Twist::None | Twist::Unknown) => text,
            // as a struct may be written, too
            Some(Twist::Array) => {
                let order = ["model", "k", "vram_mib", "interval", "policy", "frozen", "save_profile"];
                let field = |name: &&str| fields.get(*name).cloned();
                let or = |name: &&str| if *name == "save_profile" { false.into() } else { Value::Null };
                order
                    .iter()
                    .map(|name| field(name).unwrap_or_else(|| or(name)))
                    .collect::<Value>()
                    .to_string()
            }
            Some(Twist::Twice) => text.replacen('{', "{\"frozen\":true,\"frozen\":false,", 1),
            Some(Twist::Trailing) => text + "}",
        }
    }
}

/// An answer, as a client gets it.
struct Answer {
    status: i32,
    content_type: String,
    security_policy: Option<String>,
    body: String,
}

impl Answer {
    /// The body of an error must have a code, a type and a message, as llama-server's have.
    fn refusal(&self) -> String {
        let v = self.json();
        let e = &v["error"];
        assert_eq!(e["code"], self.status);
        assert!(!e["type"].as_str().expect("a type").is_empty());
        let message = e["message"].as_str().expect("a message");
        assert!(!message.is_empty());
        message.into()
    }

    fn json(&self) -> Value {
        assert_eq!(self.content_type, "application/json; charset=utf-8");
        assert_eq!(self.security_policy, None);
        serde_json::from_str(&self.body).expect("valid JSON")
    }
}

/// Bytes for an argument, and how many there are.
type Bytes = (*const u8, usize);

fn call(
    method: *const c_char,
    path: *const c_char,
    body: Bytes,
    writable: bool,
    out: Out,
) -> (moe_hot_status, Option<Answer>) {
    let empty = || moe_hot_response {
        status: 0,
        content_type: ptr::null(),
        security_policy: ptr::null(),
        body: ptr::null(),
    };
    let mut at = [empty(), empty()];
    // SAFETY: strings or null, as many bytes as said or more than there can be, a place or null.
    let status = unsafe { moe_hot_http(method, path, body.0.cast(), body.1, writable, place(out, &mut at)) };
    let [r, _] = at;
    if status != MOE_HOT_OK {
        assert!(r.status == 0 && r.body.is_null(), "what fails writes nothing");
        return (status, None);
    }
    let text = |p: *const c_char| {
        // SAFETY: a string, valid until the next call.
        let text = unsafe { CStr::from_ptr(p) };
        text.to_str().expect("answers are UTF-8").to_string()
    };
    let security_policy = (!r.security_policy.is_null()).then(|| text(r.security_policy));
    (
        status,
        Some(Answer {
            status: r.status,
            content_type: text(r.content_type),
            security_policy,
            body: text(r.body),
        }),
    )
}

impl World {
    /// The pools that can be seen, in the order of their models' addresses.
    fn seen(&self) -> Vec<usize> {
        self.models.values().copied().filter(|p| self.pools[*p].1.active == Some(true)).collect()
    }

    fn names(&self) -> Vec<&str> {
        self.seen().into_iter().map(|p| self.pools[p].1.name.as_str()).collect()
    }

    pub(super) fn http(&mut self, request: &Request<'_>, out: Out) {
        let method = c_string(match &request.method {
            Method::Get => Some(b"GET"),
            Method::Post => Some(b"POST"),
            Method::Other(text) => *text,
        });
        let path = c_string(match &request.path {
            Path::State => Some(b"/moe-hot"),
            Path::Page => Some(b"/moe-hot/"),
            Path::Props => Some(b"/props"),
            Path::Metrics => Some(b"/metrics"),
            Path::Other(text) => *text,
        });
        let mut body = match &request.body {
            Body::None | Body::Odd { .. } => Vec::new(),
            Body::Raw(bytes) => bytes.to_vec(),
            Body::Settings(s) | Body::Long(s, _) => s.text(&self.names()).into_bytes(),
        };
        if let Body::Long(_, more) = request.body {
            body.resize(body.len().max(MAX_BODY.saturating_add_signed(more.into())), b' ');
        }
        let (method_text, path_text) = (utf8(&method), utf8(&path));
        let huge = matches!(request.body, Body::Odd { huge: true });
        if !usable::<moe_hot_response>(out) || method_text.is_none() || path_text.is_none() || huge {
            let body = if huge { (body.as_ptr(), usize::MAX) } else { (ptr::null(), 0) };
            let (status, _) = call(pointer(&method), pointer(&path), body, request.writable, out);
            return expect(status, MOE_HOT_INVALID_ARGUMENT);
        }
        self.request(method_text.unwrap(), path_text.unwrap(), &body, request.writable);
    }

    /// POST of `settings`.
    pub(super) fn set(&mut self, settings: &Settings<'_>) {
        let body = settings.text(&self.names());
        self.request("POST", "/moe-hot", body.as_bytes(), true);
    }

    /// A request whose arguments are whole.
    fn request(&mut self, method: &str, path: &str, body: &[u8], writable: bool) {
        let posts = (method, path) == ("POST", "/moe-hot");
        let legal = self.legal(body);
        // a change of size waits for the end of a step, which does not come: once that must be stood
        if posts && writable && legal.as_ref().is_ok_and(|c| c.bytes.is_some() && self.runs(c.pool)) {
            if self.waited {
                return;
            }
            self.waited = true;
        }
        let policy = legal.as_ref().ok().and_then(|c| c.policy.map(|p| (p, c.pool)));
        let tables = match policy {
            Some((PolicySpec::Predict(p), _)) if p.rank > MAX_RANK => return,
            Some((PolicySpec::Predict(_), pool)) => PER_CLASS * self.pools[pool].1.classes.len(),
            _ => 0,
        };
        let (m, p) = (c_string(Some(method.as_bytes())), c_string(Some(path.as_bytes())));
        let names: usize = self.names().iter().map(|n| n.len()).sum();
        let sent = method.len() + path.len() + body.len() + self.reasons;
        let bound = FIXED + tables + PER_BYTE * sent + PER_BYTE_OF_NAMES * names;
        let at = if body.is_empty() { ptr::null() } else { body.as_ptr() };
        let (status, answer) =
            bounded(bound, || call(pointer(&m), pointer(&p), (at, body.len()), writable, Out::Valid));
        expect(status, MOE_HOT_OK);
        let answer = answer.expect("it is there");
        match (method, path) {
            ("GET", "/moe-hot/") => {
                assert_eq!((answer.status, answer.content_type.as_str()), (200, "text/html; charset=utf-8"));
                assert!(answer.body.starts_with("<!doctype html>"));
                let policy = answer.security_policy.expect("the page has a policy");
                assert!(policy.starts_with("default-src 'none'; ") && !policy.contains("unsafe"));
            }
            ("GET", "/moe-hot") => self.state(&answer, writable),
            ("GET", "/props") => {
                assert_eq!(answer.status, 200);
                let shown = answer.json();
                let shown = shown.as_array().expect("a list");
                assert_eq!(shown.len(), self.seen().len());
                for (shown, pool) in shown.iter().zip(self.seen()) {
                    self.fixed(shown, pool);
                }
            }
            ("GET", "/metrics") => self.metrics(&answer),
            ("POST", "/moe-hot") if !writable => {
                assert!(answer.status == 501 && answer.refusal().contains("`--props`"));
            }
            ("POST", "/moe-hot") => {
                match legal {
                    // of two fields of a name the model sees the last
                    _ if answer.status == 400 && answer.refusal().contains("duplicate field") => {}
                    Err(why) => {
                        assert_eq!(answer.status, 400, "{} is not legal", String::from_utf8_lossy(body));
                        let message = answer.refusal();
                        assert!(message.starts_with(why), "{message}, not {why}");
                    }
                    Ok(change) => {
                        assert_eq!(answer.status, 200, "{}", answer.body);
                        self.apply(&change);
                    }
                }
                if answer.status == 200 {
                    return self.state(&answer, writable);
                }
                let (status, state) =
                    call(c"GET".as_ptr(), c"/moe-hot".as_ptr(), (ptr::null(), 0), writable, Out::Valid);
                expect(status, MOE_HOT_OK);
                self.state(&state.expect("it is there"), writable);
            }
            _ => assert!(answer.status == 404 && answer.refusal() == format!("there is no {method} {path}")),
        }
    }

    /// What a body asks for; else how the refusal begins.
    fn legal(&self, body: &[u8]) -> Result<Change, &'static str> {
        if body.len() > MAX_BODY {
            return Err("the body has ");
        }
        const NOT_READ: &str = "the body";
        let fields: Map<String, Value> = serde_json::from_slice(body).map_err(|_| NOT_READ)?;
        const NAMES: [&str; 7] = ["model", "k", "vram_mib", "interval", "policy", "frozen", "save_profile"];
        if fields.keys().any(|name| !NAMES.contains(&name.as_str())) {
            return Err(NOT_READ);
        }
        let field = |name: &str| fields.get(name).filter(|v| !v.is_null());
        let text = |name: &str| field(name).map(|v| v.as_str().ok_or(NOT_READ)).transpose();
        let number = |name: &str| field(name).map(|v| v.as_u64().ok_or(NOT_READ)).transpose();
        let small = |name: &str| number(name)?.map(|n| u32::try_from(n).map_err(|_| NOT_READ)).transpose();
        let flag = |v: &Value| v.as_bool().ok_or(NOT_READ);
        let (model, policy) = (text("model")?, text("policy")?);
        let (k, vram_mib, interval) = (small("k")?, number("vram_mib")?, small("interval")?);
        let frozen = field("frozen").map(flag).transpose()?;
        // there is no third way for it
        let save = fields.get("save_profile").map(flag).transpose()?;

        let seen = self.seen();
        let mut meant = seen.iter().filter(|p| model.is_none_or(|m| self.pools[**p].1.name == m));
        let pool = match (meant.next(), meant.next(), model) {
            (Some(pool), None, _) => *pool,
            (None, _, None) => return Err("no model has slots"),
            _ => return Err("model: "),
        };
        let layers = &self.pools[pool].1.layers;
        if interval.is_some_and(|n| !(1..=1 << 20).contains(&n)) {
            return Err("moe-hot-rebalance-interval: ");
        }
        let policy = policy.map(|p| match p {
            "auto" => Ok(usual_policy(false)),
            p => p.parse::<PolicySpec>().map_err(|_| "policy: "),
        });
        let policy = policy.transpose()?;
        let bytes = match (k, vram_mib) {
            (Some(_), Some(_)) => return Err("k and vram_mib: "),
            (Some(k), None) => {
                let k = k as usize;
                if !(1..=layers.iter().map(|l| l.n_expert).max().unwrap_or(0)).contains(&k) {
                    return Err("k: ");
                }
                Some(layers.iter().map(|l| (k.min(l.n_expert) * l.expert_bytes()) as u64).sum())
            }
            (None, Some(mib)) if !(1..=1 << 24).contains(&mib) => return Err("moe-hot-vram: "),
            (None, mib) => mib.map(|mib| mib << 20),
        };
        if save == Some(true) {
            // there is no path, or one where nothing can be
            return Err("save_profile: ");
        }
        Ok(Change { pool, bytes, interval, policy, frozen })
    }

    fn apply(&mut self, change: &Change) {
        let runs = self.runs(change.pool);
        let pool = &mut self.pools[change.pool].1;
        if let Some(bytes) = change.bytes {
            let all: usize =
                pool.classes.iter().map(|c| c.n_keys * pool.layers[c.layers[0]].expert_bytes()).sum();
            for class in pool.classes.iter_mut().filter(|c| !c.resident) {
                let share = u128::from(bytes) * class.n_keys as u128 / all as u128;
                let n = usize::try_from(share).unwrap_or(usize::MAX).clamp(1, class.n_keys);
                class.open = (!runs).then_some(n);
            }
        }
        pool.interval = change.interval.unwrap_or(pool.interval);
        pool.policy = change.policy.unwrap_or(pool.policy);
        pool.frozen = change.frozen.unwrap_or(pool.frozen);
    }

    /// The answer of GET /moe-hot, and of POST.
    fn state(&self, answer: &Answer, writable: bool) {
        assert_eq!(answer.status, 200);
        let v = answer.json();
        assert!(v["version"] == 1 && v["writable"] == writable && v["now_us"].is_u64());
        let models = v["models"].as_array().expect("a list");
        assert_eq!(models.len(), self.seen().len());
        for (m, pool) in models.iter().zip(self.seen()) {
            self.fixed(m, pool);
            let (config, pool) = &self.pools[pool];
            let bytes = |c: &Class| c.n_keys * pool.layers[c.layers[0]].expert_bytes();
            assert_eq!(m["slot_bytes_max"], pool.classes.iter().map(bytes).sum::<usize>());
            assert_eq!(m["slots_max"], pool.classes.iter().map(|c| c.n_keys).sum::<usize>());
            let requested = &m["requested"];
            assert_eq!(requested["k"], Value::from(config.k.filter(|k| *k > 0)));
            assert_eq!(requested["vram_mib"], Value::from(config.vram.map(|b| b >> 20)));
            assert_eq!(requested["auto"], config.k.is_none());
            layers(m, pool);
            let n_experts = |il: &Value| {
                let of = |l: &&Wired| *il == l.il;
                pool.layers.iter().filter(of).map(|l| l.n_expert as u64).max()
            };
            for s in m["swaps"].as_array().expect("a list") {
                let is =
                    |il: &Value, e: &Value| n_experts(il).is_some_and(|n| e.as_u64().is_some_and(|e| e < n));
                assert!(is(&s["il"], &s["expert"]), "{s}");
                assert!(
                    is(&s["evicted_il"], &s["evicted"]) || (s["evicted_il"] == -1 && s["evicted"] == -1),
                    "{s}"
                );
            }
            assert!(m["swaps"].as_array().is_some_and(|s| s.len() <= 32));
        }
    }

    /// What GET /moe-hot and GET /props both have.
    fn fixed(&self, m: &Value, pool: usize) {
        let (config, pool) = &self.pools[pool];
        assert_eq!(m["name"], *pool.name);
        let state = m["state"].as_str().expect("a text");
        assert!(
            if pool.frozen { state == "frozen" } else { state == "on" || state == "idle" }
                || (state == "off" && !pool.always)
        );
        assert_eq!(m["why"] == "", state == "on");
        assert_eq!(m["interval"], pool.interval);
        assert_eq!(m["policy"], pool.policy.to_string());
        assert_eq!((&m["link"], &m["device"]), (&false.into(), &"host memory".into()));
        assert!(config.threads.is_none_or(|n| m["threads"] == n));
        assert_eq!(m["registered_bytes"], 0);
        if let Some(open) = pool.open() {
            assert_eq!(m["slots"], open);
            assert_eq!(m["k"], open / pool.layers.len());
            let bytes = |c: &Class| c.open.unwrap() * pool.layers[c.layers[0]].expert_bytes();
            assert_eq!(m["slot_bytes"], pool.classes.iter().map(bytes).sum::<usize>());
        }
        let classes = m["classes"].as_array().expect("a list");
        assert_eq!(classes.len(), pool.classes.len());
        for l in &pool.layers {
            // the order of classes is the library's
            let same = |c: &&Value| c["expert_bytes"] == l.expert_bytes();
            assert!(classes.iter().any(|c| same(&c)), "{classes:?}");
        }
    }

    fn metrics(&self, answer: &Answer) {
        assert_eq!((answer.status, answer.content_type.as_str()), (200, "text/plain; version=0.0.4"));
        let mut seen: BTreeMap<&str, Vec<f64>> = BTreeMap::new();
        assert!(answer.body.is_empty() || answer.body.ends_with('\n'));
        for line in answer.body.split_terminator('\n').filter(|l| !l.starts_with("# ")) {
            let (what, value) = line.rsplit_once("} ").expect("labels and a value");
            let (metric, label) = what.split_once("{model=\"").expect("a model");
            assert!(metric.starts_with("llamacpp:moe_hot_") && label.ends_with('"'), "{line}");
            seen.entry(metric).or_default().push(value.parse().expect("a number"));
        }
        let pools = self.seen();
        let slots = seen.get("llamacpp:moe_hot_slots").map_or(&[][..], Vec::as_slice);
        assert_eq!(slots.len(), pools.len());
        for (slots, pool) in slots.iter().zip(&pools) {
            assert!(self.pools[*pool].1.open().is_none_or(|open| *slots == open as f64));
        }
        let states = seen.get("llamacpp:moe_hot_state").map_or(&[][..], Vec::as_slice);
        assert!(states.len() == 4 * pools.len() && states.chunks(4).all(|s| s.iter().sum::<f64>() == 1.0));
    }
}

/// A change that is allowed.
struct Change {
    pool: usize,
    bytes: Option<u64>,
    interval: Option<u32>,
    policy: Option<PolicySpec>,
    frozen: Option<bool>,
}

/// Layers and classes as GET /moe-hot has them: as many experts are shown in slots as slots are used.
fn layers(m: &Value, pool: &Pool) {
    let classes = m["classes"].as_array().expect("a list");
    let mut shown = vec![0; classes.len()];
    let layers = m["layers"].as_array().expect("a list");
    assert_eq!(layers.len(), pool.layers.len());
    for (i, (l, wired)) in layers.iter().zip(&pool.layers).enumerate() {
        assert_eq!((&l["il"], &l["experts"]), (&wired.il.into(), &wired.n_expert.into()));
        let bytes = |name: &str| BASE64_STANDARD.decode(l[name].as_str().expect("a text")).expect("base64");
        assert_eq!(bytes("heat").len(), wired.n_expert);
        let resident = bytes("resident");
        assert_eq!(resident.len(), wired.n_expert.div_ceil(8));
        let n: u32 = resident.iter().map(|b| b.count_ones()).sum();
        assert!(n as usize <= wired.n_expert && u32::from(resident[0]) >> wired.n_expert == 0);
        let c = l["class"].as_u64().expect("an index") as usize;
        shown[c] += n as usize;
        let class = pool.class_of(i);
        assert_eq!(classes[c]["expert_bytes"], wired.expert_bytes());
        assert_eq!(classes[c]["slots_max"], class.n_keys);
        assert!(class.open.is_none_or(|open| classes[c]["slots"] == open));
        assert!(!class.resident || n as usize == wired.n_expert, "resident for good");
        let members = class.layers.iter().map(|l| pool.layers[*l].n_expert);
        assert_eq!(classes[c]["experts"], members.max().unwrap_or(0));
        assert_eq!(classes[c]["used"], pool.layers[class.layers[0]].n_used);
    }
    for (class, shown) in classes.iter().zip(shown) {
        assert!(class["slots_used"] == shown && class["slots"].as_u64().is_some_and(|n| n >= shown as u64));
    }
}

/// The target's process: a model, its context.
pub(super) struct Live {
    world: World,
    ctx: usize,
}

static LIVE: Mutex<Option<Live>> = Mutex::new(None);

/// The process has one user at a time, who may have left a model.
pub(super) fn alone() -> MutexGuard<'static, Option<Live>> {
    LIVE.lock()
}

/// The requests, with a decode step after each.
pub fn run(data: &[u8]) {
    let mut live = alone();
    let Live { world, ctx } = live.get_or_insert_with(|| {
        let mut world = World::default();
        let ctx = world.small_model();
        Live { world, ctx }
    });
    // each input finds the same settings
    let first = br#"{"k": 4, "interval": 4, "policy": "decay", "frozen": false}"#;
    world.request("POST", "/moe-hot", first, true);
    for (i, request) in split(data).into_iter().take(MAX_REQUESTS).enumerate() {
        let (line, body) = cut(request, b'\n');
        let (writable, line) = line.strip_prefix(b"!").map_or((true, line), |rest| (false, rest));
        let (method, path) = cut(line, b' ');
        // strings that are not UTF-8 or have an end within are refused, or cut there
        let text = |bytes: &[u8]| Some(utf8(&c_string(Some(bytes)))?.to_string());
        if let (Some(method), Some(path)) = (text(method), text(path)) {
            world.request(&method, &path, body, writable);
        }
        world.step(*ctx, 1, i as u8, false, None);
    }
}

/// At the first `byte`.
fn cut(text: &[u8], byte: u8) -> (&[u8], &[u8]) {
    let at = text.iter().position(|b| *b == byte);
    at.map_or((text, &[]), |at| (&text[..at], &text[at + 1..]))
}

fn split(data: &[u8]) -> Vec<&[u8]> {
    const BETWEEN: &[u8] = b"\n---\n";
    let (mut out, mut rest) = (Vec::new(), data);
    while let Some(at) = rest.windows(BETWEEN.len()).position(|w| w == BETWEEN) {
        out.push(&rest[..at]);
        rest = &rest[at + BETWEEN.len()..];
    }
    out.push(rest);
    out
}
