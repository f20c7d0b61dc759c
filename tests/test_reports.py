"""Kinds of fault that users of trainers report, each tried on several members of the kind."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import TINY, load, settings, shard_bytes, trainer
from safetensors.torch import load_file, save_file

import train_gpt as tg


@pytest.fixture(scope="module")
def trained(byte_corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run of six steps with a checkpoint at step 4."""
    folder = tmp_path_factory.mktemp("reports") / "run"
    env = {**TINY, "ITERATIONS": "6", "CHECKPOINT_EVERY": "4", "SEED": "1"}
    assert tg.main([], {**env, "DATA_PATH": str(byte_corpus), "RUN_DIR": str(folder)}) == 0
    return folder


@pytest.fixture
def env(byte_corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """An environment for a run in the folder `run` of an empty current folder."""
    monkeypatch.chdir(tmp_path)
    return {**TINY, "ITERATIONS": "6", "DATA_PATH": str(byte_corpus), "RUN_DIR": "run", "SEED": "1"}


def result(folder: str = "run") -> dict:
    return json.loads(Path(folder, "result.json").read_text())


# ---- A resumed run has the settings of its checkpoint ----


@pytest.mark.parametrize(
    "changed",
    [
        {"SEED": "3"},
        {"TRAIN_BATCH_TOKENS": "2048"},
        {"TRAIN_SEQ_LEN": "32"},
        {"MATRIX_LR": "0.5"},
        {"WARMDOWN_ITERS": "1"},
        {"EMA_DECAY": "0.5"},
        {"STP_ENABLED": "1"},
    ],
)
def test_resume_under_other_settings_is_refused(trained: Path, env, changed, capsys):
    path = trained / tg.CHECKPOINT
    assert tg.main([], {**env, "RESUME": str(path), **changed}) == 2
    shown = capsys.readouterr().out
    assert f"RESUME={path}" in shown
    assert next(iter(changed)) in shown
    assert not Path("run", tg.PROGRAM).exists()  # the same folder can be used again


def test_a_longer_resume_is_allowed_and_recorded(trained: Path, env):
    longer = {"ITERATIONS": "8", "EVAL_STRIDE": "16", "MICRO_BATCH_TOKENS": "1024"}
    assert tg.main([], {**env, "RESUME": str(trained), **longer}) == 0
    resumed = result()["resumed"]
    assert resumed["step"] == 4
    assert resumed["changed"]["iterations"] == 6
    assert result()["steps"] == 8


# ---- Words and variables that are not understood ----


@pytest.mark.parametrize("words", [["NUM_LAYERS=3"], ["--num_layers", "3"], ["train"]])
def test_settings_as_arguments_are_answered_with_how_to_give_them(words, capsys):
    with pytest.raises(SystemExit) as raised:
        tg.main(words, {})
    assert raised.value.code == 2
    shown = capsys.readouterr().err
    assert words[0] in shown
    assert "environment variables" in shown


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("num_layers", "did you mean NUM_LAYERS?"),
        ("NUM_LAYER", "did you mean NUM_LAYERS?"),
        ("Matrix_LR", "did you mean MATRIX_LR?"),
        ("QAT_ENABLED", "not built here"),
        ("NUM_LOOPS", "not built here"),
    ],
)
def test_variables_near_a_setting_and_published_ones_are_warned_of(name: str, said: str):
    h = settings()
    (note,) = (note for note in tg.settings_notes(h, {name: "1"}) if name in note)
    assert note.startswith("warning: ")
    assert said in note


def test_a_stride_that_leaves_no_sliding_score_is_warned_of():
    says = "EVAL_STRIDE=64 is not below the window of 64 tokens"
    assert any(says in note for note in tg.settings_notes(settings(eval_stride=64), {}))
    assert not any(says in note for note in tg.settings_notes(settings(eval_stride=63), {}))


# ---- Weights saved by others, and folders in the place of files ----


def written_elsewhere(trained: Path, path: Path, dtype: torch.dtype) -> None:
    """Saves the weights of a run as any other program would."""
    weights = load_file(trained / tg.FINAL_MODEL)
    save_file({name: tensor.to(dtype) for name, tensor in weights.items()}, path)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
def test_weights_without_our_metadata_are_packed(trained: Path, env, dtype):
    written_elsewhere(trained, Path("other.safetensors"), dtype)
    assert tg.main(["--quantize", "other.safetensors"], env) == 0
    assert result()["status"] == "ok"


def test_weights_of_another_shape_are_refused_by_name(trained: Path, env, capsys):
    written_elsewhere(trained, Path("other.safetensors"), torch.float32)
    assert tg.main(["--quantize", "other.safetensors"], {**env, "NUM_LAYERS": "4"}) == 2
    assert "blocks.3." in capsys.readouterr().out


def test_a_run_folder_stands_for_the_file_in_it(trained: Path, env):
    assert tg.main(["--eval", str(trained)], env) == 0
    assert tg.main(["--quantize", str(trained)], env) == 0


# ---- What a run refuses, --check refuses ----


def used_folder(env: dict[str, str]) -> dict[str, str]:
    assert tg.main([], {**env, "ITERATIONS": "1"}) == 0
    return env


def blocked_folder(env: dict[str, str]) -> dict[str, str]:
    Path("file").write_text("")
    return {**env, "RUN_DIR": "file/run"}


