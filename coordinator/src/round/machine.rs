//! The round state machine: events in, effects out.
//!
//! A run is a sequence of works: rounds, and an evaluation after each epoch. A work is begun at an *edge*, when nothing
//! else is under way; that is when joiners become active and shards are divided anew. Inside a work, members only get
//! fewer, and the leaves of those that are lost go to the others. See the table of transitions in ARCHITECTURE.md.

use std::time::Duration;

use lockstep_common::config::RunSpec;
use lockstep_common::hash::Digest;
use lockstep_common::ledger::Record;
use lockstep_common::progress::{EpochReport, Event as Progressed, RoundReport, RunState};
use lockstep_common::protocol::{JoinRequest, KeepList, MemberId, NodeReport, Refusal, ShardRef, Split, Work};
use lockstep_common::reduce::NodeId;

use super::assign::Ownership;
use super::membership::{ConnectionId, Member, MemberState, Membership};
use super::work::Progress;
use crate::expected::ExpectedSamples;

/// What the machine must know beforehand.
#[derive(Clone, Debug)]
pub struct MachineConfig {
    /// The run.
    pub spec: RunSpec,
    /// Version that workers must have.
    pub version: String,
    /// Numerics fingerprint that workers must have.
    pub fingerprint: Digest,
}

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
    /// The gradient of a round is summed and the optimizer step is taken.
    Reduced {
        /// Which round.
        round: u64,
        /// Euclidean norm of the mean gradient.
        gradient_norm: f64,
        /// Digest of the new parameters.
        parameters: Digest,
    },
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
    },
    /// Take the parts of a node's gradient when they come.
    Expect(MemberId, NodeId),
    /// Append a round to the ledger.
    Record(Record),
    /// Tell the outside world.
    Publish(Progressed),
    /// The run has ended.
    Finish(Outcome),
}

/// What members are told.
#[derive(Clone, Debug, PartialEq)]
pub enum ToMember {
    /// Have these shards.
    Keep(KeepList),
    /// A whole version of the parameters; those of later rounds follow as they are made.
    Parameters(u64),
    /// Compute leaves; each with whether its samples must be sent along.
    Assign(Work, Vec<(u32, bool)>),
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
    /// The run has ended.
    #[error("the run has ended")]
    Finished,
}

#[derive(Debug)]
enum State {
    /// At an edge, for want of members.
    Waiting,
    Working(Progress),
    Finished,
}

/// The machine. See the module's documentation.
#[derive(Debug)]
pub struct Machine {
    config: MachineConfig,
    state: State,
    members: Membership,
    ownership: Ownership,
    expected: ExpectedSamples,
    /// Rounds completed.
    rounds: u64,
    /// The last version whose validation loss is known or not wanted.
    evaluated: u64,
    epoch_loss: EpochLoss,
    samples_seen: u64,
    workers_lost: u32,
}

/// Sum over the rounds of the epoch at hand.
#[derive(Clone, Copy, Debug, Default)]
struct EpochLoss {
    sum: f64,
    samples: u64,
}

impl Machine {
    /// A machine at the start of a run. Nothing happens until the first member joins.
    pub fn new(config: MachineConfig) -> Self {
        let expected = ExpectedSamples::new(config.spec.schedule, config.spec.validation_samples);
        Self {
            config,
            state: State::Waiting,
            members: Membership::default(),
            ownership: Ownership::default(),
            expected,
            rounds: 0,
            evaluated: 0,
            epoch_loss: EpochLoss::default(),
            samples_seen: 0,
            workers_lost: 0,
        }
    }

