//! Profiling: seconds, operations and bytes of each op, separately for forward and backward.
//!
//! A [`Profile`] measures the ops of its thread while it lives. An op's time runs from the end of the previous op, so
//! nothing between two ops is lost and the times add up; time before a tape counts as outside of ops. An op that calls
//! others gets the time that remains after theirs. On a GPU the thread waits for the device after each op: the
//! proportions are right, but the total is longer than without a profile. Without a profile an op only reads one flag.
//!
//! ```
//! use x_transformers::{DType, Device, Tape, Tensor, profile::{Phase, Profile}};
//! # fn main() -> x_transformers::Result<()> {
//! let x = Tensor::ones([64, 32], DType::F32, &Device::Cpu)?.requires_grad()?;
//! let profile = Profile::start()?;
//! let mut tape = Tape::grad();
//! let loss = x.softmax()?.square()?.sum(&[])?;
//! tape.backward(&loss)?;
//! let report = profile.finish();
//! let softmax = report.ops().find(|op| op.name == "softmax" && op.phase == Phase::Backward);
//! assert_eq!(softmax.map(|op| op.calls), Some(1));
//! println!("{report}");
//! # Ok(())
//! # }
//! ```

#![forbid(unsafe_code)]

use std::{
    cell::{Cell, RefCell},
    fmt,
    io::{self, Write},
    marker::PhantomData,
    sync::OnceLock,
    time::{Duration, Instant},
};

use crate::{
    Error, Result, collect::CollectVec, device::Device, error::ensure, ordered::OrderedMap, shape::Shape, sort::sort_by,
};

thread_local! {
    /// `true` if this thread has a session; read by every op.
    static ACTIVE: Cell<bool> = const { Cell::new(false) };
    static SESSION: RefCell<Option<Session>> = const { RefCell::new(None) };
}

/// Phase of a training step that an op belongs to.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
#[non_exhaustive]
pub enum Phase {
    /// A forward pass, or a part of it that is rerun.
    Forward,
    /// A backward pass; adding a gradient to those of other uses of a tensor counts towards the op that returns it.
    Backward,
    /// The norm of the gradients, the optimizer, and the average of the weights.
    Update,
    /// Reading values into the program.
    Read,
}

impl Phase {
    /// Returns the name: `forward`, `backward`, `update` or `read`.
    pub fn name(self) -> &'static str {
        match self {
            Self::Forward => "forward",
            Self::Backward => "backward",
            Self::Update => "update",
            Self::Read => "read",
        }
    }
}

/// Totals of one op in one phase.
#[derive(Clone, Copy, PartialEq, Debug)]
#[non_exhaustive]
pub struct OpProfile {
    /// Name of the op.
    pub name: &'static str,
    /// Phase in which it was called.
    pub phase: Phase,
    /// Number of calls.
    pub calls: u64,
    /// Total time of all calls.
    pub seconds: f64,
    /// Floating-point operations of products and attention, a multiplication and an addition each; 0 for other ops.
    pub operations: f64,
    /// Bytes of the input and output tensors: the minimum that an op must move if they do not fit in the caches.
    pub bytes: f64,
}

/// Measures the ops of this thread until it is finished or dropped.
///
/// ```
/// use x_transformers::{DType, Device, Tensor, profile::Profile};
/// let x = Tensor::ones([8, 8], DType::F32, &Device::Cpu)?;
/// let profile = Profile::start()?;
/// x.softmax()?;
/// let report = profile.finish();
/// assert!(report.ops().any(|op| op.name == "softmax" && op.calls == 1));
/// # Ok::<(), x_transformers::Error>(())
/// ```
#[derive(Debug)]
#[must_use = "a profile measures while it lives"]
#[doc(alias = "profiler")]
pub struct Profile {
    /// A profile belongs to its thread.
    thread: PhantomData<*const ()>,
}

