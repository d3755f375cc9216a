//! Parameters: names, initial values, tying, and loading that either succeeds or changes nothing.

use std::collections::BTreeMap;

use x_transformers::{DType, Device, Error, ErrorKind, Init, Param, ParamMap, ParamStore, Result, Tape, Tensor};

const CPU: Device = Device::Cpu;

fn values(param: &Param) -> Vec<f64> {
    param.tensor().to_f64_vec().unwrap()
}

/// The parameters of a small model, registered in the order of `order`.
fn model(store: &ParamStore, order: [usize; 3]) -> Result<ParamMap> {
    for layer in order {
        let layer = store.at("layers").at(layer);
        layer.param("weight", [3, 2], Init::linear(2))?;
        layer.at("norm").param("bias", [2], Init::Normal(0.5))?;
    }
    store.param("scale", (), Init::Constant(0.1))?;
    Ok(store.params())
}

fn state(entries: &[(&str, &[usize])]) -> BTreeMap<String, Tensor> {
    let tensor = |shape: &[usize]| Tensor::generate(shape, DType::F64, &CPU, |i| i as f64 + 1.0).unwrap();
    entries.iter().map(|(name, shape)| (name.to_string(), tensor(shape))).collect()
}

#[test]
fn names_follow_the_tree() -> Result<()> {
    let store = ParamStore::new(1, DType::F32, &CPU);
    let params = model(&store, [0, 1, 2])?;
    let names: Vec<_> = params.iter().map(|(name, _)| name).collect();
    assert_eq!(
        names,
        [
            "layers.0.norm.bias",
            "layers.0.weight",
            "layers.1.norm.bias",
            "layers.1.weight",
            "layers.2.norm.bias",
            "layers.2.weight",
            "scale"
        ]
    );
    assert_eq!(params.numel(), 3 * (6 + 2) + 1);
    assert_eq!((store.name(), store.at("a").at("b").name()), ("", "a.b"));
    assert_eq!((store.dtype(), store.device()), (DType::F32, &CPU));
    assert!(params.get("layers.1.weight").is_some() && params.get("layers.1").is_none());
    assert_eq!(format!("{:?}", params.get("scale").unwrap()), "Param([] f32)");
    assert_eq!(params.get("layers.0.weight").unwrap().tensor().shape(), [3, 2]);
    Ok(())
}

#[test]
fn values_depend_only_on_seed_and_name() -> Result<()> {
    let maps = [[0, 1, 2], [2, 0, 1]].map(|order| model(&ParamStore::new(7, DType::F32, &CPU), order).unwrap());
    for (name, param) in maps[0].iter() {
        assert_eq!(values(param), values(maps[1].get(name).unwrap()), "{name}");
    }
    let weight = |map: &ParamMap, layer: usize| values(map.get(&format!("layers.{layer}.weight")).unwrap());
    assert_ne!(weight(&maps[0], 0), weight(&maps[0], 1));
    let other = model(&ParamStore::new(8, DType::F32, &CPU), [0, 1, 2])?;
    assert_ne!(weight(&maps[0], 0), weight(&other, 0));
    // A scope only adds its name.
    let alone = ParamStore::new(7, DType::F32, &CPU).param("layers.0.weight", [3, 2], Init::linear(2))?;
    assert_eq!(values(&alone), weight(&maps[0], 0));
    Ok(())
}

#[test]
fn models_of_every_dtype_start_from_the_same_values() -> Result<()> {
    let maps = [DType::F32, DType::F64, DType::BF16].map(|d| model(&ParamStore::new(7, d, &CPU), [0, 1, 2]).unwrap());
    for (name, single) in maps[0].iter() {
        assert_eq!(values(single), values(maps[1].get(name).unwrap()), "{name} in f64");
        let half = single.tensor().detach().to_dtype(DType::BF16)?;
        assert_eq!(half.to_f64_vec()?, values(maps[2].get(name).unwrap()), "{name} in bf16");
    }
    Ok(())
}

