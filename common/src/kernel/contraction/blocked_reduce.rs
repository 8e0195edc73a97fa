//! Weight gradients whose products are added in blocks.
//!
//! It computes what a [`Reduce`](super::Reduce) does, in an order that suits tiles of registers: a block's products are those
//! of neighbouring pixels. So the low image is transposed first, and pixels of a low channel follow each other; a row of the kernel
//! meets neighbouring floats of the high image, around which there are zeros. Sums of a low channel are next to each other.

use super::patches::Patches;
use super::reduce::ReduceOperands;
use super::{ChannelCounts, Panel, PixelRelation, SLACK, index, panels};
use crate::kernel::bf16::BlockedPair;
use crate::kernel::isa::Isa;
use crate::kernel::microkernel::{self, Block, Finish, Row, Run, Start, panel_width};
use crate::kernel::transpose::{MatrixShape, transpose};

/// A plan for weight gradients; see the module's documentation.
#[derive(Debug)]
pub struct BlockedReduce {
    isa: Isa,
    patches: Patches,
    /// Pixels of a line of the low image, and from one line of the transposed image to the next.
    line: [usize; 2],
    /// Where each low channel begins in the transposed low image, and its sums.
    rows: Vec<Row>,
    /// The lines of the low image.
    runs: Vec<Run>,
    /// Of a row of the kernel.
    panels: Vec<Panel>,
    /// Elements from what a low pixel meets to what the next one does.
    step: usize,
}

impl BlockedReduce {
    /// A plan for any number of samples.
    pub fn new(isa: Isa, relation: &PixelRelation, channels: ChannelCounts) -> Self {
        let patches = Patches::in_steps_of(relation.strides.columns, relation, channels);
        let step = relation.strides.columns * channels.high;
        let columns = relation.low.columns;
        // No block of a line crosses a cache line.
        let pitch = if columns < 16 { columns.next_power_of_two() } else { columns.next_multiple_of(16) };
        let rows = (0..channels.low).map(|channel| Row {
            a: index(channel * relation.low.rows * pitch),
            c: index(channel * (patches.weights() / channels.low)),
        });
        let runs = (0..relation.low.rows).map(|y| Run {
            a: i32::try_from(y * pitch).expect("offsets within a sample fit 32 bits"),
            b: index(y * relation.strides.rows * patches.line() / step),
            depth: index(columns),
            line: index(columns),
        });
        Self {
            isa,
            rows: rows.collect(),
            runs: runs.collect(),
            panels: panels(isa, patches.stretch(), 0),
            step,
            line: [columns, pitch],
            patches,
        }
    }

    /// Elements of scratch memory that a run over `samples` pairs of samples needs.
    pub fn scratch_len(&self, samples: usize) -> usize {
        self.patches.weights().next_multiple_of(16) + samples * self.transposed_len() + self.padded_len(samples)
    }

    /// Elements of a transposed low image.
    fn transposed_len(&self) -> usize {
        self.runs.len() * self.line[1] * self.rows.len()
    }

    /// Elements of padded high images, if patches reach beyond the high image.
    fn padded_len(&self, samples: usize) -> usize {
        if self.patches.are_padded() { samples * self.patches.padded_len() + SLACK } else { 0 }
    }

    /// What [`Reduce::run`](super::Reduce::run) does, over `samples` pairs of samples, with zeros where a tap meets the padding. Both
    /// images are followed by [`SLACK`].
    ///
    /// # Panics
    /// When a slice is too short.
    pub fn run(&self, samples: usize, operands: ReduceOperands<'_, BlockedPair>) {
        let ReduceOperands { high, low, gradient, accumulate, scratch } = operands;
        let (low_len, high_len) = (self.patches.low_len(), self.patches.high_len());
        assert!(high.len() >= samples * high_len + SLACK, "high operand too short, or no slack");
        assert_eq!(gradient.len(), self.patches.weights(), "gradient of the plan");
        if samples == 0 {
            if !accumulate {
                gradient.fill(0.0);
            }
            return;
        }
        let low = &low[..samples * low_len];
        let transposed_len = self.transposed_len();
        let (sums, scratch) = scratch.split_at_mut(gradient.len().next_multiple_of(16));
        let sums: &mut [f32] = &mut bytemuck::cast_slice_mut(sums)[..gradient.len()];
        let (by_channel, padded) = scratch.split_at_mut(samples * transposed_len);
        let channels = self.rows.len();
        let shape = MatrixShape::dense(gradient.len() / channels, channels);
        if accumulate {
            transpose(self.isa, gradient, shape, sums, shape.rows);
        }
        let [columns, pitch] = self.line;
        let line = MatrixShape::dense(columns, channels);
        let lines = low.chunks_exact(columns * channels);
        for (i, from) in lines.enumerate() {
            let (sample, y) = (i / self.runs.len(), i % self.runs.len());
            let to = &mut by_channel[sample * transposed_len + y * pitch..];
            let to_stride = self.runs.len() * pitch;
            transpose(self.isa, bytemuck::cast_slice(from), line, bytemuck::cast_slice_mut(to), to_stride);
        }
        let high = if self.patches.are_padded() {
            let images = high.chunks_exact(high_len).zip(padded.chunks_exact_mut(self.patches.padded_len()));
            images.take(samples).for_each(|(high, padded)| self.patches.pad(high, padded));
            &padded[..self.padded_len(samples)]
        } else {
            high
        };
        let start = if accumulate { Start::Accumulate } else { Start::Zero };
        let (stretch, line) = (self.patches.stretch(), self.patches.line());
        for row in 0..self.patches.kernel.rows {
            for panel in &self.panels {
                let block = Block {
                    a: by_channel.as_ptr(),
                    b: high[row * line + panel.start..].as_ptr(),
                    c: sums[row * stretch + panel.start..].as_mut_ptr(),
                    rows: &self.rows,
                    runs: &self.runs,
                    segments: &[samples],
                    a_repeat: transposed_len,
                    b_repeat: self.patches.padded_len() / self.step,
                    a_step: 1,
                    b_stride: self.step,
                    columns: panel.columns,
                    start,
                    finish: Finish::Keep,
                    rounded_on: None,
                    ahead: None,
                };
                debug_assert!(panel_width(self.isa, panel.columns) <= SLACK);
                // SAFETY: a low channel has a row of pixels in the transposed image of each sample; each of them has a patch of the
                // high image, whose rows end inside it, so that whole vectors end within the slack; sums of different channels
                // and panels do not overlap.
                unsafe { microkernel::run(self.isa, &block) };
            }
        }
        transpose(self.isa, sums, MatrixShape::dense(channels, shape.rows), gradient, channels);
    }
}
