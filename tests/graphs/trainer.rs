//! Trainers whose steps are recorded: the bits of eager steps, in every way that a run can go.

use std::{
    collections::BTreeMap,
    fs,
    path::PathBuf,
    sync::atomic::{AtomicBool, AtomicU64, Ordering},
    thread,
};

use serde_json::{Value, json};
use x_transformers::{
    DType, Device, Error, ErrorKind, Init, Param, ParamStore, Result, Tensor,
    config::{
        AttentionConfig, AttentionLayersConfig, AutoregressiveConfig, Config, FeedForwardConfig,
        TransformerWrapperConfig,
    },
    train::{
        Batch, BatchRequest, BatchSource, ByteText, DataPrint, GradScaler, OptimizerKind, StepReport, TokenBatch,
        TrainModel, TrainOptions, Trainer,
    },
};

use crate::common::{Gpu, gpu};

/// Folder that is removed at the end of the test.
struct Folder(PathBuf);

impl Folder {
    fn new(name: &str) -> Self {
        let path = std::env::temp_dir().join(format!("xt-graphs-{name}-{}", std::process::id()));
        let _ = fs::remove_dir_all(&path);
        Self(path)
    }
}

impl Drop for Folder {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.0);
    }
}

/// Model with every kind of dropout that graphs hold.
pub(crate) fn config(dropout: f64) -> AutoregressiveConfig {
    let attn_layers = AttentionLayersConfig {
        heads: 2,
        rotary_pos_emb: true,
        attn: AttentionConfig { dropout, ..Default::default() },
        ff: FeedForwardConfig { dropout, ..Default::default() },
        ..AttentionLayersConfig::decoder(32, 2)
    };
    let net = TransformerWrapperConfig { emb_dropout: dropout, ..TransformerWrapperConfig::new(64, 16, attn_layers) };
    AutoregressiveConfig { net, ..Default::default() }
}

pub(crate) fn options(dtype: DType) -> TrainOptions {
    let (steps, warmup, clip) = (9, 3, 0.5);
    TrainOptions { steps, warmup, clip, seq_len: 12, batch_size: 2, dtype, lr: 1e-2, seed: 7, ..Default::default() }
}

/// Rows of pseudo-random tokens below 60; those of some steps are shorter, or have a token that the model lacks.
#[derive(Clone, Copy, Default)]
pub(crate) struct Rows {
    shorter: Option<u64>,
    broken: Option<u64>,
}

impl BatchSource for Rows {
    type Batch = TokenBatch;

    fn batch(&self, request: &BatchRequest) -> Result<TokenBatch> {
        let width = if self.shorter == Some(request.step) { 9 } else { request.seq_len + 1 };
        let token =
            |at: usize| ((at as u64 * 2654435761 + (request.step * 8 + request.micro) * 40503) >> 7) as i64 % 60;
        let mut tokens: Vec<i64> = (0..request.rows * width).map(token).collect();
        if self.broken == Some(request.step) {
            tokens[3] = 99;
        }
        TokenBatch::new(Tensor::from_vec(tokens, [request.rows, width], &Device::Cpu)?)
    }

    fn validation_batches(&self, request: &BatchRequest) -> Result<Vec<TokenBatch>> {
        Ok(vec![Self::default().batch(&BatchRequest { step: 100, ..*request })?])
    }

    fn check(&self, _: &BatchRequest) -> Result<()> {
        Ok(())
    }

    fn print(&self) -> Result<DataPrint> {
        Ok(DataPrint::new("rows", 0, 1))
    }
}

/// Reports of steps, and every file of a checkpoint.
#[derive(PartialEq, Debug)]
pub(crate) struct Trace {
    pub(crate) reports: Vec<StepReport>,
    pub(crate) files: BTreeMap<String, Vec<u8>>,
}

pub(crate) fn saved<M: TrainModel>(trainer: &Trainer<M>) -> Result<BTreeMap<String, Vec<u8>>> {
    static NEXT: AtomicU64 = AtomicU64::new(0);
    let folder = Folder::new(&format!("saved-{}", NEXT.fetch_add(1, Ordering::Relaxed)));
    trainer.save(&folder.0)?;
    let file = |name: &str| (name.to_string(), fs::read(folder.0.join(name)).unwrap());
    Ok(["model.safetensors", "optimizer.safetensors", "training.json"].map(file).into())
}

