//! Refusals survive the way through a status, and their codes tell a worker what to do.

use lockstep_common::hash::Digest;
use lockstep_common::protocol::{MemberId, Refusal as NotAdmitted, ShardRef, Split};
use lockstep_proto::status::{Refusal, Verdict, describe, verdict};
use lockstep_proto::v1;
use tonic::{Code, Status};

/// Every refusal, what it means for a worker, and a part of its text.
fn refusals() -> Vec<(Refusal, Code, Verdict, &'static str)> {
    use Code::{Aborted, DataLoss, FailedPrecondition, InvalidArgument, Unavailable};
    use Verdict::{JoinAgain, Never, RetryLater};
    vec![
        (
            NotAdmitted::Version { run: "0.1.0".into(), worker: "0.2.0".into() }.into(),
            FailedPrecondition,
            Never,
            "lockstep 0.1.0, this worker is 0.2.0",
        ),
        (
            NotAdmitted::Fingerprint { run: Digest(1), worker: Digest(2) }.into(),
            FailedPrecondition,
            Never,
            "the run has 00000000000000000000000000000001",
        ),
        (
            NotAdmitted::Finished { reason: "10 epochs".into() }.into(),
            FailedPrecondition,
            Never,
            "has ended: 10 epochs",
        ),
        (NotAdmitted::Full { members: 512 }.into(), Code::ResourceExhausted, RetryLater, "has 512 workers already"),
        (Refusal::NotAMember { member: MemberId { worker: 3, incarnation: 2 } }, Aborted, JoinAgain, "w3#2 is not"),
        (
            Refusal::NoSuchShard { shard: ShardRef { split: Split::Training, shard: 9 }, shards: 8 },
            InvalidArgument,
            Never,
            "no training shard 9: the run has 8 shards",
        ),
        (Refusal::Malformed { problem: "Join.name: ...".into() }, InvalidArgument, Never, "message: Join.name: ..."),
        (Refusal::Corrupted { problem: "NodeChunk.checksum: ...".into() }, DataLoss, JoinAgain, "NodeChunk.checksum"),
        (Refusal::Shutdown, Unavailable, RetryLater, "shutting down"),
    ]
}

#[test]
fn refusals_travel_as_statuses() {
    for (refusal, code, expected, part) in refusals() {
        let status = Status::from(refusal.clone());
        assert_eq!(status.code(), code);
        assert_eq!(verdict(&status), expected, "{refusal}");
        assert_eq!(Refusal::of(&status), Some(refusal));
        assert!(describe(&status).contains(part), "{}", describe(&status));
        assert!(status.message().contains(part), "clients without our details read the message");
    }
}

#[test]
fn a_malformed_message_becomes_a_status_that_names_the_field() {
    let error = lockstep_proto::convert::SessionUp::try_from(v1::SessionRequest { message: None }).unwrap_err();
    let status = Status::from(error);
    assert_eq!(status.code(), Code::InvalidArgument);
    assert_eq!(describe(&status), "malformed message: SessionRequest.message: is missing");
}

#[test]
fn long_texts_do_not_burst_the_headers() {
    let long = "ä\n".repeat(100_000);
    for refusal in [
        NotAdmitted::Version { run: long.clone(), worker: long.clone() }.into(),
        NotAdmitted::Finished { reason: long.clone() }.into(),
        Refusal::Malformed { problem: long },
    ] {
        let status = Status::from(refusal);
        assert!(status.message().len() <= 1024 && status.details().len() <= 2300, "{}", status.details().len());
        assert!(Refusal::of(&status).is_some());
    }
}

#[test]
fn statuses_of_others_are_described_and_judged() {
    assert_eq!(Refusal::of(&Status::unavailable("tcp connect error")), None);
    assert_eq!(verdict(&Status::unavailable("")), Verdict::RetryLater);
    assert_eq!(verdict(&Status::unauthenticated("")), Verdict::Never);
    assert_eq!(verdict(&Status::unknown("transport error")), Verdict::RetryLater);
    let cause = std::io::Error::other("connection refused");
    assert!(describe(&Status::from_error(Box::new(cause))).ends_with("connection refused"));
}
