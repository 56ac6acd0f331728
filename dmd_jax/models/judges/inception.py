"""The Inception network of the Fréchet Inception distance as pure functions of its parameters.

It is the network of the file inception-2015-12-05 as pytorch-fid runs it: Inception v3 (arXiv
1512.00567) whose average pools leave the padding out of the mean, whose last block pools with a
maximum, and which knows 1008 classes. Batch norms are folded into the convolutions.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from dmd_jax.errors import UserError
from dmd_jax.method.precision import at_precision
from dmd_jax.models.ops.resizing import bilinear, bilinear_from_the_corner

SIDE, FEATURES, CLASSES = 299, 2048, 1008


def _block_a(pooled: int) -> dict[str, str]:
    return {
        "branch1x1": "1x1x64",
        "branch5x5": "1x1x48 5x5x64",
        "branch3x3dbl": "1x1x64 3x3x96 3x3x96",
        "branch_pool": f"average 1x1x{pooled}",
    }


def _block_c(width: int) -> dict[str, str]:
    return {
        "branch1x1": "1x1x192",
        "branch7x7": f"1x1x{width} 1x7x{width} 7x1x192",
        "branch7x7dbl": f"1x1x{width} 7x1x{width} 1x7x{width} 7x1x{width} 1x7x192",
        "branch_pool": "average 1x1x192",
    }


def _block_e(pool: str) -> dict[str, str]:
    return {
        "branch1x1": "1x1x320",
        "branch3x3": "1x1x384 1x3x384|3x1x384",
        "branch3x3dbl": "1x1x448 3x3x384 1x3x384|3x1x384",
        "branch_pool": f"{pool} 1x1x192",
    }


# Block -> branch -> its layers, in order; the branches' outputs are concatenated. "HxWxN" is a
# convolution to N channels, padded and of stride 1; "HxWxN/S" has stride S and no padding; "A|B"
# are two beside each other, concatenated; "average", "max" and "max/2" are 3x3 pools. Names are
# those of the published state dict.
BLOCKS = {
    "Conv2d_1a_3x3": {"": "3x3x32/2"},
    "Conv2d_2a_3x3": {"": "3x3x32/1"},
    "Conv2d_2b_3x3": {"": "3x3x64 max/2"},
    "Conv2d_3b_1x1": {"": "1x1x80"},
    "Conv2d_4a_3x3": {"": "3x3x192/1 max/2"},
    "Mixed_5b": _block_a(32),
    "Mixed_5c": _block_a(64),
    "Mixed_5d": _block_a(64),
    "Mixed_6a": {
        "branch3x3": "3x3x384/2",
        "branch3x3dbl": "1x1x64 3x3x96 3x3x96/2",
        "pool": "max/2",
    },
    "Mixed_6b": _block_c(128),
    "Mixed_6c": _block_c(160),
    "Mixed_6d": _block_c(160),
    "Mixed_6e": _block_c(192),
    "Mixed_7a": {
        "branch3x3": "1x1x192 3x3x320/2",
        "branch7x7x3": "1x1x192 1x7x192 7x1x192 3x3x192/2",
        "pool": "max/2",
    },
    "Mixed_7b": _block_e("average"),
    "Mixed_7c": _block_e("max"),
}
_POOLS = {
    "average": lambda x: nn.avg_pool(x, (3, 3), (1, 1), "SAME", count_include_pad=False),
    "max": lambda x: nn.max_pool(x, (3, 3), (1, 1), "SAME"),
    "max/2": lambda x: nn.max_pool(x, (3, 3), (2, 2), "VALID"),
}


def _resized_before(images: jax.Array, size: tuple[int, int]) -> jax.Array:
    if images.shape[1:3] != size:
        raise UserError(
            f"Inception preprocessing clean got images of shape {images.shape}; expected {size[0]}x"
            f"{size[1]} pixels, as models.ops.resizing.pil_bicubic makes them on the host"
        )
    return images


def _from_128(bytes_: jax.Array) -> jax.Array:
    return (bytes_ - 128) / 128


# How bytes are resized, and then scaled.
PREPROCESSINGS = {
    "pytorch_fid": (bilinear, lambda bytes_: 2 * (bytes_ / 255) - 1),
    "tensorflow": (bilinear_from_the_corner, _from_128),
    "clean": (_resized_before, _from_128),
}


def inception_template() -> dict[str, Any]:
    """The shapes of the parameters, float32.

    Returns:
      {"Conv2d_1a_3x3": {"kernel" [H, W, in, out], "bias" [out]}, ..., "Mixed_5b": {"branch1x1":
      {...}, ...}, ..., "fc": {"kernel" [2048, 1008]}}.
    """
    template = {}

    def convolve(channels: int, path: tuple[str, ...], size, stride) -> int:
        *parents, last = path
        node = template
        for parent in parents:
            node = node.setdefault(parent, {})
        height, width, outputs = size
        node[last] = {
            "kernel": jax.ShapeDtypeStruct((height, width, channels, outputs), jnp.float32),
            "bias": jax.ShapeDtypeStruct((outputs,), jnp.float32),
        }
        return outputs

    channels = _through_blocks(3, convolve, pool=lambda channels, _: channels, join=sum)
    template["fc"] = {"kernel": jax.ShapeDtypeStruct((channels, CLASSES), jnp.float32)}
    return template


def preprocess(images: jax.Array, preprocessing: str = "pytorch_fid") -> jax.Array:
    """The network's input, which `pool3` makes for itself.

    Args:
      images: [B, H, W, 3], the values of bytes, 0 to 255.
      preprocessing: "pytorch_fid": half-pixel centres, 2 b / 255 - 1. "tensorflow": as the
        network's original graph does it, and NVIDIA's detector, which EDM's statistics are of: rows
        at multiples of H / 299 from the corner, (b - 128) / 128. "clean": clean-fid's; images are
        299x299 already, by `resizing.pil_bicubic`, and scaled alike.

    Returns:
      float32 [B, 299, 299, 3].

    Raises:
      UserError: images without three channels, or not resized before "clean"; an unknown
        preprocessing.
    """
    if preprocessing not in PREPROCESSINGS:
        raise UserError(
            f"Inception preprocessing is {preprocessing!r}; "
            f"expected one of {', '.join(PREPROCESSINGS)}"
        )
    if images.ndim != 4 or images.shape[-1] != 3:
        raise UserError(
            f"Inception got images of shape {images.shape}; expected [B, H, W, 3], three channels"
        )
    resize, scale = PREPROCESSINGS[preprocessing]
    return scale(resize(jnp.asarray(images, jnp.float32), (SIDE, SIDE)))


def pool3(params: Any, images: jax.Array, *, preprocessing: str = "pytorch_fid") -> jax.Array:
    """The features that the Fréchet Inception distance is measured in.

    Computed in full float32 on every device. Statistics of different preprocessings do not compare.

    Args:
      params: of the shapes of `inception_template`.
      images, preprocessing: as for `preprocess`.

    Returns:
      float32 [B, 2048].

    Raises:
      UserError: as `preprocess`.
    """

    def convolve(x, path, size, stride):
        del size  # the kernel has it
        leaf = params
        for name in path:
            leaf = leaf[name]
        strides, padding = ((1, 1), "SAME") if stride is None else ((stride, stride), "VALID")
        x = jax.lax.conv_general_dilated(
            x, leaf["kernel"], strides, padding, dimension_numbers=("NHWC", "HWIO", "NHWC")
        )
        return nn.relu(x + leaf["bias"])

    with at_precision("highest"):
        x = _through_blocks(
            preprocess(images, preprocessing),
            convolve,
            pool=lambda x, kind: _POOLS[kind](x),
            join=functools.partial(jnp.concatenate, axis=-1),
        )
        return x.mean(axis=(1, 2))


def class_logits(params: Any, features: jax.Array) -> jax.Array:
    """The logits that the Inception Score is computed from: without the bias, as is its custom.

    Args:
      params: of the shapes of `inception_template`. features: `pool3`'s, [B, 2048].

    Returns:
      float32 [B, 1008].
    """
    return jnp.matmul(features, params["fc"]["kernel"], precision=jax.lax.Precision.HIGHEST)


def _through_blocks(value: Any, convolve: Callable, *, pool: Callable, join: Callable) -> Any:
    """Carries a value through BLOCKS: the image through the network, or its number of channels.

    Args:
      convolve: (value, path, (height, width, outputs), stride or None where padded) -> value.
      pool: (value, kind) -> value. join: values of the branches -> value.
    """

    def branch(layers: str, path: tuple[str, ...]) -> Any:
        result = value
        for kind, names in _numbered(layers, path):
            if not names:
                result = pool(result, kind)
                continue
            beside = [convolve(result, name, *_parsed(one)) for one, name in names]
            result = beside[0] if len(beside) == 1 else join(beside)
        return result

    for block, branches in BLOCKS.items():
        results = [
            branch(layers, (block, name) if name else (block,)) for name, layers in branches.items()
        ]
        value = results[0] if len(results) == 1 else join(results)
    return value


def _numbered(layers: str, path: tuple[str, ...]) -> Iterator[tuple[str, list]]:
    """The layers of a branch: (kind, [(convolution, its path)]), no convolutions for a pool.

    A branch's only convolution bears its name; of several, each appends _1, _2 and so on, and
    those beside each other also a and b.
    """
    *parents, last = path
    convolutions = sum(layer not in _POOLS for layer in layers.split())
    number = 0
    for layer in layers.split():
        if layer in _POOLS:
            yield layer, []
            continue
        number += 1
        name = last if convolutions == 1 else f"{last}_{number}"
        parts = layer.split("|")
        suffixes = [""] if len(parts) == 1 else ["a", "b"]
        yield layer, [(part, (*parents, name + s)) for part, s in zip(parts, suffixes)]


def _parsed(convolution: str) -> tuple[tuple[int, ...], int | None]:
    """ "3x3x32/2" -> ((3, 3, 32), 2)."""
    size, _, stride = convolution.partition("/")
    return tuple(map(int, size.split("x"))), int(stride) if stride else None
