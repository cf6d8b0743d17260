//! Any bytes as a routing trace, gzipped or not.

use std::{io::Cursor, path::Path};

use moe_hot::{replay::Routing, trace::TraceReader};

use super::memory::bounded;

/// A record is as large in memory as its bytes, but for what it costs to have any; a vector grows by doubling.
const PER_BYTE: usize = 64;
/// Buffers of the file and of the decompressor.
const FIXED: usize = 128 << 10;
/// The most that deflate makes of a byte.
const INFLATED: usize = 1032;

/// As it is, and with its checksums set right, which no mutation does.
pub fn run(data: &[u8]) {
    read(data);
    read(&with_checksums(data));
}

/// All of a trace, if it is one.
fn read(data: &[u8]) -> Option<Routing> {
    let size = if data.starts_with(&[0x1f, 0x8b]) { data.len() * INFLATED } else { data.len() };
    bounded(FIXED + PER_BYTE * size, || {
        let path = Path::new("t.trace");
        let open = || TraceReader::unpack(Cursor::new(data.to_vec()), path);
        let mut reader = match open() {
            Ok(reader) => reader,
            Err(e) => {
                assert!(e.to_string().starts_with("t.trace: "), "{e}");
                return None;
            }
        };
        let error = reader.by_ref().find_map(Result::err);
        assert!(reader.next().is_none(), "nothing comes after the end");
        let routing = Routing::read(open().ok()?);
        assert_eq!(routing.as_ref().err().map(ToString::to_string), error.map(|e| e.to_string()));
        routing.ok()
    })
}

/// `data` with the checksums that its head and its blocks should have.
pub fn with_checksums(data: &[u8]) -> Vec<u8> {
    let mut out = data.to_vec();
    let size = |out: &[u8], at: usize| {
        let bytes: [u8; 4] = out.get(at..at + 4)?.try_into().ok()?;
        usize::try_from(u32::from_le_bytes(bytes)).ok()
    };
    let mut set = |at: usize, n: usize, crc: usize| {
        let sum = crc32fast::hash(out.get(at..at.checked_add(n)?)?);
        out.get_mut(crc..crc + 4)?.copy_from_slice(&sum.to_le_bytes());
        Some(())
    };
    // magic, version, bytes of head, head, checksum
    let Some(head) = size(data, 12) else { return out };
    let mut at = head.saturating_add(16);
    let mut whole = set(16, head, at);
    at = at.saturating_add(4);
    // bytes of body, checksum, body
    while let (Some(()), Some(body)) = (whole, size(data, at)) {
        whole = set(at + 8, body, at + 4);
        at += 8 + body;
    }
    out
}
