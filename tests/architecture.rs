//! The rooms of the library and the arrows between them, read from the sources: imports only run down, including those
//! that inherent methods hide. `XT_BLESS=1 cargo test --test architecture` redraws the picture of ARCHITECTURE.md.

use std::{
    collections::{BTreeMap, BTreeSet},
    fs,
    path::{Path, PathBuf},
};

/// Every room of `src/`, the lowest first: a room may use those before it.
const ROOMS: [&str; 25] = [
    "collect",
    "error",
    "hash",
    "sort",
    "ordered",
    "atomic_file",
    "shape",
    "dtype",
    "philox",
    "device",
    "quantised",
    "gemm",
    "profile",
    "tensor",
    "params",
    "autograd",
    "ops",
    "distributed",
    "graph",
    "io",
    "config",
    "nn",
    "models",
    "pretrained",
    "train",
];

/// A source file of the library.
struct File {
    path: PathBuf,
    room: String,
    /// Its modules below the crate root.
    modules: Vec<String>,
    /// Its text without comments, strings and unit tests.
    code: String,
}

fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}

/// Returns the code without comments, the text of literals, and `#[cfg(test)]` modules at the end.
fn code(text: &str) -> String {
    let text = text.split("\n#[cfg(test)]\nmod ").next().unwrap_or_default();
    let mut code = String::new();
    let mut characters = text.chars().peekable();
    while let Some(character) = characters.next() {
        match character {
            '/' if characters.peek() == Some(&'/') => {
                characters.by_ref().find(|&character| character == '\n');
                code.push('\n');
            }
            '"' => {
                while let Some(character) = characters.next() {
                    match character {
                        '\\' => drop(characters.next()),
                        '"' => break,
                        _ => {}
                    }
                }
                code.push_str("\"\"");
            }
            // A character, not a lifetime.
            '\'' => {
                let mut ahead = characters.clone();
                match (ahead.next(), ahead.next()) {
                    (Some('\\'), _) => {
                        characters.by_ref().take(2).for_each(drop);
                        characters.by_ref().find(|&character| character == '\'');
                    }
                    (Some(_), Some('\'')) => characters.by_ref().take(2).for_each(drop),
                    _ => code.push('\''),
                }
            }
            _ => code.push(character),
        }
    }
    code
}

fn files() -> Vec<File> {
    let (mut folders, mut files) = (vec![root().join("src")], Vec::new());
    while let Some(folder) = folders.pop() {
        for entry in fs::read_dir(&folder).expect("a folder").map(|entry| entry.expect("an entry").path()) {
            if entry.is_dir() {
                folders.push(entry);
                continue;
            }
            let inside = entry.strip_prefix(root().join("src")).expect("below src").with_extension("");
            let mut modules: Vec<String> = inside.iter().map(|part| part.to_string_lossy().into_owned()).collect();
            modules.pop_if(|last| last == "mod");
            if modules != ["lib"] {
                let code = code(&fs::read_to_string(&entry).expect("a text"));
                files.push(File { path: inside, room: modules[0].clone(), modules, code });
            }
        }
    }
    files.sort_by(|a, b| a.path.cmp(&b.path));
    files
}

/// Calls `found` with each path that the use tree at the start of `text` stands for.
fn use_tree(text: &str, prefix: &[String], found: &mut impl FnMut(&[String])) {
    let Some(inner) = text.strip_prefix('{') else {
        let end = text.find(|c: char| !c.is_alphanumeric() && c != '_').unwrap_or(text.len());
        let path = [prefix, &[text[..end].to_string()]].concat();
        match text[end..].strip_prefix("::") {
            Some(rest) => use_tree(rest, &path, found),
            None => found(&path),
        }
        return;
    };
    let (mut depth, mut start) = (0, 0);
    for (at, character) in inner.char_indices() {
        match character {
            '{' => depth += 1,
            '}' if depth > 0 => depth -= 1,
            '}' | ',' if depth == 0 => {
                let part = inner[start..at].trim();
                if !part.is_empty() {
                    use_tree(part, prefix, found);
                }
                if character == '}' {
                    return;
                }
                start = at + 1;
            }
            _ => {}
        }
    }
}

