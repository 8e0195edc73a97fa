//! Where a coordinator listens, what it shows, and whom it lets in.

use std::net::SocketAddr;
use std::path::PathBuf;

use clap::Args;
use lockstep_coordinator::grpc::{CredentialSources, Credentials, TlsFiles, TokenSource, TokenSources};

use tracing::warn;

use crate::connect::{CONTROL_TOKEN, JOIN_TOKEN, WATCH_TOKEN, token_in_environment};
use crate::exit::usage;

/// How a coordinator can be reached, and by whom.
#[derive(Args, Debug)]
pub(crate) struct ServeArgs {
    /// Address to listen on. Others than loopback need --tls-cert and a join token, or --insecure
    #[arg(long, value_name = "ADDRESS:PORT", default_value = "127.0.0.1:7400")]
    pub(crate) listen: SocketAddr,
    /// Encrypt, and show this chain of certificates (PEM). Read again when it changes
    #[arg(long, value_name = "FILE", requires = "tls_key")]
    tls_cert: Option<PathBuf>,
    /// The certificate's private key (PEM)
    #[arg(long, value_name = "FILE", requires = "tls_cert")]
    tls_key: Option<PathBuf>,
    /// Let in only clients with a certificate for which an authority in this file vouches (PEM)
    #[arg(long, value_name = "FILE", requires = "tls_cert")]
    tls_client_ca: Option<PathBuf>,
    /// Let workers join only with a token in this file, one a line. Without it, the token is in LOCKSTEP_JOIN_TOKEN
    #[arg(long, value_name = "FILE")]
    join_token_file: Option<PathBuf>,
    /// The same for watching (lockstep monitor), or LOCKSTEP_WATCH_TOKEN. With a join token and without this, nobody may
    /// watch
    #[arg(long, value_name = "FILE")]
    watch_token_file: Option<PathBuf>,
    /// The same for controlling (lockstep stop, drain), or LOCKSTEP_CONTROL_TOKEN. It opens watching as well
    #[arg(long, value_name = "FILE")]
    control_token_file: Option<PathBuf>,
    /// Listen on other addresses than loopback without TLS, or without a join token
    #[arg(long)]
    insecure: bool,
}

impl ServeArgs {
    /// Reads certificates and tokens, and checks that they are enough for the address.
    pub(crate) fn credentials(&self) -> anyhow::Result<Credentials> {
        let join = source(self.join_token_file.as_ref(), JOIN_TOKEN)?;
        let watch = source(self.watch_token_file.as_ref(), WATCH_TOKEN)?;
        let control = source(self.control_token_file.as_ref(), CONTROL_TOKEN)?;
        let lone = watch.is_some() || control.is_some();
        let tokens = match join {
            Some(join) => Some(TokenSources { join, watch, control }),
            None if lone => {
                return Err(usage(anyhow::anyhow!(
                    "there is a token to watch or to control, but none to join: anybody could join; add --join-token-file or {JOIN_TOKEN}"
                )));
            }
            None => None,
        };
        let tls = self.tls_cert.clone().zip(self.tls_key.clone());
        let tls = tls.map(|(certificate, key)| TlsFiles { certificate, key, client_ca: self.tls_client_ca.clone() });
        let lacks = Lacks { tls: tls.is_none(), token: tokens.is_none() };
        if let Some(problem) = lacks.problem(self.listen).filter(|_| !self.insecure) {
            return Err(usage(anyhow::anyhow!(problem)));
        }
        Credentials::load(CredentialSources { tls, tokens }).map_err(usage)
    }

    /// What the coordinator's address begins with.
    pub(crate) fn scheme(&self) -> &'static str {
        if self.tls_cert.is_some() { "https" } else { "http" }
    }
}

fn source(file: Option<&PathBuf>, variable: &str) -> anyhow::Result<Option<TokenSource>> {
    match file {
        Some(path) => Ok(Some(TokenSource::File(path.clone()))),
        None => Ok(token_in_environment(variable)?.map(TokenSource::Fixed)),
    }
}

