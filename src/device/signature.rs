//! The parameters of CUDA kernels, read from their source. `build.rs` includes this file for the kernels of the library.

/// Kind of argument that a launch passes for a parameter, in the order of the parameters of the library's kernels.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub enum Kind {
    /// The address of values that the kernel writes.
    Output,
    /// The address of values that the kernel reads.
    Input,
    /// A value of this many bytes.
    Scalar {
        /// Its size.
        bytes: usize,
    },
}

/// A kernel as its source declares it.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Declaration {
    /// The function's name.
    pub kernel: String,
    /// Its parameters, in order.
    pub parameters: Vec<DeclaredParameter>,
}

/// A parameter as the source declares it.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct DeclaredParameter {
    /// Its name.
    pub name: String,
    /// Kind of argument that a launch passes.
    pub kind: Kind,
    /// Its type in C, without `const` and `*`.
    pub element: String,
    /// The whole declaration, for messages.
    pub text: String,
}

/// Types of parameters that are passed by value, with their bytes.
const SCALARS: [(&str, usize); 13] = [
    ("i32", 4),
    ("u32", 4),
    ("f32", 4),
    ("i64", 8),
    ("u64", 8),
    ("f64", 8),
    ("Layout", 88),
    ("int", 4),
    ("unsigned int", 4),
    ("float", 4),
    ("long long", 8),
    ("unsigned long long", 8),
    ("double", 8),
];

/// The kernels of a source, each written as `extern "C" __global__ void name(parameters)`.
///
/// `scalar`: bytes of a type that is passed by value, for instance [`scalar_bytes`].
///
/// Errors: a kernel or a parameter that is written otherwise.
pub fn declarations(text: &str, scalar: &dyn Fn(&str) -> Option<usize>) -> Result<Vec<Declaration>, String> {
    let (macros, code) = (macros(text), without_comments(text));
    let mut before = "";
    let mut found = Vec::new();
    for (index, part) in code.split("__global__").enumerate() {
        if index > 0 {
            let plain = before.trim_end().ends_with("extern \"C\"");
            let head = part.trim_start().strip_prefix("void ").filter(|_| plain).map(skip_launch_bounds);
            let parsed = head.and_then(|head| head.split_once('(')).and_then(|(kernel, rest)| {
                let (list, _) = rest.split_once(')')?;
                Some((kernel.trim(), list))
            });
            let (kernel, list) = parsed.ok_or_else(|| {
                format!("kernel {index} is not declared as `extern \"C\" __global__ void name(parameters)`")
            })?;
            let list = expanded(list, &macros);
            let list = list.split(',').map(str::trim).filter(|parameter| !parameter.is_empty());
            let parameters = list.map(|text| parameter(kernel, text, scalar)).collect::<Result<_, _>>()?;
            found.push(Declaration { kernel: kernel.into(), parameters });
        }
        before = part;
    }
    Ok(found)
}

/// The macros without arguments of a source, `#define NAME text`, by which kernels share a part of their parameters.
fn macros(text: &str) -> Vec<(String, String)> {
    let joined = text.replace("\\\n", " ");
    let defined = |line: &str| {
        let (name, body) = line.trim_start().strip_prefix("#define ")?.trim_start().split_once(char::is_whitespace)?;
        (!name.contains('(')).then(|| (name.to_string(), body.split("//").next().unwrap_or_default().to_string()))
    };
    joined.lines().filter_map(defined).collect()
}

/// A list of parameters with its macros written out.
fn expanded(list: &str, macros: &[(String, String)]) -> String {
    let mut list = list.to_string();
    // Later macros may name earlier ones.
    for (name, body) in macros.iter().rev() {
        let parameters = list.split(',').map(|parameter| if parameter.trim() == name { body } else { parameter });
        list = parameters.collect::<Vec<_>>().join(",");
    }
    list
}

/// Bytes of a type that is passed by value. None depends on compile options, so that one declaration serves every
/// variant of a kernel.
pub fn scalar_bytes(name: &str) -> Option<usize> {
    SCALARS.iter().find(|(scalar, _)| *scalar == name).map(|&(_, bytes)| bytes)
}

/// The text with each comment replaced by a space, on one line.
fn without_comments(text: &str) -> String {
    let lines: Vec<&str> = text.lines().map(|line| line.split("//").next().unwrap_or("")).collect();
    let joined = lines.join(" ");
    let mut parts = joined.split("/*");
    let mut code = parts.next().unwrap_or("").to_string();
    for part in parts {
        code.push(' ');
        code.push_str(part.split_once("*/").map_or("", |(_, rest)| rest));
    }
    code
}

fn skip_launch_bounds(head: &str) -> &str {
    let rest = head.trim_start().strip_prefix("__launch_bounds__").and_then(|rest| rest.split_once(')'));
    rest.map_or(head, |(_, rest)| rest)
}

fn parameter(kernel: &str, text: &str, scalar: &dyn Fn(&str) -> Option<usize>) -> Result<DeclaredParameter, String> {
    let split = text.rfind(|c: char| !c.is_alphanumeric() && c != '_').map_or(0, |at| at + 1);
    let (declared, name) = (text[..split].replace("__restrict__", " "), &text[split..]);
    let words = |text: &str| text.split_whitespace().collect::<Vec<_>>().join(" ");
    let (kind, element) = match declared.trim_end().strip_suffix('*') {
        Some(pointee) => {
            let pointee = words(pointee);
            match pointee.strip_prefix("const ") {
                Some(element) => (Kind::Input, element.to_string()),
                None => (Kind::Output, pointee),
            }
        }
        None => {
            let declared = words(&declared);
            let Some(bytes) = scalar(&declared) else {
                let known = SCALARS.map(|(name, _)| name).join(", ");
                return Err(format!("`{text}` of `{kernel}` is neither a pointer nor one of {known}"));
            };
            (Kind::Scalar { bytes }, declared)
        }
    };
    Ok(DeclaredParameter { name: name.into(), kind, element, text: text.into() })
}
