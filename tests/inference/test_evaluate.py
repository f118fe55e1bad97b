"""The rule of eval: every token once, contexts of one document, no influence of windows and batches."""

import dataclasses
import math
import shutil

import numba
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from flashlm_numba.data.prepare import prepare
from flashlm_numba.data.vocabularies import vocabulary_named
from flashlm_numba.heads import DenseHead
from flashlm_numba.inference import evaluate
from flashlm_numba.inference.evaluate import (
    Window,
    _source_documents,
    evaluate_run,
    is_causal,
    padded_length,
    score,
    validation_subset,
    windows,
)
from flashlm_numba.kernels._division import ROWS, Stage
from flashlm_numba.kernels.ngram_copy import ngram_copies
from flashlm_numba.model import trunks
from flashlm_numba.model.build import load_model
from flashlm_numba.model.config import ModelConfig
from flashlm_numba.model.model import Model
from flashlm_numba.model.parameters import initial_parameters
from flashlm_numba.system.errors import UserError
from flashlm_numba.training.plan import Length
from flashlm_numba.training.run import start_run

EOT = 0
CONFIG = ModelConfig(vocab_size=61, dim=32, ffn_dim=40, groups=4, kernel_size=3, dilations=(1, 2), n_passes=2)


@pytest.fixture(
    scope="module",
    params=[{}, {"leaky_decay": 0.3}, {"ngram_copy_orders": (1, 2, 1), "ngram_copy_reach": 9}],
    ids=["plain", "leaky average", "ngram copy"],
)
def model(request):
    """A model with large embeddings, so that a wrong context shows in every score."""
    config = dataclasses.replace(CONFIG, **request.param)
    parameters = initial_parameters(config, seed=1, embedding_std=1.0)
    for name, value in parameters.items():
        if name.startswith(("blocks.0.mixer.leaky.", "ngram_copy.")):
            value[:] = np.random.default_rng(2).standard_normal(config.dim)
    return Model(config, parameters, DenseHead)


@pytest.fixture(scope="module")
def documents():
    rng = np.random.default_rng(0)
    return [rng.integers(1, CONFIG.vocab_size, size).astype(np.int32) for size in (1, 40, 3, 107, 13, 0, 64)]


@given(st.integers(0, 80), st.integers(1, 9), st.integers(0, 30))
def test_windows_score_every_token_once_with_its_whole_field(length, field, extra):
    document = np.arange(1, length + 1, dtype=np.int32)
    scored = []
    for window in windows(document, field, field + extra, eot=-1):
        assert len(window.ids) == len(window.targets) <= field + extra
        for i in range(window.skip, len(window.ids)):
            target = int(window.targets[i])
            scored.append(target)
            # the ids before the target, its field's worth of them, or up to the document's start and its EOT
            want = [t if t > 0 else -1 for t in range(max(0, target - field), target)]
            assert window.ids[max(0, i - field + 1) : i + 1].tolist() == want
    assert scored == document.tolist()


def _one_by_one(model, documents):
    """The rule taken literally: one forward pass per token, over its own context only."""
    model.sync_weights()
    total = 0.0
    for document in documents:
        context = [EOT]
        for token in document.tolist():
            ids = np.array([context[-model.config.receptive_field :]], np.int32)
            h = model.forward(ids)[-1:].copy()
            total -= float(model.head.log_prob(h, np.array([token], np.int32))[0])
            context.append(token)
    return total


def test_score_follows_the_rule(model, documents):
    found = score(model, documents, eot=EOT)
    assert found.tokens == sum(map(len, documents))
    assert found.nll == pytest.approx(_one_by_one(model, documents), abs=1e-5 * found.tokens)
    assert found.smoothed_loss is None


@pytest.mark.parametrize(("window", "batch"), [(26, 26), (27, 100), (50, 1), (64, 4096), (2048, 300)])
def test_score_depends_on_neither_window_nor_batch(model, documents, window, batch):
    want = score(model, documents, eot=EOT).mean_nll
    found = score(model, documents, eot=EOT, window=window, batch=batch).mean_nll
    assert found == pytest.approx(want, abs=1e-5)


def test_smoothed_loss_is_over_the_whole_vocabulary(model, documents):
    found = score(model, documents, eot=EOT, smoothed=True)
    loss = 0.0
    for document in documents:
        if not len(document):
            continue
        h = model.forward(np.concatenate([[EOT], document[:-1]]).astype(np.int32)[None]).copy()
        logits = h.astype(np.float64) @ model.parameters["embedding.weight"].T.astype(np.float64)
        log_p = logits - np.logaddexp.reduce(logits, axis=1)[:, None]
        target = np.full(log_p.shape, 0.1 / CONFIG.vocab_size)
        target[np.arange(len(document)), document] += 0.9
        loss -= float((target * log_p).sum())
    assert found.smoothed_loss == pytest.approx(loss / found.tokens, abs=1e-5)
    assert found.perplexity == pytest.approx(math.exp(found.nll / found.tokens))
    assert found.bits_per_byte(1000) == pytest.approx(found.nll / math.log(2) / 1000)


