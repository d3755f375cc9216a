//! Faults that the emulator must detect: for each, a kernel that has it and a twin that does not.

use cudarc::driver::sys::CUresult;

use crate::{
    card::{Card, arg, compile_for, exported, report},
    emulated, here,
};

/// A wrong kernel and a right one: bodies of `extern "C" __global__ void test(f32* y, const f32* x, u32 n)`, where `x`
/// has `n` numbers, and `y` has room for `n` and is uninitialised.
struct Twins {
    grid: u32,
    block: u32,
    shared: u32,
    wrong: &'static str,
    right: &'static str,
}

const N: usize = 64;

impl Twins {
    fn run(&self, card: &Card, body: &str) -> Result<(), CUresult> {
        let source = format!(
            "#include \"common.cuh\"\n\
             extern \"C\" __global__ void test(f32* y, const f32* x, u32 n) {{\n\
             const u32 i = threadIdx.x;\n{body}\n}}\n"
        );
        let kernel = card.kernel(&source, "test", &["-DDTYPE=f32"]);
        let (x, y) = (card.upload(&[1f32; N]), card.empty(4 * N));
        card.try_launch(
            &kernel,
            [self.grid, 1, 1],
            [self.block, 1, 1],
            self.shared,
            &[arg(y.address), arg(x.address), arg(N as u32)],
        )
    }

    /// Checks that the right kernel runs, and that the wrong one is reported with kernel, block, thread and this text.
    fn check(&self, who: &str, words: &str) {
        let card = Card::open();
        assert_eq!(self.run(&card, self.right), Ok(()), "the right kernel: {}", report());
        assert_eq!(report(), "");
        let outcome = self.run(&card, self.wrong);
        assert_eq!(outcome, Err(CUresult::CUDA_ERROR_ILLEGAL_ADDRESS), "the wrong kernel: {}", report());
        let report = report();
        assert!(report.starts_with(&format!("kernel test, block {who}: ")) && report.contains(words), "{report}");
        // The context is lost: nothing works any more.
        assert_eq!(Self::wait(&card), Err(CUresult::CUDA_ERROR_ILLEGAL_ADDRESS));
        let clear: unsafe extern "C" fn() = exported("xt_emulator_clear");
        // SAFETY: it has no conditions.
        unsafe { clear() };
        assert_eq!(self.run(&card, self.right), Ok(()));
    }

    fn wait(card: &Card) -> Result<(), CUresult> {
        // SAFETY: the stream exists.
        unsafe { cudarc::driver::result::stream::synchronize(card.stream) }.map_err(|error| error.0)
    }
}

/// One block of one warp, without dynamic shared memory.
const WARP: Twins = Twins { grid: 1, block: 32, shared: 0, wrong: "", right: "" };

#[test]
fn read_past_the_end() {
    emulated(here!(), &[], || {
        Twins { grid: 2, wrong: "y[i] = x[i + blockIdx.x * 33];", right: "y[i] = x[i + blockIdx.x * 32];", ..WARP }
            .check("(1, 0, 0), thread (31, 0, 0)", "0 bytes past the end of allocation");
    });
}

#[test]
fn write_before_the_start() {
    emulated(here!(), &[], || {
        Twins { wrong: "y[(int)i - 1] = x[i];", right: "y[i] = x[i];", ..WARP }
            .check("(0, 0, 0), thread (0, 0, 0)", "writes 4 bytes at 0x");
    });
}

#[test]
fn null_pointer() {
    emulated(here!(), &[], || {
        Twins { wrong: "if (i == 3) y = nullptr; y[i] = 1;", right: "y[i] = 1;", ..WARP }
            .check("(0, 0, 0), thread (3, 0, 0)", "a null pointer");
    });
}

#[test]
fn memory_of_the_host() {
    emulated(here!(), &[], || {
        Twins { wrong: "y[i] = *(const f32*)0x7fff00000000;", right: "y[i] = 0;", ..WARP }
            .check("(0, 0, 0), thread (0, 0, 0)", "no device memory");
    });
}

