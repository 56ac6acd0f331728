"""Processes make sure that they are alike, with threads in place of processes."""

import socket

from company import Company, each

from dmd_jax.commands.arguments import add_process_arguments
from dmd_jax.commands.cli import Parser
from dmd_jax.errors import UserError
from dmd_jax.parallel import processes, same_run
from dmd_jax.parallel.cluster import find_cluster
from dmd_jax.parallel.same_run import check_shared, compare, difference

HOST = socket.gethostname()


def test_processes_of_other_code_or_config_are_named(monkeypatch):
    company = Company(3)

    def prepare(index):
        return "config", {"command": "train", "config.seed": 0}

    results = each(3, lambda index: compare(company.all[index], lambda: prepare(index), 10))
    assert results == ["config"] * 3
    codes = iter("aab")
    monkeypatch.setattr(same_run, "code_sha256", lambda: next(codes))
    texts = each(3, lambda index: compare(company.all[index], lambda: prepare(index), 10))
    assert len(set(texts)) == 1
    assert texts[0].startswith("the processes are not of one run: in process ")
    assert "code is 'b' and 'a'" in texts[0] or "code is 'a' and 'b'" in texts[0]
    flags = iter(({"XLA_FLAGS": "--a=1"}, {"XLA_FLAGS": ""}, {"XLA_FLAGS": "--a=1"}))
    monkeypatch.setattr(same_run, "code_sha256", lambda: "a")
    monkeypatch.setattr(same_run, "rounding_flags", lambda: next(flags))
    texts = each(3, lambda index: compare(company.all[index], lambda: prepare(index), 10))
    assert len(set(texts)) == 1 and "XLA_FLAGS is " in texts[0] and "'--a=1'" in texts[0]
    first = {"jax": "1", "config.a": [1, None]}
    differing = "config.a is None and [1, None] in p0, jax is '2' and '1' in p0"
    assert difference({"jax": "2"}, first, "p0") == differing
    assert difference({"jax": "1", "config.a": (1, None)}, first, "p0") == ""


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
    monkeypatch.setattr(same_run, "__file__", str(tmp_path / "parallel" / "same_run.py"))
    (tmp_path / "a.py").write_text("1")
    (tmp_path / "inner" / "b.py").write_text("2")
    first = same_run.code_sha256()
    assert same_run.code_sha256() == first
    (tmp_path / "inner" / "b.py").write_text("3")
    second = same_run.code_sha256()
    (tmp_path / "inner" / "b.py").rename(tmp_path / "inner" / "c.py")
    assert len({first, second, same_run.code_sha256()}) == 3


def test_a_workdir_that_is_not_shared_is_refused_and_left_as_it_was(tmp_path, monkeypatch):
    monkeypatch.setattr(same_run, "_SHARED_SECONDS", 0.5)
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
    add_process_arguments(parser)
    args = parser.parse_args(["--coordinator", "auto"])
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    monkeypatch.setenv("SLURM_STEP_NODELIST", "node[12-14]")
    monkeypatch.setenv("SLURM_NTASKS", "3")
    monkeypatch.setenv("SLURM_PROCID", "1")
    monkeypatch.setenv("SLURM_LOCALID", "0")
    monkeypatch.setenv("JAX_COORDINATOR_PORT", "1234")
    found = find_cluster(args)
    assert found == ("node12:1234", 1, 3, [0])
    assert capsys.readouterr().err == ""
    monkeypatch.setenv("SLURM_NTASKS", "1")
    monkeypatch.setenv("SLURM_PROCID", "0")
    assert processes.join_processes(args, lambda: ("alone", {})) == "alone"
    assert "the cluster has this process alone" in capsys.readouterr().err
