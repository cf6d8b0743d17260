//! What a GGUF file says of its model: its keys and the list of its tensors, no weights.
//!
//! As strict as ggml's own reader, and what it would refuse is refused with the offset; every length is checked
//! against the file before memory is allocated for it. (The crates for GGUF do not tell where a file is damaged,
//! nor whether its tensors end within it.)

use std::{
    collections::{BTreeMap, HashSet},
    fs::File,
    io::{self, BufReader, Read},
    path::{Path, PathBuf},
};

use crate::ggml;

const MAGIC: [u8; 4] = *b"GGUF";
const VERSIONS: std::ops::RangeInclusive<u32> = 2..=3;
const MAX_DIMS: u32 = 4;
/// Longest string that ggml accepts.
const MAX_TEXT: u64 = 1 << 30;
/// Longest array that is kept: one value a layer. Vocabularies are longer.
const MAX_KEPT: u64 = 4096;
const ALIGNMENT: u64 = 32;

/// Why a file is none that can be used. Names the file, and the offset where it matters.
#[derive(Debug, thiserror::Error)]
pub enum GgufError {
    /// The system refuses.
    #[error("{path}: {source}")]
    Io {
        /// The file.
        path: String,
        /// What the system says.
        source: io::Error,
    },
    /// It ends too early.
    #[error("{path}: truncated at offset {offset}, in {within}")]
    Truncated {
        /// The file.
        path: String,
        /// Where it ends.
        offset: u64,
        /// What is not whole.
        within: String,
    },
    /// It is none, or damaged.
    #[error("{path}: at offset {offset}: {why}")]
    Bad {
        /// The file.
        path: String,
        /// Where.
        offset: u64,
        /// What is wrong there.
        why: String,
    },
    /// Its parts do not fit together.
    #[error("{path}: {why}")]
    Split {
        /// The file.
        path: String,
        /// What is wrong.
        why: String,
    },
}

/// The value of a key.
#[derive(Clone, PartialEq, Debug)]
pub enum Value {
    /// Any type of integer, and booleans.
    Integer(i128),
    /// Any type of float.
    Float(f64),
    /// A string.
    Text(String),
    /// Numbers, as many as layers at most.
    Array(Vec<Value>),
    /// An array of something else, or a longer one, that is not kept.
    Long,
}

/// A tensor.
#[derive(Clone, PartialEq, Debug)]
pub struct Tensor {
    /// Its name.
    pub name: String,
    /// Elements by dimension, that of a row first; always four.
    pub shape: [u64; 4],
    /// Type of its weights, of [`ggml`].
    pub ty: i32,
    /// Its bytes.
    pub bytes: u64,
}

/// Keys and tensors of a model, of all its files.
#[derive(Clone, Default, PartialEq, Debug)]
pub struct Gguf {
    /// Keys, of the first file.
    pub keys: BTreeMap<String, Value>,
    /// Tensors of all files.
    pub tensors: Vec<Tensor>,
}

