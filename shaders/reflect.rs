//! What a composed module asks of a pipeline, and the proof that it is valid.
//!
//! Invariant: a module that `reflect` lets pass has one entry point `main`, and all its storage is in group 0,
//! numbered from 0 without holes.

use naga::valid::{Capabilities, ModuleInfo, ValidationFlags, Validator};
use naga::{AddressSpace, Module, ScalarKind, StorageAccess, TypeInner};

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

/// What a module may use beyond what every adapter has.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Extras {
    pub subgroups: bool,
    pub immediates: bool,
    pub f16: bool,
    pub matrix_units: bool,
}

#[derive(Debug, thiserror::Error)]
pub enum ReflectError {
    #[error("{0}")]
    Parse(String),
    #[error("{0}")]
    Invalid(String),
}

/// A four-byte scalar in a struct.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Member {
    pub name: String,
    pub offset: u32,
    /// An f32; else a u32.
    pub is_float: bool,
}

/// Parses and validates `text`, which may use `extras` alone.
pub fn validate(text: &str, extras: Extras) -> Result<(Module, ModuleInfo), ReflectError> {
    let module = parse(text)?;
    // `pack2x16float` and its inverse, which all of WebGPU has.
    let mut capabilities = Capabilities::SHADER_FLOAT16_IN_FLOAT32;
    capabilities.set(Capabilities::SUBGROUP, extras.subgroups);
    capabilities.set(Capabilities::IMMEDIATES, extras.immediates);
    capabilities.set(Capabilities::SHADER_FLOAT16, extras.f16);
    capabilities.set(Capabilities::COOPERATIVE_MATRIX, extras.matrix_units);
    let mut validator = Validator::new(ValidationFlags::all(), capabilities);
    if extras.subgroups {
        validator.subgroup_stages(naga::valid::ShaderStages::COMPUTE);
        validator.subgroup_operations(naga::valid::SubgroupOperationSet::all());
    }
    let info = validator.validate(&module).map_err(|error| ReflectError::Invalid(error.emit_to_string(text)))?;
    Ok((module, info))
}

fn parse(text: &str) -> Result<Module, ReflectError> {
    naga::front::wgsl::parse_str(text).map_err(|error| ReflectError::Parse(error.emit_to_string(text)))
}

/// The members of the struct of this name, in order; `None` where there is none. They must be scalars.
pub fn members(text: &str, name: &str) -> Result<Option<Vec<Member>>, ReflectError> {
    let module = parse(text)?;
    let mut structs = module.types.iter().filter(|(_, ty)| ty.name.as_deref() == Some(name));
    let Some((_, naga::Type { inner: TypeInner::Struct { members, .. }, .. })) = structs.next() else {
        return Ok(None);
    };
    let member = |member: &naga::StructMember| {
        let name = member.name.clone().unwrap_or_default();
        let is_float = match module.types[member.ty].inner {
            TypeInner::Scalar(naga::Scalar { kind: ScalarKind::Float, width: 4 }) => true,
            TypeInner::Scalar(naga::Scalar { kind: ScalarKind::Uint, width: 4 }) => false,
            _ => return Err(ReflectError::Invalid(format!("{name} is neither u32 nor f32"))),
        };
        Ok(Member { name, offset: member.offset, is_float })
    };
    members.iter().map(member).collect::<Result<Vec<_>, _>>().map(Some)
}

/// What a valid `text` asks of a pipeline.
pub fn reflect(text: &str, extras: Extras) -> Result<Reflection, ReflectError> {
    let (module, _) = validate(text, extras)?;
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
