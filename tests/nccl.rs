//! Ranks of NCCL: processes with an emulated GPU each, that this program starts with the variables of torchrun.
//! Needs the emulated driver, whose NCCL exchanges over shared memory.

#![cfg(all(feature = "cuda", target_os = "linux"))]

use std::{
    env,
    io::{Read, Write},
    net::{TcpListener, TcpStream},
    path::Path,
    process::{Child, Command, Stdio},
    sync::Arc,
    thread::sleep,
    time::{Duration, Instant},
};

use x_transformers::{
    DType, Device, Graph, ParamStore, Result, Tensor,
    config::{AttentionConfig, AttentionLayersConfig, AutoregressiveConfig, TransformerWrapperConfig},
    distributed::{Alone, Communicator, Nccl},
    train::{ByteText, RankOptions, TrainOptions, Trainer},
};

#[path = "common/gpu.rs"]
mod common;

/// Variable that names what a rank does.
const SCENARIO: &str = "XT_RANK_SCENARIO";
const PATIENCE: &str = "XT_RANK_PATIENCE";

/// A port that nobody listens on now.
fn free_port() -> u16 {
    TcpListener::bind("127.0.0.1:0").and_then(|listener| listener.local_addr()).expect("a port").port()
}

/// Starts this program as a rank.
fn start(scenario: &str, [rank, size]: [usize; 2], port: u16, variables: &[(&str, &str)]) -> Child {
    let mut command = Command::new(env::current_exe().expect("the path of this test"));
    command.args(["--exact", "as_a_rank", "--nocapture"]).env(SCENARIO, scenario);
    for (name, value) in [("RANK", rank), ("WORLD_SIZE", size), ("LOCAL_RANK", 0), ("RAYON_NUM_THREADS", 1)] {
        command.env(name, value.to_string());
    }
    command.env("MASTER_ADDR", "127.0.0.1").env("MASTER_PORT", (port - 1).to_string());
    for (name, value) in variables {
        match *value {
            "" => command.env_remove(name),
            value => command.env(name, value),
        };
    }
    command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().expect("a process")
}

