//! What is on its way from one end of a copy to the other.

use std::{collections::VecDeque, io::IoSlice};

use bytes::{Buf, Bytes};

/// Slices of one write: as many records as are in the largest read.
const SLICES: usize = 16;

/// Bytes on their way from one end to the other, in the slices they came in.
#[derive(Debug, Default)]
pub struct Chunks {
    first: Bytes,
    more: VecDeque<Bytes>,
    size: usize,
}

impl Chunks {
    pub(super) fn is_empty(&self) -> bool {
        self.size == 0
    }

    /// How many bytes there are.
    pub(super) fn len(&self) -> usize {
        self.size
    }

    /// There is one slice at most.
    pub(super) fn is_one(&self) -> bool {
        self.more.is_empty()
    }

    pub(super) fn push(&mut self, chunk: Bytes) {
        self.size += chunk.len();
        if self.first.is_empty() {
            self.first = chunk;
        } else {
            self.more.push_back(chunk);
        }
    }

    /// Nothing waits any more, in no memory.
    pub(super) fn clear(&mut self) {
        *self = Self::default();
    }

    /// The first one; not empty as long as there are any.
    pub fn first(&mut self) -> &mut Bytes {
        &mut self.first
    }

    /// The first ones for one system call.
    pub(super) fn slices(&self) -> [IoSlice<'_>; SLICES] {
        let mut slices = [IoSlice::new(&[]); SLICES];
        let all = std::iter::once(&self.first).chain(&self.more);
        for (slice, chunk) in slices.iter_mut().zip(all) {
            *slice = IoSlice::new(chunk);
        }
        slices
    }

    /// The first `size` bytes are gone.
    pub(super) fn advance(&mut self, mut size: usize) {
        loop {
            let here = size.min(self.first.len());
            self.first.advance(here);
            size -= here;
            self.settle();
            if size == 0 || self.first.is_empty() {
                return;
            }
        }
    }

    /// To be called after bytes of the first one were taken.
    pub(super) fn settle(&mut self) {
        if self.first.is_empty() {
            // An empty slice would still hold on to its buffer.
            self.first = self.more.pop_front().unwrap_or_default();
        }
        self.size = self.first.len() + self.more.iter().map(Bytes::len).sum::<usize>();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn slices_are_taken_from_the_front() {
        let mut chunks = Chunks::default();
        for text in ["one", "two", "three"] {
            chunks.push(Bytes::from_static(text.as_bytes()));
        }
        let rest =
            |chunks: &Chunks| chunks.slices().iter().flat_map(|slice| slice.to_vec()).collect::<Vec<u8>>();
        chunks.advance(1);
        assert_eq!((rest(&chunks), chunks.len()), (b"netwothree".to_vec(), 10));
        chunks.advance(5);
        assert_eq!((rest(&chunks), chunks.is_one()), (b"three".to_vec(), true));
        chunks.first().advance(5);
        chunks.settle();
        assert!(chunks.is_empty() && chunks.is_one());
    }
}
