//! A vector of floats, wherever it lies.

use std::fmt;
use std::ops::{Deref, DerefMut, Range};
use std::ptr::NonNull;
use std::sync::{Arc, LazyLock};

use super::Slot;
use crate::kernel::AlignedFloats;

/// A vector of floats, in memory of this process or in a shared region; or a part of one, whose other parts belong to
/// others ([`FloatBuffer::split_off`]).
pub struct FloatBuffer {
    memory: Arc<Memory>,
    range: Range<usize>,
    known_finite: bool,
}

/// Memory that the buffers made of it divide among themselves: no float belongs to two of them.
struct Memory {
    start: NonNull<f32>,
    len: usize,
    owner: Owner,
}

/// What keeps the memory, and is not looked into as long as there are buffers.
enum Owner {
    Private(#[expect(dead_code, reason = "it is kept, and read through the pointer")] AlignedFloats),
    Shared(Slot),
}

// SAFETY: what the pointer leads to belongs to the owner, which may be sent to another thread; buffers give access to it as
// if they owned their floats.
unsafe impl Send for Memory {}
// SAFETY: a shared buffer is only read, and different buffers have different floats.
unsafe impl Sync for Memory {}

impl FloatBuffer {
    /// `len` zeros in memory of this process.
    pub fn zeros(len: usize) -> Self {
        Self { known_finite: true, ..AlignedFloats::zeros(len).into() }
    }

    /// A copy of `values` in memory of this process, from a cache line on.
    pub fn copy_of(values: &[f32]) -> Self {
        AlignedFloats::from(values).into()
    }

    fn whole(start: *mut f32, len: usize, owner: Owner) -> Self {
        // Owners' pointers are those of slices, which are never null.
        let start = NonNull::new(start).unwrap_or(NonNull::dangling());
        Self { memory: Arc::new(Memory { start, len, owner }), range: 0..len, known_finite: false }
    }

    /// The slot that the floats lie in, if they do.
    pub fn slot(&self) -> Option<&Slot> {
        match &self.memory.owner {
            Owner::Private(_) => None,
            Owner::Shared(slot) => Some(slot),
        }
    }

    /// Takes the floats from `at` on out of the buffer, without copying them: who has them may read them while the others are
    /// still written.
    ///
    /// # Panics
    /// When there are fewer floats.
    #[must_use]
    pub fn split_off(&mut self, at: usize) -> Self {
        assert!(at <= self.len(), "{at} of {} floats", self.len());
        let at = self.range.start + at;
        let range = at..std::mem::replace(&mut self.range.end, at);
        Self { memory: self.memory.clone(), range, known_finite: self.known_finite }
    }

    /// All of the memory that the buffer is a part of, if the other parts are gone. So the part that goes last can be used
    /// again. (If the last two go at the same moment, on two threads, neither may be the last, and the memory is freed.)
    pub fn reclaim(mut self) -> Option<Self> {
        Arc::get_mut(&mut self.memory)?;
        (self.range, self.known_finite) = (0..self.memory.len, false);
        Some(self)
    }

    /// Whether all floats are known to be finite: this process has found that they are, and has not changed them since.
    /// (Memory that another process hands in is not known.)
    pub fn is_known_finite(&self) -> bool {
        self.known_finite
    }

    /// Says that all floats were found to be finite.
    pub fn set_known_finite(&mut self) {
        self.known_finite = true;
    }
}

impl Default for FloatBuffer {
    /// No floats, and no memory for them.
    fn default() -> Self {
        static NONE: LazyLock<FloatBuffer> = LazyLock::new(|| FloatBuffer::zeros(0));
        Self { memory: NONE.memory.clone(), range: 0..0, known_finite: true }
    }
}

impl From<AlignedFloats> for FloatBuffer {
    fn from(mut values: AlignedFloats) -> Self {
        Self::whole(values.as_mut_ptr(), values.len(), Owner::Private(values))
    }
}

impl From<Vec<f32>> for FloatBuffer {
    fn from(values: Vec<f32>) -> Self {
        Self::copy_of(&values)
    }
}

impl From<Slot> for FloatBuffer {
    fn from(slot: Slot) -> Self {
        let start = slot.start();
        Self::whole(start.as_ptr(), slot.len(), Owner::Shared(slot))
    }
}

impl Deref for FloatBuffer {
    type Target = [f32];

    fn deref(&self) -> &[f32] {
        let start = self.memory.start.as_ptr().wrapping_add(self.range.start);
        // SAFETY: the range lies within the memory, which the owner keeps. No other buffer has its floats: a buffer starts with
        // all of them, and `split_off` gives the rest of a range away.
        unsafe { std::slice::from_raw_parts(start, self.range.len()) }
    }
}

impl DerefMut for FloatBuffer {
    /// # Panics
    /// When the floats lie in a region that this process may only read.
    fn deref_mut(&mut self) -> &mut [f32] {
        if let Owner::Shared(slot) = &self.memory.owner {
            slot.assert_writable();
        }
        self.known_finite = false;
        let start = self.memory.start.as_ptr().wrapping_add(self.range.start);
        // SAFETY: as above, and `&mut self` borrows the one buffer that has these floats. The owner's memory may be written:
        // that of this process is its own, and a slot's was asked for just now.
        unsafe { std::slice::from_raw_parts_mut(start, self.range.len()) }
    }
}

impl fmt::Debug for FloatBuffer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { range, known_finite, .. } = self;
        write!(f, "FloatBuffer {{ {range:?} of {}, slot: {:?}, ", self.memory.len, self.slot())?;
        write!(f, "known_finite: {known_finite} }}")
    }
}

impl AsRef<[f32]> for FloatBuffer {
    fn as_ref(&self) -> &[f32] {
        self
    }
}

impl Clone for FloatBuffer {
    /// A copy in memory of this process.
    fn clone(&self) -> Self {
        Self { known_finite: self.known_finite, ..Self::copy_of(self) }
    }
}

impl PartialEq for FloatBuffer {
    fn eq(&self, other: &Self) -> bool {
        **self == **other
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_was_found_is_forgotten_with_the_first_change() {
        let mut buffer = FloatBuffer::from(vec![1.0, 2.0]);
        assert!(!buffer.is_known_finite(), "nobody has looked");
        buffer.set_known_finite();
        assert!(buffer.is_known_finite() && buffer.clone().is_known_finite());
        buffer[0] = f32::NAN;
        assert!(!buffer.is_known_finite());
    }

    /// Scenario: a buffer is divided, and its parts are written by turns. Property: each has its own floats; the memory
    /// comes back with the part that goes last, whichever that is.
    #[test]
    fn the_last_part_brings_the_memory_back() {
        for last in 0..3 {
            let mut head = FloatBuffer::zeros(100);
            let tail = head.split_off(70);
            let middle = head.split_off(16);
            let mut parts = [head, middle, tail];
            assert_eq!(parts.each_ref().map(|part| part.len()), [16, 54, 30]);
            for round in 0..2 {
                for (part, value) in parts.iter_mut().zip(1..) {
                    assert!(part.iter().all(|&float| float == (round * value) as f32));
                    part.fill(value as f32);
                }
            }
            let mut parts = Vec::from(parts);
            let kept = parts.remove(last);
            assert!(parts.into_iter().all(|part| part.reclaim().is_none()));
            let mut whole = kept.reclaim().expect("all others are gone");
            assert_eq!((whole.len(), whole[15], whole[16], whole[70], whole[99]), (100, 1.0, 2.0, 3.0, 3.0));
            whole.fill(0.0);
        }
    }
}
