//! Attention on a GPU: chooses the kernels and prepares their operands.

use std::{fmt, sync::OnceLock};

use super::{
    Kept, Needed, OP, Problem, Sizes, backward::sink_gradient, outputs::Output, packed_rows, position::Position,
};
use crate::{
    DType, Error, Result, Shape, Tensor,
    collect::CollectVec,
    device::{Arg, Gpu, Grid, args, size32},
    error::ensure,
    shape::Layout,
    tensor::Storage,
};

/// Rung of the kernel ladder that serves a call.
#[derive(Clone, Copy, PartialEq, Debug)]
pub(super) enum Rung {
    /// `kernels/attention_wgmma_*.cu`, compiled for rows of up to this many features.
    Warpgroups(usize),
    /// `kernels/attention_mma_*.cu`, compiled for rows of up to this many features, with the reason why warpgroups do
    /// not serve.
    TensorCores(usize, &'static str),
    /// `kernels/attention_*.cu`, with the reason why neither of the others serves.
    Plain(&'static str),
}

/// Returns the highest rung that `XT_ATTENTION` permits: `plain` selects the lowest, for comparison; `wgmma` adds the
/// one that no card has run yet.
fn limit() -> &'static str {
    static LIMIT: OnceLock<String> = OnceLock::new();
    LIMIT.get_or_init(|| std::env::var("XT_ATTENTION").unwrap_or_default())
}

/// Returns the rung for rows of `d` and `e` features. `extended`: if `true`, the call has what warpgroups do not compute.
pub(super) fn rung(gpu: &dyn Gpu, dtype: DType, features: [usize; 2], extended: bool) -> Rung {
    let limits = gpu.limits();
    match limits.compute_capability {
        Some(architecture) => choose(architecture, limits.has_warpgroups, dtype, features, extended, limit()),
        None => Rung::Plain("tensor-core kernels support only NVIDIA GPUs"),
    }
}

fn choose(
    architecture: u32,
    has_warpgroups: bool,
    dtype: DType,
    [d, e]: [usize; 2],
    extended: bool,
    limit: &str,
) -> Rung {
    if limit == "plain" {
        return Rung::Plain("XT_ATTENTION=plain");
    }
    if !matches!(dtype, DType::BF16 | DType::F16) {
        return Rung::Plain("tensor cores would round f32 and f64");
    }
    if architecture < 80 {
        return Rung::Plain("tensor-core kernels require sm_80 or later");
    }
    if !d.is_multiple_of(8) || !e.is_multiple_of(8) {
        return Rung::Plain("rows are not a multiple of 16 bytes");
    }
    let head = match d.max(e) {
        0..=32 => return Rung::TensorCores(32, "warpgroup kernels require at least 64 features"),
        33..=64 => 64,
        65..=128 => 128,
        _ => return Rung::Plain("tensor-core kernels support at most 128 features"),
    };
    if !has_warpgroups {
        return Rung::TensorCores(head, "warpgroup instructions require sm_90a");
    }
    if limit != "wgmma" {
        return Rung::TensorCores(head, "warpgroup kernels are experimental; set XT_ATTENTION=wgmma to use them");
    }
    if extended {
        let why = "warpgroup kernels have no registers for soft clamps, sinks, slopes on both sides and unbiased keys";
        return Rung::TensorCores(head, why);
    }
    Rung::Warpgroups(head)
}

/// Returns the tensor itself if all its rows start at multiples of 16 bytes, as the copies of the tensor-core rung
/// require, else a packed copy.
fn aligned(x: &Tensor) -> Result<Tensor> {
    let lanes = 16 / x.dtype().size();
    let mut steps = x.shape().iter().zip(x.strides()).take(3);
    if x.layout().offset.is_multiple_of(lanes) && steps.all(|(&size, step)| size < 2 || step.is_multiple_of(lanes)) {
        return Ok(x.clone());
    }
    x.contiguous()?.to_owned_copy()
}

impl fmt::Display for Rung {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Warpgroups(head) => write!(f, "warpgroup tensor cores, up to {head} features"),
            Self::TensorCores(head, why) => write!(f, "tensor cores, up to {head} features: {why}"),
            Self::Plain(why) => write!(f, "plain: {why}"),
        }
    }
}

