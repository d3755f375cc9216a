//! Python values as a pickle describes them.

use super::globals::{Element, Global, Values};

/// A value on the stack. What holds others is a number into [`Pickle`]: values may contain themselves.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) enum Value<'a> {
    None,
    Bool(bool),
    Int(i64),
    /// An integer of more than eight bytes.
    Long(&'a [u8]),
    Float,
    Text(&'a str),
    Bytes,
    Tuple(u32),
    List(u32),
    Dict(u32),
    Global(Global),
    Storage(u32),
    Tensor(u32),
    /// An object that a class or function would make, which is the global of this number; of its content nothing is
    /// kept.
    Object(u32),
}

/// A block of values that tensors are views of.
#[derive(Clone, Copy, Debug)]
pub(super) struct Storage<'a> {
    pub values: Values,
    /// The name of its file in an archive.
    pub key: &'a str,
    /// Number of values.
    pub elements: usize,
    /// Where in the storage of this key it begins, in values.
    pub first: usize,
}

/// A tensor as a view of a storage, in values.
#[derive(Clone, Debug)]
pub(super) struct View {
    pub storage: u32,
    pub element: Element,
    pub offset: usize,
    pub shape: Vec<usize>,
    pub strides: Vec<usize>,
}

/// Values that a pickle built.
#[derive(Default)]
pub(super) struct Pickle<'a> {
    pub tuples: Vec<Vec<Value<'a>>>,
    pub lists: Vec<Vec<Value<'a>>>,
    pub dicts: Vec<Vec<(Value<'a>, Value<'a>)>>,
    pub storages: Vec<Storage<'a>>,
    pub tensors: Vec<View>,
    /// Module and name of globals that are not known.
    pub others: Vec<(&'a str, &'a str)>,
}

impl<'a> Pickle<'a> {
    /// Returns the values of a tuple or list.
    pub fn items(&self, value: Value<'a>) -> Option<&[Value<'a>]> {
        match value {
            Value::Tuple(index) => self.tuples.get(index as usize).map(Vec::as_slice),
            Value::List(index) => self.lists.get(index as usize).map(Vec::as_slice),
            _ => None,
        }
    }

    /// Returns the entries of a dictionary in order; the last of several with the same key counts.
    pub fn entries(&self, value: Value<'a>) -> Option<&[(Value<'a>, Value<'a>)]> {
        match value {
            Value::Dict(index) => self.dicts.get(index as usize).map(Vec::as_slice),
            _ => None,
        }
    }

    /// Returns module and name of the global with this index.
    pub fn maker(&self, index: u32) -> (&'a str, &'a str) {
        self.others.get(index as usize).copied().unwrap_or_default()
    }

    pub fn tensor(&self, index: u32) -> Option<&View> {
        self.tensors.get(index as usize)
    }

    pub fn tuple(&mut self, values: Vec<Value<'a>>) -> Value<'a> {
        self.tuples.push(values);
        Value::Tuple(self.tuples.len() as u32 - 1)
    }

    pub fn object(&mut self, module: &'a str, name: &'a str) -> Value<'a> {
        self.others.push((module, name));
        Value::Object(self.others.len() as u32 - 1)
    }

    pub fn dict(&mut self, entries: Vec<(Value<'a>, Value<'a>)>) -> Value<'a> {
        self.dicts.push(entries);
        Value::Dict(self.dicts.len() as u32 - 1)
    }
}
