//! The table of options of version 2 in the book: generated from the sources, and complete.
//!
//! `XT_BLESS=1` writes it.

use std::{collections::BTreeMap, fmt::Write, fs, path::Path};

use serde_json::{Map, Value, json};
use x_transformers::config::{Config, ModelPlan};

fn read(path: &str) -> String {
    fs::read_to_string(Path::new(env!("CARGO_MANIFEST_DIR")).join(path)).unwrap()
}

/// A struct of options: its documentation, and for each option name, default and documentation.
struct Class {
    name: String,
    doc: String,
    options: Vec<[String; 3]>,
}

/// Reads the tables of `options!`.
fn classes() -> Vec<Class> {
    let mut classes: Vec<Class> = Vec::new();
    for path in ["src/config/v2/layers.rs", "src/config/v2/wrappers.rs", "src/config/v2/around.rs"] {
        let mut doc: Vec<String> = Vec::new();
        let mut inside = false;
        for line in read(path).lines() {
            let line = line.trim();
            if let Some(text) = line.strip_prefix("///") {
                doc.push(text.trim().to_string());
            } else if let Some(name) = line.strip_prefix("pub struct ") {
                let name = name.trim_end_matches([' ', '{']).to_string();
                let first = doc.iter().take_while(|line| !line.is_empty()).cloned().collect::<Vec<_>>().join(" ");
                classes.push(Class { name, doc: first, options: Vec::new() });
                (inside, doc) = (true, Vec::new());
            } else if line.starts_with("} with {") || line == "}" {
                inside = false;
                doc.clear();
            } else if let (true, Some((name, rest))) = (inside, line.split_once(": ")) {
                let (_, default) = rest.rsplit_once(" = ").expect("an option has a default");
                let option = [name.to_string(), default.trim_end_matches(',').to_string(), doc.join(" ")];
                classes.last_mut().unwrap().options.push(option);
                doc.clear();
            } else {
                doc.clear();
            }
        }
    }
    classes
}

/// Names of the options that are refused, by constant of `refused.rs`.
fn refused() -> BTreeMap<String, Vec<String>> {
    let text = read("src/config/v2/refused.rs");
    let constants = text.split("pub(super) const ").skip(1).map(|part| {
        let (name, rest) = part.split_once(':').unwrap();
        let list = rest.split('"').nth(1).unwrap();
        let names = list.split_ascii_whitespace().map(|row| row.split('=').next().unwrap().to_string());
        (name.to_string(), names.collect())
    });
    constants.collect()
}

/// Writes links out, and defaults as JSON has them.
fn default_of(value: &str) -> String {
    match value {
        "None" => "none".to_string(),
        "Vec::new()" => "none".to_string(),
        "SwitchOrFactor::Off" => "false".to_string(),
        "ShiftTokens::All(0)" | "vec![0.0]" => "0".to_string(),
        value => value.trim_end_matches(".0").to_string(),
    }
}

fn table() -> String {
    let mut text = String::new();
    let prefixes = [("AttentionConfig", "attn_"), ("FeedForwardConfig", "ff_")];
    for Class { name, doc, options } in classes() {
        let prefix = prefixes.iter().find(|(class, _)| *class == name).map_or("", |(_, prefix)| prefix);
        let doc = doc.split(". <").next().unwrap().trim_end_matches('.').to_string();
        writeln!(text, "### {}\n", doc.trim_start_matches("Options of ")).unwrap();
        text += "| option | default | |\n|---|---|---|\n";
        for [option, default, doc] in options {
            let doc = doc.replace('|', "\\|");
            let default = if doc.contains("Required.") { "required".to_string() } else { default_of(&default) };
            let doc = doc.replace(" Required.", "").replace(" Required,", " Required");
            writeln!(text, "| `{prefix}{option}` | {default} | {doc} |").unwrap();
        }
        text += "\n";
    }
    text += "### Not supported yet\n\nAn option with another value than its default, and an argument of a call \
             with any, is an error that names it.\n\n";
    let of = [
        ("LAYERS", "Attention layers"),
        ("ATTENTION", "`attn_*`"),
        ("FEEDFORWARD", "`ff_*`"),
        ("TRANSFORMER", "`TransformerWrapper`"),
        ("CONTINUOUS", "`ContinuousTransformerWrapper`"),
        ("ENCODER_DECODER", "`XTransformer`"),
        ("AUTOREGRESSIVE", "`AutoregressiveWrapper`"),
        ("CONTINUOUS_AUTOREGRESSIVE", "`ContinuousAutoregressiveWrapper`"),
        ("POOL", "`AttentionPool`"),
        ("XL", "`XLAutoregressiveWrapper`"),
        ("BELIEF", "`BeliefStateWrapper`"),
        ("CALL", "arguments of calls"),
    ];
    let refused = refused();
    for (constant, title) in of {
        let names: Vec<String> = refused[constant].iter().map(|name| format!("`{name}`")).collect();
        if !names.is_empty() {
            writeln!(text, "- {title}: {}", names.join(", ")).unwrap();
        }
    }
    text += "\n### Accepted, and without effect on any number\n\n";
    let names: Vec<String> = refused["WITHOUT_EFFECT"].iter().map(|name| format!("`{name}`")).collect();
    writeln!(text, "{}", names.join(", ")).unwrap();
    text
}