impl Rung {
    /// Returns a tensor with packed rows in the form that the kernels take.
    fn operand(self, x: &Tensor) -> Result<Tensor> {
        if let Self::Plain(_) = self { Ok(x.clone()) } else { aligned(x) }
    }
}

/// Block sizes of a kernel, taken from the constants of its source.
struct Blocks {
    kernel: &'static str,
    /// `HEAD` of its variant, if it has one.
    head: Option<usize>,
    /// Number of positions of the sequence that a block owns.
    rows: usize,
    threads: usize,
    /// Number of features of a result that a block sums up.
    features: usize,
    /// Bytes of dynamic shared memory.
    shared: usize,
}

/// Kernel of the queries on tensor cores.
const QUERIES: &str = "attention_mma_bwd_queries";

impl Blocks {
    /// Returns `true` if the kernel can compute `delta`.
    fn finds_delta(&self) -> bool {
        self.kernel == QUERIES
    }

    /// Returns the sizes `TILE`, `TILE_THREADS` and `GROUPS` of `kernels/attention_tile.cuh` and the kernels that
    /// include it.
    fn plain(kernel: &'static str, dtype: DType) -> Self {
        let (rows, threads) = if dtype == DType::F64 { (16, 64) } else { (64, 256) };
        Self { kernel, head: None, rows, threads, features: 2 * rows, shared: 0 }
    }

    /// Returns the sizes for `ROWS` and `N` of the kernel; a block keeps the rows of `owned` tensors and two stages of
    /// two other tiles.
    fn tensor_cores(kernel: &'static str, head: usize, [rows, n]: [usize; 2], owned: usize) -> Self {
        let shared = (owned * rows + 4 * n) * head * 2;
        Self { kernel, head: Some(head), rows, threads: 128, features: usize::MAX, shared }
    }

    /// Like [`Blocks::tensor_cores`], but for a kernel whose `warpgroups` own 64 rows each of `owned` tensors, next to
    /// `passing` tiles of `n` rows; all tiles start at multiples of 1024 bytes.
    fn warpgroups(
        kernel: &'static str,
        head: usize,
        [warpgroups, owned]: [usize; 2],
        [passing, n]: [usize; 2],
    ) -> Self {
        let shared = (owned * 64 * warpgroups + passing * n) * head * 2 + 1024;
        let (rows, threads) = (64 * warpgroups, 128 * warpgroups);
        Self { kernel, head: Some(head), rows, threads, features: usize::MAX, shared }
    }

    fn forward(rung: Rung, dtype: DType) -> Self {
        match rung {
            Rung::Plain(_) => Self::plain("attention_fwd", dtype),
            Rung::TensorCores(head, _) => {
                Self::tensor_cores("attention_mma_fwd", head, [128, if head == 128 { 32 } else { 64 }], 1)
            }
            Rung::Warpgroups(head) => Self::warpgroups("attention_wgmma_fwd", head, [2, 1], [4, 128]),
        }
    }

    /// Returns the block sizes of the query pass. `position`: if `true`, the gradient of the position bias is wanted,
    /// which warpgroups do not compute.
    fn queries(rung: Rung, dtype: DType, position: bool) -> Self {
        match rung {
            Rung::Plain(_) => Self::plain("attention_bwd_queries", dtype),
            Rung::Warpgroups(head) if !position => {
                Self::warpgroups("attention_wgmma_bwd_queries", head, [2, 2], [5, 64])
            }
            Rung::TensorCores(head, _) | Rung::Warpgroups(head) => {
                let [rows, n] = match head {
                    128 => [64, 32],
                    64 => [128, 32],
                    _ => [128, 64],
                };
                let blocks = Self::tensor_cores(QUERIES, head, [rows, n], 2);
                // The gradients of a tile's scores, in f32.
                let tile = if position { rows * (n + 4) * 4 } else { 0 };
                Self { shared: blocks.shared + tile, ..blocks }
            }
        }
    }

