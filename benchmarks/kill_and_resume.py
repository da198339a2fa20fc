"""Proof that a recording survives being killed: it ends as the one that nobody killed, bit for bit.

    .venv/bin/python benchmarks/kill_and_resume.py --images SRC --model NAME --weights FILE \
        --sites residual@0 residual@1 --work FOLDER

Records the images twice with the same command line. One recording runs through. The other is sent
SIGKILL on its way, each time at a random moment after its share of the shards is there; the doctor
looks at what is left; the same command goes on. In the end every file of both stores must have the
same bytes, the doctor must be content, and batches run through the model again must give what is
stored.
"""

import argparse
import hashlib
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import torch
from measuring import machine

from visae.activations.store import ActivationStore
from visae.models.loading import load_model

BATCH = 32


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--images", required=True)
    parser.add_argument("--model", required=True)
    parser.add_argument("--weights", required=True)
    parser.add_argument("--sites", nargs="+", required=True)
    parser.add_argument("--work", type=Path, required=True, help="a folder with room for both")
    parser.add_argument("--shard-mb", default="8")
    parser.add_argument("--kills", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    chance = random.Random(given.seed)
    print(machine())
    command = record_command(given)
    whole, killed = (given.work / "activations" / name for name in ("whole", "killed"))
    for folder in (whole, killed):
        shutil.rmtree(folder, ignore_errors=True)
    seconds = run(command, whole)
    store = ActivationStore(whole)
    n_shards = store.n_shards
    print(
        f"whole: {store.n_images} images, {len(store.sites)} sites, {n_shards} shards of "
        f"{store.record.images_per_shard} images, {n_bytes(whole) / 1e9:.2f} GB, {seconds:.0f} s"
    )
    for kill in range(1, given.kills + 1):
        kill_on_the_way(command, killed, kill * n_shards // (given.kills + 1), chance)
        say_what_is_left(killed)
    print(f"resumed: {run(command, killed):.0f} s")
    code, said = doctor(killed)
    print(f"doctor, exit code {code}: {said[:160]} …")
    assert code == 0, said
    print_comparison(whole, killed)
    recompute(ActivationStore(killed), chance)


def record_command(given):
    return [
        *(sys.executable, "-m", "visae.cli", "record", "--images", given.images),
        *("--model", given.model, "--weights", given.weights, "--batch-size", str(BATCH)),
        *("--shard-mb", given.shard_mb),
        *("--site", *given.sites, "--out"),
    ]


def run(command, out):
    """Seconds of a recording that is left alone."""
    start = time.perf_counter()
    subprocess.run([*command, out], check=True, capture_output=True)
    return time.perf_counter() - start


def kill_on_the_way(command, out, n_shards, chance):
    """Start the recording and kill it up to a second after it has so many shards."""
    process = subprocess.Popen(
        [*command, out], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    while shards(out) < n_shards:
        assert process.poll() is None, "it ended before it could be killed"
        time.sleep(0.01)
    time.sleep(chance.random())
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL


def shards(out):
    return len(list((out / "shards").glob("[0-9]*.json")))


def say_what_is_left(out):
    """What the kill left, and what the doctor says of it."""
    temporary = list(out.rglob(".*.tmp"))
    code, said = doctor(out)
    print(f"killed: {shards(out)} shards are there, {len(temporary)} temporary files")
    print(f"doctor, exit code {code}: {said.splitlines()[0].rpartition('killed: ')[2]}")
    assert code == 2, said


def doctor(out):
    command = [sys.executable, "-m", "visae.cli", "doctor", out]
    found = subprocess.run(command, check=False, capture_output=True, text=True)
    return found.returncode, found.stdout.strip()


def print_comparison(whole, killed):
    """Every file of one store beside that of the same name of the other."""
    names = [
        sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file())
        for folder in (whole, killed)
    ]
    assert names[0] == names[1], set(names[0]) ^ set(names[1])
    for name in names[0]:
        digests = [sha256(folder / name) for folder in (whole, killed)]
        assert digests[0] == digests[1], name
    first, second = ActivationStore(whole), ActivationStore(killed)
    assert first.digest == second.digest
    for site in first.sites:
        for one, other in zip(first.shards(site), second.shards(site), strict=True):
            assert torch.equal(one.activations, other.activations)
    print(f"{len(names[0])} files of both stores have the same bytes; digest {first.digest[:16]}")


def sha256(path):
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def n_bytes(folder):
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def recompute(store, chance, n_batches=4):
    """Run some batches through the model again, as they were when recorded."""
    assert store.n_images == store.record.n_images_in_source, "rows are entries of the source"
    model, source = load_model(store.model, device="cpu"), store.source()
    preprocessing = store.record.preprocessing
    for _ in range(n_batches):
        shard = chance.randrange(store.n_shards)
        first = chance.randrange(-(-store.n_images_in_shard(shard) // BATCH)) * BATCH
        rows = slice(first, min(first + BATCH, store.n_images_in_shard(shard)))
        before = shard * store.record.images_per_shard
        entries = source.entries[before + rows.start : before + rows.stop]
        views = [preprocessing.view(source.load(entry.ref).pixels) for entry in entries]
        tokens = model.tokens(preprocessing.pixels(views), store.sites)
        for site in store.sites:
            stored = store.rows(site, shard, rows)
            assert torch.equal(tokens[site].to(stored.dtype), stored), (site, shard, rows)
    print(f"{n_batches} batches run again give what is stored, bit for bit, at every site")


if __name__ == "__main__":
    main()
