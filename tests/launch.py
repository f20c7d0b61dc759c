"""Starts the program in separate processes: one rank or several, forked or by torchrun.

A server that has imported torch forks the ranks, so that a rank starts in milliseconds.
"""

import json
import multiprocessing
import os
import signal
import socket
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable
from multiprocessing.process import BaseProcess
from pathlib import Path

import torch
from conftest import ROOT

KEPT = {name: os.environ[name] for name in ("PATH", "HOME") if name in os.environ}
KEPT |= {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE", "GOMP_SPINCOUNT": "1000"}
PROGRAM = ROOT / "train_gpt.py"
MAIN = '\nif __name__ == "__main__":\n'
# Runs train_gpt.py as the main program, after some lines that may change it.
DRIVER = """
import os, signal, sys, textwrap, time
from pathlib import Path
sys.path.insert(0, {root!r})
import torch
import train_gpt as tg
RANK = int(os.environ.get("RANK", 0))
{first}
ending = Path(tg.__file__).read_text(encoding="utf-8").rpartition({main!r})[2]
exec(textwrap.dedent(ending), vars(tg))
"""

SERVER = multiprocessing.get_context("forkserver")
SERVER.set_forkserver_preload(["torch", "safetensors.torch", "zstandard"])


def driver(folder: Path, first: str) -> Path:
    """Writes a file that runs the lines `first`, then the program, which is the module `tg`."""
    path = folder / "driver.py"
    text = DRIVER.format(root=str(ROOT), first=textwrap.dedent(first), main=MAIN)
    path.write_text(text, encoding="utf-8")
    return path


def free_port() -> int:
    """Returns a port of this machine that is not in use."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


def be_rank(code: str, argv: list[str], cwd: str, env: dict[str, str], out: str) -> None:
    """Runs the program in a forked process, with these arguments and this environment."""
    os.chdir(cwd)
    os.environ.clear()
    os.environ.update(env)
    screen = os.open(out, os.O_CREAT | os.O_APPEND | os.O_WRONLY)
    os.dup2(screen, 1)
    os.dup2(screen, 2)
    if "WORLD_SIZE" in env:
        torch.set_num_threads(1)
    sys.argv = ["train_gpt.py", *argv]
    signal.signal(signal.SIGINT, signal.default_int_handler)
    exec(compile(code, "driver.py", "exec"), {"__name__": "__main__"})


class Ranks:
    """The forked ranks of one run."""

    def __init__(self, cwd: Path, *argv: str, world: int = 1, first: str = "", **env: object):
        self.out = cwd / f"screen{len(list(cwd.glob('screen*')))}"
        self.out.touch()
        code = DRIVER.format(root=str(ROOT), first=textwrap.dedent(first), main=MAIN)
        shared = {**KEPT, **{name: str(value) for name, value in env.items()}}
        if world > 1:
            shared |= {"WORLD_SIZE": str(world), "MASTER_ADDR": "127.0.0.1"}
            shared |= {"MASTER_PORT": str(free_port())}
        self.ranks: list[BaseProcess] = []
        for rank in range(world):
            own = {"RANK": str(rank), "LOCAL_RANK": str(rank)} if world > 1 else {}
            job = (code, list(argv), str(cwd), {**shared, **own}, str(self.out))
            self.ranks.append(SERVER.Process(target=be_rank, args=job))
            self.ranks[-1].start()

    def said(self) -> str:
        """Returns everything that the ranks have printed."""
        return self.out.read_text(encoding="utf-8", errors="replace")

    def until(self, text: str, seconds: float = 60.0) -> None:
        """Waits until the ranks have printed a text."""
        await_(lambda: text in self.said(), seconds, self.said)

    def end(self, seconds: float = 60.0) -> list[int]:
        """Returns the exit statuses. Kills ranks that take longer and raises AssertionError."""
        ends = time.monotonic() + seconds
        for rank in self.ranks:
            rank.join(max(ends - time.monotonic(), 0))
        late = [rank for rank in self.ranks if rank.is_alive()]
        for rank in late:
            rank.kill()
        assert not late, f"{len(late)} ranks do not end:\n{self.said()}"
        return [rank.exitcode for rank in self.ranks]


def await_(true: Callable[[], object], seconds: float, said: Callable[[], str]) -> None:
    """Waits until true() holds. Raises AssertionError if that takes longer."""
    ends = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < ends, said()
        time.sleep(0.02)


def start(cwd: Path, *command: object, **env: object) -> subprocess.Popen:
    """Starts Python in its own session; its output goes to cwd/screen.txt."""
    with (cwd / "screen.txt").open("ab") as screen:
        return subprocess.Popen(
            [sys.executable, *map(str, command)],
            cwd=cwd,
            env={**KEPT, **{name: str(value) for name, value in env.items()}},
            stdout=screen,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )


def torchrun(cwd: Path, script: Path, *how: str, **env: object) -> subprocess.Popen:
    """Starts a script by torchrun."""
    return start(cwd, "-m", "torch.distributed.run", *(how or ("--standalone",)), script, **env)


def ranks_of(agent: subprocess.Popen) -> dict[int, int]:
    """Returns the process ids of torchrun's ranks, by rank."""
    found = {}
    for path in Path("/proc").glob("[0-9]*"):
        try:
            parent = int((path / "stat").read_text().rpartition(")")[2].split()[1])
            if parent == agent.pid:
                env = dict(v.split("=", 1) for v in (path / "environ").read_text().split("\0") if v)
                found[int(env["RANK"])] = int(path.name)
        except (OSError, KeyError, ValueError, IndexError):
            continue
    return found


def alive(pid: int) -> bool:
    """Returns whether a process runs and is not a zombie."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def result_of(folder: Path) -> dict:
    """Returns the content of a run's result.json."""
    return json.loads((folder / "result.json").read_text(encoding="utf-8"))
