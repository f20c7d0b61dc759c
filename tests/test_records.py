"""The tools of records/ together, on real runs: from a clone to a checked folder, and a sweep."""

import ast
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import ROOT, TINY
from launch import KEPT

sys.path.insert(0, str(ROOT / "records"))

import check
import sweep
import train_gpt as tg
from compare import markdown_table
from runs import Defaults, Run, read_run, read_runs, read_trial

ENTRIES = sorted(path.parent for path in (ROOT / "records").glob("track_*/*/submission.json"))
PAGE = (ROOT / "records" / "README.md").read_text(encoding="utf-8")


def tool(name, *argv, env=KEPT):
    """One of the tools in a process of its own, and what it printed."""
    command = [sys.executable, ROOT / "records" / f"{name}.py", *map(str, argv)]
    return subprocess.run(command, env=env, capture_output=True, text=True, timeout=600)


def shell_path():
    """The PATH under which `python` is the one that runs these tests."""
    return f"{Path(sys.executable).parent}:{os.environ['PATH']}"


@pytest.mark.skipif(not (ROOT / ".git").exists(), reason="a copy that cannot be cloned")
def test_the_five_commands_of_the_newcomers_page(tmp_path):
    """As they stand in records/README.md, but for a smaller model and fewer steps."""
    commands = re.search(r"```\n(git clone .*?)```", PAGE, re.DOTALL)[1]
    assert len(commands.splitlines()) == 5
    smaller = "NUM_LAYERS=1 MODEL_DIM=32 VE_DIM=8 BIGRAM_VOCAB_SIZE=64 TRAIN_BATCH_TOKENS=512 "
    smaller += "ITERATIONS=6 EVAL_STRIDE=0 GPTQ_CALIB_TOKENS=1024"
    env = KEPT | dict(pair.split("=") for pair in smaller.split())
    env |= {"PATH": shell_path(), "URL": str(ROOT), "PIP_DISABLE_PIP_VERSION_CHECK": "1"}
    done = subprocess.run(
        ["bash", "-e", "-c", commands], cwd=tmp_path, env=env, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert re.search("^ok: .* run twice$", done.stdout, re.MULTILINE), done.stdout
    (folder,) = (tmp_path / "trainer" / "records" / "track_non_record_16mb").glob("*_First")
    told = json.loads((folder / "submission.json").read_text())
    assert sorted(told["seeds"]) == [7, 42, 1337] and told["step_stop"] == 6


def test_a_sweep_killed_half_way_ends_in_table_comparison_and_plot(byte_corpus, tmp_path):
    """Two settings by two by three seeds; one trial is killed by the system, then all."""
    out = tmp_path / "out"
    env = KEPT | TINY | {"DATA_PATH": str(byte_corpus), "ITERATIONS": "20", "EVAL_STRIDE": "0"}
    env["PATH"] = shell_path()
    argv = ["XSA_LAST_N=0,3", "MUON_WD=0,0.1", "--seeds", "1,2,3", "--cpu", "2", "--out", out]
    script = [sys.executable, ROOT / "records" / "sweep.py", *map(str, argv)]
    victim = out / "XSA_LAST_N=0+MUON_WD=0.1" / "seed1"
    first = subprocess.Popen(script, env=env, stdout=subprocess.PIPE, text=True)

    def until(true):
        end = time.monotonic() + 120
        while not true():
            assert time.monotonic() < end and first.poll() is None
            time.sleep(0.02)

    def killed():
        for process in Path("/proc").glob("[0-9]*/environ"):
            try:
                if f"RUN_DIR={victim}".encode() not in process.read_bytes().split(b"\0"):
                    continue
                if b"train_gpt.py" in process.with_name("cmdline").read_bytes():
                    os.kill(int(process.parent.name), signal.SIGKILL)
                    return True
            except OSError:
                continue
        return False

    until(killed)  # as by a system that is out of memory
    until(lambda: len(list(out.rglob("result.json"))) >= 4)
    first.kill()
    first.wait()
    assert len(list(out.rglob("result.json"))) < 11
    second = subprocess.run(script, env=env, capture_output=True, text=True, timeout=600)
    assert second.returncode == 1, second.stderr
    plan = sweep.read_plan(out)
    states = {(t.name, t.seed): read_trial(plan.folder_of(t)) for t in plan.trials}
    assert len(states) == 12
    dead = states.pop((victim.parent.name, 1))
    assert (dead.status, dead.reason.split(";")[0]) == ("failed", "killed by signal 9")
    assert {run.status for run in states.values()} == {"ok"}
    table = tool("sweep", "--out", out, "--show", env=env)
    assert table.stdout.count("killed by signal 9") == 1 and table.stdout.count(" ok ") == 11

    told = tool("compare", out, "--base", "XSA_LAST_N=0+MUON_WD=0", "--json")
    assert told.returncode == 0, told.stderr
    rows = {row["name"]: row for row in json.loads(told.stdout)}
    assert len(rows) == 4
    for name, row in rows.items():
        if name == "XSA_LAST_N=0+MUON_WD=0":
            continue
        c = row["comparison"]
        assert c["method"] == "paired t"
        assert c["n_a"] == c["n_b"] == (2 if name == victim.parent.name else 3)
        scores = {
            (r.name, r.seed): r.scores["plain"].val_bpb for r in read_runs([out]) if r.finished
        }
        base = "XSA_LAST_N=0+MUON_WD=0"
        pairs = [x - scores[base, seed] for (n, seed), x in scores.items() if n == name]
        assert c["bpb"]["mean"] == pytest.approx(sum(pairs) / len(pairs), abs=1e-12)
    shown = tool("compare", out, "--base", "XSA_LAST_N=0+MUON_WD=0").stdout
    assert f"NOT COUNTED: {victim.parent.name} seed 1: failed: killed by signal 9" in shown

    drawn = tool(
        "plot",
        out,
        "--kind",
        "scores",
        "--out",
        f"{tmp_path}/plots/",
        env=env | {"HOME": str(tmp_path)},
    )
    assert drawn.returncode == 0, drawn.stderr
    assert (tmp_path / "plots/scores.png").read_bytes()[:4] == b"\x89PNG"
    assert victim.parent.name in drawn.stdout  # the trial that failed is named


@pytest.mark.parametrize("name", ["sweep", "compare", "plot", "submit", "check"])
def test_every_tool_has_help_with_an_example(name):
    done = tool(name, "--help")
    assert done.returncode == 0 and f"python records/{name}.py " in done.stdout


@pytest.mark.parametrize("folder", ENTRIES, ids=lambda path: path.name)
def test_every_entry_is_without_fault(folder):
    assert check.faults_of(folder, run=False) == []


@pytest.mark.slow
@pytest.mark.parametrize("folder", ENTRIES, ids=lambda path: path.name)
def test_every_entry_runs(folder, tmp_path):
    done = tool("check", shutil.copytree(folder, tmp_path / folder.parent.name / folder.name))
    assert done.returncode == 0, done.stdout


def test_the_tables_of_our_runs_are_those_of_compare():
    tables = re.findall(r"<!-- table of (\S+) -->\n(.*?)<!-- end -->", PAGE, re.DOTALL)
    assert sorted(name for name, _ in tables) == [
        str(x.relative_to(ROOT / "records")) for x in ENTRIES
    ]
    for name, text in tables:
        assert text == markdown_table(read_runs([ROOT / "records" / name]))


# ---- What a program's settings are, by its source ----

SOURCE = (ROOT / "train_gpt.py").read_text(encoding="utf-8")


def variables(command):
    """The environment variables of a command."""
    return dict(
        word.split("=", 1) for word in shlex.split(command) if re.match(r"[A-Z_0-9]+=", word)
    )


@pytest.mark.parametrize("name", ["tiny/seed42", "plain/seed1337"])
def test_a_log_gives_the_settings_and_the_command_of_its_run(finished, name):
    run, log = read_run(finished / name), read_run(finished / name / "train.log")
    assert log.settings == run.settings
    twin = (finished / name / "train_gpt.py").read_bytes()
    assert tg.unpacked_source(twin) == SOURCE.encode()
    command = Defaults(ast.parse(SOURCE)).command(run)
    assert command == Defaults(ast.parse(SOURCE)).command(log)
    given = vars(tg.Hyperparameters.from_env(variables(command)))
    assert given == run.settings | {"run_dir": ""}


def test_a_command_of_repacked_weights_names_the_step_where_it_was_given():
    """Older programs report one sequence as the step of --quantize, whatever was given."""
    settings = {"seed": 7, "model_dim": 512, "train_seq_len": 80, "train_batch_tokens": 160}
    run = Run(Path(), "", "ok", settings=settings)
    defaults = Defaults(ast.parse(SOURCE))
    weights = "python train_gpt.py --quantize final_model_seed7.safetensors"
    said = f"SEED=7 TRAIN_SEQ_LEN=80 TRAIN_BATCH_TOKENS=160 {weights}"
    assert defaults.command(run) == said
    tg.Hyperparameters.from_env(variables(said))
    settings["train_batch_tokens"] = 80
    assert defaults.command(run) == f"SEED=7 TRAIN_SEQ_LEN=80 {weights}"


PROGRAM = """
DEPTH = 13
BYTE_RULES: dict[str, Any] = {"ln_scale": False}
PRESETS: dict[str, dict[str, Any]] = {
    "deep": {"num_layers": DEPTH, "matrix_lr": 0.1, "attn": "math"},
}
class ModelSettings:
    vocab_size: int = setting(1024, "tokens", low=5)
    num_layers: int = setting(11, "blocks")
    ln_scale: bool = setting(
        True, "Scale the norms.")
class Hyperparameters(ModelSettings):
    preset: str = setting("", "configuration", choices=tuple(PRESETS))
    matrix_lr: float = setting(0.025, "rate", low=-DEPTH)
    attn: str = setting("auto", "back end")
    def rate(self):
        return self.matrix_lr
"""
TOLD = {"vocab_size": 260, "num_layers": 13, "ln_scale": False, "preset": "deep"}
TOLD |= {"matrix_lr": 0.1, "attn": "math", "seed": 5}
SHORT = "SEED=5 PRESET=deep VOCAB_SIZE=260 "


@pytest.mark.parametrize(
    ("addition", "named"),
    [
        ("", ""),
        ("print(PRESETS.get('deep'), BYTE_RULES | {})", ""),
        ("DEPTH = 14", ""),  # the preset has the value of DEPTH before it
        ("PRESETS['deep']['num_layers'] = 14", "NUM_LAYERS=13 MATRIX_LR=0.1 ATTN=math "),
        ("PRESETS['deep'].update(attn='flash')", "NUM_LAYERS=13 MATRIX_LR=0.1 ATTN=math "),
        ("PRESETS = PRESETS | {}", "NUM_LAYERS=13 MATRIX_LR=0.1 ATTN=math "),
        ("del BYTE_RULES['ln_scale']", "LN_SCALE=0 "),
        ("BYTE_RULES.clear()", "LN_SCALE=0 "),
        ("Hyperparameters.attn = 'flash'", "ATTN=math "),
    ],
)
def test_defaults_and_presets_are_read_unless_the_program_changes_them(addition, named):
    defaults = Defaults(ast.parse(f"{PROGRAM}\n{addition}\n"))
    run = Run(Path(), "", "ok", settings=TOLD, steps=1)
    assert defaults.command(run) == f"{SHORT}{named}python train_gpt.py"


@pytest.mark.parametrize(
    "default", ["10 + 1", "default=11, meaning=", "DEPTH - 2", "len('eleven layers')"]
)
def test_a_default_that_is_no_literal_is_named(default):
    text = PROGRAM.replace("setting(11,", f"setting({default},".replace("=,", "="))
    assert text != PROGRAM
    run = Run(Path(), "", "ok", settings={"num_layers": 11, "attn": "auto", "seed": 5}, steps=1)
    assert Defaults(ast.parse(PROGRAM)).command(run) == "SEED=5 python train_gpt.py"
    assert Defaults(ast.parse(text)).command(run) == "SEED=5 NUM_LAYERS=11 python train_gpt.py"


@pytest.mark.parametrize("constant", ["DEPTH = int('14')", "if THIS:\n    DEPTH = 14", "del DEPTH"])
def test_presets_with_a_constant_that_is_not_known_are_unknown(constant):
    text = PROGRAM.replace("DEPTH = 13\n", f"DEPTH = 13\n{constant}\n")
    run = Run(Path(), "", "ok", settings=TOLD, steps=1)
    named = "NUM_LAYERS=13 MATRIX_LR=0.1 ATTN=math"
    assert Defaults(ast.parse(text)).command(run) == f"{SHORT}{named} python train_gpt.py"
