"""Settings: where a value comes from, what is refused, what is said."""

import dataclasses
import re
from pathlib import Path

import pytest
from conftest import TINY, settings

import train_gpt as tg

from_env = tg.Hyperparameters.from_env


def test_defaults_are_read_on_the_class_and_on_an_instance():
	assert tg.Hyperparameters.model_dim == 512
	assert (tg.Hyperparameters.num_layers, tg.Hyperparameters.vocab_size) == (11, 1024)
	assert from_env({}) == tg.Hyperparameters()


def test_environment_beats_preset_beats_rule_beats_default():
	assert from_env({}).ve_enabled
	assert not from_env({"VOCAB_SIZE": "260"}).ve_enabled
	assert from_env({"VOCAB_SIZE": "260"}).rope_train_seq_len == 4096
	assert from_env({"VOCAB_SIZE": "260", "VE_ENABLED": "1"}).ve_enabled
	assert not from_env({"VOCAB_SIZE": "0260"}).ve_enabled
	cpu = from_env({"PRESET": "cpu"})
	assert (cpu.num_layers, cpu.max_wallclock_seconds, cpu.corpus) == (2, 0.0, "python")
	assert from_env({"PRESET": "cpu", "NUM_LAYERS": "7"}).num_layers == 7


@pytest.mark.parametrize("preset", tg.PRESETS)
def test_a_preset_names_settings_only(preset):
	given = tg.assignments(tg.PRESETS[preset])
	assert given.keys() <= {f.name.upper() for f in dataclasses.fields(tg.Hyperparameters)}
	h = from_env({"PRESET": preset})
	for name, text in given.items():
		assert float(text) == getattr(h, name.lower()) if name != "CORPUS" else text == h.corpus


def test_paths_follow_the_vocabulary():
	h = from_env({"VOCAB_SIZE": "4096"})
	assert tg.data_folder(h).as_posix() == "data/datasets/fineweb10B_sp4096"
	assert tg.tokenizer_file(h).as_posix() == "data/tokenizers/fineweb_4096_bpe.model"
	h = from_env({"PRESET": "cpu"})
	assert tg.data_folder(h).as_posix() == "data/datasets/python_sp1024"
	assert tg.tokenizer_file(h).as_posix() == "data/tokenizers/python_1024_bpe.model"
	assert tg.data_folder(from_env({"PRESET": "cpu", "VOCAB_SIZE": "260"})).name == "python_byte260"
	assert tg.data_folder(from_env({"DATA_PATH": "/x"})).as_posix() == "/x"


@pytest.mark.parametrize(
	("name", "text", "says"),
	[
		("NUM_LAYERS", "eleven", "whole number"),
		("NUM_LAYERS", "1e3", "whole number"),
		("NUM_LAYERS", "", "whole number"),
		("NUM_LAYERS", "0", "from 1 to 1000"),
		("NUM_LAYERS", "-3", "from 1 to 1000"),
		("MATRIX_LR", "nan", "from 0 to"),
		("MAX_WALLCLOCK_SECONDS", "inf", "from 0 to"),
		("MAX_WALLCLOCK_SECONDS", "-1", "from 0 to"),
		("SMEAR_GATE", "true", "0 or 1"),
		("SMEAR_GATE", "2", "0 or 1"),
		("PRESET", "gpu", "one of"),
		("ATTN", "fast", "one of"),
		("MODEL_DIM", "500", "multiple of NUM_HEADS"),
		("NUM_KV_HEADS", "3", "must divide NUM_HEADS"),
		("ROPE_DIMS", "15", "even"),
		("ROPE_DIMS", "128", "at most 64"),
		("BIGRAM_VOCAB_SIZE", "1", "0 (none) or at least 2"),
		("VE_LAYERS", "9,11", "below NUM_LAYERS=11"),
		("VE_LAYERS", "last", "as 9,10"),
		("VE_LAYERS", "-1", "as 9,10"),
	],
)
def test_a_bad_value_is_named_with_its_remedy(name, text, says):
	with pytest.raises(tg.SettingsError) as error:
		from_env({name: text})
	assert name in str(error.value)
	assert says in str(error.value)
	assert text in str(error.value)


