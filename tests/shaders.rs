//! Every shader variant validates, and does what its op says, on every driver there is and on every tier.
//!
//! Needs Vulkan drivers (`make test` fetches two versions of lavapipe); without one these tests fail. Expected values
//! are computed here, in f64 and without tiles.

use fullbore_engine::backend::wgpu::pipelines::Kernel;
use fullbore_engine::backend::wgpu::{NAGA_VERSION, OpenError, WgpuBackend, WgpuOptions, devices};
use fullbore_engine::backend::{Backend, DeviceError, RowSource, WeightSpec};
use fullbore_engine::batch::attention::QueryRows;
use fullbore_engine::format::quant::dequantize_row;
use fullbore_engine::op::*;
use fullbore_engine::recording::Recording;
use fullbore_engine::tensor::{BufferId, KvTensor, KvType, Tensor, Weight, WeightFormat};
use fullbore_engine::verify::attention::Planned;
use fullbore_engine::verify::mat_mul::LONG_K;
use fullbore_engine::verify::start::{MAT_MUL_ROWS, PROMPT_ROWS};
use fullbore_shaders::{
    Arithmetic, Extras, FILES, MAX_GROUP_BYTES, MAX_GROUP_LANES, MAX_MATRIX_GROUP_BYTES, MatMulVariant, MatrixUnits,
    Tier, compose, reflect, validate,
};
use half::f16;
use naga::valid::{FunctionInfo, ModuleInfo};
use naga::{AddressSpace, BinaryOperator, Expression, Handle, Statement, TypeInner};

use crate::device::planned;
use crate::random::Random;

/// Elements of a head, and query heads of a KV head.
pub const HEADS_OF_MODELS: [(u32, u32); 10] =
    [(32, 1), (64, 3), (64, 8), (80, 1), (96, 5), (100, 1), (128, 4), (128, 7), (128, 8), (256, 4)];

#[test]
fn every_variant_validates() {
    for tier in Tier::ALL {
        for kernel in Kernel::all(tier, &HEADS_OF_MODELS) {
            let (name, constants) = kernel.source(tier);
            let text = compose(name, &constants).unwrap_or_else(|error| panic!("{tier:?} {kernel:?}: {error}"));
            let reflection = reflect(&text, kernel.extras(tier)).unwrap_or_else(|error| panic!("{kernel:?}: {error}"));
            let (module, info) = validate(&text, kernel.extras(tier)).expect("it was just reflected");
            assert!(!writes_shared_components(&module, &info), "{tier:?} {kernel:?}: a vector in workgroup memory");
            let is_open = has_one_order(kernel) && leaves_contraction_open(&module, &info);
            assert!(!is_open, "{tier:?} {kernel:?}: a driver may contract a sum of one variant and not of another");
            let max_bytes = if kernel.extras(tier).matrix_units { MAX_MATRIX_GROUP_BYTES } else { MAX_GROUP_BYTES };
            assert!(reflection.workgroup_bytes <= max_bytes, "{tier:?} {kernel:?}: {reflection:?}");
            assert!(
                reflection.workgroup_size.iter().product::<u32>() <= MAX_GROUP_LANES,
                "{tier:?} {kernel:?}: {reflection:?}"
            );
            assert!(reflection.params_bytes <= 64, "{tier:?} {kernel:?}: {reflection:?}");
            assert!((1..=8).contains(&reflection.storage.len()), "{tier:?} {kernel:?}: {reflection:?}");
        }
    }
}

/// Lanes that leave a loop at different times need not be together at the sum that follows.
#[test]
fn all_lanes_leave_a_loop_before_a_sum_over_them_together() {
    for (kernel, sum) in [("rms_norm", "sum_lanes("), ("add_norm", "norm_scale("), ("rope_kv", "sum_lanes(")] {
        let (_, text) = FILES.into_iter().find(|(file, _)| *file == format!("{kernel}.wgsl")).expect("its file");
        let main = text.split_once("fn main(").expect("an entry point").1;
        let before = main.rsplit_once(sum).expect("a sum over lanes").0;
        let loops: Vec<&str> = before.lines().filter(|line| line.trim_start().starts_with("for ")).collect();
        assert!(!loops.is_empty() && loops.iter().all(|line| line.contains("= 0u;")), "{kernel}: {loops:?}");
    }
}

#[test]
fn the_version_of_naga_that_is_in_the_name_of_kernels_is_the_one_that_is_used() {
    let lock = include_str!("../Cargo.lock");
    let version = format!("name = \"naga\"\nversion = \"{NAGA_VERSION}\"\n");
    assert_eq!(lock.matches(&version).count(), 1, "NAGA_VERSION of the engine's wgpu backend");
    assert_eq!(lock.matches("name = \"naga\"\n").count(), 1);
}

/// Whether a component of a vector in workgroup memory is written. WGSL lets such a write touch the whole vector, so
/// that invocations that write its components side by side race, on Metal and DX12 indeed.
fn writes_shared_components(module: &naga::Module, info: &ModuleInfo) -> bool {
    fn writes(block: &naga::Block, info: &FunctionInfo, types: &naga::UniqueArena<naga::Type>) -> bool {
        let inner = |block| writes(block, info, types);
        block.iter().any(|statement| match statement {
            Statement::Store { pointer, .. } => matches!(
                info[*pointer].ty.inner_with(types),
                TypeInner::ValuePointer { size: None, space: AddressSpace::WorkGroup, .. }
            ),
            Statement::Block(block) => inner(block),
            Statement::If { accept, reject, .. } => inner(accept) || inner(reject),
            Statement::Switch { cases, .. } => cases.iter().any(|case| inner(&case.body)),
            Statement::Loop { body, continuing, .. } => inner(body) || inner(continuing),
            _ => false,
        })
    }
    let mut functions = module.functions.iter().map(|(handle, function)| (&function.body, &info[handle]));
    let points = module.entry_points.iter().enumerate();
    let mut points = points.map(|(index, point)| (&point.function.body, info.get_entry_point(index)));
    functions.any(|(body, info)| writes(body, info, &module.types))
        || points.any(|(body, info)| writes(body, info, &module.types))
}

#[test]
fn a_written_component_of_workgroup_memory_is_seen() {
    let seen = |statement: &str| {
        let text = format!(
            "var<workgroup> fours: array<vec4<f32>, 8>; var<workgroup> ones: array<f32, 8>;
            fn put(i: u32) {{ if i > 1u {{ {statement} }} }}
            @compute @workgroup_size(8) fn main(@builtin(local_invocation_index) i: u32) {{ put(i); }}"
        );
        let (module, info) = validate(&text, Extras::default()).unwrap_or_else(|error| panic!("{error}"));
        writes_shared_components(&module, &info)
    };
    assert!(seen("fours[i / 4u][i % 4u] = 1.0;") && seen("fours[i].x = 1.0;"));
    assert!(!seen("fours[i] = vec4(1.0);") && !seen("ones[i] = fours[i].x;"));
    assert!(!seen("var own = vec4(0.0); own.x = 1.0; fours[i] = own;"));
}

