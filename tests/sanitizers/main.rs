//! The program that `scripts/check-sanitizers` runs: THREADS ROUNDS.

mod work;

fn main() -> x_transformers::Result<()> {
    let number =
        |at: usize, default: usize| std::env::args().nth(at).and_then(|text| text.parse().ok()).unwrap_or(default);
    work::run(number(1, 16), number(2, 4))
}
