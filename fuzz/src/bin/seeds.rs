//! Writes fuzz/corpus anew: for each target a few small inputs that are right, from which the fuzzer starts.
//!
//! `cargo run --manifest-path fuzz/Cargo.toml --target-dir target/fuzz-seeds --bin seeds` from the repository's root. Inputs
//! that once crashed a target are tests where the mistake was.

#[path = "../../../proto/tests/strategies/mod.rs"]
mod strategies;

use std::fs;
use std::io::{Cursor, Write};
use std::num::NonZeroU32;
use std::path::Path;

use lockstep_common::checkpoint::{KnownWorker, LedgerPosition, Shown, Skipped, Standing, State, format};
use lockstep_common::config::{ModelChoice, RunConfig};
use lockstep_common::hash::Digest;
use lockstep_common::ledger::{Contribution, Header, Record};
use lockstep_common::model::{LayoutHash, PRESETS, preset};
use lockstep_common::model_file::TrainedModel;
use lockstep_common::nn::initial_parameters;
use lockstep_common::optim::adam::Moments;
use lockstep_common::protocol::{FromWorker, MemberId, ToWorker};
use lockstep_common::reduce::Tree;
use lockstep_common::shard::{Schedule, samples_digest};
use lockstep_proto::convert::{Downward, Upward};
use lockstep_proto::v1;
use proptest::strategy::{Strategy, ValueTree};
use proptest::test_runner::TestRunner;
use prost::Message;
use zip::write::SimpleFileOptions;
use zip::{CompressionMethod, ZipWriter};

/// Examples of each kind of message.
const EXAMPLES: usize = 3;

fn main() {
    wire_up();
    wire_down();
    chunks();
    checkpoint();
    ledger();
    images();
    model_file();
    config();
    events();
}

fn write(target: &str, name: &str, bytes: impl AsRef<[u8]>) {
    let directory = Path::new(env!("CARGO_MANIFEST_DIR")).join("corpus").join(target);
    fs::create_dir_all(&directory).expect("a directory for the corpus");
    fs::write(directory.join(name), bytes).expect("a file of the corpus");
}

fn examples<T: std::fmt::Debug>(strategy: impl Strategy<Value = T>) -> Vec<T> {
    let mut runner = TestRunner::deterministic();
    (0..EXAMPLES).map(|_| strategy.new_tree(&mut runner).expect("a value").current()).collect()
}

fn exchange(message: FromWorker) -> Vec<Vec<u8>> {
    let Upward::Exchange(messages) = message.into() else { panic!("no message of an exchange") };
    messages.map(|message| message.encode_to_vec()).collect()
}

fn session(message: ToWorker) -> Vec<Vec<u8>> {
    let Downward::Session(messages) = message.into() else { panic!("no message of a session") };
    messages.map(|message| message.encode_to_vec()).collect()
}

fn wire_up() {
    for (i, join) in examples(strategies::join()).into_iter().enumerate() {
        write("wire_up", &format!("join-{i}"), v1::SessionRequest::from(join).encode_to_vec());
    }
    for (i, message) in examples(strategies::session_message()).into_iter().enumerate() {
        let Upward::Session(message) = message.into() else { panic!("no message of a session") };
        write("wire_up", &format!("session-{i}"), message.encode_to_vec());
    }
    for (i, report) in examples(strategies::node_report()).into_iter().enumerate() {
        write("wire_up", &format!("announce-{i}"), &exchange(FromWorker::Announce(report))[0]);
    }
    for (i, computed) in examples(strategies::computed()).into_iter().enumerate() {
        write("wire_up", &format!("computed-{i}"), &exchange(computed)[0]);
    }
    for (i, chunk) in examples(strategies::node_chunk()).into_iter().enumerate() {
        write("wire_up", &format!("chunk-{i}"), &exchange(FromWorker::NodeChunk(chunk))[0]);
    }
}

/// Messages of one stream, as `lockstep_fuzz::wire_down` takes them.
fn stream(number: u8, messages: &[Vec<u8>]) -> Vec<u8> {
    let mut bytes = Vec::new();
    for message in messages.iter().filter(|message| message.len() <= usize::from(u16::MAX)) {
        bytes.extend((message.len() as u16).to_le_bytes());
        bytes.push(number);
        bytes.extend(message);
    }
    bytes
}

