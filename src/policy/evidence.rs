//! Whether swaps gain anything.
//!
//! Each swap that a policy wants is followed for a while, whether or not it was made: the uses of who comes
//! less the uses of who leaves. Where the router uses all experts alike, whatever the text, that is
//! zero on average however the policy chooses, and every copy is for nothing.

use std::collections::VecDeque;

use super::{PoolShape, Swap};

/// Steps until a swap is made and its copy done: nothing that is used before gains by it.
const DELAY: u64 = 2;
/// Steps that a swap is followed for after that.
const FOLLOWED: u64 = 32;
/// Swaps remembered.
const MEMORY: f64 = 256.0;
/// Uses that a swap has to gain on average. On text it is 0.5 to 5; where it is zero, the mean over this
/// memory soon comes below this ...
const STOP: f64 = 0.1;
/// ... and does not come above this by chance: then swaps would begin again.
const RESUME: f64 = 0.8;
/// Most that a margin grows.
const MOST_CAUTION: f64 = 3.0;
/// What swaps are taken to gain before any was followed to its end ...
const PRIOR: f64 = 2.0;
/// ... and how many swaps' worth this is.
const PRIOR_WEIGHT: f64 = 16.0;
/// So many uses without a slot count as a swap that gains nothing: a policy that wants none while they go on
/// has nothing to gain either.
const IDLE: f64 = 200.0;

struct Trade {
    /// Step at which it was wanted.
    at: u64,
    admit: u32,
    evict: u32,
    /// Uses of the one less those of the other until it would have been made.
    before: i64,
}

pub struct Evidence {
    shape: PoolShape,
    now: u64,
    /// Uses of each expert.
    uses: Vec<u32>,
    /// In the order of `at`.
    trades: VecDeque<Trade>,
    /// How many of them, from the front, would have been made by now.
    made: usize,
    /// Who would come by one of them. Wanted again while followed, a swap tells nothing new.
    followed: Vec<bool>,
    /// Sum of what they gained and number, the older the less.
    gain: f64,
    weight: f64,
    gave_up: bool,
}

impl Evidence {
    pub fn new(shape: PoolShape) -> Self {
        Evidence {
            shape,
            now: 0,
            uses: vec![0; shape.n_keys()],
            trades: VecDeque::new(),
            made: 0,
            followed: vec![false; shape.n_keys()],
            gain: PRIOR * PRIOR_WEIGHT,
            weight: PRIOR_WEIGHT,
            gave_up: false,
        }
    }

    /// One step of decode; `misses` of the uses were of experts without a slot.
    pub fn step(&mut self, uses: &[u32], misses: usize) {
        self.now += 1;
        for i in uses {
            let n = &mut self.uses[*i as usize];
            *n = n.wrapping_add(1);
        }
        while let Some(trade) = self.trades.get_mut(self.made).filter(|t| t.at + DELAY <= self.now) {
            trade.before = difference(&self.uses, trade);
            self.made += 1;
        }
        while self.trades.front().is_some_and(|t| t.at + DELAY + FOLLOWED <= self.now) {
            let trade = self.trades.pop_front().expect("there is one");
            self.made -= 1;
            self.followed[trade.admit as usize] = false;
            let gain = difference(&self.uses, &trade) - trade.before;
            self.remember(gain as f64, 1.0);
        }
        self.remember(0.0, misses as f64 / IDLE);
        self.gave_up = self.mean() < if self.gave_up { RESUME } else { STOP };
    }

    /// Swaps in number `weight` that gained `gain` together.
    fn remember(&mut self, gain: f64, weight: f64) {
        let keep = (1.0 - weight / MEMORY).max(0.0);
        self.gain = self.gain * keep + gain;
        self.weight = self.weight * keep + weight;
    }

    /// Another text: nothing that was wanted for the last one can be followed further.
    pub fn cut(&mut self) {
        self.trades.clear();
        self.made = 0;
        self.followed.fill(false);
    }

    /// The swaps that the policy wants now, made or not.
    pub fn watch(&mut self, wanted: &[Swap]) {
        for s in wanted {
            if let Some(evict) = s.evict {
                let (admit, evict) = (self.shape.index(s.admit) as u32, self.shape.index(evict) as u32);
                if !std::mem::replace(&mut self.followed[admit as usize], true) {
                    self.trades.push_back(Trade { at: self.now, admit, evict, before: 0 });
                }
            }
        }
    }

    /// Uses that a swap gains on average.
    fn mean(&self) -> f64 {
        self.gain / self.weight
    }

    /// By how much a margin should grow so that a swap gains a use at least: its copy reads as much as that.
    pub fn caution(&self) -> f32 {
        (1.0 / self.mean().max(1.0 / MOST_CAUTION)).max(1.0) as f32
    }

    pub fn gave_up(&self) -> bool {
        self.gave_up
    }
}

/// Takes away the swaps from `from` on that evict.
pub fn keep_fills(swaps: &mut Vec<Swap>, from: usize) {
    let fills = swaps.split_off(from).into_iter().filter(|s| s.evict.is_none());
    swaps.extend(fills);
}

/// Uses so far of who comes less those of who leaves.
fn difference(uses: &[u32], trade: &Trade) -> i64 {
    i64::from(uses[trade.admit as usize]) - i64::from(uses[trade.evict as usize])
}
