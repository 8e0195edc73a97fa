//! The run's growing files: the ledger and the events, written by a thread of their own so that a slow disk does not
//! hold up rounds.
//!
//! When a file cannot be written, its lines wait in memory and are tried again; nothing is left out of the ledger. If too
//! many wait, the run stops: a round that is not in the ledger is not proven.

use std::io;
use std::path::Path;
use std::sync::mpsc;
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use lockstep_common::checkpoint::LedgerPosition;
use lockstep_common::ledger::{Chain, Header, Record};
use lockstep_common::progress::TimedEvent;
use tracing::error;

use crate::log_file::LogFile;
use crate::trouble::{Trouble, Troubles};

/// Name of the ledger in a run's directory.
pub const LEDGER_FILE: &str = "ledger.jsonl";
/// Name of the event log in a run's directory.
pub const EVENTS_FILE: &str = "events.jsonl";

/// Lines are handed to the system at least this often, so that another process can follow them; and as often it is tried
/// again what has failed.
const FLUSH_INTERVAL: Duration = Duration::from_millis(200);

/// Lines that may wait for the journal's thread: some minutes of rounds.
const QUEUE_DEPTH: usize = 1 << 15;

/// Lines are handed to the system when so many bytes are waiting.
const BUFFER_BYTES: usize = 1 << 13;

/// So much of each file may wait in memory for a disk that takes nothing: about 30,000 rounds.
const MAX_WAITING_BYTES: usize = 64 << 20;

enum Line {
    Record(Box<Record>),
    Event(Box<TimedEvent>),
    Mark(mpsc::SyncSender<Position>),
}

/// How long the files are.
#[derive(Clone, Copy, Debug)]
pub struct Position {
    /// The ledger.
    pub ledger: LedgerPosition,
    /// The event log.
    pub events_bytes: u64,
}

/// Writes a run's ledger and events.
pub struct Journal {
    lines: mpsc::SyncSender<Line>,
    writer: JoinHandle<()>,
}

impl Journal {
    /// Creates both files in `directory` and starts the writer. What is there of a run with the same ledger header, which
    /// has no checkpoint yet, is replaced if `replace` is set.
    ///
    /// # Errors
    /// When a file cannot be created, is there, or is written by another process.
    pub fn create(
        directory: &Path,
        header: &Header,
        replace: bool,
        troubles: mpsc::Sender<Trouble>,
    ) -> io::Result<Self> {
        let (chain, first_line) = Chain::start(header);
        let open = if replace { LogFile::replace } else { LogFile::create };
        let mut ledger = open(&directory.join(LEDGER_FILE))?;
        ledger.append(&first_line);
        ledger.write()?;
        let events = open(&directory.join(EVENTS_FILE))?;
        Self::start(chain, ledger, events, troubles)
    }

    /// Goes on with files that are at least as long as `position` says. What comes after it is cut off.
    ///
    /// # Errors
    /// When a file cannot be opened or cut, or is written by another process.
    pub fn resume(directory: &Path, position: &Position, troubles: mpsc::Sender<Trouble>) -> io::Result<Self> {
        let ledger = LogFile::resume(&directory.join(LEDGER_FILE), position.ledger.bytes)?;
        let events = LogFile::resume(&directory.join(EVENTS_FILE), position.events_bytes)?;
        Self::start(Chain::resume(position.ledger.chain), ledger, events, troubles)
    }

    fn start(chain: Chain, ledger: LogFile, events: LogFile, troubles: mpsc::Sender<Trouble>) -> io::Result<Self> {
        let (lines, queue) = mpsc::sync_channel(QUEUE_DEPTH);
        let ledger = Sink { file: ledger, troubles: Troubles::new(LEDGER_FILE, troubles.clone()), left_out: 0 };
        let events = Sink { file: events, troubles: Troubles::new(EVENTS_FILE, troubles), left_out: 0 };
        let writer = Writer { chain, ledger, events, flushed: Instant::now() };
        let writer = std::thread::Builder::new().name("journal".to_owned()).spawn(move || writer.run(&queue))?;
        Ok(Self { lines, writer })
    }

    /// Appends a round to the ledger. Waits only if the thread is minutes behind.
    pub fn record(&self, record: &Record) {
        self.append(Line::Record(Box::new(record.clone())));
    }

