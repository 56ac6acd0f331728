"""Our parameters' names and layouts in PyTorch."""

from __future__ import annotations

import numpy as np
import pytest

from dmd_jax.convert.torch_layout import from_torch, to_torch, torch_key, torch_shape


@pytest.mark.parametrize(
    "path, key",
    [
        (
            "down_blocks_0/attentions_10/transformer_blocks_0/attn1/to_q/kernel",
            "down_blocks.0.attentions.10.transformer_blocks.0.attn1.to_q.weight",
        ),
        ("time_embedding/linear_1/kernel", "time_embedding.linear_1.weight"),
        ("time_embedding/linear_2/bias", "time_embedding.linear_2.bias"),
        ("attn2/to_out_0/kernel", "attn2.to_out.0.weight"),
        ("ff/net_0/proj/kernel", "ff.net.0.proj.weight"),
        ("mid_block/resnets_1/norm2/scale", "mid_block.resnets.1.norm2.weight"),
        ("encoder/layers_3/conv_2/kernel", "encoder.layers.3.conv.2.weight"),
        ("embeddings/token_embedding/embedding", "embeddings.token_embedding.weight"),
        ("embeddings/class_embedding", "embeddings.class_embedding"),
        ("logit_scale", "logit_scale"),
    ],
)
def test_names(path, key):
    assert torch_key(path) == key


def test_layouts():
    convolution = np.arange(2 * 3 * 5 * 7, dtype=np.float32).reshape(2, 3, 5, 7)  # OIHW
    kernel = from_torch("conv_in/kernel", convolution)
    assert kernel.shape == (5, 7, 3, 2) and kernel[4, 6, 1, 0] == convolution[0, 1, 4, 6]
    assert torch_shape("conv_in/kernel", kernel.shape) == convolution.shape
    matrix = convolution[0, 0]  # [out, in]
    assert from_torch("to_q/kernel", matrix)[3, 2] == matrix[2, 3]
    assert torch_shape("to_q/kernel", (7, 5)) == (5, 7)
    # What is no kernel lies alike.
    assert from_torch("position_embedding/embedding", matrix)[2, 3] == matrix[2, 3]
    assert torch_shape("position_embedding/embedding", (5, 7)) == (5, 7)


@pytest.mark.parametrize("name", ["kernel", "embedding", "bias"])
@pytest.mark.parametrize("shape", [(2, 3, 5, 7), (2, 3), (2,), ()])
def test_there_and_back(name, shape):
    array = np.random.default_rng(0).standard_normal(shape).astype(np.float32)
    theirs = to_torch(f"a/{name}", array)
    assert theirs.shape == torch_shape(f"a/{name}", shape) and theirs.flags.c_contiguous
    ours = from_torch(f"a/{name}", theirs.astype(np.float64))
    assert ours.dtype == np.float32 and ours.flags.c_contiguous
    np.testing.assert_array_equal(ours, array)
