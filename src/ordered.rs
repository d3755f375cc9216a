//! Ordered maps as sorted lists. A B-tree is compiled anew for each type of value, fifteen kilobytes at a time; maps here
//! are small, or are built at once and then read.

use std::{borrow::Borrow, collections::BTreeMap, iter, ops::Index, slice, vec};

use crate::{collect::CollectVec, sort::order};

/// Map in ascending order of its keys. Inserting moves the entries after the new one; many at once are collected.
#[derive(Clone, PartialEq, Debug)]
pub(crate) struct OrderedMap<K, V> {
    keys: Vec<K>,
    values: Vec<V>,
}

impl<K, V> Default for OrderedMap<K, V> {
    fn default() -> Self {
        Self { keys: Vec::new(), values: Vec::new() }
    }
}

/// Place of a key, or the place where it belongs.
fn find<K: Ord + Borrow<Q>, Q: Ord + ?Sized>(keys: &[K], key: &Q) -> Result<usize, usize> {
    match keys.last() {
        Some(last) if last.borrow() < key => Err(keys.len()),
        _ => keys.binary_search_by(|at| at.borrow().cmp(key)),
    }
}

impl<K: Ord, V> OrderedMap<K, V> {
    pub fn len(&self) -> usize {
        self.keys.len()
    }

    pub fn is_empty(&self) -> bool {
        self.keys.is_empty()
    }

    pub fn contains_key<Q: Ord + ?Sized>(&self, key: &Q) -> bool
    where
        K: Borrow<Q>,
    {
        find(&self.keys, key).is_ok()
    }

    pub fn get<Q: Ord + ?Sized>(&self, key: &Q) -> Option<&V>
    where
        K: Borrow<Q>,
    {
        find(&self.keys, key).ok().map(|at| &self.values[at])
    }

    pub fn get_mut<Q: Ord + ?Sized>(&mut self, key: &Q) -> Option<&mut V>
    where
        K: Borrow<Q>,
    {
        find(&self.keys, key).ok().map(|at| &mut self.values[at])
    }

    /// Returns the value of a key, which is inserted if it is missing.
    pub fn or_insert(&mut self, key: K, value: V) -> &mut V {
        let at = find(&self.keys, &key).unwrap_or_else(|at| {
            self.keys.insert(at, key);
            self.values.insert(at, value);
            at
        });
        &mut self.values[at]
    }

    /// Inserts or replaces a value.
    pub fn insert(&mut self, key: K, value: V) {
        match find(&self.keys, &key) {
            Ok(at) => self.values[at] = value,
            Err(at) => {
                self.keys.insert(at, key);
                self.values.insert(at, value);
            }
        }
    }

    pub fn remove<Q: Ord + ?Sized>(&mut self, key: &Q) -> Option<V>
    where
        K: Borrow<Q>,
    {
        let at = find(&self.keys, key).ok()?;
        self.keys.remove(at);
        Some(self.values.remove(at))
    }

    /// Returns the value of the last key up to this one.
    pub fn last_up_to(&self, key: &K) -> Option<&V> {
        let end = find(&self.keys, key).map_or_else(|at| at, |at| at + 1);
        self.values[..end].last()
    }

    pub fn keys(&self) -> &[K] {
        &self.keys
    }

    pub fn values(&self) -> &[V] {
        &self.values
    }

    pub fn values_mut(&mut self) -> &mut [V] {
        &mut self.values
    }

    pub fn iter(&self) -> iter::Zip<slice::Iter<'_, K>, slice::Iter<'_, V>> {
        self.keys.iter().zip(&self.values)
    }

    pub fn iter_mut(&mut self) -> iter::Zip<slice::Iter<'_, K>, slice::IterMut<'_, V>> {
        self.keys.iter().zip(&mut self.values)
    }

