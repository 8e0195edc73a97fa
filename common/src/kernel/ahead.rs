//! Memory that is fetched into the caches while something else is computed.
//!
//! It is fetched a few cache lines at a time, all through the computation: a core waits for about a dozen lines at once,
//! and many together would hold up the lines that the computation itself reads from the L2 cache.

use std::ops::Range;
#[cfg(target_arch = "x86_64")]
use std::sync::OnceLock;

/// Floats of a cache line.
pub(super) const LINE: usize = 16;

/// Runs of cache lines that will be read or written soon. They may lie anywhere: fetching changes nothing and cannot fail.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Ahead {
    pub(super) from: *const f32,
    /// Lines of a run.
    pub(super) run: usize,
    /// From the start of one run to the start of the next, in floats.
    pub(super) stride: usize,
    /// Which lines, counted through all runs.
    pub(super) lines: Range<usize>,
}

impl Ahead {
    /// Columns of some rows, which are `stride` floats apart.
    pub(super) fn columns(from: *const f32, [rows, columns]: [usize; 2], stride: usize) -> Self {
        let run = if columns == stride { rows * columns / LINE } else { columns / LINE }.max(1);
        let runs = if columns == stride { 1 } else { rows };
        Self { from, run, stride, lines: 0..run * runs }
    }

    /// The part of the lines that belongs to one of `parts` equal ones.
    pub(super) fn part(&self, part: usize, parts: usize) -> Self {
        let Range { start, end } = self.lines;
        let at = |part: usize| start + (end - start) * part / parts;
        Self { lines: at(part)..at(part + 1), ..*self }
    }
}

/// How far a computation has fetched what will be needed after it.
pub(super) struct Fetching {
    next: *const f32,
    left: usize,
    /// Lines that are left of the run at hand.
    in_run: usize,
    run: usize,
    /// From the end of one run to the start of the next, in floats.
    gap: usize,
    at_once: usize,
}

impl Fetching {
    /// Fetches `ahead`, if there is anything, evenly on so many occasions.
    pub(super) fn new(ahead: Option<&Ahead>, occasions: usize) -> Self {
        let Some(Ahead { from, run, stride, lines }) = ahead else {
            return Self { next: std::ptr::null(), left: 0, in_run: 0, run: 0, gap: 0, at_once: 0 };
        };
        let (runs_before, in_run) = (lines.start / run, lines.start % run);
        Self {
            next: from.wrapping_add(runs_before * stride + in_run * LINE),
            left: lines.len(),
            in_run: run - in_run,
            run: *run,
            gap: stride.saturating_sub(run * LINE),
            at_once: lines.len().div_ceil(occasions.max(1)),
        }
    }

    /// One occasion.
    #[inline(always)]
    pub(super) fn some(&mut self) {
        for _ in 0..self.at_once.min(self.left) {
            fetch(self.next);
            self.left -= 1;
            self.in_run -= 1;
            self.next = self.next.wrapping_add(LINE);
            if self.in_run == 0 {
                self.in_run = self.run;
                self.next = self.next.wrapping_add(self.gap);
            }
        }
    }
}

/// Begins to load a cache line.
#[inline(always)]
pub(super) fn fetch(line: *const f32) {
    #[cfg(target_arch = "x86_64")]
    {
        use std::arch::x86_64::{_MM_HINT_T0, _mm_prefetch};
        // SAFETY: a hint, which every x86-64 processor has, and which does nothing where there is no memory.
        unsafe { _mm_prefetch::<_MM_HINT_T0>(line.cast()) }
    }
    // Stable Rust has no such hint for other processors.
    #[cfg(not(target_arch = "x86_64"))]
    let _ = line;
}

/// How this processor fetches cache lines that will be written.
#[derive(Clone, Copy)]
pub(super) struct WriteAhead {
    /// Whether there is an instruction for it, which takes a line that other cores have read from them at once.
    #[cfg(target_arch = "x86_64")]
    by_instruction: bool,
}

impl WriteAhead {
    /// What the processor has.
    pub(super) fn new() -> Self {
        Self {
            #[cfg(target_arch = "x86_64")]
            by_instruction: {
                static HAS_PREFETCHW: OnceLock<bool> = OnceLock::new();
                // Bit 8 of ECX is the instruction's. Every x86-64 processor has this function: it reports the 64-bit mode.
                *HAS_PREFETCHW.get_or_init(|| std::arch::x86_64::__cpuid(0x8000_0001).ecx >> 8 & 1 == 1)
            },
        }
    }

    /// Begins to load a cache line that will be written.
    #[inline(always)]
    #[cfg_attr(
        target_arch = "x86_64",
        expect(clippy::pointers_in_nomem_asm_block, reason = "a hint reads and writes nothing")
    )]
    pub(super) fn fetch(self, line: *const f32) {
        #[cfg(target_arch = "x86_64")]
        if self.by_instruction {
            // SAFETY: the processor has the instruction, a hint, which does nothing where there is no memory.
            unsafe { std::arch::asm!("prefetchw [{0}]", in(reg) line, options(nomem, nostack, preserves_flags)) }
            return;
        }
        fetch(line);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Scenario: runs of three lines, seven lines of them from the second on, on five occasions. Property: the cursor goes
    /// through the lines of the runs, two at a time, and stops.
    #[test]
    fn lines_are_gone_through_run_by_run() {
        let memory = [0.0f32; 400];
        let ahead = Ahead { from: memory.as_ptr(), run: 3, stride: 100, lines: 1..8 };
        let mut fetching = Fetching::new(Some(&ahead), 5);
        let mut places = Vec::new();
        for _ in 0..6 {
            places.push((fetching.next as usize - ahead.from as usize) / size_of::<f32>());
            fetching.some();
        }
        assert_eq!(places, [16, 100, 132, 216, 232, 232]);
        assert_eq!(fetching.left, 0);
        let parts = [0, 1, 2].map(|part| ahead.part(part, 3).lines);
        assert_eq!(parts, [1..3, 3..5, 5..8]);
    }

    /// Scenario: 32 of 64 columns, all of 24 columns, and a column. Property: whole lines, and no run without one.
    #[test]
    fn columns_are_runs_of_lines() {
        let memory = [0.0f32; 400];
        let of = |shape, stride| {
            let ahead = Ahead::columns(memory.as_ptr(), shape, stride);
            (ahead.run, ahead.stride, ahead.lines)
        };
        assert_eq!(of([5, 32], 64), (2, 64, 0..10));
        assert_eq!(of([4, 24], 24), (6, 24, 0..6));
        assert_eq!(of([3, 1], 9), (1, 9, 0..3));
    }

    #[test]
    fn nothing_is_fetched_where_nothing_is_needed() {
        let mut fetching = Fetching::new(None, 7);
        fetching.some();
        assert!(fetching.next.is_null());
    }
}
