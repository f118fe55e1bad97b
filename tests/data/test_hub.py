"""Data sets on Hugging Face, without a network: a stand-in for the hub over local parquet."""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from types import SimpleNamespace

import pytest
from click.testing import CliRunner
from texts import TEXTS, write

from flashlm_numba.cli.main import main
from flashlm_numba.data import bpe, documents, prepare, splits
from flashlm_numba.data import hub as hub_module
from flashlm_numba.data.shards import open_tokens
from flashlm_numba.data.sources import resolve
from flashlm_numba.system.errors import UserError


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """A stand-in for the hub: FineWeb-Edu's name and columns, over local parquet and the real `datasets`."""
    datasets = documents.quiet_datasets()
    import huggingface_hub

    hub = SimpleNamespace(splits={"train": TEXTS}, error=None, calls=[])
    load = datasets.load_dataset

    def dataset_info(self, name, *, timeout):
        if hub.error is not None:
            raise hub.error
        assert timeout <= 20
        return SimpleNamespace(sha="f00d", card_data={"license": "odc-by"})

    def load_dataset(name, subset, *, split=None, revision, streaming):
        hub.calls.append((name, subset, split, revision, streaming))
        files = {s: write(tmp_path / f"{s}.parquet", texts) for s, texts in hub.splits.items()}
        return load("parquet", data_files=files, split=split, streaming=streaming, cache_dir=str(tmp_path))

    monkeypatch.setattr(huggingface_hub.HfApi, "dataset_info", dataset_info)
    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    return hub


def test_hub_dataset_streams_at_a_fixed_revision(hub):
    source = resolve("HuggingFaceFW/fineweb-edu", subset="sample-10BT")
    assert source.roles == ("all",)
    assert list(source.documents("all")) == TEXTS
    assert source.licence == "odc-by"
    assert source.fingerprint()["revision"] == "f00d"
    assert hub.calls == [
        ("HuggingFaceFW/fineweb-edu", "sample-10BT", None, "f00d", True),
        ("HuggingFaceFW/fineweb-edu", "sample-10BT", "train", "f00d", True),
    ]
    with pytest.raises(UserError, match="has no column body"):
        list(resolve("HuggingFaceFW/fineweb-edu", column="body").documents("all"))


def test_the_readmes_hub_command_prepares_what_it_asks_for(hub, tmp_path):
    readme = (Path(__file__).parents[2] / "README.md").read_text(encoding="utf-8")
    (line,) = re.findall(r"^flashlm-numba (prepare HuggingFaceFW.*)$", readme, re.M)
    hub.splits = {"train": [f"{text} Number {n}." for n in range(40) for text in TEXTS]}
    words = shlex.split(line)
    words[words.index("--out") + 1] = str(tmp_path / "fineweb")
    done = CliRunner().invoke(main, words)
    assert done.exit_code == 0, done.output
    assert re.search(r"^train +\d+ documents", done.stdout, re.M)
    assert open_tokens(tmp_path / "fineweb").train.n_documents > 100


def test_hub_rows_without_the_column_are_treated_as_those_of_local_files(hub, monkeypatch):
    def rows(first):
        return [{"id": n} if n in first else {"id": n, "text": str(n)} for n in range(5)]

    def parts(self, role):
        yield from enumerate(files)

    monkeypatch.setattr(hub_module.HubDataset, "_parts", parts)
    files, notes = [rows({0}), rows({2, 3})], []
    source = resolve("some/dataset")
    assert list(source.documents("all", note=notes.append)) == ["", "1", "2", "3", "4", "0", "1", "", "", "4"]
    assert notes == [
        f"some/dataset, file {n}: {rows} of 5 rows lack the column text (the first of them has id)."
        for n, rows in ((1, 1), (2, 2))
    ]
    list(source.documents("all", note=notes.append))  # read again, as for a split
    assert len(notes) == 2
    files = [rows(()), rows(range(5))]
    with pytest.raises(UserError, match=r"some/dataset, file 2 has no column text: .*it has id\).* --skip-missing"):
        list(resolve("some/dataset").documents("all"))
    found = list(resolve("some/dataset", skip_missing=True).documents("all", note=notes.append))
    assert found == ["0", "1", "2", "3", "4", *[""] * 5]
    assert notes[-1] == "some/dataset, file 2 has no column text and is left out (it has id)."
    read = []
    files = [({"id": read.append(n)} for n in range(10**6))]
    with pytest.raises(UserError, match="has no column text"):
        list(resolve("some/dataset").documents("all"))
    assert len(read) <= 2 * hub_module.SEEN


