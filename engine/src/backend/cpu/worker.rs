//! The thread that runs recordings, one after another, so that `submit` returns before the work is done.
//!
//! Invariant: recordings are copied in and downloads are copied out, in buffers that go round; the engine's thread and
//! this one share nothing else. It knows no op and no memory.

use std::ops::Range;
use std::sync::mpsc::{Receiver, SyncSender, sync_channel};
use std::thread::JoinHandle;
use std::time::Instant;

use crate::backend::MAX_IN_FLIGHT;
use crate::recording::Recording;

pub(super) struct Worker {
    jobs: Option<SyncSender<Job>>,
    done: Receiver<Job>,
    /// To be filled again.
    spare: Vec<Job>,
    thread: Option<JoinHandle<()>>,
}

/// A recording on its way to the thread, and its downloads on their way back.
pub(super) struct Job {
    pub recording: Recording,
    pub downloads: Vec<u8>,
    /// When it was run, once it has.
    ran: Range<Instant>,
}

impl Worker {
    /// `run` fills a job's downloads.
    pub fn spawn(mut run: impl FnMut(&mut Job) + Send + 'static) -> std::io::Result<Worker> {
        let (jobs, todo) = sync_channel::<Job>(MAX_IN_FLIGHT);
        let (finished, done) = sync_channel(MAX_IN_FLIGHT);
        let work = move || {
            for mut job in todo {
                let begun = Instant::now();
                run(&mut job);
                job.ran = begun..Instant::now();
                if finished.send(job).is_err() {
                    return;
                }
            }
        };
        let thread = std::thread::Builder::new().name("cpu device".to_owned()).spawn(work)?;
        Ok(Worker { jobs: Some(jobs), done, spare: Vec::new(), thread: Some(thread) })
    }

    pub fn submit(&mut self, recording: &Recording) {
        let new = || Job {
            recording: Recording::new(recording.upload_buffer),
            downloads: Vec::new(),
            ran: Instant::now()..Instant::now(),
        };
        let mut job = self.spare.pop().unwrap_or_else(new);
        job.recording.copy_from(recording);
        job.downloads.clear();
        let jobs = self.jobs.as_ref().expect("open until the drop");
        jobs.send(job).expect("the device's thread met a bug");
    }

    /// The downloads of the oldest recording that was not waited for, and when it was run.
    pub fn wait(&mut self, out: &mut Vec<u8>) -> Range<Instant> {
        let job = self.done.recv().expect("the device's thread met a bug");
        out.extend_from_slice(&job.downloads);
        let ran = job.ran.clone();
        self.spare.push(job);
        ran
    }
}

impl Drop for Worker {
    fn drop(&mut self) {
        self.jobs = None;
        // Its panic has been told by whoever waited.
        let _ = self.thread.take().map(JoinHandle::join);
    }
}
