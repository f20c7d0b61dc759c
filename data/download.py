"""Fetch the challenge's published token shards for train_gpt.py.

    python data/download.py
        fineweb10B_sp1024: 80 training shards, all validation shards, the tokenizer
    python data/download.py --variant sp4096 --train-shards 10
        another vocabulary, fewer shards

A file gets its name when its size, its sha256 and its shard header are right. Run again to resume,
or to check what is there. HF_TOKEN and HF_ENDPOINT mean what they mean to huggingface_hub;
MATCHED_FINEWEB_REPO_ID names another repository, MATCHED_FINEWEB_REMOTE_ROOT_PREFIX the folder of
its manifest.
"""

import argparse
import contextlib
import hashlib
import os
import random
import re
import shlex
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from huggingface_hub import constants, get_hf_file_metadata, hf_hub_url
from huggingface_hub.errors import HfHubHTTPError, RepositoryNotFoundError
from huggingface_hub.utils import build_hf_headers, get_session, hf_raise_for_status, logging
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parent))

from prepare import SPLITS, InputError, Parser, between, exit_status, merge_entries, read_manifest

from train_gpt import DataError, read_shard

DATA = Path(__file__).resolve().parent
REPO_ID, ROOT_PREFIX = "willdepueoai/parameter-golf", "datasets"
OTHER = "set MATCHED_FINEWEB_REPO_ID to another repository"
NAME_PREFIX = "fineweb10B_"  # of all datasets; the variant follows
MAX_FILES = 10**6  # six digits number a shard
ATTEMPTS, BACKOFF = 7, 2.0  # of each request; seconds before the second one, then doubled
MAX_PAUSE = 600  # seconds; who is asked to wait longer should decide for themselves
# The root of all errors of the HTTP client that huggingface_hub brings, transport's too.
CLIENT_ERROR = HfHubHTTPError.__mro__[1]


class TransferError(Exception):
    """Bytes that are not those of the repository; another attempt may bring them."""


# ---- Requests ----


def diagnose(error: Exception) -> tuple[bool, str, str]:
    """Return whether another attempt may help, what went wrong, and the remedy."""
    if isinstance(error, TransferError):
        return True, str(error), "run again later"
    if not isinstance(error, HfHubHTTPError):
        reason = f"the connection to {constants.ENDPOINT} failed ({error or type(error).__name__})"
        return True, reason, "check the network and HF_ENDPOINT, then run again to resume"
    status = error.response.status_code
    if isinstance(error, RepositoryNotFoundError) or status in (401, 403):
        remedy = "check MATCHED_FINEWEB_REPO_ID, or set HF_TOKEN to a token that may read it"
        return False, "the repository is missing or private", remedy
    if status == 404:
        remedy = "check MATCHED_FINEWEB_REPO_ID and MATCHED_FINEWEB_REMOTE_ROOT_PREFIX"
        return False, "the repository has no such file", remedy
    return status in (408, 429) or status >= 500, f"the hub answers {status}", "run again later"


def pause(error: Exception, attempt: int) -> float:
    """Seconds to wait after attempt number `attempt`: back-off with jitter, or as the hub asks."""
    headers = error.response.headers if isinstance(error, HfHubHTTPError) else {}
    asked = re.fullmatch(r"(\d+)", headers.get("retry-after", ""))
    asked = asked or re.search(r"\br=0;\s*t=(\d+)", headers.get("ratelimit", ""))
    if asked and int(asked[1]) > MAX_PAUSE:
        raise InputError(f"the hub asks to wait {asked[1]} s; run again after that")
    backoff = BACKOFF * 2 ** (attempt - 1) * random.uniform(0.5, 1.5)
    return max(backoff, float(asked[1])) if asked else backoff


def patiently(what: str, action: Callable[[], Any], done: Callable[[], int] = int) -> Any:
    """Return `action()`, tried again after a fault that may pass; InputError when it fails.

    An attempt that left more `done()` than was before it counts as the first.
    """
    attempt = 1
    while True:
        before = done()
        try:
            return action()
        except (TransferError, CLIENT_ERROR) as error:
            may_pass, reason, remedy = diagnose(error)
            attempt = 1 if done() > before else attempt
            if not may_pass or attempt == ATTEMPTS:
                raise InputError(f"{what}: {reason}; {remedy}") from None
            wait = pause(error, attempt)
        attempt += 1
        note = f"{what}: {reason}; waiting {wait:.0f} s for attempt {attempt} of {ATTEMPTS}"
        tqdm.write(" ".join(note.split()), file=sys.stderr)
        time.sleep(wait)