    fn keys(rung: Rung, dtype: DType) -> Self {
        match rung {
            Rung::Plain(_) => Self::plain("attention_bwd_keys", dtype),
            Rung::TensorCores(head, _) => {
                Self::tensor_cores("attention_mma_bwd_keys", head, [64, if head == 128 { 32 } else { 64 }], 2)
            }
            Rung::Warpgroups(head) => Self::warpgroups("attention_wgmma_bwd_keys", head, [2, 2], [6, 64]),
        }
    }
}

/// Arguments shared by all kernels of a call.
struct Call<'a> {
    gpu: &'static dyn Gpu,
    problem: &'a Problem,
    rung: Rung,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    /// Bias of each head and distance.
    curves: Option<Tensor>,
    /// In the compute type.
    sinks: Option<Tensor>,
    terms: Option<Terms>,
}

/// Position bias in the form that kernels take: the struct `PositionTerms` of `kernels/attention_position.cuh`.
struct Terms {
    /// `[reach + 1]`, for T5 only.
    bucket_of: Option<Tensor>,
    /// See [`Position::slope`].
    linear: i32,
    parameters: i32,
    reach: i32,
    behind: i32,
    scale: f64,
}

impl<'a> Call<'a> {
    fn new(gpu: &'static dyn Gpu, problem: &'a Problem) -> Result<Self> {
        let Sizes { heads, queries, keys, d, e, .. } = problem.sizes;
        // Kernels count positions and distances in 32 bits.
        ensure!(
            queries.saturating_add(keys) < i32::MAX as usize / 4,
            Error::shape(OP, format_args!("{queries} queries and {keys} keys exceed the kernels' 32-bit positions"))
        );
        let terms = problem.position.as_ref().map(|position| Terms::new(gpu, position, &problem.sizes)).transpose()?;
        let extended = problem.softclamp.is_some()
            || problem.sink.is_some()
            || terms.as_ref().is_some_and(|terms| problem.unbiased > 0 || terms.linear == 2);
        let rung = rung(gpu, problem.q.dtype(), [d, e], extended);
        let [q, k, v] = [&problem.q, &problem.k, &problem.v].map(|x| rung.operand(x));
        let sinks = problem.sink.as_ref().map(|sink| sink.to_dtype(problem.acc())).transpose()?;
        let mut call = Self { gpu, problem, rung, q: q?, k: k?, v: v?, curves: None, sinks, terms };
        if let (Some(position), Some(terms)) = (&problem.position, &call.terms) {
            let acc = problem.acc();
            let weights = position.weights().to_dtype(acc)?.contiguous()?;
            let mut curves = call.uninit(&[heads, queries + keys - 1])?;
            let sizes = (size32(heads)? as i32, size32(queries)? as i32, size32(keys)? as i32);
            let args = args![
                &mut curves,
                &weights,
                terms.bucket_of.as_ref(),
                sizes.0,
                sizes.1,
                sizes.2,
                terms.linear,
                terms.parameters,
                terms.reach,
                terms.behind,
                terms.scale
            ];
            let elements = curves_len(&problem.sizes);
            gpu.kernel("attention_position_fwd", &[("DTYPE", acc.name())])?.launch(Grid::elements(elements), args)?;
            call.curves = Some(curves);
        }
        Ok(call)
    }

    /// Allocates memory for values in the compute type.
    fn uninit(&self, shape: &[usize]) -> Result<Tensor> {
        Tensor::uninit(Shape::new(shape)?, self.problem.acc(), self.problem.q.device())
    }

