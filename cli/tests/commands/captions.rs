//! `xt train --task caption` on images with captions, and `xt generate --image`.

use std::{fs, path::Path};

use crate::{
    command::{fails, path, refuses, succeeds},
    images::{killed_and_resumed, png},
};

/// Dark and bright images in two folders, with captions beside them.
fn write_images(folder: &Path) {
    for (place, file) in [("one", "metadata.jsonl"), ("two", "captions.jsonl")] {
        let folder = folder.join(place);
        let record = |index: usize| {
            let (level, text) = if index.is_multiple_of(2) { (200, "day") } else { (20, "night") };
            let noise = move |at: usize| level + ((at * 7919 + index * 31) % 50) as u8;
            png(&folder.join(format!("{index}.png")), [12, 10], 3, noise);
            format!("{}\n", serde_json::json!({"file_name": format!("{index}.png"), "text": text}))
        };
        let records: String = (0..20).map(record).collect();
        fs::write(folder.join(file), records).expect("a file");
    }
}

const QUICK: [&str; 22] = [
    "--image-size",
    "8",
    "--patch-size",
    "4",
    "--dim",
    "32",
    "--depth",
    "1",
    "--heads",
    "2",
    "--batch-size",
    "8",
    "--warmup",
    "0",
    "--device",
    "cpu",
    "--lr",
    "0.01",
    "--seq-len",
    "8",
    "--steps",
    "60",
];

#[test]
fn images_get_captions() {
    let temporary = tempfile::tempdir().expect("a temporary folder");
    let at = |name: &str| path(temporary.path(), name);
    let (data, whole, cut) = (at("data"), at("whole"), at("cut"));
    write_images(Path::new(&data));
    let train = [&["train", "--task", "caption", "--images", &data][..], &QUICK].concat();
    let output = succeeds(&[&train[..], &["--out", &whole, "--every", "20"]].concat());
    for part in ["36 captions to train on, 4 to validate, 40 images", "exact_match 1.0000", "generate --checkpoint"] {
        assert!(output.contains(part), "{part:?} in\n{output}");
    }
    killed_and_resumed(&train, &whole, &cut, &["--images", &data]);
    let (night, day) = (at("night.png"), at("day.png"));
    png(Path::new(&night), [40, 9], 3, |_| 35);
    png(Path::new(&day), [9, 40], 1, |_| 225);
    let generate = ["generate", "--checkpoint", &whole, "--device", "cpu"];
    assert_eq!(succeeds(&[&generate[..], &["--image", &night, &day]].concat()), "night\nday\n");
    assert!(fails(&generate).contains("give its input with `--image`"));
    assert!(
        fails(&[&generate[..], &["--image", &night, "--beams", "2"]].concat()).contains("`--beams` cannot be used")
    );
    refuses(&[&generate[..], &["--image", &night, "--prompt", "a"]].concat());
    let info = succeeds(&["info", "--checkpoint", &whole]);
    for part in ["captions of images", "8 x 8 pixels", "\nencoder\n", "\ndecoder\n"] {
        assert!(info.contains(part), "{part:?} in {info}");
    }
    assert!(succeeds(&[&train[..], &["--dry-run", "--out", &at("none")]].concat()).contains("tokens/s"));
    // Another caption, or another image.
    let resume = ["train", "--resume", &whole, "--images", &data, "--steps", "61"];
    png(&Path::new(&data).join("one/3.png"), [12, 10], 3, |_| 3);
    assert!(fails(&resume).contains("use the same data"));
    // Images of their own to validate on.
    let (other, own) = (at("other"), at("own"));
    write_images(Path::new(&other));
    let train =
        ["train", "--task", "caption", "--images", &data, "--validation-images", &other, "--steps", "2", "--flip"];
    let output = succeeds(&[&train[..], &["--out", &own, "--device", "cpu"]].concat());
    assert!(output.contains("40 captions to train on, 40 to validate, 80 images"), "{output}");
}

#[test]
fn captions_that_are_refused() {
    let temporary = tempfile::tempdir().expect("a temporary folder");
    let at = |name: &str| path(temporary.path(), name);
    let (data, out) = (at("data"), at("out"));
    write_images(Path::new(&data));
    let train = |more: &[&str]| {
        let message = fails(&[&["train", "--task", "caption", "--images", &data, "--out", &out][..], more].concat());
        assert!(!Path::new(&out).join("checkpoint/config.json").exists(), "nothing was begun");
        message
    };
    let inner = path(Path::new(&data), "one");
    let message = train(&["--validation-images", &inner]);
    assert!(message.contains("is in `--images` too; validation needs other images"), "{message}");
    let file = Path::new(&data).join("one/metadata.jsonl");
    for (record, expected) in [
        (r#"{"file_name": "7.png"}"#, "metadata.jsonl: line 1: field `text` is missing; the record has file_name"),
        (r#"{"file_name": "7.png", "text": ""}"#, "line 1: field `text` is empty"),
        (r#"{"file_name": 7, "text": "a"}"#, "line 1: field `file_name` is a number, expected a string"),
        (r#"{"file_name": "77.png", "text": "a"}"#, "line 1: file `77.png` does not exist in this folder"),
        ("[]", "line 1: is not a JSON object"),
    ] {
        fs::write(&file, record).expect("a file");
        let message = train(&[]);
        assert!(message.contains(expected), "{record}: {message}");
    }
    fs::write(&file, r#"{"file_name": "7.png", "text": "a"}"#).expect("a file");
    fs::write(Path::new(&data).join("one/7.png"), "no image").expect("a file");
    assert!(train(&[]).contains("one/7.png: is not a PNG or JPEG file"));
    fs::remove_file(Path::new(&data).join("two/captions.jsonl")).expect("removed");
    assert!(train(&[]).contains("has 1 captions in files named metadata.jsonl or captions.jsonl, expected at least 2"));
    assert!(train(&["--config", "a.json"]).contains("`--config` cannot be used with `--task caption`"));
    assert!(fails(&["train", "--task", "caption", "--out", &out]).contains("images come from `--images`"));
}
