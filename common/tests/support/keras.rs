//! Keras' layers in `f64`, one sample at a time: nested loops that follow the definitions and nothing else.
//!
//! This is the opposite of the library: no plans, no vectors, no shared geometry, every formula for itself.

use lockstep_common::model::{Activation, ConvSpec, LayerSpec, Padding, PoolSpec, ResolvedLayer, ResolvedModel};
use lockstep_common::nn::Loss;

/// Elements of a max pooling window closer than this are the same number, computed in two places.
const EQUAL: f64 = 1e-12;

/// An image: pixel (y, x), channel c.
struct Image {
    height: usize,
    width: usize,
    channels: usize,
    values: Vec<f64>,
}

impl Image {
    fn zeros(height: usize, width: usize, channels: usize) -> Self {
        Self { height, width, channels, values: vec![0.0; height * width * channels] }
    }

    fn at(&self, y: usize, x: usize, c: usize) -> f64 {
        self.values[(y * self.width + x) * self.channels + c]
    }

    fn at_mut(&mut self, y: usize, x: usize, c: usize) -> &mut f64 {
        &mut self.values[(y * self.width + x) * self.channels + c]
    }
}

/// A model's reconstruction of `sample`. `margin` is lowered to how close a value came to a point where its derivative
/// jumps.
pub(super) fn forward(model: &ResolvedModel, parameters: &[f64], sample: &[f64], margin: &mut f64) -> Vec<f64> {
    let tensor = |layer: &ResolvedLayer, name: &str| -> Option<Vec<f64>> {
        let entry = model.layout.find(&format!("{}.{name}", layer.place))?;
        Some((0..entry.range.len()).map(|element| parameters[entry.place(element)]).collect())
    };
    let mut values = sample.to_vec();
    for layer in &model.layers {
        let kernel = &tensor(layer, "kernel").unwrap_or_default()[..];
        let axes = layer.input.axes();
        let last = *layer.output.axes().last().unwrap();
        let image = |values: Vec<f64>| Image { height: axes[0], width: axes[1], channels: axes[2], values };
        let mut activation = Activation::Linear;
        values = match &layer.spec {
            LayerSpec::Conv2d(conv) => {
                activation = conv.activation;
                conv2d(&image(values), conv, kernel).values
            }
            LayerSpec::Conv2dTranspose(conv) => {
                activation = conv.activation;
                conv2d_transpose(&image(values), conv, kernel).values
            }
            LayerSpec::MaxPool2d(pool) => pool2d(&image(values), pool, |window| largest(window, margin)).values,
            LayerSpec::AveragePool2d(pool) => {
                pool2d(&image(values), pool, |window| window.iter().sum::<f64>() / window.len() as f64).values
            }
            LayerSpec::UpSampling2d { size } => {
                let x = image(values);
                let mut y = Image::zeros(x.height * size.rows, x.width * size.columns, x.channels);
                for_each_element(&mut y, |row, column, c| x.at(row / size.rows, column / size.columns, c));
                y.values
            }
            LayerSpec::Dense { activation: own, .. } => {
                activation = *own;
                dense(&values, kernel, last)
            }
            LayerSpec::Activation { activation: own } => {
                activation = *own;
                values
            }
            LayerSpec::Flatten {} | LayerSpec::Reshape { .. } => values,
        };
        if let Some(bias) = tensor(layer, "bias") {
            values.iter_mut().enumerate().for_each(|(i, value)| *value += bias[i % last]);
        }
        for &kink in kinks(activation) {
            // A value exactly at a kink comes out of a flat piece of an earlier activation and does not move.
            let distances = values.iter().map(|value| (value - kink).abs()).filter(|&distance| distance > 0.0);
            *margin = distances.fold(*margin, f64::min);
        }
        values.iter_mut().for_each(|value| *value = activate(activation, *value));
    }
    values
}

