//! Memory that processes of one host share, for tensors that need not travel then.
//!
//! A [`Region`] is an anonymous file (Linux' `memfd`) of equal slots, mapped by the process that made it and by those
//! that opened it after an [`Offer`]. A [`Slot`] is one vector of floats in it. Who holds which slot is agreed on by
//! messages, never by the memory itself: it holds floats and nothing else that anybody acts on.
//!
//! The one place outside the kernels with `unsafe` code: a mapping is a pointer with a length, and nothing safe makes a
//! slice of it. What a peer can and cannot do:
//!
//! - **Shorten the file**, so that reading it kills the reader: no. The file is sealed against another length before it
//!   is offered, and one that is not sealed, or has another length than it should, is not mapped.
//! - **Write what it should only read**: no. Regions that peers read are sealed against writing as well.
//! - **Write while the other reads**: yes, if it breaks the protocol, in regions that it may write. The reader gets other
//!   floats then. It adds them; no index, length or decision comes from them. It is as if the peer had sent other floats.
//! - **Die**: its mappings go, ours stay.
//!
//! Elsewhere than on Linux there are no regions, and tensors travel.

mod buffer;
#[cfg_attr(target_os = "linux", path = "linux.rs")]
#[cfg_attr(not(target_os = "linux"), path = "elsewhere.rs")]
mod system;

use std::fmt;
use std::ops::{Deref, DerefMut};
use std::ptr::NonNull;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, OnceLock};

pub use buffer::FloatBuffer;

/// The most slots of a region: one bit for each in a word.
pub const MAX_SLOTS: u32 = 64;

/// Bytes before the first slot, and what a slot's size is a multiple of: a page.
const PAGE: usize = 4096;

/// What those that open a region may do with it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Access {
    /// Read it. The region's maker writes.
    Read,
    /// Write it. The region's maker reads.
    Write,
}

/// Where a region is found by other processes of this host.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Offer {
    /// Process that made it.
    pub process: u32,
    /// Number of its file there.
    pub descriptor: u32,
    /// What stands at its beginning: whoever reads this sees the same memory, and no other process' by mistake.
    pub token: u128,
    /// Number of slots.
    pub slots: u32,
}

/// Why there is no shared memory.
#[derive(Debug, thiserror::Error)]
pub enum SharedMemoryError {
    /// The system refused.
    #[error("{what}: {cause}")]
    System {
        /// What was tried.
        what: &'static str,
        /// The system's answer.
        cause: std::io::Error,
    },
    /// Another file is found at the offered place: the other process runs elsewhere, or is gone.
    #[error("file {descriptor} of process {process} is not the offered memory: {reason}")]
    Foreign {
        /// The offered process.
        process: u32,
        /// The offered file.
        descriptor: u32,
        /// How that is known.
        reason: &'static str,
    },
    /// It would have no slots, more than there may be, or not fit into memory.
    #[error("shared memory of {slots} slots of {floats} floats cannot be")]
    Size {
        /// Number of slots.
        slots: u32,
        /// Floats of each.
        floats: usize,
    },
}

/// Called with a slot's number when it is free again.
type Released = Box<dyn Fn(u32) + Send + Sync>;

/// Slots of floats in memory that several processes have mapped. See the module's documentation.
pub struct Region {
    mapping: system::Mapping,
    offer: Offer,
    floats: usize,
    /// Whether this process may write.
    writable: bool,
    /// A bit for each slot that nobody here holds.
    free: AtomicU64,
    /// A bit for each slot that is known to have memory.
    reserved: AtomicU64,
    released: OnceLock<Released>,
}

impl fmt::Debug for Region {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { offer, floats, writable, .. } = self;
        write!(f, "Region {{ {offer:?}, floats: {floats}, writable: {writable} }}")
    }
}

/// From one slot's beginning to the next one's, and the length of the whole, in bytes.
fn sizes(slots: u32, floats: usize) -> Result<(usize, usize), SharedMemoryError> {
    let wrong = SharedMemoryError::Size { slots, floats };
    if slots == 0 || slots > MAX_SLOTS || floats == 0 {
        return Err(wrong);
    }
    let stride = floats.checked_mul(size_of::<f32>()).and_then(|bytes| bytes.checked_next_multiple_of(PAGE));
    let whole = stride.and_then(|stride| stride.checked_mul(slots as usize)?.checked_add(PAGE));
    match (stride, whole) {
        (Some(stride), Some(whole)) if isize::try_from(whole).is_ok() => Ok((stride, whole)),
        _ => Err(wrong),
    }
}

