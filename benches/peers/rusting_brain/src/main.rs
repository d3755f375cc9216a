//! A decoder in rusting_brain as near to x-transformers' plain shape as it has one, one step for each line of standard
//! input.
//!
//! `rusting-brain-peer train BATCH LENGTH VOCABULARY`: width 512, depth 6, 8 heads of 64, all of them with keys and values
//! of their own, no experts. Its feedforward is SwiGLU, so 1360 hidden features of three matrices stand for 2048 of two; it
//! has rotary positions, RMSNorm and no biases. It predicts the tokens of a sequence but the first, one fewer than the
//! others. Prints a line of JSON with the seconds of each step, and at the end of the input one with the peak of
//! resident memory. Its products take their number of threads from `MATMUL_NUM_THREADS`.

use std::{error::Error, io::BufRead, time::Instant};

use rusting_brain::{Optimizer, TokenBatch, TransformerLm};

fn peak() -> Option<u64> {
    let status = std::fs::read_to_string("/proc/self/status").ok()?;
    let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:"))?;
    Some(line.trim().strip_suffix(" kB")?.parse::<u64>().ok()? * 1024)
}

fn main() -> Result<(), Box<dyn Error>> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let number = |index: usize| arguments.get(index).and_then(|text| text.parse::<usize>().ok()).unwrap_or(1);
    if arguments.first().is_none_or(|mode| mode != "train") {
        return Err("only `train` is measured".into());
    }
    let (batch, length, vocabulary) = (number(1), number(2), number(3));
    let mut model = TransformerLm::builder()
        .vocab_size(vocabulary)
        .d_model(512)
        .n_layers(6)
        .heads(8, 8, 64)
        .d_ff(1360)
        .moe_layers([])
        .tie_embeddings(false)
        .max_seq_len(length)
        .mixed_precision(false)
        .optimizer(Optimizer::adam_with_weight_decay(1e-4, 0.01))
        .seed(0)
        .build()?;
    let token = |i: usize| (i as u64 * 2654435761 % vocabulary as u64) as u32;
    let rows: Vec<Vec<u32>> = (0..batch).map(|row| (0..length).map(|i| token(row * length + i)).collect()).collect();
    let tokens = TokenBatch::new(&rows)?;
    for line in std::io::stdin().lock().lines() {
        line?;
        let clock = Instant::now();
        model.train_step_batch(&tokens)?;
        println!("{{\"seconds\": {}}}", clock.elapsed().as_secs_f64());
    }
    println!("{{\"peak_resident_bytes\": {}}}", peak().unwrap_or(0));
    Ok(())
}
