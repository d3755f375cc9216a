//! Graphs with other threads running.

use std::{
    cell::Cell,
    sync::atomic::{AtomicBool, Ordering},
    sync::mpsc,
    thread,
};

use x_transformers::{DType, Error, Graph, Result, Tensor, device::CudaDevice};

use crate::{
    Victims,
    common::{gpu, is_emulated, live_bytes},
    full, none, with_every_pool,
};

/// Another thread takes tensors of both runs and drops them after the recording: the graph still writes to them.
#[test]
fn tensors_that_escape_to_a_thread_belong_to_their_graph() -> Result<()> {
    let Some(gpu) = gpu("tensors_that_escape_to_a_thread_belong_to_their_graph") else { return Ok(()) };
    with_every_pool(&gpu, || {
        let x = full(3333, 1.0, &gpu)?;
        let (send, receive) = mpsc::channel::<Tensor>();
        let (taken, wait) = mpsc::channel();
        let keeper = thread::spawn(move || {
            let mut kept = Vec::new();
            for tensor in receive {
                kept.push(tensor);
                let _ = taken.send(());
            }
        });
        let mut graph = Graph::capture(std::slice::from_ref(&x), &none(), |i| {
            let h = i[0].exp()?;
            send.send(h.clone()).expect("the keeper waits");
            let y = h.neg()?;
            drop(h);
            wait.recv().expect("the keeper answers");
            Ok(y)
        })?;
        drop(send);
        keeper.join().expect("no panic");
        gpu.trim();
        let victims = Victims::new(&[3333], &gpu)?;
        let y = graph.replay(std::slice::from_ref(&x))?.to_vec::<f32>()?;
        assert!(y.iter().all(|y| (y + 1f32.exp()).abs() < 1e-5), "{}", y[0]);
        victims.check()
    })
}

/// While one thread records, another one cannot use the device, and tensors that it drops are freed only afterwards. In
/// the first run, before the recording, it computes as usual.
#[test]
fn other_threads_are_refused_during_a_recording() -> Result<()> {
    let Some(gpu) = gpu("other_threads_are_refused_during_a_recording") else { return Ok(()) };
    with_every_pool(&gpu, || {
        let (x, other) = (full(64, 1.0, &gpu)?, full(64, 2.0, &gpu)?);
        let square = full(64, 2.0, &gpu)?.reshape([8, 8])?;
        let (begin, begun) = mpsc::channel();
        let (end, ended) = mpsc::channel();
        let device = &*gpu;
        thread::scope(|scope| -> Result<()> {
            let thread = scope.spawn(move || -> Result<Tensor> {
                let mut own = Graph::capture(std::slice::from_ref(&other), &none(), |i| i[0].square())?;
                end.send(()).expect("the other waits");
                begun.recv().expect("the other calls");
                // The run before the recording.
                let early = other.exp()?;
                assert_eq!(own.replay(std::slice::from_ref(&other))?.to_vec::<f32>()?, [4.0; 64]);
                assert!(Graph::capture(std::slice::from_ref(&other), &none(), |i| i[0].exp()).is_err());
                end.send(()).expect("the other waits");
                begun.recv().expect("the other calls");
                // The recording.
                let refused = |what: &str, error: Option<Error>| {
                    let error = error.unwrap_or_else(|| panic!("{what} was not refused")).to_string();
                    assert!(error.contains("another thread records a graph"), "{what}: {error}");
                };
                refused("a kernel", other.exp().err());
                refused("a kernel in place", Tensor::ones([4], DType::F32, device).err());
                refused("a product", square.matmul(&square).err());
                refused("a fill", Tensor::zeros([4], DType::F32, device).err());
                refused("an upload", Tensor::from_slice(&[1.0f32], [1], device).err());
                refused("a read-back", other.to_vec::<f32>().err());
                refused("a wait", device.synchronize().err());
                refused("a replay", own.replay(std::slice::from_ref(&other)).err());
                refused("a recording", Graph::capture(std::slice::from_ref(&other), &none(), |i| i[0].exp()).err());
                let card = CudaDevice::of(device).expect("a GPU");
                refused("a measurement", card.time(|| Ok(())).err());
                // Freed only once the recording has ended.
                let live = is_emulated().then(live_bytes);
                drop((own, square));
                device.trim();
                assert_eq!(is_emulated().then(live_bytes), live);
                end.send(()).expect("the other waits");
                Ok(early)
            });
            let calls = Cell::new(0);
            let turn = || {
                begin.send(()).expect("the thread waits");
                ended.recv().expect("the thread answers");
            };
            ended.recv().expect("the thread answers");
            let mut graph = Graph::capture(std::slice::from_ref(&x), &none(), |i| {
                let h = i[0].exp()?;
                calls.set(calls.get() + 1);
                turn();
                h.neg()
            })?;
            let early = thread.join().expect("no panic")?;
            assert!((early.to_vec::<f32>()?[0] - 2f32.exp()).abs() < 1e-5);
            let y = graph.replay(&[full(64, 0.0, &gpu)?])?.to_vec::<f32>()?;
            assert_eq!((y, calls.get()), (vec![-1.0; 64], 2));
            assert!((early.to_vec::<f32>()?[0] - 2f32.exp()).abs() < 1e-5, "the graph does not write to it");
            Ok(())
        })
    })
}

/// Threads compute, allocate, free, upload and read back while another one records graph after graph. Every result is
/// right, and every error says why.
#[test]
fn threads_and_recordings_do_not_disturb_each_other() -> Result<()> {
    let Some(gpu) = gpu("threads_and_recordings_do_not_disturb_each_other") else { return Ok(()) };
    with_every_pool(&gpu, || {
        let done = AtomicBool::new(false);
        let device = &*gpu;
        let work = |thread: usize| {
            let once = |value: f32| -> Result<()> {
                let x = Tensor::from_slice(&[value; 100], [100], device)?;
                let y = x.square()?.add(&x)?.sum(&[])?;
                let expected = 100.0 * (value * value + value);
                assert_eq!(y.to_vec::<f32>()?, [expected], "thread {thread}");
                Ok(())
            };
            // Until all graphs were recorded, and at least once.
            for value in (0..).map(|i| (i % 7) as f32) {
                let finished = done.load(Ordering::Relaxed);
                match once(value) {
                    Ok(()) if finished => break,
                    Ok(()) => {}
                    Err(error) => assert!(error.to_string().contains("another thread records a graph"), "{error}"),
                }
            }
        };
        thread::scope(|scope| {
            let threads = [0, 1, 2].map(|thread| scope.spawn(move || work(thread)));
            let outcome = (|| {
                for round in 0..30 {
                    let captured = full(100, f64::from(round), &gpu)?;
                    let x = full(100, 1.0, &gpu)?;
                    let mut graph = Graph::capture(std::slice::from_ref(&x), &none(), move |i| {
                        // Long enough that the others meet it.
                        (0..20).try_fold(i[0].add(&captured)?, |x, _| x.neg()?.neg())
                    })?;
                    for value in [3.0, 5.0] {
                        let y = graph.replay(&[full(100, value, &gpu)?])?.to_vec::<f32>()?;
                        assert_eq!(y, [(value + f64::from(round)) as f32; 100]);
                    }
                }
                Ok(())
            })();
            done.store(true, Ordering::Relaxed);
            for thread in threads {
                thread.join().expect("no panic");
            }
            outcome
        })
    })
}
