"""Train, shrink and score a language model for the OpenAI Parameter Golf challenge, in one file.

The best model that fits in 16,000,000 bytes, this file included, after 600 s on 8xH100, is the one
with the fewest bits per byte (bpb) on text it has not seen.

    PRESET=cpu python train_gpt.py                                   # a laptop, minutes
    torchrun --standalone --nproc_per_node=1 train_gpt.py            # one GPU
    python train_gpt.py --eval logs/<RUN_ID>/final_model.int6.ptz    # score an artifact again
    python train_gpt.py --help                                       # every setting

Importing this file only defines names. Its sections, each under a line with "# ----", use
themselves and earlier ones: Settings, Runtime (device, dtype, attention, log), Data (shards,
batches, bytes per token), Model, Evaluate, Optimizers, Training, Quantize and pack, Run.

Shapes: B sequences, T tokens, D model width, H query heads, K key/value heads, d head width,
V vocabulary.
"""

import argparse
import contextlib
import difflib
import functools
import hashlib
import io
import itertools
import json
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
from collections.abc import Callable, Mapping, Sequence
from dataclasses import Field, asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any, NamedTuple

if __name__ == "__main__" and not {"OMP_WAIT_POLICY", "GOMP_SPINCOUNT"} & os.environ.keys():
	# OpenMP threads that spin long at barriers make a step ten times slower beside another busy
	# process; a few microseconds are best everywhere. It must be said before torch loads.
	os.environ |= {"OMP_WAIT_POLICY": "PASSIVE", "GOMP_SPINCOUNT": "1000"}

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

# ---- Settings: what the run is told ----

BYTES_LIMIT = 16_000_000  # the challenge's, decimal: this file and the artifact together
EVAL_SECONDS_LIMIT = 600.0  # the challenge's, for scoring; training has its own
BYTE_VOCAB = 260  # the byte vocabulary: ids 0-3 are special, 4 + b is byte b
BOS_ID = 1  # opens every document in every vocabulary of the challenge

# What a vocabulary implies: PR #832, the byte stack, has no value embeddings, and RoPE as trained.
VOCABULARY_RULES = {BYTE_VOCAB: "VE_ENABLED=0 ROPE_TRAIN_SEQ_LEN=4096"}

# Whole configurations, as one would type them; a variable set by hand overrides them.
PRESETS = {
	# A newcomer's first run: the embedded corpus, steps instead of seconds, minutes on two cores.
	"cpu": "CORPUS=python NUM_LAYERS=2 MODEL_DIM=128 NUM_HEADS=2 NUM_KV_HEADS=1 VE_DIM=32 "
	"BIGRAM_VOCAB_SIZE=16384 BIGRAM_DIM=64 TRAIN_SEQ_LEN=512 TRAIN_BATCH_TOKENS=2048 "
	"ITERATIONS=1200 WARMDOWN_ITERS=720 MAX_WALLCLOCK_SECONDS=0 MATRIX_LR=0.02 EMA_DECAY=0.97 "
	"TRAIN_LOG_EVERY=100 VAL_LOSS_EVERY=0",
	# PR #832, bytes and the JEPA head: what its command sets that is no default.
	"byte_jepa": "VOCAB_SIZE=260 NUM_LAYERS=13 MLP_MULT=2 XSA_LAST_N=4 BIGRAM_VOCAB_SIZE=4096 "
	"BIGRAM_DIM=32 TRAIN_SEQ_LEN=4096 TRAIN_BATCH_TOKENS=393216 ITERATIONS=9000 "
	"WARMDOWN_ITERS=3000 EVAL_STRIDE=512 JEPA_CHUNK_SIZE=8",
	# PR #1124: the defaults.
	"v9": "",
}


# Variables of the published commands that have no effect yet.
NOT_BUILT = ("GPTQ_ENABLED", "LABEL_SMOOTHING", "STP_ENABLED", "TTT_ENABLED")


class SettingsError(ValueError):
	"""Settings that cannot be used; a line for each names it, its value and the remedy."""


def setting(
	default: Any,
	doc: str,
	low: float = -1e18,
	high: float = 1e18,
	choices: tuple[str, ...] = (),
	in_artifact: bool = False,
) -> Any:
	"""Declare a setting: default (it gives the type), meaning, bounds or choices."""
	about = {"doc": doc, "low": low, "high": high, "choices": choices, "in_artifact": in_artifact}
	return field(default=default, metadata=about)


# A setting that says what the model is: it travels in the artifact's header.
of_model = functools.partial(setting, in_artifact=True)


@dataclass(frozen=True)
class Hyperparameters:
	"""Every setting; the upper-cased field name is the environment variable.

	Defaults are the stack of PR #1124. An instance is checked: SettingsError names every fault.
	"""

	# Run
	preset: str = setting("", "a whole configuration", choices=("", *PRESETS))
	run_id: str = setting("", "name of the run; empty: date, time, seed")
	run_dir: str = setting("", "folder the run writes; empty: logs/<RUN_ID>")
	seed: int = setting(1337, "seed of the initial weights", 0, 2**63 - 1)
	dtype: str = setting("auto", "dtype of activations", choices=("auto", "bf16", "fp32"))
	attn: str = setting("auto", "attention", choices=("auto", "fa3", "cudnn", "flash", "math"))
	compile: str = setting("auto", "torch.compile; auto: on CUDA", choices=("auto", "0", "1"))
	# Data
	corpus: str = of_model("fineweb10B", "data set family, for the two paths below")
	data_path: str = setting("", "shards; empty: ./data/datasets/<CORPUS>_sp<VOCAB_SIZE>")
	tokenizer_path: str = setting("", "empty: ./data/tokenizers/<CORPUS>_<VOCAB_SIZE>_bpe.model")
	vocab_size: int = of_model(1024, "tokens; 260: bytes", 5, 65_536)
	train_seq_len: int = of_model(2048, "tokens a sequence", 2, 2**24)
	train_batch_tokens: int = setting(786_432, "tokens a step", 2)
	micro_batch_tokens: int = setting(98_304, "most tokens in one forward and backward", 1)
	# Model
	num_layers: int = of_model(11, "blocks", 1, 1000)
	model_dim: int = of_model(512, "width of the residual stream", 2, 65_536)
	num_heads: int = of_model(8, "query heads", 1)
	num_kv_heads: int = of_model(4, "key/value heads (GQA)", 1)
	mlp_mult: float = of_model(3.0, "MLP width over MODEL_DIM", 0.01, 64)
	negative_slope: float = of_model(0.5, "MLP: leaky_relu(., slope)^2; 0: relu^2", 0, 1)
	tie_embeddings: bool = of_model(True, "the head is the token embedding")
	tied_embed_init_std: float = setting(0.005, "std of the initial token embedding", 0)
	logit_softcap: float = of_model(30.0, "c in c tanh(logits / c)", 0.01)
	rope_base: float = of_model(10_000.0, "RoPE base", 1)
	rope_dims: int = of_model(16, "rotated dims of a head; 0: all", 0)
	rope_train_seq_len: int = of_model(1024, "longer sequences stretch the base (NTK)", 1)
	qk_gain_init: float = setting(1.5, "initial gain of q, per head")
	xsa_last_n: int = of_model(11, "last layers with exclusive self-attention", 0)
	ln_scale: bool = of_model(True, "norms times 1/sqrt(layer + 1)")
	unet_skips: bool = of_model(True, "late layers read the outputs of early ones")
	smear_gate: bool = of_model(True, "mix in the embedding of the token before")
	bigram_vocab_size: int = of_model(2048, "BigramHash buckets; 0: none", 0, 2**24)
	bigram_dim: int = of_model(128, "BigramHash width", 1, 65_536)
	bos_mask: bool = of_model(True, "SmearGate, BigramHash stop at BOS; 0: as published")
	ve_enabled: bool = of_model(True, "value embeddings")
	ve_dim: int = of_model(128, "their width", 1, 65_536)
	ve_layers: str = of_model("", "their layers, as 9,10; empty: the last two")
	# JEPA head (PR #832)
	jepa_chunk_size: int = of_model(0, "positions a latent stands for; 0: no JEPA", 0)
	jepa_latent_dim: int = of_model(256, "width of a latent", 1, 65_536)
	jepa_proj_hidden: int = of_model(256, "hidden width of its projector", 1, 65_536)
	jepa_inject: bool = of_model(True, "predictions enter the stream; 0: it only teaches")
	jepa_lambda_max: float = setting(0.001, "peak weight of its losses; 0: random latents", 0)
	jepa_phase1_frac: float = setting(0.3, "part of the run before they start", 0, 1)
	jepa_phase2_frac: float = setting(0.5, "next part: rise to the peak; then none", 1e-9, 1)
	jepa_phase_progress: bool = setting(False, "parts by seconds too; 0: of ITERATIONS alone")
	jepa_backbone_grad: bool = setting(False, "its losses teach the backbone")
	jepa_sigreg: str = setting("published", "SIGReg", choices=("published", "lejepa"))
	jepa_sigreg_weight: float = setting(0.02, "of SIGReg beside the prediction error", 0)
	jepa_sigreg_projs: int = setting(256, "its directions", 1, 65_536)
	jepa_sigreg_knots: int = setting(17, "its quadrature nodes", 2, 1000)
	jepa_lr: float = setting(0.001, "AdamW: JEPA head", 0)
	# Optimizers
	matrix_lr: float = setting(0.025, "Muon: block matrices", 0)
	scalar_lr: float = setting(0.025, "AdamW: gains, gates, small projections", 0)
	tied_embed_lr: float = setting(0.035, "AdamW: embeddings with a tied head", 0)
	embed_lr: float = setting(0.6, "AdamW: embeddings with an untied head", 0)
	head_lr: float = setting(0.008, "AdamW: untied head", 0)
	beta1: float = setting(0.9, "AdamW", 0, 0.9999)
	beta2: float = setting(0.95, "AdamW", 0, 0.99999)
	adam_eps: float = setting(1e-8, "AdamW", 0)
	adam_wd: float = setting(0.04, "AdamW weight decay", 0)
	muon_wd: float = setting(0.04, "Muon weight decay", 0)
	muon_momentum: float = setting(0.99, "Muon momentum, once warm", 0, 0.9999)
	muon_momentum_warmup_start: float = setting(0.92, "at the start", 0, 0.9999)
	muon_momentum_warmup_steps: int = setting(1500, "steps from start to warm", 0)
	muon_backend_steps: int = setting(5, "Newton-Schulz iterations", 1, 100)
	grad_clip_norm: float = setting(0.3, "largest gradient norm; 0: any", 0)
	ema_enabled: bool = setting(True, "end with a moving average of the weights")
	ema_decay: float = setting(0.997, "its decay; at most (1 + t)/(10 + t)", 0, 0.999999)
	swa_enabled: bool = setting(False, "end with the mean of late weights instead")
	swa_every: int = setting(50, "steps between those", 1)
	# Schedule
	iterations: int = setting(20_000, "most steps", 0)
	max_wallclock_seconds: float = setting(600.0, "most training seconds; 0: any", 0)
	warmup_steps: int = setting(20, "throw-away steps before the clock starts", 0)
	warmdown_iters: int = setting(3500, "last steps, over which the rates fall to 0", 0)
	warmdown_max_fraction: float = setting(0.6, "and at most this part of the run", 0, 1)
	warmdown_published: bool = setting(False, "the records' rule, which can miss 0")
	val_loss_every: int = setting(4000, "steps between validations; 0: the last only", 0)
	train_log_every: int = setting(500, "steps between log lines; 0: the first ten", 0)
	# Evaluate
	eval_seq_len: int = setting(0, "tokens a window; 0: TRAIN_SEQ_LEN", 0, 2**24)
	eval_stride: int = setting(64, "of the sliding window; 0: no sliding pass", 0)
	val_batch_size: int = setting(524_288, "tokens scored at once on 8 ranks; each takes 1/8", 1)
	# Quantize and pack
	compressor: str = setting("zstd", "of the artifact", choices=("zstd", "lzma"))

	def __post_init__(self) -> None:
		faults = [x for f in fields(self) if (x := fault(f, getattr(self, f.name)))]
		if faults := faults or faults_together(self):
			raise SettingsError("\n".join(faults))

	@classmethod
	def from_env(cls, env: Mapping[str, str]) -> "Hyperparameters":
		"""Settings by environment, else PRESET, else rule of VOCAB_SIZE, else default."""
		env = {**assignments(PRESETS.get(env.get("PRESET", ""), "")), **env}
		with contextlib.suppress(ValueError, KeyError):
			env = {**assignments(VOCABULARY_RULES[int(env["VOCAB_SIZE"])]), **env}
		given = [f for f in fields(cls) if f.name.upper() in env]
		return cls(**{f.name: parse_value(env[f.name.upper()], f.default) for f in given})


