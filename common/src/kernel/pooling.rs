//! Pooling and up-sampling of NHWC images.

use super::contraction::PixelRelation;
use super::lists::Lists;
use super::per_isa::per_isa;

/// Channels that are taken at a time: a vector of AVX-512, two of AVX2.
const LANES: usize = 16;

/// For every output pixel, the input pixels of its window, in row order.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Windows(Lists);

impl Windows {
    /// The windows of a pooling layer: the low image is the output.
    pub fn new(relation: &PixelRelation) -> Self {
        let mut windows = vec![Vec::new(); relation.low.rows * relation.low.columns];
        relation.for_each(|high, low, tap| windows[low].push((tap, high as u32)));
        windows.iter_mut().for_each(|window| window.sort_unstable());
        Self(windows.into_iter().map(|window| window.into_iter().map(|(_, pixel)| pixel)).collect())
    }

    fn iter(&self) -> impl Iterator<Item = &[u32]> {
        self.0.iter()
    }
}

#[inline(always)]
fn pixel(values: &[f32], index: u32, channels: usize) -> &[f32] {
    &values[index as usize * channels..][..channels]
}

#[inline(always)]
fn pixel_mut(values: &mut [f32], index: u32, channels: usize) -> &mut [f32] {
    &mut values[index as usize * channels..][..channels]
}

/// What the winners of a window get: for each channel the gradient, the winner, and what gates them.
#[derive(Clone, Copy)]
struct Shares<'a> {
    gradient: &'a [f32],
    winners: &'a [u32],
    gate: Option<&'a [f32]>,
}

impl Shares<'_> {
    /// Adds the gradients of `N` channels from `start` on to their winners.
    // Loops over arrays, without closures: what is not inlined is not compiled for the instruction set.
    #[inline(always)]
    fn give<const N: usize>(self, window: &[u32], input_gradient: &mut [f32], start: usize) {
        let channels = self.gradient.len();
        let (gradient, winners) = (&self.gradient[start..][..N], &self.winners[start..][..N]);
        let mut share = [0.0; N];
        share.copy_from_slice(gradient);
        if let Some(gate) = self.gate {
            let gate = &gate[start..][..N];
            for lane in 0..N {
                share[lane] = if gate[lane] <= 0.0 { 0.0 } else { share[lane] };
            }
        }
        for (place, &index) in window.iter().enumerate() {
            let target = &mut pixel_mut(input_gradient, index, channels)[start..][..N];
            for lane in 0..N {
                target[lane] += if winners[lane] == place as u32 { share[lane] } else { 0.0 };
            }
        }
    }
}

per_isa! {
    /// One sample's max pooling. `winners` gets, for every output, which element of its window was the largest; the
    /// first of equals wins. Windows are never empty.
    pub fn max_pool(windows: &Windows, input: &[f32], output: &mut [f32], winners: &mut [u32], channels: usize) {
        let outputs = output.chunks_exact_mut(channels).zip(winners.chunks_exact_mut(channels));
        for (window, (output, winners)) in windows.iter().zip(outputs) {
            output.copy_from_slice(pixel(input, window[0], channels));
            winners.fill(0);
            for (place, &index) in window.iter().enumerate().skip(1) {
                let values = pixel(input, index, channels);
                for ((output, winner), &value) in output.iter_mut().zip(winners.iter_mut()).zip(values) {
                    // A NaN replaces what was there, so that it stays visible.
                    let larger = value > *output || value.is_nan();
                    *winner = if larger { place as u32 } else { *winner };
                    *output = if larger { value } else { *output };
                }
            }
        }
    }

    /// Backward pass of [`max_pool`]: the winner gets the gradient. With a `gate`, the output of the pooling, it gets it
    /// only where that is above 0: this is also the backward pass of a relu before the pooling, since the output of the
    /// pooling is the winner's.
    pub fn max_pool_backward(
        windows: &Windows,
        output_gradient: &[f32],
        winners: &[u32],
        gate: Option<&[f32]>,
        input_gradient: &mut [f32],
        channels: usize,
    ) {
        let whole = channels - channels % LANES;
        input_gradient.fill(0.0);
        for (i, window) in windows.iter().enumerate() {
            let here = i * channels..(i + 1) * channels;
            let shares = Shares {
                gradient: &output_gradient[here.clone()],
                winners: &winners[here.clone()],
                gate: gate.map(|gate| &gate[here]),
            };
            for start in (0..whole).step_by(LANES) {
                shares.give::<LANES>(window, input_gradient, start);
            }
            for start in whole..channels {
                shares.give::<1>(window, input_gradient, start);
            }
        }
    }

    /// One sample's average pooling: the sum over the window in row order, times 1 / its size.
    pub fn average_pool(windows: &Windows, input: &[f32], output: &mut [f32], channels: usize) {
        for (window, output) in windows.iter().zip(output.chunks_exact_mut(channels)) {
            output.copy_from_slice(pixel(input, window[0], channels));
            for &index in &window[1..] {
                for (output, value) in output.iter_mut().zip(pixel(input, index, channels)) {
                    *output += value;
                }
            }
            let scale = 1.0 / window.len() as f32;
            output.iter_mut().for_each(|output| *output *= scale);
        }
    }

    /// Backward pass of [`average_pool`].
    pub fn average_pool_backward(
        windows: &Windows,
        output_gradient: &[f32],
        input_gradient: &mut [f32],
        channels: usize,
    ) {
        input_gradient.fill(0.0);
        for (window, gradient) in windows.iter().zip(output_gradient.chunks_exact(channels)) {
            let scale = 1.0 / window.len() as f32;
            for &index in window {
                let target = pixel_mut(input_gradient, index, channels);
                for (target, &gradient) in target.iter_mut().zip(gradient) {
                    *target = gradient.mul_add(scale, *target);
                }
            }
        }
    }

    /// One sample's up-sampling by repetition: `windows` are those of the pooling that would undo it.
    pub fn up_sample(windows: &Windows, input: &[f32], output: &mut [f32], channels: usize) {
        for (window, value) in windows.iter().zip(input.chunks_exact(channels)) {
            for &index in window {
                pixel_mut(output, index, channels).copy_from_slice(value);
            }
        }
    }

    /// Backward pass of [`up_sample`]: the sum over the copies in row order.
    pub fn up_sample_backward(
        windows: &Windows,
        output_gradient: &[f32],
        input_gradient: &mut [f32],
        channels: usize,
    ) {
        for (window, target) in windows.iter().zip(input_gradient.chunks_exact_mut(channels)) {
            // Nobody reads the copies of a pixel in a part of the output that is not computed.
            let Some((&first, others)) = window.split_first() else {
                target.fill(0.0);
                continue;
            };
            target.copy_from_slice(pixel(output_gradient, first, channels));
            for &index in others {
                for (target, gradient) in target.iter_mut().zip(pixel(output_gradient, index, channels)) {
                    *target += gradient;
                }
            }
        }
    }
}
