"""records/submit.py: the folder it makes of runs, and what it refuses."""

import ast
import fcntl
import json
import os
import re
import runpy
import shutil
import signal
import sys
import types
from pathlib import Path

import pytest
from conftest import ROOT, TINY

import train_gpt as tg

sys.path.insert(0, str(ROOT / "records"))

import figures
import submit
from runs import Defaults, Run, read_run

DAY = "2026-03-25"


def making(out, *runs, **options):
    """The command line, with options changed or, by None, left out."""
    told = {"name": "Tiny", "author": "A. Author", "github-id": "author", "date": DAY}
    told |= {"blurb": "As small as can be.", "out": out}
    told |= {name.replace("_", "-"): value for name, value in options.items()}
    words = [[f"--{name}", str(value)] for name, value in told.items() if value is not None]
    return [*map(str, runs), *(word for pair in words for word in pair)]


def made(out, *runs, **options):
    """The folder of a submission that is accepted."""
    assert submit.main(making(out, *runs, **options)) == 0
    return out / options.get("track", "track_non_record_16mb") / f"{DAY}_Tiny"


def refused(capsys, out, *runs, **options):
    """The reasons of a submission that is refused, and leaves nothing."""
    before = sorted(out.rglob("*"))
    assert submit.main(making(out, *runs, **options)) == 2
    assert sorted(out.rglob("*")) == before
    return capsys.readouterr().err.splitlines()


def edit(path, pattern, text):
    """Replace the one place that the pattern fits."""
    new, count = re.subn(pattern, text, path.read_text(encoding="utf-8"), flags=re.MULTILINE)
    assert count == 1, f"{count} places of {pattern}"
    path.write_text(new, encoding="utf-8")


def as_of_a_record(runs, to):
    """Copies of the runs, with logs that tell of eight H100s and the challenge's text."""
    shutil.copytree(runs, to)
    for log in to.rglob("train.log"):
        score = read_run(log).scores["plain"]
        tokens = round(score.tokens / score.bytes * tg.VAL_BYTES)
        edit(log, r"^(val_loader:.*) tokens:\d+", rf"\1 tokens:{tokens}")
        edit(log, r"^warning: \d+ bytes of validation text.*\n", "")
        edit(log, r"^world_size:1", "world_size:8")
        edit(log, r"^device:\S+ dtype", "device:NVIDIA H100 80GB HBM3 dtype")
    return to


def test_a_folder_of_one_arm(finished, tmp_path, capsys):
    folder = made(tmp_path, finished / "tiny")
    assert str(folder) in capsys.readouterr().out
    assert sorted(path.name for path in folder.iterdir()) == [
        "README.md",
        "requirements.txt",
        "submission.json",
        "train_gpt.py",
        "train_gpt_readable.py",
        "train_seed1337.log",
        "train_seed42.log",
        "train_seed7.log",
    ]
    forms = ("train_gpt.py", "train_gpt_readable.py")
    twin, source = ((finished / "tiny/seed7" / name).read_bytes() for name in forms)
    assert [(folder / name).read_bytes() for name in forms] == [twin, source]
    assert tg.unpacked_source(twin) == source
    told = json.loads((folder / "submission.json").read_text(encoding="utf-8"))
    results = {seed: tg_result(finished / f"tiny/seed{seed}") for seed in (1337, 42, 7)}
    scores = [result["scores"]["sliding"] for result in results.values()]
    assert told["val_bpb"] == pytest.approx(sum(s["val_bpb"] for s in scores) / 3, abs=1e-8)
    assert told["val_loss"] == pytest.approx(sum(s["val_loss"] for s in scores) / 3, abs=1e-8)
    mean = told["val_bpb"]
    spread = (sum((s["val_bpb"] - mean) ** 2 for s in scores) / 2) ** 0.5
    assert told["val_bpb_std"] == pytest.approx(spread, abs=2e-8)
    sizes = [result["bytes"]["total"] for result in results.values()]
    assert told["bytes_total"] == told["artifact_bytes_max"] == max(sizes)
    assert told["bytes_code"] == len(twin)
    assert told["bytes_code"] + told["bytes_model_int6_zstd"] == max(sizes)
    assert told["artifact_bytes_mean"] == pytest.approx(sum(sizes) / 3)
    assert told["seeds"] == [7, 42, 1337]
    assert (told["track"], told["date"], told["step_stop"]) == ("non_record_16mb", DAY, 6)
    for seed, result in results.items():
        of_seed = told["seed_results"][str(seed)]
        assert of_seed["val_bpb"] == pytest.approx(result["scores"]["sliding"]["val_bpb"], abs=1e-8)
        assert of_seed["artifact_bytes"] == result["bytes"]["total"]
        assert of_seed["code_sha256"] == result["code_sha256"] == figures.sha256(source)
        assert of_seed["val_sha256"] == result["val_sha256"]
    assert "arms" not in told
    needs = (folder / "requirements.txt").read_text(encoding="utf-8").split()
    assert needs[0] == f"torch=={results[7]['machine']['torch'].partition('+')[0]}"
    assert [re.match(r"\w+", need)[0] for need in needs[1:]] == [
        "numpy",
        "sentencepiece",
        "zstandard",
        "safetensors",
        "brotli",
    ]


