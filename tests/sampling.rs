//! Tokens drawn from logits: the distribution of the reference in f64, the same tokens on every device.

mod common;

use std::sync::{Mutex, MutexGuard, PoisonError};

use common::device;
use x_transformers::{
    DType, Device, ErrorKind, Philox, Result, Tensor,
    config::{FilterLogits, SamplingConfig},
    models::{filter_probabilities, sample_tokens},
    ops::{SampleFilter, SampleSpec},
};

fn with(filter_logits_fn: FilterLogits) -> SamplingConfig {
    SamplingConfig { filter_logits_fn, ..Default::default() }
}

/// Every filter, at several temperatures and thresholds.
fn configs() -> Vec<SamplingConfig> {
    use FilterLogits::{Entmax, MinP, None, Nucleus, TopA, TopK, TopP};
    let mut configs = vec![
        with(None),
        with(TopK),
        SamplingConfig { k: Some(3), ..with(TopK) },
        SamplingConfig { filter_thres: 0.4, ..with(TopP) },
        SamplingConfig { filter_thres: 0.0, ..with(TopP) },
        with(Nucleus),
        SamplingConfig { filter_thres: 0.0, ..with(Nucleus) },
        with(TopA),
        SamplingConfig { min_p_pow: 0.5, min_p_ratio: 1.0, ..with(TopA) },
        SamplingConfig { min_p_ratio: 0.2, ..with(MinP) },
        with(Entmax),
    ];
    for temperature in [0.3, 2.5] {
        let other = |config: &SamplingConfig| SamplingConfig { temperature, ..config.clone() };
        configs.extend(configs[..11].iter().map(other).collect::<Vec<_>>());
    }
    configs.push(SamplingConfig { temperature: 0.0, ..with(TopK) });
    configs.push(SamplingConfig { temperature: 1e-300, ..with(None) });
    configs.push(SamplingConfig { temperature: 1e300, ..with(None) });
    configs
}

fn logits(rows: usize, columns: usize, dtype: DType, device: &Device) -> Result<Tensor> {
    let random = Philox::new(3, (rows * columns) as u64);
    Tensor::generate([rows, columns], dtype, device, |i| 2.5 * random.normal(i as u64))
}

fn step(step: i64, device: &Device) -> Result<Tensor> {
    Tensor::scalar(step, device)
}

fn rows(logits: &Tensor) -> Result<Vec<Vec<f64>>> {
    let width = logits.shape()[1];
    Ok(logits.to_f64_vec()?.chunks(width).map(<[f64]>::to_vec).collect())
}

/// A GPU reports broken logits at the next read-back of any thread: tests run one after the other.
fn alone() -> MutexGuard<'static, ()> {
    static ALONE: Mutex<()> = Mutex::new(());
    ALONE.lock().unwrap_or_else(PoisonError::into_inner)
}

/// The chosen token is the one in whose share of the reference the draw falls, up to rounding.
#[test]
fn sampling_chooses_as_the_reference_does() -> Result<()> {
    let _alone = alone();
    for dtype in [DType::F32, DType::F64, DType::BF16, DType::F16] {
        for (b, columns) in [(3, 1), (4, 37), (3, 3001)] {
            let logits = logits(b, columns, dtype, &Device::Cpu)?;
            for config in configs() {
                let expected = filter_probabilities(&rows(&logits)?, &config)?;
                let tokens = sample_tokens(&logits, &config, 8, &step(2, &Device::Cpu)?)?.to_vec::<i64>()?;
                for (row, (&token, shares)) in tokens.iter().zip(&expected).enumerate() {
                    let draw = Philox::new(8, row as u64).uniform(2);
                    let before: f64 = shares[..token as usize].iter().sum();
                    let until = before + shares[token as usize];
                    assert!(
                        before - 1e-5 <= draw && draw <= until + 1e-5,
                        "{dtype} {columns} {config:?}: token {token} has {before} to {until}, the draw is {draw}"
                    );
                }
            }
        }
    }
    Ok(())
}

/// Frequencies of many draws come close to the distribution, and tokens of probability zero are never drawn.
#[test]
fn sampling_has_the_distribution_of_the_reference() -> Result<()> {
    let _alone = alone();
    let draws = 20_000;
    let logits = logits(1, 9, DType::F32, &Device::Cpu)?;
    for config in configs() {
        let many = logits.expand([draws, 9])?;
        let tokens = sample_tokens(&many, &config, 1, &step(0, &Device::Cpu)?)?.to_vec::<i64>()?;
        for (token, &p) in filter_probabilities(&rows(&logits)?, &config)?[0].iter().enumerate() {
            let share = tokens.iter().filter(|&&drawn| drawn == token as i64).count() as f64 / draws as f64;
            let deviation = (p * (1.0 - p) / draws as f64).sqrt();
            // Five standard deviations, for some hundred numbers.
            assert!((share - p).abs() <= 5.0 * deviation + 1e-7, "{config:?}: token {token} {share} instead of {p}");
        }
    }
    Ok(())
}

