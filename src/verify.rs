//! Compares slots with the experts they were copied from, byte by byte: a diagnosis, off in all real use.
//!
//! `MOE_HOT_VERIFY=1` asks for it when a context ends, a larger number N also after every N of its steps. What is
//! compared are the experts that a dispatch can find; a slot that is being filled belongs to nobody yet.

use std::fmt::{self, Display, Formatter};

use crate::{
    cold::Layer,
    log::{Level, log},
    model::Model,
};

/// Differences that are told one by one.
const MOST_TOLD: u64 = 8;

/// What was asked for and what was found so far, for one context.
#[derive(Debug, Default)]
pub struct Verify {
    /// Steps between two looks; 0: only when the context ends.
    every: u64,
    steps: u64,
    looks: u64,
    slots: u64,
    bytes: u64,
    differences: u64,
    unread: u64,
}

/// A matrix of an expert whose slot holds other bytes.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Difference {
    /// Layer index in the model.
    pub il: i32,
    /// The expert that the map finds there.
    pub expert: usize,
    /// The slot in the layer's class.
    pub slot: u32,
    /// Which matrix.
    pub matrix: &'static str,
    /// The first byte that differs.
    pub at: usize,
    /// Bytes of the matrix.
    pub bytes: usize,
}

impl Display for Difference {
    fn fmt(&self, f: &mut Formatter<'_>) -> fmt::Result {
        let Difference { il, expert, slot, matrix, at, bytes } = self;
        write!(f, "layer {il}, expert {expert} in slot {slot}: {matrix} differs from byte {at} of {bytes} on")
    }
}

impl Verify {
    const VARIABLE: &str = "MOE_HOT_VERIFY";

    /// As the environment asks for; what is not allowed there is said.
    pub fn from_env() -> Option<Self> {
        let value = std::env::var_os(Self::VARIABLE)?;
        let verify = Self::parse(&value.to_string_lossy());
        verify.map_err(|e| log!(Level::Error, "moe-hot: {e}")).ok()
    }

    fn parse(value: &str) -> Result<Self, String> {
        match value.parse() {
            Ok(1) => Ok(Verify::default()),
            Ok(n) if n > 1 => Ok(Verify { every: n, ..Verify::default() }),
            _ => {
                let name = Self::VARIABLE;
                Err(format!(
                    "{name}: '{value}' is not allowed, expected 1, or a number of steps from 2 on; slots are not verified"
                ))
            }
        }
    }

    /// A step has ended; looks if it is time to.
    pub fn step_end(&mut self, model: &Model) {
        self.steps += 1;
        if self.every > 0 && self.steps.is_multiple_of(self.every) {
            self.look(model);
        }
    }

    /// Looks a last time and says what was found.
    pub fn end(&mut self, model: &Model) {
        self.look(model);
        let level = if self.differences + self.unread > 0 { Level::Error } else { Level::Info };
        log!(level, "moe-hot: {self}");
    }

    /// Compares all slots that are in use; they do not change meanwhile.
    fn look(&mut self, model: &Model) {
        self.looks += 1;
        model.hold_slots(|| {
            for layer in 0..model.layers().len() {
                self.look_at(model, layer);
            }
        });
    }

    fn look_at(&mut self, model: &Model, layer: usize) {
        let (l, class, map) = (&model.layers()[layer], model.class_of(layer), model.map(layer));
        let mut there = Vec::new();
        for expert in 0..l.n_expert {
            let Ok(slot) = u32::try_from(map.slot(expert)) else { continue };
            self.slots += 1;
            for ((m, name), memory) in l.matrices().zip(names(l)).zip(&class.memory) {
                there.resize(m.expert_bytes, 0);
                if let Err(why) = memory.read(slot as usize * m.expert_bytes, &mut there) {
                    self.unread += 1;
                    if self.unread == 1 {
                        log!(Level::Error, "moe-hot: slot {slot} cannot be read: {why}");
                    }
                    continue;
                }
                // SAFETY: the experts of a layer are where it says, and stay there while its model lives.
                let own = unsafe { std::slice::from_raw_parts(m.row(expert, 0), m.expert_bytes) };
                self.bytes += own.len() as u64;
                if let Some(at) = first_difference(own, &there) {
                    let bytes = own.len();
                    self.found(&Difference { il: l.il, expert, slot, matrix: name, at, bytes });
                }
            }
        }
    }

    fn found(&mut self, difference: &Difference) {
        self.differences += 1;
        if self.differences <= MOST_TOLD {
            log!(Level::Error, "moe-hot: {difference}");
        }
    }
}

impl Display for Verify {
    fn fmt(&self, f: &mut Formatter<'_>) -> fmt::Result {
        let mib = self.bytes as f64 / f64::from(1 << 20);
        write!(f, "verified {} slots ({mib:.1} MiB) at {} moment", self.slots, self.looks)?;
        f.write_str(if self.looks == 1 { ": " } else { "s: " })?;
        match (self.differences, self.unread) {
            (0, 0) => f.write_str("all equal"),
            (n, 0) => write!(f, "{n} matrices differ"),
            (n, unread) => write!(f, "{n} matrices differ, {unread} could not be read"),
        }
    }
}

/// Names of a layer's matrices, in the order of [`Layer::matrices`].
fn names(l: &Layer) -> impl Iterator<Item = &'static str> {
    let up = if l.merged { "gate and up" } else { "up" };
    l.gate.iter().map(|_| "gate").chain([up, "down"])
}

