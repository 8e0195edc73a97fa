//! Vectors of x86-64.

use std::arch::x86_64::*;

use super::Simd;

/// AVX2 and FMA: eight lanes.
#[derive(Clone, Copy)]
pub(in crate::kernel) struct Avx2;

// SAFETY (every block below): the caller guarantees AVX2 and FMA, and pointers valid for the lanes named.
impl Simd for Avx2 {
    const LANES: usize = 8;
    const UNROLLED: [usize; 4] = [4; 4];
    const SUMS: usize = 12;
    type Vector = __m256;

    #[inline(always)]
    unsafe fn load(from: *const f32) -> __m256 {
        // SAFETY: see above.
        unsafe { _mm256_loadu_ps(from) }
    }

    #[inline(always)]
    unsafe fn load_partial(from: *const f32, lanes: usize) -> __m256 {
        // SAFETY: see above; masked lanes are not accessed.
        unsafe { _mm256_maskload_ps(from, first_lanes(lanes)) }
    }

    #[inline(always)]
    unsafe fn store(to: *mut f32, vector: __m256) {
        // SAFETY: see above.
        unsafe { _mm256_storeu_ps(to, vector) }
    }

    #[inline(always)]
    unsafe fn store_past_caches(to: *mut f32, vector: __m256) {
        // SAFETY: see above.
        unsafe { _mm256_stream_ps(to, vector) }
    }

    #[inline(always)]
    unsafe fn store_partial(to: *mut f32, vector: __m256, lanes: usize) {
        // SAFETY: see above; masked lanes are not accessed.
        unsafe { _mm256_maskstore_ps(to, first_lanes(lanes), vector) }
    }

    #[inline(always)]
    unsafe fn splat(value: f32) -> __m256 {
        // SAFETY: see above.
        unsafe { _mm256_set1_ps(value) }
    }

    #[inline(always)]
    unsafe fn add(a: __m256, b: __m256) -> __m256 {
        // SAFETY: see above.
        unsafe { _mm256_add_ps(a, b) }
    }

    #[inline(always)]
    unsafe fn multiply_add(a: __m256, b: __m256, c: __m256) -> __m256 {
        // SAFETY: see above.
        unsafe { _mm256_fmadd_ps(a, b, c) }
    }

    #[inline(always)]
    unsafe fn gate(gate: __m256, value: __m256) -> __m256 {
        // SAFETY: see above.
        unsafe { _mm256_and_ps(_mm256_cmp_ps::<_CMP_NLE_UQ>(gate, _mm256_setzero_ps()), value) }
    }

    #[inline(always)]
    unsafe fn clear_below(limit: f32, value: __m256) -> __m256 {
        // SAFETY: see above.
        unsafe {
            let magnitude = _mm256_andnot_ps(_mm256_set1_ps(-0.0), value);
            _mm256_and_ps(_mm256_cmp_ps::<_CMP_NLT_UQ>(magnitude, _mm256_set1_ps(limit)), value)
        }
    }

    #[inline(always)]
    unsafe fn upper_half(bits: __m256) -> __m256 {
        // SAFETY: see above.
        unsafe {
            let upper = _mm256_set1_epi32(0xffff_0000u32 as i32);
            _mm256_castsi256_ps(_mm256_and_si256(_mm256_castps_si256(bits), upper))
        }
    }

    #[inline(always)]
    unsafe fn lower_half(bits: __m256) -> __m256 {
        // SAFETY: see above.
        unsafe { _mm256_castsi256_ps(_mm256_slli_epi32::<16>(_mm256_castps_si256(bits))) }
    }

    #[inline(always)]
    unsafe fn keep_nonzero(from: *const u32, bits: u32, with: *const u32, to: [*mut u32; 2]) -> usize {
        // SAFETY: see above; there is an order for each of 256 masks.
        unsafe {
            let (words, with) = (_mm256_loadu_si256(from.cast()), _mm256_loadu_si256(with.cast()));
            let zero =
                _mm256_cmpeq_epi32(_mm256_and_si256(words, _mm256_set1_epi32(bits as i32)), _mm256_setzero_si256());
            let kept = !_mm256_movemask_ps(_mm256_castsi256_ps(zero)) & 0xff;
            let order = _mm256_loadu_si256(KEPT_FIRST.get_unchecked(kept as usize).as_ptr().cast());
            _mm256_storeu_si256(to[0].cast(), _mm256_permutevar8x32_epi32(words, order));
            _mm256_storeu_si256(to[1].cast(), _mm256_permutevar8x32_epi32(with, order));
            kept.count_ones() as usize
        }
    }

