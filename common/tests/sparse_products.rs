//! Plans that leave out products with zeros, against plain loops of `f32::mul_add` in the documented order, to the bit; and
//! against the plans that leave nothing out. As in `contraction.rs`, operands lie next to pages without access.

#[path = "../src/kernel/fenced.rs"]
mod fenced;
#[path = "support/product_sums.rs"]
#[allow(dead_code)]
mod product_sums;

use lockstep_common::kernel::Isa;
use lockstep_common::kernel::bf16::Bf16Pair;
use lockstep_common::kernel::contraction::{
    After, ChannelCounts, Direction, Gather, GatherOperands, PixelRelation, Reduce, ReduceOperands, SLACK, Scatter,
    SparseReduce,
};
use lockstep_common::rng::Stream;

use fenced::Edge;
use product_sums::*;

/// Relations, channels around all widths, numbers of samples, and of how many elements of the low image one is not 0.
fn cases() -> impl Iterator<Item = (&'static str, PixelRelation, ChannelCounts, usize, u32)> {
    let large = PixelRelation {
        high: pair(9, 8),
        low: pair(9, 8),
        kernel: pair(5, 4),
        strides: pair(1, 1),
        padding: pair(2, 1),
    };
    relations().into_iter().chain([("large", large)]).flat_map(|(name, relation)| {
        let pairs = channel_pairs().chain([(ChannelCounts { high: 131, low: 5 }, 0)]);
        // Images that are cut into bands of rows. (Smaller ones, of 65 channels, are cut into taps.)
        let cut = [(131, 1), (350, 3)].map(|(high, samples)| (ChannelCounts { high, low: 3 }, samples));
        let pairs = pairs.chain(cut.into_iter().filter(move |_| name == "large"));
        pairs
            .zip([1, 2, 6, 50].into_iter().cycle())
            .map(move |((channels, samples), of)| (name, relation, channels, samples, of))
    })
}

/// One in `of` elements is not 0; zeros have either sign.
fn sparse_values(len: usize, of: u32, stream: &mut Stream) -> Vec<f32> {
    let mut value = || match stream.below(of) {
        0 => stream.uniform() + 0.1,
        _ => [0.0, -0.0][stream.below(2) as usize],
    };
    (0..len).map(|_| value()).collect()
}

fn pixels(relation: &PixelRelation) -> (usize, usize) {
    (relation.high.rows * relation.high.columns, relation.low.rows * relation.low.columns)
}

/// The definition: for each high element, the bias, then tap by tap and low channel by low channel, without zeros.
fn scatter_specification(
    relation: &PixelRelation,
    channels: ChannelCounts,
    samples: usize,
    (low, weights, bias): (&[f32], &[f32], Option<&[f32]>),
) -> Vec<f32> {
    let mut output = Vec::new();
    for sample in low.chunks_exact((pixels(relation).1 * channels.low).max(1)).take(samples) {
        for taps in sources(relation, Direction::ToHigh) {
            for channel in 0..channels.high {
                let mut sum = bias.map_or(0.0, |bias| bias[channel]);
                for &(tap, pixel) in &taps {
                    let weights = &weights[(tap * channels.high + channel) * channels.low..][..channels.low];
                    for (value, weight) in sample[pixel * channels.low..].iter().zip(weights) {
                        if *value != 0.0 {
                            sum = value.mul_add(*weight, sum);
                        }
                    }
                }
                output.push(sum);
            }
        }
    }
    output
}

