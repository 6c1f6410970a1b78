//! Bodies of requests while they are read: each within its own limits, and all within a budget.
//!
//! What one client may keep falls with what is left, as in [`fullbore_engine::backlog`], so that a flood leaves room
//! for others, those included that have not come yet. Invariant: what is kept is never more than the budget, and a body
//! is counted until it is dropped, which is when its text has been read.

use std::collections::HashMap;
use std::ops::Deref;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use bytes::Buf;
use futures_util::{Stream, StreamExt};
use tokio::time::timeout;
use warp::http::HeaderMap;
use warp::http::header::{CONTENT_LENGTH, EXPECT};

use super::accept::Limits;
use super::access::Origin;
use super::error::ApiError;

pub struct Bodies {
    max_bytes: u64,
    kept: Mutex<Kept>,
}

#[derive(Default)]
struct Kept {
    num_bytes: u64,
    /// Known while it keeps something.
    by_origin: HashMap<Origin, u64>,
}

/// A body, or what has come of it.
pub struct Body {
    bytes: Vec<u8>,
    counted: Counted,
}

/// Counts a body until it is dropped.
pub struct Counted {
    num_bytes: u64,
    bodies: Arc<Bodies>,
    origin: Origin,
}

/// What a body over a limit may still send before the answer, so that a client that writes first and reads then gets
/// it; more is cut off.
const MAX_DISCARDED_BYTES: u64 = 256 << 20;

impl Bodies {
    pub fn new(max_bytes: u64) -> Arc<Bodies> {
        Arc::new(Bodies { max_bytes, kept: Mutex::default() })
    }

    pub fn num_bytes(&self) -> u64 {
        self.lock().num_bytes
    }

    /// A body that is within its limits; where the answer is known already nothing of it is kept.
    pub async fn read<S, B, E>(
        self: &Arc<Bodies>,
        limits: &Limits,
        origin: &Origin,
        headers: &HeaderMap,
        mut refused: Option<ApiError>,
        body: S,
    ) -> Result<Body, ApiError>
    where
        S: Stream<Item = Result<B, E>>,
        B: Buf,
    {
        let length = headers.get(CONTENT_LENGTH).and_then(|length| length.to_str().ok()?.parse::<u64>().ok());
        let too_large = || ApiError::body_too_large(limits.max_body_bytes);
        if length.is_some_and(|length| length > limits.max_body_bytes) {
            refused.get_or_insert_with(too_large);
        }
        if let Some(error) = refused.take_if(|_| headers.contains_key(EXPECT)) {
            return Err(error);
        }
        let read = async {
            let mut body = std::pin::pin!(body);
            let mut kept = self.open(origin);
            let mut num_bytes = 0;
            while let Some(chunk) = body.next().await {
                let chunk = chunk.map_err(|_| ApiError::body_broken())?;
                num_bytes += chunk.remaining() as u64;
                if num_bytes > MAX_DISCARDED_BYTES {
                    break;
                }
                let taken = match num_bytes > limits.max_body_bytes {
                    _ if refused.is_some() => continue,
                    true => Err(too_large()),
                    false => kept.take(chunk),
                };
                if let Err(error) = taken {
                    refused = Some(error);
                    kept = self.open(origin);
                }
            }
            refused.map_or(Ok(kept), Err)
        };
        let too_slow = |_| ApiError::body_too_slow(limits.body_timeout.as_secs());
        timeout(limits.body_timeout, read).await.map_err(too_slow)?
    }

    fn open(self: &Arc<Bodies>, origin: &Origin) -> Body {
        Body { bytes: Vec::new(), counted: Counted { num_bytes: 0, bodies: self.clone(), origin: origin.clone() } }
    }

    /// Whether `origin` may keep so much more; then it is counted.
    fn keep(&self, origin: &Origin, num_bytes: u64) -> bool {
        let mut kept = self.lock();
        let own = kept.by_origin.get(origin).copied().unwrap_or(0);
        let free = self.max_bytes - kept.num_bytes;
        // After it, it has no more than what is free for others.
        let has_room = own + num_bytes <= free.saturating_sub(num_bytes);
        if has_room {
            kept.num_bytes += num_bytes;
            *kept.by_origin.entry(origin.clone()).or_default() += num_bytes;
        }
        has_room
    }

    fn lock(&self) -> MutexGuard<'_, Kept> {
        // Whole after every write, so a panic elsewhere leaves it usable.
        self.kept.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Body {
    fn take(&mut self, mut chunk: impl Buf) -> Result<(), ApiError> {
        let num_bytes = chunk.remaining();
        let Counted { bodies, origin, .. } = &self.counted;
        if !bodies.keep(origin, num_bytes as u64) {
            return Err(ApiError::no_room_for_bodies(bodies.max_bytes));
        }
        self.counted.num_bytes += num_bytes as u64;
        self.bytes.extend_from_slice(&chunk.copy_to_bytes(num_bytes));
        Ok(())
    }

    /// For who copies it, and lets go of the one here: what counts it goes with the copy.
    pub fn into_parts(self) -> (Vec<u8>, Counted) {
        (self.bytes, self.counted)
    }
}

impl Deref for Body {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        &self.bytes
    }
}

impl AsRef<[u8]> for Body {
    fn as_ref(&self) -> &[u8] {
        self
    }
}

impl Drop for Counted {
    fn drop(&mut self) {
        let mut kept = self.bodies.lock();
        kept.num_bytes -= self.num_bytes;
        if let Some(own) = kept.by_origin.get_mut(&self.origin) {
            *own -= self.num_bytes;
            if *own == 0 {
                kept.by_origin.remove(&self.origin);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::net::IpAddr;

    use super::*;

    #[test]
    fn what_one_client_keeps_leaves_as_much_for_others() {
        let bodies = Bodies::new(1000);
        let origin = |number: u8| Origin::Network(IpAddr::from([10, 0, 0, number]));
        let take = |body: &mut Body, num_bytes: usize| body.take(&vec![b'x'; num_bytes][..]).is_ok();
        let mut first = bodies.open(&origin(1));
        assert!(take(&mut first, 400) && !take(&mut first, 101) && take(&mut first, 100));
        assert!(!take(&mut bodies.open(&origin(1)), 1), "two bodies of one client are of one client");
        let (mut second, mut third) = (bodies.open(&origin(2)), bodies.open(&origin(3)));
        assert!(take(&mut second, 250) && !take(&mut second, 1) && take(&mut third, 125));
        assert_eq!((bodies.num_bytes(), first.len()), (875, 500));
        drop(first);
        assert!(take(&mut second, 100));
        let (bytes, counted) = second.into_parts();
        assert_eq!((bytes.len(), bodies.num_bytes()), (350, 475));
        drop(bytes);
        assert_eq!(bodies.num_bytes(), 475, "it counts until what became of it is dropped");
        drop((counted, third));
        assert_eq!(bodies.num_bytes(), 0);
        assert!(bodies.lock().by_origin.is_empty());
    }
}
