//! The coordinator's side of memory shared with a worker: who holds which slot, and what is said about it.

use std::collections::HashMap;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use lockstep_common::kernel::Precision;
use lockstep_common::protocol::{FromWorker, SharedMemory, ToWorker};
use lockstep_common::shared_memory::{Access, FloatBuffer, Region, Slot};
use lockstep_proto::convert::{Downward, ExchangeUp, Messages, parameter_slot, release_gradient};
use lockstep_proto::v1;
use tokio::sync::mpsc;
use tracing::debug;

/// Gradients of one worker that may lie in shared memory: in a usual round a worker has one or two nodes, and the memory
/// of those is free again when the next round begins. More nodes travel over gRPC.
pub(super) const GRADIENT_SLOTS: u32 = 4;

/// What waits for a worker's exchange.
#[derive(Debug)]
pub(super) enum Down {
    /// A message of the driver.
    Message(ToWorker),
    /// A slot of the worker's gradients is no longer read.
    Release(u32),
}

/// Memory offered to one worker, and what became of it.
pub(super) struct Sharing {
    parameters: Arc<Region>,
    gradients: Arc<Region>,
    /// Whether the worker has opened both.
    accepted: AtomicBool,
    /// Versions that the worker reads, by slot: kept as long as it does.
    lent: Mutex<HashMap<u32, Arc<FloatBuffer>>>,
}

impl Sharing {
    /// Memory for a worker that may run on this host; `None` if there is none to be had.
    pub(super) fn new(parameters: Arc<Region>, floats: usize) -> Option<Self> {
        match Region::create(GRADIENT_SLOTS, floats, Access::Write) {
            Ok(gradients) => {
                let gradients = Arc::new(gradients);
                Some(Self { parameters, gradients, accepted: AtomicBool::new(false), lent: Mutex::default() })
            }
            Err(error) => {
                debug!("{error}");
                None
            }
        }
    }

    /// What the welcome says.
    pub(super) fn offer(&self) -> SharedMemory {
        SharedMemory { parameters: self.parameters.offer(), gradients: self.gradients.offer() }
    }

    /// The worker sees it. From now on it is told through `queue` which of its slots are free again.
    pub(super) fn accept(&self, queue: mpsc::WeakSender<Down>) {
        self.gradients.on_release(move |slot| {
            // The queue has room for every slot; a worker that is gone needs to know nothing.
            if let Some(queue) = queue.upgrade() {
                let _ = queue.try_send(Down::Release(slot));
            }
        });
        self.accepted.store(true, Ordering::Release);
    }

    /// Whether the worker sees it.
    pub(super) fn is_accepted(&self) -> bool {
        self.accepted.load(Ordering::Acquire)
    }

    /// What a worker's request is to the driver; `None` if it is about slots alone.
    ///
    /// # Errors
    /// What the worker did wrong.
    pub(super) fn receive(&self, request: ExchangeUp) -> Result<Option<FromWorker>, String> {
        match request {
            ExchangeUp::NodeSlot { round, node, slot } => {
                let slot = self.gradients.claim(slot).ok_or_else(|| {
                    format!("slot {slot} was handed in, which does not exist or was not released, of {GRADIENT_SLOTS}")
                })?;
                let gradient = Arc::new(FloatBuffer::from(slot));
                // It lies there as 32-bit floats, whatever they were rounded to.
                Ok(Some(FromWorker::NodePart { round, node, chunk: 0, gradient, precision: Precision::F32 }))
            }
            ExchangeUp::Release(slot) => {
                let lent = self.lent.lock().unwrap_or_else(PoisonError::into_inner).remove(&slot);
                lent.map(|_| None).ok_or_else(|| format!("slot {slot} was released, but not lent"))
            }
            other => other.message().map(Some).map_err(|error| error.to_string()),
        }
    }

    /// The slot of the parameters' region in which a version lies.
    fn slot_of<'a>(&self, values: &'a FloatBuffer) -> Option<&'a Slot> {
        values.slot().filter(|slot| Arc::ptr_eq(slot.region(), &self.parameters))
    }

    /// Lends a version to the worker and says so; nothing is said if it has it.
    fn lend(&self, version: u64, slot: u32, values: &Arc<FloatBuffer>) -> Option<v1::ExchangeResponse> {
        let mut lent = self.lent.lock().unwrap_or_else(PoisonError::into_inner);
        let had = lent.insert(slot, values.clone());
        had.is_none().then(|| parameter_slot(version, slot))
    }
}