/// Waits for a rank, and returns what it said with `said: ` before it, or else all.
fn end(child: Child) -> std::result::Result<String, String> {
    let output = child.wait_with_output().expect("a process");
    let text = format!("{}{}", String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    let said = text.lines().filter_map(|line| Some(line.split_once("said: ")?.1));
    let said = said.collect::<Vec<_>>().join("\n");
    if output.status.success() { Ok(said) } else { Err(format!("{:?}: {text}", output.status)) }
}

/// Runs a scenario with ranks that have these variables, and returns what they said.
fn ranks(scenario: &str, size: usize, variables: impl Fn(usize) -> Vec<(&'static str, &'static str)>) -> Vec<String> {
    let port = free_port();
    let children: Vec<_> = (0..size).map(|rank| start(scenario, [rank, size], port, &variables(rank))).collect();
    children.into_iter().map(|child| end(child).unwrap_or_else(|why| panic!("{why}"))).collect()
}

fn say(text: impl std::fmt::Display) {
    println!("said: {}", text.to_string().replace('\n', " "));
}

/// Prints a note without the emulated driver. Ranks are processes, so that tests may run beside each other.
fn is_emulated(test: &str) -> bool {
    if !common::is_emulated() {
        // Straight to the stream: the harness hides what a passing test prints.
        let _ = writeln!(std::io::stderr(), "skipped: {test}: only the emulated NCCL runs without several cards");
    }
    common::is_emulated()
}

fn device() -> Result<Device> {
    Device::cuda(0)
}

fn join() -> Result<Nccl> {
    let seconds = env::var(PATIENCE).ok().and_then(|text| text.parse().ok()).unwrap_or(60.0);
    Nccl::new(&device()?, Duration::from_secs_f64(seconds))
}

/// The body of the processes that [`start`] starts.
#[test]
fn as_a_rank() {
    let Ok(scenario) = env::var(SCENARIO) else { return };
    let done = match scenario.as_str() {
        "collectives" => collectives(),
        "train" => train(),
        _ => fails(&scenario),
    };
    done.unwrap_or_else(say);
}

/// Whole numbers that differ between ranks.
fn whole(rank: usize, shape: &[usize], dtype: DType, device: &Device) -> Result<Tensor> {
    Tensor::generate(shape, dtype, device, |i| {
        ((i * 7 + rank * 3) % 32) as f64 * f64::from(u8::from(dtype != DType::Bool))
    })
}

fn collectives() -> Result<()> {
    let ranks = join()?;
    let (rank, size) = (ranks.rank(), ranks.size());
    let gpu = device()?;
    let floats = [DType::F32, DType::F64, DType::BF16, DType::F16];
    for device in [&gpu, &Device::Cpu] {
        for dtype in [DType::F32, DType::F64, DType::BF16, DType::F16, DType::I64] {
            // 70,000 elements of f32 are more than the emulated library moves at once.
            for shape in [&[6, 5][..], &[12], &[70_020], &[0, 3]] {
                let of = |rank| whole(rank, shape, dtype, device);
                let parts = (0..size).map(of).collect::<Result<Vec<_>>>()?;
                let mine = &parts[rank];
                let rows = shape[0] / size;
                let all = Tensor::cat(&parts.iter().collect::<Vec<_>>(), 0)?;
                let (before, moved) = (gpu.transfers(), ranks.all_gather(mine)?);
                if *device == gpu {
                    assert_eq!(gpu.transfers(), before, "tensors of the GPU stay there");
                }
                let equal = |got: &Tensor, expected: &Tensor, what: &str| {
                    assert_eq!((got.shape(), got.dtype(), got.device()), (expected.shape(), dtype, device), "{what}");
                    assert_eq!(
                        got.to_device(&Device::Cpu)?.to_dtype(DType::F64)?.to_vec::<f64>()?,
                        expected.to_device(&Device::Cpu)?.to_dtype(DType::F64)?.to_vec::<f64>()?,
                        "{what} {dtype} {shape:?}"
                    );
                    Ok::<_, x_transformers::Error>(())
                };
                equal(&moved, &all, "all_gather")?;
                equal(&ranks.broadcast(mine, size - 1)?, &parts[size - 1], "broadcast")?;
                let slices = parts.iter().map(|part| part.narrow(0, rank * rows, rows)).collect::<Result<Vec<_>>>()?;
                equal(&ranks.all_to_all(mine)?, &Tensor::cat(&slices.iter().collect::<Vec<_>>(), 0)?, "all_to_all")?;
                if !floats.contains(&dtype) {
                    assert!(ranks.all_reduce(mine).is_err() && ranks.reduce_scatter(mine).is_err());
                    continue;
                }
                // Sums of small whole numbers are exact in any order and dtype.
                let mut sum = parts[0].clone();
                for part in &parts[1..] {
                    sum = sum.add(part)?;
                }
                equal(&ranks.all_reduce(mine)?, &sum, "all_reduce")?;
                equal(&ranks.reduce_scatter(mine)?, &sum.narrow(0, rank * rows, rows)?, "reduce_scatter")?;
            }
        }
    }
    // A scalar, booleans, and numbers whose sum depends on the order.
    assert_eq!(ranks.all_reduce(&Tensor::full([], 2.0, DType::F32, &gpu)?)?.item()?, 2.0 * size as f64);
    let odd = Tensor::full([2], f64::from(u8::from(rank == 0)), DType::F32, &gpu)?.to_dtype(DType::Bool)?;
    assert_eq!(ranks.broadcast(&odd, 0)?.to_dtype(DType::F32)?.to_vec::<f32>()?, [1.0; 2]);
    let rough = |count: usize| {
        Tensor::generate([count], DType::F32, &gpu, |i| {
            ((i * 37 + rank * 101) as f64).sin() * 10f64.powi(rank as i32 * 3)
        })
    };
    let rough = rough(1200)?;
    let sums = [ranks.all_reduce(&rough)?, ranks.all_reduce(&rough)?];
    let values = |tensor: &Tensor| tensor.to_vec::<f32>();
    assert_eq!(values(&sums[0])?, values(&sums[1])?, "the same bits each time");
    let exact = ranks.all_gather(&rough.to_dtype(DType::F64)?)?.reshape([size, 1200])?.sum(&[0])?.to_vec::<f64>()?;
    let sums = values(&sums[0])?;
    assert!(
        sums.iter()
            .zip(&exact)
            .all(|(sum, exact)| (f64::from(*sum) - exact).abs() < 1e-6 * 10f64.powi(size as i32 * 3))
    );
    // Halves are summed in f32: 2048 + 1 + 1 is 2050, which f16 would round down on the way.
    let half = Tensor::full([2], if rank == 0 { 2048.0 } else { 1.0 }, DType::F16, &gpu)?;
    let expected = if size == 3 { 2050.0 } else { 2048.0 };
    assert_eq!(ranks.all_reduce(&half)?.to_f64_vec()?, [expected; 2]);
    // Bytes in several pieces.
    let bytes = |rank: usize| (0..(9 << 20)).map(|i| (i * 31 + rank) as u8).collect::<Vec<u8>>();
    let mut received = bytes(rank);
    ranks.broadcast_bytes(&mut received, 1)?;
    assert!(received == bytes(1), "broadcast");
    let mut all = vec![0; size * received.len()];
    ranks.all_gather_bytes(&bytes(rank), &mut all)?;
    assert!(all == (0..size).flat_map(bytes).collect::<Vec<_>>(), "all_gather");
    let part = 9 << 20 >> 2;
    let sent = bytes(rank)[..part * size].to_vec();
    let mut received = vec![0; sent.len()];
    ranks.all_to_all_bytes(&sent, &mut received)?;
    assert!(
        (0..size).all(|other| received[other * part..][..part] == bytes(other)[rank * part..][..part]),
        "all_to_all"
    );
    ranks.barrier()?;
    // Arguments that do not fit are refused before the call waits for the other ranks.
    assert!(
        ranks.broadcast(&rough, size).is_err() && ranks.all_gather(&Tensor::full([], 1.0, DType::F32, &gpu)?).is_err()
    );
    assert!(ranks.reduce_scatter(&rough.narrow(0, 0, size + 1)?).is_err());
    let message = Graph::capture(std::slice::from_ref(&rough), &ParamStore::new(0, DType::F32, &gpu).params(), |x| {
        ranks.all_reduce(&x[0])
    });
    let message = message.map(|_| ()).expect_err("refused").to_string();
    assert!(message.contains("graph"), "{message}");
    assert_eq!(values(&ranks.all_reduce(&rough)?)?, sums, "usable after a refusal");
    // The same ranks by another communicator, which brings the 128 bytes.
    let second = Nccl::with_ranks(&gpu, &ranks, Duration::from_secs(60))?;
    assert_eq!(values(&second.all_reduce(&rough)?)?, sums);
    let bits = sums.iter().fold(0u64, |hash, value| hash.rotate_left(5) ^ u64::from(value.to_bits()));
    say(format_args!("{bits:x}"));
    Ok(())
}

#[test]
fn collectives_have_the_expected_values() {
    if !is_emulated("collectives_have_the_expected_values") {
        return;
    }
    for size in [2, 3] {
        let said = ranks("collectives", size, |_| Vec::new());
        assert!(said.iter().all(|bits| *bits == said[0] && !bits.is_empty()), "all ranks get the same bits: {said:?}");
    }
}

#[test]
fn one_process_has_nccl_too() {
    let Some(gpu) = common::emulated("one_process_has_nccl_too") else { return };
    let ranks = Nccl::with_ranks(&gpu, &Alone, Duration::from_secs(10)).expect("one rank");
    let x = Tensor::from_slice(&[1.0f32, 2.0], [2], &gpu).expect("memory");
    assert_eq!(ranks.all_reduce(&x).expect("a sum").to_vec::<f32>().expect("f32"), [1.0, 2.0]);
    let message = Nccl::with_ranks(&Device::Cpu, &Alone, Duration::from_secs(10)).expect_err("refused").to_string();
    assert!(message.contains("expected a GPU of CUDA, got cpu"), "{message}");
    assert!(Nccl::version().expect("a version").starts_with("NCCL 2.21.5 in "));
}

const LENGTH: usize = 12;

/// A run with dropout, of `accumulate` micro-batches a step and rank.
fn run(accumulate: usize, ranks: Option<Arc<dyn Communicator>>, zero: u8) -> Result<Vec<Vec<f64>>> {
    let text = (0..2000u32).map(|i| b' ' + (i * i % 61 + i % 7) as u8).collect::<Vec<u8>>();
    let options =
        TrainOptions { steps: 2, accumulate, warmup: 2, batch_size: 1, seq_len: LENGTH, ..Default::default() };
    let options = TrainOptions { clip: 0.3, shuffle: true, lr: 1e-2, recompute: zero == 3, ..options };
    let attn = AttentionConfig { dropout: 0.2, ..Default::default() };
    let layers = AttentionLayersConfig { heads: 2, attn, ..AttentionLayersConfig::decoder(32, 1) };
    let net = TransformerWrapperConfig::new(128, LENGTH, layers);
    let config = AutoregressiveConfig { net, ..Default::default() };
    let mut trainer = Trainer::new(config, options, ByteText::from_bytes(text)?, &device()?)?;
    if let Some(ranks) = ranks {
        trainer = trainer.with_ranks(ranks, RankOptions { zero, bucket: 20_000, ..Default::default() })?;
    }
    while trainer.steps_done() < 2 {
        trainer.step()?;
    }
    // In stage 3 all weights are here only then.
    trainer.evaluate(|_| trainer.params().state_dict().values().map(Tensor::to_f64_vec).collect())
}

fn train() -> Result<()> {
    let ranks: Arc<dyn Communicator> = Arc::new(join()?);
    let first = run(2, Some(ranks.clone()), 0)?;
    let distance = |other: &[Vec<f64>]| {
        let both = first.iter().flatten().zip(other.iter().flatten());
        both.map(|(a, b)| (a - b).abs()).fold(0.0, f64::max)
    };
    assert_eq!(run(2, Some(ranks.clone()), 0)?, first, "equal from run to run");
    for zero in [1, 2, 3] {
        let other = run(2, Some(ranks.clone()), zero)?;
        assert!(distance(&other) < 2e-5, "ZeRO {zero}: {}", distance(&other));
        assert_eq!(run(2, Some(ranks.clone()), zero)?, other, "ZeRO {zero}");
    }
    if ranks.rank() == 0 {
        let alone = run(2 * ranks.size(), None, 0)?;
        assert!(distance(&alone) < 2e-5, "one process: {}", distance(&alone));
        say(format_args!("at most {:.1e} from one process", distance(&alone)));
    }
    let sum = first.iter().flatten().fold(0u64, |hash, value| hash.rotate_left(5) ^ value.to_bits());
    say(format_args!("{sum:x}"));
    ranks.barrier()
}

#[test]
fn ranks_train_like_one_process() {
    if !is_emulated("ranks_train_like_one_process") {
        return;
    }
    let said = ranks("train", 2, |_| Vec::new());
    let bits = said[0].lines().last().expect("bits");
    assert!(said[0].contains("from one process") && said[1] == bits, "{said:?}");
}

/// Scenarios that end with an error of some rank.
fn fails(scenario: &str) -> Result<()> {
    let ranks = join()?;
    let x = Tensor::full([1000], 1.0, DType::F32, &device()?)?;
    drop(ranks.all_reduce(&x)?);
    if ranks.rank() + 1 == ranks.size() {
        match scenario {
            "killed" => {
                // SAFETY: ends this process.
                unsafe { libc::raise(libc::SIGKILL) };
            }
            "hangs" => sleep(Duration::from_secs(9)),
            "leaves" => return Ok(()),
            _ => {}
        }
        if scenario == "hangs" {
            return Ok(());
        }
    }
    let began = Instant::now();
    let why = ranks.all_reduce(&x).err();
    let Some(why) = why else { return Ok(()) };
    assert!(began.elapsed() < Duration::from_secs(10), "{:?}", began.elapsed());
    let after = ranks.barrier().expect_err("unusable").to_string();
    assert!(after.contains("an earlier operation failed"), "{after}");
    Err(why)
}

#[test]
fn a_rank_that_is_killed_ends_the_others() {
    if !is_emulated("a_rank_that_is_killed_ends_the_others") {
        return;
    }
    for detects in ["", "1"] {
        let port = free_port();
        let variables = [("XT_EMULATOR_NCCL_DETECTS", detects)];
        let began = Instant::now();
        let mut children = (0..3).map(|rank| start("killed", [rank, 3], port, &variables)).collect::<Vec<_>>();
        let killed = children.remove(2).wait_with_output().expect("a process");
        assert!(!killed.status.success());
        let said: Vec<_> = children.into_iter().map(|child| end(child).unwrap_or_else(|why| panic!("{why}"))).collect();
        match detects {
            "" => {
                assert!(said[0].contains("the process of rank 2 of 3 has ended"), "{said:?}");
                assert!(said[1].contains("the process of rank 0 of 3 has ended"), "{said:?}");
            }
            _ => assert!(said[0].contains("ncclAllReduce: remote process exited"), "{said:?}"),
        }
        // Long before the ranks would give up by themselves.
        assert!(began.elapsed() < Duration::from_secs(50), "{:?}", began.elapsed());
    }
}

#[test]
fn a_rank_that_hangs_is_waited_for_so_long() {
    if !is_emulated("a_rank_that_hangs_is_waited_for_so_long") {
        return;
    }
    let said = ranks("hangs", 2, |_| vec![(PATIENCE, "5")]);
    assert!(said[0].contains("rank 0 of 2 has waited 5 s for another rank, which hangs or has died"), "{said:?}");
}

#[test]
fn a_call_that_fails_is_named() {
    if !is_emulated("a_call_that_fails_is_named") {
        return;
    }
    let said = ranks("calls", 2, |_| vec![("XT_EMULATOR_FAIL", "nccl:2")]);
    for said in said {
        assert!(said.contains("ncclAllReduce: unhandled system error (a failure on demand)"), "{said}");
    }
}

/// The error of a single rank.
fn refusal(place: [usize; 2], port: u16, variables: &[(&str, &str)]) -> String {
    end(start("refused", place, port, variables)).unwrap_or_else(|why| panic!("{why}"))
}

#[test]
fn variables_and_libraries_that_are_missing_are_named() {
    if !is_emulated("variables_and_libraries_that_are_missing_are_named") {
        return;
    }
    let libraries = env::var("LD_LIBRARY_PATH").expect("set by scripts/emulated");
    // Cargo puts folders of its own before the emulator's.
    let mut folders = libraries.split(':').map(|folder| Path::new(folder).join("old-driver"));
    let without = folders.find(|folder| folder.is_dir()).expect("the emulator's folder").display().to_string();
    // Nor may that of a Python package be found.
    let nowhere =
        [("LD_LIBRARY_PATH", without.as_str()), ("PATH", ""), ("HOME", ""), ("VIRTUAL_ENV", ""), ("CONDA_PREFIX", "")];
    let cases: [(&[(&str, &str)], &str); 8] = [
        (&[("MASTER_ADDR", "")], "MASTER_ADDR is not set"),
        (&[("MASTER_PORT", "")], "MASTER_PORT is not set"),
        (&[("WORLD_SIZE", "")], "RANK is set, but WORLD_SIZE is not"),
        (
            &[("MASTER_ADDR", "no.such.machine.invalid"), (PATIENCE, "1"), ("RANK", "1")],
            "rank 1 cannot join rank 0 at no.such",
        ),
        (&nowhere, "libnccl was not found among the system's libraries"),
        (&[("XT_EMULATOR_NCCL", "2.10.3")], "is version 2.10.3, expected 2.14 or a later 2"),
        (&[("XT_EMULATOR_NCCL", "2.7.8")], "is version 2.7.8, expected 2.14"),
        (&[("XT_EMULATOR_NCCL", "3.0.0")], "is version 3.0.0, expected 2.14"),
    ];
    for (variables, words) in cases {
        let said = refusal([0, 2], free_port(), variables);
        assert!(said.contains(words), "{variables:?}: {said}");
    }
}

#[test]
fn ranks_with_other_versions_are_refused() {
    if !is_emulated("ranks_with_other_versions_are_refused") {
        return;
    }
    let said = ranks("refused", 2, |rank| vec![("XT_EMULATOR_NCCL", ["2.21.5", "2.27.3"][rank])]);
    for said in said {
        assert!(said.contains("rank 1 has NCCL 2.27.3, rank 0 2.21.5; give all ranks the same library"), "{said}");
    }
}

#[test]
fn a_rank_that_never_comes_is_named() {
    if !is_emulated("a_rank_that_never_comes_is_named") {
        return;
    }
    let port = free_port();
    let first = start("refused", [0, 3], port, &[(PATIENCE, "15")]);
    let second = start("refused", [1, 3], port, &[]);
    let said = [first, second].map(|child| end(child).unwrap_or_else(|why| panic!("{why}")));
    assert!(said[0].contains("rank 2 of 3 did not come to 127.0.0.1:"), "{said:?}");
    assert!(said[1].contains("rank 1 cannot join rank 0") && said[1].contains("closed the connection"), "{said:?}");
}

#[test]
fn another_program_at_the_port_is_told() {
    if !is_emulated("another_program_at_the_port_is_told") {
        return;
    }
    let listener = TcpListener::bind("127.0.0.1:0").expect("a port");
    let port = listener.local_addr().expect("an address").port();
    let said = refusal([0, 2], port, &[]);
    assert!(said.contains(&format!("rank 0 cannot listen on port {port}")) && said.contains("XT_NCCL_PORT"), "{said}");
    let answers: [(&[u8], &str); 4] = [
        (b"HTTP/1.1 400 Bad Request\r\n\r\n", "another program answered"),
        (b"xt-nccl1", "did not answer within 2 s"),
        (b"xt-nc", "closed the connection"),
        (b"", "closed the connection"),
    ];
    for (answer, words) in answers {
        let child = start("refused", [1, 2], port, &[(PATIENCE, "2")]);
        let (mut stream, _) = listener.accept().expect("a connection");
        let mut hello = [0; 20];
        stream.read_exact(&mut hello).expect("a rank");
        stream.write_all(answer).expect("sent");
        let kept = (answer == b"xt-nccl1").then(|| stream.try_clone().expect("kept"));
        drop(stream);
        let said = end(child).unwrap_or_else(|why| panic!("{why}"));
        assert!(said.contains(words), "{answer:?}: {said}");
        drop(kept);
    }
}

#[test]
fn strangers_are_sent_away() {
    if !is_emulated("strangers_are_sent_away") {
        return;
    }
    let port = free_port();
    let first = start("leaves", [0, 2], port, &[]);
    let connect = || {
        let began = Instant::now();
        loop {
            match TcpStream::connect(("127.0.0.1", port)) {
                Ok(stream) => return stream,
                Err(why) => assert!(began.elapsed() < Duration::from_secs(30), "{why}"),
            }
            sleep(Duration::from_millis(20));
        }
    };
    let hello = |rank: u32, size: u32| [&b"xt-nccl1"[..], &[rank, size, 22105].map(u32::to_le_bytes).concat()].concat();
    let oversize = [hello(1, 2), vec![0; 100_000]].concat();
    let silent = connect();
    for bytes in
        [&b"GET / HTTP/1.1\r\n\r\n"[..], b"x", &oversize, &hello(1, 3), &hello(0, 2), &hello(7, 2), &hello(u32::MAX, 2)]
    {
        let mut stream = connect();
        // The other side may close before all is sent.
        let _ = stream.write_all(bytes);
        if bytes.len() > 8 {
            stream.set_read_timeout(Some(Duration::from_secs(20))).expect("a time");
            let got = stream.read(&mut [0; 200]);
            assert!(!matches!(got, Ok(1..)), "a stranger got an answer: {got:?}");
        }
    }
    let second = start("leaves", [1, 2], port, &[]);
    let said = [first, second].map(|child| end(child).unwrap_or_else(|why| panic!("{why}")));
    drop(silent);
    assert!(said[0].contains("the process of rank 1 of 2 has ended") && said[1].is_empty(), "{said:?}");
}
