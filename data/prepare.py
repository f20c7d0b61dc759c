"""Turn documents into token shards for train_gpt.py.

    python data/prepare.py
        the embedded corpus, made of the Python installation's own texts, as tokens and as bytes
    python data/prepare.py docs.jsonl.zst --name mine --tokenizer my.model --val-docs 1000
        shards of any documents under an existing SentencePiece tokenizer
    python data/prepare.py docs.jsonl --name mine --variant byte260
        shards of raw bytes

INPUT is .jsonl, .jsonl.zst, parts .jsonl.zst.NN (one JSON object with a string "text" a line) or
.txt (one document a file). data/README.md describes all that is written.
"""

import argparse
import contextlib
import errno
import hashlib
import itertools
import json
import lzma
import math
import os
import re
import shlex
import signal
import sys
import sysconfig
import tempfile
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from io import BytesIO
from pathlib import Path
from typing import Any, BinaryIO, NoReturn

import numpy as np
import zstandard
from sentencepiece import SentencePieceProcessor, SentencePieceTrainer
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from train_gpt import BOS_ID, BYTE_VOCAB, FIRST_TEXT_ID, DataError, shard_header, write_atomically

PAD_ID, EOS_ID, UNK_ID = 0, 2, 3
MAX_VOCAB = 1 << 16  # a token is stored in 16 bits
SPLITS = ("train", "val")
EMBEDDED_NAME, EMBEDDED_VOCAB = "python", 1024
VAL_BYTES = 1_000_000  # UTF-8 bytes of validation text drawn by hash, at least
SAMPLE_BYTES = 100_000_000  # training text a new tokenizer learns from, about
SLICE_CHARS = 16_384  # the tokenizer trainer skips long texts, so documents go in slices
BATCH_DOCUMENTS = 512  # encoded at once: work for every core, little memory

Document = tuple[str, str]  # where it stands (for messages), text


class InputError(Exception):
    """A fault of the input or the arguments, told in one line with its remedy."""


# ---- Shards ----


def write_shard(path: Path, tokens: np.ndarray) -> None:
    """Write tokens [n] as one shard: a header, then little-endian uint16."""
    with path.open("wb") as file:
        file.write(shard_header(len(tokens)))
        file.write(tokens.astype("<u2", copy=False).data)


class ShardWriter:
    """Cuts the token stream of one split into files of `shard_tokens` tokens."""

    def __init__(self, folder: Path, split: str, shard_tokens: int) -> None:
        self.folder, self.split = folder, split
        self.buffer = np.empty(shard_tokens, dtype="<u2")
        self.used = self.files = self.tokens = 0

    def add(self, tokens: np.ndarray) -> None:
        """Append tokens [n]; they may cross from one shard into the next."""
        while len(tokens):
            part = tokens[: len(self.buffer) - self.used]
            self.buffer[self.used : self.used + len(part)] = part
            self.used += len(part)
            self.tokens += len(part)
            tokens = tokens[len(part) :]
            if self.used == len(self.buffer):
                self.flush()

    def flush(self) -> None:
        """Write the tokens that are not in a file yet, if any."""
        if self.used:
            path = self.folder / f"fineweb_{self.split}_{self.files:06d}.bin"
            write_shard(path, self.buffer[: self.used])
            self.files, self.used = self.files + 1, 0


# ---- Documents ----


def digest(text: str) -> bytes:
    """Return the sha256 of the UTF-8 text; equal texts are the same document."""
    return hashlib.sha256(text.encode()).digest()


def zstd_lines(path: Path, file: BinaryIO) -> Iterator[bytes]:
    """Yield the lines of a file of whole zstd frames; raise InputError if it is damaged."""
    decoder = zstandard.ZstdDecompressor(max_window_size=1 << 31)
    frame, rest = decoder.decompressobj(), b""
    try:
        while block := file.read(1 << 18):
            while block:
                if frame.eof:
                    frame = decoder.decompressobj()
                *lines, rest = (rest + frame.decompress(block)).split(b"\n")
                yield from lines
                block = frame.unused_data
    except zstandard.ZstdError as error:
        raise InputError(f"{path}: damaged zstd data ({error}); fetch it again") from None
    if not frame.eof:
        raise InputError(f"{path}: truncated zstd data; fetch it again, or join its pieces first")
    yield rest


