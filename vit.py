"""Vision Transformer: an image becomes tokens that look at each other; one speaks for them all.

    image (B, 3, H, W) --> patches --> + positions --> [class | registers | patches] (B, N, D)
                                                                |
         list of crop sizes: tokens of all crops end to end  (T, D)
                                                                |
         depth x:   x += LayerScale(attention(norm(x)))     each image attends to itself only
                    x += LayerScale(ffn(norm(x)))           every token for itself
                                                                |
                                 norm --> class token (B, D), patch tokens (B, P, D)

Idea     Everything except attention treats each token alone, so crops of all sizes share one long
         sequence (packing) and only attention splits it. Nothing is padded, no mask is built.
Paper    ViT (Dosovitskiy 2021) sec. 3; DINO sec. 3.2; DINOv2 sec. 5; registers (Darcet 2024) sec. 2
Try      python vit.py          parameters and tokens of every architecture, and packing checked
Change   a new feed-forward layer is one class below and one line in FFNS
Tests    pytest tests/test_vit.py

Letters  B images, H W pixels, h w patches, P = h*w, R registers, N = 1 + R + P tokens, D width,
         nh heads, hd = D/nh, T tokens of all crops together; b n one group: b images of n tokens.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

# ------------------------------------------------------------------------------------------------
# From pixels to tokens


class PatchEmbed(nn.Module):
    """Cut (B, C, H, W) into p x p patches and project each to D numbers: (B, P, D).

    A stride-p convolution is that projection. When a side is no multiple of p the last rows or
    columns are left out, which is what the model cards of DINOv2 promise.
    """

    def __init__(self, patch_size: int, in_chans: int, embed_dim: int):
        super().__init__()
        self.patch_size = patch_size
        # keeps PyTorch's own initialisation, as the official code does
        self.proj = nn.Conv2d(in_chans, embed_dim, patch_size, patch_size)

    def forward(self, images: Tensor) -> Tensor:
        x = self.proj(images)  # (B, D, h, w)
        x = x.flatten(2).transpose(1, 2)  # (B, h*w, D)
        return x


def inflate(weight: Tensor, channels: int) -> Tensor:
    """A patch embedding (D, C, p, p) for images of other channels: (D, channels, p, p).

    More channels repeat the old ones in turn, fewer get their mean. The sum over channels stays:
    an image that is the same in all of them has about the tokens that it had.
    """
    C = weight.shape[1]
    if channels > C:
        weight = weight[:, torch.arange(channels) % C]  # (D, channels, p, p)
    elif channels < C:
        weight = weight.mean(1, keepdim=True).repeat(1, channels, 1, 1)  # (D, channels, p, p)
    return weight * (C / channels)


def resize_pos_embed(pos_embed: Tensor, grid: tuple[int, int], rule: str) -> Tensor:
    """Positions (1, 1 + M*M, D) learned on an M x M grid, resampled to `grid` = (h, w) patches.

    Two rules exist because two generations of released weights were trained with them, and they
    differ visibly. "offset" (DINO, DINOv2 without registers): bicubic with the *scale*
    (h + 0.1) / M; the 0.1 kept a float from rounding down to h - 1, and PyTorch maps coordinates
    with that same scale. "antialias" (DINOv2 with registers): bicubic to the *size* (h, w), with
    antialiasing.
    """
    cls, patches = pos_embed[:, :1], pos_embed[:, 1:]
    side = round(patches.shape[1] ** 0.5)
    # The shape decides, not the token count: 448 x 112 has as many patches as 224 x 224.
    if grid == (side, side):
        return pos_embed
    how = (
        dict(scale_factor=((grid[0] + 0.1) / side, (grid[1] + 0.1) / side))
        if rule == "offset"
        else dict(size=grid, antialias=True)
    )
    table = patches.float().reshape(1, side, side, -1).permute(0, 3, 1, 2)  # (1, D, side, side)
    table = F.interpolate(table, mode="bicubic", **how)  # (1, D, h, w)
    table = table.flatten(2).transpose(1, 2)  # (1, h*w, D)
    return torch.cat([cls, table.to(cls.dtype)], 1)  # (1, 1 + h*w, D)


# ------------------------------------------------------------------------------------------------
# The two branches of a block, on packed tokens

Groups = tuple[tuple[int, int], ...]  # one (b, n) per crop size; sum of b*n is T


def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """softmax(q k' / sqrt(hd)) v: three times (b, nh, n, hd) -> one. ViT sec. 3.1.

    By torch's kernel, which never stores a pair of tokens. Only in bfloat16 on a CPU the formula
    itself is taken, to learn and for few tokens: the kernel's backward pass is two to five times
    as slow there, and its forward pass up to twice.
    """
    low_cpu = q.device.type == "cpu" and q.dtype == torch.bfloat16
    if low_cpu and (torch.is_grad_enabled() or q.shape[-2] < 512):
        scores = (q * q.shape[-1] ** -0.5) @ k.transpose(-2, -1)  # (b, nh, n, n)
        return scores.softmax(-1).to(v.dtype) @ v
    return F.scaled_dot_product_attention(q, k, v)


class Attention(nn.Module):
    """Multi-head self-attention, each image of each group for itself. ViT sec. 3.1."""

    def __init__(self, dim: int, num_heads: int):
        super().__init__()
        self.num_heads = num_heads
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)

    def split_heads(self, qkv: Tensor, b: int, n: int) -> Tensor:
        """(b*n, 3*D) -> queries, keys, values (3, b, nh, n, hd)."""
        return qkv.view(b, n, 3, self.num_heads, -1).permute(2, 0, 3, 1, 4)

    def forward(self, x: Tensor, groups: Groups) -> Tensor:
        qkv = self.qkv(x)  # (T, 3*D)
        outs = []
        for (b, n), rows in zip(groups, qkv.split([b * n for b, n in groups])):
            q, k, v = self.split_heads(rows, b, n).unbind(0)
            o = attention(q, k, v)  # (b, nh, n, hd)
            outs.append(o.transpose(1, 2).reshape(b * n, -1))
        return self.proj(torch.cat(outs) if len(outs) > 1 else outs[0])  # (T, D)

    def weights(self, x: Tensor, b: int, n: int) -> Tensor:
        """What forward never forms: softmax(q k' / sqrt(hd)), (b, nh, n, n). DINO fig. 1."""
        q, k, _ = self.split_heads(self.qkv(x), b, n).unbind(0)
        scores = (q.float() * q.shape[-1] ** -0.5) @ k.float().transpose(-2, -1)  # (b, nh, n, n)
        return scores.softmax(-1)


class Mlp(nn.Module):
    """Linear, GELU, Linear."""

    def __init__(self, dim: int, hidden: int):
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden)
        self.fc2 = nn.Linear(hidden, dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x)))


