//! Memory and time of a training step on many cards, by stage of ZeRO (`xt info --cards`).

use std::collections::BTreeMap;

use clap::{Args, value_parser};
use x_transformers::{DType, ParamMap};

use crate::{
    cost::Cost,
    progress::{Short, bytes},
};

/// Stages that `xt train --zero` has.
const STAGES: u8 = 3;

/// Elements that are summed together.
const BUCKET: f64 = (8 << 20) as f64;

#[derive(Args)]
pub struct ScalingArgs {
    /// Numbers of cards of a run by several processes, whose memory and time of a step are estimated for each stage of
    /// ZeRO, with AdamW in bf16; --batch-size is that of one card
    #[arg(long, value_name = "N", num_args = 1.., value_parser = value_parser!(u32).range(1..))]
    cards: Vec<u32>,

    /// Speed of a card for the estimate, in TFLOP/s
    #[arg(long, value_name = "X", default_value_t = 400.0, value_parser = positive, requires = "cards")]
    tflops: f64,

    /// Bytes that a card sends and receives for the estimate, in GB/s
    #[arg(long, value_name = "X", default_value_t = 50.0, value_parser = positive, requires = "cards")]
    bandwidth: f64,
}

fn positive(text: &str) -> Result<f64, String> {
    let number = text.parse().ok().filter(|&number: &f64| number > 0.0 && number.is_finite());
    number.ok_or_else(|| format!("expected a number above 0, got `{text}`"))
}

/// Returns the name of the attention layer that has the parameter of this name; stage 3 of ZeRO divides such ones.
pub fn layer_of(name: &str) -> Option<&str> {
    const LAYERS: &str = ".layers.";
    let start = if name.starts_with(&LAYERS[1..]) { LAYERS.len() - 1 } else { name.find(LAYERS)? + LAYERS.len() };
    Some(&name[..start + name[start..].find('.')?])
}

/// A step of one card.
#[derive(Clone, Copy)]
pub struct Step {
    /// Parameters of the model, of its attention layers, and of the largest of these.
    params: f64,
    in_layers: f64,
    block: f64,
    dtype: DType,
    cost: Cost,
    /// Elements that the forward pass keeps if layers are computed again.
    recomputed: f64,
}

impl Step {
    /// `stream`: elements of the input of a layer.
    pub fn new(params: &ParamMap, dtype: DType, cost: Cost, stream: f64) -> Self {
        let mut layers = BTreeMap::new();
        for (name, param) in params.unique() {
            if let Some(layer) = layer_of(name) {
                *layers.entry(layer).or_insert(0.0) += param.tensor().numel() as f64;
            }
        }
        let count = layers.len().max(1) as f64;
        // The inputs of layers, and what the largest of them keeps: about twice the mean.
        let recomputed = (stream * count + 2.0 * cost.saved / count).min(cost.saved);
        let (in_layers, block) =
            (layers.values().sum(), layers.values().fold(0.0, |most, &numel| f64::max(most, numel)));
        Self { params: params.numel() as f64, in_layers, block, dtype, cost, recomputed }
    }

    /// Bytes of a parameter, and of a sum of gradients.
    fn sizes(&self) -> [f64; 2] {
        [self.dtype, self.dtype.accumulator()].map(|dtype| dtype.size() as f64)
    }

    /// Bytes that a card holds at most: weights, gradients, the state of AdamW and activations. `bucket`: elements that
    /// are summed together.
    pub fn memory(&self, cards: f64, stage: u8, bucket: f64) -> f64 {
        let [float, sum] = self.sizes();
        let master = if float < sum { sum } else { 0.0 };
        let state = self.params * (2.0 * sum + master);
        // The bucket sent, the parts received, and their sum.
        let bucket = 3.0 * sum * bucket.min(self.params);
        let part = sum * self.params / cards;
        // Its own weights while they are updated.
        let own = float * self.params / cards;
        // After the pass the sums of all are gathered, when its own gradients have been given away.
        let whole = self.params * float.max(sum);
        let outside = self.params - self.in_layers;
        let (state, gradients) = match stage {
            _ if cards <= 1.0 => (state, float * self.params),
            0 => (state, whole + part + bucket),
            1 => (state / cards, whole + part + own + bucket),
            2 => (state / cards, part + own + bucket),
            _ => {
                // A layer and its gradients, and the next one.
                let layer = self.block * (2.0 * float + sum);
                (state / cards, part + float * outside / cards + 3.0 * sum * bucket.min(outside) + layer)
            }
        };
        let (weights, saved) = match stage {
            3 if cards > 1.0 => (self.in_layers / cards + outside, self.recomputed),
            _ => (self.params, self.cost.saved),
        };
        float * (weights + saved) + state + gradients
    }

