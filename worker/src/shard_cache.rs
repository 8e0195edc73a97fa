//! The shards that a worker holds.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, PoisonError};

use lockstep_common::placement::ShardSamples;
use lockstep_common::protocol::ShardRef;

/// Shards in memory, shared by the session, which fetches them, and the engine, which reads them.
#[derive(Clone, Debug, Default)]
pub struct ShardCache(Arc<Mutex<BTreeMap<ShardRef, Arc<ShardSamples>>>>);

impl ShardCache {
    /// Drops every shard that is not listed.
    pub fn retain(&self, wanted: &[ShardRef]) {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).retain(|shard, _| wanted.contains(shard));
    }

    /// Puts a shard in.
    pub fn insert(&self, shard: ShardRef, samples: ShardSamples) {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).insert(shard, Arc::new(samples));
    }

    /// A shard's samples, if they are there.
    pub fn get(&self, shard: ShardRef) -> Option<Arc<ShardSamples>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).get(&shard).cloned()
    }
}
