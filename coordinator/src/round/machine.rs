//! The round state machine: events in, effects out.
//!
//! A run is a sequence of works: rounds, and an evaluation after each epoch. A work is begun at an *edge*, when nothing
//! else is under way; that is when joiners become active and shards are divided anew. Inside a work, members only get
//! fewer, and the leaves of those that are lost go to the others. See the table of transitions in ARCHITECTURE.md.

use std::collections::VecDeque;
use std::time::Duration;

use lockstep_common::checkpoint::Skipped;
use lockstep_common::config::RunSpec;
use lockstep_common::hash::Digest;
use lockstep_common::protocol::{MemberId, NodeReport, Refusal, Work};
use lockstep_common::reduce::NodeId;

use super::assign::Ownership;
use super::checkpoint::{Ending, LastCheckpoint};
use super::commit::Complete;
use super::event::{Effect, Event, Outcome, Rejected};
use super::membership::{Member, MemberState, Membership};
use super::pace::Balance;
use super::work::{Progress, Reduced};
use crate::expected::ExpectedSamples;

/// How long a run that is told to stop goes on to complete the round under way, so that nothing of it is lost. Half of
/// what `docker stop` waits before it kills.
const STOP_GRACE: Duration = Duration::from_secs(5);

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

#[derive(Debug)]
pub(super) enum State {
    /// At an edge, for want of members.
    Waiting,
    Working(Box<Progress>),
    /// Nothing is left to do but to wait for the last checkpoint.
    Ending(Ending),
    Finished,
}

/// The machine. See the module's documentation.
#[derive(Debug)]
pub struct Machine {
    pub(super) config: MachineConfig,
    pub(super) state: State,
    pub(super) members: Membership,
    pub(super) ownership: Ownership,
    pub(super) balance: Balance,
    /// How long the last rounds took.
    pub(super) recent_rounds: VecDeque<Duration>,
    pub(super) expected: ExpectedSamples,
    /// Rounds completed.
    pub(super) rounds: u64,
    /// The last version whose validation loss is known or not wanted.
    pub(super) evaluated: u64,
    pub(super) epoch_loss: EpochLoss,
    pub(super) samples_seen: u64,
    pub(super) workers_lost: u32,
    /// Rounds without a step.
    pub(super) skipped: Skipped,
    /// The round at hand, if it is complete and not finite.
    pub(super) suspect: Option<Complete>,
    pub(super) last_checkpoint: LastCheckpoint,
    /// Set when the run is to end at the next edge.
    pub(super) stopping: Option<Stopping>,
    /// See [`Machine::coming_back`].
    pub(super) comes_back: bool,
}

/// Why the run is to end, and when it ends in any case.
#[derive(Clone, Debug)]
pub(super) struct Stopping {
    pub(super) reason: String,
    deadline: Duration,
}