struct Session {
    started: Instant,
    /// End of the last op.
    last: Instant,
    /// Number of backward rules that are running.
    inside: usize,
    /// Cost that the op in progress reported.
    cost: Option<Cost>,
    /// Bytes that the op in progress moves besides its last output and the inputs recorded with that.
    besides: f64,
    totals: OrderedMap<(Phase, &'static str), OpProfile>,
    outside: Duration,
    calls: Option<Vec<Call>>,
}

/// Call in a trace.
#[derive(Debug)]
struct Call {
    name: &'static str,
    phase: Phase,
    start: Duration,
    time: Duration,
    shape: Shape,
    operations: f64,
    bytes: f64,
}

/// Returns the start of the traces' clock: one per process, so that reports can be joined.
fn epoch() -> Instant {
    static EPOCH: OnceLock<Instant> = OnceLock::new();
    *EPOCH.get_or_init(Instant::now)
}

impl Profile {
    /// Starts measuring.
    ///
    /// Errors: this thread already has a profile.
    pub fn start() -> Result<Self> {
        Self::begin(None)
    }

    /// Like [`Profile::start`], but also keeps every single call for [`Report::write_trace`].
    pub fn with_trace() -> Result<Self> {
        Self::begin(Some(Vec::new()))
    }

    fn begin(calls: Option<Vec<Call>>) -> Result<Self> {
        ensure!(
            !ACTIVE.get(),
            Error::argument("profile", "this thread already has a profile; finish it before starting another")
        );
        epoch();
        let now = Instant::now();
        let session = Session {
            started: now,
            last: now,
            inside: 0,
            cost: None,
            besides: 0.0,
            totals: OrderedMap::default(),
            outside: Duration::ZERO,
            calls,
        };
        SESSION.set(Some(session));
        ACTIVE.set(true);
        Ok(Self { thread: PhantomData })
    }

    /// Stops measuring and returns the report.
    pub fn finish(self) -> Report {
        let Some(session) = SESSION.take() else { return Report::default() };
        let Session { started, last, totals, outside, calls, .. } = session;
        Report {
            totals,
            seconds: started.elapsed(),
            outside: outside + last.elapsed(),
            calls: calls.unwrap_or_default(),
        }
    }
}

impl Drop for Profile {
    fn drop(&mut self) {
        // A profile kept in a thread-local may outlive these.
        let _ = ACTIVE.try_with(|active| active.set(false));
        let _ = SESSION.try_with(|session| session.take());
    }
}

impl Session {
    fn end(&mut self, name: &'static str, phase: Phase, shape: Shape, operations: f64, bytes: f64) {
        let (start, now) = (self.last, Instant::now());
        let time = now - start;
        let total = OpProfile { name, phase, calls: 0, seconds: 0.0, operations: 0.0, bytes: 0.0 };
        let total = self.totals.or_insert((phase, name), total);
        total.calls += 1;
        total.seconds += time.as_secs_f64();
        total.operations += operations;
        total.bytes += bytes;
        if let Some(calls) = &mut self.calls {
            let start = start.saturating_duration_since(epoch());
            calls.push(Call { name, phase, start, time, shape, operations, bytes });
        }
        self.last = now;
    }
}

/// Calls `f` with the session of this thread, if there is one.
fn with_session<R>(f: impl FnOnce(&mut Session) -> R) -> Option<R> {
    SESSION.with_borrow_mut(|session| session.as_mut().map(f))
}

/// Floating-point operations of an op, which it reports before it is recorded.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Cost {
    /// Operations of the forward pass, counting a multiplication and an addition as two.
    pub operations: f64,
    /// Operations of the backward pass.
    pub backward: BackwardCost,
}

/// Operations of a backward pass, relative to the forward pass.
#[derive(Clone, Copy, Debug)]
pub(crate) enum BackwardCost {
    /// The same number for each of the first two inputs that needs a gradient: one product per factor.
    Products,
    /// This multiple of the forward pass.
    Times(f64),
}

impl Cost {
    /// Cost of ops that are limited by memory.
    pub const NONE: Self = Self { operations: 0.0, backward: BackwardCost::Times(0.0) };
}

/// Reports the cost of the op that is about to be recorded; [`Cost::NONE`] by default.
pub(crate) fn cost(count: impl FnOnce() -> Cost) {
    if ACTIVE.get() {
        with_session(|session| session.cost = Some(count()));
    }
}

