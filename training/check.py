"""Check: settings that cannot be trained, and the flag to change.

    Config  -->  sizes  pixels  ranges  losses  processes  schedules  judges  -->  one sentence

Idea     A wrong setting is refused before the first image is read, by one sentence with the
         flag, and not by an error of torch in the middle of a step. Each rule has its reason
         beside it. What depends on the images or on a stored run is refused where these are
         opened. A flag that would change nothing is no error, but it is named.
Paper    none
Try      python train.py --global_crops_size 41
Change   a new rule is a branch of the function of its subject, such as check_masks
Tests    pytest tests/training/test_config.py
"""

import os
from pathlib import Path

from augment import BLUR_TAPS, PHOTOMETRY
from machinery.flags import UsageError, require
from machinery.process import Process
from training.config import Config


def check(config: Config, is_plan: bool = False):
    """Refuse what cannot work: UsageError with one sentence that names the flag.

    Only what the settings alone can tell. What depends on the images or on a stored run is
    refused where these are opened. is_plan: the run is one of other processes, elsewhere.
    """
    check_sizes(config)
    check_curriculum(config)
    check_blur(config)
    check_pixels(config)
    check_ranges(config)
    check_losses(config)
    check_parallel(config, is_plan)
    check_schedule(config)
    check_evaluation(config)
    check_sources(config, config.init)


def check_sizes(config: Config):
    """Refuses crops that are no whole number of patches, and counts and widths of 0."""
    # Local crops may be left out; then their size does not matter. A convnet takes any size from
    # its smallest one on.
    sizes = ["global_crops_size"]
    if local_crops(config):
        sizes.append("local_crops_size")
    p = 1 if config.convnet else config.patch_size
    least = smallest_of_convnet(config)

    # The patch embedding is a convolution whose stride is the patch size. It would drop the
    # rest of a crop without a word.
    for name in sizes:
        size = getattr(config, name)
        if p < 1 or size < p:
            raise UsageError(f"--{name} {size} is smaller than one patch of --patch_size {p}")
        if size < least:
            raise UsageError(f"--{name} {size}: expected at least {least} pixels for "
                             f"--arch {config.arch}")
        if size % p:
            raise UsageError(
                f"--{name} {size} is not a multiple of --patch_size {p}; try {size // p * p}")
    require(config, lambda x: x >= 1, "at least 1", "epochs", "save_every", "log_every", "keep")

    # The upper limits are far above what anybody trains. A number with some zeros too many is
    # refused here, before the memory for it is asked for.
    require(config, lambda x: 1 <= x <= 2**20, "1 to 1,048,576", "batch_size_per_gpu",
            "n_prototypes", "ibot_n_prototypes", "head_hidden_dim", "head_bottleneck_dim",
            "ibot_head_bottleneck_dim", "head_nlayers", "global_crops_number")
    require(config, lambda x: x <= 2**14, "at most 16,384", *sizes, "cache_side")
    require(config, lambda x: x <= 1000, "at most 1,000", "local_crops_number",
            "num_register_tokens", "num_workers")


def local_crops(config: Config) -> int:
    """The number of local crops that are cut: only the loss of the class tokens needs them."""
    return config.local_crops_number if config.dino_weight else 0


def smallest_of_convnet(config: Config) -> int:
    """The smallest crop, in pixels, that a convnet takes; 0 for a ViT.

    A ConvNeXt halves a crop five times, without a border around it, so that 32 pixels become
    one. The others add a border, and would take a single pixel, which stands for nothing.
    """
    if not config.convnet:
        return 0
    return 32 if config.arch.startswith("convnext") else 8


