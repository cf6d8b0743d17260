//! What a model's file says of its MoE layers: which of them can take the hot path, and what they and the rest need.

use std::collections::{BTreeMap, HashMap};

use moe_hot::{
    ggml,
    gguf::{self, Gguf, Tensor, Value},
    model::ranges,
};
use serde::Serialize;

/// What llama.cpp's --cpu-moe leaves on the CPU.
const EXPERTS: [&str; 4] = [".ffn_up_", ".ffn_down_", ".ffn_gate_", ".ffn_gate_up_"];
const GATE: &str = "gate";
const UP: &str = "up";
const GATE_UP: &str = "gate_up";
const DOWN: &str = "down";
const MATRICES: [&str; 4] = [GATE, UP, GATE_UP, DOWN];
/// Bytes of an element of the KV cache: f16, unless llama.cpp is told otherwise.
const KV_BYTES: u64 = 2;
/// As in the patched llama.cpp.
const CLAMPED: f64 = 1e-6;

/// Architectures whose experts the hot path does not compute, and why.
fn not_by_architecture(arch: &str) -> Option<&'static str> {
    match arch {
        "gpt-oss" | "minimax-m3" | "smallthinker" | "kimi-k3" => {
            Some("its activation is not SwiGLU, GeGLU or ReLU^2")
        }
        "llama4" | "mistral4" => Some("its experts are not computed as gate and up, activation, down"),
        _ => None,
    }
}

/// One matrix of every expert of a layer.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Debug, Serialize)]
pub struct Matrix {
    pub name: &'static str,
    #[serde(rename = "type")]
    pub ty: &'static str,
    pub n_in: u64,
    pub n_out: u64,
    /// Bytes of one expert.
    pub bytes: u64,
}

/// A layer with experts.
#[derive(Clone, Debug)]
pub struct Layer {
    pub il: usize,
    pub n_expert: u64,
    pub n_used: u64,
    pub matrices: Vec<Matrix>,
    /// Why it takes the stock graph, whatever the device.
    pub stock: Option<String>,
    /// Whether CUDA's kernels skip experts without a slot.
    pub quantized: bool,
}

impl Layer {
    /// Bytes of an expert.
    pub fn expert_bytes(&self) -> u64 {
        self.matrices.iter().map(|m| m.bytes).sum()
    }
}

/// Layers that share slots.
#[derive(Clone, PartialEq, Debug, Serialize)]
pub struct Class {
    /// Their numbers, as `0-3, 7`.
    pub layers: String,
    pub n_layers: u64,
    pub matrices: Vec<Matrix>,
    /// Of all its layers.
    pub n_experts: u64,
    /// Of one of them, the most.
    pub experts_per_layer: u64,
    pub experts_used: u64,
    pub expert_bytes: u64,
}

/// Layers that take the stock graph.
#[derive(Clone, PartialEq, Debug, Serialize)]
pub struct Stock {
    pub layers: String,
    pub why: String,
}

/// A model.
#[derive(Debug)]
pub struct Model {
    pub arch: String,
    pub name: Option<String>,
    /// Layers that a token passes through.
    pub n_layers: u64,
    pub layers: Vec<Layer>,
    /// Bytes of all experts, which --cpu-moe leaves on the CPU.
    pub experts: u64,
    /// Bytes of all else that is in VRAM then.
    pub dense: u64,
    /// Tokens; 0 where the file does not tell.
    pub n_vocab: u64,
    /// Longest context that the model was made for.
    pub context: Option<u64>,
    /// Bytes of the KV cache for a token.
    pub kv_per_token: u64,
    /// Layers with a KV cache.
    pub n_kv: u64,
}

fn is_expert(name: &str) -> bool {
    EXPERTS.iter().any(|e| {
        name.split_once(e).is_some_and(|(_, rest)| rest.starts_with("exps") || rest.starts_with("chexps"))
    })
}

/// Is the limit of the activation of layer `il` set?
fn is_clamped(gguf: &Gguf, arch: &str, il: usize) -> bool {
    let value = match gguf.keys.get(&format!("{arch}.swiglu_clamp_exp")) {
        Some(Value::Array(values)) => values.get(il),
        value => value,
    };
    matches!(value, Some(Value::Float(limit)) if *limit > CLAMPED)
}

struct File<'a> {
    gguf: &'a Gguf,
    arch: &'a str,
    tensors: HashMap<&'a str, &'a Tensor>,
}

