"""Recipes: the papers as short dictionaries of what differs, and the same at small scale.

    Config's defaults  <--  PRESETS[name]  <--  flags on the command line
    (DINO, ViT-S/16)        what differs        what you say wins

Idea     A recipe is written as its difference from another one. Read side by side, the presets
         show what each paper changed. The comment above each tells the hardware, the time and
         the result, and who has measured them.
Paper    DINO sec. 3.2, iBOT sec. 3.2, DINOv2 table 16; the READMEs of their code
Try      python -m training.recipes      the presets, side by side
Change   a new recipe is one entry in PRESETS
Tests    pytest tests/training/test_recipes.py
"""

import math
from dataclasses import replace

from training.config import Config

# ----------------------------------------------------------------------------------------------
# Other data, other batches
#
# The papers trained on a million images and more, a thousand or more of them in each step. With
# --auto_scale the settings that depend on these numbers follow from those of your run.

SCALED = ("momentum_teacher", "n_prototypes", "ibot_n_prototypes", "warmup_epochs", "lr",
          "lr_scaling", "local_crops_scale")


def auto_scale(config: Config, images: int, batch: int) -> Config:
    """`config` with the fields of SCALED set for a set of `images`, `batch` of them in a step.

    batch: of all processes together. A field stays as it is if a flag has set it, if it was
    read from the weights of --init, or if the preset gives it another value than the default
    of Config. The rules are ours; docs/scaling.md has a table of
    what they give, and what of it was measured.

    Example: 10,000 images, 64 in a step, 100 epochs. That is 156 steps an epoch, 15,600 in all.

        momentum_teacher   the paper's average is 250 * 1024 / 64 = 4,000 steps long, a fortieth
                           of this run is 390: 1 - 1 / 390 = 0.9974
        n_prototypes       10,000 / 20 = 500, the nearest power of two is 512
        lr                 2e-3 * sqrt(256 / 1024) = 1e-3, as the batch is below 256
        local_crops_scale  0.05 * 100^0.35 = 0.25, and 0.35 more: from 0.25 to 0.60
        warmup_epochs      100 / 10 = 10
    """
    steps = config.epochs * (config.epoch_length or max(images // batch, 1))

    # A momentum m averages about the last 1 / (1 - m) steps. DINO's 0.996 makes 250 steps of
    # 1,024 images, so we take as many images at any batch. A short run has no time for that:
    # its average covers a fortieth of the run at most, but never fewer than 10 steps. 10,000
    # steps are the most.
    averaged_steps = max(min(250 * 1024 / batch, steps / 40, 10_000), 10)
    momentum = round(1 - 1 / averaged_steps, 4)

    # A prototype needs some images of its own: one for every twenty images. Matrices whose
    # sides are powers of two are what the hardware multiplies fastest.
    prototypes = 2**round(math.log2(max(images, 1) / 20))
    prototypes = min(max(prototypes, 256), 65536)

    # A step of Adam has the same length for every batch, but the gradient of a larger batch is
    # more certain, by the root of its size, so it may be longer. Below 256 images it does not
    # become shorter: a run on few images lacks steps more than it lacks certainty.
    lr = 2e-3 * math.sqrt(max(batch, 256) / 1024)

    # To recognise an object by a twentieth of its image takes millions of views. A small data
    # set gives fewer views, and its images are usually small. So the smallest local crop is
    # larger for fewer images, up to a quarter of the image.
    smallest = 0.05 * (1e6 / max(images, 1))**0.35
    smallest = min(max(smallest, 0.05), 0.25)
    local_crops = (round(smallest, 2), round(smallest + 0.35, 2))

    # The learning rate rises over a tenth of the epochs, but over at least one. It needs one
    # more epoch to fall again, so a run of one epoch has no warm-up.
    warmup = min(max(config.epochs // 10, 1), config.epochs - 1)

    values = dict(momentum_teacher=momentum, n_prototypes=prototypes,
                  ibot_n_prototypes=prototypes, lr=float(f"{lr:.2g}"), lr_scaling="none",
                  warmup_epochs=warmup, local_crops_scale=local_crops)

    # Whatever differs from the papers' default was chosen by the preset, such as the local crops
    # of `shapes`.
    usual = Config()
    set_by_preset = [name for name in values if getattr(config, name) != getattr(usual, name)]
    for name in (*config.given, *config.taken_over, *set_by_preset):
        values.pop(name, None)
    return replace(config, **values)


# ----------------------------------------------------------------------------------------------
# The papers, and the same at small scale

# Few small images, and minutes or hours in place of days. What depends on the number of images
# is left to --auto_scale. Two settings of the head help a network over its first steps:
# BatchNorm keeps the features of different images apart until the network has learned to, and a
# narrow bottleneck makes the first targets sharp, because cosines of random vectors spread as
# 1/sqrt(width): by 0.18 at a width of 32, and by 0.06 at 256.
SMALL = dict(auto_scale=True, use_bn_in_head=True, head_bottleneck_dim=32, center_momentum=0.8,
             freeze_last_layer_epochs=0, weight_decay_end=0.1, drop_path_rate=0.0)

# What the two later papers add, with a smaller weight than theirs. At a weight of 1 a short run
# learns to match patches before it has learned what is in the images, and ends lower
# (docs/scaling.md). Like DINOv2's recipe for ImageNet-1k these keep the centre of DINO:
# Sinkhorn-Knopp uses all prototypes equally within a batch, which needs a large one.
SMALL_IBOT = dict(ibot_weight=0.2, separate_head=True, ibot_head_bottleneck_dim=32)

SMALL_DINOV2 = SMALL_IBOT | dict(koleo_weight=0.1, layerscale=1.0, num_register_tokens=2,
                                 pos_embed_resize="antialias")

SHAPES_DINO = SMALL | dict(
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
    # Small batches make many steps. With 16 images in a step, as many images seen end 9 points
    # lower (measured with one seed).
    batch_size_per_gpu=8,
    epochs=4,
    knn_every=1,
    num_workers=2)  # a laptop has other uses for its cores and its memory

# What tells the kinds of shapes apart beside their colours is silhouette and texture, and a run
# on few images finds them late or never (docs/log.md, "Which kinds the default run confuses").
# More and smaller local crops show texture: a tenth of a drawing of 64 pixels is 20 pixels wide
# (64 * sqrt(0.1)), and fills a crop of 25 without losing any. With a sharper teacher the
# targets do not become nearly uniform early on, and a little KoLeo keeps features from varying in
# two directions only.
SHAPES = SHAPES_DINO | dict(local_crops_number=4, local_crops_scale=(0.1, 0.4),
                            global_crops_scale=(0.3, 1.0), teacher_temp=0.02,
                            warmup_teacher_temp=0.02, koleo_weight=0.03)

CIFAR10 = SMALL | dict(data="CIFAR10", val_data="CIFAR10:val", arch="vit_tiny", patch_size=4,
                       head_hidden_dim=1024, global_crops_size=32,
                       global_crops_scale=(0.4, 1.0), local_crops_size=16, local_crops_number=6,
                       photometry="small", batch_size_per_gpu=128, epochs=100)

IMAGENETTE = SMALL | dict(data="Imagenette", val_data="Imagenette:val", arch="vit_small",
                          patch_size=16, global_crops_size=128, local_crops_size=64,
                          local_crops_number=6, batch_size_per_gpu=128, epochs=200)

# The papers learned from all of ImageNet's training images. So nothing is held out of another
# --data either: without --val_data such a run is not judged.
IMAGENET = dict(data="ImageNet", val_data="ImageNet:val", val_share=0.0)

# DINO's ViT-B/16, as it was released.
DINO_VITB16 = IMAGENET | dict(arch="vit_base", epochs=400, lr=7.5e-4, batch_size_per_gpu=32,
                              min_lr=2e-6, teacher_temp=0.07, warmup_teacher_temp_epochs=50,
                              clip_grad=0.3, freeze_last_layer_epochs=3, local_crops_number=10,
                              global_crops_scale=(0.25, 1.0), local_crops_scale=(0.05, 0.25),
                              precision="fp32")

# DINOv2 on ImageNet-1k adds iBOT and KoLeo to DINO, and takes a deeper ViT with LayerScale and
# more stochastic depth. One epoch is 1,250 steps, whatever the number of images.
DINOV2 = IMAGENET | dict(
    arch="vit_large", layerscale=1e-5, drop_path_rate=0.3, drop_path_uniform=True,
    norm_last_layer=False, ibot_weight=1.0, koleo_weight=0.1, global_crops_scale=(0.32, 1.0),
    local_crops_scale=(0.05, 0.32), photometry="dinov2", teacher_temp=0.07,
    warmup_teacher_temp_epochs=30, momentum_teacher=0.992, epoch_length=1250, lr=4e-3,
    lr_scaling="sqrt_1024", layerwise_decay=0.9, patch_embed_lr_mult=0.2, clip_mode="network")

# What the released DINOv2 models have beyond that: Sinkhorn-Knopp in place of the EMA centre, a
# head of their own for patches, more prototypes, SwiGLU, and a schedule of 625,000 steps.
DINOV2_LONG = dict(patch_size=14, local_crops_size=98, ffn_layer="swiglu", drop_path_rate=0.4,
                   centering="sinkhorn", separate_head=True, n_prototypes=131072,
                   ibot_n_prototypes=131072, head_bottleneck_dim=384,
                   ibot_head_bottleneck_dim=256, momentum_teacher=0.994, epochs=500,
                   warmup_epochs=80, lr=2e-4, weight_decay_end=0.2, layerwise_decay=1.0,
                   batch_size_per_gpu=32)

PRESETS = {
    # The default: what learns most from the drawings in some minutes on a CPU.
    # Over five seeds the k-NN accuracy is 83.5 to 88.7 %, 86.3 % on average.
    "shapes": SHAPES,
    # The three methods with the same crops and temperatures (`shapes`, above, is a recipe of its
    # own, while `cifar10` and `imagenette` are only other names of `cifar10_dino` and
    # `imagenette_dino`). A step takes two thirds to three quarters of the time of one of `shapes`.
    # Over five seeds the k-NN accuracy of DINO is 56.0 to 81.5 %, 69.9 % on average.
    "shapes_dino": SHAPES_DINO,
    "shapes_ibot": SHAPES_DINO | SMALL_IBOT,
    # This differs less from seed to seed than DINO alone, because KoLeo spreads the features
    # over more dimensions.
    "shapes_dinov2": SHAPES_DINO | SMALL_DINOV2 | dict(ibot_weight=0.1),
    # For one GPU. Those of CIFAR-10 have not been measured yet.
    "cifar10": CIFAR10,
    "cifar10_dino": CIFAR10,
    "cifar10_ibot": CIFAR10 | SMALL_IBOT,
    "cifar10_dinov2": CIFAR10 | SMALL_DINOV2,
    # Not measured with 200 epochs. With --epochs 20 (one run each, three side by side on one
    # H100, 4 minutes) k-NN(20) ends at 51.1 % for DINO, 50.7 for iBOT and 58.1 for DINOv2, on
    # 1,500 images; raw pixels have 34.7.
    "imagenette": IMAGENETTE,
    "imagenette_dino": IMAGENETTE,
    "imagenette_ibot": IMAGENETTE | SMALL_IBOT,
    "imagenette_dinov2": IMAGENETTE | SMALL_DINOV2,
    # For a laptop: photographs of 64 pixels, a network of four blocks, four local crops. On
    # Imagenette k-NN(20) is 61.6 % with seed 0 and 56.9 with seed 1, after one to two hours on one
    # core with AVX-512, and 52.8 with --epochs 20; raw pixels have 35.3.
    "imagenette_laptop": IMAGENETTE
    | SMALL_DINOV2
    | dict(arch="vit_nano", patch_size=8, head_hidden_dim=512, global_crops_size=64,
           global_crops_scale=(0.3, 1.0), local_crops_size=32, local_crops_number=4,
           photometry="small", batch_size_per_gpu=16, epochs=40, knn_every=1, num_workers=2),
    # The README of DINO's code: 8 V100 GPUs with 64 images each, 1.75 days; k-NN 69.3 %, linear
    # 74.0 %. All other settings are the defaults of Config.
    "dino_vits16": IMAGENET,
    # The README of DINO's code: 16 GPUs with 64 images each, 2.6 days; k-NN 73.3 %, linear
    # 76.0 %.
    "dino_vits16_300ep": IMAGENET
    | dict(epochs=300, norm_last_layer=False, teacher_temp=0.07, warmup_teacher_temp_epochs=30),
    # The released weights, 16 GPUs with 64 images each: k-NN 74.5 %, linear 77.0 % (README).
    # The README does not list their settings; min_lr, clip_grad and precision are not verified,
    # here and in the next three.
    "dino_vits16_800ep": IMAGENET
    | dict(epochs=800, norm_last_layer=False, teacher_temp=0.07, warmup_teacher_temp_epochs=30,
           min_lr=1e-5, clip_grad=0.0, local_crops_number=10, global_crops_scale=(0.25, 1.0),
           local_crops_scale=(0.05, 0.25), precision="fp32"),
    # The released weights, 64 GPUs with 16 images each: k-NN 78.3 %, linear 79.7 % (README).
    # With patches of 8 pixels training is unstable in half precision, say its authors. Clipping
    # is the default of their code, which nobody could verify for this model.
    "dino_vits8": IMAGENET
    | dict(patch_size=8, epochs=800, norm_last_layer=False, batch_size_per_gpu=16,
           teacher_temp=0.07, warmup_teacher_temp_epochs=30, min_lr=1e-5, local_crops_number=10,
           global_crops_scale=(0.25, 1.0), local_crops_scale=(0.05, 0.25), precision="fp32"),
    # The released weights, 32 GPUs with 32 images each: k-NN 76.1 %, linear 78.2 % (README).
    # Not verified either: epochs, lr, the warm-up of the temperature, freeze_last_layer_epochs.
    "dino_vitb16": DINO_VITB16,
    # The released weights: k-NN 77.4 %, linear 80.1 % (README). Nothing else about this run
    # could be verified: these are the settings of ViT-B/16, with half as many images on a GPU.
    "dino_vitb8": DINO_VITB16 | dict(patch_size=8, batch_size_per_gpu=16),
    # The recipe of the README for 8 GPUs with 64 images each: SGD, which suits a convnet better
    # than AdamW.
    "dino_resnet50": IMAGENET
    | dict(arch="resnet50", optimizer="sgd", lr=0.03, weight_decay=1e-4, weight_decay_end=1e-4,
           global_crops_scale=(0.14, 1.0), local_crops_scale=(0.05, 0.14), drop_path_rate=0.0),
    # The released weights, 80 GPUs with 51 images each, LARS: k-NN 67.5 %, linear 75.3 %
    # (README; epochs, LARS and batch are its authors' answer in issue 133). Not verified: lr,
    # weight decay, local_crops_number, n_prototypes, use_bn_in_head. What is not listed here is
    # the default, and the crops are those that the README recommends for ResNet-50.
    "dino_resnet50_800ep": IMAGENET
    | dict(arch="resnet50", optimizer="lars", epochs=800, batch_size_per_gpu=51, lr=0.3,
           weight_decay=1e-6, weight_decay_end=1e-6, local_crops_number=6, n_prototypes=60000,
           use_bn_in_head=True, global_crops_scale=(0.14, 1.0), local_crops_scale=(0.05, 0.14),
           drop_path_rate=0.0),
    # The README of iBOT's code: 16 GPUs with 64 images each; k-NN 75.2 %, linear 77.9 %.
    "ibot_vits16": IMAGENET
    | dict(epochs=800, norm_last_layer=False, teacher_temp=0.07, warmup_teacher_temp_epochs=30,
           n_prototypes=8192, ibot_weight=1.0, mask_min_patches=16, local_crops_number=10,
           global_crops_scale=(0.25, 1.0), local_crops_scale=(0.05, 0.25)),
    # DINOv2's README: 32 A100 GPUs with 64 images each, about a day; k-NN 81.6 %, linear
    # 82.9 %.
    "dinov2_vitl16_in1k": DINOV2,
    # DINOv2's README: 96 A100 GPUs with 32 images each, 3.3 days on ImageNet-22k; k-NN 82.0 %,
    # linear 84.5 %.
    "dinov2_vitl14": DINOV2 | DINOV2_LONG,
    # DINOv2 table 14 and 16: 256 A100 GPUs with 12 images each, 22,000 hours on LVD-142M, 142
    # million curated images.
    "dinov2_vitg14": dict(DINOV2 | DINOV2_LONG, arch="vit_giant2", batch_size_per_gpu=12),
    # DINOv2 sec. 4 and appendix B.2, "adapting the resolution": 10,000 more steps with large
    # images, after the 625,000, in which every schedule runs once more, compressed. So an epoch
    # has 20 steps here, and the 500 epochs of DINOV2_LONG are 10,000 steps: 1,600 of warm-up, 600
    # in which the temperature rises, 20 in which the prototypes rest. The paper says that the
    # learning rate is lower, not how low; this one and the number of images are ours.
    "hires": DINOV2
    | DINOV2_LONG
    | dict(init="runs/dinov2_vitl14", global_crops_size=518, epoch_length=20, knn_every=50,
           lr=5e-5, batch_size_per_gpu=8),
    # Ours: to continue with released weights, or those of a run, on other images. The learning
    # rate is small, and smaller in low layers. The heads are new: they learn for one epoch
    # while the backbone rests, because gradients through random heads would destroy what it
    # knows.
    "continue": dict(init="dinov2_vits14", epochs=10, warmup_epochs=1, freeze_backbone_epochs=1,
                     lr=2e-4, lr_scaling="none", layerwise_decay=0.8, momentum_teacher=0.998,
                     n_prototypes=4096, koleo_weight=0.1, drop_path_rate=0.0,
                     weight_decay_end=0.04)}

# ----------------------------------------------------------------------------------------------
# The presets of distill.py: a small student learns from a large teacher that is trained already

# DINOv2 table 16: what differs from the recipe of the teacher. Its batch of 2,048 images would
# be 64 GPUs with 32 each.
DISTILLED = (DINOV2
             | DINOV2_LONG
             | dict(teacher="runs/dinov2_vitg14", ffn_layer="mlp", drop_path_rate=0.0, lr=1e-3,
                    lr_scaling="none", freeze_last_layer_epochs=0, precision="fp16"))

# For short runs. A teacher that does not learn any more cannot collapse, so its targets can be
# sharper. The average of the student is not its teacher here but the result, so it need not
# become slower and slower: its momentum stays at 0.98 in place of 1 at the end.
SHARP = dict(teacher_temp=0.02, warmup_teacher_temp=0.02, final_momentum_teacher=0.98)

DISTILLATION = {
    # The default: its teacher is the result of `python train.py`, and the student is half as
    # wide.
    "shapes_distill": SHAPES_DINO | SHARP | dict(teacher="runs/shapes", arch="vit_pico"),
    # For two CPU cores, with crops of 40 pixels. docs/distillation.md has the command that
    # trains its teacher.
    "imagenette_distill": IMAGENETTE
    | SHARP
    | dict(teacher="runs/imagenette_small", arch="vit_pico", patch_size=5, global_crops_size=40,
           local_crops_size=20, local_crops_number=2, head_hidden_dim=512,
           batch_size_per_gpu=16, photometry="small", koleo_weight=0.1, epochs=6, knn_every=1),
    # From a ViT-g/14 on LVD-142M. DINOv2's model card and README, for S, B and L: 4,500, 5,300
    # and 8,000 hours on one A100; k-NN 79.0, 82.1 and 83.5 %; linear 81.1, 84.5 and 86.3 %.
    "dinov2_vits14_distill": DISTILLED | dict(arch="vit_small"),
    "dinov2_vitb14_distill": DISTILLED | dict(arch="vit_base"),
    "dinov2_vitl14_distill": DISTILLED | dict(arch="vit_large")}

if __name__ == "__main__":
    for name, preset in PRESETS.items():
        settings = ", ".join(f"{field}={value}" for field, value in preset.items())
        print(f"{name}\n    {settings}")

    # What --auto_scale would choose, for a set that is no smaller than its batch.
    print("\n--auto_scale, for 100 epochs")
    print("   images  batch  momentum      K       lr  local crops")
    for images in (1_000, 10_000, 100_000, 1_000_000):
        for batch in (32, 256, 1024, 3072):
            if batch > images:
                continue
            c = auto_scale(Config(), images, batch)
            low, high = c.local_crops_scale
            print(f"{images:9,d} {batch:6,d}  {c.momentum_teacher:8.4f} {c.n_prototypes:6,d}  "
                  f"{c.lr:.1e}  {low:.2f}-{high:.2f}")
