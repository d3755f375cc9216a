//! `metrics.csv`: one row per training step and per validation, written as soon as it is known.

use std::{
    fs::{self, File, OpenOptions},
    io::{self, Write},
    path::{Path, PathBuf},
};

use x_transformers::io::write_atomically;

use crate::failure::{Failure, Result};

const HEADER: &str = "step,split,loss,bits_per_byte,lr,tokens_per_second";

/// The table, and the curves that it holds.
///
/// A `train` row holds the loss that step computed before its update, steps counting from 0; a `validation` row holds
/// the loss after `step` updates. Losses are in nats per byte.
pub struct Metrics {
    path: PathBuf,
    rows: Rows,
    /// `(step, bits per byte)` of every train row, with the digits that the row has.
    pub train: Vec<(u64, f64)>,
    /// `(step, bits per byte)` of every validation row, with the digits that the row has.
    pub validation: Vec<(u64, f64)>,
}

/// Where rows go.
enum Rows {
    File(File),
    /// The file is still that of the run that will be replaced.
    Held(String),
}

/// Nats as bits.
pub fn bits(nats: f64) -> f64 {
    nats / std::f64::consts::LN_2
}

impl Metrics {
    /// An empty table, replacing an earlier one at once.
    pub fn create(path: &Path) -> Result<Self> {
        Self::start(path, &format!("{HEADER}\n"))
    }

    /// An empty table that replaces an earlier one when [`Metrics::place`] is called.
    pub fn hold(path: &Path) -> Self {
        let rows = Rows::Held(format!("{HEADER}\n"));
        Self { path: path.into(), rows, train: Vec::new(), validation: Vec::new() }
    }

    /// Goes on with the table of an interrupted run, without the rows of steps that will be done again.
    pub fn resume(path: &Path, done: u64) -> Result<Self> {
        let text = match fs::metadata(path) {
            // Looked at before it is read: a pipe would wait for a writer.
            Ok(found) if found.is_file() => fs::read_to_string(path),
            Ok(_) => Ok(String::new()),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(String::new()),
            Err(error) => Err(error),
        };
        let text = text.map_err(|error| Failure::io(path, &error))?;
        let (mut train, mut validation) = (Vec::new(), Vec::new());
        let mut kept = format!("{HEADER}\n");
        for line in text.lines() {
            // A row that was cut off is not a row.
            let Some((split, step, value)) = parse(line) else { continue };
            let curve = match split {
                "train" if step < done => &mut train,
                "validation" if step <= done => &mut validation,
                _ => continue,
            };
            curve.push((step, value));
            kept.push_str(line);
            kept.push('\n');
        }
        Ok(Self { train, validation, ..Self::start(path, &kept)? })
    }

    fn start(path: &Path, text: &str) -> Result<Self> {
        write_atomically(path, |file| file.write_all(text.as_bytes()))?;
        let file = OpenOptions::new().append(true).open(path).map_err(|error| Failure::io(path, &error))?;
        Ok(Self { path: path.into(), rows: Rows::File(file), train: Vec::new(), validation: Vec::new() })
    }

    /// The rows, if the table has not replaced the earlier one yet.
    pub fn held(&self) -> Option<&str> {
        match &self.rows {
            Rows::Held(rows) => Some(rows),
            Rows::File(_) => None,
        }
    }

    /// Replaces the earlier table; rows are written at once from now on.
    pub fn place(&mut self) -> Result<()> {
        if let Some(rows) = self.held() {
            self.rows = Self::start(&self.path, rows)?.rows;
        }
        Ok(())
    }

    /// Brings the rows to the disk.
    pub fn sync(&self) -> Result<()> {
        let Rows::File(file) = &self.rows else { return Ok(()) };
        match file.sync_data() {
            // Not a regular file, or a file system that does not know how.
            Err(error) if matches!(error.kind(), io::ErrorKind::InvalidInput | io::ErrorKind::Unsupported) => Ok(()),
            result => result.map_err(|error| Failure::io(&self.path, &error)),
        }
    }

    /// Adds the row of a training step.
    pub fn train(&mut self, step: u64, loss: f64, lr: f64, tokens_per_second: f64) -> Result<()> {
        self.write(&format!("{step},train,{loss:.6},{:.6},{lr:.6e},{tokens_per_second:.0}", bits(loss)))
    }

    /// Adds the row of a validation.
    pub fn validation(&mut self, step: u64, loss: f64) -> Result<()> {
        self.write(&format!("{step},validation,{loss:.6},{:.6},,", bits(loss)))
    }

    fn write(&mut self, row: &str) -> Result<()> {
        // Read back from the row, so that a resumed run draws the same curves.
        match parse(row) {
            Some(("train", step, value)) => self.train.push((step, value)),
            Some((_, step, value)) => self.validation.push((step, value)),
            None => {}
        }
        let row = format!("{row}\n");
        match &mut self.rows {
            Rows::Held(rows) => rows.push_str(&row),
            // One call per row: the file is not buffered, so a row is whole as soon as it is there.
            Rows::File(file) => file.write_all(row.as_bytes()).map_err(|error| Failure::io(&self.path, &error))?,
        }
        Ok(())
    }
}

/// Split, step and bits per byte of a row.
fn parse(line: &str) -> Option<(&str, u64, f64)> {
    let fields: Vec<&str> = line.split(',').collect();
    let [step, split, _, bits, _, _] = fields[..] else { return None };
    Some((split, step.parse().ok()?, bits.parse().ok()?))
}

#[cfg(test)]
mod tests {
    use super::{HEADER, Metrics};

    #[test]
    fn resuming_drops_what_will_be_done_again() {
        let folder = tempfile::tempdir().expect("a temporary folder");
        let path = folder.path().join("metrics.csv");
        let mut metrics = Metrics::create(&path).expect("create");
        metrics.validation(0, 5.5).expect("row");
        for step in 0..6 {
            metrics.train(step, 5.0 - step as f64, 1e-3, 100.0).expect("row");
            if step == 3 {
                metrics.validation(4, 2.0).expect("row");
            }
        }
        metrics.write("6,tra").expect("a row that was cut off");
        drop(metrics);

        let mut metrics = Metrics::resume(&path, 4).expect("resume");
        assert_eq!(metrics.train.len(), 4);
        assert_eq!(metrics.validation.len(), 2);
        metrics.train(4, 1.0, 1e-3, 100.0).expect("row");
        let text = std::fs::read_to_string(&path).expect("read");
        let steps: Vec<&str> = text.lines().map(|line| &line[..line.len().min(7)]).collect();
        assert_eq!(steps, [&HEADER[..7], "0,valid", "0,train", "1,train", "2,train", "3,train", "4,valid", "4,train"]);
        assert!(text.ends_with("4,train,1.000000,1.442695,1.000000e-3,100\n"), "{text}");
    }
}
