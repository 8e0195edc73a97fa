//! Who belongs to the run.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use lockstep_common::checkpoint::KnownWorker;
use lockstep_common::protocol::{JoinRequest, MemberId, ShardRef};

use super::pace::Pace;

/// A connection on which a worker asks to join, numbered by the driver.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct ConnectionId(pub u64);

/// How far a member has come.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum MemberState {
    /// Admitted; takes part from the next piece of work on.
    Waiting,
    /// Called up inside a work, when nobody else was left. Takes part, but may have missed parts of the parameters
    /// being made: at the next edge it gets them whole.
    Recruited,
    /// Has the current parameters and takes part.
    Active,
    /// Takes part until its leaves are done, then leaves.
    Draining,
}

/// An admitted worker.
#[derive(Clone, Debug)]
pub struct Member {
    /// The name that it gave.
    pub name: String,
    /// Instruction set that it computes on.
    pub isa: String,
    /// Threads that it computes with: its weight when shards are divided.
    pub threads: u32,
    /// How far it has come.
    pub state: MemberState,
    /// When it last gave a sign of life.
    pub last_seen: Duration,
    /// Number of the last list of shards that it was sent.
    pub keep_list: u32,
    /// Shards of that list whose samples it has cached.
    pub cached: BTreeSet<ShardRef>,
    /// Leaves computed since it joined.
    pub leaves_computed: u64,
    /// Compute time of its last assignment.
    pub last_compute: Option<Duration>,
    /// How fast it was of late.
    pub pace: Pace,
    /// Leaves that others were asked to compute as well, because it was late with them.
    pub leaves_hedged: u64,
    /// Since when it has had work and has delivered nothing at all.
    pub(super) owes_since: Option<Duration>,
    /// When people were last told that it is late.
    pub(super) called_late: Option<Duration>,
}

/// Incarnations that one start of the coordinator gives to a worker before the next start's begin: a worker that is put
/// out pauses before it joins again, so that so many joins take half an hour without a single checkpoint.
const INCARNATIONS_PER_START: u32 = 1000;

/// Worker processes that a run remembers, so that their numbers are not given again. A checkpoint has 16 bytes for each: 4
/// MiB of the 16 that its state may have.
const MAX_PROCESSES: usize = 1 << 18;

/// All members, and the numbers given to workers so far.
#[derive(Clone, Debug, Default)]
pub(super) struct Membership {
    members: BTreeMap<MemberId, Member>,
    /// Number and last incarnation of every worker process seen.
    processes: BTreeMap<u64, MemberId>,
    /// Incarnations up to this one may have been given by a coordinator that was killed before it could write down that
    /// it had.
    past_incarnations: u32,
    /// Workers that computed wrong bits, and how.
    barred: BTreeMap<u32, String>,
}

impl Membership {
    /// Nobody, and the workers that an earlier start of the coordinator knew.
    pub(super) fn resume(workers: &[KnownWorker], restarts: u32) -> Self {
        Self {
            members: BTreeMap::new(),
            processes: workers.iter().map(|known| (known.process, known.member)).collect(),
            past_incarnations: restarts.saturating_mul(INCARNATIONS_PER_START),
            barred: workers.iter().filter_map(|known| Some((known.member.worker, known.barred.clone()?))).collect(),
        }
    }

    /// Every worker process seen.
    pub(super) fn known(&self) -> Vec<KnownWorker> {
        let barred = |member: MemberId| self.barred.get(&member.worker).cloned();
        let known = |(&process, &member): (&u64, &MemberId)| KnownWorker { process, member, barred: barred(member) };
        self.processes.iter().map(known).collect()
    }

    /// Admits a worker. Returns who it is, and the incarnation that it replaces if that is still a member.
    pub(super) fn admit(&mut self, now: Duration, request: &JoinRequest) -> (MemberId, Option<MemberId>) {
        let next_worker = self.processes.len() as u32 + 1;
        let last = self.processes.get(&request.process).copied();
        let past = last.map_or(0, |last| last.incarnation).max(self.past_incarnations);
        let id = MemberId { worker: last.map_or(next_worker, |last| last.worker), incarnation: past.saturating_add(1) };
        self.processes.insert(request.process, id);
        let replaced = last.filter(|last| self.members.contains_key(last));
        let member = Member {
            name: request.name.clone(),
            isa: request.isa.clone(),
            threads: request.threads,
            state: MemberState::Waiting,
            last_seen: now,
            keep_list: 0,
            cached: BTreeSet::new(),
            leaves_computed: 0,
            last_compute: None,
            pace: Pace::default(),
            leaves_hedged: 0,
            owes_since: None,
            called_late: None,
        };
        self.members.insert(id, member);
        (id, replaced)
    }

