//! Graphs of lists of launches whose kernels came before: what differs from the last time is set in the graph.
//!
//! Invariant: the launches of a graph are what it would do now. What of it is set while it runs is of its next run.

use std::collections::{HashMap, HashSet};
use std::ffi::c_void;
use std::hash::{BuildHasher, RandomState};

use cudarc::driver::result as cuda;
use cudarc::driver::sys;

use super::{Loaded, lost};
use crate::{CudaError, Launch};

/// Launches from which on a graph is worth having.
const MIN_LAUNCHES: usize = 8;
/// Graphs kept; when there are more, all go.
const MAX_GRAPHS: usize = 128;
/// Lists remembered that came once; when there are more, all are forgotten.
const MAX_SEEN: usize = 8192;

/// By the hash of a list's kernels.
#[derive(Default)]
pub struct Graphs {
    made: HashMap<u64, Graph>,
    /// Of lists that came once.
    seen: HashSet<u64>,
    hasher: RandomState,
}

/// Launches one after the other.
struct Graph {
    launches: Vec<Launch>,
    /// What it was made from, whose nodes name what is set.
    template: sys::CUgraph,
    nodes: Vec<sys::CUgraphNode>,
    executable: sys::CUgraphExec,
}

impl Graphs {
    /// The graph of a list whose kernels came before; `None` where it has none and is to be launched piece by piece.
    ///
    /// # Safety
    /// The context is current, and what is launched is valid when the graph is.
    pub unsafe fn of(
        &mut self,
        launches: &[Launch],
        functions: &[Loaded],
    ) -> Result<Option<sys::CUgraphExec>, CudaError> {
        if launches.len() < MIN_LAUNCHES {
            return Ok(None);
        }
        let kernels: Vec<_> = launches.iter().map(|launch| launch.function).collect();
        let hash = self.hasher.hash_one(&kernels);
        if let Some(graph) = self.made.get_mut(&hash) {
            // SAFETY: as here.
            unsafe { graph.set(launches, functions)? };
            return Ok(Some(graph.executable));
        }
        if self.seen.len() == MAX_SEEN {
            self.seen.clear();
        }
        if self.seen.insert(hash) {
            return Ok(None);
        }
        if self.made.len() == MAX_GRAPHS {
            self.destroy();
        }
        // SAFETY: as here.
        let Some(graph) = (unsafe { Graph::new(launches, functions) }) else {
            // Graphs take memory of the device, of which there may be no more.
            self.destroy();
            return Ok(None);
        };
        let executable = graph.executable;
        self.made.insert(hash, graph);
        Ok(Some(executable))
    }

    /// A graph that runs is freed when it has ended.
    pub fn destroy(&mut self) {
        self.seen.clear();
        for (_, graph) in self.made.drain() {
            // SAFETY: it is in no list any more.
            unsafe {
                let _ = cuda::graph::exec_destroy(graph.executable);
                let _ = cuda::graph::destroy(graph.template);
            }
        }
    }

    /// Lets go of graphs that went with their context.
    pub fn forget(&mut self) {
        self.made.clear();
        self.seen.clear();
    }
}

impl Graph {
    /// `None` where there is no room for it.
    unsafe fn new(launches: &[Launch], functions: &[Loaded]) -> Option<Graph> {
        let mut template = std::ptr::null_mut();
        // SAFETY: the context is the caller's.
        unsafe { sys::cuGraphCreate(&raw mut template, 0) }.result().ok()?;
        let made = || {
            let mut nodes: Vec<sys::CUgraphNode> = Vec::with_capacity(launches.len());
            for launch in launches {
                let mut node = std::ptr::null_mut();
                let (before, num_before) = nodes.last().map_or((std::ptr::null(), 0), |last| (&raw const *last, 1));
                with_params(launch, functions, |params| {
                    // SAFETY: the graph was made above, as was the node before.
                    unsafe { sys::cuGraphAddKernelNode_v2(&raw mut node, template, before, num_before, params) }
                })
                .result()
                .ok()?;
                nodes.push(node);
            }
            // SAFETY: the graph was made above.
            let executable = unsafe { cuda::graph::instantiate(template, sys::CUgraphInstantiate_flags(0)) }.ok()?;
            Some(Graph { launches: launches.to_vec(), template, nodes, executable })
        };
        let made = made();
        if made.is_none() {
            // SAFETY: nothing has it.
            let _ = unsafe { cuda::graph::destroy(template) };
        }
        made
    }

    unsafe fn set(&mut self, launches: &[Launch], functions: &[Loaded]) -> Result<(), CudaError> {
        for ((launch, node), kept) in launches.iter().zip(&self.nodes).zip(&mut self.launches) {
            assert_eq!(launch.function, kept.function, "two lists have one hash");
            if launch == kept {
                continue;
            }
            with_params(launch, functions, |params| {
                // SAFETY: the node is of this graph, and has this kernel.
                unsafe { sys::cuGraphExecKernelNodeSetParams_v2(self.executable, *node, params) }
            })
            .result()
            .map_err(lost)?;
            *kept = *launch;
        }
        Ok(())
    }
}

/// A launch as a node of a graph; the driver copies what is given it.
fn with_params<T>(
    launch: &Launch,
    functions: &[Loaded],
    give: impl FnOnce(*const sys::CUDA_KERNEL_NODE_PARAMS) -> T,
) -> T {
    let Loaded { function, threads } = functions[launch.function.0 as usize];
    let mut values = [launch.params.as_ptr().cast_mut().cast::<c_void>()];
    let params = sys::CUDA_KERNEL_NODE_PARAMS {
        func: function,
        gridDimX: launch.blocks,
        gridDimY: 1,
        gridDimZ: 1,
        blockDimX: threads,
        blockDimY: 1,
        blockDimZ: 1,
        sharedMemBytes: 0,
        kernelParams: values.as_mut_ptr(),
        extra: std::ptr::null_mut(),
        kern: std::ptr::null_mut(),
        ctx: std::ptr::null_mut(),
    };
    give(&raw const params)
}
