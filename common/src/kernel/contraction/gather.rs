//! Forward passes and input gradients: every output pixel sums over the taps that reach it.

use std::collections::BTreeMap;

use super::{ChannelCounts, Panel, PixelRelation, goes_on, index, panels, pixels};
use crate::kernel::elementwise::{self, TermLine};
use crate::kernel::isa::Isa;
use crate::kernel::microkernel::{self, Block, Finish, Row, Run, Start};
use crate::kernel::products::Element;
use crate::kernel::transpose::{MatrixShape, transpose};

/// Below this many output channels a [`Gather`] over several taps multiplies all taps' filters first and adds up after.
const NARROW: usize = 16;

/// Which image a [`Gather`] computes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Direction {
    /// The low image from the high one: a convolution, or the input gradient of a transposed one.
    ToLow,
    /// The high image from the low one.
    ToHigh,
}

/// What a [`Gather`] does with its sums.
#[derive(Clone, Copy, Debug)]
pub enum After<'a> {
    /// Nothing.
    Keep,
    /// `max(x, 0)`
    Relu,
    /// Sets it to 0 where the given buffer, laid out like the output, is not above 0: the backward pass of a relu.
    Gate(&'a [f32]),
}

/// Output pixels that are reached by the same taps.
#[derive(Debug)]
struct Group {
    /// For the largest number of samples, sample by sample; a prefix serves fewer.
    rows: Vec<Row>,
    rows_per_sample: usize,
    runs: Vec<Run>,
}

#[derive(Debug)]
enum Strategy {
    /// Sums stay in registers over all taps and channels.
    Direct(Vec<Group>),
    /// For few output channels: a matrix product with the filters of all taps, then a sum over taps for each output.
    TapByTap {
        group: Group,
        /// Where the terms of a sample's outputs lie, tap by tap.
        terms: Vec<TermLine>,
    },
}

/// A plan for forward passes and input gradients; see the module's documentation.
///
/// Its input channels are elements of its operands: of pairs there are half as many as of floats.
#[derive(Debug)]
pub struct Gather {
    isa: Isa,
    direction: Direction,
    strategy: Strategy,
    panels: Vec<Panel>,
    taps: usize,
    channels_in: usize,
    channels_out: usize,
    input_pixels: usize,
    output_pixels: usize,
    max_samples: usize,
}

impl Gather {
    /// A plan for up to `max_samples` samples at a time.
    pub fn new(
        isa: Isa,
        relation: &PixelRelation,
        direction: Direction,
        channels: ChannelCounts,
        max_samples: usize,
    ) -> Self {
        let (input, output) = match direction {
            Direction::ToLow => (relation.high, relation.low),
            Direction::ToHigh => (relation.low, relation.high),
        };
        let (input_pixels, output_pixels) = (pixels(input), pixels(output));
        let (channels_in, channels_out) = match direction {
            Direction::ToLow => (channels.high, channels.low),
            Direction::ToHigh => (channels.low, channels.high),
        };
        // Which (tap, input pixel) pairs each output pixel sums over, in the order of the taps.
        let mut sources: Vec<Vec<(usize, usize)>> = vec![Vec::new(); output_pixels];
        relation.for_each(|high, low, tap| match direction {
            Direction::ToLow => sources[low].push((tap, high)),
            Direction::ToHigh => sources[high].push((tap, low)),
        });
        sources.iter_mut().for_each(|taps| taps.sort_unstable());

        let taps = relation.taps();
        let window_columns = relation.kernel.columns;
        let sizes = Sizes { window_columns, channels_in, channels_out, input_pixels, output_pixels, max_samples };
        let tap_by_tap = channels_out < NARROW && taps > 1 && channels_in >= NARROW;
        let (strategy, columns, depth) = if tap_by_tap {
            (tap_by_tap_strategy(&sources, taps, &sizes), taps * channels_out, channels_in)
        } else {
            (Strategy::Direct(direct_groups(&sources, &sizes)), channels_out, taps * channels_in)
        };
        let panels = panels(isa, columns, depth);
        Self {
            isa,
            direction,
            strategy,
            panels,
            taps,
            channels_in,
            channels_out,
            input_pixels,
            output_pixels,
            max_samples,
        }
    }

