//! The engines that serve a model, one for each device, behind one front that looks like a single engine.
//!
//! [`admission`] says who is let in; [`router`] decides where a request goes, and [`holders`] knows which replica has
//! which KV blocks, as each says itself: plain data without thread, clock or device, which a simulation drives too. In
//! real time [`dispatch`] drives them: it is told by engine threads what happens, so that nothing is decided by a
//! picture that is older than that; a [`routed`] request goes on elsewhere when its device is lost. Where there is one
//! engine, requests go to it as they are.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use crate::backend::DeviceInfo;
use crate::backlog::Backlog;
use crate::config::EngineConfig;
use crate::engine::{Engine, EngineStats};
use crate::forecast::Load;
use crate::limits::verdict::Verdict;
use crate::memory::BlockHasher;
use crate::worker::EngineHandle;

pub mod admission;
mod dispatch;
pub mod holders;
mod imbalance;
pub(crate) mod member;
mod routed;
pub mod router;

pub use crate::worker::Handed;
pub use admission::{Place, SubmitError};
use dispatch::Dispatch;
pub use imbalance::Idle;
use member::Member;
pub use routed::MAX_LOSSES;

/// One of the devices that serve a model.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct ReplicaId(pub u16);

/// Running engines of one model; clones share them.
#[derive(Clone)]
pub struct Fleet(Arc<Shared>);

/// An engine, what people call its device, and what its thread does first.
pub struct Seat {
    pub engine: Engine,
    pub title: String,
    pub first: Box<dyn FnOnce() + Send>,
}

struct Shared {
    /// By replica.
    engines: Vec<EngineHandle>,
    config: EngineConfig,
    /// What names blocks in all of them; `None` where prefixes are not kept.
    hasher: Option<BlockHasher>,
    /// Held for a few additions at a time, and never together with another lock of the fleet's but a request's own.
    backlog: Arc<Mutex<Backlog>>,
    /// Where there are several.
    dispatch: Option<Arc<Dispatch>>,
}

impl Fleet {
    /// Starts the thread of one engine.
    pub fn of(engine: Engine) -> Fleet {
        let title = engine.backend().info().id.clone();
        Fleet::spawn(vec![Seat { engine, title, first: Box::new(|| {}) }])
    }

    /// Starts a thread for each engine. All cut KV into blocks of one size and name them by one key.
    pub fn spawn(seats: Vec<Seat>) -> Fleet {
        let hashers: Vec<_> = seats.iter().map(|seat| seat.engine.hasher()).collect();
        let is_common = hashers.iter().all(|hasher| *hasher == hashers[0]);
        let (mut engines, mut workers) = (Vec::new(), Vec::new());
        for Seat { engine, title, first } in seats {
            let (handle, worker) = EngineHandle::new(engine, title);
            engines.push(handle);
            workers.push((worker, first));
        }
        let config = together(&engines);
        let dispatch = (engines.len() > 1).then(|| {
            assert!(is_common, "replicas name blocks differently");
            Arc::new(Dispatch::new(engines.clone(), hashers[0]))
        });
        let members = dispatch.iter().flat_map(|dispatch| Member::all(engines.len(), dispatch));
        let members = members.map(Some).chain(std::iter::repeat_with(|| None));
        workers.into_iter().zip(members).for_each(|((worker, first), member)| worker.start(member, first));
        let backlog = Backlog::new(config.max_queued_requests, u64::from(config.max_queued_tokens));
        let backlog = Arc::new(Mutex::new(backlog));
        Fleet(Arc::new(Shared { engines, config, hasher: hashers[0], backlog, dispatch }))
    }

    /// By replica; at least one.
    pub fn engines(&self) -> &[EngineHandle] {
        &self.0.engines
    }

    /// Of all together: any of them can take what fits it.
    pub fn config(&self) -> &EngineConfig {
        &self.0.config
    }

    pub fn vocab_size(&self) -> u32 {
        self.first().vocab_size()
    }

    /// The first, under the ids and names of all.
    pub fn device(&self) -> DeviceInfo {
        let join = |of: fn(&DeviceInfo) -> &str| {
            self.engines().iter().map(|engine| of(engine.device())).collect::<Vec<_>>().join(", ")
        };
        DeviceInfo { id: join(|device| &device.id), name: join(|device| &device.name), ..self.first().device().clone() }
    }

    /// Sums over all, as of the last step of each.
    pub fn stats(&self) -> EngineStats {
        let mut stats = self.first().stats();
        self.0.engines[1..].iter().for_each(|engine| stats += &engine.stats());
        stats
    }

