"""Search for an artifact or a checkpoint that breaks its reader, guided by code coverage.

        pip install atheris
        python tests/fuzz_artifact.py -max_total_time=900 CORPUS_FOLDER

An input whose first byte is even is an artifact, else a checkpoint; the rest is the file. The
checksum of an artifact is made to fit before the file is read, so that the code behind it is
reached. Each input must be refused with a DataError or be read to finite weights of the shapes
that its settings declare, within 10 s and 1 GB; else the input is left as crash-*, timeout-* or
oom-* in the current folder. An empty corpus folder is filled with artifacts by every codec that is
installed, and checkpoints, of two tiny models. All flags are libFuzzer's.
"""

import os
import random
import sys
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path

import atheris

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
with atheris.instrument_imports(include=["train_gpt"]):
    import train_gpt as tg

from conftest import randomize
from hostile import (
    artifact,
    compress,
    described,
    judge,
    load_checkpoint,
    odd_artifact,
    odd_checkpoint,
    pack,
    parts,
    resigned,
    tiny,
)

FILE = Path("/dev/shm" if Path("/dev/shm").is_dir() else ".") / f"fuzz-{os.getpid()}"
ROOM = 1 << 16


def one_input(data: bytes) -> None:
    """Asserts what must hold for every input."""
    of_checkpoint = data[:1] and data[0] % 2
    FILE.write_bytes(data[1:] if of_checkpoint else resigned(data[1:]))
    judge(FILE, load_checkpoint if of_checkpoint else tg.load_artifact)


def mutated_artifact(data: bytes, rng: random.Random) -> bytes:
    """Returns an artifact of which one part is changed; raises some error for what is none."""
    (text, payload), (codec, _, raw) = parts(data), described(data)
    how = rng.randrange(4)
    if how == 0:
        return artifact(atheris.Mutate(text, ROOM), payload)
    if how == 1:
        return artifact(text, atheris.Mutate(payload, ROOM))
    if how == 2:
        return artifact(text, compress(codec, atheris.Mutate(raw, ROOM)))
    return odd_artifact(rng, data)


def mutate(data: bytes, most: int, seed: int) -> bytes:
    """Returns an input with any bytes changed, or one part of its file."""
    rng = random.Random(seed)
    if data and rng.randrange(6):
        with suppress(Exception):
            made = odd_checkpoint(rng, data[1:]) if data[0] % 2 else mutated_artifact(data[1:], rng)
            return (data[:1] + made)[:most]
    return atheris.Mutate(data, most)


def fill(folder: Path) -> None:
    """Writes good files of two tiny models into a corpus folder."""
    folder.mkdir(exist_ok=True)
    for n, h in enumerate((tiny(), tiny(num_layers=2, ve_enabled=0))):
        model = randomize(tg.GPT(h))
        tg.write_tensors(FILE, model.state_dict(), asdict(h))
        (folder / f"made{n}weights").write_bytes(b"\1" + FILE.read_bytes())
        for codec in tg.CODECS:
            with suppress(ImportError):
                (folder / f"made{n}{codec}").write_bytes(b"\0" + pack(model, codec))


def main() -> None:
    """Fills the corpus and searches."""
    for folder in [Path(a) for a in sys.argv[1:] if not a.startswith("-")][:1]:
        fill(folder)
    limits = ["-timeout=10", "-rss_limit_mb=2048", "-malloc_limit_mb=1024", "-max_len=80000"]
    atheris.Setup([sys.argv[0], *limits, *sys.argv[1:]], one_input, custom_mutator=mutate)
    try:
        atheris.Fuzz()
    finally:
        FILE.unlink(missing_ok=True)


if __name__ == "__main__":
    main()
