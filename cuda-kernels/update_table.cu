// `table[index] = value` for each (index, value) of `entries`; a thread an entry.

struct UpdateTableParams {
    // (num_entries, 2)
    const u32* entries;
    u32* table;
    u32 num_entries;
};

KERNEL(256, update_table, UpdateTableParams) {
    u32 i = blockIdx.x * 256 + threadIdx.x;
    if (i < p.num_entries) p.table[p.entries[2 * i]] = p.entries[2 * i + 1];
}