# ---- Files ----


@dataclass(frozen=True)
class Remote:
    """A published file."""

    path: str  # below the folder of the manifest, there and here
    url: str
    size: int  # bytes
    sha256: str  # empty where the hub gives none, as of small text files

    def partial(self, root: Path) -> Path:
        """Return where its bytes gather; those of another version gather elsewhere."""
        return root / f"{self.path}.{self.sha256[:8]}.part"

    def gathered(self, root: Path) -> int:
        """Return how many bytes an interrupted transfer has left."""
        return self.partial(root).stat().st_size if self.partial(root).exists() else 0

    def check(self, path: Path) -> None:
        """Raise TransferError if `path` is another file, InputError if this one is no shard."""
        size, digest = path.stat().st_size, hashlib.sha256()
        if size != self.size:
            raise TransferError(f"{size:,} bytes instead of {self.size:,}")
        with path.open("rb") as file:
            while self.sha256 and (block := file.read(1 << 20)):
                digest.update(block)
        if self.sha256 not in ("", digest.hexdigest()):
            raise TransferError("its sha256 is not the repository's")
        try:
            if self.path.endswith(".bin"):
                read_shard(path)
        except DataError:
            if not self.sha256:
                raise TransferError("no whole token shard") from None
            raise InputError(f"{self.path}: published, but no token shard; {OTHER}") from None


@dataclass(frozen=True)
class Source:
    """A dataset repository, the folder of its manifest and, once it is known, one commit."""

    repo: str
    prefix: str
    revision: str = "main"

    def look_up(self, path: str) -> tuple[Remote, str]:
        """Return a file and the commit it is of; InputError if it cannot be had."""
        name = f"{self.prefix}/{path}".strip("/")
        try:
            url = hf_hub_url(self.repo, name, repo_type="dataset", revision=self.revision)
        except ValueError as error:
            raise InputError(f"MATCHED_FINEWEB_REPO_ID: {error}") from None
        found = patiently(f"{self.repo}: {name}", partial(get_hf_file_metadata, url))
        if found.size is None:
            raise InputError(f"{self.repo}: {name}: the hub gives no size; check HF_ENDPOINT")
        sha256 = found.etag if re.fullmatch("[0-9a-f]{64}", found.etag or "") else ""
        return Remote(path, url, found.size, sha256), found.commit_hash or self.revision


def transfer(remote: Remote, path: Path, bar: tqdm) -> None:
    """Append the bytes that `path` lacks; what an error leaves is resumed by the next call."""
    with path.open("ab") as file:
        start = file.tell()
        if start >= remote.size and remote.sha256:
            return  # stopped between the last byte and the check
        headers = {**build_hf_headers(), "Accept-Encoding": "identity"}
        if start and remote.sha256:  # without a hash they might be bytes of another version
            headers["Range"] = f"bytes={start}-"
        limits = {"timeout": constants.HF_HUB_DOWNLOAD_TIMEOUT, "follow_redirects": True}
        with get_session().stream("GET", remote.url, headers=headers, **limits) as response:
            hf_raise_for_status(response)
            if response.status_code != 206:  # all from the start
                file.seek(0)
                file.truncate()
                bar.update(-start)
            for chunk in response.iter_bytes():
                file.write(chunk)
                bar.update(len(chunk))
        file.flush()
        os.fsync(file.fileno())  # before it can get its name
        if file.tell() < remote.size:
            raise TransferError(f"broken off after {file.tell():,} of {remote.size:,} bytes")


def fetch(remote: Remote, root: Path, bar: tqdm) -> None:
    """Give a file its name below `root` once it is whole and right; InputError if it never is."""
    path = remote.partial(root)

    def attempt() -> None:
        transfer(remote, path, bar)
        try:
            remote.check(path)
        except (TransferError, InputError):
            bar.update(-path.stat().st_size)
            path.unlink()  # nothing in it can be trusted
            raise

    path.parent.mkdir(parents=True, exist_ok=True)
    patiently(remote.path, attempt, partial(remote.gathered, root) if remote.sha256 else int)
    path.replace(root / remote.path)


