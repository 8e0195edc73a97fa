//! Putting a coordinator together.

use std::collections::{BTreeMap, HashMap};
use std::fs::File;
use std::io::{self, BufRead, BufReader};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use lockstep_common::checkpoint::{Checkpoint, LedgerPosition, Shown, Standing, State};
use lockstep_common::config::RunSpec;
use lockstep_common::fingerprint::fingerprint;
use lockstep_common::hash::Digest;
use lockstep_common::kernel::{Arithmetic, Isa};
use lockstep_common::ledger::Header;
use lockstep_common::placement::PlacedData;
use lockstep_common::reduce::NodeSums;
use lockstep_common::shared_memory::{Access, Region};
use tokio::sync::mpsc;
use tracing::debug;

use crate::aggregate::{Aggregator, Start, ToAggregator};
use crate::checkpoint::{CheckpointWriter, count_restart, set_aside_newer};
use crate::driver::{Driver, RunResult};
use crate::expected::ExpectedSamples;
use crate::journal::{EVENTS_FILE, Journal, Position};
use crate::link::{INBOX_DEPTH, Inbound, Inbox};
use crate::monitor::Hub;
use crate::round::{Machine, MachineConfig};
use crate::trouble::Trouble;

/// Gradient parts that may wait for the aggregator, 1 MiB each.
const AGGREGATOR_DEPTH: usize = 64;

/// What a coordinator needs.
pub struct CoordinatorConfig {
    /// The run.
    pub spec: RunSpec,
    /// Its data, placed by the spec's schedule.
    pub data: Arc<PlacedData>,
    /// The parameters before the first round, if the run starts there or has not come further.
    pub origin: Origin,
    /// The run's directory, which exists.
    pub directory: PathBuf,
    /// The configuration as it stands in `run.toml`, for checkpoints.
    pub config: String,
    /// What the optimizer computes on.
    pub isa: Isa,
    /// Whether workers in other processes may join.
    pub remote_workers: bool,
    /// Whether this coordinator, when it is stopped, will be started again: then it does not send its workers home.
    pub comes_back: bool,
}

/// Versions that may lie in shared memory: the current one, the one being made, the one that workers keep besides, one
/// that a checkpoint is written from, and one more for a worker that is slow to let go.
const SHARED_VERSIONS: u32 = 5;

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

/// Where a run starts.
#[derive(Debug)]
pub enum Origin {
    /// At its first round. The directory has no files of a run.
    Fresh(Start),
    /// At its first round, again: the run was stopped before it had a checkpoint. What it has left is replaced.
    Again(Start),
    /// Where a checkpoint was taken.
    Checkpoint(Box<Checkpoint>),
}

/// Why a coordinator cannot start.
#[derive(Debug, thiserror::Error)]
pub enum StartError {
    /// A file of the run cannot be made.
    #[error("cannot write the run's files in {directory}: {cause}", directory = directory.display())]
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

/// What a run begins with, fresh or not.
struct Begun {
    journal: Journal,
    machine: Machine,
    tensors: Start,
    restarts: u32,
    trained_before: Duration,
    /// Rounds after which the newest checkpoint was taken.
    newest: Option<u64>,
}

struct StartingFrom<'a> {
    directory: &'a Path,
    spec: &'a RunSpec,
    hub: &'a Hub,
    troubles: &'a std::sync::mpsc::Sender<Trouble>,
}

