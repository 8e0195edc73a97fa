//! Wrong input: exit code 2, a message that names the thing and its numbers, and nothing left behind.

mod support;

use std::fs;
use std::net::TcpListener;
use std::path::Path;

use support::{Place, TINY};

/// A well-made IDX file of `count` images of 28x28 bytes, of which only the first `kept` bytes are there.
fn idx(count: u32, kept: usize) -> Vec<u8> {
    let mut file = vec![0, 0, 8, 3];
    [count, 28, 28].iter().for_each(|size| file.extend(size.to_be_bytes()));
    file.extend((0..count as usize * 784).map(|i| (i * 7 % 251) as u8));
    file.truncate(kept);
    file
}

/// An NPY file with this description and so many bytes of data.
fn npy(description: &str, bytes: usize) -> Vec<u8> {
    let mut file = b"\x93NUMPY\x01\x00".to_vec();
    // Header and preamble together are a multiple of 64 bytes long.
    let header = format!("{description:117}\n");
    file.extend((header.len() as u16).to_le_bytes());
    file.extend(header.as_bytes());
    file.extend((0..bytes).map(|i| (i % 251) as u8));
    file
}

fn npy_u8(shape: &str) -> String {
    format!("{{'descr': '|u1', 'fortran_order': False, 'shape': {shape}, }}")
}

/// A directory with everything that is wrong in it.
fn wrong_things() -> Place {
    let place = Place::with_model(TINY);
    place.write("short.idx", idx(40, 16 + 39 * 784 + 100));
    place.write("header.idx", idx(40, 9));
    place.write("long.idx", [idx(40, usize::MAX), vec![0; 3]].concat());
    place.write("kind.idx", [&[0, 0, 0x0b, 3], &idx(40, usize::MAX)[4..]].concat());
    place.write("magic.idx", [b"PK\x07\x08".to_vec(), idx(40, 2000)].concat());
    place.write("text.npy", "label,pixel1,pixel2\n");
    place.write("empty.npy", "");
    place.write("broken.gz", [&[0x1f, 0x8b, 8, 0][..], &[7; 60]].concat());
    place.write("short.npy", npy(&npy_u8("(50, 28, 28)"), 49 * 784 + 3));
    place.write("labels.npy", npy(&npy_u8("(300,)"), 300));
    place.write("wide.npy", npy(&npy_u8("(20, 32, 30)"), 20 * 32 * 30));
    place.write("small.npy", npy(&npy_u8("(20, 28, 28)"), 20 * 784));
    place.write("ints.npy", npy("{'descr': '<i8', 'fortran_order': False, 'shape': (20, 784), }", 20 * 784 * 8));
    place.write("columns.npy", npy("{'descr': '|u1', 'fortran_order': True, 'shape': (20, 784), }", 20 * 784));
    place.write("nan.npy", {
        let mut file = npy("{'descr': '<f4', 'fortran_order': False, 'shape': (20, 784), }", 0);
        let values = (0..20 * 784).map(|i| if i == 3 * 784 + 5 { f32::NAN } else { 0.5 });
        file.extend(values.flat_map(f32::to_le_bytes));
        file
    });
    place.write("foreign.safetensors", {
        let header = r#"{"encoder.0.dense.kernel":{"dtype":"F32","shape":[2,2],"data_offsets":[0,16]}}"#;
        [&(header.len() as u64).to_le_bytes()[..], header.as_bytes(), &[0; 16]].concat()
    });
    place.write("none.safetensors", "not at all");
    place.write("typo.toml", "seed = 3\nbatchsize = 64\n");
    place.write("torn.toml", "seed = \n");
    place.write("misfit.toml", TINY.replace("units = 784", "units = 783"));
    place.write("unknown-layer.toml", TINY.replace("layer = \"dense\", units = 4", "layer = \"lstm\", units = 4"));
    place
}

/// Names in a directory, sorted.
fn names(directory: &Path) -> Vec<String> {
    let entries = fs::read_dir(directory).expect("a directory");
    let mut names: Vec<String> =
        entries.map(|entry| entry.expect("an entry").file_name().to_string_lossy().into_owned()).collect();
    names.sort();
    names
}

/// Checks rows of arguments and what the message must contain. Nothing may be created or changed by any of them.
fn check(place: &Place, rows: &[(&str, &[&str])]) {
    let before = names(place.path());
    for (arguments, expected) in rows {
        let words: Vec<&str> = arguments.split(' ').collect();
        let message = place.run(&words).expect_code(2).stderr;
        for part in *expected {
            assert!(message.contains(part), "lockstep {arguments}: {part:?} is not in {message}");
        }
        assert_eq!(names(place.path()), before, "lockstep {arguments} left something behind");
    }
}

