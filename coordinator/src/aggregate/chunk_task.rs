//! What is done to one chunk of the parameters: adding a piece of a gradient, and the optimizer step.

use std::ops::Range;
use std::sync::Arc;
use std::time::{Duration, Instant};

use lockstep_common::hash::{Digest, DigestBuilder};
use lockstep_common::kernel::Isa;
use lockstep_common::kernel::elementwise::{self, AdamSlices, AdamStep, SquareSum};
use lockstep_common::optim::adam;
use lockstep_common::reduce::{NodeId, Reduction};
use lockstep_common::shared_memory::FloatBuffer;

/// How many parts' memory is kept for each chunk: as many as wait for their siblings when four workers send two nodes each.
const MAX_SPARE: usize = 8;

/// A part of a node's gradient, wherever it lies.
#[derive(Debug)]
pub(super) enum Piece {
    Owned(Vec<f32>),
    Shared(Arc<FloatBuffer>, Range<usize>),
}

impl Piece {
    fn values(&self) -> &[f32] {
        match self {
            Piece::Owned(values) => values,
            Piece::Shared(gradient, range) => &gradient[range.clone()],
        }
    }
}

/// What belongs to a chunk of the parameters from round to round.
#[derive(Debug, Default)]
pub(super) struct Chunk {
    /// The sum in the making; none when it was complete and the chunk is updated.
    pub(super) sum: Option<Reduction<Piece>>,
    /// Memory of parts that were added to others.
    pub(super) spare: Vec<Vec<f32>>,
    /// Of the last gradient.
    pub(super) sum_of_squares: f64,
    /// Of the last version.
    pub(super) digest: Digest,
}

/// How long a task took.
pub(super) struct ChunkTimes {
    pub(super) reduce: Duration,
    /// `None` if the sum is not complete yet.
    pub(super) update: Option<Duration>,
}

/// A piece of a node, and everything that it may change.
pub(super) struct ChunkTask<'a> {
    pub(super) index: usize,
    pub(super) piece: Option<Piece>,
    pub(super) updated: &'a mut [f32],
    pub(super) parameters: &'a [f32],
    pub(super) first_moment: &'a mut [f32],
    pub(super) second_moment: &'a mut [f32],
    pub(super) chunk: &'a mut Chunk,
}

impl ChunkTask<'_> {
    /// Adds the piece; takes the optimizer step if the sum is complete then.
    pub(super) fn run(&mut self, isa: Isa, step: AdamStep, node: NodeId) -> ChunkTimes {
        let started = Instant::now();
        let Self { piece, updated, parameters, first_moment, second_moment, chunk, .. } = self;
        let Chunk { sum, spare, sum_of_squares, digest } = &mut **chunk;
        if let (Some(sum), Some(piece)) = (sum.as_mut(), piece.take()) {
            sum.insert(node, piece, |left, right| add(isa, spare, left, right));
        }
        let root = sum.as_mut().and_then(Reduction::take_root);
        let reduce = started.elapsed();
        let Some(root) = root else { return ChunkTimes { reduce, update: None } };
        *sum = None;
        let gradient_sum = root.values();
        let slices = AdamSlices { parameters, gradient_sum, first_moment, second_moment, updated };
        (*sum_of_squares, *digest) = update(isa, step, slices);
        recycle(spare, root);
        ChunkTimes { reduce, update: Some(started.elapsed() - reduce) }
    }
}

/// Takes the optimizer step for a chunk, block by block, so that nothing is read from memory twice. Returns the
/// gradient's sum of squares and the digest of the updated parameters.
fn update(isa: Isa, step: AdamStep, slices: AdamSlices<'_>) -> (f64, Digest) {
    /// The five slices of a block are 80 KiB: they fit in any L2 cache.
    const BLOCK: usize = 4096;
    let AdamSlices { parameters, gradient_sum, first_moment, second_moment, updated } = slices;
    let (mut squares, mut digest) = (SquareSum::default(), DigestBuilder::default());
    let read = parameters.chunks(BLOCK).zip(gradient_sum.chunks(BLOCK));
    let written = first_moment.chunks_mut(BLOCK).zip(second_moment.chunks_mut(BLOCK)).zip(updated.chunks_mut(BLOCK));
    for ((parameters, gradient_sum), ((first_moment, second_moment), updated)) in read.zip(written) {
        squares.add(isa, gradient_sum);
        let slices = AdamSlices { parameters, gradient_sum, first_moment, second_moment, updated: &mut *updated };
        adam::apply(isa, step, slices);
        digest.floats(updated);
    }
    (squares.total(), digest.finish())
}

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
