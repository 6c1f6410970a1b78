// What both kernels of a sample know of a row: its record, its adjusted logits, and the noise of its draws.
//
// Floats are compared as integers of the same order, because a compiler may assume that there are no NaNs. Adjusted
// logits are computed wherever they are needed and written nowhere.

// (rows, vocab), floats by their bits
@group(0) @binding(0) var<storage, read> logits: array<u32>;
// (rows, 16)
@group(0) @binding(1) var<storage, read> rows: array<u32>;
// Biases and masks.
@group(0) @binding(2) var<storage, read> extras: array<u32>;

const NONE = 0xffffffffu;
// The key of what is not finite; above all others.
const NON_FINITE = 0xffffffffu;
const LOWEST = -3.4028234e38;

// As `op::SampleRow` has it.
struct Row {
    slot: u32,
    position: u32,
    seed_low: u32,
    seed_high: u32,
    temperature: f32,
    top_k: u32,
    top_p: f32,
    min_p: f32,
    presence: f32,
    frequency: f32,
    repetition: f32,
    given: u32,
    logprobs: u32,
    bias_at: u32,
    num_biases: u32,
    mask_at: u32,
}

fn read_row(index: u32) -> Row {
    let at = params.rows + index * 16u;
    return Row(
        rows[at], rows[at + 1u], rows[at + 2u], rows[at + 3u],
        bitcast<f32>(rows[at + 4u]), rows[at + 5u], bitcast<f32>(rows[at + 6u]), bitcast<f32>(rows[at + 7u]),
        bitcast<f32>(rows[at + 8u]), bitcast<f32>(rows[at + 9u]), bitcast<f32>(rows[at + 10u]), rows[at + 11u],
        rows[at + 12u], rows[at + 13u], rows[at + 14u], rows[at + 15u],
    );
}

fn is_penalised(row: Row) -> bool {
    return row.presence != 0.0 || row.frequency != 0.0 || row.repetition != 1.0;
}

// Whether the logits are not chosen from as they are.
fn is_adjusted(row: Row) -> bool {
    return row.num_biases > 0u || row.mask_at != NONE || is_penalised(row);
}

// Whether the draw goes over a part of the vocabulary only.
fn is_filtered(row: Row) -> bool {
    return row.temperature > 0.0 && (row.top_k > 0u || row.top_p < 1.0 || row.min_p > 0.0);
}

// Larger floats have larger keys; both zeros have the same.
fn key_of(bits: u32) -> u32 {
    let magnitude = bits & 0x7fffffffu;
    if magnitude >= 0x7f800000u {
        return NON_FINITE;
    }
    return select(0x80000000u + magnitude, 0x80000000u - magnitude, bits > 0x80000000u);
}

fn value_of(key: u32) -> f32 {
    return bitcast<f32>(select(0x80000000u | (0x80000000u - key), key - 0x80000000u, key >= 0x80000000u));
}

// The bias of token v: among at most 1024 pairs sorted by token the last whose token is not above v.
fn bias_of(row: Row, v: u32) -> f32 {
    let pairs = params.extras + row.bias_at;
    var place = 0u;
#for BIT 10
    if row.num_biases > (512u >> {{BIT}}u) {
        let other = min(place + (512u >> {{BIT}}u), row.num_biases - 1u);
        place = select(place, other, extras[pairs + 2u * other] <= v);
    }
#endfor
    return select(0.0, bitcast<f32>(extras[pairs + 2u * place + 1u]), extras[pairs + 2u * place] == v);
}

// The key of token v, whose logit has these bits, after bias and penalties; 0 if the mask forbids it.
fn adjusted_key(row: Row, bits: u32, v: u32) -> u32 {
    if row.mask_at != NONE {
        let word = extras[params.extras + row.mask_at + v / 32u];
        if ((word >> (v % 32u)) & 1u) == 0u {
            return 0u;
        }
    }
    if row.num_biases == 0u && !is_penalised(row) {
        return key_of(bits);
    }
    var value = bitcast<f32>(bits);
    if row.num_biases > 0u {
        value += bias_of(row, v);
    }
    if is_penalised(row) {
        let count = count_of(row, v);
        if count != 0u {
            let generated = count & 0x7fffffffu;
            value *= select(row.repetition, 1.0 / row.repetition, value > 0.0);
            value -= row.frequency * f32(generated) + select(0.0, row.presence, generated > 0u);
        }
    }
    return key_of(bitcast<u32>(clamp(value, LOWEST, -LOWEST)));
}

// How far a key's logit is behind the best one, which is not below it, in units of the temperature.
fn scaled(row: Row, key: u32, best: f32) -> f32 {
    return max((value_of(key) - best) / row.temperature, -1e30);
}

