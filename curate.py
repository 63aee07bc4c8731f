"""Curate: from a large pool of images to a list of those that are worth training on.

    pool --> embed --> dedup --> retrieve, or cluster --> list.txt --> train.py --data list:FILE
               |         |           |
           features   copies of   images like those of a curated set, or of every
           on disk    each other  concept equally many
                      and of tests

Idea     DINOv2 learned from 142 million images that were chosen out of 1.2 billion, without any
         label: by their features alone. Each stage below reads the folder of the one before and
         writes one of its own, in pieces: what was killed goes on where it was.
Paper    DINOv2 sec. 3 and appendix A; the code and the images were never released
Try      python curate.py plant shapes:200 --output_dir curations/pool
         python curate.py embed folder:curations/pool/images --weights pca_hash
         python curate.py dedup curations/embed --groups curations/pool/groups.csv
Change   a stage is one file in curation/ with a Config and a `run`, and one line in STAGES
Tests    pytest tests/test_curate.py
"""

import dataclasses
from dataclasses import dataclass
from itertools import takewhile
from pathlib import Path
from typing import Literal

from curation import clusters, duplicates, embed, plant, retrieve
from machinery.flags import UsageError, command, did_you_mean, parse, user_errors
from machinery.process import Process, resolve_precision, start_process

# Each of these modules has ARGUMENTS, the words behind its name; a dataclass Config, its flags;
# and a function run(words, config, process), which writes a folder and returns its stage.json.
STAGES = {
    "plant": plant, "embed": embed, "dedup": duplicates, "retrieve": retrieve,
    "cluster": clusters}

# ----------------------------------------------------------------------------------------------
# The whole pipeline

RUN_ARGUMENTS = "DATA --curated DATA --weights RUN_OR_FILE_OR_NAME"


@dataclass
class RunConfig(embed.Config):
    # -- pipeline
    curated: str = ""  # images that are to be had more of; --by cluster: empty for all equally
    output_dir: str = ""  # the folder for the folders of the stages; empty: curations/run
    against: tuple[str, ...] = ()  # images to be judged with, which no training may have seen
    by: Literal["retrieve", "cluster"] = "retrieve"  # nearest images, or whole clusters
    hash_threshold: float = 0.95  # cosine of two PCA hashes above which images are the same file
    dedup_weights: str = ""  # the network that copies are found by; empty: --weights
    threshold: float = 0.6  # cosine above which images are copies; see docs/curation.md
    relative_threshold: float = 0.45  # the same beside --against
    k: int = 64  # how many nearest images of each are looked at for copies
    n_nearest: int = 4  # retrieve: images of the pool for each curated one
    n_clusters: int = 100  # cluster: how many there are
    per_cluster: int = 10_000  # cluster: images of each, at most
    most: int = 1_000_000  # cluster: images altogether, at most
    with_curated: bool = False  # list the curated images, too, behind those of the pool
    seed: int = 0  # cluster: of the first centroids, and of what is drawn
    search: Literal["exact", "faiss"] = "exact"  # compare all, or ask FAISS
    # Which description is used follows from the stage.
    descriptor: str = dataclasses.field(default="class",
                                        metadata={"no_flag": True})  # not a flag
    whiten: bool = dataclasses.field(default=False, metadata={"no_flag": True})  # not a flag
    axes_of: str = dataclasses.field(default="", metadata={"no_flag": True})  # not a flag

    def check(self):
        super().check()
        if self.by == "retrieve" and not self.curated:
            raise UsageError(
                "--curated is missing: the images that are to be had more of, such as "
                "folder:PATH; or give --by cluster, for all concepts equally")

        # A wrong flag of the last stage is refused before the first one has begun.
        for module in (embed, duplicates, retrieve, clusters):
            self.config_of(module).check()

    def config_of(self, module, **values):
        """The configuration of a stage: these values, and the flags that both have."""
        # Flags of the pipeline have the names that they have in the stages.
        for field in dataclasses.fields(module.Config):
            if hasattr(self, field.name):
                values.setdefault(field.name, getattr(self, field.name))
        return module.Config(**values)