#[test]
fn the_table_of_the_book_is_that_of_the_sources() {
    const BEGIN: &str = "<!-- options: generated by tests/options_two.rs -->\n";
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("docs/src/options/two.md");
    let page = fs::read_to_string(&path).unwrap();
    let (head, old) = page.split_once(BEGIN).expect("the page has the table's marker");
    let new = format!("\n{}", table());
    if std::env::var_os("XT_BLESS").is_some() {
        fs::write(&path, format!("{head}{BEGIN}{new}")).unwrap();
        return;
    }
    assert_eq!(old, new, "the table is old: write it with XT_BLESS=1");
}

/// Options of the Python package that only the class itself or its caller sets.
const NOT_GIVEN: [&str; 6] = ["attn_dim", "attn_heads", "attn_causal", "ff_dim", "attn_layers", "net"];

/// Every keyword of x-transformers 2.31.10 is supported, has no effect, or is refused by name.
#[test]
fn every_keyword_of_the_package_is_known() {
    let classes = classes();
    let names = |class: &str| {
        let class = classes.iter().find(|other| other.name == class).unwrap();
        class.options.iter().map(|option| option[0].clone()).collect::<Vec<_>>()
    };
    let refused = refused();
    let without_effect = &refused["WITHOUT_EFFECT"];
    let (mut supported, mut ignored, mut not_yet) = (0, 0, 0);
    for line in read("tests/parity_two/keywords.txt").lines() {
        let mut parts = line.split(' ');
        let (class, keyword) = (parts.next().unwrap(), parts.next().unwrap());
        let (structure, constant, prefix) = match class {
            "layers" => ("AttentionLayersConfig", "LAYERS", ""),
            "attn_" => ("AttentionConfig", "ATTENTION", "attn_"),
            "ff_" => ("FeedForwardConfig", "FEEDFORWARD", "ff_"),
            "TransformerWrapper" => ("TransformerWrapperConfig", "TRANSFORMER", ""),
            "ContinuousTransformerWrapper" => ("ContinuousTransformerWrapperConfig", "CONTINUOUS", ""),
            "ViTransformerWrapper" => ("ViTransformerWrapperConfig", "", ""),
            "XTransformer" => ("XTransformerConfig", "ENCODER_DECODER", ""),
            "AutoregressiveWrapper" => ("AutoregressiveConfig", "AUTOREGRESSIVE", ""),
            other => panic!("{other}"),
        };
        let bare = keyword.strip_prefix(prefix).unwrap_or(keyword);
        let is_set = NOT_GIVEN.contains(&keyword) || keyword == "dim";
        if is_set || names(structure).iter().any(|name| name == bare) {
            supported += 1;
        } else if without_effect.iter().any(|name| name == keyword) {
            ignored += 1;
        } else {
            let list = refused.get(constant).cloned().unwrap_or_default();
            assert!(list.iter().any(|name| name == bare), "{class} does not know {keyword}");
            not_yet += 1;
        }
    }
    println!("{supported} supported, {ignored} without effect, {not_yet} not supported yet");
}

fn config(layers: &Value, wrapper: &Value) -> Value {
    let mut config = json!({"version": "2", "model": "TransformerWrapper", "num_tokens": 9, "max_seq_len": 8,
        "attn_layers": {"kind": "Decoder", "dim": 16, "depth": 1}});
    let add = |into: &mut Value, more: &Value| {
        let more: Map<String, Value> = more.as_object().unwrap().clone();
        into.as_object_mut().unwrap().extend(more);
    };
    add(&mut config, wrapper);
    add(&mut config["attn_layers"], layers);
    config
}

#[test]
fn what_is_refused_names_itself() {
    let refused = refused();
    for (constant, prefix) in [("LAYERS", ""), ("ATTENTION", "attn_"), ("FEEDFORWARD", "ff_")] {
        for name in &refused[constant] {
            let layers = json!({format!("{prefix}{name}"): "another value"});
            let error = Config::from_value(config(&layers, &json!({}))).unwrap_err().to_string();
            assert!(error.contains(name.as_str()) && error.contains("not supported yet"), "{name}: {error}");
        }
    }
    for name in &refused["TRANSFORMER"] {
        let error = Config::from_value(config(&json!({}), &json!({name.as_str(): "another value"})));
        let error = error.unwrap_err().to_string();
        assert!(error.contains(name.as_str()) && error.contains("not supported yet"), "{name}: {error}");
    }
}

