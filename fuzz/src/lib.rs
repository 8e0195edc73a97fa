//! What is fuzzed: every decoder that reads what a peer has sent or what lies in a file. Whatever the bytes are, it must end
//! in a value or in an error, and take no memory that the bytes do not pay for.
//!
//! Decoders behind a checksum are given content whose checksum is right, too: an attacker can compute it.

use std::io::Cursor;
use std::num::NonZeroU32;
use std::path::Path;
use std::time::Duration;

use bytes::Bytes;
use lockstep_common::checkpoint::format;
use lockstep_common::config::{DataFacts, RunConfig};
use lockstep_common::data::{DataError, Dataset, Dtype, idx, npy, npz};
use lockstep_common::hash::{Digest, DigestBuilder};
use lockstep_common::kernel::{Compute, Isa, Precision};
use lockstep_common::ledger;
use lockstep_common::model::ModelSpec;
use lockstep_common::model_file::TrainedModel;
use lockstep_common::nn::Loss;
use lockstep_common::progress::{RunStatus, TimedEvent};
use lockstep_common::protocol::{Job, MemberId, ShardRef, Split, Welcome};
use lockstep_common::reduce::Tree;
use lockstep_common::shape::Shape;
use lockstep_common::shard::Schedule;
use lockstep_proto::convert::{
    ExchangeDown, ExchangeUp, SessionReader, SessionUp, ShardReader, ShardRequest, Upward, workers,
};
use lockstep_proto::status::{self, Refusal};
use lockstep_proto::v1;
use lockstep_worker::engine::{Command, Engine, Handover, NewestWork};
use lockstep_worker::shard_cache::ShardCache;
use prost::Message;

/// What a worker, or somebody who says to be one, may send to a coordinator.
pub fn wire_up(data: &[u8]) {
    let _ = v1::FetchShardRequest::decode(data).map(ShardRequest::try_from);
    let _ = v1::WatchRequest::decode(data);
    if let Ok(request) = v1::SessionRequest::decode(data)
        && let Ok(request) = SessionUp::try_from(request)
    {
        let _ = request.clone().join();
        let _ = request.message();
    }
    if let Ok(request) = v1::ExchangeRequest::decode(data)
        && let Ok(ExchangeUp::Message(message)) = ExchangeUp::try_from(request)
    {
        // What was understood can be said again, and means the same.
        let Upward::Exchange(again) = Upward::from(message) else {
            panic!("an exchange's message is one of the exchange")
        };
        for request in again {
            ExchangeUp::try_from(request).expect("what was understood can be sent");
        }
    }
}

/// What a coordinator, or somebody who says to be one, may send to a worker or a monitor: streams of messages. Each is two
/// bytes of length, a byte that says which stream it belongs to, and the message.
pub fn wire_down(data: &[u8]) {
    let mut fresh = SessionReader::new();
    let mut admitted = admitted();
    let job = job();
    let shard = ShardRef { split: Split::Training, shard: 1 };
    let mut reader = ShardReader::new(&job, shard).expect("the shard exists");
    for (stream, message) in frames(data) {
        match stream % 8 {
            0 => drop(v1::SessionResponse::decode(message).map(|response| fresh.read(response))),
            1 => drop(v1::SessionResponse::decode(message).map(|response| admitted.read(response))),
            2 => drop(v1::FetchShardResponse::decode(message).map(|response| reader.read(response))),
            3 => drop(v1::ExchangeResponse::decode(message).map(ExchangeDown::try_from)),
            4 => drop(v1::WatchResponse::decode(message).map(TimedEvent::try_from)),
            5 => drop(v1::GetRunResponse::decode(message).map(RunStatus::try_from)),
            6 => drop(v1::ListWorkersResponse::decode(message).map(workers)),
            _ => {
                let status = tonic::Status::with_details(tonic::Code::Unknown, "", message.to_vec().into());
                let _ = Refusal::of(&status);
                let _ = status::describe(&status);
            }
        }
    }
}

