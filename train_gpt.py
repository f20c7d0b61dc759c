"""Train, shrink and score a language model for the OpenAI Parameter Golf challenge, in one file.

The best model that fits in 16,000,000 bytes, this file included, after 600 s on 8xH100, is the one
with the fewest bits per byte (bpb) on text it has not seen.

    PRESET=cpu python train_gpt.py  # a laptop, minutes
    torchrun --standalone --nproc_per_node=1 train_gpt.py  # one GPU
    python train_gpt.py --eval logs/<RUN_ID>/final_model.int6.ptz  # score it again
    python train_gpt.py --help  # every setting

Importing only defines names. A section uses itself and earlier ones: Settings, Runtime, Data,
Model, Evaluate, Optimizers, Training, Quantize and pack, Run.

B sequences, T tokens, D model width, H query heads, K key/value heads, d head width, V vocabulary.
"""

import argparse
import bisect
import contextlib
import difflib
import functools
import hashlib
import io
import itertools
import json
import lzma
import math
import os
import platform
import re
import signal
import struct
import sys
import time
import traceback
from collections import deque
from collections.abc import Callable, Iterable, Mapping
from dataclasses import Field, asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any, NamedTuple

if __name__ == "__main__" and not {"OMP_WAIT_POLICY", "GOMP_SPINCOUNT"} & os.environ.keys():
	# Threads that spin long make a step ten times slower beside another busy process; OpenMP must
	# know before torch loads.
	os.environ |= {"OMP_WAIT_POLICY": "PASSIVE", "GOMP_SPINCOUNT": "1000"}

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

# ---- Settings: what the run is told ----

BYTES_LIMIT = 16_000_000  # the challenge's, for this file and the artifact together
EVAL_SECONDS_LIMIT = 600.0  # the challenge's, for scoring
BYTE_VOCAB = 260  # ids 0-3 are special, 4 + b is byte b
BOS_ID = 1  # opens every document

# What a vocabulary implies, as in PR #832.
VOCABULARY_RULES = {BYTE_VOCAB: "VE_ENABLED=0 GPTQ_ENABLED=0 ROPE_TRAIN_SEQ_LEN=4096"}

# Whole configurations, as one would type them.
PRESETS = {
	# A first run: the embedded corpus, minutes on two cores.
	"cpu": "CORPUS=python NUM_LAYERS=2 MODEL_DIM=128 NUM_HEADS=2 NUM_KV_HEADS=1 VE_DIM=32 "
	"BIGRAM_VOCAB_SIZE=16384 BIGRAM_DIM=64 TRAIN_SEQ_LEN=512 TRAIN_BATCH_TOKENS=2048 "
	"ITERATIONS=1200 WARMDOWN_ITERS=720 MAX_WALLCLOCK_SECONDS=0 MATRIX_LR=0.02 EMA_DECAY=0.97 "
	"TRAIN_LOG_EVERY=100 VAL_LOSS_EVERY=0",
	# PR #832: bytes and the JEPA head, less the defaults.
	"byte_jepa": "VOCAB_SIZE=260 NUM_LAYERS=13 MLP_MULT=2 XSA_LAST_N=4 BIGRAM_VOCAB_SIZE=4096 "
	"BIGRAM_DIM=32 TRAIN_SEQ_LEN=4096 TRAIN_BATCH_TOKENS=393216 ITERATIONS=9000 "
	"WARMDOWN_ITERS=3000 EVAL_STRIDE=512 JEPA_CHUNK_SIZE=8",
	# PR #1124: the defaults.
	"v9": "",
}


class SettingsError(ValueError):
	"""Settings that cannot be used, a line for each."""


def knob(
	default: Any,
	doc: str,
	low: float = 0,
	high: float = 1e18,
	choices: str = "",
	in_artifact: bool = False,
) -> Any:
	"""A setting: default (and so its type), meaning, bounds or choices."""
	return field(default=default, metadata=locals())


# What the model is: it travels in the artifact.
of_model = functools.partial(knob, in_artifact=True)


@dataclass(frozen=True)
class Hyperparameters:
	"""Every setting; the upper-cased field name is the environment variable."""

	# Run; the defaults are the stack of PR #1124
	preset: str = knob("", "a whole configuration", choices=" ".join(PRESETS))
	run_id: str = knob("", "empty: date, time, seed")
	run_dir: str = knob("", "empty: logs/<RUN_ID>")
	seed: int = knob(1337, "of the initial weights")
	dtype: str = knob("auto", "of activations", choices="auto bf16 fp32")
	attn: str = knob("auto", "attention", choices="auto fa3 cudnn flash math")
	compile: str = knob("auto", "torch.compile; auto: on CUDA", choices="auto 0 1")
	# Data
	corpus: str = of_model("fineweb10B", "data set family, for both paths")
	data_path: str = knob("", "shards; empty: ./data/datasets/<CORPUS>_sp<VOCAB_SIZE>")
	tokenizer_path: str = knob("", "empty: ./data/tokenizers/<CORPUS>_<VOCAB_SIZE>_bpe.model")
	vocab_size: int = of_model(1024, "tokens; 260: bytes", 5, 65_536)
	train_seq_len: int = of_model(2048, "tokens a sequence", 3)
	train_batch_tokens: int = knob(786_432, "tokens a step", 2)
	micro_batch_tokens: int = knob(98_304, "most tokens in one pass", 1)
	# Model
	num_layers: int = of_model(11, "blocks", 1, 1000)
	model_dim: int = of_model(512, "width of the stream", 2)
	num_heads: int = of_model(8, "query heads", 1)
	num_kv_heads: int = of_model(4, "key/value heads (GQA)", 1)
	mlp_mult: float = of_model(3.0, "MLP width over MODEL_DIM", 0.01)
	negative_slope: float = of_model(0.5, "leaky_relu(., slope)^2; 0: relu^2", 0, 1)
	tie_embeddings: bool = of_model(True, "the head is the token embedding")
	tied_embed_init_std: float = knob(0.005, "std of the token embedding")
	logit_softcap: float = of_model(30.0, "c in c tanh(logits / c)", 0.01)
	rope_base: float = of_model(10_000.0, "RoPE base", 1)
	rope_dims: int = of_model(16, "rotated dims of a head; 0: all")
	rope_train_seq_len: int = of_model(1024, "longer ones stretch the base (NTK)", 1)
	qk_gain_init: float = knob(1.5, "initial gain of q, per head", -1e18)
	xsa_last_n: int = of_model(11, "last layers with exclusive attention")
	ln_scale: bool = of_model(True, "norms times 1/sqrt(layer + 1)")
	unet_skips: bool = of_model(True, "late layers read early ones")
	smear_gate: bool = of_model(True, "mix in the token before")
	bigram_vocab_size: int = of_model(2048, "BigramHash buckets; 0: none")
	bigram_dim: int = of_model(128, "BigramHash width", 1)
	bos_mask: bool = of_model(True, "pairs stop at BOS; 0: as published")
	ve_enabled: bool = of_model(True, "value embeddings")
	ve_dim: int = of_model(128, "their width", 1)
	ve_layers: str = of_model("", "their layers, as 9,10; empty: the last two")
	# JEPA head (PR #832)
	jepa_chunk_size: int = of_model(0, "positions a latent stands for; 0: no JEPA")
	jepa_latent_dim: int = of_model(256, "width of a latent", 1)
	jepa_proj_hidden: int = of_model(256, "hidden width of projector", 1)
	jepa_inject: bool = of_model(True, "predictions enter; 0: it only teaches")
	jepa_lambda_max: float = knob(0.001, "peak weight of its losses; 0: random latents")
	jepa_phase1_frac: float = knob(0.3, "part of the run before they start", 0, 1)
	jepa_phase2_frac: float = knob(0.5, "next part: rise to the peak; then none", 1e-9, 1)
	jepa_phase_progress: bool = knob(False, "parts by seconds too; 0: ITERATIONS alone")
	jepa_backbone_grad: bool = knob(False, "its losses teach the backbone")
	jepa_sigreg: str = knob("published", "SIGReg", choices="published lejepa")
	jepa_sigreg_weight: float = knob(0.02, "of SIGReg beside the prediction error")
	jepa_sigreg_projs: int = knob(256, "its directions", 1)
	jepa_sigreg_knots: int = knob(17, "its quadrature nodes", 2)
	jepa_lr: float = knob(0.001, "AdamW: JEPA head")
	# Training loss
	label_smoothing: float = knob(0.0, "of targets, in training only", 0, 0.99)
	stp_enabled: bool = knob(False, "a loss for straight hidden paths")
	stp_lambda: float = knob(0.05, "weight of STP")
	late_qat_threshold: float = knob(0.0, "QAT below this rate factor; 0: never", 0, 1)
	# Optimizers
	matrix_lr: float = knob(0.025, "Muon: block matrices")
	scalar_lr: float = knob(0.025, "AdamW: gains, gates, small projections")
	tied_embed_lr: float = knob(0.035, "AdamW: embeddings, head tied")
	embed_lr: float = knob(0.6, "AdamW: embeddings, head untied")
	head_lr: float = knob(0.008, "AdamW: untied head")
	beta1: float = knob(0.9, "AdamW", 0, 0.9999)
	beta2: float = knob(0.95, "AdamW", 0, 0.99999)
	adam_eps: float = knob(1e-8, "AdamW")
	adam_wd: float = knob(0.04, "AdamW weight decay")
	muon_wd: float = knob(0.04, "Muon weight decay")
	muon_momentum: float = knob(0.99, "Muon momentum, once warm", 0, 0.9999)
	muon_momentum_warmup_start: float = knob(0.92, "at the start", 0, 0.9999)
	muon_momentum_warmup_steps: int = knob(1500, "steps from start to warm")
	muon_backend_steps: int = knob(5, "Newton-Schulz iterations", 1)
	grad_clip_norm: float = knob(0.3, "largest gradient norm; 0: any")
	ema_enabled: bool = knob(True, "end with a moving average")
	ema_decay: float = knob(0.997, "its decay; at most (1 + t)/(10 + t)", 0, 0.999999)
	swa_enabled: bool = knob(False, "end with the mean of late weights")
	swa_every: int = knob(50, "steps between those", 1)
	# Schedule
	iterations: int = knob(20_000, "most steps")
	max_wallclock_seconds: float = knob(600.0, "most training seconds; 0: any")
	warmup_steps: int = knob(20, "steps thrown away before")
	warmdown_iters: int = knob(3500, "last steps: the rates fall to 0")
	warmdown_max_fraction: float = knob(0.6, "at most this part of the run", 0, 1)
	warmdown_published: bool = knob(False, "the records' rule, which can miss 0")
	val_loss_every: int = knob(4000, "steps between; 0: the last only")
	train_log_every: int = knob(500, "steps between lines; 0: the first ten")
	# Evaluate
	eval_seq_len: int = knob(0, "tokens a window; 0: TRAIN_SEQ_LEN")
	eval_stride: int = knob(64, "of the sliding window; 0: no sliding pass")
	val_batch_size: int = knob(524_288, "tokens scored at once / 8 ranks", 1)
	ttt_enabled: bool = knob(False, "score again, learning from scored chunks")
	ttt_chunk_tokens: int = knob(32_768, "tokens of a chunk", 2)
	ttt_epochs: int = knob(3, "times it is learned from")
	ttt_lr: float = knob(0.002, "SGD, falling to 0 as half a cosine")
	ttt_momentum: float = knob(0.9, "SGD", 0, 0.9999)
	ttt_freeze_blocks: int = knob(0, "first blocks that do not learn")
	# Quantize and pack
	gptq_enabled: bool = knob(True, "GPTQ for the matrices; 0: rounding")
	gptq_embed: bool = knob(False, "GPTQ for the head too, tied or not")
	gptq_calib: str = knob("random", "what GPTQ reads", choices="random train")
	gptq_calib_tokens: int = knob(131_072, "that GPTQ reads", 1)
	gptq_reserve_seconds: float = knob(14.0, "of the cap, for GPTQ_CALIB=train")
	compressor: str = knob("zstd", "of the artifact", choices="zstd lzma")

	def __post_init__(self) -> None:
		faults = [x for f in fields(self) if (x := fault(f, getattr(self, f.name)))]
		if faults := faults or faults_together(self):
			raise SettingsError("\n".join(faults))

	@classmethod
	def from_env(cls, env: Mapping[str, str]) -> "Hyperparameters":
		"""By environment, else PRESET, else rule of VOCAB_SIZE, else default."""
		env = {**assignments(PRESETS.get(env.get("PRESET", ""), "")), **env}
		with contextlib.suppress(ValueError, KeyError):
			env = {**assignments(VOCABULARY_RULES[int(env["VOCAB_SIZE"])]), **env}
		given = [f for f in fields(cls) if f.name.upper() in env]
		return cls(**{f.name: parse_value(env[f.name.upper()], f.default) for f in given})


