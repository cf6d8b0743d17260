//! Routing traces: which experts every layer routed in every step, and what was swapped.
//!
//! # Format, version 2, little-endian
//!
//! ```text
//! file    = magic "MOEHOTRT", u32 version, u32 bytes of head, head, u32 crc32(head), block*
//! head    = u64 model fingerprint, u32 K, u32 uses an upload, u32 layers, layers x layer
//! layer   = u16 il, u16 n_expert, u16 n_used, u16 class, u64 bytes of an expert in all its matrices
//! block   = u32 bytes of body, not 0, u32 crc32(body), body
//! body    = record*
//! record  = u8 1, ubatch                                  routing of one decoded ubatch
//!         | u8 2, u16 class, u32 slot, key or none, key   a swap, planned after the record before
//!         | u8 3, ubatch                                  routing of one ubatch of a prompt
//!         | u8 4, u16 class, u32 slots                    the class has so many slots from now on
//! ubatch  = u32 runs, runs x (u32 tokens, u32 sequence), layers x (u32 n, n x id)
//! id      = u8 if n_expert <= 256, else u16
//! key     = u16 layer of the class, u16 expert; none = ffff ffff
//! ```
//!
//! A run is of tokens side by side that are of one sequence. A layer has an id for each expert that a token
//! is routed to, the tokens one after the other; fewer tokens than the ubatch's where the model computes
//! only those with outputs, and none where a layer was not seen.
//!
//! Blocks are written whole, so a crash costs at most the last [`BLOCK_BYTES`]. A reader gives what is
//! whole and then says at which offset the file ends early.

use std::{
    fs::File,
    io::{self, BufRead, BufReader, Read, Write},
    path::{Path, PathBuf},
};

use flate2::read::MultiGzDecoder;
use parking_lot::Mutex;

use crate::{
    fault,
    policy::{Key, Routed, Swap},
};

const MAGIC: [u8; 8] = *b"MOEHOTRT";
const VERSION: u32 = 2;
/// How a gzipped file begins.
const GZIP: [u8; 2] = [0x1f, 0x8b];
/// A block is written when it has grown to this size.
pub const BLOCK_BYTES: usize = 64 << 10;
/// Most bytes of a head or block that a reader accepts. A block holds a whole ubatch: one of 32768 tokens,
/// 100 layers and 16 experts a token is 100 MiB.
const MAX_BYTES: u32 = 256 << 20;
/// Most tokens of a ubatch that a reader accepts: a bound on memory for damaged files.
const MAX_TOKENS: u32 = 1 << 20;
/// The same for one that was decoded through the slots, which takes a few; a policy works for each.
const MAX_DECODED: u32 = 1 << 10;
/// Most bytes of an expert that a reader accepts, so that sums over a trace fit.
const MAX_EXPERT_BYTES: u64 = 1 << 40;
/// Bytes of the head before its layers, and of each layer.
const HEAD_BYTES: usize = 20;
const LAYER_BYTES: usize = 16;
const DECODED: u8 = 1;
const SWAP: u8 = 2;
const PROMPT: u8 = 3;
const OPEN_SLOTS: u8 = 4;
const NONE: u32 = u32::MAX;

/// Why a trace cannot be read or written. Names the file, and the offset where it matters.
#[derive(Debug, thiserror::Error)]
pub enum TraceError {
    /// The system refuses.
    #[error("{path}: {source}")]
    Io {
        /// The file.
        path: String,
        /// Why.
        source: io::Error,
    },
    /// Another model of this process writes it.
    #[error("{path}: is being written for another model")]
    InUse {
        /// The file.
        path: String,
    },
    /// It is something else.
    #[error("{path}: not a routing trace, it does not begin with MOEHOTRT")]
    Foreign {
        /// The file.
        path: String,
    },
    /// It is from another version.
    #[error("{path}: routing trace of version {found}, expected version {VERSION}")]
    Version {
        /// The file.
        path: String,
        /// Its version.
        found: u32,
    },
    /// It ends in the middle of something.
    #[error("{path}: truncated at offset {offset}, in the {part} that begins at offset {begin}")]
    Truncated {
        /// The file.
        path: String,
        /// Where it ends.
        offset: u64,
        /// What is cut.
        part: &'static str,
        /// Where that begins.
        begin: u64,
    },
    /// Bytes have changed, or make no sense.
    #[error("{path}: the {part} at offset {offset} is damaged: {why}")]
    Damaged {
        /// The file.
        path: String,
        /// What is damaged.
        part: &'static str,
        /// Where it begins.
        offset: u64,
        /// How that was seen.
        why: &'static str,
    },
}