#[test]
fn initial_values_have_their_distribution() -> Result<()> {
    let store = ParamStore::new(3, DType::F64, &CPU);
    let moments = |name: &str, init: Init| -> Result<(f64, f64, f64)> {
        let x = values(&store.param(name, [200, 250], init)?);
        let mean = x.iter().sum::<f64>() / x.len() as f64;
        let variance = x.iter().map(|x| (x - mean).powi(2)).sum::<f64>() / x.len() as f64;
        Ok((mean, variance.sqrt(), x.iter().fold(0.0, |largest: f64, x| largest.max(x.abs()))))
    };
    let (mean, deviation, _) = moments("normal", Init::Normal(0.02))?;
    assert!(mean.abs() < 4e-4 && (deviation / 0.02 - 1.0).abs() < 0.02, "{mean} {deviation}");
    let (mean, deviation, largest) = moments("uniform", Init::linear(16))?;
    assert!(mean.abs() < 4e-3 && (deviation * 12f64.sqrt() / 0.5 - 1.0).abs() < 0.02, "{mean} {deviation}");
    assert!(largest <= 0.25 && largest > 0.2499);
    let (_, deviation, _) = moments("kaiming", Init::kaiming_normal(50))?;
    assert!((deviation / 0.2 - 1.0).abs() < 0.02);
    assert_eq!(moments("constant", Init::Constant(1.0))?, (1.0, 0.0, 1.0));
    assert!(values(&store.param("none", [0], Init::linear(0))?).is_empty());
    Ok(())
}

#[test]
fn a_store_of_shapes_holds_no_memory() -> Result<()> {
    let store = ParamStore::shapes(DType::F32, &CPU);
    let huge = store.at("layers").param("weight", [1 << 20, 1 << 12], Init::Normal(1.0))?;
    store.param("none", [0, 3], Init::Constant(1.0))?;
    assert_eq!(huge.tensor().shape()[..], [1 << 20, 1 << 12]);
    assert_eq!(store.params().numel(), 1 << 32);
    // Loading gives each its own memory.
    let small = store.param("small", [2], Init::Constant(1.0))?;
    small.set(Tensor::from_slice(&[1.0f32, 2.0], [2], &CPU)?)?;
    assert_eq!(small.tensor().to_vec::<f32>()?, [1.0, 2.0]);
    Ok(())
}

#[test]
fn a_store_of_zeros() -> Result<()> {
    let params = model(&ParamStore::zeros(DType::F32, &CPU), [0, 1, 2])?;
    assert!(params.iter().all(|(_, param)| values(param).iter().all(|&x| x == 0.0)));
    Ok(())
}

#[test]
fn duplicates_are_refused() -> Result<()> {
    let store = ParamStore::new(1, DType::F32, &CPU);
    let weight = store.at("a").param("weight", [2], Init::Constant(1.0))?;
    let buffer = Tensor::zeros([1], DType::F32, &CPU)?;
    store.buffer("a.frequencies", buffer.clone())?;
    for taken in ["a.weight", "a.frequencies"] {
        for error in [
            store.param(taken, [2], Init::Constant(1.0)).map(|_| ()),
            store.tie(taken, &weight).map(|_| ()),
            store.buffer(taken, buffer.clone()).map(|_| ()),
        ] {
            let message = error.unwrap_err().to_string();
            assert!(message.contains(taken) && message.contains("twice"), "{message}");
        }
    }
    assert_eq!(store.params().state_dict().len(), 2);
    Ok(())
}

#[test]
fn illegal_parameters_are_refused() -> Result<()> {
    let store = ParamStore::new(1, DType::F32, &CPU);
    assert!(store.param("large", [usize::MAX, 2], Init::Constant(0.0)).is_err());
    assert!(store.param("deep", [1; 7], Init::Constant(0.0)).is_err());
    assert!(store.params().state_dict().is_empty(), "what failed is not registered");
    assert!(matches!(Param::new(Tensor::arange(2, &CPU)?).map_err(Error::into_kind), Err(ErrorKind::DType { .. })));
    let integers = ParamStore::new(1, DType::I64, &CPU);
    assert!(integers.param("weight", [2], Init::Constant(1.0)).is_err());
    let param = Param::new(Tensor::zeros([2], DType::F32, &CPU)?)?;
    let message = param.set(Tensor::zeros([3], DType::F32, &CPU)?).unwrap_err().to_string();
    assert!(message.contains("[2]") && message.contains("[3]"), "{message}");
    assert!(param.set(Tensor::zeros([2], DType::F64, &CPU)?).is_err());
    Ok(())
}

