//! Spot checks: a few leaves of a round are computed by two workers, and their bits are compared.
//!
//! A checked leaf is handed in as a node by itself, with the digest of its gradient. Until its check is over, the
//! gradients of everybody who takes part in it are held back from the sum. So whoever is found to be wrong has put
//! nothing into the round since it takes part, which the first two do from the beginning of the round.

use std::collections::BTreeSet;
use std::time::Duration;

use lockstep_common::hash::Digest;
use lockstep_common::progress::{Event as Progressed, RunState};
use lockstep_common::protocol::{Handing, MemberId, NodeReport, Work};
use lockstep_common::rng::{Purpose, Stream};

use super::event::{Effect, Rejected};
use super::machine::{Machine, State};
use super::membership::MemberState;

/// What a leaf came out as: the digest of its gradient and the bits of its loss.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Answer {
    gradient: Digest,
    loss: u64,
}

/// A leaf that is computed twice.
#[derive(Clone, Debug)]
pub(super) struct Check {
    leaf: u32,
    /// What came out: one answer for each worker, or several if it contradicted itself.
    answers: Vec<(MemberId, Answer)>,
    /// Who was asked for a comparison and has not answered, and since when.
    asked: Vec<(MemberId, Duration)>,
    verdict: Option<Verdict>,
}

#[derive(Clone, Copy, Debug, PartialEq)]
enum Verdict {
    /// Two workers gave this answer.
    Agreed(Answer),
    /// There is nobody to compare with, or nobody who answers.
    Waived,
}

impl Check {
    pub(super) fn new(leaf: u32) -> Self {
        Self { leaf, answers: Vec::new(), asked: Vec::new(), verdict: None }
    }

    pub(super) fn leaf(&self) -> u32 {
        self.leaf
    }

    /// Whether two workers gave the same answer.
    pub(super) fn is_agreed(&self) -> bool {
        matches!(self.verdict, Some(Verdict::Agreed(_)))
    }

    /// Whether the check is not over and this member gave an answer or is to give one, besides by computing the leaf.
    pub(super) fn involves(&self, member: MemberId) -> bool {
        self.answers.iter().any(|(id, _)| *id == member) || self.asked.iter().any(|(id, _)| *id == member)
    }

    pub(super) fn is_open(&self) -> bool {
        self.verdict.is_none()
    }

    pub(super) fn forget(&mut self, member: MemberId) {
        self.asked.retain(|(id, _)| *id != member);
    }

    fn answered(&mut self, member: MemberId, answer: Answer) {
        self.forget(member);
        if self.answers.iter().all(|(id, other)| id.worker != member.worker || *other != answer) {
            self.answers.push((member, answer));
        }
    }

    /// How many workers have answered.
    fn workers(&self) -> usize {
        self.answers.iter().map(|(id, _)| id.worker).collect::<BTreeSet<u32>>().len()
    }

    /// The answer that two workers gave.
    fn majority(&self) -> Option<Answer> {
        let count = |answer: Answer| self.answers.iter().filter(|(_, other)| *other == answer).count();
        self.answers.iter().map(|(_, answer)| *answer).find(|&answer| count(answer) >= 2)
    }
}

/// Whether a leaf of a round is checked: about one in `one_in` is, and none with 0.
pub(super) fn is_chosen(seed: u64, round: u64, leaf: u32, one_in: u32) -> bool {
    one_in > 0 && Stream::new(seed, Purpose::SpotCheck, round as u32, leaf).below(one_in) == 0
}

impl Machine {
    /// The leaves of a round that are to be checked; none if there is nobody to compare with.
    pub(super) fn choose_checks(&self, work: Work) -> Vec<Check> {
        let (Work::Gradient { round }, true) = (work, self.members.active().len() > 1) else { return Vec::new() };
        let (schedule, one_in) = (self.config.spec.schedule, self.config.spec.spot_check);
        let chosen = |leaf: &u32| is_chosen(schedule.seed, round, *leaf, one_in);
        (0..schedule.tree.shards()).filter(chosen).map(Check::new).collect()
    }

