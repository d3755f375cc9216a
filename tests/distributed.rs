//! Ranks as threads of one process: what they exchange, and sums of gradients with the bits of one process that
//! accumulates. `scripts/check-mpi` does the same with processes of MPI.

use std::sync::{Arc, Barrier, Mutex};

use x_transformers::{
    DType, Device, ErrorKind, Gradients, Init, Param, ParamStore, Philox, Result, Tape, Tensor,
    config::{AttentionLayersConfig, AutoregressiveConfig, TransformerWrapperConfig},
    distributed::{Alone, Communicator, DataParallel},
    models::{AutoregressiveWrapper, ForwardOptions},
};

#[path = "common/mod.rs"]
mod common;

use common::device;

/// State that the threads share: the bytes that each gives to the others.
#[derive(Debug)]
struct Shared {
    given: Mutex<Vec<Vec<u8>>>,
    meeting: Barrier,
}

/// A rank that is a thread.
#[derive(Debug)]
struct Thread {
    rank: usize,
    size: usize,
    shared: Arc<Shared>,
}

impl Thread {
    /// Gives bytes, takes from those of all, and waits until all have.
    fn exchange(&self, mine: &[u8], take: impl FnOnce(&[Vec<u8>])) {
        self.shared.given.lock().unwrap()[self.rank] = mine.to_vec();
        self.shared.meeting.wait();
        take(&self.shared.given.lock().unwrap());
        self.shared.meeting.wait();
    }
}

impl Communicator for Thread {
    fn rank(&self) -> usize {
        self.rank
    }

    fn size(&self) -> usize {
        self.size
    }

    fn barrier(&self) -> Result<()> {
        self.shared.meeting.wait();
        Ok(())
    }

    fn broadcast_bytes(&self, bytes: &mut [u8], root: usize) -> Result<()> {
        let mine = bytes.to_vec();
        self.exchange(&mine, |all| bytes.copy_from_slice(&all[root]));
        Ok(())
    }

    fn all_gather_bytes(&self, mine: &[u8], all: &mut [u8]) -> Result<()> {
        self.exchange(mine, |given| all.copy_from_slice(&given.concat()));
        Ok(())
    }

    fn all_to_all_bytes(&self, sent: &[u8], received: &mut [u8]) -> Result<()> {
        let part = sent.len() / self.size;
        self.exchange(sent, |given| {
            for (received, sent) in received.chunks_exact_mut(part.max(1)).zip(given) {
                received.copy_from_slice(&sent[self.rank * part..][..part]);
            }
        });
        Ok(())
    }
}

/// Runs a function as each of so many ranks, and returns what they return.
fn ranks<T: Send>(size: usize, run: impl Fn(Arc<dyn Communicator>) -> T + Sync) -> Vec<T> {
    let shared = Arc::new(Shared { given: Mutex::new(vec![Vec::new(); size]), meeting: Barrier::new(size) });
    let run = &run;
    std::thread::scope(|scope| {
        let start = |rank| {
            let ranks = Arc::new(Thread { rank, size, shared: shared.clone() });
            scope.spawn(move || run(ranks))
        };
        let threads: Vec<_> = (0..size).map(start).collect();
        threads.into_iter().map(|thread| thread.join().expect("no panic")).collect()
    })
}

/// Values that differ between ranks.
fn values(rank: usize, shape: &[usize], dtype: DType) -> Tensor {
    let random = Philox::new(11, rank as u64);
    Tensor::generate(shape, dtype, device(), |i| random.normal(i as u64)).expect("memory")
}

fn bits(tensor: &Tensor) -> Vec<u64> {
    tensor.to_f64_vec().expect("floats").into_iter().map(f64::to_bits).collect()
}

