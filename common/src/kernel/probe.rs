//! Loops that do what a core can do at best: the yardsticks of `lockstep bench`. Nothing that trains uses them.

use std::hint::black_box;

use super::isa::{Isa, Kind};
use super::per_isa::per_isa;
use super::simd::{Scalar, Simd};

/// Independent chains of fused multiply-adds. A core needs latency times units of them to be busy: 8 on today's cores
/// (4 cycles, 2 units), 10 on older ones. Twelve accumulators and two operands fit the 16 registers of AVX2.
const CHAINS: usize = 12;

/// Floats of the widest vector.
const MAX_LANES: usize = 16;

/// Runs `steps` steps of `CHAINS` vector multiply-adds that touch no memory, and returns how many floating-point
/// operations that were (a fused multiply-add counts as two).
pub fn multiply_adds(isa: Isa, steps: usize) -> usize {
    let lanes = match isa.kind() {
        // SAFETY: plain Rust.
        Kind::Scalar => unsafe { chains::<Scalar>(steps) },
        // SAFETY: a value of `Isa` exists only for instruction sets that were detected on this machine.
        #[cfg(target_arch = "x86_64")]
        Kind::Avx2 => unsafe { avx2(steps) },
        // SAFETY: as above.
        #[cfg(target_arch = "x86_64")]
        Kind::Avx512 => unsafe { avx512(steps) },
        // SAFETY: as above.
        #[cfg(target_arch = "aarch64")]
        Kind::Neon => unsafe { chains::<super::simd::arm::Neon>(steps) },
    };
    2 * steps * CHAINS * lanes
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2,fma")]
unsafe fn avx2(steps: usize) -> usize {
    // SAFETY: the caller has AVX2 and FMA.
    unsafe { chains::<super::simd::x86::Avx2>(steps) }
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq")]
unsafe fn avx512(steps: usize) -> usize {
    // SAFETY: the caller has AVX-512.
    unsafe { chains::<super::simd::x86::Avx512>(steps) }
}

/// The chains on one kind of vector; returns its lanes.
// Counted loops over the const sizes are what the compiler unrolls; iterators over the same arrays it does not always.
#[expect(clippy::needless_range_loop)]
#[inline(always)]
unsafe fn chains<S: Simd>(steps: usize) -> usize {
    // What the compiler cannot know, so that it can neither compute the result nor merge chains. The chains tend to 1:
    // no value becomes denormal, infinite or NaN.
    let start: [f32; CHAINS] = black_box(std::array::from_fn(|i| i as f32));
    let (factor, term) = black_box((0.999f32, 1e-3f32));
    let mut end = [[0.0f32; MAX_LANES]; CHAINS];
    // SAFETY: the caller has the instruction set; a vector has at most `MAX_LANES` lanes.
    unsafe {
        let (factor, term) = (S::splat(factor), S::splat(term));
        let mut sums = [S::splat(0.0); CHAINS];
        for i in 0..CHAINS {
            sums[i] = S::splat(start[i]);
        }
        for _ in 0..steps {
            for i in 0..CHAINS {
                sums[i] = S::multiply_add(factor, sums[i], term);
            }
        }
        for i in 0..CHAINS {
            S::store(end[i].as_mut_ptr(), sums[i]);
        }
    }
    black_box(&end);
    S::LANES
}

per_isa! {
    /// `a[i] = b[i] + factor * c[i]`: two streams read, one written. All slices are equally long.
    pub fn triad(a: &mut [f32], b: &[f32], c: &[f32], factor: f32) {
        for ((a, &b), &c) in a.iter_mut().zip(b).zip(c) {
            *a = b + factor * c;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn operations_are_counted_by_the_vector() {
        for isa in Isa::available() {
            let lanes = multiply_adds(isa, 1) / (2 * CHAINS);
            assert!([4, 8, 16].contains(&lanes), "{isa}: {lanes}");
            assert_eq!(multiply_adds(isa, 10), 10 * 2 * CHAINS * lanes, "{isa}");
            assert_eq!(multiply_adds(isa, 0), 0);
        }
    }

    #[test]
    fn a_triad_adds_a_multiple() {
        for isa in Isa::available() {
            let (b, c) = (vec![1.0; 37], (0..37).map(|i| i as f32).collect::<Vec<_>>());
            let mut a = vec![0.0; 37];
            triad(isa, &mut a, &b, &c, 2.0);
            assert!(a.iter().enumerate().all(|(i, &a)| a == 1.0 + 2.0 * i as f32), "{isa}: {a:?}");
        }
    }
}