    /// Takes an event and says what is to be done, in order.
    ///
    /// # Errors
    /// [`Rejected`] when the event cannot be in this state; nothing has changed then.
    pub fn step(&mut self, now: Duration, event: Event) -> Result<Vec<Effect>, Rejected> {
        let mut effects = Vec::new();
        match (&self.state, event) {
            (State::Finished, Event::Join { connection, .. }) => {
                let reason = "all rounds are done".to_owned();
                effects.push(Effect::Refuse(connection, Refusal::Finished { reason }));
            }
            (State::Finished, Event::Tick) => {}
            (State::Finished, Event::Lost(member, _)) => {
                self.members.remove(member).ok_or(Rejected::NotAMember(member))?;
                effects.push(Effect::Close(member));
            }
            (State::Finished, _) => return Err(Rejected::Finished),
            (_, Event::Stop(reason)) => self.finish(Outcome::Stopped(reason), &mut effects),
            (_, Event::Join { connection, request }) => self.join(now, connection, &request, &mut effects),
            (_, Event::Heartbeat(member)) => self.member(now, member).map(|_| ())?,
            (_, Event::Cached(id, list, shard)) => {
                let member = self.member(now, id)?;
                // What an earlier list made it cache may have gone with the next one.
                if list == member.keep_list {
                    member.cached.insert(shard);
                }
            }
            (_, Event::Drain(member)) => {
                self.member(now, member)?.state = MemberState::Draining;
                self.release_drained(&mut effects);
                self.recruit(now, &mut effects);
            }
            (_, Event::Lost(member, reason)) => self.lose(now, member, &reason, &mut effects)?,
            (_, Event::Tick) => self.expire(now, &mut effects),
            (_, Event::Announced(member, report)) => self.announced(now, member, report, &mut effects)?,
            (_, Event::Arrived { member, work, node }) => self.arrived(now, member, work, node, &mut effects)?,
            (_, Event::Reduced { round, gradient_norm, parameters }) => {
                self.reduced(now, round, gradient_norm, parameters, &mut effects)?;
            }
        }
        Ok(effects)
    }

    /// Members that get the parts of new parameters as they are made.
    pub fn receivers(&self) -> impl Iterator<Item = MemberId> {
        let current = self.members.iter().filter(|(_, member)| member.state != MemberState::Waiting);
        current.map(|(id, _)| id)
    }

    /// All members.
    pub fn members(&self) -> impl Iterator<Item = (MemberId, &Member)> {
        self.members.iter()
    }

    /// Leaves that a member is to compute at present.
    pub fn outstanding(&self, member: MemberId) -> Vec<u32> {
        match &self.state {
            State::Working(progress) => progress.outstanding(member),
            _ => Vec::new(),
        }
    }

    /// Rounds completed.
    pub fn rounds(&self) -> u64 {
        self.rounds
    }

    /// Training samples used over all rounds.
    pub fn samples_seen(&self) -> u64 {
        self.samples_seen
    }

    /// Workers ever admitted, and members lost without having drained.
    pub fn workers_seen_and_lost(&self) -> (u32, u32) {
        (self.members.workers_seen(), self.workers_lost)
    }

    /// Looks up a member and notes that it is alive.
    fn member(&mut self, now: Duration, id: MemberId) -> Result<&mut Member, Rejected> {
        let member = self.members.get_mut(id).ok_or(Rejected::NotAMember(id))?;
        member.last_seen = now;
        Ok(member)
    }

    fn join(&mut self, now: Duration, connection: ConnectionId, request: &JoinRequest, effects: &mut Vec<Effect>) {
        let MachineConfig { version, fingerprint, .. } = &self.config;
        let refusal = if request.version != *version {
            Some(Refusal::Version { run: version.clone(), worker: request.version.clone() })
        } else if request.fingerprint != *fingerprint {
            Some(Refusal::Fingerprint { run: *fingerprint, worker: request.fingerprint })
        } else {
            None
        };
        if let Some(refusal) = refusal {
            effects.push(Effect::Refuse(connection, refusal));
            return;
        }
        let (member, replaced) = self.members.admit(now, request);
        effects.push(Effect::Admit(connection, member));
        effects.push(Effect::Publish(Progressed::Joined { member, name: request.name.clone() }));
        if let Some(replaced) = replaced {
            self.remove(replaced, &format!("{member} took its place"), effects);
        }
        self.recruit(now, effects);
    }

