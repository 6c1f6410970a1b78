//! What a composed module asks of a pipeline, and the proof that it is valid.
//!
//! Invariant: a module that `reflect` lets pass has one entry point `main`, and all its storage is in group 0,
//! numbered from 0 without holes.

use naga::valid::{Capabilities, ValidationFlags, Validator};
use naga::{AddressSpace, StorageAccess};

/// How a kernel uses a storage binding.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Access {
    Read,
    ReadWrite,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Reflection {
    /// Storage of group 0, by binding.
    pub storage: Vec<Access>,
    /// Bytes of the parameter block, as immediates or as the uniform of group 1.
    pub params_bytes: u32,
    pub workgroup_size: [u32; 3],
    /// Bytes of workgroup memory.
    pub workgroup_bytes: u32,
}

#[derive(Debug, thiserror::Error)]
pub enum ReflectError {
    #[error("{0}")]
    Parse(String),
    #[error("{0}")]
    Invalid(String),
}

/// Parses and validates `text`. Subgroup operations and immediates pass only if allowed.
pub fn reflect(text: &str, subgroups: bool, immediates: bool) -> Result<Reflection, ReflectError> {
    let module = naga::front::wgsl::parse_str(text).map_err(|error| ReflectError::Parse(error.emit_to_string(text)))?;
    // `pack2x16float` and its inverse, which all of WebGPU has.
    let mut capabilities = Capabilities::SHADER_FLOAT16_IN_FLOAT32;
    capabilities.set(Capabilities::SUBGROUP, subgroups);
    capabilities.set(Capabilities::IMMEDIATES, immediates);
    let mut validator = Validator::new(ValidationFlags::all(), capabilities);
    if subgroups {
        validator.subgroup_stages(naga::valid::ShaderStages::COMPUTE);
        validator.subgroup_operations(naga::valid::SubgroupOperationSet::all());
    }
    validator.validate(&module).map_err(|error| ReflectError::Invalid(error.emit_to_string(text)))?;
    let [entry] = &module.entry_points[..] else {
        return Err(ReflectError::Invalid(format!("{} entry points; one is wanted", module.entry_points.len())));
    };
    let mut layouter = naga::proc::Layouter::default();
    let failed = |error: naga::proc::LayoutError| ReflectError::Invalid(error.to_string());
    layouter.update(module.to_ctx()).map_err(failed)?;
    let mut bindings = Vec::new();
    let (mut params_bytes, mut workgroup_bytes) = (0, 0);
    for (_, variable) in module.global_variables.iter() {
        let size = layouter[variable.ty].size;
        match variable.space {
            AddressSpace::Storage { access } => {
                let writes = access.contains(StorageAccess::STORE);
                let binding = variable.binding.map(|place| (place.group, place.binding));
                bindings.push((binding, if writes { Access::ReadWrite } else { Access::Read }));
            }
            AddressSpace::Immediate | AddressSpace::Uniform => params_bytes += size,
            AddressSpace::WorkGroup => workgroup_bytes += size,
            _ => {}
        }
    }
    bindings.sort_by_key(|(binding, _)| *binding);
    if !bindings.iter().map(|(binding, _)| *binding).eq((0..bindings.len() as u32).map(|binding| Some((0, binding)))) {
        return Err(ReflectError::Invalid("storage must be in group 0, numbered from 0 without holes".to_owned()));
    }
    Ok(Reflection {
        storage: bindings.into_iter().map(|(_, access)| access).collect(),
        params_bytes,
        workgroup_size: entry.workgroup_size,
        workgroup_bytes,
    })
}
