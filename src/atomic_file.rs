//! Replacing a file in one step: a reader sees the old content or the new one, never a part.

use std::{
    ffi::OsStr,
    fs::{self, File, Metadata, OpenOptions, TryLockError},
    io::{self, BufWriter, ErrorKind, Write},
    path::{Path, PathBuf},
};

use crate::{Error, Result, hash::fnv1a};

/// Writes a file so that a crash, a full disk or an error of `write` leaves the old file as it was.
///
/// The content goes to a temporary file in the same folder, reaches the disk (`fsync`) and takes the name by a rename;
/// then the folder reaches the disk too, unless its file system cannot do that.
///
/// - **Mode and owner** of the replaced file are kept. Where the owner or group cannot be (only root may give files
///   away), the new file is the caller's, and a group that did not have access before does not get any. Access control
///   lists, extended attributes and further hard links are not kept. A read-only file is replaced if its folder may be
///   written.
/// - **A symbolic link** stays a link: the file that it points to is replaced, or made if it does not exist.
/// - **A path that is not a regular file**, such as a pipe or `/dev/stdout`, holds nothing to keep and is written
///   directly.
/// - **The temporary file** is named `.xt-HASH-N.tmp` after the file. It is removed if writing fails, and the next
///   write of the same file removes what a killed process left. A lock (`flock`) protects those of running processes;
///   on a file system without locks nothing is removed.
///
/// Interrupted calls (`EINTR`) and short writes are continued.
///
/// Errors: [`ErrorKind::Io`](crate::ErrorKind::Io) with the path for every failure, including those of `write`.
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
    let (target, old) = match retry(|| fs::metadata(path)) {
        Ok(found) if found.is_dir() => return Err(io::Error::new(ErrorKind::IsADirectory, "is a folder")),
        Ok(found) if !found.is_file() => {
            let mut file = OpenOptions::new().write(true).open(path)?;
            write(&mut file)?;
            return file.flush();
        }
        Ok(found) => (retry(|| fs::canonicalize(path))?, Some(found)),
        Err(error) if error.kind() == ErrorKind::NotFound => (missing(path)?, None),
        Err(error) => return Err(error),
    };
    let temporary = Temporary::beside(&target, old.as_ref())?;
    fill(&temporary.file, old.as_ref(), write)?;
    retry(|| fs::rename(&temporary.path, &target))?;
    // The name is gone: nothing is left to remove.
    temporary.keep();
    sync_folder(parent(&target))
}

/// The place of a file that does not exist, which may be at the end of symbolic links.
fn missing(path: &Path) -> io::Result<PathBuf> {
    let mut target = path.to_path_buf();
    // A loop of links has been refused before, when the path was looked up.
    while retry(|| fs::symlink_metadata(&target)).is_ok_and(|found| found.is_symlink()) {
        target = parent(&target).join(retry(|| fs::read_link(&target))?);
        if !parent(&target).is_dir() {
            let why = format!("is a symbolic link to {}, whose folder does not exist", target.display());
            return Err(io::Error::new(ErrorKind::NotFound, why));
        }
    }
    Ok(target)
}

/// Writes a new file in a folder that takes its name later as a whole, with the mode and owner of `old` if that is a
/// file, and brings it to the disk.
pub(crate) fn write_new(
    path: &Path,
    old: &Path,
    write: impl FnOnce(&mut dyn Write) -> io::Result<()>,
) -> io::Result<()> {
    let old = retry(|| fs::metadata(old)).ok().filter(Metadata::is_file);
    fill(&create_new(path, old.as_ref())?, old.as_ref(), write)
}

/// Makes a file, at first with no more rights than the one that it will replace.
fn create_new(path: &Path, old: Option<&Metadata>) -> io::Result<File> {
    let mut options = OpenOptions::new();
    options.write(true).create_new(true);
    #[cfg(unix)]
    if let Some(old) = old {
        use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
        options.mode(old.mode() & 0o777);
    }
    #[cfg(not(unix))]
    let _ = old;
    options.open(path)
}

