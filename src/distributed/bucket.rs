//! Parameters whose gradients are summed together, and the part of them that each rank adds.

use crate::{
    DType, Device, Gradients, Param, ParamMap, Result, Tensor, collect::CollectVec, ops::adamw::CHUNK,
    ordered::OrderedMap, sort::sort_by, tensor::LeafId,
};

/// Number of the block of each parameter that is divided among the ranks, in stage 3 of ZeRO.
pub(crate) type Homes = OrderedMap<LeafId, usize>;

/// Parameters of one dtype and device. Their elements, one after another, are cut into a part for each rank: at
/// multiples of [`CHUNK`] within a parameter, so that norms over parts have the sums of norms over whole parameters.
#[derive(Debug)]
pub(crate) struct Bucket {
    pub params: Vec<(String, Param)>,
    /// Dtype of the parameters; their gradients are summed in its accumulator.
    pub dtype: DType,
    pub device: Device,
    /// Block of all its parameters, if each rank has only its part of them.
    pub block: Option<usize>,
    /// Pieces of each rank.
    pub parts: Vec<Vec<Piece>>,
    /// Elements of the largest part, to which the others are padded.
    pub len: usize,
}

/// Range of the elements of a parameter.
#[derive(Clone, Copy, PartialEq, Debug)]
pub(crate) struct Piece {
    pub param: usize,
    pub start: usize,
    pub len: usize,
}

impl Bucket {
    /// Cuts parameters into buckets. The last parameters come first, as their gradients do. A block has a bucket of its
    /// own, before the rest, parts of which are complete only at the end of a backward pass.
    pub fn all(params: &ParamMap, ranks: usize, most: usize, homes: &Homes) -> Vec<Self> {
        let mut unique = params.unique().map(|(name, param)| (name.to_string(), param.clone())).collect_vec();
        let outside = |param: &Param| !homes.contains_key(&param.leaf());
        sort_by(&mut unique, |a, b| (outside(&a.1), b.1.leaf()).cmp(&(outside(&b.1), a.1.leaf())));
        let mut buckets: Vec<Self> = Vec::new();
        // Bucket of each kind that is being filled.
        let mut open: Vec<(usize, usize)> = Vec::new();
        for (name, param) in unique {
            let value = param.tensor();
            let block = homes.get(&param.leaf()).copied();
            let alike =
                |bucket: &Self| (bucket.dtype, &bucket.device, bucket.block) == (value.dtype(), value.device(), block);
            let fits = |&&mut (at, elements): &&mut (usize, usize)| {
                alike(&buckets[at]) && (block.is_some() || elements + value.numel() <= most)
            };
            let at = match open.iter_mut().find(fits) {
                Some((at, elements)) => {
                    *elements += value.numel();
                    *at
                }
                None => {
                    open.retain(|&(at, _)| !alike(&buckets[at]));
                    open.push((buckets.len(), value.numel()));
                    let (dtype, device) = (value.dtype(), value.device().clone());
                    buckets.push(Self { params: Vec::new(), dtype, device, block, parts: Vec::new(), len: 0 });
                    buckets.len() - 1
                }
            };
            buckets[at].params.push((name, param));
        }
        for bucket in &mut buckets {
            let sizes = bucket.params.iter().map(|(_, param)| param.tensor().numel()).collect_vec();
            bucket.parts = parts(&sizes, ranks);
            let len = |part: &Vec<Piece>| part.iter().map(|piece| piece.len).sum();
            bucket.len = bucket.parts.iter().map(len).max().unwrap_or(0);
        }
        buckets
    }

    /// Takes the gradients of the bucket out, as one tensor of all parts: `[ranks · len]`. Where there is none it has
    /// −0, to which adding a number changes no bit of the number.
    pub fn take(&self, grads: &mut Gradients) -> Result<Tensor> {
        let take = |(_, param): &(String, Param)| grads.take(param.leaf()).map(|grad| self.flat(&grad)).transpose();
        let flat = self.params.iter().map(take).try_collect_vec()?;
        self.laid_out(self.dtype.accumulator(), |piece| {
            flat[piece.param].as_ref().map(|grad| grad.narrow(0, piece.start, piece.len)).transpose()
        })
    }

    /// Returns a tensor with the elements of one parameter in the dtype of sums.
    fn flat(&self, grad: &Tensor) -> Result<Tensor> {
        grad.detach().to_dtype(self.dtype.accumulator())?.contiguous()?.reshape([grad.numel()])
    }

    fn laid_out(&self, dtype: DType, piece: impl Fn(&Piece) -> Result<Option<Tensor>>) -> Result<Tensor> {
        let mut tensors = Vec::new();
        for part in &self.parts {
            self.lay(part, dtype, &piece, &mut tensors)?;
        }
        Tensor::cat(&tensors.iter().collect_vec(), 0)
    }

    /// Returns the elements of a part, padded: `[len]`.
    pub fn part(
        &self,
        part: &[Piece],
        dtype: DType,
        piece: impl Fn(&Piece) -> Result<Option<Tensor>>,
    ) -> Result<Tensor> {
        let mut tensors = Vec::new();
        self.lay(part, dtype, &piece, &mut tensors)?;
        Tensor::cat(&tensors.iter().collect_vec(), 0)
    }

