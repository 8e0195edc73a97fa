//! Putting a coordinator together.

use std::collections::{BTreeMap, HashMap};
use std::io;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Instant;

use lockstep_common::config::RunSpec;
use lockstep_common::fingerprint::fingerprint;
use lockstep_common::kernel::Isa;
use lockstep_common::ledger::Header;
use lockstep_common::placement::PlacedData;
use lockstep_common::protocol::parameters_digest;
use lockstep_common::shared_memory::{Access, FloatBuffer, Region};
use tokio::sync::mpsc;
use tracing::debug;

use crate::aggregate::{Aggregator, ToAggregator};
use crate::driver::{Driver, RunResult};
use crate::expected::ExpectedSamples;
use crate::journal::{EVENTS_FILE, Journal};
use crate::link::{INBOX_DEPTH, Inbound, Inbox};
use crate::monitor::Hub;
use crate::round::{Machine, MachineConfig};

/// Gradient parts that may wait for the aggregator, 1 MiB each.
const AGGREGATOR_DEPTH: usize = 64;

/// What a coordinator needs.
pub struct CoordinatorConfig {
    /// The run.
    pub spec: RunSpec,
    /// Its data, placed by the spec's schedule.
    pub data: Arc<PlacedData>,
    /// The parameters to start from.
    pub initial_parameters: Vec<f32>,
    /// The run's directory, which exists and is empty.
    pub directory: PathBuf,
    /// What the optimizer computes on.
    pub isa: Isa,
    /// Whether workers in other processes may join.
    pub remote_workers: bool,
}

/// Versions that may lie in shared memory: the current one, the one being made, the one that workers keep besides, and one
/// more for a worker that is slow to let go.
const SHARED_VERSIONS: u32 = 4;

/// Memory for versions of `floats` parameters that other processes can read. Without it, tensors travel over gRPC.
fn shared_versions(floats: usize) -> Option<Arc<Region>> {
    match Region::create(SHARED_VERSIONS, floats, Access::Read) {
        Ok(region) => Some(Arc::new(region)),
        Err(error) => {
            debug!("{error}");
            None
        }
    }
}

/// Why a coordinator cannot start.
#[derive(Debug, thiserror::Error)]
pub enum StartError {
    /// A file of the run cannot be made.
    #[error("cannot create the run's files in {directory}: {cause}", directory = directory.display())]
    Directory {
        /// The run's directory.
        directory: PathBuf,
        /// The system's answer.
        cause: io::Error,
    },
    /// There is no memory for another thread.
    #[error("cannot start a thread: {0}")]
    Thread(io::Error),
}

/// A coordinator that is ready: its links can be made, and it can be run.
pub struct Coordinator {
    driver: Driver,
    inbox: Inbox,
    inbound: mpsc::Receiver<Inbound>,
    reports: mpsc::UnboundedReceiver<crate::aggregate::FromAggregator>,
    region: Option<Arc<Region>>,
}

impl Coordinator {
    /// Creates the run's files and starts the threads.
    ///
    /// # Errors
    /// [`StartError`] when a file or a thread cannot be made.
    pub fn start(config: CoordinatorConfig) -> Result<Self, StartError> {
        let CoordinatorConfig { spec, data, initial_parameters, directory, isa, remote_workers } = config;
        let layout = spec.model.layout.hash();
        let header = Header::new(&spec.name, &spec.schedule, layout, parameters_digest(&initial_parameters));
        let journal = Journal::create(&directory, &header)
            .map_err(|cause| StartError::Directory { directory: directory.clone(), cause })?;
        let hub = Arc::new(Hub::new(&spec, directory.join(EVENTS_FILE)));
        let machine = Machine::new(MachineConfig {
            spec: spec.clone(),
            version: env!("CARGO_PKG_VERSION").to_owned(),
            fingerprint: fingerprint(isa),
        });

        let parameters = Arc::new(FloatBuffer::from(initial_parameters));
        let region = (remote_workers && spec.shared_memory).then(|| shared_versions(parameters.len())).flatten();
        let (report, reports) = mpsc::unbounded_channel();
        let tree = spec.schedule.tree;
        let aggregator = Aggregator::new(tree, spec.optimizer, isa, parameters.clone(), region.clone(), report);
        let (to_aggregator, aggregator_inbox) = mpsc::channel::<ToAggregator>(AGGREGATOR_DEPTH);
        std::thread::Builder::new()
            .name("aggregator".to_owned())
            .spawn(move || aggregator.run(aggregator_inbox))
            .map_err(StartError::Thread)?;

        let (inbox, inbound) = mpsc::channel(INBOX_DEPTH);
        let driver = Driver {
            machine,
            data,
            aggregator: to_aggregator,
            journal,
            hub,
            parameters,
            made: None,
            expected: ExpectedSamples::new(spec.schedule, spec.validation_samples),
            started: Instant::now(),
            links: BTreeMap::new(),
            joining: HashMap::new(),
            connections: 0,
            first_round: None,
            last_commit: None,
            outcome: None,
            spec,
        };
        Ok(Self { driver, inbox, inbound, reports, region })
    }

    /// Where links hand in messages.
    pub fn inbox(&self) -> Inbox {
        self.inbox.clone()
    }

    /// Where versions of the parameters lie, if workers in other processes can read them there.
    pub fn region(&self) -> Option<Arc<Region>> {
        self.region.clone()
    }

    /// The run's public state.
    pub fn hub(&self) -> Arc<Hub> {
        self.driver.hub.clone()
    }

    /// Runs to the end of the run, or until `shutdown` gives a reason to stop.
    pub async fn run(self, shutdown: impl Future<Output = String>) -> RunResult {
        let Self { driver, inbox, inbound, reports, region: _ } = self;
        // Links hold their own senders; ours would keep the channel open for ever.
        drop(inbox);
        driver.run(inbound, reports, shutdown).await
    }
}