fn fill(file: &File, old: Option<&Metadata>, write: impl FnOnce(&mut dyn Write) -> io::Result<()>) -> io::Result<()> {
    let mut buffered = BufWriter::with_capacity(1 << 20, file);
    write(&mut buffered)?;
    buffered.flush()?;
    drop(buffered);
    if let Some(old) = old {
        keep_owner_and_mode(file, old)?;
    }
    sync(file)
}

#[cfg(unix)]
fn keep_owner_and_mode(file: &File, old: &Metadata) -> io::Result<()> {
    use std::os::unix::fs::{MetadataExt, PermissionsExt, fchown};
    let new = file.metadata()?;
    let mut mode = old.mode() & 0o7777;
    let give = |uid, gid| retry(|| fchown(file, uid, gid)).is_ok();
    if (new.uid(), new.gid()) != (old.uid(), old.gid()) && !give(Some(old.uid()), Some(old.gid())) {
        // It would run as somebody else.
        mode &= 0o777;
        if new.gid() != old.gid() && !give(None, Some(old.gid())) {
            // Another group: to the old file it was everybody.
            mode = mode & !0o070 | (mode & 0o007) << 3;
        }
    }
    match retry(|| file.set_permissions(PermissionsExt::from_mode(mode))) {
        // A file system without modes, or with fixed ones. The file was made with no more rights than the old one had.
        Err(error) if matches!(error.kind(), ErrorKind::PermissionDenied | ErrorKind::Unsupported) => Ok(()),
        result => result,
    }
}

#[cfg(not(unix))]
fn keep_owner_and_mode(file: &File, old: &Metadata) -> io::Result<()> {
    file.set_permissions(old.permissions())
}

/// A file that is removed when dropped, unless it was kept.
struct Temporary {
    path: PathBuf,
    file: File,
    kept: bool,
}

