//! Names and values of options, set and from the environment.

use arbitrary::{Arbitrary, Unstructured};
use moe_hot::{
    config::{Config, Options},
    policy::PolicySpec,
};

use super::memory::bounded;

/// Messages name what is allowed, whatever the value; each value is kept.
const PER_BYTE: usize = 256;
const FIXED: usize = 64 << 10;

/// The options, and the variable that stands for each.
pub const OPTIONS: [(&str, &str); 12] = [
    ("moe-hot-k", "LLAMA_ARG_MOE_HOT_K"),
    ("moe-hot-rebalance-interval", "LLAMA_ARG_MOE_HOT_REBALANCE_INTERVAL"),
    ("moe-hot-pp-bypass", "LLAMA_MOE_HOT_PP_BYPASS_N_TOKENS"),
    ("moe-hot-policy", "LLAMA_ARG_MOE_HOT_POLICY"),
    ("moe-hot-threads", "LLAMA_ARG_MOE_HOT_THREADS"),
    ("moe-hot-link", "LLAMA_ARG_MOE_HOT_LINK"),
    ("moe-hot-kernels", "LLAMA_ARG_MOE_HOT_KERNELS"),
    ("moe-hot-profile", "LLAMA_ARG_MOE_HOT_PROFILE"),
    ("moe-hot-profile-out", "LLAMA_ARG_MOE_HOT_PROFILE_OUT"),
    ("moe-hot-trace", "LLAMA_ARG_MOE_HOT_TRACE"),
    ("moe-hot-vram", "LLAMA_ARG_MOE_HOT_VRAM"),
    ("moe-hot-auto-off", "LLAMA_ARG_MOE_HOT_AUTO_OFF"),
];

#[derive(Arbitrary, Debug)]
enum Name<'a> {
    Known(u8),
    Other(&'a str),
}

#[derive(Arbitrary, Debug)]
struct Set<'a> {
    name: Name<'a>,
    value: Option<&'a str>,
    /// Through the environment.
    env: bool,
}

/// What is refused changes nothing and is named; what is accepted is shown in a form that means the same.
pub fn run(data: &[u8]) {
    let Ok(calls) = Vec::<Set>::arbitrary_take_rest(Unstructured::new(data)) else { return };
    bounded(FIXED + PER_BYTE * data.len(), || {
        let mut options = Options::new();
        for Set { name, value, env } in &calls {
            let (name, variable) = match name {
                Name::Known(i) => OPTIONS[usize::from(*i) % OPTIONS.len()],
                Name::Other(name) => (*name, ""),
            };
            if *env {
                from_environment(&options, name, variable, *value);
            } else {
                set(&mut options, name, *value);
            }
            if let Some(value) = value {
                policies(value);
            }
        }
    });
}

fn snapshot(options: &Options) -> Config {
    options.snapshot(|_| None).expect("only what is allowed was kept")
}

fn set(options: &mut Options, name: &str, value: Option<&str>) {
    let before = snapshot(options);
    match options.set(name, value) {
        Ok(()) => {
            let after = snapshot(options);
            let shown = options.get(name, |_| None).expect("a known name");
            // an option of a path that is not set has no text that means so
            if !shown.is_empty() {
                options.set(name, Some(&shown)).expect("what is shown can be set");
                assert_eq!(snapshot(options), after, "--{name} {value:?} is shown as {shown}");
            }
        }
        Err(e) => {
            let e = e.to_string();
            assert!(
                e.contains(name) && (e.starts_with("there is no option ") || e.contains(value.unwrap())),
                "{e}"
            );
            assert_eq!(snapshot(options), before);
        }
    }
}

fn from_environment(options: &Options, name: &str, variable: &str, value: Option<&str>) {
    let env = |n: &str| value.filter(|_| n == variable).map(str::to_string);
    match (options.snapshot(env), options.get(name, env)) {
        (Ok(_), Ok(_)) => {}
        (Err(e), _) => assert!(e.to_string().starts_with(variable), "{e}"),
        (Ok(_), Err(e)) => assert!(e.to_string().starts_with("there is no option "), "{e}"),
    }
}

/// A list of policies as `moe-hot replay` takes it.
fn policies(text: &str) {
    match PolicySpec::list(text) {
        Ok(specs) => {
            for spec in specs {
                assert_eq!(spec.to_string().parse(), Ok(spec));
            }
        }
        Err(e) => assert!(!e.to_string().is_empty()),
    }
}
