"""Convert token shards of a SentencePiece vocabulary into shards of bytes of the same names.

SOURCE is a folder data/datasets/NAME_spV; its tokenizer is found in data/tokenizers/ by its name.
The bytes are those of the text that the tokens decode to, so the bits per byte of a model of the
bytes and of a model of the tokens refer to the same number of bytes. A second call checks the
existing shards and converts the missing ones. data/README.md describes the files.

Example:
    python data/to_bytes.py data/datasets/fineweb10B_sp1024
"""

import argparse
import fnmatch
import os
import re
import signal
import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from sentencepiece import SentencePieceProcessor
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parent))

import common
from common import SPLITS, InputError
from prepare import BYTE_VARIANT, Vocabulary, load_tokenizer

from train_gpt import (
    BOS_ID,
    BYTE_VOCAB,
    FIRST_TEXT_ID,
    ByteTable,
    TokenStream,
    read_shard,
    refuse_duplicates,
)

CHUNK_TOKENS = 1 << 18  # tokens converted at once, so that the arrays fit the caches
CHUNK_TEXTS = 4  # texts of a chunk, drawn at random, that are compared with the decoder's


@dataclass(frozen=True)
class Shard:
    """A file of tokens and the file of bytes that is made of it."""

    source: Path
    target: Path
    previous: int  # the last token of the shard before it: a split is one stream

    def chunks(self) -> Iterator[np.ndarray]:
        """Yields the source's tokens in order as int64 [1 + n], each after its previous token."""
        previous, tokens = self.previous, read_shard(self.source)
        for start in range(0, len(tokens), CHUNK_TOKENS):
            chunk = tokens[start : start + CHUNK_TOKENS]
            yield np.concatenate(([previous], chunk), dtype=np.int64)
            previous = int(chunk[-1])


# ---- Tokens to bytes ----


def token_ids(tokenizer: SentencePieceProcessor, token: int) -> list[int]:
    """Returns the byte260 ids of an ordinary token: 4 + b for each byte b of its text."""
    piece = tokenizer.id_to_piece(token)
    if tokenizer.is_byte(token):  # <0xNN>
        return [FIRST_TEXT_ID + int(piece[1:-1], 16)]
    return [FIRST_TEXT_ID + byte for byte in piece.replace("\u2581", " ").encode()]


class Converter:
    """Converts tokens to byte260 ids by the byte table of the trainer.

    Raises InputError if a special token has an id that byte260 uses for text.
    """

    def __init__(self, tokenizer: SentencePieceProcessor) -> None:
        self.tokenizer, self.table = tokenizer, ByteTable.of_tokenizer(tokenizer)
        self.special, self.space = (self.table.size == 0).numpy(), self.table.space.numpy()
        others = np.flatnonzero(self.special[FIRST_TEXT_ID:])
        if len(others):
            reason = f"id {FIRST_TEXT_ID + others[0]} is neither text nor a special id 0 to 3"
            raise InputError(f"--tokenizer: {reason}; use tokens of another tokenizer")
        special_ids = [[token] for token in range(FIRST_TEXT_ID)]
        ids = [
            special_ids[token] if self.special[token] else token_ids(tokenizer, token)
            for token in range(len(self.special))
        ]
        self.ids = np.concatenate(ids).astype("<u2")  # of all tokens, one after the other
        self.sizes = np.array([len(i) for i in ids])
        self.starts = np.cumsum(self.sizes) - self.sizes

    def convert(self, tokens: np.ndarray) -> np.ndarray:
        """Returns the byte260 ids, uint16 [m], of tokens [1 + n] without the first."""
        previous, tokens = tokens[:-1], tokens[1:]
        starts, sizes = self.starts[tokens], self.sizes[tokens]
        # The decoder drops a leading space after a special token.
        dropped = self.space[tokens] * self.special[previous]
        starts, sizes = starts + dropped, sizes - dropped
        # Output p of a token whose outputs end at e is self.ids[start + size - e + p].
        index = np.repeat(starts + sizes - np.cumsum(sizes), sizes)
        return self.ids[index + np.arange(len(index))]

    def find_error(self, tokens: np.ndarray, ids: np.ndarray, random: np.random.Generator) -> str:
        """Returns why `ids` [m] are not the bytes of tokens [1 + n] without the first, or "".

        Compares the special tokens, the number of bytes with that of the byte table, and some
        texts between two special tokens with the decoder's.
        """
        pairs = torch.from_numpy(tokens)
        edges = 1 + np.flatnonzero(self.special[tokens[1:]])
        marks = np.flatnonzero(ids < FIRST_TEXT_ID)
        if not np.array_equal(tokens[edges], ids[marks]):
            return "the special tokens differ"
        if len(ids) - len(marks) != int(self.table.text_bytes(pairs[:-1], pairs[1:]).sum()):
            return "the byte table counts another number of bytes"
        texts = max(len(edges) - 1, 0)
        for i in random.permutation(texts)[:CHUNK_TEXTS]:
            text = self.tokenizer.decode(tokens[edges[i] + 1 : edges[i + 1]].tolist())
            data = ids[marks[i] + 1 : marks[i + 1]] - FIRST_TEXT_ID
            if text.encode() != data.astype(np.uint8).tobytes():
                return f"the decoder gives another text after token {edges[i]:,} of the chunk"
        return ""


