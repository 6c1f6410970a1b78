//! Many devices that serve one model, each with an engine of its own.
//!
//! [`router`] decides where a request goes; [`holders`] knows which replica has which KV blocks, as each says itself.
//! Plain data of the plan tower: no thread, no clock, no device. Who drives engines, in real time or on simulated
//! clocks, tells the router of what happens, so that it never decides by a picture that is older than that.

pub mod holders;
pub mod router;

/// One of the devices that serve a model.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct ReplicaId(pub u16);
