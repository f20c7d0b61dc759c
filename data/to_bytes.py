"""Turn token shards of a SentencePiece vocabulary into shards of bytes, one for one.

    python data/to_bytes.py
        data/datasets/fineweb10B_sp1024 as data/datasets/fineweb10B_byte260
    python data/to_bytes.py data/datasets/mine_sp400
        the same for any data/datasets/NAME_spV and its tokenizer in data/tokenizers

The bytes are those of the text that the tokens decode to, so the bits per byte of a model of the
bytes and of one of the tokens divide by the same number. A run that was stopped goes on where it
stopped. data/README.md describes the files.
"""

import argparse
import os
import re
import shutil
import signal
import sys
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from sentencepiece import SentencePieceProcessor
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parent))

import prepare
from prepare import InputError

import train_gpt as tg

CHUNK_TOKENS = 1 << 18  # converted at once: its arrays fit the caches
CHUNK_SAMPLES = 2  # texts of a chunk, drawn at random, that the decoder must give too
MAX_COUNT = 2**31 - 1  # a shard's header counts in 31 bits
VARIANT = f"byte{tg.BYTE_VOCAB}"


@dataclass
class Shard:
    """One file of tokens and the file of bytes it becomes."""

    source: Path
    target: Path
    before: int  # the token before its first: a split is one stream, however it is cut
    counts: Counter = field(default_factory=Counter)  # source, unknown; docs, bytes, tokens, files

    def chunks(self) -> Iterator[np.ndarray]:
        """Yield the source's tokens in order as int64 [1 + n], led by the token before them."""
        before, shard = self.before, tg.read_shard(self.source)
        for start in range(0, len(shard), CHUNK_TOKENS):
            tokens = shard[start : start + CHUNK_TOKENS]
            yield np.concatenate(([before], tokens), dtype=np.int64)
            before = int(tokens[-1])

    def header(self) -> bytes:
        """Return the target's header."""
        return tg.shard_header(self.counts["tokens"])


# ---- Tokens to bytes ----


def piece_ids(tokenizer: SentencePieceProcessor, token: int, special: bool) -> list[int]:
    """Return the byte260 ids of a token amid text: itself if special, else 4 + b of its bytes."""
    piece = tokenizer.id_to_piece(token)
    if special:
        return [token]
    if tokenizer.is_byte(token):  # <0xNN>
        return [tg.FIRST_TEXT_ID + int(piece[1:-1], 16)]
    return [tg.FIRST_TEXT_ID + byte for byte in piece.replace("\u2581", " ").encode()]


class Converter:
    """The bytes of every token, by the rules of ByteTable, and the proof that they are right."""

    def __init__(self, tokenizer: SentencePieceProcessor) -> None:
        self.tokenizer, self.table = tokenizer, tg.ByteTable.of_tokenizer(tokenizer)
        self.special, self.space = (self.table.size == 0).numpy(), self.table.space.numpy()
        pieces = [piece_ids(tokenizer, token, s) for token, s in enumerate(self.special.tolist())]
        self.ids = np.array([i for piece in pieces for i in piece], dtype="<u2")
        self.sizes = np.array([len(piece) for piece in pieces])
        self.starts = np.cumsum(self.sizes) - self.sizes
        self.anchor = int(self.table.size.argmax())  # surely text

    def convert(self, tokens: np.ndarray) -> np.ndarray:
        """Return the byte260 ids, uint16, of tokens [1 + n] without the first."""
        before, tokens = tokens[:-1], tokens[1:]
        starts, sizes = self.starts.take(tokens), self.sizes.take(tokens)
        first = np.flatnonzero(self.special.take(before))
        dropped = self.space[tokens[first]]  # leading spaces that no text stands before
        starts[first] += dropped
        sizes[first] -= dropped
        # Output p belongs to a token whose ids end at e: it is id start + size - e + p of all.
        index = np.repeat(starts + sizes - np.cumsum(sizes), sizes)
        index += np.arange(len(index))
        return self.ids.take(index)

    def count_bytes(self, tokens: np.ndarray) -> int:
        """Return the bytes that the trainer counts for tokens [1 + n] without the first."""
        ids = torch.from_numpy(tokens)
        return int(self.table.text_bytes(ids[:-1], ids[1:]).sum())

    def fault(self, tokens: np.ndarray, ids: np.ndarray, draw: np.random.Generator) -> str:
        """Say in what `ids` [m] are not the text of tokens [1 + n] without the first, or "".

        Compared are the special tokens, the number of bytes, and with the decoder's text the bytes
        between two special tokens: the first, the last and some drawn at random.
        """
        edges = np.flatnonzero(self.special[tokens[1:]])
        marks = np.flatnonzero(ids < tg.FIRST_TEXT_ID)
        if not np.array_equal(tokens[1:][edges], ids[marks]):
            return "the special tokens are not the same"
        if len(ids) - len(marks) != self.count_bytes(tokens):
            return "the byte table counts other bytes"
        edges, marks = np.r_[0, edges + 1, len(tokens)], np.r_[-1, marks, len(ids)]
        last = len(edges) - 2
        for i in sorted({0, last, *draw.integers(last + 1, size=CHUNK_SAMPLES).tolist()}):
            run = tokens[edges[i] + 1 : edges[i + 1]].tolist()
            data = (ids[marks[i] + 1 : marks[i + 1]] - tg.FIRST_TEXT_ID).astype(np.uint8).tobytes()
            # Amid text the decoder keeps a leading space, so there some text must lead.
            lead = [] if self.special[tokens[edges[i]]] else [self.anchor]
            text = self.tokenizer.decode(lead + run)[len(self.tokenizer.decode(lead)) :]
            # Where the chunk cuts a text it may cut a character, of which no decoder makes sense.
            same = text.encode() == data
            if lead or i == last:
                same = text.strip("\ufffd") == data.decode(errors="replace").strip("\ufffd")
            if not same:
                return f"the decoder gives another text {edges[i]:,} tokens on"
        return ""


