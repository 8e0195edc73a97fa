//! Reduce, update, broadcast: one pipeline, chunk by chunk.
//!
//! The aggregator runs on a thread of its own. It combines the parts of tree nodes by position; as soon as a chunk's
//! root is complete it takes the optimizer step for that chunk and reports the new parameters. Version `v` stays
//! readable as a whole until version `v + 1` is.

use std::collections::HashMap;
use std::ops::Range;
use std::sync::Arc;
use std::time::Instant;

use lockstep_common::hash::Digest;
use lockstep_common::kernel::Isa;
use lockstep_common::kernel::elementwise::{self, AdamSlices, AdamStep};
use lockstep_common::optim::Adam;
use lockstep_common::optim::adam::{self, Moments};
use lockstep_common::progress::Aggregation;
use lockstep_common::protocol::{Bytes, CHUNK_FLOATS, MemberId, NodeChunk, chunks, combine_chunk_digests};
use lockstep_common::reduce::{NodeId, Reduction, Tree};
use rayon::prelude::*;
use tokio::sync::mpsc;

/// How many parts' memory is kept: as many as two workers send for a model of 16 million parameters.
const MAX_SPARE: usize = 128;

/// What the aggregator is told, in this order for each round: one `Begin`; then, for each node, one `Expect` before the
/// parts of its gradient.
#[derive(Debug)]
pub enum ToAggregator {
    /// A round starts.
    Begin {
        /// Which round.
        round: u64,
        /// Samples in its global batch.
        samples: u32,
    },
    /// The member's node was checked; its parts are welcome.
    Expect(MemberId, NodeId),
    /// A part of a node's gradient.
    Chunk(MemberId, NodeChunk),
    /// A node's whole gradient, from a worker in this process.
    Whole {
        /// Who computed it.
        member: MemberId,
        /// Round of the gradient.
        round: u64,
        /// Which node.
        node: NodeId,
        /// The flat vector.
        gradient: Arc<Vec<f32>>,
    },
}

/// What the aggregator reports.
#[derive(Debug)]
pub enum FromAggregator {
    /// All parts of a node are there.
    Arrived {
        /// Who sent them.
        member: MemberId,
        /// Round of the gradient.
        round: u64,
        /// Which node.
        node: NodeId,
    },
    /// A chunk of the next version is made.
    Updated {
        /// Rounds that make the version.
        version: u64,
        /// Which chunk.
        chunk: u32,
        /// Little-endian floats.
        data: Bytes,
    },
    /// The next version is whole.
    Reduced {
        /// The round that made it.
        round: u64,
        /// Euclidean norm of the mean gradient.
        gradient_norm: f64,
        /// Digest of the parameters.
        digest: Digest,
        /// The parameters.
        parameters: Arc<Vec<f32>>,
        /// What the round took here.
        took: Aggregation,
    },
    /// A member sent what cannot be.
    Violation {
        /// Who.
        member: MemberId,
        /// What.
        reason: String,
    },
}

/// A part of a node's gradient, wherever it lies.
#[derive(Debug)]
enum Piece {
    Owned(Vec<f32>),
    Shared(Arc<Vec<f32>>, Range<usize>),
}

impl Piece {
    fn values(&self) -> &[f32] {
        match self {
            Piece::Owned(values) => values,
            Piece::Shared(gradient, range) => &gradient[range.clone()],
        }
    }
}

/// One round's state.
#[derive(Debug)]
struct Round {
    number: u64,
    samples: u32,
    step: AdamStep,
    /// Sums of the chunks that are not updated yet.
    sums: Vec<Option<Reduction<Piece>>>,
    /// For each awaited node, which of its chunks are there.
    awaited: HashMap<(MemberId, NodeId), Vec<bool>>,
    updated: usize,
    took: Aggregation,
}

/// What an update of a chunk leaves behind.
#[derive(Clone, Copy, Debug, Default)]
struct ChunkResult {
    sum_of_squares: f64,
    digest: Digest,
}

/// See the module's documentation.
#[derive(Debug)]
pub struct Aggregator {
    tree: Tree,
    adam: Adam,
    isa: Isa,
    parameters: Arc<Vec<f32>>,
    next: Vec<f32>,
    /// Earlier versions; their memory is used again once nobody reads them.
    retired: Vec<Arc<Vec<f32>>>,
    /// Memory of parts that were added to others.
    spare: Vec<Vec<f32>>,
    moments: Moments,
    results: Vec<ChunkResult>,
    round: Option<Round>,
    /// Whether anybody wants the chunks one by one.
    broadcast_chunks: bool,
    report: mpsc::UnboundedSender<FromAggregator>,
}

