"""Turn documents into token shards for train_gpt.py.

INPUT is .jsonl, .ndjson or .json (JSON objects with a string "text", one per line or in one list)
or .txt (one document per file), each also .gz, .xz or .zst; a folder of such files; or @LIST, a
file with one path per line. Without INPUT the script makes the embedded corpus: the texts of the
Python installation, as tokens and as bytes. data/README.md describes the output.

Example:
    python data/prepare.py docs.jsonl --name mine --vocab-size 1024 --val-docs 1000
"""

import argparse
import codecs
import hashlib
import itertools
import json
import lzma
import math
import os
import re
import signal
import sys
import sysconfig
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from io import BytesIO
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import zstandard
from sentencepiece import SentencePieceProcessor, SentencePieceTrainer
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parent))

import common
from common import SPLITS, InputError

from train_gpt import BOS_ID, BYTE_VOCAB, FIRST_TEXT_ID, Hyperparameters, write_atomically

PAD_ID, EOS_ID, UNK_ID = 0, 2, 3
MAX_VOCAB = 1 << 16  # a shard stores a token in 16 bits
BYTE_VARIANT = f"byte{BYTE_VOCAB}"
EMBEDDED_NAME, EMBEDDED_VOCAB = "python", 1024
VAL_BYTES = 1_000_000  # minimum UTF-8 bytes of validation text that is selected by hash
SAMPLE_BYTES = 100_000_000  # approximate training text of a new tokenizer
SLICE_CHARS = 16_384  # the tokenizer's trainer skips long texts, so documents are cut into slices
BATCH_DOCUMENTS = 512  # documents encoded in one call

INPUT_NAME = re.compile(
    r"\.(?P<format>jsonl|ndjson|json|txt)(\.(?P<packing>gz|xz|zst))?(\.\d+)?$", re.IGNORECASE
)
SUFFIXES = ".jsonl, .ndjson, .json or .txt, also with .gz, .xz or .zst"
DECOMPRESSORS: dict[str, Callable[[], Any]] = {
    "gz": partial(zlib.decompressobj, wbits=31),
    "xz": lzma.LZMADecompressor,
    "zst": lambda: zstandard.ZstdDecompressor(max_window_size=1 << 31).decompressobj(),
}
PACKING_MARKS = {"gz": b"\x1f\x8b", "xz": b"\xfd7zXZ\0", "zst": b"\x28\xb5\x2f\xfd"}

JSON_NEEDED = 'need JSON objects with a string "text" in UTF-8, one per line or in one list'

Document = tuple[str, str]  # place (for messages), text


# ---- Documents ----


def digest(text: str) -> bytes:
    """Returns the sha256 of the UTF-8 text. Documents with the same digest are copies."""
    return hashlib.sha256(text.encode()).digest()


def input_kind(path: Path) -> tuple[str, str]:
    """Returns the format and the compression ("" for none) of an input file by its suffixes.

    Raises InputError if they are unknown.
    """
    match = INPUT_NAME.search(path.name)
    if not match:
        raise InputError(f"{path}: unknown suffix; need {SUFFIXES}")
    return match["format"].lower(), (match["packing"] or "").lower()


def find_files(folder: Path) -> list[Path]:
    """Returns the input files below a folder in the order of their names; hidden ones are left out.

    Raises InputError if there are none, or if a folder is reached twice through links, and OSError
    if one is unreadable.
    """

    def fail(error: OSError) -> NoReturn:
        raise error

    files: list[Path] = []
    others, seen = 0, set()
    for place, folders, names in os.walk(folder, onerror=fail, followlinks=True):
        real = os.path.realpath(place)
        if real in seen:
            raise InputError(f"{place}: a link to a folder that was read already; remove the link")
        seen.add(real)
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        shown = sorted(name for name in names if not name.startswith("."))
        found = [Path(place, name) for name in shown if INPUT_NAME.search(name)]
        files, others = files + found, others + len(shown) - len(found)
    if not files:
        raise InputError(f"{folder}: no input file in this folder; need {SUFFIXES}")
    if others:
        common.say(f"note: {folder}: {others:,} files with other suffixes are left out")
    return files