impl StartingFrom<'_> {
    fn begin(self, origin: Origin, machine: MachineConfig) -> io::Result<Begun> {
        match origin {
            Origin::Fresh(start) => self.first_round(start, machine, false),
            Origin::Again(start) => self.first_round(start, machine, true),
            Origin::Checkpoint(checkpoint) => self.checkpoint(*checkpoint, machine),
        }
    }

    fn first_round(self, tensors: Start, machine: MachineConfig, again: bool) -> io::Result<Begun> {
        let Self { directory, spec, troubles, .. } = self;
        let header = Header::of(spec, &tensors.parameters);
        let journal = Journal::create(directory, &header, again, troubles.clone())?;
        let restarts = if again {
            set_aside_newer(directory, 0)?;
            count_restart(directory, 0)?
        } else {
            0
        };
        Ok(Begun {
            journal,
            machine: Machine::resume(machine, &Standing::default(), restarts),
            tensors,
            restarts,
            trained_before: Duration::ZERO,
            newest: None,
        })
    }

    fn checkpoint(self, checkpoint: Checkpoint, machine: MachineConfig) -> io::Result<Begun> {
        let Self { directory, hub, troubles, .. } = self;
        let Checkpoint { state, parameters, moments } = checkpoint;
        let position = Position { ledger: state.ledger, events_bytes: state.events_bytes };
        // First of all, because it also makes sure that no other process writes this run.
        let journal = Journal::resume(directory, &position, troubles.clone())?;
        let version = state.standing.rounds;
        set_aside_newer(directory, version)?;
        let restarts = count_restart(directory, state.restarts)?;
        hub.resume(&state.standing, &state.shown, count_lines(&directory.join(EVENTS_FILE))?);
        Ok(Begun {
            journal,
            machine: Machine::resume(machine, &state.standing, restarts),
            tensors: Start { parameters: Arc::new(parameters.into()), moments, version },
            restarts,
            trained_before: state.shown.training_time,
            newest: Some(version),
        })
    }
}

/// Number of events in the log.
fn count_lines(path: &Path) -> io::Result<u64> {
    let (mut lines, mut file) = (0, BufReader::new(File::open(path)?));
    loop {
        let piece = file.fill_buf()?;
        if piece.is_empty() {
            return Ok(lines);
        }
        lines += piece.iter().filter(|&&byte| byte == b'\n').count() as u64;
        let length = piece.len();
        file.consume(length);
    }
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
        let CoordinatorConfig { spec, data, origin, directory, config, isa, remote_workers, comes_back } = config;
        let fingerprint = fingerprint(Arithmetic { isa, compute: spec.precision.compute });
        let machine_config =
            MachineConfig { spec: spec.clone(), version: env!("CARGO_PKG_VERSION").to_owned(), fingerprint };
        let hub = Arc::new(Hub::new(&spec, directory.join(EVENTS_FILE)));
        let (report_trouble, troubles) = std::sync::mpsc::channel();
        let at_start = StartingFrom { directory: &directory, spec: &spec, hub: &hub, troubles: &report_trouble };
        let directory_error = |cause| StartError::Directory { directory: directory.clone(), cause };
        let Begun { journal, machine, tensors, restarts, trained_before, newest } =
            at_start.begin(origin, machine_config).map_err(directory_error)?;
        let machine = if comes_back { machine.coming_back() } else { machine };
        let keep = spec.checkpoint.keep as usize;
        // As many as there are checkpoints.
        let (settle, settled) = mpsc::unbounded_channel();
        let (checkpoints, snapshots) =
            CheckpointWriter::start(&directory, keep, newest, settle, report_trouble).map_err(StartError::Thread)?;
        let state = State {
            version: env!("CARGO_PKG_VERSION").to_owned(),
            config,
            layout: spec.model.layout.hash(),
            fingerprint,
            data: data.digest(),
            restarts,
            standing: Standing::default(),
            ledger: LedgerPosition { bytes: 0, chain: Digest::default() },
            events_bytes: 0,
            shown: Shown::default(),
        };

        let parameters = tensors.parameters.clone();
        let region = (remote_workers && spec.shared_memory).then(|| shared_versions(parameters.len())).flatten();
        let (report, reports) = mpsc::unbounded_channel();
        let tree = spec.schedule.tree;
        let sums = NodeSums { isa, precision: spec.precision.wire };
        let aggregator = Aggregator::new(tree, spec.optimizer, sums, tensors, snapshots, region.clone(), report);
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
            wire: spec.precision.wire,
            parameters,
            made: None,
            expected: ExpectedSamples::new(spec.schedule, spec.validation_samples),
            started: Instant::now(),
            links: BTreeMap::new(),
            joining: HashMap::new(),
            connections: 0,
            first_round: None,
            last_commit: None,
            trained_before,
            checkpoints,
            settled,
            state,
            troubles,
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
