//! What reads a file takes memory for what is in it, and not for what it says to have: an allocator that counts sees none
//! asked for beyond a few times the file's length.

use std::alloc::{GlobalAlloc, Layout, System};
use std::io::Cursor;
use std::num::NonZeroU32;
use std::path::Path;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use lockstep_common::checkpoint::{KnownWorker, LedgerPosition, Shown, Standing, State, format};
use lockstep_common::data::{idx, npy, npz};
use lockstep_common::hash::{Digest, DigestBuilder};
use lockstep_common::ledger::{AUDIT_BYTES_PER_SAMPLE, Chain, Header, audit};
use lockstep_common::model::{LayoutHash, ModelSpec};
use lockstep_common::model_file::TrainedModel;
use lockstep_common::optim::adam::Moments;
use lockstep_common::reduce::Tree;
use lockstep_common::shard::{MAX_SAMPLES, Schedule};

/// The system's allocator, counting.
struct Counting;

/// Bytes in use, and the most that were since [`peak_of`] began.
static USED: AtomicUsize = AtomicUsize::new(0);
static PEAK: AtomicUsize = AtomicUsize::new(0);

fn grown(bytes: usize) {
    let used = USED.fetch_add(bytes, Ordering::Relaxed) + bytes;
    PEAK.fetch_max(used, Ordering::Relaxed);
}

// SAFETY: every call goes to the system's allocator as it is.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        grown(layout.size());
        // SAFETY: the caller's promise.
        unsafe { System.alloc(layout) }
    }

    unsafe fn alloc_zeroed(&self, layout: Layout) -> *mut u8 {
        grown(layout.size());
        // SAFETY: the caller's promise.
        unsafe { System.alloc_zeroed(layout) }
    }

    unsafe fn dealloc(&self, pointer: *mut u8, layout: Layout) {
        USED.fetch_sub(layout.size(), Ordering::Relaxed);
        // SAFETY: the caller's promise.
        unsafe { System.dealloc(pointer, layout) }
    }

    unsafe fn realloc(&self, pointer: *mut u8, layout: Layout, size: usize) -> *mut u8 {
        grown(size);
        USED.fetch_sub(layout.size(), Ordering::Relaxed);
        // SAFETY: the caller's promise.
        unsafe { System.realloc(pointer, layout, size) }
    }
}

#[global_allocator]
static ALLOCATOR: Counting = Counting;

/// The most memory that `work` held at a time, beyond what there was before.
fn peak_of<T>(work: impl FnOnce() -> T) -> (usize, T) {
    let before = USED.load(Ordering::Relaxed);
    PEAK.store(before, Ordering::Relaxed);
    let made = work();
    (PEAK.load(Ordering::Relaxed) - before, made)
}

/// Messages, headers, the decoders' own tables.
const ALLOWANCE: usize = 256 * 1024;

/// Reads a file that claims too much. Property: it is refused, and no more memory was taken than a few times its length.
fn check<T>(name: &str, file: &[u8], read: impl FnOnce(&[u8]) -> Result<T, String>) {
    check_with(ALLOWANCE, name, file, read);
}

fn check_with<T>(allowance: usize, name: &str, file: &[u8], read: impl FnOnce(&[u8]) -> Result<T, String>) {
    let (peak, refused) = peak_of(|| read(file).err());
    let most = allowance + 8 * file.len();
    assert!(peak <= most, "{name}: {peak} bytes of memory for a file of {} bytes", file.len());
    assert!(refused.is_some(), "{name} was read");
}

fn text(error: impl std::fmt::Display) -> String {
    error.to_string()
}

fn schedule(samples: u32, batch_size: u32, shards: u32) -> Schedule {
    let some = |number| NonZeroU32::new(number).expect("not zero");
    let (samples, batch_size) = (some(samples), some(batch_size));
    Schedule { seed: 1, samples, batch_size, tree: Tree::over(shards).expect("a power of two"), shuffle: true }
}

fn ledger_of(schedule: &Schedule) -> Vec<u8> {
    Chain::start(&Header::new("memory", schedule, LayoutHash(1), Digest(1))).1.into_bytes()
}

fn idx_of(code: u8, axes: &[u32]) -> Vec<u8> {
    let axes_bytes = axes.iter().flat_map(|axis| axis.to_be_bytes());
    [0, 0, code, axes.len() as u8].into_iter().chain(axes_bytes).chain([1; 100]).collect()
}

fn npy_of(dtype: &str, shape: &str, elements: usize) -> Vec<u8> {
    let header = format!("{{'descr': '{dtype}', 'fortran_order': False, 'shape': {shape}, }}");
    let mut file = b"\x93NUMPY\x01\x00\x76\x00".to_vec();
    file.extend(format!("{header:117}\n").bytes());
    file.resize(file.len() + elements, 1);
    file
}

fn npz_of(array: &[u8]) -> Vec<u8> {
    let mut archive = zip::ZipWriter::new(Cursor::new(Vec::new()));
    let stored = zip::write::SimpleFileOptions::default().compression_method(zip::CompressionMethod::Stored);
    archive.start_file("x.npy", stored).expect("an entry");
    std::io::Write::write_all(&mut archive, array).expect("an array");
    archive.finish().expect("an archive").into_inner()
}

