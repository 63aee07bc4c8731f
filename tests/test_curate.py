"""Claims
1. Each stage runs by its name, takes up the folder of the one before, and a new line in STAGES is a
   new stage; misuse is one line, exit code 2.
2. The pipeline removes planted copies and what is like the images to be judged with, and what it
   lists can be trained on.
3. Killed at any place and started again it gives the same list, bit for bit, and so do two
   processes.
"""

import os
import re
import signal
from pathlib import Path
from types import SimpleNamespace

import pytest
from conftest import TINY, finish, metrics_of, start

import curate
import curation.pieces
import train
from curation import clusters, duplicates, embed, pool
from images.data import open_images

MODULES = (curation.pieces, clusters, duplicates, embed, pool)  # all that write by save_array


def run_stage(line):
    argv = line.split()
    if argv[0] in ("embed", "run"):
        argv += ["--num_workers", "0", "--precision", "fp32", "--batch_size", "16"]
    return curate.main([*argv, *(["--device", "cpu"] if argv[0] != "plant" else [])])


# -- 1


def test_stage_after_stage(small_backbone, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    run_stage("plant shapes:30 --share 0.2")
    run_stage(f"embed folder:curations/plant/images --weights {small_backbone}")
    run_stage("dedup curations/embed --groups curations/plant/groups.csv --threshold 0.9999")
    run_stage(f"embed shapes:8:val --weights {small_backbone} --output_dir curated")
    run_stage("retrieve curations/dedup --curated curated --n_nearest 2")
    run_stage("cluster curations/dedup --n_clusters 4 --most 10")
    out = capsys.readouterr().out
    for words in ("plant: 30 images of shapes:30 and 6 copies", "embed: 36 images",
                  "dedup: 36 images", "the highest F1", "retrieve: 16 images for 8 curated",
                  "cluster: 10 of the"):
        assert words in out
    for name in ("dedup", "retrieve", "cluster"):
        folder = tmp_path / "curations" / name
        assert {"list.txt", "report.md", "stage.json"} <= set(os.listdir(folder))
        assert name == "dedup" or (folder / "page.png").exists()
        assert len(open_images(f"list:{folder}/list.txt")) > 0


def test_a_line_in_stages_is_a_stage(monkeypatch, capsys):

    def run(words, config, process):
        """Nothing, and that well."""
        return {"words": words}

    new = SimpleNamespace(run=run, Config=duplicates.Config, ARGUMENTS="ANYTHING")
    monkeypatch.setitem(curate.STAGES, "new", new)
    assert curate.main(["new", "thing", "--device", "cpu"]) == {"words": ["thing"]}
    curate.main(["--help"])
    out = capsys.readouterr().out
    assert "new        Nothing, and that well." in out and "new ANYTHING" in out


@pytest.mark.parametrize("line, words", [
    ("dedupe x", "stage 'dedupe': choose from plant, embed.*did you mean dedup?"),
    ("dedup", "dedup takes one word before its flags, here 0; python curate.py dedup FOLDER"),
    ("dedup a b", "takes one word before its flags, here 2"),
    ("dedup nothing", "POOL nothing: expected the folder of a stage|POOL .*/nothing: expected"),
    ("dedup x --treshold 0.5", "there is no flag --treshold; did you mean --threshold?"),
    ("embed folder:nowhere --weights pca_hash", "DATA folder:nowhere: there is no such folder"),
    ("embed shapes:9 --weights nothing.pth", "--weights nothing.pth"),
    ("run shapes:9 --curated shapes:9:val --weights pca_hash",
     "run shapes:9: expected images in files of their own"),
    ("embed shapes:9 --weights pca_hash --shard_size 0", "--shard_size 0: expected at least 1"),
    ("retrieve x --n_nearest 0", "--n_nearest 0: expected at least 1"),
    ("run folder:nowhere --by cluster", "DATA folder:nowhere: there is no such folder"),
    ("run shapes:9", "--curated is missing: .* or give --by cluster"),
    ("run shapes:9 --by cluster --k 0", "--k 0: expected at least 1"),
    ("run shapes:9 --by cluster --n_clusters 0", "--n_clusters 0: expected at least 1"),
    ])  # yapf: disable
def test_misuse(line, words, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as error:
        run_stage(line)
    assert error.value.code == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1 and re.search(words, lines[0]), lines


# -- 2 and 3


def pipeline(folder, backbone, by="retrieve"):
    line = f"run folder:{folder}/pool/images --curated shapes:12:val --against shapes:6:train "
    line += f"--weights {backbone} --by {by} --n_clusters 4 --most 12 --shard_size 16 "
    return f"{line} --hash_threshold 0.96 --threshold 0.9 --relative_threshold 0.8"


@pytest.fixture(scope="module")
def whole(small_backbone, tmp_path_factory):
    """A folder in which both kinds of the pipeline have run, on a pool of 40 images and copies."""
    folder = tmp_path_factory.mktemp("pipeline")
    line = f"plant shapes:40 --share 0.25 --output_dir {folder}/pool --edits"
    curate.main([*line.split(), "jpeg 75"])
    for by in ("retrieve", "cluster"):
        run_stage(f"{pipeline(folder, small_backbone, by)} --output_dir {folder}/{by}")
    return folder


def test_the_pipeline(whole, small_backbone):
    names = {
        Path(name).name
        for name in open_images(f"list:{whole}/retrieve/4-dedup/list.txt").names}
    assert 10 < len(names) < 40  # some are like those to be judged with
    for i in range(6):  # these six are in --against, and so are their copies
        assert f"{i:07d}.png" not in names and f"{i:07d}_copy.png" not in names
    for name in names:  # of an image and its copy one is left
        assert name.replace("_copy", "") == name or name.replace("_copy", "") not in names
    for by in ("retrieve", "cluster"):
        listed = open_images(f"list:{whole}/{by}/6-{by}/list.txt")
        assert 0 < len(listed) and {Path(name).name for name in listed.names} <= names
        assert listed.classes and len(listed.read(0)) == 3

        # The report goes back over both lists to the hash.
        text = (whole / by / f"6-{by}/report.md").read_text()
        titles = ["embed", "dedup", "embed", "dedup", "embed", by]
        assert re.findall(r"^## (\w+) \(", text, re.M) == titles


def test_the_pipeline_without_a_network(whole, tmp_path):
    line = f"run folder:{whole}/pool/images --curated shapes:8:val --weights pca_hash "
    run_stage(f"{line} --threshold 0.99 --output_dir {tmp_path}/hash")
    assert 0 < len(open_images(f"list:{tmp_path}/hash/6-retrieve/list.txt"))


def test_what_it_lists_can_be_trained_on(whole, tmp_path):
    line = f"--data list:{whole}/retrieve/6-retrieve/list.txt --batch_size_per_gpu 4 --epochs 1 "
    train.main([*TINY, *line.split(), "--output_dir", str(tmp_path / "run")])
    assert len(metrics_of(tmp_path / "run")) > 1


def killed_again_and_again(rank, line, lives_file):
    """Goes on where it was, and kills itself: after eight files, after sixteen, ..."""
    # In each life it comes further, because the pieces of the lives before are there.
    written = []
    save = curation.pieces.save_array
    with open(lives_file, "a") as file:
        file.write("life\n")
    last = 8 * len(Path(lives_file).read_text().split())

    def save_or_die(path, array):
        if len(written) == last:
            os.kill(os.getpid(), signal.SIGKILL)
        written.append(path)
        save(path, array)

    for module in MODULES:
        module.save_array = save_or_die
    run_stage(line)


def contents(folder):
    """Features, neighbours, rows and lists, bit for bit. What is JSON names the folder itself."""
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in folder.rglob("*") if path.suffix == ".npy" or path.name == "list.txt"}


def test_killed_and_started_again(whole, small_backbone, tmp_path):
    os.symlink(whole / "pool", tmp_path / "pool")
    for by in ("retrieve", "cluster"):
        line = f"{pipeline(whole, small_backbone, by)} --output_dir {tmp_path}/{by}"
        lives = tmp_path / f"lives-{by}"
        while True:
            process, = start(killed_again_and_again, line, str(lives), world=1)
            process.join()
            if process.exitcode == 0:
                break
            assert process.exitcode == -signal.SIGKILL
        assert len(lives.read_text().split()) >= 3
        assert contents(tmp_path / by) == contents(whole / by)


def pipeline_of_a_rank(rank, line):
    run_stage(line)


def test_two_processes_give_the_list_of_one(whole, small_backbone, tmp_path):
    line = f"{pipeline(whole, small_backbone, 'cluster')} --output_dir {tmp_path}/cluster"
    finish(start(pipeline_of_a_rank, line))
    assert contents(tmp_path / "cluster") == contents(whole / "cluster")
