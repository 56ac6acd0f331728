"""Random weights for PyTorch's modules, and the same weights as a tree of ours.

Weights are `edm_pickle.drawn` by the state dict's key, so that every parameter matters: no bias is
zero, no norm's weight is one. They need no PyTorch to be drawn again.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import flax.traverse_util
import jax
import numpy as np
from edm_pickle import drawn

from dmd_jax.convert.torch_layout import from_torch, torch_key, torch_shape


def draw_parameters(module):
    """The torch.nn.Module, in evaluation mode, with random parameters in place of its own."""
    import torch

    with torch.no_grad():
        for key, parameter in module.named_parameters():
            parameter.copy_(torch.from_numpy(np.asarray(drawn(key, tuple(parameter.shape)))))
    return module.eval()


def params_of(module, network: nn.Module, *, without: str = "") -> dict[str, Any]:
    """The parameters of a torch.nn.Module as those of `network`; names and shapes must agree.

    Args:
      without: what is taken off the keys that begin with it.
    """
    named = module.named_parameters()
    arrays = {key.removeprefix(without): value.detach().numpy() for key, value in named}
    expected = dict(_torch_shapes(network).values())
    assert {key: array.shape for key, array in arrays.items()} == expected
    return _tree(network, lambda key, _: arrays[key])


def drawn_params(network: nn.Module) -> dict[str, Any]:
    """What params_of gives of a module of draw_parameters, without PyTorch."""
    return _tree(network, drawn)


def relative_error(actual, reference) -> float:
    """The largest difference, relative to the reference's largest magnitude."""
    actual, reference = np.asarray(actual), np.asarray(reference)
    assert actual.shape == reference.shape
    return float(np.abs(actual - reference).max() / np.abs(reference).max())


def _torch_shapes(network: nn.Module) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Path -> key and shape in PyTorch."""
    tree = jax.eval_shape(network.init, jax.random.key(0), *network.example_inputs())["params"]
    flat = flax.traverse_util.flatten_dict(tree, sep="/")
    return {path: (torch_key(path), torch_shape(path, leaf.shape)) for path, leaf in flat.items()}


def _tree(network: nn.Module, array: Callable[[str, tuple[int, ...]], np.ndarray]) -> dict:
    flat = {
        path: from_torch(path, array(key, shape))
        for path, (key, shape) in _torch_shapes(network).items()
    }
    return flax.traverse_util.unflatten_dict(flat, sep="/")
