//! The worker's side of memory shared with the coordinator.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError};

use lockstep_common::kernel::Precision;
use lockstep_common::protocol::{FromWorker, SharedMemory, ToWorker};
use lockstep_common::shared_memory::{Access, FloatBuffer, Region, SharedMemoryError};
use lockstep_proto::convert::{ExchangeDown, node_slot, release_parameters};
use lockstep_proto::v1;
use tokio::sync::mpsc;

/// Memory of the coordinator that this process has opened.
pub(crate) struct Sharing {
    parameters: Arc<Region>,
    gradients: Arc<Region>,
    /// Gradients that the coordinator reads, by slot: not touched until it is done.
    lent: Mutex<HashMap<u32, Arc<FloatBuffer>>>,
}

impl Sharing {
    /// Opens what a coordinator offers to a worker of a model with this number of parameters.
    ///
    /// # Errors
    /// [`SharedMemoryError`] when it cannot be seen from here, usually because the coordinator runs elsewhere.
    pub(crate) fn open(offer: SharedMemory, parameters: usize) -> Result<Self, SharedMemoryError> {
        Ok(Self {
            parameters: Arc::new(Region::open(offer.parameters, parameters, Access::Read)?),
            gradients: Arc::new(Region::open(offer.gradients, parameters, Access::Write)?),
            lent: Mutex::default(),
        })
    }

    /// Where gradients should be computed.
    pub(crate) fn gradients(&self) -> Arc<Region> {
        self.gradients.clone()
    }

    /// Has the coordinator told when a version is no longer read here. Ends with the exchange.
    pub(crate) fn tell_releases(&self, exchange: mpsc::WeakSender<v1::ExchangeRequest>) {
        // At most as many wait as there are slots.
        let (released, mut slots) = mpsc::unbounded_channel();
        self.parameters.on_release(move |slot| {
            // Nobody to tell once the exchange has ended.
            let _ = released.send(slot);
        });
        tokio::spawn(async move {
            while let Some(slot) = slots.recv().await {
                let Some(exchange) = exchange.upgrade() else { return };
                if exchange.send(release_parameters(slot)).await.is_err() {
                    return;
                }
            }
        });
    }

    /// What a coordinator's response is to the session; `None` if it is about slots alone.
    ///
    /// # Errors
    /// What the coordinator did wrong.
    pub(crate) fn receive(&self, response: ExchangeDown) -> Result<Option<ToWorker>, String> {
        match response {
            ExchangeDown::Message(message) => Ok(Some(message)),
            ExchangeDown::ParameterSlot { version, slot } => {
                let slot = self.parameters.claim(slot).ok_or_else(|| {
                    format!("version {version} is said to lie in slot {slot}, which does not exist or is still read")
                })?;
                let values = Arc::new(FloatBuffer::from(slot));
                Ok(Some(ToWorker::Parameters { version, values, precision: Precision::F32 }))
            }
            ExchangeDown::Release(slot) => {
                let lent = self.lent.lock().unwrap_or_else(PoisonError::into_inner).remove(&slot);
                lent.map(|_| None).ok_or_else(|| format!("slot {slot} was released, but not handed in"))
            }
        }
    }

    /// The request that hands in a node whose gradient lies in shared memory; `None` if it has to travel.
    pub(crate) fn hand_in(&self, message: &FromWorker) -> Option<v1::ExchangeRequest> {
        let FromWorker::NodePart { round, node, chunk: 0, gradient, .. } = message else { return None };
        let slot = gradient.slot().filter(|slot| Arc::ptr_eq(slot.region(), &self.gradients))?.number();
        self.lent.lock().unwrap_or_else(PoisonError::into_inner).insert(slot, gradient.clone());
        Some(node_slot(*round, *node, slot))
    }
}
