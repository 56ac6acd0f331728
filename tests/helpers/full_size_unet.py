"""The whole U-Net of Stable Diffusion v1.5, 859,520,964 random weights, against PyTorch diffusers.

    python tests/helpers/full_size_unet.py [--size 16]

prints the largest difference between the outputs in float32, relative to the largest magnitude, and
exits with 1 where it is 5e-5 or more. It needs tests/requirements-torch.txt, about 10 GB of memory
and some minutes on two cores.
"""

from __future__ import annotations

import argparse
import gc
import resource
import sys
import time
from pathlib import Path

import jax
import numpy as np

sys.path[:0] = [str(Path(__file__).parents[2]), str(Path(__file__).parent)]

from diffusers_golden import drawn_input  # noqa: E402
from torch_weights import draw_parameters, params_of, relative_error  # noqa: E402

from dmd_jax.models import build_network  # noqa: E402

TOLERANCE = 5e-5
WIDTH = 768  # of the text's embedding


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", type=int, default=16, help="of the latents (default: 16)")
    size = parser.parse_args().size
    start = time.monotonic()

    import torch
    from diffusers import UNet2DConditionModel

    x_t, time_ = drawn_input("full x_t", (1, size, size, 4)), np.array([999.0], np.float32)
    context = drawn_input("full context", (1, 77, WIDTH))
    theirs = draw_parameters(UNet2DConditionModel(cross_attention_dim=WIDTH))
    with torch.no_grad():
        nchw = torch.from_numpy(np.ascontiguousarray(x_t.transpose(0, 3, 1, 2)))
        output = theirs(nchw, torch.from_numpy(time_), torch.from_numpy(context)).sample
    expected = output.numpy().transpose(0, 2, 3, 1)
    print(f"PyTorch's output after {time.monotonic() - start:.0f} s", flush=True)

    network = build_network({"name": "unet2d_condition", "cross_attention_dim": WIDTH})
    params = params_of(theirs, network)
    count = sum(leaf.size for leaf in jax.tree.leaves(params))
    del theirs, output
    gc.collect()
    found = jax.jit(network.apply)({"params": params}, x_t, time_, context)
    error = relative_error(found, expected)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    print(
        f"{count:,} parameters, latents {size}x{size}: relative error {error:.2e}, expected below "
        f"{TOLERANCE:g}; {time.monotonic() - start:.0f} s, peak memory {peak:.1f} GB"
    )
    sys.exit(error >= TOLERANCE)


if __name__ == "__main__":
    main()
