//! Everything that is not a product-sum: activations, losses, sums by position, the optimizer's arithmetic.
//!
//! The bodies are the specification. Where a body sums, it says in which order; sums over many elements use 16 lanes by
//! definition (element `i` belongs to lane `i % 16`), so that they vectorise without depending on the vector width.

use super::ahead::{self, LINE, WriteAhead};
use super::contraction::After;
use super::isa::Isa;
use super::math;
use super::per_isa::per_isa;
use crate::model::Activation;

/// Lanes of a sum over many elements.
const LANES: usize = 16;

/// Slope of `leaky_relu` below zero. Source: Keras 3, `keras.activations.leaky_relu`.
const LEAKY_SLOPE: f32 = 0.2;
/// Source: Klambauer et al. 2017, as in Keras.
const SELU_ALPHA: f32 = 1.673_263_2;
const SELU_SCALE: f32 = 1.050_701;

/// Probabilities are kept this far from 0 and 1 in binary cross-entropy. Source: Keras, `backend.epsilon()`.
const PROBABILITY_MARGIN: f32 = 1e-7;

#[inline(always)]
fn gate(gate: f32, value: f32) -> f32 {
    if gate <= 0.0 { 0.0 } else { value }
}

#[inline(always)]
fn finish_in_place(after: After<'_>, sums: &mut [f32]) {
    match after {
        After::Keep => map(sums, |sum| sum + 0.0),
        After::Relu => map(sums, |sum| gate(sum, sum)),
        After::Gate(by) => sums.iter_mut().zip(by).for_each(|(sum, by)| *sum = gate(*by, *sum + 0.0)),
    }
}

/// Moments below this, 2^-100, have faded away.
const FADED: f32 = 1.0 / (1u128 << 100) as f32;

/// 0 for a moment that has faded away. NaN stays.
///
/// Where no gradient comes any more, moments would become denormal numbers in the end and, since their decay is rounded, some
/// would stay that for ever. Processors may take ten times as long for those, and as long for products with learning rates.
#[inline(always)]
fn unless_faded(moment: f32) -> f32 {
    if moment.abs() < FADED { 0.0 } else { moment }
}

/// How far ahead of a step of Adam its streams are fetched, in floats: 48 cache lines.
const ADAM_AHEAD: usize = 768;

/// A step of Adam for `count` parameters, and the squares of their gradient sums; if the compiler knows how many there are,
/// it makes vectors of them.
#[inline(always)]
fn adam_line(step: AdamStep, line: AdamSlices<'_>, count: usize, squares: &mut [f64; LANES]) {
    let (parameters, gradient_sum) = (&line.parameters[..count], &line.gradient_sum[..count]);
    let (first_moment, second_moment) = (&mut line.first_moment[..count], &mut line.second_moment[..count]);
    let updated = &mut line.updated[..count];
    for i in 0..count {
        let (m, v) = (&mut first_moment[i], &mut second_moment[i]);
        squares[i] += f64::from(gradient_sum[i]) * f64::from(gradient_sum[i]);
        let gradient = gradient_sum[i] * step.inverse_samples;
        *m = unless_faded((gradient - *m).mul_add(step.one_minus_beta_1, *m));
        *v = unless_faded(gradient.mul_add(gradient, -*v).mul_add(step.one_minus_beta_2, *v));
        let denominator = v.sqrt().mul_add(step.root_scale, step.epsilon);
        updated[i] = parameters[i] - step.rate * *m / denominator;
    }
}

/// Adds the lanes of a sum in `f64`, in order.
#[inline(always)]
fn sum_lanes(lanes: &[f32; LANES]) -> f64 {
    lanes.iter().fold(0.0, |sum, &lane| sum + f64::from(lane))
}

#[inline(always)]
fn map(values: &mut [f32], f: impl Fn(f32) -> f32) {
    values.iter_mut().for_each(|value| *value = f(*value));
}