def run_all(words: list[str], config: RunConfig, process: Process) -> dict:
    """All stages, from DATA to a list: hash, copies, and what is like --curated."""
    folder = Path(config.output_dir or "curations/run")

    # From the second stage on a stage begins with the list of the one before it. The hash would be
    # computed for nothing if no list could name the images.
    if words[0].partition(":")[0] not in ("folder", "list"):
        raise UsageError(
            f"run {words[0]}: expected images in files of their own, which a list can "
            "name: folder:PATH or list:FILE")

    def stage(module, name: str, words: list[str], **values) -> str:
        """Run a stage with the flags of the pipeline, and these values -> its folder."""
        stage_config = config.config_of(module, output_dir=str(folder / name), **values)
        module.run(words, stage_config, process)
        return stage_config.output_dir

    # What is there twice bit by bit, or nearly so, is removed by the hash, which needs no
    # network. Everything after it costs less by that much.
    hashed = stage(embed, "1-hash", words, weights=embed.HASH, descriptor="class")
    unique = stage(duplicates, "2-hash-dedup", [hashed], threshold=config.hash_threshold,
                   against=())

    # Copies are found by class token and GeM, whitened on the pool. What is judged with gets
    # the axes of the pool, or its features could not be compared with those of the pool.
    network = config.dedup_weights or config.weights
    described = stage(embed, "3-copies", [f"list:{unique}/list.txt"], weights=network,
                      descriptor="copy", whiten=True)
    references = []
    for number, data in enumerate(config.against):
        references.append(
            stage(embed, f"3-against-{number}", [data], weights=network, descriptor="copy",
                  axes_of=described))
    cleaned = stage(duplicates, "4-dedup", [described], against=tuple(references))

    # What shows similar things has a similar class token.
    embedded = stage(embed, "5-class", [f"list:{cleaned}/list.txt"], descriptor="class")
    curated = ""
    if config.curated:
        # The axes of a PCA hash are learned on the pool, too.
        axes_of = embedded if config.weights == embed.HASH else ""
        curated = stage(embed, "5-curated", [config.curated], descriptor="class",
                        axes_of=axes_of)
    by = retrieve if config.by == "retrieve" else clusters
    last = stage(by, f"6-{config.by}", [embedded], curated=curated)
    process.print(f"train on it: python train.py --data list:{last}/list.txt")
    return {"folder": last}


# ----------------------------------------------------------------------------------------------
# The command line

USAGE = "python curate.py STAGE DATA_OR_FOLDER [--flag ...]"


def choose_stage(argv: list[str]):
    """The first word -> (name, words behind it, dataclass of its flags, its function).

    UsageError with the names of the stages if it is none of them.
    """
    # `run` is no stage but all of them, and stands beside the table.
    names = [*STAGES, "run"]
    if not argv or argv[0] not in names:
        given = argv[0] if argv else ""
        raise UsageError(f"stage {given!r}: choose from {', '.join(names)}; {USAGE}"
                         f"{did_you_mean(given, names)}")
    if argv[0] == "run":
        return "run", RUN_ARGUMENTS, RunConfig, run_all
    stage = STAGES[argv[0]]
    return argv[0], stage.ARGUMENTS, stage.Config, stage.run


def overview() -> str:
    """What `python curate.py` prints: the stages, and how to see the flags of one."""
    # What a stage does is the first line of the docstring of its function.
    lines = [f"usage: {USAGE}", "", "STAGE is one of"]
    for name in [*STAGES, "run"]:
        _, words, _, function = choose_stage([name])
        lines.append(f"  {name:10s} {function.__doc__.splitlines()[0]}")
        lines.append(f"             {name} {words}")
    lines += ["", "python curate.py STAGE --help lists the flags of that stage"]
    return "\n".join(lines)


def read_flags(argv: list[str]):
    """The whole command line -> (words, configuration, function), checked."""
    # The pool is the one word before the first flag.
    name, arguments, config_class, function = choose_stage(argv)
    usage = f"python curate.py {name} {arguments} [--flag ...]"
    words = list(takewhile(lambda word: not word.startswith("-"), argv[1:]))
    config = parse(config_class, argv[1 + len(words):], usage=usage)
    if len(words) != 1:
        raise UsageError(f"{name} takes one word before its flags, here {len(words)}; {usage}")
    config.check()
    return words, config, function


@command
def main(argv):
    if argv[:1] in ([], ["-h"], ["--help"]):
        print(overview())
        return None
    words, config, function = read_flags(argv)
    # Where a network is run, the precision is that of the evaluations.
    process = start_process(config.device)
    if hasattr(config, "precision"):
        config.precision = resolve_precision(config.precision, process.device, ("tf32",))
    with user_errors():
        return function(words, config, process)


if __name__ == "__main__":
    main()
