//! Tables of tensors, for kernels that take many at once (`kernels/many.cuh`).

use crate::{
    Device, Result, Tensor,
    device::{Address, Gpu, Grid, size32},
};

/// Elements of one block: `CHUNK` of `kernels/many.cuh`.
const CHUNK: usize = 4096;

/// Where the tensors of a launch are, on their device.
pub(crate) struct Table {
    pub rows: Tensor,
    /// Number of tensors that have elements, below 2³¹.
    pub tensors: usize,
    /// Number of chunks of all of them, below 2³¹.
    pub chunks: usize,
}

impl Table {
    /// A table of `POINTERS` addresses, and the number of elements that each of them leads to, per tensor.
    ///
    /// It is uploaded if it is another one than the last with this name: tensors that live on stay where they are, and
    /// the pool gives the gradients of one step the places of those of the last.
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
        // Kernels count both in 32 bits.
        size32(tensors).and(size32(chunks))?;
        Ok(Self { rows: Tensor::table_on(gpu, name, rows)?, tensors, chunks })
    }

    /// A block for each chunk.
    pub fn grid(&self) -> Grid {
        Grid::new([self.chunks as u32, 1, 1], [256, 1, 1])
    }
}

/// Items that one launch takes, because they are on one GPU and alike in a key.
pub(crate) struct Group<I, K> {
    pub gpu: &'static dyn Gpu,
    pub key: K,
    pub items: Vec<I>,
}

/// Those on the CPU, and groups of the others. The order within a group is that of the items.
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
