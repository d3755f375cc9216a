//! `xt train --task image` on folders of images, and `xt classify --image`.

#![cfg(unix)]

use std::{fs, os::unix::fs::symlink, path::Path, time::Duration};

use crate::command::{fails, path, refuses, start, succeeds};

/// Writes a PNG of 8 bits a channel without compression.
pub fn png(path: &Path, [width, height]: [usize; 2], channels: usize, pixel: impl Fn(usize) -> u8) {
    let crc = |bytes: &[u8]| {
        let step = |crc: u32, byte: &u8| {
            (0..8).fold(crc ^ u32::from(*byte), |crc, _| if crc & 1 == 1 { 0xedb8_8320 ^ crc >> 1 } else { crc >> 1 })
        };
        !bytes.iter().fold(!0, step)
    };
    let chunk = |kind: &[u8], content: &[u8]| {
        let named = [kind, content].concat();
        [&(content.len() as u32).to_be_bytes()[..], &named, &crc(&named).to_be_bytes()].concat()
    };
    let row = width * channels;
    let rows: Vec<u8> = (0..height)
        .flat_map(|y| [0].into_iter().chain((0..row).map(move |x| y * row + x)).enumerate())
        .map(|(at, value)| if at == 0 { 0 } else { pixel(value) })
        .collect();
    let adler = rows.iter().fold((1u32, 0u32), |(a, b), &byte| {
        let a = (a + u32::from(byte)) % 65521;
        (a, (b + a) % 65521)
    });
    let length = rows.len() as u16;
    let stored = [&[0x78, 1, 1][..], &length.to_le_bytes(), &(!length).to_le_bytes(), &rows].concat();
    let stored = [stored, (adler.1 << 16 | adler.0).to_be_bytes().to_vec()].concat();
    let colour = if channels == 1 { 0 } else { 2 };
    let header = [&(width as u32).to_be_bytes()[..], &(height as u32).to_be_bytes(), &[8, colour, 0, 0, 0]].concat();
    let parts = [b"\x89PNG\r\n\x1a\n".to_vec(), chunk(b"IHDR", &header), chunk(b"IDAT", &stored), chunk(b"IEND", b"")];
    fs::create_dir_all(path.parent().expect("a folder")).expect("a folder");
    fs::write(path, parts.concat()).expect("a file");
}

/// Dark and bright images, of several sizes, grey and in colours.
fn write_images(folder: &Path) {
    for index in 0..30 {
        for (class, level) in [("bright", 190), ("dark", 20)] {
            let noise = move |at: usize| level + ((at * 7919 + index * 31) % 50) as u8;
            let size = [12 + index % 5, 10 + index % 7];
            png(&folder.join(class).join(format!("{index:02}.png")), size, 1 + index % 2 * 2, noise);
        }
    }
    fs::write(folder.join("notes.txt"), "left out").expect("a file");
    fs::write(folder.join("dark/notes.txt"), "left out").expect("a file");
}

const QUICK: [&str; 18] = [
    "--image-size",
    "16",
    "--patch-size",
    "8",
    "--dim",
    "16",
    "--depth",
    "1",
    "--heads",
    "2",
    "--batch-size",
    "6",
    "--warmup",
    "0",
    "--device",
    "cpu",
    "--lr",
    "0.01",
];

fn rows(run: &str, of: &str) -> Vec<f64> {
    let table = fs::read_to_string(Path::new(run).join("metrics.csv")).expect("metrics.csv");
    let rows = table.lines().filter(|row| row.split(',').nth(1) == Some(of));
    rows.map(|row| row.split(',').nth(2).and_then(|value| value.parse().ok()).expect("a value")).collect()
}

/// Starts a run, kills it after its first checkpoint and resumes it; its files are those of the whole run.
pub fn killed_and_resumed(train: &[&str], whole: &str, cut: &str, data: &[&str]) {
    let mut running = start(&[train, &["--out", cut, "--every", "2"]].concat()).spawn().expect("xt starts");
    while !Path::new(cut).join("checkpoint/training.json").is_file() && running.try_wait().expect("a state").is_none() {
        std::thread::sleep(Duration::from_millis(1));
    }
    running.kill().expect("kill");
    running.wait().expect("wait");
    succeeds(&[&["train", "--resume", cut, "--device", "cpu", "--every", "20"][..], data].concat());
    for name in ["model.safetensors", "optimizer.safetensors", "config.json"] {
        let [one, other] = [whole, cut].map(|run| fs::read(Path::new(run).join("checkpoint").join(name)).expect(name));
        assert!(one == other, "{name}");
    }
}