/// `gradient[i] *= derivative(at[i])`
#[inline(always)]
fn chain(gradient: &mut [f32], at: &[f32], derivative: impl Fn(f32) -> f32) {
    for (gradient, &at) in gradient.iter_mut().zip(at) {
        *gradient *= derivative(at);
    }
}

#[inline(always)]
fn copy_whole_rows<const WIDTH: usize>(from: &[f32], columns: usize, start: usize, to: &mut [f32]) {
    for (to, from) in to.as_chunks_mut::<WIDTH>().0.iter_mut().zip(from.chunks_exact(columns)) {
        if let Some(from) = from[start..].first_chunk::<WIDTH>() {
            *to = *from;
        }
    }
}

/// Whether the backward pass of an activation needs its inputs; the others are expressed by their outputs.
pub fn needs_input(activation: Activation) -> bool {
    matches!(activation, Activation::Softplus | Activation::Silu | Activation::Gelu | Activation::Mish)
}

/// Adds `N` columns from `start` on of every row to their sums, which stay in registers meanwhile. Returns `N`.
#[inline(always)]
fn add_columns<const N: usize>(values: &[f32], channels: usize, start: usize, sums: &mut [f32]) -> usize {
    let sums = &mut sums[start..][..N];
    let mut in_registers = [0.0; N];
    in_registers.copy_from_slice(sums);
    for row in values.chunks_exact(channels) {
        for (sum, value) in in_registers.iter_mut().zip(&row[start..][..N]) {
            *sum += value;
        }
    }
    sums.copy_from_slice(&in_registers);
    N
}

