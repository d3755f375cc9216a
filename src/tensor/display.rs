//! Printing of tensors: `Debug` gives one line of facts; `Display` adds the values and elides the middle of long
//! dimensions.

use std::fmt;

use super::Tensor;
use crate::dtype::DType;

/// Number of elements shown at each end of a long dimension.
const EDGE: usize = 3;

impl fmt::Debug for Tensor {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Tensor({:?} {} {}", self.shape(), self.dtype(), self.device())?;
        if !self.is_contiguous() {
            write!(f, " strides {:?}", self.strides())?;
        }
        if self.numel() <= 8 {
            write!(f, " ")?;
            write_values(self, f, None)?;
        }
        f.write_str(")")
    }
}

impl fmt::Display for Tensor {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write_values(self, f, Some(0))?;
        write!(f, "\n{:?} {} {}", self.shape(), self.dtype(), self.device())
    }
}

/// Writes rows below each other, indented by this much, or all on one line.
fn write_values(tensor: &Tensor, f: &mut fmt::Formatter<'_>, indent: Option<usize>) -> fmt::Result {
    let Some(&len) = tensor.shape().first() else {
        let value = tensor.item().map_err(|_| fmt::Error)?;
        return match tensor.dtype() {
            DType::Bool => write!(f, "{}", value != 0.0),
            // Not through f64, which would lose the last digits of a large integer.
            DType::I64 => write!(f, "{}", tensor.to_vec::<i64>().map_err(|_| fmt::Error)?[0]),
            _ if value != 0.0 && value.is_finite() && !(1e-3..1e5).contains(&value.abs()) => write!(f, "{value:.4e}"),
            _ => write!(f, "{value:.4}"),
        };
    };
    f.write_str("[")?;
    let shorten = len > 2 * EDGE + 1;
    for index in 0..len {
        if shorten && index == EDGE {
            f.write_str(", …")?;
        }
        if shorten && (EDGE..len - EDGE).contains(&index) {
            continue;
        }
        if index > 0 {
            // Rows of numbers stay on one line, blocks go below each other.
            match indent {
                Some(indent) if tensor.rank() > 1 => write!(f, ",\n{:width$}", "", width = indent + 1)?,
                _ => f.write_str(", ")?,
            }
        }
        let part = tensor.with_layout(tensor.layout().narrow(0, index, 1).squeeze(0));
        write_values(&part, f, indent.map(|indent| indent + 1))?;
    }
    f.write_str("]")
}
