"""Several processes, and processes that are killed."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

from imgshared import api
from imgshared.config import Experiment, SlideConfig, validate
from imgshared.data.ngff import open_ngff
from imgshared.prediction import load_run
from imgshared.slides import predict_slide


@pytest.fixture(scope="module")
def run_folder(toy_path, tmp_path_factory):
    """A translator that was trained for a moment."""
    plan = {
        "data": str(toy_path),
        "split": {"val": ["g3"], "test": ["g4"]},
        "method": {"name": "translator", "channels": [8, 12], "marker_dim": 4, "epochs": 1,
                   "weights": {"adversarial": 0, "sharp": 0}},
        "train": {"batch_size": 16, "precision": "float32", "accelerator": "cpu"},
    }  # fmt: skip
    out = tmp_path_factory.mktemp("slides") / "run"
    api.train(validate(Experiment, plan, "tiny"), out=out, console=Console(quiet=True))
    return out


@pytest.fixture(scope="module")
def slide(tmp_path_factory):
    """48 tiles of 256 px."""
    import tifffile

    path = tmp_path_factory.mktemp("slide") / "s.ome.tif"
    image = np.random.default_rng(0).poisson(300, (1, 1500, 2000)).astype(np.uint16)
    metadata = {"axes": "CYX", "Channel": {"Name": ["DNA"]}, "PhysicalSizeX": 0.5, "PhysicalSizeY": 0.5}
    tifffile.imwrite(path, image, tile=(256, 256), metadata=metadata, ome=True)
    return path


@pytest.fixture(scope="module")
def straight(run_folder, slide, tmp_path_factory):
    out = predict_slide(
        load_run(run_folder), slide, tmp_path_factory.mktemp("one") / "o.ome.zarr", SlideConfig(tile=256)
    )
    return files_of(out)


def files_of(image):
    """The bytes of every chunk, and what the metadata says of the image."""
    chunks = {p.relative_to(image): p.read_bytes() for p in image.rglob("c/**/*") if p.is_file()}
    return chunks, open_ngff(image).channels


def command(run_folder, slide, out):
    return ["predict", run_folder, slide, "--out", out, "tile=256"]


def test_two_processes_write_what_one_does(run_folder, slide, straight, in_two_processes, tmp_path):
    out = tmp_path / "o.ome.zarr"
    said = in_two_processes(*command(run_folder, slide, out))
    assert files_of(out) == straight
    assert said.count(str(out)) == 1  # one process speaks


@pytest.mark.parametrize("tiles", [1, 20])
def test_a_killed_prediction_goes_on_as_if_nothing_had_happened(run_folder, slide, straight, tmp_path, tiles):
    out = tmp_path / "o.ome.zarr"
    record = tmp_path / "o.ome.zarr.partial" / "tiles-done.0"
    words = [sys.executable, "-m", "imgshared.cli", *command(run_folder, slide, out)]
    process = subprocess.Popen(words, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    while process.poll() is None and not (record.exists() and len(record.read_text().splitlines()) >= tiles):
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert process.returncode == -signal.SIGKILL
    before = len(record.read_text().splitlines())
    assert not out.exists()
    assert before < 48
    done = subprocess.run(words, capture_output=True, timeout=120)
    assert done.returncode == 0, done.stderr.decode()[-3000:]
    assert files_of(out) == straight


def ranks_of(launcher):
    """The processes that torchrun has started, by their rank."""
    pids = map(int, Path(f"/proc/{launcher.pid}/task/{launcher.pid}/children").read_text().split())
    found = {}
    for pid in pids:
        variables = dict(v.split(b"=", 1) for v in Path(f"/proc/{pid}/environ").read_bytes().split(b"\0") if b"=" in v)
        if b"RANK" in variables:
            found[int(variables[b"RANK"])] = pid
    return found


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs Linux")
def test_a_killed_rank_costs_its_unfinished_tiles_alone(run_folder, slide, straight, in_two_processes, tmp_path):
    out = tmp_path / "o.ome.zarr"
    partial = tmp_path / "o.ome.zarr.partial"
    done = lambda: [line for f in partial.glob("tiles-done.*") for line in f.read_text().splitlines()]  # noqa: E731
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone", "-m"]
    words = [*launcher, "imgshared.cli", *map(str, command(run_folder, slide, out))]
    process = subprocess.Popen(words, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    while process.poll() is None and len(done()) < 10:
        time.sleep(0.01)
    os.kill(ranks_of(process)[1], signal.SIGKILL)
    process.communicate()
    assert process.returncode != 0
    assert not out.exists()
    finished = set(map(int, done()))
    assert 10 <= len(finished) < 48

    def shards(image):  # a file that is written again is another file, and a shard of zeros is none
        files = [image / "0" / "c" / c / str(k // 8) / str(k % 8) for k in sorted(finished) for c in "01"]
        return {str(f.relative_to(image)): f.stat().st_ino for f in files if f.exists()}

    before = shards(partial)
    assert len(before) >= 10
    in_two_processes(*command(run_folder, slide, out))
    assert shards(out) == before
    assert files_of(out) == straight
