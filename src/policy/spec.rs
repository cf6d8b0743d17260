//! A policy by name, with its constants: `predict`, `predict:margin=0.2:shared=off`.
//!
//! Every rule of a policy that has any can be turned off, which is how docs/policy.md tells what each is
//! worth.

use std::{
    fmt::{self, Display, Formatter},
    str::FromStr,
};

use super::{
    DecayConfig, Policy, PoolShape, PredictConfig, decay::Decay, fixed::Fixed, lfru::Lfru, lfu::Lfu,
    lru::Lru, predict::Predict, s3fifo::S3Fifo,
};

/// Which policy.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum PolicyKind {
    /// Decayed frequency with an admission gate and a margin.
    Decay,
    /// The experts used last; admits every miss.
    Lru,
    /// The experts used most since the start.
    Lfu,
    /// The experts used most in the first tokens, then fixed.
    Static,
    /// The most uses for the time since the last one; admits every miss.
    Lfru,
    /// Queues: a small one to prove oneself in, a main one, and the names of who passed by.
    S3Fifo,
    /// Online linear prediction of uses.
    Predict,
}

/// Name of every policy.
const POLICIES: [(PolicyKind, &str); 7] = [
    (PolicyKind::Decay, "decay"),
    (PolicyKind::Lru, "lru"),
    (PolicyKind::Lfu, "lfu"),
    (PolicyKind::Static, "static"),
    (PolicyKind::Lfru, "lfru"),
    (PolicyKind::S3Fifo, "s3fifo"),
    (PolicyKind::Predict, "predict"),
];

impl PolicyKind {
    /// The names that [`PolicyKind::from_str`] takes, separated by commas.
    pub fn names() -> String {
        POLICIES.map(|p| p.1).join(", ")
    }

    /// All policies.
    pub fn all() -> impl Iterator<Item = PolicyKind> {
        POLICIES.into_iter().map(|p| p.0)
    }
}

impl Display for PolicyKind {
    fn fmt(&self, f: &mut Formatter<'_>) -> fmt::Result {
        let (_, name) = POLICIES.iter().find(|p| p.0 == *self).expect("every kind is in the table");
        f.write_str(name)
    }
}

impl FromStr for PolicyKind {
    type Err = ();

    fn from_str(s: &str) -> Result<Self, ()> {
        POLICIES.iter().find(|p| p.1 == s).map(|p| p.0).ok_or(())
    }
}

/// A policy and its constants. As text, its name and then the constants that are not the default, each as
/// `:key=value`; a comma may stand for a later colon.
#[derive(Clone, Copy, PartialEq, Debug)]
pub enum PolicySpec {
    /// [`PolicyKind::Decay`].
    Decay(DecayConfig),
    /// [`PolicyKind::Lru`].
    Lru,
    /// [`PolicyKind::Lfu`].
    Lfu,
    /// [`PolicyKind::Static`].
    Static,
    /// [`PolicyKind::Lfru`].
    Lfru,
    /// [`PolicyKind::S3Fifo`].
    S3Fifo,
    /// [`PolicyKind::Predict`].
    Predict(PredictConfig),
}

/// What is expected in place of a text that names no policy.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
pub enum PolicyError {
    /// There is no such policy.
    #[error("one of {}", PolicyKind::names())]
    Name,
    /// The policy has no such constant, or this is none.
    #[error("{} after {policy}, not '{found}'", keys(allowed))]
    Key {
        /// The policy.
        policy: PolicyKind,
        /// The keys that it has.
        allowed: Vec<&'static str>,
        /// What was found.
        found: String,
    },
    /// A constant cannot be that.
    #[error("{key} to be {allowed}, not '{value}'")]
    Value {
        /// Which.
        key: &'static str,
        /// What it was to be.
        value: String,
        /// What it can be.
        allowed: String,
    },
}

fn keys(allowed: &[&str]) -> String {
    match allowed {
        [] => "nothing".into(),
        _ => format!("KEY=VALUE, with a key of {},", allowed.join(", ")),
    }
}

/// A constant of the configuration `C`.
pub struct Param<C: 'static> {
    pub key: &'static str,
    pub kind: ParamKind<C>,
}

/// How to reach it, and what it can be.
pub enum ParamKind<C: 'static> {
    /// A rule.
    Switch(fn(&mut C) -> &mut bool),
    /// A number from a least to a most; `off` is short for the last.
    Number(fn(&mut C) -> &mut f64, f64, f64, Option<f64>),
    /// A whole number, likewise.
    Count(fn(&mut C) -> &mut u32, u32, u32, Option<u32>),
}

impl<C: Copy> Param<C> {
    fn allowed(&self) -> String {
        let or_off = |off: bool| if off { ", or off" } else { "" };
        match self.kind {
            ParamKind::Switch(_) => "on or off".into(),
            ParamKind::Number(_, low, high, off) => {
                format!("a number from {low} to {high}{}", or_off(off.is_some()))
            }
            ParamKind::Count(_, low, high, off) => {
                format!("a whole number from {low} to {high}{}", or_off(off.is_some()))
            }
        }
    }

    fn set(&self, config: &mut C, value: &str) -> Option<()> {
        match self.kind {
            ParamKind::Switch(field) => {
                *field(config) = match value {
                    "on" => true,
                    "off" => false,
                    _ => return None,
                }
            }
            ParamKind::Number(field, low, high, off) => {
                let number = off.filter(|_| value == "off").or_else(|| value.parse().ok());
                *field(config) = number.filter(|n| (low..=high).contains(n))?;
            }
            ParamKind::Count(field, low, high, off) => {
                let number = off.filter(|_| value == "off").or_else(|| value.parse().ok());
                *field(config) = number.filter(|n| (low..=high).contains(n))?;
            }
        }
        Some(())
    }