    /// A leaf was computed for comparison.
    pub(super) fn compared(
        &mut self,
        now: Duration,
        id: MemberId,
        report: &NodeReport,
        effects: &mut Vec<Effect>,
    ) -> Result<(), Rejected> {
        let member = self.member(now, id)?;
        member.pace.delivered(now, report.work, report.digests.len() as u32);
        self.at_work(report.work)?;
        let checked = self.expected.check(report).and_then(|()| self.answer(now, id, report));
        if let Err(reason) = checked {
            self.evict(id, &reason, effects);
        }
        self.recruit(now, effects);
        Ok(())
    }

    /// Takes a member's answer in.
    ///
    /// # Errors
    /// What is wrong with the report.
    pub(super) fn answer(&mut self, now: Duration, member: MemberId, report: &NodeReport) -> Result<(), String> {
        let State::Working(progress) = &mut self.state else { return Ok(()) };
        let leaves = report.node.leaves();
        let Some(check) = progress.checks.iter_mut().find(|check| leaves.contains(&check.leaf)) else { return Ok(()) };
        let (Some(gradient), 1) = (report.gradient, leaves.len()) else {
            return Err(format!("leaf {} is checked: it must come by itself, with its digest", check.leaf));
        };
        check.answered(member, Answer { gradient, loss: report.loss.to_bits() });
        if let Some(member) = self.members.get_mut(member) {
            member.owes_since = if member.pace.is_free() { None } else { Some(now) };
        }
        Ok(())
    }

    /// As [`Self::review`]; hands out the leaves of whoever was found to be wrong.
    pub(super) fn review_and_recruit(&mut self, now: Duration, effects: &mut Vec<Effect>) {
        let members = self.members.len();
        self.review(now, effects);
        if self.members.len() < members {
            self.recruit(now, effects);
        }
    }

    /// Sees how far every check has come: convicts who was wrong, asks for more answers, lets go what was held back.
    pub(super) fn review(&mut self, now: Duration, effects: &mut Vec<Effect>) {
        let State::Working(progress) = &self.state else { return };
        for at in 0..progress.checks.len() {
            self.judge(now, at, effects);
        }
        let State::Working(progress) = &mut self.state else { return };
        let free: Vec<MemberId> = progress.held.iter().copied().filter(|&id| !progress.is_checked(id)).collect();
        for member in free {
            progress.held.remove(&member);
            effects.push(Effect::Release(member));
        }
    }

    fn judge(&mut self, now: Duration, at: usize, effects: &mut Vec<Effect>) {
        let State::Working(progress) = &mut self.state else { return };
        let (work, check) = (progress.work, &mut progress.checks[at]);
        if let (None, Some(answer)) = (check.verdict, check.majority()) {
            check.verdict = Some(Verdict::Agreed(answer));
        }
        match check.verdict {
            Some(Verdict::Agreed(right)) => {
                let check = check.clone();
                for &(member, answer) in check.answers.iter().filter(|(_, answer)| *answer != right) {
                    self.convict(work, check.leaf, member, answer, right, effects);
                }
            }
            Some(Verdict::Waived) => {}
            None => self.ask_for_more(now, at, effects),
        }
    }

    /// Two workers agree and this one does not: it is put out for the rest of the run.
    fn convict(
        &mut self,
        work: Work,
        leaf: u32,
        member: MemberId,
        got: Answer,
        right: Answer,
        effects: &mut Vec<Effect>,
    ) {
        if self.members.is_barred(member.worker) {
            return;
        }
        let reason = format!(
            "computed leaf {leaf} of {work} wrong: gradient {} and loss {}, where two other workers got {} and {}",
            got.gradient,
            f64::from_bits(got.loss),
            right.gradient,
            f64::from_bits(right.loss)
        );
        self.members.bar(member.worker, &reason);
        self.keep_bar();
        let message = format!(
            "{member} {reason}; it is barred from the run. What else it computed in this round is thrown away. What it computed in earlier rounds was not all checked: its hardware or its build cannot be trusted"
        );
        effects.push(Effect::Publish(Progressed::Notice { message }));
        // Perhaps a later incarnation of it by now.
        let present: Vec<MemberId> =
            self.members.iter().map(|(id, _)| id).filter(|id| id.worker == member.worker).collect();
        for id in present {
            self.evict(id, &reason, effects);
        }
        // Those that were lost before it came out.
        self.discard(member, effects);
    }

