//! `lockstep certs`: an authority of one's own, certificates that it vouches for, and tokens.

use std::fs::{self, File};
use std::io::Write;
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime};

use anyhow::Context;
use clap::Args;
use lockstep_proto::target::can_be_certified;
use lockstep_proto::token::Token;
use rcgen::{
    BasicConstraints, CertificateParams, DistinguishedName, DnType, ExtendedKeyUsagePurpose, IsCa, Issuer, KeyPair,
    KeyUsagePurpose,
};

use crate::exit::usage;

/// The authority's name. It is the same for all, so that the key alone says which one it is: `--ca` needs no parser of
/// certificates.
const AUTHORITY: &str = "Lockstep development CA";

/// Where the coordinator can always be reached from its own host.
const LOCAL: [&str; 3] = ["localhost", "127.0.0.1", "::1"];

/// Certificates hold from so long before now: clocks of other hosts may be behind.
const CLOCK_SKEW: Duration = Duration::from_secs(3600);

/// How long the authority lasts. Whoever wants a shorter time makes a new one.
const AUTHORITY_DAYS: u32 = 3650;

const CA: &str = "ca.crt";
const CA_KEY: &str = "ca.key";

/// Arguments of `lockstep certs`.
#[derive(Args, Debug)]
pub(crate) struct CertsArgs {
    /// Directory to write to
    #[arg(long, value_name = "DIR")]
    out: PathBuf,
    /// A host name or IP address under which workers reach the coordinator, besides this host's own; can be repeated
    #[arg(long, value_name = "NAME")]
    host: Vec<String>,
    /// Use the authority that was made in this directory, so that who trusts it need not be told of another
    #[arg(long, value_name = "DIR")]
    ca: Option<PathBuf>,
    /// Days that the certificates last; the authority lasts ten years
    #[arg(long, value_name = "N", default_value_t = 365, value_parser = clap::value_parser!(u32).range(1..=AUTHORITY_DAYS as i64))]
    days: u32,
}

/// A file to be written.
struct Made {
    name: &'static str,
    content: String,
    secret: bool,
}

impl Made {
    fn public(name: &'static str, content: String) -> Self {
        Self { name, content, secret: false }
    }

    fn secret(name: &'static str, content: String) -> Self {
        Self { name, content, secret: true }
    }
}

/// Runs the command.
pub(crate) fn run(args: CertsArgs) -> anyhow::Result<()> {
    let made = make(&args)?;
    write(&args.out, &made)?;
    let directory = args.out.display();
    let name = args.host.first().map_or("127.0.0.1", String::as_str);
    let host = if name.contains(':') { format!("[{name}]") } else { name.to_owned() };
    println!("made {} files in {directory}; keep its *.key and *.token secret", made.len());
    println!();
    println!("on the coordinator's host (--tls-client-ca demands certificates of workers and monitors, too):");
    println!("  lockstep coordinator --listen 0.0.0.0:7400 --tls-cert {directory}/coordinator.crt \\");
    println!("      --tls-key {directory}/coordinator.key --tls-client-ca {directory}/{CA} \\");
    println!("      --join-token-file {directory}/join.token --watch-token-file {directory}/watch.token \\");
    println!("      --control-token-file {directory}/control.token");
    println!("on each worker's host, with {CA}, worker.crt, worker.key and join.token:");
    println!("  lockstep worker --coordinator https://{host}:7400 --tls-ca {directory}/{CA} \\");
    println!("      --tls-cert {directory}/worker.crt --tls-key {directory}/worker.key \\");
    println!("      --token-file {directory}/join.token");
    println!("to watch, with {CA}, worker.crt, worker.key and watch.token:");
    println!("  lockstep monitor https://{host}:7400 --tls-ca {directory}/{CA} \\");
    println!("      --tls-cert {directory}/worker.crt --tls-key {directory}/worker.key \\");
    println!("      --token-file {directory}/watch.token");
    if args.ca.is_none() {
        println!("nobody needs {CA_KEY} to train: put it where only you can read it");
    }
    Ok(())
}

