//! File descriptors, of which each connection takes one. Invariant: their limit is only ever raised, to what the
//! connections that may be open need, and where the system forbids that it is said.

use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};

/// Beside connections: the model's files, the log, what a driver opens.
const OTHERS: u64 = 256;

/// Sees to it that this process can have so many ends of connections open; where it cannot, `otherwise` says what comes
/// of that and what to do.
pub fn make_room(num_ends: usize, otherwise: &str) {
    let needed = num_ends as u64 + OTHERS;
    let Rlimit { current, maximum } = getrlimit(Resource::Nofile);
    if current.is_none_or(|current| current >= needed) {
        return;
    }
    let raised = maximum.map_or(needed, |maximum| maximum.min(needed));
    let result = setrlimit(Resource::Nofile, Rlimit { current: Some(raised), maximum });
    if result.is_err() || raised < needed {
        tracing::warn!("this process may open {raised} files, and {num_ends} connections need {needed}: {otherwise}");
    }
}
