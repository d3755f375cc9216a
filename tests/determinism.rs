//! The same bits for any number of threads, in every run, with and without recomputation.

use x_transformers::{
    DType, Device, Philox, QuantType, Result, Tape, Tensor, checkpoint,
    ops::{Activation, AttentionSpec, PackedMatrix, attention},
};

const CPU: Device = Device::Cpu;

fn random(shape: &[usize], dtype: DType, stream: u64) -> Tensor {
    let random = Philox::new(21, stream);
    Tensor::generate(shape, dtype, &CPU, |i| random.normal(i as u64)).unwrap()
}

/// Runs `f` on its own pool.
fn on<R: Send>(threads: usize, f: impl FnOnce() -> R + Send) -> R {
    rayon::ThreadPoolBuilder::new().num_threads(threads).build().expect("a thread pool").install(f)
}

type Op = fn(&[Tensor]) -> Result<Tensor>;

/// Output and gradients.
fn run(op: Op, inputs: &[Tensor]) -> Result<Vec<Vec<f64>>> {
    let leaves: Vec<Tensor> = inputs.iter().map(Tensor::requires_grad).collect::<Result<_>>()?;
    let mut tape = Tape::train(4);
    let y = op(&leaves)?;
    let grads = tape.backward_with(&y, &random(y.shape(), y.dtype(), 9))?;
    let mut all = vec![y.to_f64_vec()?];
    for leaf in &leaves {
        all.push(grads.get(leaf).expect("a gradient").to_f64_vec()?);
    }
    Ok(all)
}

/// Sizes that split into many tasks with a remainder.
#[test]
fn ops_give_the_same_bits_for_any_number_of_threads() -> Result<()> {
    let ops: [(&str, Op, &[&[usize]]); 18] = [
        ("sum of all", |x| x[0].sum(&[]), &[&[313, 1001]]),
        ("sum of columns", |x| x[0].sum(&[0]), &[&[1313, 301]]),
        ("sum of few columns", |x| x[0].sum(&[0]), &[&[100_003, 3]]),
        ("sum of rows", |x| x[0].sum(&[-1]), &[&[1313, 301]]),
        ("sum of long rows", |x| x[0].sum(&[-1]), &[&[3, 100_003]]),
        ("sum of the middle", |x| x[0].sum(&[1]), &[&[31, 127, 83]]),
        ("sum around the middle", |x| x[0].sum(&[0, 2]), &[&[31, 127, 83]]),
        ("mean", |x| x[0].mean(&[]), &[&[313, 1001]]),
        ("max", |x| x[0].max(1), &[&[31, 127, 83]]),
        ("softmax", |x| x[0].softmax(), &[&[313, 501]]),
        (
            "copies",
            |x| Tensor::cat(&[&x[0].permute(&[2, 0, 1])?.contiguous()?, &x[1]], 0),
            &[&[61, 47, 33], &[5, 61, 47]],
        ),
        ("broadcast product", |x| x[0].mul(&x[1]), &[&[313, 1, 401], &[7, 1]]),
        ("broadcast quotient", |x| x[0].div(&x[1].square()?.affine(1.0, 1.0)?), &[&[401], &[313, 401]]),
        ("gelu", |x| x[0].gelu(), &[&[100_003]]),
        ("matmul", |x| x[0].matmul(&x[1]), &[&[3, 129, 257], &[257, 131]]),
        ("linear", |x| x[0].linear(&x[1], Some(&x[2])), &[&[3, 129, 257], &[131, 257], &[131]]),
        (
            "attention",
            |x| {
                let spec = AttentionSpec { scale: 0.2, causal: true, dropout: 0.1, ..Default::default() };
                attention(&x[0], &x[1], &x[2], &spec)
            },
            &[&[2, 3, 201, 24], &[2, 3, 233, 24], &[2, 3, 233, 24]],
        ),
        ("dropout", |x| x[0].dropout(0.3), &[&[100_003]]),
    ];
    for dtype in [DType::F32, DType::BF16] {
        for (name, op, shapes) in ops {
            let inputs: Vec<Tensor> = (0..).zip(shapes).map(|(i, shape)| random(shape, dtype, i)).collect();
            let one = on(1, || run(op, &inputs))?;
            for threads in 2..=16 {
                assert!(on(threads, || run(op, &inputs))? == one, "{name} {dtype}: other bits with {threads} threads");
            }
        }
    }
    Ok(())
}

/// Products with packed weights of every type, of one row, few and many, and their gradients.
#[test]
fn packed_weights_give_the_same_bits_for_any_number_of_threads() -> Result<()> {
    for kind in QuantType::ALL.into_iter().filter(|kind| kind.is_packed()) {
        let weight = PackedMatrix::quantize(&random(&[517, 512], DType::F32, 1), kind)?;
        for rows in [1, 3, 40] {
            let x = random(&[rows, 512], DType::F32, 2);
            let run = || -> Result<Vec<Vec<f64>>> {
                let leaf = x.requires_grad()?;
                let mut tape = Tape::train(4);
                let y = weight.linear(&leaf, None)?;
                let grads = tape.backward_with(&y, &random(y.shape(), y.dtype(), 9))?;
                Ok(vec![y.to_f64_vec()?, grads.get(&leaf).expect("a gradient").to_f64_vec()?])
            };
            let one = on(1, run)?;
            for threads in 2..=16 {
                assert!(on(threads, run)? == one, "{kind}, {rows} rows: other bits with {threads} threads");
            }
        }
    }
    Ok(())
}

