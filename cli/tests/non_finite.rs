//! Runs with a sample that makes its round's loss or gradient overflow: what is done about it is the same for any workers.

mod support;

use support::{Ended, Place, TINY, hash};

/// Three epochs, the last one not whole: of 7 rounds, one of which is not finite.
const ROUNDS: u32 = 20;
const SAMPLES: usize = 400;
const ELEMENTS: usize = 784;
/// The sample that is too large.
const CULPRIT: usize = 137;

/// A data set of small numbers in which one pixel of one sample is `large`.
fn samples(large: f32) -> Vec<u8> {
    let mut header = format!("{{'descr': '<f4', 'fortran_order': False, 'shape': ({SAMPLES}, {ELEMENTS}), }}");
    let padding = 64 - (10 + header.len() + 1) % 64;
    header.push_str(&" ".repeat(padding));
    header.push('\n');
    let mut file = b"\x93NUMPY\x01\x00".to_vec();
    file.extend((header.len() as u16).to_le_bytes());
    file.extend(header.as_bytes());
    for i in 0..SAMPLES * ELEMENTS {
        let value = if i == CULPRIT * ELEMENTS + 300 { large } else { (i * 7 % 97) as f32 / 97.0 };
        file.extend(value.to_le_bytes());
    }
    file
}

/// A place with such data.
fn place(large: f32) -> Place {
    let place = Place::with_model(TINY);
    place.write("data.npy", samples(large));
    place
}

fn train(place: &Place, out: &str, more: &[&str]) -> Ended {
    let data = ["--data", "data.npy", "--set", "checkpoint.every_rounds=3"];
    place.run(&support::train_arguments(out, ROUNDS, &[&data[..], more].concat()))
}

/// Scenario: a sample overflows the loss, or only the gradient; the run is computed in one process, by processes that share
/// memory and by ones that do not, and is killed and resumed. Property: one hash for each action.
#[test]
fn what_is_skipped_is_the_same_for_any_workers() {
    let loss_and_gradient = ("mse", 1e30);
    let gradient_alone = ("binary_crossentropy", 1e36);
    for (loss, large) in [loss_and_gradient, gradient_alone] {
        let place = place(large);
        let loss = format!("loss={loss}");
        let mut hashes = Vec::new();
        for action in ["skip", "lower_rate"] {
            let set = format!("non_finite.action={action}");
            let settings = ["--set", &loss, "--set", &set];
            let one = format!("{action}-in-process");
            train(&place, &one, &settings).expect_code(0);
            let expected = place.summary(&one);
            for (name, more) in [
                ("shared", &["--workers", "3"][..]),
                ("chunks", &["--workers", "2", "--set", "cluster.shared_memory=false"]),
                ("scalar", &["--simd", "scalar", "--threads", "1"]),
            ] {
                let name = format!("{action}-{name}");
                train(&place, &name, &[&settings[..], more].concat()).expect_code(0);
                let summary = place.summary(&name);
                for key in ["params_sha256", "samples_seen", "train_loss", "val_loss"] {
                    assert_eq!(summary[key], expected[key], "{loss} {name}: {key}");
                }
            }
            let told = place.read(&format!("{one}/events.jsonl"));
            let layers = "the gradient is not finite from encoder.0.dense.kernel to decoder.0.dense.kernel";
            assert!(told.contains("sample 137: the loss is "), "{told}");
            assert_eq!(told.contains(layers), large == gradient_alone.1, "{told}");
            let proof = place.audit(&one);
            assert!(proof.contains("3 rounds were skipped, not being finite"), "{proof}");
            let skipped = place.json_lines(&format!("{one}/events.jsonl"));
            let skipped = skipped.iter().filter(|event| event["skipped"] == true).count();
            assert_eq!(skipped, 3);
            check_resume(&place, action, &settings, &hash(&expected));
            hashes.push(hash(&expected));
        }
        assert_ne!(hashes[0], hashes[1], "a lower rate changes the result");
    }
}

/// Stops a run in the middle, after something was skipped, and goes on with it by other workers.
fn check_resume(place: &Place, action: &str, settings: &[&str], expected: &str) {
    let out = format!("{action}-resumed");
    let data = ["--data", "data.npy", "--set", "checkpoint.every_rounds=3", "--max-rounds", "11"];
    place.succeed(&support::train_arguments(&out, 11, &[&data[2..4], &data[..2], settings].concat()));
    let more = ROUNDS.to_string();
    place.succeed(&["train", "--json", "--resume", &out, "--max-rounds", &more, "--workers", "2"]);
    assert_eq!(hash(&place.summary(&out)), expected, "{action}");
    place.audit(&out);
}

/// Scenario: nothing is said about it. Property: the run fails, names leaf, sample and layer, and keeps the parameters
/// from before the round; and it can be resumed with another action, which ends as if it had been chosen from the start.
#[test]
fn a_run_stops_with_its_last_good_parameters_and_can_go_on() {
    let place = place(1e30);
    train(&place, "skipped", &["--set", "non_finite.action=skip"]).expect_code(0);
    let expected = hash(&place.summary("skipped"));
    let mut reasons = Vec::new();
    for (out, workers) in [("alone", &[][..]), ("three", &["--workers", "3"])] {
        let said = train(&place, out, workers).expect_code(1).stderr;
        let reason = said.lines().find(|line| line.contains("is not finite: its loss is inf")).expect("a reason");
        for expected in ["it begins in leaf ", "sample 137: the loss is inf", "the loss alone overflows", "--resume"] {
            assert!(reason.contains(expected), "{expected:?} is not in {reason}");
        }
        let summary = place.summary(out);
        assert_eq!(summary["outcome"], "failed");
        assert!(place.audit(out).contains("model.safetensors is what the last round made"));
        reasons.push(summary);
        place.succeed(&["train", "--json", "--resume", out, "--set", "non_finite.action=skip"]);
        assert_eq!(hash(&place.summary(out)), expected);
    }
    assert_eq!(hash(&reasons[0]), hash(&reasons[1]));
    assert_eq!(reasons[0]["rounds"], reasons[1]["rounds"]);
}
