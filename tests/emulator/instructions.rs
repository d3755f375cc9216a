//! Warp-wide operations and PTX instructions, checked against NVIDIA's tables, written down here a second time, and
//! against the plain formula.

use half::{bf16, f16};
use x_transformers::Philox;

use crate::{
    card::{Card, arg},
    emulated, here,
};

/// Runs a kernel over one warp: `body` fills `u32 out[]`, `words` per thread, from `u32 in[]`.
fn warp(body: &str, words: usize, input: &[u32]) -> Vec<u32> {
    let source = format!(
        "#include \"common.cuh\"\n\
         extern \"C\" __global__ void test(u32* out, const u32* in) {{\n\
         const u32 lane = threadIdx.x; out += {words} * lane;\n{body}\n}}\n"
    );
    let card = Card::open();
    let kernel = card.kernel(&source, "test", &["-DDTYPE=f32"]);
    let (out, input) = (card.empty(4 * 32 * words), card.upload(input));
    card.launch(&kernel, 1, [32, 1, 1], &[arg(out.address), arg(input.address)]);
    card.read(out)
}

/// Small whole numbers, whose products and sums are exact in every type.
fn numbers(count: usize, stream: u64) -> Vec<f32> {
    let random = Philox::new(7, stream);
    (0..count as u64).map(|i| (random.word(i) % 17) as f32 - 8.0).collect()
}

/// The 16 bits of a value in f16 or bf16.
fn bits(value: f32, is_bf16: bool) -> u32 {
    if is_bf16 { bf16::from_f32(value).to_bits().into() } else { f16::from_f32(value).to_bits().into() }
}

/// Row and column of each element that a thread holds, from the PTX ISA's section "Matrix Fragments for mma.m16n8k16
/// with floating point type": a0…a7 of A, b0…b3 of B, c0…c3 of C and D.
fn fragment_a(lane: usize) -> [(usize, usize); 8] {
    let (group, thread) = (lane >> 2, lane % 4);
    std::array::from_fn(|i| {
        let row = if i < 2 || (4..6).contains(&i) { group } else { group + 8 };
        let column = thread * 2 + (i & 1) + if i >= 4 { 8 } else { 0 };
        (row, column)
    })
}

fn fragment_b(lane: usize) -> [(usize, usize); 4] {
    let (group, thread) = (lane >> 2, lane % 4);
    std::array::from_fn(|i| (thread * 2 + (i & 1) + if i >= 2 { 8 } else { 0 }, group))
}

fn fragment_c(lane: usize) -> [(usize, usize); 4] {
    let (group, thread) = (lane >> 2, lane % 4);
    std::array::from_fn(|i| (if i < 2 { group } else { group + 8 }, thread * 2 + (i & 1)))
}

/// d + a b, row by row.
fn product(a: &[f32], b: &[f32], d: &[f32]) -> Vec<f32> {
    let element = |row: usize, column: usize| (0..16).map(|k| a[row * 16 + k] * b[k * 8 + column]).sum::<f32>();
    (0..16 * 8).map(|i| d[i] + element(i / 8, i % 8)).collect()
}

/// Two 16-bit values in a word, the first below.
fn pairs(values: impl Iterator<Item = u32>) -> Vec<u32> {
    let values: Vec<u32> = values.collect();
    values.chunks(2).map(|pair| pair[0] | pair[1] << 16).collect()
}

#[test]
fn mma_follows_the_tables() {
    emulated(here!(), &[], || {
        let (a, b, d) = (numbers(256, 1), numbers(128, 2), numbers(128, 3));
        let expected = product(&a, &b, &d);
        for (name, is_bf16) in [("f16", false), ("bf16", true)] {
            let body = format!(
                "in += 10 * lane; u32 a[4] = {{in[0], in[1], in[2], in[3]}}, b[2] = {{in[4], in[5]}}; f32 d[4];\n\
                 for (int i = 0; i < 4; ++i) d[i] = __uint_as_float(in[6 + i]);\n\
                 ptx_mma_m16n8k16_{name}(d, a, b);\n\
                 for (int i = 0; i < 4; ++i) out[i] = __float_as_uint(d[i]);"
            );
            let input: Vec<u32> = (0..32)
                .flat_map(|lane| {
                    let left = fragment_a(lane).into_iter().map(|(row, column)| bits(a[row * 16 + column], is_bf16));
                    let right = fragment_b(lane).into_iter().map(|(row, column)| bits(b[row * 8 + column], is_bf16));
                    let sums = fragment_c(lane).map(|(row, column)| d[row * 8 + column].to_bits());
                    [pairs(left), pairs(right), sums.to_vec()].concat()
                })
                .collect();
            let out = warp(&body, 4, &input);
            for lane in 0..32 {
                for (i, (row, column)) in fragment_c(lane).into_iter().enumerate() {
                    let value = f32::from_bits(out[4 * lane + i]);
                    assert_eq!(value, expected[row * 8 + column], "{name} lane {lane} element {i}");
                }
            }
        }
    });
}