/// Runs a trainer to a step, and collects the reports.
pub(crate) fn run<M: TrainModel>(trainer: &mut Trainer<M>, until: u64, reports: &mut Vec<StepReport>) -> Result<()> {
    trainer.run(until, &mut |report| {
        reports.push(*report);
        true
    })
}

/// Trains with or without graphs.
fn trained(gpu: &Gpu, options: &TrainOptions, dropout: f64, rows: Rows, graphs: bool) -> Result<(Trace, Trainer)> {
    let mut trainer = Trainer::new(config(dropout), options.clone(), rows, gpu)?;
    trainer.set_graphs(graphs);
    let mut reports = Vec::new();
    run(&mut trainer, options.steps, &mut reports)?;
    Ok((Trace { reports, files: saved(&trainer)? }, trainer))
}

#[track_caller]
pub(crate) fn same(eager: &Trace, replayed: &Trace, what: &str) {
    assert_eq!(eager.reports, replayed.reports, "{what}");
    for (name, bytes) in &eager.files {
        assert!(replayed.files[name] == *bytes, "{what}: {name} differs");
    }
}

/// Dropout of embeddings, attention and feedforwards, clipping, accumulation, moving averages, warm-up and recomputed
/// activations, in every type.
#[test]
fn a_trainer_replays_the_bits_of_eager_steps() -> Result<()> {
    let Some(gpu) = gpu("a_trainer_replays_the_bits_of_eager_steps") else { return Ok(()) };
    for (dtype, dropout, accumulate, ema_decay, recompute) in [
        (DType::F32, 0.2, 1, None, false),
        (DType::F32, 0.0, 3, Some(0.9), false),
        (DType::F32, 0.3, 2, Some(0.5), true),
        (DType::BF16, 0.2, 1, Some(0.9), false),
        (DType::BF16, 0.2, 2, None, false),
        (DType::F16, 0.2, 1, Some(0.9), false),
        (DType::F16, 0.1, 2, None, true),
    ] {
        let what = format!("{dtype}, dropout {dropout}, {accumulate} micro-batches, recompute {recompute}");
        let options = TrainOptions { accumulate, ema_decay, recompute, ..options(dtype) };
        let (eager, _) = trained(&gpu, &options, dropout, Rows::default(), false)?;
        let (replayed, trainer) = trained(&gpu, &options, dropout, Rows::default(), true)?;
        assert!(trainer.has_graph(), "{what}: {:?}", trainer.eager_reasons());
        assert_eq!(trainer.eager_reasons(), [""; 0], "{what}");
        assert!(eager.reports.iter().any(|report| report.grad_norm > options.clip), "{what}: clipping acts");
        same(&eager, &replayed, &what);
        if dropout > 0.0 {
            let (other, _) = trained(&gpu, &options, 0.0, Rows::default(), false)?;
            assert_ne!(other.reports, eager.reports, "{what}: dropout acts");
        }
    }
    Ok(())
}

/// One launch and one read-back a step, of which none waits for the last step.
#[test]
fn a_replayed_step_reads_back_once() -> Result<()> {
    let Some(gpu) = gpu("a_replayed_step_reads_back_once") else { return Ok(()) };
    for (dtype, accumulate) in [(DType::F32, 1), (DType::F16, 2)] {
        let options = TrainOptions { steps: 30, accumulate, ema_decay: Some(0.9), ..options(dtype) };
        let mut trainer = Trainer::new(config(0.1), options, Rows::default(), &gpu)?;
        let mut reports = Vec::new();
        run(&mut trainer, 10, &mut reports)?;
        assert!(trainer.has_graph());
        let before = gpu.transfers();
        run(&mut trainer, 20, &mut reports)?;
        let after = gpu.transfers();
        assert_eq!(after.read_backs - before.read_backs, 10, "{dtype}");
        // The graph, and zeros for the first step's predecessor.
        assert!(after.launches - before.launches <= 11, "{dtype}: {} launches", after.launches - before.launches);
        trainer.set_graphs(false);
        run(&mut trainer, 30, &mut reports)?;
        let eager = gpu.transfers();
        assert!(eager.read_backs - after.read_backs >= 20, "{dtype}");
        assert_eq!(reports.len(), 30);
    }
    Ok(())
}

