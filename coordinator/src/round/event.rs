//! What the machine is told, what it wants done, and what it refuses to hear.

use std::time::Duration;

use lockstep_common::checkpoint::Standing;
use lockstep_common::hash::Digest;
use lockstep_common::ledger::Record;
use lockstep_common::progress::{Aggregation, Event as Progressed};
use lockstep_common::protocol::{Handing, JoinRequest, KeepList, MemberId, NodeReport, Refusal, ShardRef, Work};
use lockstep_common::reduce::NodeId;

use super::membership::ConnectionId;

/// Something that happened.
#[derive(Clone, Debug)]
pub enum Event {
    /// A worker asks to be admitted.
    Join {
        /// Where the answer goes.
        connection: ConnectionId,
        /// Who asks.
        request: JoinRequest,
    },
    /// A member gave a sign of life.
    Heartbeat(MemberId),
    /// A member has cached a shard, as the list with this number asked.
    Cached(MemberId, u32, ShardRef),
    /// A member has computed a node and is about to send its gradient (or has none to send, for an evaluation).
    Announced(MemberId, NodeReport),
    /// The gradient of a node is computed that was announced before.
    Computed {
        /// Who computed it.
        member: MemberId,
        /// What the node belongs to.
        work: Work,
        /// Which node.
        node: NodeId,
        /// How long that took.
        compute: Duration,
    },
    /// A member has computed a leaf for comparison.
    Compared(MemberId, NodeReport),
    /// The last part of an announced node's gradient is there.
    Arrived {
        /// Who sent it.
        member: MemberId,
        /// What it belongs to.
        work: Work,
        /// Which node.
        node: NodeId,
    },
    /// A member wants to leave when its work is handed over.
    Drain(MemberId),
    /// A member is gone, or cannot go on.
    Lost(MemberId, String),
    /// A member sent what cannot be.
    Violated(MemberId, String),
    /// The gradient of a round is summed, and the optimizer step is taken or withheld.
    Reduced {
        /// Which round.
        round: u64,
        /// Euclidean norm of the mean gradient.
        gradient_norm: f64,
        /// Digest of the new parameters, or of those that stay.
        parameters: Digest,
        /// Whether the step was taken. It is not if the gradient or the loss is not finite.
        stepped: bool,
        /// What that took.
        took: Aggregation,
    },
    /// A checkpoint is on the disk.
    Saved(CheckpointId),
    /// A checkpoint was left out or cannot be written.
    NotSaved(CheckpointId),
    /// Time has passed.
    Tick,
    /// The run is to end now.
    Stop(String),
}

/// Something to be done.
#[derive(Clone, Debug, PartialEq)]
pub enum Effect {
    /// Answer a join with a welcome.
    Admit(ConnectionId, MemberId),
    /// Answer a join with a refusal.
    Refuse(ConnectionId, Refusal),
    /// Tell a member something.
    Send(MemberId, ToMember),
    /// Forget a member's connection, after what was sent to it is delivered.
    Close(MemberId),
    /// Start summing a round.
    Begin {
        /// Which round.
        round: u64,
        /// Samples in its global batch.
        samples: u32,
        /// The optimizer's step.
        step: Step,
    },
    /// Take the parts of a node's gradient when they come; the node has this loss.
    Expect(MemberId, NodeId, f64),
    /// Leave out the step of a round that is not finite: the next version has the parameters of the one before.
    Skip {
        /// Which round.
        round: u64,
    },
    /// Take them, too, but keep them out of the sum until the member's nodes are released.
    Hold(MemberId, NodeId, f64),
    /// Let what is held of a member into the sum.
    Release(MemberId),
    /// Throw away what is held of a member.
    Discard(MemberId),
    /// Append a round to the ledger.
    Record(Record),
    /// Write a checkpoint: the machine is at an edge and stands there.
    Checkpoint(CheckpointId, Box<Standing>, Occasion),
    /// Tell the outside world.
    Publish(Progressed),
    /// The run has ended.
    Finish(Outcome),
}

/// A checkpoint that the machine has asked for, counted from 1 by each start of the coordinator.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct CheckpointId(pub u64);

/// A step of the optimizer.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Step {
    /// Counts the steps that were taken, from 1.
    pub number: u64,
    /// The learning rate, as it is by now.
    pub learning_rate: f64,
}

/// Why a checkpoint is written.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Occasion {
    /// It is time. It may be left out while the one before is still being written.
    Due,
    /// The run ends. It may not be left out.
    End,
}

/// A leaf to compute.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Task {
    /// Which leaf.
    pub leaf: u32,
    /// Whether its samples must be sent along.
    pub inline: bool,
    /// How it is to be handed in.
    pub handing: Handing,
}

/// What members are told.
#[derive(Clone, Debug, PartialEq)]
pub enum ToMember {
    /// Have these shards.
    Keep(KeepList),
    /// A whole version of the parameters; those of later rounds follow as they are made.
    Parameters(u64),
    /// Compute leaves.
    Assign(Work, Vec<Task>),
    /// You are out.
    Evicted(String),
    /// The run, or your part in it, has ended.
    Finished(String),
}

/// How a run ended.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// All rounds are done.
    Completed,
    /// It was told to stop.
    Stopped(String),
    /// It cannot go on.
    Failed(String),
}

/// An event that cannot be in the state at hand. The state is unchanged.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Rejected {
    /// The sender was evicted, has left, or never was a member.
    #[error("{0} is not a member")]
    NotAMember(MemberId),
    /// It belongs to a work that is not under way.
    #[error("{got} is not under way ({current})")]
    Stale {
        /// What it belongs to.
        got: Work,
        /// What is under way.
        current: String,
    },
    /// The node was not announced, or was credited already.
    #[error("node {0} is not awaited from {1}")]
    Unexpected(NodeId, MemberId),
    /// A newer checkpoint was asked for.
    #[error("checkpoint {} is not the newest", .0.0)]
    OldCheckpoint(CheckpointId),
    /// The run has ended.
    #[error("the run has ended")]
    Finished,
}
