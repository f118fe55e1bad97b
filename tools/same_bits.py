"""Record the results of the program, bit for bit, and compare another version of the code with them.

    python tools/same_bits.py record before.json     # with the old code
    python tools/same_bits.py compare before.json    # with the new code; status 1 if a bit differs

A refactoring must not change any result. `record` trains for 40 steps on the built-in text with each head, with FlashLM
v3's recipe and with float activations, on one thread and on two. It records the loss of every step, the SHA-256 of
every tensor of the last checkpoint, the NLL that `eval` prints, generated texts and the tensors of an exported file.
RENAMED maps names of parameters and settings that have changed.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

TRAINING = {
    "tree": ["--head", "tree"],
    "dense": ["--head", "dense"],
    "sampled": ["--head", "sampled"],
    "v3": ["--recipe", "v3"],
    "float": ["--set", "activations=float"],
}
SAMPLING = {
    "temperature 1": ["--temperature", "1"],
    "likeliest": ["--temperature", "0"],
    "top-k": ["--temperature", "0.8", "--top-k", "40"],
    "top-p": ["--top-p", "0.9"],
    "int8": ["--activations", "int8"],
}
# (pattern, replacement) of tensor names in files that were recorded before; applied in order
RENAMED: list[tuple[str, str]] = [
    # a model of one block carries the block's number
    (r"^((?:\w+:)?(?:first\.|second\.|steps\.|row_steps\.)?)(norm1|norm2|mixer|glu)\.", r"\1blocks.0.\2."),
    (r"mixer\.average\.", "mixer.leaky."),
    (r"induction\.(inputs|outputs)", r"ngram_copy.\1"),
    (r"^(optimizer:)first\.", r"\1exp_avg."),
    (r"^(optimizer:)second\.", r"\1exp_avg_sq."),
]


def command(*arguments: str) -> str:
    """The output of a command of the program; an error ends this program."""
    done = subprocess.run([sys.executable, "-m", "flashlm_numba", *arguments], capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"flashlm-numba {' '.join(arguments)} failed:\n{done.stderr}")
    return done.stdout


def tensor_hashes(path: Path) -> dict[str, str]:
    """SHA-256 of every tensor of a safetensors file, shape and dtype included."""
    from safetensors.numpy import load_file

    return {
        name: hashlib.sha256(f"{value.dtype} {value.shape} ".encode() + value.tobytes()).hexdigest()
        for name, value in load_file(path).items()
    }


def measure(names: list[str]) -> dict[str, Any]:
    """Train, score, generate and export with the code that Python imports here."""
    found: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        for name in names:
            for threads in (1, 2):
                run = Path(folder) / f"{name}-{threads}"
                print(f"{name}, {threads} thread{'s' * (threads > 1)} ...", flush=True)
                options = ["--steps", "40", "--seed", "1", "--threads", str(threads)]
                command("train", *TRAINING[name], *options, "--out", str(run))
                lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
                checkpoint = run / "checkpoints" / "step-40"
                row: dict[str, Any] = {
                    "loss": [[line["loss"], line["nll"]] for line in lines],
                    "val_nll": [value for key, value in lines[-1].items() if key.startswith("val_nll")],
                    "sample": (run / "samples.txt").read_text(),
                    "tensors": {
                        f"{file.stem}:{tensor}": digest
                        for file in sorted(checkpoint.glob("*.safetensors"))
                        for tensor, digest in tensor_hashes(file).items()
                    },
                }
                if threads == 2:
                    row["eval"] = json.loads(command("eval", str(run), "--json", "--threads", "2"))["nll"]
                    texts = {}
                    for kind, sampling in SAMPLING.items():
                        prompt = ["--prompt", "The state of the Union", "--max-tokens", "60", "--seed", "1"]
                        texts[kind] = command("generate", str(run), *prompt, *sampling)
                    row["texts"] = texts
                    exported = Path(folder) / f"{name}.safetensors"
                    command("export", str(run), str(exported))
                    row["export"] = tensor_hashes(exported)
                found[f"{name}, {threads}"] = row
    return found


def renamed(name: str) -> str:
    """The current name of a recorded tensor."""
    for pattern, replacement in RENAMED:
        name = re.sub(pattern, replacement, name)
    return name


def differences(before: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """One line per value of `now` that differs from before."""
    lines = []
    for key in ("loss", "val_nll", "eval", "sample", "texts"):
        if before.get(key) != now.get(key):
            lines.append(f"{key}: {str(before.get(key))[:200]} became {str(now.get(key))[:200]}")
    for key in ("tensors", "export"):
        old = {renamed(name): digest for name, digest in before.get(key, {}).items()}
        new = now.get(key, {})
        for name in sorted(old.keys() | new.keys()):
            if old.get(name) != new.get(name):
                what = "is new" if name not in old else "is gone" if name not in new else "has other bits"
                lines.append(f"{key}: {name} {what}")
    return lines


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("action", choices=("record", "compare"))
    parser.add_argument("file", type=Path)
    parser.add_argument("--only", help=f"some of {','.join(TRAINING)}; default all")
    arguments = parser.parse_args()
    names = arguments.only.split(",") if arguments.only else list(TRAINING)
    if arguments.action == "compare":
        before = json.loads(arguments.file.read_text())
    found = measure(names)
    if arguments.action == "record":
        arguments.file.write_text(json.dumps(found, indent=1) + "\n")
        return 0
    status = 0
    for name, row in found.items():
        lines = differences(before[name], row)
        tensors = len(row["tensors"]) + len(row.get("export", {}))
        print(f"{name}: {'same bits' if not lines else 'DIFFERENT'} ({len(row['loss'])} losses, {tensors} tensors)")
        for line in lines:
            print("   ", line)
        status |= bool(lines)
    return status


if __name__ == "__main__":
    sys.exit(main())
