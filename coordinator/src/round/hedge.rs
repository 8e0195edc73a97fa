//! Late leaves: members that are done compute what others are late with, and the first answer counts.
//!
//! Both answers have the same bits, so that nothing has to be taken back. A member is late when it takes longer than
//! [`PATIENCE`] times what the others took for their parts, and [`FLOOR`] more: parts are made to take equally long.

use std::time::Duration;

use lockstep_common::progress::Event as Progressed;
use lockstep_common::protocol::{MemberId, Work};

use super::assign::Ownership;
use super::event::Effect;
use super::machine::{Machine, State};
use super::membership::median;

/// How many times longer than the others a member may take before it is late.
const PATIENCE: f64 = 1.25;

/// What a member may take longer than that: waking threads and sending messages varies by as much.
const FLOOR: Duration = Duration::from_millis(20);

/// People are told of the same member's lateness at most so often.
const NOTICE_INTERVAL: Duration = Duration::from_secs(10);

/// Without progress for so many times as long as rounds take, a member is given up, unless `work_timeout` is longer.
const HOPELESS: u32 = 20;

/// Rounds whose duration is remembered.
const RECENT_ROUNDS: usize = 9;

impl Machine {
    /// Notes how long a round took from its first assignment to its commit. A round in which leaves were late says how long
    /// it was waited for them: if that counted, the next wait would be longer still, and so on.
    pub(super) fn note_duration(&mut self, duration: Duration, hedged: bool) {
        if hedged && !self.recent_rounds.is_empty() {
            return;
        }
        self.recent_rounds.push_back(duration);
        if self.recent_rounds.len() > RECENT_ROUNDS {
            self.recent_rounds.pop_front();
        }
    }

    /// How long an answer for a comparison may take before somebody else is asked.
    pub(super) fn check_patience(&self) -> Duration {
        self.usual_round().map_or(Duration::from_secs(1), |usual| 2 * usual + FLOOR)
    }

    fn usual_round(&self) -> Option<Duration> {
        median(self.recent_rounds.iter().map(Duration::as_secs_f64).collect()).map(Duration::from_secs_f64)
    }

    /// Has members that are done compute the leaves that others are late with.
    pub(super) fn hedge(&mut self, now: Duration, effects: &mut Vec<Effect>) {
        let State::Working(progress) = &self.state else { return };
        let others_took = progress.typical_finish().or_else(|| self.usual_round().filter(|_| progress.is_round()));
        let Some(others_took) = others_took else { return };
        let limit = others_took.mul_f64(PATIENCE) + FLOOR;
        let late = progress.late(now, limit);
        if late.is_empty() {
            return;
        }
        let mut free = self.members.active();
        free.retain(|&(id, _)| progress.outstanding(id).is_empty());
        let work = progress.work;
        for (member, part) in Ownership::divide(late.len() as u32, &free).parts().to_vec() {
            let leaves: Vec<u32> = late[part.start as usize..part.end as usize].iter().map(|&(leaf, _)| leaf).collect();
            self.assign(now, member, &leaves, effects);
        }
        if !free.is_empty() {
            let helpers: Vec<MemberId> = free.iter().map(|&(id, _)| id).collect();
            late.chunk_by(|a, b| a.1 == b.1).for_each(|of_one| {
                self.call_late(now, work, of_one, others_took, &helpers, effects);
            });
        }
    }

    fn call_late(
        &mut self,
        now: Duration,
        work: Work,
        late: &[(u32, MemberId)],
        others_took: Duration,
        helpers: &[MemberId],
        effects: &mut Vec<Effect>,
    ) {
        let Some(member) = self.members.get_mut(late[0].1) else { return };
        member.leaves_hedged += late.len() as u64;
        if member.called_late.is_some_and(|last| now.saturating_sub(last) < NOTICE_INTERVAL) {
            return;
        }
        member.called_late = Some(now);
        let message = format!(
            "{} ({}) is late with {} of {work}, for which the others took {:.3} s; {} too",
            late[0].1,
            member.name,
            in_words(late.iter().map(|&(leaf, _)| leaf)),
            others_took.as_secs_f64(),
            match helpers {
                [one] => format!("{one} computes them"),
                many => format!("{} computes them", names(many)).replace("computes", "compute"),
            }
        );
        effects.push(Effect::Publish(Progressed::Notice { message }));
    }

    /// Members that give signs of life and deliver nothing, each with the reason for which it is evicted.
    pub(super) fn stuck(&self, now: Duration) -> Vec<(MemberId, String)> {
        if matches!(self.state, State::Ending(_)) {
            // Whatever they still compute is not needed.
            return Vec::new();
        }
        let usual = self.usual_round().unwrap_or_default();
        let limit = self.config.spec.work_timeout.max(usual * HOPELESS);
        let owes = |(id, since): (MemberId, Duration)| {
            let waited = now.saturating_sub(since);
            let leaves = self.outstanding(id);
            let what = if leaves.is_empty() { "its work".to_owned() } else { in_words(leaves.into_iter()) };
            let reason = format!(
                "it lives, but has delivered nothing for {:.1} s, at most {:.1} s are allowed; {what} was awaited",
                waited.as_secs_f64(),
                limit.as_secs_f64()
            );
            (waited > limit).then_some((id, reason))
        };
        self.members.iter().filter_map(|(id, member)| owes((id, member.owes_since?))).collect()
    }
}

/// Some leaves for people; not all of very many.
pub(super) fn in_words(mut leaves: impl ExactSizeIterator<Item = u32>) -> String {
    const SHOWN: usize = 8;
    let count = leaves.len();
    let words: Vec<String> = leaves.by_ref().take(SHOWN).map(|leaf| leaf.to_string()).collect();
    let more = if count > SHOWN { format!(" and {} more", count - SHOWN) } else { String::new() };
    format!("{} {}{more}", if count == 1 { "leaf" } else { "leaves" }, words.join(", "))
}

fn names(members: &[MemberId]) -> String {
    members.iter().map(MemberId::to_string).collect::<Vec<String>>().join(", ")
}