    /// Returns the last inputs of every kernel: masks and biases.
    fn inputs(&self) -> Result<[Arg; 7]> {
        let Problem { mask, query_mask, key_mask, bias, dropout, .. } = self.problem;
        let [mask, bias] = [mask, bias].map(|x| x.as_ref().map(Storage));
        let [mask, query_mask, key_mask, bias, curves, sinks] =
            *args![mask, query_mask.as_ref(), key_mask.as_ref(), bias, self.curves.as_ref(), self.sinks.as_ref()];
        let seed_at = match dropout {
            Some(dropout) => dropout.stream.seed_at(self.gpu)?,
            None => args![None::<&Tensor>][0],
        };
        Ok([mask, query_mask, key_mask, bias, curves, sinks, seed_at])
    }

    /// Returns the last values of every kernel: the rest of the struct `Spec` of `kernels/attention.cuh`.
    fn values(&self) -> Result<Vec<Arg>> {
        let problem = self.problem;
        let Sizes { queries, keys, .. } = problem.sizes;
        let scores = problem.sizes.scores()?;
        // An absent tensor has no layout; any layout will do.
        let expanded = |x: &Option<Tensor>| x.as_ref().map_or(*problem.q.layout(), |x| x.layout().expand(scores));
        let (mask, bias): (Layout, Layout) = (expanded(&problem.mask), expanded(&problem.bias));
        let masked = problem.key_mask.as_ref().map_or(keys, |mask| mask.shape()[1]);
        let (seed, stream, threshold, factor) = problem.dropout.as_ref().map_or((0, 0, 0, 1.0), |dropout| {
            (dropout.stream.random.seed(), dropout.stream.random.stream(), dropout.threshold, dropout.factor)
        });
        let first = args![
            &mask,
            &bias,
            size32(keys - masked)? as i32,
            size32(problem.mem_keys)? as i32,
            size32(problem.unbiased)? as i32
        ];
        let last = args![
            problem.causal as i32,
            self.terms.as_ref().map_or(0, |terms| terms.linear),
            problem.scale,
            problem.softclamp.unwrap_or(0.0),
            seed,
            stream,
            threshold,
            factor
        ];
        Ok([&first[..], &problem.window.values(queries + keys)?, last].concat())
    }

    /// Launches one block per `blocks.rows` rows of each of `heads` heads, times `columns` for the features of the
    /// results.
    fn launch(&self, blocks: &Blocks, [heads, rows]: [usize; 2], columns: usize, args: &[&[Arg]]) -> Result<()> {
        let x = self.problem.sizes.batch.saturating_mul(heads).saturating_mul(rows.div_ceil(blocks.rows));
        let (Ok(x @ 0..=0x7FFF_FFFF), Ok(y @ 0..=0xFFFF)) = (u32::try_from(x), u32::try_from(columns)) else {
            return Err(Error::shape(OP, format_args!("{x} × {columns} blocks exceed the largest grid")));
        };
        let grid = Grid::new([x, y, 1], [blocks.threads as u32, 1, 1]).shared(blocks.shared);
        let dtype = ("DTYPE", self.problem.q.dtype().name());
        let kernel = match blocks.head {
            None => self.gpu.kernel(blocks.kernel, &[dtype])?,
            Some(head) => {
                let head = match head {
                    32 => "32",
                    64 => "64",
                    _ => "128",
                };
                self.gpu.kernel(blocks.kernel, &[dtype, ("HEAD", head)])?
            }
        };
        kernel.launch(grid, &args.concat())
    }
}

fn curves_len(sizes: &Sizes) -> usize {
    sizes.heads * (sizes.queries + sizes.keys - 1)
}

