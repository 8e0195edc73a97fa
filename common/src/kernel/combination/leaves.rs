//! Combinations of a tree of leaves: each leaf's is a sum of its own, and they are added by position, as a perfect binary tree.

use super::super::isa::{Isa, Kind};
use super::super::simd::{MAX_LANES, Scalar, Simd};
use super::{Lists, with_vectors};

/// For every output row `i` and `j < width`: the sum over leaves, added as a perfect binary tree, of the sums from 0 of
/// `factor * matrix[row * width + j]` over list `i * leaves + leaf`, in its order. No sum is -0 in the end.
pub(in crate::kernel) struct LeafCombinations<'a> {
    /// Row by row of the output, leaf by leaf.
    pub(in crate::kernel) lists: Lists<'a>,
    /// Their number, a power of two.
    pub(in crate::kernel) leaves: usize,
    pub(in crate::kernel) matrix: &'a [f32],
    /// Floats of a row of `matrix` and of an output row: whole vectors of any instruction set.
    pub(in crate::kernel) width: usize,
    /// The output, row by row.
    pub(in crate::kernel) sums: &'a mut [f32],
    /// Whether there is something in `sums` that is added to, in front of all products. Then there is one leaf.
    pub(in crate::kernel) accumulate: bool,
    /// [`stack_len`] floats for sums that wait for their siblings.
    pub(in crate::kernel) stack: &'a mut [f32],
}

/// Floats for the sums that wait, for outputs of so many floats.
pub(in crate::kernel) fn stack_len(leaves: usize, outputs: usize) -> usize {
    leaves.ilog2().saturating_sub(1) as usize * outputs
}

