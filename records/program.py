"""What a submission's program is and does: its packed form, its import, and two tiny runs of it.

The program's source is decoded and parsed, never judged by its text. Each check function reports
what it finds to `expect(holds, file, found, needed)`.
"""

import ast
import json
import math
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

sys.path[:0] = [str(Path(__file__).resolve().parent)]

from figures import NEEDS, PROGRAM, READABLE, unpacked_source
from runs import train_gpt

Expect = Callable[[object, str, object, object], None]

TWIN_VERSION = int(re.findall(r"version (\d+)", train_gpt.TWIN_TEMPLATE)[0])
OPTIONAL = {
    "brotli",
    "constriction",
    "flash_attn_interface",
}  # packages that a program runs without
REQUIREMENT = re.compile(r"[A-Za-z][\w.-]*(?:,?(?:[=~]=|[<>]=?)\d[\w.+]*)+")

# A model small enough that a whole run takes seconds: bytes, so that no tokenizer is needed.
TINY_SETTINGS = (
    "VOCAB_SIZE=260 NUM_LAYERS=3 MODEL_DIM=32 NUM_HEADS=4 NUM_KV_HEADS=2 ROPE_DIMS=4 "
    "BIGRAM_VOCAB_SIZE=64 BIGRAM_DIM=8 VE_ENABLED=1 VE_DIM=8 TRAIN_SEQ_LEN=64 "
    "TRAIN_BATCH_TOKENS=1024 MICRO_BATCH_TOKENS=512 ITERATIONS=30 WARMDOWN_ITERS=15 "
    "MAX_WALLCLOCK_SECONDS=0 VAL_LOSS_EVERY=0 VAL_BATCH_SIZE=8192 EVAL_STRIDE=32"
)
TINY: dict[str, str] = dict(pair.split("=") for pair in TINY_SETTINGS.split())
KEPT = "PATH", "HOME", "TMPDIR", "LD_LIBRARY_PATH", "SYSTEMROOT"  # of the environment
SECONDS = 300  # time limit of a process
IMPORT_SECONDS = 1.0  # of processor time, without torch's own import

# Python executes this at each start. It refuses connections and notes the host asked for.
NO_NETWORK = """
import os, sys
NOTES = os.path.join(os.path.dirname(os.path.abspath(__file__)), "asked")
def refuse(event, args):
    if event in ("socket.connect", "socket.sendto", "socket.getaddrinfo", "socket.gethostbyname"):
        host = args[1 if event in ("socket.connect", "socket.sendto") else 0]
        host = host[0] if isinstance(host, tuple) else host
        if host not in ("localhost", "127.0.0.1", "::1", "", None):
            with open(NOTES, "a") as notes:
                notes.write(f"{event} {host}\\n")
            raise OSError(f"no network here: {event} {host}")
sys.addaudithook(refuse)
"""
# Imports the program as reviewers do: under another name, not registered, without a GPU. The
# arguments are packages that must not be needed.
IMPORT = """
import importlib.util, json, os, sys, threading, time
import torch
written = []
def watch(event, args):
    if event == "open" and {*str(args[1])} & {*"wax+"}:
        written.append(str(args[0]))
def refuse(*_):
    raise RuntimeError("CUDA is asked for")
def state():
    return {
        "files": os.listdir(),
        "threads": threading.active_count(),
        "environment": dict(os.environ),
        "matmul precision": torch.get_float32_matmul_precision(),
        "random state": torch.get_rng_state().tolist(),
        "process group": torch.distributed.is_available() and torch.distributed.is_initialized(),
    }
sys.modules |= dict.fromkeys(sys.argv[1:])
torch.cuda.init = torch.cuda._lazy_init = refuse
sys.addaudithook(watch)
before, began = state(), time.process_time()
spec = importlib.util.spec_from_file_location("any_name", "train_gpt.py")
module = importlib.util.module_from_spec(spec)
spec.loader.exec_module(module)
facts = {"seconds": time.process_time() - began}
after = state()
facts["effects"] = [f"writes {name}" for name in written]
facts["effects"] += [f"changes {name}" for name in before if before[name] != after[name]]
facts["names"] = sorted(vars(module))
facts["module"] = module.GPT.__module__
try:
    h = module.Hyperparameters
    fields = "model_dim", "num_layers", "num_heads", "num_kv_heads", "vocab_size"
    facts["fields"] = {name: getattr(h, name, None) for name in fields}
    model = module.GPT(h)
    facts["parameters"] = sum(p.numel() for p in model.parameters())
    facts["loss"] = model(*torch.randint(h.vocab_size, (2, 2, 64))).item()
except Exception as error:
    facts["error"] = f"{type(error).__name__}: {error}"
print(json.dumps(facts, default=str))
"""