    fn lose(&mut self, now: Duration, id: MemberId, reason: &str, effects: &mut Vec<Effect>) -> Result<(), Rejected> {
        if self.members.get(id).is_none() {
            return Err(Rejected::NotAMember(id));
        }
        self.remove(id, reason, effects);
        self.recruit(now, effects);
        Ok(())
    }

    /// Evicts members whose lease has expired.
    fn expire(&mut self, now: Duration, effects: &mut Vec<Effect>) {
        let lease = self.config.spec.lease_timeout;
        let expired = self.members.expired(now, lease);
        for (member, silent) in &expired {
            let reason = format!("silent for {:.1} s, the lease is {:.1} s", silent.as_secs_f64(), lease.as_secs_f64());
            self.evict(*member, &reason, effects);
        }
        if !expired.is_empty() {
            self.recruit(now, effects);
        }
    }

    fn evict(&mut self, member: MemberId, reason: &str, effects: &mut Vec<Effect>) {
        effects.push(Effect::Send(member, ToMember::Evicted(reason.to_owned())));
        self.remove(member, reason, effects);
    }

    fn remove(&mut self, member: MemberId, reason: &str, effects: &mut Vec<Effect>) {
        self.members.remove(member);
        self.workers_lost += 1;
        if let State::Working(progress) = &mut self.state {
            progress.forget(member);
        }
        effects.push(Effect::Close(member));
        effects.push(Effect::Publish(Progressed::Left { member, reason: reason.to_owned() }));
    }

    /// Lets members go that want to leave and have nothing left to deliver.
    fn release_drained(&mut self, effects: &mut Vec<Effect>) {
        let draining = self.members.iter().filter(|(_, member)| member.state == MemberState::Draining);
        let done: Vec<MemberId> = draining.map(|(id, _)| id).filter(|&id| self.outstanding(id).is_empty()).collect();
        for member in done {
            self.members.remove(member);
            effects.push(Effect::Send(member, ToMember::Finished("drained".to_owned())));
            effects.push(Effect::Close(member));
            effects.push(Effect::Publish(Progressed::Left { member, reason: "drained".to_owned() }));
        }
    }

    /// After a change of members: hands out leaves that nobody computes, or begins work that had to wait.
    fn recruit(&mut self, now: Duration, effects: &mut Vec<Effect>) {
        match &self.state {
            State::Waiting => self.begin_next(now, effects),
            State::Working(progress) if !progress.unassigned().is_empty() => {
                if self.members.active().is_empty() {
                    self.call_up(MemberState::Recruited, effects);
                }
                self.hand_out(effects);
            }
            State::Working(_) | State::Finished => {}
        }
    }

    /// Makes waiting members take part: they get the current parameters.
    fn call_up(&mut self, state: MemberState, effects: &mut Vec<Effect>) {
        let version = self.rounds;
        for (id, member) in self.members.iter_mut() {
            if matches!(member.state, MemberState::Waiting | MemberState::Recruited) {
                member.state = state;
                effects.push(Effect::Send(id, ToMember::Parameters(version)));
            }
        }
    }

    /// Divides the leaves that nobody computes evenly among the active members.
    fn hand_out(&mut self, effects: &mut Vec<Effect>) {
        let State::Working(progress) = &self.state else { return };
        let leaves = progress.unassigned();
        let active = self.members.active();
        for (member, part) in Ownership::divide(leaves.len() as u32, &active).parts() {
            self.assign(*member, &leaves[part.start as usize..part.end as usize], effects);
        }
    }

    fn assign(&mut self, member: MemberId, leaves: &[u32], effects: &mut Vec<Effect>) {
        let (State::Working(progress), false) = (&mut self.state, leaves.is_empty()) else { return };
        progress.assign(leaves, member);
        let split = progress.work.split();
        let cached = self.members.get(member).map(|member| &member.cached);
        let has = |shard: u32| cached.is_some_and(|cached| cached.contains(&ShardRef { split, shard }));
        let tasks = leaves.iter().map(|&leaf| (leaf, !has(leaf))).collect();
        effects.push(Effect::Send(member, ToMember::Assign(progress.work, tasks)));
    }

