//! Progress of training: a bar on a terminal, plain lines anywhere else.

use std::{
    fmt,
    io::{IsTerminal, Write, stderr, stdout},
    time::{Duration, Instant},
};

use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};
use x_transformers::Device;

use crate::{
    failure::{Failure, print},
    metrics::Unit,
};

/// A display of the steps from `first` to `steps`.
pub struct Progress {
    bar: Option<ProgressBar>,
    steps: u64,
    first: u64,
    /// Lines are printed at multiples of this.
    interval: u64,
    started: Instant,
    device: Device,
    unit: Unit,
    /// Nobody reads standard output any more.
    deaf: bool,
    /// A line could not be written, which was said.
    warned: bool,
}

impl Progress {
    /// Starts the clock. `every` is the number of steps between validations, `first` how many were done before.
    pub fn start(first: u64, steps: u64, every: u64, device: &Device, unit: Unit) -> Self {
        let bar = (stdout().is_terminal() && stderr().is_terminal())
            .then(|| ProgressBar::with_draw_target(Some(steps), ProgressDrawTarget::stderr()))
            .filter(|bar| !bar.is_hidden());
        if let Some(bar) = &bar {
            let style = ProgressStyle::with_template("{pos}/{len}  {wide_bar:.cyan/dim}  {prefix}\n{wide_msg}");
            // The template is a constant: were it refused, the default style would do.
            bar.set_style(style.unwrap_or_else(|_| ProgressStyle::default_bar()).progress_chars("━╸─"));
            bar.set_position(first);
        }
        Self {
            bar,
            steps,
            first,
            interval: (every / 10).max(1),
            started: Instant::now(),
            device: device.clone(),
            unit,
            deaf: false,
            warned: false,
        }
    }

    /// Shows the result of a step, `done` counting it.
    pub fn step(&mut self, done: u64, loss: f64, tokens_per_second: f64) {
        if self.bar.is_none() && !done.is_multiple_of(self.interval) && done != self.steps {
            return;
        }
        let (speed, unit) = (Short(tokens_per_second), self.unit.speed());
        let figures = format!("loss {}  {speed} {unit}", self.unit.show(loss));
        let left = duration(self.left(done));
        let peak = bytes(peak_memory(&self.device));
        match &self.bar {
            Some(bar) => {
                bar.set_prefix(format!("{left} left"));
                bar.set_message(format!("{figures}  peak memory {peak}"));
                bar.set_position(done);
            }
            None => {
                let steps = self.steps;
                self.say(format_args!("step {done}/{steps}  {figures}  {left} left  peak memory {peak}"))
            }
        }
    }

    /// Prints lines that stay. The purpose of training is its files: it goes on if they cannot be printed, because the
    /// reader left, the disk of the log is full or the terminal is gone.
    pub fn say(&mut self, text: impl fmt::Display) {
        if self.deaf {
            return;
        }
        let line = format_args!("{text}\n");
        let result = match &self.bar {
            Some(bar) => bar.suspend(|| print(line)),
            None => print(line),
        };
        match result {
            Ok(()) => {}
            Err(Failure::ClosedPipe) => self.deaf = true,
            // The next line is tried again: a disk may get space.
            Err(failure) if !self.warned => {
                self.warned = true;
                let warn = || writeln!(stderr(), "xt: {failure}; training continues, but log lines are lost");
                // Where standard error is gone too, nobody is there to tell.
                let _ = match &self.bar {
                    Some(bar) => bar.suspend(warn),
                    None => warn(),
                };
            }
            Err(_) => {}
        }
    }

    /// Takes the bar away.
    pub fn finish(&mut self) {
        if let Some(bar) = self.bar.take() {
            bar.finish_and_clear();
        }
    }

    /// The time since the start.
    pub fn elapsed(&self) -> Duration {
        self.started.elapsed()
    }

