//! The kinds of operands that product-sums have: floats, or pairs of bfloat16 numbers.
//!
//! What is summed is the same for both: vectors of 32-bit floats. A kind says how operands lie in memory, and how their
//! products are added.

use std::marker::PhantomData;

use super::bf16::{self, Bf16Pair, BlockedPair};
use super::combination::{self, Combinations};
use super::isa::Isa;
use super::microkernel::{self, Block};
use super::simd::Simd;
use super::survey;

/// A kind of operands on an instruction set. (Public, as what the sealed [`Element`] names must be.)
///
/// # Safety
/// As for [`Simd`].
pub trait Products {
    /// What is summed.
    type Sums: Simd;
    /// An operand in memory.
    type Element: Copy;
    /// A vector of operands, or of parts of them.
    type Operands: Copy;
    /// Steps that a product takes: each multiplies one part of the operands. The parts are added in order.
    const PARTS: usize;

    /// Part `PART` of as many elements as the sums have lanes.
    unsafe fn load<const PART: usize>(from: *const Self::Element) -> Self::Operands;
    /// Part `PART` of the same element in every lane.
    unsafe fn splat<const PART: usize>(element: Self::Element) -> Self::Operands;
    /// `a * b + sums`
    unsafe fn multiply_add(a: Self::Operands, b: Self::Operands, sums: Vector<Self>) -> Vector<Self>;
    /// What sums start from where there is a bias.
    unsafe fn start(bias: Vector<Self>) -> Vector<Self>;
}

/// A vector of sums.
pub(super) type Vector<P> = <<P as Products>::Sums as Simd>::Vector;

/// Floats: one fused multiply-add.
pub struct Floats<S>(PhantomData<S>);

// SAFETY (every block below): the caller's promises are the callee's.
impl<S: Simd> Products for Floats<S> {
    type Sums = S;
    type Element = f32;
    type Operands = S::Vector;
    const PARTS: usize = 1;

    #[inline(always)]
    unsafe fn load<const PART: usize>(from: *const f32) -> S::Vector {
        // SAFETY: see above.
        unsafe { S::load(from) }
    }

    #[inline(always)]
    unsafe fn splat<const PART: usize>(element: f32) -> S::Vector {
        // SAFETY: see above.
        unsafe { S::splat(element) }
    }

    #[inline(always)]
    unsafe fn multiply_add(a: S::Vector, b: S::Vector, sums: S::Vector) -> S::Vector {
        // SAFETY: see above.
        unsafe { S::multiply_add(a, b, sums) }
    }

    #[inline(always)]
    unsafe fn start(bias: S::Vector) -> S::Vector {
        bias
    }
}

/// Pairs by two fused multiply-adds, the upper halves' first: the specification of [`PairInstruction`]. All products of
/// one part come before those of the other, so that a tile needs no more registers than one of floats.
pub struct Pairs<S>(PhantomData<S>);

impl<S: Simd> Pairs<S> {
    #[inline(always)]
    unsafe fn part<const PART: usize>(pairs: S::Vector) -> S::Vector {
        // SAFETY: the caller has the instruction set.
        unsafe { if PART == 0 { S::upper_half(pairs) } else { S::lower_half(pairs) } }
    }
}

// SAFETY (every block below): the caller's promises are the callee's. Until it is taken apart, a pair is a float that is
// moved and never computed with, so that its bits stay as they are.
impl<S: Simd> Products for Pairs<S> {
    type Sums = S;
    type Element = Bf16Pair;
    type Operands = S::Vector;
    const PARTS: usize = 2;

    #[inline(always)]
    unsafe fn load<const PART: usize>(from: *const Bf16Pair) -> S::Vector {
        // SAFETY: see above.
        unsafe { Self::part::<PART>(S::load(from.cast())) }
    }

    #[inline(always)]
    unsafe fn splat<const PART: usize>(element: Bf16Pair) -> S::Vector {
        // SAFETY: see above.
        unsafe { Self::part::<PART>(S::splat(f32::from_bits(element.0))) }
    }

