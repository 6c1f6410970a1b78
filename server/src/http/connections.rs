//! Places for connections. Invariant: all ports of a server share them, so that no client has more by asking at another
//! one, and what may be open at once is what descriptors were made room for.

use std::net::IpAddr;
use std::sync::Arc;

use tokio::sync::{OwnedSemaphorePermit, Semaphore};

use super::accept::Limits;
use super::access::Access;
use super::error::ApiError;
use super::peers::{PeerPlace, Peers};

pub struct Connections {
    max_connections: usize,
    max_connections_per_ip: usize,
    free: Arc<Semaphore>,
    peers: Arc<Peers>,
    /// Connections beyond the cap that are being told so; more are closed unheard.
    refusals: Arc<Semaphore>,
}

/// What a connection holds while it is open.
pub struct Place {
    _permit: OwnedSemaphorePermit,
    _peer: PeerPlace,
}

const MAX_REFUSALS: usize = 64;

impl Connections {
    pub fn new(limits: &Limits) -> Arc<Connections> {
        let Limits { max_connections, max_connections_per_ip, .. } = *limits;
        Arc::new(Connections {
            max_connections,
            max_connections_per_ip,
            free: Arc::new(Semaphore::new(max_connections)),
            peers: Arc::default(),
            refusals: Arc::new(Semaphore::new(MAX_REFUSALS)),
        })
    }

    pub fn place(&self, access: &Access, address: IpAddr) -> Result<Place, ApiError> {
        let permit = self.free.clone().try_acquire_owned();
        let permit = permit.map_err(|_| ApiError::not_yet("too many connections are open; try again later"))?;
        let most = if access.is_proxy(address) { usize::MAX } else { self.max_connections_per_ip };
        let too_many =
            || ApiError::not_yet(&format!("too many connections are open from {address}; reuse or close some"));
        let peer = self.peers.place(address, most).ok_or_else(too_many)?;
        Ok(Place { _permit: permit, _peer: peer })
    }

    /// To tell a client that it has no place, where not too many are being told.
    pub fn refusal(&self) -> Option<OwnedSemaphorePermit> {
        self.refusals.clone().try_acquire_owned().ok()
    }

    /// Until no connection is open.
    pub async fn all_closed(&self) {
        // Nobody closes the semaphore.
        let _ = self.free.acquire_many(self.max_connections as u32).await;
    }
}