/// Paths below the crate root that a file names.
fn paths(file: &File) -> BTreeSet<Vec<String>> {
    let mut paths = BTreeSet::new();
    let folder = file.path.ends_with("mod");
    for (at, word) in file.code.match_indices("crate::").chain(file.code.match_indices("super::")) {
        let before = file.code[..at].chars().next_back();
        if before.is_some_and(|before| before.is_alphanumeric() || before == '_' || before == '$') {
            continue;
        }
        let (mut base, mut rest) = (Vec::new(), &file.code[at..]);
        if word == "super::" {
            base.clone_from(&file.modules);
            // A `super` after another was seen with that.
            if file.code[..at].ends_with("super::")
                || (file.modules.len() == 1 && !folder && file.path.iter().count() > 1)
            {
                continue;
            }
            while let Some(up) = rest.strip_prefix("super::") {
                base.pop();
                rest = up;
            }
        } else {
            rest = &rest["crate::".len()..];
        }
        use_tree(rest, &base, &mut |path| {
            paths.insert(path.to_vec());
        });
    }
    paths
}

/// Names that the crate root re-exports, with their rooms.
fn exports() -> BTreeMap<String, String> {
    let text = code(&fs::read_to_string(root().join("src/lib.rs")).expect("a text"));
    let mut exports = BTreeMap::new();
    for (at, _) in text.match_indices("pub use crate::") {
        use_tree(&text[at + "pub use crate::".len()..], &[], &mut |path| {
            exports.insert(path[path.len() - 1].clone(), path[0].clone());
        });
    }
    assert!(exports.len() > 20, "{exports:?}");
    exports
}

/// The arrows from room to room, each with the places that it comes from.
fn arrows(files: &[File]) -> BTreeMap<(String, String), BTreeSet<String>> {
    let exports = exports();
    let mut arrows: BTreeMap<_, BTreeSet<String>> = BTreeMap::new();
    for file in files {
        for path in paths(file) {
            let first = &path[0];
            let room = if ROOMS.contains(&first.as_str()) { first } else { exports.get(first).unwrap_or(first) };
            if *room != file.room && ROOMS.contains(&room.as_str()) {
                let place = format!("src/{}.rs: {}", file.path.display(), path.join("::"));
                arrows.entry((file.room.clone(), room.clone())).or_default().insert(place);
            }
        }
    }
    arrows
}

fn rank(room: &str) -> usize {
    ROOMS.iter().position(|&other| other == room).unwrap_or_else(|| panic!("src/{room} is not among the rooms"))
}

#[test]
fn imports_run_down() {
    let files = files();
    let rooms: BTreeSet<&str> = files.iter().map(|file| &*file.room).collect();
    assert_eq!(rooms, ROOMS.into_iter().collect(), "the rooms of src/ and those of this test");
    let arrows = arrows(&files);
    assert!(arrows.len() > 50, "{} arrows", arrows.len());
    let up: Vec<_> = arrows.iter().filter(|((from, to), _)| rank(from) < rank(to)).collect();
    assert!(up.is_empty(), "arrows that run up: {up:#?}");
}

/// The files and folders of `src/gemm`, the lowest first; above them is the driver, `mod.rs`.
const GEMM: [&str; 8] = ["simd", "matrix", "kernels", "pack", "few_rows", "select", "blocked", "parallel"];

/// A product is read in one direction: driver, blocking, packing, kernels.
#[test]
fn gemm_runs_from_the_driver_to_the_kernels() {
    let level = |name: &str| GEMM.iter().position(|&other| other == name);
    let (mut arrows, mut up, mut seen) = (BTreeSet::new(), Vec::new(), BTreeSet::new());
    for file in files().iter().filter(|file| file.room == "gemm") {
        let Some(own) = file.modules.get(1).filter(|&own| own != "tests") else { continue };
        let rank = level(own).unwrap_or_else(|| panic!("src/gemm/{own} is not in the order"));
        seen.insert(rank);
        for path in paths(file) {
            // A name that is not a file of the folder is an item of the driver; `pub(in super::super)` does not import.
            let other = |to: &&String| path[0] == "gemm" && !["", "super", own].contains(&to.as_str());
            let Some(to) = path.get(1).filter(other) else { continue };
            match level(to) {
                Some(below) if below < rank => drop(arrows.insert((rank, below))),
                _ => up.push(format!("src/{}.rs: {}", file.path.display(), path.join("::"))),
            }
        }
    }
    assert!(up.is_empty(), "imports that run up: {up:#?}");
    assert_eq!(seen.len(), GEMM.len(), "files and folders of src/gemm");
    assert!(arrows.len() > 12, "{arrows:?}");
}