/// A layer of the trace.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct TraceLayer {
    /// Layer index in the model.
    pub il: u16,
    /// Experts.
    pub n_expert: u16,
    /// Experts a token is routed to.
    pub n_used: u16,
    /// Slot class; layers of equal class share a pool.
    pub class: u16,
    /// Bytes of one expert, all its matrices.
    pub expert_bytes: u64,
}

/// What a trace is about.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct TraceHeader {
    /// Tells models apart.
    pub fingerprint: u64,
    /// Slots a layer of the run.
    pub k: u32,
    /// Uses of experts for each one that a plan of the run might upload.
    pub uses_per_upload: u32,
    /// The layers on the hot path.
    pub layers: Vec<TraceLayer>,
}

/// Routing of one ubatch.
#[derive(Clone, PartialEq, Eq, Default, Debug)]
pub struct Step {
    /// Tokens.
    pub n_tokens: u32,
    /// Of a prompt, computed on the stock graph; else decoded through the slots.
    pub prefill: bool,
    /// Runs of tokens side by side that are of one sequence, `(tokens, sequence)`; empty when all are of one.
    pub runs: Vec<(u32, u32)>,
    /// `ids[layer]`: experts routed, tokens one after the other. In a prompt a layer may have fewer tokens
    /// than the ubatch, or none.
    pub ids: Vec<Vec<u16>>,
}

impl Step {
    /// Puts the sequence of each token into `out`.
    pub fn sequences(&self, out: &mut Vec<u32>) {
        out.clear();
        for &(n, sequence) in &self.runs {
            out.resize(out.len() + n as usize, sequence);
        }
    }
}

/// One entry of a trace.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum TraceRecord {
    /// Routing of one ubatch; a reader gives at least one run for its tokens, if it has any.
    Routed(Step),
    /// A swap that the policy planned after the record before.
    Swap {
        /// Slot class.
        class: u16,
        /// What it planned.
        swap: Swap,
    },
    /// The pool of a class has another size from now on.
    Open {
        /// Slot class.
        class: u16,
        /// Its slots, all layers together.
        n_slots: u32,
    },
}

/// Traces that are being written. Options are the process's, so two models would share a file.
static OPEN: Mutex<Vec<PathBuf>> = Mutex::new(Vec::new());

/// Writes a trace, block by block. What has not been flushed when it is dropped is lost.
pub struct TraceWriter {
    path: PathBuf,
    file: File,
    wide: Vec<bool>,
    body: Vec<u8>,
}

fn io_error(path: &Path) -> impl FnOnce(io::Error) -> TraceError + '_ {
    move |source| TraceError::Io { path: path.display().to_string(), source }
}

fn put(to: &mut Vec<u8>, values: &[u32]) {
    values.iter().for_each(|v| to.extend(v.to_le_bytes()));
}

impl TraceWriter {
    /// Creates or replaces the file at `path`.
    ///
    /// # Errors
    /// [`TraceError::Io`], [`TraceError::InUse`].
    pub fn create(path: &Path, header: &TraceHeader) -> Result<Self, TraceError> {
        let mut open = OPEN.lock();
        if open.iter().any(|p| p == path) {
            return Err(TraceError::InUse { path: path.display().to_string() });
        }
        let mut head = Vec::new();
        head.extend(header.fingerprint.to_le_bytes());
        head.extend(header.k.to_le_bytes());
        head.extend(header.uses_per_upload.to_le_bytes());
        head.extend((header.layers.len() as u32).to_le_bytes());
        for l in &header.layers {
            for v in [l.il, l.n_expert, l.n_used, l.class] {
                head.extend(v.to_le_bytes());
            }
            head.extend(l.expert_bytes.to_le_bytes());
        }
        let mut start = MAGIC.to_vec();
        start.extend(VERSION.to_le_bytes());
        start.extend((head.len() as u32).to_le_bytes());
        start.extend(&head);
        start.extend(crc32fast::hash(&head).to_le_bytes());
        let mut file = File::create(path).map_err(io_error(path))?;
        file.write_all(&start).map_err(io_error(path))?;
        open.push(path.into());
        let wide = header.layers.iter().map(|l| l.n_expert > 256).collect();
        Ok(TraceWriter { path: path.into(), file, wide, body: Vec::new() })
    }