/// A batch of another shape runs eagerly, and the graph goes on after it; each reason is given once.
#[test]
fn batches_of_other_shapes_run_eagerly() -> Result<()> {
    let Some(gpu) = gpu("batches_of_other_shapes_run_eagerly") else { return Ok(()) };
    for shorter in [5, 8] {
        let rows = Rows { shorter: Some(shorter), ..Rows::default() };
        let options = TrainOptions { ema_decay: Some(0.9), ..options(DType::F32) };
        let (eager, _) = trained(&gpu, &options, 0.2, rows, false)?;
        let (replayed, trainer) = trained(&gpu, &options, 0.2, rows, true)?;
        same(&eager, &replayed, "another shape");
        assert!(trainer.has_graph());
        let [reason] = trainer.eager_reasons() else { panic!("{:?}", trainer.eager_reasons()) };
        assert!(reason.contains("other shapes"), "{reason}");
    }
    Ok(())
}

/// A fault that a kernel reports is the error of its step, which changes nothing; nor does the step enqueued after it.
#[test]
fn a_fault_of_a_replayed_step_changes_nothing() -> Result<()> {
    let Some(gpu) = gpu("a_fault_of_a_replayed_step_changes_nothing") else { return Ok(()) };
    let traces = [false, true].map(|graphs| {
        let rows = Rows { broken: Some(5), ..Rows::default() };
        let mut trainer = Trainer::new(config(0.2), options(DType::F32), rows, &gpu)?;
        trainer.set_graphs(graphs);
        let mut reports = Vec::new();
        let error = run(&mut trainer, 9, &mut reports).unwrap_err();
        assert!(matches!(error.kind(), ErrorKind::Index { index: 99, limit: 64, .. }), "{error}");
        assert_eq!((trainer.steps_done(), trainer.has_graph()), (5, graphs));
        Ok::<_, Error>(Trace { reports, files: saved(&trainer)? })
    });
    let [eager, replayed] = traces;
    same(&eager?, &replayed?, "a fault");
    Ok(())
}

/// A run that is saved, dropped and resumed has the bits of one that was not, with graphs before and after.
#[test]
fn a_replayed_run_resumes_with_the_same_bits() -> Result<()> {
    let Some(gpu) = gpu("a_replayed_run_resumes_with_the_same_bits") else { return Ok(()) };
    for dtype in [DType::F32, DType::F16] {
        let options = TrainOptions { steps: 12, ema_decay: Some(0.9), accumulate: 2, ..options(dtype) };
        let (eager, _) = trained(&gpu, &options, 0.2, Rows::default(), false)?;
        let folder = Folder::new("resumed");
        let mut reports = Vec::new();
        let mut trainer = Trainer::new(config(0.2), options.clone(), Rows::default(), &gpu)?;
        run(&mut trainer, 6, &mut reports)?;
        assert!(trainer.has_graph());
        // Validation swaps weights for averages and back, which graphs survive.
        trainer.validate()?;
        run(&mut trainer, 7, &mut reports)?;
        assert_eq!(trainer.eager_reasons(), [""; 0]);
        trainer.save(&folder.0)?;
        // Lost with the process.
        run(&mut trainer, 9, &mut Vec::new())?;
        drop(trainer);
        let mut trainer: Trainer = Trainer::resume(&folder.0, Rows::default(), &gpu)?;
        run(&mut trainer, 12, &mut reports)?;
        assert!(trainer.has_graph());
        assert_eq!(reports, eager.reports, "{dtype}");
        for name in ["model.safetensors", "optimizer.safetensors"] {
            assert!(saved(&trainer)?[name] == eager.files[name], "{dtype}: {name}");
        }
    }
    Ok(())
}

