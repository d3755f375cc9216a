//! The CUDA sources that `build.rs` embeds: their variants, and the parameters of their kernels.

pub use super::signature::Kind;

/// One `kernels/*.cu` with its includes written out, ready for NVRTC.
#[derive(Clone, Copy, Debug)]
pub struct KernelSource<'a> {
    /// The file's name without `.cu`.
    pub name: &'a str,
    /// FNV-1a of `source`: part of the key under which compiled code is cached.
    pub hash: u64,
    /// The text.
    pub source: &'a str,
    /// Sets of compile options with their values; every combination within a set is a variant.
    pub variants: &'static [Axes],
}

/// Compile options and the values of each.
pub type Axes = &'static [(&'static str, &'static [&'static str])];

/// The compile options of one variant of a source: names and values, without the `-D`.
pub type Options = Vec<(&'static str, &'static str)>;

impl KernelSource<'_> {
    /// Returns the library's source of this name.
    pub fn named(name: &str) -> Option<&'static KernelSource<'static>> {
        SOURCES.iter().find(|source| source.name == name)
    }

    /// Returns the source of a benchmark kernel, one of [`LAB_SIGNATURES`].
    pub fn of_lab(kernel: &str) -> Option<&'static KernelSource<'static>> {
        let signature = LAB_SIGNATURES.iter().find(|signature| signature.kernel == kernel)?;
        LAB_SOURCES.iter().find(|source| source.name == signature.file)
    }

    /// Returns every combination of options that the source is compiled for.
    pub fn options(&self) -> Vec<Options> {
        let combinations = |axes: &Axes| {
            axes.iter().fold(vec![Options::new()], |sets, (option, values)| {
                let with = |set: &Options| {
                    let set = set.clone();
                    values.iter().map(move |&value| [&set[..], &[(*option, value)]].concat())
                };
                sets.iter().flat_map(with).collect()
            })
        };
        self.variants.iter().flat_map(combinations).collect()
    }

    /// Returns `true` if these options, in any order, are a variant.
    pub(crate) fn has(&self, options: &[(&str, &str)]) -> bool {
        self.variants.iter().any(|axes| {
            axes.len() == options.len()
                && axes.iter().all(|(name, values)| {
                    options.iter().any(|(option, value)| option == name && values.contains(value))
                })
        })
    }
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
    /// Kind of argument that a launch passes.
    pub kind: Kind,
}

include!(concat!(env!("OUT_DIR"), "/kernels.rs"));

#[cfg(test)]
mod tests {
    use super::KernelSource;

    #[test]
    fn variants_are_combinations() -> Result<(), &'static str> {
        let source = KernelSource::named("unary").ok_or("no such source")?;
        assert!(source.options().len() > 4 && source.options().len() % 4 == 0, "a product with four dtypes");
        for options in source.options() {
            let reversed: Vec<_> = options.iter().rev().copied().collect();
            assert!(source.has(&options) && source.has(&reversed) && !source.has(&options[1..]));
        }
        assert!(!source.has(&[("DTYPE", "i64"), ("FUNCTION", "exp")]));
        Ok(())
    }
}
