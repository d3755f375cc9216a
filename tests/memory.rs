//! Memory: copies, buffers kept and freed, and the needs of a backward pass.

use std::{
    cell::Cell,
    rc::Rc,
    sync::{Mutex, MutexGuard},
};

use x_transformers::{
    Backward, DType, Device, InputGrads, ParamStore, Result, Tape, Tensor, checkpoint,
    config::{AttentionConfig, AttentionLayersConfig, AutoregressiveConfig, TransformerWrapperConfig},
    models::{AutoregressiveWrapper, ForwardOptions},
    ops::{AttentionSpec, attention},
    record,
    train::{AdamW, AdamWOptions, Optimizer},
};

const CPU: Device = Device::Cpu;
const MIB: usize = 1 << 20;

/// The counters belong to the process, so one test runs at a time.
fn alone() -> MutexGuard<'static, ()> {
    static ALONE: Mutex<()> = Mutex::new(());
    let guard = ALONE.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
    CPU.set_cache_limit(2 << 30);
    CPU.trim();
    CPU.reset_peak_memory();
    guard
}

fn live() -> usize {
    CPU.memory().live
}

/// A tensor of one MiB.
fn mebibyte() -> Tensor {
    Tensor::generate([512, 512], DType::F32, &CPU, |i| (i % 1000) as f64 / 1000.0).unwrap()
}

/// Returns the peak of bytes in use during a call, above those in use before.
fn peak_of<R>(f: impl FnOnce() -> R) -> (R, usize) {
    let before = live();
    CPU.reset_peak_memory();
    let result = f();
    (result, CPU.memory().peak - before)
}

#[test]
fn views_copy_nothing() -> Result<()> {
    let _alone = alone();
    let x = mebibyte();
    let (views, peak) = peak_of(|| -> Result<_> {
        Ok([
            x.clone(),
            x.detach(),
            x.reshape([2, 256, 512])?,
            x.transpose(0, 1)?,
            x.permute(&[1, 0])?,
            x.narrow(0, 3, 100)?,
            x.select(1, 7)?,
            x.expand([50, 512, 512])?,
            x.unsqueeze(0)?.squeeze(0)?,
            x.flatten(0, 1)?,
            x.contiguous()?,
            x.to_dtype(DType::F32)?,
            x.chunk(4, 0)?.swap_remove(3),
        ])
    });
    assert_eq!(peak, 0);
    let start = live();
    drop(x);
    assert_eq!(live(), start, "views keep the storage");
    drop(views?);
    assert!(start - live() >= MIB, "the last one gives it back");
    Ok(())
}

#[test]
fn an_op_allocates_only_its_output() -> Result<()> {
    let _alone = alone();
    let x = mebibyte();
    type Op = fn(&Tensor) -> Result<Tensor>;
    let ops: [(&str, Op); 8] = [
        ("contiguous", |x| x.transpose(0, 1)?.contiguous()),
        ("softmax", |x| x.softmax()),
        ("affine", |x| x.affine(2.0, 1.0)),
        ("add", |x| x.add(&x.select(0, 3)?)),
        ("mul of strided tensors", |x| x.mul(&x.transpose(0, 1)?)),
        ("masked_fill", |x| x.masked_fill(&Tensor::scalar(true, &CPU)?, 1.0)),
        ("cat", |x| Tensor::cat(&[&x.narrow(0, 0, 200)?, &x.narrow(0, 200, 312)?], 0)),
        ("gelu", |x| x.gelu()),
    ];
    for (name, op) in ops {
        let (y, peak) = peak_of(|| op(&x));
        assert_eq!(y?.numel(), x.numel());
        // Some bytes for scalars.
        assert!((MIB..MIB + 1024).contains(&peak), "{name} had {peak} bytes in use");
    }
    let (_, peak) = peak_of(|| x.sum(&[0]));
    assert!(peak <= 4096, "a sum of rows had {peak} bytes in use");
    Ok(())
}

