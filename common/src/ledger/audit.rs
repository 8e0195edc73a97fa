//! The audit of a ledger: the schedule is computed anew, and the digests of the samples that workers report to have used
//! are compared with it, leaf by leaf.

use std::collections::HashSet;
use std::io::{BufRead, Read};

use super::{Contribution, Header, MAX_LINE_BYTES, Record, parse_header, parse_line};
use crate::hash::Digest;
use crate::protocol::MemberId;
use crate::shard::{Schedule, samples_digest};

/// What an audit takes for each sample of the run: its place in the shards, its place in the epoch, and whether it was
/// used; in bytes.
pub const AUDIT_BYTES_PER_SAMPLE: u64 = 4 + 4 + 1;

/// What an audit proved.
#[derive(Clone, Debug, PartialEq)]
pub struct Audit {
    /// What the ledger is about.
    pub header: Header,
    /// Rounds on record.
    pub rounds: u64,
    /// Epochs of which every sample was used exactly once.
    pub whole_epochs: u32,
    /// Samples used, each at most once, in the epoch that is not complete.
    pub samples_in_open_epoch: u32,
    /// Samples used over all rounds.
    pub samples_used: u64,
    /// Rounds that were skipped: their gradient was computed, and no step was taken.
    pub skipped_rounds: u64,
    /// Members that contributed.
    pub members: Vec<MemberId>,
    /// Digest of the parameters after the last round.
    pub parameters: Digest,
}

/// Why a ledger proves nothing.
#[derive(Debug, thiserror::Error)]
pub enum AuditError {
    /// The file cannot be read.
    #[error("cannot read the ledger: {0}")]
    Io(#[from] std::io::Error),
    /// There is no header.
    #[error("the ledger is empty")]
    Empty,
    /// The header names more samples than the caller takes memory for.
    #[error("it says that the run has {claimed} samples, more than {most}")]
    TooManySamples {
        /// What the header says.
        claimed: u32,
        /// What the caller allowed.
        most: u32,
    },
    /// A line does not say what it should.
    #[error("ledger line {line}: {reason}")]
    Line {
        /// Number of the line, from 1.
        line: u64,
        /// What is wrong, with its numbers.
        reason: String,
    },
}

/// Reads a whole ledger and proves what [`Audit`] says.
///
/// The proof takes [`AUDIT_BYTES_PER_SAMPLE`]. How many samples there are only the header says, which nobody vouches for: a
/// ledger of more than `most_samples` is not looked at further.
///
/// # Errors
/// [`AuditError`] names the first line that breaks the proof.
pub fn audit(mut ledger: impl BufRead, most_samples: u32) -> Result<Audit, AuditError> {
    let mut line = String::new();
    if !next_line(&mut ledger, 1, &mut line)? {
        return Err(AuditError::Empty);
    }
    let (header, schedule) = parse_header(&line).map_err(|reason| AuditError::Line { line: 1, reason })?;
    let claimed = header.samples.get();
    if claimed > most_samples {
        return Err(AuditError::TooManySamples { claimed, most: most_samples });
    }
    let mut chain = Digest::of(line.as_bytes());
    let mut auditor = Auditor::new(header, schedule);
    for number in 2.. {
        if !next_line(&mut ledger, number, &mut line)? {
            break;
        }
        let checked = parse_line(&line, &mut chain).and_then(|record| auditor.check(&record));
        checked.map_err(|reason| AuditError::Line { line: number, reason })?;
    }
    Ok(auditor.finish())
}

/// Reads a line, without its end. Returns whether there was one.
fn next_line(ledger: &mut impl BufRead, number: u64, line: &mut String) -> Result<bool, AuditError> {
    line.clear();
    ledger.take(MAX_LINE_BYTES).read_line(line)?;
    if line.is_empty() {
        return Ok(false);
    }
    if line.ends_with('\n') {
        line.pop();
    } else if line.len() as u64 == MAX_LINE_BYTES {
        let reason = format!("it has {MAX_LINE_BYTES} bytes or more; no record is as long");
        return Err(AuditError::Line { line: number, reason });
    }
    Ok(true)
}

struct Auditor {
    header: Header,
    schedule: Schedule,
    assignment: Vec<Vec<u32>>,
    /// Orders of the shards in the epoch at hand.
    orders: Vec<Vec<u32>>,
    orders_epoch: Option<u32>,
    /// Which samples the epoch at hand has used.
    used: Vec<bool>,
    used_count: u32,
    rounds: u64,
    whole_epochs: u32,
    samples_used: u64,
    skipped_rounds: u64,
    members: Vec<MemberId>,
    known_members: HashSet<MemberId>,
    parameters: Digest,
}

impl Auditor {
    fn new(header: Header, schedule: Schedule) -> Self {
        Self {
            assignment: schedule.assignment(),
            orders: Vec::new(),
            orders_epoch: None,
            used: vec![false; schedule.samples.get() as usize],
            used_count: 0,
            rounds: 0,
            whole_epochs: 0,
            samples_used: 0,
            skipped_rounds: 0,
            members: Vec::new(),
            known_members: HashSet::new(),
            parameters: header.initial_parameters,
            header,
            schedule,
        }
    }