/// Other threads compute, and train on their own, while a trainer records its step: they wait and see no error.
#[test]
fn threads_wait_while_a_trainer_records() -> Result<()> {
    let Some(gpu) = gpu("threads_wait_while_a_trainer_records") else { return Ok(()) };
    let (eager, _) = trained(&gpu, &options(DType::F32), 0.2, Rows::default(), false)?;
    let done = AtomicBool::new(false);
    thread::scope(|scope| -> Result<()> {
        let busy = scope.spawn(|| -> Result<()> {
            while !done.load(Ordering::Relaxed) {
                let x = Tensor::from_slice(&[1.0f32, 4.0], [2], &gpu)?;
                assert_eq!(x.sqrt()?.to_vec::<f32>()?, [1.0, 2.0]);
            }
            Ok(())
        });
        let trainers =
            [(); 2].map(|()| scope.spawn(|| trained(&gpu, &options(DType::F32), 0.2, Rows::default(), true)));
        let trained = trainers.map(|trainer| trainer.join().expect("no panic"));
        done.store(true, Ordering::Relaxed);
        busy.join().expect("no panic")?;
        for trained in trained {
            let (replayed, trainer) = trained?;
            assert_eq!((trainer.has_graph(), trainer.eager_reasons()), (true, &[][..]));
            same(&eager, &replayed, "beside other threads");
        }
        Ok(())
    })
}

/// The step that was enqueued when `each` asks to stop still counts; nothing is pending afterwards.
#[test]
fn a_run_that_is_stopped_ends_after_the_step_on_its_way() -> Result<()> {
    let Some(gpu) = gpu("a_run_that_is_stopped_ends_after_the_step_on_its_way") else { return Ok(()) };
    let (eager, _) = trained(&gpu, &options(DType::F32), 0.2, Rows::default(), false)?;
    let mut trainer = Trainer::new(config(0.2), options(DType::F32), Rows::default(), &gpu)?;
    let mut reports = Vec::new();
    trainer.run(9, &mut |report| {
        reports.push(*report);
        report.step < 5
    })?;
    assert_eq!((trainer.steps_done(), reports.len()), (7, 7));
    // One step after the other is the same run.
    while trainer.steps_done() < 9 {
        reports.push(trainer.step()?);
    }
    same(&eager, &Trace { reports, files: saved(&trainer)? }, "a stopped run");
    Ok(())
}

/// Steps that a graph cannot hold run eagerly, and say why by the name of the option.
#[test]
fn steps_that_graphs_cannot_hold_run_eagerly() -> Result<()> {
    let Some(gpu) = gpu("steps_that_graphs_cannot_hold_run_eagerly") else { return Ok(()) };
    let two = |layers: Value, more: Value| {
        let mut attn_layers = json!({"kind": "Decoder", "dim": 32, "depth": 2, "heads": 2, "rotary_pos_emb": true});
        let mut config = json!({"version": "2", "model": "AutoregressiveWrapper"});
        for (to, from) in [(&mut attn_layers, layers), (&mut config, more)] {
            to.as_object_mut().unwrap().extend(from.as_object().unwrap().clone());
        }
        config["net"] = json!({"num_tokens": 64, "max_seq_len": 16, "attn_layers": attn_layers});
        Config::from_value(config)
    };
    let lion = TrainOptions { optimizer: OptimizerKind::Lion, lr: 1e-3, ..options(DType::F32) };
    for (config, options, named) in [
        (two(json!({}), json!({"mask_prob": 0.2}))?, options(DType::F32), "`mask_prob`"),
        (two(json!({"layer_dropout": 0.3}), json!({}))?, options(DType::F32), "`layer_dropout`"),
        (two(json!({"attn_gumbel_softmax": true}), json!({}))?, options(DType::F32), "`gumbel_softmax`"),
        (config(0.1).into(), lion, "AdamW"),
    ] {
        let mut traces = Vec::new();
        for graphs in [false, true] {
            let mut trainer = Trainer::new(config.clone(), options.clone(), Rows::default(), &gpu)?;
            trainer.set_graphs(graphs);
            let mut reports = Vec::new();
            run(&mut trainer, 6, &mut reports)?;
            assert!(!trainer.has_graph());
            match trainer.eager_reasons() {
                [] => assert!(!graphs),
                [reason] => assert!(graphs && reason.contains(named), "{reason}"),
                more => panic!("{more:?}"),
            }
            traces.push(Trace { reports, files: saved(&trainer)? });
        }
        same(&traces[0], &traces[1], named);
    }
    Ok(())
}

