//! Edges and hand-outs: what is worked on next, who takes part, and who computes which leaf.

use std::time::Duration;

use lockstep_common::progress::{EpochReport, Event as Progressed, RunState};
use lockstep_common::protocol::{Handing, KeepList, MemberId, ShardRef, Split, Work};

use super::assign::Ownership;
use super::event::{Effect, Occasion, Outcome, Task, ToMember};
use super::hedge::in_words;
use super::machine::{EpochLoss, Machine, State, Stopping};
use super::membership::MemberState;
use super::work::Progress;

impl Machine {
    /// After a change of members: hands out leaves that nobody computes, or begins work that had to wait.
    pub(super) fn recruit(&mut self, now: Duration, effects: &mut Vec<Effect>) {
        self.review(now, effects);
        match &self.state {
            State::Waiting => self.begin_next(now, effects),
            State::Working(progress) if !progress.unassigned().is_empty() => {
                if self.members.active().is_empty() {
                    self.call_up(MemberState::Recruited, effects);
                }
                self.hand_out(now, effects);
            }
            State::Working(_) | State::Ending(_) | State::Finished => {}
        }
    }

    /// Says whether anybody is left to compute what has to be computed, whenever that changes.
    fn tell_desertion(&mut self, effects: &mut Vec<Effect>) {
        let State::Working(progress) = &mut self.state else { return };
        let missing = progress.unassigned();
        if progress.deserted != missing.is_empty() {
            return;
        }
        progress.deserted = !missing.is_empty();
        let state = match (progress.deserted, progress.work) {
            (true, work) => {
                let leaves = in_words(missing.into_iter());
                RunState::Waiting { reason: format!("{work} needs a worker for {leaves}, and none is left") }
            }
            (false, Work::Gradient { .. } | Work::Inspection { .. }) => RunState::Training,
            (false, Work::Evaluation { .. }) => RunState::Evaluating,
        };
        effects.push(Effect::Publish(Progressed::State { state }));
    }

    /// Makes waiting members take part: they get the current parameters.
    pub(super) fn call_up(&mut self, state: MemberState, effects: &mut Vec<Effect>) {
        let version = self.rounds;
        for (id, member) in self.members.iter_mut() {
            if matches!(member.state, MemberState::Waiting | MemberState::Recruited) {
                member.state = state;
                effects.push(Effect::Send(id, ToMember::Parameters(version)));
            }
        }
    }

    /// Divides the leaves that nobody computes among the active members.
    fn hand_out(&mut self, now: Duration, effects: &mut Vec<Effect>) {
        let State::Working(progress) = &self.state else { return };
        let leaves = progress.unassigned();
        let active = self.members.active();
        for (member, part) in Ownership::divide(leaves.len() as u32, &active).parts() {
            self.assign(now, *member, &leaves[part.start as usize..part.end as usize], effects);
        }
        self.tell_desertion(effects);
    }

    /// Sends leaves of the work at hand to a member, to compute them alone or beside one that is late.
    pub(super) fn assign(&mut self, now: Duration, member: MemberId, leaves: &[u32], effects: &mut Vec<Effect>) {
        let (State::Working(progress), false) = (&mut self.state, leaves.is_empty()) else { return };
        progress.assign(now, leaves, member);
        self.send_tasks(now, member, leaves, None, effects);
    }

    /// Sends leaves to a member, without noting that it is responsible for them. They are handed in as said, or as their
    /// checks demand.
    pub(super) fn send_tasks(
        &mut self,
        now: Duration,
        id: MemberId,
        leaves: &[u32],
        handing: Option<Handing>,
        effects: &mut Vec<Effect>,
    ) {
        let State::Working(progress) = &self.state else { return };
        if let Some(member) = self.members.get_mut(id) {
            member.pace.assigned(now, progress.work, leaves.len() as u32);
            member.owes_since.get_or_insert(now);
        }
        let split = progress.work.split();
        let cached = self.members.get(id).map(|member| &member.cached);
        let has = |shard: u32| cached.is_some_and(|cached| cached.contains(&ShardRef { split, shard }));
        let checked = |leaf| progress.checks.iter().any(|check| check.leaf() == leaf);
        let needed = |leaf| if checked(leaf) { Handing::Alone } else { Handing::Summed };
        let task = |&leaf: &u32| Task { leaf, inline: !has(leaf), handing: handing.unwrap_or(needed(leaf)) };
        let tasks = leaves.iter().map(task).collect();
        effects.push(Effect::Send(id, ToMember::Assign(progress.work, tasks)));
    }

    /// Gives members that are too slow for a part of their own the first leaf of somebody else's part to compute: so
    /// it shows when they have become faster. Nobody waits for them.
    fn measure_spares(&mut self, now: Duration, effects: &mut Vec<Effect>) {
        let Some((_, sample)) = self.ownership.parts().iter().find(|(_, part)| !part.is_empty()) else { return };
        let leaf = sample.start;
        for (id, part) in self.ownership.parts().to_vec() {
            if part.is_empty() && self.members.get(id).is_some_and(|member| member.pace.is_free()) {
                self.send_tasks(now, id, &[leaf], None, effects);
            }
        }
    }

    /// What comes after the rounds completed so far; `None` when the run is over.
    fn next_work(&self) -> Option<Work> {
        if let Some(inspection) = self.pending_inspection() {
            return Some(inspection);
        }
        let spec = &self.config.spec;
        let over = self.rounds == spec.total_rounds();
        let edge = over || self.rounds.is_multiple_of(u64::from(spec.schedule.rounds_per_epoch()));
        if edge && self.evaluated < self.rounds && spec.validation_samples > 0 {
            return Some(Work::Evaluation { round: self.rounds });
        }
        (!over).then_some(Work::Gradient { round: self.rounds })
    }

