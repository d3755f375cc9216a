//! The command as the user typed it, for hints that can be pasted.

use std::{env, ffi::OsString, path::Path};

use crate::files::quoted;

/// The words before the subcommand: `xt`, its path, or `cargo run --release --`.
pub fn program() -> String {
    // Cargo names the package in the environment of what it runs.
    let from_cargo = env::var_os("CARGO_PKG_NAME").is_some_and(|name| name == env!("CARGO_PKG_NAME"));
    words(from_cargo, env::args_os().next())
}

fn words(from_cargo: bool, first: Option<OsString>) -> String {
    match first {
        _ if from_cargo && cfg!(debug_assertions) => "cargo run --".into(),
        _ if from_cargo => "cargo run --release --".into(),
        Some(first) if !first.is_empty() => quoted(Path::new(&first)),
        _ => "xt".into(),
    }
}

#[cfg(test)]
mod tests {
    use super::words;

    #[test]
    fn paths_are_words_of_a_shell() {
        assert_eq!(words(false, Some("xt".into())), "xt");
        assert_eq!(words(false, Some("target/release/xt".into())), "target/release/xt");
        assert_eq!(words(false, Some("/a b/xt".into())), "'/a b/xt'");
        assert_eq!(words(false, None), "xt");
        assert!(words(true, Some("target/release/xt".into())).starts_with("cargo run "));
    }
}
