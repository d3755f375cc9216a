//! Replacing a file in one step: whoever looks sees the old content or the new one, never a part.

use std::{
    fs::{self, File, OpenOptions},
    io::{self, BufWriter, Write},
    path::{Path, PathBuf},
    sync::atomic::{AtomicU64, Ordering},
};

use crate::{Error, Result};

/// Writes a file so that a crash, a full disk or an error of `write` leaves the old file as it was.
///
/// The content goes to a temporary file in the same folder, reaches the disk (fsync), takes the name by a rename, and
/// the folder is brought to the disk as well. A symbolic link stays a link: the file it points to is replaced. A
/// path that is no regular file, such as a pipe or `/dev/stdout`, holds nothing to keep and is written directly.
///
/// Errors: [`Error::Io`] with the path, for whatever fails, `write` included; the temporary file is removed then.
///
/// ```
/// # fn main() -> x_transformers::Result<()> {
/// # let folder = std::env::temp_dir().join(format!("xt-doc-atomic-{}", std::process::id()));
/// # std::fs::create_dir_all(&folder).unwrap();
/// # let path = folder.join("notes.txt");
/// x_transformers::io::write_atomically(&path, |file| file.write_all(b"all or nothing"))?;
/// assert_eq!(std::fs::read(&path).unwrap(), b"all or nothing");
/// # std::fs::remove_dir_all(&folder).unwrap();
/// # Ok(())
/// # }
/// ```
pub fn write_atomically(path: impl AsRef<Path>, write: impl FnOnce(&mut dyn Write) -> io::Result<()>) -> Result<()> {
    let path = path.as_ref();
    replace(path, write).map_err(|source| Error::io(path, source))
}

fn replace(path: &Path, write: impl FnOnce(&mut dyn Write) -> io::Result<()>) -> io::Result<()> {
    let target = match fs::metadata(path) {
        Ok(found) if found.is_dir() => return Err(io::Error::new(io::ErrorKind::IsADirectory, "is a folder")),
        Ok(found) if !found.is_file() => {
            let mut file = OpenOptions::new().write(true).open(path)?;
            write(&mut file)?;
            return file.flush();
        }
        Ok(_) => fs::canonicalize(path)?,
        Err(error) if error.kind() == io::ErrorKind::NotFound => path.to_path_buf(),
        Err(error) => return Err(error),
    };
    let temporary = Temporary::beside(&target)?;
    let mut buffered = BufWriter::with_capacity(1 << 20, &temporary.file);
    write(&mut buffered)?;
    buffered.flush()?;
    drop(buffered);
    temporary.file.sync_all()?;
    fs::rename(&temporary.path, &target)?;
    // The name is gone: nothing is left to remove.
    temporary.keep();
    sync_folder(folder(&target))
}

/// A file that is removed when dropped, unless it was kept.
struct Temporary {
    path: PathBuf,
    file: File,
    kept: bool,
}

impl Temporary {
    fn beside(target: &Path) -> io::Result<Self> {
        static COUNT: AtomicU64 = AtomicU64::new(0);
        loop {
            // Unique among processes by the number of this one; what a dead one left behind is stepped over.
            let count = COUNT.fetch_add(1, Ordering::Relaxed);
            let path = folder(target).join(format!(".xt-{}-{count}.tmp", std::process::id()));
            match OpenOptions::new().write(true).create_new(true).open(&path) {
                Ok(file) => return Ok(Self { path, file, kept: false }),
                Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {}
                Err(error) => return Err(error),
            }
        }
    }

    fn keep(mut self) {
        self.kept = true;
    }
}

impl Drop for Temporary {
    fn drop(&mut self) {
        if !self.kept {
            // There is an error on its way to the caller already; debris does no harm.
            let _ = fs::remove_file(&self.path);
        }
    }
}

fn folder(path: &Path) -> &Path {
    match path.parent() {
        Some(parent) if !parent.as_os_str().is_empty() => parent,
        _ => Path::new("."),
    }
}

/// Brings renames in a folder to the disk. Only Unix can open a folder for that.
pub(crate) fn sync_folder(folder: &Path) -> io::Result<()> {
    if cfg!(unix) { File::open(folder)?.sync_all() } else { Ok(()) }
}