def assignments(text: str) -> dict[str, str]:
	"""The variables of a line like `A=1 B=2`."""
	return dict(pair.split("=", 1) for pair in text.split())


def parse_value(text: str, default: Any) -> Any:
	"""A variable's value in its default's type, or its text, which is then a fault."""
	if isinstance(default, bool):
		return {"0": False, "1": True}.get(text, text)
	try:
		return type(default)(text)
	except ValueError:
		return text


def fault(f: "Field[Any]", value: Any) -> str | None:
	"""What is wrong with one value by itself, or None."""
	about, kind = f.metadata, type(f.default)
	if type(value) is not kind and (kind, type(value)) != (float, int):
		must = {bool: "0 or 1", int: "a whole number", float: "a number", str: "text"}[kind]
	elif about["choices"] and value not in about["choices"]:
		must = f"one of {', '.join(about['choices'])}"
	elif kind is not str and not about["low"] <= value <= about["high"]:  # NaN neither
		must = f"from {about['low']} to {about['high']}"
	else:
		return None
	return f"{f.name.upper()}={value!r}: must be {must}"


def faults_together(h: Hyperparameters) -> list[str]:
	"""What is wrong with values that are legal alone."""
	width, rest = h.model_dim // h.num_heads, h.train_batch_tokens % h.train_seq_len
	near = max(h.train_batch_tokens - rest, h.train_seq_len)
	layers = h.ve_layers.split(",") if h.ve_layers else []
	checks = {
		"MODEL_DIM must be an even multiple of NUM_HEADS": h.model_dim % (2 * h.num_heads),
		"NUM_KV_HEADS must divide NUM_HEADS": h.num_heads % h.num_kv_heads,
		f"ROPE_DIMS must be even and at most {width}": h.rope_dims % 2 or h.rope_dims > width,
		f"TRAIN_BATCH_TOKENS must be a multiple of TRAIN_SEQ_LEN; {near}, say": rest,
		"JEPA_CHUNK_SIZE must be at most half of TRAIN_SEQ_LEN": 2 * h.jepa_chunk_size
		> h.train_seq_len,
		"BIGRAM_VOCAB_SIZE must be 0 (none) or at least 2": h.bigram_vocab_size == 1,
		"VE_LAYERS must be layers below NUM_LAYERS, as 9,10": not all(
			n.isdecimal() and int(n) < h.num_layers for n in layers
		),
		"RUN_ID must be letters, digits, '_', '-' and, not first, '.'": h.run_id
		and not re.fullmatch(r"[\w-][\w.-]*", h.run_id, re.ASCII),
	}
	return [
		re.sub(r"[A-Z_]{5,}", lambda m: f"{m[0]}={getattr(h, m[0].lower())!r}", rule)  # every NAME
		for rule, broken in checks.items()
		if broken
	]


def settings_notes(h: Hyperparameters, env: Mapping[str, str]) -> list[str]:
	"""What a user might not know: set by a rule, without effect, or named nearly right."""
	names = [f.name.upper() for f in fields(h)]
	known, notes = {**assignments(PRESETS.get(h.preset, "")), **env}, []
	for name, value in assignments(VOCABULARY_RULES.get(h.vocab_size, "")).items():
		if name not in known:
			notes.append(f"rule: VOCAB_SIZE={h.vocab_size} sets {name}={value}")
	for name in NOT_BUILT:
		if env.get(name, "").strip("0."):
			notes.append(f"warning: {name}={env[name]} has no effect: not built yet")
	for name in sorted({*env} - {*names, *NOT_BUILT}):
		for near in difflib.get_close_matches(name, names, n=1, cutoff=0.88):
			notes.append(f"warning: {name} is no setting; is {near} meant?")
	if h.jepa_chunk_size and not (h.jepa_inject or h.jepa_backbone_grad):
		notes.append("warning: without JEPA_INJECT and JEPA_BACKBONE_GRAD the head teaches nobody")
	return notes


def settings_table() -> str:
	"""Every setting with default and meaning, for --help and the README."""
	lines = []
	for f in fields(Hyperparameters):
		default = int(f.default) if isinstance(f.default, bool) else f.default
		choices = " | ".join(c for c in f.metadata["choices"] if c)
		doc = f.metadata["doc"] + (f" ({choices})" if choices else "")
		lines.append(f"{f.name.upper():<28}{default!s:<12}{doc}")
	return "\n".join(lines)


def value_layers(h: Hyperparameters) -> list[int]:
	"""Layers that add the value embedding."""
	if not h.ve_enabled:
		return []
	if h.ve_layers:
		return sorted({int(n) for n in h.ve_layers.split(",")})
	return list(range(max(h.num_layers - 2, 0), h.num_layers))


def data_folder(h: Hyperparameters) -> Path:
	"""Folder of the token shards."""
	kind = "byte260" if h.vocab_size == BYTE_VOCAB else f"sp{h.vocab_size}"
	return Path(h.data_path or f"./data/datasets/{h.corpus}_{kind}")


def tokenizer_file(h: Hyperparameters) -> Path:
	"""The sentencepiece model; the corpus fineweb10B goes with fineweb_<V>_bpe.model."""
	family = h.corpus.removesuffix("10B")
	return Path(h.tokenizer_path or f"./data/tokenizers/{family}_{h.vocab_size}_bpe.model")


# ---- Runtime: where it runs ----

Attend = Callable[[Tensor, Tensor, Tensor], Tensor]  # q [B,T,H,d], k and v [B,T,K,d] -> [B,T,H,d]


def attend_sdpa(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
	"""Causal grouped-query attention by PyTorch's enabled back end."""
	q, k, v = (x.transpose(1, 2) for x in (q, k, v))
	y = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=q.size(1) != k.size(1))
	return y.transpose(1, 2)