per_isa! {
    /// Applies an activation in place.
    pub fn activate(activation: Activation, values: &mut [f32]) {
        match activation {
            Activation::Linear => {}
            Activation::Relu => map(values, |x| gate(x, x)),
            Activation::Relu6 => map(values, |x| { let x = gate(x, x); if x > 6.0 { 6.0 } else { x } }),
            Activation::LeakyRelu => map(values, |x| if x <= 0.0 { LEAKY_SLOPE * x } else { x }),
            Activation::Elu => map(values, |x| if x <= 0.0 { math::exp(x) - 1.0 } else { x }),
            Activation::Selu => map(values, |x| {
                SELU_SCALE * if x <= 0.0 { SELU_ALPHA * (math::exp(x) - 1.0) } else { x }
            }),
            Activation::Softplus => map(values, math::softplus),
            Activation::Softsign => map(values, |x| x / (1.0 + x.abs())),
            Activation::Sigmoid => map(values, math::sigmoid),
            Activation::HardSigmoid => map(values, |x| {
                let x = gate(x + 3.0, x + 3.0);
                (if x > 6.0 { 6.0 } else { x }) * (1.0 / 6.0)
            }),
            Activation::Tanh => map(values, math::tanh),
            Activation::Silu => map(values, |x| x * math::sigmoid(x)),
            Activation::Gelu => map(values, |x| x * math::normal_cdf(x)),
            Activation::Mish => map(values, |x| x * math::tanh(math::softplus(x))),
            Activation::Exponential => map(values, math::exp),
        }
    }

    /// Multiplies `gradient` by the activation's derivative. `at` holds the activation's inputs where
    /// [`needs_input`] says so, else its outputs `y`.
    pub fn activate_backward(activation: Activation, at: &[f32], gradient: &mut [f32]) {
        match activation {
            Activation::Linear => {}
            Activation::Relu => {
                for (gradient, &y) in gradient.iter_mut().zip(at) {
                    *gradient = gate(y, *gradient);
                }
            }
            Activation::Relu6 => chain(gradient, at, |y| if y <= 0.0 || y >= 6.0 { 0.0 } else { 1.0 }),
            Activation::LeakyRelu => chain(gradient, at, |y| if y <= 0.0 { LEAKY_SLOPE } else { 1.0 }),
            // d/dx (e^x - 1) = e^x = y + 1
            Activation::Elu => chain(gradient, at, |y| if y <= 0.0 { y + 1.0 } else { 1.0 }),
            Activation::Selu => {
                chain(gradient, at, |y| if y <= 0.0 { y + SELU_SCALE * SELU_ALPHA } else { SELU_SCALE })
            }
            Activation::Softplus => chain(gradient, at, math::sigmoid),
            // 1 / (1 + |x|)^2 = (1 - |y|)^2
            Activation::Softsign => chain(gradient, at, |y| (1.0 - y.abs()) * (1.0 - y.abs())),
            Activation::Sigmoid => chain(gradient, at, |y| y * (1.0 - y)),
            Activation::HardSigmoid => chain(gradient, at, |y| if y <= 0.0 || y >= 1.0 { 0.0 } else { 1.0 / 6.0 }),
            Activation::Tanh => chain(gradient, at, |y| y.mul_add(-y, 1.0)),
            // s + x s (1 - s)
            Activation::Silu => chain(gradient, at, |x| {
                let s = math::sigmoid(x);
                (x * s).mul_add(1.0 - s, s)
            }),
            // Phi(x) + x phi(x)
            Activation::Gelu => chain(gradient, at, |x| x.mul_add(math::normal_density(x), math::normal_cdf(x))),
            // t + x (1 - t^2) sigmoid(x), with t = tanh(softplus(x))
            Activation::Mish => chain(gradient, at, |x| {
                let t = math::tanh(math::softplus(x));
                (x * t.mul_add(-t, 1.0)).mul_add(math::sigmoid(x), t)
            }),
            Activation::Exponential => chain(gradient, at, |y| y),
        }
    }

    /// Squared error of one sample: returns the sum of `(y - t)^2` and sets `gradient` to `scale * (y - t)`.
    pub fn squared_error(y: &[f32], t: &[f32], scale: f32, gradient: &mut [f32]) -> f64 {
        let mut lanes = [0.0f32; LANES];
        for ((y, t), gradient) in y.chunks(LANES).zip(t.chunks(LANES)).zip(gradient.chunks_mut(LANES)) {
            for (((y, t), gradient), lane) in y.iter().zip(t).zip(gradient).zip(&mut lanes) {
                let error = y - t;
                *gradient = error * scale;
                *lane = error.mul_add(error, *lane);
            }
        }
        sum_lanes(&lanes)
    }

    /// Binary cross-entropy of one sample: returns the sum of `-(t ln y + (1 - t) ln(1 - y))`, with `y` kept away from
    /// 0 and 1, and sets `gradient` to `scale` times its derivative: by `y`, or, if `by_logit`, by the `z` of
    /// `y = sigmoid(z)`, which is `y - t`.
    pub fn binary_cross_entropy(y: &[f32], t: &[f32], scale: f32, by_logit: bool, gradient: &mut [f32]) -> f64 {
        let mut lanes = [0.0f32; LANES];
        for ((y, t), gradient) in y.chunks(LANES).zip(t.chunks(LANES)).zip(gradient.chunks_mut(LANES)) {
            for (((&y, &t), gradient), lane) in y.iter().zip(t).zip(gradient).zip(&mut lanes) {
                let p = y.clamp(PROBABILITY_MARGIN, 1.0 - PROBABILITY_MARGIN);
                *lane -= t.mul_add(math::ln(p), (1.0 - t) * math::ln(1.0 - p));
                let by_y = if p == y { (p - t) / (p * (1.0 - p)) } else { 0.0 };
                *gradient = scale * if by_logit { y - t } else { by_y };
            }
        }
        sum_lanes(&lanes)
    }

    /// `sums[j] += values[i * channels + j]` for every `i`, in order. A single channel is summed in 16 lanes, which
    /// are then added in pairs at distance 8, 4, 2 and 1.
    pub fn add_rows(values: &[f32], channels: usize, sums: &mut [f32]) {
        if channels == 1 {
            let mut lanes = [0.0f32; LANES];
            for chunk in values.chunks(LANES) {
                for (lane, value) in lanes.iter_mut().zip(chunk) {
                    *lane += value;
                }
            }
            for distance in [8, 4, 2, 1] {
                for lane in 0..distance {
                    lanes[lane] += lanes[lane + distance];
                }
            }
            sums[0] += lanes[0];
            return;
        }
        let mut start = 0;
        while start < channels {
            start += match channels - start {
                64.. => add_columns::<64>(values, channels, start, sums),
                16.. => add_columns::<16>(values, channels, start, sums),
                _ => add_columns::<1>(values, channels, start, sums),
            }
        }
    }

    /// `left[i] += right[i]`: the sum of two tree nodes.
    pub fn add(left: &mut [f32], right: &[f32]) {
        for (left, right) in left.iter_mut().zip(right) {
            *left += right;
        }
    }

    /// Adds squares to 16 lanes of `f64`, from lane 0 on.
    pub fn add_squares(values: &[f32], lanes: &mut [f64; LANES]) {
        // In registers, which lanes behind a reference are not.
        let mut sums = *lanes;
        let (whole, rest) = values.as_chunks::<LANES>();
        for chunk in whole {
            for i in 0..LANES {
                sums[i] += f64::from(chunk[i]) * f64::from(chunk[i]);
            }
        }
        for (lane, &value) in sums.iter_mut().zip(rest) {
            *lane += f64::from(value) * f64::from(value);
        }
        *lanes = sums;
    }

    /// One step of Adam for a stretch of parameters; see [`crate::optim::adam`] for the formula. The squares of the gradient
    /// sum are added as by [`SquareSum::add`]: the processor has time for them while it divides and takes roots.
    pub fn adam(step: AdamStep, state: AdamSlices<'_>, squares: &mut SquareSum) {
        let AdamSlices { parameters, gradient_sum, first_moment, second_moment, updated } = state;
        let write_ahead = WriteAhead::new();
        let mut lanes = squares.0;
        let read = parameters.chunks(LINE).zip(gradient_sum.chunks(LINE));
        let written = first_moment.chunks_mut(LINE).zip(second_moment.chunks_mut(LINE)).zip(updated.chunks_mut(LINE));
        for ((parameters, gradient_sum), ((first_moment, second_moment), updated)) in read.zip(written) {
            // Memory is slower than the arithmetic, and five streams are more than processors follow by themselves.
            for read in [parameters, gradient_sum] {
                ahead::fetch(read.as_ptr().wrapping_add(ADAM_AHEAD));
            }
            for written in [&*first_moment, second_moment, updated] {
                write_ahead.fetch(written.as_ptr().wrapping_add(ADAM_AHEAD));
            }
            let line = AdamSlices { parameters, gradient_sum, first_moment, second_moment, updated };
            match line.parameters.len() {
                LINE => adam_line(step, line, LINE, &mut lanes),
                some => adam_line(step, line, some, &mut lanes),
            }
        }
        squares.0 = lanes;
    }

    /// Copies `count` columns, from column `start` on, of rows that are `columns` wide to rows that are `width` apart.
    pub fn copy_columns(from: &[f32], columns: usize, start: usize, count: usize, to: &mut [f32], width: usize) {
        // Lengths that the compiler knows become a few vector moves instead of a call for each row.
        match (count, width) {
            (64, 64) => copy_whole_rows::<64>(from, columns, start, to),
            (48, 48) => copy_whole_rows::<48>(from, columns, start, to),
            (32, 32) => copy_whole_rows::<32>(from, columns, start, to),
            (16, 16) => copy_whole_rows::<16>(from, columns, start, to),
            (12, 12) => copy_whole_rows::<12>(from, columns, start, to),
            (8, 8) => copy_whole_rows::<8>(from, columns, start, to),
            _ => {
                for (to, from) in to.chunks_exact_mut(width).zip(from.chunks_exact(columns)) {
                    to[..count].copy_from_slice(&from[start..start + count]);
                }
            }
        }
    }

    /// Second half of a tap-by-tap gather: `output[pixel][c] = after(bias[c] + sum over terms of its products[c])`, terms in
    /// the order of the lines. A line has at most one term of a pixel.
    pub fn sum_terms(
        products: &[f32],
        terms: &[TermLine],
        bias: Option<&[f32]>,
        after: After<'_>,
        output: &mut [f32],
        channels: usize,
    ) {
        match bias {
            Some(&[bias]) => output.fill(bias),
            Some(bias) => output.chunks_exact_mut(channels).for_each(|output| output.copy_from_slice(bias)),
            None => output.fill(0.0),
        }
        for line in terms {
            for channel in 0..channels {
                let [from_step, to_step] = line.steps;
                let (mut from, mut to) = (line.from + channel, line.to + channel);
                for _ in 0..line.count {
                    output[to] += products[from];
                    from += from_step;
                    to += to_step;
                }
            }
        }
        finish_in_place(after, output);
    }

    /// Ends sums of products: -0 becomes +0, then comes what is `after` them.
    pub fn finish_outputs(after: After<'_>, sums: &mut [f32]) {
        finish_in_place(after, sums);
    }

    /// Ends sums of products: -0 becomes +0. Returns whether all are finite.
    pub fn finish_sums(sums: &mut [f32]) -> bool {
        let largest = sums.iter_mut().fold(0, |largest: u32, sum| {
            *sum += 0.0;
            largest.max(sum.to_bits() & 0x7fff_ffff)
        });
        largest < f32::INFINITY.to_bits()
    }
}