class Source(NamedTuple):
    """The source of a submission's program, and the name of the file that shows it."""

    file: str
    data: bytes


def read_source(expect: Expect, folder: Path) -> Source | None:
    """Returns the source of a folder's program, or None if it cannot be trusted.

    A packed twin is decoded up to a bounded size, without executing or packing anything, and must
    equal READABLE byte for byte. Any other file is its own source, unless it looks like a twin.
    """
    shown, readable = folder / READABLE, b""
    try:
        file = (folder / PROGRAM).read_bytes()
        source = unpacked_source(file)
        if source is None and not (shown.exists() or looks_packed(file)):
            return Source(PROGRAM, file)
        if source is not None:
            readable = shown.read_bytes()
    except OSError as error:
        expect(
            False,
            Path(error.filename).name,
            error.strerror,
            "the program, its source if it is packed",
        )
        return None
    except ValueError as error:
        expect(False, PROGRAM, error, f"at most {train_gpt.TWIN_DICTIONARY} bytes of packed source")
        return None
    if source is None:
        needed = f"that of a packed program, version {TWIN_VERSION}"
        expect(False, PROGRAM, "another wrapper", needed)
        return None
    same = readable == source
    expect(same, READABLE, "another text", f"the source in {PROGRAM}, byte for byte")
    return Source(READABLE, source) if same else None


def looks_packed(file: bytes) -> bool:
    """Returns whether a file that is no twin executes code from data, or begins like a twin."""
    if file.startswith(train_gpt.TWIN_TEMPLATE.encode().partition(b"(")[0]):
        return True
    with suppress(ValueError, SyntaxError, MemoryError, RecursionError):
        calls = (node.func for node in ast.walk(ast.parse(file)) if isinstance(node, ast.Call))
        return any(isinstance(call, ast.Name) and call.id in ("exec", "eval") for call in calls)
    return False


def parse_source(text: str) -> ast.Module:
    """Returns the syntax tree of a program. Raises an exception if Python 3.10 cannot parse it."""
    return ast.parse(text, feature_version=(3, 10))


def imported_packages(tree: ast.Module) -> set[str]:
    """Returns the packages that a program imports, those of Python itself excepted."""
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            names.add(str(node.module).partition(".")[0])
    return names - sys.stdlib_module_names


def check_requirements(expect: Expect, tree: ast.Module, needs: str) -> None:
    """Checks that requirements.txt has plain names with versions, and all imported packages."""
    lines = [line.partition(" #")[0].strip() for line in needs.splitlines()]
    lines = [line for line in lines if line and not line.startswith("#")]
    for line in lines:
        expect(REQUIREMENT.fullmatch(line), NEEDS, line, "a plain name with a version")
    listed = {re.split(r"[^\w-]", line)[0].replace("-", "_") for line in lines}
    missing = sorted(imported_packages(tree) - listed - OPTIONAL)
    expect(not missing, NEEDS, f"without {', '.join(missing)}", "all packages that are imported")


