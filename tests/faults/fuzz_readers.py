"""Coverage-guided fuzzing of the file readers, by hand (CI runs the Hypothesis tests beside this file):

    pip install atheris
    python tests/faults/fuzz_readers.py settings -max_total_time=60    or: export, manifest, tokenizer, tree

Anything but a UserError is a finding; atheris then writes the input to a file, crash-..., and says why.
"""

import contextlib
import sys
import tempfile
from dataclasses import replace
from pathlib import Path


def readers(place):
    """By name: a function of bytes that reads them as a file of its kind, and a whole file to begin with."""
    import numpy as np

    from flashlm_numba.data import tokenizer_file
    from flashlm_numba.data.byte_level import ByteVocabulary
    from flashlm_numba.data.manifest import SPLITS, Manifest, Shard, SplitManifest
    from flashlm_numba.heads.label_tree import Tree
    from flashlm_numba.heads.tree_shapes import build_tree
    from flashlm_numba.model import packed
    from flashlm_numba.model.recipes import from_recipe
    from flashlm_numba.model.settings import run_from_json

    whole = build_tree("adaptive", np.arange(50)).to_tensors()
    arrays = sorted(name for name in whole if name != "tree.shape")

    def settings(data):
        run_from_json(data.decode("utf-8", "replace"), place)

    def export(data):
        place.write_bytes(data)
        packed.read(place)

    def manifest(data):
        place.write_bytes(data)
        Manifest.read(place)

    def tokenizer(data):
        place.write_bytes(data)
        tokenizer_file.read(place)

    def tree(data):
        if data:
            changed = np.frombuffer(data[1 : 1 + (len(data) - 1) // 4 * 4], np.int32)
            Tree.from_tensors({**whole, arrays[data[0] % len(arrays)]: changed})

    ternary = {name: np.ones((2, 3), np.float32) for name in ("blocks.0.mixer.out.weight", "blocks.0.glu.up.weight")}
    text = from_recipe("default").to_json()
    tensors = {**ternary, "embedding.weight": np.ones((4, 3), np.float32)}
    packed.write(place, tensors, ternary, text, {"step": 1, "tokens": 2, "seconds": 3.0}, "", "int8")
    shard = Shard("train-00000.bin", 9, "0" * 64)
    splits = {name: SplitManifest(1, 9, 8, 30, (replace(shard, name=f"{name}-00000.bin"),)) for name in SPLITS[:2]}
    told = Manifest("gpt2", "0" * 64, 50_257, None, {}, None, {}, "all", 0, 0, splits)
    return {
        "settings": (settings, text.encode()),
        "export": (export, place.read_bytes()),
        "manifest": (manifest, told.to_json().encode()),
        "tokenizer": (tokenizer, ByteVocabulary().to_json().encode()),
        "tree": (tree, b"\0" + whole[arrays[0]].tobytes()),
    }


def main():
    import atheris

    with atheris.instrument_imports(include=["flashlm_numba"]), tempfile.TemporaryDirectory() as folder:
        found = readers(Path(folder) / "file")
        if len(sys.argv) < 2 or sys.argv[1] not in found:
            sys.exit(f"give one of {', '.join(found)}, then libFuzzer's options")
        reader, example = found[sys.argv.pop(1)]
        corpus = Path(folder) / "corpus"
        corpus.mkdir()
        (corpus / "whole").write_bytes(example)
        from flashlm_numba.system.errors import UserError

        def one(data):
            with contextlib.suppress(UserError):
                reader(data)

        reader(example)
        atheris.Setup([*sys.argv, str(corpus)], one)
        atheris.Fuzz()


if __name__ == "__main__":
    main()
