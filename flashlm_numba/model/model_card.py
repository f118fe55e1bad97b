"""The model card, README.md of a folder for the Hugging Face hub: a metadata block, and the facts of the run.

What is not known is left out. Names of this machine's folders do not occur: a text is called by its last name.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import PurePath
from typing import Any

from flashlm_numba.data.manifest import Manifest
from flashlm_numba.model.sizes import in_units
from flashlm_numba.system.display import duration, plural
from flashlm_numba.system.hub import quiet_hub
from flashlm_numba.system.paths import printable

UNKNOWN = "unknown"  # licence
_IDENTIFIER = re.compile(r"[a-z0-9][a-z0-9.-]*")  # of a licence, as the hub lists them
_ARITHMETIC = {"float": "float32", "int8": "int8, with a scale per row", "int4": "int4, with scales per row"}


@dataclass(frozen=True)
class Facts:
    """What the card says of a model."""

    name: str
    description: dict[str, Any]  # by describe_run, of the exported file
    seed: int
    text: Manifest | None = None  # of the training text, if it is still there
    scores: dict[str, Any] | None = None  # by evaluate_run, of the exported file on that text's validation documents
    licence: str | None = None  # as the user chose it
    base: str | None = None  # USER/NAME of the model whose weights the run started from


def is_licence(text: str) -> bool:
    """Whether a text has the form of a licence's identifier on the hub, such as apache-2.0."""
    return _IDENTIFIER.fullmatch(text) is not None


def licence_of(facts: Facts) -> dict[str, str]:
    """The metadata of the licence: the one that the user chose, or that of the training text, or that it is unknown."""
    known = facts.licence or (facts.text and facts.text.licence)
    if not known:
        return {"license": UNKNOWN}
    if is_licence(known):
        return {"license": known}
    return {"license": "other", "license_name": re.sub(r"[^a-z0-9.]+", "-", known.lower()).strip("-")}


def card_text(facts: Facts) -> str:
    """The text of README.md."""
    sections = [_introduction(facts), _use(facts), _model(facts), _training(facts), _evaluation(facts), _files(facts)]
    return f"---\n{_metadata(facts)}\n---\n\n" + "\n\n".join(filter(None, sections)) + "\n"


def _metadata(facts: Facts) -> str:
    """The metadata block, in YAML."""
    hub = quiet_hub()
    source = facts.text.source if facts.text else {}
    results = None
    if facts.scores and facts.text:
        validation = facts.text.validation_source or source
        place = {
            "task_type": "text-generation",
            "dataset_type": validation["name"] if validation["kind"] == "hub" else _short_name(validation),
            "dataset_name": _text_name(validation),
            "dataset_split": "validation",
        }
        values = {"bits_per_byte": "bits per byte", "nll": "NLL, nats per token"}
        results = [
            hub.EvalResult(**place, metric_type=key, metric_name=title, metric_value=round(facts.scores[key], 4))
            for key, title in values.items()
        ]
    data = hub.ModelCardData(
        **licence_of(facts),
        language="en" if source.get("kind") == "built-in" else None,
        library_name="flashlm-numba",
        pipeline_tag="text-generation",
        tags=["flashlm-numba", "ternary", "cpu"],
        base_model=facts.base,
        datasets=[source["name"]] if source.get("kind") == "hub" else None,
        model_name=facts.name if results else None,
        eval_results=results,
    )
    return data.to_yaml()


def _introduction(facts: Facts) -> str:
    found = facts.description
    ternary = f", {found['ternary_parameters']:,} of them ternary (-1, 0 or +1)" if found["ternary_parameters"] else ""
    return (
        f"# {facts.name}\n\n"
        f"A language model of {found['parameters']:,} parameters{ternary}. It was trained by flashlm-numba on a CPU "
        "and runs on one. It continues a text; it was not trained to follow instructions."
    )


