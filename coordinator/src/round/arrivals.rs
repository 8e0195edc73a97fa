//! Who comes and goes: joins, evictions, losses, drains.

use std::time::Duration;

use lockstep_common::progress::Event as Progressed;
use lockstep_common::protocol::{JoinRequest, MemberId, Refusal};

use super::event::{Effect, Rejected, ToMember};
use super::machine::{Machine, MachineConfig, State};
use super::membership::{ConnectionId, MemberState};

impl Machine {
    pub(super) fn join(
        &mut self,
        now: Duration,
        connection: ConnectionId,
        request: &JoinRequest,
        effects: &mut Vec<Effect>,
    ) {
        let MachineConfig { spec, version, fingerprint } = &self.config;
        let worker = request.fingerprints.computing(spec.precision.compute);
        let refusal = if let Some(reason) = self.members.barred_process(request.process) {
            Some(Refusal::Barred { reason: reason.to_owned() })
        } else if request.version != *version {
            Some(Refusal::Version { run: version.clone(), worker: request.version.clone() })
        } else if worker != *fingerprint {
            Some(Refusal::Fingerprint { run: *fingerprint, worker })
        } else if self.members.is_full(request.process, self.config.spec.max_workers) {
            Some(Refusal::Full { members: self.members.len() })
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

    pub(super) fn lose(
        &mut self,
        now: Duration,
        id: MemberId,
        reason: &str,
        effects: &mut Vec<Effect>,
    ) -> Result<(), Rejected> {
        if self.members.get(id).is_none() {
            return Err(Rejected::NotAMember(id));
        }
        self.remove(id, reason, effects);
        self.recruit(now, effects);
        Ok(())
    }

    /// Evicts members whose lease has expired, and those that live but do not deliver.
    pub(super) fn expire(&mut self, now: Duration, effects: &mut Vec<Effect>) {
        let lease = self.config.spec.lease_timeout;
        let silent = |(member, silent): (MemberId, Duration)| {
            let (silent, lease) = (silent.as_secs_f64(), lease.as_secs_f64());
            (member, format!("silent for {silent:.1} s, the lease is {lease:.1} s"))
        };
        let mut expired: Vec<(MemberId, String)> = self.members.expired(now, lease).into_iter().map(silent).collect();
        let stuck = self.stuck(now);
        let not_silent = |(id, _): &(MemberId, String)| expired.iter().all(|(other, _)| other != id);
        let stuck: Vec<(MemberId, String)> = stuck.into_iter().filter(not_silent).collect();
        expired.extend(stuck);
        for (member, reason) in &expired {
            self.evict(*member, reason, effects);
        }
        if !expired.is_empty() {
            self.recruit(now, effects);
        }
    }

    pub(super) fn evict(&mut self, member: MemberId, reason: &str, effects: &mut Vec<Effect>) {
        effects.push(Effect::Send(member, ToMember::Evicted(reason.to_owned())));
        self.remove(member, reason, effects);
    }

    fn remove(&mut self, member: MemberId, reason: &str, effects: &mut Vec<Effect>) {
        self.members.remove(member);
        self.workers_lost += 1;
        if let State::Working(progress) = &mut self.state {
            progress.forget(member);
        }
        self.discard(member, effects);
        effects.push(Effect::Close(member));
        effects.push(Effect::Publish(Progressed::Left { member, reason: reason.to_owned() }));
    }

    /// Lets members go that want to leave and have nothing left to deliver.
    pub(super) fn release_drained(&mut self, effects: &mut Vec<Effect>) {
        let draining = self.members.iter().filter(|(_, member)| member.state == MemberState::Draining);
        let done: Vec<MemberId> = draining.map(|(id, _)| id).filter(|&id| self.has_delivered(id)).collect();
        for member in done {
            self.members.remove(member);
            effects.push(Effect::Send(member, ToMember::Finished("drained".to_owned())));
            effects.push(Effect::Close(member));
            effects.push(Effect::Publish(Progressed::Left { member, reason: "drained".to_owned() }));
        }
    }
}
