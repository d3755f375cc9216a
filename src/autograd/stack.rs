//! Remaining stack of the current thread, for recursion whose depth is up to the caller.

use std::cell::Cell;

/// Number of bytes that a thread may use from its first query on if the system does not report the bounds of its stack.
const ASSUMED: usize = 512 << 10;

thread_local! {
    /// The lowest address and the size of the stack.
    static BOUNDS: Cell<Option<(usize, usize)>> = const { Cell::new(None) };
}

/// Returns `true` if at least `room` bytes are left, or a quarter of a small stack.
pub(super) fn has(room: usize) -> bool {
    let here = here();
    let (low, size) = BOUNDS.get().unwrap_or_else(|| {
        let bounds = bounds(here).unwrap_or((here.saturating_sub(ASSUMED), ASSUMED));
        BOUNDS.set(Some(bounds));
        bounds
    });
    here.saturating_sub(low) >= room.min(size / 4)
}

/// Returns an address in the current stack frame.
#[inline(never)]
fn here() -> usize {
    let local = 0u8;
    std::hint::black_box(&raw const local).addr()
}

/// Reads the mapping that contains an address of the stack.
fn bounds(here: usize) -> Option<(usize, usize)> {
    let maps = std::fs::read_to_string("/proc/self/maps").ok()?;
    let limits = || std::fs::read_to_string("/proc/self/limits").ok();
    mapping(&maps, here, limits)
}

/// Like [`bounds`], but from the text of the files.
fn mapping(maps: &str, here: usize, limits: impl Fn() -> Option<String>) -> Option<(usize, usize)> {
    let mut before = 0;
    for line in maps.lines() {
        let (start, rest) = line.split_once('-')?;
        let (end, rest) = rest.split_once(' ')?;
        let (start, end) = (usize::from_str_radix(start, 16).ok()?, usize::from_str_radix(end, 16).ok()?);
        if (start..end).contains(&here) {
            let low = match rest.ends_with("[stack]") {
                // The main thread's stack grows downwards until its limit, or the mapping below.
                true => end.saturating_sub(soft_limit(&limits()?).unwrap_or(1 << 30)).max(before).min(start),
                false => start,
            };
            return Some((low, end - low));
        }
        before = end;
    }
    None
}

/// Returns the limit of the main thread's stack in bytes; `None` if there is none.
fn soft_limit(limits: &str) -> Option<usize> {
    let line = limits.lines().find_map(|line| line.strip_prefix("Max stack size"))?;
    line.split_whitespace().next()?.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn stack_bounds_are_read() {
        let maps = "55d000-55e000 r--p 00000000 00:00 0 /bin/x\n\
                    7f0000000000-7f0000001000 ---p 00000000 00:00 0\n\
                    7f0000001000-7f0000201000 rw-p 00000000 00:00 0\n\
                    7ffff0000000-7ffff0021000 rw-p 00000000 00:00 0 [stack]\n";
        let limits = |text: &'static str| move || Some(format!("Limit Soft Hard\nMax stack size {text} bytes\n"));
        assert_eq!(mapping(maps, 0x7f00_0010_0000, || None), Some((0x7f00_0000_1000, 2 << 20)));
        let end = 0x7fff_f002_1000;
        assert_eq!(mapping(maps, end - 100, limits("8388608 unlimited")), Some((end - (8 << 20), 8 << 20)));
        assert_eq!(mapping(maps, end - 100, limits("unlimited unlimited")), Some((end - (1 << 30), 1 << 30)));
        // Never above what is mapped already.
        assert_eq!(mapping(maps, end - 100, limits("4096 4096")), Some((end - 0x21000, 0x21000)));
        assert_eq!(mapping(maps, 0x1000, || None), None);
        assert_eq!(mapping("something else", 0x1000, || None), None);
    }

    /// A thread knows its own stack, and using it up is noticed in time.
    #[test]
    fn stack_runs_out() {
        fn down(levels: usize, room: usize) -> usize {
            let frame = std::hint::black_box([0u8; 1000]);
            if !has(room) {
                return levels;
            }
            let deepest = down(levels + 1, room);
            std::hint::black_box(frame);
            deepest
        }
        for size in [512 << 10, 2 << 20] {
            let room = 64 << 10;
            let thread = std::thread::Builder::new().stack_size(size).spawn(move || down(0, room));
            let levels = thread.unwrap().join().unwrap();
            assert!(levels > 100 && levels < size / 1000, "{levels} levels of {size} bytes");
        }
    }
}
