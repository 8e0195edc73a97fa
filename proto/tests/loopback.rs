//! Over a real connection: a session with a large assignment, an exchange of full chunks, a shard, and a refusal.

mod strategies;

use std::pin::Pin;
use std::sync::Arc;

use lockstep_common::kernel::Precision;
use lockstep_common::protocol::{
    Assignment, CHUNK_FLOATS, FromWorker, Handing, JoinRequest, LeafTask, MemberId, Refusal, ShardRef, Split, ToWorker,
    Welcome, Work,
};
use lockstep_common::reduce::NodeId;
use lockstep_common::shared_memory::FloatBuffer;
use lockstep_proto::convert::{
    Downward, ExchangeDown, ExchangeUp, SessionDown, SessionReader, SessionUp, ShardReader, ShardRequest, Upward,
    sample_bytes, shard_messages,
};
use lockstep_proto::status::{self, Verdict, verdict};
use lockstep_proto::v1::worker_service_server::WorkerService;
use lockstep_proto::{transport, v1};
use strategies::{samples, small_job};
use tokio_stream::{Stream, StreamExt, wrappers::TcpListenerStream};
use tonic::transport::Endpoint;
use tonic::{Request, Response, Status, Streaming};

const MEMBER: MemberId = MemberId { worker: 1, incarnation: 1 };
type Answers<T> = Pin<Box<dyn Stream<Item = Result<T, Status>> + Send>>;

fn job() -> lockstep_common::protocol::Job {
    small_job(8, 40_000, 40_000, 28)
}

fn assignment() -> Assignment {
    let leaf =
        |leaf| LeafTask { leaf, inline: Some(Arc::new(samples(leaf * 3000, 3000, 784))), handing: Handing::Summed };
    Assignment { work: Work::Gradient { round: 0 }, leaves: (0..4).map(leaf).collect() }
}

/// A coordinator of one decision each.
struct Coordinator;

#[tonic::async_trait]
impl WorkerService for Coordinator {
    type SessionStream = Answers<v1::SessionResponse>;
    type ExchangeStream = Answers<v1::ExchangeResponse>;
    type FetchShardStream = Answers<v1::FetchShardResponse>;

    async fn session(
        &self,
        request: Request<Streaming<v1::SessionRequest>>,
    ) -> Result<Response<Self::SessionStream>, Status> {
        let mut requests = request.into_inner();
        let first = requests.message().await?.ok_or_else(|| Status::cancelled("no join"))?;
        let join = SessionUp::try_from(first)?.join()?;
        if join.version != "1" {
            return Err(status::Refusal::from(Refusal::Version { run: "1".into(), worker: join.version }).into());
        }
        let welcome = Welcome {
            member: MEMBER,
            job: job(),
            heartbeat_interval: std::time::Duration::from_secs(1),
            shared_memory: None,
        };
        let Downward::Session(assign) = ToWorker::Assign(assignment()).into() else { unreachable!() };
        let responses = std::iter::once((&welcome).into()).chain(assign).map(Ok);
        Ok(Response::new(Box::pin(tokio_stream::iter(responses))))
    }

    /// Sends every node back as parameters of the next version.
    async fn exchange(
        &self,
        request: Request<Streaming<v1::ExchangeRequest>>,
    ) -> Result<Response<Self::ExchangeStream>, Status> {
        let mut requests = request.into_inner();
        let first = requests.message().await?.ok_or_else(|| Status::cancelled("no hello"))?;
        let member = ExchangeUp::try_from(first)?.hello()?.member;
        if member != MEMBER {
            return Err(status::Refusal::NotAMember { member }.into());
        }
        let answers = requests.map(|request| match ExchangeUp::try_from(request?)?.message()? {
            FromWorker::NodeChunk(chunk) => {
                let data = lockstep_proto::chunk::to_bytes(&chunk.data);
                Ok(lockstep_proto::convert::parameter_chunk(chunk.round + 1, chunk.chunk, data))
            }
            other => Err(Status::internal(format!("{other:?}"))),
        });
        Ok(Response::new(Box::pin(answers)))
    }

