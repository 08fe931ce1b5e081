"""Two machines, here two network namespaces, train as one: stopped on one of them, and gone on with."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

pytestmark = [pytest.mark.dist, pytest.mark.slow, pytest.mark.timeout(900)]

ROOT = Path(__file__).resolve().parents[2]
SMALL = [
    "configs/tiny.yaml",
    "tokenizer.max_documents=300",
    "pretrain.max_documents=300",
    "pretrain.steps=12",
    "pretrain.checkpoint_every_steps=100",
    "pretrain.eval_every_steps=4",
    "launch.processes=2",
    "launch.threads=1",
]
ADDRESSES = ("10.231.77.1", "10.231.77.2")


def ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True, capture_output=True, text=True)


@pytest.fixture
def nodes() -> Iterator[list[str]]:
    """Two namespaces that see nothing but themselves and each other."""
    if os.geteuid() != 0 or shutil.which("ip") is None:
        pytest.skip("two nodes need root and iproute2 here, to make network namespaces")
    names = [f"prefline{os.getpid()}{letter}" for letter in "ab"]
    try:
        for name in names:
            ip("netns", "add", name)
    except subprocess.CalledProcessError as error:
        pytest.skip(f"this machine permits no network namespaces: {error.stderr.strip()}")
    try:
        # one command puts both ends where they belong: nothing is left outside if it fails
        ends = ("peer", "name", "pair", "netns", names[1])
        ip("link", "add", "pair", "netns", names[0], "type", "veth", *ends)
        for name, address in zip(names, ADDRESSES, strict=True):
            ip("-n", name, "addr", "add", f"{address}/24", "dev", "pair")
            for device in ("pair", "lo"):
                ip("-n", name, "link", "set", device, "up")
        yield names
    finally:
        for name in names:
            subprocess.run(["ip", "netns", "del", name], check=False, capture_output=True)


def start(node: str, rank: int, folder: Path, log: Path, *settings: str) -> subprocess.Popen[bytes]:
    """`prefline run` on one node; what it prints goes into `log`."""
    place = [f"launch.machine_rank={rank}", f"launch.main_address={ADDRESSES[0]}"]
    command = [sys.executable, "-m", "pipeline", "run", *SMALL, "--until", "pretrain"]
    with log.open("wb") as file:
        return subprocess.Popen(
            ["ip", "netns", "exec", node, *command, f"run.dir={folder}", *place, *settings],
            cwd=ROOT,
            env={**os.environ, "GLOO_SOCKET_IFNAME": "pair"},
            stdout=file,
            stderr=subprocess.STDOUT,
        )


def finish(children: list[subprocess.Popen[bytes]], logs: list[Path]) -> list[int]:
    try:
        return [child.wait(timeout=300) for child in children]
    except subprocess.TimeoutExpired:
        raise AssertionError("\n".join(log.read_text() for log in logs)) from None
    finally:
        for child in children:
            child.kill()


def manifest(folder: Path) -> dict[str, object]:
    fingerprint = (folder / "pretrain" / "latest").read_text().strip()
    found: dict[str, object] = json.loads(
        (folder / "pretrain" / fingerprint / "manifest.json").read_text()
    )
    return found


def test_two_nodes_give_what_one_gives(nodes: list[str], tmp_path: Path) -> None:
    alone = tmp_path / "alone"
    command = [sys.executable, "-m", "pipeline", "run", *SMALL, "--until", "pretrain"]
    answer = subprocess.run(
        [*command, f"run.dir={alone}"], cwd=ROOT, capture_output=True, text=True
    )
    assert answer.returncode == 0, answer.stderr

    folder, logs = tmp_path / "together", [tmp_path / f"node{rank}.log" for rank in (0, 1)]
    # the second is there first: it waits
    children = [
        start(nodes[rank], rank, folder, logs[rank], "launch.machines=2") for rank in (1, 0)
    ][::-1]
    rows = []
    while len(rows) < 3:
        assert all(child.poll() is None for child in children), "\n".join(
            log.read_text() for log in logs
        )
        rows = [row for file in folder.glob("pretrain/*/metrics.jsonl") for row in file.open()]
        time.sleep(0.02)
    # the machine that does not lead is taken away
    children[1].send_signal(signal.SIGUSR1)
    assert finish(children, logs) == [75, 75], "\n".join(log.read_text() for log in logs)

    # and now through accelerate
    children = [
        start(nodes[rank], rank, folder, logs[rank], "launch.profile=two_nodes") for rank in (0, 1)
    ]
    assert finish(children, logs) == [0, 0], "\n".join(log.read_text() for log in logs)
    one, two = manifest(alone), manifest(folder)
    assert (one["world_size"], two["world_size"]) == (2, 2)
    assert two["resumed_from"]
    assert one["digest"] == two["digest"]
