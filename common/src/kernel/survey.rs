//! What kind of numbers an operand is made of: whether all are finite, whether many are 0.

use super::isa::Isa;
use super::per_isa::per_isa;
use super::products::Element;

/// Elements that are looked at to guess how many of an operand are 0.
const SURVEYED: usize = 4096;

/// Whether no element is infinite or NaN.
pub fn are_finite<E: Element>(isa: Isa, elements: &[E]) -> bool {
    E::are_finite(isa, elements)
}

/// The share of elements that are not 0, by the first few thousand: 0 to 1, and 0 of none.
pub fn nonzero_share<E: Element>(isa: Isa, elements: &[E]) -> f32 {
    let some = &elements[..elements.len().min(SURVEYED)];
    count_with_any_of(isa, bytemuck::cast_slice(some), E::MAGNITUDE) as f32 / some.len().max(1) as f32
}

per_isa! {
    /// What [`are_finite`] does for floats: the exponent of what is not finite is the greatest one.
    pub(super) fn floats_are_finite(floats: &[f32]) -> bool {
        floats.iter().fold(0, |largest, float| largest.max(float.to_bits() & 0x7fff_ffff)) < f32::INFINITY.to_bits()
    }

    /// The same for the upper halves of floats.
    pub(super) fn halves_are_finite(halves: &[u16]) -> bool {
        halves.iter().fold(0, |largest, half| largest.max(half & 0x7fff)) < 0x7f80
    }

    /// Words in which some bits of the mask are set.
    fn count_with_any_of(words: &[u32], mask: u32) -> usize {
        words.iter().map(|word| u32::from(word & mask != 0)).sum::<u32>() as usize
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::kernel::bf16::Bf16Pair;

    /// Scenario: finite numbers, the largest and the smallest among them, and one that is not finite, at every place.
    /// Property: it is found, in floats and in either half of a pair.
    #[test]
    fn one_that_is_not_finite_is_found_anywhere() {
        let finite = [0.0, -0.0, 1.0, f32::MAX, f32::MIN, f32::MIN_POSITIVE, 1e-45];
        for isa in Isa::available() {
            let mut floats: Vec<f32> = finite.iter().copied().cycle().take(530).collect();
            let rounded = |value: f32| value.clamp(-1e30, 1e30);
            let mut pairs: Vec<Bf16Pair> = floats.iter().map(|&x| Bf16Pair::new(rounded(x), rounded(-x))).collect();
            assert!(are_finite(isa, &floats) && are_finite(isa, &pairs) && are_finite::<f32>(isa, &[]), "{isa}");
            for at in 0..floats.len() {
                for wrong in [f32::INFINITY, f32::NEG_INFINITY, f32::NAN, -f32::NAN] {
                    let right = std::mem::replace(&mut floats[at], wrong);
                    assert!(!are_finite(isa, &floats), "{isa}: {wrong} at {at}");
                    floats[at] = right;
                    for pair in [Bf16Pair::new(wrong, 1.0), Bf16Pair::new(1.0, wrong)] {
                        let right = std::mem::replace(&mut pairs[at], pair);
                        assert!(!are_finite(isa, &pairs), "{isa}: {wrong} in a pair at {at}");
                        pairs[at] = right;
                    }
                }
            }
        }
    }

    #[test]
    fn shares_are_of_what_is_not_zero() {
        for isa in Isa::available() {
            assert_eq!(nonzero_share::<f32>(isa, &[]), 0.0);
            assert_eq!(nonzero_share(isa, &[0.0, -0.0, 1e-45, f32::NAN]), 0.5);
            let pairs = [(0.0, 0.0), (0.0, 1.0), (-1.0, 0.0), (1.0, 1.0)].map(|(a, b)| Bf16Pair::new(a, b));
            assert_eq!(nonzero_share(isa, &pairs), 0.75);
        }
    }
}