    /// Ends a run that goes on where nothing is left to do: nobody needs to join for that.
    pub(super) fn end_if_done(&mut self, now: Duration, effects: &mut Vec<Effect>) {
        if matches!(self.state, State::Waiting) && self.next_work().is_none() {
            self.finish(now, Outcome::Completed, effects);
        }
    }

    /// At an edge: calls up joiners, divides the shards, begins the next work; or says what is missing.
    pub(super) fn begin_next(&mut self, now: Duration, effects: &mut Vec<Effect>) {
        let Some(work) = self.next_work() else {
            return self.finish(now, Outcome::Completed, effects);
        };
        if let Some(Stopping { reason, .. }) = self.stopping.take() {
            return self.finish(now, Outcome::Stopped(reason), effects);
        }
        self.checkpoint_if_due(now, effects);
        self.release_drained(effects);
        let spec = &self.config.spec;
        let needed = if self.rounds == 0 { spec.start_workers } else { spec.min_workers };
        if self.members.len() < needed {
            self.state = State::Waiting;
            let plural = if needed == 1 { "worker" } else { "workers" };
            let reason = format!("{work} needs {needed} {plural}, {} here", self.members.len());
            effects.push(Effect::Publish(Progressed::State { state: RunState::Waiting { reason } }));
            return;
        }
        self.call_up(MemberState::Active, effects);
        let tree = self.config.spec.schedule.tree;
        let active = self.members.active();
        let best = Ownership::divide(tree.shards(), &active);
        let same_members = self.ownership.parts().iter().map(|(id, _)| id).eq(active.iter().map(|(id, _)| id));
        if !same_members || self.balance.should_move(&self.ownership, &best, &active) {
            let before = std::mem::replace(&mut self.ownership, best);
            self.tell_shards(&before, effects);
        }
        if let Work::Gradient { round } = work {
            let samples = self.config.spec.schedule.batch_samples(self.config.spec.schedule.step(round).batch);
            effects.push(Effect::Begin { round, samples, step: self.next_step() });
        }
        match (work, &self.state) {
            (Work::Evaluation { .. }, _) => {
                effects.push(Effect::Publish(Progressed::State { state: RunState::Evaluating }))
            }
            (Work::Gradient { .. } | Work::Inspection { .. }, State::Waiting) => {
                effects.push(Effect::Publish(Progressed::State { state: RunState::Training }));
            }
            _ => {}
        }
        let mut progress = Progress::new(work, tree, now);
        progress.checks = self.choose_checks(work);
        self.state = State::Working(Box::new(progress));
        for (member, part) in self.ownership.parts().to_vec() {
            self.assign(now, member, &part.collect::<Vec<u32>>(), effects);
        }
        if matches!(work, Work::Gradient { .. }) {
            self.measure_spares(now, effects);
        }
        self.review(now, effects);
    }

    /// Tells every member whose shards have changed which it should have.
    fn tell_shards(&mut self, before: &Ownership, effects: &mut Vec<Effect>) {
        let validation = self.config.spec.validation_samples > 0;
        for (id, part) in self.ownership.parts() {
            let Some(member) = self.members.get_mut(*id) else { continue };
            if member.keep_list > 0 && before.of(*id) == *part {
                continue;
            }
            let of = |split| part.clone().map(move |shard| ShardRef { split, shard });
            let mut shards: Vec<ShardRef> = of(Split::Training).collect();
            if validation {
                shards.extend(of(Split::Validation));
            }
            member.keep_list += 1;
            // A worker keeps what is on its new list, and drops the rest.
            member.cached.retain(|shard| part.contains(&shard.shard));
            effects.push(Effect::Send(*id, ToMember::Keep(KeepList { list: member.keep_list, shards })));
        }
    }

    pub(super) fn close_epoch(&mut self, validation_loss: Option<f64>, effects: &mut Vec<Effect>) {
        let spec = &self.config.spec;
        let whole = self.rounds.is_multiple_of(u64::from(spec.schedule.rounds_per_epoch()));
        // A run that ends within an epoch may be extended; then the epoch's sum goes on.
        let EpochLoss { sum, samples } = if whole { std::mem::take(&mut self.epoch_loss) } else { self.epoch_loss };
        effects.push(Effect::Publish(Progressed::Epoch(EpochReport {
            epoch: spec.schedule.step(self.rounds - 1).epoch,
            rounds: self.rounds,
            train_loss: sum / samples as f64,
            validation_loss,
        })));
    }

    pub(super) fn finish(&mut self, now: Duration, outcome: Outcome, effects: &mut Vec<Effect>) {
        // Also if it has failed: the machine fails only where it stands on good parameters.
        if self.checkpoint(now, Occasion::End, effects) {
            self.await_checkpoint(now, outcome);
        } else {
            self.end(outcome, effects);
        }
    }

    /// Dismisses everybody.
    pub(super) fn end(&mut self, outcome: Outcome, effects: &mut Vec<Effect>) {
        let reason = match &outcome {
            Outcome::Completed => format!("all {} rounds are done", self.rounds),
            Outcome::Stopped(reason) | Outcome::Failed(reason) => reason.clone(),
        };
        let for_good = !(self.comes_back && matches!(outcome, Outcome::Stopped(_)));
        for (member, _) in self.members.iter() {
            let finished = || Effect::Send(member, ToMember::Finished(reason.clone()));
            effects.push(if for_good { finished() } else { Effect::Close(member) });
        }
        self.state = State::Finished;
        effects.push(Effect::Publish(Progressed::State { state: RunState::Finished { reason } }));
        effects.push(Effect::Finish(outcome));
    }
}
