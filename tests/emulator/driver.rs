//! Graphs, faults on demand, limits of memory, and matrix products.

use std::ffi::CString;

use cudarc::{
    cublas::{
        result::{create_handle, gemm_strided_batched_ex, set_stream},
        sys::{
            cublasComputeType_t as Compute, cublasGemmAlgo_t, cublasMath_t, cublasOperation_t as Operation,
            cudaDataType,
        },
    },
    driver::{
        result,
        sys::{CUgraphInstantiate_flags, CUresult, CUstreamCaptureMode},
    },
};
use half::{bf16, f16};

use crate::{
    card::{Buffer, Card, arg, compile_for, exported, live_bytes, report},
    emulated, here,
};

const ADD: &str = "extern \"C\" __global__ void add(float* y, float term, float* trail, int at) {\n\
    y[0] += term; trail[at] = y[0]; }";

/// Makes the `n`-th call of a kind fail from now on.
fn fail(kind: &str, n: u64) {
    let arrange: unsafe extern "C" fn(*const std::ffi::c_char, u64) -> i32 = exported("xt_emulator_fail");
    let kind = CString::new(kind).unwrap();
    // SAFETY: the text ends with a zero.
    assert_eq!(unsafe { arrange(kind.as_ptr(), n) }, 1, "{kind:?}");
}

fn count(kind: &str) -> u64 {
    let get: unsafe extern "C" fn(*const std::ffi::c_char) -> u64 = exported("xt_emulator_count");
    let kind = CString::new(kind).unwrap();
    // SAFETY: the text ends with a zero.
    unsafe { get(kind.as_ptr()) }
}

fn begin(card: &Card) {
    let mode = CUstreamCaptureMode::CU_STREAM_CAPTURE_MODE_THREAD_LOCAL;
    // SAFETY: the stream exists.
    unsafe { result::stream::begin_capture(card.stream, mode) }.unwrap();
}

/// Recorded work runs on each launch of the graph, with the arguments of the recording.
#[test]
fn graph_replays_in_order() {
    emulated(here!(), &[], || {
        let card = Card::open();
        let kernel = card.kernel(ADD, "add", &[]);
        let (y, trail, copy) = (card.upload(&[5f32]), card.upload(&[0f32; 3]), card.upload(&[0f32; 3]));
        begin(&card);
        // SAFETY: the buffers have these sizes.
        unsafe { result::memset_d8_async(y.address, 0, 4, card.stream) }.unwrap();
        for (at, term) in [(0, 1f32), (1, 10.0), (2, 100.0)] {
            card.launch(&kernel, 1, [1; 3], &[arg(y.address), arg(term), arg(trail.address), arg(at)]);
        }
        // SAFETY: as above.
        unsafe { result::memcpy_dtod_async(copy.address, trail.address, 12, card.stream) }.unwrap();
        // SAFETY: the stream is being recorded.
        let graph = unsafe { result::stream::end_capture(card.stream) }.unwrap();
        assert_eq!(card.read::<f32>(y), [5.0], "nothing has run yet");
        // SAFETY: the graph was made above, and outlived by what was made of it.
        let executable = unsafe { result::graph::instantiate(graph, CUgraphInstantiate_flags(0)) }.unwrap();
        // SAFETY: as above.
        unsafe { result::graph::destroy(graph) }.unwrap();
        for _ in 0..2 {
            // SAFETY: it is alive until the end of the test.
            unsafe { result::graph::launch(executable, card.stream) }.unwrap();
            assert_eq!(card.read::<f32>(copy), [1.0, 11.0, 111.0]);
        }
        // SAFETY: not used again.
        unsafe { result::graph::exec_destroy(executable) }.unwrap();
    });
}

