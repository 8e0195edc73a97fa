//! The products of dense layers against plain loops in the documented order, to the bit, for leaves of any sizes and any
//! number of threads. No float outside an operand may matter or change. In bfloat16 operands are rounded first, and sums
//! over samples take two at a time; in blocks of pairs, if products are added as AMX adds them.

use lockstep_common::kernel::bf16;
use lockstep_common::kernel::contraction::{
    After, Crew, Dense, DenseForward, DenseInputGradient, DenseShape, DenseWeightGradient, MAX_LEAVES, SparseOperand,
};
use lockstep_common::kernel::{Arithmetic, Compute, Isa, Precision};
use lockstep_common::rng::{Purpose, Stream};

/// A NaN that no arithmetic makes.
const CANARY: f32 = f32::from_bits(0x7fa5_a5a5);
/// Floats of it on either side of an output.
const GUARD: usize = 80;

fn random(len: usize, seed: usize) -> Vec<f32> {
    let mut stream = Stream::new(21, Purpose::SelfTest, len as u32, seed as u32);
    (0..len).map(|_| if stream.below(8) == 0 { 0.0 } else { stream.uniform() * 2.0 - 1.0 }).collect()
}

/// What `write` makes of `len` floats, and nothing around them.
fn guarded(place: &str, before: &[f32], write: impl FnOnce(&mut [f32])) -> Vec<f32> {
    let guard = [CANARY; GUARD];
    let mut memory = [&guard, before, &guard].concat();
    write(&mut memory[GUARD..GUARD + before.len()]);
    let outside = memory[..GUARD].iter().chain(&memory[GUARD + before.len()..]);
    assert!(outside.map(|value| value.to_bits()).all(|bits| bits == CANARY.to_bits()), "{place}: writes outside");
    memory[GUARD..GUARD + before.len()].to_vec()
}

fn assert_same_bits(place: &str, got: &[f32], expected: &[f32]) {
    assert_eq!(got.len(), expected.len(), "{place}: length");
    for (i, (got, expected)) in got.iter().zip(expected).enumerate() {
        assert_eq!(got.to_bits(), expected.to_bits(), "{place}: element {i} is {got:e}, expected {expected:e}");
    }
}

/// A sum of products, given as factors. In bfloat16 they come in pairs, the last one of an odd number with 0: 16 pairs are a block,
/// whose first products make a chain, and its second ones.
fn sum(compute: Compute, start: f32, factors: impl Iterator<Item = [f32; 2]>) -> f32 {
    let chain = |sum: f32, [a, b]: [f32; 2]| a.mul_add(b, sum);
    let sum = match compute {
        Compute::F32 | Compute::Bf16 => factors.fold(start, chain),
        Compute::Bf16Amx => factors.collect::<Vec<_>>().chunks(32).fold(start, |sum, block| {
            let of = |first: usize| block.iter().skip(first).step_by(2).copied().fold(0.0, chain);
            sum + (of(0) + of(1))
        }),
    };
    sum + 0.0
}

/// `start(row, column)` plus the products `a(row, k) * b(k, column)` for ascending k.
fn product(
    compute: Compute,
    [rows, depth, columns]: [usize; 3],
    start: impl Fn(usize, usize) -> f32,
    a: impl Fn(usize, usize) -> f32,
    b: impl Fn(usize, usize) -> f32,
) -> Vec<f32> {
    let places = (0..rows).flat_map(|row| (0..columns).map(move |column| (row, column)));
    places
        .map(|(row, column)| sum(compute, start(row, column), (0..depth).map(|k| [a(row, k), b(k, column)])))
        .collect()
}

fn gate(gates: &[f32], values: Vec<f32>) -> Vec<f32> {
    values.into_iter().zip(gates).map(|(value, &gate)| if gate <= 0.0 { 0.0 } else { value }).collect()
}

/// Operands of weight gradients whose zeros are left out, and none.
const SPARSE: [Option<SparseOperand>; 3] = [None, Some(SparseOperand::Input), Some(SparseOperand::Delta)];

fn dense(
    arithmetic: impl Into<Arithmetic>,
    shape: DenseShape,
    max_samples: usize,
    sparse: Option<SparseOperand>,
) -> Dense {
    let plan = Dense::new(arithmetic, shape, max_samples);
    match sparse {
        Some(sparse) => plan.with_sparse(sparse),
        None => plan,
    }
}

