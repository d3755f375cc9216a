#!/usr/bin/env python3
"""Writes small images of every kind, and what PIL makes of them, for `tests/train/vision.rs` and `cli/tests/commands/images.rs`.

Needs pillow, numpy and safetensors. `NAME.pixels` is `convert("RGB")`; `NAME.SIZE` is that after `Resize(SIZE)` and
`CenterCrop(SIZE)` of torchvision, whose code for images of PIL is repeated here; `NAME.SIZE.grey` the same after `convert("L")`.
"""

from pathlib import Path

import numpy as np
from PIL import Image
from safetensors.numpy import save_file

HERE = Path(__file__).resolve().parent


def resized(image, size):
    width, height = image.size
    short, long = min(width, height), max(width, height)
    other = int(size * long / short)
    image = image.resize((size, other) if width <= height else (other, size), Image.Resampling.BILINEAR)
    width, height = image.size
    top, left = int(round((height - size) / 2.0)), int(round((width - size) / 2.0))
    return image.crop((left, top, left + size, top + size))


random = np.random.default_rng(0)
y, x = np.mgrid[0:37, 0:52]
smooth = np.stack([x * 4, y * 6, 255 - x * 2 - y * 3], -1).astype(np.uint8)
noise = random.integers(0, 256, (23, 14, 3), dtype=np.uint8)
rgb, tall = Image.fromarray(smooth), Image.fromarray(noise)
alpha = random.integers(0, 256, smooth.shape[:2], dtype=np.uint8)
files = {
    "rgb.png": rgb,
    "tall.png": tall,
    "wide.png": Image.fromarray(np.repeat(noise.transpose(1, 0, 2), 5, 1)),
    "grey.png": rgb.convert("L"),
    "bits.png": rgb.convert("1"),
    "palette.png": rgb.quantize(17),
    "alpha.png": Image.fromarray(np.dstack([smooth, alpha])),
    "greyalpha.png": Image.fromarray(np.dstack([smooth[..., 1], alpha]), "LA"),
    "rgb.jpg": rgb,
    "grey.jpg": rgb.convert("L"),
    "progressive.jpeg": rgb,
}
expected = {}
for name, image in files.items():
    options = {"quality": 95, "progressive": name.startswith("progressive")} if "jp" in name else {}
    image.save(HERE / name, **options)
    image = Image.open(HERE / name).convert("RGB")
    expected[f"{name}.pixels"] = np.asarray(image)
    for size in (8, 20, 30):
        expected[f"{name}.{size}"] = np.asarray(resized(image, size))
    expected[f"{name}.8.grey"] = np.asarray(resized(image.convert("L"), 8))[..., None]
# Not by PIL, which reads greys of 16 bits otherwise: the upper 8 bits count.
deep = (x * 1000 + y * 7).astype(np.uint16)
Image.fromarray(deep).save(HERE / "deep.png")
expected["deep.png.pixels"] = np.repeat((deep >> 8).astype(np.uint8)[..., None], 3, -1)
frames = [Image.fromarray(random.integers(0, 256, (9, 9, 3), dtype=np.uint8)) for _ in range(2)]
frames[0].save(HERE / "animated.png", save_all=True, append_images=frames[1:])
expected["animated.png.pixels"] = np.asarray(frames[0])
rgb.convert("CMYK").save(HERE / "cmyk.jpg")
save_file({key: np.ascontiguousarray(value) for key, value in expected.items()}, HERE / "expected.safetensors")
