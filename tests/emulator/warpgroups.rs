//! Products of warpgroups, against the PTX ISA's "Asynchronous Warpgroup Level Matrix Instructions", whose tables and
//! figures are written down here a second time.

use half::{bf16, f16};
use x_transformers::Philox;

use crate::{
    card::{Card, arg},
    emulated, here,
};

/// Small whole numbers, whose products and sums are exact in every type.
fn numbers(count: usize, stream: u64) -> Vec<f32> {
    let random = Philox::new(9, stream);
    (0..count as u64).map(|i| (random.word(i) % 17) as f32 - 8.0).collect()
}

fn bits(value: f32, is_bf16: bool) -> u16 {
    if is_bf16 { bf16::from_f32(value).to_bits() } else { f16::from_f32(value).to_bits() }
}

/// A tile of rows of 64 elements as the swizzle of 128 bytes has it: the 16 bytes `c` of row `r` lie where `c ^ (r % 8)`
/// would without it.
fn swizzled(tile: &[f32], is_bf16: bool) -> Vec<u32> {
    let mut halves = vec![0u16; tile.len()];
    for (i, &value) in tile.iter().enumerate() {
        let (row, column) = (i / 64, i % 64);
        halves[row * 64 + ((column / 8) ^ (row % 8)) * 8 + column % 8] = bits(value, is_bf16);
    }
    halves.chunks(2).map(|pair| u32::from(pair[0]) | u32::from(pair[1]) << 16).collect()
}

/// Row and column of `d[i]` of a thread: "WGMMA .m64nNk16 register fragment layout for accumulator matrix D".
fn of_d(thread: usize, i: usize) -> (usize, usize) {
    let row = 16 * (thread / 32) + thread % 32 / 4 + if i % 4 < 2 { 0 } else { 8 };
    (row, 8 * (i / 4) + 2 * (thread % 4) + i % 2)
}

/// Row and column of element `i` of a thread's four registers: "… for matrix A".
fn of_a(thread: usize, i: usize) -> (usize, usize) {
    let row = 16 * (thread / 32) + thread % 32 / 4 + i / 2 % 2 * 8;
    (row, 2 * (thread % 4) + i % 2 + if i < 4 { 0 } else { 8 })
}

/// Runs four steps of 16 with the tile in shared memory; `body` starts them. Returns `d`, a thread after the other.
fn run(body: &str, n: usize, is_bf16: bool, tile: &[u32], registers: &[u32]) -> Vec<f32> {
    let (words, each) = (tile.len(), registers.len() / 128);
    let source = format!(
        "#include \"common.cuh\"\n\
         extern \"C\" __global__ void __launch_bounds__(128) test(f32* out, const u32* tile, const u32* mine) {{\n\
         extern __shared__ uint4 memory[];\n\
         const u32 start = (ptx_shared_address(memory) + 1023) / 1024 * 1024;\n\
         u32* const shared = (u32*)((char*)memory + (start - ptx_shared_address(memory)));\n\
         for (u32 i = threadIdx.x; i < {words}; i += 128) shared[i] = tile[i];\n\
         ptx_fence_async(); __syncthreads();\n\
         constexpr bool F16 = {f16}; mine += threadIdx.x * {each}; out += threadIdx.x * {n} / 2;\n\
         // Swizzle of 128 bytes; 1024 bytes from eight rows to the next.\n\
         const u64 form = (u64)1 << 62 | (u64)(1024 / 16) << 32;\n\
         u32 a[4][4];\n\
         for (int i = 0; i < {each}; ++i) a[i / 4][i % 4] = mine[i];\n\
         f32 d[{n} / 8][4];\n\
         for (int i = 0; i < {n} / 2; ++i) d[i / 4][i % 4] = i;\n\
         ptx_wgmma_fence();\n{body}\n\
         ptx_wgmma_commit(); ptx_wgmma_wait<0>();\n\
         for (int i = 0; i < {n} / 2; ++i) ptx_settle(d[i / 4][i % 4]);\n\
         for (int i = 0; i < {n} / 2; ++i) out[i] = d[i / 4][i % 4];\n}}\n",
        f16 = !is_bf16,
    );
    let card = Card::open();
    let kernel = card.kernel_as("sm_90a", &source, "test", &["-DDTYPE=f32"]);
    let (out, tile) = (card.empty(4 * 64 * n), card.upload(tile));
    let mine = card.upload(if registers.is_empty() { &[0] } else { registers });
    let shared = 4 * words as u32 + 1024;
    card.try_launch(&kernel, [1; 3], [128, 1, 1], shared, &[arg(out.address), arg(tile.address), arg(mine.address)])
        .unwrap_or_else(|error| panic!("{error:?}: {}", crate::card::report()));
    card.read(out)
}

