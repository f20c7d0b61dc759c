"""Starts the program in processes of its own, forked or by torchrun, and injects failures.

A server that has imported torch forks the ranks, so that a rank starts in milliseconds.
"""

import itertools
import json
import multiprocessing
import operator
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from multiprocessing.process import BaseProcess
from pathlib import Path
from textwrap import dedent

import torch
from conftest import ROOT, TINY

import train_gpt as tg

# A smaller model than TINY, and steps of 4 sequences in 2 micro-batches; 2 ranks may share them.
QUICK = {**TINY, "NUM_LAYERS": "2", "TRAIN_BATCH_TOKENS": "256", "MICRO_BATCH_TOKENS": "128"}
QUICK |= {"EVAL_STRIDE": "0"}

KEPT = {name: os.environ[name] for name in ("PATH", "HOME") if name in os.environ}
KEPT |= {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE", "GOMP_SPINCOUNT": "1000"}
PROGRAM = ROOT / "train_gpt.py"

SERVER = multiprocessing.get_context("forkserver")
SERVER.set_forkserver_preload(["torch._dynamo", "pytest", "safetensors.torch", "zstandard"])


def before_call(name: str, action: Callable[..., object], patch: Callable = setattr) -> None:
    """Calls action(n, *arguments) before the n-th call of a function of the program.

    This is the one place where a test enters a running stage. `name` is a public function or
    method, such as "Trainer.take_step"; `patch` is monkeypatch.setattr where the test is in the
    same process.
    """
    path, _, last = name.rpartition(".")
    owner = operator.attrgetter(path)(tg) if path else tg
    function, numbers = getattr(owner, last), itertools.count(1)

    def called(*arguments: object, **named: object) -> object:
        action(next(numbers), *arguments)
        return function(*arguments, **named)

    patch(owner, last, called)


def rank() -> int:
    """Returns the rank of this process."""
    return int(os.environ.get("RANK", "0"))


FAILURE = ZeroDivisionError("a test raised this")


def fail_in(
    name: str,
    call: int = 1,
    on_rank: int = 0,
    error: Exception = FAILURE,
    patch: Callable = setattr,
) -> None:
    """Makes one call of a function of the program raise an error on one rank."""

    def fail(number: int, *_: object) -> None:
        if (number, rank()) == (call, on_rank):
            raise error

    before_call(name, fail, patch)


def signal_in(
    name: str,
    call: int = 1,
    on_rank: int = 0,
    number: int = signal.SIGTERM,
    patch: Callable = setattr,
) -> None:
    """Makes one rank send itself a signal in one call of a function of the program."""

    def send(at: int, *_: object) -> None:
        if (at, rank()) == (call, on_rank):
            os.kill(os.getpid(), number)
            time.sleep(0.1)

    before_call(name, send, patch)


def advance_clock(seconds: Callable[[int], float], patch: Callable = setattr) -> list[float]:
    """Replaces the monotonic clock: training step n takes seconds(n). Returns [now]."""
    now = [0.0]

    def advance(step: int, *_: object) -> None:
        now[0] += seconds(step)

    patch(time, "perf_counter", lambda: now[0])
    before_call("Trainer.take_step", advance, patch)
    return now


def run_program(argv: list[str]) -> None:
    """Runs the main program in this process, as the module that a test may have changed."""
    sys.argv = [str(PROGRAM), *argv]
    signal.signal(signal.SIGINT, signal.default_int_handler)
    ending = PROGRAM.read_text(encoding="utf-8").rpartition('\nif __name__ == "__main__":\n')[2]
    exec(dedent(ending), vars(tg))


def be_rank(
    first: Callable[[], object] | None, argv: list[str], cwd: str, env: dict[str, str], out: str
) -> None:
    """Runs a function and the program in a forked process."""
    os.chdir(cwd)
    os.environ.clear()
    os.environ.update(env)
    screen = os.open(out, os.O_CREAT | os.O_APPEND | os.O_WRONLY)
    os.dup2(screen, 1)
    os.dup2(screen, 2)
    torch.set_num_threads(1)
    if "COVERAGE_CONTEXT" in env:  # by tests/mutants.py
        import coverage

        coverage.Coverage.current().switch_context(env["COVERAGE_CONTEXT"])
    if first is not None:
        first()
    run_program(argv)


class Ranks:
    """The forked ranks of one run. Each calls `first`, a function of a module, before it starts."""

    def __init__(
        self,
        cwd: Path,
        *argv: str,
        world: int = 1,
        first: Callable[[], object] | None = None,
        **env: object,
    ) -> None:
        self.out = cwd / f"screen{len(list(cwd.glob('screen*')))}"
        self.out.touch()
        shared = {**KEPT, **{name: str(value) for name, value in env.items()}}
        if world > 1:
            shared |= {"WORLD_SIZE": str(world), "MASTER_ADDR": "127.0.0.1"}
            shared |= {"MASTER_PORT": str(free_port())}
        self.ranks: list[BaseProcess] = []
        for number in range(world):
            own = {"RANK": str(number), "LOCAL_RANK": str(number)} if world > 1 else {}
            job = (first, list(argv), str(cwd), {**shared, **own}, str(self.out))
            self.ranks.append(SERVER.Process(target=be_rank, args=job))
            self.ranks[-1].start()

    def said(self) -> str:
        """Returns everything that the ranks have printed."""
        return self.out.read_text(encoding="utf-8", errors="replace")

    def end(self, seconds: float = 120.0) -> list[int]:
        """Returns the exit statuses. Kills ranks that take longer and raises AssertionError."""
        ends = time.monotonic() + seconds
        for process in self.ranks:
            process.join(max(ends - time.monotonic(), 0))
        late = [process for process in self.ranks if process.is_alive()]
        for process in late:
            process.kill()
        assert not late, f"{len(late)} ranks do not end:\n{self.said()}"
        return [process.exitcode for process in self.ranks]


def free_port() -> int:
    """Returns a port of this machine that is not in use."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


def await_(true: Callable[[], object], seconds: float, said: Callable[[], str]) -> None:
    """Waits until true() holds. Raises AssertionError if that takes longer."""
    ends = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < ends, said()
        time.sleep(0.02)


def torchrun(cwd: Path, script: Path, *how: str, **env: object) -> subprocess.Popen:
    """Starts a script by torchrun in its own session; its output goes to cwd/screen.txt."""
    command = [sys.executable, "-m", "torch.distributed.run", *(how or ("--standalone",))]
    with (cwd / "screen.txt").open("ab") as screen:
        return subprocess.Popen(
            [*command, str(script)],
            cwd=cwd,
            env={**KEPT, **{name: str(value) for name, value in env.items()}},
            stdout=screen,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )


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


if __name__ == "__main__":  # a rank of torchrun: fails at its eighth step if it is rank 1
    fail_in("Trainer.take_step", call=8, on_rank=1)
    run_program(sys.argv[1:])
