// Part of `attention.wgsl`: what an earlier dispatch has left in parts, cut by cut, becomes the output of its row: a
// lane takes two elements, in the steps that the cuts of a row that is not split go together in.
fn merge(group: u32, lane: u32) {
    let i = group * {{TILE_LANES}}u + lane;
    let head_pairs = {{HEAD_DIM}}u / 2u;
    let row_pairs = params.num_heads * head_pairs;
    if i >= params.num_merges * row_pairs {
        return;
    }
    let merge_at = params.merges + i / row_pairs * 3u;
    // Of a head of a cut: its values, and their score and sum.
    let slot = head_pairs + 1u;
    let first = merges[merge_at + 1u] * params.num_heads + i % row_pairs / head_pairs;
    let at = params.partials / 2u + first * slot;
    let num_cuts = merges[merge_at + 2u];
    var value = vec2(0.0);
    var highest = LOWEST;
    var total = 0.0;
    for (var cut = 0u; cut < num_cuts; cut += {{MERGE_STEPS}}u) {
#for S MERGE_STEPS
        let at_{{S}} = at + min(cut + {{S}}u, num_cuts - 1u) * params.num_heads * slot;
        let of_cut_{{S}} = partials[at_{{S}} + head_pairs];
        let part_{{S}} = partials[at_{{S}} + i % head_pairs];
#endfor
#for S MERGE_STEPS
        if cut + {{S}}u < num_cuts {
            let both = max(highest, of_cut_{{S}}.x);
            let is_first = total == 0.0;
            let shrink = select(exp(highest - both), 0.0, is_first);
            let weight = select(exp(of_cut_{{S}}.x - both), 1.0, is_first);
            value = fma(part_{{S}}, vec2(weight), value * shrink);
            total = fma(of_cut_{{S}}.y, weight, total * shrink);
            highest = both;
        }
#endfor
    }
    out[params.out / 2u + merges[merge_at] * row_pairs + i % row_pairs] = value * (1.0 / total);
}