/// Or a kernel that is wrong on a device is found by a client.
#[test]
fn a_start_tries_every_matmul_kernel_of_a_tiers_own_table() {
    let units = MatrixUnits { size: 16, subgroup_lanes: 32 };
    for tier in Tier::ALL {
        for arithmetic in [Arithmetic::F32, Arithmetic::F16, Arithmetic::IntegerDot, Arithmetic::MatrixUnits(units)] {
            let choices = tier.mat_mul_choices(arithmetic);
            let mut tried = Vec::new();
            for mut left in MAT_MUL_ROWS.into_iter().chain([PROMPT_ROWS]) {
                while left > 0 {
                    let choice = choices.iter().find(|choice| choice.max_rows >= left).expect("the last has no bound");
                    tried.push(choice.variant);
                    left -= choice.takes(left);
                }
            }
            let missed = choices.iter().find(|choice| !tried.contains(&choice.variant));
            assert_eq!(missed, None, "{tier:?} {arithmetic:?}");
        }
    }
}

#[test]
fn composing_fails_with_a_place() {
    let problem = |constants| compose("mat_mul", &constants).expect_err("ROWS is missing").to_string();
    assert!(problem(Tier::Base.constants()).starts_with("weight.wgsl:"), "{}", problem(Tier::Base.constants()));
    assert_eq!(compose("nothing", &vec![]).unwrap_err().message, "there is no file nothing.wgsl");
    assert!(reflect("fn main() { let x: u32 = 1.5; }", Extras::default()).is_err());
    for (file, text) in FILES {
        assert!(text.starts_with("// "), "{file} opens with what it is");
    }
}

#[test]
fn devices_are_chosen_by_name_and_refused_by_name() {
    let found = devices();
    assert!(!found.is_empty(), "no Vulkan driver: run `make test`, which fetches lavapipe");
    let open = |selector: &str, tier| {
        let options = WgpuOptions { selector: selector.to_owned(), tier, ..WgpuOptions::default() };
        WgpuBackend::open(&options)
    };
    for device in &found {
        assert!(device.driver.contains("subgroups") && device.max_buffer_bytes > 0, "{device:?}");
        let backend = open(&device.id, None).expect("a listed device opens");
        assert_eq!((&backend.info().id, &backend.info().tier), (&device.id, &device.tier));
    }
    let error = open("vulkan:no such gpu", None).err().expect("no such device").to_string();
    assert!(error.contains("no such gpu") && error.contains(&found[0].id), "{error}");
    if found.iter().all(|device| device.tier == "lavapipe") {
        assert!(matches!(open("", None), Err(OpenError::NotFound { .. })), "software Vulkan is never chosen unnamed");
    }
    let mut backend = open(&found[0].id, None).expect("a listed device opens");
    match backend.alloc("K cache", 1 << 50) {
        Err(DeviceError::BufferTooLarge { what, needed_bytes, max_bytes, .. }) => {
            assert_eq!((what.as_str(), needed_bytes), ("K cache", 1 << 50));
            assert_eq!(max_bytes, found[0].max_buffer_bytes);
        }
        other => panic!("a petabyte was {other:?}"),
    }
}

/// Whether a float is added to a product, to a variable that was given one, or to what a function returns or is handed:
/// a driver may make that one step, with other bits, in one variant of a kernel and not in another. A product that is
/// one of two choices (`select`) is not seen: no compiler is known to add before it chooses.
fn leaves_contraction_open(module: &naga::Module, info: &ModuleInfo) -> bool {
    let functions = module.functions.iter().map(|(handle, function)| (function, &info[handle]));
    let points = module.entry_points.iter().enumerate();
    let points = points.map(|(index, point)| (&point.function, info.get_entry_point(index)));
    functions.chain(points).any(|(function, info)| {
        let is_float = |handle: &Handle<Expression>| {
            let inner = info[*handle].ty.inner_with(&module.types);
            inner.scalar_kind() == Some(naga::ScalarKind::Float)
        };
        let mut given = Vec::new();
        statements(&function.body, &mut |statement| {
            if let Statement::Store { pointer, value } = statement
                && is_product(module, function, *value)
            {
                given.push(*pointer);
            }
        });
        let holds_product = |handle: &Handle<Expression>| match function.expressions[*handle] {
            Expression::Load { pointer } => {
                given.iter().any(|other| function.expressions[*other] == function.expressions[pointer])
            }
            _ => is_product(module, function, *handle),
        };
        function.expressions.iter().any(|(handle, expression)| match expression {
            Expression::Binary { op: BinaryOperator::Add | BinaryOperator::Subtract, left, right } => {
                is_float(&handle) && (holds_product(left) || holds_product(right))
            }
            _ => false,
        })
    })
}

/// Whether a value is a product, some of its components are, or a function's that returns or was handed one.
fn is_product(module: &naga::Module, function: &naga::Function, value: Handle<Expression>) -> bool {
    let is_product_here = |value: &Handle<Expression>| is_product(module, function, *value);
    match &function.expressions[value] {
        Expression::Binary { op: BinaryOperator::Multiply, .. } => true,
        Expression::Splat { value, .. } | Expression::Swizzle { vector: value, .. } => is_product_here(value),
        Expression::AccessIndex { base, .. } | Expression::Access { base, .. } => is_product_here(base),
        Expression::Compose { components, .. } => components.iter().any(is_product_here),
        Expression::Unary { expr, .. } => is_product_here(expr),
        Expression::CallResult(callee) => {
            let (callee, mut returns) = (&module.functions[*callee], false);
            statements(&callee.body, &mut |statement| {
                if let Statement::Return { value: Some(value) } = statement {
                    returns |= is_product(module, callee, *value);
                }
            });
            returns
        }
        Expression::FunctionArgument(index) => {
            let points = module.entry_points.iter().map(|point| &point.function);
            module.functions.iter().map(|(_, caller)| caller).chain(points).any(|caller| {
                let mut is_handed = false;
                statements(&caller.body, &mut |statement| {
                    if let Statement::Call { function: callee, arguments, .. } = statement
                        && std::ptr::eq(&module.functions[*callee], function)
                    {
                        is_handed |= is_product(module, caller, arguments[*index as usize]);
                    }
                });
                is_handed
            })
        }
        _ => false,
    }
}

/// Each statement, those within others too.
fn statements(block: &naga::Block, seen: &mut impl FnMut(&Statement)) {
    for statement in block.iter() {
        seen(statement);
        match statement {
            Statement::Block(block) => statements(block, seen),
            Statement::If { accept, reject, .. } => {
                [accept, reject].into_iter().for_each(|block| statements(block, seen))
            }
            Statement::Switch { cases, .. } => cases.iter().for_each(|case| statements(&case.body, seen)),
            Statement::Loop { body, continuing, .. } => {
                [body, continuing].into_iter().for_each(|block| statements(block, seen))
            }
            _ => {}
        }
    }
}

/// Those of which several variants must give the same bits.
fn has_one_order(kernel: Kernel) -> bool {
    match kernel {
        Kernel::MatMul(_, variant) => !matches!(variant, MatMulVariant::Integer { .. } | MatMulVariant::Matrix { .. }),
        Kernel::MatMulSum | Kernel::Attention(_) => true,
        _ => false,
    }
}

