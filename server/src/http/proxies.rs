//! Proxies that are trusted to say for whom they ask.
//!
//! Invariant: only what a trusted peer wrote is believed. Each proxy adds the address that it was asked from on the
//! right, so the list is read from there, and the first address that is no trusted proxy's is the client: what stands
//! left of it the client may have made up (RFC 7239, section 8.1).

use std::net::{IpAddr, SocketAddr};

use ipnet::IpNet;
use warp::http::header::{FORWARDED, HeaderMap, HeaderName};

/// Networks of proxies; none is none.
#[derive(Clone, Debug, Default)]
pub struct Proxies(Vec<IpNet>);

const X_FORWARDED_FOR: HeaderName = HeaderName::from_static("x-forwarded-for");

/// A network as `--trusted-proxy` has it: CIDR, or an address alone.
pub fn parse_network(text: &str) -> Result<IpNet, String> {
    let alone = |text: &str| text.parse::<IpAddr>().map(IpNet::from);
    let network = text.parse().or_else(|_| alone(text));
    network.map_err(|_| format!("{text} is no network of addresses; write 10.0.0.0/8, fd00::/8 or an address"))
}

impl Proxies {
    pub fn new(networks: &[IpNet]) -> Proxies {
        Proxies(networks.to_vec())
    }

    pub fn trust(&self, address: IpAddr) -> bool {
        let address = address.to_canonical();
        self.0.iter().any(|network| network.contains(&address))
    }

    /// Who asks by a request that came from `peer`. Where two headers tell of two clients, one of them came through as
    /// somebody sent it, and the peer itself is who asks.
    pub fn client(&self, peer: IpAddr, headers: &HeaderMap) -> IpAddr {
        if !self.trust(peer) {
            return peer;
        }
        let told = [X_FORWARDED_FOR, FORWARDED].map(|name| self.told(peer, headers, &name));
        match told {
            [Some(one), Some(other)] if one != other => peer,
            [one, other] => one.or(other).unwrap_or(peer),
        }
    }

    /// Who asks by one header; `None` without it.
    fn told(&self, peer: IpAddr, headers: &HeaderMap, name: &HeaderName) -> Option<IpAddr> {
        let mut client = None;
        for value in headers.get_all(name).iter().rev() {
            // No address has a comma, so whatever quotes a client has opened, a proxy's own entry is whole.
            for entry in value.as_bytes().rsplit(|byte| *byte == b',') {
                let entry = std::str::from_utf8(entry).ok();
                let node = entry.and_then(|entry| if *name == FORWARDED { node(entry) } else { Some(entry) });
                // One who does not say is as the proxy that heard him.
                let Some(address) = node.and_then(address) else { return Some(client.unwrap_or(peer)) };
                client = Some(address);
                if !self.trust(address) {
                    return client;
                }
            }
        }
        client
    }
}

/// What stands behind `for=` in an element of `Forwarded`.
fn node(element: &str) -> Option<&str> {
    let mut pairs = element.split(';').filter_map(|pair| pair.trim().split_once('='));
    pairs.find(|(name, _)| name.eq_ignore_ascii_case("for")).map(|(_, node)| node)
}

/// An address, with or without a port, brackets and quotes.
fn address(node: &str) -> Option<IpAddr> {
    let node = node.trim().trim_matches('"');
    let alone = node.trim_start_matches('[').trim_end_matches(']').parse().ok();
    alone.or_else(|| node.parse::<SocketAddr>().ok().map(|address| address.ip())).map(|ip| ip.to_canonical())
}

#[cfg(test)]
mod tests {
    use super::*;
    use warp::http::HeaderValue;

    fn ip(text: &str) -> IpAddr {
        text.parse().expect("an address")
    }

    /// Who asks, as `10.0.0.1` says it.
    fn client(lines: &[(&'static str, &'static str)]) -> IpAddr {
        let proxies = Proxies::new(&["10.0.0.0/8", "fd00::/8"].map(|text| parse_network(text).expect("a network")));
        let mut headers = HeaderMap::new();
        for (name, value) in lines {
            headers.append(*name, HeaderValue::from_static(value));
        }
        assert_eq!(proxies.client(ip("192.0.2.9"), &headers), ip("192.0.2.9"), "nobody else is believed");
        proxies.client(ip("::ffff:10.0.0.1"), &headers).to_canonical()
    }

    #[test]
    fn a_client_is_who_the_last_trusted_proxy_was_asked_by() {
        const OLD: &str = "x-forwarded-for";
        const NEW: &str = "forwarded";
        let cases: [(&[(&str, &str)], &str); 19] = [
            (&[], "10.0.0.1"),
            (&[(OLD, "203.0.113.7")], "203.0.113.7"),
            (&[(OLD, "203.0.113.7:4711")], "203.0.113.7"),
            (&[(OLD, "2001:db8::7")], "2001:db8::7"),
            (&[(OLD, "[2001:db8::7]:4711")], "2001:db8::7"),
            // What stands left of the client is the client's own word.
            (&[(OLD, "198.51.100.1, 203.0.113.7")], "203.0.113.7"),
            (&[(OLD, "198.51.100.1, 203.0.113.7, 10.2.0.1, fd00::5")], "203.0.113.7"),
            (&[(OLD, "198.51.100.1"), (OLD, "203.0.113.7"), (OLD, "10.2.0.1")], "203.0.113.7"),
            (&[(OLD, "10.9.9.9, 203.0.113.7")], "203.0.113.7"),
            // All of them proxies, or nobody's address.
            (&[(OLD, "10.2.0.1, 10.3.0.1")], "10.2.0.1"),
            (&[(OLD, "203.0.113.7, unknown")], "10.0.0.1"),
            (&[(OLD, "203.0.113.7, _hidden, 10.2.0.1")], "10.2.0.1"),
            (&[(OLD, "")], "10.0.0.1"),
            (&[(NEW, "for=203.0.113.7;proto=https;by=10.0.0.1")], "203.0.113.7"),
            (&[(NEW, "for=198.51.100.1, proto=https; For=\"[2001:db8::7]:80\"")], "2001:db8::7"),
            (&[(NEW, "for=\"198.51.100.1, for=203.0.113.7")], "203.0.113.7"),
            (&[(NEW, "for=unknown, for=10.2.0.1")], "10.2.0.1"),
            (&[(OLD, "203.0.113.7"), (NEW, "for=203.0.113.7")], "203.0.113.7"),
            // One of two headers came through as a client wrote it.
            (&[(OLD, "203.0.113.7"), (NEW, "for=198.51.100.1")], "10.0.0.1"),
        ];
        for (lines, who) in cases {
            assert_eq!(client(lines), ip(who), "{lines:?}");
        }
    }

    #[test]
    fn networks_are_read() {
        assert!(["10.0.0.0/8", "192.0.2.1", "::1", "fd00::/8"].iter().all(|text| parse_network(text).is_ok()));
        let sentence = parse_network("10.0.0.0/33").expect_err("33 bits");
        assert!(sentence.starts_with("10.0.0.0/33 is no network"), "{sentence}");
    }
}