fn wire_down() {
    for (i, welcome) in examples(strategies::welcome()).iter().enumerate() {
        write("wire_down", &format!("welcome-{i}"), stream(0, &[v1::SessionResponse::from(welcome).encode_to_vec()]));
    }
    for (i, assignment) in examples(strategies::assignment(4, 1, 9)).into_iter().enumerate() {
        write("wire_down", &format!("assign-{i}"), stream(1, &session(ToWorker::Assign(assignment))));
    }
    for (i, answer) in examples(strategies::session_answer()).into_iter().enumerate() {
        write("wire_down", &format!("answer-{i}"), stream(1, &session(answer)));
    }
    for (i, event) in examples(strategies::event()).iter().enumerate() {
        write("wire_down", &format!("event-{i}"), stream(4, &[v1::WatchResponse::from(event).encode_to_vec()]));
    }
    for (i, status) in examples(strategies::run_status()).iter().enumerate() {
        write("wire_down", &format!("status-{i}"), stream(5, &[v1::GetRunResponse::from(status).encode_to_vec()]));
    }
    let samples = strategies::samples(0, 3, 9);
    let count = samples.ids.len() as u32;
    let parts = std::iter::once(samples);
    let shard = lockstep_proto::convert::shard_messages(&lockstep_fuzz::job(), count, parts);
    let shard: Vec<Vec<u8>> = shard.map(|message| message.encode_to_vec()).collect();
    write("wire_down", "shard", stream(2, &shard));
}

fn chunks() {
    let whole = |version: u8| {
        let message = [vec![0x80], vec![0; 188]].concat();
        stream(version, &[message])
    };
    write("chunks", "whole", [whole(0), whole(1)].concat());
    write("chunks", "wrong", stream(3, &[vec![0, 1, 2, 3], vec![1, 0, 0, 0, 0], vec![]]));
}

fn checkpoint() {
    let member = MemberId { worker: 2, incarnation: 1001 };
    let state = State {
        version: "0.1.0".into(),
        config: "name = \"x\"\n".into(),
        layout: LayoutHash(7),
        fingerprint: Digest(8),
        data: Digest(9),
        restarts: 1,
        standing: Standing {
            rounds: 120,
            evaluated: 71,
            epoch_loss: 0.3,
            epoch_samples: 4,
            samples_seen: 5,
            workers_lost: 6,
            skipped: Skipped { rounds: 1, in_a_row: 1, rate_cuts: 1 },
            workers: vec![KnownWorker { process: 7, member, barred: None }],
        },
        ledger: LedgerPosition { bytes: 1234, chain: Digest(5) },
        events_bytes: 99,
        shown: Shown { loss: Some(0.5), train_loss: None, validation_loss: None, training_time: Default::default() },
    };
    let parameters = [1.0, -2.0];
    let mut file = Vec::new();
    format::write(&mut file, &state, &parameters, &Moments::zero(2)).expect("a checkpoint");
    write("checkpoint", "whole", [&[1], &file[..]].concat());
    // Behind a header of 40 bytes, and before three vectors of two floats and a digest.
    write("checkpoint", "state", [&[0], &file[40..file.len() - 24 - 16]].concat());
    write("checkpoint", "torn", [&[1], &file[..file.len() - 9]].concat());
}