def parse_line(place: str, line: bytes) -> str:
    """Return the "text" of a JSON line; raise InputError naming `place` if there is none."""
    try:
        record = json.loads(line.decode())
        text = record.get("text") if isinstance(record, dict) else None
        if not isinstance(text, str):
            raise InputError(f'{place}: {record!r:.60}: need an object with a string "text"')
        text.encode()
    except UnicodeDecodeError as error:
        raise InputError(f"{place}: not UTF-8 ({error.reason}); convert the file") from None
    except UnicodeEncodeError as error:
        bad = f"\\u{ord(error.object[error.start]):04x}"
        raise InputError(f"{place}: lone surrogate {bad} in the text; remove it") from None
    except (ValueError, RecursionError) as error:
        raise InputError(f"{place}: invalid JSON ({error}); need one object a line") from None
    return text


def read_documents(paths: Iterable[Path]) -> Iterator[Document]:
    """Yield (place, text) of all documents, empty ones too; raise InputError at the first fault."""
    for path in paths:
        with path.open("rb") as file:
            if path.suffix == ".txt":
                try:
                    yield str(path), file.read().decode()
                except UnicodeDecodeError as error:
                    raise InputError(f"{path}: not UTF-8 ({error}); convert the file") from None
                continue
            lines = file if path.suffix == ".jsonl" else zstd_lines(path, file)
            for number, line in enumerate(lines, 1):
                if line.strip():
                    place = f"{path}:{number}"
                    yield place, parse_line(place, line)


def library_files() -> Iterator[tuple[str, bytes]]:
    """Yield (name, bytes) of the standard library's modules, without tests and code tables."""
    library = Path(sysconfig.get_path("stdlib"))
    skipped = {"test", "tests", "idle_test", "__pycache__", "encodings", "pydoc_data"}
    tables = {"html/entities.py", "stringprep.py"}
    for folder, subfolders, names in os.walk(library):
        # A name that is no identifier is no package of the library: site-packages, lib-dynload.
        subfolders[:] = [s for s in sorted(subfolders) if s.isidentifier() and s not in skipped]
        for path in (Path(folder, name) for name in sorted(names)):
            place = path.relative_to(library).as_posix()
            if path.match("*.py") and not path.match("_sysconfig*") and place not in tables:
                yield place, path.read_bytes()


def embedded_documents() -> list[Document]:
    """Return the texts every Python carries, sources and language reference, in hash order."""
    try:
        from pydoc_data.topics import topics
    except ImportError:
        reason = "this Python was installed without its language reference, pydoc_data"
        raise InputError(f"INPUT: {reason}; give documents, or use another Python") from None
    reference = ((f"topic {name}", text.encode()) for name, text in topics.items())
    documents: dict[bytes, Document] = {}
    lossy = copies = 0
    for place, data in (*library_files(), *reference):
        text = data.decode(errors="replace")
        # SentencePiece stands U+2581 for a space, so that character comes back as a space.
        if text.encode() != data or "\u2581" in text or "\0" in text:
            lossy += 1
        elif documents.setdefault(digest(text), (place, text))[0] != place:
            copies += 1
    print(f"embedded corpus: dropped {copies} copies and {lossy} texts tokens cannot give back")
    return [documents[key] for key in sorted(documents)]


# ---- Splits ----


@dataclass(frozen=True)
class Corpus:
    """Documents, and the rule that says which are validation; can be iterated many times."""

    read: Callable[[], Iterable[Document]]
    read_val: Callable[[], Iterable[Document]] = tuple  # (none); all of these are validation,
    val_count: int = 0  # so are the first `val_count` of `read()` that are not empty,
    val_cut: bytes = b""  # and those whose digest is at most this

    def __iter__(self) -> Iterator[tuple[str, str, str]]:
        """Yield (split, place, text) in input order; split is "val", "train" or "empty"."""
        for place, text in self.read_val():
            yield "val" if text.strip() else "empty", place, text
        count = 0
        for place, text in self.read():
            if not text.strip():
                yield "empty", place, text
                continue
            is_val = count < self.val_count or digest(text) <= self.val_cut
            yield "val" if is_val else "train", place, text
            count += 1