impl File<'_> {
    fn key(&self, name: &str) -> String {
        format!("{}.{name}", self.arch)
    }

    fn integer(&self, name: &str) -> Result<Option<u64>, String> {
        self.gguf.integer(&self.key(name))
    }

    fn of_layer(&self, name: &str, il: usize) -> Result<Option<u64>, String> {
        self.gguf.of_layer(&self.key(name), il)
    }

    fn needed<T>(&self, name: &str, value: Option<T>) -> Result<T, String> {
        value.ok_or_else(|| format!("there is no key {}", self.key(name)))
    }

    /// `None`: it has no experts.
    fn layer(&self, il: usize, n_main: u64) -> Result<Option<Layer>, String> {
        let tensor = |m: &str, kind: &str| self.tensors.get(format!("blk.{il}.ffn_{m}_exps.{kind}").as_str());
        let found: Vec<(&str, &&Tensor)> =
            MATRICES.into_iter().filter_map(|m| Some((m, tensor(m, "weight")?))).collect();
        let Some((_, first)) = found.first() else { return Ok(None) };
        let has = |m: &str| found.iter().any(|(n, _)| *n == m);
        let any = |kind: &str| MATRICES.iter().any(|m| tensor(m, kind).is_some());
        let ty = |m: &str| found.iter().find(|(n, _)| *n == m).map(|(_, t)| t.ty);

        let n_expert = first.shape[2];
        let expert_count = self.integer("expert_count")?;
        let expert_count = self.needed("expert_count", expert_count)?;
        let n_used = self.of_layer("expert_used_count", il)?;
        let n_used = self.needed("expert_used_count", n_used)?;
        if n_used == 0 || n_used > n_expert {
            return Err(format!("layer {il} uses {n_used} of {n_expert} experts"));
        }
        let stock = if any("bias") {
            Some("its experts have biases")
        } else if any("scale") {
            Some("its experts have scales")
        } else if let Some(why) = not_by_architecture(self.arch) {
            Some(why)
        } else if is_clamped(self.gguf, self.arch, il) || !has(DOWN) || !(has(UP) || has(GATE_UP)) {
            Some("its experts are not computed as gate and up, activation, down")
        } else if has(GATE) && !has(GATE_UP) && ty(GATE) != ty(UP) {
            Some("gate and up differ in type")
        } else if found.iter().any(|(_, t)| t.shape[2] != expert_count || t.shape[3] != 1) {
            Some("its experts are not laid out one after the other")
        } else if il as u64 >= n_main {
            Some("only drafts pass through it")
        } else {
            None
        };
        let matrix = |(name, t): &(&'static str, &&Tensor)| Matrix {
            name,
            ty: ggml::type_name(t.ty),
            n_in: t.shape[0],
            n_out: t.shape[1],
            bytes: t.bytes / t.shape[2].max(1),
        };
        Ok(Some(Layer {
            il,
            n_expert,
            n_used,
            matrices: found.iter().map(matrix).collect(),
            stock: stock.map(String::from),
            quantized: found.iter().all(|(_, t)| gguf::block(t.ty).is_some_and(|(n, _)| n > 1)),
        }))
    }

    /// Elements of the KV cache for a token in layer `il`, of `n` layers.
    fn kv(&self, il: usize) -> Result<u64, String> {
        // hybrids: the others keep a state, whatever the context
        if let Some(every) = self.integer("full_attention_interval")?.filter(|n| *n > 0)
            && !(il as u64 + 1).is_multiple_of(every)
        {
            return Ok(0);
        }
        if self.integer("attention.key_length_mla")?.is_some() {
            let rank = self.integer("attention.kv_lora_rank")?;
            let rope = self.integer("rope.dimension_count")?;
            return Ok(
                self.needed("attention.kv_lora_rank", rank)? + self.needed("rope.dimension_count", rope)?
            );
        }
        let heads = self.of_layer("attention.head_count", il)?;
        let heads_kv = match self.of_layer("attention.head_count_kv", il)? {
            Some(n) => n,
            None => self.needed("attention.head_count", heads)?,
        };
        let width = |name: &str| match self.integer(name)? {
            Some(n) => Ok(n),
            None => {
                let embedding = self.integer("embedding_length")?;
                let heads = self.needed("attention.head_count", heads.filter(|n| *n > 0))?;
                Ok::<u64, String>(self.needed("embedding_length", embedding)? / heads)
            }
        };
        if heads_kv == 0 {
            return Ok(0);
        }
        let width = width("attention.key_length")?.saturating_add(width("attention.value_length")?);
        Ok(heads_kv.saturating_mul(width))
    }
}