/// Scenario: low images with many zeros and few, every relation, channels around all widths, every `After`.
/// Property: the definition's bits, and where nothing is infinite those of a gather.
#[test]
fn scatters_leave_out_zeros_and_keep_the_order() {
    for (i, (name, relation, channels, samples, of)) in cases().enumerate() {
        let (high_pixels, low_pixels) = pixels(&relation);
        let mut stream = stream(channels.high * 100 + channels.low, samples);
        let low = sparse_values(samples * low_pixels * channels.low, of, &mut stream);
        let weights = random_values(relation.taps() * channels.high * channels.low, &mut stream);
        let bias = random_values(channels.high, &mut stream);
        let bias = (i % 3 > 0).then_some(&bias[..]);
        let gate = random_values(samples * high_pixels * channels.high, &mut stream);
        let sums = scatter_specification(&relation, channels, samples, (&low, &weights, bias));
        for isa in Isa::available() {
            for (edge, finish) in [(Edge::Start, i % 3), (Edge::End, (i + 1) % 3)] {
                let place =
                    format!("{name}: {relation:?} {channels:?} {samples} samples, finish {finish}, on {isa}, {edge:?}");
                eprintln!("{place}");
                let closed = |(at, sum): (usize, f32)| match finish {
                    0 => false,
                    1 => sum <= 0.0,
                    _ => gate[at] <= 0.0,
                };
                let outputs = sums.iter().copied().enumerate();
                let expected: Vec<f32> = outputs.map(|(at, sum)| if closed((at, sum)) { 0.0 } else { sum }).collect();
                let after = [After::Keep, After::Relu, After::Gate(&gate)][finish];

                let plan = Scatter::new(isa, &relation, channels);
                let mut packed = Guarded::blank(plan.packed_len(), edge);
                plan.pack(Guarded::new(&weights, edge).values(), packed.values_mut());
                let mut scratch = Guarded::blank(plan.scratch_len(), edge);
                let mut output = Guarded::blank(expected.len(), edge);
                let input = Guarded::new(&low, edge);
                let operands = GatherOperands {
                    input: input.values(),
                    packed: packed.values(),
                    bias,
                    output: output.values_mut(),
                    after,
                    scratch: scratch.values_mut(),
                };
                plan.run(samples, operands);
                assert_same_bits(&place, output.values(), &expected);
                output.assert_untouched(&place);
                packed.assert_untouched(&place);
                scratch.assert_untouched(&place);

                if channels.high < NARROW {
                    continue;
                }
                let gather = Gather::new(isa, &relation, Direction::ToHigh, channels, samples.max(1));
                let (mut packed, mut scratch) = (vec![0.0; gather.packed_len()], vec![0.0; gather.scratch_len()]);
                gather.pack(&weights, &mut packed);
                let mut output = vec![CANARY; expected.len()];
                let (input, packed) = (&low[..], &packed[..]);
                let operands =
                    GatherOperands { input, packed, bias, output: &mut output, after, scratch: &mut scratch };
                gather.run(samples, operands);
                assert_same_bits(&format!("gather, {place}"), &output, &expected);
            }
        }
    }
}

/// Scenario: as above, added to what is there and not.
/// Property: the bits of plain loops, and of a plan, that leave nothing out: no number is infinite here, and no sum -0.
#[test]
fn sparse_reductions_leave_out_zeros_and_keep_the_order() {
    for (name, relation, channels, samples, of) in cases() {
        let (high_pixels, low_pixels) = pixels(&relation);
        let mut stream = stream(channels.high * 100 + channels.low, samples + 10);
        let high = random_values(samples * high_pixels * channels.high, &mut stream);
        let low = sparse_values(samples * low_pixels * channels.low, of, &mut stream);
        let before = random_values(relation.taps() * channels.high * channels.low, &mut stream);
        for start in [None, Some(&before[..])] {
            let expected = reduce_specification(&relation, channels, (samples, 1), (&high, &low), start);
            for (isa, edge) in Isa::available().into_iter().flat_map(|isa| [(isa, Edge::Start), (isa, Edge::End)]) {
                let accumulate = start.is_some();
                let place =
                    format!("{name}: {relation:?} {channels:?} {samples} samples, {accumulate}, on {isa}, {edge:?}");
                eprintln!("{place}");
                let plan = SparseReduce::new(isa, &relation, channels);
                let (high, low) = (Guarded::new(&high, edge), Guarded::new(&low, edge));
                let mut scratch = Guarded::blank(plan.scratch_len(), edge);
                let mut gradient = match start {
                    Some(before) => Guarded::new(before, edge),
                    None => Guarded::blank(expected.len(), edge),
                };
                let operands = ReduceOperands {
                    high: high.values(),
                    low: low.values(),
                    gradient: gradient.values_mut(),
                    accumulate,
                    scratch: scratch.values_mut(),
                };
                plan.run(samples, operands);
                assert_same_bits(&place, gradient.values(), &expected);
                gradient.assert_untouched(&place);
                scratch.assert_untouched(&place);

                let all = Reduce::new(isa, &relation, channels);
                let low = Guarded::with_slack(low.values(), SLACK, edge);
                let mut gradient = start.map_or(vec![CANARY; expected.len()], <[f32]>::to_vec);
                let operands = ReduceOperands {
                    high: high.values(),
                    low: low.values(),
                    gradient: &mut gradient,
                    accumulate,
                    scratch: &mut vec![0.0; all.scratch_len(samples)],
                };
                all.run(samples, operands);
                assert_same_bits(&format!("all products, {place}"), &gradient, &expected);
            }
        }
    }
}

