//! Embeds the CUDA sources: each `kernels/*.cu` with its includes written out, a hash of that text, and the
//! parameters of its kernels. Plain text work; no CUDA toolkit, network or GPU is touched.

use std::{env, fmt::Write, fs, path::Path, process::ExitCode};

// The library reads more of what it finds.
#[allow(dead_code)]
#[path = "src/device/signature.rs"]
mod signature;

pub use signature::Kind;
use signature::{declarations, scalar_bytes};

/// Longest line of a kernel source, in characters.
const LINE: usize = 120;

/// A kernel's name and its parameters in order.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Signature {
    pub kernel: String,
    pub parameters: Vec<(String, Kind)>,
}

fn main() -> ExitCode {
    println!("cargo::rerun-if-changed=build.rs");
    println!("cargo::rerun-if-changed=kernels");
    println!("cargo::rerun-if-changed=src/device/signature.rs");
    match generate(Path::new("kernels")) {
        Ok(()) => ExitCode::SUCCESS,
        Err(message) => {
            println!("cargo::error={message}");
            ExitCode::FAILURE
        }
    }
}

fn generate(kernels: &Path) -> Result<(), String> {
    let out = env::var("OUT_DIR").map_err(|error| error.to_string())?;
    let write = |name: &str, text: String| {
        fs::write(Path::new(&out).join(name), text).map_err(|error| format!("{out}/{name}: {error}"))
    };
    write("kernels.rs", embed(kernels)?)?;
    let header = fs::read_to_string(kernels.join("common.cuh")).map_err(|error| format!("common.cuh: {error}"))?;
    write("faults.rs", write_faults(&parse_faults(&header).map_err(|why| format!("common.cuh: {why}"))?))
}

/// The text of `kernels.rs`: the sources in a folder, and those of its `lab`, which benchmarks compile.
fn embed(folder: &Path) -> Result<String, String> {
    let (mut text, mut kernels) = (String::new(), Vec::new());
    for (name, of) in [("", "every kernel"), ("LAB_", "the rungs of `kernels/lab`")] {
        let part = if name.is_empty() { folder.to_path_buf() } else { folder.join("lab") };
        let (sources, signatures) = embed_files(&part, folder, &mut kernels)?;
        write!(
            text,
            "/// The sources of {of}, by name.\npub static {name}SOURCES: &[KernelSource] = &[\n{sources}];\n\n\
             /// The parameters of {of}, by file.\npub static {name}SIGNATURES: &[Signature] = &[\n{signatures}];\n\n"
        )
        .map_err(|error| error.to_string())?;
    }
    Ok(text)
}

/// The sources and the signatures in a folder, whose files include each other and those of another one.
fn embed_files(folder: &Path, included: &Path, kernels: &mut Vec<String>) -> Result<(String, String), String> {
    let entries = fs::read_dir(folder).map_err(|error| format!("{}: {error}", folder.display()))?;
    let mut names: Vec<String> = entries.flatten().map(|e| e.file_name().to_string_lossy().into_owned()).collect();
    names.sort();
    let read =
        |name: &str| fs::read_to_string(folder.join(name)).or_else(|_| fs::read_to_string(included.join(name))).ok();
    let (mut sources, mut signatures) = (String::new(), String::new());
    for name in names.iter().filter(|name| name.ends_with(".cu") || name.ends_with(".cuh")) {
        check_lines(name, &read(name).ok_or_else(|| format!("{name} cannot be read as text"))?)?;
        let Some(stem) = name.strip_suffix(".cu") else { continue };
        let text = flatten(name, &read)?;
        let own = read(name).unwrap_or_default();
        let (hash, variants) = (fnv1a(&text), parse_variants(name, &own, &text)?);
        writeln!(
            sources,
            "    KernelSource {{ name: {stem:?}, hash: {hash:#018x}, source: {text:?}, variants: &{} }},",
            write_variants(&variants)
        )
        .map_err(|error| error.to_string())?;
        for signature in parse_signatures(name, &text)? {
            let Signature { kernel, parameters } = &signature;
            if kernels.contains(kernel) {
                return Err(format!("{name}: kernel `{kernel}` is defined in another file already"));
            }
            kernels.push(kernel.clone());
            let fields =
                |(name, kind): &(String, Kind)| format!("Parameter {{ name: {name:?}, kind: Kind::{kind:?} }}");
            let list = parameters.iter().map(fields).collect::<Vec<_>>().join(", ");
            writeln!(signatures, "    Signature {{ file: {stem:?}, kernel: {kernel:?}, parameters: &[{list}] }},")
                .map_err(|error| error.to_string())?;
        }
    }
    Ok((sources, signatures))
}

