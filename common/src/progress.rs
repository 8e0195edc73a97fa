//! What a run tells the outside world: events in the order in which they happened, and its state at a glance.

use std::time::Duration;

use serde::{Deserialize, Serialize};

use crate::hash::Digest;
use crate::protocol::MemberId;

/// A completed round.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct RoundReport {
    /// Number of the round in the run, from 0.
    pub round: u64,
    /// Epoch that the round belongs to, from 0.
    pub epoch: u32,
    /// Number of the round in its epoch, from 0.
    pub batch: u32,
    /// Mean loss over the round's samples.
    #[serde(deserialize_with = "crate::json_float::or_nan")]
    pub loss: f64,
    /// Euclidean norm of the mean gradient.
    #[serde(deserialize_with = "crate::json_float::or_nan")]
    pub gradient_norm: f64,
    /// Number of samples.
    pub samples: u32,
    /// Digest of the parameters that the round made.
    pub parameters: Digest,
    /// Whether the round was skipped, because its loss or gradient is not finite: the parameters stayed as they were.
    #[serde(default)]
    pub skipped: bool,
    /// Members that took part.
    pub workers: u32,
    /// Leaves that a second member was asked to compute, because the first was late.
    #[serde(default)]
    pub hedged: u32,
    /// From the round's start to its commit.
    #[serde(rename = "seconds", with = "seconds")]
    pub duration: Duration,
    /// Where the time went: the parts add up to the duration.
    #[serde(flatten)]
    pub breakdown: Breakdown,
}

/// Where the time of a round went, as the coordinator saw it. The parts do not overlap.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Breakdown {
    /// The longest time that a worker computed.
    #[serde(rename = "compute_seconds", with = "seconds")]
    pub compute: Duration,
    /// Nothing but data was awaited: the longest time that a worker waited for parameters with an assignment in its
    /// hands, and the time that the coordinator had nothing to do but to wait for the rest of announced nodes.
    #[serde(rename = "transfer_seconds", with = "seconds", default)]
    pub transfer: Duration,
    /// The coordinator added gradients.
    #[serde(rename = "reduce_seconds", with = "seconds", default)]
    pub reduce: Duration,
    /// The coordinator took the optimizer step.
    #[serde(rename = "update_seconds", with = "seconds", default)]
    pub update: Duration,
    /// The rest: messages on their way, threads being woken, bookkeeping, and faster workers waiting for slower ones.
    #[serde(rename = "wait_seconds", with = "seconds", default)]
    pub wait: Duration,
}

impl Breakdown {
    /// The breakdown of a round of this `duration`. Where the parts were measured to overlap, as they do when the
    /// coordinator adds what came while a worker still computes, the earlier in the order compute, update, reduce,
    /// transfer counts.
    pub fn of(duration: Duration, compute: Duration, aggregation: Aggregation, download: Duration) -> Self {
        let mut rest = duration;
        let mut take = |part: Duration| {
            let part = part.min(rest);
            rest -= part;
            part
        };
        let compute = take(compute);
        let update = take(aggregation.update);
        let reduce = take(aggregation.reduce);
        let transfer = take(aggregation.upload + download);
        Self { compute, transfer, reduce, update, wait: rest }
    }
}

/// What the coordinator's own part of a round took.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Aggregation {
    /// Waiting for the rest of announced nodes, with nothing else to do.
    pub upload: Duration,
    /// Adding gradients, with the norm of the sum.
    pub reduce: Duration,
    /// The optimizer step, with the digest of the parameters.
    pub update: Duration,
}

/// A completed epoch.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct EpochReport {
    /// The epoch, from 0.
    pub epoch: u32,
    /// Rounds completed in the run.
    pub rounds: u64,
    /// Mean loss over the epoch's samples, each measured when it was used.
    #[serde(deserialize_with = "crate::json_float::or_nan")]
    pub train_loss: f64,
    /// Mean loss on the validation set after the epoch, if there is one.
    pub validation_loss: Option<f64>,
}

/// Something that happened in a run.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(tag = "event", rename_all = "snake_case")]
pub enum Event {
    /// A round was committed.
    Round(RoundReport),
    /// An epoch is complete and evaluated.
    Epoch(EpochReport),
    /// A worker was admitted.
    Joined {
        /// Who it is.
        member: MemberId,
        /// The name that it gave.
        name: String,
    },
    /// A worker is no longer a member.
    Left {
        /// Who it was.
        member: MemberId,
        /// Why: drained, evicted or lost, with the numbers.
        reason: String,
    },
    /// The run goes on or stands still.
    State {
        /// What it does or waits for.
        state: RunState,
    },
    /// Something that people should know, such as a failed write.
    Notice {
        /// What.
        message: String,
    },
}

