//! What a run leaves behind, and what can be done with it.

mod support;

use std::fs;

use lockstep_common::model_file::TrainedModel;
use lockstep_common::progress::{Event, RunState, TimedEvent};
use support::{CONV, Place, TINY, hash, rounds_of};

/// What a program that reads summaries may count on.
const SUMMARY_KEYS: [&str; 14] = [
    "params_sha256",
    "rounds",
    "epochs",
    "samples_seen",
    "train_loss",
    "val_loss",
    "samples_per_second",
    "wall_seconds",
    "workers_seen",
    "workers_lost",
    "shards",
    "batch_size",
    "seed",
    "version",
];

/// `count` samples of 28x28 floats as an NPY file; sample `i` depends on `i` and `key` only.
fn npy(count: usize, key: impl Fn(usize) -> usize) -> Vec<u8> {
    let mut file = b"\x93NUMPY\x01\x00\x76\x00".to_vec();
    let header = format!("{{'descr': '<f4', 'fortran_order': False, 'shape': ({count}, 28, 28), }}");
    file.extend(format!("{header:117}\n").bytes());
    for sample in 0..count {
        let value = |i: usize| ((i * 7 + sample * 31 + key(sample) * 101) % 97) as f32 / 97.0;
        file.extend((0..784).flat_map(|i| value(i).to_le_bytes()));
    }
    file
}

/// The axes in an NPY file's header.
fn npy_shape(file: &[u8]) -> String {
    assert_eq!(&file[..6], b"\x93NUMPY");
    let header = String::from_utf8_lossy(&file[10..138]).into_owned();
    assert!(header.contains("'<f4'") && header.contains("'fortran_order': False"), "{header}");
    let shape = header.split("'shape': ").nth(1).expect("a shape");
    // Python reads a comma after the last axis as well as none.
    shape[..=shape.find(')').expect("a tuple")].replace(",)", ")")
}

/// Width and height of a PNG file whose chunks are all whole.
fn png_size(file: &[u8]) -> (u32, u32) {
    let (signature, mut rest) = file.split_at(8);
    assert_eq!(signature, b"\x89PNG\r\n\x1a\n");
    let number = |bytes: &[u8]| u32::from_be_bytes(bytes[..4].try_into().expect("four bytes"));
    let mut kinds = Vec::new();
    while !rest.is_empty() {
        let length = number(rest) as usize;
        let (content, after) = rest[4..].split_at(4 + length);
        assert_eq!(number(after), crc32(content), "chunk {}", kinds.len());
        kinds.push(String::from_utf8_lossy(&content[..4]).into_owned());
        rest = &after[4..];
    }
    assert_eq!((kinds.first().map(String::as_str), kinds.last().map(String::as_str)), (Some("IHDR"), Some("IEND")));
    assert!(kinds.iter().any(|kind| kind == "IDAT"));
    (number(&file[16..]), number(&file[20..]))
}

fn crc32(bytes: &[u8]) -> u32 {
    !bytes.iter().fold(!0, |crc, &byte| {
        (0..8).fold(crc ^ u32::from(byte), |crc, _| if crc & 1 == 1 { crc >> 1 ^ 0xedb8_8320 } else { crc >> 1 })
    })
}

