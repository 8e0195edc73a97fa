//! Whatever bytes arrive, reading them ends in a value or an error, never in a panic.

mod strategies;

use lockstep_common::progress::{RunStatus, TimedEvent};
use lockstep_common::protocol::{ShardRef, Split, ToWorker};
use lockstep_proto::convert::{
    ExchangeDown, ExchangeUp, SessionReader, SessionUp, ShardReader, ShardRequest, Upward, workers,
};
use lockstep_proto::status::{self, Refusal};
use lockstep_proto::v1;
use proptest::prelude::*;
use prost::Message;
use strategies::*;

/// Decodes `bytes` as every message that a peer may send, and converts it.
fn read_as_everything(bytes: &[u8]) {
    let _ = v1::SessionRequest::decode(bytes).map(SessionUp::try_from);
    let _ = v1::ExchangeRequest::decode(bytes).map(ExchangeUp::try_from);
    let _ = v1::FetchShardRequest::decode(bytes).map(ShardRequest::try_from);
    let _ = v1::WatchRequest::decode(bytes);
    let _ = v1::ExchangeResponse::decode(bytes).map(ExchangeDown::try_from);
    let _ = v1::WatchResponse::decode(bytes).map(TimedEvent::try_from);
    let _ = v1::GetRunResponse::decode(bytes).map(RunStatus::try_from);
    let _ = v1::ListWorkersResponse::decode(bytes).map(workers);
    if let Ok(response) = v1::SessionResponse::decode(bytes) {
        let _ = SessionReader::new().read(response.clone());
        let _ = admitted().read(response);
    }
    if let Ok(response) = v1::FetchShardResponse::decode(bytes) {
        let shard = ShardRef { split: Split::Training, shard: 1 };
        let _ = ShardReader::new(&small_job(4, 9, 4, 3), shard).unwrap().read(response);
    }
    let status = tonic::Status::with_details(tonic::Code::Unknown, "", bytes.to_vec().into());
    let _ = Refusal::of(&status);
    let _ = status::describe(&status);
}

fn admitted() -> SessionReader {
    let member = lockstep_common::protocol::MemberId { worker: 1, incarnation: 1 };
    let heartbeat_interval = std::time::Duration::from_secs(1);
    let welcome = lockstep_common::protocol::Welcome {
        member,
        job: small_job(4, 9, 4, 3),
        heartbeat_interval,
        shared_memory: None,
    };
    let mut reader = SessionReader::new();
    reader.read((&welcome).into()).unwrap();
    reader
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(2000))]

    #[test]
    fn noise(bytes in proptest::collection::vec(any::<u8>(), 0..200)) {
        read_as_everything(&bytes);
    }

    /// Noise seldom gets past the first tag; valid messages with some bytes changed go deep.
    #[test]
    fn damaged_messages(
        welcome in welcome(),
        join in join(),
        assignment in assignment(4, 1, 9),
        report in node_report(),
        event in event(),
        damage in proptest::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 0..4),
        which in 0usize..5,
    ) {
        let mut bytes = match which {
            0 => v1::SessionResponse::from(&welcome).encode_to_vec(),
            1 => v1::SessionRequest::from(join).encode_to_vec(),
            2 => {
                let message = ToWorker::Assign(assignment);
                let lockstep_proto::convert::Downward::Session(mut all) = message.into() else { panic!() };
                all.next().unwrap().encode_to_vec()
            }
            3 => {
                let message = lockstep_common::protocol::FromWorker::Announce(report);
                let Upward::Exchange(mut all) = message.into() else { panic!() };
                all.next().unwrap().encode_to_vec()
            }
            _ => v1::WatchResponse::from(&event).encode_to_vec(),
        };
        for (at, value) in damage {
            if !bytes.is_empty() {
                let at = at.index(bytes.len());
                bytes[at] = value;
            }
        }
        read_as_everything(&bytes);
    }

    /// Numbers at the edges, in the fields that arithmetic is done with.
    #[test]
    fn edges(level: u32, index: u32, shard: u32, axes in proptest::collection::vec(any::<u64>(), 0..10), shards: u32) {
        let node = v1::Node { level, index };
        if let Ok(node) = lockstep_common::reduce::NodeId::try_from(node) {
            prop_assert!(!node.leaves().is_empty());
        }
        let shape = v1::Shape { axes };
        let schedule = v1::Schedule { seed: 0, samples: 1, batch_size: 1, shards, shuffle: false };
        let mut job = v1::Job::from(&small_job(4, 9, 4, 3));
        job.sample_shape = Some(shape);
        job.schedule = Some(schedule);
        if let Ok(job) = lockstep_common::protocol::Job::try_from(job) {
            let _ = ShardReader::new(&job, ShardRef { split: Split::Validation, shard });
        }
    }
}