/// The loss of one sample: the mean over its elements.
pub(super) fn loss(loss: Loss, output: &[f64], target: &[f64], margin: &mut f64) -> f64 {
    let mut sum = 0.0;
    for (&y, &t) in output.iter().zip(target) {
        sum += match loss {
            Loss::Mse => (y - t) * (y - t),
            Loss::BinaryCrossentropy => {
                // Keras clips to [1e-7, 1 - 1e-7], as `f32` rounds these.
                let (low, high) = (f64::from(1e-7f32), f64::from(1.0 - 1e-7f32));
                // Exactly 0 and 1 come out of flat pieces of activations and do not move.
                if y != 0.0 && y != 1.0 {
                    *margin = margin.min((y - low).abs()).min((y - high).abs());
                }
                let p = y.clamp(low, high);
                -(t * p.ln() + (1.0 - t) * (1.0 - p).ln())
            }
        };
    }
    sum / output.len() as f64
}

/// Length of a convolution's or a pooling's output along one axis, and padding before the first pixel.
fn window_axis(length: usize, size: usize, stride: usize, padding: Padding) -> (usize, usize) {
    match padding {
        Padding::Valid => ((length - size) / stride + 1, 0),
        Padding::Same => {
            let output = length.div_ceil(stride);
            let total = ((output - 1) * stride + size).saturating_sub(length);
            (output, total / 2)
        }
    }
}

/// y[i, j, f] = sum over u, v, c of x[i * stride + u - padding, j * stride + v - padding, c] * kernel[u, v, c, f]
fn conv2d(x: &Image, conv: &ConvSpec, kernel: &[f64]) -> Image {
    let (size, strides) = (conv.kernel_size, conv.strides);
    let (height, above) = window_axis(x.height, size.rows, strides.rows, conv.padding);
    let (width, left) = window_axis(x.width, size.columns, strides.columns, conv.padding);
    let mut y = Image::zeros(height, width, conv.filters);
    for i in 0..height {
        for j in 0..width {
            for u in 0..size.rows {
                for v in 0..size.columns {
                    let (row, column) = (i * strides.rows + u, j * strides.columns + v);
                    if row < above || column < left || row - above >= x.height || column - left >= x.width {
                        continue;
                    }
                    for c in 0..x.channels {
                        let value = x.at(row - above, column - left, c);
                        for f in 0..conv.filters {
                            let weight = kernel[((u * size.columns + v) * x.channels + c) * conv.filters + f];
                            *y.at_mut(i, j, f) += value * weight;
                        }
                    }
                }
            }
        }
    }
    y
}

/// The adjoint of the convolution that makes x of y: every x[i, j] adds its multiple of the kernel to y from
/// [i * stride - padding, j * stride - padding] on. Kernel: [u, v, f, c].
fn conv2d_transpose(x: &Image, conv: &ConvSpec, kernel: &[f64]) -> Image {
    let (size, strides) = (conv.kernel_size, conv.strides);
    let length = |length: usize, size: usize, stride: usize| match conv.padding {
        Padding::Same => length * stride,
        Padding::Valid => length * stride + size.saturating_sub(stride),
    };
    let (height, width) = (length(x.height, size.rows, strides.rows), length(x.width, size.columns, strides.columns));
    let (_, above) = window_axis(height, size.rows, strides.rows, conv.padding);
    let (_, left) = window_axis(width, size.columns, strides.columns, conv.padding);
    let mut y = Image::zeros(height, width, conv.filters);
    for i in 0..x.height {
        for j in 0..x.width {
            for u in 0..size.rows {
                for v in 0..size.columns {
                    let (row, column) = (i * strides.rows + u, j * strides.columns + v);
                    if row < above || column < left || row - above >= height || column - left >= width {
                        continue;
                    }
                    for f in 0..conv.filters {
                        for c in 0..x.channels {
                            let weight = kernel[((u * size.columns + v) * conv.filters + f) * x.channels + c];
                            *y.at_mut(row - above, column - left, f) += x.at(i, j, c) * weight;
                        }
                    }
                }
            }
        }
    }
    y
}

