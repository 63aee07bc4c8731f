"""Export: the class tokens of a folder of images, as a table for any other program.

    --data folder:PHOTOS --> features.npy (n, D) float32, features.txt: a name per row

Idea     Search, clustering and curation begin with a table of features, and have programs of
         their own. A .npy file is one line to read in Python: numpy.load("features.npy").
Paper    none
Try      python evaluate.py features --weights RUN --data folder:PHOTOS --output features.npy
Change   another file format: the two lines of `run` that write
Tests    pytest tests/evaluation/test_export.py

Letters  n images, D width.
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from evaluation import protocol
from evaluation.protocol import Extractor
from machinery.checkpoints import write_text
from machinery.flags import UsageError


@dataclass
class Config(protocol.Config):
    # -- features
    output: str = "features.npy"  # the file; the names of the images go beside it as .txt


def run(extractor: Extractor) -> dict:
    """Class tokens of --data as a float32 .npy (n, D), and the list of its files beside it."""
    config = extractor.config
    process = extractor.process

    # Refused before the features are computed, which may take hours: numpy would add ".npy" to
    # another name by itself, and the table would not be where it was asked for.
    images = extractor.open("data")
    output = Path(config.output)
    if output.suffix != ".npy":
        raise UsageError(f"--output {output}: expected a name that ends in .npy")

    # The names of the rows lie beside the table. Where there is no table yet, a file of that name
    # is somebody else's, and may be the list that --data names.
    names = output.with_suffix(".txt")
    if names.exists() and not output.exists():
        raise UsageError(
            f"--output {output}: the names of its rows would overwrite {names}, which "
            "has no table beside it; give another name")

    # Every process has all rows, in the order of the names; one of them writes.
    rows = extractor(images, "features")
    if process.main:
        output.parent.mkdir(parents=True, exist_ok=True)
        np.save(output, rows.numpy())
        write_text(names, "".join(f"{name}\n" for name in images.names))
    process.print(f"wrote {output} {tuple(rows.shape)}, and {names} with a name per row")
    return {"features": {"file": str(output), "shape": list(rows.shape)}}