// pcg4d's last word (Jarzynski and Olano 2020).
fn hash(words: vec4<u32>) -> u32 {
    var h = words * 1664525u + 1013904223u;
    h.x += h.y * h.w;
    h.y += h.z * h.x;
    h.z += h.x * h.y;
    h.w += h.y * h.z;
    h ^= h >> vec4(16u);
    h.x += h.y * h.w;
    h.y += h.z * h.x;
    h.z += h.x * h.y;
    h.w += h.y * h.z;
    return h.w;
}

// `-ln(E)` for the exponential draw of token v. E is `-ln(1 - x)` for the x in (0, 1) that 32 random bits stand for; a
// series keeps those of a small x.
fn noise(row: Row, v: u32) -> f32 {
    const UNIT = 2.3283064365386963e-10;
    let bits = hash(vec4(row.seed_low, row.seed_high, row.position, v));
    let x = (f32(bits) + 0.5) * UNIT;
    let near = x * (1.0 + x * (1.0 / 2.0 + x * (1.0 / 3.0 + x * (1.0 / 4.0 + x * (1.0 / 5.0 + x * (1.0 / 6.0))))));
    let far = -log((f32(~bits) + 0.5) * UNIT);
    return -log(select(far, near, x < 0.125));
}

#if ONE_SUBGROUP
// The largest key of all lanes, and the lowest place that has it.
fn best_of_lanes(key: u32, place: u32, lane: u32) -> vec2<u32> {
    let best = subgroupMax(key);
    return vec2(best, subgroupMin(select(NONE, place, key == best)));
}

fn sum_lanes(value: f32, lane: u32) -> f32 {
    return subgroupAdd(value);
}
#else
var<workgroup> keys: array<u32, {{ROW_LANES}}>;
var<workgroup> places: array<u32, {{ROW_LANES}}>;
var<workgroup> sums: array<f32, {{ROW_LANES}}>;

#if EIGHTS
// Of 8 lanes.
fn best_of_subgroup(key: u32, place: u32) -> vec2<u32> {
    let best = subgroupMax(key);
    return vec2(best, subgroupMin(select(NONE, place, key == best)));
}

// Twice by subgroups, of which a workgroup has EIGHTS times eight: software Vulkan compiles a tree of lanes for
// seconds, a barrier and dozens of branches for each of its levels. There the lanes of a subgroup are together again
// after a loop, as they need not be elsewhere.
fn best_of_lanes(key: u32, place: u32, lane: u32) -> vec2<u32> {
    let own = best_of_subgroup(key, place);
    workgroupBarrier();
    if lane % 8u == 0u {
        keys[lane / 8u] = own.x;
        places[lane / 8u] = own.y;
    }
    workgroupBarrier();
    var found = vec2(keys[lane % 8u], places[lane % 8u]);
#for I EIGHTS
#if I > 0
    let key_{{I}} = keys[{{I}}u * 8u + lane % 8u];
    let place_{{I}} = places[{{I}}u * 8u + lane % 8u];
    if key_{{I}} > found.x || (key_{{I}} == found.x && place_{{I}} < found.y) {
        found = vec2(key_{{I}}, place_{{I}});
    }
#endif
#endfor
    return best_of_subgroup(found.x, found.y);
}

fn sum_lanes(value: f32, lane: u32) -> f32 {
    let own = subgroupAdd(value);
    workgroupBarrier();
    if lane % 8u == 0u {
        sums[lane / 8u] = own;
    }
    workgroupBarrier();
    var sum = 0.0;
#for I EIGHTS
    sum += sums[{{I}}u * 8u + lane % 8u];
#endfor
    return subgroupAdd(sum);
}
#else
// The largest key of all lanes, and the lowest place that has it.
fn best_of_lanes(key: u32, place: u32, lane: u32) -> vec2<u32> {
    workgroupBarrier();
    keys[lane] = key;
    places[lane] = place;
    workgroupBarrier();
    for (var width = {{ROW_LANES}}u / 2u; width > 0u; width /= 2u) {
        if lane < width {
            let other = keys[lane + width];
            let other_place = places[lane + width];
            if other > keys[lane] || (other == keys[lane] && other_place < places[lane]) {
                keys[lane] = other;
                places[lane] = other_place;
            }
        }
        workgroupBarrier();
    }
    return vec2(keys[0], places[0]);
}

fn sum_lanes(value: f32, lane: u32) -> f32 {
    workgroupBarrier();
    sums[lane] = value;
    workgroupBarrier();
    for (var width = {{ROW_LANES}}u / 2u; width > 0u; width /= 2u) {
        if lane < width {
            sums[lane] += sums[lane + width];
        }
        workgroupBarrier();
    }
    return sums[0];
}
#endif
#endif