/// Parts of parameters, put together by a worker: in any order, of any version, of any length.
pub fn chunks(data: &[u8]) {
    let newest = NewestWork::default();
    let engine = Engine::new(job(), Isa::SCALAR, 1, ShardCache::default(), Handover::Sent, newest);
    let mut engine = engine.expect("the job's layout is the model's");
    for (version, message) in frames(data) {
        let (chunk, floats) = message.split_at(message.len().min(1));
        let chunk = chunk.first().map_or(0, |&chunk| u32::from(chunk));
        let (precision, bytes) = if chunk & 0x40 != 0 { (Precision::Bf16, 2) } else { (Precision::F32, 4) };
        // A chunk of the right length now and then: a whole version must come of it.
        let mut floats = floats.to_vec();
        if chunk & 0x80 != 0 {
            floats.resize(engine_floats() * bytes, 0);
        }
        let data = Bytes::from(floats);
        let command = Command::Chunk { version: version.into(), chunk: chunk & 0x3f, data, precision };
        engine.handle(command, &|_| {});
    }
}

/// A checkpoint: as it is; or, if the first byte is even, its state behind right checksums, and a few parameters.
pub fn checkpoint(data: &[u8]) {
    let Some((kind, content)) = data.split_first() else { return };
    let file = if kind % 2 == 1 { content.to_vec() } else { sealed(content) };
    let _ = format::read(&file[..], file.len() as u64);
}

/// A checkpoint of two parameters with this state.
fn sealed(state: &[u8]) -> Vec<u8> {
    let mut file = b"lockstp\n".to_vec();
    file.extend(2u32.to_le_bytes());
    file.extend((state.len() as u32).to_le_bytes());
    file.extend(2u64.to_le_bytes());
    file.extend(Digest::of(&file).0.to_le_bytes());
    let start = file.len();
    file.extend(state);
    file.extend([0; 2 * 3 * 4]);
    file.extend(Digest::of(&file[start..]).0.to_le_bytes());
    file
}

/// Samples that an audit takes memory for, some bytes each.
const MOST_LEDGER_SAMPLES: u32 = 1 << 16;

/// A ledger: as it is; or, if the first byte is even, with its records chained.
pub fn ledger(data: &[u8]) {
    let Some((kind, content)) = data.split_first() else { return };
    let Ok(text) = std::str::from_utf8(content) else { return };
    let text = if kind % 2 == 1 { text.to_owned() } else { chained(text) };
    let _ = ledger::audit(text.as_bytes(), MOST_LEDGER_SAMPLES);
    for line in text.lines() {
        let _ = ledger::chain_after(line, true);
        let _ = ledger::chain_after(line, false);
    }
}

/// Lines of records behind right chain digests.
fn chained(records: &str) -> String {
    let mut lines = records.lines();
    let mut text = lines.next().unwrap_or("").to_owned();
    let mut last = Digest::of(text.as_bytes());
    for record in lines {
        let mut digest = DigestBuilder::default();
        digest.bytes(&last.0.to_le_bytes());
        digest.bytes(record.as_bytes());
        last = digest.finish();
        text.push_str(&format!("\n{{\"chain\":\"{last}\",\"record\":{record}}}"));
    }
    text
}

fn check_samples(read: Result<Dataset, DataError>) {
    if let Ok(dataset) = read {
        let mut sample = vec![0.0; dataset.sample_elements()];
        for index in [0, dataset.len() - 1] {
            dataset.sample(index).write_f32(&mut sample);
        }
    }
}

/// An IDX file of images or of labels.
pub fn idx(data: &[u8]) {
    check_samples(idx::read("fuzz", data));
    let _ = idx::read_labels("fuzz", data);
}

/// An NPY file.
pub fn npy(data: &[u8]) {
    check_samples(npy::read("fuzz", data));
}

/// An NPZ file.
pub fn npz(data: &[u8]) {
    check_samples(npz::read("fuzz", Cursor::new(data)));
}

/// A `model.safetensors`, also as weights to start from.
pub fn model_file(data: &[u8]) {
    let path = Path::new("fuzz.safetensors");
    if let Ok(trained) = TrainedModel::parse(path, data) {
        assert_eq!(trained.parameters.len(), trained.model.layout.parameters());
    }
}