def assignments(text: str) -> dict[str, str]:
	"""The variables of a line `A=1 B=2`."""
	return dict(pair.split("=", 1) for pair in text.split())


def parse_value(text: str, default: Any) -> Any:
	"""The text in its default's type or, at fault, as it is."""
	if isinstance(default, bool):
		return {"0": False, "1": True}.get(text, text)
	try:
		return type(default)(text)
	except ValueError:
		return text


def fault(f: "Field[Any]", value: Any) -> str | None:
	"""What is wrong with a value."""
	about, kind = f.metadata, type(f.default)
	if type(value) is not kind and (kind, type(value)) != (float, int):
		must = {bool: "0 or 1", int: "a whole number", float: "a number", str: "text"}[kind]
	elif about["choices"] and value not in (f.default, *about["choices"].split()):
		must = f"one of {about['choices']}"
	elif kind is not str and not about["low"] <= value <= about["high"]:  # NaN neither
		must = f"from {about['low']} to {about['high']}"
	else:
		return None
	return f"{f.name.upper()}={value!r}: must be {must}"


def faults_together(h: Hyperparameters) -> list[str]:
	"""What is wrong with values legal alone."""
	width, rest = h.model_dim // h.num_heads, h.train_batch_tokens % h.train_seq_len
	layers = h.ve_layers.split(",") if h.ve_layers else []
	checks = {
		"MODEL_DIM must be an even multiple of NUM_HEADS": h.model_dim % (2 * h.num_heads),
		"NUM_KV_HEADS must divide NUM_HEADS": h.num_heads % h.num_kv_heads,
		f"ROPE_DIMS must be even and at most {width}": h.rope_dims % 2 or h.rope_dims > width,
		"TRAIN_BATCH_TOKENS must be a multiple of TRAIN_SEQ_LEN": rest,
		"JEPA_CHUNK_SIZE must be at most half of TRAIN_SEQ_LEN": 2 * h.jepa_chunk_size
		> h.train_seq_len,
		"GPTQ_RESERVE_SECONDS must be below MAX_WALLCLOCK_SECONDS": h.gptq_enabled
		and h.gptq_calib == "train"
		and 0 < h.max_wallclock_seconds <= h.gptq_reserve_seconds,
		"BIGRAM_VOCAB_SIZE must be 0 (none) or at least 2": h.bigram_vocab_size == 1,
		"VE_LAYERS must be layers below NUM_LAYERS, as 9,10": not all(
			n.isdecimal() and int(n) < h.num_layers for n in layers
		),
	}
	return [
		re.sub(r"[A-Z_]{5,}", lambda name: f"{name[0]}={getattr(h, name[0].lower())!r}", rule)
		for rule, broken in checks.items()
		if broken
	]


def settings_notes(h: Hyperparameters, env: Mapping[str, str]) -> list[str]:
	"""What a rule set, and names that are nearly right."""
	names = [f.name.upper() for f in fields(h)]
	known = {**assignments(PRESETS.get(h.preset, "")), **env}
	rules = assignments(VOCABULARY_RULES.get(h.vocab_size, "")).items()
	rules = [f"{name}={value}" for name, value in rules if name not in known]
	notes = [f"rule: VOCAB_SIZE={h.vocab_size} sets {rule}" for rule in rules]
	for name in sorted(env.keys() - names):
		for near in difflib.get_close_matches(name, names, n=1, cutoff=0.88):
			notes.append(f"warning: {name} is no setting; is {near} meant?")
	return notes


def settings_table() -> str:
	"""Every setting for --help and README."""
	lines = []
	for f in fields(Hyperparameters):
		default = int(f.default) if isinstance(f.default, bool) else f.default
		choices = " | ".join(f.metadata["choices"].split())
		line = f"{f.name.upper():<28}{default!s:<12}{f.metadata['doc']}"
		lines.append(line + f" ({choices})" * bool(choices))
	return "\n".join(lines)


def value_layers(h: Hyperparameters) -> list[int]:
	"""Layers that add the value embedding."""
	layers = range(max(h.num_layers - 2, 0), h.num_layers)
	if h.ve_layers:
		layers = {int(n) for n in h.ve_layers.split(",")}
	return sorted(layers) if h.ve_enabled else []


def data_folder(h: Hyperparameters) -> Path:
	"""Folder of the shards."""
	kind = "byte260" if h.vocab_size == BYTE_VOCAB else f"sp{h.vocab_size}"
	return Path(h.data_path or f"./data/datasets/{h.corpus}_{kind}")


def tokenizer_file(h: Hyperparameters) -> Path:
	"""The sentencepiece model."""
	family = h.corpus.removesuffix("10B")
	return Path(h.tokenizer_path or f"./data/tokenizers/{family}_{h.vocab_size}_bpe.model")


# ---- Runtime: where it runs ----

Attend = Callable[[Tensor, Tensor, Tensor], Tensor]  # q [B,T,H,d], k and v [B,T,K,d] -> [B,T,H,d]


def attend_sdpa(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
	"""Causal grouped-query attention by PyTorch."""
	q, k, v = (x.transpose(1, 2) for x in (q, k, v))
	y = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=q.size(1) != k.size(1))
	return y.transpose(1, 2)