    /// Elements of a packed copy of the weights.
    pub fn packed_len(&self) -> usize {
        self.panels.iter().map(|panel| panel.width).sum::<usize>() * self.depth()
    }

    /// Floats of scratch memory that a run needs.
    pub fn scratch_len(&self) -> usize {
        match self.strategy {
            Strategy::Direct(_) => 0,
            Strategy::TapByTap { .. } => self.max_samples * self.input_pixels * self.taps * self.channels_out,
        }
    }

    /// Products summed for a column of a panel.
    fn depth(&self) -> usize {
        match self.strategy {
            Strategy::Direct(_) => self.taps * self.channels_in,
            Strategy::TapByTap { .. } => self.channels_in,
        }
    }

    /// Copies `weights` (taps, high channels, low channels) into panels of columns, as [`Gather::run`] wants them.
    ///
    /// # Panics
    /// When a slice has not the length that the plan says.
    pub fn pack<E: Element>(&self, weights: &[E], packed: &mut [E]) {
        assert_eq!(weights.len(), self.taps * self.channels_in * self.channels_out, "weights of the plan");
        assert_eq!(packed.len(), self.packed_len(), "packed weights of the plan");
        match (&self.strategy, self.direction) {
            (Strategy::Direct(_), Direction::ToLow) => self.pack_rows(weights, packed),
            (Strategy::Direct(_), Direction::ToHigh) => self.pack_columns(weights, packed),
            (Strategy::TapByTap { .. }, direction) => self.pack_tap_by_tap(direction, weights, packed),
        }
    }

    /// The summed channels are the weights' rows: rows of a panel are stretches of rows of the weights.
    fn pack_rows<E: Element>(&self, weights: &[E], packed: &mut [E]) {
        for panel in &self.panels {
            let target = &mut packed[panel.offset..][..panel.width * self.depth()];
            for (row, from) in target.chunks_exact_mut(panel.width).zip(weights.chunks_exact(self.channels_out)) {
                row[..panel.columns].copy_from_slice(&from[panel.start..][..panel.columns]);
                row[panel.columns..].fill(E::zeroed());
            }
        }
    }

    /// The summed channels are the weights' columns: every tap's matrix is transposed.
    fn pack_columns<E: Element>(&self, weights: &[E], packed: &mut [E]) {
        let (depth, size) = (self.channels_in, self.channels_in * self.channels_out);
        for panel in &self.panels {
            let target = &mut packed[panel.offset..][..panel.width * self.depth()];
            for (matrix, tap) in target.chunks_exact_mut(panel.width * depth).zip(weights.chunks_exact(size)) {
                let rows = &tap[panel.start * depth..][..panel.columns * depth];
                let shape = MatrixShape { rows: panel.columns, columns: depth, stride: depth };
                let (rows, matrix) = (bytemuck::cast_slice(rows), bytemuck::cast_slice_mut(matrix));
                transpose(self.isa, rows, shape, matrix, panel.width);
            }
        }
    }

    /// Column `tap * channels_out + channel` of the product is that tap's filter for that channel.
    fn pack_tap_by_tap<E: Element>(&self, direction: Direction, weights: &[E], packed: &mut [E]) {
        let (depth, channels) = (self.channels_in, self.channels_out);
        for panel in &self.panels {
            let target = &mut packed[panel.offset..][..panel.width * depth];
            for (k, row) in target.chunks_exact_mut(panel.width).enumerate() {
                row[panel.columns..].fill(E::zeroed());
                for (j, value) in row[..panel.columns].iter_mut().enumerate() {
                    let (tap, channel) = ((panel.start + j) / channels, (panel.start + j) % channels);
                    *value = match direction {
                        Direction::ToLow => weights[(tap * depth + k) * channels + channel],
                        Direction::ToHigh => weights[(tap * channels + channel) * depth + k],
                    };
                }
            }
        }
    }

