"""Claims
1. Parameter counts equal the published ones to the unit; keys equal the official ones.
2. One packed forward of several crop sizes equals one forward per size, values and gradients.
3. Attention rows sum to one and reproduce what the fast path computes, in low precision too.
4. Positions are resampled by the two official rules; the stored table serves its own grid.
5. Stochastic depth keeps exactly max(int(b(1-p)), 1) samples and adds them scaled by b / kept.
6. Sides that are no multiple of the patch lose their last rows and columns; sizes and names that
   do not fit are named.
7. Masked patches lose their content and keep their place; registers come after the class.
8. An empty batch gives empty features; torch.export takes batches of any length.
"""

import pytest
import torch
import torch.nn.functional as F

from vit import ARCHS, VisionTransformer, attention, drop_path_plan, resize_pos_embed

SMALL = dict(embed_dim=64, depth=3, num_heads=1)


def count(model):
    return sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize("arch, patch, expected", [("vit_tiny", 16, 5_524_416),
                                                   ("vit_tiny", 8, 5_526_720),
                                                   ("vit_small", 16, 21_665_664),
                                                   ("vit_small", 8, 21_670_272),
                                                   ("vit_base", 16, 85_798_656),
                                                   ("vit_base", 8, 85_807_872)])
def test_parameters_of_dino(arch, patch, expected):
    with torch.device("meta"):
        assert count(VisionTransformer(224, patch, **ARCHS[arch])) == expected


@pytest.mark.parametrize("arch, ffn, registers, expected", [
    ("vit_small", "mlp", 0, 22_056_576), ("vit_small", "mlp", 4, 22_058_112),
    ("vit_base", "mlp", 0, 86_580_480), ("vit_base", "mlp", 4, 86_583_552),
    ("vit_large", "mlp", 0, 304_368_640), ("vit_large", "mlp", 4, 304_372_736),
    ("vit_large", "swiglu", 0, 304_794_880), ("vit_giant2", "swiglu", 0, 1_136_480_768),
    ("vit_giant2", "swiglu", 4, 1_136_486_912)])
def test_parameters_of_dinov2(arch, ffn, registers, expected):
    with torch.device("meta"):
        model = VisionTransformer(518, 14, ffn_layer=ffn, layerscale=1e-5, mask_token=True,
                                  num_register_tokens=registers, **ARCHS[arch])
    assert count(model) == expected


def test_keys_are_the_official_ones():
    keys = set(VisionTransformer(**ARCHS["vit_small"]).state_dict())
    block = [
        "norm1.weight", "norm1.bias", "attn.qkv.weight", "attn.qkv.bias", "attn.proj.weight",
        "attn.proj.bias", "norm2.weight", "norm2.bias", "mlp.fc1.weight", "mlp.fc1.bias",
        "mlp.fc2.weight", "mlp.fc2.bias"]
    expected = {
        "cls_token", "pos_embed", "patch_embed.proj.weight", "patch_embed.proj.bias",
        "norm.weight", "norm.bias"} | {f"blocks.{i}.{k}"
                                       for i in range(12)
                                       for k in block}
    assert keys == expected and len(keys) == 150
    v2 = VisionTransformer(layerscale=1.0, mask_token=True, **ARCHS["vit_small"]).state_dict()
    assert set(v2) - keys == {"mask_token"} | {
        f"blocks.{i}.ls{j}.gamma"
        for i in range(12)
        for j in (1, 2)}


