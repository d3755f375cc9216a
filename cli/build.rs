//! Joins this repository's own sources and documents into one text, which `xt train` learns from by default.
//!
//! Files are taken in the order of their paths, so that the text depends on their content alone.

use std::{
    env, fs, io,
    path::{Path, PathBuf},
};

/// Where the text comes from, below the root of the repository. What is missing (in a package taken alone) is left out.
const SOURCES: [&str; 8] = ["README.md", "CHANGELOG.md", "benches", "cli/src", "cli/tests", "examples", "src", "tests"];

fn main() -> io::Result<()> {
    let package = PathBuf::from(env::var("CARGO_MANIFEST_DIR").map_err(io::Error::other)?);
    let root = package.parent().unwrap_or(&package);
    let mut files = Vec::new();
    for source in SOURCES {
        let path = root.join(source);
        // A path that does not exist would be rebuilt for every time.
        if path.exists() {
            println!("cargo::rerun-if-changed={}", path.display());
            collect(&path, &mut files)?;
        }
    }
    println!("cargo::rerun-if-changed=build.rs");
    files.sort();

    let mut corpus = Vec::new();
    for file in &files {
        corpus.extend(fs::read(file)?);
        if corpus.last().is_some_and(|&byte| byte != b'\n') {
            corpus.push(b'\n');
        }
    }
    let out = PathBuf::from(env::var("OUT_DIR").map_err(io::Error::other)?);
    fs::write(out.join("corpus.txt"), corpus)
}

/// Adds `path`, or the Rust and Markdown files below it.
fn collect(path: &Path, files: &mut Vec<PathBuf>) -> io::Result<()> {
    if path.is_dir() {
        return fs::read_dir(path)?.try_for_each(|entry| collect(&entry?.path(), files));
    }
    if path.extension().is_some_and(|extension| extension == "rs" || extension == "md") {
        files.push(path.to_path_buf());
    }
    Ok(())
}
