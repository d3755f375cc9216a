//! Checkpoints: a complete one exists at every instant, whatever kills the process, and damaged ones are typed errors.

use std::{
    collections::{BTreeMap, BTreeSet},
    env, fs,
    io::{BufRead, BufReader},
    path::{Path, PathBuf},
    process::{Command, Stdio},
    sync::atomic::{AtomicBool, Ordering},
    time::Duration,
};

use crate::common::name_of;
use x_transformers::{
    DType, Device, Error, ErrorKind, Philox, Result, Tensor,
    io::read_safetensors,
    train::{Checkpoint, DataPrint, Losses, TrainOptions, TrainingState},
};

const FILES: [&str; 4] = ["config.json", "model.safetensors", "optimizer.safetensors", "training.json"];
const INCOMING: &str = ".incoming";
const PARTIAL: &str = ".incoming.partial";

/// A folder that is removed at the end of the test.
struct Folder(PathBuf);

impl Folder {
    fn new(name: &str) -> Self {
        let path = env::temp_dir().join(format!("xt-checkpoint-{name}-{}", std::process::id()));
        let _ = fs::remove_dir_all(&path);
        Self(path)
    }
}

impl Drop for Folder {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.0);
    }
}

fn names(folder: &Path) -> Vec<String> {
    let mut names: Vec<_> =
        fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect();
    names.sort();
    names
}

/// A checkpoint all of whose tensors hold the step.
fn checkpoint(step: u64, elements: usize) -> Checkpoint {
    let filled = |dtype| Tensor::full([elements], step as f64, dtype, &Device::Cpu).unwrap();
    let config = serde_json::json!({
        "model": "AutoregressiveWrapper",
        "net": {
            "model": "TransformerWrapper", "num_tokens": 256, "max_seq_len": 8,
            "attn_layers": {"kind": "Decoder", "dim": 8, "depth": 1},
        },
    });
    Checkpoint {
        config: serde_json::from_value(config).unwrap(),
        model: BTreeMap::from([("a".to_string(), filled(DType::F32)), ("b".to_string(), filled(DType::BF16))]),
        optimizer: BTreeMap::from([("steps".to_string(), filled(DType::I64))]),
        training: TrainingState {
            version: "0.0.0".to_string(),
            step,
            options: TrainOptions { lr: 0.1 + 0.2, seed: u64::MAX, ..Default::default() },
            data: DataPrint::new("text", 17, 255),
            losses: Losses { last: Some(1.0 / 3.0), best: Some(f64::MIN_POSITIVE), ..Default::default() },
            tokenizer: None,
            grad_scaler: None,
        },
    }
}

/// Checks that a loaded checkpoint is consistent, and returns its step.
fn whole(checkpoint: &Checkpoint) -> u64 {
    let step = checkpoint.training.step;
    for tensor in checkpoint.model.values().chain(checkpoint.optimizer.values()) {
        assert!(tensor.to_f64_vec().unwrap().iter().all(|&value| value == step as f64), "step {step}");
    }
    step
}

#[test]
fn checkpoint_round_trip_is_exact() -> Result<()> {
    let folder = Folder::new("round");
    // Parent folders are created, and other files are left alone.
    let run = folder.0.join("runs/first");
    for step in [1, 2] {
        checkpoint(step, 5).save(&run)?;
        let loaded = Checkpoint::load(&run)?;
        assert_eq!(whole(&loaded), step);
        assert_eq!(loaded.training, checkpoint(step, 5).training);
        assert_eq!(loaded.config, checkpoint(step, 5).config);
        let (config, model) = Checkpoint::load_model(&run)?;
        assert_eq!(config, loaded.config);
        assert_eq!(model.keys().collect::<Vec<_>>(), ["a", "b"]);
        assert!(FILES.iter().all(|name| names(&run).iter().any(|found| found == name)));
        fs::write(run.join("notes.txt"), "mine").unwrap();
    }
    assert_eq!((names(&run).len(), fs::read(run.join("notes.txt")).unwrap()), (5, b"mine".to_vec()));
    // The tensor files are what any reader of safetensors reads.
    assert_eq!(read_safetensors(run.join("model.safetensors"))?["a"].to_vec::<f32>()?, [2.0; 5]);
    Ok(())
}

