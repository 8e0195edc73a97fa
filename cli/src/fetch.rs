//! Getting Fashion-MNIST: `lockstep data fetch`.

use std::fs::{self, File};
use std::io::{BufReader, Read};
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, Result, anyhow, ensure};
use lockstep_common::data::DataError;
use lockstep_common::data::fashion_mnist::{self, PublishedFile};
use lockstep_common::files;

/// Where the authors of Fashion-MNIST publish it.
///
/// Plain HTTP, as is everything fetched here: the SHA-256 of each file is part of the program, so that TLS would protect
/// nothing more, and would be the largest dependency of all.
pub(crate) const DEFAULT_BASE_URL: &str = "http://fashion-mnist.s3-website.eu-central-1.amazonaws.com/";

/// How long a server may take to be reached, and to begin its answer.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(30);

/// How long a server may be silent within its answer. A limit for the whole answer would punish slow lines.
const SILENCE_TIMEOUT: Duration = Duration::from_secs(30);

/// What packing may add to a file: gzip adds 18 bytes, a name, and 5 bytes per 16 KiB that it cannot pack (14,400 bytes
/// for the largest file).
const MAX_PACKING_BYTES: u64 = 64 * 1024;

/// How much is read from the server between two reports of progress, in bytes.
const CHUNK_BYTES: usize = 64 * 1024;

/// How far fetching is. `file` is the name of the packed file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum FetchProgress<'a> {
    /// The file was there, with the right content.
    Present {
        /// The file.
        file: &'a str,
    },
    /// Part of the file has arrived.
    Receiving {
        /// The file.
        file: &'a str,
        /// What has arrived, in bytes.
        received_bytes: u64,
        /// What the server has announced, in bytes.
        total_bytes: Option<u64>,
    },
    /// The file has arrived, was checked, and is in the cache.
    Stored {
        /// The file.
        file: &'a str,
    },
}