/// File descriptors of a coordinator beside those that come with connections: files of the run, listeners, the runtime.
const OTHER_DESCRIPTORS: u64 = 128;

/// Raises the limit on open files for so many connections; each pair of them may come with memory shared with a worker.
/// Returns how many connections there can be: otherwise checkpoints could not be written when many come.
pub(crate) fn make_room_for(connections: u32) -> u32 {
    let wanted = OTHER_DESCRIPTORS + u64::from(connections) * 3 / 2;
    let granted = raise_descriptor_limit(wanted);
    if granted >= wanted {
        return connections;
    }
    let possible = (granted.saturating_sub(OTHER_DESCRIPTORS) * 2 / 3).max(1) as u32;
    warn!(
        "the system lets this process open {granted} files, and cluster.max_connections = {connections} may need {wanted}: {possible} connections are taken; raise the limit (ulimit -n)"
    );
    possible
}

/// Raises the limit as far as it is needed and may be. Returns what it is.
#[cfg(unix)]
fn raise_descriptor_limit(wanted: u64) -> u64 {
    use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
    // No value means no limit.
    let now = getrlimit(Resource::Nofile);
    let Some(current) = now.current.filter(|&current| current < wanted) else { return u64::MAX };
    let raised = now.maximum.map_or(wanted, |maximum| maximum.min(wanted));
    match setrlimit(Resource::Nofile, Rlimit { current: Some(raised), maximum: now.maximum }) {
        Ok(()) => raised,
        Err(_) => current,
    }
}

#[cfg(not(unix))]
fn raise_descriptor_limit(_: u64) -> u64 {
    u64::MAX
}

/// What a coordinator has not got.
#[derive(Clone, Copy, Debug)]
struct Lacks {
    tls: bool,
    token: bool,
}

impl Lacks {
    /// Why a coordinator should not listen on `address`.
    fn problem(self, address: SocketAddr) -> Option<String> {
        if address.ip().to_canonical().is_loopback() {
            return None;
        }
        let (missing, danger, options) = match (self.tls, self.token) {
            (false, false) => return None,
            (true, true) => (
                "TLS and a join token are missing",
                "whoever reaches it could read and join the run",
                "--tls-cert DIR/coordinator.crt --tls-key DIR/coordinator.key --join-token-file DIR/join.token",
            ),
            (true, false) => (
                "TLS is missing",
                "tokens, samples and the model would travel unencrypted",
                "--tls-cert DIR/coordinator.crt --tls-key DIR/coordinator.key",
            ),
            (false, true) => {
                ("a join token is missing", "whoever reaches it could join the run", "--join-token-file DIR/join.token")
            }
        };
        Some(format!(
            "{address} is not a loopback address, and {missing}: {danger}; make what is missing with `lockstep certs --out DIR --host NAME` and add {options}, or add --insecure if the network is trusted"
        ))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn other_addresses_than_loopback_need_both() {
        let problem = |address: &str, tls: bool, token: bool| {
            Lacks { tls: !tls, token: !token }.problem(address.parse().expect("an address"))
        };
        for address in ["127.0.0.1:1", "127.9.9.9:1", "[::1]:1", "[::ffff:127.0.0.1]:1"] {
            assert_eq!(problem(address, false, false), None, "{address}");
        }
        for address in ["0.0.0.0:1", "10.0.0.1:1", "[::]:1", "[fe80::1]:1", "[::ffff:10.0.0.1]:1"] {
            assert_eq!(problem(address, true, true), None, "{address}");
            let says = |tls, token| problem(address, tls, token).expect("a problem");
            assert!(says(false, false).contains("TLS and a join token are missing"));
            assert!(says(false, true).contains("TLS is missing") && !says(false, true).contains("--join-token-file"));
            assert!(says(true, false).contains("a join token is missing") && !says(true, false).contains("--tls-cert"));
        }
    }
}
