//! What monitors call.

use std::pin::Pin;
use std::sync::Arc;

use lockstep_common::progress::{Event, RunState, TimedEvent};
use lockstep_proto::limits::{MAX_WATCHERS, SLOW_PEER_TIMEOUT, WATCH_QUEUE};
use lockstep_proto::v1;
use lockstep_proto::v1::monitor_service_server::MonitorService;
use tokio::sync::mpsc;
use tokio_stream::Stream;
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Request, Response, Status};

use super::quota::{SlotTaken, Slots};
use crate::monitor::{Hub, Replay};

/// Events read from the event log at a time.
const LOG_PAGE: u64 = 4096;

/// The service.
pub(super) struct Monitoring {
    hub: Arc<Hub>,
    watchers: Arc<Slots>,
}

impl Monitoring {
    pub(super) fn new(hub: Arc<Hub>) -> Self {
        Self { hub, watchers: Slots::new(MAX_WATCHERS) }
    }
}

#[tonic::async_trait]
impl MonitorService for Monitoring {
    type WatchStream = Pin<Box<dyn Stream<Item = Result<v1::WatchResponse, Status>> + Send>>;

    async fn watch(&self, request: Request<v1::WatchRequest>) -> Result<Response<Self::WatchStream>, Status> {
        let from_round = request.into_inner().from_round;
        let slot = self.watchers.take().ok_or_else(|| {
            Status::resource_exhausted(format!("{MAX_WATCHERS} watch already, as many as can; try again later"))
        })?;
        let (responses, stream) = mpsc::channel(WATCH_QUEUE);
        let watcher = Watcher { hub: self.hub.clone(), responses, from_round, _slot: slot };
        tokio::spawn(watcher.run());
        Ok(Response::new(Box::pin(ReceiverStream::new(stream))))
    }

    async fn get_run(&self, _: Request<v1::GetRunRequest>) -> Result<Response<v1::GetRunResponse>, Status> {
        Ok(Response::new((&self.hub.status()).into()))
    }

    async fn list_workers(
        &self,
        _: Request<v1::ListWorkersRequest>,
    ) -> Result<Response<v1::ListWorkersResponse>, Status> {
        Ok(Response::new(self.hub.workers()[..].into()))
    }
}

/// One watcher's way through the events.
struct Watcher {
    hub: Arc<Hub>,
    responses: mpsc::Sender<Result<v1::WatchResponse, Status>>,
    from_round: u64,
    _slot: SlotTaken,
}

impl Watcher {
    async fn run(self) {
        let mut published = self.hub.subscribe();
        // What is published from now on is shown in any case, also if it belongs to no round.
        let live = *published.borrow();
        let mut next = 0;
        let mut started = self.from_round == 0;
        loop {
            let events = match self.hub.events_from(next) {
                Replay::Events(events) => events,
                Replay::Log { until } => match self.read_log(next, until.min(next + LOG_PAGE)).await {
                    Ok(events) => events,
                    Err(status) => {
                        let _ = self.responses.send(Err(status)).await;
                        return;
                    }
                },
            };
            let nothing_new = events.is_empty();
            for event in events {
                started |= next >= live || at_or_after(&event, self.from_round);
                next += 1;
                let response = Ok((&*event).into());
                // One that is gone, or takes nothing, is not waited for.
                if started && self.responses.send_timeout(response, SLOW_PEER_TIMEOUT).await.is_err() {
                    return;
                }
                if matches!(event.event, Event::State { state: RunState::Finished { .. } }) {
                    return;
                }
            }
            if nothing_new {
                tokio::select! {
                    changed = published.changed() => if changed.is_err() { return },
                    () = self.responses.closed() => return,
                }
            }
        }
    }

    async fn read_log(&self, from: u64, until: u64) -> Result<Vec<Arc<TimedEvent>>, Status> {
        let hub = self.hub.clone();
        let read = tokio::task::spawn_blocking(move || hub.read_log(from, until)).await;
        let events = read.map_err(|error| Status::internal(error.to_string()))?;
        let events = events.map_err(|error| Status::internal(format!("cannot read the event log: {error}")))?;
        if events.is_empty() {
            return Err(Status::data_loss("the event log is shorter than it was"));
        }
        Ok(events)
    }
}

fn at_or_after(event: &TimedEvent, from_round: u64) -> bool {
    matches!(&event.event, Event::Round(round) if round.round >= from_round)
}
