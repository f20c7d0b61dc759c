"""The program as a user runs it: from shards to a scored artifact, and every way to fail."""

import dataclasses
import hashlib
import importlib.util
import json
import math
import os
import re
import shlex
import subprocess
import sys
import types
from pathlib import Path

import pytest
import torch
from conftest import ROOT, TINY, compile_counted, load, settings, shard_bytes, trainer
from launch import await_, torchrun
from safetensors.torch import load_file

import train_gpt as tg


def program(
    folder: Path, *arguments: str, file: Path = ROOT / "train_gpt.py", **env: object
) -> subprocess.CompletedProcess:
    """Runs a program file in a folder with these variables only."""
    variables = {name.upper(): str(value) for name, value in env.items()}
    keep = {name: os.environ[name] for name in ("PATH", "HOME", "SYSTEMROOT") if name in os.environ}
    return subprocess.run(
        [sys.executable, str(file), *arguments],
        cwd=folder,
        env={**keep, **variables},
        capture_output=True,
        text=True,
        timeout=170,
        check=False,
    )


@pytest.fixture(scope="module")
def finished(tmp_path_factory, byte_corpus) -> tuple[Path, subprocess.CompletedProcess]:
    folder = tmp_path_factory.mktemp("run")
    done = program(folder, **{**TINY, "DATA_PATH": byte_corpus, "RUN_ID": "first"})
    assert done.returncode == 0, done.stdout + done.stderr
    return folder, done


def test_a_run_leaves_its_files(finished):
    folder, done = finished
    files = {path.name for path in (folder / "logs/first").iterdir()}
    assert files == {
        "train.log",
        "train_gpt.py",
        "train_gpt_readable.py",
        "events.jsonl",
        "result.json",
        "final_model.safetensors",
        "final_model.int6.ptz",
    }
    source = Path(tg.__file__).read_bytes()
    assert (folder / "logs/first/train_gpt_readable.py").read_bytes() == source
    assert (folder / "logs/first/train_gpt.py").read_bytes() == tg.packed_source(source)
    assert (folder / "logs/first/train.log").read_text() == done.stdout
    assert {path.name for path in folder.iterdir()} == {"logs"}


def test_the_result_is_what_the_log_says(finished):
    folder, done = finished
    result = json.loads((folder / "logs/first/result.json").read_text())
    assert result["status"] == "ok"
    assert result["steps"] == len(result["train_losses"]) == 30
    assert result["weights"] == "ema"
    for kind, name in (
        ("float", "DIAGNOSTIC post_ema"),
        ("plain", "final_int6_roundtrip"),
        ("sliding", "final_int6_sliding_window"),
        ("sliding", "final_int8_zlib_roundtrip"),
    ):
        score = result["scores"][kind]
        want = f"{name}_exact val_loss:{score['val_loss']:.8f} val_bpb:{score['val_bpb']:.8f}"
        assert want in done.stdout.splitlines()
    sizes = result["bytes"]
    assert sizes["code"] == (folder / "logs/first/train_gpt.py").stat().st_size
    assert f"Code size: {sizes['code']} bytes" in done.stdout.splitlines()
    source = Path(tg.__file__).read_bytes()
    assert result["code_sha256"] == hashlib.sha256(source).hexdigest()
    assert sizes["model"] == (folder / "logs/first/final_model.int6.ptz").stat().st_size
    assert sizes["total"] == sizes["code"] + sizes["model"]
    assert f"Total submission size int6+zstd: {sizes['total']} bytes" in done.stdout
    assert result["verdicts"]["total_bytes"] == "PASS"

    saved = load_file(folder / "logs/first/final_model.safetensors")
    assert result["parameters"] == sum(p.numel() for p in saved.values())
    assert f"model_params:{result['parameters']}" in done.stdout.splitlines()


