"""What a submission's program is and does: by its source, its import, and two tiny runs of it.

Each function tells what it finds to `expect(holds, file, found, needed)`.
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
from itertools import zip_longest
from pathlib import Path
from typing import NamedTuple

import numpy as np

sys.path[:0] = [str(Path(__file__).resolve().parent)]

from figures import NEEDS, PROGRAM, READABLE
from runs import train_gpt

Expect = Callable[[object, str, object, object], None]

# All modules that a program may import; those not of Python must be in requirements.txt as well.
MODULES = (
    "__future__ argparse base64 bisect brotli collections contextlib copy dataclasses datetime "
    "difflib enum flash_attn_interface functools gc glob hashlib heapq io itertools json lzma math "
    "numpy os pathlib platform random re safetensors sentencepiece shlex shutil signal statistics "
    "string struct sys textwrap threading time torch traceback typing uuid warnings zlib zstandard"
)
OPTIONAL = {"brotli", "flash_attn_interface"}  # a program runs without them
# Names that a program has no need for, and what it needs instead.
NAMES = {
    "no network": r"hub|model_zoo|load_url|\w*download\w*|from_pretrained|load_dataset|genfromtxt|"
    r"\w*_from_url|url\w+|_?socket|requests|http",
    "no other program, for it might use the network": r"exec[lv]\w*|fork\w*|popen|posix_spawn\w*|"
    r"spawn\w*|startfile|subprocess|system",
    "code that can be read": r"compile|eval|exec|globals|locals|jit|load|load_inline|"
    r"load_library|cpp_extension|allow_pickle|ctypes|mallopt|importlib|pickle|marshal|builtins|"
    r"(?!__(?:annotations|dataclass_fields|doc|file|init|main|metadata|name|version)__)__\w+__",
}
# All that a program may have of the C library: how it keeps memory, called or given its own name.
C_LIBRARY = {"import ctypes", "ctypes.CDLL(None).mallopt"}
VARIABLES, METHODS = {"load"}, {"compile", "eval"}  # harmless as such
REQUIREMENT = re.compile(r"[A-Za-z][\w.-]*(?:,?(?:[=~]=|[<>]=?)\d[\w.+]*)+")
# The functions and methods that may read the validation split; the last two are of older programs.
READ_VAL = {
    *("load_data", "load_validation", "score", "Trainer.__init__", "Trainer.validate"),
    *("Run.score", "Run.quantize_and_score", "evaluate", "finish"),
}

# A model of which a run takes seconds; of bytes, so that no tokenizer is needed.
TINY = (
    "VOCAB_SIZE=260 NUM_LAYERS=2 MODEL_DIM=32 NUM_HEADS=2 NUM_KV_HEADS=1 ROPE_DIMS=4 "
    "BIGRAM_VOCAB_SIZE=64 BIGRAM_DIM=8 TRAIN_SEQ_LEN=64 TRAIN_BATCH_TOKENS=512 ITERATIONS=6 "
    "WARMDOWN_ITERS=3 MAX_WALLCLOCK_SECONDS=0 VAL_LOSS_EVERY=0 VAL_BATCH_SIZE=8192 EVAL_STRIDE=32"
)
KEPT = "PATH", "HOME", "TMPDIR", "LD_LIBRARY_PATH", "SYSTEMROOT"  # of the environment
SECONDS = 300  # that a process may take
IMPORT_SECONDS = 1.0  # of the processor, beside torch's

# Python runs it at each start: who asks for the network is noted and refused.
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
# As reviewers' programs do it: by any name, not registered, on a machine without a GPU.
IMPORT = """
import importlib.util, json, os, sys, threading, time
import torch
written = []
def watch(event, args):
	if event == "open" and {*str(args[1])} & {*"wax+"}:
		written.append(str(args[0]))
def refuse(*_):
	raise RuntimeError("CUDA is asked for")
