"""Claims
1. Misuse is one line that names what is wrong, with the nearest right name, and exit code 2.
2. Without arguments the program says what it can draw.
3. A figure gets all words before its first flag.
"""

import pytest
import torch
from PIL import Image

import visualize
from vit import VisionTransformer


@pytest.mark.parametrize("line, words",
                         [("atention", "did you mean attention?"), ("attention", "usage"),
                          ("attention x.jpg", "--weights"), ("curves RUNS", "metrics"),
                          ("curves /none", "no such"),
                          ("story a b", "story tells one run, not 2"),
                          ("curves RUNS/shapes_dyno", "RUNS/shapes_dino?"),
                          ("attention /none.jpg --weights W", "not a readable image"),
                          ("attention x --weights W --share 2", "--share")])
def test_misuse(line, words, tmp_path, capsys):
    model = VisionTransformer(16, 8, embed_dim=64, depth=1, num_heads=1)
    torch.save(model.state_dict(), tmp_path / "b.pth")
    (tmp_path / "shapes_dino").mkdir()
    line = line.replace("RUNS", str(tmp_path))
    words = words.replace("RUNS", str(tmp_path))
    with pytest.raises(SystemExit) as stop:
        visualize.main(line.replace("W", str(tmp_path / "b.pth")).split())
    error = capsys.readouterr().err
    assert stop.value.code == 2
    assert words in error
    assert error.count("\n") == 1


@pytest.mark.parametrize("line, words", [
    ("match PHOTO PHOTO --weights W --image_size 8", "larger --image_size"),
    ("views PHOTO --preset shapes --images 0", "--images 0: expected at least 1"),
    ("video FOLDER --weights W --fps 0.00001", "--fps 1e-05: expected 0.01 to 1,000, or 0"),
    ("video FOLDER --weights W --fps 100000", "--fps 100000.0: expected 0.01"),
    ("neighbours FOLDER --weights W --data shapes:20",
     "is a folder: expected photos, or folder:"),
    ("prototypes FOLDER --data shapes:20", "no heads.pt and config.json in it"),
    ("attention PHOTO --weights W untrained untrained", "untrained is there twice"),
    ("pca PHOTO --weights W W W", "is there twice")])
def test_bad_input_of_every_figure(line, words, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    model = VisionTransformer(16, 8, embed_dim=64, depth=1, num_heads=1)
    torch.save(model.state_dict(), tmp_path / "b.pth")
    (tmp_path / "folder").mkdir()
    Image.new("RGB", (40, 30)).save(tmp_path / "folder/photo.png")
    line = line.replace("PHOTO", "folder/photo.png").replace("FOLDER", "folder")
    with pytest.raises(SystemExit):
        visualize.main(line.replace("W", "b.pth").split())
    error = capsys.readouterr().err
    assert words in error and error.count("\n") == 1
    assert sorted(p.name for p in tmp_path.iterdir()) == ["b.pth", "folder"]


def test_an_output_without_an_ending(tmp_path, capsys):
    model = VisionTransformer(16, 8, embed_dim=64, depth=1, num_heads=1)
    torch.save(model.state_dict(), tmp_path / "b.pth")
    Image.new("RGB", (40, 30), "red").save(tmp_path / "photo.png")
    path = visualize.main([
        "attention", f"{tmp_path}/photo.png", "--weights", f"{tmp_path}/b.pth", "--image_size",
        "32", "--output", f"{tmp_path}/map"])
    assert path == tmp_path / "map.png" and path.exists()
    assert capsys.readouterr().out.endswith(f"wrote {path}\n")


def test_without_arguments_it_says_what_it_can_draw(capsys):
    visualize.main(["--help"])
    overview = capsys.readouterr().out
    visualize.main([])
    assert capsys.readouterr().out == overview and "attention" in overview


def test_a_figure_gets_all_words_before_its_first_flag(monkeypatch):
    given = []
    monkeypatch.setattr(visualize.FIGURES["curves"], "draw", lambda *both: given.append(both))
    visualize.main(["curves", "a", "b", "--output", "c"])
    [(arguments, config)] = given
    assert arguments == ["a", "b"] and config.output == "c"