def tg_result(folder):
    return json.loads((folder / "result.json").read_text(encoding="utf-8"))


def test_the_readme_says_how_it_was_made(finished, tmp_path):
    prose = tmp_path / "prose.md"
    prose.write_text("## Why\n\nBecause {braces} stay.\n", encoding="utf-8")
    folder = made(tmp_path / "out", finished / "tiny", text=prose)
    text = (folder / "README.md").read_text(encoding="utf-8")
    assert text.startswith("# Tiny\n\nAs small as can be.\n")
    assert "Because {braces} stay." in text
    command = next(line for line in text.splitlines() if line.endswith("python train_gpt.py"))
    assert command.startswith("    SEED=7 VOCAB_SIZE=260 ")
    assert "DATA_PATH=.../tiny_byte260" in command
    assert "RUN_DIR" not in command
    assert "| bytes of code and artifact |" in text
    assert text.count("PASS") == 3


@pytest.mark.parametrize(
    "line", ["", "VOCAB_SIZE=260 VE_ENABLED=1", *(f"PRESET={name}" for name in tg.PRESETS)]
)
def test_the_settings_of_a_program_by_its_source(line):
    env = dict(pair.split("=") for pair in line.split())
    found = Defaults(ast.parse((ROOT / "train_gpt.py").read_text(encoding="utf-8"))).settings(env)
    assert found == vars(tg.Hyperparameters.from_env(env))


def test_a_command_is_for_the_program_that_ran(tmp_path):
    """Whose presets, defaults and settings are its own; today's trainer has others."""
    theirs = Defaults(
        ast.parse("""
PRESETS = {"cpu": "VE_DIM=8 THEIR_DROPOUT=0.25 LN_SCALE=0"}
BYTE_RULES = "MODEL_DIM=32"
class ModelSettings:
	vocab_size = 1024, "tokens"
	model_dim = 512, "width"
	ln_scale = True, "scaled"
	smear_gate = round(0.7) == 0, "what cannot be read"
class Hyperparameters(ModelSettings):
	preset = "", "a whole configuration", " ".join(PRESETS)
	ve_dim = 128, "width"
	their_dropout = 0.0, "of ours there is none"
""")
    )
    log = tmp_path / "train_seed5.log"
    log.write_text(
        "corpus:python vocab_size:260 model_dim:32 ln_scale:False smear_gate:True preset:cpu "
        "seed:5 ve_dim:16 their_dropout:0.5\n",
        encoding="utf-8",
    )
    assert theirs.command(read_run(log)) == (
        "SEED=5 PRESET=cpu VOCAB_SIZE=260 CORPUS=python SMEAR_GATE=1 VE_DIM=16 THEIR_DROPOUT=0.5 "
        "python train_gpt.py"
    )


