"""Who comes to a run and how each one ends, with threads in place of processes."""

import os
import queue
import signal
import socket
import threading
import time

import pytest
from commands import free_port
from company import Company, each
from strangers import STRANGERS, greeting, visit

from dmd_jax.errors import UserError
from dmd_jax.parallel import lifeline, processes
from dmd_jax.parallel.lifeline import LOST, Lifeline
from dmd_jax.parallel.stopping import stop_requests

HOST = socket.gethostname()


def call(address, index, count, timeout=10):
    return Lifeline(address, index, count, timeout=timeout, on_end=None)


def hang_up(line):
    """Ends the connections, as the kernel does for a process that is killed."""
    for connection in list(line._sockets.values()):
        connection.shutdown(socket.SHUT_RDWR)


def test_all_get_the_judgement_of_all_values():
    company = Company(4)
    for _ in range(3):
        results = each(4, lambda index: company.all[index].settle({"n": index}, list))
        assert results == [[{"n": 0}, {"n": 1}, {"n": 2}, {"n": 3}]] * 4
    # What all have read is not kept.
    assert {key.split("/")[1] for key in company.store.values} == {"2"}
    threading.Thread(target=company.all[1].settle, args=(1, list), daemon=True).start()
    with pytest.raises(UserError, match=r"process 2 \(.*\), process 3 \(.*\) did not answer"):
        company.all[0].settle(0, list, timeout=0.5)


def test_a_signal_asks_all_and_a_second_one_ends_the_run(monkeypatch):
    company, ends, others = Company(2), queue.Queue(), queue.Queue()
    monkeypatch.setattr(processes, "processes", lambda: company.all[0])
    monkeypatch.setattr(processes, "end", lambda *end: ends.put(end))
    handlers = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)
    other = company.all[1]

    def second():  # which passed step 12 when it heard of it
        while not other.shared("stop/asked"):
            time.sleep(0.01)
        other.share("stop/position", 12)
        others.put("told")

    monkeypatch.setattr("dmd_jax.parallel.stopping._meetings", iter([""]))
    threading.Thread(target=second, daemon=True).start()
    with stop_requests(7) as requested:
        assert requested(8) == 0
        os.kill(os.getpid(), signal.SIGINT)
        assert others.get(timeout=10) == "told"
        deadline = time.monotonic() + 10
        while "dmd_jax/stop/position/0" not in company.store.values:
            assert time.monotonic() < deadline
        # The first step that none has passed.
        assert [requested(step) for step in range(9, 14)] == [0] * 4 + [signal.SIGINT]
        assert ends.empty()
        os.kill(os.getpid(), signal.SIGTERM)
        assert ends.get(timeout=10)[:2] == ("by a second signal that asked it to stop", 143)
    assert handlers == (signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT))


def test_who_has_done_its_last_step_keeps_no_one_waiting(monkeypatch):
    company = Company(2)
    monkeypatch.setattr(processes, "processes", lambda: company.all[0])
    monkeypatch.setattr("dmd_jax.parallel.stopping._meetings", iter([""]))
    with stop_requests(7) as requested:
        assert requested(9) == 0
    assert company.all[1].shared("stop/position") == {0: 9}


def test_who_ends_before_the_run_does_is_heard_of_by_all():
    company = Company(3)
    name = company.lifelines[2].name(2)
    company.lifelines[2].tell(f"{name} ended: config.steps is no good", 2)
    line = f"process 2 ({HOST}) ended: config.steps is no good"
    assert company.wait_until_heard(0) == (line, 2, True)
    assert company.wait_until_heard(1) == (line, 2, True)
    company = Company(3)
    hang_up(company.lifelines[1])
    line = f"process 1 ({HOST}) is gone; its own output may tell why"
    assert company.wait_until_heard(0) == (line, LOST, False)
    assert company.wait_until_heard(2) == (line, LOST, True)
    company = Company(2)
    assert [line.part() for line in company.lifelines] == [True, True]
    for line in company.lifelines:
        hang_up(line)
        line.wait_until_gone(10)
        assert not line._sockets
    assert company.heard == [[], []]


def test_no_word_of_another_ends_a_run_as_if_it_were_done():
    for word in (["done", 0], ["done", -1], [None, 3], ["done"], 5, {"line": "x"}):
        company = Company(2)
        lifeline._send(company.lifelines[1]._sockets[0], word)
        line = f"process 1 ({HOST}) is gone; its own output may tell why"
        assert company.wait_until_heard(0) == (line, LOST, False)