def listed_paths(path: Path) -> list[Path]:
    """Returns the paths in a file, one per line. Raises InputError if there are none."""
    data = common.read_bytes(path).removeprefix(codecs.BOM_UTF8)
    paths = [Path(os.fsdecode(line)) for line in data.splitlines() if line.strip()]
    if not paths or b"\0" in data:
        raise InputError(f"{path}: need one path per line, in UTF-8 without zero bytes")
    return paths


def input_files(paths: Iterable[Path]) -> list[Path]:
    """Returns the files that arguments name: files, those of folders, and those of @LIST files.

    Raises InputError if one has an unknown suffix or is given twice, OSError if one is unreadable.
    """
    listed: list[Path] = []
    for path in paths:
        listed += listed_paths(Path(str(path)[1:])) if str(path).startswith("@") else [path]
    files: dict[str, Path] = {}
    for path in listed:
        for file in find_files(path) if path.is_dir() else [path]:
            input_kind(file)  # raises InputError
            if file.exists() and not file.is_file():
                raise InputError(f"{file}: not a regular file, but it is read twice; write a file")
            file.open("rb").close()
            if files.setdefault(os.path.realpath(file), file) is not file:
                raise InputError(f"{file}: is given twice; give it once")
    return list(files.values())


def read_blocks(path: Path, packing: str) -> Iterator[bytes]:
    """Yields the decompressed content of a file. Raises InputError if it is damaged or cut."""
    with common.add_path_to_errors(path), path.open("rb") as file:
        start = file.peek(6)
        found = [kind for kind, mark in PACKING_MARKS.items() if start.startswith(mark)]
        if found and found != [packing]:
            raise InputError(f"{path}: holds .{found[0]} data; correct its suffix, or unpack it")
        blocks = iter(partial(file.read, 1 << 18), b"")
        if not packing:
            yield from blocks
            return
        frame = DECOMPRESSORS[packing]()
        try:
            for block in blocks:
                rest = block.lstrip(b"\0") if frame.eof else block  # zeros may follow a frame
                while rest:
                    if frame.eof:
                        frame = DECOMPRESSORS[packing]()
                    yield frame.decompress(rest)
                    rest = frame.unused_data.lstrip(b"\0")
        except (zlib.error, lzma.LZMAError, zstandard.ZstdError) as error:
            remedy = "copy it again, or correct its suffix"
            raise InputError(f"{path}: damaged .{packing} data ({error}); {remedy}") from None
        if not frame.eof:
            raise InputError(f"{path}: truncated .{packing} data; copy it again, or join its parts")


def split_lines(blocks: Iterable[bytes]) -> Iterator[bytes]:
    """Yields the lines of a file without their ends."""
    parts: list[bytes] = []  # of a line that has not ended
    for block in blocks:
        first, *others = block.split(b"\n")
        parts.append(first)
        for other in others:
            yield b"".join(parts)
            parts = [other]
    yield b"".join(parts)


def decode_text(place: str, data: bytes) -> str:
    """Returns UTF-8 text without its byte order mark. Raises InputError for another encoding."""
    encoding, reason = json.detect_encoding(data).upper(), "by its first bytes"
    if encoding.startswith("UTF-8"):
        try:
            return data.decode("utf-8-sig")
        except UnicodeDecodeError as error:
            encoding, reason = "WINDOWS-1252", str(error)
    raise InputError(f"{place}: perhaps {encoding}, not UTF-8 ({reason}); convert it to UTF-8")


def parse_json(place: str, data: bytes) -> Any:
    """Returns the value of a JSON text. Raises InputError."""
    try:
        return json.loads(decode_text(place, data))
    except (ValueError, RecursionError) as error:
        raise InputError(f"{place}: {error}; {JSON_NEEDED}") from None


