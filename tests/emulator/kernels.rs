//! The kernels of `kernels/`, against f64 references and the library's own generator.

use half::{bf16, f16};
use x_transformers::Philox;

use crate::{
    card::{Buffer, Card, Kernel, arg},
    emulated,
};

fn kernel(card: &Card, file: &str, name: &str, dtype: &str) -> Kernel {
    card.kernel(&format!("#include \"{file}\"\n"), name, &[&format!("-DDTYPE={dtype}")])
}

/// Widens the elements of a dtype.
fn widen(card: &Card, buffer: Buffer, dtype: &str) -> Vec<f64> {
    match dtype {
        "f32" => card.read::<f32>(buffer).into_iter().map(f64::from).collect(),
        "bf16" => card.read::<u16>(buffer).into_iter().map(|bits| bf16::from_bits(bits).to_f64()).collect(),
        "f16" => card.read::<u16>(buffer).into_iter().map(|bits| f16::from_bits(bits).to_f64()).collect(),
        _ => card.read(buffer),
    }
}

fn narrow(values: &[f64], dtype: &str) -> Vec<u8> {
    let bytes = |x: &f64| match dtype {
        "f32" => arg(*x as f32),
        "bf16" => arg(bf16::from_f64(*x).to_bits()),
        "f16" => arg(f16::from_f64(*x).to_bits()),
        _ => arg(*x),
    };
    values.iter().flat_map(bytes).collect()
}

/// `softmax(x)`, then its gradient for `g`, from the formula.
fn softmax(x: &[f64], g: &[f64], columns: usize) -> [Vec<f64>; 2] {
    let (mut y, mut dx) = (Vec::new(), Vec::new());
    for (x, g) in x.chunks(columns).zip(g.chunks(columns)) {
        let max = x.iter().copied().fold(f64::NEG_INFINITY, f64::max);
        let sum: f64 = x.iter().map(|x| (x - max).exp()).sum();
        let row: Vec<f64> = x.iter().map(|x| (x - max).exp() / sum).collect();
        let dot: f64 = row.iter().zip(g).map(|(y, g)| y * g).sum();
        dx.extend(row.iter().zip(g).map(|(y, g)| y * (g - dot)));
        y.extend(row);
    }
    [y, dx]
}

/// A layout as the launch passes it.
fn layout(dims: &[u32], strides: &[i64], offset: i64) -> Vec<u8> {
    let padded = |n: usize| dims.get(n).copied().unwrap_or(0);
    let words = [[dims.len() as u32].to_vec(), (0..6).map(padded).collect(), vec![0]].concat();
    let steps = (0..6).map(|n| strides.get(n).copied().unwrap_or(0)).chain([offset]);
    words.iter().flat_map(|word| word.to_le_bytes()).chain(steps.flat_map(i64::to_le_bytes)).collect()
}

