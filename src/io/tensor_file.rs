//! Files with named tensors, in any of the supported formats.

use std::{
    collections::BTreeMap,
    fmt, fs,
    path::{Component, Path, PathBuf},
};

use serde::Deserialize;

use super::{
    bytes::{Parsed, Reading, Unreadable},
    gguf,
    layout::ELSEWHERE,
    mistaken, pytorch, read_limited, safetensors,
    source::Source,
    split,
    stored::{self, Stored},
    zip,
};
use crate::{
    Error, ErrorKind, Result, Shape, Tensor,
    collect::CollectVec,
    ops::PackedMatrix,
    ordered::{OrderedMap, try_ordered},
    sort::{sort, sort_by},
};

/// File with named tensors, or several files that belong together, read one tensor at a time.
///
/// | format | recognised by |
/// |---|---|
/// | safetensors | anything else |
/// | safetensors in several files | its index, a name that ends in `.index.json` |
/// | PyTorch, `torch.save` of a state dict | a zip archive with `data.pkl` |
/// | PyTorch before 1.6 | a pickle with the number of that format |
/// | GGUF 2 and 3 | `GGUF` |
/// | GGUF in several files | one of them, named `NAME-00001-of-00003.gguf` |
///
/// Supported GGUF types are F32, F16, BF16, F64, the integers, Q4_0, Q4_1, Q5_0, Q5_1, Q8_0, Q2_K to Q6_K, IQ4_NL and
/// IQ4_XS; values of the quantised ones become f32, or stay packed with [`TensorFile::packed`].
///
/// Pickles are read by an interpreter that executes nothing: it knows the constructors of tensors and dictionaries,
/// and keeps only the constructor's name of other objects. Tensors that are such objects, or whose values have an
/// unsupported type, are among [`TensorFile::unreadable`].
///
/// Files are not trusted: everything that a file claims is checked against its size before memory is allocated, and
/// reading all of its tensors takes at most sixteen times its size. The file stays open, and is not mapped into
/// memory: if it is truncated or written to meanwhile, reading returns an error that names it; if it is replaced by a
/// rename, the old content is read.
///
/// ```
/// use x_transformers::{Device, Tensor, io::{TensorFile, write_safetensors}};
/// # fn main() -> x_transformers::Result<()> {
/// # let folder = std::env::temp_dir().join(format!("xt-doc-tensor-file-{}", std::process::id()));
/// # std::fs::create_dir_all(&folder).unwrap();
/// # let path = folder.join("weights.safetensors");
/// let weight = Tensor::from_slice(&[1.0f32, 2.0], [2], &Device::Cpu)?;
/// write_safetensors(&path, &[("weight".to_string(), weight)].into(), &Default::default())?;
/// let file = TensorFile::open(&path)?;
/// assert_eq!(file.info("weight").unwrap().shape, [2]);
/// assert_eq!(file.tensor("weight")?.to_vec::<f32>()?, [1.0, 2.0]);
/// # std::fs::remove_dir_all(&folder).unwrap();
/// # Ok(())
/// # }
/// ```
#[derive(Debug)]
#[doc(alias = "torch.load")]
#[doc(alias = "gguf")]
#[doc(alias = "pickle")]
pub struct TensorFile {
    pub(super) path: PathBuf,
    format: Format,
    pub(super) parts: Vec<Source>,
    pub(super) listed: OrderedMap<String, Listed>,
    pub(super) metadata: BTreeMap<String, Metadata>,
}

/// Format of a file.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
#[non_exhaustive]
pub enum Format {
    /// <https://github.com/huggingface/safetensors>
    Safetensors,
    /// `torch.save` since PyTorch 1.6.
    PytorchArchive,
    /// `torch.save` before PyTorch 1.6.
    PytorchLegacy,
    /// llama.cpp's format.
    Gguf,
}

impl fmt::Display for Format {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Safetensors => "safetensors",
            Self::PytorchArchive => "PyTorch",
            Self::PytorchLegacy => "PyTorch before 1.6",
            Self::Gguf => "GGUF",
        })
    }
}

