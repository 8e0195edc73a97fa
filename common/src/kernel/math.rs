//! Elementary functions made of IEEE basic operations and fused multiply-adds only, so that every machine computes the
//! same bits. Accuracy is a few units in the last place, which the tests measure against `f64`.

// Coefficients are written as their sources give them.
#![expect(clippy::excessive_precision)]

use std::f32::consts::{FRAC_1_SQRT_2, LOG2_E};

/// ln 2 in two parts, of which the first has few bits, so that its product with a small integer is exact.
const LN2_HIGH: f32 = 0.693_359_375;
const LN2_LOW: f32 = -2.121_944_4e-4;

/// Largest argument of [`exp`] whose scale factor 2^n is a finite float.
const EXP_MAX: f32 = 88.376_26;
/// Smallest argument of [`exp`] with a normal result.
const EXP_MIN: f32 = -87.336_54;

/// 1.5 * 2^23: adding it rounds a small float to an integer, which then stands in the low bits of the sum.
const ROUND_TO_INTEGER: f32 = 12_582_912.0;

/// `e^x`; 0 below -87.3 and infinite above 88.4. Source of the polynomial: Moshier, Cephes, `expf`.
#[inline(always)]
pub fn exp(x: f32) -> f32 {
    let clamped = x.clamp(EXP_MIN, EXP_MAX);
    let shifted = clamped.mul_add(LOG2_E, ROUND_TO_INTEGER);
    let n = shifted - ROUND_TO_INTEGER;
    let r = n.mul_add(-LN2_LOW, n.mul_add(-LN2_HIGH, clamped));
    let mut p = 1.987_569_2e-4f32;
    p = p.mul_add(r, 1.398_199_9e-3);
    p = p.mul_add(r, 8.333_452e-3);
    p = p.mul_add(r, 4.166_579_6e-2);
    p = p.mul_add(r, 1.666_666_5e-1);
    p = p.mul_add(r, 5.000_000_1e-1);
    let mantissa = (p * r).mul_add(r, r) + 1.0;
    // The low bits of `shifted` are n; the others leave at the top.
    let scale = f32::from_bits(shifted.to_bits().wrapping_add(127) << 23);
    let result = mantissa * scale;
    let result = if x < EXP_MIN { 0.0 } else { result };
    if x > EXP_MAX { f32::INFINITY } else { result }
}

/// Natural logarithm of a positive, normal number. Source of the polynomial: Moshier, Cephes, `logf`.
#[inline(always)]
pub fn ln(x: f32) -> f32 {
    /// The bits of sqrt(1/2), so that the mantissa lies around 1.
    const SQRT_HALF: u32 = 0x3f35_04f3;
    let bits = x.to_bits().wrapping_sub(SQRT_HALF);
    let exponent = ((bits as i32) >> 23) as f32;
    let f = f32::from_bits((bits & 0x007f_ffff).wrapping_add(SQRT_HALF)) - 1.0;
    let mut p = 7.037_683_6e-2f32;
    p = p.mul_add(f, -1.151_461e-1);
    p = p.mul_add(f, 1.167_699_9e-1);
    p = p.mul_add(f, -1.242_014_1e-1);
    p = p.mul_add(f, 1.424_932_3e-1);
    p = p.mul_add(f, -1.666_805_8e-1);
    p = p.mul_add(f, 2.000_071_5e-1);
    p = p.mul_add(f, -2.499_999_4e-1);
    p = p.mul_add(f, 3.333_333_1e-1);
    let square = f * f;
    let tail = exponent.mul_add(LN2_LOW, p * f * square);
    let tail = square.mul_add(-0.5, tail);
    exponent.mul_add(LN2_HIGH, f + tail)
}

/// `ln(1 + x)` for x >= 0. Source: Kahan's correction of the rounding of `1 + x`.
#[inline(always)]
pub fn ln_1p(x: f32) -> f32 {
    let sum = 1.0 + x;
    ln(sum) + (x - (sum - 1.0)) / sum
}

/// `1 / (1 + e^-x)`
#[inline(always)]
pub fn sigmoid(x: f32) -> f32 {
    1.0 / (1.0 + exp(-x))
}

/// Hyperbolic tangent. Source of the polynomial near 0: Moshier, Cephes, `tanhf`.
#[inline(always)]
pub fn tanh(x: f32) -> f32 {
    let size = x.abs();
    let square = x * x;
    let mut p = -5.704_988_7e-3f32;
    p = p.mul_add(square, 2.063_908_9e-2);
    p = p.mul_add(square, -5.373_971_6e-2);
    p = p.mul_add(square, 1.333_144_2e-1);
    p = p.mul_add(square, -3.333_328_2e-1);
    let near = (p * square).mul_add(x, x);
    let far = (1.0 - 2.0 / (exp(size + size) + 1.0)).copysign(x);
    if size < 0.625 { near } else { far }
}

