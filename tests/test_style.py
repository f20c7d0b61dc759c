"""The program's source: its size, order, types, and that importing it does nothing."""

import ast
import dis
import io
import json
import re
import subprocess
import sys
import tokenize
import types
from collections.abc import Iterator
from pathlib import Path

import pytest
from conftest import ROOT

import train_gpt as tg

SOURCE = (ROOT / "train_gpt.py").read_text(encoding="utf-8")
TWIN = tg.packed_source((ROOT / "train_gpt.py").read_bytes())
TREE = ast.parse(SOURCE)
SECTIONS = (
    "Settings",
    "Runtime",
    "Attention",
    "Log and files",
    "Data",
    "Model",
    "Schedule",
    "Evaluate",
    "Optimizers",
    "Training",
    "Quantize",
    "Artifact",
    "Run",
)
FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef)

# ---- Size ----


def docstring_lines(tree: ast.Module) -> set[int]:
    """The lines of all docstrings."""
    lines = set()
    for node in ast.walk(tree):
        kinds = (ast.Module, ast.ClassDef, *FUNCTIONS)
        if isinstance(node, kinds) and ast.get_docstring(node) is not None:
            lines.update(range(node.body[0].lineno, node.body[0].end_lineno + 1))
    return lines


def code_lines(source: str) -> set[int]:
    """The lines with a token that is neither comment nor docstring."""
    silent = {
        tokenize.COMMENT,
        tokenize.NL,
        tokenize.NEWLINE,
        tokenize.INDENT,
        tokenize.DEDENT,
        tokenize.ENDMARKER,
    }
    lines = set()
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type not in silent:
            lines.update(range(token.start[0], token.end[0] + 1))
    return lines - docstring_lines(ast.parse(source))


def section_starts(source: str) -> dict[str, int]:
    """The first line of each section, by name."""
    lines = source.splitlines()
    return {m[1]: n for n, line in enumerate(lines, 1) if (m := re.match(r"# -+ ([^:]+): ", line))}


def function_sizes(source: str) -> dict[tuple[str, int], int]:
    """Lines of code of each function and method, nested ones too, by name and line."""
    code, found = code_lines(source), {}
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, FUNCTIONS):
            lines = range(node.lineno, node.end_lineno + 1)
            found[node.name, node.lineno] = len(code.intersection(lines))
    return found


def test_the_counters_count_code_only():
    text = '"""Doc\n\nstring."""\n\n# comment\nx = 1  # code\ny = (\n    2\n)\n\n\n'
    text += 'def f(\n    a: int,\n):\n    """D.\n\n    D.\n    """\n\n    # comment\n'
    text += '    return """not\n    D."""\n'
    assert code_lines(text) == {6, 7, 8, 9, 12, 13, 14, 21, 22}
    assert function_sizes(text) == {("f", 12): 5}


def test_the_code_outside_the_settings_is_small():
    starts = section_starts(SOURCE)
    settings = range(starts["Settings"], starts["Runtime"])
    assert len(code_lines(SOURCE).difference(settings)) <= 2100


def test_the_packed_twin_is_small():
    assert len(TWIN) <= 60_000


def test_functions_are_short():
    sizes = function_sizes(SOURCE)
    assert {key: size for key, size in sizes.items() if size > 60} == {}
    assert sum(sizes.values()) / len(sizes) <= 18


# ---- Form ----


def members(tree: ast.Module) -> list[ast.stmt]:
    """The statements of the module and of its classes."""
    return [*tree.body, *(n for c in tree.body if isinstance(c, ast.ClassDef) for n in c.body)]


def test_classes_and_functions_have_docstrings():
    for node in members(TREE):
        if isinstance(node, (ast.ClassDef, *FUNCTIONS)) and not node.name.startswith("_"):
            assert ast.get_docstring(node), node.name


def untyped(source: str) -> list[str]:
    """What has no type: arguments and returns of functions and methods, nested ones too."""
    tree, faults = ast.parse(source), []
    methods = {
        f: 0 if any(ast.unparse(d) == "staticmethod" for d in f.decorator_list) else 1
        for c in ast.walk(tree)
        if isinstance(c, ast.ClassDef)
        for f in c.body
        if isinstance(f, FUNCTIONS)
    }
    for node in ast.walk(tree):
        if isinstance(node, FUNCTIONS):
            a = node.args
            positional = [*a.posonlyargs, *a.args][methods.get(node, 0) :]
            arguments = [*positional, *a.kwonlyargs, *filter(None, (a.vararg, a.kwarg))]
            faults += [f"{node.name}: {x.arg}" for x in arguments if x.annotation is None]
            faults += [node.name] if node.returns is None else []
    return faults


