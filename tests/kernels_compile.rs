//! Every kernel, in every variant, compiled by the real NVRTC to machine code: without a warning, with the registers
//! and memory that `kernels/resources.tsv` records, and without more spilled registers than it lists. CI compiles each
//! variant for one of two cards; one command compiles for all cards:
//!
//!     XT_ARCHITECTURES=all XT_CUDA_LIBS=$(scripts/install-nvrtc) cargo test --release --test kernels_compile
//!
//! `XT_ARCHITECTURES=86,90a` selects cards, `XT_KERNEL=attention` sources whose names contain it, `XT_EVERY=3` every third
//! variant of each source, the first one included. NVRTC needs no GPU; the PyPI package `nvidia-cuda-nvrtc` is enough,
//! found through `XT_CUDA_LIBS` or a Python on `PATH`. Without it the test is skipped with a message, unless
//! `XT_REQUIRE_NVRTC=1`. With another version than the table's, for instance `XT_CUDA_LIBS=$(scripts/install-nvrtc oldest)`,
//! registers are not compared.
//!
//! `XT_BLESS=1` updates the table, except for spills that have risen: fix those, or edit the table by hand if they are
//! right.

#![cfg(feature = "cuda")]

use std::{
    collections::{BTreeMap, BTreeSet},
    fmt::Write as _,
    fs,
    io::Write as _,
    path::Path,
};

use rayon::prelude::*;
use x_transformers::device::{
    cuda::{Target, compile, nvrtc_version},
    kernels::{KernelSource, LAB_SIGNATURES, LAB_SOURCES, Options, SIGNATURES, SOURCES, Signature},
};

/// Cards that CI compiles for, each variant for one of them, and whose registers and memory the table has.
const RECORDED: &str = "80,90a";

/// Every card that kernels are compiled for.
const ALL: &str = "75,80,86,89,90,90a,100,120";

fn targets(list: &str) -> Vec<Target> {
    list.split(',').map(|one| one.parse().unwrap_or_else(|why| panic!("XT_ARCHITECTURES: {why}"))).collect()
}

/// Cards to compile a variant for: those of `XT_ARCHITECTURES`, where `all` means every one; those that are recorded for
/// `XT_BLESS=1`; and else one of these.
fn chosen(variant: usize, bless: bool) -> Vec<Target> {
    match std::env::var("XT_ARCHITECTURES").as_deref() {
        Ok("all") => targets(ALL),
        Ok(list) => targets(list),
        Err(_) if bless => targets(RECORDED),
        // The sequence of Thue and Morse: variants that differ in one option alone meet both cards.
        Err(_) => vec![targets(RECORDED)[variant.count_ones() as usize % 2]],
    }
}

/// The shipped sources, and the rungs below them.
fn sources() -> impl Iterator<Item = &'static KernelSource<'static>> {
    SOURCES.iter().chain(LAB_SOURCES)
}

fn signatures_of(source: &KernelSource) -> impl Iterator<Item = &'static Signature> {
    SIGNATURES.iter().chain(LAB_SIGNATURES).filter(|signature| signature.file == source.name)
}

/// Registers and memory of one kernel of a variant on one card.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
struct Resources {
    registers: u32,
    /// Bytes of spilled registers, written and read.
    spills: u32,
    /// Bytes of shared memory that the source declares.
    shared: u32,
}

/// By kernel and options, then by card.
type Table = BTreeMap<String, BTreeMap<Target, Resources>>;

/// A kernel and the options of a variant, as the table names them.
fn row(kernel: &str, options: &Options) -> String {
    options.iter().fold(kernel.to_string(), |row, (name, value)| row + " " + name + "=" + value)
}

/// Compiles one variant for one card.
fn compile_variant(source: &KernelSource, options: &Options, target: Target) -> Result<Table, String> {
    let what = format!("{} {options:?} {target}", source.name);
    let compiled = compile(source, options, target, true).map_err(|error| format!("{what}: {error}"))?;
    if compiled.log.contains("warning") {
        return Err(format!("{what}: {}", compiled.log));
    }
    let table = parse_log(&compiled.log, options, target);
    let kernels = signatures_of(source).count();
    if table.len() != kernels {
        return Err(format!("{what}: {} kernels were reported, {kernels} are declared\n{}", table.len(), compiled.log));
    }
    Ok(table)
}

