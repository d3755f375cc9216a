//! Reader for Python pickles, as far as state dicts need them. Nothing is executed.
//!
//! A pickle is a program for a stack machine whose instructions can call any Python function. This machine calls none:
//! it describes the results of the functions that create tensors, parameters and dictionaries. Anything else in a
//! checkpoint, such as optimizer options or a scheduler, becomes an object of which only the constructor's name is
//! known.

use crate::collect::CollectVec;
use std::collections::HashMap;

use super::{
    bytes::{Cursor, Parsed},
    described::{Pickle, Storage, Value, View},
    globals::{Element, Global, Values},
};

/// Maximum number of steps of one pickle. The state dict of a model with ten thousand tensors has about half a million.
const MAX_STEPS: usize = 2_000_000;

/// Maximum number of dimensions; of a tensor with more than the library allows, only the name is known.
const MAX_RANK: usize = 64;

impl<'a> Pickle<'a> {
    /// Runs the pickle at the cursor and moves the cursor past it. Returns its values and the one at the top of the
    /// stack.
    pub fn load(cursor: &mut Cursor<'a>) -> Parsed<(Self, Value<'a>)> {
        let (pickle, steps) = (Self::default(), MAX_STEPS);
        Machine { cursor, pickle, stack: Vec::new(), marks: Vec::new(), memo: HashMap::new(), steps }.run()
    }
}

struct Machine<'a, 'c> {
    cursor: &'c mut Cursor<'a>,
    pickle: Pickle<'a>,
    stack: Vec<Value<'a>>,
    marks: Vec<usize>,
    memo: HashMap<u32, Value<'a>>,
    /// Number of steps left.
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

    /// Counts steps, so that a small file cannot keep the machine busy forever.
    fn spend(&mut self, steps: usize) -> Parsed<()> {
        let left = self.steps.checked_sub(steps);
        self.steps =
            left.ok_or_else(|| format!("contains a pickle of more than {MAX_STEPS} steps, too many for a state dict"))?;
        Ok(())
    }