/// By the ISA's section on `ldmatrix`: threads 8 m … 8 m + 7 address the rows of matrix m; a thread gets two
/// neighbours of row lane / 4, or of that column.
#[test]
fn ldmatrix_follows_the_tables() {
    emulated(here!(), &[], || {
        // Each element (row, column) of matrix m is a distinct number, and rows are in no particular order.
        let element = |m: usize, row: usize, column: usize| (m * 64 + row * 8 + column) as u32;
        let place = |row: usize| (row * 13 + 5) % 32;
        let mut shared = vec![0u32; 32 * 4];
        for row in 0..32 {
            for column in 0..8 {
                shared[place(row) * 4 + column / 2] |= element(row / 8, row % 8, column) << (16 * (column % 2));
            }
        }
        for (count, trans) in [(4, ""), (4, "_trans"), (2, ""), (2, "_trans")] {
            let body = format!(
                "__shared__ __align__(16) u32 rows[128];\n\
                 for (int i = 0; i < 4; ++i) rows[4 * lane + i] = in[4 * lane + i];\n__syncthreads();\n\
                 u32 r[{count}]; ptx_ldmatrix_x{count}{trans}(r, rows + (lane * 13 + 5) % 32 * 4);\n\
                 for (int i = 0; i < {count}; ++i) out[i] = r[i];"
            );
            let out = warp(&body, count, &shared);
            for lane in 0..32 {
                for m in 0..count {
                    let (line, pair) = (lane / 4, lane % 4 * 2);
                    let expected = match trans {
                        "" => element(m, line, pair) | element(m, line, pair + 1) << 16,
                        _ => element(m, pair, line) | element(m, pair + 1, line) << 16,
                    };
                    assert_eq!(out[lane * count + m], expected, "x{count}{trans} lane {lane} matrix {m}");
                }
            }
        }
    });
}

/// As kernels use them: fragments by `ldmatrix` from row-major a [16, 16], and from b either as [8, 16] or,
/// transposed on the way, as [16, 8].
#[test]
fn ldmatrix_feeds_mma() {
    emulated(here!(), &[], || {
        let (a, b) = (numbers(256, 4), numbers(128, 5));
        let expected = product(&a, &b, &[0.0; 128]);
        for by_columns in [true, false] {
            let right = match by_columns {
                true => "ptx_ldmatrix_x2(b, tile + 128 + (lane % 8) * 8 + lane / 8 % 2 * 4);",
                false => "ptx_ldmatrix_x2_trans(b, tile + 128 + lane % 16 * 4);",
            };
            let body = format!(
                "__shared__ __align__(16) u32 tile[192];\n\
                 for (u32 i = lane; i < 192; i += 32) tile[i] = in[i];\n__syncthreads();\n\
                 u32 a[4], b[2]; f32 d[4] = {{}};\n\
                 ptx_ldmatrix_x4(a, tile + lane % 16 * 8 + lane / 16 * 4);\n{right}\n\
                 ptx_mma_m16n8k16_bf16(d, a, b);\n\
                 for (int i = 0; i < 4; ++i) out[i] = __float_as_uint(d[i]);"
            );
            let left = pairs(a.iter().map(|&value| bits(value, true)));
            let transposed = (0..128).map(|i| b[i % 16 * 8 + i / 16]);
            let right = match by_columns {
                true => pairs(transposed.map(|value| bits(value, true))),
                false => pairs(b.iter().map(|&value| bits(value, true))),
            };
            let out = warp(&body, 4, &[left, right].concat());
            for lane in 0..32 {
                for (i, (row, column)) in fragment_c(lane).into_iter().enumerate() {
                    let value = f32::from_bits(out[4 * lane + i]);
                    assert_eq!(value, expected[row * 8 + column], "{by_columns} lane {lane} element {i}");
                }
            }
        }
    });
}