def convert_shard(shard: Shard, converter: Converter) -> tuple[np.ndarray, Counter[str]]:
    """Returns the byte260 ids of a shard, uint16 [m], and its counts.

    Raises InputError if the conversion does not agree with the byte table and the decoder.
    """
    parts, counts, random = [], Counter(files=1), np.random.default_rng(0)
    for tokens in shard.chunks():
        ids = converter.convert(tokens)
        error = converter.find_error(tokens, ids, random)
        if error:
            place = f"{shard.source}: chunk at token {counts['source']:,}"
            raise InputError(f"{place}: {error}; give the tokenizer of these tokens")
        parts.append(ids)
        counts["source"] += len(tokens) - 1
        counts["unknown"] += int((tokens[1:] == converter.tokenizer.unk_id()).sum())
        counts["docs"] += int((tokens[1:] == BOS_ID).sum())
        counts["bytes"] += int((ids >= FIRST_TEXT_ID).sum())
        counts["tokens"] += len(ids)
    return np.concatenate(parts), counts


# ---- Shards ----


def find_shards(source: Path, out: Path, vocab_size: int) -> list[Shard]:
    """Returns the shards in stream order.

    Raises InputError if there are none, if a token id is not below `vocab_size`, or if `out` has
    a shard that `source` has not, and DataError if two have the same tokens.
    """
    names = [path.name for path in source.iterdir()] if source.exists() else []
    splits = [s for s in SPLITS if fnmatch.filter(names, f"fineweb_{s}_*.bin")]
    streams = [TokenStream(source, split, vocab_size) for split in splits]
    refuse_duplicates(*streams)
    shards = []
    for stream in streams:
        previous = BOS_ID
        for path, tokens in zip(stream.paths, stream.shards, strict=True):
            shards.append(Shard(path, out / path.name, previous))
            previous, largest = int(tokens[-1]), tokens.max()
            if largest >= vocab_size:
                reason = f"token id {largest} is outside the {vocab_size:,} pieces of --tokenizer"
                raise InputError(f"{path}: {reason}; give the tokenizer of these tokens")
    if not shards:
        reason = "no file matches fineweb_*_*.bin"
        raise InputError(f"{source}: {reason}; run data/download.py or data/prepare.py first")
    extra = set(out.glob("fineweb_*_*.bin")) - {shard.target for shard in shards}
    if extra:
        reason = f"{source} has no shard of that name"
        raise InputError(f"{min(extra)}: {reason}; delete it, or give another --out")
    return shards


# ---- Command line ----