/// Reports an output of an op that has another one, which is recorded next: the bytes of both count towards that one.
#[cold]
pub(crate) fn beside(bytes: usize) {
    with_session(|session| session.besides += bytes as f64);
}

/// Returns `true` if this thread has a profile.
#[inline]
pub(crate) fn active() -> bool {
    ACTIVE.get()
}

/// Ends an op in a forward pass, or one that a backward rule calls, which does not count separately unless a tape
/// records it. `bytes`: total size of its output and inputs. Returns its cost.
#[cold]
pub(crate) fn computed(op: &'static str, device: &Device, shape: Shape, bytes: usize, recorded: bool) -> Result<Cost> {
    let besides = with_session(|session| std::mem::take(&mut session.besides)).unwrap_or(0.0);
    let cost = with_session(|session| session.cost.take()).flatten().unwrap_or(Cost::NONE);
    let counts = with_session(|session| session.inside == 0 || recorded);
    if counts != Some(true) {
        return Ok(Cost::NONE);
    }
    device.settle()?;
    with_session(|session| session.end(op, Phase::Forward, shape, cost.operations, bytes as f64 + besides));
    Ok(cost)
}

/// Running backward rule.
pub(crate) struct Rule {
    device: Device,
    shape: Shape,
    bytes: f64,
}

impl Rule {
    /// Starts a rule that gets a gradient of this shape and number of bytes; returns `None` without a profile.
    #[inline]
    pub fn begin(device: &Device, shape: &Shape, bytes: usize) -> Option<Self> {
        if !ACTIVE.get() {
            return None;
        }
        with_session(|session| session.inside += 1)?;
        Some(Self { device: device.clone(), shape: *shape, bytes: bytes as f64 })
    }

    /// Ends the rule, after its gradients were added to the others. `cost`: the cost that the op reported; `inputs`:
    /// the bytes of each input, and `true` if it needs a gradient.
    pub fn end(self, op: &'static str, cost: Cost, inputs: impl Iterator<Item = (usize, bool)>) -> Result<()> {
        self.device.settle()?;
        let mut moved = self.bytes;
        let mut products = 0.0;
        for (index, (bytes, needed)) in inputs.enumerate() {
            // It is read, and its gradient is written.
            moved += bytes as f64 * if needed { 2.0 } else { 1.0 };
            // One product for each of the two factors.
            products += f64::from(u8::from(needed && index < 2));
        }
        let factor = match cost.backward {
            BackwardCost::Products => products,
            BackwardCost::Times(factor) => factor,
        };
        with_session(|session| session.end(op, Phase::Backward, self.shape, factor * cost.operations, moved));
        Ok(())
    }
}

impl Drop for Rule {
    fn drop(&mut self) {
        with_session(|session| session.inside = session.inside.saturating_sub(1));
    }
}

/// Ends work on the parameters, or the reading of values.
#[inline]
pub(crate) fn done(op: &'static str, phase: Phase, device: &Device, bytes: impl FnOnce() -> usize) -> Result<()> {
    if !ACTIVE.get() || with_session(|session| session.inside == 0) != Some(true) {
        return Ok(());
    }
    device.settle()?;
    let (moved, scalar) = (bytes() as f64, Shape::new(&[])?);
    with_session(|session| session.end(op, phase, scalar, 0.0, moved));
    Ok(())
}

/// Attributes the time since the last op to no op.
#[inline]
pub(crate) fn pause() {
    if ACTIVE.get() {
        with_session(|session| {
            if session.inside == 0 {
                let now = Instant::now();
                session.outside += now - session.last;
                session.last = now;
            }
        });
    }
}

/// Measurements of a [`Profile`]. Displayed as a table.
#[derive(Debug, Default)]
pub struct Report {
    totals: OrderedMap<(Phase, &'static str), OpProfile>,
    seconds: Duration,
    outside: Duration,
    calls: Vec<Call>,
}

impl Report {
    /// Returns the ops by phase, in alphabetical order.
    pub fn ops(&self) -> impl Iterator<Item = &OpProfile> {
        self.totals.values().iter()
    }

    /// Returns the time from start to finish.
    pub fn seconds(&self) -> f64 {
        self.seconds.as_secs_f64()
    }

