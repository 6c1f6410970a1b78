//! The threads of a split, one a stage: each takes the next part from the stage before it, and hands it on.
//!
//! Invariant: every stage takes parts in the same order. A device has a part to do while the one before it is being
//! read back, so that it computes while activations are copied. A stage waits for choices only when it has handed on
//! all that it was at, so that whoever it waits for goes on.

use std::collections::VecDeque;
use std::ops::Range;
use std::sync::mpsc::{Receiver, Sender, TryRecvError, channel};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::Instant;

use crate::backend::{Backend, DeviceError, Ticket};
use crate::recording::{BufferCopy, Recording};
use crate::tensor::Tensor;

/// A stage's device, locked by its thread while that is at it.
pub(super) type Shared = Arc<Mutex<Box<dyn Backend>>>;

/// Parts that a device has been given and that are not read back.
const DEPTH: usize = 2;

/// A part on its way through the stages.
pub(super) struct Job {
    /// Counted from 1.
    pub number: u64,
    /// By stage.
    pub stages: Vec<StageJob>,
    /// The part whose choices it reads; 0 for none.
    pub needs: u64,
    /// Whether it chooses; then its last download is all choices.
    pub chooses: bool,
    /// Whether it ends what was submitted.
    pub is_end: bool,
    /// What the stage before handed on.
    stream: Vec<u8>,
    /// What the last stage read back.
    pub downloads: Vec<u8>,
    /// From when until when devices were at it.
    pub ran: Option<Range<Instant>>,
    pub result: Result<(), DeviceError>,
}

/// What one stage does for a part.
pub(super) struct StageJob {
    pub recording: Recording,
    /// Where what was handed on goes, in this order.
    pub incoming: Vec<Tensor>,
}

impl Job {
    /// Without work, of an empty recording for each stage.
    pub fn new(recordings: impl Iterator<Item = Recording>) -> Job {
        Job {
            number: 0,
            stages: recordings.map(|recording| StageJob { recording, incoming: Vec::new() }).collect(),
            needs: 0,
            chooses: false,
            is_end: false,
            stream: Vec::new(),
            downloads: Vec::new(),
            ran: None,
            result: Ok(()),
        }
    }

    /// Empty, in the memory that it has.
    pub fn clear(&mut self) {
        for stage in &mut self.stages {
            stage.recording.clear();
            stage.incoming.clear();
        }
        self.stream.clear();
        self.downloads.clear();
        (self.needs, self.chooses, self.is_end, self.ran, self.result) = (0, false, false, None, Ok(()));
    }
}

impl StageJob {
    /// Appends to the upload what goes to `incoming`.
    fn take(&mut self, words: &[u32]) {
        let Recording { upload, upload_buffer, copies, .. } = &mut self.recording;
        assert_eq!(words.len() as u64 * 4, self.incoming.iter().map(|tensor| tensor.size_bytes()).sum::<u64>());
        let mut from_bytes = upload.len() as u64 * 4;
        upload.extend_from_slice(words);
        for tensor in &self.incoming {
            let (to, to_bytes, size_bytes) = (tensor.buffer, tensor.offset_bytes(), tensor.size_bytes());
            copies.push(BufferCopy { from: *upload_buffer, from_bytes, to, to_bytes, size_bytes });
            from_bytes += size_bytes;
        }
    }

    fn is_idle(&self) -> bool {
        let Recording { copies, ops, downloads, .. } = &self.recording;
        copies.is_empty() && ops.is_empty() && downloads.is_empty()
    }
}

/// What the last stage tells the first.
struct Feedback {
    state: Mutex<Told>,
    changed: Condvar,
}

#[derive(Default)]
struct Told {
    /// Parts that the last stage is done with.
    num_done: u64,
    /// What each slot chose last.
    choices: Vec<u32>,
    is_closed: bool,
}

impl Feedback {
    fn tell(&self, number: u64, choices: &[u8]) {
        let mut told = lock(&self.state);
        told.num_done = number;
        if !choices.is_empty() {
            told.choices.clear();
            told.choices.extend(bytemuck::pod_collect_to_vec::<u8, u32>(choices));
        }
        self.changed.notify_all();
    }

    /// Whether that part is done, which may be waited for; so is everything once a thread has ended.
    fn has(&self, number: u64, waits: bool) -> bool {
        let mut told = lock(&self.state);
        while waits && told.num_done < number && !told.is_closed {
            told = self.changed.wait(told).unwrap_or_else(PoisonError::into_inner);
        }
        told.num_done >= number || told.is_closed
    }
}

/// A thread that ends leaves nobody waiting for it.
struct Close(Arc<Feedback>);

impl Drop for Close {
    fn drop(&mut self) {
        lock(&self.0.state).is_closed = true;
        self.0.changed.notify_all();
    }
}

/// The threads, and both ends of the way through them.
pub(super) struct Pipeline {
    first: Option<Sender<Job>>,
    done: Receiver<Job>,
    threads: Vec<JoinHandle<()>>,
}