/// Every state that a save goes through, made by hand.
#[test]
fn checkpoint_every_interrupted_state_loads() -> Result<()> {
    let folder = Folder::new("states");
    let source = Folder::new("states-source");
    let run = &folder.0;
    let copy = |from: &str, to: &Path| {
        fs::create_dir_all(to).unwrap();
        for name in FILES {
            fs::copy(source.0.join(from).join(name), to.join(name)).unwrap();
        }
    };
    checkpoint(1, 5).save(source.0.join("old"))?;
    checkpoint(2, 5).save(source.0.join("new"))?;
    let reset = || {
        let _ = fs::remove_dir_all(run);
        copy("old", run);
    };
    let settle = |expected: u64| {
        assert_eq!(whole(&Checkpoint::load(run).unwrap()), expected);
        // The next save cleans up; if it fails to write, the old checkpoint is still there.
        checkpoint(3, 5).save(run).unwrap();
        assert_eq!(whole(&Checkpoint::load(run).unwrap()), 3);
        assert_eq!(names(run), FILES);
    };
    // Killed while the new files are written: any number of them, the last one cut off.
    for count in 0..=FILES.len() {
        reset();
        let partial = run.join(PARTIAL);
        fs::create_dir_all(&partial).unwrap();
        for name in &FILES[..count] {
            fs::copy(source.0.join("new").join(name), partial.join(name)).unwrap();
        }
        if let Some(last) = FILES[..count].last() {
            fs::write(partial.join(last), "half a fi").unwrap();
            fs::write(partial.join(".xt-1-0.tmp"), "half a fi").unwrap();
        }
        settle(1);
    }
    // Killed while the files are moved: after any number of them, in any order.
    for moved in 0..16u32 {
        reset();
        copy("new", &run.join(INCOMING));
        for (index, name) in FILES.iter().enumerate() {
            if moved >> index & 1 == 1 {
                fs::rename(run.join(INCOMING).join(name), run.join(name)).unwrap();
            }
        }
        settle(2);
    }
    // Killed in the very first save, before and after the one step that counts.
    let _ = fs::remove_dir_all(run);
    copy("new", &run.join(PARTIAL));
    assert!(matches!(Checkpoint::load(run).map_err(Error::into_kind), Err(ErrorKind::File { .. })));
    fs::rename(run.join(PARTIAL), run.join(INCOMING)).unwrap();
    settle(2);
    // A save that fails after an interrupted one leaves the new one, which is whole.
    reset();
    copy("new", &run.join(INCOMING));
    fs::write(run.join(PARTIAL), "a file where a folder should be").unwrap();
    let message = checkpoint(3, 5).save(run).unwrap_err().to_string();
    assert!(message.contains(PARTIAL) && message.contains("must be a folder"), "{message}");
    assert_eq!(whole(&Checkpoint::load(run)?), 2);
    Ok(())
}

/// The name under which this program runs itself as a child.
const CHILD: &str = "XT_TEST_CHECKPOINT_CHILD";

fn child(test: &str, folder: &Path) -> Command {
    let mut command = Command::new(env::current_exe().unwrap());
    let test = name_of(module_path!(), test);
    command.args([&*test, "--exact", "--nocapture", "--test-threads=1"]).env(CHILD, folder);
    command
}

/// Not a separate test: saves one checkpoint after the other until it is killed.
#[test]
fn checkpoint_child_saves_forever() {
    let Some(folder) = env::var_os(CHILD).map(PathBuf::from) else { return };
    let first = Checkpoint::load(&folder).map_or(1, |checkpoint| whole(&checkpoint) + 1);
    for step in first.. {
        checkpoint(step, 20_000).save(&folder).unwrap();
        println!("saved {step}");
    }
}

