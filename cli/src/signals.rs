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

/// Waits until the user or the system asks this process to end.
pub(crate) async fn interrupted() -> String {
    ENDS_AT_ONCE.store(false, Ordering::Relaxed);
    #[cfg(unix)]
    {
        use tokio::signal::unix::{SignalKind, signal};
        if let Ok(mut terminate) = signal(SignalKind::terminate()) {
            tokio::select! {
                _ = tokio::signal::ctrl_c() => return "interrupted".to_owned(),
                _ = terminate.recv() => return "asked to terminate".to_owned(),
            }
        }
    }
    let _ = tokio::signal::ctrl_c().await;
    "interrupted".to_owned()
}