#[test]
fn a_sum_that_may_be_contracted_is_seen() {
    let seen = |statement: &str| {
        let text = format!(
            "var<workgroup> out: array<f32, 8>;
            fn times(a: f32, b: f32) -> f32 {{ return a * b; }}
            fn plus(a: f32, b: f32) -> f32 {{ return a + b; }}
            fn put(a: f32, b: f32) -> f32 {{ var x = a; var y = vec2(b); {statement} return x + y.x; }}
            @compute @workgroup_size(8) fn main(@builtin(local_invocation_index) i: u32) {{
                out[i] = put(f32(i), 2.0);
            }}"
        );
        let (module, info) = validate(&text, Extras::default()).unwrap_or_else(|error| panic!("{error}"));
        leaves_contraction_open(&module, &info)
    };
    assert!(seen("x = a * b + x;") && seen("x -= a * b;") && seen("if a > b { x *= b; } x += a;"));
    assert!(seen("y *= b; y += vec2(a);") && seen("y += (y.xyx * a).yx;") && seen("y += -vec2(a * b, b);"));
    assert!(seen("x += times(a, b);") && seen("x = plus(a * b, x);"));
    assert!(!seen("x = plus(times(a, 2.0) / b, x);") && !seen("x = plus(fma(a, b, x), b);"));
    assert!(!seen("x = fma(a, b, x); let i = 2 * i32(a) + 1;") && !seen("y = fma(y, y, y);"));
}

/// A backend under test.
struct Rig {
    name: String,
    backend: WgpuBackend,
    upload: BufferId,
}

fn rig(id: &str, tier: Tier, checked: bool, max_binding_bytes: Option<u64>) -> Rig {
    let options =
        WgpuOptions { selector: id.to_owned(), tier: Some(tier), checked, max_binding_bytes, ..WgpuOptions::default() };
    let mut backend = WgpuBackend::open(&options).expect("a listed device opens");
    let upload = backend.alloc("upload", 1 << 20).expect("memory");
    Rig { name: format!("{id} {} checked {checked}", tier.name()), backend, upload }
}

/// Every tier on the first driver, with and without bounds checks; its own tier on every other one.
fn rigs() -> Vec<Rig> {
    let found = devices();
    assert!(!found.is_empty(), "no Vulkan driver: run `make test`, which fetches lavapipe");
    let all = Tier::ALL.into_iter().map(|tier| rig(&found[0].id, tier, tier == Tier::Base, None));
    let others = found[1..].iter().map(|device| {
        let tier = Tier::ALL.into_iter().find(|tier| tier.name() == device.tier).expect("a tier");
        rig(&device.id, tier, false, None)
    });
    all.chain(others).collect()
}

struct Rows<'a>(&'a [u8]);

impl RowSource for Rows<'_> {
    fn read_rows(&mut self, out: &mut [u8]) -> std::io::Result<()> {
        let (now, later) = self.0.split_at(out.len());
        out.copy_from_slice(now);
        self.0 = later;
        Ok(())
    }
}

impl Rig {
    fn words(&mut self, words: &[u32], cols: u32) -> Tensor {
        let buffer = self.backend.alloc("words", words.len() as u64 * 4).expect("memory");
        self.backend.write(buffer, 0, bytemuck::cast_slice(words)).expect("a device");
        Tensor::u32(buffer, words.len() as u32 / cols, cols)
    }

    fn floats(&mut self, values: &[f32], cols: u32) -> Tensor {
        let words = self.words(bytemuck::cast_slice(values), cols);
        Tensor::f32(words.buffer, words.rows, cols)
    }

    fn zeros(&mut self, rows: u32, cols: u32) -> Tensor {
        self.floats(&vec![0.0; (rows * cols) as usize], cols)
    }

    fn weight(&mut self, format: WeightFormat, rows: u32, cols: u32, bytes: &[u8]) -> Weight {
        let spec = WeightSpec { name: "weight".to_owned(), rows, cols, format };
        self.backend.load_weight(&spec, &mut Rows(bytes)).expect("a loaded weight")
    }

    fn run(&mut self, ops: &[Op], download: Tensor) -> Vec<f32> {
        let mut recording = Recording::new(self.upload);
        ops.iter().for_each(|op| recording.push(*op));
        recording.downloads.push(download);
        let ticket = self.backend.submit(&recording).expect("a device");
        let mut bytes = Vec::new();
        self.backend.wait(ticket, &mut bytes).expect("a device");
        bytemuck::pod_collect_to_vec(&bytes)
    }
}

/// Rows of a weight: random codes, finite scales, some of them subnormal in f16.
fn random_weight(random: &mut Random, format: WeightFormat, rows: u32, cols: u32) -> Vec<u8> {
    let mut bytes = Vec::new();
    for _ in 0..rows * cols / format.block_len() {
        let mut block: Vec<u8> = (0..format.block_bytes()).map(|_| random.next() as u8).collect();
        for at in scale_places(format) {
            let scale = random.unit() * [0.02, 1e-6][usize::from(random.below(8) == 0)];
            block[*at..at + 2].copy_from_slice(&f16::from_f32(scale).to_le_bytes());
        }
        match format {
            WeightFormat::F32 => block.copy_from_slice(&random.unit().to_le_bytes()),
            WeightFormat::BF16 => block.copy_from_slice(&random.unit().to_le_bytes()[2..]),
            _ => {}
        }
        bytes.extend(block);
    }
    bytes
}

/// Where a block's f16 lie.
fn scale_places(format: WeightFormat) -> &'static [usize] {
    match format {
        WeightFormat::F32 | WeightFormat::BF16 => &[],
        WeightFormat::F16
        | WeightFormat::Q4_0
        | WeightFormat::Q5_0
        | WeightFormat::Q8_0
        | WeightFormat::IQ4NL
        | WeightFormat::IQ4XS => &[0],
        WeightFormat::Q4_1 | WeightFormat::Q5_1 | WeightFormat::Q4K | WeightFormat::Q5K => &[0, 2],
        WeightFormat::Q2K => &[80, 82],
        WeightFormat::Q3K => &[108],
        WeightFormat::Q6K => &[208],
    }
}

fn dequantized(format: WeightFormat, cols: u32, bytes: &[u8]) -> Vec<f32> {
    let rows = bytes.chunks_exact(format.row_bytes(cols) as usize);
    let values = rows.map(|row| {
        let mut values = vec![0.0; cols as usize];
        dequantize_row(format, row, &mut values);
        values
    });
    values.flatten().collect()
}

fn bits(values: &[f32]) -> Vec<u32> {
    values.iter().map(|value| value.to_bits()).collect()
}

/// Each value within `relative` of the sum of magnitudes that made it.
fn assert_close(name: &str, got: &[f32], expected: &[(f64, f64)], relative: f64) {
    assert_eq!(got.len(), expected.len(), "{name}");
    for (index, (got, (value, magnitude))) in got.iter().zip(expected).enumerate() {
        let error = (f64::from(*got) - value).abs();
        assert!(error <= relative * magnitude + 1e-30, "{name}: element {index} is {got}, expected {value}");
    }
}

