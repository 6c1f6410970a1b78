//! `fullbore serve`: listen, load, announce, and end in order.
//!
//! Invariant: each port answers from the start, with "loading" until all models are there. The end is in order too: new
//! requests are refused and what runs may end, then no new connections, then the engines, then the rest. Nobody but
//! this machine is served without a key, unless that was asked for in so many words.

use std::collections::HashMap;
use std::io::{self, Write};
use std::net::{IpAddr, SocketAddr};
use std::sync::{Arc, OnceLock};
use std::time::Duration;

use fullbore_engine::memory::kv_events::KvEventSender;
use fullbore_engine::request::Share;
use tokio::net::TcpListener;
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::watch;
use tokio::task::JoinHandle;
use tokio::time::timeout;
use vllm_proto::KvEventSource;

use crate::api::ServedModel;
use crate::args::{AccessArgs, ServeArgs, ServedArgs};
use crate::fetch::{self, FetchError};
use crate::grpc::{self, Grpc, Identity, ModelFolderError, kv_event_source};
use crate::http::accept::{self, Door, Limits, Protocol};
use crate::http::access::Access;
use crate::http::connections::Connections;
use crate::http::keys::{KeyError, Keys};
use crate::http::proxies::Proxies;
use crate::http::routes::{self, Routes};
use crate::http::tls::{Tls, TlsError};
use crate::http::{App, descriptors};
use crate::kv_events::{KvEventsConfig, KvEventsError, Publisher};
use crate::live;
use crate::log::Log;
use crate::sandbox::sandbox;
use crate::start::{self, Plan, StartError, random};
use crate::traces::Tracer;