/// Elements and bytes of a block of a type.
pub fn block(ty: i32) -> Option<(u64, u64)> {
    Some(match ty as u32 {
        ggml::GGML_TYPE_I8 => (1, 1),
        ggml::GGML_TYPE_F16 | ggml::GGML_TYPE_BF16 | ggml::GGML_TYPE_I16 => (1, 2),
        ggml::GGML_TYPE_F32 | ggml::GGML_TYPE_I32 => (1, 4),
        ggml::GGML_TYPE_F64 | ggml::GGML_TYPE_I64 => (1, 8),
        ggml::GGML_TYPE_Q1_0 => (128, 18),
        ggml::GGML_TYPE_Q2_0 => (64, 18),
        ggml::GGML_TYPE_Q4_0 | ggml::GGML_TYPE_IQ4_NL => (32, 18),
        ggml::GGML_TYPE_Q4_1 => (32, 20),
        ggml::GGML_TYPE_Q5_0 => (32, 22),
        ggml::GGML_TYPE_Q5_1 => (32, 24),
        ggml::GGML_TYPE_Q8_0 => (32, 34),
        ggml::GGML_TYPE_MXFP4 => (32, 17),
        ggml::GGML_TYPE_NVFP4 => (64, 36),
        ggml::GGML_TYPE_Q2_K => (256, 84),
        ggml::GGML_TYPE_Q3_K | ggml::GGML_TYPE_IQ3_S => (256, 110),
        ggml::GGML_TYPE_Q4_K => (256, 144),
        ggml::GGML_TYPE_Q5_K => (256, 176),
        ggml::GGML_TYPE_Q6_K => (256, 210),
        ggml::GGML_TYPE_IQ1_S => (256, 50),
        ggml::GGML_TYPE_IQ1_M => (256, 56),
        ggml::GGML_TYPE_IQ2_XXS | ggml::GGML_TYPE_TQ2_0 => (256, 66),
        ggml::GGML_TYPE_IQ2_XS => (256, 74),
        ggml::GGML_TYPE_IQ2_S => (256, 82),
        ggml::GGML_TYPE_IQ3_XXS => (256, 98),
        ggml::GGML_TYPE_IQ4_XS => (256, 136),
        ggml::GGML_TYPE_TQ1_0 => (256, 54),
        _ => return None,
    })
}

/// What went wrong, without the file.
enum Fault {
    Io(io::Error),
    Truncated,
    Bad { offset: u64, why: String },
}

struct Reader<R> {
    from: R,
    at: u64,
    end: u64,
    /// What is read.
    within: String,
}

impl<R: Read> Reader<R> {
    fn need(&self, bytes: u64) -> Result<(), Fault> {
        if bytes > self.end - self.at { Err(Fault::Truncated) } else { Ok(()) }
    }

    fn bad<T>(&self, offset: u64, why: impl Into<String>) -> Result<T, Fault> {
        Err(Fault::Bad { offset, why: format!("{} {}", self.within, why.into()) })
    }

    fn array<const N: usize>(&mut self) -> Result<[u8; N], Fault> {
        self.need(N as u64)?;
        let mut bytes = [0; N];
        self.from.read_exact(&mut bytes).map_err(Fault::Io)?;
        self.at += N as u64;
        Ok(bytes)
    }

    fn u32(&mut self) -> Result<u32, Fault> {
        self.array().map(u32::from_le_bytes)
    }

    fn u64(&mut self) -> Result<u64, Fault> {
        self.array().map(u64::from_le_bytes)
    }

    fn skip(&mut self, bytes: u64) -> Result<(), Fault> {
        self.need(bytes)?;
        let skipped = io::copy(&mut self.from.by_ref().take(bytes), &mut io::sink()).map_err(Fault::Io)?;
        self.at += skipped;
        if skipped < bytes { Err(Fault::Truncated) } else { Ok(()) }
    }

    fn text_bytes(&mut self) -> Result<u64, Fault> {
        let at = self.at;
        let bytes = self.u64()?;
        if bytes > MAX_TEXT {
            return self.bad(at, format!("has a string of {bytes} bytes, at most {MAX_TEXT} are allowed"));
        }
        self.need(bytes)?;
        Ok(bytes)
    }

    fn text(&mut self) -> Result<String, Fault> {
        let mut bytes = vec![0; self.text_bytes()? as usize];
        self.from.read_exact(&mut bytes).map_err(Fault::Io)?;
        self.at += bytes.len() as u64;
        Ok(String::from_utf8_lossy(&bytes).into_owned())
    }