/// Calls that wait or allocate invalidate a recording.
#[test]
fn graph_refuses_unsupported_work() {
    emulated(here!(), &[], || {
        let card = Card::open();
        begin(&card);
        // SAFETY: the emulator refuses both.
        let (memory, wait) = unsafe { (result::malloc_sync(64), result::stream::synchronize(card.stream)) };
        assert_eq!(memory.unwrap_err().0, CUresult::CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED);
        assert_eq!(wait.unwrap_err().0, CUresult::CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED);
        // SAFETY: the stream is being recorded.
        let ended = unsafe { result::stream::end_capture(card.stream) };
        assert_eq!(ended.unwrap_err().0, CUresult::CUDA_ERROR_STREAM_CAPTURE_INVALIDATED);
        card.free(card.empty(64));
    });
}

#[test]
fn every_kind_of_call_fails_on_demand() {
    emulated(here!(), &[], || {
        let card = Card::open();
        let kernel = card.kernel(ADD, "add", &[]);
        let (y, trail) = (card.upload(&[0f32]), card.upload(&[0f32]));
        let launch =
            || card.try_launch(&kernel, [1; 3], [1; 3], 0, &[arg(y.address), arg(1f32), arg(trail.address), arg(0)]);
        let before = count("launch");
        fail("launch", 2);
        assert_eq!(launch(), Ok(()));
        assert_eq!(launch(), Err(CUresult::CUDA_ERROR_LAUNCH_OUT_OF_RESOURCES));
        assert_eq!(launch(), Ok(()));
        assert_eq!(count("launch") - before, 3);
        // From then on.
        fail("launch+", 1);
        assert!(launch().is_err() && launch().is_err());
        fail("launch", 0);
        assert_eq!(launch(), Ok(()));

        fail("alloc", 1);
        // SAFETY: no memory is given.
        assert_eq!(unsafe { result::malloc_sync(64) }.unwrap_err().0, CUresult::CUDA_ERROR_OUT_OF_MEMORY);
        fail("copy", 1);
        assert!(card.try_read::<f32>(y).is_err());
        assert_eq!(card.read::<f32>(y), [3.0]);
        fail("compile", 1);
        assert!(compile_for(80, ADD, &[]).unwrap_err().contains("NVRTC_ERROR_OUT_OF_MEMORY"));
        assert!(compile_for(80, ADD, &[]).is_ok());
    });
}

/// A copy reads the host's memory when later work needs it, and no later.
#[test]
fn copies_from_the_host_are_late() {
    emulated(here!(), &[], || {
        let card = Card::open();
        let (late, waited) = (card.empty(8), card.empty(8));
        let mut source = [1f32, 2.0];
        let copy = |to: Buffer, source: &[f32]| {
            // SAFETY: the buffer has this size; the source lives until the end.
            unsafe { result::memcpy_htod_async(to.address, source, card.stream) }.unwrap();
        };
        copy(waited, &source);
        // SAFETY: the stream exists.
        unsafe { result::stream::synchronize(card.stream) }.unwrap();
        copy(late, &source);
        source = [3.0, 4.0];
        std::hint::black_box(&source);
        assert_eq!((card.read::<f32>(waited), card.read::<f32>(late)), (vec![1.0, 2.0], vec![3.0, 4.0]));
    });
}

#[test]
fn live_memory_is_counted() {
    emulated(here!(), &[], || {
        let alive: unsafe extern "C" fn(*const std::ffi::c_char) -> i64 = exported("xt_emulator_alive");
        // SAFETY: the text ends with a zero.
        let alive = |thing: &std::ffi::CStr| unsafe { alive(thing.as_ptr()) };
        let things = [c"context", c"stream", c"event", c"graph", c"executable", c"module", c"blas", c"pinned"];
        assert_eq!((things.map(alive), alive(c"nothing")), ([0; 8], -1));
        let card = Card::open();
        card.kernel(ADD, "add", &[]);
        let handle = create_handle().unwrap();
        // SAFETY: each is released once, below.
        let pinned = unsafe { result::malloc_host(64, 0) }.unwrap();
        assert_eq!(things.map(alive), [1, 1, 0, 0, 0, 1, 1, 1]);
        fail("pin", 1);
        fail("blas", 1);
        // SAFETY: nothing is given.
        assert!(unsafe { result::malloc_host(64, 0) }.is_err() && create_handle().is_err());
        // SAFETY: made above, not used again.
        unsafe {
            result::free_host(pinned).unwrap();
            cudarc::cublas::result::destroy_handle(handle).unwrap();
            result::stream::destroy(card.stream).unwrap();
        }
        assert_eq!(things.map(alive), [1, 0, 0, 0, 0, 1, 0, 0]);
    });
}

