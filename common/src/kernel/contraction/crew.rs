//! Work of one operation, shared by the threads of the current pool.

use std::sync::atomic::{AtomicUsize, Ordering};

use rayon::prelude::*;

use crate::kernel::AlignedFloats;

/// Scratch memory for as many threads as may share an operation.
#[derive(Debug)]
pub struct Crew {
    scratch: Vec<AlignedFloats>,
}

impl Crew {
    /// A crew of `threads` threads with `floats` floats each.
    pub fn new(threads: usize, floats: usize) -> Self {
        Self { scratch: (0..threads.max(1)).map(|_| AlignedFloats::zeros(floats)).collect() }
    }

    /// Number of threads that may work at the same time.
    pub fn size(&self) -> usize {
        self.scratch.len()
    }

    /// Calls `work(unit, scratch)` once for every unit below `units`: on all threads that have nothing else to do if it
    /// is `worth_sharing`, else on this one.
    pub(super) fn share(&mut self, units: usize, worth_sharing: bool, work: impl Fn(usize, &mut [f32]) + Sync) {
        if units == 1 || self.scratch.len() == 1 || !worth_sharing {
            (0..units).for_each(|unit| work(unit, &mut self.scratch[0]));
            return;
        }
        // A thread takes the next unit when it is done with one: a core that is disturbed just takes fewer.
        let next = AtomicUsize::new(0);
        self.scratch.par_iter_mut().with_max_len(1).for_each(|scratch| {
            loop {
                let unit = next.fetch_add(1, Ordering::Relaxed);
                if unit >= units {
                    return;
                }
                work(unit, scratch);
            }
        });
    }
}
