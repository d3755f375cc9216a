//! CUDA as the rest of the crate sees it in a build without: types that have no values.

use super::{
    Transfers,
    heap::Heap,
    launch::{Arg, Gemm, Grid},
};
use crate::{Element, Error, Result, Tensor};

/// A CUDA device. This build has none: the feature `cuda` is off.
#[derive(Debug)]
pub enum CudaDevice {}

pub(crate) enum CudaBuffer {}
pub(crate) enum Kernel {}

impl CudaDevice {
    pub(super) fn open(ordinal: usize) -> Result<&'static Self> {
        Err(Error::Device {
            op: "cuda",
            message: format!("cuda:{ordinal} was asked for, but this build has no CUDA; enable the feature `cuda`"),
        })
    }
}

/// A method that nobody can call.
macro_rules! uncallable {
    ($($name:ident($($arg:ident: $ty:ty),*) -> $ret:ty;)+) => {
        impl CudaDevice {
            $(pub(crate) fn $name(&self, $(_: $ty),*) -> $ret {
                match *self {}
            })+
        }
    };
}

uncallable! {
    table(name: &str, values: Vec<i64>) -> Result<Tensor>;
    kernel(name: &'static str, options: &[(&str, &str)]) -> Result<Kernel>;
    faults() -> Arg;
    gemm(gemm: &Gemm) -> Result<()>;
    upload(to: u64, from: &[u8]) -> Result<()>;
    read_back_at(from: u64, to: &mut [u8]) -> Result<()>;
    copy(to: u64, from: u64, bytes: usize) -> Result<()>;
    fill_zero(to: u64, bytes: usize) -> Result<()>;
    refuse_while_capturing(what: &str) -> Result<()>;
    synchronize() -> Result<()>;
    is_capturing() -> bool;
    ordinal() -> usize;
    architecture() -> u32;
    has_warpgroups() -> bool;
}

impl CudaDevice {
    pub(super) fn pool(&self) -> &Heap {
        match *self {}
    }

    pub(super) fn transfers(&self) -> Transfers {
        match *self {}
    }

    pub(crate) fn constant<E: Element>(&self, _: &str, _: impl FnOnce() -> Result<Vec<E>>) -> Result<Tensor> {
        match *self {}
    }
}

impl Kernel {
    pub fn launch(&self, _: Grid, _: &[Arg]) -> Result<()> {
        match *self {}
    }
}

impl CudaBuffer {
    pub fn new(_: usize, device: &'static CudaDevice) -> Result<Self> {
        match *device {}
    }

    pub fn address(&self) -> u64 {
        match *self {}
    }
}

pub(super) fn describe() -> Vec<String> {
    vec!["cuda: this build has no CUDA, the feature `cuda` is off".into()]
}
