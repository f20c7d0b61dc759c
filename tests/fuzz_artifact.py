"""Search for an artifact or a checkpoint that breaks its reader, guided by code coverage.

        pip install atheris
        python tests/fuzz_artifact.py -max_total_time=900 CORPUS_FOLDER

An input whose first byte is even is an artifact, else a checkpoint; the rest is the file. The
checksum of an artifact does not matter: it is made to fit before the file is read, so that the
code behind it is reached. Mutations keep the parts apart (header, description, frame, arrays in a
new frame, floats) as often as not. Each input must be refused with a DataError or be read to finite
weights of the shapes that its settings declare, within 10 s and 4 x the parameters' bytes + 16 MiB
(32 MiB for a checkpoint); else the input is left as crash-*, timeout-* or oom-* in the current
folder. An empty corpus folder is filled with artifacts by every codec that is installed, and
checkpoints, of two tiny models. All flags are libFuzzer's.
"""

import json
import os
import random
import resource
import sys
from contextlib import suppress
from pathlib import Path

import atheris

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
with atheris.instrument_imports(include=["train_gpt"]):
    import train_gpt as tg

import torch
from conftest import randomize
from hostile import (
    DEFAULTS,
    artifact,
    build_once,
    checkpoint,
    compress,
    decompress,
    judge,
    layout,
    load_checkpoint,
    odd_checkpoint,
    odd_header,
    pack,
    parts,
    resigned,
    resigned_case,
    tiny,
)

FILE = Path("/dev/shm" if Path("/dev/shm").is_dir() else ".") / f"fuzz-{os.getpid()}"


ROOM = 1 << 16


def resident() -> int:
    """Bytes of this process in memory now."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


def peak() -> int:
    """Most bytes of this process in memory ever."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def declared(data: bytes) -> int:
    """Bytes of the parameters that the settings declare; 0 where they declare nothing."""
    try:
        if data[0] % 2:
            told = json.loads(layout(data[1:])[0]["__metadata__"]["settings"])
        else:
            told = json.loads(parts(data[1:])[0])["settings"]
        with torch.device("meta"):
            model = tg.GPT(tg.with_model_settings(DEFAULTS, told))
        return sum(4 * p.numel() for p in model.parameters())
    except Exception:
        return 0


def one_input(data: bytes) -> None:
    """Asserts what must hold for every input."""
    of_checkpoint = data[:1] and data[0] % 2
    FILE.write_bytes(data[1:] if of_checkpoint else resigned(data[1:]))
    before, most = resident(), peak()
    judge(FILE, load_checkpoint if of_checkpoint else tg.load_artifact)
    room = 32 << 20 if of_checkpoint else 16 << 20
    if peak() > most and peak() - before > room:
        bound = 4 * declared(data) + room
        assert peak() - before <= bound, f"{peak() - before} bytes, not {bound}"


def mutated_artifact(data: bytes, rng: random.Random) -> bytes:
    """An artifact of which one part is changed; some error for what is none."""
    (text, payload), how = parts(data), rng.randrange(5)
    codec = json.loads(text)["codec"]
    raw = decompress(codec, payload)
    if how == 0:
        return artifact(atheris.Mutate(text, ROOM), payload)
    if how == 1:
        return artifact(text, atheris.Mutate(payload, ROOM))
    if how == 2:
        return artifact(text, compress(codec, atheris.Mutate(raw, ROOM)))
    return odd_header(rng, data) if how == 3 else resigned_case(rng, text, raw)


def mutated_checkpoint(data: bytes, rng: random.Random) -> bytes:
    """A checkpoint of which one part is changed; some error for what is none."""
    (head, body), how = layout(data), rng.randrange(5)
    if how == 0:
        return checkpoint(atheris.Mutate(json.dumps(head).encode(), ROOM), body)
    if how == 1:
        text = atheris.Mutate(head["__metadata__"]["settings"].encode(), ROOM)
        told = {"settings": text.decode(errors="replace")}
        return checkpoint({**head, "__metadata__": told}, body)
    if how == 2:
        return checkpoint(head, atheris.Mutate(body, ROOM))
    return odd_checkpoint(rng, data)


def mutate(data: bytes, most: int, seed: int) -> bytes:
    """Any bytes changed, or one part of a file."""
    rng = random.Random(seed)
    if data and rng.randrange(6):
        made = mutated_checkpoint if data[0] % 2 else mutated_artifact
        with suppress(Exception):
            return (data[:1] + made(data[1:], rng))[:most]
    return atheris.Mutate(data, most)


def installed() -> list[str]:
    """The codecs whose packages are installed."""
    names = []
    for name in tg.CODECS:
        with suppress(tg.SettingsError):
            tg.load_codec(name)
            names.append(name)
    return names


def main() -> None:
    """Fill an empty corpus, load what is loaded once, and search."""
    folders = [Path(a) for a in sys.argv[1:] if not a.startswith("-")]
    for n, h in enumerate((tiny(), tiny(num_layers=2, ve_enabled=0))):
        model = randomize(tg.GPT(h))
        tg.write_tensors(FILE, model.state_dict(), tg.model_settings(h))
        files = {"weights": b"\1" + FILE.read_bytes()}
        files |= {codec: b"\0" + pack(model, codec) for codec in installed()}
        for kind, data in files.items():
            for folder in folders[:1]:
                folder.mkdir(exist_ok=True)
                (folder / f"made{n}{kind}").write_bytes(data)
            FILE.write_bytes(data[1:])
            assert not judge(FILE, load_checkpoint if data[0] else tg.load_artifact)
    build_once()
    limits = ["-timeout=10", "-rss_limit_mb=2048", "-malloc_limit_mb=1024", "-max_len=80000"]
    atheris.Setup([sys.argv[0], *limits, *sys.argv[1:]], one_input, custom_mutator=mutate)
    try:
        atheris.Fuzz()
    finally:
        FILE.unlink(missing_ok=True)


if __name__ == "__main__":
    main()
