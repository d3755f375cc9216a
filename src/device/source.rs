//! Kernels that do not belong to the library: their text, and their parameters as the text declares them.

use std::fmt;

use super::signature::{Declaration, DeclaredParameter, Kind, declarations, scalar_bytes};
use crate::{Error, Result, collect::CollectVec, dtype::DType, error::ensure, hash::fnv1a};

const OP: &str = "raw_kernel";

/// The source of one kernel, with the options that it is compiled with.
#[derive(Clone, Debug)]
pub struct Source {
    text: String,
    hash: u64,
    kernel: String,
    options: Vec<(String, String)>,
    parameters: Vec<SourceParameter>,
}

/// A parameter of a [`Source`].
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct SourceParameter {
    /// Its name.
    pub name: String,
    /// Kind of argument that a launch passes.
    pub kind: Kind,
    /// Type of the values that it points to, or of the number itself.
    pub of: ParameterType,
}

/// The type of a parameter of a [`Source`].
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum ParameterType {
    /// A pointer to elements of this type.
    Elements(DType),
    /// `int`
    I32,
    /// `unsigned int`
    U32,
    /// `long long`
    I64,
    /// `unsigned long long`
    U64,
    /// `float`
    F32,
    /// `double`
    F64,
}

impl fmt::Display for ParameterType {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Elements(dtype) => write!(f, "a tensor of {dtype}"),
            Self::I32 => f.write_str("int"),
            Self::U32 => f.write_str("unsigned int"),
            Self::I64 => f.write_str("long long"),
            Self::U64 => f.write_str("unsigned long long"),
            Self::F32 => f.write_str("float"),
            Self::F64 => f.write_str("double"),
        }
    }
}

impl Source {
    /// Reads the parameters of `kernel` from the text.
    ///
    /// `options`: macros that the text is compiled with, as `-Dname=value`.
    ///
    /// Errors: [`ErrorKind::Argument`](crate::ErrorKind::Argument) if no kernel of this name is written `extern "C"
    /// __global__ void name(parameters)`, or if a parameter is neither a pointer to elements nor a number.
    pub fn new(text: &str, kernel: &str, options: &[(&str, &str)]) -> Result<Self> {
        let fail = |why: String| Error::argument(OP, why);
        let bytes = |name: &str| number(name).and_then(|_| scalar_bytes(name));
        let scalar = |name: &str| resolved(name, text, options, &bytes);
        let declared = declarations(text, &scalar).map_err(fail)?;
        let found = declared.iter().find(|declaration| declaration.kernel == kernel);
        let Declaration { parameters, .. } = found.ok_or_else(|| {
            let names: Vec<_> = declared.iter().map(|declaration| declaration.kernel.as_str()).collect_vec();
            fail(format!("the source has no kernel `{kernel}`, only [{}]", names.join(", ")))
        })?;
        let identifier = |name: &str| {
            !name.is_empty()
                && name.bytes().all(|c| c == b'_' || c.is_ascii_alphanumeric())
                && !name.as_bytes()[0].is_ascii_digit()
        };
        ensure!(identifier(kernel), fail(format!("`{kernel}` is not a C identifier")));
        let bad = options.iter().find(|(name, value)| !identifier(name) || value.contains(['\0', '\n']));
        ensure!(bad.is_none(), fail(format!("option {bad:?} is not a valid macro")));
        let parameters = parameters.iter().map(|declared| {
            let of = type_of(declared, text, options).ok_or_else(|| {
                fail(format!("`{}` of `{kernel}` points to elements of an unknown type", declared.text))
            })?;
            Ok(SourceParameter { name: declared.name.clone(), kind: declared.kind, of })
        });
        Ok(Self {
            text: text.into(),
            hash: fnv1a(text.as_bytes()),
            kernel: kernel.into(),
            parameters: parameters.try_collect_vec()?,
            options: options.iter().map(|(name, value)| (name.to_string(), value.to_string())).collect_vec(),
        })
    }

    /// Returns the text.
    pub fn text(&self) -> &str {
        &self.text
    }

    /// Returns the FNV-1a hash of the text.
    pub fn hash(&self) -> u64 {
        self.hash
    }

    /// Returns the name of the kernel.
    pub fn kernel(&self) -> &str {
        &self.kernel
    }

    /// Returns the macros that the text is compiled with.
    pub fn options(&self) -> Vec<(&str, &str)> {
        self.options.iter().map(|(name, value)| (name.as_str(), value.as_str())).collect_vec()
    }

    /// Returns the parameters of the kernel, in order.
    pub fn parameters(&self) -> &[SourceParameter] {
        &self.parameters
    }
}