@pytest.mark.parametrize(
    "text",
    [
        "PRESETS = dict(cpu='MATRIX_LR=0.9')",
        "PRESETS = ['cpu']",
        "PRESETS = {'cpu': {'MATRIX_LR': 2}, 'gpu': None, 3: '', 'two': 'MATRIX_LR=0.9 words'}",
        "PRESETS = {'cpu': ''}\nPRESETS['cpu'] += ' MATRIX_LR=0.9'",
        "PRESETS = {'cpu': ''}\nPRESETS |= {'cpu': ' MATRIX_LR=0.9'}",
        "NONE = ()\nA, B = 1, 2",
        "class Hyperparameters:\n\t__slots__ = ()",
        "class Hyperparameters:\n\tmatrix_lr = 0.02, 'rate'\nHyperparameters.matrix_lr = 0.9",
        "class Hyperparameters:\n\tmatrix_lr = 0.02, 'rate'\n\tmatrix_lr = float('0.9')",
        "class Hyperparameters:\n\tmatrix_lr = None, 'rate'",
        "class ModelSettings:\n\tmatrix_lr = 0.02, 'rate'\n"
        "class Hyperparameters(ModelSettings):\n\tmatrix_lr = float('0.9'), 'rate'",
        "class Hyperparameters:\n\tmatrix_lr: float = 0.02",
        "class Hyperparameters:\n\tmatrix_lr = {[]: 1}",
    ],
)
def test_a_setting_that_cannot_be_read_is_named(text):
    run = Run(Path(), "", "ok", settings={"preset": "cpu", "seed": 5, "matrix_lr": 0.02}, steps=1)
    command = Defaults(ast.parse(text)).command(run)
    assert command == "SEED=5 PRESET=cpu MATRIX_LR=0.02 python train_gpt.py"


def test_a_log_of_another_script_is_of_no_other_weights(tmp_path):
    """It has scores and no line of steps or settings."""
    log = tmp_path / "train_seed3.log"
    log.write_text("final_int6_roundtrip_exact val_loss:2.0 val_bpb:1.2\n", encoding="utf-8")
    command = Defaults(ast.parse("")).command(read_run(log))
    assert command == "SEED=3 python train_gpt.py"


def test_logs_keep_all_but_paths(finished, tmp_path):
    folder = made(tmp_path, finished / "tiny")
    before = (finished / "tiny/seed42/train.log").read_text(encoding="utf-8").splitlines()
    after = (folder / "train_seed42.log").read_text(encoding="utf-8").splitlines()
    changed = [pair for pair in zip(before, after, strict=True) if pair[0] != pair[1]]
    assert [new.partition(":")[0] for _, new in changed] == [
        "logs/tiny/seed42/train.log",
        "val_loader",
        "corpus",
        "changed_settings",
    ]
    assert "run_dir:logs/tiny/seed42 " in changed[2][1]
    assert "RUN_DIR=logs/tiny/seed42 " in changed[3][1]
    assert not any("/tmp" in line or str(finished) in line for line in after)


@pytest.mark.parametrize(
    ("line", "shown"),
    [
        ("run_dir:/home/me/a b/logs/x seed:1", "run_dir:logs/x seed:1"),
        ('  File "/usr/lib/python3/site-packages/torch/a.py", line 3', '  File ".../a.py", line 3'),
        ("ImportError('/opt/cuda/lib/x.so: no')", "ImportError('.../x.so: no')"),
        (
            "pattern=/home/me/data/sp1024/fineweb_*.bin tokens:9",
            "pattern=.../fineweb_*.bin tokens:9",
        ),
        ('  File "/home/my name/a b/x.py", line 3, "/a"', '  File ".../x.py", line 3, "/a"'),
        ("[Errno 2] None: '/home/my name/x y'", "[Errno 2] None: '.../x y'"),
        ("~/logs/a and C:\\Users\\me\\x.py", ".../a and .../x.py"),
        ("step:1/20 train_loss:5.5 train_time:3ms", None),
        ("a and/or b, 3 / 4 / 5, https://example.org/a/b ./data/x/y.bin", None),
        ("limit:eval_seconds 0.3 of 600.0 PASS", None),
    ],
)
def test_paths_of_a_machine(line, shown):
    run = figures.Run(
        Path("/home/me/a b/logs/x"), "", "ok", settings={"run_dir": "/home/me/a b/logs/x"}
    )
    assert submit.scrubbed(line, run) == (line if shown is None else shown)


