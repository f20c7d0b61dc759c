"""Train, quantize, pack and score a language model for the OpenAI Parameter Golf challenge.

The challenge: of all models that fit in 16,000,000 bytes together with this program, and that
train in 600 s on 8xH100, the best has the fewest bits per byte (bpb) on unseen text.

    PRESET=cpu python train_gpt.py                                 # a laptop, a few minutes
    python train_gpt.py                                            # one GPU
    torchrun --standalone --nproc_per_node=8 train_gpt.py          # eight GPUs
    python train_gpt.py --eval logs/<RUN_ID>/final_model.int6.ptz  # score an artifact again

Every setting is an environment variable; `--help` lists them.

Sections, in reading order. A section uses itself and earlier ones only.

    Settings       what the run is told: settings, their rules, presets, the command line
    Runtime        where it runs: the ranks of a distributed run, the device
    Attention      attention back ends, and the choice of one that works here
    Log and files  the run's log, atomic writes, tensors on disk
    Data           token shards, training batches, bytes of text per token
    Model          the network, one forward pass for training and scoring
    Schedule       what changes during training, as a function of progress
    Evaluate       from logits to bits per byte
    Optimizers     Muon, AdamW, the average of the weights
    Training       clock, checkpoints, one step, the loop
    Quantize       from float32 weights to integer codes
    Artifact       from codes to a file that fits, and back
    Run            the commands, and what happens when something fails

Dimensions: B sequences, T tokens in a sequence, D model width, H query heads, K key/value heads,
d width of a head, V vocabulary size, L layers.
"""

import argparse
import base64
import bisect
import copy
import ctypes
import difflib
import hashlib
import importlib.util
import json
import lzma
import math
import mmap
import os
import platform
import re
import shlex
import shutil
import signal
import struct
import sys
import textwrap
import threading
import time
import traceback
import zlib
from collections import deque
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict, dataclass, field, fields, replace
from datetime import timedelta
from functools import partial
from itertools import accumulate, pairwise
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

if __name__ == "__main__" and not {"OMP_WAIT_POLICY", "GOMP_SPINCOUNT"} & os.environ.keys():
    # OpenMP threads that spin while they wait make a step ten times slower on a busy machine.
    # The OpenMP library reads this once, when torch is imported.
    os.environ |= {"OMP_WAIT_POLICY": "PASSIVE", "GOMP_SPINCOUNT": "1000"}

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.elastic.multiprocessing.errors import ErrorHandler
from torch.nn.attention import (
    SDPBackend,
    activate_flash_attention_impl,
    current_flash_attention_impl,
    restore_flash_attention_impl,
    sdpa_kernel,
)

# ---- Settings: what the run is told ----

BYTES_LIMIT = 16_000_000  # the challenge's limit for code and artifact together
EVAL_SECONDS_LIMIT = 600.0  # the challenge's limit for scoring
BYTE_VOCAB = 260  # vocabulary of bytes: ids 0 to 3 are special, id 4 + b is byte b
FIRST_TEXT_ID = 4  # ids below are special: padding, BOS, EOS, unknown
BOS_ID = 1  # the first token of every document
BYTE_UNKNOWN_ID = 3
T = TypeVar("T")


# Defaults of the byte vocabulary, as in PR #832.
BYTE_RULES: dict[str, Any] = {
    "ve_enabled": False,
    "gptq_enabled": False,
    "rope_train_seq_len": 4096,
}

# What PR #1493 and #1855 share.
SP8192: dict[str, Any] = {
    "vocab_size": 8192,
    "mlp_mult": 4.0,
    "rope_train_seq_len": 2048,
    "smear_gate": False,
    "bigram_vocab_size": 0,
    "ve_enabled": False,
    "skip_gates_enabled": True,
    "num_loops": 2,
    "scalar_lr": 0.02,
    "tied_embed_lr": 0.03,
    "adam_wd": 0.02,
    "embed_wd": 0.085,
    "muon_wd": 0.095,
    "muon_row_normalize": True,
    "ema_decay": 0.9965,
    "gptq_calib": "train",
    "gptq_embed": True,
    "scale_rule": "std",
}
FRONTIER = SP8192 | {
    "parallel_start_layer": 8,
    "doc_attention": True,
    "sparse_attn_gate_enabled": True,
    "sparse_attn_gate_scale": 0.5,
    "smear_gate_enabled": True,
    "qk_gain_init": 5.0,
    "matrix_lr": 0.026,
    "beta2": 0.99,
    "muon_momentum": 0.97,
    "muon_coefficients": "polar_express",
    "warmdown_frac": 0.85,
    "min_lr": 0.1,
    "gptq_calib_tokens": 1_572_864,
    "embed_bits": 7,
    "embed_clip_sigmas": 14.0,
    "matrix_clip_sigmas": 10.0,  # on average; raised until the artifact fits
    "quantizer": "trellis",
    "sensitivity_tokens": 16_384,  # TUNE_SCALES would take GPTQ's own seconds from training
    "compressor": "range",
    "eval_stride": 0,
    "eval_window": 2048,
    "canonical_mask": True,
    "ttt_enabled": True,
    "ttt_mode": "lora",
    "ttt_lora_rank": 80,
    "ttt_beta2": 0.99,
    "ttt_weight_decay": 0.5,
    "phased_ttt_prefix_docs": 2500,
}
PRESETS: dict[str, dict[str, Any]] = {
    # A first run: the embedded corpus, a few minutes on two cores.
    "cpu": {
        "corpus": "python",
        "num_layers": 2,
        "model_dim": 128,
        "num_heads": 2,
        "num_kv_heads": 1,
        "ve_dim": 32,
        "bigram_vocab_size": 16_384,
        "bigram_dim": 64,
        "unet_skips": False,
        "train_seq_len": 512,
        "train_batch_tokens": 2048,
        "iterations": 1600,
        "warmdown_iters": 960,
        "max_wallclock_seconds": 0.0,
        # Below the defaults, which were tuned for batches 384 times as large.
        "matrix_lr": 0.015,
        "tied_embed_lr": 0.02,
        "muon_momentum": 0.95,
        "ema_decay": 0.97,
        "train_log_every": 100,
        "val_loss_every": 0,
    },
    # PR #832: bytes and the JEPA head.
    "byte_jepa": {
        "vocab_size": BYTE_VOCAB,
        "num_layers": 13,
        "mlp_mult": 2.0,
        "xsa_last_n": 4,
        "bigram_vocab_size": 4096,
        "bigram_dim": 32,
        "train_seq_len": 4096,
        "train_batch_tokens": 393_216,
        "iterations": 9000,
        "warmdown_iters": 3000,
        "eval_stride": 512,
        "jepa_chunk_size": 8,
    },
    # PR #1124: batched Muon and GPTQ, the defaults.
    "v9": {},
    # PR #1493: 8,192 tokens, repeated layers, parallel residuals, test-time training.
    "sp8192": SP8192
    | {
        "parallel_residual_start": 7,
        "qk_gain_init": 5.25,
        "matrix_lr": 0.022,
        "warmdown_frac": 0.72,
        "gptq_calib_tokens": 6_291_456,
        "compressor": "brotli",
        "ttt_enabled": True,
        "ttt_lr": 0.005,
    },
    # The best that we know: PR #1855 without its CaseOps, LQER and kernels.
    "frontier": FRONTIER,
    # A single GPU and ten minutes: the same at an eighth of the batch, with the default tokenizer.
    # Not measured on a GPU yet. Adapters would take eight times as long to score.
    "gpu1": FRONTIER
    | {
        "vocab_size": 1024,
        "train_batch_tokens": 98_304,
        "micro_batch_tokens": 32_768,
        "ttt_enabled": False,
    },
}


# Settings of published scripts that this program does not have; the log warns of them.
UNSUPPORTED_SETTINGS = frozenset(
    """
    VAL_BATCH_TOKENS GPTQ_CALIBRATION_BATCHES MUON_BETA2 TTT_EVAL_SEQ_LEN TTT_OPTIMIZER
    TTT_GRAD_STEPS TTT_MOMENTUM TTT_FREEZE_BLOCKS TTT_GRAD_CLIP TTT_BATCH_SEQS VAL_DOC_FRACTION
    VAL_MAX_TOKENS ROPE_YARN PHASED_TTT_ENABLED PHASED_TTT_NUM_PHASES GLOBAL_TTT_MOMENTUM
    GLOBAL_TTT_BATCH_SEQS GLOBAL_TTT_GRAD_CLIP
    MLP_CLIP_SIGMAS ATTN_CLIP_SIGMAS
    SLIDING_WINDOW_ENABLED QAT_ENABLED GATED_ATTN_ENABLED GATED_ATTENTION ATTN_OUT_GATE_ENABLED
    CASEOPS_ENABLED MTP_NUM_HEADS MTP_LOSS_WEIGHT EMBEDDING_DIM LQER_ENABLED MLP_HIDDEN DTG_ENABLED
    VALUE_RESIDUAL QUANT_BITS ZSTD_LEVEL GPTQ_RESERVE_SECONDS JEPA_SIGREG JEPA_BACKBONE_GRAD
    """.split()
)


class SettingsError(ValueError):
    """Settings that cannot be used; the message has one line per fault."""

    status = "settings"


def setting(
    default: T, meaning: str, *, low: float = 0, high: float = 1e18, choices: tuple[str, ...] = ()
) -> T:
    """Returns a dataclass field: its default, what it means, and the values that are legal."""
    legal = {"meaning": meaning, "low": low, "high": high, "choices": choices}
    return field(default=default, metadata=legal)


@dataclass(frozen=True)
class ModelSettings:
    """Settings that define the architecture. The artifact stores them in its description."""

    # Data
    corpus: str = setting(
        "fineweb10B", "Name of the data set, from which DATA_PATH and TOKENIZER_PATH follow."
    )
    vocab_size: int = setting(
        1024, "Number of tokens in the vocabulary; 260 selects bytes.", low=5, high=65_536
    )
    train_seq_len: int = setting(2048, "Tokens in a training sequence.", low=2, high=1 << 20)
    # Model
    num_layers: int = setting(11, "Number of transformer blocks.", low=1, high=200)
    model_dim: int = setting(512, "Width of the residual stream.", low=2, high=65_536)
    num_heads: int = setting(8, "Number of query heads.", low=1, high=4096)
    num_kv_heads: int = setting(4, "Number of key/value heads (GQA).", low=1, high=4096)
    mlp_mult: float = setting(3.0, "Width of the MLP divided by MODEL_DIM.", low=0.01, high=64)
    negative_slope: float = setting(
        0.5, "Slope s of the MLP's leaky_relu(x, s)^2; 0 gives relu^2.", high=1
    )
    logit_softcap: float = setting(
        30.0, "Bound c of the logits: c * tanh(logits / c).", low=0.01, high=1e6
    )
    tie_embeddings: bool = setting(True, "Use the token embedding as the output head.")
    rope_base: float = setting(10_000.0, "Base of the RoPE frequencies.", low=1)
    rope_dims: int = setting(16, "Dimensions of each head that RoPE rotates; 0 rotates all.")
    rope_train_seq_len: int = setting(
        1024, "Context length above which the RoPE base grows (NTK).", low=1, high=1 << 20
    )
    xsa_last_n: int = setting(11, "Number of last layers with exclusive self-attention (XSA).")
    ln_scale: bool = setting(True, "Multiply the norms of a layer by 1 / sqrt(layer + 1).")
    unet_skips: bool = setting(True, "Add outputs of the first half of the layers to the second.")
    skip_gates_enabled: bool = setting(
        False, "Blend the U-Net skips in by a learned sigmoid gate instead of adding them."
    )
    num_loops: int = setting(
        0, "How often a pass repeats the layers LOOP_START to LOOP_END (depth recurrence).", high=64
    )
    loop_start: int = setting(3, "First layer that NUM_LOOPS repeats.")
    loop_end: int = setting(5, "Last layer that NUM_LOOPS repeats.")
    parallel_residual_start: int = setting(
        -1, "First layer whose attention and MLP read the same input; -1 for none.", low=-1
    )
    parallel_start_layer: int = setting(
        0, "First layer with two residual lanes, one for attention, one for the MLP; 0 for none."
    )
    parallel_final_lane: str = setting(
        "mean", "Lane that the output head reads.", choices=("mean", "attn", "mlp")
    )
    sparse_attn_gate_enabled: bool = setting(
        False, "Gate the output of each head by the first GATE_WINDOW dimensions of its input."
    )
    sparse_attn_gate_scale: float = setting(1.0, "Factor of that gate's input to its sigmoid.")
    gate_window: int = setting(12, "Dimensions that gates of tokens and heads read.", low=1)
    smear_gate: bool = setting(
        True, "Blend each embedding with that of the previous position, by a gate per channel."
    )
    smear_gate_enabled: bool = setting(
        False, "Add the previous position's embedding by a gate per token; needs SMEAR_GATE=0."
    )
    bigram_vocab_size: int = setting(
        2048, "Rows in the table of hashed token pairs (BigramHash); 0 disables it.", high=1 << 24
    )
    bigram_dim: int = setting(128, "Width of the BigramHash table.", low=2, high=65_536)
    bos_mask: bool = setting(
        True, "SmearGate and BigramHash stop at BOS; 0 crosses documents as published."
    )
    doc_attention: bool = setting(
        False,
        "Attention does not cross BOS, up to 16 + T / 64 documents in a sequence of T tokens; the "
        "JEPA head still crosses it.",
    )
    ve_enabled: bool = setting(True, "Add a second token embedding to the values of some layers.")
    ve_dim: int = setting(128, "Width of the value embedding's table.", low=2, high=65_536)
    ve_layers: str = setting(
        "", "Layers with value embeddings, such as 9,10; empty selects the last two."
    )
    # JEPA head (PR #832)
    jepa_chunk_size: int = setting(0, "Positions in a chunk of the JEPA head; 0 disables the head.")
    jepa_latent_dim: int = setting(256, "Width of a JEPA latent.", low=2, high=65_536)
    jepa_proj_hidden: int = setting(256, "Hidden width of the JEPA projector.", low=2, high=65_536)

    def __init_subclass__(cls) -> None:
        """Makes plain attributes of a subclass its defaults: `class Tiny(...): num_layers = 2`.

        Without this the inherited `__init__` would keep the defaults of the base class.
        """
        inherited = getattr(cls, "__dataclass_fields__", {})
        overrides = {name: value for name, value in vars(cls).items() if name in inherited}
        if overrides:
            for name, value in overrides.items():
                setattr(cls, name, field(default=value, metadata=inherited[name].metadata))
            own = vars(cls).get("__annotations__", {})
            cls.__annotations__ = {name: inherited[name].type for name in overrides} | own
            dataclass(frozen=True)(cls)

    def __post_init__(self) -> None:
        raise_faults(value_faults(self) or model_rules(self))

    @property
    def head_dim(self) -> int:
        """Width of a head."""
        return self.model_dim // self.num_heads

    @property
    def kv_dim(self) -> int:
        """Width of the keys, and of the values, of all heads."""
        return self.head_dim * self.num_kv_heads


@dataclass(frozen=True)
class Hyperparameters(ModelSettings):
    """All settings. The environment variable is the upper-case name. Defaults are PR #1124's."""

    # Run
    preset: str = setting(
        "",
        "A whole configuration under one name; other variables override parts of it.",
        choices=("", *PRESETS),
    )
    run_id: str = setting("", "Name of the run; empty takes date, time, seed and process id.")
    run_dir: str = setting("", "Folder of the run; empty takes logs/<RUN_ID>.")
    checkpoint_every: str = setting(
        "0", "Steps (500) or training seconds (60s) between checkpoints; 0 writes none."
    )
    resume: str = setting(
        "", "Checkpoint file to continue; auto takes the run's own, if there is one."
    )
    seed: int = setting(1337, "Seed of the initial weights and of all random choices.")
    attn: str = setting(
        "auto",
        "Attention back end; auto takes the first that works.",
        choices=("auto", "fa3", "cudnn", "flash", "math"),
    )
    compile: str = setting(
        "auto", "Use torch.compile; auto compiles on CUDA only.", choices=("auto", "0", "1")
    )
    # Data
    data_path: str = setting(
        "",
        "Folder of token shards; empty takes ./data/datasets/<CORPUS>_sp<VOCAB_SIZE>, or _byte260.",
    )
    tokenizer_path: str = setting(
        "",
        "SentencePiece model; empty takes ./data/tokenizers/<CORPUS>_<VOCAB_SIZE>_bpe.model, "
        "without the 10B of CORPUS.",
    )
    max_unknown_fraction: float = setting(
        0.005, "Largest fraction of validation tokens that may be unknown to the tokenizer.", high=1
    )
    train_order: str = setting(
        "shuffled",
        "Order of the training sequences: shuffled takes windows of all shards, sequential follows "
        "the token stream, as published.",
        choices=("shuffled", "sequential"),
    )
    train_batch_tokens: int = setting(786_432, "Tokens in a training step, over all ranks.", low=2)
    micro_batch_tokens: int = setting(
        98_304, "Largest number of tokens in one forward pass of a rank.", low=1
    )
    # Initial weights
    tied_embed_init_std: float = setting(
        0.005, "Standard deviation of the token embedding where it is also the head."
    )
    qk_gain_init: float = setting(1.5, "Initial gain of the queries, per head.", low=-1e18)
    # Depth recurrence
    enable_looping_at: float = setting(
        0.35, "Fraction of the run at which NUM_LOOPS begins to apply.", high=1
    )
    # Auxiliary losses
    jepa_lambda_max: float = setting(
        0.001, "Peak weight of the JEPA losses; 0 leaves the latents random."
    )
    jepa_phase1_frac: float = setting(
        0.3, "Fraction of the run before the JEPA losses start.", high=1
    )
    jepa_phase2_frac: float = setting(
        0.5,
        "Fraction of the run, after JEPA_PHASE1_FRAC, in which their weight rises; then it is 0.",
        low=1e-9,
        high=1,
    )
    jepa_sigreg_weight: float = setting(0.02, "Weight of SIGReg relative to the prediction error.")
    stp_enabled: bool = setting(False, "Train with the Semantic Tube Prediction loss (STP).")
    stp_lambda: float = setting(0.05, "Weight of the STP loss.")
    label_smoothing: float = setting(
        0.0, "Smoothing of the targets in the training loss; no score has it.", high=0.99
    )
    # Optimizers
    matrix_lr: float = setting(0.025, "Muon learning rate: matrices of the blocks.")
    scalar_lr: float = setting(
        0.025,
        "AdamW learning rate: gains, gates, mixes, and projections of BigramHash and value tables.",
    )
    tied_embed_lr: float = setting(
        0.035, "AdamW learning rate: embedding tables with TIE_EMBEDDINGS=1."
    )
    embed_lr: float = setting(0.6, "AdamW learning rate: embedding tables with TIE_EMBEDDINGS=0.")
    head_lr: float = setting(0.008, "AdamW learning rate: the head with TIE_EMBEDDINGS=0.")
    jepa_lr: float = setting(0.001, "AdamW learning rate: the JEPA head.")
    beta1: float = setting(0.9, "AdamW: decay of the first moment.", high=0.9999)
    beta2: float = setting(0.95, "AdamW: decay of the second moment.", high=0.99999)
    adam_eps: float = setting(1e-8, "AdamW: epsilon.")
    adam_wd: float = setting(0.04, "AdamW: weight decay; the head and the JEPA head have none.")
    embed_wd: float = setting(
        -1.0, "AdamW: weight decay of embedding tables; -1 takes ADAM_WD.", low=-1
    )
    muon_wd: float = setting(0.04, "Muon: weight decay.")
    muon_momentum: float = setting(0.99, "Muon: momentum after its warm-up.", high=0.9999)
    muon_momentum_warmup_start: float = setting(0.92, "Muon: momentum at step 0.", high=0.9999)
    muon_momentum_warmup_steps: int = setting(1500, "Muon: steps of the momentum's linear rise.")
    muon_backend_steps: int = setting(5, "Muon: Newton-Schulz iterations.", low=1)
    muon_coefficients: str = setting(
        "quintic",
        "Muon: coefficients of Newton-Schulz, one set for all iterations, or Polar Express.",
        choices=("quintic", "polar_express"),
    )
    muon_row_normalize: bool = setting(
        False, "Muon: divide each row of the update by its norm before Newton-Schulz (MuonEq-R)."
    )
    muon_slow_share: float = setting(
        0.0, "Muon: share of a slow momentum (0.98) beside a fast one (0.85); 0 has one.", high=1
    )
    grad_clip_norm: float = setting(0.3, "Largest norm of the gradient; 0 does not clip.")
    ema_enabled: bool = setting(True, "Keep an exponential moving average (EMA) of the weights.")
    ema_decay: float = setting(
        0.997, "Decay of the EMA; at step t at most (1 + t) / (10 + t).", high=0.999999
    )
    average_share: float = setting(
        1.0, "Share of the average in the final weights; the rest are the last weights.", high=1
    )
    swa_enabled: bool = setting(
        False, "Average the weights of late steps equally (SWA), instead of the EMA."
    )
    swa_start_frac: float = setting(
        0.2, "SWA takes steps at which the learning rate is below this part of its peak.", high=1
    )
    swa_every: int = setting(50, "Steps between the weights that SWA averages.", low=1)
    # Schedule
    iterations: int = setting(20_000, "Largest number of training steps.")
    max_wallclock_seconds: float = setting(
        600.0, "Largest number of training seconds; 0 is no limit."
    )
    warmup_steps: int = setting(
        20, "Steps before training that compile the program; their effect is undone."
    )
    warmdown_iters: int = setting(
        3500, "Number of last steps, in which the learning rates fall to 0."
    )
    warmdown_max_fraction: float = setting(
        0.6, "Largest part of the run that the warm-down takes.", high=1
    )
    warmdown_frac: float = setting(
        0.0, "Last fraction of the run that is the warm-down; 0 takes WARMDOWN_ITERS.", high=1
    )
    min_lr: float = setting(
        0.0, "Fraction of the learning rates at which the warm-down ends.", high=1
    )
    val_loss_every: int = setting(4000, "Steps between validations; 0 validates at the end only.")
    train_log_every: int = setting(500, "Steps between log lines; 0 logs the first ten steps only.")
    # Evaluate
    eval_seq_len: int = setting(
        0, "Tokens in a scoring window; 0 takes TRAIN_SEQ_LEN.", high=1 << 20
    )
    eval_stride: int = setting(
        64, "Tokens between windows of the sliding score; 0 omits that score."
    )
    eval_window: int = setting(
        0, "Attention window in tokens of the one-pass score; 0 omits that score.", high=1 << 20
    )
    eval_documents: bool = setting(
        False, "Also score document by document, with no context from another document."
    )
    val_batch_size: int = setting(
        524_288, "Tokens scored at once by 8 GPUs, as published; each takes an eighth.", low=1
    )
    canonical_mask: bool = setting(
        False, "Score with probability 0 for tokens that the tokenizer never emits after another."
    )
    ttt_enabled: bool = setting(False, "Also score with test-time training (TTT).")
    ttt_mode: str = setting(
        "sgd",
        "TTT: SGD trains all weights on the text so far (PR #549); LoRA trains adapters of each "
        "document on the document so far (PR #1530).",
        choices=("sgd", "lora"),
    )
    ttt_chunk_tokens: int = setting(
        32_768, "SGD TTT: tokens scored before training on them.", low=2
    )
    ttt_epochs: int = setting(3, "SGD TTT: passes over a scored chunk.")
    ttt_lr: float = setting(0.002, "SGD TTT: initial learning rate; falls to 0 as a cosine.")
    ttt_lora_rank: int = setting(96, "LoRA TTT: rank of the adapters.", low=1, high=65_536)
    ttt_lora_lr: float = setting(1e-4, "LoRA TTT: learning rate of AdamW.")
    phased_ttt_prefix_docs: int = setting(
        0,
        "LoRA TTT: after so many documents, the longest, SGD trains all weights on them; rounded "
        "up to whole batches of TTT_BATCH_SIZE; 0 omits that.",
    )
    global_ttt_lr: float = setting(
        0.001, "SGD of LoRA TTT: initial learning rate; falls to 0 as a cosine."
    )
    global_ttt_epochs: int = setting(1, "SGD of LoRA TTT: passes over a chunk.")
    global_ttt_chunk_tokens: int = setting(
        32_768, "SGD of LoRA TTT: tokens of a chunk; chunks are whole.", low=2
    )
    ttt_chunk_size: int = setting(
        48, "LoRA TTT: tokens of a document scored before a step on them.", low=1
    )
    ttt_batch_size: int = setting(64, "LoRA TTT: documents at once.", low=1)
    ttt_beta2: float = setting(
        0.999, "LoRA TTT: decay of AdamW's second moment; there is no first.", high=0.999999
    )
    ttt_weight_decay: float = setting(1.0, "LoRA TTT: weight decay of AdamW.")
    # Quantize and pack
    gptq_enabled: bool = setting(True, "Quantize matrices by GPTQ; 0 rounds to nearest.")
    gptq_calib: str = setting(
        "random",
        "Tokens that calibrate GPTQ: random ones, or training text.",
        choices=("random", "train"),
    )
    gptq_calib_tokens: int = setting(131_072, "Number of tokens that calibrate GPTQ.", low=1)
    gptq_embed: bool = setting(
        False, "Quantize the table of the output head by GPTQ too, with the inputs of the head."
    )
    matrix_bits: int = setting(6, "Range of the codes of matrices.", low=2, high=8)
    embed_bits: int = setting(8, "Range of the codes of tables.", low=2, high=8)
    scale_rule: str = setting(
        "search",
        "Scale of a row: search tries clips of its largest weight, as published; std takes k times "
        "its standard deviation (SDClip, PR #1394).",
        choices=("search", "std"),
    )
    matrix_clip_sigmas: float = setting(
        12.85, "SCALE_RULE=std: k of matrices; raised if the artifact is too large.", low=0.1
    )
    embed_clip_sigmas: float = setting(20.0, "SCALE_RULE=std: k of tables.", low=0.1)
    quantizer: str = setting(
        "scalar",
        "Codes of a weight: scalar, or those of a trellis of 8 states (trellis) or 4 (trellis4), "
        "which loses less at equal bytes. COMPRESSOR=range compresses them best.",
        choices=("scalar", "trellis4", "trellis"),
    )
    sensitivity_tokens: int = setting(
        0,
        "Calibration tokens on which each matrix is rounded alone, to choose how fine its codes "
        "are; 0 takes one k. Codes then range to 127, and *_BITS only set the scales before.",
        high=32_768,
    )
    tune_scales: int = setting(
        0,
        "Steps of Adam on row scales and float16 weights after GPTQ, on training text; GPTQ itself "
        "then counts as training.",
    )
    compressor: str = setting(
        "zstd", "Codec of the artifact.", choices=("zstd", "lzma", "brotli", "range")
    )

    @classmethod
    def from_env(cls, env: Mapping[str, str]) -> "Hyperparameters":
        """Returns settings by precedence: environment, PRESET, rule of VOCAB_SIZE, default.

        Raises SettingsError with all faults of the first of these that finds any: the values, the
        rules of the model, the rules of the run.
        """
        given = {
            f.name: parse_value(env[f.name.upper()], f.type)
            for f in fields(cls)
            if f.name.upper() in env
        }
        values = PRESETS.get(given.get("preset", ""), {}) | given
        if values.get("vocab_size") == BYTE_VOCAB:
            values = BYTE_RULES | values
        h = cls(**values)
        check_settings(h)
        return h

    @property
    def window_tokens(self) -> int:
        """Tokens in a scoring window."""
        return self.eval_seq_len or self.train_seq_len

    @property
    def stride_tokens(self) -> int:
        """Tokens that a window of the sliding score is after the one before."""
        return min(self.eval_stride or self.window_tokens, self.window_tokens)

    @property
    def training_seconds(self) -> float:
        """Seconds for everything that reads training data, math.inf without a limit."""
        return self.max_wallclock_seconds or math.inf

    @property
    def embedding_wd(self) -> float:
        """Weight decay of embedding tables."""
        return self.adam_wd if self.embed_wd < 0 else self.embed_wd

    @property
    def calibrates_on_text(self) -> bool:
        """Whether calibration reads training text, which counts as training."""
        calibrates = self.gptq_enabled or self.sensitivity_tokens > 0
        return calibrates and self.gptq_calib == "train"

    @property
    def quantizes_on_text(self) -> bool:
        """Whether anything after the last step reads training text."""
        return self.calibrates_on_text or self.tune_scales > 0


