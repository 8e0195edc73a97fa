//! Product-sums in bfloat16 against plain loops over rounded operands in the documented order, to the bit; rounding and
//! pairing against their definitions. Operands lie next to pages without access, as in `contraction.rs`.

#[path = "../src/kernel/fenced.rs"]
mod fenced;
#[path = "support/product_sums.rs"]
mod product_sums;

use fenced::Edge;
use lockstep_common::kernel::Isa;
use lockstep_common::kernel::bf16::{self, Bf16Pair, RowPairs};
use lockstep_common::kernel::contraction::{After, ChannelCounts, Direction, Gather, GatherOperands, PixelRelation};
use lockstep_common::kernel::transpose::MatrixShape;
use lockstep_common::rng::Stream;
use product_sums::*;

const SMALLEST: f32 = 8.881_784e-16; // 2^-50

/// The definition: the nearer neighbour among numbers of 8 significant bits, in `f64`, where both distances are exact.
fn rounded(value: f32) -> f32 {
    if value.is_nan() || value.is_infinite() {
        return value;
    }
    if value.abs() < SMALLEST {
        return 0.0;
    }
    let (below, above) = {
        let bits = value.abs().to_bits() & 0xffff_0000;
        (f32::from_bits(bits), f32::from_bits(bits + 0x1_0000))
    };
    // What comes after the largest number would be 2^128.
    let above_exact = if above.is_infinite() { 2.0f64.powi(128) } else { f64::from(above) };
    let magnitude = f64::from(value.abs());
    let (down, up) = (magnitude - f64::from(below), above_exact - magnitude);
    let below_is_even = below.to_bits() & 0x1_0000 == 0;
    let nearest = if down < up || down == up && below_is_even { below } else { above };
    nearest.copysign(value)
}

#[test]
fn numbers_are_rounded_to_the_nearest_and_small_ones_to_zero() {
    assert_eq!(SMALLEST, 2.0f32.powi(-50));
    for upper in 0..=u32::from(u16::MAX) {
        for lower in [0, 1, 0x7fff, 0x8000, 0x8001, 0xffff] {
            let value = f32::from_bits(upper << 16 | lower);
            let (got, expected) = (bf16::round(value), rounded(value));
            assert!(
                got.to_bits() == expected.to_bits() || got.is_nan() && value.is_nan(),
                "{value:e} becomes {got:e}, not {expected:e}"
            );
            assert_eq!(got.to_bits() & 0xffff, 0, "{value:e} becomes {got:e}");
            let pair = Bf16Pair::new(value, -value);
            let numbers = pair.numbers().map(f32::to_bits);
            assert_eq!(numbers, [bf16::round(value), bf16::round(-value)].map(f32::to_bits), "{value:e}");
        }
    }
}

/// Values at which arithmetic is special, and ordinary ones of many sizes.
fn special(stream: &mut Stream) -> f32 {
    const SPECIAL: [f32; 16] = [
        0.0,
        -0.0,
        f32::NAN,
        f32::INFINITY,
        f32::NEG_INFINITY,
        f32::MIN_POSITIVE,
        -f32::MIN_POSITIVE / 4.0,
        f32::from_bits(1),
        f32::MAX,
        f32::MIN,
        8.881_784e-16,
        -8.881_783e-16,
        1.003_906_3,
        -1.0,
        1e-15,
        1e20,
    ];
    match stream.below(8) {
        0 => SPECIAL[stream.below(SPECIAL.len() as u32) as usize],
        1 => f32::from_bits(stream.below(u32::MAX)),
        2..4 => (stream.uniform() - 0.5) * 2.0f32.powi(stream.below(110) as i32 - 55),
        _ => stream.uniform() * 2.0 - 1.0,
    }
}

fn is_same(got: f32, expected: f32) -> bool {
    got.to_bits() == expected.to_bits() || got.is_nan() && expected.is_nan()
}

fn pairs(words: &[f32]) -> &[Bf16Pair] {
    bytemuck::cast_slice(words)
}

fn round_all(values: &[f32]) -> Vec<f32> {
    values.iter().map(|&value| bf16::round(value)).collect()
}

/// Neighbours in rows of `columns` values.
fn column_pairs(values: &[f32], columns: usize) -> Vec<Bf16Pair> {
    let of_row = |row: &[f32]| -> Vec<Bf16Pair> {
        row.chunks(2).map(|pair| Bf16Pair::new(pair[0], pair.get(1).copied().unwrap_or(0.0))).collect()
    };
    values.chunks(columns).flat_map(of_row).collect()
}