def lacking(remotes: list[Remote], root: Path) -> list[Remote]:
    """Return the files that are not here or not right, and tell what is wrong with the latter."""
    lacks = []
    with progress("checking", sum(remote.size for remote in remotes)) as bar:
        for remote in remotes:
            path = root / remote.path
            try:
                remote.check(path)
            except FileNotFoundError:
                lacks.append(remote)
            except TransferError as error:
                tqdm.write(f"{path}: {error}; fetching it again", file=sys.stderr)
                lacks.append(remote)
            bar.update(remote.size)
    return lacks


def progress(what: str, total: int, done: int = 0) -> tqdm:
    """Return a bar of bytes, silent where nobody looks."""
    sizes = {"total": total, "initial": done, "unit": "B", "unit_scale": True}
    return tqdm(desc=what, **sizes, disable=None)


@contextlib.contextmanager
def alone(folder: Path) -> Iterator[None]:
    """Keep other downloads out of a folder; InputError if one is at work there."""
    with contextlib.ExitStack() as stack:
        try:
            import fcntl

            handle = os.open(folder, os.O_RDONLY)
            stack.callback(os.close, handle)
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise InputError(f"{folder}: another download is at work here; wait for it") from None
        except (ImportError, OSError):
            pass  # Windows, or a file system without locks
        yield


# ---- Manifest ----


def published_manifest(source: Source) -> tuple[dict[str, Any], Source]:
    """Return the repository's manifest and the source at its commit; InputError if damaged."""
    remote, commit = source.look_up("manifest.json")
    with tempfile.TemporaryDirectory() as folder:
        fetch(remote, Path(folder), tqdm(disable=True))
        with contextlib.suppress(InputError, RecursionError):
            manifest = read_manifest(Path(folder, remote.path))
            return manifest, Source(source.repo, source.prefix, commit)
    raise InputError(f"{source.repo}: manifest.json is damaged; choose another repository")


def choose(
    manifest: dict[str, Any], repo: str, variant: str, train_shards: int
) -> tuple[dict[str, Any], dict[str, Any], list[str]]:
    """Return the entries of dataset and tokenizer and the paths of their files.

    Raises InputError if the manifest lacks the variant or that many shards, or is unsound.
    """
    name, datasets = NAME_PREFIX + variant, {entry["name"]: entry for entry in manifest["datasets"]}
    if name not in datasets:
        there = ", ".join(n.removeprefix(NAME_PREFIX) for n in datasets) or "nothing"
        remedy = "set MATCHED_FINEWEB_REPO_ID to a repository that has it"
        if variant == "byte260":
            remedy = f"fetch sp1024 and make it with data/to_bytes.py, or {remedy}"
        raise InputError(f"--variant: {repo} has no {variant}, but {there}; {remedy}")
    try:
        dataset = datasets[name]
        tokenizers = {entry["name"]: entry for entry in manifest["tokenizers"]}
        tokenizer = tokenizers[dataset["tokenizer_name"]]
        files = {split: dataset["stats"][f"files_{split}"] for split in SPLITS}
        if not all(0 < count <= MAX_FILES for count in files.values()):
            raise ValueError
        keys = ("model_path", "vocab_path", "path")
        paths = [tokenizer[key] for key in keys if tokenizer.get(key)]
        for split, count in (("val", files["val"]), ("train", min(files["train"], train_shards))):
            paths += [f"datasets/{name}/fineweb_{split}_{i:06d}.bin" for i in range(count)]
        # Neither .. nor an absolute path, and not the scripts beside the two folders.
        unsafe = [p for p in paths if not re.fullmatch(r"(datasets|tokenizers)(/\w[\w.-]*)+", p)]
    except (KeyError, TypeError, ValueError):
        raise InputError(f"{repo}: the manifest's entry of {name} is damaged") from None
    if unsafe:
        raise InputError(f"{repo}: the manifest names an unsafe path, {unsafe[0]!r}; do not use it")
    if train_shards > files["train"]:
        most = f"{name} has {files['train']} training shards; give that many at most"
        raise InputError(f"--train-shards: {train_shards}: {most}")
    return dataset, tokenizer, paths


# ---- Command line ----


