//! The ledger: for every round, who computed what from which samples, and what came out.
//!
//! A ledger is a file of JSON lines. The first line says what the schedule depends on; every further line holds one
//! round's record and a chain digest over all lines so far, so that a line that was lost, changed or torn shows.
//! [`audit`] proves from the file alone that every epoch used every sample exactly once and that every round's tree is
//! complete: it computes the schedule anew and compares, leaf by leaf, the digests of the samples that workers report
//! to have used.

use std::io::BufRead;
use std::num::NonZeroU32;

use serde::{Deserialize, Serialize};
use serde_json::value::RawValue;

use crate::hash::{Digest, DigestBuilder};
use crate::model::LayoutHash;
use crate::protocol::MemberId;
use crate::reduce::{NodeId, Tree};
use crate::shard::{MAX_SAMPLES, Schedule, samples_digest};

/// Version of the format.
const FORMAT: u32 = 1;

/// What the records that follow are about.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Header {
    /// Version of the format.
    pub lockstep_ledger: u32,
    /// The run's name.
    pub run: String,
    /// Key of the schedule's orders.
    pub seed: u64,
    /// Training samples.
    pub samples: NonZeroU32,
    /// Samples in a global batch.
    pub batch_size: NonZeroU32,
    /// Virtual shards.
    pub shards: u32,
    /// Whether samples are shuffled.
    pub shuffle: bool,
    /// Layout of the parameters.
    pub layout: LayoutHash,
    /// Digest of the parameters before the first round.
    pub initial_parameters: Digest,
}

impl Header {
    /// The header of a run.
    pub fn new(run: &str, schedule: &Schedule, layout: LayoutHash, initial_parameters: Digest) -> Self {
        Self {
            lockstep_ledger: FORMAT,
            run: run.to_owned(),
            seed: schedule.seed,
            samples: schedule.samples,
            batch_size: schedule.batch_size,
            shards: schedule.tree.shards(),
            shuffle: schedule.shuffle,
            layout,
            initial_parameters,
        }
    }

    fn schedule(&self) -> Option<Schedule> {
        let Self { seed, samples, batch_size, shuffle, .. } = *self;
        Some(Schedule { seed, samples, batch_size, shuffle, tree: Tree::over(self.shards)? })
    }
}

/// A tree node that a member sent and the sum was made of.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Contribution {
    /// Who computed it.
    pub by: MemberId,
    /// Which node.
    pub node: NodeId,
}

/// One round.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Record {
    /// Number of the round in the run, from 0.
    pub round: u64,
    /// Epoch, from 0.
    pub epoch: u32,
    /// Number of the round in its epoch, from 0.
    pub batch: u32,
    /// Samples used.
    pub samples: u32,
    /// Mean loss over them.
    #[serde(deserialize_with = "crate::json_float::or_nan")]
    pub loss: f64,
    /// Euclidean norm of the mean gradient.
    #[serde(deserialize_with = "crate::json_float::or_nan")]
    pub gradient_norm: f64,
    /// Digest of the parameters that the round made.
    pub parameters: Digest,
    /// Whether the round was skipped, because its loss or gradient is not finite: the parameters stayed as they were.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub skipped: bool,
    /// The nodes that the sum was made of, from left to right.
    pub nodes: Vec<Contribution>,
    /// For each leaf, the digest of the samples that its worker used.
    pub leaves: Vec<Digest>,
    /// Leaves that a second member was asked to compute as well, because the first was late; ascending. Both answers have
    /// the same bits: it changes nothing but who is credited.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub hedged: Vec<u32>,
    /// Leaves that two workers computed with the same bits, ascending.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub checked: Vec<u32>,
}

#[derive(Serialize, Deserialize)]
struct Line<T> {
    chain: Digest,
    record: T,
}

/// Turns records into lines.
#[derive(Clone, Debug)]
pub struct Chain {
    last: Digest,
}

impl Chain {
    /// A chain that starts with `header`, and the header's line.
    pub fn start(header: &Header) -> (Self, String) {
        let text = to_json(header);
        (Self { last: Digest::of(text.as_bytes()) }, text)
    }

