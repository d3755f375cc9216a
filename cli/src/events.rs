//! Event files that TensorBoard reads: records of protocol buffers with checksums.

use std::{
    fs::{self, File, OpenOptions},
    io::Write,
    path::{Path, PathBuf},
    time::{SystemTime, UNIX_EPOCH},
};

use crate::failure::{Failure, Result};

/// Beginning of the names of event files.
const NAME: &str = "events.out.tfevents.";

/// Event file of a process: later files of a folder go on with the curves of the earlier ones.
pub struct Events {
    path: PathBuf,
    file: File,
}

impl Events {
    /// Creates a file in a folder, for a run that has done this number of steps; events of later ones in earlier files no
    /// longer count.
    pub fn create(folder: &Path, done: u64) -> Result<Self> {
        let seconds = now() as u64;
        // TensorBoard reads files in the order of their names.
        let path = folder.join(format!("{NAME}{seconds:010}.{}.xt", std::process::id()));
        let file = OpenOptions::new().create(true).append(true).open(&path);
        let file = file.map_err(|error| Failure::io(&path, &error))?;
        let mut events = Self { path, file };
        events.write(0, &field(3, b"brain.Event:2"))?;
        if done > 0 {
            // SessionLog with the status START.
            events.write(done + 1, &field(7, &[8, 1]))?;
        }
        Ok(events)
    }

    /// Adds a value of a curve after a number of steps.
    pub fn scalar(&mut self, step: u64, tag: &str, value: f64) -> Result<()> {
        let mut scalar = field(1, tag.as_bytes());
        scalar.push(2 << 3 | 5);
        scalar.extend((value as f32).to_le_bytes());
        self.write(step, &field(5, &field(1, &scalar)))
    }

    fn write(&mut self, step: u64, what: &[u8]) -> Result<()> {
        let mut event = vec![1 << 3 | 1];
        event.extend(now().to_le_bytes());
        event.push(2 << 3);
        varint(&mut event, step);
        event.extend(what);
        let length = (event.len() as u64).to_le_bytes();
        let record = [&length[..], &masked(&length).to_le_bytes(), &event, &masked(&event).to_le_bytes()].concat();
        // In one call: whoever reads meanwhile gets whole records.
        self.file.write_all(&record).map_err(|error| Failure::io(&self.path, &error))
    }
}

/// Removes the event files of an earlier run.
pub fn remove_others(folder: &Path, own: Option<&Events>) {
    let Ok(entries) = fs::read_dir(folder) else { return };
    for entry in entries.flatten() {
        let is_own = own.is_some_and(|own| own.path == entry.path());
        if !is_own && entry.file_name().to_str().is_some_and(|name| name.starts_with(NAME)) {
            // Curves of an earlier run beside those of this one do no harm.
            let _ = fs::remove_file(entry.path());
        }
    }
}

fn now() -> f64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0.0, |time| time.as_secs_f64())
}

/// A field of bytes of a message.
fn field(number: u8, bytes: &[u8]) -> Vec<u8> {
    let mut field = vec![number << 3 | 2];
    varint(&mut field, bytes.len() as u64);
    field.extend(bytes);
    field
}

fn varint(bytes: &mut Vec<u8>, mut value: u64) {
    while value >= 0x80 {
        bytes.push(value as u8 | 0x80);
        value >>= 7;
    }
    bytes.push(value as u8);
}

/// The masked CRC-32C of TensorFlow's records: rotated, plus a constant.
fn masked(bytes: &[u8]) -> u32 {
    crc(bytes).rotate_right(15).wrapping_add(0xa282_ead8)
}

fn crc(bytes: &[u8]) -> u32 {
    !bytes.iter().fold(!0, |crc, &byte| {
        (0..8).fold(crc ^ u32::from(byte), |crc, _| if crc & 1 == 1 { crc >> 1 ^ 0x82f6_3b78 } else { crc >> 1 })
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Values of RFC 3720.
    #[test]
    fn checksums() {
        assert_eq!((crc(&[0; 32]), crc(&[0xff; 32])), (0x8a91_36aa, 0x62a8_ab43));
        assert_eq!(crc(b"123456789"), 0xe306_9283);
    }

    /// Records as the package `tensorboard` writes them, but for the time; see `scripts/check-events`.
    #[test]
    fn records() {
        let folder = tempfile::tempdir().expect("a temporary folder");
        let mut events = Events::create(folder.path(), 300).expect("a file");
        events.scalar(300, "loss/train", 2.5).expect("written");
        let path = fs::read_dir(folder.path()).expect("a folder").next().expect("a file").expect("an entry").path();
        let bytes = fs::read(&path).expect("read");
        let (mut rest, mut found) = (&bytes[..], Vec::new());
        while !rest.is_empty() {
            let length = u64::from_le_bytes(rest[..8].try_into().expect("eight")) as usize;
            assert_eq!(rest[8..12], masked(&rest[..8]).to_le_bytes());
            let data = &rest[12..12 + length];
            assert_eq!(rest[12 + length..][..4], masked(data).to_le_bytes());
            // Without the time.
            found.push(data[9..].to_vec());
            rest = &rest[16 + length..];
        }
        let start = b"\x10\x00\x1a\x0dbrain.Event:2".to_vec();
        let session = b"\x10\xad\x02\x3a\x02\x08\x01".to_vec();
        let scalar = b"\x10\xac\x02\x2a\x13\x0a\x11\x0a\x0aloss/train\x15\x00\x00\x20\x40".to_vec();
        assert_eq!(found, [start, session, scalar]);
        remove_others(folder.path(), Some(&events));
        assert!(path.exists());
        remove_others(folder.path(), None);
        assert!(!path.exists());
    }
}