impl Aggregator {
    /// An aggregator that starts from `parameters`. With `broadcast_chunks` it reports every chunk of a new version, for
    /// workers in other processes; reports are as many as chunks, so that their channel needs no bound of its own.
    pub fn new(
        tree: Tree,
        adam: Adam,
        isa: Isa,
        parameters: Arc<Vec<f32>>,
        broadcast_chunks: bool,
        report: mpsc::UnboundedSender<FromAggregator>,
    ) -> Self {
        let len = parameters.len();
        Self {
            tree,
            adam,
            isa,
            next: vec![0.0; len],
            retired: Vec::new(),
            spare: Vec::new(),
            moments: Moments::zero(len),
            results: vec![ChunkResult::default(); len.div_ceil(CHUNK_FLOATS)],
            parameters,
            round: None,
            broadcast_chunks,
            report,
        }
    }

    /// Works until all senders are gone or nobody reads the reports any more.
    pub fn run(mut self, mut inbox: mpsc::Receiver<ToAggregator>) {
        loop {
            let idle = Instant::now();
            let Some(message) = inbox.blocking_recv() else { return };
            if let Some(round) = self.round.as_mut().filter(|round| !round.awaited.is_empty()) {
                round.took.upload += idle.elapsed();
            }
            if self.handle(message).is_err() {
                return;
            }
        }
    }

    fn handle(&mut self, message: ToAggregator) -> Result<(), Closed> {
        match message {
            ToAggregator::Begin { round, samples } => self.begin(round, samples),
            ToAggregator::Expect(member, node) => {
                let chunks = self.results.len();
                if let Some(round) = &mut self.round {
                    round.awaited.insert((member, node), vec![false; chunks]);
                }
            }
            ToAggregator::Chunk(member, part) => self.chunk(member, part)?,
            ToAggregator::Whole { member, round, node, gradient } => self.whole(member, round, node, &gradient)?,
        }
        Ok(())
    }

    fn begin(&mut self, round: u64, samples: u32) {
        let sums = (0..self.results.len()).map(|_| Some(Reduction::new(self.tree))).collect();
        let step = self.adam.step(round + 1, samples);
        self.round = Some(Round {
            number: round,
            samples,
            step,
            sums,
            awaited: HashMap::new(),
            updated: 0,
            took: Aggregation::default(),
        });
    }

    fn chunk(&mut self, member: MemberId, part: NodeChunk) -> Result<(), Closed> {
        let Some((chunk, range)) = chunks(self.next.len()).nth(part.chunk as usize) else {
            let reason = format!("chunk {} does not exist, the parameters have {}", part.chunk, self.results.len());
            return self.send(FromAggregator::Violation { member, reason });
        };
        if part.data.len() != range.len() {
            let reason = format!("chunk {chunk} has {} floats, {} were sent", range.len(), part.data.len());
            return self.send(FromAggregator::Violation { member, reason });
        }
        self.take(member, part.round, part.node, [(chunk as usize, Piece::Owned(part.data))])
    }

    fn whole(&mut self, member: MemberId, round: u64, node: NodeId, gradient: &Arc<Vec<f32>>) -> Result<(), Closed> {
        if gradient.len() != self.next.len() {
            let reason = format!("a gradient of {} floats for {} parameters", gradient.len(), self.next.len());
            return self.send(FromAggregator::Violation { member, reason });
        }
        let pieces = chunks(gradient.len());
        let pieces = pieces.map(|(chunk, range)| (chunk as usize, Piece::Shared(gradient.clone(), range)));
        self.take(member, round, node, pieces)
    }

    /// Adds parts of an awaited node to the sums; updates the chunks that are complete now. What is not awaited is of
    /// another round or was checked and found wrong, and is dropped.
    fn take(
        &mut self,
        member: MemberId,
        number: u64,
        node: NodeId,
        pieces: impl IntoIterator<Item = (usize, Piece)>,
    ) -> Result<(), Closed> {
        let Some(round) = self.round.as_mut().filter(|round| round.number == number) else { return Ok(()) };
        let Some(there) = round.awaited.get_mut(&(member, node)) else { return Ok(()) };
        let mut complete = Vec::new();
        let started = Instant::now();
        for (chunk, piece) in pieces {
            there[chunk] = true;
            let Some(sum) = &mut round.sums[chunk] else { continue };
            sum.insert(node, piece, |left, right| add(self.isa, &mut self.spare, left, right));
            if let Some(root) = sum.take_root() {
                round.sums[chunk] = None;
                complete.push((chunk, root));
            }
        }
        round.took.reduce += started.elapsed();
        if there.iter().all(|&there| there) {
            round.awaited.remove(&(member, node));
            self.send(FromAggregator::Arrived { member, round: number, node })?;
        }
        self.update(complete)
    }

