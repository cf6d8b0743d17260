//! The options: names, environment variables, defaults and what is allowed, each in one place.
//!
//! Options belong to the process. A value that was set wins over the environment, and that over the
//! default. A model takes a snapshot when its pool is made.

use std::{collections::BTreeMap, path::PathBuf};

use parking_lot::Mutex;

use crate::policy::{PolicyError, PolicyKind, PolicySpec};

/// A refused value or name.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
pub enum ConfigError {
    /// The value of an option is not allowed.
    #[error("{option}: '{value}' is not allowed, expected {allowed}")]
    Value {
        /// The flag or the environment variable that the value came from.
        option: String,
        /// The value.
        value: String,
        /// What would be.
        allowed: String,
    },
    /// There is no such option.
    #[error("there is no option '{name}', expected {}", names())]
    Unknown {
        /// What was asked for.
        name: String,
    },
}

/// Whose row kernels compute cold experts.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub enum Kernels {
    /// Ours beside a GPU, which computes in other ways anyway; ggml's where all is on the CPU, so that numbers stay
    /// those of stock to the last bit.
    #[default]
    Auto,
    /// Ours for the types that have one.
    Rows,
    /// ggml's.
    Ggml,
}

/// Whether the slots are left when they turn out not to pay.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub enum AutoOff {
    /// Beside a GPU. In host memory there is nothing to be won, and who asks for slots there wants to see them.
    #[default]
    Auto,
    /// Always.
    On,
    /// Never.
    Off,
}

/// A policy as it is asked for; `None`: auto.
///
/// # Errors
/// What is allowed.
pub fn policy(text: &str) -> Result<Option<PolicySpec>, String> {
    match text.parse() {
        _ if text == "auto" => Ok(None),
        Ok(spec) => Ok(Some(spec)),
        Err(e @ PolicyError::Name) => Err(format!("auto or {e}")),
        Err(e) => Err(e.to_string()),
    }
}

/// What auto is for slots on a GPU, or in host memory. There an expert is read as fast from a slot as from anywhere else,
/// so that predictions would cost more than they gain.
pub fn usual_policy(on_gpu: bool) -> PolicySpec {
    if on_gpu { PolicyKind::Predict } else { PolicyKind::Decay }.into()
}

/// The options of one pool.
#[derive(Clone, PartialEq, Debug)]
pub struct Config {
    /// Slots a layer on average; 0: off, unless there is `vram`; `None`: as many as there is room for.
    pub k: Option<u32>,
    /// Most bytes of slots.
    pub vram: Option<u64>,
    /// Decoded tokens between two plans. Short: copies run beside decode, and a plan takes some 100 us.
    pub rebalance_interval: u32,
    /// Whether the device may read cold experts over the link while the CPU computes others.
    pub link: bool,
    /// Whose row kernels compute cold experts.
    pub kernels: Kernels,
    /// Ubatches of more tokens take the stock graph; `None`: as the device says.
    pub pp_bypass: Option<u32>,
    /// Who decides what gets a slot; `None`: as the device says, see [`Config::policy_of`].
    pub policy: Option<PolicySpec>,
    /// Cold-engine workers; `None`: a core each that ggml leaves.
    pub threads: Option<u32>,
    /// Whose experts the slots begin with.
    pub profile: Option<PathBuf>,
    /// Where the experts that were used are kept.
    pub profile_out: Option<PathBuf>,
    /// Where the routing trace goes.
    pub trace: Option<PathBuf>,
    /// Whether the slots are left when they do not pay.
    pub auto_off: AutoOff,
}

impl Config {
    /// Whether slots are asked for.
    pub fn enabled(&self) -> bool {
        self.k != Some(0) || self.vram.is_some()
    }

    /// Slots asked for in a layer of `n_expert`, as far as K goes.
    pub fn slots_of(&self, n_expert: u32) -> u32 {
        self.k.filter(|k| *k > 0).map_or(n_expert, |k| k.min(n_expert))
    }

    /// Bytes of slots asked for in layers of `n_expert` experts, one of each of which takes `expert_bytes` together. 0 where
    /// the answer is as many as there is memory for: that is no number to keep free.
    pub fn wanted(&self, expert_bytes: u64, n_expert: u32) -> u64 {
        if !self.enabled() || (self.k.is_none() && self.vram.is_none()) {
            return 0;
        }
        let most = self.vram.unwrap_or(u64::MAX);
        expert_bytes.saturating_mul(self.slots_of(n_expert).into()).min(most)
    }

