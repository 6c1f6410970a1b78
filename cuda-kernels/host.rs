//! The host as a device: each module's text is C++ too, compiled by the system's compiler and run block by block
//! (`host/device.h`). For tests on machines without a GPU.
#![allow(unsafe_code)]

use std::collections::HashMap;
use std::ffi::{CString, c_char, c_uint, c_void};
use std::hash::{DefaultHasher, Hash, Hasher};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use libloading::os::unix::{Library, RTLD_GLOBAL, RTLD_LOCAL, RTLD_NOW, Symbol};

use crate::{CudaError, Device, DeviceInfo, Function, Launch, Module, Work};

const HEADERS: [(&str, &str); 2] =
    [("context.h", include_str!("host/context.h")), ("device.h", include_str!("host/device.h"))];
const RUNTIME: &str = include_str!("host/device.cpp");
/// Products and sums are rounded one by one, as on the GPU.
const FLAGS: [&str; 6] = ["-std=c++17", "-O1", "-fPIC", "-shared", "-pthread", "-ffp-contract=off"];

type Find = unsafe extern "C" fn(*const c_char, *mut c_uint, *mut c_uint) -> bool;
type Run = unsafe extern "C" fn(*const c_char, c_uint, *const c_void, bool);

pub struct Host {
    info: DeviceInfo,
    /// Where compiled modules are kept, by the hash of their text.
    folder: PathBuf,
    /// Threads, warps and blocks run last to first: what a barrier is missing for differs.
    reversed: bool,
    find: Symbol<Find>,
    run: Symbol<Run>,
    /// Open as long as the process, as their kernels are registered for it.
    modules: HashMap<String, Library>,
    functions: Vec<Kernel>,
    memory: Vec<Vec<u64>>,
    done: HashMap<usize, (Vec<u8>, Duration)>,
}

struct Kernel {
    name: CString,
    params_bytes: usize,
}

impl Host {
    /// Modules are compiled when they are first asked for, and kept in `folder`.
    pub fn open(folder: &Path, reversed: bool) -> Result<Host, CudaError> {
        let runtime = compile(folder, "runtime", RUNTIME)?;
        // SAFETY: it is what `RUNTIME` says, whose functions have these types; it is never closed.
        let (find, run) = unsafe {
            let library = Library::open(Some(runtime), RTLD_NOW | RTLD_GLOBAL).map_err(not_there)?;
            let find = library.get::<Find>(b"fullbore_find").map_err(not_there)?;
            let run = library.get::<Run>(b"fullbore_launch").map_err(not_there)?;
            std::mem::forget(library);
            (find, run)
        };
        let (name, driver) = ("the host, in the place of a GPU".to_owned(), "host".to_owned());
        Ok(Host {
            info: DeviceInfo { name, driver, architecture: 0, num_multiprocessors: 4, free_bytes: None },
            folder: folder.to_owned(),
            reversed,
            find,
            run,
            modules: HashMap::new(),
            functions: Vec::new(),
            memory: Vec::new(),
            done: HashMap::new(),
        })
    }

    fn launch(&self, launch: &Launch) {
        let kernel = &self.functions[launch.function.0 as usize];
        assert!(kernel.params_bytes <= launch.params.len(), "{:?}", kernel.name);
        // SAFETY: the kernel is registered, and its parameters are as long as it says.
        unsafe { (self.run)(kernel.name.as_ptr(), launch.blocks, launch.params.as_ptr().cast(), self.reversed) };
    }
}

fn not_there(error: libloading::Error) -> CudaError {
    CudaError::NotThere(error.to_string())
}

