//! Tests of the part of `build.rs` that reads the CUDA sources.

#[allow(dead_code)]
#[path = "../build.rs"]
mod build;

use build::{Kind, check_lines, flatten, fnv1a, parse_signatures, parse_variants};

/// Flattens the first of some files given as name and text.
fn flatten_files(files: &[(&str, &str)]) -> Result<String, String> {
    let read = |name: &str| files.iter().find(|(file, _)| *file == name).map(|(_, text)| text.to_string());
    flatten(files[0].0, &read)
}

#[test]
fn include_is_written_out_with_line_numbers() {
    let text = flatten_files(&[("a.cu", "one\n#include \"b.cuh\"\nthree\n"), ("b.cuh", "two\n")]).unwrap();
    assert_eq!(text, "#line 1 \"a.cu\"\none\n#line 1 \"b.cuh\"\ntwo\n#line 3 \"a.cu\"\nthree\n");
}

#[test]
fn include_through_two_ways_comes_once() {
    let text = flatten_files(&[
        ("a.cu", "#include \"b.cuh\"\n#include \"c.cuh\"\n"),
        ("b.cuh", "#include \"d.cuh\"\n"),
        ("c.cuh", "#include \"d.cuh\"\n"),
        ("d.cuh", "shared\n"),
    ])
    .unwrap();
    assert_eq!(text.matches("shared").count(), 1);
}

#[test]
fn include_that_is_missing_names_both_files() {
    let error = flatten_files(&[("a.cu", "#include \"b.cuh\"\n")]).unwrap_err();
    assert_eq!(error, "a.cu includes \"b.cuh\", which is not in kernels/");
}

#[test]
fn include_cycle_is_shown() {
    let error = flatten_files(&[
        ("a.cu", "#include \"b.cuh\"\n"),
        ("b.cuh", "#include \"c.cuh\"\n"),
        ("c.cuh", "#include \"b.cuh\"\n"),
    ])
    .unwrap_err();
    assert_eq!(error, "includes form a cycle: a.cu -> b.cuh -> c.cuh -> b.cuh");
}

#[test]
fn include_from_the_toolkit_is_refused() {
    let error = flatten_files(&[("a.cu", "\n#include <cuda_fp16.h>\n")]).unwrap_err();
    assert!(error.starts_with("a.cu:2: expected #include \"file.cuh\""), "{error}");
}

#[test]
fn hash_is_fnv1a_and_follows_included_text() {
    assert_eq!(fnv1a(""), 0xcbf2_9ce4_8422_2325);
    assert_eq!(fnv1a("foobar"), 0x8594_4171_f739_67e8);
    let hash = |header: &str| fnv1a(&flatten_files(&[("a.cu", "#include \"b.cuh\"\n"), ("b.cuh", header)]).unwrap());
    assert_ne!(hash("two\n"), hash("2\n"));
}

#[test]
fn long_lines_are_named() {
    let text = format!("short\n{}\n", "é".repeat(120));
    assert_eq!(check_lines("a.cu", &text), Ok(()));
    let error = check_lines("a.cu", &text.replace("short", &"x".repeat(121))).unwrap_err();
    assert_eq!(error, "a.cu:1: the line is longer than 120 characters");
}

/// Parameters that several kernels share are macros, which may name others and take several lines.
#[test]
fn macros_of_parameters_are_written_out() {
    let text = "#define INNER i32 past\n#define SHARED const T* x, INNER, \\\n    f64 scale // both\n#define CALL(x) x\n\
        extern \"C\" __global__ void a_fwd(T* y, SHARED, u64 SHARED_seed) {}\n";
    let signatures = parse_signatures("a.cu", text).unwrap();
    let names: Vec<_> = signatures[0].parameters.iter().map(|(name, _)| name.as_str()).collect();
    assert_eq!(names, ["y", "x", "past", "scale", "SHARED_seed"]);
}