#[test]
fn checkpoint_survives_kills() {
    let folder = Folder::new("kill");
    let random = Philox::new(std::process::id() as u64, 0);
    let mut last = 0;
    for round in 0..25 {
        let mut process = child("checkpoint_child_saves_forever", &folder.0)
            .stdout(Stdio::piped())
            .spawn()
            .expect("the child starts");
        let mut lines = BufReader::new(process.stdout.take().unwrap()).lines().map_while(|line| line.ok());
        let saved = |line: String| line.split("saved ").nth(1).and_then(|step| step.trim().parse::<u64>().ok());
        // Wait for the first save, so that every round gets somewhere, then for a random while.
        let mut reported = lines.by_ref().find_map(saved).expect("the child saves");
        std::thread::sleep(Duration::from_micros(random.below(round, 20_000)));
        process.kill().unwrap();
        process.wait().unwrap();
        reported = lines.filter_map(saved).last().unwrap_or(reported);
        let step = whole(&Checkpoint::load(&folder.0).expect("a whole checkpoint"));
        // The last reported save exists, and is the newest, except for one that was not reported yet.
        assert!(step == reported || step == reported + 1, "round {round}: reported {reported}, found {step}");
        assert!(step > last, "round {round}: {step} after {last}");
        last = step;
    }
    // The next save removes leftovers of the last kill.
    checkpoint(last + 1, 5).save(&folder.0).unwrap();
    assert_eq!(names(&folder.0), FILES);
}

/// Several threads save into one folder: each save is complete, one after the other, and leaves no other files.
#[test]
fn savers_of_one_folder_take_turns() {
    let folder = Folder::new("turns");
    std::thread::scope(|scope| {
        for thread in 0..4 {
            let folder = &folder.0;
            scope.spawn(move || {
                for round in 0..8 {
                    checkpoint(4 * round + thread, 2000).save(folder).unwrap();
                    whole(&Checkpoint::load(folder).unwrap());
                }
            });
        }
    });
    assert_eq!(names(&folder.0), FILES);
}

/// Many runs at the same step replace each other: whoever reads gets the files of one of them.
#[test]
fn readers_meet_no_mixture() {
    let folder = Folder::new("readers");
    let of = |run: u64| {
        let mut checkpoint = checkpoint(7, 3);
        let value = Tensor::full([3], run as f64, DType::F32, &Device::Cpu).unwrap();
        checkpoint.model.insert("a".to_string(), value.clone());
        checkpoint.optimizer.insert("a".to_string(), value);
        checkpoint.training.options.seed = run;
        checkpoint
    };
    let run_of = |tensors: &BTreeMap<String, Tensor>| tensors["a"].to_f64_vec().unwrap()[0] as u64;
    of(0).save(&folder.0).unwrap();
    let done = AtomicBool::new(false);
    std::thread::scope(|scope| {
        let readers: Vec<_> = (0..2)
            .map(|_| {
                scope.spawn(|| {
                    let mut seen = BTreeSet::new();
                    while !done.load(Ordering::Relaxed) {
                        let loaded = Checkpoint::load(&folder.0).unwrap();
                        let run = loaded.training.options.seed;
                        assert_eq!((run_of(&loaded.model), run_of(&loaded.optimizer)), (run, run));
                        seen.insert(run);
                    }
                    seen
                })
            })
            .collect();
        for run in 1..100 {
            of(run).save(&folder.0).unwrap();
            // Readers begin again with every save that they meet: now and then one must come to its end.
            if run % 10 == 0 {
                std::thread::sleep(std::time::Duration::from_millis(100));
            }
        }
        done.store(true, Ordering::Relaxed);
        let seen: Vec<_> = readers.into_iter().map(|reader| reader.join().unwrap()).collect();
        assert!(seen.iter().all(|runs| runs.len() > 1), "{seen:?}");
    });
}