/// What a run is doing.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "is", rename_all = "snake_case")]
pub enum RunState {
    /// Nothing is computed; the reason names what is missing.
    Waiting {
        /// What is awaited.
        reason: String,
    },
    /// Rounds are computed.
    Training,
    /// The validation loss is computed.
    Evaluating,
    /// The run has ended.
    Finished {
        /// How.
        reason: String,
    },
}

/// An event with its time.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct TimedEvent {
    /// Milliseconds since 1970-01-01 UTC.
    pub unix_ms: u64,
    /// What happened.
    #[serde(flatten)]
    pub event: Event,
}

/// A run at a glance.
#[derive(Clone, Debug, PartialEq)]
pub struct RunStatus {
    /// The run's name.
    pub run: String,
    /// The model's name.
    pub model: String,
    /// Number of parameters.
    pub parameters: u64,
    /// What it is doing.
    pub state: RunState,
    /// Rounds completed.
    pub rounds: u64,
    /// Rounds after which the run ends.
    pub total_rounds: u64,
    /// Rounds in an epoch.
    pub rounds_per_epoch: u32,
    /// Samples in a global batch.
    pub batch_size: u32,
    /// Virtual shards.
    pub shards: u32,
    /// Members at present.
    pub workers: u32,
    /// Members needed for a round.
    pub min_workers: u32,
    /// Training samples used so far, over all rounds.
    pub samples_seen: u64,
    /// Over the last rounds.
    pub samples_per_second: f64,
    /// Loss of the last round.
    pub loss: Option<f64>,
    /// Training loss of the last whole epoch.
    pub train_loss: Option<f64>,
    /// Validation loss after the last whole epoch.
    pub validation_loss: Option<f64>,
    /// What is wrong at present and tried again, such as a file that cannot be written. Empty if nothing is.
    pub problems: Vec<String>,
    /// Version of the software.
    pub version: String,
}

/// How tensors travel between the coordinator and a worker.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Transport {
    /// Not at all: the worker lives in the coordinator's process.
    InProcess,
    /// They lie in memory that both processes have mapped; gRPC says where.
    SharedMemory,
    /// In chunks over gRPC.
    Grpc,
}

impl Transport {
    /// Its name, for people.
    pub fn name(self) -> &'static str {
        match self {
            Self::InProcess => "process",
            Self::SharedMemory => "memory",
            Self::Grpc => "grpc",
        }
    }
}

/// A member at a glance.
#[derive(Clone, Debug, PartialEq)]
pub struct WorkerStatus {
    /// Who it is.
    pub member: MemberId,
    /// The name that it gave.
    pub name: String,
    /// Instruction set that it computes on.
    pub isa: String,
    /// Threads that it computes with.
    pub threads: u32,
    /// How tensors reach it and come from it.
    pub transport: Transport,
    /// Leaves assigned to it in the current work.
    pub leaves: Vec<u32>,
    /// Shards that it has cached.
    pub cached_shards: u32,
    /// Leaves computed since it joined.
    pub leaves_computed: u64,
    /// Compute time of its last assignment.
    pub last_compute: Option<Duration>,
    /// What a leaf took of late, from the assignment to the delivery.
    pub leaf_time: Option<Duration>,
    /// Leaves that others were asked to compute as well, because it was late with them.
    pub leaves_hedged: u64,
    /// Time since its last sign of life.
    pub silent_for: Duration,
}

mod seconds {
    //! Durations as seconds, to the microsecond.
    use std::time::Duration;

    use serde::{Deserialize, Deserializer, Serializer};

    pub(super) fn serialize<S: Serializer>(duration: &Duration, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_f64(duration.as_micros() as f64 * 1e-6)
    }

    pub(super) fn deserialize<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Duration, D::Error> {
        let seconds = f64::deserialize(deserializer)?;
        Duration::try_from_secs_f64(seconds).map_err(serde::de::Error::custom)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_parts_of_a_round_add_up_to_its_duration() {
        let ms = Duration::from_millis;
        let aggregation = Aggregation { upload: ms(4), reduce: ms(2), update: ms(3) };
        let parts = Breakdown::of(ms(30), ms(10), aggregation, ms(1));
        assert_eq!(parts, Breakdown { compute: ms(10), transfer: ms(5), reduce: ms(2), update: ms(3), wait: ms(10) });
        // Work that overlapped is counted once.
        let parts = Breakdown::of(ms(14), ms(10), aggregation, ms(1));
        assert_eq!(parts, Breakdown { compute: ms(10), transfer: ms(0), reduce: ms(1), update: ms(3), wait: ms(0) });
    }
}
