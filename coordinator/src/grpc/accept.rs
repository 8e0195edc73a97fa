//! Connections as they come: TCP, TLS if it is in force, how many there may be, and how long a peer may do nothing.

use std::io;
use std::net::SocketAddr;
use std::pin::Pin;
use std::sync::Arc;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::task::{Context, Poll};
use std::time::{Duration, Instant};

use lockstep_proto::limits::{
    CONNECTIONS, CONNECTIONS_PER_ADDRESS, HANDSHAKE_TIMEOUT, IDLE_TIMEOUT, INTRODUCTION_TIMEOUT, MAX_STRANGERS,
    MAX_STRANGERS_PER_ADDRESS,
};
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt, ReadBuf};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{mpsc, watch};
use tokio::time::{Sleep, sleep, sleep_until, timeout};
use tokio_rustls::TlsAcceptor;
use tokio_rustls::server::TlsStream;
use tokio_stream::wrappers::ReceiverStream;
use tonic::transport::server::Connected;
use tracing::{debug, warn};

use super::credentials::InForce;
use super::quota::{Most, Origin, Pace, Place, Places};

/// How long to wait when the system gives no more connections, for want of file descriptors for example.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);

/// How long a peer whose handshake has failed may take to read why.
const LINGER: Duration = Duration::from_secs(1);

/// Connections that are ready and wait for the server, which takes them at once.
const READY: usize = 16;

/// How often at most the log says that connections were refused.
const TOLD_EVERY: Duration = Duration::from_secs(60);

/// Who is at the other end of a connection.
#[derive(Debug)]
pub(super) struct Peer {
    local: SocketAddr,
    remote: SocketAddr,
    standing: Mutex<Standing>,
}

/// How well a peer is known.
#[derive(Debug)]
enum Standing {
    /// It has made no call that it may make. It has one of the places for such peers.
    Stranger { until: Instant, _place: Place },
    /// It has made one.
    Known { calls: u32, idle_since: Instant },
}

impl Peer {
    /// Whether it connects from this host's own address.
    pub(super) fn is_this_host(&self) -> bool {
        let (ours, theirs) = (self.local.ip().to_canonical(), self.remote.ip().to_canonical());
        theirs.is_loopback() || ours == theirs
    }

    /// What its limits go by.
    pub(super) fn origin(&self) -> Origin {
        self.remote.ip().into()
    }

    /// It makes a call that it may make: it can stay, as long as the call lasts and for a while after it.
    pub(super) fn begin(self: &Arc<Self>) -> Call {
        let mut standing = self.standing();
        match &mut *standing {
            Standing::Known { calls, .. } => *calls += 1,
            Standing::Stranger { .. } => *standing = Standing::Known { calls: 1, idle_since: Instant::now() },
        }
        Call(self.clone())
    }

    /// When it must have done something next, if it need not have by now.
    fn patience(&self, now: Instant) -> io::Result<Instant> {
        let (until, reason) = match &*self.standing() {
            Standing::Stranger { until, .. } => (*until, "it made no call that it may make"),
            Standing::Known { calls: 0, idle_since } => (*idle_since + IDLE_TIMEOUT, "it has been idle for too long"),
            Standing::Known { .. } => return Ok(now + IDLE_TIMEOUT),
        };
        if now < until { Ok(until) } else { Err(io::Error::new(io::ErrorKind::TimedOut, reason)) }
    }

    fn standing(&self) -> MutexGuard<'_, Standing> {
        self.standing.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A call that is under way, until it is dropped.
#[derive(Debug)]
pub(super) struct Call(Arc<Peer>);

impl Drop for Call {
    fn drop(&mut self) {
        if let Standing::Known { calls, idle_since } = &mut *self.0.standing() {
            *calls -= 1;
            *idle_since = Instant::now();
        }
    }
}

/// Who may come at all.
struct Door {
    connections: Arc<Places>,
    strangers: Arc<Places>,
    pace: Pace,
    refused: u32,
    told: Option<Instant>,
}

impl Door {
    fn new(most: Most) -> Self {
        let strangers = Most { total: MAX_STRANGERS, per_origin: MAX_STRANGERS_PER_ADDRESS };
        Self {
            connections: Places::new(most),
            strangers: Places::new(strangers),
            pace: Pace::new(CONNECTIONS, CONNECTIONS_PER_ADDRESS),
            refused: 0,
            told: None,
        }
    }

    /// The places of a new connection: among all, and among strangers.
    fn admit(&self, origin: Origin, now: Instant) -> Result<[Place; 2], &'static str> {
        if !self.pace.allows(origin, now) {
            return Err("they come too fast");
        }
        let place = self.connections.take(origin).ok_or("there are too many (cluster.max_connections)")?;
        let stranger = self.strangers.take(origin).ok_or("too many have not said what they want")?;
        Ok([place, stranger])
    }

    /// Counts a refusal, and says so from time to time.
    fn refuse(&mut self, remote: SocketAddr, reason: &str, now: Instant) {
        self.refused += 1;
        if self.told.is_none_or(|told| now.saturating_duration_since(told) >= TOLD_EVERY) {
            warn!("connections refused: {}, the last one from {remote}: {reason}", self.refused);
            (self.refused, self.told) = (0, Some(now));
        }
    }
}