/// Files or links at the destination of a save are replaced, or are an error that names them.
#[cfg(unix)]
#[test]
fn checkpoint_through_links() {
    use std::os::unix::fs::{PermissionsExt, symlink};
    let folder = Folder::new("links");
    let at = |name: &str| folder.0.join(name);
    fs::create_dir_all(at("real")).unwrap();
    symlink("real", at("run")).unwrap();
    // A link to a file elsewhere and one to nowhere, as caches of models have.
    fs::write(at("blob"), "somebody else's").unwrap();
    symlink(at("blob"), at("real/model.safetensors")).unwrap();
    symlink("nowhere", at("real/config.json")).unwrap();
    checkpoint(1, 5).save(at("run")).unwrap();
    assert_eq!(whole(&Checkpoint::load(at("real")).unwrap()), 1);
    assert_eq!(fs::read(at("blob")).unwrap(), b"somebody else's");
    assert!(names(&at("real")) == FILES && at("run").is_symlink());

    // Modes stay, also those of files that are moved later.
    for (name, mode) in FILES.into_iter().zip([0o600, 0o640, 0o400, 0o664]) {
        fs::set_permissions(at("real").join(name), PermissionsExt::from_mode(mode)).unwrap();
    }
    checkpoint(2, 5).save(at("run")).unwrap();
    for (name, mode) in FILES.into_iter().zip([0o600, 0o640, 0o400, 0o664]) {
        let found = fs::metadata(at("real").join(name)).unwrap().permissions().mode();
        assert_eq!(found & 0o7777, mode, "{name}");
    }

    for name in [INCOMING, PARTIAL] {
        for target in ["nowhere", "real"] {
            symlink(at(target), at("real").join(name)).unwrap();
            let message = checkpoint(3, 5).save(at("run")).unwrap_err().to_string();
            assert!(message.contains(name) && message.contains("must be a folder"), "{message}");
            assert_eq!(whole(&Checkpoint::load(at("run")).unwrap()), 2);
            fs::remove_file(at("real").join(name)).unwrap();
        }
    }
    symlink("nowhere", at("dangling")).unwrap();
    let message = checkpoint(3, 5).save(at("dangling")).unwrap_err().to_string();
    assert!(message.contains("symbolic link to nowhere, which does not exist"), "{message}");
}

/// Not a separate test: tries to save more than the process may write.
#[test]
fn checkpoint_child_writes_too_much() {
    let Some(folder) = env::var_os(CHILD).map(PathBuf::from) else { return };
    match checkpoint(2, 1 << 20).save(&folder).map_err(Error::into_kind) {
        Err(ErrorKind::Io { path, .. }) => println!("refused {}", path.display()),
        other => println!("went wrong: {other:?}"),
    }
}

/// A full disk, by a limit on the size of files: writing fails in the middle of a file.
#[cfg(unix)]
#[test]
fn checkpoint_full_disk_keeps_the_old_one() {
    let folder = Folder::new("full");
    checkpoint(1, 5).save(&folder.0).unwrap();
    let limited = child("checkpoint_child_writes_too_much", &folder.0);
    let output = Command::new("sh")
        .args(["-c", "trap '' XFSZ; ulimit -f 1000; exec \"$0\" \"$@\""])
        .arg(limited.get_program())
        .args(limited.get_args())
        .env(CHILD, &folder.0)
        .output()
        .expect("a shell");
    let text = String::from_utf8_lossy(&output.stdout);
    assert!(text.contains("refused") && text.contains("model.safetensors"), "{text}");
    assert_eq!(whole(&Checkpoint::load(&folder.0).unwrap()), 1);
    assert_eq!(names(&folder.0), FILES);
}