    /// Throws away what a member has handed in and what is held back.
    pub(super) fn discard(&mut self, member: MemberId, effects: &mut Vec<Effect>) {
        let State::Working(progress) = &mut self.state else { return };
        if progress.held.remove(&member) {
            progress.retract(member);
            effects.push(Effect::Discard(member));
        }
    }

    /// Asks somebody for an answer if one is missing and nobody is at it.
    fn ask_for_more(&mut self, now: Duration, at: usize, effects: &mut Vec<Effect>) {
        let (patience, measured) = (self.check_patience(), !self.recent_rounds.is_empty());
        let State::Working(progress) = &self.state else { return };
        let (work, check) = (progress.work, &progress.checks[at]);
        let (given, disagree) = (check.workers(), check.answers.len() > 1);
        let unanswered = |id: MemberId| check.answers.iter().all(|(other, _)| *other != id);
        let computing = progress.holders_since(check.leaf).filter(|&(id, _)| unanswered(id));
        let awaited: Vec<Duration> = check.asked.iter().copied().chain(computing).map(|(_, since)| since).collect();
        let in_time = awaited.iter().filter(|&&since| now.saturating_sub(since) <= patience).count();
        let needed = if disagree { given + 1 } else { 2 };
        if given + in_time >= needed {
            return;
        }
        let takes_part = |id: MemberId| {
            check
                .answers
                .iter()
                .map(|(id, _)| id)
                .chain(check.asked.iter().map(|(id, _)| id))
                .any(|other| other.worker == id.worker)
        };
        let mut others = self.members.active();
        others.retain(|&(id, _)| !takes_part(id) && !progress.computes(id, check.leaf));
        // Not those that are too slow for a part of their own, if there are others.
        if others.iter().any(|(id, _)| !self.ownership.of(*id).is_empty()) {
            others.retain(|(id, _)| !self.ownership.of(*id).is_empty());
        }
        let leaf = check.leaf;
        if others.is_empty() {
            // Whoever is asked and does not answer must not hold up a round that others could complete.
            let hopeless = awaited.is_empty() || (given > 0 && measured);
            return match disagree {
                true if check.asked.is_empty() => self.await_third(leaf, effects),
                false if hopeless => self.waive(at),
                _ => {}
            };
        }
        let seed = self.config.spec.schedule.seed;
        let chosen = Stream::new(seed, Purpose::SpotCheck, work.version() as u32, !leaf).below(others.len() as u32);
        let (member, _) = others[chosen as usize];
        self.send_tasks(now, member, &[leaf], Some(Handing::Compared), effects);
        if let State::Working(progress) = &mut self.state {
            progress.checks[at].asked.push((member, now));
            progress.undecided = None;
        }
    }

    fn waive(&mut self, at: usize) {
        if let State::Working(progress) = &mut self.state {
            progress.checks[at].verdict = Some(Verdict::Waived);
        }
    }

    /// Two workers disagree and nobody else is there: the next that joins decides.
    fn await_third(&mut self, leaf: u32, effects: &mut Vec<Effect>) {
        if self.members.iter().any(|(_, member)| member.state == MemberState::Waiting) {
            // Its answer is asked for at the next look.
            return self.call_up(MemberState::Recruited, effects);
        }
        let State::Working(progress) = &mut self.state else { return };
        if progress.undecided.replace(leaf) != Some(leaf) {
            let work = progress.work;
            let reason = format!("{work} needs a third worker: two computed leaf {leaf} differently, and one is wrong");
            effects.push(Effect::Publish(Progressed::Notice { message: reason.clone() }));
            effects.push(Effect::Publish(Progressed::State { state: RunState::Waiting { reason } }));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn about_one_leaf_in_so_many_is_chosen_and_none_when_it_is_off() {
        let chosen = (0..4000).flat_map(|round| (0..16).map(move |leaf| (round, leaf)));
        let count = |one_in| chosen.clone().filter(|&(round, leaf)| is_chosen(3, round, leaf, one_in)).count();
        assert!(count(256).abs_diff(250) < 50, "{}", count(256));
        assert_eq!((count(1), count(0)), (64_000, 0));
    }
}
