//! Where the library looks for the driver, NVRTC and cuBLAS: never in the working folder, whatever the environment says.
//!
//! Each case is a separate process in a folder full of libraries that report when they are loaded. Needs a C++ compiler
//! (g++, or the one in `CXX`) and no GPU.

#![cfg(all(feature = "cuda", target_os = "linux"))]

use std::{
    fs,
    io::Write,
    path::{Path, PathBuf},
    process::Command,
};

use x_transformers::device::describe;

const CODE: &str = "CODE OF THE WORKING FOLDER RAN";

/// A folder of the system's for temporary files, removed in the end.
struct Folder(PathBuf);

impl Drop for Folder {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.0);
    }
}

/// A working folder with libraries of CUDA's names wherever an empty or relative entry could point to. `None`, with a note,
/// without a compiler.
fn working_folder(test: &str) -> Option<Folder> {
    let folder = Folder(std::env::temp_dir().join(format!("xt-cuda-libraries-{test}-{}", std::process::id())));
    let _ = fs::remove_dir_all(&folder.0);
    let source = folder.0.join("library.cc");
    let library = folder.0.join("library.so");
    fs::create_dir_all(&folder.0).expect("a folder");
    fs::write(
        &source,
        format!(
            "#include <unistd.h>\n__attribute__((constructor)) static void run() {{ if (write(2, \"{CODE}\\n\", {}) < 0) _exit(1); }}",
            CODE.len() + 1
        ),
    )
    .expect("write");
    let compiler = std::env::var("CXX").unwrap_or_else(|_| "g++".into());
    match Command::new(&compiler).args(["-shared", "-fPIC", "-o"]).args([&library, &source]).status() {
        Ok(status) => assert!(status.success(), "{compiler} failed"),
        Err(error) => {
            assert!(std::env::var("XT_REQUIRE_GXX").as_deref() != Ok("1"), "{compiler}: {error}, but XT_REQUIRE_GXX=1");
            // Straight to the stream: the harness hides what a passing test prints.
            let _ = writeln!(std::io::stderr(), "skipped: tests/cuda_libraries.rs: {compiler}: {error}");
            return None;
        }
    }
    let packages = |place: &str| format!("{place}/python3.11/site-packages/nvidia/cu13/lib");
    let places = ["", "lib", "lib64", "bin", "sub", "sub/lib", "sub/lib64", "sub/bin", "glibc-hwcaps/x86-64-v2"];
    let places = places.map(str::to_string).into_iter();
    for place in places.chain(["lib", "sub/lib", ".local/lib", "sub/.local/lib", "usr/local/cuda/lib64"].map(packages))
    {
        let place = folder.0.join(place);
        fs::create_dir_all(&place).expect("a folder");
        for name in ["libcuda", "libnvcuda", "libnvrtc", "libcublas", "libcublasLt", "libnvrtc-builtins"] {
            for version in ["", ".1", ".12", ".13"] {
                fs::hard_link(&library, place.join(format!("{name}.so{version}"))).expect("a link");
            }
        }
    }
    Some(folder)
}

/// Returns the description of the devices, from a process that starts in this folder with these variables.
fn devices(folder: &Path, variables: &[(&str, &str)]) -> String {
    let this = std::env::current_exe().expect("the path of this test");
    let mut command = Command::new(this);
    command.args(["--exact", "in_the_working_folder", "--nocapture"]).current_dir(folder).env("XT_DESCRIBE", "1");
    for name in ["XT_CUDA_LIBS", "CUDA_HOME", "CUDA_PATH", "VIRTUAL_ENV", "CONDA_PREFIX", "LD_LIBRARY_PATH"] {
        command.env_remove(name);
    }
    let output = command.envs(variables.iter().copied()).output().expect("a process");
    let text = format!("{}{}", String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    assert!(output.status.success() && text.contains("1 passed"), "{variables:?}:\n{text}");
    text
}

/// The body of the processes that [`devices`] starts.
#[test]
fn in_the_working_folder() {
    if std::env::var_os("XT_DESCRIBE").is_some() {
        describe().iter().for_each(|line| println!("{line}"));
    }
}

#[test]
fn no_library_is_loaded_from_the_working_folder() {
    let Some(folder) = working_folder("loads") else { return };
    // The libraries do say so: this is what an absolute path means.
    let loaded = devices(&folder.0, &[("XT_CUDA_LIBS", &folder.0.to_string_lossy())]);
    assert!(loaded.contains(CODE), "{loaded}");
    let path = std::env::var("PATH").unwrap_or_default();
    let relative = ["", ".", "./", "sub", "./sub", "../", ":", ".:sub", "sub/../sub"];
    for name in ["CUDA_HOME", "CUDA_PATH", "VIRTUAL_ENV", "CONDA_PREFIX", "HOME", "LD_LIBRARY_PATH", "XT_CUDA_LIBS"] {
        for value in relative {
            let text = devices(&folder.0, &[(name, value)]);
            assert!(!text.contains(CODE), "{name}={value}:\n{text}");
        }
    }
    for entry in ["", ".", "bin", "./bin", "sub/bin", "sub/../bin"] {
        for value in [format!("{entry}:{path}"), format!("{path}:{entry}"), entry.to_string()] {
            let text = devices(&folder.0, &[("PATH", &value)]);
            assert!(!text.contains(CODE), "PATH={value}:\n{text}");
        }
    }
    // All at once, after an absolute entry of each.
    let all = ["CUDA_HOME", "CUDA_PATH", "VIRTUAL_ENV", "CONDA_PREFIX", "HOME"].map(|name| (name, ""));
    let more = [("PATH", ".:"), ("LD_LIBRARY_PATH", "/usr/lib::/usr/lib"), ("XT_CUDA_LIBS", "/usr/lib::")];
    let text = devices(&folder.0, &[&all[..], &more[..]].concat());
    assert!(!text.contains(CODE), "{text}");
}

#[test]
fn refusals_name_the_variable_and_the_remedy() {
    let Some(folder) = working_folder("refusals") else { return };
    let text = devices(&folder.0, &[("XT_CUDA_LIBS", "/usr/lib:sub")]);
    assert!(text.contains("XT_CUDA_LIBS contains the relative path `sub`") && text.contains("absolute path"), "{text}");
    let text = devices(&folder.0, &[("LD_LIBRARY_PATH", ":/usr/lib")]);
    assert!(text.contains("LD_LIBRARY_PATH has an empty or relative entry") && text.contains("remove"), "{text}");
    // Nothing of CUDA's lies there: the entry does no harm.
    let harmless = folder.0.join("empty");
    fs::create_dir(&harmless).expect("a folder");
    let text = devices(&harmless, &[("LD_LIBRARY_PATH", ":/usr/lib")]);
    assert!(!text.contains("LD_LIBRARY_PATH"), "{text}");
}