#[test]
fn images_are_classified() {
    let temporary = tempfile::tempdir().expect("a temporary folder");
    let at = |name: &str| path(temporary.path(), name);
    let (data, whole, cut) = (at("data"), at("whole"), at("cut"));
    write_images(Path::new(&data));
    let train = [&["train", "--task", "image", "--images", &data, "--flip", "--steps", "40"][..], &QUICK].concat();
    let output = succeeds(&[&train[..], &["--out", &whole, "--every", "20", "--keep-best"]].concat());
    for part in
        ["54 images to train on, 6 to validate, classes bright, dark", "accuracy 1.0000", "f1 1.0000", "6 images"]
    {
        assert!(output.contains(part), "{part:?} in\n{output}");
    }
    assert!(output.contains(&format!("classify --checkpoint {whole} --image")), "{output}");
    assert!(Path::new(&whole).join("best/model.safetensors").is_file());
    assert!(rows(&whole, "validation").last() < rows(&whole, "validation").first());
    let cut_train = [&train[..], &["--keep-best"]].concat();
    killed_and_resumed(&cut_train, &whole, &cut, &["--images", &data]);
    // Labels and preparation are in the checkpoint.
    let config = fs::read_to_string(Path::new(&whole).join("checkpoint/config.json")).expect("a config");
    for part in ["\"bright\"", "\"ImageClassifier\"", "\"mean\"", "\"size\": 16"] {
        assert!(config.contains(part), "{part} in {config}");
    }
    let (night, day) = (at("night.png"), at("day.png"));
    png(Path::new(&night), [40, 9], 3, |_| 35);
    png(Path::new(&day), [9, 40], 1, |_| 225);
    let classify = ["classify", "--checkpoint", &whole, "--device", "cpu", "--image", &night];
    let said = succeeds(&[&classify[..], &[&day]].concat());
    let lines: Vec<&str> = said.lines().collect();
    assert!(lines.len() == 2 && lines[0].starts_with("dark  ") && lines[1].starts_with("bright  "), "{said}");
    assert!(lines[0].ends_with("night.png"), "{said}");
    let all = succeeds(&[&classify[..], &["--all"]].concat());
    let sum: f64 = all.lines().map(|line| line.split("  ").nth(1).unwrap().parse::<f64>().unwrap()).sum();
    assert!(all.lines().count() == 2 && (sum - 1.0).abs() < 1e-3, "{all}");
    let info = succeeds(&["info", "--checkpoint", &whole]);
    for part in ["classes of images", "bright, dark", "16 x 16 pixels", "mlp_head", "total"] {
        assert!(info.contains(part), "{part} in {info}");
    }
    assert!(succeeds(&[&train[..], &["--dry-run", "--out", &at("none")]].concat()).contains("images/s"));
    assert!(fails(&["classify", "--checkpoint", &whole, "--text", "a"]).contains("--task classify"));
    fails(&["generate", "--checkpoint", &whole, "--prompt", "a"]);

    // Other images than those of the run, or other classes.
    let resume = ["train", "--resume", &whole, "--images", &data, "--steps", "41"];
    png(&Path::new(&data).join("dark/00.png"), [12, 10], 1, |_| 21);
    assert!(fails(&resume).contains("use the same data"));
    fs::rename(Path::new(&data).join("dark"), Path::new(&data).join("black")).expect("a rename");
    assert!(fails(&resume).contains("has the classes black, bright, but the run has bright, dark"));
    assert!(fails(&["train", "--resume", &whole]).contains("images come from `--images`"));
    let text = ["train", "--resume", &whole, "--images", &data, "--text", "README.md"];
    refuses(&text);

    // Images to validate on, grey ones for a model of version 2, and a mean of their own.
    let (other, config, two) = (at("other"), at("two.json"), at("two"));
    write_images(Path::new(&other));
    let json = r#"{"version": "2", "model": "ViTransformerWrapper", "image_size": 16, "patch_size": 8, "channels": 1,
        "attn_layers": {"kind": "Encoder", "dim": 16, "depth": 1, "heads": 2}}"#;
    fs::write(&config, json).expect("a file");
    let images = ["--images", &other, "--validation-images", &other, "--mean", "0.4", "--std", "0.3"];
    let train = ["train", "--task", "image", "--config", &config, "--steps", "4", "--device", "cpu", "--out", &two];
    let output = succeeds(&[&train[..], &images].concat());
    assert!(output.contains("60 images to train on, 60 to validate"), "{output}");
    assert!(succeeds(&["info", "--checkpoint", &two]).contains("mean [0.4], standard deviation [0.3]"));
    assert!(succeeds(&["classify", "--checkpoint", &two, "--image", &night]).contains("night.png"));
    let message = fails(&["train", "--resume", &two, "--images", &other, "--validation-images", &data, "--steps", "5"]);
    assert!(message.contains("has the classes black, bright, but --images has bright, dark"), "{message}");
}

