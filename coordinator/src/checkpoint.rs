//! Checkpoints as files: written in the background from a snapshot, found again at a restart.

use std::fs::{self, File};
use std::io::{self, BufReader, ErrorKind};
use std::path::{Path, PathBuf};
use std::sync::{Arc, mpsc};
use std::thread::JoinHandle;
use std::time::Instant;

use lockstep_common::checkpoint::{Checkpoint, CheckpointError, State, format};
use lockstep_common::files;
use lockstep_common::optim::adam::Moments;
use lockstep_common::shared_memory::FloatBuffer;
use tokio::sync::mpsc::UnboundedSender;
use tracing::info;

use crate::journal::Position;
use crate::round::{CheckpointId, Event};
use crate::trouble::{Trouble, Troubles};

/// Name of the checkpoints' directory in a run's directory.
pub const CHECKPOINTS: &str = "checkpoints";
const EXTENSION: &str = "checkpoint";
/// What a damaged checkpoint is called once another one was used instead.
const DAMAGED_EXTENSION: &str = "damaged";

/// A checkpoint before its tensors are there.
#[derive(Debug)]
pub struct Draft {
    /// Which one it is.
    pub id: CheckpointId,
    /// What the coordinator knows. The ledger's position is filled in by the writer.
    pub state: State,
    /// Where the ledger is, once it is on the disk: a checkpoint is never ahead of it.
    pub position: mpsc::Receiver<Position>,
    /// Whether it must be written even if that takes waiting.
    pub must: bool,
}

/// A checkpoint to be written.
struct Job {
    draft: Draft,
    parameters: Arc<FloatBuffer>,
    moments: Moments,
}

/// Takes snapshots for the writer, on the thread that owns the moments.
#[derive(Debug)]
pub struct Snapshots {
    jobs: mpsc::SyncSender<Job>,
    /// The memory of a snapshot comes back when it is written.
    returned: mpsc::Receiver<Moments>,
    settled: UnboundedSender<Event>,
    troubles: Troubles,
}

impl Snapshots {
    /// Copies the moments and hands everything to the writer. If that is still at work, the checkpoint is left out or,
    /// if it must be, put behind.
    pub fn take(&mut self, draft: Draft, parameters: &Arc<FloatBuffer>, moments: &Moments) {
        let rounds = draft.state.standing.rounds;
        let mut copy = match self.returned.try_recv() {
            Ok(memory) => memory,
            Err(_) if draft.must => Moments::default(),
            Err(_) => {
                let message = format!(
                    "the disk is slow: the checkpoint after round {rounds} is left out, the one before is still being written"
                );
                return self.leave_out(draft.id, message);
            }
        };
        self.troubles.over(|| format!("checkpoints are written in time again, after round {rounds}"));
        copy.first.clone_from(&moments.first);
        copy.second.clone_from(&moments.second);
        let id = draft.id;
        let job = Job { draft, parameters: parameters.clone(), moments: copy };
        if self.jobs.send(job).is_err() {
            self.leave_out(id, "the thread that writes checkpoints has ended".to_owned());
        }
    }

    fn leave_out(&mut self, id: CheckpointId, message: String) {
        self.troubles.began(message);
        // Nobody waits for it any more when the run is over.
        let _ = self.settled.send(Event::NotSaved(id));
    }

    /// Says that the moments of an older version are needed, and are not there any more.
    pub fn missed(&mut self, draft: &Draft) {
        let rounds = draft.state.standing.rounds;
        let message = format!("the checkpoint after round {rounds} is left out: the next round has begun to change it");
        self.leave_out(draft.id, message);
    }
}

/// The thread that writes checkpoints.
pub(crate) struct CheckpointWriter(JoinHandle<Option<u64>>);

impl CheckpointWriter {
    /// Starts it for a run's directory. `newest` is the round after which the last checkpoint was taken, if there is one;
    /// `settled` is told what became of each.
    pub(crate) fn start(
        directory: &Path,
        keep: usize,
        newest: Option<u64>,
        settled: UnboundedSender<Event>,
        troubles: mpsc::Sender<Trouble>,
    ) -> io::Result<(Self, Snapshots)> {
        // One waits beside the one being written: the last of the run.
        let (jobs, queue) = mpsc::sync_channel::<Job>(1);
        let (give_back, returned) = mpsc::channel();
        // The first snapshot's memory.
        let _ = give_back.send(Moments::default());
        let mut writer = Writer {
            directory: directory.join(CHECKPOINTS),
            keep,
            newest,
            troubles: Troubles::new("checkpoints", troubles.clone()),
        };
        let report = settled.clone();
        let thread = std::thread::Builder::new().name("checkpoint".to_owned()).spawn(move || {
            for job in queue {
                let id = job.draft.id;
                let became = if writer.job(&job) { Event::Saved(id) } else { Event::NotSaved(id) };
                let _ = report.send(became);
                let _ = give_back.send(job.moments);
            }
            writer.newest
        })?;
        let snapshots =
            Snapshots { jobs, returned, settled, troubles: Troubles::new("checkpoint snapshots", troubles) };
        Ok((Self(thread), snapshots))
    }

    /// Waits until everything is written, once nobody takes snapshots any more. Returns after how many rounds the newest
    /// checkpoint was taken.
    pub(crate) fn finish(self) -> Option<u64> {
        self.0.join().unwrap_or_default()
    }
}

struct Writer {
    directory: PathBuf,
    keep: usize,
    newest: Option<u64>,
    troubles: Troubles,
}

