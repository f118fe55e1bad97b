"""A small tokenizer.json as the published MatMul-free LMs have: BPE of characters with U+2581 for spaces, and bytes."""

from __future__ import annotations

import json

SPACE = "\u2581"
PARTS = ("t", "h", "e", "p", "o", "l", "a", "n", "d", ",", ".", "he", "pe", "op", "le")
MERGES = ("h e", "p e", "o p", "l e", "t he", f"{SPACE} the", f"{SPACE} a")


def tokenizer_json(size: int | None = None) -> str:
    """The text of the file; size : number of tokens, the last of which no text yields."""
    names = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), SPACE, *PARTS]
    names += [merge.replace(" ", "") for merge in MERGES if merge.replace(" ", "") not in names]
    if size is not None:
        names += [f"unused{i}" for i in range(size - len(names))]
    special = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    space = {"String": SPACE}
    content = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [{"id": i, "content": name, **special} for i, name in enumerate(names[:3])],
        "normalizer": {
            "type": "Sequence",
            "normalizers": [
                {"type": "Prepend", "prepend": SPACE},
                {"type": "Replace", "pattern": {"String": " "}, "content": SPACE},
            ],
        },
        "pre_tokenizer": None,
        "post_processor": {
            "type": "TemplateProcessing",
            "single": [{"SpecialToken": {"id": "<s>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
            "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
            "special_tokens": {"<s>": {"id": "<s>", "ids": [1], "tokens": ["<s>"]}},
        },
        "decoder": {
            "type": "Sequence",
            "decoders": [
                {"type": "Replace", "pattern": space, "content": " "},
                {"type": "ByteFallback"},
                {"type": "Fuse"},
                {"type": "Strip", "content": " ", "start": 1, "stop": 0},
            ],
        },
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": "<unk>",
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": True,
            "byte_fallback": True,
            "ignore_merges": False,
            "vocab": {name: i for i, name in enumerate(names)},
            "merges": list(MERGES),
        },
    }
    return json.dumps(content, ensure_ascii=False)
