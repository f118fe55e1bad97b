"""What the tests of training share: awkward settings, starting and resuming, and what a run's folder holds."""

import json
from dataclasses import replace

from safetensors.numpy import load_file

from flashlm_numba.data.shards import open_tokens
from flashlm_numba.model import checkpoint
from flashlm_numba.system.compiled import Compilation
from flashlm_numba.system.display import Progress
from flashlm_numba.training.plan import Length, plan_for
from flashlm_numba.training.run import resume_run, start_run
from flashlm_numba.training.session import new_session

# what is awkward together: micro-batches, a change of shape, a share of positions, an average, loss options
AWKWARD = (
    "phases=3:2x8x2,2x16x1",
    "loss_fraction=0.5",
    "ema=0.9",
    "label_smoothing=0.1",
    "z_loss=1e-4",
    "soft_cap=20",
    "log_prior=true",
    "normuon=v3",
    "weight_decay=0.1",
)
CASES = {
    "dense": ("head.name=dense",),
    "awkward": ("head.name=dense", *AWKWARD),
    "sampled": ("head.name=sampled", "num_sampled=1000", "full_softmax_ratio=0.3"),
    "tree": ("head.name=tree",),
    "float": ("activations=float", "sparse_adamw=false", "rowwise_exp_avg_sq=false"),
    "moments of elements": ("rowwise_exp_avg_sq=false", "adamw_beta1=0.9"),
    "low rank": ("head.name=tree", "tree_rank=3", "ema=0.9"),
    "dropout": ("phases=8x64x2", "hidden_dropout=0.3", "embedding_dropout=0.4"),  # reads the text more than once
}


def read_log(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def read_losses(folder):
    return [(line["step"], line["loss"], line["nll"], line.get("val_nll")) for line in read_log(folder)]


def read_bits(folder):
    """Every tensor of the newest checkpoint, as bytes."""
    path = checkpoint.find(folder)
    return {
        f"{file.stem}.{name}": value.tobytes()
        for file in sorted(path.glob("*.safetensors"))
        for name, value in load_file(file).items()
    }


def start(run, corpus, folder, threads=1, **length):
    return start_run(run, Length(**length), data=str(corpus), out=folder, threads=threads)


def resume(folder, *, steps=None, minutes=None, **options):
    return resume_run(folder, Length(steps=steps, minutes=minutes), **options)


def make_session(run, corpus, folder):
    """A session before its first step."""
    data = open_tokens(corpus)
    run = replace(plan_for(run, steps=9), data=str(corpus), data_hash=data.hash)
    return new_session(run, folder, data, Progress(), Compilation([], Progress()))