REFUSED = {
    "a folder with a run": used_folder,
    "a folder that cannot be created": blocked_folder,
    "a checkpoint that is not there": lambda env: {**env, "RESUME": "nowhere.safetensors"},
    "a name that is a path": lambda env: {**env, "RUN_DIR": "", "RUN_ID": "../run"},
    "a name of dots": lambda env: {**env, "RUN_DIR": "", "RUN_ID": "."},
    "no data": lambda env: {**env, "DATA_PATH": "nowhere"},
}


@pytest.mark.parametrize("case", REFUSED)
def test_check_refuses_what_the_run_refuses(case: str, env):
    env = REFUSED[case](env)
    assert tg.main(["--check"], env) == 2
    assert tg.main([], env) == 2


def test_check_writes_nothing_and_a_refused_run_uses_up_no_name(env):
    assert tg.main(["--check"], env) == 0
    assert not Path("run").exists()
    assert tg.main([], {**env, "RESUME": "nowhere.safetensors"}) == 2
    assert tg.main([], {**env, "DATA_PATH": "nowhere"}) == 2
    assert tg.main([], env) == 0


# ---- Data ----


@pytest.mark.parametrize("split", ["val", "train"])
@pytest.mark.parametrize("link", [False, True])
def test_a_shard_that_is_there_twice_is_refused(split, link, env, byte_corpus: Path, capsys):
    folder = Path("twice_byte260").absolute()
    shutil.copytree(byte_corpus, folder)
    original, copy = (folder / f"fineweb_{split}_000000{end}.bin" for end in ("", " (1)"))
    copy.symlink_to(original) if link else shutil.copyfile(original, copy)
    assert tg.main(["--check"], {**env, "DATA_PATH": str(folder)}) == 2
    assert "the same tokens as" in capsys.readouterr().out


@pytest.mark.parametrize("share", [0.004, 0.006])
def test_text_that_the_vocabulary_does_not_cover_gets_no_score(share, env, byte_corpus, capsys):
    folder = Path("unknown_byte260").absolute()
    shutil.copytree(byte_corpus, folder)
    path = folder / "fineweb_val_000000.bin"
    tokens = np.fromfile(path, "<u2", offset=1024)
    tokens[1 : 1 + round(share * len(tokens))] = tg.BYTE_UNKNOWN_ID
    path.write_bytes(shard_bytes(tokens))
    env = {**env, "DATA_PATH": str(folder)}
    refused = share > 0.005
    assert tg.main(["--check"], env) == (2 if refused else 0)
    assert "validation tokens are unknown to the tokenizer" in capsys.readouterr().out
    assert tg.main(["--check"], {**env, "MAX_UNKNOWN_FRACTION": "1"}) == 0


# ---- What can go wrong with a GPU ----


def test_a_gpu_that_torch_cannot_use_is_an_error_unless_hidden(tmp_path: Path, monkeypatch):
    if torch.cuda.is_available():
        pytest.skip("torch can use the GPU of this machine")
    node = tmp_path / "nvidia0"
    node.touch()
    monkeypatch.setattr(tg, "GPU_NODE", str(node))
    with pytest.raises(tg.SettingsError, match="a GPU that torch"):
        tg.start_device("auto")
    assert not tg.start_device("auto", gpus_hidden=True)[0].is_cuda


@pytest.mark.parametrize("value", [float("inf"), float("nan"), -float("inf")])
def test_a_gradient_that_is_not_finite_reaches_no_weight(value: float):
    h = settings()
    model = tg.GPT(h)
    optimizers = tg.Optimizers(model, h, tg.Ranks())
    phase = tg.programs(h)[0]
    model(torch.randint(4, 260, (2, 16)), torch.randint(4, 260, (2, 16))).backward()
    optimizers.gradient[7] = value
    assert not optimizers.step(phase).isfinite()
    assert all(p.isfinite().all() for p in model.parameters())
    assert all(state.isfinite().all() for state in optimizers.state().values())


def test_training_ends_at_a_gradient_that_is_not_finite_with_finite_weights(byte_corpus, cpu):
    h = settings(data_path=byte_corpus, iterations=6)
    model = tg.GPT(h)
    model.tok_emb.weight.register_hook(lambda gradient: gradient * float("inf"))
    run = trainer(model, load(h), h, cpu)
    with pytest.raises(tg.DivergenceError, match=r"step 1: .* ATTN"):
        run.train()
    assert all(weight.isfinite().all() for weight in run.average.weights.values())


def wrong_gradient(q, k, v, *, window=0):
    """Attention with the right output and a gradient that is 10 % too large."""
    y = tg.attend_sdpa(q, k, v, window=window)
    return y + 0.1 * (y - y.detach())


@pytest.mark.parametrize(
    ("attend", "said"),
    [
        (wrong_gradient, "its gradient differs"),
        (lambda q, k, v, *, window=0: 1.1 * tg.attend_sdpa(q, k, v), "its output differs"),
        (lambda q, k, v, *, window=0: tg.attend_sdpa(q, k, v) * torch.nan, "it gave NaN"),
        (tg.attend_sdpa, ""),
    ],
)
def test_an_attention_that_computes_something_else_is_not_used(attend, said, cpu, monkeypatch):
    monkeypatch.setattr(tg, "load_attention", lambda name: attend)
    for rows in (1, 3):
        assert said in tg.probe_attention("flash", cpu, settings(), rows)[1]
