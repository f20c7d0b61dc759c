"""The tools of records/ together, on real runs: from a clone to a checked folder, and a sweep."""

import contextlib
import importlib
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
from conftest import ROOT, TINY
from launch import KEPT

sys.path.insert(0, str(ROOT / "records"))

import check
import train_gpt as tg
from compare import markdown_table
from runs import Run, RunError, command, read_run, read_runs

ENTRIES = sorted(path.parent for path in (ROOT / "records").glob("track_*/*/submission.json"))
PAGE = (ROOT / "records" / "README.md").read_text(encoding="utf-8")


def tool(name, *argv, env=KEPT):
    """One of the tools in a process of its own, and what it printed."""
    command = [sys.executable, ROOT / "records" / f"{name}.py", *map(str, argv)]
    return subprocess.run(command, env=env, capture_output=True, text=True, timeout=600)


def shell_path():
    """The PATH under which `python` is the one that runs these tests."""
    return f"{Path(sys.executable).parent}:{os.environ['PATH']}"


@pytest.mark.slow
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


def kill_trial(folder):
    """Kills the run of a sweep's trial, as a system without memory does; whether there was one."""
    for process in Path("/proc").glob("[0-9]*/environ"):
        with contextlib.suppress(OSError):
            of_trial = f"RUN_DIR={folder}".encode() in process.read_bytes().split(b"\0")
            if of_trial and b"train_gpt.py" in process.with_name("cmdline").read_bytes():
                os.kill(int(process.parent.name), signal.SIGKILL)
                return True
    return False


@pytest.mark.slow
def test_a_sweep_that_was_killed_is_continued_compared_and_plotted(byte_corpus, tmp_path):
    """One trial of eight is killed first, then the sweep."""
    out, base, other = tmp_path / "out", "MUON_WD=0", "MUON_WD=0.1"
    env = KEPT | TINY | {"DATA_PATH": str(byte_corpus), "ITERATIONS": "20", "EVAL_STRIDE": "0"}
    env["PATH"] = shell_path()
    argv = ["MUON_WD=0,0.1", "--seeds", "1,2,3,4", "--cpu", "2", "--out", str(out)]
    script = [sys.executable, ROOT / "records" / "sweep.py", *argv]
    first = subprocess.Popen(script, env=env, stdout=subprocess.PIPE, text=True)
    conditions = [lambda: kill_trial(out / other / "seed1"), lambda: [*out.rglob("result.json")]]
    end = time.monotonic() + 120
    while conditions:
        assert time.monotonic() < end and first.poll() is None
        conditions = conditions[bool(conditions[0]()) :]
        time.sleep(0.02)
    first.kill()
    first.wait()
    assert len([*out.rglob("result.json")]) < 7
    second = subprocess.run(script, env=env, capture_output=True, text=True, timeout=600)
    assert second.returncode == 1, second.stderr
    runs = {(run.name, run.seed): run for run in read_runs([out])}
    assert len(runs) == 8
    dead = runs.pop((other, 1))
    assert (dead.status, dead.reason.split(";")[0]) == ("failed", "killed by signal 9")
    assert {run.status for run in runs.values()} == {"ok"}
    table = tool("sweep", "--out", out, "--show", env=env)
    assert table.stdout.count("killed by signal 9") == 1 and table.stdout.count(" ok ") == 7

    told = tool("compare", out, "--base", base, "--json")
    assert told.returncode == 0, told.stderr
    rows = {row["name"]: row for row in json.loads(told.stdout)}
    bpb = {key: run.scores["plain"].val_bpb for key, run in runs.items()}
    differences = [bpb[other, seed] - bpb[base, seed] for seed in (2, 3, 4)]
    assert rows[other]["comparison"]["method"] == "paired t"
    assert rows[other]["comparison"]["bpb"]["mean"] == pytest.approx(sum(differences) / 3)
    shown = tool("compare", out, "--base", base).stdout
    assert f"NOT COUNTED: {other} seed 1: failed: killed by signal 9" in shown

    drawn = tool("plot", out, "--kind", "scores", "--out", f"{tmp_path}/plots/")
    assert drawn.returncode == 0, drawn.stderr
    assert (tmp_path / "plots/scores.png").read_bytes()[:4] == b"\x89PNG"
    assert other in drawn.stdout  # the trial that failed is named


@pytest.mark.parametrize("name", ["sweep", "compare", "plot", "submit", "check"])
def test_every_tool_has_help_with_an_example(name, capsys):
    options = ({},) if name == "sweep" else ()
    with pytest.raises(SystemExit) as ended:
        importlib.import_module(name).main(["--help"], *options)
    assert ended.value.code == 0
    assert f"python records/{name}.py " in capsys.readouterr().out


def test_an_entry_is_without_fault():
    assert check.find_faults(ENTRIES[-1], run=False) == []