/// Sum over the rounds of the epoch at hand.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct EpochLoss {
    pub(super) sum: f64,
    pub(super) samples: u64,
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
            balance: Balance::default(),
            recent_rounds: VecDeque::new(),
            expected,
            rounds: 0,
            evaluated: 0,
            epoch_loss: EpochLoss::default(),
            samples_seen: 0,
            workers_lost: 0,
            skipped: Skipped::default(),
            suspect: None,
            last_checkpoint: LastCheckpoint::default(),
            stopping: None,
            comes_back: false,
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
            (State::Working(progress), Event::Stop(reason)) if matches!(progress.work, Work::Gradient { .. }) => {
                // Asked again, it does not wait longer.
                self.stopping.get_or_insert(Stopping { reason, deadline: now + STOP_GRACE });
                self.stop_if_vain(now, &mut effects);
            }
            // Whoever is in such a hurry gets what there is.
            (State::Ending(ending), Event::Stop(_)) => self.end(ending.outcome.clone(), &mut effects),
            (_, Event::Stop(reason)) => self.finish(now, Outcome::Stopped(reason), &mut effects),
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
            (_, Event::Violated(id, reason)) => {
                self.member(now, id)?;
                self.evict(id, &reason, &mut effects);
                self.recruit(now, &mut effects);
            }
            (_, Event::Saved(id)) => self.settled(id, true, &mut effects)?,
            (_, Event::NotSaved(id)) => self.settled(id, false, &mut effects)?,
            (_, Event::Tick) => {
                self.expire(now, &mut effects);
                self.hedge(now, &mut effects);
                self.stop_if_vain(now, &mut effects);
                self.end_if_done(now, &mut effects);
                self.review_and_recruit(now, &mut effects);
                self.hurry(now, &mut effects);
            }
            (_, Event::Announced(member, report)) => self.announced(now, member, report, &mut effects)?,
            (_, Event::Computed { member, work, node, compute }) => self.computed(now, member, work, node, compute)?,
            (_, Event::Compared(member, report)) => self.compared(now, member, &report, &mut effects)?,
            (_, Event::Arrived { member, work, node }) => self.arrived(now, member, work, node, &mut effects)?,
            (_, Event::Reduced { round, gradient_norm, parameters, stepped, took }) => {
                let progress = self.at_work(Work::Gradient { round })?;
                progress.reduced = Some(Reduced { gradient_norm, parameters, stepped, took });
                self.try_commit(now, round, &mut effects);
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

    /// Whether a member owes nothing to the work at hand, neither leaves nor an answer to a check.
    pub(super) fn has_delivered(&self, member: MemberId) -> bool {
        match &self.state {
            State::Working(progress) => progress.outstanding(member).is_empty() && !progress.is_checked(member),
            _ => true,
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
    pub(super) fn member(&mut self, now: Duration, id: MemberId) -> Result<&mut Member, Rejected> {
        let member = self.members.get_mut(id).ok_or(Rejected::NotAMember(id))?;
        member.last_seen = now;
        Ok(member)
    }

    /// Ends a run that is told to stop, if the round under way takes too long or nobody computes it.
    fn stop_if_vain(&mut self, now: Duration, effects: &mut Vec<Effect>) {
        let nobody = self.members.len() == 0;
        if let Some(Stopping { reason, .. }) = self.stopping.take_if(|stopping| nobody || now >= stopping.deadline) {
            self.finish(now, Outcome::Stopped(reason), effects);
        }
    }

    fn announced(
        &mut self,
        now: Duration,
        id: MemberId,
        report: NodeReport,
        effects: &mut Vec<Effect>,
    ) -> Result<(), Rejected> {
        let member = self.member(now, id)?;
        member.owes_since = Some(now);
        if let Err(stale) = self.at_work(report.work) {
            // A gradient that is still being computed is no leaf yet.
            let leaves = report.compute.map_or(0, |_| report.digests.len());
            self.delivered_late(now, id, report.work, leaves as u32);
            return Err(stale);
        }
        if let Err(reason) = self.expected.check(&report) {
            self.evict(id, &reason, effects);
            self.recruit(now, effects);
            return Ok(());
        }
        let (work, node, loss) = (report.work, report.node, report.loss);
        if let Err(reason) = self.answer(now, id, &report) {
            self.evict(id, &reason, effects);
            self.recruit(now, effects);
            return Ok(());
        }
        self.review_and_recruit(now, effects);
        if self.members.get(id).is_none() {
            return Ok(());
        }
        let progress = self.at_work(work)?;
        progress.announce(id, report);
        match work {
            Work::Gradient { .. } if progress.is_checked(id) => {
                progress.held.insert(id);
                effects.push(Effect::Hold(id, node, loss));
            }
            Work::Gradient { .. } => effects.push(Effect::Expect(id, node, loss)),
            Work::Evaluation { .. } | Work::Inspection { .. } => self.arrived(now, id, work, node, effects)?,
        }
        Ok(())
    }

    fn computed(
        &mut self,
        now: Duration,
        id: MemberId,
        work: Work,
        node: NodeId,
        compute: Duration,
    ) -> Result<(), Rejected> {
        self.member(now, id)?;
        match self.at_work(work) {
            Ok(progress) => progress.computed(id, node, compute).ok_or(Rejected::Unexpected(node, id))?,
            Err(stale) => {
                self.delivered_late(now, id, work, node.leaves().len() as u32);
                return Err(stale);
            }
        }
        self.member(now, id)?.owes_since = Some(now);
        Ok(())
    }

    /// Leaves were computed too late to count, but that shows how fast the member is.
    fn delivered_late(&mut self, now: Duration, id: MemberId, work: Work, leaves: u32) {
        if let Some(member) = self.members.get_mut(id) {
            member.pace.delivered(now, work, leaves);
            if member.pace.is_free() {
                member.owes_since = None;
            }
        }
    }

    fn arrived(
        &mut self,
        now: Duration,
        id: MemberId,
        work: Work,
        node: NodeId,
        effects: &mut Vec<Effect>,
    ) -> Result<(), Rejected> {
        let progress = self.at_work(work)?;
        // The sender may be lost by now; what it announced and delivered counts all the same.
        let new = progress.credit(id, node).ok_or(Rejected::Unexpected(node, id))?;
        let compute = progress.longest_compute;
        let complete = progress.complete();
        if let Some(member) = self.members.get_mut(id) {
            member.last_seen = now;
            member.leaves_computed += u64::from(new);
            member.last_compute = Some(compute);
            let finished = member.pace.delivered(now, work, node.leaves().len() as u32);
            member.owes_since = if member.pace.is_free() { None } else { Some(now) };
            if let Some(took) = finished.filter(|_| !self.ownership.of(id).is_empty()) {
                self.at_work(work)?.note_finish(id, took);
            }
        }
        match (work, complete) {
            (Work::Evaluation { round }, Some(totals)) => {
                self.evaluated = round;
                self.close_epoch(Some(totals.loss / f64::from(totals.samples)), effects);
                self.begin_next(now, effects);
            }
            (Work::Gradient { round }, Some(_)) => {
                self.release_drained(effects);
                self.try_commit(now, round, effects);
            }
            (Work::Inspection { .. }, Some(_)) => self.inspected(now, effects),
            (_, None) => {
                self.release_drained(effects);
                self.hedge(now, effects);
            }
        }
        Ok(())
    }

    /// The work under way, if it is the one that a message is about.
    pub(super) fn at_work(&mut self, got: Work) -> Result<&mut Progress, Rejected> {
        match &mut self.state {
            State::Working(progress) => {
                if progress.work == got {
                    Ok(progress)
                } else {
                    Err(Rejected::Stale { got, current: progress.work.to_string() })
                }
            }
            State::Waiting => Err(Rejected::Stale { got, current: "waiting for workers".to_owned() }),
            State::Ending(_) | State::Finished => Err(Rejected::Stale { got, current: "the run ends".to_owned() }),
        }
    }
}
