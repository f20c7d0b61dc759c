"""records/submit.py: the folder that it makes of runs, and what it refuses."""

import contextlib
import fcntl
import io
import json
import os
import re
import shlex
import shutil
import signal
import sys
from pathlib import Path

import pytest
from conftest import ROOT, TINY

import train_gpt as tg

sys.path.insert(0, str(ROOT / "records"))

import figures
import submit
from runs import Run, read_run

DAY = "2026-03-25"
SMALL = b"import numpy\nimport torch\nimport zstandard\n\nRATE = 0.025\n"


def arguments(out, *runs, **options):
    """The command line, with options changed or, by None, left out."""
    values = {"name": "Tiny", "author": "A. Author", "github-id": "author", "date": DAY}
    values |= {"blurb": "As small as can be.", "out": out}
    values |= {name.replace("_", "-"): value for name, value in options.items()}
    words = [[f"--{name}", str(value)] for name, value in values.items() if value is not None]
    return [*map(str, runs), *(word for pair in words for word in pair)]


def make_entry(out, *runs, **options):
    """The folder of a submission that is accepted."""
    assert submit.main(arguments(out, *runs, **options)) == 0
    return out / options.get("track", "track_non_record_16mb") / f"{DAY}_Tiny"


def refusal(capsys, out, *runs, **options):
    """The reasons against a submission that is refused and leaves nothing."""
    before = sorted(out.rglob("*"))
    assert submit.main(arguments(out, *runs, **options)) == 2
    assert sorted(out.rglob("*")) == before
    return capsys.readouterr().err.splitlines()


def edit(path, pattern, text):
    """Replaces the one place that fits the pattern."""
    new, count = re.subn(pattern, text, path.read_text(encoding="utf-8"), flags=re.MULTILINE)
    assert count == 1, f"{count} places of {pattern}"
    path.write_text(new, encoding="utf-8")


def as_record(runs, to):
    """Copies runs; their logs then name eight H100s and the challenge's text."""
    shutil.copytree(runs, to)
    for log in to.rglob("train.log"):
        score = read_run(log).scores["plain"]
        tokens = round(score.tokens / score.bytes * tg.VAL_BYTES)
        edit(log, r"^(val_loader:.*) tokens:\d+", rf"\1 tokens:{tokens}")
        edit(log, r"^warning: \d+ bytes of validation text.*\n", "")
        edit(log, r"^world_size:1", "world_size:8")
        edit(log, r"^device:\S+ dtype", "device:NVIDIA H100 80GB HBM3 dtype")
    return to


def load(path):
    return json.loads(path.read_text(encoding="utf-8"))


def set_program(runs, program, source):
    """Replaces the program of finished runs, and what their logs and results state of it."""
    for path in runs.rglob("result.json"):
        folder, result = path.parent, load(path)
        (folder / "train_gpt.py").write_bytes(program)
        (folder / "train_gpt_readable.py").unlink()
        if program != source:
            (folder / "train_gpt_readable.py").write_bytes(source)
        if "bytes" not in result:
            continue
        total = len(program) + result["bytes"]["model"]
        result["bytes"] |= {"code": len(program), "total": total}
        result["code_sha256"] = figures.sha256(source)
        path.write_text(json.dumps(result, indent=2), encoding="utf-8")
        edit(folder / "train.log", r"^Code size: \d+", f"Code size: {len(program)}")
        edit(folder / "train.log", r"^(Total .*:) \d+", rf"\1 {total}")
        edit(folder / "train.log", r"^limit:total_bytes \S+", f"limit:total_bytes {total:,}")


def with_small_program(runs, to):
    """Copies finished runs with a program of a few lines, which is checked fast."""
    shutil.copytree(runs, to)
    set_program(to, tg.packed_source(SMALL), SMALL)
    return to


@pytest.fixture(scope="session")
def small(finished, tmp_path_factory):
    """The finished runs with a small program."""
    return with_small_program(finished, tmp_path_factory.mktemp("small") / "runs")


# ---- What it makes ----


