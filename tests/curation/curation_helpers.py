"""A pool made of given features, as `curate.py embed` would have left it."""

import numpy as np
import torch

from curation.embed import write_pool
from curation.pieces import save_array
from curation.pool import open_pool
from images.data import Images
from machinery.process import Process

CPU = Process(torch.device("cpu"))


def unit_rows(n, width, seed=0):
    """Random features of unit length, float16 as they are kept."""
    rows = np.random.default_rng(seed).normal(size=(n, width))
    return (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float16)


def make_pool(folder, features, labels=None, classes=None, size=7, weights="a", broken=()):
    """The folder of `embed` for these features, in files of `size` rows -> the Pool."""
    (folder / "features").mkdir(parents=True)
    features = features.copy()
    features[list(broken)] = 0
    for i, start in enumerate(range(0, len(features), size)):
        save_array(folder / "features" / f"{i:06d}.npy", features[start:start + size])
    names = [f"{i:04d}.png" for i in range(len(features))]
    images = Images("folder", None, names, labels, classes, root=folder / "images")
    rows = np.delete(np.arange(len(features)), list(broken))
    facts = {
        "stage": "embed", "images": len(rows), "broken": len(broken), "data": "folder:images",
        "data_root": "data", "root": str(images.root), "classes": classes, "shard_size": size,
        "names_sha256": "", "embedding": {"weights": weights}}
    write_pool(folder, images, rows, facts)
    return open_pool(str(folder))
