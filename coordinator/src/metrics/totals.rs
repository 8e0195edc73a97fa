//! What adds up while a coordinator runs.

use std::time::{Duration, SystemTime};

use lockstep_common::progress::{Breakdown, Event, RoundReport};

/// Upper bounds of the buckets of round times, in seconds: from small models inside one process to large ones over slow
/// links.
pub const BUCKETS: [f64; 15] =
    [0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0];

/// How long rounds took.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct RoundTimes {
    /// Rounds whose time is at most that of the bucket, and more than that of the one before.
    pub counts: [u64; BUCKETS.len()],
    /// All rounds.
    pub count: u64,
    /// Their time.
    pub sum: Duration,
    /// Where it went.
    pub parts: Breakdown,
}

impl RoundTimes {
    fn observe(&mut self, round: &RoundReport) {
        let seconds = round.duration.as_secs_f64();
        if let Some(bucket) = BUCKETS.iter().position(|&bound| seconds <= bound) {
            self.counts[bucket] += 1;
        }
        self.count += 1;
        self.sum += round.duration;
        self.parts.compute += round.breakdown.compute;
        self.parts.transfer += round.breakdown.transfer;
        self.parts.reduce += round.breakdown.reduce;
        self.parts.update += round.breakdown.update;
        self.parts.wait += round.breakdown.wait;
    }
}

/// What has added up since the coordinator was started.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Totals {
    /// The rounds of this coordinator.
    pub round_times: RoundTimes,
    /// Leaves that a second member was asked to compute.
    pub hedged_leaves: u64,
    /// Workers ever admitted to the run.
    pub workers_joined: u32,
    /// Members ever lost or evicted without having drained.
    pub workers_lost: u32,
    /// Checkpoints written.
    pub checkpoints: u64,
    /// When the newest of them was on the disk.
    pub newest_checkpoint: Option<SystemTime>,
}

impl Totals {
    /// Takes an event into account.
    pub(crate) fn note(&mut self, event: &Event) {
        if let Event::Round(round) = event {
            self.round_times.observe(round);
            self.hedged_leaves += u64::from(round.hedged);
        }
    }

    /// Takes a checkpoint into account.
    pub(crate) fn checkpoint_written(&mut self, at: SystemTime) {
        self.checkpoints += 1;
        self.newest_checkpoint = Some(at);
    }
}