def test_the_log_has_the_conventional_lines(finished):
    folder, done = finished
    lines = done.stdout.splitlines()
    assert lines[0] == "logs/first/train.log"
    for start in (
        "val_bpb:enabled tokenizer_kind=byte260 vocab_size=260",
        "train_loader:dataset:tiny_byte260 train_shards:2",
        "val_loader:shards pattern=",
        "model_params:",
        "muon:18 matrices in 4 stacks",
        "world_size:1 grad_accum_steps:2",
        "corpus:fineweb10B vocab_size:260 ",
        "step:1/30 train_loss:5.",
        "step:30/30 val_loss:",
        "ema:applying EMA weights",
        "Code size: ",
        "Serialized model int6+zstd: ",
    ):
        assert [line for line in lines if line.startswith(start)], start
    (told,) = [line for line in lines if line.startswith("corpus:")]
    names = [f.name for f in dataclasses.fields(tg.Hyperparameters)]  # every setting, once
    assert re.findall(r"(?:^| )([a-z]\w*):", told) == names
    assert " run_id:first " in told
    (changed,) = [line for line in lines if line.startswith("changed_settings: ")]
    assert lines.index(changed) == lines.index(told) + 1
    values = dict(pair.split("=", 1) for pair in shlex.split(changed)[1:])
    result = json.loads((folder / "logs/first/result.json").read_text())
    again = tg.Hyperparameters.from_env(values)  # as an environment it gives the same settings
    assert dataclasses.asdict(again) == result["settings"]
    (machine,) = [line for line in lines if line.startswith("device:") and " torch:" in line]
    assert re.search(r" attention:(flash|math|cudnn)$", machine)


def test_events_are_the_steps_and_scores(finished):
    folder, _ = finished
    text = (folder / "logs/first/events.jsonl").read_text()
    events = [json.loads(line) for line in text.splitlines()]
    steps = [e["step"] for e in events if "train_loss" in e]
    assert steps == list(range(1, 11))
    assert [e["name"] for e in events if e["event"] == "score"][-1] == "final_int8_zlib_roundtrip"


def test_eval_scores_the_artifact_without_model_variables(finished, byte_corpus, tmp_path):
    """Nor does it need the training split."""
    folder, done = finished
    shard = "fineweb_val_000000.bin"
    (tmp_path / shard).write_bytes((byte_corpus / shard).read_bytes())
    artifact = folder / "logs/first/final_model.int6.ptz"
    env = {"DATA_PATH": tmp_path, "EVAL_STRIDE": 32, "VAL_BATCH_SIZE": 8192}
    again = program(tmp_path, "--eval", str(artifact), **env)
    assert again.returncode == 0, again.stdout
    exact = [line for line in done.stdout.splitlines() if "final" in line and "exact" in line]
    assert exact == [line for line in again.stdout.splitlines() if "exact" in line]
    assert {path.name for path in tmp_path.iterdir()} == {shard}


def test_the_same_seed_gives_the_same_bytes(finished, byte_corpus):
    folder, _ = finished
    env = {**TINY, "DATA_PATH": byte_corpus}
    assert program(folder, **{**env, "RUN_ID": "again"}).returncode == 0
    assert program(folder, **{**env, "RUN_ID": "other", "SEED": 1}).returncode == 0
    first, again, other = (
        (folder / f"logs/{name}/final_model.int6.ptz").read_bytes()
        for name in ("first", "again", "other")
    )
    assert first == again
    assert first != other


@pytest.mark.fault(46)
def test_a_run_never_overwrites_another(finished, byte_corpus):
    folder, _ = finished
    before = (folder / "logs/first/result.json").read_bytes()
    again = program(folder, **{**TINY, "DATA_PATH": byte_corpus, "RUN_ID": "first"})
    assert again.returncode == 2
    assert "choose another RUN_ID or RUN_DIR" in again.stdout
    assert (folder / "logs/first/result.json").read_bytes() == before


