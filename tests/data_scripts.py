"""The scripts of data/ as modules, and what their tests share.

Shards are read here from the description of the format alone.
"""

import struct
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from conftest import ROOT

sys.path.insert(0, str(ROOT / "data"))
import common  # noqa: F401
import download  # noqa: F401
import prepare  # noqa: F401
import to_bytes  # noqa: F401


def files_of(folder: Path) -> dict[str, bytes]:
    """All files below a folder, by their relative paths."""
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def read_shard(path: Path) -> np.ndarray:
    """The tokens of a shard."""
    data = path.read_bytes()
    header = struct.unpack("<256i", data[:1024])
    assert header[:2] == (20240520, 1)
    assert not any(header[3:])
    assert len(data) == 1024 + 2 * header[2]
    return np.frombuffer(data[1024:], "<u2")


def read_split(folder: Path, split: str = "train") -> np.ndarray:
    """The tokens of a split, whose shards must be numbered from 0."""
    paths = sorted(folder.glob(f"fineweb_{split}_*.bin"))
    assert [p.name for p in paths] == [f"fineweb_{split}_{i:06d}.bin" for i in range(len(paths))]
    return np.concatenate([read_shard(path) for path in paths])


def byte_documents(ids: np.ndarray) -> list[bytes]:
    """The documents of a stream of byte260 ids, none of which holds a zero byte."""
    assert ids[0] == 1
    return np.where(ids == 1, 0, ids - 4).astype(np.uint8).tobytes().split(b"\0")[1:]


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


def fail_to_sync(monkeypatch: pytest.MonkeyPatch, number: int, error: BaseException) -> None:
    """Lets the write of file `number` from now on fail: a full disk, or Ctrl-C."""
    calls: list[int] = []

    def fsync(descriptor: int) -> None:
        calls.append(descriptor)
        if len(calls) == number:
            raise error

    monkeypatch.setattr("os.fsync", fsync)
