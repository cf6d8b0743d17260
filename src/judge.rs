//! Whether the slots pay: now and then a run decodes a few tokens on the stock graph and compares.
//!
//! Blocks of steps alternate between the two, so that what slows the machine down slows both, and the first steps of a
//! block, which build and capture its graph, do not count. A trial costs a few dozen steps of the slower kind, and the
//! time to the next one doubles as long as the answer stays the same.

use std::{
    fmt::{self, Display, Formatter},
    mem,
};

/// Tokens with slots before a trial: the slots have to fill, and the division of cold experts to settle.
const WARM: u32 = 256;
/// Tokens from a trial to the next one, at first and at most.
const PAUSE: (u32, u32) = (4096, 65536);
/// Steps of a block, and how many of them count: the last ones.
const BLOCK: (u32, u32) = (12, 8);
/// Blocks of each kind, at least and at most.
const BLOCKS: (usize, usize) = (2, 6);
/// With a difference above this share no more blocks are needed.
const CLEAR: f64 = 0.05;
/// Slots that cost more than this share of a step are left.
const LOSS: f64 = 0.005;
/// Slots have to win this share of a step to be used again.
const GAIN: f64 = 0.02;

/// What a trial found, in us a step.
#[derive(Clone, Copy, PartialEq, Debug)]
pub struct Verdict {
    /// Median step with slots.
    pub slots_us: f64,
    /// Median step on the stock graph.
    pub stock_us: f64,
    /// Whether slots are used from now on.
    pub on: bool,
    /// Whether that is another answer than before.
    pub changed: bool,
}

impl Display for Verdict {
    fn fmt(&self, f: &mut Formatter<'_>) -> fmt::Result {
        let (slots, stock) = (self.slots_us / 1e3, self.stock_us / 1e3);
        write!(f, "a token took {slots:.2} ms with them and {stock:.2} ms without")
    }
}

#[derive(Debug)]
enum Phase {
    /// So many tokens to the next trial, or to the warm-up before it.
    Rest {
        tokens: u32,
    },
    /// With slots, before a trial.
    Warm {
        tokens: u32,
    },
    Trial {
        slots: bool,
        steps: u32,
        us: Vec<f64>,
        with_slots: Vec<f64>,
        stock: Vec<f64>,
    },
}

/// Decides between slots and the stock graph for one context.
#[derive(Debug)]
pub struct Judge {
    on: bool,
    pause: u32,
    phase: Phase,
}

impl Default for Judge {
    fn default() -> Self {
        Judge { on: true, pause: PAUSE.0, phase: Phase::Warm { tokens: WARM } }
    }
}

impl Judge {
    /// Whether the next step uses slots.
    pub fn slots(&self) -> bool {
        match self.phase {
            Phase::Rest { .. } => self.on,
            Phase::Warm { .. } => true,
            Phase::Trial { slots, .. } => slots,
        }
    }

    /// Whether nothing but the stock graph is computed for a while.
    pub fn is_off(&self) -> bool {
        !self.on && matches!(self.phase, Phase::Rest { .. })
    }

    /// A step of one token took `us`, with slots or without.
    pub fn observe(&mut self, slots: bool, us: u64) -> Option<Verdict> {
        match &mut self.phase {
            Phase::Rest { tokens } | Phase::Warm { tokens } if *tokens > 1 => *tokens -= 1,
            Phase::Rest { .. } if !self.on => self.phase = Phase::Warm { tokens: WARM },
            Phase::Rest { .. } | Phase::Warm { .. } => {
                let (us, with_slots, stock) = Default::default();
                self.phase = Phase::Trial { slots: false, steps: 0, us, with_slots, stock };
            }
            // the graph was built before the block began
            Phase::Trial { slots: expected, .. } if *expected != slots => {}
            Phase::Trial { slots, steps, us: block, with_slots, stock } => {
                *steps += 1;
                if *steps > BLOCK.0 - BLOCK.1 {
                    block.push(us as f64);
                }
                if *steps == BLOCK.0 {
                    let us = median(&mut mem::take(block));
                    if *slots {
                        with_slots.push(us)
                    } else {
                        stock.push(us)
                    }
                    (*slots, *steps) = (!*slots, 0);
                    if with_slots.len() == stock.len() {
                        return self.judge();
                    }
                }
            }
        }
        None
    }