impl Terms {
    fn new(gpu: &'static dyn Gpu, position: &Position, sizes: &Sizes) -> Result<Self> {
        let parameters = size32(position.parameters())? as i32;
        let linear = position.slope();
        let Some((causal, max_distance, scale)) = position.t5() else {
            // Where a curve by distance has its last key.
            let reach = size32(sizes.keys)? as i32 - 1;
            return Ok(Self { bucket_of: None, linear, parameters, reach, behind: 0, scale: 1.0 });
        };
        // More distant keys share a bucket. Rounded up, so that growing sequences do not need a new table each.
        let reach = max_distance.min(sizes.queries.max(sizes.keys).next_power_of_two());
        let name = format!("t5 buckets: causal {causal}, {parameters} up to {max_distance}, {reach} distances");
        let table = Tensor::constant_on(gpu, &name, reach + 1, || {
            Ok((0..=reach as i64).map(|distance| position.bucket(distance) as i64).collect_vec())
        })?;
        let behind = if causal { 0 } else { parameters / 2 };
        Ok(Self { bucket_of: Some(table), linear, parameters, reach: size32(reach)? as i32, behind, scale })
    }
}

/// Writes the output and the values kept for the backward pass; neither is empty. See `cpu::forward`.
pub(super) fn forward(gpu: &'static dyn Gpu, problem: &Problem, out: &mut Tensor, kept: &mut Kept) -> Result<()> {
    let call = Call::new(gpu, problem)?;
    let Call { q, k, v, .. } = &call;
    let sizes = &problem.sizes;
    let out_at = *out.permute(&[0, 2, 1, 3])?.layout();
    let blocks = Blocks::forward(call.rung, q.dtype());
    let own = args![out, &mut kept.statistics, kept.residual.as_mut(), Storage(q), Storage(k), Storage(v)];
    let layouts = args![&out_at, q.layout(), k.layout(), v.layout()];
    let columns = sizes.e.div_ceil(blocks.features);
    let (inputs, values) = (call.inputs()?, call.values()?);
    call.launch(&blocks, [sizes.heads, sizes.queries], columns, &[own, &inputs, layouts, &values])
}

/// Computes the gradients of a call with scores and values; see `backward::backward`.
pub(super) fn backward(
    gpu: &'static dyn Gpu,
    problem: &Problem,
    out: &Tensor,
    kept: &Kept,
    grad: &Tensor,
    need: Needed,
) -> Result<Vec<Option<Tensor>>> {
    let grad = packed_rows(&grad.detach())?;
    let call = Call::new(gpu, problem)?;
    let grad = call.rung.operand(&grad)?;
    let [need_q, need_k, need_v] = need.operands;
    let of_queries = need_q || need.position;
    let mut delta = call.uninit(&out.shape()[..3])?;
    // The kernel of the queries computes it for those after it.
    if !of_queries || !Blocks::queries(call.rung, grad.dtype(), need.position).finds_delta() {
        call.delta(out, kept.residual.as_ref(), &grad, &mut delta)?;
    }
    let residual = kept.residual.as_ref().map(|residual| call.rung.operand(residual)).transpose()?;
    let pass = Pass { delta, out: call.rung.operand(out)?, residual, call, grad, statistics: &kept.statistics };
    let [dq, dk, dv] = Output::of(problem, need)?;
    let position = pass.queries(&dq, need_q, need.position)?;
    pass.keys([&dk, &dv], need_k, need_v)?;
    let mut gradients = vec![dq.finish(), dk.finish(), dv.finish()];
    if let Some(bias) = &problem.bias {
        gradients.push(need.bias.then(|| pass.bias(bias)).transpose()?);
    }
    if problem.position.is_some() {
        gradients.push(position);
    }
    if let Some(sink) = &problem.sink {
        gradients.push(need.sink.then(|| sink_gradient(sink, pass.statistics, &pass.delta)).transpose()?);
    }
    Ok(gradients)
}

impl Call<'_> {
    /// Computes `delta[b, h, i] = Σ_e grad ⊙ out`, with `out` before rounding.
    fn delta(&self, out: &Tensor, residual: Option<&Tensor>, grad: &Tensor, delta: &mut Tensor) -> Result<()> {
        let Sizes { batch, heads, queries, e, .. } = self.problem.sizes;
        let rows = batch * heads * queries;
        let residual = residual.map(Storage);
        let args = args![delta, Storage(out), residual, Storage(grad), out.layout(), grad.layout(), rows as i64];
        let kernel = self.gpu.kernel("attention_bwd_delta", &[("DTYPE", grad.dtype().name())])?;
        kernel.launch(Grid::rows(rows, e), args)
    }
}

