//! Every bound of the protocol, with its arithmetic.

use std::time::Duration;

use lockstep_common::protocol::CHUNK_FLOATS;

/// Bytes of tensor or sample data in one message: 2^18 floats of 4 bytes are 1 MiB.
pub const CHUNK_BYTES: usize = CHUNK_FLOATS * size_of::<f32>();

/// Bytes of a shard's samples in one message. Measured with shards of 3 MB on one host: workers' resident memory peaks at
/// 53 MB, and at 60 with messages of 1 MiB, with first rounds as early.
pub const SHARD_MESSAGE_BYTES: usize = CHUNK_BYTES / 8;

/// Room for everything in a message besides its data. The largest such part is a piece of samples: ids are paid out
/// of [`CHUNK_BYTES`] as well, so that work, leaf numbers, checksums and tags remain: far below 64 KiB.
pub const HEADER_BYTES: usize = 64 * 1024;

/// The largest message that is sent or decoded. tonic's default of 4 MiB counts the header too; so does this:
/// 1 MiB of data + 64 KiB = 1,114,112 bytes. Without data, the largest messages are
/// - `Keep` of every shard of both splits: 2 * 65,536 references of 8 bytes = 1 MiB,
/// - `Announce` of the root over 65,536 leaves: 65,536 digests of 16 bytes = 1 MiB.
pub const MAX_MESSAGE_BYTES: usize = CHUNK_BYTES + HEADER_BYTES;

/// The largest message of the monitor service: 65,536 members of at most 256 bytes (names are short) are 16 MiB.
pub const MAX_MONITOR_MESSAGE_BYTES: usize = 16 << 20;

/// HTTP/2 frame size, both ends. Measured: 1 MiB frames raise loopback throughput of 1 MiB chunks by 30-60 % over the
/// default of 16 KiB and cut the CPU time by a third.
pub const MAX_FRAME_BYTES: u32 = 1 << 20;

/// Flow-control window of one stream: bandwidth times delay, 10 Gbit/s * 5 ms = 6.25 MB, rounded up to 8 chunks.
pub const STREAM_WINDOW_BYTES: u32 = 8 << 20;

/// Flow-control window of a connection: the exchange and one shard being fetched beside it.
pub const CONNECTION_WINDOW_BYTES: u32 = 2 * STREAM_WINDOW_BYTES;

/// Streams that one connection may have open: a session, an exchange, a shard, and some monitors.
pub const MAX_STREAMS_PER_CONNECTION: u32 = 32;

/// HTTP/2 ping after this much silence...
pub const KEEPALIVE_INTERVAL: Duration = Duration::from_millis(500);

/// ...and a peer that does not answer within this time is dead. A silent peer is seen after at most
/// 500 ms + 2 s = 2.5 s, within the 3 s that are asked for; 2 s leave room for a stalled virtual machine.
pub const KEEPALIVE_TIMEOUT: Duration = Duration::from_secs(2);

/// A connection attempt ends after this time. Loss of one SYN costs a retransmission after 1 s; two need a new attempt.
pub const CONNECT_TIMEOUT: Duration = Duration::from_secs(2);

/// A TLS handshake ends after this time, on both sides: two round trips and two signatures take milliseconds; a lost
/// packet costs a second.
pub const HANDSHAKE_TIMEOUT: Duration = Duration::from_secs(5);

/// Control messages that wait for one peer. A round is one `Assign`, one `Keep` and some heartbeats; a peer that is 64
/// behind does not read at all. An assignment's pieces wait here too: 64 * 1 MiB bounds their memory.
pub const SESSION_QUEUE: usize = 64;

/// Chunks that wait for one peer, each way: 8 * 1 MiB, as much as the stream's window takes.
pub const EXCHANGE_QUEUE: usize = 8;

/// Events that wait for one monitor; the slowest run has fewer in the second that a monitor may stall:
/// 1,000 rounds a second and some membership.
pub const WATCH_QUEUE: usize = 1024;

/// Shards of a run: the reduction tree's limit, [`lockstep_common::reduce::Tree::over`].
pub const MAX_SHARDS: u32 = 1 << 16;

/// Levels of the reduction tree above the leaves: 2^16 leaves.
pub const MAX_LEVEL: u32 = 16;

/// Bytes of a name, reason or notice: a few screens of text. Longer ones are cut when sent, and refused when received.
pub const MAX_TEXT_BYTES: usize = 16 * 1024;

/// Bytes of a text in a refusal. It travels in HTTP/2 trailers three times: percent-encoded (at most 3 bytes each) and
/// twice in base64 (4/3): 1024 * (3 + 2 * 4/3) = 5.7 KiB, below the usual limit of 16 KiB for all headers.
pub const MAX_REFUSAL_TEXT_BYTES: usize = 1024;

/// Layers of an encoder or decoder. The deepest autoencoders in use have hundreds.
pub const MAX_LAYERS: usize = 4096;

/// Axes of a shape, without the batch axis.
pub const MAX_AXES: usize = 8;