    /// What holds the device back, as `stats` tell it; where there are several, what holds each of them back.
    pub fn verdict(&self, stats: &EngineStats) -> Verdict {
        if let [engine] = self.engines() {
            return engine.verdict(stats);
        }
        let verdicts = self.engines().iter().map(|engine| (engine, engine.verdict(&engine.stats())));
        let told = verdicts.map(|(engine, verdict)| {
            let sentence = format!("{}: {}", engine.device().id, verdict.sentence);
            Verdict { sentence, ..verdict }
        });
        let join = |all: Verdict, next: Verdict| Verdict { sentence: all.sentence + "; " + &next.sentence, ..all };
        told.reduce(join).expect("there is an engine")
    }

    /// What runs and how fast, as of the last step of each or a little earlier.
    pub fn load(&self) -> Load {
        Load::together(self.there().map(EngineHandle::load)).unwrap_or_else(|| self.first().load())
    }

    /// Those whose devices are there.
    pub fn there(&self) -> impl Iterator<Item = &EngineHandle> {
        self.0.engines.iter().filter(|engine| engine.recovering().is_none() && engine.stopped().is_none())
    }

    /// Of the KV blocks of devices that are there, the share that running sequences hold; all, where none is.
    pub fn kv_usage(&self) -> f64 {
        let blocks = self.there().map(|engine| engine.stats().blocks);
        let (used, total) =
            blocks.fold((0, 0), |(used, total), blocks| (used + blocks.referenced, total + blocks.total));
        if total == 0 { 1.0 } else { f64::from(used) / f64::from(total) }
    }

    /// Requests that have not begun, those whose text is being read included, and those that were sent back to wait, on
    /// their device or for another one.
    pub fn num_waiting(&self) -> u64 {
        let num_preempted: u64 = self.0.engines.iter().map(|engine| u64::from(engine.stats().num_preempted)).sum();
        let num_again = self.0.dispatch.as_ref().map_or(0, |dispatch| dispatch.num_waiting_again());
        num_preempted + num_again + u64::from(lock(&self.0.backlog).total().num_requests)
    }

    /// The same of one replica; of several, those that have been sent there.
    pub fn num_waiting_at(&self, replica: ReplicaId) -> u64 {
        let Some(dispatch) = &self.0.dispatch else { return self.num_waiting() };
        let num_preempted = self.0.engines[usize::from(replica.0)].stats().num_preempted;
        u64::from(num_preempted) + dispatch.num_waiting_at(replica)
    }

    /// Where there are several: how long a device had nothing to do while requests waited on others, by why.
    pub fn imbalance(&self, replica: ReplicaId) -> Option<[(Idle, Duration); Idle::ALL.len()]> {
        let charged = self.0.dispatch.as_ref()?.imbalance(replica);
        Some(std::array::from_fn(|index| (Idle::ALL[index], charged[index])))
    }

    /// How long work has waited on all devices that are there without a step being completed; zero while one is idle.
    pub fn stalled_for(&self) -> Duration {
        self.there().map(EngineHandle::stalled_for).min().unwrap_or_default()
    }

    /// Why nothing is computed now, while all devices that have not ended are made anew.
    pub fn recovering(&self) -> Option<String> {
        let there = self.0.engines.iter().filter(|engine| engine.stopped().is_none());
        let reasons: Option<Vec<String>> = there.map(EngineHandle::recovering).collect();
        reasons?.into_iter().next()
    }

    /// Why all engines have ended, if they have.
    pub fn stopped(&self) -> Option<String> {
        let reasons: Option<Vec<String>> = self.0.engines.iter().map(EngineHandle::stopped).collect();
        reasons?.into_iter().next()
    }

    /// Ends what still runs and joins the threads.
    pub fn shutdown(&self) {
        self.0.engines.iter().for_each(EngineHandle::stop);
        self.0.engines.iter().for_each(EngineHandle::join);
        self.0.dispatch.iter().for_each(|dispatch| dispatch.fail_parked());
    }

    fn first(&self) -> &EngineHandle {
        &self.0.engines[0]
    }
}

fn together(engines: &[EngineHandle]) -> EngineConfig {
    let configs = engines.iter().map(EngineHandle::config).copied();
    let add = |all: EngineConfig, next: EngineConfig| EngineConfig {
        max_num_seqs: all.max_num_seqs + next.max_num_seqs,
        num_blocks: all.num_blocks + next.num_blocks,
        num_host_blocks: all.num_host_blocks + next.num_host_blocks,
        max_model_len: all.max_model_len.min(next.max_model_len),
        ..all
    };
    configs.reduce(add).expect("there is an engine")
}

/// Whole after every write, so a panic elsewhere leaves it usable.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
