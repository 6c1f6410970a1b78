// The sum over the lanes of a workgroup, in every lane; ROW_LANES is a power of two.

#if ONE_SUBGROUP
fn sum_lanes(value: f32, lane: u32) -> f32 {
    return subgroupAdd(value);
}
#else
var<workgroup> sums: array<f32, {{ROW_LANES}}>;

fn sum_lanes(value: f32, lane: u32) -> f32 {
    sums[lane] = value;
    workgroupBarrier();
    for (var width = {{ROW_LANES}}u / 2u; width > 0u; width /= 2u) {
        if lane < width {
            sums[lane] += sums[lane + width];
        }
        workgroupBarrier();
    }
    let sum = sums[0];
    // Before the next sum begins.
    workgroupBarrier();
    return sum;
}
#endif
