"""Vision Transformer: an image becomes tokens; attention lets each of them read all others.

    image (B, 3, H, W) --> patches --> + positions --> [class | registers | patches] (B, N, D)
                                                                |
         list of crop sizes: tokens of all crops end to end  (T, D)
                                                                |
    repeat depth    x += LayerScale(attention(norm(x)))     each image attends to itself only
    times:          x += LayerScale(ffn(norm(x)))           every token for itself
                                                                |
                                 norm --> class token (B, D), patch tokens (B, P, D)

Idea     Everything except attention treats each token alone. So crops of all sizes share one
         long sequence (packing), and only attention splits it again. Nothing is padded, and no
         mask is needed to keep images apart.
Paper    ViT (Dosovitskiy 2021) sec. 3; DINO sec. 3.2; DINOv2 sec. 5; registers (Darcet 2024)
         sec. 2
Try      python vit.py          parameters and tokens of every architecture, and packing checked
Change   a new feed-forward layer is one class below and one line in FFNS
Tests    pytest tests/test_vit.py

Letters  B images, H W pixels, h w patches, P = h*w, R registers, N = 1 + R + P tokens, D width,
         nh heads, hd = D/nh, T tokens of all crops together; b n one group: b images of n
         tokens.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

# ----------------------------------------------------------------------------------------------
# From pixels to tokens


class PatchEmbed(nn.Module):
    """Cut (B, C, H, W) into p x p patches and project each to D numbers: (B, P, D). ViT eq. 1.

    When a side is not a multiple of p, the last rows or columns of pixels are left out, which
    is what the model cards of DINOv2 promise.
    """

    def __init__(self, patch_size: int, in_chans: int, embed_dim: int):
        super().__init__()
        self.patch_size = patch_size
        # A convolution whose stride is its kernel size multiplies each patch by the same
        # matrix. It keeps PyTorch's own initialisation, as in the official code.
        self.proj = nn.Conv2d(in_chans, embed_dim, patch_size, patch_size)

    def forward(self, images: Tensor) -> Tensor:
        x = self.proj(images)  # (B, D, h, w)
        # Patches in reading order: row by row, from the top left. Everything that puts tokens
        # back into an image (attention maps, depth, segmentation) relies on this order.
        x = x.flatten(2).transpose(1, 2)  # (B, h*w, D)
        return x


# How a table of S x S positions is brought to h x w patches: (h, w), S -> arguments of
# F.interpolate. Two rules exist because two generations of released weights were trained with
# them, and they differ visibly.
#   offset     DINO, and DINOv2 without registers: bicubic by the *scale* (h + 0.1) / S.
#              PyTorch computes the size as floor(S * scale). Without the 0.1 a rounding error
#              makes 38 patches of 39 where the table has a side of 37 positions. It also samples
#              at that scale, so the positions are a little shifted, and the released weights
#              were trained with them. Example, a side of 14 positions for 6 patches: patch i
#              takes what is at (i + 0.5) * 14 / 6.1 - 0.5 in the table, so the last one (i = 5)
#              at 12.12. By the size it would be 12.33.
#   antialias  DINOv2 with registers: bicubic to the *size* (h, w), with antialiasing.
POS_EMBED_RESIZE = {
    "offset": lambda grid, side: dict(scale_factor=tuple((n + 0.1) / side for n in grid)),
    "antialias": lambda grid, side: dict(size=grid, antialias=True)}


def resize_pos_embed(pos_embed: Tensor, grid: tuple[int, int], rule: str) -> Tensor:
    """Positions (1, 1 + S*S, D) of an S x S grid -> (1, 1 + h*w, D) of grid = (h, w)."""
    cls = pos_embed[:, :1]  # (1, 1, D)
    patches = pos_embed[:, 1:]
    side = round(patches.shape[1]**0.5)
    # Height and width have to be compared, not the number of patches: an image of 448 x 112
    # pixels has as many patches as one of 224 x 224, but other positions.
    if grid == (side, side):
        return pos_embed

    # The table is treated as a small image with D channels.
    table = patches.float().reshape(1, side, side, -1).permute(0, 3, 1, 2)  # (1, D, side, side)
    table = F.interpolate(table, mode="bicubic", **POS_EMBED_RESIZE[rule](grid, side))
    table = table.flatten(2).transpose(1, 2)  # (1, h*w, D)
    return torch.cat([cls, table.to(cls.dtype)], 1)  # (1, 1 + h*w, D)


# ----------------------------------------------------------------------------------------------
# The two branches of a block, on packed tokens
#
# Example: 2 crops of 5 tokens and 3 crops of 2 tokens are packed into T = 16 rows,
#
#     rows    0-4 | 5-9 | 10-11 | 12-13 | 14-15        groups = ((2, 5), (3, 2))
#     crops    0     1      2       3       4
#
# Linear layers and norms see 16 rows. Attention takes rows 0-9 as (2, 5, D), rows 10-15 as (3,
# 2, D).

Groups = tuple[tuple[int, int], ...]  # one (b, n) per crop size; the sum of b*n is T


class Attention(nn.Module):
    """Multi-head self-attention: each token becomes a weighted mean of all. ViT appendix A.

    Each image of each group attends to itself only.
    """

    def __init__(self, dim: int, num_heads: int):
        super().__init__()
        self.num_heads = num_heads
        self.qkv = nn.Linear(dim, 3 * dim)  # queries, keys and values in one product
        self.proj = nn.Linear(dim, dim)

    def split_heads(self, qkv: Tensor, b: int, n: int) -> Tensor:
        """(b*n, 3*D) -> queries, keys, values (3, b, nh, n, hd)."""
        # A row has D numbers of query, D of key and D of value; each D is nh heads of hd
        # numbers. The head has to come before the tokens, because every head multiplies
        # matrices of its own. hd is computed here, because with b = 0 images
        # view(..., -1) could not infer it.
        hd = qkv.shape[1] // (3 * self.num_heads)
        return qkv.view(b, n, 3, self.num_heads, hd).permute(2, 0, 3, 1, 4)

    def forward(self, x: Tensor, groups: Groups) -> Tensor:
        # A linear layer treats each row alone, so one product serves all crops. Attention
        # compares rows, so they are split by group first: each group is a batch of its own.
        qkv = self.qkv(x)  # (T, 3*D)
        sizes = [b * n for b, n in groups]
        outs = []
        for (b, n), rows in zip(groups, qkv.split(sizes)):
            q, k, v = self.split_heads(rows, b, n).unbind(0)
            o = attention(q, k, v)  # (b, nh, n, hd)
            # Heads beside each other again, rows end to end again: (b*n, D).
            outs.append(o.transpose(1, 2).flatten(0, 1).flatten(1))
        # With one group there is nothing to join, and torch.cat would copy it.
        joined = torch.cat(outs) if len(outs) > 1 else outs[0]
        return self.proj(joined)  # (T, D)

    def weights(self, x: Tensor, b: int, n: int, rows=slice(None)) -> Tensor:
        """softmax(q k^T / sqrt(hd)), (b, nh, n, n): the weights of a block, to be plotted. DINO
        fig. 1. `rows`, a slice or a list of numbers, picks the tokens that ask: (b, nh, r, n).
        """
        q, k, _ = self.split_heads(self.qkv(x), b, n).unbind(0)
        # The product is taken in float32, also inside autocast, so that small weights are not
        # rounded away in a plot.
        with torch.autocast(q.device.type, enabled=False):
            q = q[:, :, rows].float() * q.shape[-1]**-0.5
            return (q @ k.float().transpose(-2, -1)).softmax(-1)  # (b, nh, n, n), or r rows


class Mlp(nn.Module):
    """Linear, GELU, Linear. ViT eq. 3."""

    def __init__(self, dim: int, hidden: int):
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden)
        self.fc2 = nn.Linear(hidden, dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x)))


class SwiGLU(nn.Module):
    """silu(gate) * value, then Linear. DINOv2 table 17; Shazeer 2020.

    With gate, value and output it has three matrices where the MLP has two: two thirds of the
    width keep the cost the same.
    """

    def __init__(self, dim: int, hidden: int):
        super().__init__()
        # Rounded up to a multiple of 8, which the kernels for matrix products prefer.
        hidden = (int(hidden * 2 / 3) + 7) // 8 * 8
        # The gate comes first, the value second, as in the released keys.
        self.w12 = nn.Linear(dim, 2 * hidden)
        self.w3 = nn.Linear(hidden, dim)

    def forward(self, x: Tensor) -> Tensor:
        # One product for both halves. Each hidden unit has a gate, which decides for this token
        # how much of the unit's value goes on.
        gate, value = self.w12(x).chunk(2, -1)
        return self.w3(F.silu(gate) * value)


FFNS = {"mlp": Mlp, "swiglu": SwiGLU}


class LayerScale(nn.Module):
    """A learned factor per channel. It starts near zero, so that a block changes little at
    first.

    CaiT (Touvron 2021) sec. 2; DINOv2 starts it at 1e-5. The presets for few images
    start it at 1, because their networks have few blocks and their runs are short.
    """

    def __init__(self, dim: int, init: float):
        super().__init__()
        self.gamma = nn.Parameter(torch.full((dim,), float(init)))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.gamma


# ----------------------------------------------------------------------------------------------
# Stochastic depth that skips the work
#
# In training, each residual branch of the student leaves out some of the images, so that no
# block can rely on the one before it. (The teacher leaves out none, and no evaluation does.)
# Usually the branch is computed for all of them and multiplied by zero for some. Here it is
# computed for the kept ones only. Which these are is drawn before the forward pass (the plan),
# so that the blocks contain no randomness and can be compiled.


class Keep(NamedTuple):
    """Which images take part in one residual branch of one block."""

    rows: Tensor  # (T',) int64, where the kept tokens are in the packed sequence
    # An image is kept with chance kept / b. What the branch adds to it is multiplied by b / kept,
    # so that on average as much is added as without stochastic depth.
    scale: Tensor  # (T', 1), b / kept
    groups: Groups  # (kept, n) per crop size


def drop_path_plan(
    rates: list[float], groups: Groups, generator: torch.Generator,
    device: torch.device = torch.device("cpu")
) -> list[tuple[Keep, Keep] | None]:
    """Draw for each block the images that its attention and its FFN will see. DINOv2 sec. 5.

    In each group exactly max(int(b * (1 - rate)), 1) of b images are kept, without replacement
    and independently for the two branches. None stands for "all of them".

    Example: one group of b = 4 images of n = 3 tokens, at the rate 0.5. Two images are kept. If
    the random order of the images is 2, 0, 3, 1, these are images 2 and 0, with the rows

        rows = [6, 7, 8, 0, 1, 2]     scale = 4 / 2 = 2     groups = ((2, 3),)
    """
    # One random order of the images for each branch (two per block) and group. It is drawn on
    # the CPU, so that it is the same on every kind of device, and sent to the device without
    # waiting for the copy (on MPS the memory could be reused before it is read, so there it
    # waits). A GPU reads by itself only memory that the system may not move, which is pinned.
    rows_in_order = []  # for each group: the rows of all images, (branches, b, n)
    start = 0
    for b, n in groups:
        order = torch.rand(2 * len(rates), b, generator=generator).argsort(1)  # (branches, b)
        if device.type == "cuda":
            order = torch.empty_like(order, pin_memory=True).copy_(order)
        order = order.to(device, non_blocking=device.type != "mps")
        first_rows = order * n + start  # (branches, b)
        rows_in_order.append(first_rows[:, :, None] + torch.arange(n, device=device))
        start += b * n

    # A branch takes the first k images of its random order, of every group. k depends on b and
    # the rate and not on chance, so that the shapes are the same at every step.
    plan = []
    for i, rate in enumerate(rates):
        kept = tuple((max(int(b * (1 - rate)), 1), n) for b, n in groups)
        if kept == tuple(groups):
            plan.append(None)
            continue
        scales = []
        for (b, n), (k, _) in zip(groups, kept):
            scales.append(torch.full((k * n, 1), b / k, device=device))
        scale = torch.cat(scales)  # (T', 1)
        branches = []
        for j in (2 * i, 2 * i + 1):  # attention, FFN
            rows = [t[j, :k].flatten() for t, (k, _) in zip(rows_in_order, kept)]
            branches.append(Keep(torch.cat(rows), scale, kept))
        plan.append(tuple(branches))
    return plan


def residual(x: Tensor, branch, groups: Groups, keep: Keep | None) -> Tensor:
    """x + branch(x), where the branch runs only on the rows of `keep`. x is (T, D)."""
    if keep is None:  # nothing is dropped: no plan, or all images are kept
        return x + branch(x, groups)

    # The branch sees the kept rows only; the rows of dropped images come out as they went in.
    kept = x.index_select(0, keep.rows)  # (T', D)
    changed = kept + keep.scale * branch(kept, keep.groups)  # (T', D)
    # No row occurs twice, so writing the rows does what adding to them would do, without the
    # slower atomic additions that a GPU needs where rows might repeat.
    return x.index_copy(0, keep.rows, changed)  # (T, D)


class Block(nn.Module):
    """Attention and feed-forward, each behind a norm and added back. ViT eq. 2 and 3."""

    def __init__(self, dim: int, num_heads: int, hidden: int, ffn_layer: str,
                 layerscale: float | None, norm_eps: float):
        super().__init__()
        # Without LayerScale, nn.Identity has no parameters: the keys are those of DINO.
        scale = (lambda: LayerScale(dim, layerscale)) if layerscale else nn.Identity
        self.norm1 = nn.LayerNorm(dim, eps=norm_eps)
        self.attn = Attention(dim, num_heads)
        self.ls1 = scale()
        self.norm2 = nn.LayerNorm(dim, eps=norm_eps)
        self.mlp = FFNS[ffn_layer](dim, hidden)
        self.ls2 = scale()

    def attend(self, x: Tensor, groups: Groups) -> Tensor:
        return self.ls1(self.attn(self.norm1(x), groups))

    def feed(self, x: Tensor, groups: Groups) -> Tensor:
        # Tokens are independent here; `groups` is taken so that `residual` can call both alike.
        return self.ls2(self.mlp(self.norm2(x)))

    def forward(self, x: Tensor, groups: Groups,
                keep: tuple[Keep, Keep] | None = None) -> Tensor:
        # Attention moves information between tokens, the feed-forward layer works on each
        # alone.
        keep_attn, keep_ffn = keep or (None, None)
        x = residual(x, self.attend, groups, keep_attn)
        return residual(x, self.feed, groups, keep_ffn)


# ----------------------------------------------------------------------------------------------
# The network


class VisionTransformer(nn.Module):
    """ViT of DINO, iBOT and DINOv2. State-dict keys equal the official ones.

    img_size is the side, in pixels, for which the table of positions is built. Any other image
    size (at least one patch) is served by resampling the table. Without `mask_token` the keys
    are those of DINO, with it (and LayerScale) those of DINOv2. ValueError for sizes or names
    that do not fit.
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
            ffn_layer: str = "mlp",  # a name of FFNS
            num_register_tokens: int = 0,
            layerscale: float | None = None,  # DINOv2: 1e-5
            mask_token: bool = False,
            drop_path_rate: float = 0.0,
            drop_path_uniform: bool = False,  # False: rises linearly from 0 to the rate (DINO)
            pos_embed_resize: str = "offset",  # a name of POS_EMBED_RESIZE
            norm_eps: float = 1e-6,  # of every LayerNorm; some of Hugging Face's have 1e-12
    ):
        super().__init__()
        if ffn_layer not in FFNS:
            raise ValueError(f"ffn_layer {ffn_layer!r}: choose from {', '.join(FFNS)}")
        if pos_embed_resize not in POS_EMBED_RESIZE:
            choices = ", ".join(POS_EMBED_RESIZE)
            raise ValueError(f"pos_embed_resize {pos_embed_resize!r}: choose from {choices}")
        if img_size < patch_size:
            raise ValueError(f"img_size {img_size} is smaller than one patch of {patch_size}")
        if embed_dim % num_heads:
            raise ValueError(f"embed_dim {embed_dim} does not divide over {num_heads} heads")

        self.img_size = img_size // patch_size * patch_size
        self.patch_size = patch_size
        self.in_chans = in_chans
        self.embed_dim = embed_dim
        self.depth = depth
        self.num_heads = num_heads
        self.num_register_tokens = num_register_tokens
        self.pos_embed_resize = pos_embed_resize
        # True: activations inside blocks are not kept, but computed again in the backward pass.
        self.activation_checkpointing = False

        # DINOv2 drops the same share of images in every block, DINO more in deeper blocks.
        if drop_path_uniform:
            self.drop_path_rates = [drop_path_rate] * depth
        else:
            last = max(depth - 1, 1)
            self.drop_path_rates = [drop_path_rate * i / last for i in range(depth)]

        # What is learned. The names are the official keys, so released weights load as they
        # are. PyTorch draws the first values of the layers in the order in which they are made:
        # another order of these lines would give another network for the same seed.
        self.patch_embed = PatchEmbed(patch_size, in_chans, embed_dim)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, embed_dim))
        positions = 1 + (img_size // patch_size)**2
        self.pos_embed = nn.Parameter(torch.zeros(1, positions, embed_dim))
        # A token that a configuration does not use is None, so it is not in the state dict.
        self.register_tokens = None
        if num_register_tokens:
            self.register_tokens = nn.Parameter(torch.zeros(1, num_register_tokens, embed_dim))
        self.mask_token = nn.Parameter(torch.zeros(1, embed_dim)) if mask_token else None
        hidden = int(embed_dim * mlp_ratio)
        self.blocks = nn.ModuleList(
            Block(embed_dim, num_heads, hidden, ffn_layer, layerscale, norm_eps)
            for _ in range(depth))
        self.norm = nn.LayerNorm(embed_dim, eps=norm_eps)
        self.init_weights(cls_std=1e-6 if layerscale else 0.02)

    def init_weights(self, cls_std: float):
        """Normal(0, .02) for linear layers and positions; registers start near zero.

        So does the class token of DINOv2, whose networks are those with LayerScale.
        """
        # trunc_normal_ cuts at -2 and 2, which is 100 standard deviations: in effect a normal
        # distribution, as in the papers' code. The mask token stays at zero, as there.
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
        """Patches down and across: (h, w). ValueError for images smaller than one patch."""
        height, width = images.shape[-2:]
        h = height // self.patch_size
        w = width // self.patch_size
        if not h or not w:
            raise ValueError(
                f"images of {height} x {width} pixels are smaller than a patch of {self.patch_size}"
            )
        return h, w

    def prepare_tokens(self, images: Tensor, masks: Tensor | None = None) -> Tensor:
        """Images (B, C, H, W), masks (B, P) bool or None -> tokens (B, N, D)."""
        grid = self.grid(images)
        x = self.patch_embed(images)  # (B, P, D)

        # iBOT sec. 3.1: the content of a masked patch is replaced by one learned token. Its
        # position is added below as for any other patch, so the network can tell which one it
        # is.
        if masks is not None:
            if self.mask_token is None:
                raise ValueError("masks were given to a ViT built without mask_token=True")
            x = torch.where(masks[:, :, None], self.mask_token.to(x.dtype), x)  # (B, P, D)

        # The class token stands at place 0. It belongs to no patch; what it gathers from them
        # by attention, block after block, becomes the feature of the whole image. (x.shape[0] is
        # len(x), but torch.export would take the latter for a number that never changes.)
        B = x.shape[0]
        cls = self.cls_token.expand(B, -1, -1)  # (B, 1, D)
        x = torch.cat([cls, x], 1)  # (B, 1 + P, D)
        x = x + resize_pos_embed(self.pos_embed, grid, self.pos_embed_resize)

        # Registers have no place in the image, so they come after the positions are added. They
        # give attention somewhere to keep global information. Large networks such as DINOv2's
        # otherwise keep it in patches of the background, where it spoils the attention maps;
        # DINO's do not. Darcet 2024.
        if self.register_tokens is not None:
            registers = self.register_tokens.expand(B, -1, -1)  # (B, R, D)
            x = torch.cat([x[:, :1], registers, x[:, 1:]], 1)  # (B, N, D)
        return x

    def draw_plan(self, images: Tensor | list[Tensor], generator: torch.Generator):
        """A stochastic-depth plan for these images; None when the rate is 0. See
        drop_path_plan.
        """
        if not any(self.drop_path_rates):
            return None
        views = images if isinstance(images, (list, tuple)) else [images]
        # The number of tokens of each crop size follows from its pixels: the plan can be drawn
        # before any of them has been computed.
        groups = []
        for x in views:
            h, w = self.grid(x)
            groups.append((len(x), 1 + self.num_register_tokens + h * w))
        return drop_path_plan(self.drop_path_rates, tuple(groups), generator, views[0].device)

    # -- tokens out

    def forward_features(self, images, masks=None, plan=None):
        """Images (B, C, H, W) -> a dictionary with the keys of DINOv2's code.

        A list with one tensor for each crop size gives a list of such dictionaries.
        x_norm_clstoken (B, D), x_norm_regtokens (B, R, D), x_norm_patchtokens (B, P, D), all
        after the final norm; x_prenorm (B, N, D) before it; masks as given. For a list, `masks`
        is a list too. `plan` (draw_plan) is stochastic depth, for the student in training only.
        """
        is_list = isinstance(images, (list, tuple))
        views = list(images) if is_list else [images]
        if not is_list or masks is None:
            masks = [masks] * len(views)

        # Pack: the tokens of all images, one after the other.
        tokens = [self.prepare_tokens(x, m) for x, m in zip(views, masks, strict=True)]
        groups = tuple((t.shape[0], t.shape[1]) for t in tokens)
        x = torch.cat([t.flatten(0, 1) for t in tokens])  # (T, D)

        x = self.run_blocks(x, groups, plan)
        normed = self.norm(x)  # (T, D)

        # Unpack: split the rows by crop size, and each crop's tokens by what they are.
        sizes = [b * n for b, n in groups]
        first_patch = 1 + self.num_register_tokens
        outs = []
        for (b, n), pre, post, mask in zip(groups, x.split(sizes), normed.split(sizes), masks):
            post = post.unflatten(0, (b, n))  # (b, n, D)
            out = {
                "x_norm_clstoken": post[:, 0], "x_norm_regtokens": post[:, 1:first_patch],
                "x_norm_patchtokens": post[:, first_patch:],
                "x_prenorm": pre.unflatten(0, (b, n)), "masks": mask}
            outs.append(out)
        return outs if is_list else outs[0]

    def run_blocks(self, x: Tensor, groups: Groups, plan) -> Tensor:
        """Packed tokens (T, D) through all blocks: (T, D)."""
        for block, keep in zip(self.blocks, plan or [None] * self.depth, strict=True):
            # Checkpointing keeps only the input of each block and computes the block once more
            # in the backward pass: far less memory, and at most a third more time, because
            # a forward pass costs half of a backward pass (1.15 times the time was measured).
            if self.activation_checkpointing and torch.is_grad_enabled():
                x = checkpoint(block, x, groups, keep, use_reentrant=False)
            else:
                x = block(x, groups, keep)
        return x

    def forward(self, images, masks=None, plan=None):
        """Class tokens after the final norm, as the papers' k-NN compares them: (B, D).

        A list with one tensor for each crop size gives a list of them.
        """
        out = self.forward_features(images, masks, plan)
        if isinstance(out, dict):
            return out["x_norm_clstoken"]
        return [o["x_norm_clstoken"] for o in out]

    def get_intermediate_layers(self, images: Tensor, n: int | list[int] = 1,
                                reshape: bool = False, return_class_token: bool = False,
                                norm: bool = True) -> tuple:
        """Patch tokens of the last n blocks, or of the blocks listed in n (0-based).

        Each is (B, P, D), or (B, D, h, w) with `reshape`; pairs (patches, class token) with
        `return_class_token`. The final norm is applied to each, unless norm=False (depth
        heads). ValueError for blocks that do not exist.
        """
        wanted = range(self.depth - n, self.depth) if isinstance(n, int) else list(n)
        if not all(0 <= i < self.depth for i in wanted) or not wanted:
            raise ValueError(
                f"n={n} asks for blocks that a ViT of depth {self.depth} does not have")

        x = self.prepare_tokens(images)
        b, count = x.shape[:2]
        h, w = self.grid(images)
        first_patch = 1 + self.num_register_tokens

        # One pass through the blocks; the outputs that are asked for are picked on the way.
        x = x.flatten(0, 1)  # (b*count, D)
        outputs = {}
        for i, block in enumerate(self.blocks):
            x = block(x, ((b, count),))
            if i not in wanted:
                continue
            # The final norm was trained on the output of the last block. DINOv2's code applies
            # it to earlier blocks as well, and so do the linear heads that were released.
            y = self.norm(x) if norm else x
            y = y.unflatten(0, (b, count))  # (b, N, D)
            patches = y[:, first_patch:]
            if reshape:
                patches = patches.transpose(1, 2).unflatten(2, (h, w))  # (b, D, h, w)
            outputs[i] = (patches, y[:, 0]) if return_class_token else patches
        return tuple(outputs[i] for i in wanted)

    def get_attention(self, images: Tensor, block: int = -1, rows=slice(None)) -> Tensor:
        """Exact attention of one block: (B, nh, N, N); every row sums to one.

        Row 0 is the class token's. With `rows`, a slice or a list of numbers, only those are
        computed: 60 x 60 patches have 13 million pairs in each head, which take 52 MB. Tokens
        are ordered class, registers, patches: skip the first 1 + num_register_tokens columns
        before reshaping to the (h, w) grid. ValueError for a block that does not exist.
        """
        if not -self.depth <= block < self.depth:
            raise ValueError(f"block {block}: this ViT has blocks 0 to {self.depth - 1}")
        x = self.prepare_tokens(images)
        b, n = x.shape[:2]
        x = x.flatten(0, 1)  # (b*n, D)

        # Up to the block that is asked for everything runs on the fast path. Only there the
        # matrix of all pairs is formed, from the same queries and keys.
        index = block % self.depth
        for layer in self.blocks[:index]:
            x = layer(x, ((b, n),))
        layer = self.blocks[index]
        return layer.attn.weights(layer.norm1(x), b, n, rows)

    def get_class_attention(self, images: Tensor, block: int = -1) -> Tensor:
        """How much the class token of one block attends to each patch: (B, nh, h, w).

        The columns of the class token itself and of the registers are left out. So a map adds
        up to less than one: the rest of the attention went to those tokens.
        """
        # Row 0 of the matrix belongs to the class token. The columns are in the order of the
        # tokens: class token, registers, then the patches row by row.
        attention = self.get_attention(images, block, rows=[0])  # (B, nh, 1, N)
        first_patch = 1 + self.num_register_tokens
        return attention[:, :, 0, first_patch:].unflatten(2, self.grid(images))


# Heads are 64 wide everywhere, which suits the attention kernels (DINOv2 sec. 5). Other choices
# are arguments of VisionTransformer: the released DINOv2 networks have LayerScale and a mask
# token, and the giant has ffn_layer="swiglu".
ARCHS = {
    "vit_pico": dict(embed_dim=64, depth=4, num_heads=1),  # ours: to be distilled from nano
    "vit_nano": dict(embed_dim=128, depth=4, num_heads=2),  # ours: minutes on a laptop
    "vit_tiny": dict(embed_dim=192, depth=12, num_heads=3),
    "vit_small": dict(embed_dim=384, depth=12, num_heads=6),
    "vit_base": dict(embed_dim=768, depth=12, num_heads=12),
    "vit_large": dict(embed_dim=1024, depth=24, num_heads=16),
    "vit_giant2": dict(embed_dim=1536, depth=40, num_heads=24)}

# ----------------------------------------------------------------------------------------------
# Kernels


def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """softmax(q k^T / sqrt(hd)) v: three times (b, nh, n, hd) -> one. ViT eq. 6 and 7.

    PyTorch's scaled_dot_product_attention works tile by tile and does not store the weights.
    """
    # In bfloat16 on a CPU the formula written out is faster, with gradients or with fewer than
    # 512 tokens: the kernel's backward pass takes two to five times as long there, its forward
    # pass up to twice. Then the n x n weights are stored. Under autocast softmax gives float32,
    # so the weights are brought back to the type of v.
    low_precision_on_cpu = q.device.type == "cpu" and q.dtype == torch.bfloat16
    if low_precision_on_cpu and (torch.is_grad_enabled() or q.shape[-2] < 512):
        scores = (q * q.shape[-1]**-0.5) @ k.transpose(-2, -1)  # (b, nh, n, n)
        return scores.softmax(-1).to(v.dtype) @ v
    return F.scaled_dot_product_attention(q, k, v)


if __name__ == "__main__":
    print("architecture   parameters   tokens at 224 px, patch 16")
    for name, arch in ARCHS.items():
        with torch.device("meta"):  # shapes without memory: even the giant takes no time
            model = VisionTransformer(**arch)
        print(
            f"{name:12s} {sum(p.numel() for p in model.parameters()):12,d}   1 + 14 x 14 = 197")

    model = VisionTransformer(img_size=48, patch_size=8, **ARCHS["vit_nano"]).eval()
    crops = [torch.randn(2, 3, 48, 48), torch.randn(6, 3, 24, 24)]
    with torch.no_grad():
        packed = model(crops)
        apart = [model(x) for x in crops]
    worst = max((a - b).abs().max().item() for a, b in zip(packed, apart))
    print(f"\n2 crops of 48 px and 6 of 24 px in one packed forward: differs by {worst:.1e}")