#[test]
fn misaligned() {
    emulated(here!(), &[], || {
        Twins {
            wrong: "*(uint4*)(y + 1) = make_uint4(1, 2, 3, 4);",
            right: "*(uint4*)(y + 4) = make_uint4(1, 2, 3, 4);",
            ..WARP
        }
        .check("(0, 0, 0), thread (0, 0, 0)", "which is not aligned to 16; byte 4 of allocation");
    });
}

#[test]
fn division_by_zero() {
    emulated(here!(), &[], || {
        Twins { wrong: "y[i] = (n + i) / (i % 32);", right: "y[i] = (n + i) / (i % 32 + 1);", ..WARP }
            .check("(0, 0, 0), thread (0, 0, 0)", "test.cu:4: an integer division by zero");
    });
}

#[test]
fn outside_of_an_array() {
    emulated(here!(), &[], || {
        Twins {
            wrong: "__shared__ f32 s[32], t[32]; s[i] = t[i] = x[i]; __syncthreads(); y[i] = s[(i + 1) % 33] + t[i];",
            right: "__shared__ f32 s[32], t[32]; s[i] = t[i] = x[i]; y[i] = s[i] + t[i];",
            ..WARP
        }
        .check("(0, 0, 0), thread (31, 0, 0)", "index 32 is outside of 'float [32]'");
    });
}

#[test]
fn uninitialised_device_memory() {
    emulated(here!(), &[], || {
        Twins { wrong: "if (i != 5) y[i] = 1; y[i] += 1;", right: "y[i] = 1; y[i] += 1;", ..WARP }
            .check("(0, 0, 0), thread (5, 0, 0)", "reads 4 uninitialised bytes");
    });
}

#[test]
fn uninitialised_memory_through_memcpy() {
    emulated(here!(), &[], || {
        Twins { wrong: "memcpy(y, y + n / 2, 4 * i);", right: "memcpy(y, x, 4 * i);", ..WARP }
            .check("(0, 0, 0), thread (1, 0, 0)", "reads 4 uninitialised bytes");
    });
}

#[test]
fn uninitialised_shared_memory() {
    emulated(here!(), &[], || {
        Twins {
            wrong: "__shared__ f32 s[33]; s[i] = x[i]; __syncthreads(); y[i] = s[i + 1];",
            right: "__shared__ f32 s[33]; s[i] = x[i]; __syncthreads(); y[i] = s[31 - i];",
            ..WARP
        }
        .check("(0, 0, 0), thread (31, 0, 0)", "reads uninitialised shared memory; 4 bytes at static shared memory");
    });
}

/// Shared memory written by one block is uninitialised for the next.
#[test]
fn shared_memory_of_another_block() {
    emulated(here!(), &[], || {
        Twins {
            grid: 2,
            wrong: "__shared__ f32 s[32]; if (blockIdx.x == 0) s[i] = x[i]; y[i] = s[i];",
            right: "__shared__ f32 s[32]; s[i] = x[i]; y[i] = s[i];",
            ..WARP
        }
        .check("(1, 0, 0), thread (0, 0, 0)", "reads uninitialised shared memory");
    });
}

#[test]
fn past_dynamic_shared_memory() {
    emulated(here!(), &[], || {
        Twins {
            shared: 128,
            wrong: "extern __shared__ f32 s[]; s[i + 1] = x[i];",
            right: "extern __shared__ f32 s[]; s[i] = x[i];",
            ..WARP
        }
        .check("(0, 0, 0), thread (31, 0, 0)", "byte 128 of dynamic shared memory, which has 128");
    });
}

#[test]
fn barrier_that_a_thread_leaves_out() {
    emulated(here!(), &[], || {
        Twins {
            block: 64,
            wrong: "if (i == 40) return; __syncthreads(); y[i] = 1;",
            right: "__syncthreads(); y[i] = 1;",
            ..WARP
        }
        .check("(0, 0, 0), thread (0, 0, 0)", "but thread (40, 0, 0) has left the kernel");
    });
}

