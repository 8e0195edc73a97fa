//! Weight gradients where the low image is mostly 0: the patches of what is not 0 are added to its weights.
//!
//! It computes what a [`Reduce`](super::Reduce) does, product by product in the same order, but leaves out those whose factor in
//! the low image is 0, and takes some with zeros around the high image. As long as both images are finite, that changes no bit.

use super::patches::Patches;
use super::reduce::ReduceOperands;
use super::{ChannelCounts, L1_FLOATS, PixelRelation, index};
use crate::kernel::combination::{self, Combinations, ListsMut};
use crate::kernel::elementwise;
use crate::kernel::isa::Isa;
use crate::kernel::products::{ChainElement, Element};
use crate::kernel::survey;
use crate::kernel::transpose::{MatrixShape, transpose};

/// Floats of images up to which sums are taken a few taps at a time: in the L1 cache is then what those taps reach.
const TAPS_FLOATS: usize = 16 << 10;
/// Floats of a band of larger images.
const BAND_FLOATS: usize = 8 << 10;

/// A plan for weight gradients; see the module's documentation.
#[derive(Debug)]
pub struct SparseReduce {
    isa: Isa,
    patches: Patches,
    /// Samples that are taken together: as many as stay in the L1 cache, or one.
    at_once: usize,
    /// Low pixels that are taken together, of those: all, or some rows of a large image.
    band: usize,
    /// Where the patches of so many samples begin.
    rows: Vec<u32>,
    /// Where the sums of each low channel begin.
    targets: Vec<u32>,
    /// Floats of a stretch that are summed at a time: the part of the high image that is gone through stays in the L1 cache.
    tile: usize,
}

impl SparseReduce {
    /// A plan for any number of samples.
    pub fn new(isa: Isa, relation: &PixelRelation, channels: ChannelCounts) -> Self {
        let patches = Patches::new(relation, channels);
        let sample = patches.padded_len();
        let at_once = (L1_FLOATS / sample).max(1);
        let stretch = patches.stretch();
        // How images that do not fit are cut: somewhat larger ones into taps, others into bands of rows.
        let (tile, band) = if sample <= L1_FLOATS {
            (stretch, usize::MAX)
        } else if sample <= TAPS_FLOATS {
            ((patches.kernel.columns * L1_FLOATS / sample).max(1) * channels.high, usize::MAX)
        } else {
            let rows = (BAND_FLOATS / patches.line()).saturating_sub(relation.kernel.rows) / relation.strides.rows + 1;
            (stretch, rows * relation.low.columns)
        };
        Self {
            isa,
            at_once,
            band,
            rows: (0..at_once)
                .flat_map(|i| patches.starts().iter().map(move |start| start + index(i * sample)))
                .collect(),
            targets: (0..channels.low).map(|channel| index(channel * patches.weights() / channels.low)).collect(),
            tile,
            patches,
        }
    }

    /// Floats of scratch memory that a run needs.
    pub fn scratch_len(&self) -> usize {
        let low = self.at_once * self.patches.low_len();
        let padded = if self.patches.are_padded() { self.at_once * self.patches.padded_len() } else { 0 };
        self.patches.weights() + padded + low + ListsMut::memory(low) + self.targets.len()
    }

    /// Adds to `gradient` (taps, high channels, low channels) the sum over samples, low rows and low columns of `high * low`,
    /// or sets it to that sum, as [`Reduce::run`](super::Reduce::run) does, and returns true. It returns false, and leaves
    /// `gradient` as it was, if it may matter which products with zeros are taken: then something is not finite.
    ///
    /// # Panics
    /// When a slice is too short.
    pub fn run<E: ChainElement>(&self, samples: usize, operands: ReduceOperands<'_, E>) -> bool {
        let ReduceOperands { high, low, gradient, accumulate, scratch } = operands;
        let (low_len, high_len) = (self.patches.low_len(), self.patches.high_len());
        let (high, low) = (&high[..samples * high_len], &low[..samples * low_len]);
        assert_eq!(gradient.len(), self.patches.weights(), "gradient of the plan");
        let scratch: &mut [f32] = bytemuck::cast_slice_mut(scratch);
        let (sums, scratch) = scratch.split_at_mut(gradient.len());
        let (by_channel, scratch) = scratch.split_at_mut(self.at_once * low_len);
        let (lists, scratch) = scratch.split_at_mut(ListsMut::memory(by_channel.len()));
        let (ends, padded) = scratch.split_at_mut(self.targets.len());
        let (ends, padded): (&mut [u32], &mut [E]) = (bytemuck::cast_slice_mut(ends), bytemuck::cast_slice_mut(padded));

        // Sums of a low channel are next to each other.
        let channels = self.targets.len();
        let shape = MatrixShape::dense(gradient.len() / channels, channels);
        if accumulate {
            transpose(self.isa, gradient, shape, sums, shape.rows);
        } else {
            sums.fill(0.0);
        }
        let some = high.chunks(self.at_once * high_len).zip(low.chunks(self.at_once * low_len));
        for (high, low) in some {
            let high = &self.padded(high, padded)[..low.len() / low_len * self.patches.padded_len()];
            if !survey::are_finite(self.isa, high) {
                return false;
            }
            let band = self.band.min(low.len() / channels);
            for (low, rows) in low.chunks(band * channels).zip(self.rows.chunks(band)) {
                let pixels = low.len() / channels;
                let shape = MatrixShape::dense(pixels, channels);
                transpose(self.isa, bytemuck::cast_slice(low), shape, by_channel, pixels);
                let mut lists = ListsMut::new(&mut *lists);
                for (end, channel) in ends.iter_mut().zip(by_channel.chunks_exact(pixels)) {
                    *end = lists.append::<E>(self.isa, bytemuck::cast_slice(channel), rows);
                }
                let combinations = Combinations {
                    lists: lists.finish(ends),
                    targets: &self.targets,
                    matrix: high.as_ptr(),
                    sums: sums.as_mut_ptr(),
                    len: self.patches.stretch(),
                    tile: self.tile,
                    stretches: self.patches.kernel.rows,
                    matrix_step: self.patches.line(),
                    sums_step: self.patches.stretch(),
                };
                // SAFETY: there is a list, and a row of sums, for each low channel; all stretches of a patch lie inside its
                // sample's padded image; `sums` is scratch memory of its own.
                unsafe { combination::run(self.isa, &combinations) };
            }
        }
        // What is not finite in the low image was no zero, and left sums that are not finite.
        let are_finite = elementwise::finish_sums(self.isa, sums);
        if are_finite {
            transpose(self.isa, sums, MatrixShape::dense(channels, shape.rows), gradient, channels);
        }
        are_finite
    }

    /// High images with zeros around them, if patches reach there.
    fn padded<'a, E: Element>(&self, high: &'a [E], padded: &'a mut [E]) -> &'a [E] {
        if !self.patches.are_padded() {
            return high;
        }
        let images = high.chunks_exact(self.patches.high_len()).zip(padded.chunks_exact_mut(self.patches.padded_len()));
        images.for_each(|(high, padded)| self.patches.pad(high, padded));
        padded
    }
}