#[test]
fn tied_parameters_are_one() -> Result<()> {
    let store = ParamStore::new(1, DType::F64, &CPU);
    let table = store.param("embedding.weight", [3, 2], Init::Normal(1.0))?;
    let tied = store.at("logits").tie("weight", &table)?;
    let params = store.params();
    assert_eq!(table.leaf(), tied.leaf());
    assert_eq!((params.iter().count(), params.unique().count(), params.numel()), (2, 1, 6));
    assert_eq!(params.unique().next().unwrap().0, "embedding.weight");
    assert_eq!(params.state_dict().len(), 2);
    // Gradients of both uses add up in one place.
    let mut tape = Tape::grad();
    let loss = Tensor::cat(&[&table.tensor(), &tied.tensor().affine(2.0, 0.0)?], 0)?.sum(&[])?;
    let grads = tape.backward(&loss)?;
    assert_eq!(grads.len(), 1);
    assert_eq!(grads.param(&tied).unwrap().to_f64_vec()?, [3.0; 6]);
    tied.set(Tensor::ones([3, 2], DType::F64, &CPU)?)?;
    assert_eq!(values(&table), [1.0; 6]);
    Ok(())
}

#[test]
fn buffers_are_saved_and_not_trained() -> Result<()> {
    let store = ParamStore::new(1, DType::F32, &CPU);
    store.param("weight", [2], Init::Constant(1.0))?;
    store.at("rotary").buffer("inv_freq", Tensor::ones([4], DType::F32, &CPU)?)?;
    let params = store.params();
    assert_eq!(params.buffers().map(|(name, _)| name).collect::<Vec<_>>(), ["rotary.inv_freq"]);
    assert_eq!((params.numel(), params.iter().count()), (2, 1));
    assert_eq!(params.state_dict().into_keys().collect::<Vec<_>>(), ["rotary.inv_freq", "weight"]);
    // The file may omit a buffer, which then keeps its initial value, or hold it with the right shape.
    let buffer = || params.buffers().next().unwrap().1.to_f64_vec();
    params.load(&state(&[("weight", &[2])]))?;
    assert_eq!(buffer()?, [1.0; 4]);
    let mut saved = state(&[("weight", &[2]), ("rotary.inv_freq", &[4])]);
    saved.insert("rotary.inv_freq".into(), Tensor::from_slice(&[1.0f64, 0.5, 0.25, 0.125], [4], &CPU)?);
    params.load(&saved)?;
    assert_eq!(buffer()?, [1.0, 0.5, 0.25, 0.125]);
    assert_eq!(params.state_dict()["rotary.inv_freq"].dtype(), DType::F32);
    assert!(params.load(&state(&[("weight", &[2]), ("rotary.inv_freq", &[5])])).is_err());
    Ok(())
}

#[test]
fn loading_converts_and_replaces() -> Result<()> {
    let params = model(&ParamStore::new(1, DType::BF16, &CPU), [0, 1, 2])?;
    let source = model(&ParamStore::new(2, DType::F32, &CPU), [0, 1, 2])?;
    let state = source.state_dict();
    params.load(&state)?;
    for (name, param) in params.iter() {
        assert_eq!(param.tensor().dtype(), DType::BF16);
        assert_eq!(values(param), state[name].to_dtype(DType::BF16)?.to_f64_vec()?, "{name}");
    }
    // A strided tensor of the file is packed.
    let store = ParamStore::zeros(DType::F64, &CPU);
    let weight = store.param("weight", [2, 3], Init::Constant(0.0))?;
    let turned = Tensor::generate([3, 2], DType::F64, &CPU, |i| i as f64)?.transpose(0, 1)?;
    store.params().load(&BTreeMap::from([("weight".to_string(), turned)]))?;
    assert_eq!(values(&weight), [0.0, 2.0, 4.0, 1.0, 3.0, 5.0]);
    assert!(weight.tensor().is_contiguous());
    Ok(())
}

#[test]
fn loading_lists_every_mismatch() -> Result<()> {
    let store = ParamStore::new(1, DType::F32, &CPU);
    for name in ["a", "b", "c", "d"] {
        store.param(name, [2], Init::Normal(1.0))?;
    }
    let params = store.params();
    let before: Vec<_> = params.iter().map(|(_, param)| values(param)).collect();
    let wrong = state(&[("a", &[2]), ("b", &[3]), ("c", &[2, 1]), ("e", &[2]), ("f.weight", &[1])]);
    match params.load(&wrong) {
        Err(error) => {
            let message = error.to_string();
            let ErrorKind::Weights { missing, unused, mismatched } = error.into_kind() else { panic!("{message}") };
            assert_eq!(missing, ["d"]);
            assert_eq!(unused, ["e", "f.weight"]);
            assert_eq!(mismatched, [("b".into(), vec![2], vec![3]), ("c".into(), vec![2], vec![2, 1])]);
            for line in
                ["missing         d", "unused          e", "shape mismatch  b: [2] in the model, [3] in the file"]
            {
                assert!(message.contains(line), "{message}");
            }
        }
        other => panic!("{other:?}"),
    }
    let after: Vec<_> = params.iter().map(|(_, param)| values(param)).collect();
    assert_eq!(before, after, "a refused file changes nothing");
    Ok(())
}

