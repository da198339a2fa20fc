"""What one training step costs: visae's engines, other toolkits and the encode's product alone.

    .venv/bin/python benchmarks/training.py --threads 2 --n-features 12288 --batch 4096

Every toolkit makes its own training step (training_<toolkit>.py) on the same random low-rank
tokens, at a learning rate of 3e-4, in an environment of its own that is made at the first run, with
the versions in ``TOOLKITS``. A round starts one process after the other, a toolkit each, and has it
make every kind at one size; a step's time is the median within a process, the table's the median of
the rounds, and its ratios medians of the ratios within rounds. Memory is the most that a process
takes above what it held before the SAE was made. L0 and NMSE before and after the steps show that a
step is what it is called. Prints Markdown for RESULTS.md. All nine sizes take hours; the line above
with ``--kinds topk --rounds 3`` less than ten minutes.
"""

import argparse
import itertools
import os
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

import torch
from measuring import children, machine, middle, peer_python, table_row

TORCH = "torch==2.15.0"
KINDS = ("topk", "batch-topk", "relu", "jumprelu")
HEADER = (
    *("toolkit", "kind", "dead", "ms (range)", "visae is faster by", "of the product's speed"),
    *("peak MB", "L0 (most)", "NMSE before → after", "steps"),
)


class Toolkit(NamedTuple):
    """How a child is started."""

    script: str
    arguments: tuple[str, ...] = ()
    packages: tuple[str, ...] = ()
    """What its environment has besides torch; none for this one."""
    product: str = "product-float32"
    """The product that its encode is compared with."""
    python: str = "3.11"


TOOLKITS = {
    "product": Toolkit("product", ("bfloat16",)),
    "product-float32": Toolkit("product", ("float32",)),
    "visae": Toolkit("visae", ("auto",), product="product"),
    "visae-float32": Toolkit("visae", ("auto", "float32")),
    "visae-torch": Toolkit("visae", ("torch",), product="product"),
    "visae-reference": Toolkit("visae", ("reference",)),
    "sparsify": Toolkit("sparsify", ("adam",), ("eai-sparsify==1.3.3",)),
    "sparsify-signum": Toolkit("sparsify", ("signum",), ("eai-sparsify==1.3.3",)),
    "sae-lens": Toolkit("sae_lens", (), ("sae-lens==6.54.12",)),
    "dictionary-learning": Toolkit("dictionary_learning", (), ("dictionary-learning==0.1.0",)),
    "overcomplete": Toolkit("overcomplete", (), ("overcomplete==0.3.0", "matplotlib<3.9")),
    "saev": Toolkit("saev", (), ("saev==0.1.0",), python="3.12"),
}


class Row(NamedTuple):
    """A toolkit's SAE of some kind."""

    toolkit: str
    kind: str
    dead: float


Round = dict[Row, dict]


def main() -> None:
    options = arguments()
    torch.set_num_threads(options.threads)
    os.environ["OMP_NUM_THREADS"] = str(options.threads)
    with tempfile.TemporaryDirectory() as temporary:
        work = (options.work or Path(temporary)).resolve()
        work.mkdir(parents=True, exist_ok=True)
        commands = {name: command(TOOLKITS[name], options, work) for name in options.toolkits}
        print(f"{machine()}; d {options.d_model}, k {options.k}; {options.rounds} rounds, medians")
        for n_features, batch in itertools.product(options.n_features, options.batch):
            rounds = [
                one_round(commands, options, work, n_features, batch) for _ in range(options.rounds)
            ]
            print(f"\n{n_features:,} features, batches of {batch:,}:\n")
            print(table_row(HEADER), table_row(["---"] * len(HEADER)), sep="\n")
            for row in rounds[0]:
                print(table_row(cells(row, rounds)), flush=True)
    print(f"\nVersions: {TORCH}", *sorted(versions(rounds)), sep=", ")


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--toolkits", nargs="+", choices=TOOLKITS, default=list(TOOLKITS))
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=list(KINDS))
    parser.add_argument("--dead", type=float, nargs="+", default=[0.0, 0.1], help="for AuxK")
    parser.add_argument("--d-model", type=int, default=768)
    parser.add_argument("--n-features", type=int, nargs="+", default=[6144, 12288, 24576])
    parser.add_argument("--batch", type=int, nargs="+", default=[1024, 4096, 16384])
    parser.add_argument("--k", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=1, help="of each kind in a process")
    parser.add_argument("--warm-up", type=int, default=2, help="steps that are not timed")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--work", type=Path, help="folder of environments, to keep")
    parser.add_argument("--saev-python", default="3.12", help="version or path, for saev")
    return parser.parse_args()


def command(toolkit: Toolkit, options: argparse.Namespace, work: Path) -> list[object]:
    """What starts a toolkit's child, once its environment is there."""
    python = Path(sys.executable)
    if toolkit.packages:
        version = options.saev_python if toolkit.script == "saev" else toolkit.python
        folder = work / f"environment-{toolkit.script}"
        python = peer_python(folder, [TORCH, *toolkit.packages], version)
    script = Path(__file__).with_name(f"training_{toolkit.script}.py")
    return [python, script, *toolkit.arguments]


def one_round(
    commands: dict[str, list[object]],
    options: argparse.Namespace,
    work: Path,
    n_features: int,
    batch: int,
) -> Round:
    """Every toolkit's figures for every kind that it has, one process after the other."""
    found: Round = {}
    size = {name: getattr(options, name) for name in ("d_model", "k", "device", "threads")}
    size |= {"n_features": n_features, "batch": batch}
    size |= {"seconds": options.seconds, "warm_up": options.warm_up}
    for name, line in commands.items():
        with children({name: line}, work) as started:
            for kind, dead in itertools.product(options.kinds, options.dead):
                if dead and "topk" not in kind:
                    continue  # AuxK is of the TopK kinds
                answer = started[name].ask(**size, kind=kind, dead=dead)
                if "unsupported" not in answer:
                    found[Row(name, kind, dead)] = answer
    return found


def cells(row: Row, rounds: list[Round]) -> list[str]:
    """A row of the table."""
    times = [found[row]["seconds"] * 1e3 for found in rounds]
    before, after = rounds[0][row]["before"], rounds[0][row]["after"]
    is_product = TOOLKITS[row.toolkit].script == "product"
    learned = f"{before['nmse']:.3f} → {after['nmse']:.3f}"
    product = Row(TOOLKITS[row.toolkit].product, "topk", 0.0)
    return [
        *(row.toolkit, "—" if is_product else row.kind, f"{row.dead:.0%}"),
        f"{middle(times):.1f} ({min(times):.1f} to {max(times):.1f})",
        ratio(rounds, row, row._replace(toolkit="visae"), "{:.2f} ×"),
        ratio(rounds, product, row, "{:.0%}"),
        f"{middle(found[row]['peak'] for found in rounds):,.0f}",
        "—" if is_product else f"{after['l0']:.1f} ({after['largest']:.0f})",
        "—" if is_product else learned,
        str(rounds[0][row]["n_steps"]),
    ]


def ratio(rounds: list[Round], one: Row, other: Row, form: str) -> str:
    """The median of one row's time over another's, round by round; a dash where one is missing."""
    if one not in rounds[0] or other not in rounds[0]:
        return "—"
    return form.format(middle(found[one]["seconds"] / found[other]["seconds"] for found in rounds))


def versions(rounds: list[Round]) -> set[str]:
    """Toolkits and their versions, as installed."""
    return {f"{row.toolkit} {found['version']}" for row, found in rounds[0].items()}


if __name__ == "__main__":
    main()
