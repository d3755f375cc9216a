//! Target that kernels are compiled for, chosen by the versions of GPU, driver and NVRTC.
//!
//! NVIDIA's rules ("CUDA Compatibility"): a driver loads machine code (CUBIN) from any NVRTC of its own major version
//! or an older one, but PTX only from an NVRTC no newer than itself. So kernels are compiled to machine code if NVRTC
//! knows the GPU, and to PTX, which the driver compiles further, if the GPU is newer than NVRTC.

use std::{fmt, str::FromStr};

use super::{compile, libraries};
use crate::{Error, Result};

/// Compute capability of a GPU: 80 for 8.0.
pub type Architecture = u32;

/// Oldest compute capability that the kernels are written for.
const OLDEST: Architecture = 75;

/// A target of NVRTC: `sm_80`, `sm_90a` or `compute_90`.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub struct Target {
    architecture: Architecture,
    form: Form,
}

#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
enum Form {
    /// Machine code that also runs on later GPUs of the same major version.
    Code,
    /// Machine code for exactly this architecture, including its specific instructions.
    Specific,
    /// PTX, which the driver compiles for its GPU.
    Ptx,
}

impl Target {
    /// Returns the machine-code target of a GPU with this compute capability; for 9.0 that is `sm_90a`, which has the
    /// instructions of Hopper's tensor cores.
    pub fn of(architecture: Architecture) -> Self {
        Self { architecture, form: if architecture == 90 { Form::Specific } else { Form::Code } }
    }

    /// Returns the compute capability.
    pub fn architecture(self) -> Architecture {
        self.architecture
    }

    /// Returns `true` if its code may use warpgroup products (`wgmma`), which no other target supports.
    pub fn has_warpgroups(self) -> bool {
        self == Self::of(90)
    }

    /// Returns `true` if NVRTC generates PTX instead of machine code.
    pub fn is_ptx(self) -> bool {
        self.form == Form::Ptx
    }
}

impl fmt::Display for Target {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (before, after) = match self.form {
            Form::Code => ("sm", ""),
            Form::Specific => ("sm", "a"),
            Form::Ptx => ("compute", ""),
        };
        write!(f, "{before}_{}{after}", self.architecture)
    }
}

impl FromStr for Target {
    type Err = Error;

    /// Parses `80`, `sm_80`, `90a`, `sm_90a` or `compute_90`.
    fn from_str(text: &str) -> Result<Self> {
        let (number, form) = match (text.strip_prefix("compute_"), text.strip_prefix("sm_").unwrap_or(text)) {
            (Some(number), _) => (number, Form::Ptx),
            (None, code) => code.strip_suffix('a').map_or((code, Form::Code), |number| (number, Form::Specific)),
        };
        let plain = number.bytes().all(|byte| byte.is_ascii_digit());
        match number.parse() {
            Ok(architecture @ OLDEST..=999) if plain => Ok(Self { architecture, form }),
            _ => Err(error(format!(
                "expected a target such as sm_80, sm_90a or compute_90, sm_75 or later, got `{text}`"
            ))),
        }
    }
}

/// CUDA version: `(12, 4)` for 12.4.
pub(super) type Version = (i32, i32);

/// Returns the target for a GPU with this compute capability, a driver for this CUDA version, and the installed NVRTC.
///
/// Errors: versions that do not work together, with the remedy.
pub(super) fn target(architecture: Architecture, driver: Version) -> std::result::Result<Target, String> {
    libraries::nvrtc().state.clone().map_err(|why| format!("NVRTC: {why}"))?;
    let nvrtc = compile::nvrtc_version().map_err(|why| why.to_string())?;
    let known = compile::supported_architectures().map_err(|why| why.to_string())?;
    choose(architecture, driver, nvrtc, &known)
}

/// Decodes the result of `cuDriverGetVersion`: 12040 is CUDA 12.4.
pub(super) fn driver_version(number: i32) -> Version {
    (number / 1000, number % 1000 / 10)
}

/// Returns the PyPI packages of NVRTC and cuBLAS for a major version of CUDA.
fn packages(major: i32) -> String {
    match major {
        12 => "nvidia-cuda-nvrtc-cu12 nvidia-cublas-cu12".into(),
        later => format!("'nvidia-cuda-nvrtc=={later}.*' 'nvidia-cublas=={later}.*'"),
    }
}

