"""Slides of gigapixels: time, memory, and equality with a prediction of whole windows.

    python scripts/benchmark_slides.py RUN OUT [--gigapixels 1] [--glass 4] [--beside RUN ...] [--record JSON]

RUN is any run whose method takes images of any size; those beside it predict a slide of 4,096 px, for their time and
memory. A slide of three channels (uint16, discs on a background with camera noise, whose brightness changes from place
to place) is written as OME-TIFF and OME-Zarr and predicted to its own format by `imgshared predict`, in a process of
its own, whose greatest resident memory is taken; the OME-Zarr with measured=true, so that every channel is read and
written. A second one is glass but for a sixteenth, predicted with tissue=otsu. On 8 windows of 1,024 px the result is
held against `predict_image` of a window of 3,072 px about it. More than 3 GB, or a difference of more than 1% of the
range, is an error, and so is a prediction that is the same everywhere: train RUN long enough.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import tifffile
import zarr
from common import ROOT, markdown, record
from numpy.typing import NDArray

from imgshared.data.readers import open_image
from imgshared.data.windows import windows
from imgshared.prediction import load_run, predict_image
from imgshared.prediction.run import Run
from imgshared.slides.pyramid import ChannelLook, image_metadata

BLOCK = 1024
WINDOWS, AROUND = 8, 1024
MOST_GB = 3.0
SMALL = 4096  # px


def main() -> None:
    """Write, predict, compare."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--gigapixels", type=float, default=1.0, help="of the slide of tissue")
    parser.add_argument("--glass", type=float, default=4.0, help="gigapixels of the slide of glass")
    parser.add_argument("--beside", type=Path, nargs="*", default=[], help="other runs, on a small slide")
    parser.add_argument("--record", type=Path, default=ROOT / "benchmarks" / "slides.json", help="JSON to write")
    a = parser.parse_args()
    a.out.mkdir(parents=True, exist_ok=True)
    side, wide = (round((g * 2**30) ** 0.5 / BLOCK) * BLOCK for g in (a.gigapixels, a.glass))
    rows = []
    jobs: list[tuple[Path, str, int, float, list[str]]] = [(run, "ome.zarr", SMALL, 1.0, []) for run in a.beside]
    jobs += [
        (a.run, "ome.tif", side, 1.0, []),
        (a.run, "ome.zarr", side, 1.0, ["measured=true"]),
        (a.run, "ome.zarr", wide, 1 / 16, ["tissue=otsu"]),
    ]
    for path, kind, size, share, wish in jobs:
        what, run = "glass" if share < 1 else "tissue", load_run(path)
        about = {"method": run.experiment.method.name, "parameters": sum(p.numel() for p in run.method.parameters())}
        found = one(path, run, a.out / f"{what}.{kind}", size, share, wish)
        rows.append({"slide": f"{what}, {kind}", "settings": " ".join(wish), **about, **found})
        print(rows[-1], flush=True)
    record(a.record, {"slides": rows})
    print(markdown(rows))
    bad = [r["slide"] for r in rows if r["peak GB"] > MOST_GB or r["greatest difference"] >= 0.01 * r["of a range of"]]
    if bad:
        raise SystemExit(f"too much memory, or not the prediction of the windows: {', '.join(bad)}")


def one(model: Path, run: Run, path: Path, side: int, share: float, wish: list[str]) -> dict[str, Any]:
    """Write a slide, predict it, compare windows."""
    names = list(run.panel.markers[:3])
    if not path.exists():
        print(f"writing {path}: {side} x {side} x {len(names)}", flush=True)
        write(path, side, share, names, run.contract.pixel_size_um)
    out = path.with_name(f"predicted_{path.name}")
    remove(out)
    began = time.perf_counter()
    words = [sys.executable, "-m", "imgshared.cli", "predict", model, path, "--out", out, "--overwrite",
             f"markers=[{run.panel.proteins[0]}]", *wish]  # fmt: skip
    peak = watched(words)
    seconds = time.perf_counter() - began
    greatest, of = compare(run, path, out, side, share)
    remove(out)
    remove(path)
    return {"gigapixels": side**2 / 2**30, "seconds": seconds, "MPix/s": side**2 / seconds / 1e6, "peak GB": peak,
            "greatest difference": greatest, "of a range of": of}  # fmt: skip


def remove(path: Path) -> None:
    """Remove a file or folder, if it is there."""
    shutil.rmtree(path, ignore_errors=True) if path.is_dir() else path.unlink(missing_ok=True)


