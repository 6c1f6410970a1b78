// Part of the matmul kernels that give eight lanes a column: where a workgroup and a lane are.
    let index = workgroup_index(group, groups);
    // Row tiles lie side by side, so that a cache serves the weights again; then the spans of K.
    let span_group = index / params.row_tiles % params.span_groups;
    let column = index / params.row_tiles / params.span_groups * {{COLUMNS}}u * 32u;
    if column >= params.shard_cols {
        return;
    }
    let lane = local % 32u;
    let own_split = local / 32u;
    let row = params.first_row + index % params.row_tiles * {{ROWS}}u;
#for C COLUMNS
    // A tile beyond the last is the last.
    let column_{{C}} = min(column / 32u + {{C}}u, (params.shard_cols - 1u) / 32u) * 32u + lane;
#endfor
