//! Compression of headers (RFC 7541). We read all of it and write the plainest of it: literals, no table, so that what
//! we write depends on nothing that was written before.

mod huffman;

use std::collections::VecDeque;

/// The table that a peer may fill, bytes: the default, which we leave.
const TABLE_BYTES: usize = 4096;
/// What an entry counts beside its text, bytes.
const ENTRY_BYTES: usize = 32;

/// A block that cannot be read: nothing after it can be either.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Malformed;

/// Name and value of a header that the peer may mean again.
type Entry = (Box<[u8]>, Box<[u8]>);

/// Reads blocks of headers, in their order.
#[derive(Debug)]
pub struct Decoder {
    /// The newest first.
    table: VecDeque<Entry>,
    used: usize,
    limit: usize,
    name: Vec<u8>,
    value: Vec<u8>,
}

impl Default for Decoder {
    fn default() -> Self {
        Self { table: VecDeque::new(), used: 0, limit: TABLE_BYTES, name: Vec::new(), value: Vec::new() }
    }
}

impl Decoder {
    /// Reads one block and shows each header to `sink`, up to `list` bytes of them. Whether that was all.
    ///
    /// # Errors
    /// The connection must end.
    pub fn decode(
        &mut self,
        block: &[u8],
        list: usize,
        mut sink: impl FnMut(&[u8], &[u8]),
    ) -> Result<bool, Malformed> {
        let (mut rest, mut total, mut begun) = (block, 0usize, false);
        while let [first, ..] = rest {
            let size = match first {
                0x80.. => {
                    let index = integer(&mut rest, 7)?;
                    let (name, value) = self.entry(index)?;
                    let size = name.len() + value.len() + ENTRY_BYTES;
                    // A byte can stand for 4 KiB: what is too much is counted, not shown.
                    if total.saturating_add(size) <= list {
                        sink(name, value);
                    }
                    size
                }
                0x20..=0x3f => {
                    let limit = integer(&mut rest, 5)?;
                    if begun || limit > TABLE_BYTES {
                        return Err(Malformed);
                    }
                    self.limit = limit;
                    self.shrink(0);
                    continue;
                }
                literal => {
                    let keep = *literal >= 0x40;
                    let index = integer(&mut rest, if keep { 6 } else { 4 })?;
                    let size = self.literal(index, &mut rest)?;
                    if total.saturating_add(size) <= list {
                        sink(&self.name, &self.value);
                    }
                    if keep {
                        self.keep();
                    }
                    size
                }
            };
            begun = true;
            total = total.saturating_add(size);
            // A byte can stand for 4 KiB: beyond this nobody means it, and the table is worth no more work.
            if total > 4 * list {
                return Err(Malformed);
            }
        }
        (self.name, self.value) = (Vec::new(), Vec::new());
        Ok(total <= list)
    }

    /// Reads name and value; returns what they count.
    fn literal(&mut self, index: usize, rest: &mut &[u8]) -> Result<usize, Malformed> {
        let mut name = std::mem::take(&mut self.name);
        name.clear();
        if index == 0 {
            string(rest, &mut name)?;
        } else {
            name.extend_from_slice(self.entry(index)?.0);
        }
        self.name = name;
        self.value.clear();
        string(rest, &mut self.value)?;
        Ok(self.name.len() + self.value.len() + ENTRY_BYTES)
    }

    fn entry(&self, index: usize) -> Result<(&[u8], &[u8]), Malformed> {
        let index = index.checked_sub(1).ok_or(Malformed)?;
        match STATIC.get(index) {
            Some((name, value)) => Ok((name.as_bytes(), value.as_bytes())),
            None => {
                let (name, value) = self.table.get(index - STATIC.len()).ok_or(Malformed)?;
                Ok((name, value))
            }
        }
    }

    fn keep(&mut self) {
        let size = self.name.len() + self.value.len() + ENTRY_BYTES;
        self.shrink(size);
        // What does not fit at all empties the table, and that is no error.
        if size <= self.limit {
            self.used += size;
            self.table.push_front((self.name[..].into(), self.value[..].into()));
        }
    }

    /// Makes room for `size` bytes.
    fn shrink(&mut self, size: usize) {
        while self.used.saturating_add(size) > self.limit {
            let Some((name, value)) = self.table.pop_back() else { return };
            self.used -= name.len() + value.len() + ENTRY_BYTES;
        }
    }
}

