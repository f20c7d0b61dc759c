"""A process of its own: prints as JSON the seconds to its first step, and its peak memory.

    python tests/bench/probe.py step|score|quantize SCALE

SCALE is a `harness.Scale` as JSON. Nothing is imported before the clock runs.
"""

import json
import shlex
import sys
import time
from pathlib import Path


def peak_mib() -> float:
    """Returns the peak memory so far: of the GPU, else of the process (VmHWM)."""
    import torch

    if torch.cuda.is_initialized():
        return torch.cuda.max_memory_allocated() / 2**20
    status = Path("/proc/self/status").read_text()  # of Linux
    return int(status.partition("VmHWM:")[2].split()[0]) / 2**10


def main(stage: str, scale: str) -> None:
    """Runs the stage twice; prints seconds and memory."""
    seconds, last = {}, time.perf_counter()

    def mark(name: str) -> None:
        """Names the time since the last mark."""
        nonlocal last
        now = time.perf_counter()
        seconds[name], last = now - last, now

    import numpy  # noqa: F401
    import torch  # noqa: F401

    mark("import of torch and numpy")
    root = Path(__file__).resolve().parents[2]
    sys.path[:0] = [str(root), str(root / "tests")]
    import train_gpt as tg

    mark("import of train_gpt.py")
    settings = json.loads(scale)["settings"]
    h = tg.Hyperparameters.from_env(dict(word.split("=", 1) for word in shlex.split(settings)))
    mark("settings")
    from bench.harness import (
        Scale,
        calibration_batches,
        quantize_model,
        random_data,
        random_model,
        start_machine,
    )
    from bench.step import Ours

    sizes = Scale(**json.loads(scale))
    machine, ranks = start_machine(sizes), tg.Ranks()
    device = machine.device
    mark("the device, with a trial of attention")
    if stage == "step":
        once = Ours(h, machine, random_data(h))  # with a model of its own
    else:
        model = random_model(h, machine).eval()
    if stage == "score":
        val = random_data(h, sizes.val_tokens).val
        sliding = tg.ScoringPass(
            device.compile(model.forward_logits), h.window_tokens, h.stride_tokens
        )
        batch_tokens = tg.scoring_batch_tokens(h, device)

        def once() -> None:
            tg.score(sliding, val, ranks, device, tg.Log(silent=True), batch_tokens)

    if stage == "quantize":

        def once() -> None:
            hessians = tg.collect_hessians(model, calibration_batches(h), ranks)
            tg.pack_artifact(h, quantize_model(model, hessians))

    mark("model, data and optimizers" if stage == "step" else "model and data")
    for name in (f"first {stage}", f"second {stage}"):
        once()
        device.now()
        mark(name)
    print(json.dumps({"seconds": seconds, "peak_mib": peak_mib()}))


if __name__ == "__main__":
    main(*sys.argv[1:])
