"""Convnet: torchvision's convolutional networks, to be trained and judged as the ViT is.

    image (B, 3, H, W) --> torchvision's layers, classifier left out --> map (B, D, h, w)
                                                                          |
                              mean over places --> the image's feature (B, D), as a class token
                              the places themselves --> patch tokens (B, h*w, D)

Idea     DINO needs nothing that only a ViT has: a feature of the image, and a teacher that is
         an average of the student. A convnet has no tokens, so the mean of its last map is
         taken for the class token, and the places of the map for the patch tokens.
Paper    DINO sec. 3.1 and table 2 (ResNet-50); He 2016
Try      python -m backbones.convnet  widths and parameters
Change   another of torchvision's convnets is one name in CONVNETS
Tests    pytest tests/backbones/test_convnet.py

Letters  B images, D channels of the last map, h w its height and width: 1/32 of the image's.
"""

import torchvision
from torch import Tensor, nn

CONVNETS = ("resnet18", "resnet50", "resnet101", "wide_resnet50_2", "mobilenet_v3_small",
            "convnext_tiny")
# The names that torchvision gives to the parts that are left out.
CLASSIFIERS = ("avgpool", "fc", "classifier")


class ConvNet(nn.Module):
    """A torchvision convnet without its classifier; state-dict keys are torchvision's own.

    Those are also the keys of the released dino_resnet50. Called like vit.VisionTransformer:
    lists of sizes are run one size after the other (BatchNorm sees each size alone, as in the
    official code), masks are refused, and there is no stochastic depth, which a ConvNeXt has in
    torchvision: the teacher has none, and what a run draws must not depend on its past.
    """

    patch_size = 1  # pixels: images need not be multiples of anything

    def __init__(self, name: str = "resnet50", img_size: int = 224):
        super().__init__()
        # To be told to others: its name, and the size that it was trained on. Any other size will
        # do.
        self.name = name
        self.img_size = img_size
        if name not in CONVNETS:
            raise ValueError(f"convnet {name!r}: choose from {', '.join(CONVNETS)}")

        # The parts of torchvision's network become parts of this one, under the same names.
        options = {"stochastic_depth_prob": 0.0} if name.startswith("convnext") else {}
        whole = torchvision.models.get_model(name, weights=None, **options)
        linear_layers = []
        for child, module in whole.named_children():
            if child in CLASSIFIERS:
                linear_layers += [m for m in module.modules() if isinstance(m, nn.Linear)]
            else:
                self.add_module(child, module)

        # D is what the first linear layer of the classifier takes: `fc` of a ResNet is one, the
        # `classifier` of the others has one inside.
        self.embed_dim = linear_layers[0].in_features

    def last_map(self, images: Tensor) -> Tensor:
        """(B, 3, H, W) -> the last map (B, D, h, w). Parts stand in the order they are run."""
        for layer in self.children():
            images = layer(images)
        return images

    def forward_features(self, images, masks=None, plan=None):
        """As vit.VisionTransformer.forward_features; a list of sizes gives a list.

        x_norm_patchtokens (B, h*w, D) are the places, x_norm_clstoken (B, D) is their mean.
        """
        if isinstance(images, (list, tuple)):
            masks = masks if masks is not None else [None] * len(images)
            return [self.forward_features(x, m) for x, m in zip(images, masks, strict=True)]

        # A mask would have to be a hole in the image, which a convolution smears over its
        # surroundings: there is no token to be replaced.
        if masks is not None:
            raise ValueError("masks were given to a convnet, which has no patches to hide")

        # There are no registers: an empty tensor, so that the dictionary has the same keys.
        x = self.last_map(images).flatten(2).transpose(1, 2)  # (B, h*w, D)
        return {
            "x_norm_clstoken": x.mean(1), "x_norm_regtokens": x[:, :0], "x_norm_patchtokens": x,
            "x_prenorm": x, "masks": None}

    def forward(self, images):
        """Features (B, D), or a list of them for a list of sizes."""
        out = self.forward_features(images)
        if isinstance(out, dict):
            return out["x_norm_clstoken"]
        return [features["x_norm_clstoken"] for features in out]

    def draw_plan(self, images, generator) -> None:
        """No stochastic depth here."""


if __name__ == "__main__":
    for name in CONVNETS:
        net = ConvNet(name)
        count = sum(p.numel() for p in net.parameters())
        print(f"{name:20s} width {net.embed_dim:5d}  {count:11,d} parameters, "
              f"{len(net.state_dict())} tensors")
