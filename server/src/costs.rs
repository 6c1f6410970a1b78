//! What steps take on a device, kept in the cache folder from one run to the next.
//!
//! Invariant: a file is read only if it is whole and names this device, driver, model and size of the KV cache;
//! anything else is ignored with a warning, and prices are learned anew. A file appears whole or not at all. Nothing
//! here measures.

use std::io;
use std::path::{Path, PathBuf};
use std::time::Duration;

use fullbore_engine::backend::DeviceInfo;
use fullbore_engine::config::EngineConfig;
use fullbore_engine::cost::CostModel;
use fullbore_engine::cost::profile::{DeviceProfile, ProfiledDevice, ProfiledLimits, ProfiledModel};
use fullbore_engine::memory::capacity::{MemoryTable, human_bytes};
use fullbore_engine::worker::EngineHandle;

use crate::files;

/// Steps of a run that are worth keeping, at least: fewer say less than what a file has.
const LEAST_STEPS: u64 = 64;

/// The file for one device and one model.
#[derive(Clone, Debug, PartialEq)]
pub struct SavedCosts {
    path: PathBuf,
    device: ProfiledDevice,
    model: ProfiledModel,
    limits: ProfiledLimits,
}

impl SavedCosts {
    /// In `folder`; `model` is what the model calls itself.
    pub fn new(
        folder: &Path,
        device: &DeviceInfo,
        model: &str,
        config: &EngineConfig,
        memory: &MemoryTable,
    ) -> SavedCosts {
        let device = ProfiledDevice {
            id: device.id.clone(),
            name: device.name.clone(),
            driver: format!("{}, {}", device.driver, device.tier),
        };
        // One name may be quantised in several ways.
        let name = format!("{model}, {} of weights", human_bytes(memory.weights));
        let model = ProfiledModel { name, kv_bytes_per_token: memory.kv_bytes_per_token };
        let limits = ProfiledLimits {
            max_num_seqs: config.max_num_seqs,
            max_num_batched_tokens: config.max_num_batched_tokens,
            max_model_len: config.max_model_len,
            block_size: config.block_size,
            num_blocks: config.num_blocks,
            num_host_blocks: config.num_host_blocks,
        };
        let file = files::name_of(&[&device.name, &device.driver, &model.name, config.kv_type.name()]);
        SavedCosts { path: folder.join(file), device, model, limits }
    }

    pub fn path(&self) -> &Path {
        &self.path
    }

    /// What an earlier run has found; `None` if there was none, or its file is of no use.
    pub fn read(&self) -> Option<CostModel> {
        if !self.path.exists() {
            return None;
        }
        let path = self.path.display();
        match DeviceProfile::open(&self.path) {
            Ok(found) if self.describes(&found) => {
                tracing::info!(%path, "step costs of an earlier run");
                Some(found.cost)
            }
            Ok(found) => {
                let (device, model) = (found.device.name, found.model.name);
                tracing::warn!(%path, device, model, "these step costs are of something else; learning them anew");
                None
            }
            Err(error) => {
                tracing::warn!(%error, "these step costs are not usable; learning them anew");
                None
            }
        }
    }

    /// Keeps what `engine` has found, if that is enough to rely on.
    pub fn keep(&self, engine: &EngineHandle) {
        let cost = engine.cost();
        if !cost.is_known() || engine.stats().num_steps < LEAST_STEPS {
            return;
        }
        let path = self.path.display();
        match self.write(cost, engine.host_per_step()) {
            Ok(()) => tracing::info!(%path, "step costs are kept"),
            Err(error) => tracing::warn!(%path, %error, "cannot keep step costs"),
        }
    }

    fn write(&self, cost: CostModel, host_per_step: Duration) -> io::Result<()> {
        let profile = DeviceProfile {
            device: self.device.clone(),
            model: self.model.clone(),
            limits: self.limits,
            host_ns_per_step: host_per_step.as_nanos() as u64,
            // A server measures it at each start.
            ns_per_copied_megabyte: 0.0,
            cost,
            points: Vec::new(),
        };
        files::write_whole(&self.path, &profile.to_json())
    }

    fn describes(&self, found: &DeviceProfile) -> bool {
        // A device's id may change with what else is plugged in.
        let same_device = (&found.device.name, &found.device.driver) == (&self.device.name, &self.device.driver);
        same_device && found.model == self.model
    }
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;
    use crate::start::memory_table;
    use fullbore_engine::bundle::Bundle;
    use fullbore_engine::cost::Prices;
    use fullbore_engine::tensor::KvType;

    /// A folder of this test's own, removed at its end.
    struct Folder(PathBuf);

    impl Folder {
        fn new(name: &str) -> Folder {
            let folder = std::env::temp_dir().join(format!("fullbore-costs-{name}-{}", std::process::id()));
            Folder(folder)
        }
    }

    impl Drop for Folder {
        fn drop(&mut self) {
            let _ = fs::remove_dir_all(&self.0);
        }
    }

    fn saved(folder: &Folder, device: &str, kv_type: KvType) -> SavedCosts {
        let device = DeviceInfo { name: device.to_owned(), driver: "1.0".to_owned(), ..DeviceInfo::default() };
        let config = EngineConfig { kv_type, ..EngineConfig::default() };
        let memory = memory_table(&Bundle::simulated().config, &config, 100 << 20);
        SavedCosts::new(&folder.0, &device, "a model", &config, &memory)
    }

    fn cost() -> CostModel {
        CostModel::line(5e6, 1e5, Prices { ns_per_attended_token: 3.0, ..Prices::default() })
    }

    #[test]
    fn what_was_written_is_read_again_and_only_there() {
        let folder = Folder::new("again");
        let one = saved(&folder, "one", KvType::F16);
        assert_eq!(one.read(), None);
        one.write(cost(), Duration::from_micros(30)).expect("a folder to write to");
        assert_eq!(one.read(), Some(cost()));
        assert_eq!(saved(&folder, "another", KvType::F16).read(), None);
        assert_eq!(saved(&folder, "one", KvType::Q8_0).read(), None);
        // Nothing is left beside it.
        assert_eq!(fs::read_dir(&folder.0).expect("the folder").count(), 1);
    }

    #[test]
    fn a_corrupt_or_foreign_file_is_ignored_and_replaced() {
        let folder = Folder::new("corrupt");
        let (one, other) = (saved(&folder, "one", KvType::F16), saved(&folder, "another", KvType::F16));
        one.write(cost(), Duration::ZERO).expect("a folder to write to");
        let whole = fs::read(one.path()).expect("it was written");
        fs::copy(one.path(), other.path()).expect("a copy");
        assert_eq!(other.read(), None, "prices of another device");
        for length in [0, 1, whole.len() / 2, whole.len() - 3] {
            fs::write(one.path(), &whole[..length]).expect("a file");
            assert_eq!(one.read(), None, "{length} bytes of it");
        }
        fs::write(one.path(), [0xff; 64]).expect("a file");
        assert_eq!(one.read(), None);
        one.write(cost(), Duration::ZERO).expect("it is replaced");
        assert_eq!(one.read(), Some(cost()));
    }

    #[test]
    fn a_folder_that_cannot_be_written_to_is_an_error() {
        let folder = Folder::new("unwritable");
        fs::write(&folder.0, "a file in its place").expect("a file");
        let result = saved(&folder, "one", KvType::F16).write(cost(), Duration::ZERO);
        fs::remove_file(&folder.0).expect("it is there");
        assert!(result.is_err());
    }
}