/// `x @ weight^T + bias` with sums of magnitudes.
fn mat_mul(x: &[f32], weight: &[f32], bias: &[f32], inner: usize) -> Vec<(f64, f64)> {
    let mut out = Vec::new();
    for x in x.chunks_exact(inner) {
        for (column, weight) in weight.chunks_exact(inner).enumerate() {
            let bias = f64::from(bias.get(column).copied().unwrap_or(0.0));
            let products = x.iter().zip(weight).map(|(x, w)| f64::from(*x) * f64::from(*w));
            let magnitude = products.clone().map(f64::abs).sum::<f64>() + bias.abs();
            out.push((products.sum::<f64>() + bias, magnitude));
        }
    }
    out
}

#[test]
fn mat_mul_is_right_and_no_row_depends_on_how_many_there_are() {
    const N: u32 = 80;
    // Two spans on the tiers that have any, and a tile of every variant, and what is left beside it.
    const K: u32 = 1280;
    const MAX_M: u32 = 70;
    // How a weight is decoded does not depend on the variant; software Vulkan takes seconds to compile all of a format.
    const OF_EACH_KIND: [WeightFormat; 4] =
        [WeightFormat::F16, WeightFormat::Q4_0, WeightFormat::Q5K, WeightFormat::IQ4XS];
    for mut rig in rigs() {
        // A last span of one unit, and one span of three.
        let others = [(WeightFormat::Q4_0, LONG_K, 3), (WeightFormat::Q4_0, 1056, MAX_M), (WeightFormat::Q4_0, 96, 40)];
        for (format, k, max_m) in OF_EACH_KIND.map(|format| (format, K, MAX_M)).into_iter().chain(others) {
            let mut random = Random::new(7);
            let name = format!("{} {} K {k}", rig.name, format.name());
            let bytes = random_weight(&mut random, format, N, k);
            let x = random.floats((max_m * k) as usize);
            let weight = rig.weight(format, N, k, &bytes);
            let x_tensor = rig.floats(&x, k);
            // The product of the first M rows lies from row 0 + 1 + ... + (M - 1) on; then each row's alone.
            let prefixes = max_m * (max_m + 1) / 2;
            let out = rig.zeros(prefixes + max_m, N);
            let product = |first: u32, rows: u32, at: u32| {
                Op::MatMul(MatMul {
                    x: Tensor { offset: first * k, rows, ..x_tensor },
                    weight,
                    bias: None,
                    first_col: 0,
                    out: Tensor { offset: at * N, rows, ..out },
                })
            };
            let of_prefix = (1..=max_m).map(|rows| product(0, rows, rows * (rows - 1) / 2));
            let of_row = (0..max_m).map(|row| product(row, 1, prefixes + row));
            let got = rig.run(&of_prefix.chain(of_row).collect::<Vec<_>>(), out);
            let all = &got[(max_m * (max_m - 1) / 2 * N) as usize..][..(max_m * N) as usize];
            assert_close(&name, all, &mat_mul(&x, &dequantized(format, k, &bytes), &[], k as usize), 2e-6);
            for rows in 1..=max_m {
                let some = &got[(rows * (rows - 1) / 2 * N) as usize..][..(rows * N) as usize];
                assert!(bits(some) == bits(&all[..some.len()]), "{name}: {rows} rows differ from the same among all");
            }
            assert!(bits(&got[(prefixes * N) as usize..]) == bits(all), "{name}: a row alone differs");
        }
    }
}

#[test]
fn mat_mul_takes_a_bias_short_rows_and_shards() {
    for mut whole in rigs().into_iter().take(Tier::ALL.len()) {
        let tier = Tier::ALL.into_iter().find(|tier| whole.name.contains(tier.name())).expect("a tier");
        let mut split = rig(&devices()[0].id, tier, false, Some(5 << 10));
        for (format, rows, cols) in
            [(WeightFormat::F32, 70, 40), (WeightFormat::F16, 33, 6), (WeightFormat::Q4_1, 200, 96)]
        {
            let mut random = Random::new(11);
            let bytes = random_weight(&mut random, format, rows, cols);
            let (x, bias) = (random.floats((5 * cols) as usize), random.floats(rows as usize));
            let product = |rig: &mut Rig| {
                let weight = rig.weight(format, rows, cols, &bytes);
                let (x, bias) = (rig.floats(&x, cols), rig.floats(&bias, rows));
                // In a wider tensor, whose other columns stay as they are.
                let out = rig.floats(&vec![7.0; 5 * (rows + 8) as usize], rows + 8);
                let wide = rig.run(&[Op::MatMul(MatMul { x, weight, bias: Some(bias), first_col: 3, out })], out);
                let (before, after) = (3, 3 + rows as usize);
                let wide: Vec<&[f32]> = wide.chunks_exact(after + 5).collect();
                assert!(wide.iter().all(|row| row[..before] == [7.0; 3] && row[after..] == [7.0; 5]), "{}", rig.name);
                wide.iter().flat_map(|row| row[before..after].to_vec()).collect::<Vec<f32>>()
            };
            let got = product(&mut whole);
            let expected = mat_mul(&x, &dequantized(format, cols, &bytes), &bias, cols as usize);
            assert_close(&whole.name, &got, &expected, 2e-6);
            assert_eq!(bits(&product(&mut split)), bits(&got), "{} in shards", whole.name);
        }
    }
}

#[test]
fn embed_gives_the_exact_values_of_every_format() {
    const ROWS: u32 = 70;
    for mut rig in rigs() {
        for max_bytes in [None, Some(40 << 10)] {
            if max_bytes.is_some() {
                let device = rig.backend.info().clone();
                let tier = Tier::ALL.into_iter().find(|tier| tier.name() == device.tier).expect("a tier");
                rig = self::rig(&device.id, tier, false, max_bytes);
            }
            for format in WeightFormat::ALL {
                let cols = if format.block_len() == 1 { 40 } else { 512 };
                let mut random = Random::new(3);
                let bytes = random_weight(&mut random, format, ROWS, cols);
                let table = rig.weight(format, ROWS, cols, &bytes);
                let ids = rig.words(&[0, 69, SAMPLED_BY_SLOT | 1, 31, 32, SAMPLED_BY_SLOT, 69, 64], 1);
                let sampled = rig.words(&[5, 68], 1);
                let out = rig.zeros(8, cols);
                let got = rig.run(&[Op::Embed(Embed { ids, sampled, table, scale: 8.0, out })], out);
                let values = dequantized(format, cols, &bytes);
                let rows = [0, 69, 68, 31, 32, 5, 69, 64];
                let row = |row: usize| values[row * cols as usize..][..cols as usize].iter().map(|value| value * 8.0);
                let expected: Vec<f32> = rows.into_iter().flat_map(row).collect();
                // A zero may come out with the other sign.
                assert!(got == expected, "{} {}", rig.name, format.name());
            }
        }
    }
}

