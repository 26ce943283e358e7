"""The jobs of `benchmark_methods.py`: which are finished, and how the others are run, so many processes at a time."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from common import finished


@dataclass
class Work:
    """One job: its result, what it needs to know, the results that it needs, its process while it runs."""

    result: Path
    job: dict[str, Any]
    needs: Sequence[Path] = ()
    process: subprocess.Popen[bytes] | None = field(default=None, repr=False)
    began: float = 0.0

    @property
    def name(self) -> str:
        """What it is called in the progress."""
        words = self.job.get("name", {}).values()
        return " ".join([self.job["kind"], *(str(w) for w in words if w != "")])

    @property
    def log(self) -> Path:
        """Where its output goes."""
        return self.result.with_suffix(".log")

    @property
    def settings(self) -> Path:
        """Where the job is written as it begins."""
        return self.result.with_suffix(".job.json")

    def described(self) -> dict[str, Any]:
        """Return all that its process needs to know."""
        return {**self.job, "result": str(self.result)}

    def done(self) -> bool:
        """Whether its result is there and of this very job; another job's is refused."""
        return finished(self.result, self.settings, self.described())


def cores() -> int:
    """Return how many cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@contextmanager
def timed(path: Path) -> Iterator[None]:
    """Add the minutes that pass to those in a file, of all calls that have worked in its folder."""
    began, before = time.monotonic(), json.loads(path.read_text()) if path.exists() else 0.0
    try:
        yield
    finally:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"{before + (time.monotonic() - began) / 60:.2f}\n")


def run(jobs: Sequence[Work], workers: int, threads: int) -> None:
    """Do what has no result yet, so many at a time; on Ctrl-C or SIGTERM stop them all."""
    share = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"), str(threads))
    waiting = [w for w in jobs if not w.done()]
    running: list[Work] = []
    took: list[float] = []
    try:
        while waiting or running:
            while waiting and len(running) < workers:
                work = waiting.pop(0)
                if not all(path.exists() for path in work.needs):
                    print(f"{work.name}: left out, what it needs is missing", flush=True)
                    continue
                begin(work, share)
                running.append(work)
            time.sleep(0.2)
            for work in [w for w in running if w.process and w.process.poll() is not None]:
                running.remove(work)
                took.append(time.monotonic() - work.began)
                left = sum(took) / len(took) * len(waiting + running) / workers
                said = "done" if work.result.exists() else f"FAILED: {last_words(work.log)}"
                print(f"{work.name}: {said} in {took[-1]:.0f} s; about {left / 60:.0f} min left", flush=True)
    finally:
        for work in running:
            if work.process:
                work.process.terminate()
        for work in running:
            if work.process:
                work.process.wait()


def begin(work: Work, environment: dict[str, str]) -> None:
    """Start a job's process."""
    work.result.parent.mkdir(parents=True, exist_ok=True)
    work.settings.write_text(json.dumps(work.described(), indent=1) + "\n")
    script = [sys.executable, str(Path(__file__).with_name("methods_job.py")), str(work.settings)]
    with work.log.open("wb") as log:
        work.process = subprocess.Popen(script, stdout=log, stderr=log, env={**os.environ, **environment})
    work.began = time.monotonic()


def last_words(log: Path) -> str:
    """Return the last line that a job wrote, and where the rest is."""
    lines = [line for line in log.read_text(errors="replace").splitlines() if line.strip()]
    return f"{lines[-1] if lines else 'no output'} ({log})"
