"""The published MatMul-free LMs as their folders describe them: config.json, and the names and shapes of the tensors.

The format is that of `save_pretrained` for the authors' model type hgrn_bit (Zhu et al. 2024, arXiv:2406.02528). Fields
that change the computation in a way that this program does not have are refused; those that do not are ignored.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flashlm_numba.model.safetensors_files import Stored, read_json
from flashlm_numba.system.errors import UserError

CONFIG = "config.json"
_MOST = 1 << 24  # of a size: a larger one is a mistake
_LAYERS = {  # this program's and the authors' names of a block's ternary layers
    "mixer.input": "attn.i_proj",
    "mixer.forget": "attn.f_proj",
    "mixer.gate": "attn.g_proj",
    "mixer.out": "attn.o_proj",
    "glu.gate_up": "mlp.gate_proj",
    "glu.down": "mlp.down_proj",
}
_NORMS = {"norm1": "attn_norm", "norm2": "mlp_norm", "mixer.hidden_norm": "attn.g_norm"}


@dataclass(frozen=True)
class Published:
    """The settings of a published model."""

    vocab_size: int
    dim: int
    ffn_dim: int
    n_blocks: int
    norm_eps: float
    has_bounds: bool  # whether the forget gates have lower bounds
    is_tied: bool  # whether the head's rows are the embedding's
    start: int  # id that begins a text
    end: int  # id that ends a text


def read_published(folder: Path) -> Published:
    """The settings in a folder's config.json. Raises UserError if one is invalid, or cannot be honoured."""
    path = folder / CONFIG
    if not folder.is_dir():
        raise UserError(f"There is no folder {folder}; give the folder of a published MatMul-free LM.")
    if not path.exists():
        raise UserError(f"{folder} has no {CONFIG}; give the folder of a published MatMul-free LM.")
    content = read_json(path)
    if not isinstance(content, dict):
        raise UserError(f"{path} is no JSON object; restore it.")
    return _Fields(path, content).published()


class _Fields:
    """The fields of a config.json; those that are missing have the defaults of the authors' code."""

    def __init__(self, path: Path, content: dict[str, Any]) -> None:
        self.path, self.content = path, content

    def refuse(self, name: str, value: Any, why: str) -> UserError:
        return UserError(f"{self.path} has {name} {value!r}, {why}.")

    def number(self, name: str, default: int | None, low: int = 1, high: int = _MOST) -> int:
        value = self.content.get(name, default)
        if type(value) is not int or not low <= value <= high:
            raise self.refuse(name, value, f"but it must be a whole number from {low} to {high:,}")
        return value

    def flag(self, name: str, default: bool) -> bool:
        value = self.content.get(name, default)
        if type(value) is not bool:
            raise self.refuse(name, value, "but it must be true or false")
        return value

    def real(self, name: str, default: float, low: float, high: float) -> float:
        value = self.content.get(name, default)
        if type(value) not in (int, float) or not low <= value <= high:
            raise self.refuse(name, value, f"but it must be a number from {low:g} to {high:g}")
        return float(value)

    def token(self, name: str, default: int, vocab_size: int) -> int:
        value = self.content.get(name, default)
        value = value[0] if isinstance(value, list) and value else default if value is None else value
        if type(value) is not int or not 0 <= value < vocab_size:
            raise self.refuse(name, value, f"which is no id of its {vocab_size:,} tokens")
        return value

    def ffn_dim(self, dim: int) -> int:
        if self.content.get("intermediate_size") is not None:
            return self.number("intermediate_size", None)
        ratio = self.content.get("hidden_ratio")
        ratio = 4 if ratio is None else self.real("hidden_ratio", 4, 0.01, 1e3)
        return 256 * math.ceil(int(dim * ratio * 2 / 3) / 256)

    def published(self) -> Published:
        kind = self.content.get("model_type")
        if kind != "hgrn_bit":
            raise self.refuse("model_type", kind, "but only hgrn_bit, the MatMul-free LM, can be imported")
        if self.flag("use_short_conv", False):
            raise self.refuse("use_short_conv", True, "but this program has no short convolutions for this model")
        act = self.content.get("hidden_act", "swish")
        if act not in ("swish", "silu"):
            raise self.refuse("hidden_act", act, "but only swish (silu) can be imported")
        if (ratio := self.content.get("expand_ratio", 1)) not in (1, None):
            raise self.refuse("expand_ratio", ratio, "but only 1 can be imported")
        if (quantized := self.content.get("quantization_config")) is not None:
            raise self.refuse("quantization_config", quantized, "but only unquantised weights can be imported")
        vocab_size, dim = self.number("vocab_size", 32_000), self.number("hidden_size", 2048)
        if self.content.get("num_heads", 1) is not None and dim % (heads := self.number("num_heads", 1)):
            # heads divide the channels, each of which is on its own, so their number changes nothing else
            raise self.refuse("num_heads", heads, f"which does not divide hidden_size {dim}")
        return Published(
            vocab_size=vocab_size,
            dim=dim,
            ffn_dim=self.ffn_dim(dim),
            n_blocks=self.number("num_hidden_layers", 24, high=64),
            norm_eps=self.real("rms_norm_eps", 1e-6, 1e-12, 1),
            has_bounds=self.flag("use_lower_bound", True),
            is_tied=self.flag("tie_word_embeddings", False),
            start=self.token("bos_token_id", 1, vocab_size),
            end=self.token("eos_token_id", 2, vocab_size),
        )


