"""What processes tell each other, with threads in place of processes."""

import json
import os
import queue
import signal
import socket
import threading
import time

import pytest
from commands import free_port

from dmd_jax import agreement, processes
from dmd_jax.agreement import check_shared, compare, difference
from dmd_jax.cli import Parser
from dmd_jax.errors import UserError
from dmd_jax.peers import LOST
from dmd_jax.roll_call import call_roll
from dmd_jax.stopping import stop_requests

HOST = socket.gethostname()


def each(count, action):
    """action(0), …, action(count - 1) at once; what they return, or the UserErrors' texts."""
    results = [None] * count

    def run(index):
        try:
            results[index] = action(index)
        except UserError as error:
            results[index] = str(error)

    threads = [threading.Thread(target=run, args=(index,)) for index in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
        assert not thread.is_alive()
    return results


class Company:
    """Connected peers, and what each heard of others' ends."""

    def __init__(self, count):
        address = f"127.0.0.1:{free_port()}"
        self.heard = [[] for _ in range(count)]
        self.all = each(
            count,
            lambda index: call_roll(
                address, index, count, timeout=10, on_end=lambda *end: self.heard[index].append(end)
            ),
        )

    def wait_until_heard(self, index):
        deadline = time.monotonic() + 10
        while not self.heard[index]:
            assert time.monotonic() < deadline
            time.sleep(0.01)
        return self.heard[index][0]


def hang_up(peers):
    for channel in peers._channels.values():
        channel.close()


def test_all_get_the_judgement_of_all_values():
    company = Company(4)
    for _ in range(3):
        results = each(4, lambda index: company.all[index].settle({"n": index}, list))
        assert results == [[{"n": 0}, {"n": 1}, {"n": 2}, {"n": 3}]] * 4
    threading.Thread(target=company.all[1].settle, args=(1, list), daemon=True).start()
    with pytest.raises(UserError, match=r"process 2 \(.*\), process 3 \(.*\) did not answer"):
        company.all[0].settle(0, list, timeout=0.5)


def test_all_stop_at_the_first_step_that_none_has_passed():
    company = Company(3)
    asked = threading.Event()

    def run(index):
        peers, step = company.all[index], 10
        peers.reached(step)
        while True:
            if index == 2 and step == 12:
                peers.stop()
                peers.stop()  # as another process may
                asked.set()
            if index == 1 and step == 14:
                asked.wait(10)
            step += 1
            time.sleep(0.002 * index)
            if peers.reached(step):
                return step

    steps = each(3, run)
    assert len(set(steps)) == 1
    assert steps[0] > 12


def test_a_signal_asks_all_and_a_second_one_ends_the_run(monkeypatch):
    company, ends = Company(2), queue.Queue()
    monkeypatch.setattr(processes, "peers", lambda: company.all[0])
    monkeypatch.setattr(processes, "end", lambda *end: ends.put(end))
    other = company.all[1]
    other.reached(7)
    handlers = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)
    with stop_requests(7) as requested:
        assert requested(8) == 0
        os.kill(os.getpid(), signal.SIGINT)
        step = 8
        while not other.reached(step):
            step += 1
            time.sleep(0.01)
        assert step >= 9
        assert [requested(earlier) for earlier in range(9, step)] == [0] * (step - 9)
        assert requested(step) == signal.SIGINT
        assert ends.empty()
        os.kill(os.getpid(), signal.SIGTERM)
        assert ends.get(timeout=10)[:2] == ("by a second signal that asked it to stop", 143)
    assert handlers == (signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT))


def test_who_ends_before_the_run_does_is_heard_of_by_all():
    company = Company(3)
    company.all[2].ended("config.steps is no good", 2)
    line = f"process 2 ({HOST}) ended: config.steps is no good"
    assert company.wait_until_heard(0) == (line, 2, True)
    assert company.wait_until_heard(1) == (line, 2, True)
    company = Company(3)
    hang_up(company.all[1])  # as the kernel does for a process that is killed
    line = f"process 1 ({HOST}) is gone; its own output may tell why"
    assert company.wait_until_heard(0) == (line, LOST, False)
    assert company.wait_until_heard(2) == (line, LOST, True)
    company = Company(2)
    company.all[1].leave()
    company.all[0].leave()
    for peers in company.all:
        hang_up(peers)
        peers.wait_until_gone(10)
    assert company.heard == [[], []]


def test_the_roll_call_names_who_is_missing_and_who_came_twice():
    address = f"127.0.0.1:{free_port()}"

    def call(index, process, count=4):
        return call_roll(address, process, count, timeout=1.5, on_end=None)

    texts = each(3, lambda index: call(index, (0, 1, 3)[index]))
    expected = f"--coordinator {address}: 3 of 4 processes came within 1.5 s; missing: 2"
    assert texts == [expected] * 3
    texts = each(3, lambda index: call(index, (0, 1, 1)[index]))
    twice = f"{HOST} came as process 1 of 4; {HOST} is that one already"
    assert texts[0] == f"--coordinator {address}: {twice}"
    texts = each(2, lambda index: call(index, index, count=2 + index))
    assert "was started with --processes 3 and process 0" in texts[0] == texts[1]


def test_strangers_are_not_counted():
    address = f"127.0.0.1:{free_port()}"
    port = int(address.split(":")[1])

    def action(index):
        if index < 2:
            return call_roll(address, index, 2, timeout=10, on_end=None)
        while True:
            try:
                with socket.create_connection(("127.0.0.1", port)) as stranger:
                    stranger.sendall(
                        (b"GET / HTTP/1.1\r\n\r\n", json.dumps([1]).encode())[index - 2]
                    )
                    return None
            except OSError:
                time.sleep(0.01)

    # The strangers come first.
    results = [None] * 4
    first = threading.Thread(target=lambda: results.__setitem__(0, action(0)))
    first.start()
    each(2, lambda index: action(index + 2))
    assert action(1).hosts == [HOST, HOST]
    first.join(10)
    assert results[0].hosts == [HOST, HOST]