def hash_cut(documents: Iterable[Document]) -> bytes:
    """Return the digest at which, in hash order, distinct documents reach VAL_BYTES.

    Copies of a text share its digest, so all of them fall on one side of the cut. Raises
    InputError if no document would be left for training.
    """
    sizes = {digest(text): len(text.encode()) for _, text in documents if text.strip()}
    total = 0
    for key in sorted(sizes)[:-1]:
        total += sizes[key]
        if total >= VAL_BYTES:
            return key
    raise InputError(
        f"INPUT: {sum(sizes.values()):,} bytes of text are too few to draw {VAL_BYTES:,} for "
        "validation and train on the rest; give more, or choose with --val-docs or --val-file"
    )


def survey(corpus: Corpus) -> Counter:
    """Count `docs_train`, `bytes_val` ...; raise InputError if a split is empty or both overlap."""
    counts = Counter()
    val_places: dict[bytes, str] = {}
    overlaps, example = 0, ""
    for split, place, text in tqdm(corpus, "reading", unit=" documents", disable=None):
        counts[f"docs_{split}"] += 1
        counts[f"bytes_{split}"] += len(text.encode())
        if split == "val":
            val_places[digest(text)] = place
        elif split == "train" and (twin := val_places.get(digest(text))):
            example = example or f"{place} equals {twin}"
            overlaps += 1
    if overlaps:
        raise InputError(
            f"validation: {overlaps:,} training documents stand in the validation set too "
            f"({example}); remove them, or leave --val-docs and --val-file out"
        )
    for split in SPLITS:
        if not counts[f"docs_{split}"]:
            found = f"{counts['docs_train'] + counts['docs_val']:,}"
            raise InputError(f"no {split} documents among the {found} of the input; give more")
    return counts


# ---- Vocabularies ----


@dataclass(frozen=True)
class Vocabulary:
    """The tokens of one dataset: a SentencePiece model's, or without one the 260 of bytes."""

    name: str  # in the manifest; the model's file name
    model: SentencePieceProcessor | None = None

    @property
    def size(self) -> int:
        """Return the number of token ids."""
        return self.model.vocab_size() if self.model else BYTE_VOCAB

    @property
    def variant(self) -> str:
        """Return the last part of dataset names."""
        return f"sp{self.size}" if self.model else f"byte{BYTE_VOCAB}"

    def encode(self, texts: list[str], workers: int) -> list[tuple[np.ndarray, bool]]:
        """Return (tokens [n] uint16, do they decode to the exact text) of each text."""
        if not self.model:
            data = (np.frombuffer(text.encode(), np.uint8) for text in texts)
            return [(octets.astype("<u2") + FIRST_TEXT_ID, True) for octets in data]
        # SentencePiece's own threads: as fast as processes here, and the order is kept.
        ids = self.model.encode(texts, num_threads=workers)
        decoded = self.model.decode(ids, num_threads=workers)
        return [
            (np.array(i, dtype="<u2"), d == t) for i, d, t in zip(ids, decoded, texts, strict=True)
        ]

    def entry(self) -> dict[str, Any]:
        """Return the manifest's description; paths are relative to the manifest."""
        path = f"tokenizers/{self.name}"
        paths = {"model_path": f"{path}.model", "vocab_path": f"{path}.vocab"}
        return {
            "name": self.name,
            "kind": "sentencepiece_bpe" if self.model else "byte",
            "vocab_size": self.size,
            "bos_id": BOS_ID,
            "eos_id": EOS_ID,
            "recommended_bigram_vocab_size": math.ceil(self.size / 128) * 128 * 5,
            **(paths if self.model else {}),
        }

    def save(self, folder: Path) -> None:
        """Write NAME.model and NAME.vocab (piece, tab, score) unless this model stands there."""
        model, path = self.model, folder / f"{self.name}.model"
        if not model or (path.exists() and path.read_bytes() == model.serialized_model_proto()):
            return
        rows = (f"{model.id_to_piece(i)}\t{model.get_score(i):g}\n" for i in range(self.size))
        folder.mkdir(parents=True, exist_ok=True)
        write_atomically(path.with_suffix(".vocab"), "".join(rows).encode())
        write_atomically(path, model.serialized_model_proto())