/// A model file of a few bytes whose model has gigabytes of weights.
fn model_file() -> Vec<u8> {
    let layer = |units: u32| format!("{{ layer = \"dense\", units = {units} }}");
    let model = format!(
        "name = \"huge\"\ninput = [16384]\nencoder = [{}]\ndecoder = [{}]\n",
        vec![layer(16_384); 40].join(", "),
        layer(16_384)
    );
    let spec = ModelSpec::from_toml(&model).expect("a model's text");
    assert!(spec.resolve().expect("a valid model").layout.parameters() > 10 << 30, "it claims more than 40 GB");
    let metadata = [("lockstep_model", model.as_str()), ("params_sha256", ""), ("rounds", "1"), ("loss", "mse")];
    let metadata = metadata.map(|(key, value)| (key.to_owned(), value.to_owned())).into_iter().collect();
    let bytes = [0u8; 4];
    let view = safetensors::tensor::TensorView::new(safetensors::Dtype::F32, vec![1], &bytes).expect("a tensor");
    safetensors::serialize([("encoder.0.dense.bias", view)], Some(metadata)).expect("a file")
}

fn checkpoint() -> Vec<u8> {
    let state = State {
        version: "0".to_owned(),
        config: "c".repeat(1000),
        layout: LayoutHash(1),
        fingerprint: Digest(1),
        data: Digest(1),
        restarts: 0,
        standing: Standing { workers: Vec::<KnownWorker>::new(), ..Standing::default() },
        ledger: LedgerPosition { bytes: 1, chain: Digest(1) },
        events_bytes: 1,
        shown: Shown { loss: None, train_loss: None, validation_loss: None, training_time: Duration::ZERO },
    };
    let mut file = Vec::new();
    let moments = Moments::zero(10);
    format::write(&mut file, &state, &[0.0; 10], &moments).expect("memory takes it");
    file
}

/// Puts `bytes` at `at`, and the right checksum of everything before `end` behind it.
fn with_checksum(mut file: Vec<u8>, at: usize, bytes: &[u8], content: std::ops::Range<usize>) -> Vec<u8> {
    file[at..at + bytes.len()].copy_from_slice(bytes);
    let mut digest = DigestBuilder::default();
    digest.bytes(&file[content.clone()]);
    file[content.end..content.end + 16].copy_from_slice(&digest.finish().0.to_le_bytes());
    file
}

/// One test, because the allocator counts what all threads ask for.
#[test]
fn no_claim_takes_memory() {
    // What an honest ledger of 100,000 samples takes is what the auditor says; a short one that claims 2^28 gets nothing.
    let honest = ledger_of(&schedule(100_000, 256, 16));
    let (peak, audited) = peak_of(|| audit(&honest[..], 100_000));
    audited.expect("no rounds are proven");
    let most = ALLOWANCE + 100_000 * AUDIT_BYTES_PER_SAMPLE as usize;
    assert!(peak <= most, "an audit of 100,000 samples took {peak} bytes");
    let read = |file: &[u8]| audit(file, 1 << 20).map_err(text);
    check("a ledger", &ledger_of(&schedule(MAX_SAMPLES, 256, 16)), read);
    check("a ledger of many shards", &ledger_of(&schedule(u32::MAX, u32::MAX, 65_536)), read);

    let axes: [&[u32]; 4] = [&[u32::MAX, 1], &[1 << 30, 2, 2], &[1 << 31, 1 << 31], &[2, u32::MAX, u32::MAX]];
    for axes in axes {
        check("IDX", &idx_of(8, axes), |file| idx::read("d", file).map_err(text));
        check("IDX of floats", &idx_of(13, axes), |file| idx::read("d", file).map_err(text));
    }
    check("IDX of labels", &idx_of(8, &[u32::MAX]), |file| idx::read_labels("d", file).map_err(text));
    check("IDX of many axes", &idx_of(8, &[1; 255]), |file| idx::read("d", file).map_err(text));
    for dtype in ["|u1", "<f4", ">f4", "<f8"] {
        for shape in ["(4294967296, 4)", "(1, 9223372036854775807)", "(99999999, 28, 28)"] {
            let file = npy_of(dtype, shape, 100_000);
            check("NPY", &file, |file| npy::read("d", file).map_err(text));
            check("NPZ", &npz_of(&file), |file| npz::read("d", Cursor::new(file)).map_err(text));
        }
    }
    let mut header = b"\x93NUMPY\x02\x00".to_vec();
    header.extend([0xff; 8]);
    check("NPY's header", &header, |file| npy::read("d", file).map_err(text));

    check("a model", &model_file(), |file| TrainedModel::parse(Path::new("m"), file).map_err(text));
    let mut long_header = (1u64 << 40).to_le_bytes().to_vec();
    long_header.extend([b'{'; 50]);
    check("safetensors' header", &long_header, |file| TrainedModel::parse(Path::new("m"), file).map_err(text));

    let read = |file: &[u8]| format::read(file, file.len() as u64).map_err(text);
    let whole = checkpoint();
    read(&whole).expect("an honest one is read");
    for parameters in [11u64, 1 << 32, u64::MAX] {
        check("a checkpoint", &with_checksum(whole.clone(), 16, &parameters.to_le_bytes(), 0..24), read);
    }
    check("a checkpoint's state", &with_checksum(whole.clone(), 12, &(16u32 << 20).to_le_bytes(), 0..24), read);
    // The first thing in a state is the length of a text: it says to have 15 MiB. A state may have 16.
    let content = 40..whole.len() - 16;
    let long_text = with_checksum(whole, 40, &(15u64 << 20).to_le_bytes(), content);
    check_with(16 << 20, "a text in a state", &long_text, read);
}
