//! What a coordinator shows, and what opens it: certificates and tokens, read from files again when those change.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use lockstep_proto::limits::{MAX_PEM_FILE_BYTES, RELOAD_INTERVAL};
use lockstep_proto::secret_file::{FileError, certificates, private_key, read, warn_if_public};
use lockstep_proto::token::{Token, TokenFileError, Tokens};
use tokio::sync::watch;
use tokio::time::MissedTickBehavior;
use tokio_rustls::rustls::crypto::{CryptoProvider, ring};
use tokio_rustls::rustls::server::WebPkiClientVerifier;
use tokio_rustls::rustls::server::danger::ClientCertVerifier;
use tokio_rustls::rustls::version::TLS13;
use tokio_rustls::rustls::{RootCertStore, ServerConfig};
use tracing::{info, warn};

/// Where a coordinator's credentials are. Without any, connections are not encrypted, and whoever comes is let in.
#[derive(Clone, Debug, Default)]
pub struct CredentialSources {
    /// What encrypts connections.
    pub tls: Option<TlsFiles>,
    /// What opens the services.
    pub tokens: Option<TokenSources>,
}

/// Files in PEM form.
#[derive(Clone, Debug)]
pub struct TlsFiles {
    /// The coordinator's chain of certificates, its own first.
    pub certificate: PathBuf,
    /// Its private key.
    pub key: PathBuf,
    /// Who may vouch for clients: with this, clients must have a certificate.
    pub client_ca: Option<PathBuf>,
}

/// One secret for each thing that clients do. Without the second and third, nobody may do those.
#[derive(Clone, Debug)]
pub struct TokenSources {
    /// To work.
    pub join: TokenSource,
    /// To look.
    pub watch: Option<TokenSource>,
    /// To command, and to look as well.
    pub control: Option<TokenSource>,
}

/// Where a secret is.
#[derive(Clone, Debug)]
pub enum TokenSource {
    /// It was given, by the environment for example.
    Fixed(Token),
    /// One of the lines of this file.
    File(PathBuf),
}