def load_tokenizer(path: Path) -> Vocabulary:
    """Read a SentencePiece model; raise InputError if it is none or does not fit the shards."""
    if path.suffix != ".model" or not path.is_file():
        raise InputError(f"--tokenizer: {path}: need an existing SentencePiece .model file")
    try:
        model = SentencePieceProcessor(model_proto=path.read_bytes())
    except RuntimeError:
        raise InputError(f"--tokenizer: {path}: not a SentencePiece model; get it anew") from None
    if model.vocab_size() > MAX_VOCAB or model.bos_id() != BOS_ID:
        raise InputError(
            f"--tokenizer: {path}: {model.vocab_size():,} pieces and BOS id {model.bos_id()}; "
            f"shards need at most {MAX_VOCAB:,} pieces and BOS id {BOS_ID}"
        )
    return Vocabulary(path.stem, model)


def train_tokenizer(corpus: Corpus, train_bytes: int, size: int) -> SentencePieceProcessor:
    """Learn a BPE of exactly `size` pieces from the training split; raise InputError if it cannot.

    Identity normalisation, kept whitespace and byte fallback make every text without U+2581
    decode to its exact bytes. Of a large corpus only a sample is used, drawn by hash.
    """
    share = SAMPLE_BYTES / train_bytes * 2**64
    slices = (
        text[start : start + SLICE_CHARS]
        for split, _, text in tqdm(corpus, "tokenizer", unit=" documents", disable=None)
        if split == "train" and int.from_bytes(digest(text)[-8:], "big") < share
        for start in range(0, len(text), SLICE_CHARS)
    )
    data = BytesIO()
    try:
        SentencePieceTrainer.train(
            sentence_iterator=slices,
            model_writer=data,
            model_type="bpe",
            vocab_size=size,
            hard_vocab_limit=False,
            character_coverage=0.999,
            byte_fallback=True,
            split_digits=True,
            normalization_rule_name="identity",
            add_dummy_prefix=False,
            remove_extra_whitespaces=False,
            allow_whitespace_only_pieces=True,
            max_sentence_length=4 * SLICE_CHARS,
            pad_id=PAD_ID,
            bos_id=BOS_ID,
            eos_id=EOS_ID,
            unk_id=UNK_ID,
            minloglevel=2,
        )
    except RuntimeError as error:
        needed = re.search(r"required_chars\. \d+ vs (\d+)", str(error))
        reason = f"the text needs {needed[1]} or more" if needed else f"training failed: {error}"
        raise InputError(f"--vocab-size: {size}: {reason}") from None
    model = SentencePieceProcessor(model_proto=data.getvalue())
    if model.vocab_size() != size:
        found = model.vocab_size()
        raise InputError(f"--vocab-size: {size}: the training text yields {found} pieces at most")
    return model


# ---- Output ----


@contextlib.contextmanager
def staging(folder: Path) -> Iterator[Path]:
    """Yield a temporary folder inside `folder` (made if need be), removed whatever happens."""
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder, prefix=".partial-") as name:
        yield Path(name)


def publish(temporary: Path, folder: Path) -> None:
    """Give finished shards their final names and remove those of an earlier, longer run."""
    names = {path.name for path in temporary.iterdir()}
    for name in sorted(names):
        (temporary / name).replace(folder / name)
    for path in folder.glob("fineweb_*_*.bin"):
        if path.name not in names:
            path.unlink()


