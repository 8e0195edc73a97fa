//! Every value that is sent is the value that is received: through conversion, encoding, decoding and back.

mod strategies;

use std::sync::Arc;

use lockstep_common::kernel::Precision;
use lockstep_common::progress::{RunStatus, TimedEvent};
use lockstep_common::protocol::{
    Assignment, CHUNK_FLOATS, FromWorker, Handing, KeepList, LeafTask, MemberId, Samples, ShardRef, Split, ToWorker,
    Welcome, Work,
};
use lockstep_common::reduce::NodeId;
use lockstep_proto::convert::{
    Downward, ExchangeDown, ExchangeUp, Hello, SessionDown, SessionReader, SessionUp, ShardReader, ShardRequest,
    Upward, node_slot, parameter_slot, release_gradient, release_parameters, sample_bytes, shard_messages, workers,
};
use lockstep_proto::limits::MAX_MESSAGE_BYTES;
use lockstep_proto::{chunk, v1};
use proptest::prelude::*;
use prost::Message;
use strategies::*;

/// The message as the other side sees it.
fn carried<M: Message + Default>(message: &M) -> M {
    let bytes = message.encode_to_vec();
    assert!(bytes.len() <= MAX_MESSAGE_BYTES, "a message of {} bytes is above the limit", bytes.len());
    M::decode(&bytes[..]).unwrap()
}

fn session(message: FromWorker) -> FromWorker {
    let Upward::Session(request) = Upward::from(message) else { panic!("not a message of the session") };
    SessionUp::try_from(carried(&request)).unwrap().message().unwrap()
}

fn exchange(message: FromWorker) -> Vec<FromWorker> {
    let Upward::Exchange(requests) = Upward::from(message) else { panic!("not a message of the exchange") };
    requests.map(|request| ExchangeUp::try_from(carried(&request)).unwrap().message().unwrap()).collect()
}

/// Through a session that was opened with `welcome`; also gives the number of messages.
fn answered(welcome: &Welcome, message: ToWorker) -> (ToWorker, usize) {
    let mut reader = SessionReader::new();
    assert!(matches!(reader.read(carried(&welcome.into())), Ok(Some(SessionDown::Welcome(w))) if w == *welcome));
    let Downward::Session(responses) = Downward::from(message) else { panic!("not a message of the session") };
    let read: Vec<_> = responses.map(|response| reader.read(carried(&response)).unwrap()).collect();
    let messages = read.len();
    let mut read: Vec<SessionDown> = read.into_iter().flatten().collect();
    assert_eq!(read.len(), 1, "one message was sent");
    let Some(SessionDown::Message(message)) = read.pop() else { panic!("a welcome") };
    (message, messages)
}

/// A response of the exchange, as the worker reads it.
fn down(response: &v1::ExchangeResponse) -> ToWorker {
    match ExchangeDown::try_from(carried(response)).unwrap() {
        ExchangeDown::Message(message) => message,
        other => panic!("{other:?}"),
    }
}

fn small_welcome() -> Welcome {
    let member = MemberId { worker: 1, incarnation: 1 };
    Welcome {
        member,
        job: small_job(8, 10_000, 10_000, 28),
        heartbeat_interval: std::time::Duration::from_secs(1),
        shared_memory: None,
    }
}