    fn check(&mut self, record: &Record) -> Result<(), String> {
        let step = self.schedule.step(self.rounds);
        if (record.round, record.epoch, record.batch) != (self.rounds, step.epoch, step.batch) {
            return Err(format!(
                "round {} (epoch {}, batch {}) where round {} (epoch {}, batch {}) must follow",
                record.round, record.epoch, record.batch, self.rounds, step.epoch, step.batch
            ));
        }
        let samples = self.schedule.batch_samples(step.batch);
        if record.samples != samples {
            return Err(format!("round {} used {} samples, the batch has {samples}", record.round, record.samples));
        }
        if record.skipped && record.parameters != self.parameters {
            return Err(format!(
                "round {} was skipped, and yet its parameters are {} after {}",
                record.round, record.parameters, self.parameters
            ));
        }
        self.check_tree(record)?;
        self.check_samples(record)?;
        self.rounds += 1;
        self.samples_used += u64::from(samples);
        self.skipped_rounds += u64::from(record.skipped);
        self.parameters = record.parameters;
        for contribution in &record.nodes {
            if self.known_members.insert(contribution.by) {
                self.members.push(contribution.by);
            }
        }
        if step.batch + 1 == self.schedule.rounds_per_epoch() {
            self.close_epoch(step.epoch)?;
        }
        Ok(())
    }

    fn check_tree(&self, record: &Record) -> Result<(), String> {
        let shards = self.schedule.tree.shards();
        let mut next = 0;
        for Contribution { node, .. } in &record.nodes {
            if !self.schedule.tree.contains(*node) || node.leaves().start != next {
                return Err(format!("round {}: node {node} stands where leaf {next} must follow", record.round));
            }
            next = node.leaves().end;
        }
        if next != shards || record.leaves.len() != shards as usize {
            return Err(format!(
                "round {}: nodes cover {next} of {shards} leaves, and {} digests are given",
                record.round,
                record.leaves.len()
            ));
        }
        Ok(())
    }

    fn check_samples(&mut self, record: &Record) -> Result<(), String> {
        if self.orders_epoch != Some(record.epoch) {
            let shards = 0..self.schedule.tree.shards();
            self.orders = shards.map(|shard| self.schedule.epoch_order(record.epoch, shard)).collect();
            self.orders_epoch = Some(record.epoch);
        }
        for (shard, digest) in record.leaves.iter().enumerate() {
            let places = self.schedule.leaf_places(record.batch, shard as u32);
            let order = &self.orders[shard][places.start as usize..places.end as usize];
            let samples: Vec<u32> = order.iter().map(|&place| self.assignment[shard][place as usize]).collect();
            if samples_digest(samples.iter().copied()) != *digest {
                return Err(format!(
                    "round {}: leaf {shard} was computed from other samples than scheduled",
                    record.round
                ));
            }
            for sample in samples {
                if std::mem::replace(&mut self.used[sample as usize], true) {
                    return Err(format!("sample {sample} is used twice in epoch {}", record.epoch));
                }
                self.used_count += 1;
            }
        }
        Ok(())
    }

    fn close_epoch(&mut self, epoch: u32) -> Result<(), String> {
        if let Some(sample) = self.used.iter().position(|&used| !used) {
            return Err(format!("sample {sample} is not used in epoch {epoch}"));
        }
        self.used.fill(false);
        self.used_count = 0;
        self.whole_epochs += 1;
        Ok(())
    }

    fn finish(self) -> Audit {
        Audit {
            header: self.header,
            rounds: self.rounds,
            whole_epochs: self.whole_epochs,
            samples_in_open_epoch: self.used_count,
            samples_used: self.samples_used,
            skipped_rounds: self.skipped_rounds,
            members: self.members,
            parameters: self.parameters,
        }
    }
}

#[cfg(test)]
mod tests {
    use std::num::NonZeroU32;

    use super::*;
    use crate::ledger::Chain;
    use crate::model::LayoutHash;
    use crate::reduce::Tree;

    fn schedule() -> Schedule {
        Schedule {
            seed: 5,
            samples: NonZeroU32::new(21).unwrap(),
            batch_size: NonZeroU32::new(8).unwrap(),
            tree: Tree::over(4).unwrap(),
            shuffle: true,
        }
    }

