//! What is wrong with a message is said with its place and its numbers: "Assign.leaves[1].leaf: 70000 is above 7".

mod strategies;

use bytes::Bytes;
use lockstep_common::progress::{RunStatus, TimedEvent};
use lockstep_common::protocol::{Job, MemberId, ShardRef, Split, Welcome};
use lockstep_proto::convert::{ExchangeDown, ExchangeUp, SessionReader, SessionUp, ShardReader, ShardRequest};
use lockstep_proto::{WireError, chunk, v1};
use strategies::{samples, small_job};
use v1::{exchange_request, layer, session_request, session_response};

/// The error's text, which must be exactly this.
fn check<T: std::fmt::Debug>(result: Result<T, WireError>, expected: &str) {
    assert_eq!(result.unwrap_err().to_string(), expected);
}

fn up(message: session_request::Message) -> Result<SessionUp, WireError> {
    v1::SessionRequest { message: Some(message) }.try_into()
}

fn exchange(message: exchange_request::Message) -> Result<ExchangeUp, WireError> {
    v1::ExchangeRequest { message: Some(message) }.try_into()
}

fn welcome() -> Welcome {
    let member = MemberId { worker: 1, incarnation: 1 };
    Welcome {
        member,
        job: small_job(8, 100, 16, 2),
        heartbeat_interval: std::time::Duration::from_secs(1),
        shared_memory: None,
    }
}

fn admitted() -> SessionReader {
    let mut reader = SessionReader::new();
    reader.read((&welcome()).into()).unwrap();
    reader
}

fn down(message: session_response::Message) -> v1::SessionResponse {
    v1::SessionResponse { message: Some(message) }
}

fn join() -> v1::Join {
    let digest = Bytes::from_static(&[7; 16]);
    let [fingerprint, bf16_fingerprint, bf16_amx_fingerprint] = [digest.clone(), digest.clone(), digest];
    v1::Join { fingerprint, bf16_fingerprint, bf16_amx_fingerprint, threads: 2, ..Default::default() }
}

#[test]
fn joins() {
    use session_request::Message::{Cached, Failed, Heartbeat, Join};
    check(SessionUp::try_from(v1::SessionRequest { message: None }), "SessionRequest.message: is missing");
    check(
        up(Join(v1::Join { fingerprint: Bytes::from_static(&[0; 15]), ..join() })),
        "Join.fingerprint: a digest has 16 bytes, not 15",
    );
    check(
        up(Join(v1::Join { bf16_fingerprint: Bytes::new(), ..join() })),
        "Join.bf16_fingerprint: a digest has 16 bytes, not 0",
    );
    check(
        up(Join(v1::Join { bf16_amx_fingerprint: Bytes::new(), ..join() })),
        "Join.bf16_amx_fingerprint: a digest has 16 bytes, not 0",
    );
    check(up(Join(v1::Join { threads: 0, ..join() })), "Join.threads: is 0, but must be at least 1");
    check(up(Join(v1::Join { name: "x".repeat(16_385), ..join() })), "Join.name: 16385 is above 16384 bytes");
    check(up(Failed(v1::Failed { reason: "x".repeat(16_385) })), "Failed.reason: 16385 is above 16384 bytes");
    check(up(Cached(v1::Cached { list: 1, shard: None })), "Cached.shard: is missing");
    let shard = |split, shard| Some(v1::ShardRef { split, shard });
    check(up(Cached(v1::Cached { list: 1, shard: shard(0, 1) })), "Cached.shard.split: 0 is no Split");
    check(up(Cached(v1::Cached { list: 1, shard: shard(3, 1) })), "Cached.shard.split: 3 is no Split");
    check(up(Cached(v1::Cached { list: 1, shard: shard(1, 65_536) })), "Cached.shard.shard: 65536 is above 65535");
    check(up(Cached(v1::Cached { list: 0, shard: shard(1, 1) })), "Cached.list: is 0, but must be at least 1");
    check(
        up(Heartbeat(v1::Heartbeat {})).unwrap().join(),
        "SessionRequest.message: expected a join, but another message came",
    );
    check(
        up(Join(join())).unwrap().message(),
        "SessionRequest.message: expected a member's message, but a second join came",
    );
}