def check_curriculum(config: Config):
    """Refuses stages of --curriculum that are no pairs, leave no step, or fit no mask."""
    given = " ".join(f"{number:g}" for number in config.curriculum)
    shares = config.curriculum[::2]
    factors = config.curriculum[1::2]

    # Crops larger than those of the last stage would need more memory than the run reports.
    # That stage gives the features that are judged and kept, so it has to come.
    if len(shares) != len(factors) or not all(shares) or sum(shares) >= 1:
        raise UsageError(f"--curriculum {given}: expected pairs of a share of the steps and a "
                         "factor of the crop sizes, with shares above 0 that add up to less "
                         "than 1, as in 0.75 0.5")
    if not all(0 < factor <= 1 for factor in factors):
        raise UsageError(f"--curriculum {given}: expected factors of the crop sizes above 0, "
                         "at most 1; --global_crops_size is the size at the end")

    # A ViT keeps at least one patch. The crops of a convnet could shrink to a pixel.
    least = smallest_of_convnet(config)
    for kind in ["global"] + ["local"] * bool(local_crops(config)):
        smallest = min(getattr(stage, f"{kind}_crops_size") for _, stage in config.stages(1))
        if smallest < least:
            raise UsageError(
                f"--curriculum {given}: {kind} crops of {smallest} pixels, expected "
                f"at least {least} for --arch {config.arch}")

    # A smaller crop has fewer patches to hide.
    for _, stage in config.stages(1)[:-1]:
        if stage.learns_patches and not stage.convnet:
            try:
                check_masks(stage)
            except UsageError as error:
                raise UsageError(f"--curriculum {given}: global crops of "
                                 f"{stage.global_crops_size} pixels: {error}") from None


def check_stages(config: Config, total: int):
    """Refuses a stage of --curriculum, or the whole size after it, without any step of `total`."""
    # Example: 0.95 of 8 steps are 7.6, rounded to all 8; nothing would be left for the end.
    begun = 0
    for last, stage in config.stages(total):
        if last <= begun:
            raise UsageError(
                f"--curriculum {' '.join(f'{number:g}' for number in config.curriculum)}: of "
                f"{total} steps none is left for crops of {stage.global_crops_size} pixels; "
                "train longer, or give other shares")
        begun = last


def check_blur(config: Config):
    """Refuses crops that cannot be blurred, at any stage of --curriculum."""
    # At the border the blur mirrors the image, over four pixels: it has to have more.
    least = BLUR_TAPS // 2 + 1
    for kind, size in (("global", "global_crops_size"), ("local", "local_crops_size")):
        chances = PHOTOMETRY[config.photometry]["blur"]
        blurred = any(chances[:2]) if kind == "global" else chances[2]
        smallest = min(getattr(stage, size) for _, stage in config.stages(1))
        cut = config.global_crops_number if kind == "global" else local_crops(config)
        if blurred and smallest < least and cut:
            flag = "--curriculum: crops of" if smallest < getattr(config, size) else f"--{size}"
            raise UsageError(f"{flag} {smallest} pixels cannot be blurred, expected at least "
                             f"{least}; or give --photometry small, which does not blur")


def check_pixels(config: Config):
    """Refuses means and deviations that do not fit the channels, and channels without a use."""
    # A pixel is divided by the standard deviation of its channel.
    C = config.in_chans
    require(config, lambda x: 1 <= x <= 1000, "1 to 1,000", "in_chans")
    require(config, lambda x: len(x) in (0, C), f"{C} numbers, as --in_chans", "mean", "std")
    require(config, lambda x: all(v <= 1 for v in x), "numbers from 0 to 1", "mean")
    require(config, lambda x: all(1e-6 <= v <= 1 for v in x), "positive numbers, 1e-6 to 1",
            "std")

    # A ViT is built for any number of channels. torchvision builds convnets for three only, and
    # the cache stores three bytes for each pixel.
    if C != 3 and config.convnet:
        raise UsageError(
            f"--in_chans {C}: torchvision's convnets begin with three channels; give a ViT")
    if C != 3 and config.cache:
        raise UsageError(f"--in_chans {C}: --cache keeps photographs, bytes of three channels")


def check_ranges(config: Config):
    """Refuses numbers that are outside of their interval."""
    # Logits are divided by the temperatures, and factors multiply. Beyond these limits the
    # first step would overflow, and the log could not say which flag is to blame.
    require(config, lambda x: 1e-4 <= x <= 1000, "0.0001 to 1,000", "teacher_temp",
            "warmup_teacher_temp", "student_temp")
    weights = [name for name in vars(config) if name.endswith("_weight")]
    require(config, lambda x: x <= 1000, "at most 1,000", *weights, "lr", "min_lr",
            "weight_decay", "weight_decay_end", "layerscale", "patch_embed_lr_mult")
    require(config, lambda x: 0 < x[0] <= x[1] <= 1, "0 < low <= high <= 1",
            "global_crops_scale", "local_crops_scale")

    # Momenta and probabilities are shares. With a rate of 1 stochastic depth would drop every
    # sample, and divide what is left by 0.
    require(config, lambda x: x <= 1, "at most 1", "momentum_teacher", "final_momentum_teacher",
            "center_momentum", "mask_probability")
    require(config, lambda x: x < 1, "below 1", "drop_path_rate")
    require(config, lambda x: x <= 0.5, "at most 0.5", "val_share")
    require(config, lambda x: 0 < x <= 1, "above 0, at most 1", "layerwise_decay")