def write_dataset(
    corpus: Corpus, counts: Counter, vocabulary: Vocabulary, folder: Path, args: argparse.Namespace
) -> dict[str, int]:
    """Write all shards, give them their names together at the end, return the manifest's stats.

    `counts` are those of `survey`. Raises InputError if a document of the embedded corpus does not
    decode to its exact bytes.
    """
    bos, inexact = np.array([BOS_ID], dtype="<u2"), 0
    documents = (document for document in corpus if document[0] != "empty")
    total = counts["docs_train"] + counts["docs_val"]
    with (
        staging(folder) as temporary,
        tqdm(total=total, desc=folder.name, unit=" documents", disable=None) as bar,
    ):
        writers = {split: ShardWriter(temporary, split, args.shard_tokens) for split in SPLITS}
        while batch := list(itertools.islice(documents, BATCH_DOCUMENTS)):
            encoded = vocabulary.encode([text for _, _, text in batch], args.workers)
            for (split, place, _), (tokens, exact) in zip(batch, encoded, strict=True):
                if not (exact or args.input):
                    raise InputError(f"{place}: does not decode to its exact bytes")
                inexact += not exact
                writers[split].add(bos)
                writers[split].add(tokens)
            bar.update(len(batch))
        for writer in writers.values():
            writer.flush()
        publish(temporary, folder)
    if inexact:
        print(f"note: {inexact:,} documents do not decode to their exact bytes: the tokenizer")
        print("  changes some text, and bits per byte will count the bytes it decodes to")
    stats = {key: counts[key] for key in sorted(counts) if not key.endswith("_empty")}
    for split, writer in writers.items():
        stats |= {f"tokens_{split}": writer.tokens, f"files_{split}": writer.files}
    for key in ("docs", "bytes", "tokens", "files"):
        stats[f"{key}_total"] = stats[f"{key}_train"] + stats[f"{key}_val"]
    return stats


def read_manifest(path: Path) -> dict[str, Any]:
    """Return the manifest, an empty one if there is none; InputError: it cannot be merged."""
    empty: dict[str, Any] = {"tokenizers": [], "datasets": []}
    try:
        manifest = {**empty, **json.loads(path.read_bytes())} if path.exists() else empty
        if all(isinstance(entry["name"], str) for key in empty for entry in manifest[key]):
            return manifest
    except (ValueError, TypeError, KeyError):
        pass
    raise InputError(f"{path}: no manifest of named tokenizers and datasets; move it away")


def merge_manifest(path: Path, name: str, vocabulary: Vocabulary, stats: dict[str, int]) -> None:
    """Describe a dataset and its tokenizer in a manifest."""
    tokenizer, folder = vocabulary.entry(), f"datasets/{name}"
    shared = ("vocab_size", "bos_id", "eos_id", "recommended_bigram_vocab_size")
    dataset = {
        "name": name,
        "tokenizer_name": tokenizer["name"],
        "tokenizer_kind": tokenizer["kind"],
        "path": folder,
        "train_glob": f"{folder}/fineweb_train_*.bin",
        "val_glob": f"{folder}/fineweb_val_*.bin",
        **{key: tokenizer[key] for key in shared},
        "stats": stats,
    }
    merge_entries(path, tokenizer, dataset)


def merge_entries(path: Path, tokenizer: dict[str, Any], dataset: dict[str, Any]) -> None:
    """Put two entries in place of those of their names in a manifest; keep all others."""
    manifest = read_manifest(path)
    for key, entry in (("tokenizers", tokenizer), ("datasets", dataset)):
        others = [other for other in manifest[key] if other["name"] != entry["name"]]
        manifest[key] = [*others, entry]
    write_atomically(path, (json.dumps(manifest, indent=2) + "\n").encode())


# ---- Command line ----


class Parser(argparse.ArgumentParser):
    """An argument parser whose complaints are InputErrors."""

    def error(self, message: str) -> NoReturn:
        """Raise the complaint."""
        raise InputError(message.removeprefix("argument "))


def between(low: int, high: int) -> Callable[[str], int]:
    """Return a converter of argument strings to integers from `low` to `high`."""

    def integer(text: str) -> int:
        value = int(text)
        if not low <= value <= high:
            raise argparse.ArgumentTypeError(f"{value} is not in {low} to {high}")
        return value

    return integer


