// `out = x @ weight^T + bias` by dot products of four bytes: a workgroup computes ROWS rows of COLUMNS tiles of 32
// columns. For weights that are codes.
//
// Activations become bytes while they are staged, a unit of 32 with one scale (as ggml's q8_1 has them); products of
// bytes are added exactly, and the sums of units in f32, as in `mat_mul.wgsl`: eight lanes have every eighth unit.
#include "mat_mul_io.wgsl"

// A word of four codes holds every so manieth of a run, so that they need no sorting out.
const STEP = 8u / {{LOW_BITS}}u;
const LOW_MASK = 0x01010101u * ((1u << {{LOW_BITS}}u) - 1u);
const ONES = 0x01010101u;

// (row, unit of the stage, 2): a unit's eight words, ordered as its codes are.
var<workgroup> words: array<vec4<u32>, {{ROWS}} * {{ROUNDS}} * 16>;
// (row, unit of the stage): the scale, then scaled sums of 16 values each.
var<workgroup> factors: array<vec4<f32>, {{ROWS}} * {{ROUNDS}} * 8>;
// Of what is being staged, by lane.
var<workgroup> largest: array<f32, 256>;
var<workgroup> staged: array<u32, 256>;
// (split, lane), of four rows.
var<workgroup> partials: array<vec4<f32>, 256>;

// The first value of a unit's word; the other three follow STEP apart.
fn first_of(w: u32) -> u32 {
    return w / STEP * STEP * 4u + w % STEP;
}

// Stages units from `first` on, 32 of all rows at a time; of rows beyond the last the last one. Whole fours are
// written, by one lane of eight: to write a component may write its neighbours too.
fn stage(row: u32, first: u32, local: u32) {
    for (var chunk = 0u; chunk < {{CHUNKS}}u; chunk++) {
        let place = chunk * 32u + local / 8u;
        let w = local % 8u;
        let k = (first + place % ({{ROUNDS}}u * 8u)) * 32u + first_of(w);
        let x_row = params.x + min(row + place / ({{ROUNDS}}u * 8u), params.num_rows - 1u) * params.inner;
        var values = vec4(0.0);
#for T 4
        if k + {{T}}u * STEP < params.inner {
            values[{{T}}] = x[x_row + k + {{T}}u * STEP];
        }
#endfor
        let magnitudes = abs(values);
        largest[local] = max(max(magnitudes.x, magnitudes.y), max(magnitudes.z, magnitudes.w));
        workgroupBarrier();
        var most = 0.0;
        for (var other = 0u; other < 8u; other++) {
            most = max(most, largest[local / 8u * 8u + other]);
        }
        let scale = most / 127.0;
        // What is smaller has no inverse in f32.
        let codes = round(values * select(127.0 / most, 0.0, most < 1e-36));
        staged[local] = pack4xI8(vec4<i32>(codes));
        workgroupBarrier();
        if w == 0u {
#for H 2
            var sum_{{H}} = 0;
#for T 4
            let word_{{H}}_{{T}} = staged[local + {{H}}u * 4u + {{T}}u];
            sum_{{H}} += dot4I8Packed(word_{{H}}_{{T}}, ONES);
#endfor
            words[place * 2u + {{H}}u] = vec4(word_{{H}}_0, word_{{H}}_1, word_{{H}}_2, word_{{H}}_3);
#endfor
            factors[place] = vec4(scale, scale * f32(sum_0), scale * f32(sum_1), 0.0);
        }
    }
}

// Word `w` of a unit's codes as signed bytes.
fn code_word(at: u32, unit: u32, w: u32) -> u32 {
    let low = word(at, {{LOW_AT}}u + unit * {{LOW_BITS}}u + w / STEP);
    var codes = (low >> (w % STEP * {{LOW_BITS}}u)) & LOW_MASK;
#if LOW_BITS == 8
    codes ^= 0x80808080u;
#endif
#if HIGH_BITS
    let first = first_of(w);
    let high = word(at, {{HIGH_AT}}u + unit * {{HIGH_BITS}}u + first * {{HIGH_BITS}}u / 32u);
#for T 4
    let bits_{{T}} = extractBits(high, (first + {{T}}u * STEP) * {{HIGH_BITS}}u % 32u, {{HIGH_BITS}}u);
    codes |= bits_{{T}} << ({{T}}u * 8u + {{LOW_BITS}}u);
#endfor
#endif
#if LOOKUP
    codes = pack4xI8(vec4<i32>(looked_up(unpack4xU8(codes))));
#endif
    return codes;
}