fn type_of(parameter: &DeclaredParameter, text: &str, options: &[(&str, &str)]) -> Option<ParameterType> {
    match parameter.kind {
        Kind::Scalar { .. } => resolved(&parameter.element, text, options, &number),
        Kind::Output | Kind::Input => {
            resolved(&parameter.element, text, options, &elements).map(ParameterType::Elements)
        }
    }
}

/// The known type that a name stands for, by way of the macros and type definitions between them.
fn resolved<'a, R>(
    name: &'a str,
    text: &'a str,
    options: &[(&str, &'a str)],
    known: &dyn Fn(&str) -> Option<R>,
) -> Option<R> {
    let mut name = name;
    // Each step follows one definition; a circle of them leads nowhere.
    for _ in 0..8 {
        if let Some(found) = known(name) {
            return Some(found);
        }
        let option = options.iter().find(|(option, _)| *option == name).map(|(_, value)| *value);
        name = option.or_else(|| type_definition(text, name))?;
    }
    None
}

/// The type that a line `typedef TYPE name;` or `using name = TYPE;` gives the name.
fn type_definition<'a>(text: &'a str, name: &str) -> Option<&'a str> {
    text.lines().find_map(|line| {
        let line = line.trim();
        let old = line.strip_prefix("typedef ").and_then(|rest| rest.trim_end().strip_suffix(';'));
        let old = old.and_then(|rest| rest.rsplit_once(' ')).filter(|(_, new)| *new == name).map(|(of, _)| of.trim());
        let new = || line.strip_prefix("using ")?.strip_suffix(';')?.split_once('=');
        old.or_else(|| new().filter(|(new, _)| new.trim() == name).map(|(_, of)| of.trim()))
    })
}

fn number(name: &str) -> Option<ParameterType> {
    Some(match name {
        "i32" | "int" => ParameterType::I32,
        "u32" | "unsigned int" => ParameterType::U32,
        "i64" | "long long" => ParameterType::I64,
        "u64" | "unsigned long long" => ParameterType::U64,
        "f32" | "float" => ParameterType::F32,
        "f64" | "double" => ParameterType::F64,
        _ => return None,
    })
}

fn elements(name: &str) -> Option<DType> {
    Some(match name {
        "f32" | "float" => DType::F32,
        "f64" | "double" => DType::F64,
        "bf16" | "__nv_bfloat16" => DType::BF16,
        "f16" | "half" | "__half" => DType::F16,
        "i64" | "long long" => DType::I64,
        "bool" => DType::Bool,
        _ => return None,
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ErrorKind;

    #[test]
    fn parameters_come_from_the_text() -> Result<()> {
        let text = "typedef ELEMENT T;\nusing real = double;\n// extern \"C\" __global__ void a(int* x)\n\
            extern \"C\" __global__ void __launch_bounds__(64)\na(T* __restrict__ y, const T *x, /* how many, */ long long n,\n\
            const real* scale, unsigned int k, T p) { y[0] = x[0]; }\n";
        let source = Source::new(text, "a", &[("ELEMENT", "float")])?;
        let found: Vec<_> = source.parameters().iter().map(|p| (p.name.as_str(), p.kind, p.of)).collect();
        let expected = [
            ("y", Kind::Output, ParameterType::Elements(DType::F32)),
            ("x", Kind::Input, ParameterType::Elements(DType::F32)),
            ("n", Kind::Scalar { bytes: 8 }, ParameterType::I64),
            ("scale", Kind::Input, ParameterType::Elements(DType::F64)),
            ("k", Kind::Scalar { bytes: 4 }, ParameterType::U32),
            ("p", Kind::Scalar { bytes: 4 }, ParameterType::F32),
        ];
        assert_eq!(found, expected);
        Ok(())
    }

    #[test]
    fn sources_that_cannot_be_read_are_errors() {
        let refused = |text: &str, options: &[(&str, &str)], part: &str| {
            let error = Source::new(text, "a", options).expect_err(part);
            assert!(
                matches!(error.kind(), ErrorKind::Argument { op: OP, message } if message.contains(part)),
                "{error}"
            );
        };
        refused("", &[], "the source has no kernel `a`, only []");
        refused("extern \"C\" __global__ void b(float* y) {}", &[], "only [b]");
        refused("__global__ void a(float* y) {}", &[], "is not declared as");
        refused("extern \"C\" __global__ void a(float y, T n) {}", &[], "`T n` of `a` is neither a pointer nor one of");
        refused("extern \"C\" __global__ void a(T* y) {}", &[], "`T* y` of `a` points to elements of an unknown type");
        refused("typedef U T;\ntypedef T U;\nextern \"C\" __global__ void a(T* y) {}", &[], "unknown type");
        refused("extern \"C\" __global__ void a(T* y) {}", &[("T", "float"), ("-I", "x")], "is not a valid macro");
    }
}