#[derive(Debug)]
struct Case {
    shape: DenseShape,
    /// Samples of each leaf.
    leaves: Vec<usize>,
    with_bias: bool,
    threads: usize,
}

impl Case {
    /// The order in which a leaf's rows, (sample, pixel), are summed: sample by sample, or two samples by two, the last one of an
    /// odd number with none.
    fn order(&self, samples: usize, compute: Compute) -> Vec<Option<usize>> {
        let (pixels, together) = (self.shape.pixels, if compute == Compute::F32 { 1 } else { 2 });
        let of_block = |first: usize| {
            let row = move |sample: usize, pixel: usize| (sample < samples).then_some(sample * pixels + pixel);
            (0..pixels).flat_map(move |pixel| (first..first + together).map(move |sample| row(sample, pixel)))
        };
        (0..samples).step_by(together).flat_map(of_block).collect()
    }

    /// The gradient of kernel and bias over one leaf, on top of `start`.
    fn leaf_gradient(&self, input: &[f32], delta: &[f32], start: &[f32], compute: Compute) -> Vec<f32> {
        let DenseShape { pixels, inputs, outputs } = self.shape;
        let order = self.order(delta.len() / outputs / pixels, compute);
        let depth = order.len();
        let in_order = |values: &[f32], columns: usize| -> Vec<f32> {
            let of_row = |row: &Option<usize>| match row {
                Some(row) => values[row * columns..][..columns].to_vec(),
                None => vec![0.0; columns],
            };
            order.iter().flat_map(of_row).collect()
        };
        let (input, delta) = (in_order(input, inputs), in_order(delta, outputs));
        let kernel = product(
            compute,
            [inputs, depth, outputs],
            |i, j| start[i * outputs + j],
            |i, k| input[k * inputs + i],
            |k, j| delta[k * outputs + j],
        );
        // The weight of an input that is always 1.
        let bias = (inputs * outputs..start.len()).map(|place| {
            sum(compute, start[place], delta.iter().skip(place % outputs).step_by(outputs).map(|&d| [1.0, d]))
        });
        kernel.iter().copied().chain(bias).collect()
    }

    /// The sum of the leaves, each of which, and each sum of two, goes through `round`.
    fn tree(leaves: Vec<Vec<f32>>, round: impl Fn(f32) -> f32) -> Vec<f32> {
        let rounded = |leaf: Vec<f32>| leaf.into_iter().map(&round).collect();
        let mut leaves: Vec<Vec<f32>> = leaves.into_iter().map(rounded).collect();
        while leaves.len() > 1 {
            let add =
                |pair: &[Vec<f32>]| pair[0].iter().zip(&pair[1]).map(|(left, right)| round(left + right)).collect();
            leaves = leaves.chunks(2).map(add).collect();
        }
        leaves.remove(0)
    }

    /// The weights as they are stored, and what lies behind them.
    fn in_panels(&self, weights: &[f32]) -> Vec<f32> {
        let matrix = self.shape.weights();
        let mut stored = weights.to_vec();
        matrix.store(&weights[..matrix.elements()], &mut stored[..matrix.elements()]);
        stored
    }

    fn check(&self) {
        Compute::ALL.into_iter().for_each(|compute| self.check_in(compute));
    }

