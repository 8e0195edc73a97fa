//! The end of a round: it goes into the ledger, with or without a step.

use std::time::Duration;

use lockstep_common::ledger::Record;
use lockstep_common::progress::{Breakdown, Event as Progressed, RoundReport};
use lockstep_common::protocol::Work;

use super::event::Effect;
use super::machine::{Machine, State};
use super::work::{Progress, Reduced, Totals};

/// A round of which every leaf is credited, and whose gradient is reduced.
#[derive(Debug)]
pub(super) struct Complete {
    pub(super) progress: Box<Progress>,
    pub(super) totals: Totals,
    pub(super) reduced: Reduced,
}

impl Machine {
    /// Commits the round, once its gradient is reduced and every leaf is credited; or has it inspected, if that is not
    /// finite.
    pub(super) fn try_commit(&mut self, now: Duration, round: u64, effects: &mut Vec<Effect>) {
        let State::Working(progress) = &mut self.state else { return };
        let (Some(totals), Some(reduced)) = (progress.complete(), progress.reduced) else { return };
        let tree = self.config.spec.schedule.tree;
        let placeholder = Box::new(Progress::new(Work::Inspection { round }, tree, now));
        let progress = std::mem::replace(progress, placeholder);
        for (id, leaves) in progress.computed_leaves() {
            // It is on its way, and will be dropped: the round is over.
            if let Some(member) = self.members.get_mut(id) {
                member.pace.delivered(now, progress.work, leaves);
                member.owes_since = if member.pace.is_free() { None } else { Some(now) };
            }
        }
        self.members.iter_mut().for_each(|(_, member)| member.pace.missed(now, progress.work));
        let complete = Complete { progress, totals, reduced };
        if !reduced.stepped {
            return self.inspect(now, complete, effects);
        }
        self.skipped.in_a_row = 0;
        self.commit(now, complete, effects);
    }

    /// Commits a round that is complete, with or without a step, and goes on.
    pub(super) fn commit(&mut self, now: Duration, complete: Complete, effects: &mut Vec<Effect>) {
        let Complete { progress, totals, reduced } = complete;
        let Reduced { gradient_norm, parameters, stepped, took } = reduced;
        let Totals { loss, samples } = totals;
        let round = self.rounds;
        let step = self.config.spec.schedule.step(round);
        let mean_loss = loss / f64::from(samples);
        let duration = now.saturating_sub(progress.started);
        effects.push(Effect::Record(Record {
            round,
            epoch: step.epoch,
            batch: step.batch,
            samples,
            loss: mean_loss,
            gradient_norm,
            parameters,
            skipped: !stepped,
            nodes: progress.contributions(),
            leaves: progress.digests(),
            hedged: progress.hedged(),
            checked: progress.checked(),
        }));
        effects.push(Effect::Publish(Progressed::Round(RoundReport {
            round,
            epoch: step.epoch,
            batch: step.batch,
            loss: mean_loss,
            gradient_norm,
            samples,
            parameters,
            skipped: !stepped,
            workers: progress.contributors(),
            hedged: progress.hedged().len() as u32,
            duration,
            breakdown: Breakdown::of(duration, progress.longest_compute, took, progress.longest_download),
        })));
        self.rounds = round + 1;
        self.samples_seen += u64::from(samples);
        if stepped {
            self.note_duration(duration, !progress.hedged().is_empty());
            self.epoch_loss.sum += loss;
            self.epoch_loss.samples += u64::from(samples);
        }
        let closes = step.batch + 1 == self.config.spec.schedule.rounds_per_epoch()
            || self.rounds == self.config.spec.total_rounds();
        if closes && self.config.spec.validation_samples == 0 {
            self.evaluated = self.rounds;
            self.close_epoch(None, effects);
        }
        self.begin_next(now, effects);
    }
}
