//! What a run asks of its workers.

use serde::{Deserialize, Serialize};

/// Workers and deadlines. None of this changes the mathematics.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct ClusterConfig {
    /// A run waits while it has fewer workers.
    pub min_workers: u32,
    /// The first round waits for so many workers, so that those that are expected start together.
    pub start_workers: u32,
    /// How often a worker gives a sign of life, in milliseconds.
    pub heartbeat_interval_ms: u64,
    /// A worker that was silent for so long is evicted, in milliseconds.
    pub lease_timeout_ms: u64,
    /// Whether workers on the coordinator's host exchange tensors through shared memory where that is possible.
    pub shared_memory: bool,
    /// A worker that gives signs of life, but has work and delivers nothing for so long, is evicted, in milliseconds; or
    /// for twenty times as long as rounds take, if that is longer.
    pub work_timeout_ms: u64,
    /// About one leaf in so many is computed by a second worker as well, and the bits are compared; 0 for none.
    pub spot_check: u32,
    /// Members that a run can have at a time. More are told to come again later.
    pub max_workers: u32,
    /// Connections that a coordinator takes at a time: two for each worker, and some for monitors, probes, and those that
    /// come anew.
    pub max_connections: u32,
    /// How many of them may come from one address (for IPv6, from one network of 64 bits). Workers behind one router
    /// count as one address.
    pub max_connections_per_address: u32,
}

impl Default for ClusterConfig {
    fn default() -> Self {
        Self {
            min_workers: 1,
            start_workers: 1,
            heartbeat_interval_ms: 500,
            shared_memory: true,
            lease_timeout_ms: 2500,
            work_timeout_ms: 60_000,
            spot_check: 256,
            max_workers: 512,
            max_connections: 2 * 512 + 256,
            max_connections_per_address: 512,
        }
    }
}

impl ClusterConfig {
    /// What is wrong with the settings for a run of so many shards, if anything.
    pub(super) fn problem(&self, shards: u32) -> Option<String> {
        if self.min_workers == 0 || self.min_workers > shards {
            return Some(format!(
                "min_workers is {}; it must be from 1 to the number of shards, {}",
                self.min_workers, shards
            ));
        }
        if self.start_workers == 0 {
            return Some("start_workers is 0; it must be at least 1".to_owned());
        }
        if self.max_workers < self.min_workers.max(self.start_workers) {
            return Some(format!(
                "max_workers is {}, but the run waits for {}; it must be at least as many",
                self.max_workers,
                self.min_workers.max(self.start_workers)
            ));
        }
        if self.max_connections == 0 || self.max_connections_per_address == 0 {
            return Some(format!(
                "max_connections is {}, max_connections_per_address is {}; both must be at least 1",
                self.max_connections, self.max_connections_per_address
            ));
        }
        if self.heartbeat_interval_ms == 0 || self.lease_timeout_ms < 2 * self.heartbeat_interval_ms {
            return Some(format!(
                "lease_timeout_ms is {}, heartbeat_interval_ms is {}; the lease must last at least two heartbeats, each at least 1 ms",
                self.lease_timeout_ms, self.heartbeat_interval_ms
            ));
        }
        if self.work_timeout_ms < self.lease_timeout_ms {
            return Some(format!(
                "work_timeout_ms is {}, lease_timeout_ms is {}; work may take at least as long as silence",
                self.work_timeout_ms, self.lease_timeout_ms
            ));
        }
        None
    }
}
