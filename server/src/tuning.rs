//! Which matmul kernels are fastest on a device, and what they take, kept in the cache folder from `fullbore tune` to
//! the next starts.
//!
//! Invariant: a file is read only if it is whole and of this adapter, this driver and these kernels; any other is
//! ignored with a warning, and the device's own choice stays. Nothing here measures.

use std::collections::HashSet;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use fullbore_engine::backend::{Backend, DeviceInfo};
use fullbore_engine::cost::CostModel;
use fullbore_engine::cost::products::{ProductTimes, cost_of_products};
use fullbore_engine::tensor::WeightFormat;
use fullbore_engine::tuning::{MatMulLine, MatMulShape, TunedMatMul};
use fullbore_engine::verify::Case;
use fullbore_engine::verify::mat_mul::by_kernel;
use fullbore_engine::verify::start::tried;
use serde::{Deserialize, Serialize};

use crate::args::DeviceArgs;
use crate::fetch::{self, FetchError};
use crate::start::StartError;
use crate::{devices, files};

/// Where all devices have their files.
pub fn folder() -> Result<PathBuf, FetchError> {
    Ok(fetch::cache_folder()?.join("tuning"))
}

/// The file of one device.
#[derive(Clone, Debug, PartialEq)]
pub struct SavedTuning {
    path: PathBuf,
    device: TunedDevice,
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct TunedDevice {
    name: String,
    driver: String,
    tier: String,
    arithmetic: String,
    kernels: String,
}

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct File {
    device: TunedDevice,
    mat_muls: Vec<Entry>,
}

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Entry {
    format: String,
    n: u32,
    k: u32,
    table: Vec<MatMulLine>,
    ns_at_rows: Vec<(u32, f64)>,
}

impl SavedTuning {
    /// In `folder`; `None` for a device that has no choice of kernels.
    pub fn new(folder: &Path, device: &DeviceInfo) -> Option<SavedTuning> {
        let DeviceInfo { name, driver, tier, arithmetic, kernels, .. } = device.clone();
        if kernels.is_empty() {
            return None;
        }
        // Other kernels replace the file of those before them.
        let path = folder.join(files::name_of(&[&name, &driver, &tier, &arithmetic]));
        Some(SavedTuning { path, device: TunedDevice { name, driver, tier, arithmetic, kernels } })
    }

    pub fn path(&self) -> &Path {
        &self.path
    }

    /// What was tuned before; nothing if there is no file, or one of no use.
    pub fn read(&self) -> Vec<TunedMatMul> {
        match self.parse() {
            Ok(found) => found,
            Err(problem) => {
                let path = self.path.display();
                tracing::warn!(%path, problem, "this tuning is of no use: `fullbore tune` makes a new one");
                Vec::new()
            }
        }
    }

    fn parse(&self) -> Result<Vec<TunedMatMul>, String> {
        let text = match fs::read_to_string(&self.path) {
            Ok(text) => text,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
            Err(error) => return Err(error.to_string()),
        };
        let file: File = serde_json::from_str(&text).map_err(|error| format!("it is damaged: {error}"))?;
        if file.device != self.device {
            return Err("it is of another device or driver, or of other kernels".to_owned());
        }
        let found = |entry: Entry| {
            let format = WeightFormat::from_name(&entry.format);
            let format = format.ok_or_else(|| format!("it has weights of {}", entry.format))?;
            let rises = entry.ns_at_rows.windows(2).all(|pair| pair[0].0 < pair[1].0);
            if !rises || entry.ns_at_rows.len() < 2 || entry.ns_at_rows.iter().any(|(_, ns)| !ns.is_finite()) {
                return Err(format!("it has times of {:?}", entry.ns_at_rows));
            }
            let shape = MatMulShape { format, rows: entry.n, cols: entry.k };
            Ok(TunedMatMul { shape, table: entry.table, times: entry.ns_at_rows })
        };
        file.mat_muls.into_iter().map(found).collect()
    }

