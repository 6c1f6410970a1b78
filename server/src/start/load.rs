//! From plans to a model that is served: weights onto each device, and a thread for each engine.
//!
//! Invariant: devices load one after the other from the same open files, of which the system's page cache is the one
//! host copy; each engine's threads stay on its device's cores.

use std::collections::HashMap;
use std::path::Path;
use std::sync::Arc;

use fullbore_engine::backend::LoadError;
use fullbore_engine::engine::Engine;
use fullbore_engine::engine::moves::{CHUNK_BYTES, MovePrices};
use fullbore_engine::fleet::{Fleet, Seat};
use fullbore_engine::grammar::GrammarCompiler;
use fullbore_engine::memory::capacity::MemoryTable;
use fullbore_engine::model::Weights;

use super::together::tolerate;
use super::{Plan, StartError, StartTimes, load_engine, random, remedy};
use crate::api::{ServedModel, unix_seconds};
use crate::costs::SavedCosts;
use crate::devices;
use crate::http::metrics::RequestMetrics;
use crate::live::History;

/// One device's part in a model.
pub(super) struct Replica {
    pub engine: Engine,
    seat: super::Seat,
    memory: MemoryTable,
    costs: Option<SavedCosts>,
    times: StartTimes,
}

/// Loads a model onto all of its devices, and starts their threads.
pub fn load(plans: Vec<Plan>) -> Result<ServedModel, StartError> {
    let is_alone = plans.len() == 1;
    let (name, bundle) = (plans[0].name.clone(), plans[0].bundle.clone());
    let hash_key = (random(), random());
    let mut replicas = Vec::with_capacity(plans.len());
    for plan in plans {
        let seat = plan.seat.clone();
        replicas.extend(tolerate(plan.load_served(hash_key, is_alone), &seat, is_alone)?);
    }
    let Some(first) = replicas.first() else { return Err(StartError::NoDevice { model: name }) };
    let shape = first.engine.model().config.clone();
    tell_shortest(&replicas);
    let (mut seats, mut memory, mut costs, mut all_times) = (Vec::new(), Vec::new(), Vec::new(), Vec::new());
    for Replica { engine, seat, memory: table, costs: saved, times } in replicas {
        let title = seat.title.clone();
        // It was pinned while it was loaded.
        let first = Box::new(move || std::mem::forget(seat.pin().ok()));
        seats.push(Seat { engine, title, first });
        memory.push(table);
        costs.push(saved);
        all_times.push(times);
    }
    Ok(ServedModel {
        metrics: Arc::new(RequestMetrics::new(&name)),
        history: History::default(),
        name,
        dtype: Weights::main_format(&bundle.config, &bundle.checkpoint),
        grammars: GrammarCompiler::new(bundle.tokenizer.clone(), bundle.stop_ids.clone(), shape.vocab_size),
        tokenizer: bundle.tokenizer,
        chat_template: bundle.chat_template,
        defaults: bundle.defaults,
        stop_ids: bundle.stop_ids,
        pooling: bundle.pooling,
        shape,
        folder: bundle.checkpoint.folder().map(Path::to_owned),
        weight_files: bundle.checkpoint.files(),
        memory,
        shares: HashMap::new(),
        costs,
        times: all_times.into_iter().reduce(StartTimes::then).expect("a device"),
        loaded_at: unix_seconds(),
        engine: Fleet::spawn(seats),
    })
}

/// Any device takes any request, so that the one with the least memory says how long one may be.
fn tell_shortest(replicas: &[Replica]) {
    let length = |replica: &&Replica| replica.engine.config().max_model_len;
    let (Some(least), Some(most)) = (replicas.iter().min_by_key(length), replicas.iter().max_by_key(length)) else {
        return;
    };
    if length(&least) < length(&most) {
        let (device, tokens) = (&least.seat.title, length(&least));
        tracing::warn!(device, "requests may have {tokens} tokens, because this device has memory for no more");
    }
}

impl Plan {
    /// Loads the weights; blocks are named by `hash_key`.
    pub(super) fn load_replica(self, hash_key: (u64, u64)) -> Result<Replica, StartError> {
        self.check_memory()?;
        let _pinned = self.seat.pin()?;
        let Plan { seat, bundle, backend, config, memory, costs, mut times, .. } = self;
        times.go_on();
        let has_floats = bundle.has_floats();
        let loaded = load_engine(bundle, backend, config, hash_key, &mut times);
        let engine = loaded.map_err(|error| remedy::out_of_memory(error, &memory, has_floats))?;
        Ok(Replica { engine, seat, memory, costs, times })
    }

    /// The same, for a server: with what is known of steps, of others on the device, and of copies to other devices.
    fn load_served(self, hash_key: (u64, u64), is_alone: bool) -> Result<Replica, StartError> {
        let neighbours = devices::share(self.backend.info(), &self.seat.title, &self.name);
        let (tuned_cost, kv_events) = (self.tuned_cost, self.kv_events.clone());
        let mut replica = self.load_replica(hash_key)?;
        if let Some(neighbours) = neighbours {
            replica.engine.set_neighbours(neighbours);
        }
        if let Some(sender) = kv_events {
            replica.engine.cache_mut().tell_kv_events_to(sender);
        }
        if let Some(cost) = replica.costs.as_ref().and_then(SavedCosts::read).or(tuned_cost) {
            replica.engine.set_cost(cost);
        }
        // Of a simulated device no copy says anything.
        if !is_alone && replica.engine.backend().info().id != "sim" {
            let _pinned = replica.seat.pin()?;
            replica.engine.enable_moves(CHUNK_BYTES).map_err(LoadError::from)?;
            if let Some(MovePrices { out_ns, in_ns, .. }) = replica.engine.move_prices() {
                tracing::info!(
                    device = replica.seat.title,
                    out_ns,
                    in_ns,
                    "a KV block to another device, and from there"
                );
            }
        }
        Ok(replica)
    }
}
