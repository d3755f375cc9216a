//! Tables of tensors, for kernels that process many tensors at once (`kernels/many.cuh`).

use crate::{
    Device, Result, Tensor,
    device::{Address, Gpu, Grid, size32},
};

/// Number of elements per block: `CHUNK` of `kernels/many.cuh`.
const CHUNK: usize = 4096;

/// Addresses of the tensors of a launch, on their device.
pub(crate) struct Table {
    pub rows: Tensor,
    /// Number of tensors that have elements, below 2³¹.
    pub tensors: usize,
    /// Total number of chunks, below 2³¹.
    pub chunks: usize,
}

impl Table {
    /// Creates a table of `POINTERS` addresses and the number of elements per tensor.
    ///
    /// It is uploaded only if it differs from the last table with this name: long-lived tensors stay in place, and the
    /// pool gives the gradients of each step the addresses of the last step's.
    pub fn new<const POINTERS: usize>(
        gpu: &'static dyn Gpu,
        name: &str,
        tensors: impl IntoIterator<Item = Result<([Address; POINTERS], usize)>>,
    ) -> Result<Self> {
        let (mut rows, mut chunks) = (Vec::new(), 0);
        for tensor in tensors {
            let (addresses, elements) = tensor?;
            if elements > 0 {
                rows.extend(addresses.map(|address| address.get() as i64));
                rows.extend([elements as i64, chunks as i64]);
                chunks += elements.div_ceil(CHUNK);
            }
        }
        let tensors = rows.len() / (POINTERS + 2);
        // Kernels count both with 32-bit integers.
        size32(tensors).and(size32(chunks))?;
        Ok(Self { rows: Tensor::table_on(gpu, name, rows)?, tensors, chunks })
    }

    /// Returns a grid of one block per chunk.
    pub fn grid(&self) -> Grid {
        Grid::new([self.chunks as u32, 1, 1], [256, 1, 1])
    }
}

/// Items that one launch processes, because they are on one GPU and share a key.
pub(crate) struct Group<I, K> {
    pub gpu: &'static dyn Gpu,
    pub key: K,
    pub items: Vec<I>,
}

/// Returns the items on the CPU, and groups of the others. A group keeps the order of its items.
pub(crate) fn by_device<I, K: PartialEq>(
    items: impl IntoIterator<Item = I>,
    of: impl Fn(&I) -> (Device, K),
) -> (Vec<I>, Vec<Group<I, K>>) {
    let (mut on_cpu, mut groups) = (Vec::new(), Vec::<Group<I, K>>::new());
    for item in items {
        match of(&item) {
            (Device::Cpu, _) => on_cpu.push(item),
            (Device::Gpu(gpu), key) => {
                match groups.iter_mut().find(|group| Device::Gpu(group.gpu) == Device::Gpu(gpu) && group.key == key) {
                    Some(group) => group.items.push(item),
                    None => groups.push(Group { gpu, key, items: vec![item] }),
                }
            }
        }
    }
    (on_cpu, groups)
}
