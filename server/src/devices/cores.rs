//! Which of the machine's cores a device's threads run on: `cpu@0`, `vulkan:0@2-3`.
//!
//! Invariant: a thread has the cores of the one that started it, so that a device which is opened, and an engine that
//! is started, by a pinned thread stay there with all that they start.

use std::io;
use std::ops::RangeInclusive;

use super::DeviceChoiceError;

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Cores(RangeInclusive<usize>);

/// A device's name, and its cores where it has some: `@FIRST` or `@FIRST-LAST` at the end.
pub fn split(name: &str) -> (&str, Option<Cores>) {
    let cores = |(device, cores): (_, &str)| {
        let (first, last) = cores.split_once('-').unwrap_or((cores, cores));
        let (first, last) = (first.parse().ok()?, last.parse().ok()?);
        Some((device, Some(Cores(first..=last))))
    };
    name.rsplit_once('@').and_then(cores).unwrap_or((name, None))
}

/// Keeps this thread, and what it starts meanwhile, on the cores of the device called `title`, where it has some.
pub fn pin(cores: Option<&Cores>, title: &str) -> Result<Option<Pinned>, DeviceChoiceError> {
    let refused = |source| DeviceChoiceError::Cores { device: title.to_owned(), source };
    cores.map(|cores| Pinned::to(cores).map_err(refused)).transpose()
}

impl Cores {
    pub fn overlap(&self, other: &Cores) -> bool {
        self.0.start() <= other.0.end() && other.0.start() <= self.0.end()
    }
}

/// Until it is dropped the thread that made it runs on its cores alone.
#[cfg(target_os = "linux")]
pub struct Pinned(rustix::thread::CpuSet);

#[cfg(target_os = "linux")]
impl Pinned {
    pub fn to(cores: &Cores) -> io::Result<Pinned> {
        use rustix::thread::{CpuSet, sched_getaffinity, sched_setaffinity};
        // The threads that all engines share are started by whoever needs them first.
        rayon::current_num_threads();
        let before = sched_getaffinity(None)?;
        let mut set = CpuSet::new();
        cores.0.clone().take_while(|&core| core < CpuSet::MAX_CPU).for_each(|core| set.set(core));
        sched_setaffinity(None, &set)?;
        Ok(Pinned(before))
    }
}

#[cfg(target_os = "linux")]
impl Drop for Pinned {
    fn drop(&mut self) {
        // They were allowed before.
        let _ = rustix::thread::sched_setaffinity(None, &self.0);
    }
}

#[cfg(not(target_os = "linux"))]
pub struct Pinned;

#[cfg(not(target_os = "linux"))]
impl Pinned {
    pub fn to(_: &Cores) -> io::Result<Pinned> {
        Err(io::Error::other("cores can be chosen on Linux alone"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn cores_are_told_from_names() {
        let cores = |first, last| Some(Cores(first..=last));
        assert_eq!(split("cpu@0"), ("cpu", cores(0, 0)));
        assert_eq!(split("vulkan:0@2-3"), ("vulkan:0", cores(2, 3)));
        for name in ["cpu", "vulkan:0", "vulkan:GPU @ 2.4 GHz", "cpu@", "cpu@x", "cpu@1-"] {
            assert_eq!(split(name), (name, None));
        }
        let [a, b, c] = ["cpu@0-1", "cpu@1-4", "cpu@2"].map(|name| split(name).1.expect("cores"));
        assert!(a.overlap(&b) && b.overlap(&c) && c.overlap(&b) && !a.overlap(&c));
    }

    #[cfg(target_os = "linux")]
    #[test]
    fn what_a_pinned_thread_starts_is_pinned() {
        let num_cores = || std::thread::available_parallelism().map_or(0, usize::from);
        let before = num_cores();
        let first = (0..1024).find_map(|core| Pinned::to(&Cores(core..=core)).ok());
        assert_eq!(std::thread::spawn(num_cores).join().expect("no panic"), 1);
        drop(first);
        assert_eq!(num_cores(), before);
        assert!(Pinned::to(&split("cpu@100000").1.expect("cores")).is_err());
    }
}