/// Metadata that a file has beside its tensors.
#[derive(Clone, PartialEq, Debug)]
#[non_exhaustive]
pub enum Metadata {
    /// True or false.
    Bool(bool),
    /// Integer of any width.
    Int(i64),
    /// 64-bit integer above [`i64::MAX`].
    Unsigned(u64),
    /// Float of any width.
    Float(f64),
    /// Text.
    Text(String),
    /// List of values of one kind.
    List(Vec<Metadata>),
}

/// Type and shape of a tensor in a file.
#[derive(Clone, PartialEq, Eq, Debug)]
#[non_exhaustive]
pub struct TensorInfo {
    /// Storage type of the values.
    pub stored: Stored,
    /// Shape.
    pub shape: Vec<usize>,
}

/// Tensor as stored in its file, for instance GGUF's packed blocks.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct RawTensor {
    /// Type of the values in `bytes`.
    pub stored: Stored,
    /// Shape; blocks lie along the last dimension.
    pub shape: Vec<usize>,
    /// Bytes; [`Stored::block`] returns the numbers of values and bytes of a block.
    pub bytes: Vec<u8>,
}

/// Place of a tensor, which the constructor has checked to lie inside its file.
#[derive(Clone, Debug)]
pub(super) struct Entry {
    pub part: usize,
    pub stored: Stored,
    pub shape: Shape,
    /// Strides, in values; `None`: packed in the order of the shape.
    pub strides: Option<Vec<usize>>,
    /// Offset of the first value, in bytes.
    pub start: usize,
}

/// Named entry of a file.
#[derive(Clone, Debug)]
pub(super) enum Listed {
    Tensor(Entry),
    Inert(Inert),
}

impl Listed {
    /// Returns a tensor that is not read.
    pub fn unreadable(why: String) -> Self {
        Self::Inert(Inert { why, tensor: true })
    }

    pub fn entry(&self) -> Option<&Entry> {
        match self {
            Self::Tensor(entry) => Some(entry),
            Self::Inert(_) => None,
        }
    }

    fn inert(&self) -> Option<&Inert> {
        match self {
            Self::Tensor(_) => None,
            Self::Inert(inert) => Some(inert),
        }
    }
}

/// Named entry that is not read.
#[derive(Clone, Debug)]
pub(super) struct Inert {
    /// Reason, worded to follow the name.
    pub why: String,
    /// If `true`, it is a tensor; otherwise it may be an object of another kind.
    pub tensor: bool,
}

/// Contents of a file as a reader finds them.
#[derive(Default)]
pub(super) struct Listing {
    pub listed: OrderedMap<String, Listed>,
    pub metadata: BTreeMap<String, Metadata>,
}

/// Maximum size of a sharded checkpoint's index, in bytes.
const MAX_INDEX: u64 = 100_000_000;

/// Files to look for in a folder, the best first.
const IN_FOLDERS: [&str; 4] =
    ["model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json"];

impl TensorFile {
    /// Opens a file of any of the formats, an index of several files, any part of a split GGUF model, or a folder with
    /// one of `model.safetensors`, `model.safetensors.index.json`, `pytorch_model.bin`, `pytorch_model.bin.index.json`,
    /// or a single `.gguf` model, which may be split.
    ///
    /// Errors: [`ErrorKind::Io`] if a file cannot be read; [`ErrorKind::File`] with a description of what is wrong and
    /// where.
    pub fn open(path: impl AsRef<Path>) -> Result<Self> {
        let path = path.as_ref();
        let path = if path.is_dir() { &in_folder(path)? } else { path };
        if path.to_string_lossy().ends_with(".index.json") { Self::open_index(path) } else { Self::open_one(path) }
    }

    /// Reads a file from memory. A part of a split GGUF model is read as one part.
    ///
    /// Errors: [`ErrorKind::File`] with a description of what is wrong and where.
    pub fn from_bytes(bytes: impl Into<Vec<u8>>) -> Result<Self> {
        Self::of(Source::memory(bytes.into()))
    }

    fn open_one(path: &Path) -> Result<Self> {
        let one = |path: &Path| Self::of(Source::open(path)?);
        split::complete(one(path)?, one)
    }

