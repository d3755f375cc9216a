//! Ordered maps from iterators. `collect` sorts first, by code of its own for each kind of iterator, several kilobytes
//! each time; maps here are small.

use std::collections::BTreeMap;

/// The map of these entries; of equal keys the last one counts.
pub(crate) fn ordered<K: Ord, V>(entries: impl IntoIterator<Item = (K, V)>) -> BTreeMap<K, V> {
    let mut map = BTreeMap::new();
    entries.into_iter().for_each(|(key, value)| {
        map.insert(key, value);
    });
    map
}

/// As [`ordered`], or the first error.
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
