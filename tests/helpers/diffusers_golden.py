"""What PyTorch diffusers computes with weights drawn by key, as arrays for tests/golden.

    python tests/helpers/diffusers_golden.py

writes tests/golden/diffusers.npz. Its weights and inputs are drawn again wherever they are needed
(torch_weights.draw_parameters, drawn_input), so that the file holds outputs alone, in NHWC, and
the tests that read it need no PyTorch; one that has PyTorch compares the file with `outputs()`.
"""

from __future__ import annotations

import sys
import zlib
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parent))

from torch_weights import draw_parameters

PATH = Path(__file__).parents[1] / "golden" / "diffusers.npz"
TIMES = np.array([999.0, 20.0], np.float32)
# v1.x: four levels, convolutions as projections, heads by their number (four of 8 to 16 channels).
V1 = {
    "sample_size": 16,
    "block_out_channels": [32, 48, 64, 64],
    "norm_num_groups": 8,
    "attention_head_dim": 4,
    "cross_attention_dim": 24,
}
# v2.x: matrices as projections, heads for each level. Latents whose size is odd.
V2 = {
    "sample_size": 16,
    "down_block_types": ["CrossAttnDownBlock2D", "DownBlock2D"],
    "up_block_types": ["UpBlock2D", "CrossAttnUpBlock2D"],
    "block_out_channels": [16, 32],
    "layers_per_block": 1,
    "norm_num_groups": 4,
    "attention_head_dim": [2, 8],
    "cross_attention_dim": 20,
    "use_linear_projection": True,
    "upcast_attention": True,
}
VAE = {
    "down_block_types": ["DownEncoderBlock2D"] * 3,
    "up_block_types": ["UpDecoderBlock2D"] * 3,
    "block_out_channels": [16, 32, 48],
    "layers_per_block": 2,
    "norm_num_groups": 8,
}
UNETS = {"v1": (V1, (16, 8)), "v2": (V2, (5, 7))}  # options, height and width of the latents
GRADIENTS = (
    "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q.weight",
    "mid_block.resnets.1.conv1.weight",
    "time_embedding.linear_1.weight",
)
# Log-variances beyond both ends of what is allowed.
LOG_VARIANCE_BIASES = {4: 50.0, 5: -50.0}


def drawn_input(name: str, shape: tuple[int, ...]) -> np.ndarray:
    """Standard normal, float32, by name."""
    seed = zlib.crc32(f"input {name}".encode())
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def unet_inputs(case: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """x_t [2, h, w, 4], time [2], context [2, 7, D] of a case of UNETS."""
    options, size = UNETS[case]
    context = drawn_input(f"{case} context", (2, 7, options["cross_attention_dim"]))
    return drawn_input(f"{case} x_t", (2, *size, 4)), TIMES, context


def outputs() -> dict[str, np.ndarray]:
    """Every array of the file, made by diffusers."""
    return _unet_outputs() | _block_outputs() | _vae_outputs()


def torch_unet(case: str):
    from diffusers import UNet2DConditionModel

    return draw_parameters(UNet2DConditionModel(**UNETS[case][0]))


def torch_vae():
    import torch
    from diffusers import AutoencoderKL

    vae = draw_parameters(AutoencoderKL(**VAE))
    with torch.no_grad():
        for channel, bias in LOG_VARIANCE_BIASES.items():
            vae.quant_conv.bias[channel] = bias
    return vae


def _unet_outputs() -> dict[str, np.ndarray]:
    import torch

    found = {}
    for case in UNETS:
        unet = torch_unet(case)
        x_t, time, context = unet_inputs(case)
        output = unet(_nchw(x_t), torch.from_numpy(time), torch.from_numpy(context)).sample
        found[f"{case}/output"] = _nhwc(output)
        if case == "v2":
            loss = (output * _nchw(drawn_input("cotangent", x_t.shape))).sum()
            parameters = dict(unet.named_parameters())
            gradients = torch.autograd.grad(loss, [parameters[key] for key in GRADIENTS])
            found |= {f"{case}/grad/{k}": g.numpy() for k, g in zip(GRADIENTS, gradients)}
    return found


def _block_outputs() -> dict[str, np.ndarray]:
    """Blocks on images that show what is lost in a whole network: the epsilons, a large mean."""
    import torch

    level = torch_unet("v2").down_blocks[0]
    context = torch.from_numpy(unet_inputs("v2")[2])
    emb = torch.from_numpy(drawn_input("emb", (2, 64)))
    found = {}
    with torch.no_grad():
        for name, image in block_inputs().items():
            image = _nchw(image)
            found[f"resnet/{name}"] = _nhwc(level.resnets[0](image, emb))
            transformed = level.attentions[0](image, context, return_dict=False)[0]
            found[f"transformer/{name}"] = _nhwc(transformed)
    return found


def block_inputs() -> dict[str, np.ndarray]:
    """Images [2, 4, 4, 16]: a variance about as large as the epsilons, and a mean of 1000."""
    image = drawn_input("image", (2, 4, 4, 16))
    return {"quiet": np.float32(2e-3) * image, "far": np.float32(1000) + image}


def _vae_outputs() -> dict[str, np.ndarray]:
    import torch

    vae = torch_vae()
    with torch.no_grad():
        moments = vae.encode(_nchw(drawn_input("vae image", (2, 16, 24, 3)))).latent_dist
        image = vae.decode(_nchw(drawn_input("vae latents", (2, 4, 6, 4)))).sample
    return {
        "vae/mean": _nhwc(moments.mean),
        "vae/log_variance": _nhwc(moments.logvar),
        "vae/image": _nhwc(image),
    }


def _nchw(array: np.ndarray):
    import torch

    return torch.from_numpy(np.ascontiguousarray(np.transpose(array, (0, 3, 1, 2))))


def _nhwc(tensor) -> np.ndarray:
    return np.ascontiguousarray(np.transpose(tensor.detach().numpy(), (0, 2, 3, 1)))


def main() -> None:
    np.savez_compressed(PATH, **outputs())
    print(f"{PATH}: {PATH.stat().st_size:,} bytes")


if __name__ == "__main__":
    main()
