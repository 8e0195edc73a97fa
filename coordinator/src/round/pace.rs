//! How fast members are, and when shards should move because of it.

use std::collections::VecDeque;
use std::time::Duration;

use lockstep_common::protocol::{MemberId, Work};

use super::assign::Ownership;
use super::membership::median;

/// Measurements of a member that count: a stall or two among them change nothing.
const MEASUREMENTS: usize = 5;

/// A division that takes so many times as long as the best one is worth thinking about; below that it is noise.
const WORTH_MOVING: f64 = 1.25;

/// How fast a member is: from the time that an assignment is sent to the time that all of it is there.
#[derive(Clone, Debug, Default)]
pub struct Pace {
    task: Option<Task>,
    /// Seconds a leaf took, the newest last.
    measured: VecDeque<f64>,
}

/// A round's leaves that a member has not delivered as a whole.
#[derive(Clone, Copy, Debug)]
struct Task {
    work: Work,
    since: Duration,
    leaves: u32,
    delivered: u32,
}

impl Pace {
    /// Seconds that a leaf takes; `None` before the first measurement.
    pub fn leaf_time(&self) -> Option<f64> {
        median(self.measured.iter().copied().collect())
    }

    /// Leaves are sent to the member.
    pub(super) fn assigned(&mut self, now: Duration, work: Work, leaves: u32) {
        match &mut self.task {
            Some(task) if task.work == work => task.leaves += leaves,
            task => *task = Some(Task { work, since: now, leaves, delivered: 0 }),
        }
    }

    /// Whether the member has delivered all that it was sent.
    pub(super) fn is_free(&self) -> bool {
        self.task.is_none()
    }

    /// Leaves are there, in time or when their round was over. Gives how long the member took once all of them are.
    pub(super) fn delivered(&mut self, now: Duration, work: Work, leaves: u32) -> Option<Duration> {
        let task = self.task.as_mut().filter(|task| task.work == work)?;
        task.delivered += leaves;
        if task.delivered < task.leaves {
            return None;
        }
        let (took, leaves) = (now.saturating_sub(task.since), task.leaves);
        self.task = None;
        if matches!(work, Work::Gradient { .. }) {
            self.measure(took, leaves);
        }
        Some(took)
    }

    /// A round is over without all of the member's leaves: so slow it is at least.
    pub(super) fn missed(&mut self, now: Duration, work: Work) {
        if let Some(task) = self.task.filter(|task| task.work == work)
            && matches!(work, Work::Gradient { .. })
        {
            self.measure(now.saturating_sub(task.since), task.delivered.max(1));
        }
    }

    fn measure(&mut self, took: Duration, leaves: u32) {
        self.measured.push_back((took.as_secs_f64() / f64::from(leaves.max(1))).max(1e-9));
        if self.measured.len() > MEASUREMENTS {
            self.measured.pop_front();
        }
    }
}

/// Whether a better division is worth moving shards: when the time lost without it has grown to a whole round.
#[derive(Clone, Debug, Default)]
pub(super) struct Balance {
    /// Rounds' worth of time lost, in rounds of the best division.
    lost: f64,
}

impl Balance {
    /// Takes an edge into account. `members` come with their leaf times.
    pub(super) fn should_move(&mut self, now: &Ownership, best: &Ownership, members: &[(MemberId, f64)]) -> bool {
        let ratio = now.duration(members) / best.duration(members);
        self.lost = if ratio < WORTH_MOVING { 0.0 } else { self.lost + ratio - 1.0 };
        let moves = self.lost >= 1.0;
        if moves {
            self.lost = 0.0;
        }
        moves
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SECOND: Duration = Duration::from_secs(1);

    fn round(pace: &mut Pace, round: u64, leaves: u32, took: Duration) {
        let (now, work) = (round as u32 * 100 * SECOND, Work::Gradient { round });
        pace.assigned(now, work, leaves);
        assert_eq!(pace.delivered(now + took, work, leaves), Some(took));
    }

    #[test]
    fn a_pace_is_measured_over_rounds_and_forgives_a_stall() {
        let mut pace = Pace::default();
        assert_eq!(pace.leaf_time(), None);
        (0..3).for_each(|number| round(&mut pace, number, 4, SECOND));
        round(&mut pace, 3, 4, 40 * SECOND);
        assert_eq!(pace.leaf_time(), Some(0.25));
        (4..7).for_each(|number| round(&mut pace, number, 4, 8 * SECOND));
        assert_eq!(pace.leaf_time(), Some(2.0));
    }

    #[test]
    fn whoever_misses_rounds_is_slow_until_it_delivers() {
        let (mut pace, work) = (Pace::default(), Work::Gradient { round: 1 });
        pace.assigned(SECOND, work, 4);
        pace.missed(3 * SECOND, work);
        assert_eq!((pace.leaf_time(), pace.is_free()), (Some(2.0), false));
        assert_eq!(pace.delivered(4 * SECOND, work, 2), None);
        assert_eq!(pace.delivered(5 * SECOND, Work::Gradient { round: 2 }, 2), None);
        assert_eq!(pace.delivered(5 * SECOND, work, 2), Some(4 * SECOND));
        assert!(pace.is_free());
    }

    #[test]
    fn shards_move_at_once_for_much_later_for_little_and_never_for_noise() {
        let members = |slow: f64| {
            [1, 2].map(|worker| (MemberId { worker, incarnation: 1 }, if worker == 1 { slow } else { 1.0 }))
        };
        let even = Ownership::divide(64, &members(1.0));
        let edges = |slow: f64| {
            let (members, mut balance) = (members(slow), Balance::default());
            let best = Ownership::divide(64, &members);
            (1..100).find(|_| balance.should_move(&even, &best, &members))
        };
        assert_eq!(edges(10.0), Some(1));
        assert_eq!(edges(2.0), Some(3));
        assert_eq!(edges(1.3), None);
    }
}