    fn lay(
        &self,
        part: &[Piece],
        dtype: DType,
        piece: &dyn Fn(&Piece) -> Result<Option<Tensor>>,
        tensors: &mut Vec<Tensor>,
    ) -> Result<()> {
        let none = |len: usize| Tensor::full([len], -0.0, dtype, &self.device);
        for at in part {
            tensors.push(piece(at)?.map_or_else(|| none(at.len), Ok)?);
        }
        let used: usize = part.iter().map(|piece| piece.len).sum();
        if used < self.len || part.is_empty() {
            tensors.push(none(self.len - used)?);
        }
        Ok(())
    }

    /// Returns the place of each piece of a part in the part.
    pub fn places(&self, rank: usize) -> impl Iterator<Item = (Piece, usize)> {
        self.parts[rank].iter().scan(0, |at, piece| {
            let start = *at;
            *at += piece.len;
            Some((*piece, start))
        })
    }

    /// Returns the parameters whose elements are the given ones, of all parts: `[ranks · len]`.
    pub fn whole(&self, all: &Tensor) -> Result<Vec<Tensor>> {
        let mut pieces: Vec<Vec<Tensor>> = self.params.iter().map(|_| Vec::new()).collect_vec();
        for rank in 0..self.parts.len() {
            for (piece, at) in self.places(rank) {
                pieces[piece.param].push(all.narrow(0, rank * self.len + at, piece.len)?);
            }
        }
        let whole = |(pieces, (_, param)): (&Vec<Tensor>, &(String, Param))| {
            let value = param.tensor();
            if pieces.is_empty() {
                return Tensor::zeros(*value.shape(), all.dtype(), all.device());
            }
            Tensor::cat(&pieces.iter().collect_vec(), 0)?.reshape(*value.shape())
        };
        pieces.iter().zip(&self.params).map(whole).try_collect_vec()
    }
}

/// Cuts parameters of these sizes, one after another, into a part for each rank, as even as chunks allow.
fn parts(sizes: &[usize], ranks: usize) -> Vec<Vec<Piece>> {
    let total: usize = sizes.iter().sum();
    let mut parts: Vec<Vec<Piece>> = (0..ranks).map(|_| Vec::new()).collect_vec();
    let (mut rank, mut before) = (0, 0);
    for (param, &size) in sizes.iter().enumerate() {
        for start in (0..size).step_by(CHUNK) {
            let len = CHUNK.min(size - start);
            // A part ends once it has its share of all that was given so far.
            while rank + 1 < ranks && before >= total * (rank + 1) / ranks {
                rank += 1;
            }
            before += len;
            match parts[rank].last_mut() {
                Some(piece) if piece.param == param => piece.len += len,
                _ => parts[rank].push(Piece { param, start, len }),
            }
        }
    }
    parts
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{Init, ParamStore};

    #[test]
    fn parts_are_even_up_to_a_chunk() {
        let piece = |param, start, len| Piece { param, start, len };
        assert_eq!(parts(&[], 2), [vec![], vec![]]);
        assert_eq!(parts(&[3, 2, 5], 1), [vec![piece(0, 0, 3), piece(1, 0, 2), piece(2, 0, 5)]]);
        assert_eq!(parts(&[3, 2, 5], 2), [vec![piece(0, 0, 3), piece(1, 0, 2)], vec![piece(2, 0, 5)]]);
        let [c, rest] = [CHUNK, 7];
        let cut = parts(&[c, 4 * c + rest, 3], 3);
        assert_eq!(cut[0], [piece(0, 0, c), piece(1, 0, c)]);
        assert_eq!(cut[1], [piece(1, c, 2 * c)]);
        assert_eq!(cut[2], [piece(1, 3 * c, c + rest), piece(2, 0, 3)]);
        let count = |parts: &[Vec<Piece>]| parts.iter().flatten().map(|piece| piece.len).sum::<usize>();
        for ranks in 1..9 {
            let cut = parts(&[100 * c + 1, 5, 37 * c, 1], ranks);
            assert_eq!((cut.len(), count(&cut)), (ranks, 137 * c + 7));
            for part in &cut {
                let len: usize = part.iter().map(|piece| piece.len).sum();
                assert!(len.abs_diff(137 * c / ranks) <= 2 * c, "{ranks}: {len}");
            }
        }
    }

    #[test]
    fn buckets_are_full_but_hold_large_parameters_whole() -> Result<()> {
        let store = ParamStore::new(0, DType::F32, &Device::Cpu);
        for (name, size) in [("a", 1), ("b", 9), ("c", 1), ("d", 20), ("e", 3)] {
            store.param(name, [size], Init::Constant(0.0))?;
        }
        let params = store.params();
        let names = |homes: &Homes| {
            let buckets = Bucket::all(&params, 2, 10, homes);
            let of = |bucket: &Bucket| bucket.params.iter().map(|(name, _)| name.as_str()).collect::<String>();
            buckets.iter().map(of).collect::<Vec<_>>()
        };
        assert_eq!(names(&Homes::default()), ["e", "d", "cb", "a"]);
        // Blocks are first, and whole.
        let home = |(name, block)| Some((params.get(name)?.leaf(), block));
        let homes = [("b", 7), ("d", 7), ("a", 3)].into_iter().filter_map(home).collect();
        assert_eq!(names(&homes), ["db", "a", "ec"]);
        Ok(())
    }
}
