"""Turn documents into token shards for train_gpt.py.

INPUT files are .jsonl, .jsonl.zst or parts .jsonl.zst.NN (one JSON object with a string "text" per
line), or .txt (one document per file). Without INPUT the script makes the embedded corpus: the
texts of the Python installation, as tokens and as bytes. data/README.md describes the output.

Example:
    python data/prepare.py docs.jsonl --name mine --vocab-size 1024 --val-docs 1000
"""

import argparse
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
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from io import BytesIO
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import zstandard
from sentencepiece import SentencePieceProcessor, SentencePieceTrainer
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parent))

import common
from common import SPLITS, InputError

from train_gpt import BOS_ID, BYTE_VOCAB, FIRST_TEXT_ID, write_atomically

PAD_ID, EOS_ID, UNK_ID = 0, 2, 3
MAX_VOCAB = 1 << 16  # a shard stores a token in 16 bits
BYTE_VARIANT = f"byte{BYTE_VOCAB}"
EMBEDDED_NAME, EMBEDDED_VOCAB = "python", 1024
VAL_BYTES = 1_000_000  # minimum UTF-8 bytes of validation text that is selected by hash
SAMPLE_BYTES = 100_000_000  # approximate training text of a new tokenizer
SLICE_CHARS = 16_384  # the tokenizer's trainer skips long texts, so documents are cut into slices
BATCH_DOCUMENTS = 512  # documents encoded in one call

Document = tuple[str, str]  # place (for messages), text


# ---- Documents ----


def digest(text: str) -> bytes:
    """Returns the sha256 of the UTF-8 text. Documents with the same digest are copies."""
    return hashlib.sha256(text.encode()).digest()


def zstd_lines(path: Path, file: BinaryIO) -> Iterator[bytes]:
    """Yields the lines of a file of zstd frames. Raises InputError if it is damaged or cut."""
    decompressor = zstandard.ZstdDecompressor(max_window_size=1 << 31)
    frame, rest = decompressor.decompressobj(), b""
    try:
        while block := file.read(1 << 18):
            while block:
                if frame.eof:
                    frame = decompressor.decompressobj()
                *lines, rest = (rest + frame.decompress(block)).split(b"\n")
                yield from lines
                block = frame.unused_data
    except zstandard.ZstdError as error:
        raise InputError(f"{path}: damaged zstd data ({error}); download it again") from None
    if not frame.eof:
        raise InputError(f"{path}: truncated zstd data; download it again, or join its parts")
    yield rest


def parse_line(line: bytes) -> str:
    """Returns the "text" of a line of JSON. Raises ValueError."""
    record = json.loads(line.decode())
    text = record.get("text") if isinstance(record, dict) else None
    if not isinstance(text, str):
        raise ValueError(f"{record!r:.60} has no string")
    text.encode()  # fails if it has half a surrogate pair
    return text


