//! Memory between two pages that nobody may touch, for tests of the kernels. `common/tests/contraction.rs` includes this
//! file; it is here because unsafe code is, and no part of the library.

use std::ops::{Deref, DerefMut};

use rustix::mm::{MapFlags, MprotectFlags, ProtFlags, mmap_anonymous, mprotect, munmap};

/// Bytes without access on either side: whole pages, whatever their size is. The system is not asked for it, because
/// its answer cannot be had under Valgrind.
const FENCE: usize = 64 << 10;

/// Which page without access the floats touch; between them and the other one lies the rest of a page.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Edge {
    /// Their first float is the first that can be read.
    Start,
    /// Their last float is the last that can be read.
    End,
}

/// Floats in memory of their own, with a page without access before and behind it. An access to either ends the process
/// with a segmentation fault.
pub(crate) struct Fenced {
    mapping: *mut u8,
    bytes: usize,
    /// First float that can be accessed, and how many there are.
    first: *mut f32,
    room: usize,
    /// Where the floats that were asked for begin among those, and how many they are.
    start: usize,
    len: usize,
}

impl Fenced {
    /// `len` floats. They and what lies around them are `fill`.
    pub(crate) fn new(len: usize, edge: Edge, fill: f32) -> Self {
        let inside = (len * size_of::<f32>()).next_multiple_of(FENCE).max(FENCE);
        let bytes = inside + 2 * FENCE;
        let (protection, flags) = (ProtFlags::READ | ProtFlags::WRITE, MapFlags::PRIVATE);
        // SAFETY: a new mapping at a place of the system's choice touches nobody's memory.
        let mapping = unsafe { mmap_anonymous(std::ptr::null_mut(), bytes, protection, flags) };
        let mapping = mapping.expect("memory for an operand").cast::<u8>();
        for offset in [0, bytes - FENCE] {
            // SAFETY: the first and the last pages of the mapping, to which nobody has a reference.
            let fence = unsafe { mprotect(mapping.add(offset).cast(), FENCE, MprotectFlags::empty()) };
            fence.expect("pages without access");
        }
        // SAFETY: the mapping is longer than a fence.
        let first = unsafe { mapping.add(FENCE) }.cast::<f32>();
        let room = inside / size_of::<f32>();
        let start = if edge == Edge::Start { 0 } else { room - len };
        let mut fenced = Self { mapping, bytes, first, room, start, len };
        fenced.all_mut().fill(fill);
        fenced
    }

    /// What lies around the floats and can be accessed.
    pub(crate) fn around(&self) -> impl Iterator<Item = &f32> {
        let (before, rest) = self.all().split_at(self.start);
        before.iter().chain(&rest[self.len..])
    }

    fn all(&self) -> &[f32] {
        // SAFETY: `room` floats from `first` on lie between the fences, were set by the system to 0, and are borrowed
        // as long as `self` is.
        unsafe { std::slice::from_raw_parts(self.first, self.room) }
    }

    fn all_mut(&mut self) -> &mut [f32] {
        // SAFETY: as above, and `self` is borrowed by nobody else.
        unsafe { std::slice::from_raw_parts_mut(self.first, self.room) }
    }
}

impl Deref for Fenced {
    type Target = [f32];

    fn deref(&self) -> &[f32] {
        &self.all()[self.start..][..self.len]
    }
}

impl DerefMut for Fenced {
    fn deref_mut(&mut self) -> &mut [f32] {
        let (start, len) = (self.start, self.len);
        &mut self.all_mut()[start..][..len]
    }
}

impl Drop for Fenced {
    fn drop(&mut self) {
        // SAFETY: the whole mapping of `new`, which nobody has a reference to any more.
        unsafe { munmap(self.mapping.cast(), self.bytes) }.expect("a mapping of our own");
    }
}
