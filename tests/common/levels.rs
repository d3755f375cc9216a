//! Reruns of a test with every set of vector instructions.

use std::process::Command;

use x_transformers::device::Level;

/// Runs a test of a module of this program in one process per level; levels that the processor lacks must fall back to
/// its own. The module is `module_path!()`.
pub fn at_every_level(module: &str, test: &str) {
    let test = &super::common::name_of(module, test);
    let program = std::env::current_exe().expect("the path of this test");
    for level in Level::ALL.map(Level::name) {
        let child = Command::new(&program).args(["--exact", test]).env("XT_CPU", level).output().expect("a second run");
        let (text, errors) = (String::from_utf8_lossy(&child.stdout), String::from_utf8_lossy(&child.stderr));
        assert!(child.status.success() && text.contains("1 passed"), "XT_CPU={level}:\n{text}{errors}");
    }
}