impl Model {
    /// # Errors
    /// The key that is missing or no number.
    pub fn new(gguf: &Gguf) -> Result<Self, String> {
        let arch = gguf.text("general.architecture")?.ok_or("there is no key general.architecture")?;
        let tensors: HashMap<&str, &Tensor> = gguf.tensors.iter().map(|t| (t.name.as_str(), t)).collect();
        let file = File { gguf, arch, tensors };
        let n_all = file.integer("block_count")?;
        let n_all = file.needed("block_count", n_all)?;
        if n_all > gguf.tensors.len() as u64 {
            return Err(format!(
                "{} is {n_all}, for {} tensors",
                file.key("block_count"),
                gguf.tensors.len()
            ));
        }
        let n_layers = n_all.saturating_sub(file.integer("nextn_predict_layers")?.unwrap_or(0));
        let layers = (0..n_all as usize).map(|il| file.layer(il, n_layers));
        let layers: Vec<Layer> = layers.filter_map(Result::transpose).collect::<Result<_, _>>()?;
        let kv: Vec<u64> = (0..n_layers as usize).map(|il| file.kv(il)).collect::<Result<_, _>>()?;

        let bytes = |of: &dyn Fn(&Tensor) -> bool| {
            gguf.tensors.iter().filter(|t| of(t)).fold(0u64, |sum, t| sum.saturating_add(t.bytes))
        };
        let experts = bytes(&|t| is_expert(&t.name));
        // the embedding stays on the CPU, unless it is the output matrix too
        let tied = gguf.tensor("output.weight").is_none();
        let dense = bytes(&|t| !is_expert(&t.name) && (tied || t.name != "token_embd.weight"));
        Ok(Model {
            name: gguf.text("general.name")?.map(String::from),
            n_layers,
            experts,
            dense,
            n_vocab: gguf.tensor("token_embd.weight").map_or(0, |t| t.shape[1]),
            context: file.integer("context_length")?,
            kv_per_token: kv.iter().fold(0u64, |sum, n| sum.saturating_add(n.saturating_mul(KV_BYTES))),
            n_kv: kv.iter().filter(|n| **n > 0).count() as u64,
            layers,
            arch: arch.to_string(),
        })
    }

    /// Layers that can take the hot path, with a GPU or without.
    pub fn eligible(&self, gpu: bool) -> impl Iterator<Item = &Layer> {
        self.layers.iter().filter(move |l| l.stock.is_none() && (l.quantized || !gpu))
    }

    /// The others, by reason.
    pub fn stock(&self, gpu: bool) -> Vec<Stock> {
        let mut by_reason: BTreeMap<&str, Vec<i32>> = BTreeMap::new();
        for l in &self.layers {
            match &l.stock {
                Some(why) => by_reason.entry(why).or_default().push(l.il as i32),
                None if gpu && !l.quantized => by_reason
                    .entry("the CUDA kernels for the type of its experts do not skip experts")
                    .or_default()
                    .push(l.il as i32),
                None => {}
            }
        }
        let stock = |(why, layers): (&str, Vec<i32>)| Stock { layers: ranges(layers), why: why.to_string() };
        by_reason.into_iter().map(stock).collect()
    }

    /// Layers that share slots: equal types and shapes, as in the library.
    pub fn classes(&self, gpu: bool) -> Vec<Class> {
        let mut by_key: BTreeMap<&[Matrix], Vec<&Layer>> = BTreeMap::new();
        for l in self.eligible(gpu) {
            by_key.entry(&l.matrices).or_default().push(l);
        }
        let class = |(matrices, layers): (&[Matrix], Vec<&Layer>)| Class {
            layers: ranges(layers.iter().map(|l| l.il as i32)),
            n_layers: layers.len() as u64,
            matrices: matrices.to_vec(),
            n_experts: layers.iter().map(|l| l.n_expert).sum(),
            experts_per_layer: layers.iter().map(|l| l.n_expert).max().unwrap_or(0),
            experts_used: layers.iter().map(|l| l.n_used).max().unwrap_or(0),
            expert_bytes: matrices.iter().map(|m| m.bytes).sum(),
        };
        by_key.into_iter().map(class).collect()
    }
}

#[cfg(test)]
pub mod tests {
    use super::*;

    pub const Q4_0: i32 = ggml::GGML_TYPE_Q4_0 as i32;

