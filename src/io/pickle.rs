//! Python's pickles, as far as state dicts need them. Nothing is executed.
//!
//! A pickle is a program for a stack machine whose instructions can call any Python function. This machine knows the
//! instructions that `torch.save` writes, and of functions only those that make tensors, parameters and ordered
//! dictionaries, which it describes instead of calling them. Everything else is an error with its name.

use std::collections::HashMap;

use super::{
    bytes::{Cursor, Parsed},
    stored::Stored,
};

/// Steps of one pickle. The state dict of a model with ten thousand tensors has about half a million.
const MAX_STEPS: usize = 2_000_000;

/// Dimensions of a tensor.
const MAX_RANK: usize = 6;

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
    /// An object of which nothing is needed.
    Opaque,
}

/// The functions and classes that a state dict refers to.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) enum Global {
    OrderedDict,
    RebuildTensor,
    RebuildParameter,
    Size,
    Storage(Stored),
}

impl Global {
    fn named(module: &str, name: &str) -> Option<Self> {
        Some(match (module, name) {
            ("collections", "OrderedDict") => Self::OrderedDict,
            ("torch._utils", "_rebuild_tensor_v2") => Self::RebuildTensor,
            ("torch._utils", "_rebuild_parameter") => Self::RebuildParameter,
            ("torch", "Size") => Self::Size,
            ("torch" | "torch.storage", "DoubleStorage") => Self::Storage(Stored::F64),
            ("torch" | "torch.storage", "FloatStorage") => Self::Storage(Stored::F32),
            ("torch" | "torch.storage", "HalfStorage") => Self::Storage(Stored::F16),
            ("torch" | "torch.storage", "BFloat16Storage") => Self::Storage(Stored::BF16),
            ("torch" | "torch.storage", "LongStorage") => Self::Storage(Stored::I64),
            ("torch" | "torch.storage", "IntStorage") => Self::Storage(Stored::I32),
            ("torch" | "torch.storage", "ShortStorage") => Self::Storage(Stored::I16),
            ("torch" | "torch.storage", "CharStorage") => Self::Storage(Stored::I8),
            ("torch" | "torch.storage", "ByteStorage") => Self::Storage(Stored::U8),
            ("torch" | "torch.storage", "BoolStorage") => Self::Storage(Stored::Bool),
            _ => return None,
        })
    }
}

/// A block of values that tensors are views of.
#[derive(Clone, Copy, Debug)]
pub(super) struct Storage<'a> {
    pub stored: Stored,
    /// The name of its file in an archive.
    pub key: &'a str,
    /// How many values it has.
    pub elements: usize,
    /// Where in the storage of this key it begins, in values.
    pub first: usize,
}

/// A tensor as a view of a storage, in values.
#[derive(Clone, Debug)]
pub(super) struct View {
    pub storage: u32,
    pub offset: usize,
    pub shape: Vec<usize>,
    pub strides: Vec<usize>,
}

/// What a pickle built.
#[derive(Default)]
pub(super) struct Pickle<'a> {
    tuples: Vec<Vec<Value<'a>>>,
    lists: Vec<Vec<Value<'a>>>,
    dicts: Vec<Vec<(Value<'a>, Value<'a>)>>,
    storages: Vec<Storage<'a>>,
    tensors: Vec<View>,
}

impl<'a> Pickle<'a> {
    /// Runs the pickle at the cursor, which ends behind it. Gives what it built and the value at the top.
    pub fn load(cursor: &mut Cursor<'a>) -> Parsed<(Self, Value<'a>)> {
        let (pickle, steps) = (Self::default(), MAX_STEPS);
        Machine { cursor, pickle, stack: Vec::new(), marks: Vec::new(), memo: HashMap::new(), steps }.run()
    }

    /// The values of a tuple or list.
    pub fn items(&self, value: Value<'a>) -> Option<&[Value<'a>]> {
        match value {
            Value::Tuple(index) => self.tuples.get(index as usize).map(Vec::as_slice),
            Value::List(index) => self.lists.get(index as usize).map(Vec::as_slice),
            _ => None,
        }
    }