@pytest.mark.fault(39)
def test_over_the_limit_is_no_success(tmp_path, byte_corpus, monkeypatch, capsys):
    monkeypatch.setattr(tg, "BYTES_LIMIT", 10_000)
    monkeypatch.chdir(tmp_path)
    env = {**TINY, "DATA_PATH": str(byte_corpus), "RUN_ID": "big", "ITERATIONS": "1"}
    assert tg.main([], env) == 1
    result = json.loads(Path("logs/big/result.json").read_text())
    assert result["status"] == "over a limit"
    assert result["verdicts"]["total_bytes"] == "FAIL"
    assert "limit:total_bytes" in capsys.readouterr().out
    assert Path("logs/big/final_model.int6.ptz").exists()


@pytest.mark.parametrize(
    ("env", "status", "says"),
    [
        ({"NUM_LAYERS": "many"}, 2, "NUM_LAYERS='many': must be a whole number"),
        ({"DATA_PATH": "nowhere"}, 2, "DATA_PATH=nowhere: no file matches fineweb_val_*.bin"),
        ({"ATTN": "fa3"}, 2, "ATTN=fa3 COMPILE=auto: cannot run here"),
        (
            {"WORLD_SIZE": "2"},
            2,
            "RANK expected, but not set; launch several processes with torchrun",
        ),
        ({"RUN_DIR": "file/run"}, 2, "RUN_DIR=file/run: "),
        ({"MATRIX_LR": "1e17", "GRAD_CLIP_NORM": "0", "SCALAR_LR": "1e17"}, 4, "the loss is"),
    ],
)
def test_failures_have_their_status_and_reason(
    tmp_path, byte_corpus, monkeypatch, capsys, env, status, says
):
    monkeypatch.chdir(tmp_path)
    Path("file").write_text("")
    env = {**TINY, "DATA_PATH": str(byte_corpus), "RUN_ID": "bad", **env}
    assert tg.main([], env) == status
    assert says in capsys.readouterr().out
    if Path("logs/bad").exists():
        result = json.loads(Path("logs/bad/result.json").read_text())
        assert says in result["reason"]
        assert result["status"] in ("settings", "data", "nan")
        assert result["settings"]["run_id"] == "bad"


def test_the_time_of_a_sliding_pass_is_told_before_it(finished):
    _, done = finished
    lines = [line.split()[0] for line in done.stdout.splitlines()]
    told = lines.index("sliding_window")
    assert told == lines.index("final_int6_sliding_window") - 1
    assert re.search(
        r"sliding_window stride:32 expected_time:\d+s of 600.0s$", done.stdout, re.MULTILINE
    )


def test_a_sliding_pass_over_the_limit_is_told(finished, byte_corpus, cpu, monkeypatch, capsys):
    folder, _ = finished
    monkeypatch.setattr(tg, "EVAL_SECONDS_LIMIT", 0.0)
    env = {"DATA_PATH": str(byte_corpus), "EVAL_STRIDE": "8", "EVAL_STRIDEE": "9"}
    assert tg.main(["--eval", str(folder / "logs/first/final_model.int6.ptz")], env) == 0
    told = capsys.readouterr().out
    over = r"^sliding_window stride:8 expected_time:\d+s of 0.0s$"
    assert re.search(over, told, re.MULTILINE)
    assert "EVAL_STRIDEE is not a setting" in told
    assert "rule:" not in told  # the artifact's own settings hold


@pytest.mark.fault(46)
def test_only_one_of_two_runs_gets_a_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    tg.Run({"RUN_ID": "same"}, tg.Log(), {}).open_folder()
    with pytest.raises(tg.SettingsError, match="choose another RUN_ID"):
        tg.Run({"RUN_ID": "same"}, tg.Log(), {}).open_folder()


@pytest.mark.fault(45)
def test_a_result_that_cannot_be_written_is_a_failure(tmp_path, byte_corpus, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)

    def full(path, data):
        raise OSError("no space left on device")

    monkeypatch.setattr(tg, "write_atomically", full)
    env = {**TINY, "DATA_PATH": str(byte_corpus), "RUN_ID": "full"}
    assert tg.main([], env) == 6
    assert "no space left on device" in capsys.readouterr().out