def _use(facts: Facts) -> str:
    return f"""## Use

USER/{facts.name} stands for the name of this repository. A folder with its files works in place of `hf:USER/...`.

```sh
flashlm-numba generate hf:USER/{facts.name} --prompt "The "
flashlm-numba eval hf:USER/{facts.name} text.txt
flashlm-numba serve hf:USER/{facts.name}
```

```python
import flashlm_numba as fl

model = fl.load("hf:USER/{facts.name}")
print(model.generate("The "))
```"""


def _model(facts: Facts) -> str:
    found = facts.description
    field, memory = found["receptive_field"], found["memory"]
    rows = [
        ("output head", found["head"]),
        ("vocabulary", f"{found['vocabulary']}, {found['vocab_size']:,} tokens"),
        ("context", "the whole text" if field is None else f"{field:,} tokens"),
        ("ternary weights", "5 per byte" if found["ternary_parameters"] else None),
        ("embedding's rows", _ARITHMETIC[found["rows"]]),
        ("other weights", "float32"),
        ("activations of ternary layers", "float32" if found["activations"] == "float" else found["activations"]),
        ("size of the file", in_units(found["bytes"]["exported"])),
        ("memory", memory and f"{memory['ngrams']:,} n-grams of up to {memory['order']} tokens"),
        *((f"parameters: {part}", f"{size:,}") for part, size in found["parameters_by_group"].items()),
    ]
    return _section("Model", rows)


def _training(facts: Facts) -> str:
    trained, text = facts.description["trained"], facts.text
    rows: list[tuple[str, Any]] = []
    if text is not None:
        train = text.splits["train"]
        rows += [
            ("text", _text_name(text.source)),
            ("licence of the text", text.licence),
            (
                "size of the text",
                f"{train.text_tokens:,} tokens, {in_units(train.text_bytes)}, {plural(train.documents, 'document')}",
            ),
        ]
    if trained["steps"]:
        rows += [
            ("recipe", facts.description["recipe"]),
            ("steps", f"{trained['steps']:,}"),
            ("tokens read", f"{trained['tokens']:,}"),
            ("time", duration(trained["seconds"])),
            ("seed", facts.seed),
            ("weights", "their exponential moving average" if trained["running_average"] else None),
            ("started from", facts.base),
        ]
    return _section("Training", rows) if rows else ""


def _evaluation(facts: Facts) -> str:
    if facts.scores is None or facts.text is None:
        return ""
    found = facts.scores
    rows = [
        ("text", f"{_text_name(facts.text.validation_source or facts.text.source)}: documents held out from training"),
        ("size of the text", f"{found['tokens']:,} tokens, {in_units(found['bytes'])}"),
        ("NLL", f"{found['nll']:.4f} nats per token"),
        ("bits per byte", f"{found['bits_per_byte']:.4f}"),
    ]
    after = "The scores are those of the file in this repository, in its arithmetic. Every token of every document is"
    return _section("Evaluation", rows) + f"\n\n{after} scored once, from the tokens before it in the same document."


def _files(facts: Facts) -> str:
    return """## Files

`model.safetensors` is complete by itself: it holds the packed weights, the settings and the vocabulary. `config.json`,
`generation_config.json` and `tokenizer.json` repeat a part of it for other programs. `sha256sum -c SHA256SUMS` checks
the files."""


def _section(title: str, rows: Iterable[tuple[str, Any]]) -> str:
    """A heading and a table of two columns; rows without a value are left out."""
    lines = [f"| {name} | {_cell(value)} |" for name, value in rows if value not in (None, "")]
    return "\n".join([f"## {title}", "", "| | |", "| --- | --- |", *lines])


def _cell(value: Any) -> str:
    return str(value).replace("|", "\\|")


def _short_name(source: dict[str, Any]) -> str:
    """A text's name without the folders above it."""
    return printable(source["name"] if source["kind"] == "hub" else PurePath(source["name"]).name or "local files")


def _text_name(source: dict[str, Any]) -> str:
    """What a card calls a text."""
    if source["kind"] == "built-in":
        return source["origin"]
    return _short_name(source) + (f", {source['subset']}" if source.get("subset") else "")
