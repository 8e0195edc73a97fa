//! The way to a coordinator: its address, and what a client shows to be let in.

use std::error::Error;
use std::path::PathBuf;

use tokio_rustls::rustls;
use tokio_rustls::rustls::pki_types::ServerName;
use tonic::metadata::{Ascii, MetadataValue};
use tonic::service::Interceptor;
use tonic::service::interceptor::InterceptedService;
use tonic::transport::{Certificate, Channel, ClientTlsConfig, Endpoint, Identity};
use tonic::{Code, Request, Status};

use crate::limits::{HANDSHAKE_TIMEOUT, MAX_PEM_FILE_BYTES};
use crate::secret_file::{FileError, certificates, private_key, read};
use crate::status::describe;
use crate::token::{Token, TokenFileError, read_tokens};
use crate::transport;

/// A coordinator, as one of its clients reaches it. Files are read by [`load`](Self::load), so that a client that
/// connects anew can use new ones.
#[derive(Clone, Debug)]
pub struct Target {
    /// For example `https://10.0.0.1:7400`; `http://` without encryption.
    pub url: String,
    /// Certificates of the authorities that may vouch for the coordinator; those of the system without it.
    pub ca: Option<PathBuf>,
    /// What the client shows to a coordinator that demands a certificate.
    pub identity: Option<IdentityFiles>,
    /// The name that must stand in the coordinator's certificate, if it is not the host of the address.
    pub name: Option<String>,
    /// What opens the coordinator's services.
    pub token: TokenSource,
    /// Whether the token may travel unencrypted to other hosts.
    pub insecure: bool,
}

/// A certificate and its key.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct IdentityFiles {
    /// The chain of certificates, the own one first (PEM).
    pub certificate: PathBuf,
    /// The private key (PEM).
    pub key: PathBuf,
}

/// Where a client's token is.
#[derive(Clone, Debug)]
pub enum TokenSource {
    /// There is none.
    None,
    /// It was given, by the environment for example.
    Fixed(Token),
    /// The first line of this file.
    File(PathBuf),
}

