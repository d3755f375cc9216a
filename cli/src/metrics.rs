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
/// the loss after `step` updates, and a row of a score, such as `accuracy`, the score. Losses are in nats per token; a
/// column has them in bits per byte of text, if those are known.
pub struct Metrics {
    path: PathBuf,
    unit: Unit,
    rows: Rows,
    /// `(step, loss)` of every train row in the unit of curves, with the digits that the row has.
    pub train: Vec<(u64, f64)>,
    /// `(step, loss)` of every validation row, likewise.
    pub validation: Vec<(u64, f64)>,
}

/// Where rows go.
enum Rows {
    File(File),
    /// The file is still that of the run that will be replaced.
    Held(String),
}

/// Unit that losses are shown in.
#[derive(Clone, Copy)]
pub struct Unit {
    /// Bytes of text per token, if known.
    pub bytes_per_token: Option<f64>,
    pub target: Target,
}

/// The target of a model, which names the unit of its loss.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Target {
    /// Each token of a text.
    Token,
    /// The class of a text.
    Class,
    /// The number of a text.
    Value,
    /// The masked tokens of a text.
    Masked,
    /// A pair of texts, such as a preferred answer and a rejected one.
    Pair,
    /// The order of pairs of texts by their scores.
    Score,
    /// The class of an image.
    Image,
}

impl Unit {
    /// Bits per byte of a loss in nats per token, if the bytes are known.
    pub fn bits(self, nats: f64) -> Option<f64> {
        self.bytes_per_token.map(|bytes| nats / bytes / std::f64::consts::LN_2)
    }

    /// The name of the unit of curves.
    pub fn name(self) -> &'static str {
        match self.target {
            Target::Token if self.bytes_per_token.is_some() => "bits per byte",
            Target::Token => "nats per token",
            Target::Class => "nats per text",
            Target::Image => "nats per image",
            Target::Value => "mean square error",
            Target::Masked => "nats per masked token",
            Target::Pair => "nats per pair",
            Target::Score => "CoSENT loss",
        }
    }

    /// A loss as text.
    pub fn show(self, nats: f64) -> String {
        match self.bits(nats) {
            Some(bits) => format!("{nats:.4}  {bits:.3} bits/byte"),
            None => format!("{nats:.4}"),
        }
    }

    /// A value of a curve as text.
    pub fn short(self, value: f64) -> String {
        let unit = match self.target {
            Target::Token if self.bytes_per_token.is_some() => "bits/byte",
            Target::Token => "nats/token",
            Target::Class => "nats/text",
            Target::Image => "nats/image",
            Target::Value => "mean square error",
            Target::Masked => "nats/masked token",
            Target::Pair => "nats/pair",
            Target::Score => "CoSENT loss",
        };
        format!("{value:.3} {unit}")
    }

    /// The unit of speeds.
    pub fn speed(self) -> &'static str {
        match self.target {
            Target::Token => "tokens/s",
            Target::Masked => "masked tokens/s",
            Target::Pair | Target::Score => "pairs/s",
            Target::Image => "images/s",
            Target::Class | Target::Value => "texts/s",
        }
    }

    /// The two columns of a loss.
    fn columns(self, nats: f64) -> String {
        match self.bits(nats) {
            Some(bits) => format!("{nats:.6},{bits:.6}"),
            None => format!("{nats:.6},"),
        }
    }

    /// Split, step and value of the curve of a row.
    fn parse(self, line: &str) -> Option<(&str, u64, f64)> {
        let fields: Vec<&str> = line.split(',').collect();
        let [step, split, loss, bits, _, _] = fields[..] else { return None };
        let value = if self.bytes_per_token.is_some() { bits } else { loss };
        Some((split, step.parse().ok()?, value.parse().ok()?))
    }
}

impl Metrics {
    /// An empty table, replacing an earlier one at once.
    pub fn create(path: &Path, unit: Unit) -> Result<Self> {
        Self::start(path, unit, &format!("{HEADER}\n"))
    }

    /// An empty table that replaces an earlier one when [`Metrics::place`] is called.
    pub fn hold(path: &Path, unit: Unit) -> Self {
        let rows = Rows::Held(format!("{HEADER}\n"));
        Self { path: path.into(), unit, rows, train: Vec::new(), validation: Vec::new() }
    }