#[test]
fn shuffles_follow_the_definition() {
    emulated(here!(), &[], || {
        let input: Vec<u32> = (0..32).map(|lane| 100 + lane).collect();
        let body = "const u32 mine = in[lane];\n\
            out[0] = __shfl_sync(0xFFFFFFFF, mine, 5); out[1] = __shfl_sync(0xFFFFFFFF, mine, 9, 8);\n\
            out[2] = __shfl_up_sync(0xFFFFFFFF, mine, 3); out[3] = __shfl_down_sync(0xFFFFFFFF, mine, 3, 16);\n\
            out[4] = __shfl_xor_sync(0xFFFFFFFF, mine, 17);\n\
            const f64 wide = __shfl_xor_sync(0xFFFFFFFF, (f64)mine, 1); out[5] = (u32)wide;\n\
            out[6] = __shfl_xor_sync(0xFFFFFFFF, mine, 12, 8);";
        let out = warp(body, 7, &input);
        for lane in 0..32usize {
            let expected = [
                5,
                lane / 8 * 8 + 1,
                if lane >= 3 { lane - 3 } else { lane },
                if lane % 16 + 3 < 16 { lane + 3 } else { lane },
                lane ^ 17,
                lane ^ 1,
                // Beyond its part of the warp a thread may read from lower lanes, not from higher ones.
                if (lane ^ 12) > lane / 8 * 8 + 7 { lane } else { lane ^ 12 },
            ];
            assert_eq!(out[7 * lane..][..7], expected.map(|from| 100 + from as u32), "lane {lane}");
        }
    });
}

#[test]
fn votes_and_reductions() {
    emulated(here!(), &[], || {
        let input: Vec<u32> = (0..32).map(|lane| lane * 7 % 5).collect();
        let body = "const u32 mine = in[lane];\n\
            out[0] = __ballot_sync(0xFFFFFFFF, mine == 2); out[1] = __any_sync(0xFFFFFFFF, mine == 9);\n\
            out[2] = __all_sync(0xFFFFFFFF, mine < 5); out[3] = __match_any_sync(0xFFFFFFFF, mine);\n\
            out[4] = __reduce_add_sync(0xFFFFFFFF, mine); out[5] = (u32)__reduce_min_sync(0xFFFFFFFF, (int)mine - 2);\n\
            out[6] = __syncthreads_count(mine == 1); out[7] = __syncthreads_or(mine == 9);\n\
            out[8] = __syncthreads_and(mine < 5);";
        let out = warp(body, 9, &input);
        let equal =
            |value: u32| input.iter().enumerate().fold(0, |mask, (lane, &x)| mask | u32::from(x == value) << lane);
        for lane in 0..32 {
            let expected =
                [equal(2), 0, 1, equal(input[lane]), input.iter().sum(), -2i32 as u32, equal(1).count_ones(), 0, 1];
            assert_eq!(out[9 * lane..][..9], expected, "lane {lane}");
        }
    });
}

#[test]
fn cp_async_copies_or_fills_with_zeros() {
    emulated(here!(), &[], || {
        let input: Vec<u32> = (1..=128).collect();
        let body = "__shared__ __align__(16) u32 tile[128];\n\
            ptx_cp_async_16(tile + 4 * lane, in + 4 * lane, lane % 3 != 0); ptx_cp_async_commit();\n\
            ptx_cp_async_wait<0>(); __syncthreads();\n\
            for (int i = 0; i < 4; ++i) out[i] = tile[4 * lane + i];";
        let expected: Vec<u32> = input.iter().map(|&x| if (x - 1) / 4 % 3 == 0 { 0 } else { x }).collect();
        assert_eq!(warp(body, 4, &input), expected);
    });
}

/// Both ways of rounding to bf16, f16, and back.
#[test]
fn half_types_round_as_the_crate_does() {
    emulated(here!(), &[], || {
        let random = Philox::new(1, 0);
        let mut values: Vec<u32> = (0..100_000).map(|i| random.word(i)).collect();
        // Ties in both directions, the largest number (rounds to infinity), infinities, zeros, NaN, and f16's edges.
        let edges = [
            0x3f80_8000,
            0x3f81_8000,
            0x7f7f_ffff,
            0x7f80_0000,
            0xff80_0000,
            0,
            0x8000_0000,
            1,
            0x7f80_0001,
            0x477f_efff,
            0x477f_f000,
            0x3300_0000,
            0x3300_0001,
            0x3380_0000,
            0x3f80_1000,
            0x3f80_3000,
        ];
        values[..16].copy_from_slice(&edges);
        let source = "#include \"common.cuh\"\n\
            extern \"C\" __global__ void test(T* y, u32* back, const f32* x, u32 n) {\n\
            const u32 i = blockIdx.x * blockDim.x + threadIdx.x; if (i >= n) return;\n\
            y[i] = Element<T>::from_acc(x[i]); back[i] = __float_as_uint(Element<T>::to_acc(y[i])); }";
        let card = Card::open();
        for dtype in ["bf16", "f16"] {
            let kernel = card.kernel(source, "test", &[&format!("-DDTYPE={dtype}")]);
            let (y, back, x) = (card.empty(2 * values.len()), card.empty(4 * values.len()), card.upload(&values));
            let arguments = [arg(y.address), arg(back.address), arg(x.address), arg(values.len() as u32)];
            card.launch(&kernel, (values.len() as u32).div_ceil(256), [256, 1, 1], &arguments);
            for ((&x, y), back) in values.iter().zip(card.read::<u16>(y)).zip(card.read::<u32>(back)) {
                let x = f32::from_bits(x);
                let expected = if x.is_nan() { 0x7fff } else { bits(x, dtype == "bf16") as u16 };
                assert_eq!(y, expected, "{dtype} {x:e}");
                let wide = if dtype == "bf16" { bf16::from_bits(y).to_f32() } else { f16::from_bits(y).to_f32() };
                assert!(
                    f32::from_bits(back) == wide || wide.is_nan() && f32::from_bits(back).is_nan(),
                    "{dtype} {x:e}"
                );
            }
        }
    });
}

