//! Where samples lie: a data set placed into shards, and a shard's samples as a worker holds them.

use std::sync::Arc;

use crate::data::{DataError, Dataset, Elements};
use crate::hash::{Digest, DigestBuilder};
use crate::protocol::{Job, Samples, ShardRef, Split};
use crate::shard::{Schedule, even_part};

/// A run's data, and which of its samples make up each shard.
#[derive(Debug)]
pub struct PlacedData {
    training: Arc<Dataset>,
    validation: Option<Arc<Dataset>>,
    schedule: Schedule,
    /// Samples of every training shard, in its resting order.
    assignment: Vec<Vec<u32>>,
}

impl PlacedData {
    /// Places a data set by a run's schedule.
    pub fn new(training: Arc<Dataset>, validation: Option<Arc<Dataset>>, schedule: Schedule) -> Self {
        Self { training, validation, schedule, assignment: schedule.assignment() }
    }

    /// Digest of all samples: number, shape, type and every element, of training and validation.
    pub fn digest(&self) -> Digest {
        let mut digest = DigestBuilder::default();
        digest.number(u64::from(self.validation.is_some()));
        for data in [Some(&self.training), self.validation.as_ref()].into_iter().flatten() {
            digest.number(data.len() as u64);
            let shape = data.sample_shape().axes();
            digest.number(shape.len() as u64);
            shape.iter().for_each(|&size| digest.number(size as u64));
            digest.number(data.dtype().size_bytes() as u64);
            match data.elements() {
                Elements::U8(elements) => digest.bytes(elements),
                Elements::F32(elements) => digest.floats(elements),
            }
        }
        digest.finish()
    }

    /// The samples of a shard as indices into their part of the data; none for a shard that does not exist.
    pub fn ids(&self, shard: ShardRef) -> Vec<u32> {
        let shards = self.schedule.tree.shards();
        match shard.split {
            _ if shard.shard >= shards => Vec::new(),
            Split::Training => self.assignment[shard.shard as usize].clone(),
            Split::Validation => {
                let samples = self.validation.as_ref().map_or(0, |data| data.len());
                even_part(samples as u32, shards, shard.shard).collect()
            }
        }
    }

    /// A shard's samples, in this data set's own memory.
    pub fn shard(&self, shard: ShardRef) -> ShardSamples {
        ShardSamples { ids: self.ids(shard), store: self.store(shard.split).clone(), by_id: true }
    }

    /// Copies samples, for a worker that has not cached their shard.
    ///
    /// # Panics
    /// When an index is not below the number of samples: indices come from the schedule.
    pub fn pack(&self, split: Split, ids: &[u32]) -> Samples {
        Samples { ids: ids.to_vec(), data: self.store(split).select(ids).into_le_bytes() }
    }

    /// Without validation data there are no validation samples, so that the training set serves for an empty look-up.
    fn store(&self, split: Split) -> &Arc<Dataset> {
        match (split, &self.validation) {
            (Split::Validation, Some(validation)) => validation,
            _ => &self.training,
        }
    }
}

/// Why samples that came over the network cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum ReceivedError {
    /// The bytes are not samples of the job's shape and type.
    #[error(transparent)]
    Data(#[from] DataError),
    /// Every sample needs an index.
    #[error("{samples} samples came with {ids} indices")]
    Count {
        /// Samples that came.
        samples: usize,
        /// Indices that came.
        ids: usize,
    },
}

/// Samples of a shard, or of a leaf, as a worker holds them.
#[derive(Clone, Debug)]
pub struct ShardSamples {
    ids: Vec<u32>,
    store: Arc<Dataset>,
    /// Whether the store is indexed by a sample's id (a whole data set) or by its place (a shard of its own).
    by_id: bool,
}

impl ShardSamples {
    /// Samples that travelled.
    ///
    /// # Errors
    /// [`ReceivedError`] when they are not what the job says: other sizes, or values that are not finite.
    pub fn received(job: &Job, samples: Samples) -> Result<Self, ReceivedError> {
        let Samples { ids, data } = samples;
        let name = format!("samples of run {:?}", job.run);
        let store = Dataset::from_le_bytes(name, job.sample_shape.clone(), job.dtype, data)?;
        if store.len() != ids.len() {
            return Err(ReceivedError::Count { samples: store.len(), ids: ids.len() });
        }
        Ok(Self { ids, store: Arc::new(store), by_id: false })
    }

    /// Number of samples.
    pub fn len(&self) -> usize {
        self.ids.len()
    }

    /// Whether there are no samples.
    pub fn is_empty(&self) -> bool {
        self.ids.is_empty()
    }

    /// The index of the sample at a place in its part of the data.
    ///
    /// # Panics
    /// When there is no such place.
    pub fn id(&self, place: u32) -> u32 {
        self.ids[place as usize]
    }

    /// Writes the sample at a place as floats.
    ///
    /// # Panics
    /// When there is no such place, or `out` has another length than a sample.
    pub fn write(&self, place: u32, out: &mut [f32]) {
        let row = if self.by_id { self.ids[place as usize] } else { place };
        self.store.sample(row as usize).write_f32(out);
    }
}
