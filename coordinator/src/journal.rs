//! The run's growing files: the ledger and the events, written by a thread of their own so that a slow disk does not
//! hold up rounds.

use std::fs::{File, OpenOptions};
use std::io::{self, BufWriter, Write};
use std::path::{Path, PathBuf};
use std::sync::mpsc;
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use lockstep_common::ledger::{Chain, Header, Record};
use lockstep_common::progress::TimedEvent;
use tracing::error;

/// Name of the ledger in a run's directory.
pub const LEDGER_FILE: &str = "ledger.jsonl";
/// Name of the event log in a run's directory.
pub const EVENTS_FILE: &str = "events.jsonl";

/// Lines are handed to the system at least this often, so that another process can follow them.
const FLUSH_INTERVAL: Duration = Duration::from_millis(200);

/// Lines that may wait for the disk: some minutes of rounds.
const QUEUE_DEPTH: usize = 1 << 15;

enum Line {
    Record(Box<Record>),
    Event(Box<TimedEvent>),
}

/// Writes a run's ledger and events.
pub struct Journal {
    lines: mpsc::SyncSender<Line>,
    problems: mpsc::Receiver<String>,
    writer: JoinHandle<()>,
}

impl Journal {
    /// Creates both files in `directory` and starts the writer.
    ///
    /// # Errors
    /// When a file cannot be created or the ledger's header cannot be written.
    pub fn create(directory: &Path, header: &Header) -> io::Result<Self> {
        let (chain, first_line) = Chain::start(header);
        let mut ledger = Sink::create(directory.join(LEDGER_FILE))?;
        ledger.file.write_all(first_line.as_bytes())?;
        ledger.file.write_all(b"\n")?;
        let events = Sink::create(directory.join(EVENTS_FILE))?;
        let (lines, queue) = mpsc::sync_channel(QUEUE_DEPTH);
        let (report, problems) = mpsc::channel();
        let writer = std::thread::Builder::new()
            .name("journal".to_owned())
            .spawn(move || Writer { chain, ledger, events, report, flushed: Instant::now() }.run(&queue))?;
        Ok(Self { lines, problems, writer })
    }

    /// Appends a round to the ledger. Waits only if the disk is minutes behind.
    pub fn record(&self, record: &Record) {
        self.append(Line::Record(Box::new(record.clone())));
    }

    /// Appends an event.
    pub fn event(&self, event: &TimedEvent) {
        self.append(Line::Event(Box::new(event.clone())));
    }

    /// What went wrong since the last call, for people.
    pub fn problems(&self) -> Vec<String> {
        self.problems.try_iter().collect()
    }

    fn append(&self, line: Line) {
        if self.lines.send(line).is_err() {
            error!("the journal's thread has ended: the ledger is not written any more");
        }
    }

    /// Writes what is waiting, syncs both files and ends.
    pub fn close(self) {
        drop(self.lines);
        if self.writer.join().is_err() {
            error!("the journal's thread has panicked: the ledger may be incomplete");
        }
    }
}

struct Sink {
    path: PathBuf,
    file: BufWriter<File>,
    /// Whether the last write failed; the failure was reported then.
    failing: bool,
}

impl Sink {
    fn create(path: PathBuf) -> io::Result<Self> {
        let file = OpenOptions::new().write(true).create_new(true).open(&path)?;
        Ok(Self { path, file: BufWriter::new(file), failing: false })
    }

    /// Takes the outcome of a write; a new problem in words.
    fn note(&mut self, result: io::Result<()>) -> Option<String> {
        let new = !std::mem::replace(&mut self.failing, result.is_err());
        let error = result.err().filter(|_| new)?;
        Some(format!("cannot write {}: {error}; training goes on, the file is incomplete", self.path.display()))
    }
}

struct Writer {
    chain: Chain,
    ledger: Sink,
    events: Sink,
    report: mpsc::Sender<String>,
    flushed: Instant,
}

impl Writer {
    fn run(mut self, queue: &mpsc::Receiver<Line>) {
        loop {
            let wait = FLUSH_INTERVAL.saturating_sub(self.flushed.elapsed());
            match queue.recv_timeout(wait) {
                Ok(line) => self.line(&line),
                Err(mpsc::RecvTimeoutError::Timeout) => self.flush(),
                Err(mpsc::RecvTimeoutError::Disconnected) => break,
            }
        }
        self.flush();
        for sink in [&mut self.ledger, &mut self.events] {
            let synced = sink.file.get_ref().sync_all();
            sink.note(synced).into_iter().for_each(|problem| error!("{problem}"));
        }
    }

    fn line(&mut self, line: &Line) {
        let (sink, text) = match line {
            Line::Record(record) => (&mut self.ledger, Ok(self.chain.line(record))),
            Line::Event(event) => (&mut self.events, serde_json::to_string(&**event)),
        };
        // One write for the whole line: whoever follows the file never sees a part of one.
        let written =
            text.map_err(io::Error::other).and_then(|text| sink.file.write_all(format!("{text}\n").as_bytes()));
        let problem = sink.note(written);
        self.tell(problem);
        if self.flushed.elapsed() >= FLUSH_INTERVAL {
            self.flush();
        }
    }

    fn flush(&mut self) {
        self.flushed = Instant::now();
        for sink in [&mut self.ledger, &mut self.events] {
            let flushed = sink.file.flush();
            // Nobody listens any more when the run is over.
            sink.note(flushed).into_iter().for_each(|problem| drop(self.report.send(problem)));
        }
    }

    fn tell(&self, problem: Option<String>) {
        problem.into_iter().for_each(|problem| drop(self.report.send(problem)));
    }
}