#[test]
fn jobs() {
    fn job(change: impl FnOnce(&mut v1::Job)) -> Result<Job, WireError> {
        let mut job = v1::Job::from(&welcome().job);
        change(&mut job);
        job.try_into()
    }
    fn schedule(change: impl FnOnce(&mut v1::Schedule)) -> Result<Job, WireError> {
        job(|job| change(job.schedule.as_mut().unwrap()))
    }
    fn encoder(kind: Option<layer::Kind>) -> Result<Job, WireError> {
        let flatten = v1::Layer { kind: Some(layer::Kind::Flatten(v1::FlattenLayer {})) };
        job(|job| job.model.as_mut().unwrap().encoder = vec![flatten, v1::Layer { kind }])
    }
    check(schedule(|s| s.shards = 12), "Job.schedule.shards: 12 is no power of two from 1 to 65536");
    check(schedule(|s| s.shards = 0), "Job.schedule.shards: 0 is no power of two from 1 to 65536");
    check(schedule(|s| s.shards = 1 << 17), "Job.schedule.shards: 131072 is no power of two from 1 to 65536");
    check(schedule(|s| s.samples = 0), "Job.schedule.samples: is 0, but must be at least 1");
    check(schedule(|s| s.batch_size = 0), "Job.schedule.batch_size: is 0, but must be at least 1");
    check(job(|job| job.schedule = None), "Job.schedule: is missing");
    check(job(|job| job.model = None), "Job.model: is missing");
    check(job(|job| job.loss = 9), "Job.loss: 9 is no Loss");
    check(job(|job| job.dtype = 0), "Job.dtype: 0 is no Dtype");
    check(job(|job| job.sample_shape = None), "Job.sample_shape: is missing");
    let shape = |axes: &[u64]| Some(v1::Shape { axes: axes.to_vec() });
    check(job(|job| job.sample_shape = shape(&[2, 0])), "Job.sample_shape.axes[1]: is 0, but must be at least 1");
    check(job(|job| job.sample_shape = shape(&[1; 9])), "Job.sample_shape.axes: 9 is above 8 axes");
    check(
        job(|job| job.sample_shape = shape(&[1 << 20, 1 << 20])),
        "Job.sample_shape: 1099511627776 is above 268435456 elements",
    );
    check(
        job(|job| job.sample_shape = shape(&[1 << 40, 1 << 40])),
        "Job.sample_shape: 18446744073709551615 is above 268435456 elements",
    );
    check(
        job(|job| job.model.as_mut().unwrap().decoder = vec![v1::Layer { kind: None }; 4097]),
        "Job.model.decoder: 4097 is above 4096 layers",
    );
    check(encoder(None), "Job.model.encoder[1].kind: is missing");
    let pair = Some(v1::Pair { rows: 1, columns: 1 });
    let conv =
        v1::ConvLayer { filters: 1, kernel_size: pair, strides: pair, padding: 1, activation: 1, use_bias: true };
    check(
        encoder(Some(layer::Kind::Conv2d(v1::ConvLayer { strides: None, ..conv }))),
        "Job.model.encoder[1].conv2d.strides: is missing",
    );
    check(
        encoder(Some(layer::Kind::Conv2dTranspose(v1::ConvLayer { padding: 3, ..conv }))),
        "Job.model.encoder[1].conv2d_transpose.padding: 3 is no Padding",
    );
    check(
        encoder(Some(layer::Kind::MaxPool2d(v1::PoolLayer { pool_size: None, strides: None, padding: 1 }))),
        "Job.model.encoder[1].max_pool2d.pool_size: is missing",
    );
    check(
        encoder(Some(layer::Kind::Dense(v1::DenseLayer { units: 1, activation: 16, use_bias: true }))),
        "Job.model.encoder[1].dense.activation: 16 is no Activation",
    );
    check(
        encoder(Some(layer::Kind::Reshape(v1::ReshapeLayer { target_shape: shape(&[0]) }))),
        "Job.model.encoder[1].reshape.target_shape.axes[0]: is 0, but must be at least 1",
    );
    let mut wire = v1::Welcome::from(&welcome());
    wire.heartbeat_interval_micros = 0;
    check(Welcome::try_from(wire), "Welcome.heartbeat_interval_micros: is 0, but must be at least 1");
}