// Those of 16 values.
fn half_codes(at: u32, unit: u32, half: u32) -> vec4<u32> {
    let w = half * 4u;
    return vec4(
        code_word(at, unit, w),
        code_word(at, unit, w + 1u),
        code_word(at, unit, w + 2u),
        code_word(at, unit, w + 3u),
    );
}

@compute @workgroup_size(256)
fn main(
    @builtin(workgroup_id) group: vec3<u32>,
    @builtin(num_workgroups) groups: vec3<u32>,
    @builtin(local_invocation_index) local: u32,
) {
#include "mat_mul_place.wgsl"
#for C COLUMNS
#for G GROUPS
#for R GROUP_ROWS
    var sum_{{G}}_{{R}}_{{C}} = 0.0;
#endfor
#endfor
#endfor
    let num_rounds = (params.num_units + 7u) / 8u;
    for (var first_round = 0u; first_round < num_rounds; first_round += {{ROUNDS}}u) {
        workgroupBarrier();
        stage(row, first_round * 8u, local);
        workgroupBarrier();
        for (var round = 0u; round < {{ROUNDS}}u; round++) {
            let unit = (first_round + round) * 8u + own_split;
            if unit >= params.num_units {
                break;
            }
            let in_block = unit % {{UNITS}}u;
            let place = round * 8u + own_split;
#for C COLUMNS
            let at_{{C}} = block_at(column_{{C}}, unit, params.num_units);
            let scales_{{C}} = unit_scales(at_{{C}}, in_block);
#for H 2
            let codes_{{C}}_{{H}} = half_codes(at_{{C}}, in_block, {{H}}u);
#endfor
#endfor
#for G GROUPS
#for R GROUP_ROWS
            {
                let at_x = ({{G}}u * 4u + {{R}}u) * {{ROUNDS}}u * 8u + place;
                let factor = factors[at_x];
                let low = words[at_x * 2u];
                let high = words[at_x * 2u + 1u];
#for C COLUMNS
                {
                    var dots = vec2(0);
#for T 4
                    dots.x += dot4I8Packed(low[{{T}}], codes_{{C}}_0[{{T}}]);
                    dots.y += dot4I8Packed(high[{{T}}], codes_{{C}}_1[{{T}}]);
#endfor
                    let products = dot(vec2<f32>(dots), scales_{{C}}.xz);
                    sum_{{G}}_{{R}}_{{C}} = fma(factor.x, products, sum_{{G}}_{{R}}_{{C}});
#if LOW_BITS < 8
                    // The min of a group times its activations; bytes with a sign have none.
                    sum_{{G}}_{{R}}_{{C}} += dot(factor.yz, scales_{{C}}.yw);
#endif
                }
#endfor
            }
#endfor
#endfor
        }
    }
#for C COLUMNS
#for G GROUPS
    workgroupBarrier();
#if GROUP_ROWS == 4
    partials[local] = vec4(sum_{{G}}_0_{{C}}, sum_{{G}}_1_{{C}}, sum_{{G}}_2_{{C}}, sum_{{G}}_3_{{C}});
#else
    partials[local] = vec4(sum_0_0_{{C}}, 0.0, 0.0, 0.0);
#endif
    workgroupBarrier();
    if own_split == 0u {
        var total = vec4(0.0);
        for (var split = 0u; split < 8u; split++) {
            total += partials[split * 32u + lane];
        }
#for R GROUP_ROWS
        store(row + {{G}}u * 4u + {{R}}u, column + {{C}}u * 32u + lane, total[{{R}}]);
#endfor
    }
#endfor
#endfor
}