impl Region {
    /// A region of `slots` slots of `floats` zeros each, that other processes may open for `access`. No memory is taken
    /// before a slot is used.
    ///
    /// # Errors
    /// [`SharedMemoryError`] when the system has no such thing, or no memory for it.
    pub fn create(slots: u32, floats: usize, access: Access) -> Result<Self, SharedMemoryError> {
        let (_, bytes) = sizes(slots, floats)?;
        let (mapping, descriptor, token) = system::create(bytes, access)?;
        let offer = Offer { process: std::process::id(), descriptor, token, slots };
        // Its maker writes the token in any case.
        Ok(Self::new(mapping, offer, floats, true))
    }

    /// Opens the region that another process of this host offers, whose slots must have `floats` floats.
    ///
    /// # Errors
    /// [`SharedMemoryError`] when it cannot be seen from here, or is not what was offered.
    pub fn open(offer: Offer, floats: usize, access: Access) -> Result<Self, SharedMemoryError> {
        let (_, bytes) = sizes(offer.slots, floats)?;
        let mapping = system::open(&offer, bytes, access)?;
        Ok(Self::new(mapping, offer, floats, access == Access::Write))
    }

    fn new(mapping: system::Mapping, offer: Offer, floats: usize, writable: bool) -> Self {
        let free = AtomicU64::new(u64::MAX >> (MAX_SLOTS - offer.slots));
        Self { mapping, offer, floats, writable, free, reserved: AtomicU64::new(0), released: OnceLock::new() }
    }

    /// Has `released` called with the number of each slot that is dropped from now on; only the first call counts.
    pub fn on_release(&self, released: impl Fn(u32) + Send + Sync + 'static) {
        // Each region has one user, which sets this once.
        let _ = self.released.set(Box::new(released));
    }

    /// How other processes find it.
    pub fn offer(&self) -> Offer {
        self.offer
    }

    /// A slot that nobody in this process holds, with memory behind it; `None` if there is none.
    pub fn take(self: &Arc<Self>) -> Option<Slot> {
        (0..self.offer.slots).find_map(|slot| self.claim(slot))
    }

    /// The slot with this number; `None` if there is no such slot, no memory for it, or if somebody in this process holds
    /// it already.
    pub fn claim(self: &Arc<Self>, slot: u32) -> Option<Slot> {
        let bit = 1u64.checked_shl(slot)?;
        let was_free = slot < self.offer.slots && self.free.fetch_and(!bit, Ordering::Acquire) & bit != 0;
        // From here on, dropping it makes it free again.
        let claimed = was_free.then(|| Slot { region: self.clone(), number: slot })?;
        let (stride, _) = sizes(self.offer.slots, self.floats).ok()?;
        // Otherwise memory would have to be found in the middle of a write, which cannot fail but by a signal.
        if self.reserved.load(Ordering::Relaxed) & bit == 0 {
            self.mapping.reserve(PAGE + slot as usize * stride, stride).ok()?;
            self.reserved.fetch_or(bit, Ordering::Relaxed);
        }
        Some(claimed)
    }

    fn start_of(&self, slot: u32) -> NonNull<f32> {
        let stride = (self.floats * size_of::<f32>()).next_multiple_of(PAGE);
        self.mapping.at(PAGE + slot as usize * stride)
    }
}

/// A vector of floats in a region, held by nobody else in this process.
pub struct Slot {
    region: Arc<Region>,
    number: u32,
}

impl Slot {
    /// Its number in the region.
    pub fn number(&self) -> u32 {
        self.number
    }

    /// The region that it belongs to.
    pub fn region(&self) -> &Arc<Region> {
        &self.region
    }

    fn start(&self) -> NonNull<f32> {
        self.region.start_of(self.number)
    }

    fn assert_writable(&self) {
        assert!(self.region.writable, "slot {} is only to be read here", self.number);
    }
}

impl fmt::Debug for Slot {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Slot {} of {:?}", self.number, self.region)
    }
}

impl Deref for Slot {
    type Target = [f32];

    fn deref(&self) -> &[f32] {
        // SAFETY: the slot lies within the mapping, which the region keeps alive, whose length is sealed, and which is
        // aligned to pages. Nobody here has it mutably: `claim` gives a slot to one holder at a time, and `&self` borrows
        // that one. Other processes write only what they hold by the protocol; see the module's documentation for peers
        // that do not keep to it.
        unsafe { std::slice::from_raw_parts(self.start().as_ptr(), self.region.floats) }
    }
}

impl DerefMut for Slot {
    /// # Panics
    /// When this process may only read the region.
    fn deref_mut(&mut self) -> &mut [f32] {
        self.assert_writable();
        // SAFETY: as in `deref`; and `&mut self` borrows the one holder, of a region that is mapped for writing.
        unsafe { std::slice::from_raw_parts_mut(self.start().as_ptr(), self.region.floats) }
    }
}

impl Drop for Slot {
    fn drop(&mut self) {
        // `claim` was called with this number, so it is below 64.
        self.region.free.fetch_or(1 << self.number, Ordering::Release);
        if let Some(released) = self.region.released.get() {
            released(self.number);
        }
    }
}
