//! Pairs of rounded numbers from rows of floats.

use super::Bf16Pair;
use crate::kernel::isa::Isa;
use crate::kernel::per_isa::per_isa;
use crate::kernel::transpose::MatrixShape;

/// How [`pair_rows`] finds the two rows of a pair, and which of their columns it takes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RowPairs {
    /// Floats of a row.
    pub columns: usize,
    /// The first column that is taken.
    pub start: usize,
    /// How many are taken.
    pub count: usize,
    /// Rows from the first one of a pair to the second: the rows of a sample. Blocks of so many rows come in twos.
    pub distance: usize,
}

impl RowPairs {
    /// Whole rows, each with the next one.
    pub fn neighbours(columns: usize) -> Self {
        Self { columns, start: 0, count: columns, distance: 1 }
    }

    /// Rows of pairs that `rows` rows give.
    pub fn rows(&self, rows: usize) -> usize {
        rows.div_ceil(2 * self.distance) * self.distance
    }
}

/// Pairs neighbouring columns of a matrix, into rows without gaps. The last column of an odd number is paired with 0.
pub fn pair_columns(isa: Isa, from: &[f32], shape: MatrixShape, to: &mut [Bf16Pair]) {
    #[cfg(target_arch = "x86_64")]
    if instruction::is_available(isa) {
        // SAFETY: it was looked at.
        return unsafe { instruction::pair_columns(from, shape, to) };
    }
    plain_columns(isa, from, shape, to);
}

/// Pairs columns of rows with those of later rows, into rows of `width` pairs. Rows without a partner are paired with
/// 0; columns from `count` to `width` are left as they are.
pub fn pair_rows(isa: Isa, from: &[f32], shape: RowPairs, to: &mut [Bf16Pair], width: usize) {
    #[cfg(target_arch = "x86_64")]
    if instruction::is_available(isa) {
        // SAFETY: it was looked at.
        return unsafe { instruction::pair_rows(from, shape, to, width) };
    }
    plain_rows(isa, from, shape, to, width);
}

/// How floats become pairs.
trait Pairing {
    /// Two floats that are neighbours make a pair.
    fn neighbours(from: &[[f32; 2]], to: &mut [Bf16Pair]);
    /// One float of each row makes a pair.
    fn of_two(first: &[f32], second: &[f32], to: &mut [Bf16Pair]);
}

/// By the definition.
struct Plain;

impl Pairing for Plain {
    #[inline(always)]
    fn neighbours(from: &[[f32; 2]], to: &mut [Bf16Pair]) {
        for (to, from) in to.iter_mut().zip(from) {
            *to = Bf16Pair::new(from[0], from[1]);
        }
    }

    #[inline(always)]
    fn of_two(first: &[f32], second: &[f32], to: &mut [Bf16Pair]) {
        for ((to, first), second) in to.iter_mut().zip(first).zip(second) {
            *to = Bf16Pair::new(*first, *second);
        }
    }
}

per_isa! {
    fn plain_columns(from: &[f32], shape: MatrixShape, to: &mut [Bf16Pair]) {
        columns::<Plain>(from, shape, to);
    }

    fn plain_rows(from: &[f32], shape: RowPairs, to: &mut [Bf16Pair], width: usize) {
        rows::<Plain>(from, shape, to, width);
    }
}

#[inline(always)]
fn columns<P: Pairing>(from: &[f32], shape: MatrixShape, to: &mut [Bf16Pair]) {
    let MatrixShape { rows, columns, stride } = shape;
    if columns == stride && columns.is_multiple_of(2) {
        // One long row.
        return P::neighbours(from[..rows * columns].as_chunks::<2>().0, &mut to[..rows * columns / 2]);
    }
    if columns == stride && columns == 1 {
        for (to, from) in to.iter_mut().zip(&from[..rows]) {
            *to = Bf16Pair::new(*from, 0.0);
        }
        return;
    }
    for (to, from) in to.chunks_exact_mut(columns.div_ceil(2)).zip(from.chunks(stride)).take(rows) {
        let (pairs, last) = from[..columns].as_chunks::<2>();
        P::neighbours(pairs, &mut to[..pairs.len()]);
        if let ([last], Some(to)) = (last, to.last_mut()) {
            *to = Bf16Pair::new(*last, 0.0);
        }
    }
}

