"""One run at a time in a folder, on a disk and in a bucket."""

import json
import os
import signal
import socket
import subprocess
import sys
import time

import pytest
from commands import ROOT, fails, finish, start
from stand_in_gcs import Gcs, serving

from dmd_jax.errors import UserError
from dmd_jax.reporting.metrics import read_metrics
from dmd_jax.storage import workdir_lock
from dmd_jax.storage.files import path_of
from dmd_jax.storage.workdir_lock import locked

HOLD = """
import sys, time
from dmd_jax.storage import workdir_lock
from dmd_jax.storage.files import path_of
workdir_lock._REFRESH_SECONDS = 0.2
with workdir_lock.locked(path_of(sys.argv[1])):
    print("held", flush=True)
    time.sleep(300)
"""


@pytest.fixture
def bucket(monkeypatch):
    with serving(Gcs("bucket")) as environment:
        for name, value in environment.items():
            monkeypatch.setenv(name, value)
        yield path_of("gs://bucket/run")


@pytest.fixture(params=["disk", "bucket"])
def folder(request, tmp_path):
    return tmp_path / "run" if request.param == "disk" else request.getfixturevalue("bucket")


@pytest.fixture
def holder(folder):
    """Another process that holds the folder."""
    command = [sys.executable, "-c", HOLD, str(folder)]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "held\n"
    yield process
    process.kill()
    process.communicate()


def test_the_second_is_refused_with_the_holder_and_a_dead_one_is_succeeded(
    folder, holder, monkeypatch
):
    monkeypatch.setattr(workdir_lock, "_REFRESH_SECONDS", 0.3)  # between two looks at a bucket
    expected = f"in use by process {holder.pid} on '{socket.gethostname()}'"
    with pytest.raises(UserError, match=expected), locked(folder):
        pass
    holder.kill()
    holder.wait()
    with locked(folder):
        found = json.loads((folder / ".lock").read_bytes())
        assert found == {"host": socket.gethostname(), "process": os.getpid()}
    assert not (folder / ".lock").exists()


def test_a_bucket_lock_without_a_sign_of_life_is_taken_over(bucket, monkeypatch, capsys):
    monkeypatch.setattr(workdir_lock, "_DEAD_SECONDS", 0.5)
    monkeypatch.setattr(workdir_lock, "_REFRESH_SECONDS", 0.3)
    (bucket / ".lock").write_bytes(json.dumps({"host": "far\x1b", "process": 7}).encode())
    with locked(bucket):
        assert r"held by process 7 on 'far\x1b'" in capsys.readouterr().err
        first = bucket.files()[".lock"]
        time.sleep(1.0)
        assert bucket.files()[".lock"] != first  # it gives signs of life itself
    assert not (bucket / ".lock").exists()


@pytest.mark.parametrize("content", [b"", b"\xff", b"[1]", b'{"host": 1, "process": "x"}'])
def test_whatever_is_left_in_the_file_is_no_hindrance(tmp_path, content):
    (tmp_path / ".lock").write_bytes(content)
    with locked(tmp_path), pytest.raises(UserError, match="is in use by process"):  # noqa: SIM117
        with locked(tmp_path):
            pass


def test_a_folder_that_nothing_was_put_into_is_not_left(tmp_path):
    with locked(tmp_path / "a"):
        pass
    assert not (tmp_path / "a").exists()
    with pytest.raises(UserError, match="no such source"), locked(tmp_path / "a"):
        raise UserError("no such source")
    assert not (tmp_path / "a").exists()
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(UserError, match="file cannot be written"), locked(tmp_path / "file"):
        pass


def test_two_trainings_at_once(capsys, tiny, tmp_path):
    """The second is refused, in each command, and the first comes to its end."""
    first = start("train", *tiny, "--workdir", tmp_path, "--config.steps=100000")
    deadline = time.monotonic() + 120
    while not read_metrics(tmp_path):
        assert first.poll() is None and time.monotonic() < deadline
        time.sleep(0.05)
    line = fails(capsys, "train", *tiny, "--workdir", tmp_path, "--config.steps=100000")
    assert f"{tmp_path} is in use by process {first.pid} on" in line
    first.send_signal(signal.SIGTERM)
    finish(first)
