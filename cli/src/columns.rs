//! Columns of texts in Parquet files.

#[cfg(feature = "parquet")]
pub use with_parquet::{check, texts};

#[cfg(feature = "parquet")]
mod with_parquet {
    use std::{
        any::Any,
        fs::File,
        panic::{AssertUnwindSafe, catch_unwind},
        path::Path,
        vec,
    };

    use parquet::{
        basic::{Compression, ConvertedType, LogicalType, Repetition, Type as Physical},
        column::reader::{ColumnReader, ColumnReaderImpl},
        data_type::{ByteArray, ByteArrayType},
        errors::ParquetError,
        file::reader::{FileReader, SerializedFileReader},
        schema::types::{SchemaDescriptor, Type},
    };

    use crate::failure::{Failure, Result};

    /// Rows decoded at a time; only these and one page are in memory.
    const ROWS: usize = 64;

    /// Returns an error if `xt` was built without the feature `parquet`.
    pub fn check() -> Result<()> {
        Ok(())
    }

    /// Texts of a column, from the first row on; an error names its row and ends them.
    pub fn texts<'p>(path: &'p Path, column: &'p str) -> Box<dyn Iterator<Item = Result<String>> + Send + 'p> {
        match Texts::open(path, column) {
            Ok(texts) => Box::new(texts),
            Err(failure) => Box::new(std::iter::once(Err(failure))),
        }
    }

