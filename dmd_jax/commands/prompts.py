"""`dmd-jax prompts`: prompts of many kinds of files, once, into ArrayRecord shards."""

from __future__ import annotations

import argparse

from dmd_jax.data.prompt_rows import KEYS
from dmd_jax.data.prompt_shards import SHARD_SIZE, write_prompts
from dmd_jax.progress import Progress
from dmd_jax.storage.files import path_of
from dmd_jax.storage.workdir_lock import locked


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "source",
        metavar="SRC",
        help="a .txt (a prompt a line), .jsonl, .parquet or WebDataset .tar; a folder of them; "
        "or a quoted pattern such as 'data/*.tar'",
    )
    parser.add_argument("out", type=path_of, metavar="OUT_DIR", help="the folder to make")
    parser.add_argument(
        "--key",
        metavar="NAME",
        help=f"of JSON objects, or the column; by default the first of {', '.join(KEYS)}",
    )
    parser.add_argument(
        "--skip-broken", action="store_true", help="leave rows out that give no prompt"
    )
    parser.add_argument("--shard-size", type=int, default=SHARD_SIZE, metavar="N")


def run(args: argparse.Namespace) -> None:
    check = Progress("check", None, unit="rows")
    progress = None

    def written(done: int, total: int) -> None:
        nonlocal progress
        if progress is None:
            progress = Progress("prompts", total, start=done, unit="rows")
        else:
            progress.update(done)

    with locked(args.out):
        metadata = write_prompts(
            args.out,
            args.source,
            key=args.key,
            shard_size=args.shard_size,
            skip_broken=args.skip_broken,
            checked=check.update,
            written=written,
        )
    skipped = f", {metadata.skipped:,} broken rows left out" if metadata.skipped else ""
    print(f"prompts: {metadata.count:,} in {args.out}{skipped}")