/// Every output is a function of the window's elements that lie inside the image.
fn pool2d(x: &Image, pool: &PoolSpec, mut of_window: impl FnMut(&[f64]) -> f64) -> Image {
    let (size, strides) = (pool.pool_size, pool.strides.unwrap_or(pool.pool_size));
    let (height, above) = window_axis(x.height, size.rows, strides.rows, pool.padding);
    let (width, left) = window_axis(x.width, size.columns, strides.columns, pool.padding);
    let mut y = Image::zeros(height, width, x.channels);
    let mut window = Vec::new();
    for_each_element(&mut y, |i, j, c| {
        window.clear();
        for row in i * strides.rows..i * strides.rows + size.rows {
            for column in j * strides.columns..j * strides.columns + size.columns {
                if row >= above && column >= left && row - above < x.height && column - left < x.width {
                    window.push(x.at(row - above, column - left, c));
                }
            }
        }
        of_window(&window)
    });
    y
}

fn largest(window: &[f64], margin: &mut f64) -> f64 {
    let largest = window.iter().copied().fold(f64::NEG_INFINITY, f64::max);
    // Equal elements are copies of one value, or flat: whichever wins, the parameters' gradients are the same.
    let gaps = window.iter().map(|value| largest - value).filter(|&gap| gap > EQUAL);
    *margin = gaps.fold(*margin, f64::min);
    largest
}

fn for_each_element(image: &mut Image, mut value: impl FnMut(usize, usize, usize) -> f64) {
    for i in 0..image.height {
        for j in 0..image.width {
            for c in 0..image.channels {
                *image.at_mut(i, j, c) = value(i, j, c);
            }
        }
    }
}

/// y[.., j] = sum over i of x[.., i] * kernel[i, j]
fn dense(x: &[f64], kernel: &[f64], units: usize) -> Vec<f64> {
    let features = kernel.len() / units;
    let product = |row: &[f64], j: usize| -> f64 { (0..features).map(|i| row[i] * kernel[i * units + j]).sum() };
    x.chunks_exact(features).flat_map(|row| (0..units).map(move |j| product(row, j))).collect()
}

/// Where an activation's derivative jumps.
fn kinks(activation: Activation) -> &'static [f64] {
    match activation {
        Activation::Relu | Activation::LeakyRelu | Activation::Selu => &[0.0],
        Activation::Relu6 => &[0.0, 6.0],
        Activation::HardSigmoid => &[-3.0, 3.0],
        _ => &[],
    }
}

fn activate(activation: Activation, x: f64) -> f64 {
    let sigmoid = |x: f64| 1.0 / (1.0 + (-x).exp());
    let softplus = |x: f64| x.max(0.0) + (-x.abs()).exp().ln_1p();
    let elu = |x: f64, alpha: f64| if x > 0.0 { x } else { alpha * x.exp_m1() };
    match activation {
        Activation::Linear => x,
        Activation::Relu => x.max(0.0),
        Activation::Relu6 => x.clamp(0.0, 6.0),
        Activation::LeakyRelu => x.max(0.2 * x),
        Activation::Elu => elu(x, 1.0),
        Activation::Selu => 1.0507009873554805 * elu(x, 1.6732632423543772),
        Activation::Softplus => softplus(x),
        Activation::Softsign => x / (1.0 + x.abs()),
        Activation::Sigmoid => sigmoid(x),
        Activation::HardSigmoid => (x + 3.0).clamp(0.0, 6.0) / 6.0,
        Activation::Tanh => x.tanh(),
        Activation::Silu => x * sigmoid(x),
        Activation::Gelu => x * (1.0 + erf(x / 2.0f64.sqrt())) / 2.0,
        Activation::Mish => x * softplus(x).tanh(),
        Activation::Exponential => x.exp(),
    }
}

/// 2 / sqrt(pi) * exp(-x^2) * sum over n of 2^n x^(2n + 1) / (1 * 3 * ... * (2n + 1)), whose terms have one sign.
/// Source: Abramowitz and Stegun, formula 7.1.6.
fn erf(x: f64) -> f64 {
    if x.abs() > 6.0 {
        return x.signum();
    }
    let (mut term, mut sum) = (x, x);
    for n in 1..200 {
        term *= 2.0 * x * x / f64::from(2 * n + 1);
        sum += term;
    }
    std::f64::consts::FRAC_2_SQRT_PI * (-x * x).exp() * sum
}