/// A number whose first bits are the low `prefix` ones of the first byte.
fn integer(rest: &mut &[u8], prefix: u32) -> Result<usize, Malformed> {
    let (first, mut after) = rest.split_first().ok_or(Malformed)?;
    let mask = (1u8 << prefix) - 1;
    let mut value = usize::from(first & mask);
    if first & mask == mask {
        let mut shift = 0;
        loop {
            let (byte, later) = after.split_first().ok_or(Malformed)?;
            after = later;
            // Nothing of ours is as long as 2^28.
            if shift > 21 {
                return Err(Malformed);
            }
            value += usize::from(byte & 0x7f) << shift;
            shift += 7;
            if byte & 0x80 == 0 {
                break;
            }
        }
    }
    *rest = after;
    Ok(value)
}

fn string(rest: &mut &[u8], out: &mut Vec<u8>) -> Result<(), Malformed> {
    let coded = rest.first().ok_or(Malformed)? & 0x80 != 0;
    let size = integer(rest, 7)?;
    let (text, later) = rest.split_at_checked(size).ok_or(Malformed)?;
    *rest = later;
    if coded {
        return huffman::decode(text, out).ok_or(Malformed);
    }
    out.extend_from_slice(text);
    Ok(())
}

/// Writes the blocks of headers.
#[derive(Debug, Default)]
pub struct Encoder {
    block: Vec<u8>,
}

impl Encoder {
    /// Says once and for all that no table is used: then a peer that permits a smaller one need not be answered.
    pub const NO_TABLE: u8 = 0x20;

    /// A header of the static table, with its value.
    pub fn indexed(mut self, index: u8) -> Self {
        self.block.push(0x80 | index);
        self
    }

    /// A header whose name is in the static table below 15.
    pub fn named(mut self, index: u8, value: &[u8]) -> Self {
        self.block.push(index & 0xf);
        self.text(value);
        self
    }

    /// Any header.
    pub fn literal(mut self, name: &[u8], value: &[u8]) -> Self {
        self.block.push(0);
        self.text(name);
        self.text(value);
        self
    }

    /// The block.
    pub fn finish(self) -> Vec<u8> {
        self.block
    }

    fn text(&mut self, text: &[u8]) {
        let mut size = text.len();
        if size < 0x7f {
            #[expect(clippy::cast_possible_truncation, reason = "it was just compared")]
            self.block.push(size as u8);
        } else {
            self.block.push(0x7f);
            size -= 0x7f;
            while size >= 0x80 {
                self.block.push(0x80 | (size & 0x7f) as u8);
                size >>= 7;
            }
            #[expect(clippy::cast_possible_truncation, reason = "below 128")]
            self.block.push(size as u8);
        }
        self.block.extend_from_slice(text);
    }
}

/// RFC 7541, appendix A.
const STATIC: [(&str, &str); 61] = [
    (":authority", ""),
    (":method", "GET"),
    (":method", "POST"),
    (":path", "/"),
    (":path", "/index.html"),
    (":scheme", "http"),
    (":scheme", "https"),
    (":status", "200"),
    (":status", "204"),
    (":status", "206"),
    (":status", "304"),
    (":status", "400"),
    (":status", "404"),
    (":status", "500"),
    ("accept-charset", ""),
    ("accept-encoding", "gzip, deflate"),
    ("accept-language", ""),
    ("accept-ranges", ""),
    ("accept", ""),
    ("access-control-allow-origin", ""),
    ("age", ""),
    ("allow", ""),
    ("authorization", ""),
    ("cache-control", ""),
    ("content-disposition", ""),
    ("content-encoding", ""),
    ("content-language", ""),
    ("content-length", ""),
    ("content-location", ""),
    ("content-range", ""),
    ("content-type", ""),
    ("cookie", ""),
    ("date", ""),
    ("etag", ""),
    ("expect", ""),
    ("expires", ""),
    ("from", ""),
    ("host", ""),
    ("if-match", ""),
    ("if-modified-since", ""),
    ("if-none-match", ""),
    ("if-range", ""),
    ("if-unmodified-since", ""),
    ("last-modified", ""),
    ("link", ""),
    ("location", ""),
    ("max-forwards", ""),
    ("proxy-authenticate", ""),
    ("proxy-authorization", ""),
    ("range", ""),
    ("referer", ""),
    ("refresh", ""),
    ("retry-after", ""),
    ("server", ""),
    ("set-cookie", ""),
    ("strict-transport-security", ""),
    ("transfer-encoding", ""),
    ("user-agent", ""),
    ("vary", ""),
    ("via", ""),
    ("www-authenticate", ""),
];

#[cfg(test)]
mod tests;