fn first_difference(a: &[u8], b: &[u8]) -> Option<usize> {
    // the comparison of whole slices is the fast one, and the rule
    if a == b { None } else { a.iter().zip(b).position(|(a, b)| a != b) }
}

#[cfg(test)]
mod tests {
    use std::ffi::c_void;

    use super::*;
    use crate::{
        cold::{Activation, Matrix},
        config::Config,
        device::SlotMemory,
        model::Offer,
    };

    const N_EXPERT: usize = 4;
    const EXPERT_BYTES: usize = 64;

    unsafe extern "C" fn no_dot(
        _: i32,
        _: *mut f32,
        _: usize,
        _: *const c_void,
        _: usize,
        _: *const c_void,
        _: usize,
        _: i32,
    ) {
    }
    unsafe extern "C" fn no_activation(_: i32, _: *mut f32, _: *const f32, _: *const f32) {}

    /// Layers whose experts have bytes of their own, in host memory; none moves while the weights live.
    fn model(k: u32, n_layers: usize) -> (Model, Vec<u8>) {
        let n_matrices = 3 * n_layers;
        let weights: Vec<u8> =
            (0..n_matrices * N_EXPERT * EXPERT_BYTES).map(|i| (i / EXPERT_BYTES * 7 + i) as u8).collect();
        let matrix = |i: usize| Matrix {
            data: weights[i * N_EXPERT * EXPERT_BYTES..].as_ptr(),
            buffer: None,
            ty: 0,
            n_in: 4,
            n_out: 4,
            row_bytes: EXPERT_BYTES / 4,
            expert_bytes: EXPERT_BYTES,
            vec_dot: no_dot,
            from_float: None,
            act_row_bytes: 16,
            kernel: None,
            ahead: 0,
        };
        let model = Model::new(Config { k: Some(k), ..Config::default() });
        for il in 0..n_layers {
            let layer = Layer {
                il: il as i32,
                n_expert: N_EXPERT,
                n_used: 2,
                gate: Some(matrix(3 * il)),
                up: matrix(3 * il + 1),
                down: matrix(3 * il + 2),
                merged: false,
                activation: Activation::Gated(no_activation),
            };
            model.offer(Offer { layer, device: None, max_tokens: 0 });
        }
        assert!(model.activate(1, "test"));
        (model, weights)
    }

    fn flip(model: &Model, layer: usize, matrix: usize, at: usize) {
        let SlotMemory::Host(memory) = &*model.class_of(layer).memory[matrix] else { unreachable!() };
        assert!(at < memory.bytes());
        // SAFETY: the byte is in the memory, and nobody else uses it now.
        unsafe { *memory.ptr().add(at) ^= 1 };
    }

    #[test]
    fn slots_with_the_bytes_of_their_experts_are_equal() {
        let (model, _weights) = model(N_EXPERT as u32, 2);
        let mut v = Verify::default();
        v.look(&model);
        v.look(&model);
        assert_eq!(v.to_string(), "verified 16 slots (0.0 MiB) at 2 moments: all equal");
        assert_eq!(v.bytes, 2 * 8 * 3 * EXPERT_BYTES as u64);
    }

    #[test]
    fn one_flipped_bit_is_found_in_any_matrix_of_any_slot() {
        for (layer, matrix, expert, byte) in [(0, 0, 0, 0), (1, 1, 2, 17), (1, 2, 3, EXPERT_BYTES - 1)] {
            let (model, _weights) = model(N_EXPERT as u32, 2);
            let slot = model.map(layer).slot(expert) as usize;
            flip(&model, layer, matrix, slot * EXPERT_BYTES + byte);
            let mut v = Verify::default();
            v.look(&model);
            assert_eq!(v.to_string(), "verified 8 slots (0.0 MiB) at 1 moment: 1 matrices differ");
        }
    }

    #[test]
    fn slots_that_belong_to_nobody_are_not_looked_at() {
        let (model, _weights) = model(2, 1);
        flip(&model, 0, 0, 5);
        let mut v = Verify::default();
        v.look(&model);
        assert_eq!(v.to_string(), "verified 0 slots (0.0 MiB) at 1 moment: all equal");
    }

    #[test]
    fn a_difference_says_where_it_is() {
        let d = Difference { il: 7, expert: 3, slot: 12, matrix: "gate", at: 5, bytes: 64 };
        assert_eq!(d.to_string(), "layer 7, expert 3 in slot 12: gate differs from byte 5 of 64 on");
        assert_eq!(first_difference(b"abcd", b"abXd"), Some(2));
        assert_eq!(first_difference(b"abcd", b"abcd"), None);
    }

    #[test]
    fn the_environment_says_how_often() {
        assert_eq!(Verify::parse("1").unwrap().every, 0);
        assert_eq!(Verify::parse("500").unwrap().every, 500);
        for value in ["", "0", "-1", "on"] {
            let e = Verify::parse(value).unwrap_err();
            assert!(e.starts_with(&format!("MOE_HOT_VERIFY: '{value}' is not allowed, expected 1, ")), "{e}");
        }
    }

    #[test]
    fn it_looks_after_as_many_steps_as_asked_for_and_at_the_end() {
        let (model, _weights) = model(N_EXPERT as u32, 1);
        let mut v = Verify::parse("3").unwrap();
        for _ in 0..7 {
            v.step_end(&model);
        }
        assert_eq!(v.looks, 2);
        v.end(&model);
        assert_eq!(v.to_string(), "verified 12 slots (0.0 MiB) at 3 moments: all equal");
    }
}