def parse_arguments(argv: list[str]) -> argparse.Namespace:
    """Return the arguments with `out` and `name` filled in; raise InputError at a bad one."""
    about, _, rest = __doc__.partition("\n\n")
    raw = argparse.RawDescriptionHelpFormatter
    parser = Parser(description=about, epilog=rest, formatter_class=raw, allow_abbrev=False)
    add, most = parser.add_argument, 2**31 - 1  # the header counts tokens in 31 bits
    add("input", nargs="*", type=Path, metavar="INPUT", help="documents; none: embedded corpus")
    add("--variant", help="sp<V> or byte260; default: sp<V> of the tokenizer")
    add("--tokenizer", type=Path, metavar="MODEL", help="existing SentencePiece .model")
    add("--vocab-size", type=between(BYTE_VOCAB + 1, MAX_VOCAB), metavar="V", help="train one of V")
    add("--val-docs", type=between(1, most), metavar="N", help="validation: first N documents")
    add("--val-file", nargs="+", type=Path, metavar="FILE", help="validation: other files")
    add("--shard-tokens", type=between(1, most), default=10**8, metavar="N", help="default 10^8")
    add("--out", type=Path, metavar="DIR", help="root of datasets/ and tokenizers/; default data/")
    add("--name", help="datasets/NAME_VARIANT; default: last part of --out")
    cores = os.cpu_count() or 1
    add("--workers", type=between(1, 1024), default=cores, metavar="N", help="default: all cores")
    args = parser.parse_args(argv)
    check_arguments(args)
    if not args.input:
        args.name = EMBEDDED_NAME
    elif not args.name:
        args.name = args.out.resolve().name if args.out else ""
    if not re.fullmatch(r"\w[\w.-]*", args.name):
        raise InputError(f"--name: {args.name!r}: give one of letters, digits, _ . and -")
    args.out = args.out or Path(__file__).resolve().parent
    return args


def check_arguments(args: argparse.Namespace) -> None:
    """Raise InputError if options contradict one another or an input file cannot be one."""
    if not args.input:
        for option in ("variant", "tokenizer", "vocab_size", "val_docs", "val_file", "name"):
            if getattr(args, option) is not None:
                flag = "--" + option.replace("_", "-")
                raise InputError(f"{flag}: needs INPUT; without, the embedded corpus is made")
    elif args.val_docs and args.val_file:
        raise InputError("--val-docs: contradicts --val-file; give one of them")
    elif args.variant == f"byte{BYTE_VOCAB}" and (args.tokenizer or args.vocab_size):
        raise InputError(f"--variant: {args.variant} takes no --tokenizer and no --vocab-size")
    elif not (args.variant == f"byte{BYTE_VOCAB}" or args.tokenizer or args.vocab_size):
        raise InputError("--tokenizer: give it, or --vocab-size, or --variant byte260")
    for path in (*args.input, *(args.val_file or ())):
        if not re.search(r"\.(txt|jsonl|jsonl\.zst(\.\d+)?)$", path.name):
            raise InputError(f"{path}: unknown suffix; need .jsonl, .jsonl.zst[.NN] or .txt")
        if not path.is_file():
            raise InputError(f"{path}: no such file; check its name")


def given_vocabulary(args: argparse.Namespace) -> Vocabulary | None:
    """Return the vocabulary that needs no training, if any; raise InputError at a mismatch."""
    if args.variant == f"byte{BYTE_VOCAB}":
        return Vocabulary(f"{args.name}_pure_byte_260")
    vocabulary = load_tokenizer(args.tokenizer) if args.tokenizer else None
    size = vocabulary.size if vocabulary else args.vocab_size or EMBEDDED_VOCAB
    expected = (("--vocab-size", args.vocab_size, size), ("--variant", args.variant, f"sp{size}"))
    for flag, value, right in expected:
        if value not in (None, right):
            raise InputError(f"{flag}: {value} contradicts a tokenizer of {size} pieces: {right}")
    if vocabulary:
        target = args.out / "tokenizers" / f"{vocabulary.name}.model"
        if target.exists() and target.read_bytes() != args.tokenizer.read_bytes():
            raise InputError(f"--tokenizer: {target} is another of that name; rename one of them")
    return vocabulary


