"""Claims
1. In each pair both patches are the nearest of the other; every such pair is there, the best
   first.
2. A photograph is matched to itself patch by patch.
3. Lines are spread over the thing; two photographs are needed.
"""

import pytest
import torch
import torch.nn.functional as F

import visualize
from augment import RGB
from figures.match import mutual, pairs_of, spread_out
from vit import VisionTransformer


def test_matches_are_mutual():
    generator = torch.Generator().manual_seed(0)
    first = torch.randn(30, 6, generator=generator)
    second = torch.randn(20, 6, generator=generator)
    pairs, values = mutual(first, second)

    # Every pair of rows, one by one, as the definition says.
    expected = set()
    for i in range(30):
        for j in range(20):
            of_i = F.cosine_similarity(first[i], second)
            of_j = F.cosine_similarity(second[j], first)
            if of_i.argmax() == j and of_j.argmax() == i:
                expected.add((i, j))
    assert {tuple(pair) for pair in pairs.tolist()} == expected and len(expected) > 5
    torch.testing.assert_close(values,
                               F.cosine_similarity(first[pairs[:, 0]], second[pairs[:, 1]]))
    assert (values.diff() <= 0).all()


def test_the_same_photograph_is_matched_to_itself():
    torch.manual_seed(0)
    model = VisionTransformer(32, 8, embed_dim=64, depth=1, num_heads=1).eval()
    model.channel_stats = RGB
    image = torch.randint(0, 256, (3, 64, 64), dtype=torch.uint8)
    _, pairs, total = pairs_of(model, [image, image], 5)
    assert len(pairs) == 5 <= total
    assert torch.equal(pairs[:, 0], pairs[:, 1])


def test_lines_are_spread_out():
    places = torch.tensor([[0, 0], [0, 1], [3, 3], [9, 9], [0, 2]])
    assert spread_out(places, 9, 2.0) == [0, 2, 3, 4]
    assert spread_out(places, 2, 2.0) == [0, 2]
    assert spread_out(places, 9, 0.0) == [0, 1, 2, 3, 4]


def test_two_photographs_are_needed(tmp_path, capsys):
    model = VisionTransformer(16, 8, embed_dim=64, depth=1, num_heads=1)
    torch.save(model.state_dict(), tmp_path / "b.pth")
    with pytest.raises(SystemExit):
        visualize.main(["match", "a.png", "--weights", str(tmp_path / "b.pth")])
    assert "match compares two photographs, not 1" in capsys.readouterr().err