/// While another tensor shares the weights, or after they were replaced, a step is eager; then it is recorded again.
#[test]
fn weights_that_are_shared_or_replaced_are_recorded_again() -> Result<()> {
    let Some(gpu) = gpu("weights_that_are_shared_or_replaced_are_recorded_again") else { return Ok(()) };
    let mut traces = Vec::new();
    for graphs in [false, true] {
        let mut trainer = Trainer::new(config(0.2), options(DType::F32), Rows::default(), &gpu)?;
        trainer.set_graphs(graphs);
        let mut reports = Vec::new();
        run(&mut trainer, 4, &mut reports)?;
        let shared = trainer.params().state_dict();
        let values = |tensor: &Tensor| tensor.to_vec::<f32>();
        let before = shared.values().map(values).collect::<Result<Vec<_>>>()?;
        run(&mut trainer, 5, &mut reports)?;
        assert!(!trainer.has_graph());
        assert!(shared.values().map(values).collect::<Result<Vec<_>>>()? == before, "a graph wrote to a copy");
        drop(shared);
        run(&mut trainer, 7, &mut reports)?;
        assert_eq!((trainer.has_graph(), trainer.eager_reasons().len()), (graphs, usize::from(graphs)));
        let (_, param) = trainer.params().iter().next().unwrap();
        param.set(param.tensor().affine(1.5, 0.0)?.detach())?;
        run(&mut trainer, 9, &mut reports)?;
        assert_eq!((trainer.has_graph(), trainer.eager_reasons().len()), (graphs, usize::from(graphs)));
        traces.push(Trace { reports, files: saved(&trainer)? });
    }
    same(&traces[0], &traces[1], "shared weights");
    Ok(())
}

/// `loss = mean((w · x)²)`, whose gradient is what `x` makes of it.
struct Line(Param);

#[derive(Clone)]
struct Numbers(Tensor);

impl Batch for Numbers {
    fn to_device(&self, device: &Device) -> Result<Self> {
        self.0.to_device(device).map(Self)
    }

    fn weight(&self) -> f64 {
        2.0
    }

    fn targets(&self) -> u64 {
        2
    }

    fn visit_tensors(&mut self, f: &mut dyn FnMut(&mut Tensor)) -> bool {
        f(&mut self.0);
        true
    }

    fn concat(parts: &[Self]) -> Result<Self> {
        Ok(parts[0].clone())
    }
}

impl TrainModel for Line {
    type Config = ();
    type Batch = Numbers;

    fn build((): &(), store: &ParamStore) -> Result<Self> {
        store.param("weight", [4], Init::Constant(0.5)).map(Self)
    }

    fn loss(&self, Numbers(x): &Numbers) -> Result<Tensor> {
        let y = self.0.tensor().mul(&x.to_dtype(self.0.tensor().dtype())?)?;
        y.dropout(0.1)?.to_dtype(DType::F32)?.square()?.mean(&[])
    }

    fn config_to_json((): &()) -> Value {
        json!({})
    }

    fn config_from_json(_: Value) -> Result<()> {
        Ok(())
    }
}

/// Numbers of which those of one step are another.
struct Numbered(u64, f32);

impl BatchSource for Numbered {
    type Batch = Numbers;

    fn batch(&self, request: &BatchRequest) -> Result<Numbers> {
        let x = if request.step == self.0 { self.1 } else { 1.0 + (request.step % 8) as f32 / 8.0 };
        Tensor::full([4], x as f64, DType::F32, &Device::Cpu).map(Numbers)
    }

    fn validation_batches(&self, request: &BatchRequest) -> Result<Vec<Numbers>> {
        Ok(vec![self.batch(request)?])
    }

    fn check(&self, _: &BatchRequest) -> Result<()> {
        Ok(())
    }

    fn print(&self) -> Result<DataPrint> {
        Ok(DataPrint::new("numbers", 0, 1))
    }
}