def parse_arguments(argv: list[str]) -> argparse.Namespace:
    """Returns the arguments with all paths filled in. Raises InputError."""
    parser, default = common.Parser(__doc__), common.DATA / "datasets" / "fineweb10B_sp1024"
    add, path = parser.add_argument, common.path_argument
    add("source", nargs="?", type=path, default=default, metavar="SOURCE", help="folder of shards")
    add("--tokenizer", type=path, metavar="MODEL", help="default: the one of NAME and V")
    add("--out", type=path, metavar="DIR", help=f"default: NAME_{BYTE_VARIANT} beside SOURCE")
    args = parser.parse_args(argv)
    source, args.vocab_size = args.source.absolute(), None
    if source.name.endswith(f"_{BYTE_VARIANT}"):
        raise InputError(f"{source}: holds bytes already; give a folder NAME_spV")
    named = re.fullmatch(r"(.+)_sp(\d+)", source.name)
    if named:
        model = f"{named[1].removesuffix('10B')}_{named[2]}_bpe.model"
        args.tokenizer = args.tokenizer or source.parent.parent / "tokenizers" / model
        args.out = args.out or source.with_name(f"{named[1]}_{BYTE_VARIANT}")
        args.vocab_size = int(named[2])
    elif not (args.tokenizer and args.out):
        raise InputError(f"{source}: its name is not NAME_spV; give --tokenizer and --out")
    if os.path.realpath(args.out) == os.path.realpath(source):
        raise InputError(f"--out: {args.out}: is the folder of the tokens; give another one")
    return args


def make_stats(shards: list[Shard], counts: list[Counter[str]]) -> dict[str, int]:
    """Returns the manifest's counts of documents, bytes, tokens and files by split."""
    stats: Counter[str] = Counter()
    for shard, count in zip(shards, counts, strict=True):
        for part in (shard.source.name.split("_")[1], "total"):
            for key in ("docs", "bytes", "tokens", "files"):
                stats[f"{key}_{part}"] += count[key]
    return dict(stats)


def run(args: argparse.Namespace) -> None:
    """Converts all shards; compares those that exist before it writes the missing ones."""
    out, model = args.out.absolute(), load_tokenizer(args.tokenizer)
    if args.vocab_size not in (None, model.vocab_size()):
        reason = f"{model.vocab_size():,} pieces for tokens of {args.vocab_size:,}"
        raise InputError(f"--tokenizer: {args.tokenizer}: {reason}; give the tokenizer of these")
    converter = Converter(model)
    shards = find_shards(args.source, out, model.vocab_size())
    # The layout data/datasets/NAME_byte260 has a manifest; other folders have none.
    manifest = out.parent.parent / "manifest.json" if out.parent.name == "datasets" else None
    if manifest:
        common.read_manifest(manifest)
    common.check_writable(out)
    out.mkdir(parents=True, exist_ok=True)
    shards.sort(key=lambda shard: not shard.target.exists())
    counts, written = [], 0
    for shard in tqdm(shards, "converting", unit=" shards", disable=None):
        ids, count = convert_shard(shard, converter)
        counts.append(count)
        if not shard.target.exists():
            common.write_shard(shard.target, ids)
            written += 1
        elif not np.array_equal(read_shard(shard.target), ids):
            reason = f"differs from the bytes of {shard.source} under this tokenizer"
            raise InputError(f"{shard.target}: {reason}; delete it, or give another --out")
    if manifest:
        corpus = out.name.removesuffix(f"_{BYTE_VARIANT}").removesuffix("10B")
        vocabulary = Vocabulary(f"{corpus}_pure_byte_260")
        dataset = vocabulary.dataset_entry(out.name, make_stats(shards, counts))
        common.merge_manifest(manifest, vocabulary.manifest_entry(), dataset)
    total = sum(counts, Counter[str]())
    tokens, size = total["source"], total["bytes"]
    common.say(f"{out}: {written} shards written, {len(shards) - written} unchanged")
    common.say(f"  {tokens:,} tokens -> {size:,} bytes, {size / tokens:.4f} bytes per token")
    if total["unknown"]:
        common.say(f"warning: {total['unknown']:,} tokens are unknown text: id 3, 0 bytes each")
    common.say(f"  next: {common.training_command({'DATA_PATH': out, 'VOCAB_SIZE': BYTE_VOCAB})}")


def main(argv: list[str]) -> int:
    """Runs the command line; returns its exit status."""
    return common.exit_status(
        lambda: run(parse_arguments(argv)), "run again to convert the other shards"
    )


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # remove temporary files as on Ctrl-C
    sys.exit(main(sys.argv[1:]))
