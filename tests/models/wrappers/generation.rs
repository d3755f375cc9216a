//! Generation of language models: greedy, seeded, stopped, from masked prompts, and what is drawn.

use super::*;

/// Greedy generation by hand: the argmax after the last tokens that fit.
#[test]
fn models_generate_greedily() -> Result<()> {
    let model = autoregressive(AutoregressiveConfig { net: wrapper(decoder()), ..Default::default() })?;
    let greedy = SamplingConfig { temperature: 0.0, ..Default::default() };
    let options = GenerateOptions { sampling: greedy, ..Default::default() };
    let prompt = tokens(2, 4)?;
    let mut streamed = Vec::new();
    let new = model.generate(&prompt, 9, &options, &mut |tokens| {
        streamed.push(tokens.to_vec());
        true
    })?;
    let mut rows: Vec<Vec<i64>> = prompt.to_vec::<i64>()?.chunks(4).map(<[i64]>::to_vec).collect();
    for streamed in &streamed {
        let window: Vec<i64> = rows.iter().flat_map(|row| row[row.len().saturating_sub(10)..].to_vec()).collect();
        let n = window.len() / 2;
        let logits = model.net.forward(&ints(&window, &[2, n])?, &ForwardOptions::default())?.out;
        let best = logits.select(1, n - 1)?.argmax(-1)?.to_vec::<i64>()?;
        assert_eq!(*streamed, best);
        rows.iter_mut().zip(best).for_each(|(row, token)| row.push(token));
    }
    assert_eq!(streamed.len(), 9);
    assert_eq!(new.to_vec::<i64>()?, [&rows[0][4..], &rows[1][4..]].concat());
    // One-dimensional prompts give one-dimensional results, and rows do not depend on their batch.
    let alone = model.generate(&prompt.select(0, 1)?, 9, &options, &mut |_| true)?;
    assert_eq!(alone.shape()[..], [9]);
    assert_eq!(alone.to_vec::<i64>()?, rows[1][4..]);
    Ok(())
}

#[test]
fn models_generate_the_same_from_the_same_seed() -> Result<()> {
    let model = autoregressive(AutoregressiveConfig { net: wrapper(decoder()), ..Default::default() })?;
    let sampling = SamplingConfig { filter_logits_fn: FilterLogits::None, temperature: 5.0, ..Default::default() };
    let generate = |seed: u64, prompt: &Tensor| {
        let options = GenerateOptions { sampling: sampling.clone(), seed, ..Default::default() };
        model.generate(prompt, 12, &options, &mut |_| true)?.to_vec::<i64>()
    };
    let prompt = tokens(2, 3)?;
    let (one, two) = (generate(1, &prompt)?, generate(2, &prompt)?);
    assert_eq!(one, generate(1, &prompt)?);
    assert_ne!(one, two);
    assert_eq!(one[..12], generate(1, &prompt.narrow(0, 0, 1)?)?);
    Ok(())
}

