//! Custom branches have the same properties as attention and feedforwards.

use std::sync::Arc;

use x_transformers::{
    DType, Device, Gradients, Init, Param, ParamStore, Result, Tape, Tensor,
    config::{AttentionLayersConfig, BranchPlan, LayersPlan, SamplingConfig, TransformerWrapperConfig},
    models::{AutoregressiveWrapper, BeamOptions, ForwardOptions, GenerateOptions, TransformerWrapper},
    nn::{AttentionLayers, Branch, Past},
};

const DIM: usize = 8;

/// `x W`, position by position.
#[derive(Debug)]
struct Pointwise(Param);

impl Branch for Pointwise {
    fn forward(&self, x: &Tensor, _: &mut Past<'_>) -> Result<Tensor> {
        x.matmul(&self.0.tensor())
    }
}

/// Each feature's sum over the last three positions, with weights; padding counts as zeros.
#[derive(Debug)]
struct Convolution(Param);

impl Branch for Convolution {
    fn forward(&self, x: &Tensor, past: &mut Past<'_>) -> Result<Tensor> {
        let n = x.dim(1)?;
        let x = match past.mask() {
            Some(mask) => x.masked_fill(&mask.unsqueeze(-1)?.logical_not()?, 0.0)?,
            None => x.clone(),
        };
        let (window, taps) = (past.window(0, &x, 2)?, self.0.tensor());
        let tap = |k: usize| window.narrow(1, k, n)?.mul(&taps.narrow(0, k, 1)?);
        tap(0)?.add(&tap(1)?)?.add(&tap(2)?)
    }
}

/// `s = a s + x`, position by position, in its second slot.
#[derive(Debug)]
struct Recurrence(Param);

impl Branch for Recurrence {
    fn forward(&self, x: &Tensor, past: &mut Past<'_>) -> Result<Tensor> {
        let mut state = past.before(1, 1, x.dim(2)?, x)?;
        let mut states = Vec::new();
        for at in 0..x.dim(1)? {
            state = state.mul(&self.0.tensor())?.add(&x.narrow(1, at, 1)?)?;
            states.push(state.clone());
        }
        let states = Tensor::cat(&states.iter().collect::<Vec<_>>(), 1)?;
        past.keep(1, &states)?;
        Ok(states)
    }
}

/// The mean over all positions.
#[derive(Debug)]
struct Mean;

impl Branch for Mean {
    fn forward(&self, x: &Tensor, _: &mut Past<'_>) -> Result<Tensor> {
        let shape = *x.shape();
        x.mean(&[1])?.unsqueeze(1)?.expand(shape)
    }

    fn supports_kv_cache(&self) -> std::result::Result<(), &'static str> {
        Err("each position sees all")
    }
}

/// The four sublayers are a convolution, attention, a recurrence and a function of each position.
fn branch(index: usize, store: &ParamStore) -> Result<Option<Arc<dyn Branch>>> {
    let param = |name: &str, shape: [usize; 2]| store.param(name, shape, Init::Normal(0.4));
    Ok(match index {
        0 => Some(Arc::new(Convolution(param("taps", [3, DIM])?))),
        1 => Some(Arc::new(Recurrence(store.param("decay", [DIM], Init::Constant(0.5))?))),
        3 => Some(Arc::new(Pointwise(param("weight", [DIM, DIM])?))),
        _ => None,
    })
}

fn model(store: &ParamStore) -> Result<AutoregressiveWrapper> {
    let layers = AttentionLayersConfig { heads: 2, rotary_pos_emb: true, ..AttentionLayersConfig::decoder(DIM, 2) };
    let layers = AttentionLayersConfig { shift_tokens: x_transformers::config::ShiftTokens::All(1), ..layers };
    let mut config = TransformerWrapperConfig::new(32, 24, layers);
    config.attn_layers.attn.dim_head = 32;
    AutoregressiveWrapper::around(TransformerWrapper::with_branches(&config, store, |index, _, store| {
        branch(index, store)
    })?)
}

