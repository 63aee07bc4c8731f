"""Card: what a run was, on one page that can go with its weights.

    config.json, summary.json, metrics.jsonl, code/ --> card.md

Idea     Weights that are handed on need to be told what they are: what they learned from, how,
         and how good they were found to be. The files of a run know all of it, and the card
         says nothing that is not in them.
Paper    model cards (Mitchell 2019)
Try      python train.py      and read card.md in the folder of the run
Change   a line of the card is one entry of the list in card_text
Tests    pytest tests/training/test_card.py
"""

import hashlib
import json
import shlex
from pathlib import Path

from augment import channel_stats_of
from backbones.convnet import CONVNETS
from machinery.checkpoints import write_text
from training.config import NEUTRAL, Config


def code_digest(folder: Path) -> str:
    """SHA-256 of the names and the content of all files in a folder: which version it is."""
    # The names count, too: a file that was moved makes another version.
    digest = hashlib.sha256()
    for file in sorted(folder.rglob("*.py")):
        digest.update(file.relative_to(folder).as_posix().encode() + file.read_bytes())
    return digest.hexdigest()


def flag_text(name: str, value) -> str:
    """A flag as it is typed: use_bn_in_head, False -> --use_bn_in_head false."""
    if isinstance(value, list):  # two ends of a range, or one number for each channel
        return f"--{name} {' '.join(map(str, value))}"
    if isinstance(value, bool):
        return f"--{name} {str(value).lower()}"
    return f"--{name} {shlex.quote(str(value))}"  # a path may have blanks in it, or be empty


def network_text(config: dict) -> str:
    """The network and the images that it takes, in a sentence each."""
    # Patches, registers and feed-forward layers are those of a ViT; a convnet has only its name.
    network = f"The convnet {config['arch']}"
    if config["arch"] not in CONVNETS:
        network = (f"A Vision Transformer: {config['arch']}, patches of {config['patch_size']} "
                   f"pixels, {config['num_register_tokens']} registers, feed-forward layer "
                   f"{config['ffn_layer']}")

    # Whoever uses the network has to normalise images as the run did.
    stats = channel_stats_of(config["in_chans"], tuple(config["mean"]), tuple(config["std"]))
    return (f"{network}. It learned from crops of {config['global_crops_size']} pixels. "
            f"It takes images of {stats.channels} channels with values from 0 to 1, from which "
            f"the mean {list(stats.mean)} is subtracted and which are then divided by "
            f"{list(stats.std)}.")


def curriculum_text(config: dict, steps: int) -> str:
    """When the crops became larger, for a run with --curriculum: "20 and 15 pixels until ..."."""
    settings = {name: config[name] for name in Config.__dataclass_fields__ if name in config}
    parts = []
    for last, stage in Config(**settings).stages(steps):
        parts.append(f"{stage.global_crops_size} and {stage.local_crops_size} pixels until "
                     f"step {last:,d}")
    return ", ".join(parts)


def figures_table(summary: dict, rows: list[dict], start: str) -> list[str]:
    """What the judge of the run found: before training, and after each evaluation."""
    # Accuracies stand beside those that they have to beat: of the bare pixels, and of the network
    # that the run began with.
    protocol = summary["knn_protocol"]
    if summary["knn"] is None:
        return ["There were no images to judge the features with."]
    table = [
        f"| | {protocol} |", "|---|---|", f"| raw pixels | {summary['knn_pixels']:.1%} |",
        f"| {start} | {summary['knn_untrained']:.1%} |"]

    # An evaluation has a line of its own in metrics.jsonl: a step and the accuracy.
    for row in rows:
        if "knn" in row and row["step"] > 0:
            table.append(f"| after step {row['step']:,d} | {row['knn']:.1%} |")
    return table


def card_text(folder: Path) -> str:
    """The card of the finished run in `folder`, in Markdown."""
    config = json.loads((folder / "config.json").read_text())
    summary = json.loads((folder / "summary.json").read_text())
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]

    # The preset and the flags are the recipe, but for flags that cannot change the result, such
    # as --num_workers.
    flags = [
        f"`{flag_text(name, config[name])}`" for name in config["given"] if name not in NEUTRAL]

    # A loss belongs to the run if its weight is not 0: "dino 1, koleo 0.1".
    weights = [
        f"{name.removesuffix('_weight')} {value:g}" for name, value in config.items()
        if name.endswith("_weight") and value]

    # What was left empty has a meaning of its own: images are held out, and weights are random.
    judged = "images of the same, held out by their names" if config["val_share"] else "nothing"
    if config["val_data"]:
        judged = f"`{config['val_data']}`"
    start = "before training"
    if config["init"]:
        start = f"{config['init']}, {start}"

    # Other networks that it has learned from, or begun with, whether a flag or the preset named
    # them.
    sources = []
    if config.get("teacher"):
        sources += [f"- Teacher: `{config['teacher']}`, SHA-256 {config['teacher_sha256']}."]
    if config["init"]:
        sources += [f"- Began with: `{config['init']}`."]

    # Stages of --curriculum are named with the steps in which they end.
    stages = []
    if config.get("curriculum"):  # runs of earlier versions do not know it
        stages = [f"- Crops: {curriculum_text(config, summary['steps'])}."]

    # From what it is to what came of it; the version of the code stands at the end of the list.
    # TO ADD A LINE: one entry more, made of config, summary or rows.
    collapse = "collapsed" if summary["collapsed"] else "no collapse of the targets was found"
    lines = [
        f"# {folder.name}", "",
        network_text(config), "", f"- Data: `{config['data']}`, judged with {judged}.",
        f"- Recipe: preset `{config['preset']}`, {', '.join(flags) or 'no flags'}.",
        f"- Losses and their weights: {', '.join(weights)}; centering {config['centering']}.",
        *sources, *stages,
        f"- Length: {summary['steps']:,d} steps of {config['global_batch']} images, seed "
        f"{config['seed']}, {summary['minutes']:.1f} minutes on {summary['device']} in "
        f"{summary['precision']}.", f"- At the end: loss {summary['loss']:.3f}, {collapse}; "
        f"{summary['broken_images']} images could not be read.",
        f"- Code: the folder `code` of the run, SHA-256 {code_digest(folder / 'code')}.", "",
        *figures_table(summary, rows, start), "",
        "Made from config.json, which has every setting, summary.json and metrics.jsonl."]
    return "\n".join(lines) + "\n"


def write_card(folder: Path):
    """card.md of a finished run."""
    write_text(folder / "card.md", card_text(folder))
