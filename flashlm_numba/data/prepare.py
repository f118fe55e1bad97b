"""Make token shards from documents: the `prepare` command.

data/shards.py reads the files and describes them; data/writer.py writes them. A vocabulary that must be trained comes
first, and tokenizer.json before the shards. The manifest is written last. While `progress.json` exists, the corpus is
unfinished, and the same command continues it with the vocabulary in the folder.
"""

from __future__ import annotations

import errno
import os
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from flashlm_numba.data import bpe, sources
from flashlm_numba.data.byte_level import ByteLevelVocabulary
from flashlm_numba.data.documents import ALL, Document, Place, Tally
from flashlm_numba.data.encoding import encoded
from flashlm_numba.data.manifest import FORMAT, JOURNAL, MANIFEST, SPLITS, Manifest, SplitManifest
from flashlm_numba.data.report import Report
from flashlm_numba.data.shards import open_tokens
from flashlm_numba.data.splits import VALIDATION_SHARE, Plan, SplitChoice
from flashlm_numba.data.tokenizer import TOKENIZER, Vocabulary
from flashlm_numba.data.vocabularies import (
    DEFAULT_VOCABULARY,
    Request,
    check_free,
    read_vocabulary,
    requested,
    vocabulary_named,
    write_vocabulary,
)
from flashlm_numba.data.writer import SHARD_TOKENS, ShardWriter, discard, locked, read_journal, write_journal
from flashlm_numba.system import files
from flashlm_numba.system.arguments import whole
from flashlm_numba.system.display import plural
from flashlm_numba.system.errors import Stopped, UserError
from flashlm_numba.system.paths import expanded
from flashlm_numba.system.threads import available_cores

READ_BYTES = 8 * bpe.SAMPLE_BYTES  # of a source elsewhere, to train a vocabulary
JOURNAL_SECONDS = 5.0  # seconds of work lost at most when the process is killed


def prepare(
    source: str | None,
    out: Path | str,
    *,
    validation: str | None = None,
    subset: str | None = None,
    split: SplitChoice = "auto",
    max_tokens: int | None = None,
    max_docs: int | None = None,
    lines: bool = False,
    column: str = "text",
    skip_missing: bool = False,
    workers: int | None = None,
    progress: bool = True,
    shard_tokens: int = SHARD_TOKENS,
    wait: bool = False,
    vocab: str | int | Path = DEFAULT_VOCABULARY,
) -> Manifest:
    """Tokenise the documents of a source into shards in the folder out. Continues an interrupted call.

    source : None for the built-in text, the name of a Hugging Face dataset, a file, a folder or a glob
    validation : source of the validation documents; training documents equal to one of them are left out
    split : "auto" uses the roles in the file names, or takes 5 % for validation if there are none; "train" or
        "validation" puts all documents (those of that role, if the source has roles) into this split
    max_tokens, max_docs : stop after this many tokens (ends of text count; the last document is cut) or documents with
        text; documents from --validation, and those that their file's name holds out, do not count
    lines, column, subset, skip_missing : see sources.resolve;  workers : tokeniser threads; default: all cores
    shard_tokens : ids per shard file;  wait : wait for another process that prepares out, instead of failing
    vocab : the vocabulary: a name in VOCABULARIES, a number of tokens to train one, or a tokenizer.json
    The result depends only on the source and these settings, not on workers or interruptions, and a trained vocabulary
    also on the version of the library `tokenizers`. Memory does not grow with
    the corpus: it is about 350 MB plus up to 14 times the longest document.
    Raises UserError for a bad source, an out that holds something else, a full disk, or Ctrl-C. Finished work is kept.
    """
    max_tokens = None if max_tokens is None else whole("max_tokens", max_tokens)
    max_docs = None if max_docs is None else whole("max_docs", max_docs)
    workers = available_cores() if workers is None else whole("workers", workers)
    if split not in ("auto", "train", "validation"):
        raise ValueError(f"prepare: split must be auto, train or validation, got {split!r}")
    request = requested(vocab)
    out = expanded(out)
    if (out / "config.json").exists() or (out / "checkpoints").exists():
        raise UserError(f"{out} holds a run; choose another folder for the tokens.")
    if validation is not None and split != "auto":
        raise UserError(f"validation documents and split {split} contradict each other; leave out one of the two.")
    reading: dict[str, Any] = {"column": column, "lines": lines, "skip_missing": skip_missing}
    resolved = sources.resolve(source, subset=subset, **reading)
    held_out = None if validation is None else sources.resolve(validation, **reading)
    for documents in (resolved, held_out):
        inside = [path for path in documents.paths if path.parent == out.absolute()] if documents is not None else []
        if inside:
            raise UserError(f"{out} contains the documents ({inside[0].name}); choose another folder.")
    if request.path is not None and request.path.absolute().parent == out.absolute():
        raise UserError(f"{out} contains the vocabulary {request.path.name}; choose another folder.")
    measure = request.vocabulary or vocabulary_named("bytes")
    measure.load()
    plan = Plan(resolved, held_out, split, max_docs, max_tokens, measure)
    identity = {
        "format": FORMAT,
        "source": resolved.fingerprint(),
        "validation_source": None if held_out is None else held_out.fingerprint(),
        "settings": {
            "split": split,
            "max_tokens": max_tokens,
            "max_docs": max_docs,
            "shard_tokens": shard_tokens,
            "validation_share": VALIDATION_SHARE,
            "vocabulary": request.name,
        },
    }
    if request.vocabulary is not None:
        identity["tokenizer_hash"] = request.vocabulary.hash
    report = Report(progress)
    plan.note = report.say
    try:
        out.mkdir(parents=True, exist_ok=True)
        with locked(out, wait):
            return _prepare(plan, request, out, identity, shard_tokens, workers, report)
    except KeyboardInterrupt:
        raise Stopped(f"Stopped; {out} holds the finished work: run the same command again to continue.") from None
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise UserError(
                f"The disk of {out} is full: free some space and run the same command again to continue."
            ) from error
        if os.path.lexists(out) and not out.is_dir():
            raise UserError(f"Cannot prepare {out}: it is not a folder; choose another folder.") from error
        where = f" ({error.filename})" if error.filename and error.filename != str(out) else ""
        raise UserError(f"Cannot prepare {out}: {error.strerror or error}{where}; choose another folder.") from error
    finally:
        report.stop()


