//! The embedded CUDA sources: how `build.rs` reads them, what they compute when a host compiler builds them, and
//! whether NVRTC accepts them.

#[allow(dead_code)]
#[path = "../build.rs"]
mod build;

use std::io::Write;

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
    assert_eq!(parse_variants("a.cu", text), Ok(expected));
    let error = parse_variants("a.cu", "// Variants: DTYPE\n").unwrap_err();
    assert_eq!(error, "a.cu: `DTYPE` of its variants is not written OPTION=value,value");
    let error = parse_variants("a.cu", "// a kernel\n").unwrap_err();
    assert_eq!(error, "a.cu: a line `// Variants: DTYPE=…` must say what it is compiled for");
}

#[test]
fn signatures_that_break_a_rule_are_refused() {
    let error = |text: &str| parse_signatures("a.cu", text).unwrap_err();
    let message = error("extern \"C\" __global__ void b_fwd(T* y) {}");
    assert_eq!(message, "a.cu: kernel `b_fwd` must be named `a_…`");
    let message = error("__global__ void a_fwd(T* y) {}");
    assert!(message.contains("is not written as `extern \"C\" __global__ void name(parameters)`"), "{message}");
    let message = error("extern \"C\" __global__ void a_fwd(const T* x, T* y) {}");
    assert_eq!(message, "a.cu: `T* y` of `a_fwd`: the order is outputs, inputs, sizes, scalars");
    let message = error("extern \"C\" __global__ void a_fwd(T* y, T scale) {}");
    assert!(message.starts_with("a.cu: `T scale` of `a_fwd` is neither a pointer nor one of"), "{message}");
}

/// Notes a test that could not run; fails where the environment promises what it needs.
fn skip(test: &str, reason: &str, promise: &str) {
    assert!(std::env::var(promise).as_deref() != Ok("1"), "{test}: {reason}, but {promise}=1 promises it");
    // Straight to the stream: the harness hides what a passing test prints.
    let _ = writeln!(std::io::stderr(), "skipped: {test}: {reason}");
}

/// Kernels built by a host compiler and run on the CPU.
mod on_the_host {
    use std::{
        io::Write,
        path::{Path, PathBuf},
        process::{Command, Stdio},
    };

    use half::bf16;
    use x_transformers::Philox;

    /// A kernel source with a `main` that reads the inputs from standard input and writes the outputs.
    struct Program(PathBuf);

    impl Program {
        /// `None`, with a note, if there is no host compiler.
        fn build(test: &str, source: &str, dtype: &str, main: &str) -> Option<Self> {
            let kernels = Path::new(env!("CARGO_MANIFEST_DIR")).join("kernels");
            let text = super::flatten(source, &|name| std::fs::read_to_string(kernels.join(name)).ok()).unwrap();
            // host.h stands in for the PTX.
            let (before, rest) = text.split_once("#line 1 \"ptx.cuh\"\n").unwrap();
            let (_, after) = rest.split_once("\n#line").unwrap();
            let text = format!("{before}#line{after}");
            let program = Path::new(env!("CARGO_TARGET_TMPDIR")).join(format!("{test}_{dtype}"));
            let code = program.with_extension("cpp");
            std::fs::write(&code, format!("#include \"host.h\"\n{text}\nint main() {{\n{main}\n}}\n")).unwrap();
            let compiler = std::env::var("CXX").unwrap_or_else(|_| "g++".into());
            let built = Command::new(&compiler)
                .args(["-std=c++20", "-O1", "-pthread", "-ffp-contract=off"])
                .arg(format!("-DDTYPE={dtype}"))
                .arg("-I")
                .arg(Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/kernel_sources"))
                .arg("-o")
                .args([&program, &code])
                .output();
            match built {
                Ok(built) => {
                    assert!(built.status.success(), "{test}: {}", String::from_utf8_lossy(&built.stderr));
                    Some(Self(program))
                }
                Err(error) => {
                    super::skip(test, &format!("no host compiler ({compiler}: {error})"), "XT_REQUIRE_GXX");
                    None
                }
            }
        }

        fn run<I: bytemuck::Pod, O: bytemuck::Pod>(&self, input: &[I]) -> Vec<O> {
            let mut child =
                Command::new(&self.0).stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().expect("the program starts");
            child.stdin.take().unwrap().write_all(bytemuck::cast_slice(input)).unwrap();
            let output = child.wait_with_output().unwrap();
            assert!(output.status.success(), "{} ended with {}", self.0.display(), output.status);
            elements(&output.stdout)
        }
    }

    fn elements<E: bytemuck::Pod>(bytes: &[u8]) -> Vec<E> {
        bytes.chunks_exact(size_of::<E>()).map(bytemuck::pod_read_unaligned).collect()
    }

