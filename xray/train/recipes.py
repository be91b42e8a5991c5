"""What a training run is: the frozen `Recipe`, and the recipes that come with the package.

A recipe is a plain function that returns a `Recipe`; a variant calls another and replaces what differs.
Nothing here imports torch, so listing recipes is instant.

The paper (Xray-Visual, arXiv 2602.16918) publishes the three stages and their order, not their values:
every size, rate, batch and length below is this project's choice, taken from common practice for MAE,
hashtag training and CLIP.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace


@dataclass(frozen=True)
class Recipe:
    """Everything that decides a run. Keys are flat, so `xray train NAME key=value` can set each of them.

    What is learned
        name: the recipe's name; it also names the default folder, `runs/NAME`.
        task: "mae" (masked autoencoding of images), "tags" (multi-tag classification) or "clip" (image-text
        contrast).
        model: a size of `xray.models.SIZES`.
        image_size: side of the square input, pixels.
        num_frames: frames taken from a clip; an image counts as a clip of one frame.
    Data
        data: "generated" (coloured shapes, made on the spot), or sources, comma-separated: folders written by
            `xray data pack`; with `stream` also folders of tar shards, and paths or fsspec URLs of shards with
            braces, such as s3://bucket/pairs-{00000..01242}.tar.
        data_weights: how often samples come from each source, relative to the others; empty counts samples alike
            (a stream: sources alike).
        stream: read shards one after the other and shuffle in a buffer, instead of single samples at random through
            an index: for sets that are remote or have no index.
        data_size: number of samples of the generated set.
        clip_fraction: share of steps whose batch holds clips instead of images, 0 to 1; mae uses images only.
        num_workers: processes that decode, for each training process; 0 decodes in the training process. Results
            do not depend on it.
        readers: of a stream, how many parts of it are read side by side, over all processes; 0 takes one for each
            worker. It is fixed for a run, whatever number of processes goes on with it.
        shuffle_buffer: of a stream, samples that each reader draws the next one from.
        read_timeout: of a stream, seconds without a byte after which a shard is given up.
        tags_file: a JSON list of the tags to learn; empty takes those of the data.
        tokenizer_file: a tokenizer's JSON; empty trains one on the captions.
    Optimisation
        optimizer: "adamw", "lion" (Chen et al., arXiv 2302.06675) or "lamb" (You et al., arXiv 1904.00962; NVIDIA
            apex's where that is installed).
        steps: optimizer steps in all, also when resuming.
        batch_size: samples a step over all processes together.
        learning_rate: the peak, reached after `warmup_steps`, then a cosine down to zero.
        layer_decay: the learning rate of each block of the image encoder over that of the next, and of the last over
            that of all above it; 1 gives all the same.
        weight_decay: decoupled; not applied to norms, biases, embeddings and scales. LAMB sets the length of the steps
            of decayed weights only, and needs some.
        betas: the optimizer's two decay rates.
        epsilon: AdamW's and LAMB's. CLIP's value for ViTs: at the usual 1e-8, parameters whose true gradient is zero,
            such as the biases of keys, drift by rounding noise, and runs on different numbers of processes part.
        warmup_steps: steps of linear warm-up.
        grad_clip: gradients are scaled down to this global L2 norm; 0 turns clipping off.
        max_bad_steps: a step whose loss or gradient is not finite is skipped; this many in a row end the run.
    Progressive resolution
        image_size_schedule: sizes before `image_size`, each with its steps: "112:1000,160:500" trains 1,000 steps at
            112 pixels, 500 at 160 and the rest at image_size. Position embeddings are interpolated.
    Token pruning (EViT; off for mae)
        keep_rate: share of tokens each pruning layer keeps; 1 turns pruning off.
        keep_rate_warmup: steps over which the rate falls from 1 to `keep_rate` along a cosine.
        keep_rate_buckets: number of values it takes on the way, few so that compiled graphs are reused.
        keep_rate_schedule: as image_size_schedule, instead of a warm-up: "1:1000,0.85:500".
    Masked autoencoding
        mask_ratio, decoder_width, decoder_depth, decoder_heads.
    Tags
        min_tag_count: tags rarer than this in the training split are left out of the vocabulary.
    CLIP
        embed_dim: width of the shared space.
        text_width, text_depth, text_heads: the text transformer.
        context_length: tokens a caption is cut to.
        vocab_size: the tokenizer's, trained on the training captions unless `init` brings one.
        caption_tags: up to this many of a sample's tags are added to its caption; 0 leaves captions alone.
        short_texts: share of texts that are one tag instead of the caption, so that single words, such as the
            class names of zero-shot classification, are not strange to the text encoder.
        chunk_size: samples that the encoders of a process see at a time; 0 gives them all at once. The loss and
            the gradients stay those of the whole batch; memory is that of a chunk, for one more forward pass.
            Of several processes each then holds whole gradients instead of a shard until the last chunk.
        exchange: how texts travel between processes: "all_gather", or "ring" (less memory, more traffic).
    Running
        seed: of weights, data order, augmentation and masks.
        precision: "float32", "bfloat16" (float32 parameters and reductions, bfloat16 compute) or "auto"
        (bfloat16 on a
            GPU that has it, else float32).
        compile: torch.compile each transformer block.
        activation_checkpointing: "none"; "selective" keeps what matrix products and attention give and computes the
            rest of a block again in the backward pass; "full" keeps a block's input only.
        shard_size: processes that share one copy of the parameters (FSDP2); 0 shares one over all. Less makes
            several copies, whose gradients are averaged (HSDP): best the GPUs of a node.
    Files
        out: folder of the run; empty means `runs/NAME`.
        init: weights to start from: a `.safetensors` file or the folder of an earlier run.
        resume: "latest", or a checkpoint folder, to go on with an interrupted run; "auto" goes on where there is
            one and starts it where there is none.
        overwrite: replace an earlier run in `out`.
        checkpoint_every: steps between checkpoints; 0 saves none but on Ctrl-C.
        keep_checkpoints: the newest so many are kept, older ones deleted.
        keep_every: checkpoints at multiples of this many steps are kept for ever; 0 keeps none.
        async_checkpoints: write checkpoints while training goes on.
        log_every: steps between points on TensorBoard and other trackers; metrics.jsonl always has every step.
        tensorboard: write TensorBoard files, if the package is installed.
        trackers: further places for the numbers, comma-separated: "wandb", "trackio"; needs those packages.
        peak_tflops: matrix throughput of one device, 10^12 FLOP/s, that MFU counts against; 0 measures it at the start.
        profile: steps to trace with torch.profiler, "FIRST:LAST", into the run's folder.
        progress: show a progress bar.
    """

    name: str
    task: str
    model: str
    image_size: int
    num_frames: int = 4

    data: str = "generated"
    data_size: int = 600
    data_weights: tuple[float, ...] = ()
    clip_fraction: float = 0.0
    num_workers: int = 0
    stream: bool = False
    readers: int = 0
    shuffle_buffer: int = 1000
    read_timeout: float = 20.0
    tags_file: str = ""
    tokenizer_file: str = ""

    steps: int = 100
    batch_size: int = 32
    optimizer: str = "adamw"
    learning_rate: float = 1e-3
    layer_decay: float = 1.0
    weight_decay: float = 0.05
    betas: tuple[float, float] = (0.9, 0.95)
    epsilon: float = 1e-6
    warmup_steps: int = 10
    grad_clip: float = 1.0
    max_bad_steps: int = 10

    image_size_schedule: str = ""

    keep_rate: float = 1.0
    keep_rate_warmup: int = 0
    keep_rate_buckets: int = 3
    keep_rate_schedule: str = ""

    mask_ratio: float = 0.75
    decoder_width: int = 32
    decoder_depth: int = 1
    decoder_heads: int = 2

    min_tag_count: int = 1

    embed_dim: int = 32
    text_width: int = 32
    text_depth: int = 2
    text_heads: int = 2
    context_length: int = 24
    vocab_size: int = 512
    caption_tags: int = 0
    short_texts: float = 0.0
    chunk_size: int = 0
    exchange: str = "all_gather"

    seed: int = 0
    precision: str = "auto"
    compile: bool = False
    activation_checkpointing: str = "none"
    shard_size: int = 0

    out: str = ""
    init: str = ""
    resume: str = ""
    overwrite: bool = False
    checkpoint_every: int = 0
    keep_checkpoints: int = 2
    keep_every: int = 0
    async_checkpoints: bool = True
    log_every: int = 10
    tensorboard: bool = True
    trackers: str = ""
    peak_tflops: float = 0.0
    profile: str = ""
    progress: bool = True


def mae_tiny() -> Recipe:
    """Masked autoencoding of the generated shapes, for tests and first tries."""
    return Recipe(
        name="mae_tiny",
        task="mae",
        model="tiny",
        image_size=32,
        learning_rate=4e-3,
        weight_decay=0.0,
        checkpoint_every=25,
    )


def tags_tiny() -> Recipe:
    """Tags of the generated shapes, half of the steps on clips."""
    return replace(
        mae_tiny(),
        name="tags_tiny",
        task="tags",
        clip_fraction=0.5,
        keep_rate=0.7,
        keep_rate_warmup=50,
        learning_rate=5e-3,
    )


def clip_tiny() -> Recipe:
    """Captions of the generated shapes."""
    return replace(
        tags_tiny(), name="clip_tiny", task="clip", clip_fraction=0.25, learning_rate=2e-3, betas=(0.9, 0.98)
    )


def demo_mae() -> Recipe:
    """Stage 1 of `xray demo`: sized for two CPU cores and a few thousand small images."""
    return Recipe(
        name="demo_mae",
        task="mae",
        model="demo",
        image_size=64,
        steps=400,
        batch_size=64,
        learning_rate=1.5e-3,
        warmup_steps=40,
        decoder_width=64,
        decoder_depth=1,
        decoder_heads=4,
        checkpoint_every=100,
    )


def demo_tags() -> Recipe:
    """Stage 2 of `xray demo`: clips and images."""
    return replace(
        demo_mae(),
        name="demo_tags",
        task="tags",
        clip_fraction=0.5,
        steps=200,
        batch_size=32,
        learning_rate=2e-3,
        warmup_steps=20,
        keep_rate=0.7,
        keep_rate_warmup=80,
        min_tag_count=10,
    )


def demo_clip() -> Recipe:
    """Stage 3 of `xray demo`: images and their captions."""
    return replace(
        demo_tags(),
        name="demo_clip",
        task="clip",
        clip_fraction=0.0,
        steps=330,
        batch_size=96,
        learning_rate=1.5e-3,
        warmup_steps=40,
        keep_rate_warmup=0,
        betas=(0.9, 0.98),
        weight_decay=0.1,
        embed_dim=128,
        text_width=128,
        text_depth=3,
        text_heads=4,
        context_length=32,
        vocab_size=4096,
        short_texts=0.25,
    )


def mae_s16() -> Recipe:
    """Stage 1 at ViT-S/16: about 1.0 B images seen."""
    return Recipe(
        name="mae_s16",
        task="mae",
        model="s16",
        image_size=224,
        num_frames=8,
        data="",
        num_workers=8,
        steps=250_000,
        batch_size=4096,
        learning_rate=2.4e-3,
        warmup_steps=12_500,
        decoder_width=512,
        decoder_depth=8,
        decoder_heads=16,
        compile=True,
        checkpoint_every=2_500,
        log_every=50,
    )


def mae_b16() -> Recipe:
    """Stage 1 at ViT-B/16."""
    return replace(mae_s16(), name="mae_b16", model="b16")


def mae_l14() -> Recipe:
    """Stage 1 at ViT-L/14."""
    return replace(mae_b16(), name="mae_l14", model="l14", activation_checkpointing="selective")


def mae_2b() -> Recipe:
    """Stage 1 at 2 B parameters; the lower rate keeps the wide model stable."""
    return replace(mae_l14(), name="mae_2b", model="2b", learning_rate=1.2e-3, checkpoint_every=1_000)


def tags_s16() -> Recipe:
    """Stage 2 at ViT-S/16: chiefly clips, EViT switched on over the first fifth."""
    return replace(
        mae_s16(),
        name="tags_s16",
        task="tags",
        clip_fraction=0.8,
        steps=200_000,
        batch_size=2048,
        learning_rate=1e-3,
        warmup_steps=10_000,
        keep_rate=0.7,
        keep_rate_warmup=40_000,
        min_tag_count=100,
    )


def tags_b16() -> Recipe:
    """Stage 2 at ViT-B/16."""
    return replace(tags_s16(), name="tags_b16", model="b16")


def tags_l14() -> Recipe:
    """Stage 2 at ViT-L/14."""
    return replace(tags_b16(), name="tags_l14", model="l14", learning_rate=5e-4, activation_checkpointing="selective")


def tags_2b() -> Recipe:
    """Stage 2 at 2 B parameters."""
    return replace(tags_l14(), name="tags_2b", model="2b", learning_rate=2e-4, checkpoint_every=1_000)


def clip_s16() -> Recipe:
    """Stage 3 at ViT-S/16: about 3.3 B pairs seen; EViT is on from the start, stage 2 has warmed it up."""
    return replace(
        tags_s16(),
        name="clip_s16",
        task="clip",
        clip_fraction=0.2,
        batch_size=16_384,
        betas=(0.9, 0.98),
        weight_decay=0.2,
        keep_rate_warmup=0,
        embed_dim=384,
        text_width=384,
        text_depth=12,
        text_heads=6,
        context_length=77,
        vocab_size=49_152,
    )


def clip_b16() -> Recipe:
    """Stage 3 at ViT-B/16."""
    return replace(clip_s16(), name="clip_b16", model="b16", embed_dim=512, text_width=512, text_heads=8)


def clip_l14() -> Recipe:
    """Stage 3 at ViT-L/14: about 6.6 B pairs seen."""
    return replace(
        clip_b16(),
        name="clip_l14",
        model="l14",
        batch_size=32_768,
        learning_rate=5e-4,
        embed_dim=768,
        text_width=768,
        text_heads=12,
        activation_checkpointing="selective",
    )


def clip_2b() -> Recipe:
    """Stage 3 at 2 B parameters."""
    return replace(
        clip_l14(),
        name="clip_2b",
        model="2b",
        learning_rate=2e-4,
        embed_dim=1280,
        text_width=1280,
        text_depth=24,
        text_heads=20,
        checkpoint_every=1_000,
    )


RECIPES: dict[str, Callable[[], Recipe]] = {
    function.__name__: function
    for function in (
        mae_tiny,
        tags_tiny,
        clip_tiny,
        demo_mae,
        demo_tags,
        demo_clip,
        mae_s16,
        tags_s16,
        clip_s16,
        mae_b16,
        tags_b16,
        clip_b16,
        mae_l14,
        tags_l14,
        clip_l14,
        mae_2b,
        tags_2b,
        clip_2b,
    )
}
"""Name -> the function that returns the recipe."""