#[test]
#[cfg(target_pointer_width = "32")]
fn sizes_that_do_not_fit_the_machine() {
    let pair = v1::Pair { rows: 1 << 32, columns: 1 };
    check(lockstep_common::model::Pair::try_from(pair), "Pair.rows: 4294967296 is above 4294967295");
}

#[test]
fn sessions() {
    use session_response::Message::{Assign, Keep, Welcome as Admit};
    check(
        SessionReader::new().read(down(Keep(v1::Keep { list: 1, shards: vec![] }))),
        "SessionResponse.message: expected a welcome, but shards to keep came",
    );
    check(
        SessionReader::new().read(down(Assign(v1::Assign::default()))),
        "SessionResponse.message: expected a welcome, but an assignment came",
    );
    check(
        admitted().read(down(Admit((&welcome()).into()))),
        "SessionResponse.message: expected a member's message, but a second welcome came",
    );
    let shard = |shard| v1::ShardRef { split: 2, shard };
    check(
        admitted().read(down(Keep(v1::Keep { list: 1, shards: vec![shard(7), shard(8)] }))),
        "Keep.shards[1].shard: 8 is above 7",
    );
}

#[test]
fn assignments() {
    fn read(pieces: &[v1::Assign]) -> Result<(), WireError> {
        let mut reader = admitted();
        let mut read = |piece: &v1::Assign| reader.read(down(session_response::Message::Assign(piece.clone())));
        pieces.iter().try_for_each(|piece| read(piece).map(|_| ()))
    }
    let piece = |ids: &[u32], data: &[u8]| {
        let checksum = chunk::samples_checksum(ids, data);
        Some(v1::SamplePiece { ids: ids.to_vec(), data: Bytes::copy_from_slice(data), checksum })
    };
    let cached = |leaf| v1::LeafTask { leaf, inline: None, more: false, handing: v1::Handing::Summed.into() };
    let inline = |leaf, ids: &[u32], data: &[u8]| v1::LeafTask {
        leaf,
        inline: piece(ids, data),
        more: false,
        handing: v1::Handing::Summed.into(),
    };
    let more = |leaf, ids: &[u32], data: &[u8]| v1::LeafTask {
        leaf,
        inline: piece(ids, data),
        more: true,
        handing: v1::Handing::Summed.into(),
    };
    let work = Some(v1::Work { kind: 1, round: 5 });
    let part = |leaves| v1::Assign { work, leaves, last: false };
    let whole = |leaves| v1::Assign { work, leaves, last: true };

    read(&[whole(vec![cached(0), inline(3, &[4], &[0; 4]), inline(7, &[], &[])])]).unwrap();
    read(&[part(vec![more(3, &[4], &[0; 2])]), whole(vec![inline(3, &[], &[0; 2])])]).unwrap();
    check(read(&[v1::Assign::default()]), "Assign.work: is missing");
    let work_of_kind = |kind| v1::Assign { work: Some(v1::Work { kind, round: 0 }), ..Default::default() };
    check(read(&[work_of_kind(0)]), "Assign.work.kind: 0 is no WorkKind");
    check(read(&[whole(vec![cached(1), cached(8)])]), "Assign.leaves[1].leaf: 8 is above 7");
    for value in [3, 2] {
        let expected = format!("Assign.leaves[1].leaf: {value} follows 3, but the list must ascend");
        check(read(&[whole(vec![cached(3), cached(value)])]), &expected);
        check(read(&[part(vec![cached(0), cached(3)]), whole(vec![cached(value)])]), &expected.replace("[1]", "[0]"));
    }
    let mut damaged = inline(3, &[4], &[0; 4]);
    let computed = damaged.inline.as_ref().unwrap().checksum;
    damaged.inline.as_mut().unwrap().checksum = 10;
    check(
        read(&[whole(vec![damaged])]),
        &format!(
            "Assign.leaves[0].inline.checksum: the checksum of the data is {computed:016x}, but 000000000000000a was announced"
        ),
    );
    check(read(&[whole(vec![inline(3, &[100], &[0; 4])])]), "Assign.leaves[0].inline.ids[0]: 100 is above 99");
    check(
        read(&[whole(vec![inline(3, &[1], &[0; 5])])]),
        "Assign.leaves[0].inline.data: there are 5 bytes, but 4 were expected",
    );
    // The batch has 16 samples of 4 bytes, over all leaves.
    let ids: Vec<u32> = (0..17).collect();
    check(read(&[whole(vec![inline(3, &ids, &[0; 68])])]), "Assign.leaves[0].inline.ids: 17 is above 16 samples");
    check(
        read(&[whole(vec![inline(3, &ids[..9], &[0; 36]), inline(4, &ids[..9], &[0; 36])])]),
        "Assign.leaves[1].inline.ids: 9 is above 7 samples",
    );
    check(
        read(&[part(vec![more(3, &[], &[0; 40])]), part(vec![more(3, &[], &[0; 40])])]),
        "Assign.leaves[0].inline.data: 80 is above 64 bytes of samples",
    );
    check(
        read(&[whole(vec![inline(3, &[], &vec![0; (1 << 20) + 1])])]),
        "Assign.leaves[0].inline.data: 1048577 is above 1048576 bytes",
    );
    check(
        read(&[part(vec![more(3, &[1], &[0; 2])]), whole(vec![cached(4)])]),
        "Assign.leaves[0].leaf: expected the leaf's other samples, but another leaf came",
    );
    check(read(&[part(vec![more(3, &[1], &[0; 2])]), whole(vec![cached(3)])]), "Assign.leaves[0].inline: is missing");
    check(read(&[whole(vec![more(3, &[1], &[0; 2])])]), "Assign.last: expected more samples, but the end came");
    let other = v1::Assign { work: Some(v1::Work { kind: 1, round: 6 }), leaves: vec![], last: true };
    check(
        read(&[part(vec![cached(1)]), other]),
        "Assign.work: expected the rest of an assignment, but other work came",
    );
}