#[test]
fn faults_from_the_environment() {
    emulated(here!(), &[("XT_EMULATOR_FAIL", "alloc:2,copy:1")], || {
        let card = Card::open();
        let buffer = card.empty(64);
        // SAFETY: no memory is given.
        assert!(unsafe { result::malloc_sync(64) }.is_err());
        assert!(card.try_read::<u8>(buffer).is_err());
        assert_eq!(count("copy"), 1);
    });
}

#[test]
fn memory_is_limited_and_counted() {
    emulated(here!(), &[("XT_EMULATOR_MEMORY", "1000000")], || {
        let card = Card::open();
        assert_eq!(result::mem_get_info().unwrap(), (1_000_000, 1_000_000));
        let buffer = card.empty(900_000);
        assert_eq!((live_bytes(), result::mem_get_info().unwrap().0), (900_000, 100_000));
        // SAFETY: no memory is given.
        assert_eq!(unsafe { result::malloc_sync(100_001) }.unwrap_err().0, CUresult::CUDA_ERROR_OUT_OF_MEMORY);
        card.free(buffer);
        assert_eq!(live_bytes(), 0);
        card.empty(1_000_000);
    });
}

/// Against the plain formula, for each type and transposition, in batches with gaps between the matrices.
#[test]
fn products() {
    emulated(here!(), &[], || {
        type Convert = fn(f64) -> Vec<u8>;
        let types: [(cudaDataType, Compute, Convert); 4] = [
            (cudaDataType::CUDA_R_32F, Compute::CUBLAS_COMPUTE_32F, |x| arg(x as f32)),
            (cudaDataType::CUDA_R_64F, Compute::CUBLAS_COMPUTE_64F, arg),
            (cudaDataType::CUDA_R_16F, Compute::CUBLAS_COMPUTE_32F, |x| arg(f16::from_f64(x).to_bits())),
            (cudaDataType::CUDA_R_16BF, Compute::CUBLAS_COMPUTE_32F, |x| arg(bf16::from_f64(x).to_bits())),
        ];
        let card = Card::open();
        let handle = create_handle().unwrap();
        // SAFETY: both exist.
        unsafe { set_stream(handle, card.stream.cast()) }.unwrap();
        let (m, n, k, items) = (3usize, 4usize, 5usize, 2usize);
        for (kind, compute, convert) in types {
            for transposed in 0..4 {
                let (ta, tb) = (transposed & 1 != 0, transposed & 2 != 0);
                // Whole numbers: exact in every type.
                let (a_rows, b_rows) = (if ta { k } else { m }, if tb { n } else { k });
                let value = |matrix: usize, item: usize, row: usize, column: usize| {
                    ((matrix * 5 + item * 3 + row * 7 + column * 11) % 9) as f64 - 4.0
                };
                let (lda, ldb, ldc) = (a_rows + 1, b_rows + 2, m + 1);
                let fill = |matrix: usize, rows: usize, columns: usize, leading: usize| -> Buffer {
                    let element = |i: usize| {
                        let (item, at) = (i / (leading * columns), i % (leading * columns));
                        let inside = at % leading < rows;
                        convert(if inside { value(matrix, item, at % leading, at / leading) } else { 77.0 })
                    };
                    let bytes: Vec<u8> = (0..items * leading * columns).flat_map(element).collect();
                    card.upload(&bytes)
                };
                let a = fill(0, a_rows, if ta { m } else { k }, lda);
                let b = fill(1, b_rows, if tb { k } else { n }, ldb);
                let c = fill(2, m, n, ldc);
                let operation = |on| if on { Operation::CUBLAS_OP_T } else { Operation::CUBLAS_OP_N };
                let wide = compute == Compute::CUBLAS_COMPUTE_64F;
                let (alpha, beta) = if wide { (arg(2f64), arg(3f64)) } else { (arg(2f32), arg(3f32)) };
                // SAFETY: the buffers hold what the sizes say.
                unsafe {
                    gemm_strided_batched_ex(
                        handle,
                        operation(ta),
                        operation(tb),
                        m as i32,
                        n as i32,
                        k as i32,
                        alpha.as_ptr().cast(),
                        a.address as *const _,
                        kind,
                        lda as i32,
                        (lda * if ta { m } else { k }) as i64,
                        b.address as *const _,
                        kind,
                        ldb as i32,
                        (ldb * if tb { k } else { n }) as i64,
                        beta.as_ptr().cast(),
                        c.address as *mut _,
                        kind,
                        ldc as i32,
                        (ldc * n) as i64,
                        items as i32,
                        compute,
                        cublasGemmAlgo_t::CUBLAS_GEMM_DEFAULT,
                    )
                }
                .unwrap_or_else(|error| panic!("{error:?}: {}", report()));
                let element = |i: usize| {
                    let (item, at) = (i / (ldc * n), i % (ldc * n));
                    let (row, column) = (at % ldc, at / ldc);
                    if row >= m {
                        return convert(77.0);
                    }
                    let a = |k| if ta { value(0, item, k, row) } else { value(0, item, row, k) };
                    let b = |k| if tb { value(1, item, column, k) } else { value(1, item, k, column) };
                    convert(2.0 * (0..k).map(|k| a(k) * b(k)).sum::<f64>() + 3.0 * value(2, item, row, column))
                };
                let expected: Vec<u8> = (0..items * ldc * n).flat_map(element).collect();
                assert!(card.read::<u8>(c) == expected, "{kind:?} {ta} {tb}");
            }
        }
    });
}