def test_arguments_and_returns_have_types():
    assert untyped(SOURCE) == []


@pytest.mark.parametrize(
    ("source", "faults"),
    [
        ("def f(a: int, *b: int, c: int = 1, **d: int) -> None: ...", []),
        ("def f(a, /, b, *c, d=1, **e) -> None: ...", [f"f: {x}" for x in "abdce"]),
        ("def f(a: int): ...", ["f"]),
        ("class C:\n    def f(self) -> None: ...", []),
        ("class C:\n    def f(self, a): ...", ["f: a", "f"]),
        ("class C:\n    @classmethod\n    def f(cls, a) -> None: ...", ["f: a"]),
        ("class C:\n    @staticmethod\n    def f(a) -> None: ...", ["f: a"]),
        ("class C:\n    def f(self) -> None:\n        def g(a) -> int: ...", ["g: a"]),
        ("def f() -> None:\n    class C:\n        async def g(self, a: int): ...", ["g"]),
    ],
)
def test_a_missing_type_would_be_found(source, faults):
    assert untyped(source) == faults


def test_no_statement_shares_a_line():
    starts = [n.lineno for n in ast.walk(TREE) if isinstance(n, ast.stmt)]
    assert len(starts) == len(set(starts))


def test_there_are_no_tabs():
    assert "\t" not in SOURCE


# ---- Order ----


def uses_of_globals(code: types.CodeType) -> Iterator[tuple[str, int]]:
    """Names of the module that its code reads, and their lines.

    Annotations that Python evaluates, defaults, decorators and bases are among them; names that a
    function binds, and annotations in quotes, are not.
    """
    line = code.co_firstlineno
    for instruction in dis.get_instructions(code):
        line = getattr(instruction, "line_number", instruction.starts_line) or line
        if instruction.opname in ("LOAD_GLOBAL", "LOAD_NAME", "LOAD_FROM_DICT_OR_GLOBALS"):
            yield instruction.argval, line
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            yield from uses_of_globals(constant)


def targets(node: ast.stmt) -> list[ast.expr]:
    """The targets of an assignment, tuples taken apart; none for another statement."""
    found = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", None)]
    elements = [x.elts if isinstance(x, (ast.Tuple, ast.List)) else [x] for x in found]
    return [x for part in elements for x in part if x is not None]


def definitions(tree: ast.Module) -> dict[str, int]:
    """The line at which each name of the module is first defined, imports excepted."""
    defined: dict[str, int] = {}
    for node in tree.body:
        if isinstance(node, (ast.ClassDef, *FUNCTIONS)):
            defined.setdefault(node.name, node.lineno)
        for target in targets(node):
            if isinstance(target, ast.Name):
                defined.setdefault(target.id, node.lineno)
    return defined


def uses_of_later_sections(source: str) -> list[str]:
    """Every use of a name that is defined after the section of the use."""
    starts, defined = section_starts(source), definitions(ast.parse(source))
    ends = [*starts.values(), len(source.splitlines()) + 1]
    faults = []
    for name, line in uses_of_globals(compile(source, "train_gpt.py", "exec")):
        end = next(end for end in ends if line < end)
        if defined.get(name, 0) >= end:
            faults.append(f"line {line} uses {name} of line {defined[name]}")
    return faults


def test_sections_stand_in_order():
    assert tuple(section_starts(SOURCE)) == SECTIONS


def test_the_docstring_lists_the_sections_in_order():
    listed = re.findall(r"^    ([A-Z][a-z ]+?)  +\S", ast.get_docstring(TREE), re.MULTILINE)
    assert tuple(listed) == SECTIONS


def test_sections_use_earlier_sections_only():
    assert uses_of_later_sections(SOURCE) == []