    // Pairs of rows, then of pairs, then of halves: after each step twice as many rows lie side by side.
    #[inline(always)]
    unsafe fn transpose(from: *const f32, stride: usize, [height, width]: [usize; 2], to: *mut f32, to_stride: usize) {
        // SAFETY: see above; neither rows nor lanes beyond the matrix are accessed.
        unsafe {
            let mut rows = [_mm256_setzero_ps(); 8];
            for (i, row) in rows.iter_mut().enumerate() {
                if i < height {
                    *row = Self::load_partial(from.add(i * stride), width);
                }
            }
            let mut pairs = [_mm256_setzero_ps(); 8];
            for i in 0..4 {
                pairs[2 * i] = _mm256_unpacklo_ps(rows[2 * i], rows[2 * i + 1]);
                pairs[2 * i + 1] = _mm256_unpackhi_ps(rows[2 * i], rows[2 * i + 1]);
            }
            let mut fours = [_mm256_setzero_ps(); 8];
            for i in 0..2 {
                for half in 0..2 {
                    let (upper, lower) = (pairs[4 * i + half], pairs[4 * i + half + 2]);
                    fours[4 * i + 2 * half] = _mm256_shuffle_ps::<0x44>(upper, lower);
                    fours[4 * i + 2 * half + 1] = _mm256_shuffle_ps::<0xee>(upper, lower);
                }
            }
            let store = |column: usize, values| {
                if column < width {
                    Self::store_partial(to.add(column * to_stride), values, height);
                }
            };
            for i in 0..4 {
                store(i, _mm256_permute2f128_ps::<0x20>(fours[i], fours[i + 4]));
                store(i + 4, _mm256_permute2f128_ps::<0x31>(fours[i], fours[i + 4]));
            }
        }
    }
}

/// All bits set in the first `lanes` lanes.
#[inline(always)]
unsafe fn first_lanes(lanes: usize) -> __m256i {
    // SAFETY: the caller guarantees AVX2.
    unsafe { _mm256_cmpgt_epi32(_mm256_set1_epi32(lanes as i32), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7)) }
}

/// For each mask of eight lanes, those that are in it, ascending, and then anything.
static KEPT_FIRST: [[u32; 8]; 256] = {
    let mut orders = [[0; 8]; 256];
    let mut mask = 0;
    while mask < 256 {
        let (mut kept, mut lane) = (0, 0);
        while lane < 8 {
            if mask >> lane & 1 == 1 {
                orders[mask][kept] = lane;
                kept += 1;
            }
            lane += 1;
        }
        mask += 1;
    }
    orders
};

/// AVX-512: sixteen lanes.
#[derive(Clone, Copy)]
pub struct Avx512;

// SAFETY (every block below): the caller guarantees AVX-512 F, and pointers valid for the lanes named.
impl Simd for Avx512 {
    const LANES: usize = 16;
    const UNROLLED: [usize; 4] = [1, 1, 1, 4];
    const SUMS: usize = 24;
    type Vector = __m512;

    #[inline(always)]
    unsafe fn load(from: *const f32) -> __m512 {
        // SAFETY: see above.
        unsafe { _mm512_loadu_ps(from) }
    }

    #[inline(always)]
    unsafe fn load_partial(from: *const f32, lanes: usize) -> __m512 {
        // SAFETY: see above; masked lanes are not accessed.
        unsafe { _mm512_maskz_loadu_ps(((1u32 << lanes) - 1) as __mmask16, from) }
    }

    #[inline(always)]
    unsafe fn store(to: *mut f32, vector: __m512) {
        // SAFETY: see above.
        unsafe { _mm512_storeu_ps(to, vector) }
    }

    #[inline(always)]
    unsafe fn store_past_caches(to: *mut f32, vector: __m512) {
        // SAFETY: see above.
        unsafe { _mm512_stream_ps(to, vector) }
    }

    #[inline(always)]
    unsafe fn store_partial(to: *mut f32, vector: __m512, lanes: usize) {
        // SAFETY: see above; masked lanes are not accessed.
        unsafe { _mm512_mask_storeu_ps(to, ((1u32 << lanes) - 1) as __mmask16, vector) }
    }

    #[inline(always)]
    unsafe fn splat(value: f32) -> __m512 {
        // SAFETY: see above.
        unsafe { _mm512_set1_ps(value) }
    }

    #[inline(always)]
    unsafe fn add(a: __m512, b: __m512) -> __m512 {
        // SAFETY: see above.
        unsafe { _mm512_add_ps(a, b) }
    }

    #[inline(always)]
    unsafe fn multiply_add(a: __m512, b: __m512, c: __m512) -> __m512 {
        // SAFETY: see above.
        unsafe { _mm512_fmadd_ps(a, b, c) }
    }