fn tokens(rows: usize, n: usize) -> Result<Tensor> {
    Tensor::from_vec(
        (0..rows * n).map(|i| (i * i + 3 * i) as i64 % 31 + 1).collect::<Vec<_>>(),
        [rows, n],
        &Device::Cpu,
    )
}

#[test]
fn custom_branches_are_in_the_plan_and_the_state_dict() -> Result<()> {
    let store = ParamStore::new(0, DType::F32, &Device::Cpu);
    let model = model(&store)?;
    let plan = &model.net.plan().layers;
    let custom = plan.layers.iter().map(|layer| layer.branch == BranchPlan::Custom).collect::<Vec<_>>();
    assert_eq!((custom, plan.self_attentions()), (vec![true, true, false, true], 1));
    assert!(plan.to_string().starts_with("0  custom"), "{plan}");
    // Token shift lies around the branch, one place down.
    let names = ["layers.0.1.fn.taps", "layers.1.1.fn.decay", "layers.2.1.fn.to_q.weight", "layers.3.1.fn.weight"];
    assert!(names.iter().all(|name| store.params().get(&format!("attn_layers.{name}")).is_some()));
    Ok(())
}

/// Chunks of any size, rows of different lengths, repeated rows and truncated sequences give the values of whole ones.
#[test]
fn custom_branches_continue_in_a_cache() -> Result<()> {
    let store = ParamStore::new(1, DType::F64, &Device::Cpu);
    let model = model(&store)?;
    let all = tokens(2, 12)?;
    let whole = |tokens: &Tensor| {
        let options = ForwardOptions { return_embeddings: true, ..Default::default() };
        model.net.forward(tokens, &options)?.out.to_f64_vec()
    };
    let expected = whole(&all)?;
    let row = |row: usize, at: usize| &expected[(row * 12 + at) * DIM..][..DIM];
    let near = |got: &Tensor, row: usize, at: usize, expected: &[f64]| {
        let got = got.narrow(0, row, 1)?.narrow(1, at, 1)?.to_f64_vec()?;
        let off = got.iter().zip(expected).map(|(a, b)| (a - b).abs()).fold(0.0, f64::max);
        assert!(off < 1e-12, "row {row} at {at}: {off:.1e}");
        Ok::<(), x_transformers::Error>(())
    };
    // The capacity is that of the sequences, with no room after their ends.
    let mut cache = model.net.cache(2, 12, &ForwardOptions::default())?;
    let mut lengths = [0, 0];
    for counts in [[4, 3], [1, 2], [5, 1], [2, 3], [0, 3]] {
        let n = counts.into_iter().max().unwrap();
        let part = |row: usize| {
            let left = n.min(12 - lengths[row]);
            let part = all.narrow(0, row, 1)?.narrow(1, lengths[row], left)?;
            Tensor::cat(&[&part, &Tensor::zeros([1, n - left], DType::I64, &Device::Cpu)?], 1)
        };
        let out = model.net.extend(&Tensor::cat(&[&part(0)?, &part(1)?], 0)?, &counts, None, &mut cache)?;
        for (r, count) in counts.into_iter().enumerate() {
            for at in 0..count {
                near(&out, r, at, row(r, lengths[r] + at))?;
            }
            lengths[r] += count;
        }
    }
    assert_eq!(cache.lengths(), [12, 12]);
    cache.truncate(&[7, 1])?;
    cache.select_rows(&[1, 0, 1])?;
    // Row 1 goes on from its first token as it did, row 0 from its seventh with another token.
    let next = Tensor::from_vec(vec![all.to_vec::<i64>()?[13], 9, 5], [3, 1], &Device::Cpu)?;
    let out = model.net.extend(&next, &[1, 1, 1], None, &mut cache)?;
    near(&out, 0, 0, row(1, 1))?;
    let changed = |row: usize, length: usize, last: i64| {
        let mut tokens = all.narrow(0, row, 1)?.narrow(1, 0, length)?.to_vec::<i64>()?;
        tokens.push(last);
        let out = whole(&Tensor::from_vec(tokens, [1, length + 1], &Device::Cpu)?)?;
        Ok::<_, x_transformers::Error>(out[length * DIM..].to_vec())
    };
    near(&out, 1, 0, &changed(0, 7, 9)?)?;
    near(&out, 2, 0, &changed(1, 1, 5)?)
}

