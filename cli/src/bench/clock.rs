//! Time, and figures that were measured more than once.

use std::fmt;
use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};

/// CPU time that the calling thread has used: what other processes take of the core is left out. Where the system
/// cannot tell, time as it passes.
pub(super) fn thread_time() -> Duration {
    #[cfg(unix)]
    {
        let time = rustix::time::clock_gettime(rustix::time::ClockId::ThreadCPUTime);
        Duration::new(time.tv_sec as u64, time.tv_nsec as u32)
    }
    #[cfg(not(unix))]
    {
        static START: std::sync::OnceLock<Instant> = std::sync::OnceLock::new();
        START.get_or_init(Instant::now).elapsed()
    }
}

/// How long `work` takes on the calling thread, in seconds of [`thread_time`].
pub(super) fn seconds_on_this_thread<T>(work: impl FnOnce() -> T) -> (f64, T) {
    let started = thread_time();
    let result = work();
    ((thread_time() - started).as_secs_f64(), result)
}

/// A figure that was measured `count` times.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub(super) struct Measure {
    pub(super) median: f64,
    pub(super) min: f64,
    pub(super) max: f64,
    pub(super) count: usize,
}

impl Measure {
    /// The middle and the ends of `values`; of an even number of values, the upper middle. All 0 if there are none.
    pub(super) fn of(mut values: Vec<f64>) -> Self {
        values.sort_by(f64::total_cmp);
        let at = |i: usize| values.get(i).copied().unwrap_or(0.0);
        Self { median: at(values.len() / 2), min: at(0), max: at(values.len().saturating_sub(1)), count: values.len() }
    }

    /// The same in another unit.
    pub(super) fn scaled(self, factor: f64) -> Self {
        let Self { median, min, max, count } = self;
        Self { median: median * factor, min: min * factor, max: max * factor, count }
    }

    /// `amount / value`, for a value that is a time. The shortest time gives the highest rate.
    pub(super) fn rate(self, amount: f64) -> Self {
        let per = |seconds: f64| if seconds > 0.0 { amount / seconds } else { 0.0 };
        Self { median: per(self.median), min: per(self.max), max: per(self.min), count: self.count }
    }
}

/// The median, and the ends with as many digits as the formatter's precision says.
impl fmt::Display for Measure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let digits = f.precision().unwrap_or(1);
        let Self { median, min, max, .. } = self;
        write!(f, "{median:.digits$} [{min:.digits$}-{max:.digits$}]")
    }
}

/// How often something is measured: until `time` has passed, but at least [`Effort::LEAST`] and at most
/// [`Effort::MOST`] times.
#[derive(Clone, Copy, Debug)]
pub(super) struct Effort {
    pub(super) time: Duration,
}

impl Effort {
    /// Enough for a median that one outlier does not move.
    const LEAST: usize = 5;
    /// More do not make a median better.
    const MOST: usize = 1000;

    /// Calls `once` again and again.
    pub(super) fn repeat(self, mut once: impl FnMut()) {
        let started = Instant::now();
        for count in 0..Self::MOST {
            if count >= Self::LEAST && started.elapsed() >= self.time {
                return;
            }
            once();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn measures_are_medians_with_ends() {
        let measure = Measure::of(vec![3.0, 1.0, 2.0, 10.0, 4.0]);
        assert_eq!(measure, Measure { median: 3.0, min: 1.0, max: 10.0, count: 5 });
        assert_eq!(measure.rate(30.0), Measure { median: 10.0, min: 3.0, max: 30.0, count: 5 });
        assert_eq!(measure.scaled(2.0).to_string(), "6.0 [2.0-20.0]");
        assert_eq!(Measure::of(Vec::new()).rate(1.0).max, 0.0);
    }

    #[test]
    fn efforts_end() {
        let count = |time| {
            let mut count = 0;
            Effort { time }.repeat(|| count += 1);
            count
        };
        assert_eq!((count(Duration::ZERO), count(Duration::MAX)), (Effort::LEAST, Effort::MOST));
    }

    #[test]
    fn the_threads_clock_runs_while_it_works() {
        let (seconds, sum) =
            seconds_on_this_thread(|| (0..1_000_000u64).fold(1u64, |a, b| std::hint::black_box(a ^ b)));
        assert!(seconds > 0.0, "{sum}");
    }
}