/// Why credentials cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum CredentialError {
    /// A file cannot be used.
    #[error(transparent)]
    File(#[from] FileError),
    /// A token file has none.
    #[error(transparent)]
    Token(#[from] TokenFileError),
    /// Tokens that should open different doors are the same.
    #[error("{one} and {other} are the same; each must have a token of its own")]
    Same {
        /// Which token.
        one: &'static str,
        /// And which other.
        other: &'static str,
    },
    /// A file's certificates are those of no authority.
    #[error("{path} cannot vouch for clients: {reason}", path = path.display())]
    Authority {
        /// The file.
        path: PathBuf,
        /// What is wrong.
        reason: String,
    },
    /// Together they make no server.
    #[error("cannot serve with {certificate} and {key}: {reason}", certificate = certificate.display(), key = key.display())]
    Tls {
        /// The certificate's file.
        certificate: PathBuf,
        /// The key's file.
        key: PathBuf,
        /// What is wrong.
        reason: String,
    },
}

/// Credentials as they are in force at a moment.
#[derive(Clone, Debug, Default)]
pub(super) struct InForce {
    pub(super) tls: Option<Arc<ServerConfig>>,
    pub(super) tokens: Option<AccessTokens>,
}

/// What opens each of the services.
#[derive(Clone, Debug)]
pub(super) struct AccessTokens {
    pub(super) join: Tokens,
    pub(super) watch: Option<Tokens>,
    pub(super) control: Option<Tokens>,
}

/// Credentials that follow their files.
pub struct Credentials {
    sources: CredentialSources,
    seen: Vec<Option<Vec<u8>>>,
    current: watch::Sender<Arc<InForce>>,
}

impl Credentials {
    /// Reads everything for the first time.
    ///
    /// # Errors
    /// [`CredentialError`] when something cannot be used.
    pub fn load(sources: CredentialSources) -> Result<Self, CredentialError> {
        sources.secret_files().into_iter().for_each(warn_if_public);
        // Before it is used: what changes in between is seen as a change.
        let seen = sources.contents();
        let current = watch::Sender::new(Arc::new(sources.load()?));
        Ok(Self { sources, seen, current })
    }

    /// No encryption, and no tokens.
    pub fn open() -> Self {
        Self { sources: CredentialSources::default(), seen: Vec::new(), current: watch::Sender::default() }
    }

    pub(super) fn current(&self) -> watch::Receiver<Arc<InForce>> {
        self.current.subscribe()
    }

    /// Looks at the files again and again, until nobody wants to know any more. What is wrong with new ones is said
    /// loudly, once; the ones before stay in force.
    pub(super) async fn follow(mut self) {
        if self.sources.files().is_empty() {
            return;
        }
        let mut interval = tokio::time::interval(RELOAD_INTERVAL);
        interval.set_missed_tick_behavior(MissedTickBehavior::Delay);
        loop {
            tokio::select! {
                () = self.current.closed() => return,
                _ = interval.tick() => {}
            }
            let (sources, seen) = (self.sources.clone(), self.seen.clone());
            let look = move || {
                let contents = sources.contents();
                (contents != seen).then(|| (contents, sources.load()))
            };
            // Only the end of the process, or a panic of the look, gives nothing.
            let Ok(looked) = tokio::task::spawn_blocking(look).await else { return };
            let Some((contents, loaded)) = looked else { continue };
            self.seen = contents;
            match loaded {
                Ok(loaded) => {
                    info!("new certificates and tokens are in force: their files have changed");
                    self.current.send_replace(Arc::new(loaded));
                }
                Err(error) => {
                    warn!("new certificates or tokens cannot be used, the ones before stay in force: {error}")
                }
            }
        }
    }
}

impl CredentialSources {
    fn files(&self) -> Vec<&Path> {
        let tls = self.tls.iter().flat_map(|tls| [Some(&tls.certificate), Some(&tls.key), tls.client_ca.as_ref()]);
        tls.flatten().map(PathBuf::as_path).chain(self.token_files()).collect()
    }

    fn token_files(&self) -> impl Iterator<Item = &Path> {
        let tokens = self.tokens.iter().flat_map(|tokens| {
            [Some(&tokens.join), tokens.watch.as_ref(), tokens.control.as_ref()].into_iter().flatten()
        });
        tokens.filter_map(|source| match source {
            TokenSource::File(path) => Some(path.as_path()),
            TokenSource::Fixed(_) => None,
        })
    }

    fn secret_files(&self) -> Vec<&Path> {
        self.tls.iter().map(|tls| tls.key.as_path()).chain(self.token_files()).collect()
    }

    /// What is in the files now. They are small, and comparing them finds every change, however it was made.
    fn contents(&self) -> Vec<Option<Vec<u8>>> {
        self.files().into_iter().map(|path| read(path, MAX_PEM_FILE_BYTES).ok()).collect()
    }

    fn load(&self) -> Result<InForce, CredentialError> {
        let tls = self.tls.as_ref().map(TlsFiles::load).transpose()?.map(Arc::new);
        let tokens = self.tokens.as_ref().map(TokenSources::load).transpose()?;
        Ok(InForce { tls, tokens })
    }
}

impl TokenSources {
    fn load(&self) -> Result<AccessTokens, CredentialError> {
        let optional = |source: &Option<TokenSource>| source.as_ref().map(TokenSource::load).transpose();
        let tokens =
            AccessTokens { join: self.join.load()?, watch: optional(&self.watch)?, control: optional(&self.control)? };
        let AccessTokens { join, watch, control } = &tokens;
        let same = |one: Option<&Tokens>, other: Option<&Tokens>| {
            one.zip(other).is_some_and(|(one, other)| one.overlap(other))
        };
        let (join, watch, control) = (Some(join), watch.as_ref(), control.as_ref());
        for (one, other, are) in [
            ("the join token", "the watch token", same(join, watch)),
            ("the join token", "the control token", same(join, control)),
            ("the watch token", "the control token", same(watch, control)),
        ] {
            if are {
                return Err(CredentialError::Same { one, other });
            }
        }
        Ok(tokens)
    }
}

impl TokenSource {
    fn load(&self) -> Result<Tokens, TokenFileError> {
        match self {
            Self::Fixed(token) => Ok(Tokens::of(std::slice::from_ref(token))),
            Self::File(path) => Tokens::read(path),
        }
    }
}

impl TlsFiles {
    /// TLS 1.3 and HTTP/2, nothing older.
    fn load(&self) -> Result<ServerConfig, CredentialError> {
        let Self { certificate, key, client_ca } = self;
        let wrong =
            |reason: String| CredentialError::Tls { certificate: certificate.clone(), key: key.clone(), reason };
        let provider = Arc::new(ring::default_provider());
        let builder = ServerConfig::builder_with_provider(provider.clone())
            .with_protocol_versions(&[&TLS13])
            .map_err(|error| wrong(error.to_string()))?;
        let builder = match client_ca {
            Some(path) => builder.with_client_cert_verifier(client_verifier(path, provider)?),
            None => builder.with_no_client_auth(),
        };
        let mut config = builder
            .with_single_cert(certificates(certificate)?, private_key(key)?)
            .map_err(|error| wrong(error.to_string()))?;
        config.alpn_protocols = vec![b"h2".to_vec()];
        Ok(config)
    }
}

fn client_verifier(path: &Path, provider: Arc<CryptoProvider>) -> Result<Arc<dyn ClientCertVerifier>, CredentialError> {
    let wrong = |reason: String| CredentialError::Authority { path: path.to_owned(), reason };
    let mut roots = RootCertStore::empty();
    for certificate in certificates(path)? {
        roots.add(certificate).map_err(|error| wrong(error.to_string()))?;
    }
    let builder = WebPkiClientVerifier::builder_with_provider(Arc::new(roots), provider);
    builder.build().map_err(|error| wrong(error.to_string()))
}