/// A run's configuration (`run.toml`), or a model's file.
pub fn config(data: &[u8]) {
    let Ok(text) = std::str::from_utf8(data) else { return };
    if let Ok(spec) = ModelSpec::from_toml(text) {
        check_model(&spec);
    }
    if let Ok(config) = RunConfig::parse("fuzz", text, &[]) {
        // NaN differs from itself, and TOML has no numbers above 63 bits.
        if let Ok(written) = config.to_toml() {
            let again = RunConfig::parse("fuzz", &written, &[]).expect("what was written can be read");
            assert_eq!(again.to_toml().ok(), Some(written));
        }
        if let Ok(spec) = config.model_spec(|_| Err(std::io::ErrorKind::NotFound.into())) {
            let facts = DataFacts {
                name: "fuzz".to_owned(),
                sample_shape: spec.input.clone(),
                dtype: Dtype::U8,
                training_samples: 1000,
                validation_samples: 10,
            };
            if let Ok(run) = config.resolve(spec, &facts) {
                assert!(run.total_rounds() > 0);
            }
        }
    }
    let mut lines = text.lines();
    if let Some(settings) = lines.next().and_then(|line| line.strip_prefix("# --set ")) {
        let settings: Vec<String> = settings.split(" --set ").map(str::to_owned).collect();
        let rest: Vec<&str> = lines.collect();
        let _ = RunConfig::parse("fuzz", &rest.join("\n"), &settings);
    }
}

fn check_model(spec: &ModelSpec) {
    if let Ok(model) = spec.resolve() {
        // The parameters' number is part of every size that is checked against it.
        let total: usize = model.layout.entries().iter().map(|entry| entry.range.len()).sum();
        assert_eq!(total, model.layout.parameters());
    }
}

/// Lines of `events.jsonl`, as they are read again for watchers.
pub fn events(data: &[u8]) {
    for line in data.split(|&byte| byte == b'\n') {
        if let Ok(event) = serde_json::from_slice::<TimedEvent>(line) {
            let sent = v1::WatchResponse::from(&event);
            let bytes = sent.encode_to_vec();
            let received = v1::WatchResponse::decode(&bytes[..]).expect("what was encoded can be decoded");
            TimedEvent::try_from(received).expect("what a coordinator sends can be understood");
        }
    }
}

/// Pieces of the input: two bytes of length, a byte of meaning, and so many bytes, or what is left.
fn frames(mut data: &[u8]) -> impl Iterator<Item = (u8, &[u8])> {
    std::iter::from_fn(move || {
        let (&[low, high, meaning], rest) = data.split_first_chunk()?;
        let (frame, rest) = rest.split_at(rest.len().min(usize::from(u16::from_le_bytes([low, high]))));
        data = rest;
        Some((meaning, frame))
    })
}

/// The model of all streams here.
const MODEL: &str = "name = \"m\"\ninput = [9]\nencoder = [{ layer = \"dense\", units = 2 }]\ndecoder = [{ layer = \"dense\", units = 9 }]\n";

fn engine_floats() -> usize {
    9 * 2 + 2 + 2 * 9 + 9
}

/// A small job.
pub fn job() -> Job {
    let model = ModelSpec::from_toml(MODEL).expect("the model is right");
    let layout = model.resolve().expect("the model is right").layout.hash();
    let nonzero = |value| NonZeroU32::new(value).expect("not 0");
    Job {
        run: "r".to_owned(),
        model,
        layout,
        loss: Loss::Mse,
        schedule: Schedule {
            seed: 1,
            samples: nonzero(9),
            batch_size: nonzero(4),
            tree: Tree::over(4).expect("a power of two"),
            shuffle: true,
        },
        validation_samples: 9,
        sample_shape: Shape::new([3, 3]),
        dtype: Dtype::U8,
        compute: Compute::Bf16,
        wire: Precision::Bf16,
    }
}

/// A worker that has been welcomed.
fn admitted() -> SessionReader {
    let welcome = Welcome {
        member: MemberId { worker: 1, incarnation: 1 },
        job: job(),
        heartbeat_interval: Duration::from_secs(1),
        shared_memory: None,
    };
    let mut reader = SessionReader::new();
    reader.read((&welcome).into()).expect("a welcome comes first");
    reader
}
