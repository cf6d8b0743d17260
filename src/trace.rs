//! Routing traces: which experts every layer routed in every step, and what was swapped.
//!
//! # Format, version 1, little-endian
//!
//! ```text
//! file    = magic "MOEHOTRT", u32 version, u32 bytes of head, head, u32 crc32(head), block*
//! head    = u64 model fingerprint, u32 K, u32 uses an upload, u32 layers, layers x (u16 il, u16 n_expert, u16 n_used, u16 class)
//! block   = u32 bytes of body, u32 crc32(body), body
//! body    = record*
//! record  = u8 1, u16 n_tokens, layers x (u16 n, n x id)     routing of one decoded ubatch
//!         | u8 2, u16 class, u32 slot, key or none, key      a swap, planned after the record before
//! id      = u8 if n_expert <= 256, else u16
//! key     = u16 layer of the class, u16 expert; none = ffff ffff
//! ```
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

use crate::policy::{Key, Swap};

const MAGIC: [u8; 8] = *b"MOEHOTRT";
const VERSION: u32 = 1;
/// How a gzipped file begins.
const GZIP: [u8; 2] = [0x1f, 0x8b];
/// A block is written when it has grown to this size.
pub const BLOCK_BYTES: usize = 64 << 10;
/// Most bytes of a head or block that a reader accepts: a bound on memory for damaged files.
const MAX_BYTES: u32 = 16 << 20;
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

