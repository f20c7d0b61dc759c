"""Fill .gpu/ with what tests/gpu.sh needs on a machine without a network.

    python tests/gpu_prepare.py DOCS... --tokenizer MODEL

DOCS are documents as data/prepare.py takes them, MODEL a SentencePiece model: they are tokenized
there. Packages that may be missing there are fetched as wheels, for Python 3.12 on Linux, x86-64.
"""

import argparse
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
LIMIT = 64 << 20  # bytes of the checkout and .gpu/ together
PACKAGES = (
    "zstandard",
    "safetensors",
    "sentencepiece",
    "tqdm",
    "rich",
    "pytest",
    "hypothesis",
    "brotli",
    "constriction",
)
PLATFORMS = ("2_28", "2_27", "2_24", "2_17", "2_12", "2_5", "1")


def fetch_wheels(folder: Path) -> None:
    """Downloads the packages and what they need."""
    tags = [f"manylinux{'' if p == '1' else '_'}{p}_x86_64" for p in PLATFORMS]
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--only-binary=:all:"]
    command += ["--python-version", "3.12", "--implementation", "cp", "--dest", str(folder)]
    for tag in tags:
        command += ["--platform", tag]
    subprocess.run([*command, *PACKAGES], check=True)


def tree_bytes() -> int:
    """Returns the bytes of all files that git does not ignore, and of .gpu/."""
    listing = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    names = subprocess.run(listing, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    files = [ROOT / name for name in names.split("\0") if name]
    files += (ROOT / ".gpu").rglob("*")
    return sum(path.stat().st_size for path in files if path.is_file())


def main(argv: list[str] | None = None) -> int:
    """Fills the folder anew; returns the exit status."""
    about, _, rest = __doc__.partition("\n\n")
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=about, epilog=rest, formatter_class=raw)
    parser.add_argument("docs", nargs="+", type=Path, metavar="DOCS")
    parser.add_argument("--tokenizer", type=Path, required=True, metavar="MODEL")
    args = parser.parse_args(argv)
    folder = ROOT / ".gpu"
    shutil.rmtree(folder, ignore_errors=True)
    (folder / "docs").mkdir(parents=True)
    for path in args.docs:
        shutil.copyfile(path, folder / "docs" / path.name)
    shutil.copyfile(args.tokenizer, folder / args.tokenizer.name)
    fetch_wheels(folder / "wheels")
    total = tree_bytes()
    print(f"{folder}: {total / 2**20:.1f} MiB with the checkout, of {LIMIT >> 20}")
    if total > LIMIT:
        print("error: too much; give fewer documents", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