fn text_of(value: &impl std::fmt::Debug) -> String {
    format!("{value:?}")
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(128))]

    #[test]
    fn joins_and_welcomes(join in join(), welcome in welcome()) {
        let request = carried(&v1::SessionRequest::from(join.clone()));
        prop_assert_eq!(SessionUp::try_from(request).unwrap().join().unwrap(), join);
        let response = carried(&v1::SessionResponse::from(&welcome));
        let read = SessionReader::new().read(response).unwrap();
        prop_assert!(matches!(read, Some(SessionDown::Welcome(read)) if read == welcome));
    }

    #[test]
    fn session_messages(message in session_message(), answer in session_answer()) {
        prop_assert_eq!(text_of(&session(message.clone())), text_of(&message));
        prop_assert_eq!(text_of(&answered(&small_welcome(), answer.clone()).0), text_of(&answer));
    }

    #[test]
    fn assignments(assignment in assignment(8, 2, 784)) {
        let (read, messages) = answered(&small_welcome(), ToWorker::Assign(assignment.clone()));
        prop_assert!(matches!(read, ToWorker::Assign(read) if read == assignment));
        prop_assert_eq!(messages, 1);
    }

    #[test]
    fn exchange_messages(member in member(), shares_memory: bool, slot: u32, chunk in node_chunk(), report in node_report()) {
        let hello = Hello { member, shares_memory };
        let read = ExchangeUp::try_from(carried(&v1::ExchangeRequest::from(hello))).unwrap();
        prop_assert_eq!(read.hello().unwrap(), hello);
        let read = ExchangeUp::try_from(carried(&node_slot(report.work.version(), report.node, slot))).unwrap();
        let expected = ExchangeUp::NodeSlot { round: report.work.version(), node: report.node, slot };
        prop_assert_eq!(format!("{read:?}"), format!("{expected:?}"));
        let read = ExchangeUp::try_from(carried(&release_parameters(slot))).unwrap();
        prop_assert!(matches!(read, ExchangeUp::Release(read) if read == slot));
        prop_assert!(read.message().is_err(), "memory that is not shared");
        let [FromWorker::NodeChunk(read)] = &exchange(FromWorker::NodeChunk(chunk.clone()))[..] else { panic!() };
        let bits = |floats: &[f32]| floats.iter().map(|float| float.to_bits()).collect::<Vec<u32>>();
        prop_assert_eq!((read.round, read.node, read.chunk), (chunk.round, chunk.node, chunk.chunk));
        prop_assert_eq!(bits(&read.data), bits(&chunk.data), "bits travel, NaNs' too");
        prop_assert_eq!(
            text_of(&exchange(FromWorker::Announce(report.clone()))), text_of(&[FromWorker::Announce(report)])
        );
    }

    #[test]
    fn what_is_computed(computed in computed()) {
        prop_assert_eq!(text_of(&exchange(computed.clone())), text_of(&[computed]));
    }

    #[test]
    fn parameter_chunks(version: u64, chunk: u32, floats in floats(), halved: bool) {
        let precision = if halved { Precision::Bf16 } else { Precision::F32 };
        let data = if halved { chunk::to_halves(&floats) } else { chunk::to_bytes(&floats) };
        let message = ToWorker::ParameterChunk { version, chunk, data, precision };
        let Downward::Exchange(responses) = Downward::from(message.clone()) else { panic!() };
        let read: Vec<ToWorker> = responses.map(|response| down(&response)).collect();
        prop_assert_eq!(text_of(&read), text_of(&[message]));
        let slot = ExchangeDown::try_from(carried(&parameter_slot(version, chunk))).unwrap();
        let expected = ExchangeDown::ParameterSlot { version, slot: chunk };
        prop_assert_eq!(format!("{slot:?}"), format!("{expected:?}"));
        let release = ExchangeDown::try_from(carried(&release_gradient(chunk))).unwrap();
        prop_assert!(matches!(release, ExchangeDown::Release(slot) if slot == chunk));
    }

    #[test]
    fn shards(shard in 0u32..8, validation: bool, side in 1usize..60, total in 1u32..4000, part in 1usize..700) {
        let job = small_job(8, total, 16, side);
        let split = if validation { Split::Validation } else { Split::Training };
        let shard = ShardRef { split, shard };
        let count = match split {
            Split::Training => job.schedule.shard_samples(shard.shard),
            Split::Validation => lockstep_common::shard::even_part(total, 8, shard.shard).len() as u32,
        };
        let samples = samples(0, count, sample_bytes(&job));
        let of_part = |start: usize| {
            let range = start..samples.ids.len().min(start + part);
            let data = samples.data[range.start * sample_bytes(&job)..range.end * sample_bytes(&job)].to_vec();
            Samples { ids: samples.ids[range].to_vec(), data }
        };
        let parts: Vec<Samples> = (0..samples.ids.len()).step_by(part).map(of_part).collect();
        let mut reader = ShardReader::new(&job, shard).unwrap();
        let mut whole = None;
        for message in shard_messages(&job, count, parts.into_iter()) {
            prop_assert!(whole.is_none(), "nothing follows the last message");
            whole = reader.read(carried(&message)).unwrap();
        }
        prop_assert_eq!(whole.unwrap(), samples);
    }

    #[test]
    fn shard_requests(member in member(), shard in shard_of(1 << 16)) {
        let request = ShardRequest { member, shard };
        prop_assert_eq!(ShardRequest::try_from(carried(&v1::FetchShardRequest::from(request))).unwrap(), request);
    }

    #[test]
    fn what_monitors_see(event in event(), status in run_status(), members in proptest::collection::vec(worker_status(), 0..4)) {
        let read: TimedEvent = carried(&v1::WatchResponse::from(&event)).try_into().unwrap();
        prop_assert_eq!(text_of(&read), text_of(&event));
        let read: RunStatus = carried(&v1::GetRunResponse::from(&status)).try_into().unwrap();
        prop_assert_eq!(text_of(&read), text_of(&status));
        prop_assert_eq!(workers(carried(&v1::ListWorkersResponse::from(&members[..]))).unwrap(), members);
    }
}