#[test]
fn sums_are_those_in_the_order_of_ranks() {
    for size in [1, 2, 3, 4] {
        for dtype in [DType::F32, DType::F64, DType::BF16, DType::F16] {
            // Ordinary, not divisible, one element, none, a scalar.
            for shape in [&[6, 5][..], &[7], &[1], &[0, 3], &[]] {
                let wide = |rank| values(rank, shape, dtype).to_dtype(dtype.accumulator()).expect("a float");
                let sum = (1..size).fold(wide(0), |sum, rank| sum.add(&wide(rank)).expect("equal shapes"));
                let expected = bits(&sum.to_dtype(dtype).expect("a float"));
                let sums = ranks(size, |ranks| ranks.all_reduce(&values(ranks.rank(), shape, dtype)));
                for sum in sums {
                    let sum = sum.expect("a sum");
                    assert_eq!((&sum.shape()[..], sum.dtype(), sum.device()), (shape, dtype, device()));
                    assert_eq!(bits(&sum), expected, "{size} ranks, {dtype}, {shape:?}");
                }
            }
        }
    }
}

#[test]
fn every_rank_gets_its_parts() {
    let results = ranks(3, |ranks| {
        let mine = |first: i64| Tensor::from_slice(&[first, first + 1, first + 2], [3, 1], device());
        let mine = mine(10 * ranks.rank() as i64)?;
        let parts = [ranks.all_gather(&mine)?, ranks.all_to_all(&mine)?, ranks.broadcast(&mine, 2)?];
        parts.iter().map(Tensor::to_vec::<i64>).collect::<Result<Vec<_>>>()
    });
    for (rank, parts) in results.into_iter().enumerate() {
        let rank = rank as i64;
        let gathered = vec![0, 1, 2, 10, 11, 12, 20, 21, 22];
        assert_eq!(parts.expect("parts"), [gathered, vec![rank, 10 + rank, 20 + rank], vec![20, 21, 22]]);
    }
}

#[test]
fn sizes_that_do_not_fit_are_refused() {
    let seven = values(0, &[7], DType::F32);
    for result in ranks(2, |ranks| ranks.reduce_scatter(&seven).map(|_| ()).or(ranks.broadcast(&seven, 2).map(|_| ())))
    {
        let message = result.expect_err("refused").to_string();
        assert!(message.contains("a rank below 2, got 2"), "{message}");
    }
    let message = ranks(2, |ranks| ranks.reduce_scatter(&seven)).remove(0).expect_err("refused").to_string();
    assert!(message.contains("divisible by 2 ranks, got 7"), "{message}");
    let scalar = Tensor::full([], 1.0, DType::F32, device()).expect("memory");
    assert!(matches!(Alone.all_gather(&scalar).expect_err("refused").kind(), ErrorKind::Shape { .. }));
    let integers = Tensor::from_slice(&[1i64], [1], device()).expect("memory");
    assert!(matches!(Alone.all_reduce(&integers).expect_err("refused").kind(), ErrorKind::DType { .. }));
}

const LENGTH: usize = 12;

/// A small model, and a parameter that no loss reaches.
fn model(seed: u64, dtype: DType) -> Result<(AutoregressiveWrapper, ParamStore, Param)> {
    let store = ParamStore::new(seed, dtype, device());
    let layers = AttentionLayersConfig { heads: 2, ..AttentionLayersConfig::decoder(16, 2) };
    let net = TransformerWrapperConfig::new(23, LENGTH, layers);
    let model = AutoregressiveWrapper::new(&AutoregressiveConfig { net, ..Default::default() }, &store)?;
    let spare = store.param("spare", [3], Init::Constant(1.0))?;
    Ok((model, store, spare))
}

/// Gradients of a part of a batch, times a weight.
fn part(model: &AutoregressiveWrapper, rank: usize, weight: f64) -> Result<Gradients> {
    let random = Philox::new(3, rank as u64);
    let tokens = Tensor::generate([2, LENGTH + 1], DType::I64, device(), |i| random.below(i as u64, 23) as f64)?;
    let mut tape = Tape::train(rank as u64);
    let loss = model.loss(&tokens, &ForwardOptions::default())?;
    let start = Tensor::full(*loss.shape(), weight, loss.dtype(), loss.device())?;
    tape.backward_with(&loss, &start)
}