#[test]
fn another_barrier() {
    emulated(here!(), &[], || {
        Twins {
            block: 64,
            wrong: "if (i < 48) {\n __syncthreads();\n } else {\n __syncthreads();\n }\n y[i] = 1;",
            right: "if (i < 64) {\n __syncthreads();\n } else {\n __syncthreads();\n }\n y[i] = 1;",
            ..WARP
        }
        .check("(0, 0, 0), thread (0, 0, 0)", "but thread (48, 0, 0) waits in __syncthreads (test.cu:");
    });
}

#[test]
fn shuffle_that_a_thread_leaves_out() {
    emulated(here!(), &[], || {
        Twins {
            wrong: "if (i != 7) y[i] = __shfl_xor_sync(0xFFFFFFFF, x[i], 1);",
            right: "y[i] = __shfl_xor_sync(0xFFFFFFFF, x[i], 1);",
            ..WARP
        }
        .check("(0, 0, 0), thread (0, 0, 0)", "waits in __shfl_xor_sync (test.cu:");
    });
}

#[test]
fn shuffle_from_a_missing_thread() {
    emulated(here!(), &[], || {
        Twins {
            wrong: "if (i < 16) y[i] = __shfl_xor_sync(0xFFFF, x[i], 16);",
            right: "if (i < 16) y[i] = __shfl_xor_sync(0xFFFF, x[i], 8);",
            ..WARP
        }
        .check("(0, 0, 0), thread (0, 0, 0)", "reads from lane 16, which takes no part");
    });
}

#[test]
fn read_after_write_without_a_barrier() {
    emulated(here!(), &[], || {
        // The thread that is read from has run already, so that nothing is uninitialised.
        Twins {
            block: 64,
            wrong: "__shared__ f32 s[64]; s[i] = x[i]; y[i] = s[i / 2];",
            right: "__shared__ f32 s[64]; s[i] = x[i]; __syncthreads(); y[i] = s[i / 2];",
            ..WARP
        }
        .check("(0, 0, 0), thread (1, 0, 0)", "reads what is written without a barrier between by thread (0, 0, 0)");
    });
}

#[test]
fn write_after_read_without_a_barrier() {
    emulated(here!(), &[], || {
        Twins {
            block: 64,
            wrong: "__shared__ f32 s[64]; s[i] = x[i]; __syncthreads(); y[i] = s[(i + 1) % 64]; s[i] = 0;",
            right: "__shared__ f32 s[64]; s[i] = x[i]; __syncthreads();\n\
                    y[i] = s[(i + 1) % 64]; __syncthreads(); s[i] = 0;",
            ..WARP
        }
        .check("(0, 0, 0), thread (1, 0, 0)", "writes what is read without a barrier between by thread (0, 0, 0)");
    });
}

/// Many have read it.
#[test]
fn write_after_reads_without_a_barrier() {
    emulated(here!(), &[], || {
        Twins {
            block: 64,
            wrong: "__shared__ f32 s; if (i == 0) s = 1; __syncthreads(); y[i] = s; if (i == 63) s = 2;",
            right: "__shared__ f32 s; if (i == 0) s = 1; __syncthreads(); y[i] = s;\n\
                    __syncthreads(); if (i == 63) s = 2;",
            ..WARP
        }
        .check("(0, 0, 0), thread (63, 0, 0)", "what is read without a barrier between by threads of other warps");
    });
}

#[test]
fn two_writes_without_a_barrier() {
    emulated(here!(), &[], || {
        Twins {
            block: 64,
            wrong: "__shared__ f32 s; s = x[i]; __syncthreads(); y[i] = s;",
            right: "__shared__ f32 s; if (i == 0) s = x[i]; __syncthreads(); y[i] = s;",
            ..WARP
        }
        .check("(0, 0, 0), thread (1, 0, 0)", "writes what is written without a barrier between by thread (0, 0, 0)");
    });
}