    /// Computes `output` (samples, output pixels, output channels) from `input` (samples, input pixels, input channels):
    /// bias, plus products tap by tap and channel by channel, then `after`. Buffers may be longer than needed.
    ///
    /// # Panics
    /// When `samples` exceeds the plan's largest number or a slice is too short.
    pub fn run<E: Element>(&self, samples: usize, operands: GatherOperands<'_, E>) {
        let GatherOperands { input, packed, bias, output, after, scratch } = operands;
        let outputs = samples * self.output_pixels * self.channels_out;
        assert!(samples <= self.max_samples, "{samples} samples in a plan for {}", self.max_samples);
        assert!(input.len() >= samples * self.input_pixels * self.channels_in, "input too short");
        assert!(output.len() >= outputs, "output too short");
        assert_eq!(packed.len(), self.packed_len(), "packed weights of the plan");
        assert!(bias.is_none_or(|bias| bias.len() == self.channels_out), "one bias for each output channel");
        if let After::Gate(gate) = after {
            assert!(gate.len() >= outputs, "gate too short");
        }
        if samples == 0 {
            return;
        }
        match &self.strategy {
            Strategy::Direct(groups) => {
                for panel in &self.panels {
                    let start = bias.map_or(Start::Zero, |bias| Start::Bias(bias[panel.start..].as_ptr()));
                    let finish = match after {
                        After::Keep => Finish::Keep,
                        After::Relu => Finish::Relu,
                        After::Gate(gate) => Finish::Gate(gate[panel.start..].as_ptr()),
                    };
                    for group in groups {
                        let block = Block { start, finish, ..block(panel, group, samples, input, packed, output) };
                        // SAFETY: rows and runs were checked against one sample's sizes when the plan was made, and
                        // the lengths above are those of `samples` samples; packed panels are whole vectors wide and
                        // `depth` rows long; `output` is borrowed mutably, and panels and rows do not overlap.
                        unsafe { microkernel::run(self.isa, &block) };
                    }
                }
            }
            Strategy::TapByTap { group, terms } => {
                let products = samples * self.input_pixels * self.taps * self.channels_out;
                assert!(scratch.len() >= products, "scratch memory too short");
                for panel in &self.panels {
                    let block = block(panel, group, samples, input, packed, scratch);
                    // SAFETY: as above, with `scratch` as the output.
                    unsafe { microkernel::run(self.isa, &block) };
                }
                self.sum_taps(terms, &scratch[..products], bias, after, output);
            }
        }
    }

    /// Second half of the tap-by-tap strategy, sample by sample.
    fn sum_taps(
        &self,
        terms: &[TermLine],
        products: &[f32],
        bias: Option<&[f32]>,
        after: After<'_>,
        output: &mut [f32],
    ) {
        let products_len = self.input_pixels * self.taps * self.channels_out;
        let output_len = self.output_pixels * self.channels_out;
        let samples = products.chunks_exact(products_len).zip(output.chunks_exact_mut(output_len));
        for (i, (products, output)) in samples.enumerate() {
            let after = match after {
                After::Gate(gate) => After::Gate(&gate[i * output_len..][..output_len]),
                other => other,
            };
            elementwise::sum_terms(self.isa, products, terms, bias, after, output, self.channels_out);
        }
    }
}

/// The block of a panel's columns of a group's outputs: plain sums of products.
fn block<'a, E>(
    panel: &Panel,
    group: &'a Group,
    samples: usize,
    input: &[E],
    packed: &[E],
    output: &mut [f32],
) -> Block<'a, E> {
    Block {
        a: input.as_ptr(),
        b: packed[panel.offset..].as_ptr(),
        c: output[panel.start..].as_mut_ptr(),
        rows: &group.rows[..samples * group.rows_per_sample],
        runs: &group.runs,
        segments: &[1],
        a_repeat: 0,
        b_repeat: 0,
        a_step: 1,
        b_stride: panel.width,
        columns: panel.columns,
        start: Start::Zero,
        finish: Finish::Keep,
        rounded_on: None,
        ahead: None,
    }
}

/// What a [`Gather`] reads and writes; see [`Gather::run`].
pub struct GatherOperands<'a, E = f32> {
    /// (samples, input pixels, input channels)
    pub input: &'a [E],
    /// From [`Gather::pack`].
    pub packed: &'a [E],
    /// One for each output channel.
    pub bias: Option<&'a [f32]>,
    /// (samples, output pixels, output channels)
    pub output: &'a mut [f32],
    /// Applied to every sum.
    pub after: After<'a>,
    /// At least [`Gather::scratch_len`] floats.
    pub scratch: &'a mut [f32],
}