    /// Two layers of 16 experts of 64 x 32 in Q4_0, 2 used, beside 1 MiB of other weights.
    pub fn gguf() -> Gguf {
        let mut g = Gguf::default();
        let mut key =
            |name: &str, value: u64| g.keys.insert(format!("qwen3moe.{name}"), Value::Integer(value.into()));
        for (name, value) in [
            ("block_count", 2),
            ("expert_count", 16),
            ("expert_used_count", 2),
            ("context_length", 1024),
            ("embedding_length", 64),
            ("attention.head_count", 4),
            ("attention.head_count_kv", 2),
        ] {
            key(name, value);
        }
        g.keys.insert("general.architecture".into(), Value::Text("qwen3moe".into()));
        for il in 0..2 {
            for (m, n_in, n_out) in [(GATE, 64, 32), (UP, 64, 32), (DOWN, 32, 64)] {
                g.tensors.push(tensor(&format!("blk.{il}.ffn_{m}_exps.weight"), [n_in, n_out, 16, 1], Q4_0));
            }
        }
        g.tensors.push(tensor("token_embd.weight", [64, 8192, 1, 1], ggml::GGML_TYPE_F16 as i32));
        g.tensors.push(tensor("output.weight", [64, 8192, 1, 1], ggml::GGML_TYPE_F16 as i32));
        g
    }

    fn tensor(name: &str, shape: [u64; 4], ty: i32) -> Tensor {
        let (n, bytes) = gguf::block(ty).unwrap();
        Tensor { name: name.into(), shape, ty, bytes: shape.iter().product::<u64>() / n * bytes }
    }

    fn why(change: impl FnOnce(&mut Gguf)) -> String {
        let mut g = gguf();
        change(&mut g);
        let stock = Model::new(&g).unwrap().stock(true);
        assert_eq!(stock.len(), 1, "{stock:?}");
        format!("{}: {}", stock[0].layers, stock[0].why)
    }

    #[test]
    fn a_model_is_what_its_tensors_are() {
        let m = Model::new(&gguf()).unwrap();
        assert_eq!((m.experts, m.dense), (2 * 16 * 3 * 1152, 1 << 20), "the embedding is the CPU's");
        assert_eq!((m.kv_per_token, m.n_kv), (2 * 2 * 2 * 16 * 2, 2));
        let classes = m.classes(true);
        assert_eq!(classes.len(), 1);
        assert_eq!((classes[0].layers.as_str(), classes[0].expert_bytes), ("0-1", 3 * 1152));
        let mut g = gguf();
        g.tensors.pop();
        assert_eq!(Model::new(&g).unwrap().dense, 1 << 20, "the embedding is the output too");
    }

    #[test]
    fn layers_that_stay_say_why() {
        let add = |name: &str| tensor(name, [32, 16, 1, 1], ggml::GGML_TYPE_F32 as i32);
        assert_eq!(why(|g| g.tensors.push(add("blk.1.ffn_up_exps.bias"))), "1: its experts have biases");
        assert_eq!(why(|g| g.tensors.push(add("blk.0.ffn_down_exps.scale"))), "0: its experts have scales");
        let up = |g: &mut Gguf| g.tensors[1].ty = ggml::GGML_TYPE_IQ4_NL as i32;
        assert_eq!(why(up), "0: gate and up differ in type");
        assert_eq!(
            why(|g| g.tensors.iter_mut().take(3).for_each(|t| t.ty = ggml::GGML_TYPE_F16 as i32)),
            "0: the CUDA kernels for the type of its experts do not skip experts"
        );
        let drafts = |g: &mut Gguf| g.keys.insert("qwen3moe.nextn_predict_layers".into(), Value::Integer(1));
        assert_eq!(why(|g| drop(drafts(g))), "1: only drafts pass through it");
        let limit = Value::Array(vec![Value::Float(0.0), Value::Float(7.0)]);
        assert_eq!(
            why(|g| drop(g.keys.insert("qwen3moe.swiglu_clamp_exp".into(), limit))),
            "1: its experts are not computed as gate and up, activation, down"
        );
    }

    #[test]
    fn what_is_missing_is_named() {
        let without = |key: &str| {
            let mut g = gguf();
            g.keys.remove(key).unwrap();
            Model::new(&g).unwrap_err()
        };
        assert_eq!(without("qwen3moe.expert_used_count"), "there is no key qwen3moe.expert_used_count");
        assert_eq!(without("general.architecture"), "there is no key general.architecture");
        let mut g = gguf();
        g.keys.insert("qwen3moe.expert_used_count".into(), Value::Integer(17));
        assert_eq!(Model::new(&g).unwrap_err(), "layer 0 uses 17 of 16 experts");
    }
}
