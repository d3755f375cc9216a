//! Ordered maps from iterators. `collect` sorts first, with several kilobytes of code for each kind of iterator; maps
//! here are small.

use std::collections::BTreeMap;

/// Returns the map of these entries; the last one wins among equal keys.
pub(crate) fn ordered<K: Ord, V>(entries: impl IntoIterator<Item = (K, V)>) -> BTreeMap<K, V> {
    let mut map = BTreeMap::new();
    entries.into_iter().for_each(|(key, value)| {
        map.insert(key, value);
    });
    map
}

/// Like [`ordered`], but returns the first error.
pub(crate) fn try_ordered<K: Ord, V, E>(
    entries: impl IntoIterator<Item = Result<(K, V), E>>,
) -> Result<BTreeMap<K, V>, E> {
    let mut map = BTreeMap::new();
    for entry in entries {
        let (key, value) = entry?;
        map.insert(key, value);
    }
    Ok(map)
}
