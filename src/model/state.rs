//! What others can see of a pool while it runs, and change.

use std::time::Instant;

use base64::{Engine as _, prelude::BASE64_STANDARD};
use serde::{Deserialize, Serialize};

use super::{Active, Model, WATCHED, Watch, ranges};
use crate::{config, policy, telemetry::Stats};

/// A pool, as JSON shows it.
#[derive(Serialize, Debug)]
#[expect(missing_docs, reason = "docs/live-view.md describes the fields")]
pub struct State {
    pub name: String,
    pub state: Activity,
    pub why: String,
    pub requested: Requested,
    pub k: u32,
    pub frozen: bool,
    pub interval: u32,
    pub policy: String,
    pub link: bool,
    pub threads: usize,
    pub device: String,
    pub slots: usize,
    pub slots_max: u32,
    pub slots_used: usize,
    pub slot_bytes: u64,
    pub slot_bytes_max: u64,
    pub registered_bytes: usize,
    pub free_bytes: Option<u64>,
    pub stats: Stats,
    pub classes: Vec<ClassState>,
    pub skipped: Vec<Skipped>,
    pub layers: Vec<LayerState>,
    pub swaps: Vec<SwapState>,
}

/// Whether the slots are used, and follow the text.
#[derive(Serialize, Clone, Copy, PartialEq, Eq, Debug)]
#[serde(rename_all = "lowercase")]
pub enum Activity {
    /// They are used, and experts are swapped.
    On,
    /// No swaps, on request.
    Frozen,
    /// No swaps: the policy has found that they gain nothing.
    Idle,
    /// The stock graph is computed: slots do not pay.
    Off,
}

#[derive(Serialize, Debug)]
#[expect(missing_docs, reason = "docs/live-view.md describes the fields")]
pub struct Requested {
    pub k: Option<u32>,
    pub vram_mib: Option<u64>,
    pub auto: bool,
}

#[derive(Serialize, Debug)]
#[expect(missing_docs, reason = "docs/live-view.md describes the fields")]
pub struct ClassState {
    pub layers: String,
    pub types: Vec<&'static str>,
    pub experts: u32,
    pub used: usize,
    pub expert_bytes: usize,
    pub slots: usize,
    pub slots_max: u32,
    pub slots_used: usize,
    pub hits: u64,
    pub misses: u64,
}

#[derive(Serialize, Debug)]
#[expect(missing_docs, reason = "docs/live-view.md describes the fields")]
pub struct Skipped {
    pub layers: String,
    pub reason: String,
}

#[derive(Serialize, Debug)]
#[expect(missing_docs, reason = "docs/live-view.md describes the fields")]
pub struct LayerState {
    pub il: usize,
    pub class: usize,
    pub experts: usize,
    pub heat: String,
    pub resident: String,
}

#[derive(Serialize, Debug)]
#[expect(missing_docs, reason = "docs/live-view.md describes the fields")]
pub struct SwapState {
    pub token: u64,
    pub il: usize,
    pub expert: u16,
    pub evicted_il: i64,
    pub evicted: i64,
}

/// What may be changed while the pool is in use. What is not named stays.
#[derive(Deserialize, Default, Debug)]
#[serde(deny_unknown_fields)]
pub struct Change {
    /// Which model; may be left out where there is one.
    pub model: Option<String>,
    /// Slots a layer on average.
    pub k: Option<u32>,
    /// MiB of slots.
    pub vram_mib: Option<u64>,
    /// Tokens between two plans.
    pub interval: Option<u32>,
    /// Who decides.
    pub policy: Option<String>,
    /// No swaps.
    pub frozen: Option<bool>,
    /// Write the profile now.
    #[serde(default)]
    pub save_profile: bool,
}

impl Model {
    /// What people call the model; `None` before activation.
    pub fn name(&self) -> Option<&str> {
        self.active().map(|a| a.name.as_str())
    }

    /// What the pool is and does now. `look`: with the heat of experts, which is kept from now on for as long as somebody
    /// asks.
    pub fn state(&self, look: bool) -> Option<State> {
        self.active().map(|a| a.state(&self.config, look))
    }

    /// Changes what `change` names.
    ///
    /// # Errors
    /// Names the field, the value and what is allowed; nothing of the pool has changed then.
    pub fn steer(&self, change: &Change) -> Result<(), String> {
        let a = self.active().ok_or("the model has no slots")?;
        let checked = |option: &str, value: String| {
            config::check(option, &value).map_err(|e| e.to_string().trim_start_matches("--").to_string())
        };
        if let Some(n) = change.interval {
            checked("moe-hot-rebalance-interval", n.to_string())?;
        }
        let read = |name: &String| {
            let spec = config::policy(name)
                .map_err(|allowed| format!("policy: '{name}' is not allowed, expected {allowed}"))?;
            Ok::<_, String>(spec.unwrap_or(config::usual_policy(a.device.is_gpu())))
        };
        let spec = change.policy.as_ref().map(read).transpose()?;
        let bytes = match (change.k, change.vram_mib) {
            (Some(_), Some(_)) => return Err("k and vram_mib: expected one of them".into()),
            (Some(k), None) => {
                let most = a.layers.iter().map(|l| l.n_expert as u32).max().unwrap_or(0);
                if !(1..=most).contains(&k) {
                    return Err(format!(
                        "k: '{k}' is not allowed, expected a number of slots per layer from 1 to {most}"
                    ));
                }
                let each = |l: &crate::cold::Layer| (k as usize).min(l.n_expert) * l.expert_bytes();
                Some(a.layers.iter().map(each).sum::<usize>() as u64)
            }
            (None, Some(mib)) => {
                checked("moe-hot-vram", mib.to_string())?;
                Some(mib << 20)
            }
            (None, None) => None,
        };
        if change.save_profile {
            a.planner.save_profile().map_err(|e| format!("save_profile: {e}"))?;
        }
        if let Some(bytes) = bytes {
            let name = if change.k.is_some() { "k" } else { "vram_mib" };
            self.resize(bytes).map_err(|e| format!("{name}: {e}"))?;
        }
        if let Some(spec) = spec {
            let mut c = a.control.lock();
            // its plan was for the policy before
            c.planning = false;
            let n_slots: Vec<usize> = c.classes.iter().map(|k| k.table.open()).collect();
            a.planner.replace(|shape| policy::build(spec, shape), &n_slots);
            *a.policy.lock() = spec;
        }
        let mut c = a.control.lock();
        c.interval = change.interval.unwrap_or(c.interval);
        c.frozen = change.frozen.unwrap_or(c.frozen);
        Ok(())
    }
}

