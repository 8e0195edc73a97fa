//! Virtual shards and the schedule: which samples each shard's leaf takes in each round.
//!
//! The schedule is a function of the run's spec alone. The training samples are put into one random order once per run
//! and dealt out to the shards like cards. In an epoch each shard shuffles its own samples; position `p` of the epoch
//! is sample `p / shards` of shard `p % shards`. A global batch is the next `batch_size` positions. So every shard takes
//! its even part of each batch, a remainder goes to the shards in turn, the short last batch is used, and every sample
//! is used exactly once an epoch, whatever the sizes are.

use std::num::NonZeroU32;
use std::ops::Range;

use crate::hash::{Digest, DigestBuilder};
use crate::reduce::Tree;
use crate::rng::{Purpose, Stream};

/// The most training samples of a run: their order takes 1 GiB.
pub const MAX_SAMPLES: u32 = 1 << 28;

/// What a run's schedule depends on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Schedule {
    /// Key of all orders.
    pub seed: u64,
    /// Number of training samples.
    pub samples: NonZeroU32,
    /// Samples in a global batch.
    pub batch_size: NonZeroU32,
    /// The reduction tree over the shards.
    pub tree: Tree,
    /// Whether samples are put into random orders at all.
    pub shuffle: bool,
}

/// A round's place in the schedule.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Step {
    /// The epoch, from 0.
    pub epoch: u32,
    /// The round within the epoch, from 0.
    pub batch: u32,
}

impl Schedule {
    /// Number of rounds in an epoch; the last one may be short.
    pub fn rounds_per_epoch(&self) -> u32 {
        self.samples.get().div_ceil(self.batch_size.get())
    }

    /// The place of the round with the given number, counted from 0 over the whole run.
    pub fn step(&self, round: u64) -> Step {
        let per_epoch = u64::from(self.rounds_per_epoch());
        Step { epoch: (round / per_epoch) as u32, batch: (round % per_epoch) as u32 }
    }

    /// Number of samples in the global batch `batch` of an epoch.
    pub fn batch_samples(&self, batch: u32) -> u32 {
        let positions = self.positions(batch);
        (positions.end - positions.start) as u32
    }

    /// Number of training samples in a shard.
    pub fn shard_samples(&self, shard: u32) -> u32 {
        self.dealt_before(u64::from(self.samples.get()), shard)
    }

    /// Which places in the shard's order of the epoch the shard's leaf takes in global batch `batch`.
    pub fn leaf_places(&self, batch: u32, shard: u32) -> Range<u32> {
        let positions = self.positions(batch);
        self.dealt_before(positions.start, shard)..self.dealt_before(positions.end, shard)
    }

    /// The samples of every shard, as indices into the training set, in the shard's resting order.
    pub fn assignment(&self) -> Vec<Vec<u32>> {
        let mut order: Vec<u32> = (0..self.samples.get()).collect();
        if self.shuffle {
            Stream::new(self.seed, Purpose::ShardAssignment, 0, 0).shuffle(&mut order);
        }
        let shards = self.tree.shards() as usize;
        (0..shards).map(|shard| order.iter().skip(shard).step_by(shards).copied().collect()).collect()
    }

    /// The order in which a shard's samples are visited in an epoch: entry `i` is the resting position of the `i`-th.
    pub fn epoch_order(&self, epoch: u32, shard: u32) -> Vec<u32> {
        let mut order: Vec<u32> = (0..self.shard_samples(shard)).collect();
        if self.shuffle {
            Stream::new(self.seed, Purpose::EpochOrder, epoch, shard).shuffle(&mut order);
        }
        order
    }

    /// The positions of the epoch that make up global batch `batch`.
    fn positions(&self, batch: u32) -> Range<u64> {
        let samples = u64::from(self.samples.get());
        let size = u64::from(self.batch_size.get());
        let start = (u64::from(batch) * size).min(samples);
        start..(start + size).min(samples)
    }

