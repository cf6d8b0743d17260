//! Counters and gauges in Prometheus' text format.

use std::fmt::Write as _;

use crate::{
    model::state::{Activity, State},
    telemetry::seconds,
};

/// A metric: its name without prefix, its help text, and its value in a pool.
type Metric = (&'static str, &'static str, fn(&State) -> Option<f64>);

const COUNTERS: [Metric; 13] = [
    ("tokens_total", "Tokens decoded with slots.", |s| Some(s.stats.tokens as f64)),
    ("hits_total", "Routed experts that had a slot.", |s| Some(s.stats.hits as f64)),
    ("misses_total", "Routed experts that had none.", |s| Some(s.stats.misses as f64)),
    ("linked_total", "Routed experts that the GPU read over the link.", |s| Some(s.stats.linked as f64)),
    ("uploads_total", "Experts copied into a slot.", |s| Some(s.stats.uploads as f64)),
    ("upload_bytes_total", "Bytes copied into slots.", |s| Some(s.stats.upload_bytes as f64)),
    ("evictions_total", "Experts that lost their slot.", |s| Some(s.stats.evictions as f64)),
    ("copy_failures_total", "Copies into a slot that failed.", |s| Some(s.stats.copy_failures as f64)),
    ("rebalances_total", "Plans that took effect.", |s| Some(s.stats.rebalances as f64)),
    ("rebalance_seconds_total", "Time of plans on the decode thread.", |s| {
        Some(seconds(s.stats.rebalance_us))
    }),
    ("join_wait_seconds_total", "Time the graph worked on or waited for experts without a slot.", |s| {
        Some(seconds(s.stats.join_wait_us))
    }),
    ("worker_busy_seconds_total", "Time threads computed experts without a slot, over all threads.", |s| {
        Some(seconds(s.stats.worker_busy_us))
    }),
    ("step_seconds_total", "Time of decode steps with slots.", |s| Some(seconds(s.stats.step_us))),
];

const GAUGES: [Metric; 6] = [
    ("slots", "Slots that there are.", |s| Some(s.slots as f64)),
    ("slots_used", "Slots that hold an expert.", |s| Some(s.slots_used as f64)),
    ("slot_bytes", "Bytes of all slots.", |s| Some(s.slot_bytes as f64)),
    ("free_bytes", "Bytes that are free where the slots are.", |s| s.free_bytes.map(|b| b as f64)),
    ("registered_bytes", "Bytes of weights in host memory that the GPU reads in place.", |s| {
        Some(s.registered_bytes as f64)
    }),
    ("hits_per_upload", "Hits for each expert that was copied into a slot.", |s| {
        Some(s.stats.hits as f64 / s.stats.uploads as f64).filter(|v| v.is_finite())
    }),
];

const STATES: [(Activity, &str); 4] =
    [(Activity::On, "on"), (Activity::Frozen, "frozen"), (Activity::Idle, "idle"), (Activity::Off, "off")];

/// All metrics of all pools; nothing without a pool.
pub fn text(models: &[State]) -> String {
    let mut out = String::new();
    if models.is_empty() {
        return out;
    }
    // writing to a string does not fail
    let head = |out: &mut String, name: &str, help: &str, kind: &str| {
        let _ = writeln!(out, "# HELP llamacpp:moe_hot_{name} {help}\n# TYPE llamacpp:moe_hot_{name} {kind}");
    };
    for (kind, metrics) in [("counter", &COUNTERS[..]), ("gauge", &GAUGES[..])] {
        for (name, help, value) in metrics {
            head(&mut out, name, help, kind);
            for m in models {
                if let Some(value) = value(m) {
                    let _ = writeln!(out, "llamacpp:moe_hot_{name}{{model=\"{}\"}} {value}", label(&m.name));
                }
            }
        }
    }
    head(
        &mut out,
        "state",
        "1 for what the slots do now: on, frozen, idle (swaps gain nothing), off (they do not pay).",
        "gauge",
    );
    for m in models {
        for (state, name) in STATES {
            let is = u8::from(m.state == state);
            let _ =
                writeln!(out, "llamacpp:moe_hot_state{{model=\"{}\",state=\"{name}\"}} {is}", label(&m.name));
        }
    }
    out
}

/// A label's value, with what would end it escaped.
fn label(text: &str) -> String {
    text.replace('\\', "\\\\").replace('"', "\\\"").replace('\n', "\\n")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_what_prometheus_expects() {
        for (name, help, _) in COUNTERS {
            assert!(name.ends_with("_total") && help.ends_with('.'), "{name}");
        }
        for (name, help, _) in GAUGES {
            assert!(!name.ends_with("_total") && help.ends_with('.'), "{name}");
        }
    }

    #[test]
    fn labels_stay_within_their_quotes() {
        assert_eq!(label("a \"b\" \\ c\nd"), r#"a \"b\" \\ c\nd"#);
    }
}
