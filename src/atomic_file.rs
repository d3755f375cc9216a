//! Atomic file replacement: a reader sees the old content or the new, never a part.

use std::{
    ffi::OsStr,
    fs::{self, File, Metadata, OpenOptions, TryLockError},
    io::{self, BufWriter, ErrorKind, Write},
    path::{Path, PathBuf},
};

use crate::{Error, Result, hash::fnv1a};

/// Writes a file such that a crash, a full disk or an error of `write` leaves the old file unchanged.
///
/// The content is written to a temporary file in the same folder, synced to disk (`fsync`) and renamed; then the folder
/// is synced too, unless its file system does not support that.
///
/// - **Mode and owner** of the replaced file are kept. If the owner or group cannot be kept (only root may give files
///   away), the new file belongs to the caller, and a group that had no access before gets none. Access control lists,
///   extended attributes and further hard links are not kept. A read-only file is replaced if its folder may be
///   written.
/// - **A symbolic link** stays a link: the file that it points to is replaced, or created if it does not exist.
/// - **A path that is not a regular file**, such as a pipe or `/dev/stdout`, has no content to preserve and is written
///   directly.
/// - **The temporary file** is named `.xt-HASH-N.tmp` after the file. It is removed if writing fails, and the next
///   write of the same file removes the temporary files of killed processes. A lock (`flock`) protects those of running
///   processes; on a file system without locks nothing is removed.
///
/// Interrupted calls (`EINTR`) and short writes are retried.
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

/// Returns the path of a file that does not exist, following symbolic links.
fn missing(path: &Path) -> io::Result<PathBuf> {
    let mut target = path.to_path_buf();
    // A loop of links was rejected before, when the path was looked up.
    while retry(|| fs::symlink_metadata(&target)).is_ok_and(|found| found.is_symlink()) {
        target = parent(&target).join(retry(|| fs::read_link(&target))?);
        if !parent(&target).is_dir() {
            let why = format!("is a symbolic link to {}, whose folder does not exist", target.display());
            return Err(io::Error::new(ErrorKind::NotFound, why));
        }
    }
    Ok(target)
}

/// Writes a new file in a folder that is renamed into place later, with the mode and owner of `old` if that is a file,
/// and syncs it to disk.
pub(crate) fn write_new(
    path: &Path,
    old: &Path,
    write: impl FnOnce(&mut dyn Write) -> io::Result<()>,
) -> io::Result<()> {
    let old = retry(|| fs::metadata(old)).ok().filter(Metadata::is_file);
    fill(&create_new(path, old.as_ref())?, old.as_ref(), write)
}

/// Creates a file, initially with no more permissions than the file that it will replace.
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
        // It would run as a different user.
        mode &= 0o777;
        if new.gid() != old.gid() && !give(None, Some(old.gid())) {
            // A different group: to the old file its members were others.
            mode = mode & !0o070 | (mode & 0o007) << 3;
        }
    }
    match retry(|| file.set_permissions(PermissionsExt::from_mode(mode))) {
        // A file system without modes, or with fixed ones. The file was created with no more permissions than the old
        // one.
        Err(error) if matches!(error.kind(), ErrorKind::PermissionDenied | ErrorKind::Unsupported) => Ok(()),
        result => result,
    }
}

#[cfg(not(unix))]
fn keep_owner_and_mode(file: &File, old: &Metadata) -> io::Result<()> {
    file.set_permissions(old.permissions())
}

/// Temporary file, which is removed when dropped unless it was kept.
struct Temporary {
    path: PathBuf,
    file: File,
    kept: bool,
}

impl Temporary {
    fn beside(target: &Path, old: Option<&Metadata>) -> io::Result<Self> {
        // The same length for every name, since the name may already have the maximum length.
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
            // An error is already on its way to the caller; the next write removes the leftover file.
            let _ = retry(|| fs::remove_file(&self.path));
        }
    }
}

/// Locks a file that was just created. Returns `false` if another process took it for a leftover before it was locked.
fn is_mine(file: &File) -> io::Result<bool> {
    match retry_lock(|| file.try_lock()) {
        Ok(()) => Ok(!is_unlinked(&file.metadata()?)),
        Err(TryLockError::WouldBlock) => Ok(false),
        // Without locks no process removes files of others.
        Err(TryLockError::Error(_)) => Ok(true),
    }
}

/// Removes a temporary file that no process is writing. Returns `false` if one may be.
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
    // While it is locked, the name stays with this file, if it still has it.
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
/// The lock is on the folder itself and survives renames. On file systems that cannot lock folders it does nothing.
#[derive(Debug)]
pub(crate) struct FolderLock {
    _file: Option<File>,
}

impl FolderLock {
    /// Waits for the folder. Returns `None` if it no longer exists, or another one has its name.
    pub fn wait(folder: &Path) -> io::Result<Option<Self>> {
        let file = match File::open(folder) {
            Ok(file) => file,
            Err(error) if error.kind() == ErrorKind::NotFound => return Ok(None),
            // Not readable, or not on Unix.
            Err(error) if error.kind() == ErrorKind::PermissionDenied => return Ok(Some(Self { _file: None })),
            Err(error) => return Err(error),
        };
        // Without file system locks, two runs must not share a folder.
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

/// Returns `true` if an open file is still the one at this path.
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

/// Creates a folder and its missing parents, and syncs them to disk.
///
/// Errors: [`ErrorKind::Io`](crate::ErrorKind::Io) with the path, also for a symbolic link to a folder that does not
/// exist, which may be on a disk that is not mounted.
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
        // Created by another process.
        Err(error) if error.kind() == ErrorKind::AlreadyExists && folder.is_dir() => {}
        result => result.map_err(broken)?,
    }
    sync_folder(parent(folder)).map_err(broken)
}

/// Returns the folder that contains this name.
fn parent(path: &Path) -> &Path {
    match path.parent() {
        Some(parent) if !parent.as_os_str().is_empty() => parent,
        _ => Path::new("."),
    }
}

/// Syncs the names in a folder to disk where that is possible: only on Unix, in a readable folder, and on file systems
/// that support it (some network and user-space ones return `EINVAL` or `EBADF`).
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

/// Syncs a file to disk, if its file system supports that.
fn sync(file: &File) -> io::Result<()> {
    match file.sync_all() {
        Err(error) if matches!(error.kind(), ErrorKind::InvalidInput | ErrorKind::Unsupported) => Ok(()),
        result => result,
    }
}

/// Repeats a call while signals interrupt it (`EINTR`): for `fsync` and `fchmod`, since the standard library retries
/// only when it opens, reads and writes files.
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
        // Killed: the file exists and is not locked.
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

        // Anything else with the name is skipped: a folder, and a link, which is not followed.
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

    /// Many threads write one file: it has the content of one of them, and no temporary file is left.
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

    /// The owner is kept if the process may give files away, as root may.
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