    /// The entries of a dictionary in their order; of several with one key the last counts.
    pub fn entries(&self, value: Value<'a>) -> Option<&[(Value<'a>, Value<'a>)]> {
        match value {
            Value::Dict(index) => self.dicts.get(index as usize).map(Vec::as_slice),
            _ => None,
        }
    }

    pub fn storages(&self) -> &[Storage<'a>] {
        &self.storages
    }

    pub fn tensor(&self, index: u32) -> Option<&View> {
        self.tensors.get(index as usize)
    }

    fn tuple(&mut self, values: Vec<Value<'a>>) -> Value<'a> {
        self.tuples.push(values);
        Value::Tuple(self.tuples.len() as u32 - 1)
    }

    fn dict(&mut self, entries: Vec<(Value<'a>, Value<'a>)>) -> Value<'a> {
        self.dicts.push(entries);
        Value::Dict(self.dicts.len() as u32 - 1)
    }
}

struct Machine<'a, 'c> {
    cursor: &'c mut Cursor<'a>,
    pickle: Pickle<'a>,
    stack: Vec<Value<'a>>,
    marks: Vec<usize>,
    memo: HashMap<u32, Value<'a>>,
    /// Steps that are left.
    steps: usize,
}

impl<'a> Machine<'a, '_> {
    fn run(mut self) -> Parsed<(Pickle<'a>, Value<'a>)> {
        loop {
            self.spend(1)?;
            let at = self.cursor.at();
            let code = self.cursor.u8()?;
            if code == b'.' {
                let top = self.pop(at)?;
                return Ok((self.pickle, top));
            }
            self.step(code, at)?;
        }
    }

    /// Counts steps, so that a small file cannot keep the machine busy.
    fn spend(&mut self, steps: usize) -> Parsed<()> {
        let left = self.steps.checked_sub(steps);
        self.steps =
            left.ok_or_else(|| format!("holds a pickle of more than {MAX_STEPS} steps, too many for a state dict"))?;
        Ok(())
    }

    fn step(&mut self, code: u8, at: usize) -> Parsed<()> {
        match code {
            // PROTO
            0x80 => match self.cursor.u8()? {
                0..=5 => {}
                protocol => return Err(format!("holds a pickle of protocol {protocol}, known are those up to 5")),
            },
            // FRAME: the instructions go on inside it.
            0x95 => drop(self.cursor.u64()?),
            b'(' => self.marks.push(self.stack.len()),
            b'0' => drop(self.pop(at)?),
            b'N' => self.stack.push(Value::None),
            // NEWTRUE, NEWFALSE
            0x88 => self.stack.push(Value::Bool(true)),
            0x89 => self.stack.push(Value::Bool(false)),
            b'K' => self.int(|cursor| cursor.u8().map(i64::from))?,
            b'M' => self.int(|cursor| cursor.u16().map(i64::from))?,
            b'J' => self.int(|cursor| cursor.array().map(i32::from_le_bytes).map(i64::from))?,
            b'G' => {
                let _float: [u8; 8] = self.cursor.array()?;
                self.stack.push(Value::Float);
            }
            // LONG1
            0x8A => {
                let length = self.cursor.u8()?;
                let bytes = self.cursor.take(length.into())?;
                self.stack.push(long(bytes));
            }
            // SHORT_BINUNICODE, BINUNICODE, BINUNICODE8, and the text of Python 2: SHORT_BINSTRING, BINSTRING
            0x8C | b'U' => self.text(at, |cursor| cursor.u8().map(u64::from))?,
            b'X' | b'T' => self.text(at, |cursor| cursor.u32().map(u64::from))?,
            0x8D => self.text(at, Cursor::u64)?,
            // SHORT_BINBYTES, BINBYTES
            b'C' => self.bytes(|cursor| cursor.u8().map(u64::from))?,
            b'B' => self.bytes(|cursor| cursor.u32().map(u64::from))?,
            b')' => self.push_tuple(Vec::new()),
            0x85..=0x87 => {
                let count = usize::from(code - 0x84);
                let values = self.pop_many(count, at)?;
                self.push_tuple(values);
            }
            b't' => {
                let values = self.pop_marked(at)?;
                self.push_tuple(values);
            }
            b']' => self.push_list(Vec::new()),
            b'l' => {
                let values = self.pop_marked(at)?;
                self.push_list(values);
            }
            b'a' => {
                let value = self.pop(at)?;
                self.list(at)?.push(value);
            }
            b'e' => {
                let values = self.pop_marked(at)?;
                self.list(at)?.extend(values);
            }
            b'}' => {
                let dict = self.pickle.dict(Vec::new());
                self.stack.push(dict);
            }
            b'd' => {
                let entries = pairs(self.pop_marked(at)?, at)?;
                let dict = self.pickle.dict(entries);
                self.stack.push(dict);
            }
            b's' => {
                let entries = pairs(self.pop_many(2, at)?, at)?;
                self.dict(at)?.extend(entries);
            }
            b'u' => {
                let entries = pairs(self.pop_marked(at)?, at)?;
                self.dict(at)?.extend(entries);
            }
            // BINPUT, LONG_BINPUT, MEMOIZE
            b'q' => self.remember(at, |cursor, _| cursor.u8().map(u32::from))?,
            b'r' => self.remember(at, |cursor, _| cursor.u32())?,
            0x94 => self.remember(at, |_, known| Ok(known as u32))?,
            b'h' => self.recall(at, |cursor| cursor.u8().map(u32::from))?,
            b'j' => self.recall(at, Cursor::u32)?,
            b'c' => {
                let (module, name) = (self.line(at)?, self.line(at)?);
                self.global(module, name)?;
            }
            // STACK_GLOBAL
            0x93 => {
                let names = self.pop_many(2, at)?;
                let &[Value::Text(module), Value::Text(name)] = &names[..] else { return Err(bad(at, "a name")) };
                self.global(module, name)?;
            }
            b'Q' => self.persistent(at)?,
            b'R' => self.call(at)?,
            // BUILD: the attributes of an ordered dictionary, its `_metadata`, are of no use here.
            b'b' => {
                self.pop(at)?;
                match self.stack.last() {
                    Some(Value::Dict(_) | Value::Tensor(_)) => {}
                    _ => return Err(bad(at, "a dictionary whose attributes are set")),
                }
            }
            other => {
                return Err(format!(
                    "holds a pickle with the instruction {other:#04x} at byte {at}, which no state dict needs; nothing was executed"
                ));
            }
        }
        Ok(())
    }

    fn pop(&mut self, at: usize) -> Parsed<Value<'a>> {
        // Values below the last mark belong to whoever set it.
        let floor = self.marks.last().copied().unwrap_or(0);
        if self.stack.len() <= floor {
            return Err(bad(at, "a value on the stack"));
        }
        self.stack.pop().ok_or_else(|| bad(at, "a value on the stack"))
    }

    fn pop_many(&mut self, count: usize, at: usize) -> Parsed<Vec<Value<'a>>> {
        let floor = self.marks.last().copied().unwrap_or(0);
        let start = self.stack.len().checked_sub(count).filter(|&start| start >= floor);
        start.map(|start| self.stack.split_off(start)).ok_or_else(|| bad(at, "values on the stack"))
    }

    fn pop_marked(&mut self, at: usize) -> Parsed<Vec<Value<'a>>> {
        let mark = self.marks.pop().filter(|&mark| mark <= self.stack.len());
        mark.map(|mark| self.stack.split_off(mark)).ok_or_else(|| bad(at, "a mark on the stack"))
    }

    fn int(&mut self, read: impl FnOnce(&mut Cursor<'a>) -> Parsed<i64>) -> Parsed<()> {
        let value = read(self.cursor)?;
        self.stack.push(Value::Int(value));
        Ok(())
    }

    /// The bytes whose number comes first.
    fn counted(&mut self, length: impl FnOnce(&mut Cursor<'a>) -> Parsed<u64>) -> Parsed<&'a [u8]> {
        let length = length(self.cursor)?;
        self.cursor.take(usize::try_from(length).unwrap_or(usize::MAX))
    }

    fn text(&mut self, at: usize, length: impl FnOnce(&mut Cursor<'a>) -> Parsed<u64>) -> Parsed<()> {
        let bytes = self.counted(length)?;
        let text = str::from_utf8(bytes).map_err(|_| bad(at, "text in UTF-8"))?;
        self.stack.push(Value::Text(text));
        Ok(())
    }

    fn bytes(&mut self, length: impl FnOnce(&mut Cursor<'a>) -> Parsed<u64>) -> Parsed<()> {
        self.counted(length)?;
        self.stack.push(Value::Bytes);
        Ok(())
    }

    fn line(&mut self, at: usize) -> Parsed<&'a str> {
        /// Bytes of the longest name that is looked for.
        const LONGEST: usize = 256;
        let mut rest = self.cursor.clone();
        let rest = rest.take(rest.left().min(LONGEST))?;
        let length = rest.iter().position(|&byte| byte == b'\n').ok_or_else(|| bad(at, "the name of a function"))?;
        let line = self.cursor.take(length + 1)?;
        str::from_utf8(&line[..length]).map_err(|_| bad(at, "the name of a function"))
    }

    fn push_tuple(&mut self, values: Vec<Value<'a>>) {
        let tuple = self.pickle.tuple(values);
        self.stack.push(tuple);
    }

    fn push_list(&mut self, values: Vec<Value<'a>>) {
        self.pickle.lists.push(values);
        self.stack.push(Value::List(self.pickle.lists.len() as u32 - 1));
    }

    fn list(&mut self, at: usize) -> Parsed<&mut Vec<Value<'a>>> {
        let Some(&Value::List(index)) = self.stack.last() else { return Err(bad(at, "a list to extend")) };
        self.pickle.lists.get_mut(index as usize).ok_or_else(|| bad(at, "a list to extend"))
    }

    fn dict(&mut self, at: usize) -> Parsed<&mut Vec<(Value<'a>, Value<'a>)>> {
        let Some(&Value::Dict(index)) = self.stack.last() else { return Err(bad(at, "a dictionary to extend")) };
        self.pickle.dicts.get_mut(index as usize).ok_or_else(|| bad(at, "a dictionary to extend"))
    }

    fn remember(&mut self, at: usize, key: impl FnOnce(&mut Cursor<'a>, usize) -> Parsed<u32>) -> Parsed<()> {
        let key = key(self.cursor, self.memo.len())?;
        let value = *self.stack.last().ok_or_else(|| bad(at, "a value to remember"))?;
        self.memo.insert(key, value);
        Ok(())
    }

    fn recall(&mut self, at: usize, key: impl FnOnce(&mut Cursor<'a>) -> Parsed<u32>) -> Parsed<()> {
        let key = key(self.cursor)?;
        let value = *self.memo.get(&key).ok_or_else(|| bad(at, "a value that was remembered"))?;
        self.stack.push(value);
        Ok(())
    }

    fn global(&mut self, module: &str, name: &str) -> Parsed<()> {
        let Some(global) = Global::named(module, name) else {
            // Objects such as `torch.float32` are harmless constants.
            if module == "torch" && name.chars().all(|c| c.is_ascii_lowercase() || c.is_ascii_digit()) {
                self.stack.push(Value::Opaque);
                return Ok(());
            }
            return Err(format!(
                "is a pickle that refers to `{module}.{name}`, which no state dict needs; nothing was executed. Save \
                 `model.state_dict()` alone"
            ));
        };
        self.stack.push(Value::Global(global));
        Ok(())
    }

    /// `('storage', class, key, device, elements)`, and in old files a part of it: `(key, first, elements)`.
    fn persistent(&mut self, at: usize) -> Parsed<()> {
        let wrong = || bad(at, "the description of a storage");
        let value = self.pop(at)?;
        let items = self.pickle.items(value).ok_or_else(wrong)?;
        let (
            &[
                Value::Text("storage"),
                Value::Global(Global::Storage(stored)),
                Value::Text(key),
                Value::Text(_),
                elements,
            ],
            part,
        ) = items.split_at_checked(5).ok_or_else(wrong)?
        else {
            return Err(wrong());
        };
        let count = |value: Value| match value {
            Value::Int(count) => usize::try_from(count).map_err(|_| wrong()),
            _ => Err(wrong()),
        };
        let mut storage = Storage { stored, key, elements: count(elements)?, first: 0 };
        match part {
            [] | [Value::None] => {}
            &[part @ Value::Tuple(_)] => {
                let Some(&[_, first, elements]) = self.pickle.items(part) else { return Err(wrong()) };
                (storage.first, storage.elements) = (count(first)?, count(elements)?);
            }
            _ => return Err(wrong()),
        }
        self.pickle.storages.push(storage);
        self.stack.push(Value::Storage(self.pickle.storages.len() as u32 - 1));
        Ok(())
    }

    /// Describes what a function would give.
    fn call(&mut self, at: usize) -> Parsed<()> {
        let called = self.pop_many(2, at)?;
        let &[Value::Global(global), arguments] = &called[..] else {
            return Err(bad(at, "a function and its arguments"));
        };
        let items = self.pickle.items(arguments).ok_or_else(|| bad(at, "arguments in a tuple"))?;
        let result = match (global, items) {
            (Global::OrderedDict, []) => self.pickle.dict(Vec::new()),
            (Global::OrderedDict, &[list]) => {
                let count = self.pickle.items(list).map_or(0, <[_]>::len);
                self.spend(count)?;
                let items = self.pickle.items(list).ok_or_else(|| bad(at, "a list of pairs"))?;
                let pair = |&item: &Value<'a>| match self.pickle.items(item) {
                    Some(&[key, value]) => Ok((key, value)),
                    _ => Err(bad(at, "a list of pairs")),
                };
                let entries = items.iter().map(pair).collect::<Parsed<_>>()?;
                self.pickle.dict(entries)
            }
            (Global::Size, &[list]) => list,
            (Global::RebuildParameter, &[tensor @ Value::Tensor(_), ..]) => tensor,
            (Global::RebuildTensor, &[Value::Storage(storage), Value::Int(offset), shape, strides, ..]) => {
                let numbers = |value: Value<'a>| {
                    let items = self.pickle.items(value).filter(|items| items.len() <= MAX_RANK);
                    let items = items.ok_or_else(|| bad(at, "a shape of at most six dimensions"))?;
                    let number = |item: &Value<'a>| match *item {
                        Value::Int(number) => usize::try_from(number).map_err(|_| bad(at, "the shape of a tensor")),
                        _ => Err(bad(at, "the shape of a tensor")),
                    };
                    items.iter().map(number).collect::<Parsed<Vec<_>>>()
                };
                let offset = usize::try_from(offset).map_err(|_| bad(at, "the offset of a tensor"))?;
                let view = View { storage, offset, shape: numbers(shape)?, strides: numbers(strides)? };
                self.pickle.tensors.push(view);
                Value::Tensor(self.pickle.tensors.len() as u32 - 1)
            }
            _ => return Err(bad(at, "arguments that fit their function")),
        };
        self.stack.push(result);
        Ok(())
    }
}

/// An integer from its bytes, the lowest first.
fn long(bytes: &[u8]) -> Value<'_> {
    if bytes.len() > 8 {
        return Value::Long(bytes);
    }
    // The sign is that of the last byte.
    let fill = if bytes.last().is_some_and(|&byte| byte > 0x7F) { 0xFF } else { 0 };
    let mut whole = [fill; 8];
    whole[..bytes.len()].copy_from_slice(bytes);
    Value::Int(i64::from_le_bytes(whole))
}

fn pairs<'a>(values: Vec<Value<'a>>, at: usize) -> Parsed<Vec<(Value<'a>, Value<'a>)>> {
    let (pairs, rest) = values.as_chunks::<2>();
    if !rest.is_empty() {
        return Err(bad(at, "a value for each key"));
    }
    Ok(pairs.iter().map(|&[key, value]| (key, value)).collect())
}

fn bad(at: usize, expected: &str) -> String {
    format!("holds a damaged pickle: at byte {at} it lacks {expected}")
}