/// The properties that the tests above check on the CPU hold on other devices, in rows of any length.
#[test]
fn sampling_is_the_same_on_every_device() -> Result<()> {
    let _alone = alone();
    if *device() == Device::Cpu {
        return Ok(());
    }
    for dtype in [DType::F32, DType::F64, DType::BF16, DType::F16] {
        for columns in [2, 700] {
            let here = logits(2, columns, dtype, &Device::Cpu)?;
            // Few distinct values tie, which only their order decides.
            let tied = here.to_dtype(DType::I64)?.to_dtype(dtype)?;
            for logits in [here, tied] {
                for config in configs() {
                    let tokens = |device: &Device| {
                        let logits = logits.to_device(device)?;
                        sample_tokens(&logits, &config, 5, &step(7, device)?)?.to_vec::<i64>()
                    };
                    assert_eq!(tokens(device())?, tokens(&Device::Cpu)?, "{dtype} {columns} {config:?}");
                }
            }
        }
    }
    Ok(())
}

/// Of equal logits the earlier ones stay; −∞ is never drawn.
#[test]
fn sampling_of_ties_and_infinities() -> Result<()> {
    let _alone = alone();
    for dtype in [DType::F32, DType::F64, DType::BF16] {
        let mut values = vec![1.5; 700];
        values[3] = f64::NEG_INFINITY;
        values[650] = 2.5;
        let logits = Tensor::generate([1, 700], dtype, device(), |i| values[i])?.expand([60, 700])?;
        let config = SamplingConfig { k: Some(4), temperature: 3.0, ..with(FilterLogits::TopK) };
        let tokens = sample_tokens(&logits, &config, 1, &step(0, device())?)?.to_vec::<i64>()?;
        for token in [0, 1, 2, 650] {
            assert!(tokens.contains(&token), "{token}");
        }
        assert!(tokens.iter().all(|token| [0, 1, 2, 650].contains(token)), "{tokens:?}");
        let greedy = SamplingConfig { temperature: 0.0, ..config };
        let best = sample_tokens(&logits.narrow(1, 0, 640)?, &greedy, 1, &step(0, device())?)?;
        assert_eq!(best.to_vec::<i64>()?, [0; 60]);
    }
    Ok(())
}

#[test]
fn sampling_refuses_broken_logits() -> Result<()> {
    let _alone = alone();
    let good = Tensor::zeros([2, 3], DType::F32, device())?;
    let zero = step(0, device())?;
    for broken in [f32::NAN, -f32::NAN, f32::INFINITY] {
        let logits = Tensor::from_slice(&[0.0, 1.0, 2.0, 3.0, broken, 5.0], [2, 3], device())?;
        for config in [with(FilterLogits::TopK), with(FilterLogits::TopA)] {
            let tokens = sample_tokens(&logits, &config, 0, &zero).and_then(|tokens| tokens.to_vec::<i64>());
            let error = tokens.unwrap_err().to_string();
            assert!(error.contains("finite logits"), "{error}");
        }
    }
    let none = Tensor::full([2, 3], f64::NEG_INFINITY, DType::F32, device())?;
    let tokens = sample_tokens(&none, &with(FilterLogits::None), 0, &zero).and_then(|tokens| tokens.to_vec::<i64>());
    assert!(tokens.is_err());
    // The error is reported once.
    assert_eq!(sample_tokens(&good, &with(FilterLogits::None), 0, &zero)?.to_vec::<i64>()?.len(), 2);

    let spec = SampleSpec { filter: SampleFilter::All, temperature: 1.0, seed: 0 };
    let refused = |tokens: Result<Tensor>, what: &str| {
        let error = tokens.unwrap_err();
        assert!(error.to_string().contains(what), "{error}");
    };
    refused(Tensor::zeros([3], DType::F32, device())?.sample(&spec, &zero), "[rows, tokens]");
    refused(Tensor::zeros([3, 0], DType::F32, device())?.sample(&spec, &zero), "[3, 0]");
    refused(Tensor::zeros([3, 2], DType::I64, device())?.sample(&spec, &zero), "float");
    refused(good.sample(&spec, &good), "step");
    refused(good.sample(&SampleSpec { temperature: -1.0, ..spec }, &zero), "temperature");
    for filter in [
        SampleFilter::Best(0),
        SampleFilter::MassUpTo(1.5),
        SampleFilter::MassBelow(-0.1),
        SampleFilter::MinP(f64::NAN),
        SampleFilter::TopA { power: -1.0, ratio: 0.5 },
    ] {
        refused(good.sample(&SampleSpec { filter, ..spec }, &zero), "out of range");
    }
    let config = SamplingConfig { temperature: -1.0, ..Default::default() };
    let error = sample_tokens(&good, &config, 0, &zero).unwrap_err();
    assert!(matches!(error.kind(), ErrorKind::Option { key, .. } if key == "temperature"), "{error}");
    Ok(())
}
