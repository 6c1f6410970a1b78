//! How many connections each network has. Invariant: a network is known while it has one; a place given back by
//! dropping it is counted off at once. This machine's own addresses are not counted: a proxy may stand there.

use std::collections::HashMap;
use std::net::{IpAddr, Ipv6Addr};
use std::sync::{Arc, Mutex, PoisonError};

#[derive(Default)]
pub struct Peers(Mutex<HashMap<IpAddr, usize>>);

/// One connection of a network.
pub struct PeerPlace {
    peers: Arc<Peers>,
    network: IpAddr,
}

/// What one client has to itself: an address of IPv4, and of IPv6 the 64 bits before those that it chooses itself (RFC
/// 7934).
pub fn network(address: IpAddr) -> IpAddr {
    match address.to_canonical() {
        IpAddr::V6(address) if !address.is_loopback() => {
            IpAddr::V6(Ipv6Addr::from_bits(address.to_bits() & !u128::from(u64::MAX)))
        }
        address => address,
    }
}

impl Peers {
    /// `None` where the network of `address` has `most` already.
    pub fn place(self: &Arc<Peers>, address: IpAddr, most: usize) -> Option<PeerPlace> {
        let network = network(address);
        if !network.is_loopback() {
            let mut counts = self.0.lock().unwrap_or_else(PoisonError::into_inner);
            let count = counts.entry(network).or_default();
            if *count >= most {
                return None;
            }
            *count += 1;
        }
        Some(PeerPlace { peers: self.clone(), network })
    }
}

impl Drop for PeerPlace {
    fn drop(&mut self) {
        let mut counts = self.peers.0.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(count) = counts.get_mut(&self.network) {
            *count -= 1;
            if *count == 0 {
                counts.remove(&self.network);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_network_has_so_many_places_and_this_machine_any() {
        let peers = Arc::new(Peers::default());
        let (one, other) = (IpAddr::from([10, 0, 0, 1]), IpAddr::from([10, 0, 0, 2]));
        let mapped: IpAddr = "::ffff:10.0.0.1".parse().expect("an address");
        let held = [one, mapped].map(|address| peers.place(address, 2).expect("a place"));
        assert!(peers.place(one, 2).is_none() && peers.place(mapped, 2).is_none());
        assert!(peers.place(other, 2).is_some());
        drop(held);
        let v6 = |text: &str| text.parse::<IpAddr>().expect("an address");
        let held = ["2001:db8:0:1::1", "2001:db8:0:1:ffff::2"].map(|text| peers.place(v6(text), 2).expect("a place"));
        assert!(peers.place(v6("2001:db8:0:1:2:3:4:5"), 2).is_none(), "one client has all of a /64");
        assert!(peers.place(v6("2001:db8:0:2::1"), 2).is_some());
        assert!((0..9).all(|_| peers.place(v6("::1"), 2).is_some()));
        drop(held);
        assert!(peers.place(one, 2).is_some());
        let local: Vec<_> = (0..9).map(|_| peers.place(IpAddr::from([127, 0, 0, 1]), 2)).collect();
        assert!(local.iter().all(Option::is_some));
        drop(local);
        assert!(peers.0.lock().expect("no panic").is_empty(), "networks are forgotten");
    }
}