def check_losses(config: Config):
    """Refuses losses that have nothing to compare."""
    # Every field NAME_weight is the weight of a loss, also those of distill.py. The iBOT loss
    # needs masks as well, so it is asked by learns_patches.
    other_weights = [
        value for name, value in vars(config).items()
        if name.endswith("_weight") and name != "ibot_weight"]
    if not (any(other_weights) or config.learns_patches):
        raise UsageError(
            "--dino_weight 0 and no other loss: nothing to learn; give --ibot_weight "
            "(with --mask_probability) or --koleo_weight")

    # The DINO loss never compares a view with itself, and KoLeo looks for the nearest other
    # image on the same process.
    if config.dino_weight and config.global_crops_number + config.local_crops_number < 2:
        raise UsageError(
            "--global_crops_number 1 --local_crops_number 0: one view has no other to "
            "match; give at least two crops")
    if config.koleo_weight and config.batch_size_per_gpu < 2:
        raise UsageError(
            "--batch_size_per_gpu 1 leaves KoLeo no other image to keep away from: "
            "give at least 2, or --koleo_weight 0")
    if config.learns_patches:
        check_masks(config)

    # BatchNorm takes the mean and the deviation over the rows of all processes, which one row
    # does not have. A row is a global crop, and for iBOT a masked patch.
    crops = config.global_crops_number * config.batch_size_per_gpu
    rows = {"dino": crops}
    if config.learns_patches:
        rows["ibot"] = config.masking().most(crops)
    for objective in config.objectives if config.use_bn_in_head else ():
        if rows[objective] * int(os.environ.get("WORLD_SIZE", 1)) < 2:
            raise UsageError(f"--use_bn_in_head: the {objective} loss has one row a step, over "
                             "which BatchNorm has no deviation; give a larger "
                             "--batch_size_per_gpu")

    # A convnet has BatchNorm in its backbone. In the last layers of a ResNet a crop of 32 pixels or
    # less is a single place, and so a single row.
    if config.convnet and not config.arch.startswith("convnext"):
        counts = {"global": crops, "local": local_crops(config) * config.batch_size_per_gpu}
        for kind, count in counts.items():
            alone = count * int(os.environ.get("WORLD_SIZE", 1)) == 1
            if alone and getattr(config, f"{kind}_crops_size") <= 32:
                raise UsageError(
                    f"--batch_size_per_gpu {config.batch_size_per_gpu}: one {kind} "
                    f"crop a step, over which the BatchNorm of {config.arch} has "
                    "no deviation; give a larger one")


