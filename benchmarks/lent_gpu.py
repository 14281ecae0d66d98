"""Prepare a run on a machine with a GPU that is lent for minutes, has torch, and reaches no registry.

python benchmarks/lent_gpu.py SHARDS

It fills the folder `.lent`: the shards, their pictures as lossless WebP in one compressed file, the wheels that the
machine lacks, and the commit. Copy the working tree there without results/ and src/unclip_pl/weights/. There, run
`OUT=folder bash benchmarks/lent_gpu.sh recipe tests`, then its other parts. OUT fits into eight files of 16 MiB.
"""

import io
import lzma
import subprocess
import sys
import tarfile
from pathlib import Path

from PIL import Image

from unclip_pl.origin import commit

ROOT = Path(__file__).parent.parent
LENT = ROOT / ".lent"
#: Python of that machine, and what it lacks: it has torch, lightning, torchmetrics, timm, pyarrow and pytest.
PYTHON = "3.12"
WHEELS = (
    "open_clip_torch", "ftfy", "wcwidth", "jsonargparse", "docstring-parser", "typeshed-client", "importlib-resources",
    "importlib-metadata", "webdataset", "braceexpand", "torch-fidelity", "filelock", "fsspec", "diffusers>=0.42,<0.43",
)  # fmt: skip
PLATFORMS = ("manylinux_2_28_x86_64", "manylinux_2_17_x86_64", "manylinux2014_x86_64")


def wheels(folder: Path) -> None:
    """Download the wheels, without what they need in their turn."""
    where = [word for name in PLATFORMS for word in ("--platform", name)]
    words = ["--no-deps", "--only-binary=:all:", "--python-version", PYTHON, "--implementation", "cp", *where]
    subprocess.run([sys.executable, "-m", "pip", "download", "--quiet", *words, "-d", str(folder), *WHEELS], check=True)


def shards(source: Path, target: Path) -> None:
    """Write shards of any pictures as shards of lossless WebP, in one compressed tar: tar's padding takes no space."""
    with lzma.open(target, "wb") as file, tarfile.open(fileobj=file, mode="w") as packed:
        for path in sorted(source.glob("*.tar")):
            content = io.BytesIO()
            with tarfile.open(path) as old, tarfile.open(fileobj=content, mode="w") as new:
                for member in old:
                    stream = old.extractfile(member)
                    name, data = member.name, stream.read() if stream else b""
                    if name.endswith(".png"):
                        name, data = f"{name.removesuffix('.png')}.webp", webp(data)
                    _add(new, name, data)
            _add(packed, f"shards/{path.name}", content.getvalue())


def webp(png: bytes) -> bytes:
    """Return a picture as lossless WebP."""
    picture, content = Image.open(io.BytesIO(png)).convert("RGB"), io.BytesIO()
    picture.save(content, "WEBP", lossless=True, quality=100)
    return content.getvalue()


def _add(tar: tarfile.TarFile, name: str, data: bytes) -> None:
    member = tarfile.TarInfo(name)
    member.size = len(data)
    tar.addfile(member, io.BytesIO(data))


if __name__ == "__main__":
    (LENT / "wheels").mkdir(parents=True, exist_ok=True)
    (LENT / "commit").write_text(f"{commit()}\n")
    wheels(LENT / "wheels")
    shards(Path(sys.argv[1]), LENT / "shards.tar.xz")
    size = sum(file.stat().st_size for file in LENT.rglob("*") if file.is_file())
    print(f"{size / 2**20:.0f} MiB in {LENT}")