    #[inline(always)]
    unsafe fn multiply_add(a: S::Vector, b: S::Vector, sums: S::Vector) -> S::Vector {
        // SAFETY: see above.
        unsafe { S::multiply_add(a, b, sums) }
    }

    #[inline(always)]
    unsafe fn start(bias: S::Vector) -> S::Vector {
        // SAFETY: see above.
        unsafe { S::clear_below(bf16::SMALLEST, bias) }
    }
}

#[cfg(target_arch = "x86_64")]
use instruction::PairInstruction;

#[cfg(target_arch = "x86_64")]
mod instruction {
    use std::arch::x86_64::*;
    use std::mem::transmute;

    use super::{Bf16Pair, Pairs, Products};
    use crate::kernel::simd::x86::Avx512;

    /// Pairs by `vdpbf16ps`, which does what the module `bf16` says where it [`is_exact`](super::is_exact).
    pub struct PairInstruction;

    // SAFETY (every block below): the caller has AVX-512 BF16; the two vector types have the same size and no invalid
    // values; pointers are valid for 16 pairs.
    impl Products for PairInstruction {
        type Sums = Avx512;
        type Element = Bf16Pair;
        type Operands = __m512bh;
        const PARTS: usize = 1;

        #[inline(always)]
        unsafe fn load<const PART: usize>(from: *const Bf16Pair) -> __m512bh {
            // SAFETY: see above.
            unsafe { transmute::<__m512i, __m512bh>(_mm512_loadu_si512(from.cast())) }
        }

        #[inline(always)]
        unsafe fn splat<const PART: usize>(element: Bf16Pair) -> __m512bh {
            // SAFETY: see above.
            unsafe { transmute::<__m512i, __m512bh>(_mm512_set1_epi32(element.0 as i32)) }
        }

        #[inline(always)]
        unsafe fn multiply_add(a: __m512bh, b: __m512bh, sums: __m512) -> __m512 {
            // SAFETY: see above.
            unsafe { _mm512_dpbf16_ps(sums, a, b) }
        }

        #[inline(always)]
        unsafe fn start(bias: __m512) -> __m512 {
            // SAFETY: see above.
            unsafe { Pairs::<Avx512>::start(bias) }
        }
    }

    /// What the instruction makes of 16 sums and products.
    ///
    /// # Safety
    /// The machine has AVX-512 F and BF16.
    #[target_feature(enable = "avx512f,avx512bf16")]
    pub(super) unsafe fn add_products(a: &[Bf16Pair; 16], b: &[Bf16Pair; 16], mut sums: [f32; 16]) -> [f32; 16] {
        // SAFETY: arrays of 16.
        unsafe {
            let (a, b) = (PairInstruction::load::<0>(a.as_ptr()), PairInstruction::load::<0>(b.as_ptr()));
            let result = PairInstruction::multiply_add(a, b, _mm512_loadu_ps(sums.as_ptr()));
            _mm512_storeu_ps(sums.as_mut_ptr(), result);
        }
        sums
    }
}

/// Whether the instruction set has an instruction for pairs that can be used.
pub(super) fn has_instruction(isa: Isa) -> bool {
    match isa.kind() {
        #[cfg(target_arch = "x86_64")]
        super::isa::Kind::Avx512 => is_exact(),
        _ => false,
    }
}

/// Whether this machine's `vdpbf16ps` gives the bits that the module `bf16` says. It is looked at once: other makers'
/// processors might round otherwise.
#[cfg(target_arch = "x86_64")]
fn is_exact() -> bool {
    use std::sync::OnceLock;
    static IS_EXACT: OnceLock<bool> = OnceLock::new();
    *IS_EXACT.get_or_init(|| {
        let has_instruction = is_x86_feature_detected!("avx512f") && is_x86_feature_detected!("avx512bf16");
        // SAFETY: it was detected.
        has_instruction && check::agrees(|a, b, sums| unsafe { instruction::add_products(a, b, sums) })
    })
}

#[cfg(target_arch = "x86_64")]
mod check {
    use super::{Bf16Pair, bf16};
    use crate::rng::{Purpose, Stream};

