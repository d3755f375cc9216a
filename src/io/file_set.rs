//! Sets of files in one folder that are replaced atomically. The protocol is described at `train::Checkpoint`.

use std::{
    fs, io,
    path::{Path, PathBuf},
};

use crate::{
    Error, Result,
    atomic_file::{FolderLock, create_folders, retry, sync_folder, write_new},
    error::ensure,
};

/// Folder of a complete set of files that is being moved into place.
const INCOMING: &str = ".incoming";
/// Folder of a set that is being written.
const PARTIAL: &str = ".incoming.partial";

/// The files with these names in a folder.
#[derive(Clone, Copy)]
pub(crate) struct FileSet<'a> {
    pub folder: &'a Path,
    pub names: &'a [&'static str],
}

/// Writes the files of a set, each by its name.
pub(crate) struct Writer<'a> {
    set: FileSet<'a>,
    partial: PathBuf,
}

impl Writer<'_> {
    /// Path of a file that is being written.
    pub fn path(&self, name: &str) -> PathBuf {
        self.partial.join(name)
    }

    pub fn write(&self, name: &str, write: impl FnOnce(&mut dyn io::Write) -> io::Result<()>) -> Result<()> {
        let path = self.path(name);
        write_new(&path, &self.set.folder.join(name), write).map_err(|source| Error::io(path, source))
    }
}

impl<'a> FileSet<'a> {
    /// Replaces all files by those that `write` writes. Creates the folder if necessary.
    pub fn replace(self, write: impl FnOnce(&Writer<'a>) -> Result<()>) -> Result<()> {
        create_folders(self.folder)?;
        let (partial, incoming) = (self.folder.join(PARTIAL), self.folder.join(INCOMING));
        // Foreign files in the way are an error now rather than in the middle of the replacement.
        check_folder(&incoming)?;
        let lock = self.begin(&partial)?;
        let writer = Writer { set: self, partial };
        let written = write(&writer).and_then(|()| {
            sync_folder(&writer.partial).map_err(|source| Error::io(&writer.partial, source))?;
            // Saved by another process in the meantime, or left by a killed one.
            self.move_incoming()?;
            retry(|| fs::rename(&writer.partial, &incoming)).map_err(|source| Error::io(&incoming, source))
        });
        if let Err(error) = written {
            // The first error is returned; the next save removes what cannot be removed now.
            let _ = remove(&writer.partial);
            return Err(error);
        }
        sync_folder(self.folder).map_err(|source| Error::io(self.folder, source))?;
        self.move_from(&incoming)?;
        drop(lock);
        Ok(())
    }

    /// Completes a replacement that was interrupted after its atomic step, and removes the remains of one that was
    /// interrupted before it. Waits for other processes that are doing so.
    pub fn complete(self) -> Result<()> {
        self.move_incoming()?;
        let partial = self.folder.join(PARTIAL);
        match lock(&partial)? {
            Some(_lock) => remove(&partial),
            None => Ok(()),
        }
    }

    /// Returns the path of a file.
    ///
    /// Errors: those of `read`; [`ErrorKind::File`](crate::ErrorKind::File) if the file does not exist.
    pub fn read<T>(self, name: &str, read: impl Fn(&Path) -> Result<T>) -> Result<T> {
        for place in [self.folder.join(INCOMING).join(name), self.folder.join(name)] {
            match read(&place) {
                Err(error)
                    if matches!(error.io_kind(), Some(io::ErrorKind::NotFound | io::ErrorKind::NotADirectory)) => {}
                answer => return answer,
            }
        }
        let why = match fs::metadata(self.folder) {
            Ok(found) if found.is_dir() => "is not a checkpoint",
            Ok(_) => "is not a folder",
            Err(_) => "does not exist",
        };
        Err(Error::file(
            self.folder,
            format_args!("{why}: expected a checkpoint folder with {}, found no {name}", self.names.join(", ")),
        ))
    }

    /// Creates the folder for new files, which only this process uses.
    fn begin(self, partial: &Path) -> Result<FolderLock> {
        loop {
            self.complete()?;
            match retry(|| fs::create_dir(partial)) {
                Ok(()) => {}
                // Another process was faster.
                Err(error) if error.kind() == io::ErrorKind::AlreadyExists => continue,
                Err(error) => return Err(Error::io(partial, error)),
            }
            // `None` if another process mistook it for the remains of a dead one.
            if let Some(lock) = lock(partial)? {
                return Ok(lock);
            }
        }
    }

    /// Moves the files out of `.incoming`, if it exists.
    fn move_incoming(self) -> Result<()> {
        let incoming = self.folder.join(INCOMING);
        match lock(&incoming)? {
            Some(_lock) => self.move_from(&incoming),
            None => Ok(()),
        }
    }

    fn move_from(self, incoming: &Path) -> Result<()> {
        for name in self.names {
            let target = self.folder.join(name);
            match retry(|| fs::rename(incoming.join(name), &target)) {
                Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(Error::io(target, error)),
                _ => {}
            }
        }
        sync_folder(self.folder).map_err(|source| Error::io(self.folder, source))?;
        remove(incoming)
    }
}

/// Waits until no other process uses a temporary folder and locks it. Returns `None` if the folder does not exist.
fn lock(folder: &Path) -> Result<Option<FolderLock>> {
    loop {
        if !check_folder(folder)? {
            return Ok(None);
        }
        if let Some(lock) = FolderLock::wait(folder).map_err(|source| Error::io(folder, source))? {
            return Ok(Some(lock));
        }
    }
}

/// Returns `true` if a temporary folder exists.
///
/// Errors: its name belongs to something other than a folder.
fn check_folder(folder: &Path) -> Result<bool> {
    match retry(|| fs::symlink_metadata(folder)) {
        Ok(found) => {
            ensure!(found.is_dir(), Error::file(folder, "must be a folder to save into; move this file away"));
            Ok(true)
        }
        Err(error) if matches!(error.kind(), io::ErrorKind::NotFound | io::ErrorKind::NotADirectory) => Ok(false),
        Err(error) => Err(Error::io(folder, error)),
    }
}

/// Removes a folder if it exists.
fn remove(folder: &Path) -> Result<()> {
    match retry(|| fs::remove_dir_all(folder)) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(Error::io(folder, error)),
        _ => Ok(()),
    }
}