@pytest.mark.parametrize(
    ("text", "lines"),
    [
        ("def f():\n    return late()", [3]),
        ("def f():\n    return Early(lambda: LATE)", [3]),
        ("def f(x: Late) -> None: ...", [2]),
        ("def f() -> list[Late]: ...", [2]),
        ("class C(Late): ...", [2]),
        ("class C:\n    x: Late", [3]),
        ("class C:\n    def f(self, x: Late) -> None: ...", [3]),
        ("@late\ndef f(): ...", [2]),
        ("def f(x=LATE): ...", [2]),
        ("X = LATE", [2]),
        ("X: Late = 1", [2]),
        ("def f(x: 'Late') -> 'Late': ...", []),
        ("def f():\n    late = 1\n    return late", []),
        ("def f(x: Early):\n    return after(x, EARLY)\n\n\ndef after(x, y): ...", []),
    ],
)
def test_a_use_of_a_later_section_would_be_found(text, lines):
    late = "# ---- Late: ends ----\nLATE: int = 1\nclass Late: ...\ndef late(): ...\n"
    early = "EARLY = 1\nclass Early: ...\n"
    found = uses_of_later_sections(f"# ---- Early: begins ----\n{text}\n{early}{late}")
    assert [int(fault.split()[1]) for fault in found] == lines


# ---- The module ----


def is_type_alias(node: ast.Assign | ast.AnnAssign | ast.AugAssign) -> bool:
    """Whether an assignment names a type, as `Lanes = tuple[Tensor, ...]` does."""
    name = targets(node)[0]
    named = isinstance(name, ast.Name) and re.fullmatch(r"([A-Z][a-z]+)+", name.id)
    return bool(named) and isinstance(node.value, (ast.Subscript, ast.BinOp))


def other_than_definitions(tree: ast.Module) -> list[str]:
    """Statements of a module that do more than define, import, or guard the main program."""
    plain = (ast.Import, ast.ImportFrom, ast.ClassDef, *FUNCTIONS)
    faults = []
    for n, node in enumerate(tree.body):
        if isinstance(node, (ast.Assign, ast.AnnAssign, ast.AugAssign)):
            names = [x.id if isinstance(x, ast.Name) else "" for x in targets(node)]
            good = all(name.isupper() for name in names) or is_type_alias(node)
        elif isinstance(node, ast.If):
            good = re.match(r"__name__ == '__main__'( and |$)", ast.unparse(node.test))
        else:
            docstring = n == 0 and ast.get_docstring(tree) is not None
            good = isinstance(node, plain) or docstring
        if not good:
            faults.append(ast.unparse(node).partition("\n")[0])
    return faults


def test_the_module_binds_constants_types_and_definitions_only():
    assert other_than_definitions(TREE) == []
    assert not any(isinstance(n, ast.Global) for n in ast.walk(TREE))


@pytest.mark.parametrize(
    "statement",
    [
        "counter = 0",
        "A, b = 1, 2",
        "cache: dict = {}",
        "Thing = make()",
        "A.b = 1",
        "print(1)",
        "if True:\n    A = 1",
        "if __name__ == '__main__' or True:\n    A = 1",
        "for A in (1, 2):\n    pass",
        "try:\n    import a\nexcept ImportError:\n    a = None",
        "with open(A):\n    pass",
    ],
)
def test_other_statements_of_a_module_would_be_found(statement):
    good = '"""Doc."""\nimport a\nA, B = 1, 2\nC: int = 3\nD |= 4\nAlias = tuple[int, ...]\n'
    good += (
        "Other = Callable[[int], int]\nEither = int | None\n\n\ndef f(): ...\n\n\nclass C: ...\n"
    )
    assert other_than_definitions(ast.parse(good)) == []
    assert len(other_than_definitions(ast.parse(good + statement))) == 1


def test_openmp_is_told_to_sleep_only_by_the_program():
    guard = next(n for n in TREE.body if isinstance(n, ast.If))
    assert "OMP_WAIT_POLICY" in ast.unparse(guard)
    assert ast.unparse(guard.test).startswith("__name__ == '__main__' and")
    torch_import = next(
        n for n in TREE.body if isinstance(n, ast.Import) and n.names[0].name == "torch"
    )
    assert guard.lineno < torch_import.lineno


# ---- Python 3.10 ----


def python_3_10_faults(source: str) -> str:
    """What ruff finds that Python 3.10 cannot parse."""
    done = subprocess.run(
        [sys.executable, "-m", "ruff", "check", "--isolated", "--target-version=py310", "-"],
        input=source,
        capture_output=True,
        text=True,
        check=False,
    )
    assert "All checks passed" in done.stdout or "Found" in done.stdout, done.stderr
    return done.stdout if "invalid-syntax" in done.stdout else ""