#[test]
fn custom_branches_generate_with_cache_beams_and_drafts() -> Result<()> {
    let store = ParamStore::new(2, DType::F64, &Device::Cpu);
    let model = model(&store)?;
    let sampling = SamplingConfig { temperature: 0.0, ..Default::default() };
    let prompt = tokens(2, 5)?;
    let options = |recompute: bool| GenerateOptions {
        sampling: sampling.clone(),
        recompute,
        prompt_lengths: Some(vec![5, 2]),
        ..GenerateOptions::default()
    };
    let generate = |recompute| model.generate(&prompt, 10, &options(recompute), &mut |_| true)?.to_vec::<i64>();
    assert_eq!(generate(false)?, generate(true)?);
    let beams =
        |recompute| model.beam_search(&prompt, 6, &BeamOptions { beams: 3, ..Default::default() }, &options(recompute));
    let (cached, anew) = (beams(false)?, beams(true)?);
    for (cached, anew) in cached.iter().flatten().zip(anew.iter().flatten()) {
        assert_eq!(cached.tokens, anew.tokens);
        assert!((cached.score - anew.score).abs() < 1e-10);
    }
    // Tokens that the large model refuses are cut off again.
    let draft = self::model(&ParamStore::new(3, DType::F64, &Device::Cpu))?;
    let (drafted, stats) = model.generate_with_draft(&draft, 3, &prompt, 10, &options(false), &mut |_| true)?;
    assert_eq!(drafted.to_vec::<i64>()?, generate(false)?);
    assert!(stats.accepted < stats.proposed, "{stats:?}");
    Ok(())
}

#[test]
fn custom_branches_are_recomputed() -> Result<()> {
    let store = ParamStore::new(4, DType::F32, &Device::Cpu);
    let model = model(&store)?;
    let gradients = |checkpoint_layers: bool| -> Result<Gradients> {
        let mut tape = Tape::train(0);
        let mask = Tensor::from_vec((0..18).map(|i| i != 17).collect::<Vec<_>>(), [2, 9], &Device::Cpu)?;
        let options = ForwardOptions { checkpoint_layers, mask: Some(mask), ..Default::default() };
        tape.backward(&model.loss(&tokens(2, 10)?, &options)?)
    };
    let (kept, recomputed) = (gradients(false)?, gradients(true)?);
    assert!(kept.unused(&store.params()).is_empty());
    for (name, param) in store.params().iter() {
        let bits = |grads: &Gradients| grads.param(param).map(|grad| grad.to_vec::<f32>().unwrap());
        assert_eq!(bits(&kept), bits(&recomputed), "{name}");
    }
    Ok(())
}

#[test]
fn invalid_custom_branches_are_refused() -> Result<()> {
    let plan = LayersPlan::new(&AttentionLayersConfig::decoder(DIM, 1))?;
    let store = || ParamStore::new(0, DType::F32, &Device::Cpu);
    let with = |branch: Arc<dyn Branch>| {
        AttentionLayers::with_branches(&plan, &store(), |index, _, _| Ok((index == 1).then(|| branch.clone())))
    };
    let mean = with(Arc::new(Mean))?;
    assert_eq!(mean.supports_kv_cache(&ForwardOptions::default()), Err("each position sees all"));
    let wide = with(Arc::new(Pointwise(store().param("w", [DIM, 2 * DIM], Init::Normal(1.0))?)))?;
    let x = Tensor::zeros([1, 2, DIM], DType::F32, &Device::Cpu)?;
    let message = wide.forward(&x, &ForwardOptions::default()).unwrap_err().to_string();
    assert!(message.starts_with("layers.1.1: branch") && message.contains("[1, 2, 16]"), "{message}");
    // A plan that says there is one, without one.
    let message = AttentionLayers::new(mean.plan(), &store()).unwrap_err().to_string();
    assert!(message.contains("with_branches"), "{message}");
    Ok(())
}