/// One entry of a trace.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum TraceRecord {
    /// Routing of one decoded ubatch: `ids[layer]`, tokens one after the other.
    Routed {
        /// Tokens of the ubatch.
        n_tokens: u16,
        /// Experts by layer.
        ids: Vec<Vec<u16>>,
    },
    /// A swap that the policy planned after the record before.
    Swap {
        /// Slot class.
        class: u16,
        /// What it planned.
        swap: Swap,
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

    /// Adds the routing of one decoded ubatch; `ids` has an entry for each layer of the header.
    ///
    /// # Errors
    /// [`TraceError::Io`].
    pub fn routed(&mut self, n_tokens: u32, ids: &[Vec<u16>]) -> Result<(), TraceError> {
        self.body.push(1);
        self.body.extend((n_tokens as u16).to_le_bytes());
        for (ids, wide) in ids.iter().zip(&self.wide) {
            self.body.extend((ids.len() as u16).to_le_bytes());
            for id in ids {
                let bytes = id.to_le_bytes();
                self.body.extend(&bytes[..if *wide { 2 } else { 1 }]);
            }
        }
        if self.body.len() >= BLOCK_BYTES { self.flush() } else { Ok(()) }
    }

    /// Adds a planned swap.
    pub fn swap(&mut self, class: u16, swap: &Swap) {
        let bits = |k: Key| u32::from(k.layer) | u32::from(k.expert) << 16;
        self.body.push(2);
        self.body.extend(class.to_le_bytes());
        self.body.extend(swap.slot.to_le_bytes());
        self.body.extend(swap.evict.map_or(NONE, bits).to_le_bytes());
        self.body.extend(bits(swap.admit).to_le_bytes());
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
        self.file.write_all(&block).map_err(io_error(&self.path))
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
        let mut file = BufReader::new(File::open(path).map_err(io_error(path))?);
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
        let layers = head.get(16..20).map(|b| u32::from_le_bytes([b[0], b[1], b[2], b[3]]) as usize);
        if layers.and_then(|l| l.checked_mul(8)?.checked_add(20)) != Some(head.len()) {
            return Err(damaged("its size does not fit its layers"));
        }
        let u16_at = |i: usize| u16::from_le_bytes([head[i], head[i + 1]]);
        r.header.fingerprint = u64::from_le_bytes(head[..8].try_into().expect("eight bytes"));
        r.header.k = u32::from_le_bytes(head[8..12].try_into().expect("four bytes"));
        r.header.uses_per_upload = u32::from_le_bytes(head[12..16].try_into().expect("four bytes"));
        r.header.layers = (20..head.len())
            .step_by(8)
            .map(|i| TraceLayer {
                il: u16_at(i),
                n_expert: u16_at(i + 2),
                n_used: u16_at(i + 4),
                class: u16_at(i + 6),
            })
            .collect();
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
        let mut buf = vec![0; n as usize];
        if self.fill(&mut buf)? < buf.len() {
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
        if crc != crc32fast::hash(&self.body) {
            return Err(self.damaged("its checksum does not fit"));
        }
        Ok(true)
    }

    fn damaged(&self, why: &'static str) -> TraceError {
        TraceError::Damaged { path: self.path.clone(), part: "block", offset: self.block_begin, why }
    }

    fn take<const N: usize>(&mut self) -> Result<[u8; N], TraceError> {
        let bytes = self.body.get(self.at..self.at + N).and_then(|b| b.try_into().ok());
        self.at += N;
        bytes.ok_or_else(|| self.damaged("a record is longer than its block"))
    }

    fn record(&mut self) -> Result<TraceRecord, TraceError> {
        let [kind] = self.take()?;
        match kind {
            1 => {
                let n_tokens = u16::from_le_bytes(self.take()?);
                let mut ids = Vec::with_capacity(self.header.layers.len());
                for l in 0..self.header.layers.len() {
                    let n_expert = self.header.layers[l].n_expert;
                    let n = u16::from_le_bytes(self.take()?);
                    let mut row = Vec::new();
                    for _ in 0..n {
                        let id = if n_expert > 256 {
                            u16::from_le_bytes(self.take()?)
                        } else {
                            u16::from(self.take::<1>()?[0])
                        };
                        if id >= n_expert {
                            return Err(self.damaged("an expert is beyond its layer's count"));
                        }
                        row.push(id);
                    }
                    ids.push(row);
                }
                Ok(TraceRecord::Routed { n_tokens, ids })
            }
            2 => {
                let class = u16::from_le_bytes(self.take()?);
                let slot = u32::from_le_bytes(self.take()?);
                let key = |v: u32| Key { layer: v as u16, expert: (v >> 16) as u16 };
                let evict = u32::from_le_bytes(self.take()?);
                let admit = key(u32::from_le_bytes(self.take()?));
                let evict = (evict != NONE).then(|| key(evict));
                Ok(TraceRecord::Swap { class, swap: Swap { slot, evict, admit } })
            }
            _ => Err(self.damaged("a record is of no known kind")),
        }
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

    fn header() -> TraceHeader {
        let layer = |il, n_expert| TraceLayer { il, n_expert, n_used: 2, class: 0 };
        TraceHeader { fingerprint: 7, k: 4, uses_per_upload: 64, layers: vec![layer(0, 64), layer(3, 512)] }
    }

    fn routed(i: u16) -> TraceRecord {
        TraceRecord::Routed { n_tokens: 1, ids: vec![vec![i % 64, 1], vec![i % 512, 511]] }
    }

    fn swap() -> TraceRecord {
        let swap = Swap { slot: 3, evict: None, admit: Key { layer: 1, expert: 300 } };
        TraceRecord::Swap { class: 0, swap }
    }

    fn written(records: &[TraceRecord]) -> Vec<u8> {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("t");
        let mut w = TraceWriter::create(&path, &header()).unwrap();
        for r in records {
            match r {
                TraceRecord::Routed { n_tokens, ids } => w.routed(u32::from(*n_tokens), ids).unwrap(),
                TraceRecord::Swap { class, swap } => w.swap(*class, swap),
            }
        }
        w.flush().unwrap();
        fs::read(&path).unwrap()
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
        let mut records: Vec<_> = (0..20_000).map(routed).collect();
        records.insert(5, swap());
        let bytes = written(&records);
        let (got, error) = read(&bytes);
        assert_eq!(error, None);
        assert!(got == records);
    }

    #[test]
    fn each_kind_of_bad_file_has_its_message() {
        let bytes = written(&[routed(1), swap()]);
        let head = 8 + 4 + 4 + (20 + 2 * 8) + 4;
        let cut = |n: usize| read(&bytes[..n]).1.unwrap();
        let changed = |at: usize| {
            let mut b = bytes.clone();
            b[at] ^= 1;
            read(&b).1.unwrap()
        };
        assert_eq!(cut(4), "t.trace: not a routing trace, it does not begin with MOEHOTRT");
        assert_eq!(changed(0), "t.trace: not a routing trace, it does not begin with MOEHOTRT");
        assert_eq!(changed(8), "t.trace: routing trace of version 0, expected version 1");
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
    fn a_missing_file_names_itself() {
        let e = TraceReader::open(Path::new("/nonexistent/x.trace")).err().expect("no such file").to_string();
        assert_eq!(e, "/nonexistent/x.trace: No such file or directory (os error 2)");
        let e = TraceWriter::create(Path::new("/nonexistent/x.trace"), &header()).err().unwrap().to_string();
        assert_eq!(e, "/nonexistent/x.trace: No such file or directory (os error 2)");
    }

    proptest! {
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
