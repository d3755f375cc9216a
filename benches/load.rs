//! Time and peak memory of loading a file of weights: safetensors in f32, safetensors in bf16 as a model in f32, and a
//! PyTorch archive, each in a separate process, with the file in the system's cache.
//!
//!     cargo bench --bench load [-- GIGABYTES [ROUNDS [FOLDER]]]
//!
//! Prints the median of the rounds. The file is written to a new folder in FOLDER (by default the system's temporary
//! one) and removed at the end. To compare two builds, run them alternately with `--in FOLDER/load`, which keeps the
//! files.

use std::{
    collections::BTreeMap,
    fs::{self, File},
    io::{BufWriter, Write},
    path::{Path, PathBuf},
    process::Command,
    time::Instant,
};

use x_transformers::{DType, Result, io::TensorFile};

/// Bytes of a tensor: a layer of a model with seven billion weights.
const TENSOR: usize = 64 << 20;

/// Names of the files and whether their tensors become f32.
const FILES: [(&str, bool); 3] = [("f32.safetensors", false), ("bf16.safetensors", true), ("archive.pt", false)];

/// Writes a safetensors file of `count` tensors; `size` is the number of bytes of an element.
fn safetensors(path: &Path, count: usize, dtype: &str, size: usize) -> std::io::Result<()> {
    let entry = |index: usize| {
        let (start, values) = (index * TENSOR, TENSOR / size);
        format!(
            r#""layer.{index}":{{"dtype":"{dtype}","shape":[4096,{}],"data_offsets":[{start},{}]}}"#,
            values / 4096,
            start + TENSOR
        )
    };
    let header = format!("{{{}}}", (0..count).map(entry).collect::<Vec<_>>().join(","));
    let mut file = BufWriter::with_capacity(1 << 20, File::create(path)?);
    file.write_all(&(header.len() as u64).to_le_bytes())?;
    file.write_all(header.as_bytes())?;
    (0..count).try_for_each(|_| file.write_all(&values()))?;
    file.into_inner()?.sync_all()
}

/// Values of one tensor: small numbers both as f32 and as bf16.
fn values() -> Vec<u8> {
    [0x00, 0x3C, 0x80, 0x3D].repeat(TENSOR / 4)
}

/// Writes a PyTorch archive of f32 tensors by hand: a pickle, and a stored file for each storage.
fn archive(path: &Path, count: usize) -> std::io::Result<()> {
    let text = |text: &str| [&b"X"[..], &(text.len() as u32).to_le_bytes(), text.as_bytes()].concat();
    let int = |value: usize| [&b"J"[..], &(value as i32).to_le_bytes()].concat();
    let elements = TENSOR / 4;
    let mut pickle = b"\x80\x02}".to_vec();
    for index in 0..count {
        let storage = [
            &b"("[..],
            &text("storage"),
            b"ctorch\nFloatStorage\n",
            &text(&index.to_string()),
            &text("cpu"),
            &int(elements),
            b"tQ",
        ]
        .concat();
        let (rows, columns) = (4096, elements / 4096);
        let shape = [&b"("[..], &int(rows), &int(columns), b"t(", &int(columns), &int(1), b"t"].concat();
        let name = text(&format!("layer.{index}"));
        pickle.extend(
            [&name[..], b"ctorch._utils\n_rebuild_tensor_v2\n(", &storage, b"K\0", &shape, b"\x89}tRs"].concat(),
        );
    }
    pickle.push(b'.');
    let mut file = BufWriter::with_capacity(1 << 20, File::create(path)?);
    let (mut at, mut directory) = (0u64, Vec::new());
    let mut add = |name: &str, content: &[u8], file: &mut BufWriter<File>| -> std::io::Result<()> {
        let size = (content.len() as u32).to_le_bytes();
        let fields =
            [&[0u8; 2][..], &[0; 2], &[0; 4], &[0; 4], &size, &size, &(name.len() as u16).to_le_bytes(), &[0; 2]];
        let local = [b"PK\x03\x04\x14\0", &fields.concat()[..], name.as_bytes()].concat();
        let offset = (at.min(u64::from(u32::MAX)) as u32).to_le_bytes();
        let wide = [&1u16.to_le_bytes()[..], &8u16.to_le_bytes(), &at.to_le_bytes()].concat();
        let extra = if at >= u64::from(u32::MAX) { &wide[..] } else { &[] };
        let entry = [
            &b"PK\x01\x02\x14\0\x14\0"[..],
            &fields[..7].concat(),
            &(extra.len() as u16).to_le_bytes(),
            &[0; 10],
            &offset,
            name.as_bytes(),
            extra,
        ];
        directory.extend(entry.concat());
        at += (local.len() + content.len()) as u64;
        file.write_all(&local)?;
        file.write_all(content)
    };
    add("archive/data.pkl", &pickle, &mut file)?;
    let values = values();
    (0..count).try_for_each(|index| add(&format!("archive/data/{index}"), &values, &mut file))?;
    let (entries, size) = (count as u64 + 1, directory.len() as u64);
    let end = [
        &b"PK\x06\x06"[..],
        &44u64.to_le_bytes(),
        &[0; 12],
        &entries.to_le_bytes(),
        &entries.to_le_bytes(),
        &size.to_le_bytes(),
        &at.to_le_bytes(),
        b"PK\x06\x07\0\0\0\0",
        &(at + size).to_le_bytes(),
        &[1, 0, 0, 0],
        b"PK\x05\x06\0\0\0\0",
        &[0xFF; 12],
        &[0; 2],
    ];
    file.write_all(&directory)?;
    file.write_all(&end.concat())?;
    file.into_inner()?.sync_all()
}

