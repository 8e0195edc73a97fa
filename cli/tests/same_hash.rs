//! One run, computed in many ways: the trained parameters have one hash.

mod support;

use support::{CONV, DENSE, Place, hash};

/// Rounds of every run here.
const ROUNDS: u32 = 5;

/// Scenario: a model is trained in one process, by 1 to 8 worker processes, with 1 and 2 threads, and on every
/// instruction set that this machine has. Property: `params_sha256` is the golden one each time.
fn check(model: &str, golden: &str) {
    let place = Place::with_model(model);
    let expected = hash(&place.train("in-process", ROUNDS, &[]));
    assert_eq!(expected, golden, "this run has other bits than before: common/tests/golden_hash.rs says what to do");
    let same = |name: &str, more: &[&str]| {
        let summary = place.train(name, ROUNDS, more);
        assert_eq!(hash(&summary), expected, "{more:?} changed the result");
        summary
    };
    for workers in ["1", "2", "3", "5", "8"] {
        let summary = same(&format!("{workers}-workers"), &["--workers", workers]);
        assert_eq!(summary["workers_seen"].to_string(), workers);
    }
    for threads in ["1", "2"] {
        same(&format!("{threads}-threads"), &["--threads", threads]);
    }
    for simd in instruction_sets(&place) {
        same(&simd, &["--simd", &simd]);
        same(&format!("{simd}-2-workers"), &["--simd", &simd, "--workers", "2"]);
    }
    let other = place.train("other-seed", ROUNDS, &["--seed", "8"]);
    assert_ne!(hash(&other), expected, "the hash says nothing if the seed does not matter");
}

/// Scenario: a model is trained in bfloat16 by any number of workers and threads, on every instruction set. Property:
/// `params_sha256` is the golden one each time, and not that of 32-bit floats. `what` is rounded: `compute` or `wire`.
fn check_in_bfloat16([what, value]: [&str; 2], model: &str, golden: &str) {
    let option = format!("--{what}");
    let place = Place::with_model(model);
    let train = |name: &str, more: &[&str]| place.train(name, ROUNDS, &[&[&option, value], more].concat());
    let summary = train("in-process", &[]);
    assert_eq!(summary[what], value);
    assert_eq!(
        hash(&summary),
        golden,
        "this run has other bits than before: common/tests/golden_hash.rs says what to do"
    );
    let mut ways = vec![vec!["--workers", "2"], vec!["--workers", "3"], vec!["--threads", "1"], vec!["--threads", "2"]];
    // Gradients and parameters travel.
    ways.push(vec!["--workers", "3", "--set", "cluster.shared_memory=false"]);
    let sets = instruction_sets(&place);
    ways.extend(sets.iter().map(|set| vec!["--simd", set]));
    for (i, way) in ways.iter().enumerate() {
        assert_eq!(hash(&train(&format!("way-{i}"), way)), golden, "{way:?} changed the result");
    }
    let f32 = place.train("f32", ROUNDS, &[&option, "f32"]);
    assert_eq!(f32[what], "f32");
    assert_ne!(hash(&f32), golden);
}

/// What this machine has, by its own words.
fn instruction_sets(place: &Place) -> Vec<String> {
    let refused = place.run(&["train", "--simd", "none-such"]).expect_code(2).stderr;
    let listed = refused.lines().find_map(|line| line.split("this machine has: ").nth(1)).expect("a list");
    let sets: Vec<String> = listed.split(", ").map(str::to_owned).collect();
    assert!(sets.contains(&"scalar".to_owned()), "{refused}");
    sets
}

#[test]
fn a_dense_model_has_one_hash() {
    check(DENSE, "95b5a819e0b7113dae809e52778a5fef519e8ad6a4862e515f7eab7110a1ee37");
}

#[test]
fn a_convolutional_model_has_one_hash() {
    check(CONV, "f63fd35d64ef06880ae043906439de5c3c723f0fdc9d0c78d7aa2fcf441e6008");
}

#[test]
fn models_in_bfloat16_have_one_hash() {
    check_in_bfloat16(["compute", "bf16"], DENSE, "c7117ecf04d1736b32a84083ec42de8abb6eff32de18dc17baf8a32391563db9");
    check_in_bfloat16(["compute", "bf16"], CONV, "5163835e1b07f609e4dffe240c2dde9647b9af8421eb12f016ccfe1c2bc2624a");
}

#[test]
fn models_in_bfloat16_by_blocks_have_one_hash() {
    check_in_bfloat16(
        ["compute", "bf16-amx"],
        DENSE,
        "a9b81948e10b4c9e57f434b5f1f94e0114ff2fc7572683c4f9a3d31779c8c87b",
    );
    check_in_bfloat16(
        ["compute", "bf16-amx"],
        CONV,
        "a8a7d9346735ac597724957a1ca6abca489c686c4022bc1fc8a0b2922bbcd6fa",
    );
}

#[test]
fn models_with_a_wire_in_bfloat16_have_one_hash() {
    check_in_bfloat16(["wire", "bf16"], DENSE, "220dc38a38accd814ab45a5957bf71fafccd28f8ecfc22bca2a6f70e86c4146a");
    check_in_bfloat16(["wire", "bf16"], CONV, "efe5749876faedb62506f2810ce8def912aabfd635dc1e1fe6a38fd12c20085c");
}
