//! Images as a model sees them: resized, cropped and normalized.

use serde::{Deserialize, Serialize};

use crate::{Device, Error, Result, Tensor, collect::CollectVec, error::ensure};

/// Image of 8 bits a channel: greyscale or RGB.
#[derive(Clone, PartialEq, Eq)]
pub struct Image {
    width: usize,
    height: usize,
    channels: usize,
    pixels: Vec<u8>,
}

impl std::fmt::Debug for Image {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let Self { width, height, channels, .. } = self;
        f.debug_struct("Image").field("width", width).field("height", height).field("channels", channels).finish()
    }
}

impl Image {
    /// Creates an image from its pixels, `[height, width, channels]`, with 1 channel (greyscale) or 3 (RGB).
    ///
    /// Errors: a side of 0; another number of channels; pixels of another length.
    pub fn new(width: usize, height: usize, channels: usize, pixels: Vec<u8>) -> Result<Self> {
        let length = width.checked_mul(height).and_then(|area| area.checked_mul(channels));
        ensure!(
            matches!(channels, 1 | 3) && length == Some(pixels.len()) && !pixels.is_empty(),
            Error::argument(
                "image",
                format_args!(
                    "expected pixels [height, width, 1 or 3] with sides of at least 1, got [{height}, {width}, {channels}] \
                     and {} bytes",
                    pixels.len()
                )
            )
        );
        Ok(Self { width, height, channels, pixels })
    }

    /// Returns the width and the height.
    pub fn size(&self) -> [usize; 2] {
        [self.width, self.height]
    }

    /// Returns the pixels, `[height, width, channels]`.
    pub fn pixels(&self) -> &[u8] {
        &self.pixels
    }

    /// Converts to this number of channels, 1 or 3, by the weights of ITU-R 601 as PIL's `convert("L")` has them.
    fn with_channels(&self, channels: usize) -> Vec<u8> {
        match (self.channels, channels) {
            (3, 1) => {
                let grey = |rgb: &[u8; 3]| {
                    let [r, g, b] = rgb.map(u32::from);
                    ((r * 19595 + g * 38470 + b * 7471 + 0x8000) >> 16) as u8
                };
                self.pixels.as_chunks::<3>().0.iter().map(grey).collect_vec()
            }
            (1, 3) => self.pixels.iter().flat_map(|&grey| [grey; 3]).collect_vec(),
            _ => self.pixels.clone(),
        }
    }
}

/// Preparation of images, which a checkpoint keeps: the shorter side is resized to `size` (bilinear with antialiasing), the
/// centre is cropped, and each channel normalized.
///
/// The pixels are those of `Resize(size)`, `CenterCrop(size)`, `ToTensor()` and `Normalize(mean, std)` of torchvision on an
/// image of PIL, to the bit.
///
/// ```
/// use x_transformers::train::{Image, ImageTransform};
/// # fn main() -> x_transformers::Result<()> {
/// let transform = ImageTransform::new(4, 3); // side, channels
/// let image = Image::new(8, 6, 3, vec![255; 8 * 6 * 3])?;
/// let pixels = transform.crop(&image)?; // [4, 4, 3] bytes
/// assert_eq!(transform.normalize(&[(&pixels, false)])?.shape(), [1, 3, 4, 4]);
/// # Ok(())
/// # }
/// ```
#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ImageTransform {
    /// Side of the square that a model sees, in pixels.
    pub size: usize,
    /// Mean of each channel, of values from 0 to 1. Default 0.5.
    pub mean: Vec<f64>,
    /// Standard deviation of each channel. Default 0.5.
    pub std: Vec<f64>,
}

/// Bits of the fraction of a weight, as in PIL.
const BITS: u32 = 32 - 8 - 2;

impl ImageTransform {
    /// Creates a transform with a mean and a standard deviation of 0.5, as the Vision Transformer has them.
    pub fn new(size: usize, channels: usize) -> Self {
        Self { size, mean: vec![0.5; channels], std: vec![0.5; channels] }
    }

    /// Checks the values.
    ///
    /// Errors: [`ErrorKind::Option`](crate::ErrorKind::Option) for a size of 0, a number of channels other than 1 and 3, or
    /// a mean or deviation that cannot be used.
    pub fn check(&self) -> Result<()> {
        let Self { size, mean, std } = self;
        ensure!(
            (1..=1 << 14).contains(size),
            Error::option("size", format_args!("expected 1 to {}, got {size}", 1 << 14))
        );
        ensure!(
            matches!(mean.len(), 1 | 3) && mean.iter().all(|value| value.is_finite()),
            Error::option("mean", format_args!("expected 1 or 3 finite numbers, one per channel, got {mean:?}"))
        );
        ensure!(
            std.len() == mean.len() && std.iter().all(|value| *value > 0.0 && value.is_finite()),
            Error::option("std", format_args!("expected {} numbers above 0, one per channel, got {std:?}", mean.len()))
        );
        Ok(())
    }

    /// Returns the number of channels.
    pub fn channels(&self) -> usize {
        self.mean.len()
    }

