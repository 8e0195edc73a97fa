//! How the commands that go to a coordinator reach it: address, certificates, token.

use std::path::PathBuf;
use std::time::Duration;

use anyhow::Context;
use clap::Args;
use lockstep_proto::secret_file::warn_if_public;
use lockstep_proto::status::describe;
use lockstep_proto::target::{Access, Connection, IdentityFiles, Target, TokenSource};
use lockstep_proto::token::Token;
use tonic::{Code, Response, Status};

use crate::exit::usage;

/// The environment variables that tokens may come in. There is no option for a token itself: everybody on a machine can
/// see the arguments of its processes.
pub(crate) const JOIN_TOKEN: &str = "LOCKSTEP_JOIN_TOKEN";
pub(crate) const WATCH_TOKEN: &str = "LOCKSTEP_WATCH_TOKEN";
pub(crate) const CONTROL_TOKEN: &str = "LOCKSTEP_CONTROL_TOKEN";

/// How a coordinator is reached.
#[derive(Args, Clone, Debug)]
pub(crate) struct ConnectArgs {
    /// Trust a coordinator for which one of the authorities in this file vouches (PEM), instead of the system's
    #[arg(long, value_name = "FILE")]
    tls_ca: Option<PathBuf>,
    /// Show this certificate to a coordinator that demands one (PEM)
    #[arg(long, value_name = "FILE", requires = "tls_key")]
    tls_cert: Option<PathBuf>,
    /// The certificate's private key (PEM)
    #[arg(long, value_name = "FILE", requires = "tls_cert")]
    tls_key: Option<PathBuf>,
    /// The name that must stand in the coordinator's certificate [default: the host of the address]
    #[arg(long, value_name = "NAME")]
    tls_name: Option<String>,
    /// Read the token from this file. Without it, the token is in the environment: LOCKSTEP_JOIN_TOKEN for worker,
    /// LOCKSTEP_WATCH_TOKEN for monitor, LOCKSTEP_CONTROL_TOKEN for stop and drain
    #[arg(long, value_name = "FILE")]
    token_file: Option<PathBuf>,
    /// Send the token over the network although nothing is encrypted
    #[arg(long)]
    insecure: bool,
}

impl ConnectArgs {
    /// The coordinator at `address`, which is `host:port` or a whole URL; `variable` may have the token.
    pub(crate) fn target(&self, address: &str, variable: &str) -> anyhow::Result<Target> {
        let encrypted = self.tls_ca.is_some() || self.tls_cert.is_some() || self.tls_name.is_some();
        let identity = self.tls_cert.clone().zip(self.tls_key.clone());
        let identity = identity.map(|(certificate, key)| IdentityFiles { certificate, key });
        let token = match &self.token_file {
            Some(path) => TokenSource::File(path.clone()),
            None => token_in_environment(variable)?.map_or(TokenSource::None, TokenSource::Fixed),
        };
        self.token_file.iter().chain(&self.tls_key).for_each(|path| warn_if_public(path));
        let url = complete_url(address, if encrypted { "https" } else { "http" });
        Ok(Target {
            url,
            ca: self.tls_ca.clone(),
            identity,
            name: self.tls_name.clone(),
            token,
            insecure: self.insecure,
        })
    }
}

/// How long the coordinator may take to answer.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(10);

/// A coordinator that was reached.
pub(crate) struct Reached {
    access: Access,
    pub(crate) connection: Connection,
}

/// Connects once.
pub(crate) async fn connect(target: &Target) -> anyhow::Result<Reached> {
    let access = target.load().map_err(usage)?;
    match access.connect().await {
        Ok(connection) => Ok(Reached { access, connection }),
        Err(error) => {
            let permanent = error.permanent;
            let error = anyhow::Error::new(error).context(format!("cannot reach {}", target.url));
            Err(if permanent { usage(error) } else { error })
        }
    }
}

impl Reached {
    /// Waits for the answer to a call, not for ever.
    pub(crate) async fn answer<T>(&self, call: impl Future<Output = Result<Response<T>, Status>>) -> anyhow::Result<T> {
        let response = tokio::time::timeout(ANSWER_TIMEOUT, call).await;
        let response = response.with_context(|| format!("no answer within {} s", ANSWER_TIMEOUT.as_secs()))?;
        response.map(Response::into_inner).map_err(|status| match self.access.refused(&status) {
            Some(refused) => usage(refused),
            None if matches!(status.code(), Code::NotFound | Code::FailedPrecondition) => {
                usage(anyhow::anyhow!(describe(&status)))
            }
            None => anyhow::anyhow!(describe(&status)),
        })
    }
}

/// The token in an environment variable; none if the variable is not set, or empty.
pub(crate) fn token_in_environment(variable: &str) -> anyhow::Result<Option<Token>> {
    let value = match std::env::var(variable) {
        Ok(value) => value,
        Err(std::env::VarError::NotPresent) => return Ok(None),
        Err(std::env::VarError::NotUnicode(_)) => {
            return Err(usage(anyhow::anyhow!("the value of {variable} is no text")));
        }
    };
    if value.trim().is_empty() {
        return Ok(None);
    }
    Token::parse(&value).with_context(|| format!("the value of {variable} cannot be used")).map(Some).map_err(usage)
}

/// Accepts `host:port` as well as a whole URL.
fn complete_url(given: &str, scheme: &str) -> String {
    if given.contains("://") { given.to_owned() } else { format!("{scheme}://{given}") }
}