    fn check_in(&self, compute: Compute) {
        let DenseShape { pixels, inputs, outputs } = self.shape;
        let samples: usize = self.leaves.iter().sum();
        let rows = samples * pixels;
        let (input, delta) = (random(rows * inputs, 1), random(rows * outputs, 2));
        let (weights, bias) = (random(inputs * outputs, 3), random(outputs, 4));
        let bias = self.with_bias.then_some(&bias[..]);
        let given = (input.clone(), delta.clone(), weights.clone());
        let round = |values: Vec<f32>| match compute.operands() {
            Precision::F32 => values,
            Precision::Bf16 => values.into_iter().map(bf16::round).collect(),
        };
        let [input, delta, weights] = [input, delta, weights].map(round);
        let (outward, inward) = (random(rows * outputs, 5), random(rows * inputs, 6));

        let start = |_, j: usize| bias.map_or(0.0, |bias| bias[j]);
        let sums = product(
            compute,
            [rows, inputs, outputs],
            start,
            |i, k| input[i * inputs + k],
            |k, j| weights[k * outputs + j],
        );
        let back = product(
            compute,
            [rows, outputs, inputs],
            |_, _| 0.0,
            |i, k| delta[i * outputs + k],
            |k, j| weights[j * outputs + k],
        );
        let before = random((inputs + usize::from(self.with_bias)) * outputs, 7);
        let zero = vec![0.0; before.len()];
        let mut first = 0;
        let of_leaves = self.leaves.iter().map(|&count| {
            let range = first..first + count * pixels;
            first = range.end;
            let input = &input[range.start * inputs..range.end * inputs];
            self.leaf_gradient(input, &delta[range.start * outputs..range.end * outputs], &zero, compute)
        });
        let of_leaves: Vec<Vec<f32>> = of_leaves.collect();
        let gradient = Self::tree(of_leaves.clone(), |sum| sum);
        // A single leaf may not be whole.
        let rounded_gradient = if of_leaves.len() > 1 { Self::tree(of_leaves, bf16::round) } else { gradient.clone() };
        let continued = self.leaf_gradient(&input, &delta, &before, compute);
        let (input, delta, weights) = given;
        // Everything up to here lies row by row.
        let weights = self.in_panels(&weights);
        let [gradient, rounded_gradient, before, continued] =
            [gradient, rounded_gradient, before, continued].map(|gradient| self.in_panels(&gradient));

        for isa in Isa::available() {
            let place = format!("{self:?} in {compute} on {isa}");
            // A plan may be for more samples than there are.
            let plan = Dense::new(Arithmetic { isa, compute }, self.shape, samples + 1);
            let mut crew = Crew::new(self.threads, plan.crew());
            let blank = vec![CANARY; rows * outputs];
            for (after, expected) in [
                (After::Keep, sums.clone()),
                (After::Relu, gate(&sums, sums.clone())),
                (After::Gate(&outward), gate(&outward, sums.clone())),
            ] {
                let got = guarded(&place, &blank, |output| {
                    let operands = DenseForward { input: &input, weights: &weights, bias, output, after };
                    plan.forward(samples, operands, &mut crew);
                });
                assert_same_bits(&format!("forward, {place}"), &got, &expected);
            }
            let got = guarded(&place, &vec![CANARY; rows * inputs], |input_gradient| {
                let after = After::Gate(&inward);
                let operands = DenseInputGradient { delta: &delta, weights: &weights, input_gradient, after };
                plan.input_gradient(samples, operands, &mut crew);
            });
            assert_same_bits(&format!("input gradient, {place}"), &got, &gate(&inward, back.clone()));

            // To leave out zeros changes no bit.
            for sparse in SPARSE {
                let plan = dense(Arithmetic { isa, compute }, self.shape, samples + 1, sparse);
                let mut crew = Crew::new(self.threads, plan.crew());
                let place = format!("{sparse:?}, {place}");
                let mut sum = |leaves: &[usize], before: &[f32], accumulate, nodes| {
                    guarded(&place, before, |gradient| {
                        let operands =
                            DenseWeightGradient { input: &input, delta: &delta, gradient, accumulate, nodes };
                        match sparse {
                            Some(_) => plan.sparse_weight_gradient(leaves, operands, &mut crew),
                            None => plan.weight_gradient(leaves, operands, &mut crew),
                        };
                    })
                };
                for (nodes, gradient) in [(Precision::F32, &gradient), (Precision::Bf16, &rounded_gradient)] {
                    let got = sum(&self.leaves, &vec![CANARY; before.len()], false, nodes);
                    assert_same_bits(&format!("weight gradient, {nodes} nodes, {place}"), &got, gradient);
                }
                let got = sum(&[samples], &before, true, Precision::F32);
                assert_same_bits(&format!("continued weight gradient, {place}"), &got, &continued);
            }
        }
    }
}

