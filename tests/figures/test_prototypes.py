"""Claims
1. The logits are those of the teacher's backbone and head, and the images of a row those with
   the highest.
2. Drawn are the prototypes that most images choose, by logits minus the centre.
3. A page is drawn from the directory of a run; what cannot be drawn is refused in one line.
"""

import dataclasses
import json

import pytest
import torch
from conftest import tiny_config

from augment import center_crop, normalise
from figures.prototypes import Config, draw, draw_prototypes, logits_of, most_used, open_head
from images.data import open_images
from machinery.flags import UsageError, parse
from machinery.page import pyplot
from train import Network


@pytest.fixture
def network_and_run(tmp_path):
    """A network with random weights, and what a run of it would leave behind."""
    torch.manual_seed(0)
    config = tiny_config(tmp_path / "run")
    network = Network(config).eval()
    run = tmp_path / "run"
    run.mkdir()
    stored = dataclasses.asdict(config) | {"global_batch": 8}
    (run / "config.json").write_text(json.dumps(stored))
    torch.save(network.backbone.state_dict(), run / "teacher.pt")
    centre = torch.randn(32, generator=torch.Generator().manual_seed(1))
    heads = {"centerings": {"dino.center": centre}, "dino_head": network.dino_head.state_dict()}
    torch.save(heads, run / "heads.pt")
    return network, run


def test_logits_are_those_of_the_network(network_and_run):
    network, run = network_and_run
    images = open_images("shapes:12")
    crops = torch.stack([center_crop(images.read(i), 24) for i in range(12)])
    with torch.no_grad():
        out = network([normalise(crops)])
    head, centre = open_head(run, network.backbone.embed_dim)
    logits = logits_of(head, out["features"])
    torch.testing.assert_close(logits, out["dino"])
    assert torch.equal(centre, torch.randn(32, generator=torch.Generator().manual_seed(1)))

    # The titles of a row are the highest logits of its prototype.
    uses = torch.ones(32, dtype=torch.int64)
    fig = draw_prototypes(images, logits, [3, 7], uses, 5)
    for row, k in enumerate((3, 7)):
        titles = [axis.get_title().split()[-1] for axis in fig.axes[5 * row:5 * row + 5]]
        highest = logits[:, k].sort(descending=True).values[:5]
        assert titles == [f"{x:.2f}" for x in highest.tolist()]
    pyplot().close(fig)


def test_the_most_used_prototypes():
    logits = torch.tensor([[3.0, 1, 0, 0], [3, 2, 0, 0], [3, 0, 2, 0]])
    assert most_used(logits, torch.zeros(4), 3)[0] == [0]
    prototypes, uses = most_used(logits, torch.tensor([5.0, 0, 0, 0]), 3)
    assert prototypes == [1, 2] and uses.tolist() == [0, 2, 1, 0]


def test_the_page_of_a_run(network_and_run, tmp_path):
    flags = f"--data shapes:12 --device cpu --num_workers 0 --output {tmp_path}/p.png"
    path = draw([str(network_and_run[1])], parse(Config, flags.split()))
    assert path.stat().st_size > 5000


def test_misuse(network_and_run):
    _, run = network_and_run
    config = parse(Config, "--data shapes:12 --device cpu --num_workers 0".split())
    with pytest.raises(UsageError, match=r"no such directory.*did you mean"):
        draw([f"{run}s"], config)
    with pytest.raises(UsageError, match="one run, not 2"):
        draw([str(run), str(run)], config)
    stored = json.loads((run / "config.json").read_text())
    (run / "config.json").write_text(json.dumps(stored | {"dino_weight": 0.0}))
    with pytest.raises(UsageError,
                       match="without prototypes"):  # a shared head that saw patches
        draw([str(run)], config)
    (run / "config.json").write_text(json.dumps(stored))
    torch.save({"ibot_head": {}}, run / "heads.pt")
    with pytest.raises(UsageError, match="without prototypes"):
        draw([str(run)], config)
    (run / "heads.pt").write_bytes(b"x")
    with pytest.raises(UsageError, match="not readable"):
        draw([str(run)], config)
    (run / "heads.pt").unlink()
    with pytest.raises(UsageError, match="no heads.pt"):
        draw([str(run)], config)