    async fn fetch_shard(
        &self,
        request: Request<v1::FetchShardRequest>,
    ) -> Result<Response<Self::FetchShardStream>, Status> {
        let request = ShardRequest::try_from(request.into_inner())?;
        let count = job().schedule.shard_samples(request.shard.shard);
        let parts = std::iter::once(samples(0, count, sample_bytes(&job())));
        Ok(Response::new(Box::pin(tokio_stream::iter(shard_messages(&job(), count, parts).map(Ok)))))
    }
}

fn join(version: &str) -> v1::SessionRequest {
    let (name, isa, version) = ("w".to_owned(), "scalar".to_owned(), version.to_owned());
    JoinRequest { process: 1, name, version, fingerprints: Default::default(), threads: 1, isa }.into()
}

#[tokio::test]
async fn a_worker_and_a_coordinator() {
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    tokio::spawn(
        transport::server()
            .add_service(transport::worker_server(Coordinator))
            .serve_with_incoming(TcpListenerStream::new(listener)),
    );
    let endpoint = transport::configure(Endpoint::from_shared(format!("http://{address}")).unwrap());
    let mut client = transport::worker_client(endpoint.connect().await.unwrap());

    let status = client.session(tokio_stream::once(join("2"))).await.unwrap_err();
    let refusal = Refusal::Version { run: "1".into(), worker: "2".into() };
    assert_eq!(status::Refusal::of(&status), Some(refusal.into()));
    assert_eq!(verdict(&status), Verdict::Never);

    let mut responses = client.session(tokio_stream::once(join("1"))).await.unwrap().into_inner();
    let mut reader = SessionReader::new();
    let mut read = Vec::new();
    while let Some(response) = responses.message().await.unwrap() {
        read.extend(reader.read(response).unwrap());
    }
    let [SessionDown::Welcome(welcome), SessionDown::Message(ToWorker::Assign(received))] = &read[..] else {
        panic!("{} messages", read.len())
    };
    assert_eq!(*received, assignment());

    let gradient: Arc<FloatBuffer> = Arc::new((0..CHUNK_FLOATS + 5).map(|i| i as f32).collect::<Vec<f32>>().into());
    let node = NodeId { level: 0, index: 0 };
    let Upward::Exchange(chunks) =
        FromWorker::NodePart { round: 6, node, chunk: 0, gradient: gradient.clone(), precision: Precision::F32 }.into()
    else {
        panic!()
    };
    let requests = std::iter::once(welcome.member.into()).chain(chunks);
    let mut responses = client.exchange(tokio_stream::iter(requests)).await.unwrap().into_inner();
    let mut parameters = vec![0.0; gradient.len()];
    while let Some(response) = responses.message().await.unwrap() {
        let down = ExchangeDown::try_from(response).unwrap();
        let ExchangeDown::Message(ToWorker::ParameterChunk { version: 7, chunk, data, .. }) = down else { panic!() };
        let part = parameters.chunks_mut(CHUNK_FLOATS).nth(chunk as usize).unwrap();
        lockstep_proto::chunk::copy_into(&data, Precision::F32, part).unwrap();
    }
    assert_eq!(parameters, **gradient);

    let stranger = MemberId { worker: 9, incarnation: 1 };
    let status = client.exchange(tokio_stream::once(stranger.into())).await.unwrap_err();
    assert_eq!(verdict(&status), Verdict::JoinAgain);

    let shard = ShardRef { split: Split::Training, shard: 3 };
    let request = v1::FetchShardRequest::from(ShardRequest { member: MEMBER, shard });
    let mut pieces = client.fetch_shard(request).await.unwrap().into_inner();
    let mut reader = ShardReader::new(&welcome.job, shard).unwrap();
    let mut whole = None;
    while let Some(piece) = pieces.message().await.unwrap() {
        whole = reader.read(piece).unwrap();
    }
    assert_eq!(whole.unwrap(), samples(0, 5000, 784));
}
