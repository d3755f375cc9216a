//! Sum of the gradients that ops have given to a tensor so far.

use super::rule::InputGrad;
use crate::{
    Device, Result,
    collect::CollectVec,
    shape::{Layout, Shape},
    sort::sort_by,
    tensor::{GradSlice, Tensor},
};

/// Gradient of the output of a node so far. On a GPU, gradients of slices are joined at the end: those of all slices
/// need neither zeros nor sums, and no copy if they lie in one tensor.
#[derive(Clone, Default)]
pub(super) enum Sum {
    #[default]
    None,
    Whole(Tensor),
    /// Gradients of slices of a tensor of this shape.
    Slices(Shape, Vec<(GradSlice, Tensor)>),
}

impl Sum {
    /// Adds a contribution.
    pub fn add(&mut self, contribution: InputGrad) -> Result<()> {
        let contribution = match contribution {
            InputGrad::None => return Ok(()),
            InputGrad::Slice { shape, part, value } if is_slice(&shape, part, &value) => match self {
                Self::None => {
                    *self = Self::Slices(shape, vec![(part, value.into_constant())]);
                    return Ok(());
                }
                Self::Slices(of, slices) if *of == shape && fits(&shape, slices, &value) => {
                    slices.push((part, value.into_constant()));
                    return Ok(());
                }
                _ => InputGrad::Slice { shape, part, value },
            },
            other => other,
        };
        let mut sum = self.take()?;
        accumulate(&mut sum, contribution)?;
        *self = sum.map_or(Self::None, Self::Whole);
        Ok(())
    }

    /// Returns the sum and leaves none, unless it consists of slices, to which others may still come.
    pub fn take_whole(&mut self) -> Option<Tensor> {
        match self {
            Self::Whole(_) => match std::mem::take(self) {
                Self::Whole(sum) => Some(sum),
                _ => None,
            },
            _ => None,
        }
    }

    /// Returns the sum and leaves none.
    pub fn take(&mut self) -> Result<Option<Tensor>> {
        Ok(match std::mem::take(self) {
            Self::None => None,
            Self::Whole(sum) => Some(sum),
            Self::Slices(shape, slices) => Some(joined(shape, slices)?),
        })
    }
}

/// Returns `true` for the gradient of a part of a tensor on a GPU.
fn is_slice(shape: &Shape, part: GradSlice, value: &Tensor) -> bool {
    let inside = |&size: &usize| part.start.checked_add(part.len).is_some_and(|end| end <= size);
    *value.device() != Device::Cpu
        && shape != value.shape()
        && shape.get(part.dim).is_some_and(inside)
        && shape.with_dim(part.dim, part.len) == *value.shape()
}

/// Returns `true` if these slices and another one have no more elements than the tensor; otherwise some overlap, and
/// keeping all would take more memory than their sum.
fn fits(shape: &Shape, slices: &[(GradSlice, Tensor)], value: &Tensor) -> bool {
    slices.iter().map(|(_, value)| value.numel()).sum::<usize>() + value.numel() <= shape.numel()
}

/// Adds up gradients of slices of a tensor.
fn joined(shape: Shape, slices: Vec<(GradSlice, Tensor)>) -> Result<Tensor> {
    let mut sorted: Vec<&(GradSlice, Tensor)> = slices.iter().collect_vec();
    sort_by(&mut sorted, |a, b| a.0.start.cmp(&b.0.start));
    let (dim, first) = (sorted[0].0.dim, sorted[0].1.clone());
    let mut end = 0;
    let tiles = sorted.iter().all(|(part, value)| {
        let follows = part.dim == dim && part.start == end && value.dtype() == first.dtype();
        end = part.start + part.len;
        follows && value.device() == first.device()
    });
    if !tiles || end != shape[dim] {
        let mut sum = None;
        for (part, value) in slices {
            accumulate(&mut sum, InputGrad::Slice { shape, part, value })?;
        }
        return sum.map_or_else(|| Tensor::zeros(shape, first.dtype(), first.device()), Ok);
    }
    let whole = Layout::contiguous(shape);
    let lies = |(part, value): &&(GradSlice, Tensor)| {
        let (here, there) = (value.layout(), whole.narrow(dim, part.start, part.len));
        let mut strides = here.shape.iter().zip(here.strides().iter().zip(there.strides()));
        value.shares_storage(&first) && here.offset == there.offset && strides.all(|(&n, (a, b))| n == 1 || a == b)
    };
    if sorted.iter().all(lies) {
        return Ok(first.with_layout(whole));
    }
    Ok(Tensor::joined(&sorted.iter().map(|(_, value)| value).collect_vec(), dim as isize)?.0)
}

/// Adds a contribution, in place if the sum has no other owner; the first one is moved in.
pub(super) fn accumulate(sum: &mut Option<Tensor>, contribution: InputGrad) -> Result<()> {
    match contribution {
        InputGrad::None => {}
        InputGrad::Whole(value) => {
            *sum = Some(match sum.take() {
                // A rule may return a saved tensor, which need not be a constant.
                None => value.into_constant(),
                Some(sum) => sum.accumulate(&value)?,
            });
        }
        // A part that is all of it; adding it to zeros would only turn −0 into 0.
        InputGrad::Slice { shape, value, .. } if *value.device() != Device::Cpu && shape == *value.shape() => {
            accumulate(sum, InputGrad::Whole(value))?;
        }
        InputGrad::Slice { shape, part, value } => {
            let whole = match sum.take() {
                None => Tensor::zeros(shape, value.dtype(), value.device())?,
                Some(sum) => sum,
            };
            *sum = Some(whole.accumulate_part(part, &value)?);
        }
    }
    Ok(())
}