# ---- Shards ----


def plan(source: Path, out: Path) -> list[Shard]:
    """Return the shards in stream order; InputError if there are none, or `out` holds others."""
    shards = []
    for split in prepare.SPLITS:
        before = tg.BOS_ID
        for path in sorted(source.glob(f"fineweb_{split}_*.bin")):
            shards.append(Shard(path, out / path.name, before))
            before = int(tg.read_shard(path)[-1])
    if not shards:
        raise InputError(f"{source}: no fineweb_*_*.bin there; fetch or prepare the tokens first")
    extra = set(out.glob("fineweb_*_*.bin")) - {shard.target for shard in shards}
    if extra:
        reason = f"{source} has no shard of that name"
        raise InputError(f"{min(extra)}: {reason}; delete it, or give another --out")
    return shards


def survey(shard: Shard, converter: Converter) -> None:
    """Fill in the counts; InputError for an id outside the vocabulary or too many bytes."""
    size, seen = len(converter.special), np.zeros(prepare.MAX_VOCAB, dtype=np.int64)
    for tokens in shard.chunks():
        if (largest := tokens.max()) >= size:
            reason = f"token id {largest} is outside the {size:,} pieces of the tokenizer"
            raise InputError(f"{shard.source}: {reason}; give the tokens' own by --tokenizer")
        seen += np.bincount(tokens[1:], minlength=len(seen))
        shard.counts["bytes"] += converter.count_bytes(tokens)
    total = shard.counts["bytes"] + int(seen[:size][converter.special].sum())
    if total > MAX_COUNT:
        reason = f"{total:,} bytes and special tokens, but a shard holds {MAX_COUNT:,}"
        raise InputError(f"{shard.source}: {reason}; cut the tokens into smaller shards")
    unknown = int(seen[converter.tokenizer.unk_id()])
    shard.counts.update(source=int(seen.sum()), unknown=unknown, tokens=total, files=1)
    shard.counts["docs"] = int(seen[tg.BOS_ID])


def verify(path: Path, shard: Shard, converter: Converter) -> bool:
    """Read a file back: is it, from first to last byte, what this source and tokenizer make?

    Nothing is believed of an earlier run: the source is converted again. The conversion is proven
    against the byte table and the decoder; InputError where it fails.
    """
    draw, position, header = np.random.default_rng(0), 0, shard.header()
    with path.open("rb") as file:
        if file.read(len(header)) != header:
            return False
        for tokens in shard.chunks():
            ids = converter.convert(tokens)
            if not np.array_equal(ids, found := np.fromfile(file, "<u2", len(ids))):
                return False
            if fault := converter.fault(tokens, found, draw):
                place = f"{shard.source}: from token {position:,} on"
                raise InputError(f"{place}: {fault}; give the tokens' own by --tokenizer")
            position += len(tokens) - 1
        return not file.read(1)


def make(shard: Shard, converter: Converter) -> None:
    """Write and verify the target, or verify the one that stands there: that is never replaced."""
    if shard.target.exists():
        if not verify(shard.target, shard, converter):
            reason = f"not what {shard.source} becomes under this tokenizer"
            raise InputError(f"{shard.target}: {reason}; delete it, or give another --out")
        return
    with prepare.staging(shard.target.parent) as temporary:
        path = temporary / shard.target.name
        with path.open("wb") as file:
            file.write(shard.header())
            for tokens in shard.chunks():
                file.write(converter.convert(tokens).data)
            file.flush()
            os.fsync(file.fileno())
        if not verify(path, shard, converter):
            raise InputError(f"{shard.target}: reads back other than written; check the disk")
        path.replace(shard.target)


# ---- Command line ----


