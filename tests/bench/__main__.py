"""Time every part of train_gpt.py, print tables and write them as JSON.

    python -m tests.bench [--quick] [--device cpu|cuda] [--only NAME,...] [--out FILE.json]
    python -m tests.bench --markdown FILE.json

Variants that compete take turns in one process; a figure is the median of its rounds. The last form
writes a report's tables into README.md beside this. tests/bench/README.md explains all.
"""

import argparse
import hashlib
import json
import os
import platform
import shlex
import sys
import time
import traceback
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

import train_gpt as tg

from .harness import SCALES, Machine, Row, Scale, Table, start_machine
from .parts import attention, gptq, muon, packing, scoring, startup
from .ranks import ranks
from .step import kernels, loop, step, step_of_bytes, step_of_frontier
from .tables import fill, markdown, show

# In order: what is worth most comes first.
BENCHMARKS = {
    "step": step,
    "attention": attention,
    "muon": muon,
    "gptq": gptq,
    "loop": loop,
    "scoring": scoring,
    "packing": packing,
    "bytes": step_of_bytes,
    "frontier": step_of_frontier,
    "kernels": kernels,
    "startup": startup,
    "ranks": ranks,
}
README = Path(__file__).with_name("README.md")


def about(name: str) -> str:
    """Returns in a line what a benchmark measures."""
    return BENCHMARKS[name].__doc__.partition("\n")[0].rstrip(".")


def surroundings(scale: Scale, machine: Machine, quick: bool) -> dict:
    """Returns device, versions, command and date of a report."""
    versions = {"python": platform.python_version(), "torch": torch.__version__}
    for package in ("numpy", "zstandard", "triton"):
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            versions[package] = ""
    return {
        "kind": scale.device,
        "quick": quick,
        "device": machine.device.describe(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "load": list(os.getloadavg()),
        "versions": versions,
        "command": shlex.join(["python", "-m", "tests.bench", *sys.argv[1:]]),
        "date": time.strftime("%Y-%m-%d %H:%M:%S %z"),
        "code_sha256": hashlib.sha256(tg.read_program()[0]).hexdigest(),
    }


def run(names: list[str], scale: Scale, quick: bool, out: Path) -> dict:
    """Runs benchmarks in order; writes the report after each one, and returns it."""
    machine = start_machine(scale)
    report = {**surroundings(scale, machine, quick), "benchmarks": {}}
    for name in names:
        torch.compiler.reset()
        tg.select_attention(machine.device.attention)  # the benchmark before may have changed it
        began, entry = time.perf_counter(), {}
        try:
            with tg.matmul_precision("highest"):
                table = BENCHMARKS[name](scale, machine)
            show(markdown(name, about(name), table))
            entry = {"sizes": table.sizes, "rows": [row._asdict() for row in table.rows]}
        except Exception:  # the others may run
            entry = {"error": traceback.format_exc()}
            print(f"\n{name}: failed\n{entry['error']}")
        entry["seconds"] = time.perf_counter() - began
        report["benchmarks"][name] = entry
        tg.write_atomically(out, json.dumps(report, indent=1).encode())
    return report


def write_markdown(path: Path, readme: Path) -> None:
    """Fills a README's block for a report's kind of device with its tables."""
    report = json.loads(path.read_text())
    on, versions = report["device"], report["versions"]
    lines = [
        f"{on['device']}, {on['dtype']}, compiled: {on['compiled']}, torch {versions['torch']}, "
        f"Python {versions['python']}; {report['cores']} cores, {report['threads']} threads, load "
        f"{report['load'][0]:.1f} at the start; {report['date'][:10]}.\n",
        f"    {report['command']}\n",
    ]
    for name, entry in report["benchmarks"].items():
        if "error" in entry:
            lines.append(f"### {name}: failed\n")
            continue
        rows = [Row(**values) for values in entry["rows"]]
        lines.append(markdown(name, about(name), Table(entry["sizes"], rows)))
    readme.write_text(fill(readme.read_text(), report["kind"], "\n".join(lines)))


def main(argv: list[str]) -> int:
    """Runs the program; returns 1 if a benchmark failed."""
    listed = "\n".join(f"  {name:10} {about(name)}" for name in BENCHMARKS)
    parser = argparse.ArgumentParser(
        prog="python -m tests.bench",
        description=f"{__doc__}\n{listed}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    kinds = ("cpu", "cuda")
    parser.add_argument("--device", choices=kinds, default=kinds[torch.cuda.is_available()])
    parser.add_argument("--quick", action="store_true", help="fewer rounds; on a CPU smaller sizes")
    parser.add_argument("--only", metavar="NAME,...", default=",".join(BENCHMARKS))
    parser.add_argument("--out", type=Path, metavar="FILE.json", help="default: in tests/bench/out")
    parser.add_argument(
        "--markdown", type=Path, metavar="FILE.json", help="fill the README from it"
    )
    args = parser.parse_args(argv)
    if args.markdown:
        write_markdown(args.markdown, README)
        return 0
    names = args.only.split(",")
    if strange := sorted(set(names) - set(BENCHMARKS)):
        parser.error(f"--only: no benchmark {', '.join(strange)}")
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: no CUDA GPU is here")
    stamp = time.strftime("%Y%m%d-%H%M%S")
    out = args.out or README.parent / "out" / f"{stamp}-{args.device}.json"
    out.parent.mkdir(parents=True, exist_ok=True)
    report = run(names, SCALES[args.device, args.quick], args.quick, out)
    print(f"written: {out}")
    return int(any("error" in entry for entry in report["benchmarks"].values()))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
