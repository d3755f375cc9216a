//! Every kernel, for every variant, compiled by the real NVRTC to machine code for three generations of cards: without a
//! warning, without spilled registers where it matters, and with the use of registers and memory that
//! `kernels/resources.tsv` records.
//!
//! NVRTC needs no GPU; the PyPI package `nvidia-cuda-nvrtc` is enough, found through `XT_CUDA_LIBS` or a Python on `PATH`.
//! Without it the test is skipped by name, unless `XT_REQUIRE_NVRTC=1`. `XT_BLESS=1` writes the table anew. With another
//! version than the table's, `XT_CUDA_LIBS=$(scripts/install-nvrtc oldest)` for instance, registers are not compared.

#![cfg(feature = "cuda")]

use std::{collections::BTreeMap, fmt::Write as _, fs, io::Write as _, path::Path};

use rayon::prelude::*;
use x_transformers::device::{
    cuda::{Architecture, compile, nvrtc_version},
    kernels::{KernelSource, LAB_SIGNATURES, LAB_SOURCES, Options, SIGNATURES, SOURCES, Signature},
};

const ARCHITECTURES: [Architecture; 3] = [75, 80, 90];

/// The cards to compile for: those of `XT_ARCHITECTURES`, for instance `80`, or all.
fn architectures() -> Vec<Architecture> {
    match std::env::var("XT_ARCHITECTURES") {
        Ok(list) => list.split(',').map(|one| one.parse().expect("XT_ARCHITECTURES=80,90 or the like")).collect(),
        Err(_) => ARCHITECTURES.to_vec(),
    }
}

/// The shipped sources, and the rungs below them.
fn sources() -> impl Iterator<Item = &'static KernelSource> {
    SOURCES.iter().chain(LAB_SOURCES)
}

fn signatures_of(source: &KernelSource) -> impl Iterator<Item = &'static Signature> {
    SIGNATURES.iter().chain(LAB_SIGNATURES).filter(|signature| signature.file == source.name)
}

/// What one kernel of a variant takes on one card.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
struct Resources {
    registers: u32,
    /// Bytes of registers that did not fit, written and read.
    spills: u32,
    /// Bytes of shared memory that the source declares.
    shared: u32,
}

/// Kernel and options, then card.
type Table = BTreeMap<(String, Architecture), Resources>;

/// Compiles one variant for one card.
fn compile_variant(source: &KernelSource, options: &Options, architecture: Architecture) -> Result<Table, String> {
    let what = format!("{} {options:?} sm_{architecture}", source.name);
    let compiled = compile(source, options, architecture, true).map_err(|error| format!("{what}: {error}"))?;
    if compiled.log.contains("warning") {
        return Err(format!("{what}: {}", compiled.log));
    }
    let table = parse(&compiled.log, options, architecture);
    let kernels = signatures_of(source).count();
    if table.len() != kernels {
        return Err(format!("{what}: {} kernels were reported, {kernels} are declared\n{}", table.len(), compiled.log));
    }
    Ok(table)
}

/// Reads what `--ptxas-options=-v` printed.
fn parse(log: &str, options: &Options, architecture: Architecture) -> Table {
    let options: String = options.iter().map(|(name, value)| format!(" {name}={value}")).collect();
    let mut table = Table::new();
    let mut entry = None;
    for line in log.lines() {
        if let Some((_, rest)) = line.split_once("Compiling entry function '") {
            let kernel = rest.split('\'').next().unwrap_or_default();
            let key = (format!("{kernel}{options}"), architecture);
            table.insert(key.clone(), Resources::default());
            entry = Some(key);
        }
        let Some(resources) = entry.as_ref().and_then(|entry| table.get_mut(entry)) else { continue };
        let before = |what: &str| -> u32 {
            let number = |at: usize| line[..at].trim_end().rsplit(|c: char| !c.is_ascii_digit()).next()?.parse().ok();
            line.find(what).and_then(number).unwrap_or(0)
        };
        resources.registers = resources.registers.max(before(" registers"));
        resources.shared = resources.shared.max(before(" bytes smem"));
        resources.spills = resources.spills.max(before(" bytes spill stores") + before(" bytes spill loads"));
    }
    table
}

/// The table as text: a line per kernel and variant, a column per card.
fn write(table: &Table, version: (i32, i32)) -> String {
    let mut text = format!(
        "# Registers/spilled bytes/bytes of shared memory, by NVRTC {}.{}; made by XT_BLESS=1 cargo test --test \
         kernels_compile\n# kernel and options",
        version.0, version.1
    );
    architectures().iter().for_each(|architecture| write!(text, "\tsm_{architecture}").expect("memory"));
    text.push('\n');
    let mut rows: BTreeMap<&str, String> = BTreeMap::new();
    for ((kernel, _), Resources { registers, spills, shared }) in table {
        write!(rows.entry(kernel).or_default(), "\t{registers}/{spills}/{shared}").expect("memory");
    }
    rows.iter().for_each(|(kernel, columns)| writeln!(text, "{kernel}{columns}").expect("memory"));
    text
}

