//! Ctrl-C while this process measures: runs that were whole by then are told, and the program ends at once, whatever
//! the device is at.

use std::sync::{Arc, Mutex, PoisonError, Weak};
use std::{io, process, thread};

use fullbore_bench::result::BenchResult;

use super::BenchCommandError;

/// Is told a result whenever one more of its runs is whole.
pub type Keep<'a> = &'a mut dyn FnMut(&BenchResult);

type SoFar = Mutex<Option<BenchResult>>;

/// Measures; at Ctrl-C `write` gets what was kept last, and the program ends.
pub fn until_interrupted(
    measure: impl FnOnce(Keep) -> Result<BenchResult, BenchCommandError>,
    write: impl FnOnce(&BenchResult) -> Result<(), BenchCommandError> + Send + 'static,
) -> Result<BenchResult, BenchCommandError> {
    let so_far = Arc::new(SoFar::default());
    listen(Arc::downgrade(&so_far), write)?;
    let kept = &so_far;
    measure(&mut |result| *kept.lock().unwrap_or_else(PoisonError::into_inner) = Some(result.clone()))
}

/// Where the signal cannot be listened to, it ends the program as it ends any.
fn listen(
    so_far: Weak<SoFar>,
    write: impl FnOnce(&BenchResult) -> Result<(), BenchCommandError> + Send + 'static,
) -> io::Result<()> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    thread::Builder::new().name("interrupt".to_owned()).spawn(move || {
        if runtime.block_on(tokio::signal::ctrl_c()).is_err() {
            return;
        }
        let kept = so_far.upgrade().and_then(|so_far| so_far.lock().unwrap_or_else(PoisonError::into_inner).take());
        if let Some(mut result) = kept {
            result.interrupt();
            if let Err(error) = write(&result) {
                eprintln!("fullbore: {error}");
            }
        } else {
            eprintln!("fullbore: interrupted before a run was whole: there is nothing to tell");
        }
        process::exit(INTERRUPTED);
    })?;
    Ok(())
}

/// As shells have it: 128 and the number of the signal.
pub const INTERRUPTED: i32 = 130;
