//! KV that goes from one device of a simulated fleet to another, as the router says, at what copies take on each.
//!
//! What a device has read is there for the other one when the step ends in which it was read, and not before. As on a
//! server: a device that waits for nothing but blocks that come does nothing until they do, or longer than computing
//! them would have taken.

use std::cmp::Reverse;

use fullbore_engine::backend::LoadError;
use fullbore_engine::backend::sim::SimClock;
use fullbore_engine::engine::Engine;
use fullbore_engine::engine::moves::{CHUNK_BYTES, Passed, Relay, relayed_move};

use super::life::Change;
use super::{Fleet, FleetDevice};
use crate::simulate;

pub(super) struct Moving {
    from: usize,
    to: usize,
    relay: Relay,
}

impl FleetDevice {
    /// What runs on it, from when it is made until it is lost.
    pub(super) fn engine(&self) -> Result<(Engine, SimClock), LoadError> {
        let (mut engine, clock) = simulate::engine(&self.profile, self.config)?;
        engine.cache_mut().keep_block_events();
        if self.moves_kv {
            let block_bytes = self.profile.model.kv_bytes_per_token as f64 * f64::from(self.config.block_size);
            let copy_ns = (block_bytes / 1e6 * self.profile.ns_per_copied_megabyte) as u64;
            // A block of the stand-in is smaller than one of the model, and as many go at a time.
            let smaller = engine.model().kv_layout().block_words() as f64 * 4.0 / block_bytes;
            engine.enable_moves_at(copy_ns, copy_ns, (CHUNK_BYTES as f64 * smaller) as usize);
        }
        Ok((engine, clock))
    }
}

impl Fleet<'_> {
    /// Has what the placement of a request says come from another device.
    pub(super) fn fetch(&mut self, index: usize) {
        let live = self.live[index].as_ref().expect("it goes on");
        let placement = live.placement.as_ref().expect("it has been placed");
        let Some(fetch) = &placement.fetch else { return };
        let [from, to] = [fetch.from, placement.replica].map(|replica| usize::from(replica.0));
        let (export, relay, import) =
            relayed_move(live.request.clone(), &live.chain, fetch.blocks.clone(), fetch.saves);
        [from, to].into_iter().for_each(|id| self.devices[id].clock.advance_to(self.now));
        self.devices[to].engine.import(import);
        self.devices[from].engine.export(export);
        let until = self.devices[to].clock.now() + fetch.saves;
        self.changes.push(Reverse((until, to, Change::HasWaited)));
        self.moving.push(Moving { from, to, relay });
        self.wake(from);
    }

    /// Hands on what device `id`, whose step has ended, has read for others, and what it had no room for until now.
    pub(super) fn pass_on(&mut self, id: usize) {
        let mut moving = std::mem::take(&mut self.moving);
        moving.retain_mut(|Moving { from, to, relay }| {
            if ![*from, *to].contains(&id) {
                return true;
            }
            let passed = relay.pass(*from == id);
            if passed != Passed::Nothing {
                self.wake(if *from == id { *to } else { *from });
            }
            passed != Passed::All
        });
        self.moving = moving;
    }

    /// Nothing comes from device `id` any more, and nothing goes there.
    pub(super) fn end_moves(&mut self, id: usize) {
        let ended: Vec<Moving> = self.moving.extract_if(.., |moving| [moving.from, moving.to].contains(&id)).collect();
        for Moving { from, to, relay } in ended {
            drop(relay);
            self.wake(if from == id { to } else { from });
        }
    }
}
