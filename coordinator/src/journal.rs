//! The run's growing files: the ledger and the events, written by a thread of their own so that a slow disk does not
//! hold up rounds.

use std::fs::{File, OpenOptions};
use std::io::{self, BufWriter, Write};
use std::path::{Path, PathBuf};
use std::sync::mpsc;
use std::thread::JoinHandle;
use std::time::Duration;

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
        let writer = std::thread::Builder::new()
            .name("journal".to_owned())
            .spawn(move || Writer { chain, ledger, events }.run(&queue))?;
        Ok(Self { lines, writer })
    }

    /// Appends a round to the ledger. Waits only if the disk is minutes behind.
    pub fn record(&self, record: &Record) {
        self.append(Line::Record(Box::new(record.clone())));
    }

    /// Appends an event.
    pub fn event(&self, event: &TimedEvent) {
        self.append(Line::Event(Box::new(event.clone())));
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

    fn line(&mut self, text: &str) {
        let written = self.file.write_all(text.as_bytes()).and_then(|()| self.file.write_all(b"\n"));
        self.note(written);
    }

    fn flush(&mut self) {
        let flushed = self.file.flush();
        self.note(flushed);
    }

    fn note(&mut self, result: io::Result<()>) {
        if let (Err(error), false) = (&result, self.failing) {
            error!("cannot write {}: {error}; training goes on, the file is incomplete", self.path.display());
        }
        self.failing = result.is_err();
    }
}

struct Writer {
    chain: Chain,
    ledger: Sink,
    events: Sink,
}

impl Writer {
    fn run(mut self, queue: &mpsc::Receiver<Line>) {
        loop {
            match queue.recv_timeout(FLUSH_INTERVAL) {
                Ok(Line::Record(record)) => {
                    let line = self.chain.line(&record);
                    self.ledger.line(&line);
                }
                Ok(Line::Event(event)) => match serde_json::to_string(&*event) {
                    Ok(line) => self.events.line(&line),
                    Err(error) => error!("an event has no JSON form: {error}"),
                },
                Err(mpsc::RecvTimeoutError::Timeout) => {
                    self.ledger.flush();
                    self.events.flush();
                }
                Err(mpsc::RecvTimeoutError::Disconnected) => break,
            }
        }
        for sink in [&mut self.ledger, &mut self.events] {
            sink.flush();
            let synced = sink.file.get_ref().sync_all();
            sink.note(synced);
        }
    }
}
