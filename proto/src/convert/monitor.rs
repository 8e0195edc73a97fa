//! Events and states. They are for people: a negative zero may arrive as a positive one, which protobuf encoders drop.

use std::time::Duration;

use lockstep_common::progress::{
    Breakdown, EpochReport, Event, RoundReport, RunState, RunStatus, TimedEvent, Transport, WorkerStatus,
};

use super::{At, WireEnum, clip, digest, digest_bytes, each, micros, required, text, wire_enum};
use crate::limits::MAX_TEXT_BYTES;
use crate::v1::{self, run_state, timed_event};
use crate::wire_error::WireError;

wire_enum!(Transport, InProcess, SharedMemory, Grpc);

impl From<&RoundReport> for v1::RoundReport {
    fn from(round: &RoundReport) -> Self {
        Self {
            round: round.round,
            epoch: round.epoch,
            batch: round.batch,
            loss: round.loss,
            gradient_norm: round.gradient_norm,
            samples: round.samples,
            parameters: digest_bytes(round.parameters),
            workers: round.workers,
            duration_micros: micros(round.duration),
            compute_micros: micros(round.breakdown.compute),
            transfer_micros: micros(round.breakdown.transfer),
            reduce_micros: micros(round.breakdown.reduce),
            update_micros: micros(round.breakdown.update),
            wait_micros: micros(round.breakdown.wait),
            hedged: round.hedged,
            skipped: round.skipped,
        }
    }
}

impl TryFrom<v1::RoundReport> for RoundReport {
    type Error = WireError;

    fn try_from(round: v1::RoundReport) -> Result<Self, WireError> {
        Ok(Self {
            round: round.round,
            epoch: round.epoch,
            batch: round.batch,
            loss: round.loss,
            gradient_norm: round.gradient_norm,
            samples: round.samples,
            parameters: digest(&round.parameters).at("RoundReport", "parameters")?,
            workers: round.workers,
            hedged: round.hedged,
            skipped: round.skipped,
            duration: Duration::from_micros(round.duration_micros),
            breakdown: Breakdown {
                compute: Duration::from_micros(round.compute_micros),
                transfer: Duration::from_micros(round.transfer_micros),
                reduce: Duration::from_micros(round.reduce_micros),
                update: Duration::from_micros(round.update_micros),
                wait: Duration::from_micros(round.wait_micros),
            },
        })
    }
}

impl From<&EpochReport> for v1::EpochReport {
    fn from(epoch: &EpochReport) -> Self {
        Self {
            epoch: epoch.epoch,
            rounds: epoch.rounds,
            train_loss: epoch.train_loss,
            validation_loss: epoch.validation_loss,
        }
    }
}

impl From<v1::EpochReport> for EpochReport {
    fn from(epoch: v1::EpochReport) -> Self {
        Self {
            epoch: epoch.epoch,
            rounds: epoch.rounds,
            train_loss: epoch.train_loss,
            validation_loss: epoch.validation_loss,
        }
    }
}

impl From<&RunState> for v1::RunState {
    fn from(state: &RunState) -> Self {
        use run_state::State;
        let reason = |reason: &String| clip(reason.clone(), MAX_TEXT_BYTES);
        let state = match state {
            RunState::Waiting { reason: why } => State::Waiting(v1::Waiting { reason: reason(why) }),
            RunState::Training => State::Training(v1::Training {}),
            RunState::Evaluating => State::Evaluating(v1::Evaluating {}),
            RunState::Finished { reason: how } => State::Ended(v1::Ended { reason: reason(how) }),
        };
        Self { state: Some(state) }
    }
}

impl TryFrom<v1::RunState> for RunState {
    type Error = WireError;

    fn try_from(state: v1::RunState) -> Result<Self, WireError> {
        use run_state::State;
        const M: &str = "RunState";
        Ok(match state.state.ok_or_else(|| WireError::missing(M, "state"))? {
            State::Waiting(waiting) => Self::Waiting { reason: text(waiting.reason).at(M, "waiting.reason")? },
            State::Training(v1::Training {}) => Self::Training,
            State::Evaluating(v1::Evaluating {}) => Self::Evaluating,
            State::Ended(ended) => Self::Finished { reason: text(ended.reason).at(M, "ended.reason")? },
        })
    }
}

impl From<&TimedEvent> for v1::TimedEvent {
    fn from(timed: &TimedEvent) -> Self {
        use timed_event::Event as Wire;
        let short = |text: &String| clip(text.clone(), MAX_TEXT_BYTES);
        let event = match &timed.event {
            Event::Round(round) => Wire::Round(round.into()),
            Event::Epoch(epoch) => Wire::Epoch(epoch.into()),
            Event::Joined { member, name } => {
                Wire::Joined(v1::MemberJoined { member: Some((*member).into()), name: short(name) })
            }
            Event::Left { member, reason } => {
                Wire::Left(v1::MemberLeft { member: Some((*member).into()), reason: short(reason) })
            }
            Event::State { state } => Wire::State(state.into()),
            Event::Notice { message } => Wire::Notice(v1::Notice { message: short(message) }),
        };
        Self { unix_ms: timed.unix_ms, event: Some(event) }
    }
}

impl TryFrom<v1::TimedEvent> for TimedEvent {
    type Error = WireError;