/// A shuffle orders no memory; a barrier of the warp does, within it.
#[test]
fn race_within_a_warp() {
    emulated(here!(), &[], || {
        Twins {
            block: 64,
            wrong: "__shared__ f32 s[64]; s[i] = x[i]; __shfl_xor_sync(0xFFFFFFFF, i, 1); y[i] = s[i ^ 1];",
            right: "__shared__ f32 s[64]; s[i] = x[i]; __syncwarp(); y[i] = s[i ^ 1]; __syncwarp(); s[i] = 0;",
            ..WARP
        }
        .check("(0, 0, 0), thread (31, 0, 0)", "reads what is written without a barrier between by thread (30, 0, 0)");
    });
}

/// A barrier of the warp orders nothing between warps.
#[test]
fn race_between_warps() {
    emulated(here!(), &[], || {
        Twins {
            block: 64,
            wrong: "__shared__ f32 s[64]; s[i] = x[i]; __syncwarp(); if (i >= 32) y[i] = s[i - 32];",
            right: "__shared__ f32 s[64]; s[i] = x[i]; __syncthreads(); if (i >= 32) y[i] = s[i - 32];",
            ..WARP
        }
        .check("(0, 0, 0), thread (63, 0, 0)", "reads what is written without a barrier between by thread (31, 0, 0)");
    });
}

/// Atomic operations may race with each other, but with nothing else.
#[test]
fn race_with_an_atomic_operation() {
    emulated(here!(), &[], || {
        Twins {
            block: 64,
            wrong: "__shared__ u32 s; if (i == 0) s = 0; __syncthreads(); atomicAdd(&s, 1); y[i] = s;",
            right: "__shared__ u32 s; if (i == 0) s = 0; __syncthreads(); atomicAdd(&s, 1); __syncthreads(); y[i] = s;",
            ..WARP
        }
        .check("(0, 0, 0), thread (1, 0, 0)", "writes what is read without a barrier between by thread (0, 0, 0)");
    });
}

#[test]
fn cp_async_without_a_wait() {
    emulated(here!(), &[], || {
        Twins {
            wrong: "__shared__ __align__(16) f32 s[128]; if (i < 16) ptx_cp_async_16(s + 4 * i, x + 4 * i, true);\n\
                    ptx_cp_async_commit(); __syncthreads(); y[i] = s[i];",
            right: "__shared__ __align__(16) f32 s[128]; if (i < 16) ptx_cp_async_16(s + 4 * i, x + 4 * i, true);\n\
                    ptx_cp_async_commit(); ptx_cp_async_wait<0>(); __syncthreads(); y[i] = s[i];",
            ..WARP
        }
        .check("(0, 0, 0), thread (0, 0, 0)", "what a cp.async that was not waited for will write");
    });
}

/// The wait is for the copies of this thread; those of others need a barrier.
#[test]
fn cp_async_without_a_barrier() {
    emulated(here!(), &[], || {
        Twins {
            wrong: "__shared__ __align__(16) f32 s[128]; if (i < 16) ptx_cp_async_16(s + 4 * i, x + 4 * i, true);\n\
                    ptx_cp_async_commit(); ptx_cp_async_wait<0>(); y[i] = s[i];",
            right: "__shared__ __align__(16) f32 s[128]; if (i < 16) ptx_cp_async_16(s + 4 * i, x + 4 * i, true);\n\
                    ptx_cp_async_commit(); ptx_cp_async_wait<0>(); if (i < 16) y[i] = s[4 * i + 3];",
            ..WARP
        }
        .check("(0, 0, 0), thread (1, 0, 0)", "reads what is written without a barrier between by thread (0, 0, 0)");
    });
}