impl Temporary {
    fn beside(target: &Path, old: Option<&Metadata>) -> io::Result<Self> {
        // Of the same length for every name, which may be as long as names can be.
        let hash = fnv1a(target.file_name().map_or(&[], OsStr::as_encoded_bytes));
        let mut number = 0u64;
        loop {
            let path = parent(target).join(format!(".xt-{hash:016x}-{number}.tmp"));
            match create_new(&path, old) {
                Ok(file) => {
                    if is_mine(&file)? {
                        return Ok(Self { path, file, kept: false });
                    }
                }
                Err(error) if error.kind() == ErrorKind::AlreadyExists && !remove_dead(&path)? => number += 1,
                Err(error) if error.kind() == ErrorKind::AlreadyExists => {}
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
            // An error is on its way to the caller already; the next write removes what stays here.
            let _ = retry(|| fs::remove_file(&self.path));
        }
    }
}

/// Locks a file that was just made. `false` if another process took it for one of a dead process before the lock was
/// there.
fn is_mine(file: &File) -> io::Result<bool> {
    match retry_lock(|| file.try_lock()) {
        Ok(()) => Ok(!is_unlinked(&file.metadata()?)),
        Err(TryLockError::WouldBlock) => Ok(false),
        // Without locks nobody removes files of others.
        Err(TryLockError::Error(_)) => Ok(true),
    }
}

/// Removes a temporary file that no process writes. `false` if one may.
fn remove_dead(path: &Path) -> io::Result<bool> {
    // Not opened unless it is a regular file: a pipe would wait, a link could lead anywhere.
    match retry(|| fs::symlink_metadata(path)) {
        Ok(found) if found.is_file() => {}
        Ok(_) => return Ok(false),
        Err(error) if error.kind() == ErrorKind::NotFound => return Ok(true),
        Err(error) => return Err(error),
    }
    let file = match File::open(path) {
        Ok(file) => file,
        Err(error) if error.kind() == ErrorKind::NotFound => return Ok(true),
        Err(error) if error.kind() == ErrorKind::PermissionDenied => return Ok(false),
        Err(error) => return Err(error),
    };
    if retry_lock(|| file.try_lock()).is_err() {
        return Ok(false);
    }
    // With the lock the name stays with this file, if it still has it.
    if is_at(&file, path)? {
        match retry(|| fs::remove_file(path)) {
            Err(error) if error.kind() == ErrorKind::PermissionDenied => return Ok(false),
            Err(error) if error.kind() != ErrorKind::NotFound => return Err(error),
            _ => {}
        }
    }
    Ok(true)
}

/// Exclusive use of a folder among all processes and threads, until it is dropped.
///
/// The lock is on the folder itself and stays with it when it is renamed. Where folders cannot be locked there is none.
#[derive(Debug)]
pub(crate) struct FolderLock {
    _file: Option<File>,
}

impl FolderLock {
    /// Waits for the folder. `None` if it is not there any more, or another one has its name.
    pub fn wait(folder: &Path) -> io::Result<Option<Self>> {
        let file = match File::open(folder) {
            Ok(file) => file,
            Err(error) if error.kind() == ErrorKind::NotFound => return Ok(None),
            // Not readable, or not on Unix.
            Err(error) if error.kind() == ErrorKind::PermissionDenied => return Ok(Some(Self { _file: None })),
            Err(error) => return Err(error),
        };
        // On a file system without locks it has to be enough that two runs do not share a folder.
        let _ = retry(|| file.lock());
        Ok(is_at(&file, folder)?.then_some(Self { _file: Some(file) }))
    }
}

#[cfg(unix)]
fn is_unlinked(found: &Metadata) -> bool {
    std::os::unix::fs::MetadataExt::nlink(found) == 0
}

#[cfg(not(unix))]
fn is_unlinked(_: &Metadata) -> bool {
    false
}

/// If an open file is still the one at this path.
#[cfg(unix)]
fn is_at(file: &File, path: &Path) -> io::Result<bool> {
    use std::os::unix::fs::MetadataExt;
    let same = |a: &Metadata, b: &Metadata| (a.dev(), a.ino()) == (b.dev(), b.ino());
    match retry(|| fs::symlink_metadata(path)) {
        Ok(found) => Ok(same(&found, &file.metadata()?)),
        Err(error) if error.kind() == ErrorKind::NotFound => Ok(false),
        Err(error) => Err(error),
    }
}

#[cfg(not(unix))]
fn is_at(_: &File, path: &Path) -> io::Result<bool> {
    path.try_exists()
}

/// Creates a folder and its missing parents, and brings them to the disk.
///
/// Errors: [`ErrorKind::Io`](crate::ErrorKind::Io) with the path; a symbolic link to a folder that does not exist,
/// which may be on a disk that is not there at the moment.
pub fn create_folders(folder: impl AsRef<Path>) -> Result<()> {
    let folder = folder.as_ref();
    let broken = |source| Error::io(folder, source);
    match retry(|| fs::metadata(folder)) {
        Ok(found) if found.is_dir() => return Ok(()),
        Ok(_) => return Err(broken(io::Error::new(ErrorKind::NotADirectory, "is not a folder"))),
        Err(error) if error.kind() == ErrorKind::NotFound => {}
        Err(error) => return Err(broken(error)),
    }
    if let Ok(target) = retry(|| fs::read_link(folder)) {
        let why = format!("is a symbolic link to {}, which does not exist", target.display());
        return Err(broken(io::Error::new(ErrorKind::NotFound, why)));
    }
    create_folders(parent(folder))?;
    match retry(|| fs::create_dir(folder)) {
        // By another process.
        Err(error) if error.kind() == ErrorKind::AlreadyExists && folder.is_dir() => {}
        result => result.map_err(broken)?,
    }
    sync_folder(parent(folder)).map_err(broken)
}

/// The folder that has this name in it.
fn parent(path: &Path) -> &Path {
    match path.parent() {
        Some(parent) if !parent.as_os_str().is_empty() => parent,
        _ => Path::new("."),
    }
}

/// Brings the names in a folder to the disk, where that can be done: only on Unix, in a folder that may be read, and on
/// file systems that know it (some network and user-space ones answer `EINVAL` or `EBADF`).
pub(crate) fn sync_folder(folder: &Path) -> io::Result<()> {
    const EBADF: i32 = 9;
    if !cfg!(unix) {
        return Ok(());
    }
    let synced = File::open(folder).and_then(|file| sync(&file));
    match synced {
        Err(error) if error.kind() == ErrorKind::PermissionDenied || error.raw_os_error() == Some(EBADF) => Ok(()),
        result => result,
    }
}

/// Brings a file to the disk, where its file system knows how.
fn sync(file: &File) -> io::Result<()> {
    match file.sync_all() {
        Err(error) if matches!(error.kind(), ErrorKind::InvalidInput | ErrorKind::Unsupported) => Ok(()),
        result => result,
    }
}

/// Repeats a call while it is interrupted by signals (`EINTR`), which the standard library does only when it opens,
/// reads and writes files, for `fsync` and `fchmod`.
///
/// Errors: those of `call` except [`ErrorKind::Interrupted`].
pub fn retry<R>(mut call: impl FnMut() -> io::Result<R>) -> io::Result<R> {
    loop {
        match call() {
            Err(error) if error.kind() == ErrorKind::Interrupted => {}
            result => return result,
        }
    }
}

fn retry_lock(
    mut call: impl FnMut() -> std::result::Result<(), TryLockError>,
) -> std::result::Result<(), TryLockError> {
    loop {
        match call() {
            Err(TryLockError::Error(error)) if error.kind() == ErrorKind::Interrupted => {}
            result => return result,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    struct Folder(PathBuf);

    impl Folder {
        fn new(name: &str) -> Self {
            let path = std::env::temp_dir().join(format!("xt-atomic-{name}-{}", std::process::id()));
            let _ = fs::remove_dir_all(&path);
            fs::create_dir_all(&path).unwrap();
            Self(path)
        }

        fn names(&self) -> Vec<String> {
            let entries = fs::read_dir(&self.0).unwrap();
            let mut names: Vec<_> = entries.map(|e| e.unwrap().file_name().into_string().unwrap()).collect();
            names.sort();
            names
        }
    }

    impl Drop for Folder {
        fn drop(&mut self) {
            let _ = fs::remove_dir_all(&self.0);
        }
    }

    fn temporary(target: &Path) -> Temporary {
        Temporary::beside(target, None).unwrap()
    }

    /// The next write deletes the temporary files of killed processes and keeps those of running ones.
    #[test]
    #[cfg(unix)]
    fn temporary_files_of_the_dead_and_the_living() {
        let folder = Folder::new("debris");
        let target = folder.0.join("x".repeat(255));
        let write = |text: &str| write_atomically(&target, |file| file.write_all(text.as_bytes())).unwrap();
        // Killed: the file is there, nobody has the lock.
        let dead = temporary(&target);
        fs::write(&dead.path, "half a fi").unwrap();
        dead.keep();
        assert_eq!(folder.names().len(), 1);
        write("first");
        assert_eq!(folder.names(), ["x".repeat(255)]);

        let alive = temporary(&target);
        let next = temporary(&target);
        assert_ne!(alive.path, next.path);
        write("second");
        assert!(alive.path.exists() && next.path.exists());
        drop(next);
        drop(alive);
        assert_eq!(folder.names().len(), 1);
        assert_eq!(fs::read(&target).unwrap(), b"second");

        // Whatever else has the name is stepped over: a folder, and a link, which is not followed.
        let name = temporary(&target).path.clone();
        let precious = folder.0.join("precious");
        fs::write(&precious, "mine").unwrap();
        std::os::unix::fs::symlink(&precious, &name).unwrap();
        write("third");
        assert_eq!(fs::read(&precious).unwrap(), b"mine");
        fs::remove_file(&name).unwrap();
        fs::create_dir(&name).unwrap();
        write("fourth");
        assert_eq!(fs::read(&target).unwrap(), b"fourth");
        assert_eq!(folder.names().len(), 3);
    }

    /// Many threads write one file: it has the content of one of them, and nothing is left beside it.
    #[test]
    fn writers_of_one_file_do_not_meet() {
        let folder = Folder::new("writers");
        let target = folder.0.join("file");
        std::thread::scope(|scope| {
            for thread in 0..4u8 {
                let target = &target;
                scope.spawn(move || {
                    for _ in 0..25 {
                        write_atomically(target, |file| file.write_all(&[thread; 5000])).unwrap();
                        let seen = fs::read(target).unwrap();
                        assert!(seen.len() == 5000 && seen.iter().all(|byte| byte == &seen[0]));
                    }
                });
            }
        });
        assert_eq!(folder.names(), ["file"]);
    }

    #[test]
    #[cfg(unix)]
    fn modes_are_kept() {
        use std::os::unix::fs::PermissionsExt;
        let folder = Folder::new("modes");
        let target = folder.0.join("file");
        for mode in [0o600, 0o640, 0o664, 0o777, 0o444, 0o1755] {
            fs::write(&target, "old").unwrap();
            fs::set_permissions(&target, PermissionsExt::from_mode(mode)).unwrap();
            write_atomically(&target, |file| file.write_all(b"new")).unwrap();
            assert_eq!(fs::read(&target).unwrap(), b"new");
            assert_eq!(fs::metadata(&target).unwrap().permissions().mode() & 0o7777, mode, "{mode:o}");
            fs::remove_file(&target).unwrap();
        }
        // A new file has the usual one.
        fs::write(&target, "").unwrap();
        write_atomically(folder.0.join("other"), |file| file.write_all(b"")).unwrap();
        let mode = |name: &str| fs::metadata(folder.0.join(name)).unwrap().permissions().mode();
        assert_eq!(mode("file"), mode("other"));
    }

    /// The owner stays where the process may give files away, which root may.
    #[test]
    #[cfg(unix)]
    fn owners_are_kept() {
        use std::os::unix::fs::{MetadataExt, PermissionsExt, chown};
        let folder = Folder::new("owners");
        let target = folder.0.join("file");
        fs::write(&target, "old").unwrap();
        fs::set_permissions(&target, PermissionsExt::from_mode(0o4750)).unwrap();
        let given = chown(&target, Some(12345), Some(12346)).is_ok();
        fs::set_permissions(&target, PermissionsExt::from_mode(0o4750)).unwrap();
        let old = fs::metadata(&target).unwrap();
        write_atomically(&target, |file| file.write_all(b"new")).unwrap();
        let new = fs::metadata(&target).unwrap();
        assert_eq!((new.uid(), new.gid(), new.mode()), (old.uid(), old.gid(), old.mode()), "given away: {given}");
    }

    #[test]
    #[cfg(unix)]
    fn links_are_followed() {
        use std::os::unix::fs::symlink;
        let folder = Folder::new("links");
        let at = |name: &str| folder.0.join(name);
        let write = |name: &str| write_atomically(at(name), |file| file.write_all(name.as_bytes()));
        fs::create_dir(at("below")).unwrap();
        symlink("below/file", at("second")).unwrap();
        symlink("second", at("first")).unwrap();
        // Dangling at first, then to a file.
        for _ in 0..2 {
            for name in ["first", "second"] {
                write(name).unwrap();
                assert_eq!(fs::read(at("below/file")).unwrap(), name.as_bytes());
                assert!(at(name).is_symlink());
            }
        }
        assert_eq!(folder.names(), ["below", "first", "second"]);

        symlink(at("none/file"), at("dangling")).unwrap();
        let message = write("dangling").unwrap_err().to_string();
        assert!(message.contains("none/file") && message.contains("dangling"), "{message}");
        symlink("loop", at("loop")).unwrap();
        assert!(matches!(write("loop").map_err(Error::into_kind), Err(crate::ErrorKind::Io { .. })));

        symlink("nowhere", at("folder")).unwrap();
        for name in ["folder", "folder/below"] {
            let message = create_folders(at(name)).unwrap_err().to_string();
            assert!(message.contains("symbolic link to nowhere"), "{message}");
        }
        create_folders(at("a/b/c")).unwrap();
        create_folders(at("a/b/c")).unwrap();
        assert!(at("a/b/c").is_dir());
    }
}