#[test]
fn signatures_have_names_and_kinds() {
    let text = "// extern \"C\" __global__ void a_comment(T* x)\n\
        extern \"C\" __global__ void a_fwd(T* y, const T *x,\n    Layout layout, i64 rows, u32 n, f64 p) { }\n\
        extern \"C\" __global__ void __launch_bounds__(256) a_bwd() {}\n";
    let signatures = parse_signatures("a.cu", text).unwrap();
    let kernels: Vec<_> = signatures.iter().map(|signature| signature.kernel.as_str()).collect();
    assert_eq!(kernels, ["a_fwd", "a_bwd"]);
    let scalar = |bytes| Kind::Scalar { bytes };
    let expected = [
        ("y", Kind::Output),
        ("x", Kind::Input),
        ("layout", scalar(88)),
        ("rows", scalar(8)),
        ("n", scalar(4)),
        ("p", scalar(8)),
    ];
    assert_eq!(signatures[0].parameters, expected.map(|(name, kind)| (name.to_string(), kind)));
    assert!(signatures[1].parameters.is_empty());
}

#[test]
fn variants_are_the_combinations_of_options() {
    let text = "// a kernel\n// Variants: DTYPE=f32,bf16 INDEX=u32\n// Variants: DTYPE=f64\n";
    let axis =
        |name: &str, values: &[&str]| (name.to_string(), values.iter().map(|v| v.to_string()).collect::<Vec<_>>());
    let expected = vec![vec![axis("DTYPE", &["f32", "bf16"]), axis("INDEX", &["u32"])], vec![axis("DTYPE", &["f64"])]];
    assert_eq!(parse_variants("a.cu", text, text), Ok(expected));
    let rows = "#define ROW(name)\nROW(a, 1)\nMARKED_ROW(b, 2)\n";
    let of = |names: &[&str]| Ok(vec![vec![("F".to_string(), names.iter().map(|x| x.to_string()).collect())]]);
    assert_eq!(parse_variants("a.cu", "// Variants: F=ROW(*)\n", rows), of(&["a", "b"]));
    assert_eq!(parse_variants("a.cu", "// Variants: F=MARKED_ROW(*)\n", rows), of(&["b"]));
    assert!(parse_variants("a.cu", "// Variants: F=OTHER(*)\n", rows).is_err());
    let types = "// Types: FLOATS=f32,f64 HALVES=f16\n";
    assert_eq!(parse_variants("a.cu", "// Variants: F=HALVES,i64,FLOATS\n", types), of(&["f16", "i64", "f32", "f64"]));
    let error = parse_variants("a.cu", "// Variants: DTYPE\n", "").unwrap_err();
    assert_eq!(error, "a.cu: `DTYPE` of its variants is not written OPTION=value,value");
    let error = parse_variants("a.cu", "// a kernel\n", "").unwrap_err();
    assert_eq!(error, "a.cu: a line `// Variants: DTYPE=…` must say what it is compiled for");
}

#[test]
fn signatures_that_break_a_rule_are_refused() {
    let error = |text: &str| parse_signatures("a.cu", text).unwrap_err();
    let message = error("extern \"C\" __global__ void b_fwd(T* y) {}");
    assert_eq!(message, "a.cu: kernel `b_fwd` must be named `a_…`");
    let message = error("__global__ void a_fwd(T* y) {}");
    assert!(message.contains("is not declared as `extern \"C\" __global__ void name(parameters)`"), "{message}");
    let message = error("extern \"C\" __global__ void a_fwd(const T* x, T* y) {}");
    assert_eq!(message, "a.cu: `T* y` of `a_fwd`: the order is outputs, inputs, sizes, scalars");
    let message = error("extern \"C\" __global__ void a_fwd(T* y, T scale) {}");
    assert!(message.starts_with("a.cu: `T scale` of `a_fwd` is neither a pointer nor one of"), "{message}");
}