#[test]
fn sizes_around_vectors_and_panels() {
    let sizes = [1, 2, 7, 8, 9, 15, 16, 17, 31, 33, 48, 63, 65, 131];
    for (i, a) in sizes.into_iter().enumerate() {
        for (j, b) in [1, 6, 16, 70].into_iter().enumerate() {
            for (inputs, outputs) in [(a, b), (b, a)] {
                let pixels = if outputs > 1 { i % 3 + 1 } else { 1 };
                let shape = DenseShape { pixels, inputs, outputs };
                let leaves = [vec![5], vec![3, 4], vec![1, 0, 2, 6], vec![0]][(i + j) % 4].clone();
                Case { shape, leaves, with_bias: (i + j) % 3 > 0, threads: 1 }.check();
            }
        }
    }
}

#[test]
fn leaves_of_any_number_and_size_are_added_as_a_tree() {
    let shape = DenseShape { pixels: 1, inputs: 13, outputs: 37 };
    for count in [1, 2, 4, 8, 16, 32, 64, MAX_LEAVES] {
        for sizes in [&[1][..], &[0], &[0, 0, 3], &[4, 1, 0, 7, 2], &[16, 15]] {
            let leaves = sizes.iter().copied().cycle().take(count).collect();
            Case { shape, leaves, with_bias: true, threads: 1 }.check();
        }
    }
}

#[test]
fn work_that_threads_share() {
    // Enough products to be shared, with rows and columns that do not divide evenly.
    let shape = DenseShape { pixels: 1, inputs: 131, outputs: 150 };
    for threads in 1..=4 {
        let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
        let leaves = [7, 12, 25, 0, 13, 40, 3, 110].to_vec();
        pool.install(|| Case { shape, leaves, with_bias: true, threads }.check());
    }
}

/// Scenario: so many listed elements and samples that a desk does not keep all lists. Property: the same bits.
#[test]
fn lists_that_are_not_kept() {
    for (inputs, outputs) in [(3400, 3), (3, 3400)] {
        let shape = DenseShape { pixels: 1, inputs, outputs };
        Case { shape, leaves: vec![300, 256], with_bias: true, threads: 1 }.check_in(Compute::F32);
    }
}

/// Scenario: leaves are added whose gradients are finite, or hold one infinity or NaN, or overflow. Property: only what is
/// finite is said to be known to be finite, whichever tile, row or column it is in.
#[test]
fn what_is_said_to_be_finite_is_finite() {
    let shape = DenseShape { pixels: 1, inputs: 23, outputs: 112 };
    let leaves = [3, 2];
    for isa in Isa::available() {
        for (nodes, sparse) in Precision::ALL.into_iter().flat_map(|nodes| SPARSE.map(|sparse| (nodes, sparse))) {
            let plan = dense(isa, shape, 5, sparse);
            let mut crew = Crew::new(1, plan.crew());
            let mut known = |leaves: &[usize], change: &dyn Fn(&mut [f32], &mut [f32])| {
                let (mut input, mut delta) = (random(5 * shape.inputs, 1), random(5 * shape.outputs, 2));
                change(&mut input, &mut delta);
                let mut gradient = vec![CANARY; (shape.inputs + 1) * shape.outputs];
                let operands = DenseWeightGradient {
                    input: &input,
                    delta: &delta,
                    gradient: &mut gradient,
                    accumulate: false,
                    nodes,
                };
                let known = match sparse {
                    Some(_) => plan.sparse_weight_gradient(leaves, operands, &mut crew),
                    None => plan.weight_gradient(leaves, operands, &mut crew),
                };
                (known, gradient.iter().all(|value| value.is_finite()))
            };
            assert_eq!(known(&leaves, &|_, _| ()), (true, true), "{isa}");
            let is_looked_at = sparse.is_some() && nodes == Precision::F32;
            assert_eq!(known(&[5], &|_, _| ()), (is_looked_at, true), "{isa}: who looks at a single leaf");
            for place in 0..5 * shape.outputs {
                for wrong in [f32::INFINITY, f32::NEG_INFINITY, f32::NAN] {
                    assert_eq!(known(&leaves, &|_, delta| delta[place] = wrong), (false, false), "{isa}: {place}");
                }
            }
            for row in 0..shape.inputs {
                // One sample of each leaf: half of the largest number each, and their sum is above it.
                let overflow = |input: &mut [f32], delta: &mut [f32]| {
                    input.fill(0.0);
                    delta.fill(0.0);
                    for sample in [0, 3] {
                        input[sample * shape.inputs + row] = f32::MAX * 0.7;
                        delta[sample * shape.outputs + 100] = 1.0;
                    }
                };
                assert_eq!(known(&leaves, &overflow), (false, false), "{isa}: row {row}");
            }
        }
    }
}