    /// Puts a worker out for the rest of the run.
    pub(super) fn bar(&mut self, worker: u32, reason: &str) {
        self.barred.insert(worker, reason.to_owned());
    }

    /// Whether a worker is barred.
    pub(super) fn is_barred(&self, worker: u32) -> bool {
        self.barred.contains_key(&worker)
    }

    /// Why a worker process is barred, if it is.
    pub(super) fn barred_process(&self, process: u64) -> Option<&str> {
        self.barred.get(&self.processes.get(&process)?.worker).map(String::as_str)
    }

    /// Removes a member.
    pub(super) fn remove(&mut self, id: MemberId) -> Option<Member> {
        self.members.remove(&id)
    }

    /// The member, if it is one.
    pub(super) fn get(&self, id: MemberId) -> Option<&Member> {
        self.members.get(&id)
    }

    /// The member, if it is one.
    pub(super) fn get_mut(&mut self, id: MemberId) -> Option<&mut Member> {
        self.members.get_mut(&id)
    }

    /// All members, in the order of their numbers.
    pub(super) fn iter(&self) -> impl Iterator<Item = (MemberId, &Member)> {
        self.members.iter().map(|(id, member)| (*id, member))
    }

    /// All members, in the order of their numbers.
    pub(super) fn iter_mut(&mut self) -> impl Iterator<Item = (MemberId, &mut Member)> {
        self.members.iter_mut().map(|(id, member)| (*id, member))
    }

    /// Number of members.
    pub(super) fn len(&self) -> u32 {
        self.members.len() as u32
    }

    /// Whether there is no room for the worker process with this number, at `most` members. One that takes the place of
    /// its own earlier incarnation needs none.
    pub(super) fn is_full(&self, process: u64, most: u32) -> bool {
        let known = self.processes.get(&process);
        let replaces = known.is_some_and(|last| self.members.contains_key(last));
        let forgotten = known.is_none() && self.processes.len() >= MAX_PROCESSES;
        (self.len() >= most && !replaces) || forgotten
    }

    /// Number of workers ever admitted.
    pub(super) fn workers_seen(&self) -> u32 {
        self.processes.len() as u32
    }

    /// Members that have the current parameters and stay, each with the seconds that it needs for a leaf. Who was not
    /// measured yet is taken to be as fast, thread for thread, as the others.
    pub(super) fn active(&self) -> Vec<(MemberId, f64)> {
        let active =
            self.iter().filter(|(_, member)| matches!(member.state, MemberState::Active | MemberState::Recruited));
        let active: Vec<(MemberId, &Member)> = active.collect();
        let threads = |member: &Member| f64::from(member.threads.max(1));
        let measured = active.iter().filter_map(|(_, member)| Some(member.pace.leaf_time()? * threads(member)));
        let typical = median(measured.collect()).unwrap_or(1.0);
        let leaf_time = |member: &Member| member.pace.leaf_time().unwrap_or(typical / threads(member));
        active.into_iter().map(|(id, member)| (id, leaf_time(member))).collect()
    }

    /// Members that have been silent for longer than `lease`, and for how long.
    pub(super) fn expired(&self, now: Duration, lease: Duration) -> Vec<(MemberId, Duration)> {
        let silent = self.iter().map(|(id, member)| (id, now.saturating_sub(member.last_seen)));
        silent.filter(|&(_, silent)| silent > lease).collect()
    }
}

/// The middle of some numbers, the lower one of two; `None` if there are none.
pub(super) fn median(mut values: Vec<f64>) -> Option<f64> {
    values.sort_unstable_by(f64::total_cmp);
    values.get(values.len().saturating_sub(1) / 2).copied()
}

#[cfg(test)]
mod tests {
    use lockstep_common::fingerprint::Fingerprints;

    use super::*;

    #[test]
    fn a_full_run_takes_only_those_who_come_back() {
        let mut members = Membership::default();
        let mut join = |process| {
            let full = members.is_full(process, 2);
            let request = JoinRequest {
                process,
                name: String::new(),
                version: String::new(),
                fingerprints: Fingerprints::default(),
                threads: 1,
                isa: String::new(),
            };
            (!full).then(|| members.admit(Duration::ZERO, &request).0)
        };
        let first = join(1).expect("room");
        assert!(join(2).is_some());
        assert_eq!(join(3), None);
        assert_eq!(join(1).map(|id| id.incarnation), Some(first.incarnation + 1), "it takes its own place");
    }
}