/// `ln(1 + e^x)`
#[inline(always)]
pub fn softplus(x: f32) -> f32 {
    // Written so that NaN stays NaN.
    let positive = if x <= 0.0 { 0.0 } else { x };
    positive + ln_1p(exp(-x.abs()))
}

/// The distribution function of the standard normal distribution.
/// Source: Abramowitz and Stegun, formula 7.1.26 for erf, absolute error below 1.5e-7.
#[inline(always)]
pub fn normal_cdf(x: f32) -> f32 {
    let z = x.abs() * FRAC_1_SQRT_2;
    let t = 1.0 / z.mul_add(0.327_591_1, 1.0);
    let mut p = 1.061_405_4f32;
    p = p.mul_add(t, -1.453_152);
    p = p.mul_add(t, 1.421_413_7);
    p = p.mul_add(t, -0.284_496_74);
    p = p.mul_add(t, 0.254_829_6);
    let tail = 0.5 * p * t * exp(-z * z);
    if x < 0.0 { tail } else { 1.0 - tail }
}

/// The density of the standard normal distribution.
#[inline(always)]
pub fn normal_density(x: f32) -> f32 {
    const INV_SQRT_TAU: f32 = 0.398_942_3;
    INV_SQRT_TAU * exp(-0.5 * x * x)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The largest error of `ours` against `exact` over a fine grid, relative to the larger of |exact| and `floor`.
    fn worst(range: std::ops::Range<f64>, floor: f64, ours: fn(f32) -> f32, exact: fn(f64) -> f64) -> f64 {
        let steps = 400_000;
        (0..=steps)
            .map(|i| (range.start + (range.end - range.start) * f64::from(i) / f64::from(steps)) as f32)
            .map(|x| {
                let expected = exact(f64::from(x));
                (f64::from(ours(x)) - expected).abs() / expected.abs().max(floor)
            })
            .fold(0.0, f64::max)
    }

    #[test]
    fn functions_are_accurate_to_a_few_units_in_the_last_place() {
        let tiny = f64::from(f32::MIN_POSITIVE);
        assert!(worst(-87.0..88.3, tiny, exp, f64::exp) < 2.0e-7);
        assert!(worst(1e-7..4.0, 1e-2, ln, f64::ln) < 2.0e-7);
        assert!(worst(0.0..2.0, tiny, ln_1p, f64::ln_1p) < 2.5e-7);
        assert!(worst(-30.0..30.0, tiny, sigmoid, |x| 1.0 / (1.0 + (-x).exp())) < 4.0e-7);
        assert!(worst(-12.0..12.0, tiny, tanh, f64::tanh) < 3.0e-7);
        assert!(worst(-30.0..30.0, tiny, softplus, |x| x.max(0.0) + (-x.abs()).exp().ln_1p()) < 4.0e-7);
        assert!(
            worst(-30.0..30.0, 1.0, normal_density, |x| (-0.5 * x * x).exp() / (2.0 * std::f64::consts::PI).sqrt())
                < 1e-7
        );
    }

    #[test]
    fn the_normal_distribution_function_matches_known_values() {
        // Values of Phi(x) to ten digits, from Abramowitz and Stegun, table 26.1.
        for (x, expected) in [
            (0.0, 0.5),
            (0.5, 0.691_462_461_3),
            (1.0, 0.841_344_746_1),
            (2.0, 0.977_249_868_1),
            (-1.5, 0.066_807_201_3),
        ] {
            assert!((f64::from(normal_cdf(x)) - expected).abs() < 2e-7, "{x}");
        }
    }

    #[test]
    fn extremes_and_nan_behave() {
        assert_eq!(exp(-1000.0), 0.0);
        assert_eq!(exp(1000.0), f32::INFINITY);
        assert_eq!(sigmoid(-1000.0), 0.0);
        assert_eq!(sigmoid(1000.0), 1.0);
        assert_eq!((tanh(-50.0), tanh(50.0)), (-1.0, 1.0));
        assert_eq!((softplus(f32::NEG_INFINITY), softplus(f32::INFINITY)), (0.0, f32::INFINITY));
        for f in [exp, sigmoid, tanh, softplus] {
            assert!(f(f32::NAN).is_nan(), "a diverged value must stay visible");
        }
    }
}