#[test]
fn products_out_of_bounds_and_in_tf32() {
    emulated(here!(), &[], || {
        let card = Card::open();
        let handle = create_handle().unwrap();
        let multiply = |a: Buffer, c: Buffer, k: i32| {
            let (one, zero) = (1f32, 0f32);
            // SAFETY: the emulator checks the sizes.
            unsafe {
                gemm_strided_batched_ex(
                    handle,
                    Operation::CUBLAS_OP_N,
                    Operation::CUBLAS_OP_N,
                    1,
                    1,
                    k,
                    (&raw const one).cast(),
                    a.address as *const _,
                    cudaDataType::CUDA_R_32F,
                    1,
                    0,
                    a.address as *const _,
                    cudaDataType::CUDA_R_32F,
                    k,
                    0,
                    (&raw const zero).cast(),
                    c.address as *mut _,
                    cudaDataType::CUDA_R_32F,
                    1,
                    0,
                    1,
                    Compute::CUBLAS_COMPUTE_32F,
                    cublasGemmAlgo_t::CUBLAS_GEMM_DEFAULT,
                )
            }
        };
        let (a, c) = (card.upload(&[1.0 + 2f32.powi(-12), 2.0]), card.empty(4));
        multiply(a, c, 1).unwrap();
        assert_eq!(card.read::<f32>(c), [(1.0 + 2f32.powi(-12)).powi(2)]);
        // SAFETY: the handle exists.
        unsafe { cudarc::cublas::sys::cublasSetMathMode(handle, cublasMath_t::CUBLAS_TF32_TENSOR_OP_MATH) }
            .result()
            .unwrap();
        multiply(a, c, 1).unwrap();
        assert_eq!(card.read::<f32>(c), [1.0], "ten bits are left");
        assert!(multiply(a, c, 3).is_err());
        assert!(report().starts_with("cuBLAS, matrix A of item 0, reads 4 bytes at 0x"), "{}", report());
    });
}

