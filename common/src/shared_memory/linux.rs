//! Sealed files in memory, mapped.

use std::ffi::c_void;
use std::os::fd::{AsRawFd, OwnedFd};
use std::ptr::{NonNull, null_mut};

use rustix::fs::{FallocateFlags, MemfdFlags, Mode, OFlags, SealFlags};
use rustix::mm::{MapFlags, ProtFlags};

use super::{Access, Offer, SharedMemoryError};

/// What a region's file is called in `/proc`, for people and as a first check.
const NAME: &str = "lockstep";

/// The length cannot change, and neither can the seals.
const LENGTH_SEALS: SealFlags = SealFlags::SHRINK.union(SealFlags::GROW).union(SealFlags::SEAL);

/// A mapped file.
pub(super) struct Mapping {
    start: NonNull<c_void>,
    bytes: usize,
    file: OwnedFd,
}

// SAFETY: a mapping belongs to the process, not to a thread.
unsafe impl Send for Mapping {}
// SAFETY: its methods only compute addresses and call the system; `Slot` says who may read and write.
unsafe impl Sync for Mapping {}

fn failed(what: &'static str) -> impl Fn(rustix::io::Errno) -> SharedMemoryError {
    move |errno| SharedMemoryError::System { what, cause: errno.into() }
}

impl Mapping {
    /// `bytes` is the file's length, which is sealed.
    fn new(file: OwnedFd, bytes: usize, writable: bool) -> Result<Self, SharedMemoryError> {
        let protection = if writable { ProtFlags::READ | ProtFlags::WRITE } else { ProtFlags::READ };
        // SAFETY: a new mapping at an address that the system chooses touches no other memory.
        let start = unsafe { rustix::mm::mmap(null_mut(), bytes, protection, MapFlags::SHARED, &file, 0) };
        let start = start.map_err(failed("cannot map shared memory"))?;
        let start = NonNull::new(start).ok_or_else(|| failed("mapped at 0")(rustix::io::Errno::NOMEM))?;
        Ok(Self { start, bytes, file })
    }

    /// An address in the mapping.
    pub(super) fn at(&self, offset: usize) -> NonNull<f32> {
        assert!(offset < self.bytes, "{offset} lies behind {} bytes", self.bytes);
        // SAFETY: within the mapping, by the line above.
        unsafe { self.start.cast::<u8>().add(offset) }.cast()
    }

    /// Has the system find memory for a part of the file, if that has none yet.
    pub(super) fn reserve(&self, offset: usize, len: usize) -> Result<(), SharedMemoryError> {
        let reserved = rustix::fs::fallocate(&self.file, FallocateFlags::KEEP_SIZE, offset as u64, len as u64);
        match reserved {
            // Opened for reading: the maker has reserved it, and reading what nobody wrote takes none.
            Err(rustix::io::Errno::BADF | rustix::io::Errno::PERM) => Ok(()),
            reserved => reserved.map_err(failed("no memory to share")),
        }
    }

    fn token(&self) -> u128 {
        let mut token = [0u8; 16];
        let words = self.start.cast::<u8>();
        for (i, byte) in token.iter_mut().enumerate() {
            // SAFETY: the first page, which is mapped for reading.
            *byte = unsafe { words.add(i).read_volatile() };
        }
        u128::from_le_bytes(token)
    }
}

impl Drop for Mapping {
    fn drop(&mut self) {
        // SAFETY: nobody holds an address in it: slots keep the region, and the region the mapping.
        let unmapped = unsafe { rustix::mm::munmap(self.start.as_ptr(), self.bytes) };
        debug_assert!(unmapped.is_ok(), "a mapping is unmapped once");
    }
}

pub(super) fn create(bytes: usize, access: Access) -> Result<(Mapping, u32, u128), SharedMemoryError> {
    let flags = MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING;
    let file = rustix::fs::memfd_create(NAME, flags).map_err(failed("cannot create shared memory"))?;
    rustix::fs::ftruncate(&file, bytes as u64).map_err(failed("cannot size shared memory"))?;
    let mut token = [0u8; 16];
    let random = rustix::rand::getrandom(&mut token, rustix::rand::GetRandomFlags::empty());
    random.map_err(failed("no random numbers"))?;
    rustix::io::pwrite(&file, &token, 0).map_err(failed("cannot write shared memory"))?;
    let descriptor = file.as_raw_fd() as u32;
    let mapping = Mapping::new(file, bytes, true)?;
    // After our own mapping: it stays writable, others cannot become so.
    let seals = match access {
        Access::Read => LENGTH_SEALS | SealFlags::FUTURE_WRITE,
        Access::Write => LENGTH_SEALS,
    };
    rustix::fs::fcntl_add_seals(&mapping.file, seals).map_err(failed("cannot seal shared memory"))?;
    Ok((mapping, descriptor, u128::from_le_bytes(token)))
}

pub(super) fn open(offer: &Offer, bytes: usize, access: Access) -> Result<Mapping, SharedMemoryError> {
    let Offer { process, descriptor, token, .. } = *offer;
    let foreign = |reason| SharedMemoryError::Foreign { process, descriptor, reason };
    let path = format!("/proc/{process}/fd/{descriptor}");
    // Before it is opened: opening a device can have consequences.
    let target = rustix::fs::readlink(&path, Vec::new()).map_err(failed("cannot look at offered memory"))?;
    if !target.to_bytes().starts_with(format!("/memfd:{NAME}").as_bytes()) {
        return Err(foreign("it is no shared memory"));
    }
    let writable = access == Access::Write;
    let mode = if writable { OFlags::RDWR } else { OFlags::RDONLY };
    let flags = mode | OFlags::CLOEXEC | OFlags::NONBLOCK | OFlags::NOCTTY;
    let file = rustix::fs::open(&path, flags, Mode::empty()).map_err(failed("cannot open offered memory"))?;
    let seals = rustix::fs::fcntl_get_seals(&file).map_err(failed("cannot read the seals of offered memory"))?;
    if !seals.contains(LENGTH_SEALS) {
        return Err(foreign("its length is not sealed"));
    }
    let status = rustix::fs::fstat(&file).map_err(failed("cannot measure offered memory"))?;
    if status.st_size as u64 != bytes as u64 {
        return Err(foreign("it has another length"));
    }
    let mapping = Mapping::new(file, bytes, writable)?;
    if mapping.token() != token {
        return Err(foreign("it begins with another token"));
    }
    Ok(mapping)
}