def test_the_roll_call_names_who_is_missing_and_who_came_twice():
    address = f"127.0.0.1:{free_port()}"
    texts = each(3, lambda index: call(address, (0, 1, 3)[index], 4, timeout=1.5))
    expected = f"--coordinator {address}: 3 of 4 processes came within 1.5 s; missing: 2"
    assert texts == [expected] * 3
    texts = each(3, lambda index: call(address, (0, 1, 1)[index], 4, timeout=1.5))
    twice = f"{HOST} came as process 1 of 4; {HOST} is that one already"
    assert texts[0] == f"--coordinator {address}: {twice}"
    texts = each(2, lambda index: call(address, index, 2 + index, timeout=1.5))
    assert "was started with --processes 3 and process 0" in texts[0] == texts[1]


@pytest.mark.parametrize(
    ("host", "bind", "expected"),
    [
        ("127.0.0.1", None, [True, False]),
        ("localhost", None, [True, False]),
        ("127.0.0.1", "127.0.0.2", [False, True]),
    ],
)
def test_process_0_listens_at_its_address_alone(monkeypatch, host, bind, expected):
    port, texts = free_port(), []
    if bind:
        monkeypatch.setenv("JAX_COORDINATOR_BIND_ADDRESS", f"{bind}:{port}")
    zero = threading.Thread(
        target=lambda: texts.extend(each(1, lambda _: call(f"{host}:{port}", 0, 2, timeout=1.5)))
    )
    zero.start()
    found, deadline = [], time.monotonic() + 1
    while not any(found) and time.monotonic() < deadline:
        found = []
        for own in ("127.0.0.1", "127.0.0.2"):
            with socket.socket() as probe:
                found.append(probe.connect_ex((own, port)) == 0)
    zero.join()
    assert found == expected
    # A name may be another address on its own machine than for the others.
    at = "; process 0 listened at 127.0.0.1" if host == "localhost" else ""
    assert texts[0].endswith(f"missing: 1{at}")


def test_strangers_end_no_run_and_are_told_nothing(monkeypatch, capfd):
    monkeypatch.setenv("DMD_JAX_TOKEN", "of this run")
    address = f"127.0.0.1:{free_port()}"
    port = int(address.split(":")[1])
    results = [None]
    first = threading.Thread(target=lambda: results.__setitem__(0, call(address, 0, 2, 60)))
    first.start()
    heard = each(len(STRANGERS), lambda index: visit(port, list(STRANGERS.values())[index]))
    assert len(heard) >= 20
    for name, answer in zip(STRANGERS, heard):
        # A challenge at most, which is random.
        assert len(answer) in (0, 67), (name, answer)
    assert first.is_alive()
    assert call(address, 1, 2).hosts == [HOST, HOST]
    first.join(10)
    assert results[0].hosts == [HOST, HOST]
    # Nor does a stranger do anything later whose greeting was never finished.
    time.sleep(0.5)
    assert not results[0]._over
    assert capfd.readouterr() == ("", "")


def test_a_process_that_dies_before_all_have_come_may_come_again(monkeypatch):
    monkeypatch.setenv("DMD_JAX_TOKEN", "of this run")
    address, gone = f"127.0.0.1:{free_port()}", threading.Event()

    def come_and_go(process):
        greeting("of this run", count=3)(process)
        process.shutdown(socket.SHUT_WR)
        process.settimeout(10)
        assert process.recv(1) == b""  # process 0 has seen it go
        gone.set()

    def action(index):
        if index == 1:
            visit(int(address.split(":")[1]), come_and_go)
        if index == 2:
            assert gone.wait(20)
        return call(address, index, 3, timeout=20).hosts

    assert each(3, action) == [[HOST] * 3] * 3


def test_whoever_has_another_token_is_told_so(monkeypatch):
    address = f"127.0.0.1:{free_port()}"
    monkeypatch.setenv("DMD_JAX_TOKEN", "of this run")
    proof = lifeline._proof
    own = threading.local()
    monkeypatch.setattr(lifeline, "_proof", lambda *what: getattr(own, "salt", "") + proof(*what))

    def action(index):
        own.salt = "other" if index else ""
        return call(address, index, 2, timeout=1.5)

    texts = each(2, action)
    assert "missing: 1" in texts[0]
    assert "the same DMD_JAX_TOKEN in all" in texts[1]


def test_a_port_that_another_program_has_is_refused():
    with socket.create_server(("", 0)) as server:
        address = f"127.0.0.1:{server.getsockname()[1]}"
        with pytest.raises(UserError, match="process 0 cannot listen at port"):
            call(address, 0, 2, timeout=1)

        def answer():
            connection, _ = server.accept()
            connection.sendall(b"HTTP/1.1 400 Bad Request\r\n\r\n")

        threading.Thread(target=answer, daemon=True).start()
        with pytest.raises(UserError, match="not as a process 0 that waits for it"):
            call(address, 1, 2, timeout=1)
