"""Claims
1. The maps that are drawn are the cosines with the patch that was asked for, on one scale. The
   caption says which part of them is beyond its ends.
"""

import torch

import visualize
from figures.inputs import fit, load_backbone, patch_features
from images.files import read_file
from machinery.page import pyplot
from vit import VisionTransformer


def test_the_maps_are_cosines(photos, tmp_path, monkeypatch):
    torch.manual_seed(0)
    torch.save(
        VisionTransformer(32, 8, embed_dim=64, depth=2, num_heads=1).state_dict(),
        tmp_path / "b.pth")
    files = [str(photos / "cats/01.png"), str(photos / "dogs/00.jpg")]
    plt = pyplot()
    monkeypatch.setattr(plt, "close", lambda figure: None)
    visualize.main([
        "similarity", *files, "--query", "0.3,0.7", "--weights",
        str(tmp_path / "b.pth"), "--image_size", "40", "--output",
        str(tmp_path / "s.png")])
    shown = [axis.get_images()[0] for axis in plt.gcf().axes]
    caption = " ".join(text.get_text() for text in plt.gcf().texts).replace("\n", " ")
    monkeypatch.undo()
    plt.close("all")

    model = load_backbone(tmp_path / "b.pth")
    grids = []
    for file in files:
        grids.append(patch_features(model, fit(read_file(photos / file), 40, 8)))
    h, w, _ = grids[0].shape
    own = grids[0][int(0.7 * h), int(0.3 * w)]
    cosines = []
    for picture, grid in zip(shown[2:], grids):
        expected = (grid @ own) / grid.norm(dim=-1) / own.norm()
        drawn = torch.from_numpy(picture.get_array().data)[::8, ::8]
        torch.testing.assert_close(drawn, expected, rtol=1e-5, atol=1e-5)
        cosines.append(expected.flatten())
    assert shown[2].get_clim() == shown[3].get_clim()
    ends = torch.cat(cosines).quantile(torch.tensor([0.02, 0.995]))
    torch.testing.assert_close(torch.tensor(shown[2].get_clim()), ends)
    assert "the lowest 2 % and the highest 0.5 % of the patches share" in caption
