"""Stream the documents of a Hugging Face dataset with the library `datasets`, at a fixed revision."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

from flashlm_numba.data.documents import (
    ALL,
    ROLES,
    Missing,
    NotText,
    Source,
    pick,
    quiet_datasets,
    reason,
    role_of,
    without_surrogates,
)
from flashlm_numba.system.errors import UserError
from flashlm_numba.system.hub import HUB_TIMEOUT, quiet_hub

SEEN = 1000  # rows: a file of which none of the first has the column is taken for one without it
RETRY_SECONDS = (1.0, 4.0, 16.0, 60.0)  # waits before reopening a broken stream, in addition to those of `datasets`


@dataclass(frozen=True)
class HubDataset(Source):
    """A dataset on Hugging Face; see Source."""

    name: str
    splits: dict[str, tuple[str, ...]]  # role -> names of the dataset's splits
    revision: str | None = None  # commit
    subset: str | None = None
    column: str = "text"
    licence: str | None = None
    skip_missing: bool = False  # whether files without the column are left out, not refused
    kind = "hub"
    _noted: set[str] = field(default_factory=set, compare=False, repr=False)  # a file may be read several times

    @property
    def roles(self) -> tuple[str, ...]:
        """Roles that have documents."""
        return tuple(self.splits)

    def fingerprint(self) -> dict[str, Any]:
        """Name, revision and reading options; see Source.fingerprint."""
        splits = {role: list(splits) for role, splits in self.splits.items()}
        read = {"column": self.column, "lines": False}
        return super().fingerprint() | read | {"subset": self.subset, "revision": self.revision, "splits": splits}

    def parts(self, role: str) -> int:
        """Number of files of a role; see Source.documents."""
        try:
            return sum(1 for _ in self._parts(role))
        except Exception as error:  # a broken connection raises many kinds of errors
            raise UserError(
                f"Cannot open {self.name} on Hugging Face ({reason(error)}): check the connection and run the same "
                "command again."
            ) from error

    def documents(
        self,
        role: str,
        first_part: int = 0,
        started: Callable[[int], None] = lambda part: None,
        note: Callable[[str], None] = lambda sentence: None,
    ) -> Iterator[str]:
        """Stream the texts of a role, and reopen a broken stream where it stopped; see Source.documents."""
        begun, read, failures = -1, 0, 0  # last part begun, documents of it already passed on, failures in a row
        while True:
            try:
                for part, stream in self._parts(role):
                    if part < max(first_part, begun):
                        continue
                    if part > begun:
                        started(part)
                        begun, read = part, 0
                    for text in itertools.islice(self._texts(stream, part, note), read, None):
                        read += 1
                        failures = 0
                        yield text
                return
            except (UserError, ImportError):
                raise
            except Exception as error:  # a broken connection raises many kinds of errors
                lasting = isinstance(error, FileNotFoundError | LookupError)
                if failures == len(RETRY_SECONDS) or lasting:
                    raise UserError(
                        f"Reading {self.name} from Hugging Face failed ({reason(error)}): "
                        "check the connection and run the same command again to continue."
                    ) from error
                seconds = RETRY_SECONDS[failures]
                failures += 1
                note(f"Reading {self.name} failed ({reason(error)}); trying again in {seconds:g} s.")
                time.sleep(seconds)

    def _texts(self, rows: Iterable[dict[str, Any]], part: int, note: Callable[[str], None]) -> Iterator[str]:
        """The texts of a file's rows. Rows without the column count as empty, as those of local files."""

        def note_once(sentence: str) -> None:
            if sentence not in self._noted:
                self._noted.add(sentence)
                note(sentence)

        def report() -> None:
            missing.report(name, self.column, number, skip_missing=self.skip_missing, note=note_once)

        name, missing, number = f"{self.name}, file {part + 1}", Missing(), 0
        for number, row in enumerate(rows, 1):
            try:
                yield without_surrogates(pick(row, self.column, missing.add))
            except NotText as error:
                raise UserError(
                    f"In column {self.column} of {self.name}, {error}, not text: choose another --column."
                ) from None
            if number == missing.rows == SEEN and not self.skip_missing:
                report()  # refuses the file, which may be large, without downloading the rest
        report()

    def _parts(self, role: str) -> Iterator[tuple[int, Any]]:
        """Number and rows of every file of a role."""
        datasets = quiet_datasets()
        part = 0
        for split in self.splits[role]:
            stream = datasets.load_dataset(self.name, self.subset, split=split, revision=self.revision, streaming=True)
            files = getattr(stream, "num_shards", 1)  # not in the oldest versions of `datasets`
            for index in range(files):
                yield part, stream.shard(files, index) if files > 1 else stream
                part += 1


def resolve_dataset(name: str, subset: str | None, column: str, *, skip_missing: bool = False) -> HubDataset:
    """Find a dataset on Hugging Face at its current revision, without reading its documents.

    Raises UserError if the dataset or the subset does not exist, or if the hub cannot be reached.
    """
    datasets = quiet_datasets()
    from huggingface_hub.errors import HFValidationError, RepositoryNotFoundError

    # One request first, because `datasets` retries a failing request for half a minute.
    try:
        info = quiet_hub().HfApi().dataset_info(name, timeout=HUB_TIMEOUT)
    except (RepositoryNotFoundError, HFValidationError) as error:
        raise UserError(
            f"{name} is neither a local file or folder nor a public dataset on Hugging Face: check the spelling "
            "(for a private dataset, log in with `hf auth login`)."
        ) from error
    except Exception as error:
        raise UserError(
            f"{name} is not a local file or folder, and Hugging Face cannot be reached ({reason(error)}): "
            "check the spelling and the connection, or use local files or the built-in text."
        ) from error
    card = getattr(info, "card_data", None)
    licence = card.get("license") if card is not None else None
    try:
        splits = list(datasets.load_dataset(name, subset, revision=info.sha, streaming=True))
    except Exception as error:
        hint = "choose another --subset" if subset else "choose a --subset"
        raise UserError(f"Cannot open {name} on Hugging Face ({reason(error)}): {hint} or dataset.") from error
    groups = {role: tuple(s for s in splits if (role_of(s) or "train") == role) for role in ROLES}
    groups = {role: group for role, group in groups.items() if group}
    if list(groups) == ["train"]:  # a dataset without a validation split, such as FineWeb-Edu
        groups = {ALL: groups["train"]}
    return HubDataset(
        name,
        splits=groups,
        revision=info.sha,
        subset=subset,
        column=column,
        skip_missing=skip_missing,
        licence=", ".join(licence) if isinstance(licence, list) else licence,
    )
