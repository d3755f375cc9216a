//! The CUDA sources that `build.rs` embeds, and the parameters of their kernels.

/// One `kernels/*.cu` with its includes written out, ready for NVRTC.
#[derive(Clone, Copy, Debug)]
pub struct KernelSource {
    /// The file's name without `.cu`.
    pub name: &'static str,
    /// FNV-1a of `source`: part of the key under which compiled code is cached.
    pub hash: u64,
    /// The text.
    pub source: &'static str,
}

/// A kernel of a source.
#[derive(Clone, Copy, Debug)]
pub struct Signature {
    /// The name of its [`KernelSource`].
    pub file: &'static str,
    /// Its function name.
    pub kernel: &'static str,
    /// Its parameters, in order.
    pub parameters: &'static [Parameter],
}

/// One parameter of a kernel.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Parameter {
    /// Its name in the source.
    pub name: &'static str,
    /// What a launch passes for it.
    pub kind: Kind,
}

/// What a launch passes for a parameter.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Kind {
    /// The address of values that the kernel writes.
    Output,
    /// The address of values that the kernel reads.
    Input,
    /// A value of this many bytes.
    Scalar {
        /// Its size.
        bytes: usize,
    },
}

include!(concat!(env!("OUT_DIR"), "/kernels.rs"));
