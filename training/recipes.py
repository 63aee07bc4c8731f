"""Recipes: the papers as short dictionaries of what differs, and the same at small scale.

    Config's defaults  <--  PRESETS[name]  <--  flags on the command line
    (DINO, ViT-S/16)        what differs        what you say wins

Idea     A paper's recipe is a difference to another one. Read side by side, the presets show
         what each run changed; the comment above tells hardware, time and result, or whose they
         are.
Paper    DINO A, iBOT 4.1, DINOv2 table 16; the READMEs and configurations of their code
Try      python -m training.recipes      the presets, side by side
Change   a new recipe is one entry in PRESETS
Tests    pytest tests/training/test_recipes.py
"""

import math
from dataclasses import replace

from training.config import Config

# ----------------------------------------------------------------------------------------------
# Other data, other batches: the papers had a million images or more, a thousand of them a step

SCALED = ("momentum_teacher", "n_prototypes", "ibot_n_prototypes", "warmup_epochs", "lr",
          "lr_scaling", "local_crops_scale")


def auto_scale(config: Config, images: int, batch: int) -> Config:
    """--auto_scale: `config` for a set of `images`, `batch` of them a step over all processes.

    Sets the fields of SCALED that no flag named. docs/scaling.md has the table and what of it
    was measured.
    """
    steps = config.epochs * (config.epoch_length or max(images // batch, 1))
    # The teacher averages the student's last 1 / (1 - m) steps: DINO's 250 steps of 1,024
    # images, so as many images at any batch. A short run has no time for that: a fortieth of it
    # at most.
    memory = max(min(250 * 1024 / batch, steps / 40, 10_000), 10)
    # A prototype needs images of its own: some twenty. Powers of two suit the hardware.
    prototypes = min(max(2**round(math.log2(max(images, 1) / 20)), 256), 65536)
    # Adam's step has the same length whatever the batch; a larger batch makes it surer, by the
    # root of its size. Below 256 images it is time that is short: as sure as need be.
    lr = 2e-3 * math.sqrt(max(batch, 256) / 1024)
    # To know a thing from a twentieth of its image takes millions of looks; fewer images mean
    # fewer looks, and mostly smaller images: begin with a quarter.
    low = min(max(0.05 * (1e6 / images)**0.35, 0.05), 0.25)
    rules = dict(momentum_teacher=round(1 - 1 / memory, 4), n_prototypes=prototypes,
                 ibot_n_prototypes=prototypes, lr=float(f"{lr:.2g}"), lr_scaling="none",
                 warmup_epochs=min(max(config.epochs // 10, 1), config.epochs - 1),
                 local_crops_scale=(round(low, 2), round(low + 0.35, 2)))
    return replace(config, **{k: v for k, v in rules.items() if k not in config.given})


# ----------------------------------------------------------------------------------------------
# The papers, and the same at small scale

# Small images and minutes instead of days: what follows from their number is --auto_scale's.
# BatchNorm in the head keeps the first features apart until the teacher has learned to, and a
# narrow bottleneck makes its first answers sharp: cosines spread as 1/sqrt(width).
SMALL = dict(auto_scale=True, use_bn_in_head=True, head_bottleneck_dim=32, center_momentum=0.8,
             freeze_last_layer_epochs=0, weight_decay_end=0.1, drop_path_rate=0.0)

# What the two later papers add, in the measure that a short run can bear: at a weight of 1 the
# patches take over the features before there is anything in them to share.
SMALL_IBOT = dict(ibot_weight=0.2, separate_head=True, ibot_head_bottleneck_dim=32)

SMALL_DINOV2 = SMALL_IBOT | dict(koleo_weight=0.1, layerscale=1.0, num_register_tokens=2,
                                 pos_embed_resize="antialias")

SHAPES = SMALL | dict(
    data="shapes",
    val_data="shapes:val",
    arch="vit_nano",
    patch_size=5,
    head_hidden_dim=256,
    global_crops_size=40,
    global_crops_scale=(0.5, 1.0),
    local_crops_size=25,
    local_crops_number=2,
    photometry="small",
    # Many small steps: at 16 images a step the same images end 9 points lower (one seed).
    batch_size_per_gpu=8,
    epochs=4,
    knn_every=1)

CIFAR10 = SMALL | dict(data="CIFAR10", val_data="CIFAR10:val", arch="vit_tiny", patch_size=4,
                       head_hidden_dim=1024, global_crops_size=32,
                       global_crops_scale=(0.4, 1.0), local_crops_size=16, local_crops_number=6,
                       photometry="small", batch_size_per_gpu=128, epochs=100)

IMAGENETTE = SMALL | dict(data="Imagenette", val_data="Imagenette:val", arch="vit_small",
                          patch_size=16, global_crops_size=128, local_crops_size=64,
                          local_crops_number=6, batch_size_per_gpu=64, epochs=200)

# DINOv2 on ImageNet-1k: iBOT and KoLeo on top of DINO, a deeper and steadier ViT. An epoch is
# 1,250 steps whatever the data.
DINOV2 = dict(data="ImageNet", val_data="ImageNet:val", arch="vit_large", layerscale=1e-5,
              drop_path_rate=0.3, drop_path_uniform=True, norm_last_layer=False,
              ibot_weight=1.0, koleo_weight=0.1, global_crops_scale=(0.32, 1.0),
              local_crops_scale=(0.05, 0.32), photometry="dinov2", teacher_temp=0.07,
              warmup_teacher_temp_epochs=30, momentum_teacher=0.992, epoch_length=1250, lr=4e-3,
              lr_scaling="sqrt_1024", layerwise_decay=0.9, patch_embed_lr_mult=0.2,
              clip_mode="network")

# What the released models have on top: Sinkhorn-Knopp, heads of their own, SwiGLU, a long
# schedule.
DINOV2_LONG = dict(patch_size=14, local_crops_size=98, ffn_layer="swiglu", drop_path_rate=0.4,
                   centering="sinkhorn", separate_head=True, n_prototypes=131072,
                   ibot_n_prototypes=131072, head_bottleneck_dim=384,
                   ibot_head_bottleneck_dim=256, momentum_teacher=0.994, epochs=500,
                   warmup_epochs=80, lr=2e-4, weight_decay_end=0.2, layerwise_decay=1.0,
                   batch_size_per_gpu=32)

PRESETS = {
    # The default. Two cores of a laptop's kind, 4 minutes (fp32: 5): k-NN 56.0 to 81.5, mean
    # 69.9.
    "shapes": SHAPES,
    "shapes_dino": SHAPES,
    "shapes_ibot": SHAPES | SMALL_IBOT,
    # Steadier over seeds than DINO alone, which KoLeo keeps from features of few dimensions.
    "shapes_dinov2": SHAPES | SMALL_DINOV2 | dict(ibot_weight=0.1),
    # For one GPU; not yet measured.
    "cifar10": CIFAR10,
    "cifar10_dino": CIFAR10,
    "cifar10_ibot": CIFAR10 | SMALL_IBOT,
    "cifar10_dinov2": CIFAR10 | SMALL_DINOV2,
    "imagenette": IMAGENETTE,
    "imagenette_dino": IMAGENETTE,
    "imagenette_ibot": IMAGENETTE | SMALL_IBOT,
    "imagenette_dinov2": IMAGENETTE | SMALL_DINOV2,
    # 8 GPUs of 64 images, 1.75 days on V100s: k-NN 69.3, linear 74.0 (the paper's code's
    # README).
    "dino_vits16": dict(data="ImageNet", val_data="ImageNet:val"),
    # 16 GPUs of 64, 2.6 days: k-NN 73.3, linear 76.0 (the README's).
    "dino_vits16_300ep": dict(data="ImageNet", val_data="ImageNet:val", epochs=300,
                              norm_last_layer=False, teacher_temp=0.07,
                              warmup_teacher_temp_epochs=30),
    # The released weights. 16 GPUs of 64: k-NN 74.5, linear 77.0 (the README's).
    "dino_vits16_800ep": dict(data="ImageNet", val_data="ImageNet:val", epochs=800,
                              norm_last_layer=False, teacher_temp=0.07,
                              warmup_teacher_temp_epochs=30, min_lr=1e-5, clip_grad=0.0,
                              local_crops_number=10, global_crops_scale=(0.25, 1.0),
                              local_crops_scale=(0.05, 0.25), precision="fp32"),
    # 64 GPUs of 16: k-NN 78.3, linear 79.7 (the README's). Unstable in half precision.
    "dino_vits8": dict(data="ImageNet", val_data="ImageNet:val", patch_size=8, epochs=800,
                       norm_last_layer=False, batch_size_per_gpu=16, teacher_temp=0.07,
                       warmup_teacher_temp_epochs=30, min_lr=1e-5, local_crops_number=10,
                       global_crops_scale=(0.25, 1.0), local_crops_scale=(0.05, 0.25),
                       precision="fp32"),
    # 32 GPUs of 32: k-NN 76.1, linear 78.2 (the README's).
    "dino_vitb16": dict(data="ImageNet", val_data="ImageNet:val", arch="vit_base", epochs=400,
                        lr=7.5e-4, batch_size_per_gpu=32, min_lr=2e-6, teacher_temp=0.07,
                        warmup_teacher_temp_epochs=50, clip_grad=0.3,
                        freeze_last_layer_epochs=3, local_crops_number=10,
                        global_crops_scale=(0.25, 1.0), local_crops_scale=(0.05, 0.25),
                        precision="fp32"),
    # 8 GPUs of 64 (the README's recipe; its released weights, 800 epochs with LARS, have k-NN
    # 67.5 and linear 75.3). A convnet likes SGD.
    "dino_resnet50": dict(data="ImageNet", val_data="ImageNet:val", arch="resnet50",
                          optimizer="sgd", lr=0.03, weight_decay=1e-4, weight_decay_end=1e-4,
                          global_crops_scale=(0.14, 1.0), local_crops_scale=(0.05, 0.14),
                          drop_path_rate=0.0),
    # 16 GPUs of 64: k-NN 75.2, linear 77.9 (the README of iBOT's code).
    "ibot_vits16": dict(data="ImageNet", val_data="ImageNet:val", epochs=800,
                        norm_last_layer=False, teacher_temp=0.07, warmup_teacher_temp_epochs=30,
                        n_prototypes=8192, ibot_weight=1.0, mask_min_patches=16,
                        local_crops_number=10, global_crops_scale=(0.25, 1.0),
                        local_crops_scale=(0.05, 0.25)),
    # 32 A100s of 64, about a day: k-NN 81.6, linear 82.9 (DINOv2's README).
    "dinov2_vitl16_in1k": DINOV2,
    # 96 A100s of 32, 3.3 days on ImageNet-22k: k-NN 82.0, linear 84.5 (DINOv2's README).
    "dinov2_vitl14": DINOV2 | DINOV2_LONG,
    # 256 A100s of 12, 22,000 GPU hours on LVD-142M, 142 million curated images (DINOv2 sec. 5).
    "dinov2_vitg14": dict(DINOV2 | DINOV2_LONG, arch="vit_giant2", batch_size_per_gpu=12),
    # DINOv2 sec. 4, "adapting the resolution": the last 10,000 of 625,000 steps, every schedule
    # pressed into them. The paper's lower learning rate is not known; this one is ours.
    "hires": DINOV2
    | DINOV2_LONG
    | dict(init="runs/dinov2_vitl14", global_crops_size=518, epoch_length=1000, epochs=10,
           warmup_epochs=2, warmup_teacher_temp_epochs=1, freeze_last_layer_epochs=0, lr=5e-5,
           batch_size_per_gpu=8),
    # Ours: released weights, or a run, on other images. Small steps, smaller below; new heads
    # learn first, for random ones would tear down what the backbone knows.
    "continue": dict(init="dinov2_vits14", epochs=10, warmup_epochs=1, freeze_backbone_epochs=1,
                     lr=2e-4, lr_scaling="none", layerwise_decay=0.8, momentum_teacher=0.998,
                     n_prototypes=4096, koleo_weight=0.1, drop_path_rate=0.0,
                     weight_decay_end=0.04)}

# ----------------------------------------------------------------------------------------------
# The presets of distill.py: a small student, and a large teacher that has its own already

# Table 16 of DINOv2: what differs from the teacher's recipe. 64 GPUs of 32 would be its batch.
DISTILLED = (DINOV2
             | DINOV2_LONG
             | dict(teacher="runs/dinov2_vitg14", ffn_layer="mlp", drop_path_rate=0.0, lr=1e-3,
                    lr_scaling="none", freeze_last_layer_epochs=0, precision="fp16"))

# In a short run: a teacher that is done learning can be sharper than it was, for nothing will
# collapse, and the average need not become slower, for nobody learns from it.
SHARP = dict(teacher_temp=0.02, warmup_teacher_temp=0.02, final_momentum_teacher=0.98)

DISTILLATION = {
    # The default: a student of `python train.py`, half as wide.
    "shapes_distill": SHAPES | SHARP | dict(teacher="runs/shapes", arch="vit_pico"),
    # At 40 pixels, for two cores; the command for its teacher is in docs/distillation.md.
    "imagenette_distill": IMAGENETTE
    | SHARP
    | dict(teacher="runs/imagenette_small", arch="vit_pico", patch_size=5, global_crops_size=40,
           local_crops_size=20, local_crops_number=2, head_hidden_dim=512,
           batch_size_per_gpu=16, photometry="small", koleo_weight=0.1, epochs=6, knn_every=1),
    # From ViT-g/14 on LVD-142M: 4,500, 5,300 and 8,000 A100 hours (DINOv2's model card), k-NN
    # 79.0, 82.1 and 83.5, linear 81.1, 84.5 and 86.3 (its README).
    "dinov2_vits14_distill": DISTILLED | dict(arch="vit_small"),
    "dinov2_vitb14_distill": DISTILLED | dict(arch="vit_base"),
    "dinov2_vitl14_distill": DISTILLED | dict(arch="vit_large")}

if __name__ == "__main__":
    for name, preset in PRESETS.items():
        print(f"{name}\n    " + ", ".join(f"{k}={v}" for k, v in preset.items()))
    print(
        "\n--auto_scale, for 100 epochs\n   images  batch  momentum      K       lr  local crops"
    )
    for images in (1_000, 10_000, 100_000, 1_000_000):
        for batch in (32, 256, 1024, 3072):
            if batch <= images:
                c = auto_scale(Config(), images, batch)
                low, high = c.local_crops_scale
                print(
                    f"{images:9,d} {batch:6,d}  {c.momentum_teacher:8.4f} {c.n_prototypes:6,d}  "
                    f"{c.lr:.1e}  {low:.2f}-{high:.2f}")
