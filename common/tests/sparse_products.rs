//! Plans that leave out products with zeros, against plain loops of `f32::mul_add` in the documented order that leave out
//! nothing, to the bit; and against the plans that do not. As in `contraction.rs`, operands lie next to pages without access.

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

/// The definition: for each high element, the bias, then tap by tap and low channel by low channel.
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
                        sum = value.mul_add(*weight, sum);
                    }
                }
                output.push(sum + 0.0);
            }
        }
    }
    output
}

/// Scenario: low images with many zeros and few, every relation, channels around all widths, every `After`.
/// Property: the bits of the definition and of a gather.
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
/// Property: the bits of plain loops, and of a plan, that leave nothing out.
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
                assert!(plan.run(samples, operands), "{place}: all is finite");
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
            assert!(plan.run(samples, operands), "{place}: all is finite");
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

/// Channels of the images below, which are wide enough for every plan: a 4x4 high one, a 2x2 low one, and each low pixel has four high
/// pixels of its own.
const SMALL: ChannelCounts = ChannelCounts { high: 19, low: 18 };

fn small_relation() -> PixelRelation {
    PixelRelation { high: pair(4, 4), low: pair(2, 2), kernel: pair(2, 2), strides: pair(2, 2), padding: pair(0, 0) }
}

/// Weight gradient of the small images, or `None` if it matters which products with zeros are taken.
fn small_gradient(isa: Isa, high: &[f32], low: &[f32]) -> Option<Vec<f32>> {
    let reduce = SparseReduce::new(isa, &small_relation(), SMALL);
    let mut gradient = vec![CANARY; 4 * 19 * 18];
    let scratch = &mut vec![0.0; reduce.scratch_len()];
    let done = reduce.run(1, ReduceOperands { high, low, gradient: &mut gradient, accumulate: false, scratch });
    assert!(done || gradient.iter().all(|value| value.to_bits() == CANARY.to_bits()), "{isa}: left as it was");
    done.then_some(gradient)
}

/// The high image of the small low one.
fn small_scatter(isa: Isa, low: &[f32], weights: &[f32], bias: Option<&[f32]>, after: After<'_>) -> Vec<f32> {
    let scatter = Scatter::new(isa, &small_relation(), SMALL);
    let (mut packed, mut output) = (vec![0.0; scatter.packed_len()], vec![0.0; 16 * 19]);
    scatter.pack(weights, &mut packed);
    let (output_mut, scratch) = (&mut output[..], &mut vec![0.0; scatter.scratch_len()][..]);
    scatter.run(1, GatherOperands { input: low, packed: &packed, bias, output: output_mut, after, scratch });
    output
}

/// Scenario: a high element is infinite where the low image is 0, or a low one is infinite or NaN, or sums overflow.
/// Property: the sparse plan does nothing and says so, wherever that element is; a scatter takes it for no zero.
#[test]
fn what_is_not_finite_is_not_left_out() {
    for isa in Isa::available() {
        // The last low pixel is 0.
        let low: Vec<f32> = (0..4 * 18).map(|i| if i >= 3 * 18 { 0.0 } else { 1.0 }).collect();
        let high = vec![0.25; 16 * 19];
        assert!(small_gradient(isa, &high, &low).is_some(), "{isa}");
        for wrong in [f32::INFINITY, f32::NEG_INFINITY, f32::NAN] {
            for pixel in 0..16 {
                let mut high = high.clone();
                high[pixel * 19 + pixel] = wrong;
                assert_eq!(small_gradient(isa, &high, &low), None, "{isa}: {wrong} in high pixel {pixel}");
            }
            for at in 0..low.len() {
                let mut low = low.clone();
                low[at] = wrong;
                assert_eq!(small_gradient(isa, &high, &low), None, "{isa}: {wrong} in the low image, {at}");
            }
        }
        let large = |values: &[f32]| values.iter().map(|value| value * f32::MAX).collect::<Vec<f32>>();
        assert_eq!(small_gradient(isa, &large(&high), &large(&low)), None, "{isa}: overflow");

        let mut low = low;
        low[2] = f32::NAN;
        let output = small_scatter(isa, &low, &vec![0.5; 4 * 19 * 18], None, After::Keep);
        assert_eq!(output.iter().filter(|value| value.is_nan()).count(), 4 * 19, "{isa}: the patch of the first pixel");
    }
}

/// Scenario: the only product of a sum is negative and too small for any number, or a bias is -0 and all products are left out.
/// Property: the sum is 0, not -0.
#[test]
fn no_sum_is_negative_zero() {
    for isa in Isa::available() {
        let low: Vec<f32> = (0..4 * 18).map(|i| if i == 0 { -1e-30 } else { -0.0 }).collect();
        let gradient = small_gradient(isa, &vec![1e-30; 16 * 19], &low).expect("all is finite");
        assert!(gradient.iter().all(|sum| sum.to_bits() == 0), "{isa}: gradient");
        for bias in [None, Some(&[-0.0; 19][..])] {
            for after in [After::Keep, After::Relu, After::Gate(&[1.0; 16 * 19])] {
                let output = small_scatter(isa, &low, &vec![1e-30; 4 * 19 * 18], bias, after);
                assert!(output.iter().all(|sum| sum.to_bits() == 0), "{isa}: {bias:?}, {after:?}");
            }
        }
    }
}