fn make(args: &CertsArgs) -> anyhow::Result<Vec<Made>> {
    if let Some(host) = args.host.iter().find(|host| !can_be_certified(host)) {
        return Err(usage(anyhow::anyhow!("{host:?} is neither a host name nor an IP address")));
    }
    let authority = Authority::of(args.ca.as_deref())?;
    let hosts: Vec<String> = LOCAL.iter().map(|&host| host.to_owned()).chain(args.host.iter().cloned()).collect();
    let (coordinator, coordinator_key) =
        authority.vouch("lockstep coordinator", hosts, ExtendedKeyUsagePurpose::ServerAuth, args.days)?;
    let (worker, worker_key) =
        authority.vouch("lockstep worker", Vec::new(), ExtendedKeyUsagePurpose::ClientAuth, args.days)?;
    let token = || Token::random().map(|token| format!("{}\n", token.reveal())).context("cannot make a token");
    let mut made = vec![
        Made::public(CA, authority.certificate),
        Made::public("coordinator.crt", coordinator),
        Made::secret("coordinator.key", coordinator_key),
        Made::public("worker.crt", worker),
        Made::secret("worker.key", worker_key),
        Made::secret("join.token", token()?),
        Made::secret("watch.token", token()?),
        Made::secret("control.token", token()?),
    ];
    if args.ca.is_none() {
        made.push(Made::secret(CA_KEY, authority.issuer.key().serialize_pem()));
    }
    Ok(made)
}

/// Who vouches.
struct Authority {
    certificate: String,
    issuer: Issuer<'static, KeyPair>,
}

impl Authority {
    /// The one in `directory`, or a new one.
    fn of(directory: Option<&Path>) -> anyhow::Result<Self> {
        let mut parameters = lasting(AUTHORITY, AUTHORITY_DAYS, Vec::new())?;
        parameters.is_ca = IsCa::Ca(BasicConstraints::Constrained(0));
        parameters.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
        let (certificate, key) = match directory {
            Some(directory) => {
                let read = |name: &str| {
                    let path = directory.join(name);
                    fs::read_to_string(&path).with_context(|| format!("cannot read {}", path.display())).map_err(usage)
                };
                let key = KeyPair::from_pem(&read(CA_KEY)?)
                    .with_context(|| format!("{} is no private key", directory.join(CA_KEY).display()))
                    .map_err(usage)?;
                (read(CA)?, key)
            }
            None => {
                let key = KeyPair::generate().context("cannot make a key")?;
                (parameters.self_signed(&key).context("cannot make the authority's certificate")?.pem(), key)
            }
        };
        Ok(Self { certificate, issuer: Issuer::new(parameters, key) })
    }

    /// A certificate and its key.
    fn vouch(
        &self,
        name: &str,
        hosts: Vec<String>,
        purpose: ExtendedKeyUsagePurpose,
        days: u32,
    ) -> anyhow::Result<(String, String)> {
        let mut parameters = lasting(name, days, hosts)?;
        parameters.key_usages = vec![KeyUsagePurpose::DigitalSignature];
        parameters.extended_key_usages = vec![purpose];
        parameters.use_authority_key_identifier_extension = true;
        let key = KeyPair::generate().context("cannot make a key")?;
        let certificate = parameters
            .signed_by(&key, &self.issuer)
            .with_context(|| format!("cannot make a certificate for {name}"))?;
        Ok((certificate.pem(), key.serialize_pem()))
    }
}

/// What certificates have in common.
fn lasting(name: &str, days: u32, hosts: Vec<String>) -> anyhow::Result<CertificateParams> {
    let named = hosts.join(", ");
    let mut parameters = CertificateParams::new(hosts)
        .with_context(|| format!("cannot put these hosts into a certificate: {named}"))
        .map_err(usage)?;
    let now = SystemTime::now();
    parameters.not_before = (now - CLOCK_SKEW).into();
    parameters.not_after = (now + Duration::from_secs(u64::from(days) * 24 * 3600)).into();
    parameters.distinguished_name = DistinguishedName::new();
    parameters.distinguished_name.push(DnType::CommonName, name);
    Ok(parameters)
}

/// Writes all files, or none if one of them is there already.
fn write(directory: &Path, made: &[Made]) -> anyhow::Result<()> {
    if let Some(there) = made.iter().map(|made| directory.join(made.name)).find(|path| path.exists()) {
        return Err(usage(anyhow::anyhow!(
            "{} is there already, and others may trust it; give another --out, with --ca {} to keep the authority",
            there.display(),
            directory.display()
        )));
    }
    fs::create_dir_all(directory).with_context(|| format!("cannot make {}", directory.display())).map_err(usage)?;
    for Made { name, content, secret } in made {
        let path = directory.join(name);
        create(&path, *secret)
            .and_then(|mut file| file.write_all(content.as_bytes()))
            .with_context(|| format!("cannot write {}", path.display()))?;
    }
    Ok(())
}

/// A new file; a secret one can be read by its owner only, from the first moment on.
fn create(path: &Path, secret: bool) -> std::io::Result<File> {
    let mut options = File::options();
    options.write(true).create_new(true);
    #[cfg(unix)]
    {
        use std::os::unix::fs::OpenOptionsExt;
        options.mode(if secret { 0o600 } else { 0o644 });
    }
    #[cfg(not(unix))]
    let _ = secret;
    options.open(path)
}