#[test]
fn images_that_are_refused() {
    let temporary = tempfile::tempdir().expect("a temporary folder");
    let at = |name: &str| path(temporary.path(), name);
    let (data, out) = (at("data"), at("out"));
    let folder = Path::new(&data);
    write_images(folder);
    let whole = fs::read(folder.join("dark/01.png")).expect("an image");
    let train = |more: &[&str]| {
        let command = ["train", "--task", "image", "--images", &data, "--out", &out, "--steps", "1"];
        let message = fails(&[&command[..], more].concat());
        assert!(!Path::new(&out).join("checkpoint/config.json").exists(), "nothing was begun");
        message
    };
    let mut huge = whole.clone();
    huge[16..24].copy_from_slice(&[0, 1, 0, 0, 0, 1, 0, 0]);
    let sample = |name: &str| fs::read(Path::new("../tests/files/images").join(name)).expect("a sample");
    let jpeg = sample("rgb.jpg");
    for (name, content, expected) in [
        ("cut.png", &whole[..whole.len() / 2], "cut.png: is a damaged PNG"),
        ("cut.jpg", &jpeg[..jpeg.len() / 2], "cut.jpg: is a damaged JPEG"),
        ("none.png", b"", "none.png: is empty"),
        ("text.png", b"no image", "text.png: is not a PNG or JPEG file"),
        ("huge.png", &huge, "huge.png: is a damaged PNG"),
        ("photo.webp", b"RIFF", "photo.webp: is not a PNG or JPEG file"),
        ("print.jpeg", &sample("cmyk.jpg"), "print.jpeg: is a JPEG in the colours of a printer"),
    ] {
        let place = folder.join("dark").join(name);
        fs::write(&place, content).expect("a file");
        let message = train(&[]);
        assert!(
            message.contains(expected) || name == "huge.png" && message.contains("huge.png: has 65536"),
            "{message}"
        );
        fs::remove_file(place).expect("removed");
    }
    fs::create_dir(folder.join("none")).expect("a folder");
    assert!(train(&[]).contains("none: has no PNG or JPEG file; add some, or remove the class"));
    symlink("..", folder.join("none/loop")).expect("a link");
    assert!(train(&[]).contains("is there a link to itself?"));
    fs::remove_dir_all(folder.join("none")).expect("removed");
    fs::rename(folder.join("dark"), at("dark")).expect("a rename");
    assert!(train(&[]).contains("has 1 folders with images, expected at least 2"));
    fs::create_dir(folder.join("grey")).expect("a folder");
    fs::write(folder.join("grey/a.png"), &whole).expect("a file");
    for (more, expected) in [
        (&["--seq-len", "8"][..], "`--seq-len` cannot be used with `--task image`"),
        (&["--tokenizer", "a"], "`--tokenizer` cannot be used"),
        (&["--mean", "0.1", "0.2"], "`--mean`: expected 1 or 3 numbers"),
        (&["--std", "0"], "expected 3 numbers above 0"),
        (&["--image-size", "10", "--patch-size", "4"], "expected a divisor of `image_size` (10), got 4"),
        (&["--set", "num_classes=7"], "is 7, but there are 2 labels"),
        (&["--preset", "modern"], "requires a `--preset` for images"),
        (&["--document-mask"], "document_mask"),
    ] {
        let message = train(more);
        assert!(message.contains(expected), "{more:?}: {message}");
    }
    assert!(fails(&["train", "--task", "image", "--out", &out]).contains("images come from `--images`"));
    assert!(fails(&["train", "--images", &data, "--out", &out]).contains("`--images` requires `--task image`"));
    assert!(fails(&["train", "--preset", "vit-small", "--out", &out]).contains("requires `--task image`"));
    let gone = at("gone");
    assert!(fails(&["train", "--task", "image", "--images", &gone, "--out", &out]).contains("gone: "));
}
