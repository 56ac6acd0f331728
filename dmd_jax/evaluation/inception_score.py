"""The Inception Score: how sure a classifier is of each sample, and how varied its answers are."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

from dmd_jax.errors import UserError

SPLITS = 10


def inception_score(
    logits: Iterable[np.ndarray], count: int, *, splits: int = SPLITS
) -> tuple[float, float]:
    """Mean and standard deviation over splits of exp(mean_x KL(p(class | x) || p(class))).

    The splits are consecutive and as equal as can be; p(class) is the mean over a split, and the
    standard deviation is divided by their number. float64. Source: arXiv 1606.03498.

    Args:
      logits: [N_i, classes] of successive samples, one batch in memory at a time.
      count: the samples in all. splits: fewer where there are fewer samples.

    Raises:
      UserError: another number of samples than `count`, or values that are not finite.
    """
    splits = min(splits, count)
    ends = [count * (split + 1) // splits for split in range(splits)]
    # The mean divergence of a split is its mean of sum p log p, less sum p log p of its mean p.
    negative_entropy, total, done = np.zeros(splits), 0.0, 0
    for batch in logits:
        batch = np.asarray(batch, np.float64)
        if not np.isfinite(batch).all():
            raise UserError("class logits: a value is not finite, expected numbers")
        if done + len(batch) > count:
            raise UserError(f"class logits: of more than the {count} samples expected")
        log_p = batch - batch.max(axis=1, keepdims=True)
        log_p -= np.log(np.exp(log_p).sum(axis=1, keepdims=True))
        p = np.exp(log_p)
        split = np.searchsorted(ends, np.arange(done, done + len(batch)), side="right")
        member = np.eye(splits)[:, split]
        negative_entropy += member @ (p * log_p).sum(axis=1)
        total = total + member @ p
        done += len(batch)
    if done < count or not count:
        raise UserError(f"class logits: of {done} samples, expected {count or 'at least 1'}")
    sizes = np.diff([0, *ends])
    mean = total / sizes[:, None]
    marginal = (mean * np.log(np.maximum(mean, np.finfo(np.float64).tiny))).sum(axis=1)
    scores = np.exp(negative_entropy / sizes - marginal)
    return float(scores.mean()), float(scores.std())