    /// The known-answer vectors that the authors of Philox publish with their reference implementation.
    #[test]
    fn philox_published_vectors() {
        let main = "const u32* v = input<u32>(18);
            for (int n = 0; n < 3; ++n, v += 6) output(philox4x32({{v[0], v[1], v[2], v[3]}}, v[4], v[5]).word, 4);";
        let Some(program) = Program::build("philox_published_vectors", "dropout.cu", "f32", main) else { return };
        let (pi, ones) =
            ([0x243f_6a88, 0x85a3_08d3, 0x1319_8a2e, 0x0370_7344, 0xa409_3822, 0x299f_31d0], [u32::MAX; 6]);
        let words: Vec<u32> = program.run(&[[0; 6], ones, pi].concat());
        let expected = [
            [0x6627_e8d5, 0xe169_c58d, 0xbc57_ac4c, 0x9b00_dbd8],
            [0x408f_276d, 0x41c8_3b0e, 0xa20b_c7c6, 0x6d54_51fd],
            [0xd16c_fe09, 0x94fd_cceb, 0x5001_e420, 0x2412_6ea1],
        ];
        assert_eq!(words, expected.concat());
    }

    /// A kernel draws the numbers that the CPU draws.
    #[test]
    fn dropout_keeps_what_the_library_keeps() {
        const N: usize = 1003;
        let (seed, stream, threshold) = (0x1234_5678_9abc_def0, 0xfedc_ba98_7654_3210, Philox::drop_threshold(0.3));
        let main = format!(
            "T* x = input<T>({N});
            launch(2, {{32, 1}}, [&] {{ dropout_mask(x, x, {N}, {seed}u, {stream}u, {threshold}u, 1); }});
            output(x, {N});"
        );
        let random = Philox::new(seed, stream);
        let kept: Vec<f64> = (0..N as u64).map(|i| random.keeps(i, threshold) as u8 as f64).collect();
        for dtype in ["f32", "f64", "bf16"] {
            let test = "dropout_keeps_what_the_library_keeps";
            let Some(program) = Program::build(test, "dropout.cu", dtype, &main) else { return };
            let bytes: Vec<u8> = program.run(&narrow(dtype, &[1.0; N]));
            assert_eq!(widen(dtype, &bytes), kept, "{dtype}");
        }
    }

    /// Rounding to bf16 on cards without the instruction.
    #[test]
    fn bf16_rounds_to_nearest_even() {
        let main = "const f32* in = input<f32>(200000); bf16* out = room<bf16>(200000);
            for (int i = 0; i < 200000; ++i) out[i] = Element<bf16>::from_acc(in[i]);
            output(out, 200000);";
        let Some(program) = Program::build("bf16_rounds_to_nearest_even", "softmax.cu", "bf16", main) else { return };
        let random = Philox::new(1, 0);
        let mut values: Vec<f32> = (0..200_000).map(|i| f32::from_bits(random.word(i))).collect();
        // Ties in both directions, the largest number (rounds to infinity), infinities, zeros and NaN.
        let edges = [0x3f80_8000, 0x3f81_8000, 0x7f7f_ffff, 0x7f80_0000, 0xff80_0000, 0, 0x8000_0000, 1, 0x7f80_0001];
        values[..9].copy_from_slice(&edges.map(f32::from_bits));
        let rounded: Vec<u16> = program.run(&values);
        for (x, bits) in values.iter().zip(rounded) {
            let expected = if x.is_nan() { 0x7fff } else { bf16::from_f32(*x).to_bits() };
            assert_eq!(bits, expected, "{x:e}");
        }
    }

    /// A layout as the launch passes it.
    fn layout_bytes(dims: &[u32], strides: &[i64], offset: i64) -> Vec<u8> {
        let padded = |n: usize| dims.get(n).copied().unwrap_or(0);
        let words = [[dims.len() as u32].to_vec(), (0..6).map(padded).collect(), vec![0]].concat();
        let steps = (0..6).map(|n| strides.get(n).copied().unwrap_or(0)).chain([offset]);
        words.iter().flat_map(|word| word.to_le_bytes()).chain(steps.flat_map(i64::to_le_bytes)).collect()
    }

    #[test]
    fn copy_follows_strides() {
        let main = "const Layout* layout = input<Layout>(1); const i64* sizes = input<i64>(2);
            const T* x = input<T>(sizes[0]); T* y = room<T>(sizes[1]);
            const Layout packed = {1, {(u32)sizes[1]}, 0, {1}, 0};
            launch(2, {32, 1}, [&] { copy_strided(y, x, packed, *layout, sizes[1]); });
            output(y, sizes[1]);";
        // Dims, strides, offset: transposed, sliced with packed rows, broadcast, in whole packets, packed, one element.
        type Case<'a> = (&'a [u32], &'a [i64], i64);
        let cases: [Case; 7] = [
            (&[4, 3, 5], &[1, 4, 12], 0),
            (&[3, 5], &[9, 1], 4),
            (&[2, 3, 7], &[0, 7, 1], 0),
            (&[3, 32], &[48, 1], 16),
            (&[2, 2, 16], &[64, 0, 1], 32),
            (&[97], &[1], 0),
            (&[], &[], 3),
        ];
        for (dtype, bytes) in [("bf16", 2), ("bool", 1), ("f64", 8)] {
            let Some(program) = Program::build("copy_follows_strides", "copy.cu", dtype, main) else { return };
            for (dims, strides, offset) in cases {
                let limit = if dtype == "bool" { 2 } else { 251 };
                let storage: Vec<u8> = (0..bytes * 200).map(|i| (i * i / 3 % limit) as u8).collect();
                let n: u32 = dims.iter().product();
                let sizes = [200i64, n as i64].map(i64::to_le_bytes).concat();
                let packed: Vec<u8> =
                    program.run(&[layout_bytes(dims, strides, offset), sizes, storage.clone()].concat());
                let expected = (0..n as i64).flat_map(|mut i| {
                    let mut at = offset;
                    for (&dim, &stride) in dims.iter().zip(strides).rev() {
                        at += i % dim as i64 * stride;
                        i /= dim as i64;
                    }
                    storage[at as usize * bytes..][..bytes].to_vec()
                });
                assert!(packed.iter().copied().eq(expected), "{dtype} {dims:?} {strides:?} {offset}");
            }
        }
    }

