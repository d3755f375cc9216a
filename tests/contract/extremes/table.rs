//! Reader of `table.txt`, whose form `make.py` explains.

use x_transformers::DType;

/// One op on extreme inputs, with its expected results in each dtype.
pub struct Case {
    /// Op and arguments, separated by spaces.
    pub name: String,
    /// Tolerance of finite values.
    pub close: Close,
    pub inputs: Vec<Input>,
    /// The gradient of the output, repeated.
    pub cotangent: Vec<Symbol>,
    /// The output, then the gradient of each differentiated input.
    pub results: Vec<(DType, Vec<List<Expected>>)>,
}

/// Tolerance of finite values against those of the table.
#[derive(Clone, Copy, PartialEq)]
pub enum Close {
    /// Relative to the largest of its row.
    Row,
    /// The same, but gradients are computed from the rounded output.
    OfOutput,
    /// Each by itself.
    Element,
    /// To the last bit.
    Bits,
}

#[derive(Clone, Copy, PartialEq)]
pub enum Kind {
    Differentiated,
    Constant,
    Int,
    Bool,
}

pub struct Input {
    pub kind: Kind,
    pub shape: Vec<usize>,
    pub values: Vec<Symbol>,
}

/// A number, which may depend on the dtype.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Symbol {
    Number(f64),
    Max(f64),
    Den(f64),
    Big(f64),
    Sml(f64),
}

impl Symbol {
    fn parse(token: &str) -> Self {
        let (sign, name) = token.strip_prefix('-').map_or((1.0, token), |name| (-1.0, name));
        match name {
            "max" => Self::Max(sign),
            "den" => Self::Den(sign),
            "big" => Self::Big(sign),
            "sml" => Self::Sml(sign),
            _ => Self::Number(token.parse().unwrap_or_else(|_| panic!("`{token}` is not a number"))),
        }
    }

    pub fn value(self, dtype: DType) -> f64 {
        // Exponents of the large number, the small one, and the smallest.
        let (big, sml, den) = match dtype {
            DType::F64 => (600, -600, -1074),
            DType::F32 => (80, -80, -149),
            DType::F16 => (12, -14, -24),
            _ => (80, -80, -133),
        };
        match self {
            Self::Number(number) => number,
            Self::Max(sign) => sign * -dtype.lowest(),
            Self::Den(sign) => sign * libm::ldexp(1.0, den),
            Self::Big(sign) => sign * libm::ldexp(1.0, big),
            Self::Sml(sign) => sign * libm::ldexp(1.0, sml),
        }
    }
}

/// Expected element of a result.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Expected {
    /// A finite number that the table does not know.
    Finite,
    Value(Symbol),
    /// The exact value where PyTorch has another class, which overflows on the way; and that class. `None` is finite.
    Either(Option<Symbol>, Option<f64>),
}

impl Expected {
    fn parse(token: &str) -> Self {
        match token.split_once('|') {
            _ if token == "." => Self::Finite,
            Some((exact, torch)) => Self::Either((exact != ".").then(|| Symbol::parse(exact)), torch.parse().ok()),
            None => Self::Value(Symbol::parse(token)),
        }
    }
}

/// A list as it is written, whose length another one gives.
pub struct List<T> {
    cycle: Vec<T>,
    exceptions: Vec<(usize, T)>,
}

impl<T: Copy> List<T> {
    fn parse(text: &str, parse: fn(&str) -> T) -> Self {
        let (cycle, exceptions) = text.split_once('~').unwrap_or((text, ""));
        let mut list = Self { cycle: Vec::new(), exceptions: Vec::new() };
        for token in cycle.split_whitespace().filter(|token| *token != "empty") {
            let (token, count) = token.split_once('*').unwrap_or((token, "1"));
            list.cycle.extend(vec![parse(token); count.parse().expect("a count")]);
        }
        for token in exceptions.split_whitespace() {
            let (at, token) = token.split_once(':').expect("a position");
            list.exceptions.push((at.parse().expect("a position"), parse(token)));
        }
        list
    }

    pub fn take(&self, len: usize) -> Vec<T> {
        let mut all: Vec<T> = self.cycle.iter().copied().cycle().take(len).collect();
        assert_eq!(all.len(), len, "a list of the table is empty");
        for &(at, value) in &self.exceptions {
            all[at] = value;
        }
        all
    }
}

/// Every case of the table.
pub fn cases() -> Vec<Case> {
    let mut cases: Vec<Case> = Vec::new();
    for line in include_str!("table.txt").lines().filter(|line| !line.starts_with('#')) {
        let (word, rest) = line.split_once(' ').expect("two words");
        if word == "case" {
            let (name, close) = match rest.rsplit_once(' ') {
                Some((name, "elementwise")) => (name, Close::Element),
                Some((name, "of_output")) => (name, Close::OfOutput),
                Some((name, "exact")) => (name, Close::Bits),
                _ => (rest, Close::Row),
            };
            let (inputs, cotangent, results) = (Vec::new(), Vec::new(), Vec::new());
            cases.push(Case { name: name.into(), close, inputs, cotangent, results });
            continue;
        }
        let case = cases.last_mut().expect("a case");
        let kind = match word {
            "in" => Kind::Differentiated,
            "const" => Kind::Constant,
            "int" => Kind::Int,
            "bool" => Kind::Bool,
            "g" => {
                let list = List::parse(rest, Symbol::parse);
                let last = list.exceptions.last().map_or(0, |&(at, _)| at + 1);
                case.cotangent = list.take(list.cycle.len().max(last));
                continue;
            }
            dtypes => {
                let (_, texts) = rest.split_once("= ").expect("an equals sign");
                for name in dtypes.split(',') {
                    let dtype = [DType::F64, DType::F32, DType::F16, DType::BF16];
                    let dtype = dtype.into_iter().find(|dtype| dtype.name() == name).expect("a dtype");
                    let lists = texts.split(" | ").map(|text| List::parse(text, Expected::parse)).collect();
                    case.results.push((dtype, lists));
                }
                continue;
            }
        };
        let (shape, values) = rest.split_once(' ').expect("a shape");
        let shape: Vec<usize> = shape.split(',').filter_map(|size| size.parse().ok()).collect();
        let values = List::parse(values, Symbol::parse).take(shape.iter().product());
        case.inputs.push(Input { kind, shape, values });
    }
    cases
}