    /// A number of GGUF's type `ty`, `None` for other types.
    fn number(&mut self, ty: u32) -> Result<Option<Value>, Fault> {
        let integer = |v: i128| Some(Value::Integer(v));
        Ok(match ty {
            0 | 7 => integer(self.array::<1>()?[0].into()),
            1 => integer(i8::from_le_bytes(self.array()?).into()),
            2 => integer(u16::from_le_bytes(self.array()?).into()),
            3 => integer(i16::from_le_bytes(self.array()?).into()),
            4 => integer(self.u32()?.into()),
            5 => integer(i32::from_le_bytes(self.array()?).into()),
            6 => Some(Value::Float(f32::from_le_bytes(self.array()?).into())),
            10 => integer(self.u64()?.into()),
            11 => integer(i64::from_le_bytes(self.array()?).into()),
            12 => Some(Value::Float(f64::from_le_bytes(self.array()?))),
            _ => None,
        })
    }

    fn value(&mut self) -> Result<Value, Fault> {
        let (at, ty) = (self.at, self.u32()?);
        match ty {
            8 => self.text().map(Value::Text),
            9 => self.values(),
            _ => match self.number(ty)? {
                Some(v) => Ok(v),
                None => self.bad(at, format!("has a value of type {ty}, which there is not")),
            },
        }
    }

    fn values(&mut self) -> Result<Value, Fault> {
        let (at, ty) = (self.at, self.u32()?);
        let n = self.u64()?;
        let bytes: u64 = match ty {
            0 | 1 | 7 => 1,
            2 | 3 => 2,
            4..=6 => 4,
            10..=12 => 8,
            8 => {
                for _ in 0..n {
                    let bytes = self.text_bytes()?;
                    self.skip(bytes)?;
                }
                return Ok(Value::Long);
            }
            _ => return self.bad(at, format!("has an array of type {ty}, which there is not")),
        };
        if n > MAX_KEPT {
            self.skip(n.checked_mul(bytes).ok_or(Fault::Truncated)?)?;
            return Ok(Value::Long);
        }
        let values: Result<Vec<_>, _> = (0..n).filter_map(|_| self.number(ty).transpose()).collect();
        values.map(Value::Array)
    }

    fn tensor(&mut self) -> Result<(Tensor, u64), Fault> {
        let at = self.at;
        let name = self.text()?;
        self.within = format!("tensor '{name}'");
        let n_dims = self.u32()?;
        if n_dims > MAX_DIMS {
            return self.bad(at, format!("has {n_dims} dimensions, at most {MAX_DIMS} are allowed"));
        }
        let mut shape = [1; MAX_DIMS as usize];
        for n in &mut shape[..n_dims as usize] {
            *n = self.u64()?;
        }
        let ty = self.u32()?.cast_signed();
        let offset = self.u64()?;
        let Some((block, block_bytes)) = block(ty) else {
            return self.bad(at, format!("has type {ty}, which is none that llama.cpp knows"));
        };
        if !shape[0].is_multiple_of(block) {
            return self.bad(at, format!("has rows of {}, no multiple of {block}", shape[0]));
        }
        let elements = shape.iter().try_fold(1u64, |n, m| n.checked_mul(*m));
        match elements.and_then(|n| (n / block).checked_mul(block_bytes)) {
            Some(bytes) => Ok((Tensor { name, shape, ty, bytes }, offset)),
            None => self.bad(at, format!("is too large: {shape:?}")),
        }
    }