#[test]
fn ranks_add_the_bits_of_one_process_that_accumulates() {
    for dtype in [DType::F32, DType::F64] {
        for size in [1, 2, 3] {
            let (one, store, spare) = model(1, dtype).expect("a model");
            let mut sum = Gradients::default();
            for rank in 0..size {
                sum.accumulate(part(&one, rank, 1.0 / size as f64).expect("gradients")).expect("equal shapes");
            }
            let expected: Vec<Vec<u64>> = sum.tensors().map(bits).collect();
            assert!(expected.len() > 10 && sum.param(&spare).is_none());
            let names: Vec<String> = store.params().iter().map(|(name, _)| name.to_string()).collect();
            let results = ranks(size, |ranks| {
                // Weights of their own, until they get those of rank 0.
                let (model, store, spare) = model(1 + ranks.rank() as u64, dtype)?;
                let parallel = DataParallel::new(&store.params(), ranks.clone())?;
                let grads = parallel.reduce(part(&model, ranks.rank(), 1.0 / size as f64)?)?;
                assert!(grads.param(&spare).is_none());
                Ok::<_, x_transformers::Error>(grads.tensors().map(bits).collect::<Vec<_>>())
            });
            for (rank, grads) in results.into_iter().enumerate() {
                assert_eq!(grads.expect("gradients"), expected, "rank {rank} of {size}, {dtype}: {names:?}");
            }
        }
    }
}

#[test]
fn a_parameter_that_one_rank_reaches_counts_as_zero_on_the_others() {
    let results = ranks(2, |ranks| {
        let store = ParamStore::new(0, DType::BF16, device());
        let both = store.param("both", [2], Init::Constant(3.0))?;
        let first = store.param("first", [2], Init::Constant(2.0))?;
        let parallel = DataParallel::new(&store.params(), ranks.clone())?;
        let mut tape = Tape::train(0);
        let mut loss = both.tensor().square()?.sum(&[])?;
        if ranks.rank() == 0 {
            loss = loss.add(&first.tensor().square()?.sum(&[])?)?;
        }
        let grads = parallel.reduce(tape.backward(&loss)?)?;
        let of = |param: &Param| grads.param(param).expect("a gradient").to_vec::<f32>();
        Ok::<_, x_transformers::Error>([of(&both)?, of(&first)?])
    });
    for grads in results {
        assert_eq!(grads.expect("gradients of half types in f32"), [[12.0, 12.0], [4.0, 4.0]]);
    }
}

#[test]
fn all_ranks_start_from_the_state_of_the_first() {
    let results = ranks(3, |ranks| {
        let store = ParamStore::new(0, DType::F32, device());
        let own = ranks.rank() as f64;
        let weight = store.param("weight", [2], Init::Constant(own))?;
        store.tie("tied", &weight)?;
        let buffer = store.buffer("buffer", Tensor::full([2], 10.0 + own, DType::F32, device())?)?;
        DataParallel::new(&store.params(), ranks)?;
        Ok::<_, x_transformers::Error>([weight.tensor().to_vec::<f32>()?, buffer.tensor().to_vec::<f32>()?])
    });
    for state in results {
        assert_eq!(state.expect("the state"), [[0.0; 2], [10.0; 2]]);
    }
}

#[test]
fn ranks_with_other_parameters_are_refused() {
    let results = ranks(3, |ranks| {
        let store = ParamStore::new(0, DType::F32, &Device::Cpu);
        store.param("weight", [2 + ranks.rank() / 2], Init::Constant(0.0))?;
        DataParallel::new(&store.params(), ranks).map(|_| ())
    });
    for result in results {
        let message = result.expect_err("refused").to_string();
        assert!(message.contains("rank 2 has parameters of other names, shapes or dtypes"), "{message}");
    }
}
