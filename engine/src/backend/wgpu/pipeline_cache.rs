//! What the driver's compiler made of the kernels, kept on disk and given back to it at the next start, where the API
//! has a way to (Vulkan).
//!
//! Invariant: only a whole file of this adapter, this driver and these kernels is given to the driver. Any other is
//! passed over, with a warning where it should not be there, and replaced. A file is written whole or not at all. What
//! is in it is the driver's own affair.

use std::fs;
use std::hash::Hasher;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};

use fullbore_shaders::{Arithmetic, FILES, MatMulVariant, MatrixUnits, Tier};
use siphasher::sip128::{Hasher128, SipHasher13};
use wgpu::{Features, PipelineCacheDescriptor};

use super::MAX_PARTIALS;
use crate::backend::packing::Layout;
use crate::tensor::WeightFormat;

/// Of a file of ours; the number is that of its layout.
const MAGIC: &[u8; 16] = b"fullbore pipes 1";
const CHECKSUM_BYTES: usize = 16;
/// No driver's cache of some dozens of kernels comes near it.
const MAX_BYTES: u64 = 1 << 30;

pub(super) struct PipelineCache {
    cache: wgpu::PipelineCache,
    path: PathBuf,
    identity: String,
    /// Pipelines that were made since it was kept last.
    num_new: AtomicUsize,
    /// A hash of what the file holds; 0 where there is none.
    kept: AtomicU64,
}

impl PipelineCache {
    /// `None` where the API has none.
    pub fn open(device: &wgpu::Device, folder: &Path) -> Option<PipelineCache> {
        let info = device.adapter_info();
        let key =
            wgpu::util::pipeline_cache_key(&info).filter(|_| device.features().contains(Features::PIPELINE_CACHE))?;
        let adapter = format!("{}\n{} {}", info.name, info.driver, info.driver_info);
        let path = folder.join(format!("{key}_{:016x}.bin", hash([adapter.as_bytes()]) as u64));
        let identity = format!("{adapter}\n{key}\n{}", kernels());
        let data = match read(&path, &identity) {
            Ok(data) => data,
            Err(problem) => {
                tracing::warn!(path = %path.display(), problem, "this pipeline cache is of no use: compiling anew");
                None
            }
        };
        tracing::debug!(path = %path.display(), bytes = data.as_ref().map(Vec::len), "pipeline cache");
        let kept = AtomicU64::new(data.as_ref().map_or(0, |data| hash([&data[..]]) as u64));
        let cache = create(device, data.as_deref());
        Some(PipelineCache { cache, path, identity, num_new: AtomicUsize::new(0), kept })
    }

    /// For a pipeline that is about to be made.
    pub fn for_one_more(&self) -> &wgpu::PipelineCache {
        self.num_new.fetch_add(1, Ordering::Relaxed);
        &self.cache
    }

    /// Writes what the driver has made, if that is more than what was kept last. A failure costs the next start time,
    /// and nothing else.
    pub fn keep(&self) {
        if self.num_new.swap(0, Ordering::Relaxed) == 0 {
            return;
        }
        let Some(data) = self.cache.get_data() else { return };
        let new = hash([&data[..]]) as u64;
        if self.kept.swap(new, Ordering::Relaxed) == new {
            return;
        }
        if let Err(error) = write(&self.path, &self.identity, &data) {
            tracing::warn!(path = %self.path.display(), %error, "cannot keep compiled pipelines");
        }
    }
}

#[allow(unsafe_code)]
fn create(device: &wgpu::Device, data: Option<&[u8]>) -> wgpu::PipelineCache {
    let descriptor = PipelineCacheDescriptor { label: Some("fullbore"), data, fallback: true };
    // SAFETY: the data must come from `get_data`. `read` gives only what stands in a file of our name, in a folder of
    // the user's own, behind our magic and a checksum over every byte of it, for this very adapter, driver and kernels:
    // a file that was cut short, damaged or copied from elsewhere is not given on. wgpu checks its own header beyond
    // that, and the driver its own.
    unsafe { device.create_pipeline_cache(&descriptor) }
}

/// What was kept, if there is a file; an error says what is wrong with it.
fn read(path: &Path, identity: &str) -> Result<Option<Vec<u8>>, String> {
    match fs::metadata(path) {
        Ok(metadata) if metadata.len() > MAX_BYTES => return Err(format!("it has {} bytes", metadata.len())),
        Ok(_) => {}
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        Err(error) => return Err(error.to_string()),
    }
    let bytes = fs::read(path).map_err(|error| error.to_string())?;
    let damaged = || "it is damaged".to_owned();
    let rest = bytes.strip_prefix(MAGIC).ok_or_else(damaged)?;
    let (checksum, rest) = rest.split_at_checked(CHECKSUM_BYTES).ok_or_else(damaged)?;
    if checksum != hash([rest]).to_le_bytes() {
        return Err(damaged());
    }
    let (length, rest) = rest.split_first_chunk::<4>().ok_or_else(damaged)?;
    let (found, data) = rest.split_at_checked(u32::from_le_bytes(*length) as usize).ok_or_else(damaged)?;
    match found == identity.as_bytes() {
        true => Ok(Some(data.to_vec())),
        false => Err("it is of another driver, or of other kernels".to_owned()),
    }
}

