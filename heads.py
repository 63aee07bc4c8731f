"""Projection heads: from a feature of the backbone to a distribution over K prototypes.

    feature (n, D) --> MLP, GELU --> bottleneck (n, d) --> L2 norm --> cosines with K prototypes
                                                                       (unit rows, times a gain
                                                                       g)

Idea     The loss is taken on scores against K learned directions. Both sides of each score are
         unit vectors, so logits are cosines: no feature can get a larger score by growing
         longer. A prototype can, if its gain g is learned; DINO keeps it at 1 by default. What
         a direction stands for nobody says: training finds it out. The head is needed for the
         loss only, and is left out when the features are used.
Paper    DINO sec. 3.1 and appendix C ("projection head"); DINOv2 sec. 4
Try      python heads.py        a head's sizes, and what the two normalisations do
Change   the layers of the MLP stand in DINOHead.__init__; `Prototypes` is the last layer alone
Tests    pytest tests/test_heads.py

Letters  n rows (class tokens or patches), D width of the backbone, d bottleneck, K prototypes.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Prototypes(nn.Module):
    """K directions of width d, weight-normalised: row k is g_k * v_k / |v_k|.

    Written out rather than taken from torch.nn.utils, so that the keys are the official
    weight_g and weight_v, and so that the module can be copied, sharded and compiled like any
    other.
    """

    def __init__(self, dim: int, n_prototypes: int, learn_gain: bool):
        super().__init__()
        # Length and direction of a row are separate parameters: g_k, and v_k divided by its
        # length. With learn_gain=False every g_k stays at 1, and a logit is a cosine.
        self.weight_g = nn.Parameter(torch.ones(n_prototypes, 1), requires_grad=learn_gain)
        self.weight_v = nn.Parameter(torch.empty(n_prototypes, dim))

        # Uniform in +-1/sqrt(dim), as a freshly made nn.Linear, which the official head wraps.
        # For the logits only the direction matters; the length decides how fast it turns, see
        # `weight`.
        bound = dim**-0.5
        nn.init.uniform_(self.weight_v, -bound, bound)

    def weight(self) -> Tensor:
        """The (K, d) matrix that multiplies the bottleneck."""
        # It is computed at every step, because v changes at every step. The result does not
        # depend on the length of v, so the gradient of v is at a right angle to v. A step of SGD
        # then makes v a little longer (Pythagoras), and a longer v turns more slowly; weight
        # decay makes it shorter again. With AdamW this holds roughly. Example: v is 5 long, and
        # a step of SGD .5, at a right angle: v is then 5.02 long and has turned by 5.7 degrees.
        # With a v of 10 the gradient is half as large, the step .25, and v turns by 1.4 degrees.
        lengths = self.weight_v.norm(dim=1, keepdim=True)  # (K, 1)
        return self.weight_v * (self.weight_g / lengths)  # (K, d)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight())  # (n, K)


class DINOHead(nn.Module):
    """MLP, L2-normalised bottleneck, weight-normalised prototypes: (n, in_dim) -> (n, K).

    The bottleneck is what makes many prototypes affordable: 65,536 of them have 16.8 million
    weights at its width of 256, and would have 134 million at the width of 2048 before it.

    norm_last_layer=True freezes the gains g at 1 (logits stay in [-1, 1]): steadier, and
    slightly worse for small networks trained long (DINO's README). DINOv2 trains them. nlayers
    counts the linear layers of the MLP (>= 1). use_bn puts BatchNorm before each GELU: for
    convnets, and in the presets for few images (training/recipes.py, SMALL).
    """

    def __init__(self, in_dim: int, n_prototypes: int = 65536, hidden_dim: int = 2048,
                 bottleneck_dim: int = 256, nlayers: int = 3, use_bn: bool = False,
                 norm_last_layer: bool = True):
        super().__init__()
        if nlayers < 1:
            raise ValueError(f"nlayers={nlayers}: a head has at least one linear layer")

        # Example: in_dim 384 and nlayers 3 give the widths 384, 2048, 2048, 256, so three
        # linear layers. Each but the last is followed by (BatchNorm and) GELU: the bottleneck
        # is linear.
        widths = [in_dim] + [hidden_dim] * (nlayers - 1) + [bottleneck_dim]
        layers = []
        for i, (a, b) in enumerate(zip(widths, widths[1:])):
            layers.append(nn.Linear(a, b))
            if i < nlayers - 1:
                layers += [nn.BatchNorm1d(b), nn.GELU()] if use_bn else [nn.GELU()]

        # A single layer is called `mlp` itself in the official keys, several are mlp.0, mlp.2,
        # ..., and with BatchNorm mlp.0, mlp.3, ...
        self.mlp = nn.Sequential(*layers) if nlayers > 1 else layers[0]

        # This comes before the prototypes are made, which keep an initialisation of their own.
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                nn.init.zeros_(module.bias)
        self.last_layer = Prototypes(bottleneck_dim, n_prototypes,
                                     learn_gain=not norm_last_layer)

    def forward(self, x: Tensor) -> Tensor:
        x = self.mlp(x)  # (n, d)

        # Unit length. The guard keeps a feature of all zeros from dividing by zero. Half
        # precision rounds 1e-12 to 0, so there it is 1e-6, as in DINOv2's code.
        x = F.normalize(x, eps=1e-6 if x.dtype == torch.float16 else 1e-12)
        return self.last_layer(x)  # (n, K)


if __name__ == "__main__":
    head = DINOHead(384)
    for name, p in head.named_parameters():
        print(f"{name:22s} {tuple(p.shape)}")
    print(
        f"{sum(p.numel() for p in head.parameters()):,d} parameters, of which frozen: weight_g")
    with torch.no_grad():
        bottleneck = head.mlp(torch.randn(4, 384))
        logits = head.last_layer(F.normalize(bottleneck))
        longer = head.last_layer(F.normalize(100 * bottleneck))
        unbounded = head.last_layer(100 * bottleneck)
    print(f"\nlogits {tuple(logits.shape)} are cosines: largest {logits.abs().max():.3f}, and "
          f"{longer.abs().max():.3f} where the bottleneck is 100 times as long")
    print(f"without its normalisation the largest would then be {unbounded.abs().max():.1f}")
    print(f"their spread is 1/sqrt(d): {logits.std():.4f} against {256**-0.5:.4f}")