def test_the_figures_are_those_of_the_runs(finished, tmp_path, capsys):
    folder = make_entry(tmp_path, finished / "tiny")
    assert capsys.readouterr().out.splitlines() == [
        str(folder),
        f"next: python records/check.py {folder}",
    ]
    logs = {f"train_seed{seed}.log" for seed in (7, 42, 1337)}
    others = {"README.md", "requirements.txt", "submission.json"}
    forms = ("train_gpt.py", "train_gpt_readable.py")
    assert {path.name for path in folder.iterdir()} == logs | others | {*forms}
    twin, source = ((finished / "tiny/seed7" / name).read_bytes() for name in forms)
    assert [(folder / name).read_bytes() for name in forms] == [twin, source]
    told = load(folder / "submission.json")
    results = {seed: load(finished / f"tiny/seed{seed}/result.json") for seed in (1337, 42, 7)}
    for unit in ("val_bpb", "val_loss"):
        values = [result["scores"]["sliding"][unit] for result in results.values()]
        mean = sum(values) / 3
        assert told[unit] == pytest.approx(mean, abs=1e-8)
        spread = (sum((value - mean) ** 2 for value in values) / 2) ** 0.5
        assert told[f"{unit}_std"] == pytest.approx(spread, abs=2e-8)
    sizes = [result["bytes"]["total"] for result in results.values()]
    assert told["bytes_total"] == told["artifact_bytes_max"] == max(sizes)
    assert told["bytes_code"] == len(twin)
    assert told["bytes_code"] + told["bytes_model_int6_zstd"] == max(sizes)
    assert told["artifact_bytes_mean"] == pytest.approx(sum(sizes) / 3)
    assert told["seeds"] == [7, 42, 1337] and "trials" not in told
    assert (told["track"], told["date"], told["step_stop"]) == ("non_record_16mb", DAY, 6)
    for seed, result in results.items():
        of_seed = told["seed_results"][str(seed)]
        assert of_seed["val_bpb"] == pytest.approx(result["scores"]["sliding"]["val_bpb"], abs=1e-8)
        assert of_seed["artifact_bytes"] == result["bytes"]["total"]
        assert of_seed["code_sha256"] == result["code_sha256"] == figures.sha256(source)
        assert of_seed["val_sha256"] == result["val_sha256"]
    needs = (folder / "requirements.txt").read_text(encoding="utf-8").split()
    assert needs[0] == f"torch=={results[7]['machine']['torch'].partition('+')[0]}"
    packages = {re.match(r"\w+", need)[0] for need in needs}
    needed = {"torch", "numpy", "sentencepiece", "zstandard", "safetensors", "brotli"}
    assert packages == needed | {"constriction"}


def test_the_readme_has_text_figures_and_command(small, tmp_path):
    prose = tmp_path / "prose.md"
    prose.write_text("## Why\n\nBecause {braces} stay.\n", encoding="utf-8")
    folder = make_entry(tmp_path / "out", small / "tiny", text=prose)
    text = (folder / "README.md").read_text(encoding="utf-8")
    assert text.startswith("# Tiny\n\nAs small as can be.\n")
    assert "Because {braces} stay." in text
    command = next(line for line in text.splitlines() if line.endswith("python train_gpt.py"))
    assert command.startswith("    SEED=7 ")
    assert "VOCAB_SIZE=260 " in command and "DATA_PATH=.../tiny_byte260 " in command
    assert "RUN_DIR" not in command
    assert "| bytes of code and artifact |" in text
    assert text.count("PASS") == 3


def test_logs_are_unchanged_but_for_paths(small, tmp_path):
    folder = make_entry(tmp_path, small / "tiny")
    before = (small / "tiny/seed42/train.log").read_text(encoding="utf-8").splitlines()
    after = (folder / "train_seed42.log").read_text(encoding="utf-8").splitlines()
    changed = [new for old, new in zip(before, after, strict=True) if old != new]
    lines = ["logs/tiny/seed42/train.log", "val_loader", "corpus", "changed_settings"]
    assert [line.partition(":")[0] for line in changed] == lines
    assert "run_dir:logs/tiny/seed42 " in changed[2]
    assert "RUN_DIR=logs/tiny/seed42 " in changed[3]
    assert not any("/tmp" in line or str(small) in line for line in after)


