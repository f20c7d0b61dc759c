"""The program's source: its size, the order of its sections, and that importing it does nothing."""

import ast
import io
import re
import subprocess
import sys
import tokenize
from pathlib import Path

import pytest
from conftest import ROOT

import train_gpt as tg
from program import import_program

SOURCE = (ROOT / "train_gpt.py").read_text(encoding="utf-8")
TWIN = tg.packed_source(SOURCE.encode())
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

# ---- Size ----


def docstring_lines(tree: ast.Module) -> set[int]:
    """The lines of all docstrings."""
    lines = set()
    for node in ast.walk(tree):
        kinds = (ast.Module, ast.ClassDef, ast.FunctionDef)
        if isinstance(node, kinds) and ast.get_docstring(node) is not None:
            lines.update(range(node.body[0].lineno, node.body[0].end_lineno + 1))
    return lines


def code_lines(source: str) -> set[int]:
    """The lines with a token that is neither comment nor docstring."""
    layout = (tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT)
    silent = {tokenize.COMMENT, tokenize.ENDMARKER, *layout}
    lines = set()
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type not in silent:
            lines.update(range(token.start[0], token.end[0] + 1))
    return lines - docstring_lines(ast.parse(source))


def section_starts(source: str) -> dict[str, int]:
    """The first line of each section, by name."""
    matches = enumerate((re.match(r"# -+ ([^:]+): ", x) for x in source.splitlines()), 1)
    return {match[1]: number for number, match in matches if match}


def function_sizes(source: str) -> dict[tuple[str, int], int]:
    """Lines of code of each function and method, nested ones too, by name and line."""
    code = code_lines(source)
    return {
        (node.name, node.lineno): len(code.intersection(range(node.lineno, node.end_lineno + 1)))
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.FunctionDef)
    }


def test_only_lines_of_code_are_counted():
    text = '"""Doc\n\nstring."""\n\n# comment\nx = 1  # code\ny = (\n    2\n)\n\n\n'
    text += 'def f(\n    a: int,\n):\n    """D.\n\n    D.\n    """\n\n    # comment\n'
    text += '    return """not\n    D."""\n'
    assert code_lines(text) == {6, 7, 8, 9, 12, 13, 14, 21, 22}
    assert function_sizes(text) == {("f", 12): 5}


def test_the_program_keeps_its_limits_of_size():
    starts = section_starts(SOURCE)
    settings = range(starts["Settings"], starts["Runtime"])
    assert len(code_lines(SOURCE).difference(settings)) <= 2_760
    assert len(TWIN) <= 78_000
    sizes = function_sizes(SOURCE)
    assert {key: size for key, size in sizes.items() if size > 60} == {}
    assert sum(sizes.values()) / len(sizes) <= 18


# ---- Form ----


def ruff(*arguments: object) -> subprocess.CompletedProcess:
    """Runs the linter."""
    command = [sys.executable, "-m", "ruff", "check", *map(str, arguments)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)


def test_types_and_docstrings_are_complete():
    """Of every function and class; the linter also refuses two statements on a line, and tabs."""
    done = ruff("--no-cache", "--extend-select=W191", "train_gpt.py")
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.fault(54)
def test_python_3_10_parses_all(tmp_path: Path):
    (tmp_path / "twin.py").write_bytes(TWIN)
    (tmp_path / "newer.py").write_text("x = {'a': 1}\nprint(f'{x['a']}')\n")
    sources = ["train_gpt.py", "data", *(ROOT / "records").glob("*.py")]
    options = ["--no-cache", "--isolated", "--target-version=py310", "--select=E9"]
    done = ruff(*options, *sources, tmp_path / "twin.py")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "invalid-syntax" in ruff(*options, tmp_path / "newer.py").stdout
    ast.parse(SOURCE, feature_version=(3, 10))


# ---- Order ----


def test_the_docstring_lists_the_sections_in_order():
    assert tuple(section_starts(SOURCE)) == SECTIONS
    listed = re.findall(r"^    ([A-Z][a-z ]+?)  +\S", tg.__doc__, re.MULTILINE)
    assert tuple(listed) == SECTIONS


def undefined_names(folder: Path, lines: list[str]) -> str:
    """What the linter says of each section together with the earlier ones, without the later."""
    starts = section_starts("".join(lines)).values()
    for number, end in enumerate([*starts, len(lines) + 1][1:]):
        (folder / f"until_section_{number:02}.py").write_text("".join(lines[: end - 1]))
    return ruff("--no-cache", "--isolated", "--select=F821", folder).stdout


def test_sections_use_earlier_sections_only(tmp_path: Path):
    lines = SOURCE.splitlines(keepends=True)
    assert undefined_names(tmp_path, lines) == "All checks passed!\n"
    wrong = "def late(x: 'GPT' = None) -> None:\n    x.main = main\n\n\n"
    lines.insert(section_starts(SOURCE)["Model"] - 1, wrong)
    found = undefined_names(tmp_path, lines)
    assert "Undefined name `main`" in found
    assert "Undefined name `GPT`" in found


def test_every_setting_is_read():
    """By its name as an attribute or, after the settings, as a string."""
    later = section_starts(SOURCE)["Runtime"]
    nodes = [*ast.walk(ast.parse(SOURCE))]
    read = {node.attr for node in nodes if isinstance(node, ast.Attribute)}
    read |= {n.value for n in nodes if isinstance(n, ast.Constant) and n.lineno > later}
    assert set(tg.Hyperparameters.__dataclass_fields__) <= read


# ---- Importing ----

HIDDEN = (
    "zstandard",
    "sentencepiece",
    "flash_attn_interface",
    "safetensors",
    "brotli",
    "constriction",
)


@pytest.mark.fault(53)
def test_importing_does_nothing(tmp_path: Path):
    """Both forms are imported alone, in an empty folder and without optional packages."""
    path, names = tmp_path / "train_gpt.py", {}
    for form, program in (("source", SOURCE.encode()), ("twin", TWIN)):
        path.write_bytes(program)
        facts = import_program(path, *HIDDEN)
        assert facts.pop("seconds") < 0.3
        assert 6.5 < facts.pop("loss") < 7.3  # ln 1024 = 6.93
        names[form] = facts.pop("names")
        fields = {"model_dim": 512, "num_layers": 11, "num_heads": 8, "num_kv_heads": 4}
        fields["vocab_size"] = 1024
        assert facts == {
            "effects": [],
            "module": "any_name",
            "fields": fields,
            "parameters": 26_993_756,
        }
    assert names["twin"] == sorted([*names["source"], "linecache", "text"])
    assert {"GPT", "Hyperparameters", "main"} <= set(names["source"])


# ---- The tree ----


def test_the_tree_is_as_agreed():
    listing = ["git", "ls-files"]
    done = subprocess.run(listing, cwd=ROOT, capture_output=True, text=True, check=False)
    if not done.stdout:
        pytest.skip("not a git checkout")
    top = {path.split("/")[0] for path in done.stdout.split()}
    folders = {"data", "records", "tests"}
    files = {"train_gpt.py", "README.md", "requirements.txt", "LICENSE"}
    assert {name for name in top if not name.startswith(".")} <= folders | files