/// What keeps a client from even trying.
#[derive(Debug, thiserror::Error)]
pub enum TargetError {
    /// The address is none.
    #[error("{url:?} is no address of a coordinator: {reason}; expected something like https://10.0.0.1:7400")]
    Url {
        /// What was given.
        url: String,
        /// What is wrong with it.
        reason: String,
    },
    /// The secret would be readable on its way.
    #[error(
        "the token would travel unencrypted to {url}; use https:// (and --tls-ca), or add --insecure if the network is trusted"
    )]
    TokenInTheOpen {
        /// Where to.
        url: String,
    },
    /// Certificates were given that would not be used.
    #[error("certificates need an https:// address, and {url} is none")]
    Unencrypted {
        /// The address.
        url: String,
    },
    /// A file cannot be used.
    #[error(transparent)]
    File(#[from] FileError),
    /// The token's file has none.
    #[error(transparent)]
    Token(#[from] TokenFileError),
    /// Together they make no client.
    #[error("cannot use these certificates: {0}")]
    Tls(String),
}

/// Puts the token into every request; by default there is none.
#[derive(Clone, Debug, Default)]
pub struct Bearer(Option<MetadataValue<Ascii>>);

impl Interceptor for Bearer {
    fn call(&mut self, mut request: Request<()>) -> Result<Request<()>, Status> {
        if let Some(value) = &self.0 {
            request.metadata_mut().insert("authorization", value.clone());
        }
        Ok(request)
    }
}

/// A connection whose requests carry the client's token.
pub type Connection = InterceptedService<Channel, Bearer>;

/// A target with its files read.
#[derive(Clone, Debug)]
pub struct Access {
    endpoint: Endpoint,
    /// Whether there is no certificate of its own.
    anonymous: bool,
    bearer: Bearer,
}

/// Why there is no connection.
#[derive(Clone, Debug, thiserror::Error)]
#[error("{reason}")]
pub struct ConnectError {
    /// What happened, with its causes.
    pub reason: String,
    /// Whether trying again is in vain: the certificates do not fit together.
    pub permanent: bool,
}

impl ConnectError {
    fn permanent(reason: String, hint: &str) -> Self {
        Self { reason: format!("{reason}; {hint}"), permanent: true }
    }
}

const PLAIN_HINT: &str = "it does not speak TLS: is its address one with http://?";
const TRUST_HINT: &str = "--tls-ca names the authority to trust, --tls-name the name in the certificate";
const TLS_HINT: &str = "it seems to speak TLS: use https://, and --tls-ca";
const IDENTITY_HINT: &str = "it lets in clients only with a certificate that it trusts: --tls-cert and --tls-key";

const ANONYMOUS_HINT: &str =
    "if it lets in clients only with a certificate that it trusts, there must be --tls-cert and --tls-key";

/// What hyper says to a call on a connection that is closed already. If an alert closed it, that is lost.
const CLOSED: &str = "connection closed";

/// What rustls calls the alerts that a server answers a client's certificate with, or the lack of one.
const CERTIFICATE_ALERTS: [&str; 7] = [
    "alert: CertificateRequired",
    "alert: CertificateExpired",
    "alert: CertificateUnknown",
    "alert: BadCertificate",
    "alert: UnsupportedCertificate",
    "alert: UnknownCA",
    "alert: DecryptError",
];

/// What h2 says to a TLS alert, read as a frame.
const NO_FRAME: &str = "frame with invalid size";

impl Target {
    /// A coordinator that is open to everybody, without encryption.
    pub fn open(url: impl Into<String>) -> Self {
        Self { url: url.into(), ca: None, identity: None, name: None, token: TokenSource::None, insecure: false }
    }

    /// Reads the files.
    ///
    /// # Errors
    /// [`TargetError`] when one of them cannot be used, or the token would travel unencrypted.
    pub fn load(&self) -> Result<Access, TargetError> {
        let wrong = |reason: String| TargetError::Url { url: self.url.clone(), reason };
        let endpoint = Endpoint::from_shared(self.url.clone()).map_err(|error| wrong(error.to_string()))?;
        let host = endpoint.uri().host().unwrap_or_default().to_owned();
        let encrypted = match endpoint.uri().scheme_str() {
            Some("https") => true,
            Some("http") => false,
            _ => return Err(wrong("it begins neither with https:// nor with http://".to_owned())),
        };
        let token = match &self.token {
            TokenSource::None => None,
            TokenSource::Fixed(token) => Some(token.clone()),
            TokenSource::File(path) => read_tokens(path)?.into_iter().next(),
        };
        if token.is_some() && !encrypted && !self.insecure && !is_loopback(&host) {
            return Err(TargetError::TokenInTheOpen { url: self.url.clone() });
        }
        let mut endpoint = transport::configure(endpoint);
        if encrypted {
            endpoint = endpoint.tls_config(self.tls()?).map_err(|error| TargetError::Tls(causes(&error)))?;
        } else if self.ca.is_some() || self.identity.is_some() || self.name.is_some() {
            return Err(TargetError::Unencrypted { url: self.url.clone() });
        }
        let anonymous = self.identity.is_none();
        Ok(Access { endpoint, anonymous, bearer: Bearer(token.map(|token| token.bearer())) })
    }

    fn tls(&self) -> Result<ClientTlsConfig, TargetError> {
        let mut config = ClientTlsConfig::new().timeout(HANDSHAKE_TIMEOUT);
        config = match &self.ca {
            Some(path) => {
                // Of what is not one, tonic says nothing.
                certificates(path)?;
                config.ca_certificate(Certificate::from_pem(read(path, MAX_PEM_FILE_BYTES)?))
            }
            None => config.with_native_roots(),
        };
        if let Some(IdentityFiles { certificate, key }) = &self.identity {
            certificates(certificate)?;
            private_key(key)?;
            let [certificate, key] = [read(certificate, MAX_PEM_FILE_BYTES)?, read(key, MAX_PEM_FILE_BYTES)?];
            config = config.identity(Identity::from_pem(certificate, key));
        }
        if let Some(name) = &self.name {
            config = config.domain_name(name);
        }
        Ok(config)
    }
}

impl Access {
    /// Connects.
    ///
    /// # Errors
    /// [`ConnectError`] when nobody answers, or not as it should be.
    pub async fn connect(&self) -> Result<Connection, ConnectError> {
        match self.endpoint.connect().await {
            Ok(channel) => Ok(InterceptedService::new(channel, self.bearer.clone())),
            Err(error) => Err(self.why(&error)),
        }
    }

    fn why(&self, error: &(dyn Error + 'static)) -> ConnectError {
        let reason = causes(error);
        match tls_error(error) {
            Some(rustls::Error::InvalidMessage(_)) => ConnectError::permanent(reason, PLAIN_HINT),
            Some(rustls::Error::InvalidCertificate(_)) => ConnectError::permanent(reason, TRUST_HINT),
            _ => ConnectError { reason, permanent: false },
        }
    }

    /// Why a first call has failed, if it was because of how the client connects: with TLS 1.3, a coordinator looks at a
    /// client's certificate when the client believes to be connected already.
    pub fn refused(&self, status: &Status) -> Option<ConnectError> {
        if matches!(status.code(), Code::Unauthenticated | Code::PermissionDenied) {
            return Some(ConnectError { reason: describe(status), permanent: true });
        }
        // h2 keeps the text of what caused an error, and nothing else of it.
        let reason = describe(status);
        let encrypted = self.endpoint.uri().scheme_str() == Some("https");
        if encrypted && self.anonymous && reason.contains(CLOSED) {
            return Some(ConnectError { reason: format!("{reason}; {ANONYMOUS_HINT}"), permanent: false });
        }
        let hint = if encrypted {
            CERTIFICATE_ALERTS.iter().any(|alert| reason.contains(alert)).then_some(IDENTITY_HINT)
        } else {
            reason.contains(NO_FRAME).then_some(TLS_HINT)
        };
        hint.map(|hint| ConnectError::permanent(reason, hint))
    }
}

/// Whether a name or address can stand in a certificate.
pub fn can_be_certified(host: &str) -> bool {
    ServerName::try_from(host.strip_prefix("*.").unwrap_or(host)).is_ok()
}

/// Whether a host of an address is this machine, without asking anybody.
fn is_loopback(host: &str) -> bool {
    let host = host.trim_start_matches('[').trim_end_matches(']');
    host == "localhost" || host.parse::<std::net::IpAddr>().is_ok_and(|address| address.is_loopback())
}

/// An error and what caused it, each said once.
fn causes(error: &(dyn Error + 'static)) -> String {
    let mut words = error.to_string();
    for cause in std::iter::successors(error.source(), |&cause| cause.source()) {
        let cause = cause.to_string();
        if !words.contains(&cause) {
            words = format!("{words}: {cause}");
        }
    }
    words
}

/// What TLS had to say about it, if anything.
fn tls_error<'a>(error: &'a (dyn Error + 'static)) -> Option<&'a rustls::Error> {
    // An IO error shows what it wraps, but its source is that error's source.
    let own = |error: &'a (dyn Error + 'static)| {
        let wrapped = error.downcast_ref::<std::io::Error>().and_then(std::io::Error::get_ref);
        wrapped.and_then(|wrapped| wrapped.downcast_ref()).or_else(|| error.downcast_ref())
    };
    std::iter::successors(Some(error), |&error| error.source()).find_map(own)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn problem(target: Target) -> String {
        target.load().map(|_| ()).unwrap_err().to_string()
    }

    #[test]
    fn a_token_stays_at_home_or_travels_encrypted() {
        let token = TokenSource::Fixed(Token::random().unwrap());
        let with = |url: &str, insecure| Target { token: token.clone(), insecure, ..Target::open(url) };
        for url in ["http://127.0.0.1:1", "http://127.8.0.1:1", "http://[::1]:1", "http://localhost:1"] {
            assert!(with(url, false).load().is_ok(), "{url}");
        }
        for url in ["http://10.0.0.1:1", "http://coordinator:7400", "http://localhost.example:1", "http://[::2]:1"] {
            assert!(problem(with(url, false)).contains("would travel unencrypted"), "{url}");
            assert!(with(url, true).load().is_ok(), "{url}");
            assert!(Target::open(url).load().is_ok(), "{url} without a token");
        }
    }

    /// Scenario: the coordinator demands a certificate, and its alert was read before the call was made. Property: what may
    /// be missing is said, and it is worth trying again.
    #[test]
    fn a_connection_that_was_closed_without_a_word_may_need_a_certificate() {
        let access = |url: &str| Target::open(url).load().unwrap();
        let closed = Status::cancelled("operation was canceled: connection closed");
        let refused = access("https://127.0.0.1:1").refused(&closed).expect("an explanation");
        assert!(!refused.permanent && refused.reason.contains("--tls-cert"), "{refused}");
        let certified = Access { anonymous: false, ..access("https://127.0.0.1:1") };
        assert!(certified.refused(&closed).is_none());
        assert!(access("http://127.0.0.1:1").refused(&closed).is_none());
    }

    #[test]
    fn addresses_and_files_that_cannot_be_are_named() {
        assert!(problem(Target::open("ftp://10.0.0.1")).contains("neither with https:// nor with http://"));
        assert!(problem(Target::open("http://[")).contains("is no address"));
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("ca.crt");
        let ca = |url: &str| Target { ca: Some(path.clone()), ..Target::open(url) };
        assert!(problem(ca("https://127.0.0.1:1")).contains("cannot read"));
        std::fs::write(&path, "not PEM").unwrap();
        assert!(problem(ca("https://127.0.0.1:1")).contains("has no certificate in PEM form"));
        assert!(problem(ca("http://127.0.0.1:1")).contains("need an https:// address"));
    }
}