/// The youngest group may still be in flight.
#[test]
fn cp_async_wait_for_too_few_groups() {
    emulated(here!(), &[], || {
        const START: &str = "__shared__ __align__(16) f32 s[256];\n\
            ptx_cp_async_16(s + 4 * i, x + 4 * (i % 16), true); ptx_cp_async_commit();\n\
            ptx_cp_async_16(s + 128 + 4 * i, x + 4 * (i % 16), i < 8); ptx_cp_async_commit();\n";
        let (wrong, right) =
            ("ptx_cp_async_wait<1>(); y[i] = s[128 + 4 * i];", "ptx_cp_async_wait<1>(); y[i] = s[4 * i];");
        let (wrong, right) = (format!("{START}{wrong}").leak(), format!("{START}{right}").leak());
        Twins { wrong, right, ..WARP }.check("(0, 0, 0), thread (0, 0, 0)", "what a cp.async that was not waited for");
    });
}

#[test]
fn atomic_addition_of_floats() {
    emulated(here!(), &[], || {
        Twins { wrong: "y[i] = 0; atomicAdd(y, x[i]);", right: "y[i] = 0; atomicExch(y, x[i]);", ..WARP }
            .check("(0, 0, 0), thread (0, 0, 0)", "depends on the order of threads");
    });
}

#[test]
fn trap() {
    emulated(here!(), &[], || {
        Twins { wrong: "if (x[i] == 1) __trap();", right: "if (x[i] != 1) __trap();", ..WARP }
            .check("(0, 0, 0), thread (0, 0, 0)", "__trap()");
    });
}

#[test]
fn tensor_core_without_its_whole_warp() {
    emulated(here!(), &[], || {
        const START: &str = "u32 a[4] = {}, b[2] = {}; f32 d[4] = {};\n";
        let (wrong, right) =
            ("if (i < 16) ptx_mma_m16n8k16_f16(d, a, b); y[i] = d[0];", "ptx_mma_m16n8k16_f16(d, a, b); y[i] = d[0];");
        let (wrong, right) = (format!("{START}{wrong}").leak(), format!("{START}{right}").leak());
        Twins { wrong, right, ..WARP }
            .check("(0, 0, 0), thread (0, 0, 0)", "but thread (16, 0, 0) has left the kernel");
    });
}

#[test]
fn use_after_free() {
    emulated(here!(), &[], || {
        let card = Card::open();
        let source = "extern \"C\" __global__ void test(float* y) { y[threadIdx.x] = 1; }";
        let (kernel, y) = (card.kernel(source, "test", &[]), card.empty(4 * N));
        card.launch(&kernel, 1, [32, 1, 1], &[arg(y.address)]);
        card.free(y);
        let outcome = card.try_launch(&kernel, [1; 3], [32, 1, 1], 0, &[arg(y.address)]);
        assert_eq!(outcome, Err(CUresult::CUDA_ERROR_ILLEGAL_ADDRESS));
        let report = report();
        assert!(report.starts_with("kernel test, block (0, 0, 0), thread (0, 0, 0): writes 4 bytes at 0x"), "{report}");
        assert!(report.contains("byte 0 of freed allocation 1 (256 bytes"), "{report}");
    });
}

#[test]
fn host_errors() {
    emulated(here!(), &[], || {
        let card = Card::open();
        let (y, x) = (card.empty(16), card.upload(&[1f32; 4]));
        assert!(card.try_read::<f32>(y).is_err() && report().contains("reads 16 uninitialised bytes"), "{}", report());
        let long = crate::card::Buffer { bytes: 32, ..x };
        assert!(card.try_read::<f32>(long).is_err() && report().contains("0 bytes past the end"), "{}", report());
        // SAFETY: the emulator refuses it.
        let far = unsafe { cudarc::driver::result::memset_d8_async(x.address + 8, 0, 16, card.stream) };
        assert!(far.is_err() && report().contains("a memset writes 16 bytes"), "{}", report());
        card.free(x);
        // SAFETY: the emulator refuses it.
        let twice = unsafe { cudarc::driver::result::free_sync(x.address) };
        assert!(twice.is_err() && report().contains("freed allocation 2"), "{}", report());
        // None of these loses the context.
        assert_eq!(card.read::<f32>(card.upload(&[2f32])), [2.0]);
    });
}