    fn of(source: Source) -> Result<Self> {
        let mut beginning = [0; mistaken::BEGINNING];
        let beginning = &mut beginning[..source.len().min(mistaken::BEGINNING)];
        source.read_at(0, beginning)?;
        let format = if beginning.starts_with(gguf::MAGIC) {
            Format::Gguf
        } else if zip::is_zip(beginning) {
            Format::PytorchArchive
        } else if pytorch::is_legacy(beginning) {
            Format::PytorchLegacy
        } else if let Some(what) = mistaken::not_weights(beginning) {
            return Err(Error::file(source.path(), what));
        } else {
            Format::Safetensors
        };
        let listing = match format {
            Format::Safetensors => safetensors::listing(&source),
            Format::PytorchArchive => pytorch::archive(&source),
            Format::PytorchLegacy => pytorch::legacy(&source),
            Format::Gguf => gguf::listing(&source),
        };
        // What does not fit together was perhaps read while somebody wrote it.
        source.check_unchanged()?;
        let mut listing = listing.map_err(|why| why.within(&source))?;
        check_total(&mut listing, source.len()).map_err(|why| Error::file(source.path(), why))?;
        let Listing { listed, metadata } = listing;
        Ok(Self { path: source.path().to_path_buf(), parts: vec![source], format, listed, metadata })
    }

    /// Opens all files that an index names. A tensor is that of the file where the index places it; one that is not
    /// there, or that the index does not know, is that of the only file that has it, and unreadable if none has.
    fn open_index(path: &Path) -> Result<Self> {
        #[derive(Deserialize)]
        struct Index {
            weight_map: BTreeMap<String, String>,
        }
        let text = read_limited(path, MAX_INDEX)?;
        let mut index: Index = serde_json::from_slice(&text).map_err(|why| {
            let no_index = || format!("is not the index of a sharded checkpoint: {why}");
            Error::file(path, mistaken::mistaken(&text).map_or_else(no_index, str::to_string))
        })?;
        for name in index.weight_map.values_mut() {
            *name = inside(name).ok_or_else(|| {
                let why = format!("refers to `{name}`, expected a file in the same folder or below it");
                Error::file(path, why)
            })?;
        }
        let mut names: Vec<&str> = index.weight_map.values().map(String::as_str).collect_vec();
        sort(&mut names);
        names.dedup();
        let folder = path.parent().unwrap_or(Path::new(""));
        let (mut parts, mut format, mut metadata) = (Vec::new(), Format::Safetensors, BTreeMap::new());
        // Each name with the files that have it and how much that counts: an entry that is not read, a tensor, the
        // tensor that the index means. One that no file has, say a tied weight, is an error only where it is needed.
        const TENSOR: usize = 2;
        let nowhere = |(tensor, file): (&String, &String)| {
            let why = format!("is not in `{file}`, where the index lists it");
            (tensor.clone(), 0, "", Listed::unreadable(why))
        };
        let mut found: Vec<(String, usize, &str, Listed)> = index.weight_map.iter().map(nowhere).collect_vec();
        for name in names {
            let shard = Self::open_one(&folder.join(name))?;
            for (tensor, mut listed) in shard.listed {
                let mut counts = 1;
                if let Listed::Tensor(entry) = &mut listed {
                    entry.part = parts.len();
                    counts = TENSOR + usize::from(index.weight_map.get(&tensor).is_some_and(|wanted| wanted == name));
                }
                found.push((tensor, counts, name, listed));
            }
            format = shard.format;
            metadata.extend(shard.metadata);
            parts.extend(shard.parts);
        }
        sort_by(&mut found, |a, b| a.0.cmp(&b.0).then(a.1.cmp(&b.1)));
        for same in found.chunk_by(|a, b| a.0 == b.0) {
            if let [.., (_, TENSOR, other, _), (tensor, TENSOR, name, _)] = same {
                let why = format!("tensor `{tensor}` to use, which is in both `{other}` and `{name}`");
                return Err(Error::file(path, format_args!("does not say which {why}")));
            }
        }
        let listed = found.into_iter().map(|(tensor, _, _, listed)| (tensor, listed)).collect();
        Ok(Self { path: path.to_path_buf(), format, parts, listed, metadata })
    }

    /// Returns the path of the opened file, for a folder that of the file found in it.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Returns the format.
    pub fn format(&self) -> Format {
        self.format
    }