def load_attention(name: str) -> Attend:
	"""One back end; PyTorch's others are disabled."""
	if name == "fa3":
		from flash_attn_interface import flash_attn_func

		def attend_fa3(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
			y = flash_attn_func(q, k, v, causal=True)
			return y[0] if isinstance(y, tuple) else y  # some versions add the log-sum-exp

		return attend_fa3
	for back_end in ("cudnn", "flash", "math", "mem_efficient"):
		getattr(torch.backends.cuda, f"enable_{back_end}_sdp")(back_end == name)
	return attend_sdpa


@dataclass(frozen=True)
class Runtime:
	"""The machine as this run uses it."""

	device: torch.device
	dtype: torch.dtype  # of activations; weights are float32
	attention: str
	attend: Attend
	compiled: bool
	notes: list[str]  # what was chosen, and why

	@classmethod
	def start(cls, h: Hyperparameters, env: Mapping[str, str]) -> "Runtime":
		"""Choose; SettingsError where a choice cannot run."""
		if env.get("WORLD_SIZE", "1") != "1":
			raise SettingsError(f"WORLD_SIZE={env['WORLD_SIZE']}: must be 1; --nproc_per_node=1")
		cuda, notes = torch.cuda.is_available(), []
		has_bf16 = cuda and torch.cuda.get_device_capability() >= (8, 0)  # else emulated: slow
		if not cuda:
			notes.append("device:cpu, no CUDA GPU is here")
		elif not has_bf16:
			if h.dtype == "bf16":
				raise SettingsError("DTYPE=bf16: this GPU has no bf16; use auto or fp32")
			notes.append("dtype:fp32, this GPU has no bf16")
		bf16 = h.dtype == "bf16" or (h.dtype == "auto" and has_bf16)
		dtype = torch.bfloat16 if bf16 else torch.float32
		return choose_kernels(h, torch.device("cuda" if cuda else "cpu"), dtype, notes)

	def compile(self, function: Callable[..., Any]) -> Callable[..., Any]:
		"""The function, for fixed shapes if compiled."""
		return torch.compile(function, dynamic=False, fullgraph=True) if self.compiled else function

	def now(self) -> float:
		"""Seconds, once all queued work is done."""
		if self.device.type == "cuda":
			torch.cuda.synchronize(self.device)
		return time.perf_counter()

	def describe(self) -> dict[str, Any]:
		"""Device, choices and versions."""
		cuda = self.device.type == "cuda"
		return {
			"device": torch.cuda.get_device_name(self.device) if cuda else platform.machine(),
			"dtype": str(self.dtype).removeprefix("torch."),
			"attention": self.attention,
			"compiled": self.compiled,
			"threads": torch.get_num_threads(),
			"torch": torch.__version__,
			"python": platform.python_version(),
		}


def choose_kernels(
	h: Hyperparameters, device: torch.device, dtype: torch.dtype, notes: list[str]
) -> Runtime:
	"""The first attention that runs forward and backward."""
	cuda = device.type == "cuda"
	hopper = cuda and torch.cuda.get_device_capability(device)[0] == 9
	order = ("fa3", "cudnn", "flash", "math") if hopper else ("flash", "cudnn", "math")
	order = order if h.attn == "auto" else (h.attn,)
	compiles = {"0": [False], "1": [True], "auto": [True, False] if cuda else [False]}[h.compile]
	heads = (h.num_heads, h.num_kv_heads, h.num_kv_heads)
	shape = (1, h.train_seq_len, sum(heads), h.model_dim // h.num_heads)
	for compiled, name in itertools.product(compiles, order):
		try:
			rt = Runtime(device, dtype, name, load_attention(name), compiled, notes)
			qkv = torch.linspace(-1, 1, math.prod(shape)).view(shape).to(device, dtype)
			q, k, v = qkv.requires_grad_().split(heads, dim=2)
			y = rt.compile(lambda q, k, v: rt.attend(q.sin(), k, v))(q, k, v)  # noqa: B023
			y.sum().backward()
			if y.isfinite().all() and qkv.grad.isfinite().all():
				return rt
			raise ArithmeticError("it gave NaN")
		except Exception as error:  # the next one may run
			notes.append(f"attention:{name} compiled:{compiled} not used: {error!r:.200}")
			torch.compiler.reset()
	asked = f"ATTN={h.attn} COMPILE={h.compile}: cannot run here; use auto or COMPILE=0"
	raise SettingsError("\n".join((asked, *notes)))


class Log:
	"""Lines for people, events for programs, a moving line."""

	def __init__(self, folder: Path | None = None) -> None:
		self.folder = folder
		self.watched = sys.stderr.isatty()

	def append(self, name: str, text: str) -> None:
		"""Add a line; a full disk ends no run."""
		if self.folder:
			with contextlib.suppress(OSError), open(self.folder / name, "a", encoding="utf-8") as f:
				f.write(text + "\n")

	def line(self, text: str) -> None:
		"""Print a line and keep it in train.log."""
		self.progress("")
		with contextlib.suppress(OSError):
			print(text, flush=True)
		self.append("train.log", text)

	def event(self, kind: str, **values: Any) -> None:
		"""Keep a JSON object in events.jsonl."""
		self.append("events.jsonl", json.dumps({"event": kind, **values}))

	def progress(self, text: str) -> None:
		"""Show text in place of the last."""
		if self.watched:
			with contextlib.suppress(OSError):
				print(f"\r\033[K{text}", end="", file=sys.stderr, flush=True)


def write_atomically(path: Path, data: bytes) -> None:
	"""Write a file whole or not at all."""
	partial = path.with_name(path.name + ".part")
	with open(partial, "wb") as file:
		file.write(data)
		file.flush()
		os.fsync(file.fileno())
	partial.replace(path)


# ---- Data: what it eats ----

SHARD_MAGIC, SHARD_VERSION, SHARD_HEADER_INTS = 20240520, 1, 256
PROOF_TOKENS = 1_000_000  # on which the byte table must agree with decoded text


class DataError(ValueError):
	"""A shard, tokenizer or artifact that cannot be used."""


def read_shard(path: Path) -> np.ndarray:
	"""Tokens uint16 [count], mapped from disk, after 256 int32: magic, version, count, zeros."""
	header = np.fromfile(path, dtype="<i4", count=SHARD_HEADER_INTS)
	magic, version, count = (int(n) for n in (*header, 0, 0, 0)[:3])
	expected, size = 4 * SHARD_HEADER_INTS + 2 * count, path.stat().st_size
	if (magic, version) != (SHARD_MAGIC, SHARD_VERSION) or count <= 0 or size != expected:
		found = f"magic {magic}, version {version}, {size} bytes, but {count} tokens need"
		raise DataError(f"{path}: no whole shard: {found} {expected}; make or fetch it again")
	return np.memmap(path, "<u2", "r", offset=4 * SHARD_HEADER_INTS, shape=(count,))


class TokenStream:
	"""The shards of a split in name order, again and again."""

	def __init__(self, folder: Path, split: str, vocab_size: int) -> None:
		self.pattern = folder / f"fineweb_{split}_*.bin"
		self.paths = sorted(folder.glob(self.pattern.name))
		if not self.paths:
			remedy = "change it, or make PRESET=cpu's by `python data/prepare.py`"
			raise DataError(f"DATA_PATH={folder}: no {self.pattern.name} there; {remedy}")
		self.shards = [read_shard(path) for path in self.paths]
		self.ends = [*itertools.accumulate(map(len, self.shards))]
		self.vocab_size = vocab_size

	def __len__(self) -> int:
		return self.ends[-1]

	def read(self, position: int, count: int) -> Tensor:
		"""Tokens int64 [count] from a position on."""
		tokens, filled = np.empty(count, np.int64), 0
		while filled < count:
			at = (position + filled) % len(self)
			index = bisect.bisect(self.ends, at)
			part = self.shards[index][at - self.ends[index] :][: count - filled]
			if (largest := int(part.max())) >= self.vocab_size:
				found = f"token id {largest} is outside VOCAB_SIZE={self.vocab_size}"
				raise DataError(f"{self.paths[index]}: {found}; use data of the vocabulary")
			tokens[filled : filled + len(part)] = part
			filled += len(part)
		return torch.from_numpy(tokens)

	def batch(self, step: int, h: Hyperparameters) -> tuple[Tensor, Tensor]:
		"""Inputs and targets int64 [sequences, T] of a step."""
		tokens = self.read(step * h.train_batch_tokens, h.train_batch_tokens + 1)
		return tokens[:-1].view(-1, h.train_seq_len), tokens[1:].view(-1, h.train_seq_len)


def micro_batches(h: Hyperparameters) -> int:
	"""The fewest parts of a step within MICRO_BATCH_TOKENS."""
	rows = h.train_batch_tokens // h.train_seq_len
	most = max(h.micro_batch_tokens // h.train_seq_len, 1)
	return next(n for n in range(1, rows + 1) if rows % n == 0 and rows // n <= most)


class ByteTable(NamedTuple):
	"""Bytes of text of each token: the only byte accounting."""

	size: Tensor  # int16 [V], less a leading space that decoders drop after no text
	space: Tensor  # int16 [V]: 1 for that space
	special: Tensor  # bool [V]: no text, as BOS

	def count(self, previous: Tensor, target: Tensor) -> Tensor:
		"""Bytes int16 of each target after its previous token."""
		return self.size[target] + self.space[target] * ~self.special[previous]

	@classmethod
	def of_bytes(cls) -> "ByteTable":
		"""The byte vocabulary's."""
		size = (torch.arange(BYTE_VOCAB) >= 4).short()
		return cls(size, torch.zeros_like(size), size == 0)

	@classmethod
	def of_tokenizer(cls, tokenizer: Any) -> "ByteTable":
		"""A sentencepiece processor's."""
		rows = []
		for i in range(tokenizer.vocab_size()):
			special = tokenizer.is_control(i) or tokenizer.is_unknown(i) or tokenizer.is_unused(i)
			size = whole = int(not special)
			if not (special or tokenizer.is_byte(i)):
				size = len(tokenizer.decode([i]).encode())  # may drop a leading space
				whole = len(tokenizer.id_to_piece(i).replace("\u2581", " ").encode())
			rows.append((size, whole - size, special))
		size, space, special = torch.tensor(rows, dtype=torch.int16).unbind(1)
		return cls(size, space, special.bool())


def prove_byte_table(table: ByteTable, tokenizer: Any, tokens: Tensor) -> int:
	"""Bytes on which table and decoder agree, else DataError."""
	head = tokens[:PROOF_TOKENS]
	counts = table.count(head[:-1], head[1:]).long()
	edges = table.special[head].nonzero().flatten().tolist()
	if len(head) == len(tokens):
		edges.append(len(head))  # else the last text may end within a character
	proven = 0
	for start, end in itertools.pairwise(edges):
		counted = int(counts[start : end - 1].sum())
		decoded = len(tokenizer.decode(head[start + 1 : end].tolist()).encode())
		if counted != decoded:
			found = f"the byte table counts {counted}, the decoder {decoded} bytes"
			raise DataError(f"validation token {start + 1}: {found}; no bpb of these data counts")
		proven += counted
	return proven


class Data(NamedTuple):
	"""Both splits and the byte table."""

	val: Tensor  # int32 [N]
	table: ByteTable
	train: TokenStream | None  # None: only scored


def load_data(h: Hyperparameters, log: Log, training: bool = True) -> Data:
	"""Open the splits and prove the byte table."""
	folder = data_folder(h)
	val_stream = TokenStream(folder, "val", h.vocab_size)
	val = val_stream.read(0, len(val_stream)).int()
	if len(val) <= (h.eval_seq_len or h.train_seq_len):
		raise DataError(f"{folder}: {len(val)} validation tokens are no window; lower EVAL_SEQ_LEN")
	if h.vocab_size == BYTE_VOCAB:
		table = ByteTable.of_bytes()
		proven = int(table.count(val[:-1], val[1:]).sum())
		log.line(f"val_bpb:enabled tokenizer_kind=byte260 vocab_size={BYTE_VOCAB}")
	else:
		import sentencepiece

		path = tokenizer_file(h)
		try:
			tokenizer = sentencepiece.SentencePieceProcessor(model_file=str(path))
		except Exception as error:  # any, by version
			raise DataError(f"TOKENIZER_PATH={path}: {error}; fetch it with its data") from None
		if (pieces := tokenizer.vocab_size()) != h.vocab_size:
			found = f"{pieces} pieces, VOCAB_SIZE={h.vocab_size}"
			raise DataError(f"TOKENIZER_PATH={path}: {found}; change one")
		table = ByteTable.of_tokenizer(tokenizer)
		proven = prove_byte_table(table, tokenizer, val)
		log.line(f"val_bpb:enabled tokenizer_kind=sentencepiece tokenizer_path={path}")
		log.line(f"byte_table:proven against {proven} bytes of decoded text")
		if unknown := int((val == tokenizer.unk_id()).sum()):
			log.line(f"warning: {unknown} validation tokens are unknown text, of 0 bytes")
	if not proven:
		raise DataError(f"{folder}: the validation tokens hold no text that follows BOS")
	log.line(f"val_loader:shards pattern={val_stream.pattern} tokens:{len(val) - 1}")
	if not training:
		return Data(val, table, None)
	train_stream = TokenStream(folder, "train", h.vocab_size)
	for path, other in itertools.product(val_stream.paths, train_stream.paths):
		if path.samefile(other):
			raise DataError(f"{path}: is {other} too: what is trained on cannot be scored")
	log.line(f"train_loader:dataset:{folder.name} train_shards:{len(train_stream.paths)}")
	return Data(val, table, train_stream)


# ---- Model: what it is ----
# A class states its parameters' roles, which decide optimizer, rate, decay and stored bits; see
# ROLE_POLICY. Nothing is chosen by name.


def rms_norm(x: Tensor) -> Tensor:
	"""x over its root mean square; torch's default eps has changed."""
	return F.rms_norm(x, (x.size(-1),), eps=1.2e-7)


class Linear(nn.Linear):
	"""Bias-free, float32 weight [out, in] cast to its input's dtype.

	Starts orthogonal times `gain` or, for None, uniform within 1/sqrt(in).
	"""

	rounds = False  # late QAT is on

	def __init__(
		self, fan_in: int, fan_out: int, gain: float | None = 1.0, role: str = "matrix"
	) -> None:
		super().__init__(fan_in, fan_out, bias=False)
		self.ROLES = {"weight": role}
		if gain is not None:
			nn.init.orthogonal_(self.weight, gain) if gain else nn.init.zeros_(self.weight)

	def forward(self, x: Tensor) -> Tensor:
		"""x [..., in] to [..., out]."""
		weight = self.weight
		if self.rounds and self.training:  # forward as stored in 6 bits, backward as it is
			scale = weight.detach().abs().amax(1, keepdim=True).clamp_min(1e-9) / 31
			weight = weight + ((weight / scale).round() * scale - weight).detach()
		return F.linear(x, weight.to(x.dtype))


class Embedding(nn.Embedding):
	"""A table [count, width], normal."""

	ROLES = {"weight": "embed"}

	def __init__(self, count: int, width: int, std: float) -> None:
		super().__init__(count, width, _weight=torch.empty(count, width).normal_(std=std))


def rotary_angles(h: Hyperparameters, length: int, device: torch.device) -> tuple[Tensor, Tensor]:
	"""cos and sin [T, 1, n/2] of the n rotated dims; NTK as in the records."""
	dims, base = h.rope_dims or h.model_dim // h.num_heads, h.rope_base
	if length > h.rope_train_seq_len and dims > 2:
		base *= (length / h.rope_train_seq_len) ** (dims / (dims - 2))
	frequencies = base ** (-torch.arange(0, dims, 2, device=device) / dims)
	angles = torch.outer(torch.arange(length, device=device), frequencies).unsqueeze(1)
	return angles.cos(), angles.sin()


def rotate(x: Tensor, rotation: tuple[Tensor, Tensor]) -> Tensor:
	"""RoPE on the first n dims of x [B, T, heads, d], in pairs (i, i + n/2)."""
	cos, sin = (r.to(x.dtype) for r in rotation)
	half = cos.size(-1)
	a, b, rest = x.split((half, half, x.size(-1) - 2 * half), dim=-1)
	return torch.cat((a * cos + b * sin, b * cos - a * sin, rest), dim=-1)


def subtract_self_value(y: Tensor, v: Tensor) -> Tensor:
	"""XSA (arXiv 2603.09078): y [B, T, H, d] less its part along its position's v [B, T, K, d]."""
	y_grouped = y.view(*v.shape[:3], -1, v.size(-1))
	unit = F.normalize(v.float(), dim=-1).unsqueeze(3)
	along = (y_grouped.float() * unit).sum(-1, keepdim=True)
	return (y_grouped - (along * unit).to(y.dtype)).view_as(y)


class CausalSelfAttention(nn.Module):
	"""Grouped-query attention with partial RoPE and, in late layers, XSA."""

	ROLES = {"q_gain": "scalar"}

	def __init__(self, h: Hyperparameters, layer: int, attend: Attend) -> None:
		super().__init__()
		self.head_dim = h.model_dim // h.num_heads
		self.c_q = Linear(h.model_dim, h.model_dim)
		self.c_k = Linear(h.model_dim, self.head_dim * h.num_kv_heads)
		self.c_v = Linear(h.model_dim, self.head_dim * h.num_kv_heads)
		self.proj = Linear(h.model_dim, h.model_dim, gain=0)
		self.q_gain = nn.Parameter(torch.full((h.num_heads, 1), float(h.qk_gain_init)))
		self.xsa = layer >= h.num_layers - h.xsa_last_n
		self.attend = attend

	def forward(
		self, x: Tensor, rotation: tuple[Tensor, Tensor], extra_value: Tensor | None
	) -> Tensor:
		"""Attend within x [B, T, D]; extra_value [B, T, K d] joins the values."""
		heads = (*x.shape[:2], -1, self.head_dim)
		q = rotate(rms_norm(self.c_q(x).view(heads)), rotation) * self.q_gain.to(x.dtype)
		k = rotate(rms_norm(self.c_k(x).view(heads)), rotation)
		v = (self.c_v(x) if extra_value is None else self.c_v(x) + extra_value).view(heads)
		y = self.attend(q, k, v)
		if self.xsa:
			y = subtract_self_value(y, v)
		return self.proj(y.reshape(x.shape))


class MLP(nn.Module):
	"""Two maps around leaky_relu(., slope)^2."""

	def __init__(self, h: Hyperparameters) -> None:
		super().__init__()
		width = max(int(h.mlp_mult * h.model_dim), 1)
		self.up = Linear(h.model_dim, width)
		self.down = Linear(width, h.model_dim, gain=0)
		self.negative_slope = h.negative_slope

	def forward(self, x: Tensor) -> Tensor:
		"""Shape [..., D] is kept."""
		return self.down(F.leaky_relu(self.up(x), self.negative_slope).square())


class SmearGate(nn.Module):
	"""Each position mixed with the one before."""

	ROLES = {"gate": "scalar"}

	def __init__(self, h: Hyperparameters) -> None:
		super().__init__()
		self.gate = nn.Parameter(torch.zeros(h.model_dim))
		self.bos_mask = h.bos_mask

	def forward(self, x: Tensor, ids: Tensor) -> Tensor:
		"""Smear x [B, T, D]; nothing precedes the first token or, masked, BOS."""
		before = F.pad(x[:, :-1], (0, 0, 1, 0))
		if self.bos_mask:
			before = before.masked_fill((ids == BOS_ID).unsqueeze(-1), 0)
		return torch.lerp(x, before, self.gate.sigmoid().to(x.dtype))


class BigramHash(nn.Module):
	"""A learned vector for each hashed pair."""

	ROLES = {"scale": "scalar"}

	def __init__(self, h: Hyperparameters) -> None:
		super().__init__()
		self.buckets, self.bos_mask = h.bigram_vocab_size, h.bos_mask
		self.embed = Embedding(h.bigram_vocab_size, h.bigram_dim, std=0.0)
		# Not 0 as in PR #832: beside a table of 0 both would stay 0 for ever.
		gain, same = (2 * h.num_layers) ** -0.5, h.bigram_dim == h.model_dim
		self.proj = nn.Identity() if same else Linear(h.bigram_dim, h.model_dim, gain, "scalar")
		self.scale = nn.Parameter(torch.tensor(0.05))

	def hash(self, ids: Tensor) -> Tensor:
		"""Bucket of each of ids [B, T]; the last where none stands before."""
		last, ids = self.buckets - 1, ids.int()
		pairs = (36_313 * ids[:, 1:] ^ 27_191 * ids[:, :-1]) % last
		if self.bos_mask:
			pairs = pairs.masked_fill(ids[:, 1:] == BOS_ID, last)
		return F.pad(pairs, (1, 0), value=last)

	def forward(self, ids: Tensor) -> Tensor:
		"""Vectors [B, T, D] of ids [B, T]."""
		return self.proj(self.embed(self.hash(ids))) * self.scale


class ValueEmbedding(nn.Module):
	"""A second embedding, which some layers add to their values."""

	ROLES = {"scale": "scalar", "layer_scales": "scalar"}

	def __init__(self, h: Hyperparameters) -> None:
		super().__init__()
		kv_dim = h.model_dim // h.num_heads * h.num_kv_heads
		self.embed = Embedding(h.vocab_size, h.ve_dim, std=0.01)
		self.proj = Linear(h.ve_dim, kv_dim, (2 * h.num_layers) ** -0.5, "scalar")
		self.scale = nn.Parameter(torch.tensor(0.1))
		self.layers = value_layers(h)
		self.layer_scales = nn.Parameter(torch.ones(len(self.layers)))

	def forward(self, ids: Tensor, dtype: torch.dtype) -> dict[int, Tensor]:
		"""What each layer adds, [B, T, K d]."""
		value = self.proj(self.embed(ids)) * self.scale
		return {n: (value * self.layer_scales[i]).to(dtype) for i, n in enumerate(self.layers)}


class Block(nn.Module):
	"""Mix in the embedding, then attention and MLP."""

	ROLES = {"attn_scale": "scalar", "mlp_scale": "scalar", "resid_mix": "scalar"}

	def __init__(self, h: Hyperparameters, layer: int, attend: Attend) -> None:
		super().__init__()
		self.attn = CausalSelfAttention(h, layer, attend)
		self.mlp = MLP(h)
		self.attn_scale = nn.Parameter(torch.ones(h.model_dim))
		self.mlp_scale = nn.Parameter(torch.ones(h.model_dim))
		self.resid_mix = nn.Parameter(torch.tensor([[1.0], [0.0]]).repeat(1, h.model_dim))
		self.norm_scale = (layer + 1) ** -0.5 if h.ln_scale else 1.0

	def forward(
		self, x: Tensor, x0: Tensor, rotation: tuple[Tensor, Tensor], extra_value: Tensor | None
	) -> Tensor:
		"""The stream x [B, T, D] after this layer; x0: before the first."""
		keep, restart = self.resid_mix.to(x.dtype)
		x = keep * x + restart * x0
		attended = self.attn(rms_norm(x) * self.norm_scale, rotation, extra_value)
		x = x + self.attn_scale.to(x.dtype) * attended
		return x + self.mlp_scale.to(x.dtype) * self.mlp(rms_norm(x) * self.norm_scale)


def sigreg(z: Tensor, directions: Tensor, knots: int, form: str, parts: int = 1) -> Tensor:
	"""How far rows of z [N / parts, n] are from samples of N(0, I): a float32 scalar.

	Along each direction, a unit column of [n, P], their characteristic function is held against
	exp(-t^2/2) at `knots` points t (Epps-Pulley). "lejepa": N times the integral under that
	Gaussian (arXiv 2511.08544). "published" (PR #832): a mean, blind to the rows' mean and scale.
	"""
	published, z = form == "published", z.float()
	if published:
		z = (z - z.mean(0)) / z.var(0).clamp_min(1e-12).sqrt()
	t = torch.linspace(0.2 if published else 0.0, 3.0, knots, device=z.device)
	angles, normal = (z @ directions).unsqueeze(-1) * t, torch.exp(-t.square() / 2)
	error = (angles.cos().mean(0) - normal).square() + angles.sin().mean(0).square()
	if published:
		return error.mean()
	# Twice: t < 0 gives as much. N is the whole step's: its parts change no weight.
	return 2 * parts * len(z) * torch.trapezoid(error * normal, t).mean()


class JEPA(nn.Module):
	"""Predicts the latent of each chunk of positions from the chunk before it (PR #832).

	A latent is the projected mean of a chunk; predictions enter the stream. Squared error and
	SIGReg teach projector and predictor, cross-entropy the injection.
	"""

	ROLES = {"start": "aux"}

	def __init__(self, h: Hyperparameters) -> None:
		super().__init__()
		self.h, self.chunk = h, h.jepa_chunk_size

		def two_maps(fan_in: int, hidden: int) -> nn.Sequential:
			into, out = Linear(fan_in, hidden, None, "aux"), Linear(hidden, latent, None, "aux")
			return nn.Sequential(into, nn.RMSNorm(hidden, 1.2e-7, False), nn.SiLU(), out)

		latent = h.jepa_latent_dim
		self.projector = two_maps(h.model_dim, h.jepa_proj_hidden)
		self.predictor = two_maps(latent, latent)
		self.start = nn.Parameter(torch.empty(1, latent).normal_(std=0.02))
		self.inject = Linear(latent, h.model_dim, 0, "aux") if h.jepa_inject else None
		# Tensors: new values compile nothing anew.
		self.register_buffer("weights", torch.zeros(2), persistent=False)
		directions = torch.zeros(latent, h.jepa_sigreg_projs)
		self.register_buffer("directions", directions, persistent=False)
		self.learns = False

	@torch.no_grad()
	def prepare(self, weight: float, step: int) -> None:
		"""Set lambda for a step; LeJEPA draws new directions for each."""
		self.learns = weight > 0
		self.weights[0], self.weights[1] = weight, weight * self.h.jepa_sigreg_weight
		if self.learns:
			seed = self.h.seed + step * (self.h.jepa_sigreg == "lejepa")
			generator = torch.Generator(self.directions.device).manual_seed(seed)
			F.normalize(self.directions.normal_(generator=generator), dim=0, out=self.directions)

	def predict(self, latents: Tensor) -> Tensor:
		"""Latents [B, C, n] from those before, the first from a learned one."""
		before = self.start.to(latents.dtype).expand(len(latents), 1, -1)
		return self.predictor(torch.cat((before, latents), dim=1)[:, : latents.size(1)])

	def forward(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
		"""The stream x [B, T, D] with predictions; losses [2] while it learns."""
		learns = self.training and self.learns
		if not (learns or self.inject):
			return x, None
		chunks, source = x.size(1) // self.chunk, x if self.h.jepa_backbone_grad else x.detach()
		source = source[:, : chunks * self.chunk].unflatten(1, (chunks, self.chunk))
		latents = self.projector(source.mean(2))
		predicted = self.predict(latents)
		if self.inject:
			added = self.inject(predicted.detach()).repeat_interleave(self.chunk, dim=1)
			x = x + F.pad(added, (0, 0, 0, x.size(1) - added.size(1)))
		if not learns:
			return x, None
		error, h = F.mse_loss(predicted.float(), latents.detach().float()), self.h
		form = self.directions, h.jepa_sigreg_knots, h.jepa_sigreg, micro_batches(h)
		return x, torch.stack((error, sigreg(latents.flatten(0, 1), *form)))


def bend(x: Tensor) -> Tensor:
	"""1 - cos of two steps along states [B, T, D] at random s < r < t (arXiv 2602.22617)."""
	at = torch.rand(x.shape[:2], device=x.device).topk(3).indices.sort().values
	s, r, t = x.float().gather(1, at.unsqueeze(-1).expand(-1, -1, x.size(-1))).unbind(1)
	return 1 - F.cosine_similarity(t - r, r - s, eps=1e-6).mean()


class GPT(nn.Module):
	"""The model of `h`, a class or an instance: float32, activations in `dtype`."""

	ROLES = {"skip_weights": "scalar"}

	def __init__(
		self, h: Hyperparameters, attend: Attend = attend_sdpa, dtype: torch.dtype = torch.float32
	) -> None:
		super().__init__()
		self.h, self.dtype = h, dtype
		self.tok_emb = Embedding(h.vocab_size, h.model_dim, h.tied_embed_init_std)
		self.bigram = BigramHash(h) if h.bigram_vocab_size else None
		self.smear = SmearGate(h) if h.smear_gate else None
		self.value_embedding = ValueEmbedding(h) if h.ve_enabled else None
		self.blocks = nn.ModuleList(Block(h, layer, attend) for layer in range(h.num_layers))
		skips = h.num_layers // 2 if h.unet_skips else 0
		self.skip_weights = nn.Parameter(torch.ones(skips, h.model_dim))
		self.lm_head = None if h.tie_embeddings else Linear(h.model_dim, h.vocab_size, 0, "head")
		self.jepa = JEPA(h) if h.jepa_chunk_size else None

	def prepare(self, weight: float, rounds: bool, step: int) -> None:
		"""Set lambda of JEPA, and late QAT."""
		if self.jepa:
			self.jepa.prepare(weight, step)
		for module in self.modules():
			if isinstance(module, Linear) and module.ROLES["weight"] == "matrix":
				module.rounds = rounds

	def hidden(self, ids: Tensor) -> tuple[Tensor, Tensor | None]:
		"""Normed last states [B, T, D] of ids [B, T]; auxiliary losses, if any."""
		x = self.tok_emb(ids)
		if self.bigram:
			x = x + self.bigram(ids)
		x = rms_norm(x.to(self.dtype))
		if self.smear:
			x = self.smear(x, ids)
		x0, rotation = x, rotary_angles(self.h, ids.size(1), ids.device)
		values = self.value_embedding(ids, self.dtype) if self.value_embedding else {}
		# U-Net: outputs of the first half enter the second, last one first.
		half, outputs = len(self.blocks) // 2, []
		for layer, block in enumerate(self.blocks):
			if half <= layer < half + len(self.skip_weights):
				x = x + self.skip_weights[layer - half].to(x.dtype) * outputs.pop()
			x = block(x, x0, rotation, values.get(layer))
			if layer < half:
				outputs.append(x)
		x, auxiliary = self.jepa(x) if self.jepa else (x, None)
		return rms_norm(x), auxiliary

	def logits(self, x: Tensor) -> Tensor:
		"""Soft-capped float32 [..., V] of [..., D]."""
		head = (self.lm_head or self.tok_emb).weight
		logits, cap = F.linear(x, head.to(x.dtype)).float(), self.h.logit_softcap
		return logits.div_(cap).tanh_() * cap  # in place: V is large

	def forward_logits(self, ids: Tensor, last: int = 0) -> Tensor:
		"""Logits [B, T, V] of ids [B, T] or of their `last` positions."""
		return self.logits(self.hidden(ids)[0][:, -last:])

	def losses(self, ids: Tensor, targets: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
		"""The loss to descend and its terms, cross-entropy first, in nats."""
		smoothing = self.training * self.h.label_smoothing
		x, auxiliary = self.hidden(ids)
		logits = self.logits(x).flatten(0, 1)
		loss = F.cross_entropy(logits, targets.flatten(), label_smoothing=smoothing)
		terms = {"train_loss": loss}
		if auxiliary is not None:
			loss = loss + auxiliary @ self.jepa.weights
			terms["jepa_error"], terms["jepa_sigreg"] = auxiliary
		if self.training and self.h.stp_enabled:
			terms["stp"] = bend(x)
			loss = loss + self.h.stp_lambda * terms["stp"]
		return loss, terms

	def forward(self, ids: Tensor, targets: Tensor) -> Tensor:
		"""The loss, a scalar."""
		return self.losses(ids, targets)[0]


def parameter_roles(model: nn.Module) -> dict[str, str]:
	"""Role by parameter name; TypeError for one without."""
	roles = {}
	for prefix, module in model.named_modules():
		for name, _ in module.named_parameters(prefix, recurse=False):
			roles[name] = getattr(module, "ROLES", {}).get(name.rpartition(".")[2])
			if roles[name] is None:
				raise TypeError(f"{type(module).__name__}.ROLES lacks {name}")
	return roles


# ---- Evaluate: how it is judged ----


class DivergenceError(RuntimeError):
	"""A loss or a weight is no finite number."""


class Score(NamedTuple):
	"""What scoring gives; bpb is bits per byte."""

	val_loss: float  # nats a token
	val_bpb: float
	nats: float
	tokens: int
	bytes: int  # of text
	seconds: float
	window_seconds: float  # for each, once all is compiled


def plan_windows(total: int, seq_len: int, stride: int, size: int, chunk: int) -> list[Tensor]:
	"""Batches int64 [n, 2], n at most size, of windows (start, how many last positions it scores).

	Each has seq_len positions, ends stride after the one before it, or at the end, and scores what
	that one did not. Those of a batch begin to score in the same chunk. The first sliding one
	scores all positions, so it comes alone; empty ones fill batches: few shapes to compile.
	"""
	ends = torch.cat((torch.arange(seq_len, total, stride), torch.tensor([total])))
	counts = ends.diff(prepend=torch.tensor([0]))
	windows, size = torch.stack((ends - seq_len, counts), dim=1), min(size, len(ends))
	cuts = 1 + ((ends - counts) // chunk).diff().nonzero().flatten()
	if stride < seq_len:
		cuts = torch.cat((torch.tensor([1]), cuts)).unique()
	batches = [batch for part in windows.tensor_split(cuts) for batch in part.split(size)]
	return [F.pad(batch, (0, 0, 0, size - len(batch))) for batch in batches if len(batch)]


@torch.inference_mode()
def evaluate(
	forward_logits: Callable[..., Tensor],
	data: Data,
	h: Hyperparameters,
	rt: Runtime,
	log: Log,
	seq_len: int = 0,
	stride: int = 0,
	learn: Callable[..., None] | None = None,
) -> Score:
	"""Score the validation split: the only loop from logits to a score.

	forward_logits(ids [B, T], last) gives logits [B, last, V]; without a stride windows lie side by
	side. After each chunk but the last, learn gets its tokens [TTT_CHUNK_TOKENS + 1], all scored,
	and how far scoring is, 0 to 1.
	"""
	began, total = rt.now(), len(data.val) - 1
	seq_len = min(seq_len or h.eval_seq_len or h.train_seq_len, total)
	stride = stride or seq_len
	most = 4096 if rt.device.type == "cpu" else math.inf  # more spills a CPU's caches
	size = max(min(h.val_batch_size // 8, most) // seq_len, 1)
	chunk, learned = max(h.ttt_chunk_tokens, seq_len) if learn else total, 0
	batches = plan_windows(total, seq_len, stride, size, chunk)
	tokens, table = data.val.to(rt.device), ByteTable(*(t.to(rt.device) for t in data.table))
	offsets = torch.arange(seq_len + 1, device=rt.device)
	sums = torch.zeros(3, dtype=torch.float64, device=rt.device)
	for n, batch in enumerate(batches):
		start, count = batch[0].tolist()
		if (at := (start + seq_len - count) // chunk) > learned:
			learn(tokens[learned * chunk : at * chunk + 1], learned * chunk / total)
			learned = at
		last = stride if n else seq_len
		starts, counts = batch.to(rt.device).unsqueeze(-1).unbind(1)
		ids = tokens[starts + offsets].long()
		inputs, targets = ids[:, :-1], ids[:, -last:]
		logits = forward_logits(inputs, last).flatten(0, 1)
		nats = F.cross_entropy(logits, targets.flatten(), reduction="none")
		nbytes = table.count(inputs[:, -last:], targets)
		scored = offsets[:last] >= last - counts
		for i, values in enumerate((nats.view_as(nbytes), scored, nbytes)):
			sums[i] += values.double().where(scored, 0).sum()
		log.progress(f"scoring batch {n + 1} of {len(batches)}")
		if n == 0:
			compiled_at = rt.now()
	nats, count, nbytes = sums.tolist()
	if count != total:
		raise RuntimeError(f"scored {count:.0f} tokens of {total}")
	if not math.isfinite(nats):
		raise DivergenceError("the score is no finite number: the weights have diverged")
	bpb, ended = nats / math.log(2) / nbytes, rt.now()
	window_seconds = (ended - compiled_at) / max(len(batches) - 1, 1) / len(batch)
	return Score(nats / total, bpb, nats, total, int(nbytes), ended - began, window_seconds)


def test_time_learner(model: GPT, h: Hyperparameters, rt: Runtime) -> Callable[..., None]:
	"""What learns from a scored chunk: SGD, its rate falling as half a cosine (PR #549)."""
	frozen = {*model.blocks[: h.ttt_freeze_blocks].parameters()}
	params = [p for p in model.parameters() if p not in frozen]
	sgd, loss_of = torch.optim.SGD(params, h.ttt_lr, h.ttt_momentum), rt.compile(model)
	seq_len = h.eval_seq_len or h.train_seq_len

	@torch.inference_mode(False)
	def learn(tokens: Tensor, done: float) -> None:
		sgd.param_groups[0]["lr"] = h.ttt_lr * (1 + math.cos(math.pi * done)) / 2
		rows = (len(tokens) - 1) // seq_len
		inputs, targets = (tokens[i:][: rows * seq_len].long().view(rows, -1) for i in (0, 1))
		for x, y in h.ttt_epochs * list(zip(inputs.split(32), targets.split(32), strict=True)):
			loss_of(x, y).backward()
			nn.utils.clip_grad_norm_(params, 1.0)
			sgd.step()
			model.zero_grad()

	return learn


# ---- Optimizers: how it learns ----


class Policy(NamedTuple):
	"""How the parameters of a role are learned and stored."""

	optimizer: str
	lr: str  # a setting, as decay
	decay: str | None
	bits: int  # 6, 8: codes with a scale a row; 16: float16


ROLE_POLICY = {
	"matrix": Policy("muon", "matrix_lr", "muon_wd", 6),
	"embed": Policy("adamw", "tied_embed_lr", "adam_wd", 8),  # or embed_lr
	"head": Policy("adamw", "head_lr", None, 8),
	"scalar": Policy("adamw", "scalar_lr", "adam_wd", 16),
	"aux": Policy("adamw", "jepa_lr", None, 8),
}


def newton_schulz(matrices: Tensor, steps: int, dtype: torch.dtype = torch.float32) -> Tensor:
	"""About U V^T of each U S V^T of a stack [n, rows, cols] (Jordan et al. 2024, Muon)."""
	a, b, c = 3.4445, -4.7750, 2.0315
	x = matrices.to(dtype)
	x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
	tall = x.size(-2) > x.size(-1)
	x = x.mT if tall else x
	for _ in range(steps):
		gram = x @ x.mT
		x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
	return x.mT if tall else x


class Muon:
	"""Nesterov momentum, orthogonalised in one stack a shape."""

	def __init__(
		self,
		matrices: list[Tensor],
		weight_decay: float,
		ns_steps: int,
		dtype: torch.dtype = torch.float32,
	) -> None:
		shapes = sorted({p.shape for p in matrices})
		self.stacks = [[p for p in matrices if p.shape == shape] for shape in shapes]
		self.momenta = [torch.zeros_like(torch.stack(stack)) for stack in self.stacks]
		self.weight_decay, self.ns_steps, self.dtype = weight_decay, ns_steps, dtype

	@torch.no_grad()
	def step(self, lr: float, momentum: float) -> None:
		"""Decay the weights, then move them, tall ones further."""
		for stack, buffer in zip(self.stacks, self.momenta, strict=True):
			gradient = torch.stack([p.grad for p in stack])
			buffer.mul_(momentum).add_(gradient)
			gradient.add_(buffer, alpha=momentum)
			update = newton_schulz(gradient, self.ns_steps, self.dtype)
			rows, cols = stack[0].shape
			torch._foreach_mul_(stack, 1 - lr * self.weight_decay)
			update = update.to(buffer.dtype).mul_(-lr * max(1, rows / cols) ** 0.5)
			torch._foreach_add_(stack, update.unbind())


class Optimizers:
	"""Muon for the matrices and AdamW for the rest, on one schedule."""

	def __init__(self, model: GPT, h: Hyperparameters) -> None:
		self.h, self.params = h, list(model.parameters())
		roles, groups = parameter_roles(model), []
		for role, policy in ROLE_POLICY.items():
			params = [p for name, p in model.named_parameters() if roles[name] == role]
			untied = role == "embed" and not h.tie_embeddings
			lr = h.embed_lr if untied else getattr(h, policy.lr)
			decay = getattr(h, policy.decay) if policy.decay else 0.0
			if policy.optimizer == "muon":
				self.muon = Muon(params, decay, h.muon_backend_steps, model.dtype)
				self.muon_lr = lr
			elif params:
				groups.append({"params": params, "lr": lr, "base_lr": lr, "weight_decay": decay})
		self.adamw = torch.optim.AdamW(groups, betas=(h.beta1, h.beta2), eps=h.adam_eps, fused=True)

	def step(self, step: int, scale: float) -> None:
		"""Clip, step at `scale` times the rates, drop the gradients."""
		if self.h.grad_clip_norm:
			nn.utils.clip_grad_norm_(self.params, self.h.grad_clip_norm)
		self.muon.step(self.muon_lr * scale, muon_momentum(step, self.h))
		for group in self.adamw.param_groups:
			group["lr"] = group["base_lr"] * scale
		self.adamw.step()
		for p in self.params:
			p.grad = None


def muon_momentum(step: int, h: Hyperparameters) -> float:
	"""Linear from start to warm."""
	steps = h.muon_momentum_warmup_steps
	warm = step / steps if step < steps else 1.0
	return h.muon_momentum_warmup_start + warm * (h.muon_momentum - h.muon_momentum_warmup_start)


def lr_scale(step: int, elapsed: float, h: Hyperparameters) -> float:
	"""Factor of the rates: 1, then down to 0 where seconds or ITERATIONS end the run.

	The records' rule knows the seconds alone: it can stop high, or fall from the first step.
	"""
	published, cap = h.warmdown_published, h.max_wallclock_seconds
	left = math.inf if published and cap else h.iterations - step
	if cap and elapsed:
		left = min(left, max(cap - elapsed, 0.0) * max(step, 1) / elapsed)
	longest = math.inf if published else h.warmdown_max_fraction * (step + left)
	warmdown = min(h.warmdown_iters, longest)
	return min(left / warmdown, 1.0) if warmdown else 1.0


def jepa_weight(step: int, elapsed: float, h: Hyperparameters) -> float:
	"""Lambda at a step, `elapsed` training seconds in: 0, a rise to its peak, 0."""
	cap, done = h.max_wallclock_seconds, step / h.iterations
	if h.jepa_phase_progress and cap:
		done = max(done, elapsed / cap)
	risen = (done - h.jepa_phase1_frac) / h.jepa_phase2_frac
	return h.jepa_lambda_max * risen if 0 <= risen < 1 else 0.0


class WeightAverage:
	"""Of the weights, in float32: EMA or, for SWA, the mean of late ones."""

	def __init__(self, model: nn.Module, h: Hyperparameters) -> None:
		self.h, self.count = h, 0  # count of weights averaged
		self.params = [p.detach() for p in model.parameters()]
		self.mean = [p.clone() for p in self.params]

	def update(self, step: int, scale: float) -> None:
		"""Take in the weights after `step` steps, at rate factor `scale`."""
		if not (self.h.swa_enabled or self.h.ema_enabled):
			return
		# A constant 0.997 would leave 41 % of the start after 300 steps.
		weight = 1 - min(self.h.ema_decay, (1 + self.count) / (10 + self.count))
		if self.h.swa_enabled:
			if scale >= 0.2 or step % self.h.swa_every:  # as the records' SWA
				return
			weight = 1 / (self.count + 1)
		torch._foreach_lerp_(self.mean, self.params, weight)
		self.count += 1

	def weights(self) -> list[Tensor]:
		"""The average, or the last weights if there is none."""
		return self.mean if self.count else self.params

	def apply(self, log: Log) -> str:
		"""Give the model the average; ema, swa, or raw for none."""
		if not self.count:
			log.line("average:none; the last weights are used")
			return "raw"
		torch._foreach_copy_(self.params, self.mean)
		swa = f"swa:applying averaged {self.count} checkpoints"
		log.line(swa if self.h.swa_enabled else "ema:applying EMA weights")
		return "swa" if self.h.swa_enabled else "ema"


# ---- Training: the clock, the step, the loop ----


class TrainingClock:
	"""Seconds of training, which stand still outside it.

	On CUDA a step's end and loss are read, from an event and pinned memory, when the next is
	launched: nothing waits within a step.
	"""

	def __init__(self, rt: Runtime, cap: float) -> None:
		self.rt, self.cap = rt, cap
		self.elapsed = 0.0
		self.terms, self.times = [], []  # of finished steps: of the loss; `elapsed`
		self.recent, self.running = deque(maxlen=20), deque()  # seconds; steps
		self.resume()

	def resume(self) -> None:
		"""Let the seconds run."""
		self.mark = self.rt.now()

	def pause(self) -> None:
		"""Finish every step and stop the seconds."""
		while self.running:
			self.finish_step()
		self.elapsed += self.rt.now() - self.mark

	def step_launched(self, terms: dict[str, Tensor]) -> None:
		"""Note a step by the terms of its loss."""
		cuda, values = self.rt.device.type == "cuda", torch.stack([*terms.values()])
		values = values.to("cpu", non_blocking=True)  # from a GPU, into pinned memory
		event = torch.cuda.current_stream().record_event() if cuda else None
		self.running.append((event, terms.keys(), values))
		while len(self.running) > cuda:
			self.finish_step()

	def finish_step(self) -> None:
		"""Wait for the oldest step; DivergenceError for its loss."""
		event, names, values = self.running.popleft()
		if event:
			event.synchronize()
		began, self.mark = self.mark, time.perf_counter()
		self.recent.append(self.mark - began)
		self.elapsed += self.recent[-1]
		self.times.append(self.elapsed)
		self.terms.append(dict(zip(names, values.tolist(), strict=True)))
		if not math.isfinite(loss := sum(self.terms[-1].values())):
			remedy = "lower MATRIX_LR, SCALAR_LR and TIED_EMBED_LR"
			raise DivergenceError(f"step {len(self.terms)}: the loss is {loss}; {remedy}")

	def spent(self) -> bool:
		"""Whether running steps and one more, as slow as the slowest, pass the cap."""
		ahead = (len(self.running) + 1) * max(self.recent, default=0.0)
		return self.cap > 0 and self.elapsed + ahead >= self.cap


def train_step(
	losses_of: Callable[..., Any],
	optimizers: Optimizers,
	batch: tuple[Tensor, Tensor],
	step: int,
	scale: float,
	rt: Runtime,
) -> dict[str, Tensor]:
	"""A step on inputs and targets [sequences, T]; mean terms of its loss."""
	parts = micro_batches(optimizers.h)
	if rt.device.type == "cuda":
		batch = batch[0].pin_memory(), batch[1].pin_memory()
	inputs, targets = (ids.to(rt.device, non_blocking=True).chunk(parts) for ids in batch)
	of_parts = []
	for x, y in zip(inputs, targets, strict=True):
		loss, terms = losses_of(x, y)
		(loss / parts).backward()
		of_parts.append({name: term.detach() / parts for name, term in terms.items()})
	optimizers.step(step, scale)
	return {name: sum(terms[name] for terms in of_parts) for name in of_parts[0]}


def warm_up(
	model: GPT, losses_of: Callable[..., Any], h: Hyperparameters, rt: Runtime, log: Log
) -> None:
	"""Compile what a step needs, on random tokens; leave no trace."""
	if rt.device.type == "cpu" and not rt.compiled:
		log.line("warmup:skipped on an eager CPU")
		return
	weights = [p.detach().clone() for p in model.parameters()]
	optimizers, generator = Optimizers(model, h), torch.Generator().manual_seed(h.seed)
	shape = (2, h.train_batch_tokens // h.train_seq_len, h.train_seq_len)
	for step in range(h.warmup_steps):
		# With JEPA's losses or not, rounding or not: programs of their own.
		rounds = h.late_qat_threshold * (step // 2 % 2) > 0
		model.prepare(h.jepa_lambda_max * (step % 2), rounds, step)
		x, y = torch.randint(h.vocab_size, shape, generator=generator)
		train_step(losses_of, optimizers, (x, y), step, 1.0, rt)
		log.line(f"warmup_step:{step + 1}/{h.warmup_steps}")
	torch._foreach_copy_([p.detach() for p in model.parameters()], weights)


def train(
	model: GPT, data: Data, h: Hyperparameters, rt: Runtime, log: Log
) -> tuple[TrainingClock, WeightAverage]:
	"""Train until ITERATIONS or the cap; the average is not applied yet."""
	if rt.device.type == "cuda":
		torch.set_float32_matmul_precision("high")  # TF32, but not for GPTQ and scores
	losses_of = rt.compile(model.losses)
	model.train()
	warm_up(model, losses_of, h, rt, log)
	optimizers, average = Optimizers(model, h), WeightAverage(model, h)
	clock = TrainingClock(rt, h.max_wallclock_seconds)
	step = logged = 0
	while True:
		done = step >= h.iterations or clock.spent()
		validates = h.val_loss_every and step % h.val_loss_every == 0
		if done or validates:
			clock.pause()
		for n in range(logged, len(clock.terms)):
			if n < 10 or (h.train_log_every and (n + 1) % h.train_log_every == 0):
				log_step(log, h, n + 1, clock.times[n], **clock.terms[n])
		if logged := len(clock.terms):
			left = (clock.cap or math.inf) - clock.elapsed
			left = min(left, (h.iterations - step) * clock.elapsed / logged)
			loss = clock.terms[-1]["train_loss"]
			log.progress(f"step {step}  loss {loss:.4f}  {left:.0f} s left")
		if done:
			break
		if validates:
			validate(model, data, h, log, clock)
			clock.resume()
		scale = lr_scale(step, clock.elapsed, h)
		model.prepare(jepa_weight(step, clock.elapsed, h), scale < h.late_qat_threshold, step)
		batch = data.train.batch(step, h)
		clock.step_launched(train_step(losses_of, optimizers, batch, step, scale, rt))
		step += 1
		average.update(step, scale)
	if model.jepa:
		log.line(f"jepa:learned in {sum('jepa_error' in t for t in clock.terms)} of {step} steps")
	if step < h.iterations:
		at = f"train_time:{1000 * clock.elapsed:.0f}ms step:{step}/{h.iterations}"
		log.line(f"stopping_early: wallclock_cap {at}")
	return clock, average


def validate(model: GPT, data: Data, h: Hyperparameters, log: Log, clock: TrainingClock) -> None:
	"""Log the plain score of the weights as they are."""
	model.eval()
	forward_logits = clock.rt.compile(model.forward_logits)
	score = evaluate(forward_logits, data, h, clock.rt, log, seq_len=h.train_seq_len)
	model.train()
	of = {"val_loss": score.val_loss, "val_bpb": score.val_bpb}
	log_step(log, h, len(clock.terms), clock.elapsed, **of)


def log_step(log: Log, h: Hyperparameters, step: int, seconds: float, **of: float) -> None:
	"""Log values of a step that ended after `seconds`."""
	values = " ".join(f"{name}:{value:.4f}" for name, value in of.items())
	times = f"train_time:{1000 * seconds:.0f}ms step_avg:{1000 * seconds / max(step, 1):.2f}ms"
	log.line(f"step:{step}/{h.iterations} {values} {times}")
	log.event("step", step=step, seconds=seconds, **of)


# ---- Quantize and pack: how it is shrunk ----

GPTQ_BLOCK = 128  # columns
CLIPS = (1.0, 0.95, 0.9, 0.85, 0.8, 0.75, 0.7, 0.6, 0.5)  # of a row's largest weight


def best_clips(
	weight: Tensor, bits: int, widen: float, assign: Callable[..., Any]
) -> tuple[Tensor, Tensor]:
	"""Codes int8 [n, rows, cols] and scales float16 [n, rows].

	assign(scale, limit) gives codes and errors; a row takes the clip of least error. Scales have no
	floor but float16's: the records' 1/31 spoils rows of small weights.
	"""
	limit, best = 2 ** (bits - 1) - 1, None
	peak = weight.abs().amax(-1, keepdim=True)
	for clip in CLIPS:
		scale = (peak * clip / limit).clamp(2.0**-24, 65_504).half().float()
		codes, error = assign(scale, limit)
		found, better = (error, codes, scale), error < (best[0] if best else math.inf)
		best = [torch.where(better, f, b) for f, b in zip(found, best or found, strict=True)]
	_, codes, scale = best
	if widen > 1:  # only now: a smaller clip would undo it
		scale = (scale * widen).clamp(max=65_504).half().float()
		codes, _ = assign(scale, limit)
	return codes.to(torch.int8), scale.squeeze(-1).half()


def round_rows(weight: Tensor, hessian: None, bits: int, widen: float) -> tuple[Tensor, ...]:
	"""Codes and scales of matrices [n, rows, cols], rounded; and True [n]."""

	def assign(scale: Tensor, limit: int) -> tuple[Tensor, Tensor]:
		codes = (weight / scale).round().clamp(-limit, limit)
		return codes, (codes * scale - weight).square().sum(-1, keepdim=True)

	return *best_clips(weight, bits, widen, assign), torch.ones(len(weight), dtype=torch.bool)


def gptq(weight: Tensor, hessian: Tensor, bits: int, widen: float) -> tuple[Tensor, ...]:
	"""Full GPTQ (arXiv 2210.17323) for inputs X with X^T X = hessian [n, cols, cols].

	Columns by falling diagonal, each one's error spread over those after it; a row's clip has the
	least error weighted by the Hessian. Third: matrices only rounded, whose Hessian no damping
	makes positive definite.
	"""
	diagonal, cols = hessian.diagonal(dim1=1, dim2=2), weight.size(2)
	order = diagonal.argsort(dim=1, descending=True)
	across, down = order.unsqueeze(1), order.unsqueeze(2)
	hessian = hessian.gather(1, down.expand_as(hessian)).gather(2, across.expand_as(hessian))
	eye, damping = torch.eye(cols, device=weight.device), 0.01 * diagonal.mean(1)
	for _ in range(4):
		lower, failed = torch.linalg.cholesky_ex(hessian + damping[:, None, None] * eye)
		lower[failed > 0] = eye  # cholesky_inverse raises at zeros
		upper, also = torch.linalg.cholesky_ex(torch.cholesky_inverse(lower), upper=True)
		failed = (failed + also > 0) | ~upper.isfinite().all((1, 2))
		damping = torch.where(failed, 10 * damping, damping)
		if not failed.any():
			break
	upper[failed] = eye
	dead = (diagonal == 0) & ~failed.unsqueeze(1)  # inputs that are always 0
	weight = weight.masked_fill(dead.unsqueeze(1), 0).gather(2, across.expand_as(weight))
	columns = weight.mT.contiguous()

	def assign(scale: Tensor, limit: int) -> tuple[Tensor, Tensor]:
		rest, codes, scale, error = columns.clone(), torch.empty_like(columns), scale.mT, 0.0
		for start in range(0, cols, GPTQ_BLOCK):
			stop = min(start + GPTQ_BLOCK, cols)
			errors = torch.empty_like(rest[:, start:stop])
			for i in range(start, stop):
				one, before = slice(i, i + 1), slice(start, i)
				column = rest[:, one] - upper[:, before, one].mT @ errors[:, : i - start]
				codes[:, one] = (column / scale).round().clamp(-limit, limit)
				errors[:, i - start] = ((column - codes[:, one] * scale) / upper[:, one, one])[:, 0]
			rest[:, stop:] -= upper[:, start:stop, stop:].mT @ errors
			error = error + errors.square().sum(1)
		return codes.mT, error.unsqueeze(-1)

	codes, scales = best_clips(weight, bits, widen, assign)
	return torch.empty_like(codes).scatter_(2, across.expand_as(codes), codes), scales, failed


QUANTIZERS = {"round": round_rows, "gptq": gptq}


def quantize(
	model: GPT, hessians: Mapping[str, Tensor] | None = None, widen: float = 1.0
) -> tuple[dict[str, Tensor], list[str]]:
	"""The artifact's arrays in order, and the names that GPTQ could only round.

	All codes come first: like beside like compresses best. GPTQ takes what has a Hessian; `widen`
	coarsens 6-bit scales. Of a meta model the arrays have type and shape alone.
	"""
	roles, weights, hessians = parameter_roles(model), model.state_dict(), hessians or {}
	codes, scales, floats, stacks, rounded = {}, {}, {}, {}, []
	for name, p in weights.items():
		if not (p.is_meta or p.isfinite().all()):
			raise DivergenceError(f"{name} is not finite: the weights have diverged")
		bits = ROLE_POLICY[roles[name]].bits
		if bits == 16:
			floats[name] = p.half()
		else:
			codes[f"{name}.codes"] = scales[f"{name}.scales"] = p  # their places
			stacks.setdefault((p.shape, bits, name in hessians), []).append(name)
	for (_, bits, known), names in stacks.items():
		weight = torch.stack([weights[name] for name in names]).float()
		hessian = torch.stack([hessians[name] for name in names]) if known else None
		quantizer = QUANTIZERS["gptq" if known else "round"]
		found = quantizer(weight, hessian, bits, widen if bits == 6 else 1.0)
		for name, c, s, only_rounded in zip(names, *found, strict=True):
			codes[f"{name}.codes"], scales[f"{name}.scales"] = c, s
			if known and only_rounded:
				rounded.append(name)
	return codes | scales | floats, rounded


@torch.inference_mode()
def collect_hessians(model: GPT, batches: Iterable[Tensor], log: Log) -> dict[str, Tensor]:
	"""X^T X, float32 [in, in], by weight, of all inputs of each matrix and the head."""
	roles, hooks, sums = parameter_roles(model), [], {}

	def add(name: str, _: Any, inputs: Any) -> None:
		x = inputs[0].flatten(0, -2).float()
		sums[name] = torch.addmm(sums[name], x.mT, x) if name in sums else x.mT @ x

	for name, module in model.named_modules():
		if roles.get(weight := f"{name}.weight") == "matrix":
			hooks.append(module.register_forward_pre_hook(functools.partial(add, weight)))
	log.progress("calibrating")
	for ids in batches:
		x, _ = model.hidden(ids.to(model.skip_weights.device))
		add("lm_head.weight" if model.lm_head else "tok_emb.weight", model, (x,))
	for hook in hooks:
		hook.remove()
	return sums


def calibration(train: TokenStream | None, h: Hyperparameters, step: int) -> Iterable[Tensor]:
	"""Ids int64 [B, TRAIN_SEQ_LEN]; training text as step `step` would read it."""
	generator, length = torch.Generator().manual_seed(h.seed), h.train_seq_len
	most, position = max(h.micro_batch_tokens // length, 1), step * h.train_batch_tokens
	sequences = max(h.gptq_calib_tokens // length, 1)
	for start in range(0, sequences, most):
		count = min(most, sequences - start)
		if h.gptq_calib == "random":  # text alone: ids 0 to 3 are special
			yield torch.randint(4, h.vocab_size, (count, length), generator=generator)
		else:
			yield train.read(position + start * length, count * length).view(count, length)


# An artifact: this header (magic, version, codec, bytes of settings, SHA-256 of the rest), the
# settings as JSON, which say all shapes, and the arrays compressed.
HEADER = struct.Struct("<8sHHI32s")
MAGIC, VERSION = b"PGOLFGPT", 1
# By number in the header: bytes for a byte of order-0 entropy, as measured.
CODECS = {"zstd": 1.007, "lzma": 1.025}


def expect(true: bool, else_fault: str) -> None:
	"""ValueError unless true."""
	if not true:
		raise ValueError(else_fault)


def compress(codec: str, data: bytes) -> bytes:
	"""Compress as far as the codec goes."""
	if codec == "lzma":
		return lzma.compress(data, preset=9 | lzma.PRESET_EXTREME)
	try:
		import zstandard
	except ImportError:
		raise SettingsError("COMPRESSOR=zstd: pip install zstandard, or use lzma") from None
	return zstandard.ZstdCompressor(level=22).compress(data)


def decompress(codec: str, data: bytes, size: int) -> bytes:
	"""At most one byte more than `size`, whatever the data claim."""
	if codec == "lzma":
		return lzma.LZMADecompressor().decompress(data, max_length=size + 1)
	import zstandard

	return zstandard.ZstdDecompressor().stream_reader(data, read_across_frames=True).read(size + 1)


def model_settings(h: Hyperparameters) -> dict[str, Any]:
	"""The settings that travel in the artifact."""
	return {f.name: getattr(h, f.name) for f in fields(h) if f.metadata["in_artifact"]}


def with_settings(h: Hyperparameters, of_file: dict[str, Any]) -> Hyperparameters:
	"""The settings with those of a file."""
	expect(of_file.keys() == model_settings(h).keys(), "its settings are not this program's")
	# The batch does not travel; one sequence is always legal.
	return replace(h, **of_file, train_batch_tokens=of_file["train_seq_len"])


def pack(h: Hyperparameters, arrays: Mapping[str, Tensor]) -> bytes:
	"""The artifact's bytes, the same for the same arrays."""
	payload = compress(h.compressor, b"".join(a.cpu().numpy().tobytes() for a in arrays.values()))
	settings = json.dumps(model_settings(h), separators=(",", ":")).encode()
	head = (MAGIC, VERSION, list(CODECS).index(h.compressor), len(settings))
	digest = hashlib.sha256(HEADER.pack(*head, b"") + settings + payload).digest()
	return HEADER.pack(*head, digest) + settings + payload


def load_checkpoint(path: Path, h: Hyperparameters) -> tuple[Hyperparameters, dict[str, Tensor]]:
	"""Settings and float32 weights of a final_model.pt, or DataError."""
	try:
		saved = torch.load(path, map_location="cpu", weights_only=True)
		h = with_settings(h, saved["settings"])
		with torch.device("meta"):
			GPT(h).load_state_dict(saved["weights"], assign=True)  # names and shapes must fit
		return h, saved["weights"]
	except Exception as error:  # whatever a damaged file raises
		raise DataError(f"{path}: cannot be read as a checkpoint: {error!r:.300}") from None


def entropy_bytes(codes: Iterable[Tensor]) -> float:
	"""Order-0 entropy of all codes together, in bytes."""
	counts = sum(torch.bincount(array.flatten().int() + 128, minlength=256) for array in codes)
	return -torch.special.xlogy(counts, counts / counts.sum()).sum().item() / math.log(256)


def unpack(blob: bytes, h: Hyperparameters) -> tuple[Hyperparameters, dict[str, Tensor]]:
	"""Settings and arrays; all is checked before it is allocated."""
	head, body = HEADER.unpack_from(blob), blob[HEADER.size :]
	magic, version, codec, settings_size, digest = head
	expect((magic, version) == (MAGIC, VERSION), f"magic {magic}, version {version}: not ours")
	signed = HEADER.pack(*head[:-1], b"") + body
	expect(hashlib.sha256(signed).digest() == digest, "the checksum does not fit")
	h = with_settings(h, json.loads(body[:settings_size]))
	with torch.device("meta"):
		layout, _ = quantize(GPT(h))
	sizes = [like.nbytes for like in layout.values()]
	raw = decompress(list(CODECS)[codec], body[settings_size:], sum(sizes))
	expect(len(raw) == sum(sizes), f"{len(raw)} bytes of arrays, not {sum(sizes)}")
	parts = torch.frombuffer(bytearray(raw), dtype=torch.uint8).split(sizes)
	arrays = zip(layout.items(), parts, strict=True)
	return h, {n: p.clone().view(like.dtype).view(like.shape) for (n, like), p in arrays}


def dequantize(arrays: Mapping[str, Tensor]) -> dict[str, Tensor]:
	"""Float32 weights by parameter name."""
	weights = {name: array.float() for name, array in arrays.items()}
	for name in [name[:-6] for name in weights if name.endswith(".codes")]:
		weights[name] = weights.pop(f"{name}.codes") * weights.pop(f"{name}.scales")[:, None]
	return weights


def load_artifact(path: Path, h: Hyperparameters) -> tuple[Hyperparameters, dict[str, Tensor]]:
	"""Settings and float32 weights of an artifact, or DataError."""
	try:
		h, arrays = unpack(path.read_bytes(), h)
	except ImportError as error:
		raise DataError(f"{path}: pip install {error.name} to read it") from None
	except Exception as error:  # of a damaged file
		raise DataError(f"{path}: cannot be read as an artifact: {error!r}") from None
	return h, dequantize(arrays)


def shrink(
	model: GPT, hessians: Mapping[str, Tensor], h: Hyperparameters, room: int, log: Log
) -> tuple[bytes, float]:
	"""The artifact and the factor that widened its matrices' scales to fit in `room` bytes.

	Bytes are foretold from the codes' entropy: packing is slow.
	"""
	matrices = {f"{n}.codes" for n, role in parameter_roles(model).items() if role == "matrix"}
	arrays, rounded = quantize(model, hessians)
	for name in rounded:
		log.line(f"gptq: {name} is only rounded: its Hessian is not definite")
	others = len(pack(h, {name: a for name, a in arrays.items() if name not in matrices}))

	def foretell(arrays: Mapping[str, Tensor]) -> int:
		entropy = entropy_bytes([arrays[name] for name in matrices])
		return others + int(CODECS[h.compressor] * entropy)

	def fits(n: int) -> bool:
		log.progress(f"widening the scales by {1.01**n:.2f}")
		return foretell(quantize(model, hessians, 1.01**n)[0]) <= most

	n = 0
	while True:
		blob, expected = pack(h, arrays), foretell(arrays)
		entropy = (expected - others) / CODECS[h.compressor]
		told = f"entropy of matrices {entropy:.0f}, packed {len(blob) - others}"
		log.line(f"size: {expected} bytes foretold, {len(blob)} packed; {told}")
		if len(blob) <= room or n == 400:
			return blob, 1.01**n
		# Coarser codes compress less well: correct the forecast by what was reached.
		most = 0.997 * room * expected / len(blob)
		n = bisect.bisect_left(range(400), True, n + 1, key=fits)
		log.line(f"size: over {room} bytes: the matrices' scales are widened by {1.01**n:.2f}")
		arrays, _ = quantize(model, hessians, 1.01**n)


# ---- Run: how it all goes ----


def run(h: Hyperparameters, rt: Runtime, data: Data, log: Log) -> dict[str, Any]:
	"""Train, save, quantize, pack and score: the README's stages."""
	torch.manual_seed(h.seed)
	model = GPT(h, rt.attend, rt.dtype).to(rt.device)
	log_model(model, h, rt, log)
	cap = h.max_wallclock_seconds
	if cap and h.gptq_enabled and h.gptq_calib == "train":
		cap -= h.gptq_reserve_seconds
	in_training = replace(h, max_wallclock_seconds=cap, gptq_enabled=False)
	clock, average = train(model, data, in_training, rt, log)
	allocated = torch.cuda.max_memory_allocated() >> 20  # 0 on a CPU
	reserved = torch.cuda.max_memory_reserved() >> 20
	weights = {name: p.cpu() for name, p in zip(model.state_dict(), average.weights(), strict=True)}
	saved = io.BytesIO()
	torch.save({"settings": model_settings(h), "weights": weights}, saved)
	write_atomically(log.folder / "final_model.pt", saved.getvalue())
	log.line(f"Serialized model: {saved.tell()} bytes")
	validate(model, data, h, log, clock)
	log.line(f"peak memory allocated: {allocated} MiB reserved: {reserved} MiB")
	steps = len(clock.terms)
	return {
		"steps": steps,
		"tokens_per_second": steps * h.train_batch_tokens / (clock.elapsed or 1),
		"peak_memory_mib": allocated,
		"train_losses": [terms["train_loss"] for terms in clock.terms],
		"weights": average.apply(log),
		"train_tokens": len(data.train),
		**finish(model, h, rt, data, log, clock),
	}


def finish(
	model: GPT, h: Hyperparameters, rt: Runtime, data: Data, log: Log, clock: TrainingClock
) -> dict[str, Any]:
	"""Quantize and pack a model, then score the artifact from disk."""
	source, hessians, began = (log.folder / SOURCE_COPY).read_bytes(), {}, rt.now()
	model.eval()
	if not h.jepa_inject:  # a head that only taught
		model.jepa, h = None, replace(h, jepa_chunk_size=0)
	torch.set_float32_matmul_precision("highest")
	if h.gptq_enabled:
		clock.resume()
		hessians = collect_hessians(model, calibration(data.train, h, len(clock.terms)), log)
		log.line(f"gptq:calibrated on {h.gptq_calib} text in {rt.now() - began:.1f} s")
		if h.gptq_calib == "train":
			clock.pause()  # what reads training data is training
		roles = parameter_roles(model)
		hessians = {n: x for n, x in hessians.items() if h.gptq_embed or roles[n] == "matrix"}
	blob, widen = shrink(model, hessians, h, BYTES_LIMIT - len(source), log)
	write_atomically(artifact := log.folder / "final_model.int6.ptz", blob)
	pack_seconds = rt.now() - began
	sizes = {"code": len(source), "model": len(blob), "total": len(source) + len(blob)}
	log.line(f"Code size: {sizes['code']} bytes")
	for name, key in (("Serialized model", "model"), ("Total submission size", "total")):
		log.line(f"{name} int6+{h.compressor}: {sizes[key]} bytes")

	forward_logits = rt.compile(model.forward_logits)
	scores = {"float": evaluate(forward_logits, data, h, rt, log)}
	log_score(log, "DIAGNOSTIC post_ema", scores["float"])
	eval_began = rt.now()
	scores |= score_artifact(artifact, h, rt, data, log)
	eval_seconds = rt.now() - eval_began
	if widen > 1:  # what it cost to fit
		model.load_state_dict(dequantize(quantize(model, hessians)[0]))
		cost = scores["plain"].val_bpb - evaluate(forward_logits, data, h, rt, log).val_bpb
		log.line(f"size: the wider scales cost {cost:.4f} bpb")
	limits = {
		"train_seconds": (clock.elapsed, h.max_wallclock_seconds or math.inf),
		"eval_seconds": (eval_seconds, EVAL_SECONDS_LIMIT),
		"total_bytes": (sizes["total"], BYTES_LIMIT),
	}
	if not clock.times:  # nothing was trained here
		del limits["train_seconds"]
	verdicts = {name: "PASS" if value <= most else "FAIL" for name, (value, most) in limits.items()}
	for name, (value, most) in limits.items():
		log.line(f"limit:{name} {round(value, 1):,} of {most:,} {verdicts[name]}")
	return {
		"status": "over a limit" if "FAIL" in verdicts.values() else "ok",
		"verdicts": verdicts,
		"scores": {name: score._asdict() for name, score in scores.items()},
		"bytes": sizes,
		"seconds": {
			"train": clock.elapsed,
			"pack": pack_seconds,
			"total": clock.elapsed + rt.now() - began,
		},
		"parameters": sum(p.numel() for p in model.parameters()),
		"machine": rt.describe(),
		"code_sha256": hashlib.sha256(source).hexdigest(),
		"val_sha256": hashlib.sha256(data.val.numpy().tobytes()).hexdigest(),
	}


def log_model(model: GPT, h: Hyperparameters, rt: Runtime, log: Log) -> None:
	"""The challenge's lines on model, machine and settings."""
	roles = parameter_roles(model)
	shapes = [p.shape for name, p in model.named_parameters() if roles[name] == "matrix"]
	xsa = [n for n, block in enumerate(model.blocks) if block.attn.xsa]
	log.line(f"model_params:{sum(p.numel() for p in model.parameters())}")
	log.line(f"muon:{len(shapes)} matrices in {len(set(shapes))} stacks")
	log.line(f"XSA:last_{h.xsa_last_n} active_layers:{xsa}")
	if model.jepa:
		log.line(f"jepa:enabled params={sum(p.numel() for p in model.jepa.parameters())}")
	log.line(f"world_size:1 grad_accum_steps:{micro_batches(h)}")
	for values in (rt.describe(), asdict(h)):
		log.line(" ".join(f"{name}:{value}" for name, value in values.items()))


def log_score(log: Log, name: str, score: Score, stride: int = 0) -> None:
	"""A score in the challenge's two forms."""
	at = f" stride:{stride}" * (stride > 0) + f" eval_time:{1000 * score.seconds:.0f}ms"
	log.line(f"{name} val_loss:{score.val_loss:.4f} val_bpb:{score.val_bpb:.4f}{at}")
	log.line(f"{name}_exact val_loss:{score.val_loss:.8f} val_bpb:{score.val_bpb:.8f}")
	log.event("score", name=name, stride=stride, **score._asdict())


def score_artifact(
	path: Path, h: Hyperparameters, rt: Runtime, data: Data, log: Log
) -> dict[str, Score]:
	"""Plain, sliding and test-time-training scores of a model on disk."""
	h, weights = load_artifact(path, h)
	with torch.device("meta"):
		model = GPT(h, rt.attend, rt.dtype).eval()
	model.to_empty(device=rt.device).load_state_dict(weights)
	forward_logits = rt.compile(model.forward_logits)
	scores = {"plain": evaluate(forward_logits, data, h, rt, log)}
	log_score(log, "final_int6_roundtrip", scores["plain"])
	stride = min(h.eval_stride, seq_len := h.eval_seq_len or h.train_seq_len)
	if 0 < stride < seq_len:
		expected = scores["plain"].window_seconds * len(data.val) / stride
		over = expected + scores["plain"].seconds > EVAL_SECONDS_LIMIT
		warning = f" OVER {EVAL_SECONDS_LIMIT:.0f} s with the plain pass" * over
		log.line(f"sliding_window stride:{stride} expected_time:{expected:.0f}s{warning}")
		scores["sliding"] = evaluate(forward_logits, data, h, rt, log, stride=stride)
		log_score(log, "final_int6_sliding_window", scores["sliding"], stride)
	if h.ttt_enabled:
		learn = test_time_learner(model, h, rt)
		scores["ttt"] = evaluate(forward_logits, data, h, rt, log, stride=stride, learn=learn)
		model.load_state_dict(weights)
		log_score(log, "legal_ttt", scores["ttt"], stride)
	# Where the community's tools look for the score.
	log_score(log, "final_int8_zlib_roundtrip", [*scores.values()][-1])
	return scores


SOURCE_COPY = "train_gpt.py"  # in the run's folder; where it stands a run has begun


def open_folder(h: Hyperparameters) -> Path:
	"""The run's new folder; SettingsError where a run has begun or none can."""
	run_id = h.run_id or f"{time.strftime('%Y%m%d-%H%M%S')}-s{h.seed}-{os.getpid()}"
	folder = Path(h.run_dir or f"logs/{run_id}")
	try:
		folder.mkdir(parents=True, exist_ok=True)
		if (folder / "result.json").exists() and not (folder / SOURCE_COPY).exists():
			(folder / "result.json").unlink()  # a run that failed before it began
			(folder / "train.log").unlink()
		(folder / "train.log").open("x").close()  # of two runs only one can
	except OSError as error:
		found = f"RUN_DIR={folder}: no place for a run: {error}"
		raise SettingsError(f"{found}; choose another RUN_ID or RUN_DIR") from None
	return folder


FAILURES = (  # error, status, exit status; the first that fits
	(SettingsError, "settings", 2),
	(DataError, "data", 2),
	((torch.OutOfMemoryError, MemoryError), "out of memory", 3),
	(DivergenceError, "diverged", 4),
	(KeyboardInterrupt, "interrupted", 5),
	(BaseException, "failed", 6),
)


def main(argv: list[str], env: Mapping[str, str]) -> int:
	"""The program; 0 done, 1 over a limit, and FAILURES."""
	parser = argparse.ArgumentParser(
		description=__doc__.partition("\n")[0],
		epilog="Settings are environment variables:\n\n" + settings_table(),
		formatter_class=argparse.RawDescriptionHelpFormatter,
	)
	parser.add_argument("--eval", metavar="ARTIFACT", type=Path, help="score it again")
	parser.add_argument("--quantize", metavar="CHECKPOINT", type=Path, help="pack it again")
	args = parser.parse_args(argv)
	log, result = Log(), {"status": "ok"}
	try:
		h = Hyperparameters.from_env(env)
		notes = settings_notes(h, env)
		if saved := args.eval or args.quantize:
			h, weights = (load_artifact if args.eval else load_checkpoint)(saved, h)
		if args.eval:
			notes = [note for note in notes if not note.startswith("rule")]
		else:
			log = Log(open_folder(h))
			log.line(f"{log.folder}/train.log")
			result["settings"] = asdict(h)
		rt = Runtime.start(h, env)
		for note in (*notes, *rt.notes):
			log.line(note)
		trains = not saved or (args.quantize and h.gptq_enabled and h.gptq_calib == "train")
		data = load_data(h, log, trains)
		if not args.eval:
			compress(h.compressor, b"")  # if it is missing, fail before training, not after it
			write_atomically(log.folder / SOURCE_COPY, Path(__file__).read_bytes())
		if args.eval:
			score_artifact(args.eval, h, rt, data, log)
		elif args.quantize:
			model = GPT(h, rt.attend, rt.dtype).to(rt.device)
			model.load_state_dict(weights)
			result |= finish(model, h, rt, data, log, TrainingClock(rt, 0.0))
		else:
			result |= run(h, rt, data, log)
		status = int(result["status"] != "ok")
	except BaseException as error:
		result["status"], status = next(f[1:] for f in FAILURES if isinstance(error, f[0]))
		result["reason"] = str(error) if status in (2, 3, 4) else traceback.format_exc()
		if status == 3:
			result["reason"] += "; lower MICRO_BATCH_TOKENS to train, VAL_BATCH_SIZE to score"
	if log.folder:
		try:
			write_atomically(log.folder / "result.json", json.dumps(result, indent=2).encode())
		except OSError as error:
			status, result["reason"] = 6, f"{result.get('reason', '')} result.json: {error}"
	if "reason" in result:
		log.line(f"error: {result['reason']}")
	return status


if __name__ == "__main__":
	signal.signal(signal.SIGTERM, signal.default_int_handler)  # as Ctrl-C: result.json is written
	sys.exit(main(sys.argv[1:], os.environ))
