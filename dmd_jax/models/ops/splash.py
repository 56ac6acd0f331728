"""Attention on TPU by JAX's Pallas kernel, which never writes the logits to memory."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from dmd_jax.parallel.sharding import batch_sharding

# Of queries or keys at a time.
BLOCKS = (4096, 2048, 1024, 512, 256, 128)
# Of a block: more, or larger heads, take more than the scratch memory.
MOST_QUERIES, MOST_LOGITS, MOST_CHANNELS = 1024, 1 << 21, 128
# Up to so many channels a head the backward pass, too, takes the most keys at a time. XLA sums over
# blocks of keys, and does so slowly.
FEW_CHANNELS, FEW_KEYS = 48, 1024


def fits(q_shape: tuple[int, ...], mesh: Mesh) -> bool:
    """Whether `splash` takes q [B, L, H, K]: whole blocks, whole rows a device, small heads."""
    rows = mesh.shape["data"] * mesh.shape["fsdp"]
    whole = q_shape[1] % BLOCKS[-1] == 0 and q_shape[0] % rows == 0
    return whole and q_shape[3] <= MOST_CHANNELS


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

    queries, padding = q.shape[1], -k.shape[1] % BLOCKS[-1]
    keys = k.shape[1] + padding
    block_kv = _largest_block(keys, MOST_LOGITS)
    block_kv_dkv = block_kv if q.shape[3] <= FEW_CHANNELS else _largest_block(keys, FEW_KEYS)
    # A head's few channels would be padded to 128 where they are the innermost axis.
    innermost = kernels.QKVLayout.SEQ_MINOR
    sizes = kernels.BlockSizes(
        block_q=_queries(queries, block_kv),
        block_kv=block_kv,
        block_kv_compute=block_kv,
        block_q_dkv=_queries(queries, block_kv_dkv),
        block_kv_dkv=block_kv_dkv,
        block_kv_dkv_compute=_largest_block(block_kv_dkv, 256),
        use_fused_bwd_kernel=True,
        q_layout=innermost,
        k_layout=innermost,
        v_layout=innermost,
    )
    mask = masks.MultiHeadMask([masks.FullMask((queries, keys))] * q.shape[2])

    def own_rows(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
        kernel = kernels.make_splash_mha_single_device(
            mask=mask, block_sizes=sizes, interpret=interpret
        )
        # A gradient that is scaled before the heads are side by side is written once more for it.
        scaled = jax.lax.optimization_barrier(q.reshape(*q.shape[:2], -1) * q.shape[-1] ** -0.5)
        q, k, v = (jnp.swapaxes(x, 1, 2) for x in (scaled.reshape(q.shape), k, v))
        segments = None
        if padding:
            # A query sees the keys of its own segment.
            padded = jnp.arange(keys) >= keys - padding
            segments = kernels.SegmentIds(jnp.zeros(queries, int), padded)
            k, v = (jnp.pad(x, ((0, 0), (0, 0), (0, padding), (0, 0))) for x in (k, v))
        return jnp.swapaxes(jax.vmap(kernel, (0, 0, 0, None))(q, k, v, segments), 1, 2)

    rows = batch_sharding(mesh).spec
    # What varies over the mesh cannot be told of a kernel's results.
    split = jax.shard_map(own_rows, mesh=mesh, in_specs=rows, out_specs=rows, check_vma=False)
    return split(q, k, v)


def _queries(queries: int, block_kv: int) -> int:
    return _largest_block(queries, min(MOST_QUERIES, MOST_LOGITS // block_kv))


def _largest_block(length: int, most: int) -> int:
    return next(block for block in BLOCKS if block <= most and length % block == 0)