    #[inline(always)]
    unsafe fn gate(gate: __m512, value: __m512) -> __m512 {
        // SAFETY: see above.
        unsafe { _mm512_maskz_mov_ps(_mm512_cmp_ps_mask::<_CMP_NLE_UQ>(gate, _mm512_setzero_ps()), value) }
    }

    #[inline(always)]
    unsafe fn clear_below(limit: f32, value: __m512) -> __m512 {
        // SAFETY: see above.
        unsafe {
            let large = _mm512_cmp_ps_mask::<_CMP_NLT_UQ>(_mm512_abs_ps(value), _mm512_set1_ps(limit));
            _mm512_maskz_mov_ps(large, value)
        }
    }

    #[inline(always)]
    unsafe fn upper_half(bits: __m512) -> __m512 {
        // SAFETY: see above.
        unsafe {
            let upper = _mm512_set1_epi32(0xffff_0000u32 as i32);
            _mm512_castsi512_ps(_mm512_and_si512(_mm512_castps_si512(bits), upper))
        }
    }

    #[inline(always)]
    unsafe fn lower_half(bits: __m512) -> __m512 {
        // SAFETY: see above.
        unsafe { _mm512_castsi512_ps(_mm512_slli_epi32::<16>(_mm512_castps_si512(bits))) }
    }

    #[inline(always)]
    unsafe fn keep_nonzero(from: *const u32, bits: u32, with: *const u32, to: [*mut u32; 2]) -> usize {
        // SAFETY: see above. (To compress in a register and to store all of it is faster than to store what is kept.)
        unsafe {
            let (words, with) = (_mm512_loadu_epi32(from.cast()), _mm512_loadu_epi32(with.cast()));
            let kept = _mm512_test_epi32_mask(words, _mm512_set1_epi32(bits as i32));
            _mm512_storeu_epi32(to[0].cast(), _mm512_maskz_compress_epi32(kept, words));
            _mm512_storeu_epi32(to[1].cast(), _mm512_maskz_compress_epi32(kept, with));
            kept.count_ones() as usize
        }
    }

    // As for AVX2; quarter `q` of `fours[4 * i + c]` is column `4 * q + c` of rows `4 * i` to `4 * i + 3`.
    #[inline(always)]
    unsafe fn transpose(from: *const f32, stride: usize, [height, width]: [usize; 2], to: *mut f32, to_stride: usize) {
        // SAFETY: see above; neither rows nor lanes beyond the matrix are accessed.
        unsafe {
            let mut rows = [_mm512_setzero_ps(); 16];
            for (i, row) in rows.iter_mut().enumerate() {
                if i < height {
                    *row = Self::load_partial(from.add(i * stride), width);
                }
            }
            let mut pairs = [_mm512_setzero_ps(); 16];
            for i in 0..8 {
                pairs[2 * i] = _mm512_unpacklo_ps(rows[2 * i], rows[2 * i + 1]);
                pairs[2 * i + 1] = _mm512_unpackhi_ps(rows[2 * i], rows[2 * i + 1]);
            }
            let mut fours = [_mm512_setzero_ps(); 16];
            for i in 0..4 {
                for half in 0..2 {
                    let (upper, lower) = (pairs[4 * i + half], pairs[4 * i + half + 2]);
                    fours[4 * i + 2 * half] = _mm512_shuffle_ps::<0x44>(upper, lower);
                    fours[4 * i + 2 * half + 1] = _mm512_shuffle_ps::<0xee>(upper, lower);
                }
            }
            for c in 0..4 {
                let even_upper = _mm512_shuffle_f32x4::<0x88>(fours[c], fours[4 + c]);
                let odd_upper = _mm512_shuffle_f32x4::<0xdd>(fours[c], fours[4 + c]);
                let even_lower = _mm512_shuffle_f32x4::<0x88>(fours[8 + c], fours[12 + c]);
                let odd_lower = _mm512_shuffle_f32x4::<0xdd>(fours[8 + c], fours[12 + c]);
                let store = |column: usize, values| {
                    if column < width {
                        Self::store_partial(to.add(column * to_stride), values, height);
                    }
                };
                store(c, _mm512_shuffle_f32x4::<0x88>(even_upper, even_lower));
                store(4 + c, _mm512_shuffle_f32x4::<0x88>(odd_upper, odd_lower));
                store(8 + c, _mm512_shuffle_f32x4::<0xdd>(even_upper, even_lower));
                store(12 + c, _mm512_shuffle_f32x4::<0xdd>(odd_upper, odd_lower));
            }
        }
    }
}
