//! What ends a measurement of this process before its time, Ctrl-C or a run that fails: runs that were whole by then
//! are told. At Ctrl-C the program ends at once, whatever the device is at.

use std::sync::{Arc, Mutex, PoisonError, Weak};
use std::{io, process, thread};

use fullbore_bench::result::BenchResult;

use super::BenchCommandError;

/// Is told a result whenever one more of its runs is whole.
pub type Keep<'a> = &'a mut dyn FnMut(&BenchResult);

type SoFar = Mutex<Option<BenchResult>>;

/// Measures; `write` gets what was kept last where it comes to no end: at Ctrl-C, with which the program ends, or when
/// it fails.
pub fn until_interrupted(
    measure: impl FnOnce(Keep) -> Result<BenchResult, BenchCommandError>,
    write: impl Fn(&BenchResult) -> Result<(), BenchCommandError> + Clone + Send + 'static,
) -> Result<BenchResult, BenchCommandError> {
    let so_far = Arc::new(SoFar::default());
    listen(Arc::downgrade(&so_far), write.clone())?;
    let kept = || so_far.lock().unwrap_or_else(PoisonError::into_inner);
    let measured = measure(&mut |result| *kept() = Some(result.clone()));
    if let Err(error) = &measured
        && let Some(mut result) = kept().take()
    {
        result.cut_short(format!("the run that came next failed: {error}"));
        write(&result)?;
    }
    measured
}

/// Where the signal cannot be listened to, it ends the program as it ends any.
fn listen(
    so_far: Weak<SoFar>,
    write: impl Fn(&BenchResult) -> Result<(), BenchCommandError> + Send + 'static,
) -> io::Result<()> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    thread::Builder::new().name("interrupt".to_owned()).spawn(move || {
        if runtime.block_on(tokio::signal::ctrl_c()).is_err() {
            return;
        }
        // What has been measured is being written.
        let Some(so_far) = so_far.upgrade() else { return };
        let kept = so_far.lock().unwrap_or_else(PoisonError::into_inner).take();
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

#[cfg(test)]
mod tests {
    use fullbore_bench::result::{Measurement, Run};

    use super::*;

    /// What is written, and how it ends, where the run after so many fails.
    fn fails_after(num_whole: usize) -> (Vec<BenchResult>, String) {
        let written = Arc::new(Mutex::new(Vec::new()));
        let seen = written.clone();
        let write = move |result: &BenchResult| {
            seen.lock().unwrap_or_else(PoisonError::into_inner).push(result.clone());
            Ok(())
        };
        let measure = |keep: Keep| {
            let mut result = BenchResult::begin("offline", 1, None);
            result.measurements = vec![Measurement::default()];
            for _ in 0..num_whole {
                result.measurements[0].runs.push(Run::default());
                keep(&result);
            }
            Err(BenchCommandError::NoPrices)
        };
        let error = until_interrupted(measure, write).expect_err("it failed").to_string();
        let written = written.lock().unwrap_or_else(PoisonError::into_inner).clone();
        (written, error)
    }

    #[test]
    fn a_run_that_fails_takes_none_of_those_before_along() {
        let (written, error) = fails_after(2);
        let [result] = &written[..] else { panic!("{written:?}") };
        assert_eq!(result.measurements[0].runs.len(), 2);
        assert!(!result.valid && result.invalid.iter().any(|doubt| doubt.contains(&error)), "{:?}", result.invalid);
        assert!(fails_after(0).0.is_empty(), "nothing is told where nothing was whole");
    }
}