def watched(words: list[Any]) -> float:
    """Run a command, and return the greatest resident memory of its process, GB."""
    process = subprocess.Popen([str(w) for w in words], env={**os.environ, "PYTHONPATH": str(ROOT)})
    peak = 0.0
    while process.poll() is None:  # getrusage would count this process's memory, too, from before the exec
        lines = Path(f"/proc/{process.pid}/status").read_text().splitlines()
        peak = max([peak, *(int(line.split()[1]) / 1e6 for line in lines if line.startswith("VmHWM"))])
        time.sleep(0.2)
    if process.returncode:
        raise SystemExit(f"{words[3]} failed with {process.returncode}")
    return peak


def blocks(side: int, share: float, channel: int) -> Iterator[tuple[int, int, NDArray[np.uint16] | None]]:
    """Yield row, column and pixels of each block of a channel; None for glass."""
    rng = np.random.default_rng(channel)
    texture = texture_of(rng)
    edge = round(side * share**0.5 / BLOCK) * BLOCK
    for y in range(0, side, BLOCK):
        for x in range(0, side, BLOCK):
            gain = 0.5 + ((y // BLOCK * 7 + x // BLOCK * 13) % 16) / 16
            yield y, x, (texture * gain).astype(np.uint16) if y < edge and x < edge else None


def texture_of(rng: np.random.Generator) -> NDArray[np.float32]:
    """Discs on a background, with the noise of a camera."""
    y, x = np.mgrid[:BLOCK, :BLOCK]
    discs = np.hypot((y % 64) - 32, (x % 64) - 32) < 16
    return rng.poisson(np.where(discs, 900, 120)).astype(np.float32)


def write(path: Path, side: int, share: float, names: list[str], size: float | None) -> None:
    """Write a slide, a channel after the other, tile by tile."""
    if path.suffix == ".tif":
        metadata: dict[str, Any] = {"axes": "CYX", "Channel": {"Name": names}}
        metadata |= {"PhysicalSizeX": size, "PhysicalSizeY": size} if size else {}
        tiles = (b[2] if b[2] is not None else np.zeros((BLOCK, BLOCK), np.uint16)
                 for c in range(len(names)) for b in blocks(side, share, c))  # fmt: skip
        tifffile.imwrite(
            path, tiles, shape=(len(names), side, side), dtype=np.uint16, tile=(BLOCK, BLOCK), bigtiff=True,
            compression="zlib", metadata=metadata, ome=True, photometric="minisblack",
        )  # fmt: skip
        return
    group = zarr.create_group(path, zarr_format=3)
    level = group.create_array("0", shape=(len(names), side, side), chunks=(1, 512, 512), shards=(1, 1024, 1024),
                               dtype=np.uint16)  # fmt: skip
    for c in range(len(names)):
        for y, x, pixels in blocks(side, share, c):
            if pixels is not None:
                level[c, y : y + BLOCK, x : x + BLOCK] = pixels
    looks = [ChannelLook(name, 0, 1000) for name in names]
    group.attrs["ome"] = image_metadata(path.name, looks, size, 1, np.dtype(np.uint16))


def compare(run: Run, path: Path, out: Path, side: int, share: float) -> tuple[float, float]:
    """Return the greatest difference from a prediction of larger windows, and the range of the prediction."""
    image, predicted, chromatin = open_image(path), open_image(out), run.panel.chromatin
    imputed = predicted.channels.index(f"{run.panel.proteins[0]}_imputed")
    rng = np.random.default_rng(0)
    end = int(side * share**0.5) - 3 * AROUND
    greatest, values = 0.0, []
    with windows(image, [chromatin]) as read, windows(predicted, [predicted.channels[imputed]]) as read_predicted:
        for y, x in rng.integers(0, max(end, 1), (WINDOWS, 2)) // 16 * 16:
            whole = read(slice(y, y + 3 * AROUND), slice(x, x + 3 * AROUND))
            drawn = predict_image(run, whole, [chromatin], markers=run.panel.proteins[:1])
            want = np.rint(drawn).clip(0, 65535)
            inner = slice(AROUND, 2 * AROUND)
            got = read_predicted(slice(y + AROUND, y + 2 * AROUND), slice(x + AROUND, x + 2 * AROUND))
            greatest = max(greatest, float(np.abs(got - want[:, inner, inner]).max()))
            values.append(np.ptp(got))
    return greatest, float(max(values))


if __name__ == "__main__":
    main()
