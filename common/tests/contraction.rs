//! The kernels against their specification, to the bit: product-sums against plain loops of `f32::mul_add` in the
//! documented order, everything else against the scalar version. No float outside an operand may matter or change.
//!
//! Operands of product-sums lie next to pages without access. If a kernel touches one, the process ends with SIGSEGV;
//! with `--nocapture` the last line tells the case.

#[path = "../src/kernel/fenced.rs"]
mod fenced;
#[path = "support/product_sums.rs"]
mod product_sums;

use lockstep_common::kernel::Isa;
use lockstep_common::kernel::contraction::{After, ChannelCounts, Direction, PixelRelation};
use lockstep_common::kernel::elementwise::{self, AdamSlices, AdamStep, SquareSum, TermLine};
use lockstep_common::kernel::pooling::{self, Windows};
use lockstep_common::kernel::transpose::{MatrixShape, transpose};
use lockstep_common::model::Activation;
use product_sums::*;

const LENGTHS: [usize; 11] = [0, 1, 7, 8, 9, 15, 16, 17, 31, 33, 100];

fn check_gather(case: &GatherCase, name: &str) {
    let [(input_pixels, channels_in), (output_pixels, channels_out)] = case.sizes();
    let mut stream = stream(channels_in * 100 + channels_out, case.samples);
    let input = random_values(case.samples * input_pixels * channels_in, &mut stream);
    let weights = random_values(case.relation.taps() * channels_in * channels_out, &mut stream);
    let bias = random_values(channels_out, &mut stream);
    let gate = random_values(case.samples * output_pixels * channels_out, &mut stream);
    let bias = case.with_bias.then_some(&bias[..]);
    let expected = case.specification(&input, &weights, bias, &gate, channels_in);
    let given = Given { channels: case.channels, input: &input, weights: &weights, bias, gate: &gate };
    check_gathers((case, name), &given, &expected, |got, expected| got.to_bits() == expected.to_bits());
}

#[test]
fn gathers_sum_bias_taps_and_channels_in_order() {
    gather_cases().for_each(|(case, name)| check_gather(&case, name));
}

