"""Print one table: this package and Flask-Executor 1.0.0 beside a bare ThreadPoolExecutor.

.. code-block:: console

    $ python benchmarks/compare.py            # some minutes; --rounds 3 for a glance

Each contender has a process of its own. The rounds are interleaved, contender by contender, so that a machine
that slows down slows down all of them; what is printed are medians, and ratios of medians, of one run.
"""

from __future__ import annotations

import argparse
import os
import platform
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

HERE = Path(__file__).resolve().parent

#: case, how many jobs a round, what it is called in the table
CASES = [
    ("bulk_1", 5000, "bulk submit and complete, one worker, per job"),
    ("bulk_6", 5000, "the same, six workers"),
    ("round_trip", 1000, "round trip, one right after the other"),
    ("round_trip_paced", 300, "round trip, one every millisecond"),
    ("map_6", 20000, "map of 20,000, six workers, per item"),
    ("map_6_chunks", 20000, "the same with chunksize=16"),
    ("done", 100000, "future.done()"),
    ("wait_finished", 10000, "wait() over 10,000 finished, per future"),
    ("membership", 10000, "future in executor.futures, 10,000 held"),
]


class Contender:
    """A process that runs ``contender.py``."""

    def __init__(self, kind: str, path: Path) -> None:
        self._process = subprocess.Popen(
            [sys.executable, str(HERE / "contender.py"), kind],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,  # Flask-Executor's map fills it with tracebacks
            text=True,
            env={**os.environ, "PYTHONPATH": str(path)},
        )

    def time(self, case: str, count: int) -> float | None:
        """Seconds for one unit; None when the case fails."""
        assert self._process.stdin and self._process.stdout
        print(case, count, file=self._process.stdin, flush=True)
        answer = self._process.stdout.readline()
        if not answer or answer.startswith("fails"):
            return None
        return float(answer) / (1 if case == "membership" else count)

    def close(self) -> None:
        """End the process."""
        assert self._process.stdin
        self._process.stdin.close()
        self._process.wait()


def microseconds(seconds: float | None) -> str:
    return "fails" if seconds is None else f"{seconds * 1e6:.2f}"


def ratio(a: float | None, b: float | None) -> str:
    return "" if a is None or b is None else f"{a / b:.2f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--only", help="one case")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        print("Installing flask-executor 1.0.0 for comparison ...", file=sys.stderr)
        subprocess.run(
            [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--target", folder, "flask-executor==1.0.0"],
            check=True,
        )
        contenders = {
            "bare": Contender("bare", HERE.parent),
            "1.0.0": Contender("flask_executor", Path(folder)),
            "ours": Contender("flask_executor", HERE.parent),
        }
        print(
            f"Python {platform.python_version()}, {os.cpu_count()} processors, {arguments.rounds} rounds, microseconds"
        )
        print(f"{'':48} {'bare':>8} {'1.0.0':>9} {'ours':>8} {'1.0.0/bare':>11} {'ours/bare':>10} {'ours/1.0.0':>11}")
        for case, count, title in CASES:
            if arguments.only not in (None, case):
                continue
            times: dict[str, list[float]] = {name: [] for name in contenders}
            for _ in range(arguments.rounds):
                for name, contender in contenders.items():
                    if (seconds := contender.time(case, count)) is not None:
                        times[name].append(seconds)
            bare, old, ours = (statistics.median(times[name]) if times[name] else None for name in contenders)
            print(
                f"{title:48} {microseconds(bare):>8} {microseconds(old):>9} {microseconds(ours):>8} "
                f"{ratio(old, bare):>11} {ratio(ours, bare):>10} {ratio(ours, old):>11}",
                flush=True,
            )
        for contender in contenders.values():
            contender.close()


if __name__ == "__main__":
    main()