class SwiGLU(nn.Module):
    """silu(gate) * value, Linear. Two thirds of the width keep the MLP's cost. DINOv2 sec. 5."""

    def __init__(self, dim: int, hidden: int):
        super().__init__()
        hidden = (int(hidden * 2 / 3) + 7) // 8 * 8  # whole multiples of 8 suit the kernels
        self.w12 = nn.Linear(dim, 2 * hidden)  # gate first, value second, as in the released keys
        self.w3 = nn.Linear(hidden, dim)

    def forward(self, x: Tensor) -> Tensor:
        gate, value = self.w12(x).chunk(2, -1)
        return self.w3(F.silu(gate) * value)


FFNS = {"mlp": Mlp, "swiglu": SwiGLU}


class LayerScale(nn.Module):
    """A learned factor per channel, started near zero so that a deep network starts shallow."""

    def __init__(self, dim: int, init: float):
        super().__init__()
        self.gamma = nn.Parameter(torch.full((dim,), float(init)))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.gamma


# ------------------------------------------------------------------------------------------------
# Stochastic depth that skips the work: the plan is drawn outside, the block only follows it


class Keep(NamedTuple):
    """Which samples take part in one residual branch of one block."""

    rows: Tensor  # (T',) int64, their tokens' places in the packed sequence
    scale: Tensor  # (T', 1), b / kept, so that the branch keeps its expectation
    groups: Groups  # (kept, n) per crop size


def drop_path_plan(
    rates: list[float], groups: Groups, generator: torch.Generator,
    device: torch.device = torch.device("cpu"),
) -> list[tuple[Keep, Keep] | None]:
    """Draw, for each block, the samples that its attention and its FFN will see.

    In each group exactly max(int(b * (1 - rate)), 1) of b samples are kept, without replacement and
    independently for the two branches. None stands for "all of them". DINOv2 sec. 5.
    """
    starts = [sum(b * n for b, n in groups[:i]) for i in range(len(groups))]
    # One permutation per branch and group, drawn on the CPU: the same on every kind of device.
    tokens = []
    for (b, n), start in zip(groups, starts):
        order = torch.rand(2 * len(rates), b, generator=generator).argsort(1)
        order = order.to(device, non_blocking=device.type != "mps")  # which would read it too late
        tokens.append(order[:, :, None] * n + torch.arange(n, device=device) + start)
    plan = []
    for i, rate in enumerate(rates):
        kept = tuple((max(int(b * (1 - rate)), 1), n) for b, n in groups)
        if kept == tuple(groups):
            plan.append(None)
            continue
        scale = torch.cat([torch.full((k * n, 1), b / k, device=device)
                           for (b, n), (k, _) in zip(groups, kept)])
        rows = [torch.cat([t[j, :k].flatten() for t, (k, _) in zip(tokens, kept)])
                for j in (2 * i, 2 * i + 1)]
        plan.append(tuple(Keep(r, scale, kept) for r in rows))
    return plan


