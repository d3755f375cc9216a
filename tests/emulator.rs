//! The emulated CUDA driver of `tests/emulator`: its detectors, its results, and the kernels that run on it.
//!
//! Each test runs in its own process, in which the emulator stands in for driver, NVRTC and cuBLAS.

#![cfg(all(feature = "cuda", target_os = "linux", target_arch = "x86_64"))]

#[allow(dead_code)]
#[path = "../build.rs"]
mod build;
#[path = "emulator/card.rs"]
mod card;
#[path = "emulator/detectors.rs"]
mod detectors;
#[path = "emulator/driver.rs"]
mod driver;
#[path = "emulator/instructions.rs"]
mod instructions;
#[path = "emulator/kernels.rs"]
mod kernels;
#[path = "emulator/versions.rs"]
mod versions;
#[path = "emulator/warpgroup_faults.rs"]
mod warpgroup_faults;
#[path = "emulator/warpgroups.rs"]
mod warpgroups;

use std::{
    io::Write,
    path::Path,
    process::{Command, Output},
    sync::OnceLock,
};

/// The path of the function that this stands in, and a name within it.
macro_rules! here {
    () => {{
        fn here() {}
        std::any::type_name_of_val(&here)
    }};
}
use here;

fn script() -> Command {
    Command::new(Path::new(env!("CARGO_MANIFEST_DIR")).join("scripts/emulated"))
}

/// Builds the emulator, once per process. `None`, with a note, if there is no compiler.
fn built() -> Option<()> {
    static BUILT: OnceLock<Option<()>> = OnceLock::new();
    *BUILT.get_or_init(|| {
        let compiler = std::env::var("CXX").unwrap_or_else(|_| "g++".into());
        if let Err(error) = Command::new(&compiler).arg("--version").output() {
            let required = std::env::var("XT_REQUIRE_GXX").as_deref() == Ok("1");
            assert!(!required, "no host compiler ({compiler}: {error}), but XT_REQUIRE_GXX=1 promises it");
            // Straight to the stream: the harness hides what a passing test prints.
            let _ =
                writeln!(std::io::stderr(), "skipped: tests of the emulator: no host compiler ({compiler}: {error})");
            return None;
        }
        let output = script().output().expect("scripts/emulated starts");
        assert!(output.status.success(), "{}", text(&output));
        Some(())
    })
}

fn text(output: &Output) -> String {
    format!("{}{}", String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr))
}

/// Runs the body of a test, whose path is `here!()`, on the emulated card with these environment variables: in this
/// process if it already uses the emulator, else in a new one.
fn emulated(path: &str, variables: &[(&str, &str)], body: impl FnOnce()) {
    if std::env::var_os("XT_EMULATOR").is_some() {
        return body();
    }
    if built().is_none() {
        return;
    }
    let name = path.split_once("::").and_then(|(_, path)| path.strip_suffix("::here")).expect("a test in a module");
    let this = std::env::current_exe().expect("the path of this test");
    let mut command = script();
    command.arg(this).args(["--exact", name, "--nocapture"]).envs(variables.iter().copied());
    let output = command.output().expect("scripts/emulated starts");
    assert!(output.status.success() && text(&output).contains("1 passed"), "{name}:\n{}", text(&output));
}
