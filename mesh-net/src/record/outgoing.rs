//! Sealed bytes on their way to the socket.

/// A buffer that is filled at its end and emptied at its front. Its memory stays initialised between uses, so that no
/// byte is written twice.
#[derive(Debug, Default)]
pub struct Outgoing {
    buffer: Vec<u8>,
    /// Bytes `start..end` wait.
    start: usize,
    end: usize,
}

impl Outgoing {
    /// Room for `size` bytes behind what waits; they count when [`Self::commit`] says so.
    pub(super) fn space(&mut self, size: usize) -> &mut [u8] {
        if self.buffer.len() - self.end < size {
            self.buffer.copy_within(self.start..self.end, 0);
            self.end -= self.start;
            self.start = 0;
            let needed = self.end + size;
            if self.buffer.len() < needed {
                self.buffer.resize(needed.next_power_of_two(), 0);
            }
        }
        &mut self.buffer[self.end..self.end + size]
    }

    pub(super) fn commit(&mut self, size: usize) {
        self.end += size;
    }

    /// What waits.
    pub fn pending(&self) -> &[u8] {
        &self.buffer[self.start..self.end]
    }

    /// How much waits, bytes.
    pub fn len(&self) -> usize {
        self.end - self.start
    }

    /// Nothing waits.
    pub fn is_empty(&self) -> bool {
        self.start == self.end
    }

    /// The first `size` bytes are gone.
    pub fn consume(&mut self, size: usize) {
        self.start += size;
        if self.start >= self.end {
            (self.start, self.end) = (0, 0);
        }
    }

    #[cfg(test)]
    pub(crate) fn capacity(&self) -> usize {
        self.buffer.capacity()
    }

    /// Gives the memory back if nothing waits.
    pub fn release(&mut self) {
        if self.is_empty() {
            *self = Self::default();
        }
    }
}
