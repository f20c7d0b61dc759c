"""Start-up and memory: processes of their own."""

import json
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

from .harness import Machine, Scale, Table, row

PROBE = Path(__file__).with_name("probe.py")
STAGES = {"step": "training", "score": "sliding scores", "quantize": "GPTQ and packing"}


def startup(scale: Scale, machine: Machine) -> Table:
    """Seconds from a process's start to its second step, and peak memory by stage."""
    found: dict[str, list[dict]] = {}
    for stage in STAGES:
        rounds = max(scale.rounds // 2, 1) if stage == "step" else 1
        command = [sys.executable, str(PROBE), stage, json.dumps(asdict(scale))]
        for _ in range(rounds):
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            if done.returncode:
                raise RuntimeError(f"{stage}: {done.stderr[-500:]}")
            found.setdefault(stage, []).append(json.loads(done.stdout.splitlines()[-1]))
    names = found["step"][0]["seconds"]
    rows = [row(n, "s", [f["seconds"][n] for f in found["step"]]) for n in names]
    for stage, what in STAGES.items():
        rows.append(row(f"peak memory, {what}", "MiB", [f["peak_mib"] for f in found[stage]]))
    kind = "allocated on the GPU" if machine.device.is_cuda else "of the process (VmHWM)"
    return Table(f"{scale.settings}; memory {kind}", rows)