    /// Sums of so many products are compared, in each of 16 lanes.
    const STEPS: usize = 256;
    /// Sums begin anew after so many.
    const STEPS_OF_A_SUM: usize = 8;

    /// Whether `add_products(a, b, sums)` gives the bits of plain code, for pseudo-random pairs.
    pub(super) fn agrees(add_products: impl Fn(&[Bf16Pair; 16], &[Bf16Pair; 16], [f32; 16]) -> [f32; 16]) -> bool {
        let mut stream = Stream::new(1, Purpose::SelfTest, 0, 0);
        let mut sums = [0.0; 16];
        (0..STEPS).all(|step| {
            if step % STEPS_OF_A_SUM == 0 {
                sums = std::array::from_fn(|_| number(&mut stream));
                sums.iter_mut().filter(|sum| sum.abs() < bf16::SMALLEST).for_each(|sum| *sum = 0.0);
            }
            let mut pairs = || -> [Bf16Pair; 16] {
                std::array::from_fn(|_| Bf16Pair::new(number(&mut stream), number(&mut stream)))
            };
            let (a, b) = (pairs(), pairs());
            let got = add_products(&a, &b, sums);
            for ((sum, a), b) in sums.iter_mut().zip(a).zip(b) {
                let ([a_first, a_second], [b_first, b_second]) = (a.numbers(), b.numbers());
                *sum = a_second.mul_add(b_second, a_first.mul_add(b_first, *sum));
            }
            got.iter().zip(&sums).all(|(got, sum)| got.to_bits() == sum.to_bits() || got.is_nan() && sum.is_nan())
        })
    }

    /// Of any size, most often near 1, where sums round most.
    fn number(stream: &mut Stream) -> f32 {
        match stream.below(16) {
            0 => f32::from_bits(stream.below(u32::MAX)),
            1 => 0.0,
            2 => stream.uniform() * f32::MIN_POSITIVE,
            3..6 => (stream.uniform() - 0.5) * 2.0f32.powi(stream.below(100) as i32 - 50),
            _ => stream.uniform() * 4.0 - 2.0,
        }
    }

    #[cfg(test)]
    mod tests {
        use super::*;

        fn with(add: fn([f64; 2], [f64; 2], f32) -> f32) -> bool {
            let numbers = |pair: Bf16Pair| pair.numbers().map(f64::from);
            agrees(|a, b, sums| std::array::from_fn(|i| add(numbers(a[i]), numbers(b[i]), sums[i])))
        }

        #[test]
        fn an_instruction_that_rounds_otherwise_is_found_out() {
            assert!(agrees(|a, b, sums| {
                std::array::from_fn(|i| {
                    let ([a_first, a_second], [b_first, b_second]) = (a[i].numbers(), b[i].numbers());
                    a_second.mul_add(b_second, a_first.mul_add(b_first, sums[i]))
                })
            }));
            assert!(!with(|a, b, sum| (f64::from(sum) + a[0] * b[0] + a[1] * b[1]) as f32), "both at once");
            assert!(
                !with(|a, b, sum| ((f64::from(sum) + a[1] * b[1]) as f32 as f64 + a[0] * b[0]) as f32),
                "in another order"
            );
            assert!(!with(|a, b, sum| sum + (a[0] * b[0] + a[1] * b[1]) as f32), "products first");
        }
    }
}

/// What the operands of product-sums are made of: `f32`, [`Bf16Pair`] or [`BlockedPair`]. Nobody else can implement it, because
/// what it names is private.
pub trait Element: bytemuck::Pod + Send + Sync {
    /// The bits of an element's word that are all 0 if, and only if, it is 0.
    #[doc(hidden)]
    const MAGNITUDE: u32;
    /// Whether nothing is infinite or NaN.
    #[doc(hidden)]
    fn are_finite(isa: Isa, elements: &[Self]) -> bool;

    /// What a sum starts from where there is a bias: see [`Products::start`].
    #[doc(hidden)]
    fn start(bias: f32) -> f32;

