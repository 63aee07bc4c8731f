"""Claims
1. Misuse is one line that names what is wrong, with the nearest right name, and exit code 2.
2. Without arguments the program says what it can draw.
3. A figure gets all words before its first flag.
"""

import pytest
import torch

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
