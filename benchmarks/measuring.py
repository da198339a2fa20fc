"""What benchmarks share: the machine, tables, child processes and environments of peers."""

import contextlib
import json
import platform
import shutil
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

_KIB = 1024


def machine() -> str:
    """Processor, threads, GPU and versions, for the line above a table."""
    import torch

    cpu = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists():
        names = [line for line in info.read_text().splitlines() if line.startswith("model name")]
        cpu = names[0].partition(": ")[2] if names else cpu
    gpu = f", {torch.cuda.get_device_name()}" if torch.cuda.is_available() else ""
    return f"{cpu}, {torch.get_num_threads()} threads{gpu}, torch {torch.__version__}"


def table_row(cells: Sequence[str]) -> str:
    """A line of a Markdown table."""
    return f"| {' | '.join(cells)} |"


def middle(values: Iterable[float]) -> float:
    """The median."""
    return statistics.median(values)


def peer_python(folder: Path, requirements: Sequence[str], version: str) -> Path:
    """The interpreter of an environment with a peer in it, made with uv or venv if need be."""
    python = folder / "bin" / "python"
    done = folder / "requirements.txt"
    if done.exists() and done.read_text().split("\n") == list(requirements):
        return python
    shutil.rmtree(folder, ignore_errors=True)
    if uv := shutil.which("uv"):
        subprocess.run([uv, "venv", "-q", "--python", version, folder], check=True)
        install = [uv, "pip", "install", "-q", "--python", python]
    else:
        name = version if "/" in version else f"python{version}"
        subprocess.run([name, "-m", "venv", folder], check=True)
        install = [python, "-m", "pip", "install", "-q"]
    subprocess.run([*install, *requirements], check=True)
    done.write_text("\n".join(requirements))
    return python


class Child:
    """A process that answers JSON lines with JSON lines, and the memory of it and its children."""

    def __init__(self, command: Sequence[object], log: Path) -> None:
        self._log = log.open("w")
        self._process = subprocess.Popen(
            [str(part) for part in command],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            text=True,
        )
        self._answer()

    def ask(self, **request: Any) -> dict[str, Any]:
        """Send one request and wait for its answer."""
        self._process.stdin.write(json.dumps(request) + "\n")
        self._process.stdin.flush()
        return self._answer()

    def ask_and_weigh(self, **request: Any) -> tuple[dict[str, Any], float]:
        """The same, with the most memory in MiB that it took above what the idle child has.

        Anonymous and shared memory are counted, each page once; pages of files are the cache's.
        """
        before = _memory(self._process.pid)
        peak = [before]
        stop = threading.Event()
        watch = threading.Thread(target=_watch, args=(self._process.pid, peak, stop))
        watch.start()
        try:
            answer = self.ask(**request)
        finally:
            stop.set()
            watch.join()
        return answer, (peak[0] - before) / _KIB

    def close(self) -> None:
        """End the process."""
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.close()
        self._process.wait()
        self._process.stdout.close()
        self._log.close()

    def _answer(self) -> dict[str, Any]:
        line = self._process.stdout.readline()
        if not line:
            sys.exit(f"A child died:\n{Path(self._log.name).read_text()[-4000:]}")
        return json.loads(line)


@contextlib.contextmanager
def children(commands: dict[str, Sequence[object]], folder: Path) -> Iterator[dict[str, Child]]:
    """Started children by name, ended with the block."""
    with contextlib.ExitStack() as stack:
        started = {}
        for name, command in commands.items():
            started[name] = Child(command, folder / f"{name}.log")
            stack.callback(started[name].close)
        yield started


def _watch(pid: int, peak: list[float], stop: threading.Event) -> None:
    while not stop.is_set():
        peak[0] = max(peak[0], _memory(pid))
        time.sleep(0.01)


def _memory(pid: int) -> float:
    """KiB of anonymous and shared memory of a process and its descendants."""
    total = 0.0
    with contextlib.suppress(OSError):
        for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
            name, _, rest = line.partition(":")
            if name in ("Pss_Anon", "Pss_Shmem"):
                total += float(rest.split()[0])
        for task in Path(f"/proc/{pid}/task").iterdir():
            for child in (task / "children").read_text().split():
                total += _memory(int(child))
    return total
