"""Download published token shards of the challenge's documents for train_gpt.py.

The default is fineweb10B_sp1024: 80 training shards, all validation shards and the tokenizer, as
the challenge published them. The challenge has no sp4096 and sp8192; those come from the dataset
repository of a participant, kevclark/parameter-golf. Every file is checked: size, hash and shard
header. A second call checks the files that are there and downloads those that are missing or
damaged. HF_TOKEN and HF_ENDPOINT have the meaning that they have for huggingface_hub;
MATCHED_FINEWEB_REPO_ID names another dataset repository for any variant,
MATCHED_FINEWEB_REMOTE_ROOT_PREFIX the folder of its manifest.json.

Example:
    python data/download.py --variant sp8192 --train-shards 128
"""

import argparse
import contextlib
import glob
import hashlib
import importlib.util
import os
import re
import shutil
import signal
import ssl
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit
from urllib.request import getproxies

import huggingface_hub
from filelock import FileLock, Timeout
from huggingface_hub.errors import HfHubHTTPError, HFValidationError
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parent))

import common
from common import SPLITS, InputError

from train_gpt import DataError, read_shard

if TYPE_CHECKING:  # at run time it is imported when the environment was checked
    from huggingface_hub import RepoFile

REPO_ID, ROOT_PREFIX = "willdepueoai/parameter-golf", "datasets"
# Repositories of participants, laid out as the challenge's, by the variant that it lacks: the
# sources of PR #1218 (sp4096) and PR #1394 (sp8192).
PARTICIPANT_REPOS = dict.fromkeys(("sp4096", "sp8192"), "kevclark/parameter-golf")
NAME_PREFIX = "fineweb10B_"  # of all datasets; the variant follows
MAX_FILES = 10**6  # the number of a shard has six digits
OTHER_REPO = "set MATCHED_FINEWEB_REPO_ID to another repository"


# ---- Environment ----


def is_url(text: str, schemes: tuple[str, ...] = ("http", "https")) -> bool:
    """Returns whether a text is a URL with one of the schemes and a host."""
    try:
        url = urlsplit(text)
        is_valid_port = url.port is None or url.port > 0
    except ValueError:
        return False
    is_plain = text.isascii() and text.isprintable() and " " not in text
    return is_plain and url.scheme in schemes and bool(url.hostname) and is_valid_port


def is_proxy(text: str) -> bool:
    """Returns whether a text is a proxy that the HTTP client of huggingface_hub can use."""
    has_socks = importlib.util.find_spec("socksio") is not None
    schemes = ("http", "https", "socks5", "socks5h") if has_socks else ("http", "https")
    return is_url(text if "://" in text else f"http://{text}", schemes)


def has_certificates(path: str) -> bool:
    """Returns whether a path is a file of certificates."""
    try:
        ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT).load_verify_locations(path)
    except OSError:
        return False
    return True


# Patterns of names of environment variables, whether a value can be used, what is needed.
VARIABLES: tuple[tuple[str, Callable[[str], object], str], ...] = (
    ("HF_ENDPOINT", is_url, "a URL such as https://huggingface.co"),
    ("(HTTPS?|ALL)_PROXY", is_proxy, "http://HOST:PORT (socks5:// needs the package socksio)"),
    ("SSL_CERT_FILE", has_certificates, "a file of certificates"),
    ("SSL_CERT_DIR", lambda v: any(Path(d).is_dir() for d in v.split(":")), "folders: A[:B...]"),
    ("HF_TOKEN|HUGGING_FACE_HUB_TOKEN", re.compile(r"\s*[!-~]*\s*").fullmatch, "one ASCII word"),
    ("HF_HUB_(ETAG|DOWNLOAD)_TIMEOUT", re.compile(r"0*[1-9]\d*").fullmatch, "whole seconds"),
)
NETWORK_NAME = r"(HF|HUGGING_FACE|TRANSFORMERS|SSL\w*?)_\w+|\w+_PROXY|SSLKEYLOGFILE"


def check_environment() -> None:
    """Raises InputError if a variable that the network needs has a value that cannot be used."""
    proxies = getproxies()
    no_proxy = [host.strip() for host in proxies.get("no", "").split(",")]
    for name, value in os.environ.items():
        scheme = name.lower().removesuffix("_proxy")
        if scheme != name.lower() and ("*" in no_proxy or proxies.get(scheme) != value):
            continue  # the HTTP client reads no proxy, or http_proxy rather than HTTP_PROXY
        if name.startswith("SSL_") and not value:
            continue  # it takes an empty one for an unset one; huggingface_hub does not
        for pattern, is_usable, needed in VARIABLES:
            if re.fullmatch(pattern, name, re.IGNORECASE) and not is_usable(value):
                raise InputError(
                    f"{name}: its value cannot be used; set it to {needed}, or unset it"
                )