/// Inputs of the kernels of the backward pass.
struct Pass<'a> {
    call: Call<'a>,
    grad: Tensor,
    statistics: &'a Tensor,
    delta: Tensor,
    /// Output and its residual, of the same layout, from which the kernel of the queries may compute `delta`.
    out: Tensor,
    residual: Option<Tensor>,
}

impl Pass<'_> {
    fn inputs(&self) -> Result<[Arg; 6]> {
        let Call { q, k, v, .. } = &self.call;
        Ok(*args![Storage(&self.grad), Storage(q), Storage(k), Storage(v), self.statistics, &self.delta])
    }

    fn layouts(&self) -> Result<[Arg; 4]> {
        let Call { q, k, v, .. } = &self.call;
        Ok(*args![self.grad.layout(), q.layout(), k.layout(), v.layout()])
    }

    /// Computes the gradients of the queries, and returns that of the position bias's weights.
    fn queries(&self, dq: &Output, need_q: bool, need_position: bool) -> Result<Option<Tensor>> {
        let Pass { call, .. } = self;
        let Problem { q, sizes, position, .. } = call.problem;
        let &Sizes { batch, heads, queries, d, .. } = sizes;
        let blocks = Blocks::queries(call.rung, q.dtype(), need_position);
        let tiles = queries.div_ceil(blocks.rows);
        let wanted = call.terms.as_ref().zip(position.as_ref()).filter(|_| need_position);
        let shape = |terms: &Terms| [batch, heads, tiles, terms.parameters as usize];
        let mut sums = wanted.map(|(terms, _)| call.uninit(&shape(terms))).transpose()?;
        let columns = if need_q { d.div_ceil(blocks.features) } else { 0 }.max(need_position as usize);
        let terms = call.terms.as_ref();
        let inputs = self.inputs()?;
        let of_delta = [
            &[Arg::Output(self.delta.address()?)],
            &inputs[..5],
            args![Storage(&self.out), self.residual.as_ref().map(Storage)],
            args![self.out.layout()],
        ]
        .concat();
        let (first, last) = if blocks.finds_delta() { of_delta.split_at(8) } else { (&inputs[..], &[][..]) };
        let [parameters, reach, behind] = terms.map_or([0; 3], |terms| [terms.parameters, terms.reach, terms.behind]);
        call.launch(
            &blocks,
            [heads, queries],
            columns,
            &[
                &[dq.storage()],
                args![sums.as_mut()],
                first,
                args![terms.and_then(|terms| terms.bucket_of.as_ref())],
                &call.inputs()?,
                args![dq.layout()],
                &self.layouts()?,
                last,
                args![parameters, reach, behind],
                &call.values()?,
            ],
        )?;
        let Some(((terms, position), sums)) = wanted.zip(sums) else { return Ok(None) };
        let mut gradient = call.uninit(position.weights().shape())?;
        let weights = terms.parameters as usize * heads;
        let kernel = call.gpu.kernel("attention_position_bwd", &[("DTYPE", gradient.dtype().name())])?;
        let sizes = (size32(batch)? as i32, size32(heads)? as i32, size32(tiles)? as i32);
        let args = args![&mut gradient, &sums, sizes.0, sizes.1, sizes.2, terms.parameters, terms.scale];
        kernel.launch(Grid::rows(weights, batch * tiles), args)?;
        gradient.to_dtype(position.weights().dtype()).map(Some)
    }

    /// Computes the gradients of keys and values.
    fn keys(&self, [dk, dv]: [&Output; 2], need_k: bool, need_v: bool) -> Result<()> {
        let Problem { k, sizes, .. } = self.call.problem;
        let blocks = Blocks::keys(self.call.rung, k.dtype());
        // Each result is divided into whole square tiles.
        let tiled = |need: bool, features: usize| if need { features.next_multiple_of(blocks.rows) } else { 0 };
        let columns = (tiled(need_k, sizes.d) + tiled(need_v, sizes.e)).div_ceil(blocks.features);
        self.call.launch(
            &blocks,
            [sizes.kv_heads, sizes.keys],
            columns,
            &[
                &[dk.storage(), dv.storage()],
                &self.inputs()?,
                &self.call.inputs()?,
                args![dk.layout(), dv.layout()],
                &self.layouts()?,
                &self.call.values()?,
            ],
        )
    }

    /// Computes the gradient of the bias.
    fn bias(&self, bias: &Tensor) -> Result<Tensor> {
        let mut shape = [1; 4];
        shape[4 - bias.rank()..].copy_from_slice(bias.shape());
        let shape = Shape::new(&shape)?;
        let mut gradient = Tensor::uninit(shape, bias.dtype(), bias.device())?;
        let layout = Layout::contiguous(shape);
        let Blocks { rows: tile, threads, .. } = Blocks::plain("attention_bwd_bias", bias.dtype());
        let blocks = shape[0] * shape[1] * shape[2].div_ceil(tile) * shape[3].div_ceil(tile);
        let blocks = u32::try_from(blocks).ok().filter(|&blocks| blocks <= i32::MAX as u32).ok_or_else(|| {
            Error::shape(OP, format_args!("the bias {shape:?} needs more tiles than the largest grid"))
        })?;
        let parts: [&[Arg]; 6] = [
            args![&mut gradient],
            &self.inputs()?,
            &self.call.inputs()?,
            args![&layout],
            &self.layouts()?,
            &self.call.values()?,
        ];
        let kernel = self.call.gpu.kernel("attention_bwd_bias", &[("DTYPE", bias.dtype().name())])?;
        kernel.launch(Grid::new([blocks, 1, 1], [threads as u32, 1, 1]), &parts.concat())?;
        gradient.reshape(*bias.shape())
    }
}