/// As with fewer validation samples than shards.
#[test]
fn an_empty_shard_is_one_message() {
    let job = small_job(8, 3, 3, 28);
    let shard = ShardRef { split: Split::Training, shard: 7 };
    assert_eq!(job.schedule.shard_samples(shard.shard), 0);
    let messages: Vec<_> = shard_messages(&job, 0, std::iter::empty()).collect();
    assert_eq!(messages.len(), 1);
    let samples = ShardReader::new(&job, shard).unwrap().read(carried(&messages[0])).unwrap();
    assert_eq!(samples, Some(Samples { ids: Vec::new(), data: Vec::new() }));
}

#[test]
fn a_large_assignment_comes_in_pieces_and_arrives_whole() {
    let mut welcome = small_welcome();
    // Samples of 3 MB do not fit a message; 700,000 samples of one byte have more ids than fit one.
    for (side, per_leaf) in [(28, 1200), (1750, 2), (1, 700_000)] {
        welcome.job = small_job(8, 8_000_000, 8_000_000, side);
        let leaf = |leaf| {
            let inline = (leaf != 3).then(|| Arc::new(samples(leaf * per_leaf, per_leaf, side * side)));
            LeafTask { leaf, inline, handing: Handing::Alone }
        };
        let assignment = Assignment { work: Work::Gradient { round: 3 }, leaves: (0..5).map(leaf).collect() };
        let (read, messages) = answered(&welcome, ToWorker::Assign(assignment.clone()));
        assert!(messages > 3, "{messages} messages");
        assert!(matches!(read, ToWorker::Assign(read) if read == assignment));
    }
}

#[test]
fn the_largest_messages_of_the_largest_run_are_within_the_limit() {
    let mut welcome = small_welcome();
    welcome.job = small_job(1 << 16, 1 << 20, 1 << 20, 2);
    let all = |split| (0..1 << 16).map(move |shard| ShardRef { split, shard });
    let keep = KeepList { list: u32::MAX, shards: all(Split::Training).chain(all(Split::Validation)).collect() };
    let (read, _) = answered(&welcome, ToWorker::Keep(keep.clone()));
    assert!(matches!(read, ToWorker::Keep(read) if read == keep));

    let leaves = |inline: Option<Arc<_>>| {
        (0..1 << 16).map(move |leaf| LeafTask { leaf, inline: inline.clone(), handing: Handing::Compared })
    };
    for (inline, pieces) in [(None, 3), (Some(Arc::new(samples(5, 1, 4))), 4)] {
        let assignment = Assignment { work: Work::Evaluation { round: u64::MAX }, leaves: leaves(inline).collect() };
        let (read, messages) = answered(&welcome, ToWorker::Assign(assignment.clone()));
        assert!(messages <= pieces, "{messages} messages");
        assert!(matches!(read, ToWorker::Assign(read) if read == assignment));
    }

    let node = NodeId { level: 16, index: 0 };
    let report = lockstep_common::protocol::NodeReport {
        work: Work::Gradient { round: u64::MAX },
        node,
        loss: 1.0,
        samples: u32::MAX,
        digests: vec![lockstep_common::hash::Digest(u128::MAX); 1 << 16],
        compute: Some(std::time::Duration::MAX),
        waited: std::time::Duration::from_micros(7),
        gradient: Some(lockstep_common::hash::Digest(3)),
        finding: None,
    };
    let [FromWorker::Announce(read)] = &exchange(FromWorker::Announce(report.clone()))[..] else { panic!() };
    assert_eq!(read.digests, report.digests);
    assert_eq!(read.waited, report.waited);
    assert_eq!(read.compute.map(|compute| compute.as_micros()), Some(u128::from(u64::MAX)), "saturates");
}