def _prepare(
    plan: Plan,
    request: Request,
    out: Path,
    identity: dict[str, Any],
    shard_tokens: int,
    workers: int,
    report: Report,
) -> Manifest:
    finished = _finished(out, identity, report)
    if finished is not None:
        report.say(f"{out} is already prepared: {_summary(finished)}.")
        return finished

    names = [name for name in SPLITS if name != "test" or (plan.split == "auto" and "test" in plan.source.roles)]
    state = read_journal(out, identity)
    writers: dict[str, ShardWriter] = {}
    try:
        if state is not None:
            try:
                plan.start = Place(**state["place"])
                vocabulary = read_vocabulary(out, state["tokenizer_hash"])
                for name in names:
                    writers[name] = ShardWriter(out, name, shard_tokens, vocabulary.dtype, state["splits"][name])
            except (UserError, OSError, ValueError, KeyError, TypeError) as error:
                report.say(f"The unfinished corpus in {out} is damaged ({error}): starting over.")
                for opened in writers.values():
                    opened.close()
                discard(out)
                state, plan.start = None, Place()
        if state is None:
            vocabulary = request.vocabulary or _trained(plan, request, report)
            check_free(out, vocabulary)
            writers = {name: ShardWriter(out, name, shard_tokens, vocabulary.dtype, None) for name in names}
        done = _write(plan, vocabulary, out, identity, state, writers, workers, report)
        splits = {name: opened.finish() for name, opened in writers.items()}
    finally:
        for opened in writers.values():
            opened.close()
    try:
        _check_splits(plan, splits)
    except UserError:
        discard(out)  # this corpus cannot be continued
        raise
    manifest = Manifest(
        tokenizer=vocabulary.name,
        tokenizer_hash=vocabulary.hash,
        vocab_size=vocabulary.size,
        licence=plan.source.licence,
        source=identity["source"],
        validation_source=identity["validation_source"],
        settings=identity["settings"],
        split_rule=plan.rule,
        skipped_empty=done.empty,
        skipped_held_out=done.held_out,
        splits=splits,
    )
    files.write_atomically(out / MANIFEST, lambda f: f.write(manifest.to_json().encode()))
    (out / JOURNAL).unlink(missing_ok=True)
    report.stop()
    report.say(f"Prepared {out}: {_summary(manifest)}.")
    if manifest.skipped_empty:
        report.say(f"Left out {plural(manifest.skipped_empty, 'document')} without text.")
    if manifest.skipped_held_out:
        report.say(f"Left out {plural(manifest.skipped_held_out, 'training document')} equal to held-out ones.")
    if plan.split == "auto" and not splits["validation"].documents:
        report.say("There are no validation documents: name some with --validation to evaluate.")
    return manifest


def _trained(plan: Plan, request: Request, report: Report) -> Vocabulary:
    """Train the requested vocabulary on the training documents of a plan. Nothing is written."""
    assert request.size is not None
    report.say(f"Training a vocabulary of {request.size:,} tokens on the training documents of {plan.source.name}.")
    report.start()
    sample, read = bpe.Sample(), 0
    for text in replace(plan, tally=Tally(), start=Place()).training_texts(READ_BYTES):
        sample.add(text)
        read += len(text)
        report.show(f"reading: {read:,} characters, {sample.size:,} bytes in the sample")
    if not sample.size:
        raise UserError(f"{plan.source.name} has no training document to train a vocabulary on.")
    text = bpe.train(sample.texts(), request.size, report.show)
    report.stop()
    return ByteLevelVocabulary(text)


