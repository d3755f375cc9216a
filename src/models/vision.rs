//! Images in, classes or embeddings out.

use std::sync::Arc;

use crate::{
    Error, Init, Param, ParamStore, Result, Tensor,
    config::{ViTransformerPlan, ViTransformerWrapperConfig},
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
    cls_token: Param,
    attn_layers: AttentionLayers,
    norm: Option<Norm>,
    mlp_head: Option<FeedForward>,
}

impl ViTransformerWrapper {
    /// Creates a model from its options, with parameters under the names of PyTorch's state dict.
    ///
    /// Errors: [`ErrorKind::Option`](crate::ErrorKind::Option) for options that are illegal alone or in combination.
    pub fn new(config: &ViTransformerWrapperConfig, store: &ParamStore) -> Result<Self> {
        let plan = config.plan()?;
        let dim = plan.layers.dim;
        let normal = Init::Normal(1.0);
        Ok(Self {
            pos_embedding: store.param("pos_embedding", [1, plan.patches + 1, dim], normal)?,
            patch_to_embedding: Linear::new(&store.at("patch_to_embedding"), 3 * plan.patch_size.pow(2), dim)?,
            cls_token: store.param("cls_token", [1, 1, dim], normal)?,
            attn_layers: AttentionLayers::new(&plan.layers, &store.at("attn_layers"))?,
            norm: plan.layers.final_norm.map(|norm| Norm::new(norm, dim, &store.at("norm"))).transpose()?,
            mlp_head: plan.head.as_ref().map(|head| FeedForward::new(head, &store.at("mlp_head"))).transpose()?,
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
        let patches = self.patches(image)?;
        let (b, n) = (patches.shape()[0], patches.shape()[1]);
        let x = self.patch_to_embedding.forward(&patches).context("patch_to_embedding")?;
        let class = self.cls_token.tensor();
        let class = class.expand([b, 1, class.dim(2)?])?;
        let x = Tensor::cat(&[&class, &x], 1)?.add(&self.pos_embedding.tensor().narrow(1, 0, n + 1)?)?;
        let x = x.dropout(self.plan.emb_dropout)?;
        let x = self.attn_layers.forward_normed(&x, &ForwardOptions::default(), self.norm.as_ref())?.out;
        match &self.mlp_head {
            Some(head) if !return_embeddings => head.forward(&x.select(1, 0)?).context("mlp_head"),
            _ => Ok(x),
        }
    }

    /// Splits an image into patches in row-major order, features by row in the patch, column in the patch, channel.
    fn patches(&self, image: &Tensor) -> Result<Tensor> {
        let p = self.plan.patch_size;
        ensure!(
            image.rank() == 4 && image.shape()[1] == 3 && image.dtype().is_float(),
            Error::shape(
                "img",
                format_args!("expected floats [batch, 3, height, width], got {:?} {}", image.shape(), image.dtype())
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
        image.reshape([b, 3, height / p, p, width / p, p])?.permute(&[0, 2, 4, 3, 5, 1])?.reshape([b, n, 3 * p * p])
    }
}
