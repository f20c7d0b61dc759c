"""The file itself: its size, its order, and that importing it does nothing."""

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
TREE = ast.parse(SOURCE)
SECTIONS = (
    "Settings",
    "Runtime",
    "Data",
    "Model",
    "Evaluate",
    "Optimizers",
    "Training",
    "Quantize and pack",
    "Run",
)


def docstring_lines(tree: ast.Module) -> set[int]:
    lines = set()
    for node in ast.walk(tree):
        kinds = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
        if isinstance(node, kinds) and ast.get_docstring(node) is not None:
            lines.update(range(node.body[0].lineno, node.body[0].end_lineno + 1))
    return lines


def code_lines(source: str) -> int:
    """Lines with a token that is neither comment nor docstring."""
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
    return len(lines - docstring_lines(ast.parse(source)))


def test_the_counter_counts_code_only():
    text = '"""Doc\n\nstring."""\n\n# comment\nx = 1  # code\ny = (\n    2\n)\n\n\ndef f():\n'
    text += '    """D."""\n'
    assert code_lines(text) == 5


def test_size_limits():
    assert code_lines(SOURCE) <= 1500
    assert len(SOURCE.splitlines()) <= 2000
    assert len(SOURCE.encode()) <= 85_000


def test_functions_are_short_and_explained():
    classes = [node for node in TREE.body if isinstance(node, ast.ClassDef)]
    kinds = (ast.ClassDef, ast.FunctionDef)
    for node in [*TREE.body, *(n for c in classes for n in c.body)]:
        if isinstance(node, kinds) and not node.name.startswith("_"):
            assert ast.get_docstring(node), node.name
        if isinstance(node, ast.FunctionDef):
            assert node.end_lineno - node.lineno < 75, f"{node.name} is long"


def test_no_statement_shares_a_line():
    starts = [n.lineno for n in ast.walk(TREE) if isinstance(n, ast.stmt)]
    assert len(starts) == len(set(starts))


def uses_of_globals(code: types.CodeType) -> Iterator[tuple[str, int]]:
    """Names of the module that its code reads, not those that a function binds, and their lines."""
    line = code.co_firstlineno
    for instruction in dis.get_instructions(code):
        line = getattr(instruction, "line_number", instruction.starts_line) or line
        if instruction.opname in ("LOAD_GLOBAL", "LOAD_NAME"):
            yield instruction.argval, line
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            yield from uses_of_globals(constant)


def test_sections_stand_in_order_and_use_earlier_ones_only():
    """Every name of the module is defined before the section that uses it ends."""
    lines = SOURCE.splitlines()
    at = {m[1]: i for i, line in enumerate(lines, 1) if (m := re.match(r"# ---- ([^:]+): ", line))}
    assert tuple(at) == SECTIONS
    ends = [*list(at.values())[1:], len(lines) + 1]
    defined = {}
    for node in TREE.body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            defined[node.name] = node.lineno
        elif isinstance(node, ast.Assign):
            for target in node.targets:
                for name in ast.walk(target):
                    if isinstance(name, ast.Name):
                        defined[name.id] = node.lineno
    for name, line in uses_of_globals(compile(SOURCE, "train_gpt.py", "exec")):
        end = next((end for end in ends if line < end), len(lines))
        assert defined.get(name, 0) < end, f"line {line} uses {name} of a later section"


def test_the_module_binds_constants_and_definitions_only():
    for node in TREE.body:
        if isinstance(node, ast.Assign):
            names = [n.id for t in node.targets for n in ast.walk(t) if isinstance(n, ast.Name)]
            aliases = ("of_model", "Attend")
            assert all(n.isupper() or n in aliases for n in names), names
    assert not any(isinstance(n, ast.Global) for n in ast.walk(TREE))


def python_3_10_faults(source: str) -> str:
    """What ruff finds that Python 3.10 cannot parse."""
    done = subprocess.run(
        [sys.executable, "-m", "ruff", "check", "--isolated", "--target-version=py310", "-"],
        input=source,
        capture_output=True,
        text=True,
        check=False,
    )
    return done.stdout if "invalid-syntax" in done.stdout else ""


@pytest.mark.fault(54)
@pytest.mark.parametrize(
    "name", ["train_gpt.py", "data/prepare.py", "data/to_bytes.py", "data/download.py"]
)
def test_python_3_10_parses_it(name):
    source = (ROOT / name).read_text(encoding="utf-8")
    ast.parse(source, feature_version=(3, 10))
    assert not python_3_10_faults(source)


def test_what_python_3_10_cannot_parse_would_be_found():
    assert python_3_10_faults("x = {'a': 1}\nprint(f'{x['a']}')\n")


IMPORT = """
import importlib.util, json, os, sys, threading, time
import torch
sys.modules["zstandard"] = sys.modules["sentencepiece"] = sys.modules["flash_attn_interface"] = None
torch.cuda.init = torch.cuda._lazy_init = None
before, env, threads = set(os.listdir()), dict(os.environ), threading.active_count()
began = time.perf_counter()
spec = importlib.util.spec_from_file_location("any_name_at_all", "train_gpt.py")
module = importlib.util.module_from_spec(spec)
spec.loader.exec_module(module)
seconds = time.perf_counter() - began
h = module.Hyperparameters
model = module.GPT(h)
ids, targets = torch.randint(h.vocab_size, (2, 2, 64))
print(json.dumps({
    "seconds": seconds,
    "new_files": sorted(set(os.listdir()) - before),
    "env_kept": env == dict(os.environ),
    "new_threads": threading.active_count() - threads,
    "group": torch.distributed.is_available() and torch.distributed.is_initialized(),
    "cuda": torch.cuda.is_initialized(),
    "fields": [h.model_dim, h.num_layers, h.num_heads, h.num_kv_heads, h.vocab_size, h.mlp_mult],
    "parameters": sum(p.numel() for p in model.parameters()),
    "loss": model(ids, targets).item(),
}))
"""


@pytest.mark.fault(53)
def test_importing_does_nothing(tmp_path: Path):
    """The community's import check, on the file alone, in an empty folder and environment."""
    (tmp_path / "train_gpt.py").write_text(SOURCE, encoding="utf-8")
    done = subprocess.run(
        [sys.executable, "-B", "-c", IMPORT],
        cwd=tmp_path,
        env={"CUDA_VISIBLE_DEVICES": "", "OMP_WAIT_POLICY": "PASSIVE"},
        capture_output=True,
        text=True,
        check=True,
        timeout=120,
    )
    told = json.loads(done.stdout)
    assert told.pop("seconds") < 0.3
    assert 6.5 < told.pop("loss") < 7.3  # ln 1024 = 6.93
    assert told == {
        "new_files": [],
        "env_kept": True,
        "new_threads": 0,
        "group": False,
        "cuda": False,
        "fields": [512, 11, 8, 4, 1024, 3.0],
        "parameters": 26_993_756,
    }
    assert {path.name for path in tmp_path.iterdir()} == {"train_gpt.py"}


def test_openmp_is_told_to_sleep_only_by_the_program():
    guard = next(n for n in TREE.body if isinstance(n, ast.If))
    assert "OMP_WAIT_POLICY" in ast.unparse(guard)
    assert ast.unparse(guard.test).startswith("__name__ == '__main__' and")
    torch_import = next(
        n for n in TREE.body if isinstance(n, ast.Import) and n.names[0].name == "torch"
    )
    assert guard.lineno < torch_import.lineno


def test_the_readme_shows_the_settings_as_they_are():
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert f"```text\n{tg.settings_table()}\n```" in readme  # no row more


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
