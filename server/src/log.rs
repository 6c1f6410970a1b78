//! The log, written by a thread of its own.
//!
//! Invariant: whoever logs never waits, the engine's thread least of all: what the reader of standard error does not
//! take in time is dropped, counted, and told of in the log as soon as that is read again.

use std::backtrace::{Backtrace, BacktraceStatus};
use std::io::{self, Write};
use std::panic;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::sync::mpsc::{Receiver, SyncSender, sync_channel};
use std::thread;
use std::time::{Duration, Instant};

use tracing_subscriber::fmt::MakeWriter;

/// What is waited for to be written; clones share it.
#[derive(Clone)]
pub struct Log {
    messages: SyncSender<Message>,
    counts: Arc<Counts>,
}

/// Writes what is left when it is dropped, as far as it is read in time.
pub struct FlushedLog(pub Log);

#[derive(Default)]
struct Counts {
    num_waiting_bytes: AtomicUsize,
    num_dropped: AtomicU64,
}

enum Message {
    Line(Vec<u8>),
    /// Told when all lines before it are written.
    Flush(SyncSender<()>),
}

/// That wait to be written.
const MAX_LINES: usize = 8192;
const MAX_BYTES: usize = 4 << 20;
const FLUSH_TIME: Duration = Duration::from_secs(1);

impl Log {
    /// Starts the thread that writes to `out`.
    pub fn to(out: impl Write + Send + 'static) -> io::Result<Log> {
        let (messages, receiver) = sync_channel(MAX_LINES);
        let counts = Arc::<Counts>::default();
        let of_thread = counts.clone();
        thread::Builder::new().name("log".to_owned()).spawn(move || write_all(&receiver, &of_thread, out))?;
        Ok(Log { messages, counts })
    }

    /// Lines that nobody will read.
    pub fn num_dropped(&self) -> u64 {
        self.counts.num_dropped.load(Ordering::Relaxed)
    }

    /// Waits until all lines are written, `most` at most.
    fn flush_for(&self, most: Duration) {
        let deadline = Instant::now() + most;
        let (written, is_written) = sync_channel(1);
        while self.messages.try_send(Message::Flush(written.clone())).is_err() {
            if Instant::now() > deadline {
                return;
            }
            thread::sleep(Duration::from_millis(1));
        }
        // A reader that takes nothing must not keep the process.
        let _ = is_written.recv_timeout(deadline.saturating_duration_since(Instant::now()));
    }

    fn push(&self, line: &[u8]) {
        let counts = &self.counts;
        let num_bytes = counts.num_waiting_bytes.fetch_add(line.len(), Ordering::Relaxed) + line.len();
        if num_bytes > MAX_BYTES || self.messages.try_send(Message::Line(line.to_vec())).is_err() {
            counts.num_waiting_bytes.fetch_sub(line.len(), Ordering::Relaxed);
            counts.num_dropped.fetch_add(1, Ordering::Relaxed);
        }
    }
}

/// Nobody is there to be told of an error here.
fn write_all(messages: &Receiver<Message>, counts: &Counts, mut out: impl Write) {
    let mut num_told = 0;
    while let Ok(message) = messages.recv() {
        match message {
            Message::Line(line) => {
                let _ = out.write_all(&line);
                counts.num_waiting_bytes.fetch_sub(line.len(), Ordering::Relaxed);
                let num_dropped = counts.num_dropped.load(Ordering::Relaxed);
                if num_dropped > num_told {
                    let _ = writeln!(out, "{} lines of this log were not read in time", num_dropped - num_told);
                    num_told = num_dropped;
                }
            }
            Message::Flush(written) => {
                let _ = out.flush();
                let _ = written.try_send(());
            }
        }
    }
}

/// Has panics, which are bugs, told in the log and nowhere else.
pub fn log_panics() {
    panic::set_hook(Box::new(|panicked| {
        let trace = Backtrace::capture();
        let trace = if trace.status() == BacktraceStatus::Captured { format!("\n{trace}") } else { String::new() };
        tracing::error!(thread = thread::current().name(), "a bug: {panicked}{trace}");
    }));
}

impl Drop for FlushedLog {
    fn drop(&mut self) {
        self.0.flush_for(FLUSH_TIME);
    }
}

impl<'a> MakeWriter<'a> for Log {
    type Writer = Log;

    fn make_writer(&'a self) -> Log {
        self.clone()
    }
}

/// A line comes in one piece.
impl Write for Log {
    fn write(&mut self, line: &[u8]) -> io::Result<usize> {
        self.push(line);
        Ok(line.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use std::io::{BufRead, BufReader, pipe};

    use super::*;

    #[test]
    fn who_logs_does_not_wait_for_who_reads() {
        let (reader, writer) = pipe().expect("a pipe");
        let mut log = Log::to(writer).expect("a thread");
        // More than the pipe and the lines that wait hold together.
        let num_lines = 4 * MAX_LINES;
        for index in 0..num_lines {
            log.write_all(format!("{index:0100}\n").as_bytes()).expect("a log takes all");
        }
        let num_dropped = log.num_dropped();
        assert!(num_dropped > 0 && log.counts.num_waiting_bytes.load(Ordering::Relaxed) <= MAX_BYTES);
        log.flush_for(Duration::from_millis(10));
        // What was kept comes in order, with word of what was not.
        let reader = thread::spawn(move || BufReader::new(reader).lines().map_while(Result::ok).collect::<Vec<_>>());
        drop(FlushedLog(log));
        let lines = reader.join().expect("lines");
        let (told, lines): (Vec<String>, Vec<String>) = lines.into_iter().partition(|line| line.contains("not read"));
        assert_eq!(lines.len() as u64 + num_dropped, num_lines as u64);
        // It is told once or in parts, by how far the writer was meanwhile.
        let told = told.iter().map(|line| line.split(' ').next().and_then(|count| count.parse::<u64>().ok()));
        assert_eq!((lines.is_sorted(), told.sum()), (true, Some(num_dropped)));
    }

    #[test]
    fn what_is_left_is_written_at_the_end() {
        let (reader, writer) = pipe().expect("a pipe");
        let mut log = Log::to(writer).expect("a thread");
        (0..100).for_each(|index| log.write_all(format!("{index}\n").as_bytes()).expect("a log takes all"));
        drop(FlushedLog(log));
        assert_eq!(BufReader::new(reader).lines().count(), 100);
    }
}
