"""Functions shared by the scripts of this folder: shards, manifest, arguments, exit status."""

import argparse
import contextlib
import errno
import io
import json
import os
import shlex
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, NoReturn, TextIO

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from train_gpt import DataError, shard_header, write_atomically

DATA = Path(__file__).resolve().parent
SPLITS = ("train", "val")
MAX_SHARD_TOKENS = 2**31 - 1  # the header of a shard stores the count as int32
DISK_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
REMEDIES = {
    **dict.fromkeys(DISK_FULL, "make room, then run again"),
    **dict.fromkeys((errno.EACCES, errno.EPERM), "change its permissions, or give another path"),
    errno.EROFS: "choose a folder that can be written",
    errno.EISDIR: "a file is needed there",
    errno.ENOTDIR: "a folder is needed there",
    errno.ELOOP: "replace the link that leads to itself",
    errno.ENAMETOOLONG: "give a shorter path",
    **dict.fromkeys((errno.EIO, errno.ESTALE), "check its disk or mount, or use a copy elsewhere"),
}


class InputError(Exception):
    """An error in the input or the arguments: one line with the name, the value and the remedy."""


@contextlib.contextmanager
def add_path_to_errors(path: Path) -> Iterator[None]:
    """Gives an OSError that names no file, as one of a read or of a lock, the path of the file."""
    try:
        yield
    except OSError as error:
        error.filename = error.filename or str(path)
        raise


def read_bytes(path: Path) -> bytes:
    """Returns the content of a file. An OSError names the file."""
    with add_path_to_errors(path):
        return path.read_bytes()


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


def check_writable(folder: Path, targets: Iterable[Path] = ()) -> None:
    """Raises InputError if a folder, which need not exist, or one of its files cannot be written.

    Leaves nothing behind.
    """
    existing = next(path for path in (folder, *folder.parents) if os.path.lexists(path))
    try:
        with tempfile.TemporaryDirectory(dir=existing, prefix=".partial-"):
            pass
    except OSError as error:
        reason = f"{error.strerror}; choose a writable folder"
        raise InputError(f"--out: {folder}: {reason}") from None
    for path in targets:
        if path.is_dir():
            raise InputError(f"--out: {path}: is a folder, but a file must be there; move it away")


# ---- Manifest ----


def read_manifest(path: Path) -> dict[str, Any]:
    """Returns the manifest in a file, or an empty one if there is no file.

    Raises InputError if the file is not a manifest.
    """
    manifest: dict[str, Any] = {"tokenizers": [], "datasets": []}
    try:
        with contextlib.suppress(FileNotFoundError, NotADirectoryError):
            manifest |= json.loads(read_bytes(path))
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


def path_argument(text: str) -> Path:
    """Converts an argument to a path; an empty one, as of an unset variable, names no folder."""
    if not text:
        raise argparse.ArgumentTypeError("the path is empty; give one, or leave the argument out")
    return Path(text)


def integer_between(low: int, high: int) -> Callable[[str], int]:
    """Returns a function that converts an argument to an integer from `low` to `high`."""

    def integer(text: str) -> int:
        value = int(text)
        if not low <= value <= high:
            raise argparse.ArgumentTypeError(f"{value} is not in {low} to {high}")
        return value

    return integer


# ---- Output and exit status ----


def say(line: str, stream: TextIO | None = None) -> None:
    """Prints a line on stdout or `stream`; a full disk or a closed pipe there is no error."""
    with contextlib.suppress(OSError):
        print(line, file=stream, flush=True)


def accept_any_text() -> None:
    """Lets stdout and stderr replace what their encoding lacks; a closed one becomes /dev/null."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:
            setattr(sys, name, open(os.devnull, "w"))
        elif isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def shell_word(value: object) -> str:
    """Returns a value quoted for a shell; as $'...' if stdout cannot show all its characters."""
    text, encoding = str(value), sys.stdout.encoding or "ascii"
    if text.isprintable() and text.encode(encoding, "ignore").decode(encoding) == text:
        return shlex.quote(text)
    return "$'" + "".join(f"\\{byte:03o}" for byte in os.fsencode(text)) + "'"


def training_command(settings: dict[str, Any]) -> str:
    """Returns the shell command that runs train_gpt.py with the given environment variables."""
    variables = [f"{name}={shell_word(value)}" for name, value in settings.items()]
    return " ".join([*variables, "python train_gpt.py"])


def describe(error: Exception) -> str:
    """Returns an error as one line: for an OSError the path, the reason and the remedy."""
    text = str(error)
    if isinstance(error, OSError) and error.errno:
        path = os.fsdecode(error.filename2 or error.filename or "")
        remedy = REMEDIES.get(error.errno, "check the path")
        text = f"{path or 'a file'}: {error.strerror}; {remedy}"
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)


def exit_status(run: Callable[[], None], after_interrupt: str) -> int:
    """Calls `run` and returns the exit status; prints one line if it fails.

    The status is 0 on success, 2 after an error of input, data, disk or network, and 130 after an
    interrupt; `after_interrupt` says what to do then.
    """
    accept_any_text()
    try:
        run()
    except (InputError, DataError, OSError) as error:
        say(f"error: {describe(error)}", sys.stderr)
        return 2
    except KeyboardInterrupt:
        say(f"error: interrupted; {after_interrupt}", sys.stderr)
        return 130
    return 0
