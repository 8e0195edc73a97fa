//! Processes of the real program, watched and never left behind.

use std::io::{BufRead, BufReader, Read};
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::mpsc::{self, Receiver, RecvTimeoutError};
use std::thread;
use std::time::{Duration, Instant};

/// Nothing here takes a tenth of this; what does hangs.
pub(crate) const WATCHDOG: Duration = Duration::from_secs(120);

/// A process of the program. It and its children are killed when this value is dropped.
pub(crate) struct Running {
    command: String,
    child: Child,
    lines: Receiver<Line>,
    stdout: String,
    stderr: String,
    open: usize,
}

/// A line of one of the two streams; `None` at the stream's end.
struct Line {
    stream: Stream,
    text: Option<String>,
}

#[derive(Clone, Copy, PartialEq)]
enum Stream {
    Out,
    Err,
}

/// A process that has ended.
#[derive(Debug)]
pub(crate) struct Ended {
    pub(crate) command: String,
    pub(crate) status: ExitStatus,
    pub(crate) stdout: String,
    pub(crate) stderr: String,
}

impl Ended {
    /// Checks the exit code.
    pub(crate) fn expect_code(self, code: i32) -> Self {
        let Self { command, status, stdout, stderr } = &self;
        let shown = format!("{command}\nended with {status}\nstdout:\n{stdout}\nstderr:\n{stderr}");
        assert_eq!(status.code(), Some(code), "{shown}");
        self
    }
}

impl Running {
    /// Starts the program with `arguments` in `directory`.
    pub(crate) fn start<S: AsRef<str>>(directory: &Path, arguments: &[S]) -> Self {
        Self::start_with(directory, arguments, &[])
    }

    /// Starts the program with `arguments` in `directory`, with more variables in its environment.
    pub(crate) fn start_with<S: AsRef<str>>(directory: &Path, arguments: &[S], variables: &[(&str, &str)]) -> Self {
        let arguments: Vec<&str> = arguments.iter().map(AsRef::as_ref).collect();
        let mut child = Command::new(env!("CARGO_BIN_EXE_lockstep"))
            .args(&arguments)
            .current_dir(directory)
            .env_remove("LOCKSTEP_LOG")
            .env_remove("LOCKSTEP_JOIN_TOKEN")
            .env_remove("LOCKSTEP_WATCH_TOKEN")
            .env_remove("LOCKSTEP_CONTROL_TOKEN")
            .envs(variables.iter().copied())
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            // A group of its own, so that its workers can be killed with it.
            .process_group(0)
            .spawn()
            .expect("the program starts");
        let (sender, lines) = mpsc::channel();
        let out = child.stdout.take().expect("its standard output");
        let err = child.stderr.take().expect("its standard error");
        read(Stream::Out, out, sender.clone());
        read(Stream::Err, err, sender);
        let command = format!("lockstep {}", arguments.join(" "));
        Self { command, child, lines, stdout: String::new(), stderr: String::new(), open: 2 }
    }

    /// Reads on until a line of either stream contains `text`; lines read before do not count. Returns the line.
    pub(crate) fn wait_for_line(&mut self, text: &str) -> String {
        loop {
            match self.next_line(&format!("a line with {text:?}")) {
                Some(line) if line.contains(text) => return line,
                Some(_) => {}
                None => panic!("{text:?} did not come from {}", self.shown()),
            }
        }
    }

    /// Waits until each of these texts has come in a line of output, in any order. Returns those lines.
    pub(crate) fn wait_for_lines<const N: usize>(&mut self, texts: [&str; N]) -> [String; N] {
        let mut lines = texts.map(|_| None);
        while lines.iter().any(Option::is_none) {
            let Some(line) = self.next_line(&format!("lines with {texts:?}")) else {
                panic!("not all of {texts:?} came from {}", self.shown())
            };
            for (text, found) in texts.iter().zip(&mut lines) {
                if found.is_none() && line.contains(text) {
                    *found = Some(line.clone());
                }
            }
        }
        lines.map(Option::unwrap_or_default)
    }

    /// The next line of either stream; `None` when both have ended.
    fn next_line(&mut self, awaited: &str) -> Option<String> {
        let deadline = Instant::now() + WATCHDOG;
        while self.open > 0 {
            match self.lines.recv_timeout(deadline.saturating_duration_since(Instant::now())) {
                Ok(Line { text: None, .. }) => self.open -= 1,
                Ok(Line { stream, text: Some(line) }) => {
                    let read = if stream == Stream::Out { &mut self.stdout } else { &mut self.stderr };
                    read.push_str(&line);
                    read.push('\n');
                    return Some(line);
                }
                Err(RecvTimeoutError::Timeout) => {
                    panic!("waited {} s for {awaited} from {}", WATCHDOG.as_secs(), self.shown())
                }
                Err(RecvTimeoutError::Disconnected) => break,
            }
        }
        None
    }

    fn shown(&self) -> String {
        format!("{}\nstdout so far:\n{}\nstderr so far:\n{}", self.command, self.stdout, self.stderr)
    }

    /// Its number.
    pub(crate) fn id(&self) -> u32 {
        self.child.id()
    }

    /// What it has said on standard error, as far as it was read.
    pub(crate) fn stderr(&self) -> &str {
        &self.stderr
    }

    /// Waits until the process has ended.
    pub(crate) fn end(mut self) -> Ended {
        while self.next_line("the end").is_some() {}
        let status = self.child.wait().expect("the process can be waited for");
        let (stdout, stderr) = (std::mem::take(&mut self.stdout), std::mem::take(&mut self.stderr));
        Ended { command: self.command.clone(), status, stdout, stderr }
    }

    /// Sends SIGTERM.
    pub(crate) fn terminate(&self) {
        signal("TERM", &self.child.id().to_string());
    }

    /// Sends SIGSTOP: the process keeps its connections, but does nothing any more.
    pub(crate) fn freeze(&self) {
        signal("STOP", &self.child.id().to_string());
    }

    /// Sends SIGKILL to it and to every process that it has started, and waits until it is gone.
    pub(crate) fn kill_all(mut self) {
        signal("KILL", &format!("-{}", self.child.id()));
        self.child.wait().expect("the process can be waited for");
    }

    /// Sends SIGKILL to it alone, and waits until nobody is left who could print into its streams: not those either whom
    /// it has started.
    pub(crate) fn kill_and_wait_for_heirs(mut self) -> Ended {
        self.child.kill().expect("the process can be killed");
        self.end()
    }

    /// Sends SIGKILL and waits until it is gone.
    pub(crate) fn kill(mut self) {
        self.child.kill().expect("the process can be killed");
        self.child.wait().expect("the process can be waited for");
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        if let Ok(None) = self.child.try_wait() {
            signal("KILL", &format!("-{}", self.child.id()));
            let _ = self.child.wait();
        }
    }
}

fn signal(name: &str, process: &str) {
    let status = Command::new("kill").args([&format!("-{name}"), "--", process]).status();
    assert!(status.expect("kill starts").success(), "kill -{name} -- {process}");
}

/// Reads a stream to its end on a thread, so that a full pipe never holds up the program.
fn read(stream: Stream, from: impl Read + Send + 'static, lines: mpsc::Sender<Line>) {
    thread::spawn(move || {
        for line in BufReader::new(from).lines() {
            let text = line.unwrap_or_else(|error| format!("(unreadable: {error})"));
            if lines.send(Line { stream, text: Some(text) }).is_err() {
                return;
            }
        }
        let _ = lines.send(Line { stream, text: None });
    });
}
