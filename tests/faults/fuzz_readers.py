"""Coverage-guided fuzzing of the file readers, by hand (CI runs the Hypothesis tests beside this file):

    pip install atheris
    python tests/faults/fuzz_readers.py settings -max_total_time=60    or: export, manifest, tree

Anything but a UserError is a finding; atheris then writes the input to a file, crash-..., and says why.
"""

import contextlib
import sys
import tempfile
from pathlib import Path


def readers(place):
    """Functions of bytes by name; each reads them as a file of its kind."""
    import numpy as np

    from flashlm_numba import packed
    from flashlm_numba.config import RunConfig
    from flashlm_numba.data import Manifest
    from flashlm_numba.tree import Tree, build_tree

    whole = build_tree("adaptive", np.arange(50)).to_tensors()
    arrays = sorted(name for name in whole if name != "tree.shape")

    def settings(data):
        RunConfig.from_json(data.decode("utf-8", "replace"), place)

    def export(data):
        place.write_bytes(data)
        packed.read(place)

    def manifest(data):
        place.write_bytes(data)
        Manifest.read(place)

    def tree(data):
        if data:
            changed = np.frombuffer(data[1 : 1 + (len(data) - 1) // 4 * 4], np.int32)
            Tree.from_tensors({**whole, arrays[data[0] % len(arrays)]: changed})

    return {"settings": settings, "export": export, "manifest": manifest, "tree": tree}


def main():
    import atheris

    with atheris.instrument_imports(include=["flashlm_numba"]), tempfile.TemporaryDirectory() as folder:
        found = readers(Path(folder) / "file")
        if len(sys.argv) < 2 or sys.argv[1] not in found:
            sys.exit(f"give one of {', '.join(found)}, then libFuzzer's options")
        reader = found[sys.argv.pop(1)]
        from flashlm_numba.errors import UserError

        def one(data):
            with contextlib.suppress(UserError):
                reader(data)

        atheris.Setup(sys.argv, one)
        atheris.Fuzz()


if __name__ == "__main__":
    main()
