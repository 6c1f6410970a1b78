//! How many connections each address has. Invariant: an address is known while it has one; a place given back by
//! dropping it is counted off at once. This machine's own addresses are not counted: a proxy may stand there.

use std::collections::HashMap;
use std::net::IpAddr;
use std::sync::{Arc, Mutex, PoisonError};

#[derive(Default)]
pub struct Peers(Mutex<HashMap<IpAddr, usize>>);

/// One connection of an address.
pub struct PeerPlace {
    peers: Arc<Peers>,
    address: IpAddr,
}

impl Peers {
    /// `None` where the address has `most` already.
    pub fn place(self: &Arc<Peers>, address: IpAddr, most: usize) -> Option<PeerPlace> {
        let address = address.to_canonical();
        if !address.is_loopback() {
            let mut counts = self.0.lock().unwrap_or_else(PoisonError::into_inner);
            let count = counts.entry(address).or_default();
            if *count >= most {
                return None;
            }
            *count += 1;
        }
        Some(PeerPlace { peers: self.clone(), address })
    }
}

impl Drop for PeerPlace {
    fn drop(&mut self) {
        let mut counts = self.peers.0.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(count) = counts.get_mut(&self.address) {
            *count -= 1;
            if *count == 0 {
                counts.remove(&self.address);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_address_has_so_many_places_and_this_machine_any() {
        let peers = Arc::new(Peers::default());
        let (one, other) = (IpAddr::from([10, 0, 0, 1]), IpAddr::from([10, 0, 0, 2]));
        let mapped: IpAddr = "::ffff:10.0.0.1".parse().expect("an address");
        let held = [one, mapped].map(|address| peers.place(address, 2).expect("a place"));
        assert!(peers.place(one, 2).is_none() && peers.place(mapped, 2).is_none());
        assert!(peers.place(other, 2).is_some());
        drop(held);
        assert!(peers.place(one, 2).is_some());
        let local: Vec<_> = (0..9).map(|_| peers.place(IpAddr::from([127, 0, 0, 1]), 2)).collect();
        assert!(local.iter().all(Option::is_some));
        drop(local);
        assert!(peers.0.lock().expect("no panic").is_empty(), "addresses are forgotten");
    }
}