def _write(
    plan: Plan,
    vocabulary: Vocabulary,
    out: Path,
    identity: dict[str, Any],
    state: dict[str, Any] | None,
    writers: dict[str, ShardWriter],
    workers: int,
    report: Report,
) -> Tally:
    """Encode and write all documents that the journal does not list as done. Returns the tally of those left out."""
    max_tokens = plan.max_tokens
    done = int(state["documents"]) if state else 0  # finished documents of the plan's stream
    used = int(state["limited_tokens"]) if state else 0  # tokens used of max_tokens
    tally, place = Tally(), plan.start
    documents = sum(writer.documents for writer in writers.values())
    tokens = sum(writer.text_tokens for writer in writers.values())
    if state:
        report.say(f"Continuing {out} after {plural(documents, 'document')}.")
    else:
        report.say(f"Preparing {plan.source.name} in {out}.")
    report.start(tokens, plan.max_tokens)

    def store() -> None:
        write_journal(out, identity, writers, vocabulary=vocabulary, documents=done, limited_tokens=used, place=place)

    def remaining() -> Iterator[Document]:
        nonlocal tally, place
        for index, document in enumerate(plan.documents(), plan.start.documents):
            if index >= done_before:
                yield document
            else:
                tally, place = document.tally, document.place

    done_before = done
    store()  # marks the folder as an unfinished corpus before anything else appears
    if not (out / TOKENIZER).exists():
        write_vocabulary(out, vocabulary)
    stored = time.monotonic()
    end_of_document = np.array([vocabulary.eot], dtype=vocabulary.dtype)
    begun = False  # whether a part of the current document has been written
    stream = encoded(vocabulary, remaining(), workers)
    try:
        for piece, ids, size in stream:
            writer = writers[piece.document.split]
            limited = piece.document.limited and max_tokens is not None
            left = max_tokens - used - 1 if limited and max_tokens is not None else len(ids)  # 1 for the end of text
            cut = len(ids) > left
            if cut:
                ids = ids[: max(left, 0)]
                size = len(vocabulary.decode_bytes(ids))
                if not len(ids) and not begun:
                    return tally
            writer.append(ids)
            writer.text_tokens += len(ids)
            writer.text_bytes += size
            used += len(ids) if limited else 0
            tokens += len(ids)
            begun = True
            if not (piece.last or cut):
                continue
            writer.append(end_of_document)
            writer.documents += 1
            used += 1 if limited else 0
            begun = False
            done += 1
            documents += 1
            tally, place = piece.document.tally, piece.document.place
            if cut:
                return tally
            report.update(documents, tokens)
            if time.monotonic() - stored > JOURNAL_SECONDS:
                store()
                stored = time.monotonic()
    finally:
        stream.close()
    return plan.tally


def _check_splits(plan: Plan, splits: dict[str, SplitManifest]) -> None:
    if not any(split.documents for split in splits.values()):
        raise UserError(f"{plan.source.name} contains no document with text.")
    if plan.split != "auto":
        return
    if not splits["train"].documents:
        raise UserError(
            f"No training document of {plan.source.name} is left, because all are held out: "
            "use more or longer text, or name other validation documents with --validation."
        )
    if not splits["validation"].documents and (plan.validation is not None or ALL in plan.source.roles):
        name = plan.source.name if plan.validation is None else plan.validation.name
        raise UserError(f"{name} has no validation document: use more text, or name some with --validation.")
    if plan.splits_off and splits["validation"].tokens > splits["train"].tokens:
        raise UserError(
            f"The validation documents of {plan.source.name} would hold more than half of its tokens, because few "
            "documents hold most of them: name validation documents with --validation."
        )


def _finished(out: Path, identity: dict[str, Any], report: Report) -> Manifest | None:
    """The manifest of a finished corpus, or None. Deletes this corpus if shards are missing or have another size.

    Raises UserError if its source or settings differ, or if the manifest does not tell.
    """
    if not (out / MANIFEST).exists():
        return None
    manifest = Manifest.read(out / MANIFEST)
    if any(getattr(manifest, key) != value for key, value in identity.items()):
        raise UserError(
            f"{out} holds a corpus from another source (or its files have changed) or with other settings: "
            "choose another --out, or delete that folder first."
        )
    try:
        open_tokens(out)
    except UserError:
        report.say(f"Files of the corpus in {out} are missing or damaged: preparing it again.")
        discard(out)
        return None
    (out / JOURNAL).unlink(missing_ok=True)
    return manifest


def _summary(manifest: Manifest) -> str:
    parts = [
        f"{split.text_tokens:,} tokens in {plural(split.documents, f'{name} document')}"
        for name, split in manifest.splits.items()
        if split.documents or name != "test"
    ]
    return f"{', '.join(parts)} ({manifest.split_rule})"


def discard_if_damaged(out: Path) -> None:
    """Delete a finished corpus if it is damaged. An unfinished corpus stays, to be continued."""
    if not (out / MANIFEST).exists():
        return
    with locked(out, wait=True):
        try:
            open_tokens(out).verify()
        except UserError:
            discard(out)
