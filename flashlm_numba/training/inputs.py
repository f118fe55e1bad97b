"""The training data of a run: find the prepared text and check it against the run's settings."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from flashlm_numba.data.builtin import cached_corpus, default_corpus
from flashlm_numba.data.gpt2 import GPT2Vocabulary
from flashlm_numba.data.shards import TokenData
from flashlm_numba.heads import head_class
from flashlm_numba.kernels._cache import user_root
from flashlm_numba.model.config import ModelConfig, RunConfig
from flashlm_numba.system.cache import writable_cache
from flashlm_numba.system.display import Display, Progress
from flashlm_numba.system.errors import UserError
from flashlm_numba.system.paths import expanded
from flashlm_numba.system.process import run_apart

DENSE_BELOW = 2_048  # tokens; a smaller vocabulary gets the dense head by default, whose products are then small


def training_data(source: str | None, progress: Progress) -> Path:
    """The prepared folder to train on: `source`, or by default the built-in text in the cache.

    Preparing runs in a separate process, so that training does not hold the memory that it takes.
    """
    if source is not None:
        folder = Path(source)
        if not folder.exists():
            raise UserError(f"There is no folder {source}; make one with `flashlm-numba prepare SOURCE --out DIR`.")
        if not folder.is_dir():
            raise UserError(
                f"{source} is not a prepared folder; first run `flashlm-numba prepare {source} --out DIR`, "
                "then train on DIR."
            )
        return folder
    if cached_corpus() is None:
        place, usual = writable_cache(), user_root()
        if place != usual:
            progress.note(
                f"The cache folder {usual} cannot be written, so {place} is used, which the system may delete."
            )
        progress.note("Preparing the built-in text for the first use ...")
        # the process draws its bar on standard error, which is right only for a Display
        run_apart(["-m", "flashlm_numba", "prepare"], quiet=not isinstance(progress, Display))
    return default_corpus()


def check(run: RunConfig, data: TokenData) -> None:
    """Raise UserError unless the model and the data fit together."""
    size = data.vocabulary.size
    if run.tokenizer_hash != data.vocabulary.hash:
        raise UserError(
            f"The tokens in {data.folder} use the vocabulary {data.vocabulary.name}, and the run has another one "
            f"(SHA-256 {run.tokenizer_hash[:8]}); name the tokens that it was trained on."
        )
    if run.model.vocab_size != size:
        raise UserError(
            f"The tokens in {data.folder} have a vocabulary of {size:,}, but model.vocab_size is "
            f"{run.model.vocab_size:,}; leave out that setting."
        )
    longest = max(phase.seq_len for phase in run.training.phases)
    if data.train.n_tokens <= longest:
        raise UserError(
            f"The training text in {data.folder} has {data.train.n_tokens:,} tokens, and a sequence of {longest} needs "
            f"{longest + 1:,}; use more text or shorter sequences, such as --set phases=16x32."
        )
    start = run.training.embedding_init
    head_class(run.head.name).check(run.head, has_rows=start != "random")
    if run.embedding_given and data.vocabulary.hash != GPT2Vocabulary.hash:
        raise UserError(
            f"--embeddings takes the rows of GPT-2's tokens, but the tokens in {data.folder} use the vocabulary "
            f"{data.vocabulary.name}; leave it out, or prepare the text with --vocab gpt2."
        )
    if run.embedding_given and not start.startswith("hf:") and not expanded(start).is_file():
        raise UserError(
            f"There is no file {expanded(start)} to initialise the embedding; give a GPT-2 .safetensors file."
        )


def with_vocabulary_of(data: TokenData, run: RunConfig, any_head: bool) -> RunConfig:
    """The run with the vocabulary of the data, unless --set asked for another size, which check() rejects.

    any_head : whether the run's head was not chosen, so that a small vocabulary gets the dense head, not the tree
    """
    if run.init and run.tokenizer_hash != data.vocabulary.hash:
        raise UserError(
            f"The weights in {run.init} were trained with another vocabulary than {data.vocabulary.name} of the tokens "
            f"in {data.folder}; prepare the text with the vocabulary of the weights."
        )
    run = dataclasses.replace(run, tokenizer_hash=data.vocabulary.hash)
    if any_head and run.head.name == "tree" and data.vocabulary.size < DENSE_BELOW:
        run = dataclasses.replace(run, head=dataclasses.replace(run.head, name="dense"))
    if run.model.vocab_size != ModelConfig.vocab_size:
        return run
    return dataclasses.replace(run, model=dataclasses.replace(run.model, vocab_size=data.vocabulary.size))