#[test]
fn loading_takes_tied_parameters_once() -> Result<()> {
    let store = ParamStore::zeros(DType::F32, &Device::Cpu);
    let encoder = store.param("encoder.weight", [2], Init::Constant(0.0))?;
    store.tie("decoder.weight", &encoder)?;
    let params = store.params();
    let of = |numbers: [f32; 2]| Tensor::from_slice(&numbers, [2], &Device::Cpu);
    let dict = |entries: &[(&str, [f32; 2])]| -> Result<BTreeMap<String, Tensor>> {
        entries.iter().map(|(name, numbers)| Ok((name.to_string(), of(*numbers)?))).collect()
    };
    for (step, names) in
        [&["encoder.weight"][..], &["decoder.weight"], &["encoder.weight", "decoder.weight"]].into_iter().enumerate()
    {
        let numbers = [step as f32, 7.0];
        params.load(&dict(&names.iter().map(|name| (*name, numbers)).collect::<Vec<_>>())?)?;
        assert_eq!(values(&encoder), [step as f64, 7.0]);
    }
    let two = params.load(&dict(&[("encoder.weight", [1.0, 2.0]), ("decoder.weight", [1.0, 3.0])])?).unwrap_err();
    assert!(["encoder.weight", "decoder.weight", "tied"].iter().all(|part| two.to_string().contains(part)), "{two}");
    assert_eq!(values(&encoder), [2.0, 7.0]);
    match params.load(&BTreeMap::new()).unwrap_err().into_kind() {
        ErrorKind::Weights { missing, .. } => assert_eq!(missing, ["decoder.weight", "encoder.weight"]),
        other => panic!("{other}"),
    }
    Ok(())
}

#[test]
fn loading_is_all_or_nothing() -> Result<()> {
    let store = ParamStore::new(1, DType::F32, &CPU);
    store.param("a", [2], Init::Normal(1.0))?;
    store.param("z", [2], Init::Normal(1.0))?;
    let params = store.params();
    let before: Vec<_> = params.iter().map(|(_, param)| values(param)).collect();
    // The last name in the alphabet cannot be converted; the first could.
    let mut wrong = state(&[("a", &[2]), ("z", &[2])]);
    wrong.insert("z".into(), Tensor::arange(2, &CPU)?);
    let message = params.load(&wrong).unwrap_err().to_string();
    assert!(message.contains("z: expected a float dtype, got i64"), "{message}");
    let after: Vec<_> = params.iter().map(|(_, param)| values(param)).collect();
    assert_eq!(before, after);
    Ok(())
}

#[test]
fn a_state_dict_is_a_snapshot() -> Result<()> {
    let store = ParamStore::new(1, DType::F64, &CPU);
    let weight = store.param("weight", [2], Init::Constant(1.0))?;
    let params = store.params();
    let snapshot = params.state_dict();
    weight.set(Tensor::zeros([2], DType::F64, &CPU)?)?;
    assert_eq!(snapshot["weight"].to_f64_vec()?, [1.0, 1.0]);
    params.load(&snapshot)?;
    assert_eq!(values(&weight), [1.0, 1.0]);
    // It holds constants, whose use records nothing.
    let tape = Tape::grad();
    let _ = snapshot["weight"].sum(&[])?;
    assert!(tape.is_empty());
    let _ = weight.tensor().sum(&[])?;
    assert_eq!(tape.len(), 1);
    Ok(())
}

#[test]
fn parameters_are_shared_between_threads() -> Result<()> {
    let store = ParamStore::new(1, DType::F64, &CPU);
    std::thread::scope(|scope| {
        for thread in 0..8 {
            let store = store.at("layers").at(thread);
            scope.spawn(move || {
                for index in 0..20 {
                    store.param(&format!("weight{index}"), [3], Init::Normal(1.0)).unwrap();
                }
            });
        }
    });
    assert_eq!(store.params().unique().count(), 160);
    let alone = ParamStore::new(1, DType::F64, &CPU).param("layers.5.weight7", [3], Init::Normal(1.0))?;
    assert_eq!(values(store.params().get("layers.5.weight7").unwrap()), values(&alone));
    Ok(())
}