#[test]
fn empty_tensors_take_no_memory() -> Result<()> {
    let _alone = alone();
    let (_, peak) = peak_of(|| -> Result<()> {
        let x = Tensor::zeros([0, 1 << 40], DType::F64, &CPU)?;
        let _ = x.transpose(0, 1)?.contiguous()?.softmax()?.to_dtype(DType::F32)?;
        Ok(())
    });
    assert_eq!(peak, 0);
    Ok(())
}

#[test]
fn freed_blocks_are_used_again() -> Result<()> {
    let _alone = alone();
    let x = mebibyte();
    let step = || -> Result<()> {
        let leaf = x.requires_grad()?;
        let mut tape = Tape::train(1);
        let y = leaf.matmul(&leaf)?.softmax()?.dropout(0.1)?.gelu()?.transpose(0, 1)?.contiguous()?;
        let loss = y.mul(&leaf)?.mean(&[])?;
        let _ = tape.backward(&loss)?;
        Ok(())
    };
    step()?;
    step()?;
    let (start, after_two) = (live(), CPU.memory());
    for _ in 0..20 {
        step()?;
    }
    let now = CPU.memory();
    assert_eq!(live(), start);
    assert_eq!(now.cached, after_two.cached, "every later step found its blocks");
    assert_eq!(now.peak, after_two.peak);
    Ok(())
}

#[test]
fn the_cache_has_a_limit() -> Result<()> {
    let _alone = alone();
    CPU.set_cache_limit(4 * MIB);
    let tensors: Vec<Tensor> = (0..16).map(|_| mebibyte()).collect();
    let in_use = live();
    drop(tensors);
    let stats = CPU.memory();
    assert!(stats.cached <= 4 * MIB && stats.cached >= 3 * MIB, "{stats:?}");
    assert!(in_use - stats.live >= 16 * MIB);
    CPU.set_cache_limit(2 * MIB);
    assert!(CPU.memory().cached <= 2 * MIB, "a lower limit acts at once");
    CPU.set_cache_limit(0);
    drop(mebibyte());
    assert_eq!(CPU.memory().cached, 0);
    CPU.set_cache_limit(2 << 30);
    drop(mebibyte());
    assert!(CPU.memory().cached >= MIB);
    Ok(())
}

#[test]
fn other_sizes_use_what_is_free() -> Result<()> {
    let _alone = alone();
    let before = live();
    drop((0..128).map(|_| mebibyte()).collect::<Vec<_>>());
    let large = Tensor::zeros([100 * MIB / 4], DType::F32, &CPU)?;
    let stats = CPU.memory();
    let all = stats.live + stats.cached - before;
    // The large one lies where the small ones were.
    assert!((128 * MIB..128 * MIB + 4096).contains(&all), "{all} bytes");
    drop(large);
    Ok(())
}

#[test]
fn trim_releases_only_free_memory() -> Result<()> {
    let _alone = alone();
    let kept = mebibyte();
    drop(mebibyte());
    let before = CPU.memory();
    assert!(before.cached >= MIB);
    CPU.trim();
    let after = CPU.memory();
    assert_eq!((after.cached, after.live), (0, before.live));
    assert_eq!(kept.select(0, 0)?.to_f64_vec()?.len(), 512);
    Ok(())
}