@pytest.mark.parametrize(
    ("line", "shown"),
    [
        ("run_dir:/home/me/a b/logs/x seed:1", "run_dir:logs/x seed:1"),
        ('  File "/usr/lib/python3/torch/a.py", line 3', '  File ".../a.py", line 3'),
        ("ImportError('/opt/cuda/lib/x.so: no')", "ImportError('.../x.so: no')"),
        ("pattern=/home/me/sp1024/fineweb_*.bin tokens:9", "pattern=.../fineweb_*.bin tokens:9"),
        ('  File "/home/my name/a b/x.py", line 3, "/a"', '  File ".../x.py", line 3, "/a"'),
        ("[Errno 2] None: '/home/my name/x y'", "[Errno 2] None: '.../x y'"),
        ("~/logs/a and C:\\Users\\me\\x.py", ".../a and .../x.py"),
        ("step:1/20 train_loss:5.5 train_time:3ms", None),
        ("a and/or b, 3 / 4 / 5, https://example.org/a/b ./data/x/y.bin", None),
        ("limit:eval_seconds 0.3 of 600.0 PASS", None),
    ],
)
def test_paths_of_a_machine_are_hidden(line, shown):
    settings = {"run_dir": "/home/me/a b/logs/x"}
    run = Run(Path("/home/me/a b/logs/x"), "", "ok", settings=settings)
    assert submit.hide_paths(line, run) == (line if shown is None else shown)


def test_a_study_includes_the_trial_that_failed(small, tmp_path):
    folder = make_entry(tmp_path, small, main="tiny", base="plain")
    seeds = ["lost_seed42", "plain_seed1337", "plain_seed42"]
    seeds += ["tiny_seed1337", "tiny_seed42", "tiny_seed7"]
    assert sorted(path.stem for path in folder.glob("*.log")) == [f"train_{x}" for x in seeds]
    told = load(folder / "submission.json")
    assert (told["main"], told["base"]) == ("tiny", "plain")
    assert sorted(told["trials"]) == ["lost", "plain", "tiny"]
    assert told["seed_results"] == told["trials"]["tiny"]
    assert "the loss is nan" in told["trials"]["lost"]["42"]["reason"]
    text = (folder / "README.md").read_text(encoding="utf-8")
    assert re.search(r"^\| lost \| 42 \| failed: step \d+: the loss is nan", text, re.MULTILINE)
    assert len(re.findall(r"^\| (?:plain|tiny) \| \d+ \|", text, re.MULTILINE)) >= 5
    assert text.count("python train_gpt.py") == 3
    assert "BIGRAM_VOCAB_SIZE=0" in text
    assert "The trials are not compared" not in text


def test_a_trial_that_failed_before_its_log(small, tmp_path, capsys):
    """Its screen is its log. A trial that never ran, and one put aside, are no runs."""
    runs = shutil.copytree(small, tmp_path / "runs")
    shutil.copytree(runs / "tiny/seed7", runs / "tiny/seed7.cut1")
    early = runs / "early" / "seed5"
    early.mkdir(parents=True)
    (early / "command.sh").write_text("python train_gpt.py")
    reasons = refusal(capsys, tmp_path / "out", runs, main="tiny")
    assert any("seed5: waiting; needed: runs that have ended" in reason for reason in reasons)
    (early / "output.txt").write_text("error: MODEL_DIM=7 must be even\n")
    folder = make_entry(tmp_path / "out", runs, main="tiny")
    text = (folder / "README.md").read_text(encoding="utf-8")
    assert "| early | 5 | failed: MODEL_DIM=7 must be even |" in text
    assert len([*folder.glob("train_tiny_*.log")]) == 3


def test_runs_by_any_name_are_one_trial(small, tmp_path):
    for seed, name in ((42, "first"), (7, "second")):
        shutil.copytree(small / f"tiny/seed{seed}", tmp_path / name)
    folder = make_entry(tmp_path / "out", tmp_path / "first", tmp_path / "second")
    log = (folder / "train_seed42.log").read_text(encoding="utf-8")
    assert log.startswith("logs/first/train.log\n")


def test_plots_are_png_files_that_the_page_shows(small, tmp_path):
    command = arguments(tmp_path, small, main="tiny")
    assert submit.main([*command, "--plots"]) == 0
    (page,) = tmp_path.rglob("README.md")
    text = page.read_text(encoding="utf-8")
    assert "![loss](loss.png)" in text and "![scores](scores.png)" in text
    assert {path.name for path in page.parent.glob("*.png")} == {"loss.png", "scores.png"}
    assert not [*tmp_path.rglob("*.svg")]


