//! What training in bfloat16 makes of a model.

mod support;

use support::{CONV, Place};

/// Scenario: a small convolutional model is trained on the bundled images, in 32-bit floats from five seeds, and from one
/// of them in bfloat16, added either way, or with a wire in bfloat16, or both. Property: what rounding changes in the losses is less than
/// what another seed changes.
#[test]
fn losses_in_bfloat16_are_within_the_spread_of_seeds() {
    const ROUNDS: u32 = 120;
    let place = Place::with_model(CONV);
    let losses = |name: &str, more: &[&str]| {
        let summary = place.train(name, ROUNDS, more);
        ["train_loss", "val_loss"].map(|key| summary[key].as_f64().expect("a loss"))
    };
    let of_seeds = ["1", "2", "3", "4", "5"].map(|seed| losses(seed, &["--seed", seed]));
    let ways = [
        &["--compute", "bf16"][..],
        &["--compute", "bf16-amx"],
        &["--wire", "bf16"],
        &["--compute", "bf16", "--wire", "bf16"],
    ];
    for (way, options) in ways.into_iter().enumerate() {
        let in_bfloat16 = losses(&format!("bf16-{way}"), &[&["--seed", "1"], options].concat());
        for (i, in_bfloat16) in in_bfloat16.into_iter().enumerate() {
            let all = of_seeds.map(|losses| losses[i]);
            let spread = all.iter().copied().fold(f64::MIN, f64::max) - all.iter().copied().fold(f64::MAX, f64::min);
            let difference = (in_bfloat16 - all[0]).abs();
            eprintln!("losses {all:?}, with {options:?} {in_bfloat16}");
            assert!(difference > 0.0 && difference < spread, "{in_bfloat16} is not near {}: {all:?}", all[0]);
        }
    }
}