torch.cuda.init = torch.cuda._lazy_init = refuse
sys.addaudithook(watch)
env, threads, began = dict(os.environ), threading.active_count(), time.process_time()
spec = importlib.util.spec_from_file_location("any_name", "train_gpt.py")
module = importlib.util.module_from_spec(spec)
spec.loader.exec_module(module)
told = {
	"seconds": time.process_time() - began,
	"effects": [f"writes {name}" for name in written]
	+ [f"{threading.active_count() - threads} threads"] * (threading.active_count() > threads)
	+ [f"sets {name}" for name in os.environ if os.environ[name] != env.get(name)],
}
h = module.Hyperparameters
names = "model_dim", "num_layers", "num_heads", "num_kv_heads", "vocab_size"
told["missing"] = [name for name in names if type(getattr(h, name, None)) is not int]
tiny = type("Tiny", (h,), dict(zip(names, (64, 2, 4, 2, 260))))
told["loss"] = module.GPT(tiny)(*torch.randint(260, (2, 2, 64))).item()
print(json.dumps(told))
"""


def used(node: ast.AST) -> set[str]:
    """The names that are used here: of a variable, an attribute, a module's part, or as text."""
    if isinstance(node, ast.Attribute):
        return {node.attr} - METHODS
    if isinstance(node, ast.ImportFrom):
        return {*str(node.module).split(".")[1:], *(alias.name for alias in node.names)}
    if isinstance(node, ast.Import):
        return {part for alias in node.names for part in alias.name.split(".")[1:]}
    if isinstance(node, ast.keyword):
        return {str(node.arg)}
    if isinstance(node, ast.Constant) and isinstance(node.value, (str, bytes)):
        text = node.value if isinstance(node.value, str) else node.value.decode("latin-1")
        return {text} - METHODS
    read = isinstance(node, ast.Name) and isinstance(node.ctx, ast.Load)
    return {node.id} - VARIABLES if read else set()


def imported(node: ast.AST) -> list[str]:
    """The modules of an import statement."""
    if isinstance(node, ast.Import):
        return [alias.name.partition(".")[0] for alias in node.names]
    if isinstance(node, ast.ImportFrom):
        return ["." if node.level else str(node.module).partition(".")[0]]
    return []


def modules_of(tree: ast.Module) -> set[str]:
    """Returns the modules that a program imports, by their first names."""
    return {name for node in ast.walk(tree) for name in imported(node)}


def is_search(node: ast.AST) -> bool:
    """Returns whether a node only asks if a package is there, as find_spec(name) is None."""
    if isinstance(node, ast.Import):
        return ast.unparse(node) == "import importlib.util"
    if not (isinstance(node, ast.Compare) and isinstance(node.left, ast.Call)):
        return False
    compared = isinstance(node.ops[0], (ast.Is, ast.IsNot)) and len(node.ops) == 1
    found = ast.unparse(node.left.func) == "importlib.util.find_spec"
    return found and compared and ast.unparse(node.comparators[0]) == "None"


def allowed_nodes(tree: ast.Module) -> set[int]:
    """Returns the nodes, by id, that use a forbidden name in a way that is allowed.

    These are the C library as far as C_LIBRARY goes, find_spec, and Program.load of the program.
    """
    allowed = of_c_library(tree)
    own = any(isinstance(node, ast.ClassDef) and node.name == "Program" for node in tree.body)
    for node in ast.walk(tree):
        if is_search(node):
            kept = [*ast.walk(node.left.func)] if isinstance(node, ast.Compare) else [node]
            allowed |= {id(part) for part in kept}
        elif own and isinstance(node, ast.Attribute) and ast.unparse(node) == "Program.load":
            allowed.add(id(node))
    return allowed


