"""A stream that breaks: opened again where it stopped, every document once and in order; then reported."""

from types import SimpleNamespace

import pytest
from programs import INJECTED

from flashlm_numba.data import documents, sources
from flashlm_numba.data import hub as hub_module
from flashlm_numba.data.prepare import prepare
from flashlm_numba.data.shards import open_tokens
from flashlm_numba.system.errors import UserError

PARTS, ROWS = 3, 20
TEXTS = [f"Part {part}, document {row}: peace and war and peace." for part in range(PARTS) for row in range(ROWS)]


class Stream:
    """Rows as `datasets` streams them from a data set of PARTS files, with breaks that were planned."""

    num_shards = PARTS

    def __init__(self, breaks, parts=range(PARTS)):
        self.breaks, self.parts = breaks, parts

    def shard(self, count, index):
        assert count == PARTS
        return Stream(self.breaks, [index])

    def __iter__(self):
        for part in self.parts:
            for row in range(ROWS + 1):
                if (part, row) in self.breaks:
                    self.breaks.remove((part, row))
                    raise ConnectionResetError(104, "Connection reset by peer")
                if row < ROWS:
                    yield {"text": TEXTS[part * ROWS + row], "id": row}


@pytest.fixture
def hub(monkeypatch):
    """hub.breaks: (part, row) at which the stream breaks, each once; hub.closed: times that it cannot be opened."""
    datasets = documents.quiet_datasets()
    import huggingface_hub

    hub = SimpleNamespace(breaks=[], closed=0, opened=0)

    def load_dataset(name, subset, *, split=None, revision, streaming):
        if split is None:
            return {"train": None}
        hub.opened += 1
        if hub.closed:
            hub.closed -= 1
            raise ConnectionError("Temporary failure in name resolution")
        return Stream(hub.breaks)

    info = SimpleNamespace(sha="f00d", card_data={"license": "odc-by"})
    monkeypatch.setattr(huggingface_hub.HfApi, "dataset_info", lambda self, name, *, timeout: info)
    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    monkeypatch.setattr(hub_module, "RETRY_SECONDS", (0.0, 0.0, 0.0))
    return hub


@pytest.mark.parametrize("first", [0, 1])
@pytest.mark.parametrize(
    "breaks",
    [
        [(0, 0)],
        [(1, 7)],
        [(1, 7), (1, 7), (1, 7)],
        [(1, ROWS)],  # after a part's last row
        [(0, 3), (1, 0), (1, 19), (2, 5), (2, 20)],
    ],
)
def test_every_document_comes_once_and_in_order(hub, breaks, first):
    INJECTED["streams that broke"] += 1
    hub.breaks += [place for place in breaks if place[0] >= first]
    started, said = [], []
    source = sources.resolve("some/dataset")
    found = list(source.documents("all", first, started.append, said.append))
    assert found == TEXTS[first * ROWS :]
    assert started == list(range(first, PARTS))
    assert len(said) == len([place for place in breaks if place[0] >= first])
    assert all("trying again in 0 s" in sentence for sentence in said)
    assert hub.breaks == []


def test_a_stream_that_cannot_be_opened_for_a_while(hub):
    INJECTED["streams that broke"] += 1
    hub.closed = 3
    assert list(sources.resolve("some/dataset").documents("all")) == TEXTS


def test_one_that_stays_broken_is_reported_and_prepare_goes_on_later(hub, tmp_path, capfd):
    INJECTED["streams that broke"] += 1
    hub.breaks += [(1, 5)] * 4
    with pytest.raises(UserError, match=r"failed \(.*reset by peer\): .*run the same command again to continue"):
        prepare("some/dataset", tmp_path / "tokens")
    assert "trying again" in capfd.readouterr().err
    assert hub.opened == 4
    prepare("some/dataset", tmp_path / "tokens", progress=False)
    hub.breaks.clear()
    prepare("some/dataset", tmp_path / "whole", progress=False)
    for name in ("train-00000.bin", "validation-00000.bin", "manifest.json"):
        assert (tmp_path / "tokens" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    assert open_tokens(tmp_path / "tokens").train.n_documents < PARTS * ROWS


@pytest.mark.parametrize(
    ("error", "sentence"), [(FileNotFoundError("no such file"), "no such file"), (KeyError("text"), "text")]
)
def test_what_waiting_does_not_mend_is_told_at_once(hub, monkeypatch, error, sentence):
    INJECTED["streams that broke"] += 1

    def broken(self):
        raise error
        yield

    monkeypatch.setattr(Stream, "__iter__", broken)
    with pytest.raises(UserError, match=sentence):
        list(sources.resolve("some/dataset").documents("all"))
    assert hub.opened == 1


def test_a_column_that_there_is_not_is_told_at_once(hub):
    INJECTED["streams that broke"] += 1
    with pytest.raises(UserError, match="has no column body"):
        list(sources.resolve("some/dataset", column="body").documents("all"))
    assert hub.opened == 1