    /// Adds the routing of one ubatch, of a prompt with `prefill`; `ids` has an entry for each layer of the
    /// header. Without `sequences` all tokens are of sequence 0.
    ///
    /// # Errors
    /// [`TraceError::Io`].
    pub fn routed(&mut self, prefill: bool, routed: Routed<'_>) -> Result<(), TraceError> {
        let Routed { n_tokens, sequences, ids } = routed;
        debug_assert!(sequences.is_empty() || sequences.len() == n_tokens as usize);
        self.body.push(if prefill { PROMPT } else { DECODED });
        if sequences.is_empty() {
            put(&mut self.body, &[1, n_tokens, 0]);
        } else {
            let runs = || sequences.chunk_by(|a, b| a == b);
            put(&mut self.body, &[runs().count() as u32]);
            runs().for_each(|run| put(&mut self.body, &[run.len() as u32, run[0]]));
        }
        for (ids, wide) in ids.iter().zip(&self.wide) {
            put(&mut self.body, &[ids.len() as u32]);
            if *wide {
                self.body.extend(ids.iter().flat_map(|id| id.to_le_bytes()));
            } else {
                self.body.extend(ids.iter().map(|id| *id as u8));
            }
        }
        if self.body.len() >= BLOCK_BYTES { self.flush() } else { Ok(()) }
    }

    /// Adds a planned swap.
    pub fn swap(&mut self, class: u16, swap: &Swap) {
        let bits = |k: Key| u32::from(k.layer) | u32::from(k.expert) << 16;
        self.body.push(SWAP);
        self.body.extend(class.to_le_bytes());
        put(&mut self.body, &[swap.slot, swap.evict.map_or(NONE, bits), bits(swap.admit)]);
    }

    /// Adds that the pool of a class has another size.
    pub fn open(&mut self, class: u16, n_slots: u32) {
        self.body.push(OPEN_SLOTS);
        self.body.extend(class.to_le_bytes());
        put(&mut self.body, &[n_slots]);
    }

    /// Writes what has been added so far.
    ///
    /// # Errors
    /// [`TraceError::Io`].
    pub fn flush(&mut self) -> Result<(), TraceError> {
        if self.body.is_empty() {
            return Ok(());
        }
        let mut block = (self.body.len() as u32).to_le_bytes().to_vec();
        block.extend(crc32fast::hash(&self.body).to_le_bytes());
        block.append(&mut self.body);
        fault::io("file").and_then(|()| self.file.write_all(&block)).map_err(io_error(&self.path))
    }
}

impl Drop for TraceWriter {
    fn drop(&mut self) {
        OPEN.lock().retain(|p| *p != self.path);
    }
}

/// Reads a trace; iterates over its records. After an error the iteration ends.
pub struct TraceReader<R = Box<dyn Read>> {
    path: String,
    input: R,
    offset: u64,
    header: TraceHeader,
    body: Vec<u8>,
    at: usize,
    block_begin: u64,
    ended: bool,
}

impl TraceReader {
    /// Opens the file at `path`, gzipped or not, and reads its head. Offsets of errors count unpacked bytes.
    ///
    /// # Errors
    /// Any [`TraceError`].
    pub fn open(path: &Path) -> Result<Self, TraceError> {
        let file = File::open(path).map_err(io_error(path))?;
        TraceReader::unpack(BufReader::new(file), path)
    }

    /// As [`TraceReader::open`], of what is at `path` or could be.
    ///
    /// # Errors
    /// Any [`TraceError`].
    pub fn unpack(mut file: impl BufRead + 'static, path: &Path) -> Result<Self, TraceError> {
        let gzipped = file.fill_buf().map_err(io_error(path))?.starts_with(&GZIP);
        let input: Box<dyn Read> = if gzipped { Box::new(MultiGzDecoder::new(file)) } else { Box::new(file) };
        TraceReader::new(input, &path.display().to_string())
    }
}

