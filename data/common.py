"""Functions shared by the scripts of this folder: shards, manifest, arguments, exit status."""

import argparse
import contextlib
import errno
import json
import shlex
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NoReturn

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from train_gpt import DataError, shard_header, write_atomically

DATA = Path(__file__).resolve().parent
SPLITS = ("train", "val")
MAX_SHARD_TOKENS = 2**31 - 1  # the header of a shard stores the count as int32


class InputError(Exception):
    """An error in the input or the arguments: one line with the name, the value and the remedy."""


def write_shard(path: Path, tokens: np.ndarray) -> None:
    """Writes tokens, uint16 [n], as a shard. Raises InputError if they are too many for one."""
    if len(tokens) > MAX_SHARD_TOKENS:
        limit = f"{len(tokens):,} tokens, but a shard holds at most {MAX_SHARD_TOKENS:,}"
        raise InputError(f"{path}: {limit}; make smaller shards")
    write_atomically(path, b"".join([shard_header(len(tokens)), tokens.astype("<u2").data]))


@contextlib.contextmanager
def staging_folder(folder: Path) -> Iterator[Path]:
    """Yields a temporary folder inside `folder`, which is created; removes it in every case."""
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder, prefix=".partial-") as name:
        yield Path(name)


def check_writable(folder: Path) -> None:
    """Creates the folder of --out. Raises InputError if no file can be written there."""
    try:
        with staging_folder(folder):
            pass
    except OSError as error:
        reason = f"{error.strerror}; choose a writable folder"
        raise InputError(f"--out: {folder}: {reason}") from None


# ---- Manifest ----


def read_manifest(path: Path) -> dict[str, Any]:
    """Returns the manifest in a file, or an empty one if there is no file.

    Raises InputError if the file is not a manifest.
    """
    manifest: dict[str, Any] = {"tokenizers": [], "datasets": []}
    try:
        if path.exists():
            manifest |= json.loads(path.read_bytes())
        if all(isinstance(e["name"], str) for e in manifest["tokenizers"] + manifest["datasets"]):
            return manifest
    except (ValueError, TypeError, KeyError, RecursionError):
        pass
    raise InputError(f"{path}: not a manifest of named tokenizers and datasets; move it away")


def merge_manifest(path: Path, tokenizer: dict[str, Any], dataset: dict[str, Any]) -> None:
    """Adds two entries to a manifest; they replace the entries of the same names."""
    manifest = read_manifest(path)
    for key, entry in (("tokenizers", tokenizer), ("datasets", dataset)):
        others = [other for other in manifest[key] if other["name"] != entry["name"]]
        manifest[key] = [*others, entry]
    write_atomically(path, (json.dumps(manifest, indent=2) + "\n").encode())


# ---- Command line ----


class Parser(argparse.ArgumentParser):
    """An argument parser that shows a module's docstring as help and raises InputError."""

    def __init__(self, docstring: str | None) -> None:
        raw = argparse.RawDescriptionHelpFormatter
        super().__init__(description=docstring, formatter_class=raw, allow_abbrev=False)

    def error(self, message: str) -> NoReturn:
        """Raises the message as an InputError."""
        raise InputError(message.removeprefix("argument "))


def integer_between(low: int, high: int) -> Callable[[str], int]:
    """Returns a function that converts an argument to an integer from `low` to `high`."""

    def integer(text: str) -> int:
        value = int(text)
        if not low <= value <= high:
            raise argparse.ArgumentTypeError(f"{value} is not in {low} to {high}")
        return value

    return integer


def training_command(settings: dict[str, Any]) -> str:
    """Returns the shell command that runs train_gpt.py with the given environment variables."""
    variables = [f"{name}={shlex.quote(str(value))}" for name, value in settings.items()]
    return " ".join([*variables, "python train_gpt.py"])


def exit_status(run: Callable[[], None], after_interrupt: str) -> int:
    """Calls `run` and returns the exit status; prints one line if it fails.

    The status is 0 on success, 2 after an error of input, data, disk or network, and 130 after an
    interrupt; `after_interrupt` says what to do then.
    """
    try:
        run()
    except (InputError, DataError, OSError) as error:
        is_full = isinstance(error, OSError) and error.errno == errno.ENOSPC
        remedy = "; make room, then run again" if is_full else ""
        print(f"error: {' '.join(str(error).split())}{remedy}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"error: interrupted; {after_interrupt}", file=sys.stderr)
        return 130
    return 0