@pytest.mark.fault(54)
@pytest.mark.parametrize(
    "name",
    ["train_gpt.py", "the packed twin", "data/prepare.py", "data/to_bytes.py", "data/download.py"],
)
def test_python_3_10_parses_it(name):
    twin = name == "the packed twin"
    source = TWIN.decode() if twin else (ROOT / name).read_text(encoding="utf-8")
    ast.parse(source, feature_version=(3, 10))
    assert not python_3_10_faults(source)


def test_what_python_3_10_cannot_parse_would_be_found():
    assert python_3_10_faults("x = {'a': 1}\nprint(f'{x['a']}')\n")


# ---- Importing ----

IMPORT = """
import importlib.util, json, os, sys, threading, time
import torch
sys.modules["zstandard"] = sys.modules["sentencepiece"] = sys.modules["flash_attn_interface"] = None
sys.modules["safetensors"] = sys.modules["brotli"] = None
torch.cuda.init = torch.cuda._lazy_init = None
before, env, threads = set(os.listdir()), dict(os.environ), threading.active_count()
precision, draws = torch.get_float32_matmul_precision(), torch.get_rng_state()
began = time.process_time()
spec = importlib.util.spec_from_file_location("any_name_at_all", "train_gpt.py")
module = importlib.util.module_from_spec(spec)
spec.loader.exec_module(module)
seconds = time.process_time() - began
same = precision == torch.get_float32_matmul_precision()
same = same and torch.equal(draws, torch.get_rng_state())
h = module.Hyperparameters
model = module.GPT(h)
ids, targets = torch.randint(h.vocab_size, (2, 2, 64))
print(json.dumps({
    "seconds": seconds,
    "new_files": sorted(set(os.listdir()) - before),
    "env_kept": env == dict(os.environ),
    "torch_kept": same,
    "new_threads": threading.active_count() - threads,
    "group": torch.distributed.is_available() and torch.distributed.is_initialized(),
    "cuda": torch.cuda.is_initialized(),
    "fields": [h.model_dim, h.num_layers, h.num_heads, h.num_kv_heads, h.vocab_size, h.mlp_mult],
    "parameters": sum(p.numel() for p in model.parameters()),
    "loss": model(ids, targets).item(),
    "modules": sorted({x.__module__ for x in vars(module).values() if isinstance(x, type)}),
    "names": sorted(vars(module)),
}))
"""


def import_report(folder: Path, program: bytes) -> dict:
    """What IMPORT prints of a program that lies alone in a folder, in a fresh process."""
    (folder / "train_gpt.py").write_bytes(program)
    done = subprocess.run(
        [sys.executable, "-B", "-c", IMPORT],
        cwd=folder,
        env={"CUDA_VISIBLE_DEVICES": "", "OMP_WAIT_POLICY": "PASSIVE"},
        capture_output=True,
        text=True,
        check=True,
        timeout=120,
    )
    assert {path.name for path in folder.iterdir()} == {"train_gpt.py"}
    return json.loads(done.stdout)


@pytest.mark.fault(53)
def test_importing_does_nothing(tmp_path: Path):
    """The reviewers' import check of both forms, in an empty folder and environment."""
    names = {}
    for form, program in (("source", SOURCE.encode()), ("twin", TWIN)):
        report = import_report(tmp_path, program)
        assert report.pop("seconds") < 0.3
        assert 6.5 < report.pop("loss") < 7.3  # ln 1024 = 6.93
        assert "any_name_at_all" in report.pop("modules")
        names[form] = report.pop("names")
        assert report == {
            "new_files": [],
            "env_kept": True,
            "torch_kept": True,
            "new_threads": 0,
            "group": False,
            "cuda": False,
            "fields": [512, 11, 8, 4, 1024, 3.0],
            "parameters": 26_993_756,
        }
    assert names["twin"] == sorted([*names["source"], "linecache", "text"])
    assert {"GPT", "Hyperparameters", "main"} <= set(names["source"])


# ---- The tree ----


def test_the_tree_is_as_agreed():
    listed = subprocess.run(
        ["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=False
    ).stdout.split()
    if not listed:
        pytest.skip("not a git checkout")
    top = {path.split("/")[0] for path in listed}
    agreed = {
        "train_gpt.py",
        "data",
        "records",
        "tests",
        "README.md",
        "requirements.txt",
        "LICENSE",
    }
    assert {name for name in top if not name.startswith(".")} <= agreed