def test_a_study_keeps_what_failed(finished, tmp_path):
    folder = made(tmp_path, finished, main="tiny", base="plain")
    assert sorted(path.name for path in folder.glob("*.log")) == [
        "train_lost_seed42.log",
        "train_plain_seed1337.log",
        "train_plain_seed42.log",
        "train_tiny_seed1337.log",
        "train_tiny_seed42.log",
        "train_tiny_seed7.log",
    ]
    told = json.loads((folder / "submission.json").read_text(encoding="utf-8"))
    assert (told["main"], told["base"], sorted(told["arms"])) == (
        "tiny",
        "plain",
        ["lost", "plain", "tiny"],
    )
    assert told["seed_results"] == told["arms"]["tiny"]
    assert "the loss is nan" in told["arms"]["lost"]["42"]["reason"]
    text = (folder / "README.md").read_text(encoding="utf-8")
    assert re.search(r"^\| lost \| 42 \| failed: step \d+: the loss is nan", text, re.MULTILINE)
    assert len(re.findall(r"^\| (?:plain|tiny) \| \d+ \|", text, re.MULTILINE)) >= 5
    assert text.count("python train_gpt.py") == 3
    assert "BIGRAM_VOCAB_SIZE=0" in text
    assert "The arms are not compared" not in text


def test_a_trial_that_died_before_its_log(finished, tmp_path, capsys):
    """By what it put on the screen; one that never ran is refused."""
    runs = shutil.copytree(finished, tmp_path / "runs")
    early = runs / "early" / "seed5"
    early.mkdir(parents=True)
    (early / "command.sh").write_text("python train_gpt.py")
    assert any(
        "seed5: waiting; needed: runs that have ended" in reason
        for reason in refused(capsys, tmp_path / "out", runs, main="tiny")
    )
    (early / "output.txt").write_text("error: MODEL_DIM=7 must be even\n")
    folder = made(tmp_path / "out", runs, main="tiny")
    text = (folder / "README.md").read_text(encoding="utf-8")
    assert "| early | 5 | failed: MODEL_DIM=7 must be even |" in text


def killed(folder):
    (folder / "exit_status").write_text("137\n")


def stopped(folder):
    (folder / "stopped").write_text("hopeless: loss 6.000")


def running(folder):
    lock = open(f"{folder}.lock", "w")
    fcntl.flock(lock, fcntl.LOCK_EX)
    return lock


@pytest.mark.parametrize(
    ("fate", "reason"),
    [
        (killed, "seed7: failed: killed by signal 9; needed: a score"),
        (stopped, "seed7: stopped: hopeless: loss 6.000; needed: a score"),
        (running, "seed7: running; needed: runs that have ended"),
    ],
)
def test_a_trial_is_what_the_sweep_knows_of_it(finished, tmp_path, capsys, fate, reason):
    runs = shutil.copytree(finished / "tiny", tmp_path / "tiny")
    unfinished(runs)
    for seed in (42, 1337) if fate is not running else ():
        shutil.rmtree(runs / f"seed{seed}")
    held = fate(runs / "seed7")
    reasons = refused(capsys, tmp_path / "out", runs)
    assert any(reason in said for said in reasons), reasons
    del held


def test_a_run_put_aside_is_no_trial(finished, tmp_path):
    runs = shutil.copytree(finished / "tiny", tmp_path / "tiny")
    shutil.copytree(runs / "seed7", runs / "seed7.cut1")
    assert len([*made(tmp_path / "out", runs).glob("*.log")]) == 3


def test_runs_by_any_name_are_one_arm(finished, tmp_path):
    for seed, name in ((42, "first"), (7, "second")):
        shutil.copytree(finished / f"tiny/seed{seed}", tmp_path / name)
    folder = made(tmp_path / "out", tmp_path / "first", tmp_path / "second")
    log = (folder / "train_seed42.log").read_text(encoding="utf-8")
    assert log.startswith("logs/first/train.log\n")


