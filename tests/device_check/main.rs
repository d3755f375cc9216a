//! The suites that a card must pass, as one program, which `scripts/gpu-check` copies to a machine that has a card and
//! no Rust. Not run by `cargo test`, whose own targets have the same tests.
//!
//!     XT_TEST_DEVICE=cuda:0 cargo test --release --test device_check instructions

#![cfg(all(target_os = "linux", target_arch = "x86_64"))]
#![allow(clippy::duplicate_mod, reason = "each suite has its own `common`, as in the target of its name")]

#[path = "../attention.rs"]
mod attention;
#[path = "../attention_scores.rs"]
mod attention_scores;
#[allow(dead_code)]
#[path = "../../build.rs"]
mod build;
#[path = "../cached.rs"]
mod cached;
#[allow(dead_code)]
#[path = "../emulator/card.rs"]
mod card;
#[path = "../contract.rs"]
mod contract;
#[path = "../cuda.rs"]
mod cuda;
#[allow(dead_code)]
#[path = "../train/folder.rs"]
mod folder;
#[path = "../emulator/instructions.rs"]
mod instructions;
#[path = "../parity.rs"]
mod parity;
#[path = "../sampling.rs"]
mod sampling;
#[path = "../train/training.rs"]
mod train;
#[path = "../emulator/warpgroups.rs"]
mod warpgroups;

use contract::{alone, case, check, common, refused};
use folder::Folder;
use x_transformers::device::CudaDevice;

/// The path of the function that this stands in: the suites of the emulator find their tests by it.
macro_rules! here {
    () => {
        module_path!()
    };
}
use here;

/// Runs a test of the emulator's instructions on the device of `XT_TEST_DEVICE`. Skips tests that need an emulated card
/// of another architecture.
fn emulated(_test: &str, variables: &[(&str, &str)], body: impl FnOnce()) {
    let Some(gpu) = CudaDevice::of(&common::device()) else { return };
    let architecture = gpu.architecture().to_string();
    if variables.iter().all(|variable| *variable == ("XT_EMULATOR_ARCH", &architecture)) {
        body();
    }
}