def load_attention(name: str) -> Attend:
	"""One attention back end; PyTorch's others are disabled, so none takes its place unsaid."""
	if name == "fa3":
		from flash_attn_interface import flash_attn_func

		def attend_fa3(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
			"""FlashAttention 3; some versions return the log-sum-exp too."""
			y = flash_attn_func(q, k, v, causal=True)
			return y[0] if isinstance(y, tuple) else y

		return attend_fa3
	for back_end in ("cudnn", "flash", "math", "mem_efficient"):
		getattr(torch.backends.cuda, f"enable_{back_end}_sdp")(back_end == name)
	return attend_sdpa


@dataclass(frozen=True)
class Runtime:
	"""The machine as this run uses it."""

	device: torch.device
	dtype: torch.dtype  # of activations; master weights are float32 everywhere
	attention: str
	attend: Attend
	compiled: bool
	notes: list[str]  # what was chosen for the user, and why

	@classmethod
	def start(cls, h: Hyperparameters, env: Mapping[str, str]) -> "Runtime":
		"""Choose device and dtype, then kernels; SettingsError where a named one cannot run."""
		if env.get("WORLD_SIZE", "1") != "1":
			raise SettingsError(f"WORLD_SIZE={env['WORLD_SIZE']}: must be 1; --nproc_per_node=1")
		cuda, notes = torch.cuda.is_available(), []
		# Where bf16 is emulated it is many times slower than float32.
		has_bf16 = cuda and torch.cuda.get_device_capability() >= (8, 0)
		if not cuda:
			notes.append("device:cpu, no CUDA GPU is here (Apple's are not used)")
		elif not has_bf16:
			notes.append("dtype:fp32, this GPU has no bf16")
			if h.dtype == "bf16":
				raise SettingsError("DTYPE=bf16: this GPU has no bf16; use auto or fp32")
		if cuda:
			torch.set_float32_matmul_precision("high")  # TF32 for what is left in float32
		bf16 = h.dtype == "bf16" or (h.dtype == "auto" and has_bf16)
		dtype = torch.bfloat16 if bf16 else torch.float32
		return choose_kernels(h, torch.device("cuda" if cuda else "cpu"), dtype, notes)

	def compile(self, function: Callable[..., Tensor]) -> Callable[..., Tensor]:
		"""The function, compiled for fixed shapes if this run compiles."""
		if not self.compiled:
			return function
		return torch.compile(function, dynamic=False, fullgraph=True)

	def now(self) -> float:
		"""Monotonic seconds, once all work queued on the device is done."""
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
			"cuda": torch.version.cuda,
			"python": platform.python_version(),
		}