/// Each value of a row with that of the row `distance` rows later, which belongs to the next block of so many rows.
fn row_pairs(values: &[f32], columns: usize, distance: usize) -> Vec<Bf16Pair> {
    let block = columns * distance;
    let of_blocks = |two: &[f32]| -> Vec<Bf16Pair> {
        let count = two.len().min(block);
        (0..count).map(|i| Bf16Pair::new(two[i], two.get(block + i).copied().unwrap_or(0.0))).collect()
    };
    values.chunks(2 * block).flat_map(of_blocks).collect()
}

#[test]
fn pairs_are_made_of_neighbouring_columns_and_of_rows() {
    for columns in [1, 2, 3, 7, 8, 9, 16, 31, 32, 33, 64, 100] {
        for rows in 0..8 {
            let mut stream = stream(columns, rows);
            let values: Vec<f32> = (0..rows * columns).map(|_| special(&mut stream)).collect();
            for (isa, edge) in Isa::available().into_iter().flat_map(|isa| [(isa, Edge::Start), (isa, Edge::End)]) {
                let place = format!("{rows} x {columns} on {isa}, {edge:?}");
                eprintln!("{place}");
                let from = Guarded::new(&values, edge);
                let check = |expected: &[Bf16Pair], write: &dyn Fn(&mut [Bf16Pair])| {
                    let mut to = Guarded::blank(expected.len(), edge);
                    write(bytemuck::cast_slice_mut(to.values_mut()));
                    assert_eq!(pairs(to.values()), expected, "{place}");
                    to.assert_untouched(&place);
                };
                let whole = MatrixShape::dense(rows, columns);
                check(&column_pairs(&values, columns), &|to| bf16::pair_columns(isa, from.values(), whole, to));
                let part = MatrixShape { columns: columns.div_ceil(2), ..whole };
                let of_part: Vec<f32> =
                    values.chunks(columns).flat_map(|row| row[..part.columns].iter().copied()).collect();
                check(&column_pairs(&of_part, part.columns), &|to| bf16::pair_columns(isa, from.values(), part, to));
                for distance in [1, 2, 3].into_iter().filter(|&distance| rows % distance == 0) {
                    let expected = row_pairs(&values, columns, distance);
                    let shape = RowPairs { distance, ..RowPairs::neighbours(columns) };
                    assert_eq!(shape.rows(rows) * columns, expected.len(), "{place}");
                    check(&expected, &|to| bf16::pair_rows(isa, from.values(), shape, to, columns));
                    // Some of the columns, into rows that are further apart.
                    let (start, count) = (columns / 3, columns.div_ceil(2));
                    let shape = RowPairs { start, count, ..shape };
                    let width = count + 3;
                    let canary = bytemuck::cast::<f32, Bf16Pair>(CANARY);
                    let expected: Vec<Bf16Pair> = expected
                        .chunks(columns)
                        .flat_map(|row| row[start..start + count].iter().copied().chain([canary; 3]))
                        .collect();
                    check(&expected, &|to| bf16::pair_rows(isa, from.values(), shape, to, width));
                }
            }
        }
    }
}

/// The direct sums' start: biases below 2^-50 count as 0.
fn started(bias: &[f32]) -> Vec<f32> {
    bias.iter().map(|&bias| if bias.abs() < SMALLEST { 0.0 } else { bias }).collect()
}

fn check_gather(case: &GatherCase, name: &str, value: fn(&mut Stream) -> f32) {
    let [(input_pixels, channels_in), (output_pixels, channels_out)] = case.sizes();
    let summed = channels_in.div_ceil(2);
    let mut stream = stream(channels_in * 100 + channels_out, case.samples);
    let mut values = |len: usize| -> Vec<f32> { (0..len).map(|_| value(&mut stream)).collect() };
    let input = values(case.samples * input_pixels * channels_in);
    let weights = values(case.relation.taps() * channels_in * channels_out);
    let bias = values(channels_out);
    let gate = values(case.samples * output_pixels * channels_out);
    let of_definition = if case.is_tap_by_tap(summed) { bias.clone() } else { started(&bias) };
    let of_definition = case.with_bias.then_some(&of_definition[..]);
    let expected = case.specification(&round_all(&input), &round_all(&weights), of_definition, &gate, summed);

    let ChannelCounts { high, low } = case.channels;
    let (channels, weights) = match case.direction {
        Direction::ToLow => {
            let of_taps = weights.chunks(high * low).flat_map(|tap| row_pairs(tap, low, 1));
            (ChannelCounts { high: summed, low }, of_taps.collect())
        }
        Direction::ToHigh => (ChannelCounts { high, low: summed }, column_pairs(&weights, low)),
    };
    let input = column_pairs(&input, channels_in);
    let bias = case.with_bias.then_some(&bias[..]);
    let given = Given { channels, input: &input, weights: &weights, bias, gate: &gate };
    check_gathers::<Bf16Pair>((case, name), &given, &expected, is_same);
}

