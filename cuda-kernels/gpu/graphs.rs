//! Graphs of lists of launches that come again, to the last parameter.

use std::collections::{HashMap, HashSet};
use std::hash::{BuildHasher, RandomState};

use cudarc::driver::result as cuda;
use cudarc::driver::sys;

use super::lost;
use crate::{CudaError, Launch};

/// Launches from which on a graph is worth having.
const MIN_LAUNCHES: usize = 8;
/// Graphs kept; when there are more, all go.
const MAX_GRAPHS: usize = 128;
/// Lists remembered that came once; when there are more, all are forgotten.
const MAX_SEEN: usize = 8192;

#[derive(Default)]
pub struct Graphs {
    /// By their launches' hash.
    made: HashMap<u64, sys::CUgraphExec>,
    /// Hashes of lists that came once.
    seen: HashSet<u64>,
    hasher: RandomState,
}

impl Graphs {
    /// The graph of a list that came before, which is made by capturing what `launch` does on `stream`; `None` where it
    /// has none and is to be launched piece by piece.
    ///
    /// # Safety
    /// The stream's context is current, and what `launch` launches is valid whenever the list comes.
    pub unsafe fn of(
        &mut self,
        launches: &[Launch],
        stream: sys::CUstream,
        launch: impl Fn(&Launch) -> Result<(), CudaError>,
    ) -> Result<Option<sys::CUgraphExec>, CudaError> {
        let hash = self.hasher.hash_one(launches);
        if let Some(&graph) = self.made.get(&hash) {
            return Ok(Some(graph));
        }
        if self.seen.len() == MAX_SEEN {
            self.seen.clear();
        }
        if launches.len() < MIN_LAUNCHES || self.seen.insert(hash) {
            return Ok(None);
        }
        let mode = sys::CUstreamCaptureMode::CU_STREAM_CAPTURE_MODE_THREAD_LOCAL;
        // SAFETY: the stream is the caller's; a graph is destroyed once.
        let made = unsafe {
            cuda::stream::begin_capture(stream, mode).map_err(lost)?;
            let launched = launches.iter().try_for_each(launch);
            let captured = cuda::stream::end_capture(stream);
            // A launch that failed spoils the capture: what it said comes first.
            launched?;
            let captured = captured.map_err(lost)?;
            let made = cuda::graph::instantiate(captured, sys::CUgraphInstantiate_flags(0));
            cuda::graph::destroy(captured).map_err(lost)?;
            made
        };
        let Ok(made) = made else {
            // Graphs take memory of the device, of which there may be no more.
            self.destroy();
            return Ok(None);
        };
        if self.made.len() == MAX_GRAPHS {
            self.destroy();
        }
        self.made.insert(hash, made);
        Ok(Some(made))
    }

    /// A graph that runs is freed when it has ended.
    pub fn destroy(&mut self) {
        self.seen.clear();
        for (_, graph) in self.made.drain() {
            // SAFETY: it was made by `instantiate`, and is in no list any more.
            let _ = unsafe { cuda::graph::exec_destroy(graph) };
        }
    }

    /// Lets go of graphs that went with their context.
    pub fn forget(&mut self) {
        self.made.clear();
        self.seen.clear();
    }
}