/// A shared library of `text`, compiled if no earlier run did.
fn compile(folder: &Path, name: &str, text: &str) -> Result<PathBuf, CudaError> {
    let failed = |reason: String| CudaError::Kernel { kernel: name.to_owned(), reason };
    let mut hasher = DefaultHasher::new();
    (HEADERS, FLAGS, text).hash(&mut hasher);
    let stem = format!("{}-{:016x}", name.replace(':', "-"), hasher.finish());
    let library = folder.join(format!("{stem}.so"));
    if library.exists() {
        return Ok(library);
    }
    std::fs::create_dir_all(folder).map_err(|error| failed(error.to_string()))?;
    // Tests of several processes may be at the same one: each writes its own, and the last rename stays.
    let own = format!("{stem}-{}-{:?}", std::process::id(), std::thread::current().id());
    let (source, made) = (folder.join(format!("{own}.cpp")), folder.join(format!("{own}.so")));
    let io = |error: std::io::Error| failed(format!("{}: {error}", folder.display()));
    for (header, text) in HEADERS {
        // Others may be reading it.
        let written = folder.join(format!("{own}-{header}"));
        std::fs::write(&written, text).and_then(|()| std::fs::rename(&written, folder.join(header))).map_err(io)?;
    }
    std::fs::write(&source, text).map_err(io)?;
    let output = Command::new("c++").args(FLAGS).arg("-o").arg(&made).arg(&source).output();
    let output = output.map_err(|error| failed(format!("c++, which compiles it for the host: {error}")))?;
    if !output.status.success() {
        return Err(failed(String::from_utf8_lossy(&output.stderr).into_owned()));
    }
    std::fs::rename(&made, &library).map_err(io)?;
    std::fs::remove_file(&source).map_err(io)?;
    Ok(library)
}

impl Device for Host {
    fn info(&self) -> &DeviceInfo {
        &self.info
    }

    fn alloc(&mut self, size_bytes: u64) -> Result<u64, CudaError> {
        self.memory.push(vec![0; size_bytes.div_ceil(8) as usize]);
        Ok(self.memory.last().expect("pushed above").as_ptr() as u64)
    }

    fn alloc_host(&mut self, size_bytes: u64) -> Result<u64, CudaError> {
        self.alloc(size_bytes)
    }

    fn stage(&mut self, _: usize, _: u64, _: u64) -> Result<(), CudaError> {
        Ok(())
    }

    fn write(&mut self, to: u64, data: &[u8]) -> Result<(), CudaError> {
        // SAFETY: the caller's address is in memory of `alloc`, in which no one is at work.
        unsafe { std::ptr::copy_nonoverlapping(data.as_ptr(), to as *mut u8, data.len()) };
        Ok(())
    }

    fn function(&mut self, module: &Module, kernel: &str) -> Result<Function, CudaError> {
        let name = module.name();
        let failed = |reason: &str| CudaError::Kernel { kernel: kernel.to_owned(), reason: reason.to_owned() };
        if !self.modules.contains_key(&name) {
            let begin = format!("#define FULLBORE_HOST\n#define MODULE \"{name}\"\n#include \"device.h\"\n");
            let library = compile(&self.folder, &name, &(begin + &module.text()))?;
            // SAFETY: it is the module's text, which registers its kernels.
            let library = unsafe { Library::open(Some(library), RTLD_NOW | RTLD_LOCAL) }.map_err(not_there)?;
            self.modules.insert(name.clone(), library);
        }
        let full = CString::new(format!("{name}/{kernel}")).expect("no zero in a name");
        let (mut threads, mut params_bytes) = (0, 0);
        // SAFETY: a name and two places.
        if !unsafe { (self.find)(full.as_ptr(), &raw mut threads, &raw mut params_bytes) } {
            return Err(failed("it is not in its module"));
        }
        assert_eq!(module.kernel(kernel).map(|(threads, _)| threads), Some(threads), "{kernel}");
        self.functions.push(Kernel { name: full, params_bytes: params_bytes as usize });
        Ok(Function(self.functions.len() as u32 - 1))
    }

    fn submit(&mut self, place: usize, work: &Work) -> Result<(), CudaError> {
        let begun = Instant::now();
        self.write(work.upload_to, work.upload)?;
        for copied in work.copies {
            // SAFETY: as in `write`; the two do not overlap.
            unsafe {
                std::ptr::copy_nonoverlapping(
                    copied.from as *const u8,
                    copied.to as *mut u8,
                    copied.size_bytes as usize,
                );
            }
        }
        work.launches.iter().for_each(|launch| self.launch(launch));
        let mut out = Vec::new();
        for &(from, size_bytes) in work.downloads {
            // SAFETY: as in `write`.
            out.extend_from_slice(unsafe { std::slice::from_raw_parts(from as *const u8, size_bytes as usize) });
        }
        self.done.insert(place, (out, begun.elapsed()));
        Ok(())
    }

    fn wait(&mut self, place: usize, out: &mut Vec<u8>) -> Result<Duration, CudaError> {
        let (downloads, took) = self.done.remove(&place).expect("work was submitted at this place");
        out.extend_from_slice(&downloads);
        Ok(took)
    }

    fn reopen(&mut self) -> Result<(), CudaError> {
        self.memory.clear();
        self.functions.clear();
        self.done.clear();
        Ok(())
    }
}