    /// A chain that goes on after a line with this digest.
    pub fn resume(last: Digest) -> Self {
        Self { last }
    }

    /// Digest of the last line.
    pub fn last(&self) -> Digest {
        self.last
    }

    /// The line of the next record.
    pub fn line(&mut self, record: &Record) -> String {
        let text = to_json(record);
        self.last = link(self.last, &text);
        format!("{{\"chain\":\"{}\",\"record\":{text}}}", self.last)
    }
}

fn link(last: Digest, record: &str) -> Digest {
    let mut digest = DigestBuilder::default();
    digest.bytes(&last.0.to_le_bytes());
    digest.bytes(record.as_bytes());
    digest.finish()
}

fn to_json(value: &impl Serialize) -> String {
    serde_json::to_string(value).expect("numbers, strings and lists have a JSON form")
}

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
/// # Errors
/// [`AuditError`] names the first line that breaks the proof.
pub fn audit(ledger: impl BufRead) -> Result<Audit, AuditError> {
    let mut lines = ledger.lines();
    let first = lines.next().ok_or(AuditError::Empty)??;
    let (header, schedule) = parse_header(&first).map_err(|reason| AuditError::Line { line: 1, reason })?;
    let mut chain = Digest::of(first.as_bytes());
    let mut auditor = Auditor::new(header, schedule);
    for (number, line) in lines.enumerate() {
        let line = line?;
        let checked = parse_line(&line, &mut chain).and_then(|record| auditor.check(&record));
        checked.map_err(|reason| AuditError::Line { line: number as u64 + 2, reason })?;
    }
    Ok(auditor.finish())
}

fn parse_header(line: &str) -> Result<(Header, Schedule), String> {
    let header: Header = serde_json::from_str(line).map_err(|error| format!("no ledger header: {error}"))?;
    if header.lockstep_ledger != FORMAT {
        return Err(format!("format {}; this program reads format {FORMAT}", header.lockstep_ledger));
    }
    let shards = header.shards;
    let schedule = header.schedule().ok_or(format!("{shards} shards; it must be a power of two, at most 65536"))?;
    if header.samples.get() > MAX_SAMPLES {
        return Err(format!("{} samples; a run has at most {MAX_SAMPLES}", header.samples));
    }
    Ok((header, schedule))
}

/// The chain digest at the end of `line`, which is the ledger's first or a later one.
///
/// # Errors
/// When it is no line of a ledger.
pub fn chain_after(line: &str, first: bool) -> Result<Digest, String> {
    if first {
        return parse_header(line).map(|_| Digest::of(line.as_bytes()));
    }
    let line: Line<&RawValue> = serde_json::from_str(line).map_err(|error| error.to_string())?;
    Ok(line.chain)
}

/// Reads the header, the ledger's first line.
///
/// # Errors
/// When it is none that this program knows.
pub fn read_header(line: &str) -> Result<Header, String> {
    parse_header(line).map(|(header, _)| header)
}

/// Reads one record's line and checks its chain digest.
///
/// # Errors
/// What is wrong with the line.
pub fn parse_line(line: &str, chain: &mut Digest) -> Result<Record, String> {
    let line: Line<&RawValue> = serde_json::from_str(line).map_err(|error| match error.is_eof() {
        true => format!("{error}: the line is cut off; a run that is still going on may be writing it"),
        false => error.to_string(),
    })?;
    let expected = link(*chain, line.record.get());
    if line.chain != expected {
        return Err(format!(
            "chain digest is {}, expected {expected}: this line or one before it was changed",
            line.chain
        ));
    }
    *chain = expected;
    serde_json::from_str(line.record.get()).map_err(|error| error.to_string())
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
            if !self.members.contains(&contribution.by) {
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
    use super::*;

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
        audit(text.as_bytes()).map_err(|error| error.to_string())
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
        let message = audit(format!("{header}\n{line}").as_bytes()).unwrap_err().to_string();
        assert!(message.contains("line 2: chain digest"), "{message}");
        assert!(audit(&b""[..]).unwrap_err().to_string().contains("empty"));
        assert!(audit(&b"{}"[..]).unwrap_err().to_string().contains("no ledger header"));
    }
}