impl<R: Read> TraceReader<R> {
    /// Reads a trace from `input`; `path` is for messages.
    ///
    /// # Errors
    /// Any [`TraceError`].
    pub fn new(input: R, path: &str) -> Result<Self, TraceError> {
        let header = TraceHeader { fingerprint: 0, k: 0, uses_per_upload: 0, layers: Vec::new() };
        let mut r = TraceReader {
            path: path.into(),
            input,
            offset: 0,
            header,
            body: Vec::new(),
            at: 0,
            block_begin: 0,
            ended: false,
        };
        let mut magic = [0; 8];
        if r.fill(&mut magic)? < magic.len() || magic != MAGIC {
            return Err(TraceError::Foreign { path: r.path });
        }
        let version = r.u32("head", 0)?;
        if version != VERSION {
            return Err(TraceError::Version { path: r.path, found: version });
        }
        let n = r.u32("head", 0)?;
        let head = r.bytes(n, "head", 0)?;
        let crc = r.u32("head", 0)?;
        let damaged = |why| TraceError::Damaged { path: path.into(), part: "head", offset: 0, why };
        if crc != crc32fast::hash(&head) {
            return Err(damaged("its checksum does not fit"));
        }
        let u16_at = |i: usize| u16::from_le_bytes(head[i..i + 2].try_into().expect("two bytes"));
        let u32_at = |i: usize| u32::from_le_bytes(head[i..i + 4].try_into().expect("four bytes"));
        let u64_at = |i: usize| u64::from_le_bytes(head[i..i + 8].try_into().expect("eight bytes"));
        let size = |layers: u32| (layers as usize).checked_mul(LAYER_BYTES)?.checked_add(HEAD_BYTES);
        if head.len() < HEAD_BYTES || size(u32_at(16)) != Some(head.len()) {
            return Err(damaged("its size does not fit its layers"));
        }
        r.header.fingerprint = u64_at(0);
        r.header.k = u32_at(8);
        r.header.uses_per_upload = u32_at(12);
        r.header.layers = (HEAD_BYTES..head.len())
            .step_by(LAYER_BYTES)
            .map(|i| TraceLayer {
                il: u16_at(i),
                n_expert: u16_at(i + 2),
                n_used: u16_at(i + 4),
                class: u16_at(i + 6),
                expert_bytes: u64_at(i + 8),
            })
            .collect();
        if r.header.layers.len() > usize::from(u16::MAX) {
            return Err(damaged("it has more layers than a model can have"));
        }
        if r.header.layers.iter().any(|l| l.expert_bytes > MAX_EXPERT_BYTES) {
            return Err(damaged("an expert claims an impossible size"));
        }
        if r.header.layers.iter().any(|l| l.n_used == 0 || l.n_used > l.n_expert) {
            return Err(damaged("a layer's tokens cannot use as many experts"));
        }
        Ok(r)
    }

    /// What the trace is about.
    pub fn header(&self) -> &TraceHeader {
        &self.header
    }

    /// Reads until `buf` is full or the file ends; returns how much.
    fn fill(&mut self, buf: &mut [u8]) -> Result<usize, TraceError> {
        let mut n = 0;
        while n < buf.len() {
            match self.input.read(&mut buf[n..]) {
                Ok(0) => break,
                Ok(m) => n += m,
                Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                Err(source) => return Err(TraceError::Io { path: self.path.clone(), source }),
            }
        }
        self.offset += n as u64;
        Ok(n)
    }

    fn bytes(&mut self, n: u32, part: &'static str, begin: u64) -> Result<Vec<u8>, TraceError> {
        if n > MAX_BYTES {
            let why = "it claims an impossible size";
            return Err(TraceError::Damaged { path: self.path.clone(), part, offset: begin, why });
        }
        // grows with what is there, so that a damaged size costs no memory
        let mut buf = Vec::new();
        let got = self.input.by_ref().take(n.into()).read_to_end(&mut buf);
        let got = got.map_err(|source| TraceError::Io { path: self.path.clone(), source })?;
        self.offset += got as u64;
        if got < n as usize {
            return Err(TraceError::Truncated { path: self.path.clone(), offset: self.offset, part, begin });
        }
        Ok(buf)
    }

    fn u32(&mut self, part: &'static str, begin: u64) -> Result<u32, TraceError> {
        let b = self.bytes(4, part, begin)?;
        Ok(u32::from_le_bytes([b[0], b[1], b[2], b[3]]))
    }

