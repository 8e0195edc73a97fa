//! High images of low ones that are mostly 0: the weights of what is not 0 are added to its patch of the high image.
//!
//! It computes what a [`Gather`](super::Gather) to the high image does, product by product in the same order, but leaves out
//! those whose factor in the low image is 0. As long as weights are finite, that changes no bit.

use super::gather::{After, GatherOperands};
use super::patches::Patches;
use super::{ChannelCounts, L1_FLOATS, PixelRelation, index};
use crate::kernel::combination::{self, Combinations, Lists, ListsMut};
use crate::kernel::elementwise;
use crate::kernel::isa::Isa;
use crate::kernel::products::{ChainElement, Element};
use crate::kernel::transpose::{MatrixShape, transpose};

/// Floats of a stretch that are summed at a time, at least: fewer do not keep multiply-adds busy.
const MIN_TILE: usize = 64;

/// A plan for the forward pass of a transposed convolution, or for the input gradient of a convolution; see the module's
/// documentation.
#[derive(Debug)]
pub struct Scatter {
    isa: Isa,
    patches: Patches,
    /// Where patches begin, from the last low pixel's to the first one's: so each high pixel is reached by ascending taps.
    targets: Vec<u32>,
    /// Where the stretch of each low channel begins among the weights of a row of the kernel.
    rows: Vec<u32>,
}

impl Scatter {
    /// A plan for any number of samples.
    pub fn new(isa: Isa, relation: &PixelRelation, channels: ChannelCounts) -> Self {
        let patches = Patches::new(relation, channels);
        let targets = patches.starts().iter().rev().copied().collect();
        let rows = (0..channels.low).map(|channel| index(channel * patches.stretch())).collect();
        Self { isa, patches, targets, rows }
    }

    /// Floats of a packed copy of the weights.
    pub fn packed_len(&self) -> usize {
        self.patches.weights()
    }

    /// Floats of scratch memory that a run needs.
    pub fn scratch_len(&self) -> usize {
        let padded = if self.patches.are_padded() { self.patches.padded_len() } else { 0 };
        padded + self.targets.len() + ListsMut::memory(self.patches.low_len())
    }

    /// Copies `weights` (taps, high channels, low channels) as (kernel rows, low channels, kernel columns, high channels).
    ///
    /// # Panics
    /// When a slice has not the length that the plan says.
    pub fn pack<E: Element>(&self, weights: &[E], packed: &mut [E]) {
        assert_eq!(weights.len(), self.patches.weights(), "weights of the plan");
        assert_eq!(packed.len(), self.packed_len(), "packed weights of the plan");
        let shape = MatrixShape::dense(self.patches.stretch(), self.patches.channels.low);
        let len = shape.rows * shape.columns;
        let (weights, packed) = (bytemuck::cast_slice(weights), bytemuck::cast_slice_mut(packed));
        for (weights, packed) in weights.chunks_exact(len).zip(packed.chunks_exact_mut(len)) {
            transpose(self.isa, weights, shape, packed, shape.rows);
        }
    }

    /// Computes `output`, the high image, from `input`, the low one, as [`Gather::run`](super::Gather::run) does, with weights
    /// that are finite. Buffers may be longer than needed.
    ///
    /// # Panics
    /// When a slice is too short.
    pub fn run<E: ChainElement>(&self, samples: usize, operands: GatherOperands<'_, E>) {
        let GatherOperands { input, packed, bias, output, after, scratch } = operands;
        assert_eq!(packed.len(), self.packed_len(), "packed weights of the plan");
        let (low_len, high_len) = (self.patches.low_len(), self.patches.high_len());
        let (input, output) = (&input[..samples * low_len], &mut output[..samples * high_len]);
        let (ends, scratch) = scratch.split_at_mut(self.targets.len());
        let (lists, padded) = scratch.split_at_mut(ListsMut::memory(low_len));
        let ends = bytemuck::cast_slice_mut(ends);
        for (sample, (low, high)) in input.chunks_exact(low_len).zip(output.chunks_exact_mut(high_len)).enumerate() {
            let mut lists = ListsMut::new(&mut *lists);
            for (end, pixel) in ends.iter_mut().zip(low.chunks_exact(self.rows.len()).rev()) {
                *end = lists.append(self.isa, pixel, &self.rows);
            }
            let lists = lists.finish(ends);
            if self.patches.are_padded() {
                let padded = &mut padded[..self.patches.padded_len()];
                self.add(lists, packed, bias, padded);
                self.patches.crop(padded, high);
            } else {
                self.add(lists, packed, bias, high);
            }
            let after = match after {
                After::Gate(gate) => After::Gate(&gate[sample * high_len..][..high_len]),
                other => other,
            };
            elementwise::finish_outputs(self.isa, after, high);
        }
    }

    /// Sets the padded high image to the bias, and adds the listed elements' weights to their patches.
    fn add<E: ChainElement>(&self, lists: Lists<'_>, packed: &[E], bias: Option<&[f32]>, sums: &mut [f32]) {
        assert_eq!(sums.len(), self.patches.padded_len(), "the padded image");
        match bias {
            Some(bias) => {
                let starts =
                    |sums: &mut [f32]| sums.iter_mut().zip(bias).for_each(|(sum, &bias)| *sum = E::start(bias));
                sums.chunks_exact_mut(bias.len()).for_each(starts);
            }
            None => sums.fill(0.0),
        }
        let (stretch, channels) = (self.patches.stretch(), self.rows.len());
        // All rows of the kernel together, if the weights stay in the L1 cache; but taps must ascend for each high pixel.
        let together = packed.len() <= L1_FLOATS && combination::sums_whole_threes(self.isa, stretch);
        let stretches = if together { self.patches.kernel.rows } else { 1 };
        for (row, weights) in packed.chunks(stretches * stretch * channels).enumerate() {
            let combinations = Combinations {
                lists,
                targets: &self.targets,
                matrix: weights.as_ptr(),
                sums: sums[row * self.patches.line()..].as_mut_ptr(),
                len: stretch,
                tile: (L1_FLOATS / channels).max(MIN_TILE),
                stretches,
                matrix_step: stretch * channels,
                sums_step: self.patches.line(),
            };
            // SAFETY: there is a list, and a patch, for each low pixel; a patch's stretches lie inside the padded image; each low
            // channel has a stretch of weights for each row of the kernel; `packed` and `sums` are different slices.
            unsafe { combination::run(self.isa, &combinations) };
        }
    }
}