    fn show(&self, mut config: C) -> String {
        match self.kind {
            ParamKind::Switch(field) => if *field(&mut config) { "on" } else { "off" }.into(),
            ParamKind::Number(field, ..) => field(&mut config).to_string(),
            ParamKind::Count(field, ..) => field(&mut config).to_string(),
        }
    }
}

/// A configuration with constants that have names.
pub trait Params: Copy + Default + 'static {
    const PARAMS: &'static [Param<Self>];

    fn read(policy: PolicyKind, pairs: &str) -> Result<Self, PolicyError> {
        let mut config = Self::default();
        for pair in pairs.split([':', ',']) {
            let found = pair.split_once('=');
            let found =
                found.and_then(|(key, value)| Some((Self::PARAMS.iter().find(|p| p.key == key)?, value)));
            let Some((param, value)) = found else {
                let allowed = Self::PARAMS.iter().map(|p| p.key).collect();
                return Err(PolicyError::Key { policy, allowed, found: pair.into() });
            };
            param.set(&mut config, value).ok_or_else(|| PolicyError::Value {
                key: param.key,
                value: value.into(),
                allowed: param.allowed(),
            })?;
        }
        Ok(config)
    }

    fn write(self, f: &mut Formatter<'_>) -> fmt::Result {
        for param in Self::PARAMS {
            let value = param.show(self);
            if value != param.show(Self::default()) {
                write!(f, ":{}={value}", param.key)?;
            }
        }
        Ok(())
    }
}

impl PolicySpec {
    /// Which policy it is.
    pub fn kind(&self) -> PolicyKind {
        match self {
            PolicySpec::Decay(_) => PolicyKind::Decay,
            PolicySpec::Lru => PolicyKind::Lru,
            PolicySpec::Lfu => PolicyKind::Lfu,
            PolicySpec::Static => PolicyKind::Static,
            PolicySpec::Lfru => PolicyKind::Lfru,
            PolicySpec::S3Fifo => PolicyKind::S3Fifo,
            PolicySpec::Predict(_) => PolicyKind::Predict,
        }
    }

    /// Reads policies separated by commas; a `key=value` after a comma belongs to the policy before it.
    ///
    /// # Errors
    /// The first that is none.
    pub fn list(text: &str) -> Result<Vec<PolicySpec>, PolicyError> {
        let mut specs: Vec<String> = Vec::new();
        for part in text.split(',') {
            let more = part.split(':').next().is_some_and(|name| name.contains('='));
            match specs.last_mut().filter(|_| more) {
                Some(last) => *last += &format!(":{part}"),
                None => specs.push(part.into()),
            }
        }
        specs.iter().map(|s| s.parse()).collect()
    }
}

impl From<PolicyKind> for PolicySpec {
    /// With the default constants.
    fn from(kind: PolicyKind) -> Self {
        match kind {
            PolicyKind::Decay => PolicySpec::Decay(DecayConfig::default()),
            PolicyKind::Lru => PolicySpec::Lru,
            PolicyKind::Lfu => PolicySpec::Lfu,
            PolicyKind::Static => PolicySpec::Static,
            PolicyKind::Lfru => PolicySpec::Lfru,
            PolicyKind::S3Fifo => PolicySpec::S3Fifo,
            PolicyKind::Predict => PolicySpec::Predict(PredictConfig::default()),
        }
    }
}

impl Display for PolicySpec {
    fn fmt(&self, f: &mut Formatter<'_>) -> fmt::Result {
        self.kind().fmt(f)?;
        match self {
            PolicySpec::Decay(config) => config.write(f),
            PolicySpec::Predict(config) => config.write(f),
            _ => Ok(()),
        }
    }
}

impl FromStr for PolicySpec {
    type Err = PolicyError;

    fn from_str(s: &str) -> Result<Self, PolicyError> {
        let (name, pairs) = s.split_once(':').map_or((s, None), |(name, pairs)| (name, Some(pairs)));
        let kind: PolicyKind = name.parse().map_err(|()| PolicyError::Name)?;
        match (kind, pairs) {
            (_, None) => Ok(kind.into()),
            (PolicyKind::Decay, Some(pairs)) => DecayConfig::read(kind, pairs).map(PolicySpec::Decay),
            (PolicyKind::Predict, Some(pairs)) => PredictConfig::read(kind, pairs).map(PolicySpec::Predict),
            (_, Some(pairs)) => {
                Err(PolicyError::Key { policy: kind, allowed: Vec::new(), found: pairs.into() })
            }
        }
    }
}

/// A policy for a pool.
pub fn build(spec: impl Into<PolicySpec>, shape: PoolShape) -> Box<dyn Policy> {
    match spec.into() {
        PolicySpec::Decay(config) => Box::new(Decay::new(shape, config)),
        PolicySpec::Lru => Box::new(Lru::new(shape)),
        PolicySpec::Lfu => Box::new(Lfu::new(shape)),
        PolicySpec::Static => Box::new(Fixed::new(shape)),
        PolicySpec::Lfru => Box::new(Lfru::new(shape)),
        PolicySpec::S3Fifo => Box::new(S3Fifo::new(shape)),
        PolicySpec::Predict(config) => Box::new(Predict::new(shape, config)),
    }
}
