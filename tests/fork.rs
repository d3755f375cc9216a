//! A child of `fork` computes the same bits on the CPU, although the threads of the pool belong to the parent.
//!
//! The only test of its program: no other thread may be inside the library when it forks.
#![cfg(unix)]

use std::time::{Duration, Instant};

use x_transformers::{
    DType, Device, Init, ParamStore, Result, Tape, Tensor, train::AdamW, train::AdamWOptions, train::Optimizer,
};

/// Products, an elementwise op and a step of training, all large enough for several threads.
fn compute(tape: Option<Tape>) -> Result<Vec<f64>> {
    let mut tape = tape.unwrap_or_else(|| Tape::train(3));
    let store = ParamStore::new(1, DType::F32, &Device::Cpu);
    let weight = store.param("weight", [192, 192], Init::Normal(0.1))?;
    let x = Tensor::generate([256, 192], DType::F32, &Device::Cpu, |i| (i as f64 * 0.1).sin())?;
    let loss = x.matmul(&weight.tensor())?.gelu()?.dropout(0.1)?.square()?.mean(&[])?;
    let grads = tape.backward(&loss)?;
    AdamW::new(AdamWOptions::default())?.step(&store.params(), &grads, 0.01, Some(1.0))?;
    let mut bits = weight.tensor().to_f64_vec()?;
    bits.push(loss.item()?);
    Ok(bits)
}

#[test]
fn a_child_computes_alone() {
    let expected = compute(None).unwrap();
    for begun in [false, true] {
        // The tape may have begun before: it is the thread's, and the thread goes on in the child.
        let tape = begun.then(|| Tape::train(3));
        // SAFETY: no other thread of this program uses the library or holds a lock that the child needs.
        let child = unsafe { libc::fork() };
        assert!(child >= 0, "fork");
        if child == 0 {
            let same = compute(tape).is_ok_and(|bits| bits == expected);
            // SAFETY: ends the process without the handlers of the parent.
            unsafe { libc::_exit(if same { 0 } else { 1 }) };
        }
        let (begin, mut status) = (Instant::now(), 0);
        // SAFETY: waits for the child made above.
        while unsafe { libc::waitpid(child, &mut status, libc::WNOHANG) } == 0 {
            if begin.elapsed() > Duration::from_secs(120) {
                // SAFETY: the child made above, which has not been waited for.
                unsafe { libc::kill(child, libc::SIGKILL) };
                panic!("the child hangs");
            }
            std::thread::sleep(Duration::from_millis(5));
        }
        assert_eq!(status, 0, "the child's results differ");
        drop(tape);
        assert_eq!(compute(None).unwrap(), expected, "the parent goes on");
    }
}