    /// Resizes and crops an image, to `[size, size, channels]`.
    ///
    /// Errors: those of [`ImageTransform::check`].
    pub fn crop(&self, image: &Image) -> Result<Vec<u8>> {
        self.check()?;
        let (size, channels, short) = (self.size, self.channels(), image.width.min(image.height));
        let weights = |side: usize| {
            let long = (size as u128 * side as u128 / short as u128) as usize;
            Weights::new(side, long, rounded_half(long - size), size)
        };
        let (columns, rows) = (weights(image.width), weights(image.height));
        let pixels = image.with_channels(channels);
        // Only rows that the crop sees.
        let (first, last) = (rows.first(), rows.last());
        let mut narrow = vec![0; (last - first) * size * channels];
        let row_of = |row: usize| &pixels[row * image.width * channels..][..image.width * channels];
        for (row, out) in (first..last).zip(narrow.chunks_exact_mut(size * channels)) {
            columns.apply(row_of(row), channels, channels, out);
        }
        let mut out = vec![0; size * size * channels];
        // A column at a time: the next value of a column is a row further.
        let width = size * channels;
        let mut column = vec![0; size];
        for at in 0..width {
            rows.apply_from(&narrow[at..], width, first, &mut column);
            for (row, value) in column.iter().enumerate() {
                out[row * width + at] = *value;
            }
        }
        Ok(out)
    }

    /// Normalizes cropped images, `[size, size, channels]` each, into `[b, channels, size, size]` F32. `true` mirrors an image.
    ///
    /// Errors: those of [`ImageTransform::check`]; an image of another length; none at all.
    pub fn normalize(&self, images: &[(&[u8], bool)]) -> Result<Tensor> {
        self.check()?;
        let (size, channels) = (self.size, self.channels());
        let length = size * size * channels;
        // In f32, as torchvision computes.
        let table = |(mean, std): (&f64, &f64)| {
            (0..256).map(|value| (value as f32 / 255.0 - *mean as f32) / *std as f32).collect_vec()
        };
        let tables: Vec<Vec<f32>> = self.mean.iter().zip(&self.std).map(table).collect_vec();
        let mut values = Vec::with_capacity(images.len() * length);
        for &(image, mirrored) in images {
            ensure!(
                image.len() == length,
                Error::argument(
                    "image",
                    format_args!("expected {length} bytes [{size}, {size}, {channels}], got {}", image.len())
                )
            );
            for (channel, table) in tables.iter().enumerate() {
                for row in image.chunks_exact(size * channels) {
                    let value = |x: usize| table[usize::from(row[x * channels + channel])];
                    for x in 0..size {
                        values.push(value(if mirrored { size - 1 - x } else { x }));
                    }
                }
            }
        }
        Tensor::from_vec(values, [images.len(), channels, size, size], &Device::Cpu)
    }
}

/// Half of a number, rounded to the even neighbour, as Python's `round` has it.
fn rounded_half(value: usize) -> usize {
    let half = value / 2;
    if value % 2 == 1 { half + half % 2 } else { half }
}

/// Weights of the pixels of a side that each pixel of a resized side is a mean of: those of PIL's bilinear filter.
struct Weights {
    /// First pixel of each, and the weights from there on.
    pixels: Vec<(usize, Vec<i32>)>,
}

impl Weights {
    /// Pixels `from..from + count` of a side of `before` pixels, resized to `after`.
    fn new(before: usize, after: usize, from: usize, count: usize) -> Self {
        let scale = before as f64 / after as f64;
        let support = scale.max(1.0);
        let pixel = |at: usize| {
            let center = (at as f64 + 0.5) * scale;
            let first = (center - support + 0.5).max(0.0) as usize;
            let last = ((center + support + 0.5) as usize).min(before);
            let weight = |at: usize| {
                let distance = ((at as f64 - center + 0.5) * (1.0 / support)).abs();
                if distance < 1.0 { 1.0 - distance } else { 0.0 }
            };
            let weights: Vec<f64> = (first..last).map(weight).collect_vec();
            let sum: f64 = weights.iter().sum();
            let fixed = |weight: &f64| (0.5 + weight / sum * f64::from(1u32 << BITS)) as i32;
            (first, weights.iter().map(fixed).collect_vec())
        };
        Self { pixels: (from..from + count).map(pixel).collect_vec() }
    }

    fn first(&self) -> usize {
        self.pixels.iter().map(|(first, _)| *first).min().unwrap_or(0)
    }

    fn last(&self) -> usize {
        self.pixels.iter().map(|(first, weights)| first + weights.len()).max().unwrap_or(0)
    }

    /// Resizes a row of pixels of `channels` values.
    fn apply(&self, row: &[u8], channels: usize, step: usize, out: &mut [u8]) {
        let mut plane = vec![0; self.pixels.len()];
        for channel in 0..channels {
            self.apply_from(&row[channel..], step, 0, &mut plane);
            for (at, value) in plane.iter().enumerate() {
                out[at * channels + channel] = *value;
            }
        }
    }

    /// Resizes values that lie `step` apart, of which the first is number `start`.
    fn apply_from(&self, values: &[u8], step: usize, start: usize, out: &mut [u8]) {
        for ((first, weights), out) in self.pixels.iter().zip(out) {
            let mut sum = 1i64 << (BITS - 1);
            for (weight, at) in weights.iter().zip(first - start..) {
                sum += i64::from(*weight) * i64::from(values[at * step]);
            }
            *out = (sum >> BITS).clamp(0, 255) as u8;
        }
    }
}
