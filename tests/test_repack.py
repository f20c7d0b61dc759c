"""--quantize: a saved model packed and scored again, under these settings or others."""

import io
import json
from pathlib import Path

import pytest
import safetensors.torch
import torch
from conftest import TINY

import train_gpt as tg

SETTINGS = {
    **TINY,
    "ITERATIONS": "6",
    "WARMDOWN_ITERS": "3",
    "EVAL_STRIDE": "0",
    "GPTQ_ENABLED": "1",
    "GPTQ_CALIB_TOKENS": "256",
}


@pytest.fixture(scope="module")
def done(tmp_path_factory, byte_corpus) -> tuple[Path, dict[str, str]]:
    """A finished run with GPTQ, and its variables."""
    folder = tmp_path_factory.mktemp("repack")
    env = {**SETTINGS, "DATA_PATH": str(byte_corpus)}
    assert tg.main([], {**env, "RUN_DIR": str(folder / "run")}) == 0
    return folder / "run", env


def repack(path: Path, env: dict[str, str], folder: Path) -> tuple[bytes, dict]:
    assert tg.main(["--quantize", str(path)], {**env, "RUN_DIR": str(folder)}) == 0
    result = json.loads((folder / "result.json").read_text())
    return (folder / "final_model.int6.ptz").read_bytes(), result


def test_the_same_settings_give_the_same_bytes(done, tmp_path):
    run, env = done
    blob, result = repack(run / "final_model.safetensors", env, tmp_path / "again")
    assert blob == (run / "final_model.int6.ptz").read_bytes()
    before = json.loads((run / "result.json").read_text())
    for name in ("float", "plain"):
        assert result["scores"][name]["nats"] == before["scores"][name]["nats"]
    assert result["status"] == "ok"
    # What was not trained here has no verdict on its time.
    assert before["verdicts"].keys() - result["verdicts"].keys() == {"train_seconds"}
    assert before["seconds"].keys() == {"train", "calibrate", "pack", "diagnose", "eval"}
    assert before["seconds"]["train"] > result["seconds"]["train"] == 0
    files = {path.name for path in (tmp_path / "again").iterdir()}
    assert files == {
        "train.log",
        "train_gpt.py",
        "train_gpt_readable.py",
        "events.jsonl",
        "result.json",
        "final_model.int6.ptz",
    }


def test_the_model_needs_no_variables_nor_training_data(done, byte_corpus, tmp_path):
    run, env = done
    shard = "fineweb_val_000000.bin"
    (tmp_path / shard).write_bytes((byte_corpus / shard).read_bytes())
    keep = ("GPTQ_CALIB_TOKENS", "MICRO_BATCH_TOKENS", "EVAL_STRIDE")
    env = {name: env[name] for name in keep} | {"DATA_PATH": str(tmp_path)}
    blob, _ = repack(run / "final_model.safetensors", env, tmp_path / "again")
    assert blob == (run / "final_model.int6.ptz").read_bytes()


def test_an_artifact_is_scored_under_any_chunk_without_model_variables(done, byte_corpus, capsys):
    run, env = done
    names = {"TTT_ENABLED": "1", "TTT_CHUNK_TOKENS": "1024", "DATA_PATH": str(byte_corpus)}
    capsys.readouterr()
    assert tg.main(["--eval", str(run / "final_model.int6.ptz")], names) == 0
    assert "legal_ttt_exact" in capsys.readouterr().out