def test_a_run_that_never_began_leaves_its_name_free(tmp_path, byte_corpus, monkeypatch):
    monkeypatch.chdir(tmp_path)
    env = {**TINY, "RUN_ID": "name", "ITERATIONS": "1"}
    assert tg.main([], {**env, "DATA_PATH": "nowhere"}) == 2
    assert tg.main([], {**env, "DATA_PATH": str(byte_corpus)}) == 0
    failed, _, good = Path("logs/name/train.log").read_text().partition("\nerror: ")
    assert "step:1/1 " in good
    assert "nowhere" not in failed + good.partition("\n")[2]
    assert result_of("name")["status"] == "ok"
    assert tg.main([], {**env, "DATA_PATH": str(byte_corpus)}) == 2


@pytest.mark.fault(34)
def test_weights_that_diverge_in_the_last_step_are_no_success(tmp_path, byte_corpus, monkeypatch):
    """The loss of the only step is finite: it is taken before the update."""
    monkeypatch.chdir(tmp_path)
    env = {
        **TINY,
        "DATA_PATH": str(byte_corpus),
        "RUN_ID": "bad",
        "ITERATIONS": "1",
        "MATRIX_LR": "1e17",
        "SCALAR_LR": "1e17",
        "TIED_EMBED_LR": "1e17",
        "GRAD_CLIP_NORM": "0",
        "WARMDOWN_ITERS": "0",
        "MUON_WD": "1e17",
    }
    assert tg.main([], env) == 4
    result = json.loads(Path("logs/bad/result.json").read_text(), parse_constant=pytest.fail)
    assert result["status"] == "nan"
    assert Path("logs/bad/final_model.safetensors").exists()


@pytest.mark.fault(33)
def test_weights_are_saved_before_anything_is_scored(tmp_path, byte_corpus, monkeypatch):
    def no_memory(*_, **__):
        raise torch.OutOfMemoryError("8 GiB")

    monkeypatch.setattr(tg, "score", no_memory)
    monkeypatch.chdir(tmp_path)
    env = {**TINY, "DATA_PATH": str(byte_corpus), "RUN_ID": "oom", "ITERATIONS": "3"}
    assert tg.main([], env) == 3
    model = tg.GPT(tg.Hyperparameters.from_env(env))
    assert load_file("logs/oom/final_model.safetensors").keys() == model.state_dict().keys()
    reason = json.loads(Path("logs/oom/result.json").read_text())["reason"]
    assert "lower MICRO_BATCH_TOKENS, EVAL_SEQ_LEN or EVAL_WINDOW" in reason


@pytest.mark.parametrize(
    ("error", "status"),
    [(torch.OutOfMemoryError("8 GiB"), 3), (KeyboardInterrupt(), 5), (ZeroDivisionError(), 6)],
)
def test_other_errors_leave_a_result_too(tmp_path, byte_corpus, monkeypatch, error, status):
    def fails(*_):
        raise error

    monkeypatch.setattr(tg.Trainer, "train", fails)
    monkeypatch.chdir(tmp_path)
    env = {**TINY, "DATA_PATH": str(byte_corpus), "RUN_ID": "bad"}
    assert tg.main([], env) == status
    result = json.loads(Path("logs/bad/result.json").read_text())
    assert result["status"] == {3: "oom", 5: "interrupted", 6: "failed"}[status]
    assert {3: "lower MICRO_BATCH", 5: "a signal", 6: "ZeroDivisionError"}[status] in result[
        "reason"
    ]


def test_scoring_what_is_no_artifact(tmp_path, capsys):
    path = tmp_path / "model.ptz"
    path.write_bytes(b"\x80\x04pickle")
    assert tg.main(["--eval", str(path)], {}) == 2
    assert tg.main(["--eval", str(tmp_path / "none")], {}) == 2
    assert str(path) in capsys.readouterr().out


