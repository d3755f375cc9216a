//! Helpers shared by several test suites.

use std::sync::OnceLock;

use x_transformers::Device;

/// The device under test: `XT_TEST_DEVICE` (as for [`Device::parse`]), else the CPU.
///
/// It is opened once, so that every tensor of a test is on the same one.
pub fn device() -> &'static Device {
    static DEVICE: OnceLock<Device> = OnceLock::new();
    DEVICE.get_or_init(|| {
        let name = std::env::var("XT_TEST_DEVICE").unwrap_or_else(|_| "cpu".into());
        Device::parse(&name).unwrap_or_else(|error| panic!("XT_TEST_DEVICE={name}: {error}"))
    })
}

/// Returns the harness's name of a test in a module (`module_path!()`), without the name of the program.
#[allow(dead_code, reason = "not every suite runs its own tests")]
pub fn name_of(module: &str, test: &str) -> String {
    module.split_once("::").map_or_else(|| test.to_string(), |(_, inner)| format!("{inner}::{test}"))
}