    /// Returns the map of these entries, or the first key that occurs twice.
    pub fn unique(entries: Vec<(K, V)>) -> Result<Self, K> {
        let (mut keys, mut values) = (Vec::with_capacity(entries.len()), Vec::with_capacity(entries.len()));
        for (key, value) in entries {
            keys.push(key);
            values.push(value);
        }
        let order = order(keys.len(), |a, b| keys[a].cmp(&keys[b]));
        match order.windows(2).find(|two| keys[two[0]] == keys[two[1]]) {
            Some(two) => Err(keys.swap_remove(two[0])),
            None => Ok(Self { keys: select(keys, &order), values: select(values, &order) }),
        }
    }
}

/// Moves elements by their places, each at most once.
fn select<T>(items: Vec<T>, places: &[usize]) -> Vec<T> {
    if places.is_sorted() && places.len() == items.len() {
        return items;
    }
    let mut items = items.into_iter().map(Some).collect_vec();
    places.iter().filter_map(|&place| items[place].take()).collect_vec()
}

/// The last of several entries with one key counts.
impl<K: Ord, V> FromIterator<(K, V)> for OrderedMap<K, V> {
    fn from_iter<I: IntoIterator<Item = (K, V)>>(entries: I) -> Self {
        let (mut keys, mut values) = (Vec::new(), Vec::new());
        entries.into_iter().for_each(|(key, value)| {
            keys.push(key);
            values.push(value);
        });
        Self::of(keys, values)
    }
}

impl<K: Ord, V> OrderedMap<K, V> {
    /// Once for each type of map, and not for each iterator.
    #[inline(never)]
    fn of(keys: Vec<K>, values: Vec<V>) -> Self {
        let mut order = order(keys.len(), |a, b| keys[a].cmp(&keys[b]));
        order.reverse();
        order.dedup_by(|a, b| keys[*a] == keys[*b]);
        order.reverse();
        Self { keys: select(keys, &order), values: select(values, &order) }
    }
}

impl<K, V> IntoIterator for OrderedMap<K, V> {
    type Item = (K, V);
    type IntoIter = iter::Zip<vec::IntoIter<K>, vec::IntoIter<V>>;

    fn into_iter(self) -> Self::IntoIter {
        self.keys.into_iter().zip(self.values)
    }
}

impl<K: Ord + Borrow<Q>, V, Q: Ord + ?Sized> Index<&Q> for OrderedMap<K, V> {
    type Output = V;

    fn index(&self, key: &Q) -> &V {
        self.get(key).expect("a key of this map")
    }
}

/// Returns the B-tree of these entries, which users get; the last one wins among equal keys. `collect` sorts first, with
/// several kilobytes of code for each kind of iterator.
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

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use super::OrderedMap;
    use crate::philox::Philox;

    #[test]
    fn ordered_map_is_as_a_b_tree() {
        for seed in 0..20 {
            let drawn = Philox::new(seed, 3);
            let entries: Vec<_> = (0..30).map(|at| (drawn.word(at) % 20, at)).collect();
            let mut tree: BTreeMap<_, _> = entries.iter().copied().collect();
            let mut map: OrderedMap<_, _> = entries.iter().copied().collect();
            assert!(map.iter().eq(&tree));
            let unique = OrderedMap::unique(tree.iter().rev().map(|(&key, &value)| (key, value)).collect());
            assert_eq!(unique.as_ref(), Ok(&map));
            assert!(entries.iter().any(|entry| OrderedMap::unique(entries.clone()) == Err(entry.0)));
            for at in 30..90 {
                let key = drawn.word(at) % 20;
                match at % 3 {
                    0 => assert_eq!(map.remove(&key), tree.remove(&key)),
                    1 => {
                        map.insert(key, at);
                        tree.insert(key, at);
                    }
                    _ => assert_eq!(map.or_insert(key, at), tree.entry(key).or_insert(at)),
                }
                assert_eq!(map.get(&key), tree.get(&key));
                assert_eq!(map.last_up_to(&key), tree.range(..=key).next_back().map(|(_, value)| value));
                assert!(map.iter().eq(&tree));
            }
            assert!(map.into_iter().eq(tree));
        }
    }
}