def of_c_library(tree: ast.Module) -> set[int]:
    """The nodes, by id, that take no more of the C library than a program may, or call it."""
    nodes = [*ast.walk(tree)]
    called = {id(node.func) for node in nodes if isinstance(node, ast.Call)}
    named = (node for node in nodes if isinstance(node, ast.Assign))
    kept = {id(n.value) for n in named if [ast.unparse(t) for t in n.targets] == ["mallopt"]}
    whole = [n for n in nodes if isinstance(n, ast.Import) or id(n) in called | kept]
    whole = [node for node in whole if ast.unparse(node) in C_LIBRARY]
    calls = {id(n) for n in nodes if id(n) in called and used(n) == {"mallopt"}}
    return calls | {id(part) for node in whole for part in ast.walk(node)}


class Source(NamedTuple):
    """The source of a submission's program, and the file that shows it."""

    file: str
    data: bytes


def read_source(expect: Expect, folder: Path) -> Source | None:
    """Returns the source of a folder's program; None, with faults told, if it cannot be trusted.

    A packed twin is decoded up to a bounded size, without executing or packing anything, and must
    be READABLE byte for byte. Any other file is its own source, unless it looks like a twin.
    """
    try:
        file = (folder / PROGRAM).read_bytes()
        source = train_gpt.unpacked_source(file)
    except (OSError, ValueError) as error:
        found = error.strerror if isinstance(error, OSError) else error
        needed = f"a program, packed with at most {train_gpt.TWIN_DICTIONARY} bytes of source"
        expect(False, PROGRAM, found, needed)
        return None
    shown = folder / READABLE
    if source is None:
        if not (shown.exists() or looks_packed(file)):
            return Source(PROGRAM, file)
        masked = re.sub(rb'(?<=b85decode\(")[^"\n]*(?="\))', b"%s", file)
        found = f"line {first_other_line(masked, train_gpt.TWIN_TEMPLATE.encode())} is another"
        needed = f"the wrapper of a packed program, version {train_gpt.TWIN_VERSION}"
        expect(False, PROGRAM, found, needed)
        return None
    try:
        readable = shown.read_bytes()
    except OSError as error:
        expect(False, READABLE, error.strerror, f"the source in {PROGRAM}")
        return None
    if readable != source:
        found = f"line {first_other_line(readable, source)} is another"
        expect(False, READABLE, found, f"the source in {PROGRAM}, byte for byte")
        return None
    return Source(READABLE, source)


def looks_packed(file: bytes) -> bool:
    """Returns whether a file that is no twin executes code out of data, or says that it is one."""
    if file.startswith(train_gpt.TWIN_TEMPLATE.encode().partition(b"(")[0]):
        return True
    with suppress(ValueError, SyntaxError, MemoryError, RecursionError):
        calls = (node.func for node in ast.walk(ast.parse(file)) if isinstance(node, ast.Call))
        return any(isinstance(call, ast.Name) and call.id in ("exec", "eval") for call in calls)
    return False


def first_other_line(text: bytes, needed: bytes) -> int:
    """Returns the number of the first line in which two texts differ."""
    pairs = zip_longest(text.split(b"\n"), needed.split(b"\n"))
    return next(number for number, (a, b) in enumerate(pairs, 1) if a != b)


