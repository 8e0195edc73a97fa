//! bfloat16: the upper half of a 32-bit float. Operands of product-sums in reduced precision are rounded to it.
//!
//! Products of two such numbers are exact in 32-bit floats (8 + 8 bits of significand), and are added up in those. So a
//! product-sum of bfloat16 numbers is the chain of fused multiply-adds that it is everywhere, over operands that were
//! rounded before. Two operands that follow each other in the order of the sum lie in one word, a [`Bf16Pair`], the
//! first one in its upper half: one instruction of AVX-512 BF16, `vdpbf16ps`, multiplies and adds both, in that order,
//! and rounds after each.
//!
//! # Why every instruction set gives the same bits
//!
//! That instruction takes denormal numbers for 0, and makes none; fused multiply-adds keep them. So none may ever occur:
//!
//! - Operands below 2^-50 are rounded to +0 ([`round`]). All others are multiples of 2^-57, and products of 2^-114.
//! - Sums start from +0, from a bias, or from such a sum. A bias below 2^-50 starts as +0; a larger one is a multiple of
//!   2^-73 (24 bits of significand).
//! - The sum of two multiples of 2^-114, rounded to 24 bits, is a multiple of 2^-114 again. Other than 0 it is at least
//!   that, and a denormal number is below 2^-126.
//!
//! No sum is ever -0 either: it does not start as that, and x - x is +0. Infinities and NaN are the same everywhere (but
//! for the payload of NaN, which is left open). Whether an instruction does what is said here, a check shows before it
//! is used (`products`).

mod pairing;

use bytemuck::{Pod, Zeroable};
pub use pairing::{RowPairs, pair_columns, pair_rows};

use super::per_isa::per_isa;

/// Numbers of smaller magnitude count as 0.
pub const SMALLEST: f32 = f32::from_bits((127 - 50) << 23);

/// Two bfloat16 numbers in one word. The one that comes first in the order of a sum is its upper half.
#[repr(transparent)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Bf16Pair(pub(super) u32);

// SAFETY: the only field is a `u32`, for which all bits at 0 are a value.
unsafe impl Zeroable for Bf16Pair {}
// SAFETY: `repr(transparent)` over a `u32`: no padding, no invalid values, no interior mutability.
unsafe impl Pod for Bf16Pair {}

impl Bf16Pair {
    /// Two floats, rounded.
    #[inline(always)]
    pub fn new(first: f32, second: f32) -> Self {
        Self(bits(first) | bits(second) >> 16)
    }

    /// The two numbers.
    pub fn numbers(self) -> [f32; 2] {
        [f32::from_bits(self.0 & UPPER), f32::from_bits(self.0 << 16)]
    }
}

/// The same, of a product-sum whose products are added in blocks, as AMX adds them: see `microkernel/blocks.rs`.
#[repr(transparent)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct BlockedPair(Bf16Pair);

// SAFETY: the only field is a pair, for which all bits at 0 are a value.
unsafe impl Zeroable for BlockedPair {}
// SAFETY: `repr(transparent)` over a pair, which is plain old data.
unsafe impl Pod for BlockedPair {}

impl BlockedPair {
    /// Two floats, rounded.
    pub fn new(first: f32, second: f32) -> Self {
        Self(Bf16Pair::new(first, second))
    }

    /// The pair.
    #[inline(always)]
    pub(super) fn pair(self) -> Bf16Pair {
        self.0
    }
}

const UPPER: u32 = 0xffff_0000;
const MAGNITUDE: u32 = 0x7fff_ffff;
const INFINITY: u32 = f32::INFINITY.to_bits();
const QUIET: u32 = 0x0040_0000;

/// The nearest bfloat16 number, the even one of two; +0 below [`SMALLEST`]. NaN stays NaN, and turns quiet.
#[inline(always)]
pub fn round(value: f32) -> f32 {
    f32::from_bits(bits(value))
}

#[inline(always)]
fn bits(value: f32) -> u32 {
    let bits = value.to_bits();
    let magnitude = bits & MAGNITUDE;
    // What is carried out of the significand raises the exponent, up to infinity.
    let nearest = bits.wrapping_add(0x7fff + (bits >> 16 & 1));
    let number = if magnitude < SMALLEST.to_bits() { 0 } else { nearest };
    (if magnitude > INFINITY { bits | QUIET } else { number }) & UPPER
}

per_isa! {
    /// Rounds every float.
    pub fn round_all(values: &mut [f32]) {
        for value in values {
            *value = round(*value);
        }
    }

    /// Rounds every float, and writes its upper half: all there is.
    pub fn round_to_halves(values: &[f32], halves: &mut [u16]) {
        for (half, value) in halves.iter_mut().zip(values) {
            *half = (bits(*value) >> 16) as u16;
        }
    }

    /// `to[i] = round(values[i])`
    pub fn round_into(values: &[f32], to: &mut [f32]) {
        for (to, value) in to.iter_mut().zip(values) {
            *to = round(*value);
        }
    }

    /// `left[i] = round(left[i] + right[i])`
    pub fn add_rounded(left: &mut [f32], right: &[f32]) {
        for (left, right) in left.iter_mut().zip(right) {
            *left = round(*left + right);
        }
    }
}