    fn read(&mut self) -> Result<Gguf, Fault> {
        self.within = "its head".into();
        if self.array()? != MAGIC {
            return Err(Fault::Bad { offset: 0, why: "not a GGUF file, it does not begin with GGUF".into() });
        }
        let version = self.u32()?;
        if !VERSIONS.contains(&version) {
            let foreign = if version.trailing_zeros() >= 16 { ", of the other byte order" } else { "" };
            return self.bad(4, format!("says version {version}{foreign}, expected 2 or 3"));
        }
        let (n_tensors, n_keys) = (self.u64()?, self.u64()?);
        let mut gguf = Gguf::default();
        for i in 0..n_keys {
            self.within = format!("key {i}");
            let at = self.at;
            let key = self.text()?;
            self.within = format!("key '{key}'");
            let value = self.value()?;
            if gguf.keys.insert(key, value).is_some() {
                return self.bad(at, "is there twice");
            }
        }
        let alignment = match gguf.keys.get("general.alignment") {
            None => ALIGNMENT,
            Some(Value::Integer(n)) if *n > 0 && *n <= 1 << 30 && n.count_ones() == 1 => *n as u64,
            Some(other) => {
                let why = format!("general.alignment is {other:?}, expected a power of 2");
                return Err(Fault::Bad { offset: self.at, why });
            }
        };
        let mut offsets = Vec::new();
        let mut names = HashSet::new();
        for i in 0..n_tensors {
            self.within = format!("tensor {i}");
            let at = self.at;
            let (tensor, offset) = self.tensor()?;
            if !names.insert(tensor.name.clone()) {
                return self.bad(at, "is there twice");
            }
            offsets.push((at, offset));
            gguf.tensors.push(tensor);
        }
        let data = self.at.next_multiple_of(alignment);
        let mut expected = 0u64;
        for (tensor, (at, offset)) in gguf.tensors.iter().zip(offsets) {
            self.within = format!("tensor '{}'", tensor.name);
            if offset != expected {
                return self.bad(at, format!("begins at {offset} of the data, expected {expected}"));
            }
            let end = offset.checked_add(tensor.bytes).filter(|end| *end <= u64::MAX >> 1);
            let end = end.ok_or(Fault::Truncated)?;
            if end > self.end.saturating_sub(data) {
                return Err(Fault::Truncated);
            }
            expected = end.next_multiple_of(alignment);
        }
        Ok(gguf)
    }
}

impl Gguf {
    /// Reads the model at `path`, and its other parts when it is split as llama.cpp splits models.
    ///
    /// # Errors
    /// The file, and where it is damaged.
    pub fn open(path: &Path) -> Result<Self, GgufError> {
        let mut gguf = Gguf::open_one(path)?;
        let split = |why: String| GgufError::Split { path: path.display().to_string(), why };
        let n = gguf.integer("split.count").map_err(&split)?.unwrap_or(0);
        if n <= 1 {
            return Ok(gguf);
        }
        let no = gguf.integer("split.no").map_err(&split)?.unwrap_or(0);
        if no != 0 {
            return Err(split(format!("it is part {} of {n}: name the first", no + 1)));
        }
        let name = path.to_string_lossy();
        let Some(stem) = name.strip_suffix(&format!("-00001-of-{n:05}.gguf")) else {
            return Err(split(format!(
                "it has {n} parts: expected a name that ends in -00001-of-{n:05}.gguf"
            )));
        };
        for i in 2..=n {
            let part = Gguf::open_one(&PathBuf::from(format!("{stem}-{i:05}-of-{n:05}.gguf")))?;
            gguf.tensors.extend(part.tensors);
        }
        Ok(gguf)
    }

    fn open_one(path: &Path) -> Result<Self, GgufError> {
        let named = || path.display().to_string();
        let opened = File::open(path).and_then(|f| Ok((f.metadata()?, f)));
        let (metadata, file) = opened.map_err(|source| GgufError::Io { path: named(), source })?;
        Gguf::read(BufReader::new(file), metadata.len(), &named())
    }

    /// Reads what has `bytes` bytes and is called `path`.
    ///
    /// # Errors
    /// As [`Gguf::open`].
    pub fn read(from: impl Read, bytes: u64, path: &str) -> Result<Self, GgufError> {
        let mut reader = Reader { from, at: 0, end: bytes, within: String::new() };
        let path = path.to_string();
        reader.read().map_err(|fault| match fault {
            Fault::Io(source) => GgufError::Io { path, source },
            Fault::Truncated => GgufError::Truncated { path, offset: bytes, within: reader.within },
            Fault::Bad { offset, why } => GgufError::Bad { path, offset, why },
        })
    }

    /// A key's number; `None` without the key.
    ///
    /// # Errors
    /// It is no such number.
    pub fn integer(&self, key: &str) -> Result<Option<u64>, String> {
        self.keys.get(key).map(|v| unsigned(key, v)).transpose()
    }