#[test]
fn gathers_sum_rounded_channels_in_order() {
    gather_cases().for_each(|(case, name)| check_gather(&case, name, random));
}

/// Numbers of any size, and those at which instructions might differ.
#[test]
fn gathers_of_special_values() {
    for (name, relation) in relations().into_iter().take(4) {
        for (i, channels) in [(1, 9), (2, 64), (3, 33), (6, 17), (9, 16), (33, 5)].into_iter().enumerate() {
            for (direction, samples) in [(Direction::ToLow, 5), (Direction::ToHigh, 4), (Direction::ToLow, 0)] {
                let (high, low) = if direction == Direction::ToLow { channels } else { (channels.1, channels.0) };
                let channels = ChannelCounts { high, low };
                let finish = [Finish::Keep, Finish::Relu, Finish::Gate][i % 3];
                let case = GatherCase { relation, direction, channels, samples, with_bias: i % 4 > 0, finish };
                check_gather(&case, name, special);
            }
        }
    }
}

/// A bias that is no multiple of what products are multiples of: what it and a product leave of each other must not be
/// a denormal number, which instructions treat differently.
#[test]
fn biases_that_products_cancel() {
    let tiny = 2.0f32.powi(-25);
    let relation = PixelRelation::pointwise(1);
    for bias in [tiny * tiny * 1.000_000_1, -tiny * tiny, 2.0f32.powi(-100) * 1.000_000_1, -1e-38, 1e-40] {
        let factor = if bias.abs() < 1e-20 { 2.0f32.powi(-50) } else { tiny };
        let [input, weight] = [factor, -factor].map(|value| [Bf16Pair::new(value, 0.0)]);
        let start = if bias.abs() < SMALLEST { 0.0 } else { bias };
        let expected = factor.mul_add(-factor, start);
        for isa in Isa::available() {
            let channels = ChannelCounts { high: 1, low: 1 };
            let plan = Gather::new(isa, &relation, Direction::ToLow, channels, 1);
            let mut packed = vec![Bf16Pair::default(); plan.packed_len()];
            plan.pack(&weight, &mut packed);
            let (mut output, bias) = ([CANARY], [bias]);
            let (bias, after, scratch) = (Some(&bias[..]), After::Keep, &mut [][..]);
            let operands =
                GatherOperands { input: &input[..], packed: &packed, bias, output: &mut output, after, scratch };
            plan.run(1, operands);
            assert_same_bits(&format!("{bias:?} on {isa}"), &output, &[expected]);
        }
    }
}

fn check_reduce(name: &str, relation: &PixelRelation, channels: ChannelCounts, samples: usize) {
    let (high_pixels, low_pixels) =
        (relation.high.rows * relation.high.columns, relation.low.rows * relation.low.columns);
    let mut stream = stream(channels.high * 100 + channels.low, samples + 10);
    let high = random_values(samples * high_pixels * channels.high, &mut stream);
    let low = random_values(samples * low_pixels * channels.low, &mut stream);
    let before = random_values(relation.taps() * channels.high * channels.low, &mut stream);
    let of_high = row_pairs(&high, high_pixels * channels.high, 1);
    let of_low = row_pairs(&low, low_pixels * channels.low, 1);
    for accumulate in [false, true] {
        let start = accumulate.then_some(&before[..]);
        let operands = (&round_all(&high)[..], &round_all(&low)[..]);
        let expected = reduce_specification(relation, channels, (samples, 2), operands, start);
        let operands = [&of_high[..], &of_low];
        check_reductions((relation, channels, samples.div_ceil(2)), operands, start, &expected, name);
    }
}

#[test]
fn reductions_sum_two_samples_at_a_time_in_order() {
    reduce_cases().for_each(|(name, relation, channels, samples)| check_reduce(name, &relation, channels, samples));
}
