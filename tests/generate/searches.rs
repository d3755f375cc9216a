//! Beams find the likeliest continuations, and drafts change neither tokens nor their distribution.

use super::*;

/// Computes the log-probability of a continuation, token by token without a cache.
fn log_probability(model: &AutoregressiveWrapper, prompt: &[i64], new: &[i64]) -> Result<f64> {
    let mut row = prompt.to_vec();
    let mut sum = 0.0;
    for &token in new {
        let logits = model.net.forward(&ints(&row, &[1, row.len()])?, &ForwardOptions::default())?.out;
        let last = logits.select(1, row.len() - 1)?.to_f64_vec()?;
        sum += filter_probabilities(&[last], &all_tokens(1.0))?[0][token as usize].ln();
        row.push(token);
    }
    Ok(sum)
}

#[test]
fn beams_find_the_most_likely_continuations() -> Result<()> {
    let vocabulary = 5;
    let model = decoder(vocabulary, 1, 11)?;
    let prompts = [[1i64, 2], [3, 0]];
    let prompt = ints(&prompts.concat(), &[2, 2])?;
    let (n, eos, penalty) = (3, 4, 0.7);
    let options = GenerateOptions { eos_tokens: vec![eos], ..Default::default() };
    // As many beams as continuations: nothing is pruned.
    let wide = BeamOptions { beams: vocabulary, length_penalty: penalty };
    let found = model.beam_search(&prompt, n, &wide, &options)?;
    for (row, prompt) in found.iter().zip(&prompts) {
        assert_eq!(row.len(), vocabulary);
        assert!(row.windows(2).all(|pair| pair[0].score >= pair[1].score));
        for hypothesis in row {
            let tokens = &hypothesis.tokens;
            let expected = log_probability(&model, prompt, tokens)? / (tokens.len() as f64).powf(penalty);
            assert!((hypothesis.score - expected).abs() < 1e-9, "{hypothesis:?} instead of {expected}");
            let inner = &tokens[..tokens.len() - 1];
            assert!(!inner.contains(&eos) && (tokens.len() == n || tokens.last() == Some(&eos)), "{tokens:?}");
        }
        // With this number of beams, the best of all continuations is among them here.
        let mut best = (f64::NEG_INFINITY, vec![]);
        for code in 0..vocabulary.pow(n as u32) {
            let mut tokens: Vec<i64> =
                (0..n).map(|at| (code / vocabulary.pow(at as u32) % vocabulary) as i64).collect();
            if let Some(end) = tokens.iter().position(|&token| token == eos) {
                tokens.truncate(end + 1);
            }
            let score = log_probability(&model, prompt, &tokens)? / (tokens.len() as f64).powf(penalty);
            if score > best.0 + 1e-9 {
                best = (score, tokens);
            }
        }
        assert_eq!(row[0].tokens, best.1);
    }
    // One beam is greedy; rows do not depend on each other; past the window and without a cache it is the same.
    let one = BeamOptions { beams: 1, length_penalty: 1.0 };
    let plain = GenerateOptions { sampling: greedy(), ..Default::default() };
    let chosen = model.beam_search(&prompt, 16, &one, &GenerateOptions::default())?;
    assert_eq!(chosen.iter().map(|row| row[0].tokens.clone()).collect::<Vec<_>>(), run(&model, &prompt, 16, &plain)?);
    let four = BeamOptions::default();
    let together = model.beam_search(&prompt, 16, &four, &options)?;
    let anew = GenerateOptions { recompute: true, ..options.clone() };
    for (row, together) in together.iter().enumerate() {
        for options in [&options, &anew] {
            let alone = model.beam_search(&prompt.narrow(0, row, 1)?, 16, &four, options)?.remove(0);
            for (a, b) in alone.iter().zip(together) {
                assert!(a.tokens == b.tokens && (a.score - b.score).abs() < 1e-9, "{a:?} {b:?}");
            }
        }
    }
    Ok(())
}

#[test]
fn drafts_do_not_change_greedy_tokens() -> Result<()> {
    let model = decoder(20, 2, 5)?;
    let prompt = ints(&[3, 1, 4, 1, 5, 9, 0, 0], &[2, 4])?;
    for (lengths, eos_tokens) in [(None, vec![]), (Some(vec![4, 2]), vec![]), (None, vec![7])] {
        let options = GenerateOptions {
            sampling: greedy(),
            prompt_lengths: lengths,
            eos_tokens,
            repetition_penalty: 1.1,
            ..Default::default()
        };
        // Past the window of 14 too.
        let expected = run(&model, &prompt, 16, &options)?;
        for (draft, ahead) in [(decoder(20, 1, 8)?, 3), (decoder(20, 2, 5)?, 4)] {
            let (new, stats) = model.generate_with_draft(&draft, ahead, &prompt, 16, &options, &mut |_| true)?;
            let width = new.shape()[1];
            let rows: Vec<_> = new.to_vec::<i64>()?.chunks(width).map(<[i64]>::to_vec).collect();
            assert_eq!(rows, expected, "{ahead} ahead");
            assert!(stats.accepted <= stats.proposed && stats.passes > 0);
            if ahead == 4 && options.eos_tokens.is_empty() {
                assert_eq!(stats.accepted, stats.proposed, "a model agrees with itself");
                assert!(stats.passes < 16);
            }
        }
    }
    Ok(())
}

/// Frequencies of pairs of tokens agree with their probabilities within sampling error.
#[test]
fn drafts_do_not_change_the_distribution() -> Result<()> {
    let vocabulary = 4;
    let (model, draft) = (decoder(vocabulary, 2, 5)?, decoder(vocabulary, 1, 8)?);
    let rows = if *device() == Device::Cpu { 6000 } else { 200 };
    let prompt = ints(&vec![1; rows], &[rows, 1])?;
    for sampling in [all_tokens(1.5), SamplingConfig { k: Some(3), ..SamplingConfig::default() }] {
        let options = GenerateOptions { sampling: sampling.clone(), seed: 6, ..Default::default() };
        let (new, stats) = model.generate_with_draft(&draft, 2, &prompt, 3, &options, &mut |_| true)?;
        assert!(stats.accepted > rows / 4 && stats.accepted < stats.proposed, "{stats:?}");
        let mut counts: HashMap<Vec<i64>, usize> = HashMap::new();
        new.to_vec::<i64>()?.chunks(3).for_each(|row| *counts.entry(row.to_vec()).or_default() += 1);
        let next = |row: &[i64]| -> Result<Vec<f64>> {
            let logits = model.net.forward(&ints(row, &[1, row.len()])?, &ForwardOptions::default())?.out;
            Ok(filter_probabilities(&[logits.select(1, row.len() - 1)?.to_f64_vec()?], &sampling)?.remove(0))
        };
        for code in 0..vocabulary.pow(3) as i64 {
            let tokens = [code / 16, code / 4 % 4, code % 4];
            let mut p = 1.0;
            let mut row = vec![1];
            for token in tokens {
                p *= next(&row)?[token as usize];
                row.push(token);
            }
            let share = *counts.get(&tokens[..]).unwrap_or(&0) as f64 / rows as f64;
            // Four and a half standard deviations.
            let bound = 4.5 * (p * (1.0 - p) / rows as f64).sqrt() + 1e-12;
            assert!((share - p).abs() <= bound, "{tokens:?}: {share} instead of {p}");
        }
    }
    Ok(())
}