#[test]
fn element_wise_ops_do_what_they_say() {
    for mut rig in rigs() {
        let mut random = Random::new(5);
        let (gate, up) = (random.floats(6 * 50), random.floats(6 * 50));
        let gate: Vec<f32> = gate.iter().map(|value| value * 30.0).collect();
        for activation in [Activation::Silu, Activation::GeluTanh] {
            let out = rig.zeros(6, 50);
            let rows = gate.chunks(50).zip(up.chunks(50)).flat_map(|(gate, up)| [gate, up].concat());
            let op = GatedAct { gate_up: rig.floats(&rows.collect::<Vec<f32>>(), 100), activation, out };
            let got = rig.run(&[Op::GatedAct(op)], out);
            let expected: Vec<(f64, f64)> = gate
                .iter()
                .zip(&up)
                .map(|(gate, up)| {
                    let gate = f64::from(*gate);
                    let activated = match activation {
                        Activation::Silu => gate / (1.0 + (-gate).exp()),
                        Activation::GeluTanh => {
                            0.5 * gate * (1.0 + (0.7978845608028654 * (gate + 0.044715 * gate.powi(3))).tanh())
                        }
                    };
                    (activated * f64::from(*up), gate.abs() * f64::from(up.abs()))
                })
                .collect();
            assert_close(&rig.name, &got, &expected, 1e-6);
        }
        let table = rig.words(&[7; 6], 3);
        let entries = rig.words(&[4, 40, 0, 10], 2);
        let got = rig.run(&[Op::UpdateTable(UpdateTable { entries, table })], table);
        assert_eq!(bits(&got), [10, 7, 7, 7, 40, 7], "{}", rig.name);
    }
}

#[test]
fn a_grid_may_be_longer_than_one_dimension() {
    let mut rig = rigs().remove(0);
    let (rows, cols) = (65_535 + 100, 3);
    let ups: Vec<f32> = (0..rows * cols).map(|index| (index % 1000) as f32).collect();
    let out = rig.zeros(rows, cols);
    let gate_up: Vec<f32> = ups.chunks(cols as usize).flat_map(|ups| [&[20.0; 3], ups].concat()).collect();
    let op = GatedAct { gate_up: rig.floats(&gate_up, 2 * cols), activation: Activation::Silu, out };
    let got = rig.run(&[Op::GatedAct(op)], out);
    assert!(got.iter().zip(&ups).all(|(got, up)| (got - 20.0 * up).abs() <= 1e-4 * up));
}

#[test]
fn add_norm_adds_and_norms_the_rows_that_are_asked() {
    // More than the lanes of a workgroup take in one step.
    const COLS: usize = 1300;
    for mut rig in rigs() {
        let mut random = Random::new(19);
        let mut values = |rows: usize| random.floats(rows * COLS);
        let (x, y, post_weight, weight) = (values(5), values(5), values(1), values(1));
        let scale =
            |row: &[f64]| 1.0 / (row.iter().map(|value| value * value).sum::<f64>() / COLS as f64 + 1e-5).sqrt();
        let row = |values: &[f32], row: usize| values[row * COLS..][..COLS].iter().map(|&v| f64::from(v)).collect();
        for (has_post, rows) in [(false, None), (true, None), (false, Some([4, 1])), (true, Some([0, 3]))] {
            let picks: Vec<u32> = rows.map_or((0..5).collect(), |rows| rows.to_vec());
            let (x_tensor, out) = (rig.floats(&x, COLS as u32), rig.zeros(picks.len() as u32, COLS as u32));
            let op = AddNorm {
                x: x_tensor,
                y: rig.floats(&y, COLS as u32),
                post_weight: has_post.then(|| rig.floats(&post_weight, COLS as u32)),
                rows: rows.map(|rows| rig.words(&rows, 1)),
                weight: rig.floats(&weight, COLS as u32),
                eps: 1e-5,
                out,
            };
            let normed = rig.run(&[Op::AddNorm(op)], out);
            let mut sums: Vec<(f64, f64)> = x.iter().map(|value| (f64::from(*value), 0.0)).collect();
            let mut expected = Vec::new();
            for &pick in &picks {
                let (x, y): (Vec<f64>, Vec<f64>) = (row(&x, pick as usize), row(&y, pick as usize));
                let post = |i: usize| if has_post { scale(&y) * f64::from(post_weight[i]) } else { 1.0 };
                let sum: Vec<f64> = (0..COLS).map(|i| x[i] + y[i] * post(i)).collect();
                let norm = |i: usize| sum[i] * scale(&sum) * f64::from(weight[i]);
                expected.extend((0..COLS).map(|i| (norm(i), 2.0)));
                (0..COLS).for_each(|i| sums[pick as usize * COLS + i] = (sum[i], 2.0));
            }
            assert_close(&rig.name, &normed, &expected, 1e-6);
            // What it leaves in x; rows that were not asked for are as they were.
            let again = AddNorm { x: rig.floats(&x, COLS as u32), ..op };
            let left = rig.run(&[Op::AddNorm(again)], again.x);
            assert_close(&rig.name, &left, &sums, 1e-6);
        }
    }
}

/// Where a norm follows, workgroups may share K and leave their sums to it.
#[test]
fn a_product_and_the_norm_behind_it_give_the_same_bits_together_as_apart() {
    // More columns than the lanes of a norm's workgroup take in one step, and four spans of K.
    const N: u32 = 1100;
    const K: u32 = 3136;
    for mut rig in rigs() {
        let mut random = Random::new(29);
        let bytes = random_weight(&mut random, WeightFormat::Q4_0, N, K);
        let weight = rig.weight(WeightFormat::Q4_0, N, K, &bytes);
        for (m, has_post) in [(1, false), (3, true), (20, false)] {
            let [x, before, norm, post] = [m * K, m * N, N, N].map(|num| random.floats(num as usize));
            let (x, norm, post) = (rig.floats(&x, K), rig.floats(&norm, N), rig.floats(&post, N));
            let (y, out) = (rig.zeros(m, N), rig.zeros(m, N));
            let product = Op::MatMul(MatMul { x, weight, bias: None, first_col: 0, out: y });
            let mut words = |ops: [&[Op]; 2]| {
                let stream = rig.floats(&before, N);
                let post_weight = has_post.then_some(post);
                let add_norm = AddNorm { x: stream, y, post_weight, rows: None, weight: norm, eps: 1e-5, out };
                let last = [ops[1], &[Op::AddNorm(add_norm)]].concat();
                if !ops[0].is_empty() {
                    rig.run(ops[0], y);
                }
                [bits(&rig.run(&last, out)), bits(&rig.run(&[], stream))].concat()
            };
            let together = words([&[], &[product]]);
            assert!(together == words([&[product], &[]]), "{}: M {m}, a norm of y first {has_post}", rig.name);
        }
    }
}

