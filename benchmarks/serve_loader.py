"""A child of activations.py: one way of reading activations, in whichever environment has it.

    python serve_loader.py KIND FOLDER

``KIND`` is files (a plain sequential read), visae, saev (its repository's shuffled loader) or
saev-0.1.0 (PyPI). Every request is a JSON line; ``look`` gives the entropies of the first batches
and the seconds until the first of them, ``run`` tokens and seconds from the first batch on.
"""

import itertools
import json
import pathlib
import sys
import time

import torch

LOOKED_AT = 20


def main():
    kind, folder = sys.argv[1], pathlib.Path(sys.argv[2])
    if kind == "files":
        begin, serve = None, None
    else:
        begin = {"visae": visae, "saev": saev, "saev-0.1.0": saev_of_2025}[kind]()
        serve = {"look": look, "run": run}
    answer({"ready": True})
    for line in sys.stdin:
        request = json.loads(line)
        do = request.pop("do")
        answer(read_files(folder) if kind == "files" else serve[do](begin, folder, **request))


def answer(found):
    print(json.dumps(found), flush=True)


def look(begin, folder, *, batch_size, buffer_bytes):
    """Entropies in nats of the first batches, and when the first came."""
    start = time.perf_counter()
    batches = begin(folder, batch_size, buffer_bytes)
    entropies, first = [], None
    for activations, images, positions in itertools.islice(batches, LOOKED_AT):
        first = first or time.perf_counter() - start
        check(activations, images, positions)
        entropies.append([entropy(images), entropy(positions)])
    batches.close()
    return {"first": first, "entropies": entropies}


def run(begin, folder, *, batch_size, buffer_bytes, n_batches):
    """Tokens and seconds of the batches after the first."""
    start = time.perf_counter()
    batches = begin(folder, batch_size, buffer_bytes)
    next(batches)
    first = time.perf_counter()
    n_tokens = sum(len(batch[0]) for batch in itertools.islice(batches, n_batches))
    seconds = time.perf_counter() - first
    batches.close()
    return {"tokens": n_tokens, "seconds": seconds, "first": first - start}


def check(activations, images, positions):
    """The tokens are those that the loader says they are (see numbered.py)."""
    named = activations[:, :3].double().round()
    assert torch.equal(named[:, 0] * 256 + named[:, 1], images.double()), "wrong images"
    assert torch.equal(named[:, 2], positions.double()), "wrong positions"


def entropy(values):
    share = torch.unique(values, return_counts=True)[1].double() / len(values)
    return -float((share * share.log()).sum())


def read_files(folder):
    """Every file once into memory that is there already, and once into memory of its own."""
    paths = sorted(folder.iterdir())
    memory = torch.empty(max(path.stat().st_size for path in paths), dtype=torch.uint8)
    view = memoryview(memory.fill_(0).numpy())
    start = time.perf_counter()
    n_bytes = 0
    for path in paths:
        with path.open("rb", buffering=0) as file:
            while n_read := file.readinto(view):
                n_bytes += n_read
    again = time.perf_counter()
    for path in paths:
        path.read_bytes()
    return {
        "bytes": n_bytes,
        "seconds": again - start,
        "fresh_seconds": time.perf_counter() - again,
    }


def visae():
    from visae.activations.loaders import ShuffledTokens
    from visae.activations.store import ActivationStore

    def begin(folder, batch_size, buffer_bytes):
        store = ActivationStore(folder)
        (site,) = store.sites
        loader = ShuffledTokens(store, site, batch_size=batch_size, buffer_bytes=buffer_bytes)
        for batch in loader:
            yield batch.activations[site], batch.images, batch.positions

    return begin


def saev():
    from saev.data import shuffled

    def begin(folder, batch_size, buffer_bytes):
        config = shuffled.Config(
            shards=folder, tokens="content", layer=9, batch_size=batch_size, drop_last=True
        )
        for batch in shuffled.DataLoader(config):
            yield batch["act"], batch["example_idx"], batch["token_idx"] + 1

    return begin


def saev_of_2025():
    from saev import config
    from saev.activations import Dataset

    def begin(folder, batch_size, buffer_bytes):
        data = config.DataLoad(
            shard_root=str(folder), patches="patches", layer=9, scale_mean=False, scale_norm=False
        )
        loader = torch.utils.data.DataLoader(
            Dataset(data), batch_size=batch_size, shuffle=True, num_workers=2
        )
        for batch in loader:
            yield batch["act"], batch["image_i"], batch["patch_i"] + 1

    return begin


if __name__ == "__main__":
    main()
