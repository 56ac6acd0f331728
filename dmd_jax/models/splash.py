"""Attention on TPU by JAX's Pallas kernel, which never writes the logits to memory."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from dmd_jax.sharding import batch_sharding

# Of queries or keys at a time; larger ones take less time, and 2048 more than the scratch memory.
BLOCKS = (1024, 512, 256, 128)


def fits(q_shape: tuple[int, ...], k_shape: tuple[int, ...], mesh: Mesh) -> bool:
    """Whether `splash` takes q and k of these shapes: whole blocks, and whole rows a device."""
    rows = mesh.shape["data"] * mesh.shape["fsdp"]
    lengths = q_shape[1], k_shape[1]
    return q_shape[0] % rows == 0 and all(length % BLOCKS[-1] == 0 for length in lengths)


def splash(
    q: jax.Array, k: jax.Array, v: jax.Array, mesh: Mesh, *, interpret: bool = False
) -> jax.Array:
    """softmax(q k^T / sqrt(K)) v for q, k, v [B, L, H, K] that are split by rows over the mesh.

    XLA cannot split a kernel over devices by itself: each device attends for its own rows.

    Args:
      interpret: runs the kernel's program by XLA on any device, for tests.
    """
    # Half a second that only programs for TPU need.
    from jax.experimental.pallas.ops.tpu.splash_attention import (
        splash_attention_kernel as kernels,
    )
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks

    block_q, block_kv = (next(block for block in BLOCKS if x.shape[1] % block == 0) for x in (q, k))
    sizes = kernels.BlockSizes(
        block_q=block_q,
        block_kv=block_kv,
        block_kv_compute=block_kv,
        block_q_dkv=block_q,
        block_kv_dkv=block_kv,
        block_kv_dkv_compute=block_kv,
        use_fused_bwd_kernel=True,
    )
    mask = masks.MultiHeadMask([masks.FullMask((q.shape[1], k.shape[1]))] * q.shape[2])

    def own_rows(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
        kernel = kernels.make_splash_mha_single_device(
            mask=mask, block_sizes=sizes, interpret=interpret
        )
        q, k, v = (jnp.swapaxes(x, 1, 2) for x in (q * q.shape[-1] ** -0.5, k, v))
        return jnp.swapaxes(jax.vmap(kernel)(q, k, v), 1, 2)

    rows = batch_sharding(mesh).spec
    # What varies over the mesh cannot be told of a kernel's results.
    split = jax.shard_map(own_rows, mesh=mesh, in_specs=rows, out_specs=rows, check_vma=False)
    return split(q, k, v)