/// Both operands in shared memory, in rows of 64 elements, the second one transposed.
#[test]
fn wgmma_of_two_tiles() {
    emulated(here!(), &[("XT_EMULATOR_ARCH", "90")], || {
        for (n, is_bf16, add) in [(64, false, true), (64, true, false), (128, true, true), (128, false, false)] {
            let (a, b) = (numbers(64 * 64, 1), numbers(n * 64, 2));
            let body = format!(
                "const u64 a_at = form | start / 16, b_at = form | (start + 64 * 128) / 16;\n\
                 #pragma unroll\n\
                 for (int k = 0; k < 4; ++k) ptx_wgmma_ss<F16>(d, a_at + 2 * k, b_at + 2 * k, {add} || k > 0);"
            );
            let tile = [swizzled(&a, is_bf16), swizzled(&b, is_bf16)].concat();
            let got = run(&body, n, is_bf16, &tile, &[]);
            for (place, got) in got.iter().enumerate() {
                let (thread, i) = (place / (n / 2), place % (n / 2));
                let (row, column) = of_d(thread, i);
                let sum: f32 = (0..64).map(|k| a[row * 64 + k] * b[column * 64 + k]).sum();
                assert_eq!(*got, sum + if add { i as f32 } else { 0.0 }, "{n} columns, thread {thread}, d[{i}]");
            }
        }
    });
}

/// The first operand in registers, the second not transposed: in rows of 64 columns, block after block.
#[test]
fn wgmma_of_registers_and_a_tile() {
    emulated(here!(), &[("XT_EMULATOR_ARCH", "90")], || {
        for (n, is_bf16, add) in [(64, true, true), (64, false, false), (128, true, false), (128, false, true)] {
            let (a, b) = (numbers(64 * 64, 3), numbers(64 * n, 4));
            // 64 rows of 128 bytes are between a block of columns and the next.
            let body = format!(
                "const u64 b_at = form | (u64)(64 * 128 / 16) << 16 | start / 16;\n\
                 #pragma unroll\n\
                 for (int k = 0; k < 4; ++k) ptx_wgmma_rs<F16>(d, a[k], b_at + 16 * 128 / 16 * k, {add} || k > 0);"
            );
            let block =
                |block: usize| -> Vec<f32> { (0..64 * 64).map(|i| b[i / 64 * n + 64 * block + i % 64]).collect() };
            let tile: Vec<u32> = (0..n / 64).flat_map(|at| swizzled(&block(at), is_bf16)).collect();
            let half = |thread: usize, step: usize, i: usize| {
                let (row, column) = of_a(thread, i);
                u32::from(bits(a[row * 64 + 16 * step + column], is_bf16))
            };
            let registers: Vec<u32> = (0..128 * 16)
                .map(|i| (i / 16, i / 4 % 4, i % 4 * 2))
                .map(|(thread, step, i)| half(thread, step, i) | half(thread, step, i + 1) << 16)
                .collect();
            let got = run(&body, n, is_bf16, &tile, &registers);
            for (place, got) in got.iter().enumerate() {
                let (thread, i) = (place / (n / 2), place % (n / 2));
                let (row, column) = of_d(thread, i);
                let sum: f32 = (0..64).map(|k| a[row * 64 + k] * b[k * n + column]).sum();
                assert_eq!(*got, sum + if add { i as f32 } else { 0.0 }, "{n} columns, thread {thread}, d[{i}]");
            }
        }
    });
}
