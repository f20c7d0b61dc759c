"""--quantize: a saved model packed and scored again, under these settings or others."""

import json
import pickle
from pathlib import Path

import pytest
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
	blob, result = repack(run / "final_model.pt", env, tmp_path / "again")
	assert blob == (run / "final_model.int6.ptz").read_bytes()
	before = json.loads((run / "result.json").read_text())
	for name in ("float", "plain"):
		assert result["scores"][name]["nats"] == before["scores"][name]["nats"]
	assert result["status"] == "ok"
	# What was not trained here has no verdict on its time.
	assert before["verdicts"].keys() - result["verdicts"].keys() == {"train_seconds"}
	assert before["seconds"]["total"] > before["seconds"]["train"] > 0
	files = {path.name for path in (tmp_path / "again").iterdir()}
	assert files == {
		"train.log",
		"train_gpt.py",
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
	blob, _ = repack(run / "final_model.pt", env, tmp_path / "again")
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
		{"COMPRESSOR": "lzma"},
		{"GPTQ_CALIB": "train"},
		{"GPTQ_EMBED": "1"},
		{"TTT_ENABLED": "1", "TTT_CHUNK_TOKENS": "1024"},
	],
)
def test_other_settings(other, done, tmp_path):
	run, env = done
	blob, result = repack(run / "final_model.pt", env | other, tmp_path / "again")
	before = json.loads((run / "result.json").read_text())
	assert result["scores"]["float"]["nats"] == before["scores"]["float"]["nats"]
	assert (blob == (run / "final_model.int6.ptz").read_bytes()) == ("TTT_ENABLED" in other)
	_, old = tg.unpack((run / "final_model.int6.ptz").read_bytes(), tg.Hyperparameters())
	_, new = tg.unpack(blob, tg.Hyperparameters())
	changed = {name for name in old if not torch.equal(old[name], new[name])}
	of = {name.partition(".")[0] for name in changed}
	if "COMPRESSOR" in other or "TTT_ENABLED" in other:
		assert not changed
	else:
		assert of == {"tok_emb" if "GPTQ_EMBED" in other else "blocks"}
	assert ("ttt" in result["scores"]) == ("TTT_ENABLED" in other)
	if "GPTQ_ENABLED" in other:
		state = torch.load(run / "final_model.pt")["weights"]
		weight = state["blocks.0.mlp.up.weight"][None]
		assert torch.equal(
			new["blocks.0.mlp.up.weight.codes"], tg.round_rows(weight, None, 6, 1.0)[0][0]
		)


def test_it_never_overwrites_a_run(done, tmp_path):
	run, env = done
	before = {path.name: path.read_bytes() for path in run.iterdir()}
	assert tg.main(["--quantize", str(run / "final_model.pt")], {**env, "RUN_DIR": str(run)}) == 2
	assert {path.name: path.read_bytes() for path in run.iterdir()} == before
	repack(run / "final_model.pt", env, tmp_path / "again")
	twice = {**env, "RUN_DIR": str(tmp_path / "again")}
	assert tg.main(["--quantize", str(run / "final_model.pt")], twice) == 2


class Trap:
	"""What a pickle would run if it were let."""

	def __init__(self, path: Path) -> None:
		self.path = path

	def __reduce__(self):
		return (Path.touch, (self.path,))


def test_what_is_no_checkpoint_is_refused_in_a_line(done, tmp_path, capsys):
	run, env = done
	path, trap = tmp_path / "model.pt", tmp_path / "executed"
	good = torch.load(run / "final_model.pt")
	whole = (run / "final_model.pt").read_bytes()
	weights, told = good["weights"], good["settings"]
	first = next(iter(weights))
	bad = {
		"absent": None,
		"empty": b"",
		"text": b"no checkpoint at all",
		"cut": whole[: len(whole) // 2],
		"artifact": (run / "final_model.int6.ptz").read_bytes(),
		"pickle": pickle.dumps(Trap(trap), protocol=2),
		"trap": {"settings": told, "weights": Trap(trap)},
		"list": [1, 2],
		"state alone": weights,
		"no weights": {"settings": told},
		"a weight missing": {**good, "weights": {n: w for n, w in weights.items() if n != first}},
		"a weight more": {**good, "weights": {**weights, "more": weights[first]}},
		"a shape": {**good, "weights": {**weights, first: weights[first][:-1]}},
		"no tensors": {**good, "weights": dict.fromkeys(weights, 3)},
		"settings missing": {**good, "settings": {}},
		"settings illegal": {**good, "settings": {**told, "num_heads": 5}},
		"settings of another": {**good, "settings": {**told, "num_layers": 4}},
		"settings no object": {**good, "settings": 3},
	}
	for name, data in bad.items():
		path.unlink(missing_ok=True)
		if isinstance(data, bytes):
			path.write_bytes(data)
		elif data is not None:
			torch.save(data, path)
		capsys.readouterr()
		status = tg.main(["--quantize", str(path)], {**env, "RUN_DIR": str(tmp_path / "none")})
		lines = capsys.readouterr().out.splitlines()
		assert status == 2, (name, lines)
		assert len(lines) == 1, name
		assert lines[0].startswith(f"error: {path}: cannot be read as a checkpoint"), name
		assert len(lines[0]) < 500
		assert not trap.exists(), name
		assert not (tmp_path / "none").exists()  # nor has a run begun
	torch.load(run / "final_model.pt")
	pickle.loads(bad["pickle"])
	assert trap.exists()  # the trap works
