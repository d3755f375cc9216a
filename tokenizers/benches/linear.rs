//! Seconds that a core computes for one and two megabytes of text, most of them without a space, with their ratio:
//! `cargo bench -p x-transformers-tokenizers`. The ratio stays below 2.5 for every model.

#[path = "../tests/common/models.rs"]
mod models;

fn main() {
    println!("{:<28}{:<12}{:>8}{:>8}{:>8}", "tokenizer", "text", "1 MB", "2 MB", "ratio");
    let mut worst: f64 = 0.0;
    for (name, tokenizer) in models::all() {
        for (kind, text) in models::texts(2 << 20) {
            let seconds = |bytes: usize| {
                let text = &text[..text.floor_char_boundary(bytes)];
                let once = |_| {
                    let start = models::computed();
                    std::hint::black_box(tokenizer.encode(text).unwrap());
                    models::computed() - start
                };
                (0..3).map(once).fold(f64::INFINITY, f64::min)
            };
            let (one, two) = (seconds(1 << 20), seconds(2 << 20));
            println!("{name:<28}{kind:<12}{one:>8.3}{two:>8.3}{:>8.2}", two / one);
            worst = worst.max(two / one);
        }
    }
    println!("worst ratio {worst:.2}");
    assert!(worst < 2.5, "a text twice as long takes {worst:.2} times as long");
}
