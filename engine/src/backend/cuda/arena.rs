//! Memory of a device in few pieces: weights, buffers and what is small lie one behind the other in arenas.
//!
//! Invariant: an arena is zero when it is taken, each byte of it is handed out once, and none comes back.

use fullbore_cuda_kernels::{CudaError, Device};

use super::params::Address;

/// Of addresses, as the driver has it for its own.
const ALIGNMENT: u64 = 256;
/// What that takes of an arena at most: thousands of tensors.
const SLACK_BYTES: u64 = 1 << 20;
/// Buffers below it lie together: norms, biases, ids.
const SMALL_BYTES: u64 = 256 << 10;
const SMALL_ARENA_BYTES: u64 = 8 << 20;

/// What an arena holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Holds {
    Weights,
    Buffers,
}

#[derive(Debug, Default)]
pub struct Arenas {
    weights: Arena,
    buffers: Arena,
    small: Arena,
    /// Of the device, handed out or not.
    pub taken_bytes: u64,
}

#[derive(Debug, Default)]
struct Arena {
    next: Address,
    left_bytes: u64,
}

impl Arena {
    /// `None` where that is more than is left.
    fn take(&mut self, size_bytes: u64) -> Option<Address> {
        let taken_bytes = size_bytes.next_multiple_of(ALIGNMENT);
        self.left_bytes = self.left_bytes.checked_sub(taken_bytes)?;
        self.next += taken_bytes;
        Some(self.next - taken_bytes)
    }
}

impl Arenas {
    /// One allocation for so many bytes of tensors that come later.
    pub fn reserve(&mut self, holds: Holds, size_bytes: u64, device: &mut dyn Device) -> Result<(), CudaError> {
        let arena = self.arena(size_bytes + SLACK_BYTES, device)?;
        match holds {
            Holds::Weights => self.weights = arena,
            Holds::Buffers => self.buffers = arena,
        }
        Ok(())
    }

    /// Zeroed memory of an arena; what none has room for is an allocation of its own.
    pub fn take(&mut self, holds: Holds, size_bytes: u64, device: &mut dyn Device) -> Result<Address, CudaError> {
        let is_small = holds == Holds::Buffers && size_bytes < SMALL_BYTES;
        let arena = match holds {
            Holds::Weights => &mut self.weights,
            Holds::Buffers if is_small => &mut self.small,
            Holds::Buffers => &mut self.buffers,
        };
        if let Some(address) = arena.take(size_bytes) {
            return Ok(address);
        }
        if is_small {
            match self.arena(SMALL_ARENA_BYTES, device) {
                Ok(arena) => self.small = arena,
                // There may be room for this one.
                Err(CudaError::OutOfMemory { .. }) => return Ok(self.arena(size_bytes, device)?.next),
                Err(error) => return Err(error),
            }
            return Ok(self.small.take(size_bytes).expect("it is small"));
        }
        Ok(self.arena(size_bytes, device)?.next)
    }

    fn arena(&mut self, size_bytes: u64, device: &mut dyn Device) -> Result<Arena, CudaError> {
        let next = device.alloc(size_bytes)?;
        self.taken_bytes += size_bytes;
        Ok(Arena { next, left_bytes: size_bytes })
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use fullbore_cuda_kernels::{DeviceInfo, Function, Module, Work};

    use super::*;

    /// Has so many bytes and does nothing with them.
    struct Memory {
        left_bytes: u64,
        pieces: Vec<(Address, u64)>,
    }

    impl Device for Memory {
        fn info(&self) -> &DeviceInfo {
            unreachable!("nothing runs")
        }

        fn alloc(&mut self, size_bytes: u64) -> Result<u64, CudaError> {
            let out = CudaError::OutOfMemory { needed_bytes: size_bytes };
            self.left_bytes = self.left_bytes.checked_sub(size_bytes).ok_or(out)?;
            let address = self.pieces.last().map_or(1 << 20, |(at, size)| (at + size).next_multiple_of(1 << 20));
            self.pieces.push((address, size_bytes));
            Ok(address)
        }

        fn alloc_host(&mut self, _: u64) -> Result<u64, CudaError> {
            unreachable!("nothing runs")
        }

        fn stage(&mut self, _: usize, _: u64, _: u64) -> Result<(), CudaError> {
            unreachable!("nothing runs")
        }

        fn write(&mut self, _: u64, _: &[u8]) -> Result<(), CudaError> {
            unreachable!("nothing runs")
        }

        fn function(&mut self, _: &Module, _: &str) -> Result<Function, CudaError> {
            unreachable!("nothing runs")
        }

        fn submit(&mut self, _: usize, _: &Work) -> Result<(), CudaError> {
            unreachable!("nothing runs")
        }

        fn wait(&mut self, _: usize, _: &mut Vec<u8>) -> Result<Duration, CudaError> {
            unreachable!("nothing runs")
        }

        fn reopen(&mut self) -> Result<(), CudaError> {
            unreachable!("nothing runs")
        }
    }

    /// Every piece is aligned, within an allocation, and apart from every other.
    #[test]
    fn tensors_lie_apart_in_few_allocations() {
        let (mut device, mut arenas) = (Memory { left_bytes: 1 << 32, pieces: Vec::new() }, Arenas::default());
        let (weight, cache) = (3_000_001, 5_000_004);
        arenas.reserve(Holds::Weights, 100 * weight, &mut device).expect("there is room");
        arenas.reserve(Holds::Buffers, 64 * cache, &mut device).expect("there is room");
        let mut taken = Vec::new();
        for _ in 0..100 {
            for (holds, size_bytes) in [(Holds::Weights, weight), (Holds::Buffers, 16_384)] {
                taken.push((arenas.take(holds, size_bytes, &mut device).expect("there is room"), size_bytes));
            }
        }
        for _ in 0..64 {
            taken.push((arenas.take(Holds::Buffers, cache, &mut device).expect("there is room"), cache));
        }
        assert_eq!(device.pieces.len(), 3, "weights, buffers, and what is small");
        // What was not foreseen.
        taken.push((arenas.take(Holds::Buffers, 7 * cache, &mut device).expect("there is room"), 7 * cache));
        assert_eq!(device.pieces.len(), 4);
        assert_eq!(arenas.taken_bytes, (1 << 32) - device.left_bytes);
        taken.sort_unstable();
        assert!(taken.windows(2).all(|pair| pair[0].0 + pair[0].1 <= pair[1].0), "two lie in one place");
        let is_inside = |&(at, size): &(Address, u64)| {
            device.pieces.iter().any(|&(begin, bytes)| begin <= at && at + size <= begin + bytes)
        };
        assert!(taken.iter().all(|piece| piece.0.is_multiple_of(ALIGNMENT) && is_inside(piece)));
    }

    #[test]
    fn what_is_small_fits_where_an_arena_does_not() {
        let (mut device, mut arenas) = (Memory { left_bytes: 1 << 20, pieces: Vec::new() }, Arenas::default());
        arenas.take(Holds::Buffers, 4096, &mut device).expect("there is room for it alone");
        assert_eq!(device.pieces, [(1 << 20, 4096)]);
        let error = arenas.take(Holds::Buffers, 2 << 20, &mut device).expect_err("there is none");
        assert_eq!(error, CudaError::OutOfMemory { needed_bytes: 2 << 20 });
    }
}