# ---- Repository ----


@contextlib.contextmanager
def hub_errors(repo: str, staging: Path) -> Iterator[None]:
    """Raises InputError about the repository for every error of huggingface_hub.

    An error of a file below `staging`, or of a full disk, stays an OSError.
    """
    try:
        yield
    except Exception as error:  # the types of its HTTP client depend on the version
        if isinstance(error, OSError):
            path = os.fsdecode(error.filename or "")
            if error.errno in common.DISK_FULL or path.startswith(str(staging)):
                raise OSError(error.errno, error.strerror, path or str(staging)) from None
        status = error.response.status_code if isinstance(error, HfHubHTTPError) else None
        reason = f"HTTP status {status}" if status else f"{type(error).__name__}: {error}"
        if status in (401, 403, 404) or isinstance(error, HFValidationError):
            remedy = "check MATCHED_FINEWEB_REPO_ID, or set HF_TOKEN to a token that may read it"
        elif isinstance(error, UnicodeError):
            remedy = "check the token in HF_TOKEN, or in the file of HF_TOKEN_PATH or HF_HOME"
        elif "CERTIFICATE_VERIFY_FAILED" in reason:
            remedy = "set SSL_CERT_FILE to your network's certificates (no other variable is read)"
        else:
            used = sorted(n for n in os.environ if re.fullmatch(NETWORK_NAME, n, re.IGNORECASE))
            names = ", ".join(dict.fromkeys(["HF_ENDPOINT", *used]))
            remedy = f"check the network and {names}, then run again to resume"
        raise InputError(f"{repo}: {' '.join(reason.split())}; {remedy}") from None


class Repository:
    """The files of a dataset repository at its newest commit.

    `staging` is the folder into which huggingface_hub downloads them under their remote paths.
    """

    def __init__(self, name: str, prefix: str, staging: Path) -> None:
        self.name, self.prefix, self.staging = name, prefix, staging
        with hub_errors(name, staging):
            huggingface_hub.logging.set_verbosity_error()  # the error line says what warnings say
            if not sys.stderr.isatty():
                huggingface_hub.utils.disable_progress_bars()
            self.api = huggingface_hub.HfApi(endpoint=os.environ.get("HF_ENDPOINT"))
            self.commit = self.api.repo_info(name, repo_type="dataset").sha

    def list_files(self, paths: list[str]) -> dict[str, "RepoFile"]:
        """Returns name, size and hash of files by their paths below the manifest's folder.

        Raises InputError if the repository lacks one.
        """
        remote_paths = {path: f"{self.prefix}/{path}".lstrip("/") for path in paths}
        with hub_errors(self.name, self.staging):
            found = self.api.get_paths_info(
                self.name, list(remote_paths.values()), revision=self.commit, repo_type="dataset"
            )
        files = {file.path: file for file in found if isinstance(file, huggingface_hub.RepoFile)}
        for remote_path in remote_paths.values():
            if remote_path not in files:
                remedy = "check MATCHED_FINEWEB_REPO_ID and MATCHED_FINEWEB_REMOTE_ROOT_PREFIX"
                raise InputError(f"{self.name}: {remote_path}: no such file; {remedy}")
        return {path: files[remote_path] for path, remote_path in remote_paths.items()}

    def download(self, files: list["RepoFile"]) -> None:
        """Downloads files into the staging folder; keeps those that are there already."""
        with hub_errors(self.name, self.staging):
            self.api.snapshot_download(
                self.name,
                repo_type="dataset",
                revision=self.commit,
                allow_patterns=[glob.escape(file.path) for file in files],
                local_dir=self.staging,
            )

    def verify(self, file: "RepoFile") -> Path:
        """Returns the path of a downloaded file. Raises InputError, and deletes it, if damaged."""
        path = self.staging / file.path
        fault = find_fault(path, file)
        if fault:
            path.unlink(missing_ok=True)
            raise InputError(f"{self.name}: {file.path}: {fault}; run again to download it again")
        try:
            if path.suffix == ".bin":
                read_shard(path)
        except DataError:
            reason = "published, but not a token shard"
            raise InputError(f"{self.name}: {file.path}: {reason}; {OTHER_REPO}") from None
        return path

    def manifest(self) -> dict[str, Any]:
        """Returns the published manifest. Raises InputError if it is damaged."""
        file = self.list_files(["manifest.json"])["manifest.json"]
        self.download([file])
        path = self.verify(file)
        try:
            return common.read_manifest(path)
        except InputError:
            raise InputError(f"{self.name}: {file.path}: damaged; {OTHER_REPO}") from None


