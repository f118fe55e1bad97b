"""Settings that have no effect with others: which choice reads which settings, and the one rule that refuses the rest.

A recipe or a shape may carry such a setting along. Only what a user asks for is refused; settings.py calls the rule.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from typing import NamedTuple

from flashlm_numba.heads.table import HEADS, head_class
from flashlm_numba.model.config import LINEARS, MATRICES, SCHEDULES, RunConfig
from flashlm_numba.model.mixers import MIXERS
from flashlm_numba.system.errors import UserError


class Idle(NamedTuple):
    """Settings without an effect. The texts are parts of the sentence that refuses them."""

    names: tuple[str, ...]  # after a colon: of its values only this one
    when: str  # what makes them useless, such as "With the conv mixer"
    remedy: str  # what to give instead, such as "--set mixer=mlgru"; empty: nothing


def refuse_idle(run: RunConfig, given: Mapping[str, Collection[str]]) -> None:
    """Raise UserError if a setting that was asked for has no effect with the others.

    given : names of the settings that were asked for, by section
    """
    for section, names in given.items():
        if not names:
            continue
        for idle in idle_settings(run, section):
            if found := [name for name in idle.names if name.partition(":")[0] in names]:
                words = "has no effect; leave it out" if len(found) == 1 else "have no effect; leave them out"
                remedy = f", or give {idle.remedy}" if idle.remedy else ""
                raise UserError(f"{idle.when}, {', '.join(found)} {words}{remedy}.")


def idle_settings(run: RunConfig, section: str) -> Iterator[Idle]:
    """The settings of a section that this run does not read."""
    if section == "head":
        heads = {name: head_class(name).own_settings for name in HEADS}
        yield from _of_others(heads, run.head.name, "With the {} head", "--head {}")
        if run.head.name == "tree":
            yield from _of_tree(run)
    elif section == "model":
        mixers = {name: mixer.own_settings for name, mixer in MIXERS.items()}
        # mlgru and bitlinear work with each other only
        for idle in _of_others(mixers, run.model.mixer, "With the {} mixer", "{}"):
            linear = "bitlinear" if idle.remedy == "mlgru" else "ternary"
            yield idle._replace(remedy=f"--set mixer={idle.remedy} --set linear={linear}")
        for idle in _of_others(LINEARS, run.model.linear, "With linear={}", "{}"):
            mixer = "mlgru" if idle.remedy == "bitlinear" else "conv"
            yield idle._replace(remedy=f"--set mixer={mixer} --set linear={idle.remedy}")
        if not run.model.ngram_copy_orders:
            copies = ("ngram_copy_reach", "ngram_copy_output")
            yield Idle(copies, "Without n-gram copies", "--set ngram_copy_orders=1")
    elif section == "optimizer":
        yield from _of_others(MATRICES, run.optimizer.matrices, "With matrices={}", "--set matrices={}")
        yield from _of_others(SCHEDULES, run.optimizer.schedule, "With schedule={}", "--set schedule={}")
    elif section == "training":
        if any(phase.frozen for phase in run.training.phases) and not run.embedding_given:
            yield Idle(("phases:frozen",), "Without --embeddings", "" if run.init else "--embeddings")
    elif section == "memory" and run.memory.memory == "none":
        yield Idle(("memory_least",), "Without a memory", "--memory ngrams")


def _of_others(readers: Mapping[str, tuple[str, ...]], chosen: str, when: str, remedy: str) -> Iterator[Idle]:
    """The settings that other values of a choice read. readers : the settings that each value reads"""
    for value, names in readers.items():
        if idle := tuple(name for name in names if name not in readers[chosen]):
            yield Idle(idle, when.format(chosen), remedy.format(value))


def _of_tree(run: RunConfig) -> Iterator[Idle]:
    """The settings that the run's tree does not read, beside those that its shape refuses itself (check_shape)."""
    from flashlm_numba.heads.tree_shapes import EITHER_CLUSTERING, SHAPES

    shape = run.head.tree
    if shape in SHAPES and shape not in EITHER_CLUSTERING:
        yield Idle(("tree_clustering",), f"With the tree shape {shape}", f"--tree {EITHER_CLUSTERING[0]}")
    elif run.training.embedding_init == "random":
        yield Idle(("tree_clustering",), "With embedding_init=random", "--set embedding_init=corpus")