def test_a_program_that_is_not_packed_ships_alone(finished, tmp_path):
    """Runs of older programs have one file, whose bytes count as they are."""
    runs = shutil.copytree(finished / "tiny", tmp_path / "tiny")
    source = b"import numpy\nimport torch\n"
    set_program(runs, source, source)
    folder = make_entry(tmp_path / "out", runs)
    assert (folder / "train_gpt.py").read_bytes() == source
    assert not (folder / "train_gpt_readable.py").exists()
    assert "readable" not in (folder / "README.md").read_text(encoding="utf-8")
    needs = (folder / "requirements.txt").read_text(encoding="utf-8").split()
    assert [re.match(r"\w+", need)[0] for need in needs] == ["torch", "numpy"]
    told = load(folder / "submission.json")
    assert told["bytes_code"] == len(source)
    assert told["seed_results"]["7"]["code_sha256"] == figures.sha256(source)


class InterruptingScreen(io.StringIO):
    """Standard output that sends this process SIGTERM when the run prints its fourth step."""

    def write(self, text):
        if text.startswith("step:4/"):
            os.kill(os.getpid(), signal.SIGTERM)
        return super().write(text)


def test_a_resumed_run_has_each_step_once(finished, byte_corpus, tmp_path):
    """The run is stopped by a signal, and its log has a step that the second start repeats."""
    runs, seed = shutil.copytree(finished / "tiny", tmp_path / "tiny"), tmp_path / "tiny/seed7"
    shutil.rmtree(seed)
    env = TINY | {"NUM_LAYERS": "2", "ITERATIONS": "6", "DATA_PATH": str(byte_corpus), "SEED": "7"}
    env |= {"RUN_DIR": str(seed), "RESUME": "auto", "CHECKPOINT_EVERY": "2"}
    with contextlib.redirect_stdout(InterruptingScreen()):
        assert tg.main([], env) == 5
    log = seed / "train.log"
    stopped = read_run(log)
    last = len(stopped.curve)
    assert stopped.status == "failed" and last in (4, 5)
    again = f"step:{last + 1}/6 train_loss:9.0000 train_time:9ms step_avg:1.00ms\n"
    log.write_text(log.read_text(encoding="utf-8") + again, encoding="utf-8")
    assert tg.main([], env) == 0
    run = read_run(log)
    assert (run.status, run.steps, run.reason) == ("ok", 6, "")
    assert [step for step, *_ in run.curve] == [1, 2, 3, 4, 5, 6]
    assert all(loss < 9 for _, _, loss in run.curve)
    for path in runs.glob("seed[41]*/train.log"):  # the settings of a trial must be the same
        edit(path, " checkpoint_every:0 ", " checkpoint_every:2 ")
    folder = make_entry(tmp_path / "out", runs)
    assert "resume: step " in (folder / "train_seed7.log").read_text(encoding="utf-8")


# ---- The record track ----


def test_what_is_missing_for_a_record_is_listed(small, tmp_path, capsys):
    reasons = refusal(capsys, tmp_path, small / "tiny/seed42", track="track_10min_16mb")
    assert len(reasons) == 3
    for text in ("1 seeds; needed: 3", "CPU; needed: 8xH100", "3783 bytes scored"):
        assert any(text in reason for reason in reasons), text
    assert make_entry(tmp_path, small / "tiny/seed42").exists()  # the other track takes it


@pytest.mark.parametrize(("size", "verdict"), [(16_000_000, "PASS"), (16_000_001, "FAIL")])
def test_the_size_limit_of_a_record_is_exact(small, tmp_path, size, verdict):
    runs = as_record(small / "tiny", tmp_path / "tiny")
    log, path = runs / "seed7/train.log", runs / "seed7/result.json"
    result = load(path)
    model = size - result["bytes"]["code"]
    edit(log, r"^(Serialized model int6\+zstd:) \d+", rf"\1 {model}")
    edit(log, r"^(Total submission size int6\+zstd:) \d+", rf"\1 {size}")
    edit(log, r"^size: \d+", f"size: {model}")
    edit(log, r"^(limit:total_bytes) .*", rf"\1 {size:,} of 16,000,000 {verdict}")
    result["bytes"] |= {"model": model, "total": size}
    result["status"] = "ok" if verdict == "PASS" else "over a limit"
    path.write_text(json.dumps(result), encoding="utf-8")
    command = arguments(tmp_path / "out", runs, track="track_10min_16mb")
    assert submit.main(command) == (0 if verdict == "PASS" else 2)
    folder = make_entry(tmp_path / "other", runs)  # the other track takes both
    text = (folder / "README.md").read_text(encoding="utf-8")
    assert f"16,000,000 | {verdict} |" in text
    assert "torchrun --standalone --nproc_per_node=8 train_gpt.py" in text
    assert load(folder / "submission.json")["hardware"] == "8x NVIDIA H100 80GB HBM3"


