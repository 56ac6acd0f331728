"""The one function through which every network attends."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from contextvars import ContextVar

import jax
import jax.numpy as jnp

from dmd_jax.errors import UserError
from dmd_jax.method.precision import at_precision, both_ways
from dmd_jax.models.ops.splash import fits, splash
from dmd_jax.parallel.sharding import device_in_use, mesh_in_use

# Self-attention of fewer queries is as fast with XLA as with a kernel.
MANY_QUERIES = 1024
# Above this many logits for each head, queries attend in parts of CHUNK: Stable Diffusion's 64x64
# latents have 16.8 million, which are 512 MB of float32 for one example's eight heads.
MOST_LOGITS = 1 << 21
CHUNK = 512
# From this many logits a head on, a CPU takes one head, and so many of its queries, at a time: what
# its cache holds.
CACHED_LOGITS, CACHED_QUERIES = 1 << 14, 512
_AT_ONCE: ContextVar[bool] = ContextVar("at_once", default=False)


def attend(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    *,
    mask: jax.Array | None = None,
    causal: bool = False,
) -> jax.Array:
    """Scaled dot-product attention, softmax(q k^T / sqrt(K)) v (arXiv 1706.03762, Eq. 1).

    Which implementation runs is decided here and nowhere else (`implementation`).

    Args:
      q: [B, L, H, K], H heads of K channels. k, v: [B, S, H, K], of q's dtype.
      mask: bool, broadcastable to [B, H, L, S]; True where a query sees a key. A query that sees
        none gets the mean of all values.
      causal: query i sees keys 0 to i, in addition to what `mask` demands.

    Returns:
      [B, L, H, K] in q's dtype. Logits and softmax are float32; products of float32 are at the
      precision in use (see dmd_jax.method.precision), those of bfloat16 take one pass.

    Raises:
      UserError: shapes that do not fit together.
    """
    batch, _, heads, channels = q.shape
    if k.shape != v.shape or (k.shape[0], *k.shape[2:]) != (batch, heads, channels):
        raise UserError(
            f"attention of q {q.shape} to k {k.shape} and v {v.shape}; expected [B, L, H, K] and "
            "twice [B, S, H, K]"
        )
    if mask is not None:
        shape = (batch, heads, q.shape[1], k.shape[1])
        if mask.dtype != jnp.bool_ or mask.ndim != 4 or not _broadcasts(mask.shape, shape):
            raise UserError(
                f"attention mask is {mask.dtype} of shape {mask.shape}; expected bool, "
                f"broadcastable to {shape}"
            )
    # Gradients multiply bfloat16 by float32, that of the logits, and kernels widen before they
    # multiply: in bfloat16 neither is to take the passes of float32's products.
    with at_precision("default") if q.dtype == jnp.bfloat16 else nullcontext():
        found = implementation(q, k, free=mask is None and not causal)
        if found == "splash":
            kernel = functools.partial(splash, mesh=mesh_in_use())
            return both_ways("default", kernel)(q, k, v)
        if found == "parts":
            return _in_parts(q, k, v)
        if found == "heads":
            return _by_heads(q, k, v)
        return jax.nn.dot_product_attention(
            q, k, v, mask=mask, is_causal=causal, implementation=found
        )


@contextmanager
def at_once() -> Iterator[None]:
    """What is traced inside attends with XLA to all at once, whatever memory that would take.

    Nothing is then computed again, and all of it is there to be counted.
    """
    token = _AT_ONCE.set(True)
    try:
        yield
    finally:
        _AT_ONCE.reset(token)


def implementation(q: jax.Array, k: jax.Array, *, free: bool) -> str:
    """What attends for q [B, L, H, K] and k [B, S, H, K] on the devices that a program is for.

    Args:
      free: every query sees every key.

    Returns:
      For many queries in bfloat16 "splash" on TPU, in a program for a mesh
      (`sharding.program_for`), and "cudnn" on NVIDIA's GPUs from Ampere on, for at most 128
      channels a head; both write no logits. On CPU, unless there are few logits, "heads", one head
      and a part of its queries after the other. Elsewhere "parts", XLA on a part of the queries
      after the other, where the logits of all would take much memory. The backward pass computes
      the logits of both again. Else "xla".
    """
    if _AT_ONCE.get():
        return "xla"
    mesh, (_, length, _, channels) = mesh_in_use(), q.shape
    device = device_in_use()
    if free and length >= MANY_QUERIES and q.dtype == jnp.bfloat16:
        if device.platform == "tpu" and mesh is not None and fits(q.shape, mesh):
            return "splash"
        if _has_cudnn(device) and channels <= 128 and channels % 8 == 0:
            return "cudnn"
    if free and device.platform == "cpu" and length * k.shape[1] >= CACHED_LOGITS:
        return "heads"
    much = length * k.shape[1] > MOST_LOGITS and length % CHUNK == 0
    return "parts" if free and much else "xla"


def _in_parts(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
    batch, length, heads, channels = q.shape
    parts = q.reshape(batch, length // CHUNK, CHUNK, heads, channels)

    @jax.checkpoint
    def one(part: jax.Array) -> jax.Array:
        return jax.nn.dot_product_attention(part, k, v, implementation="xla")

    # The batch stays where it is on its devices; only the parts' axis is moved.
    found = jax.lax.map(one, jnp.moveaxis(parts, 1, 0))
    return jnp.moveaxis(found, 0, 1).reshape(q.shape)


def _by_heads(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
    batch, length, heads, channels = q.shape
    size = CACHED_QUERIES if length % CACHED_QUERIES == 0 else length
    parts = q.reshape(batch, length // size, size, heads, channels)

    @jax.checkpoint
    def one(part: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
        logits = jnp.einsum("blk,bks->bls", part, k, preferred_element_type=jnp.float32)
        # Softmax whose division comes last, where it is one for each channel, not for each key.
        # No gradient runs through the largest logit, on which the result does not depend.
        logits = logits * channels**-0.5
        weights = jnp.exp(logits - jax.lax.stop_gradient(logits.max(-1, keepdims=True)))
        total = weights.sum(-1)[..., None]
        found = jnp.einsum("bls,bks->blk", weights.astype(v.dtype), v)
        return (found / total).astype(v.dtype)

    def of_head(inputs: tuple[jax.Array, jax.Array, jax.Array]) -> jax.Array:
        parts, k, v = inputs
        return jax.lax.map(lambda part: one(part, k, v), parts)

    # The batch stays where it is on its devices; only the other axes are moved.
    # Keys are the last axis of k and v, so that the gradients of both are products that write rows
    # of keys: those that write rows of a few channels take a CPU nine times as long.
    parts = jnp.moveaxis(parts, (3, 1), (0, 1))
    k, v = jnp.transpose(k, (2, 0, 3, 1)), jnp.transpose(v, (2, 0, 3, 1))
    found = jax.lax.map(of_head, (parts, k, v))
    return jnp.moveaxis(found, (0, 1), (3, 1)).reshape(q.shape)


def _has_cudnn(device: jax.Device) -> bool:
    """Whether cuDNN's attention runs there: it needs compute capability 8.0 (cuDNN documentation,
    "Scaled Dot Product Attention"). AMD's GPUs have names for it, such as "gfx942"."""
    major = getattr(device, "compute_capability", "").partition(".")[0]
    return device.platform == "gpu" and major.isdigit() and int(major) >= 8


def _broadcasts(shape: tuple[int, ...], to: tuple[int, ...]) -> bool:
    return all(size in (1, expected) for size, expected in zip(shape, to))