    /// Returns the total size of all files, in bytes.
    pub fn bytes(&self) -> usize {
        self.parts.iter().map(Source::len).sum()
    }

    /// Returns the names of the tensors, in alphabetical order.
    pub fn names(&self) -> impl Iterator<Item = &str> {
        self.entries().map(|(name, _)| name)
    }

    /// Returns type and shape of a tensor, or `None` if there is none of this name.
    pub fn info(&self, name: &str) -> Option<TensorInfo> {
        self.listed.get(name)?.entry().map(|entry| TensorInfo { stored: entry.stored, shape: entry.shape.to_vec() })
    }

    /// Returns the tensors that cannot be read, in alphabetical order, with the reasons: values of a type without a
    /// [`Stored`], tensors made by an unknown function in a pickle, or placed by an index in a file that lacks them.
    pub fn unreadable(&self) -> impl Iterator<Item = (&str, &str)> {
        let inert = self.listed.iter().filter_map(|(name, listed)| Some((name.as_str(), listed.inert()?)));
        inert.filter(|(_, inert)| inert.tensor).map(|(name, inert)| (name, inert.why.as_str()))
    }

    /// Returns `true` if this is one of [`TensorFile::unreadable`].
    pub(super) fn is_unreadable(&self, name: &str) -> bool {
        self.listed.get(name).and_then(Listed::inert).is_some_and(|inert| inert.tensor)
    }

    /// Returns the reason why the entry of this name is not read; `None` if it is a tensor or does not exist.
    pub(crate) fn inert(&self, name: &str) -> Option<&str> {
        self.listed.get(name)?.inert().map(|inert| inert.why.as_str())
    }

    /// Returns the names of all tensors and of all entries that are not read.
    pub(super) fn all_names(&self) -> impl Iterator<Item = &str> {
        self.listed.keys().iter().map(String::as_str)
    }

    fn entries(&self) -> impl Iterator<Item = (&str, &Entry)> {
        self.listed.iter().filter_map(|(name, listed)| Some((name.as_str(), listed.entry()?)))
    }

    /// Gives tensors, and what is not read, the new names that lead to their old ones. What has such a name otherwise
    /// gets it with [`ELSEWHERE`].
    pub(super) fn rename(&mut self, old: &OrderedMap<String, String>) {
        let new: OrderedMap<&str, &str> = old.iter().map(|(new, old)| (old.as_str(), new.as_str())).collect();
        let listed = std::mem::take(&mut self.listed).into_iter().map(|(name, listed)| match new.get(name.as_str()) {
            Some(new) => (new.to_string(), listed),
            None if old.contains_key(&name) => (format!("{name}{ELSEWHERE}"), listed),
            None => (name, listed),
        });
        self.listed = listed.collect();
    }

    /// Returns `true` if two tensors are the same bytes of the file.
    pub(crate) fn same_place(&self, a: &str, b: &str) -> bool {
        let place = |name: &str| {
            let entry = self.listed.get(name)?.entry()?;
            Some((entry.part, entry.start, entry.stored, entry.shape, &entry.strides))
        };
        place(a).is_some_and(|a| place(b) == Some(a))
    }

    /// Returns the metadata that the file has beside its tensors.
    pub fn metadata(&self) -> &BTreeMap<String, Metadata> {
        &self.metadata
    }

    pub(crate) fn take_metadata(&mut self) -> BTreeMap<String, Metadata> {
        std::mem::take(&mut self.metadata)
    }

    /// Reads a tensor to the CPU, with the dtype of [`Stored::dtype`].
    ///
    /// Errors: no tensor of this name; one of [`TensorFile::unreadable`]; values that its type does not allow; a file
    /// that has changed since it was opened; [`ErrorKind::OutOfMemory`].
    pub fn tensor(&self, name: &str) -> Result<Tensor> {
        let entry = self.entry(name)?;
        entry.read(&self.parts[entry.part], name)
    }

