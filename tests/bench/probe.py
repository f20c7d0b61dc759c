"""A process of its own, told in JSON: seconds from its start to a first step, and peak memory.

    python tests/bench/probe.py step|score|quantize SCALE

SCALE is a `harness.Scale` as JSON. Nothing is imported before the clock runs.
"""

import itertools
import json
import sys
import time
from pathlib import Path


def peak_mib():
    """The most memory so far: a GPU's, else of the process (VmHWM)."""
    import torch

    if torch.cuda.is_initialized():
        return torch.cuda.max_memory_allocated() / 2**20
    status = Path("/proc/self/status")
    if not status.exists():  # no Linux
        import resource

        unit = 2**20 if sys.platform == "darwin" else 2**10
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit
    return int(status.read_text().partition("VmHWM:")[2].split()[0]) / 2**10


def main(stage, scale):
    """Do the stage twice and print all."""
    marks = []

    def mark(name):  # what passed since the last one
        marks.append((name, time.perf_counter()))

    mark("")
    import numpy  # noqa: F401
    import torch  # noqa: F401

    mark("import of torch and numpy")
    root = Path(__file__).resolve().parents[2]
    sys.path[:0] = [str(root), str(root / "tests")]
    import train_gpt as tg

    mark("import of train_gpt.py")
    settings = json.loads(scale)["settings"]
    h = tg.Hyperparameters.from_env(tg.assignments(settings))
    mark("settings")
    from bench.harness import Scale, random_data, random_model, start_runtime
    from bench.step import Ours

    scale = Scale(**json.loads(scale))
    rt, log = start_runtime(scale), tg.Log(silent=True)
    mark("the device, with a trial of attention")
    if stage == "step":
        once = Ours(h, rt, random_data(h))
    else:
        model = random_model(h, rt).eval()
    if stage == "score":
        data, logits = random_data(h, scale.val_tokens), rt.compile(model.forward_logits)
        stride = min(h.eval_stride, h.train_seq_len)

        def once():
            tg.evaluate(logits, data, h, rt, log, stride)

    if stage == "quantize":
        clock = tg.TrainingClock(rt, tg.replace(h, max_wallclock_seconds=0.0), log)

        def once():
            hessians = tg.collect_hessians(model, tg.calibration(None, h, 0), clock, log)
            tg.pack(h, tg.quantize(model, hessians)[0])

    mark("model, data and optimizers" if stage == "step" else "model and data")
    for name in (f"first {stage}", f"second {stage}"):
        once()
        rt.now()
        mark(name)
    seconds = {name: at - before for (_, before), (name, at) in itertools.pairwise(marks)}
    print(json.dumps({"seconds": seconds, "peak_mib": peak_mib()}))


if __name__ == "__main__":
    main(*sys.argv[1:])
