//! Who may call what: each service needs the token of its scope.

use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};

use bytes::Bytes;
use lockstep_proto::token::{Presented, Tokens};
use lockstep_proto::v1::{control_service_server, worker_service_server};
use tokio::sync::watch;
use tonic::Status;
use tonic::body::Body;
use tonic::codegen::http;
use tower::{Layer, Service};

use super::accept::{Call, Peer};
use super::credentials::{AccessTokens, InForce};

/// What a call is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Scope {
    /// Probes: anybody may.
    Health,
    Join,
    Watch,
    Control,
}

impl Scope {
    /// The scope of a path such as `/lockstep.v1.WorkerService/Session`. What is not known is for watchers: they will be
    /// told that it does not exist.
    fn of(path: &str) -> Self {
        match path.trim_start_matches('/').split('/').next() {
            Some(worker_service_server::SERVICE_NAME) => Self::Join,
            Some(control_service_server::SERVICE_NAME) => Self::Control,
            Some("grpc.health.v1.Health") => Self::Health,
            // The monitor's service, reflection, and what is not there.
            _ => Self::Watch,
        }
    }

    fn verb(self) -> &'static str {
        match self {
            Self::Health => "probing",
            Self::Join => "joining",
            Self::Watch => "watching",
            Self::Control => "controlling the run",
        }
    }

    fn token(self) -> &'static str {
        match self {
            Self::Health => "no token",
            Self::Join => "the join token",
            Self::Watch => "the watch token",
            Self::Control => "the control token",
        }
    }

    /// The variable and the coordinator's option that a person must hear of.
    fn variable(self) -> &'static str {
        match self {
            Self::Health | Self::Join => "LOCKSTEP_JOIN_TOKEN",
            Self::Watch => "LOCKSTEP_WATCH_TOKEN",
            Self::Control => "LOCKSTEP_CONTROL_TOKEN",
        }
    }
}

impl AccessTokens {
    fn of(&self, scope: Scope) -> Option<&Tokens> {
        match scope {
            Scope::Health => None,
            Scope::Join => Some(&self.join),
            Scope::Watch => self.watch.as_ref(),
            Scope::Control => self.control.as_ref(),
        }
    }

    fn check(&self, scope: Scope, presented: Option<&Presented>) -> Result<(), Status> {
        let opens = |door: Scope| {
            let tokens = self.of(door);
            presented.zip(tokens).is_some_and(|(presented, tokens)| tokens.accept(presented))
        };
        // All doors are tried, so that the time taken says nothing.
        let [join, watch, control] = [Scope::Join, Scope::Watch, Scope::Control].map(opens);
        let (verb, token) = (scope.verb(), scope.token());
        let granted = match scope {
            Scope::Health => true,
            Scope::Join => join,
            Scope::Watch => watch || control,
            Scope::Control => control,
        };
        if granted {
            return Ok(());
        }
        if join || watch || control {
            return Err(Status::permission_denied(format!("{verb} needs {token}, and another token was given")));
        }
        let closed = self.of(scope).is_none() && (scope != Scope::Watch || self.control.is_none());
        if closed {
            let variable = scope.variable();
            return Err(Status::permission_denied(format!(
                "{verb} is closed: the coordinator was started without a token for it ({variable})"
            )));
        }
        Err(Status::unauthenticated(match presented {
            None => format!("{verb} needs {token}: give it with --token-file or {}", scope.variable()),
            Some(_) => format!("{verb} needs {token}, and the one given is not it"),
        }))
    }
}

/// Whether a call may be made. Without tokens everybody may join and watch, and this host may control.
fn check(in_force: &InForce, scope: Scope, presented: Option<&Presented>, from_here: bool) -> Result<(), Status> {
    match &in_force.tokens {
        Some(tokens) => tokens.check(scope, presented),
        None if scope == Scope::Control && !from_here => Err(Status::permission_denied(
            "without tokens, a run can be controlled only from the coordinator's host; see --control-token-file",
        )),
        None => Ok(()),
    }
}

/// Stands before all services.
#[derive(Clone)]
pub(super) struct Gate {
    in_force: watch::Receiver<Arc<InForce>>,
}

impl Gate {
    pub(super) fn new(in_force: watch::Receiver<Arc<InForce>>) -> Self {
        Self { in_force }
    }

    /// The call that a request begins, if it is one that counts.
    fn admit<B>(&self, request: &http::Request<B>) -> Result<Option<Call>, Status> {
        let peer = request.extensions().get::<Arc<Peer>>();
        let scope = Scope::of(request.uri().path());
        let presented = Presented::in_headers(request.headers());
        let from_here = peer.is_some_and(|peer| peer.is_this_host());
        let in_force = self.in_force.borrow().clone();
        check(&in_force, scope, presented.as_ref(), from_here)?;
        // Probes do not make a peer known.
        Ok(peer.filter(|_| scope != Scope::Health).map(Peer::begin))
    }
}

impl<S> Layer<S> for Gate {
    type Service = Gated<S>;