/// Loads all tensors of a file and returns the seconds it took.
fn load(path: &Path, widen: bool) -> Result<f64> {
    let start = Instant::now();
    let file = TensorFile::open(path)?;
    let mut tensors = BTreeMap::new();
    for name in file.names() {
        let tensor = file.tensor(name)?;
        tensors.insert(name.to_string(), if widen { tensor.to_dtype(DType::F32)? } else { tensor });
    }
    let seconds = start.elapsed().as_secs_f64();
    assert!(tensors.values().all(|tensor| tensor.numel() > 0));
    Ok(seconds)
}

/// Returns the peak resident memory of this process in bytes, if the system reports it.
fn resident() -> f64 {
    let status = fs::read_to_string("/proc/self/status").unwrap_or_default();
    let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:"));
    let kilobytes = line.and_then(|line| line.trim().strip_suffix("kB")?.trim().parse::<f64>().ok());
    1024.0 * kilobytes.unwrap_or(f64::NAN)
}

fn median(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    values[values.len() / 2]
}

fn main() -> Result<()> {
    let arguments: Vec<String> = std::env::args().skip(1).filter(|argument| argument != "--bench").collect();
    if let [first, path, widen] = &arguments[..]
        && first == "--load"
    {
        let seconds = load(Path::new(path), widen == "true")?;
        println!("{seconds} {}", resident());
        return Ok(());
    }
    let test = arguments.iter().any(|argument| argument == "--test");
    let kept = arguments.iter().position(|argument| argument == "--in").map(|at| PathBuf::from(&arguments[at + 1]));
    let number = |index: usize| arguments.get(index).and_then(|argument| argument.parse::<f64>().ok());
    let (gigabytes, rounds) =
        if test { (0.2, 1) } else { (number(0).unwrap_or(4.0), number(1).unwrap_or(3.0) as usize) };
    let count = ((gigabytes * 1e9) as usize).div_ceil(TENSOR);
    let own = arguments.get(2).map_or_else(std::env::temp_dir, PathBuf::from);
    let folder = kept.clone().unwrap_or(own.join(format!("xt-load-{}", std::process::id())));
    fs::create_dir_all(&folder).expect("a folder for the files");
    println!("| file | GB | seconds | GB/s | peak of the process, GB |\n|---|---|---|---|---|");
    for (name, widen) in FILES {
        let path = folder.join(name);
        if !path.exists() {
            let written = match name {
                "f32.safetensors" => safetensors(&path, count, "F32", 4),
                "bf16.safetensors" => safetensors(&path, count.div_ceil(2), "BF16", 2),
                _ => archive(&path, count),
            };
            written.expect("the file is written");
        }
        let bytes = fs::metadata(&path).expect("the file").len() as f64;
        let (mut seconds, mut peak) = (Vec::new(), Vec::new());
        for _ in 0..rounds {
            let program = std::env::current_exe().expect("this program");
            let mut child = Command::new(program);
            child.args(["--load", &path.to_string_lossy(), &widen.to_string()]);
            let output = child.output().expect("a process that loads");
            let text = String::from_utf8_lossy(&output.stdout).into_owned();
            let (first, second) = text.trim().split_once(' ').unwrap_or_else(|| panic!("{output:?}"));
            seconds.push(first.parse().expect("seconds"));
            peak.push(second.parse().expect("bytes"));
        }
        let (seconds, peak) = (median(seconds), median(peak));
        println!("| {name} | {:.1} | {seconds:.2} | {:.1} | {:.2} |", bytes / 1e9, bytes / seconds / 1e9, peak / 1e9);
        if kept.is_none() {
            fs::remove_file(&path).expect("the file is removed");
        }
    }
    if kept.is_none() {
        fs::remove_dir(&folder).expect("the folder is removed");
    }
    Ok(())
}