    /// What comes after the rounds completed so far; `None` when the run is over.
    fn next_work(&self) -> Option<Work> {
        let spec = &self.config.spec;
        let over = self.rounds == spec.total_rounds();
        let edge = over || self.rounds.is_multiple_of(u64::from(spec.schedule.rounds_per_epoch()));
        if edge && self.evaluated < self.rounds && spec.validation_samples > 0 {
            return Some(Work::Evaluation { round: self.rounds });
        }
        (!over).then_some(Work::Gradient { round: self.rounds })
    }

    /// At an edge: calls up joiners, divides the shards, begins the next work; or says what is missing.
    fn begin_next(&mut self, now: Duration, effects: &mut Vec<Effect>) {
        let Some(work) = self.next_work() else {
            return self.finish(Outcome::Completed, effects);
        };
        self.release_drained(effects);
        let needed = self.config.spec.min_workers;
        if self.members.len() < needed {
            self.state = State::Waiting;
            let reason = format!("{work} needs {needed} workers, {} are here", self.members.len());
            effects.push(Effect::Publish(Progressed::State { state: RunState::Waiting { reason } }));
            return;
        }
        self.call_up(MemberState::Active, effects);
        let tree = self.config.spec.schedule.tree;
        let ownership = Ownership::divide(tree.shards(), &self.members.active());
        if ownership != self.ownership {
            self.ownership = ownership;
            self.tell_shards(effects);
        }
        if let Work::Gradient { round } = work {
            let samples = self.config.spec.schedule.batch_samples(self.config.spec.schedule.step(round).batch);
            effects.push(Effect::Begin { round, samples });
        }
        self.state = State::Working(Progress::new(work, tree, now));
        for (member, part) in self.ownership.parts().to_vec() {
            self.assign(member, &part.collect::<Vec<u32>>(), effects);
        }
    }

    fn tell_shards(&mut self, effects: &mut Vec<Effect>) {
        let validation = self.config.spec.validation_samples > 0;
        for (id, part) in self.ownership.parts() {
            let Some(member) = self.members.get_mut(*id) else { continue };
            let of = |split| part.clone().map(move |shard| ShardRef { split, shard });
            let mut shards: Vec<ShardRef> = of(Split::Training).collect();
            if validation {
                shards.extend(of(Split::Validation));
            }
            member.keep_list += 1;
            member.cached.clear();
            effects.push(Effect::Send(*id, ToMember::Keep(KeepList { list: member.keep_list, shards })));
        }
    }

    fn announced(
        &mut self,
        now: Duration,
        id: MemberId,
        report: NodeReport,
        effects: &mut Vec<Effect>,
    ) -> Result<(), Rejected> {
        self.member(now, id)?;
        let State::Working(progress) = &mut self.state else {
            return Err(Rejected::Stale { got: report.work, current: "waiting for workers".to_owned() });
        };
        if report.work != progress.work {
            return Err(Rejected::Stale { got: report.work, current: progress.work.to_string() });
        }
        if let Err(reason) = self.expected.check(&report) {
            self.evict(id, &reason, effects);
            self.recruit(now, effects);
            return Ok(());
        }
        let (work, node) = (report.work, report.node);
        progress.announce(id, report);
        match work {
            Work::Gradient { .. } => effects.push(Effect::Expect(id, node)),
            Work::Evaluation { .. } => self.arrived(now, id, work, node, effects)?,
        }
        Ok(())
    }

