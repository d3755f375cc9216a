//! Images in, classes or embeddings out.

use std::sync::Arc;

use crate::{
    Error, Init, Param, ParamStore, Result, Tensor,
    config::{NormPlan, ViTransformerPlan, ViTransformerWrapperConfig, VisionHead},
    error::{ErrorContext, ensure},
    nn::{AttentionLayers, FeedForward, ForwardOptions, Linear, Norm},
};

/// Vision transformer: an image as a sequence of patches after a class token (Dosovitskiy et al.,
/// <https://arxiv.org/abs/2010.11929>).
///
/// ```
/// use x_transformers::{
///     DType, Device, ParamStore, Tensor,
///     config::{AttentionLayersConfig, ViTransformerWrapperConfig},
///     models::ViTransformerWrapper,
/// };
/// # fn main() -> x_transformers::Result<()> {
/// let config = ViTransformerWrapperConfig {
///     image_size: 16,
///     patch_size: 8,
///     num_classes: Some(10),
///     attn_layers: AttentionLayersConfig::encoder(16, 1),
///     ..Default::default()
/// };
/// let model = ViTransformerWrapper::new(&config, &ParamStore::new(0, DType::F32, &Device::Cpu))?;
/// let images = Tensor::zeros([2, 3, 16, 16], DType::F32, &Device::Cpu)?;
/// assert_eq!(model.forward(&images, false)?.shape()[..], [2, 10]);
/// assert_eq!(model.forward(&images, true)?.shape()[..], [2, 5, 16]);
/// # Ok(())
/// # }
/// ```
#[derive(Clone, Debug)]
#[doc(alias = "ViT")]
pub struct ViTransformerWrapper {
    plan: Arc<ViTransformerPlan>,
    pos_embedding: Param,
    patch_to_embedding: Linear,
    /// Norms before and after the projection of patches.
    patch_norms: Option<[Norm; 2]>,
    cls_token: Option<Param>,
    register_tokens: Option<Param>,
    post_emb_norm: Option<Norm>,
    attn_layers: AttentionLayers,
    norm: Option<Norm>,
    mlp_head: Head,
}

/// Head on the class token, or on the mean of the patches.
#[derive(Clone, Debug)]
enum Head {
    None,
    FeedForward(Box<FeedForward>),
    Mean(Option<Linear>),
}

impl ViTransformerWrapper {
    /// Creates a model from its options, with parameters under the names of PyTorch's state dict.
    ///
    /// Errors: [`ErrorKind::Option`](crate::ErrorKind::Option) for options that are illegal alone or in combination.
    pub fn new(config: &ViTransformerWrapperConfig, store: &ParamStore) -> Result<Self> {
        Self::from_plan(config.plan()?, store)
    }

    /// Creates a model from its plan, with parameters under the names of PyTorch's state dict.
    ///
    /// Errors: those of the layers.
    pub fn from_plan(plan: ViTransformerPlan, store: &ParamStore) -> Result<Self> {
        let dim = plan.layers.dim;
        let normal = Init::Normal(1.0);
        let features = plan.channels * plan.patch_size.pow(2);
        let patch = store.at("patch_to_embedding");
        let norm = |norm: NormPlan, dim: usize, store: &ParamStore| Norm::new(norm, dim, store);
        let plain = NormPlan::Gamma { eps: 1e-5, offset: 0.0 };
        let patch_norms =
            || -> Result<[Norm; 2]> { Ok([norm(plain, features, &patch.at(0))?, norm(plain, dim, &patch.at(2))?]) };
        let registers = || store.param("register_tokens", [plan.registers, dim], normal);
        let final_norm = plan.layers.final_norm.filter(|_| !plan.layers.owns_final_norm);
        let tokens = plan.patches + usize::from(plan.class_token);
        let projection = if plan.class_token { patch.clone() } else { patch.at(1) };
        Ok(Self {
            pos_embedding: store.param("pos_embedding", [1, tokens, dim], normal)?,
            patch_to_embedding: Linear::new(&projection, features, dim)?,
            patch_norms: (!plan.class_token).then(patch_norms).transpose()?,
            cls_token: plan.class_token.then(|| store.param("cls_token", [1, 1, dim], normal)).transpose()?,
            register_tokens: (plan.registers > 0).then(registers).transpose()?,
            post_emb_norm: plan.post_emb_norm.map(|plan| norm(plan, dim, &store.at("post_emb_norm"))).transpose()?,
            attn_layers: AttentionLayers::new(&plan.layers, &store.at("attn_layers"))?,
            norm: final_norm.map(|plan| norm(plan, dim, &store.at("norm"))).transpose()?,
            mlp_head: match &plan.head {
                VisionHead::None => Head::None,
                VisionHead::FeedForward(head) => {
                    Head::FeedForward(Box::new(FeedForward::new(head, &store.at("mlp_head"))?))
                }
                VisionHead::Mean(classes) => {
                    Head::Mean(classes.map(|classes| Linear::new(&store.at("mlp_head"), dim, classes)).transpose()?)
                }
            },
            plan: Arc::new(plan),
        })
    }