/// cuBLASLt: a bias, sums over k, and the errors for what a card would compute wrongly or not at all.
#[test]
fn products_with_epilogues() {
    use cudarc::cublaslt::{
        result as lt,
        sys::{
            cublasComputeType_t as LtCompute, cublasLtEpilogue_t as Epilogue,
            cublasLtMatmulDescAttributes_t as Attribute, cudaDataType_t as LtType,
        },
    };
    emulated(here!(), &[], || {
        let card = Card::open();
        let handle = lt::create_handle().unwrap();
        let bf = |values: &[f32]| values.iter().map(|&x| bf16::from_f32(x).to_bits()).collect::<Vec<u16>>();
        // Column-major: A [2, 4], B [4, 2] and C [2, 2].
        let a = card.upload(&bf(&[1., 2., 3., 4., 5., 6., 7., 8.]));
        let b = card.upload(&bf(&[1., 0., 1., 0., 0., 2., 0., 3.]));
        let extra = card.upload(&bf(&[10., 20.]));
        let multiply = |epilogue: Epilogue, extra: u64, c: Buffer, kind: LtType, columns: u64| {
            let product = lt::create_matmul_desc(LtCompute::CUBLAS_COMPUTE_32F, LtType::CUDA_R_32F)?;
            let layout = |rows, columns| lt::create_matrix_layout(kind, rows, columns, rows as i64);
            let [a_layout, b_layout, c_layout] = [layout(2, 4)?, layout(4, columns)?, layout(2, columns)?];
            let (epilogue, one, zero) = (epilogue as u32, 1f32, 0f32);
            let preference = lt::create_matmul_pref()?;
            // SAFETY: the descriptors exist, values have their attributes' sizes, and the emulator checks addresses.
            unsafe {
                let of_epilogue = Attribute::CUBLASLT_MATMUL_DESC_EPILOGUE;
                lt::set_matmul_desc_attribute(product, of_epilogue, (&raw const epilogue).cast(), 4)?;
                let of_bias = Attribute::CUBLASLT_MATMUL_DESC_BIAS_POINTER;
                lt::set_matmul_desc_attribute(product, of_bias, (&raw const extra).cast(), 8)?;
                let found =
                    lt::get_matmul_algo_heuristic(handle, product, a_layout, b_layout, c_layout, c_layout, preference)?;
                lt::matmul(
                    handle,
                    product,
                    (&raw const one).cast(),
                    (&raw const zero).cast(),
                    a.address as *const _,
                    a_layout,
                    b.address as *const _,
                    b_layout,
                    c.address as *const _,
                    c_layout,
                    c.address as *mut _,
                    c_layout,
                    &found.algo,
                    std::ptr::null_mut(),
                    0,
                    card.stream.cast(),
                )
            }
        };
        let (bias, sums) = (Epilogue::CUBLASLT_EPILOGUE_BIAS, Epilogue::CUBLASLT_EPILOGUE_BGRADB);
        let c = card.empty(8);
        multiply(bias, extra.address, c, LtType::CUDA_R_16BF, 2).unwrap();
        assert_eq!(card.read::<u16>(c), bf(&[16., 28., 37., 52.]));
        let totals = card.empty(4);
        multiply(sums, totals.address, c, LtType::CUDA_R_16BF, 2).unwrap();
        assert_eq!((card.read::<u16>(c), card.read::<u16>(totals)), (bf(&[6., 8., 27., 32.]), bf(&[2., 5.])));
        // No algorithm: GELU, and half types in f64. An error: a bias that is not aligned.
        let gelu = Epilogue::CUBLASLT_EPILOGUE_GELU_BIAS;
        assert!(multiply(gelu, extra.address, c, LtType::CUDA_R_16BF, 2).is_err());
        assert!(multiply(bias, extra.address, c, LtType::CUDA_R_64F, 2).is_err());
        assert!(multiply(bias, extra.address + 2, c, LtType::CUDA_R_16BF, 2).is_err());
        // More columns than B and C have.
        assert!(multiply(bias, extra.address, c, LtType::CUDA_R_16BF, 3).is_err());
        assert!(report().starts_with("cuBLAS, matrix B of item 0, reads"), "{}", report());
    });
}