def tensor_names(model: Published) -> Iterator[tuple[str, str, tuple[int, ...]]]:
    """This program's name, the published name and the shape of every tensor of a model."""
    c, inner, vocab = model.dim, model.ffn_dim, model.vocab_size
    shapes = {"glu.gate_up": (2 * inner, c), "glu.down": (c, inner)}
    yield "embedding.weight", "model.embeddings.weight", (vocab, c)
    for block in range(model.n_blocks):
        here, there = f"blocks.{block}", f"model.layers.{block}"
        for own, other in _NORMS.items():
            yield f"{here}.{own}.weight", f"{there}.{other}.weight", (c,)
        for own, other in _LAYERS.items():
            shape = shapes.get(own, (c, c))
            yield f"{here}.{own}.weight", f"{there}.{other}.weight", shape
            yield f"{here}.{own}.norm.weight", f"{there}.{other}.norm.weight", shape[1:]
    if model.has_bounds:
        yield "lower_bounds", "model.lower_bounds", (model.n_blocks, c)
    yield "final_norm.weight", "model.norm.weight", (c,)
    yield "head.weight", "lm_head.weight", (vocab, c)
    yield "head.norm.weight", "lm_head.norm.weight", (c,)


def located(folder: Path, model: Published, stored: dict[str, Stored]) -> dict[str, Stored]:
    """The stored tensors by this program's names. Raises UserError if one is missing, misshapen or unknown."""
    found, known = {}, set()
    for own, other, shape in tensor_names(model):
        known.add(other)
        # a tied model's own copy of the head's rows, if there is one, is ignored, as by `from_pretrained`
        place = stored.get("model.embeddings.weight" if model.is_tied and own == "head.weight" else other)
        if place is None:
            raise UserError(f"{folder} has no tensor {other}, which its {CONFIG} asks for; restore the files.")
        if place.shape != shape:
            raise UserError(
                f"{place.path} holds {other} with the shape {list(place.shape)}, but {folder / CONFIG} asks for "
                f"{list(shape)}; restore the files."
            )
        found[own] = place
    if unknown := sorted(stored.keys() - known):
        raise UserError(
            f"{folder} has the tensor {unknown[0]}, which a MatMul-free LM with its {CONFIG} does not have."
        )
    return found