/// Computes all sums. Returns whether all of them are known to be finite.
///
/// # Safety
/// Every row that a list names is inside `matrix`.
pub(in crate::kernel) unsafe fn run(isa: Isa, all: &mut LeafCombinations<'_>) -> bool {
    let Lists { ends, rows, factors } = all.lists;
    assert!(all.leaves.is_power_of_two() && (all.leaves == 1 || !all.accumulate), "a tree of leaves starts from 0");
    assert!(all.width > 0 && all.width.is_multiple_of(MAX_LANES), "rows of whole vectors");
    assert!(all.sums.len() == ends.len() / all.leaves * all.width, "a list for each row and leaf");
    assert!(all.stack.len() >= stack_len(all.leaves, all.sums.len()), "room for the sums that wait");
    assert!(ends.is_sorted() && ends.last().is_none_or(|&end| end as usize <= rows.len().min(factors.len())), "lists");
    match isa.kind() {
        // SAFETY: lengths were checked, the rest is the caller's promise.
        Kind::Scalar => unsafe { columns::<Scalar>(all) },
        // SAFETY: as above, and a value of `Isa` exists only for instruction sets that were detected.
        #[cfg(target_arch = "x86_64")]
        Kind::Avx2 => unsafe { avx2(all) },
        // SAFETY: as above.
        #[cfg(target_arch = "x86_64")]
        Kind::Avx512 => unsafe { avx512(all) },
        // SAFETY: as above.
        #[cfg(target_arch = "aarch64")]
        Kind::Neon => unsafe { columns::<super::super::simd::arm::Neon>(all) },
    }
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2,fma")]
unsafe fn avx2(all: &mut LeafCombinations<'_>) -> bool {
    // SAFETY: the caller's promises are the callee's.
    unsafe { columns::<super::super::simd::x86::Avx2>(all) }
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq")]
unsafe fn avx512(all: &mut LeafCombinations<'_>) -> bool {
    // SAFETY: the caller's promises are the callee's.
    unsafe { columns::<super::super::simd::x86::Avx512>(all) }
}

/// As many vectors of columns at a time as registers hold of two leaves, evenly.
///
/// # Safety
/// As for [`run`], and lengths are as it checks.
#[inline(always)]
unsafe fn columns<S: Simd>(all: &mut LeafCombinations<'_>) -> bool {
    let vectors = all.width / S::LANES;
    let tiles = vectors.div_ceil(S::SUMS / 2);
    let mut finite = true;
    for tile in 0..tiles {
        let (first, end) = (vectors * tile / tiles, vectors * (tile + 1) / tiles);
        // SAFETY: these vectors are inside the rows.
        finite &= unsafe { with_vectors!(end - first, 2, S::SUMS, V => tree::<S, V>(all, first * S::LANES)) };
    }
    finite
}

/// `V` vectors of columns, from one on, of all rows. Pairs of leaves are taken through all rows one after the other: so what
/// they read of the matrix stays in the L1 cache.
///
/// Pair `k` completes as many larger subtrees as `k` has ones at its end in binary: then their left halves wait on the stack.
///
/// # Safety
/// As for [`run`], for these columns, and lengths are as it checks.
#[inline(always)]
unsafe fn tree<S: Simd, const V: usize>(all: &mut LeafCombinations<'_>, column: usize) -> bool {
    let (leaves, width) = (all.leaves, all.width);
    let rows = all.sums.len() / width;
    let steps = leaves.div_ceil(2);
    let ends = all.lists.ends;
    let mut waiting = 0;
    // SAFETY: lists, rows and columns are the combinations'.
    unsafe {
        let mut zeros = S::splat(0.0);
        for k in 0..steps {
            let below = waiting - k.trailing_ones() as usize;
            for row in 0..rows {
                let list = row * leaves + 2 * k;
                let begin = if list == 0 { 0 } else { *ends.get_unchecked(list - 1) as usize };
                let between = *ends.get_unchecked(list) as usize;
                let output = all.sums.as_mut_ptr().add(row * width + column);
                let mut sum = [S::splat(0.0); V];
                if all.accumulate {
                    for (v, sum) in sum.iter_mut().enumerate() {
                        *sum = S::load(output.add(v * S::LANES));
                    }
                }
                chain::<S, V>(all, column, begin..between, &mut sum);
                if leaves > 1 {
                    let end = *ends.get_unchecked(list + 1) as usize;
                    let mut right = [S::splat(0.0); V];
                    chain::<S, V>(all, column, between..end, &mut right);
                    for (sum, right) in sum.iter_mut().zip(right) {
                        *sum = S::add(*sum, right);
                    }
                }
                let on_stack = |level: usize| (level * rows + row) * width + column;
                for level in (below..waiting).rev() {
                    let left = all.stack.as_ptr().add(on_stack(level));
                    for (v, sum) in sum.iter_mut().enumerate() {
                        *sum = S::add(S::load(left.add(v * S::LANES)), *sum);
                    }
                }
                let is_last = k + 1 == steps;
                if is_last {
                    // -0 becomes +0.
                    for sum in &mut sum {
                        *sum = S::add(*sum, S::splat(0.0));
                    }
                }
                let to = if is_last { output } else { all.stack.as_mut_ptr().add(on_stack(below)) };
                for (v, sum) in sum.iter().enumerate() {
                    S::store(to.add(v * S::LANES), *sum);
                }
                if is_last {
                    // Stays 0 as long as finite sums are multiplied by 0 and added.
                    for sum in sum {
                        zeros = S::multiply_add(sum, S::splat(0.0), zeros);
                    }
                }
            }
            waiting = below + 1;
        }
        let mut lanes = [0.0; MAX_LANES];
        S::store(lanes.as_mut_ptr(), zeros);
        lanes.iter().all(|&lane| lane == 0.0)
    }
}

/// Adds the products of some elements of the lists.
///
/// # Safety
/// As for [`tree`].
#[inline(always)]
unsafe fn chain<S: Simd, const V: usize>(
    all: &LeafCombinations<'_>,
    column: usize,
    elements: std::ops::Range<usize>,
    sums: &mut [S::Vector; V],
) {
    let mut i = elements.start;
    while i < elements.end {
        // SAFETY: the elements are in the lists, and their rows in the matrix.
        unsafe {
            let factor = S::splat(f32::from_bits(*all.lists.factors.get_unchecked(i)));
            let row = *all.lists.rows.get_unchecked(i) as usize;
            let from = all.matrix.as_ptr().add(row * all.width + column);
            for (v, sum) in sums.iter_mut().enumerate() {
                *sum = S::multiply_add(factor, S::load(from.add(v * S::LANES)), *sum);
            }
        }
        i += 1;
    }
}