@pytest.mark.parametrize(
    "other",
    [
        {"GPTQ_ENABLED": "0"},
        {"GPTQ_CALIB": "train"},
        {"TTT_ENABLED": "1", "TTT_CHUNK_TOKENS": "1024"},
    ],
)
def test_other_settings(other, done, tmp_path):
    run, env = done
    blob, result = repack(run / "final_model.safetensors", env | other, tmp_path / "again")
    before = json.loads((run / "result.json").read_text())
    assert result["scores"]["float"]["nats"] == before["scores"]["float"]["nats"]
    assert (blob == (run / "final_model.int6.ptz").read_bytes()) == ("TTT_ENABLED" in other)
    _, old = tg.unpack_artifact((run / "final_model.int6.ptz").read_bytes(), tg.Hyperparameters())
    _, new = tg.unpack_artifact(blob, tg.Hyperparameters())
    changed = {name for name in old if not torch.equal(old[name], new[name])}
    of = {name.partition(".")[0] for name in changed}
    if "TTT_ENABLED" in other:
        assert not changed
    else:
        assert of == {"blocks"}
    assert ("ttt" in result["scores"]) == ("TTT_ENABLED" in other)
    if "GPTQ_ENABLED" in other:
        state = safetensors.torch.load_file(run / "final_model.safetensors")
        weight = state["blocks.0.mlp.up.weight"][None]
        codes = tg.quantize_rounding(6, 1.0, weight, None).codes
        assert torch.equal(new["blocks.0.mlp.up.weight.codes"], codes[0])


def test_it_never_overwrites_a_run(done, tmp_path):
    run, env = done
    before = {path.name: path.read_bytes() for path in run.iterdir()}
    assert (
        tg.main(["--quantize", str(run / "final_model.safetensors")], {**env, "RUN_DIR": str(run)})
        == 2
    )
    assert {path.name: path.read_bytes() for path in run.iterdir()} == before
    repack(run / "final_model.safetensors", env, tmp_path / "again")
    twice = {**env, "RUN_DIR": str(tmp_path / "again")}
    assert tg.main(["--quantize", str(run / "final_model.safetensors")], twice) == 2


def test_what_is_no_checkpoint_is_refused_in_a_line(done, tmp_path, capsys):
    run, env = done
    path, good = tmp_path / "model.pt", run / "final_model.safetensors"
    with safetensors.safe_open(good, "pt") as opened:
        told = json.loads(opened.metadata()["settings"])
    weights, whole = safetensors.torch.load_file(good), good.read_bytes()
    first = next(iter(weights))

    def made(weights: dict, settings: object = told) -> bytes:
        return safetensors.torch.save(weights, {"settings": json.dumps(settings)})

    pickled = io.BytesIO()
    torch.save({"settings": told, "weights": weights}, pickled)
    bad = {
        "absent": None,
        "empty": b"",
        "text": b"no checkpoint at all",
        "cut": whole[: len(whole) // 2],
        "artifact": (run / "final_model.int6.ptz").read_bytes(),
        "torch.save": pickled.getvalue(),
        "no weights": made({}),
        "no settings": safetensors.torch.save(weights),
        "a weight missing": made({n: w for n, w in weights.items() if n != first}),
        "a weight more": made(weights | {"more": weights[first].clone()}),
        "a shape": made(weights | {first: weights[first][:-1].clone()}),
        "a type": made(weights | {first: weights[first].half()}),
        "settings missing": made(weights, {}),
        "settings illegal": made(weights, {**told, "num_heads": 5}),
        "settings of another": made(weights, {**told, "num_layers": 4}),
        "settings no object": made(weights, 3),
    }
    for name, data in bad.items():
        path.unlink(missing_ok=True)
        if data is not None:
            path.write_bytes(data)
        capsys.readouterr()
        status = tg.main(["--quantize", str(path)], {**env, "RUN_DIR": str(tmp_path / "none")})
        lines = capsys.readouterr().out.splitlines()
        assert status == 2, (name, lines)
        assert len(lines) == 1, name
        assert lines[0].startswith(f"error: {path}: cannot be read as a checkpoint"), name
        assert len(lines[0]) < 500
        assert not (tmp_path / "none").exists()  # nor has a run begun
    path.write_bytes(made(weights))  # by another order and writer, the same model
    blob, _ = repack(path, env, tmp_path / "again")
    assert blob == (run / "final_model.int6.ptz").read_bytes()
