//! What this machine can do at best: fused multiply-adds, and bytes to and from caches and memory.

use std::time::{Duration, Instant};

use lockstep_common::kernel::{Isa, probe};
use rayon::ThreadPool;
use serde::{Deserialize, Serialize};

use super::clock::{Effort, Measure, seconds_on_this_thread};

/// How long one look at the multiply-add rate takes: long against a timer tick, short against what it stands beside.
const LOOK: Duration = Duration::from_millis(4);

/// Bytes of a triad's three arrays that lie in a core's L2 cache, on any core of the last ten years with one of 1 MiB.
const L2_BYTES: usize = 768 << 10;

/// Bytes of all triads that lie in memory, unless a shared cache is larger than on any desktop.
const MEMORY_BYTES: usize = 384 << 20;

/// Multiply-adds that touch no memory, in GFLOP/s.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(super) struct Peak {
    pub(super) isa: String,
    pub(super) threads: usize,
    pub(super) gflops: Measure,
}

/// `a = b + s c` over arrays of together so many bytes for each thread.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(super) struct Bandwidth {
    pub(super) threads: usize,
    pub(super) bytes_per_thread: usize,
    pub(super) gbytes_per_second: Measure,
}

/// A loop of multiply-adds, to be run beside whatever is measured: it shows what the machine had to give at that time.
pub(super) struct Calibration<'a> {
    isa: Isa,
    pool: &'a ThreadPool,
    steps: usize,
}

impl<'a> Calibration<'a> {
    pub(super) fn new(isa: Isa, pool: &'a ThreadPool) -> Self {
        // Doubled until a look is long enough.
        let long_enough = |steps: &usize| {
            let (seconds, _) = seconds_on_this_thread(|| probe::multiply_adds(isa, *steps));
            seconds >= LOOK.as_secs_f64()
        };
        let steps = std::iter::successors(Some(1 << 10), |steps| Some(steps * 2)).find(long_enough);
        Self { isa, pool, steps: steps.unwrap_or(1 << 10) }
    }

    /// GFLOP/s of the calling thread while it has a core.
    pub(super) fn one_thread(&self) -> f64 {
        let (seconds, flops) = seconds_on_this_thread(|| probe::multiply_adds(self.isa, self.steps));
        flops as f64 / seconds.max(1e-9) * 1e-9
    }

    /// GFLOP/s of all threads together by the clock on the wall: what other processes take is missing.
    pub(super) fn all_threads(&self) -> f64 {
        let rates = self.pool.broadcast(|_| {
            let started = Instant::now();
            let flops = probe::multiply_adds(self.isa, self.steps);
            flops as f64 / started.elapsed().as_secs_f64().max(1e-9) * 1e-9
        });
        rates.iter().sum()
    }
}

/// The peaks of `sets` on one thread and on the pool's.
pub(super) fn peaks(sets: &[Isa], pool: &ThreadPool, effort: Effort) -> Vec<Peak> {
    let mut peaks = Vec::new();
    for &isa in sets {
        let calibration = Calibration::new(isa, pool);
        let mut measure = |threads: usize, once: &dyn Fn() -> f64| {
            let mut rates = Vec::new();
            effort.repeat(|| rates.push(once()));
            peaks.push(Peak { isa: isa.name().to_owned(), threads, gflops: Measure::of(rates) });
        };
        measure(1, &|| calibration.one_thread());
        if pool.current_num_threads() > 1 {
            measure(pool.current_num_threads(), &|| calibration.all_threads());
        }
    }
    peaks
}

/// The bandwidth of caches and memory for one thread and for the pool's.
pub(super) fn bandwidths(isa: Isa, pool: &ThreadPool, effort: Effort) -> Vec<Bandwidth> {
    let all = pool.current_num_threads();
    let mut bandwidths = Vec::new();
    for bytes in [L2_BYTES, MEMORY_BYTES / all] {
        let one = rayon::ThreadPoolBuilder::new().num_threads(1).build();
        let alone = one.as_ref().ok().filter(|_| all > 1).map(|pool| (1, pool));
        for (threads, pool) in alone.into_iter().chain([(all, pool)]) {
            let gbytes_per_second = triads(isa, pool, bytes, effort);
            bandwidths.push(Bandwidth { threads, bytes_per_thread: bytes, gbytes_per_second });
        }
    }
    bandwidths
}

fn triads(isa: Isa, pool: &ThreadPool, bytes: usize, effort: Effort) -> Measure {
    let floats = bytes / 3 / size_of::<f32>();
    // Small arrays are gone through several times, so that the clock does not show.
    let times = (MEMORY_BYTES / 8 / bytes).max(1);
    let arrays = |_: usize| std::sync::Mutex::new([vec![0.0f32; floats], vec![1.0; floats], vec![2.0; floats]]);
    let arrays: Vec<_> = (0..pool.current_num_threads()).map(arrays).collect();
    let mut rates = Vec::new();
    effort.repeat(|| {
        let of_threads = pool.broadcast(|context| {
            let mut arrays = arrays[context.index()].lock().unwrap_or_else(|broken| broken.into_inner());
            let [a, b, c] = &mut *arrays;
            let started = Instant::now();
            for _ in 0..times {
                probe::triad(isa, std::hint::black_box(a), b, c, 3.0);
            }
            (times * 3 * floats * size_of::<f32>()) as f64 / started.elapsed().as_secs_f64().max(1e-9)
        });
        rates.push(of_threads.iter().sum::<f64>() * 1e-9);
    });
    Measure::of(rates)
}
