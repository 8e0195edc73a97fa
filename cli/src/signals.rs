//! Being asked to end: by Ctrl-C, or by the system's SIGTERM.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, LazyLock};

use anyhow::Context;

/// Whether a signal ends this process at once, where the kernel would not: see [`end_process_one`].
static ENDS_AT_ONCE: LazyLock<Arc<AtomicBool>> = LazyLock::new(|| Arc::new(AtomicBool::new(true)));

/// Has SIGINT and SIGTERM end this process if it is number 1, as in a container. The kernel spares that one: without
/// this, `docker stop` would wait in vain for a program that has no handler, or not yet.
pub(crate) fn end_process_one() -> anyhow::Result<()> {
    #[cfg(unix)]
    if std::process::id() == 1 {
        use signal_hook::consts::{SIGINT, SIGTERM};
        for signal in [SIGINT, SIGTERM] {
            // The exit code of a process that a signal has ended, as shells give it.
            signal_hook::flag::register_conditional_shutdown(signal, 128 + signal, ENDS_AT_ONCE.clone())
                .context("cannot handle signals")?;
        }
    }
    Ok(())
}

/// Who is asked to end, by Ctrl-C or by the system's SIGTERM. Being asked while nobody waits is not forgotten.
pub(crate) struct Asked {
    #[cfg(unix)]
    signals: Option<[tokio::signal::unix::Signal; 2]>,
}

impl Asked {
    /// Listens from now on. Needs the async runtime.
    pub(crate) fn listen() -> Self {
        ENDS_AT_ONCE.store(false, Ordering::Relaxed);
        #[cfg(unix)]
        {
            use tokio::signal::unix::{SignalKind, signal};
            let both = signal(SignalKind::interrupt()).and_then(|first| Ok([first, signal(SignalKind::terminate())?]));
            Self { signals: both.ok() }
        }
        #[cfg(not(unix))]
        Self {}
    }

    /// Waits until it is asked once more. Returns by whom, in words.
    pub(crate) async fn wait(&mut self) -> String {
        #[cfg(unix)]
        if let Some([interrupt, terminate]) = &mut self.signals {
            return tokio::select! {
                _ = interrupt.recv() => "interrupted".to_owned(),
                _ = terminate.recv() => "asked to terminate".to_owned(),
            };
        }
        let _ = tokio::signal::ctrl_c().await;
        "interrupted".to_owned()
    }
}

#[cfg(all(test, unix))]
mod tests {
    use signal_hook::consts::{SIGINT, SIGTERM};
    use signal_hook::low_level::raise;

    use super::*;

    #[tokio::test]
    async fn being_asked_while_nobody_waits_is_not_forgotten() {
        let (mut asked, mut witness) = (Asked::listen(), Asked::listen());
        for (signal, by_whom) in [(SIGTERM, "asked to terminate"), (SIGINT, "interrupted")] {
            raise(signal).unwrap();
            // Once one listener knows of it, the others were told.
            assert_eq!(witness.wait().await, by_whom);
            assert_eq!(asked.wait().await, by_whom);
        }
    }
}