    /// Takes the optimizer step for chunks whose gradient is complete, in parallel.
    fn update(&mut self, complete: Vec<(usize, Piece)>) -> Result<(), Closed> {
        let Some(round) = &mut self.round else { return Ok(()) };
        if complete.is_empty() {
            return Ok(());
        }
        let started = Instant::now();
        let (isa, step) = (self.isa, round.step);
        let mut roots: Vec<Option<Piece>> = Vec::new();
        roots.resize_with(self.results.len(), || None);
        let updated: Vec<usize> = complete.iter().map(|&(chunk, _)| chunk).collect();
        complete.into_iter().for_each(|(chunk, root)| roots[chunk] = Some(root));
        self.next
            .par_chunks_mut(CHUNK_FLOATS)
            .zip(self.parameters.par_chunks(CHUNK_FLOATS))
            .zip(self.moments.first.par_chunks_mut(CHUNK_FLOATS))
            .zip(self.moments.second.par_chunks_mut(CHUNK_FLOATS))
            .zip(&roots)
            .zip(&mut self.results)
            .for_each(|(((((updated, parameters), first_moment), second_moment), root), result)| {
                let Some(root) = root else { return };
                let gradient_sum = root.values();
                result.sum_of_squares = elementwise::sum_of_squares(isa, gradient_sum);
                adam::apply(isa, step, AdamSlices { parameters, gradient_sum, first_moment, second_moment, updated });
                result.digest = Digest::of_floats(updated);
            });
        round.took.update += started.elapsed();
        round.updated += updated.len();
        let done = round.updated == self.results.len();
        let version = round.number + 1;
        for root in roots.into_iter().flatten() {
            recycle(&mut self.spare, root);
        }
        if self.broadcast_chunks {
            for chunk in updated {
                let start = chunk * CHUNK_FLOATS;
                let values = &self.next[start..(start + CHUNK_FLOATS).min(self.next.len())];
                let data = to_bytes(values);
                self.send(FromAggregator::Updated { version, chunk: chunk as u32, data })?;
            }
        }
        if done { self.commit() } else { Ok(()) }
    }

    /// All chunks are updated: the next version becomes the current one.
    fn commit(&mut self) -> Result<(), Closed> {
        let Some(round) = &self.round else { return Ok(()) };
        // The round stays: parts of nodes that are in the sum already are still awaited, and reported when they are whole.
        let (number, samples, took) = (round.number, round.samples, round.took);
        let sum_of_squares: f64 = self.results.iter().fold(0.0, |sum, result| sum + result.sum_of_squares);
        let made = Arc::new(std::mem::take(&mut self.next));
        let old = std::mem::replace(&mut self.parameters, made);
        self.retired.push(old);
        self.next = self.buffer_for_next();
        self.send(FromAggregator::Reduced {
            round: number,
            gradient_norm: sum_of_squares.sqrt() / f64::from(samples),
            digest: combine_chunk_digests(self.results.iter().map(|result| result.digest)),
            parameters: self.parameters.clone(),
            took,
        })
    }

    /// Memory of a version that nobody reads any more, or new memory.
    fn buffer_for_next(&mut self) -> Vec<f32> {
        let free = self.retired.iter().position(|version| Arc::strong_count(version) == 1);
        let reused = free.and_then(|at| Arc::try_unwrap(self.retired.swap_remove(at)).ok());
        reused.unwrap_or_else(|| vec![0.0; self.parameters.len()])
    }

    fn send(&self, report: FromAggregator) -> Result<(), Closed> {
        self.report.send(report).map_err(|_| Closed)
    }
}

/// Nobody reads the reports any more.
struct Closed;

/// The sum of two siblings, in the memory of the left one if it is ours.
fn add(isa: Isa, spare: &mut Vec<Vec<f32>>, left: Piece, right: Piece) -> Piece {
    let mut sum = match left {
        Piece::Owned(values) => values,
        Piece::Shared(..) => {
            let mut values = spare.pop().unwrap_or_default();
            values.clear();
            values.extend_from_slice(left.values());
            values
        }
    };
    elementwise::add(isa, &mut sum, right.values());
    recycle(spare, right);
    Piece::Owned(sum)
}

fn recycle(spare: &mut Vec<Vec<f32>>, piece: Piece) {
    if let (Piece::Owned(values), true) = (piece, spare.len() < MAX_SPARE) {
        spare.push(values);
    }
}

/// Little-endian bytes of floats, to be shared by all links.
pub(crate) fn to_bytes(values: &[f32]) -> Bytes {
    values.iter().flat_map(|value| value.to_le_bytes()).collect::<Vec<u8>>().into()
}