def test_packed_equals_separate_forwards():
    torch.manual_seed(0)
    model = VisionTransformer(32, 8, num_register_tokens=2, **SMALL).double()
    crops = [torch.randn(2, 3, 32, 32).double(), torch.randn(5, 3, 16, 24).double()]
    packed = model(crops)
    torch.cat(packed).pow(2).sum().backward()
    together = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    apart = [model(x) for x in crops]
    torch.cat(apart).pow(2).sum().backward()
    for a, b in zip(packed, apart):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-12)
    for a, p in zip(together, model.parameters()):
        torch.testing.assert_close(a, p.grad, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("block", [0, -1])
def test_attention_reproduces_the_fast_path(block):
    torch.manual_seed(0)
    model = VisionTransformer(32, 8, embed_dim=128, depth=2, num_heads=2).eval()
    images = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        attention = model.get_attention(images, block)
        x = model.prepare_tokens(images).flatten(0, 1)
        for layer in model.blocks[:block % 2]:
            x = layer(x, ((2, 17),))
        layer = model.blocks[block]
        fast = layer.attn(layer.norm1(x), ((2, 17),)).view(2, 17, -1)
        v = layer.attn.split_heads(layer.attn.qkv(layer.norm1(x)), 2, 17)[2]
        slow = layer.attn.proj((attention @ v).transpose(1, 2).reshape(2, 17, -1))
    assert attention.shape == (2, 2, 17, 17)
    torch.testing.assert_close(attention.sum(-1), torch.ones(2, 2, 17))
    torch.testing.assert_close(slow, fast, rtol=1e-5, atol=1e-5)


def test_positions_follow_the_two_rules():
    table = torch.randn(1, 1 + 14 * 14, 4)
    assert resize_pos_embed(table, (14, 14), "offset") is table
    # the offset rule, by hand: cubic weights at source coordinate (i + .5) / scale - .5
    scale = 6.1 / 14
    rows = torch.zeros(6, 14)
    for i in range(6):
        at = (i + 0.5) / scale - 0.5
        for j in range(int(at) - 1, int(at) + 3):
            t = abs(at - j)
            a = -0.75
            w = (((a + 2) * t**3 - (a + 3) * t**2 + 1) if t <= 1 else
                 (a * t**3 - 5 * a * t**2 + 8 * a * t - 4 * a))
            rows[i, min(max(j, 0), 13)] += w
    grid = table[0, 1:].view(14, 14, 4)
    by_hand = torch.einsum("ia,jb,abd->ijd", rows, rows, grid).reshape(1, 36, 4)
    offset = resize_pos_embed(table, (6, 6), "offset")
    torch.testing.assert_close(offset[:, 1:], by_hand, rtol=1e-4, atol=1e-5)
    antialias = resize_pos_embed(table, (6, 6), "antialias")[:, 1:]
    expected = F.interpolate(
        grid.permute(2, 0, 1)[None], size=(6, 6), mode="bicubic", antialias=True)
    torch.testing.assert_close(antialias, expected.flatten(2).transpose(1, 2))
    assert (antialias - offset[:, 1:]).abs().mean() > 0.1  # the rules are not interchangeable
    # as many patches as stored, but another shape: resampled all the same
    assert not torch.equal(resize_pos_embed(table, (28, 7), "offset"), table)


@pytest.mark.parametrize("side", [976, 1840, 1952])
def test_sizes_that_once_lost_a_row(side):
    table = torch.zeros(1, 1 + 14 * 14, 1)
    assert (resize_pos_embed(table, (side // 16, side // 16), "offset").shape[1] == 1 +
            (side // 16)**2)


def test_stochastic_depth_against_a_loop():
    torch.manual_seed(0)
    model = VisionTransformer(16, 8, drop_path_rate=0.5, drop_path_uniform=True,
                              **SMALL).double()
    crops = [torch.randn(4, 3, 16, 16).double(), torch.randn(7, 3, 8, 8).double()]
    plan = model.draw_plan(crops, torch.Generator().manual_seed(3))
    assert [k.groups for k in plan[0]] == [((2, 5), (3, 2))] * 2
    out = model(crops, plan=plan)
    starts = [0, 20]
    for g, (images, n) in enumerate(zip(crops, (5, 2))):
        x = model.prepare_tokens(images)
        for block, keeps in zip(model.blocks, plan):
            for branch, keep in zip((block.attend, block.feed), keeps):
                b, k = len(x), keep.groups[g][0]
                kept = {
                    int(r - starts[g]) // n
                    for r in keep.rows if starts[g] <= r < starts[g] + b * n}
                assert len(kept) == k
                x = torch.stack([
                    x[i] + (b / k) * branch(x[i], ((1, n),)) if i in kept else x[i]
                    for i in range(b)])
        # b / kept is a float32 in the plan
        torch.testing.assert_close(out[g], model.norm(x)[:, 0], rtol=1e-6, atol=1e-6)


def test_plan_is_reproducible_and_ramps():

    def plan(seed):
        return drop_path_plan([0.0, 0.05, 0.5], ((8, 3),), torch.Generator().manual_seed(seed))

    assert plan(1)[0] is None  # rate 0: nothing to skip
    assert plan(1)[1][0].groups == ((7, 3),) and plan(1)[2][0].groups == ((4, 3),)
    assert torch.equal(plan(1)[2][0].rows, plan(1)[2][0].rows)
    assert not torch.equal(plan(1)[2][0].rows, plan(2)[2][0].rows)
    assert not torch.equal(*(keep.rows for keep in plan(1)[2]))  # attention and FFN draw apart


def test_odd_sizes_lose_their_last_rows_and_columns():
    model = VisionTransformer(32, 8, **SMALL).eval()
    images = torch.randn(1, 3, 37, 30)
    with torch.no_grad():
        torch.testing.assert_close(model(images), model(images[:, :, :32, :24]))
    with pytest.raises(ValueError, match="smaller than a patch"):
        model(torch.randn(1, 3, 7, 32))


@pytest.mark.parametrize("settings, words", [
    (dict(img_size=4, patch_size=8), "img_size 4 is smaller than one patch of 8"),
    (dict(embed_dim=100, num_heads=3), "embed_dim 100 does not divide over 3 heads"),
    (dict(ffn_layer="glu"), "ffn_layer 'glu': choose from mlp"),
    (dict(pos_embed_resize="none"), "pos_embed_resize 'none': choose from offset")])
def test_sizes_that_do_not_fit_are_named(settings, words):
    with pytest.raises(ValueError, match=words):
        VisionTransformer(**settings)


def test_masks_and_registers():
    torch.manual_seed(0)
    model = VisionTransformer(16, 8, mask_token=True, num_register_tokens=3, **SMALL).eval()
    images, masks = torch.randn(2, 3, 16, 16), torch.tensor([[True, False, False, True]] * 2)
    out = model.forward_features(images, masks)
    assert out["x_norm_patchtokens"].shape == (2, 4, 64)
    assert out["x_norm_regtokens"].shape == (2, 3, 64) and out["x_prenorm"].shape == (2, 8, 64)
    changed = images.clone()
    changed[:, :, :8, :8] += 1  # inside a masked patch: nobody can tell
    torch.testing.assert_close(model(images, masks), model(changed, masks))
    assert not torch.allclose(model(images), model(changed))
    with pytest.raises(ValueError, match="mask_token=True"):
        VisionTransformer(16, 8, **SMALL)(images, masks)


def test_intermediate_layers():
    model = VisionTransformer(32, 8, num_register_tokens=1, **SMALL).eval()
    images = torch.randn(2, 3, 32, 24)
    with torch.no_grad():
        ((grid, cls),) = model.get_intermediate_layers(images, 1, reshape=True,
                                                       return_class_token=True)
        out = model.forward_features(images)
        raw = model.get_intermediate_layers(images, [0, 2], norm=False)
    assert grid.shape == (2, 64, 4, 3)
    torch.testing.assert_close(cls, out["x_norm_clstoken"])
    torch.testing.assert_close(grid.flatten(2).transpose(1, 2), out["x_norm_patchtokens"])
    torch.testing.assert_close(raw[1], out["x_prenorm"][:, 2:])
    with pytest.raises(ValueError, match="depth 3"):
        model.get_intermediate_layers(images, 4)


def test_activation_checkpointing_keeps_less_and_changes_nothing():
    model = VisionTransformer(32, 8, embed_dim=64, depth=4, num_heads=1, drop_path_rate=0.5)
    images = torch.randn(4, 3, 32, 32)
    plan = model.draw_plan(images, torch.Generator().manual_seed(0))
    results = []
    for again in (False, True):
        model.activation_checkpointing = again
        kept = {}

        def keep(x):
            kept[x.untyped_storage().data_ptr()] = x  # a storage that two need counts once
            return x

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
            out = model.forward_features(images, plan=plan)["x_norm_patchtokens"]
        model.zero_grad()
        out.square().sum().backward()
        results.append(
            (out, sum(x.untyped_storage().nbytes()
                      for x in kept.values()), [p.grad.clone() for p in model.parameters()]))
    (a, much, grads), (b, little, same) = results
    assert torch.equal(a, b) and all(map(torch.equal, grads, same))
    assert little < much / 3


def test_bfloat16_on_a_cpu_is_as_exact_as_the_kernel():
    q, k, v = torch.randn(3, 2, 4, 50, 64, dtype=torch.float64).unbind(0)
    exact = F.scaled_dot_product_attention(q, k, v)
    low = [x.bfloat16().requires_grad_() for x in (q, k, v)]
    ours = attention(*low)
    kernel = F.scaled_dot_product_attention(*low)
    assert ours.dtype == kernel.dtype == torch.bfloat16
    errors = [(x.double() - exact).abs().mean() for x in (ours, kernel)]
    assert errors[0] < 1.5 * errors[1] + 1e-4 and errors[1] > 0
    ours.float().square().sum().backward()
    wide = [x.detach().double().requires_grad_() for x in low]
    F.scaled_dot_product_attention(*wide).square().sum().backward()
    for a, b in zip(low, wide):
        assert (a.grad.double() - b.grad).abs().mean() < 0.02 * b.grad.abs().mean()


def test_attention_of_some_tokens():
    """The rows that are asked for, in their order, are those of the whole matrix."""
    torch.manual_seed(0)
    attention = VisionTransformer(32, 8, **SMALL).blocks[0].attn
    x = torch.randn(2 * 17, 64)
    whole = attention.weights(x, 2, 17)
    for rows in ([0, 5], [3], slice(0, 1)):
        torch.testing.assert_close(attention.weights(x, 2, 17, rows), whole[:, :, rows])


def test_attention_to_be_plotted_is_float32_inside_autocast():
    torch.manual_seed(0)
    model = VisionTransformer(32, 8, **SMALL).eval()
    for block in model.blocks:  # queries and keys of some length, whose weights are sharp
        block.attn.qkv.weight.data.mul_(30)
    images = torch.randn(2, 3, 32, 32)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        weights = model.get_attention(images)
    assert weights.dtype == torch.float32
    torch.testing.assert_close(weights.sum(-1), torch.ones(2, 1, 17))


@pytest.mark.parametrize("registers", [0, 2])
def test_a_batch_of_no_images(registers):
    model = VisionTransformer(16, 8, num_register_tokens=registers, **SMALL).eval()
    nothing = torch.zeros(0, 3, 16, 24)
    with torch.no_grad():
        assert model(nothing).shape == (0, 64)
        assert model.forward_features(nothing)["x_norm_patchtokens"].shape == (0, 6, 64)
        assert model.get_intermediate_layers(nothing, 2, reshape=True)[0].shape == (0, 64, 2, 3)
        assert model.get_attention(nothing).shape == (0, 1, 7 + registers, 7 + registers)


@pytest.mark.parametrize("registers", [0, 2])
def test_torch_export_with_a_batch_of_any_length(registers):
    torch.manual_seed(0)
    model = VisionTransformer(16, 8, num_register_tokens=registers, **SMALL).eval()
    batch = torch.export.Dim("b", min=2)
    graph = torch.export.export(model, (torch.randn(2, 3, 24, 16),),
                                dynamic_shapes={"images": {0: batch}})
    images = torch.randn(5, 3, 24, 16)
    with torch.no_grad():
        torch.testing.assert_close(graph.module()(images), model(images))