/// Fetches the four files of Fashion-MNIST from `from` (a URL like [`DEFAULT_BASE_URL`]) into the directory `cache`,
/// and returns their paths. Files that are there with the right content are not fetched again. A file appears in the
/// cache only once its content was checked.
///
/// # Errors
/// The URL or path, and what went wrong there. What was fetched before stays.
pub(crate) fn fetch_fashion_mnist(
    from: &str,
    cache: &Path,
    progress: impl FnMut(FetchProgress<'_>),
) -> Result<Vec<PathBuf>> {
    fetch_files(&fashion_mnist::FILES, from, cache, progress)
}

fn fetch_files(
    published: &[PublishedFile],
    from: &str,
    cache: &Path,
    mut progress: impl FnMut(FetchProgress<'_>),
) -> Result<Vec<PathBuf>> {
    ensure!(
        from.starts_with("http://"),
        "cannot fetch from {from}: only http:// URLs are supported (the files are protected by their SHA-256)"
    );
    fs::create_dir_all(cache).with_context(|| format!("cannot create the directory {}", cache.display()))?;
    let agent = agent();
    let fetch = |published: &PublishedFile| {
        let file = published.packed_name();
        let path = cache.join(&file);
        if is_present(published, &path) {
            progress(FetchProgress::Present { file: &file });
            return Ok(path);
        }
        let url = format!("{}/{file}", from.trim_end_matches('/'));
        let packed = download(&agent, &url, published, |received_bytes, total_bytes| {
            progress(FetchProgress::Receiving { file: &file, received_bytes, total_bytes });
        })?;
        published.check(&url, packed.as_slice()).map_err(refused)?;
        files::replace(&path, |file| file.write_all(&packed))
            .with_context(|| format!("cannot write {}", path.display()))?;
        progress(FetchProgress::Stored { file: &file });
        Ok(path)
    };
    published.iter().map(fetch).collect()
}

/// The error for a download whose content is wrong. The advice in [`DataError::Checksum`], to remove the file and to
/// fetch it, is for one that is in the cache.
fn refused(error: DataError) -> anyhow::Error {
    match error {
        DataError::Checksum { name, expected, found } => anyhow!(
            "{name} is not the published file: its content has SHA-256 {found}, not {expected}; name another place with \
             --from, or `apt install dataset-fashion-mnist`"
        ),
        other => other.into(),
    }
}

fn agent() -> ureq::Agent {
    ureq::Agent::config_builder()
        .timeout_connect(Some(ANSWER_TIMEOUT))
        .timeout_recv_response(Some(ANSWER_TIMEOUT))
        .timeout_per_read(Some(SILENCE_TIMEOUT))
        .build()
        .into()
}

/// Whether the cache has the file already. One that cannot be read, or has other content, is fetched again.
fn is_present(published: &PublishedFile, path: &Path) -> bool {
    File::open(path).is_ok_and(|file| published.check("", BufReader::new(file)).is_ok())
}

/// What the server gives for `url`, as long as that is not more than the file can have. `progress` takes the bytes
/// received, and the bytes announced.
fn download(
    agent: &ureq::Agent,
    url: &str,
    published: &PublishedFile,
    mut progress: impl FnMut(u64, Option<u64>),
) -> Result<Vec<u8>> {
    let response = agent.get(url).call().with_context(|| {
        format!("cannot fetch {url}; try again, name another place with --from, or `apt install dataset-fashion-mnist`")
    })?;
    let body = response.into_body();
    let total_bytes = body.content_length();
    let max_bytes = published.content_bytes + MAX_PACKING_BYTES;
    let mut reader = body.into_reader();
    let mut packed = Vec::new();
    loop {
        let before = packed.len();
        reader
            .by_ref()
            .take(CHUNK_BYTES as u64)
            .read_to_end(&mut packed)
            .with_context(|| format!("{url} broke off after {before} bytes; try again"))?;
        let received_bytes = packed.len() as u64;
        ensure!(received_bytes <= max_bytes, "{url} is not the published file: it has more than {max_bytes} bytes");
        progress(received_bytes, total_bytes);
        if packed.len() - before < CHUNK_BYTES {
            return Ok(packed);
        }
    }
}

#[cfg(test)]
mod tests {
    use std::io::{BufRead, Write};
    use std::net::TcpListener;
    use std::thread::{self, JoinHandle};

    use super::*;

    /// The messages of FIPS 180-2, with their sums. Files need not be gzipped to be checked.
    const ABC: PublishedFile = PublishedFile {
        name: "abc",
        content_bytes: 3,
        content_sha256: "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad",
    };
    const LONG_TEXT: &[u8] = b"abcdbcdecdefdefgefghfghighijhijkijkljklmklmnlmnomnopnopq";
    const LONG: PublishedFile = PublishedFile {
        name: "long",
        content_bytes: 56,
        content_sha256: "248d6a61d20638b8e5c026930c3e6039a33ce45964ff2167f6ecedd419db06c1",
    };

    /// A server that gives one of `answers` to each connection, and then the paths that it was asked for.
    fn serve(answers: Vec<Vec<u8>>) -> (String, JoinHandle<Vec<String>>) {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let url = format!("http://{}/data/", listener.local_addr().unwrap());
        let server = thread::spawn(move || {
            let answer = |answer: Vec<u8>| {
                let (mut connection, _) = listener.accept().unwrap();
                let mut lines = BufReader::new(connection.try_clone().unwrap()).lines().map(Result::unwrap);
                let request = lines.next().unwrap();
                lines.find(String::is_empty).expect("the end of the request");
                // The client may have seen enough before everything is sent.
                let _ = connection.write_all(&answer);
                request.split(' ').nth(1).unwrap().to_owned()
            };
            answers.into_iter().map(answer).collect()
        });
        (url, server)
    }

    fn ok(body: &[u8]) -> Vec<u8> {
        let head = format!("HTTP/1.1 200 OK\r\nContent-Length: {}\r\nConnection: close\r\n\r\n", body.len());
        [head.as_bytes(), body].concat()
    }

    #[test]
    fn files_are_fetched_once_and_only_when_they_are_not_there() {
        let directory = tempfile::tempdir().unwrap();
        let cache = directory.path().join("lockstep/fashion-mnist");
        let (url, server) = serve(vec![ok(b"abc"), ok(LONG_TEXT)]);
        let mut log = Vec::new();
        let mut fetch =
            |url: &str| fetch_files(&[ABC, LONG], url, &cache, |progress| log.push(format!("{progress:?}"))).unwrap();
        let paths = fetch(&url);
        assert_eq!(paths, ["abc.gz", "long.gz"].map(|name| cache.join(name)));
        assert_eq!(server.join().unwrap(), ["/data/abc.gz", "/data/long.gz"]);
        assert_eq!(fs::read(&paths[0]).unwrap(), b"abc");
        // The server is gone.
        assert_eq!(fetch(&url), paths);
        let expected = [
            r#"Receiving { file: "abc.gz", received_bytes: 3, total_bytes: Some(3) }"#,
            r#"Stored { file: "abc.gz" }"#,
            r#"Receiving { file: "long.gz", received_bytes: 56, total_bytes: Some(56) }"#,
            r#"Stored { file: "long.gz" }"#,
            r#"Present { file: "abc.gz" }"#,
            r#"Present { file: "long.gz" }"#,
        ];
        assert_eq!(log, expected);
    }

    #[test]
    fn a_damaged_file_in_the_cache_is_fetched_again() {
        let cache = tempfile::tempdir().unwrap();
        let path = cache.path().join("abc.gz");
        fs::write(&path, "abd").unwrap();
        let (url, server) = serve(vec![ok(b"abc")]);
        fetch_files(&[ABC], &url, cache.path(), |_| ()).unwrap();
        assert_eq!(server.join().unwrap().len(), 1);
        assert_eq!(fs::read(&path).unwrap(), b"abc");
    }

    #[test]
    fn what_is_wrong_is_said_and_not_kept() {
        let check = |answer: Vec<u8>, expected: &str| {
            let cache = tempfile::tempdir().unwrap();
            let (url, server) = serve(vec![answer]);
            let error = fetch_files(&[ABC], &url, cache.path(), |_| ()).unwrap_err();
            server.join().unwrap();
            let message = format!("{error:#}");
            assert!(message.contains(&format!("{url}abc.gz")) && message.contains(expected), "{message}");
            assert_eq!(fs::read_dir(cache.path()).unwrap().count(), 0);
        };
        check(ok(b"abd"), "is not the published file: its content has SHA-256 a52d159f");
        check(ok(&[0x1f, 0x8b, 1]), "it cannot be read to its end: ");
        check(ok(&vec![0; 66_000]), "is not the published file: it has more than 65539 bytes");
        check(b"HTTP/1.1 200 OK\r\nContent-Length: 3\r\n\r\nab".to_vec(), "broke off");
        check(b"HTTP/1.1 404 Not Found\r\nContent-Length: 0\r\n\r\n".to_vec(), "http status: 404");
    }

    #[test]
    fn places_that_cannot_be_reached_are_named() {
        let cache = tempfile::tempdir().unwrap();
        let check = |from: &str, expected: &str| {
            let message = format!("{:#}", fetch_files(&[ABC], from, cache.path(), |_| ()).unwrap_err());
            assert!(message.contains(expected), "{message}");
        };
        // Nobody listens on a port that was just given back.
        let port = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
        check(&format!("http://127.0.0.1:{port}"), &format!("cannot fetch http://127.0.0.1:{port}/abc.gz; try again"));
        check("https://127.0.0.1/", "cannot fetch from https://127.0.0.1/: only http:// URLs are supported");
    }
}