/// A step with NaN or infinity is the error of eager steps, which names the cause, or halves the loss scale like them; the
/// step that was enqueued after it changes nothing.
#[test]
fn steps_that_are_not_finite_are_those_of_eager_runs() -> Result<()> {
    let Some(gpu) = gpu("steps_that_are_not_finite_are_those_of_eager_runs") else { return Ok(()) };
    // Loss and gradient, or only the gradient of a scaled loss; with a step after it or without.
    for (dtype, at, value, fails) in [
        (DType::F32, 5, f32::NAN, true),
        (DType::F32, 8, 4e19, true),
        (DType::F32, 5, 4e19, true),
        (DType::F16, 5, 60.0, false),
        (DType::F16, 8, 60.0, false),
        (DType::F16, 5, f32::NAN, true),
    ] {
        let what = format!("{dtype}, {value} in step {at}");
        let options = TrainOptions { ema_decay: Some(0.5), lr: 1e-2, ..options(dtype) };
        let mut traces = Vec::new();
        for graphs in [false, true] {
            let mut trainer = Trainer::<Line>::start((), options.clone(), Numbered(at, value), &gpu)?;
            trainer.set_graphs(graphs);
            let mut reports = Vec::new();
            let outcome = run(&mut trainer, 9, &mut reports).map_err(|error| error.to_string());
            assert_eq!((outcome.is_err(), trainer.has_graph()), (fails, graphs), "{what}: {outcome:?}");
            assert_eq!(trainer.steps_done(), if fails { at } else { 9 }, "{what}");
            if !fails {
                let skips = |report: &&StepReport| report.skipped && report.step == at;
                assert_eq!(reports.iter().filter(skips).count(), 1, "{what}");
            }
            traces.push((outcome, Trace { reports, files: saved(&trainer)? }));
            if graphs {
                let [reason] = trainer.eager_reasons() else { panic!("{what}: {:?}", trainer.eager_reasons()) };
                assert!(reason.contains("NaN or infinity"), "{reason}");
            }
        }
        assert_eq!(traces[0].0, traces[1].0, "{what}");
        same(&traces[0].1, &traces[1].1, &what);
    }
    Ok(())
}

/// The loss scale grows in the step in which that of an eager run grows.
#[test]
fn the_loss_scale_grows_as_in_eager_runs() -> Result<()> {
    let Some(gpu) = gpu("the_loss_scale_grows_as_in_eager_runs") else { return Ok(()) };
    let options = TrainOptions { steps: 2010, warmup: 0, lr: 1e-6, ..options(DType::F16) };
    let mut trainer = Trainer::<Line>::start((), options, Numbered(0, 1.0), &gpu)?;
    let (mut expected, mut grew) = (GradScaler::default(), false);
    trainer.run(2010, &mut |report| {
        let before = expected.scale();
        expected.update(!report.skipped);
        assert_eq!(report.loss_scale, expected.scale(), "step {}", report.step);
        grew |= expected.scale() > before;
        true
    })?;
    assert!(trainer.has_graph() && grew, "{expected:?}");
    assert_eq!(trainer.grad_scaler(), Some(&expected));
    Ok(())
}

/// The most memory that a run holds, with and without graphs.
#[test]
fn graphs_keep_no_more_than_twice_the_memory() -> Result<()> {
    let Some(gpu) = gpu("graphs_keep_no_more_than_twice_the_memory") else { return Ok(()) };
    for (dtype, accumulate) in [(DType::F32, 1), (DType::BF16, 2)] {
        let mut peaks = Vec::new();
        for graphs in [false, true] {
            gpu.trim();
            let layers = AttentionLayersConfig { heads: 4, ..AttentionLayersConfig::decoder(64, 2) };
            let net = TransformerWrapperConfig::new(256, 64, layers);
            let config = AutoregressiveConfig { net, ..Default::default() };
            let text = ByteText::from_bytes("It was the best of times. ".repeat(100))?;
            let options = TrainOptions { seq_len: 64, batch_size: 4, dtype, accumulate, ..options(dtype) };
            let start = gpu.memory().live;
            let mut trainer = Trainer::new(config, options, text, &gpu)?;
            trainer.set_graphs(graphs);
            gpu.reset_peak_memory();
            run(&mut trainer, 5, &mut Vec::new())?;
            assert_eq!(trainer.has_graph(), graphs);
            let most = gpu.memory();
            peaks.push(most.peak - start);
            println!(
                "{dtype}, {accumulate} micro-batches, graphs {graphs}: peak {} bytes, {} kept",
                most.peak - start,
                most.live - start
            );
        }
        assert!(peaks[1] <= 2 * peaks[0], "{dtype}: {peaks:?}");
    }
    Ok(())
}