def find_fault(path: Path, file: "RepoFile") -> str:
    """Returns why a file on disk is not the published one, or ""."""
    if not path.is_file():
        return "not downloaded"
    size = path.stat().st_size
    if size != file.size:
        return f"{size:,} bytes instead of {file.size:,}"
    if file.lfs:
        digest, expected = hashlib.sha256(), file.lfs.sha256
    else:  # a small file, which the repository names by its git hash
        digest, expected = hashlib.sha1(b"blob %d\0" % size), file.blob_id
    with common.add_path_to_errors(path), path.open("rb") as stream:
        for block in iter(partial(stream.read, 1 << 20), b""):
            digest.update(block)
    return "" if digest.hexdigest() == expected else "its hash is not the repository's"


def choose_files(
    manifest: dict[str, Any], repo: str, variant: str, train_shards: int
) -> tuple[dict[str, Any], dict[str, Any], list[str]]:
    """Returns the entries of dataset and tokenizer, and the paths of their files.

    Raises InputError if the manifest lacks the variant or that many shards, or is not sound.
    """
    name, datasets = NAME_PREFIX + variant, {entry["name"]: entry for entry in manifest["datasets"]}
    if name not in datasets:
        variants = ", ".join(n.removeprefix(NAME_PREFIX) for n in datasets) or "nothing"
        remedy = "set MATCHED_FINEWEB_REPO_ID to a repository that has it"
        if variant == "byte260":
            remedy = f"download sp1024 and run data/to_bytes.py, or {remedy}"
        raise InputError(f"--variant: {repo} has no {variant}, but {variants}; {remedy}")
    try:
        dataset = datasets[name]
        tokenizers = {entry["name"]: entry for entry in manifest["tokenizers"]}
        tokenizer = tokenizers[dataset["tokenizer_name"]]
        keys = ("model_path", "vocab_path", "path")
        paths = [tokenizer[key] for key in keys if tokenizer.get(key)]
        for split, limit in (("val", MAX_FILES), ("train", train_shards)):
            files = dataset["stats"][f"files_{split}"]
            if not 0 < files <= MAX_FILES:
                raise ValueError(f"{files} files")
            count = min(files, limit)
            paths += [f"datasets/{name}/fineweb_{split}_{i:06d}.bin" for i in range(count)]
        for path in paths:
            # Neither ".." nor an absolute path, and no script of this folder.
            if not re.fullmatch(r"(datasets|tokenizers)(/\w[\w.-]*)+", path):
                raise ValueError(f"unsafe path {path!r}")
    except (KeyError, TypeError, ValueError) as error:
        reason = f"the manifest's entry of {name} is damaged ({error!r})"
        raise InputError(f"{repo}: {reason}; {OTHER_REPO}") from None
    if train_shards > files:
        reason = f"{name} has {files} training shards; give that many at most"
        raise InputError(f"--train-shards: {train_shards}: {reason}")
    return dataset, tokenizer, paths


def download_missing(repository: Repository, files: dict[str, "RepoFile"], out: Path) -> None:
    """Downloads the files that are missing or damaged below `out`; a correct file stays."""
    missing = {}
    for path, file in tqdm(files.items(), "checking", unit=" files", disable=None):
        fault = find_fault(out / path, file)
        if fault:
            missing[path] = file
            if (out / path).exists():
                tqdm.write(f"{out / path}: {fault}; downloading it again", file=sys.stderr)
    staging = repository.staging
    needed = sum(f.size for f in missing.values() if not (staging / f.path).exists())
    free = shutil.disk_usage(staging).free
    if needed > free:
        room = f"{needed / 1e9:.2f} GB to download, {free / 1e9:.2f} GB free"
        raise InputError(f"{out}: {room}; make room, or lower --train-shards, or use --out")
    if missing:
        repository.download(list(missing.values()))
    for path, file in missing.items():
        (out / path).parent.mkdir(parents=True, exist_ok=True)
        repository.verify(file).replace(out / path)