def test_a_shard_by_the_description_trains(tmp_path, byte_corpus):
    """The corpus of these tests is written from the format's text alone; ours is read the same."""
    shard = tg.read_shard(byte_corpus / "fineweb_train_000000.bin")
    assert (byte_corpus / "fineweb_train_000000.bin").read_bytes() == shard_bytes(shard)


@pytest.mark.fault(43)
@pytest.mark.skipif(os.name == "nt", reason="no SIGTERM")
def test_a_terminated_run_says_so(tmp_path, byte_corpus):
    env = {**TINY, "DATA_PATH": str(byte_corpus), "RUN_ID": "stopped", "ITERATIONS": "100000"}
    running = subprocess.Popen(
        [sys.executable, str(ROOT / "train_gpt.py")],
        cwd=tmp_path,
        env={"PATH": os.environ["PATH"], **env},
        stdout=subprocess.PIPE,
        text=True,
    )
    for line in running.stdout:
        if line.startswith("step:3/"):
            running.terminate()
            break
    running.stdout.read()
    assert running.wait(30) == 5
    assert (
        json.loads((tmp_path / "logs/stopped/result.json").read_text())["status"] == "interrupted"
    )


def test_help_lists_every_setting():
    done = program(ROOT, "--help")
    assert done.returncode == 0
    assert tg.settings_table() in done.stdout


def result_of(run_id: str) -> dict:
    """The result of a run of this folder, of numbers alone; its artifact can be read."""
    text = Path(f"logs/{run_id}/result.json").read_text()
    tg.load_artifact(Path(f"logs/{run_id}/final_model.int6.ptz"), tg.Hyperparameters())
    return json.loads(text, parse_constant=pytest.fail)


