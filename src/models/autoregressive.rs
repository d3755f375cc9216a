//! A decoder's loss and its sampling.

use super::{
    Output, TransformerWrapper,
    sampling::{check as check_sampling, sample_tokens},
};
use crate::{
    DType, Error, Result, Store, Tensor,
    config::{AutoregressiveConfig, SamplingConfig},
    error::{At, ensure},
    nn::ForwardOptions,
};

/// Predicts each token from those before it.
///
/// ```
/// use x_transformers::{
///     DType, Device, Store, Tape, Tensor,
///     config::{AttentionLayersConfig, AutoregressiveConfig, TransformerWrapperConfig},
///     models::{AutoregressiveWrapper, ForwardOptions, GenerateOptions},
/// };
/// # fn main() -> x_transformers::Result<()> {
/// let net = TransformerWrapperConfig {
///     num_tokens: 256,
///     max_seq_len: 16,
///     attn_layers: AttentionLayersConfig::decoder(16, 1),
///     ..Default::default()
/// };
/// let config = AutoregressiveConfig { net, ..Default::default() };
/// let store = Store::new(0, DType::F32, &Device::Cpu);
/// let model = AutoregressiveWrapper::new(&config, &store)?;
///
/// let tokens = Tensor::from_slice(&[1i64, 2, 3, 4, 5, 6], [2, 3], &Device::Cpu)?;
/// let mut tape = Tape::train(0);
/// let loss = model.loss(&tokens, &ForwardOptions::default())?;
/// let grads = tape.backward(&loss)?;
/// assert!(grads.unused(&store.params()).is_empty());
///
/// let prompt = Tensor::from_slice(&[1i64, 2], [2], &Device::Cpu)?;
/// let new = model.generate(&prompt, 4, &GenerateOptions::default(), &mut |_| true)?;
/// assert_eq!(new.shape()[..], [4]);
/// # Ok(())
/// # }
/// ```
#[derive(Clone, Debug)]
pub struct AutoregressiveWrapper {
    /// The wrapped model.
    pub net: TransformerWrapper,
    ignore_index: i64,
    pad_value: i64,
}

/// How tokens are generated.
#[derive(Clone, Debug, Default)]
pub struct GenerateOptions {
    /// Filter and temperature.
    pub sampling: SamplingConfig,
    /// Generation stops once every row holds this token, the prompt included; `pad_value` follows the first one.
    pub eos_token: Option<i64>,
    /// The same seed draws the same tokens. A row's draws do not depend on the other rows.
    pub seed: u64,
    /// Mask of the prompt, context and its mask, for every step.
    pub forward: ForwardOptions,
}

impl AutoregressiveWrapper {
    /// A model from its keywords; its parameters' names begin with `net.`.
    ///
    /// Errors: [`Error::Option`] for what is illegal alone or together.
    pub fn new(config: &AutoregressiveConfig, store: &Store) -> Result<Self> {
        let net = TransformerWrapper::new(&config.net, &store.at("net")).at("net")?;
        Ok(Self { net, ignore_index: config.ignore_index, pad_value: config.pad_value })
    }

    /// Around an existing model.
    pub(super) fn around(net: TransformerWrapper) -> Self {
        let AutoregressiveConfig { ignore_index, pad_value, .. } = AutoregressiveConfig::default();
        Self { net, ignore_index, pad_value }
    }

    /// Mean cross entropy of `tokens[:, 1:]` given `tokens[:, :-1]`, targets equal to `ignore_index` left out: `[b, n + 1]`
    /// I64 to a scalar, in f32 for half precision.
    ///
    /// A mask as long as the tokens loses its last column; it does not enter the loss.
    ///
    /// Errors: fewer than two tokens, options that ask for more than the output, and those of [`TransformerWrapper::forward`].
    pub fn loss(&self, tokens: &Tensor, options: &ForwardOptions) -> Result<Tensor> {
        ensure!(
            tokens.rank() == 2 && tokens.shape()[1] >= 2,
            Error::shape("loss", format!("expected tokens [batch, n] with n of at least 2, got {:?}", tokens.shape()))
        );
        options.ask_for_output_alone("loss")?;
        let n = tokens.shape()[1] - 1;
        let mut options = options.clone();
        if let Some(mask) = options.mask.take() {
            let full = mask.rank() == 2 && mask.shape()[1] == n + 1;
            options.mask = Some(if full { mask.narrow(1, 0, n)? } else { mask });
        }
        let Output { out, .. } = self.net.forward(&tokens.narrow(1, 0, n)?, &options).at("net")?;
        out.cross_entropy(&tokens.narrow(1, 1, n)?, self.ignore_index)
    }