def test_plots_are_shown(finished, tmp_path, monkeypatch):
    plot = types.ModuleType("plot")

    def draw(runs, kind, out, base):
        assert base == "tiny"
        for suffix in ("png", "svg"):
            (out / f"{kind}.{suffix}").write_bytes(b"a picture")
        return [out / f"{kind}.png", out / f"{kind}.svg"]

    plot.draw = draw
    monkeypatch.setitem(sys.modules, "plot", plot)
    arguments = making(tmp_path, finished, main="tiny")
    assert submit.main([*arguments, "--plots"]) == 0
    text = next(tmp_path.rglob("README.md")).read_text(encoding="utf-8")
    assert "![loss](loss.png)" in text
    assert "![scores](scores.png)" in text


def test_a_record(finished, tmp_path):
    runs = as_of_a_record(finished / "tiny", tmp_path / "tiny")
    folder = made(tmp_path / "out", runs, track="track_10min_16mb")
    told = json.loads((folder / "submission.json").read_text(encoding="utf-8"))
    assert (told["track"], told["hardware"]) == ("10min_16mb", "8x NVIDIA H100 80GB HBM3")
    text = (folder / "README.md").read_text(encoding="utf-8")
    assert "torchrun --standalone --nproc_per_node=8 train_gpt.py" in text


def test_what_no_record_is(finished, tmp_path, capsys):
    """All reasons at once: hardware, text and the number of seeds."""
    reasons = refused(capsys, tmp_path, finished / "tiny/seed42", track="track_10min_16mb")
    assert len(reasons) == 3
    for text in ("1 seeds; needed: 3", "1x x86_64 CPU; needed: 8xH100", "3783 bytes scored"):
        assert any(text in reason for reason in reasons), text
    assert made(tmp_path, finished / "tiny/seed42").exists()  # the other track takes it


@pytest.mark.parametrize(("size", "status"), [(16_000_000, 0), (16_000_001, 2)])
def test_size_and_the_tracks(finished, tmp_path, size, status):
    """Exactly at the limit is a record; one byte more is none, and the other track says FAIL."""
    runs = as_of_a_record(finished / "tiny", tmp_path / "tiny")
    log, result = runs / "seed7/train.log", runs / "seed7/result.json"
    sizes = tg_result(runs / "seed7")["bytes"]
    sizes |= {"model": size - sizes["code"], "total": size}
    edit(log, r"^(Serialized model int6\+zstd:) \d+", rf"\1 {sizes['model']}")
    edit(log, r"^(Total submission size int6\+zstd:) \d+", rf"\1 {size}")
    edit(log, r"^size: \d+", f"size: {sizes['model']}")
    verdict = "FAIL" if status else "PASS"
    edit(log, r"^(limit:total_bytes) .*", rf"\1 {size:,} of 16,000,000 {verdict}")
    changed = tg_result(runs / "seed7") | {"bytes": sizes}
    changed["status"] = "over a limit" if status else "ok"
    result.write_text(json.dumps(changed), encoding="utf-8")
    arguments = making(tmp_path / "out", runs, track="track_10min_16mb")
    assert submit.main(arguments) == status
    folder = made(tmp_path / "out", runs)
    text = (folder / "README.md").read_text(encoding="utf-8")
    assert f"16,000,000 | {'FAIL' if status else 'PASS'} |" in text


def other_code(runs):
    (runs / "seed7/train_gpt.py").write_bytes(b"# other\n")


def damaged_code(runs):
    path = runs / "seed7/train_gpt.py"
    path.write_bytes(path.read_bytes().replace(b'b85decode("', b'b85decode("\\'))


def other_data(runs):
    edit(runs / "seed7/result.json", r'"val_sha256": "....', '"val_sha256": "beef')


def other_settings(runs):
    edit(runs / "seed42/train.log", " matrix_lr:0.025 ", " matrix_lr:0.02 ")


def unfinished(runs):
    (runs / "seed7/result.json").unlink()
    log = runs / "seed7/train.log"
    log.write_text(log.read_text(encoding="utf-8").partition("Serialized model")[0])


def other_result(runs):
    edit(runs / "seed7/result.json", r'^  "steps": 6', '  "steps": 7')


def broken_result(runs):
    (runs / "seed7/result.json").write_text('{"status": "o', encoding="utf-8")


def no_log(runs):
    (runs / "seed7/train.log").unlink()


