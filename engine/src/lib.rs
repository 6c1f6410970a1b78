//! Fullbore's engine: plans and computes; knows no HTTP, no async runtime, no JSON API.
//!
//! # Architecture
//!
//! Two towers meet in one file.
//!
//! - **Plan**: [`request`], [`sequence`], [`queue`], [`memory`] and [`scheduler`] decide which tokens run next and make
//!   a [`batch::Batch`], plain data. Nothing there knows a device. What a step costs on one is a [`cost::CostModel`],
//!   learned from steps that were measured.
//! - **Compute**: [`model`] turns a batch into [`op`]s in a [`recording`], and a [`backend`] runs it. Nothing there
//!   knows a request.
//! - What comes in waits in a [`backlog`], which is bounded, and a [`forecast`] says how long. What of a request takes
//!   as long as its prompt is made by whoever hands it in: an [`arrival`].
//! - What a text must follow is a [`grammar`], compiled before its request comes in: a stranger's is tried in a
//!   process of its own first.
//! - They meet in [`engine`], which is driven from outside; [`worker`] is the one thread that drives it, and makes a
//!   device that was lost anew. What it sees of a device's time goes to [`limits`], which says what holds it back.
//! - The engines of a model, one for each device, are a [`fleet`]: it lets requests in, and its router says which
//!   engine takes one.
//! - [`verify`] holds a backend against the plain cpu, op by op: from the command line, before a model is loaded, and
//!   in the tests.
//! - Beside both: [`format`](mod@format) reads model files, [`text`] is between strings and token ids, and [`bundle`]
//!   opens a model with all that comes with it. The engine thread never touches text, but for stop strings: a sink may
//!   look for them.
//!
//! A step: `Scheduler::schedule` fills a `Batch`; `PackedBatch` and [`sampling`] write it as integers; `Model::record`
//! appends ops, of which the last chooses tokens; `Backend::submit` starts them; `Backend::wait` brings the choices, 16
//! bytes a row, and the log-probabilities that were asked for; then `Scheduler::complete`, and events go to each
//! request's `Sink`.
//!
//! Two steps are in flight: the next is planned and submitted while the last one runs. A device runs recordings in
//! order, and everything rests on that: a token counts before its id is known and is read on the device by whoever
//! follows; a freed block may be planned for another sequence at once; a full block is findable once it is submitted.
//!
//! What a row under a grammar may choose is known once its last token is. A step with such rows is two recordings: the
//! pass, submitted as early as any other, and the choice, submitted with the masks when the step before it has been
//! read. Masks are computed while the device is at the pass.
//!
//! # What must stay true
//!
//! - A request's tokens do not depend on its neighbours, on chunking, on sharing or on preemption: every matmul has one
//!   accumulation order for each (N, K, format), and attention goes over tiles and cuts aligned to absolute positions,
//!   whether one workgroup takes all cuts of a row or several do.
//! - A request with a grammar never gets a token outside of it: what goes wrong with a mask ends the request.
//! - A pipeline of two steps gives the tokens that the plain loop gives (`pipeline_depth` 1), bit for bit.
//! - Whoever is turned away is told when to come again, by a forecast and not by a constant.
//! - Out of KV blocks is an ordinary branch of the scheduler. What can never fit is refused before it is queued.
//! - All device memory is allocated at start. A step creates no buffer.
//! - Tokens are chosen on the device. A draw depends on (seed, position) alone, and logits never come to the host.
//! - When the device is lost, nothing that was computed on it is pointed at any more: no table, no prefix, no block of
//!   the host.
//! - An engine waits for nothing of another one but for KV blocks, and for these no longer than was set before: what
//!   does not come is computed.
//! - The scheduler has no clock and no chance: the same state, prices included, gives the same batch. Its work in a
//!   step is O(rows), and takes no memory (the bench `step` asserts it).
//! - A step that grows is never predicted to be cheaper. Simulated time is the sum of predictions.
//! - Every nanosecond of a device is charged to one cause ([`limits`]), and the causes sum to its time.
//! - Files are hostile: every count is held against the bytes left before anything is allocated for it.
//!
//! # Where this differs from the design page
//!
//! - A backend has a clock ([`backend::Backend::now`]), so that a simulated device's time is the engine's too.
//! - Copies between device and host are a list of their own in a recording, before its ops: a device copies outside
//!   its compute pass.
//! - CUDA graphs are kept for lists of kernels that come again, of which a size of batches has some: what varies in a
//!   step is in its parameters, and is set in the graph. Where its kernels run is an interface of its own, so that
//!   tests without a GPU run them on the host.
//! - A model that is divided over devices has its stages in threads of a composite backend ([`backend::split`]), which
//!   cuts steps into parts itself: the plan knows neither.

pub mod arrival;
pub mod backend;
pub mod backlog;
pub mod batch;
pub mod bundle;
pub mod config;
pub mod cost;
mod deadline;
pub mod engine;
pub mod fleet;
pub mod forecast;
pub mod format;
pub mod grammar;
pub mod limits;
pub mod memory;
pub mod model;
pub mod op;
pub mod queue;
pub mod recording;
pub mod request;
pub mod sampling;
pub mod scheduler;
pub mod sequence;
pub mod tensor;
pub mod text;
pub mod tuning;
pub mod verify;
pub mod worker;