@pytest.mark.fault(20, 50)
def test_zeros_are_a_defined_result_and_no_program_is_called(tmp_path, byte_corpus, monkeypatch):
    """Without steps, warm-up, warm-down, lines or a folder of programs such as nvidia-smi."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PATH", "")
    for module, name in ((subprocess, "Popen"), (os, "system"), (os, "popen")):
        monkeypatch.setattr(module, name, lambda *_, **__: pytest.fail("called a program"))
    names = ("ITERATIONS", "WARMUP_STEPS", "WARMDOWN_ITERS", "VAL_LOSS_EVERY", "TRAIN_LOG_EVERY")
    zeros = dict.fromkeys((*names, "EVAL_STRIDE", "GRAD_CLIP_NORM"), "0")
    env = {**TINY, **zeros, "DATA_PATH": str(byte_corpus), "RUN_ID": "none"}
    assert tg.main([], env) == 0
    result = result_of("none")
    assert (result["steps"], result["step_ms"], result["train_losses"]) == (0, {}, [])
    assert result["scores"].keys() == {"float", "plain"}
    assert result["scores"]["plain"]["val_loss"] == pytest.approx(math.log(260), abs=0.2)


@pytest.mark.fault(20)
def test_one_step_with_everything_else_zero(tmp_path, byte_corpus, monkeypatch, cpu):
    """The loop divides by no setting that may be 0."""
    names = ("warmup_steps", "warmdown_iters", "val_loss_every", "train_log_every")
    more = ("muon_momentum_warmup_steps", "jepa_phase1_frac", "warmdown_max_fraction", "ema_decay")
    zeros = dict.fromkeys((*names, *more), 0)
    h = settings(**zeros, iterations=1, data_path=byte_corpus)
    one = trainer(tg.GPT(h), load(h), h, cpu)
    one.train()
    (loss,) = one.step_log.losses
    assert math.isfinite(loss)
    for name, p in one.average.params.items():  # EMA_DECAY=0: the last weights
        assert torch.equal(one.average.weights[name], p)


@pytest.mark.fault(25)
def test_a_cap_below_one_step_gives_an_artifact_and_says_fail(
    tmp_path, byte_corpus, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    env = {**TINY, "DATA_PATH": str(byte_corpus), "RUN_ID": "tiny", "EVAL_STRIDE": "0"}
    assert tg.main([], {**env, "MAX_WALLCLOCK_SECONDS": "0.000001"}) == 1
    result = result_of("tiny")
    assert (result["steps"], result["verdicts"]["train_seconds"]) == (1, "FAIL")
    assert result["status"] == "over a limit"
    assert re.search(r"limit:train_seconds .* FAIL", capsys.readouterr().out)


@pytest.mark.fault(31)
@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_run_without_a_gpu_says_so(finished):
    folder, done = finished
    said = "device:cpu, no CUDA GPU found: times are not comparable with the records"
    assert said in done.stdout.splitlines()
    machine = json.loads((folder / "logs/first/result.json").read_text())["machine"]
    assert (machine["dtype"], machine["compiled"]) == ("float32", False)


@pytest.mark.fault(39)
@pytest.mark.parametrize(("over", "status", "verdict"), [(0, 0, "PASS"), (1, 1, "FAIL")])
def test_the_limit_itself_is_within_the_limit(
    finished, byte_corpus, tmp_path, monkeypatch, capsys, over, status, verdict
):
    """Of the bytes that the run wrote, with an artifact whose scales nothing multiplies."""
    folder, _ = finished
    first = json.loads((folder / "logs/first/result.json").read_text())["bytes"]["total"]
    pack = tg.pack_to_fit
    monkeypatch.setattr(tg, "BYTES_LIMIT", first - over)
    monkeypatch.setattr(tg, "pack_to_fit", lambda m, x, h, _, *rest: pack(m, x, h, 10**9, *rest))
    monkeypatch.chdir(tmp_path)
    env = {"DATA_PATH": str(byte_corpus), "RUN_ID": "at", "EVAL_STRIDE": "0"}
    env |= {"GPTQ_ENABLED": "0", "VAL_BATCH_SIZE": "8192"}
    checkpoint = str(folder / "logs/first/final_model.safetensors")
    assert tg.main(["--quantize", checkpoint], env) == status
    result = result_of("at")
    assert (result["bytes"]["total"], result["verdicts"]["total_bytes"]) == (first, verdict)
    assert f"limit:total_bytes {first:,} of {first - over:,} {verdict}" in capsys.readouterr().out


@pytest.mark.fault(39)
def test_the_limit_is_decimal():
    assert tg.BYTES_LIMIT == 16_000_000 < 16 * 1024**2


# ---- The packed twin as a program ----

SOURCE = (ROOT / "train_gpt.py").read_bytes()


@pytest.fixture(scope="module")
def twin(finished, tmp_path_factory) -> Path:
    """The packed twin that a run has written, alone in a folder."""
    path = tmp_path_factory.mktemp("twin") / "train_gpt.py"
    path.write_bytes((finished[0] / "logs/first/train_gpt.py").read_bytes())
    return path


def import_file(path: Path, name: str) -> types.ModuleType:
    """Imports a file under a name, without an entry in sys.modules."""
    spec = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert sys.modules.get(name) is not module
    return module


@pytest.mark.fault(51)
def test_the_twin_alone_gives_the_run_of_its_source(finished, twin, byte_corpus, tmp_path):
    """The same artifact, scores and code size; its folder holds both forms too."""
    folder, done = finished
    program_file = tmp_path / twin.name
    program_file.write_bytes(twin.read_bytes())
    env = {**TINY, "DATA_PATH": byte_corpus, "RUN_ID": "first"}
    again = program(tmp_path, file=program_file, **env)
    assert again.returncode == 0, again.stdout + again.stderr
    assert {path.name for path in tmp_path.iterdir()} == {"logs", "train_gpt.py"}
    first, second = folder / "logs/first", tmp_path / "logs/first"
    for name in ("final_model.int6.ptz", "train_gpt.py", "train_gpt_readable.py"):
        assert (second / name).read_bytes() == (first / name).read_bytes(), name
    code = f"Code size: {len(twin.read_bytes())} bytes"
    for screen in (done.stdout, again.stdout):
        assert [line for line in screen.splitlines() if line.startswith("Code size:")] == [code]
    one, other = (json.loads((path / "result.json").read_text()) for path in (first, second))
    for name in ("bytes", "code_sha256", "train_losses", "settings", "status"):
        assert other[name] == one[name], name
    for kind, score in one["scores"].items():
        assert other["scores"][kind] | {"seconds": 0} == score | {"seconds": 0}


def test_the_twin_scores_an_artifact(finished, twin, byte_corpus, tmp_path):
    folder, done = finished
    artifact = folder / "logs/first/final_model.int6.ptz"
    env = {"DATA_PATH": byte_corpus, "EVAL_STRIDE": 32, "VAL_BATCH_SIZE": 8192}
    again = program(tmp_path, "--eval", str(artifact), file=twin, **env)
    assert again.returncode == 0, again.stdout + again.stderr
    exact = [line for line in done.stdout.splitlines() if "final" in line and "exact" in line]
    assert exact == [line for line in again.stdout.splitlines() if "exact" in line]
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_two_ranks_of_torchrun_run_the_twin(finished, twin, byte_corpus, tmp_path):
    env = {**TINY, "DATA_PATH": byte_corpus, "RUN_DIR": "run", "OMP_NUM_THREADS": 1}
    agent = torchrun(tmp_path, twin, "--standalone", "--nproc_per_node=2", **env)
    screen = tmp_path / "screen.txt"
    await_(lambda: agent.poll() is not None, 200, screen.read_text)
    assert agent.returncode == 0, screen.read_text()
    result = json.loads((tmp_path / "run/result.json").read_text())
    assert result["status"] == "ok"
    assert "world_size:2 " in screen.read_text()
    assert (tmp_path / "run/train_gpt.py").read_bytes() == twin.read_bytes()
    assert (tmp_path / "run/train_gpt_readable.py").read_bytes() == SOURCE
    one = json.loads((finished[0] / "logs/first/result.json").read_text())
    assert result["train_losses"] == pytest.approx(one["train_losses"], abs=2e-3)
    assert result["bytes"]["code"] == one["bytes"]["code"]


@pytest.mark.parametrize("name", ["train_gpt", "submission_under_review", "a.dotted.name", "json"])
def test_the_twin_imported_under_any_name_has_the_names_of_its_source(twin, name):
    source, module = (import_file(path, name) for path in (ROOT / "train_gpt.py", twin))
    wrapper = {"base64", "linecache", "lzma", "text"}  # names of the lines that decode it
    assert vars(module).keys() - wrapper == vars(source).keys() - wrapper
    assert module.__doc__ == source.__doc__
    for key, value in vars(source).items():
        other = getattr(module, key)
        assert type(other).__qualname__ == type(value).__qualname__, key
        assert getattr(other, "__module__", None) == getattr(value, "__module__", None), key
        if isinstance(value, (bool, int, float, str, bytes, tuple)) and not key.startswith("__"):
            assert repr(other) == repr(value), key


@pytest.mark.parametrize("name", ["train_gpt", "submission_under_review"])
def test_a_model_of_the_imported_twin_has_a_loss(twin, name):
    module = import_file(twin, name)
    assert (module.Hyperparameters.model_dim, module.Hyperparameters.num_layers) == (512, 11)

    class Tiny(module.Hyperparameters):
        vocab_size, num_layers, model_dim, num_heads, num_kv_heads = 260, 2, 32, 4, 2
        rope_dims, bigram_vocab_size, ve_dim, train_seq_len = 4, 64, 8, 64

    ids = torch.randint(4, 260, (2, 65), generator=torch.Generator().manual_seed(0))
    torch.manual_seed(0)
    model = module.GPT(Tiny)
    assert len(model.blocks) == 2
    loss = model(ids[:, :-1], ids[:, 1:])
    assert loss.shape == ()
    assert loss.item() == pytest.approx(math.log(260), abs=0.2)
    loss.backward()
    torch.manual_seed(0)
    same = tg.GPT(settings(num_layers=2))
    assert same(ids[:, :-1], ids[:, 1:]).item() == loss.item()


def test_the_imported_twin_compiles(twin):
    module = import_file(twin, "submission_under_review")
    h = module.Hyperparameters.from_env({**TINY, "NUM_LAYERS": "2"})
    model = module.GPT(h)
    compiled, programs = compile_counted(model.losses)
    ids = torch.randint(4, 260, (2, 65), generator=torch.Generator().manual_seed(0))
    loss = compiled(ids[:, :-1], ids[:, 1:])[0]
    assert loss.item() == pytest.approx(model(ids[:, :-1], ids[:, 1:]).item(), abs=1e-6)
    assert len(programs) == 1


def test_an_error_inside_the_twin_shows_the_line_of_its_source(
    twin, byte_corpus, tmp_path, monkeypatch, capsys
):
    """A bug of the program is reported by a traceback; it must not end at the wrapper."""
    monkeypatch.chdir(tmp_path)
    module = import_file(twin, "submission_under_review")
    monkeypatch.setattr(module, "load_data", None)
    assert module.main([], {**TINY, "DATA_PATH": str(byte_corpus), "RUN_ID": "bad"}) == 6
    said = capsys.readouterr().out
    lines = SOURCE.decode().splitlines()
    number = lines.index("        self.data = load_data(h, ranks, log, steps)")
    where = f'  File "{twin}", line {number + 1}, in prepare\n    {lines[number].strip()}\n'
    assert where in said
    assert where in json.loads(Path("logs/bad/result.json").read_text())["reason"]


def test_a_traceback_of_a_twin_started_as_a_program_shows_its_lines(tmp_path, byte_corpus):
    line = b"        self.program = Program.load()\n"
    assert SOURCE.count(line) == 1
    broken = SOURCE.replace(line, b"        1 / 0  # a bug in this line\n")
    file = tmp_path / "train_gpt.py"
    file.write_bytes(tg.packed_source(broken))
    done = program(tmp_path, file=file, **TINY, DATA_PATH=byte_corpus, RUN_ID="bad")
    assert done.returncode == 6
    number = broken[: broken.index(b"1 / 0")].count(b"\n") + 1
    where = f'  File "{file}", line {number}, in prepare\n    1 / 0  # a bug in this line\n'
    assert where in done.stdout
    assert "ZeroDivisionError: division by zero" in done.stdout


@pytest.mark.fault(51)
def test_line_ends_change_no_byte_of_the_twin(tmp_path, monkeypatch):
    """A checkout with CRLF line ends counts, hashes and ships the same bytes."""
    windows = SOURCE.replace(b"\n", b"\r\n")
    assert b"\r" not in SOURCE
    assert tg.packed_source(windows) == tg.packed_source(SOURCE)
    for data in (SOURCE, windows, tg.packed_source(SOURCE)):
        (tmp_path / "train_gpt.py").write_bytes(data)
        monkeypatch.setattr(tg, "__file__", str(tmp_path / "train_gpt.py"))
        assert tg.Program.load() == (SOURCE, tg.packed_source(SOURCE))


@pytest.mark.fault(51)
def test_a_twin_with_crlf_line_ends_is_the_same_twin(twin, tmp_path, monkeypatch):
    """It is not packed a second time."""
    (tmp_path / "train_gpt.py").write_bytes(twin.read_bytes().replace(b"\n", b"\r\n"))
    monkeypatch.setattr(tg, "__file__", str(tmp_path / "train_gpt.py"))
    assert tg.Program.load() == (SOURCE, twin.read_bytes())