    /// Keeps what was `found`, beside what there is of other shapes.
    pub fn keep(&self, found: &[TunedMatMul]) -> io::Result<()> {
        let is_new = |shape: MatMulShape| found.iter().any(|new| new.shape == shape);
        let mut all = self.read();
        all.retain(|old| !is_new(old.shape));
        all.extend(found.iter().cloned());
        let entry = |TunedMatMul { shape, table, times }: TunedMatMul| {
            let MatMulShape { format, rows, cols } = shape;
            Entry { format: format.name().to_owned(), n: rows, k: cols, table, ns_at_rows: times }
        };
        let file = File { device: self.device.clone(), mat_muls: all.into_iter().map(entry).collect() };
        files::write_whole(&self.path, &(serde_json::json!(file).to_string() + "\n"))
    }
}

/// A device, and the tables of it that are not its own.
pub type Tuned = (Box<dyn Backend>, Vec<TunedMatMul>);

/// `backend` with what is kept for it in `folder`, if that fits the `shapes` of weights that will be loaded; and if
/// `verifies`, only where the kernels in it compute what the plain cpu does.
pub fn tuned(
    mut backend: Box<dyn Backend>,
    wanted: &DeviceArgs,
    folder: &Path,
    shapes: &[MatMulShape],
    verifies: bool,
) -> Result<Tuned, StartError> {
    let Some(saved) = SavedTuning::new(folder, backend.info()) else { return Ok((backend, Vec::new())) };
    let mut found = saved.read();
    found.retain(|one| shapes.contains(&one.shape) && is_accepted(backend.as_mut(), one));
    if found.is_empty() {
        return Ok((backend, found));
    }
    let path = saved.path().display();
    if verifies {
        let info = backend.info().clone();
        match tried(&cases(backend.as_ref(), &found), backend)? {
            Ok(right) => backend = right,
            Err(what) => {
                tracing::warn!(%path, what, "a tuned kernel computes wrongly: going on as if nothing were tuned");
                return Ok((devices::again(&info, wanted)?, Vec::new()));
            }
        }
    }
    let (num_tuned, num_shapes) = (found.len(), shapes.len());
    tracing::info!(%path, "matmul kernels as tuned for {num_tuned} of {num_shapes} shapes of weights");
    Ok((backend, found))
}

/// Hands `backend` a table; one that names what the backend does not have is passed over with a warning.
fn is_accepted(backend: &mut dyn Backend, found: &TunedMatMul) -> bool {
    let shape = found.shape;
    let result = backend.set_mat_mul_table(shape, &found.table);
    if let Err(problem) = &result {
        tracing::warn!(?shape, problem, "a tuned table is of no use: run `fullbore tune` again");
    }
    result.is_ok()
}

/// What steps of a model would take at the least, if each of its products, those of the layers and the output layer's,
/// is among what is `tuned`.
pub fn cost_of(tuned: &[TunedMatMul], (layers, output): &(Vec<MatMulShape>, MatMulShape)) -> Option<CostModel> {
    let times = |shape: &MatMulShape| -> Option<&ProductTimes> {
        tuned.iter().find(|one| one.shape == *shape).map(|one| one.times.as_slice())
    };
    let layers = layers.iter().map(times).collect::<Option<Vec<_>>>()?;
    Some(cost_of_products(&layers, times(output)?))
}

/// Every kernel of what was `found`, once for each format of weights.
fn cases(backend: &dyn Backend, found: &[TunedMatMul]) -> Vec<Case> {
    let mut cases = Vec::new();
    for format in WeightFormat::ALL {
        let of_format = found.iter().filter(|one| one.shape.format == format);
        let named: HashSet<&str> =
            of_format.flat_map(|one| one.table.iter().map(|line| line.kernel.as_str())).collect();
        let kernels = backend.mat_mul_kernels(format);
        let named = kernels.iter().filter(|kernel| named.contains(kernel.name.as_str()));
        cases.extend(named.map(|kernel| by_kernel(format, kernel)));
    }
    cases
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A folder of this test's own, removed at its end.
    struct Folder(PathBuf);

    impl Folder {
        fn new(name: &str) -> Folder {
            Folder(std::env::temp_dir().join(format!("fullbore-tuning-{name}-{}", std::process::id())))
        }
    }

    impl Drop for Folder {
        fn drop(&mut self) {
            let _ = fs::remove_dir_all(&self.0);
        }
    }

    fn saved(folder: &Folder, driver: &str, kernels: &str) -> SavedTuning {
        let [name, driver, tier, kernels] = ["a gpu", driver, "subgroup", kernels].map(str::to_owned);
        let device = DeviceInfo { name, driver, tier, kernels, ..DeviceInfo::default() };
        SavedTuning::new(&folder.0, &device).expect("it has kernels")
    }

    fn table(rows: u32, kernel: &str) -> TunedMatMul {
        let shape = MatMulShape { format: WeightFormat::Q4K, rows, cols: 512 };
        TunedMatMul { shape, table: MatMulLine::only(kernel).to_vec(), times: vec![(1, 5e3), (64, 7.5e4)] }
    }

    #[test]
    fn what_was_kept_is_read_again_by_the_same_device_alone() {
        let folder = Folder::new("again");
        let one = saved(&folder, "1", "a");
        assert!(one.read().is_empty());
        one.keep(&[table(64, "split 4x32"), table(96, "tile 64x128")]).expect("a folder to write to");
        one.keep(&[table(64, "split 8x32")]).expect("a folder to write to");
        assert_eq!(one.read(), [table(96, "tile 64x128"), table(64, "split 8x32")]);
        assert!(saved(&folder, "2", "a").read().is_empty(), "another driver");
        assert!(saved(&folder, "1", "b").read().is_empty(), "other kernels");
        saved(&folder, "1", "b").keep(&[table(32, "split 1x32")]).expect("it is replaced");
        assert_eq!(saved(&folder, "1", "b").read(), [table(32, "split 1x32")]);
        assert_eq!(fs::read_dir(&folder.0).expect("the folder").count(), 1);
    }

    #[test]
    fn a_damaged_file_is_ignored_and_replaced() {
        let folder = Folder::new("damaged");
        let one = saved(&folder, "1", "a");
        one.keep(&[table(64, "split 4x32")]).expect("a folder to write to");
        let whole = fs::read(one.path()).expect("it was written");
        for length in 0..whole.len() - 1 {
            fs::write(one.path(), &whole[..length]).expect("a file");
            assert!(one.read().is_empty(), "{length} bytes of it");
        }
        fs::write(one.path(), [0xff; 64]).expect("a file");
        assert!(one.read().is_empty(), "no text");
        one.keep(&[table(64, "split 4x32")]).expect("it is replaced");
        assert_eq!(fs::read(one.path()).expect("it was written"), whole);
    }

    #[test]
    fn a_device_without_a_choice_has_no_file() {
        assert_eq!(SavedTuning::new(Path::new("x"), &DeviceInfo::default()), None);
    }
}
