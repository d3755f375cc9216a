//! How tensors print: `Debug` is one line of facts, `Display` adds the values, long dimensions cut in the middle.

use std::fmt;

use super::tensor::Tensor;

/// Elements shown at each end of a long dimension.
const EDGE: usize = 3;

impl fmt::Debug for Tensor {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Tensor({:?} {} {}", self.shape(), self.dtype(), self.device())?;
        if !self.is_contiguous() {
            write!(f, " strides {:?}", self.strides())?;
        }
        if self.elements() <= 8 {
            write!(f, " ")?;
            write_values(self, f, 0)?;
        }
        f.write_str(")")
    }
}

impl fmt::Display for Tensor {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write_values(self, f, 0)?;
        write!(f, "\n{:?} {} {}", self.shape(), self.dtype(), self.device())
    }
}

fn write_values(tensor: &Tensor, f: &mut fmt::Formatter<'_>, indent: usize) -> fmt::Result {
    let Some(&len) = tensor.shape().first() else {
        let value = tensor.item().map_err(|_| fmt::Error)?;
        return match tensor.dtype() {
            crate::DType::Bool => write!(f, "{}", value != 0.0),
            crate::DType::I64 => write!(f, "{value}"),
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
            if tensor.rank() > 1 {
                write!(f, ",\n{:width$}", "", width = indent + 1)?;
            } else {
                f.write_str(", ")?;
            }
        }
        let part = tensor.detach().select(0, index).map_err(|_| fmt::Error)?;
        write_values(&part, f, indent + 1)?;
    }
    f.write_str("]")
}