    /// Continues a prompt, `[b, t]` or `[t]` I64, by up to `seq_len` tokens, and gives only those: `[b, ..]` or `[..]`.
    ///
    /// The model sees the last `max_seq_len` tokens. `on_token` gets the new token of each row after every step;
    /// generation stops when it returns false.
    ///
    /// Errors: an empty prompt, options that do not fit, and those of [`TransformerWrapper::forward`].
    pub fn generate(
        &self,
        start_tokens: &Tensor,
        seq_len: usize,
        options: &GenerateOptions,
        on_token: &mut dyn FnMut(&[i64]) -> bool,
    ) -> Result<Tensor> {
        check_sampling(&options.sampling)?;
        let forward = &options.forward;
        forward.ask_for_output_alone("generate")?;
        ensure!(
            forward.mems.is_none(),
            Error::argument("generate", "takes mask, context and attn_mask, but no `mems`")
        );
        ensure!(
            (1..=2).contains(&start_tokens.rank()) && start_tokens.dtype() == DType::I64,
            Error::shape(
                "start_tokens",
                format!("expected i64 [batch, n] or [n], got {:?} {}", start_tokens.shape(), start_tokens.dtype())
            )
        );
        let flat = start_tokens.rank() == 1;
        let prompt = if flat { start_tokens.unsqueeze(0)? } else { start_tokens.clone() };
        let (b, t) = (prompt.shape()[0], prompt.shape()[1]);
        ensure!(
            b > 0 && t > 0,
            Error::shape("start_tokens", format!("expected a token, got {:?}", start_tokens.shape()))
        );
        let mut rows: Vec<Vec<i64>> = prompt.to_vec::<i64>()?.chunks(t).map(<[i64]>::to_vec).collect();
        let mut mask = self.prompt_mask(forward, b, t)?;
        for step in 0..seq_len {
            let logits = self.next_logits(&rows, mask.as_deref(), forward, start_tokens)?;
            let step = Tensor::full([1], step as f64, DType::I64, logits.device())?;
            let tokens = sample_tokens(&logits, &options.sampling, options.seed, &step)?.to_vec::<i64>()?;
            for (row, &token) in rows.iter_mut().zip(&tokens) {
                row.push(token);
            }
            mask.iter_mut().flatten().for_each(|row| row.push(true));
            let go_on = on_token(&tokens);
            if options.eos_token.is_some_and(|eos| self.finish(&mut rows, eos)) || !go_on {
                break;
            }
        }
        let new: Vec<i64> = rows.iter().flat_map(|row| &row[t..]).copied().collect();
        let len = new.len() / b;
        let shape = if flat { vec![len] } else { vec![b, len] };
        Tensor::from_vec(new, shape, start_tokens.device())
    }

    /// The mask of the prompt by rows, checked.
    fn prompt_mask(&self, forward: &ForwardOptions, b: usize, t: usize) -> Result<Option<Vec<Vec<bool>>>> {
        let Some(mask) = &forward.mask else { return Ok(None) };
        let fits = mask.elements() == b * t && mask.shape().last() == Some(&t) && mask.dtype() == DType::Bool;
        ensure!(
            fits,
            Error::shape("mask", format!("expected bool [{b}, {t}], got {:?} {}", mask.shape(), mask.dtype()))
        );
        Ok(Some(mask.to_vec::<bool>()?.chunks(t).map(<[bool]>::to_vec).collect()))
    }

    /// The logits after the last token of each row, `[b, num_tokens]`.
    fn next_logits(
        &self,
        rows: &[Vec<i64>],
        mask: Option<&[Vec<bool>]>,
        forward: &ForwardOptions,
        start: &Tensor,
    ) -> Result<Tensor> {
        let length = rows.first().map_or(0, Vec::len);
        let seen = length.min(self.net.plan().max_seq_len);
        let window: Vec<i64> = rows.iter().flat_map(|row| &row[length - seen..]).copied().collect();
        let window = Tensor::from_vec(window, [rows.len(), seen], start.device())?;
        let mask = mask.map(|mask| {
            let mask: Vec<bool> = mask.iter().flat_map(|row| &row[length - seen..]).copied().collect();
            Tensor::from_vec(mask, [rows.len(), seen], start.device())
        });
        // Only the last position needs logits.
        let options = ForwardOptions { mask: mask.transpose()?, return_embeddings: true, ..forward.clone() };
        let last = self.net.forward(&window, &options).at("net")?.out.select(1, seen - 1)?;
        Ok(self.net.logits(&last).at("net")?.detach())
    }

    /// Whether every row has ended; then pads what follows the ends.
    fn finish(&self, rows: &mut [Vec<i64>], eos: i64) -> bool {
        let ends: Option<Vec<usize>> = rows.iter().map(|row| row.iter().position(|&token| token == eos)).collect();
        let Some(ends) = ends else { return false };
        for (row, end) in rows.iter_mut().zip(ends) {
            row[end + 1..].fill(self.pad_value);
        }
        true
    }
}