#[test]
fn every_file_is_there_and_says_the_same() {
    let place = Place::with_model(TINY);
    // Two rounds are an epoch; the third belongs to the next one.
    let summary = place.train("run", 3, &["--batch-size", "5000"]);
    for key in SUMMARY_KEYS {
        assert!(summary.get(key).is_some_and(|value| !value.is_null()), "{key} is missing in {summary}");
    }
    assert_eq!((&summary["rounds"], &summary["epochs"], &summary["seed"]), (&3.into(), &2.into(), &7.into()));
    assert_eq!((&summary["samples_seen"], &summary["shards"]), (&14_900.into(), &16.into()));

    let events: Vec<TimedEvent> = place
        .read("run/events.jsonl")
        .lines()
        .map(|line| serde_json::from_str(line).unwrap_or_else(|error| panic!("{error} in {line}")))
        .collect();
    assert!(events.is_sorted_by_key(|event| event.unix_ms));
    assert_eq!(rounds_of(&place.json_lines("run/events.jsonl")), [0, 1, 2]);
    assert!(matches!(events.last().map(|last| &last.event), Some(Event::State { state: RunState::Finished { .. } })));
    let losses: Vec<f64> = events
        .iter()
        .filter_map(|event| if let Event::Epoch(epoch) = &event.event { epoch.validation_loss } else { None })
        .collect();
    assert_eq!(losses.len(), 2);
    assert_eq!(summary["val_loss"].as_f64(), losses.last().copied());

    let trained = TrainedModel::load(&place.file("run/model.safetensors")).expect("a model");
    assert_eq!((trained.rounds, trained.loss.as_str(), trained.model.spec.name.as_str()), (3, "mse", "tiny"));
    let (width, height) = png_size(&fs::read(place.file("run/reconstructions.png")).expect("a picture"));
    assert!(width >= 8 * 28 && height >= 4 * 28, "16 images and their reconstructions: {width}x{height}");
}

/// Scenario: the run.toml of a finished run is given back to the program, elsewhere and without the model's file.
/// Property: the same bits come out.
#[test]
fn a_runs_own_configuration_makes_it_again() {
    let place = Place::with_model(CONV);
    let more = ["--learning-rate", "0.003", "--loss", "binary_crossentropy", "--no-shuffle"];
    let expected = hash(&place.train("run", 3, &more));
    fs::remove_file(place.file("model.toml")).expect("the model's file");
    place.succeed(&["train", "--json", "--config", "run/run.toml", "--out", "again"]);
    assert_eq!(hash(&place.summary("again")), expected);
    assert_eq!(place.read("again/run.toml"), place.read("run/run.toml"));
    place.succeed(&["train", "--json", "--config", "run/run.toml", "--out", "other", "--seed", "1"]);
    assert_ne!(hash(&place.summary("other")), expected, "options override the file");
}

#[test]
fn runs_get_directories_of_their_own() {
    let place = Place::with_model(TINY);
    place.write("samples.npy", npy(200, |_| 0));
    let train = ["train", "--model", "model.toml", "--data", "samples.npy", "--epochs", "1"];
    let printed = place.succeed(&train);
    for expected in ["validation loss", "PCA, 4 values", "runs/tiny-1/model.safetensors", "lockstep audit runs/tiny-1"]
    {
        assert!(printed.contains(expected), "{expected:?} is not in {printed}");
    }
    place.succeed(&train);
    assert_eq!(hash(&place.summary("runs/tiny-1")), hash(&place.summary("runs/tiny-2")));
}

/// Scenario: a large code of large images, for which the best linear code would take minutes. Property: the run ends without
/// it, and the summary says how to have it.
#[test]
fn a_baseline_that_takes_long_is_left_to_who_wants_it() {
    let place = Place::with_model(&TINY.replace("784", "4096").replace("units = 4,", "units = 1500,"));
    let mut file = b"\x93NUMPY\x01\x00\x76\x00".to_vec();
    file.extend(format!("{:117}\n", "{'descr': '|u1', 'fortran_order': False, 'shape': (3000, 64, 64), }").bytes());
    file.extend((0..3000 * 64 * 64).map(|i| (i % 251) as u8));
    place.write("samples.npy", file);
    let train = ["train", "--model", "model.toml", "--data", "samples.npy", "--max-rounds", "1", "--out", "run"];
    let printed = place.succeed(&train);
    let how = "not computed, since it takes a while: lockstep eval run --pca --data samples.npy";
    assert!(printed.contains(how), "{printed}");
}