    /// Goes on with the table of an interrupted run, without the rows of steps that will be done again.
    pub fn resume(path: &Path, unit: Unit, done: u64) -> Result<Self> {
        let text = match fs::metadata(path) {
            // Looked at before it is read: a pipe would wait for a writer.
            Ok(found) if found.is_file() => fs::read_to_string(path),
            Ok(_) => Ok(String::new()),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(String::new()),
            Err(error) => Err(error),
        };
        let text = text.map_err(|error| Failure::io(path, &error))?;
        let (mut train, mut validation, mut scores) = (Vec::new(), Vec::new(), Vec::new());
        let mut kept = format!("{HEADER}\n");
        for line in text.lines() {
            // A row that was cut off is not a row.
            let Some((split, step, value)) = unit.parse(line) else { continue };
            let curve = match split {
                "train" if step < done => &mut train,
                "validation" if step <= done => &mut validation,
                "train" | "validation" => continue,
                // A score, which is in no curve.
                _ if step <= done => &mut scores,
                _ => continue,
            };
            curve.push((step, value));
            kept.push_str(line);
            kept.push('\n');
        }
        Ok(Self { train, validation, ..Self::start(path, unit, &kept)? })
    }

    fn start(path: &Path, unit: Unit, text: &str) -> Result<Self> {
        write_atomically(path, |file| file.write_all(text.as_bytes()))?;
        let file = OpenOptions::new().append(true).open(path).map_err(|error| Failure::io(path, &error))?;
        Ok(Self { path: path.into(), unit, rows: Rows::File(file), train: Vec::new(), validation: Vec::new() })
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
            self.rows = Self::start(&self.path, self.unit, rows)?.rows;
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
        let loss = self.unit.columns(loss);
        self.write(&format!("{step},train,{loss},{lr:.6e},{tokens_per_second:.0}"))
    }

    /// Adds the row of a validation.
    pub fn validation(&mut self, step: u64, loss: f64) -> Result<()> {
        let loss = self.unit.columns(loss);
        self.write(&format!("{step},validation,{loss},,"))
    }

    /// Adds the row of a score of a validation, such as the accuracy, in the column of losses.
    pub fn score(&mut self, step: u64, name: &str, value: f64) -> Result<()> {
        self.write(&format!("{step},{name},{value:.6},,,"))
    }

    fn write(&mut self, row: &str) -> Result<()> {
        // Read back from the row, so that a resumed run draws the same curves.
        match self.unit.parse(row) {
            Some(("train", step, value)) => self.train.push((step, value)),
            Some(("validation", step, value)) => self.validation.push((step, value)),
            _ => {}
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

#[cfg(test)]
mod tests {
    use super::{HEADER, Metrics, Target, Unit};

    const BYTES: Unit = Unit { bytes_per_token: Some(1.0), target: Target::Token };

    #[test]
    fn resuming_drops_what_will_be_done_again() {
        let folder = tempfile::tempdir().expect("a temporary folder");
        let path = folder.path().join("metrics.csv");
        let mut metrics = Metrics::create(&path, BYTES).expect("create");
        metrics.validation(0, 5.5).expect("row");
        for step in 0..6 {
            metrics.train(step, 5.0 - step as f64, 1e-3, 100.0).expect("row");
            if step == 3 {
                metrics.validation(4, 2.0).expect("row");
            }
        }
        metrics.write("6,tra").expect("a row that was cut off");
        drop(metrics);

        let mut metrics = Metrics::resume(&path, BYTES, 4).expect("resume");
        assert_eq!(metrics.train.len(), 4);
        assert_eq!(metrics.validation.len(), 2);
        metrics.train(4, 1.0, 1e-3, 100.0).expect("row");
        let text = std::fs::read_to_string(&path).expect("read");
        let steps: Vec<&str> = text.lines().map(|line| &line[..line.len().min(7)]).collect();
        assert_eq!(steps, [&HEADER[..7], "0,valid", "0,train", "1,train", "2,train", "3,train", "4,valid", "4,train"]);
        assert!(text.ends_with("4,train,1.000000,1.442695,1.000000e-3,100\n"), "{text}");
    }

    #[test]
    fn tokens_without_bytes_have_no_bits() {
        let folder = tempfile::tempdir().expect("a temporary folder");
        let path = folder.path().join("metrics.csv");
        let unit = Unit { bytes_per_token: None, target: Target::Class };
        let mut metrics = Metrics::create(&path, unit).expect("create");
        metrics.validation(0, 5.5).expect("row");
        metrics.score(0, "accuracy", 0.5).expect("row");
        metrics.train(0, 4.25, 1e-3, 100.0).expect("row");
        metrics.score(2, "accuracy", 0.75).expect("a row of a step that will be done again");
        drop(metrics);
        let metrics = Metrics::resume(&path, unit, 1).expect("resume");
        assert_eq!((metrics.train, metrics.validation), (vec![(0, 4.25)], vec![(0, 5.5)]));
        let text = std::fs::read_to_string(&path).expect("read");
        assert!(
            text.ends_with("0,validation,5.500000,,,\n0,accuracy,0.500000,,,\n0,train,4.250000,,1.000000e-3,100\n"),
            "{text}"
        );
        // Four bytes a token.
        let four = Unit { bytes_per_token: Some(4.0), target: Target::Token };
        assert_eq!((four.bits(4.0 * std::f64::consts::LN_2), four.name()), (Some(1.0), "bits per byte"));
    }
}