fn pairs(len: usize, of: u32, stream: &mut Stream) -> Vec<Bf16Pair> {
    let values = sparse_values(2 * len, of, stream);
    values.as_chunks::<2>().0.iter().map(|&[first, second]| Bf16Pair::new(first, second)).collect()
}

/// Scenario: the same with pairs of bfloat16 numbers. Property: the bits of plans that leave nothing out.
#[test]
fn pairs_that_are_zero_are_left_out() {
    for (name, relation, channels, samples, of) in cases().filter(|case| case.2.high >= NARROW) {
        let (high_pixels, low_pixels) = pixels(&relation);
        let mut stream = stream(channels.high * 100 + channels.low, samples + 20);
        let low = pairs(samples * low_pixels * channels.low, of, &mut stream);
        let high = pairs(samples * high_pixels * channels.high, 1, &mut stream);
        let weights = pairs(relation.taps() * channels.high * channels.low, 1, &mut stream);
        let bias: Vec<f32> = (0..channels.high).map(|i| [0.3, 1e-20, -0.4][i % 3]).collect();
        for (isa, edge) in Isa::available().into_iter().flat_map(|isa| [(isa, Edge::Start), (isa, Edge::End)]) {
            let place = format!("{name}: {relation:?} {channels:?} {samples} samples, on {isa}, {edge:?}");
            eprintln!("{place}");
            let outputs = samples * high_pixels * channels.high;
            let bias = Some(&bias[..]);

            let plan = Scatter::new(isa, &relation, channels);
            let mut packed = Guarded::blank(plan.packed_len(), edge);
            plan.pack::<Bf16Pair>(&weights, bytemuck::cast_slice_mut(packed.values_mut()));
            let (mut scratch, mut output) = (Guarded::blank(plan.scratch_len(), edge), Guarded::blank(outputs, edge));
            let input = Guarded::new(bytemuck::cast_slice(&low), edge);
            let operands = GatherOperands::<Bf16Pair> {
                input: bytemuck::cast_slice(input.values()),
                packed: bytemuck::cast_slice(packed.values()),
                bias,
                output: output.values_mut(),
                after: After::Relu,
                scratch: scratch.values_mut(),
            };
            plan.run(samples, operands);
            output.assert_untouched(&place);
            scratch.assert_untouched(&place);

            let gather = Gather::new(isa, &relation, Direction::ToHigh, channels, samples.max(1));
            let mut packed = vec![0.0f32; gather.packed_len()];
            gather.pack::<Bf16Pair>(&weights, bytemuck::cast_slice_mut(&mut packed));
            let mut expected = vec![CANARY; outputs];
            let operands = GatherOperands::<Bf16Pair> {
                input: &low,
                packed: bytemuck::cast_slice(&packed),
                bias,
                output: &mut expected,
                after: After::Relu,
                scratch: &mut vec![0.0; gather.scratch_len()],
            };
            gather.run(samples, operands);
            assert_same_bits(&place, output.values(), &expected);

            let plan = SparseReduce::new(isa, &relation, channels);
            let high_guarded = Guarded::new(bytemuck::cast_slice(&high), edge);
            let (mut scratch, mut gradient) =
                (Guarded::blank(plan.scratch_len(), edge), Guarded::blank(weights.len(), edge));
            let operands = ReduceOperands::<Bf16Pair> {
                high: bytemuck::cast_slice(high_guarded.values()),
                low: bytemuck::cast_slice(input.values()),
                gradient: gradient.values_mut(),
                accumulate: false,
                scratch: bytemuck::cast_slice_mut(scratch.values_mut()),
            };
            plan.run(samples, operands);
            gradient.assert_untouched(&place);
            scratch.assert_untouched(&place);

            let all = Reduce::new(isa, &relation, channels);
            let low_with_slack = Guarded::with_slack(input.values(), SLACK, edge);
            let mut expected = vec![CANARY; weights.len()];
            let mut scratch = vec![0.0f32; all.scratch_len(samples)];
            let operands = ReduceOperands::<Bf16Pair> {
                high: &high,
                low: bytemuck::cast_slice(low_with_slack.values()),
                gradient: &mut expected,
                accumulate: false,
                scratch: bytemuck::cast_slice_mut(&mut scratch),
            };
            all.run(samples, operands);
            assert_same_bits(&format!("weights, {place}"), gradient.values(), &expected);
        }
    }
}