/// Elements of one sample: 2^28 floats are 1 GiB, the limit that models have as well.
pub const MAX_SAMPLE_ELEMENTS: usize = 1 << 28;

/// A new connection must make a call that it may make within this time, and a new session or exchange must say whose it
/// is: a worker does both at once. Probes of health make no such call; their connections last no longer.
pub const INTRODUCTION_TIMEOUT: Duration = Duration::from_secs(5);

/// A connection that has introduced itself, but has no call open for so long, is closed. Workers always have one open;
/// other clients connect anew by themselves.
pub const IDLE_TIMEOUT: Duration = Duration::from_secs(300);

/// Connections that have not introduced themselves yet, all together...
pub const MAX_STRANGERS: usize = 512;

/// ...and from one address. 64 workers with two connections each can start at once on one machine; more come a moment
/// later. So whoever does not belong here takes no place from those who do, and at most 128 of these.
pub const MAX_STRANGERS_PER_ADDRESS: usize = 128;

/// New connections from one address: at once, and in each second. 64 workers that come anew twice a second are 256
/// connections a second.
pub const CONNECTIONS_PER_ADDRESS: Rate = Rate { burst: 512, per_second: 256 };

/// New connections from all addresses together: a TLS handshake costs a core some 0.5 ms, so that these take half a core.
pub const CONNECTIONS: Rate = Rate { burst: 2048, per_second: 1024 };

/// Joins from one address: at once, and in each second. A worker that is put out again and again pauses for up to 2 s.
pub const JOINS_PER_ADDRESS: Rate = Rate { burst: 128, per_second: 32 };

/// Joins from all addresses together: each is an event in the log and two messages to the driver.
pub const JOINS: Rate = Rate { burst: 1024, per_second: 128 };

/// How often something may happen.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Rate {
    /// So often at once, after a pause.
    pub burst: u32,
    /// So often a second in the long run.
    pub per_second: u32,
}

/// Streams of events at a time: each waits with up to [`WATCH_QUEUE`] events of less than 1 KiB, and some read the log.
pub const MAX_WATCHERS: usize = 64;

/// A watcher or a fetch of a shard that takes nothing for so long is given up.
pub const SLOW_PEER_TIMEOUT: Duration = Duration::from_secs(30);

/// Shards that one member may fetch at a time, each packed in memory: a worker fetches one after the other, and the end
/// of one may be noticed after the beginning of the next.
pub const MAX_FETCHES_PER_MEMBER: usize = 2;

/// Messages of a shard that wait for the member that fetches it, [`SHARD_MESSAGE_BYTES`] each, and the samples that they are cut from.
pub const FETCH_QUEUE: usize = 2;

/// A request of the health service: a service's name.
pub const MAX_HEALTH_MESSAGE_BYTES: usize = 4 * 1024;

/// Streams that a peer has opened and reset while they waited to be taken (a rapid reset): h2's own limit,
/// named here so that it does not change unseen. One more ends the connection.
pub const MAX_PENDING_RESET_STREAMS: usize = 20;

/// Streams that were reset for what the peer did wrong in them. One more ends the connection.
pub const MAX_FAULTY_STREAMS: usize = 64;

/// How often a coordinator looks whether the files of its certificates and tokens have changed: they have a few
/// kilobytes.
pub const RELOAD_INTERVAL: Duration = Duration::from_secs(2);

/// Characters of a token, at least: 16 hexadecimal digits are 64 bits. At 64 tries a second, which is what the limit on
/// joins leaves, half of them take four billion years.
pub const MIN_TOKEN_BYTES: usize = 16;

/// Characters of a token, at most: far more than 256 bits need in any form, and far below [`MAX_HEADER_BYTES`].
pub const MAX_TOKEN_BYTES: usize = 512;

/// Tokens in one file: the one in use, and others while it is being replaced.
pub const MAX_TOKENS_PER_FILE: usize = 8;

/// A token file: so many lines of so many characters, with room for line ends.
pub const MAX_TOKEN_FILE_BYTES: usize = MAX_TOKENS_PER_FILE * (MAX_TOKEN_BYTES + 16);

/// A file with certificates or a key, in PEM: a certificate has some 2 KiB, so that this is a bundle of hundreds, as
/// large as those that systems come with.
pub const MAX_PEM_FILE_BYTES: usize = 1 << 20;

/// All headers of a request together: a token, a path and gRPC's own have less than 2 KiB.
pub const MAX_HEADER_BYTES: u32 = 8 * 1024;

#[cfg(test)]
mod tests {
    use super::*;
    use lockstep_common::reduce::Tree;

    #[test]
    fn limits_agree_with_the_domain() {
        assert_eq!(CHUNK_BYTES, 1 << 20);
        assert_eq!(Tree::over(MAX_SHARDS).unwrap().root().level as u32, MAX_LEVEL);
        assert!(Tree::over(MAX_SHARDS * 2).is_none());
        assert!(KEEPALIVE_INTERVAL + KEEPALIVE_TIMEOUT < Duration::from_secs(3));
    }
}