#[test]
fn rms_norm_and_rope_kv_do_what_they_say() {
    for mut rig in rigs() {
        let mut random = Random::new(9);
        let (x, weight) = (random.floats(3 * 1300), random.floats(1300));
        let out = rig.zeros(3, 1300);
        let op = RmsNorm { x: rig.floats(&x, 1300), weight: rig.floats(&weight, 1300), eps: 1e-5, out };
        let got = rig.run(&[Op::RmsNorm(op)], out);
        let mut expected = Vec::new();
        for x in x.chunks_exact(1300) {
            let mean = x.iter().map(|value| f64::from(*value).powi(2)).sum::<f64>() / 1300.0;
            let values = x.iter().zip(&weight).map(|(x, w)| f64::from(*x) * f64::from(*w) / (mean + 1e-5).sqrt());
            expected.extend(values.map(|value| (value, value.abs())));
        }
        assert_close(&rig.name, &got, &expected, 1e-6);

        let positions = [4, 0, 9];
        let angle = |position: u32, pair: u32| f64::from(position) * 0.3_f64.powi(pair as i32);
        let row = |position| {
            let cosines = (0..4).map(move |pair| angle(position, pair).cos() as f32);
            cosines.chain((0..4).map(move |pair| angle(position, pair).sin() as f32))
        };
        let table: Vec<f32> = (0..10).flat_map(row).collect();
        // Three heads of q and two each of k and v, 10 elements of which 8 rotate.
        let (qkv, norms) = (random.floats(3 * 70), random.floats(2 * 10));
        for (style, has_norms) in
            [(RopeStyle::Interleaved, false), (RopeStyle::Halves, false), (RopeStyle::Halves, true)]
        {
            let cache = Cache::new(&mut rig, KvType::F16, 10).tensor;
            let q = rig.zeros(3, 30);
            let op = RopeKv {
                qkv: rig.floats(&qkv, 70),
                norms: has_norms.then(|| rig.floats(&norms, 10)),
                eps: 1e-5,
                positions: rig.words(&positions, 1),
                table: rig.floats(&table, 8),
                style,
                slots: rig.words(&[33, 5, 100], 1),
                cache,
                q,
            };
            let got = rig.run(&[Op::RopeKv(op)], q);
            let [got_k, got_v] = [cache.k, cache.v].map(|buffer| {
                let words = rig.run(&[], Tensor::u32(buffer, 1, 7 * BLOCK_SIZE * KV_HEADS * 5));
                let halves = bits(&words).into_iter().flat_map(|word| [word as u16, (word >> 16) as u16]);
                halves.map(|half| f16::from_bits(half).to_f32()).collect::<Vec<f32>>()
            });
            let head = |token: usize, place: usize| {
                let x: Vec<f64> = qkv[token * 70 + place * 10..][..10].iter().map(|&x| f64::from(x)).collect();
                let scale = 1.0 / (x.iter().map(|x| x * x).sum::<f64>() / 10.0 + 1e-5).sqrt();
                let weights = norms[if place < 3 { 0 } else { 10 }..].iter().map(|&w| f64::from(w) * scale);
                let normed = x.iter().zip(weights).map(|(x, w)| if has_norms { x * w } else { *x }).collect();
                rotated(normed, style, |pair| angle(positions[token], pair))
            };
            let expected = (0..3).flat_map(|token| (0..3).flat_map(move |place| head(token, place)));
            assert_close(&rig.name, &got, &expected.map(|x| (x, 1.0)).collect::<Vec<_>>(), 2e-6);
            // Where a token and head lies: 16 tokens a block, two heads.
            let lies =
                [(2, 1), (0, 5), (6, 4)].map(|(block, offset)| [0, 1].map(|h| ((block * 2 + h) * 16 + offset) * 10));
            let (mut k, mut v) = (vec![(0.0, 0.0); got_k.len()], vec![(0.0, 0.0); got_v.len()]);
            for (token, heads) in lies.iter().enumerate() {
                for (kv_head, at) in heads.iter().enumerate() {
                    let of_v = qkv[token * 70 + 50 + kv_head * 10..][..10].iter().map(|&x| f64::from(x));
                    head(token, 3 + kv_head).into_iter().enumerate().for_each(|(i, x)| k[at + i] = (x, 2.0));
                    of_v.enumerate().for_each(|(i, x)| v[at + i] = (x, 1.0));
                }
            }
            assert_close(&format!("{} k", rig.name), &got_k, &k, 5e-4);
            assert_close(&format!("{} v", rig.name), &got_v, &v, 5e-4);
        }
    }
}

/// A head whose first 8 elements turn by the angles of their pairs.
fn rotated(mut x: Vec<f64>, style: RopeStyle, angle: impl Fn(u32) -> f64) -> Vec<f64> {
    for pair in 0..4 {
        let (a, b) = match style {
            RopeStyle::Interleaved => (2 * pair, 2 * pair + 1),
            RopeStyle::Halves => (pair, pair + 4),
        };
        let ((sine, cosine), (left, right)) = (angle(pair as u32).sin_cos(), (x[a], x[b]));
        (x[a], x[b]) = (left * cosine - right * sine, left * sine + right * cosine);
    }
    x
}

#[test]
fn greedy_choice_prefers_the_lowest_index_and_reports_what_is_not_finite() {
    // More than two slices.
    const COLS: u32 = 9000;
    for mut rig in rigs() {
        let mut random = Random::new(13);
        let mut rows: Vec<Vec<f32>> = (0..8).map(|_| random.floats(COLS as usize)).collect();
        rows[0][7777] = 5.0;
        (rows[1][301], rows[1][300], rows[1][5999]) = (3.0, 3.0, 3.0);
        rows[2][5] = f32::NAN;
        rows[3][8999] = f32::INFINITY;
        rows[4][0] = f32::NEG_INFINITY;
        rows[5].iter_mut().for_each(|value| *value = -4.0);
        (rows[5][5900], rows[5][17]) = (0.0, -0.0);
        rows[6].iter_mut().for_each(|value| *value = value.abs() * -1e30 - 1.0);
        let expected_6 = rows[6].iter().enumerate().max_by(|a, b| a.1.total_cmp(b.1)).expect("a row").0 as u32;
        let logits = rig.floats(&rows.concat(), COLS);
        let slots = [3, 1, 0, 2, 6, 5, 4, NONE];
        let asked = slots.map(|slot| SampleRow { slot, ..SampleRow::IDLE });
        let sampled = rig.words(&[99; 8], 1);
        let op = Sample {
            logits,
            rows: rig.words(bytemuck::cast_slice(&asked), SAMPLE_ROW_WORDS),
            extras: rig.words(&[0], 1),
            counts: rig.words(&vec![0; 8 * COLS as usize], COLS),
            slices: rig.words(&vec![0; 8 * slice_cols(COLS) as usize], slice_cols(COLS)),
            sampled,
            chosen: rig.words(&[0; 8 * CHOSEN_WORDS as usize], CHOSEN_WORDS),
            top: rig.words(&[0; 16 * MAX_TOP as usize], 2 * MAX_TOP),
        };
        let got = rig.run(&[Op::Sample(op)], sampled);
        let expected = [NON_FINITE, 300, NON_FINITE, 7777, expected_6, 17, NON_FINITE, 99];
        assert_eq!(bits(&got), expected, "{}", rig.name);
    }
}