/// Scratch memory that threads keep for products and attention is counted, limited and freed like the rest.
#[test]
fn working_memory_is_counted_and_released() -> Result<()> {
    let _alone = alone();
    assert_eq!(CPU.memory().scratch, 0);
    let half = |shape: [usize; 4]| Tensor::ones(shape, DType::BF16, &CPU);
    let work = || -> Result<()> {
        let (a, b) = (half([2, 8, 300, 40])?, half([2, 8, 40, 5000])?);
        let _ = a.matmul(&b)?;
        let _ = attention(&a, &a, &a, &AttentionSpec::default())?;
        Ok(())
    };
    work()?;
    // Sums of 256 rows for the products, on at least one thread.
    assert!(CPU.memory().scratch >= 256 * 5000 * 4, "{:?}", CPU.memory());
    CPU.trim();
    assert_eq!((CPU.memory().scratch, CPU.memory().cached), (0, 0));
    // A thread frees its own when it ends.
    let pool = rayon::ThreadPoolBuilder::new().num_threads(2).build().expect("a pool of threads");
    pool.install(work)?;
    assert!(CPU.memory().scratch >= 256 * 5000 * 4);
    drop(pool);
    for _ in 0..500 {
        if CPU.memory().scratch == 0 {
            break;
        }
        std::thread::sleep(std::time::Duration::from_millis(10));
    }
    assert_eq!(CPU.memory().scratch, 0);
    // Both kinds together stay below the limit.
    CPU.set_cache_limit(MIB);
    work()?;
    let stats = CPU.memory();
    assert!(stats.scratch + stats.cached <= MIB, "{stats:?}");
    CPU.set_cache_limit(0);
    work()?;
    assert_eq!((CPU.memory().scratch, CPU.memory().cached), (0, 0));
    CPU.set_cache_limit(2 << 30);
    Ok(())
}

#[test]
fn the_peak_is_the_largest_use() -> Result<()> {
    let _alone = alone();
    let base = live();
    drop((mebibyte(), mebibyte(), mebibyte()));
    let peak = CPU.memory().peak;
    assert!((base + 3 * MIB..base + 4 * MIB).contains(&peak), "{peak} over {base}");
    let _ = mebibyte();
    assert_eq!(CPU.memory().peak, peak);
    CPU.reset_peak_memory();
    assert_eq!(CPU.memory().peak, live());
    assert!(Tensor::zeros([1 << 50], DType::F32, &CPU).is_err());
    assert_eq!(CPU.memory().peak, live(), "what was refused was never in use");
    Ok(())
}

#[test]
fn threads_share_the_pool() {
    let _alone = alone();
    let start = live();
    std::thread::scope(|scope| {
        for thread in 0..8u64 {
            scope.spawn(move || {
                let mut held: Vec<(i64, Tensor)> = Vec::new();
                let mut state = thread + 1;
                for round in 0..400 {
                    // A linear congruential generator: sizes from nothing to 64 KiB.
                    state = state.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
                    let (size, mark) = ((state >> 33) as usize % 8192, (thread * 1000 + round) as i64);
                    held.push((mark, Tensor::full([size], mark as f64, DType::I64, &CPU).unwrap()));
                    if held.len() > 16 {
                        let (mark, tensor) = held.swap_remove((state >> 50) as usize % 16);
                        // A block that was allocated twice would hold another thread's mark.
                        assert!(tensor.to_vec::<i64>().unwrap().iter().all(|&value| value == mark));
                    }
                    if round % 100 == 0 {
                        CPU.trim();
                    }
                }
                for (mark, tensor) in held {
                    assert!(tensor.to_vec::<i64>().unwrap().iter().all(|&value| value == mark));
                }
            });
        }
    });
    let stats = CPU.memory();
    assert_eq!(stats.live, start);
    CPU.trim();
    assert_eq!(CPU.memory().cached, 0);
}

#[test]
fn a_tensor_may_die_on_another_thread() {
    let _alone = alone();
    let start = live();
    let tensors: Vec<Tensor> = (0..4).map(|_| mebibyte()).collect();
    std::thread::spawn(move || drop(tensors)).join().unwrap();
    assert_eq!(live(), start);
}

/// An identity that notes the bytes in use when its backward runs.
fn probe(x: &Tensor, seen: &Rc<Cell<usize>>) -> Result<Tensor> {
    struct Probe(Rc<Cell<usize>>);
    impl Backward for Probe {
        fn name(&self) -> &'static str {
            "probe"
        }
        fn backward(self: Box<Self>, grad: Tensor, _need: &[bool]) -> Result<InputGrads> {
            self.0.set(live());
            Ok(InputGrads::one(grad))
        }
    }
    record("probe", x.detach(), &[x], |_| Probe(seen.clone()))
}