#[test]
fn the_other_version_is_named() {
    let error = |config: Value| Config::from_value(config).unwrap_err().to_string();
    for (layers, wrapper, expected) in [
        (json!({"use_qk_norm_attn": true}), json!({}), "x-transformers 0.22"),
        (json!({"attn_collab_heads": true}), json!({}), "x-transformers 0.22"),
        (json!({}), json!({"use_pos_emb": false}), "x-transformers 0.22"),
        (json!({"ff_gluu": true}), json!({}), "did you mean `ff_glu`?"),
        (json!({}), json!({"tie_embeddings": true}), "did you mean `tie_embedding`?"),
        (json!({"heads": "many"}), json!({}), "expected a whole number"),
        (json!({"attn_gumbel_softmax": true, "attn_flash": true}), json!({}), "`attn_flash`"),
        (json!({"attn_kv_heads": [2, 2], "depth": 1}), json!({}), "attn_*"),
    ] {
        let config = config(&layers, &wrapper);
        let error = match Config::from_value(config.clone()) {
            Ok(config) => config.plan().unwrap_err().to_string(),
            Err(error) => error.to_string(),
        };
        assert!(error.contains(expected), "{config}: {error}");
    }
    let mut first = config(&json!({"attn_flash": true}), &json!({}));
    first.as_object_mut().unwrap().remove("version");
    assert!(error(first).contains("\"version\": \"2\""));
    let mut other = config(&json!({}), &json!({}));
    other["version"] = json!("3");
    assert!(error(other).contains("\"2\" or \"0.22\""));
}

#[test]
fn configs_round_trip() {
    for (layers, wrapper) in [
        (json!({"attn_kv_heads": 2, "ff_glu": true, "use_rmsnorm": true}), json!({"tie_embedding": true})),
        (json!({"depth": 2, "attn_max_attend_past": [1, 2], "ff_mult": [1.0, 2.0]}), json!({})),
        (
            json!({"cross_attend": true, "depth": 2, "attn_num_mem_kv": [1, 2], "cross_attn_heads": null}),
            json!({"embed_num_tokens": {"a": 3, "b": 4}}),
        ),
        (json!({"cross_attend": true, "attn_qk_norm": true, "cross_attn_qk_norm": false}), json!({})),
        (json!({"custom_layers": ["a", "f", "f"], "shift_tokens": [1, 0, 1], "depth": null}), json!({})),
    ] {
        let mut layers = layers;
        layers.as_object_mut().unwrap().remove("cross_attn_heads");
        let config = Config::from_value(config(&layers, &wrapper)).unwrap();
        let again = Config::from_json(&config.to_json()).unwrap();
        assert_eq!(again, config);
        assert!(matches!(again.plan().unwrap(), ModelPlan::Transformer(_)));
    }
}

/// Returns `true` if a value has this key at any depth, or this name.
fn has(value: &Value, name: &str) -> bool {
    match value {
        Value::Object(map) => {
            map.iter().any(|(key, value)| key == name || key.starts_with(&format!("{name}.")) || has(value, name))
        }
        Value::Array(values) => values.iter().any(|value| has(value, name)),
        value => value == name,
    }
}

#[test]
fn every_call_and_class_is_shown_or_refused() {
    let cases: Vec<Value> = serde_json::from_str(&read("tests/parity_two/cases.json")).unwrap();
    let table = read("tests/parity_two/calls.md");
    let rows: Vec<&str> = table.lines().filter(|line| line.starts_with("| `")).collect();
    assert!(rows.len() > 100);
    let net = json!({"num_tokens": 9, "max_seq_len": 8, "attn_layers": {"kind": "Decoder", "dim": 16, "depth": 1}});
    for row in rows {
        let cells: Vec<&str> = row.trim_matches('|').split(" | ").map(|cell| cell.trim().trim_matches('`')).collect();
        let [class, argument, shown] = cells[..] else { panic!("{row}") };
        for shown in shown.split(", ").map(|shown| shown.trim_matches('`')) {
            let refusal = |config: Value, what: &str| {
                let error = Config::with_call(&config.to_string()).unwrap_err().to_string();
                assert!(error.contains(argument) && error.contains(what), "{row}: {error}");
            };
            let mut config = net.clone();
            config["version"] = json!("2");
            match shown {
                "refused" => {
                    config["model"] = json!("TransformerWrapper");
                    config["call"] = json!({argument: true});
                    refusal(config, "not supported yet");
                }
                "refused option" => {
                    let mut net = net.clone();
                    let continuous = class.starts_with("Continuous");
                    if continuous {
                        net.as_object_mut().unwrap().remove("num_tokens");
                    }
                    let key = if class == "BeliefStateWrapper" { "forward_decoder" } else { "net" };
                    let config = json!({"version": "2", "model": class, key: net, argument: "x"});
                    refusal(config, "not supported yet");
                }
                "refused class" => refusal(json!({"version": "2", "model": class}), "expected one of"),
                test if test.contains(".rs: ") => {
                    let (file, name) = test.split_once(": ").unwrap();
                    assert!(read(file).contains(&format!("fn {name}(")), "{row}: no test {test}");
                }
                name => {
                    let case = cases.iter().find(|case| case["name"] == name);
                    let case = case.unwrap_or_else(|| panic!("{row}: no case {name}"));
                    assert!(has(&case["config"], argument) || has(&case["inputs"], argument), "{row}: {name}");
                }
            }
        }
    }
    // No argument that is refused is left out.
    for name in refused()["CALL"].iter().filter(|name| !name.starts_with("looped_")) {
        assert!(table.contains(&format!("| `{name}` | ")), "{name}");
    }
}