    /// The next block; false at the end of the file.
    fn block(&mut self) -> Result<bool, TraceError> {
        let begin = self.offset;
        let mut size = [0; 4];
        match self.fill(&mut size)? {
            0 => return Ok(false),
            4 => {}
            _ => {
                let (path, offset) = (self.path.clone(), self.offset);
                return Err(TraceError::Truncated { path, offset, part: "block", begin });
            }
        }
        let crc = self.u32("block", begin)?;
        self.body = self.bytes(u32::from_le_bytes(size), "block", begin)?;
        self.at = 0;
        self.block_begin = begin;
        // zeros, whose checksum fits: what some file systems leave where data was lost
        if self.body.is_empty() {
            return Err(self.damaged("it is empty"));
        }
        if crc != crc32fast::hash(&self.body) {
            return Err(self.damaged("its checksum does not fit"));
        }
        Ok(true)
    }

    fn damaged(&self, why: &'static str) -> TraceError {
        TraceError::Damaged { path: self.path.clone(), part: "block", offset: self.block_begin, why }
    }

    /// The next `n` bytes of the body, by their place in it.
    fn skip(&mut self, n: usize) -> Result<std::ops::Range<usize>, TraceError> {
        let end = self.at.checked_add(n).filter(|end| *end <= self.body.len());
        let end = end.ok_or_else(|| self.damaged("a record is longer than its block"))?;
        Ok(std::mem::replace(&mut self.at, end)..end)
    }

    fn take<const N: usize>(&mut self) -> Result<[u8; N], TraceError> {
        let at = self.skip(N)?;
        Ok(self.body[at].try_into().expect("as many bytes"))
    }

    fn take_u32(&mut self) -> Result<u32, TraceError> {
        self.take().map(u32::from_le_bytes)
    }

    fn record(&mut self) -> Result<TraceRecord, TraceError> {
        let [kind] = self.take()?;
        match kind {
            DECODED | PROMPT => self.step(kind == PROMPT).map(TraceRecord::Routed),
            SWAP => {
                let class = u16::from_le_bytes(self.take()?);
                let slot = self.take_u32()?;
                let key = |v: u32| Key { layer: v as u16, expert: (v >> 16) as u16 };
                let evict = self.take_u32()?;
                let admit = key(self.take_u32()?);
                let evict = (evict != NONE).then(|| key(evict));
                Ok(TraceRecord::Swap { class, swap: Swap { slot, evict, admit } })
            }
            OPEN_SLOTS => {
                let class = u16::from_le_bytes(self.take()?);
                Ok(TraceRecord::Open { class, n_slots: self.take_u32()? })
            }
            _ => Err(self.damaged("a record is of no known kind")),
        }
    }

    fn step(&mut self, prefill: bool) -> Result<Step, TraceError> {
        let most = if prefill { MAX_TOKENS } else { MAX_DECODED };
        let (mut runs, mut n_tokens) = (Vec::new(), 0);
        for _ in 0..self.take_u32()? {
            let (n, sequence) = (self.take_u32()?, self.take_u32()?);
            if n > most - n_tokens {
                return Err(self.damaged("a ubatch claims an impossible number of tokens"));
            }
            n_tokens += n;
            runs.push((n, sequence));
        }
        let mut ids = Vec::with_capacity(self.header.layers.len());
        for l in 0..self.header.layers.len() {
            let n_expert = self.header.layers[l].n_expert;
            let wide = n_expert > 256;
            let n = self.take_u32()? as usize;
            let bytes = self.skip(if wide { 2 * n } else { n })?;
            let bytes = &self.body[bytes];
            let row: Vec<u16> = if wide {
                bytes.chunks_exact(2).map(|b| u16::from_le_bytes([b[0], b[1]])).collect()
            } else {
                bytes.iter().map(|b| u16::from(*b)).collect()
            };
            if row.iter().any(|id| *id >= n_expert) {
                return Err(self.damaged("an expert is beyond its layer's count"));
            }
            ids.push(row);
        }
        Ok(Step { n_tokens, prefill, runs, ids })
    }
}

impl<R: Read> Iterator for TraceReader<R> {
    type Item = Result<TraceRecord, TraceError>;

    fn next(&mut self) -> Option<Self::Item> {
        if self.ended {
            return None;
        }
        while self.at >= self.body.len() {
            match self.block() {
                Ok(true) => {}
                Ok(false) => return None,
                Err(e) => {
                    self.ended = true;
                    return Some(Err(e));
                }
            }
        }
        let record = self.record();
        self.ended = record.is_err();
        Some(record)
    }
}

#[cfg(test)]
mod tests {
    use std::fs;