    /// Returns the plan that the model was built from.
    pub fn plan(&self) -> &ViTransformerPlan {
        &self.plan
    }

    /// Computes class scores `[b, num_classes]` of images `[b, 3, height, width]`; without a head, or with
    /// `return_embeddings`, normed embeddings `[b, patches + 1, dim]`, the class token first.
    ///
    /// Errors: images of another rank, dtype or number of channels, sides that are not divisible by the patch size, or
    /// more patches than positions.
    pub fn forward(&self, image: &Tensor, return_embeddings: bool) -> Result<Tensor> {
        let embeddings = self.embeddings(image)?;
        if return_embeddings { Ok(embeddings) } else { self.head(&embeddings) }
    }

    /// Computes normed embeddings of images: those of the class token, if there is one, and of the patches.
    ///
    /// Errors: those of [`ViTransformerWrapper::forward`].
    pub fn embeddings(&self, image: &Tensor) -> Result<Tensor> {
        self.embeddings_with(image, false)
    }

    /// Computes [`ViTransformerWrapper::embeddings`], with [`ForwardOptions::checkpoint_layers`].
    pub(crate) fn embeddings_with(&self, image: &Tensor, checkpoint_layers: bool) -> Result<Tensor> {
        let mut patches = self.patches(image)?;
        let b = patches.dim(0)?;
        let place = "patch_to_embedding";
        if let Some([before, _]) = &self.patch_norms {
            patches = before.forward(&patches).context(0).context(place)?;
        }
        let mut x = self.patch_to_embedding.forward(&patches).context(place)?;
        if let Some([_, after]) = &self.patch_norms {
            x = after.forward(&x).context(2).context(place)?;
        }
        if let Some(class) = &self.cls_token {
            let class = class.tensor();
            x = Tensor::cat(&[&class.expand([b, 1, class.dim(2)?])?, &x], 1)?;
        }
        x = x.add(&self.pos_embedding.tensor().narrow(1, 0, x.dim(1)?)?)?;
        if let Some(norm) = &self.post_emb_norm {
            x = norm.forward(&x).context("post_emb_norm")?;
        }
        x = x.dropout(self.plan.emb_dropout)?;
        let n = x.dim(1)?;
        if let Some(registers) = &self.register_tokens {
            let registers = registers.tensor();
            x = Tensor::cat(&[&x, &registers.expand([b, registers.dim(0)?, registers.dim(1)?])?], 1)?;
        }
        let options = ForwardOptions { checkpoint_layers, ..ForwardOptions::default() };
        let out = self.attn_layers.forward_normed(&x, &options, self.norm.as_ref())?.out;
        if self.register_tokens.is_some() { out.narrow(1, 0, n) } else { Ok(out) }
    }

    /// Computes class scores `[b, num_classes]` of embeddings; without classes the embeddings, or their mean.
    ///
    /// Errors: embeddings of another shape.
    pub fn head(&self, embeddings: &Tensor) -> Result<Tensor> {
        match &self.mlp_head {
            Head::None => Ok(embeddings.clone()),
            Head::FeedForward(head) => head.forward(&embeddings.select(1, 0)?).context("mlp_head"),
            Head::Mean(None) => embeddings.mean(&[1]),
            Head::Mean(Some(head)) => head.forward(&embeddings.mean(&[1])?).context("mlp_head"),
        }
    }

    /// Splits an image into patches in row-major order, features by row in the patch, column in the patch, channel.
    fn patches(&self, image: &Tensor) -> Result<Tensor> {
        let p = self.plan.patch_size;
        let channels = self.plan.channels;
        ensure!(
            image.rank() == 4 && image.shape()[1] == channels && image.dtype().is_float(),
            Error::shape(
                "img",
                format_args!(
                    "expected floats [batch, {channels}, height, width], got {:?} {}",
                    image.shape(),
                    image.dtype()
                )
            )
        );
        let (b, height, width) = (image.shape()[0], image.shape()[2], image.shape()[3]);
        let n = (height / p) * (width / p);
        ensure!(
            height.is_multiple_of(p) && width.is_multiple_of(p) && n <= self.plan.patches,
            Error::shape(
                "img",
                format_args!(
                    "expected up to {} patches of {p} by {p} pixels, got {height} by {width}",
                    self.plan.patches
                )
            )
        );
        let split = image.reshape([b, channels, height / p, p, width / p, p])?;
        split.permute(&[0, 2, 4, 3, 5, 1])?.reshape([b, n, channels * p * p])
    }
}
