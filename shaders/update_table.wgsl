// `table[index] = value` for each (index, value) of `entries`; one invocation an entry.
#include "grid.wgsl"

struct Params {
    entries: u32,
    table: u32,
    num_entries: u32,
}
#include "params.wgsl"

@group(0) @binding(0) var<storage, read> entries: array<u32>;
@group(0) @binding(1) var<storage, read_write> table: array<u32>;

@compute @workgroup_size(64)
fn main(
    @builtin(workgroup_id) group: vec3<u32>,
    @builtin(num_workgroups) groups: vec3<u32>,
    @builtin(local_invocation_index) lane: u32,
) {
    let i = workgroup_index(group, groups) * 64u + lane;
    if i < params.num_entries {
        let at = params.entries + i * 2u;
        table[params.table + entries[at]] = entries[at + 1u];
    }
}
