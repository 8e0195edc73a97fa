//! The parameters that a run starts from.

use crate::model::Layout;
use crate::rng::{Purpose, Stream};

/// Kernels from the Glorot uniform distribution, biases 0: uniform in `[-limit, limit)` with
/// `limit = sqrt(6 / (fan_in + fan_out))`, where the fans are the two innermost axes times the size of the window.
/// Source: Glorot and Bengio 2010, as in Keras' `GlorotUniform`.
pub fn initial_parameters(layout: &Layout, seed: u64) -> Vec<f32> {
    let mut parameters = vec![0.0; layout.parameters()];
    for (tensor, entry) in layout.entries().iter().enumerate() {
        let [ref window @ .., fan_a, fan_b] = entry.shape[..] else {
            continue;
        };
        let window: usize = window.iter().product();
        let limit = (6.0 / (window * (fan_a + fan_b)) as f64).sqrt() as f32;
        let mut stream = Stream::new(seed, Purpose::Initialisation, tensor as u32, 0);
        // Drawn row by row, however the tensor is stored.
        let tensor: Vec<f32> = entry.range.clone().map(|_| stream.uniform().mul_add(2.0, -1.0) * limit).collect();
        entry.write(&tensor, &mut parameters);
    }
    parameters
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