#[test]
fn launch_limits() {
    emulated(here!(), &[], || {
        let card = Card::open();
        let source = "extern \"C\" __global__ void plain() {}\n\
            extern \"C\" __global__ void __launch_bounds__((32 + 32) * 2, 4) bound() {}\n\
            extern \"C\" __global__ void pointer(float* y) {}\n\
            extern \"C\" __global__ void big(float* y) {\n\
            __shared__ float s[10000]; s[threadIdx.x] = 1; __syncthreads(); *y = s[threadIdx.x]; }\n";
        let [plain, bound, pointer, big] =
            ["plain", "bound", "pointer", "big"].map(|name| card.kernel(source, name, &[]));
        let refused = |outcome: Result<(), CUresult>, result: CUresult, words: &str| {
            assert_eq!(outcome, Err(result), "{words}");
            assert!(report().starts_with("launch of kernel ") && report().contains(words), "{}", report());
        };
        let (invalid, resources) = (CUresult::CUDA_ERROR_INVALID_VALUE, CUresult::CUDA_ERROR_LAUNCH_OUT_OF_RESOURCES);
        assert_eq!(card.try_launch(&plain, [1, 65535, 1], [1, 1, 1], 0, &[]), Ok(()));
        assert_eq!(card.try_launch(&plain, [1; 3], [16, 64, 1], 48 << 10, &[]), Ok(()));
        assert_eq!(card.try_launch(&bound, [1; 3], [128, 1, 1], 0, &[]), Ok(()));
        refused(card.try_launch(&plain, [1; 3], [1025, 1, 1], 0, &[]), invalid, "blocks of 1025 x 1 x 1 threads");
        refused(card.try_launch(&plain, [1; 3], [32, 33, 1], 0, &[]), invalid, "blocks of 32 x 33 x 1 threads");
        refused(card.try_launch(&plain, [1; 3], [1, 1, 65], 0, &[]), invalid, "blocks of 1 x 1 x 65 threads");
        refused(card.try_launch(&plain, [1, 65536, 1], [1; 3], 0, &[]), invalid, "a grid of 1 x 65536 x 1 blocks");
        refused(card.try_launch(&plain, [0, 1, 1], [1; 3], 0, &[]), invalid, "a grid of 0 x 1 x 1 blocks");
        refused(
            card.try_launch(&plain, [1; 3], [1; 3], (48 << 10) + 1, &[]),
            invalid,
            "and 49153 of dynamic shared memory",
        );
        refused(card.try_launch(&bound, [1; 3], [160, 1, 1], 0, &[]), resources, "__launch_bounds__ says 128");
        refused(card.try_launch(&pointer, [1; 3], [1; 3], 0, &[arg(64u64)]), invalid, "argument 0 is a pointer");
        refused(card.try_launch(&plain, [1; 3], [1; 3], 1 << 20, &[]), invalid, "and 1048576 of dynamic shared memory");
        // Each kernel of a module has its own.
        let y = arg(card.empty(4).address);
        assert_eq!(card.try_launch(&big, [1; 3], [1; 3], 9152, std::slice::from_ref(&y)), Ok(()));
        let outcome = card.try_launch(&big, [1; 3], [1; 3], 9153, &[y]);
        refused(outcome, invalid, "40000 bytes of static and 9153 of dynamic shared memory");
    });
}

/// Kernels can opt in to more shared memory, up to the size of an sm_80.
#[test]
fn shared_memory_opt_in() {
    emulated(here!(), &[], || {
        let card = Card::open();
        let source = "extern \"C\" __global__ void test(float* y) {\n\
            extern __shared__ float s[]; s[threadIdx.x * 1024] = 1; y[threadIdx.x] = s[threadIdx.x * 1024]; }";
        let (kernel, y) = (card.kernel(source, "test", &[]), card.empty(128));
        let attribute = cudarc::driver::sys::CUfunction_attribute::CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES;
        // SAFETY: the function is loaded.
        let set =
            |bytes| unsafe { cudarc::driver::result::function::set_function_attribute(kernel.0, attribute, bytes) };
        assert!(set((163 << 10) + 1).is_err());
        set(163 << 10).unwrap();
        let outcome = card.try_launch(&kernel, [1; 3], [32, 1, 1], 163 << 10, &[arg(y.address)]);
        assert_eq!(outcome, Ok(()), "{}", report());
        assert_eq!(card.read::<f32>(y), [1f32; 32]);
    });
}

