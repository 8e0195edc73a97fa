//! What is wrong with the files of a run, for people: told when it begins and when it is over.

use std::sync::mpsc;

/// Something about a file. Threads that write files send it, the driver shows it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Trouble {
    /// It cannot be written; it is tried again.
    Began {
        /// What it is about, such as a file's name.
        about: &'static str,
        /// What is wrong, and what happens now.
        message: String,
    },
    /// It can be written again.
    Over {
        /// What it is about.
        about: &'static str,
        /// What happened.
        message: String,
    },
    /// The run cannot go on like this.
    Fatal {
        /// Why.
        message: String,
    },
}

/// Where a thread tells of its troubles with one thing.
#[derive(Debug)]
pub(crate) struct Troubles {
    about: &'static str,
    sender: mpsc::Sender<Trouble>,
    /// The last message, while it lasts.
    current: Option<String>,
}

impl Troubles {
    pub(crate) fn new(about: &'static str, sender: mpsc::Sender<Trouble>) -> Self {
        Self { about, sender, current: None }
    }

    /// Whether there is trouble.
    pub(crate) fn any(&self) -> bool {
        self.current.is_some()
    }

    /// Tells of a problem, unless it is the one that was told last.
    pub(crate) fn began(&mut self, message: String) {
        if self.current.as_ref() != Some(&message) {
            self.current = Some(message.clone());
            // Nobody listens any more when the run is over.
            let _ = self.sender.send(Trouble::Began { about: self.about, message });
        }
    }

    /// Tells that the problem is over, if there was one.
    pub(crate) fn over(&mut self, message: impl FnOnce() -> String) {
        if self.current.take().is_some() {
            let _ = self.sender.send(Trouble::Over { about: self.about, message: message() });
        }
    }

    pub(crate) fn fatal(&self, message: String) {
        let _ = self.sender.send(Trouble::Fatal { message });
    }
}