impl Writer {
    /// Whether it is on the disk.
    fn job(&mut self, job: &Job) -> bool {
        let rounds = job.draft.state.standing.rounds;
        let begun = Instant::now();
        let written = self.write(job);
        match &written {
            Ok(()) => {
                info!("checkpoint after round {rounds} written in {:.3} s", begun.elapsed().as_secs_f64());
                self.newest = Some(rounds);
                self.troubles.over(|| format!("checkpoints are written again, after round {rounds}"));
            }
            Err(error) => {
                let newest = match self.newest {
                    Some(newest) => format!("the newest one is from after round {newest}"),
                    None => "there is none yet".to_owned(),
                };
                self.troubles.began(format!("cannot write a checkpoint: {error}; {newest}, it is tried again"));
            }
        }
        written.is_ok()
    }

    fn write(&self, job: &Job) -> io::Result<()> {
        let Job { draft, parameters, moments } = job;
        let position = draft.position.recv();
        let Position { ledger, events_bytes } =
            position.map_err(|_| io::Error::other("the ledger that it belongs to is not on the disk"))?;
        let state = State { ledger, events_bytes, ..draft.state.clone() };
        fs::create_dir_all(&self.directory)?;
        let path = self.directory.join(file_name(state.standing.rounds));
        files::replace_large(&path, |file| format::write(file, &state, parameters, moments))
            .map_err(|error| io::Error::new(error.kind(), format!("{}: {error}", path.display())))?;
        // Old ones go only now that there is a new one.
        for (_, path) in list(&self.directory)?.into_iter().skip(self.keep) {
            fs::remove_file(path)?;
        }
        Ok(())
    }
}

fn file_name(rounds: u64) -> String {
    format!("round-{rounds:010}.{EXTENSION}")
}

/// All checkpoints in a directory, the newest first. None if there is no such directory.
fn list(directory: &Path) -> io::Result<Vec<(u64, PathBuf)>> {
    let entries = match fs::read_dir(directory) {
        Ok(entries) => entries,
        Err(error) if error.kind() == ErrorKind::NotFound => return Ok(Vec::new()),
        Err(error) => return Err(error),
    };
    let mut found = Vec::new();
    for entry in entries {
        let path = entry?.path();
        let name = path.file_name().and_then(|name| name.to_str()).unwrap_or("");
        let rounds = name.strip_prefix("round-").and_then(|rest| rest.strip_suffix(&format!(".{EXTENSION}")));
        if let Some(rounds) = rounds.and_then(|rounds| rounds.parse().ok()) {
            found.push((rounds, path));
        }
    }
    found.sort_unstable_by(|left, right| right.cmp(left));
    Ok(found)
}

/// Reads a checkpoint's file.
///
/// # Errors
/// [`CheckpointError`] when it is no whole checkpoint.
pub fn read(path: &Path) -> Result<Checkpoint, CheckpointError> {
    let file = File::open(path)?;
    let length = file.metadata()?.len();
    format::read(BufReader::new(file), length)
}

/// What a search for a checkpoint found.
#[derive(Debug, Default)]
pub struct Found {
    /// The newest one that can be used.
    pub checkpoint: Option<Checkpoint>,
    /// Which newer ones are damaged, in words.
    pub damaged: Vec<String>,
}

/// Looks for the newest checkpoint of a run's directory that is whole and that `usable` accepts. Damaged ones are passed
/// over; nothing is changed.
///
/// # Errors
/// In words: when the directory or a file cannot be read, or was written by another version, or is refused by `usable`
/// and there is no older one.
pub fn find(directory: &Path, usable: impl Fn(&State) -> Result<(), String>) -> Result<Found, String> {
    let directory = directory.join(CHECKPOINTS);
    let files = list(&directory).map_err(|error| format!("cannot read {}: {error}", directory.display()))?;
    let mut damaged = Vec::new();
    let mut refused = None;
    for (_, path) in files {
        match read(&path) {
            Ok(checkpoint) => match usable(&checkpoint.state) {
                Ok(()) => return Ok(Found { checkpoint: Some(checkpoint), damaged }),
                Err(reason) => {
                    damaged.push(format!("{} is passed over: {reason}", path.display()));
                    refused = Some(reason);
                }
            },
            Err(error @ CheckpointError::Damaged(_)) => {
                damaged.push(format!("{} is passed over: {error}", path.display()));
            }
            Err(error) => return Err(format!("{}: {error}", path.display())),
        }
    }
    match refused {
        Some(reason) => Err(format!("no checkpoint can be used: {reason}")),
        None => Ok(Found { checkpoint: None, damaged }),
    }
}

/// Makes a directory ready for a run that goes on after `rounds` rounds: what is newer is set aside under another name,
/// and what was being written when a process was killed is removed.
///
/// # Errors
/// Those of renaming and removing.
pub(crate) fn set_aside_newer(directory: &Path, rounds: u64) -> io::Result<()> {
    let directory = directory.join(CHECKPOINTS);
    files::remove_partial(&directory)?;
    for (newer, path) in list(&directory)? {
        if newer > rounds {
            fs::rename(&path, path.with_extension(DAMAGED_EXTENSION))?;
        }
    }
    Ok(())
}

/// Counts the restarts of a run's coordinator in a file of the run, so that no two have the same number, whatever the
/// checkpoint says that they start from. Returns the number of this one.
///
/// # Errors
/// When the count cannot be written.
pub(crate) fn count_restart(directory: &Path, at_least: u32) -> io::Result<u32> {
    let path = directory.join(CHECKPOINTS).join("restarts");
    fs::create_dir_all(directory.join(CHECKPOINTS))?;
    let counted = match fs::read_to_string(&path) {
        Ok(text) => text.trim().parse().unwrap_or(0),
        Err(error) if error.kind() == ErrorKind::NotFound => 0,
        Err(error) => return Err(error),
    };
    let restarts: u32 = at_least.max(counted).saturating_add(1);
    files::replace(&path, |file| writeln!(file, "{restarts}"))?;
    Ok(restarts)
}
