"""Models on the Hugging Face hub: a repository named hf:USER/NAME is downloaded, and a folder is pushed to one."""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flashlm_numba.data.documents import reason
from flashlm_numba.system.display import Display, Progress, in_terminal
from flashlm_numba.system.errors import UserError
from flashlm_numba.system.hub import HUB_TIMEOUT, quiet_hub

PREFIX = "hf:"
_NAME = re.compile(r"[\w.-]+/[\w.-]+", re.ASCII)
_LOG_IN = "log in with `hf auth login`, or set the variable HF_TOKEN"


@dataclass(frozen=True)
class Repository:
    """A model on the hub."""

    name: str  # USER/NAME
    revision: str | None = None  # a branch, a tag or a commit; None: the branch main

    def __str__(self) -> str:
        return f"{PREFIX}{self.name}" + (f"@{self.revision}" if self.revision else "")


def repository_of(path: Path | str) -> Repository | None:
    """The repository that hf:USER/NAME or hf:USER/NAME@REVISION names, or None for a path on this machine.

    Raises UserError if something else follows hf:.

    >>> repository_of("hf:somebody/tiny@v1"), repository_of("runs/tiny")
    (Repository(name='somebody/tiny', revision='v1'), None)
    """
    text = str(path)
    if not text.startswith(PREFIX):
        return None
    name, at, revision = text.removeprefix(PREFIX).partition("@")
    if not _NAME.fullmatch(name) or (at and not revision):
        raise UserError(f"{text} names no model on Hugging Face; write hf:USER/NAME, or hf:USER/NAME@REVISION.")
    return Repository(name, revision or None)


def download(repository: Repository, files: tuple[str, ...], progress: Progress) -> Path:
    """The folder with these files of a repository, as far as it has them, in the cache of huggingface_hub.

    files : names; the first one must be there
    If the hub cannot be reached, this is what the cache has of the revision. The folder's name is that of the commit.
    Raises UserError if there is no such repository or file, or if the hub cannot be reached and the cache lacks it.
    """
    hub = quiet_hub()
    from huggingface_hub import errors

    name, wanted = repository.name, {"revision": repository.revision, "allow_patterns": list(files)}
    try:  # one request first, because the download has no time limit and retries for long
        info = hub.HfApi().model_info(name, revision=repository.revision, timeout=HUB_TIMEOUT, files_metadata=True)
    except errors.HFValidationError as error:
        raise UserError(f"{repository} names no model on Hugging Face ({reason(error)}); check the spelling.") from None
    except errors.GatedRepoError:
        raise UserError(f"{name} is open to some only; ask for access at {target_of(name)}, and {_LOG_IN}.") from None
    except errors.RevisionNotFoundError:
        raise UserError(
            f"{name} has no revision '{repository.revision}' on Hugging Face; check the spelling."
        ) from None
    except errors.RepositoryNotFoundError:
        raise UserError(
            f"There is no model {name} on Hugging Face that you may read; check the spelling, or, if it is private, "
            f"{_LOG_IN}."
        ) from None
    except Exception as error:  # many kinds: no network, a proxy, a server that is down
        if isinstance(error, errors.HfHubHTTPError) and _status(error) in (401, 403):
            raise UserError(f"You may not read {name} on Hugging Face ({reason(error)}); {_LOG_IN}.") from None
        try:
            kept = Path(hub.snapshot_download(name, local_files_only=True, **wanted))
        except Exception:
            raise UserError(
                f"Hugging Face cannot be reached ({reason(error)}), and {repository} has not been downloaded before; "
                "check the connection, or give a folder on this machine."
            ) from None
        if not isinstance(error, errors.OfflineModeIsEnabled):
            progress.note(f"Hugging Face cannot be reached ({reason(error)}); {repository} is as last downloaded.")
        return kept
    sizes = {entry.rfilename: entry.size or 0 for entry in info.siblings or () if entry.rfilename in files}
    if files[0] not in sizes:
        raise UserError(f"{name} on Hugging Face has no {files[0]}, so it is no model of this program; name another.")
    is_new = not isinstance(hub.try_to_load_from_cache(name, files[0], revision=info.sha), str)
    if is_new:
        progress.note(f"Downloading {repository} ({sum(sizes.values()) / 1e6:,.1f} MB) ...")
    try:
        with _bars(hub, progress if is_new else Progress()):
            return Path(hub.snapshot_download(name, **wanted))
    except Exception as error:  # a connection that breaks, a full disk
        raise UserError(
            f"{repository} could not be downloaded ({reason(error)}); run the same command again."
        ) from None