    /// Appends an event.
    pub fn event(&self, event: &TimedEvent) {
        self.append(Line::Event(Box::new(event.clone())));
    }

    /// How long the files are after everything that was appended so far, once that is on the disk. Nothing comes if it
    /// cannot be written.
    pub fn position(&self) -> mpsc::Receiver<Position> {
        let (answer, position) = mpsc::sync_channel(1);
        self.append(Line::Mark(answer));
        position
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

/// A file, and what is wrong with it.
struct Sink {
    file: LogFile,
    troubles: Troubles,
    /// Lines that are missing because too many waited.
    left_out: u64,
}

impl Sink {
    /// Writes what waits and whatever else `then` does; tells of trouble that begins or is over.
    fn attempt(&mut self, then: impl FnOnce(&mut LogFile) -> io::Result<()>) -> bool {
        let name = self.file.path().display().to_string();
        match self.file.restore().and_then(|()| self.file.write()).and_then(|()| then(&mut self.file)) {
            Ok(()) => {
                let left_out = std::mem::take(&mut self.left_out);
                self.troubles.over(|| match left_out {
                    0 => format!("{name} is written again; nothing is missing in it"),
                    lines => format!("{name} is written again; {lines} lines are missing in it"),
                });
                true
            }
            Err(error) => {
                self.troubles
                    .began(format!("cannot write {name}: {error}; training goes on, its lines wait in memory"));
                false
            }
        }
    }

    fn is_overfull(&self) -> bool {
        self.file.waiting_bytes() > MAX_WAITING_BYTES
    }
}

struct Writer {
    chain: Chain,
    ledger: Sink,
    events: Sink,
    flushed: Instant,
}

impl Writer {
    fn run(mut self, queue: &mpsc::Receiver<Line>) {
        loop {
            let wait = FLUSH_INTERVAL.saturating_sub(self.flushed.elapsed());
            match queue.recv_timeout(wait) {
                Ok(line) => self.line(line),
                Err(mpsc::RecvTimeoutError::Timeout) => self.flush(),
                Err(mpsc::RecvTimeoutError::Disconnected) => break,
            }
        }
        for sink in [&mut self.ledger, &mut self.events] {
            sink.attempt(LogFile::sync);
        }
    }

    fn line(&mut self, line: Line) {
        match line {
            Line::Record(record) => {
                self.ledger.file.append(&self.chain.line(&record));
                if self.ledger.is_overfull() {
                    let (path, limit) = (self.ledger.file.path().display(), MAX_WAITING_BYTES >> 20);
                    self.ledger.troubles.fatal(format!(
                        "{path} could not be written for so long that {limit} MiB wait for it: a round that is not in the ledger is not proven"
                    ));
                }
            }
            Line::Event(_) if self.events.is_overfull() => self.events.left_out += 1,
            Line::Event(event) => match serde_json::to_string(&*event) {
                Ok(text) => self.events.file.append(&text),
                Err(error) => self.events.troubles.began(format!("an event has no JSON form: {error}")),
            },
            Line::Mark(answer) => return self.mark(&answer),
        }
        let full = |sink: &Sink| !sink.troubles.any() && sink.file.waiting_bytes() >= BUFFER_BYTES;
        if self.flushed.elapsed() >= FLUSH_INTERVAL || full(&self.ledger) || full(&self.events) {
            self.flush();
        }
    }

    fn flush(&mut self) {
        self.flushed = Instant::now();
        for sink in [&mut self.ledger, &mut self.events] {
            sink.attempt(|_| Ok(()));
        }
    }

    /// The answer is dropped if the ledger is not whole on the disk.
    fn mark(&mut self, answer: &mpsc::SyncSender<Position>) {
        self.flushed = Instant::now();
        // Events prove nothing: they may be behind, and what is behind is cut off when the run goes on.
        self.events.attempt(|_| Ok(()));
        if self.ledger.attempt(LogFile::sync) {
            let ledger = LedgerPosition { bytes: self.ledger.file.written_bytes(), chain: self.chain.last() };
            // It holds one answer, and whoever asked may be gone.
            let _ = answer.try_send(Position { ledger, events_bytes: self.events.file.written_bytes() });
        }
    }
}