emulated! {
    /// The known-answer vectors that the authors of Philox publish with their reference implementation.
    fn philox_published_vectors() {
        let source = "#include \"random.cu\"\nextern \"C\" __global__ void test(u32* out, const u32* v) {\n\
            out += 4 * threadIdx.x; v += 6 * threadIdx.x;\n\
            const Words words = philox4x32({{v[0], v[1], v[2], v[3]}}, v[4], v[5]);\n\
            for (int i = 0; i < 4; ++i) out[i] = words.word[i]; }";
        let (pi, ones) =
            ([0x243f_6a88u32, 0x85a3_08d3, 0x1319_8a2e, 0x0370_7344, 0xa409_3822, 0x299f_31d0], [u32::MAX; 6]);
        let card = Card::open();
        let (out, input) = (card.empty(48), card.upload(&[[0; 6], ones, pi].concat()));
        let kernel = card.kernel(source, "test", &["-DDTYPE=f32"]);
        card.launch(&kernel, 1, [3, 1, 1], &[arg(out.address), arg(input.address)]);
        let expected = [
            [0x6627_e8d5u32, 0xe169_c58d, 0xbc57_ac4c, 0x9b00_dbd8],
            [0x408f_276d, 0x41c8_3b0e, 0xa20b_c7c6, 0x6d54_51fd],
            [0xd16c_fe09, 0x94fd_cceb, 0x5001_e420, 0x2412_6ea1],
        ];
        assert_eq!(card.read::<u32>(out), expected.concat());
    }

    /// A kernel draws the numbers that the CPU draws, bit by bit.
    fn random_equals_the_library() {
        const N: usize = 1003;
        let (seed, stream) = (0x1234_5678_9abc_def0u64, 0xfedc_ba98_7654_3210u64);
        let random = Philox::new(seed, stream);
        let card = Card::open();
        for dtype in ["f32", "f64"] {
            let (words, uniform) = (card.empty(4 * N), card.empty(if dtype == "f32" { 4 * N } else { 8 * N }));
            let arguments = |buffer: Buffer| [arg(buffer.address), arg(N as i64), arg(seed), arg(stream)];
            card.launch(&kernel(&card, "random.cu", "random_words", dtype), 2, [32, 1, 1], &arguments(words));
            card.launch(&kernel(&card, "random.cu", "random_uniform", dtype), 3, [64, 1, 1], &arguments(uniform));
            assert!(card.read::<u32>(words).into_iter().eq((0..N as u64).map(|i| random.word(i))), "{dtype}");
            let narrow = |x: f64| if dtype == "f32" { f64::from(x as f32) } else { x };
            let expected = (0..N as u64).map(|i| narrow(random.uniform(i)));
            assert!(widen(&card, uniform, dtype).into_iter().eq(expected), "uniform {dtype}");
        }
    }

    fn copy_follows_strides() {
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
        let card = Card::open();
        for (dtype, bytes) in [("bf16", 2), ("bool", 1), ("f64", 8)] {
            let kernel = kernel(&card, "copy.cu", "copy_strided", dtype);
            for (dims, strides, offset) in cases {
                let limit = if dtype == "bool" { 2 } else { 251 };
                let storage: Vec<u8> = (0..bytes * 200).map(|i| (i * i / 3 % limit) as u8).collect();
                let n: u32 = dims.iter().product();
                let (y, x) = (card.empty(bytes * n as usize), card.upload(&storage));
                let arguments = [arg(y.address), arg(x.address), layout(dims, strides, offset), arg(i64::from(n))];
                card.launch(&kernel, 2, [32, 1, 1], &arguments);
                let expected = (0..n as i64).flat_map(|mut i| {
                    let mut at = offset;
                    for (&dim, &stride) in dims.iter().zip(strides).rev() {
                        at += i % dim as i64 * stride;
                        i /= dim as i64;
                    }
                    storage[at as usize * bytes..][..bytes].to_vec()
                });
                assert!(card.read::<u8>(y).into_iter().eq(expected), "{dtype} {dims:?} {strides:?} {offset}");
            }
        }
    }

    fn softmax_equals_its_formula() {
        const ROWS: usize = 5;
        let (lowest, random) = (-65504.0, Philox::new(3, 1));
        let card = Card::open();
        for (dtype, bound) in [("f32", 3e-6), ("f64", 1e-14), ("bf16", 1e-2), ("f16", 2e-3)] {
            let forward = kernel(&card, "softmax.cu", "softmax_fwd", dtype);
            let backward = kernel(&card, "softmax.cu", "softmax_bwd", dtype);
            // A warp per row, two rows a block; and a block of two warps per row.
            for (columns, wide, high) in [(1, 32, 2), (7, 32, 2), (64, 32, 2), (203, 64, 1), (1040, 64, 1)] {
                let draw = |i: usize| bf16::from_f64(8.0 * random.uniform(i as u64) - 4.0).to_f64();
                let mut x: Vec<f64> = (0..ROWS * columns).map(draw).collect();
                let g: Vec<f64> = (0..ROWS * columns).map(|i| draw(i + 10_000)).collect();
                // A row that a mask filled, a row with a single value that counts, and one that starts with -inf.
                x[..columns].fill(lowest);
                x[columns..2 * columns - 1].fill(f64::NEG_INFINITY);
                x[2 * columns..3 * columns - 1].iter_mut().step_by(3).for_each(|x| *x = f64::NEG_INFINITY);
                let (x_there, g_there) = (card.upload(&narrow(&x, dtype)), card.upload(&narrow(&g, dtype)));
                let y = card.empty(x_there.bytes);
                let sizes = [arg(ROWS as i64), arg(columns as u32)];
                let arguments = |buffers: &[Buffer]| -> Vec<Vec<u8>> {
                    buffers.iter().map(|buffer| arg(buffer.address)).chain(sizes.clone()).collect()
                };
                card.launch(&forward, 2, [wide, high, 1], &arguments(&[y, x_there]));
                // In place, which the backward pass allows.
                card.launch(&backward, 2, [wide, high, 1], &arguments(&[g_there, y, g_there]));
                for (buffer, expected) in [y, g_there].into_iter().zip(softmax(&x, &g, columns)) {
                    let actual = widen(&card, buffer, dtype);
                    let norm = expected.iter().map(|e| e * e).sum::<f64>().sqrt().max(1e-3);
                    let error = actual.iter().zip(&expected).map(|(a, e)| (a - e).powi(2)).sum::<f64>().sqrt() / norm;
                    assert!(error <= bound, "{dtype} [{ROWS}, {columns}]: relative error {error:e}");
                }
            }
        }
    }
}