impl Active {
    fn activity(&self, frozen: bool, verdict: Option<crate::judge::Verdict>) -> (Activity, String) {
        match verdict {
            Some(v) if !v.on => (Activity::Off, format!("the slots do not pay: {v}")),
            _ if frozen => (Activity::Frozen, "no swaps, on request".into()),
            _ if self.planner.gave_up() => {
                (Activity::Idle, "all experts are used alike, swaps gain nothing".into())
            }
            _ => (Activity::On, String::new()),
        }
    }

    fn state(&self, config: &config::Config, look: bool) -> State {
        let mut c = self.control.lock();
        if look {
            c.watch.get_or_insert_with(|| Watch::new(self)).until = Instant::now() + WATCHED;
        }
        let (frozen, verdict, interval) = (c.frozen, c.verdict, c.interval);
        let il = |class: usize, layer: u16| {
            self.layers[self.classes[class].layers[usize::from(layer)]].il as usize
        };
        let swaps = c.last.iter().map(|(token, class, s)| SwapState {
            token: *token,
            il: il(*class, s.admit.layer),
            expert: s.admit.expert,
            evicted_il: s.evict.map_or(-1, |e| il(*class, e.layer) as i64),
            evicted: s.evict.map_or(-1, |e| i64::from(e.expert)),
        });
        let swaps = swaps.collect();
        let class = |(class, control): (&super::Class, &super::ClassControl)| {
            let first = &self.layers[class.layers[0]];
            ClassState {
                layers: ranges(class.layers.iter().map(|l| self.layers[*l].il)),
                types: first.matrices().map(|m| crate::ggml::type_name(m.ty)).collect(),
                experts: class.layers.iter().map(|l| self.layers[*l].n_expert as u32).max().unwrap_or(0),
                used: first.n_used,
                expert_bytes: class.expert_bytes,
                slots: control.table.open(),
                slots_max: class.capacity,
                slots_used: control.table.resident(),
                hits: control.hits,
                misses: control.misses,
            }
        };
        let classes: Vec<ClassState> = self.classes.iter().zip(&c.classes).map(class).collect();
        let worth = c.watch.as_ref().map_or(1.0, |w| w.worth);
        let hottest = c.watch.iter().flat_map(|w| w.uses.iter().flatten()).fold(0.0f32, |a, b| a.max(*b));
        let layers = if look {
            let layer = |(i, l): (usize, &crate::cold::Layer)| {
                let uses = c.watch.as_ref().map(|w| w.uses[i].as_slice()).unwrap_or_default();
                // under a use or so the hottest is no measure
                let full = hottest.max(worth);
                let heat: Vec<u8> = uses.iter().map(|u| (255.0 * u / full).round() as u8).collect();
                let mut resident = vec![0u8; l.n_expert.div_ceil(8)];
                for e in (0..l.n_expert).filter(|e| self.maps[i].slot(*e) >= 0) {
                    resident[e / 8] |= 1 << (e % 8);
                }
                LayerState {
                    il: l.il as usize,
                    class: self.place[i].0,
                    experts: l.n_expert,
                    heat: BASE64_STANDARD.encode(heat),
                    resident: BASE64_STANDARD.encode(resident),
                }
            };
            self.layers.iter().enumerate().map(layer).collect()
        } else {
            Vec::new()
        };
        let stats = c.stats;
        drop(c);
        let (state, why) = self.activity(frozen, verdict);
        State {
            name: self.name.clone(),
            state,
            why,
            requested: Requested {
                k: config.k.filter(|k| *k > 0),
                vram_mib: config.vram.map(|b| b >> 20),
                auto: config.k.is_none(),
            },
            k: (classes.iter().map(|c| c.slots).sum::<usize>() / self.layers.len()) as u32,
            frozen,
            interval,
            policy: self.policy.lock().to_string(),
            link: self.links.iter().any(|l| !l.is_empty()),
            threads: self.workers.len(),
            device: self.pci.as_ref().map_or("host memory".into(), |pci| format!("GPU {pci}")),
            slots: classes.iter().map(|c| c.slots).sum(),
            slots_max: classes.iter().map(|c| c.slots_max).sum(),
            slots_used: classes.iter().map(|c| c.slots_used).sum(),
            slot_bytes: self.slot_bytes(),
            slot_bytes_max: self.capacity_bytes(),
            registered_bytes: self.registered,
            free_bytes: self.device.free(self.slot_bytes()).ok(),
            stats,
            classes,
            skipped: self
                .skipped
                .iter()
                .map(|(reason, layers)| Skipped {
                    layers: ranges(layers.iter().copied()),
                    reason: reason.clone(),
                })
                .collect(),
            layers,
            swaps,
        }
    }
}