#[test]
fn bf16_rounds_on_older_cards() {
    emulated(here!(), &[("XT_EMULATOR_ARCH", "75")], || {
        let random = Philox::new(2, 0);
        let values: Vec<u32> = (0..10_000).map(|i| random.word(i)).collect();
        let source = "#include \"common.cuh\"\nextern \"C\" __global__ void test(T* y, const f32* x, u32 n) {\n\
            const u32 i = blockIdx.x * blockDim.x + threadIdx.x; if (i < n) y[i] = Element<T>::from_acc(x[i]); }";
        let card = Card::open();
        let code = crate::card::compile_for(75, source, &["-DDTYPE=bf16"]).unwrap();
        let module = card.load(&code).unwrap();
        // SAFETY: the module stays loaded.
        let function = unsafe { cudarc::driver::result::module::get_function(module, c"test".into()) }.unwrap();
        let (y, x) = (card.empty(2 * values.len()), card.upload(&values));
        let arguments = [arg(y.address), arg(x.address), arg(values.len() as u32)];
        card.launch(&crate::card::Kernel(function), 40, [256, 1, 1], &arguments);
        for (&x, y) in values.iter().zip(card.read::<u16>(y)) {
            let x = f32::from_bits(x);
            assert_eq!(y, if x.is_nan() { 0x7fff } else { bf16::from_f32(x).to_bits() }, "{x:e}");
        }
    });
}

#[test]
fn atomics_of_the_block_and_the_grid() {
    emulated(here!(), &[], || {
        let source = "#include \"common.cuh\"\n\
            extern \"C\" __global__ void test(u32* y, i64* z) {\n\
            __shared__ u32 count; if (threadIdx.x == 0) count = 0; __syncthreads();\n\
            atomicAdd(&count, threadIdx.x); __syncthreads();\n\
            if (threadIdx.x == 0) atomicAdd(y, count);\n\
            atomicMax((int*)y + 1, (int)threadIdx.x - 100); atomicMin(y + 2, threadIdx.x + blockIdx.x + 7);\n\
            if (atomicCAS((u64*)z, 0, (u64)blockIdx.x + 5) == 0) z[1] = threadIdx.x; }";
        let card = Card::open();
        let kernel = card.kernel(source, "test", &["-DDTYPE=f32"]);
        let (y, z) = (card.upload(&[0, -1000i32 as u32, u32::MAX]), card.upload(&[0i64, -1]));
        card.launch(&kernel, 3, [64, 1, 1], &[arg(y.address), arg(z.address)]);
        assert_eq!(card.read::<u32>(y), [3 * 63 * 64 / 2, -37i32 as u32, 7]);
        // One thread wins, whichever comes first.
        let [winner, thread] = card.read::<i64>(z)[..] else { panic!("two numbers") };
        assert!((5..8).contains(&winner) && (0..64).contains(&thread), "{winner}, {thread}");
    });
}

#[test]
fn indices_of_threads_and_blocks() {
    emulated(here!(), &[], || {
        let source = "extern \"C\" __global__ void test(unsigned* y) {\n\
            const unsigned thread = (threadIdx.z * blockDim.y + threadIdx.y) * blockDim.x + threadIdx.x;\n\
            const unsigned block = (blockIdx.z * gridDim.y + blockIdx.y) * gridDim.x + blockIdx.x;\n\
            y[block * blockDim.x * blockDim.y * blockDim.z + thread] = block * 1000 + thread; }";
        let card = Card::open();
        let (kernel, y) = (card.kernel(source, "test", &[]), card.empty(4 * 24 * 30));
        card.try_launch(&kernel, [2, 3, 4], [5, 3, 2], 0, &[arg(y.address)]).unwrap();
        let expected: Vec<u32> = (0..24).flat_map(|block| (0..30).map(move |thread| block * 1000 + thread)).collect();
        assert_eq!(card.read::<u32>(y), expected);
    });
}
/// The known-answer vectors that the authors of Philox publish with their reference implementation.
#[test]
fn philox_published_vectors() {
    emulated(here!(), &[], || {
        let source = "#include \"common.cuh\"\n#include \"philox.cuh\"\n\
            extern \"C\" __global__ void test(u32* out, const u32* v) {\n\
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
    });
}
