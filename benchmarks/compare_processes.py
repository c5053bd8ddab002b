"""Print one table: this package's worker processes beside other pools, and beside a process for each job.

.. code-block:: console

    $ python benchmarks/compare_processes.py            # some minutes; --rounds 2 for a glance

On Linux only, as it forks and reads ``/proc``. Each contender has a process of its own. The rounds are interleaved,
contender by contender, so that a machine that slows down slows down all of them; what is printed are medians, and
ratios of medians, of one run.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import platform
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

HERE = Path(__file__).resolve().parent

#: Seconds until a case is given up, so that one that hangs does not end the run.
LIMIT = 120

#: How many times fewer jobs are run where each has a process of its own.
FEWER = 50

#: What is installed for comparison.
OTHERS = ["loky", "pebble"]

#: the name that ``process_contender.py`` knows, and what it is called in the table
CONTENDERS = {
    "standard": "standard",
    "loky": "loky",
    "pebble": "Pebble",
    "per_job": "process/job",
    "ours": "ours",
    "request": "ours, req.",
}

HEADER = """\
Python {python}, {processors} processors, {rounds} rounds; two workers; {versions}
standard: ProcessPoolExecutor; process/job: a process for each job, two at a time; {fewer} times fewer jobs of 10,000;
ours: submitted in an app context; ours, req.: in a request context. All fork but loky, which starts processes anew.
First line of a case: microseconds per job, or MiB. Second line: the ratio to the standard pool, which is
    rate  jobs per second, MORE is better (2.00 is twice as fast)
    time  seconds, LESS is better (0.50 is twice as fast)
    size  bytes, LESS is better
"""


@dataclass(frozen=True, slots=True)
class Case:
    """A row of the table."""

    name: str
    count: int  # jobs a round
    title: str
    ratio: Literal["rate", "time", "size"]
    lasting: bool = True  # whether rounds may follow each other in one process
    fewer: bool = False  # whether it has fewer jobs where each has a process

    def count_for(self, kind: str) -> int:
        """How many jobs a contender runs."""
        return self.count // FEWER if self.fewer and kind == "per_job" else self.count


CASES = [
    Case("bulk", 10_000, "no-op jobs in bulk", "rate", fewer=True),
    Case("bulk_1k", 10_000, "1 KiB arguments in bulk", "rate", fewer=True),
    Case("bulk_1m", 150, "1 MiB arguments in bulk", "rate"),
    Case("result_1m", 150, "1 MiB results in bulk", "rate"),
    Case("round_trip", 300, "round trip, one right after the other", "time"),
    Case("first_job", 5, "a new pool's first result", "time"),
    Case("memory", 10_000, "PSS, parent and children, after 10,000 jobs", "size", lasting=False, fewer=True),
]


class Contender:
    """A process that runs ``process_contender.py``, started when it is needed."""

    def __init__(self, kind: str, path: str) -> None:
        self._kind = kind
        self._environment = {**os.environ, "PYTHONPATH": path, "PYTHONWARNINGS": "ignore"}
        self._process: subprocess.Popen[str] | None = None

    def measure(self, case: Case) -> float | None:
        """Seconds for one job, or bytes for all; None when the case fails."""
        process = self._started()
        assert process.stdin and process.stdout
        count = case.count_for(self._kind)
        timer = threading.Timer(LIMIT, os.killpg, (process.pid, signal.SIGKILL))
        timer.start()
        with contextlib.suppress(BrokenPipeError):  # it has died; there is no answer then
            print(case.name, count, file=process.stdin, flush=True)
        answer = process.stdout.readline()
        timer.cancel()
        if not answer or answer.startswith("fails"):
            print(f"{self._kind}, {case.name}: {answer.strip() or 'died, or did not end'}", file=sys.stderr)
            self.close()
            return None
        return float(answer) / (1 if case.ratio == "size" else count)

    def close(self) -> None:
        """End the process; the next case gets a new one."""
        process, self._process = self._process, None
        if process is not None:
            process.communicate()

    def _started(self) -> subprocess.Popen[str]:
        if self._process is None:
            self._process = subprocess.Popen(
                # Imported instead of run, see there.
                [sys.executable, "-c", f"import process_contender; process_contender.main({self._kind!r})"],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
                env=self._environment,
                start_new_session=True,
            )
        return self._process


def install(folder: str) -> str:
    """Install the others there; their names and versions."""
    print(f"Installing {' and '.join(OTHERS)} for comparison ...", file=sys.stderr)
    subprocess.run([sys.executable, "-m", "pip", "install", "-q", "--target", folder, *OTHERS], check=True)
    listed = subprocess.run(
        [sys.executable, "-m", "pip", "list", "--path", folder, "--format", "freeze"],
        check=True,
        capture_output=True,
        text=True,
    )
    versions = [line.split("==") for line in listed.stdout.splitlines()]
    return ", ".join(" ".join(version) for version in versions if version[0].lower() in OTHERS)


def measure_all(contenders: dict[str, Contender], case: Case, rounds: int) -> dict[str, float | None]:
    """The median of each contender; None where the case failed."""
    measured: dict[str, list[float]] = {kind: [] for kind in contenders}
    for _ in range(rounds):
        for kind, contender in contenders.items():
            if not case.lasting:
                # What others hold would change how shared pages are counted.
                for each in contenders.values():
                    each.close()
            if (value := contender.measure(case)) is not None:
                measured[kind].append(value)
    return {kind: statistics.median(values) if values else None for kind, values in measured.items()}


def amount(value: float | None, case: Case) -> str:
    if value is None:
        return "fails"
    return f"{value / 2**20:.1f}" if case.ratio == "size" else f"{value * 1e6:.1f}"


def ratio(value: float | None, standard: float | None, case: Case) -> str:
    if value is None or standard is None:
        return ""
    number = standard / value if case.ratio == "rate" else value / standard
    return f"{number:.3f}" if number < 0.1 else f"{number:.2f}"


def row(title: str, cells: list[str]) -> str:
    return f"{title:48}" + "".join(f"{cell:>12}" for cell in cells)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--only", help=f"one case: {', '.join(case.name for case in CASES)}")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        versions = install(folder)
        path = os.pathsep.join([str(HERE.parent), str(HERE), folder])
        contenders = {kind: Contender(kind, path) for kind in CONTENDERS}
        print(
            HEADER.format(
                python=platform.python_version(),
                processors=os.cpu_count(),
                rounds=arguments.rounds,
                versions=versions,
                fewer=FEWER,
            )
        )
        print(row("", list(CONTENDERS.values())))
        for case in CASES:
            if arguments.only not in (None, case.name):
                continue
            medians = measure_all(contenders, case, arguments.rounds)
            print(row(case.title, [amount(value, case) for value in medians.values()]))
            ratios = [ratio(value, medians["standard"], case) for value in medians.values()]
            print(row(f"    {case.ratio}", ratios), flush=True)
        for contender in contenders.values():
            contender.close()


if __name__ == "__main__":
    main()
