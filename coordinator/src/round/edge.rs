//! Edges and hand-outs: what is worked on next, who takes part, and who computes which leaf.

use std::time::Duration;

use lockstep_common::progress::{EpochReport, Event as Progressed, RunState};
use lockstep_common::protocol::{KeepList, MemberId, ShardRef, Split, Work};

use super::assign::Ownership;
use super::event::{Effect, Outcome, ToMember};
use super::machine::{EpochLoss, Machine, State};
use super::membership::MemberState;
use super::work::Progress;

impl Machine {
    /// After a change of members: hands out leaves that nobody computes, or begins work that had to wait.
    pub(super) fn recruit(&mut self, now: Duration, effects: &mut Vec<Effect>) {
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
    pub(super) fn begin_next(&mut self, now: Duration, effects: &mut Vec<Effect>) {
        let Some(work) = self.next_work() else {
            return self.finish(Outcome::Completed, effects);
        };
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
        let ownership = Ownership::divide(tree.shards(), &self.members.active());
        if ownership != self.ownership {
            self.ownership = ownership;
            self.tell_shards(effects);
        }
        if let Work::Gradient { round } = work {
            let samples = self.config.spec.schedule.batch_samples(self.config.spec.schedule.step(round).batch);
            effects.push(Effect::Begin { round, samples });
        }
        match (work, &self.state) {
            (Work::Evaluation { .. }, _) => {
                effects.push(Effect::Publish(Progressed::State { state: RunState::Evaluating }))
            }
            (Work::Gradient { .. }, State::Waiting) => {
                effects.push(Effect::Publish(Progressed::State { state: RunState::Training }));
            }
            _ => {}
        }
        self.state = State::Working(Box::new(Progress::new(work, tree, now)));
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

    pub(super) fn close_epoch(&mut self, validation_loss: Option<f64>, effects: &mut Vec<Effect>) {
        let EpochLoss { sum, samples } = std::mem::take(&mut self.epoch_loss);
        effects.push(Effect::Publish(Progressed::Epoch(EpochReport {
            epoch: self.config.spec.schedule.step(self.rounds - 1).epoch,
            rounds: self.rounds,
            train_loss: sum / samples as f64,
            validation_loss,
        })));
    }

    pub(super) fn finish(&mut self, outcome: Outcome, effects: &mut Vec<Effect>) {
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