def failed(runs):
    changed = tg_result(runs / "seed7") | {"status": "oom", "reason": "out of memory"}
    (runs / "seed7/result.json").write_text(json.dumps(changed))
    with open(runs / "seed7/train.log", "a") as log:
        log.write("error: out of memory\n")


def same_seed(runs):
    shutil.copytree(runs / "seed7", runs / "again" / "tiny" / "seed7")


FAULTS = {
    other_code: r"train_gpt.py: 2 of them.*needed: the same",
    damaged_code: r"seed7/train_gpt.py: the packed source cannot be decoded: ",
    other_data: r"validation data \['\w+', 'beef\w+'\].*needed: the same",
    other_settings: r"train_seed42.log: \{'matrix_lr': \(0.02, 0.025\)\}; needed: the settings of",
    unfinished: r"train_seed7.log: cut off: its log ends too early; needed: a score",
    other_result: r"seed7: result.json has 7, its log 6",
    broken_result: r"seed7: result.json has failed, its log ok",
    no_log: r"seed7: ok; needed: runs that have ended, with their logs",
    failed: r"train_seed7.log: failed: out of memory; needed: a score",
    same_seed: r"tiny: seeds \[7, 1337, 42, 7\]; needed: each once",
}


@pytest.mark.parametrize("plant", FAULTS, ids=lambda plant: plant.__name__)
def test_refused(finished, tmp_path, capsys, plant):
    runs = shutil.copytree(finished / "tiny", tmp_path / "tiny")
    plant(runs)
    reasons = refused(capsys, tmp_path / "out", runs)
    assert any(re.search(FAULTS[plant], reason) for reason in reasons), reasons


def test_a_program_that_is_not_packed(finished, tmp_path):
    """Runs of older programs have one file, which counts as it is."""
    runs = shutil.copytree(finished / "tiny", tmp_path / "tiny")
    source = b"import numpy\nimport torch\n\n\ndef main():\n    print(numpy, torch)\n\n\n"
    source += b'if __name__ == "__main__":\n    main()\n'
    for seed in (7, 42, 1337):
        folder = runs / f"seed{seed}"
        (folder / "train_gpt_readable.py").unlink()
        (folder / "train_gpt.py").write_bytes(source)
        result = tg_result(folder)
        model = result["bytes"]["model"]
        sizes = {"code": len(source), "model": model, "total": len(source) + model}
        result |= {"bytes": sizes, "code_sha256": figures.sha256(source)}
        (folder / "result.json").write_text(json.dumps(result), encoding="utf-8")
        edit(folder / "train.log", r"^Code size: \d+", f"Code size: {sizes['code']}")
        edit(folder / "train.log", r"^(Total .*:) \d+", rf"\1 {sizes['total']}")
        total = f"limit:total_bytes {sizes['total']:,}"
        edit(folder / "train.log", r"^limit:total_bytes \S+", total)
    folder = made(tmp_path / "out", runs)
    assert (folder / "train_gpt.py").read_bytes() == source
    assert not (folder / "train_gpt_readable.py").exists()
    assert "readable" not in (folder / "README.md").read_text(encoding="utf-8")
    needs = (folder / "requirements.txt").read_text(encoding="utf-8").split()
    assert [re.match(r"\w+", need)[0] for need in needs] == ["torch", "numpy"]
    told = json.loads((folder / "submission.json").read_text(encoding="utf-8"))
    assert told["bytes_code"] == len(source)
    assert told["seed_results"]["7"]["code_sha256"] == figures.sha256(source)