#[test]
fn kernels_compile_for_every_card_and_variant() {
    let version = match nvrtc_version() {
        Ok(version) => version,
        Err(error) => {
            assert!(std::env::var("XT_REQUIRE_NVRTC").as_deref() != Ok("1"), "XT_REQUIRE_NVRTC=1, but {error}");
            // Straight to the stream: the harness hides what a passing test prints.
            let _ = writeln!(std::io::stderr(), "skipped: kernels_compile_for_every_card_and_variant: {error}");
            return;
        }
    };
    let filter = std::env::var("XT_KERNEL").unwrap_or_default();
    let jobs: Vec<(&KernelSource, Options, Architecture)> = sources()
        .filter(|source| source.name.contains(&filter))
        .flat_map(|source| source.options().into_iter().map(move |options| (source, options)))
        .flat_map(|(source, options)| {
            architectures().into_iter().map(move |architecture| (source, options.clone(), architecture))
        })
        .collect();
    let compiled: Vec<Result<Table, String>> = jobs
        .par_iter()
        .map(|(source, options, architecture)| compile_variant(source, options, *architecture))
        .collect();
    let (mut table, mut failures) = (Table::new(), Vec::new());
    for compiled in compiled {
        match compiled {
            Ok(part) => table.extend(part),
            Err(failure) => failures.push(failure),
        }
    }
    assert!(failures.is_empty(), "{}", failures.join("\n"));
    let text = write(&table, version);
    println!("{text}");
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("kernels/resources.tsv");
    if std::env::var("XT_BLESS").as_deref() == Ok("1") {
        assert!(
            filter.is_empty() && architectures() == ARCHITECTURES,
            "XT_BLESS=1 needs every kernel and card, without XT_KERNEL and XT_ARCHITECTURES"
        );
        fs::write(&path, &text).expect("a table that can be written");
    }
    let recorded = fs::read_to_string(&path).expect("the table kernels/resources.tsv");
    // Another compiler allots registers in another way.
    if recorded.lines().next() == text.lines().next() {
        let spilled = table.iter().filter(|((_, architecture), resources)| *architecture >= 80 && resources.spills > 0);
        let spilled: Vec<_> =
            spilled.map(|((kernel, architecture), _)| format!("{kernel} sm_{architecture}")).collect();
        assert!(spilled.is_empty(), "registers are spilled by {}", spilled.join(", "));
        let lost = recorded.lines().filter(|line| line.contains(&filter) && !text.lines().any(|new| new == *line));
        let new = text.lines().filter(|line| !recorded.lines().any(|old| old == *line));
        let changes: Vec<_> = lost.map(|line| format!("- {line}")).chain(new.map(|line| format!("+ {line}"))).collect();
        assert!(
            !filter.is_empty() || architectures() != ARCHITECTURES || changes.is_empty(),
            "the use of registers or memory has changed; if it is right so, XT_BLESS=1 records it:\n{}",
            changes.join("\n")
        );
    }
}

#[test]
fn every_kernel_has_a_signature() {
    for source in sources() {
        let kernels = signatures_of(source).count();
        assert_eq!(kernels, source.source.matches("__global__").count(), "{}", source.name);
    }
    let softmax = SIGNATURES.iter().find(|signature| signature.kernel == "softmax_bwd").expect("the kernel");
    let names: Vec<_> = softmax.parameters.iter().map(|parameter| parameter.name).collect();
    assert_eq!(names, ["dx", "y", "g", "rows", "columns"]);
}

#[test]
fn resources_are_read_from_the_log() {
    let log = "ptxas info    : 0 bytes gmem\n\
        ptxas info    : Compiling entry function 'a_fwd' for 'sm_80'\n\
        ptxas info    : Function properties for a_fwd\n\
        \x20   24 bytes stack frame, 16 bytes spill stores, 20 bytes spill loads\n\
        ptxas info    : Used 38 registers, used 1 barriers, 144 bytes smem, 376 bytes cmem[0]\n\
        ptxas info    : Compiling entry function 'a_bwd' for 'sm_80'\n\
        ptxas info    : Used 12 registers, 376 bytes cmem[0]\n";
    let table = parse(log, &vec![("DTYPE", "f32")], 80);
    let of = |kernel: &str| table[&(format!("{kernel} DTYPE=f32"), 80)];
    assert_eq!(of("a_fwd"), Resources { registers: 38, spills: 36, shared: 144 });
    assert_eq!(of("a_bwd"), Resources { registers: 12, spills: 0, shared: 0 });
    assert_eq!(write(&table, (13, 0)).lines().nth(2), Some("a_bwd DTYPE=f32\t12/0/0"));
}
