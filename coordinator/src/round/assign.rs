//! Which member owns which shards.

use std::ops::Range;

use lockstep_common::protocol::MemberId;

/// A division of all shards among members: contiguous ranges, so that each member can sum large subtrees.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Ownership {
    parts: Vec<(MemberId, Range<u32>)>,
}

impl Ownership {
    /// Divides `shards` shards among `members` in the order given, so that all are done at about the same time: each
    /// comes with the time that it needs for a leaf, in any unit, above 0. A member may get none, when there are more
    /// members than shards or when it is so slow that the others are done sooner without it.
    pub fn divide(shards: u32, members: &[(MemberId, f64)]) -> Self {
        let speed: f64 = members.iter().map(|(_, leaf_time)| 1.0 / leaf_time).sum();
        let whole = |leaf_time: f64| (f64::from(shards) / (speed * leaf_time)) as u32;
        let mut counts: Vec<u32> = members.iter().map(|&(_, leaf_time)| whole(leaf_time).min(shards)).collect();
        // What is left by rounding down: at most one for each member, and one more by the rounding of floats.
        for _ in counts.iter().sum::<u32>()..if members.is_empty() { 0 } else { shards } {
            let done = |i: usize| f64::from(counts[i] + 1) * members[i].1;
            let first = (0..counts.len()).min_by(|&a, &b| done(a).total_cmp(&done(b)));
            first.into_iter().for_each(|i| counts[i] += 1);
        }
        let mut start = 0;
        let parts = members.iter().zip(counts).map(|(&(member, _), count)| {
            let part = start..(start + count).min(shards);
            start = part.end;
            (member, part)
        });
        Self { parts: parts.collect() }
    }

    /// When the last member is done, in the unit of the leaf times.
    pub fn duration(&self, members: &[(MemberId, f64)]) -> f64 {
        members.iter().map(|&(member, leaf_time)| self.of(member).len() as f64 * leaf_time).fold(0.0, f64::max)
    }

    /// The shards of a member.
    pub fn of(&self, member: MemberId) -> Range<u32> {
        self.parts.iter().find(|(id, _)| *id == member).map_or(0..0, |(_, range)| range.clone())
    }

    /// Every member and its shards.
    pub fn parts(&self) -> &[(MemberId, Range<u32>)] {
        &self.parts
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn divide(shards: u32, leaf_times: &[f64]) -> Vec<Range<u32>> {
        let members: Vec<(MemberId, f64)> = leaf_times
            .iter()
            .enumerate()
            .map(|(i, &leaf_time)| (MemberId { worker: i as u32, incarnation: 1 }, leaf_time))
            .collect();
        Ownership::divide(shards, &members).parts.into_iter().map(|(_, range)| range).collect()
    }

    #[test]
    fn parts_are_contiguous_cover_everything_and_follow_the_speeds() {
        assert_eq!(divide(16, &[1.0])[0], 0..16);
        assert_eq!(divide(16, &[0.5, 0.5]), [0..8, 8..16]);
        assert_eq!(divide(16, &[3.0, 1.0]), [0..4, 4..16]);
        assert_eq!(divide(16, &[1.0, 1.0, 1.0]), [0..6, 6..11, 11..16]);
        // Two members are done with all after 8 leaf times: sooner than a slow third one with its first leaf.
        assert_eq!(divide(16, &[1.0, 10.0, 1.0]), [0..8, 8..8, 8..16]);
        assert_eq!(divide(16, &[1.0, 5.0, 1.0]), [0..8, 8..9, 9..16]);
        assert_eq!(divide(16, &[]), []);
        for members in 1..20 {
            let parts = divide(8, &vec![1.0; members]);
            assert_eq!((parts[0].start, parts[members - 1].end), (0, 8));
            assert!(parts.windows(2).all(|pair| pair[0].end == pair[1].start));
            assert!(parts.iter().all(|part| part.len() <= 8usize.div_ceil(members) + 1));
        }
    }
}