def parse_arguments(argv: list[str]) -> argparse.Namespace:
    """Return the arguments; raise InputError at a bad one."""
    about, _, rest = __doc__.partition("\n\n")
    raw = argparse.RawDescriptionHelpFormatter
    parser = Parser(description=about, epilog=rest, formatter_class=raw, allow_abbrev=False)
    add, count = parser.add_argument, between(0, MAX_FILES)
    add("count", nargs="?", type=count, metavar="N", help="the same as --train-shards N")
    add("--variant", default="sp1024", help="sp<V> or byte260, as the manifest has it")
    add("--train-shards", type=count, default=80, metavar="N", help="first N; default: 80")
    add("--out", type=Path, default=DATA, metavar="DIR", help="root of datasets/; default data/")
    args = parser.parse_args(argv)
    args.train_shards = args.train_shards if args.count is None else args.count
    return args


def summarise(
    out: Path, tokenizer: dict[str, Any], dataset: dict[str, Any], paths: list[str]
) -> None:
    """Print what is here and the command that trains on it; InputError if tokens do not add up."""
    folder, stats = out / "datasets" / dataset["name"], dataset["stats"]
    print(folder)
    for split in SPLITS:
        shards = [out / path for path in paths if f"/fineweb_{split}_" in path]
        tokens, files = sum(len(read_shard(path)) for path in shards), stats[f"files_{split}"]
        told = stats.get(f"tokens_{split}", tokens)
        if len(shards) == files and tokens != told:
            raise InputError(
                f"{folder}: {tokens} {split} tokens, but {told} in the manifest; " + OTHER
            )
        print(f"  {split:5} {tokens:,} tokens, {len(shards)} of {files} files")
    settings = {"DATA_PATH": folder, "VOCAB_SIZE": dataset.get("vocab_size")}
    if tokenizer.get("model_path"):
        settings["TOKENIZER_PATH"] = out / tokenizer["model_path"]
    told = " ".join(f"{key}={shlex.quote(str(value))}" for key, value in settings.items() if value)
    print(f"  next: {told} python train_gpt.py")


def run(args: argparse.Namespace) -> None:
    """Ask for the manifest and the files' sizes, check what is here, fetch the rest."""
    local, folder = args.out / "manifest.json", args.out / "datasets" / (NAME_PREFIX + args.variant)
    if not callable(getattr(get_session(), "stream", None)):  # that of requests is a setting
        raise InputError("huggingface_hub is older than 1.0; pip install -r requirements.txt")
    if not re.match(r"https?://[^/\s]+", constants.ENDPOINT):
        raise InputError(f"HF_ENDPOINT={constants.ENDPOINT}: must be http://... or https://...")
    read_manifest(local)  # tell now if nothing can be merged into it
    prefix = os.environ.get("MATCHED_FINEWEB_REMOTE_ROOT_PREFIX", ROOT_PREFIX).strip("/")
    source = Source(os.environ.get("MATCHED_FINEWEB_REPO_ID") or REPO_ID, prefix)
    manifest, source = published_manifest(source)
    dataset, tokenizer, paths = choose(manifest, source.repo, args.variant, args.train_shards)
    folder.mkdir(parents=True, exist_ok=True)
    with tqdm(paths, "asking", unit=" files", disable=None) as asking:
        remotes = [source.look_up(path)[0] for path in asking]
    with alone(args.out):
        files = lacking(remotes, args.out)
        total = sum(remote.size for remote in files)
        done = sum(remote.gathered(args.out) for remote in files)
        free = shutil.disk_usage(folder).free
        if total - done > free:
            need = f"{(total - done) / 1e9:.2f} GB to fetch, {free / 1e9:.2f} GB free"
            raise InputError(f"{folder}: {need}; make room, or lower --train-shards, or use --out")
        with progress("fetching", total, done) as bar:
            for remote in files:
                fetch(remote, args.out, bar)
        summarise(args.out, tokenizer, dataset, paths)
        merge_entries(local, tokenizer, dataset)


def main(argv: list[str] | None = None) -> int:
    """Run the command line `argv` (default: the program's) and return its exit status."""
    logging.set_verbosity_error()  # what the library has to say, its errors say
    return exit_status(
        lambda: run(parse_arguments(sys.argv[1:] if argv is None else argv)),
        "run again to resume",
        "; make room, then run again to resume",
    )


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # as on Ctrl-C
    sys.exit(main())
