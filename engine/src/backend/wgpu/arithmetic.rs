//! What matmuls compute with: asked for by name, granted where the device has it.
//!
//! Invariant: nothing but f32 is ever chosen unasked. The token for what wgpu calls experimental is taken here alone.

use fullbore_shaders::{Arithmetic, MAX_MATRIX_GROUP_BYTES, MatrixUnits, Tier};
use wgpu::wgt::{CooperativeMatrixProperties, CooperativeScalarType};
use wgpu::{AdapterInfo, ExperimentalFeatures, Features, Limits};

use crate::backend::packing::Layout;
use crate::tensor::WeightFormat;

/// What was asked for. Which matrices its units take, a device says.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum ArithmeticChoice {
    #[default]
    F32,
    F16,
    IntegerDot,
    MatrixUnits,
}

impl ArithmeticChoice {
    pub const ALL: [ArithmeticChoice; 4] =
        [ArithmeticChoice::F32, ArithmeticChoice::F16, ArithmeticChoice::IntegerDot, ArithmeticChoice::MatrixUnits];

    pub const fn name(self) -> &'static str {
        match self {
            ArithmeticChoice::F32 => "f32",
            ArithmeticChoice::F16 => "f16",
            ArithmeticChoice::IntegerDot => "integer-dot",
            ArithmeticChoice::MatrixUnits => "matrix-units",
        }
    }
}

/// What an adapter has of what arithmetic needs.
pub(super) struct Abilities {
    pub features: Features,
    pub matrices: Vec<CooperativeMatrixProperties>,
    pub subgroup_lanes: (u32, u32),
    pub group_bytes: u32,
}

impl Abilities {
    pub fn of(adapter: &wgpu::Adapter, features: Features, limits: &Limits) -> Abilities {
        Abilities {
            features,
            matrices: adapter.cooperative_matrix_properties(),
            subgroup_lanes: subgroup_lanes(&adapter.get_info()),
            group_bytes: limits.max_compute_workgroup_storage_size,
        }
    }

    /// What is asked for, or what is missing, in words.
    pub fn grant(&self, choice: ArithmeticChoice, tier: Tier) -> Result<Arithmetic, String> {
        let arithmetic = match choice {
            ArithmeticChoice::F32 => Arithmetic::F32,
            ArithmeticChoice::F16 => Arithmetic::F16,
            ArithmeticChoice::IntegerDot => Arithmetic::IntegerDot,
            ArithmeticChoice::MatrixUnits => Arithmetic::MatrixUnits(self.matrix_units()?),
        };
        if !tier.has(arithmetic) {
            return Err(format!("kernels that the {} tier does not have", tier.name()));
        }
        let needs_f16 = matches!(arithmetic, Arithmetic::F16 | Arithmetic::MatrixUnits(_));
        if needs_f16 && !self.features.contains(Features::SHADER_F16) {
            return Err("f16 in shaders, which the device does not have".to_owned());
        }
        Ok(arithmetic)
    }

    /// The largest matrices of f16 with sums in f32 that there are kernels for.
    fn matrix_units(&self) -> Result<MatrixUnits, String> {
        if !self.features.contains(Features::EXPERIMENTAL_COOPERATIVE_MATRIX) {
            return Err("matrix units, which the device does not have or its driver does not offer".to_owned());
        }
        // A workgroup is so many subgroups, and wgpu does not let a pipeline choose their width.
        let (least, most) = self.subgroup_lanes;
        if least != most || !(4..=128).contains(&most) || !most.is_power_of_two() {
            return Err(format!("subgroups of one width from 4 to 128 lanes: the device has {least} to {most}"));
        }
        let (needed, available) = (MAX_MATRIX_GROUP_BYTES, self.group_bytes);
        if available < needed {
            return Err(format!("{needed} bytes of workgroup memory: the device has {available}"));
        }
        let is_offered = |size: &u32| {
            let fits = |offer: &CooperativeMatrixProperties| {
                [offer.m_size, offer.n_size, offer.k_size] == [*size; 3]
                    && offer.ab_type == CooperativeScalarType::F16
                    && offer.cr_type == CooperativeScalarType::F32
                    && !offer.saturating_accumulation
            };
            self.matrices.iter().any(fits)
        };
        let size = [16, 8].into_iter().find(is_offered);
        let none = || "matrices of f16, 16 x 16 or 8 x 8, with sums in f32, which the device does not have".to_owned();
        Ok(MatrixUnits { size: size.ok_or_else(none)?, subgroup_lanes: most })
    }
}

/// The fewest and the most. wgpu states 4 to 64 for everything that Metal gives; Apple's own GPUs have 32.
fn subgroup_lanes(info: &AdapterInfo) -> (u32, u32) {
    match info.backend {
        wgpu::Backend::Metal if info.name.starts_with("Apple") => (32, 32),
        _ => (info.subgroup_min_size, info.subgroup_max_size),
    }
}

/// What a device must be opened with.
pub(super) fn features(arithmetic: Arithmetic) -> Features {
    match arithmetic {
        Arithmetic::F32 | Arithmetic::IntegerDot => Features::empty(),
        Arithmetic::F16 => Features::SHADER_F16,
        Arithmetic::MatrixUnits(_) => Features::SHADER_F16 | Features::EXPERIMENTAL_COOPERATIVE_MATRIX,
    }
}