#[derive(Debug, thiserror::Error)]
pub enum ServeError {
    #[error(transparent)]
    Start(#[from] StartError),
    #[error("cannot listen on {address}: {source}; choose another with --{prefix}host and --{prefix}port")]
    Listen { address: SocketAddr, prefix: &'static str, source: io::Error },
    #[error("cannot start the server's threads: {0}")]
    Runtime(#[from] io::Error),
    #[error(transparent)]
    KvEvents(#[from] KvEventsError),
    #[error(transparent)]
    Key(#[from] KeyError),
    #[error(transparent)]
    Tls(#[from] TlsError),
    #[error(
        "--{prefix}host {host} can be reached from other machines: give clients a key with --api-key-file, or say \
         --insecure to serve whoever comes"
    )]
    Open { prefix: &'static str, host: IpAddr },
    #[error(transparent)]
    ModelFolder(#[from] ModelFolderError),
    #[error(transparent)]
    Fetch(#[from] FetchError),
    #[error("--share names {name} twice; give each tenant one weight")]
    TwoShares { name: String },
    #[error("loading the model failed in a way it should not; the log says more")]
    LoaderDied,
    #[error("the engine of {model} has stopped: {reason}")]
    EngineStopped { model: String, reason: String },
}

/// A listening server; without models it answers that it is loading.
pub struct Server {
    address: SocketAddr,
    app: Arc<App>,
    /// Of all ports together.
    connections: Arc<Connections>,
    /// Of HTTP first.
    ports: Vec<Port>,
    stop: watch::Sender<bool>,
    /// Set once the models are there.
    identity: Arc<OnceLock<Identity>>,
}

/// Where connections come in.
struct Port {
    tls: Option<Arc<Tls>>,
    acceptor: JoinHandle<()>,
}

/// How a server meets its clients.
#[derive(Default)]
pub struct Entrance {
    pub limits: Limits,
    pub access: Access,
    pub tls: Option<Tls>,
    /// Told what requests went through.
    pub tracer: Option<Tracer>,
    /// Where it is not all read.
    pub log: Option<Log>,
}

impl Server {
    pub async fn start(host: IpAddr, port: u16, entrance: Entrance) -> Result<Server, ServeError> {
        let app = Arc::new(App::new(entrance.limits, entrance.access, entrance.tracer, entrance.log));
        let (stop, stopped) = watch::channel(false);
        tokio::spawn(live::keep_history(app.clone(), stopped));
        let routes = Routes(warp::service(routes::routes(app.clone())));
        let address = SocketAddr::new(host, port);
        let connections = Connections::new(&app.limits);
        let mut server = Server { address, app, connections, ports: Vec::new(), stop, identity: Arc::default() };
        server.address = server.listen(address, "", entrance.tls, routes).await?;
        Ok(server)
    }

    /// Speaks gRPC at a port of its own, for which it returns the address.
    pub async fn listen_grpc(&mut self, address: SocketAddr, tls: Option<Tls>) -> Result<SocketAddr, ServeError> {
        let grpc = Grpc::new(self.app.clone(), self.identity.clone());
        self.listen(address, GRPC_PREFIX, tls, grpc).await
    }

    async fn listen(
        &mut self,
        address: SocketAddr,
        prefix: &'static str,
        tls: Option<Tls>,
        protocol: impl Protocol,
    ) -> Result<SocketAddr, ServeError> {
        let failed = |source| ServeError::Listen { address, prefix, source };
        let listener = TcpListener::bind(address).await.map_err(failed)?;
        let address = listener.local_addr().map_err(failed)?;
        let tls = tls.map(Arc::new);
        let (app, connections) = (self.app.clone(), self.connections.clone());
        let door = Door { app, connections, tls: tls.clone(), stop: self.stop.subscribe() };
        let acceptor = tokio::spawn(accept::accept(listener, door, protocol));
        self.ports.push(Port { tls, acceptor });
        Ok(address)
    }

    pub fn address(&self) -> SocketAddr {
        self.address
    }

    pub fn access(&self) -> &Access {
        &self.app.access
    }

    /// Of HTTP.
    pub fn tls(&self) -> Option<&Tls> {
        self.ports[0].tls.as_deref()
    }

    /// What clients of gRPC are told of it.
    pub fn set_identity(&self, identity: Identity) {
        assert!(self.identity.set(identity).is_ok(), "a server has one identity");
    }

    /// From now on requests are served.
    pub fn set_models(&self, models: Vec<ServedModel>) {
        self.app.set_models(models);
    }

    /// Reads keys and certificates again; what cannot be read leaves the old ones as they are.
    fn reload(&self, args: &AccessArgs) {
        match args.keys() {
            Ok(keys) if keys.is_empty() => {}
            Ok(keys) => {
                tracing::info!("{} API keys are accepted from now on", keys.len());
                self.access().replace_keys(keys);
            }
            Err(error) => tracing::error!("the API keys stay as they were: {error}"),
        }
        for tls in self.ports.iter().filter_map(|port| port.tls.as_ref()) {
            match tls.reload() {
                Ok(()) => tracing::info!("new connections get the certificate as it is now"),
                Err(error) => tracing::error!("the certificate stays as it was: {error}"),
            }
        }
    }

    /// The model whose engine has ended by itself, and why, once one has.
    pub async fn engine_stopped(&self) -> (String, String) {
        let stopped = |model: &Arc<ServedModel>| Some((model.name.clone(), model.engine.stopped()?));
        loop {
            if let Some(found) = self.app.models().iter().find_map(stopped) {
                return found;
            }
            tokio::time::sleep(WATCH_INTERVAL).await;
        }
    }

    /// Says that it is not ready, and for so long serves whoever comes all the same.
    pub async fn leave(&self, accepting: Duration) {
        self.app.leave();
        tokio::time::sleep(accepting).await;
    }

    /// Refuses new requests, so that readiness turns 503, and waits at most so long for the answers of those that run.
    pub async fn drain(&self, most: Duration) {
        self.app.drain();
        if !self.app.all_answered(most).await {
            tracing::warn!("some requests take longer than --drain-timeout and are ended");
        }
    }

    /// Refuses what is new, gives what runs until `grace` is over, and ends the engines.
    pub async fn shutdown(self, grace: Duration) {
        self.app.drain();
        // The acceptor may be gone already.
        let _ = self.stop.send(true);
        for port in self.ports {
            let _ = port.acceptor.await;
        }
        let done = timeout(grace, self.connections.all_closed()).await.is_ok();
        let end = |model: Arc<ServedModel>| tokio::task::spawn_blocking(move || model.end());
        let ends: Vec<_> = self.app.models().iter().cloned().map(end).collect();
        let ended = async {
            for end in ends {
                let _ = end.await;
            }
        };
        // A device that no longer answers must not keep the process.
        let _ = timeout(ENGINE_GRACE, ended).await;
        if let Some(tracer) = self.app.tracer.clone() {
            let flush = move || tracer.flush(LAST_WORDS);
            let _ = timeout(LAST_WORDS, tokio::task::spawn_blocking(flush)).await;
        }
        if !done {
            // Streams that were told of the end above still have to send it.
            let _ = timeout(LAST_WORDS, self.connections.all_closed()).await;
        }
    }
}

/// For connections to end, once their answers are sent or given up.
const GRACE: Duration = Duration::from_millis(500);
const WATCH_INTERVAL: Duration = Duration::from_millis(200);
const ENGINE_GRACE: Duration = Duration::from_secs(5);
const LAST_WORDS: Duration = Duration::from_secs(1);

/// The command: ends after SIGINT or SIGTERM, at once after a second one.
pub fn serve(args: &ServeArgs, log: &Log) -> Result<(), ServeError> {
    let shares = shares(&args.shares)?;
    let mut entrance = args.access.entrance(args.host)?;
    let grpc = args.grpc.address();
    grpc.map_or(Ok(()), |address| args.access.check_host(GRPC_PREFIX, address.ip()))?;
    entrance.log = Some(log.clone());
    if args.dry_run {
        let plans = start::plan_all(&args.models.0)?;
        println!("{}", start::table(&plans));
        return Ok(plans.iter().try_for_each(Plan::check_memory)?);
    }
    entrance.tracer = args.telemetry.otlp_endpoint.as_deref().map(Tracer::start);
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build()?;
    let result = runtime.block_on(run(args, entrance, shares));
    // A load that was interrupted goes on in its thread; the process does not wait for it.
    runtime.shutdown_background();
    result
}

async fn run(args: &ServeArgs, entrance: Entrance, shares: HashMap<String, Share>) -> Result<(), ServeError> {
    let mut interrupt = signal(SignalKind::interrupt())?;
    let mut terminate = signal(SignalKind::terminate())?;
    let mut hang_up = signal(SignalKind::hangup())?;
    let mut end = async || {
        tokio::select! {
            _ = interrupt.recv() => {}
            _ = terminate.recv() => {}
        }
    };
    let scheme = if entrance.tls.is_some() { "https" } else { "http" };
    let otherwise = "those beyond wait to be accepted; raise the limit (ulimit -n), or lower --max-connections";
    descriptors::make_room(entrance.limits.max_connections, otherwise);
    let grpc_tls = entrance.tls.as_ref().map(Tls::for_http2).transpose()?;
    let mut server = Server::start(args.host, args.port, entrance).await?;
    let grpc = match args.grpc.address() {
        Some(address) => Some(server.listen_grpc(address, grpc_tls).await?),
        None => None,
    };
    let models = args.models.0.clone();
    let publishers = publishers(args.kv_events_config.as_ref(), models.len()).await?;
    let config = args.kv_events_config.as_ref();
    let kv_events = config.zip(publishers.first()).map(|(config, publisher)| kv_event_source(config, publisher));
    let load = tokio::task::spawn_blocking(move || {
        let models = load(&models, &shares, &publishers)?;
        let identity = grpc.map(|_| identity(&models[0], kv_events)).transpose()?;
        Ok::<_, ServeError>((models, identity))
    });
    tokio::select! {
        loaded = load => {
            let (models, identity) = loaded.map_err(|_| ServeError::LoaderDied)??;
            identity.into_iter().for_each(|identity| server.set_identity(identity));
            server.set_models(models);
        }
        () = end() => return Ok(()),
    }
    println!("listening on {scheme}://{}", server.address());
    grpc.iter().for_each(|address| println!("gRPC at {address}"));
    // A closed standard output is no reason to stop serving.
    let _ = io::stdout().flush();
    loop {
        tokio::select! {
            () = end() => break,
            // A process that ends is started again by whoever watches it; one that can only refuse is not.
            (model, reason) = server.engine_stopped() => {
                server.shutdown(GRACE).await;
                return Err(ServeError::EngineStopped { model, reason });
            }
            _ = hang_up.recv() => match args.access.has_files() {
                true => server.reload(&args.access),
                false => break,
            },
        }
    }
    tracing::info!("ending: waiting at most {} seconds for open requests", args.drain_timeout);
    let leave = async {
        server.leave(Duration::from_secs(args.drain_accept_seconds)).await;
        server.drain(Duration::from_secs(args.drain_timeout)).await;
    };
    tokio::select! {
        () = leave => {}
        () = end() => tracing::info!("ending at once"),
    }
    server.shutdown(GRACE).await;
    Ok(())
}

/// What others are told of a server whose first model this is.
fn identity(model: &ServedModel, kv_events: Option<KvEventSource>) -> Result<Identity, ServeError> {
    let model_folder = grpc::model_folder(model, &fetch::cache_folder()?)?;
    Ok(Identity { instance_id: format!("fullbore-{:016x}", random()), model_folder, kv_events })
}

/// One for each model, where others are to be told of KV blocks.
async fn publishers(config: Option<&KvEventsConfig>, num_models: usize) -> Result<Vec<Publisher>, KvEventsError> {
    let mut publishers = Vec::new();
    if let Some(config) = config.filter(|config| config.is_on()) {
        for nth in (0..).take(num_models) {
            let publisher = Publisher::bind(config, nth).await?;
            let (address, replay) = (publisher.address(), publisher.replay_address());
            tracing::info!(%address, ?replay, "KV events are published");
            publishers.push(publisher);
        }
    }
    Ok(publishers)
}

/// All models, one after the other.
fn load(
    models: &[ServedArgs],
    shares: &HashMap<String, Share>,
    publishers: &[Publisher],
) -> Result<Vec<ServedModel>, ServeError> {
    let plans = start::plan_all(models)?;
    eprintln!("{}", start::table(&plans));
    let is_alone = models.len() == 1;
    let load = |(nth, mut plans): (usize, Vec<Plan>)| {
        if let Some(publisher) = publishers.get(nth) {
            let to = publisher.start(plans[0].config.block_size)?;
            let devices = (0..).zip(&mut plans);
            devices.for_each(|(source, plan)| plan.kv_events = Some(KvEventSender { source, to: to.clone() }));
        }
        let name = plans[0].name.clone();
        let loaded = start::load(plans).map_err(|error| error.of_model(&name, is_alone))?;
        let title = if is_alone { String::new() } else { format!("{name}\n") };
        eprintln!("{title}{}", loaded.times);
        let grammars = loaded.grammars.with_sandbox(sandbox());
        Ok(ServedModel { shares: shares.clone(), grammars, ..loaded })
    };
    start::by_model(plans).into_iter().enumerate().map(load).collect()
}

impl AccessArgs {
    /// Whether there is something to read again; without, a terminal that hangs up ends its server as ever.
    fn has_files(&self) -> bool {
        self.api_key_file.is_some() || self.tls_cert.is_some()
    }

    fn keys(&self) -> Result<Keys, KeyError> {
        let environment = std::env::var(KEY_VARIABLE).ok().filter(|key| !key.is_empty());
        let keys: Vec<String> = self.api_keys.iter().cloned().chain(environment).collect();
        Keys::new(&keys, self.api_key_file.as_deref())
    }

    /// Refuses to serve other machines without keys; `prefix` is of the flag that says where.
    fn check_host(&self, prefix: &'static str, host: IpAddr) -> Result<(), ServeError> {
        match host.is_loopback() || self.insecure || !self.keys()?.is_empty() {
            true => Ok(()),
            false => Err(ServeError::Open { prefix, host }),
        }
    }

    fn entrance(&self, host: IpAddr) -> Result<Entrance, ServeError> {
        self.check_host("", host)?;
        let keys = self.keys()?;
        let files = self.tls_cert.as_ref().zip(self.tls_key.as_ref());
        let tls = files.map(|(certificate, key)| Tls::open(certificate, key)).transpose()?;
        let limits = Limits {
            max_connections: self.max_connections.clamp(1, MAX_CONNECTIONS),
            max_connections_per_ip: self.max_connections_per_ip.max(1),
            ..Limits::default()
        };
        let access = Access::new(host, keys, &self.allowed_hosts, &self.allowed_origins)
            .with_proxies(Proxies::new(&self.trusted_proxies));
        Ok(Entrance { limits, access, tls, ..Entrance::default() })
    }
}

/// Of the flags that are about gRPC.
const GRPC_PREFIX: &str = "grpc-";

/// A key that no other user of the machine sees in the list of processes.
pub const KEY_VARIABLE: &str = "FULLBORE_API_KEY";

fn shares(asked: &[(String, Share)]) -> Result<HashMap<String, Share>, ServeError> {
    let mut shares = HashMap::new();
    for (name, share) in asked {
        if shares.insert(name.clone(), *share).is_some() {
            return Err(ServeError::TwoShares { name: name.clone() });
        }
    }
    Ok(shares)
}

/// Well below the limit of a semaphore's permits, which are counted in 32 bits above.
const MAX_CONNECTIONS: usize = 1 << 20;

#[cfg(test)]
mod tests {
    use clap::Parser;

    use super::*;
    use crate::args::{Args, Command};

    fn entrance(words: &[&str]) -> Result<Entrance, String> {
        let words = [&["fullbore", "serve"], words].concat();
        let args = Args::try_parse_from(words).map_err(|error| error.to_string())?;
        let Command::Serve(args) = args.command else { panic!("serve is serve") };
        args.access.entrance(args.host).map_err(|error| error.to_string())
    }

    #[test]
    fn other_machines_need_a_key() {
        let sentence = entrance(&["--host", "0.0.0.0"]).err().expect("no key");
        assert!(sentence.contains("--api-key-file") && sentence.contains("--insecure"), "{sentence}");
        for words in [&["--host", "0.0.0.0", "--insecure"][..], &["--host", "::", "--api-key", "long-enough"], &[]] {
            assert!(entrance(words).is_ok(), "{words:?}");
        }
    }

    #[test]
    fn what_cannot_be_read_is_named() {
        let wrong: [(&[&str], &str); 4] = [
            (&["--api-key", "short"], "8 characters"),
            (&["--api-key-file", "/no/such/file"], "/no/such/file"),
            (&["--tls-cert", "/no/such/file"], "--tls-key"),
            (&["--tls-cert", "/no/such/cert", "--tls-key", "/no/such/key"], "/no/such/cert"),
        ];
        for (words, part) in wrong {
            let sentence = entrance(words).err().expect("refused");
            assert!(sentence.contains(part), "{words:?}: {sentence}");
        }
    }

    #[test]
    fn a_tenant_has_one_share() {
        let share = |name: &str, weight| (name.to_owned(), Share { weight, ..Share::default() });
        assert_eq!(shares(&[share("a", 1), share("b", 5)]).map(|shares| shares.len()).ok(), Some(2));
        let sentence = shares(&[share("a", 1), share("b", 2), share("a", 5)]).expect_err("a has two").to_string();
        assert!(sentence.contains("--share names a twice"), "{sentence}");
    }
}