/// Reads what `--ptxas-options=-v` printed.
fn parse_log(log: &str, options: &Options, target: Target) -> Table {
    let mut table = Table::new();
    let mut entry = None;
    for line in log.lines() {
        if let Some((_, rest)) = line.split_once("Compiling entry function '") {
            let kernel = row(rest.split('\'').next().unwrap_or_default(), options);
            table.entry(kernel.clone()).or_default().insert(target, Resources::default());
            entry = Some(kernel);
        }
        let columns = entry.as_ref().and_then(|entry| table.get_mut(entry));
        let Some(resources) = columns.and_then(|columns| columns.get_mut(&target)) else { continue };
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

/// First line of the table.
fn heading((major, minor): (i32, i32)) -> String {
    format!(
        "# Registers/spilled bytes/bytes of shared memory, by NVRTC {major}.{minor}, and bytes spilled on other cards; made \
         by XT_BLESS=1 cargo test --test kernels_compile"
    )
}

/// The table as text: a line per kernel and variant, a column per recorded card, and one for spills on the others.
fn write(table: &Table, version: (i32, i32)) -> String {
    let mut text = heading(version) + "\n# kernel and options";
    targets(RECORDED).iter().for_each(|target| write!(text, "\t{target}").expect("memory"));
    text.push_str("\tspills elsewhere\n");
    for (kernel, columns) in table {
        text.push_str(kernel);
        for target in targets(RECORDED) {
            let Resources { registers, spills, shared } = columns.get(&target).copied().unwrap_or_default();
            write!(text, "\t{registers}/{spills}/{shared}").expect("memory");
        }
        let elsewhere = columns.iter().filter(|(target, of)| !targets(RECORDED).contains(target) && of.spills > 0);
        let elsewhere: Vec<_> = elsewhere.map(|(target, of)| format!("{target}:{}", of.spills)).collect();
        writeln!(text, "\t{}", if elsewhere.is_empty() { "-".into() } else { elsewhere.join(" ") }).expect("memory");
    }
    text
}

/// Reads what [`write`] wrote; a card that is not there spills nothing.
fn read(text: &str) -> Table {
    let cell = |target: &Target, cell: &str| {
        let numbers: Vec<u32> = cell.split('/').map(|n| n.parse().expect("a number")).collect();
        (*target, Resources { registers: numbers[0], spills: numbers[1], shared: numbers[2] })
    };
    let lines = text.lines().filter(|line| !line.starts_with('#'));
    lines
        .map(|line| {
            let mut cells = line.split('\t');
            let kernel = cells.next().unwrap_or_default().to_string();
            let mut columns: BTreeMap<_, _> =
                targets(RECORDED).iter().zip(&mut cells).map(|(target, text)| cell(target, text)).collect();
            for one in cells.next().unwrap_or("-").split(' ').filter(|one| *one != "-") {
                let (target, spills) = one.split_once(':').expect("card:bytes");
                let spills = spills.parse().expect("a number");
                columns.insert(target.parse().expect("a card"), Resources { spills, ..Resources::default() });
            }
            (kernel, columns)
        })
        .collect()
}

/// Differences between a compiled table and the recorded one.
#[derive(Default, Debug, PartialEq)]
struct Differences {
    /// More spills than recorded; never recorded automatically.
    risen: Vec<String>,
    /// Everything else.
    changed: Vec<String>,
}

fn differences(recorded: &Table, compiled: &Table) -> Differences {
    let mut found = Differences::default();
    for (kernel, columns) in compiled {
        for (target, new) in columns {
            let known = recorded.get(kernel);
            let old = known.and_then(|columns| columns.get(target)).copied().unwrap_or_default();
            if new.spills > old.spills {
                found.risen.push(format!("{kernel} {target}: {} bytes, recorded {}", new.spills, old.spills));
            }
            let changed = if targets(RECORDED).contains(target) { *new != old } else { new.spills < old.spills };
            if known.is_none() || changed {
                found.changed.push(format!("{kernel} {target}: {new:?}, recorded {old:?}"));
            }
        }
    }
    found
}

/// The version of NVRTC, or a note that there is none.
fn compiler(test: &str) -> Option<(i32, i32)> {
    nvrtc_version()
        .inspect_err(|error| {
            assert!(std::env::var("XT_REQUIRE_NVRTC").as_deref() != Ok("1"), "XT_REQUIRE_NVRTC=1, but {error}");
            // Straight to the stream: the harness hides what a passing test prints.
            let _ = writeln!(std::io::stderr(), "skipped: {test}: {error}");
        })
        .ok()
}

/// Compiles the kernels of `examples/own_kernel.rs` with the real NVRTC, which the emulated one only resembles.
#[test]
fn kernels_of_the_example_compile() {
    if compiler("kernels_of_the_example_compile").is_none() {
        return;
    }
    let text = include_str!("../examples/own_kernel.cu");
    let source = KernelSource { name: "own_kernel", hash: 0, source: text, variants: &[] };
    for element in ["float", "double"] {
        let compiled = compile(&source, &[("ELEMENT", element)], Target::of(80), true).expect("compiled");
        let kernels = compiled.log.matches("Compiling entry function 'snake_").count();
        assert_eq!((kernels, compiled.log.contains("warning")), (2, false), "{}", compiled.log);
    }
}

#[test]
fn kernels_compile_for_every_card_and_variant() {
    let Some(version) = compiler("kernels_compile_for_every_card_and_variant") else { return };
    let filter = std::env::var("XT_KERNEL").unwrap_or_default();
    let every = std::env::var("XT_EVERY").map_or(1, |text| text.parse().expect("XT_EVERY: a positive number"));
    let some = |every| {
        sources()
            .flat_map(move |source| source.options().into_iter().step_by(every).map(move |options| (source, options)))
    };
    let variants = || some(1);
    println!("{} of {} variants", some(every).count(), variants().count());
    let bless = std::env::var("XT_BLESS").as_deref() == Ok("1");
    let jobs: Vec<(&KernelSource, Options, Target)> = some(every)
        .filter(|(source, _)| source.name.contains(&filter))
        .enumerate()
        .flat_map(|(at, (source, options))| {
            chosen(at, bless).into_iter().map(move |target| (source, options.clone(), target))
        })
        .collect();
    let outcomes: Vec<Result<Table, String>> =
        jobs.par_iter().map(|(source, options, target)| compile_variant(source, options, *target)).collect();
    let (mut compiled, mut failures) = (Table::new(), Vec::new());
    for outcome in outcomes {
        match outcome {
            Ok(part) => part.into_iter().for_each(|(row, columns)| compiled.entry(row).or_default().extend(columns)),
            Err(failure) => failures.push(failure),
        }
    }
    assert!(failures.is_empty(), "{}", failures.join("\n"));
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("kernels/resources.tsv");
    let text = fs::read_to_string(&path).expect("the table kernels/resources.tsv");
    let recorded = read(&text);
    // Another compiler allocates registers differently.
    if text.lines().next() != Some(&heading(version)) && !bless {
        return println!("{}", write(&compiled, version));
    }
    let Differences { risen, changed } = differences(&recorded, &compiled);
    assert!(risen.is_empty(), "more registers are spilled than kernels/resources.tsv says:\n{}", risen.join("\n"));
    let rows: BTreeSet<String> = variants()
        .flat_map(|(source, options)| signatures_of(source).map(move |signature| row(signature.kernel, &options)))
        .collect();
    if bless {
        let mut table = recorded;
        table.retain(|row, _| rows.contains(row));
        compiled.into_iter().for_each(|(row, columns)| table.entry(row).or_default().extend(columns));
        fs::write(&path, write(&table, version)).expect("a table that can be written");
        return;
    }
    assert!(changed.is_empty(), "if it is right so, XT_BLESS=1 records it:\n{}", changed.join("\n"));
    let old: Vec<_> = recorded.keys().filter(|row| !rows.contains(*row)).cloned().collect();
    assert!(old.is_empty(), "there are no such kernels, which XT_BLESS=1 removes:\n{}", old.join("\n"));
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
    let of = |target: &str| parse_log(log, &vec![("DTYPE", "f32")], targets(target)[0]);
    let mut table = of("80");
    let only = |table: &Table, kernel: &str| *table[&format!("{kernel} DTYPE=f32")].values().next().expect("a card");
    assert_eq!(only(&table, "a_fwd"), Resources { registers: 38, spills: 36, shared: 144 });
    assert_eq!(only(&table, "a_bwd"), Resources { registers: 12, spills: 0, shared: 0 });
    of("86").into_iter().for_each(|(row, columns)| table.entry(row).or_default().extend(columns));
    let text = write(&table, (13, 0));
    let lines: Vec<_> = text.lines().skip(1).collect();
    let expected = ["# kernel and options\tsm_80\tsm_90a\tspills elsewhere", "a_bwd DTYPE=f32\t12/0/0\t0/0/0\t-"];
    assert_eq!((&lines[..2], lines[2]), (&expected[..], "a_fwd DTYPE=f32\t38/36/144\t0/0/0\tsm_86:36"));
    assert_eq!(write(&read(&text), (13, 0)), text);
}

/// A number that rises is detected on every card, and so are one that falls and a new kernel.
#[test]
fn spills_may_only_fall() {
    let heading = "# kernel and options\n";
    let recorded = read(&format!("{heading}a\t38/4/144\t40/0/144\tsm_86:8\n"));
    let kinds = |row: &str| {
        let found = differences(&recorded, &read(&format!("{heading}{row}\n")));
        (found.risen.len(), found.changed.len())
    };
    assert_eq!(kinds("a\t38/4/144\t40/0/144\tsm_86:8"), (0, 0));
    assert_eq!(kinds("a\t38/8/144\t40/4/144\tsm_86:12 sm_89:4"), (4, 2));
    assert_eq!(kinds("a\t38/0/144\t40/0/144\tsm_86:4"), (0, 2));
    assert_eq!(kinds("a\t39/4/144\t40/0/144\tsm_86:8"), (0, 1));
    assert_eq!(kinds("b\t38/0/0\t40/0/0\t-"), (0, 2));
}