    /// Who decides what gets a slot on a GPU, or in host memory.
    pub fn policy_of(&self, on_gpu: bool) -> PolicySpec {
        self.policy.unwrap_or(usual_policy(on_gpu))
    }

    /// What was asked for, in the words of the options.
    pub fn requested(&self) -> String {
        let k = self.k.map_or("auto".into(), |k| k.to_string());
        match (self.k, self.vram) {
            (Some(0), Some(vram)) => format!("{} MiB", vram >> 20),
            (_, Some(vram)) => format!("K = {k}, {} MiB", vram >> 20),
            _ => format!("K = {k}"),
        }
    }
}

impl Default for Config {
    fn default() -> Self {
        Config {
            k: Some(0),
            vram: None,
            rebalance_interval: 2,
            link: true,
            kernels: Kernels::Auto,
            pp_bypass: None,
            policy: None,
            threads: None,
            profile: None,
            profile_out: None,
            trace: None,
            auto_off: AutoOff::Auto,
        }
    }
}

/// An option of the command line.
struct Opt {
    /// Flag without dashes.
    name: &'static str,
    env: &'static str,
    /// Puts a value into the configuration, or says what is allowed.
    parse: fn(&mut Config, &str) -> Result<(), String>,
    show: fn(&Config) -> String,
}

/// Most tokens between two plans: a plan a million tokens is as good as none.
const MAX_INTERVAL: u32 = 1 << 20;
const MAX_THREADS: u32 = 512;
/// 16 TiB.
const MAX_MIB: u64 = 1 << 24;

const OPTIONS: [Opt; 12] = [
    Opt {
        name: "moe-hot-k",
        env: "LLAMA_ARG_MOE_HOT_K",
        parse: |c, v| {
            c.k = match v {
                "auto" => None,
                _ => Some(
                    v.parse()
                        .map_err(|_| "auto or a number of slots per layer, 0 (off) or more".to_string())?,
                ),
            };
            Ok(())
        },
        show: |c| c.k.map_or("auto".into(), |k| k.to_string()),
    },
    Opt {
        name: "moe-hot-vram",
        env: "LLAMA_ARG_MOE_HOT_VRAM",
        parse: |c, v| {
            let mib = v.parse().ok().filter(|n| (1..=MAX_MIB).contains(n));
            c.vram = Some(mib.ok_or(format!("a number of MiB from 1 to {MAX_MIB}"))? << 20);
            Ok(())
        },
        show: |c| c.vram.map_or(String::new(), |b| (b >> 20).to_string()),
    },
    Opt {
        name: "moe-hot-rebalance-interval",
        env: "LLAMA_ARG_MOE_HOT_REBALANCE_INTERVAL",
        parse: |c, v| {
            let n = v.parse().ok().filter(|n| (1..=MAX_INTERVAL).contains(n));
            c.rebalance_interval = n.ok_or(format!("a number of tokens from 1 to {MAX_INTERVAL}"))?;
            Ok(())
        },
        show: |c| c.rebalance_interval.to_string(),
    },
    Opt {
        name: "moe-hot-pp-bypass",
        env: "LLAMA_MOE_HOT_PP_BYPASS_N_TOKENS",
        parse: |c, v| {
            if v != "auto" {
                let n = v.parse().ok().filter(|n| *n >= 1u32);
                c.pp_bypass = Some(n.ok_or("auto or a number of tokens, 1 or more")?);
            }
            Ok(())
        },
        show: |c| c.pp_bypass.map_or("auto".into(), |n| n.to_string()),
    },
    Opt {
        name: "moe-hot-policy",
        env: "LLAMA_ARG_MOE_HOT_POLICY",
        parse: |c, v| {
            c.policy = policy(v)?;
            Ok(())
        },
        show: |c| c.policy.map_or("auto".into(), |p| p.to_string()),
    },
    Opt {
        name: "moe-hot-threads",
        env: "LLAMA_ARG_MOE_HOT_THREADS",
        parse: |c, v| {
            if v != "auto" {
                let n = v.parse().ok().filter(|n| *n <= MAX_THREADS);
                c.threads = Some(n.ok_or(format!("auto or a number of threads from 0 to {MAX_THREADS}"))?);
            }
            Ok(())
        },
        show: |c| c.threads.map_or("auto".into(), |n| n.to_string()),
    },
    Opt {
        name: "moe-hot-link",
        env: "LLAMA_ARG_MOE_HOT_LINK",
        parse: |c, v| {
            c.link = match v {
                "auto" => true,
                "off" => false,
                _ => return Err("auto or off".into()),
            };
            Ok(())
        },
        show: |c| if c.link { "auto" } else { "off" }.into(),
    },
    Opt {
        name: "moe-hot-kernels",
        env: "LLAMA_ARG_MOE_HOT_KERNELS",
        parse: |c, v| {
            c.kernels = match v {
                "auto" => Kernels::Auto,
                "rows" => Kernels::Rows,
                "ggml" => Kernels::Ggml,
                _ => return Err("one of auto, rows, ggml".into()),
            };
            Ok(())
        },
        show: |c| {
            match c.kernels {
                Kernels::Auto => "auto",
                Kernels::Rows => "rows",
                Kernels::Ggml => "ggml",
            }
            .into()
        },
    },
    Opt {
        name: "moe-hot-profile",
        env: "LLAMA_ARG_MOE_HOT_PROFILE",
        parse: |c, v| {
            if v.is_empty() {
                return Err("the path of a file that --moe-hot-profile-out wrote".into());
            }
            c.profile = Some(v.into());
            Ok(())
        },
        show: |c| show_path(&c.profile),
    },
    Opt {
        name: "moe-hot-profile-out",
        env: "LLAMA_ARG_MOE_HOT_PROFILE_OUT",
        parse: |c, v| {
            if v.is_empty() {
                return Err("the path of a file to write".into());
            }
            c.profile_out = Some(v.into());
            Ok(())
        },
        show: |c| show_path(&c.profile_out),
    },
    Opt {
        name: "moe-hot-trace",
        env: "LLAMA_ARG_MOE_HOT_TRACE",
        parse: |c, v| {
            if v.is_empty() {
                return Err("the path of a file to write".into());
            }
            c.trace = Some(v.into());
            Ok(())
        },
        show: |c| show_path(&c.trace),
    },
    Opt {
        name: "moe-hot-auto-off",
        env: "LLAMA_ARG_MOE_HOT_AUTO_OFF",
        parse: |c, v| {
            c.auto_off = match v {
                "auto" => AutoOff::Auto,
                "on" => AutoOff::On,
                "off" => AutoOff::Off,
                _ => return Err("one of auto, on, off".into()),
            };
            Ok(())
        },
        show: |c| {
            match c.auto_off {
                AutoOff::Auto => "auto",
                AutoOff::On => "on",
                AutoOff::Off => "off",
            }
            .into()
        },
    },
];