    fn step(&mut self, code: u8, at: usize) -> Parsed<()> {
        match code {
            // PROTO
            0x80 => match self.cursor.u8()? {
                0..=5 => {}
                protocol => return Err(format!("contains a pickle of protocol {protocol}, expected at most 5")),
            },
            // FRAME: the instructions continue inside it.
            0x95 => drop(self.cursor.u64()?),
            b'(' => self.marks.push(self.stack.len()),
            b'0' => drop(self.pop(at)?),
            // POP_MARK, DUP
            b'1' => drop(self.pop_marked(at)?),
            b'2' => {
                let top = self.pop(at)?;
                self.stack.extend([top, top]);
            }
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
            // LONG4
            0x8B => {
                let length = self.cursor.u32()?;
                let bytes = self.cursor.take(length as usize)?;
                self.stack.push(long(bytes));
            }
            // INT and LONG: digits, optionally followed by `L`; INT also encodes booleans.
            b'I' | b'L' => {
                let line = self.line(at)?;
                let digits = line.trim_end_matches('L').parse();
                self.stack.push(match (line, digits) {
                    ("00", _) => Value::Bool(false),
                    ("01", _) => Value::Bool(true),
                    (_, Ok(number)) => Value::Int(number),
                    _ => Value::Bytes,
                });
            }
            // FLOAT
            b'F' => {
                self.line(at)?;
                self.stack.push(Value::Float);
            }
            // STRING and UNICODE; names that matter contain no escapes.
            b'S' | b'V' => {
                let line = self.line(at)?;
                let text = if code == b'S' { line.trim_matches(['\'', '"']) } else { line };
                self.stack.push(Value::Text(text));
            }
            // SHORT_BINUNICODE, BINUNICODE, BINUNICODE8, and the strings of Python 2: SHORT_BINSTRING, BINSTRING
            0x8C => self.text(at, |cursor| cursor.u8().map(u64::from))?,
            b'X' => self.text(at, |cursor| cursor.u32().map(u64::from))?,
            0x8D => self.text(at, Cursor::u64)?,
            b'U' => self.string(|cursor| cursor.u8().map(u64::from))?,
            b'T' => self.string(|cursor| cursor.u32().map(u64::from))?,
            // SHORT_BINBYTES, BINBYTES, BINBYTES8, BYTEARRAY8
            b'C' => self.bytes(|cursor| cursor.u8().map(u64::from))?,
            b'B' => self.bytes(|cursor| cursor.u32().map(u64::from))?,
            0x8E | 0x96 => self.bytes(Cursor::u64)?,
            // EMPTY_SET, FROZENSET, ADDITEMS
            0x8F => {
                let set = self.pickle.object("builtins", "set");
                self.stack.push(set);
            }
            0x91 => {
                self.pop_marked(at)?;
                let set = self.pickle.object("builtins", "frozenset");
                self.stack.push(set);
            }
            0x90 => {
                let values = self.pop_marked(at)?;
                self.list(at, values)?;
            }
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
                self.list(at, vec![value])?;
            }
            b'e' => {
                let values = self.pop_marked(at)?;
                self.list(at, values)?;
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
                self.dict(at, entries)?;
            }
            b'u' => {
                let entries = pairs(self.pop_marked(at)?, at)?;
                self.dict(at, entries)?;
            }
            // BINPUT, LONG_BINPUT, MEMOIZE
            b'q' => self.remember(at, |cursor, _| cursor.u8().map(u32::from))?,
            b'r' => self.remember(at, |cursor, _| cursor.u32())?,
            0x94 => self.remember(at, |_, known| Ok(known as u32))?,
            b'h' => self.recall(at, |cursor| cursor.u8().map(u32::from))?,
            b'j' => self.recall(at, Cursor::u32)?,
            // PUT and GET, with digits
            b'p' | b'g' => {
                let key = self.line(at)?.parse().map_err(|_| bad(at, "a memo index"))?;
                if code == b'p' { self.remember(at, |_, _| Ok(key))? } else { self.recall(at, |_| Ok(key))? }
            }
            b'c' => {
                let (module, name) = (self.line(at)?, self.line(at)?);
                self.global(module, name);
            }
            // INST and OBJ: an instance of a class, with its arguments above a mark.
            b'i' => {
                let (module, name) = (self.line(at)?, self.line(at)?);
                self.pop_marked(at)?;
                let object = self.pickle.object(module, name);
                self.stack.push(object);
            }
            b'o' => {
                let class = self.pop_marked(at)?.first().copied();
                let object = class.and_then(made_by).ok_or_else(|| bad(at, "a class"))?;
                self.stack.push(object);
            }
            // NEWOBJ, NEWOBJ_EX: the same with arguments in a tuple, and keyword arguments in a dictionary.
            0x81 | 0x92 => {
                if code == 0x92 {
                    self.pop(at)?;
                }
                self.call(at)?;
            }
            // STACK_GLOBAL
            0x93 => {
                let names = self.pop_many(2, at)?;
                let &[Value::Text(module), Value::Text(name)] = &names[..] else { return Err(bad(at, "a name")) };
                self.global(module, name);
            }
            b'Q' => self.persistent(at)?,
            b'R' => self.call(at)?,
            // BUILD: attributes, such as the `_metadata` of an ordered dictionary, are ignored.
            b'b' => {
                self.pop(at)?;
                match self.stack.last() {
                    Some(Value::Dict(_) | Value::Tensor(_) | Value::Object(_) | Value::Global(_)) => {}
                    _ => return Err(bad(at, "an object to set attributes on")),
                }
            }
            other => {
                return Err(format!(
                    "contains a pickle with instruction {other:#04x} at byte {at}, which a state dict does not need; \
                     nothing was executed"
                ));
            }
        }
        Ok(())
    }

    fn pop(&mut self, at: usize) -> Parsed<Value<'a>> {
        // Values below the last mark belong to the instructions before it.
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

    /// Reads length-prefixed bytes.
    fn counted(&mut self, length: impl FnOnce(&mut Cursor<'a>) -> Parsed<u64>) -> Parsed<&'a [u8]> {
        let length = length(self.cursor)?;
        self.cursor.take(usize::try_from(length).unwrap_or(usize::MAX))
    }

    fn text(&mut self, at: usize, length: impl FnOnce(&mut Cursor<'a>) -> Parsed<u64>) -> Parsed<()> {
        let bytes = self.counted(length)?;
        let text = str::from_utf8(bytes).map_err(|_| bad(at, "UTF-8 text"))?;
        self.stack.push(Value::Text(text));
        Ok(())
    }

    /// Reads a string of Python 2, which is text or bytes.
    fn string(&mut self, length: impl FnOnce(&mut Cursor<'a>) -> Parsed<u64>) -> Parsed<()> {
        let bytes = self.counted(length)?;
        self.stack.push(str::from_utf8(bytes).map_or(Value::Bytes, Value::Text));
        Ok(())
    }

    fn bytes(&mut self, length: impl FnOnce(&mut Cursor<'a>) -> Parsed<u64>) -> Parsed<()> {
        self.counted(length)?;
        self.stack.push(Value::Bytes);
        Ok(())
    }

    fn line(&mut self, at: usize) -> Parsed<&'a str> {
        /// Maximum number of bytes of a line.
        const LONGEST: usize = 4096;
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

    /// Adds values to the list at the top of the stack; other objects ignore them.
    fn list(&mut self, at: usize, values: Vec<Value<'a>>) -> Parsed<()> {
        match self.stack.last() {
            Some(&Value::List(index)) => {
                let list = self.pickle.lists.get_mut(index as usize).ok_or_else(|| bad(at, "a list to extend"))?;
                list.extend(values);
            }
            Some(Value::Object(_)) => {}
            _ => return Err(bad(at, "a list to extend")),
        }
        Ok(())
    }

    /// Adds entries to the dictionary at the top of the stack; other objects ignore them.
    fn dict(&mut self, at: usize, entries: Vec<(Value<'a>, Value<'a>)>) -> Parsed<()> {
        match self.stack.last() {
            Some(&Value::Dict(index)) => {
                let dict = self.pickle.dicts.get_mut(index as usize);
                dict.ok_or_else(|| bad(at, "a dictionary to extend"))?.extend(entries);
            }
            Some(Value::Object(_)) => {}
            _ => return Err(bad(at, "a dictionary to extend")),
        }
        Ok(())
    }

    fn remember(&mut self, at: usize, key: impl FnOnce(&mut Cursor<'a>, usize) -> Parsed<u32>) -> Parsed<()> {
        let key = key(self.cursor, self.memo.len())?;
        let value = *self.stack.last().ok_or_else(|| bad(at, "a value to memoize"))?;
        self.memo.insert(key, value);
        Ok(())
    }

    fn recall(&mut self, at: usize, key: impl FnOnce(&mut Cursor<'a>) -> Parsed<u32>) -> Parsed<()> {
        let key = key(self.cursor)?;
        let value = *self.memo.get(&key).ok_or_else(|| bad(at, "a memoized value"))?;
        self.stack.push(value);
        Ok(())
    }

    fn global(&mut self, module: &'a str, name: &'a str) {
        let global = Global::named(module, name).unwrap_or_else(|| {
            self.pickle.others.push((module, name));
            Global::Other(self.pickle.others.len() as u32 - 1)
        });
        self.stack.push(Value::Global(global));
    }

    /// Reads a storage, `('storage', class, key, device, elements)`, which old files follow by a view of it,
    /// `(key, first, elements)`.
    fn persistent(&mut self, at: usize) -> Parsed<()> {
        let wrong = || bad(at, "a storage descriptor");
        let value = self.pop(at)?;
        let items = self.pickle.items(value).ok_or_else(wrong)?;
        let (&[Value::Text("storage"), Value::Global(class), Value::Text(key), _, elements], part) =
            items.split_at_checked(5).ok_or_else(wrong)?
        else {
            return Err(wrong());
        };
        let values = match class {
            Global::Storage(values) => values,
            // A storage of an unknown class makes an unknown tensor.
            Global::Other(index) => {
                self.stack.push(Value::Object(index));
                return Ok(());
            }
            _ => return Err(wrong()),
        };
        let count = |value: Value| match value {
            Value::Int(count) => usize::try_from(count).map_err(|_| wrong()),
            _ => Err(wrong()),
        };
        let mut storage = Storage { values, key, elements: count(elements)?, first: 0 };
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

    /// Describes the result of a function.
    fn call(&mut self, at: usize) -> Parsed<()> {
        let called = self.pop_many(2, at)?;
        let &[function, arguments] = &called[..] else { return Err(bad(at, "a function and its arguments")) };
        let result = self.result(at, function, arguments)?;
        self.stack.push(result);
        Ok(())
    }

    fn result(&mut self, at: usize, function: Value<'a>, arguments: Value<'a>) -> Parsed<Value<'a>> {
        let items = self.pickle.items(arguments).ok_or_else(|| bad(at, "a tuple of arguments"))?;
        let global = match function {
            Value::Global(global) => global,
            Value::Object(_) => return Ok(function),
            _ => return Err(bad(at, "a function and its arguments")),
        };
        Ok(match (global, items) {
            (Global::Other(index), _) => Value::Object(index),
            (Global::Dict, []) | (Global::DefaultDict, _) => self.pickle.dict(Vec::new()),
            (Global::Dict, &[content]) => self.copied(at, content)?,
            (Global::Size, &[list]) => list,
            (Global::RebuildParameter, &[tensor @ (Value::Tensor(_) | Value::Object(_)), ..]) => tensor,
            (Global::RebuildFromType, &[function, class, arguments, _]) => match class {
                Value::Global(Global::Tensor) => match function {
                    // Nested functions of this kind could recurse without end.
                    Value::Global(Global::RebuildFromType) => return Err(bad(at, "a function that returns a tensor")),
                    _ => self.result(at, function, arguments)?,
                },
                class => made_by(class).ok_or_else(|| bad(at, "the class of a tensor"))?,
            },
            (Global::Reconstructor, &[class, ..]) => match class {
                Value::Global(Global::Dict) => self.pickle.dict(Vec::new()),
                class => made_by(class).unwrap_or_else(|| self.pickle.object("copyreg", "_reconstructor")),
            },
            (Global::RebuildTensor | Global::RebuildTensorV3, &[storage @ Value::Object(_), ..]) => storage,
            (Global::RebuildTensor, &[Value::Storage(storage), Value::Int(offset), shape, strides, ..]) => {
                let values = self.pickle.storages.get(storage as usize).map(|storage| storage.values);
                let Some(Values::Typed(element)) = values else { return Err(bad(at, "a typed storage")) };
                self.view(at, storage, element, offset, [shape, strides])?
            }
            (
                Global::RebuildTensorV3,
                &[Value::Storage(storage), Value::Int(offset), shape, strides, _, _, dtype, ..],
            ) => match dtype {
                Value::Global(Global::DType(element)) => self.view(at, storage, element, offset, [shape, strides])?,
                dtype => made_by(dtype).ok_or_else(|| bad(at, "the dtype of a tensor"))?,
            },
            (Global::Tensor | Global::Storage(_) | Global::DType(_), _) => self.pickle.object("torch", "Tensor"),
            _ => return Err(bad(at, "arguments that match the function")),
        })
    }

    /// Returns a dictionary with the content of another one, or of a list of pairs.
    fn copied(&mut self, at: usize, content: Value<'a>) -> Parsed<Value<'a>> {
        let count =
            self.pickle.items(content).map_or_else(|| self.pickle.entries(content).map_or(0, <[_]>::len), <[_]>::len);
        self.spend(count)?;
        if let Some(entries) = self.pickle.entries(content) {
            let entries = entries.to_vec();
            return Ok(self.pickle.dict(entries));
        }
        let items = self.pickle.items(content).ok_or_else(|| bad(at, "a list of pairs"))?;
        let pair = |&item: &Value<'a>| match self.pickle.items(item) {
            Some(&[key, value]) => Ok((key, value)),
            _ => Err(bad(at, "a list of pairs")),
        };
        let entries = items.iter().map(pair).try_collect_vec()?;
        Ok(self.pickle.dict(entries))
    }

    /// Returns a tensor that views a storage.
    fn view(
        &mut self,
        at: usize,
        storage: u32,
        element: Element,
        offset: i64,
        [shape, strides]: [Value<'a>; 2],
    ) -> Parsed<Value<'a>> {
        let numbers = |value: Value<'a>| {
            let items = self.pickle.items(value).filter(|items| items.len() <= MAX_RANK);
            let items = items.ok_or_else(|| bad(at, "the shape of a tensor"))?;
            let number = |item: &Value<'a>| match *item {
                Value::Int(number) => usize::try_from(number).map_err(|_| bad(at, "the shape of a tensor")),
                _ => Err(bad(at, "the shape of a tensor")),
            };
            items.iter().map(number).try_collect_vec()
        };
        let offset = usize::try_from(offset).map_err(|_| bad(at, "the offset of a tensor"))?;
        let view = View { storage, element, offset, shape: numbers(shape)?, strides: numbers(strides)? };
        self.pickle.tensors.push(view);
        Ok(Value::Tensor(self.pickle.tensors.len() as u32 - 1))
    }
}

/// Returns the object that a class or function would create.
fn made_by(class: Value<'_>) -> Option<Value<'_>> {
    match class {
        Value::Global(Global::Other(index)) | Value::Object(index) => Some(Value::Object(index)),
        _ => None,
    }
}

/// Decodes a little-endian integer.
fn long(bytes: &[u8]) -> Value<'_> {
    if bytes.len() > 8 {
        return Value::Long(bytes);
    }
    // The last byte has the sign.
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
    format!("contains a damaged pickle: expected {expected} at byte {at}")
}