def test_all_reasons_at_once(finished, tmp_path, capsys):
    runs = shutil.copytree(finished / "tiny", tmp_path / "tiny")
    made(tmp_path / "out", runs)
    other_code(runs)
    other_data(runs)
    reasons = refused(capsys, tmp_path / "out", runs)
    assert len(reasons) == 4
    for text in ("train_gpt.py: 2 of them", "validation data", "is there; needed: another --name"):
        assert any(text in reason for reason in reasons), text


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"main": "tiny", "name": "../../b"}, "--name: ../../b; needed: letters"),
        ({"main": "other"}, "--main: other; needed: an arm with scores, of lost, plain, tiny"),
        ({"main": "lost"}, "seed42: nan: step"),
        ({"main": "tiny", "base": "other"}, "--base: other; needed: an arm"),
        ({"main": "tiny", "base": "lost"}, "--base: lost; needed: an arm with scores"),
        ({}, "--main: None; needed: an arm with scores, of lost, plain, tiny"),
        ({"main": "tiny", "date": "2026-3-5"}, "date: 2026-3-5; needed: YYYY-MM-DD"),
        ({"main": "tiny", "author": " "}, "author: ; needed: text"),
        ({"main": "tiny", "text": "nowhere.md"}, "nowhere.md"),
    ],
)
def test_options_refused(finished, tmp_path, capsys, options, reason):
    assert any(reason in said for said in refused(capsys, tmp_path, finished, **options))


def test_no_runs(tmp_path, capsys):
    assert refused(capsys, tmp_path, tmp_path) == [f"error: {tmp_path}: no run is there"]


def test_each_path_has_runs(finished, tmp_path, capsys):
    """A name mistyped would drop an arm."""
    lost = tmp_path / "tyni"
    told = refused(capsys, tmp_path, finished / "tiny", lost, finished / "plain", main="tiny")
    assert f"error: {lost}: no run is there" in told


def test_the_command_line(finished, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["submit.py", *making(tmp_path, finished / "tiny")])
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(ROOT / "records/submit.py"), run_name="__main__")
    assert ended.value.code == 0
    assert capsys.readouterr().out.splitlines()[1].startswith("next: python records/check.py ")


def test_a_resumed_run(finished, byte_corpus, tmp_path, monkeypatch):
    """Stopped by a signal and gone on with: a run with a score, each step told once."""
    runs, seed = shutil.copytree(finished / "tiny", tmp_path / "tiny"), tmp_path / "tiny/seed7"
    settings = read_run(seed).settings
    shutil.rmtree(seed)
    env = {name.upper(): str(value) for name, value in TINY.items()}
    env |= {"NUM_LAYERS": "2", "ITERATIONS": "6", "DATA_PATH": str(byte_corpus), "SEED": "7"}
    env |= {"RUN_DIR": str(seed), "RESUME": "auto", "CHECKPOINT_EVERY": "2"}
    take_step, steps = tg.Trainer.take_step, []

    def signalled(*arguments):
        steps.append(0)
        if len(steps) == 4:
            os.kill(os.getpid(), signal.SIGTERM)
        return take_step(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(tg.Trainer, "take_step", signalled)
        assert tg.main([], env) == 5
    log = seed / "train.log"
    stopped = read_run(log)
    assert (stopped.status, [step for step, *_ in stopped.curve]) == ("failed", [1, 2, 3, 4])
    # As a kill after the checkpoint leaves it: a step more, which the next start does again.
    again = "step:5/6 train_loss:9.0000 train_time:9ms step_avg:1.00ms\n"
    log.write_text(log.read_text(encoding="utf-8") + again, encoding="utf-8")
    assert tg.main([], env) == 0
    run = read_run(log)
    assert (run.status, run.steps, run.reason) == ("ok", 6, "")
    assert [step for step, *_ in run.curve] == [1, 2, 3, 4, 5, 6]
    assert all(loss < 9 for _, _, loss in run.curve)
    assert run.settings["matrix_lr"] == settings["matrix_lr"]
    for path in runs.glob("seed[41]*/train.log"):  # what the others were told
        edit(path, " checkpoint_every:0 ", " checkpoint_every:2 ")
    folder = made(tmp_path / "out", runs)
    assert "resume: step 4, " in (folder / "train_seed7.log").read_text(encoding="utf-8")


def test_logs_without_a_score(finished, tmp_path, capsys):
    """Though result.json tells one."""
    runs = shutil.copytree(finished / "tiny", tmp_path / "tiny")
    for log in runs.rglob("train.log"):
        log.write_text(log.read_text(encoding="utf-8").partition("DIAGNOSTIC")[0])
    (reason,) = refused(capsys, tmp_path / "out", runs)
    assert reason.startswith("error: no log tells a score: train_seed7.log: cut off: ")