    /// Returns the part of that time that belongs to no op.
    pub fn outside(&self) -> f64 {
        self.outside.as_secs_f64()
    }

    /// Adds the measurements of another profile.
    pub fn add(&mut self, other: Report) {
        for (key, op) in other.totals {
            match self.totals.get_mut(&key) {
                Some(total) => {
                    total.calls += op.calls;
                    total.seconds += op.seconds;
                    total.operations += op.operations;
                    total.bytes += op.bytes;
                }
                None => self.totals.insert(key, op),
            }
        }
        self.seconds += other.seconds;
        self.outside += other.outside;
        self.calls.extend(other.calls);
    }

    /// Writes the calls that [`Profile::with_trace`] kept in Chrome's trace event format, for `chrome://tracing` and
    /// <https://ui.perfetto.dev>: one row per phase.
    pub fn write_trace(&self, to: &mut impl Write) -> io::Result<()> {
        write!(to, "{{\"displayTimeUnit\": \"ms\", \"traceEvents\": [")?;
        let micros = |time: Duration| time.as_nanos() as f64 / 1e3;
        for (index, call) in self.calls.iter().enumerate() {
            let Call { name, phase, start, time, shape, operations, bytes } = call;
            let comma = if index == 0 { "" } else { "," };
            write!(
                to,
                "{comma}\n{{\"name\": \"{name}\", \"cat\": \"{}\", \"ph\": \"X\", \"ts\": {:.3}, \"dur\": {:.3}, \
                 \"pid\": 1, \"tid\": {}, \"args\": {{\"shape\": {:?}, \"flop\": {operations}, \"bytes\": {bytes}}}}}",
                phase.name(),
                micros(*start),
                micros(*time),
                *phase as u8,
                &shape[..],
            )?;
        }
        writeln!(to, "\n]}}")
    }
}

/// Formats a rate with three digits, or returns an empty string.
fn rate(count: f64, seconds: f64) -> String {
    if count == 0.0 || seconds == 0.0 {
        return String::new();
    }
    let value = count / seconds;
    let (value, letter) = match value {
        value if value >= 1e12 => (value / 1e12, "T"),
        value if value >= 1e9 => (value / 1e9, "G"),
        value if value >= 1e6 => (value / 1e6, "M"),
        value => (value / 1e3, "k"),
    };
    format!("{value:.*} {letter}", if value < 10.0 { 2 } else { usize::from(value < 100.0) })
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let whole = self.seconds().max(f64::MIN_POSITIVE);
        let line = |name: &str, calls: &str, seconds: f64, operations: f64, bytes: f64| {
            let (operations, bytes) = (rate(operations, seconds), rate(bytes, seconds));
            let share = 100.0 * seconds / whole;
            let text = format!("{name:<26}{calls:>9}{seconds:>12.6}{share:>7.1}{operations:>10}{bytes:>10}");
            text.trim_end().to_string()
        };
        writeln!(f, "{:<26}{:>9}{:>12}{:>7}{:>10}{:>10}", "", "calls", "seconds", "%", "FLOP/s", "bytes/s")?;
        for phase in [Phase::Forward, Phase::Backward, Phase::Update, Phase::Read] {
            let mut ops: Vec<&OpProfile> = self.ops().filter(|op| op.phase == phase).collect_vec();
            if ops.is_empty() {
                continue;
            }
            let sum = |of: fn(&OpProfile) -> f64| ops.iter().map(|&op| of(op)).sum::<f64>();
            let (seconds, operations) = (sum(|op| op.seconds), sum(|op| op.operations));
            writeln!(f, "{}", line(phase.name(), "", seconds, operations, sum(|op| op.bytes)))?;
            sort_by(&mut ops, |a, b| b.seconds.total_cmp(&a.seconds));
            for op in ops {
                let name = format!("  {}", op.name);
                writeln!(f, "{}", line(&name, &op.calls.to_string(), op.seconds, op.operations, op.bytes))?;
            }
        }
        writeln!(f, "{}", line("outside of ops", "", self.outside(), 0.0, 0.0))?;
        write!(f, "{}", line("whole", "", self.seconds(), 0.0, 0.0))
    }
}