    /// Seconds of a step of one micro-batch for each card: sums of gradients beside the backward pass, then what is
    /// gathered. In stage 3 layers are gathered beside both passes, and computed again in the second.
    fn seconds(&self, cards: f64, stage: u8, speed: f64, bandwidth: f64) -> f64 {
        let [float, sum] = self.sizes();
        let moved = |size: f64| size * self.params * (cards - 1.0) / cards / bandwidth;
        let (forward, backward) = (self.cost.forward / speed, self.cost.backward / speed);
        let gathered = match stage {
            0 => moved(sum),
            1 => moved(sum) + moved(float),
            2 => moved(float),
            _ => {
                let layers = moved(float) * self.in_layers / self.params;
                return forward.max(layers) + (forward + backward).max(layers + moved(sum)) + moved(float) - layers;
            }
        };
        forward + backward.max(moved(sum)) + gathered
    }
}

impl ScalingArgs {
    pub fn is_empty(&self) -> bool {
        self.cards.is_empty()
    }

    /// A table with a row for each number of cards.
    pub fn table(&self, step: &Step, tokens: usize) -> String {
        let (speed, bandwidth) = (1e12 * self.tflops, 1e9 * self.bandwidth);
        let mut text = format!(
            "\nmemory of a card, and time of a step, with AdamW in {}, at {} TFLOP/s and {} GB/s\n{:>5}",
            step.dtype, self.tflops, self.bandwidth, "cards"
        );
        for stage in 0..=STAGES {
            text +=
                &format!("  {:>20}", if stage == 0 { "data parallel".to_string() } else { format!("ZeRO {stage}") });
        }
        text += "  tokens/s\n";
        for &count in &self.cards {
            let cards = f64::from(count);
            text += &format!("{count:>5}");
            let mut seconds = 0.0;
            for stage in 0..=STAGES {
                seconds = step.seconds(cards, stage, speed, bandwidth);
                text += &format!("  {:>11} {seconds:>6.2} s", bytes(step.memory(cards, stage, BUCKET) as u64));
            }
            text += &format!("  {:>8}\n", Short(cards * tokens as f64 / seconds).to_string());
        }
        text
    }
}

#[cfg(test)]
mod tests {
    use std::{
        sync::{Arc, Barrier, Mutex},
        thread,
    };

    use x_transformers::{
        Device, ParamStore, Result,
        config::{AttentionLayersConfig, AutoregressiveConfig, Config, TransformerWrapperConfig},
        distributed::Communicator,
        models::AutoregressiveWrapper,
        train::{ByteText, RankOptions, TrainModel, TrainOptions, Trainer},
    };

    use super::*;
    use crate::cost::{MEASURED, Sizes};

    /// A rank that is a thread.
    #[derive(Debug)]
    struct Thread {
        rank: usize,
        size: usize,
        shared: Arc<(Mutex<Vec<Vec<u8>>>, Barrier)>,
    }

    impl Thread {
        fn exchange(&self, mine: &[u8], mut take: impl FnMut(&[Vec<u8>])) {
            let (given, meeting) = &*self.shared;
            given.lock().expect("no panic")[self.rank] = mine.to_vec();
            meeting.wait();
            take(&given.lock().expect("no panic"));
            meeting.wait();
        }
    }

    impl Communicator for Thread {
        fn rank(&self) -> usize {
            self.rank
        }