    use proptest::prelude::*;

    use super::*;

    /// Where the first block of a file with [`header`] begins.
    const HEAD: usize = 8 + 4 + 4 + (HEAD_BYTES + 2 * LAYER_BYTES) + 4;

    fn header() -> TraceHeader {
        let layer =
            |il, n_expert, expert_bytes| TraceLayer { il, n_expert, n_used: 2, class: 0, expert_bytes };
        let layers = vec![layer(0, 64, 55_296), layer(3, 512, 5 << 32)];
        TraceHeader { fingerprint: 7, k: 4, uses_per_upload: 64, layers }
    }

    fn routed(i: u16) -> TraceRecord {
        let ids = vec![vec![i % 64, 1], vec![i % 512, 511]];
        TraceRecord::Routed(Step { n_tokens: 1, prefill: false, runs: vec![(1, u32::from(i % 3))], ids })
    }

    fn swap() -> TraceRecord {
        let swap = Swap { slot: 3, evict: None, admit: Key { layer: 1, expert: 300 } };
        TraceRecord::Swap { class: 0, swap }
    }

    /// A prompt of 2048 tokens, of whose last layer only the token with an output was routed.
    fn prompt() -> TraceRecord {
        let ids = vec![(0..2 * 2048).map(|i| i % 64).collect(), vec![300, 511]];
        TraceRecord::Routed(Step { n_tokens: 2048, prefill: true, runs: vec![(2048, 5)], ids })
    }

    fn written(records: &[TraceRecord]) -> Vec<u8> {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("t");
        let mut w = TraceWriter::create(&path, &header()).unwrap();
        let mut sequences = Vec::new();
        for r in records {
            match r {
                TraceRecord::Routed(step) => {
                    step.sequences(&mut sequences);
                    let Step { n_tokens, prefill, ids, .. } = step;
                    w.routed(*prefill, Routed { n_tokens: *n_tokens, sequences: &sequences, ids }).unwrap();
                }
                TraceRecord::Swap { class, swap } => w.swap(*class, swap),
                TraceRecord::Open { class, n_slots } => w.open(*class, *n_slots),
            }
        }
        w.flush().unwrap();
        fs::read(&path).unwrap()
    }

    /// `bytes` with another body in their only block, whose checksum fits.
    fn with_body(bytes: &[u8], body: &[u8]) -> Vec<u8> {
        let mut file = bytes[..HEAD].to_vec();
        file.extend((body.len() as u32).to_le_bytes());
        file.extend(crc32fast::hash(body).to_le_bytes());
        file.extend(body);
        file
    }

    fn read(bytes: &[u8]) -> (Vec<TraceRecord>, Option<String>) {
        let reader = match TraceReader::new(bytes, "t.trace") {
            Ok(r) => r,
            Err(e) => return (vec![], Some(e.to_string())),
        };
        let mut got = Vec::new();
        for r in reader {
            match r {
                Ok(r) => got.push(r),
                Err(e) => return (got, Some(e.to_string())),
            }
        }
        (got, None)
    }

    #[test]
    fn what_is_written_is_read() {
        let n = if cfg!(miri) { 300 } else { 20_000 };
        let mut records: Vec<_> = (0..n).map(routed).collect();
        records.insert(5, swap());
        records.insert(records.len() / 2, prompt());
        let bytes = written(&records);
        let (got, error) = read(&bytes);
        assert_eq!(error, None);
        assert!(got == records);
        assert_eq!(TraceReader::new(bytes.as_slice(), "t.trace").unwrap().header(), &header());
    }