def json_records(path: Path, lines: Iterator[bytes]) -> Iterator[tuple[str, Any]]:
    """Yields (place, record) of every line, or of the one list that the file consists of."""
    is_first = True
    for number, line in enumerate(lines, 1):
        start = line.removeprefix(codecs.BOM_UTF8).strip()
        if is_first and start.startswith(b"["):
            records = parse_json(str(path), b"\n".join([line, *lines]))
            yield from ((f"{path}: item {i}", record) for i, record in enumerate(records, 1))
        elif start:
            is_first = False
            yield f"{path}:{number}", parse_json(f"{path}:{number}", line)


def read_documents(paths: Iterable[Path]) -> Iterator[Document]:
    """Yields (place, text) of all documents, also of empty ones. Raises InputError."""
    for path in paths:
        file_format, packing = input_kind(path)
        blocks = read_blocks(path, packing)
        if file_format == "txt":
            yield str(path), decode_text(str(path), b"".join(blocks))
            continue
        for place, record in json_records(path, split_lines(blocks)):
            text = record.get("text") if isinstance(record, dict) else None
            if not isinstance(text, str):
                raise InputError(f"{place}: {record!r:.60} has no string; {JSON_NEEDED}")
            if not text.isascii() and re.search("[\ud800-\udfff]", text):
                raise InputError(f"{place}: half a surrogate pair; {JSON_NEEDED}")
            yield place, text


def library_files() -> Iterator[tuple[str, bytes]]:
    """Yields (name, bytes) of the standard library's modules, without tests and code tables."""
    library = Path(sysconfig.get_path("stdlib"))
    skipped = {"test", "tests", "idle_test", "__pycache__", "encodings", "pydoc_data"}
    tables = {"html/entities.py", "stringprep.py"}
    for folder, subfolders, names in os.walk(library):
        # Other names are not packages of the library: site-packages, lib-dynload.
        subfolders[:] = [s for s in sorted(subfolders) if s.isidentifier() and s not in skipped]
        for path in (Path(folder, name) for name in sorted(names)):
            place = path.relative_to(library).as_posix()
            if path.match("*.py") and not path.match("_sysconfig*") and place not in tables:
                yield place, common.read_bytes(path)


def embedded_documents() -> list[Document]:
    """Returns the modules and the language reference of this Python, in the order of digests.

    Copies and texts that do not decode exactly are left out. Raises InputError if the language
    reference is not installed.
    """
    try:
        from pydoc_data.topics import topics
    except ImportError:
        reason = "this Python was installed without its language reference, pydoc_data"
        raise InputError(f"INPUT: {reason}; give documents, or use another Python") from None
    reference = ((f"topic {name}", text.encode()) for name, text in topics.items())
    documents: dict[bytes, Document] = {}
    for place, data in (*library_files(), *reference):
        text = data.decode(errors="replace")
        # SentencePiece represents a space by U+2581, so U+2581 itself decodes to a space.
        if text.encode() == data and "\u2581" not in text and "\0" not in text:
            documents.setdefault(digest(text), (place, text))
    return [documents[key] for key in sorted(documents)]


# ---- Splits ----


@dataclass(frozen=True)
class Corpus:
    """Documents and the rule that selects the validation split. Every iteration reads them again.

    Validation are all documents of `read_val()`, the first `val_count` documents of `read()` that
    are not empty, and the documents of `read()` whose digest is at most `val_cut`.
    """

    read: Callable[[], Iterable[Document]]
    read_val: Callable[[], Iterable[Document]] = tuple
    val_count: int = 0
    val_cut: bytes = b""

    def __iter__(self) -> Iterator[tuple[str, str, str]]:
        """Yields (split, place, text) in input order; split is "val", "train" or "empty"."""
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


