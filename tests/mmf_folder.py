"""Folders as the authors of the MatMul-free LM publish them, written by the tests."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
from mmf_twin import authors_names
from safetensors.numpy import save_file


def bfloat16(value: np.ndarray) -> np.ndarray:
    """Float32 values cut to the upper half, as float32."""
    return (value.view(np.uint32) & np.uint32(0xFFFF0000)).view(np.float32)


def config_of(shape: dict[str, int], **changes: object) -> dict:
    """The content of config.json for a shape of mmf_twin.random_parameters."""
    return {
        "architectures": ["HGRNBitForCausalLM"],
        "model_type": "hgrn_bit",
        "attn_mode": "fused_recurrent",
        "vocab_size": shape["vocab"],
        "hidden_size": shape["dim"],
        "num_hidden_layers": shape["n_blocks"],
        "num_heads": 2,
        "expand_ratio": 1,
        "hidden_ratio": 4,
        "intermediate_size": shape["ffn_dim"],
        "hidden_act": "swish",
        "rms_norm_eps": 1e-6,
        "use_short_conv": False,
        "share_conv_kernel": True,
        "conv_size": 4,
        "use_lower_bound": True,
        "tie_word_embeddings": False,
        "max_position_embeddings": 2048,
        "initializer_range": 0.02,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "torch_dtype": "float32",
        "transformers_version": "4.40.2",
    } | changes


def write_bf16(path: Path, tensors: dict[str, np.ndarray]) -> None:
    """A safetensors file in bfloat16, which NumPy lacks: the upper halves of the numbers."""
    header, parts, offset = {}, [], 0
    for name, value in tensors.items():
        data = (np.ascontiguousarray(value).view(np.uint32) >> 16).astype("<u2").tobytes()
        header[name] = {"dtype": "BF16", "shape": list(value.shape), "data_offsets": [offset, offset + len(data)]}
        offset += len(data)
        parts.append(data)
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + b"".join(parts))


def write_folder(
    folder: Path,
    parameters: dict[str, np.ndarray],
    shape: dict[str, int],
    *,
    dtype: str = "float32",
    shards: int = 0,
    tokenizer: str | None = None,
    **changes: object,
) -> Path:
    """Write a model to a folder; with shards as several files with an index."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config_of(shape, **changes)))
    names = dict(authors_names(shape["n_blocks"]))
    tensors = {names[name]: value for name, value in parameters.items()}
    if tokenizer is not None:
        (folder / "tokenizer.json").write_text(tokenizer, encoding="utf-8")

    def save(path: Path, some: dict[str, np.ndarray]) -> None:
        if dtype == "bfloat16":
            write_bf16(path, some)
        else:
            save_file({name: value.astype(dtype) for name, value in some.items()}, path)

    if not shards:
        save(folder / "model.safetensors", tensors)
        return folder
    places = {}
    for i in range(shards):
        file = f"model-{i + 1:05}-of-{shards:05}.safetensors"
        some = {name: tensors[name] for name in list(tensors)[i::shards]}
        save(folder / file, some)
        places |= dict.fromkeys(some, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": places}))
    return folder