#[test]
fn checkpoint_that_cannot_be_written() {
    let folder = Folder::new("unwritable");
    fs::create_dir_all(&folder.0).unwrap();
    let file = folder.0.join("file");
    fs::write(&file, "not a folder").unwrap();
    for place in [file.clone(), file.join("below")] {
        assert!(
            matches!(checkpoint(1, 1).save(&place).map_err(Error::into_kind), Err(ErrorKind::Io { .. })),
            "{place:?}"
        );
    }
    assert_eq!(fs::read(&file).unwrap(), b"not a folder");
    // A folder in the place of a file: the error says so, and the new checkpoint is still complete.
    let run = folder.0.join("run");
    fs::create_dir_all(run.join("training.json/occupied")).unwrap();
    let error = checkpoint(1, 1).save(&run).unwrap_err();
    assert!(error.to_string().contains("training.json"), "{error}");
    assert_eq!(whole(&Checkpoint::load(&run).unwrap()), 1);
}

/// Returns the message of loading a folder, which must be a typed error about a path.
fn refused(folder: &Path) -> String {
    match Checkpoint::load(folder) {
        Err(error) if matches!(error.kind(), ErrorKind::File { .. } | ErrorKind::Io { .. }) => error.to_string(),
        other => panic!("{:?}", other.map(|checkpoint| checkpoint.training)),
    }
}

#[test]
fn checkpoint_missing_and_damaged_files_are_refused() -> Result<()> {
    let folder = Folder::new("damaged");
    let run = &folder.0;
    assert!(refused(run).contains("does not exist"));
    fs::create_dir_all(run).unwrap();
    assert!(refused(run).contains("not a checkpoint"));
    let file = run.join("file");
    fs::write(&file, "").unwrap();
    assert!(refused(&file).contains("not a folder"));

    for name in FILES {
        checkpoint(1, 5).save(run)?;
        let path = run.join(name);
        let content = fs::read(&path).unwrap();
        fs::remove_file(&path).unwrap();
        assert!(refused(run).contains(name), "{name} is missing");
        fs::create_dir(&path).unwrap();
        assert!(refused(run).contains(name), "{name} is a folder");
        fs::remove_dir(&path).unwrap();
        for length in [0, 1, 7, content.len() / 2, content.len() - 2] {
            fs::write(&path, &content[..length]).unwrap();
            assert!(refused(run).contains(name), "{length} bytes of {name}");
        }
        fs::write(&path, [b"\xFF\xFE".as_slice(), &content].concat()).unwrap();
        assert!(refused(run).contains(name), "{name} is garbage");
        fs::write(&path, &content).unwrap();
        assert_eq!(whole(&Checkpoint::load(run)?), 1);
    }

    // Larger than such a file can be; allocates no memory.
    let huge = fs::File::create(run.join("training.json")).unwrap();
    huge.set_len(1 << 40).unwrap();
    assert!(refused(run).contains("training.json"));

    // A file of another checkpoint.
    checkpoint(2, 5).save(run)?;
    let other = Folder::new("other");
    checkpoint(1, 5).save(&other.0)?;
    for name in ["model.safetensors", "optimizer.safetensors", "training.json"] {
        let content = fs::read(run.join(name)).unwrap();
        fs::copy(other.0.join(name), run.join(name)).unwrap();
        let message = refused(run);
        assert!(message.contains("step 1") && message.contains("step 2"), "{message}");
        fs::write(run.join(name), content).unwrap();
    }

    // Values that no run writes.
    let text = fs::read_to_string(run.join("training.json")).unwrap();
    for (from, to) in [
        ("\"step\": 2", "\"step\": -2"),
        ("\"step\": 2", "\"step\": 2, \"step\": 3"),
        ("\"step\": 2", "\"stop\": 2"),
        ("\"seed\"", "\"sead\""),
        ("\"f32\"", "\"f31\""),
    ] {
        assert!(text.contains(from), "{text}");
        fs::write(run.join("training.json"), text.replacen(from, to, 1)).unwrap();
        assert!(refused(run).contains("training.json"), "{to}");
    }
    Ok(())
}