def check_source(expect: Expect, tree: ast.Module, needs: str, file: str = PROGRAM) -> None:
    """What it imports and calls, whether all of it can be read, and who sees validation data."""
    lines = [line.partition(" #")[0].strip() for line in needs.splitlines()]
    lines = [line for line in lines if line and not line.startswith("#")]
    for line in lines:
        expect(REQUIREMENT.fullmatch(line), NEEDS, line, "a plain name with a version")
    listed = {re.split(r"[^\w-]", line)[0].replace("-", "_") for line in lines}
    installed = listed | OPTIONAL | sys.stdlib_module_names
    modules = MODULES.split()
    allowed = allowed_nodes(tree)
    for node in ast.walk(tree):
        if id(node) in allowed:
            continue
        at = f"line {getattr(node, 'lineno', 0)}:"
        for name in imported(node):
            expect(name in modules, file, f"{at} import {name}", "modules that a program needs")
            expect(name in installed, file, f"{at} import {name}", f"modules of {NEEDS}")
        for name in used(node):
            for needed, pattern in NAMES.items():
                expect(not re.fullmatch(pattern, name), file, f"{at} {name}", needed)
        address = isinstance(node, ast.Constant) and "://" in str(node.value)
        expect(not address, file, f"{at} an address", "no network")
        loaded = isinstance(node, ast.Attribute) and ast.unparse(node) == "sys.modules"
        expect(not loaded, file, f"{at} sys.modules", "code that can be read")
    parts = [*named_parts(tree)]
    for name, node in parts:
        if not (isinstance(node, ast.FunctionDef) and name in READ_VAL):
            held = {"self.data"} if takes_other_data(node) else {"self.data", "data"}
            seen = (sees_val(part, held) for part in ast.walk(node))
            for text in dict.fromkeys(filter(None, seen)):
                needed = f"nobody to, but {sorted(READ_VAL)}"
                expect(False, file, f"{name} reads {text}", needed)
        if name == "main":
            idle = all(map(is_idle, node.body))
            expect(not idle, file, "main does nothing", "a program")
    defined = [name for name, node in parts if isinstance(node, ast.FunctionDef)]
    for name in sorted(READ_VAL & {*defined}):
        expect(defined.count(name) == 1, file, f"{name} is there again", "one")
    guards = [ast.unparse(node.test) for node in tree.body if isinstance(node, ast.If)]
    expect("__name__ == '__main__'" in guards, file, "no guard", "if __name__ == '__main__'")


def named_parts(tree: ast.Module) -> Iterator[tuple[str, ast.AST]]:
    """Yields the statements of a module, of a class its parts, by name: f, Class.method, Class."""
    for node in tree.body:
        name = getattr(node, "name", "the module")
        if isinstance(node, ast.ClassDef):
            for part in ast.iter_child_nodes(node):
                inner = getattr(part, "name", "")
                yield f"{name}.{inner}" if inner else name, part
        else:
            yield name, node


def is_idle(node: ast.stmt) -> bool:
    """Whether a statement does nothing, or says that it should do more."""
    constant = isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
    return constant or isinstance(node, (ast.Pass, ast.Raise))


def takes_other_data(node: ast.AST) -> bool:
    """Returns whether a function's argument `data` is of another type than Data, such as bytes."""
    arguments = node.args.args if isinstance(node, ast.FunctionDef) else []
    kinds = [ast.unparse(a.annotation) for a in arguments if a.arg == "data" and a.annotation]
    return bool(kinds) and "Data" not in kinds[0]


def sees_val(node: ast.AST, held: set[str]) -> str:
    """Returns what here opens the validation split, or takes it out of a Data; "" if nothing does.

    `held` has the expressions that hold a Data.
    """
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        sees = node.value == "val" or "fineweb_val" in node.value
    elif isinstance(node, ast.Attribute):
        private = ast.unparse(node.value) in held and node.attr.startswith("_")
        sees = node.attr == "val" or private
    elif isinstance(node, ast.Subscript):
        sees = ast.unparse(node.value) in held and not isinstance(node.slice, ast.Slice)
    elif isinstance(node, (ast.Assign, ast.Starred, ast.For)):
        value = node.iter if isinstance(node, ast.For) else node.value
        sees = ast.unparse(value) in held
    else:
        sees = False
    return ast.unparse(node).splitlines()[0] if sees else ""


