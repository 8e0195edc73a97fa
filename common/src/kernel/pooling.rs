//! Pooling and up-sampling of NHWC images.

use super::contraction::PixelRelation;
use super::per_isa::per_isa;

/// For every output pixel, the input pixels of its window, in row order.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Windows {
    /// `starts[i]..starts[i + 1]` are output pixel `i`'s places in `pixels`.
    starts: Vec<u32>,
    pixels: Vec<u32>,
}

impl Windows {
    /// The windows of a pooling layer: the low image is the output.
    pub fn new(relation: &PixelRelation) -> Self {
        let mut windows = vec![Vec::new(); relation.low.rows * relation.low.columns];
        relation.for_each(|high, low, tap| windows[low].push((tap, high as u32)));
        let mut starts = vec![0];
        let mut pixels = Vec::new();
        for window in &mut windows {
            window.sort_unstable();
            pixels.extend(window.iter().map(|&(_, pixel)| pixel));
            starts.push(pixels.len() as u32);
        }
        Self { starts, pixels }
    }

    fn iter(&self) -> impl Iterator<Item = &[u32]> {
        self.starts.windows(2).map(|bounds| &self.pixels[bounds[0] as usize..bounds[1] as usize])
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

    /// Backward pass of [`max_pool`]: the winner gets the gradient.
    pub fn max_pool_backward(
        windows: &Windows,
        output_gradient: &[f32],
        winners: &[u32],
        input_gradient: &mut [f32],
        channels: usize,
    ) {
        input_gradient.fill(0.0);
        let outputs = output_gradient.chunks_exact(channels).zip(winners.chunks_exact(channels));
        for (window, (gradient, winners)) in windows.iter().zip(outputs) {
            for (place, &index) in window.iter().enumerate() {
                let target = pixel_mut(input_gradient, index, channels);
                for ((target, &gradient), &winner) in target.iter_mut().zip(gradient).zip(winners) {
                    *target += if winner == place as u32 { gradient } else { 0.0 };
                }
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
            target.copy_from_slice(pixel(output_gradient, window[0], channels));
            for &index in &window[1..] {
                for (target, gradient) in target.iter_mut().zip(pixel(output_gradient, index, channels)) {
                    *target += gradient;
                }
            }
        }
    }
}