struct Sizes {
    window_columns: usize,
    channels_in: usize,
    channels_out: usize,
    input_pixels: usize,
    output_pixels: usize,
    max_samples: usize,
}

/// Groups output pixels by the taps that reach them and the relative places those taps read.
fn direct_groups(sources: &[Vec<(usize, usize)>], sizes: &Sizes) -> Vec<Group> {
    // Taps with pixels relative to the first one's, and the (first input pixel, output pixel) places that share them.
    type TapSet = Vec<(usize, isize)>;
    let mut by_taps: BTreeMap<TapSet, Vec<(usize, usize)>> = BTreeMap::new();
    for (output, taps) in sources.iter().enumerate() {
        let base = taps.first().map_or(0, |&(_, pixel)| pixel);
        let relative = taps.iter().map(|&(tap, pixel)| (tap, pixel as isize - base as isize)).collect();
        by_taps.entry(relative).or_default().push((base, output));
    }
    let groups = by_taps.into_iter().map(|(taps, places)| {
        let mut runs: Vec<Run> = Vec::new();
        for (tap, pixel) in taps {
            let a = i32::try_from(pixel * sizes.channels_in as isize).expect("offsets within a sample fit 32 bits");
            let depth = index(sizes.channels_in);
            let run = Run { a, b: index(tap * sizes.channels_in), depth, line: depth };
            // A line is at most a row of the window.
            match runs.last_mut().filter(|last| !tap.is_multiple_of(sizes.window_columns) && goes_on(last, &run, 1)) {
                Some(last) => *last = Run { depth: last.depth + depth, line: last.line + depth, ..*last },
                None => runs.push(run),
            }
        }
        group(&places, runs, sizes.channels_out, sizes)
    });
    groups.collect()
}

/// A group for outputs of `columns` floats at the given (input pixel, output pixel) places of every sample.
fn group(places: &[(usize, usize)], runs: Vec<Run>, columns: usize, sizes: &Sizes) -> Group {
    let (input, output) = (sizes.input_pixels * sizes.channels_in, sizes.output_pixels * columns);
    for run in &runs {
        for &(pixel, _) in places {
            let first = (pixel * sizes.channels_in) as isize + run.a as isize;
            assert!(first >= 0 && first as usize + run.depth as usize <= input, "a plan stays inside its input");
        }
    }
    let rows = (0..sizes.max_samples).flat_map(|sample| {
        places.iter().map(move |&(from, to)| Row {
            a: index(sample * input + from * sizes.channels_in),
            c: index(sample * output + to * columns),
        })
    });
    Group { rows: rows.collect(), rows_per_sample: places.len(), runs }
}

fn tap_by_tap_strategy(sources: &[Vec<(usize, usize)>], taps: usize, sizes: &Sizes) -> Strategy {
    let columns = taps * sizes.channels_out;
    let places: Vec<(usize, usize)> = (0..sizes.input_pixels).map(|pixel| (pixel, pixel)).collect();
    let depth = index(sizes.channels_in);
    let run = Run { a: 0, b: 0, depth, line: depth };
    let products = Sizes { output_pixels: sizes.input_pixels, ..*sizes };
    Strategy::TapByTap {
        group: group(&places, vec![run], columns, &products),
        terms: lines_of_terms(sources, sizes, taps),
    }
}

/// The terms of all outputs, tap by tap, and pixel by pixel as far as they are evenly spaced.
fn lines_of_terms(sources: &[Vec<(usize, usize)>], sizes: &Sizes, taps: usize) -> Vec<TermLine> {
    let columns = taps * sizes.channels_out;
    let mut lines: Vec<TermLine> = Vec::new();
    for tap in 0..taps {
        let pixels = sources.iter().enumerate().filter_map(|(output, sources)| {
            let &(_, input) = sources.iter().find(|(of, _)| *of == tap)?;
            Some((input * columns + tap * sizes.channels_out, output * sizes.channels_out))
        });
        let first_of_tap = lines.len();
        for (from, to) in pixels {
            if !lines[first_of_tap..].last_mut().is_some_and(|line| line.take(from, to)) {
                lines.push(TermLine::of_one(from, to));
            }
        }
    }
    lines
}