/// Beside its place first, so that there is never a half of it.
fn write(path: &Path, identity: &str, data: &[u8]) -> io::Result<()> {
    let rest = [&(identity.len() as u32).to_le_bytes()[..], identity.as_bytes(), data].concat();
    let bytes = [&MAGIC[..], &hash([&rest[..]]).to_le_bytes(), &rest].concat();
    if let Some(folder) = path.parent() {
        fs::create_dir_all(folder)?;
    }
    let part = path.with_extension(format!("{}.part", std::process::id()));
    let written = fs::write(&part, bytes).and_then(|()| fs::rename(&part, path));
    if written.is_err() {
        // What was written of it is of no use; it may not even be there.
        let _ = fs::remove_file(&part);
    }
    written
}

/// What translates the texts; a test holds it to `Cargo.lock`.
pub const NAGA_VERSION: &str = "30.0.1";

/// A name for all kernels as they are written, filled in, translated and chosen now.
pub(super) fn kernels() -> String {
    let texts = FILES.iter().flat_map(|(name, text)| [name.as_bytes(), text.as_bytes()]);
    let kernels = hash(texts.chain([constants().as_bytes(), NAGA_VERSION.as_bytes()]));
    format!("fullbore {} {kernels:032x}", env!("CARGO_PKG_VERSION"))
}

/// What the texts are filled in with, and the tables that choose among them.
fn constants() -> String {
    let units = MatrixUnits { size: 16, subgroup_lanes: 32 };
    let arithmetics = [Arithmetic::F32, Arithmetic::F16, Arithmetic::IntegerDot, Arithmetic::MatrixUnits(units)];
    let of_variant = |variant: MatMulVariant| format!("{variant:?} {:?}", variant.constants());
    let of_tier = |tier: Tier| {
        let variants = arithmetics.into_iter().flat_map(move |arithmetic| tier.mat_mul_variants(arithmetic));
        let variants: String = variants.map(of_variant).collect();
        let tables = arithmetics.map(|arithmetic| tier.mat_mul_choices(arithmetic));
        format!("{:?} {variants} {tables:?}", tier.constants())
    };
    let tiers: String = Tier::ALL.into_iter().map(of_tier).collect();
    let layouts = WeightFormat::ALL.map(|format| (format.name(), Layout::of(format).constants()));
    format!("{tiers} {layouts:?} {MAX_PARTIALS}")
}

/// The same in every run and on every machine.
fn hash<'a>(parts: impl IntoIterator<Item = &'a [u8]>) -> u128 {
    let mut hasher = SipHasher13::new();
    for part in parts {
        hasher.write_u64(part.len() as u64);
        hasher.write(part);
    }
    hasher.finish128().as_u128()
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A file of this test's own, removed at its end.
    struct File(PathBuf);

    impl File {
        fn new(name: &str) -> File {
            let folder = std::env::temp_dir().join(format!("fullbore-pipelines-{name}-{}", std::process::id()));
            File(folder.join("cache.bin"))
        }
    }

    impl Drop for File {
        fn drop(&mut self) {
            let _ = fs::remove_dir_all(self.0.parent().expect("a folder"));
        }
    }

    #[test]
    fn what_was_written_is_read_again_by_the_same_driver_alone() {
        let file = File::new("again");
        assert_eq!(read(&file.0, "driver 1"), Ok(None));
        write(&file.0, "driver 1", b"compiled").expect("a folder to write to");
        assert_eq!(read(&file.0, "driver 1"), Ok(Some(b"compiled".to_vec())));
        for other in ["driver 2", "driver 11", "driver", ""] {
            assert!(read(&file.0, other).expect_err("of another").contains("another driver"), "{other}");
        }
        let beside = fs::read_dir(file.0.parent().expect("a folder")).expect("the folder").count();
        assert_eq!(beside, 1, "nothing is left beside it");
    }

    #[test]
    fn a_damaged_file_is_never_given_on() {
        let file = File::new("damaged");
        write(&file.0, "driver 1", b"compiled").expect("a folder to write to");
        let whole = fs::read(&file.0).expect("it was written");
        let check = |bytes: &[u8], what: &str| {
            fs::write(&file.0, bytes).expect("a file");
            assert_eq!(read(&file.0, "driver 1"), Err("it is damaged".to_owned()), "{what}");
        };
        for length in 0..whole.len() {
            check(&whole[..length], &format!("{length} bytes of {}", whole.len()));
        }
        for at in 0..whole.len() {
            let mut bytes = whole.clone();
            bytes[at] ^= 0x10;
            check(&bytes, &format!("byte {at}"));
        }
        check(&[&whole[..], b"x"].concat(), "a byte more");
        check(&[0xff; 300], "bytes of something else");
        fs::remove_file(&file.0).expect("it is there");
        fs::create_dir(&file.0).expect("a folder in its place");
        assert!(read(&file.0, "driver 1").is_err(), "a folder");
    }
}