/// A source with each `#include "x"` replaced by that file, once; `#line` keeps the compiler's messages right.
pub fn flatten(name: &str, read: &dyn Fn(&str) -> Option<String>) -> Result<String, String> {
    let mut out = String::new();
    expand(name, read, &mut Vec::new(), &mut Vec::new(), &mut out)?;
    Ok(out)
}

fn expand(
    name: &str,
    read: &dyn Fn(&str) -> Option<String>,
    open: &mut Vec<String>,
    done: &mut Vec<String>,
    out: &mut String,
) -> Result<(), String> {
    if open.iter().any(|file| file == name) {
        return Err(format!("includes form a cycle: {} -> {name}", open.join(" -> ")));
    }
    if done.iter().any(|file| file == name) {
        return Ok(());
    }
    let text = read(name).ok_or_else(|| match open.last() {
        Some(file) => format!("{file} includes \"{name}\", which is not in kernels/"),
        None => format!("{name} is not in kernels/"),
    })?;
    open.push(name.into());
    out.push_str(&format!("#line 1 \"{name}\"\n"));
    for (index, line) in text.lines().enumerate() {
        let Some(target) = line.trim_start().strip_prefix("#include") else {
            out.push_str(line);
            out.push('\n');
            continue;
        };
        let quoted = target.trim().strip_prefix('"').and_then(|target| target.split_once('"'));
        let Some((target, _)) = quoted else {
            let at = index + 1;
            return Err(format!(
                "{name}:{at}: expected #include \"file.cuh\", got `{line}`; NVRTC has no include path"
            ));
        };
        expand(target, read, open, done, out)?;
        out.push_str(&format!("#line {} \"{name}\"\n", index + 2));
    }
    open.pop();
    done.push(name.into());
    Ok(())
}

/// A set of variants: the values of each compile option, of which every combination is compiled.
pub type Variants = Vec<(String, Vec<String>)>;

/// The first arguments of the lines that begin with a macro's name, which may follow another word: `ROW(` finds
/// `ACTIVATION_ROW(gelu, …)` too.
fn rows_of(text: &str, start: &str) -> Vec<String> {
    let row = |line: &str| {
        let (name, rest) = line.split_once('(')?;
        let is_row = format!("{name}(").ends_with(start) && !name.contains(' ');
        is_row.then(|| rest.split(',').next().unwrap_or_default().trim().to_string())
    };
    text.lines().filter_map(row).collect()
}

/// Variants of a source, from the lines `// Variants: OPTION=value,value OPTION=value` of its comments. A value may stand
/// for several: a line `// Types: NAME=value,value` of an included file says which.
pub fn parse_variants(file: &str, text: &str, whole: &str) -> Result<Vec<Variants>, String> {
    let types = whole.lines().filter_map(|line| line.trim_start().strip_prefix("// Types:"));
    let types: Vec<(&str, &str)> =
        types.flat_map(str::split_whitespace).filter_map(|list| list.split_once('=')).collect();
    let lines = text.lines().filter_map(|line| line.trim_start().strip_prefix("// Variants:"));
    let sets = lines.map(|line| {
        let axis = |axis: &str| match axis.split_once('=') {
            // The rows of a table that the file includes.
            Some((option, rows)) if rows.ends_with("(*)") => match rows_of(whole, rows.trim_end_matches("*)")) {
                names if names.is_empty() => Err(format!("{file}: there are no rows {rows}")),
                names => Ok((option.to_string(), names)),
            },
            Some((option, values)) if !option.is_empty() && !values.split(',').any(str::is_empty) => {
                let list =
                    |value: &str| types.iter().find(|list| list.0 == value).map_or(value, |list| list.1).to_string();
                let values = values.split(',').map(list).collect::<Vec<_>>().join(",");
                Ok((option.to_string(), values.split(',').map(str::to_string).collect()))
            }
            _ => Err(format!("{file}: `{axis}` of its variants is not written OPTION=value,value")),
        };
        line.split_whitespace().map(axis).collect::<Result<Variants, _>>()
    });
    let sets = sets.collect::<Result<Vec<_>, _>>()?;
    if sets.is_empty() {
        return Err(format!("{file}: a line `// Variants: DTYPE=…` must say what it is compiled for"));
    }
    Ok(sets)
}