def parse_value(text: str, kind: Any) -> Any:
    """Returns the text as a value of its kind, or unchanged if it is not one."""
    if kind is bool:
        return {"0": False, "1": True}.get(text, text)
    with suppress(ValueError):
        return kind(text)
    return text


def value_faults(settings: ModelSettings) -> list[str]:
    """Returns a message for each setting whose own value is not legal."""
    kinds: dict[Any, str] = {bool: "0 or 1", int: "a whole number", float: "a number", str: "text"}
    faults = []
    for f in fields(settings):
        value, legal = getattr(settings, f.name), f.metadata
        says = f"{f.name.upper()}={value!r}: must be"
        accepted = (int, float) if f.type is float else (f.type,)
        if type(value) not in accepted:
            faults.append(f"{says} {kinds[f.type]}")
        elif f.type is str:
            if legal["choices"] and value not in legal["choices"]:
                faults.append(f"{says} one of {', '.join(filter(None, legal['choices']))}")
        elif not legal["low"] <= value <= legal["high"]:  # false for NaN too
            faults.append(f"{says} from {legal['low']:g} to {legal['high']:g}")
    return faults


def is_plain_name(text: str) -> bool:
    """Returns whether a text can be part of a file's name: no separators, no leading dot."""
    return re.fullmatch(r"\w[\w.+=-]*", text) is not None


