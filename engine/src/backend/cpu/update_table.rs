//! `table[index] = value` for each entry.

use super::Memory;
use crate::op::UpdateTable;

pub(super) fn run(op: UpdateTable, memory: &mut Memory) {
    memory.write_u32(op.table, |memory, table| {
        for entry in memory.u32(op.entries).chunks_exact(2) {
            table[entry[0] as usize] = entry[1];
        }
    });
}