fn show_path(path: &Option<PathBuf>) -> String {
    path.as_ref().map_or(String::new(), |p| p.display().to_string())
}

fn names() -> String {
    OPTIONS.map(|o| o.name).join(", ")
}

impl Opt {
    fn find(name: &str) -> Result<&'static Opt, ConfigError> {
        OPTIONS.iter().find(|o| o.name == name).ok_or_else(|| ConfigError::Unknown { name: name.into() })
    }

    fn apply(&self, config: &mut Config, option: String, value: &str) -> Result<(), ConfigError> {
        (self.parse)(config, value).map_err(|allowed| ConfigError::Value {
            option,
            value: value.into(),
            allowed,
        })
    }
}

/// Values that were set by name.
#[derive(Default)]
pub struct Options {
    set: BTreeMap<&'static str, String>,
}

impl Options {
    /// No values.
    pub const fn new() -> Self {
        Options { set: BTreeMap::new() }
    }

    /// Sets an option by its flag name without dashes; `None`: back to environment or default.
    ///
    /// # Errors
    /// An unknown name, or a value that is not allowed; nothing has changed then.
    pub fn set(&mut self, name: &str, value: Option<&str>) -> Result<(), ConfigError> {
        let opt = Opt::find(name)?;
        match value {
            Some(v) => {
                opt.apply(&mut Config::default(), format!("--{name}"), v)?;
                self.set.insert(opt.name, v.into());
            }
            None => {
                self.set.remove(opt.name);
            }
        }
        Ok(())
    }

    /// All options in effect; `env` looks up an environment variable.
    ///
    /// # Errors
    /// A value in the environment that is not allowed.
    pub fn snapshot(&self, env: impl Fn(&str) -> Option<String>) -> Result<Config, ConfigError> {
        let mut config = Config::default();
        for opt in &OPTIONS {
            if let Some(v) = self.set.get(opt.name) {
                opt.apply(&mut config, format!("--{}", opt.name), v)?;
            } else if let Some(v) = env(opt.env) {
                opt.apply(&mut config, opt.env.into(), &v)?;
            }
        }
        Ok(config)
    }

