//! Checkpoints: everything that a coordinator needs to go on exactly where it was.
//!
//! A checkpoint is taken at a round's edge. It holds the parameters and the optimizer's moments after a number of rounds,
//! and the coordinator's own [`State`]: where the state machine stood, how long the ledger was, and what the run is. From
//! these, the data and the configuration, every further round has the bits that it would have had without the break.
//!
//! [`mod@format`] says what a file looks like, [`continuity`] what may change between a run's parts.

pub mod continuity;
pub mod format;
mod state;

use std::time::Duration;

use serde::{Deserialize, Serialize};

use crate::hash::Digest;
use crate::model::LayoutHash;
use crate::optim::adam::Moments;
use crate::protocol::MemberId;

/// A run at a round's edge.
#[derive(Clone, Debug, PartialEq)]
pub struct Checkpoint {
    /// What the coordinator knew.
    pub state: State,
    /// The parameters after `state.standing.rounds` rounds.
    pub parameters: Vec<f32>,
    /// The optimizer's moments after as many rounds.
    pub moments: Moments,
}

/// What the coordinator knew, beside the tensors.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct State {
    /// Version of the software that wrote it, for people.
    pub version: String,
    /// The run's configuration (`run.toml`) with every default written out, of which no key that is part of the
    /// mathematics may change.
    pub config: String,
    /// Layout of the parameters.
    pub layout: LayoutHash,
    /// Numerics fingerprint of all processes that took part.
    pub fingerprint: Digest,
    /// Digest of all samples.
    pub data: Digest,
    /// How often the coordinator had been restarted.
    pub restarts: u32,
    /// Where the state machine stood.
    pub standing: Standing,
    /// The ledger after the last round.
    pub ledger: LedgerPosition,
    /// Length of the event log, in bytes.
    pub events_bytes: u64,
    /// What the monitor showed.
    pub shown: Shown,
}

/// Where the state machine stood at an edge.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Standing {
    /// Rounds completed.
    pub rounds: u64,
    /// The last version whose validation loss is known or not wanted.
    pub evaluated: u64,
    /// Sum of the losses in the epoch at hand.
    pub epoch_loss: f64,
    /// Samples in that sum.
    pub epoch_samples: u64,
    /// Training samples used over all rounds.
    pub samples_seen: u64,
    /// Members lost without having drained.
    pub workers_lost: u32,
    /// Rounds that were skipped, because they were not finite.
    pub skipped: Skipped,
    /// Every worker process seen, and the last incarnation of each.
    pub workers: Vec<KnownWorker>,
}

/// Rounds without an optimizer step, because their loss or gradient was not finite.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Skipped {
    /// Over the whole run.
    pub rounds: u64,
    /// One after the other, up to the last round.
    pub in_a_row: u32,
    /// How often the learning rate was lowered because of them.
    pub rate_cuts: u32,
}

/// A worker process that has been a member.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct KnownWorker {
    /// The number that the process gave itself.
    pub process: u64,
    /// Its last join.
    pub member: MemberId,
    /// Why it may not join again, if it computed wrong bits.
    pub barred: Option<String>,
}

/// A place in a ledger.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct LedgerPosition {
    /// Length up to it, in bytes.
    pub bytes: u64,
    /// Chain digest of the last line before it.
    pub chain: Digest,
}

/// What the monitor and the summary show, and nothing else depends on.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Shown {
    /// Loss of the last round.
    pub loss: Option<f64>,
    /// Training loss of the last whole epoch.
    pub train_loss: Option<f64>,
    /// Validation loss after the last whole epoch.
    pub validation_loss: Option<f64>,
    /// Time spent training.
    pub training_time: Duration,
}

/// Why a file is no checkpoint to go on from.
#[derive(Debug, thiserror::Error)]
pub enum CheckpointError {
    /// It could not be read. It may be whole all the same.
    #[error("it cannot be read: {0}")]
    Io(#[from] std::io::Error),
    /// It is torn, cut off, or was changed.
    #[error("it is damaged: {0}")]
    Damaged(String),
    /// It is whole, but another version of the software has written it.
    #[error("it has format {found}, this program reads format {known}; use the lockstep that wrote it")]
    Format {
        /// The file's.
        found: u32,
        /// This program's.
        known: u32,
    },
    /// It is whole, and yet does not say what it should.
    #[error("its state cannot be understood: {0}")]
    State(String),
}