/// The variants as the text of a Rust slice.
fn write_variants(sets: &[Variants]) -> String {
    let axis = |(option, values): &(String, Vec<String>)| format!("({option:?}, &{values:?})");
    let set = |set: &Variants| format!("&[{}]", set.iter().map(axis).collect::<Vec<_>>().join(", "));
    format!("[{}]", sets.iter().map(set).collect::<Vec<_>>().join(", "))
}

/// The 64-bit FNV-1a hash of a text.
pub fn fnv1a(text: &str) -> u64 {
    text.bytes().fold(0xcbf2_9ce4_8422_2325, |hash, byte| (hash ^ byte as u64).wrapping_mul(0x0000_0100_0000_01b3))
}

/// Checks the length of a file's lines.
pub fn check_lines(file: &str, text: &str) -> Result<(), String> {
    match text.lines().position(|line| line.chars().count() > LINE) {
        Some(index) => Err(format!("{file}:{}: the line is longer than {LINE} characters", index + 1)),
        None => Ok(()),
    }
}

/// The kernels of a source. Their names start with the file's, their parameters are ordered outputs, inputs, values.
pub fn parse_signatures(file: &str, text: &str) -> Result<Vec<Signature>, String> {
    let stem = file.trim_end_matches(".cu");
    let declared = declarations(text, &scalar_bytes).map_err(|why| format!("{file}: {why}"))?;
    let signature = |declaration: signature::Declaration| {
        let kernel = declaration.kernel;
        if kernel != stem && !kernel.starts_with(&format!("{stem}_")) {
            return Err(format!("{file}: kernel `{kernel}` must be named `{stem}_…`"));
        }
        // All values rank alike.
        let rank = |kind: Kind| if let Kind::Scalar { .. } = kind { Kind::Scalar { bytes: 0 } } else { kind };
        let mut parameters: Vec<(String, Kind)> = Vec::new();
        for parameter in declaration.parameters {
            if parameters.last().is_some_and(|(_, last)| rank(*last) > rank(parameter.kind)) {
                let text = parameter.text;
                return Err(format!("{file}: `{text}` of `{kernel}`: the order is outputs, inputs, sizes, scalars"));
            }
            parameters.push((parameter.name, parameter.kind));
        }
        Ok(Signature { kernel, parameters })
    };
    declared.into_iter().map(signature).collect()
}

/// The faults that kernels report, as an enum: from the constants `FAULT_NAME = code` of a header.
pub fn parse_faults(header: &str) -> Result<Vec<(String, i64)>, String> {
    let constants = header.lines().filter_map(|line| line.trim().strip_prefix("constexpr i64 FAULT_"));
    let entries = constants.flat_map(|line| line.trim_end_matches(';').split(',').map(str::trim).collect::<Vec<_>>());
    let fault = |entry: &str| {
        let entry = entry.strip_prefix("FAULT_").unwrap_or(entry);
        let (name, code) =
            entry.split_once('=').ok_or_else(|| format!("`{entry}` is not written FAULT_NAME = code"))?;
        let code: i64 = code.trim().parse().map_err(|_| format!("the code of `{entry}` is not a number"))?;
        let capitalised = |word: &str| word[..1].to_uppercase() + &word[1..].to_lowercase();
        let words = name.trim().split('_').filter(|word| !word.is_empty());
        Ok((words.map(capitalised).collect::<String>(), code))
    };
    let faults = entries.into_iter().map(fault).collect::<Result<Vec<_>, String>>()?;
    match faults.iter().enumerate().find(|(at, (_, code))| *code == 0 || faults[..*at].iter().any(|f| f.1 == *code)) {
        Some((_, (name, code))) => Err(format!("fault `{name}`: the code {code} is taken")),
        None if faults.is_empty() => Err("no line `constexpr i64 FAULT_NAME = code;`".into()),
        None => Ok(faults),
    }
}

/// The text of `faults.rs`.
fn write_faults(faults: &[(String, i64)]) -> String {
    let variants: Vec<_> = faults.iter().map(|(name, code)| format!("    {name} = {code},\n")).collect();
    let arms: Vec<_> =
        faults.iter().map(|(name, code)| format!("            {code} => Some(Self::{name}),\n")).collect();
    format!(
        "/// A fault that a kernel reports.\n#[derive(Clone, Copy, PartialEq, Eq, Debug)]\npub(crate) enum Fault {{\n{}}}\n\n\
         impl Fault {{\n    /// The fault with this code.\n    pub fn from_code(code: i64) -> Option<Self> {{\n        \
         match code {{\n{}            _ => None,\n        }}\n    }}\n}}\n",
        variants.concat(),
        arms.concat()
    )
}
