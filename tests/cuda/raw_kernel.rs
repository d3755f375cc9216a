//! Kernels from source text: their results, and the calls that they reject.

use x_transformers::{
    DType, Device, Error, ErrorKind, KernelArg, RawKernel, Result, Tape, Tensor,
    device::{Grid, Kind, ParameterType},
};

use super::common::{alive, gpu, is_emulated};

const REVERSE: &str = "struct bf16 { unsigned short bits; };\nstruct f16 { unsigned short bits; };\ntypedef ELEMENT T;\n\
    extern \"C\" __global__ void reverse(T* __restrict__ y, const T* __restrict__ x, long long n) {\n\
    \x20   long long i = blockIdx.x * (long long)blockDim.x + threadIdx.x;\n\
    \x20   if (i < n) y[i] = x[n - 1 - i];\n}\n";

fn grid(n: usize) -> Grid {
    Grid::new([n.div_ceil(64) as u32, 1, 1], [64, 1, 1])
}

/// Every dtype, from one text whose option names the type.
#[test]
fn raw_kernels_take_every_dtype() -> Result<()> {
    let Some(gpu) = gpu("raw_kernels_take_every_dtype") else { return Ok(()) };
    let types = [
        ("float", DType::F32),
        ("double", DType::F64),
        ("bf16", DType::BF16),
        ("f16", DType::F16),
        ("long long", DType::I64),
        ("bool", DType::Bool),
    ];
    for (name, dtype) in types {
        let kernel = RawKernel::new(&gpu, REVERSE, "reverse", &[("ELEMENT", name)])?;
        let kinds: Vec<_> = kernel.parameters().iter().map(|parameter| (parameter.kind, parameter.of)).collect();
        let elements = ParameterType::Elements(dtype);
        let n = (Kind::Scalar { bytes: 8 }, ParameterType::I64);
        assert_eq!(kinds, [(Kind::Output, elements), (Kind::Input, elements), n]);
        let x = Tensor::generate([10, 20], dtype, &gpu, |i| (i % 3) as f64)?;
        let mut y = Tensor::empty([10, 20], dtype, &gpu)?;
        // SAFETY: both have 200 elements.
        unsafe { kernel.launch(grid(200), [(&mut y).into(), (&x).into(), 200i64.into()]) }?;
        let mut expected = x.to_f64_vec()?;
        expected.reverse();
        assert_eq!(y.to_f64_vec()?, expected, "{dtype}");
        // A view that starts within its storage.
        let half = x.narrow(0, 5, 5)?;
        let mut y = Tensor::empty([100], dtype, &gpu)?;
        // SAFETY: both have 100 elements.
        unsafe { kernel.launch(grid(100), [(&mut y).into(), (&half).into(), 100i64.into()]) }?;
        assert_eq!(y.to_f64_vec()?, expected[..100], "{dtype}");
    }
    Ok(())
}

/// Each number arrives as it was given, and code is loaded once for each text and set of options.
#[test]
fn raw_kernels_take_numbers() -> Result<()> {
    let Some(gpu) = gpu("raw_kernels_take_numbers") else { return Ok(()) };
    let text = "extern \"C\" __global__ void numbers(double* y, int a, unsigned int b, long long c, unsigned long long d,\n\
        float e, double f, NUMBER g) {\n\
        y[0] = a, y[1] = b, y[2] = c, y[3] = d, y[4] = e, y[5] = f, y[6] = g + ADD;\n}";
    let run = |add: &str| {
        let kernel = RawKernel::new(&gpu, text, "numbers", &[("NUMBER", "float"), ("ADD", add)])?;
        let mut y = Tensor::empty([7], DType::F64, &gpu)?;
        let args: [KernelArg; 8] = [
            (&mut y).into(),
            (-3i32).into(),
            u32::MAX.into(),
            (-1i64 << 40).into(),
            (1u64 << 50).into(),
            0.1f32.into(),
            0.1f64.into(),
            2.5f32.into(),
        ];
        // SAFETY: one thread writes the seven elements.
        unsafe { kernel.launch(Grid::new([1; 3], [1; 3]), args) }?;
        y.to_vec::<f64>()
    };
    let expected = [-3.0, 4294967295.0, -(2f64.powi(40)), 2f64.powi(50), 0.1f32 as f64, 0.1, 3.5];
    assert_eq!(run("1")?, expected);
    let modules = is_emulated().then(|| alive("module"));
    assert_eq!(run("1")?, expected);
    assert_eq!(is_emulated().then(|| alive("module")), modules);
    assert_eq!(run("2")?[6], 4.5);
    assert_eq!(is_emulated().then(|| alive("module")), modules.map(|modules| modules + 1));
    Ok(())
}