def model_rules(m: ModelSettings) -> list[str]:
    """Returns a message for each rule that settings of the model break together."""
    layers = [name for name in m.ve_layers.split(",") if name]
    unknown = [name for name in layers if not (name.isdecimal() and int(name) < m.num_layers)]
    faults = []
    if not is_plain_name(m.corpus):
        faults.append(f"CORPUS={m.corpus!r}: must be a name of letters, digits and - _ . + =")
    if m.model_dim % (2 * m.num_heads):
        faults.append(
            f"MODEL_DIM={m.model_dim}: must be an even multiple of NUM_HEADS={m.num_heads}"
        )
    if m.num_heads % m.num_kv_heads:
        faults.append(f"NUM_KV_HEADS={m.num_kv_heads}: must divide NUM_HEADS={m.num_heads}")
    if m.rope_dims % 2 or m.rope_dims > m.head_dim:
        faults.append(
            f"ROPE_DIMS={m.rope_dims}: must be even and at most {m.head_dim}, the width of a head"
        )
    if 2 * m.jepa_chunk_size > m.train_seq_len:
        faults.append(
            f"JEPA_CHUNK_SIZE={m.jepa_chunk_size}: two chunks must fit in "
            f"TRAIN_SEQ_LEN={m.train_seq_len}"
        )
    if m.num_loops and not m.loop_start <= m.loop_end < m.num_layers:
        faults.append(
            f"LOOP_START={m.loop_start}: must be at most LOOP_END={m.loop_end}, and that below "
            f"NUM_LAYERS={m.num_layers}"
        )
    # Encoder visits and repeated layers have one lane.
    first = max(m.num_layers // 2, m.loop_end + 1 if m.num_loops else 1)
    if m.parallel_start_layer and not first <= m.parallel_start_layer < m.num_layers:
        faults.append(
            f"PARALLEL_START_LAYER={m.parallel_start_layer}: must be 0, or at least {first} and "
            f"below NUM_LAYERS={m.num_layers}: in the second half, after the layers that NUM_LOOPS "
            "repeats"
        )
    if m.smear_gate and m.smear_gate_enabled:
        faults.append(
            "SMEAR_GATE=1: must be 0 with SMEAR_GATE_ENABLED=1, the other form of the gate"
        )
    if m.gate_window > m.model_dim and (m.smear_gate_enabled or m.sparse_attn_gate_enabled):
        faults.append(f"GATE_WINDOW={m.gate_window}: must be at most MODEL_DIM={m.model_dim}")
    if m.bigram_vocab_size == 1:
        faults.append("BIGRAM_VOCAB_SIZE=1: must be 0 (disabled) or at least 2")
    if unknown:
        faults.append(
            f"VE_LAYERS={m.ve_layers!r}: must be layers below NUM_LAYERS={m.num_layers}, as 9,10"
        )
    return faults


def rules(h: Hyperparameters, world_size: int) -> list[str]:
    """Returns a message for each rule that settings of a run break together on so many ranks."""
    faults = []
    unit = h.train_seq_len * world_size
    if h.train_batch_tokens % unit:
        nearest = max(round(h.train_batch_tokens / unit), 1) * unit
        faults.append(
            f"TRAIN_BATCH_TOKENS={h.train_batch_tokens}: must be a multiple of "
            f"TRAIN_SEQ_LEN={h.train_seq_len} x {world_size} ranks, such as {nearest}"
        )
    if h.stp_enabled and h.train_seq_len < 3:
        faults.append(f"TRAIN_SEQ_LEN={h.train_seq_len}: STP_ENABLED=1 needs at least 3")
    if h.num_loops and h.enable_looping_at == 1:
        faults.append(
            "ENABLE_LOOPING_AT=1: must be below 1, because the artifact is scored with NUM_LOOPS"
        )
    if h.swa_enabled and h.min_lr >= h.swa_start_frac:
        faults.append(
            f"MIN_LR={h.min_lr:g}: must be below SWA_START_FRAC={h.swa_start_frac:g}, or "
            "SWA_ENABLED=1 averages nothing"
        )
    if h.sensitivity_tokens > h.gptq_calib_tokens:
        faults.append(
            f"SENSITIVITY_TOKENS={h.sensitivity_tokens}: must be at most "
            f"GPTQ_CALIB_TOKENS={h.gptq_calib_tokens}"
        )
    if h.run_id and not is_plain_name(h.run_id):
        faults.append(f"RUN_ID={h.run_id!r}: must be a name of letters, digits and - _ . + =")
    if not re.fullmatch(r"\d+s?", h.checkpoint_every, re.ASCII):
        faults.append(
            f"CHECKPOINT_EVERY={h.checkpoint_every!r}: must be steps, such as 500, or seconds, "
            "such as 60s"
        )
    if h.resume == "auto" and not (h.run_id or h.run_dir):
        faults.append("RESUME=auto: needs RUN_ID or RUN_DIR, to know which run to continue")
    return faults


# Settings that a resumed run may change; all others must be those of the checkpoint. result.json
# records the changes.
FREE_ON_RESUME = frozenset(
    """
    preset run_id run_dir checkpoint_every resume attn compile data_path tokenizer_path
    max_unknown_fraction micro_batch_tokens iterations max_wallclock_seconds warmup_steps
    val_loss_every train_log_every eval_seq_len eval_stride eval_window eval_documents
    val_batch_size canonical_mask ttt_enabled ttt_mode ttt_chunk_tokens ttt_epochs ttt_lr
    ttt_lora_rank ttt_lora_lr phased_ttt_prefix_docs global_ttt_lr global_ttt_epochs
    global_ttt_chunk_tokens ttt_chunk_size ttt_batch_size ttt_beta2 ttt_weight_decay
    gptq_enabled gptq_calib gptq_calib_tokens gptq_embed matrix_bits embed_bits scale_rule
    matrix_clip_sigmas embed_clip_sigmas quantizer sensitivity_tokens tune_scales compressor
    """.split()
)


def raise_faults(faults: list[str]) -> None:
    """Raises SettingsError with a line for each fault, if there are any."""
    if faults:
        raise SettingsError("\n".join(faults))


def check_settings(h: Hyperparameters, world_size: int = 1) -> None:
    """Raises SettingsError if the settings break a rule on so many ranks."""
    raise_faults(rules(h, world_size))


def settings_notes(h: Hyperparameters, env: Mapping[str, str]) -> list[str]:
    """Returns what the log should say of the environment: rules applied, variables ignored."""
    notes = []
    if h.vocab_size == BYTE_VOCAB:
        notes.append(f"rule: VOCAB_SIZE={BYTE_VOCAB} sets {env_form(BYTE_RULES)}, unless given")
    names = [f.name.upper() for f in fields(h)]
    for name in sorted(env.keys() - names):
        for near in difflib.get_close_matches(name.upper(), names, n=1, cutoff=0.88):
            notes.append(f"warning: {name} is not a setting; did you mean {near}?")
    for name in sorted(env.keys() & UNSUPPORTED_SETTINGS):
        notes.append(f"warning: {name} is a setting of published scripts that is not built here")
    if h.warmdown_frac and "WARMDOWN_ITERS" in env:
        notes.append(
            f"warning: WARMDOWN_ITERS is ignored, because WARMDOWN_FRAC={h.warmdown_frac:g}; set "
            "WARMDOWN_FRAC=0"
        )
    if h.eval_stride >= h.window_tokens:
        notes.append(
            f"warning: EVAL_STRIDE={h.eval_stride} is not below the window of {h.window_tokens} "
            "tokens, so there is no sliding score"
        )
    late_qat = parse_value(env.get("LATE_QAT_THRESHOLD", "0"), float)
    if late_qat not in ("", 0.0):
        notes.append(
            "warning: LATE_QAT_THRESHOLD is ignored: late QAT never ran in the published scripts, "
            "and had no effect where it did run"
        )
    return notes


def env_form(settings: Mapping[str, Any]) -> str:
    """Returns settings as one would type them before a command: NAME=value, quoted."""
    values = {k: int(v) if isinstance(v, bool) else v for k, v in settings.items()}
    return " ".join(f"{name.upper()}={shlex.quote(str(v))}" for name, v in values.items())


def changed_settings(h: Hyperparameters) -> dict[str, Any]:
    """Returns the settings that differ from the default, or from what PRESET or a rule sets.

    As an environment they give the same settings again.
    """
    defaults = {f.name: f.default for f in fields(h)}
    rule = BYTE_RULES if h.vocab_size == BYTE_VOCAB else {}
    implied = defaults | rule | PRESETS.get(h.preset, {})
    return {k: v for k, v in asdict(h).items() if v != defaults[k] or v != implied[k]}


def settings_table() -> str:
    """Returns a table of every setting for --help: name, default, meaning."""
    lines = []
    for f in fields(Hyperparameters):
        default: Any = f.default
        default = int(default) if f.type is bool else default
        choices = ", ".join(filter(None, f.metadata["choices"]))
        meaning = f.metadata["meaning"] + (f" ({choices})" if choices else "")
        row = f"{f.name.upper():<28}{default!s:<12}"
        lines += textwrap.wrap(meaning, 100, initial_indent=row, subsequent_indent=" " * 40)
    return "\n".join(lines)


def parse_arguments(argv: Sequence[str]) -> argparse.Namespace:
    """Returns the command line; --help shows the settings."""
    parser = argparse.ArgumentParser(
        description=f"{__doc__}\nSettings are environment variables:\n\n{settings_table()}",
        formatter_class=argparse.RawTextHelpFormatter,
    )
    add = parser.add_mutually_exclusive_group().add_argument
    add("--check", action="store_true", help="check everything, train nothing")
    add("--eval", metavar="ARTIFACT", type=Path, help="score an artifact again")
    add("--quantize", metavar="CHECKPOINT", type=Path, help="pack and score saved weights again")
    args, unknown = parser.parse_known_args(argv)
    if unknown:
        parser.error(
            f"unknown arguments: {shlex.join(unknown)}. Settings are environment variables and "
            "stand before the command: NUM_LAYERS=3 python train_gpt.py"
        )
    return args


def model_settings(settings: ModelSettings) -> dict[str, Any]:
    """Returns the settings that the artifact stores."""
    return {f.name: getattr(settings, f.name) for f in fields(ModelSettings)}


# ---- Runtime: where it runs ----

WRITING = threading.RLock()  # held while a file is written
JOIN_TIMEOUT = timedelta(minutes=2)  # in which all ranks must start
GPU_NODES = Path("/dev")  # has nvidia0 and so on, for each GPU that the NVIDIA driver has found


@dataclass(frozen=True)
class Ranks:
    """This process among those of a distributed run, and every collective that the program uses.

    A single process has no process group; its collectives return their inputs.
    """

    rank: int = 0
    world_size: int = 1

    def broadcast_from_rank0(self, make: Callable[[], T]) -> T:
        """Returns on every rank what make() returns on rank 0; only rank 0 calls it."""
        values: list[Any] = [make() if self.rank == 0 else None]
        if dist.is_initialized():
            dist.broadcast_object_list(values)
        return values[0]

    def all_reduce_(self, tensor: Tensor, op: Any = dist.ReduceOp.SUM) -> Tensor:
        """Replaces a tensor by its sum (or other reduction) over all ranks, and returns it."""
        if dist.is_initialized():
            dist.all_reduce(tensor, op)
        return tensor

    def all_reduce_max(self, *values: float) -> list[float]:
        """Returns the largest of each value over all ranks."""
        largest = torch.tensor(values, dtype=torch.float64)
        return self.all_reduce_(largest, dist.ReduceOp.MAX).tolist()

    def map_over_ranks(self, function: Callable[..., Tensor], *stacks: Tensor) -> Tensor:
        """Applies `function` to stacks [n, ...] with the n items divided among the ranks.

        Returns the output [n, ...] on every rank, by all-gather.
        """
        if self.world_size == 1:
            return function(*stacks)
        n = len(stacks[0])
        share = -(-n // self.world_size)
        # The last ranks repeat the last item, so that all shares have one shape.
        first = self.rank * share
        mine = torch.arange(first, first + share, device=stacks[0].device).clamp(max=n - 1)
        output = function(*(stack[mine] for stack in stacks))
        raw = output.contiguous().view(torch.uint8)  # collectives do not take every dtype
        whole = raw.new_empty(self.world_size * len(raw), *raw.shape[1:])
        # all_gather_single is the name from torch 2.13 on.
        gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
        gather(whole, raw)
        return whole[:n].view(output.dtype)


def join_ranks(env: Mapping[str, str], on_lost: Callable[[], None]) -> Ranks:
    """Joins the process group that torchrun describes in the environment, if there is one.

    A thread calls on_lost() when another rank is gone, or silent for 30 s. Raises SettingsError
    where torchrun's variables are incomplete, lead to no group in JOIN_TIMEOUT, or ask for more
    GPUs than there are.
    """
    if (env.get("WORLD_SIZE", "1"), env.get("RANK", "0")) == ("1", "0"):
        return Ranks()
    gpus = torch.cuda.device_count()
    try:
        local_rank = int(env.get("LOCAL_RANK", "0"))
        if gpus:
            if local_rank >= gpus:
                raise ValueError(f"this machine has {gpus} GPUs; lower --nproc_per_node")
            torch.cuda.set_device(local_rank)
        store, rank, world_size = next(dist.rendezvous("env://", timeout=JOIN_TIMEOUT))
        store.set_timeout(timedelta(minutes=10))  # for later: ranks compile at different speeds
        backend = "cpu:gloo,cuda:nccl" if gpus else "gloo"
        dist.init_process_group(backend, store=store, rank=rank, world_size=world_size)
    except (ValueError, RuntimeError) as error:  # no variable, no such host, a rank is missing
        names = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
        given = env_form({name: env[name] for name in names if name in env})
        raise SettingsError(f"{given}: {error}; launch several processes with torchrun") from None
    heartbeat = dist.new_group(backend="gloo", timeout=timedelta(seconds=30))

    def watch() -> None:
        with suppress(Exception):  # raised when a rank is gone or silent
            while True:
                time.sleep(1)
                dist.barrier(heartbeat)
        time.sleep(5)  # time for this rank to end by itself
        with WRITING:  # a file that it writes is first written to its end
            on_lost()

    threading.Thread(target=watch, daemon=True).start()
    return Ranks(dist.get_rank(), dist.get_world_size())


def bind_flat_gradient_(params: Sequence[nn.Parameter]) -> Tensor:
    """Makes the gradients of float32 parameters views of one tensor, and returns it.

    Reducing, clipping and clearing all gradients is then one operation each.
    """
    sizes = [p.numel() for p in params]
    flat = torch.zeros(sum(sizes), device=params[0].device)
    for p, part in zip(params, flat.split(sizes)):
        p.grad = part.view_as(p)
    return flat


@dataclass(frozen=True)
class Device:
    """The device of this rank and how the program computes there."""

    device: torch.device
    dtype: torch.dtype  # of activations; weights are float32
    compiled: bool
    attention: str = "flash"  # the back end

    def compile(self, function: Callable[..., Any], dynamic: bool = False) -> Callable[..., Any]:
        """Returns the function, compiled if this device compiles: for each shape, or for all."""
        if not self.compiled:
            return function
        torch._dynamo.config.recompile_limit = 64  # scoring halves its batches without memory
        return torch.compile(function, dynamic=dynamic, fullgraph=True)

    def now(self) -> float:
        """Returns seconds of a monotonic clock, after all queued work is done."""
        if self.is_cuda:
            torch.cuda.synchronize(self.device)
        return time.perf_counter()

    def send(self, tensor: Tensor) -> Tensor:
        """Returns a tensor of the CPU on the device; a GPU copies it when it comes to it."""
        tensor = tensor.pin_memory() if self.is_cuda else tensor
        return tensor.to(self.device, non_blocking=True)

    @property
    def is_cuda(self) -> bool:
        """Whether it is a GPU."""
        return self.device.type == "cuda"

    def describe(self) -> dict[str, Any]:
        """Returns the name of the device, and versions."""
        name = torch.cuda.get_device_name(self.device) if self.is_cuda else platform.machine()
        return {
            "device": name,
            "dtype": str(self.dtype).removeprefix("torch."),
            "compiled": self.compiled,
            "torch": torch.__version__,
            "python": platform.python_version(),
            "attention": self.attention,
        }


def start_device(compile_mode: str) -> tuple[Device, list[str]]:
    """Returns the device of this rank, and notes for the log.

    bf16 needs a GPU of compute capability 8; older ones emulate it slowly, so they take float32.
    Raises SettingsError if there is a GPU that torch cannot use, unless CUDA_VISIBLE_DEVICES hides
    it.
    """
    if not torch.cuda.is_available():
        nodes = sorted(GPU_NODES.glob("nvidia[0-9]*"))
        # CUDA reads the list up to the first word that names no GPU.
        visible = os.environ.get("CUDA_VISIBLE_DEVICES", "0")
        if nodes and re.match(r"\s*(\d|GPU-|MIG-)", visible):
            raise SettingsError(
                f"{nodes[0]}: this machine has a GPU that torch {torch.__version__} cannot use; "
                "install the build of torch that fits its driver, or set CUDA_VISIBLE_DEVICES= to "
                "run on the CPU"
            )
        keep_freed_memory()
        device = Device(torch.device("cpu"), torch.float32, compiled=compile_mode == "1")
        return device, ["device:cpu, no CUDA GPU found: times are not comparable with the records"]
    index = torch.cuda.current_device()
    has_bf16 = torch.cuda.get_device_capability(index)[0] >= 8
    dtype = torch.bfloat16 if has_bf16 else torch.float32
    notes = [] if has_bf16 else ["dtype:fp32, this GPU has no bf16"]
    return Device(torch.device("cuda", index), dtype, compiled=compile_mode != "0"), notes


def keep_freed_memory() -> None:
    """Tells glibc, if it is the C library, to keep freed memory: fresh pages are slow."""
    with suppress(AttributeError, OSError, TypeError):
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(-3, 1 << 25)  # M_MMAP_THRESHOLD, its maximum
        mallopt(-1, 1 << 30)  # M_TRIM_THRESHOLD


@contextmanager
def matmul_precision(precision: str) -> Iterator[None]:
    """Sets the precision of float32 products inside a block; restores it afterwards.

    "highest" is float32. "medium" allows TF32 on a GPU, and oneDNN's faster kernels on a CPU.
    """
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(precision)
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def is_out_of_memory(error: BaseException) -> bool:
    """Returns whether the memory of a GPU or a CPU ran out."""
    kinds = (MemoryError, torch.OutOfMemoryError)
    says = r"allocate mem|out of memory|ALLOC\w*_FAILED"  # of CPUs, CUDA and NCCL, CUDA's libraries
    return isinstance(error, kinds) or re.search(says, str(error)) is not None


# ---- Attention: the back ends, and one that works here ----

Attend = Callable[..., Tensor]  # attend(q, k, v, *, window=0, documents=None), see attend_sdpa
VARLEN_HAS_GROUPS = torch.__version__ >= "2.12"  # PyTorch's attention for documents
MAX_ATTENTION_ERROR = 0.03  # of a back end in bf16, relative to float32; about 0.005 is rounding


class Documents(NamedTuple):
    """Which document each position of a batch [B, T] belongs to, in the two forms kernels need.

    The shapes follow from B and T alone, so a compiled program fits every batch. The part of a
    sequence after its BOS number 16 + T / 64 counts as one document.
    """

    numbers: Tensor  # int64 [B, T], BOS tokens so far in the sequence
    offsets: Tensor  # int32 [n], where documents start in B x T positions; filled up with B x T

    @classmethod
    def of_ids(cls, ids: Tensor, training: bool) -> "Documents":
        """Returns the documents of ids [B, T].

        Each entry of `offsets` costs time in the kernels even if it is not used. In training there
        are few: the BOS tokens of a batch after the first 64 + B x T / 256 separate nothing there.
        """
        rows, length = ids.shape
        most = 16 + length // 64
        numbers = (ids == BOS_ID).cumsum(1).clamp(max=most)
        capacity = 64 + ids.numel() // 256 if training else rows * most
        starts = numbers.diff(dim=1) > 0
        starts &= starts.flatten().cumsum(0).view_as(starts) <= capacity
        position = F.pad(starts, (1, 0), value=True).flatten().cumsum(0)  # in the list of starts
        wanted = torch.arange(1, rows + capacity + 2, device=ids.device)
        return cls(numbers, torch.searchsorted(position, wanted, out_int32=True))


def attend_sdpa(
    q: Tensor, k: Tensor, v: Tensor, *, window: int = 0, documents: Documents | None = None
) -> Tensor:
    """Returns causal grouped-query attention by PyTorch. Shapes: q [B, T, H, d], k, v [B, T, K, d].

    With a window each position attends to the last `window` positions, itself included; with
    documents, to positions of its document.
    """
    if 0 < window < q.size(1):
        return attend_window(q, k, v, window, documents)
    mask = None
    if documents is not None:
        same = documents.numbers.unsqueeze(2) == documents.numbers.unsqueeze(1)
        mask = same.tril().unsqueeze(1)  # [B, 1, T, T]
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    y = F.scaled_dot_product_attention(
        q, k, v, attn_mask=mask, is_causal=mask is None, enable_gqa=q.size(1) != k.size(1)
    )
    return y.transpose(1, 2)


def attend_flash(
    q: Tensor, k: Tensor, v: Tensor, *, window: int = 0, documents: Documents | None = None
) -> Tensor:
    """Returns attend_sdpa; documents are kept apart by FlashAttention's kernel, not by a mask."""
    if documents is None:
        return attend_sdpa(q, k, v, window=window)
    from torch.nn.attention.varlen import varlen_attn  # this takes a second, and loads the compiler

    shape, longest, offsets = q.shape, q.size(1), documents.offsets
    q, k, v = (x.flatten(0, 1) for x in (q, k, v))
    reach = (window - 1, 0)  # positions before and after; -1 is no bound
    options: dict[str, Any] = {"enable_gqa": True}
    if not VARLEN_HAS_GROUPS:
        group, options = q.size(1) // k.size(1), {}
        k, v = k.repeat_interleave(group, dim=1), v.repeat_interleave(group, dim=1)
    y: Any = varlen_attn(q, k, v, offsets, offsets, longest, longest, window_size=reach, **options)
    return y.view(shape)


def attend_on(device: Device) -> Attend:
    """Returns the attention function of models on a device."""
    has_flash = device.is_cuda and device.attention in ("fa3", "flash")
    return attend_flash if has_flash else attend_sdpa


def attend_window(
    q: Tensor, k: Tensor, v: Tensor, window: int, documents: Documents | None
) -> Tensor:
    """Returns causal attention to the last `window` positions, for T > window.

    The first `window` positions are plain causal attention. The others are cut into blocks of S
    queries; each block attends to the window + S keys that end with it, under one mask for all
    if there are no documents.
    """
    rest = q.size(1) - window
    block = -(-window // 8)
    mask = torch.ones(block, window + block, dtype=torch.bool, device=q.device)
    mask = mask.tril(window).triu(1)  # query s sees keys s + 1 to s + window
    if documents is not None:
        numbers = F.pad(documents.numbers, (0, -rest % block))
        of_queries = numbers[:, window:].unfold(1, block, block)  # [B, N, S]
        of_keys = numbers.unfold(1, window + block, block)  # [B, N, window + S]
        same = of_queries.unsqueeze(3) == of_keys.unsqueeze(2)
        mask = mask & same.flatten(0, 1).unsqueeze(1)  # [B N, 1, S, window + S]
        documents = documents._replace(numbers=documents.numbers[:, :window])
    first = attend_sdpa(q[:, :window], k[:, :window], v[:, :window], documents=documents)
    padding = (0, 0, 0, 0, 0, -rest % block)
    q = F.pad(q[:, window:], padding)  # [B, N S, H, d]
    k, v = F.pad(k, padding), F.pad(v, padding)  # [B, window + N S, K, d]
    group = q.size(2) // k.size(2)
    k, v = k.repeat_interleave(group, dim=2), v.repeat_interleave(group, dim=2)
    q = q.unfold(1, block, block)  # [B, N, H, d, S]
    k, v = (x.unfold(1, window + block, block) for x in (k, v))  # [B, N, H, d, window + S]
    q, k, v = (x.transpose(3, 4).flatten(0, 1) for x in (q, k, v))  # [B N, H, S or window + S, d]
    backends = [SDPBackend.EFFICIENT_ATTENTION, SDPBackend.FLASH_ATTENTION, SDPBackend.MATH]
    with sdpa_kernel(backends):
        y = F.scaled_dot_product_attention(q, k, v, mask).transpose(1, 2)  # [B N, S, H, d]
    y = y.reshape(len(first), -1, *y.shape[2:])[:, :rest]
    return torch.cat((first, y), dim=1)


def select_attention(name: str) -> None:
    """Enables one back end of attend_sdpa and disables the others.

    FlashAttention 3 takes the place of PyTorch's flash kernel. Raises an error that says what lacks
    if it cannot.
    """
    if current_flash_attention_impl():
        restore_flash_attention_impl()
    if name == "fa3":
        try:
            importlib.import_module("flash_attn_interface")
        except ModuleNotFoundError:  # some installations have it inside the package
            module = importlib.import_module("flash_attn_3.flash_attn_interface")
            sys.modules["flash_attn_interface"] = module
        if not torch.cuda.is_available():
            raise RuntimeError("FlashAttention 3 needs a Hopper GPU")
        activate_flash_attention_impl("FA3")
        name = "flash"
    for backend in ("cudnn", "flash", "math", "mem_efficient"):
        getattr(torch.backends.cuda, f"enable_{backend}_sdp")(backend == name)


def probe_attention(device: Device, h: Hyperparameters, rows: int) -> str:
    """Runs the device's back end forward and backward on `rows` training sequences.

    Outputs and gradients of the first sequence are compared with PyTorch's math back end in
    float32. Returns what went wrong, or "".
    """
    heads = (h.num_heads, h.num_kv_heads, h.num_kv_heads)
    compared = min(h.train_seq_len, 1024)
    length = h.train_seq_len if device.is_cuda else compared  # of a CPU all is compared
    draws = torch.Generator(device.device).manual_seed(0)
    options: dict[str, Any] = {"generator": draws, "device": device.device, "dtype": device.dtype}

    def run(attend: Attend, qkv: Tensor, weights: Tensor) -> tuple[Tensor, ...]:
        """Returns the output, and the gradient of qkv [rows, T, heads, d]."""
        ids = torch.arange(qkv.size(1), device=qkv.device).expand(len(qkv), -1) % 300  # some BOS
        documents = Documents.of_ids(ids, training=True) if h.doc_attention else None
        y = attend(*qkv.requires_grad_().split(heads, dim=2), documents=documents)
        return y, *torch.autograd.grad(y, qkv, weights)

    try:
        select_attention(device.attention)
        qkv = torch.randn((rows, length, sum(heads), h.head_dim), **options)
        weights = torch.randn((rows, length, h.num_heads, h.head_dim), **options)
        weights[0, compared:] = 0
        found = run(device.compile(attend_on(device)), qkv, weights)
        first, weights = (x[:1, :compared].detach().float() for x in (qkv, weights))
        with sdpa_kernel(SDPBackend.MATH):
            expected = run(attend_sdpa, first, weights)
    except Exception as error:  # the next back end may run
        return f"{error!r:.200}"
    if not all(x.isfinite().all() for x in found):
        return "it gave NaN"
    for what, a, b in zip(("output", "gradient"), found, expected):
        difference = ((a[:1, :compared] - b).norm() / b.norm()).item()
        if difference > MAX_ATTENTION_ERROR:
            return f"its {what} differs from the math back end's by {difference:.1%}"
    return ""


def choose_attention(h: Hyperparameters, device: Device, ranks: Ranks) -> tuple[Device, list[str]]:
    """Returns the device with the first back end that runs on all ranks, and notes for the log.

    With COMPILE=auto the device no longer compiles if that failed with every back end. Raises
    SettingsError if nothing works, or what ATTN or COMPILE names does not.
    """
    hopper = device.is_cuda and torch.cuda.get_device_capability(device.device)[0] == 9
    names = ["fa3", "cudnn", "flash", "math"] if hopper else ["flash", "cudnn", "math"]
    if h.doc_attention:
        names.remove("cudnn")  # PyTorch has no kernel of cuDNN for documents
    if h.attn != "auto":
        names = [h.attn]
    passed = min(h.micro_batch_tokens, h.train_batch_tokens // ranks.world_size)
    rows = max(passed // h.train_seq_len, 1) if device.is_cuda else 1
    candidates = [replace(device, attention=name) for name in names]
    if device.compiled and h.compile == "auto":
        candidates += [replace(candidate, compiled=False) for candidate in candidates]
    notes: list[str] = []
    for candidate in candidates:
        fault = probe_attention(candidate, h, rows)
        if not ranks.all_reduce_max(len(fault))[0]:
            return candidate, notes
        reason, tried = fault or "it failed on another rank", f"compiled:{candidate.compiled}"
        notes.append(f"attention:{candidate.attention} {tried} not used: {reason}")
        torch.compiler.reset()
    fault = f"ATTN={h.attn} COMPILE={h.compile}: cannot run here; use ATTN=auto or COMPILE=0"
    raise SettingsError("\n".join((fault, *notes)))


# ---- Log and files: the run's log, atomic writes, tensors on disk ----


MAX_HEADER = 1 << 20  # bytes of a checkpoint's header; that of 200 layers has 0.7 MiB


class DataError(ValueError):
    """A shard, tokenizer, checkpoint or artifact that cannot be used."""

    status = "data"


@contextmanager
def raise_data_error(what: str) -> Iterator[None]:
    """Turns whatever a damaged file raises inside a block into a DataError that names it."""
    try:
        yield
    except (DataError, MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        raise DataError(f"{what}: {error!r:.300}") from None


def check(condition: object, fault: str) -> None:
    """Raises ValueError with a message unless the condition holds."""
    if not condition:
        raise ValueError(fault)


class Log:
    """The run's output: lines for people, JSON events for programs, a line that shows progress.

    Lines go to the screen and, once `folder` is set, to train.log there; events to events.jsonl.
    A silent log, that of any rank but the first, writes nothing.
    """

    def __init__(self, folder: Path | None = None, silent: bool = False) -> None:
        self.folder, self.silent = folder, silent

    def __call__(self, line: str) -> None:
        """Writes a line."""
        if self.silent:
            return
        self.progress("")
        with suppress(OSError):
            print(line, flush=True)
        self.append("train.log", line)

    def event(self, kind: str, **values: Any) -> None:
        """Writes an event."""
        if not self.silent:
            self.append("events.jsonl", json.dumps({"event": kind, **values}))

    def progress(self, text: str) -> None:
        """Shows a text in place of the previous one, on a terminal only."""
        if not self.silent and sys.stderr.isatty():
            with suppress(OSError):
                print(f"\r\033[K{text}", end="", file=sys.stderr, flush=True)

    def append(self, name: str, line: str) -> None:
        """Appends a line to a file of the folder; a full disk must not end the run."""
        if self.folder:
            data = (line + "\n").encode("utf-8", "backslashreplace")
            with suppress(OSError), open(self.folder / name, "ab") as file:
                file.write(data)


def write_atomically(path: Path, data: bytes) -> None:
    """Writes a file so that, whatever happens, either the new or the old content is there."""
    partial_path = path.with_name(f"{path.name}.{os.getpid()}.part")
    try:
        with WRITING, open(partial_path, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
            partial_path.replace(path)
    except OSError as error:  # a full disk has no name
        raise OSError(error.errno, error.strerror, str(path)) from None
    finally:
        partial_path.unlink(missing_ok=True)


def require(package: str, purpose: str) -> None:
    """Raises SettingsError that names an optional package and its purpose if it is missing."""
    if importlib.util.find_spec(package) is None:
        raise SettingsError(f"{purpose} needs the {package} package: pip install {package}")


def write_tensors(path: Path, tensors: Mapping[str, Tensor], settings: Mapping[str, Any]) -> None:
    """Writes tensors and settings as a safetensors file."""
    from safetensors.torch import save

    copies = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    write_atomically(path, save(copies, {"settings": json.dumps(settings)}))


def read_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Returns the tensors of a safetensors file, mapped from disk, and the settings it states."""
    from safetensors import safe_open

    with open(path, "rb") as file:
        header_bytes = int.from_bytes(file.read(8), "little")
    check(header_bytes <= MAX_HEADER, f"its header has {header_bytes} bytes")
    with safe_open(path, framework="pt") as file:
        stated: Any = (file.metadata() or {}).get("settings", "{}")
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    with suppress(ValueError):
        stated = json.loads(stated)
    return tensors, stated if isinstance(stated, dict) else {"settings": stated}  # another's


# ---- Data: shards, batches, bytes of text ----

SHARD_MAGIC, SHARD_VERSION, SHARD_HEADER_INTS = 20240520, 1, 256
PROOF_TOKENS = 1_000_000  # validation tokens on which the byte table must agree with decoded text
VAL_BYTES = 151_080_113  # bytes of the challenge's validation text, as PR #832 scored it


def shard_header(count: int) -> bytes:
    """Returns the header of a shard: 256 little-endian int32, namely magic, version, count, zeros.

    The shard's tokens follow as little-endian uint16.
    """
    used = struct.pack("<3i", SHARD_MAGIC, SHARD_VERSION, count)
    return used.ljust(4 * SHARD_HEADER_INTS, b"\0")


def read_shard(path: Path) -> np.ndarray:
    """Returns the tokens of a shard, uint16 [count], mapped from disk.

    Raises DataError if it is damaged, OSError if it cannot be read.
    """
    header, size = np.fromfile(path, "<i4", SHARD_HEADER_INTS), path.stat().st_size
    magic, version, count = (*header.tolist(), 0, 0, 0)[:3]
    needed = 4 * SHARD_HEADER_INTS + 2 * count
    if (magic, version) != (SHARD_MAGIC, SHARD_VERSION) or count <= 0 or size != needed:
        raise DataError(
            f"{path}: not a complete shard: magic {magic}, version {version}, {count} tokens need "
            f"{needed} bytes, the file has {size}; make or download it again"
        )
    return np.memmap(path, "<u2", "r", offset=4 * SHARD_HEADER_INTS, shape=(count,))


class TokenStream:
    """The shards of one split in the order of their names, repeated without end."""

    def __init__(self, folder: Path, split: str, vocab_size: int) -> None:
        self.pattern, self.vocab_size = folder / f"fineweb_{split}_*.bin", vocab_size
        self.paths = sorted(folder.glob(self.pattern.name))
        if not self.paths:
            raise DataError(
                f"DATA_PATH={folder}: no file matches {self.pattern.name}. Run `python "
                "data/prepare.py` for the embedded corpus (PRESET=cpu) or `python "
                "data/download.py` for the challenge's shards"
            )
        self.shards = [read_shard(path) for path in self.paths]
        # Where each shard begins, and where the last one ends.
        self.bounds = [*accumulate(map(len, self.shards), initial=0)]

    def __len__(self) -> int:
        return self.bounds[-1]

    def fingerprint(self) -> int:
        """Returns a checksum of the shards' lengths and first tokens."""
        heads = [(len(shard), shard[:1000].tolist()) for shard in self.shards]
        return zlib.crc32(repr(heads).encode())

    def check(self, log: Log, ranks: Ranks) -> None:
        """Warns of missing shards. Raises DataError for a token id outside the vocabulary.

        The shards are divided among the ranks, which must all see the same ones.
        """
        count, last = len(self.paths), self.paths[-1].stem[-6:]
        if last.isdecimal() and count <= int(last):
            log(f"warning: {self.pattern}: {count} of {int(last) + 1} shards found")
        own = self.fingerprint()
        if ranks.all_reduce_max(own, -own) != [own, -own]:
            raise DataError(
                f"{self.pattern}: ranks see different shards; copy the same to all nodes"
            )
        for index in range(ranks.rank, count, ranks.world_size):
            log.progress(f"checking {self.paths[index]}")
            largest = int(self.shards[index].max())
            if largest >= self.vocab_size:
                raise DataError(
                    f"{self.paths[index]}: token id {largest} is not below "
                    f"VOCAB_SIZE={self.vocab_size}; change DATA_PATH or VOCAB_SIZE"
                )

    def prefetch(self, position: int, count: int) -> None:
        """Asks the system to read tokens from disk, so that reads of many places overlap."""
        at = position % len(self)
        index = bisect.bisect(self.bounds, at) - 1
        start = 4 * SHARD_HEADER_INTS + 2 * (at - self.bounds[index])
        mapped: Any = self.shards[index].base
        if hasattr(mmap, "MADV_WILLNEED"):  # not on Windows
            mapped.madvise(mmap.MADV_WILLNEED, start & -mmap.PAGESIZE, mmap.PAGESIZE + 2 * count)

    def read(self, position: int, count: int, dtype: Any = np.int64) -> Tensor:
        """Returns `count` tokens from a position on."""
        tokens, filled = np.empty(count, dtype), 0
        while filled < count:
            at = (position + filled) % len(self)
            index = bisect.bisect(self.bounds, at) - 1
            part = self.shards[index][at - self.bounds[index] :][: count - filled]
            tokens[filled : filled + len(part)] = part
            filled += len(part)
        return torch.from_numpy(tokens)


class TrainingBatches:
    """The training text cut into sequences of T tokens; a step reads the next rows of them.

    Shuffled, a sequence is one of the n windows of T tokens into which the shards are cut, and
    sequence i is window (i * stride + offset) mod n. The stride is coprime to n, so that every
    window comes once before any comes again, and near 0.618 n, so that a step reads windows from
    all over the text. Seeds and passes begin at different places of this cycle. In sequence, as
    published, sequence i starts at token i * T of the stream. Either order follows from the number
    of the sequence alone: it is the same for any number of ranks, and after a resume. A rank reads
    its own rows only.
    """

    def __init__(self, stream: TokenStream, h: Hyperparameters, ranks: Ranks) -> None:
        seq_len = h.train_seq_len
        self.stream, self.seq_len, self.ranks, self.seed = stream, seq_len, ranks, h.seed
        self.rows = h.train_batch_tokens // seq_len  # of a step, over all ranks
        self.is_shuffled = h.train_order == "shuffled"
        # Where the windows of each shard begin; the last target is the token after a window.
        windows = [np.arange(a, b - seq_len, seq_len) for a, b in pairwise(stream.bounds)]
        self.windows = np.concatenate(windows)
        self.count = len(self.windows)
        if not self.count:
            raise DataError(
                f"{stream.pattern}: no shard has a sequence of TRAIN_SEQ_LEN={seq_len} tokens and "
                "its next token; lower TRAIN_SEQ_LEN or use more text"
            )
        self.stride = max(round((5**0.5 - 1) / 2 * self.count), 1)  # of the golden ratio
        while math.gcd(self.stride, self.count) > 1:
            self.stride += 1

    def position(self, index: int) -> int:
        """Returns the position in the stream of the first token of sequence `index`."""
        if not self.is_shuffled:
            return index * self.seq_len
        offset = 1_000_003 * self.seed + 7919 * (index // self.count)
        return int(self.windows[(index * self.stride + offset) % self.count])

    def sequences(self, start: int, count: int) -> Tensor:
        """Returns `count` sequences from number `start` on, with the tokens that follow each.

        int64 [count, T + 1].
        """
        positions = [self.position(index) for index in range(start, start + count)]
        for at in positions:
            self.stream.prefetch(at, self.seq_len + 1)
        return torch.stack([self.stream.read(at, self.seq_len + 1) for at in positions])

    def batch(self, step: int) -> tuple[Tensor, Tensor]:
        """Returns this rank's inputs and targets of a step, int64 [rows, T]."""
        share = self.rows // self.ranks.world_size
        tokens = self.sequences(step * self.rows + self.ranks.rank * share, share)
        return tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()


def grad_accum_steps(rows: int, seq_len: int, micro_batch_tokens: int) -> int:
    """Returns the fewest equal parts of `rows` sequences with at most that many tokens each."""
    most = max(micro_batch_tokens // seq_len, 1)
    return next(n for n in range(1, rows + 1) if rows % n == 0 and rows // n <= most)


class ByteTable(NamedTuple):
    """Bytes of text that each token stands for. All byte counts of the program come from here."""

    size: Tensor  # int16 [V]; 0 for a special token such as BOS
    space: Tensor  # int16 [V]; 1 for a leading space, which decoders drop after a special token

    def text_bytes(self, previous: Tensor, target: Tensor) -> Tensor:
        """Returns the bytes, int16, of each target that follows its previous token."""
        return self.size[target] - self.space[target] * (self.size[previous] == 0)

    @classmethod
    def of_bytes(cls) -> "ByteTable":
        """Returns the table of the byte vocabulary."""
        size = (torch.arange(BYTE_VOCAB) >= FIRST_TEXT_ID).short()
        return cls(size, torch.zeros_like(size))

    @classmethod
    def of_tokenizer(cls, tokenizer: Any) -> "ByteTable":
        """Returns the table of a SentencePiece processor."""
        rows = []
        for i in range(tokenizer.vocab_size()):
            if tokenizer.is_control(i) or tokenizer.is_unknown(i) or tokenizer.is_unused(i):
                rows.append((0, 0))
            elif tokenizer.is_byte(i):
                rows.append((1, 0))
            else:
                size = len(tokenizer.id_to_piece(i).replace("\u2581", " ").encode())
                decoded_alone = len(tokenizer.decode([i]).encode())
                rows.append((size, size - decoded_alone))
        return cls(*torch.tensor(rows, dtype=torch.int16).unbind(1))


def verify_byte_table(table: ByteTable, tokenizer: Any, tokens: Tensor) -> int:
    """Returns the bytes on which the table and the decoder agree, document by document.

    Reads the first PROOF_TOKENS tokens. Raises DataError where they disagree.
    """
    head = tokens[:PROOF_TOKENS]
    counts = table.text_bytes(head[:-1], head[1:]).long()
    edges = (table.size[head] == 0).nonzero().flatten().tolist()
    if len(head) == len(tokens):
        edges.append(len(head))  # otherwise the last document may end inside a character
    proven = 0
    for start, end in pairwise(edges):
        counted = int(counts[start : end - 1].sum())
        decoded = len(tokenizer.decode(head[start + 1 : end].tolist()).encode())
        if counted != decoded:
            raise DataError(
                f"validation token {start + 1}: the byte table counts {counted} bytes, the decoder "
                f"{decoded}; use the tokenizer that made the shards"
            )
        proven += counted
    return proven


def last_merge(piece: str, rank: Mapping[str, int]) -> list[str]:
    """Returns the two parts of a piece that BPE merges last; the piece, if it is a character.

    BPE merges the neighbours that form the piece of the lowest rank, the first of equal ones.
    """
    parts = list(piece)
    while len(parts) > 2:
        ranks = [rank.get(left + right, len(rank)) for left, right in pairwise(parts)]
        at = ranks.index(min(ranks))
        parts[at : at + 2] = [parts[at] + parts[at + 1]]
    return parts


def forbidden_pairs(tokenizer: Any) -> Tensor:
    """Returns whether a SentencePiece BPE tokenizer never emits b after a, bool [V, V] at [a, b].

    No merge crosses the ends of a token, so the same merges form it in every text, rank by rank.
    Before the merges of a rank, a ends in a part and b starts with a part. If that rank merges
    these two parts, and not the first of them within a, then a and b become something else. Special
    tokens and bytes take no part in merges and are free.
    """
    size = tokenizer.vocab_size()
    free = (tokenizer.is_control, tokenizer.is_unknown, tokenizer.is_unused, tokenizer.is_byte)
    ids = {tokenizer.id_to_piece(i): i for i in range(size) if not any(kind(i) for kind in free)}
    by_score = sorted(ids, key=lambda piece: -tokenizer.get_score(ids[piece]))
    rank = {piece: n for n, piece in enumerate(by_score)}
    forbidden = np.zeros((size, size), bool)
    first, last = np.arange(size), np.arange(size)  # the parts that a token starts and ends with
    for piece in reversed(by_score):  # undo the merges, from the last one on
        parts = last_merge(piece, rank)
        if len(parts) == 2 and rank.keys() >= set(parts):  # not so for a user's symbol
            left, right = ids[parts[0]], ids[parts[1]]
            still_left = last == left  # after the merges of this rank; below: before them
            first[first == ids[piece]] = left
            last[last == ids[piece]] = right
            forbidden[np.ix_(still_left, first == right)] = True
    return torch.from_numpy(forbidden)


class Validation(NamedTuple):
    """The validation text."""

    tokens: Tensor  # int32 [N]
    table: ByteTable
    canonical: bool  # whether it has the bytes of the challenge's text
    forbidden: Tensor | None = None  # bool [V, V], see forbidden_pairs; None: no pair is

    def to(self, device: torch.device) -> "Validation":
        """Returns the text on a device."""
        table = ByteTable(*(tensor.to(device) for tensor in self.table))
        forbidden = None if self.forbidden is None else self.forbidden.to(device)
        return self._replace(tokens=self.tokens.to(device), table=table, forbidden=forbidden)


class Data(NamedTuple):
    """Both splits; `train` is None where nothing reads training text."""

    val: Validation
    train: TrainingBatches | None


def data_folder(h: Hyperparameters) -> Path:
    """Returns the folder of the shards. Raises DataError if its name tells another vocabulary."""
    kind = "byte" if h.vocab_size == BYTE_VOCAB else "sp"
    folder = Path(h.data_path or f"./data/datasets/{h.corpus}_{kind}{h.vocab_size}")
    if re.search(rf"_(sp|byte)(?!{h.vocab_size}$)\d+$", folder.name):
        raise DataError(
            f"DATA_PATH={folder}: its shards are not of VOCAB_SIZE={h.vocab_size}; change one"
        )
    return folder


def load_tokenizer(h: Hyperparameters, log: Log) -> Any:
    """Returns the SentencePiece processor of the settings. Raises DataError."""
    require("sentencepiece", f"VOCAB_SIZE={h.vocab_size}")
    import sentencepiece

    family = h.corpus.removesuffix("10B")
    path = h.tokenizer_path or f"./data/tokenizers/{family}_{h.vocab_size}_bpe.model"
    try:
        tokenizer = sentencepiece.SentencePieceProcessor(model_file=path)
    except Exception as error:  # its type depends on the version
        raise DataError(
            f"TOKENIZER_PATH={path}: {error}; make or download it together with its shards"
        ) from None
    pieces = tokenizer.vocab_size()
    if pieces != h.vocab_size:
        raise DataError(
            f"TOKENIZER_PATH={path}: it has {pieces} pieces, VOCAB_SIZE={h.vocab_size}; change one"
        )
    if tokenizer.bos_id() != BOS_ID:
        raise DataError(
            f"TOKENIZER_PATH={path}: its BOS id is {tokenizer.bos_id()}; the shards begin each "
            f"document with {BOS_ID}, so train it with --bos_id={BOS_ID}"
        )
    log(f"val_bpb:enabled tokenizer_kind=sentencepiece tokenizer_path={path}")
    return tokenizer


def load_byte_table(h: Hyperparameters, tokenizer: Any, tokens: Tensor, log: Log) -> ByteTable:
    """Returns the byte table of the vocabulary, verified on the validation tokens.

    The tokenizer is None for bytes. Warns of unknown tokens. Raises DataError if nothing could be
    verified, or if more tokens than MAX_UNKNOWN_FRACTION are unknown.
    """
    if tokenizer is None:
        log(f"val_bpb:enabled tokenizer_kind=byte260 vocab_size={BYTE_VOCAB}")
        table, unknown_id = ByteTable.of_bytes(), BYTE_UNKNOWN_ID
    else:
        table, unknown_id = ByteTable.of_tokenizer(tokenizer), tokenizer.unk_id()
        proven = verify_byte_table(table, tokenizer, tokens)
        if not proven:
            raise DataError(
                f"{data_folder(h)}: no whole document follows a BOS in the first {PROOF_TOKENS} "
                "validation tokens, so the byte table cannot be verified"
            )
        log(f"byte_table:proven against {proven} bytes of decoded text")
    unknown = int((tokens == unknown_id).sum())
    if unknown:
        fault = (
            f"{unknown} of {len(tokens)} validation tokens are unknown to the tokenizer and count "
            "0 bytes: the tokenizer does not cover this text, and its bpb is not right"
        )
        if unknown > h.max_unknown_fraction * len(tokens):
            raise DataError(
                f"{data_folder(h)}: {fault}; use a tokenizer with byte fallback, or raise "
                f"MAX_UNKNOWN_FRACTION={h.max_unknown_fraction:g}"
            )
        log(f"warning: {fault}")
    return table


def load_forbidden(h: Hyperparameters, tokenizer: Any, tokens: Tensor, log: Log) -> Tensor | None:
    """Returns the pairs to which CANONICAL_MASK gives probability 0; None without it and for bytes.

    Raises DataError if two validation tokens are such a pair.
    """
    if not h.canonical_mask:
        return None
    if tokenizer is None:
        log("canonical_mask:off, because any byte may follow any other")
        return None
    forbidden = forbidden_pairs(tokenizer)
    found = forbidden[tokens[:-1], tokens[1:]].nonzero()
    if len(found):
        at = int(found[0])
        before, after = map(tokenizer.id_to_piece, tokens[at : at + 2].tolist())
        raise DataError(
            f"validation token {at + 1}: {after!r}, which the tokenizer never emits after "
            f"{before!r}; use the tokenizer that made the shards, or CANONICAL_MASK=0"
        )
    log(f"canonical_mask:on, {int(forbidden.sum())} of {forbidden.numel()} pairs are forbidden")
    return forbidden


def load_validation(h: Hyperparameters, stream: TokenStream, log: Log) -> Validation:
    """Returns the validation text; its byte table is verified."""
    tokens, folder = stream.read(0, len(stream), np.int32), data_folder(h)
    if len(tokens) <= h.window_tokens:
        raise DataError(
            f"{folder}: {len(tokens)} validation tokens do not fill a window of {h.window_tokens}; "
            "lower EVAL_SEQ_LEN"
        )
    tokenizer = None if h.vocab_size == BYTE_VOCAB else load_tokenizer(h, log)
    table = load_byte_table(h, tokenizer, tokens, log)
    forbidden = load_forbidden(h, tokenizer, tokens, log)
    log(f"val_loader:shards pattern={stream.pattern} tokens:{len(tokens) - 1}")
    text_bytes = int(table.text_bytes(tokens[:-1], tokens[1:]).sum())
    if not text_bytes:
        raise DataError(f"{folder}: the validation tokens stand for no text")
    canonical = math.isclose(text_bytes, VAL_BYTES, rel_tol=1e-4)  # a last window may be cut
    if not canonical:
        log(
            f"warning: {text_bytes} bytes of validation text, not the challenge's {VAL_BYTES}: "
            "scores are not comparable with the records"
        )
    return Validation(tokens, table, canonical, forbidden)


def refuse_duplicates(*streams: TokenStream) -> None:
    """Raises DataError if two shards of some splits begin with the same 1,000 tokens."""
    seen: dict[bytes, Path] = {}
    for stream in streams:
        for path, shard in zip(stream.paths, stream.shards):
            first = seen.setdefault(shard[:1000].tobytes(), path)
            if first != path:
                raise DataError(
                    f"{path}: the same tokens as {first}; remove one of them, because training "
                    "text cannot be scored and no text counts twice"
                )


def load_data(h: Hyperparameters, ranks: Ranks, log: Log, trains: bool = True) -> Data:
    """Opens and checks the validation split and, if `trains`, the training split.

    Raises DataError.
    """
    folder, splits = data_folder(h), ("val", "train") if trains else ("val",)
    streams = [TokenStream(folder, split, h.vocab_size) for split in splits]
    refuse_duplicates(*streams)
    for stream in streams:
        stream.check(log, ranks)
    val = load_validation(h, streams[0], log)
    if not trains:
        return Data(val, None)
    batches = TrainingBatches(streams[1], h, ranks)
    shards, windows = len(batches.stream.paths), batches.count
    log(f"train_loader:dataset:{folder.name} train_shards:{shards} windows:{windows}")
    return Data(val, batches)


# ---- Model: the network ----


class Role(NamedTuple):
    """How parameters of one kind are learned and stored."""

    optimizer: str  # "muon" or "adamw"
    learning_rate: str  # the setting
    weight_decay: str  # the setting; "" for none
    bits: str  # the setting: range of the stored codes; "" for float16
    clip_sigmas: str = ""  # the setting: their scale by SCALE_RULE=std


# A module's `role` holds for the parameters directly in it, not for its submodules. Optimizer,
# rates and stored bits of a parameter follow from it. A Linear is a "matrix" unless told otherwise.
ROLES = {
    "matrix": Role("muon", "matrix_lr", "muon_wd", "matrix_bits", "matrix_clip_sigmas"),
    "embed": Role("adamw", "tied_embed_lr", "embedding_wd", "embed_bits", "embed_clip_sigmas"),
    "untied_embed": Role("adamw", "embed_lr", "embedding_wd", "embed_bits", "embed_clip_sigmas"),
    "head": Role("adamw", "head_lr", "", "embed_bits", "embed_clip_sigmas"),
    "scalar": Role("adamw", "scalar_lr", "adam_wd", ""),
    "aux": Role("adamw", "jepa_lr", "", "embed_bits", "embed_clip_sigmas"),
}


def parameter_roles(model: nn.Module) -> dict[str, str]:
    """Returns the role of each parameter by name. Raises AttributeError for one without."""
    roles: dict[str, str] = {}
    for name, _ in model.named_parameters():
        role = getattr(model.get_submodule(name.rpartition(".")[0]), "role", None)
        if role not in ROLES:
            raise AttributeError(f"{name}: its module's role is {role}, not one of {[*ROLES]}")
        roles[name] = role
    return roles


def rms_norm(x: Tensor) -> Tensor:
    """Returns x divided by its root mean square over the last dimension.

    The eps is fixed because PyTorch's default for bf16 has changed between versions.
    """
    return F.rms_norm(x, (x.size(-1),), eps=1.2e-7)


class Linear(nn.Linear):
    """A linear map without bias: float32 weight, product in the dtype of its input.

    The weight starts orthogonal times `gain`; at zero for gain 0; PyTorch's default for None.
    """

    def __init__(
        self, fan_in: int, fan_out: int, gain: float | None = 1.0, role: str = "matrix"
    ) -> None:
        super().__init__(fan_in, fan_out, bias=False)
        self.role = role
        if gain == 0:
            nn.init.zeros_(self.weight)
        elif gain is not None:
            nn.init.orthogonal_(self.weight, gain)

    def forward(self, x: Tensor, scale: Tensor | None = None) -> Tensor:
        """Maps x [..., fan_in] to [..., fan_out], times a learned scale [fan_out] or [].

        Scaling the weight instead of the output saves the output for no gradient.
        """
        weight = self.weight if scale is None else scale.unsqueeze(-1) * self.weight
        return F.linear(x, weight.to(x.dtype))


class Embedding(nn.Embedding):
    """A table [rows, width] that starts normal with standard deviation `std`."""

    def __init__(self, h: Hyperparameters, rows: int, width: int, std: float) -> None:
        super().__init__(rows, width, _weight=torch.empty(rows, width).normal_(std=std))
        self.role = "embed" if h.tie_embeddings else "untied_embed"


def rotary_angles(
    length: int, dims: int, base: float, reach: int, train_seq_len: int, device: torch.device
) -> Tensor:
    """Returns cos and sin of RoPE's angles, [2, T, 1, dims / 2].

    The base grows with the reach of attention beyond `train_seq_len` (NTK scaling, as in the
    records).
    """
    if reach > train_seq_len and dims > 2:
        base *= (reach / train_seq_len) ** (dims / (dims - 2))
    frequencies = base ** (-torch.arange(0, dims, 2, device=device) / dims)
    angles = torch.arange(length, device=device)[:, None, None] * frequencies
    return torch.stack((angles.cos(), angles.sin()))


def rotate(x: Tensor, rotation: Tensor) -> Tensor:
    """Rotates the first n dimensions of x [B, T, heads, d] in pairs (i, i + n/2) (RoPE)."""
    cos, sin = rotation.to(x.dtype)
    half = cos.size(-1)
    a, b, rest = x.split((half, half, x.size(-1) - 2 * half), dim=-1)
    return torch.cat((a * cos + b * sin, b * cos - a * sin, rest), dim=-1)


def subtract_self_value(y: Tensor, unit: Tensor) -> Tensor:
    """Removes from attention outputs y [B, T, H, d] their part along unit vectors [B, T, K, d].

    This is exclusive self-attention, XSA (arXiv 2603.09078): along the position's own value, each
    head keeps only what other positions contribute.
    """
    grouped, unit = y.unflatten(2, (unit.size(2), -1)), unit.unsqueeze(3)  # [B, T, K, H / K, d]
    along = (grouped.float() * unit).sum(-1, keepdim=True)
    return (grouped - (along * unit).to(y.dtype)).flatten(2, 3)


# By name, see adapter_widths: A [B, rank, D] and B [B, out, rank] for each of B sequences.
Adapters = Mapping[str, tuple[Tensor, Tensor]]
NO_LORA: Adapters = {}
ADAPTER_ALPHA = 144  # the output of an adapter is scaled by this / rank (PR #1767)


def adapter_widths(h: ModelSettings) -> dict[str, int]:
    """Returns the number of outputs of each adapter by name; all read D inputs.

    Those of the keys, of attention, of the MLP and of the head help most (PR #1953).
    """
    outputs = {"keys": h.kv_dim, "attention": h.model_dim, "mlp": h.model_dim}
    widths = {f"{name} {n}": width for n in range(h.num_layers) for name, width in outputs.items()}
    return widths | {"head": h.vocab_size}


def adapt(y: Tensor, x: Tensor, adapters: Adapters, name: str, scale: Tensor | float) -> Tensor:
    """Returns outputs y [B, T, ...] plus the adapter's for inputs x [B, T, D], times `scale`.

    Each sequence has a low-rank map of its own, x -> B A x (LoRA, arXiv 2106.09685). Without an
    adapter of that name it returns y.
    """
    if name not in adapters:
        return y
    a, b = (weight.to(x.dtype) for weight in adapters[name])
    added = scale * (ADAPTER_ALPHA / a.size(1)) * (x @ a.mT @ b.mT)
    return y + added.to(y.dtype).view_as(y)


class Context(NamedTuple):
    """What every block of one forward pass may read."""

    x0: Tensor  # [B, T, D], the embeddings that enter the first block
    rotation: Tensor  # [2, T, 1, n/2], see rotary_angles
    value_embeds: dict[int, Tensor]  # by layer: [B, T, K d], added to the values
    window: int  # positions that attention reaches back; 0 for all
    documents: Documents | None  # which attention keeps apart; None: it crosses BOS
    adapters: Adapters


Lanes = tuple[Tensor, ...]  # the residual streams of a forward pass, one or two, each [B, T, D]


class CausalSelfAttention(nn.Module):
    """Grouped-query attention with partial RoPE and, in the last layers, XSA.

    The sparse gate multiplies each head's output by sigmoid(scale * w x[:n]) (PR #1787).
    """

    role = "scalar"  # of q_gain
    INPUT_LAYERS = "c_q", "c_k", "c_v"  # one product with the module's input

    def __init__(self, h: Hyperparameters, layer: int, attend: Attend) -> None:
        super().__init__()
        self.layer, self.attend = layer, attend
        self.head_dim, self.heads = h.head_dim, (h.num_heads, h.num_kv_heads, h.num_kv_heads)
        self.c_q = Linear(h.model_dim, h.model_dim)
        self.c_k = Linear(h.model_dim, h.kv_dim)
        self.c_v = Linear(h.model_dim, h.kv_dim)
        self.proj = Linear(h.model_dim, h.model_dim, gain=0)
        self.q_gain = nn.Parameter(torch.full((h.num_heads, 1), h.qk_gain_init))
        self.xsa = layer >= h.num_layers - h.xsa_last_n
        self.gate, self.gate_scale = None, h.sparse_attn_gate_scale
        if h.sparse_attn_gate_enabled:
            self.gate = Linear(h.gate_window, h.num_heads, gain=0, role="scalar")

    def forward(self, x: Tensor, scale: Tensor, context: Context) -> Tensor:
        """Maps x [B, T, D] to attention's output [B, T, D], times `scale` [D]."""
        weight = torch.cat([getattr(self, name).weight for name in self.INPUT_LAYERS])
        qkv = F.linear(x, weight.to(x.dtype)).unflatten(-1, (-1, self.head_dim))
        q, k, v = qkv.split(self.heads, dim=2)
        k = adapt(k, x, context.adapters, f"keys {self.layer}", 1.0)
        if self.layer in context.value_embeds:
            v = v + context.value_embeds[self.layer].view_as(v)
        # The gain comes before RoPE and is expanded over positions, so that its gradient is a sum
        # over each head, which the compiler fuses with the backward pass of the norm.
        gain = self.q_gain.expand(*x.shape[:2], -1, 1).to(x.dtype)
        q = rotate(rms_norm(q) * gain, context.rotation)
        k = rotate(rms_norm(k), context.rotation)
        # Before attention: after it, the compiler would store v in float32 for the backward pass.
        unit = F.normalize(v.float(), dim=-1) if self.xsa else None
        y = self.attend(q, k, v, window=context.window, documents=context.documents)
        if unit is not None:
            y = subtract_self_value(y, unit)
        if self.gate is not None:
            gate = self.gate(x[..., : self.gate.in_features])
            y = y * (self.gate_scale * gate).sigmoid().unsqueeze(-1)
        return self.proj(y.flatten(2), scale)


class MLP(nn.Module):
    """Two linear maps around leaky_relu(x, slope)^2 (PR #549; relu^2 in the baseline)."""

    def __init__(self, h: Hyperparameters) -> None:
        super().__init__()
        width = max(int(h.mlp_mult * h.model_dim), 2)
        self.up = Linear(h.model_dim, width)
        self.down = Linear(width, h.model_dim, gain=0)
        self.negative_slope = h.negative_slope

    def forward(self, x: Tensor, scale: Tensor) -> Tensor:
        """Maps x [..., D] to [..., D], times `scale` [D]."""
        return self.down(F.leaky_relu(self.up(x), self.negative_slope).square(), scale)


def previous_embeddings(x: Tensor, starts: Tensor) -> Tensor:
    """Returns x [B, T, D] one position later, zero at position 0 and at `starts`, bool [B, T]."""
    return F.pad(x[:, :-1], (0, 0, 1, 0)).masked_fill(starts.unsqueeze(-1), 0)


class SmearGate(nn.Module):
    """Blends each position's embedding with the previous one's: lerp(x[t], x[t-1], sigmoid(g)).

    As in the record of 2026-03-20 (PR #287).
    """

    role = "scalar"

    def __init__(self, h: Hyperparameters) -> None:
        super().__init__()
        self.gate = nn.Parameter(torch.zeros(h.model_dim))

    def forward(self, x: Tensor, starts: Tensor) -> Tensor:
        """Maps normalized embeddings x [B, T, D] to blended ones; see previous_embeddings."""
        previous = previous_embeddings(x, starts)
        return torch.lerp(x, previous, self.gate.sigmoid().to(x.dtype))


class TokenSmearGate(nn.Module):
    """Adds the previous position's embedding: x[t] + scale * sigmoid(w x[t, :n]) * x[t-1].

    As in modded-nanogpt (PR #1667), with the mask of PR #1851.
    """

    role = "scalar"

    def __init__(self, h: Hyperparameters) -> None:
        super().__init__()
        self.gate = Linear(h.gate_window, 1, gain=0, role="scalar")
        self.scale = nn.Parameter(torch.zeros(1))

    def forward(self, x: Tensor, starts: Tensor) -> Tensor:
        """Maps embeddings x [B, T, D], before their norm, to blended ones."""
        gate = self.scale.to(x.dtype) * self.gate(x[..., : self.gate.in_features]).sigmoid()
        return x + gate * previous_embeddings(x, starts)


class BigramHash(nn.Module):
    """A learned vector for each hashed pair of a token and the one before (PR #287)."""

    role = "scalar"

    def __init__(self, h: Hyperparameters) -> None:
        super().__init__()
        self.embed = Embedding(h, h.bigram_vocab_size, h.bigram_dim, std=0.0)
        # Not zero, as it is in PR #832: beside a table of zeros neither would ever get a gradient.
        self.proj = Linear(h.bigram_dim, h.model_dim, (2 * h.num_layers) ** -0.5, role="scalar")
        self.scale = nn.Parameter(torch.tensor(0.05))

    def forward(self, ids: Tensor, starts: Tensor, dtype: torch.dtype) -> Tensor:
        """Returns vectors [B, T, D] for ids [B, T].

        Position 0 and `starts`, bool [B, T], have no pair and take the last row.
        """
        last, ids = self.embed.num_embeddings - 1, ids.int()
        pairs = (36_313 * ids[:, 1:] ^ 27_191 * ids[:, :-1]) % last
        rows = F.pad(pairs.masked_fill(starts[:, 1:], last), (1, 0), value=last)
        return self.proj(self.embed(rows).to(dtype), self.scale)


class ValueEmbedding(nn.Module):
    """A second token embedding, which some layers add to their values (PR #414)."""

    role = "scalar"

    def __init__(self, h: Hyperparameters) -> None:
        super().__init__()
        self.embed = Embedding(h, h.vocab_size, h.ve_dim, std=0.01)
        self.proj = Linear(h.ve_dim, h.kv_dim, (2 * h.num_layers) ** -0.5, role="scalar")
        self.scale = nn.Parameter(torch.tensor(0.1))
        named = {int(name) for name in h.ve_layers.split(",") if name}
        self.layers = sorted(named or range(h.num_layers)[-2:])
        self.layer_scales = nn.Parameter(torch.ones(len(self.layers)))

    def forward(self, ids: Tensor, dtype: torch.dtype) -> dict[int, Tensor]:
        """Returns what each layer adds to its values, [B, T, K d], for ids [B, T]."""
        values = self.proj(self.embed(ids).to(dtype), self.scale)
        return {n: values * self.layer_scales[i] for i, n in enumerate(self.layers)}


class Block(nn.Module):
    """A layer: blends in the first embedding, then adds attention and the MLP to the stream."""

    role = "scalar"

    def __init__(self, h: Hyperparameters, layer: int, attend: Attend) -> None:
        super().__init__()
        self.attn = CausalSelfAttention(h, layer, attend)
        self.mlp = MLP(h)
        self.attn_scale = nn.Parameter(torch.ones(h.model_dim))
        self.mlp_scale = nn.Parameter(torch.ones(h.model_dim))
        self.resid_mix = nn.Parameter(torch.tensor([[1.0], [0.0]]).repeat(1, h.model_dim))
        self.norm_scale = (layer + 1) ** -0.5 if h.ln_scale else 1.0

    def restart(self, x: Tensor, context: Context) -> Tensor:
        """Returns the stream x [B, T, D] blended with the first embeddings."""
        keep, restart = self.resid_mix.to(x.dtype)
        return keep * x + restart * context.x0

    def attention(self, x: Tensor, context: Context) -> Tensor:
        """Returns what attention, and an adapter beside it, add to a stream x [B, T, D]."""
        x = rms_norm(x) * self.norm_scale
        y, name = self.attn(x, self.attn_scale, context), f"attention {self.attn.layer}"
        return adapt(y, x, context.adapters, name, self.attn_scale)

    def feed_forward(self, x: Tensor, context: Context) -> Tensor:
        """Returns what the MLP, and an adapter beside it, add to a stream x [B, T, D]."""
        x = rms_norm(x) * self.norm_scale
        y, name = self.mlp(x, self.mlp_scale), f"mlp {self.attn.layer}"
        return adapt(y, x, context.adapters, name, self.mlp_scale)

    def forward(self, lanes: Lanes, context: Context) -> Lanes:
        """Maps the one lane [B, T, D] to the one lane after this layer."""
        x = self.restart(lanes[0], context)
        x = x + self.attention(x, context)
        return (x + self.feed_forward(x, context),)


class ParallelBlock(Block):
    """A layer whose attention and MLP read the same input, as in GPT-J (PR #1412)."""

    def forward(self, lanes: Lanes, context: Context) -> Lanes:
        """Maps the one lane [B, T, D] to the one lane after this layer."""
        x = self.restart(lanes[0], context)
        return (x + self.attention(x, context) + self.feed_forward(x, context),)


class TwoLaneBlock(Block):
    """A layer whose attention reads the first lane and whose MLP reads the second (PR #1529).

    Both outputs are added to both lanes, with learned weights.
    """

    def __init__(self, h: Hyperparameters, layer: int, attend: Attend) -> None:
        super().__init__(h, layer, attend)
        # By lane: the weights of the lane itself, of attention and of the MLP.
        self.lane_mix = nn.Parameter(torch.tensor([[1.1, 1.0, 1.0]]).repeat(2, 1))

    def forward(self, lanes: Lanes, context: Context) -> Lanes:
        """Maps two lanes [B, T, D] to the two lanes after this layer."""
        attention = self.attention(self.restart(lanes[0], context), context)
        feed_forward = self.feed_forward(lanes[1], context)
        mixes = zip(lanes, self.lane_mix.to(attention.dtype))
        return tuple(keep * x + a * attention + m * feed_forward for x, (keep, a, m) in mixes)


def block_class(h: Hyperparameters, layer: int) -> type[Block]:
    """Returns the class of a layer's block."""
    if 0 < h.parallel_start_layer <= layer:
        return TwoLaneBlock
    return ParallelBlock if 0 <= h.parallel_residual_start <= layer else Block


class LayerPlan(NamedTuple):
    """The order in which one forward pass visits the blocks, in two halves for U-Net skips.

    The decoder's visits read the outputs of the encoder's visits, last one first. A block may
    appear more than once; its layer, not the visit, sets XSA, norm scale and value embeddings.
    """

    encoder: tuple[int, ...]
    decoder: tuple[int, ...]


def layer_plan(h: Hyperparameters, loops: int) -> LayerPlan:
    """Returns the plan that repeats the layers LOOP_START to LOOP_END `loops` times.

    Depth recurrence with shared weights (PR #1285, #1394). The decoder has the odd visit.
    """
    visits = [*range(h.num_layers)]
    visits[h.loop_start : h.loop_start] = loops * visits[h.loop_start : h.loop_end + 1]
    half = len(visits) // 2
    return LayerPlan(tuple(visits[:half]), tuple(visits[half:]))


class Auxiliary(NamedTuple):
    """What the auxiliary losses of a step need; None for a loss that the step does not have."""

    jepa_weight: Tensor | None = None  # [], lambda: a tensor, so that a new value compiles nothing
    stp_positions: Tensor | None = None  # int64 [rows, 3], s < r < t in each sequence


NO_AUXILIARY = Auxiliary()


def sigreg(z: Tensor, directions: Tensor, knots: int) -> Tensor:
    """Returns how far the rows of z [N, n] are from samples of N(0, I): a float32 scalar.

    Along the columns of `directions` [n, P] the characteristic function of z is compared with
    exp(-t^2/2) at `knots` points (Epps-Pulley test). As in PR #832, z is standardized first, so the
    result depends neither on the mean nor on the scale of the latents.
    """
    z = z.float()
    z = (z - z.mean(0)) / z.var(0).clamp_min(1e-12).sqrt()
    t = torch.linspace(0.2, 3.0, knots, device=z.device)
    angles, normal = (z @ directions).unsqueeze(-1) * t, torch.exp(-t.square() / 2)
    return ((angles.cos().mean(0) - normal).square() + angles.sin().mean(0).square()).mean()


class JEPA(nn.Module):
    """Predicts the latent of each chunk of positions from that of the chunk before (PR #832).

    A chunk's latent is the projected mean of the stream over its positions, or `start` before the
    first chunk. The prediction, through a matrix that starts at zero, is added to the stream at all
    positions of the chunk: only earlier chunks enter, so no position sees a later token. The
    squared error of the prediction and SIGReg train projector and predictor, cross-entropy trains
    the injection. As published, no JEPA gradient reaches the backbone; its gradients only count in
    the norm that is clipped. AdamW divides by the gradient's own scale, so lambda acts through that
    norm and little else. A study on bytes found no gain, neither as published nor with LeJEPA's
    SIGReg or gradients to the backbone (records/, 2026-11-22_JEPA_on_bytes).
    """

    role = "aux"
    DIRECTIONS, KNOTS = 256, 17  # of SIGReg
    directions: Tensor  # [latent, DIRECTIONS], unit columns

    def __init__(self, h: Hyperparameters) -> None:
        super().__init__()
        latent = h.jepa_latent_dim

        def two_layers(fan_in: int, hidden: int) -> nn.Sequential:
            first, second = Linear(fan_in, hidden, None, "aux"), Linear(hidden, latent, None, "aux")
            return nn.Sequential(first, nn.RMSNorm(hidden, 1.2e-7, False), nn.SiLU(), second)

        self.projector = two_layers(h.model_dim, h.jepa_proj_hidden)
        self.predictor = two_layers(latent, latent)
        self.start = nn.Parameter(torch.empty(1, latent).normal_(std=0.02))
        self.inject = Linear(latent, h.model_dim, 0, "aux")
        self.chunk_size, self.sigreg_weight = h.jepa_chunk_size, h.jepa_sigreg_weight
        # As published, SIGReg looks along the same directions in every step.
        draws = torch.Generator().manual_seed(h.seed)
        directions = torch.randn(latent, self.DIRECTIONS, generator=draws, device="cpu")
        self.register_buffer("directions", F.normalize(directions, dim=0), persistent=False)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Returns the stream [B, T, D] with predictions added, latents and predicted latents."""
        count, rest = divmod(x.size(1), self.chunk_size)
        chunks = x.detach()[:, : count * self.chunk_size].unflatten(1, (count, self.chunk_size))
        latents = self.projector(chunks.mean(2))
        start = self.start.to(latents.dtype).expand(len(x), 1, -1)
        predicted = self.predictor(torch.cat((start, latents), dim=1)[:, :-1])
        added = self.inject(predicted.detach()).repeat_interleave(self.chunk_size, dim=1)
        return x + F.pad(added, (0, 0, 0, rest)), latents, predicted

    def losses(self, latents: Tensor, predicted: Tensor) -> tuple[Tensor, Tensor]:
        """Returns the squared error of the prediction, and SIGReg of the latents."""
        error = F.mse_loss(predicted.float(), latents.detach().float())
        return error, sigreg(latents.flatten(0, 1), self.directions, self.KNOTS)


def stp_loss(states: Tensor, positions: Tensor) -> Tensor:
    """Returns 1 - cos(h_t - h_r, h_r - h_s) for states h [B, T, D] at positions [B, 3], s < r < t.

    Semantic Tube Prediction (arXiv 2602.22617; PR #1124): paths of hidden states should be
    straight. Mean over the sequences; a step of length 0 has cosine 0.
    """
    s, r, t = states.float().take_along_dim(positions.unsqueeze(-1), 1).unbind(1)
    return 1 - F.cosine_similarity(t - r, r - s, eps=1e-6).mean()


class GPT(nn.Module):
    """The model. Weights are float32; activations have `dtype`.

    `h` is an instance of Hyperparameters, or the class or a subclass of it, whose defaults are
    taken: reviewers build a model by `GPT(Hyperparameters)`.
    """

    role = "scalar"

    def __init__(
        self,
        h: Hyperparameters | type[Hyperparameters],
        attend: Attend = attend_sdpa,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        super().__init__()
        self.h = h = h() if isinstance(h, type) else h
        self.dtype = dtype
        std = h.tied_embed_init_std if h.tie_embeddings else 1.0
        self.tok_emb = Embedding(h, h.vocab_size, h.model_dim, std)
        self.bigram = BigramHash(h) if h.bigram_vocab_size else None
        self.smear = SmearGate(h) if h.smear_gate else None
        self.token_smear = TokenSmearGate(h) if h.smear_gate_enabled else None
        self.value_embedding = ValueEmbedding(h) if h.ve_enabled else None
        self.blocks = nn.ModuleList(block_class(h, n)(h, n, attend) for n in range(h.num_layers))
        skips = len(layer_plan(h, h.num_loops).encoder) if h.unet_skips else 0
        self.skip_weights = nn.Parameter(torch.ones(skips, h.model_dim))
        gates = torch.zeros(skips, h.model_dim)
        self.skip_gates = nn.Parameter(gates) if h.skip_gates_enabled else None
        self.jepa = JEPA(h) if h.jepa_chunk_size else None
        head = partial(Linear, h.model_dim, h.vocab_size, gain=0, role="head")
        self.lm_head = None if h.tie_embeddings else head()

    def embed(self, ids: Tensor) -> Tensor:
        """Returns the embeddings [B, T, D] that enter the first block, for ids [B, T]."""
        x = self.tok_emb(ids)
        starts = (ids == BOS_ID) & self.h.bos_mask  # positions that do not see the one before
        if self.bigram is not None:
            x = x + self.bigram(ids, starts, self.dtype)
        x = x.to(self.dtype)
        if self.token_smear is not None:
            x = self.token_smear(x, starts)
        x = rms_norm(x)
        return x if self.smear is None else self.smear(x, starts)

    def context(self, x0: Tensor, ids: Tensor, window: int, adapters: Adapters) -> Context:
        """Returns what the blocks read, for embeddings x0 [B, T, D] of ids [B, T]."""
        h, length, embedding = self.h, ids.size(1), self.value_embedding
        dims, reach = h.rope_dims or h.head_dim, window or length
        rotation = rotary_angles(length, dims, h.rope_base, reach, h.rope_train_seq_len, ids.device)
        value_embeds = {} if embedding is None else embedding(ids, self.dtype)
        documents = Documents.of_ids(ids, self.training) if h.doc_attention else None
        return Context(x0, rotation, value_embeds, window, documents, adapters)

    def add_skip(self, x: Tensor, skip: Tensor, visit: int) -> Tensor:
        """Returns a stream x [B, T, D] with the skip of a decoder visit added or blended in."""
        skip = self.skip_weights[visit].to(x.dtype) * skip
        if self.skip_gates is None:
            return x + skip
        return torch.lerp(skip, x, self.skip_gates[visit].sigmoid().to(x.dtype))

    def backbone(
        self, ids: Tensor, window: int = 0, loops: int | None = None, adapters: Adapters = NO_LORA
    ) -> Tensor:
        """Returns the stream [B, T, D] after the last block, for ids [B, T].

        `loops` is the number of repetitions of the looped layers; None takes NUM_LOOPS.
        """
        x0 = self.embed(ids)
        context = self.context(x0, ids, window, adapters)
        lanes: Lanes = (x0,)
        plan = layer_plan(self.h, self.h.num_loops if loops is None else loops)
        skips: list[Tensor] = []
        for layer in plan.encoder:
            lanes = self.blocks[layer](lanes, context)
            skips.append(lanes[0])
        for visit, layer in enumerate(plan.decoder):
            block = self.blocks[layer]
            if isinstance(block, TwoLaneBlock) and len(lanes) == 1:
                lanes = (lanes[0], lanes[0])  # both begin as the stream so far
            if skips and len(self.skip_weights):
                lanes = (self.add_skip(lanes[0], skips.pop(), visit), *lanes[1:])
            lanes = block(lanes, context)
        if len(lanes) == 2 and self.h.parallel_final_lane == "mean":
            return (lanes[0] + lanes[1]) / 2
        return lanes[-1] if self.h.parallel_final_lane == "mlp" else lanes[0]

    def logits(self, states: Tensor, adapters: Adapters = NO_LORA) -> Tensor:
        """Returns soft-capped logits [..., V], float32, of normalized states [..., D]."""
        cap = self.h.logit_softcap
        head = self.tok_emb.weight if self.lm_head is None else self.lm_head.weight
        # Dividing the head is cheaper than dividing the logits; tanh_ saves a copy of them.
        logits = F.linear(states, (head / cap).to(states.dtype))
        return adapt(logits, states, adapters, "head", 1 / cap).float().tanh_() * cap

    def states(
        self, ids: Tensor, window: int = 0, loops: int | None = None, adapters: Adapters = NO_LORA
    ) -> Tensor:
        """Returns the normalized states [B, T, D] that the output head reads, for ids [B, T]."""
        x = self.backbone(ids, window, loops, adapters)
        if self.jepa is not None:
            x = self.jepa(x)[0]
        return rms_norm(x)

    def forward_logits(
        self,
        ids: Tensor,
        last: int = 0,
        window: int = 0,
        loops: int | None = None,
        adapters: Adapters = NO_LORA,
    ) -> Tensor:
        """Returns logits [B, last, V] for the last positions of ids [B, T]; for all with last=0."""
        return self.logits(self.states(ids, window, loops, adapters)[:, -last:], adapters)

    def losses(
        self,
        ids: Tensor,
        targets: Tensor,
        auxiliary: Auxiliary = NO_AUXILIARY,
        loops: int | None = None,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Returns the loss to minimize, and its terms; cross-entropy is `train_loss`, in nats."""
        x = self.backbone(ids, loops=loops)
        if self.jepa is not None:
            x, latents, predicted = self.jepa(x)
        states = rms_norm(x)
        smoothing = self.h.label_smoothing if self.training else 0.0
        loss = F.cross_entropy(
            self.logits(states).flatten(0, 1), targets.flatten(), label_smoothing=smoothing
        )
        terms = {"train_loss": loss}
        if self.jepa is not None and auxiliary.jepa_weight is not None:
            error, spread = self.jepa.losses(latents, predicted)
            loss = loss + auxiliary.jepa_weight * (error + self.jepa.sigreg_weight * spread)
            terms |= {"jepa_error": error, "jepa_sigreg": spread}
        if auxiliary.stp_positions is not None:
            terms["stp"] = stp_loss(states, auxiliary.stp_positions)
            loss = loss + self.h.stp_lambda * terms["stp"]
        return loss, terms

    def forward(self, ids: Tensor, targets: Tensor) -> Tensor:
        """Returns the mean cross-entropy of targets [B, T] given ids [B, T], a scalar in nats.

        In training mode it includes LABEL_SMOOTHING.
        """
        return self.losses(ids, targets)[0]


# ---- Schedule: what changes during training ----


class Progress(NamedTuple):
    """How far training is. A run ends by steps or by seconds, whichever comes first."""

    step: int  # steps done
    iterations: int
    seconds: float  # of training so far
    deadline: float  # seconds at which training ends; math.inf without a limit

    @property
    def fraction(self) -> float:
        """The part of the run that is done, by steps or by seconds, whichever is further."""
        return max(self.step / max(self.iterations, 1), self.seconds / self.deadline)

    @property
    def steps_left(self) -> float:
        """Steps until the run ends, at the average speed so far."""
        left = float(self.iterations - self.step)
        if self.seconds and self.deadline < math.inf:
            steps_per_second = max(self.step, 1) / self.seconds
            left = min(left, max(self.deadline - self.seconds, 0.0) * steps_per_second)
        return left


class Phase(NamedTuple):
    """The values of the schedule for one training step."""

    lr_scale: float  # factor of every learning rate in training
    muon_momentum: float
    jepa_weight: float  # lambda of the JEPA losses; 0 leaves them out of the program
    loops: int = 0  # repetitions of the looped layers


def warmdown_left(progress: Progress, h: Hyperparameters) -> float:
    """Returns the part of the warm-down that is left: 1 before it, 0 at the end of the run.

    The warm-down is the last WARMDOWN_FRAC of the run, or its last WARMDOWN_ITERS steps, which take
    at most WARMDOWN_MAX_FRACTION of the run. Without this bound, as published, a slow machine
    begins in the warm-down.
    """
    left, warmdown = 1 - progress.fraction, h.warmdown_frac
    if not warmdown:
        left = progress.steps_left
        total = progress.step + left  # predicted steps of the run
        warmdown = min(h.warmdown_iters, h.warmdown_max_fraction * total)
    return min(max(left, 0.0) / warmdown, 1.0) if warmdown else 1.0


def schedule(progress: Progress, h: Hyperparameters) -> Phase:
    """Returns what the next step is told.

    Muon's momentum rises linearly in its warm-up. Lambda is 0 until JEPA_PHASE1_FRAC of the run,
    rises linearly over the next JEPA_PHASE2_FRAC of it, then is 0 again (PR #832).
    """
    momentum, warmup = h.muon_momentum_warmup_start, h.muon_momentum_warmup_steps
    warm = progress.step / warmup if progress.step < warmup else 1.0
    risen = (progress.fraction - h.jepa_phase1_frac) / h.jepa_phase2_frac
    rises = h.jepa_chunk_size > 0 and 0 <= risen < 1
    return Phase(
        lr_scale=max(warmdown_left(progress, h), h.min_lr),
        muon_momentum=momentum + warm * (h.muon_momentum - momentum),
        jepa_weight=h.jepa_lambda_max * risen if rises else 0.0,
        loops=h.num_loops if progress.fraction >= h.enable_looping_at else 0,
    )


def programs(h: Hyperparameters) -> list[Phase]:
    """Returns one phase for each program that training compiles."""
    weights = {0.0, h.jepa_lambda_max if h.jepa_chunk_size else 0.0}
    loops = {0 if h.enable_looping_at else h.num_loops, h.num_loops}
    return [Phase(1.0, h.muon_momentum, w, n) for n in sorted(loops) for w in weights]


# ---- Evaluate: from logits to bits per byte ----


class DivergenceError(RuntimeError):
    """A loss, a weight or a score is not finite."""

    status = "nan"


class Score(NamedTuple):
    """The result of a scoring pass: bpb (bits per byte) = nats / ln 2 / bytes."""

    val_loss: float  # nats per token
    val_bpb: float
    nats: float  # sum over all tokens
    tokens: int
    bytes: int  # of text
    seconds: float
    stride: int


class Batch(NamedTuple):
    """Windows that a rank scores at once."""

    windows: Tensor  # int64 [n, 3]: first token; of the last positions, how many to skip, to score
    seq_len: int  # tokens that a window reads
    last: int  # positions that a window scores at most, its last ones
    begins: bool = True  # False if it goes on with the documents of the batch before

    @property
    def tokens(self) -> int:
        """Tokens that it reads."""
        return len(self.windows) * self.seq_len

    def scored(self) -> Tensor:
        """Returns which of their last positions the windows score, bool [n, last]."""
        skips, counts = self.windows[:, 1:2], self.windows[:, 2:]
        offsets = torch.arange(self.last, device=skips.device)
        return (skips <= offsets) & (offsets < skips + counts)

    def positions(self) -> Tensor:
        """Returns the positions that the windows score, int64."""
        first = self.windows[:, :1] + self.seq_len - self.last
        return (first + torch.arange(self.last, device=first.device))[self.scored()]


class TestTimeLearner:
    """Trains a model on scored text by SGD, at a rate that falls as half a cosine (PR #549)."""

    def __init__(self, model: GPT, h: Hyperparameters, device: Device, ranks: Ranks) -> None:
        self.seq_len, self.epochs, self.lr = h.window_tokens, h.ttt_epochs, h.ttt_lr
        self.chunk_tokens = max(h.ttt_chunk_tokens, self.seq_len)
        self.ranks, self.loss_fn = ranks, device.compile(model)
        params = [*model.parameters()]
        self.sgd = torch.optim.SGD(params, self.lr, momentum=0.9)
        self.gradient = bind_flat_gradient_(params)
        self.learned = 0  # chunks

    def learn_before(self, batch: Batch, text: Tensor) -> None:
        """Learns the chunks whose every position lies before the first one that a batch scores."""
        start, skip, _ = batch.windows[0].tolist()
        complete = (start + batch.seq_len - batch.last + skip) // self.chunk_tokens
        if complete > self.learned:
            # Position p predicts token p + 1, so all of these tokens are scored.
            begin, end = self.learned * self.chunk_tokens, complete * self.chunk_tokens
            self.learn(text[begin : end + 1], begin / (len(text) - 1))
            self.learned = complete

    @torch.inference_mode(False)
    def learn(self, tokens: Tensor, fraction: float) -> None:
        """Takes the steps of one scored chunk [chunk_tokens + 1], at a fraction of the text."""
        self.sgd.param_groups[0]["lr"] = self.lr * (1 + math.cos(math.pi * fraction)) / 2
        rows = (len(tokens) - 1) // self.seq_len
        inputs = tokens[: rows * self.seq_len].long().view(rows, self.seq_len)
        targets = tokens[1 : rows * self.seq_len + 1].long().view(rows, self.seq_len)
        for _ in range(self.epochs):
            for x, y in zip(inputs.split(32), targets.split(32)):
                self.step(x, y)

    def step(self, inputs: Tensor, targets: Tensor) -> None:
        """Takes one step on sequences [n, T], divided among the ranks."""
        mine = slice(self.ranks.rank, None, self.ranks.world_size)
        if len(inputs[mine]):
            loss = self.loss_fn(inputs[mine], targets[mine])
            (loss * (len(inputs[mine]) / len(inputs))).backward()
        norm = self.ranks.all_reduce_(self.gradient).norm()
        self.gradient.mul_((1 / (norm + 1e-6)).clamp(max=1))
        self.sgd.step()
        self.gradient.zero_()


class PrefixLearner(TestTimeLearner):
    """Trains the model once, on the first documents of a pass, when they are scored (PR #1610).

    There they are joined by length, here in the order of the text.
    """

    def __init__(
        self, model: GPT, h: Hyperparameters, device: Device, ranks: Ranks, log: Log
    ) -> None:
        super().__init__(model, h, device, ranks)
        self.epochs, self.lr = h.global_ttt_epochs, h.global_ttt_lr
        self.chunk_tokens = max(h.global_ttt_chunk_tokens, self.seq_len)
        self.model, self.log = model, log
        self.waits_for, self.begun = h.phased_ttt_prefix_docs, 0  # documents
        self.positions: list[Tensor] = []  # of the documents begun, by batch
        memory = 2 * self.gradient.nbytes >> 20
        log(f"ttt_sgd after:{self.waits_for} documents gradient and momentum:{memory} MiB")

    def learn_before(self, batch: Batch, text: Tensor) -> None:
        """Learns before a batch that begins documents, if enough documents lie before it.

        All of them are scored: a rank waits in the all-reduce until the others have scored theirs.
        """
        if batch.begins and self.begun >= self.waits_for and not self.learned:
            self.learn_documents(text)
            self.learned = 1  # time
        if not self.learned:
            self.begun += len(batch.windows) * batch.begins
            self.positions.append(batch.positions())

    def learn_documents(self, text: Tensor) -> None:
        """Takes the steps of all whole chunks of the documents, joined."""
        positions = torch.cat(self.positions).sort().values.to(text.device)
        self.positions.clear()
        # The last position of a document predicts BOS, which begins the next one.
        tokens = torch.cat((text[positions], text[positions[-1:] + 1]))
        chunks = len(positions) // self.chunk_tokens
        self.log(f"ttt_sgd documents:{self.begun} tokens:{len(positions)} chunks:{chunks}")
        self.model.requires_grad_(True)
        for n in range(chunks):
            begin = n * self.chunk_tokens
            self.learn(tokens[begin : begin + self.chunk_tokens + 1], n / chunks)
        self.model.requires_grad_(False)  # which a step on adapters does not train


class AdapterLearner:
    """Trains an adapter for each document on what is scored of it, by AdamW (LoRA, PR #1530).

    The weights of the model stay. All documents start from the same random A, and from B = 0.
    """

    def __init__(
        self, forward_logits: Callable[..., Tensor], h: Hyperparameters, device: Device
    ) -> None:
        self.model_logits, self.h, self.device = forward_logits, h, device
        self.documents = h.ttt_batch_size  # at once
        self.nats = torch.empty(0)  # [B, n], the last scores of the documents, with their graph

    def warm_up(self) -> None:
        """Compiles on random tokens, because no text may be read before it is scored."""
        window, chunk = self.h.window_tokens, self.h.ttt_chunk_size
        self.start()
        for rows, length in ((1, window), (self.documents, window), (self.documents, chunk)):
            shape = rows, length + 1  # with the last target, as score_windows has them
            ids = torch.randint(self.h.vocab_size, shape, device=self.device.device)
            self.forward_logits(ids[:, :-1], chunk).sum().backward()

    def describe(self, batches: Sequence[Batch]) -> str:
        """Returns how much there is to do, and the memory of adapters, gradients and moments."""
        begun = [len(batch.windows) for batch in batches if batch.begins]
        widths = sum(self.h.model_dim + width for width in adapter_widths(self.h).values())
        memory = 4 * 4 * self.documents * self.h.ttt_lora_rank * widths
        return f"documents:{sum(begun)} batches:{len(begun)} adapters:{memory >> 20} MiB"

    def start(self) -> None:
        """Starts the adapters of new documents."""
        h, rank, draws = self.h, self.h.ttt_lora_rank, torch.Generator().manual_seed(self.h.seed)
        self.adapters: dict[str, tuple[Tensor, Tensor]] = {}
        for name, width in adapter_widths(h).items():
            a = torch.empty(rank, h.model_dim).uniform_(-1, 1, generator=draws) / h.model_dim**0.5
            a = a.to(self.device.device).repeat(self.documents, 1, 1)
            b = a.new_zeros(self.documents, width, rank)
            self.adapters[name] = nn.Parameter(a), nn.Parameter(b)
        params = [p for pair in self.adapters.values() for p in pair]
        betas, decay = (0.0, h.ttt_beta2), h.ttt_weight_decay
        self.adamw = torch.optim.AdamW(params, h.ttt_lora_lr, betas, 1e-10, decay)

    @torch.inference_mode(False)
    def prepare(self, batch: Batch) -> None:
        """Starts adapters for new documents, else takes a step on the last scores of the documents.

        The loss is the sum of each document's mean, so that documents do not influence each other.
        """
        if batch.begins:
            self.start()
        else:
            self.nats.mean(1).sum().backward()
            self.adamw.step()
            self.adamw.zero_grad()

    def forward_logits(self, ids: Tensor, last: int) -> Tensor:
        """Returns logits [B, last, V] of ids [B, T] of the first B documents."""
        return self.model_logits(ids, last, self.adapters)


def plan_documents(tokens: Tensor, seq_len: int, first: int, stride: int, rows: int) -> list[Batch]:
    """Returns batches of windows that read one document each, the longest documents first.

    `rows` documents of similar length go together. A first batch scores their positions up to
    `first`, each further one the next `stride` positions of those that go on. A window begins where
    its document does, or `seq_len` tokens before the end of those positions. Each position is
    scored once, with the same context whatever documents go with its own.
    """
    total = len(tokens) - 1
    bounds = F.pad((tokens[1:-1] == BOS_ID).nonzero().flatten() + 1, (1, 0))
    lengths = bounds.diff(append=torch.tensor([total]))
    batches = []
    for part in lengths.argsort(descending=True, stable=True).split(rows):
        longest, done, end = int(lengths[part[0]]), 0, first
        read = 64 * -(-longest // 64)  # kernels are faster, and the JEPA head has whole chunks
        while done < longest:
            start, last = max(end - seq_len, 0), min(end, read) - done
            counts = (lengths[part] - done).clamp(max=last)
            windows = torch.stack((bounds[part] + start, 0 * counts, counts), dim=1)[counts > 0]
            batches.append(Batch(windows, done + last - start, last, begins=done == 0))
            done, end = end, end + stride
    return batches


def plan_windows(
    total: int, seq_len: int, stride: int, batch_windows: int, chunk: int
) -> list[Batch]:
    """Returns batches of windows of the text, whatever documents they read.

    Windows end `stride` apart, the last one at `total`. A window scores the positions past the end
    of the window before, so that every position is scored exactly once. All windows of a batch have
    their first scored position in the same chunk, so that a learner is needed between batches only.
    Where the first window scores more than the others it is a batch of its own. Batches are filled
    to one size with windows that score nothing.
    """
    ends = torch.cat((torch.arange(seq_len, total, stride), torch.tensor([total])))
    counts = ends.diff(prepend=torch.tensor([0]))
    windows = torch.stack((ends - seq_len, (stride - counts).clamp(min=0), counts), dim=1)
    cuts = 1 + ((ends - counts) // chunk).diff().nonzero().flatten()
    if stride < seq_len:
        cuts = torch.cat((torch.tensor([1]), cuts)).unique()
    size = min(batch_windows, len(windows))
    parts = [part for cut in windows.tensor_split(cuts) for part in cut.split(size)]
    filled = [F.pad(part, (0, 0, 0, size - len(part))) for part in parts if len(part)]
    return [Batch(part, seq_len, stride if n else seq_len) for n, part in enumerate(filled)]


class ScoringPass(NamedTuple):
    """One way to score the validation text: its windows, and the logits of a batch of them."""

    forward_logits: Callable[[Tensor, int], Tensor]  # (ids [B, T], last) to [B, last, V]
    seq_len: int  # tokens in a window
    stride: int  # tokens that a window scores, its last ones; the first window scores all
    learner: TestTimeLearner | None = None  # trains between batches, on scored chunks only
    documents: bool = False  # each window is of one document
    adapters: AdapterLearner | None = None  # so too; learns from a batch before the next one

    def plan(self, tokens: Tensor, batch_tokens: int) -> list[Batch]:
        """Returns the batches of a text, of about so many tokens or of TTT_BATCH_SIZE documents."""
        total = len(tokens) - 1
        seq_len = min(self.seq_len, total)
        stride, rows = min(self.stride, seq_len), max(batch_tokens // seq_len, 1)
        if self.adapters:
            return plan_documents(tokens, seq_len, stride, stride, self.adapters.documents)
        if self.documents:
            return plan_documents(tokens, seq_len, seq_len, stride, rows)
        chunk = self.learner.chunk_tokens if self.learner else total
        return plan_windows(total, seq_len, stride, rows, chunk)

    def learn_before(self, batch: Batch, tokens: Tensor) -> None:
        """Trains all weights on what is scored before a batch; every rank takes part."""
        if self.adapters and batch.begins:
            self.adapters.nats = torch.empty(0)  # frees the graph
        if self.learner:
            self.learner.learn_before(batch, tokens)


def score_windows(
    forward_logits: Callable[[Tensor, int], Tensor], val: Validation, batch: Batch
) -> Tensor:
    """Returns nats, tokens and bytes, float64 [3, n, last], of the positions of n windows.

    They are 0 where a window does not score. A token that is forbidden after the previous one has
    probability 0; the softmax is over the others. The nats keep their graph.
    """
    offsets = torch.arange(batch.seq_len + 1, device=batch.windows.device)
    ids = val.tokens[(batch.windows[:, :1] + offsets).clamp(max=len(val.tokens) - 1)].long()
    inputs, targets = ids[:, :-1], ids[:, -batch.last :]
    previous = inputs[:, -batch.last :]
    logits = forward_logits(inputs, batch.last).flatten(0, 1)
    if val.forbidden is not None:
        logits = logits.masked_fill_(val.forbidden[previous.flatten()], -math.inf)
    nats = F.cross_entropy(logits, targets.flatten(), reduction="none").view_as(targets)
    text_bytes, scored = val.table.text_bytes(previous, targets), batch.scored()
    return torch.stack((nats.double(), scored, text_bytes)).where(scored, 0)


def divide_among_ranks(batches: Sequence[Batch], world_size: int) -> list[int]:
    """Returns the rank of each batch: the one with the least to read takes the next documents."""
    loads, owner, owners = [0] * world_size, 0, []
    for batch in batches:
        if batch.begins:
            owner = loads.index(min(loads))
        loads[owner] += batch.tokens
        owners.append(owner)
    return owners


@torch.inference_mode()
def score(
    scoring_pass: ScoringPass,
    val: Validation,
    ranks: Ranks,
    device: Device,
    log: Log,
    batch_tokens: int,
    observe: Callable[[Batch, Tensor], None] | None = None,
) -> Score:
    """Scores the validation text by one pass, in the order of the text or of documents' lengths.

    Each position is scored once. Batches of `batch_tokens` are divided among the ranks. Before a
    batch the learner, if any, trains on chunks or documents that are scored, and the adapters, if
    any, on the batch before. Where the memory runs out, half as many windows are scored at once.
    `observe` receives what `score_windows` returns.
    """
    began, total = device.now(), len(val.tokens) - 1
    adapters = scoring_pass.adapters
    batches = scoring_pass.plan(val.tokens, batch_tokens)
    val, sums = val.to(device.device), torch.zeros(3, dtype=torch.float64, device=device.device)
    most = len(batches[0].windows)  # windows at once
    owners = divide_among_ranks(batches, ranks.world_size)
    own = [batch.tokens for batch, owner in zip(batches, owners) if owner == ranks.rank]
    read, told = 0, adapters is None
    if adapters:
        log(f"ttt_lora {adapters.describe(batches)}")

    def add(batch: Batch) -> None:
        nonlocal most
        windows = device.send(batch.windows)
        while len(windows):
            part = batch._replace(windows=windows[:most])
            try:
                with torch.inference_mode(adapters is None):
                    found = score_windows(scoring_pass.forward_logits, val, part)
                    if adapters:
                        adapters.nats = found[0]
                if observe:
                    observe(part, found.detach())
                sums.add_(found.sum((1, 2)))
                windows = windows[most:]
            except Exception as error:
                if adapters or len(part.windows) == 1 or not is_out_of_memory(error):
                    raise
                most = len(part.windows) // 2
                log(f"out of memory: scoring {most} windows at once; lower VAL_BATCH_SIZE")

    with matmul_precision("highest"):
        for n, batch in enumerate(batches):  # every rank walks through all batches
            scoring_pass.learn_before(batch, val.tokens)
            if owners[n] == ranks.rank:
                if adapters:
                    adapters.prepare(batch)
                add(batch)
                read += batch.tokens
            if not told and read > sum(own) / 50:
                told = True
                log_expected_time(log, "ttt_lora", (device.now() - began) * sum(own) / read)
            log.progress(f"scoring batch {n + 1} of {len(batches)}")
    nats, tokens, text_bytes = ranks.all_reduce_(sums).tolist()
    if tokens != total:
        raise RuntimeError(f"scored {tokens:.0f} tokens of {total}")
    if not math.isfinite(nats):
        raise DivergenceError("the score is not finite: the weights have diverged")
    bpb, seconds = nats / math.log(2) / text_bytes, device.now() - began
    stride = min(scoring_pass.stride, scoring_pass.seq_len, total)
    return Score(nats / total, bpb, nats, total, int(text_bytes), seconds, stride)


def log_expected_time(log: Log, name: str, seconds: float) -> None:
    """Logs how long a pass will take, and whether that is over the limit."""
    over = ", over the limit" if seconds > EVAL_SECONDS_LIMIT else ""
    log(f"{name} expected_time:{seconds:.0f}s of {EVAL_SECONDS_LIMIT}s{over}")


def scoring_batch_tokens(h: Hyperparameters, device: Device) -> int:
    """Returns the tokens that one rank scores at once; a CPU's caches hold about 4,096."""
    share = h.val_batch_size // 8  # the setting is for 8 GPUs
    return min(share, h.micro_batch_tokens if device.is_cuda else 4096)


def one_pass(model: GPT, window: int, device: Device) -> ScoringPass:
    """Returns the pass that reads the text once, with attention to the last `window` tokens.

    A sequence is 16 windows long. It starts one window before the first token that it scores.
    """

    def forward_logits(ids: Tensor, last: int) -> Tensor:
        return model.forward_logits(ids, last, window)

    return ScoringPass(device.compile(forward_logits), 16 * window, 15 * window)


def by_document(model: GPT, h: Hyperparameters, device: Device) -> ScoringPass:
    """Returns the pass that reads each document by itself.

    One compiled program is for all lengths. RoPE has the base of a whole window in all of them.
    """

    def forward_logits(ids: Tensor, last: int) -> Tensor:
        """Returns logits [B, last, V]."""
        return model.forward_logits(ids, last, h.window_tokens)

    compiled = device.compile(forward_logits, dynamic=True)
    return ScoringPass(compiled, h.window_tokens, h.stride_tokens, documents=True)


def with_adapters(
    model: GPT, h: Hyperparameters, device: Device, ranks: Ranks, log: Log
) -> ScoringPass:
    """Returns the pass over documents with adapters, and SGD on the longest if that is set."""

    def forward_logits(ids: Tensor, last: int, adapters: Adapters) -> Tensor:
        """Returns logits [B, last, V]."""
        rows = len(ids)
        own = {k: (a.narrow(0, 0, rows), b.narrow(0, 0, rows)) for k, (a, b) in adapters.items()}
        return model.forward_logits(ids, last, h.window_tokens, adapters=own)

    sgd = PrefixLearner(model, h, device, ranks, log) if h.phased_ttt_prefix_docs else None
    model.requires_grad_(False)
    lora = AdapterLearner(device.compile(forward_logits, dynamic=True), h, device)
    if device.compiled:
        lora.warm_up()
    return ScoringPass(lora.forward_logits, h.window_tokens, h.ttt_chunk_size, sgd, adapters=lora)


# ---- Optimizers: Muon, AdamW, the average of the weights ----


# Coefficients of Newton-Schulz by iteration; further iterations take the last ones.
NEWTON_SCHULZ = {
    "quintic": ((3.4445, -4.7750, 2.0315),),  # Muon, Jordan et al. 2024
    "polar_express": (  # arXiv 2505.16932, as in PR #1344
        (8.156554524902461, -22.48329292557795, 15.878769915207462),
        (4.042929935166739, -2.808917465908714, 0.5000178451051316),
        (3.8916678022926607, -2.772484153217685, 0.5060648178503393),
        (3.285753657755655, -2.3681294933425376, 0.46449024233003106),
        (2.3465413258596377, -1.7097828382687081, 0.42323551169305323),
    ),
}


def newton_schulz(matrices: Tensor, steps: int, coefficients: str = "quintic") -> Tensor:
    """Returns about U V^T for each U S V^T of a stack [n, rows, cols].

    Every matrix is scaled by its own norm; the quintic iteration moves all singular values that are
    not tiny to about 1.
    """
    table = NEWTON_SCHULZ[coefficients]
    x = matrices / (matrices.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    tall = x.size(-2) > x.size(-1)
    x = x.mT if tall else x
    for step in range(steps):
        a, b, c = table[min(step, len(table) - 1)]
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.mT if tall else x


class Muon:
    """Nesterov momentum, orthogonalized; matrices of one shape are one stack.

    With a slow share s the momentum is (1 - s) of a fast average of the gradients and s of a slow
    one (bi-Maxwell, modded-nanogpt PR #340).
    """

    FAST, SLOW = 0.85, 0.98

    def __init__(
        self,
        matrices: Mapping[str, Tensor],
        lr: float,
        weight_decay: float,
        h: Hyperparameters,
        dtype: torch.dtype,
        ranks: Ranks,
    ) -> None:
        self.lr, self.weight_decay = lr, weight_decay
        self.h, self.dtype, self.ranks = h, dtype, ranks
        shapes = sorted({p.shape for p in matrices.values()})
        self.names = [[n for n, p in matrices.items() if p.shape == shape] for shape in shapes]
        self.stacks = [[matrices[name] for name in names] for names in self.names]
        self.momenta = [torch.zeros_like(torch.stack(stack)) for stack in self.stacks]
        self.slow_momenta = [x.clone() for x in self.momenta] if h.muon_slow_share else []

    @torch.no_grad()
    def step(self, lr_scale: float | Tensor, momentum: float) -> None:
        """Decays the weights, then moves them by the orthogonalized update.

        The rows of the update may be normalized before (MuonEq-R, PR #1285). The update of a matrix
        [rows, cols] is multiplied by max(1, rows / cols) ** 0.5.
        """
        h, lr = self.h, self.lr * lr_scale
        orthogonalize = partial(
            newton_schulz, steps=h.muon_backend_steps, coefficients=h.muon_coefficients
        )
        for n, (stack, buffer) in enumerate(zip(self.stacks, self.momenta)):
            gradient = torch.stack([p.grad for p in stack])  # type: ignore[misc]
            if h.muon_slow_share:
                slow = self.slow_momenta[n].lerp_(gradient, 1 - self.SLOW)
                fast = buffer.lerp_(gradient, 1 - self.FAST)
                update = gradient.lerp_(fast.lerp(slow, h.muon_slow_share), momentum)
            else:
                buffer.mul_(momentum).add_(gradient)
                update = gradient.add_(buffer, alpha=momentum)
            if h.muon_row_normalize:
                update = update / update.norm(dim=-1, keepdim=True).clamp_min(1e-7)
            update = self.ranks.map_over_ranks(orthogonalize, update.to(self.dtype))
            rows, cols = stack[0].shape
            torch._foreach_mul_(stack, 1 - lr * self.weight_decay)
            update = update.float().mul_(-lr * max(1, rows / cols) ** 0.5)
            torch._foreach_add_(stack, list(update.unbind()))

    def state(self) -> dict[str, Tensor]:
        """Returns the momenta, as views, by their kind and parameter."""
        kinds = {"muon": self.momenta, "muon_slow": self.slow_momenta}
        return {
            f"{kind}/{name}": x
            for kind, momenta in kinds.items()
            for names, stack in zip(self.names, momenta)
            for name, x in zip(names, stack)
        }


class Optimizers:
    """Muon for matrices and AdamW for the rest, by role; clips and clears the gradients."""

    def __init__(self, model: GPT, h: Hyperparameters, ranks: Ranks) -> None:
        self.clip_norm = h.grad_clip_norm or math.inf
        roles, named = parameter_roles(model), dict(model.named_parameters())
        by_role = {r: {n: p for n, p in named.items() if roles[n] == r} for r in ROLES}
        groups = []
        for name, role in ROLES.items():
            lr = getattr(h, role.learning_rate)
            decay = getattr(h, role.weight_decay) if role.weight_decay else 0.0
            if role.optimizer == "muon":
                self.muon = Muon(by_role[name], lr, decay, h, model.dtype, ranks)
            else:
                params = [*by_role[name].values()]
                groups.append({"params": params, "lr": 0.0, "base_lr": lr, "weight_decay": decay})
        self.adamw = torch.optim.AdamW(groups, betas=(h.beta1, h.beta2), eps=h.adam_eps, fused=True)
        self.names: dict[Tensor, str] = {p: name for name, p in named.items()}
        # Largest first: views behind an odd number of elements would not be aligned.
        by_size = sorted(named.values(), key=torch.numel, reverse=True)
        self.gradient = bind_flat_gradient_(by_size)
        self.adamw.step()  # at rate 0: creates the state into which a checkpoint is copied
        for state in self.adamw.state.values():
            state["step"].zero_()

    def step(self, phase: Phase) -> Tensor:
        """Clips the gradient, takes a step, clears the gradient; returns the gradient's norm [].

        A gradient that is not finite changes no weight: it counts as zero, at rate 0.
        """
        norm = self.gradient.norm()
        factor = (self.clip_norm / (norm + 1e-6)).clamp(max=1)
        self.gradient.nan_to_num_(0.0, 0.0, 0.0).mul_(factor.where(norm.isfinite(), 0.0))
        lr_scale = phase.lr_scale * norm.isfinite()
        self.muon.step(lr_scale, phase.muon_momentum)
        for group in self.adamw.param_groups:
            group["lr"] = group["base_lr"] * lr_scale
        self.adamw.step()
        self.gradient.zero_()
        return norm

    def state(self) -> dict[str, Tensor]:
        """Returns every tensor of the optimizers' state by name."""
        state = self.muon.state()
        for p, of_param in self.adamw.state.items():
            prefix = f"adamw/{self.names[p]}"
            state |= {f"{prefix}/{key}": tensor for key, tensor in of_param.items()}
        return state


class WeightAverage:
    """The weights that a run ends with: an average over the steps, or the last ones.

    `weights` holds them at any time, by parameter name. EMA_ENABLED=1 keeps an exponential moving
    average, SWA_ENABLED=1 an equal average of weights late in the run instead.
    """

    def __init__(self, model: GPT, h: Hyperparameters) -> None:
        self.kind = "swa" if h.swa_enabled else "ema" if h.ema_enabled else "raw"
        self.ema_decay, self.swa_every = h.ema_decay, h.swa_every
        self.swa_start, self.share = h.swa_start_frac, h.average_share
        self.params = {name: p.detach() for name, p in model.named_parameters()}
        self.weights = {name: p.clone() for name, p in self.params.items()}
        self.count = 0  # weights in the average of SWA

    def update(self, step: int, lr_scale: float) -> None:
        """Updates the average with the weights after step `step`, the first being 0."""
        if self.kind == "ema":
            # With a constant decay, 0.997 would leave 41 % of the initial weights after 300 steps.
            share = 1 - min(self.ema_decay, (1 + step) / (10 + step))
        else:
            late = self.kind == "swa" and lr_scale < self.swa_start
            due = late and (step + 1) % self.swa_every == 0
            self.count += due
            share = 1 / self.count if due else float(not self.count)  # at first the last weights
        if share:
            torch._foreach_lerp_([*self.weights.values()], [*self.params.values()], share)

    def finish(self) -> None:
        """Ends the run: blends the last weights into the average, by AVERAGE_SHARE."""
        if self.share < 1:
            torch._foreach_lerp_([*self.weights.values()], [*self.params.values()], 1 - self.share)

    def copy_to_model(self, log: Log) -> str:
        """Copies the average into the model; returns its kind: ema, swa, or raw (no average)."""
        kind = "raw" if self.kind == "swa" and not self.count else self.kind
        torch._foreach_copy_([*self.params.values()], [*self.weights.values()])
        applied = {"swa": f"averaged {self.count} checkpoints", "ema": "EMA weights"}
        log(f"{kind}:applying {applied.get(kind, 'the last weights, no average')}")
        return kind


# ---- Training: clock, checkpoints, one step, the loop ----

CHECKPOINT, FINAL_MODEL = "checkpoint.safetensors", "final_model.safetensors"
READING = ("seed", "train_order", "train_batch_tokens", "shards")  # the text that a step reads


class StepLog:
    """Losses and seconds of the steps, their log lines, and the clock of training.

    The clock counts the seconds of the slowest rank; the time from a finish to a resume is left
    out. On CUDA a step's loss is read when the next step has been launched, so that the GPU never
    waits.
    """

    def __init__(self, device: Device, log: Log, ranks: Ranks, iterations: int, every: int) -> None:
        self.device, self.log, self.ranks = device, log, ranks
        self.iterations, self.every = iterations, every
        self.losses: list[float] = []  # of the finished steps
        self.seconds: list[float] = []  # that each of them took
        self.running: deque[tuple[Any, list[str], Tensor]] = deque()
        self.elapsed = 0.0  # seconds of training
        self.slowest = 0.0  # seconds of the slowest recent step of all ranks
        self.mark = device.now()  # the moment up to which `elapsed` counts

    def resume(self) -> None:
        """Starts to count from now on."""
        self.mark = self.device.now()

    def count(self, now: float) -> float:
        """Counts the seconds until a moment, and returns them."""
        seconds = now - self.mark
        self.elapsed += seconds
        self.mark = now
        return seconds

    def agree(self, stop: bool = False) -> bool:
        """Takes the seconds of the slowest rank; returns whether any rank wants to stop."""
        own, recent = self.elapsed, max(self.seconds[-20:], default=0.0)
        self.elapsed, self.slowest, stops = self.ranks.all_reduce_max(own, recent, stop)
        self.mark += self.elapsed - own
        return stops > 0

    def finish(self) -> None:
        """Waits for all launched steps, and counts the seconds until now."""
        self.record_steps()
        self.count(self.device.now())
        self.agree()

    def launched(self, terms: Mapping[str, Tensor]) -> None:
        """Queues a launched step for the log, given this rank's share of each term of its loss."""
        values = self.ranks.all_reduce_(torch.stack([*terms.values()]))
        values = values.to("cpu", non_blocking=True)  # from a GPU, into pinned memory
        event = torch.cuda.current_stream().record_event() if self.device.is_cuda else None
        self.running.append((event, [*terms], values))
        self.record_steps(keep=1 if self.device.is_cuda else 0)

    def record_steps(self, keep: int = 0) -> None:
        """Waits for the oldest steps until `keep` are left, and records them."""
        while len(self.running) > keep:
            event, names, values = self.running.popleft()
            if event is not None:
                event.synchronize()
            self.seconds.append(self.count(time.perf_counter()))
            self.record(dict(zip(names, values.tolist())))

    def record(self, terms: dict[str, float]) -> None:
        """Records a finished step.

        Raises DivergenceError if its loss or its gradient was not finite.
        """
        loss = terms["train_loss"]
        self.losses.append(loss)
        step = len(self.losses)
        if step <= 10 or (self.every and step % self.every == 0):
            self.write(**terms)
        left = self.elapsed / step * (self.iterations - step)
        self.log.progress(f"step {step}/{self.iterations}  loss {loss:.4f}  {left:.0f} s left")
        total, bad = sum(terms.values()), [k for k, v in terms.items() if not math.isfinite(v)]
        if bad:
            raise DivergenceError(
                f"step {step}: the loss is {total}: {' '.join(bad)} or its gradient is not finite; "
                "lower MATRIX_LR and SCALAR_LR, or set ATTN to another back end"
            )

    def write(self, **values: float) -> None:
        """Logs values of the last finished step."""
        step, ms = len(self.losses), 1000 * self.elapsed
        terms = " ".join(f"{name}:{value:.4f}" for name, value in values.items())
        times = f"train_time:{ms:.0f}ms step_avg:{ms / max(step, 1):.2f}ms"
        self.log(f"step:{step}/{self.iterations} {terms} {times}")
        self.log.event("step", step=step, seconds=self.elapsed, **values)


def auxiliary_inputs(
    phase: Phase, h: Hyperparameters, step: int, rows: slice, device: Device
) -> Auxiliary:
    """Returns what the auxiliary losses need for some rows of a step.

    The random numbers follow from SEED and the step, whatever the number of ranks.
    """
    jepa_weight = positions = None
    if phase.jepa_weight > 0:
        jepa_weight = device.send(torch.tensor(phase.jepa_weight))
    if h.stp_enabled and h.stp_lambda > 0:
        draws = torch.Generator().manual_seed(h.seed + step)
        shape = (h.train_batch_tokens // h.train_seq_len, 3)
        drawn = torch.randint(h.train_seq_len - 2, shape, generator=draws)[rows]
        positions = device.send(drawn.sort(dim=1).values + torch.arange(3))  # distinct and rising
    return Auxiliary(jepa_weight, positions)


class Trainer:
    """Model, optimizers, average and step log of a run, and its loop.

    Stops, validations and checkpoints are decided on all-reduced values only, so that ranks agree.
    In a step these tensors travel between the ranks, in order: seconds and the stop flag (agree,
    all-reduce max), the gradient of all weights (take_step, all-reduce sum), Muon's updates
    (map_over_ranks, all-gather), the terms of the loss (StepLog.launched, all-reduce sum).
    """

    def __init__(
        self, model: GPT, data: Data, ranks: Ranks, device: Device, log: Log, deadline: float
    ) -> None:
        assert data.train is not None
        self.model, self.val, self.batches = model.train(), data.val, data.train
        self.h = h = model.h
        self.ranks, self.device, self.log = ranks, device, log
        self.deadline = deadline  # in seconds of training
        self.rows = h.train_batch_tokens // h.train_seq_len // ranks.world_size
        self.grad_accum = grad_accum_steps(self.rows, h.train_seq_len, h.micro_batch_tokens)
        self.loss_fn = device.compile(model.losses)
        self.forward_logits = device.compile(model.forward_logits)
        self.optimizers, self.average = Optimizers(model, h, ranks), WeightAverage(model, h)
        self.step_log = StepLog(device, log, ranks, h.iterations, h.train_log_every)
        self.step = 0  # steps launched
        self.stop_asked = self.validating = False

    def train(self, resume_from: Mapping[str, Tensor] | None = None) -> None:
        """Trains until ITERATIONS, or until one more step could pass the deadline.

        Continues from the tensors of a checkpoint, if any. Whatever ends training, the average so
        far is saved. The model keeps its last weights, whose plain score is logged.
        """
        self.log(f"world_size:{self.ranks.world_size} grad_accum_steps:{self.grad_accum}")
        with matmul_precision("medium"):
            self.warm_up()
            if resume_from is not None:
                self.restore(resume_from)
            with ExitStack() as at_end:
                for number in (signal.SIGINT, signal.SIGTERM):
                    former = signal.signal(number, self.receive_signal)
                    at_end.callback(signal.signal, number, former)
                try:
                    self.loop()
                    self.step_log.finish()
                finally:
                    self.validating = False  # no signal interrupts the saving
                    self.average.finish()
                    self.save(FINAL_MODEL, self.average.weights)
                stopped = self.step_log.agree(self.stop_asked)  # rank 0 has written its files
        if stopped:
            raise KeyboardInterrupt
        if self.step < self.h.iterations:
            at = f"train_time:{1000 * self.step_log.elapsed:.0f}ms step:{self.step}"
            self.log(f"stopping_early: wallclock_cap {at}/{self.h.iterations}")
        self.validate(self.h.num_loops)

    def warm_up(self) -> None:
        """Compiles every program by WARMUP_STEPS steps on random tokens, then undoes the steps.

        An eager CPU has nothing to compile.
        """
        h, compiles = self.h, self.device.is_cuda or self.device.compiled
        phases = [phase._replace(lr_scale=0.0) for phase in programs(h)]  # moves no weight
        generator = torch.Generator().manual_seed(h.seed)
        count = max(h.warmup_steps, len(phases)) if h.warmup_steps and compiles else 0
        for step in range(count):
            shape = (2, self.rows, h.train_seq_len)
            inputs, targets = torch.randint(h.vocab_size, shape, generator=generator)
            self.take_step(phases[step % len(phases)], inputs, targets)
            self.log(f"warmup_step:{step + 1}/{count}")
        for state in self.optimizers.state().values():
            state.zero_()

    def receive_signal(self, *_: object) -> None:
        """Notes a signal, so that a step is always finished; in a validation it ends the run."""
        self.stop_asked = True
        if self.validating:
            raise KeyboardInterrupt

    def loop(self) -> None:
        """Takes steps until the run ends or, after a checkpoint, a signal has come to some rank."""
        h, step_log = self.h, self.step_log
        step_log.resume()
        interval = int(h.checkpoint_every.removesuffix("s")) or math.inf
        saved = (self.step, step_log.elapsed)  # steps and seconds at the last checkpoint
        while True:
            stop = step_log.agree(self.stop_asked)
            steps, seconds = self.step - saved[0], step_log.elapsed - saved[1]
            if stop or (seconds if h.checkpoint_every.endswith("s") else steps) >= interval:
                saved = (self.step, step_log.elapsed)
                step_log.finish()
                self.save(CHECKPOINT, self.tensors())
                step_log.finish()  # the time that this takes counts as training
            if stop:
                return
            # When the steps in flight and one more would end, each as slow as the slowest.
            next_end = step_log.elapsed + (len(step_log.running) + 1) * step_log.slowest
            if self.step >= h.iterations or next_end >= self.deadline:
                return
            if h.val_loss_every > 0 and self.step % h.val_loss_every == 0:
                step_log.finish()
                self.validating = True
                self.validate(self.phase().loops)
                self.validating = False
                step_log.resume()
            phase = self.phase()
            step_log.launched(self.take_step(phase, *self.batches.batch(self.step)))
            self.average.update(self.step, phase.lr_scale)
            self.step += 1

    def phase(self) -> Phase:
        """Returns the values of the schedule for the next step."""
        progress = Progress(self.step, self.h.iterations, self.step_log.elapsed, self.deadline)
        return schedule(progress, self.h)

    def take_step(self, phase: Phase, inputs: Tensor, targets: Tensor) -> dict[str, Tensor]:
        """Takes a step on this rank's inputs and targets [rows, T], which are on the CPU.

        Returns this rank's share of each term of the mean loss. One all-reduce sums the gradients
        of all ranks: a compiled backward hands over all gradients at its end, so none could go
        earlier.
        """
        h, device = self.h, self.device
        inputs, targets = device.send(inputs), device.send(targets)
        rows, share = self.rows // self.grad_accum, 1 / (self.grad_accum * self.ranks.world_size)
        sums: dict[str, Tensor] = {}
        for start in range(0, self.rows, rows):
            first = self.ranks.rank * self.rows + start
            auxiliary = auxiliary_inputs(phase, h, self.step, slice(first, first + rows), device)
            part = slice(start, start + rows)
            loss, terms = self.loss_fn(inputs[part], targets[part], auxiliary, phase.loops)
            (loss * share).backward()
            for name, term in terms.items():
                sums[name] = sums.get(name, 0) + term.detach() * share
        self.ranks.all_reduce_(self.optimizers.gradient)
        norm = self.optimizers.step(phase)
        # The log ends the run at a loss that is not finite.
        sums["train_loss"] = sums["train_loss"].where(norm.isfinite(), norm)
        return sums

    def validate(self, loops: int) -> None:
        """Logs the plain score of the weights as they are, with repeated layers."""
        self.model.eval()
        window, tokens = self.h.window_tokens, scoring_batch_tokens(self.h, self.device)
        scoring_pass = ScoringPass(partial(self.forward_logits, loops=loops), window, window)
        result = score(scoring_pass, self.val, self.ranks, self.device, self.log, tokens)
        self.step_log.write(val_loss=result.val_loss, val_bpb=result.val_bpb)
        self.model.train()

    def save(self, name: str, tensors: Mapping[str, Tensor]) -> None:
        """Writes tensors into the run's folder, on rank 0, with the settings and what was read.

        If the file cannot be written the log says so; a file from before stays whole.
        """
        if self.log.silent or self.log.folder is None:
            return
        path = self.log.folder / name
        text = {"step": self.step, "shards": self.batches.stream.fingerprint()}
        try:
            write_tensors(path, tensors, asdict(self.h) | text)
            self.log(f"Serialized model: {path.stat().st_size} bytes in {name}")
        except OSError as error:
            self.log(f"warning: {path} could not be written: {error}")

    def tensors(self) -> dict[str, Tensor]:
        """Returns the tensors of a checkpoint by name.

        model/ holds the weights, average/ what the run would end with now, muon/ and adamw/ the
        optimizers' state, progress/ the losses and times of the steps. The training text and all
        random numbers of a step follow from its number.
        """
        tensors = {f"model/{name}": p for name, p in self.average.params.items()}
        tensors |= {f"average/{name}": p for name, p in self.average.weights.items()}
        tensors |= self.optimizers.state()
        log = self.step_log
        progress = {"elapsed": log.elapsed, "losses": log.losses, "averaged": self.average.count}
        progress["times"] = np.cumsum(log.seconds)
        for name, values in progress.items():
            tensors[f"progress/{name}"] = torch.as_tensor(values, dtype=torch.float64)
        return tensors

    def restore(self, saved: Mapping[str, Tensor]) -> None:
        """Continues from the tensors of a checkpoint. Raises DataError if they do not fit."""
        with raise_data_error(f"RESUME={self.h.resume}: not a training state of this model"):
            self.step_log.elapsed = saved["progress/elapsed"].item()
            self.step_log.losses = saved["progress/losses"].tolist()
            self.step_log.seconds = np.diff(saved["progress/times"], prepend=0.0).tolist()
            self.average.count = int(saved["progress/averaged"].item())
            for name, tensor in self.tensors().items():
                if not name.startswith("progress/"):
                    stored = saved[name]
                    check(stored.shape == tensor.shape, f"{name} has shape {[*stored.shape]}")
                    tensor.copy_(stored)
        self.step = len(self.step_log.losses)
        self.log(f"resume: step {self.step}, {self.step_log.elapsed:.1f} s trained")


# ---- Quantize: from float32 weights to integer codes ----

GPTQ_BLOCK = 128  # columns
CLIP_RATIOS = (1.0, 0.95, 0.9, 0.85, 0.8, 0.75, 0.7, 0.6, 0.5)  # of a row's largest weight
MIN_SCALE, MAX_SCALE = 2.0**-24, 65_504.0  # what float16 can hold
TRELLIS_STEPS = 64  # at most, down a column
TUNE_RATE, TUNE_TOKENS = 0.006, 16_384  # of Adam, falling to 0; of a step, at most
RATE_WEIGHT = 0.05  # squared errors, in units of the scale, that a nat of a code is worth


class Quantizer:
    """Codes of weights, and weights of codes, both in units of a row's scale.

    With one state it is scalar: a weight is its code. With more it is a trellis (dependent
    quantization, as in VVC, ITU-T H.266): each column has a state, the parity of a code chooses the
    state of the next code, and in odd states the code k means k - sign(k) / 2. The values of even
    and odd states together have half the spacing of either.
    """

    def __init__(self, flips: Sequence[int]) -> None:
        # An even code leads from state s to 2 s + flips[s] modulo num_states, an odd code to the
        # other state of that pair. States s and s + num_states / 2 lead to the same pair.
        self.num_states, parity = len(flips), np.arange(2)
        states, flip = np.arange(self.num_states)[:, None], np.array(flips)[:, None]
        # By state and by parity of the code.
        self.next_state = (2 * states + (parity ^ flip)) % self.num_states
        # The subset of nearest_codes that leads to the first, and to the second state of the pair.
        self.subset = 2 * (states % 2) + (parity ^ flip)  # [state, 2]

    def code_costs(self, x: Tensor, limit: int) -> Tensor:
        """Returns what codes of matrices x [n, ...] cost: RATE_WEIGHT times their nats.

        [n, 2, limit + 1], for even and odd states, by the size of a code. The entropy is that of
        nearest codes, which differs little from that of a trellis.
        """
        if self.num_states == 1:
            return x.new_zeros(len(x), 2, limit + 1)
        size = x.abs().flatten(1)
        nearest = [size.round(), (size + 0.5).round() * (size > 0.25)]
        codes = torch.stack(nearest, 1).clamp(max=limit).long()
        counts = x.new_full((len(x), 2, limit + 1), 0.5)
        counts.scatter_add_(2, codes, x.new_ones(()).expand(codes.shape))
        shares = counts / counts.sum(2, keepdim=True)
        shares[:, :, 1:] /= 2  # either sign
        return -RATE_WEIGHT * shares.log()

    def encode(self, x: Tensor, limit: int, code_costs: Tensor) -> tuple[Tensor, Tensor]:
        """Returns codes of x [n, cols, rows], of size at most `limit`, and what they stand for.

        They are those of the path of least cost: squared error, plus code_costs [n, 2, limit + 1].
        """
        if self.num_states == 1:
            codes = x.round().clamp(-limit, limit)
            return codes, codes
        rows, size = x.size(2), x.abs()
        candidates = nearest_codes(size, limit)
        odd = torch.arange(4, device=x.device).view(4, 1, 1, 1) // 2
        by_subset = code_costs.movedim(1, 0).repeat_interleave(2, 0)  # [4, n, limit + 1]
        rates = by_subset.gather(2, candidates.flatten(2).long()).view_as(candidates)
        costs = rates + (size - reconstruct(candidates, odd)).square()
        side = rows_side_by_side(rows)
        steps = F.pad(costs, (0, -rows % side)).unflatten(3, (-1, side)).movedim(3, 0)
        path = self.least_path(steps.flatten(2)).view(len(steps), *x.shape[:2], side)
        path = path.movedim(0, 2).flatten(2)[:, :, :rows]
        codes = candidates.gather(0, path[None]).squeeze(0).copysign(x)
        return codes, reconstruct(codes, path // 2)

    def least_path(self, costs: Tensor) -> Tensor:
        """Returns the subset of each step, int64 [steps, lanes], on the path of least sum.

        `costs` is [steps, 4 subsets, lanes]. Paths begin in state 0 (Viterbi's algorithm).
        """
        lanes, half = costs.size(2), self.num_states // 2
        subset = torch.from_numpy(self.subset).to(costs.device, non_blocking=True)
        total = costs.new_full((self.num_states, lanes), math.inf)
        total[0] = 0
        choices = []  # bool [half, 2, lanes]: whether the better way into a state is the second
        for cost in costs:
            ways = total.view(2, half, 1, lanes) + cost[subset].view(2, half, 2, lanes)
            total, second = ways.min(0)
            choices.append(second.bool())
        state, path = total.view(self.num_states, lanes).argmin(0, keepdim=True), []
        for second in reversed(choices):
            before = state // 2 + half * second.view(self.num_states, lanes).gather(0, state)
            path.append(subset[before, state % 2])
            state = before
        return torch.cat(path[::-1])

    def decode(self, codes: Tensor) -> Tensor:
        """Returns what codes [rows, cols] stand for, float32."""
        side, values = rows_side_by_side(len(codes)), []
        next_state = torch.from_numpy(self.next_state).to(codes.device)
        state = codes.new_zeros(side, codes.size(1), dtype=torch.int64)
        for step in codes.long().split(side):
            state = state[: len(step)]
            values.append(reconstruct(step.float(), state % 2))
            state = next_state[state, step % 2]
        return torch.cat(values)


# The flips of 4 and 8 states are those of the trellises of JPEG 2000 (ISO 15444-2).
QUANTIZERS: dict[str, Quantizer] = {
    "scalar": Quantizer((0,)),
    "trellis4": Quantizer((0, 0, 1, 1)),
    "trellis": Quantizer((0, 1, 1, 1, 1, 0, 0, 0)),
}


def rows_side_by_side(rows: int) -> int:
    """Returns how many rows are one step of a trellis; their states do not depend on each other."""
    return -(-rows // TRELLIS_STEPS)


def reconstruct(codes: Tensor, odd: Tensor) -> Tensor:
    """Returns what codes stand for; `odd` is 1 in odd states, 0 in even ones."""
    return codes - 0.5 * odd * codes.sign()


def nearest_codes(size: Tensor, limit: int) -> Tensor:
    """Returns the nearest code of weights >= 0 in each subset, [4, ...].

    The subsets: even codes of even states, odd codes of even states, and both of odd states.
    """
    codes = []
    for odd, parity in ((0, 0), (0, 1), (1, 0), (1, 1)):
        pairs = ((size + odd / 2 - parity) / 2).round()
        if odd > parity:  # the values are 0, 1.5, 3.5, ...: 0 is nearest up to 0.75
            pairs *= size > 0.75
        codes.append((2 * pairs + parity).clamp(parity, limit - (limit - parity) % 2))
    return torch.stack(codes)


class Quantized(NamedTuple):
    """A stack of n quantized matrices."""

    codes: Tensor  # int8 [n, rows, cols]
    errors: Tensor  # [n, rows], squared errors, which a search for scales compares


def quantize_rounding(
    quantizer: Quantizer, limit: int, weight: Tensor, scales: Tensor, _: Tensor
) -> Quantized:
    """Quantizes matrices [n, rows, cols]; does not use the Hessian.

    `scales` is float16 [n, rows]; codes are from -limit to limit.
    """
    scale = scales.float().unsqueeze(1)
    x = weight.mT / scale
    codes, values = quantizer.encode(x, limit, quantizer.code_costs(x, limit))
    errors = ((values - x) * scale).square().sum(1)
    return Quantized(codes.mT.to(torch.int8), errors)


def inverse_cholesky(hessian: Tensor) -> Tensor:
    """Returns the upper Cholesky factors of the damped inverses of Hessians [n, cols, cols].

    Damping is 1 % of the mean diagonal, far more than float32 can make X^T X negative.
    """
    diagonal = hessian.diagonal(dim1=1, dim2=2)
    damping = 0.01 * diagonal.mean(1, keepdim=True) + 1e-6
    lower = torch.linalg.cholesky(hessian + torch.diag_embed(damping.expand_as(diagonal)))
    return torch.linalg.cholesky(torch.cholesky_inverse(lower), upper=True)


def quantize_gptq(
    quantizer: Quantizer, limit: int, weight: Tensor, scales: Tensor, hessian: Tensor
) -> Quantized:
    """Quantizes matrices [n, rows, cols] by full GPTQ (arXiv 2210.17323).

    `hessian` [n, cols, cols] is X^T X of the inputs X. Columns are taken by falling diagonal; the
    error of each is spread over those after it, so that the output changes least. The errors of the
    rows are weighted by the Hessian too. The rows of a column do not depend on each other, so that
    a trellis can encode each column as a whole.
    """
    cols = weight.size(2)
    diagonal = hessian.diagonal(dim1=1, dim2=2)
    order = diagonal.argsort(dim=1, descending=True).unsqueeze(1)
    upper = inverse_cholesky(hessian.take_along_dim(order.mT, 1).take_along_dim(order, 2))
    weight = weight.masked_fill((diagonal == 0).unsqueeze(1), 0)  # of inputs that are always 0
    rest = weight.take_along_dim(order, 2).mT.contiguous()  # [n, cols, rows]
    codes, scale = torch.empty_like(rest), scales.float().unsqueeze(1)
    code_costs = quantizer.code_costs(rest / scale, limit)
    errors = torch.zeros_like(rest[:, 0])
    for start in range(0, cols, GPTQ_BLOCK):
        stop = min(start + GPTQ_BLOCK, cols)
        residuals = torch.empty_like(rest[:, start:stop])
        for i in range(start, stop):
            one, before = slice(i, i + 1), slice(start, i)
            column = rest[:, one] - upper[:, before, one].mT @ residuals[:, : i - start]
            codes[:, one], values = quantizer.encode(column / scale, limit, code_costs)
            residual = (column - values * scale) / upper[:, one, one]
            residuals[:, i - start] = residual[:, 0]
        rest[:, stop:] -= upper[:, start:stop, stop:].mT @ residuals
        errors += residuals.square().sum(1)
    codes = codes.mT.take_along_dim(order.argsort(), 2)
    return Quantized(codes.to(torch.int8), errors)


# Maps weights [n, rows, cols], scales [n, rows], and Hessians [n, cols, cols] to codes and errors.
Solver = Callable[[Tensor, Tensor, Tensor], Quantized]


def to_scales(values: Tensor) -> Tensor:
    """Returns values as scales: float16 above 0. The records' floor of 1/31 spoils small rows."""
    return values.clamp(MIN_SCALE, MAX_SCALE).half()


def search_scales(solve: Solver, limit: int, weight: Tensor, hessian: Tensor) -> Tensor:
    """Returns scales [n, rows] of weights [n, rows, cols]: each row's clip ratio of least error."""
    n, rows = weight.shape[:2]
    peak = weight.abs().amax(-1)
    scales = torch.cat([to_scales(peak * ratio / limit) for ratio in CLIP_RATIOS], 1)
    # Rows do not depend on each other, so that one call can try all ratios.
    errors = solve(weight.repeat(1, len(CLIP_RATIOS), 1), scales, hessian).errors
    best = errors.view(n, -1, rows).argmin(1, keepdim=True)
    return scales.view(n, -1, rows).take_along_dim(best, 1).squeeze(1)


def std_scales(clip_sigmas: float, limit: int, weight: Tensor, _: Tensor) -> Tensor:
    """Returns scales [n, rows] of weights [n, rows, cols]: k standard deviations at the limit."""
    return to_scales(weight.std(-1) * clip_sigmas / limit)


def check_finite(weights: Mapping[str, Tensor]) -> None:
    """Raises DivergenceError that names a weight which is not finite float32."""
    for name, weight in weights.items():
        if weight.dtype != torch.float32 or not weight.isfinite().all():
            raise DivergenceError(f"{name} is not finite float32: the weights have diverged")


def artifact_layout(model: GPT) -> dict[str, Tensor]:
    """Returns the arrays of an artifact in order, as meta tensors, by name.

    First the codes of all quantized weights, then their row scales, then what is float16: the codec
    compresses arrays of one kind best together.
    """
    codes, scales, floats = {}, {}, {}
    roles = parameter_roles(model)
    for name, p in model.named_parameters():
        if not ROLES[roles[name]].bits:
            floats[name] = torch.empty_like(p, dtype=torch.float16, device="meta")
        else:
            codes[f"{name}.codes"] = torch.empty_like(p, dtype=torch.int8, device="meta")
            scales[f"{name}.scales"] = torch.empty(len(p), dtype=torch.float16, device="meta")
    return codes | scales | floats


class Stack(NamedTuple):
    """Weights of one shape and role that are quantized together."""

    names: list[str]
    role: Role
    limit: int  # the largest code
    solve: Solver
    weight: Tensor  # [n, rows, cols]
    hessian: Tensor  # [n, cols, cols]; for rounding [n, 0, cols]
    scales: Tensor  # float16 [n, rows]

    def with_rounding(self) -> "Stack":
        """Returns the stack with codes by rounding to nearest, for estimates."""
        return self._replace(solve=partial(quantize_rounding, QUANTIZERS["scalar"], self.limit))

    def quantize(self, weight: Tensor, scales: Tensor, hessian: Tensor) -> Tensor:
        """Returns the codes, int8, of some of the weights."""
        return self.solve(weight, scales, hessian).codes


def weight_stacks(model: GPT, hessians: Mapping[str, Tensor], ranks: Ranks) -> list[Stack]:
    """Returns all weights that are stored as codes; those with a Hessian are for GPTQ.

    SCALE_RULE chooses their scales; the search for clips is that of a scalar quantizer. Raises
    DivergenceError.
    """
    h, roles, weights = model.h, parameter_roles(model), dict(model.named_parameters())
    check_finite(weights)
    groups: dict[tuple[torch.Size, Role, bool], list[str]] = {}
    for name, p in weights.items():
        role = ROLES[roles[name]]
        if role.bits:
            groups.setdefault((p.shape, role, name in hessians), []).append(name)
    stacks = []
    for (_, role, has_hessian), names in groups.items():
        limit = 2 ** (getattr(h, role.bits) - 1) - 1
        weight = torch.stack([weights[name].detach() for name in names])
        quantize = quantize_gptq if has_hessian else quantize_rounding
        hessian = torch.stack([hessians.get(name, weight[0, :0]) for name in names])  # or empty
        find = partial(search_scales, partial(quantize, QUANTIZERS["scalar"], limit), limit)
        if h.scale_rule == "std":
            find = partial(std_scales, getattr(h, role.clip_sigmas), limit)
        scales = ranks.map_over_ranks(find, weight, hessian)
        if h.sensitivity_tokens:  # balance_scales makes some scales much smaller
            limit = 127
        solve = partial(quantize, QUANTIZERS[h.quantizer], limit)
        stacks.append(Stack(names, role, limit, solve, weight, hessian, scales))
    return stacks


def artifact_arrays(
    model: GPT, stacks: Sequence[Stack], factor: float, ranks: Ranks
) -> dict[str, Tensor]:
    """Returns the arrays of an artifact by name: codes, their scales, and the rest in float16.

    The scales of matrices are multiplied by the factor, with SENSITIVITY_TOKENS those of all codes.
    The ranks divide the weights of a stack.
    """
    arrays = {name: p.detach().half() for name, p in model.named_parameters()}
    for stack in stacks:
        scales = stack.scales
        if stack.role == ROLES["matrix"] or model.h.sensitivity_tokens:
            scales = to_scales(scales.float() * factor)
        codes = ranks.map_over_ranks(stack.quantize, stack.weight, scales, stack.hessian)
        for name, of_weight, of_rows in zip(stack.names, codes, scales):
            arrays |= {f"{name}.codes": of_weight, f"{name}.scales": of_rows}
    return {name: arrays[name] for name in artifact_layout(model)}


def dequantize(arrays: Mapping[str, Tensor], quantizer: Quantizer) -> dict[str, Tensor]:
    """Returns the float32 weights by parameter name."""
    weights = {}
    for name, array in arrays.items():
        parameter = name.removesuffix(".codes")
        if name.endswith(".codes"):
            scales = arrays[f"{parameter}.scales"].float()
            weights[parameter] = quantizer.decode(array) * scales[:, None]
        elif not name.endswith(".scales"):
            weights[name] = array.float()
    return weights


def divergence(logits: Tensor, others: Tensor) -> Tensor:
    """Returns the Kullback-Leibler divergence in nats, summed over all positions."""
    logits, others = logits.log_softmax(-1), others.log_softmax(-1)
    return F.kl_div(others, logits, reduction="sum", log_target=True)


@torch.inference_mode()
def balance_scales(model: GPT, stacks: Sequence[Stack], ids: Tensor, ranks: Ranks) -> list[Stack]:
    """Returns stacks whose scales are balanced: every matrix and table is equally sensitive.

    The sensitivity of a matrix is the divergence on ids [B, T] that rounding it alone causes,
    divided by its number of weights. It grows as the square of the scale. With equal sensitivities
    a bit less for each weight costs the same in every matrix. The geometric mean of the scales of
    matrices stays.
    """
    logits, sizes = model.forward_logits(ids), []
    found: list[Tensor] = []
    for stack in stacks:
        codes = stack.with_rounding().quantize(stack.weight, stack.scales, stack.hessian)
        rounded = codes * stack.scales.float().unsqueeze(-1)
        for name, weight, values in zip(stack.names, stack.weight, rounded):
            nats = torch.zeros(1, dtype=torch.float64, device=ids.device)
            if len(found) % ranks.world_size == ranks.rank:
                parameter = model.get_parameter(name)
                parameter.copy_(values)
                nats += divergence(logits, model.forward_logits(ids))
                parameter.copy_(weight)
            found.append(nats / values.numel())
            sizes.append(values.numel() if stack.role == ROLES["matrix"] else 0)
    sensitivity = ranks.all_reduce_(torch.cat(found))
    floor = sensitivity.mean() / 1000 + 1e-30  # else a scale could grow without bound
    logs = sensitivity.clamp(min=floor).log() / 2
    weights = torch.tensor(sizes, device=ids.device) / sum(sizes)
    factors = ((logs * weights).sum() - logs).exp().float()
    parts = factors.split([len(stack.names) for stack in stacks])
    balanced = []
    for stack, part in zip(stacks, parts):
        least = stack.weight.abs().amax(2) / stack.limit  # smaller scales would clip codes
        scales = torch.maximum(stack.scales.float() * part.unsqueeze(-1), least)
        balanced.append(stack._replace(scales=to_scales(scales)))
    return balanced


def tune_scales(
    model: GPT,
    arrays: Mapping[str, Tensor],
    quantizer: Quantizer,
    batches: Iterable[Tensor],
    steps: int,
    ranks: Ranks,
) -> dict[str, Tensor]:
    """Returns by array of an artifact how to change it: factors of scales, and new float16 arrays.

    Adam minimizes the divergence of the quantized model from `model` on batches of ids [B, T], each
    divided among the ranks. The codes do not change. Returns {} after less than half of the steps,
    when the rate is still high.
    """
    student = copy.deepcopy(model)
    student.load_state_dict(dequantize(arrays, quantizer))
    named: dict[str, Any] = dict(student.named_parameters())
    gradient = bind_flat_gradient_([*named.values()])
    matrices = {name: p.detach().clone() for name, p in named.items() if f"{name}.codes" in arrays}
    factors = {name: p.new_ones(len(p), 1) for name, p in matrices.items()}
    floats = {name: p for name, p in named.items() if name not in matrices}
    adam = torch.optim.Adam([*factors.values(), *floats.values()], betas=(0.9, 0.95))
    done = 0
    for ids in batches:
        adam.param_groups[0]["lr"] = TUNE_RATE * (1 - done / steps)
        own = ids[ranks.rank :: ranks.world_size].to(gradient.device)
        if len(own):
            with torch.no_grad():
                logits = model.forward_logits(own)
            (divergence(logits, student.forward_logits(own)) / ids.numel()).backward()
        ranks.all_reduce_(gradient)
        for name, factor in factors.items():
            factor.grad = (named[name].grad * matrices[name]).sum(1, keepdim=True)
        adam.step()
        gradient.zero_()
        with torch.no_grad():
            for name, factor in factors.items():
                named[name].copy_(matrices[name] * factor)
        done += 1
    if 2 * done < steps:
        return {}
    tuned = {f"{name}.scales": factor.squeeze(1) for name, factor in factors.items()}
    return tuned | {name: p.detach().half() for name, p in floats.items()}


def change_arrays(arrays: Mapping[str, Tensor], tuned: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Returns the arrays of an artifact with the changes that tune_scales has returned."""
    changed = dict(arrays)
    for name, values in tuned.items():
        is_scale = name.endswith(".scales")
        changed[name] = to_scales(arrays[name].float() * values) if is_scale else values
    return changed


@torch.inference_mode()
def collect_hessians(model: GPT, batches: Iterable[Tensor], ranks: Ranks) -> dict[str, Tensor]:
    """Returns X^T X, float32 [in, in], of all inputs X of each matrix, by the weight's name.

    With GPTQ_EMBED=1 the table of the output head counts as a matrix. Batches are ids [B, T], each
    divided among the ranks.
    """
    roles, sums = parameter_roles(model), {}
    device = model.tok_emb.weight.device

    def add(total: Tensor, _: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        x = inputs[0].flatten(0, -2).float()
        total.addmm_(x.mT, x)

    head = "tok_emb.weight" if model.lm_head is None else "lm_head.weight"
    if model.h.gptq_embed:
        sums[head] = torch.zeros(model.h.model_dim, model.h.model_dim, device=device)
    with ExitStack() as hooks:
        for weight in (name for name, role in roles.items() if role == "matrix"):
            reader, layer = weight.removesuffix(".weight").rsplit(".", 1)
            if layer not in CausalSelfAttention.INPUT_LAYERS:
                reader = f"{reader}.{layer}"
            matrix, module = model.get_parameter(weight), model.get_submodule(reader)
            sums[weight] = matrix.new_zeros(matrix.size(1), matrix.size(1))
            hooks.enter_context(module.register_forward_pre_hook(partial(add, sums[weight])))
        for ids in batches:
            own = ids[ranks.rank :: ranks.world_size]
            if len(own):
                states = model.states(own.to(device))
                if head in sums:
                    add(sums[head], model, (states,))
    return {name: ranks.all_reduce_(total) for name, total in sums.items()}


def random_sequences(count: int, seq_len: int, vocab_size: int, seed: int) -> Tensor:
    """Returns int64 [count, T] of uniform random tokens, no special ones (PR #1124)."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(FIRST_TEXT_ID, vocab_size, (count, seq_len), generator=generator)


# ---- Artifact: from codes to a file that fits, and back ----

# An artifact, in order: a header of 48 bytes (magic and version, 12; length of the description,
# uint32; SHA-256 of the whole file with this field zero), the description as JSON (codec,
# quantizer, and the model's settings, from which every shape follows), and the arrays of
# artifact_layout as the codec compresses them: all but `range` join them without padding.
HEADER, MAGIC = struct.Struct("<12sI32s"), b"PGOLFGPT\3\0\0\0"
MAX_DESCRIPTION = 1 << 16  # bytes
MAX_SCALE_FACTOR = 50  # beyond it nearly all codes are 0


Buffer = bytes | memoryview  # an artifact or a part of it, read or mapped


class Codec(NamedTuple):
    """A lossless compressor of a list of arrays: int8 codes and float16."""

    package: str
    compress: Callable[[Sequence[np.ndarray], Quantizer], bytes]
    # Into the arrays, or raises.
    decompress: Callable[[Buffer, Sequence[np.ndarray], Quantizer], None]


def stream_codec(
    package: str,
    compress: Callable[[bytes], bytes],
    decompress: Callable[[Buffer, int], bytes],
    transpose: bool = False,
) -> Codec:
    """Returns the codec that joins the arrays and compresses them as one stream of bytes.

    decompress(data, size) returns exactly that many bytes or raises. With `transpose` the codes are
    stored column by column.
    """

    def as_stored(array: np.ndarray) -> np.ndarray:
        return array.T if transpose and array.dtype == np.int8 else array

    def compress_arrays(arrays: Sequence[np.ndarray], _: Quantizer) -> bytes:
        return compress(b"".join(as_stored(array).tobytes() for array in arrays))

    def decompress_arrays(data: Buffer, arrays: Sequence[np.ndarray], _: Quantizer) -> None:
        raw, start = decompress(data, sum(array.nbytes for array in arrays)), 0
        for array in map(as_stored, arrays):
            part = np.frombuffer(raw, array.dtype, array.size, start)
            array[...] = part.reshape(array.shape)
            start += array.nbytes

    return Codec(package, compress_arrays, decompress_arrays)


def zstd_compress(data: bytes) -> bytes:
    """Returns data as one zstd frame of level 22."""
    import zstandard

    return zstandard.ZstdCompressor(level=22).compress(data)


def zstd_decompress(data: Buffer, size: int) -> bytes:
    """Returns the `size` bytes of a zstd frame."""
    import zstandard

    stated = zstandard.get_frame_parameters(data).content_size
    check(stated == size, f"the arrays have {stated} bytes, not {size}")
    return zstandard.ZstdDecompressor().decompress(data, allow_extra_data=False)


def lzma_filters(size: int, **options: int) -> list[dict[str, int]]:
    """Returns the LZMA2 filter for so many bytes; no file can ask for more memory than that."""
    dictionary = min(max(1 << (size - 1).bit_length(), 1 << 12), 1 << 26)
    preset = 9 | lzma.PRESET_EXTREME
    return [{"id": lzma.FILTER_LZMA2, "preset": preset, "dict_size": dictionary, **options}]


def lzma_compress(data: bytes, **options: int) -> bytes:
    """Returns data as raw LZMA2."""
    return lzma.compress(data, lzma.FORMAT_RAW, filters=lzma_filters(len(data), **options))


def lzma_decompress(data: Buffer, size: int) -> bytes:
    """Returns the `size` bytes of raw LZMA2."""
    decoder = lzma.LZMADecompressor(lzma.FORMAT_RAW, filters=lzma_filters(size))
    raw = decoder.decompress(data, max_length=size + 1)
    check(len(raw) == size and decoder.eof, f"the arrays do not have {size} bytes")
    check(not decoder.unused_data, "bytes follow the arrays")
    return raw


def brotli_compress(data: bytes) -> bytes:
    """Returns data as a brotli stream of quality 11."""
    import brotli

    return brotli.compress(data, quality=11, lgwin=22)


def brotli_decompress(data: Buffer, size: int) -> bytes:
    """Returns the `size` bytes of a brotli stream."""
    import brotli

    too_wide = data[0] & 1 and (data[0] >> 1 & 7) > 5  # RFC 7932, 9.1: a window of 17 + n bits
    check(not too_wide, "its window is larger than 4 MiB")
    decoder = brotli.Decompressor()
    raw = decoder.process(data, output_buffer_limit=size + 1)
    check(len(raw) == size and decoder.is_finished(), f"the arrays do not have {size} bytes")
    return raw


# The level of codes is k if 256 x their mean square is at most 2**(k / 2) and above that of k - 1.
LEVELS = np.array([math.isqrt(1 << k) for k in range(45)])
PRIOR_ROWS = 4  # the mean of all columns counts as this many rows of each
MAX_BLOCKS = 128  # about; the rows of a block are coded by the same levels and counts
COUNT_UNIT, COUNT_START = 64, 2048  # added for a code; shared out when a level first occurs
BY_COLUMN, BY_ROW, AS_REST = range(3)  # ways to code an array


class RangeCoder:
    """Encodes int8 codes by a range coder with adaptive frequencies; with `words` it decodes.

    A code's frequencies are the counts of all codes so far whose columns had the same level, and
    which were in an even, or an odd, state of their quantizer. The level of a column is that of its
    rows so far. Levels and counts are integers; the library takes a quotient and products of counts
    as IEEE doubles, so every machine derives the same.
    """

    def __init__(self, counts: np.ndarray, words: np.ndarray | None = None) -> None:
        from constriction import stream

        self.counts = counts  # int64 [2 x levels, 256], changed in place
        self.categorical = partial(stream.model.Categorical, perfect=False)
        self.encoder = stream.queue.RangeEncoder()
        self.decoder = None if words is None else stream.queue.RangeDecoder(words)

    def code(self, codes: np.ndarray, quantizer: Quantizer) -> None:
        """Encodes codes [rows, cols], or decodes into them."""
        rows, cols = codes.shape
        squares, row = np.zeros(cols, np.int64), 0
        next_state, side = quantizer.next_state, rows_side_by_side(rows)
        states = np.zeros((side, cols), np.int64)
        while row < rows:
            length = min(max(1, min(row, rows // MAX_BLOCKS)), side - row % side)
            block = codes[row : row + length]
            state = states[row % side :][: len(block)]
            mean = 256 * squares.sum() // max(row * cols, 1)
            means = (256 * squares + PRIOR_ROWS * mean) // (row + PRIOR_ROWS)
            contexts = np.searchsorted(LEVELS, means) + len(LEVELS) * (state % 2)
            for context in np.unique(contexts):
                chosen = contexts == context
                block[chosen] = self.code_block(block[chosen], self.counts[context])
            state[:] = next_state[state, block % 2]
            squares += np.square(block, dtype=np.int64).sum(0)
            row += len(block)

    def code_block(self, codes: np.ndarray, counts: np.ndarray) -> np.ndarray:
        """Returns codes, encoded or decoded by counts [256], and adds them to the counts."""
        if not counts.any():
            total = self.counts.sum(0)
            counts += 1 + COUNT_START * total // max(total.sum(), 1)
        model = self.categorical(counts.astype(np.float64))
        if self.decoder is None:
            symbols = codes + np.int32(128)
            self.encoder.encode(symbols, model)
        else:
            symbols = self.decoder.decode(model, codes.size)
        counts += COUNT_UNIT * np.bincount(symbols, minlength=256)
        return symbols - 128


# For what the range coder does not code: float16, and tables with rows that repeat.
REST = stream_codec("lzma", partial(lzma_compress, lc=0, lp=1, pb=1), lzma_decompress)


def code_way(coder: RangeCoder, array: np.ndarray, way: int, quantizer: Quantizer) -> None:
    """Encodes an array, or decodes into it, if it is coded BY_COLUMN or BY_ROW.

    By row the states are not known, because they follow from the codes above in the column.
    """
    if way == BY_COLUMN:
        coder.code(array, quantizer)
    elif way == BY_ROW:
        coder.code(array.T, QUANTIZERS["scalar"])


def choose_way(array: np.ndarray, counts: np.ndarray, quantizer: Quantizer) -> int:
    """Returns the way that takes the fewest bytes for an array after codes with these counts."""
    if array.dtype != np.int8:
        return AS_REST
    sizes = []
    for way in (BY_COLUMN, BY_ROW):
        coder = RangeCoder(counts.copy())
        code_way(coder, array, way, quantizer)
        sizes.append(coder.encoder.get_compressed().nbytes)
    sizes.append(len(REST.compress([array], quantizer)))
    return sizes.index(min(sizes))


def range_compress(arrays: Sequence[np.ndarray], quantizer: Quantizer) -> bytes:
    """Returns arrays, each coded in the way that suits it best.

    In order: the number of the range coder's words and the CRC-32 of the arrays, uint32; the way of
    each array, uint8; the words, uint32; the other arrays by the codec REST.
    """
    coder, ways = RangeCoder(np.zeros((2 * len(LEVELS), 256), np.int64)), []
    for array in arrays:
        ways.append(choose_way(array, coder.counts, quantizer))
        code_way(coder, array, ways[-1], quantizer)
    words = coder.encoder.get_compressed().astype("<u4")
    checksum = zlib.crc32(b"".join(array.tobytes() for array in arrays))
    rest = [array for array, way in zip(arrays, ways) if way == AS_REST]
    head = struct.pack("<II", len(words), checksum) + bytes(ways)
    return head + words.tobytes() + REST.compress(rest, quantizer)


def range_decompress(data: Buffer, arrays: Sequence[np.ndarray], quantizer: Quantizer) -> None:
    """Decodes into the arrays what range_compress has returned. Raises ValueError."""
    words, checksum = struct.unpack_from("<II", data)
    ways, start = bytes(data[8 : 8 + len(arrays)]), 8 + len(arrays)
    check(max(ways, default=0) <= AS_REST, "an array is coded in an unknown way")
    counts = np.zeros((2 * len(LEVELS), 256), np.int64)
    coder = RangeCoder(counts, np.frombuffer(data, "<u4", words, start).astype(np.uint32))
    for array, way in zip(arrays, ways):
        code_way(coder, array, way, quantizer)
    rest = [array for array, way in zip(arrays, ways) if way == AS_REST]
    REST.decompress(data[start + 4 * words :], rest, quantizer)
    found = zlib.crc32(b"".join(array.tobytes() for array in arrays))
    check(found == checksum, "its arrays are not those that were coded")


CODECS: dict[str, Codec] = {
    "zstd": stream_codec("zstandard", zstd_compress, zstd_decompress),
    "lzma": stream_codec("lzma", lzma_compress, lzma_decompress),
    "brotli": stream_codec("brotli", brotli_compress, brotli_decompress, transpose=True),
    "range": Codec("constriction", range_compress, range_decompress),
}


def load_codec(name: str) -> Codec:
    """Returns a codec that works here. Raises SettingsError for a package missing or too old."""
    codec, scalar = CODECS[name], QUANTIZERS["scalar"]
    array, copy = np.eye(30, 40, dtype=np.int8), np.ones((30, 40), np.int8)
    require(codec.package, f"COMPRESSOR={name}")
    try:
        codec.decompress(codec.compress([array], scalar), [copy], scalar)
        check(np.array_equal(array, copy), "a round trip fails")
    except Exception as error:
        raise SettingsError(
            f"COMPRESSOR={name}: {error!r:.200}; pip install --upgrade {codec.package}"
        ) from None
    return codec


def artifact_header(body: Buffer, description_size: int) -> bytes:
    """Returns the header of a body that begins with a description of so many bytes."""
    digest = hashlib.sha256(HEADER.pack(MAGIC, description_size, b""))
    digest.update(body)
    return HEADER.pack(MAGIC, description_size, digest.digest())


def pack_artifact(h: Hyperparameters, arrays: Mapping[str, Tensor]) -> bytes:
    """Returns the bytes of an artifact, the same for the same arrays."""
    described = {"codec": h.compressor, "quantizer": h.quantizer, "settings": model_settings(h)}
    description = json.dumps(described, separators=(",", ":")).encode()
    plain = [array.cpu().numpy() for array in arrays.values()]
    body = description + CODECS[h.compressor].compress(plain, QUANTIZERS[h.quantizer])
    return artifact_header(body, len(description)) + body


def unpack_artifact(blob: Buffer, h: Hyperparameters) -> tuple[Hyperparameters, dict[str, Tensor]]:
    """Returns settings and arrays of an artifact.

    Raises ValueError, KeyError, TypeError or the codec's own error for a damaged file. Sizes are
    compared with what the settings need, and the checksum with the content, before anything is
    decompressed.
    """
    magic, description_size, _ = HEADER.unpack_from(blob)
    remedy = "score it by the train_gpt.py of its own run"
    check(magic == MAGIC, f"it begins with {magic!r}, not {MAGIC!r}; {remedy}")
    check(description_size <= MAX_DESCRIPTION, f"its description has {description_size} bytes")
    body = blob[HEADER.size :]
    payload = body[description_size:]
    description = json.loads(bytes(body[:description_size]))
    for kind, known in (("codec", CODECS), ("quantizer", QUANTIZERS)):
        check(description[kind] in known, f"its {kind} is unknown: {description[kind]!r:.40}")
    odd = sorted(model_settings(h).keys() ^ description["settings"].keys())
    check(not odd, f"its settings are missing or unknown: {odd}; {remedy}")
    h = replace(h, **description["settings"], quantizer=description["quantizer"])
    with torch.device("meta"):
        layout = artifact_layout(GPT(h))
    size, stored = sum(array.nbytes for array in layout.values()), len(payload)
    # No codec does better or worse than this; it bounds the memory before anything is decompressed.
    check(size / 1000 < stored < 1.01 * size + 1000, f"{stored} bytes for arrays of {size} bytes")
    header = artifact_header(body, description_size)
    check(blob[: HEADER.size] == header, "its checksum is wrong")
    codec = load_codec(description["codec"])
    arrays = {name: torch.empty_like(like, device="cpu") for name, like in layout.items()}
    quantizer = QUANTIZERS[h.quantizer]
    codec.decompress(payload, [array.numpy() for array in arrays.values()], quantizer)
    return h, arrays


def load_artifact(path: Path, h: Hyperparameters) -> tuple[Hyperparameters, dict[str, Tensor]]:
    """Returns settings and float32 weights of an artifact. Raises DataError."""
    with raise_data_error(f"{path}: cannot be read as an artifact"):
        h, arrays = unpack_artifact(np.memmap(path, mode="r").data, h)
        weights = dequantize(arrays, QUANTIZERS[h.quantizer])
        check_finite(weights)
        return h, weights


class SavedModel(NamedTuple):
    """A checkpoint, or weights without the state of a training."""

    h: Hyperparameters  # model settings as stored, all others as given
    weights: dict[str, Tensor]  # of a checkpoint, its average
    tensors: dict[str, Tensor]  # all
    settings: dict[str, Any]  # those that the file states, and shards, their fingerprint
    step: int  # steps trained; 0 if the file does not say


def load_checkpoint(path: Path, h: Hyperparameters) -> SavedModel:
    """Returns a checkpoint or saved weights. Raises DataError."""
    with raise_data_error(f"{path}: cannot be read as a checkpoint"):
        tensors, stored = read_tensors(path)
        stored.pop("gptq_reserve_seconds", None)  # a setting until 2026-11-26
        unknown = sorted(stored.keys() - asdict(h).keys() - {"step", "shards"})
        if unknown and "progress/losses" not in tensors:  # metadata of another program
            stored, unknown = {}, []
        check(not unknown, f"it states unknown {unknown}; use the program of its run's folder")
        step = int(stored.pop("step", len(tensors.get("progress/losses", ()))))
        if "progress/losses" in tensors:  # settings that it does not state are newer than it
            stored = asdict(Hyperparameters()) | {"train_order": "sequential"} | stored
        elif stored:
            stored = model_settings(Hyperparameters()) | stored
        h = replace(h, **{name: stored[name] for name in model_settings(h) if name in stored})
        averages = {name: x for name, x in tensors.items() if name.startswith("average/")}
        share = stored.get("average_share", 1.0)
        if share < 1:  # as at the end of a run
            last = {name: tensors[name.replace("average/", "model/")] for name in averages}
            averages = {name: last[name].lerp(x, share) for name, x in averages.items()}
        wrappers = r"^(average/)?((module|_orig_mod)\.)*"  # of DistributedDataParallel and compile
        weights = {
            re.sub(wrappers, "", name): tensor.float() if tensor.is_floating_point() else tensor
            for name, tensor in (averages or tensors).items()
        }
        with torch.device("meta"):
            model = GPT(h)
        model.load_state_dict(weights, assign=True)  # names and shapes must fit
        weights = model.state_dict()  # a scalar may be stored as [1]
        check_finite(weights)
        return SavedModel(h, weights, tensors, stored, step)


def code_entropy(codes: Tensor) -> float:
    """Returns the order-0 entropy of int8 codes in bytes."""
    counts = (codes.flatten().int() + 128).bincount(minlength=256)
    nats = torch.special.xlogy(counts, codes.numel() / counts).sum().item()
    return nats / math.log(256)


def smallest_factor(size: Callable[[float], float], room: float) -> float:
    """Returns the smallest factor with size(factor) <= room, from 1 to MAX_SCALE_FACTOR."""
    factors = np.geomspace(1, MAX_SCALE_FACTOR, 1 << 16)
    fits = bisect.bisect_left(factors[:-1], True, key=lambda factor: size(factor) <= room)
    return float(factors[fits])


def pack_to_fit(
    model: GPT,
    stacks: Sequence[Stack],
    room: int,
    ranks: Ranks,
    log: Log,
    tune: Callable[[Mapping[str, Tensor]], dict[str, Tensor]] | None = None,
) -> bytes:
    """Returns an artifact of at most `room` bytes, unless a scale factor of 50 does not suffice.

    If it would be too large the scales of all matrices are multiplied by one factor, found by
    bisection on the order-0 entropy of rounded codes. What the codec adds to the entropy is known
    from the packing before, so that two suffice. `tune` sees the arrays of the first packing alone.
    """
    h = model.h
    rounding = [stack.with_rounding() for stack in stacks]
    matrices = [name for name, role in parameter_roles(model).items() if role == "matrix"]

    def size(factor: float) -> float:  # codes by their entropy
        arrays = artifact_arrays(model, rounding, factor, Ranks()).values()
        return sum(code_entropy(x) if x.dtype == torch.int8 else x.nbytes for x in arrays)

    added, packing, tuned = 0.0, 0, {}
    while True:
        packing += 1
        margin = 0.0005 * max(packing - 1, 1) ** 2  # it grows, so that this ends
        target = (1 - margin) * room - added
        factor = ranks.broadcast_from_rank0(partial(smallest_factor, size, target))
        arrays = artifact_arrays(model, stacks, factor, ranks)
        if tune and packing == 1:
            tuned = tune(arrays)
        arrays = change_arrays(arrays, tuned)
        blob = ranks.broadcast_from_rank0(partial(pack_artifact, h, arrays))
        codes = torch.cat([arrays[f"{name}.codes"].flatten() for name in matrices])
        entropy = code_entropy(codes)
        k = f", k {h.matrix_clip_sigmas * factor:.3f}" if h.scale_rule == "std" else ""
        log(
            f"size: {len(blob)} bytes packed, order-0 entropy of the matrices' codes {entropy:.0f} "
            f"bytes, {8 * entropy / len(codes):.3f} bits a code, scale factor {factor:.4f}{k}"
        )
        is_close = factor == 1 or len(blob) >= 0.999 * room or packing > 1
        if (len(blob) <= room and is_close) or factor > 0.99 * MAX_SCALE_FACTOR:
            return blob
        added = len(blob) - size(factor)


# The program ships as its packed twin: the whole source as raw LZMA2 in base85, inside a wrapper
# that decodes and executes it under the twin's own name. linecache gets the source, so that
# tracebacks show its lines, and read_program finds it in `text`. The wrapper is the text below with
# the literal in the place of %s.
TWIN_DICTIONARY = 1 << 20  # bytes; LZMA2's window, which must hold the source
TWIN_TEMPLATE = """\
# train_gpt.py, packed (version 1): base85 of raw LZMA2. train_gpt_readable.py is the same source.
import base64, linecache, lzma
text = base64.b85decode("%s")
text = lzma.decompress(text, lzma.FORMAT_RAW, None, [dict(id=33, dict_size=1 << 20)]).decode()
linecache.cache[__file__] = len(text), None, text.splitlines(True), __file__
exec(compile(text, __file__, "exec"))
"""


def packed_source(source: bytes) -> bytes:
    """Returns the packed twin of a program's source; line ends become LF first."""
    source = source.replace(b"\r\n", b"\n")
    check(len(source) <= TWIN_DICTIONARY, f"the source has more than {TWIN_DICTIONARY} bytes")
    packed = lzma_compress(source, dict_size=TWIN_DICTIONARY, pb=0, lc=4)
    return (TWIN_TEMPLATE % base64.b85encode(packed).decode()).encode()


# ---- Run: the commands, and what happens when something fails ----

ARTIFACT, RESULT, LOG = "final_model.int6.ptz", "result.json", "train.log"
PROGRAM, READABLE = "train_gpt.py", "train_gpt_readable.py"  # the packed twin and its source


def read_program() -> tuple[bytes, bytes]:
    """Returns the source of this program, and its packed twin, which ships and counts.

    Raises SettingsError without a file.
    """
    try:
        file = Path(__file__).read_bytes().replace(b"\r\n", b"\n")
    except (NameError, OSError) as error:
        raise SettingsError(
            f"{error}: run this program from a file, because its bytes count"
        ) from None
    if file.startswith(TWIN_TEMPLATE.partition("%s")[0].encode()):
        return globals()["text"].encode(), file  # the twin's wrapper has decoded it
    return file, packed_source(file)


def file_in(path: Path, name: str) -> Path:
    """Returns the file of that name if the path is a folder, such as a run's; else the path."""
    return path / name if path.is_dir() else path


class Run:
    """One run of the program: what it works with, the commands, and the stages of a command."""

    def __init__(self, env: Mapping[str, str], log: Log, result: dict[str, Any]) -> None:
        self.log, self.result = log, result
        self.slowest: dict[str, float] = {}  # seconds of a batch after the last step, by purpose
        self.stack_seconds = 0.0  # of prepare_stacks
        # Until training ends, tokens are random and have no deadline.
        self.trained_steps: int | None = None
        self.deadline = math.inf
        self.read_until = 0.0  # when training text was read last
        h = Hyperparameters.from_env(env)
        self.notes = settings_notes(h, env)
        lost = {"status": "failed", "reason": "another rank is gone, or silent"}
        self.ranks = join_ranks(env, lambda: os._exit(conclude(log, result | lost)))
        self.h = self.ranks.broadcast_from_rank0(lambda: h)  # whatever other nodes were told

    def evaluate(self, path: Path) -> None:
        """Scores an artifact again; the model's settings are its own."""
        path = file_in(path, ARTIFACT)
        self.h = self.ranks.broadcast_from_rank0(lambda: load_artifact(path, self.h)[0])
        self.prepare(trains=False, writes=False)
        self.score_artifact(path)

    def quantize(self, path: Path) -> None:
        """Packs and scores saved weights again, in a folder of its own."""
        path = file_in(path, FINAL_MODEL)
        saved = self.ranks.broadcast_from_rank0(lambda: load_checkpoint(path, self.h))
        self.h = replace(saved.h, resume="")  # its own folder is never continued
        self.open_folder()
        self.prepare(trains=self.h.quantizes_on_text)
        if self.h.quantizes_on_text:  # on the text after the last step
            self.check_training(str(path), saved, READING)
        self.write_program()
        self.quantize_and_score(self.load_model(saved.weights), 0.0, saved.step)

    def train(self, only_checks: bool = False) -> None:
        """Trains a model, averages, calibrates, quantizes and packs it, and scores the artifact.

        With `only_checks` it returns where training would begin, and writes nothing.
        """
        h, log = self.h, self.log
        check_settings(h, self.ranks.world_size)
        folder = self.open_folder(creates=not only_checks)
        self.prepare()
        resume_from = self.read_resume(folder)
        model = self.initial_model()
        deadline = h.training_seconds - self.reserve_seconds(model)
        if only_checks:
            log(f"check:ok code:{len(self.twin)} bytes folder:{folder}")
            return
        self.write_program()
        trainer = Trainer(model, self.data, self.ranks, self.device, log, deadline)
        try:
            trainer.train(resume_from)
        finally:
            self.result |= {"steps": trainer.step, "train_losses": trainer.step_log.losses}
        kind = trainer.average.copy_to_model(log)
        step_ms = np.multiply(trainer.step_log.seconds, 1000)
        percentiles = (50, 99) if trainer.step else ()
        self.result |= {
            "step_ms": {f"p{n}": float(np.percentile(step_ms, n)) for n in percentiles},
            "peak_memory_mib": torch.cuda.max_memory_allocated() >> 20,  # 0 on a CPU
            "weights": kind,
        }
        self.quantize_and_score(model, trainer.step_log.elapsed, trainer.step)

    def open_folder(self, creates: bool = True) -> Path:
        """Returns the run's folder, the same on all ranks.

        If it `creates` the folder, the log and the result go there from here on. Raises
        SettingsError if the folder has another run or cannot be written, or if its disk has no room
        for the run's files, with two checkpoints. A run has begun once its folder holds the
        program; RESUME=auto continues it.
        """
        h, log = self.h, self.log

        def choose() -> Path:
            run_id = h.run_id or f"{time.strftime('%Y%m%d-%H%M%S')}-s{h.seed}-{os.getpid()}"
            folder = Path(h.run_dir or f"logs/{run_id}")
            existing = next(p for p in (folder, *folder.absolute().parents) if p.exists())
            has_begun = (folder / PROGRAM).exists() or not (folder / RESULT).exists()
            with torch.device("meta"):
                needed = BYTES_LIMIT + 40 * sum(p.numel() for p in GPT(h).parameters())
            names = (ARTIFACT, CHECKPOINT, FINAL_MODEL, LOG, PROGRAM, READABLE, RESULT)
            blocked = [name for name in names if (folder / name).is_dir()]
            free, fault = shutil.disk_usage(existing).free, ""
            if not (existing.is_dir() and os.access(existing, os.W_OK)):
                fault = f"{existing} is not a folder that can be written"
            elif (folder / LOG).exists() and has_begun and h.resume != "auto":
                fault = "another run is there"
            elif blocked:
                fault = f"{blocked[0]} is a folder there"
            elif free < needed:
                fault = f"its disk has {free} bytes free, {needed} are needed"
            if fault:
                raise SettingsError(f"RUN_DIR={folder}: {fault}; choose another RUN_ID or RUN_DIR")
            if creates:
                folder.mkdir(parents=True, exist_ok=True)
                mode = "a" if (folder / LOG).exists() else "x"  # of two runs, one creates it
                (folder / LOG).open(mode).close()
                if not (folder / PROGRAM).exists():  # a result of a run that never began
                    (folder / RESULT).unlink(missing_ok=True)
            return folder

        folder = self.ranks.broadcast_from_rank0(choose)
        if creates:
            log.folder = folder
            log(f"{folder}/{LOG}")
            self.result["settings"] = asdict(h)
        return folder

    def prepare(self, trains: bool = True, writes: bool = True) -> None:
        """Loads and checks what a command needs, with training text or not; logs the choices."""
        h, ranks, log = self.h, self.ranks, self.log
        if writes:  # what is missing must not be found out after training
            load_codec(h.compressor)
            require("safetensors", "a checkpoint")
        self.source, self.twin = read_program()
        self.data = load_data(h, ranks, log, trains)
        device, device_notes = start_device(h.compile)
        # An artifact may state any TRAIN_SEQ_LEN; scoring uses its window.
        scored = replace(h, train_seq_len=max(h.window_tokens, 2), jepa_chunk_size=0)
        probed = h if writes else scored
        self.device, attention_notes = choose_attention(probed, device, ranks)
        for note in (*self.notes, *device_notes, *attention_notes):
            log(note)
        for values in (self.device.describe(), asdict(h)):
            log(" ".join(f"{name}:{value}" for name, value in values.items()))
        log(f"changed_settings: {env_form(changed_settings(h))}")

    def write_program(self) -> None:
        """Begins the run: writes both forms of the program, removes an earlier result."""
        if self.log.folder and not self.log.silent:
            (self.log.folder / RESULT).unlink(missing_ok=True)
            write_atomically(self.log.folder / READABLE, self.source)
            write_atomically(self.log.folder / PROGRAM, self.twin)

    def initial_model(self) -> GPT:
        """Returns the model with rank 0's initial weights: other CPUs may draw other numbers."""
        torch.manual_seed(self.h.seed)
        model = GPT(self.h, attend_on(self.device), self.device.dtype)
        model.load_state_dict(self.ranks.broadcast_from_rank0(model.state_dict))
        parameters = sum(p.numel() for p in model.parameters())
        self.log(f"model_params:{parameters}")
        self.result["parameters"] = parameters
        return model.to(self.device.device)

    def load_model(self, weights: Mapping[str, Tensor]) -> GPT:
        """Returns a model with the given weights, for scoring."""
        with torch.device("meta"):
            model = GPT(self.h, attend_on(self.device), self.device.dtype)
        model.to_empty(device=self.device.device).load_state_dict(weights)
        return model.eval()

    def read_resume(self, folder: Path) -> dict[str, Tensor] | None:
        """Returns the tensors of the checkpoint that RESUME names; None to start at step 0.

        Only rank 0 reads: other nodes may not have the file.
        """
        h = self.h
        path = file_in(folder if h.resume == "auto" else Path(h.resume), CHECKPOINT)

        def read() -> SavedModel | None:
            is_new = not h.resume or (h.resume == "auto" and not path.exists())
            return None if is_new else load_checkpoint(path, h)

        saved = self.ranks.broadcast_from_rank0(read)
        if saved is None:
            return None
        if "progress/losses" not in saved.tensors:
            raise DataError(f"RESUME={path}: it has weights only; name a {CHECKPOINT}")
        if saved.step > h.iterations:
            raise DataError(f"RESUME={path}: it has {saved.step} steps; raise ITERATIONS to more")
        fixed = saved.settings.keys() - FREE_ON_RESUME
        changed = self.check_training(f"RESUME={path}", saved, fixed)
        self.result["resumed"] = {"step": saved.step, "changed": changed}
        return saved.tensors

    def check_training(
        self, what: str, saved: SavedModel, names: Collection[str]
    ) -> dict[str, Any]:
        """Returns what the saved model was trained with, where that differs from this run.

        Raises DataError if one of `names` differs: settings, or shards, their fingerprint.
        """
        assert self.data.train is not None
        own = asdict(self.h) | {"shards": self.data.train.stream.fingerprint()}
        changed = {name: value for name, value in saved.settings.items() if value != own[name]}
        fixed = {name: value for name, value in changed.items() if name in names}
        if fixed:
            raise DataError(
                f"{what}: it was trained with {env_form(fixed)}; set the same (SHARDS by DATA_PATH)"
            )
        return changed

    def quantize_and_score(self, model: GPT, train_seconds: float, step: int) -> None:
        """Calibrates, quantizes and packs a model after `step` steps; scores the artifact."""
        h, log, val = self.h, self.log, self.data.val
        path, ends = (log.folder or Path()) / ARTIFACT, [self.device.now()]
        code = len(self.twin)
        model.eval()
        self.trained_steps, self.read_until = step, ends[0]
        self.deadline = ends[0] + h.training_seconds - train_seconds
        hessians = self.calibrate(model)
        ends.append(self.device.now())
        stacks = self.prepare_stacks(model, hessians)
        tune = partial(self.tune, model) if h.tune_scales else None
        blob = pack_to_fit(model, stacks, BYTES_LIMIT - code, self.ranks, log, tune)
        if not log.silent:
            write_atomically(path, blob)
        ends.append(self.device.now())
        log(f"Code size: {code} bytes")
        log(f"Serialized model int6+{h.compressor}: {len(blob)} bytes")
        log(f"Total submission size int6+{h.compressor}: {code + len(blob)} bytes")
        forward_logits = self.device.compile(model.forward_logits)
        plain = ScoringPass(forward_logits, h.window_tokens, h.window_tokens)
        self.score("float", "DIAGNOSTIC post_ema", plain)
        ends.append(self.device.now())
        self.score_artifact(path)
        ends.append(self.device.now())
        # Training lasts until its text is read last.
        seconds = {"train": train_seconds + (self.read_until - ends[0])}
        seconds |= zip(("calibrate", "pack", "diagnose", "eval"), np.diff(ends).tolist())
        log("seconds: " + " ".join(f"{name}:{value:.1f}" for name, value in seconds.items()))
        verdicts = self.check_limits(seconds, code + len(blob))
        self.result |= {
            "status": "over a limit" if "FAIL" in verdicts.values() else "ok",
            "verdicts": verdicts,
            "bytes": {"code": code, "model": len(blob), "total": code + len(blob)},
            "seconds": seconds,
            "machine": self.device.describe(),
            "code_sha256": hashlib.sha256(self.source).hexdigest(),
            "canonical_val": val.canonical,
            "val_sha256": hashlib.sha256(val.tokens.numpy().tobytes()).hexdigest(),
            "train_tokens": len(self.data.train.stream) if self.data.train else 0,
        }

    @property
    def calibration_shape(self) -> tuple[int, int]:
        """How many sequences calibrate, and how many tokens each has."""
        h = self.h
        length = min(h.train_seq_len, h.gptq_calib_tokens)  # a file may state any TRAIN_SEQ_LEN
        return h.gptq_calib_tokens // length, length

    def calibration_batches(self, count: int) -> Sequence[Tensor]:
        """Returns `count` sequences for calibration, in batches of ids [B, T].

        GPTQ_CALIB=train takes the text of the step after the last. Before training has ended, and
        with GPTQ_CALIB=random, they are random.
        """
        h, train, length = self.h, self.data.train, self.calibration_shape[1]
        rows = max(h.micro_batch_tokens // length, 1)
        if not h.calibrates_on_text or train is None or self.trained_steps is None:
            return random_sequences(count, length, h.vocab_size, h.seed).split(rows)
        return train.sequences(self.trained_steps * train.rows, count)[:, :length].split(rows)

    def batches_before(
        self, deadline: float | None, what: str, batches: Iterable[Tensor], count: int
    ) -> Iterator[Tensor]:
        """Yields the batches of training text for which there is time before the deadline.

        A batch may take as long as the slowest so far; the ranks agree. The deadline of batches
        that are not training text is None, and all of them are yielded.
        """
        now = self.device.now
        source = iter(batches)
        for n in range(count):
            began, slowest = now(), self.slowest.get(what, 0.0)
            if deadline is not None:
                (late,) = self.ranks.all_reduce_max(began + slowest - deadline)
                if late > 0:
                    self.log(f"gptq: the time allowed {n} of {count} {what} batches")
                    return
            yield next(source)
            ended = now()
            self.slowest[what] = max(slowest, ended - began)
            if deadline is not None:
                self.read_until = ended

    def reserve_seconds(self, model: GPT) -> float:
        """Returns the training seconds to keep for what reads training text after the last step.

        They are measured on random tokens: a batch of calibration, balancing, GPTQ if tuning
        follows it, and two steps of tuning.
        """
        h, now, ranks = self.h, self.device.now, self.ranks
        if not (h.quantizes_on_text and h.max_wallclock_seconds):
            return 0.0
        count, hessians, kept = self.calibration_shape[0], {}, 0.0
        if h.gptq_enabled:
            batches = self.calibration_batches(count)
            collect_hessians(model, batches[:1], ranks)  # the first batch takes longer than others
            trial = self.batches_before(None, "calibration", batches[:1], 1)
            hessians = collect_hessians(model, trial, ranks)
            kept += self.slowest["calibration"] * count / len(batches[0])
        if h.sensitivity_tokens or h.tune_scales:
            start = now()
            stacks = self.prepare_stacks(model, hessians)
            self.stack_seconds = now() - start
            kept += self.stack_seconds
        if h.tune_scales:
            start = now()
            arrays, quantizer = artifact_arrays(model, stacks, 1.0, ranks), QUANTIZERS[h.quantizer]
            kept += now() - start
            rows = self.tune_rows
            ids = random_sequences(2 * rows, h.train_seq_len, h.vocab_size, h.seed).split(rows)
            tune_scales(
                model, arrays, quantizer, ids, 2, ranks
            )  # untimed: the first steps take longer
            trial = self.batches_before(None, "tuning", ids, 2)
            tune_scales(model, arrays, quantizer, trial, 2, ranks)
            kept += self.slowest["tuning"] * h.tune_scales
        if self.device.is_cuda:  # the trial is not part of the training's peak
            torch.cuda.reset_peak_memory_stats()
        (reserve,) = ranks.all_reduce_max(1.5 * kept)
        self.log(f"gptq: {reserve:.1f} s are kept to quantize on training text")
        if reserve >= h.max_wallclock_seconds:
            raise SettingsError(
                f"MAX_WALLCLOCK_SECONDS={h.max_wallclock_seconds:g}: quantizing on training text "
                f"takes about {reserve:.1f} s of it; raise it or lower GPTQ_CALIB_TOKENS or "
                "TUNE_SCALES"
            )
        return reserve

    def calibrate(self, model: GPT) -> dict[str, Tensor]:
        """Returns the Hessians for GPTQ by name; a matrix without one is rounded.

        Reading ends early enough for prepare_stacks to end before the deadline.
        """
        if not self.h.gptq_enabled:
            return {}
        batches = self.calibration_batches(self.calibration_shape[0])
        until = self.deadline - self.stack_seconds if self.h.calibrates_on_text else None
        in_time = self.batches_before(until, "calibration", batches, len(batches))
        hessians = collect_hessians(model, in_time, self.ranks)
        if not any(x.any() for x in hessians.values()):
            return {}  # no batch was read
        usable = {name: x for name, x in hessians.items() if 0 < x.trace() < math.inf}
        for name in sorted(hessians.keys() - usable.keys()):
            self.log(f"gptq: {name} is rounded: no finite inputs calibrate it")
        return usable

    def prepare_stacks(self, model: GPT, hessians: Mapping[str, Tensor]) -> list[Stack]:
        """Returns what is to be quantized, with its scales: balanced, if the time allows it."""
        stacks, h = weight_stacks(model, hessians, self.ranks), self.h
        if not h.sensitivity_tokens:
            return stacks
        count = max(h.sensitivity_tokens // self.calibration_shape[1], 1)
        until = self.deadline if h.calibrates_on_text else None
        # Read when the loop asks for it, which is not after the deadline.
        batches = (torch.cat([*self.calibration_batches(count)]) for _ in range(1))
        for ids in self.batches_before(until, "sensitivity", batches, 1):
            stacks = balance_scales(model, stacks, self.device.send(ids), self.ranks)
        return stacks

    @property
    def tune_rows(self) -> int:
        """Sequences of a step of tuning, over all ranks."""
        return max(min(self.h.micro_batch_tokens, TUNE_TOKENS) // self.h.train_seq_len, 1)

    def tune(self, model: GPT, arrays: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Returns what tune_scales finds on the text after that of calibration."""
        h, train = self.h, self.data.train
        assert train is not None and self.trained_steps is not None
        start, rows, steps = self.trained_steps * train.rows, self.tune_rows, h.tune_scales
        if h.calibrates_on_text:
            start += self.calibration_shape[0]
        batches = (train.sequences(start + n * rows, rows)[:, :-1] for n in range(steps))
        in_time = self.batches_before(self.deadline, "tuning", batches, steps)
        return tune_scales(model, arrays, QUANTIZERS[h.quantizer], in_time, steps, self.ranks)

    def score(self, kind: str, name: str, scoring_pass: ScoringPass) -> Score:
        """Returns the score of a pass over the validation text; logs it and adds it to the result.

        `kind` is its name in the result, `name` that in the log.
        """
        tokens = scoring_batch_tokens(self.h, self.device)
        found = score(scoring_pass, self.data.val, self.ranks, self.device, self.log, tokens)
        log_score(self.log, name, found)
        self.result.setdefault("scores", {})[kind] = found._asdict()
        return found

    def score_artifact(self, path: Path) -> None:
        """Reads an artifact back from disk, and scores it by each pass that the settings name."""
        h, device, log = self.h, self.device, self.log
        window, stride = h.window_tokens, h.stride_tokens
        _, weights = self.ranks.broadcast_from_rank0(lambda: load_artifact(path, h))
        model = self.load_model(weights)
        forward_logits = device.compile(model.forward_logits)

        plain = ScoringPass(forward_logits, window, window)
        last = self.score("plain", "final_int6_roundtrip", plain)
        if stride < window:
            seconds = last.seconds * window / stride  # less, if that compiled
            log_expected_time(log, f"sliding_window stride:{stride}", seconds)
            sliding = ScoringPass(forward_logits, window, stride)
            last = self.score("sliding", "final_int6_sliding_window", sliding)
        if h.eval_window:
            last = self.score("window", "final_int6_window", one_pass(model, h.eval_window, device))
        if h.eval_documents:
            last = self.score("documents", "final_int6_documents", by_document(model, h, device))
        if h.ttt_enabled and h.ttt_mode == "lora":
            adapted = with_adapters(model, h, device, self.ranks, log)
            last = self.score("ttt", "legal_ttt", adapted)
        elif h.ttt_enabled:
            learner = TestTimeLearner(model, h, device, self.ranks)
            learning = ScoringPass(forward_logits, window, stride, learner)
            last = self.score("ttt", "legal_ttt", learning)
        log_score(log, "final_int8_zlib_roundtrip", last)  # where the community's tools look

    def check_limits(self, seconds: Mapping[str, float], total_bytes: int) -> dict[str, str]:
        """Returns and logs PASS or FAIL for the seconds of training and scoring, and the bytes."""
        limits = {
            "eval_seconds": (seconds["eval"], EVAL_SECONDS_LIMIT),
            "total_bytes": (total_bytes, BYTES_LIMIT),
        }
        if seconds["train"]:
            limits["train_seconds"] = (seconds["train"], self.h.training_seconds)
        verdicts = {}
        for name, (value, limit) in limits.items():
            verdicts[name] = "PASS" if value <= limit else "FAIL"
            self.log(f"limit:{name} {round(value, 1):,} of {limit:,} {verdicts[name]}")
        return verdicts


def log_score(log: Log, name: str, result: Score) -> None:
    """Logs a score in the challenge's two forms."""
    at = f"stride:{result.stride} eval_time:{1000 * result.seconds:.0f}ms"
    log(f"{name} val_loss:{result.val_loss:.4f} val_bpb:{result.val_bpb:.4f} {at}")
    log(f"{name}_exact val_loss:{result.val_loss:.8f} val_bpb:{result.val_bpb:.8f}")
    log.event("score", name=name, **result._asdict())


EXIT_STATUS = {"ok": 0, "over a limit": 1, "settings": 2, "data": 2, "oom": 3, "nan": 4}
EXIT_STATUS |= {"interrupted": 5, "failed": 6}


def describe_failure(error: BaseException) -> dict[str, str]:
    """Returns the status and the reason of an exception; a traceback only for our own bugs."""
    status, reason = getattr(error, "status", "failed"), str(error)
    if is_out_of_memory(error):
        status, peak = "oom", torch.cuda.max_memory_allocated() >> 20
        reason += f"; peak {peak} MiB; lower MICRO_BATCH_TOKENS, TTT_BATCH_SIZE, "
        reason += "EVAL_SEQ_LEN or EVAL_WINDOW"
    elif isinstance(error, KeyboardInterrupt):
        status = "interrupted"
        reason = "stopped by a signal, or by another rank; continue with RESUME=auto or --quantize"
    elif isinstance(error, OSError) and error.filename:
        status, reason = "data", f"{error.filename}: {error.strerror}; free, rename or remove it"
    elif status == "failed":
        reason = traceback.format_exc()
    if dist.is_initialized():
        reason = f"rank {dist.get_rank()}: {reason}"
    return {"status": status, "reason": reason}


def conclude(log: Log, result: dict[str, Any]) -> int:
    """Writes result.json, logs the reason of a failure; returns the exit status.

    Of several ranks that fail, the first one writes the result and logs its reason.
    """
    failed = "reason" in result
    path = log.folder / RESULT if log.folder else None
    if path and not (path.exists() if failed else log.silent):
        try:
            write_atomically(path, json.dumps(result, indent=2).encode())
            log.silent = log.silent and not failed
        except OSError as error:
            if not failed:
                result |= {"status": "failed", "reason": f"{path}: {error}"}
    if "reason" in result:
        log(f"error: {result['reason']}")
    return EXIT_STATUS[result["status"]]


def main(argv: Sequence[str], env: Mapping[str, str]) -> int:
    """Runs the program; returns its exit status."""
    args = parse_arguments(argv)
    log = Log(silent=env.get("RANK", "0") != "0")
    result: dict[str, Any] = {"status": "ok"}
    try:
        run = Run(env, log, result)
        if args.eval:
            run.evaluate(args.eval)
        elif args.quantize:
            run.quantize(args.quantize)
        else:
            run.train(only_checks=args.check)
        result["status"] = run.ranks.broadcast_from_rank0(lambda: result["status"])
    except BaseException as error:
        if dist.is_initialized():
            for number in (signal.SIGINT, signal.SIGTERM):  # by which torchrun ends the others
                signal.signal(number, signal.SIG_IGN)
            time.sleep(1)  # torchrun must see a rank that was killed end before this one fails
        result |= describe_failure(error)
        log.silent = log.silent and "TORCHELASTIC_RUN_ID" in env  # torchrun shows one reason
        with suppress(OSError):  # a full disk must not hide the reason
            ErrorHandler().record_exception(error)  # for torchrun's last lines
    return conclude(log, result)


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # like Ctrl-C: result.json is written
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:  # closed, as by a daemon
            setattr(sys, name, open(os.devnull, "w"))
    sys.stdout.reconfigure(errors="backslashreplace")  # type: ignore[union-attr]
    exit_status = main(sys.argv[1:], os.environ)
    if dist.is_initialized():
        sys.stdout.flush()
        time.sleep(1)  # other ranks may still read from this one
        os._exit(exit_status)  # at once: a broken process group can hang
    sys.exit(exit_status)