#[test]
fn data_that_cannot_be_used() {
    check(
        &wrong_things(),
        &[
            ("train --out run --data no/such.idx", &["cannot read no/such.idx", "No such file"]),
            ("train --out run --data short.idx", &["short.idx", "promises 31360 elements", "only 30676 follow"]),
            ("train --out run --data header.idx", &["header.idx", "9 of the 16 bytes of its IDX header"]),
            ("train --out run --workers 0", &["--workers", "0"]),
            ("train --out run --workers 20", &["--workers is 20, but only 16"]),
            ("train --out run --data long.idx", &["long.idx", "promises 31360 elements", "more bytes follow"]),
            ("train --out run --data kind.idx", &["kind.idx", "element type is 0x0b"]),
            ("train --out run --data magic.idx", &["magic.idx", "50 4b 07 08", "neither IDX", "nor"]),
            ("train --out run --data text.npy", &["text.npy", "6c 61 62 65", "neither IDX"]),
            ("train --out run --data empty.npy", &["empty.npy"]),
            ("train --out run --data broken.gz", &["broken.gz", "cannot be read to its end"]),
            ("train --out run --data short.npy", &["short.npy", "promises 39200 elements", "only 38419 follow"]),
            ("train --out run --data labels.npy", &["labels.npy", "(300,)", "one number per sample"]),
            ("train --out run --data ints.npy", &["ints.npy", "<i8", "supported are"]),
            ("train --out run --data columns.npy", &["columns.npy", "Fortran order"]),
            ("train --out run --data nan.npy", &["nan.npy", "element 5 of sample 3 is NaN"]),
            ("train --out run --data .", &["directory", "holds no", "idx3-ubyte"]),
            ("train --out run --data bundled --validation short.npy", &["short.npy", "only 38419 follow"]),
            ("train --out run --data small.npy --validation wide.npy", &["28x28", "32x30", "small.npy", "wide.npy"]),
            ("data info short.idx", &["short.idx", "only 30676 follow"]),
        ],
    );
}

#[test]
fn data_and_models_that_do_not_fit() {
    check(
        &wrong_things(),
        &[
            ("train --out run --data wide.npy", &["wide.npy", "32x30", "\"conv\"", "28x28x1"]),
            ("train --out run --data small.npy --shards 32", &["18 training samples", "32 shards"]),
            (
                "train --out run --model model.toml --init-from foreign.safetensors",
                &["foreign.safetensors", "\"encoder.0.dense.kernel\"", "[2, 2]", "[784, 4]"],
            ),
            ("train --out run --init-from none.safetensors", &["none.safetensors", "not a safetensors file"]),
            ("train --out run --init-from no.safetensors", &["no.safetensors", "No such file"]),
            ("train --out run --model misfit.toml", &["783", "784"]),
            ("train --out run --model unknown-layer.toml", &["unknown-layer.toml", "lstm"]),
            ("train --out run --model no/such.toml", &["no/such.toml"]),
            ("train --out run --preset vgg", &["\"vgg\"", "conv, article, dense"]),
            ("train --out run --preset conv --model model.toml", &["--preset", "--model"]),
            ("model check misfit.toml", &["783", "784"]),
            ("model check no/such.toml", &["no/such.toml"]),
            ("model check vgg", &["\"vgg\""]),
            ("eval no/such.safetensors", &["no/such.safetensors"]),
            ("eval .", &["model.safetensors"]),
            ("encode foreign.safetensors --out codes.npy", &["foreign.safetensors", "lockstep_model"]),
            ("audit .", &["ledger.jsonl", "No such file"]),
        ],
    );
}