    /// A key's number for layer `il`, of those that may have one number or one a layer.
    ///
    /// # Errors
    /// It is no such number, or there is none for this layer.
    pub fn of_layer(&self, key: &str, il: usize) -> Result<Option<u64>, String> {
        match self.keys.get(key) {
            Some(Value::Array(values)) => match values.get(il) {
                Some(v) => unsigned(key, v).map(Some),
                None => Err(format!("{key} has {} values, none for layer {il}", values.len())),
            },
            _ => self.integer(key),
        }
    }

    /// A key's text; `None` without the key.
    ///
    /// # Errors
    /// It is none.
    pub fn text(&self, key: &str) -> Result<Option<&str>, String> {
        match self.keys.get(key) {
            None => Ok(None),
            Some(Value::Text(text)) => Ok(Some(text)),
            Some(other) => Err(format!("{key} is {other:?}, expected a text")),
        }
    }

    /// The tensor of this name.
    pub fn tensor(&self, name: &str) -> Option<&Tensor> {
        self.tensors.iter().find(|t| t.name == name)
    }
}

fn unsigned(key: &str, value: &Value) -> Result<u64, String> {
    match value {
        Value::Integer(n) => u64::try_from(*n).ok(),
        _ => None,
    }
    .ok_or_else(|| format!("{key} is {value:?}, expected a whole number of at least 0"))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn text(t: &str) -> Vec<u8> {
        [&(t.len() as u64).to_le_bytes(), t.as_bytes()].concat()
    }

    /// A file with two keys and two tensors of Q4_0, the second 64 bytes into the data.
    fn file() -> Vec<u8> {
        let mut f = [&MAGIC[..], &3u32.to_le_bytes(), &2u64.to_le_bytes(), &2u64.to_le_bytes()].concat();
        f.extend(text("a.block_count"));
        f.extend([&4u32.to_le_bytes()[..], &7u32.to_le_bytes()].concat());
        f.extend(text("a.heads"));
        f.extend([&9u32.to_le_bytes()[..], &5u32.to_le_bytes(), &2u64.to_le_bytes()].concat());
        f.extend([3i32, -1].map(i32::to_le_bytes).concat());
        for (name, offset) in [("x", 0u64), ("y", 64)] {
            f.extend(text(name));
            f.extend([&2u32.to_le_bytes()[..], &32u64.to_le_bytes(), &2u64.to_le_bytes()].concat());
            f.extend([&2u32.to_le_bytes()[..], &offset.to_le_bytes()].concat());
        }
        f.resize(f.len().next_multiple_of(32) + 64 + 36, 0);
        f
    }

    fn read(f: &[u8]) -> Result<Gguf, String> {
        Gguf::read(f, f.len() as u64, "f").map_err(|e| e.to_string())
    }

    #[test]
    fn keys_and_tensors_are_read() {
        let g = read(&file()).unwrap();
        assert_eq!(g.integer("a.block_count"), Ok(Some(7)));
        assert_eq!(g.integer("b"), Ok(None));
        assert_eq!(g.of_layer("a.heads", 0), Ok(Some(3)));
        assert_eq!(
            g.of_layer("a.heads", 1),
            Err("a.heads is Integer(-1), expected a whole number of at least 0".into())
        );
        assert_eq!(g.of_layer("a.heads", 2), Err("a.heads has 2 values, none for layer 2".into()));
        let y = g.tensor("y").unwrap();
        assert_eq!((y.shape, y.ty as u32, y.bytes), ([32, 2, 1, 1], ggml::GGML_TYPE_Q4_0, 36));
    }

    #[test]
    fn every_shorter_file_is_refused_with_where_it_ends() {
        let f = file();
        for n in 0..f.len() {
            let e = read(&f[..n]).unwrap_err();
            assert!(e.starts_with(&format!("f: truncated at offset {n}, in ")), "{e}");
        }
        assert!(read(&f[..f.len() - 1]).unwrap_err().ends_with("in tensor 'y'"));
    }

    #[test]
    fn foreign_and_damaged_files_are_refused_with_the_offset() {
        let with = |at: usize, bytes: &[u8]| {
            let mut f = file();
            f[at..at + bytes.len()].copy_from_slice(bytes);
            read(&f).unwrap_err()
        };
        assert_eq!(with(0, b"GGML"), "f: at offset 0: not a GGUF file, it does not begin with GGUF");
        assert_eq!(with(4, &[1, 0, 0, 0]), "f: at offset 4: its head says version 1, expected 2 or 3");
        assert_eq!(
            with(4, &[0, 0, 0, 3]),
            "f: at offset 4: its head says version 50331648, of the other byte order, expected 2 or 3"
        );
        // more tensors, keys and bytes of a name than there can be
        assert!(with(8, &[255; 8]).starts_with("f: at offset "));
        assert!(with(16, &[255; 8]).starts_with("f: at offset "));
        assert_eq!(
            with(24, &[255; 8]),
            "f: at offset 24: key 0 has a string of 18446744073709551615 bytes, at most 1073741824 are allowed"
        );
        assert_eq!(
            with(45, &[99]),
            "f: at offset 45: key 'a.block_count' has a value of type 99, which there is not"
        );
        let x = 24 + 21 + 8 + 15 + 24;
        assert_eq!(
            with(x + 9, &[5]),
            format!("f: at offset {x}: tensor 'x' has 5 dimensions, at most 4 are allowed")
        );
        assert_eq!(
            with(x + 13, &[33]),
            format!("f: at offset {x}: tensor 'x' has rows of 33, no multiple of 32")
        );
        assert_eq!(
            with(x + 29, &[98]),
            format!("f: at offset {x}: tensor 'x' has type 98, which is none that llama.cpp knows")
        );
        assert!(with(x + 21, &[255; 8]).contains("is too large"));
        let y = x + 41;
        assert_eq!(with(y + 8, b"x"), format!("f: at offset {y}: tensor 'x' is there twice"));
        assert_eq!(
            with(y + 33, &[32]),
            format!("f: at offset {y}: tensor 'y' begins at 32 of the data, expected 64")
        );
    }

    #[test]
    fn parts_of_a_model_are_read_together() {
        let part = |no: u32, tensor: &str| {
            let mut f = [&MAGIC[..], &3u32.to_le_bytes(), &1u64.to_le_bytes(), &2u64.to_le_bytes()].concat();
            for (key, value) in [("split.no", no), ("split.count", 2)] {
                f.extend(text(key));
                f.extend([4, value].map(u32::to_le_bytes).concat());
            }
            f.extend(text(tensor));
            f.extend([&1u32.to_le_bytes()[..], &8u64.to_le_bytes(), &[0; 12]].concat());
            f.resize(f.len().next_multiple_of(32) + 32, 0);
            f
        };
        let dir = tempfile::tempdir().unwrap();
        let paths = ["m-00001-of-00002.gguf", "m-00002-of-00002.gguf"].map(|n| dir.path().join(n));
        std::fs::write(&paths[0], part(0, "x")).unwrap();
        let missing = Gguf::open(&paths[0]).unwrap_err().to_string();
        assert_eq!(missing, format!("{}: No such file or directory (os error 2)", paths[1].display()));
        std::fs::write(&paths[1], part(1, "y")).unwrap();
        let g = Gguf::open(&paths[0]).unwrap();
        assert!(g.tensor("x").is_some() && g.tensor("y").is_some() && g.tensors.len() == 2);
        let second = Gguf::open(&paths[1]).unwrap_err().to_string();
        assert_eq!(second, format!("{}: it is part 2 of 2: name the first", paths[1].display()));
        let other = dir.path().join("m.gguf");
        std::fs::rename(&paths[0], &other).unwrap();
        assert_eq!(
            Gguf::open(&other).unwrap_err().to_string(),
            format!("{}: it has 2 parts: expected a name that ends in -00001-of-00002.gguf", other.display())
        );
    }
}
