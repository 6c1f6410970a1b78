//! `fullbore serve`: listen, load, announce, and end in order.
//!
//! Invariant: the port answers from the start, with "loading" until the model is there. The end is in order too: no new
//! connections, a while for what runs, then the engine, then the rest.

use std::collections::HashMap;
use std::io::{self, Write};
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;
use std::time::Duration;

use fullbore_engine::request::Share;
use tokio::net::TcpListener;
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::{Semaphore, watch};
use tokio::task::JoinHandle;
use tokio::time::timeout;

use crate::api::ServedModel;
use crate::args::ServeArgs;
use crate::http::accept::{self, Limits};
use crate::http::{App, routes};
use crate::start::{self, StartError};

#[derive(Debug, thiserror::Error)]
pub enum ServeError {
    #[error(transparent)]
    Start(#[from] StartError),
    #[error("cannot listen on {address}: {source}; choose another with --host and --port")]
    Listen { address: SocketAddr, source: io::Error },
    #[error("cannot start the server's threads: {0}")]
    Runtime(#[from] io::Error),
    #[error("--share names {name} twice; give each tenant one weight")]
    TwoShares { name: String },
    #[error("loading the model failed in a way it should not; the log says more")]
    LoaderDied,
}

/// A listening server; without a model it answers that it is loading.
pub struct Server {
    address: SocketAddr,
    app: Arc<App>,
    connections: Arc<Semaphore>,
    stop: watch::Sender<bool>,
    acceptor: JoinHandle<()>,
}

impl Server {
    pub async fn start(host: IpAddr, port: u16, limits: Limits) -> Result<Server, ServeError> {
        let address = SocketAddr::new(host, port);
        let listen = |source| ServeError::Listen { address, source };
        let listener = TcpListener::bind(address).await.map_err(listen)?;
        let address = listener.local_addr().map_err(listen)?;
        let connections = Arc::new(Semaphore::new(limits.max_connections));
        let app = Arc::new(App::new(limits));
        let (stop, stopped) = watch::channel(false);
        let service = warp::service(routes::routes(app.clone()));
        let acceptor = tokio::spawn(accept::accept(listener, app.clone(), service, connections.clone(), stopped));
        Ok(Server { address, app, connections, stop, acceptor })
    }

    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// From now on requests are served.
    pub fn set_model(&self, model: ServedModel) {
        self.app.set_model(model);
    }

    /// Refuses what is new, gives what runs until `grace` is over, and ends the engine.
    pub async fn shutdown(self, grace: Duration) {
        self.app.drain();
        // The acceptor may be gone already.
        let _ = self.stop.send(true);
        let _ = self.acceptor.await;
        let all = self.app.limits.max_connections as u32;
        let done = timeout(grace, self.connections.acquire_many(all)).await.is_ok();
        if let Some(model) = self.app.model() {
            let model = model.clone();
            // A device that no longer answers must not keep the process.
            let _ = timeout(ENGINE_GRACE, tokio::task::spawn_blocking(move || model.end())).await;
        }
        if !done {
            // Streams that were told of the end above still have to send it.
            let _ = timeout(LAST_WORDS, self.connections.acquire_many(all)).await;
        }
    }
}

const GRACE: Duration = Duration::from_secs(5);
const ENGINE_GRACE: Duration = Duration::from_secs(5);
const LAST_WORDS: Duration = Duration::from_secs(1);

/// The command: ends after SIGINT or SIGTERM.
pub fn serve(args: &ServeArgs) -> Result<(), ServeError> {
    let shares = shares(&args.shares)?;
    if args.dry_run {
        let plan = start::plan(&args.engine, args.served_model_name.as_deref())?;
        println!("{}", plan.memory);
        return Ok(plan.check_memory()?);
    }
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build()?;
    let result = runtime.block_on(run(args, shares));
    // A load that was interrupted goes on in its thread; the process does not wait for it.
    runtime.shutdown_background();
    result
}

async fn run(args: &ServeArgs, shares: HashMap<String, Share>) -> Result<(), ServeError> {
    let mut interrupt = signal(SignalKind::interrupt())?;
    let mut terminate = signal(SignalKind::terminate())?;
    let limits = Limits { max_connections: args.max_connections.clamp(1, MAX_CONNECTIONS), ..Limits::default() };
    let server = Server::start(args.host, args.port, limits).await?;
    let (engine_args, name) = (args.engine.clone(), args.served_model_name.clone());
    let load = tokio::task::spawn_blocking(move || {
        let plan = start::plan(&engine_args, name.as_deref())?;
        eprintln!("{}", plan.memory);
        plan.load().inspect(|model| eprintln!("{}", model.times))
    });
    tokio::select! {
        loaded = load => server.set_model(ServedModel { shares, ..loaded.map_err(|_| ServeError::LoaderDied)?? }),
        _ = interrupt.recv() => return Ok(()),
        _ = terminate.recv() => return Ok(()),
    }
    println!("listening on http://{}", server.address());
    // A closed standard output is no reason to stop serving.
    let _ = io::stdout().flush();
    tokio::select! {
        _ = interrupt.recv() => {}
        _ = terminate.recv() => {}
    }
    tracing::info!("ending: waiting for open requests");
    server.shutdown(GRACE).await;
    Ok(())
}

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
    use super::*;

    #[test]
    fn a_tenant_has_one_share() {
        let share = |name: &str, weight| (name.to_owned(), Share { weight, ..Share::default() });
        assert_eq!(shares(&[share("a", 1), share("b", 5)]).map(|shares| shares.len()).ok(), Some(2));
        let sentence = shares(&[share("a", 1), share("b", 2), share("a", 5)]).expect_err("a has two").to_string();
        assert!(sentence.contains("--share names a twice"), "{sentence}");
    }
}