    fn honest_record(schedule: &Schedule, round: u64) -> Record {
        let step = schedule.step(round);
        let assignment = schedule.assignment();
        let digest = |shard: u32| {
            let order = schedule.epoch_order(step.epoch, shard);
            let places = schedule.leaf_places(step.batch, shard);
            samples_digest(places.map(|place| assignment[shard as usize][order[place as usize] as usize]))
        };
        let by = MemberId { worker: 1, incarnation: 1 };
        Record {
            round,
            epoch: step.epoch,
            batch: step.batch,
            samples: schedule.batch_samples(step.batch),
            loss: 0.5,
            gradient_norm: 1.0,
            parameters: Digest(u128::from(round)),
            skipped: false,
            nodes: schedule
                .tree
                .cover(0..1)
                .into_iter()
                .chain(schedule.tree.cover(1..4))
                .map(|node| Contribution { by, node })
                .collect(),
            leaves: (0..4).map(digest).collect(),
            hedged: Vec::new(),
            checked: Vec::new(),
        }
    }

    fn audit_of(edit: impl Fn(u64, &mut Record) -> bool) -> Result<Audit, String> {
        let schedule = schedule();
        let (mut chain, mut text) = Chain::start(&Header::new("test", &schedule, LayoutHash(1), Digest(9)));
        for round in 0..8 {
            let mut record = honest_record(&schedule, round);
            if edit(round, &mut record) {
                text.push('\n');
                text.push_str(&chain.line(&record));
            }
        }
        audit(text.as_bytes(), 21).map_err(|error| error.to_string())
    }

    #[test]
    fn an_honest_ledger_proves_every_sample_used_once_an_epoch() {
        let audit = audit_of(|_, _| true).unwrap();
        assert_eq!((audit.rounds, audit.whole_epochs, audit.samples_in_open_epoch), (8, 2, 16));
        assert_eq!((audit.samples_used, audit.parameters), (58, Digest(7)));
    }

    #[test]
    fn a_skipped_round_uses_its_samples_and_changes_no_parameters() {
        let audit = audit_of(|round, record| {
            if round == 3 {
                (record.skipped, record.loss, record.parameters) = (true, f64::NAN, Digest(2));
            }
            true
        });
        let audit = audit.unwrap();
        assert_eq!((audit.rounds, audit.skipped_rounds, audit.samples_used), (8, 1, 58));
    }

    #[test]
    fn every_lie_is_found_and_named() {
        fn check(expected: &str, edit: impl Fn(u64, &mut Record) -> bool) {
            let message = audit_of(edit).unwrap_err();
            assert!(message.contains(expected), "{message}");
        }
        check("line 5: round 4 (epoch 1, batch 1) where round 3", |round, _| round != 3);
        check("line 4: round 2 used 8 samples, the batch has 5", |round, record| {
            record.samples = if round == 2 { 8 } else { record.samples };
            true
        });
        check("leaf 2 was computed from other samples", |round, record| {
            record.leaves[2] = if round == 1 { Digest(1) } else { record.leaves[2] };
            true
        });
        check("round 3 was skipped, and yet its parameters are", |round, record| {
            record.skipped = round == 3;
            true
        });
        check("where leaf 1 must follow", |_, record| {
            record.nodes.remove(1);
            true
        });
        check("nodes cover 2 of 4 leaves", |_, record| {
            record.nodes.pop();
            true
        });
    }

    #[test]
    fn a_changed_line_breaks_the_chain() {
        let schedule = schedule();
        let (mut chain, header) = Chain::start(&Header::new("test", &schedule, LayoutHash(1), Digest(9)));
        let line = chain.line(&honest_record(&schedule, 0)).replace("\"loss\":0.5", "\"loss\":0.4");
        let message = audit(format!("{header}\n{line}").as_bytes(), 21).unwrap_err().to_string();
        assert!(message.contains("line 2: chain digest"), "{message}");
        assert!(audit(&b""[..], 21).unwrap_err().to_string().contains("empty"));
        assert!(audit(&b"{}"[..], 21).unwrap_err().to_string().contains("no ledger header"));
    }

    #[test]
    fn more_samples_than_memory_is_taken_for_are_refused() {
        let (_, header) = Chain::start(&Header::new("test", &schedule(), LayoutHash(1), Digest(9)));
        assert!(audit(header.as_bytes(), 21).is_ok());
        let refused = audit(header.as_bytes(), 20).unwrap_err();
        assert!(matches!(refused, AuditError::TooManySamples { claimed: 21, most: 20 }), "{refused}");
    }

    #[test]
    fn a_line_without_an_end_is_not_read_to_it() {
        let (_, header) = Chain::start(&Header::new("test", &schedule(), LayoutHash(1), Digest(9)));
        let endless = || std::io::BufReader::new(std::io::repeat(b' '));
        let first = audit(endless(), 21).unwrap_err().to_string();
        assert!(first.contains("line 1: it has 10485760 bytes or more"), "{first}");
        let header = format!("{header}\n");
        let second = audit(header.as_bytes().chain(endless()), 21).unwrap_err().to_string();
        assert!(second.contains("line 2: it has 10485760 bytes or more"), "{second}");
    }
}