#[inline(always)]
fn rows<P: Pairing>(from: &[f32], shape: RowPairs, to: &mut [Bf16Pair], width: usize) {
    let RowPairs { columns, start, count, distance } = shape;
    let block = columns * distance;
    for (to, from) in to.chunks_mut(width * distance).zip(from.chunks(2 * block)) {
        let (first, second) = from.split_at(block.min(from.len()));
        let (mut second, mut to) = (second.chunks_exact(columns), to.chunks_exact_mut(width));
        for first in first.chunks_exact(columns) {
            let Some(to) = to.next() else { break };
            let (first, to) = (&first[start..start + count], &mut to[..count]);
            if let Some(second) = second.next() {
                P::of_two(first, &second[start..start + count], to);
            } else {
                for (to, first) in to.iter_mut().zip(first) {
                    *to = Bf16Pair::new(*first, 0.0);
                }
            }
        }
    }
}

#[cfg(target_arch = "x86_64")]
mod instruction {
    //! By `vcvtne2ps2bf16` of AVX-512 BF16, which rounds 32 floats as [`round`](super::super::round) does, but for small ones: they
    //! are set to 0 before.

    use std::arch::x86_64::*;
    use std::sync::OnceLock;

    use super::{Bf16Pair, MatrixShape, Pairing, Plain, RowPairs, columns, rows};
    use crate::kernel::bf16::SMALLEST;
    use crate::kernel::isa::{Isa, Kind};
    use crate::rng::{Purpose, Stream};

    /// Floats of a vector.
    const LANES: usize = 16;

    /// Whether the instruction set has the instruction, the machine, too, and it rounds as it should. That is looked at once.
    pub(super) fn is_available(isa: Isa) -> bool {
        static IS_EXACT: OnceLock<bool> = OnceLock::new();
        let is_exact = || is_x86_feature_detected!("avx512bf16") && is_exact();
        isa.kind() == Kind::Avx512 && *IS_EXACT.get_or_init(is_exact)
    }

    /// Whether the instruction gives the bits of plain code, for pseudo-random floats, and for some that lie halfway.
    fn is_exact() -> bool {
        let mut stream = Stream::new(1, Purpose::SelfTest, 2, 0);
        let mut words = || (0..1024).map(|_| stream.below(u32::MAX)).collect::<Vec<_>>();
        let halfway = words().into_iter().map(|word| word & 0xffff_0000 | 0x8000);
        let floats: Vec<f32> = words().into_iter().chain(halfway).map(f32::from_bits).collect();
        let mut pairs = [vec![Bf16Pair::default(); floats.len() / 2], vec![Bf16Pair::default(); floats.len() / 2]];
        let [by_instruction, plain] = &mut pairs;
        // SAFETY: the machine has the instruction, or nobody would ask.
        unsafe { pair_columns(&floats, MatrixShape::dense(1, floats.len()), by_instruction) }
        Plain::neighbours(floats.as_chunks().0, plain);
        // Which NaN there is does not matter.
        let known = |number: f32| if number.is_nan() { None } else { Some(number.to_bits()) };
        let [by_instruction, plain] = pairs.map(|pairs| pairs.into_iter().map(move |pair| pair.numbers().map(known)));
        by_instruction.eq(plain)
    }

    /// # Safety
    /// The machine has AVX-512 F, BW and BF16.
    #[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx512bf16")]
    pub(super) unsafe fn pair_columns(from: &[f32], shape: MatrixShape, to: &mut [Bf16Pair]) {
        columns::<Instruction>(from, shape, to);
    }