/// A layer of a transformer with a loss, its blocks recomputed if asked: the loss and every gradient.
fn step(seed: u64, recompute: bool) -> Result<Vec<Vec<f64>>> {
    const DIM: usize = 48;
    let shapes: [&[usize]; 7] =
        [&[71, DIM], &[DIM], &[3 * DIM, DIM], &[DIM, DIM], &[DIM], &[8 * DIM, DIM], &[DIM, 4 * DIM]];
    let weights: Vec<Tensor> = (0..)
        .zip(shapes)
        .map(|(i, shape)| random(shape, DType::F32, i).affine(0.1, 0.0)?.requires_grad())
        .collect::<Result<_>>()?;
    let draw = Philox::new(3, 0);
    let tokens = Tensor::generate([2, 67], DType::I64, &CPU, |i| draw.below(i as u64, 71) as f64)?;

    let attend = {
        let (gain, qkv, out) = (weights[1].clone(), weights[2].clone(), weights[3].clone());
        move |x: &[Tensor]| -> Result<Tensor> {
            let heads = |x: &Tensor| x.reshape([2, 67, 4, DIM / 4])?.transpose(1, 2);
            let parts = x[0].clamped_rms_norm(&gain, 1e-8)?.linear(&qkv, None)?.chunk(3, -1)?;
            let spec = AttentionSpec { scale: 0.3, causal: true, dropout: 0.1, ..Default::default() };
            let y = attention(&heads(&parts[0])?, &heads(&parts[1])?, &heads(&parts[2])?, &spec)?;
            x[0].add(&y.transpose(1, 2)?.reshape([2, 67, DIM])?.linear(&out, None)?.dropout(0.1)?)
        }
    };
    let feed = {
        let (gain, up, down) = (weights[4].clone(), weights[5].clone(), weights[6].clone());
        move |x: &[Tensor]| -> Result<Tensor> {
            let y = x[0].clamped_rms_norm(&gain, 1e-8)?.linear(&up, None)?.glu(Activation::Gelu)?.dropout(0.2)?;
            x[0].add(&y.linear(&down, None)?)
        }
    };
    let mut tape = Tape::train(seed);
    let x = weights[0].embedding(&tokens)?.dropout(0.1)?;
    let x = if recompute { checkpoint(attend, &[&x])? } else { attend(&[x])? };
    let x = if recompute { checkpoint(feed, &[&x])? } else { feed(&[x])? };
    let loss = x.dropout(0.05)?.linear(&weights[0], None)?.cross_entropy(&tokens, -100)?;
    let grads = tape.backward(&loss)?;
    let mut all = vec![loss.to_f64_vec()?];
    for weight in &weights {
        all.push(grads.get(weight).expect("a gradient").to_f64_vec()?);
    }
    assert!(all.iter().flatten().all(|x| x.is_finite()));
    Ok(all)
}

#[test]
fn a_training_step_gives_the_same_bits_for_any_number_of_threads() -> Result<()> {
    let one = on(1, || step(5, false))?;
    for threads in 2..=16 {
        assert!(on(threads, || step(5, false))? == one, "{threads} threads");
    }
    Ok(())
}

#[test]
fn recomputation_changes_no_bit() -> Result<()> {
    assert!(step(5, true)? == step(5, false)?);
    Ok(())
}

#[test]
fn the_seed_decides_the_masks() -> Result<()> {
    assert!(step(6, false)? == step(6, false)?);
    assert!(step(6, false)? != step(5, false)?);
    Ok(())
}

/// Threads that work at the same time share one pool of workers, but no tapes.
#[test]
fn steps_at_the_same_time_do_not_disturb_each_other() -> Result<()> {
    let alone: Vec<_> = (0..4).map(|seed| step(seed, seed % 2 == 0)).collect::<Result<_>>()?;
    std::thread::scope(|scope| {
        let threads: Vec<_> = (0..4).map(|seed| scope.spawn(move || step(seed, seed % 2 == 0))).collect();
        for (thread, alone) in threads.into_iter().zip(&alone) {
            assert!(thread.join().expect("no panic")? == *alone);
        }
        Ok(())
    })
}

/// A worker that waits inside an op may be given another step: the tapes nest and separate again.
#[test]
fn steps_on_the_workers_themselves() -> Result<()> {
    use rayon::prelude::*;
    let alone: Vec<_> = (0..6).map(|seed| step(seed, false)).collect::<Result<_>>()?;
    let together: Vec<_> = on(3, || (0..6).into_par_iter().map(|seed| step(seed, false)).collect::<Result<_>>())?;
    for (seed, (alone, together)) in alone.iter().zip(&together).enumerate() {
        assert!(alone == together, "step {seed}");
    }
    Ok(())
}