    #[test]
    fn a_layer_that_cannot_be_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("t");
        for (n_expert, n_used) in [(0, 0), (4, 0), (4, 5)] {
            let mut header = header();
            (header.layers[1].n_expert, header.layers[1].n_used) = (n_expert, n_used);
            TraceWriter::create(&path, &header).unwrap();
            let why = "t.trace: the head at offset 0 is damaged: a layer's tokens cannot use as many experts";
            assert_eq!(read(&fs::read(&path).unwrap()).1.as_deref(), Some(why));
        }
        let mut header = header();
        header.layers[0].expert_bytes = MAX_EXPERT_BYTES + 1;
        TraceWriter::create(&path, &header).unwrap();
        let why = "t.trace: the head at offset 0 is damaged: an expert claims an impossible size";
        assert_eq!(read(&fs::read(&path).unwrap()).1.as_deref(), Some(why));
    }

    #[test]
    fn tokens_that_are_claimed_cost_no_memory() {
        let mut body = vec![PROMPT];
        put(&mut body, &[1, MAX_TOKENS, 7, 0, 0]);
        let (got, error) = read(&with_body(&written(&[routed(0)]), &body.repeat(1000)));
        assert_eq!((got.len(), error), (1000, None));
        let TraceRecord::Routed(step) = &got[999] else { panic!("{:?}", got[999]) };
        assert_eq!((step.n_tokens, step.runs.as_slice()), (MAX_TOKENS, &[(MAX_TOKENS, 7)][..]));
    }

    #[test]
    fn a_sequence_costs_bytes_only_where_it_changes() {
        let step = |sequences: &[u32]| {
            let ids = vec![vec![1; 8], vec![]];
            let runs = sequences.chunk_by(|a, b| a == b).map(|run| (run.len() as u32, run[0])).collect();
            TraceRecord::Routed(Step { n_tokens: 4, prefill: false, runs, ids })
        };
        let bytes = |sequences: &[u32]| written(&[step(sequences)]).len();
        assert_eq!(bytes(&[7; 4]), bytes(&[]));
        assert_eq!(bytes(&[7, 7, 8, 8]), bytes(&[7; 4]) + 8);
        assert_eq!(bytes(&[0, 1, 2, 3]), bytes(&[7; 4]) + 3 * 8);
        assert_eq!(
            read(&written(&[step(&[])])),
            (vec![step(&[0; 4])], None),
            "not told: all are of sequence 0"
        );
    }

    #[test]
    fn each_kind_of_bad_file_has_its_message() {
        let bytes = written(&[routed(1), swap()]);
        let head = HEAD;
        let cut = |n: usize| read(&bytes[..n]).1.unwrap();
        let changed = |at: usize| {
            let mut b = bytes.clone();
            b[at] ^= 1;
            read(&b).1.unwrap()
        };
        assert_eq!(cut(4), "t.trace: not a routing trace, it does not begin with MOEHOTRT");
        assert_eq!(changed(0), "t.trace: not a routing trace, it does not begin with MOEHOTRT");
        assert_eq!(changed(8), "t.trace: routing trace of version 3, expected version 2");
        assert_eq!(cut(20), "t.trace: truncated at offset 20, in the head that begins at offset 0");
        assert_eq!(changed(20), "t.trace: the head at offset 0 is damaged: its checksum does not fit");
        let in_block =
            format!("t.trace: truncated at offset {}, in the block that begins at offset {head}", head + 2);
        assert_eq!(cut(head + 2), in_block);
        let last = bytes.len() - 1;
        let in_body =
            format!("t.trace: truncated at offset {last}, in the block that begins at offset {head}");
        assert_eq!(cut(last), in_body);
        let damaged = format!("t.trace: the block at offset {head} is damaged: its checksum does not fit");
        assert_eq!(changed(last), damaged);
        assert_eq!(read(&bytes[..head]), (vec![], None), "a trace without records");
        let mut first_version = bytes.clone();
        first_version[8] = 1;
        let message = "t.trace: routing trace of version 1, expected version 2";
        assert_eq!(read(&first_version).1.unwrap(), message);
        let mut large = bytes.clone();
        large[head + 3] = 0x10;
        let message = format!("t.trace: the block at offset {head} is damaged: it claims an impossible size");
        assert_eq!(read(&large).1.unwrap(), message);
    }

    #[test]
    fn records_that_make_no_sense_are_refused() {
        let bytes = written(&[]);
        let error = |body: &[u8]| {
            let (got, error) = read(&with_body(&bytes, body));
            assert!(got.is_empty());
            let error = error.unwrap();
            let begin = format!("t.trace: the block at offset {HEAD} is damaged: ");
            error.strip_prefix(&begin).unwrap_or_else(|| panic!("{error}")).to_string()
        };
        assert_eq!(error(&[5]), "a record is of no known kind");
        assert_eq!(error(&[]), "it is empty");
        let u32s = |kind: u8, values: &[u32]| {
            let mut body = vec![kind];
            put(&mut body, values);
            body
        };
        for kind in [DECODED, PROMPT] {
            let tokens = "a ubatch claims an impossible number of tokens";
            assert_eq!(error(&u32s(kind, &[1, u32::MAX, 0])), tokens);
            let most = if kind == DECODED { MAX_DECODED } else { MAX_TOKENS };
            assert_eq!(error(&u32s(kind, &[2, most, 0, 1, 0])), tokens);
            let beyond = "a record is longer than its block";
            assert_eq!(error(&u32s(kind, &[1, 1, 0, u32::MAX])), beyond);
            assert_eq!(error(&u32s(kind, &[u32::MAX, 1, 0])), beyond);
            assert_eq!(error(&u32s(kind, &[1, 1, 0, 0])), beyond, "without the second layer");
            let mut expert = u32s(kind, &[1, 1, 0, 1]);
            expert.push(64);
            assert_eq!(error(&expert), "an expert is beyond its layer's count");
        }
    }

    #[test]
    fn whole_blocks_before_the_damage_are_read() {
        let records: Vec<_> = (0..20_000).map(routed).collect();
        let bytes = written(&records);
        let (got, error) = read(&bytes[..bytes.len() - 1]);
        assert!(!got.is_empty() && got.len() < records.len() && records.starts_with(&got));
        assert!(error.unwrap().contains("truncated"));
    }

    #[test]
    fn two_models_do_not_write_the_same_file() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("t");
        let first = TraceWriter::create(&path, &header()).unwrap();
        let e = TraceWriter::create(&path, &header()).err().unwrap().to_string();
        assert_eq!(e, format!("{}: is being written for another model", path.display()));
        drop(first);
        assert!(TraceWriter::create(&path, &header()).is_ok());
    }

    #[test]
    #[cfg_attr(miri, ignore = "the system's messages are others there")]
    fn a_missing_file_names_itself() {
        let e = TraceReader::open(Path::new("/nonexistent/x.trace")).err().expect("no such file").to_string();
        assert_eq!(e, "/nonexistent/x.trace: No such file or directory (os error 2)");
        let e = TraceWriter::create(Path::new("/nonexistent/x.trace"), &header()).err().unwrap().to_string();
        assert_eq!(e, "/nonexistent/x.trace: No such file or directory (os error 2)");
    }

    fn key() -> impl Strategy<Value = Key> {
        (0..9u16, 0..512u16).prop_map(|(layer, expert)| Key { layer, expert })
    }

    fn any_record() -> impl Strategy<Value = TraceRecord> {
        let ids = |n_expert: u16| prop::collection::vec(0..n_expert, 0..40);
        // side by side they differ, or they were one
        let runs = prop::collection::vec((1..9u32, 0..5u32), 1..5).prop_map(|mut runs| {
            runs.dedup_by_key(|run| run.1);
            runs.into_iter().map(|(n, s)| (n, s * 0x0100_0001)).collect::<Vec<_>>()
        });
        let step = (any::<bool>(), runs, ids(64), ids(512)).prop_map(|(prefill, runs, narrow, wide)| {
            let n_tokens = runs.iter().map(|(n, _)| n).sum();
            TraceRecord::Routed(Step { n_tokens, prefill, runs, ids: vec![narrow, wide] })
        });
        let swap = (any::<u16>(), any::<u32>(), prop::option::of(key()), key()).prop_map(
            |(class, slot, evict, admit)| TraceRecord::Swap { class, swap: Swap { slot, evict, admit } },
        );
        prop_oneof![step, swap]
    }

    proptest! {
        #[test]
        fn every_record_is_read_as_it_was_written(records in prop::collection::vec(any_record(), 0..20)) {
            let (got, error) = read(&written(&records));
            prop_assert_eq!(error, None);
            prop_assert_eq!(got, records);
        }

        #[test]
        fn a_damaged_body_never_panics(
            records in prop::collection::vec(any_record(), 1..4),
            at in any::<prop::sample::Index>(),
            byte in any::<u8>(),
        ) {
            let bytes = written(&records);
            let mut body = bytes[HEAD + 8..].to_vec();
            let at = at.index(body.len());
            body[at] = byte;
            read(&with_body(&bytes, &body));
        }

        #[test]
        fn damaged_bytes_never_panic(at in 0..300usize, bit in 0..8u8, cut in 0..300usize) {
            let mut bytes = written(&(0..12).map(routed).collect::<Vec<_>>());
            let n = bytes.len();
            bytes[at % n] ^= 1 << bit;
            bytes.truncate(n - cut % n);
            read(&bytes);
        }
    }
}