    struct Texts<'p> {
        path: &'p Path,
        column: &'p str,
        file: SerializedFileReader<File>,
        /// Number of the column among those of the file.
        index: usize,
        /// Number of the next row group.
        group: usize,
        values: Option<ColumnReaderImpl<ByteArrayType>>,
        /// Rows of the row group that are still to be decoded.
        left: usize,
        decoded: vec::IntoIter<Option<ByteArray>>,
        /// Number of the next row, from 0.
        row: u64,
        ended: bool,
    }

    impl<'p> Texts<'p> {
        fn open(path: &'p Path, column: &'p str) -> Result<Self> {
            let file = File::open(path).map_err(|error| Failure::io(path, &error))?;
            if file.metadata().is_ok_and(|metadata| metadata.is_dir()) {
                return Err(Failure::new("is a folder; give the Parquet files in it").within(path));
            }
            let damaged = |why: String| format!("is not a whole Parquet file: {why}");
            let file = guarded(|| SerializedFileReader::new(file)).map_err(damaged);
            let file = file.map_err(|why| Failure::new(why).within(path))?;
            let index = find(&file, column).map_err(|why| Failure::new(why).within(path))?;
            Ok(Self {
                path,
                column,
                file,
                index,
                group: 0,
                values: None,
                left: 0,
                decoded: Vec::new().into_iter(),
                row: 0,
                ended: false,
            })
        }

        /// Decodes the next rows; `false` after the last.
        fn decode(&mut self) -> std::result::Result<bool, String> {
            let Self { file, index, .. } = self;
            while self.left == 0 {
                if self.group == file.num_row_groups() {
                    return Ok(false);
                }
                let (left, values) = guarded(|| {
                    let group = file.get_row_group(self.group)?;
                    Ok((group.metadata().num_rows(), group.get_column_reader(*index)?))
                })?;
                let ColumnReader::ByteArrayColumnReader(values) = values else {
                    return Err("expected strings".to_string());
                };
                self.left = usize::try_from(left).map_err(|_| format!("the row group has {left} rows"))?;
                (self.values, self.group) = (Some(values), self.group + 1);
            }
            let Some(values) = &mut self.values else { return Ok(false) };
            let (mut levels, mut present) = (Vec::new(), Vec::new());
            let wanted = self.left.min(ROWS);
            let (rows, ..) = guarded(|| values.read_records(wanted, Some(&mut levels), None, &mut present))?;
            if rows == 0 || rows > wanted || !levels.is_empty() && levels.len() != rows {
                return Err(format!("the row group is cut short: {} of its rows are missing", self.left));
            }
            self.left -= rows;
            let mut present = present.into_iter();
            let decoded: Vec<_> = match levels[..] {
                [] => present.by_ref().take(rows).map(Some).collect(),
                ref levels => levels.iter().map(|&level| if level > 0 { present.next() } else { None }).collect(),
            };
            self.decoded = decoded.into_iter();
            Ok(true)
        }
    }

    impl Iterator for Texts<'_> {
        type Item = Result<String>;

        fn next(&mut self) -> Option<Self::Item> {
            if self.ended {
                return None;
            }
            let value = loop {
                if let Some(value) = self.decoded.next() {
                    break text_of(value);
                }
                match self.decode() {
                    Ok(true) => {}
                    Ok(false) => return None,
                    Err(why) => break Err(format!("cannot be read: {why}")),
                }
            };
            let Self { path, column, row, .. } = *self;
            self.row += 1;
            self.ended = value.is_err();
            let named =
                |why| Failure::new(format_args!("row {row}, counted from 0: column `{column}` {why}")).within(path);
            Some(value.map_err(named))
        }
    }

    /// Returns the text of a row, as of a record of JSONL.
    fn text_of(value: Option<ByteArray>) -> std::result::Result<String, String> {
        let Some(value) = value else { return Err("is null, expected a string".to_string()) };
        match value.as_utf8() {
            Ok("") => Err("is empty".to_string()),
            Ok(text) => Ok(text.to_string()),
            Err(_) => Err("is not UTF-8".to_string()),
        }
    }

    /// Returns the number of a column of strings.
    fn find(file: &SerializedFileReader<File>, column: &str) -> std::result::Result<usize, String> {
        let metadata = file.metadata();
        let schema: &SchemaDescriptor = metadata.file_metadata().schema_descr();
        let fields = schema.root_schema().get_fields();
        let named = |name: &str| fields.iter().find(|field| field.name() == name);
        let nested = |field: &Type| {
            let what = if is_repeated(field) { "repeated" } else { "nested" };
            Err(format!(
                "column `{}` is {what}, expected strings; write the texts as a column of their own",
                field.name()
            ))
        };
        let Some(field) = named(column) else {
            // `meta.title` is a field of `meta`.
            let outer = column.split_once('.').and_then(|(outer, _)| named(outer)).filter(|field| field.is_group());
            let names: Vec<&str> = fields.iter().map(|field| field.name()).collect();
            return outer.map_or_else(
                || Err(format!("column `{column}` is missing; the file has {}", names.join(", "))),
                |outer| nested(outer),
            );
        };
        if field.is_group() || is_repeated(field) {
            return nested(field);
        }
        let is_it = |&index: &usize| schema.column(index).path().parts() == [column];
        let index = (0..schema.num_columns()).find(is_it).ok_or_else(|| format!("column `{column}` is missing"))?;
        let info = field.get_basic_info();
        let text = matches!(info.logical_type_ref(), Some(LogicalType::String));
        if field.get_physical_type() != Physical::BYTE_ARRAY || !text && info.converted_type() != ConvertedType::UTF8 {
            let kind = match (info.logical_type_ref(), field.get_physical_type()) {
                (Some(logical), _) => format!("{logical:?}"),
                (None, Physical::BYTE_ARRAY) => "bytes".to_string(),
                (None, physical) => physical.to_string(),
            };
            return Err(format!("column `{column}` has the type {kind}, expected strings"));
        }
        for group in metadata.row_groups() {
            let codec = group.column(index).compression();
            if !matches!(
                codec,
                Compression::UNCOMPRESSED | Compression::SNAPPY | Compression::GZIP(_) | Compression::ZSTD(_)
            ) {
                return Err(format!(
                    "column `{column}` is compressed with {codec}, expected snappy, gzip, zstd or no compression"
                ));
            }
        }
        Ok(index)
    }

    fn is_repeated(field: &Type) -> bool {
        let info = field.get_basic_info();
        info.has_repetition() && info.repetition() == Repetition::REPEATED
    }

    /// Calls the decoder: a bug in it must not end a run without the name of the file.
    fn guarded<T>(read: impl FnOnce() -> parquet::errors::Result<T>) -> std::result::Result<T, String> {
        let panicked = |_: Box<dyn Any + Send>| Err(ParquetError::General("the decoder failed".to_string()));
        catch_unwind(AssertUnwindSafe(read)).unwrap_or_else(panicked).map_err(|error| match error {
            ParquetError::General(why) | ParquetError::EOF(why) => why,
            other => other.to_string(),
        })
    }

    #[cfg(test)]
    mod tests {
        use std::fs;

        use x_transformers::Philox;

        use super::*;

        fn file(name: &str) -> std::path::PathBuf {
            Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/files/parquet").join(name)
        }

        /// Damaged files end with an error or with other texts.
        #[test]
        fn damaged_files() {
            let folder = tempfile::tempdir().expect("a folder");
            let path = folder.path().join("damaged.parquet");
            let mut refused = 0;
            for name in ["plain", "snappy", "zstd", "gzip"] {
                let whole = fs::read(file(&format!("{name}.parquet"))).expect("a file");
                for seed in 0..200u64 {
                    let random = Philox::new(seed, 0);
                    let mut bytes = whole.clone();
                    // Half of them in the footer, which is at the end.
                    let from = if seed % 2 == 0 { 0 } else { bytes.len() - bytes.len().min(600) };
                    for at in 0..=seed % 3 {
                        let place = from + (random.uniform(2 * at) * (bytes.len() - from) as f64) as usize;
                        bytes[place] = (random.uniform(2 * at + 1) * 256.0) as u8;
                    }
                    if seed % 5 == 0 {
                        bytes.truncate((random.uniform(9) * bytes.len() as f64) as usize);
                    }
                    fs::write(&path, &bytes).expect("a file");
                    let texts: Vec<_> = texts(&path, "text").collect();
                    if let Some(Err(failure)) = texts.last() {
                        refused += 1;
                        assert!(failure.to_string().contains("damaged.parquet: "), "{name} {seed}: {failure}");
                    }
                    let before = &texts[..texts.len().saturating_sub(1)];
                    assert!(before.iter().all(|text| text.is_ok()), "{name} {seed}: nothing follows an error");
                }
            }
            assert!(refused > 300, "{refused}");
        }
    }
}

#[cfg(not(feature = "parquet"))]
pub use without_parquet::{check, texts};

#[cfg(not(feature = "parquet"))]
mod without_parquet {
    use std::path::Path;

    use crate::failure::{Failure, Result};

    /// Returns an error if `xt` was built without the feature `parquet`.
    pub fn check() -> Result<()> {
        Err(Failure::new(
            "`--parquet` requires `xt` built with the feature `parquet`: `cargo install --path cli --features parquet`",
        ))
    }

    /// Refuses every file.
    pub fn texts(_path: &Path, _column: &str) -> Box<dyn Iterator<Item = Result<String>> + Send> {
        Box::new(check().err().into_iter().map(Err))
    }
}