def test_a_batch_of_whole_sequences_is_asked_for():
	with pytest.raises(tg.SettingsError, match=r"TRAIN_BATCH_TOKENS=5000 must .*=2048"):
		from_env({"TRAIN_BATCH_TOKENS": "5000"})


def test_all_bad_values_come_in_one_error():
	env = {"NUM_LAYERS": "x", "MATRIX_LR": "-1", "SMEAR_GATE": "yes", "SEED": "1"}
	with pytest.raises(tg.SettingsError) as error:
		from_env(env)
	assert [line.split("=")[0] for line in sorted(str(error.value).splitlines())] == [
		"MATRIX_LR",
		"NUM_LAYERS",
		"SMEAR_GATE",
	]


def test_grouped_digits_and_whole_floats_are_numbers():
	assert from_env({"TRAIN_BATCH_TOKENS": "524_288"}).train_batch_tokens == 524_288
	assert from_env({"MLP_MULT": "2"}).mlp_mult == 2.0
	assert from_env({"MAX_WALLCLOCK_SECONDS": "1e3"}).max_wallclock_seconds == 1000.0


def test_rules_and_near_misses_are_said():
	env = {"VOCAB_SIZE": "260", "NUM_LAYER": "9", "HOME": "/root", "LANG": "C", "PATH": "/bin"}
	notes = tg.settings_notes(from_env(env), env)
	assert "rule: VOCAB_SIZE=260 sets VE_ENABLED=0" in notes
	assert [n for n in notes if "NUM_LAYER " in n and "NUM_LAYERS" in n]
	assert len([n for n in notes if n.startswith("warning")]) == 1
	assert not [n for n in tg.settings_notes(settings(), TINY) if "VE_ENABLED" in n]


def test_every_setting_is_read_outside_its_class():
	source = Path(tg.__file__).read_text(encoding="utf-8")
	body = source[source.index("def value_layers") :]
	unread = [
		f.name
		for f in dataclasses.fields(tg.Hyperparameters)
		if not re.search(rf"\bh\.{f.name}\b|\"{f.name}\"", body)
	]
	assert unread == ["preset"]  # read by from_env


@pytest.mark.parametrize("value", [float("nan"), "3", None])
def test_an_instance_is_checked_however_it_is_made(value):
	with pytest.raises(tg.SettingsError, match="MATRIX_LR"):
		tg.Hyperparameters(matrix_lr=value)


def test_all_that_the_published_command_asks_for_is_built():
	env = {"GPTQ_ENABLED": "1", "STP_ENABLED": "0", "LABEL_SMOOTHING": "0.0", "TTT_ENABLED": "0"}
	assert not tg.settings_notes(from_env(env), env)
	assert from_env(env) == tg.Hyperparameters()  # GPTQ too is a default


def test_bytes_are_rounded_unless_gptq_is_asked_for():
	"""PR #832 rounds; the other vocabularies have GPTQ."""
	assert not from_env({"VOCAB_SIZE": "260"}).gptq_enabled
	assert from_env({"VOCAB_SIZE": "260", "GPTQ_ENABLED": "1"}).gptq_enabled
	assert from_env({"VOCAB_SIZE": "1024"}).gptq_enabled


@pytest.mark.parametrize(
	("env", "says"),
	[
		({"STP_ENABLED": "1", "TRAIN_SEQ_LEN": "2"}, "TRAIN_SEQ_LEN=2: must be from 3"),
		(
			{"GPTQ_CALIB": "train", "GPTQ_RESERVE_SECONDS": "600"},
			"GPTQ_RESERVE_SECONDS=600.0 must be below MAX_WALLCLOCK_SECONDS=600",
		),
	],
)
def test_what_cannot_go_together_is_said(env, says):
	with pytest.raises(tg.SettingsError, match=says):
		from_env(env)


def test_the_table_has_every_setting_once():
	lines = tg.settings_table().splitlines()
	names = [f.name.upper() for f in dataclasses.fields(tg.Hyperparameters)]
	assert [line.split()[0] for line in lines] == names
	assert max(map(len, lines)) <= 100
