"""Train, shrink and score a language model for the OpenAI Parameter Golf challenge, in one file.

Of models that fit in 16,000,000 bytes, with this file, after 600 s on 8xH100, the best has the
fewest bits per byte (bpb) on unseen text.

    PRESET=cpu python train_gpt.py  # a laptop, minutes
    torchrun --standalone --nproc_per_node=8 train_gpt.py  # eight GPUs
    python train_gpt.py --eval logs/<RUN_ID>/final_model.int6.ptz  # score it again

A section uses itself and earlier ones: Settings, Runtime, Data,
Model, Evaluate, Optimizers, Training, Quantize and pack, Run.
B sequences, T tokens, D model width, H query heads, K key/value heads, d head width, V vocabulary.
"""

import argparse
import ctypes
import difflib
import hashlib
import json
import math
import os
import platform
import re
import shutil
import signal
import struct
import sys
import threading
import time
import traceback
from collections import deque
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field, fields, replace
from datetime import timedelta
from functools import partial
from itertools import pairwise, product
from pathlib import Path
from typing import NamedTuple

if __name__ == "__main__" and not {"OMP_WAIT_POLICY", "GOMP_SPINCOUNT"} & os.environ.keys():
	# Threads that spin make a step ten times slower beside a busy process; to be told before torch.
	os.environ |= {"OMP_WAIT_POLICY": "PASSIVE", "GOMP_SPINCOUNT": "1000"}

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.elastic.multiprocessing.errors import ErrorHandler
from torch.nn.attention import SDPBackend, sdpa_kernel

# ---- Settings: what the run is told ----

BYTES_LIMIT = 16_000_000  # the challenge's, for this file and the artifact together
EVAL_SECONDS_LIMIT = 600.0  # the challenge's, for scoring
BYTE_VOCAB = 260  # ids 0-3 are special, 4 + b is byte b
BOS_ID = 1  # opens every document
BYTE_RULES = "VE_ENABLED=0 GPTQ_ENABLED=0 ROPE_TRAIN_SEQ_LEN=4096"  # of bytes, as in PR #832

# Whole configurations, as one would type them.
PRESETS = {
	# A first run: the embedded corpus, minutes on two cores.
	"cpu": "CORPUS=python NUM_LAYERS=2 MODEL_DIM=128 NUM_HEADS=2 NUM_KV_HEADS=1 VE_DIM=32 "
	"BIGRAM_VOCAB_SIZE=16384 BIGRAM_DIM=64 TRAIN_SEQ_LEN=512 TRAIN_BATCH_TOKENS=2048 "
	"ITERATIONS=1600 WARMDOWN_ITERS=960 MAX_WALLCLOCK_SECONDS=0 MATRIX_LR=0.02 EMA_DECAY=0.97 "
	"MUON_MOMENTUM=0.95 UNET_SKIPS=0 TRAIN_LOG_EVERY=100 VAL_LOSS_EVERY=0",
	# PR #832: bytes and the JEPA head, less the defaults.
	"byte_jepa": "VOCAB_SIZE=260 NUM_LAYERS=13 MLP_MULT=2 XSA_LAST_N=4 BIGRAM_VOCAB_SIZE=4096 "
	"BIGRAM_DIM=32 TRAIN_SEQ_LEN=4096 TRAIN_BATCH_TOKENS=393216 ITERATIONS=9000 "
	"WARMDOWN_ITERS=3000 EVAL_STRIDE=512 JEPA_CHUNK_SIZE=8",
	"v9": "",  # PR #1124: the defaults
}


class SettingsError(ValueError):
	"""Settings that cannot be used, a line for each."""


def from_tuples(cls):
	"""A frozen dataclass of tuples: default (and so the type), meaning, bounds or choices."""
	tuples = {name: x for name, x in vars(cls).items() if type(x) is tuple and name[0] != "_"}
	cls.__annotations__ = {name: type(default) for name, (default, *_) in tuples.items()}
	for name, (default, doc, *legal) in tuples.items():
		doc += "".join(f" ({choices})" for choices in legal if type(default) is str)
		setattr(cls, name, field(default=default, metadata={"doc": doc, "legal": legal}))
	return dataclass(frozen=True)(cls)


@from_tuples
class ModelSettings:
	"""What the model is: these travel in the artifact."""

	# Data
	corpus = "fineweb10B", "data set family, for both paths"
	vocab_size = 1024, "tokens; 260: bytes", 5, 65_536
	train_seq_len = 2048, "tokens a sequence", 2
	# Model
	num_layers = 11, "blocks", 1, 200
	model_dim = 512, "width of the stream", 2
	num_heads = 8, "query heads", 1
	num_kv_heads = 4, "key/value heads (GQA)", 1
	mlp_mult = 3.0, "MLP width over MODEL_DIM", 0.01
	negative_slope = 0.5, "leaky_relu(., slope)^2; 0: relu^2", 0, 1
	logit_softcap = 30.0, "c in c tanh(logits / c)", 0.01
	rope_base = 10_000.0, "RoPE base", 1
	rope_dims = 16, "rotated dims of a head; 0: all"
	rope_train_seq_len = 1024, "longer ones stretch the base (NTK)", 1
	xsa_last_n = 11, "last layers with exclusive attention"
	ln_scale = True, "norms times 1/sqrt(layer + 1)"
	unet_skips = True, "late layers read early ones"
	smear_gate = True, "mix in the token before"
	bigram_vocab_size = 2048, "BigramHash buckets; 0: none"
	bigram_dim = 128, "BigramHash width", 1
	bos_mask = True, "pairs stop at BOS; 0: as published"
	ve_enabled = True, "value embeddings"
	ve_dim = 128, "their width", 1
	ve_layers = "", "their layers, as 9,10; empty: the last two"
	# JEPA head (PR #832)
	jepa_chunk_size = 0, "positions a latent stands for; 0: no JEPA"
	jepa_latent_dim = 256, "width of a latent", 1
	jepa_proj_hidden = 256, "hidden width of projector", 1


@from_tuples
class Hyperparameters(ModelSettings):
	"""Every setting; the upper-cased name is the environment variable."""

	# Run; the defaults are the stack of PR #1124
	preset = "", "a whole configuration", " ".join(PRESETS)
	run_id = "", "empty: date, time, seed"
	run_dir = "", "empty: logs/<RUN_ID>"
	checkpoint_every = "0", "steps, or seconds as 60s, between checkpoints; 0: none"
	resume = "", "a checkpoint to go on from; auto: the run's own, if any"
	seed = 1337, "of the initial weights"
	attn = "auto", "attention", "auto fa3 cudnn flash math"
	compile = "auto", "torch.compile; auto: on CUDA", "auto 0 1"
	# Data
	data_path = "", "shards; empty: ./data/datasets/<CORPUS>_sp<VOCAB_SIZE>"
	tokenizer_path = "", "empty: ./data/tokenizers/<CORPUS>_<VOCAB_SIZE>_bpe.model"
	train_batch_tokens = 786_432, "tokens a step", 2
	micro_batch_tokens = 98_304, "most tokens in one pass", 1
	# Model
	tied_embed_init_std = 0.005, "std of the token embedding, which is the head too"
	qk_gain_init = 1.5, "initial gain of q, per head", -1e18
	# JEPA head (PR #832)
	jepa_lambda_max = 0.001, "peak weight of its losses; 0: random latents"
	jepa_phase1_frac = 0.3, "part of the run before they start", 0, 1
	jepa_phase2_frac = 0.5, "next part: rise to the peak; then none", 1e-9, 1
	jepa_backbone_grad = False, "its losses teach the backbone"
	jepa_sigreg = "published", "SIGReg", "published lejepa"
	jepa_sigreg_weight = 0.02, "of SIGReg beside the prediction error"
	jepa_lr = 0.001, "AdamW: JEPA head"
	# Training loss
	label_smoothing = 0.0, "of targets, in training only", 0, 0.99
	# Optimizers
	matrix_lr = 0.025, "Muon: block matrices"
	scalar_lr = 0.025, "AdamW: gains, gates, small projections"
	tied_embed_lr = 0.035, "AdamW: embeddings"
	beta1 = 0.9, "AdamW", 0, 0.9999
	beta2 = 0.95, "AdamW", 0, 0.99999
	adam_eps = 1e-8, "AdamW"
	adam_wd = 0.04, "AdamW weight decay"
	muon_wd = 0.04, "Muon weight decay"
	muon_momentum = 0.99, "Muon momentum, once warm", 0, 0.9999
	muon_momentum_warmup_start = 0.92, "at the start", 0, 0.9999
	muon_momentum_warmup_steps = 1500, "steps from start to warm"
	muon_backend_steps = 5, "Newton-Schulz iterations", 1
	grad_clip_norm = 0.3, "largest gradient norm; 0: any"
	ema_enabled = True, "end with a moving average"
	ema_decay = 0.997, "its decay; at most (1 + t)/(10 + t)", 0, 0.999999
	# Schedule
	iterations = 20_000, "most steps"
	max_wallclock_seconds = 600.0, "most training seconds; 0: any"
	warmup_steps = 20, "steps thrown away before"
	warmdown_iters = 3500, "last steps: the rates fall to 0"
	warmdown_max_fraction = 0.6, "at most this part of the run", 0, 1
	val_loss_every = 4000, "steps between; 0: the last only"
	train_log_every = 500, "steps between lines; 0: the first ten"
	# Evaluate
	eval_seq_len = 0, "tokens a window; 0: TRAIN_SEQ_LEN"
	eval_stride = 64, "of the sliding window; 0: no sliding pass"
	eval_window = 0, "tokens of the one-pass score's window; 0: none", 0, 1e9
	val_batch_size = 524_288, "tokens scored at once / 8 ranks", 1
	ttt_enabled = False, "score again, learning from scored chunks"
	ttt_chunk_tokens = 32_768, "tokens of a chunk", 2
	ttt_epochs = 3, "times it is learned from"
	ttt_lr = 0.002, "SGD, falling to 0 as half a cosine"
	# Quantize and pack
	gptq_enabled = True, "GPTQ for the matrices; 0: rounding"
	gptq_calib = "random", "what GPTQ reads", "random train"
	gptq_calib_tokens = 131_072, "that GPTQ reads", 1
	gptq_reserve_seconds = 14.0, "of the cap, for GPTQ_CALIB=train"

	def __post_init__(self):
		check_settings(self)

	@classmethod
	def from_env(cls, env):
		"""By environment, else PRESET, else rule of VOCAB_SIZE, else default."""
		env = assignments(PRESETS.get(env.get("PRESET"), "")) | env
		if parse_value(env.get("VOCAB_SIZE", ""), int) == BYTE_VOCAB:
			env = assignments(BYTE_RULES) | env
		given = {f: env[f.name.upper()] for f in fields(cls) if f.name.upper() in env}
		return cls(**{f.name: parse_value(text, f.type) for f, text in given.items()})


def assignments(text):
	"""The variables of a line `A=1 B=2`."""
	return dict(pair.split("=", 1) for pair in text.split())


def parse_value(text, kind):
	"""The text as a value of its kind or, at fault, as it is."""
	if kind is bool:
		return {"0": False, "1": True}.get(text, text)
	with suppress(ValueError):
		return kind(text)
	return text


def demand(h, f):
	"""What a setting must be and is not, if anything."""
	kind, legal, value = f.type, f.metadata["legal"], getattr(h, f.name)
	if type(value) is not kind and (kind, type(value)) != (float, int):
		return {bool: "0 or 1", int: "a whole number", float: "a number", str: "text"}[kind]
	if kind is str:
		return legal and value not in (f.default, *legal[0].split()) and f"one of {legal[0]}"
	low, high = legal + [0, 1e18][len(legal) :]
	return not low <= value <= high and f"from {low} to {high}"  # NaN neither


