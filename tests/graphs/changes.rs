//! Trainers whose steps are recorded, while their weights are frozen, profiled, averaged or read by other threads.

use std::{
    sync::atomic::{AtomicBool, Ordering},
    thread,
};

use x_transformers::{
    DType, Device, Result, Tensor,
    profile::Profile,
    train::{BatchRequest, BatchSource, DataPrint, TokenBatch, TrainOptions, Trainer},
};

use super::trainer::{Rows, Trace, config, options, run, same, saved};
use crate::common::gpu;

/// Parameters that are frozen and thawed between steps, as in gradual unfreezing.
#[test]
fn frozen_and_thawed_weights_are_those_of_eager_runs() -> Result<()> {
    let Some(gpu) = gpu("frozen_and_thawed_weights_are_those_of_eager_runs") else { return Ok(()) };
    let mut traces = Vec::new();
    for graphs in [false, true] {
        let mut trainer = Trainer::new(config(0.2), options(DType::F32), Rows::default(), &gpu)?;
        trainer.set_graphs(graphs);
        let mut reports = Vec::new();
        run(&mut trainer, 4, &mut reports)?;
        let freeze = |trainer: &Trainer, frozen: bool| {
            let (_, param) = trainer.params().iter().nth(3).unwrap();
            param.set_requires_grad(!frozen);
            param.tensor().to_vec::<f32>()
        };
        let before = freeze(&trainer, true)?;
        run(&mut trainer, 6, &mut reports)?;
        assert_eq!((trainer.has_graph(), trainer.eager_reasons().len()), (graphs, usize::from(graphs)));
        assert_eq!(before, freeze(&trainer, false)?, "a frozen parameter was updated");
        run(&mut trainer, 9, &mut reports)?;
        assert_ne!(before, freeze(&trainer, false)?, "a thawed parameter was not updated");
        assert_eq!(trainer.has_graph(), graphs);
        traces.push(Trace { reports, files: saved(&trainer)? });
    }
    same(&traces[0], &traces[1], "frozen weights");
    Ok(())
}

/// Averages that somebody holds get another place in an eager step; a graph must not go on writing to the old one.
#[test]
fn averages_that_were_moved_by_a_profiled_step_are_recorded_again() -> Result<()> {
    let Some(gpu) = gpu("averages_that_were_moved_by_a_profiled_step_are_recorded_again") else { return Ok(()) };
    let options = TrainOptions { ema_decay: Some(0.5), ..options(DType::F32) };
    let mut traces = Vec::new();
    for graphs in [false, true] {
        let mut trainer = Trainer::new(config(0.0), options.clone(), Rows::default(), &gpu)?;
        trainer.set_graphs(graphs);
        let mut reports = Vec::new();
        run(&mut trainer, 4, &mut reports)?;
        let averages = trainer.evaluate(|_| Ok(trainer.params().state_dict()))?;
        let profile = Profile::start();
        run(&mut trainer, 5, &mut reports)?;
        drop(profile);
        drop(averages);
        run(&mut trainer, 9, &mut reports)?;
        assert_eq!(trainer.has_graph(), graphs);
        traces.push(Trace { reports, files: saved(&trainer)? });
    }
    same(&traces[0], &traces[1], "moved averages");
    Ok(())
}

/// Rows of which a part is masked; of one step's batch everything.
#[derive(Clone, Copy)]
struct Masked;

impl BatchSource for Masked {
    type Batch = TokenBatch;

    fn batch(&self, request: &BatchRequest) -> Result<TokenBatch> {
        let batch = Rows::default().batch(request)?;
        let shape = *batch.tokens.shape();
        let counts =
            |at: usize| (request.step != 5 || request.micro != 0) && !(at as u64 + request.step).is_multiple_of(3);
        let mask = (0..batch.tokens.numel()).map(counts).collect();
        batch.with_loss_mask(Tensor::from_vec(mask, shape, &Device::Cpu)?)
    }

    fn validation_batches(&self, request: &BatchRequest) -> Result<Vec<TokenBatch>> {
        Rows::default().validation_batches(request)
    }

    fn check(&self, _: &BatchRequest) -> Result<()> {
        Ok(())
    }

    fn print(&self) -> Result<DataPrint> {
        Ok(DataPrint::new("masked", 0, 1))
    }
}

/// Masks are inputs of the graph, and a batch of which no target counts runs without it.
#[test]
fn masked_batches_are_those_of_eager_runs() -> Result<()> {
    let Some(gpu) = gpu("masked_batches_are_those_of_eager_runs") else { return Ok(()) };
    let options = TrainOptions { accumulate: 2, ..options(DType::F32) };
    let mut traces = Vec::new();
    for graphs in [false, true] {
        let mut trainer = Trainer::new(config(0.2), options.clone(), Masked, &gpu)?;
        trainer.set_graphs(graphs);
        let mut reports = Vec::new();
        run(&mut trainer, 9, &mut reports)?;
        assert_eq!((trainer.has_graph(), trainer.eager_reasons().len()), (graphs, usize::from(graphs)));
        traces.push(Trace { reports, files: saved(&trainer)? });
    }
    same(&traces[0], &traces[1], "masked batches");
    Ok(())
}

/// Weights that another thread has read stay what they were, whatever the moment.
#[test]
fn weights_that_another_thread_reads_do_not_change() -> Result<()> {
    let Some(gpu) = gpu("weights_that_another_thread_reads_do_not_change") else { return Ok(()) };
    let options = TrainOptions { steps: 40, ..options(DType::F32) };
    let mut trainer = Trainer::new(config(0.0), options, Rows::default(), &gpu)?;
    let (params, done) = (trainer.params().clone(), AtomicBool::new(false));
    thread::scope(|scope| {
        let reader = scope.spawn(|| -> Result<usize> {
            let mut read = 0;
            while !done.load(Ordering::Relaxed) {
                let kept = params.state_dict();
                let values = || kept.values().map(|value| value.to_vec::<f32>()).collect::<Result<Vec<_>>>();
                let before = values()?;
                thread::yield_now();
                assert!(before == values()?, "a step wrote to weights that were read");
                drop(kept);
                // Leaves the trainer time for steps that nothing shares.
                thread::sleep(std::time::Duration::from_millis(30));
                read += 1;
            }
            Ok(read)
        });
        let ran = run(&mut trainer, 40, &mut Vec::new());
        done.store(true, Ordering::Relaxed);
        assert!(reader.join().unwrap()? > 0);
        ran
    })
}