/// Scenario: infinite weights, and infinite high elements, that meet zeros of the low image alone; and what is not a number in
/// the low image.
/// Property: the first leave no trace, the last one is no zero.
#[test]
fn what_meets_zeros_alone_leaves_no_trace_and_nan_is_no_zero() {
    let relation = PixelRelation {
        high: pair(4, 4),
        low: pair(2, 2),
        kernel: pair(2, 2),
        strides: pair(2, 2),
        padding: pair(0, 0),
    };
    let channels = ChannelCounts { high: 19, low: 18 };
    for isa in Isa::available() {
        // The second low channel is 0 everywhere, and the last low pixel is.
        let mut low: Vec<f32> = (0..4 * 18).map(|i| if i % 18 == 1 || i >= 3 * 18 { 0.0 } else { 1.0 }).collect();
        let mut weights = vec![0.5; 4 * 19 * 18];
        weights.iter_mut().skip(1).step_by(18).for_each(|weight| *weight = f32::INFINITY);
        let mut high = vec![0.25; 16 * 19];
        for pixel in [10, 11, 14, 15] {
            high[pixel * 19..][..19].fill(f32::NEG_INFINITY);
        }
        let run = |low: &[f32]| {
            let scatter = Scatter::new(isa, &relation, channels);
            let (mut packed, mut output) = (vec![0.0; scatter.packed_len()], vec![0.0; 16 * 19]);
            scatter.pack(&weights, &mut packed);
            scatter.run(
                1,
                GatherOperands {
                    input: low,
                    packed: &packed,
                    bias: None,
                    output: &mut output,
                    after: After::Keep,
                    scratch: &mut vec![0.0; scatter.scratch_len()],
                },
            );
            let reduce = SparseReduce::new(isa, &relation, channels);
            let mut gradient = vec![0.0; 4 * 19 * 18];
            let scratch = &mut vec![0.0; reduce.scratch_len()];
            reduce.run(1, ReduceOperands { high: &high, low, gradient: &mut gradient, accumulate: false, scratch });
            (output, gradient)
        };
        let (output, gradient) = run(&low);
        assert!(output.iter().chain(&gradient).all(|value| value.is_finite()), "{isa}");
        low[2] = f32::NAN;
        let (output, gradient) = run(&low);
        assert_eq!(output.iter().filter(|value| value.is_nan()).count(), 4 * 19, "{isa}: the patch of the first pixel");
        assert_eq!(
            gradient.iter().filter(|value| value.is_nan()).count(),
            4 * 19,
            "{isa}: the weights of a low channel"
        );
    }
}
