"""How long each stage of the demo takes: run it in a fresh folder, several times.

    .venv/bin/python benchmarks/demo.py --runs 5

Prints a Markdown table of the median seconds of each stage and its share of the whole, ready for
RESULTS.md, with the machine.
"""

import argparse
import json
import platform
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=int, default=5)
    runs = [run_once() for _ in range(parser.parse_args().runs)]
    total = statistics.median(sum(run.values()) for run in runs)
    print(describe_machine(), f"; {len(runs)} runs, medians\n", sep="")
    print("| stage | seconds | share |\n|---|---|---|")
    for stage in runs[0]:
        seconds = statistics.median(run[stage] for run in runs)
        print(f"| {stage} | {seconds:.1f} | {seconds / total:.0%} |")
    print(f"| **whole** | **{total:.1f}** | |")


def run_once() -> dict[str, float]:
    """Seconds of each stage in a fresh workspace."""
    with tempfile.TemporaryDirectory() as folder:
        workspace = Path(folder) / "demo"
        command = [sys.executable, "-m", "visae.cli", "demo", "--workspace", str(workspace)]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        seconds: dict[str, float] = json.loads((workspace / "seconds.json").read_text())
        return seconds


def describe_machine() -> str:
    """Processor, threads and versions."""
    import torch

    cpu = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists():
        names = [line for line in info.read_text().splitlines() if line.startswith("model name")]
        cpu = names[0].partition(": ")[2] if names else cpu
    return f"{cpu}, {torch.get_num_threads()} threads, torch {torch.__version__}"


if __name__ == "__main__":
    main()