#[allow(unsafe_code)]
pub(super) fn token(arithmetic: Arithmetic) -> ExperimentalFeatures {
    match arithmetic {
        // SAFETY: asks for the knowledge that code behind it may have faults. Whoever chose matrix units was told; our
        // kernels load and store matrices within what they are given alone, and are held against the cpu before use.
        Arithmetic::MatrixUnits(_) => unsafe { ExperimentalFeatures::enabled() },
        _ => ExperimentalFeatures::disabled(),
    }
}

/// Weights that are no codes have no bytes to multiply.
pub(super) fn of_format(arithmetic: Arithmetic, format: WeightFormat) -> Arithmetic {
    match arithmetic {
        Arithmetic::IntegerDot if Layout::of(format).is_float() => Arithmetic::F32,
        arithmetic => arithmetic,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn offer(size: u32, ab_type: CooperativeScalarType, cr_type: CooperativeScalarType) -> CooperativeMatrixProperties {
        let (m_size, n_size, k_size) = (size, size, size);
        CooperativeMatrixProperties { m_size, n_size, k_size, ab_type, cr_type, saturating_accumulation: false }
    }

    #[test]
    fn matrix_units_are_granted_for_an_exact_offer_alone() {
        use CooperativeScalarType::{F16, F32, I32};
        let features = Features::SHADER_F16 | Features::EXPERIMENTAL_COOPERATIVE_MATRIX;
        let grant = |matrices: &[CooperativeMatrixProperties], features, subgroup_lanes, tier| {
            let (matrices, group_bytes) = (matrices.to_vec(), 32 << 10);
            let abilities = Abilities { features, matrices, subgroup_lanes, group_bytes };
            abilities.grant(ArithmeticChoice::MatrixUnits, tier)
        };
        let both = [offer(8, F16, F32), offer(16, F16, F32)];
        let granted = |size, subgroup_lanes| Ok(Arithmetic::MatrixUnits(MatrixUnits { size, subgroup_lanes }));
        assert_eq!(grant(&both, features, (32, 32), Tier::Subgroup), granted(16, 32));
        for lanes in [4, 8, 16, 32, 64, 128] {
            assert_eq!(grant(&both[..1], features, (lanes, lanes), Tier::Subgroup), granted(8, lanes));
        }
        let refused = |matrices: &[CooperativeMatrixProperties], features, lanes, tier, what: &str| {
            let problem = grant(matrices, features, lanes, tier).expect_err("not granted");
            assert!(problem.contains(what), "{problem}");
        };
        let wide = CooperativeMatrixProperties { m_size: 8, ..both[1] };
        let others = [offer(16, F16, F16), offer(16, I32, I32), offer(8, F32, F32), wide];
        refused(&others, features, (32, 32), Tier::Subgroup, "16 x 16 or 8 x 8");
        refused(&both, Features::SHADER_F16, (32, 32), Tier::Subgroup, "matrix units");
        refused(&both, features, (32, 64), Tier::Subgroup, "32 to 64");
        refused(&both, features, (32, 32), Tier::Base, "base tier");
        refused(&both, Features::EXPERIMENTAL_COOPERATIVE_MATRIX, (32, 32), Tier::Subgroup, "f16");
        let little = Abilities { features, matrices: both.to_vec(), subgroup_lanes: (32, 32), group_bytes: 16 << 10 };
        let problem = little.grant(ArithmeticChoice::MatrixUnits, Tier::Subgroup).expect_err("not granted");
        assert!(problem.contains("has 16384"), "{problem}");
    }

    #[test]
    fn apples_gpus_have_one_width_of_subgroups_whatever_wgpu_states_for_metal() {
        let lanes = |backend, name: &str| {
            let (name, subgroup_min_size, subgroup_max_size) = (name.to_owned(), 4, 64);
            let info = AdapterInfo::new(wgpu::DeviceType::IntegratedGpu, backend);
            subgroup_lanes(&AdapterInfo { name, subgroup_min_size, subgroup_max_size, ..info })
        };
        assert_eq!(lanes(wgpu::Backend::Metal, "Apple M2"), (32, 32));
        assert_eq!(lanes(wgpu::Backend::Metal, "AMD Radeon Pro 5500M"), (4, 64));
        assert_eq!(lanes(wgpu::Backend::Vulkan, "Apple M2"), (4, 64), "another driver's choice");
    }

    #[test]
    fn what_the_device_lacks_is_named() {
        let none =
            Abilities { features: Features::empty(), matrices: Vec::new(), subgroup_lanes: (0, 0), group_bytes: 0 };
        assert_eq!(none.grant(ArithmeticChoice::F32, Tier::Base), Ok(Arithmetic::F32));
        assert_eq!(none.grant(ArithmeticChoice::IntegerDot, Tier::Base), Ok(Arithmetic::IntegerDot));
        let halves = none.grant(ArithmeticChoice::F16, Tier::Base).expect_err("no halves");
        assert!(halves.contains("f16"), "{halves}");
        let software = none.grant(ArithmeticChoice::IntegerDot, Tier::Lavapipe).expect_err("no such kernels");
        assert!(software.contains("lavapipe tier"), "{software}");
    }
}