@pytest.mark.slow
@pytest.mark.parametrize("folder", ENTRIES, ids=lambda path: path.name)
def test_every_entry_is_without_fault_and_runs(folder, tmp_path):
    done = tool("check", shutil.copytree(folder, tmp_path / folder.parent.name / folder.name))
    assert done.returncode == 0, done.stdout


def test_the_tables_of_our_runs_are_those_of_compare():
    tables = re.findall(r"<!-- table of (\S+) -->\n(.*?)<!-- end -->", PAGE, re.DOTALL)
    several = [x for x in ENTRIES if len({run.seed for run in read_runs([x])}) > 1]
    assert sorted(name for name, _ in tables) == [
        str(x.relative_to(ROOT / "records"))
        for x in several  # one seed cannot be compared
    ]
    for name, text in tables:
        assert text == markdown_table(read_runs([ROOT / "records" / name]))


def test_the_page_states_the_rules_that_check_applies():
    assert check.RECORD_SEEDS == 3
    assert f"three seeds on {check.RECORD_RANKS}x{check.RECORD_GPU} within" in PAGE
    assert f"`{check.figures.NON_RECORD}`, the default" in PAGE


# ---- Logs of other scripts ----

STEP = "step:9/9 val_loss:2.0 val_bpb:1.3 train_time:60ms step_avg:6.67ms\n"
BASELINE = f"""\
import torch
a, b = 3, 1.2341 bpb
{"=" * 100}
val_loader:shards pattern=./data/fineweb_val_*.bin tokens:62021632
seed:1337
step:1/9 train_loss:6.9 train_time:40ms step_avg:40.00ms
{STEP}Serialized model int8+zlib: 100 bytes
Total submission size int8+zlib: 150 bytes
final_int8_zlib_roundtrip val_loss:2.0727 val_bpb:1.2244 eval_time:1401ms
final_int8_zlib_roundtrip_exact val_loss:2.07269931 val_bpb:1.22436570
"""
OUTPUT = BASELINE[BASELINE.index("val_loader") :]
REPEATED = "int6 val_loss:2.1 val_bpb:1.30001\nsliding val_loss:2 val_bpb:1.2\n"


@pytest.mark.parametrize(
    ("text", "name", "bpb"),
    [
        (BASELINE, "final_int8_zlib_roundtrip", 1.2243657),
        (f"{BASELINE}my_ttt val_loss:2.05 val_bpb:1.2143 elapsed:9s\n", "my_ttt", 1.2143),
        (f"{BASELINE}eval stride:64 val_loss:2.01 val_bpb:1.191\n", "eval", 1.191),
        (f"{BASELINE}q_exact sliding val_loss:2.0 sliding val_bpb:1.18\n", "q sliding", 1.18),
        (f"{BASELINE}ttt:done val_loss=1.9 val_bpb=1.1\n", "ttt:done", 1.1),
        (f"{BASELINE}2026/03/25 [10:20:30] 7 mine val_bpb: 1.1 val_loss: 1.9\n", "mine", 1.1),
        (f"{BASELINE}9%|#| 9/9 [01:01<0:00,  4.7s/it]mine val_loss:1.9 val_bpb:1.1\n", "mine", 1.1),
        (f"{BASELINE}legal_ttt val_loss:1.9 val_bpb:1.1\nval_bpb:   1.1\n", "ttt", 1.1),
        (f"{BASELINE}chunk 1/9 bpb=1.2\nrunning_bpb:1.1111\ngap: 0.0123 bpb\n", None, 1.2243657),
        (f"{REPEATED}last val_loss:2 val_bpb:1.2000\n", "sliding", 1.2),
        (f"{REPEATED}last val_loss:2.1 val_bpb:1.3000\n", "last", 1.3),
        (f"{REPEATED}int6 val_loss:2.3 val_bpb:1.4\n", "int6", 1.4),
    ],
)
def test_the_last_score_of_a_log_is_the_score(tmp_path, text, name, bpb):
    (tmp_path / "a.log").write_text(text)
    run = read_run(tmp_path / "a.log")
    assert (run.status, run.scores[run.final].val_bpb) == ("ok", bpb)
    assert run.final == (name or "final_int8_zlib_roundtrip")
    if text.startswith(BASELINE):
        assert (run.seed, run.steps, run.step_ms) == (1337, 9, 6.67)
        assert run.sizes == {"model": 100, "total": 150}
        assert command(run) == "SEED=1337 python train_gpt.py"
        first = run.scores["final_int8_zlib_roundtrip"]
        assert (first.tokens, first.seconds) == (62021632, 1.401)
    else:  # unknown is not a value
        assert (run.seed, run.scores[run.final].tokens, run.steps) == (None, 0, 0)


