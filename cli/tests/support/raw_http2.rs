//! HTTP/2 by hand: frames that no library would send.

use std::io::{self, Read, Write};
use std::net::{Shutdown, SocketAddr, TcpStream};

use super::process::WATCHDOG;

/// What a client says first.
pub(crate) const PREFACE: &[u8] = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n";

// Kinds of frames (RFC 9113, section 6) and their flags.
pub(crate) const DATA: u8 = 0;
pub(crate) const HEADERS: u8 = 1;
pub(crate) const RST_STREAM: u8 = 3;
pub(crate) const SETTINGS: u8 = 4;
pub(crate) const PING: u8 = 6;
pub(crate) const WINDOW_UPDATE: u8 = 8;
pub(crate) const CONTINUATION: u8 = 9;
pub(crate) const END_HEADERS: u8 = 4;

/// A frame.
pub(crate) fn frame(kind: u8, flags: u8, stream: u32, payload: &[u8]) -> Vec<u8> {
    let length = (payload.len() as u32).to_be_bytes();
    [&length[1..], &[kind, flags], &stream.to_be_bytes(), payload].concat()
}

/// The header block of a gRPC call.
pub(crate) fn call(path: &str, token: Option<&str>) -> Vec<u8> {
    let bearer = token.map(|token| format!("Bearer {token}"));
    let mut fields = vec![
        (":method", "POST"),
        (":scheme", "http"),
        (":path", path),
        (":authority", "coordinator"),
        ("content-type", "application/grpc"),
        ("te", "trailers"),
    ];
    fields.extend(bearer.iter().map(|bearer| ("authorization", &bearer[..])));
    fields.iter().flat_map(|(name, value)| literal(name, value)).collect()
}

/// A header field, neither indexed nor compressed (RFC 7541, section 6.2.2); both strings are shorter than 127 bytes.
pub(crate) fn literal(name: &str, value: &str) -> Vec<u8> {
    let text = |text: &str| [&[text.len() as u8], text.as_bytes()].concat();
    [vec![0], text(name), text(value)].concat()
}

/// The beginning of a gRPC message that says to have so many bytes.
pub(crate) fn message_of(length: u32) -> Vec<u8> {
    [&[0][..], &length.to_be_bytes()].concat()
}

/// A connection on which anything can be sent.
pub(crate) struct Raw(pub(crate) TcpStream);

impl Raw {
    pub(crate) fn connect(address: SocketAddr) -> io::Result<Self> {
        let stream = TcpStream::connect(address)?;
        stream.set_read_timeout(Some(WATCHDOG))?;
        stream.set_write_timeout(Some(WATCHDOG))?;
        Ok(Self(stream))
    }

    /// A connection that has said hello.
    pub(crate) fn open(address: SocketAddr) -> io::Result<Self> {
        let mut raw = Self::connect(address)?;
        raw.send(&[PREFACE, &frame(SETTINGS, 0, 0, &[])].concat())?;
        Ok(raw)
    }

    pub(crate) fn send(&mut self, bytes: &[u8]) -> io::Result<()> {
        self.0.write_all(bytes)
    }

    /// Reads until the coordinator hangs up, in whatever way.
    ///
    /// # Panics
    /// When it never does.
    pub(crate) fn wait_for_end(mut self) -> usize {
        let mut scrap = [0; 64 * 1024];
        let mut read = 0;
        loop {
            match self.0.read(&mut scrap) {
                Ok(0) => return read,
                Ok(length) => read += length,
                Err(error) if matches!(error.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::TimedOut) => {
                    panic!("the coordinator did not hang up within {} s", WATCHDOG.as_secs())
                }
                Err(_) => return read,
            }
        }
    }

    /// Says that nothing more will come, then reads until the coordinator hangs up.
    pub(crate) fn finish(self) {
        // It may have hung up already.
        let _ = self.0.shutdown(Shutdown::Write);
        self.wait_for_end();
    }
}
