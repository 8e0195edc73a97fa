//! Files with keys, certificates and tokens: small, and better not readable by everybody.

use std::fs::File;
use std::io::{self, Read};
use std::path::{Path, PathBuf};

use tokio_rustls::rustls::pki_types::pem::PemObject;
use tokio_rustls::rustls::pki_types::{CertificateDer, PrivateKeyDer};
use tracing::warn;

use crate::limits::MAX_PEM_FILE_BYTES;

/// Why a file cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum FileError {
    /// It cannot be read.
    #[error("cannot read {path}: {cause}", path = path.display())]
    Read {
        /// The file.
        path: PathBuf,
        /// The system's answer.
        cause: io::Error,
    },
    /// It is no such file.
    #[error("{path} is larger than {limit} bytes; is it the right file?", path = path.display())]
    TooLarge {
        /// The file.
        path: PathBuf,
        /// How large it may be.
        limit: usize,
    },
    /// It does not have what it should have.
    #[error("{path} has no {what} in PEM form: {reason}", path = path.display())]
    Pem {
        /// The file.
        path: PathBuf,
        /// What should be there.
        what: &'static str,
        /// What is wrong.
        reason: String,
    },
}

/// The certificates of a file in PEM form, at least one.
///
/// # Errors
/// [`FileError`] when the file cannot be read or has none.
pub fn certificates(path: &Path) -> Result<Vec<CertificateDer<'static>>, FileError> {
    let wrong = |reason: String| FileError::Pem { path: path.to_owned(), what: "certificate", reason };
    let bytes = read(path, MAX_PEM_FILE_BYTES)?;
    let found: Result<Vec<_>, _> = CertificateDer::pem_slice_iter(&bytes).collect();
    match found {
        Ok(found) if found.is_empty() => Err(wrong("nothing was found".to_owned())),
        Ok(found) => Ok(found),
        Err(error) => Err(wrong(error.to_string())),
    }
}

/// The private key in a file in PEM form.
///
/// # Errors
/// [`FileError`] when the file cannot be read or has none.
pub fn private_key(path: &Path) -> Result<PrivateKeyDer<'static>, FileError> {
    let bytes = read(path, MAX_PEM_FILE_BYTES)?;
    PrivateKeyDer::from_pem_slice(&bytes).map_err(|error| {
        let reason = error.to_string();
        FileError::Pem { path: path.to_owned(), what: "private key", reason }
    })
}

/// Reads a file of at most `limit` bytes.
///
/// # Errors
/// [`FileError`] when it cannot be read, or is larger.
pub fn read(path: &Path, limit: usize) -> Result<Vec<u8>, FileError> {
    let failed = |cause| FileError::Read { path: path.to_owned(), cause };
    let file = File::open(path).map_err(failed)?;
    let mut bytes = Vec::new();
    file.take(limit as u64 + 1).read_to_end(&mut bytes).map_err(failed)?;
    if bytes.len() > limit {
        return Err(FileError::TooLarge { path: path.to_owned(), limit });
    }
    Ok(bytes)
}

/// Says so if a file with a secret can be read by every user of this machine. It is no error: secrets that Kubernetes
/// mounts have such a mode by default, in containers with no other users.
pub fn warn_if_public(path: &Path) {
    #[cfg(unix)]
    {
        use std::os::unix::fs::PermissionsExt;
        // Whether it can be read at all, reading it will tell.
        let Ok(metadata) = std::fs::metadata(path) else { return };
        let mode = metadata.permissions().mode() & 0o777;
        if mode & 0o004 != 0 {
            warn!(
                "every user of this machine can read the secret in {path} (mode {mode:o}): chmod 600 {path}",
                path = path.display()
            );
        }
    }
}