/// Terms that lie at even distances, of outputs that do so, too.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TermLine {
    /// Offset of the first term's first channel in the products.
    pub from: usize,
    /// Offset of the first channel of its output.
    pub to: usize,
    /// Number of terms.
    pub count: usize,
    /// From one term to the next, and from one output to the next; above 0.
    pub steps: [usize; 2],
}

impl TermLine {
    /// A line with one term.
    pub fn of_one(from: usize, to: usize) -> Self {
        Self { from, to, count: 1, steps: [1; 2] }
    }

    /// Makes the line longer, if a term lies where it goes on. (A line of one term goes on anywhere behind it.) Returns
    /// whether it did.
    pub fn take(&mut self, from: usize, to: usize) -> bool {
        let Self { count, steps, .. } = *self;
        let next = |steps: [usize; 2]| (self.from + count * steps[0], self.to + count * steps[1]);
        let steps = match count {
            1 => [from.saturating_sub(self.from), to.saturating_sub(self.to)],
            _ => steps,
        };
        if steps.contains(&0) || next(steps) != (from, to) {
            return false;
        }
        (self.count, self.steps) = (count + 1, steps);
        true
    }
}

/// A sum of squares in the making: 16 lanes of `f64`, which are added in order in the end.
#[derive(Clone, Copy, Debug, Default)]
pub struct SquareSum([f64; LANES]);

