//! Writing past the caches.
//!
//! A store brings the line that it changes into the cache first, and puts out another one for it. Where so much is written
//! that nobody will find it in a cache again, both are a waste. For new parameters, that is one of the eight transfers of a
//! step of Adam: four streams are read, three written, and the lines of one of these are read for nothing.

/// Copies `from` to `to`, whose lines do not come into the caches.
///
/// # Panics
/// When the lengths differ.
pub fn copy_past_caches(from: &[f32], to: &mut [f32]) {
    assert_eq!(from.len(), to.len(), "a copy is as long as what it is one of");
    #[cfg(target_arch = "x86_64")]
    {
        use std::arch::x86_64::{_mm_loadu_ps, _mm_sfence, _mm_stream_ps};
        const LANES: usize = 4;
        let start = to.as_ptr().align_offset(LANES * size_of::<f32>()).min(to.len());
        let end = start + (to.len() - start) / LANES * LANES;
        to[..start].copy_from_slice(&from[..start]);
        to[end..].copy_from_slice(&from[end..]);
        for at in (start..end).step_by(LANES) {
            // SAFETY: both slices have `LANES` floats from `at` on, which are aligned in `to`; SSE is part of every x86-64.
            unsafe { _mm_stream_ps(to.as_mut_ptr().add(at), _mm_loadu_ps(from.as_ptr().add(at))) }
        }
        // SAFETY: as above. Without it, other threads could see what is written after this before what was written here.
        unsafe { _mm_sfence() }
    }
    #[cfg(not(target_arch = "x86_64"))]
    to.copy_from_slice(from);
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Scenario: stretches of every length up to some vectors, from every place in a vector on. Property: they are copied, and
    /// what lies around them is not touched.
    #[test]
    fn copies_of_any_length_and_place_touch_nothing_else() {
        const LONGEST: usize = 19;
        for start in 0..8 {
            for len in 0..LONGEST {
                let from: Vec<f32> = (0..len).map(|i| 1.0 + i as f32).collect();
                let mut to = [0.0; LONGEST + 16];
                copy_past_caches(&from, &mut to[start..start + len]);
                assert_eq!(to[start..start + len], from[..]);
                assert!(to[..start].iter().chain(&to[start + len..]).all(|&value| value == 0.0), "{len} from {start}");
            }
        }
    }
}