def read_documents(paths: Iterable[Path]) -> Iterator[Document]:
    """Yields (place, text) of all documents, also of empty ones. Raises InputError."""
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
                if not line.strip():
                    continue
                place = f"{path}:{number}"
                try:
                    text = parse_line(line)
                except (ValueError, RecursionError) as error:
                    needed = 'need a JSON object with a string "text" in UTF-8'
                    raise InputError(f"{place}: {error}; {needed}") from None
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
                yield place, path.read_bytes()


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

    Raises InputError if a split is empty or a text is in both splits.
    """
    counts: Counter[str] = Counter()
    val_places: dict[bytes, str] = {}
    overlaps, example = 0, ""
    for split, place, text in tqdm(corpus, "reading", unit=" documents", disable=None):
        counts[f"docs_{split}"] += 1
        counts[f"bytes_{split}"] += len(text.encode())
        if split == "val":
            val_places[digest(text)] = place
        elif split == "train" and digest(text) in val_places:
            example = example or f"{place} equals {val_places[digest(text)]}"
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

    def encode(self, texts: list[str], workers: int) -> list[tuple[np.ndarray, bool]]:
        """Returns (tokens, uint16 [n]; whether they decode to the exact text) for each text."""
        if not self.model:
            data = (np.frombuffer(text.encode(), np.uint8) for text in texts)
            return [(octets.astype("<u2") + FIRST_TEXT_ID, True) for octets in data]
        ids = self.model.encode(texts, num_threads=workers)
        decoded = self.model.decode(ids, num_threads=workers)
        return [
            (np.array(i, dtype="<u2"), d == t) for i, d, t in zip(ids, decoded, texts, strict=True)
        ]

    def manifest_entry(self) -> dict[str, Any]:
        """Returns the description of the tokenizer; paths are relative to the manifest."""
        entry: dict[str, Any] = {
            "name": self.name,
            "kind": "sentencepiece_bpe" if self.model else "byte",
            "vocab_size": self.size,
            "bos_id": BOS_ID,
            "eos_id": EOS_ID,
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
        if not model or (path.exists() and path.read_bytes() == model.serialized_model_proto()):
            return
        rows = (f"{model.id_to_piece(i)}\t{model.get_score(i):g}\n" for i in range(self.size))
        folder.mkdir(parents=True, exist_ok=True)
        write_atomically(path.with_suffix(".vocab"), "".join(rows).encode())
        write_atomically(path, model.serialized_model_proto())


def load_tokenizer(path: Path) -> SentencePieceProcessor:
    """Returns the model in a file. Raises InputError if it cannot be the tokenizer of shards."""
    if path.suffix != ".model" or not path.is_file():
        raise InputError(f"--tokenizer: {path}: need an existing SentencePiece .model file")
    try:
        model = SentencePieceProcessor(model_proto=path.read_bytes())
    except RuntimeError:
        reason = "not a SentencePiece model; download it again"
        raise InputError(f"--tokenizer: {path}: {reason}") from None
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
    bos, inexact = np.array([BOS_ID], dtype="<u2"), 0
    documents = (document for document in corpus if document[0] != "empty")
    total = counts["docs_train"] + counts["docs_val"]
    with (
        common.staging_folder(folder) as temporary,
        tqdm(total=total, desc=folder.name, unit=" documents", disable=None) as bar,
    ):
        writers = {split: ShardWriter(temporary, split, args.shard_tokens) for split in SPLITS}
        while batch := list(itertools.islice(documents, BATCH_DOCUMENTS)):
            encoded = vocabulary.encode([text for _, _, text in batch], args.workers)
            for (split, place, _), (tokens, is_exact) in zip(batch, encoded, strict=True):
                if not (is_exact or args.input):
                    raise InputError(f"{place}: does not decode to its exact bytes")
                inexact += not is_exact
                writers[split].add(bos)
                writers[split].add(tokens)
            bar.update(len(batch))
        for writer in writers.values():
            writer.flush()
        publish(temporary, folder)
    if inexact:
        print(f"note: {inexact:,} documents do not decode to their exact bytes: the tokenizer")
        print("  changes some text, and bits per byte count the bytes of the decoded text")
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
    add = parser.add_argument
    add("input", nargs="*", type=Path, metavar="INPUT", help="documents; none: embedded corpus")
    add("--variant", help="sp<V> or byte260; default: sp<V> of the tokenizer")
    add_one = parser.add_mutually_exclusive_group().add_argument
    add_one("--tokenizer", type=Path, metavar="MODEL", help="an existing SentencePiece .model")
    add_one("--vocab-size", type=size, metavar="V", help="train a tokenizer of V pieces")
    add_one = parser.add_mutually_exclusive_group().add_argument
    add_one("--val-docs", type=count, metavar="N", help="validation: the first N documents")
    add_one("--val-file", nargs="+", type=Path, metavar="FILE", help="validation: these files")
    add("--shard-tokens", type=count, default=10**8, metavar="N", help="default: 10^8")
    add("--out", type=Path, metavar="DIR", help="parent of datasets/, tokenizers/; default: data/")
    add("--name", help="dataset NAME_VARIANT; default: last part of --out")
    add("--workers", type=workers, default=cores, metavar="N", help="threads; default: all cores")
    args = parser.parse_args(argv)
    check_arguments(args)
    if not args.input:
        args.name = EMBEDDED_NAME
    elif not args.name:
        args.name = args.out.resolve().name if args.out else ""
    if not re.fullmatch(r"\w[\w.-]*", args.name):
        raise InputError(f"--name: {args.name!r}: need letters, digits, _ . and -")
    args.out = args.out or common.DATA
    return args


def check_arguments(args: argparse.Namespace) -> None:
    """Raises InputError if options contradict each other or an input file cannot be read."""
    is_bytes = args.variant == BYTE_VARIANT
    if not args.input:
        for option in ("variant", "tokenizer", "vocab_size", "val_docs", "val_file", "name"):
            if getattr(args, option) is not None:
                flag = "--" + option.replace("_", "-")
                raise InputError(f"{flag}: needs INPUT; the embedded corpus does not take it")
    elif is_bytes == bool(args.tokenizer or args.vocab_size):
        needed = f"--tokenizer, --vocab-size or --variant {BYTE_VARIANT}"
        raise InputError(f"--variant: {args.variant}: give exactly one of {needed}")
    for path in (*args.input, *(args.val_file or ())):
        if not re.search(r"\.(txt|jsonl|jsonl\.zst(\.\d+)?)$", path.name):
            raise InputError(f"{path}: unknown suffix; need .jsonl, .jsonl.zst[.NN] or .txt")
        if not path.is_file():
            raise InputError(f"{path}: no such file; check its name")


def given_vocabulary(args: argparse.Namespace) -> Vocabulary | None:
    """Returns the vocabulary, or None if a tokenizer must be trained. Raises InputError."""
    if args.variant == BYTE_VARIANT:
        return Vocabulary(f"{args.name}_pure_byte_260")
    vocabulary, size = None, args.vocab_size or EMBEDDED_VOCAB
    if args.tokenizer:
        vocabulary = Vocabulary(args.tokenizer.stem, load_tokenizer(args.tokenizer))
        size = vocabulary.size
        target = args.out / "tokenizers" / args.tokenizer.name
        if target.exists() and target.read_bytes() != args.tokenizer.read_bytes():
            raise InputError(f"--tokenizer: {target} is a different one; rename one of them")
    if args.variant not in (None, f"sp{size}"):
        raise InputError(f"--variant: {args.variant}: {size} pieces need sp{size}")
    return vocabulary


def make_corpus(args: argparse.Namespace) -> Corpus:
    """Returns the documents that the arguments name, with the rule for validation."""
    read: Callable[[], Iterable[Document]] = partial(read_documents, args.input)
    if args.val_file:
        return Corpus(read, read_val=partial(read_documents, args.val_file))
    if args.val_docs:
        return Corpus(read, val_count=args.val_docs)
    if not args.input:
        read = partial(iter, embedded_documents())
    print(f"validation: documents in the order of their sha256, at least {VAL_BYTES:,} bytes")
    return Corpus(read, val_cut=find_hash_cut(read()))


def xz_bits_per_byte(corpus: Corpus) -> float:
    """Returns the bits per byte of validation text after `xz -9e`, a baseline for a model."""
    text = b"".join(text.encode() for split, _, text in corpus if split == "val")
    return 8 * len(lzma.compress(text, preset=9 | lzma.PRESET_EXTREME)) / len(text)


def print_summary(folder: Path, vocabulary: Vocabulary, stats: dict[str, int], preset: str) -> None:
    """Prints the counts of a dataset and the command that trains on it."""
    print(f"\n{folder}")
    for split in SPLITS:
        docs, size, tokens = (stats[f"{key}_{split}"] for key in ("docs", "bytes", "tokens"))
        print(f"  {split:5} {docs:,} documents, {size:,} bytes, {tokens:,} tokens")
    settings: dict[str, Any] = {"PRESET": preset} if preset else {}
    settings |= {"DATA_PATH": folder, "VOCAB_SIZE": vocabulary.size}
    if vocabulary.model:
        model = folder.parent.parent / "tokenizers" / f"{vocabulary.name}.model"
        settings["TOKENIZER_PATH"] = model
    print(f"  next: {common.training_command(settings)}")


def run(args: argparse.Namespace) -> None:
    """Reads the documents once to check and count them and again to write their shards."""
    manifest = args.out / "manifest.json"
    common.read_manifest(manifest)
    vocabulary = given_vocabulary(args)
    common.check_writable(args.out)
    corpus = make_corpus(args)
    counts = count_documents(corpus)
    found = ", ".join(f"{counts[f'docs_{split}']:,} {split}" for split in (*SPLITS, "empty"))
    print(f"documents: {found} (skipped)", flush=True)
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
        print(f"\nxz -9e on the validation text: {bits:.4f} bits per byte")


def main(argv: list[str]) -> int:
    """Runs the command line; returns its exit status."""
    return common.exit_status(lambda: run(parse_arguments(argv)), "unfinished shards are removed")


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # remove temporary files as on Ctrl-C
    sys.exit(main(sys.argv[1:]))