def target_of(name: str) -> str:
    """The address of a repository on the hub. Raises UserError if the name is not USER/NAME."""
    hub = quiet_hub()
    try:
        if not _NAME.fullmatch(name):
            raise ValueError
        hub.utils.validate_repo_id(name)
    except ValueError:
        raise UserError(f"'{name}' is no name of a repository on Hugging Face; write USER/NAME.") from None
    return f"{hub.HfApi().endpoint}/{name}"


def upload(folder: Path, name: str, files: tuple[str, ...], *, private: bool, message: str, progress: Progress) -> None:
    """Upload files of a folder to the repository USER/NAME, which is created if there is none.

    files : names; README.md, the model card, is one of them
    private : who may read a new repository;  message : of the commit
    Raises UserError if there is no token, if it does not allow this, if the hub refuses the card's metadata, or if it
    cannot be reached.
    """
    hub = quiet_hub()
    from huggingface_hub import errors

    if not hub.get_token():
        raise UserError(f"There is no token to push to Hugging Face with; {_LOG_IN}.")
    api = hub.HfApi()
    try:
        with contextlib.suppress(errors.RepositoryNotFoundError):  # first a request with a time limit, as for downloads
            api.model_info(name, timeout=HUB_TIMEOUT)
        _check_card(hub, folder / "README.md")  # or the repository would be created, and stay empty
        with _bars(hub, progress):
            api.create_repo(name, private=private, exist_ok=True)
            api.upload_folder(repo_id=name, folder_path=folder, allow_patterns=list(files), commit_message=message)
    except errors.HfHubHTTPError as error:
        if _status(error) in (401, 403):
            raise UserError(
                f"Your token does not allow to write to {name} on Hugging Face ({reason(error)}); {_LOG_IN}, with a "
                "token that may write."
            ) from None
        raise UserError(f"{name} could not be pushed to Hugging Face ({reason(error)}); try again.") from None
    except UserError:
        raise
    except errors.OfflineModeIsEnabled:
        raise UserError("The variable HF_HUB_OFFLINE forbids requests; unset it to push.") from None
    except Exception as error:  # many kinds: no network, a proxy, a file that became unreadable
        raise UserError(
            f"{name} could not be pushed to Hugging Face ({reason(error)}); check the connection and run the same "
            "command again."
        ) from None


def _check_card(hub: Any, path: Path) -> None:
    """Ask the hub whether it takes a model card. Raises UserError if it does not."""
    try:
        hub.ModelCard.load(path).validate()
    except ValueError as error:
        why = " ".join(str(error).split())
        raise UserError(f"Hugging Face refuses the metadata in {path} ({why}); correct them.") from None


def _status(error: Any) -> int | None:
    """The HTTP status of an error."""
    return getattr(getattr(error, "response", None), "status_code", None)


@contextlib.contextmanager
def _bars(hub: Any, progress: Progress) -> Iterator[None]:
    """The library's bars for bytes, where the command line shows its own: in a terminal."""
    shown = isinstance(progress, Display) and in_terminal()
    if shown or os.environ.get("HF_HUB_DISABLE_PROGRESS_BARS"):  # the user's own choice holds
        yield
        return
    before = hub.utils.are_progress_bars_disabled()
    hub.utils.disable_progress_bars()
    try:
        yield
    finally:
        if not before:
            hub.utils.enable_progress_bars()