def test_long_documents_keep_all_threads_busy_and_use_buffers_again(monkeypatch, threads):
    """20 documents of about 3,000 tokens: each batch is divided among the threads, and few shapes occur."""
    threads(numba.config.NUMBA_NUM_THREADS)
    rng, made = np.random.default_rng(0), []
    texts = [rng.integers(0, CONFIG.vocab_size, 2_970 + 5 * i).astype(np.int32) for i in range(20)]
    net = Model(CONFIG, initial_parameters(CONFIG, 0), DenseHead)

    class Watched(trunks.TrunkBuffers):
        def __init__(self, *args):
            super().__init__(*args)
            made.append(self.division)

    monkeypatch.setattr(trunks, "TrunkBuffers", Watched)
    score(net, texts, eot=EOT, window=4_096)
    assert 1 <= len(made) <= 2
    for division in made:
        rows = [
            sum(part.high - part.low for part in division.parts(Stage(ROWS), thread))
            for thread in range(division.threads)
        ]
        assert max(rows) <= 1.01 * np.mean(rows)


def test_many_threads_get_several_windows_at_a_time(monkeypatch):
    monkeypatch.setattr(numba, "get_num_threads", lambda: 40)
    groups = []
    monkeypatch.setattr(evaluate, "_batches", lambda *rest: groups.append(rest) or iter(()))
    score(Model(CONFIG, initial_parameters(CONFIG, 0), DenseHead), [], eot=EOT)
    assert groups[0][2] == 3  # 16 threads per window
    long = [Window(np.zeros(n, np.int32), np.zeros(n, np.int32), 0) for n in (5_000, 5_000, 4_900, 4_000, 40)]
    monkeypatch.undo()
    assert [len(group) for group in evaluate._batches(iter(long), 4_096, 3, 6_178)] == [3, 2]


@pytest.mark.parametrize("window", [1, 700, 6_178])
def test_padding_adds_little(window):
    lengths = [padded_length(n, window) for n in range(1, window + 1)]
    assert all(n <= padded <= min(window, max(n + 15, n * 17 / 16)) for n, padded in enumerate(lengths, 1))
    assert len(set(lengths)) <= 16 + 16 * window.bit_length()


def test_progress_counts_the_tokens(model, documents):
    counts = []
    score(model, documents, eot=EOT, window=30, batch=60, progress=counts.append)
    assert sum(counts) == sum(map(len, documents))
    assert len(counts) > 1


class _Split:
    def __init__(self, sizes):
        self.sizes = sizes

    def documents(self, max_tokens=None):
        return (np.full(size, i, np.int32) for i, size in enumerate(self.sizes))


def last_token_leaks(h, ids, embedding):
    h[0] += np.float32(1e-7) * ids[0, -1]


def look_up_reads_one_token_ahead(h, ids, embedding):
    ahead = ngram_copies(ids, order=1, reach=1024)[0, 1:]
    h[:-1] += np.where(ahead >= 0, np.float32(1e-3), 0)[:, None] * embedding[ahead]


@pytest.mark.parametrize("leak", [last_token_leaks, look_up_reads_one_token_ahead])
def test_a_model_that_sees_the_future_is_not_scored(run, monkeypatch, leak):
    assert is_causal(load_model(run).model)
    right = Model.forward

    def leaky(self, ids):
        h = right(self, ids)
        leak(h, ids, self.parameters["embedding.weight"])
        return h

    monkeypatch.setattr(Model, "forward", leaky)
    assert not is_causal(load_model(run).model)
    with pytest.raises(UserError, match="a later token changes the prediction of an earlier one"):
        evaluate_run(run)


@pytest.mark.parametrize("sizes", [[500] * 9, [10] * 3, [5, 900, 5], [0, 7]])
def test_validation_subset_is_fixed_and_fills_its_size(sizes):
    first, second = (validation_subset(_Split(sizes), 200) for _ in range(2))
    assert [part.tolist() for part in first] == [part.tolist() for part in second]
    assert sum(map(len, first)) == min(200, sum(sizes))
    assert all(len(part) for part in first)
    if len(sizes) == 9:
        assert len(first) == 8  # an eighth each


def test_a_folder_is_scored_whole_unless_it_has_validation_files(tmp_path):
    for number, name in enumerate(("train", "test", "validation"), 1):
        (tmp_path / f"{name}.txt").write_text(f"Of {name} there is this.\n")
        sizes = {"documents": 0, "bytes": 0}
        documents = list(_source_documents(str(tmp_path), sizes, vocabulary_named("gpt2"), lambda line: None))
        assert len(documents) == sizes["documents"] == (1 if name == "validation" else number)


def test_a_run_is_not_scored_on_data_that_took_the_place_of_its_own(tiny_run, corpus, tmp_path):
    data, run = tmp_path / "data", tmp_path / "run"
    shutil.copytree(corpus, data)
    start_run(tiny_run, Length(steps=1), data=str(data), out=run, threads=1)
    assert evaluate_run(run)["documents"] == 5
    shutil.rmtree(data)
    (tmp_path / "other.txt").write_text("one two three four five\n" * 40)
    prepare(str(tmp_path / "other.txt"), data, progress=False)
    with pytest.raises(UserError, match=r"are not the ones that .* was trained on"):
        evaluate_run(run)
    assert evaluate_run(run, str(data))["documents"] == 1  # asked for by name
