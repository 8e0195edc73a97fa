//! Product-sums in bfloat16 in blocks, as AMX adds them, against plain loops in the documented order, to the bit. Operands lie next to
//! pages without access, as in `contraction.rs`. (Dense layers: `dense.rs`.)

#[path = "../src/kernel/fenced.rs"]
mod fenced;
#[path = "support/product_sums.rs"]
#[expect(dead_code, reason = "sums product by product, which other tests check")]
mod product_sums;

use fenced::Edge;
use lockstep_common::kernel::Isa;
use lockstep_common::kernel::bf16::{self, BlockedPair, RowPairs};
use lockstep_common::kernel::contraction::{
    BlockedReduce, ChannelCounts, Direction, PixelRelation, ReduceOperands, SLACK,
};
use lockstep_common::kernel::transpose::MatrixShape;
use product_sums::*;

/// Pairs of a block.
const PAIRS: usize = 16;

/// A pair of each operand.
type Factors = [[f32; 2]; 2];

/// The definition: for each block of a line the chain of the first products, that of the second ones, and both added to the sum.
fn add_line(sum: f32, line: &[Factors]) -> f32 {
    line.chunks(PAIRS).fold(sum, |sum, block| {
        let chain = |i: usize| block.iter().fold(0.0f32, |sum, [a, b]| a[i].mul_add(b[i], sum));
        sum + (chain(0) + chain(1))
    })
}

fn rounded(values: &[f32]) -> Vec<f32> {
    values.iter().map(|&value| bf16::round(value)).collect()
}

/// A sum over all channels of some taps is made of lines: taps in one row of the window for a low image, single taps for a high one.
fn gather_specification(case: &GatherCase, input: &[f32], weights: &[f32], bias: &[f32], gate: &[f32]) -> Vec<f32> {
    let [(input_pixels, channels_in), _] = case.sizes();
    let ChannelCounts { high, low } = case.channels;
    let to_low = case.direction == Direction::ToLow;
    let tap_by_tap = case.is_tap_by_tap(channels_in.div_ceil(2));
    let mut output = Vec::new();
    for sample in 0..case.samples {
        for taps in &sources(&case.relation, case.direction) {
            let in_one_line = |a: &(usize, usize), b: &(usize, usize)| {
                let row = |tap: usize| tap / case.relation.kernel.columns;
                to_low && !tap_by_tap && row(a.0) == row(b.0)
            };
            for (channel, &bias) in bias.iter().enumerate() {
                let start = if case.with_bias { bias } else { 0.0 };
                // Below 2^-50, sums that do not begin anew for each tap start from 0.
                let start = if start.abs() < 2.0f32.powi(-50) && !tap_by_tap { 0.0 } else { start };
                let sum = taps.chunk_by(in_one_line).fold(start, |sum, taps| {
                    let factors = taps.iter().flat_map(|&(tap, pixel)| {
                        let number = move |values: &[f32], place: usize, k: usize| {
                            if k < channels_in { values[place] } else { 0.0 }
                        };
                        (0..channels_in).step_by(2).map(move |first| {
                            let of_input = [first, first + 1]
                                .map(|k| number(input, (sample * input_pixels + pixel) * channels_in + k, k));
                            let of_weights = [first, first + 1].map(|k| {
                                let (i, j) = if to_low { (k, channel) } else { (channel, k) };
                                number(weights, (tap * high + i) * low + j, k)
                            });
                            [of_input, of_weights]
                        })
                    });
                    let line: Vec<Factors> = factors.collect();
                    if tap_by_tap { sum + add_line(0.0, &line) } else { add_line(sum, &line) }
                });
                output.push(case.finished(sum, gate[output.len()]));
            }
        }
    }
    output
}

fn check_gather(case: &GatherCase, name: &str) {
    let [(input_pixels, channels_in), (output_pixels, channels_out)] = case.sizes();
    let mut stream = stream(channels_in * 100 + channels_out, case.samples);
    let input = random_values(case.samples * input_pixels * channels_in, &mut stream);
    let weights = random_values(case.relation.taps() * channels_in * channels_out, &mut stream);
    let bias = random_values(channels_out, &mut stream);
    let gate = random_values(case.samples * output_pixels * channels_out, &mut stream);
    let expected = gather_specification(case, &rounded(&input), &rounded(&weights), &bias, &gate);

    let isa = Isa::SCALAR;
    let ChannelCounts { high, low } = case.channels;
    let pair_columns = |values: &[f32], columns: usize| {
        let shape = MatrixShape::dense(values.len() / columns, columns);
        let mut pairs = vec![BlockedPair::default(); shape.rows * columns.div_ceil(2)];
        bf16::pair_columns(isa, values, shape, bytemuck::cast_slice_mut(&mut pairs));
        pairs
    };
    let (channels, weights) = match case.direction {
        Direction::ToLow => {
            let of_tap = |tap: &[f32]| {
                let mut pairs = vec![BlockedPair::default(); high.div_ceil(2) * low];
                bf16::pair_rows(isa, tap, RowPairs::neighbours(low), bytemuck::cast_slice_mut(&mut pairs), low);
                pairs
            };
            (ChannelCounts { high: high.div_ceil(2), low }, weights.chunks(high * low).flat_map(of_tap).collect())
        }
        Direction::ToHigh => (ChannelCounts { high, low: low.div_ceil(2) }, pair_columns(&weights, low)),
    };
    let input = pair_columns(&input, channels_in);
    let bias = case.with_bias.then_some(&bias[..]);
    let given = Given { channels, input: &input, weights: &weights, bias, gate: &gate };
    check_gathers::<BlockedPair>((case, name), &given, &expected, |got, expected| got.to_bits() == expected.to_bits());
}