def find_hash_cut(documents: Iterable[Document]) -> bytes:
    """Returns the digest up to which, in the order of digests, documents have VAL_BYTES of text.

    Copies have the same digest, so they are in the same split. Raises InputError if no document
    remains for training.
    """
    sizes = {digest(text): len(text.encode()) for _, text in documents if text.strip()}
    total = 0
    for key in sorted(sizes)[:-1]:
        total += sizes[key]
        if total >= VAL_BYTES:
            return key
    raise InputError(
        f"INPUT: {sum(sizes.values()):,} bytes of text are too few for {VAL_BYTES:,} bytes of "
        "validation and a training split; give more, or use --val-docs or --val-file"
    )


def count_documents(corpus: Corpus) -> Counter[str]:
    """Returns `docs_train`, `bytes_val` and so on.

    Tells of copies within a split. Raises InputError if a split is empty or a text is in both.
    """
    counts, copies = Counter[str](), Counter[str]()
    val_places: dict[bytes, str] = {}
    train_digests: set[bytes] = set()
    overlaps, example = 0, ""
    for split, place, text in tqdm(corpus, "reading", unit=" documents", disable=None):
        counts[f"docs_{split}"] += 1
        counts[f"bytes_{split}"] += len(text.encode())
        key = digest(text)
        if split == "val":
            copies[split] += key in val_places
            val_places.setdefault(key, place)
        elif split == "train":
            copies[split] += key[:8] in train_digests
            train_digests.add(key[:8])
            if key in val_places:
                example = example or f"{place} equals {val_places[key]}"
                overlaps += 1
    if overlaps:
        raise InputError(
            f"validation: {overlaps:,} training documents are also in the validation split "
            f"({example}); remove them, or leave --val-docs and --val-file out"
        )
    for split in SPLITS:
        if not counts[f"docs_{split}"]:
            found = f"{counts['docs_train'] + counts['docs_val']:,}"
            raise InputError(f"no {split} documents among the {found} of the input; give more")
        if copies[split]:
            count = f"{copies[split]:,} of {counts[f'docs_{split}']:,} {split} documents"
            common.say(f"note: {count} are copies of others; they are kept")
    return counts


# ---- Vocabularies ----


@dataclass(frozen=True)
class Vocabulary:
    """The tokens of a dataset: those of a SentencePiece model, or without a model the bytes."""

    name: str  # in the manifest; the model's file name
    model: SentencePieceProcessor | None = None

    @property
    def size(self) -> int:
        """Returns the number of token ids."""
        return self.model.vocab_size() if self.model else BYTE_VOCAB

    @property
    def variant(self) -> str:
        """Returns the last part of the dataset's name."""
        return f"sp{self.size}" if self.model else BYTE_VARIANT

    @property
    def unknown_id(self) -> int:
        """Returns the id of text that has no token."""
        return self.model.unk_id() if self.model else UNK_ID

    def encode(self, texts: list[str], workers: int) -> list[tuple[np.ndarray, str]]:
        """Returns (tokens, uint16 [n]; the text that they decode to) for each text."""
        if not self.model:
            octets = (np.frombuffer(text.encode(), np.uint8) for text in texts)
            ids = [data.astype("<u2") + FIRST_TEXT_ID for data in octets]
            return list(zip(ids, texts, strict=True))
        ids = self.model.encode(texts, num_threads=workers)
        decoded = self.model.decode(ids, num_threads=workers)
        return [(np.array(i, dtype="<u2"), text) for i, text in zip(ids, decoded, strict=True)]

    def manifest_entry(self) -> dict[str, Any]:
        """Returns the description of the tokenizer; paths are relative to the manifest."""
        entry: dict[str, Any] = {
            "name": self.name,
            "kind": "sentencepiece_bpe" if self.model else "byte",
            "vocab_size": self.size,
            "bos_id": BOS_ID,
            "eos_id": self.model.eos_id() if self.model else EOS_ID,
            "recommended_bigram_vocab_size": math.ceil(self.size / 128) * 128 * 5,
        }
        if self.model:
            entry["model_path"] = f"tokenizers/{self.name}.model"
            entry["vocab_path"] = f"tokenizers/{self.name}.vocab"
        return entry

    def dataset_entry(self, name: str, stats: dict[str, int]) -> dict[str, Any]:
        """Returns the description of the dataset `name` that has these tokens."""
        tokenizer = self.manifest_entry()
        shared = ("vocab_size", "bos_id", "eos_id", "recommended_bigram_vocab_size")
        return {
            "name": name,
            "tokenizer_name": self.name,
            "tokenizer_kind": tokenizer["kind"],
            "path": f"datasets/{name}",
            "train_glob": f"datasets/{name}/fineweb_train_*.bin",
            "val_glob": f"datasets/{name}/fineweb_val_*.bin",
            **{key: tokenizer[key] for key in shared},
            "stats": stats,
        }

    def save(self, folder: Path) -> None:
        """Writes NAME.model and NAME.vocab (piece, tab, score) unless this model is there."""
        model, path = self.model, folder / f"{self.name}.model"
        data = model.serialized_model_proto() if model else b""
        if not model or (path.exists() and common.read_bytes(path) == data):
            return
        rows = (f"{model.id_to_piece(i)}\t{model.get_score(i):g}\n" for i in range(self.size))
        folder.mkdir(parents=True, exist_ok=True)
        write_atomically(path.with_suffix(".vocab"), "".join(rows).encode())
        write_atomically(path, data)


