//! Order of sublayers: a pure function of the options.

use super::options::{AttentionLayersConfig, LayerType, LayersKind};
use crate::{Error, Result, collect::CollectVec, error::ensure};

use LayerType::{CrossAttention, FeedForward, SelfAttention};

/// Returns the sublayers in order: `custom_layers`, else `par_ratio`, else `sandwich_coef`, else `depth` blocks.
///
/// Errors: an option out of its range, or more sublayers than memory could hold.
pub(super) fn layer_order(config: &AttentionLayersConfig) -> Result<Vec<LayerType>> {
    /// Far beyond any model, and small enough to be allocated.
    const MOST: usize = 1 << 16;
    ensure!(
        (1..=MOST).contains(&config.depth),
        Error::option("depth", format_args!("expected 1 to {MOST}, got {}", config.depth))
    );
    let block = block(config);
    if let Some(custom) = &config.custom_layers {
        ensure!(!custom.is_empty(), Error::option("custom_layers", "expected at least one of a, c and f, got none"));
        return Ok(custom.clone());
    }
    if let Some(ratio) = config.par_ratio {
        return par_order(config.depth, ratio, &block);
    }
    if let Some(coefficient) = config.sandwich_coef {
        ensure!(
            (1..=config.depth).contains(&coefficient),
            Error::option("sandwich_coef", format_args!("expected 1 to `depth` ({}), got {coefficient}", config.depth))
        );
        let mut order = vec![SelfAttention; coefficient];
        order.extend(block.repeat(config.depth - coefficient));
        order.extend([FeedForward].repeat(coefficient));
        return Ok(order);
    }
    Ok(block.repeat(config.depth))
}

/// Returns one block: `a f`, with cross-attention `a c f` or `c f`, with macaron another `f` first.
fn block(config: &AttentionLayersConfig) -> Vec<LayerType> {
    let cross_attender = config.kind == LayersKind::CrossAttender;
    let mut block = Vec::with_capacity(4);
    if config.macaron {
        block.push(FeedForward);
    }
    if !(cross_attender || config.only_cross) {
        block.push(SelfAttention);
    }
    if cross_attender || config.cross_attend {
        block.push(CrossAttention);
    }
    block.push(FeedForward);
    block
}

/// Returns an order with attention in the first two thirds only (<https://arxiv.org/abs/2009.04534>).
fn par_order(depth: usize, ratio: usize, block: &[LayerType]) -> Result<Vec<LayerType>> {
    let total = depth * block.len();
    ensure!(
        (2..=total).contains(&ratio),
        Error::option("par_ratio", format_args!("expected 2 to {total} (the number of sublayers), got {ratio}"))
    );
    let mut block: Vec<LayerType> = block.iter().copied().filter(|&layer| layer != FeedForward).collect_vec();
    let attention = total / ratio;
    let cut = total * 2 / 3;
    let width = (cut + cut / attention) / attention;
    ensure!(
        block.len() <= width,
        Error::option(
            "par_ratio",
            format_args!(
                "{ratio} leaves {width} sublayers per block, but a block has {} attention layers",
                block.len()
            )
        )
    );
    block.resize(width, FeedForward);
    let mut order = block.repeat(attention);
    // Rounding can make the attention part longer than the whole; it is not truncated.
    order.resize(order.len().max(total), FeedForward);
    Ok(order)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ErrorKind;

    fn letters(config: AttentionLayersConfig) -> String {
        let config = AttentionLayersConfig { dim: 8, ..config };
        layer_order(&config).map_or_else(|error| error.to_string(), |order| order.iter().map(|l| l.letter()).collect())
    }

    /// Orders written out by hand from the papers and the documentation.
    #[test]
    fn layer_order_table() {
        let base = |depth| AttentionLayersConfig::encoder(8, depth);
        let cases = [
            (base(2), "afaf"),
            (AttentionLayersConfig { cross_attend: true, ..base(2) }, "acfacf"),
            (AttentionLayersConfig { cross_attend: true, only_cross: true, ..base(2) }, "cfcf"),
            (AttentionLayersConfig::cross_attender(8, 2), "cfcf"),
            (AttentionLayersConfig { macaron: true, ..base(2) }, "fafFaf"),
            (AttentionLayersConfig { macaron: true, cross_attend: true, ..base(1) }, "facf"),
            (AttentionLayersConfig { sandwich_coef: Some(2), ..base(6) }, "aaafafafafff"),
            (AttentionLayersConfig { sandwich_coef: Some(1), cross_attend: true, ..base(2) }, "aacff"),
            (AttentionLayersConfig { sandwich_coef: Some(2), ..base(2) }, "aaff"),
            (AttentionLayersConfig { par_ratio: Some(5), ..base(6) }, "afffffafffff"),
            (AttentionLayersConfig { par_ratio: Some(4), ..base(4) }, "affaffff"),
            (
                AttentionLayersConfig {
                    custom_layers: Some(vec![SelfAttention, FeedForward]),
                    par_ratio: Some(2),
                    ..base(6)
                },
                "af",
            ),
        ];
        for (config, expected) in cases {
            assert_eq!(letters(config.clone()), expected.to_lowercase(), "{config:?}");
        }
    }

    #[test]
    fn layer_order_ranges() {
        let base = || AttentionLayersConfig::encoder(8, 3);
        for (config, key) in [
            (AttentionLayersConfig { depth: 0, ..base() }, "depth"),
            (AttentionLayersConfig { depth: usize::MAX, ..base() }, "depth"),
            (AttentionLayersConfig { sandwich_coef: Some(0), ..base() }, "sandwich_coef"),
            (AttentionLayersConfig { sandwich_coef: Some(4), ..base() }, "sandwich_coef"),
            (AttentionLayersConfig { par_ratio: Some(1), ..base() }, "par_ratio"),
            (AttentionLayersConfig { par_ratio: Some(7), ..base() }, "par_ratio"),
            (AttentionLayersConfig { custom_layers: Some(vec![]), ..base() }, "custom_layers"),
        ] {
            match layer_order(&config).map_err(Error::into_kind) {
                Err(ErrorKind::Option { key: found, .. }) => assert_eq!(found, key),
                other => panic!("{config:?} gave {other:?}"),
            }
        }
    }
}
