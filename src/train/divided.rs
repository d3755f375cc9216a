//! Files of tensors that are divided among ranks: each writes its part of every tensor.

use std::{
    collections::BTreeMap,
    fs::{self, OpenOptions},
    io::{Seek, SeekFrom, Write},
    path::{Path, PathBuf},
};

use serde_json::Value;

use super::{
    Checkpoint,
    checkpoint::{MODEL, OPTIMIZER},
};
use crate::{
    Device, Error, Result, Tensor,
    collect::CollectVec,
    distributed::Communicator,
    error::ensure,
    io::{Places, Writer, places},
    ordered::OrderedMap,
    shape::Shape,
    sort::sort_by,
};

/// State of an optimizer, or weights, of which this rank has a part.
pub(super) struct Divided {
    /// Tensors that all ranks have; rank 0 writes them.
    pub whole: BTreeMap<String, Tensor>,
    /// Dtypes and shapes of the tensors that are divided.
    pub shapes: BTreeMap<String, (crate::DType, Shape)>,
    /// This rank's elements of them, and the number of elements before.
    pub own: Vec<(String, usize, Tensor)>,
}

impl Divided {
    /// Saves a checkpoint whose optimizer's state is this, and whose weights are `model` if they are divided too: rank 0
    /// writes the other files, and these become whole ones before the checkpoint replaces the last.
    ///
    /// Errors: those of [`Checkpoint::save`], on all ranks if one could not write.
    pub fn save(
        &self,
        checkpoint: &Checkpoint<Value>,
        model: Option<&Self>,
        folder: &Path,
        ranks: &dyn Communicator,
    ) -> Result<()> {
        let (mut files, metadata) = (Vec::new(), checkpoint.metadata());
        for (name, file) in model.map(|model| (MODEL, model)).into_iter().chain([(OPTIMIZER, self)]) {
            files.push((name, file, file.places(name, &metadata)?));
        }
        if ranks.rank() > 0 {
            return files.iter().try_for_each(|(name, file, places)| {
                let path = told(ranks, None)?;
                file.write(name, path.as_deref(), places, ranks)
            });
        }
        // If the others wait for the path of this file.
        let mut waited = Some(0);
        let saved = checkpoint.save_with(folder, |writer: &Writer| {
            if model.is_none() {
                checkpoint.write_model(writer)?;
            }
            for (at, (name, file, places)) in files.iter().enumerate() {
                writer.write(name, |file| file.write_all(&places.header))?;
                let path = writer.path(name);
                let opened =
                    OpenOptions::new().write(true).open(&path).and_then(|file| file.set_len(places.bytes as u64));
                let absolute =
                    opened.and_then(|()| fs::canonicalize(&path)).map_err(|error| Error::io(&path, error))?;
                waited = None;
                let path = told(ranks, Some(&absolute))?;
                file.write(name, path.as_deref(), places, ranks)?;
                waited = Some(at + 1);
            }
            Ok(())
        });
        if let Some((name, file, places)) = waited.and_then(|at| files.get(at)) {
            // The others must not wait for the file; the first error counts.
            told(ranks, Some(Path::new("")))?;
            let _ = file.write(name, None, places, ranks);
        }
        saved
    }

    fn places(&self, name: &str, metadata: &BTreeMap<String, String>) -> Result<Places<'_>> {
        let mut described =
            self.whole.iter().map(|(name, tensor)| (name.as_str(), tensor.dtype(), *tensor.shape())).collect_vec();
        described.extend(self.shapes.iter().map(|(name, (dtype, shape))| (name.as_str(), *dtype, *shape)));
        sort_by(&mut described, |a, b| a.0.cmp(b.0));
        places(Path::new(name), described, metadata)
    }

    /// Writes this rank's tensors, and waits for the other ranks.
    fn write(&self, name: &str, path: Option<&Path>, places: &Places, ranks: &dyn Communicator) -> Result<()> {
        let written = match path {
            Some(path) => self.write_own(path, places, ranks.rank() == 0),
            None => Err(Error::argument("save", "rank 0 could not write; its message says why")),
        };
        let mut all = vec![0; ranks.size()];
        ranks.all_gather_bytes(&[u8::from(written.is_ok())], &mut all)?;
        written?;
        let failed = all.iter().position(|&wrote| wrote == 0);
        let why = |rank| format!("rank {rank} could not write its part of {name}; its message says why");
        ensure!(failed.is_none(), Error::argument("save", why(failed.unwrap_or(0))));
        Ok(())
    }

    fn write_own(&self, path: &Path, places: &Places, first: bool) -> Result<()> {
        let broken = |error| Error::io(path, error);
        let mut file = OpenOptions::new().write(true).open(path).map_err(broken)?;
        let of = places.tensors.iter().copied().collect::<OrderedMap<&str, usize>>();
        let mut write = |name: &str, before: usize, tensor: &Tensor| {
            let tensor = tensor.detach().contiguous()?.to_device(&Device::Cpu)?;
            let at = of[name] + before * tensor.dtype().size();
            file.seek(SeekFrom::Start(at as u64)).map_err(broken)?;
            file.write_all(tensor.bytes()?).map_err(broken)
        };
        if first {
            self.whole.iter().try_for_each(|(name, tensor)| write(name, 0, tensor))?;
        }
        for (name, before, tensor) in &self.own {
            let described = self.shapes.get(name).map(|(dtype, _)| *dtype);
            ensure!(
                described == Some(tensor.dtype()),
                Error::dtype("save", format_args!("{name} is {}, not the dtype of its file", tensor.dtype()))
            );
            write(name, *before, tensor)?;
        }
        file.sync_all().map_err(broken)
    }
}

/// Gives the path that rank 0 has to all; an empty one is `None`.
fn told(ranks: &dyn Communicator, path: Option<&Path>) -> Result<Option<PathBuf>> {
    let mut bytes = path.map_or(Vec::new(), |path| path.as_os_str().as_encoded_bytes().to_vec());
    let mut length = (bytes.len() as u64).to_le_bytes();
    ranks.broadcast_bytes(&mut length, 0)?;
    bytes.resize(u64::from_le_bytes(length) as usize, 0);
    ranks.broadcast_bytes(&mut bytes, 0)?;
    let path = String::from_utf8(bytes);
    let path = path.map_err(|_| Error::argument("save", "expected a folder whose path is UTF-8"))?;
    Ok((!path.is_empty()).then(|| path.into()))
}