    /// The value of one option in effect, as text.
    ///
    /// # Errors
    /// An unknown name, or a value in the environment that is not allowed.
    pub fn get(&self, name: &str, env: impl Fn(&str) -> Option<String>) -> Result<String, ConfigError> {
        let opt = Opt::find(name)?;
        Ok((opt.show)(&self.snapshot(env)?))
    }
}

static PROCESS: Mutex<Options> = Mutex::new(Options::new());

fn process_env(name: &str) -> Option<String> {
    std::env::var_os(name).map(|v| v.to_string_lossy().into_owned())
}

/// [`Options::set`] on the options of the process.
///
/// # Errors
/// As there.
pub fn set(name: &str, value: Option<&str>) -> Result<(), ConfigError> {
    PROCESS.lock().set(name, value)
}

/// Whether `value` is allowed for an option; nothing is set.
///
/// # Errors
/// As [`Options::set`].
pub fn check(name: &str, value: &str) -> Result<(), ConfigError> {
    Options::new().set(name, Some(value))
}

/// [`Options::get`] on the options of the process.
///
/// # Errors
/// As there.
pub fn get(name: &str) -> Result<String, ConfigError> {
    PROCESS.lock().get(name, process_env)
}

/// [`Options::snapshot`] of the options of the process.
///
/// # Errors
/// As there.
pub fn snapshot() -> Result<Config, ConfigError> {
    PROCESS.lock().snapshot(process_env)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn no_env(_: &str) -> Option<String> {
        None
    }

    #[test]
    fn every_way_to_be_wrong_has_its_message() {
        let k = "auto or a number of slots per layer, 0 (off) or more";
        let interval = "a number of tokens from 1 to 1048576";
        let cases = [
            ("moe-hot-k", "-3", k),
            ("moe-hot-k", "abc", k),
            ("moe-hot-k", "", k),
            ("moe-hot-k", "4294967296", k),
            ("moe-hot-k", "1.5", k),
            ("moe-hot-vram", "0", "a number of MiB from 1 to 16777216"),
            ("moe-hot-vram", "4G", "a number of MiB from 1 to 16777216"),
            ("moe-hot-auto-off", "no", "one of auto, on, off"),
            ("moe-hot-rebalance-interval", "0", interval),
            ("moe-hot-rebalance-interval", "1048577", interval),
            ("moe-hot-rebalance-interval", "often", interval),
            ("moe-hot-pp-bypass", "0", "auto or a number of tokens, 1 or more"),
            ("moe-hot-policy", "fifo", "auto or one of decay, lru, lfu, static, lfru, s3fifo, predict"),
            (
                "moe-hot-policy",
                "decay:window=9",
                "KEY=VALUE, with a key of half-life, gate, gate-tokens, margin, give-up, after decay, not 'window=9'",
            ),
            ("moe-hot-policy", "lru:margin=2", "nothing after lru, not 'margin=2'"),
            (
                "moe-hot-policy",
                "predict:shared=off,margin=-1",
                "margin to be a number from 0 to 100, or off, not '-1'",
            ),
            ("moe-hot-threads", "-1", "auto or a number of threads from 0 to 512"),
            ("moe-hot-threads", "513", "auto or a number of threads from 0 to 512"),
            ("moe-hot-link", "on", "auto or off"),
            ("moe-hot-kernels", "fast", "one of auto, rows, ggml"),
            ("moe-hot-profile", "", "the path of a file that --moe-hot-profile-out wrote"),
            ("moe-hot-profile-out", "", "the path of a file to write"),
            ("moe-hot-trace", "", "the path of a file to write"),
        ];
        for (name, value, allowed) in cases {
            let mut o = Options::new();
            let e = o.set(name, Some(value)).unwrap_err();
            assert_eq!(e.to_string(), format!("--{name}: '{value}' is not allowed, expected {allowed}"));
            assert_eq!(o.snapshot(no_env).unwrap(), Config::default(), "nothing has changed");

            let opt = OPTIONS.iter().find(|o| o.name == name).unwrap();
            let env = |n: &str| (n == opt.env).then(|| value.to_string());
            let e = o.snapshot(env).unwrap_err();
            assert_eq!(e.to_string(), format!("{}: '{value}' is not allowed, expected {allowed}", opt.env));
        }
    }

    #[test]
    fn an_unknown_option_is_refused_with_the_known_ones() {
        let e = Options::new().set("moe-hot-size", Some("1")).unwrap_err().to_string();
        assert!(e.starts_with("there is no option 'moe-hot-size', expected moe-hot-k, "), "{e}");
    }

    #[test]
    fn a_set_value_wins_over_the_environment_and_that_over_the_default() {
        let env = |n: &str| (n == "LLAMA_ARG_MOE_HOT_K").then(|| "16".to_string());
        let mut o = Options::new();
        assert_eq!(o.snapshot(no_env).unwrap().k, Some(0));
        assert_eq!(o.snapshot(env).unwrap().k, Some(16));
        o.set("moe-hot-k", Some("8")).unwrap();
        assert_eq!(o.snapshot(env).unwrap().k, Some(8));
        assert_eq!(o.get("moe-hot-k", env).unwrap(), "8");
        o.set("moe-hot-k", None).unwrap();
        assert_eq!(o.snapshot(env).unwrap().k, Some(16));
    }

    #[test]
    fn slots_are_asked_for_by_number_by_bytes_or_not() {
        let mut o = Options::new();
        let told = |o: &Options| {
            let c = o.snapshot(no_env).unwrap();
            (c.enabled(), c.slots_of(64), c.requested())
        };
        assert_eq!(told(&o), (false, 64, "K = 0".into()));
        o.set("moe-hot-vram", Some("300")).unwrap();
        assert_eq!(told(&o), (true, 64, "300 MiB".into()));
        o.set("moe-hot-k", Some("100")).unwrap();
        assert_eq!(told(&o), (true, 64, "K = 100, 300 MiB".into()));
        o.set("moe-hot-k", Some("auto")).unwrap();
        assert_eq!(told(&o), (true, 64, "K = auto, 300 MiB".into()));
        o.set("moe-hot-vram", None).unwrap();
        o.set("moe-hot-k", Some("16")).unwrap();
        assert_eq!(told(&o), (true, 16, "K = 16".into()));
    }

    #[test]
    fn what_is_asked_for_in_bytes() {
        let wanted = |options: &[(&str, &str)]| {
            let mut o = Options::new();
            for (name, value) in options {
                o.set(name, Some(value)).unwrap();
            }
            o.snapshot(no_env).unwrap().wanted(1 << 20, 64)
        };
        assert_eq!(wanted(&[]), 0);
        assert_eq!(wanted(&[("moe-hot-k", "16")]), 16 << 20);
        assert_eq!(wanted(&[("moe-hot-k", "100")]), 64 << 20, "there are no more experts");
        assert_eq!(wanted(&[("moe-hot-k", "16"), ("moe-hot-vram", "10")]), 10 << 20);
        assert_eq!(wanted(&[("moe-hot-vram", "10")]), 10 << 20);
        assert_eq!(wanted(&[("moe-hot-vram", "300")]), 64 << 20);
        assert_eq!(wanted(&[("moe-hot-k", "auto"), ("moe-hot-vram", "10")]), 10 << 20);
        assert_eq!(wanted(&[("moe-hot-k", "auto")]), 0, "whatever there is");
    }

    #[test]
    fn all_values_arrive() {
        let mut o = Options::new();
        for (name, value) in [
            ("moe-hot-k", "16"),
            ("moe-hot-vram", "300"),
            ("moe-hot-auto-off", "on"),
            ("moe-hot-rebalance-interval", "1"),
            ("moe-hot-pp-bypass", "4"),
            ("moe-hot-policy", "predict:margin=0.2:shared=off"),
            ("moe-hot-threads", "0"),
            ("moe-hot-link", "off"),
            ("moe-hot-kernels", "ggml"),
            ("moe-hot-profile", "/tmp/p"),
            ("moe-hot-profile-out", "/tmp/o"),
            ("moe-hot-trace", "/tmp/t"),
        ] {
            o.set(name, Some(value)).unwrap();
            assert_eq!(o.get(name, no_env).unwrap(), value);
        }
        let expected = Config {
            k: Some(16),
            vram: Some(300 << 20),
            auto_off: AutoOff::On,
            rebalance_interval: 1,
            link: false,
            kernels: Kernels::Ggml,
            pp_bypass: Some(4),
            policy: Some("predict:margin=0.2:shared=off".parse().unwrap()),
            threads: Some(0),
            profile: Some("/tmp/p".into()),
            profile_out: Some("/tmp/o".into()),
            trace: Some("/tmp/t".into()),
        };
        assert_eq!(o.snapshot(no_env).unwrap(), expected);
        o.set("moe-hot-threads", Some("auto")).unwrap();
        o.set("moe-hot-policy", Some("auto")).unwrap();
        let auto = o.snapshot(no_env).unwrap();
        assert_eq!((auto.threads, auto.policy), (None, None));
        assert_eq!(
            [true, false].map(|gpu| auto.policy_of(gpu).kind()),
            [PolicyKind::Predict, PolicyKind::Decay]
        );
    }
}
