"""A stand-in for `gcloud compute tpus` on one machine: workers are folders, ssh is bash.

It keeps its TPUs in the folder $STAND_IN_GCLOUD, takes only the flags that the real one has, and
gives the real one's answers where tpu_train.sh reads them:
  calls.jsonl           the words of every call
  nodes/NAME/           a TPU: node.json, and workers/I, the home folder of worker I
  queue/NAME.json       a queued resource and the states that it has yet to go through
  faults/VERB           lines of errors that the next calls of this verb fail with, "-" for none
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

WORKERS = 2
FLAGS = {
    "describe": ("--format",),
    "create": ("--accelerator-type", "--version", "--labels", "--network"),
    "delete": (),
    "ssh": ("--worker", "--command", "--ssh-flag"),
    "scp": ("--worker",),
}
SWITCHES = {
    "describe": (),
    "create": ("--spot", "--preemptible", "--internal-ips"),
    "delete": (),
    "ssh": ("--internal-ip",),
    "scp": ("--internal-ip",),
}
QUEUE_FLAGS = ("--accelerator-type", "--runtime-version", "--node-id", "--node-count")


class Cloud:
    """The TPUs of a folder; tests look into it and disturb it."""

    def __init__(self, folder: Path):
        self.folder = Path(folder)

    def install(self, bin_folder: Path) -> None:
        """Puts a `gcloud` for this folder into a folder of the PATH."""
        script = bin_folder / "gcloud"
        script.write_text(
            f"#!/bin/sh\nSTAND_IN_GCLOUD='{self.folder}' exec '{sys.executable}' -S"
            f" '{__file__}' \"$@\"\n"
        )
        script.chmod(0o755)

    def calls(self) -> list[list[str]]:
        path = self.folder / "calls.jsonl"
        return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []

    def fault(self, verb: str, *lines: str) -> None:
        path = self.folder / "faults" / verb
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("".join(line + "\n" for line in lines))

    def names(self) -> list[str]:
        return sorted(path.name for path in (self.folder / "nodes").glob("*"))

    def node(self, name: str) -> dict:
        return json.loads((self.folder / "nodes" / name / "node.json").read_text())

    def home(self, name: str, worker: int) -> Path:
        return self.folder / "nodes" / name / "workers" / str(worker)

    def add(self, name: str, kind: str, labels: dict[str, str], workers: int = WORKERS) -> None:
        for worker in range(workers):
            self.home(name, worker).mkdir(parents=True)
        endpoints = [{"ipAddress": "127.0.0.1"}] * workers
        self._write(
            name,
            {
                "state": "READY",
                "acceleratorType": kind,
                "networkEndpoints": endpoints,
                "labels": labels,
            },
        )

    def kill(self, name: str, worker: int) -> None:
        """Ends what tpu_train.sh runs on a worker, as its death would; an OSError if nothing is."""
        run = self.home(name, worker) / "dmd_jax" / "run"
        os.killpg(int((run / "pid").read_text()), signal.SIGKILL)

    def preempt(self, name: str) -> None:
        self._write(name, self.node(name) | {"state": "PREEMPTED"})
        for worker in range(len(self.node(name)["networkEndpoints"])):
            with contextlib.suppress(OSError):  # nothing runs there
                self.kill(name, worker)

    def remove(self, name: str) -> None:
        self.preempt(name)
        time.sleep(0.1)
        shutil.rmtree(self.folder / "nodes" / name)

    def _write(self, name: str, node: dict) -> None:
        (self.folder / "nodes" / name / "node.json").write_text(json.dumps(node))


def main(argv: list[str]) -> int:
    cloud = Cloud(Path(os.environ["STAND_IN_GCLOUD"]))
    cloud.folder.mkdir(parents=True, exist_ok=True)
    with (cloud.folder / "calls.jsonl").open("a") as file:
        file.write(json.dumps(argv) + "\n")
    if argv[:2] != ["compute", "tpus"] or argv[2] not in ("tpu-vm", "queued-resources"):
        return _error(f"Invalid choice: {argv[:3]}", 2)
    queued, verb = argv[2] == "queued-resources", argv[3]
    parser = argparse.ArgumentParser(allow_abbrev=False)
    parser.add_argument("names", nargs="+")
    flags = FLAGS[verb]
    if queued and verb == "create":
        flags = (*QUEUE_FLAGS, "--node-prefix", "--labels", "--network")
    for flag in ("--zone", "--project", *flags):
        parser.add_argument(flag, action="append" if flag == "--ssh-flag" else "store")
    for switch in ("--quiet", *SWITCHES[verb], *(("--force",) if queued else ())):
        parser.add_argument(switch, action="store_true")
    args = parser.parse_args(argv[4:])
    if fault := _next_fault(cloud, verb):
        return _error(f"(gcloud.compute.tpus.{argv[2]}.{verb}) {fault}")
    act = {
        "describe": _describe_queued if queued else _describe,
        "create": _create_queued if queued else _create,
        "delete": _delete_queued if queued else _delete,
        "ssh": _ssh,
        "scp": _scp,
    }[verb]
    return act(cloud, args)


def _describe(cloud: Cloud, args) -> int:
    (name,) = args.names
    if name not in cloud.names():
        return _not_found("describe", name)
    return _show(cloud.node(name), args.format)


def _show(resource: dict, form: str) -> int:
    """The two kinds of format that are asked for: csv[no-heading](…) and value(…)."""
    keys = form[form.index("(") + 1 : -1].split(",")
    print(",".join(_look_up(resource, key) for key in keys))
    return 0


def _look_up(resource: dict, key: str) -> str:
    found = resource
    for part in key.split("."):
        if part == "len()":
            found = len(found)
        elif part.endswith("[0]"):
            found = (found.get(part[:-3]) or [{}])[0]
        else:
            found = found.get(part, {})
    return "" if found == {} else str(found)


def _create(cloud: Cloud, args) -> int:
    (name,) = args.names
    if name in cloud.names():
        return _error(f"(gcloud.compute.tpus.tpu-vm.create) ALREADY_EXISTS: {name}")
    cloud.add(name, args.accelerator_type, _labels(args))
    return 0


def _labels(args) -> dict[str, str]:
    return dict(pair.split("=") for pair in (args.labels or "").split(",") if pair)


def _delete(cloud: Cloud, args) -> int:
    (name,) = args.names
    if name not in cloud.names():
        return _not_found("delete", name)
    cloud.remove(name)
    return 0


def _create_queued(cloud: Cloud, args) -> int:
    (name,) = args.names
    nodes = [args.node_id]
    if args.node_count:
        nodes = [f"{args.node_prefix}-{index}" for index in range(int(args.node_count))]
    path = _queue(cloud, name)
    path.parent.mkdir(parents=True, exist_ok=True)
    states = ["WAITING_FOR_RESOURCES", "PROVISIONING", "ACTIVE"]
    entry = {"nodes": nodes, "kind": args.accelerator_type, "labels": _labels(args)}
    path.write_text(json.dumps(entry | {"states": states}))
    return 0


def _describe_queued(cloud: Cloud, args) -> int:
    path = _queue(cloud, args.names[0])
    if not path.exists():
        return _not_found("describe", args.names[0])
    entry = json.loads(path.read_text())
    if any(
        node in cloud.names() and cloud.node(node)["state"] != "READY" for node in entry["nodes"]
    ):
        entry["states"] = ["SUSPENDED"]
    state, *rest = entry["states"]
    if state == "ACTIVE":
        for node in entry["nodes"]:
            if node not in cloud.names():
                cloud.add(node, entry["kind"], entry["labels"])
    path.write_text(json.dumps(entry | {"states": rest or [state]}))
    message = {"failedData": {"error": {"message": "no such quota"}}} if state == "FAILED" else {}
    return _show({"state": {"state": state} | message}, args.format)


def _delete_queued(cloud: Cloud, args) -> int:
    path = _queue(cloud, args.names[0])
    if not path.exists():
        return _not_found("delete", args.names[0])
    for node in json.loads(path.read_text())["nodes"]:
        if node in cloud.names():
            cloud.remove(node)
    path.unlink()
    return 0


def _queue(cloud: Cloud, name: str) -> Path:
    return cloud.folder / "queue" / f"{name}.json"


def _ssh(cloud: Cloud, args) -> int:
    (name,) = args.names
    if name not in cloud.names():
        return _not_found("ssh", name)
    if cloud.node(name)["state"] != "READY":
        return _error("(gcloud.compute.tpus.tpu-vm.ssh) This TPU cannot be used anymore.")
    processes = []
    for worker in _workers(cloud, name, args.worker):
        env = {
            "PATH": os.environ["PATH"],
            "HOME": str(cloud.home(name, worker)),
            "HOSTNAME": f"{name}-w-{worker}",
        }
        processes.append(
            subprocess.Popen(["bash", "-c", args.command], cwd=env["HOME"], env=env, stdin=-3)
        )
    codes = [process.wait() for process in processes]
    return next((code for code in codes if code), 0)


def _scp(cloud: Cloud, args) -> int:
    *sources, destination = args.names
    name, _, path = destination.partition(":")
    for worker in _workers(cloud, name, args.worker):
        for source in sources:
            shutil.copyfile(source, cloud.home(name, worker) / path)
    return 0


def _workers(cloud: Cloud, name: str, which: str) -> list[int]:
    count = len(cloud.node(name)["networkEndpoints"])
    return list(range(count)) if which == "all" else [int(which)]


def _next_fault(cloud: Cloud, verb: str) -> str:
    path = cloud.folder / "faults" / verb
    if not path.exists():
        return ""
    first, *rest = path.read_text().splitlines() or ["-"]
    path.write_text("".join(line + "\n" for line in rest))
    return "" if first == "-" else first


def _not_found(verb: str, name: str) -> int:
    return _error(f"(gcloud.compute.tpus.{verb}) NOT_FOUND: Resource '{name}' was not found")


def _error(message: str, code: int = 1) -> int:
    print(f"ERROR: {message}", file=sys.stderr)
    return code


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