def rules_together(h, world):
	"""Rules for values legal alone, on so many ranks, and which are broken."""
	width, unit = h.model_dim // h.num_heads, h.train_seq_len * world
	near, odd = max(round(h.train_batch_tokens / unit), 1) * unit, h.train_batch_tokens % unit
	unnamed = h.resume == "auto" and not (h.run_id or h.run_dir)
	reserve = h.gptq_reserve_seconds * (h.gptq_enabled and h.gptq_calib == "train")
	cap, every = h.max_wallclock_seconds, re.fullmatch(r"\d+s?", h.checkpoint_every)
	layers = {*h.ve_layers.split(",")} - {"", *map(str, range(h.num_layers))}
	return {
		"MODEL_DIM must be an even multiple of NUM_HEADS": h.model_dim % (2 * h.num_heads),
		"NUM_KV_HEADS must divide NUM_HEADS": h.num_heads % h.num_kv_heads,
		f"ROPE_DIMS must be even and at most {width}": h.rope_dims % 2 or h.rope_dims > width,
		f"TRAIN_BATCH_TOKENS must be a multiple of TRAIN_SEQ_LEN x {world} ranks, as {near}": odd,
		"RUN_ID must be a name without / and ..": re.search(r"[/\\]|\.\.", h.run_id),
		"CHECKPOINT_EVERY must be steps, as 500, or seconds, as 60s": not every,
		"RESUME can be auto only with RUN_ID or RUN_DIR": unnamed,
		"JEPA_CHUNK_SIZE must fit twice in TRAIN_SEQ_LEN": 2 * h.jepa_chunk_size > h.train_seq_len,
		"GPTQ_RESERVE_SECONDS must be below MAX_WALLCLOCK_SECONDS": 0 < cap <= reserve,
		"BIGRAM_VOCAB_SIZE must be 0 (none) or at least 2": h.bigram_vocab_size == 1,
		"VE_LAYERS must be layers below NUM_LAYERS, as 9,10": layers,
	}


def check_settings(h, world=1):
	"""SettingsError with all that is wrong with values or, if nothing, with them together."""
	rules = {f"{f.name.upper()}: must be {x}": x for f in fields(h) if (x := demand(h, f))}
	rules = rules or rules_together(h, world)
	if faults := "\n".join(rule for rule, broken in rules.items() if broken):
		name = r"[A-Z][A-Z_\d]{3,}"  # to which its value is added
		raise SettingsError(re.sub(name, lambda m: f"{m[0]}={getattr(h, m[0].lower())!r}", faults))


def settings_notes(h, env):
	"""What a rule set; variables nearly settings, or not built."""
	names = [f.name.upper() for f in fields(h)]
	notes = [f"rule: VOCAB_SIZE=260 sets {BYTE_RULES}, unless given"] * (h.vocab_size == BYTE_VOCAB)
	for name in sorted(env.keys() - names):
		for near in difflib.get_close_matches(name, names, n=1, cutoff=0.88):
			notes.append(f"warning: {name} is no setting; is {near} meant?")
	left_out = "SWA_ENABLED", "STP_ENABLED", "LATE_QAT_THRESHOLD"
	return notes + [f"warning: {n} is not built" for n in left_out if env.get(n, "").strip("0.")]


def settings_table():
	"""Every setting for --help and README."""
	every = fields(Hyperparameters)
	return "\n".join(f"{f.name.upper():<28}{f.default:<12}{f.metadata['doc']}" for f in every)


def model_settings(h):
	"""The settings that travel in the artifact."""
	return {f.name: getattr(h, f.name) for f in fields(ModelSettings)}


# ---- Runtime: where it runs ----


def ranks():
	"""This process's rank, and how many there are."""
	return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def from_first(make):
	"""What make() gives rank 0, on every rank."""
	values = [make() if ranks()[0] == 0 else None]
	if dist.is_initialized():
		dist.broadcast_object_list(values)
	return values[0]


def summed(tensor, how=dist.ReduceOp.SUM):
	"""The tensor, now the sum, or other reduction, of all ranks'."""
	if dist.is_initialized():
		dist.all_reduce(tensor, how)
	return tensor


def highest(*values):
	"""The largest of all ranks, of each value."""
	return summed(torch.tensor(values, dtype=torch.float64), dist.ReduceOp.MAX).tolist()


def shared_out(function, *stacks):
	"""Outputs [n, ...] of function(*stacks [n, ...] or None), each rank computing some of the n."""
	(rank, world), n = ranks(), len(stacks[0])
	if world == 1 or stacks[0].is_meta:
		return tuple(function(*stacks))
	part, wholes = -(-n // world), []
	mine = torch.arange(rank * part, rank * part + part, device=stacks[0].device).clamp(max=n - 1)
	for output in function(*(x if x is None else x[mine] for x in stacks)):
		raw = output.contiguous().view(torch.uint8)  # not every type travels
		parts = [torch.empty_like(raw) for _ in range(world)]
		dist.all_gather(parts, raw)
		wholes.append(torch.cat(parts)[:n].view(output.dtype))
	return tuple(wholes)


def flat_gradient(params):
	"""One tensor, whose parts are the params' gradients: summed, clipped and cleared at once."""
	flat = torch.zeros(sum(p.numel() for p in params), device=params[0].device)
	for p, part in zip(params, flat.split([p.numel() for p in params])):
		p.grad = part.view_as(p)
	return flat


def join_ranks(env, lost):
	"""Meet the processes of torchrun; a thread calls lost() when one is gone or silent for 30 s."""
	gpus, local = torch.cuda.device_count(), int(env.get("LOCAL_RANK", 0))
	if gpus:
		if local >= gpus:
			raise SettingsError(f"LOCAL_RANK={local}: {gpus} GPUs are here; lower --nproc_per_node")
		torch.cuda.set_device(local)
	try:
		dist.init_process_group("cpu:gloo,cuda:nccl" if gpus else "gloo")
	except ValueError as error:  # a variable is missing
		raise SettingsError(f"{error}; launch several processes by torchrun") from None
	watched = dist.new_group(backend="gloo", timeout=timedelta(seconds=30))

	def watch():
		with suppress(Exception):
			while True:
				time.sleep(1)
				dist.barrier(watched)
		time.sleep(5)  # in which this rank may end by itself
		lost()

	threading.Thread(target=watch, daemon=True).start()


def attend_sdpa(q, k, v, window=0):
	"""Causal attention of q [B, T, H, d] to k and v [B, T, K, d] or, of them, the last `window`."""
	if 0 < window < q.size(1):
		return attend_window(q, k, v, window)
	q, k, v = (x.transpose(1, 2) for x in (q, k, v))
	y = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=q.size(1) != k.size(1))
	return y.transpose(1, 2)