#[test]
fn gathers_with_every_start_finish_and_number_of_samples() {
    for (name, relation) in relations() {
        for channels in [ChannelCounts { high: 17, low: 9 }, ChannelCounts { high: 3, low: 33 }] {
            for direction in [Direction::ToLow, Direction::ToHigh] {
                for finish in [Finish::Keep, Finish::Relu, Finish::Gate] {
                    for (with_bias, samples) in (0..=7).flat_map(|samples| [(false, samples), (true, samples)]) {
                        check_gather(&GatherCase { relation, direction, channels, samples, with_bias, finish }, name);
                    }
                }
            }
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
    for accumulate in [false, true] {
        let start = accumulate.then_some(&before[..]);
        let expected = reduce_specification(relation, channels, (samples, 1), (&high, &low), start);
        check_reductions((relation, channels, samples), [&high[..], &low], start, &expected, name);
    }
}

#[test]
fn reductions_sum_samples_rows_and_columns_in_order() {
    reduce_cases().for_each(|(name, relation, channels, samples)| check_reduce(name, &relation, channels, samples));
}

/// Scenario: all products are negative and too small for any number, and biases are -0. Property: every sum is 0, not -0, so that
/// it cannot show whether a product with 0 was taken.
#[test]
fn no_sum_is_negative_zero() {
    let pixels = |pair: lockstep_common::model::Pair| pair.rows * pair.columns;
    for (case, name) in gather_cases().filter(|(case, _)| case.samples == 3) {
        let [(input_pixels, channels_in), (output_pixels, channels_out)] = case.sizes();
        let input = vec![1e-30; case.samples * input_pixels * channels_in];
        let weights = vec![-1e-30; case.relation.taps() * channels_in * channels_out];
        let expected = vec![0.0; case.samples * output_pixels * channels_out];
        let (bias, gate) = (vec![-0.0; channels_out], vec![1.0; expected.len()]);
        let bias = case.with_bias.then_some(&bias[..]);
        let given = Given { channels: case.channels, input: &input, weights: &weights, bias, gate: &gate };
        check_gathers((&case, name), &given, &expected, |got, expected| got.to_bits() == expected.to_bits());
    }
    for (name, relation, channels, samples) in reduce_cases().filter(|case| case.3 == 3) {
        let high = vec![1e-30; samples * pixels(relation.high) * channels.high];
        let low = vec![-1e-30; samples * pixels(relation.low) * channels.low];
        let expected = vec![0.0; relation.taps() * channels.high * channels.low];
        check_reductions((&relation, channels, samples), [&high[..], &low], None, &expected, name);
    }
}

/// Values at which arithmetic is special, then ordinary ones.
fn special_values(len: usize, seed: usize) -> Vec<f32> {
    let special = [
        0.0,
        -0.0,
        f32::NAN,
        f32::INFINITY,
        f32::NEG_INFINITY,
        f32::MIN_POSITIVE,
        f32::MIN_POSITIVE / 4.0,
        -f32::MIN_POSITIVE / 1024.0,
        f32::from_bits(1),
        f32::MAX,
        f32::MIN,
        1.0,
        -1.0,
        6.0,
        -3.0,
        88.4,
        -87.4,
        1e-20,
        -1e20,
    ];
    let mut stream = stream(len, seed);
    (0..len)
        .map(|_| match stream.below(3) {
            0 => special[stream.below(special.len() as u32) as usize],
            1 => stream.uniform() * 200.0 - 100.0,
            _ => stream.uniform() * 4.0 - 2.0,
        })
        .collect()
}

/// Values in 0..1 that a model gives.
fn ordinary_values(len: usize, seed: usize) -> Vec<f32> {
    let mut stream = stream(len, seed);
    (0..len).map(|_| stream.uniform()).collect()
}

/// Bits, with one NaN for all: which NaN an operation gives is left open by IEEE 754 and by Rust.
fn bits(values: &[f32]) -> Vec<u32> {
    values.iter().map(|value| if value.is_nan() { f32::NAN.to_bits() } else { value.to_bits() }).collect()
}

fn bits_of_sum(sum: f64) -> Vec<u32> {
    let bits = if sum.is_nan() { f64::NAN.to_bits() } else { sum.to_bits() };
    vec![(bits >> 32) as u32, bits as u32]
}

/// `compute(isa)`, which gives all results as bits, is the same for every instruction set.
fn check_same(place: &str, compute: impl Fn(Isa) -> Vec<u32>) {
    let expected = compute(Isa::SCALAR);
    for isa in Isa::available() {
        let got = compute(isa);
        assert_eq!(got.len(), expected.len(), "{place} on {isa}");
        if let Some(i) = (0..got.len()).find(|&i| got[i] != expected[i]) {
            let (got, expected) = (got[i], expected[i]);
            panic!("{place} on {isa}: result {i} has the bits {got:08x}, on scalar {expected:08x}");
        }
    }
}

/// Runs `check(length, values)` for vectors of ordinary and of special values; `values(seed)` makes one.
fn for_lengths(check: impl Fn(usize, &dyn Fn(usize) -> Vec<f32>)) {
    for len in LENGTHS {
        check(len, &|seed| ordinary_values(len, seed));
        check(len, &|seed| special_values(len, seed));
    }
}

#[test]
fn activations_are_the_same_everywhere() {
    for activation in Activation::ALL {
        for_lengths(|len, values| {
            check_same(&format!("{activation} of {len}"), |isa| {
                let mut x = values(0);
                elementwise::activate(isa, activation, &mut x);
                bits(&x)
            });
            check_same(&format!("gradient of {activation} of {len}"), |isa| {
                let mut gradient = values(1);
                elementwise::activate_backward(isa, activation, &values(2), &mut gradient);
                bits(&gradient)
            });
        });
    }
}

#[test]
fn losses_are_the_same_everywhere() {
    for_lengths(|len, values| {
        check_same(&format!("squared error of {len}"), |isa| {
            let mut gradient = vec![CANARY; len];
            let sum = elementwise::squared_error(isa, &values(0), &values(1), 0.3, &mut gradient);
            [bits(&gradient), bits_of_sum(sum)].concat()
        });
        for by_logit in [false, true] {
            check_same(&format!("binary cross-entropy of {len}, by logit {by_logit}"), |isa| {
                let mut gradient = vec![CANARY; len];
                let sum = elementwise::binary_cross_entropy(isa, &values(0), &values(1), 0.3, by_logit, &mut gradient);
                [bits(&gradient), bits_of_sum(sum)].concat()
            });
        }
    });
}

#[test]
fn sums_are_the_same_everywhere() {
    for_lengths(|len, values| {
        check_same(&format!("sum of two times {len}"), |isa| {
            let mut left = values(0);
            elementwise::add(isa, &mut left, &values(1));
            bits(&left)
        });
        // At once and in blocks.
        for block in [16, 48, 160] {
            check_same(&format!("sum of {len} squares"), |isa| {
                let (mut whole, mut squares) = (SquareSum::default(), SquareSum::default());
                whole.add(isa, &values(0));
                values(0).chunks(block).for_each(|block| squares.add(isa, block));
                assert_eq!(
                    bits_of_sum(squares.total()),
                    bits_of_sum(whole.total()),
                    "{len} squares in blocks of {block}"
                );
                bits_of_sum(whole.total())
            });
        }
        check_same(&format!("sum of {len} in one channel"), |isa| {
            let mut sum = [0.1];
            elementwise::add_rows(isa, &values(0), 1, &mut sum);
            bits(&sum)
        });
        for rows in [0, 1, 2, 5] {
            check_same(&format!("sum of {rows} rows of {len}"), |isa| {
                if len == 0 {
                    return Vec::new();
                }
                let all: Vec<f32> = (1..=rows).flat_map(values).collect();
                let mut sums = values(0);
                elementwise::add_rows(isa, &all, len, &mut sums);
                bits(&sums)
            });
        }
    });
}

#[test]
fn sums_of_one_channel_use_sixteen_lanes() {
    for len in LENGTHS {
        let values = ordinary_values(len, 3);
        let mut lanes = [0.0f32; 16];
        values.iter().enumerate().for_each(|(i, value)| lanes[i % 16] += value);
        for distance in [8, 4, 2, 1] {
            (0..distance).for_each(|lane| lanes[lane] += lanes[lane + distance]);
        }
        for isa in Isa::available() {
            let mut sum = [0.7];
            elementwise::add_rows(isa, &values, 1, &mut sum);
            assert_same_bits(&format!("sum of {len} on {isa}"), &sum, &[0.7 + lanes[0]]);
        }
    }
}

#[test]
fn adam_is_the_same_everywhere() {
    let step = AdamStep {
        inverse_samples: 1.0 / 3.0,
        one_minus_beta_1: 0.1,
        one_minus_beta_2: 0.001,
        root_scale: 1.25,
        epsilon: 1e-7,
        rate: 3e-3,
    };
    for_lengths(|len, values| {
        check_same(&format!("adam of {len}"), |isa| {
            let (mut first, mut second, mut updated) = (values(2), values(3), vec![CANARY; len]);
            let slices = AdamSlices {
                parameters: &values(0),
                gradient_sum: &values(1),
                first_moment: &mut first,
                second_moment: &mut second,
                updated: &mut updated,
            };
            let (mut squares, mut alone) = (SquareSum::default(), SquareSum::default());
            elementwise::adam(isa, step, slices, &mut squares);
            alone.add(isa, &values(1));
            assert_eq!(squares.total().to_bits(), alone.total().to_bits(), "squares beside the step, on {isa}");
            [bits(&first), bits(&second), bits(&updated)].concat()
        });
    });
}

#[test]
fn copies_move_every_element_to_its_place() {
    for columns in LENGTHS.into_iter().filter(|&columns| columns > 0) {
        for rows in [0, 1, 2, 17, 40] {
            let stride = rows + 3;
            let from: Vec<f32> = (0..rows * columns).map(|i| i as f32).collect();
            for isa in Isa::available() {
                let mut to = vec![CANARY; columns * stride];
                let shape = MatrixShape { rows, columns, stride: columns };
                transpose(isa, &from, shape, &mut to, stride);
                for (i, value) in to.iter().enumerate() {
                    let (column, row) = (i / stride, i % stride);
                    let expected = if row < rows { from[row * columns + column] } else { CANARY };
                    assert_eq!(value.to_bits(), expected.to_bits(), "transpose of {rows} x {columns} on {isa}: {i}");
                }
            }
            for (start, count, gap) in [(columns / 3, columns.div_ceil(2), 2), (columns / 2, 8.min(columns / 2), 0)] {
                let (width, expected_gap) = (count + gap, vec![CANARY; gap]);
                for isa in Isa::available().into_iter().filter(|_| width > 0) {
                    let mut to = vec![CANARY; rows * width];
                    elementwise::copy_columns(isa, &from, columns, start, count, &mut to, width);
                    for (row, to) in to.chunks_exact(width).enumerate() {
                        let expected = [&from[row * columns + start..][..count], &expected_gap].concat();
                        assert_same_bits(&format!("columns of {rows} x {columns} on {isa}"), to, &expected);
                    }
                }
            }
        }
    }
}

#[test]
fn sums_of_terms_are_the_same_everywhere() {
    /// The terms of each output, in order.
    const TERMS: [&[usize]; 4] = [&[], &[0], &[1, 3], &[2, 5, 4]];
    for_lengths(|len, values| {
        if len == 0 {
            return;
        }
        // Term t stands at t * len.
        let products: Vec<f32> = (0..6).flat_map(values).collect();
        let line = |from: usize, to: usize, count: usize, steps: [usize; 2]| TermLine {
            from: from * len,
            to: to * len,
            count,
            steps: steps.map(|step| step * len),
        };
        let lines = [line(0, 1, 3, [1, 1]), line(3, 2, 2, [2, 1]), TermLine::of_one(4 * len, 3 * len)];
        let gate: Vec<f32> = (6..10).flat_map(values).collect();
        let bias = values(10);
        for bias in [None, Some(&bias[..])] {
            let sum = |(i, terms): (usize, &&[usize])| {
                let start = bias.map_or(0.0, |bias| bias[i % len]);
                terms.iter().fold(start, |sum, term| sum + products[term * len + i % len])
            };
            let outputs = TERMS.iter().flat_map(|terms| std::iter::repeat_n(terms, len)).enumerate();
            let expected = bits(&outputs.map(|output| sum(output) + 0.0).collect::<Vec<f32>>());
            for after in [After::Keep, After::Relu, After::Gate(&gate)] {
                check_same(&format!("sums of terms, {len} channels"), |isa| {
                    let mut output = vec![CANARY; 4 * len];
                    elementwise::sum_terms(isa, &products, &lines, bias, after, &mut output, len);
                    if matches!(after, After::Keep) {
                        assert_eq!(bits(&output), expected, "{isa}, {len} channels");
                    }
                    bits(&output)
                });
            }
        }
    });
}

#[test]
fn a_line_takes_terms_at_even_distances() {
    let mut line = TermLine::of_one(10, 100);
    assert!(!line.take(9, 101) && !line.take(11, 100), "a line goes forward");
    assert!(line.take(14, 102) && line.take(18, 104));
    assert!(!line.take(22, 105) && !line.take(23, 106));
    assert_eq!(line, TermLine { from: 10, to: 100, count: 3, steps: [4, 2] });
}

#[test]
fn pooling_is_the_same_everywhere() {
    let relation = PixelRelation {
        high: pair(5, 4),
        low: pair(3, 2),
        kernel: pair(3, 2),
        strides: pair(2, 2),
        padding: pair(1, 0),
    };
    let whole = PixelRelation {
        high: pair(6, 4),
        low: pair(3, 2),
        kernel: pair(2, 2),
        strides: pair(2, 2),
        padding: pair(0, 0),
    };
    // Some input pixels are in no window.
    let gaps = PixelRelation { high: pair(7, 5), strides: pair(3, 2), low: pair(2, 2), ..whole };
    for relation in [relation, whole, gaps] {
        let windows = Windows::new(&relation);
        let (high, low) = (relation.high.rows * relation.high.columns, relation.low.rows * relation.low.columns);
        for_lengths(|channels, values| {
            if channels == 0 {
                return;
            }
            let image = |pixels: usize, seed: usize| -> Vec<f32> {
                (0..pixels).flat_map(|pixel| values(seed * 100 + pixel)).collect()
            };
            let place = |what: &str| format!("{what}, {channels} channels, {relation:?}");
            check_same(&place("max pooling"), |isa| {
                let (mut output, mut winners) = (vec![CANARY; low * channels], vec![99; low * channels]);
                pooling::max_pool(isa, &windows, &image(high, 1), &mut output, &mut winners, channels);
                let mut gradient = vec![CANARY; high * channels];
                pooling::max_pool_backward(isa, &windows, &image(low, 2), &winners, None, &mut gradient, channels);
                [bits(&output), winners, bits(&gradient)].concat()
            });
            check_same(&place("max pooling after relu"), |isa| {
                let mut input = image(high, 1);
                elementwise::activate(isa, Activation::Relu, &mut input);
                let (mut output, mut winners) = (vec![CANARY; low * channels], vec![99; low * channels]);
                pooling::max_pool(isa, &windows, &input, &mut output, &mut winners, channels);
                let backward = |gate| {
                    let mut gradient = vec![CANARY; high * channels];
                    pooling::max_pool_backward(isa, &windows, &image(low, 2), &winners, gate, &mut gradient, channels);
                    gradient
                };
                let mut one_by_one = backward(None);
                elementwise::activate_backward(isa, Activation::Relu, &input, &mut one_by_one);
                assert_eq!(bits(&backward(Some(&output))), bits(&one_by_one), "{isa}, {channels} channels");
                bits(&one_by_one)
            });
            check_same(&place("average pooling"), |isa| {
                let mut output = vec![CANARY; low * channels];
                pooling::average_pool(isa, &windows, &image(high, 1), &mut output, channels);
                let mut gradient = vec![CANARY; high * channels];
                pooling::average_pool_backward(isa, &windows, &image(low, 2), &mut gradient, channels);
                [bits(&output), bits(&gradient)].concat()
            });
            check_same(&place("up-sampling"), |isa| {
                let mut output = vec![CANARY; high * channels];
                pooling::up_sample(isa, &windows, &image(low, 1), &mut output, channels);
                let mut gradient = vec![CANARY; low * channels];
                pooling::up_sample_backward(isa, &windows, &image(high, 2), &mut gradient, channels);
                [bits(&output), bits(&gradient)].concat()
            });
        });
    }
}

#[test]
fn the_first_of_equals_wins_a_window_and_nan_beats_all() {
    let line = |columns| pair(1, columns);
    let relation =
        PixelRelation { high: line(9), low: line(3), kernel: line(3), strides: line(3), padding: pair(0, 0) };
    let windows = Windows::new(&relation);
    for isa in Isa::available() {
        let input = [1.0, 2.0, 2.0, -0.0, 0.0, -1.0, f32::INFINITY, f32::NAN, 5.0];
        let (mut output, mut winners) = ([0.0; 3], [0; 3]);
        pooling::max_pool(isa, &windows, &input, &mut output, &mut winners, 1);
        assert_eq!(winners, [1, 0, 1], "{isa}");
        assert!(
            output[0] == 2.0 && output[1].to_bits() == (-0.0f32).to_bits() && output[2].is_nan(),
            "{isa}: {output:?}"
        );
    }
}