def test_a_port_that_another_program_has_is_refused():
    with socket.create_server(("", 0)) as server:
        address = f"127.0.0.1:{server.getsockname()[1]}"
        with pytest.raises(UserError, match="process 0 cannot listen at port"):
            call_roll(address, 0, 2, timeout=1, on_end=None)

        def answer():
            connection, _ = server.accept()
            connection.recv(100)
            connection.sendall(b"HTTP/1.1 400 Bad Request\r\n\r\n")

        threading.Thread(target=answer, daemon=True).start()
        with pytest.raises(UserError, match="not as a process 0 that waits for it"):
            call_roll(address, 1, 2, timeout=1, on_end=None)


def test_processes_of_other_code_or_config_are_named(monkeypatch):
    company = Company(3)

    def prepare(index):
        return "config", {"command": "train", "config.seed": 0}

    results = each(3, lambda index: compare(company.all[index], lambda: prepare(index), 10))
    assert results == ["config"] * 3
    codes = iter("aab")
    monkeypatch.setattr(agreement, "code_sha256", lambda: next(codes))
    texts = each(3, lambda index: compare(company.all[index], lambda: prepare(index), 10))
    assert len(set(texts)) == 1
    assert texts[0].startswith("the processes are not of one run: in process ")
    assert "code is 'b' and 'a'" in texts[0] or "code is 'a' and 'b'" in texts[0]
    flags = iter(({"XLA_FLAGS": "--a=1"}, {"XLA_FLAGS": ""}, {"XLA_FLAGS": "--a=1"}))
    monkeypatch.setattr(agreement, "code_sha256", lambda: "a")
    monkeypatch.setattr(agreement, "rounding_flags", lambda: next(flags))
    texts = each(3, lambda index: compare(company.all[index], lambda: prepare(index), 10))
    assert len(set(texts)) == 1 and "XLA_FLAGS is " in texts[0] and "'--a=1'" in texts[0]
    facts = [{"jax": "1", "config.a": 1}, {"jax": "2"}, {"jax": "1", "config.a": 1}]
    assert difference(facts, "p{}".format) == (
        "the processes are not of one run: in p1 config.a is None and 1 in p0, jax is '2' and '1' "
        "in p0; expected the same command, config, code and flags in each"
    )
    assert difference(facts[::2], "p{}".format) is None


def test_a_refusal_in_one_process_ends_all():
    company = Company(2)

    def prepare(index):
        if index == 1:
            raise UserError("--config x.py: no such file")
        return None, {}

    texts = each(2, lambda index: compare(company.all[index], lambda: prepare(index), 10))
    assert texts == [f"process 1 ({HOST}): --config x.py: no such file"] * 2


def test_the_code_is_known_by_every_file(tmp_path, monkeypatch):
    (tmp_path / "inner").mkdir()
    monkeypatch.setattr(agreement, "__file__", str(tmp_path / "agreement.py"))
    (tmp_path / "a.py").write_text("1")
    (tmp_path / "inner" / "b.py").write_text("2")
    first = agreement.code_sha256()
    assert agreement.code_sha256() == first
    (tmp_path / "inner" / "b.py").write_text("3")
    second = agreement.code_sha256()
    (tmp_path / "inner" / "b.py").rename(tmp_path / "inner" / "c.py")
    assert len({first, second, agreement.code_sha256()}) == 3


def test_a_workdir_that_is_not_shared_is_refused_and_left_as_it_was(tmp_path, monkeypatch):
    monkeypatch.setattr(agreement, "_SHARED_SECONDS", 0.5)
    company = Company(2)

    def check(*folders):
        return each(2, lambda index: check_shared(company.all[index], folders[index], 10))

    shared = tmp_path / "run"
    assert check(shared, shared) == [None, None]
    assert list(shared.iterdir()) == []
    taken = tmp_path / "file"
    taken.write_text("")
    texts = check(tmp_path / "other", taken)
    for text in texts:
        assert f"cannot be used by process 1 ({HOST}): [Errno 17]" in text
    assert not (tmp_path / "other").exists()
    texts = check(tmp_path / "here", tmp_path / "there")
    for text in texts:
        assert f"cannot be used by process 1 ({HOST}): what process 0 writes there is not" in text
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "run"]


def test_slurm_tells_who_is_who(monkeypatch, capsys):
    parser = Parser()
    processes.add_process_arguments(parser)
    args = parser.parse_args(["--coordinator", "auto"])
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    monkeypatch.setenv("SLURM_STEP_NODELIST", "node[12-14]")
    monkeypatch.setenv("SLURM_NTASKS", "3")
    monkeypatch.setenv("SLURM_PROCID", "1")
    monkeypatch.setenv("SLURM_LOCALID", "0")
    monkeypatch.setenv("JAX_COORDINATOR_PORT", "1234")
    found = processes._cluster(args)
    assert found == ("node12:1234", 1, 3, [0])
    assert capsys.readouterr().err == ""
    monkeypatch.setenv("SLURM_NTASKS", "1")
    monkeypatch.setenv("SLURM_PROCID", "0")
    assert processes.join_processes(args, lambda: ("alone", {})) == "alone"
    assert "the cluster has this process alone" in capsys.readouterr().err