def load_tokenizer(path: Path) -> SentencePieceProcessor:
    """Returns the model in a file. Raises InputError if it cannot be the tokenizer of shards."""
    if path.suffix.lower() != ".model" or not path.is_file():
        raise InputError(f"--tokenizer: {path}: need an existing SentencePiece .model file")
    data = common.read_bytes(path)
    try:
        model = SentencePieceProcessor(model_proto=data) if data else None
    except RuntimeError:
        model = None
    if not model:
        reason = f"{len(data):,} bytes, but not a SentencePiece model; make or download it again"
        raise InputError(f"--tokenizer: {path}: {reason}")
    if model.vocab_size() > MAX_VOCAB or model.bos_id() != BOS_ID:
        raise InputError(
            f"--tokenizer: {path}: {model.vocab_size():,} pieces and BOS id {model.bos_id()}; "
            f"shards need at most {MAX_VOCAB:,} pieces and BOS id {BOS_ID}"
        )
    return model


def sample_slices(corpus: Corpus, train_bytes: int) -> Iterator[str]:
    """Yields slices of the training documents; of a large corpus those of a sample by digest."""
    threshold = SAMPLE_BYTES / train_bytes * 2**64
    for split, _, text in tqdm(corpus, "tokenizer", unit=" documents", disable=None):
        if split == "train" and int.from_bytes(digest(text)[-8:], "big") < threshold:
            for start in range(0, len(text), SLICE_CHARS):
                yield text[start : start + SLICE_CHARS]