    /// Widens the elements of a dtype.
    fn widen(dtype: &str, bytes: &[u8]) -> Vec<f64> {
        match dtype {
            "f32" => elements::<f32>(bytes).into_iter().map(f64::from).collect(),
            "bf16" => elements::<bf16>(bytes).into_iter().map(f64::from).collect(),
            _ => elements(bytes),
        }
    }

    fn narrow(dtype: &str, values: &[f64]) -> Vec<u8> {
        let bytes = |x: &f64| match dtype {
            "f32" => (*x as f32).to_le_bytes().to_vec(),
            "bf16" => bf16::from_f64(*x).to_le_bytes().to_vec(),
            _ => x.to_le_bytes().to_vec(),
        };
        values.iter().flat_map(bytes).collect()
    }

    /// `softmax(x)`, then its gradient for `g`, from the formula.
    fn softmax(x: &[f64], g: &[f64], columns: usize) -> Vec<f64> {
        let (mut y, mut dx) = (Vec::new(), Vec::new());
        for (x, g) in x.chunks(columns).zip(g.chunks(columns)) {
            let max = x.iter().copied().fold(f64::NEG_INFINITY, f64::max);
            let sum: f64 = x.iter().map(|x| (x - max).exp()).sum();
            let row: Vec<f64> = x.iter().map(|x| (x - max).exp() / sum).collect();
            let dot: f64 = row.iter().zip(g).map(|(y, g)| y * g).sum();
            dx.extend(row.iter().zip(g).map(|(y, g)| y * (g - dot)));
            y.extend(row);
        }
        [y, dx].concat()
    }

    #[test]
    fn softmax_equals_its_formula() {
        const ROWS: usize = 5;
        let main = format!(
            "const i64* sizes = input<i64>(3);
            const i64 columns = sizes[0], n = {ROWS} * columns; const unsigned wide = sizes[1], high = sizes[2];
            T *x = input<T>(n), *g = input<T>(n), *y = room<T>(n);
            launch(2, {{wide, high}}, [&] {{ softmax_fwd(y, x, {ROWS}, columns); }});
            launch(2, {{wide, high}}, [&] {{ softmax_bwd(g, y, g, {ROWS}, columns); }});
            output(y, n); output(g, n);"
        );
        let (lowest, random) = (bf16::MIN.to_f64(), Philox::new(3, 1));
        for (dtype, bound) in [("f32", 3e-6), ("f64", 1e-14), ("bf16", 1e-2)] {
            let Some(program) = Program::build("softmax_equals_its_formula", "softmax.cu", dtype, &main) else {
                return;
            };
            // A warp per row, two rows a block; and a block of two warps per row.
            for (columns, wide, high) in [(1, 32, 2), (7, 32, 2), (64, 32, 2), (203, 64, 1), (1040, 64, 1)] {
                let draw = |i: usize| bf16::from_f64(8.0 * random.uniform(i as u64) - 4.0).to_f64();
                let mut x: Vec<f64> = (0..ROWS * columns).map(draw).collect();
                let g: Vec<f64> = (0..ROWS * columns).map(|i| draw(i + 10_000)).collect();
                // A row that a mask filled, a row with a single value that counts, and one that starts with -inf.
                x[..columns].fill(lowest);
                x[columns..2 * columns - 1].fill(f64::NEG_INFINITY);
                x[2 * columns..3 * columns - 1].iter_mut().step_by(3).for_each(|x| *x = f64::NEG_INFINITY);
                let sizes = [columns as i64, wide, high].map(i64::to_le_bytes).concat();
                let bytes: Vec<u8> = program.run(&[sizes, narrow(dtype, &x), narrow(dtype, &g)].concat());
                let expected = softmax(&x, &g, columns);
                for (half, (actual, expected)) in
                    widen(dtype, &bytes).chunks(ROWS * columns).zip(expected.chunks(ROWS * columns)).enumerate()
                {
                    let norm = expected.iter().map(|e| e * e).sum::<f64>().sqrt().max(1e-3);
                    let error = actual.iter().zip(expected).map(|(a, e)| (a - e).powi(2)).sum::<f64>().sqrt() / norm;
                    assert!(error <= bound, "{dtype} [{ROWS}, {columns}] half {half}: relative error {error:e}");
                }
            }
        }
    }
}