def test_hub_dataset_keeps_its_splits(hub):
    hub.splits = {"train": ["a"], "validation": ["b"], "test": ["c"]}
    source = resolve("some/dataset")
    assert {role: list(source.documents(role)) for role in source.roles} == {
        "train": ["a"],
        "validation": ["b"],
        "test": ["c"],
    }


def test_hub_offline_or_unknown_is_one_sentence(hub, monkeypatch):
    hub.error = ConnectionError("[Errno -2] Name or service not known")
    with pytest.raises(UserError, match=r"not a local file or folder, and Hugging Face cannot be reached .*local"):
        resolve("HuggingFaceFW/fineweb-edu")
    from huggingface_hub.errors import RepositoryNotFoundError

    hub.error = RepositoryNotFoundError.__new__(RepositoryNotFoundError)
    with pytest.raises(UserError, match="nor a public dataset on Hugging Face: check the spelling"):
        resolve("HuggingFaceFW/finewebedu")
    hub.error = None
    source = resolve("HuggingFaceFW/fineweb-edu")

    def broken(*args, **kwargs):
        raise ConnectionError("reset by peer")

    monkeypatch.setattr(documents.quiet_datasets(), "load_dataset", broken)
    monkeypatch.setattr(hub_module, "RETRY_SECONDS", (0.0,))
    with pytest.raises(UserError, match=r"failed \(reset by peer\): .* run the same command again to continue"):
        list(source.documents("all"))
    with pytest.raises(UserError, match=r"Cannot open .* choose a --subset"):
        resolve("HuggingFaceFW/fineweb-edu")


def test_a_vocabulary_is_trained_on_the_beginnings_of_files(hub, tmp_path, monkeypatch):
    texts = {part: [f"part {part} number {n} " + "word " * 50 for n in range(30)] for part in range(4)}
    for part, own in texts.items():
        write(tmp_path / "files" / f"{part}.parquet", own)
    files = sorted(str(path) for path in (tmp_path / "files").iterdir())
    datasets = documents.quiet_datasets()
    load = datasets.load.load_dataset

    def load_dataset(name, subset, **options):
        return load("parquet", data_files={"train": files}, split=options.get("split"), streaming=True)

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    source = resolve("some/dataset")
    assert (source.roles, source.parts("all")) == (("all",), 4)
    monkeypatch.setattr(splits, "SMALL", 10)
    seen, add = [], bpe.Sample.add
    monkeypatch.setattr(bpe.Sample, "add", lambda self, text: (seen.append(text), add(self, text))[1])
    monkeypatch.setattr(prepare, "READ_BYTES", 4 * 1_000)
    prepare.prepare("some/dataset", tmp_path / "out", progress=False, vocab=264)
    assert {text.split()[1] for text in seen} == {"0", "1", "2", "3"}
    assert len(seen) < 4 * 6
    tokens = open_tokens(tmp_path / "out")
    assert tokens.train.n_documents + tokens.validation.n_documents == 120
    held_out = {tokens.vocabulary.decode(ids) for ids in tokens.validation.documents()}
    assert held_out
    assert not held_out & set(seen)

    def broken(*args, **kwargs):
        raise ConnectionError("reset by peer")

    monkeypatch.setattr(datasets, "load_dataset", broken)
    with pytest.raises(UserError, match=r"Cannot open some/dataset on Hugging Face \(reset by peer\)"):
        source.parts("all")