/// Inherent methods of `Tensor` belong to the room that defines them: rooms below do not call them.
#[test]
fn methods_run_down() {
    let files = files();
    let mut methods: BTreeMap<&str, usize> = BTreeMap::new();
    for file in &files {
        for (at, _) in file.code.match_indices("impl Tensor {") {
            let body = &file.code[at..];
            let body = &body[..body.find("\n}\n").unwrap_or(body.len())];
            for (at, _) in body.match_indices("fn ") {
                let name = &body[at + 3..];
                let name = &name[..name.find(|c: char| !c.is_alphanumeric() && c != '_').unwrap_or(0)];
                if body[..at].ends_with([' ', '\n']) && !name.is_empty() {
                    methods.entry(name).or_insert(rank(&file.room));
                }
            }
        }
    }
    assert!(methods.len() > 80, "{methods:?}");
    let (tensor, ops) = (rank("tensor"), rank("ops"));
    let defined = |name: &str, room: usize| {
        let head = format!("fn {name}(");
        files.iter().filter(|file| rank(&file.room) <= room).any(|file| file.code.contains(&head))
    };
    let mut up = Vec::new();
    // Above the ops all may be called; below the tensor there is none.
    for file in files.iter().filter(|file| (tensor..ops).contains(&rank(&file.room))) {
        for (&name, _) in methods.iter().filter(|&(_, &of)| of > rank(&file.room)) {
            // Numbers, iterators and layouts have methods of some of these names.
            let std = ["add", "sub", "mul", "div", "max", "sum", "ln", "exp", "sqrt", "ge", "eq", "neg", "flatten"];
            let other = std.contains(&name) || defined(name, rank(&file.room));
            if !other && file.code.contains(&format!(".{name}(")) {
                up.push(format!("src/{}.rs: .{name}()", file.path.display()));
            }
        }
    }
    assert!(up.is_empty(), "methods of rooms above: {up:#?}");
}

/// The picture: an arrow for each use of a room by another, those that follow from others left out.
fn picture() -> String {
    let arrows = arrows(&files());
    let direct: BTreeSet<(usize, usize)> = arrows.keys().map(|(from, to)| (rank(from), rank(to))).collect();
    let mut reach: Vec<BTreeSet<usize>> = vec![BTreeSet::new(); ROOMS.len()];
    let mut lines = Vec::new();
    for from in 0..ROOMS.len() {
        // The nearest first: what they reach needs no arrow of its own.
        for to in (0..from).rev().filter(|&to| direct.contains(&(from, to))) {
            if !reach[from].contains(&to) {
                lines.push(format!("    {} --> {}", ROOMS[from], ROOMS[to]));
            }
            let below = reach[to].clone();
            reach[from].extend(below);
            reach[from].insert(to);
        }
    }
    lines.reverse();
    format!("```mermaid\nflowchart TD\n{}\n```\n", lines.join("\n"))
}

#[test]
fn picture_is_of_this_code() {
    let path = root().join("ARCHITECTURE.md");
    let text = fs::read_to_string(&path).expect("ARCHITECTURE.md");
    let start = text.find("```mermaid").expect("a picture");
    let end = start + text[start..].find("```\n\n").expect("its end") + 4;
    let picture = picture();
    if std::env::var_os("XT_BLESS").is_some() {
        fs::write(&path, [&text[..start], &picture, &text[end..]].concat()).expect("ARCHITECTURE.md");
    } else {
        assert_eq!(text[start..end], picture, "draw it anew: XT_BLESS=1 cargo test --test architecture");
    }
}
