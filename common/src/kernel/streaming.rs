//! Writing past the caches.
//!
//! A store brings the line that it changes into the cache first, and puts out another one for it. Where so much is written
//! that nobody will find it in a cache again, both are a waste. For new parameters, that is one of the eight transfers of a
//! step of Adam: four streams are read, three written, and the lines of one of these are read for nothing.

use std::marker::PhantomData;

use super::ahead::LINE;
use super::isa::{Isa, Kind};
use super::simd::{Scalar, Simd};

/// A slice that is written from its start to its end, without bringing its lines into the caches.
#[derive(Debug)]
pub struct PastCaches<'a> {
    isa: Isa,
    rest: &'a mut [f32],
    /// What one thread has written, no other can wait for.
    on_this_thread: PhantomData<*const ()>,
}

/// Lets `write` fill a slice past the caches. What it does not write stays as it was.
///
/// Such stores may come to memory later than others of the same thread. So nobody can read the slice before this returns,
/// and then all have arrived.
pub fn write_past_caches<R>(isa: Isa, to: &mut [f32], write: impl FnOnce(&mut PastCaches<'_>) -> R) -> R {
    let mut target = PastCaches { isa, rest: to, on_this_thread: PhantomData };
    write(&mut target)
}

impl PastCaches<'_> {
    /// Writes the next floats.
    ///
    /// # Panics
    /// When there is not so much room left.
    pub fn append(&mut self, from: &[f32]) {
        let (to, rest) = std::mem::take(&mut self.rest).split_at_mut(from.len());
        self.rest = rest;
        // Whole cache lines, which no other store shares, and what lies around them.
        let start = to.as_ptr().align_offset(LINE * size_of::<f32>()).min(to.len());
        let end = start + (to.len() - start) / LINE * LINE;
        to[..start].copy_from_slice(&from[..start]);
        to[end..].copy_from_slice(&from[end..]);
        let (from, to) = (&from[start..end], &mut to[start..end]);
        // SAFETY: both slices are the same whole lines, and `to` begins at a line's start; a value of `Isa` exists only for
        // instruction sets that were detected.
        unsafe {
            match self.isa.kind() {
                Kind::Scalar => lines::<Scalar>(from, to),
                #[cfg(target_arch = "x86_64")]
                Kind::Avx2 => avx2(from, to),
                #[cfg(target_arch = "x86_64")]
                Kind::Avx512 => avx512(from, to),
                #[cfg(target_arch = "aarch64")]
                Kind::Neon => lines::<super::simd::arm::Neon>(from, to),
            }
        }
    }
}

impl Drop for PastCaches<'_> {
    fn drop(&mut self) {
        // SAFETY: the instruction is part of every x86-64.
        #[cfg(target_arch = "x86_64")]
        unsafe {
            std::arch::x86_64::_mm_sfence();
        }
    }
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2,fma")]
unsafe fn avx2(from: &[f32], to: &mut [f32]) {
    // SAFETY: the caller's promises are the callee's.
    unsafe { lines::<super::simd::x86::Avx2>(from, to) }
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq")]
unsafe fn avx512(from: &[f32], to: &mut [f32]) {
    // SAFETY: the caller's promises are the callee's.
    unsafe { lines::<super::simd::x86::Avx512>(from, to) }
}

/// # Safety
/// Both slices have the same number of whole cache lines, `to` begins at the start of one, and the machine has the instruction
/// set.
#[inline(always)]
unsafe fn lines<S: Simd>(from: &[f32], to: &mut [f32]) {
    for (from, to) in from.chunks_exact(S::LANES).zip(to.chunks_exact_mut(S::LANES)) {
        // SAFETY: both have a vector's lanes, and a line is a multiple of any vector.
        unsafe { S::store_past_caches(to.as_mut_ptr(), S::load(from.as_ptr())) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Scenario: stretches of every length up to some lines, from every place in a line on, in two pieces. Property: they are
    /// written, and what lies around them is not touched, behind what was appended neither.
    #[test]
    fn stretches_of_any_length_and_place_touch_nothing_else() {
        const LONGEST: usize = 3 * LINE + 3;
        for isa in Isa::available() {
            for (start, len) in (0..LINE).flat_map(|start| (0..LONGEST).map(move |len| (start, len))) {
                let from: Vec<f32> = (0..len).map(|i| 1.0 + i as f32).collect();
                let mut to = [0.0; LONGEST + 2 * LINE];
                write_past_caches(isa, &mut to[start..], |target| {
                    let (first, second) = from.split_at(len / 3);
                    target.append(first);
                    target.append(second);
                });
                assert_eq!(to[start..start + len], from[..], "{isa}");
                let around = to[..start].iter().chain(&to[start + len..]);
                assert!(around.into_iter().all(|&value| value == 0.0), "{len} from {start} on {isa}");
            }
        }
    }

    #[test]
    #[should_panic(expected = "mid > len")]
    fn nothing_is_written_behind_the_end() {
        let mut to = [0.0; 3];
        write_past_caches(Isa::best(), &mut to, |target| target.append(&[1.0; 4]));
    }
}