#[test]
fn other_architecture() {
    emulated(here!(), &[("XT_EMULATOR_ARCH", "75")], || {
        let card = Card::open();
        let source = "extern \"C\" __global__ void test() {}";
        let newer = card.load(&compile_for(80, source, &[]).unwrap()).unwrap_err();
        assert_eq!(newer.0, CUresult::CUDA_ERROR_NO_BINARY_FOR_GPU);
        let module = card.load(&compile_for(75, source, &[]).unwrap()).unwrap();
        // SAFETY: the module stays loaded.
        let function = unsafe { cudarc::driver::result::module::get_function(module, c"test".into()) }.unwrap();
        let attribute = cudarc::driver::sys::CUfunction_attribute::CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES;
        // SAFETY: the function is loaded.
        let set =
            |bytes| unsafe { cudarc::driver::result::function::set_function_attribute(function, attribute, bytes) };
        assert!(set((64 << 10) + 1).is_err());
        set(64 << 10).unwrap();
        // No tensor core of that generation has these.
        let tensor = "#include \"common.cuh\"\nextern \"C\" __global__ void test(f32* y) { ptx_cp_async_commit(); }";
        assert!(compile_for(75, tensor, &["-DDTYPE=f32"]).unwrap_err().contains("ptx_cp_async_commit"));
        assert!(compile_for(80, tensor, &["-DDTYPE=f32"]).is_ok());
    });
}

#[test]
fn compiler_errors() {
    emulated(here!(), &[], || {
        let error = compile_for(80, "extern \"C\" __global__ void test() {\n  unknown();\n}", &[]).unwrap_err();
        assert!(error.contains("test.cu:2") && error.contains("unknown"), "{error}");
        let error = compile_for(80, "", &["--no-such-option"]).unwrap_err();
        assert!(error.contains("NVRTC_ERROR_INVALID_OPTION"), "{error}");
    });
}

#[test]
fn foreign_machine_code() {
    emulated(here!(), &[], || {
        let card = Card::open();
        let mut code = compile_for(80, "extern \"C\" __global__ void test() {}", &[]).unwrap();
        assert!(card.load(&code).is_ok());
        let last = code.len() - 1;
        code[last] ^= 1;
        assert_eq!(card.load(&code).unwrap_err().0, CUresult::CUDA_ERROR_INVALID_IMAGE);
        code[0] ^= 1;
        assert_eq!(card.load(&code).unwrap_err().0, CUresult::CUDA_ERROR_INVALID_IMAGE);
    });
}

/// A kernel whose result depends on which thread or block comes last.
fn last_writer() -> [f32; 2] {
    let card = Card::open();
    let source = "extern \"C\" __global__ void test(float* y) { y[0] = threadIdx.x; y[1] = blockIdx.x; }";
    let (kernel, y) = (card.kernel(source, "test", &[]), card.empty(8));
    card.launch(&kernel, 8, [64, 1, 1], &[arg(y.address)]);
    card.read(y).try_into().unwrap()
}

#[test]
fn order_forward() {
    emulated(here!(), &[("XT_EMULATOR_ORDER", "forward")], || {
        assert_eq!(last_writer(), [63.0, 7.0]);
    });
}

#[test]
fn order_reverse() {
    emulated(here!(), &[("XT_EMULATOR_ORDER", "reverse")], || {
        assert_eq!(last_writer(), [0.0, 0.0]);
    });
}

#[test]
fn order_random() {
    emulated(here!(), &[("XT_EMULATOR_ORDER", "random")], || {
        let results: Vec<_> = (0..4).map(|_| last_writer()).collect();
        assert!(results.iter().any(|result| *result != results[0]), "{results:?}");
    });
}
