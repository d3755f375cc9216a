//! The functions and classes that pickles of `torch.save` refer to.

use super::stored::Stored;

/// A function or class of Python, which is described and never called.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) enum Global {
    /// A class of dictionaries: `OrderedDict`, `defaultdict`, `Counter`.
    Dict,
    /// `defaultdict`, whose argument is not its content.
    DefaultDict,
    /// `_rebuild_tensor_v2`, and the version before it.
    RebuildTensor,
    /// `_rebuild_tensor_v3`, whose storage has bytes and whose arguments name the type.
    RebuildTensorV3,
    /// A parameter around a tensor.
    RebuildParameter,
    /// A tensor that has attributes, or belongs to a class of its own.
    RebuildFromType,
    /// The class of tensors, or of parameters.
    Tensor,
    /// `torch.Size`.
    Size,
    /// `copyreg._reconstructor`, whose first argument is the class.
    Reconstructor,
    /// The class of a storage with these values.
    Storage(Values),
    /// The type of a tensor's values.
    DType(Element),
    /// Anything else, by its number in the pickle.
    Other(u32),
}

/// The values of a storage.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) enum Values {
    /// All of this type.
    Typed(Element),
    /// Bytes, which each tensor takes as it will.
    Bytes,
}

/// The type of a value.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) enum Element {
    Read(Stored),
    /// One that has no place here, with its bytes.
    Unread(&'static str, usize),
}

impl Element {
    /// Returns the number of bytes of a value.
    pub fn bytes(self) -> usize {
        match self {
            Self::Read(stored) => stored.block().1,
            Self::Unread(_, bytes) => bytes,
        }
    }
}

impl Values {
    /// Returns the number of bytes of a value.
    pub fn bytes(self) -> usize {
        match self {
            Self::Typed(element) => element.bytes(),
            Self::Bytes => 1,
        }
    }
}

/// Types of PyTorch, with the class of their storages before those had bytes.
const TYPES: [(&str, &str, Element); 27] = [
    ("float64", "DoubleStorage", Element::Read(Stored::F64)),
    ("float32", "FloatStorage", Element::Read(Stored::F32)),
    ("float16", "HalfStorage", Element::Read(Stored::F16)),
    ("bfloat16", "BFloat16Storage", Element::Read(Stored::BF16)),
    ("int64", "LongStorage", Element::Read(Stored::I64)),
    ("int32", "IntStorage", Element::Read(Stored::I32)),
    ("int16", "ShortStorage", Element::Read(Stored::I16)),
    ("int8", "CharStorage", Element::Read(Stored::I8)),
    ("uint8", "ByteStorage", Element::Read(Stored::U8)),
    ("bool", "BoolStorage", Element::Read(Stored::Bool)),
    ("uint16", "", Element::Read(Stored::U16)),
    ("uint32", "", Element::Read(Stored::U32)),
    ("uint64", "", Element::Read(Stored::U64)),
    ("float8_e4m3fn", "", Element::Read(Stored::F8E4M3)),
    ("float8_e5m2", "", Element::Read(Stored::F8E5M2)),
    ("float8_e4m3fnuz", "", Element::Read(Stored::F8E4M3Fnuz)),
    ("float8_e5m2fnuz", "", Element::Read(Stored::F8E5M2Fnuz)),
    ("float8_e8m0fnu", "", Element::Read(Stored::F8E8M0)),
    ("complex32", "ComplexHalfStorage", Element::Unread("complex32", 4)),
    ("complex64", "ComplexFloatStorage", Element::Unread("complex64", 8)),
    ("complex128", "ComplexDoubleStorage", Element::Unread("complex128", 16)),
    ("qint8", "QInt8Storage", Element::Unread("qint8", 1)),
    ("quint8", "QUInt8Storage", Element::Unread("quint8", 1)),
    ("qint32", "QInt32Storage", Element::Unread("qint32", 4)),
    ("quint4x2", "QUInt4x2Storage", Element::Unread("quint4x2", 1)),
    ("quint2x4", "QUInt2x4Storage", Element::Unread("quint2x4", 1)),
    ("float4_e2m1fn_x2", "", Element::Unread("float4_e2m1fn_x2", 1)),
];

impl Global {
    /// Returns the one with this name, if known.
    pub fn named(module: &str, name: &str) -> Option<Self> {
        let known = match (module, name) {
            ("collections", "OrderedDict" | "Counter") => Self::Dict,
            ("collections", "defaultdict") => Self::DefaultDict,
            ("builtins" | "__builtin__", "dict") => Self::Dict,
            ("torch._utils", "_rebuild_tensor" | "_rebuild_tensor_v2") => Self::RebuildTensor,
            ("torch._utils", "_rebuild_tensor_v3") => Self::RebuildTensorV3,
            ("torch._utils", "_rebuild_parameter" | "_rebuild_parameter_with_state") => Self::RebuildParameter,
            ("torch._tensor", "_rebuild_from_type" | "_rebuild_from_type_v2") => Self::RebuildFromType,
            ("torch", "Tensor") | ("torch.nn.parameter", "Parameter" | "Buffer") => Self::Tensor,
            ("torch", "Size") => Self::Size,
            ("copyreg" | "copy_reg", "_reconstructor") => Self::Reconstructor,
            ("torch" | "torch.storage", "UntypedStorage") => Self::Storage(Values::Bytes),
            ("torch" | "torch.storage", name) => {
                let of = |&&(dtype, storage, _): &&(&str, &str, Element)| name == dtype || name == storage;
                let &(dtype, _, element) = TYPES.iter().filter(|_| !name.is_empty()).find(of)?;
                if name == dtype { Self::DType(element) } else { Self::Storage(Values::Typed(element)) }
            }
            _ => return None,
        };
        Some(known)
    }
}