#[test]
fn activations_are_freed_while_backward_runs() -> Result<()> {
    let _alone = alone();
    let x = mebibyte().requires_grad()?;
    let (near_leaf, near_loss) = (Rc::new(Cell::new(0)), Rc::new(Cell::new(0)));
    let before = live();
    let mut tape = Tape::grad();
    let mut y = probe(&x, &near_leaf)?;
    for _ in 0..12 {
        // Saves its output.
        y = y.relu()?;
    }
    let loss = probe(&y, &near_loss)?.sum(&[])?;
    drop(y);
    assert!(live() - before >= 12 * MIB, "twelve activations are kept");
    let grads = tape.backward(&loss)?;
    assert!(near_loss.get() - before >= 12 * MIB);
    // Only the gradient is left, and the tensors that the pass is working on.
    assert!(near_leaf.get() - before <= 2 * MIB, "{} bytes in use near the leaf", near_leaf.get() - before);
    drop((grads, loss));
    assert_eq!(live(), before);
    Ok(())
}

#[test]
fn nothing_is_kept_without_a_tape() -> Result<()> {
    let _alone = alone();
    let x = mebibyte().requires_grad()?;
    let (_, peak) = peak_of(|| -> Result<Tensor> {
        let mut y = x.clone();
        for _ in 0..12 {
            y = y.sigmoid()?;
        }
        Ok(y)
    });
    assert!(peak <= 2 * MIB + 1024, "{peak} bytes");
    Ok(())
}

/// Sixteen activations in a row, in segments that are optionally recomputed.
fn deep(x: &Tensor, segments: usize, recompute: bool) -> Result<Tensor> {
    let mut y = x.clone();
    for _ in 0..segments {
        let segment = move |x: &[Tensor]| (0..16 / segments).try_fold(x[0].clone(), |y, _| y.sigmoid()?.dropout(0.1));
        y = if recompute { checkpoint(segment, &[&y])? } else { segment(&[y])? };
    }
    y.sum(&[])
}

#[test]
fn checkpoints_lower_the_peak() -> Result<()> {
    let _alone = alone();
    let x = mebibyte().requires_grad()?;
    let run = |recompute: bool| {
        let (gradient, peak) = peak_of(|| -> Result<_> {
            let mut tape = Tape::train(7);
            let grads = tape.backward(&deep(&x, 4, recompute)?)?;
            Ok(grads.get(&x).unwrap().clone())
        });
        (gradient.unwrap(), peak)
    };
    let ((plain, plain_peak), (recomputed, peak)) = (run(false), run(true));
    assert_eq!(plain.to_f64_vec()?, recomputed.to_f64_vec()?, "the same dropout masks");
    assert!(plain_peak >= 16 * MIB, "{plain_peak}");
    assert!(peak <= 10 * MIB, "{} MiB instead of {}", peak / MIB, plain_peak / MIB);
    Ok(())
}

#[test]
fn slices_add_into_one_gradient() -> Result<()> {
    let _alone = alone();
    let x = mebibyte().requires_grad()?;
    let (grads, peak) = peak_of(|| -> Result<_> {
        let mut tape = Tape::grad();
        let rows = x.chunk(512, 0)?;
        let parts: Vec<Tensor> = rows.iter().map(|row| row.affine(2.0, 0.0)).collect::<Result<_>>()?;
        let loss = Tensor::cat(&parts.iter().collect::<Vec<_>>(), 0)?;
        drop(parts);
        let weights = loss.detach();
        tape.backward_with(&loss, &weights)
    });
    assert_eq!(grads?.get(&x).unwrap().numel(), x.numel());
    // Parts, output, gradient, and single rows: not 512 gradients of full size.
    assert!(peak <= 4 * MIB, "{} MiB", peak / MIB);
    Ok(())
}