/// Scenario: two files have the same first 64 samples, and others behind them. Property: without shuffling, one round of
/// 64 samples makes the same of both; with shuffling it does not.
#[test]
fn without_shuffling_samples_come_in_the_order_of_the_file() {
    let place = Place::with_model(TINY);
    place.write("a.npy", npy(256, |_| 0));
    place.write("b.npy", npy(256, |sample| usize::from(sample >= 64)));
    let one_round = |out: &str, data: &str, more: &[&str]| {
        hash(&place.train(out, 1, &[&["--data", data, "--set", "data.validation_fraction=0"], more].concat()))
    };
    let ordered = one_round("a-ordered", "a.npy", &["--no-shuffle"]);
    assert_eq!(one_round("b-ordered", "b.npy", &["--no-shuffle"]), ordered);
    let shuffled = one_round("a-shuffled", "a.npy", &[]);
    assert_ne!(one_round("b-shuffled", "b.npy", &[]), shuffled);
    assert_ne!(shuffled, ordered);
}

/// Scenario: a run starts from another one's model and takes a step that changes next to nothing. Property: its weights
/// are those of the other one, and not those that the seed would have given.
#[test]
fn a_run_can_start_from_a_models_weights() {
    let place = Place::with_model(CONV);
    place.train("first", 3, &[]);
    let init = ["--init-from", "first/model.safetensors", "--learning-rate", "1e-9"];
    place.train("next", 1, &init);
    place.train("next-by-workers", 1, &[&init[..], &["--workers", "2"]].concat());
    place.train("fresh", 1, &["--learning-rate", "1e-9"]);
    let parameters =
        |out: &str| TrainedModel::load(&place.file(&format!("{out}/model.safetensors"))).expect("a model").parameters;
    let distance = |a: &[f32], b: &[f32]| a.iter().zip(b).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max);
    let (first, next, fresh) = (parameters("first"), parameters("next"), parameters("fresh"));
    assert!(distance(&first, &next) < 1e-7, "{}", distance(&first, &next));
    assert!(distance(&first, &fresh) > 1e-4, "{}", distance(&first, &fresh));
    assert_eq!(hash(&place.summary("next")), hash(&place.summary("next-by-workers")));
    // Without lockstep's own model in the file, the weights are still found by name.
    let loss = |out: &str| place.summary(out)["val_loss"].as_f64().expect("a loss");
    assert!((loss("next") - loss("first")).abs() < 1e-6 && loss("fresh") > loss("first"));
}

#[test]
fn a_model_is_evaluated_and_used() {
    let place = Place::with_model(CONV);
    let summary = place.train("run", 3, &[]);
    // The part of the bundled images that the run held out.
    let held_out = ["--validation-fraction", "0.01"];
    let run = |command: &[&str]| place.succeed(&[command, &held_out[..]].concat());
    let evaluation: serde_json::Value = serde_json::from_str(&run(&["eval", "run", "--json"])).expect("JSON");
    let (mse, expected) = (evaluation["mse"].as_f64().expect("a loss"), summary["val_loss"].as_f64().expect("a loss"));
    assert!((mse - expected).abs() <= 1e-6, "eval says {mse}, the run said {expected}");
    assert_eq!((&evaluation["samples"], &evaluation["rounds"]), (&100.into(), &3.into()));
    assert!(run(&["eval", "run/model.safetensors"]).contains("article-small, after 3 rounds"));

    run(&["encode", "run", "--split", "validation", "--out", "codes.npy"]);
    run(&["reconstruct", "run", "--split", "validation", "--out", "images.npy"]);
    run(&["reconstruct", "run", "--count", "5", "--out", "images.png"]);
    let file = |name: &str| fs::read(place.file(name)).expect("an output file");
    assert_eq!(npy_shape(&file("codes.npy")), "(100, 3, 3, 7)");
    assert_eq!(npy_shape(&file("images.npy")), "(100, 28, 28)");
    assert_eq!(file("images.npy").len(), 128 + 100 * 784 * 4);
    let (width, _) = png_size(&file("images.png"));
    assert!(width >= 5 * 28, "{width}");
    // What comes out is good input.
    assert!(place.succeed(&["data", "info", "images.npy"]).contains("samples  100"));
}
