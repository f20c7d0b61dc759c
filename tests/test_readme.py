"""README.md: its generated parts, its links, its example of a new feature."""

import importlib.util
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import readme
import torch
from conftest import ROOT, TINY

TEXT = (ROOT / "README.md").read_text()


def test_generated_tables_are_what_the_code_gives():
    assert readme.with_generated_parts(TEXT) == TEXT, "run `python tests/readme.py`"


def test_scores_in_the_text_are_those_of_the_picture(tmp_path: Path):
    for bpb in readme.cpu_scores().values():
        assert f"{bpb:.4f}" in TEXT
    readme.draw(tmp_path / "results.png")
    assert readme.PICTURE.read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("document", ["README.md", "records/README.md", "tests/README.md"])
def test_links_and_files_of_a_document_exist(document: str):
    path = ROOT / document
    text = path.read_text()
    for target in re.findall(r"\]\(([^)#]+)", text):
        assert "://" in target or (path.parent / target).exists(), target
    for name in re.findall(r"`((?:tests|data|records)/[\w./]+\.(?:py|sh|md))`", text):
        assert (ROOT / name).exists(), name


def test_section_map_names_what_exists():
    sections = re.findall(r"^\| ([A-Z][\w ]+) \| .* \| (`.*`) \|$", TEXT, re.M)
    source = (ROOT / "train_gpt.py").read_text()
    assert [name for name, _ in sections] == re.findall(r"^# ---- ([\w ]+)", source, re.M)
    for _, names in sections:
        for name in re.findall(r"`([\w.]+)`", names):
            assert re.search(rf"^\s*(def|class) {name.rpartition('.')[2]}\b|^{name} ", source, re.M)


@pytest.fixture(scope="module")
def changed_tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the program and its tests to which README's example is applied."""
    if "logit_bias" in (ROOT / "train_gpt.py").read_text():
        pytest.skip("the example is applied already")
    tree = tmp_path_factory.mktemp("tree")
    shutil.copy(ROOT / "train_gpt.py", tree)
    for folder in ("tests", "records", "data"):
        ignored = shutil.ignore_patterns("track_*", "datasets", "tokenizers", "__pycache__")
        shutil.copytree(ROOT / folder, tree / folder, ignore=ignored)
    diff = re.search(r"```diff\n(.*?)```", TEXT, re.S)[1]
    subprocess.run(["git", "apply"], cwd=tree, input=diff, text=True, check=True)
    return tree


def test_example_feature_trains_and_is_packed(changed_tree, byte_corpus: Path, tmp_path: Path):
    spec = importlib.util.spec_from_file_location("example", changed_tree / "train_gpt.py")
    example = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(example)
    env = {**TINY, "ITERATIONS": "2", "DATA_PATH": str(byte_corpus)}
    models = []
    for value in "01":
        torch.manual_seed(0)
        models.append(example.GPT(example.Hyperparameters.from_env({**env, "LOGIT_BIAS": value})))
    without, with_bias = (sum(p.numel() for p in model.parameters()) for model in models)
    assert with_bias == without + 260
    ids = torch.randint(4, 260, (2, 16))
    assert torch.equal(*(model.forward_logits(ids) for model in models))  # the bias starts at zero
    assert example.main([], {**env, "LOGIT_BIAS": "1", "RUN_DIR": str(tmp_path)}) == 0
    _, weights = example.load_artifact(tmp_path / example.ARTIFACT, models[1].h)
    assert weights["logit_bias.bias"].abs().max() > 0


@pytest.mark.slow
def test_example_feature_passes_the_tests_that_the_page_names(changed_tree):
    (command,) = re.findall(r"`python (-m pytest tests/test_model.py -n 0)`", TEXT)
    done = subprocess.run(
        [sys.executable, *command.split(), "-o", "addopts=", "-m", "not slow"],
        cwd=changed_tree,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout
    assert "logit_bias" in (changed_tree / "tests" / "test_model.py").read_text()