    /// Reads the stored bytes of a tensor, without converting them to numbers.
    ///
    /// ```no_run
    /// use x_transformers::io::{Stored, TensorFile};
    /// # fn main() -> x_transformers::Result<()> {
    /// let file = TensorFile::open("Llama-3.2-1B-Instruct-Q4_K_M.gguf")?;
    /// let raw = file.raw("blk.0.ffn_down.weight")?;
    /// if let Stored::Quantized(kind) = raw.stored {
    ///     let (values_per_block, bytes_per_block) = kind.block();
    ///     let row = raw.shape[1] / values_per_block * bytes_per_block;
    ///     let mut values = vec![0.0; raw.shape[1]];
    ///     kind.dequantize(&raw.bytes[..row], &mut values)?;
    /// }
    /// # Ok(())
    /// # }
    /// ```
    ///
    /// Errors: no tensor of this name; a view in a PyTorch file that is not contiguous; a file that has changed since
    /// it was opened; [`ErrorKind::OutOfMemory`].
    pub fn raw(&self, name: &str) -> Result<RawTensor> {
        let entry = self.entry(name)?;
        Ok(RawTensor { stored: entry.stored, shape: entry.shape.to_vec(), bytes: self.first_bytes(name, usize::MAX)? })
    }

    /// Reads the first bytes of a tensor, up to a limit; like [`TensorFile::raw`].
    pub(crate) fn first_bytes(&self, name: &str, most: usize) -> Result<Vec<u8>> {
        let entry = self.entry(name)?;
        entry.checked(&self.parts[entry.part], name, |source, entry| stored::raw(source, entry, most))
    }

    /// Reads a matrix of a quantised type as it is stored, to the CPU.
    ///
    /// Errors: those of [`TensorFile::tensor`]; a tensor that is not a matrix of a type that
    /// [is packed](crate::QuantType::is_packed); scales that are not finite.
    pub fn packed(&self, name: &str) -> Result<PackedMatrix> {
        self.packed_from(name, &Ok)
    }

    /// Reads a matrix with other rows, made from the blocks of those in the file, `[out, bytes of a row]` as bytes; like
    /// [`TensorFile::packed`].
    pub(crate) fn packed_from(&self, name: &str, rows: &dyn Fn(Tensor) -> Result<Tensor>) -> Result<PackedMatrix> {
        let entry = self.entry(name)?;
        entry.checked(&self.parts[entry.part], name, |source, entry| stored::packed(source, entry, rows))
    }

    fn entry(&self, name: &str) -> Result<&Entry> {
        self.listed.get(name).and_then(Listed::entry).ok_or_else(|| {
            let why = self.inert(name).map(|why| format!("tensor `{name}` {why}"));
            Error::file(&self.path, why.unwrap_or_else(|| format!("has no tensor `{name}`")))
        })
    }

    /// Reads every tensor.
    ///
    /// Errors: those of [`TensorFile::tensor`].
    pub fn tensors(&self) -> Result<BTreeMap<String, Tensor>> {
        if let Some((name, why)) = self.unreadable().next() {
            return Err(Error::file(&self.path, format_args!("tensor `{name}` {why}")));
        }
        try_ordered(self.names().map(|name| Ok((name.to_string(), self.tensor(name)?))))
    }
}

impl Entry {
    /// Reads the tensor of this name.
    pub fn read(&self, source: &Source, name: &str) -> Result<Tensor> {
        self.checked(source, name, stored::read)
    }

    fn checked<T>(&self, source: &Source, name: &str, read: impl Fn(&Source, &Self) -> Reading<T>) -> Result<T> {
        let read = read(source, self);
        source.check_unchanged()?;
        read.map_err(|problem| match problem {
            Unreadable::Content(why) => Error::file(source.path(), format_args!("tensor `{name}` {why}")),
            Unreadable::Failed(error) => match error.kind() {
                ErrorKind::File { .. } | ErrorKind::Io { .. } => error,
                _ => error.context(name),
            },
        })
    }
}