    /// How many of the first `positions` positions of an epoch belong to `shard`.
    fn dealt_before(&self, positions: u64, shard: u32) -> u32 {
        let shards = u64::from(self.tree.shards());
        ((positions + shards - 1 - u64::from(shard)) / shards) as u32
    }
}

/// Contiguous parts of a data set that is not shuffled (validation): part `shard` of `shards`, sizes differing by at
/// most one.
pub fn even_part(samples: u32, shards: u32, shard: u32) -> Range<u32> {
    let bound = |part: u32| (u64::from(samples) * u64::from(part) / u64::from(shards)) as u32;
    bound(shard)..bound(shard + 1)
}

/// The digest of the samples that a leaf used, by their indices in the training set, in the order of use.
/// Workers report it; the coordinator and `lockstep audit` compare it with the schedule's.
pub fn samples_digest(samples: impl IntoIterator<Item = u32>) -> Digest {
    let mut digest = DigestBuilder::default();
    samples.into_iter().for_each(|sample| digest.bytes(&sample.to_le_bytes()));
    digest.finish()
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn schedule(samples: u32, batch_size: u32, shards: u32, shuffle: bool) -> Schedule {
        Schedule {
            seed: 3,
            samples: NonZeroU32::new(samples).unwrap(),
            batch_size: NonZeroU32::new(batch_size).unwrap(),
            tree: Tree::over(shards).unwrap(),
            shuffle,
        }
    }

    #[test]
    fn fashion_mnist_at_batch_256_has_keras_235_rounds() {
        let schedule = schedule(60_000, 256, 16, true);
        assert_eq!(schedule.rounds_per_epoch(), 235);
        assert_eq!(schedule.batch_samples(234), 96);
        assert!((0..16).all(|shard| schedule.leaf_places(0, shard).len() == 16));
        assert!((0..16).all(|shard| schedule.leaf_places(234, shard).len() == 6));
        assert_eq!(schedule.step(235), Step { epoch: 1, batch: 0 });
    }

    #[test]
    fn without_shuffling_a_batch_is_the_next_samples_in_file_order() {
        let schedule = schedule(10, 4, 2, false);
        let assignment = schedule.assignment();
        let mut batch: Vec<u32> = (0..2)
            .flat_map(|shard| schedule.leaf_places(1, shard).map(move |place| (shard, place)))
            .map(|(shard, place)| assignment[shard as usize][schedule.epoch_order(0, shard)[place as usize] as usize])
            .collect();
        batch.sort_unstable();
        assert_eq!(batch, [4, 5, 6, 7]);
    }

    proptest! {
        #[test]
        fn every_epoch_uses_every_sample_exactly_once(
            samples in 1u32..700, batch_size in 1u32..90, levels in 0u32..6, shuffle: bool, epoch in 0u32..3
        ) {
            let schedule = schedule(samples, batch_size, 1 << levels, shuffle);
            let assignment = schedule.assignment();
            let mut uses = vec![0u32; samples as usize];
            for batch in 0..schedule.rounds_per_epoch() {
                let mut taken = 0;
                for shard in 0..schedule.tree.shards() {
                    let order = schedule.epoch_order(epoch, shard);
                    for place in schedule.leaf_places(batch, shard) {
                        uses[assignment[shard as usize][order[place as usize] as usize] as usize] += 1;
                        taken += 1;
                    }
                }
                prop_assert_eq!(taken, schedule.batch_samples(batch));
            }
            prop_assert!(uses.iter().all(|&n| n == 1), "{:?}", uses);
        }

        #[test]
        fn even_parts_tile_the_whole(samples in 0u32..1000, shards in 1u32..70) {
            let mut next = 0;
            for shard in 0..shards {
                let part = even_part(samples, shards, shard);
                prop_assert_eq!(part.start, next);
                prop_assert!(part.len() as u32 <= samples / shards + 1);
                next = part.end;
            }
            prop_assert_eq!(next, samples);
        }
    }
}