#[test]
fn node_chunks_and_reports() {
    use exchange_request::Message::{Announce, Hello, NodeChunk};
    let node = Some(v1::Node { level: 1, index: 0 });
    let chunk = |data: &[u8]| v1::NodeChunk {
        round: 1,
        node,
        chunk: 0,
        data: Bytes::copy_from_slice(data),
        checksum: chunk::checksum(data),
        precision: v1::Precision::F32.into(),
    };
    let halves = |data: &[u8]| v1::NodeChunk { precision: v1::Precision::Bf16.into(), ..chunk(data) };
    exchange(NodeChunk(chunk(&[0, 0, 0xc0, 0x7f]))).expect("NaN is a float");
    check(ExchangeUp::try_from(v1::ExchangeRequest { message: None }), "ExchangeRequest.message: is missing");
    check(exchange(NodeChunk(chunk(&[0; 6]))), "NodeChunk.data: 6 bytes are no multiple of 4");
    check(exchange(NodeChunk(chunk(&vec![0; (1 << 20) + 4]))), "NodeChunk.data: 1048580 is above 1048576 bytes");
    check(exchange(NodeChunk(halves(&[0; 3]))), "NodeChunk.data: 3 bytes are no multiple of 2");
    check(exchange(NodeChunk(halves(&vec![0; (1 << 19) + 2]))), "NodeChunk.data: 524290 is above 524288 bytes");
    check(exchange(NodeChunk(v1::NodeChunk { precision: 0, ..chunk(&[]) })), "NodeChunk.precision: 0 is no Precision");
    check(exchange(NodeChunk(v1::NodeChunk { precision: 3, ..chunk(&[]) })), "NodeChunk.precision: 3 is no Precision");
    let computed = chunk::checksum(&[0; 4]);
    let damaged = exchange(NodeChunk(v1::NodeChunk { checksum: 1, ..chunk(&[0; 4]) }));
    assert!(damaged.as_ref().unwrap_err().is_damage());
    check(
        damaged,
        &format!("NodeChunk.checksum: the checksum of the data is {computed:016x}, but 0000000000000001 was announced"),
    );
    check(exchange(NodeChunk(v1::NodeChunk { node: None, ..chunk(&[]) })), "NodeChunk.node: is missing");
    let at = |level, index| NodeChunk(v1::NodeChunk { node: Some(v1::Node { level, index }), ..chunk(&[]) });
    check(exchange(at(17, 0)), "NodeChunk.node.level: 17 is above 16");
    check(exchange(at(15, 2)), "NodeChunk.node.index: 2 is above 1");
    check(exchange(at(16, 1)), "NodeChunk.node.index: 1 is above 0");

    let done = v1::Announce {
        work: Some(v1::Work { kind: 2, round: 0 }),
        node,
        loss: Some(f64::NAN),
        samples: 3,
        digests: Bytes::from_static(&[0; 32]),
        compute_micros: Some(u64::MAX),
        waited_micros: 1,
        gradient: None,
        finding: None,
    };
    exchange(Announce(done.clone())).expect("NaN is a loss");
    let digests = |bytes: &'static [u8]| Announce(v1::Announce { digests: Bytes::from_static(bytes), ..done.clone() });
    check(exchange(digests(&[0; 33])), "Announce.digests: 33 bytes are no multiple of 16");
    check(exchange(digests(&[0; 16])), "Announce.digests: there are 1 digests, but 2 were expected");
    check(exchange(Announce(v1::Announce { work: None, ..done.clone() })), "Announce.work: is missing");
    check(exchange(Announce(v1::Announce { loss: None, ..done.clone() })), "Announce.loss: is missing");
    check(exchange(Announce(v1::Announce { node: None, ..done })), "Announce.node: is missing");

    let hello = |member| Hello(v1::ExchangeHello { member, shares_memory: false });
    let member = |worker, incarnation| Some(v1::Member { worker, incarnation });
    check(exchange(hello(None)), "ExchangeHello.member: is missing");
    check(exchange(hello(member(0, 1))), "ExchangeHello.member.worker: is 0, but must be at least 1");
    check(exchange(hello(member(1, 0))), "ExchangeHello.member.incarnation: is 0, but must be at least 1");
    check(
        exchange(hello(member(1, 1))).unwrap().message(),
        "ExchangeRequest.message: expected a member's message, but a second hello came",
    );
    check(
        exchange(NodeChunk(chunk(&[]))).unwrap().hello(),
        "ExchangeRequest.message: expected a hello, but another message came",
    );
}