    /// After as many blocks of each kind.
    fn judge(&mut self) -> Option<Verdict> {
        let Phase::Trial { with_slots, stock, .. } = &mut self.phase else { return None };
        let n = stock.len();
        if n < BLOCKS.0 {
            return None;
        }
        // pairs of neighbours: a machine that gets slower meanwhile is no reason
        let mut gains: Vec<f64> =
            with_slots.iter().zip(&*stock).map(|(slots, stock)| 1.0 - slots / stock).collect();
        let clear = gains.iter().all(|g| *g > CLEAR) || gains.iter().all(|g| *g < -CLEAR);
        if !clear && n < BLOCKS.1 {
            return None;
        }
        let gain = median(&mut gains);
        let on = if self.on { gain > -LOSS } else { gain > GAIN };
        let (slots_us, stock_us) = (median(with_slots), median(stock));
        let changed = on != self.on;
        self.pause = if changed { PAUSE.0 } else { (self.pause * 2).min(PAUSE.1) };
        self.on = on;
        self.phase = Phase::Rest { tokens: self.pause };
        Some(Verdict { slots_us, stock_us, on, changed })
    }
}

fn median(values: &mut [f64]) -> f64 {
    values.sort_unstable_by(f64::total_cmp);
    let n = values.len();
    (values[(n - 1) / 2] + values[n / 2]) / 2.0
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Decodes `n` tokens; what they took, and what the judge said.
    fn decode(j: &mut Judge, n: u32, slots_us: impl Fn(u32) -> u64, stock_us: u64) -> (u64, Vec<Verdict>) {
        let (mut total, mut said) = (0, Vec::new());
        for t in 0..n {
            let slots = j.slots();
            let us = if slots { slots_us(t) } else { stock_us };
            total += us;
            said.extend(j.observe(slots, us));
        }
        (total, said)
    }

    #[test]
    fn slots_that_pay_stay_and_trials_cost_next_to_nothing() {
        let mut j = Judge::default();
        let n = 100_000;
        let (total, said) = decode(&mut j, n, |_| 10_000, 25_000);
        assert!(said.iter().all(|v| v.on && !v.changed) && (3..8).contains(&said.len()), "{said:?}");
        assert!((total as f64) < 1.004 * f64::from(n) * 10_000.0, "{total}");
    }

    #[test]
    fn slots_that_cost_are_left_and_the_run_is_as_fast_as_stock() {
        let mut j = Judge::default();
        let n = 100_000;
        let (total, said) = decode(&mut j, n, |_| 11_000, 10_000);
        assert!(said[0].changed && !said[0].on && !said[1].changed, "{said:?}");
        assert!((total as f64) < 1.01 * f64::from(n) * 10_000.0, "{total}");
    }

    #[test]
    fn slots_come_back_when_the_traffic_suits_them() {
        let mut j = Judge::default();
        let (_, said) = decode(&mut j, 30_000, |t| if t < 5_000 { 12_000 } else { 7_000 }, 10_000);
        let changes: Vec<bool> = said.iter().filter(|v| v.changed).map(|v| v.on).collect();
        assert_eq!(changes, [false, true], "{said:?}");
        assert!(j.slots());
    }

    #[test]
    fn noise_does_not_turn_slots_off() {
        // a third of the steps is twice as slow, on the stock graph as well
        let mut j = Judge::default();
        let mut said = Vec::new();
        for t in 0..40_000u64 {
            let slots = j.slots();
            let noise = if (t * 7919) % 97 < 32 { 2 } else { 1 };
            said.extend(j.observe(slots, noise * if slots { 9_000 } else { 10_000 }));
        }
        assert!(!said.is_empty() && said.iter().all(|v| v.on), "{said:?}");
    }

    #[test]
    fn steps_of_a_graph_from_before_do_not_count() {
        let mut j = Judge::default();
        decode(&mut j, WARM, |_| 1, 1);
        assert!(!j.slots());
        for _ in 0..100 {
            assert_eq!(j.observe(true, 1), None, "asked for stock, and got slots");
        }
        assert!(!j.slots());
    }
}
