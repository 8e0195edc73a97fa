//! Rectangles of pixels, copied together channel by channel or a few channels at a time.

use crate::kernel::isa::Isa;
use crate::kernel::per_isa::per_isa;

/// Pixels of a sample, line by line.
#[derive(Debug)]
pub(super) struct Lines {
    lines: Vec<Line>,
    /// From one pixel of a line to the next, in elements.
    step: usize,
    /// From one sample to the next.
    sample_len: usize,
}

/// Pixels that are evenly spaced.
#[derive(Clone, Copy, Debug)]
pub(super) struct Line {
    /// Where the first one is, relative to a place in the sample.
    pub(super) start: isize,
    pub(super) pixels: usize,
}

impl Lines {
    pub(super) fn new(lines: impl Iterator<Item = Line>, step: usize, sample_len: usize) -> Self {
        Self { lines: lines.collect(), step, sample_len }
    }

    /// Copies `count` elements of each pixel of some samples, from `place` on, into rows of `width` elements.
    ///
    /// # Panics
    /// When a slice is too short.
    pub(super) fn copy<E: bytemuck::Pod>(
        &self,
        isa: Isa,
        (from, place): (&[E], usize),
        count: usize,
        (to, width): (&mut [E], usize),
    ) {
        let of_sample = self.lines.iter().map(|line| line.pixels).sum::<usize>() * width;
        let (from, to) = (bytemuck::cast_slice(from), bytemuck::cast_slice_mut(to));
        for (from, to) in from.chunks(self.sample_len).zip(to.chunks_exact_mut(of_sample)) {
            copy_lines(isa, from, place, self, count, to, width);
        }
    }
}

#[inline(always)]
fn copy_some(from: &[f32], place: usize, lines: &Lines, count: usize, to: &mut [f32], width: usize) {
    let mut to = to.chunks_exact_mut(width);
    for line in &lines.lines {
        let from = &from[place.wrapping_add_signed(line.start)..];
        for (k, to) in (0..line.pixels).zip(to.by_ref()) {
            to[..count].copy_from_slice(&from[k * lines.step..][..count]);
        }
    }
}

per_isa! {
    /// One sample of [`Lines::copy`].
    fn copy_lines(from: &[f32], place: usize, lines: &Lines, count: usize, to: &mut [f32], width: usize) {
        // Lengths that the compiler knows become a few vector moves instead of a call for each pixel.
        match count {
            16 => copy_some(from, place, lines, 16, to, width),
            8 => copy_some(from, place, lines, 8, to, width),
            _ => copy_some(from, place, lines, count, to, width),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Scenario: two samples of twelve pixels of 20 channels, of which lines of two and three pixels are copied, 1, 8, 16 and
    /// 19 channels of each. Property: they follow each other, and nothing else of the rows is written.
    #[test]
    fn pixels_of_lines_follow_each_other() {
        let channels = 20;
        let from: Vec<f32> = (0..2 * 12 * channels).map(|i| i as f32).collect();
        let lines = [Line { start: -(channels as isize), pixels: 2 }, Line { start: 4 * channels as isize, pixels: 3 }];
        let lines = Lines::new(lines.into_iter(), 2 * channels, 12 * channels);
        let width = 19;
        for isa in Isa::available() {
            for count in [1, 8, 16, 19] {
                let mut to = vec![-1.0; 2 * 5 * width];
                lines.copy(isa, (&from, channels + 1), count, (&mut to, width));
                let pixels = [0, 2, 5, 7, 9, 12, 14, 17, 19, 21];
                for (row, pixel) in to.chunks(width).zip(pixels) {
                    let expected = |i: usize| if i < count { (pixel * channels + 1 + i) as f32 } else { -1.0 };
                    assert!(
                        (0..width).all(|i| row[i] == expected(i)),
                        "{count} channels of pixel {pixel} on {isa}: {row:?}"
                    );
                }
            }
        }
    }
}