/// A cache with a head count and size, and where a sequence's positions lie in it.
struct Cache {
    tensor: KvTensor,
    table: Tensor,
    blocks: Vec<u32>,
}

const BLOCK_SIZE: u32 = 16;
const KV_HEADS: u32 = 2;
const NUM_BLOCKS: u32 = 40;

impl Cache {
    /// Room for some blocks; row 1 of the table is a sequence whose blocks are in no order.
    fn new(rig: &mut Rig, kv_type: KvType, head_dim: u32) -> Cache {
        let blocks: Vec<u32> = (0..NUM_BLOCKS - 2).map(|block| (block * 11 + 4) % NUM_BLOCKS).collect();
        let size_bytes = u64::from(NUM_BLOCKS) * KvTensor::block_bytes(kv_type, BLOCK_SIZE, KV_HEADS, head_dim);
        let k = rig.backend.alloc("k", size_bytes).expect("memory");
        let v = rig.backend.alloc("v", size_bytes).expect("memory");
        let tensor = KvTensor {
            k,
            v,
            kv_type,
            num_blocks: NUM_BLOCKS,
            block_size: BLOCK_SIZE,
            num_kv_heads: KV_HEADS,
            head_dim,
        };
        let table = [vec![1; blocks.len()], blocks.clone()].concat();
        Cache { tensor, table: rig.words(&table, blocks.len() as u32), blocks }
    }

    fn slots(&self, positions: std::ops::Range<u32>) -> Vec<u32> {
        let slot = |position: u32| self.blocks[(position / BLOCK_SIZE) as usize] * BLOCK_SIZE + position % BLOCK_SIZE;
        positions.map(slot).collect()
    }
}

/// Puts k and v into their slots as they are: at position 0, with nothing to turn.
fn store_kv(rig: &mut Rig, k: &[f32], v: &[f32], slots: &[u32], cache: KvTensor) -> Op {
    let num_tokens = slots.len();
    let q = rig.zeros(num_tokens as u32, cache.head_dim);
    Op::RopeKv(RopeKv {
        qkv: rig.floats(
            &fullbore_engine::verify::attention::qkv_rows(k, v, cache),
            (1 + 2 * cache.num_kv_heads) * cache.head_dim,
        ),
        norms: None,
        eps: 1e-5,
        positions: rig.words(&vec![0; num_tokens], 1),
        table: rig.floats(&[1.0, 0.0], 2),
        style: RopeStyle::Halves,
        slots: rig.words(slots, 1),
        cache,
        q,
    })
}

#[test]
fn rope_kv_rounds_to_nearest_even() {
    for mut rig in rigs() {
        let mut random = Random::new(17);
        let edges =
            [0.0, -0.0, 1.0, 65504.0, 65519.9, 65520.0, -1e9, 5.96e-8, 2.98e-8, 2.99e-8, 8.9e-8, 6.1e-5, 6.09e-5];
        // The first two elements turn by nothing, which loses the sign of a zero.
        let mut value = |index: usize| match edges.get(index.wrapping_sub(2)) {
            Some(edge) => *edge,
            None => random.unit() * 10f32.powi(-(random.below(10) as i32)),
        };
        let k: Vec<f32> = (0..3 * 2 * 20).map(&mut value).collect();
        let v: Vec<f32> = (100..100 + 3 * 2 * 20).map(&mut value).collect();
        let cache = Cache::new(&mut rig, KvType::F16, 20);
        let slots = [4 * BLOCK_SIZE + 1, 15, 6 * BLOCK_SIZE];
        let op = store_kv(&mut rig, &k, &v, &slots, cache.tensor);
        for (values, buffer) in [(&k, cache.tensor.k), (&v, cache.tensor.v)] {
            let got = rig.run(&[op], Tensor::u32(buffer, NUM_BLOCKS * BLOCK_SIZE * KV_HEADS, 10));
            let mut expected = vec![0u16; (NUM_BLOCKS * BLOCK_SIZE * KV_HEADS * 20) as usize];
            for (token, slot) in slots.into_iter().enumerate() {
                for (head, i) in (0..2).flat_map(|head| (0..20).map(move |i| (head, i))) {
                    let (block, offset) = ((slot / BLOCK_SIZE) as usize, (slot % BLOCK_SIZE) as usize);
                    let at = ((block * 2 + head) * BLOCK_SIZE as usize + offset) * 20 + i;
                    expected[at] = f16::from_f32(values[token * 40 + head * 20 + i]).to_bits();
                }
            }
            let got: Vec<u16> = bits(&got).into_iter().flat_map(|word| [word as u16, (word >> 16) as u16]).collect();
            assert_eq!(got, expected, "{}", rig.name);
        }
    }
}

/// What a cache makes of a head.
fn rounded(kv_type: KvType, head: &[f32]) -> Vec<f64> {
    let half = |value: f32| f64::from(f16::from_f32(value).to_f32());
    let group = |group: &[f32]| -> Vec<f64> {
        let extreme = group.iter().copied().fold(0.0f32, |a, b| if b.abs() > a.abs() { b } else { a });
        let code = |scale: f64, offset: f64, x: f32| match offset {
            0.0 => (f64::from(x) / scale).round() * scale,
            _ => ((f64::from(x) / scale + 8.5).floor().min(15.0) - 8.0) * scale,
        };
        match kv_type {
            KvType::F16 => group.iter().map(|&x| half(x)).collect(),
            KvType::Q8_0 => group.iter().map(|&x| code(half(extreme.abs() / 127.0), 0.0, x)).collect(),
            KvType::Q4_0 => group.iter().map(|&x| code(half(extreme / -8.0), 8.0, x)).collect(),
        }
    };
    head.chunks(32).flat_map(group).collect()
}

/// One row of one head, over the positions that it sees.
fn attention_row(q: &[f32], k: &[Vec<f64>], v: &[Vec<f64>], scale: f64) -> Vec<(f64, f64)> {
    let dot = |key: &Vec<f64>| q.iter().zip(key).map(|(q, k)| f64::from(*q) * k).sum::<f64>() * scale;
    let scores: Vec<f64> = k.iter().map(dot).collect();
    let highest = scores.iter().copied().fold(f64::MIN, f64::max);
    let weights: Vec<f64> = scores.iter().map(|score| (score - highest).exp()).collect();
    let total: f64 = weights.iter().sum();
    let sum = |i: usize, map: fn(f64) -> f64| {
        weights.iter().zip(v).map(|(weight, value)| weight / total * map(value[i])).sum::<f64>()
    };
    (0..q.len()).map(|i| (sum(i, |value| value), sum(i, f64::abs))).collect()
}

/// A sequence in a cache, and queries for all of its positions.
struct Attended {
    store: Op,
    cache: Cache,
    q: Tensor,
    window: u32,
}

const POSITIONS: u32 = 600;
const HEADS: u32 = 6;