    /// The time that the rest will take at the present mean speed, validations included.
    fn left(&self, done: u64) -> Duration {
        let so_far = done.saturating_sub(self.first).max(1) as f64;
        self.elapsed().mul_f64(self.steps.saturating_sub(done) as f64 / so_far)
    }
}

impl Drop for Progress {
    /// An error message must not be overdrawn by the bar.
    fn drop(&mut self) {
        self.finish();
    }
}

/// The most memory that this process has held on the CPU, or tensors on another device.
pub fn peak_memory(device: &Device) -> u64 {
    let tensors = device.memory().peak as u64;
    match device {
        Device::Cpu => resident_peak().unwrap_or(tensors),
        _ => tensors,
    }
}

/// The high-water mark of resident memory, where Linux tells it.
pub fn resident_peak() -> Option<u64> {
    let status = std::fs::read_to_string("/proc/self/status").ok()?;
    let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:"))?;
    Some(line.trim().strip_suffix(" kB")?.parse::<u64>().ok()? * 1024)
}

/// A number with three digits and the letter of its thousands.
pub struct Short(pub f64);

impl fmt::Display for Short {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (digits, letter) = thousands(self.0);
        write!(f, "{digits}{letter}")
    }
}

/// Floating-point operations.
pub fn operations(count: f64) -> String {
    let (digits, letter) = thousands(count);
    format!("{digits} {letter}FLOP")
}

fn thousands(number: f64) -> (String, &'static str) {
    let scales = [("P", 1e15), ("T", 1e12), ("G", 1e9), ("M", 1e6), ("k", 1e3)];
    let Some((letter, scale)) = scales.into_iter().find(|(_, scale)| number >= 0.9995 * scale) else {
        return (format!("{number:.0}"), "");
    };
    let value = number / scale;
    let digits = if value >= 99.95 {
        0
    } else if value >= 9.995 {
        1
    } else {
        2
    };
    (format!("{value:.digits$}"), letter)
}

/// Bytes in binary units.
pub fn bytes(count: u64) -> String {
    let count = count as f64;
    for (unit, size) in [("GiB", 1u64 << 30), ("MiB", 1 << 20), ("KiB", 1 << 10)] {
        let value = count / size as f64;
        if value >= 1.0 {
            return if value >= 100.0 { format!("{value:.0} {unit}") } else { format!("{value:.1} {unit}") };
        }
    }
    format!("{count} bytes")
}

/// Hours, minutes and seconds, the first two that are not zero.
pub fn duration(time: Duration) -> String {
    let seconds = time.as_secs_f64().round() as u64;
    match (seconds / 3600, seconds / 60 % 60, seconds % 60) {
        (0, 0, s) => format!("{s}s"),
        (0, m, s) => format!("{m}m {s:02}s"),
        (h, m, _) => format!("{h}h {m:02}m"),
    }
}

#[cfg(test)]
mod tests {
    use super::{Short, bytes, duration, resident_peak};
    use std::time::Duration;

    #[test]
    fn figures_are_short() {
        let shown: Vec<String> =
            [0.0, 12.4, 999.0, 999.7, 12_345.0, 234_567.0, 1.5e6, 99.97e9].map(|x| Short(x).to_string()).into();
        assert_eq!(shown, ["0", "12", "999", "1.00k", "12.3k", "235k", "1.50M", "100G"]);
        assert_eq!(
            [0, 1023, 1536, 200 << 20, 3 << 30].map(bytes),
            ["0 bytes", "1023 bytes", "1.5 KiB", "200 MiB", "3.0 GiB"]
        );
        assert_eq!(
            [0, 59, 61, 3600, 7325].map(|s| duration(Duration::from_secs(s))),
            ["0s", "59s", "1m 01s", "1h 00m", "2h 02m"]
        );
    }

    #[test]
    #[cfg(target_os = "linux")]
    fn the_peak_is_at_least_what_is_held() {
        let held = std::hint::black_box(vec![1u8; 64 << 20]);
        assert!(resident_peak().is_some_and(|peak| peak >= held.len() as u64));
    }
}