#[test]
fn models_generate_stops() -> Result<()> {
    let model = autoregressive(AutoregressiveConfig { net: wrapper(decoder()), pad_value: 7, ..Default::default() })?;
    let all = SamplingConfig { filter_logits_fn: FilterLogits::None, temperature: 100.0, ..Default::default() };
    let prompt = tokens(2, 3)?;
    // The caller stops it.
    let mut calls = 0;
    let options = GenerateOptions { sampling: all.clone(), ..Default::default() };
    let new = model.generate(&prompt, 50, &options, &mut |_| {
        calls += 1;
        calls < 4
    })?;
    assert_eq!((new.shape()[1], calls), (4, 4));
    // Every row ends: tokens after the first end are padding.
    let options = GenerateOptions { sampling: all, eos_tokens: vec![5], ..Default::default() };
    let new = model.generate(&prompt, 400, &options, &mut |_| true)?;
    let n = new.shape()[1];
    assert!(n < 400);
    for row in new.to_vec::<i64>()?.chunks(n) {
        let end = row.iter().position(|&token| token == 5).expect("every row has ended");
        assert!(row[end + 1..].iter().all(|&token| token == 7), "{row:?}");
    }
    // The prompt counts: a row that has ended there is padded.
    let ended = ints(&[5, 1, 5, 2], &[2, 2])?;
    assert_eq!(model.generate(&ended, 9, &options, &mut |_| true)?.shape()[..], [2, 0]);
    let open = GenerateOptions { eos_tokens: vec![19], ..options.clone() };
    let new = model.generate(&ints(&[19, 3], &[2, 1])?, 2, &open, &mut |_| true)?.to_vec::<i64>()?;
    assert!(!new[2..].contains(&19) && new[..2] == [7, 7], "{new:?}");
    // Nothing to do, and nothing to start from.
    assert_eq!(model.generate(&prompt, 0, &options, &mut |_| true)?.shape()[..], [2, 0]);
    refused(model.generate(&ints(&[], &[2, 0])?, 3, &options, &mut |_| true), &["start_tokens", "[2, 0]"]);
    refused(model.generate(&ints(&[], &[0, 2])?, 3, &options, &mut |_| true), &["start_tokens", "[0, 2]"]);
    refused(model.generate(&ints(&[99], &[1])?, 3, &options, &mut |_| true), &["99"]);
    Ok(())
}

/// The prompt's mask grows with the tokens and slides with the window: padding in front never matters.
#[test]
fn models_generate_with_a_prompt_mask() -> Result<()> {
    let model = autoregressive(AutoregressiveConfig { net: wrapper(decoder()), ..Default::default() })?;
    let mask = bools(&[false, true, true, true], &[1, 4])?;
    let options = GenerateOptions {
        sampling: SamplingConfig { temperature: 0.0, ..Default::default() },
        forward: ForwardOptions { mask: Some(mask), ..Default::default() },
        ..Default::default()
    };
    let generate = |padding: i64, options: &GenerateOptions| {
        model.generate(&ints(&[padding, 4, 9, 2], &[1, 4])?, 12, options, &mut |_| true)?.to_vec::<i64>()
    };
    let padded = generate(5, &options)?;
    assert_eq!(padded, generate(17, &options)?);
    let seen = GenerateOptions { forward: ForwardOptions::default(), ..options };
    assert!((0..20).any(|token| generate(token, &seen).is_ok_and(|tokens| tokens != padded)));
    let short = bools(&[true], &[1, 1])?;
    let wrong =
        GenerateOptions { forward: ForwardOptions { mask: Some(short), ..Default::default() }, ..Default::default() };
    refused(model.generate(&tokens(1, 4)?, 2, &wrong, &mut |_| true), &["mask", "[1, 4]", "[1, 1]"]);
    Ok(())
}