def residual(x: Tensor, branch, groups: Groups, keep: Keep | None) -> Tensor:
    """x + branch(x), the branch run only on the rows of `keep`. x is (T, D)."""
    if keep is None:
        return x + branch(x, groups)
    some = x.index_select(0, keep.rows)  # (T', D)
    # Rows are unique, so a copy does what an addition would, without atomics on a GPU.
    return x.index_copy(0, keep.rows, some + keep.scale * branch(some, keep.groups))  # (T, D)


class Block(nn.Module):
    """Attention and feed-forward, each behind a norm and added back (pre-norm)."""

    def __init__(self, dim: int, num_heads: int, hidden: int, ffn_layer: str,
                 layerscale: float | None):
        super().__init__()
        scale = (lambda: LayerScale(dim, layerscale)) if layerscale else nn.Identity
        self.norm1 = nn.LayerNorm(dim, eps=1e-6)
        self.attn = Attention(dim, num_heads)
        self.ls1 = scale()
        self.norm2 = nn.LayerNorm(dim, eps=1e-6)
        self.mlp = FFNS[ffn_layer](dim, hidden)
        self.ls2 = scale()

    def attend(self, x: Tensor, groups: Groups) -> Tensor:
        return self.ls1(self.attn(self.norm1(x), groups))

    def feed(self, x: Tensor, groups: Groups) -> Tensor:
        return self.ls2(self.mlp(self.norm2(x)))

    def forward(self, x: Tensor, groups: Groups, keep: tuple[Keep, Keep] | None = None) -> Tensor:
        keep_attn, keep_ffn = keep or (None, None)
        x = residual(x, self.attend, groups, keep_attn)
        return residual(x, self.feed, groups, keep_ffn)


# ------------------------------------------------------------------------------------------------
# The network


