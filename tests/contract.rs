//! The contract of every op: its values and gradients against a naive f64 definition, for every dtype, layout, number
//! of threads and vector level, on the device that `XT_TEST_DEVICE` names.

#[path = "contract/case.rs"]
pub mod case;
#[path = "contract/cases/mod.rs"]
mod cases;
#[path = "contract/check.rs"]
pub mod check;
pub mod common;
#[path = "contract/extremes/mod.rs"]
mod extremes;
#[path = "contract/refused.rs"]
pub mod refused;

use std::{
    process::Command,
    sync::{Mutex, MutexGuard, PoisonError},
};

use case::Case;
use check::{bits, check, same_bits};
use x_transformers::{Device, device::Level, ops::NAMES};

/// Cases measure memory in use, so no two tests may run ops at once.
pub fn alone() -> MutexGuard<'static, ()> {
    static ALONE: Mutex<()> = Mutex::new(());
    ALONE.lock().unwrap_or_else(PoisonError::into_inner)
}

/// The cases of `XT_CASE` (a part of a name), or all of them; of these, every third with `XT_EVERY=3`.
fn selected() -> Vec<Case> {
    let filter = std::env::var("XT_CASE").unwrap_or_default();
    let every = std::env::var("XT_EVERY").map_or(1, |text| text.parse().expect("XT_EVERY: a positive number"));
    let cases: Vec<Case> = cases::all().into_iter().filter(|case| case.name.contains(&filter)).collect();
    let all = cases.len();
    let cases: Vec<Case> = cases.into_iter().step_by(every).collect();
    assert!(!cases.is_empty(), "no case matches `{filter}`");
    if cases.len() < all {
        println!("{} of {all} cases: the others are left out by XT_EVERY={every}", cases.len());
    }
    cases
}

/// Every op has a case, and every case names an op: an op cannot be half-added.
#[test]
fn every_op_has_a_case() {
    let cases = cases::all();
    for name in NAMES {
        assert!(cases.iter().any(|case| case.op == *name), "no case for op `{name}`");
    }
    for case in &cases {
        assert!(NAMES.contains(&case.op), "case {} names `{}`, which is not in ops::NAMES", case.name, case.op);
    }
}

/// Values, gradients, layouts, and no leaked memory.
#[test]
fn contract() {
    let _alone = alone();
    let failures: Vec<String> = selected().iter().flat_map(check).collect();
    assert!(failures.is_empty(), "{} failures:\n{}", failures.len(), failures.join("\n"));
}

/// Infinities, NaN and the largest and smallest numbers: PyTorch's classes and exact values.
#[test]
fn extreme_inputs() {
    let _alone = alone();
    extremes::sweep();
}

/// One, two or three threads, and a second run: the same bits.
#[test]
fn any_number_of_threads_gives_the_same_bits() {
    let _alone = alone();
    let on = |threads: usize| -> Vec<(String, Vec<Vec<f64>>)> {
        let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().expect("a thread pool");
        // Cases are created inside, because they cannot be sent between threads.
        pool.install(|| selected().iter().map(|case| (case.name.clone(), bits(case).expect("a legal case"))).collect())
    };
    let one = on(1);
    // Other devices do not use the threads; two runs must agree there too.
    let more: &[usize] = if *common::device() == Device::Cpu { &[1, 2, 3] } else { &[1] };
    for &threads in more {
        for ((name, expected), (_, results)) in one.iter().zip(on(threads)) {
            let same = expected.iter().zip(&results).all(|(a, b)| same_bits(a, b));
            assert!(same, "{name}: other bits in another run with {threads} threads");
        }
    }
}

/// Runs the contract again on the code for older processors, which this one would never run, in a process limited to
/// their instructions.
#[test]
fn every_vector_level_keeps_the_contract() {
    if *common::device() != Device::Cpu {
        return;
    }
    for level in Level::ALL {
        if level >= Level::detected() {
            continue;
        }
        let this = std::env::current_exe().expect("the path of this test");
        let tests = ["contract", "extreme_inputs", "--exact"];
        let child = Command::new(this).args(tests).env("XT_CPU", level.name()).output();
        let output = child.expect("a process");
        let (text, errors) = (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
        assert!(text.contains("2 passed") && output.status.success(), "XT_CPU={}:\n{text}{errors}", level.name());
    }
}