#[test]
fn sampling_filters_keep_what_they_say() -> Result<()> {
    let probabilities = [0.5, 0.25, 0.15, 0.06, 0.04];
    let logits = vec![probabilities.iter().map(|p: &f64| p.ln()).collect::<Vec<_>>()];
    let kept = |config: SamplingConfig| -> Result<Vec<f64>> { Ok(filter_probabilities(&logits, &config)?.remove(0)) };
    let with = |filter_logits_fn: FilterLogits| SamplingConfig { filter_logits_fn, ..Default::default() };
    let normal = |n: usize| {
        let sum: f64 = probabilities[..n].iter().sum();
        (0..5).map(|i| if i < n { probabilities[i] / sum } else { 0.0 }).collect::<Vec<_>>()
    };
    let cases = [
        // 0.22.0: ⌈0.1 · 5⌉ tokens, and the mass 0.1.
        (with(FilterLogits::TopK), normal(1)),
        (SamplingConfig { filter_thres: 0.5, ..with(FilterLogits::TopK) }, normal(3)),
        (SamplingConfig { k: Some(2), ..with(FilterLogits::TopK) }, normal(2)),
        (SamplingConfig { k: Some(99), ..with(FilterLogits::TopK) }, normal(5)),
        (with(FilterLogits::TopP), normal(1)),
        (SamplingConfig { filter_thres: 0.3, ..with(FilterLogits::TopP) }, normal(2)),
        (with(FilterLogits::Nucleus), normal(3)),
        (SamplingConfig { filter_thres: 0.7, ..with(FilterLogits::Nucleus) }, normal(2)),
        (SamplingConfig { filter_thres: 1.0, ..with(FilterLogits::Nucleus) }, normal(5)),
        (SamplingConfig { min_p_ratio: 0.3, ..with(FilterLogits::MinP) }, normal(3)),
        (SamplingConfig { min_p_ratio: 1.0, ..with(FilterLogits::MinP) }, normal(1)),
        (with(FilterLogits::None), normal(5)),
        (SamplingConfig { temperature: 0.0, ..with(FilterLogits::None) }, normal(1)),
        (SamplingConfig { temperature: 1e-300, ..with(FilterLogits::None) }, normal(1)),
        (
            SamplingConfig { min_p_ratio: 0.5, ..with(FilterLogits::TopA) },
            vec![1.0 / 3.0, 1.0 / 3.0, 1.0 / 3.0, 0.0, 0.0],
        ),
    ];
    for (config, expected) in cases {
        let actual = kept(config.clone())?;
        let close = actual.iter().zip(&expected).all(|(a, e)| (a - e).abs() < 1e-12);
        assert!(close, "{config:?} gave {actual:?}, expected {expected:?}");
    }
    for (config, key) in [
        (SamplingConfig { temperature: -1.0, ..Default::default() }, "temperature"),
        (SamplingConfig { temperature: f64::NAN, ..Default::default() }, "temperature"),
        (SamplingConfig { filter_thres: 1.5, ..Default::default() }, "filter_thres"),
        (SamplingConfig { k: Some(0), ..Default::default() }, "k"),
        (SamplingConfig { k: Some(3), ..with(FilterLogits::TopP) }, "k"),
        (SamplingConfig { min_p_ratio: -0.1, ..Default::default() }, "min_p_ratio"),
        (SamplingConfig { min_p_pow: f64::INFINITY, ..Default::default() }, "min_p_pow"),
    ] {
        assert!(
            matches!(kept(config).unwrap_err().kind(), ErrorKind::Option { key: found, .. } if found == key),
            "{key}"
        );
    }
    assert!(filter_probabilities(&[vec![f64::NAN, 1.0]], &SamplingConfig::default()).is_err());
    assert!(filter_probabilities(&[vec![]], &SamplingConfig::default()).is_err());
    Ok(())
}

/// Shares of drawn tokens come close to the distribution.
#[test]
fn sampling_draws_the_distribution() -> Result<()> {
    let net = TransformerWrapperConfig { num_tokens: 4, ..wrapper(decoder()) };
    let model = autoregressive(AutoregressiveConfig { net, ..Default::default() })?;
    let prompt = ints(&[0; 4000], &[4000, 1])?;
    let all = SamplingConfig { filter_logits_fn: FilterLogits::None, ..Default::default() };
    let options = GenerateOptions { sampling: all.clone(), seed: 9, ..Default::default() };
    let drawn = model.generate(&prompt, 1, &options, &mut |_| true)?.to_vec::<i64>()?;
    let logits = model.net.forward(&ints(&[0], &[1, 1])?, &ForwardOptions::default())?.out.to_f64_vec()?;
    for (token, p) in filter_probabilities(&[logits], &all)?[0].iter().enumerate() {
        let share = drawn.iter().filter(|&&drawn| drawn == token as i64).count() as f64 / 4000.0;
        // Four standard deviations.
        assert!((share - p).abs() < 4.0 * (p * (1.0 - p) / 4000.0).sqrt(), "token {token}: {share} instead of {p}");
    }
    Ok(())
}