def run_python(folder: Path, hook: Path, *command: str, **env: str) -> tuple[int, list[str]]:
    """Runs Python in a folder, without network or GPU; returns its exit status and its lines.

    `hook` is a folder that make_copy made. The status is 124 after SECONDS.
    """
    kept = {name: os.environ[name] for name in KEPT if name in os.environ}
    kept |= {"PYTHONPATH": str(hook), "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    screen = hook / "screen"
    late = []
    with screen.open("wb") as out:  # a pipe could be held open by a process that remains
        try:
            status = subprocess.run(
                [sys.executable, "-B", *command],
                cwd=folder,
                env=kept | env,
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=out,
                timeout=SECONDS,
                check=False,
            ).returncode
        except subprocess.TimeoutExpired:
            status, late = 124, [f"it lasts longer than {SECONDS} s"]
    text = screen.read_text(encoding="utf-8", errors="replace")
    return status, [line for line in text.splitlines() if line.strip()] + late


@contextmanager
def make_copy(program: Path) -> Iterator[tuple[Path, Path]]:
    """Yields a folder with a copy of the program alone, and one with what Python runs at start."""
    with tempfile.TemporaryDirectory() as name:
        copy, hook = Path(name, "copy"), Path(name, "hook")
        copy.mkdir()
        hook.mkdir()
        shutil.copyfile(program, copy / PROGRAM)
        (hook / "sitecustomize.py").write_text(NO_NETWORK, encoding="utf-8")
        yield copy, hook


def import_program(program: Path, *hidden: str) -> dict[str, Any]:
    """Imports a program on a CPU in a process of its own, and builds GPT(Hyperparameters).

    The packages in `hidden` cannot be imported there. Returns the facts that IMPORT collects:
    seconds, effects, names, module, fields, parameters and loss, or error in place of the last.
    Raises ValueError with the last line of its output if the import fails.
    """
    with make_copy(program) as (copy, hook):
        _, lines = run_python(copy, hook, "-c", IMPORT, *hidden)
    last = "".join(lines[-1:])
    try:
        return json.loads(last)
    except ValueError:
        raise ValueError(last) from None


def check_import(expect: Expect, folder: Path) -> None:
    """Checks that the import does nothing, and that GPT(Hyperparameters) gives a loss on a CPU."""
    try:
        facts = import_program(folder / PROGRAM)
    except ValueError as error:
        expect(False, PROGRAM, f"import: {error}", "an import without an error")
        return
    found = ", ".join(facts["effects"])
    expect(not found, PROGRAM, f"import: {found}", "an import that does nothing")
    found = f"import: {facts['seconds']:.1f} s"
    expect(facts["seconds"] < IMPORT_SECONDS, PROGRAM, found, f"below {IMPORT_SECONDS} s")
    if "error" in facts:
        expect(False, PROGRAM, f"GPT(Hyperparameters): {facts['error']}", "a loss on a CPU")
        return
    missing = [name for name, value in facts["fields"].items() if not isinstance(value, int)]
    found = f"Hyperparameters without {', '.join(missing)}"
    expect(not missing, PROGRAM, found, "whole numbers")
    expected = math.log(facts["fields"]["vocab_size"])
    near = abs(facts["loss"] - expected) < 0.5
    expect(near, PROGRAM, f"loss {facts['loss']:.2f}", f"about {expected:.2f} of random tokens")


def write_shard(path: Path, numbers: range) -> None:
    """Writes a shard of short documents as bytes."""
    text = "".join(f"\x00{a} plus {b} is {a + b}.\n" for a in numbers for b in range(40)).encode()
    tokens = np.array([4 + byte if byte else train_gpt.BOS_ID for byte in text], "<u2")
    path.parent.mkdir(parents=True, exist_ok=True)
    train_gpt.write_atomically(path, train_gpt.shard_header(len(tokens)) + tokens.tobytes())


def check_run(expect: Expect, folder: Path) -> None:
    """Checks two tiny runs of the program, alone and without a network.

    Both have the same training text. Another validation text must change the score and must not
    change the artifact. The bytes that a run counts must be those of program and artifact.
    """
    artifacts, scores = [], []
    with make_copy(folder / PROGRAM) as (copy, hook):
        for n in (0, 1):
            data, logs = f"data/tiny{n}_byte260", copy / f"logs/check{n}"
            write_shard(copy / data / "fineweb_train_000000.bin", range(40))
            write_shard(copy / data / "fineweb_val_000000.bin", range(50 + 5 * n, 55 + 5 * n))
            changes = {"ITERATIONS": "6", "RUN_ID": logs.name, "DATA_PATH": data}
            status, lines = run_python(copy, hook, PROGRAM, **TINY | changes)
            try:
                result = json.loads((logs / "result.json").read_text(encoding="utf-8"))
                artifacts.append((logs / train_gpt.ARTIFACT).read_bytes())
                scores.append(result["scores"]["plain"]["val_bpb"])
                total = (folder / PROGRAM).stat().st_size + len(artifacts[-1])
                found, good = result["bytes"]["total"], status in (0, 1)
                expect(found == total, PROGRAM, f"a run counts {found} bytes", total)
            except (OSError, ValueError, KeyError, TypeError):
                good = False
            found = f"a tiny run: status {status}, {' '.join(lines[-1:])}"
            expect(good, PROGRAM, found, "status 0 or 1 and result.json with a score")
            if not good:
                break
        notes = hook / "asked"
        asked = " ".join(notes.read_text().split("\n")) if notes.exists() else ""
        expect(not asked, PROGRAM, f"a tiny run: {asked}", "no network")
    if len(scores) == 2:
        same = artifacts[0] == artifacts[1]
        needed = "the same: training does not read it"
        expect(same, PROGRAM, "another validation text gives another artifact", needed)
        other = scores[0] != scores[1]
        found = f"another validation text gives the score {scores[0]}"
        expect(other, PROGRAM, found, "another: scoring reads it")