/// Scenario: either operand is infinite, or NaN, where the other one is 0. Property: the same sums are no numbers, and all others
/// have the same bits, whether products with zeros are left out or not.
#[test]
fn what_is_not_finite_meets_zeros_too() {
    let shape = DenseShape { pixels: 1, inputs: 23, outputs: 112 };
    for (isa, sparse) in Isa::available().into_iter().flat_map(|isa| SPARSE.map(|sparse| (isa, sparse))) {
        for (wrong, in_input) in [f32::INFINITY, f32::NAN].into_iter().flat_map(|x| [(x, true), (x, false)]) {
            let (mut input, mut delta) = (random(4 * shape.inputs, 1), random(4 * shape.outputs, 2));
            let (of_input, of_delta) = (&mut input[2 * shape.inputs..][..9], &mut delta[2 * shape.outputs..][..80]);
            of_input.fill(if in_input { wrong } else { -0.0 });
            of_delta.fill(if in_input { 0.0 } else { wrong });
            let gradient = |plan: Dense| {
                let mut gradient = vec![CANARY; shape.inputs * shape.outputs];
                let operands = DenseWeightGradient {
                    input: &input,
                    delta: &delta,
                    gradient: &mut gradient,
                    accumulate: false,
                    nodes: Precision::F32,
                };
                let known = plan.sparse_weight_gradient(&[2, 2], operands, &mut Crew::new(1, plan.crew()));
                assert!(!known, "{sparse:?} on {isa}: known to be finite");
                // All NaN are alike.
                gradient.into_iter().map(|sum| if sum.is_nan() { f32::NAN } else { sum }).collect::<Vec<f32>>()
            };
            let expected = gradient(dense(Isa::SCALAR, shape, 4, None));
            assert!(expected[0].is_nan(), "infinity times 0");
            let place = format!("{sparse:?} on {isa}, {wrong} in the input: {in_input}");
            assert_same_bits(&place, &gradient(dense(isa, shape, 4, sparse)), &expected);
        }
    }
}

/// Scenario: the only product of a sum is negative and too small for any number. Property: the sum is 0, not -0, whether products
/// with zeros come behind it or are left out.
#[test]
fn no_sum_is_negative_zero() {
    let shape = DenseShape { pixels: 1, inputs: 23, outputs: 112 };
    for (arithmetic, sparse) in Isa::available().into_iter().flat_map(|isa| SPARSE.map(|sparse| (isa, sparse))) {
        let plan = dense(arithmetic, shape, 4, sparse);
        let (mut input, mut delta) = (vec![-0.0; 4 * shape.inputs], vec![-0.0; 4 * shape.outputs]);
        input[..shape.inputs].fill(1e-30);
        delta[..shape.outputs].fill(-1e-30);
        let mut gradient = vec![CANARY; (shape.inputs + 1) * shape.outputs];
        for leaves in [&[4][..], &[1, 3]] {
            let (gradient, nodes) = (&mut gradient[..], Precision::F32);
            let operands = DenseWeightGradient { input: &input, delta: &delta, gradient, accumulate: false, nodes };
            plan.sparse_weight_gradient(leaves, operands, &mut Crew::new(1, plan.crew()));
        }
        let kernel = &gradient[..shape.inputs * shape.outputs];
        assert!(kernel.iter().all(|sum| sum.to_bits() == 0), "{sparse:?} on {arithmetic}");
    }
}

#[test]
#[should_panic(expected = "3 leaves")]
fn leaves_that_are_no_subtree() {
    let plan = Dense::new(Isa::SCALAR, DenseShape { pixels: 1, inputs: 2, outputs: 2 }, 3);
    let operands = DenseWeightGradient {
        input: &[0.0; 6],
        delta: &[0.0; 6],
        gradient: &mut [0.0; 6],
        accumulate: false,
        nodes: Precision::F32,
    };
    plan.weight_gradient(&[1, 1, 1], operands, &mut Crew::new(1, plan.crew()));
}
