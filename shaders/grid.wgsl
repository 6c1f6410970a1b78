// Where an invocation is in a grid that is folded into two dimensions, because one is limited to 65,535 workgroups.

fn workgroup_index(id: vec3<u32>, count: vec3<u32>) -> u32 {
    return id.y * count.x + id.x;
}
