"""Flips single bits of what a run reads: its checkpoints, config.json, metrics, pairs, weights.

After each flip a command that reads the file must end with exit code 2 and a line, or with the
result of the file as it was. A wrong line of metrics.jsonl, which nothing else depends on, may stay
if it is told of. `PYTHONPATH=. python tests/helpers/flip_bits.py --flips 200` prints what came of
each.
"""

import argparse
import contextlib
import faulthandler
import io
import json
import logging
import random
import shutil
import tempfile
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
from commands import TINY, succeeds

from dmd_jax.commands.cli import main
from dmd_jax.storage.weights import load_weights, params_sha256

KINDS = ("checkpoint", "config", "metrics", "pairs", "weights")
_SECONDS = 240  # after which a command hangs


class Flip(NamedTuple):
    kind: str
    where: str  # file, byte and bit
    came: str  # of it: "refused", "the same", "told of", or what is wrong
    wrong: bool


def flips(folder: Path, count: int, seed: int) -> Iterator[Flip]:
    """Makes a small run in `folder`, and flips so many bits, one at a time and each in a copy."""
    draw = random.Random(seed)
    config = ("--config", TINY, f"--config.teacher.weights={folder / 'teacher' / 'weights'}")
    succeeds("teacher", "--config", TINY, "--workdir", folder / "teacher")
    succeeds("pairs", *config, "--workdir", folder / "pairs")
    pairs = f"--config.data.pairs={folder / 'pairs'}"
    # Lines of metrics at 4, 8 and 10; the checkpoint to fall back to, at 6, holds those of 5 and 6.
    run = (*config, pairs, "--config.steps=8", "--config.checkpoint_every=6")
    succeeds("train", *run, "--workdir", folder / "run")
    newest = max((folder / "run" / "checkpoints").iterdir(), key=lambda path: int(path.name))
    of_kind = {
        "checkpoint": _files(newest),
        "config": [folder / "run" / "config.json"],
        "metrics": [folder / "run" / "metrics.jsonl"],
        "pairs": _files(folder / "pairs", but=("config.json",)),
        "weights": _files(folder / "teacher" / "weights"),
    }
    right = {kind: _outcome(kind, folder, config)[2] for kind in KINDS}
    for number in range(count):
        kind = KINDS[number % len(KINDS)]
        path = draw.choice(of_kind[kind])
        whole = path.read_bytes()
        place = draw.randrange(8 * len(whole))
        path.write_bytes(_flipped(whole, place))
        try:
            code, said, result = _outcome(kind, folder, config)
        finally:
            path.write_bytes(whole)
        where = f"{path.relative_to(folder)} byte {place // 8} bit {place % 8}"
        yield Flip(kind, where, *_judge(code, said, result, right[kind]))


def _judge(code: int | None, said: str, result: dict, right: dict) -> tuple[str, bool]:
    if code == 2:
        lines = [line for line in said.splitlines() if line.startswith("dmd-jax: error: ")]
        return ("refused", False) if len(lines) == 1 else (f"{len(lines)} lines: {said}", True)
    if code != 0:
        return f"ended with {code}: {said}", True
    differ = [key for key in right if right[key] != result[key]]
    if not differ:
        return "the same", False
    if differ == ["metrics"] and "metrics.jsonl" in said:
        return "told of", False
    return f"other {', '.join(differ)} without a word", True


def _outcome(kind: str, folder: Path, config: tuple) -> tuple[int | None, str, dict]:
    """(exit code, None for an exception; what was said; the results), of a command in a copy."""
    with tempfile.TemporaryDirectory() as temporary:
        out = Path(temporary, "images.npy" if kind == "weights" else "run")
        if kind == "weights":
            command = ("sample", "--weights", folder / "teacher" / "weights", "--out", out)
            command += ("--num", 4, "--sampler", "heun", "--steps", 2, "--batch-size", 8)
        elif kind == "pairs":
            pairs = f"--config.data.pairs={folder / 'pairs'}"
            command = ("train", *config, pairs, "--config.steps=10", "--workdir", out)
        else:
            shutil.copytree(folder / "run", out)
            command = ("train", "--workdir", out, "--config.steps=10")
        said = io.StringIO()
        warnings = logging.StreamHandler(said)
        logging.getLogger().addHandler(warnings)
        faulthandler.dump_traceback_later(_SECONDS, exit=True)
        try:
            with contextlib.redirect_stderr(said), contextlib.redirect_stdout(said):
                code = main([str(argument) for argument in command])
        except Exception:
            return None, traceback.format_exc(), {}
        finally:
            faulthandler.cancel_dump_traceback_later()
            logging.getLogger().removeHandler(warnings)
        return code, said.getvalue(), _results(kind, out) if code == 0 else {}


def _results(kind: str, out: Path) -> dict:
    if kind == "weights":
        return {"images": out.read_bytes()}
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    timeless = [{k: v for k, v in line.items() if k != "images_per_second"} for line in lines]
    return {"weights": params_sha256(load_weights(out / "weights").params), "metrics": timeless}


def _files(folder: Path, but: tuple[str, ...] = ()) -> list[Path]:
    paths = sorted(path for path in folder.rglob("*") if path.is_file() and path.name not in but)
    return [path for path in paths if path.stat().st_size]


def _flipped(content: bytes, place: int) -> bytes:
    bits = np.frombuffer(content, np.uint8).copy()
    bits[place // 8] ^= 1 << place % 8
    return bits.tobytes()


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--flips", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    found = []
    with tempfile.TemporaryDirectory() as folder:
        for flip in flips(Path(folder), args.flips, args.seed):
            found.append(flip)
            print("WRONG" if flip.wrong else "right", *flip[:3], sep="  ", flush=True)
    print(f"{sum(flip.wrong for flip in found)} of {len(found)} flips gave something wrong")
    raise SystemExit(any(flip.wrong for flip in found))