#[test]
fn gradients_of_bfloat16_numbers_travel_in_half_the_bytes() {
    let values: Vec<f32> =
        (0..CHUNK_FLOATS + 3).map(|i| lockstep_common::kernel::bf16::round(i as f32 - 0.1)).collect();
    let (node, gradient) = (NodeId { level: 1, index: 2 }, Arc::new(values.clone().into()));
    let message = FromWorker::NodePart { round: 4, node, chunk: 0, gradient, precision: Precision::Bf16 };
    let Upward::Exchange(requests) = Upward::from(message) else { panic!() };
    let (mut bytes, mut read) = (0, vec![0.0; values.len()]);
    for request in requests {
        bytes += request.encoded_len();
        let FromWorker::NodeChunk(chunk) = ExchangeUp::try_from(carried(&request)).unwrap().message().unwrap() else {
            panic!()
        };
        read[chunk.chunk as usize * CHUNK_FLOATS..][..chunk.data.len()].copy_from_slice(&chunk.data);
    }
    assert_eq!(read, values);
    assert!(bytes < 2 * values.len() + 200, "{bytes} bytes for {} floats", values.len());
}

#[test]
fn whole_vectors_travel_in_chunks_of_a_mebibyte() {
    let floats = 2 * CHUNK_FLOATS + 3;
    let values = Arc::new((0..floats).map(|i| i as f32).collect::<Vec<f32>>().into());
    let node = NodeId { level: 1, index: 2 };
    let (gradient, precision) = (Arc::clone(&values), Precision::F32);
    let chunks = exchange(FromWorker::NodePart { round: 4, node, chunk: 3, gradient, precision });
    let order: Vec<u32> = chunks
        .iter()
        .map(|message| match message {
            FromWorker::NodeChunk(chunk) => {
                assert_eq!(chunk.data[..], values[(chunk.chunk - 3) as usize * CHUNK_FLOATS..][..chunk.data.len()]);
                chunk.chunk
            }
            other => panic!("{other:?}"),
        })
        .collect();
    assert_eq!(order, [5, 4, 3], "the last layers first");

    let Downward::Exchange(responses) =
        Downward::from(ToWorker::Parameters { version: 9, values: Arc::clone(&values), precision: Precision::F32 })
    else {
        panic!()
    };
    let mut received = vec![0.0; floats];
    for response in responses {
        let ToWorker::ParameterChunk { version: 9, chunk, data, .. } = down(&response) else { panic!() };
        chunk::copy_into(&data, Precision::F32, received.chunks_mut(CHUNK_FLOATS).nth(chunk as usize).unwrap())
            .unwrap();
    }
    assert_eq!(received, **values);
}

#[test]
fn a_negative_zero_stays_one() {
    let report = lockstep_common::protocol::NodeReport {
        work: Work::Gradient { round: 0 },
        node: NodeId::leaf(0),
        loss: -0.0,
        samples: 0,
        digests: vec![lockstep_common::hash::Digest(0)],
        compute: None,
        waited: std::time::Duration::ZERO,
        gradient: None,
        finding: None,
    };
    let [FromWorker::Announce(read)] = &exchange(FromWorker::Announce(report))[..] else { panic!() };
    assert_eq!(read.loss.to_bits(), (-0.0f64).to_bits());
}

#[test]
fn texts_are_cut_when_sent_and_tamed_when_received() {
    let FromWorker::Failed { reason } = session(FromWorker::Failed { reason: "ä".repeat(20_000) }) else { panic!() };
    assert_eq!(reason, "ä".repeat(8192));
    let FromWorker::Failed { reason } = session(FromWorker::Failed { reason: "a\u{1b}[2Jb\n".into() }) else {
        panic!()
    };
    assert_eq!(reason, "a\u{fffd}[2Jb\n", "a peer must not drive the terminal");
}