#[cfg(test)]
mod tests {
    use super::{Rung, choose};
    use crate::DType;

    #[test]
    fn warpgroups_serve_what_only_they_can() {
        for dtype in [DType::BF16, DType::F16] {
            for (features, head) in [([64, 64], 64), ([40, 8], 64), ([128, 64], 128), ([8, 72], 128)] {
                assert_eq!(choose(90, true, dtype, features, false, "wgmma"), Rung::Warpgroups(head), "{features:?}");
                for architecture in [80, 89, 90, 100, 120] {
                    let rung = choose(architecture, false, dtype, features, false, "wgmma");
                    assert!(
                        matches!(rung, Rung::TensorCores(h, _) if h == head),
                        "{architecture}, {features:?}: {rung}"
                    );
                }
                let lower = choose(90, true, dtype, features, false, "");
                assert!(matches!(lower, Rung::TensorCores(h, _) if h == head), "{lower}");
                assert!(matches!(choose(90, true, dtype, features, false, "plain"), Rung::Plain(_)));
                let clamped = choose(90, true, dtype, features, true, "wgmma");
                assert!(matches!(clamped, Rung::TensorCores(h, _) if h == head), "{clamped}");
            }
            assert!(matches!(choose(90, true, dtype, [32, 16], false, "wgmma"), Rung::TensorCores(32, _)));
            for features in [[60, 64], [64, 130], [136, 64]] {
                assert!(matches!(choose(90, true, dtype, features, false, "wgmma"), Rung::Plain(_)), "{features:?}");
            }
            assert!(matches!(choose(75, false, dtype, [64, 64], false, ""), Rung::Plain(_)));
        }
        assert!(matches!(choose(90, true, DType::F32, [64, 64], false, ""), Rung::Plain(_)));
    }
}
