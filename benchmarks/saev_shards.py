"""Tokens of a store in saev's shard format, for its loaders: a part of activations.py."""

import json
import os

import numpy as np
from numbered import SITE


def as_saev_shards(store, work, peer):
    """The same tokens in saev's format, eight shards; the older metadata for the older release."""
    folder = work / "saev" / "shards" / f"{peer}-{store.n_images}-{store.site(SITE).d_model}"
    if (folder / "shards.json").exists():
        return folder
    folder.mkdir(parents=True, exist_ok=True)
    write_metadata(store, folder, peer)
    per_shard = store.n_images // 8
    first = work / "saev" / "shards" / f"saev-{store.n_images}-{store.site(SITE).d_model}"
    files = [folder / f"acts{i:06}.bin" for i in range(8)]
    if peer != "saev" and (first / "shards.json").exists():
        for file in files:
            os.link(first / file.name, file)
    else:
        write_tokens(store, files, per_shard)
    entries = [{"name": file.name, "n_examples": per_shard} for file in files]
    (folder / "shards.json").write_text(json.dumps(entries))
    return folder


def write_tokens(store, files, per_shard):
    shape = per_shard, 1, 197, store.site(SITE).d_model
    for i, file in enumerate(files):
        out = np.memmap(file, mode="w+", dtype=np.float32, shape=shape)
        for row in range(per_shard):
            out[row, 0] = store.image(SITE, i * per_shard + row).float().numpy()
        out.flush()


def write_metadata(store, folder, peer):
    d_model, n_images = store.site(SITE).d_model, store.n_images
    n_tokens = n_images // 8 * 197
    if peer == "saev":
        found = {
            "family": "clip", "ckpt": "numbered", "layers": [9], "content_tokens_per_example": 196,
            "cls_token": True, "d_model": d_model, "n_examples": n_images,
            "max_tokens_per_shard": n_tokens, "data": "", "dataset": "/", "pixel_agg": None,
            "dtype": "float32", "protocol": "2.1",
        }  # fmt: skip
    else:
        found = {
            "vit_family": "clip", "vit_ckpt": "numbered", "layers": [9], "n_patches_per_img": 196,
            "cls_token": True, "d_vit": d_model, "seed": 0, "n_imgs": n_images,
            "n_patches_per_shard": n_tokens, "data": "",
        }  # fmt: skip
    (folder / "metadata.json").write_text(json.dumps(found))