/// The responses that a waiting message becomes.
pub(super) fn responses(down: Down, sharing: Option<&Sharing>) -> Messages<v1::ExchangeResponse> {
    let message = match down {
        Down::Message(message) => message,
        Down::Release(slot) => return Box::new(std::iter::once(release_gradient(slot))),
    };
    if let (ToWorker::Parameters { version, values, .. }, Some(sharing)) = (&message, sharing)
        && let Some(slot) = sharing.slot_of(values)
    {
        return Box::new(sharing.lend(*version, slot.number(), values).into_iter());
    }
    match Downward::from(message) {
        Downward::Exchange(messages) => messages,
        Downward::Session(_) => Box::new(std::iter::empty()),
    }
}

#[cfg(all(test, target_os = "linux"))]
mod tests {
    use lockstep_common::reduce::NodeId;

    use super::*;

    const FLOATS: usize = 10;

    fn sharing() -> (Sharing, Arc<FloatBuffer>) {
        let versions = Arc::new(Region::create(2, FLOATS, Access::Read).expect("shared memory"));
        let version = FloatBuffer::from(versions.take().expect("a free slot"));
        (Sharing::new(versions, FLOATS).expect("shared memory"), Arc::new(version))
    }

    fn count(down: ToWorker, sharing: &Sharing) -> usize {
        responses(Down::Message(down), Some(sharing)).count()
    }

    #[test]
    fn a_version_is_kept_until_the_worker_releases_it_or_is_gone() {
        let (sharing, values) = sharing();
        let parameters = || ToWorker::Parameters { version: 3, values: values.clone(), precision: Precision::F32 };
        assert_eq!(count(parameters(), &sharing), 1);
        assert_eq!(count(parameters(), &sharing), 0, "the worker has it");
        assert_eq!(Arc::strong_count(&values), 2);
        assert!(matches!(sharing.receive(ExchangeUp::Release(0)), Ok(None)));
        assert_eq!(Arc::strong_count(&values), 1);
        assert!(sharing.receive(ExchangeUp::Release(0)).unwrap_err().contains("not lent"));
        assert_eq!(count(parameters(), &sharing), 1);
        drop(sharing);
        assert_eq!(Arc::strong_count(&values), 1);
    }

    #[test]
    fn a_version_in_other_memory_travels() {
        let (sharing, values) = sharing();
        let values = Arc::new((*values).clone());
        let copy = ToWorker::Parameters { version: 3, values, precision: Precision::F32 };
        let sent: Vec<v1::ExchangeResponse> = responses(Down::Message(copy), Some(&sharing)).collect();
        assert!(matches!(sent[0].message, Some(v1::exchange_response::Message::ParameterChunk(_))));
    }

    #[test]
    fn a_gradient_is_read_in_place_and_its_slot_released() {
        let (sharing, _) = sharing();
        let (queue, mut waiting) = mpsc::channel(1);
        sharing.accept(queue.downgrade());
        let theirs = Region::open(sharing.offer().gradients, FLOATS, Access::Write).map(Arc::new).unwrap();
        theirs.claim(2).unwrap().fill(7.0);
        let hand_in = |slot| sharing.receive(ExchangeUp::NodeSlot { round: 5, node: NodeId::leaf(1), slot });
        let Ok(Some(FromWorker::NodePart { round: 5, chunk: 0, gradient, .. })) = hand_in(2) else {
            panic!("no gradient")
        };
        assert_eq!(**gradient, [7.0; FLOATS]);
        assert!(hand_in(2).unwrap_err().contains("slot 2"), "it is still read");
        assert!(hand_in(GRADIENT_SLOTS).unwrap_err().contains("does not exist"));
        drop(gradient);
        assert!(matches!(waiting.try_recv(), Ok(Down::Release(2))));
        assert!(hand_in(2).is_ok());
    }
}