#[test]
fn gathers_add_blocks_of_channels_in_order() {
    gather_cases().for_each(|(case, name)| check_gather(&case, name));
}

/// Lines of more than a block, with a rest and without.
#[test]
fn gathers_over_many_channels() {
    for (name, relation) in relations() {
        for (i, channels) in [(64, 3), (96, 17), (70, 64), (5, 200), (130, 40)].into_iter().enumerate() {
            for direction in [Direction::ToLow, Direction::ToHigh] {
                let (high, low) = if direction == Direction::ToLow { channels } else { (channels.1, channels.0) };
                let channels = ChannelCounts { high, low };
                let finish = [Finish::Keep, Finish::Relu, Finish::Gate][i % 3];
                let case = GatherCase { relation, direction, channels, samples: i % 4, with_bias: i % 2 == 0, finish };
                check_gather(&case, name);
            }
        }
    }
}

/// For each weight, pair of samples by pair of samples, row by row of the low image, which is a line.
fn reduce_specification_in_blocks(
    relation: &PixelRelation,
    channels: ChannelCounts,
    samples: usize,
    (high, low): (&[f32], &[f32]),
    before: Option<&[f32]>,
) -> Vec<f32> {
    let pixels = |pair: lockstep_common::model::Pair| pair.rows * pair.columns;
    let (high_pixels, low_pixels) = (pixels(relation.high), pixels(relation.low));
    let sources = sources(relation, Direction::ToLow);
    let mut gradient = Vec::new();
    for tap in 0..relation.taps() {
        for high_channel in 0..channels.high {
            for low_channel in 0..channels.low {
                let mut sum = before.map_or(0.0, |before| before[gradient.len()]);
                for first in (0..samples).step_by(2) {
                    for line in (0..low_pixels).collect::<Vec<_>>().chunks(relation.low.columns) {
                        let factors = line.iter().map(|&low_pixel| {
                            let high_pixel = sources[low_pixel].iter().find(|(of, _)| *of == tap).map(|&(_, at)| at);
                            let of_sample = |sample: usize| match high_pixel {
                                Some(at) if sample < samples => [
                                    high[(sample * high_pixels + at) * channels.high + high_channel],
                                    low[(sample * low_pixels + low_pixel) * channels.low + low_channel],
                                ],
                                _ => [0.0; 2],
                            };
                            let [[a, b], [c, d]] = [of_sample(first), of_sample(first + 1)];
                            [[a, c], [b, d]]
                        });
                        sum = add_line(sum, &factors.collect::<Vec<Factors>>());
                    }
                }
                gradient.push(sum + 0.0);
            }
        }
    }
    gradient
}

fn check_reduce(name: &str, relation: &PixelRelation, channels: ChannelCounts, samples: usize) {
    let pixels = |pair: lockstep_common::model::Pair| pair.rows * pair.columns;
    let lens = [pixels(relation.high) * channels.high, pixels(relation.low) * channels.low];
    let mut stream = stream(channels.high * 100 + channels.low, samples + 10);
    let operands = lens.map(|len| random_values(samples * len, &mut stream));
    let before = random_values(relation.taps() * channels.high * channels.low, &mut stream);
    let [high, low] = operands.each_ref().map(|values| rounded(values));
    let pairs = [0, 1].map(|i| {
        let mut pairs = vec![BlockedPair::default(); samples.div_ceil(2) * lens[i]];
        let to = bytemuck::cast_slice_mut(&mut pairs);
        bf16::pair_rows(Isa::SCALAR, &operands[i], RowPairs::neighbours(lens[i]), to, lens[i]);
        pairs
    });
    for accumulate in [false, true] {
        let start = accumulate.then_some(&before[..]);
        let expected = reduce_specification_in_blocks(relation, channels, samples, (&high, &low), start);
        for (isa, edge) in Isa::available().into_iter().flat_map(|isa| [(isa, Edge::Start), (isa, Edge::End)]) {
            let place = format!("{name}: {relation:?} {channels:?} {samples} samples, {accumulate}, {isa}, {edge:?}");
            eprintln!("{place}");
            let plan = BlockedReduce::new(isa, relation, channels);
            let [high, low] =
                pairs.each_ref().map(|pairs| Guarded::with_slack(bytemuck::cast_slice(pairs), SLACK, edge));
            let mut scratch = Guarded::blank(plan.scratch_len(samples.div_ceil(2)), edge);
            let mut gradient = match start {
                Some(before) => Guarded::new(before, edge),
                None => Guarded::blank(expected.len(), edge),
            };
            let operands = ReduceOperands::<BlockedPair> {
                high: bytemuck::cast_slice(high.values()),
                low: bytemuck::cast_slice(low.values()),
                gradient: gradient.values_mut(),
                accumulate,
                scratch: bytemuck::cast_slice_mut(scratch.values_mut()),
            };
            plan.run(samples.div_ceil(2), operands);
            assert_same_bits(&place, gradient.values(), &expected);
            gradient.assert_untouched(&place);
            scratch.assert_untouched(&place);
        }
    }
}

#[test]
fn reductions_add_blocks_of_pixels_in_order() {
    reduce_cases().for_each(|(name, relation, channels, samples)| check_reduce(name, &relation, channels, samples));
}

/// Lines of more than a block, with a rest and without.
#[test]
fn reductions_over_wide_images() {
    let (one, two) = (pair(1, 1), pair(2, 2));
    for (columns, strides) in [(15, one), (16, one), (17, two), (32, one), (37, two)] {
        let low = pair(2, columns);
        let high = pair(2 * strides.rows + 1, columns * strides.columns + 1);
        let relation = PixelRelation { high, low, kernel: pair(3, 3), strides, padding: pair(1, 1) };
        check_reduce("wide", &relation, ChannelCounts { high: 5, low: 18 }, 3);
    }
}