#[test]
fn cheap_values_are_recomputed() -> Result<()> {
    let _alone = alone();
    let (x, weight) = (mebibyte().requires_grad()?, mebibyte().affine(0.1, 0.0)?.requires_grad()?);
    let ones = Tensor::ones([512], DType::F32, &CPU)?;
    let inner = || x.layer_norm(Some(&ones), None, 1e-5)?.gelu()?.dropout(0.1);
    let gradient = |product: &dyn Fn(&Tensor) -> Result<Tensor>| -> Result<_> {
        let before = live();
        let mut tape = Tape::train(3);
        let y = product(&inner()?)?;
        let kept = live() - before;
        let grads = tape.backward_with(&y, &y.detach())?;
        Ok((grads.get(&weight).unwrap().to_f64_vec()?, kept))
    };
    let (again, kept) = gradient(&|x| x.linear(&weight, None))?;
    // The output of the norm, which GELU keeps, and that of the product; a few KiB of statistics.
    assert!(kept < 2 * MIB + 65536, "{kept} bytes are kept");
    // A matrix product keeps its operands.
    let (expected, kept) = gradient(&|x| x.matmul(&weight.transpose(0, 1)?))?;
    assert!(kept >= 3 * MIB, "{kept} bytes are kept");
    let scale = expected.iter().fold(0.0f64, |max, value| max.max(value.abs()));
    let error = again.iter().zip(&expected).fold(0.0f64, |max, (a, b)| max.max((a - b).abs()));
    // The two add up the same 512 products, perhaps in another order.
    assert!(error <= 1e-5 * scale, "{error} of {scale}");
    Ok(())
}

/// Bytes at the peak of two training steps on one sequence that the optimizer's state does not account for: for each
/// token, feature and block.
fn activation_bytes(length: usize) -> Result<f64> {
    const DIM: usize = 128;
    const DEPTH: usize = 6;
    let attn = AttentionConfig { dim_head: DIM / 8, ..Default::default() };
    let net = TransformerWrapperConfig {
        num_tokens: 32,
        max_seq_len: length,
        attn_layers: AttentionLayersConfig { attn, ..AttentionLayersConfig::decoder(DIM, DEPTH) },
        ..Default::default()
    };
    let (params, peak) = peak_of(|| -> Result<usize> {
        let store = ParamStore::new(0, DType::F32, &CPU);
        let model = AutoregressiveWrapper::new(&AutoregressiveConfig { net, ..Default::default() }, &store)?;
        let params = store.params();
        let tokens = Tensor::generate([1, length + 1], DType::I64, &CPU, |i| (i % 32) as f64)?;
        let mut optimizer = AdamW::new(AdamWOptions::default())?;
        for step in 0..2 {
            let mut tape = Tape::train(step);
            let loss = model.loss(&tokens, &ForwardOptions::default())?;
            let grads = tape.backward(&loss)?;
            optimizer.step(&params, &grads, 1e-4, Some(1.0))?;
        }
        Ok(params.numel())
    });
    // In f32 the weights and two moments.
    Ok((peak - 3 * 4 * params?) as f64 / (length * DIM * DEPTH) as f64)
}

/// The figure of `cargo bench --bench memory` for a model of dim 512 at 8192 tokens, at sizes for a test: 48 bytes would
/// be 1.21 GB there, and with 0.28 GB for its weights and moments less than 1.5 GB. Of the two statistics that attention
/// keeps for each query and head, the second counts apart: heads of a test are small.
#[test]
fn training_memory_is_linear_in_the_length() -> Result<()> {
    let _alone = alone();
    let (short, long) = (activation_bytes(512)?, activation_bytes(1024)?);
    let statistic = 8.0 * 4.0 / 128.0;
    assert!(long - statistic < 48.0, "{long} bytes per token, feature and block");
    // A matrix of scores, `[heads, n, n]`, would take 21 bytes for the short sequence and 43 for the long one.
    assert!((long - short).abs() < 3.0, "{short} bytes per token, feature and block, {long} for twice the length");
    Ok(())
}
