//! All blocks of a device's KV memory: reference counts, and a free list in eviction order.
//!
//! Invariant: a block is on the free list exactly when its reference count is 0. A freed block that the prefix cache
//! knows keeps its contents until it is handed out again, so the free list is also the list of what may be evicted.
//! The pool knows no tokens and no sequences.

/// `block_size` consecutive tokens' K and V, in all layers.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct BlockId(pub u32);

/// The free list is intrusive and doubly linked by index, so that a cached block in its middle is taken back in O(1).
///
/// Eviction order, first to last: never used or forgotten blocks and then cached ones, each by when they were freed;
/// within one sequence the tail before the head, because [`BlockPool::release`] is called from the tail.
#[derive(Clone, Debug)]
pub struct BlockPool {
    links: Vec<Link>,
    /// Index of the sentinel, which stands before the first and after the last free block.
    sentinel: u32,
    num_free: u32,
}

#[derive(Clone, Copy, Debug)]
struct Link {
    previous: u32,
    next: u32,
    references: u32,
}

impl BlockPool {
    pub fn new(num_blocks: u32) -> BlockPool {
        let links = (0..=num_blocks).map(|i| Link {
            previous: if i == 0 { num_blocks } else { i - 1 },
            next: if i == num_blocks { 0 } else { i + 1 },
            references: 0,
        });
        BlockPool { links: links.collect(), sentinel: num_blocks, num_free: num_blocks }
    }

    pub fn num_blocks(&self) -> u32 {
        self.sentinel
    }

    /// Blocks that nobody references; some may be cached.
    pub fn num_free(&self) -> u32 {
        self.num_free
    }

    pub fn references(&self, block: BlockId) -> u32 {
        self.links[block.0 as usize].references
    }

    /// Takes the block that is first in eviction order. Its old contents are lost.
    pub fn alloc(&mut self) -> Option<BlockId> {
        let first = self.links[self.sentinel as usize].next;
        if first == self.sentinel {
            return None;
        }
        self.reference(BlockId(first));
        Some(BlockId(first))
    }

    /// One more table holds this block; it leaves the free list if it was on it.
    pub fn reference(&mut self, block: BlockId) {
        let link = &mut self.links[block.0 as usize];
        link.references += 1;
        if link.references == 1 {
            self.unlink(block.0);
            self.num_free -= 1;
        }
    }

    /// One table fewer holds this block. At zero it joins the free list: at its end if its contents are worth keeping
    /// (`cached`), else at its begin.
    pub fn release(&mut self, block: BlockId, cached: bool) {
        let link = &mut self.links[block.0 as usize];
        assert!(link.references > 0, "block {} released once too often", block.0);
        link.references -= 1;
        if link.references == 0 {
            let after = if cached { self.links[self.sentinel as usize].previous } else { self.sentinel };
            self.link_after(after, block.0);
            self.num_free += 1;
        }
    }

    /// Free blocks in eviction order.
    pub fn free_list(&self) -> impl Iterator<Item = BlockId> + '_ {
        let next = |block: &u32| Some(self.links[*block as usize].next).filter(|&next| next != self.sentinel);
        std::iter::successors(next(&self.sentinel), next).map(BlockId)
    }

    /// Asserts the pool's own invariants. O(blocks).
    pub fn check(&self) {
        let mut num_listed = 0;
        let mut previous = self.sentinel;
        for block in self.free_list() {
            let link = self.links[block.0 as usize];
            assert_eq!(link.references, 0, "block {} is free and referenced", block.0);
            assert_eq!(link.previous, previous, "the free list is torn at block {}", block.0);
            previous = block.0;
            num_listed += 1;
            assert!(num_listed <= self.num_blocks(), "the free list runs in a circle");
        }
        assert_eq!(self.links[self.sentinel as usize].previous, previous);
        assert_eq!(num_listed, self.num_free);
        let num_unreferenced = self.links[..self.sentinel as usize].iter().filter(|link| link.references == 0).count();
        assert_eq!(num_unreferenced as u32, self.num_free, "a block without references is not on the free list");
    }

    fn unlink(&mut self, block: u32) {
        let Link { previous, next, .. } = self.links[block as usize];
        self.links[previous as usize].next = next;
        self.links[next as usize].previous = previous;
    }

    fn link_after(&mut self, previous: u32, block: u32) {
        let next = self.links[previous as usize].next;
        self.links[previous as usize].next = block;
        self.links[next as usize].previous = block;
        let link = &mut self.links[block as usize];
        (link.previous, link.next) = (previous, next);
    }
}