/// Like [`target`], but for an NVRTC that knows these architectures, in ascending order.
fn choose(
    architecture: Architecture,
    driver: Version,
    nvrtc: Version,
    known: &[Architecture],
) -> std::result::Result<Target, String> {
    let text = |(major, minor): Version| format!("{major}.{minor}");
    if architecture < OLDEST {
        return Err(format!(
            "the GPU is sm_{architecture}, expected sm_{OLDEST} (Turing) or later: use another GPU, or the device `cpu`"
        ));
    }
    if driver.0 < 12 {
        return Err(format!(
            "the driver supports CUDA {}, expected 12.0 or later: install driver 525 or later",
            text(driver)
        ));
    }
    if nvrtc.0 > driver.0 {
        let newer = match nvrtc.0 {
            13 => "driver 580 or later".to_string(),
            major => format!("a driver for CUDA {major}"),
        };
        return Err(format!(
            "NVRTC {} generates code that a driver for CUDA {} cannot load: install {newer}, or NVRTC and cuBLAS of \
             CUDA {} (`pip install {}`, or set XT_CUDA_LIBS to their folders)",
            text(nvrtc),
            text(driver),
            driver.0,
            packages(driver.0),
        ));
    }
    if known.contains(&architecture) {
        return Ok(Target::of(architecture));
    }
    let Some(&newest) = known.iter().rev().find(|&&known| known < architecture) else {
        let oldest = known.first().map_or("none".to_string(), |oldest| format!("sm_{oldest}"));
        return Err(format!(
            "NVRTC {} cannot compile for this GPU (sm_{architecture}): the oldest target it supports is {oldest}; \
             install an older NVRTC (`pip install nvidia-cuda-nvrtc-cu12`, or set XT_CUDA_LIBS to its folder)",
            text(nvrtc)
        ));
    };
    if driver < nvrtc {
        return Err(format!(
            "NVRTC {} does not support this GPU (sm_{architecture}), and a driver for CUDA {} cannot compile its newer \
             PTX: install an NVRTC that supports the GPU (`pip install nvidia-cuda-nvrtc`), or a driver for CUDA {0} \
             or later",
            text(nvrtc),
            text(driver)
        ));
    }
    Ok(Target { architecture: newest, form: Form::Ptx })
}

fn error(message: String) -> Error {
    Error::device("kernels", message)
}

#[cfg(test)]
mod tests {
    use super::{Target, choose, driver_version};

    const KNOWN: [u32; 6] = [75, 80, 86, 89, 90, 120];

    fn name(architecture: u32, driver: (i32, i32), nvrtc: (i32, i32), known: &[u32]) -> String {
        choose(architecture, driver, nvrtc, known).map_or_else(|why| why, |target| target.to_string())
    }

    #[test]
    fn machine_code_where_the_compiler_knows_the_card() {
        for (card, target) in [(75, "sm_75"), (86, "sm_86"), (90, "sm_90a"), (120, "sm_120")] {
            // A compiler of a later minor version, the same and an older one.
            for nvrtc in [(13, 5), (13, 0), (12, 9)] {
                assert_eq!(name(card, (13, 0), nvrtc, &KNOWN), target);
            }
        }
    }

    #[test]
    fn ptx_for_a_card_that_the_compiler_does_not_know() {
        assert_eq!(name(100, (13, 0), (12, 0), &KNOWN[..5]), "compute_90");
        assert_eq!(name(87, (13, 0), (13, 0), &KNOWN), "compute_86");
        let newer = name(100, (13, 0), (13, 1), &KNOWN[..5]);
        for part in ["NVRTC 13.1 does not support", "sm_100", "driver for CUDA 13.0", "nvidia-cuda-nvrtc`"] {
            assert!(newer.contains(part), "{part}: {newer}");
        }
    }

    #[test]
    fn versions_that_do_not_work_together_name_the_remedy() {
        for (card, driver, nvrtc, known, parts) in [
            (70, (13, 0), (13, 0), &KNOWN[..], &["sm_70", "sm_75", "`cpu`"][..]),
            (80, (11, 8), (11, 8), &KNOWN, &["CUDA 11.8", "driver 525"]),
            (
                80,
                (12, 4),
                (13, 5),
                &KNOWN,
                &["NVRTC 13.5", "CUDA 12.4", "driver 580", "nvidia-cuda-nvrtc-cu12 nvidia-cublas-cu12"],
            ),
            (80, (13, 0), (14, 2), &KNOWN, &["NVRTC 14.2", "a driver for CUDA 14", "nvrtc==13.*"]),
            (75, (13, 0), (13, 0), &KNOWN[1..], &["NVRTC 13.0", "sm_75", "sm_80", "nvidia-cuda-nvrtc-cu12"]),
        ] {
            let why = name(card, driver, nvrtc, known);
            assert!(parts.iter().all(|part| why.contains(part)), "{parts:?}: {why}");
        }
        assert_eq!(driver_version(12040), (12, 4));
    }

    #[test]
    fn one_target_has_warpgroups() {
        // Code for the whole generation, and PTX, lack these instructions.
        for (text, has) in
            [("sm_90a", true), ("sm_90", false), ("compute_90", false), ("sm_89", false), ("sm_100", false)]
        {
            assert_eq!(text.parse::<Target>().map(Target::has_warpgroups).ok(), Some(has), "{text}");
        }
    }

    #[test]
    fn targets_are_read_as_they_are_written() {
        for text in ["sm_75", "sm_90a", "compute_90", "sm_120"] {
            assert_eq!(text.parse::<Target>().map(|target| target.to_string()).unwrap_or_default(), text);
        }
        assert_eq!("90a".parse::<Target>().ok(), Some(Target::of(90)));
        for text in ["", "sm_60", "hopper", "sm_+80", "90b", "sm_compute_90", "compute_90a", "a"] {
            assert!(text.parse::<Target>().is_err(), "{text}");
        }
    }
}
