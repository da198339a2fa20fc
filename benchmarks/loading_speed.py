"""The shuffled loader beside plain reads and beside saev: a part of activations.py."""

import sys
from pathlib import Path

import numpy as np
from measuring import children, middle, peer_python, table_row
from numbered import SITE, NumberedImages, NumberedModel
from saev_shards import as_saev_shards

from visae.activations.format import RecordConfig
from visae.activations.record import record
from visae.models.config import ModelConfig

HEADER = (
    *("reader", "tokens/s", "of the plain read", "visae is", "first batch, s", "peak MiB"),
    *("image entropy, first / mean of 20", "position entropy"),
)


def measure_loading(arguments, work):
    store = numbered_store(arguments, work)
    n_tokens = store.n_tokens(SITE)
    python = {"files": sys.executable, "visae": sys.executable}
    folders = {"files": store.folder / SITE, "visae": store.folder}
    for peer in arguments.peers:
        if peer != "none":
            needs = ["torch", "numpy", arguments.saev if peer == "saev" else "saev==0.1.0"]
            python[peer] = peer_python(work / f"environment-{peer}", needs, arguments.peer_python)
            folders[peer] = as_saev_shards(store, work, peer)
    serve = Path(__file__).parent / "serve_loader.py"
    commands = {name: [python[name], serve, name, folders[name]] for name in python}
    with children(commands, work) as started:
        print(
            f"{store.n_images} images of 197 tokens, d {arguments.d_model}: {n_tokens:,} tokens, "
            f"{store_bytes(store) / 2**20:.0f} MiB; batches of {arguments.batch_size}, "
            f"buffer {arguments.buffer_mb} MiB.\n"
        )
        warm_up(started, folders)
        looked = {n: look(started[n], arguments, store) for n in started if n != "files"}
        rounds = [load_round(started, arguments, n_tokens) for _ in range(arguments.rounds)]
        print_loaders(rounds, looked)
        print_entropies(started["visae"], arguments, store)


def warm_up(started, folders):
    """Bring every file into the page cache."""
    started["files"].ask(do="run")
    for folder in folders.values():
        for path in folder.glob("*.bin"):
            path.read_bytes()


def load_round(started, arguments, n_tokens):
    """Tokens per second of every loader, one after the other, the plain read before and after."""
    options = load_options(arguments)
    n_batches = {"visae": 3 * n_tokens, "saev": 48 * 4096, "saev-0.1.0": 12 * 4096}
    rates = {}
    before = started["files"].ask(do="run")
    for name in started:
        if name == "files":
            continue
        wanted = n_batches[name] // arguments.batch_size
        found = started[name].ask(do="run", n_batches=wanted, **options)
        rates[name] = found["tokens"] / found["seconds"]
    after = started["files"].ask(do="run")
    for name, key in (("files", "seconds"), ("files, new memory each", "fresh_seconds")):
        rates[name] = n_tokens * 2 / (before[key] + after[key])
    return rates


def look(child, arguments, store):
    """First-batch seconds, peak memory, and entropies relative to uniform sampling."""
    found, peak = child.ask_and_weigh(do="look", **load_options(arguments))
    images, positions = relative(found["entropies"], arguments.batch_size, store)
    return {"first": found["first"], "peak": peak, "images": images, "positions": positions}


def load_options(arguments):
    return {"batch_size": arguments.batch_size, "buffer_bytes": arguments.buffer_mb * 2**20}


def relative(entropies, batch_size, store):
    """(first batch, mean) of the entropies of images and of positions, over uniform sampling's."""
    per_image = store.tokens_per_image(SITE)
    generator = np.random.default_rng(0)
    uniform = []
    for _ in range(8):
        drawn = generator.choice(store.n_images * per_image, batch_size, replace=False)
        uniform.append([entropy(drawn // per_image), entropy(drawn % per_image)])
    ratio = np.array(entropies) / np.mean(uniform, axis=0)
    return [(float(ratio[0, i]), float(ratio[:, i].mean())) for i in range(2)]


def entropy(values):
    share = np.unique(values, return_counts=True)[1] / len(values)
    return -float((share * np.log(share)).sum())


def print_loaders(rounds, looked):
    print(table_row(HEADER), table_row(["---"] * len(HEADER)), sep="\n")
    for name in rounds[0]:
        rate = middle(found[name] for found in rounds)
        share = middle(found[name] / found["files"] for found in rounds)
        factor = middle(found["visae"] / found[name] for found in rounds)
        cells = [name, f"{rate:,.0f}", f"{share:.2f}", f"{factor:.1f} ×"]
        if name in looked:
            cells += [f"{looked[name]['first']:.2f}", f"{looked[name]['peak']:.0f}"]
            cells += [
                f"{a:.3f} / {b:.3f}" for a, b in (looked[name]["images"], looked[name]["positions"])
            ]
        else:
            cells += ["—"] * 4
        print(table_row(cells))
    print()


def print_entropies(child, arguments, store):
    """Image and position entropy of visae's batches at several sizes of batch and buffer."""
    print("Entropy of the first batch over uniform sampling's (images / positions):\n")
    sizes = (1024, 4096, 16384)
    print("| buffer MiB | " + " | ".join(f"batch {size}" for size in sizes) + " |")
    print("|---|" + "---|" * len(sizes))
    for buffer_mb in (256, 512, 1024, 2048, 4096):
        cells = []
        for size in sizes:
            found = child.ask(do="look", batch_size=size, buffer_bytes=buffer_mb * 2**20)
            images, positions = relative(found["entropies"], size, store)
            cells.append(f"{images[0]:.3f} / {positions[0]:.3f}")
        print(f"| {buffer_mb} | {' | '.join(cells)} |", flush=True)
    print()


def numbered_store(arguments, work):
    """A store of numbered tokens, recorded as any other."""
    folder = work / f"numbered-{arguments.store_mb}-{arguments.d_model}"
    model = NumberedModel(arguments.d_model)
    n_images = arguments.store_mb * 2**20 // (197 * arguments.d_model * 2) // 8 * 8
    config = RecordConfig(sites=(SITE,), tokens="all", batch_size=128)
    name = ModelConfig(model="benchmark/numbered")
    return record(NumberedImages(n_images), model, folder, config=config, model_config=name)


def store_bytes(store):
    return sum(path.stat().st_size for path in (store.folder / SITE).iterdir())
