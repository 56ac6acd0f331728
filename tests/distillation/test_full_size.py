"""Stable Diffusion v1.5 at its full size: the paper's step as a program, without its arrays."""

import json
import os
import subprocess
import sys

from commands import ROOT

# Sixteen devices, which the tests' own process does not have.
PROGRAM = """
import json, math, jax
from dmd_jax.config import load_config, shipped_config
from dmd_jax.distillation import method_of
from dmd_jax.distillation.program import program_of
from dmd_jax.distillation.from_config import mesh_of

config = load_config(str(shipped_config("sd15_laion625")), ["--config.mesh.fsdp=16"])
method = method_of(config)
program = program_of(config, method, mesh_of(config), method.frozen())
state, frozen = program.state, dict(program.frozen)
batch = program.batch(config)
lowered = program.step(config).lower(state, frozen, batch)
after, metrics = lowered.out_info
count = lambda tree: sum(leaf.size for leaf in jax.tree.leaves(tree))
here = lambda leaf: math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
print(json.dumps({
    "generator": count(state.players["generator"].params),
    "fake_score": count(state.players["fake_score"].params),
    "decoders": {name: count(part) for name, part in frozen.pop("decoders").items()},
    "frozen": {name: count(part) for name, part in frozen.items()},
    "state_bytes_a_device": sum(map(here, jax.tree.leaves(state))),
    "same_state": jax.tree.map(lambda a, b: (a.shape, a.dtype) == (b.shape, b.dtype), state, after)
    == jax.tree.map(lambda _: True, state),
    "metrics": {name: sorted(found) for name, found in metrics.items()},
    "batch": jax.tree.map(lambda leaf: list(leaf.shape), batch),
}))
"""


def test_the_papers_step_lowers_on_sixteen_devices():
    flags = "--xla_force_host_platform_device_count=16"
    run = subprocess.run(
        [sys.executable, "-c", PROGRAM],
        env=os.environ | {"XLA_FLAGS": flags},
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert run.returncode == 0, run.stderr
    found = json.loads(run.stdout.splitlines()[-1])
    # The published counts of v1.5's UNet and text encoder, and of TAESD.
    assert found["generator"] == found["fake_score"] == 859_520_964
    lpips = found["frozen"].pop("lpips")
    assert found["frozen"] == {
        "network": 859_520_964,
        "null": 77 * 768,
        "text_encoder": 123_060_480,
    }
    # VGG16's 13 convolutions, and a weight for each channel of five of them.
    assert lpips == 14_714_688 + 1472
    assert found["decoders"] == {"taesd": 2_445_063}
    # Six float32 copies: two networks, each with Adam's two moments. A sixteenth of them is
    # 1,289,281,446 bytes; vectors too small to split, and the counters, are whole on each device.
    sixteenth = 6 * 4 * 859_520_964 / 16
    assert found["state_bytes_a_device"] == 1_291_607_164
    assert sixteenth < found["state_bytes_a_device"] < 1.002 * sixteenth
    assert found["same_state"]
    assert {"loss_matching", "loss_regression"} <= set(found["metrics"]["generator"])
    assert "loss_fake_score" in found["metrics"]["fake_score"]
    assert found["batch"] == {
        "pairs": {
            "z_ref": [1152, 64, 64, 4],
            "y_ref": [1152, 64, 64, 4],
            "tokens": [1152, 77],
        },
        "prompts": {"tokens": [1152, 77]},
    }