    /// # Safety
    /// As for [`pair_columns`].
    #[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx512bf16")]
    pub(super) unsafe fn pair_rows(from: &[f32], shape: RowPairs, to: &mut [Bf16Pair], width: usize) {
        rows::<Instruction>(from, shape, to, width);
    }

    /// Used by the two functions above alone.
    struct Instruction;

    impl Pairing for Instruction {
        #[inline(always)]
        fn neighbours(from: &[[f32; 2]], to: &mut [Bf16Pair]) {
            let (from, rest) = from.as_chunks::<LANES>();
            let (to, to_rest) = to.as_chunks_mut::<LANES>();
            for (to, from) in to.iter_mut().zip(from) {
                let from = from.as_ptr().cast::<f32>();
                // SAFETY: the caller's caller has the instructions; 32 floats and 16 pairs are there.
                unsafe {
                    let halves = halves_of(load(from), load(from.add(LANES)));
                    // The first one of two neighbours becomes the upper half.
                    _mm512_storeu_si512(to.as_mut_ptr().cast(), _mm512_rol_epi32::<16>(halves));
                }
            }
            Plain::neighbours(rest, to_rest);
        }

        #[inline(always)]
        fn of_two(first: &[f32], second: &[f32], to: &mut [Bf16Pair]) {
            let (firsts, first_rest) = first.as_chunks::<LANES>();
            let (seconds, second_rest) = second.as_chunks::<LANES>();
            let (to, to_rest) = to.as_chunks_mut::<LANES>();
            for ((to, first), second) in to.iter_mut().zip(firsts).zip(seconds) {
                // SAFETY: the caller's caller has the instructions; 16 floats of each and 16 pairs are there.
                unsafe {
                    let halves = halves_of(load(second.as_ptr()), load(first.as_ptr()));
                    let interleaved = _mm512_permutexvar_epi16(interleaving(), halves);
                    _mm512_storeu_si512(to.as_mut_ptr().cast(), interleaved);
                }
            }
            Plain::of_two(first_rest, second_rest, to_rest);
        }
    }

    /// 16 floats, with 0 for those that are too small.
    #[inline(always)]
    unsafe fn load(from: *const f32) -> __m512 {
        // SAFETY: the caller's promise.
        unsafe {
            let bits = _mm512_loadu_si512(from.cast());
            // Without the sign.
            let doubled = _mm512_add_epi32(bits, bits);
            let large = _mm512_cmpge_epu32_mask(doubled, _mm512_set1_epi32((SMALLEST.to_bits() << 1) as i32));
            _mm512_castsi512_ps(_mm512_maskz_mov_epi32(large, bits))
        }
    }

    /// The rounded upper halves of 16 floats, and behind them those of 16 others.
    #[inline(always)]
    unsafe fn halves_of(floats: __m512, others: __m512) -> __m512i {
        // SAFETY: the caller has the instruction; the two vector types have the same size and no invalid values.
        unsafe { std::mem::transmute::<__m512bh, __m512i>(_mm512_cvtne2ps_pbh(others, floats)) }
    }

    /// Where halves come from so that number `i` of the upper 16 is above number `i` of the lower 16.
    #[inline(always)]
    unsafe fn interleaving() -> __m512i {
        const ORDER: [u16; 32] = {
            let mut order = [0; 32];
            let mut i = 0;
            while i < LANES {
                order[2 * i] = i as u16;
                order[2 * i + 1] = (i + LANES) as u16;
                i += 1;
            }
            order
        };
        // SAFETY: 64 bytes are there.
        unsafe { _mm512_loadu_si512(ORDER.as_ptr().cast()) }
    }
}

#[cfg(test)]
#[cfg(target_arch = "x86_64")]
mod tests {
    use super::*;

    #[test]
    fn the_instruction_is_used_where_there_is_one() {
        let avx512 = Isa::available().into_iter().find(|isa| isa.name() == "avx512");
        match avx512.filter(|_| is_x86_feature_detected!("avx512bf16")) {
            Some(isa) => assert!(instruction::is_available(isa), "it rounds otherwise"),
            None => eprintln!("no instruction here"),
        }
    }
}