@pytest.mark.parametrize(
    "line",
    [
        *("FINAL_BPB=1.1234", '"post_ttt_val_bpb": 1.0631,', "1.0712 bits per byte"),
        *("val_loss:1.9 val_bpb:1.1234", "final val_bpb:1.1234", "mine val_loss:nan val_bpb:nan"),
        *("TTT: val_bpb 1.2244 -> 1.1000 (-0.12)", "TTT: bpb 1.2244 \u2192 1.1000"),
        "both val_loss:2.0 val_bpb:1.22 sliding val_loss:1.9 val_bpb:1.15",
    ],
)
def test_a_line_that_may_be_a_score_is_named(tmp_path, line):
    (tmp_path / "a.log").write_text(f"{BASELINE}{line}\n")
    with pytest.raises(RunError, match=re.escape(line)):
        read_run(tmp_path / "a.log")


@pytest.mark.parametrize(
    "end",
    [
        *("", "diagnostic quantized val_loss:2 val_bpb:1.2", "pre-quant val_loss:2 val_bpb:1.2"),
        "decimal commas val_loss:2,5 val_bpb:1,4",
    ],
)
def test_a_log_without_the_score_of_an_artifact_has_not_finished(tmp_path, end):
    (tmp_path / "a.log").write_text(STEP + end)
    assert read_run(tmp_path / "a.log").status == "cut off"


@pytest.mark.parametrize("seed", [0, 42])
@pytest.mark.parametrize("name", ["my_{}.log", "my-s{}.log", "my_seed-{}.log", "my/train{}.log"])
def test_a_log_may_be_named_by_the_seed_that_it_states(tmp_path, name, seed):
    path = tmp_path / name.format(seed)
    path.parent.mkdir(exist_ok=True)
    path.write_text(OUTPUT.replace("seed:1337", f"seed:{seed}"))
    assert (read_run(path).name, read_run(path).seed) == ("my", seed)
    path.write_text(OUTPUT)
    if "seed" not in name:
        assert read_run(path).name == path.stem.removeprefix("train_")


def test_a_log_that_ends_in_a_traceback_has_failed(tmp_path):
    error = 'Traceback (most recent call last):\n  File "a.py"\nRuntimeError: ttt'
    (tmp_path / "a.log").write_text(
        "".join(f"[rank0]: {x}\n" for x in (OUTPUT + error).split("\n"))
    )
    run = read_run(tmp_path / "a.log")
    assert (run.status, run.reason.splitlines()[-1]) == ("failed", "RuntimeError: ttt")


def test_steps_that_a_resumed_run_repeats_count_once(tmp_path):
    steps = [(1, 5.0), (2, 4.0), (3, 3.0), (2, 4.1), (4, 2.1)]
    event = '{{"event": "step", "step": {}, "seconds": 1.0, "train_loss": {}}}\n'
    (tmp_path / "events.jsonl").write_text("".join(event.format(*step) for step in steps))
    (tmp_path / "result.json").write_text('{"status": "interrupted"}')
    (tmp_path / "a.log").write_text(
        "".join(f"step:{n}/9 train_loss:{loss} train_time:1s\n" for n, loss in steps)
    )
    for path in (tmp_path, tmp_path / "a.log"):
        assert read_run(path).curve == ((1, 1.0, 5.0), (2, 1.0, 4.1), (4, 1.0, 2.1))


@pytest.mark.parametrize(
    ("change", "seeds"),
    [
        (lambda text: text, [1337]),
        (lambda text: text.replace("seed:1337", ""), [None, 1337]),
        (lambda text: text.replace("seed:1337", "seed = 7"), [7, 1337]),
    ],
)
def test_another_log_is_another_seed_only_if_it_says_so(tmp_path, change, seeds):
    (tmp_path / "train_seed1337.log").write_text(BASELINE)
    (tmp_path / "train.log").write_text(change(BASELINE))
    assert [run.seed for run in read_runs([tmp_path])] == seeds


@pytest.mark.parametrize(
    "data",
    [
        *(OUTPUT.encode(encoding) for encoding in ("utf-8-sig", "utf-16")),
        OUTPUT.replace("\n", "\r\n").encode(),
        b"caf\xe9 \xff\n" + OUTPUT.encode(),
        OUTPUT.replace("final", "\x1b[32mfinal\x1b[0m").encode(),
        *(
            "".join(f"{prefix}{line}\n" for line in OUTPUT.splitlines()).encode()
            for prefix in (
                *("[rank0]:", "[rank0]: ", "[default0]:", "0: ", "INFO:root:", "1776142719.3 "),
                *(
                    "2026-03-20T10:00:00.123Z ",
                    "2026-03-20 10:00:00,123 - ",
                    "[2026-03-20 10:00:00] ",
                ),
                *(
                    "[2026-03-20 10:00:00,123][__main__][INFO] - ",
                    "\r 50%|## | 1/2 [01:01<?, 2s/it]",
                ),
            )
        ),
    ],
)
def test_a_log_of_any_encoding_and_prefix_is_read(tmp_path, data):
    for name, content in (("a.log", OUTPUT.encode()), ("b.log", data)):
        (tmp_path / name).write_bytes(content)
    a, b = (read_run(tmp_path / name) for name in ("a.log", "b.log"))
    assert (a.scores, a.curve, a.settings) == (b.scores, b.curve, b.settings)


