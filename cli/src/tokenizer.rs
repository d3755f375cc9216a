//! The tokenizer of a pretrained model, or what stands in for it in a build without tokenizers.

#[cfg(feature = "tokenizers")]
pub use x_transformers_tokenizers::{TextStream, Tokenizer};

#[cfg(not(feature = "tokenizers"))]
mod without {
    use std::{convert::Infallible, path::Path};

    use x_transformers::io::Pretrained;

    use crate::failure::{Failure, Result};

    /// A tokenizer that cannot be had.
    pub struct Tokenizer(Infallible);

    /// Text of a tokenizer that cannot be had.
    pub struct TextStream<'t>(&'t Tokenizer);

    impl TextStream<'_> {
        pub fn push(&mut self, _: i64) -> Result<String> {
            match self.0.0 {}
        }

        pub fn finish(self) -> Result<String> {
            match self.0.0 {}
        }
    }

    impl Tokenizer {
        pub fn of(_: &Pretrained, _: Option<&Path>) -> Result<Self> {
            Err(Failure::new("this `xt` was built without tokenizers; build it with `--features tokenizers`"))
        }

        pub fn encode(&self, _: &str) -> Result<Vec<i64>> {
            match self.0 {}
        }

        pub fn decode(&self, _: &[i64]) -> Result<String> {
            match self.0 {}
        }

        pub fn stream(&self, _: &[i64]) -> TextStream<'_> {
            match self.0 {}
        }

        pub fn chat(&self, _: &str) -> Result<String> {
            match self.0 {}
        }
    }
}
#[cfg(not(feature = "tokenizers"))]
pub use without::{TextStream, Tokenizer};