def train_tokenizer(corpus: Corpus, train_bytes: int, size: int) -> SentencePieceProcessor:
    """Returns a BPE model of exactly `size` pieces, trained on the training split.

    With identity normalization, kept whitespace and byte fallback every text without U+2581
    decodes to its exact bytes. Raises InputError if the text does not give `size` pieces.
    """
    data = BytesIO()
    try:
        SentencePieceTrainer.train(
            sentence_iterator=sample_slices(corpus, train_bytes),
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


# ---- Shards ----


class ShardWriter:
    """Writes the token stream of one split as files of `shard_tokens` tokens."""

    def __init__(self, folder: Path, split: str, shard_tokens: int) -> None:
        self.folder, self.split = folder, split
        self.buffer = np.empty(shard_tokens, dtype="<u2")
        self.used = self.files = self.tokens = 0

    def add(self, tokens: np.ndarray) -> None:
        """Appends tokens [n]; they may continue in the next shard."""
        while len(tokens):
            part = tokens[: len(self.buffer) - self.used]
            self.buffer[self.used : self.used + len(part)] = part
            self.used += len(part)
            self.tokens += len(part)
            tokens = tokens[len(part) :]
            if self.used == len(self.buffer):
                self.flush()

    def flush(self) -> None:
        """Writes the tokens that are not in a file yet, if any."""
        if self.used:
            path = self.folder / f"fineweb_{self.split}_{self.files:06d}.bin"
            common.write_shard(path, self.buffer[: self.used])
            self.files, self.used = self.files + 1, 0


def publish(temporary: Path, folder: Path) -> None:
    """Moves finished shards into `folder` and removes those of an earlier, longer run."""
    names = {path.name for path in temporary.iterdir()}
    for name in sorted(names):
        (temporary / name).replace(folder / name)
    for path in folder.glob("fineweb_*_*.bin"):
        if path.name not in names:
            path.unlink()


def write_dataset(
    corpus: Corpus,
    counts: Counter[str],
    vocabulary: Vocabulary,
    folder: Path,
    args: argparse.Namespace,
) -> dict[str, int]:
    """Writes all shards, moves them into `folder` at the end; returns the manifest's stats.

    `counts` are those of `count_documents`. Raises InputError if a document of the embedded corpus
    does not decode to its exact bytes.
    """
    bos, inexact, unknown = np.array([BOS_ID], dtype="<u2"), Counter[str](), Counter[str]()
    documents = (document for document in corpus if document[0] != "empty")
    total = counts["docs_train"] + counts["docs_val"]
    with (
        common.staging_folder(folder) as temporary,
        tqdm(total=total, desc=folder.name, unit=" documents", disable=None) as bar,
    ):
        writers = {split: ShardWriter(temporary, split, args.shard_tokens) for split in SPLITS}
        while batch := list(itertools.islice(documents, BATCH_DOCUMENTS)):
            encoded = vocabulary.encode([text for _, _, text in batch], args.workers)
            for (split, place, text), (tokens, decoded) in zip(batch, encoded, strict=True):
                if decoded != text:
                    if not args.input:
                        raise InputError(f"{place}: does not decode to its exact bytes")
                    sizes = {"text": len(text.encode()), "decoded": len(decoded.encode())}
                    inexact.update(docs=1, **sizes)
                unknown[split] += int((tokens == vocabulary.unknown_id).sum())
                writers[split].add(bos)
                writers[split].add(tokens)
            bar.update(len(batch))
        for writer in writers.values():
            writer.flush()
        publish(temporary, folder)
    if inexact:
        common.say(
            f"note: {inexact['docs']:,} documents do not decode to their exact bytes, but to "
            f"{inexact['decoded']:,} bytes instead of {inexact['text']:,}: the tokenizer changes "
            "some text, and bits per byte count the bytes of the decoded text"
        )
    limit = Hyperparameters.max_unknown_fraction
    for split, writer in writers.items():
        if unknown[split]:
            is_refused = split == "val" and unknown[split] > limit * writer.tokens
            verdict = "will not train on this" if is_refused else "accepts this"
            common.say(
                f"warning: {unknown[split]:,} of {writer.tokens:,} {split} tokens are unknown and "
                f"count 0 bytes; train_gpt.py {verdict} (limit: {limit:.1%} of validation); "
                "a tokenizer with byte fallback has none"
            )
    stats = {key: counts[key] for key in sorted(counts) if not key.endswith("_empty")}
    for split, writer in writers.items():
        stats |= {f"tokens_{split}": writer.tokens, f"files_{split}": writer.files}
    for key in ("docs", "bytes", "tokens", "files"):
        stats[f"{key}_total"] = stats[f"{key}_train"] + stats[f"{key}_val"]
    return stats


# ---- Command line ----


def parse_arguments(argv: list[str]) -> argparse.Namespace:
    """Returns the arguments with `out` and `name` filled in. Raises InputError."""
    parser, cores = common.Parser(__doc__), os.cpu_count() or 1
    count = common.integer_between(1, common.MAX_SHARD_TOKENS)
    size = common.integer_between(BYTE_VOCAB + 1, MAX_VOCAB)
    workers = common.integer_between(1, 1024)
    add, path = parser.add_argument, common.path_argument
    add("input", nargs="*", type=path, metavar="INPUT", help="files, folders, @LIST")
    add("--variant", help="sp<V> or byte260; default: sp<V> of the tokenizer")
    add_one = parser.add_mutually_exclusive_group().add_argument
    add_one("--tokenizer", type=path, metavar="MODEL", help="an existing SentencePiece .model")
    add_one("--vocab-size", type=size, metavar="V", help="train a tokenizer of V pieces")
    add_one = parser.add_mutually_exclusive_group().add_argument
    add_one("--val-docs", type=count, metavar="N", help="validation: the first N documents")
    add_one("--val-file", nargs="+", type=path, metavar="FILE", help="validation: these files")
    add("--shard-tokens", type=count, default=10**8, metavar="N", help="default: 10^8")
    add("--out", type=path, metavar="DIR", help="parent of datasets/, tokenizers/; default: data/")
    add("--name", help="dataset NAME_VARIANT; default: last part of --out")
    add("--workers", type=workers, default=cores, metavar="N", help="threads; default: all cores")
    args = parser.parse_args(argv)
    check_arguments(args)
    if args.input:
        args.input = input_files(args.input)
        args.val_file = input_files(args.val_file or ())
    if not args.input:
        args.name = EMBEDDED_NAME
    elif not args.name:
        args.name = Path(os.path.realpath(args.out)).name if args.out else ""
    if not re.fullmatch(r"\w[\w.-]*", args.name):
        raise InputError(f"--name: {args.name!r}: need letters, digits, _ . and -")
    args.out = args.out or common.DATA
    return args


def check_arguments(args: argparse.Namespace) -> None:
    """Raises InputError if options contradict each other."""
    is_bytes = args.variant == BYTE_VARIANT
    if not args.input:
        for option in ("variant", "tokenizer", "vocab_size", "val_docs", "val_file", "name"):
            if getattr(args, option) is not None:
                flag = "--" + option.replace("_", "-")
                raise InputError(f"{flag}: needs INPUT; the embedded corpus does not take it")
    elif is_bytes == bool(args.tokenizer or args.vocab_size):
        needed = f"--tokenizer, --vocab-size or --variant {BYTE_VARIANT}"
        raise InputError(f"--variant: {args.variant}: give exactly one of {needed}")


def given_vocabulary(args: argparse.Namespace) -> Vocabulary | None:
    """Returns the vocabulary, or None if a tokenizer must be trained. Raises InputError."""
    if args.variant == BYTE_VARIANT:
        return Vocabulary(f"{args.name}_pure_byte_260")
    vocabulary, size = None, args.vocab_size or EMBEDDED_VOCAB
    if args.tokenizer:
        vocabulary = Vocabulary(args.tokenizer.stem, load_tokenizer(args.tokenizer))
        size = vocabulary.size
        target = args.out / "tokenizers" / args.tokenizer.name
        given = common.read_bytes(args.tokenizer)
        if target.exists() and common.read_bytes(target) != given:
            raise InputError(f"--tokenizer: {target} is a different one; rename one of them")
    if args.variant not in (None, f"sp{size}"):
        raise InputError(f"--variant: {args.variant}: {size} pieces need sp{size}")
    return vocabulary


def check_targets(args: argparse.Namespace, vocabulary: Vocabulary | None) -> None:
    """Raises InputError if a file of the datasets or of the tokenizer cannot be written."""
    size = args.vocab_size or EMBEDDED_VOCAB
    variant = vocabulary.variant if vocabulary else f"sp{size}"
    for name in [variant] if args.input else [variant, BYTE_VARIANT]:
        folder = args.out / "datasets" / f"{args.name}_{name}"
        common.check_writable(folder, folder.glob("fineweb_*_*.bin"))
    model = vocabulary.name if vocabulary else f"{args.name}_{size}_bpe"
    folder = args.out / "tokenizers"
    common.check_writable(folder, [folder / f"{model}.model", folder / f"{model}.vocab"])


def make_corpus(args: argparse.Namespace) -> Corpus:
    """Returns the documents that the arguments name, with the rule for validation."""
    read: Callable[[], Iterable[Document]] = partial(read_documents, args.input)
    if args.val_file:
        return Corpus(read, read_val=partial(read_documents, args.val_file))
    if args.val_docs:
        return Corpus(read, val_count=args.val_docs)
    if not args.input:
        read = partial(iter, embedded_documents())
    common.say(f"validation: documents in the order of their sha256, at least {VAL_BYTES:,} bytes")
    return Corpus(read, val_cut=find_hash_cut(read()))


def xz_bits_per_byte(corpus: Corpus) -> float:
    """Returns the bits per byte of validation text after `xz -9e`, a baseline for a model."""
    text = b"".join(text.encode() for split, _, text in corpus if split == "val")
    return 8 * len(lzma.compress(text, preset=9 | lzma.PRESET_EXTREME)) / len(text)


def print_summary(folder: Path, vocabulary: Vocabulary, stats: dict[str, int], preset: str) -> None:
    """Prints the counts of a dataset and the command that trains on it."""
    common.say(f"\n{folder}")
    for split in SPLITS:
        docs, size, tokens = (stats[f"{key}_{split}"] for key in ("docs", "bytes", "tokens"))
        common.say(f"  {split:5} {docs:,} documents, {size:,} bytes, {tokens:,} tokens")
    settings: dict[str, Any] = {"PRESET": preset} if preset else {}
    settings |= {"DATA_PATH": folder, "VOCAB_SIZE": vocabulary.size}
    if vocabulary.model:
        model = folder.parent.parent / "tokenizers" / f"{vocabulary.name}.model"
        settings["TOKENIZER_PATH"] = model
    common.say(f"  next: {common.training_command(settings)}")


def run(args: argparse.Namespace) -> None:
    """Reads the documents once to check and count them and again to write their shards."""
    manifest = args.out / "manifest.json"
    common.read_manifest(manifest)
    vocabulary = given_vocabulary(args)
    check_targets(args, vocabulary)
    corpus = make_corpus(args)
    counts = count_documents(corpus)
    found = ", ".join(f"{counts[f'docs_{split}']:,} {split}" for split in (*SPLITS, "empty"))
    common.say(f"documents: {found} (skipped)")
    if not vocabulary:
        size = args.vocab_size or EMBEDDED_VOCAB
        model = train_tokenizer(corpus, counts["bytes_train"], size)
        vocabulary = Vocabulary(f"{args.name}_{size}_bpe", model)
    vocabularies = [vocabulary]
    if not args.input:
        vocabularies.append(Vocabulary(f"{args.name}_pure_byte_260"))
    for vocabulary in vocabularies:
        name = f"{args.name}_{vocabulary.variant}"
        folder = args.out / "datasets" / name
        stats = write_dataset(corpus, counts, vocabulary, folder, args)
        vocabulary.save(args.out / "tokenizers")
        common.merge_manifest(
            manifest, vocabulary.manifest_entry(), vocabulary.dataset_entry(name, stats)
        )
        print_summary(folder, vocabulary, stats, preset="" if args.input else "cpu")
    if not args.input:
        bits = xz_bits_per_byte(corpus)
        common.say(f"\nxz -9e on the validation text: {bits:.4f} bits per byte")


def main(argv: list[str]) -> int:
    """Runs the command line; returns its exit status."""
    return common.exit_status(lambda: run(parse_arguments(argv)), "unfinished shards are removed")


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # remove temporary files as on Ctrl-C
    sys.exit(main(sys.argv[1:]))