fn ledger() {
    let nonzero = |value| NonZeroU32::new(value).expect("not 0");
    let tree = Tree::over(4).expect("a power of two");
    let schedule = Schedule { seed: 5, samples: nonzero(21), batch_size: nonzero(8), tree, shuffle: true };
    let header = Header::new("test", &schedule, LayoutHash(1), Digest(9));
    let assignment = schedule.assignment();
    let mut text = serde_json::to_string(&header).expect("JSON");
    for round in 0..4 {
        let step = schedule.step(round);
        let digest = |shard: u32| {
            let order = schedule.epoch_order(step.epoch, shard);
            let places = schedule.leaf_places(step.batch, shard);
            samples_digest(places.map(|place| assignment[shard as usize][order[place as usize] as usize]))
        };
        let record = Record {
            round,
            epoch: step.epoch,
            batch: step.batch,
            samples: schedule.batch_samples(step.batch),
            loss: 0.5,
            gradient_norm: 1.0,
            parameters: Digest(3),
            skipped: round == 1,
            nodes: vec![Contribution { by: MemberId { worker: 1, incarnation: 1 }, node: tree.root() }],
            leaves: (0..4).map(digest).collect(),
            hedged: if round == 2 { vec![1, 3] } else { Vec::new() },
            checked: if round == 3 { vec![2] } else { Vec::new() },
        };
        text.push('\n');
        text.push_str(&serde_json::to_string(&record).expect("JSON"));
    }
    write("ledger", "records", [&[0], text.as_bytes()].concat());
    write("ledger", "header", [&[1], text.lines().next().unwrap_or("").as_bytes()].concat());
}

fn npy(descr: &str, shape: &str, elements: &[u8]) -> Vec<u8> {
    let mut header = format!("{{'descr': '{descr}', 'fortran_order': False, 'shape': {shape}, }}");
    let padding = 64 - (10 + header.len() + 1) % 64;
    header.push_str(&" ".repeat(padding));
    header.push('\n');
    let length = (header.len() as u16).to_le_bytes();
    [&b"\x93NUMPY\x01\x00"[..], &length, header.as_bytes(), elements].concat()
}

fn images() {
    let mut idx = vec![0, 0, 8, 3];
    [2u32, 3, 3].iter().for_each(|axis| idx.extend(axis.to_be_bytes()));
    idx.extend(0..18u8);
    write("idx", "images", &idx);
    let mut labels = vec![0, 0, 8, 1];
    labels.extend(4u32.to_be_bytes());
    labels.extend([0, 1, 2, 3]);
    write("idx", "labels", &labels);
    let mut floats = vec![0, 0, 0x0d, 2];
    [1u32, 2].iter().for_each(|axis| floats.extend(axis.to_be_bytes()));
    floats.extend([0; 8]);
    write("idx", "floats", &floats);

    let bytes = npy("|u1", "(2, 3, 3)", &[7; 18]);
    write("npy", "bytes", &bytes);
    write("npy", "floats", npy("<f4", "(1, 2)", &[0; 8]));
    write("npy", "doubles", npy(">f8", "(1, 2)", &[0; 16]));

    for (name, method) in [("stored", CompressionMethod::Stored), ("deflated", CompressionMethod::Deflated)] {
        let mut archive = ZipWriter::new(Cursor::new(Vec::new()));
        for array in ["x_train.npy", "y_train.npy"] {
            let options = SimpleFileOptions::default().compression_method(method);
            archive.start_file(array, options).expect("an entry");
            archive.write_all(&bytes).expect("its bytes");
        }
        write("npz", name, archive.finish().expect("an archive").into_inner());
    }
}

fn model_file() {
    let model = lockstep_fuzz::job().model.resolve().expect("the model is right");
    let parameters = initial_parameters(&model.layout, 1).to_vec();
    let trained = TrainedModel { model, parameters, loss: "mse".to_owned(), rounds: 3 };
    let directory = tempfile::tempdir().expect("a directory");
    let path = directory.path().join("model.safetensors");
    trained.save(&path).expect("a model");
    write("model_file", "small", fs::read(&path).expect("a model"));
}

fn config() {
    for (name, text) in PRESETS {
        write("config", &format!("model-{name}"), text);
    }
    let mut config = RunConfig { name: Some("x".to_owned()), ..RunConfig::default() };
    write("config", "run", config.to_toml().expect("TOML"));
    config.model = ModelChoice::Inline(preset("article").expect("a preset"));
    write("config", "inline", config.to_toml().expect("TOML"));
    write("config", "settings", "# --set optimizer.beta_2=0.99 --set model=dense\nseed = 3\n");
}

fn events() {
    let lines = examples(strategies::event()).into_iter().map(|event| serde_json::to_string(&event).expect("JSON"));
    for (i, line) in lines.enumerate() {
        write("events", &format!("event-{i}"), line);
    }
}
