//! Rotations and windows of models in folders.

use super::*;

/// Folders whose config sets other rotations agree with transformers.
#[test]
fn rotations_of_folders() -> Result<()> {
    let expected = expected();
    let read = |path: PathBuf| serde_json::from_slice::<Value>(&fs::read(path).unwrap()).unwrap();
    let cases = read(files("rotations.json"));
    let weights = TensorFile::open(files("llama3"))?.tensors()?;
    let folder = Folder::new("folders");
    write_safetensors(folder.0.join("model.safetensors"), &weights, &BTreeMap::new())?;
    let config = |keys: &Value| {
        let mut config = read(files("llama3/config.json"));
        config.as_object_mut().unwrap().remove("rope_parameters");
        config.as_object_mut().unwrap().extend(keys.as_object().unwrap().clone());
        folder.write("config.json", config.to_string());
    };
    for (name, keys) in cases.as_object().unwrap() {
        config(keys);
        check(&format!("llama3.{name}"), &folder.0, &expected)?;
    }
    let yarn = |key: &str, value: Value| {
        let mut rope = json!({"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16});
        rope[key] = value;
        json!({"rope_scaling": rope})
    };
    let refused = [
        (json!({"rope_scaling": {"rope_type": "longrope", "factor": 4.0}}), "has type `longrope`"),
        (json!({"rope_scaling": {"type": "su"}}), "has type `su`, expected default, linear, dynamic, yarn"),
        (json!({"rope_scaling": {"type": 3}}), "has type `not a string`"),
        (json!({"rope_scaling": "linear"}), "expected an object"),
        (json!({"rope_scaling": {"type": "linear"}}), "requires a number `factor`"),
        (json!({"rope_parameters": {"full_attention": {"rope_type": "default"}}}), "differs by layer"),
        (json!({"partial_rotary_factor": 0.5}), "`partial_rotary_factor` is 0.5, expected 1"),
        (yarn("truncate", "no".into()), "has `truncate` = \"no\", expected true or false"),
        (yarn("beta_fast", "fast".into()), "has `beta_fast` = \"fast\", expected a number"),
        (yarn("original_max_position_embeddings", 0.5.into()), "`original_max_position_embeddings` = 0.5"),
        (yarn("factor", 0.25.into()), "rotary_yarn_scaling"),
        (yarn("attention_factor", (-1).into()), "rotary_yarn_scaling"),
    ];
    for (keys, expected) in refused {
        config(&keys);
        let error = Pretrained::open(&folder.0).and_then(|file| file.model(DType::F32, &Device::Cpu)).unwrap_err();
        assert!(error.to_string().contains(expected), "{error}");
    }
    Ok(())
}

/// Either all layers of a Qwen2 have a window or none.
#[test]
fn windows_of_qwen2() -> Result<()> {
    let expected = expected();
    let weights = TensorFile::open(files("qwen2"))?.tensors()?;
    let folder = Folder::new("windows");
    write_safetensors(folder.0.join("model.safetensors"), &weights, &BTreeMap::new())?;
    let config = |keys: Value| {
        let bytes = fs::read(files("qwen2/config.json")).unwrap();
        let mut config = serde_json::from_slice::<Value>(&bytes).unwrap();
        let map = config.as_object_mut().unwrap();
        map.retain(|key, _| !key.contains("window") && key != "layer_types");
        map.extend(keys.as_object().unwrap().clone());
        folder.write("config.json", config.to_string());
    };
    for (name, keys) in [
        ("all", json!({"use_sliding_window": true, "max_window_layers": 0})),
        ("none", json!({"use_sliding_window": true, "max_window_layers": 2})),
        ("types", json!({"use_sliding_window": true, "layer_types": ["sliding_attention", "sliding_attention"]})),
        ("off", json!({"use_sliding_window": false, "max_window_layers": 0})),
    ] {
        let mut keys = keys;
        keys["sliding_window"] = 5.into();
        config(keys);
        check(&format!("qwen2.window.{name}"), &folder.0, &expected)?;
    }
    // A window as wide as the longest text.
    config(json!({"use_sliding_window": true, "sliding_window": 32, "max_window_layers": 1}));
    check("qwen2.window.off", &folder.0, &expected)?;
    for (keys, expected) in [
        (json!({"max_window_layers": 1}), "`max_window_layers` is 1, so only layers 1 to 2"),
        (json!({"max_window_layers": -1}), "`max_window_layers` is -1, expected a layer index"),
        (
            json!({"layer_types": ["sliding_attention", "full_attention"]}),
            "`layer_types` must be sliding_attention or full_attention for all layers",
        ),
        (json!({"layer_types": ["sliding_attention"]}), "`layer_types` must be"),
    ] {
        let mut keys = keys;
        keys["use_sliding_window"] = true.into();
        keys["sliding_window"] = 5.into();
        config(keys);
        let error = Pretrained::open(&folder.0).unwrap_err().to_string();
        assert!(error.contains(expected), "{error}");
    }
    Ok(())
}