def make_corpus(args: argparse.Namespace) -> Corpus:
    """Return the documents that the arguments name, with the rule for validation."""
    read = partial(read_documents, args.input)
    if args.val_file:
        return Corpus(read, read_val=partial(read_documents, args.val_file))
    if args.val_docs:
        return Corpus(read, val_count=args.val_docs)
    print(f"validation: documents by order of their sha256, {VAL_BYTES:,} bytes of text or more")
    documents = None if args.input else embedded_documents()
    read = read if args.input else lambda: documents
    return Corpus(read, val_cut=hash_cut(read()))


def xz_bits_per_byte(corpus: Corpus) -> float:
    """Bits a byte of the validation text takes after `xz -9e`: a mark for a model to beat."""
    text = b"".join(text.encode() for split, _, text in corpus if split == "val")
    return 8 * len(lzma.compress(text, preset=9 | lzma.PRESET_EXTREME)) / len(text)


def summarise(folder: Path, vocabulary: Vocabulary, stats: dict[str, int], preset: str) -> None:
    """Print what a dataset holds and the command that trains on it."""
    print(f"\n{folder}")
    for split in SPLITS:
        docs, size, tokens, files = (
            stats[f"{key}_{split}"] for key in ("docs", "bytes", "tokens", "files")
        )
        print(f"  {split:5} {docs:,} documents, {size:,} bytes, {tokens:,} tokens,", end=" ")
        print(f"{size / tokens:.4f} bytes per token, {files} file{'s' * (files > 1)}")
    settings = {"DATA_PATH": str(folder), "VOCAB_SIZE": str(vocabulary.size)}
    if vocabulary.model:
        model = folder.parent.parent / "tokenizers" / f"{vocabulary.name}.model"
        settings["TOKENIZER_PATH"] = str(model)
    assignments = " ".join(f"{name}={shlex.quote(value)}" for name, value in settings.items())
    print(f"  next: {preset}{assignments} python train_gpt.py")


def run(args: argparse.Namespace) -> None:
    """Read the documents once to check and count them and once more to write their shards."""
    manifest = args.out / "manifest.json"
    read_manifest(manifest)
    vocabulary = given_vocabulary(args)
    try:
        with staging(args.out):
            pass  # tell now, not after an hour of work
    except OSError as error:
        raise InputError(f"--out: {args.out}: {error.strerror}; choose a writable folder") from None
    corpus = make_corpus(args)
    counts = survey(corpus)
    found = ", ".join(f"{counts[f'docs_{split}']:,} {split}" for split in (*SPLITS, "empty"))
    print(f"documents: {found} (skipped)", flush=True)
    if not vocabulary:
        size = args.vocab_size or EMBEDDED_VOCAB
        model = train_tokenizer(corpus, counts["bytes_train"], size)
        vocabulary = Vocabulary(f"{args.name}_{size}_bpe", model)
    embedded = [] if args.input else [Vocabulary(f"{args.name}_pure_byte_260")]
    for tokens in (vocabulary, *embedded):
        name = f"{args.name}_{tokens.variant}"
        folder = args.out / "datasets" / name
        stats = write_dataset(corpus, counts, tokens, folder, args)
        tokens.save(args.out / "tokenizers")
        merge_manifest(manifest, name, tokens, stats)
        summarise(folder, tokens, stats, "PRESET=cpu " if embedded else "")
    if embedded:
        print(f"\nxz -9e on the validation text: {xz_bits_per_byte(corpus):.4f} bits per byte")


def exit_status(action: Callable[[], None], if_interrupted: str, if_full: str = "") -> int:
    """Do it; return 0, 2 for what input, disk or network refuse, 130 when interrupted."""
    try:
        action()
    except (InputError, DataError, OSError) as error:
        full = isinstance(error, OSError) and error.errno == errno.ENOSPC
        print(f"error: {' '.join(str(error).split())}{if_full * full}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"error: interrupted; {if_interrupted}", file=sys.stderr)
        return 130
    return 0


def main(argv: list[str] | None = None) -> int:
    """Run the command line `argv` (default: the program's) and return its exit status."""
    return exit_status(
        lambda: run(parse_arguments(sys.argv[1:] if argv is None else argv)),
        "unfinished shards are removed",
    )


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # clean up as on Ctrl-C
    sys.exit(main())