impl SquareSum {
    /// Adds the squares of the next values, in multiples of 16 until the last ones.
    pub fn add(&mut self, isa: Isa, values: &[f32]) {
        add_squares(isa, values, &mut self.0);
    }

    /// The sum.
    pub fn total(&self) -> f64 {
        self.0.iter().fold(0.0, |sum, lane| sum + lane)
    }
}

/// What one step of Adam does to every parameter.
#[derive(Clone, Copy, Debug)]
pub struct AdamStep {
    /// 1 / number of samples in the batch: turns gradient sums into means.
    pub inverse_samples: f32,
    /// `1 - beta_1`
    pub one_minus_beta_1: f32,
    /// `1 - beta_2`
    pub one_minus_beta_2: f32,
    /// Factor of the root of the second moment.
    pub root_scale: f32,
    /// Added to the scaled root.
    pub epsilon: f32,
    /// Step size, bias correction included.
    pub rate: f32,
}

/// The slices that [`adam`] works on, all equally long.
pub struct AdamSlices<'a> {
    /// Parameters before the step.
    pub parameters: &'a [f32],
    /// Sum of the gradients of all samples of the batch.
    pub gradient_sum: &'a [f32],
    /// Running mean of gradients.
    pub first_moment: &'a mut [f32],
    /// Running mean of squared gradients.
    pub second_moment: &'a mut [f32],
    /// Parameters after the step.
    pub updated: &'a mut [f32],
}
