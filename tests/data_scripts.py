"""The scripts of data/ as modules, and what their tests share.

Shards are read here from the description of the format alone.
"""

import struct
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import ROOT

sys.path.insert(0, str(ROOT / "data"))
import common  # noqa: F401
import download  # noqa: F401
import prepare  # noqa: F401
import to_bytes  # noqa: F401

# Runs a script, but waits for a signal when it is about to write file number sys.argv[1].
STUCK = """
import os, runpy, sys, time
number, sys.argv = int(sys.argv[1]), sys.argv[2:]
fsync, calls = os.fsync, []
def wait(descriptor):
    calls.append(descriptor)
    if len(calls) == number:
        print("stuck", flush=True)
        time.sleep(60)
    fsync(descriptor)
os.fsync = wait
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def files_of(folder: Path) -> dict[str, bytes]:
    """All files below a folder, by their relative paths."""
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def read_shard(path: Path) -> list[int]:
    """The tokens of a shard."""
    data = path.read_bytes()
    header = struct.unpack("<256i", data[:1024])
    assert header[:2] == (20240520, 1)
    assert not any(header[3:])
    assert len(data) == 1024 + 2 * header[2]
    return list(struct.unpack(f"<{header[2]}H", data[1024:]))


def read_split(folder: Path, split: str = "train") -> list[int]:
    """The tokens of a split, whose shards must be numbered from 0."""
    paths = sorted(folder.glob(f"fineweb_{split}_*.bin"))
    assert [p.name for p in paths] == [f"fineweb_{split}_{i:06d}.bin" for i in range(len(paths))]
    return [token for path in paths for token in read_shard(path)]


def byte_documents(ids: list[int]) -> list[bytes]:
    """The documents of a stream of byte260 ids, none of which holds a zero byte."""
    assert ids[0] == 1
    return bytes(0 if i == 1 else i - 4 for i in ids).split(b"\0")[1:]


def error_of(
    main: Callable[[list[str]], int], capsys: pytest.CaptureFixture[str], *args: object
) -> str:
    """The one line of a command that must fail with status 2."""
    capsys.readouterr()
    assert main([str(arg) for arg in args]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert error.count("\n") == 1
    return error


def stop_script(number: int, sent: int, script: str, *args: object) -> tuple[int, str]:
    """Sends a signal to a script of data/ that writes file `number`; returns status and stderr."""
    command = [sys.executable, "-c", STUCK, number, ROOT / "data" / script, *args]
    pipe = subprocess.PIPE
    job = subprocess.Popen(list(map(str, command)), stdout=pipe, stderr=pipe, text=True)
    while job.stdout.readline() != "stuck\n":
        assert job.poll() is None
    job.send_signal(sent)
    error = job.communicate(timeout=60)[1]
    return job.returncode, error


def fail_to_sync(monkeypatch: pytest.MonkeyPatch, number: int, error: BaseException) -> None:
    """Lets the write of file `number` from now on fail: a full disk, or Ctrl-C."""
    calls: list[int] = []

    def fsync(descriptor: int) -> None:
        calls.append(descriptor)
        if len(calls) == number:
            raise error

    monkeypatch.setattr("os.fsync", fsync)
