//! A step between its plan and its results, and how it is written down for a device.
//!
//! Invariant: what a step asks of a device is in its recordings; a step that waits for masks is two of them, in this
//! order, with none of a later step's choices between them.

use std::time::Instant;

use super::masks::Masks;
use crate::backend::Ticket;
use crate::batch::{Batch, PackedBatch, SequenceId};
use crate::config::EngineConfig;
use crate::limits::StepFacts;
use crate::limits::neighbours::Company;
use crate::model::{Inputs, Model, SamplingInputs};
use crate::recording::Recording;
use crate::request::Request;
use crate::sampling;
use crate::scheduler::StepTrace;

/// A step from plan to results.
pub(super) struct Step {
    pub batch: Batch,
    pub masks: Masks,
    pub trace: StepTrace,
    pub facts: StepFacts,
    pub company: Company,
}

/// A step that was submitted and not completed.
pub(super) struct InFlight {
    pub step: Step,
    /// Where its choices come by themselves: the pass before them.
    pub forward: Option<Submitted>,
    /// What ends in its choices; `None` while they wait for masks.
    pub choices: Option<Submitted>,
}

pub(super) struct Submitted {
    pub ticket: Ticket,
    pub at: Instant,
}

impl Step {
    pub fn new(config: &EngineConfig) -> Step {
        let batch = Batch::with_capacity(config);
        let trace = StepTrace::with_capacity(config.max_num_seqs);
        Step { batch, masks: Masks::default(), trace, facts: StepFacts::default(), company: Company::default() }
    }
}

/// Writes a batch down as what the device is to do, choices included.
pub(super) fn record<'a>(
    batch: &Batch,
    request: impl Fn(SequenceId) -> Option<&'a Request>,
    model: &Model,
    packed: &mut PackedBatch,
    recording: &mut Recording,
) {
    packed.pack(batch, model.limits.max_blocks_per_seq(), &model.attention);
    recording.clear();
    sampling::pack(batch, request, |_| None, packed);
    let inputs = Inputs::upload(packed, recording);
    model.record_copies(&batch.copies, recording);
    if let Some(choices) = model.record(&inputs, recording) {
        sampling::downloads(batch, choices, &mut recording.downloads);
    }
}

/// The same without the choices.
pub(super) fn record_forward(batch: &Batch, model: &Model, packed: &mut PackedBatch, recording: &mut Recording) {
    packed.pack(batch, model.limits.max_blocks_per_seq(), &model.attention);
    recording.clear();
    let inputs = Inputs::upload(packed, recording);
    model.record_copies(&batch.copies, recording);
    model.record_logits(&inputs, recording);
}

/// The choices of a batch whose forward pass was recorded last.
pub(super) fn record_choices<'a>(
    batch: &Batch,
    masks: &'a Masks,
    request: impl Fn(SequenceId) -> Option<&'a Request>,
    model: &Model,
    packed: &mut PackedBatch,
    recording: &mut Recording,
) {
    packed.clear();
    recording.clear();
    sampling::pack(batch, request, |slice| masks.of_slice(slice), packed);
    let inputs = SamplingInputs::upload(packed, recording);
    let choices = model.record_choices(&inputs, recording);
    sampling::downloads(batch, choices, &mut recording.downloads);
}