        fn size(&self) -> usize {
            self.size
        }

        fn barrier(&self) -> Result<()> {
            self.shared.1.wait();
            Ok(())
        }

        fn broadcast_bytes(&self, bytes: &mut [u8], root: usize) -> Result<()> {
            let mine = bytes.to_vec();
            self.exchange(&mine, |all| bytes.copy_from_slice(&all[root]));
            Ok(())
        }

        fn all_gather_bytes(&self, mine: &[u8], all: &mut [u8]) -> Result<()> {
            self.exchange(mine, |given| all.copy_from_slice(&given.concat()));
            Ok(())
        }

        fn all_to_all_bytes(&self, sent: &[u8], received: &mut [u8]) -> Result<()> {
            let part = sent.len() / self.size;
            self.exchange(sent, |given| {
                for (received, sent) in received.chunks_exact_mut(part).zip(given) {
                    received.copy_from_slice(&sent[self.rank * part..][..part]);
                }
            });
            Ok(())
        }
    }

    /// Compares the estimate with the memory that runs of one to four ranks take from the pool.
    #[test]
    fn estimated_memory_is_that_of_ranks() {
        let _alone = MEASURED.lock();
        // As large as the largest parameter, a small part of the model.
        const BUCKET: usize = 4 * 384 * 384;
        let net = TransformerWrapperConfig::new(128, 32, AttentionLayersConfig::decoder(384, 4));
        let config = Config::from(AutoregressiveConfig { net, ..Default::default() });
        for (dtype, size, zero) in [
            (DType::F32, 1, 0),
            (DType::F32, 2, 0),
            (DType::F32, 2, 1),
            (DType::F32, 2, 2),
            (DType::F32, 4, 2),
            (DType::F32, 2, 3),
            (DType::F32, 4, 3),
            (DType::BF16, 2, 0),
            (DType::BF16, 4, 1),
            (DType::BF16, 4, 2),
            (DType::BF16, 4, 3),
        ] {
            let shared = Arc::new((Mutex::new(vec![Vec::new(); size]), Barrier::new(size)));
            let before = Device::Cpu.memory().live;
            Device::Cpu.reset_peak_memory();
            let run = |rank| -> Result<()> {
                let options = TrainOptions { seq_len: 32, batch_size: 4, dtype, ..Default::default() };
                let options = TrainOptions { recompute: zero == 3, ..options };
                let text = ByteText::from_bytes(vec![b'a'; 4000])?;
                let trainer = Trainer::new(config.clone(), options, text, &Device::Cpu)?;
                let ranks = Arc::new(Thread { rank, size, shared: shared.clone() });
                let mut trainer = trainer.with_ranks(ranks, RankOptions { overlap: false, zero, bucket: BUCKET })?;
                trainer.step()?;
                trainer.step()?;
                Ok(())
            };
            let run = &run;
            thread::scope(|scope| {
                let threads: Vec<_> = (0..size).map(|rank| scope.spawn(move || run(rank))).collect();
                threads.into_iter().for_each(|thread| thread.join().expect("no panic").expect("steps"));
            });
            let measured = (Device::Cpu.memory().peak - before) as f64 / size as f64;
            let (_, cost) =
                Cost::of_model(&config, Sizes { rows: 4, tokens: Some(32) }).expect("a config").expect("a model");
            let store = ParamStore::shapes(dtype, &Device::Cpu);
            <AutoregressiveWrapper as TrainModel>::build(&config, &store).expect("a model");
            let step = Step::new(&store.params(), dtype, cost, f64::from(4 * 32 * 384));
            let estimated = step.memory(size as f64, zero, BUCKET as f64);
            let ratio = measured / estimated;
            println!("{dtype}, {size} ranks, stage {zero}: {measured:.3e} bytes, estimated {estimated:.3e}");
            assert!(
                (0.75..1.25).contains(&ratio),
                "{dtype}, {size} ranks, stage {zero}: {measured:.3e}, {estimated:.3e}"
            );
        }
    }
}
