//! Which member owns which shards.

use std::ops::Range;

use lockstep_common::protocol::MemberId;

/// A division of all shards among members: contiguous ranges, so that each member can sum large subtrees.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Ownership {
    parts: Vec<(MemberId, Range<u32>)>,
}

impl Ownership {
    /// Divides `shards` shards among `members` in the order given, in proportion to their weights (threads). A member
    /// may get none when there are more members than shards.
    pub fn divide(shards: u32, members: &[(MemberId, u32)]) -> Self {
        let total: u64 = members.iter().map(|&(_, weight)| u64::from(weight.max(1))).sum();
        let mut before = 0u64;
        let mut parts = Vec::with_capacity(members.len());
        for &(member, weight) in members {
            let start = bound(shards, before, total);
            before += u64::from(weight.max(1));
            parts.push((member, start..bound(shards, before, total)));
        }
        Self { parts }
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

/// Where the part after `before` of `total` weight begins, rounded to the nearest shard.
fn bound(shards: u32, before: u64, total: u64) -> u32 {
    ((u64::from(shards) * before * 2 + total) / (2 * total)) as u32
}

#[cfg(test)]
mod tests {
    use super::*;

    fn divide(shards: u32, weights: &[u32]) -> Vec<Range<u32>> {
        let members: Vec<(MemberId, u32)> = weights
            .iter()
            .enumerate()
            .map(|(i, &weight)| (MemberId { worker: i as u32, incarnation: 1 }, weight))
            .collect();
        Ownership::divide(shards, &members).parts.into_iter().map(|(_, range)| range).collect()
    }

    #[test]
    fn parts_are_contiguous_cover_everything_and_follow_the_weights() {
        assert_eq!(divide(16, &[1])[0], 0..16);
        assert_eq!(divide(16, &[2, 2]), [0..8, 8..16]);
        assert_eq!(divide(16, &[1, 3]), [0..4, 4..16]);
        assert_eq!(divide(16, &[1, 1, 1]), [0..5, 5..11, 11..16]);
        for members in 1..20 {
            let parts = divide(8, &vec![1; members]);
            assert_eq!((parts[0].start, parts[members - 1].end), (0, 8));
            assert!(parts.windows(2).all(|pair| pair[0].end == pair[1].start));
            assert!(parts.iter().all(|part| part.len() <= 8usize.div_ceil(members) + 1));
        }
    }
}
