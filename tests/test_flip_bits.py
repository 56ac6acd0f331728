"""Flipped bits never give other results with exit code 0, nor a traceback."""

from collections import Counter

from flip_bits import KINDS, flips


def test_forty_flips(tmp_path):
    found = list(flips(tmp_path, 40, seed=1))
    assert not [flip for flip in found if flip.wrong]
    # Each kind was read: some of its flips are refused, fallen back from or told of.
    assert Counter(flip.kind for flip in found) == dict.fromkeys(KINDS, 8)
    assert {flip.came for flip in found} <= {"refused", "the same", "told of"}
    assert any(flip.came == "refused" for flip in found if flip.kind == "config")