# ---- What it refuses ----


def change_code(runs):
    (runs / "seed7/train_gpt.py").write_bytes(b"# other\n")


def damage_code(runs):
    path = runs / "seed7/train_gpt.py"
    path.write_bytes(path.read_bytes().replace(b'b85decode("', b'b85decode("\\'))


def change_data(runs):
    edit(runs / "seed7/result.json", r'"val_sha256": "....', '"val_sha256": "beef')


def cut_log(runs):
    (runs / "seed7/result.json").unlink()
    edit(runs / "seed7/train.log", r"(?s)Serialized model.*\Z", "")


def fail_run(runs):
    result = load(runs / "seed7/result.json") | {"status": "oom", "reason": "out of memory"}
    (runs / "seed7/result.json").write_text(json.dumps(result))
    edit(runs / "seed7/train.log", r"\Z", "error: out of memory\n")


def end_run(runs, name, text):
    """Leaves one run, which ended before its scores, and a file of the sweep that tells why."""
    cut_log(runs)
    (runs / f"seed7/{name}").write_text(text)
    shutil.rmtree(runs / "seed42")
    shutil.rmtree(runs / "seed1337")


def set_resumed(runs, changed):
    result = load(runs / "seed7/result.json") | {"resumed": {"step": 2, "changed": changed}}
    (runs / "seed7/result.json").write_text(json.dumps(result))


def copy_training(runs):
    """Seed 42 is a continuation of seed 7 that states another seed, as older programs allowed."""
    lines = re.findall("^step:./6 train_loss.*", (runs / "seed7/train.log").read_text(), re.M)
    for number, line in enumerate(lines, 1):
        edit(runs / "seed42/train.log", f"^step:{number}/6 train_loss.*", line)


def lock_run(runs):
    lock = open(runs / "seed7.lock", "w")
    fcntl.flock(lock, fcntl.LOCK_EX)
    return lock


