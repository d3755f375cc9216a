//! Reader for the directory of a zip archive with uncompressed files, as PyTorch writes them.

use std::ops::Range;

use super::{
    bytes::{Cursor, Parsed, Reading},
    source::Source,
};
use crate::ordered::OrderedMap;

/// Signature of a local file header.
const LOCAL: u32 = 0x0403_4B50;
/// Signature of an entry of the central directory.
const ENTRY: u32 = 0x0201_4B50;
/// Signature of the end of central directory record.
const END: u32 = 0x0605_4B50;
/// Signatures of the ZIP64 end of central directory record, and of its locator.
const END64: u32 = 0x0606_4B50;
const END64_PLACE: u32 = 0x0706_4B50;

/// Size of the end of central directory record, before its comment of up to 64 KiB.
const END_BYTES: usize = 22;
/// Sizes of the ZIP64 end of central directory record, and of its locator.
const END64_BYTES: usize = 56;
const END64_PLACE_BYTES: usize = 20;
/// Size of a local file header, before the name.
const LOCAL_BYTES: usize = 30;

/// Tag of the ZIP64 extra field.
const EXTRA64: u16 = 1;

/// Returns `true` if a file begins like a zip archive.
pub(super) fn is_zip(bytes: &[u8]) -> bool {
    bytes.starts_with(&LOCAL.to_le_bytes())
}

/// Returns the location of each file's content.
pub(super) fn directory(source: &Source) -> Reading<OrderedMap<String, Range<usize>>> {
    let (count, place) = find(source)?;
    let start = place.start;
    let directory = source.part(place, "a directory")?;
    let mut cursor = Cursor::new(&directory, 0);
    let mut files = Vec::new();
    for _ in 0..count {
        let at = start + cursor.at();
        if cursor.u32()? != ENTRY {
            return Err(format!("has no directory entry at byte {at}").into());
        }
        let _versions = cursor.u32()?;
        let flags = cursor.u16()?;
        let method = cursor.u16()?;
        let _time_and_sum: [u8; 8] = cursor.array()?;
        let (mut packed, mut size) = (u64::from(cursor.u32()?), u64::from(cursor.u32()?));
        let [name, extra, comment] = [cursor.u16()?, cursor.u16()?, cursor.u16()?].map(usize::from);
        let _disk_and_attributes: [u8; 8] = cursor.array()?;
        let mut offset = u64::from(cursor.u32()?);
        let name = str::from_utf8(cursor.take(name)?)
            .map_err(|_| format!("has a file name at byte {at} that is not UTF-8"))?;
        wide(cursor.take(extra)?, [&mut size, &mut packed, &mut offset])?;
        cursor.take(comment)?;
        if method != 0 || packed != size {
            return Err(format!(
                "stores `{name}` compressed (method {method}), expected uncompressed as PyTorch writes it"
            )
            .into());
        }
        if flags & 1 != 0 {
            return Err(format!("contains `{name}` encrypted, which is not supported").into());
        }
        files.push((name.to_string(), content(source, name, offset, size)?));
    }
    Ok(OrderedMap::unique(files).map_err(|name| format!("contains `{name}` twice"))?)
}

/// Returns the number of entries in the central directory and its location.
fn find(source: &Source) -> Reading<(u64, Range<usize>)> {
    let none = || "is truncated or not a zip archive: it has no directory at its end".to_string();
    let start = source.len().saturating_sub(END_BYTES + usize::from(u16::MAX) + END64_PLACE_BYTES);
    let end = source.part(start..source.len(), "an end")?;
    let latest = end.len().checked_sub(END_BYTES).ok_or_else(none)?;
    let earliest = latest.saturating_sub(usize::from(u16::MAX));
    let at = (earliest..=latest).rev().find(|&at| end[at..].starts_with(&END.to_le_bytes())).ok_or_else(none)?;
    let mut cursor = Cursor::new(&end, at + 4);
    let _disks: [u8; 6] = cursor.array()?;
    let (count, _size, offset) = (cursor.u16()?, cursor.u32()?, cursor.u32()?);
    let (mut count, mut offset) = (u64::from(count), u64::from(offset));
    // The ZIP64 locator, if there is one, precedes the record.
    let place = at.checked_sub(END64_PLACE_BYTES);
    if let Some(place) = place.filter(|&place| end[place..].starts_with(&END64_PLACE.to_le_bytes())) {
        let record = Cursor::new(&end, place + 8).u64()?;
        let inside = |&record: &usize| record.checked_add(END64_BYTES).is_some_and(|end| end <= source.len());
        let record = usize::try_from(record).ok().filter(inside).ok_or_else(none)?;
        let bytes: [u8; END64_BYTES] = source.array(record)?;
        let mut cursor = Cursor::new(&bytes, 0);
        if cursor.u32()? != END64 {
            return Err(format!("has no zip64 record at byte {record}").into());
        }
        let _sizes_and_disks: [u8; 28] = cursor.array()?;
        (count, _, offset) = (cursor.u64()?, cursor.u64()?, cursor.u64()?);
    }
    let end = start + at;
    match usize::try_from(offset).ok().filter(|&start| start <= end) {
        Some(start) => Ok((count, start..end)),
        None => Err(format!("has its directory at byte {offset}, past its end").into()),
    }
}

/// Reads the 64-bit sizes that replace 32-bit sizes at their maximum.
fn wide(extra: &[u8], sizes: [&mut u64; 3]) -> Parsed<()> {
    let mut cursor = Cursor::new(extra, 0);
    let mut sizes = sizes.into_iter().filter(|size| **size == u64::from(u32::MAX)).peekable();
    while sizes.peek().is_some() && cursor.left() > 0 {
        let (tag, length) = (cursor.u16()?, cursor.u16()?);
        let field = cursor.take(length.into())?;
        if tag == EXTRA64 {
            let mut field = Cursor::new(field, 0);
            sizes.by_ref().take(field.left() / 8).try_for_each(|size| field.u64().map(|wide| *size = wide))?;
        }
    }
    Ok(())
}

/// Returns the location of a file's content, after its local header.
fn content(source: &Source, name: &str, offset: u64, size: u64) -> Reading<Range<usize>> {
    let total = source.len();
    let outside = || format!("is truncated: `{name}` has {size} bytes at byte {offset}, but the file has only {total}");
    let offset = usize::try_from(offset).ok();
    let header_end = offset.and_then(|offset| offset.checked_add(LOCAL_BYTES)).filter(|&end| end <= total);
    let header_end = header_end.ok_or_else(outside)?;
    let header: [u8; LOCAL_BYTES] = source.array(header_end - LOCAL_BYTES)?;
    let mut cursor = Cursor::new(&header, 0);
    if cursor.u32()? != LOCAL {
        return Err(format!("has no header of `{name}` at byte {}", header_end - LOCAL_BYTES).into());
    }
    let _fields: [u8; 22] = cursor.array()?;
    let (name_length, extra) = (cursor.u16()?, cursor.u16()?);
    let start = header_end + usize::from(name_length) + usize::from(extra);
    let end = usize::try_from(size).ok().and_then(|size| start.checked_add(size)).filter(|&end| end <= total);
    Ok(start..end.ok_or_else(outside)?)
}