def choose_kernels(
	h: Hyperparameters, device: torch.device, dtype: torch.dtype, notes: list[str]
) -> Runtime:
	"""With the first attention that runs, forward and backward; SettingsError if none does."""
	cuda = device.type == "cuda"
	hopper = cuda and torch.cuda.get_device_capability(device)[0] == 9
	order = ("fa3", "cudnn", "flash", "math") if hopper else ("flash", "cudnn", "math")
	compiles = {"0": (False,), "1": (True,), "auto": (True, False) if cuda else (False,)}[h.compile]
	heads = (h.num_heads, h.num_kv_heads, h.num_kv_heads)
	shape = (1, h.train_seq_len, sum(heads), h.model_dim // h.num_heads)
	for compiled, name in itertools.product(compiles, order if h.attn == "auto" else (h.attn,)):
		try:
			rt = Runtime(device, dtype, name, load_attention(name), compiled, notes)
			qkv = torch.linspace(-1, 1, math.prod(shape)).view(shape).to(device, dtype)
			q, k, v = qkv.requires_grad_().split(heads, dim=2)
			y = rt.compile(lambda q, k, v: rt.attend(q.sin(), k, v))(q, k, v)  # noqa: B023
			y.sum().backward()
			if y.isfinite().all() and qkv.grad.isfinite().all():
				return rt
			raise ArithmeticError("it gave NaN")
		except Exception as error:  # whatever a kernel or a compiler raises, the next one may run
			notes.append(f"attention:{name} compiled:{compiled} not used: {error!r:.200}")
			torch.compiler.reset()
	asked = f"ATTN={h.attn} COMPILE={h.compile}: cannot run here; use auto or COMPILE=0"
	raise SettingsError("\n".join((asked, *notes)))


class Log:
	"""Lines for people, events for programs, and a moving line for who watches a terminal."""

	def __init__(self, folder: Path | None = None) -> None:
		self.folder = folder
		self.watched = sys.stderr.isatty()

	def append(self, name: str, text: str) -> None:
		"""Add a line to a file of the folder; a full disk ends no run."""
		if self.folder:
			with contextlib.suppress(OSError), open(self.folder / name, "a", encoding="utf-8") as f:
				f.write(text + "\n")

	def line(self, text: str) -> None:
		"""Print a line, unless nobody reads, and keep it in train.log."""
		self.progress("")
		with contextlib.suppress(OSError):
			print(text, flush=True)
		self.append("train.log", text)

	def event(self, kind: str, **values: Any) -> None:
		"""Keep a JSON object in events.jsonl."""
		self.append("events.jsonl", json.dumps({"event": kind, **values}))

	def progress(self, text: str) -> None:
		"""Show text in place of the progress shown before."""
		if self.watched:
			with contextlib.suppress(OSError):
				print(f"\r\033[K{text}", end="", file=sys.stderr, flush=True)


def write_atomically(path: Path, data: bytes) -> None:
	"""Write a file whole or not at all, whenever a crash comes."""
	partial = path.with_name(path.name + ".part")
	with open(partial, "wb") as file:
		file.write(data)
		file.flush()
		os.fsync(file.fileno())
	partial.replace(path)


# ---- Data: what it eats ----

SHARD_MAGIC, SHARD_VERSION, SHARD_HEADER_INTS = 20240520, 1, 256
PROOF_TOKENS = 1_000_000  # validation tokens on which the byte table must agree with decoded text


class DataError(ValueError):
	"""Shards, tokenizer or artifact that cannot be used; the message names file and remedy."""


def read_shard(path: Path) -> np.ndarray:
	"""Tokens uint16 [count], mapped from disk; DataError unless the file is whole.

	A shard is 256 little-endian int32 (magic, version, count, zeros), then count uint16.
	"""
	header = np.fromfile(path, dtype="<i4", count=SHARD_HEADER_INTS)
	magic, version, count = (int(n) for n in (*header, 0, 0, 0)[:3])
	expected, size = 4 * SHARD_HEADER_INTS + 2 * count, path.stat().st_size
	if (magic, version) != (SHARD_MAGIC, SHARD_VERSION) or count <= 0 or size != expected:
		found = f"magic {magic}, version {version}, {size} bytes, but {count} tokens need"
		raise DataError(f"{path}: no whole shard: {found} {expected}; make or fetch it again")
	return np.memmap(path, "<u2", "r", offset=4 * SHARD_HEADER_INTS, shape=(count,))


class TokenStream:
	"""The tokens of a split, shards in name order, again and again."""

	def __init__(self, folder: Path, split: str, vocab_size: int) -> None:
		self.pattern = folder / f"fineweb_{split}_*.bin"
		self.paths = sorted(folder.glob(self.pattern.name))
		if not self.paths:
			remedy = "change it; `python data/prepare.py` makes the shards of PRESET=cpu"
			raise DataError(f"DATA_PATH={folder}: no {self.pattern.name} there; {remedy}")
		self.shards = [read_shard(path) for path in self.paths]
		self.ends = np.cumsum([len(shard) for shard in self.shards])
		self.vocab_size = vocab_size

	def __len__(self) -> int:
		return int(self.ends[-1])

	def read(self, position: int, count: int) -> Tensor:
		"""Tokens int64 [count] from a position on."""
		tokens, filled = np.empty(count, np.int64), 0
		while filled < count:
			at = (position + filled) % len(self)
			index = int(np.searchsorted(self.ends, at, side="right"))
			part = self.shards[index][at - int(self.ends[index]) :][: count - filled]
			if (largest := int(part.max())) >= self.vocab_size:
				found = f"token id {largest} is outside VOCAB_SIZE={self.vocab_size}"
				raise DataError(f"{self.paths[index]}: {found}; use data of the vocabulary")
			tokens[filled : filled + len(part)] = part
			filled += len(part)
		return torch.from_numpy(tokens)

	def batch(self, step: int, h: Hyperparameters) -> tuple[Tensor, Tensor]:
		"""Inputs and targets int64 [sequences, T] of a step, whatever steps came before."""
		tokens = self.read(step * h.train_batch_tokens, h.train_batch_tokens + 1)
		return tokens[:-1].view(-1, h.train_seq_len), tokens[1:].view(-1, h.train_seq_len)


def micro_batches(h: Hyperparameters) -> int:
	"""The least number of equal parts of a step of at most MICRO_BATCH_TOKENS each."""
	rows = h.train_batch_tokens // h.train_seq_len
	most = max(h.micro_batch_tokens // h.train_seq_len, 1)
	return next(n for n in range(1, rows + 1) if rows % n == 0 and rows // n <= most)


class ByteTable(NamedTuple):
	"""Bytes of text each token stands for: the only byte accounting there is."""

	size: Tensor  # int16 [V]: bytes, but for a leading space that some decoders drop after no text
	space: Tensor  # int16 [V]: 1 where there is such a space
	special: Tensor  # bool [V]: no text, as BOS

	def count(self, previous: Tensor, target: Tensor) -> Tensor:
		"""Bytes int16 of each target token after the previous one."""
		return self.size[target] + self.space[target] * ~self.special[previous]

	@classmethod
	def of_bytes(cls) -> "ByteTable":
		"""The byte vocabulary's."""
		size = (torch.arange(BYTE_VOCAB) >= 4).short()
		return cls(size, torch.zeros_like(size), size == 0)

	@classmethod
	def of_tokenizer(cls, tokenizer: Any) -> "ByteTable":
		"""A sentencepiece processor's; U+2581 in a piece is a space."""
		rows = []
		for i in range(tokenizer.vocab_size()):
			special = tokenizer.is_control(i) or tokenizer.is_unknown(i) or tokenizer.is_unused(i)
			size, whole = (0, 0) if special else (1, 1)
			if not special and not tokenizer.is_byte(i):
				# Whether a leading space is dropped only the model's decoder knows.
				size = len(tokenizer.decode([i]).encode())
				whole = len(tokenizer.id_to_piece(i).replace("\u2581", " ").encode())
			rows.append((size, whole - size, special))
		size, space, special = torch.tensor(rows, dtype=torch.int16).unbind(1)
		return cls(size, space, special.bool())


def load_tokenizer(h: Hyperparameters) -> Any:
	"""The run's sentencepiece processor; DataError where it is missing or another's."""
	import sentencepiece

	path = tokenizer_file(h)
	try:
		tokenizer = sentencepiece.SentencePieceProcessor(model_file=str(path))
	except Exception as error:  # RuntimeError, OSError, ... by version
		raise DataError(f"TOKENIZER_PATH={path}: {error}; fetch it with its data") from None
	if tokenizer.vocab_size() != h.vocab_size:
		found = f"{tokenizer.vocab_size()} pieces, VOCAB_SIZE={h.vocab_size}"
		raise DataError(f"TOKENIZER_PATH={path}: {found}; change one of them")
	return tokenizer


def prove_byte_table(table: ByteTable, tokenizer: Any, tokens: Tensor) -> int:
	"""Bytes among the first PROOF_TOKENS on which table and decoder agree; else DataError.

	They are compared from one special token to the next.
	"""
	head = tokens[:PROOF_TOKENS]
	counts = table.count(head[:-1], head[1:]).long()
	edges = table.special[head].nonzero().flatten().tolist()
	if len(head) == len(tokens):
		edges.append(len(head))  # else the last run may be cut within a character
	proven = 0
	for start, end in itertools.pairwise(edges):
		counted = int(counts[start : end - 1].sum())
		decoded = len(tokenizer.decode(head[start + 1 : end].tolist()).encode())
		if counted != decoded:
			raise DataError(
				f"validation token {start + 1}: the byte table counts {counted}, the decoder "
				f"{decoded} bytes; no bpb of these data and tokenizer can be trusted"
			)
		proven += counted
	return proven


class Data(NamedTuple):
	"""Both splits and the byte table of a run."""

	val: Tensor  # int32 [N]: the whole validation split
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
		tokenizer = load_tokenizer(h)
		table = ByteTable.of_tokenizer(tokenizer)
		proven = prove_byte_table(table, tokenizer, val)
		kind = f"sentencepiece tokenizer_path={tokenizer_file(h)}"
		log.line(f"val_bpb:enabled tokenizer_kind={kind}")
		log.line(f"byte_table:proven against {proven} bytes of decoded text")
		if unknown := int((val == tokenizer.unk_id()).sum()):
			log.line(f"warning: {unknown} validation tokens are unknown text, counted as 0 bytes")
	if not proven:
		raise DataError(f"{folder}: the validation tokens hold no text that follows BOS={BOS_ID}")
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
# A class with parameters states their roles; ROLE_POLICY, under Optimizers, gives each role its
# optimizer, rate, decay and stored bits. Nothing is chosen by a parameter's name.


def rms_norm(x: Tensor) -> Tensor:
	"""x over the root mean square of its last dimension; torch's default eps has changed."""
	return F.rms_norm(x, (x.size(-1),), eps=1.2e-7)


class Linear(nn.Linear):
	"""Bias-free map, float32 weight [out, in] cast to its input's dtype.

	It starts orthogonal times `gain`, at 0, or, where gain is None, uniform within 1/sqrt(in).
	"""

	def __init__(
		self, fan_in: int, fan_out: int, gain: float | None = 1.0, role: str = "matrix"
	) -> None:
		super().__init__(fan_in, fan_out, bias=False)
		self.ROLES = {"weight": role}
		if gain is not None:
			nn.init.orthogonal_(self.weight, gain) if gain else nn.init.zeros_(self.weight)

	def forward(self, x: Tensor) -> Tensor:
		"""x [..., in] to [..., out]."""
		return F.linear(x, self.weight.to(x.dtype))


class Embedding(nn.Embedding):
	"""A table [count, width], normal with the given std."""

	ROLES = {"weight": "embed"}

	def __init__(self, count: int, width: int, std: float) -> None:
		super().__init__(count, width, _weight=torch.empty(count, width).normal_(std=std))


def rotary_angles(h: Hyperparameters, length: int, device: torch.device) -> tuple[Tensor, Tensor]:
	"""cos and sin [T, 1, n/2] of the n rotated dims; a length above T0 stretches the base.

	NTK as in the records: base (T/T0)^(n/(n-2)), T0 = ROPE_TRAIN_SEQ_LEN.
	"""
	dims = h.rope_dims or h.model_dim // h.num_heads
	base = h.rope_base
	if length > h.rope_train_seq_len and dims > 2:
		base *= (length / h.rope_train_seq_len) ** (dims / (dims - 2))
	frequencies = base ** (-torch.arange(0, dims, 2, device=device) / dims)
	angles = torch.outer(torch.arange(length, device=device), frequencies).unsqueeze(1)
	return angles.cos(), angles.sin()


def rotate(x: Tensor, rotation: tuple[Tensor, Tensor]) -> Tensor:
	"""RoPE on the first n dims of each head of x [B, T, heads, d], in pairs (i, i + n/2)."""
	cos, sin = (r.to(x.dtype) for r in rotation)
	half = cos.size(-1)
	a, b, rest = x.split((half, half, x.size(-1) - 2 * half), dim=-1)
	return torch.cat((a * cos + b * sin, b * cos - a * sin, rest), dim=-1)


def subtract_self_value(y: Tensor, v: Tensor) -> Tensor:
	"""XSA: y [B, T, H, d] without its component along the position's own value v [B, T, K, d].

	Exclusive self-attention, arXiv 2603.09078; query head i has the value of head i // (H/K).
	"""
	y_grouped = y.view(*v.shape[:3], -1, v.size(-1))
	unit = F.normalize(v.float(), dim=-1).unsqueeze(3)
	along = (y_grouped.float() * unit).sum(-1, keepdim=True)
	return (y_grouped - (along * unit).to(y.dtype)).view_as(y)


class CausalSelfAttention(nn.Module):
	"""Grouped-query attention on normed q and k, with partial RoPE and, in late layers, XSA."""

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
		"""Attend within x [B, T, D]; extra_value [B, T, K d] is added to the values."""
		heads = (*x.shape[:2], -1, self.head_dim)
		q = rotate(rms_norm(self.c_q(x).view(heads)), rotation) * self.q_gain.to(x.dtype)
		k = rotate(rms_norm(self.c_k(x).view(heads)), rotation)
		v = self.c_v(x) if extra_value is None else self.c_v(x) + extra_value
		v = v.view(heads)
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
		"""x [..., D] to the same shape."""
		return self.down(F.leaky_relu(self.up(x), self.negative_slope).square())


class SmearGate(nn.Module):
	"""Each position mixed with the one before it: (1 - g) x_t + g x_{t-1}, g = sigmoid(gate)."""

	ROLES = {"gate": "scalar"}

	def __init__(self, h: Hyperparameters) -> None:
		super().__init__()
		self.gate = nn.Parameter(torch.zeros(h.model_dim))
		self.bos_mask = h.bos_mask

	def forward(self, x: Tensor, ids: Tensor) -> Tensor:
		"""x [B, T, D] smeared; zeros stand before the first token and, masked, before BOS."""
		before = F.pad(x[:, :-1], (0, 0, 1, 0))
		if self.bos_mask:
			before = before.masked_fill((ids == BOS_ID).unsqueeze(-1), 0)
		return torch.lerp(x, before, self.gate.sigmoid().to(x.dtype))


class BigramHash(nn.Module):
	"""A learned vector for each hashed pair of neighbours, added to the embedding."""

	ROLES = {"scale": "scalar"}

	def __init__(self, h: Hyperparameters) -> None:
		super().__init__()
		self.buckets, self.bos_mask = h.bigram_vocab_size, h.bos_mask
		self.embed = Embedding(h.bigram_vocab_size, h.bigram_dim, std=0.0)
		# Never 0 beside a table of 0, as in PR #832 with BIGRAM_DIM=32: each one's gradient is a
		# multiple of the other, so both would stay 0 for ever.
		same = h.bigram_dim == h.model_dim
		gain = (2 * h.num_layers) ** -0.5
		self.proj = nn.Identity() if same else Linear(h.bigram_dim, h.model_dim, gain, "scalar")
		self.scale = nn.Parameter(torch.tensor(0.05))

	def hash(self, ids: Tensor) -> Tensor:
		"""Bucket of each position of ids [B, T]; the last one where no token stands before."""
		last, ids = self.buckets - 1, ids.int()
		pairs = (36_313 * ids[:, 1:]).bitwise_xor(27_191 * ids[:, :-1]) % last
		if self.bos_mask:
			pairs = pairs.masked_fill(ids[:, 1:] == BOS_ID, last)
		return F.pad(pairs, (1, 0), value=last)

	def forward(self, ids: Tensor) -> Tensor:
		"""Vectors [B, T, D] of ids [B, T]."""
		return self.proj(self.embed(self.hash(ids))) * self.scale


class ValueEmbedding(nn.Module):
	"""A second, shared embedding of the token, which some layers add to their values."""

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
		"""What each of its layers adds, [B, T, K d]."""
		value = self.proj(self.embed(ids)) * self.scale
		return {n: (value * self.layer_scales[i]).to(dtype) for i, n in enumerate(self.layers)}


class Block(nn.Module):
	"""A layer: mix in the embedding, then attention and MLP, both on normed input."""

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
		"""The stream x [B, T, D] after this layer; x0 is the stream before the first."""
		keep, restart = self.resid_mix.to(x.dtype)
		x = keep * x + restart * x0
		attended = self.attn(rms_norm(x) * self.norm_scale, rotation, extra_value)
		x = x + self.attn_scale.to(x.dtype) * attended
		return x + self.mlp_scale.to(x.dtype) * self.mlp(rms_norm(x) * self.norm_scale)


def sigreg(z: Tensor, directions: Tensor, knots: int, form: str, parts: int = 1) -> Tensor:
	"""How far the rows of z [N / parts, n] are from samples of N(0, I): a float32 scalar.

	Along each direction, a unit column of [n, P], the characteristic function of the rows is held
	against the normal one, exp(-t^2/2), at `knots` points t (Epps-Pulley). "lejepa": N times the
	integral under that Gaussian, by trapezoids (arXiv 2511.08544). "published": a plain mean over
	standardised rows, blind to their mean and scale (PR #832).
	"""
	published, z = form == "published", z.float()
	if published:
		z = (z - z.mean(0)) / z.var(0).clamp_min(1e-12).sqrt()
	t = torch.linspace(0.2 if published else 0.0, 3.0, knots, device=z.device)
	angles, normal = (z @ directions).unsqueeze(-1) * t, torch.exp(-t.square() / 2)
	error = (angles.cos().mean(0) - normal).square() + angles.sin().mean(0).square()
	if published:
		return error.mean()
	# Twice: t < 0 gives as much. N is of the whole step, so that its parts change no weight.
	return 2 * parts * len(z) * torch.trapezoid(error * normal, t).mean()


class JEPA(nn.Module):
	"""Predicts the latent of each chunk of positions from the chunk before it.

	A latent is the projected mean of a chunk; the prediction enters the stream of its chunk. Two
	losses, the squared error and SIGReg, teach projector and predictor; cross-entropy alone teaches
	the injection. The backbone learns from none of them but with JEPA_BACKBONE_GRAD (PR #832).
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
		# For training: tensors, so that new values compile nothing anew.
		self.register_buffer("weights", torch.zeros(2), persistent=False)
		self.register_buffer(
			"directions", torch.zeros(latent, h.jepa_sigreg_projs), persistent=False
		)
		self.learns = False

	@torch.no_grad()
	def prepare(self, weight: float, step: int) -> None:
		"""Set the losses' weight, lambda, for a step; LeJEPA draws new directions for each."""
		self.learns = weight > 0
		self.weights[0], self.weights[1] = weight, weight * self.h.jepa_sigreg_weight
		if self.learns:
			seed = self.h.seed + step * (self.h.jepa_sigreg == "lejepa")
			generator = torch.Generator(self.directions.device).manual_seed(seed)
			F.normalize(self.directions.normal_(generator=generator), dim=0, out=self.directions)

	def predict(self, latents: Tensor) -> Tensor:
		"""Latents [B, C, n] predicted from those before them, the first from a learned one."""
		before = self.start.to(latents.dtype).expand(len(latents), 1, -1)
		return self.predictor(torch.cat((before, latents), dim=1)[:, : latents.size(1)])

	def forward(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
		"""The stream x [B, T, D] with predictions, and the losses [2] while they are learned from.

		Positions after the last whole chunk get nothing.
		"""
		learns = self.training and self.learns
		if not learns and self.inject is None:
			return x, None
		chunks, source = x.size(1) // self.chunk, x if self.h.jepa_backbone_grad else x.detach()
		source = source[:, : chunks * self.chunk].unflatten(1, (chunks, self.chunk))
		latents = self.projector(source.mean(2))
		predicted = self.predict(latents)
		if self.inject is not None:
			added = self.inject(predicted.detach()).repeat_interleave(self.chunk, dim=1)
			x = x + F.pad(added, (0, 0, 0, x.size(1) - added.size(1)))
		if not learns:
			return x, None
		error = F.mse_loss(predicted.float(), latents.detach().float())
		h, rows = self.h, latents.flatten(0, 1)
		form = h.jepa_sigreg_knots, h.jepa_sigreg, micro_batches(h)
		spread = sigreg(rows, self.directions, *form)
		return x, torch.stack((error, spread))


class GPT(nn.Module):
	"""The language model of `h`, Hyperparameters itself or an instance; weights are float32.

	Built on the CPU. Training and scoring run one function, `hidden`, with activations in `dtype`.
	"""

	ROLES = {"skip_weights": "scalar"}

	def __init__(
		self,
		h: Hyperparameters | type[Hyperparameters],
		attend: Attend = attend_sdpa,
		dtype: torch.dtype = torch.float32,
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
		tied = h.tie_embeddings
		self.lm_head = None if tied else Linear(h.model_dim, h.vocab_size, 0, "head")
		self.jepa = JEPA(h) if h.jepa_chunk_size else None

	def hidden(self, ids: Tensor) -> tuple[Tensor, Tensor | None]:
		"""The normed last hidden state [B, T, D] of ids [B, T], and auxiliary losses, if any."""
		x = self.tok_emb(ids)
		if self.bigram is not None:
			x = x + self.bigram(ids)
		x = rms_norm(x.to(self.dtype))
		if self.smear is not None:
			x = self.smear(x, ids)
		x0, rotation = x, rotary_angles(self.h, ids.size(1), ids.device)
		values = {} if self.value_embedding is None else self.value_embedding(ids, self.dtype)
		# U-Net: the outputs of the first half of the layers enter the second half, last one first.
		half, outputs = len(self.blocks) // 2, []
		for layer, block in enumerate(self.blocks):
			if half <= layer < half + len(self.skip_weights):
				x = x + self.skip_weights[layer - half].to(x.dtype) * outputs.pop()
			x = block(x, x0, rotation, values.get(layer))
			if layer < half:
				outputs.append(x)
		x, auxiliary = (x, None) if self.jepa is None else self.jepa(x)
		return rms_norm(x), auxiliary

	def logits(self, x: Tensor) -> Tensor:
		"""Soft-capped logits, float32 [..., V], of hidden states [..., D]."""
		head = (self.lm_head or self.tok_emb).weight
		logits, cap = F.linear(x, head.to(x.dtype)).float(), self.h.logit_softcap
		return logits.div_(cap).tanh_() * cap  # in place: V is large, and eager memory is slow

	def forward_logits(self, ids: Tensor, last: int | None = None) -> Tensor:
		"""Logits [B, T, V] of ids [B, T] or of their `last` positions."""
		x, _ = self.hidden(ids)
		return self.logits(x if last is None else x[:, -last:])

	def losses(self, ids: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
		"""The loss to descend, and its terms [n]: cross-entropy in nats, then auxiliary ones."""
		x, auxiliary = self.hidden(ids)
		nats = F.cross_entropy(self.logits(x).flatten(0, 1), targets.flatten())
		if auxiliary is None:
			return nats, nats.view(1)
		return nats + auxiliary @ self.jepa.weights, torch.cat((nats.view(1), auxiliary))

	def forward(self, ids: Tensor, targets: Tensor) -> Tensor:
		"""The loss, a float32 scalar: mean cross-entropy in nats and, in training, auxiliary."""
		return self.losses(ids, targets)[0]


def parameter_roles(model: nn.Module) -> dict[str, str]:
	"""The role of every parameter by its full name; TypeError for one whose class states none."""
	roles = {}
	for prefix, module in model.named_modules():
		for name, _ in module.named_parameters(prefix, recurse=False):
			try:
				roles[name] = module.ROLES[name.rpartition(".")[2]]
			except (AttributeError, KeyError):
				raise TypeError(f"{type(module).__name__}.ROLES lacks {name}") from None
	return roles


# ---- Evaluate: how it is judged ----


class DivergenceError(RuntimeError):
	"""Training went wrong: a loss or a weight is no finite number; the message says where."""


class Score(NamedTuple):
	"""What scoring a text gives; bpb, bits per byte, is the challenge's measure."""

	val_loss: float  # nats a token
	val_bpb: float
	nats: float
	tokens: int
	bytes: int  # of text
	seconds: float
	window_seconds: float  # a window, once all is compiled


def plan_windows(total: int, seq_len: int, stride: int, size: int) -> list[Tensor]:
	"""Batches int64 [n, 2], n at most size, of windows (start, how many last positions it scores).

	Each has seq_len positions, ends stride after the one before it, or at the end, and scores what
	that one did not. Only the first sliding window scores all its positions, so it comes alone;
	windows that score nothing fill up the batches, so that compiled code meets few shapes.
	"""
	ends = torch.cat((torch.arange(seq_len, total, stride), torch.tensor([total])))
	windows = torch.stack((ends - seq_len, ends.diff(prepend=torch.tensor([0]))), dim=1)
	size = min(size, len(windows))
	first = size if stride == seq_len else 1
	batches = (windows[:first], *windows[first:].split(size))
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
) -> Score:
	"""Score the validation split: the only loop from logits to a score, in float64 sums.

	forward_logits(ids [B, T], last) gives logits [B, last, V]; T is seq_len, else the settings'.
	Without a stride windows lie side by side.
	"""
	began, total = rt.now(), len(data.val) - 1
	seq_len = min(seq_len or h.eval_seq_len or h.train_seq_len, total)
	stride = stride or seq_len
	batch_tokens = h.val_batch_size // 8
	if rt.device.type == "cpu":
		batch_tokens = min(batch_tokens, 4096)  # more spills the caches: half the speed
	batches = plan_windows(total, seq_len, stride, max(batch_tokens // seq_len, 1))
	tokens, table = data.val.to(rt.device), ByteTable(*(t.to(rt.device) for t in data.table))
	offsets = torch.arange(seq_len + 1, device=rt.device)
	sums = torch.zeros(3, dtype=torch.float64, device=rt.device)
	for n, batch in enumerate(batches):
		last = stride if n else seq_len
		starts, counts = batch.to(rt.device).unsqueeze(-1).unbind(1)
		ids = tokens[starts + offsets].long()
		inputs, targets = ids[:, :-1], ids[:, -last:]
		logits = forward_logits(inputs, last)
		nats = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none")
		nbytes = table.count(inputs[:, -last:], targets)
		scored = offsets[:last] >= last - counts
		for i, of_token in enumerate((nats.view_as(nbytes), scored, nbytes)):
			sums[i] += of_token.double().where(scored, 0).sum()
		log.progress(f"scoring batch {n + 1} of {len(batches)}")
		if n == 0:
			compiled_at = rt.now()
	log.progress("")
	nats, count, nbytes = sums.tolist()
	if count != total:
		raise RuntimeError(f"scored {count:.0f} tokens of {total}")
	if not math.isfinite(nats):
		raise DivergenceError("the score is no finite number: the weights have diverged")
	loss, bpb, ended = nats / total, nats / math.log(2) / nbytes, rt.now()
	window_seconds = (ended - compiled_at) / max(len(batches) - 1, 1) / len(batch)
	return Score(loss, bpb, nats, total, int(nbytes), ended - began, window_seconds)


# ---- Optimizers: how it learns ----


class Policy(NamedTuple):
	"""How the parameters of a role are learned and stored; None decay is no decay."""

	optimizer: str
	lr: str  # name of a setting
	decay: str | None  # name of a setting
	bits: int  # 6, 8: codes with a scale a row; 16: float16


ROLE_POLICY = {
	"matrix": Policy("muon", "matrix_lr", "muon_wd", 6),
	"embed": Policy("adamw", "tied_embed_lr", "adam_wd", 8),  # untied: EMBED_LR
	"head": Policy("adamw", "head_lr", None, 8),
	"scalar": Policy("adamw", "scalar_lr", "adam_wd", 16),
	"aux": Policy("adamw", "jepa_lr", None, 8),
}


def newton_schulz(matrices: Tensor, steps: int, dtype: torch.dtype = torch.float32) -> Tensor:
	"""About U V^T of each matrix U S V^T of a stack [n, rows, cols] (Jordan et al. 2024, Muon).

	Five steps bring singular values above 0.002 of the Frobenius norm into [0.67, 1.21].
	"""
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
	"""Nesterov momentum, orthogonalised in one stack for each shape."""

	def __init__(
		self,
		matrices: Sequence[Tensor],
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
		"""Decay the weights, then move them, tall ones by sqrt(rows / cols) more."""
		for stack, buffer in zip(self.stacks, self.momenta, strict=True):
			gradient = torch.stack([p.grad for p in stack])
			buffer.mul_(momentum).add_(gradient)
			nesterov = gradient.add_(buffer, alpha=momentum)
			update = newton_schulz(nesterov, self.ns_steps, self.dtype)
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
			lr = getattr(h, "embed_lr" if untied else policy.lr)
			decay = getattr(h, policy.decay) if policy.decay else 0.0
			if policy.optimizer == "muon":
				self.muon = Muon(params, decay, h.muon_backend_steps, model.dtype)
				self.muon_lr = lr
			elif params:
				groups.append({"params": params, "lr": lr, "base_lr": lr, "weight_decay": decay})
		betas = (h.beta1, h.beta2)
		self.adamw = torch.optim.AdamW(groups, betas=betas, eps=h.adam_eps, fused=True)

	def step(self, step: int, scale: float) -> None:
		"""Clip the gradients, step at `scale` times the rates, drop the gradients."""
		if self.h.grad_clip_norm:
			nn.utils.clip_grad_norm_(self.params, self.h.grad_clip_norm)
		self.muon.step(self.muon_lr * scale, muon_momentum(step, self.h))
		for group in self.adamw.param_groups:
			group["lr"] = group["base_lr"] * scale
		self.adamw.step()
		for p in self.params:
			p.grad = None


def muon_momentum(step: int, h: Hyperparameters) -> float:
	"""Momentum at a step: linear from start to warm."""
	steps = h.muon_momentum_warmup_steps
	warm = step / steps if step < steps else 1.0
	return h.muon_momentum_warmup_start + warm * (h.muon_momentum - h.muon_momentum_warmup_start)


def lr_scale(step: int, elapsed: float, h: Hyperparameters) -> float:
	"""Factor of the learning rates: 1, then down to 0 where seconds or ITERATIONS end the run.

	The records' rule knows the seconds alone: it can stop high, and fall from the first step where
	WARMDOWN_ITERS outlast the cap.
	"""
	published, cap = h.warmdown_published, h.max_wallclock_seconds
	left = math.inf if published and cap else h.iterations - step
	if cap and elapsed:
		left = min(left, max(cap - elapsed, 0.0) * max(step, 1) / elapsed)
	longest = math.inf if published else h.warmdown_max_fraction * (step + left)
	warmdown = min(h.warmdown_iters, longest)
	return min(left / warmdown, 1.0) if warmdown else 1.0


def jepa_weight(step: int, elapsed: float, h: Hyperparameters) -> float:
	"""Lambda at a step, `elapsed` training seconds in: 0, then a rise to its peak, then 0.

	By the seconds too, a run that the cap ends has all its phases.
	"""
	cap, done = h.max_wallclock_seconds, step / h.iterations
	if h.jepa_phase_progress and cap:
		done = max(done, elapsed / cap)
	risen = (done - h.jepa_phase1_frac) / h.jepa_phase2_frac
	return h.jepa_lambda_max * risen if 0 <= risen < 1 else 0.0


class WeightAverage:
	"""A float32 average of the weights: the EMA or, for SWA, the mean of late ones."""

	def __init__(self, model: nn.Module, h: Hyperparameters) -> None:
		self.h, self.count = h, 0  # count of weights averaged
		self.params = [p.detach() for p in model.parameters()]
		self.mean = [p.clone() for p in self.params]

	def update(self, step: int, scale: float) -> None:
		"""Take in the weights after `step` steps, the last at learning-rate factor `scale`."""
		if not (self.h.swa_enabled or self.h.ema_enabled):
			return
		# A constant 0.997 would leave 41 % of the initial weights after 300 steps.
		weight = 1 - min(self.h.ema_decay, (1 + self.count) / (10 + self.count))
		if self.h.swa_enabled:
			if scale >= 0.2 or step % self.h.swa_every:  # as the records' SWA
				return
			weight = 1 / (self.count + 1)
		torch._foreach_lerp_(self.mean, self.params, weight)
		self.count += 1

	def weights(self) -> list[Tensor]:
		"""The average, or the last weights if nothing was averaged."""
		return self.mean if self.count else self.params

	def apply(self, log: Log) -> str:
		"""Give the model the average; returns ema, swa, or raw if nothing was averaged."""
		if not self.count:
			log.line("average:none was taken; the last weights are used as they are")
			return "raw"
		torch._foreach_copy_(self.params, self.mean)
		swa = f"swa:applying averaged {self.count} checkpoints"
		log.line(swa if self.h.swa_enabled else "ema:applying EMA weights")
		return "swa" if self.h.swa_enabled else "ema"


# ---- Training: the clock, the step, the loop ----


class TrainingClock:
	"""Seconds of training as the device lived them; they stand still outside training.

	On CUDA a step is still running when the next is launched, so its end and its loss are read one
	step late, from an event and pinned memory: nothing waits within a step.
	"""

	def __init__(self, rt: Runtime, cap: float) -> None:
		self.rt, self.cap = rt, cap
		self.elapsed = 0.0  # at the end of the last finished step
		self.losses: list[float] = []  # of the finished steps: cross-entropy
		self.auxiliary: list[list[float]] = []  # and their other terms
		self.times: list[float] = []  # `elapsed` at their ends
		self.recent: deque[float] = deque(maxlen=20)  # seconds of the last of them
		self.running: deque[tuple[Any, Tensor]] = deque()
		self.resume()

	def resume(self) -> None:
		"""Let the seconds run."""
		self.mark = self.rt.now()

	def pause(self) -> None:
		"""Finish every step and stop the seconds."""
		while self.running:
			self.finish_step()
		self.elapsed += self.rt.now() - self.mark

	def step_launched(self, terms: Tensor) -> None:
		"""Take note of a step by the terms of its loss."""
		host = terms.to("cpu", non_blocking=True)  # from a GPU, into pinned memory
		event = torch.cuda.current_stream().record_event() if terms.is_cuda else None
		self.running.append((event, host))
		while len(self.running) > terms.is_cuda:
			self.finish_step()

	def finish_step(self) -> None:
		"""Wait for the oldest running step; DivergenceError if its loss is not finite."""
		event, terms = self.running.popleft()
		if event is not None:
			event.synchronize()
		began, self.mark = self.mark, time.perf_counter()
		self.recent.append(self.mark - began)
		self.elapsed += self.recent[-1]
		self.times.append(self.elapsed)
		cross_entropy, *auxiliary = terms.tolist()
		self.losses.append(cross_entropy)
		self.auxiliary.append(auxiliary)
		if not math.isfinite(loss := sum(auxiliary, cross_entropy)):
			remedy = "lower MATRIX_LR, SCALAR_LR and TIED_EMBED_LR or look at the data"
			found = f"step {len(self.losses)}: the loss is {loss}"
			raise DivergenceError(f"{found}; {remedy}")

	def spent(self) -> bool:
		"""Whether the running steps and one more, as slow as any recent one, pass the cap."""
		ahead = (len(self.running) + 1) * max(self.recent, default=0.0)
		return self.cap > 0 and self.elapsed + ahead >= self.cap


def train_step(
	losses_of: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]],
	optimizers: Optimizers,
	batch: tuple[Tensor, Tensor],
	step: int,
	scale: float,
	rt: Runtime,
) -> Tensor:
	"""One step on inputs and targets [sequences, T], in equal parts; the mean terms of its loss."""
	parts = micro_batches(optimizers.h)
	if rt.device.type == "cuda":
		batch = batch[0].pin_memory(), batch[1].pin_memory()
	inputs, targets = (ids.to(rt.device, non_blocking=True).chunk(parts) for ids in batch)
	of_parts = []
	for x, y in zip(inputs, targets, strict=True):
		loss, terms = losses_of(x, y)
		(loss / parts).backward()
		of_parts.append(terms.detach())
	optimizers.step(step, scale)
	return torch.stack(of_parts).mean(0)


def warm_up(
	model: GPT, losses_of: Callable[..., Any], h: Hyperparameters, rt: Runtime, log: Log
) -> None:
	"""Compile and load what a step needs, on random tokens, and put the weights back.

	Optimizers and random state are its own: it leaves no trace.
	"""
	if rt.device.type == "cpu" and not rt.compiled:
		log.line("warmup:skipped, an eager CPU has nothing to warm")
		return
	weights = [p.detach().clone() for p in model.parameters()]
	optimizers, generator = Optimizers(model, h), torch.Generator().manual_seed(h.seed)
	shape = (2, h.train_batch_tokens // h.train_seq_len, h.train_seq_len)
	for step in range(h.warmup_steps):
		if model.jepa is not None:  # the step with its losses and the one without are two programs
			model.jepa.prepare(h.jepa_lambda_max * (step % 2), step)
		x, y = torch.randint(h.vocab_size, shape, generator=generator)
		train_step(losses_of, optimizers, (x, y), step, 1.0, rt)
		log.line(f"warmup_step:{step + 1}/{h.warmup_steps}")
	torch._foreach_copy_([p.detach() for p in model.parameters()], weights)


def train(
	model: GPT, data: Data, h: Hyperparameters, rt: Runtime, log: Log
) -> tuple[TrainingClock, WeightAverage]:
	"""Train in place until ITERATIONS or the cap; the clock, and the average, not applied yet."""
	losses_of, forward_logits = rt.compile(model.losses), rt.compile(model.forward_logits)
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
		for n in range(logged, len(clock.losses)):
			if n < 10 or (h.train_log_every and (n + 1) % h.train_log_every == 0):
				of = zip(("jepa_error", "jepa_sigreg"), clock.auxiliary[n], strict=False)
				log_step(log, h, n + 1, clock.times[n], train_loss=clock.losses[n], **dict(of))
		if logged := len(clock.losses):
			left = (h.iterations - step) * clock.elapsed / logged
			left = min(left, clock.cap - clock.elapsed) if clock.cap else left
			log.progress(f"step {step}  loss {clock.losses[-1]:.4f}  {left:.0f} s left to train")
		if done:
			break
		if validates:
			validate(model, forward_logits, data, h, rt, log, clock)
			clock.resume()
		scale = lr_scale(step, clock.elapsed, h)
		if model.jepa is not None:
			model.jepa.prepare(jepa_weight(step, clock.elapsed, h), step)
		terms = train_step(losses_of, optimizers, data.train.batch(step, h), step, scale, rt)
		clock.step_launched(terms)
		step += 1
		average.update(step, scale)
	if model.jepa is not None:
		log.line(f"jepa:learned in {sum(map(bool, clock.auxiliary))} of {step} steps")
	if step < h.iterations:
		at = f"train_time:{1000 * clock.elapsed:.0f}ms step:{step}/{h.iterations}"
		log.line(f"stopping_early: wallclock_cap {at}")
	return clock, average


def validate(
	model: GPT,
	forward_logits: Callable[..., Tensor],
	data: Data,
	h: Hyperparameters,
	rt: Runtime,
	log: Log,
	clock: TrainingClock,
) -> None:
	"""Log the plain score of the weights as they are, at the training length."""
	model.eval()
	score = evaluate(forward_logits, data, h, rt, log, seq_len=h.train_seq_len)
	model.train()
	of = {"val_loss": score.val_loss, "val_bpb": score.val_bpb}
	log_step(log, h, len(clock.losses), clock.elapsed, **of)


def log_step(log: Log, h: Hyperparameters, step: int, seconds: float, **of: float) -> None:
	"""Log values of a step that ended after `seconds` of training."""
	values = " ".join(f"{name}:{value:.4f}" for name, value in of.items())
	times = f"train_time:{1000 * seconds:.0f}ms step_avg:{1000 * seconds / max(step, 1):.2f}ms"
	log.line(f"step:{step}/{h.iterations} {values} {times}")
	log.event("step", step=step, seconds=seconds, **of)


# ---- Quantize and pack: how it is shrunk ----

CLIPS = (1.0, 0.95, 0.9, 0.85, 0.8, 0.75, 0.7, 0.6, 0.5)  # of a row's largest weight


def round_rows(weight: Tensor, bits: int) -> tuple[Tensor, Tensor]:
	"""Codes int8 [rows, cols] within +-(2^(bits-1) - 1) and scales float16 [rows] of a matrix.

	Each row takes the clip of least squared error. Scales have no floor but float16's own: the
	records' 1/31 spoils a row of weights far below 1.
	"""
	limit = 2 ** (bits - 1) - 1
	weight = weight.float()
	peak = weight.abs().amax(1, keepdim=True)
	best_error = torch.full_like(peak, math.inf)
	best = torch.zeros_like(peak)
	for clip in CLIPS:
		scale = (peak * clip / limit).clamp(2.0**-24, 65_504).half().float()
		rounded = (weight / scale).round().clamp(-limit, limit) * scale
		error = (rounded - weight).square().sum(1, keepdim=True)
		best = torch.where(error < best_error, scale, best)
		best_error = torch.minimum(error, best_error)
	codes = (weight / best).round().clamp(-limit, limit)
	return codes.to(torch.int8), best.squeeze(1).half()


def quantize(model: GPT) -> dict[str, Tensor]:
	"""The arrays of the artifact by name, in its order; of a meta model, their types and shapes.

	All codes come first: like beside like compresses best.
	"""
	roles, codes, scales, floats = parameter_roles(model), {}, {}, {}
	for name, p in model.state_dict().items():
		if not (p.is_meta or p.isfinite().all()):
			raise DivergenceError(f"{name} is not finite: the weights have diverged")
		bits = ROLE_POLICY[roles[name]].bits
		if bits == 16:
			floats[name] = p.half()
		else:
			codes[f"{name}.codes"], scales[f"{name}.scales"] = round_rows(p, bits)
	return codes | scales | floats


# An artifact is this header (magic, version, codec, bytes of settings, SHA-256 of all but itself),
# the model's settings as JSON, which say all shapes, and the arrays compressed.
HEADER = struct.Struct("<8sHHI32s")
MAGIC, VERSION = b"PGOLFGPT", 1
CODECS = ("zstd", "lzma")  # by number in the header


def expect(true: bool, else_fault: str) -> None:
	"""ValueError unless true."""
	if not true:
		raise ValueError(else_fault)


def compress(codec: str, data: bytes) -> bytes:
	"""Compress as far as the codec goes."""
	if codec == "lzma":
		import lzma

		return lzma.compress(data, preset=9 | lzma.PRESET_EXTREME)
	try:
		import zstandard
	except ImportError:
		raise SettingsError("COMPRESSOR=zstd: pip install zstandard, or use lzma") from None
	return zstandard.ZstdCompressor(level=22).compress(data)


def decompress(codec: str, data: bytes, size: int) -> bytes:
	"""The data, at most one byte more than `size` of them whatever they claim."""
	if codec == "lzma":
		import lzma

		stream = lzma.LZMADecompressor()
		raw = stream.decompress(data, max_length=size + 1)
		ends = stream.eof and not stream.unused_data
		expect(ends or len(raw) > size, "the stream does not end with its data")
		return raw
	import zstandard

	stream = zstandard.ZstdDecompressor().stream_reader(data, read_across_frames=True)
	return stream.read(size + 1)


def model_settings(h: Hyperparameters) -> dict[str, Any]:
	"""The settings that travel in the artifact."""
	return {f.name: getattr(h, f.name) for f in fields(h) if f.metadata["in_artifact"]}


def pack(h: Hyperparameters, arrays: Mapping[str, Tensor]) -> bytes:
	"""The artifact's bytes, the same for the same arrays."""
	payload = compress(h.compressor, b"".join(a.cpu().numpy().tobytes() for a in arrays.values()))
	settings = json.dumps(model_settings(h), separators=(",", ":")).encode()
	head = (MAGIC, VERSION, CODECS.index(h.compressor), len(settings))
	digest = hashlib.sha256(HEADER.pack(*head, b"") + settings + payload).digest()
	return HEADER.pack(*head, digest) + settings + payload


def unpack(blob: bytes, h: Hyperparameters) -> tuple[Hyperparameters, dict[str, Tensor]]:
	"""Settings, `h` where they do not travel, and arrays; all is checked before it is allocated."""
	head, body = HEADER.unpack_from(blob), blob[HEADER.size :]
	magic, version, codec, settings_size, digest = head
	expect((magic, version) == (MAGIC, VERSION), f"magic {magic}, version {version}: not ours")
	signed = HEADER.pack(*head[:-1], b"") + body
	expect(hashlib.sha256(signed).digest() == digest, "the checksum does not fit: it is damaged")
	settings = json.loads(body[:settings_size])
	expect(settings.keys() == model_settings(h).keys(), "its settings are not this program's")
	# The batch does not travel; one sequence is legal with any length.
	h = replace(h, **settings, train_batch_tokens=settings["train_seq_len"])
	with torch.device("meta"):
		layout = quantize(GPT(h))
	sizes = [array.nbytes for array in layout.values()]
	raw = decompress(CODECS[codec], body[settings_size:], sum(sizes))
	expect(len(raw) == sum(sizes), f"{len(raw)} bytes of arrays, its settings need {sum(sizes)}")
	parts = torch.frombuffer(bytearray(raw), dtype=torch.uint8).split(sizes)
	arrays = {}
	for (name, like), part in zip(layout.items(), parts, strict=True):
		arrays[name] = part.clone().view(like.dtype).view(like.shape)
	return h, arrays


def load_artifact(path: Path, h: Hyperparameters) -> tuple[Hyperparameters, dict[str, Tensor]]:
	"""Settings and float32 weights by parameter name; DataError for what is no artifact."""
	try:
		h, arrays = unpack(path.read_bytes(), h)
	except ImportError as error:
		raise DataError(f"{path}: pip install {error.name} to read it") from None
	except Exception as error:  # of the file, struct, json, each codec
		raise DataError(f"{path}: cannot be read as an artifact: {error!r}") from None
	weights = {name: array.float() for name, array in arrays.items()}
	for name in [name.removesuffix(".codes") for name in weights if name.endswith(".codes")]:
		weights[name] = weights.pop(f"{name}.codes") * weights.pop(f"{name}.scales")[:, None]
	return h, weights


# ---- Run: how it all goes ----


def run(h: Hyperparameters, rt: Runtime, data: Data, log: Log) -> dict[str, Any]:
	"""Train, save, quantize, pack, read back and score: the README's stages. Returns the result."""
	began, source, folder = rt.now(), Path(__file__).read_bytes(), log.folder
	compress(h.compressor, b"")  # if it is missing, fail before training, not after it
	write_atomically(folder / SOURCE_COPY, source)
	torch.manual_seed(h.seed)
	model = GPT(h, rt.attend, rt.dtype).to(rt.device)
	log_model(model, h, rt, log)

	clock, average = train(model, data, h, rt, log)
	allocated = torch.cuda.max_memory_allocated() >> 20  # 0 on a CPU
	reserved = torch.cuda.max_memory_reserved() >> 20
	weights = {name: p.cpu() for name, p in zip(model.state_dict(), average.weights(), strict=True)}
	saved = io.BytesIO()
	torch.save({"settings": model_settings(h), "weights": weights}, saved)
	write_atomically(folder / "final_model.pt", saved.getvalue())
	forward_logits = rt.compile(model.forward_logits)
	validate(model, forward_logits, data, h, rt, log, clock)
	log.line(f"peak memory allocated: {allocated} MiB reserved: {reserved} MiB")
	kind = average.apply(log)
	model.eval()
	if not h.jepa_inject:  # a head that only taught does not ship
		model.jepa, h = None, replace(h, jepa_chunk_size=0)

	pack_began = rt.now()
	blob = pack(h, quantize(model))
	write_atomically(artifact := folder / "final_model.int6.ptz", blob)
	pack_seconds = rt.now() - pack_began
	sizes = {"code": len(source), "model": len(blob), "total": len(source) + len(blob)}
	log.line(f"Serialized model: {saved.tell()} bytes")
	log.line(f"Code size: {sizes['code']} bytes")
	log.line(f"Serialized model int6+{h.compressor}: {sizes['model']} bytes")
	log.line(f"Total submission size int6+{h.compressor}: {sizes['total']} bytes")

	float_score = evaluate(forward_logits, data, h, rt, log)
	log_score(log, "DIAGNOSTIC post_ema", float_score)
	eval_began = rt.now()
	scores = {"float": float_score, **score_artifact(artifact, h, rt, data, log)}
	verdicts = {}
	for name, value, most in (
		("train_seconds", clock.elapsed, h.max_wallclock_seconds or math.inf),
		("eval_seconds", rt.now() - eval_began, EVAL_SECONDS_LIMIT),
		("total_bytes", sizes["total"], BYTES_LIMIT),
	):
		verdicts[name] = "PASS" if value <= most else "FAIL"
		log.line(f"limit:{name} {round(value, 1):,} of {most:,} {verdicts[name]}")
	return {
		"status": "over a limit" if "FAIL" in verdicts.values() else "ok",
		"verdicts": verdicts,
		"scores": {name: score._asdict() for name, score in scores.items()},
		"bytes": sizes,
		"seconds": {"train": clock.elapsed, "pack": pack_seconds, "total": rt.now() - began},
		"steps": len(clock.losses),
		"tokens_per_second": len(clock.losses) * h.train_batch_tokens / (clock.elapsed or 1),
		"peak_memory_mib": allocated,
		"train_losses": clock.losses,
		"weights": kind,
		"parameters": sum(p.numel() for p in model.parameters()),
		"machine": rt.describe(),
		"code_sha256": hashlib.sha256(source).hexdigest(),
		"val_sha256": hashlib.sha256(data.val.numpy().tobytes()).hexdigest(),
		"train_tokens": len(data.train),
	}


def log_model(model: GPT, h: Hyperparameters, rt: Runtime, log: Log) -> None:
	"""The challenge's lines on model, machine and settings."""
	roles = parameter_roles(model)
	shapes = [p.shape for name, p in model.named_parameters() if roles[name] == "matrix"]
	xsa = [layer for layer, block in enumerate(model.blocks) if block.attn.xsa]
	log.line(f"model_params:{sum(p.numel() for p in model.parameters())}")
	log.line(f"muon:{len(shapes)} matrices in {len(set(shapes))} stacks")
	log.line(f"XSA:last_{h.xsa_last_n} active_layers:{xsa}")
	if model.jepa is not None:
		size = sum(p.numel() for p in model.jepa.parameters())
		of = f"chunk_size={h.jepa_chunk_size} latent_dim={h.jepa_latent_dim} params={size}"
		log.line(f"jepa:enabled {of}")
		of = f"phase1={h.jepa_phase1_frac} phase2={h.jepa_phase2_frac}"
		log.line(f"jepa:schedule {of} lambda_max={h.jepa_lambda_max}")
	log.line(f"world_size:1 grad_accum_steps:{micro_batches(h)}")
	log.line(" ".join(f"{name}:{value}" for name, value in rt.describe().items()))
	for lead, names in (
		("attention_mode:gqa ", "num_heads num_kv_heads"),
		("", "tie_embeddings tied_embed_lr head_lr matrix_lr scalar_lr"),
		("", "train_batch_tokens train_seq_len iterations warmup_steps max_wallclock_seconds"),
		("", "seed"),
	):
		log.line(lead + " ".join(f"{name}:{getattr(h, name)}" for name in names.split()))


def log_score(log: Log, name: str, score: Score, stride: int = 0) -> None:
	"""A score in the challenge's two forms."""
	at = f" stride:{stride}" if stride else ""
	loss, bpb, time_ms = score.val_loss, score.val_bpb, 1000 * score.seconds
	log.line(f"{name} val_loss:{loss:.4f} val_bpb:{bpb:.4f}{at} eval_time:{time_ms:.0f}ms")
	log.line(f"{name}_exact val_loss:{loss:.8f} val_bpb:{bpb:.8f}")
	log.event("score", name=name, stride=stride, **score._asdict())


def score_artifact(
	path: Path, h: Hyperparameters, rt: Runtime, data: Data, log: Log
) -> dict[str, Score]:
	"""Plain score and, if EVAL_STRIDE asks for it, sliding one of the model on disk."""
	h, weights = load_artifact(path, h)
	with torch.device("meta"):
		model = GPT(h, rt.attend, rt.dtype).eval()
	model.to_empty(device=rt.device).load_state_dict(weights)
	forward_logits = rt.compile(model.forward_logits)
	scores = {"plain": evaluate(forward_logits, data, h, rt, log)}
	log_score(log, "final_int6_roundtrip", scores["plain"])
	seq_len = h.eval_seq_len or h.train_seq_len
	if 0 < h.eval_stride < seq_len:
		expected = scores["plain"].window_seconds * len(data.val) / h.eval_stride
		over = expected + scores["plain"].seconds > EVAL_SECONDS_LIMIT
		warning = f" OVER {EVAL_SECONDS_LIMIT:.0f} s with the plain pass" * over
		log.line(f"sliding_window stride:{h.eval_stride} expected_time:{expected:.0f}s{warning}")
		scores["sliding"] = evaluate(forward_logits, data, h, rt, log, stride=h.eval_stride)
		log_score(log, "final_int6_sliding_window", scores["sliding"], h.eval_stride)
	# The community's tools look for the score under this name, whatever packed it.
	log_score(log, "final_int8_zlib_roundtrip", scores.get("sliding", scores["plain"]))
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
		remedy = "choose another RUN_ID or RUN_DIR"
		raise SettingsError(f"RUN_DIR={folder}: no place for a run: {error}; {remedy}") from None
	return folder


FAILURES = (  # error, status, exit status; the first that fits
	(SettingsError, "settings", 2),
	(DataError, "data", 2),
	((torch.OutOfMemoryError, MemoryError), "out of memory", 3),
	(DivergenceError, "diverged", 4),
	(KeyboardInterrupt, "interrupted", 5),
	(BaseException, "failed", 6),
)


def main(argv: Sequence[str], env: Mapping[str, str]) -> int:
	"""The program; 0 done, 1 over a limit, and FAILURES."""
	parser = argparse.ArgumentParser(
		description=__doc__.partition("\n")[0],
		epilog="Settings are environment variables:\n\n" + settings_table(),
		formatter_class=argparse.RawDescriptionHelpFormatter,
	)
	parser.add_argument("--eval", metavar="ARTIFACT", type=Path, help="score an artifact again")
	artifact = parser.parse_args(argv).eval
	log, result = Log(), {"status": "ok"}
	try:
		h = Hyperparameters.from_env(env)
		notes = settings_notes(h, env)
		if artifact:
			h, _ = load_artifact(artifact, h)
			notes = [note for note in notes if not note.startswith("rule")]
		else:
			log = Log(open_folder(h))
			log.line(f"{log.folder}/train.log")
			result["settings"] = asdict(h)
		rt = Runtime.start(h, env)
		for note in (*notes, *rt.notes):
			log.line(note)
		data = load_data(h, log, training=not artifact)
		if artifact:
			score_artifact(artifact, h, rt, data, log)
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
