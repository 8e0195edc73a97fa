//! The part of the high image that each low pixel is connected with.

use super::{ChannelCounts, PixelRelation, index, pixels};
use crate::kernel::products::Element;
use crate::model::Pair;

/// Low pixel `p` is connected with a *patch* of the high image: for each row of the kernel a *stretch* of neighbouring floats,
/// `kernel columns * high channels`. Where patches reach beyond the image, they lie in one with zeros around it.
#[derive(Debug)]
pub(super) struct Patches {
    pub(super) channels: ChannelCounts,
    pub(super) kernel: Pair,
    high: Pair,
    /// Rows and columns of zeros before the high image, and the size of what patches lie in.
    before: Pair,
    padded: Pair,
    /// Where each patch begins, in floats of the padded image.
    starts: Vec<u32>,
}

impl Patches {
    pub(super) fn new(relation: &PixelRelation, channels: ChannelCounts) -> Self {
        Self::in_steps_of(1, relation, channels)
    }

    /// The same, with so many zeros behind each row that it is a multiple of `step` pixels.
    pub(super) fn in_steps_of(step: usize, relation: &PixelRelation, channels: ChannelCounts) -> Self {
        let PixelRelation { high, low, kernel, strides, padding: before } = *relation;
        let reach = |low: usize, stride: usize, kernel: usize| (low - 1) * stride + kernel;
        let padded = Pair {
            rows: (before.rows + high.rows).max(reach(low.rows, strides.rows, kernel.rows)),
            columns: (before.columns + high.columns)
                .max(reach(low.columns, strides.columns, kernel.columns))
                .next_multiple_of(step),
        };
        let line = padded.columns * channels.high;
        let corners =
            (0..low.rows).flat_map(|y| (0..low.columns).map(move |x| (y * strides.rows, x * strides.columns)));
        let starts = corners.map(|(y, x)| index(y * line + x * channels.high)).collect();
        Self { channels, kernel, high, before, padded, starts }
    }

    /// Where each low pixel's patch begins, in floats of the padded image.
    pub(super) fn starts(&self) -> &[u32] {
        &self.starts
    }

    /// Floats of a stretch.
    pub(super) fn stretch(&self) -> usize {
        self.kernel.columns * self.channels.high
    }

    /// Floats of a row of the padded image: from one stretch of a patch to the next one.
    pub(super) fn line(&self) -> usize {
        self.padded.columns * self.channels.high
    }

    /// Weights of the layer.
    pub(super) fn weights(&self) -> usize {
        self.kernel.rows * self.stretch() * self.channels.low
    }

    /// Floats of the high image of a sample.
    pub(super) fn high_len(&self) -> usize {
        pixels(self.high) * self.channels.high
    }

    /// Floats of the low image of a sample.
    pub(super) fn low_len(&self) -> usize {
        self.starts.len() * self.channels.low
    }

    /// Whether patches reach beyond the high image.
    pub(super) fn are_padded(&self) -> bool {
        self.padded != self.high
    }

    /// Floats of the padded image, all of which are in the high one if patches do not reach beyond it.
    pub(super) fn padded_len(&self) -> usize {
        pixels(self.padded) * self.channels.high
    }

    /// Writes the high image with zeros around it.
    pub(super) fn pad<E: Element>(&self, high: &[E], padded: &mut [E]) {
        padded.fill(E::zeroed());
        let len = self.high.columns * self.channels.high;
        let lines = padded.chunks_exact_mut(self.line()).skip(self.before.rows);
        for (padded, high) in lines.zip(high.chunks_exact(len)) {
            padded[self.before.columns * self.channels.high..][..len].copy_from_slice(high);
        }
    }

    /// Writes the high image without what is around it.
    pub(super) fn crop(&self, padded: &[f32], high: &mut [f32]) {
        let len = self.high.columns * self.channels.high;
        let lines = padded.chunks_exact(self.line()).skip(self.before.rows);
        for (padded, high) in lines.zip(high.chunks_exact_mut(len)) {
            high.copy_from_slice(&padded[self.before.columns * self.channels.high..][..len]);
        }
    }
}