REFUSED = {
    "another program": (change_code, r"train_gpt.py: 2 of them.*needed: the same"),
    "a damaged program": (damage_code, "seed7/train_gpt.py: the packed source cannot be decoded: "),
    "another text": (change_data, r"validation data \['\w+', 'beef\w+'\].*needed: the same"),
    "other settings": (
        lambda runs: edit(runs / "seed42/train.log", " matrix_lr:0.025 ", " matrix_lr:0.02 "),
        r"train_seed42.log: \{'matrix_lr': \(0.02, 0.025\)\}; needed: the settings of",
    ),
    "a log cut short": (cut_log, "seed7.log: cut off: its log ends too early; needed: a score"),
    "logs without a score": (
        lambda runs: [edit(x, r"(?s)DIAGNOSTIC.*\Z", "") for x in runs.rglob("train.log")],
        "^error: no log has a score: train_seed7.log: cut off: ",
    ),
    "another result": (
        lambda runs: edit(runs / "seed7/result.json", r'^  "steps": 6', '  "steps": 7'),
        "seed7: result.json has 7, its log 6",
    ),
    "a damaged result": (
        lambda runs: (runs / "seed7/result.json").write_text('{"status": "o'),
        "seed7: result.json has failed, its log ok",
    ),
    "no log": (
        lambda runs: (runs / "seed7/train.log").unlink(),
        "seed7: ok; needed: runs that have ended, with their logs",
    ),
    "a failed run": (fail_run, "train_seed7.log: failed: out of memory; needed: a score"),
    "a resumed schedule": (
        lambda runs: set_resumed(runs, {"iterations": 3, "compile": False}),
        "seed7: resumed from a run with ITERATIONS=3; needed: a training that its command repeats",
    ),
    "one training": (
        copy_training,
        "train_seed42.log: the training of train_seed7.log; needed: its own",
    ),
    "a seed twice": (
        lambda runs: shutil.copytree(runs / "seed7", runs / "again/tiny/seed7"),
        r"tiny: seeds \[7, 1337, 42, 7\]; needed: each once",
    ),
    "a killed run": (
        lambda runs: end_run(runs, "exit_status", "137\n"),
        "seed7: failed: killed by signal 9; needed: a score",
    ),
    "a run in progress": (lock_run, "seed7: running; needed: runs that have ended"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_runs_are_refused(small, tmp_path, capsys, name):
    plant, pattern = REFUSED[name]
    runs = shutil.copytree(small / "tiny", tmp_path / "tiny")
    lock = plant(runs)  # held until the end of the test
    reasons = refusal(capsys, tmp_path / "out", runs)
    assert any(re.search(pattern, reason) for reason in reasons), reasons
    del lock


def test_all_reasons_are_listed_at_once(small, tmp_path, capsys):
    runs = shutil.copytree(small / "tiny", tmp_path / "tiny")
    make_entry(tmp_path / "out", runs)
    change_code(runs)
    change_data(runs)
    reasons = refusal(capsys, tmp_path / "out", runs, tmp_path / "none")
    texts = ("train_gpt.py: 2 of them", "validation data", "it exists; needed: another --name")
    for text in (*texts, f"{tmp_path / 'none'}: no run is there"):
        assert any(text in reason for reason in reasons), text


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        (
            {"main": "tiny", "name": "../../b"},
            "--name: ../../b; needed: a letter or digit, then letters",
        ),
        ({"main": "other"}, "--main: other; needed: a trial with scores, of lost, plain, tiny"),
        ({"main": "lost"}, "seed42: nan: step"),
        ({"main": "tiny", "base": "lost"}, "--base: lost; needed: a trial with scores"),
        ({}, "--main: None; needed: a trial with scores, of lost, plain, tiny"),
        *[({"main": "tiny", "name": x}, f"--name: {x}; needed") for x in ("__a__", "#a")],
        ({"main": "tiny", "date": "2026-3-5"}, "date: 2026-3-5; needed: YYYY-MM-DD"),
        ({"main": "tiny", "author": " "}, "author: ; needed: text"),
        ({"main": "tiny", "text": "nowhere.md"}, "nowhere.md"),
    ],
)
def test_options_are_refused(small, tmp_path, capsys, options, reason):
    assert any(reason in said for said in refusal(capsys, tmp_path, small, **options))


def full(*_, **__):
    raise OSError(28, "No space left on device", "the disk")


@pytest.mark.parametrize(
    ("spoil", "reason"),
    [
        (lambda track, patch: track.write_text(""), "track_non_record"),
        (lambda track, patch: track.symlink_to(track / "a/b"), "track_non_record"),
        (lambda track, patch: patch.setattr(Path, "write_text", full), "the disk: No space left"),
        (lambda track, patch: patch.setattr(Path, "rename", full), "the disk: No space left"),
        (lambda track, patch: patch.setattr(shutil, "copystat", full), "No space left"),
    ],
)
def test_a_folder_that_cannot_be_written_leaves_nothing(
    small, tmp_path, capsys, monkeypatch, spoil, reason
):
    track = tmp_path / "track_non_record_16mb"
    if spoil(track, monkeypatch) is None and not track.is_symlink():
        track.mkdir()
    (line,) = refusal(capsys, tmp_path, small / "tiny")
    assert reason in line and ";" in line


@pytest.mark.parametrize("name", ["with space", "it's", "a;b"])
def test_the_next_command_can_be_pasted(small, tmp_path, capsys, name):
    make_entry(tmp_path / name, small / "tiny")
    folder, command = capsys.readouterr().out.splitlines()
    assert shlex.split(command)[-2:] == ["records/check.py", folder]


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
def test_text_is_read_with_or_without_a_byte_order_mark(small, tmp_path, capsys, encoding):
    text, out = tmp_path / "text.md", tmp_path / "out"
    text.write_bytes("Größe\n".encode(encoding))
    if encoding == "utf-16":
        out.mkdir()
        (line,) = refusal(capsys, out, small / "tiny", text=text)
        assert f"{text}: " in line and "save it as UTF-8" in line
    else:
        page = (make_entry(out, small / "tiny", text=text) / "README.md").read_text("utf-8")
        assert "\nGröße\n" in page and "\ufeff" not in page