    fn arrived(
        &mut self,
        now: Duration,
        id: MemberId,
        work: Work,
        node: NodeId,
        effects: &mut Vec<Effect>,
    ) -> Result<(), Rejected> {
        self.member(now, id)?;
        let State::Working(progress) = &mut self.state else {
            return Err(Rejected::Stale { got: work, current: "waiting for workers".to_owned() });
        };
        if work != progress.work {
            return Err(Rejected::Stale { got: work, current: progress.work.to_string() });
        }
        let new = progress.credit(id, node).ok_or(Rejected::Unexpected(node, id))?;
        let compute = progress.longest_compute;
        let complete = progress.complete();
        if let Some(member) = self.members.get_mut(id) {
            member.leaves_computed += u64::from(new);
            member.last_compute = Some(compute);
        }
        if let (Work::Evaluation { round }, Some(totals)) = (work, complete) {
            self.evaluated = round;
            self.close_epoch(Some(totals.loss / f64::from(totals.samples)), effects);
            self.begin_next(now, effects);
        } else {
            self.release_drained(effects);
        }
        Ok(())
    }

    /// A round's new parameters are there: the round is committed.
    fn reduced(
        &mut self,
        now: Duration,
        round: u64,
        gradient_norm: f64,
        parameters: Digest,
        effects: &mut Vec<Effect>,
    ) -> Result<(), Rejected> {
        let stale = |current: String| Rejected::Stale { got: Work::Gradient { round }, current };
        let State::Working(progress) = &self.state else {
            return Err(stale("waiting for workers".to_owned()));
        };
        let complete = progress.complete().filter(|_| progress.work == Work::Gradient { round });
        let Some(totals) = complete else {
            return Err(stale(progress.work.to_string()));
        };
        let step = self.config.spec.schedule.step(round);
        let loss = totals.loss / f64::from(totals.samples);
        effects.push(Effect::Record(Record {
            round,
            epoch: step.epoch,
            batch: step.batch,
            samples: totals.samples,
            loss,
            gradient_norm,
            parameters,
            nodes: progress.contributions(),
            leaves: progress.digests(),
        }));
        effects.push(Effect::Publish(Progressed::Round(RoundReport {
            round,
            epoch: step.epoch,
            batch: step.batch,
            loss,
            gradient_norm,
            samples: totals.samples,
            parameters,
            workers: progress.contributors(),
            duration: now.saturating_sub(progress.started),
            compute: progress.longest_compute,
        })));
        self.rounds = round + 1;
        self.samples_seen += u64::from(totals.samples);
        self.epoch_loss.sum += totals.loss;
        self.epoch_loss.samples += u64::from(totals.samples);
        if !loss.is_finite() || !gradient_norm.is_finite() {
            let reason = format!(
                "training diverged: in round {round} the loss is {loss} and the gradient's norm {gradient_norm}; lower optimizer.learning_rate"
            );
            self.finish(Outcome::Failed(reason), effects);
            return Ok(());
        }
        let closes = step.batch + 1 == self.config.spec.schedule.rounds_per_epoch()
            || self.rounds == self.config.spec.total_rounds();
        if closes && self.config.spec.validation_samples == 0 {
            self.evaluated = self.rounds;
            self.close_epoch(None, effects);
        }
        self.begin_next(now, effects);
        Ok(())
    }

    fn close_epoch(&mut self, validation_loss: Option<f64>, effects: &mut Vec<Effect>) {
        let EpochLoss { sum, samples } = std::mem::take(&mut self.epoch_loss);
        effects.push(Effect::Publish(Progressed::Epoch(EpochReport {
            epoch: self.config.spec.schedule.step(self.rounds - 1).epoch,
            rounds: self.rounds,
            train_loss: sum / samples as f64,
            validation_loss,
        })));
    }

    fn finish(&mut self, outcome: Outcome, effects: &mut Vec<Effect>) {
        let reason = match &outcome {
            Outcome::Completed => format!("all {} rounds are done", self.rounds),
            Outcome::Stopped(reason) | Outcome::Failed(reason) => reason.clone(),
        };
        for (member, _) in self.members.iter() {
            effects.push(Effect::Send(member, ToMember::Finished(reason.clone())));
        }
        self.state = State::Finished;
        effects.push(Effect::Publish(Progressed::State { state: RunState::Finished { reason } }));
        effects.push(Effect::Finish(outcome));
    }
}