    fn try_from(timed: v1::TimedEvent) -> Result<Self, WireError> {
        use timed_event::Event as Wire;
        const M: &str = "TimedEvent";
        let event = match timed.event.ok_or_else(|| WireError::missing(M, "event"))? {
            Wire::Round(round) => Event::Round(round.try_into().map_err(|error: WireError| error.within(M, "round"))?),
            Wire::Epoch(epoch) => Event::Epoch(epoch.into()),
            Wire::Joined(joined) => Event::Joined {
                member: required(M, "joined.member", joined.member)?,
                name: text(joined.name).at(M, "joined.name")?,
            },
            Wire::Left(left) => Event::Left {
                member: required(M, "left.member", left.member)?,
                reason: text(left.reason).at(M, "left.reason")?,
            },
            Wire::State(state) => {
                Event::State { state: state.try_into().map_err(|error: WireError| error.within(M, "state"))? }
            }
            Wire::Notice(notice) => Event::Notice { message: text(notice.message).at(M, "notice.message")? },
        };
        Ok(Self { unix_ms: timed.unix_ms, event })
    }
}

impl From<&TimedEvent> for v1::WatchResponse {
    fn from(event: &TimedEvent) -> Self {
        Self { event: Some(event.into()) }
    }
}

impl TryFrom<v1::WatchResponse> for TimedEvent {
    type Error = WireError;

    fn try_from(response: v1::WatchResponse) -> Result<Self, WireError> {
        required("WatchResponse", "event", response.event)
    }
}

impl From<&RunStatus> for v1::GetRunResponse {
    fn from(status: &RunStatus) -> Self {
        let run = v1::RunStatus {
            run: status.run.clone(),
            model: status.model.clone(),
            parameters: status.parameters,
            state: Some((&status.state).into()),
            rounds: status.rounds,
            total_rounds: status.total_rounds,
            rounds_per_epoch: status.rounds_per_epoch,
            batch_size: status.batch_size,
            shards: status.shards,
            workers: status.workers,
            min_workers: status.min_workers,
            samples_seen: status.samples_seen,
            samples_per_second: status.samples_per_second,
            loss: status.loss,
            train_loss: status.train_loss,
            validation_loss: status.validation_loss,
            version: status.version.clone(),
            problems: status.problems.iter().map(|problem| clip(problem.clone(), MAX_TEXT_BYTES)).collect(),
        };
        Self { run: Some(run) }
    }
}

impl TryFrom<v1::RunStatus> for RunStatus {
    type Error = WireError;

    fn try_from(status: v1::RunStatus) -> Result<Self, WireError> {
        const M: &str = "RunStatus";
        Ok(Self {
            run: text(status.run).at(M, "run")?,
            model: text(status.model).at(M, "model")?,
            parameters: status.parameters,
            state: required(M, "state", status.state)?,
            rounds: status.rounds,
            total_rounds: status.total_rounds,
            rounds_per_epoch: status.rounds_per_epoch,
            batch_size: status.batch_size,
            shards: status.shards,
            workers: status.workers,
            min_workers: status.min_workers,
            samples_seen: status.samples_seen,
            samples_per_second: status.samples_per_second,
            loss: status.loss,
            train_loss: status.train_loss,
            validation_loss: status.validation_loss,
            version: text(status.version).at(M, "version")?,
            problems: status
                .problems
                .into_iter()
                .map(|problem| text(problem).at(M, "problems"))
                .collect::<Result<_, _>>()?,
        })
    }
}

impl TryFrom<v1::GetRunResponse> for RunStatus {
    type Error = WireError;

    fn try_from(response: v1::GetRunResponse) -> Result<Self, WireError> {
        required("GetRunResponse", "run", response.run)
    }
}

impl From<&WorkerStatus> for v1::WorkerStatus {
    fn from(worker: &WorkerStatus) -> Self {
        Self {
            member: Some(worker.member.into()),
            name: clip(worker.name.clone(), MAX_TEXT_BYTES),
            isa: clip(worker.isa.clone(), MAX_TEXT_BYTES),
            threads: worker.threads,
            leaves: worker.leaves.clone(),
            cached_shards: worker.cached_shards,
            leaves_computed: worker.leaves_computed,
            last_compute_micros: worker.last_compute.map(micros),
            silent_micros: micros(worker.silent_for),
            transport: v1::Transport::from(worker.transport).into(),
            leaf_micros: worker.leaf_time.map(micros),
            leaves_hedged: worker.leaves_hedged,
        }
    }
}

impl TryFrom<v1::WorkerStatus> for WorkerStatus {
    type Error = WireError;

    fn try_from(worker: v1::WorkerStatus) -> Result<Self, WireError> {
        const M: &str = "WorkerStatus";
        Ok(Self {
            member: required(M, "member", worker.member)?,
            name: text(worker.name).at(M, "name")?,
            isa: text(worker.isa).at(M, "isa")?,
            threads: worker.threads,
            leaves: worker.leaves,
            cached_shards: worker.cached_shards,
            leaves_computed: worker.leaves_computed,
            last_compute: worker.last_compute_micros.map(Duration::from_micros),
            silent_for: Duration::from_micros(worker.silent_micros),
            transport: Transport::from_wire(worker.transport).at(M, "transport")?,
            leaf_time: worker.leaf_micros.map(Duration::from_micros),
            leaves_hedged: worker.leaves_hedged,
        })
    }
}

impl From<&[WorkerStatus]> for v1::ListWorkersResponse {
    fn from(workers: &[WorkerStatus]) -> Self {
        Self { workers: workers.iter().map(Into::into).collect() }
    }
}

/// The members in a response.
///
/// # Errors
/// [`WireError`] when an entry is malformed.
pub fn workers(response: v1::ListWorkersResponse) -> Result<Vec<WorkerStatus>, WireError> {
    each("ListWorkersResponse", "workers", response.workers)
}
