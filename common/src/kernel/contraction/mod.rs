//! Convolutions, transposed convolutions and matrix products as plans for the microkernel.
//!
//! One relation covers them all: `high pixel = low pixel * stride + tap - padding`. A convolution computes the low image
//! from the high one, a transposed convolution the high from the low, a dense layer has one pixel and one tap. Weights
//! lie as `[tap][high channel][low channel]`, which is Keras' order for all three. So there are two kinds of plan:
//!
//! - [`Gather`]: each output pixel sums over the taps that reach it, tap by tap, channel by channel. It serves forward
//!   passes and input gradients in both directions.
//! - [`Reduce`]: each weight sums over samples and pixels, in that order. It serves all weight gradients.
//!
//! Where the low image is mostly 0, [`Scatter`] does what a gather to the high image does, and [`SparseReduce`] what a reduction
//! does, without the products of zeros.
//!
//! [`BlockedReduce`] reduces in blocks of products.
//!
//! [`Dense`] does both for networks of dense layers alone, over many samples at once and on all threads.
//!
//! Plans are made once for a model and checked then; running one costs a few length checks.

mod blocked_reduce;
mod crew;
mod dense;
mod gather;
mod lines;
mod patches;
mod reduce;
mod scatter;
mod sparse_reduce;

use super::isa::Isa;
use super::microkernel::{BLOCK_PAIRS, MAX_SEGMENTS, Run, panel_widths};
use crate::model::{self, Padding, Pair};

pub use blocked_reduce::BlockedReduce;
pub use crew::{Crew, CrewSize};
pub use dense::{Dense, DenseForward, DenseInputGradient, DenseShape, DenseWeightGradient, SparseOperand};
pub use gather::{After, Direction, Gather, GatherOperands};
pub use reduce::{Reduce, ReduceOperands};
pub use scatter::Scatter;
pub use sparse_reduce::SparseReduce;

/// Elements that must follow the last one of a buffer that is read in whole vectors: the widest panel.
pub const SLACK: usize = 64;

/// Samples of a block of products that are added in blocks: pairs of them.
pub const BLOCK_SAMPLES: usize = 2 * BLOCK_PAIRS;

/// Floats that stay in the L1 cache while something else goes by: 24 KiB of at least 32.
const L1_FLOATS: usize = 6144;

/// Leaves whose weight gradients one run can add up.
pub const MAX_LEAVES: usize = MAX_SEGMENTS;

/// How pixels of a larger image correspond to pixels of a smaller one: `high = low * strides + tap - padding`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PixelRelation {
    /// Size of the image on the finer grid.
    pub high: Pair,
    /// Size of the image on the coarser grid.
    pub low: Pair,
    /// Size of the window of taps.
    pub kernel: Pair,
    /// Step of the window.
    pub strides: Pair,
    /// Rows and columns of the window that lie before the first pixel.
    pub padding: Pair,
}

impl PixelRelation {
    /// The relation of a matrix product on `pixels` independent positions.
    pub fn pointwise(pixels: usize) -> Self {
        let line = Pair { rows: 1, columns: pixels };
        Self { high: line, low: line, kernel: Pair::square(1), strides: Pair::square(1), padding: Pair::square(0) }
    }

    /// The relation of a layer with Keras' padding.
    pub fn with_padding(high: Pair, low: Pair, kernel: Pair, strides: Pair, padding: Padding) -> Self {
        Self { high, low, kernel, strides, padding: model::paddings_before(high, low, kernel, strides, padding) }
    }

    /// Number of taps.
    pub fn taps(&self) -> usize {
        self.kernel.rows * self.kernel.columns
    }

    /// Calls `visit(high pixel, low pixel, tap)` for every pair of pixels that a tap connects.
    pub fn for_each(&self, mut visit: impl FnMut(usize, usize, usize)) {
        let inside = |low: usize, stride: usize, tap: usize, padding: usize, size: usize| {
            (low * stride + tap).checked_sub(padding).filter(|&high| high < size)
        };
        for y in 0..self.low.rows {
            for x in 0..self.low.columns {
                for tap_y in 0..self.kernel.rows {
                    let Some(high_y) = inside(y, self.strides.rows, tap_y, self.padding.rows, self.high.rows) else {
                        continue;
                    };
                    for tap_x in 0..self.kernel.columns {
                        let high_x = inside(x, self.strides.columns, tap_x, self.padding.columns, self.high.columns);
                        if let Some(high_x) = high_x {
                            let high = high_y * self.high.columns + high_x;
                            visit(high, y * self.low.columns + x, tap_y * self.kernel.columns + tap_x);
                        }
                    }
                }
            }
        }
    }

    /// Number of multiplications of one channel pair: connected pairs of pixels.
    pub fn pairs(&self) -> usize {
        let mut pairs = 0;
        self.for_each(|_, _, _| pairs += 1);
        pairs
    }
}

fn pixels(size: Pair) -> usize {
    size.rows * size.columns
}

/// Channels of the two images of a [`PixelRelation`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ChannelCounts {
    /// Of the high image.
    pub high: usize,
    /// Of the low image.
    pub low: usize,
}

/// A part of the output columns and its packed weights.
#[derive(Clone, Copy, Debug)]
struct Panel {
    start: usize,
    columns: usize,
    width: usize,
    /// Where its weights lie in the packed buffer.
    offset: usize,
}

/// Cuts `columns` into panels of the instruction set's widths; each takes `depth` rows of the packed buffer. A last panel
/// may be wider than its columns, but not by as much as the narrowest width.
fn panels(isa: Isa, columns: usize, depth: usize) -> Vec<Panel> {
    let mut panels = Vec::new();
    let (mut start, mut offset) = (0, 0);
    while start < columns {
        let rest = columns - start;
        let widths = panel_widths(isa);
        let narrowest = widths[widths.len() - 1];
        let width = *widths.iter().find(|&&width| width < rest + narrowest).unwrap_or(&narrowest);
        let columns = rest.min(width);
        panels.push(Panel { start, columns, width, offset });
        start += columns;
        offset += width * depth;
    }
    panels
}

fn index(value: usize) -> u32 {
    u32::try_from(value).expect("tensors have at most 2^28 elements a sample, and plans few samples")
}

/// Whether a run goes on where another one ends, in both operands.
fn goes_on(last: &Run, run: &Run, a_step: usize) -> bool {
    last.a + (last.depth as usize * a_step) as i32 == run.a && last.b + last.depth == run.b
}