    /// Computes a block. An implementation is no generic function, so that all its tiles are compiled with this crate, and not
    /// again with each that uses a plan.
    ///
    /// # Safety
    /// As for the microkernel's `run`.
    #[doc(hidden)]
    unsafe fn compute(isa: Isa, block: &Block<'_, Self>) -> bool;
}

/// Elements whose products are added one by one, so that those with 0 can be left out.
pub trait ChainElement: Element {
    /// How they are multiplied on any instruction set.
    #[doc(hidden)]
    type On<S: Simd>: Products<Sums = S, Element = Self>;
    /// How they are multiplied by AVX-512 with instructions for them, if they have some.
    #[doc(hidden)]
    #[cfg(target_arch = "x86_64")]
    type ByInstruction: Products<Sums = super::simd::x86::Avx512, Element = Self>;

    /// Whether there are such instructions, and they give the right bits.
    #[doc(hidden)]
    #[cfg(target_arch = "x86_64")]
    fn has_instruction() -> bool;

    /// Adds up combinations; as [`Element::compute`].
    ///
    /// # Safety
    /// As for the combinations' `run`.
    #[doc(hidden)]
    unsafe fn combine(isa: Isa, combinations: &Combinations<'_, Self>);
}

impl Element for f32 {
    // All but the sign.
    const MAGNITUDE: u32 = 0x7fff_ffff;

    fn are_finite(isa: Isa, elements: &[f32]) -> bool {
        survey::floats_are_finite(isa, elements)
    }

    #[inline(always)]
    fn start(bias: f32) -> f32 {
        bias
    }

    unsafe fn compute(isa: Isa, block: &Block<'_, Self>) -> bool {
        // SAFETY: the caller's promises are the callee's.
        unsafe { microkernel::compute(isa, block) }
    }
}

impl ChainElement for f32 {
    type On<S: Simd> = Floats<S>;
    #[cfg(target_arch = "x86_64")]
    type ByInstruction = Floats<super::simd::x86::Avx512>;

    #[cfg(target_arch = "x86_64")]
    #[inline(always)]
    fn has_instruction() -> bool {
        false
    }

    unsafe fn combine(isa: Isa, combinations: &Combinations<'_, Self>) {
        // SAFETY: the caller's promises are the callee's.
        unsafe { combination::combine(isa, combinations) }
    }
}

impl Element for Bf16Pair {
    // No rounded number is -0.
    const MAGNITUDE: u32 = u32::MAX;

    fn are_finite(isa: Isa, elements: &[Bf16Pair]) -> bool {
        survey::halves_are_finite(isa, bytemuck::cast_slice(elements))
    }

    #[inline(always)]
    fn start(bias: f32) -> f32 {
        if bias.abs() < bf16::SMALLEST { 0.0 } else { bias }
    }

    unsafe fn compute(isa: Isa, block: &Block<'_, Self>) -> bool {
        // SAFETY: the caller's promises are the callee's.
        unsafe { microkernel::compute(isa, block) }
    }
}

impl ChainElement for Bf16Pair {
    type On<S: Simd> = Pairs<S>;
    #[cfg(target_arch = "x86_64")]
    type ByInstruction = PairInstruction;

    #[cfg(target_arch = "x86_64")]
    fn has_instruction() -> bool {
        is_exact()
    }

    unsafe fn combine(isa: Isa, combinations: &Combinations<'_, Self>) {
        // SAFETY: the caller's promises are the callee's.
        unsafe { combination::combine(isa, combinations) }
    }
}

impl Element for BlockedPair {
    const MAGNITUDE: u32 = Bf16Pair::MAGNITUDE;

    fn are_finite(isa: Isa, elements: &[BlockedPair]) -> bool {
        Bf16Pair::are_finite(isa, bytemuck::cast_slice(elements))
    }

    #[inline(always)]
    fn start(bias: f32) -> f32 {
        Bf16Pair::start(bias)
    }

    unsafe fn compute(isa: Isa, block: &Block<'_, Self>) -> bool {
        // SAFETY: the caller's promises are the callee's.
        unsafe { microkernel::compute_in_blocks(isa, block) }
    }
}