impl Attended {
    /// Rows at positions `rows`, planned in slices of at most `piece`, with room for so many partials.
    fn attend(&self, rig: &mut Rig, rows: std::ops::Range<u32>, piece: u32, num_partials: u32) -> Vec<f32> {
        let cols = HEADS * self.cache.tensor.head_dim;
        let out = rig.zeros(rows.len() as u32, cols);
        let slices: Vec<QueryRows> = rows
            .clone()
            .step_by(piece as usize)
            .map(|p| QueryRows { first_row: p - rows.start, num_rows: piece.min(rows.end - p), slot: 1, position: p })
            .collect();
        let Planned { items, num_single_rows, merges, partials } =
            planned(&slices, self.window, self.cache.tensor, HEADS, num_partials, |words, cols| rig.words(words, cols));
        let op = Attention {
            q: Tensor { offset: rows.start * cols, rows: rows.len() as u32, ..self.q },
            cache: self.cache.tensor,
            items,
            num_single_rows,
            merges,
            partials,
            table: self.cache.table,
            num_heads: HEADS,
            scale: 0.125,
            soft_cap: 0.0,
            window: self.window,
            out,
        };
        rig.run(&[self.store, Op::Attention(op)], out)
    }
}

#[test]
fn attention_is_right_and_no_row_depends_on_its_chunk_or_on_splitting() {
    for mut rig in rigs() {
        for (kv_type, head_dim, window) in [
            (KvType::F16, 64, 0),
            (KvType::F16, 40, 0),
            (KvType::F16, 64, 20),
            (KvType::F16, 256, 300),
            (KvType::Q8_0, 64, 20),
            (KvType::Q4_0, 96, 0),
        ] {
            let mut random = Random::new(u64::from(head_dim));
            let name = format!("{} {} head {head_dim} window {window}", rig.name, kv_type.name());
            let q: Vec<f32> =
                random.floats((POSITIONS * HEADS * head_dim) as usize).iter().map(|value| value * 3.0).collect();
            let cols = KV_HEADS * head_dim;
            let (k, v) = (random.floats((POSITIONS * cols) as usize), random.floats((POSITIONS * cols) as usize));
            let cache = Cache::new(&mut rig, kv_type, head_dim);
            let store = store_kv(&mut rig, &k, &v, &cache.slots(0..POSITIONS), cache.tensor);
            let attended = Attended { store, cache, q: rig.floats(&q, HEADS * head_dim), window };
            let dim = head_dim as usize;
            let heads = |values: &[f32]| -> Vec<Vec<f64>> { values.chunks(dim).map(|v| rounded(kv_type, v)).collect() };
            let (k, v) = (heads(&k), heads(&v));
            for rows in [20..46, 250..262, 594..POSITIONS] {
                let got = attended.attend(&mut rig, rows.clone(), ATTENTION_ROWS, 0);
                let mut expected = Vec::new();
                for (row, head) in
                    rows.clone().flat_map(|row| (0..HEADS as usize).map(move |head| (row as usize, head)))
                {
                    let first = if window == 0 { 0 } else { (row + 1).saturating_sub(window as usize) };
                    let kv_head = head / (HEADS / KV_HEADS) as usize;
                    let of = |heads: &[Vec<f64>]| -> Vec<Vec<f64>> {
                        (first..=row).map(|p| heads[p * KV_HEADS as usize + kv_head].clone()).collect()
                    };
                    let q = &q[(row * HEADS as usize + head) * dim..][..dim];
                    expected.extend(attention_row(q, &of(&k), &of(&v), 0.125));
                }
                assert_close(&name, &got, &expected, 1e-5);
                for (skipped, piece, num_partials) in [(0, 5, 0), (3, 8, 0), (0, 1, 300), (5, 1, 6)] {
                    let part = attended.attend(&mut rig, rows.start + skipped..rows.end, piece, num_partials);
                    let same = &got[(skipped * HEADS * head_dim) as usize..];
                    assert!(bits(&part) == bits(same), "{name}: {rows:?} in items of {piece}, {num_partials} partials");
                }
            }
        }
    }
}

#[test]
fn what_a_row_does_not_see_is_nothing_to_it() {
    for mut rig in rigs() {
        let mut random = Random::new(23);
        let cols = KV_HEADS * 64;
        let q = rig.floats(&random.floats((POSITIONS * HEADS * 64) as usize), HEADS * 64);
        let (mut k, mut v) = (random.floats((POSITIONS * cols) as usize), random.floats((POSITIONS * cols) as usize));
        let mut attend = |k: &[f32], v: &[f32], window: u32, piece: u32| {
            let cache = Cache::new(&mut rig, KvType::F16, 64);
            let store = store_kv(&mut rig, k, v, &cache.slots(0..POSITIONS), cache.tensor);
            Attended { store, cache, q, window }.attend(&mut rig, 40..104, piece, 0)
        };
        let whole = [0, 30].map(|window| attend(&k, &v, window, ATTENTION_ROWS));
        v[51 * cols as usize + 2] = f32::INFINITY;
        // A row that is alone may read its own position in the place of those behind it, and that one is infinite.
        assert!(bits(&attend(&k, &v, 0, 1)) == bits(&attend(&k, &v, 0, ATTENTION_ROWS)), "{}: alone", rig.name);
        k[50 * cols as usize] = f32::NAN;
        let spoilt = [0, 30].map(|window| attend(&k, &v, window, ATTENTION_ROWS));
        for ((whole, spoilt), window) in whole.iter().zip(&spoilt).zip([0, 30]) {
            let rows = whole.chunks_exact((HEADS * 64) as usize).zip(spoilt.chunks_exact((HEADS * 64) as usize));
            for ((whole, spoilt), row) in rows.zip(40..) {
                let sees = row >= 50 && (window == 0 || row < 81);
                assert_eq!(bits(whole) == bits(spoilt), !sees, "{}: row {row}, window {window}", rig.name);
            }
        }
    }
}

#[test]
fn two_recordings_in_flight_see_each_other_in_order() {
    for mut rig in rigs() {
        let (x, weight, out) = (rig.floats(&[0.0; 4], 4), rig.floats(&[1.0; 4], 4), rig.zeros(1, 4));
        let mut tickets = Vec::new();
        let mut recording = Recording::new(rig.upload);
        for step in 1..=2u32 {
            recording.clear();
            let words = recording.upload(&bytemuck::cast::<[f32; 4], [u32; 4]>([step as f32; 4]), 4);
            let y = Tensor::f32(words.buffer, 1, 4);
            recording.push(Op::AddNorm(AddNorm { x, y, post_weight: None, rows: None, weight, eps: 1e-5, out }));
            recording.downloads.extend([x, y.first_rows(1)]);
            tickets.push(rig.backend.submit(&recording).expect("a device"));
        }
        for (ticket, expected) in tickets.into_iter().zip([[1.0, 1.0], [3.0, 2.0]]) {
            let mut bytes = Vec::new();
            rig.backend.wait(ticket, &mut bytes).expect("a device");
            let got: Vec<f32> = bytemuck::pod_collect_to_vec(&bytes);
            assert_eq!(got, [[expected[0]; 4], [expected[1]; 4]].concat(), "{}", rig.name);
        }
    }
}
