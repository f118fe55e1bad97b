"""The candidates of tools/bench_train.py by name: our recipes and heads, and PyTorch's with the same recipe."""

from __future__ import annotations

WARMUP, DECAY_SHARE = 100, 0.4  # of the default recipe; the baselines get the same schedule
# what our default recipe does, as the baseline's options: the same trunk, batches, start of E, loss, schedule and
# AdamW, and the rules as published (five Newton-Schulz iterations, every row stepped)
TORCH = {
    "batch": "8x256",
    "mixer-residual-scale": "0.0625",
    "ffn-residual-scale": "3.814697265625e-06",
    "leaky-decay": "0.98",
    "ngram-copy-orders": "1,1,1,2,2,3",
    "ngram-copy-reach": "1024",
    "ternary-threshold": "0.5",
    "dilations": "1,4,64",
    "start": "corpus",
    "positions": "1",
    "label-smoothing": "0",
    "z-loss": "0",
    "normuon": "published",
    "adamw-lr": "2e-3",
    "nonembedding-lr-scale": "4",
    "adamw-beta1": "0",
    "adamw-beta2": "0.99",
    "weight-decay": "0",
    "warmup": str(WARMUP),
}
# the baseline's option for a setting of ours
TORCH_OPTION = {"phases": "batch", "warmup_steps": "warmup"} | {
    name: name.replace("_", "-")
    for name in (
        "adamw_lr",
        "nonembedding_lr_scale",
        "adamw_beta1",
        "adamw_beta2",
        "normuon_lr",
        "mixer_residual_scale",
        "ffn_residual_scale",
        "leaky_decay",
        "ngram_copy_orders",
        "ngram_copy_reach",
        "dilations",
        "ternary_threshold",
    )
}
# FlashLM v3 as published, as the baseline's options, which have these defaults
TORCH_V3 = {
    "batch": "1000:4x64x4,4000:4x128x4,7000:4x256x8,10000:4x512x8",
    "mixer-residual-scale": "1",
    "ffn-residual-scale": "1",
    "leaky-decay": "0",
    "ngram-copy-orders": "",
    "ngram-copy-reach": "1024",
    "ternary-threshold": "1",
    "dilations": "1,4,64",
    "start": "random",
    "positions": "0.25",
    "label-smoothing": "0.1",
    "z-loss": "1e-4",
    "normuon": "v3",
    "adamw-lr": "3e-4",
    "nonembedding-lr-scale": "1",
    "adamw-beta1": "0.9",
    "adamw-beta2": "0.95",
    "weight-decay": "0.1",
    "warmup": "200",
    "decay": "1000",
    "total": "10000",
}
# a transformer as decoders are today: plain cross-entropy, AdamW alone, and a rate that falls linearly to 0 over the
# run; a grid finds its best rate, batch and shape for a budget (docs/benchmarks.md)
TRANSFORMER = {
    "trunk": "transformer",
    "layers": "4",
    "width": "256",
    "heads": "4",
    "head": "dense",
    "batch": "8x256",
    "start": "random",
    "positions": "1",
    "label-smoothing": "0",
    "z-loss": "0",
    "matrices": "adamw",
    "adamw-lr": "2e-3",
    "adamw-beta1": "0.9",
    "adamw-beta2": "0.95",
    "weight-decay": "0.1",
    "clip": "1",
    "warmup": "50",
    "warmdown-ratio": "1",
}
# its option for a setting; "phases" is ROWSxCONTEXT
TRANSFORMER_OPTION = {"phases": "batch", "warmup_steps": "warmup"} | {
    name: name.replace("_", "-")
    for name in (
        "adamw_lr",
        "layers",
        "width",
        "heads",
        "adamw_beta1",
        "adamw_beta2",
        "weight_decay",
        "clip",
        "warmdown_ratio",
    )
}
OURS: dict[str, tuple[str, ...]] = {
    "dense": ("--head", "dense"),
    "dense@0.25": ("--head", "dense", "--set", "loss_fraction=0.25"),
    "sampled": ("--head", "sampled"),
    "tree": ("--head", "tree"),
    "tree:frequency": ("--head", "tree", "--set", "tree_clustering=frequency"),
    "tree:adaptive": ("--tree", "adaptive"),
    "tree:two-level": ("--tree", "two-level"),
    "tree:balanced": ("--tree", "balanced"),
    "tree:clustered": ("--tree", "clustered"),
    "tree:huffman": ("--tree", "huffman"),
    "v3": ("--recipe", "v3"),
}
BASELINES: dict[str, dict[str, str]] = {
    "torch:v3": {"head": "dense", **TORCH_V3},
    "torch:eager": {**TORCH, "head": "dense"},
    "torch:adaptive": {**TORCH, "head": "adaptive", "div-value": "1"},
    "torch:adaptive-div4": {**TORCH, "head": "adaptive", "div-value": "4"},
    "torch:adaptive@random": {**TORCH, "head": "adaptive", "div-value": "1", "start": "random"},
    "torch:adaptive-div4@random": {**TORCH, "head": "adaptive", "div-value": "4", "start": "random"},
    "torch:transformer": TRANSFORMER,
}


def option_of(name: str) -> dict[str, str]:
    """A baseline's option for each setting that it has."""
    return TRANSFORMER_OPTION if name == "torch:transformer" else TORCH_OPTION