BROKEN = {
    "missing": lambda at: at / "x.log",
    "dangling": lambda at: (at / "x.log").symlink_to(at / "none") or at / "x.log",
    "a loop": lambda at: (at / "x.log").symlink_to(at / "x.log") or at / "x.log",
    "a long name": lambda at: at / ("x" * 300),
    "below a file": lambda at: (at / "x").write_text("") or Path(at / "x" / "y"),
}


@pytest.mark.parametrize("kind", BROKEN)
@pytest.mark.parametrize("name", ["compare", "submit", "check"])
def test_a_path_that_cannot_be_used_ends_in_one_line(tmp_path, capsys, kind, name):
    path = BROKEN[kind](tmp_path)
    who = "--name A --author A --github-id a --blurb b".split() if name == "submit" else []
    assert importlib.import_module(name).main([str(path), *who]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ") and str(path) in line and ";" in line


# ---- The command of a run ----


def variables(command):
    """The environment variables of a command."""
    words = shlex.split(command)
    return dict(word.split("=", 1) for word in words if re.match("[A-Z_0-9]+=", word))


@pytest.mark.parametrize("name", ["tiny/seed42", "plain/seed1337"])
def test_a_command_gives_the_settings_of_its_run(finished, name):
    run, log = read_run(finished / name), read_run(finished / name / "train.log")
    assert log.settings == run.settings
    assert command(log) == command(run)
    assert command(run).startswith(f"SEED={run.seed} ")
    given = vars(tg.Hyperparameters.from_env(variables(command(run))))
    assert given == run.settings | {"run_dir": ""}


@pytest.mark.parametrize(
    "line", ["", "VOCAB_SIZE=260 VE_ENABLED=1 SEED=5", *(f"PRESET={name}" for name in tg.PRESETS)]
)
def test_the_changed_settings_of_a_log_give_all_settings(tmp_path, line):
    h = tg.Hyperparameters.from_env(dict(pair.split("=") for pair in line.split()))
    log = tmp_path / "train.log"
    stated = " ".join(f"{name}:{value}" for name, value in vars(h).items())
    changed = tg.env_form(tg.changed_settings(h))
    log.write_text(f"{stated}\nchanged_settings: {changed}\n", encoding="utf-8")
    run = read_run(log)
    assert run.settings == vars(h)
    assert vars(tg.Hyperparameters.from_env(variables(command(run)))) == vars(h)


def test_a_command_of_an_older_log_names_every_setting(tmp_path):
    """Among them one that the program of today does not have."""
    log = tmp_path / "train_seed5.log"
    settings = "corpus:python vocab_size:260 ln_scale:False data_path:/a b/c preset:cpu seed:5 "
    log.write_text(f"{settings}their_dropout:0.5 their_switch:True\n", encoding="utf-8")
    assert command(read_run(log)) == (
        "SEED=5 CORPUS=python VOCAB_SIZE=260 LN_SCALE=0 DATA_PATH='/a b/c' PRESET=cpu "
        "THEIR_DROPOUT=0.5 THEIR_SWITCH=1 python train_gpt.py"
    )


def test_a_command_of_repacked_weights_and_of_many_ranks():
    settings = {"seed": 7, "model_dim": 512}
    run = Run(Path(), "", "ok", settings=settings, changed={"seed": "7", "run_dir": "logs/a"})
    weights = "--quantize final_model_seed7.safetensors"
    assert command(run) == f"SEED=7 python train_gpt.py {weights}"
    run = replace(run, steps=1, ranks=8)
    assert command(run) == "SEED=7 torchrun --standalone --nproc_per_node=8 train_gpt.py"


@pytest.mark.parametrize(
    ("omitting", "accepted"),
    [
        ("SEED=5 PRESET=cpu python train_gpt.py", True),
        ("SEED=5 DATA_PATH='a b' python train_gpt.py", True),
        ("SEED=5 LN_SCALE=1 python train_gpt.py", False),
        ("SEED=5 OTHER=1 python train_gpt.py", False),
        ("SEED=5 torchrun train_gpt.py", False),
        ("SEED=5 python", False),
    ],
)
def test_a_command_of_an_older_readme_may_omit_settings(omitting, accepted):
    whole = "    SEED=5 PRESET=cpu LN_SCALE=0 DATA_PATH='a b' python train_gpt.py"
    assert check.is_part_of_command(f"    {omitting}", whole) == accepted
