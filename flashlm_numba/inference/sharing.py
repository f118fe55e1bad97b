"""Sharing a model: the folder that `export --hub` writes, and `push`, which uploads it to the Hugging Face hub."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from flashlm_numba.data.manifest import MANIFEST, Manifest
from flashlm_numba.data.tokenizer import TOKENIZER
from flashlm_numba.inference.evaluate import evaluate_run
from flashlm_numba.model import hub
from flashlm_numba.model.build import load_model, read_config, read_trained
from flashlm_numba.model.config import RunConfig
from flashlm_numba.model.describe import describe_run
from flashlm_numba.model.export import export_run
from flashlm_numba.model.hub_folder import (
    CARD,
    CONFIG,
    FILES,
    GENERATION,
    ONE,
    SUMS,
    checked_file,
    config_text,
    generation_text,
    is_exported,
    sums_text,
)
from flashlm_numba.model.model_card import Facts, card_text
from flashlm_numba.system.display import TERMINAL, Progress
from flashlm_numba.system.errors import UserError
from flashlm_numba.system.files import replace, sync_folder, write_text, writing_to
from flashlm_numba.system.paths import printable


def export_folder(
    run: Path,
    out: Path,
    checkpoint_name: str | None = None,
    *,
    ema: bool = False,
    rows: str = "int8",
    memory: bool = True,
    licence: str | None = None,
    data: Path | None = None,
    progress: Progress = TERMINAL,
) -> Path:
    """Write a run's model as a folder for the Hugging Face hub, whole or not at all. Returns out.

    licence : identifier of the model's licence; default: that of the training text, if it is known
    data : folder of the tokens that the run was trained on, if they have moved
    The other arguments are those of export_run. If the run's tokens are still there, the exported model is scored on
    their validation documents for the card. The folder contains no path of this machine.
    Raises UserError if the run cannot be read, if data holds other tokens, or if out is not empty or cannot be written.
    """
    if is_exported(run):
        raise UserError(f"{run} is already exported; give the folder of a run.")
    out = out.absolute()
    _check_free(out)
    temporary = out.with_name(f".{out.name}.{os.getpid()}.tmp")
    with writing_to(out, "choose another folder, or free some disk space"):
        temporary.mkdir(parents=True)
        try:
            _write(run, temporary, out.name, checkpoint_name, ema, rows, memory, licence, data, progress)
            sync_folder(temporary)
            if out.exists():
                out.rmdir()
            replace(temporary, out)
            sync_folder(out.parent)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
    return out


def push_folder(
    folder: Path, name: str, *, private: bool = False, dry_run: bool = False, progress: Progress = TERMINAL
) -> tuple[str, dict[str, int]]:
    """Upload a folder from export_folder to the repository USER/NAME. Returns its address, and the bytes of each file.

    private : who may read the repository, if it is new;  dry_run : check everything, and upload nothing
    Raises UserError if the folder is damaged or incomplete, or if it cannot be uploaded.
    """
    target = hub.target_of(name)
    missing = [file for file in FILES if not (folder / file).is_file()]
    if missing:
        raise UserError(
            f"{folder} has no {missing[0]}; give a folder written by `flashlm-numba export RUN --hub {folder}`."
        )
    load_model(checked_file(folder), uses=["read"], progress=progress)  # what others could not read is not pushed
    sizes = {file: (folder / file).stat().st_size for file in FILES}
    if not dry_run:
        hub.upload(folder, name, FILES, private=private, message="Upload a model of flashlm-numba", progress=progress)
    return target, sizes


def _check_free(out: Path) -> None:
    """Raise UserError unless a folder may become `out`: there is nothing, or an empty folder that nobody works in."""
    if out.is_dir() and not out.is_symlink():
        if content := sorted(os.listdir(out)):
            raise UserError(f"{out} is not empty (it holds {content[0]}); choose another folder.")
        if out.resolve() == Path.cwd():
            raise UserError(f"{out} is the working folder, which cannot be replaced; choose another folder.")
    elif os.path.lexists(out):
        raise UserError(f"{out} already exists; choose another folder.")


def _write(
    run: Path,
    folder: Path,
    name: str,
    checkpoint_name: str | None,
    ema: bool,
    rows: str,
    memory: bool,
    licence: str | None,
    data: Path | None,
    progress: Progress,
) -> None:
    """Write all files into a new folder. name : of the model"""
    own = read_config(run.parent.parent if run.absolute().parent.name == "checkpoints" else run)
    tokens = data or Path(own.data)
    text = _training_text(own, tokens)
    if data is not None and text is None:
        raise UserError(f"{data} does not hold the tokens that {run} was trained on; name their folder.")
    file = export_run(run, folder / ONE, checkpoint_name, ema=ema, rows=rows, memory=memory, progress=progress)
    trained = read_trained(file, progress=progress)
    base = hub.repository_of(trained.run.init)
    facts = Facts(
        name=printable(name),
        description=describe_run(file, progress=progress),
        seed=trained.run.seed,
        text=text,
        scores=None if text is None else _scores(file, tokens, progress),
        licence=licence,
        base=None if base is None else base.name,
    )
    texts = {
        CONFIG: config_text(trained.run, trained.vocabulary, rows),
        GENERATION: generation_text(trained.vocabulary),
        TOKENIZER: trained.vocabulary.to_json(),
        CARD: card_text(facts),
    }
    for each, content in texts.items():
        write_text(folder / each, content)
    write_text(folder / SUMS, sums_text(folder))


def _training_text(run: RunConfig, tokens: Path) -> Manifest | None:
    """The manifest of a folder of tokens, if they are those that a run was trained on."""
    try:
        found = Manifest.read(tokens / MANIFEST)
    except UserError:
        return None
    return found if found.hash == run.data_hash else None


def _scores(file: Path, tokens: Path, progress: Progress) -> dict[str, float] | None:
    """The scores of an exported model on the validation documents of the tokens, if there are any."""
    try:
        return evaluate_run(file, own_data=tokens, progress=progress)
    except UserError as error:  # such as damaged tokens
        progress.note(f"The model card has no scores: {error}")
        return None
