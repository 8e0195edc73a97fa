//! The parameters that a run starts from.

use rayon::prelude::*;

use crate::kernel::AlignedFloats;
use crate::model::{Layout, ParameterEntry};
use crate::rng::{Purpose, Stream};

/// Kernels from the Glorot uniform distribution, biases 0: uniform in `[-limit, limit)` with
/// `limit = sqrt(6 / (fan_in + fan_out))`, where the fans are the two innermost axes times the size of the window.
/// Source: Glorot and Bengio 2010, as in Keras' `GlorotUniform`.
pub fn initial_parameters(layout: &Layout, seed: u64) -> AlignedFloats {
    let mut parameters = AlignedFloats::zeros(layout.parameters());
    let mut rest = &mut parameters[..];
    let tensors = layout.entries().iter().map(|entry| {
        let (stored, others) = std::mem::take(&mut rest).split_at_mut(entry.range.len());
        rest = others;
        (entry, stored)
    });
    let tensors: Vec<_> = tensors.enumerate().collect();
    tensors.into_par_iter().for_each(|(tensor, (entry, stored))| {
        draw(entry, Stream::new(seed, Purpose::Initialisation, tensor as u32, 0), stored);
    });
    parameters
}

/// Draws a kernel row by row, however it is stored. A bias stays 0.
fn draw(entry: &ParameterEntry, mut stream: Stream, stored: &mut [f32]) {
    let [ref window @ .., fan_a, fan_b] = entry.shape[..] else { return };
    let window: usize = window.iter().product();
    let limit = (6.0 / (window * (fan_a + fan_b)) as f64).sqrt() as f32;
    let mut fill = |values: &mut [f32]| {
        values.iter_mut().for_each(|value| *value = (stream.uniform() * 2.0 - 1.0) * limit);
    };
    let Some(matrix) = entry.panels() else { return fill(stored) };
    let mut values = vec![0.0; matrix.columns];
    for row in 0..matrix.rows {
        fill(&mut values);
        matrix.store_row(row, &values, stored);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::preset;

    #[test]
    fn kernels_fill_their_range_and_biases_are_zero() {
        let layout = preset("article").unwrap().resolve().unwrap().layout;
        let parameters = initial_parameters(&layout, 1);
        let kernel = &parameters[layout.find("encoder.2.conv2d.kernel").unwrap().range.clone()];
        let limit = (6.0f32 / (9.0 * 96.0)).sqrt();
        let largest = kernel.iter().fold(0.0f32, |a, b| a.max(b.abs()));
        let mean = kernel.iter().sum::<f32>() / kernel.len() as f32;
        assert!(largest <= limit && largest > 0.999 * limit && mean.abs() < 0.01 * limit);
        assert!(parameters[layout.find("encoder.2.conv2d.bias").unwrap().range.clone()].iter().all(|&b| b == 0.0));
        assert_ne!(parameters, initial_parameters(&layout, 2));
    }
}
