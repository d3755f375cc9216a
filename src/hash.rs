//! A hash of names and contents.

/// The 64-bit FNV-1a hash.
pub(crate) fn fnv1a(bytes: &[u8]) -> u64 {
    fnv1a_from(FNV1A_START, bytes)
}

/// The hash of no bytes.
pub(crate) const FNV1A_START: u64 = 0xcbf2_9ce4_8422_2325;

/// The hash of bytes after others, whose hash is given.
pub(crate) fn fnv1a_from(hash: u64, bytes: &[u8]) -> u64 {
    bytes.iter().fold(hash, |hash, &byte| (hash ^ byte as u64).wrapping_mul(0x0100_0000_01b3))
}