#[test]
fn settings_that_cannot_be() {
    check(
        &wrong_things(),
        &[
            ("train --out run --batch-size 15", &["batch_size 15", "shards 16"]),
            ("train --out run --batch-size 0", &["batch_size is 0"]),
            ("train --out run --shards 12", &["shards is 12", "power of two"]),
            ("train --out run --shards 16384 --batch-size 20000", &["9000 training samples", "16384 shards"]),
            ("train --out run --epochs 0", &["epochs is 0"]),
            ("train --out run --max-rounds 0", &["max_rounds is 0"]),
            ("train --out run --epochs -1", &["-1"]),
            ("train --out run --learning-rate 0", &["learning_rate is 0"]),
            ("train --out run --learning-rate nan", &["learning_rate is NaN"]),
            ("train --out run --loss hinge", &["\"hinge\"", "mse"]),
            ("train --out run --name ../up", &["\"../up\""]),
            ("train --out run --min-workers 17", &["min_workers is 17", "16"]),
            ("train --out run --threads 0", &["--threads", "0"]),
            ("train --out run --workers -1", &["-1"]),
            ("train --out run --simd avx9000", &["\"avx9000\"", "this machine has: ", "scalar"]),
            ("train --out run --set optimiser.beta_1=0.5", &["optimiser", "optimizer"]),
            ("train --out run --set optimizer.beta1=0.5", &["beta1", "beta_1"]),
            ("train --out run --set optimizer.beta_1=1.5", &["beta_1 is 1.5"]),
            ("train --out run --set epochs", &["--set epochs", "KEY=VALUE"]),
            ("train --out run --set seed.x=1", &["seed"]),
            ("train --out run --set batch_size=many", &["batch_size", "many"]),
            ("train --out run --set data.validation_fraction=1.0", &["validation fraction is 1"]),
            ("train --out run --set cluster.lease_timeout_ms=600", &["lease_timeout_ms is 600", "500"]),
            ("train --out run --config no/such.toml", &["no/such.toml"]),
            ("train --out run --config typo.toml", &["typo.toml", "batchsize", "line 2"]),
            ("train --out run --config torn.toml", &["torn.toml", "line 1"]),
            ("train --out run --no-such-option", &["--no-such-option"]),
            ("coordinator --out run --simd avx9000", &["\"avx9000\""]),
            ("coordinator --out run --listen nowhere", &["nowhere"]),
            ("coordinator --out run --listen 0.0.0.0:0", &["0.0.0.0:0", "not a loopback address", "--insecure"]),
            ("worker --coordinator http://127.0.0.1:9 --threads 0", &["--threads", "0"]),
            ("worker --coordinator http://127.0.0.1:9 --simd avx9000", &["\"avx9000\""]),
            ("worker --coordinator http://", &["http://"]),
            ("worker", &["--coordinator"]),
            ("train --out torn.toml", &["torn.toml"]),
        ],
    );
}

#[test]
fn the_articles_own_decoder_is_refused_with_its_table() {
    let place = Place::new();
    let model = Path::new(env!("CARGO_MANIFEST_DIR")).join("../common/tests/models/article-uncorrected.toml");
    let model = model.to_str().expect("a path");
    let refused = place.run(&["model", "check", model]).expect_code(2);
    let shown = refused.stdout + &refused.stderr;
    // Every layer's output, and the reason.
    for expected in
        ["26x26x32", "13x13x32", "11x11x64", "5x5x64", "3x3x64", "12x12x3", "28x28x1", "conv2d_transpose", "max_pool2d"]
    {
        assert!(shown.contains(expected), "{expected} is not in {shown}");
    }
    let trained = place.run(&["train", "--model", model, "--out", "run"]).expect_code(2).stderr;
    assert!(trained.contains("12x12x3") && trained.contains("28x28x1"), "{trained}");
    assert!(names(place.path()).is_empty());
}

/// Scenario: a second run is to be written where one is. Property: it is refused, and the first stays as it was.
#[test]
fn a_directory_that_holds_a_run_is_not_touched() {
    let place = Place::with_model(TINY);
    place.train("run", 2, &[]);
    let files = |name: &str| -> Vec<(String, Vec<u8>)> {
        let directory = place.file(name);
        let files = names(&directory).into_iter().filter(|name| directory.join(name).is_file());
        files.map(|name| (name.clone(), fs::read(directory.join(name)).unwrap())).collect()
    };
    let before = files("run");
    for command in ["train", "coordinator"] {
        let message = place.run(&[command, "--out", "run"]).expect_code(2).stderr;
        assert!(message.contains("run already holds a run") && message.contains("--out"), "{message}");
    }
    fs::create_dir(place.file("photos")).unwrap();
    place.write("photos/cat.txt", "miaow");
    let message = place.run(&["train", "--out", "photos"]).expect_code(2).stderr;
    assert!(message.contains("photos is not empty"), "{message}");
    assert!(files("run") == before, "the run's files have changed");
    assert_eq!(names(&place.file("photos")), ["cat.txt"]);
}

#[test]
fn a_port_in_use_is_named() {
    let place = Place::new();
    let taken = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = taken.local_addr().unwrap().to_string();
    let message = place.run(&["coordinator", "--listen", &address, "--out", "run"]).expect_code(2).stderr;
    assert!(message.contains(&address) && message.contains("in use"), "{message}");
    assert!(names(place.path()).is_empty());
}