#[test]
fn parameter_chunks() {
    let response = |change: fn(&mut v1::ParameterChunk)| {
        let mut response = lockstep_proto::convert::parameter_chunk(1, 0, Bytes::from_static(&[0; 8]));
        let Some(v1::exchange_response::Message::ParameterChunk(chunk)) = &mut response.message else { panic!() };
        change(chunk);
        ExchangeDown::try_from(response)
    };
    response(|_| ()).unwrap();
    check(ExchangeDown::try_from(v1::ExchangeResponse { message: None }), "ExchangeResponse.message: is missing");
    check(response(|c| c.data.truncate(7)), "ParameterChunk.data: 7 bytes are no multiple of 4");
    assert!(response(|c| c.data.truncate(4)).unwrap_err().is_damage());
}

#[test]
fn shards() {
    let job = small_job(8, 100, 16, 2);
    let shard = ShardRef { split: Split::Training, shard: 0 };
    assert!(ShardReader::new(&job, ShardRef { shard: 8, ..shard }).is_none());
    let sent = || {
        let parts = std::iter::once(samples(0, 13, 4));
        lockstep_proto::convert::shard_messages(&job, 13, parts).next().unwrap()
    };
    let read = |change: fn(&mut v1::FetchShardResponse)| {
        let mut message = sent();
        change(&mut message);
        ShardReader::new(&job, shard).unwrap().read(message)
    };
    assert_eq!(read(|_| ()).unwrap().unwrap().ids.len(), 13);
    check(read(|m| m.header = None), "FetchShardResponse.header: is missing");
    check(read(|m| m.piece = None), "FetchShardResponse.piece: is missing");
    check(
        read(|m| m.header = Some(v1::ShardHeader { samples: 12, sample_bytes: 4 })),
        "FetchShardResponse.header.samples: there are 12 samples, but 13 were expected",
    );
    check(
        read(|m| m.header = Some(v1::ShardHeader { samples: 13, sample_bytes: 16 })),
        "FetchShardResponse.header.sample_bytes: there are 16 bytes a sample, but 4 were expected",
    );
    check(
        read(|m| m.piece = Some(v1::SamplePiece { checksum: chunk::samples_checksum(&[], &[]), ..Default::default() })),
        "FetchShardResponse.piece.ids: there are 0 samples, but 13 were expected",
    );
    assert!(read(|m| m.piece.as_mut().unwrap().ids[0] = 1).unwrap_err().is_damage(), "the checksum covers the ids");
    let mut reader = ShardReader::new(&job, shard).unwrap();
    assert_eq!(reader.read(v1::FetchShardResponse { last: false, ..sent() }).unwrap(), None);
    check(reader.read(sent()), "FetchShardResponse.header: expected a piece without header, but a second header came");
    check(
        reader.read(v1::FetchShardResponse { header: None, ..sent() }),
        "FetchShardResponse.piece.ids: 26 is above 13 samples",
    );
    check(
        ShardRequest::try_from(v1::FetchShardRequest { member: None, shard: None }),
        "FetchShardRequest.member: is missing",
    );
}

