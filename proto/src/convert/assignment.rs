//! Assignments, which come in several messages if their inline samples are many.

use std::sync::Arc;

use lockstep_common::protocol::{Assignment, Handing, Job, LeafTask, Split, Work};

use super::samples::{Bounds, Cutter, Gatherer};
use super::{at_most, required, sample_bytes};
use crate::limits::CHUNK_BYTES;
use crate::v1;
use crate::wire_error::{Fault, WireError};

/// What a leaf costs in a message besides its samples: 5 + 6 + 5 + 5 + 5 + 9 + 2 + 2 bytes of task, leaf, piece, ids,
/// data, checksum, flag and handing, rounded up.
const TASK_BYTES: usize = 40;

/// The messages that carry an assignment: one, unless the samples need more. The data is not copied.
pub(super) fn assign_messages(assignment: Assignment) -> impl Iterator<Item = v1::Assign> + Send + use<> {
    let work = assignment.work;
    let mut tasks = assignment.leaves.into_iter();
    let mut rest: Option<(u32, Handing, Cutter)> = None;
    let mut done = false;
    std::iter::from_fn(move || {
        if done {
            return None;
        }
        let mut message = v1::Assign { work: Some(work.into()), leaves: Vec::new(), last: false };
        let mut budget = CHUNK_BYTES;
        while budget >= TASK_BYTES {
            budget -= TASK_BYTES;
            let (leaf, handing, cutter) = match rest.take() {
                Some((leaf, handing, cutter)) => (leaf, handing, Some(cutter)),
                None => match tasks.next() {
                    Some(task) => (task.leaf, task.handing, task.inline.map(Cutter::new)),
                    None => {
                        message.last = true;
                        done = true;
                        break;
                    }
                },
            };
            let mut task = v1::LeafTask { leaf, inline: None, more: false, handing: v1::Handing::from(handing).into() };
            if let Some(mut cutter) = cutter {
                task.inline = Some(cutter.cut(&mut budget));
                task.more = !cutter.is_empty();
                rest = task.more.then_some((leaf, handing, cutter));
            }
            let cut = task.more;
            message.leaves.push(task);
            if cut {
                break;
            }
        }
        Some(message)
    })
}

impl From<Handing> for v1::Handing {
    fn from(handing: Handing) -> Self {
        match handing {
            Handing::Summed => Self::Summed,
            Handing::Alone => Self::Alone,
            Handing::Compared => Self::Compared,
        }
    }
}

fn handing(wire: i32) -> Result<Handing, WireError> {
    match v1::Handing::try_from(wire) {
        Ok(v1::Handing::Summed) => Ok(Handing::Summed),
        Ok(v1::Handing::Alone) => Ok(Handing::Alone),
        Ok(v1::Handing::Compared) => Ok(Handing::Compared),
        Ok(v1::Handing::Unspecified) | Err(_) => {
            Err(WireError::new("LeafTask", "handing", Fault::UnknownEnum { name: "Handing", value: wire }))
        }
    }
}

/// Puts assignments together, checking every message against the job.
#[derive(Debug)]
pub(super) struct AssignmentReader {
    shards: u32,
    training: Bounds,
    validation: Bounds,
    open: Option<Open>,
}

/// An assignment of which messages are missing.
#[derive(Debug)]
struct Open {
    work: Work,
    leaves: Vec<LeafTask>,
    /// The last leaf, if samples of it are missing.
    leaf: Option<(u32, Gatherer)>,
    /// Samples of all complete leaves.
    samples: u64,
}

impl AssignmentReader {
    pub(super) fn new(job: &Job) -> Self {
        let sample_bytes = sample_bytes(job) as u64;
        let (batch, validation) = (job.schedule.batch_size.get().into(), job.validation_samples.into());
        Self {
            shards: job.schedule.tree.shards(),
            training: Bounds { samples: batch, sample_bytes, ids: job.schedule.samples.get().into() },
            validation: Bounds { samples: validation, sample_bytes, ids: validation },
            open: None,
        }
    }

    /// Takes the next message in; gives the assignment after its last one.
    pub(super) fn read(&mut self, message: v1::Assign) -> Result<Option<Assignment>, WireError> {
        const M: &str = "Assign";
        let work: Work = required(M, "work", message.work)?;
        let bounds = match work.split() {
            Split::Training => self.training,
            Split::Validation => self.validation,
        };
        let mut open = self.open.take().unwrap_or(Open { work, leaves: Vec::new(), leaf: None, samples: 0 });
        if open.work != work {
            let fault = Fault::OutOfOrder { expected: "the rest of an assignment", got: "other work" };
            return Err(WireError::new(M, "work", fault));
        }
        for (i, task) in message.leaves.into_iter().enumerate() {
            open.add(task, self.shards, bounds).map_err(|error| error.within(M, format!("leaves[{i}]")))?;
        }
        if !message.last {
            self.open = Some(open);
            return Ok(None);
        }
        match open.leaf {
            Some(_) => Err(WireError::new(M, "last", Fault::OutOfOrder { expected: "more samples", got: "the end" })),
            None => Ok(Some(Assignment { work, leaves: open.leaves })),
        }
    }
}

impl Open {
    fn add(&mut self, task: v1::LeafTask, shards: u32, bounds: Bounds) -> Result<(), WireError> {
        const M: &str = "LeafTask";
        let leaf = task.leaf;
        let handing = handing(task.handing)?;
        at_most(leaf.into(), u64::from(shards) - 1, "").map_err(|fault| WireError::new(M, "leaf", fault))?;
        let continued = match self.leaf.take() {
            Some((open, gatherer)) if open == leaf => Some(gatherer),
            Some(_) => {
                let fault = Fault::OutOfOrder { expected: "the leaf's other samples", got: "another leaf" };
                return Err(WireError::new(M, "leaf", fault));
            }
            None => None,
        };
        if let (None, Some(before)) = (&continued, self.leaves.last())
            && before.leaf >= leaf
        {
            return Err(WireError::new(M, "leaf", Fault::NotAscending { before: before.leaf, value: leaf }));
        }
        let Some(piece) = task.inline else {
            if continued.is_some() || task.more {
                return Err(WireError::missing(M, "inline"));
            }
            self.leaves.push(LeafTask { leaf, inline: None, handing });
            return Ok(());
        };
        // All leaves together have no more samples than the work has.
        let left = Bounds { samples: bounds.samples.saturating_sub(self.samples), ..bounds };
        let mut gatherer = continued.unwrap_or_else(Gatherer::new);
        gatherer.add(&piece, left).map_err(|error| error.within(M, "inline"))?;
        if task.more {
            self.leaf = Some((leaf, gatherer));
            return Ok(());
        }
        let samples = gatherer.finish(bounds).map_err(|error| error.within(M, "inline"))?;
        self.samples += samples.ids.len() as u64;
        self.leaves.push(LeafTask { leaf, inline: Some(Arc::new(samples)), handing });
        Ok(())
    }
}