    fn layer(&self, service: S) -> Gated<S> {
        Gated { gate: self.clone(), service }
    }
}

/// A service behind the gate.
#[derive(Clone)]
pub(super) struct Gated<S> {
    gate: Gate,
    service: S,
}

impl<S> Service<http::Request<Body>> for Gated<S>
where
    S: Service<http::Request<Body>, Response = http::Response<Body>>,
    S::Future: Send + 'static,
    S::Error: Send + 'static,
{
    type Response = http::Response<Body>;
    type Error = S::Error;
    type Future = Pin<Box<dyn Future<Output = Result<Self::Response, S::Error>> + Send>>;

    fn poll_ready(&mut self, context: &mut Context<'_>) -> Poll<Result<(), S::Error>> {
        self.service.poll_ready(context)
    }

    fn call(&mut self, request: http::Request<Body>) -> Self::Future {
        match self.gate.admit(&request) {
            Ok(call) => {
                let response = self.service.call(request);
                Box::pin(async move { Ok(response.await?.map(|body| Body::new(Counted { body, _call: call }))) })
            }
            Err(status) => Box::pin(std::future::ready(Ok(status.into_http()))),
        }
    }
}

/// The body of a response: as long as it lasts, the call is under way.
struct Counted {
    body: Body,
    _call: Option<Call>,
}

impl http_body::Body for Counted {
    type Data = Bytes;
    type Error = Status;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
    ) -> Poll<Option<Result<http_body::Frame<Bytes>, Status>>> {
        Pin::new(&mut self.body).poll_frame(context)
    }

    fn is_end_stream(&self) -> bool {
        self.body.is_end_stream()
    }

    fn size_hint(&self) -> http_body::SizeHint {
        self.body.size_hint()
    }
}

#[cfg(test)]
mod tests {
    use lockstep_proto::token::Token;
    use tonic::Code;

    use super::*;

    const SCOPES: [Scope; 4] = [Scope::Health, Scope::Join, Scope::Watch, Scope::Control];

    fn presented(token: &Token) -> Presented {
        let mut headers = http::HeaderMap::new();
        headers.insert("authorization", format!("Bearer {}", token.reveal()).parse().unwrap());
        Presented::in_headers(&headers).unwrap()
    }

    fn codes(in_force: &InForce, token: Option<&Token>, from_here: bool) -> [Code; 4] {
        let presented = token.map(presented);
        SCOPES.map(|scope| {
            check(in_force, scope, presented.as_ref(), from_here).map_or_else(|status| status.code(), |()| Code::Ok)
        })
    }

    #[test]
    fn every_service_has_its_scope() {
        assert_eq!(Scope::of("/lockstep.v1.WorkerService/Session"), Scope::Join);
        assert_eq!(Scope::of("/lockstep.v1.ControlService/StopRun"), Scope::Control);
        assert_eq!(Scope::of("/grpc.health.v1.Health/Check"), Scope::Health);
        for path in [
            "/lockstep.v1.MonitorService/Watch",
            "/grpc.reflection.v1.ServerReflection/ServerReflectionInfo",
            "/grpc.health.v1.Healthy/Check",
            "/lockstep.v1.workerservice/Session",
            "/",
            "",
        ] {
            assert_eq!(Scope::of(path), Scope::Watch, "{path}");
        }
    }

    #[test]
    fn each_token_opens_its_own_services() {
        use Code::{Ok, PermissionDenied, Unauthenticated};
        let [join, watch, control, other] = std::array::from_fn(|_| Token::random().unwrap());
        let only = |token: &Token| Tokens::of(std::slice::from_ref(token));
        let tokens = AccessTokens { join: only(&join), watch: Some(only(&watch)), control: Some(only(&control)) };
        let all = InForce { tls: None, tokens: Some(tokens.clone()) };
        assert_eq!(codes(&all, Some(&join), true), [Ok, Ok, PermissionDenied, PermissionDenied]);
        assert_eq!(codes(&all, Some(&watch), true), [Ok, PermissionDenied, Ok, PermissionDenied]);
        assert_eq!(codes(&all, Some(&control), true), [Ok, PermissionDenied, Ok, Ok]);
        assert_eq!(codes(&all, Some(&other), true), [Ok, Unauthenticated, Unauthenticated, Unauthenticated]);
        assert_eq!(codes(&all, None, true), [Ok, Unauthenticated, Unauthenticated, Unauthenticated]);

        let one = InForce { tls: None, tokens: Some(AccessTokens { watch: None, control: None, ..tokens }) };
        assert_eq!(codes(&one, Some(&join), true), [Ok, Ok, PermissionDenied, PermissionDenied]);
        assert_eq!(codes(&one, Some(&control), true), [Ok, Unauthenticated, PermissionDenied, PermissionDenied]);
        assert_eq!(codes(&InForce::default(), None, true), [Ok, Ok, Ok, Ok]);
        assert_eq!(codes(&InForce::default(), Some(&other), false), [Ok, Ok, Ok, PermissionDenied]);
    }
}