/// Takes connections, `most` at a time, until the stream is dropped.
pub(super) fn accept(
    listener: TcpListener,
    most: Most,
    in_force: watch::Receiver<Arc<InForce>>,
) -> ReceiverStream<io::Result<Connection>> {
    let (ready, connections) = mpsc::channel(READY);
    tokio::spawn(async move {
        let mut door = Door::new(most);
        let mut failing = false;
        loop {
            let accepted = tokio::select! {
                () = ready.closed() => return,
                accepted = listener.accept() => accepted,
            };
            match accepted {
                Ok((socket, remote)) => {
                    failing = false;
                    let now = Instant::now();
                    let places = match door.admit(remote.ip().into(), now) {
                        Ok(places) => places,
                        // Closed at once: nothing was read, nothing is kept.
                        Err(reason) => {
                            door.refuse(remote, reason, now);
                            continue;
                        }
                    };
                    let (ready, in_force) = (ready.clone(), in_force.borrow().clone());
                    tokio::spawn(async move {
                        match establish(socket, remote, &in_force, places).await {
                            // The server has ended: nobody to serve this one.
                            Ok(connection) => drop(ready.send(Ok(connection)).await),
                            Err(error) => debug!("no connection with {remote}: {error}"),
                        }
                    });
                }
                Err(error) => {
                    if !failing {
                        warn!("cannot take connections: {error}");
                    }
                    failing = true;
                    sleep(ACCEPT_PAUSE).await;
                }
            }
        }
    });
    ReceiverStream::new(connections)
}

async fn establish(
    socket: TcpStream,
    remote: SocketAddr,
    in_force: &InForce,
    [place, stranger]: [Place; 2],
) -> io::Result<Connection> {
    // Small messages must not wait for more to send.
    socket.set_nodelay(true)?;
    let local = socket.local_addr()?;
    let stream = match &in_force.tls {
        None => Stream::Plain(socket),
        Some(config) => {
            let handshake = TlsAcceptor::from(config.clone()).accept(socket).into_fallible();
            let late = |_| io::Error::new(io::ErrorKind::TimedOut, "the TLS handshake took too long");
            match timeout(HANDSHAKE_TIMEOUT, handshake).await.map_err(late)? {
                Ok(stream) => Stream::Tls(Box::new(stream)),
                Err((error, socket)) => {
                    // However that ends, the handshake has failed.
                    let _ = timeout(LINGER, hear_out(socket)).await;
                    return Err(error);
                }
            }
        }
    };
    let until = Instant::now() + INTRODUCTION_TIMEOUT;
    let standing = Mutex::new(Standing::Stranger { until, _place: stranger });
    let peer = Arc::new(Peer { local, remote, standing });
    Ok(Connection { stream, peer, patience: Box::pin(sleep_until(until.into())), _place: place })
}

/// Reads what a peer still sends, so that closing the socket does not cut off the alert that tells it what is wrong.
async fn hear_out(mut socket: TcpStream) -> io::Result<()> {
    socket.shutdown().await?;
    let mut scrap = [0; 1024];
    while socket.read(&mut scrap).await? > 0 {}
    Ok(())
}

/// A connection. It ends with an error if its peer makes no call that it may make within [`INTRODUCTION_TIMEOUT`], or none
/// for [`IDLE_TIMEOUT`] later on.
pub(super) struct Connection {
    stream: Stream,
    peer: Arc<Peer>,
    /// Until when the peer may do nothing, as far as is known; looked at again then.
    patience: Pin<Box<Sleep>>,
    _place: Place,
}

enum Stream {
    Plain(TcpStream),
    Tls(Box<TlsStream<TcpStream>>),
}

impl Connected for Connection {
    type ConnectInfo = Arc<Peer>;

    fn connect_info(&self) -> Arc<Peer> {
        self.peer.clone()
    }
}

impl Connection {
    /// An error once the peer is too late.
    fn in_time(&mut self, context: &mut Context<'_>) -> io::Result<()> {
        while self.patience.as_mut().poll(context).is_ready() {
            match self.peer.patience(Instant::now()) {
                Ok(until) => self.patience.as_mut().reset(until.into()),
                Err(error) => {
                    debug!("the connection with {} ends: {error}", self.peer.remote);
                    return Err(error);
                }
            }
        }
        Ok(())
    }
}

impl AsyncRead for Connection {
    fn poll_read(mut self: Pin<&mut Self>, context: &mut Context<'_>, into: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        self.in_time(context)?;
        match &mut self.stream {
            Stream::Plain(stream) => Pin::new(stream).poll_read(context, into),
            Stream::Tls(stream) => Pin::new(stream).poll_read(context, into),
        }
    }
}

impl AsyncWrite for Connection {
    fn poll_write(mut self: Pin<&mut Self>, context: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        self.in_time(context)?;
        match &mut self.stream {
            Stream::Plain(stream) => Pin::new(stream).poll_write(context, bytes),
            Stream::Tls(stream) => Pin::new(stream).poll_write(context, bytes),
        }
    }

    fn poll_flush(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        match &mut self.stream {
            Stream::Plain(stream) => Pin::new(stream).poll_flush(context),
            Stream::Tls(stream) => Pin::new(stream).poll_flush(context),
        }
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        match &mut self.stream {
            Stream::Plain(stream) => Pin::new(stream).poll_shutdown(context),
            Stream::Tls(stream) => Pin::new(stream).poll_shutdown(context),
        }
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        slices: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        self.in_time(context)?;
        match &mut self.stream {
            Stream::Plain(stream) => Pin::new(stream).poll_write_vectored(context, slices),
            Stream::Tls(stream) => Pin::new(stream).poll_write_vectored(context, slices),
        }
    }

    fn is_write_vectored(&self) -> bool {
        match &self.stream {
            Stream::Plain(stream) => stream.is_write_vectored(),
            Stream::Tls(stream) => stream.is_write_vectored(),
        }
    }
}
