//! Language model with a style for each sequence.

use super::{
    AutoregressiveWrapper, GenerateOptions, RunOptions, TransformerWrapper, model_inputs::Inputs, named::NamedModel,
};
use crate::{
    DType, Error, ParamStore, Philox, Result, Tensor,
    autograd::dropout_stream,
    collect::CollectVec,
    config::{Call, GenerateCall, GptVaePlan, LossPlan},
    error::{ErrorContext, ensure},
    nn::{ForwardOptions, Linear},
};

/// GPT-VAE: an encoder reads a sequence and gives a normal distribution of styles, one of which precedes the tokens of
/// a language model (the conditional VAE of Zhao et al., <https://arxiv.org/abs/2304.13705>).
#[derive(Clone, Debug)]
pub struct GptVae {
    encoder: TransformerWrapper,
    to_latent: Linear,
    from_latent: Linear,
    decoder: AutoregressiveWrapper,
    plan: GptVaePlan,
}

impl GptVae {
    /// Creates a model; its parameters' names begin with `encoder.`, `decoder.` and `ar_wrapped_decoder.net.`, which is
    /// the decoder.
    ///
    /// Errors: those of the layers.
    pub fn new(plan: GptVaePlan, store: &ParamStore) -> Result<Self> {
        let dim = plan.decoder.layers.dim;
        let decoder = TransformerWrapper::from_plan(plan.decoder.clone(), &store.at("decoder")).context("decoder")?;
        store.at("ar_wrapped_decoder").at("net").tie_all(&store.at("decoder"))?;
        let loss = LossPlan { ignore_index: plan.pad, reads_all: true, ..LossPlan::default() };
        Ok(Self {
            encoder: TransformerWrapper::from_plan(plan.encoder.clone(), &store.at("encoder")).context("encoder")?,
            to_latent: Linear::new(&store.at("to_latent_mean_log_variance").at(0), dim, 2 * plan.dim_latent)?,
            from_latent: Linear::new(&store.at("from_latent_to_prepend_token").at(0), plan.dim_latent, dim)?,
            decoder: AutoregressiveWrapper::with_loss(decoder, loss)?,
            plan,
        })
    }

    /// Returns means and logarithms of variances of the styles of sequences: `[b, n] → [b, dim_latent]` each.
    ///
    /// Errors: those of [`TransformerWrapper::forward`].
    pub fn styles(&self, tokens: &Tensor) -> Result<[Tensor; 2]> {
        let pad = Tensor::full((), self.plan.pad as f64, DType::I64, tokens.device())?;
        let options = ForwardOptions { mask: Some(tokens.ne(&pad)?), ..ForwardOptions::default() };
        let pooled = self.encoder.forward(tokens, &options).context("encoder")?.out;
        let both = self.to_latent.forward(&pooled).context("to_latent_mean_log_variance.0")?;
        let width = self.plan.dim_latent;
        Ok([both.narrow(-1, 0, width)?, both.narrow(-1, width, width)?])
    }

    /// Computes the loss of predicting the tokens after a style that is drawn from the distribution that the encoder
    /// gives for them, or for another sequence, and the divergence of that distribution: `[b, n]` I64 to a scalar.
    ///
    /// `noise`, `[b, dim_latent]`, takes the place of normal draws from the seed. Training leaves styles out.
    ///
    /// Errors: tensors that do not match, and those of [`TransformerWrapper::forward`].
    pub fn loss(&self, tokens: &Tensor, source: Option<&Tensor>, noise: Option<&Tensor>, seed: u64) -> Result<Tensor> {
        let [mean, log_variance] = self.styles(source.unwrap_or(tokens))?;
        let style = self.drawn(&mean, &log_variance, noise, seed)?;
        let b = tokens.dim(0)?;
        let left_out = |row: usize| {
            dropout_stream("latents_dropout_prob")
                .is_some_and(|draws| draws.uniform(row as u64) < self.plan.latents_dropout)
        };
        // A row without a style starts after it.
        let start = (0..b).map(|row| i64::from(self.plan.latents_dropout > 0.0 && left_out(row))).collect_vec();
        let options = ForwardOptions {
            prepend_embeds: Some(self.token(&style)?),
            seq_start_pos: Some(Tensor::from_vec(start, [b], tokens.device())?),
            ..ForwardOptions::default()
        };
        let loss = self.decoder.loss(tokens, &options).context("ar_wrapped_decoder")?;
        let [weight, free] = self.plan.divergence;
        let precise = loss.dtype();
        let (mean, log_variance) = (mean.to_dtype(precise)?, log_variance.to_dtype(precise)?);
        let divergence = log_variance.exp()?.add(&mean.square()?)?.sub(&log_variance)?.affine(0.5, -0.5 - free)?;
        loss.add(&divergence.relu()?.sum(&[-1])?.mean(&[])?.affine(weight, 0.0)?)
    }

