"""What quantizing a saved model costs: paired bits per byte over all validation windows.

    DATA_PATH=... TOKENIZER_PATH=... python tests/bench/int6.py RUN_DIR/final_model.safetensors

Rows: rounding, and GPTQ on random tokens and on training text (from its start), all arrays
quantized and the matrices alone. Errors are standard errors of differences between windows.
"""

import math
import os
import sys
import time
from pathlib import Path

import torch
import torch.nn.functional as F

sys.path[:0] = [str(path) for path in Path(__file__).resolve().parents[1:3]]

import train_gpt as tg
from bench.harness import quantize_model


@torch.inference_mode()
def window_nats(model: tg.GPT, val: torch.Tensor, length: int) -> torch.Tensor:
    """Returns the nats, float64 [N], of each whole window of `length` tokens."""
    count = (len(val) - 1) // length
    inputs, targets = (val[i:][: count * length].long().view(count, -1) for i in (0, 1))
    nats = []
    for x, y in zip(inputs.split(16), targets.split(16), strict=True):
        logits = model.forward_logits(x).mT
        nats.append(F.cross_entropy(logits, y, reduction="none").double().sum(1))
    return torch.cat(nats)


def main(path: str) -> None:
    """Prints the table of a checkpoint."""
    h, weights, *_ = tg.load_checkpoint(Path(path), tg.Hyperparameters.from_env(os.environ))
    ranks, length = tg.Ranks(), h.train_seq_len
    val, train = tg.load_data(h, ranks, tg.Log(), trains=True)
    model = tg.GPT(h).eval()
    model.load_state_dict(weights)
    roles, base = tg.parameter_roles(model), window_nats(model, val.tokens, length)
    scored = val.tokens[: len(base) * length + 1].long()
    per_bpb = math.log(2) * int(val.table.text_bytes(scored[:-1], scored[1:]).sum())
    count, rows = max(h.gptq_calib_tokens // length, 1), max(h.micro_batch_tokens // length, 1)
    calibration = {
        "rounding": None,
        "GPTQ, random": tg.random_sequences(count, length, h.vocab_size, h.seed),
        "GPTQ, train": train.sequences(0, count)[:, :-1],
    }
    print(f"float32: {base.sum() / per_bpb:.6f} bpb, {len(base)} windows of {length}")
    for name, sequences in calibration.items():
        model.load_state_dict(weights)
        began, hessians = time.perf_counter(), {}
        if sequences is not None:
            hessians = tg.collect_hessians(model, sequences.split(rows), ranks)
        arrays = quantize_model(model, hessians)
        seconds, stored = (
            time.perf_counter() - began,
            tg.dequantize(arrays, tg.QUANTIZERS[h.quantizer]),
        )
        alone = {n: stored[n] if roles[n] == "matrix" else w for n, w in weights.items()}
        for what, changed in (("all", stored), ("matrices alone", alone)):
            model.load_state_dict(changed)
            lost = (window_nats(model, val.tokens, length) - base) / per_bpb
            error = lost.std() * len(lost) ** 0.5
            print(f"{name:14} {what:15} {lost.sum():.6f} +- {error:.6f} bpb, {seconds:.1f} s")


if __name__ == "__main__":
    main(sys.argv[1])
