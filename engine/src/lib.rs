//! Fullbore's engine: plans and computes; knows no HTTP, no async runtime, no JSON API.
//!
//! Two towers meet in one file. Request, sequence, memory and scheduler make a [`batch::Batch`], plain data. Op,
//! recording, model and backend consume it. They meet in `engine.rs`; neither imports the other.

pub mod backend;
pub mod batch;
pub mod bundle;
pub mod config;
pub mod engine;
pub mod format;
pub mod memory;
pub mod model;
pub mod op;
pub mod recording;
pub mod request;
pub mod sampler;
pub mod scheduler;
pub mod sequence;
pub mod tensor;
pub mod text;
pub mod worker;
