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
from hostile import judge_bytes, load_checkpoint, odd_artifact, odd_checkpoint, pack, resigned, tiny

FILE = Path("/dev/shm" if Path("/dev/shm").is_dir() else ".") / f"fuzz-{os.getpid()}"


def one_input(data: bytes) -> None:
    """Asserts what must hold for every input."""
    if data[:1] and data[0] % 2:
        judge_bytes(FILE, data[1:], load_checkpoint)
    else:
        judge_bytes(FILE, resigned(data[1:]))


def mutate(data: bytes, most: int, seed: int) -> bytes:
    """Returns an input with any bytes changed, or one part of its file."""
    rng = random.Random(seed)
    if data and rng.randrange(2):
        with suppress(Exception):  # it is no longer a file of its kind
            change = odd_checkpoint if data[0] % 2 else odd_artifact
            return (data[:1] + change(rng, data[1:]))[:most]
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