def run(folder: Path, hook: Path, *command: str, **settings: str) -> tuple[int, list[str]]:
    """Status and lines of Python in a folder, without network or GPU; 124 if it lasts too long."""
    kept = {name: os.environ[name] for name in KEPT if name in os.environ}
    env = {**kept, "PYTHONPATH": str(hook), "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    screen = hook / "screen"
    with screen.open("wb") as out:  # no pipe, which what it leaves behind could hold open
        process = subprocess.Popen(
            [sys.executable, "-B", *command],
            cwd=folder,
            env=env | settings,
            stdin=subprocess.DEVNULL,
            stdout=out,
            stderr=out,
        )
        try:
            status, lines = process.wait(SECONDS), []
        except subprocess.TimeoutExpired:
            status, lines = 124, [f"it lasts longer than {SECONDS} s"]
            process.kill()
            process.wait()
    text = screen.read_text(encoding="utf-8", errors="replace")
    return status, [line for line in text.splitlines() if line.strip()] + lines


@contextmanager
def copied(folder: Path) -> Iterator[tuple[Path, Path]]:
    """A folder of its program alone to run in, and one of what Python runs at its start."""
    with tempfile.TemporaryDirectory() as name:
        copy, hook = Path(name, "copy"), Path(name, "hook")
        copy.mkdir()
        hook.mkdir()
        shutil.copyfile(folder / PROGRAM, copy / PROGRAM)
        (hook / "sitecustomize.py").write_text(NO_NETWORK, encoding="utf-8")
        yield copy, hook


def check_import(expect: Expect, folder: Path) -> None:
    """That importing it does nothing, and its model is built and gives a loss on a CPU."""
    with copied(folder) as (copy, hook):
        _, lines = run(copy, hook, "-c", IMPORT)
    try:
        told = json.loads(lines[-1])
    except (ValueError, IndexError):
        expect(False, PROGRAM, f"import: {' '.join(lines[-1:])}", "an import and GPT(h) on a CPU")
        return
    found = ", ".join(told["effects"])
    expect(not found, PROGRAM, f"import: {found}", "an import that does nothing")
    found = f"import: {told['seconds']:.1f} s"
    expect(told["seconds"] < IMPORT_SECONDS, PROGRAM, found, f"below {IMPORT_SECONDS} s")
    found = f"Hyperparameters without {', '.join(told['missing'])}"
    expect(not told["missing"], PROGRAM, found, "whole numbers")
    near = abs(told["loss"] - math.log(train_gpt.BYTE_VOCAB)) < 0.5
    needed = f"about {math.log(train_gpt.BYTE_VOCAB):.2f} of random tokens"
    expect(near, PROGRAM, f"loss {told['loss']:.2f}", needed)


def write_shard(path: Path, numbers: range) -> None:
    """A shard of short documents as bytes."""
    text = "".join(f"\x00{a} plus {b} is {a + b}.\n" for a in numbers for b in range(40)).encode()
    tokens = np.array([4 + byte if byte else train_gpt.BOS_ID for byte in text], "<u2")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(train_gpt.shard_header(len(tokens)) + tokens.tobytes())


def check_run(expect: Expect, folder: Path) -> None:
    """That it runs alone, asks for no network, and no validation text changes its weights."""
    artifacts, scores = [], []
    with copied(folder) as (copy, hook):
        for n in (0, 1):  # the same training text, another validation text
            data, logs = f"data/tiny{n}_byte260", copy / f"logs/check{n}"
            write_shard(copy / data / "fineweb_train_000000.bin", range(40))
            write_shard(copy / data / "fineweb_val_000000.bin", range(50 + 5 * n, 55 + 5 * n))
            settings = dict(pair.split("=") for pair in TINY.split())
            settings |= {"RUN_ID": logs.name, "DATA_PATH": data}
            status, lines = run(copy, hook, PROGRAM, **settings)
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
        found = " ".join(notes.read_text().split("\n")) if notes.exists() else ""
        expect(not found, PROGRAM, f"a tiny run: {found}", "no network")
    if len(scores) == 2:
        same = artifacts[0] == artifacts[1]
        needed = "the same: training does not read it"
        expect(same, PROGRAM, "another validation text gives another artifact", needed)
        same = scores[0] == scores[1]
        needed = "another: scoring reads it"
        expect(not same, PROGRAM, f"another validation text gives the score {scores[0]}", needed)
