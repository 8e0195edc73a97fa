//! Connections as they come: TCP, TLS if it is in force, and how long a peer may take to say what it wants.

use std::io;
use std::net::SocketAddr;
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::task::{Context, Poll};
use std::time::Duration;

use lockstep_proto::limits::{HANDSHAKE_TIMEOUT, INTRODUCTION_TIMEOUT};
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt, ReadBuf};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{mpsc, watch};
use tokio::time::{Sleep, sleep, timeout};
use tokio_rustls::TlsAcceptor;
use tokio_rustls::server::TlsStream;
use tokio_stream::wrappers::ReceiverStream;
use tonic::transport::server::Connected;
use tracing::{debug, warn};

use super::credentials::InForce;

/// How long to wait when the system gives no more connections, for want of file descriptors for example.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);

/// How long a peer whose handshake has failed may take to read why.
const LINGER: Duration = Duration::from_secs(1);

/// Connections that are ready and wait for the server, which takes them at once.
const READY: usize = 16;

/// Who is at the other end of a connection.
#[derive(Debug)]
pub(super) struct Peer {
    local: SocketAddr,
    remote: SocketAddr,
    introduced: AtomicBool,
}

impl Peer {
    /// Whether it connects from this host's own address.
    pub(super) fn is_this_host(&self) -> bool {
        let (ours, theirs) = (self.local.ip().to_canonical(), self.remote.ip().to_canonical());
        theirs.is_loopback() || ours == theirs
    }

    /// It has made a call that it may make: it can stay.
    pub(super) fn introduce(&self) {
        self.introduced.store(true, Ordering::Relaxed);
    }

    fn is_introduced(&self) -> bool {
        self.introduced.load(Ordering::Relaxed)
    }
}

/// Takes connections until the stream is dropped.
pub(super) fn accept(
    listener: TcpListener,
    in_force: watch::Receiver<Arc<InForce>>,
) -> ReceiverStream<io::Result<Connection>> {
    let (ready, connections) = mpsc::channel(READY);
    tokio::spawn(async move {
        loop {
            let accepted = tokio::select! {
                () = ready.closed() => return,
                accepted = listener.accept() => accepted,
            };
            match accepted {
                Ok((socket, remote)) => {
                    let (ready, in_force) = (ready.clone(), in_force.borrow().clone());
                    tokio::spawn(async move {
                        match establish(socket, remote, &in_force).await {
                            // The server has ended: nobody to serve this one.
                            Ok(connection) => drop(ready.send(Ok(connection)).await),
                            Err(error) => debug!("no connection with {remote}: {error}"),
                        }
                    });
                }
                Err(error) => {
                    warn!("cannot take a connection: {error}");
                    sleep(ACCEPT_PAUSE).await;
                }
            }
        }
    });
    ReceiverStream::new(connections)
}

async fn establish(socket: TcpStream, remote: SocketAddr, in_force: &InForce) -> io::Result<Connection> {
    // Small messages must not wait for more to send.
    socket.set_nodelay(true)?;
    let peer = Peer { local: socket.local_addr()?, remote, introduced: AtomicBool::new(false) };
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
    Ok(Connection { stream, peer: Arc::new(peer), deadline: Some(Box::pin(sleep(INTRODUCTION_TIMEOUT))) })
}

/// Reads what a peer still sends, so that closing the socket does not cut off the alert that tells it what is wrong.
async fn hear_out(mut socket: TcpStream) -> io::Result<()> {
    socket.shutdown().await?;
    let mut scrap = [0; 1024];
    while socket.read(&mut scrap).await? > 0 {}
    Ok(())
}

/// A connection. It ends with an error if its peer makes no call that it may make within [`INTRODUCTION_TIMEOUT`].
pub(super) struct Connection {
    stream: Stream,
    peer: Arc<Peer>,
    /// Until when the peer must have introduced itself; `None` once it has.
    deadline: Option<Pin<Box<Sleep>>>,
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
        let Some(deadline) = &mut self.deadline else { return Ok(()) };
        if self.peer.is_introduced() {
            self.deadline = None;
        } else if deadline.as_mut().poll(context).is_ready() {
            debug!("{} said nothing that it may say", self.peer.remote);
            return Err(io::Error::new(io::ErrorKind::TimedOut, "the peer did not introduce itself"));
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