#[test]
fn what_monitors_see() {
    use v1::timed_event::Event;
    let event = |event| TimedEvent::try_from(v1::WatchResponse { event: Some(v1::TimedEvent { unix_ms: 1, event }) });
    check(TimedEvent::try_from(v1::WatchResponse { event: None }), "WatchResponse.event: is missing");
    check(event(None), "WatchResponse.event.event: is missing");
    check(
        event(Some(Event::Round(v1::RoundReport::default()))),
        "WatchResponse.event.round.parameters: a digest has 16 bytes, not 0",
    );
    check(event(Some(Event::State(v1::RunState { state: None }))), "WatchResponse.event.state.state: is missing");
    check(event(Some(Event::Joined(v1::MemberJoined::default()))), "WatchResponse.event.joined.member: is missing");
    check(RunStatus::try_from(v1::GetRunResponse { run: None }), "GetRunResponse.run: is missing");
    let run = Some(v1::RunStatus::default());
    check(RunStatus::try_from(v1::GetRunResponse { run }), "GetRunResponse.run.state: is missing");
    let workers = vec![v1::WorkerStatus::default()];
    check(
        lockstep_proto::convert::workers(v1::ListWorkersResponse { workers }),
        "ListWorkersResponse.workers[0].member: is missing",
    );
}
