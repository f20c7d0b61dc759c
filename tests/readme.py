"""Write the parts of README.md that follow from the code, and its picture of results.

    python tests/readme.py

The tables between `<!-- settings -->` and `<!-- presets -->` and their end marks are written anew,
and records/results.png is drawn from the published scores below and from the CPU entry's logs.
"""

import json
import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import train_gpt

README, PICTURE = ROOT / "README.md", ROOT / "records" / "results.png"
CPU_ENTRY = ROOT / "records" / "track_non_record_16mb" / "2026-11-27_Python_on_a_CPU"

COMMON = (
    "preset",
    "data_path",
    "tokenizer_path",
    "vocab_size",
    "train_batch_tokens",
    "micro_batch_tokens",
    "iterations",
    "max_wallclock_seconds",
    "seed",
    "eval_stride",
)

# bpb on the challenge's validation text, as their authors report it.
PUBLISHED = {
    "baseline": 1.2244,
    "PR #832 (byte_jepa)": 1.1903,
    "PR #1124 (v9)": 1.1194,
    "PR #1493": 1.0810,
    "PR #2135 (official best)": 1.0565,
}
XZ_BYTES, TEXT_BYTES = 219_640, 1_028_397  # of the CPU run's validation text: data/prepare.py


def settings_rows() -> str:
    """Returns a table of the common settings: name, default, meaning."""
    rows = ["| setting | default | meaning |", "|---|---|---|"]
    defaults = train_gpt.Hyperparameters.__dataclass_fields__
    for name in COMMON:
        field = defaults[name]
        default = int(field.default) if field.type is bool else field.default
        shown = f"`{default}`" if default != "" else "empty"
        meaning = field.metadata["meaning"].replace("<", "&lt;")
        rows.append(f"| `{name.upper()}` | {shown} | {meaning} |")
    return "\n".join(rows)


def preset_rows() -> str:
    """Returns a table of the presets: name, settings that it changes."""
    rows = ["| preset | settings |", "|---|---|"]
    for name, values in train_gpt.PRESETS.items():
        changed = train_gpt.env_form(values)
        rows.append(f"| `{name}` | {f'`{changed}`' if changed else 'the defaults'} |")
    return "\n".join(rows)


def with_generated_parts(text: str) -> str:
    """Returns README's text with its generated tables as the code gives them."""
    for name, rows in {"settings": settings_rows(), "presets": preset_rows()}.items():
        head, _, rest = text.partition(f"<!-- {name} -->\n")
        _, end, tail = rest.partition(f"<!-- /{name} -->")
        if not end:
            raise ValueError(f"{README}: no part between <!-- {name} --> and <!-- /{name} -->")
        text = f"{head}<!-- {name} -->\n{rows}\n{end}{tail}"
    return text


def cpu_scores() -> dict[str, float]:
    """Returns the bpb of the CPU entry's default seed, with that of xz on the same text."""
    entry = json.loads((CPU_ENTRY / "submission.json").read_text())
    log = (CPU_ENTRY / "train_seed1337.log").read_text()
    exact = dict(re.findall(r"^(.+)_exact val_loss:\S+ val_bpb:(\S+)$", log, re.M))
    sliding = float(exact["final_int6_sliding_window"])
    assert sliding == entry["seed_results"]["1337"]["val_bpb"]
    return {
        "xz -9e": 8 * XZ_BYTES / TEXT_BYTES,
        "before quantization": float(exact["DIAGNOSTIC post_ema"]),
        "artifact": float(exact["final_int6_roundtrip"]),
        "artifact, sliding": sliding,
    }


def draw(path: Path) -> None:
    """Draws the published scores, and ours of the CPU run, side by side."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 2.8), layout="constrained")
    axes = figure.subplots(1, 2)
    panels = {
        "This project, PRESET=cpu, two CPU cores\n(Python's own text)": (cpu_scores(), "tab:blue"),
        "Published by others, 8xH100, 600 s\n(the challenge's text)": (PUBLISHED, "tab:gray"),
    }
    for ax, (title, (scores, color)) in zip(axes, panels.items(), strict=True):
        ax.plot([*scores.values()], [*scores], "o", color=color)
        for name, bpb in scores.items():
            ax.annotate(f"{bpb:.4f}", (bpb, name), (8, -4), textcoords="offset points")
        ax.margins(x=0.4, y=0.15)
        ax.grid(axis="x", alpha=0.3)
        ax.invert_yaxis()
        ax.set_title(title, fontsize=10)
        ax.set_xlabel("bits per byte (lower is better)")
    figure.savefig(path, dpi=120, metadata={"Software": None})


if __name__ == "__main__":
    README.write_text(with_generated_parts(README.read_text()))
    draw(PICTURE)
