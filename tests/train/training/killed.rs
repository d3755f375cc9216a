//! Runs that are killed at any moment.

use super::*;

/// The name under which this program runs itself as a child.
const CHILD: &str = "XT_TEST_TRAIN_CHILD";
/// Number of steps after which the child saves repeatedly until it is killed.
const HOLD: &str = "XT_TEST_TRAIN_HOLD";

/// Not a separate test: trains and saves until the run is done, or until it is killed.
#[test]
fn trainer_child() {
    let Some(folder) = env::var_os(CHILD).map(PathBuf::from) else { return };
    let mut trainer = match Trainer::resume(&folder, text(), device()) {
        Ok(trainer) => trainer,
        Err(error) => {
            assert!(!folder.join("config.json").exists(), "{error}");
            trainer(0.1, TrainOptions { ema_decay: Some(0.95), ..options(60) }).expect("a trainer")
        }
    };
    let hold = env::var(HOLD).ok().and_then(|steps| steps.parse::<u64>().ok());
    let hold = hold.map_or(u64::MAX, |steps| trainer.steps_done() + steps);
    println!("start {}", trainer.steps_done());
    while trainer.steps_done() < trainer.options().steps {
        trainer.step().expect("a step");
        if trainer.steps_done().is_multiple_of(3) {
            trainer.save(&folder).expect("a checkpoint");
        }
        // No clock decides whether the kill comes in time: it always does.
        while trainer.steps_done() >= hold {
            trainer.save(&folder).expect("a checkpoint");
        }
    }
    println!("done");
}

#[test]
fn trainer_killed_at_any_moment_ends_with_the_same_bits() {
    let folder = Folder::new("killed");
    let run = |name: &str, kill: Option<(u64, Duration)>| -> bool {
        let mut command = Command::new(env::current_exe().expect("this program"));
        command
            .args([&*name_of(module_path!(), "trainer_child"), "--exact", "--nocapture", "--test-threads=1"])
            .env(CHILD, folder.0.join(name))
            .stdout(Stdio::piped());
        if let Some((steps, _)) = kill {
            command.env(HOLD, steps.to_string());
        }
        let mut process = command.spawn().expect("the child starts");
        let mut lines = BufReader::new(process.stdout.take().expect("its output")).lines().map_while(|line| line.ok());
        assert!(lines.any(|line| line.contains("start ")), "the child did not start");
        if let Some((_, after)) = kill {
            std::thread::sleep(after);
            process.kill().expect("a signal");
        }
        process.wait().expect("its end");
        lines.any(|line| line.contains("done"))
    };
    assert!(run("whole", None));
    let expected = files(&folder.0.join("whole"));
    // Kills at random moments: between the steps, within one, or while a checkpoint is written.
    let (random, kills) = (Philox::new(std::process::id() as u64, 0), 8);
    for round in 0..kills {
        let after = Duration::from_secs_f64(0.03 * random.uniform(round));
        let finished = run("parts", Some((1 + random.below(100 + round, 6), after)));
        assert!(!finished, "round {round} was not killed");
    }
    assert!(run("parts", None), "the last round ends by itself");
    assert!(files(&folder.0.join("parts")) == expected, "other bits after {kills} kills");
}