impl Pipeline {
    /// `num_slots` choose.
    pub fn start(stages: &[Shared], num_slots: usize) -> std::io::Result<Pipeline> {
        let (first, mut inbox) = channel();
        let told = Told { choices: vec![0; num_slots], ..Told::default() };
        let feedback = Arc::new(Feedback { state: Mutex::new(told), changed: Condvar::new() });
        let mut threads = Vec::with_capacity(stages.len());
        for (index, backend) in stages.iter().enumerate() {
            let (outbox, next_inbox) = channel();
            let inbox = std::mem::replace(&mut inbox, next_inbox);
            let is_last = index + 1 == stages.len();
            let (backend, feedback) = (backend.clone(), feedback.clone());
            let (running, held) = (VecDeque::new(), None);
            let mut stage = StageThread { index, is_last, backend, inbox, outbox, feedback, running, held };
            let run = move || {
                let _close = Close(stage.feedback.clone());
                stage.run();
            };
            threads.push(std::thread::Builder::new().name(format!("stage {index}")).spawn(run)?);
        }
        Ok(Pipeline { first: Some(first), done: inbox, threads })
    }

    pub fn push(&self, job: Job) {
        let first = self.first.as_ref().expect("open until the drop");
        first.send(job).expect("a stage's thread met a bug");
    }

    /// The oldest part that was not taken back.
    pub fn pop(&self) -> Job {
        self.done.recv().expect("a stage's thread met a bug")
    }
}

impl Drop for Pipeline {
    fn drop(&mut self) {
        self.first = None;
        // Its panic has been told by whoever waited.
        self.threads.drain(..).for_each(|thread| drop(thread.join()));
    }
}

struct StageThread {
    index: usize,
    is_last: bool,
    backend: Shared,
    inbox: Receiver<Job>,
    outbox: Sender<Job>,
    feedback: Arc<Feedback>,
    /// What the device has been given, oldest first; no ticket where it has nothing to do.
    running: VecDeque<(Job, Option<Ticket>)>,
    /// Next, when the choices that it reads are there.
    held: Option<Job>,
}

impl StageThread {
    /// Until nothing more can come, or nobody takes it.
    fn run(&mut self) {
        loop {
            while self.running.len() < DEPTH {
                let Some(job) = self.next() else { break };
                if self.index == 0 && !self.feedback.has(job.needs, self.running.is_empty()) {
                    self.held = Some(job);
                    break;
                }
                let begun = self.begin(job);
                self.running.push_back(begun);
            }
            let Some((job, ticket)) = self.running.pop_front() else { return };
            let job = self.end(job, ticket);
            if self.outbox.send(job).is_err() {
                return;
            }
        }
    }

    /// The next part, which is waited for if the device has nothing to do.
    fn next(&mut self) -> Option<Job> {
        if let Some(held) = self.held.take() {
            return Some(held);
        }
        match self.inbox.try_recv() {
            Err(TryRecvError::Empty) if self.running.is_empty() => self.inbox.recv().ok(),
            received => received.ok(),
        }
    }

    fn begin(&mut self, mut job: Job) -> (Job, Option<Ticket>) {
        if job.result.is_err() {
            return (job, None);
        }
        let stage = &mut job.stages[self.index];
        if !stage.incoming.is_empty() {
            match self.index {
                0 => stage.take(&lock(&self.feedback.state).choices),
                _ => stage.take(&bytemuck::pod_collect_to_vec::<u8, u32>(&job.stream)),
            }
        }
        job.stream.clear();
        if stage.is_idle() {
            return (job, None);
        }
        match lock(&self.backend).submit(&stage.recording) {
            Ok(ticket) => (job, Some(ticket)),
            Err(error) => {
                job.result = Err(error);
                (job, None)
            }
        }
    }

    fn end(&mut self, mut job: Job, ticket: Option<Ticket>) -> Job {
        let out = if self.is_last { &mut job.downloads } else { &mut job.stream };
        match ticket.map(|ticket| lock(&self.backend).wait(ticket, out)) {
            Some(Ok(ran)) => {
                let begun = job.ran.as_ref().map_or(ran.start, |before| before.start);
                job.ran = Some(begun..ran.end);
            }
            Some(Err(error)) => job.result = Err(error),
            None => {}
        }
        if self.is_last {
            let chose = job.chooses && job.result.is_ok();
            let num_bytes = if chose { job.stages[self.index].choices_bytes() } else { 0 };
            let choices = job.downloads.split_off(job.downloads.len() - num_bytes);
            self.feedback.tell(job.number, &choices);
        }
        job
    }
}

impl StageJob {
    fn choices_bytes(&self) -> usize {
        self.recording.downloads.last().map_or(0, |choices| choices.size_bytes() as usize)
    }
}

/// Whole after every write, so a panic elsewhere leaves it usable.
pub(super) fn lock<T: ?Sized>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
