"""Make two tasks for lm-evaluation-harness from held-out text: word perplexity, and a choice of continuations.

\b
    python tools/make_harness_tasks.py SOURCE OUT                       a file or folder, as for `prepare`
    python tools/make_harness_tasks.py TOKENS OUT                       the validation documents of a prepared folder
    flashlm-numba eval RUN --lm-eval heldout_perplexity,heldout_choice --lm-eval-path OUT

OUT receives a YAML and a JSONL file per task. The first task is the rolling word perplexity of every document. A
question of the second one is a passage of a document and four continuations of equal length in words: its own, and
passages of three other documents. Everything is drawn at random from the seed, every document being as likely as its
length in words, and nothing is chosen by hand; a model without knowledge is right in 25 % of the questions. White space
within passages becomes one space. The YAML files name the JSONL files by their absolute paths.
"""

from __future__ import annotations

import json
import random
import sys
from collections.abc import Iterable, Iterator, Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any

import click

if __package__ in (None, ""):  # run as a file, the checkout is not on the path
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from flashlm_numba.data.shards import is_prepared, open_tokens
from flashlm_numba.data.sources import resolve
from flashlm_numba.system.errors import UserError
from flashlm_numba.system.files import write_text

CHOICES = 4
TASK = """\
task: {name}
dataset_path: json
dataset_kwargs:
  data_files:
    test: {data}
test_split: test
output_type: {kind}
{fields}metadata:
  version: 1.0
"""
PERPLEXITY = """\
doc_to_text: ""
doc_to_target: "{{text}}"
metric_list:
  - metric: word_perplexity
  - metric: bits_per_byte
"""
CHOICE = """\
doc_to_text: "{{text}}"
doc_to_choice: "{{choices}}"
doc_to_target: "{{answer}}"
metric_list:
  - metric: acc
"""


def documents_of(source: str, column: str) -> Iterator[str]:
    """The held-out documents with text: of a prepared folder, or of a source as for `prepare`."""
    if is_prepared(source):
        data = open_tokens(source)
        yield from (data.vocabulary.decode(document) for document in data.validation.documents())
        return
    found = resolve(source, column=column)
    for role in ("validation",) if "validation" in found.roles else found.roles:
        yield from (text for text in found.documents(role) if text.strip())


def questions(
    documents: Sequence[str], count: int, *, passage: int, continuation: int, seed: int
) -> Iterator[dict[str, Any]]:
    """Questions with the keys text, choices and answer, the index of the true continuation.

    passage, continuation : lengths in words
    Raises ClickException unless four documents are long enough.

    >>> texts = [f"{letter} " * 9 for letter in "abcd"]
    >>> found = next(questions(texts, 1, passage=3, continuation=2, seed=0))
    >>> found["choices"][found["answer"]] == " ".join(found["text"].split()[:2])
    True
    """
    rng = random.Random(seed)
    texts = [words for words in (document.split() for document in documents) if len(words) >= passage + continuation]
    if len(texts) < CHOICES:
        raise click.ClickException(
            f"A question needs {CHOICES} documents of at least {passage + continuation} words, but there are only "
            f"{len(texts)}; give more text, or smaller --passage and --continuation."
        )
    until = list(accumulate(map(len, texts)))

    def place(length: int, taken: Iterable[int] = ()) -> tuple[int, int]:
        """A document that is not taken, and the word in it where a passage of this length begins."""
        while True:
            n = rng.choices(range(len(texts)), cum_weights=until)[0]
            if n not in taken:
                return n, rng.randrange(len(texts[n]) - length + 1)

    for _ in range(count):
        own, start = place(passage + continuation)
        middle, end = start + passage, start + passage + continuation
        choices, taken = [texts[own][middle:end]], {own}
        while len(choices) < CHOICES:
            other, at = place(continuation, taken)
            choices.append(texts[other][at : at + continuation])
            taken.add(other)
        order = rng.sample(range(CHOICES), CHOICES)
        yield {
            "text": " ".join(texts[own][start:middle]),
            "choices": [" ".join(choices[n]) for n in order],
            "answer": order.index(0),
        }


def write_task(out: Path, name: str, kind: str, fields: str, rows: Iterable[dict[str, Any]]) -> int:
    """Write NAME.jsonl and NAME.yaml; returns the number of rows."""
    lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in rows]
    data = (out / f"{name}.jsonl").resolve()
    write_text(data, "".join(lines))
    write_text(out / f"{name}.yaml", TASK.format(name=name, data=json.dumps(str(data)), kind=kind, fields=fields))
    return len(lines)


@click.command(help=__doc__)
@click.argument("source")
@click.argument("out", type=click.Path(file_okay=False, path_type=Path))
@click.option("--name", default="heldout", show_default=True, help="Beginning of the tasks' names.")
@click.option("--questions", "count", type=click.IntRange(min=1), default=1_000, show_default=True)
@click.option("--passage", type=click.IntRange(min=1), default=50, show_default=True, help="Words before the choice.")
@click.option("--continuation", type=click.IntRange(min=1), default=10, show_default=True, help="Words of a choice.")
@click.option("--seed", type=int, default=1, show_default=True)
@click.option("--column", default="text", show_default=True, help="Column of the text in Parquet and JSON files.")
def main(
    source: str, out: Path, name: str, count: int, passage: int, continuation: int, seed: int, column: str
) -> None:
    try:
        documents = list(documents_of(source, column))
        asked = list(questions(documents, count, passage=passage, continuation=continuation, seed=seed))
        out.mkdir(parents=True, exist_ok=True)
        texts = ({"text": text} for text in documents)
        written = write_task(out, f"{name}_perplexity", "loglikelihood_rolling", PERPLEXITY, texts)
        write_task(out, f"{name}_choice", "multiple_choice", CHOICE, asked)
    except UserError as error:
        raise click.ClickException(str(error)) from None
    click.echo(f"{name}_perplexity: {written:,} documents; {name}_choice: {count:,} questions; in {out}")


if __name__ == "__main__":
    main()