/// Every mistake in a call is an error of its type, found before anything is launched.
#[test]
fn raw_kernels_refuse_mismatched_arguments() -> Result<()> {
    let Some(gpu) = gpu("raw_kernels_refuse_mismatched_arguments") else { return Ok(()) };
    let kernel = RawKernel::new(&gpu, REVERSE, "reverse", &[("ELEMENT", "float")])?;
    let (x, mut y) = (Tensor::ones([4, 4], DType::F32, &gpu)?, Tensor::zeros([4, 4], DType::F32, &gpu)?);
    let launches = gpu.transfers().launches;
    // SAFETY: what is launched has 16 elements, and the rest is refused.
    let launch = |args: Vec<KernelArg>| unsafe { kernel.launch(grid(16), args) };
    let n = || KernelArg::from(16i64);
    let argument = |outcome: Result<()>, part: &str| {
        let error = outcome.expect_err(part);
        assert!(
            matches!(error.kind(), ErrorKind::Argument { message, .. } if message.contains(part)),
            "{part}: {error}"
        );
    };
    argument(launch(vec![(&mut y).into(), (&x).into()]), "`reverse` takes 3 arguments, got 2");
    argument(launch(vec![(&mut y).into(), (&x).into(), n(), n()]), "`reverse` takes 3 arguments, got 4");
    argument(launch(vec![(&x).into(), (&x).into(), n()]), "`y` of `reverse` is an output (`&mut`), got");
    let mut other = Tensor::empty([4, 4], DType::F32, &gpu)?;
    argument(launch(vec![(&mut y).into(), (&mut other).into(), n()]), "`x` of `reverse` is an input (`&`), got");
    argument(launch(vec![(&mut y).into(), n(), n()]), "`x` of `reverse`");
    argument(launch(vec![(&mut y).into(), (&x).into(), (&x).into()]), "`n` of `reverse` is a number");
    argument(launch(vec![(&mut y).into(), (&x).into(), 16i32.into()]), "`n` of `reverse` is long long, got int");
    argument(launch(vec![(&mut y).into(), (&x).into(), 16f64.into()]), "`n` of `reverse` is long long, got double");
    argument(launch(vec![(&mut y).into(), (&x.transpose(0, 1)?).into(), n()]), "contiguous tensor");
    let shared = y.clone();
    argument(launch(vec![(&mut y).into(), (&x).into(), n()]), "the storage is shared");
    drop(shared);
    {
        let leaf = x.requires_grad()?;
        let _tape = Tape::grad();
        let mut recorded = leaf.exp()?;
        argument(launch(vec![(&mut recorded).into(), (&x).into(), n()]), "belongs to a tape");
    }
    let double = x.to_dtype(DType::F64)?;
    let outcome = launch(vec![(&mut y).into(), (&double).into(), n()]);
    assert!(
        matches!(outcome.as_ref().map_err(Error::kind), Err(ErrorKind::DType { message, .. }) if message.contains("takes a tensor of f32, got a"))
    );
    let cpu = x.to_device(&Device::Cpu)?;
    let outcome = launch(vec![(&mut y).into(), (&cpu).into(), n()]);
    assert!(
        matches!(outcome.as_ref().map_err(Error::kind), Err(ErrorKind::Device { message, .. }) if message.contains("is on cpu")),
        "{outcome:?}"
    );
    // `exp` and `to_dtype` above, and nothing else.
    assert_eq!(gpu.transfers().launches - launches, 2);
    launch(vec![(&mut y).into(), (&x).into(), n()])?;
    assert_eq!(y.to_vec::<f32>()?, [1.0; 16]);
    // An empty grid does nothing; one that no card has is the driver's error.
    // SAFETY: nothing is launched.
    unsafe { kernel.launch(Grid::new([0, 1, 1], [64, 1, 1]), [(&mut y).into(), (&x).into(), n()]) }?;
    // SAFETY: as above.
    let outcome = unsafe { kernel.launch(Grid::new([1, 1, 1], [4096, 1, 1]), [(&mut y).into(), (&x).into(), n()]) };
    assert!(
        matches!(outcome.as_ref().map_err(Error::kind), Err(ErrorKind::Device { message, .. }) if message.contains("reverse")),
        "{outcome:?}"
    );
    Ok(())
}

/// A text that cannot be compiled is an error with the compiler's log, and leaves the device as it was.
#[test]
fn raw_kernels_that_do_not_compile_say_why() -> Result<()> {
    let Some(gpu) = gpu("raw_kernels_that_do_not_compile_say_why") else { return Ok(()) };
    let new = |text: &str, name: &str| RawKernel::new(&gpu, text, name, &[("ELEMENT", "float")]).map(drop);
    let outcome = new(&REVERSE.replace("n - 1", "undeclared - 1"), "reverse");
    assert!(
        matches!(outcome.as_ref().map_err(Error::kind), Err(ErrorKind::Device { message, .. }) if message.contains("undeclared")),
        "{outcome:?}"
    );
    let outcome = new(REVERSE, "rotate");
    let names = |message: &str| message.contains("no kernel `rotate`, only [reverse]");
    assert!(
        matches!(outcome.as_ref().map_err(Error::kind), Err(ErrorKind::Argument { message, .. }) if names(message)),
        "{outcome:?}"
    );
    let outcome = RawKernel::new(&Device::Cpu, REVERSE, "reverse", &[("ELEMENT", "float")]).map(drop);
    assert!(
        matches!(outcome.as_ref().map_err(Error::kind), Err(ErrorKind::Device { message, .. }) if message.contains("requires a GPU")),
        "{outcome:?}"
    );
    new(REVERSE, "reverse")
}
