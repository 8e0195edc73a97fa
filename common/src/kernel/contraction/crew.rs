//! Work of one operation, shared by the threads of the current pool.
//!
//! The work is a sequence of units. Neighbours in it need much the same preparations, and what a thread has prepared lies
//! on its *desk*, in the cache of its core. So each thread begins with a stretch of the sequence of its own. One that is
//! done takes over units from the ends of the others' stretches: a core that is disturbed just does less.

use std::ops::Range;
use std::sync::atomic::{AtomicU64, Ordering};

use rayon::prelude::*;

use crate::kernel::AlignedFloats;

/// Scratch memory for as many threads as may share an operation.
#[derive(Debug)]
pub struct Crew {
    /// What is prepared for all threads before they share an operation.
    pub(super) shared: AlignedFloats,
    desks: Vec<Desk>,
    /// What each thread has left to do.
    stretches: Vec<Stretch>,
}

/// One thread's scratch memory, and what it has prepared there for the operation at hand.
#[derive(Debug)]
pub(super) struct Desk {
    pub(super) scratch: AlignedFloats,
    /// The panel of the second operand that was copied last.
    pub(super) panel: Option<usize>,
    /// Which groups of columns of the first operand were copied.
    pub(super) groups: Vec<bool>,
}

/// How much memory a crew needs.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct CrewSize {
    /// Floats of a thread's scratch memory.
    pub desk: usize,
    /// Groups of columns on a desk.
    pub groups: usize,
    /// Floats that all threads read.
    pub shared: usize,
}

impl CrewSize {
    /// The size that holds either.
    pub fn max(self, other: Self) -> Self {
        let Self { desk, groups, shared } = other;
        Self { desk: self.desk.max(desk), groups: self.groups.max(groups), shared: self.shared.max(shared) }
    }
}

impl Crew {
    /// A crew of `threads` threads.
    pub fn new(threads: usize, size: CrewSize) -> Self {
        let threads = threads.max(1);
        let desk = |_| Desk { scratch: AlignedFloats::zeros(size.desk), panel: None, groups: vec![false; size.groups] };
        Self {
            shared: AlignedFloats::zeros(size.shared),
            desks: (0..threads).map(desk).collect(),
            stretches: (0..threads).map(|_| Stretch::default()).collect(),
        }
    }

    /// Number of threads that may work at the same time.
    pub fn size(&self) -> usize {
        self.desks.len()
    }

    /// Calls `work(unit, desk)` once for every unit below `units`: on all threads that have nothing else to do if it is
    /// `worth_sharing`, else on this one. Nothing is prepared on the desks when it begins.
    pub(super) fn share(&mut self, units: usize, worth_sharing: bool, work: impl Fn(usize, &mut Desk) + Sync) {
        let threads = if worth_sharing { self.size().min(units).max(1) } else { 1 };
        for (i, stretch) in self.stretches[..threads].iter().enumerate() {
            stretch.set(units * i / threads..units * (i + 1) / threads);
        }
        let stretches = &self.stretches[..threads];
        let take_part = |i: usize, desk: &mut Desk| {
            desk.panel = None;
            desk.groups.fill(false);
            let (before, from_own) = stretches.split_at(i);
            let others = || from_own[1..].iter().chain(before).find_map(Stretch::take_last);
            while let Some(unit) = from_own[0].take_first().or_else(others) {
                work(unit, desk);
            }
        };
        if threads == 1 {
            return take_part(0, &mut self.desks[0]);
        }
        let desks = self.desks[..threads].par_iter_mut().with_max_len(1);
        desks.enumerate().for_each(|(i, desk)| take_part(i, desk));
    }
}

/// A range of units of which one thread takes the first and others take the last: both bounds in one word, away from
/// the cache lines of other stretches (prefetchers take two lines at once).
#[derive(Debug, Default)]
#[repr(align(128))]
struct Stretch(AtomicU64);

impl Stretch {
    // What units read and write is passed on by rayon, when all have been done, and not through stretches: any order of
    // memory will do here.
    fn set(&self, units: Range<usize>) {
        self.0.store(pack(units.start as u64, units.end as u64), Ordering::Relaxed);
    }

    fn take_first(&self) -> Option<usize> {
        Some(self.shorten(|start, end| (start + 1, end))?.start)
    }

    fn take_last(&self) -> Option<usize> {
        Some(self.shorten(|start, end| (start, end - 1))?.end - 1)
    }

    /// The range before it was shortened, unless it was empty.
    fn shorten(&self, shorter: impl Fn(u64, u64) -> (u64, u64)) -> Option<Range<usize>> {
        let shorten = |packed| {
            let (start, end) = unpack(packed);
            let (start, end) = (start < end).then(|| shorter(start, end))?;
            Some(pack(start, end))
        };
        let (start, end) = unpack(self.0.fetch_update(Ordering::Relaxed, Ordering::Relaxed, shorten).ok()?);
        Some(start as usize..end as usize)
    }
}

/// Units are counted in 32 bits: there is one for some 48 rows of a panel, and rows are counted in 32 bits themselves.
fn pack(start: u64, end: u64) -> u64 {
    start << 32 | end
}

fn unpack(packed: u64) -> (u64, u64) {
    (packed >> 32, packed & u64::from(u32::MAX))
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::AtomicUsize;

    use super::*;

    #[test]
    fn every_unit_is_done_once() {
        for (threads, units) in [(1, 6), (2, 1), (2, 21), (3, 2), (4, 25), (8, 3), (3, 0)] {
            let mut crew = Crew::new(threads, CrewSize { desk: 1, groups: 1, shared: 0 });
            let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().expect("threads");
            for worth_sharing in [true, false] {
                let done: Vec<_> = (0..units).map(|_| AtomicUsize::new(0)).collect();
                let work = |unit: usize, desk: &mut Desk| {
                    let fresh = desk.panel.replace(unit).is_none();
                    assert_eq!(desk.groups[0], !fresh, "a desk is cleared as a whole");
                    desk.groups[0] = true;
                    done[unit].fetch_add(1, Ordering::Relaxed);
                };
                pool.install(|| crew.share(units, worth_sharing, work));
                let done: Vec<_> = done.into_iter().map(AtomicUsize::into_inner).collect();
                assert_eq!(done, vec![1; units], "{threads} threads");
            }
        }
    }

    #[test]
    fn a_stretch_is_taken_from_both_ends() {
        let stretch = Stretch::default();
        assert_eq!(stretch.take_first(), None);
        stretch.set(3..6);
        assert_eq!((stretch.take_last(), stretch.take_first(), stretch.take_last()), (Some(5), Some(3), Some(4)));
        assert_eq!((stretch.take_first(), stretch.take_last()), (None, None));
    }
}