def check_masks(config: Config):
    """Refuses masks that would hide nothing, or cannot be drawn."""
    if config.convnet:
        raise UsageError(
            f"--arch {config.arch} has no patches to hide: give a ViT, or --ibot_weight 0")

    # The number of masked patches is rounded down. So with few patches and a small share even
    # the largest mask could be empty, and there would be no iBOT loss.
    low, high = config.mask_ratio
    patches = (config.global_crops_size // config.patch_size)**2
    if not 0 <= low <= high <= 1 or int(patches * high) < 1:
        raise UsageError(
            f"--mask_ratio {low} {high}: expected 0 <= low <= high <= 1, and at least "
            f"one of the {patches} patches of a global crop")

    # The same for the number of crops that get a mask. Example: two global crops of one image,
    # at a probability of 0.4, are int(0.8) = 0 crops.
    crops = config.global_crops_number * config.batch_size_per_gpu
    if int(crops * config.mask_probability) < 1:
        raise UsageError(
            f"--mask_probability {config.mask_probability} of {crops} global crops is "
            "not one crop; raise it or --batch_size_per_gpu, or --ibot_weight 0")
    of_blocks = config.mask_shape == "block"  # single patches are no rectangles
    if of_blocks and not 1 <= config.mask_min_patches <= max(1, patches // 2):
        raise UsageError(f"--mask_min_patches {config.mask_min_patches}: expected 1 to "
                         f"{max(1, patches // 2)}, half of a global crop's {patches} patches")


def check_parallel(config: Config, is_plan: bool):
    """Refuses networks that cannot be computed twice, or not be split over processes."""
    # Activation checkpointing computes a block a second time during the backward pass. Each
    # time BatchNorm would add the batch to its running mean and variance.
    if config.activation_checkpointing and config.convnet:
        raise UsageError(
            "--activation_checkpointing: BatchNorm would count each batch twice; give "
            "a ViT, or a smaller --batch_size_per_gpu")

    # torchrun sets WORLD_SIZE. Without it there is a single process.
    if config.parallel == "ddp":
        return
    given = f"--parallel {config.parallel}"
    if "WORLD_SIZE" not in os.environ and not is_plan:
        raise UsageError(f"{given} splits a network over processes: start it with torchrun "
                         "--nproc_per_node=N train.py ...")

    # BatchNorm takes the rows of all processes together (machinery/batch_norm.py). These
    # exchanges, between those by which FSDP gathers parameters, were only tried with DDP.
    if config.convnet or config.use_bn_in_head:
        raise UsageError(f"{given}: BatchNorm (--use_bn_in_head, convnets) was tried with DDP "
                         "alone; give --parallel ddp, or do without it")

    # AdamW changes each number by itself, so each process can change its part of a tensor. LARS
    # needs the norm of the whole tensor, and torch's fused SGD does not take split ones.
    if config.optimizer != "adamw":
        raise UsageError(f"{given} with --optimizer {config.optimizer}: it has no step on "
                         "split tensors; give --optimizer adamw, or --parallel ddp")


def check_schedule(config: Config):
    """Refuses phases at the start that would last as long as the run."""
    if config.freeze_backbone_epochs and not config.init:
        raise UsageError(f"--freeze_backbone_epochs {config.freeze_backbone_epochs}: a random "
                         "backbone has nothing to keep; give --init")
    if config.freeze_backbone_epochs >= config.epochs:
        raise UsageError(
            f"--freeze_backbone_epochs {config.freeze_backbone_epochs} leaves nothing "
            f"of --epochs {config.epochs}")

    # As long as the run is allowed: one epoch, the papers' rest, is often tried by itself.
    if config.freeze_last_layer_epochs > config.epochs:
        raise UsageError(
            f"--freeze_last_layer_epochs {config.freeze_last_layer_epochs}: the "
            f"prototypes would rest for all of --epochs {config.epochs}; give fewer")
    if config.warmup_teacher_temp_epochs > config.epochs:
        raise UsageError(
            f"--warmup_teacher_temp_epochs {config.warmup_teacher_temp_epochs}: in --epochs "
            f"{config.epochs} the temperature would not come to --teacher_temp; give fewer")

    # Without epochs in which it rises, the first temperature would be ignored without a word.
    if ("warmup_teacher_temp" in config.given and not config.warmup_teacher_temp_epochs
            and config.warmup_teacher_temp != config.teacher_temp):
        raise UsageError(f"--warmup_teacher_temp {config.warmup_teacher_temp} would never be "
                         "used: give --warmup_teacher_temp_epochs, or --teacher_temp alone")

    # The learning rate falls after the warm-up only, so the run would end at its peak or before
    # it. --auto_scale chooses a warm-up that fits, later, unless a flag has set it; train.py
    # calls `check` once more after that.
    set_by_auto_scale = config.auto_scale and "warmup_epochs" not in config.given
    if config.warmup_epochs >= config.epochs and not set_by_auto_scale:
        raise UsageError(
            f"--warmup_epochs {config.warmup_epochs} leaves nothing of --epochs {config.epochs}"
        )


def check_sources(config: Config, *sources: str):
    """Refuses --no_resume where it would remove what is needed: --init, a teacher, this run."""
    # After a failure torchrun (--max-restarts) and Slurm (--requeue) repeat the first command. Its
    # --no_resume would now remove what the first start has trained.
    for count in ("TORCHELASTIC_RESTART_COUNT", "SLURM_RESTART_COUNT"):
        if not config.resume and os.environ.get(count, "0") != "0":
            raise UsageError(f"--no_resume in a start after a failure ({count} is "
                             f"{os.environ[count]}): it would remove what was trained before; "
                             "start again without it")

    # --no_resume removes what is in the folder, and so the network that the run begins with.
    folder = Path(config.output_dir or f"runs/{config.preset}").resolve()
    for source in filter(None, sources):
        path = Path(source).expanduser().resolve()
        if not config.resume and folder in (path, *path.parents):
            raise UsageError(f"{source} lies in --output_dir {folder}, which --no_resume would "
                             "empty; give another --output_dir")


def check_evaluation(config: Config):
    """Refuses a judge of patches where there are none, and a share that is not held out."""
    # A run that began so before this rule may go on.
    folder = Path(config.output_dir or f"runs/{config.preset}")
    begun = config.resume and (folder / "config.json").exists()
    if config.val_data and config.val_data == config.data and not begun:
        whole = config.data.removesuffix(":train").removesuffix(":val")
        raise UsageError(
            f"--val_data {config.val_data} is --data itself: each image would find "
            f"itself; give {whole}:val beside {whole}, or leave --val_data out, "
            "and a part is held out of --data")
    if config.val_data and "val_share" in config.given and config.val_share:
        raise UsageError(
            f"--val_share {config.val_share}: nothing is held out of --data, because "
            f"{config.val_data} is there to judge with; leave it out")
    if config.dense_every and config.convnet:
        raise UsageError(f"--dense_every {config.dense_every}: --arch {config.arch} has no "
                         "patch tokens to judge; give a ViT, or leave it out")


# ----------------------------------------------------------------------------------------------
# Flags without an effect

# What a run needs -> whether a Config has it, and the flags that have no effect without it. To
# give them all the same is no error: a script may try several weights of a loss, and 0 among them.
IDLE_WITHOUT = {
    # Masks are drawn for the iBOT loss alone, and so is a head of the patches.
    "--ibot_weight above 0": (lambda c: c.ibot_weight > 0, "mask_probability"),
    "--ibot_weight and --mask_probability above 0": (
        lambda c: c.learns_patches, "mask_ratio mask_shape mask_min_patches separate_head"),
    "--separate_head and --ibot_weight above 0": (
        lambda c: c.learns_patches and c.separate_head,
        "ibot_n_prototypes ibot_head_bottleneck_dim"),
    # Only rectangles have a smallest one.
    "--mask_shape block": (lambda c: c.mask_shape == "block", "mask_min_patches"),
    # Sinkhorn-Knopp keeps no average from one step to the next.
    "--centering ema": (lambda c: c.centering == "ema", "center_momentum"),
    "--local_crops_number and --dino_weight above 0": (lambda c: local_crops(c) > 0,
                                                       "local_crops_size local_crops_scale"),
    "--drop_path_rate above 0": (lambda c: c.drop_path_rate > 0, "drop_path_uniform"),
    "--clip_grad above 0": (lambda c: c.clip_grad > 0, "clip_mode"),
    # The cache and the judge of patches are there on request.
    "--cache": (lambda c: c.cache != "", "cache_side"),
    "--dense_every above 0": (lambda c: c.dense_every > 0, "dense_data dense_val_data"),
    # A convnet has neither patches nor blocks, and torchvision has decided the rest of it.
    "a ViT as --arch": (
        lambda c: not c.convnet,
        "patch_size drop_path_rate drop_path_uniform ffn_layer layerscale "
        "num_register_tokens pos_embed_resize layerwise_decay patch_embed_lr_mult")}


def warn_of_idle_flags(config: Config, process: Process):
    """Print a line for each flag that was given and that nothing in this run looks at.

    Example: `train.py shapes --mask_ratio 0.6 0.8` trains as without the flag, because `shapes`
    has no iBOT loss and so draws no masks.
    """
    for needed, (is_there, names) in IDLE_WITHOUT.items():
        for name in names.split():
            if name in config.given and not is_there(config):
                process.print(
                    f"warning: --{name} changes nothing in this run: it needs {needed}")