    /// Draws styles.
    fn drawn(&self, mean: &Tensor, log_variance: &Tensor, noise: Option<&Tensor>, seed: u64) -> Result<Tensor> {
        let noise = match noise {
            Some(noise) => noise.clone(),
            None => {
                let draws = dropout_stream("style").unwrap_or_else(|| Philox::new(seed, 0));
                Tensor::generate(*mean.shape(), mean.dtype(), mean.device(), |at| draws.normal(at as u64))?
            }
        };
        mean.add(&log_variance.affine(0.5, 0.0)?.exp()?.mul(&noise).context("noise")?)
    }

    /// Returns the embedding of styles before the tokens, `[b, 1, dim]`.
    fn token(&self, styles: &Tensor) -> Result<Tensor> {
        self.from_latent.forward(styles).context("from_latent_to_prepend_token.0")?.unsqueeze(1)
    }

    /// Continues prompts, `[b, t]` or `[t]` I64, by `seq_len` tokens in these styles, `[dim_latent]` or
    /// `[b, dim_latent]`, or without one.
    ///
    /// Errors: styles that do not match, and those of [`AutoregressiveWrapper::generate`].
    pub fn generate(
        &self,
        prompt: &Tensor,
        styles: Option<&Tensor>,
        seq_len: usize,
        options: &GenerateOptions,
    ) -> Result<Tensor> {
        let (b, width) = (if prompt.rank() == 1 { 1 } else { prompt.dim(0)? }, self.plan.dim_latent);
        let token = |styles: &Tensor| {
            let fits = styles.shape()[..] == [width] || styles.shape()[..] == [b, width];
            ensure!(fits, Error::shape("latents", format_args!("expected [{b}, {width}], got {:?}", styles.shape())));
            self.token(&if styles.rank() == 1 { styles.unsqueeze(0)?.expand([b, width])? } else { styles.clone() })
        };
        let mut options = options.clone();
        options.forward.prepend_embeds = styles.map(token).transpose()?;
        self.decoder.generate(prompt, seq_len, &options, &mut |_| true)
    }
}

impl NamedModel for GptVae {
    fn pass(&self, inputs: &mut Inputs, _: &Call, run: &RunOptions) -> Result<(&'static str, Tensor)> {
        let (tokens, source, noise) = (inputs.need("seq")?, inputs.take("seq_for_latents"), inputs.take("noise"));
        Ok(("loss", self.loss(&tokens, source.as_ref(), noise.as_ref(), run.seed)?))
    }

    fn generate(&self, inputs: &mut Inputs, _: &Call, generate: &GenerateCall, run: &RunOptions) -> Result<Tensor> {
        let seq_len = generate.seq_len.ok_or_else(|| Error::missing_option("seq_len").context("call"))?;
        ensure!(
            generate.eos_token.is_none(),
            Error::option("eos_token", "is not supported by GPTVAE here").context("call")
        );
        let (prompt, latents, source) = (inputs.prompt()?, inputs.take("latents"), inputs.take("seq_for_latents"));
        ensure!(
            latents.is_none() || source.is_none(),
            Error::argument("latents", "cannot be used with `seq_for_latents`, which gives them")
        );
        let latents = match source {
            Some(source) => {
                let [mean, log_variance] = self.styles(&source)?;
                Some(self.drawn(&mean, &log_variance, inputs.take("noise").as_ref(), run.seed)?)
            }
            None => latents,
        };
        let options = GenerateOptions {
            sampling: generate.sampling.clone(),
            seed: run.seed,
            recompute: !generate.cache_kv,
            restrict_to_max_seq_len: generate.restrict_to_max_seq_len,
            ..GenerateOptions::default()
        };
        self.generate(&prompt, latents.as_ref(), seq_len, &options)
    }
}
