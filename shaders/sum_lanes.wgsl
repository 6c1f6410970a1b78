// The sum over the lanes of a workgroup, in every lane; ROW_LANES is a power of two. All lanes leave a loop before it
// at the same time, for that they meet again otherwise is promised nowhere: `for first`, and zero where nothing is.

// Where an invocation is in its workgroup.
struct Place {
    @builtin(local_invocation_index) lane: u32,
#if MANY_SUBGROUPS
    @builtin(subgroup_id) subgroup: u32,
    @builtin(num_subgroups) num_subgroups: u32,
    @builtin(subgroup_invocation_id) subgroup_lane: u32,
#endif
}

#if ONE_SUBGROUP
fn sum_lanes(value: f32, place: Place) -> f32 {
    return subgroupAdd(value);
}
#else
#if MANY_SUBGROUPS
// By subgroup: of 4 lanes at least, and of any width.
var<workgroup> sums: array<f32, {{ROW_LANES}} / 4>;

fn sum_lanes(value: f32, place: Place) -> f32 {
    let of_subgroup = subgroupAdd(value);
    if place.subgroup_lane == 0u {
        sums[place.subgroup] = of_subgroup;
    }
    workgroupBarrier();
    var sum = 0.0;
    for (var i = 0u; i < place.num_subgroups; i++) {
        sum += sums[i];
    }
    // Before the next sum begins.
    workgroupBarrier();
    return sum;
}
#else
var<workgroup> sums: array<f32, {{ROW_LANES}}>;

fn sum_lanes(value: f32, place: Place) -> f32 {
    let lane = place.lane;
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
#endif