def print_summary(
    out: Path, dataset: dict[str, Any], tokenizer: dict[str, Any], paths: list[str]
) -> None:
    """Prints the counts and the command that trains.

    Raises InputError if the counts are wrong or the folder has shards that were not published.
    """
    folder, stats = out / "datasets" / dataset["name"], dataset["stats"]
    common.say(str(folder))
    for split in SPLITS:
        shards = [out / path for path in paths if f"/fineweb_{split}_" in path]
        tokens, files = sum(len(read_shard(path)) for path in shards), stats[f"files_{split}"]
        published_names = {f"fineweb_{split}_{i:06d}.bin" for i in range(files)}
        for path in sorted(folder.glob(f"fineweb_{split}_*.bin")):
            if path.name not in published_names:
                raise InputError(f"{path}: not a published file; move it away, or it is read too")
        published = stats.get(f"tokens_{split}", tokens)
        if len(shards) == files and tokens != published:
            found = f"{tokens} {split} tokens, but {published} in the manifest"
            raise InputError(f"{folder}: {found}; {OTHER_REPO}")
        common.say(f"  {split:5} {tokens:,} tokens, {len(shards)} of {files} files")
    settings = {"DATA_PATH": folder, "VOCAB_SIZE": dataset.get("vocab_size")}
    if tokenizer.get("model_path"):
        settings["TOKENIZER_PATH"] = out / tokenizer["model_path"]
    common.say(f"  next: {common.training_command({k: v for k, v in settings.items() if v})}")


def parse_arguments(argv: list[str]) -> argparse.Namespace:
    """Returns the arguments. Raises InputError."""
    parser = common.Parser(__doc__)
    add, count = parser.add_argument, common.integer_between(0, MAX_FILES)
    add("count", nargs="?", type=count, metavar="N", help="the same as --train-shards N")
    add("--variant", default="sp1024", help="sp<V> or byte260, as in the manifest; default: sp1024")
    add("--train-shards", type=count, default=80, metavar="N", help="the first N; default: 80")
    add(
        "--out",
        type=common.path_argument,
        default=common.DATA,
        metavar="DIR",
        help="parent of datasets/; default: data/",
    )
    args = parser.parse_args(argv)
    if args.count is not None:
        args.train_shards = args.count
    return args


def choose_repository(variant: str) -> str:
    """Returns the name of the repository that has a variant, unless the environment names one.

    Says so if the challenge did not publish it.
    """
    named = os.environ.get("MATCHED_FINEWEB_REPO_ID")
    repo = named or PARTICIPANT_REPOS.get(variant, REPO_ID)
    if variant in PARTICIPANT_REPOS and not named:
        common.say(
            f"note: the challenge has no {variant}; these are shards of a participant, {repo}, "
            "made from the challenge's documents; MATCHED_FINEWEB_REPO_ID names another repository"
        )
    return repo


def run(args: argparse.Namespace) -> None:
    """Downloads the manifest, checks the files that it names, downloads the others."""
    local_manifest, staging = args.out / "manifest.json", args.out / "datasets" / ".download"
    check_environment()
    common.read_manifest(local_manifest)
    common.check_writable(staging)
    staging.mkdir(parents=True, exist_ok=True)
    try:
        with FileLock(staging / "lock", timeout=0):
            name = choose_repository(args.variant)
            prefix = os.environ.get("MATCHED_FINEWEB_REMOTE_ROOT_PREFIX", ROOT_PREFIX).strip("/")
            repository = Repository(name, prefix, staging)
            dataset, tokenizer, paths = choose_files(
                repository.manifest(), name, args.variant, args.train_shards
            )
            targets = [args.out / path for path in paths]
            for folder in {target.parent for target in targets}:
                common.check_writable(folder, targets)
            download_missing(repository, repository.list_files(paths), args.out)
            shutil.rmtree(staging)
    except Timeout:
        raise InputError(f"{args.out}: another download is running here; wait for it") from None
    print_summary(args.out, dataset, tokenizer, paths)
    common.merge_manifest(local_manifest, tokenizer, dataset)


def stop_at_once(*_: Any) -> None:
    """Ends the process after a signal; the download threads would finish their files first."""
    try:
        os.write(sys.stderr.fileno(), b"error: interrupted; run again to resume\n")
    finally:  # stderr may be closed
        os._exit(130)


def main(argv: list[str]) -> int:
    """Runs the command line; returns its exit status."""
    return common.exit_status(lambda: run(parse_arguments(argv)), "run again to resume")


if __name__ == "__main__":
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, stop_at_once)
    sys.exit(main(sys.argv[1:]))