def parse_arguments(argv: list[str]) -> argparse.Namespace:
    """Return the arguments with all paths filled in; raise InputError at a bad one."""
    about, _, rest = __doc__.partition("\n\n")
    raw = argparse.RawDescriptionHelpFormatter
    parser = prepare.Parser(description=about, epilog=rest, formatter_class=raw, allow_abbrev=False)
    default = Path(__file__).resolve().parent / "datasets" / "fineweb10B_sp1024"
    add = parser.add_argument
    add("source", nargs="?", type=Path, default=default, metavar="SOURCE", help="folder of tokens")
    add("--tokenizer", type=Path, metavar="MODEL", help="the tokens' own; default by NAME and V")
    add("--out", type=Path, metavar="DIR", help=f"default: NAME_{VARIANT} beside SOURCE")
    args = parser.parse_args(argv)
    source, args.vocab_size = args.source.absolute(), None
    if source.name.endswith(f"_{VARIANT}"):
        raise InputError(f"{source}: holds bytes already; give a folder NAME_spV of tokens")
    if named := re.fullmatch(r"(.+)_sp(\d+)", source.name):
        model = f"{named[1].removesuffix('10B')}_{named[2]}_bpe.model"
        args.tokenizer = args.tokenizer or source.parent.parent / "tokenizers" / model
        args.out = args.out or source.with_name(f"{named[1]}_{VARIANT}")
        args.vocab_size = int(named[2])
    elif not (args.tokenizer and args.out):
        raise InputError(f"{source}: is not called NAME_spV; give --tokenizer and --out")
    if args.out.resolve() == source.resolve():
        raise InputError(f"--out: {args.out}: is the folder of the tokens; give another")
    return args


def load_converter(path: Path, size: int | None) -> Converter:
    """Return a tokenizer's converter; InputError for another size or ids that byte260 lacks."""
    model = prepare.load_tokenizer(path).model
    if size not in (None, model.vocab_size()):
        reason = f"{model.vocab_size():,} pieces for tokens of {size:,}"
        raise InputError(f"--tokenizer: {path}: {reason}; give the tokens' own")
    converter = Converter(model)
    if len(others := np.flatnonzero(converter.special[tg.FIRST_TEXT_ID :])):
        reason = f"id {others[0] + tg.FIRST_TEXT_ID} is no text, nor one of the special ids 0 to 3"
        raise InputError(f"--tokenizer: {path}: {reason}; use tokens of another tokenizer")
    return converter


def run(args: argparse.Namespace) -> None:
    """Read all shards once to check and count them, then make those that are not there yet."""
    began, out = time.perf_counter(), args.out.absolute()
    shards, converter = plan(args.source, out), load_converter(args.tokenizer, args.vocab_size)
    # The project's layout, data/datasets/NAME_byte260, has a manifest; other folders have none.
    manifest = out.parent.parent / "manifest.json" if out.parent.name == "datasets" else None
    if manifest:
        prepare.read_manifest(manifest)
    try:
        with prepare.staging(out):
            pass  # tell now, not after an hour of work
    except OSError as error:
        raise InputError(f"--out: {out}: {error.strerror}; choose a writable folder") from None
    for shard in tqdm(shards, "counting", unit=" shards", disable=None):
        survey(shard, converter)
    missing = [shard for shard in shards if not shard.target.exists()]
    needed = sum(len(shard.header()) + 2 * shard.counts["tokens"] for shard in missing)
    if needed > (free := shutil.disk_usage(out).free):
        reason = f"{needed:,} bytes needed, {free:,} free"
        raise InputError(f"--out: {out}: {reason}; make room, or choose another disk")
    # Nothing is added to a folder before all that stands there is found right.
    shards.sort(key=lambda shard: not shard.target.exists())
    for shard in tqdm(shards, "converting", unit=" shards", disable=None):
        make(shard, converter)
    if manifest:
        stats = Counter()
        for shard in shards:
            for part in (shard.source.name.split("_")[1], "total"):
                for key in ("docs", "bytes", "tokens", "files"):
                    stats[f"{key}_{part}"] += shard.counts[key]
        corpus = out.name.removesuffix(f"_{VARIANT}").removesuffix("10B")
        vocabulary = prepare.Vocabulary(f"{corpus}_pure_byte_260")
        prepare.merge_manifest(manifest, out.name, vocabulary, dict(stats))
    total, seconds = sum((shard.counts for shard in shards), Counter()), time.perf_counter() - began
    tokens, size = total["source"], total["bytes"]
    print(f"{out}: {len(missing)} shards made, {len(shards) - len(missing)} found right")
    print(f"  {tokens:,} tokens -> {size:,} bytes, {size / tokens:.4f} bytes per token,", end=" ")
    print(f"{seconds:.1f} s, {tokens / seconds * 60 / 1e6:,.1f} million tokens a minute")
    if total["unknown"]:
        lost = f"{total['unknown']:,} tokens are unknown text, lost with the space after it"
        print(f"warning: {lost}: id 3, 0 bytes each")
    print(f"  next: DATA_PATH={out} VOCAB_SIZE={tg.BYTE_VOCAB} python train_gpt.py")


def main(argv: list[str] | None = None) -> int:
    """Run the command line `argv` (default: the program's) and return its exit status."""
    return prepare.exit_status(
        lambda: run(parse_arguments(sys.argv[1:] if argv is None else argv)),
        "run again to go on after the finished shards",
    )


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # clean up as on Ctrl-C
    sys.exit(main())