def attend_window(q, k, v, window):
	"""The first positions alone, then blocks of queries, each with all it sees, under one mask."""
	first, rest = attend_sdpa(*(x[:, :window] for x in (q, k, v))), q.size(1) - window
	size, group = -(-window // 8), q.size(2) // k.size(2)
	q, k, v = (F.pad(x, (0,) * 5 + (-rest % size,)) for x in (q[:, window:], k, v))
	k, v = (x.repeat_interleave(group, 2).unfold(1, window + size, size) for x in (k, v))
	q, k, v = (x.mT.flatten(0, 1) for x in (q.unfold(1, size, size), k, v))
	mask = torch.ones(size, window + size, dtype=torch.bool, device=q.device).tril(window).triu(1)
	with sdpa_kernel([SDPBackend.EFFICIENT_ATTENTION, SDPBackend.FLASH_ATTENTION, SDPBackend.MATH]):
		y = F.scaled_dot_product_attention(q, k, v, mask).transpose(1, 2)
	return torch.cat((first, y.reshape(len(first), -1, *y.shape[2:])[:, :rest]), dim=1)


def load_attention(name):
	"""One back end; PyTorch's others are disabled."""
	if name == "fa3":
		from flash_attn_interface import flash_attn_func

		def attend_fa3(q, k, v, window=0):
			y = flash_attn_func(q, k, v, causal=True, window_size=(window - 1, 0))  # -1: all
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
	attend: object  # see attend_sdpa
	compiled: bool
	notes: list[str]  # what was chosen, and why

	@classmethod
	def start(cls, h):
		"""The first attention that runs forward and backward on all ranks; else SettingsError."""
		cuda, notes = torch.cuda.is_available(), []
		device = torch.device("cuda", torch.cuda.current_device()) if cuda else torch.device("cpu")
		generation = torch.cuda.get_device_capability()[0] if cuda else 0
		bf16 = generation >= 8  # else emulated: slow
		if not cuda:
			notes.append("device:cpu, no CUDA GPU is here: not comparable with the records")
			with suppress(AttributeError, OSError, TypeError):  # where it is not glibc
				mallopt = ctypes.CDLL(None).mallopt  # keep what is freed: new pages are slow
				mallopt(-3, 1 << 25)  # M_MMAP_THRESHOLD, its highest
				mallopt(-1, 1 << 30)  # M_TRIM_THRESHOLD
		elif not bf16:
			notes.append("dtype:fp32, this GPU has no bf16")
		dtype = torch.bfloat16 if bf16 else torch.float32
		order = ("fa3", "cudnn", "flash", "math") if generation == 9 else ("flash", "cudnn", "math")
		order = order if h.attn == "auto" else (h.attn,)
		compiles = {"0": [False], "1": [True], "auto": [True, False][not cuda :]}[h.compile]
		heads = (h.num_heads, h.num_kv_heads, h.num_kv_heads)
		shape = (1, h.train_seq_len, sum(heads), h.model_dim // h.num_heads)
		for compiled, name in product(compiles, order):
			try:
				rt = cls(device, dtype, name, load_attention(name), compiled, notes)
				qkv = torch.linspace(-1, 1, math.prod(shape)).view(shape).to(device, dtype)
				q, k, v = qkv.requires_grad_().split(heads, dim=2)
				y = rt.compile(lambda q, k, v: rt.attend(q.sin(), k, v))(q, k, v)  # noqa: B023
				y.sum().backward()
				good = y.isfinite().all() and qkv.grad.isfinite().all()
				fault = "" if good else "it gave NaN"
			except Exception as error:  # the next one may run
				fault = f"{error!r:.200}"
			if not any(highest(len(fault))):
				return rt
			notes.append(f"attention:{name} compiled:{compiled} not used: {fault or 'other rank'}")
			torch.compiler.reset()
		asked = f"ATTN={h.attn} COMPILE={h.compile}: cannot run here; use auto or COMPILE=0"
		raise SettingsError("\n".join((asked, *notes)))

	def compile(self, function):
		"""The function, for fixed shapes if compiled."""
		return torch.compile(function, dynamic=False, fullgraph=True) if self.compiled else function

	def now(self):
		"""Seconds, once all queued work is done."""
		if self.device.type == "cuda":
			torch.cuda.synchronize(self.device)
		return time.perf_counter()

	def describe(self):
		"""Device, choices and versions."""
		cuda = self.device.type == "cuda"
		return {
			"device": torch.cuda.get_device_name(self.device) if cuda else platform.machine(),
			"dtype": str(self.dtype).removeprefix("torch."),
			"attention": self.attention,
			"compiled": self.compiled,
			"torch": torch.__version__,
			"python": platform.python_version(),
		}


def out_of_memory(error):
	"""Whether it was the memory, of a GPU or a CPU, that ran out."""
	return isinstance(error, (MemoryError, torch.OutOfMemoryError)) or "allocate mem" in str(error)


class Log:
	"""Lines for people, events for programs, a moving line."""

	def __init__(self, folder=None, silent=False):
		self.folder, self.silent = folder, silent
		self.watched = not silent and sys.stderr.isatty()

	def append(self, name, text):
		"""Add a line; a full disk ends no run."""
		if self.folder and not self.silent:
			with suppress(OSError), open(self.folder / name, "a", encoding="utf-8") as f:
				f.write(text + "\n")

	def __call__(self, text):
		"""Print and keep a line, unless silent."""
		self.progress("")
		if not self.silent:
			with suppress(OSError):
				print(text, flush=True)
		self.append("train.log", text)

	def event(self, kind, **values):
		"""Keep a JSON object in events.jsonl."""
		self.append("events.jsonl", json.dumps({"event": kind, **values}))

	def progress(self, text):
		"""Show text in place of the last."""
		if self.watched:
			with suppress(OSError):
				print(f"\r\033[K{text}", end="", file=sys.stderr, flush=True)


def write_atomically(path, data):
	"""Write a file whole or not at all."""
	partial = path.with_name(f"{path.name}.{os.getpid()}.part")
	try:
		with open(partial, "wb") as file:
			file.write(data)
			file.flush()
			os.fsync(file.fileno())
		partial.replace(path)
	finally:
		partial.unlink(missing_ok=True)  # on a full disk it would take room


def expect(true, else_fault):
	"""ValueError unless true."""
	if not true:
		raise ValueError(else_fault)


def write_tensors(path, tensors, **texts):
	"""Write a safetensors file: size of its header, types, shapes and texts as JSON, raw floats."""
	head, arrays, end = {"__metadata__": texts}, [t.cpu().numpy() for t in tensors.values()], 0
	for name, array in zip(tensors, arrays):
		at, end = end, end + array.nbytes
		kind = f"F{8 * array.itemsize}"
		head[name] = {"dtype": kind, "shape": array.shape, "data_offsets": (at, end)}
	head = json.dumps(head).encode()
	head += b" " * (-len(head) % 8)
	parts = len(head).to_bytes(8, "little"), head, *arrays
	write_atomically(path, b"".join(parts))


def read_tensors(path):
	"""Tensors, mapped, and texts of such a file; some error unless it is one, and whole."""
	data, tensors = np.memmap(path, mode="c"), {}
	start = end = 8 + int.from_bytes(data[:8].tobytes(), "little")
	expect(start < 1 << 20, "the header is too long")
	head = json.loads(data[8:start].tobytes())
	texts = head.pop("__metadata__")
	for name, of in head.items():
		kind = {"F32": "<f4", "F64": "<f8"}[of["dtype"]]
		array = np.ndarray(of["shape"], kind, data, end)
		at, end = end, end + array.nbytes
		expect(of["data_offsets"] == [at - start, end - start], f"{name} is not in its place")
		tensors[name] = torch.from_numpy(array)
	expect(end == len(data), f"{len(data)} bytes, not {end}")
	return tensors, texts


# ---- Data: what it eats ----

SHARD_MAGIC, SHARD_VERSION, SHARD_HEADER_INTS = 20240520, 1, 256
PROOF_TOKENS = 1_000_000  # on which the byte table must agree with decoded text
VAL_BYTES = 151_080_113  # of the challenge's text, as PR #832 scored it


class DataError(ValueError):
	"""A shard, tokenizer or artifact that cannot be used."""


@contextmanager
def refused(why):
	"""DataError for whatever a damaged file raises."""
	try:
		yield
	except Exception as error:
		raise DataError(f"{why}: {error!r:.300}") from None


def read_shard(path):
	"""Tokens uint16 [count], mapped from disk, after 256 int32: magic, version, count, zeros."""
	header = np.fromfile(path, dtype="<i4", count=SHARD_HEADER_INTS)
	magic, version, count = (*header.tolist(), 0, 0, 0)[:3]
	expected, size = 4 * SHARD_HEADER_INTS + 2 * count, path.stat().st_size
	if (magic, version) != (SHARD_MAGIC, SHARD_VERSION) or count <= 0 or size != expected:
		found = f"magic {magic}, version {version}, {size} bytes, but {count} tokens need"
		raise DataError(f"{path}: no whole shard: {found} {expected}; make or fetch it again")
	return np.memmap(path, "<u2", "r", offset=4 * SHARD_HEADER_INTS, shape=(count,))


class TokenStream:
	"""The shards of a split in name order, again and again."""

	def __init__(self, folder, split, vocab_size):
		self.pattern, self.vocab_size = folder / f"fineweb_{split}_*.bin", vocab_size
		self.shards = [(path, read_shard(path)) for path in sorted(folder.glob(self.pattern.name))]
		if not self.shards:
			remedy = "make PRESET=cpu's by data/prepare.py, fetch others by data/download.py"
			raise DataError(f"DATA_PATH={folder}: no {self.pattern.name} there; {remedy}")
		self.ends = np.cumsum([len(shard) for _, shard in self.shards])

	def __len__(self):
		return self.ends[-1]

	def check(self, log, reach, rank=0, world=1):
		"""Warn of missing shards; DataError for an id of shards rank::world of `reach` tokens."""
		here, last = len(self.shards), self.shards[-1][0].stem[-6:]
		if last.isdecimal() and here <= int(last):
			log(f"warning: {self.pattern}: {here} of {int(last) + 1} shards are here")
		for path, shard in self.shards[: np.searchsorted(self.ends, reach) + 1][rank::world]:
			log.progress(f"checking {path}")
			if (largest := int(shard.max())) >= self.vocab_size:
				raise DataError(f"{path}: id {largest}, VOCAB_SIZE={self.vocab_size}; change one")

	def read(self, position, count, dtype=np.int64):
		"""Tokens [count] from a position on."""
		tokens, filled = np.empty(count, dtype), 0
		while filled < count:
			at = (position + filled) % len(self)
			index = np.searchsorted(self.ends, at, "right")
			part = self.shards[index][1][at - self.ends[index] :][: count - filled]
			tokens[filled : filled + len(part)] = part
			filled += len(part)
		return torch.from_numpy(tokens)

	def batch(self, step, h):
		"""Inputs and targets int64 [sequences, T] of a step."""
		tokens = self.read(step * h.train_batch_tokens, h.train_batch_tokens + 1)
		return tokens[:-1].view(-1, h.train_seq_len), tokens[1:].view(-1, h.train_seq_len)


def micro_batches(h):
	"""The fewest parts of this rank's share of a step within MICRO_BATCH_TOKENS."""
	rows = h.train_batch_tokens // h.train_seq_len // ranks()[1]
	most = max(h.micro_batch_tokens // h.train_seq_len, 1)
	return next(n for n in range(1, rows + 1) if rows % n == 0 and rows // n <= most)


class ByteTable(NamedTuple):
	"""Bytes of text of each token: the only byte accounting."""

	size: Tensor  # int16 [V]; 0: a special token, as BOS
	space: Tensor  # int16 [V]: 1 for a leading space, which decoders drop after no text

	def count(self, previous, target):
		"""Bytes int16 of each target after its previous token."""
		return self.size[target] - self.space[target] * (self.size[previous] == 0)

	@classmethod
	def of_tokenizer(cls, tokenizer):
		"""A sentencepiece processor's."""
		rows = []
		for i in range(tokenizer.vocab_size()):
			special = tokenizer.is_control(i) or tokenizer.is_unknown(i) or tokenizer.is_unused(i)
			size = decoded = int(not special)
			if not (special or tokenizer.is_byte(i)):
				size = len(tokenizer.id_to_piece(i).replace("\u2581", " ").encode())
				decoded = len(tokenizer.decode([i]).encode())
			rows.append((size, size - decoded))
		return cls(*torch.tensor(rows, dtype=torch.int16).unbind(1))


def prove_byte_table(table, tokenizer, tokens):
	"""Bytes on which table and decoder agree, else DataError."""
	head = tokens[:PROOF_TOKENS]
	counts = table.count(head[:-1], head[1:]).long()
	edges = (table.size[head] == 0).nonzero().flatten().tolist()
	if len(head) == len(tokens):
		edges.append(len(head))  # else the last text may end within a character
	proven = 0
	for start, end in pairwise(edges):
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
	canonical: bool = False  # val is the challenge's text


def load_data(h, log, training=True):
	"""Open and check the splits, of training shards this rank's part; prove the byte table."""
	kind = "byte" if h.vocab_size == BYTE_VOCAB else "sp"
	folder = Path(h.data_path or f"./data/datasets/{h.corpus}_{kind}{h.vocab_size}")
	if re.search(rf"_(sp|byte)(?!{h.vocab_size}$)\d+$", folder.name):
		raise DataError(f"DATA_PATH={folder}: not of VOCAB_SIZE={h.vocab_size}; change one")
	val_stream = TokenStream(folder, "val", h.vocab_size)
	val_stream.check(log, len(val_stream))
	val = val_stream.read(0, len(val_stream), np.int32)
	if len(val) <= (h.eval_seq_len or h.train_seq_len):
		raise DataError(f"{folder}: {len(val)} validation tokens are no window; lower EVAL_SEQ_LEN")
	if kind == "byte":
		size = (torch.arange(BYTE_VOCAB) >= 4).short()
		table, proven = ByteTable(size, 0 * size), True
		log(f"val_bpb:enabled tokenizer_kind=byte260 vocab_size={BYTE_VOCAB}")
	else:
		import sentencepiece

		family = h.corpus.removesuffix("10B")
		path = h.tokenizer_path or f"./data/tokenizers/{family}_{h.vocab_size}_bpe.model"
		try:
			tokenizer = sentencepiece.SentencePieceProcessor(model_file=path)
		except Exception as error:  # any, by version
			raise DataError(f"TOKENIZER_PATH={path}: {error}; fetch it with its data") from None
		if (pieces := tokenizer.vocab_size()) != h.vocab_size:
			raise DataError(f"{path}: {pieces} pieces, VOCAB_SIZE={h.vocab_size}; change one")
		table = ByteTable.of_tokenizer(tokenizer)
		proven = prove_byte_table(table, tokenizer, val)
		log(f"val_bpb:enabled tokenizer_kind=sentencepiece tokenizer_path={path}")
		log(f"byte_table:proven against {proven} bytes of decoded text")
	log(f"val_loader:shards pattern={val_stream.pattern} tokens:{len(val) - 1}")
	nbytes = int(table.count(val[:-1], val[1:]).sum())
	if not (proven and nbytes):
		raise DataError(f"{folder}: the validation tokens hold no text that follows BOS")
	canonical = math.isclose(nbytes, VAL_BYTES, rel_tol=1e-4)  # less a cut last window
	if h.corpus == "fineweb10B" and not canonical:
		log(f"warning: {nbytes} bytes of validation text, not the challenge's {VAL_BYTES}")
	train_stream = TokenStream(folder, "train", h.vocab_size) if training else None
	if training:
		reach = h.iterations * h.train_batch_tokens + h.gptq_calib_tokens + h.train_seq_len
		train_stream.check(log, reach, *ranks())
		for (one, a), (other, b) in product(val_stream.shards, train_stream.shards):
			if np.array_equal(a[:1000], b[:1000]):
				raise DataError(f"{one}: as {other}: what is trained on cannot be scored")
		log(f"train_loader:dataset:{folder.name} train_shards:{len(train_stream.shards)}")
	return Data(val, table, train_stream, canonical)


# ---- Model: what it is ----


def rms_norm(x):
	"""x over its root mean square; torch's default eps has changed."""
	return F.rms_norm(x, (x.size(-1),), eps=1.2e-7)


class Part(nn.Module):
	"""A part of the model of `h`."""

	role = "scalar"  # of its own parameters: how they are learned and stored, see ROLE_POLICY

	def __init__(self, h):
		super().__init__()
		self.h = h


class Linear(nn.Linear):
	"""Bias-free; starts orthogonal times `gain` or, for None, uniform within 1/sqrt(in)."""

	def __init__(self, fan_in, fan_out, gain=1.0, role="matrix"):
		super().__init__(fan_in, fan_out, bias=False)
		self.role = role
		if gain is not None:
			nn.init.orthogonal_(self.weight, gain) if gain else nn.init.zeros_(self.weight)

	def forward(self, x):
		"""x [..., in] to [..., out], in its dtype."""
		return F.linear(x, self.weight.to(x.dtype))


class Embedding(nn.Embedding):
	"""A table [count, width], normal."""

	role = "embed"

	def __init__(self, count, width, std):
		super().__init__(count, width, _weight=torch.empty(count, width).normal_(std=std))


def rotary_angles(h, length, reach, device):
	"""cos and sin [2, T, 1, n/2] of the n rotated dims; NTK, as in the records, by the reach."""
	dims, base = h.rope_dims or h.model_dim // h.num_heads, h.rope_base
	if reach > h.rope_train_seq_len and dims > 2:
		base *= (reach / h.rope_train_seq_len) ** (dims / (dims - 2))
	frequencies = base ** (-torch.arange(0, dims, 2, device=device) / dims)
	angles = torch.arange(length, device=device)[:, None, None] * frequencies
	return torch.stack((angles.cos(), angles.sin()))


def rotate(x, rotation):
	"""RoPE on the first n dims of x [B, T, heads, d], in pairs (i, i + n/2)."""
	cos, sin = rotation.to(x.dtype)
	half = cos.size(-1)
	a, b, rest = x.split((half, half, x.size(-1) - 2 * half), dim=-1)
	return torch.cat((a * cos + b * sin, b * cos - a * sin, rest), dim=-1)


class CausalSelfAttention(Part):
	"""Grouped-query attention with partial RoPE and, in late layers, XSA (arXiv 2603.09078)."""

	def __init__(self, h, layer, attend):
		super().__init__(h)
		self.head_dim = h.model_dim // h.num_heads
		self.c_q = Linear(h.model_dim, h.model_dim)
		self.c_k = Linear(h.model_dim, self.head_dim * h.num_kv_heads)
		self.c_v = Linear(h.model_dim, self.head_dim * h.num_kv_heads)
		self.proj = Linear(h.model_dim, h.model_dim, gain=0)
		self.q_gain = nn.Parameter(torch.ones(h.num_heads, 1) * h.qk_gain_init)
		self.xsa = layer >= h.num_layers - h.xsa_last_n
		self.attend = attend

	def forward(self, x, rotation, extra):
		"""Attend within x [B, T, D]; `extra` [B, T, K d] joins the values."""
		heads = (*x.shape[:2], -1, self.head_dim)
		q = rotate(rms_norm(self.c_q(x).view(heads)), rotation) * self.q_gain.to(x.dtype)
		k = rotate(rms_norm(self.c_k(x).view(heads)), rotation)
		v = (self.c_v(x) + extra).view(heads)
		y = self.attend(q, k, v)
		if self.xsa:  # y less its part along its position's v
			y, unit = y.unflatten(2, (v.size(2), -1)), F.normalize(v.float(), dim=-1).unsqueeze(3)
			along = (y.float() * unit).sum(-1, keepdim=True)
			y = y - (along * unit).to(y.dtype)
		return self.proj(y.flatten(2))


class MLP(Part):
	"""Two maps around leaky_relu(., slope)^2."""

	def __init__(self, h):
		super().__init__(h)
		width = max(int(h.mlp_mult * h.model_dim), 1)
		self.up = Linear(h.model_dim, width)
		self.down = Linear(width, h.model_dim, gain=0)

	def forward(self, x):
		"""Shape [..., D] is kept."""
		return self.down(F.leaky_relu(self.up(x), self.h.negative_slope).square())


class SmearGate(Part):
	"""Each position mixed with the one before."""

	def __init__(self, h):
		super().__init__(h)
		self.gate = nn.Parameter(torch.zeros(h.model_dim))

	def forward(self, x, ids):
		"""Smear x [B, T, D]; nothing precedes the first token or, masked, BOS."""
		fresh = (ids[..., None] == BOS_ID) & self.h.bos_mask
		before = F.pad(x[:, :-1], (0, 0, 1, 0)).masked_fill(fresh, 0)
		return torch.lerp(x, before, self.gate.sigmoid().to(x.dtype))


class BigramHash(Part):
	"""A learned vector for each hashed pair."""

	def __init__(self, h):
		super().__init__(h)
		self.embed = Embedding(h.bigram_vocab_size, h.bigram_dim, std=0.0)
		# Not 0 as in PR #832: beside a table of 0 both would stay 0 for ever.
		self.proj = Linear(h.bigram_dim, h.model_dim, (2 * h.num_layers) ** -0.5, "scalar")
		self.scale = nn.Parameter(torch.tensor(0.05))

	def forward(self, ids):
		"""Vectors [B, T, D] of ids [B, T]; where none stands before, that of the last bucket."""
		last, ids = self.h.bigram_vocab_size - 1, ids.int()
		pairs = (36_313 * ids[:, 1:] ^ 27_191 * ids[:, :-1]) % last
		fresh = (ids[:, 1:] == BOS_ID) & self.h.bos_mask
		buckets = F.pad(pairs.masked_fill(fresh, last), (1, 0), value=last)
		return self.proj(self.embed(buckets)) * self.scale


class ValueEmbedding(Part):
	"""A second embedding, which some layers add to their values."""

	def __init__(self, h):
		super().__init__(h)
		kv_dim = h.model_dim // h.num_heads * h.num_kv_heads
		self.embed = Embedding(h.vocab_size, h.ve_dim, std=0.01)
		self.proj = Linear(h.ve_dim, kv_dim, (2 * h.num_layers) ** -0.5, "scalar")
		self.scale = nn.Parameter(torch.tensor(0.1))
		named = {int(n) for n in h.ve_layers.split(",") if n}
		self.layers = sorted(named or range(h.num_layers)[-2:])
		self.layer_scales = nn.Parameter(torch.ones(len(self.layers)))

	def forward(self, ids, dtype):
		"""What each layer adds, [B, T, K d]."""
		value = self.proj(self.embed(ids)) * self.scale
		return {n: (value * self.layer_scales[i]).to(dtype) for i, n in enumerate(self.layers)}


class Block(Part):
	"""Mix in the embedding, then attention and MLP."""

	def __init__(self, h, layer, attend):
		super().__init__(h)
		self.attn = CausalSelfAttention(h, layer, attend)
		self.mlp = MLP(h)
		self.attn_scale = nn.Parameter(torch.ones(h.model_dim))
		self.mlp_scale = nn.Parameter(torch.ones(h.model_dim))
		self.resid_mix = nn.Parameter(torch.tensor([[1.0], [0.0]]).repeat(1, h.model_dim))
		self.norm_scale = (layer + 1) ** -0.5 if h.ln_scale else 1.0

	def forward(self, x, x0, rotation, extra):
		"""The stream x [B, T, D] after this layer; x0: before the first."""
		keep, restart = self.resid_mix.to(x.dtype)
		x = keep * x + restart * x0
		attended = self.attn(rms_norm(x) * self.norm_scale, rotation, extra)
		x = x + self.attn_scale.to(x.dtype) * attended
		return x + self.mlp_scale.to(x.dtype) * self.mlp(rms_norm(x) * self.norm_scale)


def sigreg(z, directions, knots, form, parts=1):
	"""How far rows of z [N / parts, n] are from samples of N(0, I): a float32 scalar.

	Along unit columns [n, P] their characteristic function is held against exp(-t^2/2) at `knots`
	points (Epps-Pulley). "lejepa" (arXiv 2511.08544): N times the integral under that Gaussian.
	"published" (PR #832): a mean, blind to the rows' mean and scale.
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


class JEPA(Part):
	"""Predicts the latent of each chunk of positions from that of the chunk before (PR #832).

	A latent is a chunk's projected mean, or `start` before the first; predictions enter the stream.
	Squared error and SIGReg teach projector and predictor, cross-entropy the injection.
	"""

	role, learns = "aux", False
	DIRECTIONS, KNOTS = 256, 17  # of SIGReg

	def __init__(self, h):
		super().__init__(h)
		latent = h.jepa_latent_dim

		def mlp(fan_in, hidden):
			into, out = Linear(fan_in, hidden, None, "aux"), Linear(hidden, latent, None, "aux")
			return nn.Sequential(into, nn.RMSNorm(hidden, 1.2e-7, False), nn.SiLU(), out)

		self.projector, self.predictor = mlp(h.model_dim, h.jepa_proj_hidden), mlp(latent, latent)
		self.start = nn.Parameter(torch.empty(1, latent).normal_(std=0.02))
		self.inject = Linear(latent, h.model_dim, 0, "aux")

	def prepare(self, weight, step):
		"""Set lambda for a step; LeJEPA draws new directions for each."""
		h, device, self.learns = self.h, self.start.device, weight > 0
		weights = torch.tensor((weight, weight * h.jepa_sigreg_weight))
		self.weights = weights.to(device, non_blocking=True)  # a number would be compiled in
		draw = torch.Generator(device).manual_seed(h.seed + step * (h.jepa_sigreg == "lejepa"))
		shape = h.jepa_latent_dim, self.DIRECTIONS
		self.directions = F.normalize(torch.randn(shape, generator=draw, device=device), dim=0)

	def forward(self, x):
		"""The stream x [B, T, D] with predictions; losses [2] while it learns."""
		h, size = self.h, self.h.jepa_chunk_size
		count, rest = divmod(x.size(1), size)
		read = x if h.jepa_backbone_grad else x.detach()
		latents = self.projector(read[:, : count * size].unflatten(1, (count, size)).mean(2))
		start = self.start.to(latents.dtype).expand(len(x), 1, -1)
		predicted = self.predictor(torch.cat((start, latents), dim=1)[:, :-1])
		added = self.inject(predicted.detach()).repeat_interleave(size, dim=1)
		x = x + F.pad(added, (0, 0, 0, rest))
		if not (self.training and self.learns):
			return x, None
		error = F.mse_loss(predicted.float(), latents.detach().float())
		parts = h.train_batch_tokens / x.shape[:2].numel()  # of all ranks
		form = self.directions, self.KNOTS, h.jepa_sigreg, parts
		return x, torch.stack((error, sigreg(latents.flatten(0, 1), *form)))


class GPT(Part):
	"""The model of `h`: float32, activations in `dtype`, attending over the `window`, or all."""

	def __init__(self, h, attend=attend_sdpa, dtype=torch.float32, window=0):
		super().__init__(h)
		self.dtype, self.window = dtype, window
		attend = partial(attend, window=window) if window else attend
		self.tok_emb = Embedding(h.vocab_size, h.model_dim, h.tied_embed_init_std)
		self.bigram = BigramHash(h) if h.bigram_vocab_size else None
		self.smear = SmearGate(h) if h.smear_gate else None
		self.value_embedding = ValueEmbedding(h) if h.ve_enabled else None
		self.blocks = nn.ModuleList(Block(h, layer, attend) for layer in range(h.num_layers))
		self.skip_weights = nn.Parameter(torch.ones(h.num_layers // 2 * h.unet_skips, h.model_dim))
		self.jepa = JEPA(h) if h.jepa_chunk_size else None

	def prepare(self, weight, step):
		"""Set lambda of JEPA for a step."""
		if self.jepa:
			self.jepa.prepare(weight, step)

	def hidden(self, ids):
		"""Normed last states [B, T, D] of ids [B, T]; auxiliary losses, if any."""
		x = self.tok_emb(ids)
		if self.bigram:
			x = x + self.bigram(ids)
		x = rms_norm(x.to(self.dtype))
		if self.smear:
			x = self.smear(x, ids)
		length = ids.size(1)
		x0, rotation = x, rotary_angles(self.h, length, self.window or length, ids.device)
		values = self.value_embedding(ids, self.dtype) if self.value_embedding else {}
		# U-Net: outputs of the first half enter the second, last one first.
		half, outputs = len(self.blocks) // 2, []
		for layer, block in enumerate(self.blocks):
			if layer >= half and outputs:
				x = x + self.skip_weights[layer - half].to(x.dtype) * outputs.pop()
			x = block(x, x0, rotation, values.get(layer, 0))
			if layer < len(self.skip_weights):
				outputs.append(x)
		x, auxiliary = self.jepa(x) if self.jepa else (x, None)
		return rms_norm(x), auxiliary

	def logits(self, x):
		"""Soft-capped float32 [..., V] of [..., D]."""
		cap = self.h.logit_softcap
		head = (self.tok_emb.weight / cap).to(x.dtype)  # fewer in training than logits
		return F.linear(x, head).float().tanh_() * cap  # in place: V is large

	def forward_logits(self, ids, last=0):
		"""Logits [B, T, V] of ids [B, T] or of their `last` positions."""
		return self.logits(self.hidden(ids)[0][:, -last:])

	def losses(self, ids, targets):
		"""The loss to descend and its terms, cross-entropy first, in nats."""
		smoothing = self.training * self.h.label_smoothing
		x, auxiliary = self.hidden(ids)
		logits = self.logits(x).flatten(0, 1)
		loss = F.cross_entropy(logits, targets.flatten(), label_smoothing=smoothing)
		terms = {"train_loss": loss}
		if auxiliary is not None:
			loss = loss + auxiliary @ self.jepa.weights
			terms["jepa_error"], terms["jepa_sigreg"] = auxiliary
		return loss, terms

	def forward(self, ids, targets):
		"""The loss, a scalar."""
		return self.losses(ids, targets)[0]


def parameter_roles(model):
	"""Role by parameter name, that of its module; AttributeError for a module without."""
	return {n: model.get_submodule(n.rpartition(".")[0]).role for n, _ in model.named_parameters()}


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
	stride: int


def plan_windows(total, seq_len, stride, size, chunk):
	"""Batches int64 [n, 2], n at most size, of windows (start, how many last positions it scores).

	Each ends stride after the one before, or at the end, and scores what that did not; a batch's
	begin scoring in one chunk. Sliding, the first scores all and is alone; empty ones fill batches.
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
def evaluate(forward_logits, data, h, rt, log, stride=0, learn=None):
	"""Score the validation split: the only loop from logits to a score.

	forward_logits(ids [B, T], last) gives logits [B, last, V]; without a stride windows lie side by
	side. learn gets each scored chunk, [TTT_CHUNK_TOKENS + 1], but the last, and how far that is.
	"""
	began, total, (rank, world) = rt.now(), len(data.val) - 1, ranks()
	seq_len = min(h.eval_seq_len or h.train_seq_len, total)
	stride = stride or seq_len
	most = 4096 if rt.device.type == "cpu" else math.inf  # more spills a CPU's caches
	size = max(min(h.val_batch_size // 8, most) // seq_len, 1)
	chunk, learned = max(h.ttt_chunk_tokens, seq_len) if learn else total, 0
	batches = plan_windows(total, seq_len, stride, size, chunk)
	tokens, table = data.val.to(rt.device), ByteTable(*(t.to(rt.device) for t in data.table))
	offsets = torch.arange(seq_len + 1, device=rt.device)
	sums = torch.zeros(3, dtype=torch.float64, device=rt.device)

	def add(batch, last):  # nats, tokens and bytes of windows [n, 2]
		starts, counts = batch.to(rt.device).unsqueeze(-1).unbind(1)
		ids = tokens[starts + offsets].long()
		inputs, targets = ids[:, :-1], ids[:, -last:]
		logits = forward_logits(inputs, last).flatten(0, 1)
		nats = F.cross_entropy(logits, targets.flatten(), reduction="none")
		nbytes = table.count(inputs[:, -last:], targets)
		scored = offsets[:last] >= last - counts
		columns = torch.stack((nats.view_as(nbytes).double(), scored, nbytes))
		sums.add_(columns.where(scored, 0).sum((1, 2)))

	for n, batch in enumerate(batches):  # alike for any number of ranks
		start, count = batch[0].tolist()
		if (at := (start + seq_len - count) // chunk) > learned:
			learn(tokens[learned * chunk : at * chunk + 1], learned * chunk / total)
			learned = at
		rest = batch.split(size) if n % world == rank else ()
		while rest:
			try:
				add(rest[0], stride if n else seq_len)
				rest = rest[1:]
			except Exception as error:
				if len(rest[0]) == 1 or not out_of_memory(error):
					raise
				size = len(rest[0]) // 2
				log(f"out of memory: scoring {size} windows at once; lower VAL_BATCH_SIZE")
				rest = torch.cat(rest).split(size)
		log.progress(f"scoring batch {n + 1} of {len(batches)}")
	nats, count, nbytes = summed(sums).tolist()
	if count != total:
		raise RuntimeError(f"scored {count:.0f} tokens of {total}")
	if not math.isfinite(nats):
		raise DivergenceError("the score is no finite number: the weights have diverged")
	bpb = nats / math.log(2) / nbytes
	return Score(nats / total, bpb, nats, total, int(nbytes), rt.now() - began, stride)


def test_time_learner(model, h, rt):
	"""What learns from a scored chunk: SGD, its rate falling as half a cosine (PR #549)."""
	params = [*model.parameters()]
	sgd, loss_of = torch.optim.SGD(params, h.ttt_lr, 0.9), rt.compile(model)
	seq_len, gradient = h.eval_seq_len or h.train_seq_len, flat_gradient(params)
	rank, world = ranks()

	@torch.inference_mode(False)
	def learn(tokens, done):
		sgd.param_groups[0]["lr"] = h.ttt_lr * (1 + math.cos(math.pi * done)) / 2
		rows = (len(tokens) - 1) // seq_len
		inputs, targets = (tokens[i:][: rows * seq_len].long().view(rows, -1) for i in (0, 1))
		for x, y in h.ttt_epochs * list(zip(inputs.split(32), targets.split(32))):
			if len(x) > rank:
				mine = x[rank::world], y[rank::world]
				(loss_of(*mine) * (len(mine[0]) / len(x))).backward()
			gradient.mul_((1 / (summed(gradient).norm() + 1e-6)).clamp(max=1))
			sgd.step()
			gradient.zero_()

	return learn


# ---- Optimizers: how it learns ----

# By role: settings of rate and decay ("": none); bits, of codes with a scale a row or 16: float16.
ROLE_POLICY = {
	"matrix": ("matrix_lr", "muon_wd", 6),  # by Muon, the others by AdamW
	"embed": ("tied_embed_lr", "adam_wd", 8),
	"scalar": ("scalar_lr", "adam_wd", 16),
	"aux": ("jepa_lr", "", 8),
}


def newton_schulz(matrices, steps):
	"""About U V^T of each U S V^T of a stack [n, rows, cols] (Jordan et al. 2024, Muon)."""
	a, b, c = 3.4445, -4.7750, 2.0315
	x = matrices / (matrices.norm(dim=(-2, -1), keepdim=True) + 1e-7)
	tall = x.size(-2) > x.size(-1)
	x = x.mT if tall else x
	for _ in range(steps):
		gram = x @ x.mT
		x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
	return x.mT if tall else x


class Muon:
	"""Nesterov momentum, orthogonalised in one stack a shape."""

	def __init__(self, matrices, weight_decay, ns_steps, dtype):
		shapes = sorted({p.shape for p in matrices})
		self.stacks = [[p for p in matrices if p.shape == shape] for shape in shapes]
		self.momenta = [torch.zeros_like(torch.stack(stack)) for stack in self.stacks]
		self.weight_decay, self.ns_steps, self.dtype = weight_decay, ns_steps, dtype

	@torch.no_grad()
	def step(self, lr, momentum):
		"""Decay the weights, then move them, tall ones further."""
		for stack, buffer in zip(self.stacks, self.momenta):
			gradient = torch.stack([p.grad for p in stack])
			buffer.mul_(momentum).add_(gradient)
			gradient = gradient.add_(buffer, alpha=momentum).to(self.dtype)
			(update,) = shared_out(lambda g: [newton_schulz(g, self.ns_steps)], gradient)
			rows, cols = stack[0].shape
			torch._foreach_mul_(stack, 1 - lr * self.weight_decay)
			update = update.float().mul_(-lr * max(1, rows / cols) ** 0.5)
			torch._foreach_add_(stack, update.unbind())


class Optimizers:
	"""Muon for the matrices and AdamW for the rest, on one schedule."""

	def __init__(self, model, h):
		self.h, roles, groups = h, parameter_roles(model), []
		for role, (lr, decay, _) in ROLE_POLICY.items():
			params = [p for name, p in model.named_parameters() if roles[name] == role]
			lr, decay = getattr(h, lr), getattr(h, decay, 0.0)
			if role == "matrix":
				self.muon = Muon(params, decay, h.muon_backend_steps, model.dtype)
				self.muon_lr = lr
			else:
				groups.append({"params": params, "lr": 0.0, "base_lr": lr, "weight_decay": decay})
		self.adamw = torch.optim.AdamW(groups, betas=(h.beta1, h.beta2), eps=h.adam_eps, fused=True)
		self.gradient = flat_gradient([*model.parameters()])
		self.adamw.step()  # at rate 0: makes the state that a checkpoint is read into
		for state in self.adamw.state.values():
			state["step"].zero_()

	def step(self, step, scale):
		"""Clip, step at `scale` times the rates, clear the gradients."""
		h, steps = self.h, self.h.muon_momentum_warmup_steps
		start, warm = h.muon_momentum_warmup_start, (step / steps if step < steps else 1.0)
		norm = self.gradient.norm() + 1e-6
		self.gradient.mul_(((h.grad_clip_norm or math.inf) / norm).clamp(max=1))
		self.muon.step(self.muon_lr * scale, start + warm * (h.muon_momentum - start))
		for group in self.adamw.param_groups:
			group["lr"] = group["base_lr"] * scale
		self.adamw.step()
		self.gradient.zero_()


def lr_scale(step, elapsed, h):
	"""Factor of the rates: 1, then down to 0 where seconds or ITERATIONS end the run."""
	left, cap = h.iterations - step, h.max_wallclock_seconds
	if cap and elapsed:
		left = min(left, max(cap - elapsed, 0.0) * max(step, 1) / elapsed)
	warmdown = min(h.warmdown_iters, h.warmdown_max_fraction * (step + left))
	return min(left / warmdown, 1.0) if warmdown else 1.0


def jepa_weight(step, elapsed, h):
	"""Lambda at a step: 0, a rise to its peak, 0, by steps or seconds, what is further on."""
	done = max(step / h.iterations, elapsed / (h.max_wallclock_seconds or math.inf))
	risen = (done - h.jepa_phase1_frac) / h.jepa_phase2_frac
	return h.jepa_lambda_max * risen if 0 <= risen < 1 else 0.0


class WeightAverage:
	"""The exponential moving average (EMA) of the weights; with EMA_ENABLED=0 the last ones."""

	def __init__(self, model, h):
		self.h, self.params = h, [p.detach() for p in model.parameters()]
		self.weights = {name: p.clone() for name, p in model.state_dict().items()}

	def update(self, step):
		"""Take in the weights after a step, the first being 0."""
		# A constant 0.997 would leave 41 % of the start after 300 steps.
		decay = min(self.h.ema_decay, (1 + step) / (10 + step)) * self.h.ema_enabled
		torch._foreach_lerp_([*self.weights.values()], self.params, 1 - decay)

	def apply(self, log):
		"""Give the model those weights; "ema", or "raw" if they are the last."""
		torch._foreach_copy_(self.params, [*self.weights.values()])
		log(f"ema:applying {'EMA' if self.h.ema_enabled else 'the last'} weights")
		return "ema" if self.h.ema_enabled else "raw"


# ---- Training: the clock, the step, the loop ----

CHECKPOINT, FINAL_MODEL = "checkpoint.safetensors", "final_model.safetensors"


@contextmanager
def ended_early(model, save):
	"""A list of the signals to stop so far; save() what there is, whatever ends the block early."""
	noted, numbers = [], (signal.SIGINT, signal.SIGTERM)

	def note(*which):
		noted.append(which)
		if not model.training:  # validation has no end of a step
			raise KeyboardInterrupt

	before = [signal.signal(number, note) for number in numbers]
	try:
		yield noted
	except BaseException:
		save()
		raise
	finally:
		for number, handler in zip(numbers, before):
			signal.signal(number, handler)


class TrainingClock:
	"""Seconds of training by the slowest rank. On CUDA a step is read when the next is launched."""

	def __init__(self, rt, h, log):
		self.rt, self.h, self.log, self.cap = rt, h, log, h.max_wallclock_seconds
		self.elapsed = self.slowest = 0.0
		self.losses, self.times = [], []  # of finished steps; `elapsed` at their ends
		self.recent, self.running = deque(maxlen=20), deque()  # seconds; steps
		self.resume()

	def resume(self):
		"""Let the seconds run."""
		self.mark = self.rt.now()

	def pause(self):
		"""Finish every step and stop the seconds."""
		while self.running:
			self.finish_step()
		self.elapsed += self.rt.now() - self.mark
		self.agree()

	def agree(self, stop=False):
		"""Take the most of all ranks: seconds, seconds of a recent step, and whether to stop."""
		own, recent = self.elapsed, max(self.recent, default=0.0)
		self.elapsed, self.slowest, stops = highest(own, recent, stop)
		self.mark += self.elapsed - own
		return stops > 0

	def step_launched(self, terms):
		"""Note a step by this rank's parts of the terms of its loss."""
		values = summed(torch.stack([*terms.values()]))
		cuda = values.is_cuda
		values = values.to("cpu", non_blocking=True)  # from a GPU, into pinned memory
		event = torch.cuda.current_stream().record_event() if cuda else None
		self.running.append((event, terms.keys(), values))
		while len(self.running) > cuda:
			self.finish_step()

	def finish_step(self):
		"""Wait for the oldest step and log it; DivergenceError for its loss."""
		event, names, values = self.running.popleft()
		if event:
			event.synchronize()
		began, self.mark = self.mark, time.perf_counter()
		self.recent.append(self.mark - began)
		self.elapsed += self.recent[-1]
		self.times.append(self.elapsed)
		terms = dict(zip(names, values.tolist()))
		self.losses.append(loss := terms["train_loss"])
		step, every = len(self.losses), self.h.train_log_every
		if step <= 10 or (every and step % every == 0):
			self.log_step(**terms)
		left = min(self.cap or math.inf, self.elapsed / step * self.h.iterations) - self.elapsed
		self.log.progress(f"step {step}  loss {loss:.4f}  {left:.0f} s left")
		if not math.isfinite(sum(terms.values())):
			raise DivergenceError(f"step {step}: the loss is {loss}; lower MATRIX_LR and SCALAR_LR")

	def log_step(self, **of):
		"""Log values of the last step."""
		step, ms = len(self.losses), 1000 * self.elapsed
		values = " ".join(f"{name}:{value:.4f}" for name, value in of.items())
		times = f"train_time:{ms:.0f}ms step_avg:{ms / max(step, 1):.2f}ms"
		self.log(f"step:{step}/{self.h.iterations} {values} {times}")
		self.log.event("step", step=step, seconds=self.elapsed, **of)

	def spent(self):
		"""Whether running steps and one more, as slow as the slowest, pass the cap."""
		ahead = (len(self.running) + 1) * self.slowest
		return self.cap > 0 and self.elapsed + ahead >= self.cap


def train_step(losses_of, optimizers, batch, step, scale, rt):
	"""A step on inputs and targets [sequences, T]; this rank's part of the mean loss's terms."""
	(rank, world), parts = ranks(), micro_batches(optimizers.h)
	batch = [ids.chunk(world)[rank] for ids in batch]
	if rt.device.type == "cuda":
		batch = [ids.pin_memory() for ids in batch]
	inputs, targets = (ids.to(rt.device, non_blocking=True).chunk(parts) for ids in batch)
	of_parts, share = [], 1 / (parts * world)
	for x, y in zip(inputs, targets):
		loss, terms = losses_of(x, y)
		(loss * share).backward()
		of_parts.append({name: term.detach() * share for name, term in terms.items()})
	# All at once: a compiled backward gives all gradients at its end, so none could go earlier.
	summed(optimizers.gradient)
	optimizers.step(step, scale)
	return {name: sum(terms[name] for terms in of_parts) for name in of_parts[0]}


def warm_up(model, losses_of, h, rt, log):
	"""Compile what a step needs, on random tokens; leave no trace."""
	if rt.device.type == "cpu" and not rt.compiled:
		return  # an eager CPU has nothing to compile
	weights = [p.detach().clone() for p in model.parameters()]
	optimizers, generator = Optimizers(model, h), torch.Generator().manual_seed(h.seed)
	shape = (2, h.train_batch_tokens // h.train_seq_len, h.train_seq_len)
	for step in range(h.warmup_steps):
		model.prepare(h.jepa_lambda_max * (step % 2), step)  # with its losses or not: two programs
		x, y = torch.randint(h.vocab_size, shape, generator=generator)
		train_step(losses_of, optimizers, (x, y), step, 1.0, rt)
		log(f"warmup_step:{step + 1}/{h.warmup_steps}")
	torch._foreach_copy_([p.detach() for p in model.parameters()], weights)


def save(name, h, tensors, log):
	"""Write settings and tensors into the run's folder, unless they hold NaN."""
	if log.silent or not all(t.isfinite().all() for t in tensors.values()):
		return
	try:
		write_tensors(log.folder / name, tensors, settings=json.dumps(model_settings(h)))
		log(f"Serialized model: {(log.folder / name).stat().st_size} bytes in {name}")
	except OSError as error:  # the one before, if any, is whole
		log(f"warning: {name} is not written: {error}")


def training_state(optimizers, average, clock):
	"""All tensors that a step changes, by name; data and chance follow from the step's number."""
	state = average.weights | {f"params/{n}": p for n, p in enumerate(average.params)}
	state |= {f"momenta/{n}": m for n, m in enumerate(optimizers.muon.momenta)}
	for n, of_param in enumerate(optimizers.adamw.state.values()):
		state |= {f"adamw/{n}/{name}": t for name, t in of_param.items()}
	steps = [*clock.times, clock.elapsed], [*clock.losses, 0.0]
	return state | {"clock/steps": torch.tensor(steps, dtype=torch.float64)}


def train(model, data, h, rt, log, saved=None):
	"""Train until ITERATIONS or the cap, on from a saved state if any; applies no average."""
	torch.set_float32_matmul_precision("medium")  # TF32; on a CPU, oneDNN's products
	losses_of = rt.compile(model.losses)
	model.train()
	warm_up(model, losses_of, h, rt, log)
	optimizers, average = Optimizers(model, h), WeightAverage(model, h)
	clock, stacks = TrainingClock(rt, h, log), [len(stack) for stack in optimizers.muon.stacks]
	log(f"muon:{sum(stacks)} matrices in {len(stacks)} stacks")
	if saved:
		with refused(f"RESUME={h.resume}: no training state"):
			(*clock.times, clock.elapsed), (*clock.losses, _) = saved["clock/steps"].tolist()
			for name, tensor in training_state(optimizers, average, clock).items():
				tensor.copy_(saved[name].view_as(tensor))
		log(f"resume: step {len(clock.losses)}, {clock.elapsed:.1f} s trained")
	step, every = len(clock.losses), h.checkpoint_every
	saved_at = clock.elapsed if "s" in every else step
	with ended_early(model, partial(save, FINAL_MODEL, h, average.weights, log)) as signals:
		while True:  # every decision is alike on all ranks
			stop = clock.agree(bool(signals))
			at = clock.elapsed if "s" in every else step
			if stop or 0 < int(every.rstrip("s")) <= at - saved_at:
				clock.pause()
				clock.resume()
				saved_at = at
				save(CHECKPOINT, h, training_state(optimizers, average, clock), log)
				clock.pause()  # it took time
				clock.resume()
			if stop:
				highest(0)  # rank 0 has written it
				raise KeyboardInterrupt
			done = step >= h.iterations or clock.spent()
			validates = h.val_loss_every and step % h.val_loss_every == 0
			if done or validates:
				clock.pause()
			if done:
				break
			if validates:
				validate(model, data, h, log, clock)
				clock.resume()
			scale = lr_scale(step, clock.elapsed, h)
			model.prepare(jepa_weight(step, clock.elapsed, h), step)
			batch = data.train.batch(step, h)
			clock.step_launched(train_step(losses_of, optimizers, batch, step, scale, rt))
			average.update(step)
			step += 1
	if step < h.iterations:
		at = f"train_time:{1000 * clock.elapsed:.0f}ms step:{step}/{h.iterations}"
		log(f"stopping_early: wallclock_cap {at}")
	return clock, average


def validate(model, data, h, log, clock):
	"""Log the plain score of the weights as they are."""
	model.eval()
	torch.set_float32_matmul_precision("highest")
	score = evaluate(clock.rt.compile(model.forward_logits), data, h, clock.rt, log)
	torch.set_float32_matmul_precision("medium")
	model.train()
	clock.log_step(val_loss=score.val_loss, val_bpb=score.val_bpb)


# ---- Quantize and pack: how it is shrunk ----

GPTQ_BLOCK = 128  # columns
CLIPS = (1.0, 0.95, 0.9, 0.85, 0.8, 0.75, 0.7, 0.6, 0.5)  # of a row's largest weight
WIDEST = 50  # factor on the scales beyond which nearly all codes are 0


def best_clips(weight, bits, widen, assign):
	"""Codes int8 [n, rows, cols] and scales float16 [n, rows], each of its row's best clip.

	assign(scale, limit) gives codes and errors. The records' floor of 1/31 spoils small rows.
	"""
	limit, peak = 2 ** (bits - 1) - 1, weight.abs().amax(-1, keepdim=True)
	scales = [(peak * clip / limit).clamp(2.0**-24, 65_504).half().float() for clip in CLIPS]
	errors = torch.cat([assign(scale, limit)[1] for scale in scales], -1)
	scale = torch.cat(scales, -1).take_along_dim(errors.argmin(-1, keepdim=True), -1)
	scale = (scale * widen).clamp(max=65_504).half()  # only now: a smaller clip would undo it
	return assign(scale.float(), limit)[0].to(torch.int8), scale.squeeze(-1)


def round_rows(weight, hessian, bits, widen):
	"""Codes and scales of matrices [n, rows, cols], rounded; and True [n]."""

	def assign(scale, limit):
		codes = (weight / scale).round().clamp(-limit, limit)
		return codes, (codes * scale - weight).square().sum(-1, keepdim=True)

	rounded = weight.new_ones(len(weight), dtype=torch.bool)
	return *best_clips(weight, bits, widen, assign), rounded


def gptq(weight, hessian, bits, widen):
	"""Full GPTQ (arXiv 2210.17323) for inputs X with X^T X = hessian [n, cols, cols].

	Columns by falling diagonal, each one's error spread over those after it. Third: matrices only
	rounded, whose Hessian no damping makes positive definite.
	"""
	diagonal, cols = hessian.diagonal(dim1=1, dim2=2), weight.size(2)
	order = diagonal.argsort(dim=1, descending=True).unsqueeze(1)
	hessian = hessian.take_along_dim(order.mT, 1).take_along_dim(order, 2)
	eye, damping = torch.eye(cols, device=weight.device), 0.01 * diagonal.mean(1)
	for _ in range(4):
		lower, failed = torch.linalg.cholesky_ex(hessian + damping[:, None, None] * eye)
		lower[failed > 0] = eye  # cholesky_inverse raises at zeros
		upper, also = torch.linalg.cholesky_ex(torch.cholesky_inverse(lower), upper=True)
		failed = (failed + also > 0) | ~upper.isfinite().all((1, 2))
		damping = torch.where(failed, 10 * damping, damping)
	upper[failed] = eye
	dead = (diagonal == 0) & ~failed.unsqueeze(1)  # inputs that are always 0
	weight = weight.masked_fill(dead.unsqueeze(1), 0)
	columns = weight.take_along_dim(order, 2).mT.contiguous()

	def assign(scale, limit):
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
	return codes.take_along_dim(order.argsort(), 2), scales, failed


def finite(weights):
	"""The weights; DivergenceError naming one that cannot be used."""
	for name, p in weights.items():
		if not (p.is_meta or (p.dtype == torch.float32 and p.isfinite().all())):
			raise DivergenceError(f"{name} is not float32 or not finite: the weights have diverged")
	return weights


def quantize(model, hessians=None, widen=1.0):
	"""The artifact's arrays in order, and the names that GPTQ could only round.

	Codes come first: like beside like compresses best. GPTQ takes what has a Hessian; `widen`
	coarsens 6-bit scales. A meta model gives types and shapes.
	"""
	roles, hessians, stacks, coded, floats = parameter_roles(model), hessians or {}, {}, {}, {}
	for name, p in finite(model.state_dict()).items():
		_, _, bits = ROLE_POLICY[roles[name]]
		if bits == 16:
			floats[name] = p.half()
		else:
			stacks.setdefault((p.shape, bits, name in hessians), {})[name] = p
	for (_, bits, solve), stack in stacks.items():
		hessian = torch.stack([hessians[name] for name in stack]) if solve else None
		how = {"bits": bits, "widen": widen if bits == 6 else 1.0}
		quantizer = partial(gptq if solve else round_rows, **how)
		made = shared_out(quantizer, torch.stack([*stack.values()]), hessian)
		coded |= zip(stack, zip(*made))
	names = [name for name in roles if name in coded]
	codes = {f"{name}.codes": coded[name][0] for name in names}
	scales = {f"{name}.scales": coded[name][1] for name in names}
	return codes | scales | floats, [n for n in hessians if coded[n][2]]


@torch.inference_mode()
def collect_hessians(model, batches, clock, log):
	"""X^T X, float32 [in, in], of all inputs X, by weight; {} if the cap leaves no time."""
	roles, hooks, sums = parameter_roles(model), [], {}
	(rank, world), slowest, used = ranks(), clock.slowest, 0

	def add(total, _, inputs):
		x = inputs[0].flatten(0, -2).float()
		total.addmm_(x.mT, x)

	for name, module in model.named_modules():
		if roles.get(weight := f"{name}.weight") == "matrix":
			sums[weight] = total = module.weight.new_zeros(2 * [module.in_features])
			hooks.append(module.register_forward_pre_hook(partial(add, total)))
	log.progress("calibrating")
	for ids in batches:
		began = clock.rt.now()
		if clock.cap and clock.elapsed + began - clock.mark + slowest > clock.cap:
			log("gptq: GPTQ_RESERVE_SECONDS ended before the calibration")
			break
		if len(ids) > rank:
			model.hidden(ids[rank::world].to(model.skip_weights.device))
		slowest, used = max(slowest, clock.rt.now() - began), used + 1
	for hook in hooks:
		hook.remove()
	return {name: summed(x) for name, x in sums.items()} if any(highest(used)) else {}


def calibration(train, h, step):
	"""Ids int64 [B, TRAIN_SEQ_LEN]; training text as step `step` would read it."""
	generator, length = torch.Generator().manual_seed(h.seed), h.train_seq_len
	shape = max(h.gptq_calib_tokens // length, 1), length
	if h.gptq_calib == "random":  # text alone: ids 0 to 3 are special
		ids = torch.randint(4, h.vocab_size, shape, generator=generator)
	else:
		ids = train.read(step * h.train_batch_tokens, math.prod(shape)).view(shape)
	return ids.split(max(h.micro_batch_tokens // length, 1))


# An artifact: this header (magic and version, bytes of settings, SHA-256 of the rest), the settings
# as JSON, which say all shapes, and the arrays compressed.
HEADER, MAGIC = struct.Struct("<12sI32s"), b"PGOLFGPT\1\0\0\0"


def zstd():
	"""The compressor's package, or SettingsError."""
	try:
		import zstandard
	except ImportError:
		raise SettingsError("the artifact needs zstandard: pip install zstandard") from None
	return zstandard


def with_settings(h, of_file):
	"""The settings with those of a file, which must be all of a model's and no others."""
	odd = sorted(model_settings(h).keys() ^ of_file)
	odd = odd or [name for name, value in of_file.items() if not str(value).isprintable()]
	expect(not odd, f"settings missing, unknown or not printable: {odd}")
	# The batch does not travel; one sequence is always legal.
	return replace(h, **of_file, train_batch_tokens=of_file["train_seq_len"])


def header(body, size):
	"""The header of a body, of which `size` bytes are settings."""
	digest = hashlib.sha256(HEADER.pack(MAGIC, size, b"") + body).digest()
	return HEADER.pack(MAGIC, size, digest)


def pack(h, arrays):
	"""The artifact's bytes, the same for the same arrays."""
	settings = json.dumps(model_settings(h), separators=(",", ":")).encode()
	raw = b"".join(array.cpu().numpy().tobytes() for array in arrays.values())
	body = settings + zstd().ZstdCompressor(level=22).compress(raw)
	return header(body, len(settings)) + body


def load_checkpoint(path, h):
	"""Settings, weights and training state, mapped, of what `save` wrote; or DataError."""
	with refused(f"{path}: cannot be read as a checkpoint"):
		tensors, texts = read_tensors(path)
		h = with_settings(h, json.loads(texts["settings"]))
		weights = {name: tensors.pop(name) for name in [*tensors] if "/" not in name}
		with torch.device("meta"):
			model = GPT(h)
		model.load_state_dict(weights, assign=True)  # names and shapes must fit
		return h, finite(model.state_dict()), tensors  # scalars may come as [1]


def unpack(blob, h):
	"""Settings and arrays; all is checked before it is allocated."""
	magic, told, _ = HEADER.unpack_from(blob)
	expect(magic == MAGIC and told < 1 << 16, f"header {magic}, {told} bytes of settings: not ours")
	body = memoryview(blob)[HEADER.size :]
	payload = body[told:]
	h = with_settings(h, json.loads(bytes(body[:told])))
	with torch.device("meta"):
		layout, _ = quantize(GPT(h))
	sizes = [like.nbytes for like in layout.values()]
	size, stored = sum(sizes), len(payload)
	expect(size / 1000 < stored < 1.01 * size + 1000, f"{stored} bytes for arrays of {size}")
	expect(blob[: HEADER.size] == header(body, told), "the checksum does not fit")
	told = zstd().get_frame_parameters(payload).content_size
	expect(told == size, f"{told} bytes of arrays, not {size}")
	raw = zstd().ZstdDecompressor().decompress(payload, allow_extra_data=False)
	parts = torch.frombuffer(bytearray(raw), dtype=torch.uint8).split(sizes)
	arrays = zip(layout.items(), parts)
	return h, {n: p.clone().view(like.dtype).view(like.shape) for (n, like), p in arrays}


def dequantize(arrays):
	"""Float32 weights by parameter name."""
	weights = {name: array.float() for name, array in arrays.items()}
	for name in [name[:-6] for name in weights if name.endswith(".codes")]:
		weights[name] = weights.pop(f"{name}.codes") * weights.pop(f"{name}.scales")[:, None]
	return weights


def load_artifact(path, h):
	"""Settings and float32 weights of an artifact, or DataError."""
	with refused(f"{path}: cannot be read as an artifact"):
		h, arrays = unpack(memoryview(np.memmap(path, mode="r")), h)  # of any size
		return h, finite(dequantize(arrays))


def shrink(model, hessians, h, room, log):
	"""The artifact, matrices' scales widened, at most by WIDEST, to fit `room` bytes."""
	matrices = [f"{n}.codes" for n, role in parameter_roles(model).items() if role == "matrix"]
	widen = 1.0
	while True:
		arrays, rounded = quantize(model, hessians, widen)
		blob = from_first(partial(pack, h, arrays))
		codes = torch.cat([arrays[n].flatten() for n in matrices])
		counts = (codes.int() + 128).bincount(minlength=256)
		entropy = torch.special.xlogy(counts, counts.sum() / counts).sum().item() / math.log(256)
		told = f"order-0 entropy of the matrices' codes {entropy:.0f}; widened by {widen:.3f}"
		log(f"size: {len(blob)} bytes packed, {told}")
		if len(blob) <= room or widen > WIDEST:
			break
		bits = 8 * (len(blob) - room) / counts.sum().item()
		widen *= 1.005 * 2 ** min(bits, 6)  # twice the scale saves about a bit a code
	for name in rounded:
		log(f"gptq: {name} is only rounded: its Hessian is not definite")
	return blob


# ---- Run: how it all goes ----

# In a run's folder; where the copy stands, the run has begun.
SOURCE_COPY, ARTIFACT = "train_gpt.py", "final_model.int6.ptz"


def run(h, rt, data, log):
	"""Train, save, quantize, pack and score: the README's stages."""
	torch.manual_seed(h.seed)
	model = GPT(h, rt.attend, rt.dtype)
	model.load_state_dict(from_first(model.state_dict))  # other CPUs may draw others
	model.to(rt.device)
	count = sum(p.numel() for p in model.parameters())
	log(f"model_params:{count}")
	log(f"world_size:{ranks()[1]} grad_accum_steps:{micro_batches(h)}")
	need = BYTES_LIMIT + 30 * count  # with two checkpoints
	if not log.silent and (free := shutil.disk_usage(log.folder).free) < need:
		raise SettingsError(f"RUN_DIR={log.folder}: {free} bytes are free there, {need} needed")
	cap = h.max_wallclock_seconds
	if cap and h.gptq_enabled and h.gptq_calib == "train":
		cap -= h.gptq_reserve_seconds
	until = replace(h, max_wallclock_seconds=cap, gptq_enabled=False)
	path, saved = log.folder / CHECKPOINT if h.resume == "auto" else Path(h.resume), None
	if h.resume and from_first(lambda: h.resume != "auto" or path.exists()):
		were, weights, state = from_first(lambda: load_checkpoint(path, h))
		if other := model_settings(were).items() - model_settings(h).items():
			raise DataError(f"RESUME={path}: its model has {dict(other)}; set the same")
		saved = weights | state
	clock, average = train(model, data, until, rt, log, saved)
	save(FINAL_MODEL, h, average.weights, log)
	peak = torch.cuda.max_memory_allocated() >> 20  # 0 on a CPU
	validate(model, data, h, log, clock)
	steps, times = len(clock.losses), np.diff(clock.times, prepend=0.0) * 1000
	return {
		"parameters": count,
		"steps": steps,
		"step_ms": {f"p{n}": float(np.percentile(times, n)) for n in (50, 99) if steps},
		"peak_memory_mib": peak,
		"train_losses": clock.losses,
		"weights": average.apply(log),
		"train_tokens": len(data.train),
		**finish(model, h, rt, data, log, clock),
	}


def finish(model, h, rt, data, log, clock):
	"""Quantize and pack a model, then score the artifact from disk."""
	code, hessians, ends = from_first((log.folder / SOURCE_COPY).read_bytes), {}, [rt.now()]
	model.eval()
	torch.set_float32_matmul_precision("highest")
	if h.gptq_enabled:
		reads_data = h.gptq_calib == "train"
		clock.cap = h.max_wallclock_seconds * reads_data
		clock.resume()
		batches = calibration(data.train, h, len(clock.losses))
		hessians = collect_hessians(model, batches, clock, log)
		if reads_data:
			clock.pause()  # what reads training data is training
	ends.append(rt.now())
	blob = shrink(model, hessians, h, BYTES_LIMIT - len(code), log)
	if not log.silent:
		write_atomically(log.folder / ARTIFACT, blob)
	ends.append(rt.now())
	sizes = {"code": len(code), "model": len(blob), "total": len(code) + len(blob)}
	names = "Code size", "Serialized model int6+zstd", "Total submission size int6+zstd"
	for name, size in zip(names, sizes.values()):
		log(f"{name}: {size} bytes")
	forward_logits = rt.compile(model.forward_logits)
	scores = {"float": evaluate(forward_logits, data, h, rt, log)}
	log_score(log, "DIAGNOSTIC post_ema", scores["float"])
	ends.append(rt.now())
	scores |= score_artifact(log.folder / ARTIFACT, h, rt, data, log)
	ends.append(rt.now())
	stages = zip(("calibrate", "pack", "diagnose", "eval"), np.diff(ends).tolist())
	seconds = {"train": clock.elapsed, **dict(stages)}
	log("seconds: " + " ".join(f"{name}:{value:.1f}" for name, value in seconds.items()))
	limits = {"eval_seconds": (seconds["eval"], EVAL_SECONDS_LIMIT)}
	limits["total_bytes"] = sizes["total"], BYTES_LIMIT
	if clock.times:  # it was trained here
		limits["train_seconds"] = clock.elapsed, h.max_wallclock_seconds or math.inf
	verdicts = {}
	for name, (value, most) in limits.items():
		verdicts[name] = "PASS" if value <= most else "FAIL"
		log(f"limit:{name} {round(value, 1):,} of {most:,} {verdicts[name]}")
	return {
		"status": "over a limit" if "FAIL" in verdicts.values() else "ok",
		"verdicts": verdicts,
		"scores": {name: score._asdict() for name, score in scores.items()},
		"bytes": sizes,
		"seconds": seconds,
		"machine": rt.describe(),
		"code_sha256": hashlib.sha256(code).hexdigest(),
		"canonical_val": data.canonical,
		"val_sha256": hashlib.sha256(data.val.numpy().tobytes()).hexdigest(),
	}


def log_score(log, name, score):
	"""A score in the challenge's two forms."""
	at = f"stride:{score.stride} eval_time:{1000 * score.seconds:.0f}ms"
	log(f"{name} val_loss:{score.val_loss:.4f} val_bpb:{score.val_bpb:.4f} {at}")
	log(f"{name}_exact val_loss:{score.val_loss:.8f} val_bpb:{score.val_bpb:.8f}")
	log.event("score", name=name, **score._asdict())


def score_artifact(path, h, rt, data, log):
	"""All scores of a model on disk."""
	h, weights = from_first(lambda: load_artifact(path, h))

	def loaded(window=0):
		with torch.device("meta"):
			model = GPT(h, rt.attend, rt.dtype, window).eval()
		model.to_empty(device=rt.device).load_state_dict(weights)
		return model

	forward_logits = rt.compile((model := loaded()).forward_logits)
	scores = {"plain": evaluate(forward_logits, data, h, rt, log)}
	log_score(log, "final_int6_roundtrip", scores["plain"])
	stride = min(h.eval_stride, seq_len := h.eval_seq_len or h.train_seq_len)
	if 0 < stride < seq_len:
		due = scores["plain"].seconds * seq_len / stride  # less, if that compiled
		log(f"sliding_window stride:{stride} expected_time:{due:.0f}s of {EVAL_SECONDS_LIMIT}s")
		scores["sliding"] = evaluate(forward_logits, data, h, rt, log, stride=stride)
		log_score(log, "final_int6_sliding_window", scores["sliding"])
	if window := h.eval_window:
		long = replace(h, eval_seq_len=16 * window)  # each begins a window before its scores
		in_window = rt.compile(loaded(window).forward_logits)
		scores["window"] = evaluate(in_window, data, long, rt, log, stride=15 * window)
		log_score(log, "final_int6_window", scores["window"])
	if h.ttt_enabled:
		learn = test_time_learner(model, h, rt)
		scores["ttt"] = evaluate(forward_logits, data, h, rt, log, stride=stride, learn=learn)
		model.load_state_dict(weights)
		log_score(log, "legal_ttt", scores["ttt"])
	# Where the community's tools look for the score.
	log_score(log, "final_int8_zlib_roundtrip", [*scores.values()][-1])
	return scores


def open_folder(h):
	"""The run's folder; SettingsError where none can be, or a run that RESUME=auto goes on with."""
	run_id = h.run_id or f"{time.strftime('%Y%m%d-%H%M%S')}-s{h.seed}-{os.getpid()}"
	folder = Path(h.run_dir or f"logs/{run_id}")
	try:
		folder.mkdir(parents=True, exist_ok=True)
		result = folder / "result.json"
		failed = result.exists() and not (folder / SOURCE_COPY).exists()  # before it began
		mode = "a" if failed or h.resume == "auto" else "x"  # of two runs only one can
		(folder / "train.log").open(mode).close()
		result.unlink(missing_ok=True)
	except OSError as error:
		fault = f"RUN_DIR={folder}: {error}; choose another RUN_ID or RUN_DIR"
		raise SettingsError(fault) from None
	return folder


FAILURES = {SettingsError: "settings", DataError: "data", DivergenceError: "nan"}
EXIT = {"ok": 0, "over a limit": 1, "settings": 2, "data": 2, "oom": 3, "nan": 4, "interrupted": 5}


def conclude(log, result):
	"""Write result.json (of several ranks that fail, the first does), say why; the exit status."""
	path, failed = log.folder and log.folder / "result.json", "reason" in result
	try:
		if path and not (path.exists() if failed else log.silent):
			write_atomically(path, json.dumps(result, indent=2).encode())
			log.silent &= not failed
	except OSError as error:
		if not failed:
			result |= {"status": "failed", "reason": f"{path}: {error}"}
	if "reason" in result:
		log(f"error: {result['reason']}")
	return EXIT.get(result["status"], 6)


def perform(args, env, log, result):
	"""What the command line asks for; adds to the result."""
	h = Hyperparameters.from_env(env)
	notes = settings_notes(h, env)
	if (env.get("WORLD_SIZE", "1"), env.get("RANK", "0")) != ("1", "0"):
		gone = {"status": "failed", "reason": "another rank is gone, or silent"}
		join_ranks(env, lambda: os._exit(conclude(log, result | gone)))
	h = from_first(lambda: h)  # whatever the others were told
	if file := args.eval or args.quantize:
		load = load_artifact if args.eval else load_checkpoint
		h, weights, *_ = from_first(lambda: load(file, h))
	else:
		check_settings(h, ranks()[1])
	if not (args.eval or args.check):
		log.folder = from_first(lambda: open_folder(h))
		log(f"{log.folder}/train.log")
		result["settings"] = asdict(h)
	trains = not file or (args.quantize and h.gptq_enabled and h.gptq_calib == "train")
	data, rt = load_data(h, log, trains), Runtime.start(h)
	for note in (*notes, *rt.notes):
		log(note)
	for values in (rt.describe(), asdict(h)):
		log(" ".join(f"{name}:{value}" for name, value in values.items()))
	if args.eval:
		score_artifact(args.eval, h, rt, data, log)
		return
	zstd()  # if it is missing, fail before training, not after it
	try:
		code = Path(__file__).read_bytes()
	except (NameError, OSError) as error:
		raise SettingsError(f"{error}: run this program from a file; its bytes count") from None
	if args.check:
		log(f"check:ok code:{len(code)} bytes disk:{shutil.disk_usage('.').free >> 20} MiB")
		return
	if not log.silent:
		write_atomically(log.folder / SOURCE_COPY, code)
	if args.quantize:
		model = GPT(h, rt.attend, rt.dtype).to(rt.device)
		model.load_state_dict(weights)
		result |= finish(model, h, rt, data, log, TrainingClock(rt, h, log))
	else:
		result |= run(h, rt, data, log)


def main(argv, env):
	"""The program; its exit status, by EXIT or 6."""
	about = f"{__doc__}\nSettings are environment variables:\n\n{settings_table()}"
	parser = argparse.ArgumentParser(description=about)
	parser.formatter_class = argparse.RawTextHelpFormatter
	parser.add_argument("--check", action="store_true", help="is all ready? trains nothing")
	parser.add_argument("--eval", metavar="ARTIFACT", type=Path, help="score it again")
	parser.add_argument("--quantize", metavar="CHECKPOINT", type=Path, help="pack it again")
	args = parser.parse_args(argv)
	log, result = Log(silent=env.get("RANK", "0") != "0"), {"status": "ok"}
	try:
		perform(args, env, log, result)
		result["status"] = from_first(lambda: result["status"])
	except BaseException as error:
		status, reason = FAILURES.get(type(error), "failed"), str(error)
		if out_of_memory(error):
			status, peak = "oom", torch.cuda.max_memory_allocated() >> 20
			reason += f"; peak {peak} MiB; lower MICRO_BATCH_TOKENS, EVAL_SEQ_LEN or EVAL_WINDOW"
		elif isinstance(error, KeyboardInterrupt):
			status = "interrupted"
			reason = "a signal (or a rank died): RESUME=auto goes on, or --quantize"
		elif status == "failed":
			reason = traceback.format_exc()
		if dist.is_initialized():
			reason = f"rank {ranks()[0]}: {reason}"
			for number in (signal.SIGINT, signal.SIGTERM):  # by which torchrun ends the others
				signal.signal(number, signal.SIG_IGN)
		result |= {"status": status, "reason": reason}
		log.silent &= "MASTER_ADDR" in env
		with suppress(OSError):  # a full disk must not hide the reason
			ErrorHandler().record_exception(error)  # for torchrun's last lines
	return conclude(log, result)


if __name__ == "__main__":
	signal.signal(signal.SIGTERM, signal.default_int_handler)  # as Ctrl-C: result.json is written
	exit_status = main(sys.argv[1:], os.environ)
	if dist.is_initialized():
		sys.stdout.flush()
		time.sleep(1)  # a rank that was killed must seem to torchrun the first to end
		os._exit(exit_status)  # at once: a broken group can hang
	sys.exit(exit_status)
