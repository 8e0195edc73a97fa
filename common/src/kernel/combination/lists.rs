//! Lists of elements that are not 0.

use crate::kernel::isa::{Isa, Kind};
use crate::kernel::products::Element;
use crate::kernel::simd::{MAX_LANES, Scalar, Simd};

/// Elements that are not 0, list by list.
#[derive(Clone, Copy)]
pub(in crate::kernel) struct Lists<'a> {
    /// Where each list ends; it starts where the one before ends.
    pub(in crate::kernel) ends: &'a [u32],
    /// The row of each element, or where it begins, in elements.
    pub(in crate::kernel) rows: &'a [u32],
    /// The elements, as words.
    pub(in crate::kernel) factors: &'a [u32],
}

impl<'a> Lists<'a> {
    /// Lists that were made in that memory: see [`ListsMut`].
    pub(in crate::kernel) fn in_memory(memory: &'a [f32], ends: &'a [u32]) -> Self {
        let (rows, factors) = memory.split_at(memory.len() / 2);
        Self { ends, rows: bytemuck::cast_slice(rows), factors: bytemuck::cast_slice(factors) }
    }
}

/// Lists in the making.
pub(in crate::kernel) struct ListsMut<'a> {
    rows: &'a mut [u32],
    factors: &'a mut [u32],
    len: usize,
}

impl<'a> ListsMut<'a> {
    /// Elements that are written behind the last one at most: a vector.
    const SLACK: usize = MAX_LANES;

    /// Words of memory for lists of so many elements together.
    pub(in crate::kernel) fn memory(elements: usize) -> usize {
        2 * (elements + Self::SLACK)
    }

    /// No elements yet.
    pub(in crate::kernel) fn new(memory: &'a mut [f32]) -> Self {
        let (rows, factors) = memory.split_at_mut(memory.len() / 2);
        Self { rows: bytemuck::cast_slice_mut(rows), factors: bytemuck::cast_slice_mut(factors), len: 0 }
    }

    /// Appends those of `values` that are not 0, with their rows. Returns where the list ends.
    ///
    /// # Panics
    /// When there is no room, or there are fewer rows than values.
    pub(in crate::kernel) fn append<E: Element>(&mut self, isa: Isa, values: &[E], rows: &[u32]) -> u32 {
        let values: &[u32] = bytemuck::cast_slice(values);
        assert!(rows.len() >= values.len(), "a row for each value");
        let room = self.rows.len().min(self.factors.len());
        assert!(self.len + values.len() + Self::SLACK <= room, "room for all, and slack");
        let (rows, to) = (rows.as_ptr(), [self.factors[self.len..].as_mut_ptr(), self.rows[self.len..].as_mut_ptr()]);
        // SAFETY: lengths were checked; a value of `Isa` exists only for instruction sets that were detected.
        self.len += unsafe {
            match isa.kind() {
                Kind::Scalar => keep::<Scalar>(values, E::MAGNITUDE, rows, to),
                #[cfg(target_arch = "x86_64")]
                Kind::Avx2 => keep_avx2(values, E::MAGNITUDE, rows, to),
                #[cfg(target_arch = "x86_64")]
                Kind::Avx512 => keep_avx512(values, E::MAGNITUDE, rows, to),
                #[cfg(target_arch = "aarch64")]
                Kind::Neon => keep::<crate::kernel::simd::arm::Neon>(values, E::MAGNITUDE, rows, to),
            }
        };
        self.len as u32
    }

    /// Appends a list for each part of `values`, of `step` times so many. Writes where they end.
    ///
    /// # Panics
    /// As for [`ListsMut::append`], and when the parts are not all values.
    pub(in crate::kernel) fn append_parts(
        &mut self,
        isa: Isa,
        values: &[f32],
        rows: &[u32],
        (parts, step): (&[usize], usize),
        ends: &mut [u32],
    ) {
        assert_eq!(parts.iter().sum::<usize>() * step, values.len(), "parts make up the values");
        let mut at = 0;
        for (part, end) in parts.iter().zip(ends) {
            let part = at..at + part * step;
            *end = self.append(isa, &values[part.clone()], &rows[part.clone()]);
            at = part.end;
        }
    }

    /// The lists, which end there.
    pub(in crate::kernel) fn finish(self, ends: &'a [u32]) -> Lists<'a> {
        Lists { ends, rows: &self.rows[..self.len], factors: &self.factors[..self.len] }
    }
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2,fma")]
unsafe fn keep_avx2(values: &[u32], magnitude: u32, rows: *const u32, to: [*mut u32; 2]) -> usize {
    // SAFETY: the caller's promises are the callee's.
    unsafe { keep::<crate::kernel::simd::x86::Avx2>(values, magnitude, rows, to) }
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq")]
unsafe fn keep_avx512(values: &[u32], magnitude: u32, rows: *const u32, to: [*mut u32; 2]) -> usize {
    // SAFETY: the caller's promises are the callee's.
    unsafe { keep::<crate::kernel::simd::x86::Avx512>(values, magnitude, rows, to) }
}

/// Writes the values that are not 0, and their rows; returns how many.
///
/// # Safety
/// There are as many rows as values, and room for as many in `to` and [`ListsMut::SLACK`] more.
#[inline(always)]
unsafe fn keep<S: Simd>(values: &[u32], magnitude: u32, rows: *const u32, to: [*mut u32; 2]) -> usize {
    let mut len = 0;
    let whole = values.len() / S::LANES * S::LANES;
    // SAFETY: the caller's promises.
    unsafe {
        for i in (0..whole).step_by(S::LANES) {
            let to = to.map(|to| to.add(len));
            len += S::keep_nonzero(values.as_ptr().add(i), magnitude, rows.add(i), to);
        }
        for (i, &value) in values.iter().enumerate().skip(whole) {
            *to[0].add(len) = value;
            *to[1].add(len) = *rows.add(i);
            len += usize::from(value & magnitude != 0);
        }
    }
    len
}
