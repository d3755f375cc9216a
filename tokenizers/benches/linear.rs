//! CPU seconds for one and two megabytes of text, most of it without a space, with their ratio:
//! `cargo bench -p x-transformers-tokenizers`. The ratio must stay below 2.5 for every model. `-- --test` takes
//! kilobytes, once.

#[path = "../tests/common/models.rs"]
mod models;

fn main() {
    let test = std::env::args().any(|argument| argument == "--test");
    let (size, rounds) = if test { (1 << 10, 1) } else { (1 << 20, 3) };
    println!("{:<28}{:<12}{:>8}{:>8}{:>8}", "tokenizer", "text", "1 MB", "2 MB", "ratio");
    let mut worst: f64 = 0.0;
    for (name, tokenizer) in models::all() {
        for (kind, text) in models::texts(2 * size) {
            let seconds = |bytes: usize| {
                let text = &text[..text.floor_char_boundary(bytes)];
                let once = |_| {
                    let start = models::computed();
                    std::hint::black_box(tokenizer.encode(text).unwrap());
                    models::computed() - start
                };
                (0..rounds).map(once).fold(f64::INFINITY, f64::min)
            };
            let (one, two) = (seconds(size), seconds(2 * size));
            println!("{name:<28}{kind:<12}{one:>8.3}{two:>8.3}{:>8.2}", two / one);
            worst = worst.max(two / one);
        }
    }
    println!("worst ratio {worst:.2}");
}
