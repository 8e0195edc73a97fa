//! `lockstep bench` measures what it is asked for, of any model, and says so in one JSON document.

mod support;

use serde_json::Value;
use support::Place;

/// Its samples are no pictures, so that the bundled data do not fit.
const SIGNALS: &str = r#"
    name = "signals"
    input = [30]
    encoder = [{ layer = "dense", units = 8, activation = "relu" }]
    decoder = [{ layer = "dense", units = 30 }]
"#;

fn number(value: &Value) -> f64 {
    value.as_f64().unwrap_or_else(|| panic!("{value} is no number"))
}

/// The middle of a figure, after a look at its ends.
fn median(measure: &Value) -> f64 {
    let [min, median, max] = ["min", "median", "max"].map(|name| number(&measure[name]));
    assert!(min <= median && median <= max && measure["count"].as_u64() > Some(0), "{measure}");
    median
}

/// Scenario: a model from a file is measured, with two worker processes, too. Property: every part is in the document,
/// and parts of a whole are not larger than it.
#[test]
fn a_document_has_every_part() {
    let place = Place::with_model(SIGNALS);
    let arguments = ["bench", "--quick", "--json", "--model", "model.toml", "--batch-size", "32", "--workers", "2"];
    let report: Value = serde_json::from_str(&place.succeed(&arguments)).expect("one JSON document");
    assert_eq!((report["batch_size"].as_u64(), report["shards"].as_u64()), (Some(32), Some(16)));
    let peaks = report["peaks"].as_array().expect("peaks");
    assert!(!peaks.is_empty() && peaks.iter().all(|peak| median(&peak["gflops"]) > 0.0), "{peaks:?}");
    let bandwidths = report["bandwidths"].as_array().expect("bandwidths");
    assert!(bandwidths.iter().all(|bandwidth| median(&bandwidth["gbytes_per_second"]) > 0.0), "{bandwidths:?}");

    let model = &report["models"][0];
    assert_eq!((model["name"].as_str(), model["parameters"].as_u64()), (Some("signals"), Some(30 * 8 * 2 + 38)));
    // Two layers forward, two weight gradients, and the second layer's input gradient: five products of 30 x 8.
    assert!((number(&model["mflop_per_sample"]) - 2.0 * 5.0 * 240.0 * 1e-6).abs() < 1e-12);
    let layers = model["layers"]["parts"].as_array().expect("layers");
    let of = |layer: &str, part: &str| layers.iter().find(|found| found["layer"] == layer && found["part"] == part);
    for (layer, part) in [
        ("encoder.0.dense", "forward"),
        ("encoder.0.dense", "weight gradient"),
        ("decoder.0.dense", "forward"),
        ("decoder.0.dense", "weight gradient"),
        ("decoder.0.dense", "input gradient"),
    ] {
        let found = of(layer, part).unwrap_or_else(|| panic!("no {part} of {layer}"));
        assert!(median(&found["gflops"]) > 0.0 && number(&found["percent_of_peak"]) > 0.0, "{found}");
    }
    assert!(of("network", "loss").is_some_and(|loss| loss["gflops"].is_null()), "{layers:?}");
    let step = &model["step"];
    let parts: f64 = ["pack_ms", "gradient_ms", "update_ms"].map(|part| number(&step[part]["min"])).iter().sum();
    assert!(parts <= median(&step["total_ms"]), "{step}");
    let rounds = model["rounds"].as_array().expect("rounds");
    assert_eq!([&rounds[0]["workers"], &rounds[1]["workers"]], [&Value::Null, &Value::from(2)]);
    for rounds in rounds {
        let parts = ["compute_ms", "transfer_ms", "reduce_ms", "update_ms", "wait_ms"];
        let least: f64 = parts.map(|part| number(&rounds[part]["min"])).iter().sum();
        assert!(least <= median(&rounds["round_ms"]), "{rounds}");
        assert!(number(&rounds["samples_per_second"]) > 0.0, "{rounds}");
    }
}

/// Scenario: a model's step alone, as a table. Property: nothing else is measured.
#[test]
fn parts_can_be_chosen() {
    let place = Place::with_model(SIGNALS);
    let text = place.succeed(&["bench", "--quick", "--model", "model.toml", "--parts", "step", "--simd", "scalar"]);
    assert!(text.starts_with("lockstep ") && text.contains(", scalar, "), "{text}");
    assert!(text.contains("\nsignals: 518 parameters, 0.00 MFLOP a sample\n"), "{text}");
    assert!(text.contains("whole step"), "{text}");
    assert!(!text.contains("triad") && !text.contains("rounds"), "{text}");
    let text = place.succeed(&[
        "bench",
        "--quick",
        "--model",
        "model.toml",
        "--parts",
        "step",
        "--simd",
        "scalar",
        "--compute",
        "bf16",
    ]);
    assert!(text.starts_with("lockstep ") && text.contains(", bf16 on scalar, "), "{text}");
}

#[test]
fn what_cannot_be_measured_is_the_users_to_mend() {
    let place = Place::new();
    for (arguments, expected) in [
        (["--preset", "vgg"], "no preset is called \"vgg\""),
        (["--shards", "512"], "--shards is 512; it must be a power of two, at most --batch-size 256"),
        (["--shards", "3"], "--shards is 3"),
        (["--parts", "nonsense"], "possible values: "),
        (["--compute", "f16"], "precision \"f16\" is none of f32, bf16, bf16-amx"),
    ] {
        let error = place.run(&["bench", arguments[0], arguments[1]]).expect_code(2).stderr;
        assert!(error.contains(expected), "{error}");
    }
}
