//! Faults in warpgroup products that the emulator must detect: for each, a kernel that has it and one that does not.

use cudarc::driver::sys::CUresult;

use crate::{
    card::{Card, arg, exported, report},
    emulated, here,
};

/// Runs a kernel of two warpgroups: `fill(value)` writes its tile `t` of dynamic shared memory; `start()` begins a
/// product of it into `d`, and `start_registers()` one from registers.
fn run(body: &str) -> Result<(), CUresult> {
    let source = format!(
        "#include \"common.cuh\"\n\
         extern \"C\" __global__ void __launch_bounds__(256) test(f32* y) {{\n\
         extern __shared__ uint4 memory[];\n\
         const u32 place = (ptx_shared_address(memory) + 1023) / 1024 * 1024;\n\
         u32* const t = (u32*)((char*)memory + (place - ptx_shared_address(memory)));\n\
         const u64 at = (u64)1 << 62 | (u64)(1024 / 16) << 32 | place / 16;\n\
         const auto fill = [&](u32 value) {{ for (u32 i = threadIdx.x; i < 4096; i += 256) t[i] = value; }};\n\
         f32 d[8][4] = {{}}; u32 a[4] = {{}};\n\
         const auto start = [&] {{ ptx_wgmma_ss<true>(d, at, at + 512, true); ptx_wgmma_commit(); }};\n\
         const auto start_registers = [&] {{ ptx_wgmma_rs<true>(d, a, at, true); ptx_wgmma_commit(); }};\n\
         {body}\n\
         y[threadIdx.x] = d[0][0];\n}}\n"
    );
    let card = Card::open();
    let kernel = card.kernel_as("sm_90a", &source, "test", &["-DDTYPE=f32"]);
    let y = card.empty(4 * 256);
    card.try_launch(&kernel, [1; 3], [256, 1, 1], (16 << 10) + 1024, &[arg(y.address)])
}

fn check(right: &str, wrong: &str, words: &str) {
    assert_eq!(run(right), Ok(()), "the right kernel: {}", report());
    assert_eq!(run(wrong), Err(CUresult::CUDA_ERROR_ILLEGAL_ADDRESS), "the wrong kernel");
    let report = report();
    assert!(report.starts_with("kernel test, block (0, 0, 0), thread ") && report.contains(words), "{report}");
    let clear: unsafe extern "C" fn() = exported("xt_emulator_clear");
    // SAFETY: it has no conditions.
    unsafe { clear() };
}

const READY: &str = "fill(0); ptx_fence_async(); __syncthreads(); ptx_wgmma_fence();";

#[test]
fn writes_without_a_fence_of_the_proxy() {
    emulated(here!(), &[("XT_EMULATOR_ARCH", "90")], || {
        let rest = "__syncthreads(); ptx_wgmma_fence(); start(); ptx_wgmma_wait<0>();";
        check(
            &format!("fill(0); ptx_fence_async(); {rest}"),
            &format!("ptx_fence_async(); fill(0); {rest}"),
            "written without fence.proxy.async by",
        );
    });
}

#[test]
fn writes_without_a_barrier() {
    emulated(here!(), &[("XT_EMULATOR_ARCH", "90")], || {
        let rest = "ptx_wgmma_fence(); start(); ptx_wgmma_wait<0>();";
        check(
            &format!("fill(0); ptx_fence_async(); __syncthreads(); {rest}"),
            &format!("fill(0); ptx_fence_async(); {rest}"),
            "without a barrier between",
        );
    });
}

#[test]
fn copies_that_nobody_waited_for() {
    emulated(here!(), &[("XT_EMULATOR_ARCH", "90")], || {
        let copy = "fill(0); __syncthreads(); ptx_cp_async_16(t + 4 * threadIdx.x, y, false); ptx_cp_async_commit();";
        let rest = "ptx_fence_async(); __syncthreads(); ptx_wgmma_fence(); start(); ptx_wgmma_wait<0>();";
        check(
            &format!("{copy} ptx_cp_async_wait<0>(); {rest}"),
            &format!("{copy} {rest}"),
            "touches what a cp.async that was not waited for",
        );
    });
}

#[test]
fn operands_that_change_before_the_wait() {
    emulated(here!(), &[("XT_EMULATOR_ARCH", "90")], || {
        check(
            &format!("{READY} start(); ptx_wgmma_wait<0>(); __syncthreads(); fill(1);"),
            &format!("{READY} start(); __syncthreads(); fill(1); ptx_wgmma_wait<0>();"),
            "overwritten since it was started",
        );
        check(
            &format!("{READY} start_registers(); ptx_wgmma_wait<0>(); a[1] = 5;"),
            &format!("{READY} start_registers(); a[1] = 5; ptx_wgmma_wait<0>();"),
            "registers of a wgmma were changed",
        );
        // As long as a younger group is in flight.
        check(
            &format!("{READY} start(); start_registers(); ptx_wgmma_wait<1>(); ptx_wgmma_wait<0>(); a[1] = 5;"),
            &format!("{READY} start(); start_registers(); ptx_wgmma_wait<1>(); a[1] = 5; ptx_wgmma_wait<0>();"),
            "registers of a wgmma were changed",
        );
    });
}

#[test]
fn products_that_nobody_waits_for() {
    emulated(here!(), &[("XT_EMULATOR_ARCH", "90")], || {
        check(
            &format!("{READY} start(); ptx_wgmma_wait<0>();"),
            &format!("{READY} start();"),
            "without having waited for its wgmma",
        );
    });
}

#[test]
fn products_without_a_fence_of_their_registers() {
    emulated(here!(), &[("XT_EMULATOR_ARCH", "90")], || {
        check(
            &format!("{READY} start(); ptx_wgmma_wait<0>(); ptx_wgmma_fence(); start(); ptx_wgmma_wait<0>();"),
            &format!("{READY} start(); ptx_wgmma_wait<0>(); start(); ptx_wgmma_wait<0>();"),
            "without wgmma.fence",
        );
    });
}

#[test]
fn warps_that_take_no_part() {
    emulated(here!(), &[("XT_EMULATOR_ARCH", "90")], || {
        // One warpgroup may.
        check(
            &format!("{READY} if (threadIdx.x < 128) {{ start(); ptx_wgmma_wait<0>(); }}"),
            &format!("{READY} if (threadIdx.x < 96) {{ start(); ptx_wgmma_wait<0>(); }}"),
            "has left the kernel",
        );
        check(
            &format!("{READY} start(); ptx_wgmma_wait<0>();"),
            &format!("{READY} if (threadIdx.x % 128 < 96) start(); ptx_wgmma_wait<0>();"),
            "leaves out a wgmma of its warpgroup",
        );
    });
}
