//! Generation by products of packed weights.

use super::*;

/// Products with packed weights of every type, on few and many rows: those with the dequantised weights, to within what
/// rounding the inputs to 8 bits changes.
#[test]
fn packed_products_are_close() -> Result<()> {
    let random = Philox::new(1, 0);
    for (index, kind) in QuantType::ALL.into_iter().filter(|kind| kind.is_packed()).enumerate() {
        let dtype = [DType::F64, DType::F32, DType::BF16, DType::F16][index % 4];
        for (rows, columns) in [(40, 256), (17, 1280), (0, 256)] {
            let make = |shape: [usize; 2], stream: u64| {
                Tensor::generate(shape, dtype, device(), |i| random.normal(i as u64 + (stream << 32)))
            };
            let (weight, bias) = (make([rows, columns], 1)?, make([1, rows], 2)?.flatten(0, 1)?);
            let matrix = PackedMatrix::quantize(&weight, kind)?;
            assert_eq!((matrix.kind(), matrix.shape()), (kind, [rows, columns]));
            let wide = matrix.dequantize(DType::F64)?;
            for count in [0, 1, 2, 9, 33] {
                let x = make([count, columns], 3)?;
                let bias = Some(&bias).filter(|_| count != 2);
                let y = matrix.linear(&x, bias)?;
                let bias = bias.map(|bias| bias.to_dtype(DType::F64)).transpose()?;
                let exact = x.to_dtype(DType::F64)?.linear(&wide, bias.as_ref())?.to_f64_vec()?;
                let largest = exact.iter().fold(0.0f64, |most, x| most.max(x.abs()));
                let error = y.to_f64_vec()?.iter().zip(exact).map(|(a, b)| (a - b).abs()).fold(0.0, f64::max);
                let bound = if dtype == DType::F64 { 1e-12 } else { 2e-2 };
                assert!(
                    y.dtype() == dtype && error <= bound * largest,
                    "{kind} {dtype} {rows} {columns} {count}: {error}"
                );
                // Rows on the CPU do not depend on each other.
                if count == 33 && *device() == Device::Cpu && dtype != DType::F64 && rows > 0 {
                    let alone = matrix
                        .linear(&x.narrow(0, 32, 1)?, bias.as_ref().map(|b| b.to_dtype(dtype)).transpose()?.as_ref())?;
                    assert_eq!(alone.to_f64_vec()?, y.narrow(0, 32, 1)?.to_f64_vec()?, "{kind}");
                }
            }
        }
    }
    Ok(())
}

#[test]
fn packed_products_at_every_instruction_level() {
    at_every_level(module_path!(), "packed_products_are_close");
}

/// Rounded models compute nearly the same, and a cache gives what the whole text gives.
#[test]
fn quantized_models_generate() -> Result<()> {
    let config = json!({"model": "TransformerWrapper", "num_tokens": 20, "max_seq_len": 30, "attn_layers": {"kind": "Decoder", "dim": 64, "depth": 2,
        "heads": 2, "attn_dim_head": 32, "rotary_pos_emb": true}});
    for dtype in [DType::F64, DType::F32] {
        let Config::TransformerWrapper(net) = Config::from_value(config.clone())? else { unreachable!() };
        let config = AutoregressiveConfig { net, pad_value: 0, ..AutoregressiveConfig::default() };
        let store = ParamStore::new(5, dtype, device());
        let plain = AutoregressiveWrapper::new(&config, &store)?;
        let x = random_tokens(2, &[2, 9], 20)?;
        let options = ForwardOptions::default();
        let a = plain.net.forward(&x, &options)?.out.to_f64_vec()?;
        let largest = a.iter().fold(0.0f64, |most, x| most.max(x.abs()));
        for (kind, bound) in [(QuantType::Q8_0, 0.03), (QuantType::Q4_0, 0.3), (QuantType::Q4K, 0.2)] {
            let mut small = plain.clone();
            small.quantize(kind)?;
            let b = small.net.forward(&x, &options)?.out.to_f64_vec()?;
            let error = a.iter().zip(&b).map(|(a, b)| (a - b).abs()).fold(0.0, f64::max);
            assert!(error > 0.0 && error < bound * largest, "{kind}: {error} of {largest}");
            let greedy = GenerateOptions { sampling: greedy(), ..Default::default() };
            let anew = GenerateOptions { recompute: true, ..greedy.clone() };
            assert_eq!(run(&small, &x, 12, &greedy)?, run(&small, &x, 12, &anew)?, "{kind}");
        }
        // The clone before keeps its weights.
        assert_eq!(plain.net.forward(&x, &options)?.out.to_f64_vec()?, a);
        assert!(plain.clone().quantize(QuantType::Q2K).is_err());
    }
    Ok(())
}