class VisionTransformer(nn.Module):
    """ViT of DINO, iBOT and DINOv2. State-dict keys equal the official ones.

    img_size is the side, in pixels, for which the table of positions is built; any other image size
    (at least one patch) is served by resampling it. Without `mask_token` the keys are DINO's, with
    it (and LayerScale) DINOv2's. Raises ValueError for sizes or names that do not fit.
    """

    def __init__(
        self,
        img_size: int = 224,
        patch_size: int = 16,
        in_chans: int = 3,
        embed_dim: int = 384,
        depth: int = 12,
        num_heads: int = 6,
        mlp_ratio: float = 4.0,
        ffn_layer: str = "mlp",  # mlp | swiglu
        num_register_tokens: int = 0,
        layerscale: float | None = None,  # DINOv2: 1e-5
        mask_token: bool = False,
        drop_path_rate: float = 0.0,
        drop_path_uniform: bool = False,  # False: rises linearly from 0 to the rate (DINO)
        pos_embed_resize: str = "offset",  # offset | antialias
    ):
        super().__init__()
        if ffn_layer not in FFNS:
            raise ValueError(f"ffn_layer {ffn_layer!r}: choose from {', '.join(FFNS)}")
        if pos_embed_resize not in ("offset", "antialias"):
            raise ValueError(f"pos_embed_resize {pos_embed_resize!r}: choose offset or antialias")
        if img_size < patch_size:
            raise ValueError(f"img_size {img_size} is smaller than one patch of {patch_size}")
        self.img_size = img_size // patch_size * patch_size
        self.patch_size, self.embed_dim, self.depth = patch_size, embed_dim, depth
        self.num_heads, self.num_register_tokens = num_heads, num_register_tokens
        self.pos_embed_resize, self.in_chans = pos_embed_resize, in_chans
        self.activation_checkpointing = False  # True: compute the blocks again in backward
        self.drop_path_rates = [
            drop_path_rate if drop_path_uniform else drop_path_rate * i / max(depth - 1, 1)
            for i in range(depth)
        ]

        def token(count):
            return nn.Parameter(torch.zeros(1, count, embed_dim))

        self.patch_embed = PatchEmbed(patch_size, in_chans, embed_dim)
        self.cls_token = token(1)
        self.pos_embed = token(1 + (img_size // patch_size) ** 2)
        self.register_tokens = token(num_register_tokens) if num_register_tokens else None
        self.mask_token = nn.Parameter(torch.zeros(1, embed_dim)) if mask_token else None
        hidden = int(embed_dim * mlp_ratio)
        self.blocks = nn.ModuleList(
            Block(embed_dim, num_heads, hidden, ffn_layer, layerscale) for _ in range(depth)
        )
        self.norm = nn.LayerNorm(embed_dim, eps=1e-6)
        self.init_weights(cls_std=1e-6 if layerscale else 0.02)

    def init_weights(self, cls_std: float):
        """Normal(0, .02) for linear layers and positions; DINOv2 starts extra tokens near zero."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                nn.init.zeros_(module.bias)
        nn.init.trunc_normal_(self.pos_embed, std=0.02)
        nn.init.normal_(self.cls_token, std=cls_std)
        if self.register_tokens is not None:
            nn.init.normal_(self.register_tokens, std=1e-6)

    # -- tokens in

    def grid(self, images: Tensor) -> tuple[int, int]:
        """Patches down and across: (h, w)."""
        h, w = (side // self.patch_size for side in images.shape[-2:])
        if not h or not w:
            height, width = images.shape[-2:]
            raise ValueError(
                f"images of {height} x {width} pixels are smaller than a patch of {self.patch_size}"
            )
        return h, w

    def prepare_tokens(self, images: Tensor, masks: Tensor | None = None) -> Tensor:
        """Images (B, C, H, W), masks (B, P) bool or None -> tokens (B, N, D)."""
        grid = self.grid(images)
        x = self.patch_embed(images)  # (B, P, D)
        if masks is not None:  # iBOT sec. 3.1: content hidden, position kept
            if self.mask_token is None:
                raise ValueError("masks were given to a ViT built without mask_token=True")
            x = torch.where(masks[:, :, None], self.mask_token.to(x.dtype), x)  # (B, P, D)
        cls = self.cls_token.expand(len(x), -1, -1)  # (B, 1, D)
        x = torch.cat([cls, x], 1)  # (B, 1 + P, D)
        x = x + resize_pos_embed(self.pos_embed, grid, self.pos_embed_resize)
        if self.register_tokens is not None:  # after the positions: registers are nowhere
            registers = self.register_tokens.expand(len(x), -1, -1)  # (B, R, D)
            x = torch.cat([x[:, :1], registers, x[:, 1:]], 1)  # (B, N, D)
        return x

    def draw_plan(self, images: Tensor | list[Tensor], generator: torch.Generator):
        """A stochastic-depth plan for these images; None when the rate is 0. See drop_path_plan."""
        images = images if isinstance(images, (list, tuple)) else [images]
        if not any(self.drop_path_rates):
            return None
        extra = 1 + self.num_register_tokens
        grids = [self.grid(x) for x in images]
        groups = tuple((len(x), extra + h * w) for x, (h, w) in zip(images, grids))
        return drop_path_plan(self.drop_path_rates, groups, generator, images[0].device)

    # -- tokens out

    def forward_features(self, images, masks=None, plan=None):
        """Images (B, C, H, W) -> dictionary of DINOv2; a list of sizes -> a list of dictionaries.

        x_norm_clstoken (B, D), x_norm_regtokens (B, R, D), x_norm_patchtokens (B, P, D), all after
        the final norm; x_prenorm (B, N, D) before it; masks as given. For a list, `masks` is a list
        too. `plan` (draw_plan) is stochastic depth, for the student in training only.
        """
        many = isinstance(images, (list, tuple))
        images = list(images) if many else [images]
        masks = list(masks) if many and masks is not None else [masks] * len(images)
        tokens = [self.prepare_tokens(x, m) for x, m in zip(images, masks, strict=True)]
        groups = tuple((len(t), t.shape[1]) for t in tokens)
        x = torch.cat([t.flatten(0, 1) for t in tokens])  # (T, D)
        for block, keep in zip(self.blocks, plan or [None] * self.depth, strict=True):
            if self.activation_checkpointing and torch.is_grad_enabled():
                x = checkpoint(block, x, groups, keep, use_reentrant=False)
            else:
                x = block(x, groups, keep)
        normed = self.norm(x)
        sizes, first = [b * n for b, n in groups], 1 + self.num_register_tokens
        outs = []
        for (b, n), pre, post, m in zip(groups, x.split(sizes), normed.split(sizes), masks):
            post = post.view(b, n, -1)  # (b, n, D)
            outs.append({
                "x_norm_clstoken": post[:, 0],
                "x_norm_regtokens": post[:, 1:first],
                "x_norm_patchtokens": post[:, first:],
                "x_prenorm": pre.view(b, n, -1),
                "masks": m,
            })
        return outs if many else outs[0]

    def forward(self, images, masks=None, plan=None):
        """Normalised class tokens: (B, D), or a list of them for a list of crop sizes."""
        out = self.forward_features(images, masks, plan)
        if isinstance(out, dict):
            return out["x_norm_clstoken"]
        return [o["x_norm_clstoken"] for o in out]

    def get_intermediate_layers(self, images: Tensor, n: int | list[int] = 1, reshape: bool = False,
                                return_class_token: bool = False, norm: bool = True) -> tuple:
        """Patch tokens of the last n blocks, or of the blocks listed in n (0-based).

        Each is (B, P, D), or (B, D, h, w) with `reshape`; pairs (patches, class token) with
        `return_class_token`. The final norm is applied to each unless norm=False (depth heads).
        """
        wanted = range(self.depth - n, self.depth) if isinstance(n, int) else list(n)
        if not all(0 <= i < self.depth for i in wanted) or not wanted:
            raise ValueError(f"n={n} asks for blocks that a ViT of depth {self.depth} has not")
        x = self.prepare_tokens(images)
        (b, count), (h, w), first = x.shape[:2], self.grid(images), 1 + self.num_register_tokens
        x, found = x.flatten(0, 1), {}
        for i, block in enumerate(self.blocks):
            x = block(x, ((b, count),))
            if i in wanted:
                y = (self.norm(x) if norm else x).view(b, count, -1)  # (b, N, D)
                patches = y[:, first:]
                if reshape:
                    patches = patches.transpose(1, 2).reshape(b, -1, h, w)  # (b, D, h, w)
                found[i] = (patches, y[:, 0]) if return_class_token else patches
        return tuple(found[i] for i in wanted)

    def get_attention(self, images: Tensor, block: int = -1) -> Tensor:
        """Exact attention of one block: (B, nh, N, N), rows sum to one. Row 0 is the class token's.

        Tokens are ordered class, registers, patches: skip 1 + num_register_tokens columns before
        reshaping to the (h, w) grid. The fast path stays in use everywhere else.
        """
        if not -self.depth <= block < self.depth:
            raise ValueError(f"block {block}: this ViT has blocks 0 to {self.depth - 1}")
        x = self.prepare_tokens(images)
        b, n = x.shape[:2]
        x, index = x.flatten(0, 1), block % self.depth
        for layer in self.blocks[:index]:
            x = layer(x, ((b, n),))
        layer = self.blocks[index]
        return layer.attn.weights(layer.norm1(x), b, n)


# Heads are 64 wide everywhere, which is also what the kernels like best (DINOv2 sec. 5). Giant is
# used with ffn_layer="swiglu", the released DINOv2 ones with LayerScale and mask token: arguments.
ARCHS = {
    "vit_pico": dict(embed_dim=64, depth=4, num_heads=1),  # ours: to be distilled from nano
    "vit_nano": dict(embed_dim=128, depth=4, num_heads=2),  # ours: a laptop trains it in minutes
    "vit_tiny": dict(embed_dim=192, depth=12, num_heads=3),
    "vit_small": dict(embed_dim=384, depth=12, num_heads=6),
    "vit_base": dict(embed_dim=768, depth=12, num_heads=12),
    "vit_large": dict(embed_dim=1024, depth=24, num_heads=16),
    "vit_giant2": dict(embed_dim=1536, depth=40, num_heads=24),
}


if __name__ == "__main__":
    print("architecture   parameters   tokens at 224 px, patch 16")
    for name, arch in ARCHS.items():
        with torch.device("meta"):  # shapes without memory: even the giant takes no time
            model = VisionTransformer(**arch)
        print(f"{name:12s} {sum(p.numel() for p in model.parameters()):12,d}   1 + 14 x 14 = 197")

    model = VisionTransformer(img_size=48, patch_size=8, **ARCHS["vit_nano"]).eval()
    crops = [torch.randn(2, 3, 48, 48), torch.randn(6, 3, 24, 24)]
    with torch.no_grad():
        packed, apart = model(crops), [model(x) for x in crops]
        attention = model.get_attention(crops[0])
    worst = max((a - b).abs().max().item() for a, b in zip(packed, apart))
    print(f"\n2 crops of 48 px and 6 of 24 px in one packed forward: differs by {worst:.1e}")
    print(f"attention of the last block {tuple(attention.shape)}, rows sum to "
          f"{attention.sum(-1).mean():.6f}")