/// Rejects a small file that describes many large tensors: tied weights share their place, others do not. Tensors
/// expanded from fewer values are not read if they would be too large.
fn check_total(listing: &mut Listing, bytes: usize) -> Parsed<()> {
    let most = bytes.saturating_mul(2);
    let fits = |listed: &[Listed]| {
        let mut sizes = listed.iter().filter_map(Listed::entry).map(|entry| entry.stored.bytes(entry.shape.numel()));
        sizes.try_fold(0usize, |total, size| total.checked_add(size?)).is_some_and(|total| total <= most)
    };
    if fits(listing.listed.values()) {
        return Ok(());
    }
    let expanded = |entry: &Entry| {
        let strides = entry.strides.iter().flatten();
        let repeated = |(&stride, &dim): (&usize, &usize)| stride == 0 && dim > 1;
        strides.zip(entry.shape.iter()).any(repeated)
    };
    for listed in listing.listed.values_mut() {
        if listed.entry().is_some_and(expanded) {
            let why = "is expanded to more values than the file contains; save it with `.contiguous()`";
            *listed = Listed::unreadable(why.to_string());
        }
    }
    if fits(listing.listed.values()) {
        return Ok(());
    }
    Err(format!("describes tensors of more than twice its {bytes} bytes: they overlap"))
}

/// Returns a path in an index without its `./`; `None` if it could lead out of the folder.
fn inside(name: &str) -> Option<String> {
    let part = |part| match part {
        Component::CurDir => Some(""),
        Component::Normal(part) => part.to_str(),
        _ => None,
    };
    let parts: Vec<&str> = Path::new(name).components().map(part).collect::<Option<_>>()?;
    let parts: Vec<&str> = parts.into_iter().filter(|part| !part.is_empty()).collect_vec();
    let plain = !parts.is_empty() && !name.ends_with('/') && !name.contains(['\\', '\0']);
    plain.then(|| parts.join("/"))
}

/// Returns the file with the weights in a folder.
fn in_folder(folder: &Path) -> Result<PathBuf> {
    if let Some(found) = IN_FOLDERS.iter().map(|name| folder.join(name)).find(|path| path.is_file()) {
        return Ok(found);
    }
    let found = gguf_files(folder)?;
    if let Some(first) = split::first_of(&found) {
        return Ok(first.clone());
    }
    match &found[..] {
        [one] => Ok(one.clone()),
        [] => Err(Error::file(
            folder,
            format_args!("has no weights: expected one of {}, or a .gguf file", IN_FOLDERS.join(", ")),
        )),
        _ => Err(Error::file(folder, format_args!("has {} .gguf files; name one of them", found.len()))),
    }
}

/// Returns the GGUF files of a folder, in alphabetical order.
fn gguf_files(folder: &Path) -> Result<Vec<PathBuf>> {
    let entries = fs::read_dir(folder).map_err(|source| Error::io(folder, source))?;
    let mut found: Vec<PathBuf> = entries
        .filter_map(|entry| Some(entry.ok()?.path()))
        .filter(|path| path.extension().is_some_and(|ending| ending == "gguf") && path.is_file())
        .collect_vec();
    sort(&mut found);
    Ok(found)
}

/// Returns `true` if the weights of a folder are in GGUF files, readable or not.
pub(crate) fn holds_gguf(folder: &Path) -> bool {
    let others = IN_FOLDERS.iter().any(|name| folder.join(name).is_file());
    !others && gguf_files(folder).is_ok_and(|found| !found.is_empty())
}

impl Metadata {
    /// Returns the number, if it is a non-negative integer.
    pub fn as_usize(&self) -> Option<usize> {
        match self {
            Self::Int(value) => usize::try_from(*value).ok(),
            Self::Unsigned(value) => usize::try_from(*value).ok(),
            _ => None,
        }
    }

    /// Returns the number, if it is a float or an integer.
    pub fn as_f64(&self) -> Option<f64> {
        match self {
            Self::Int(value) => Some(*value as f64),
            Self::Unsigned(value) => Some(*value as f64),
            Self::Float(value) => Some(*value),
            _ => None,
        }
    }

    /// Returns the value, if it is a boolean.
    pub fn as_bool(&self) -> Option<bool> {
        if let Self::Bool(value) = self { Some(*value) } else { None }
    }

    /// Returns the text, if it is text.
    pub fn as_str(&self) -> Option<&str> {
        if let Self::Text(text) = self { Some(text) } else { None }
    }

    /// Returns the values, if it is a list.
    pub fn as_list(&self) -> Option<&[Metadata]> {
        if let Self::List(values) = self { Some(values) } else { None }
    }
}
