"""Vocabularies that are not GPT-2's, from documents to a generated text: nothing else knows which tokens there are."""

from __future__ import annotations

import json
import math
import shutil

import numpy as np
import pytest
from helpers import TINY, command

from flashlm_numba import api
from flashlm_numba.data import gpt2, tokenizer_file
from flashlm_numba.data.builtin import open_run_tokens
from flashlm_numba.data.byte_level import BYTE_NAMES, ByteLevelVocabulary, json_text, name_of, pre_tokenizer
from flashlm_numba.data.prepare import prepare
from flashlm_numba.data.shards import open_tokens
from flashlm_numba.inference.evaluate import evaluate_run
from flashlm_numba.model import embedding_init, packed
from flashlm_numba.model.build import load_model, read_config
from flashlm_numba.system.errors import UserError

SETTINGS = [part for setting in (*TINY, "validate_every=1") for part in ("--set", setting)]


def tokenizer_json(first, size):
    """A tokenizer.json of `size` tokens, with the bytes, some pairs of letters and an end of text from `first` on."""
    pairs = [(chr(a), chr(b)) for a in b"etaohi" for b in b"hrstn"] + [("pe", "a"), ("a", "ce"), ("p", "e"), ("c", "e")]
    pairs = [(name_of(left.encode()), name_of(right.encode())) for left, right in pairs]
    merges = [*pairs[-2:], *pairs[:-2]]
    used = [*BYTE_NAMES[:77], "<|endoftext|>", *BYTE_NAMES[77:], *dict.fromkeys(map("".join, merges))]
    names = [f"<unused {i}>" for i in range(size)]
    names[first : first + len(used)] = used
    return json_text(names, merges, pre_tokenizer(use_regex=True))


LETTERS, WIDE = (ByteLevelVocabulary(tokenizer_json(*shape)) for shape in ((0, 300), (69_600, 70_000)))


@pytest.fixture(scope="module", autouse=True)
def without_gpt2(corpus):
    """GPT-2's files cannot be read any more (`corpus` needed them)."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gpt2, "_encoding", lambda: pytest.fail("GPT-2's vocabulary was used"))
        yield


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """The two vocabularies as files, by name."""
    folder = tmp_path_factory.mktemp("files")
    for name, vocabulary in (("letters", LETTERS), ("wide", WIDE)):
        (folder / f"{name}.json").write_text(vocabulary.to_json(), encoding="utf-8")
    return {"letters": folder / "letters.json", "wide": folder / "wide.json"}


@pytest.fixture(scope="module")
def letters(corpus_files, files, tmp_path_factory):
    """The corpus of the other tests in letters."""
    out = tmp_path_factory.mktemp("letters") / "tokens"
    prepare(str(corpus_files), out, progress=False, vocab=files["letters"], shard_tokens=1_000)
    return out


@pytest.fixture(scope="module")
def trained(letters, tmp_path_factory):
    folder = tmp_path_factory.mktemp("letters") / "run"
    done = command("train", letters, "--out", folder, "--steps", 2, "--threads", 1, *SETTINGS)
    assert done.exit_code == 0, done.output
    return folder


def texts_in(folder):
    return [json.loads(line)["text"] for line in (folder / "train.jsonl").read_text().splitlines()]


@pytest.mark.parametrize(("name", "dtype", "shard_tokens"), [("letters", "<u2", 1_000), ("wide", "<u4", 999)])
def test_documents_come_back_from_shards_of_any_vocabulary(corpus_files, files, tmp_path, name, dtype, shard_tokens):
    vocabulary = {"letters": LETTERS, "wide": WIDE}[name]
    manifest = prepare(str(corpus_files), tmp_path, progress=False, vocab=files[name], shard_tokens=shard_tokens)
    assert (manifest.tokenizer, manifest.tokenizer_hash) == (vocabulary.name, vocabulary.hash)
    assert manifest.vocab_size == vocabulary.size
    assert (tmp_path / "tokenizer.json").read_text(encoding="utf-8") == vocabulary.to_json()
    texts = texts_in(corpus_files)
    expected = [i for text in texts for i in [*vocabulary.encode(text), vocabulary.eot]]
    shards = sorted(tmp_path.glob("train-*.bin"))
    assert len(shards) > 2
    np.testing.assert_array_equal(np.concatenate([np.fromfile(file, dtype) for file in shards]), expected)
    data = open_tokens(tmp_path)
    data.verify()
    assert [vocabulary.decode(ids) for ids in data.train.documents()] == texts
    np.testing.assert_array_equal(data.train.windows(np.array([1_990]), 20)[0], expected[1_990:2_010])
    np.testing.assert_array_equal(data.train.counts(vocabulary.size), np.bincount(expected, minlength=vocabulary.size))


def test_an_id_of_4_bytes_outside_the_vocabulary_is_damage(corpus_files, files, tmp_path):
    prepare(str(corpus_files), tmp_path, progress=False, vocab=files["wide"])
    for bad in (70_000, 1 << 31, (1 << 32) - 1):
        with (tmp_path / "train-00000.bin").open("r+b") as file:
            file.write(bad.to_bytes(4, "little"))
        with pytest.raises(UserError, match=rf"are damaged \(id {bad}, vocabulary 70000"):
            open_tokens(tmp_path).train.windows(np.array([0]), 4)


@pytest.mark.parametrize("vocab", ["wide", 300])
def test_a_stopped_prepare_goes_on_to_the_same_bytes(corpus_files, files, tmp_path, monkeypatch, vocab):
    from flashlm_numba.data import bpe
    from flashlm_numba.data import prepare as preparing
    from flashlm_numba.data.writer import ShardWriter

    def make(out):
        prepare(str(corpus_files), out, progress=False, vocab=files.get(vocab, vocab), shard_tokens=900)

    make(tmp_path / "whole")
    append, calls = ShardWriter.append, 0

    def failing(self, ids):
        nonlocal calls
        calls += 1
        if calls > 25:
            append(self, ids[: len(ids) // 2])
            raise KeyboardInterrupt
        append(self, ids)

    monkeypatch.setattr(preparing, "JOURNAL_SECONDS", 0.0)
    with monkeypatch.context() as patch:
        patch.setattr(ShardWriter, "append", failing)
        with pytest.raises(UserError, match="Stopped"):
            make(tmp_path / "out")
    # the vocabulary is trained once
    monkeypatch.setattr(bpe, "train", lambda *arguments: pytest.fail("trained again"))
    make(tmp_path / "out")
    names = {file.name for file in (tmp_path / "whole").iterdir()}
    assert names >= {"tokenizer.json", "manifest.json", "train-00000.bin"}
    for name in names - {"prepare.lock"}:
        assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes(), name


def test_a_lost_vocabulary_of_an_unfinished_corpus_starts_it_over(corpus_files, tmp_path, monkeypatch, capsys):
    from flashlm_numba.data.writer import ShardWriter

    def stop(self, ids):
        raise KeyboardInterrupt

    prepare(str(corpus_files), tmp_path / "whole", progress=False, vocab=300)
    with monkeypatch.context() as patch:
        patch.setattr(ShardWriter, "append", stop)
        with pytest.raises(UserError, match="Stopped"):
            prepare(str(corpus_files), tmp_path / "out", progress=False, vocab=300)
    (tmp_path / "out" / "tokenizer.json").unlink()
    prepare(str(corpus_files), tmp_path / "out", vocab=300)
    assert "is damaged (There is no" in capsys.readouterr().err
    assert open_tokens(tmp_path / "out").hash == open_tokens(tmp_path / "whole").hash


def test_a_run_takes_its_size_from_the_data_and_is_scored_and_continued(letters, trained, corpus_files):
    run = read_config(trained)
    assert run.model.vocab_size == 300
    assert run.head.name == "dense"
    assert load_model(trained).vocabulary.to_json() == LETTERS.to_json()
    assert (trained / "tokenizer.json").read_text(encoding="utf-8") == LETTERS.to_json()
    lines = [json.loads(line) for line in (trained / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2]
    for line in lines:
        assert 1 < line["val_nll"] < math.log(301)
    assert "=== step 2 ===" in (trained / "samples.txt").read_text()
    own = evaluate_run(trained)
    assert own["documents"] == 5
    assert own["vocabulary"] == LETTERS.name
    assert own["tokens"] == open_run_tokens(run.data, trained, run.data_hash).validation.n_text_tokens
    source = evaluate_run(trained, str(corpus_files / "validation.jsonl"))
    assert source["nll"] == pytest.approx(own["nll"], rel=1e-6)
    assert (source["bytes"], source["tokens"]) == (own["bytes"], own["tokens"])


def test_a_run_continues_a_prompt_and_so_does_an_exported_model(trained, tmp_path):
    options = ("--prompt", "The people", "--seed", 3, "--max-tokens", 30, "--threads", 1)
    texts = [command("generate", trained, *options).stdout]
    command("export", trained, tmp_path / "model.safetensors")
    assert packed.read(tmp_path / "model.safetensors")[3] == LETTERS.to_json()
    texts.append(command("generate", tmp_path / "model.safetensors", *options).stdout)
    assert texts[0].startswith("The people")
    assert len(texts[0]) > len("The people\n") + 5
    assert texts[1] == texts[0]
    scores = [command("eval", model, "--json") for model in (trained, tmp_path / "model.safetensors")]
    assert "does not say where its text is" in scores[1].stderr
    assert api.load(tmp_path / "model.safetensors").score("The people").nll > 0


def test_the_start_of_the_embedding_counts_across_no_end_of_this_text(letters, tmp_path):
    assert embedding_init.main([str(letters), str(tmp_path / "rows.npz"), "--dim", "8", "--threads", "1"]) == 0
    split = open_tokens(letters).train
    with np.load(tmp_path / "rows.npz") as found:
        rows = found["rows"]
    assert rows.shape == (300, 8)
    np.testing.assert_array_equal(rows, embedding_init.from_corpus(split, 300, 8, eot=77, threads=1))
    assert not np.array_equal(rows, embedding_init.from_corpus(split, 300, 8, eot=76, threads=1))


def test_what_does_not_fit_together_is_one_sentence(letters, corpus, files, trained, tmp_path):
    with pytest.raises(UserError, match=r"use the vocabulary gpt2, but .* was trained with bpe-300-.*; name the orig"):
        evaluate_run(trained, str(corpus))
    done = command("train", letters, "--out", tmp_path / "run", "--steps", 1, "--set", "vocab_size=1000")
    assert done.exit_code == 1
    assert "have a vocabulary of 300, but model.vocab_size is 1,000; leave out that setting" in done.stderr
    source = json.loads((letters / "manifest.json").read_text())["source"]["name"]
    for other in (files["wide"], 300, "bytes"):
        with pytest.raises(UserError, match="holds a corpus from another source"):
            prepare(source, letters, vocab=other)
    done = command("train", letters, "--out", tmp_path / "run", "--embeddings", "hf:openai-community/gpt2")
    assert done.exit_code == 1
    assert "--embeddings takes the rows of GPT-2's tokens, but the tokens in" in done.stderr
    assert not (tmp_path / "run").exists()


def other_vocabulary(folder):
    (folder / "tokenizer.json").write_text(tokenizer_json(1, 301), encoding="utf-8")


def no_vocabulary(folder):
    (folder / "tokenizer.json").unlink()


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (other_vocabulary, "is not the one that its tokens and its model were made with"),
        (no_vocabulary, "There is no "),
    ],
)
def test_a_changed_vocabulary_is_refused_where_tokens_and_model_meet(letters, trained, tmp_path, change, sentence):
    tokens, run = tmp_path / "tokens", tmp_path / "run"
    shutil.copytree(letters, tokens)
    shutil.copytree(trained, run)
    change(tokens)
    change(run)
    for arguments in (
        ("train", tokens, "--out", tmp_path / "new"),
        ("eval", run),
        ("eval", trained, tokens),
        ("generate", run),
        ("export", run, tmp_path / "out"),
        ("info", run),
        ("train", "--resume", trained, "--data", tokens, "--steps", 3),
    ):
        done = command(*arguments)
        assert done.exit_code == 1, arguments
        assert sentence in done.stderr
        assert len(done.stderr.splitlines()) == 1, done.stderr
    assert not (tmp_path / "new").exists()
    assert not (tmp_path / "out").exists()


def test_a_run_of_another_vocabulary_does_not_go_on_with_these_tokens(letters, trained, tmp_path):
    copy = tmp_path / "run"
    shutil.copytree(trained, copy)
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps(config | {"tokenizer_hash": WIDE.hash}))
    done = command("train", "--resume", copy, "--data", letters, "--steps", 3)
    assert done.exit_code == 1
    assert f"use the vocabulary {LETTERS.name}, and the run has another one" in done.stderr
    (copy / "tokenizer.json").write_text(WIDE.to_json(), encoding="utf-8")
    with pytest.raises(UserError, match="has 70,000 tokens, but its model 300"):
        load_model(copy)


@pytest.mark.parametrize("head", ["dense", "tree", "sampled"])
@pytest.mark.parametrize("vocab", ["bytes", 257, 300])
def test_every_head_trains_and_writes_with_a_small_vocabulary(corpus_files, tmp_path, vocab, head):
    api.prepare(corpus_files, tmp_path / "tokens", vocab=vocab)
    settings = dict(setting.split("=") for setting in TINY if not setting.startswith("embedding"))
    run = api.train(tmp_path / "tokens", head=head, settings=settings, steps=3, out=tmp_path / "run", threads=1)
    losses = [line["loss"] for line in run.metrics]
    assert all(0 < loss < 2 * math.log(301) for loss in losses)
    model = run.load()
    assert model.head.name == ("dense" if head == "sampled" else head)
    p = model.head.distribution(np.zeros((1, 16), np.float32))
    assert p.shape == (1, model.vocabulary.size)
    assert p.sum() == pytest.approx(1, abs=1e-5)
    assert isinstance(model.generate("The \u3000", max_tokens=8, seed=1, top_k=300, top_p=0.9), str)


@pytest.mark.parametrize(
    ("size", "options", "head"),
    [
        (2_047, (), "dense"),
        (2_048, (), "tree"),
        (2_047, ("--head", "tree"), "tree"),
        (2_047, ("--set", "tree_rank=3"), "tree"),
        (2_047, ("--head", "sampled"), "sampled"),
    ],
)
def test_a_small_vocabulary_gets_the_dense_head_unless_one_is_chosen(corpus_files, tmp_path, size, options, head):
    (tmp_path / "t.json").write_text(tokenizer_json(0, size), encoding="utf-8")
    prepare(str(corpus_files), tmp_path / "tokens", progress=False, vocab=tmp_path / "t.json")
    done = command("train", tmp_path / "tokens", "--out", tmp_path / "run", "--steps", 1, *options, *SETTINGS)
    assert done.exit_code == 0, done.output
    assert read_config(tmp_path / "run").head.name == head


# --- a language of its own, without spaces between words


@pytest.fixture(scope="module")
def own_language(tmp_path_factory):
    """Documents of invented words in characters beyond ASCII; some spell the end of text."""
    folder = tmp_path_factory.mktemp("own")
    rng = np.random.default_rng(5)
    words = ["".join(rng.choice(list("ꦲꦤꦕꦫꦏ"), 3)) for _ in range(40)] + ["，", "。\n", "🙂", "\u0301", "<|endoftext|>"]
    for name, count in (("train", 60), ("validation", 4)):
        texts = ["".join(rng.choice(words, 200)) for _ in range(count)]
        lines = [json.dumps({"text": text}) + "\n" for text in texts]
        (folder / f"{name}.jsonl").write_text("".join(lines), encoding="utf-8")
    return folder


@pytest.mark.parametrize("vocab", ["bytes", "320", "letters"])
def test_a_corpus_in_an_own_language_trains_scores_and_writes(own_language, files, tmp_path, vocab):
    done = command("prepare", own_language, "--out", tmp_path / "tokens", "--vocab", files.get(vocab, vocab))
    assert done.exit_code == 0, done.output
    data = open_tokens(tmp_path / "tokens")
    assert [data.vocabulary.decode(ids) for ids in data.train.documents()] == texts_in(own_language)
    assert data.train.counts(data.vocabulary.size)[data.vocabulary.eot] == 60
    done = command("train", tmp_path / "tokens", "--out", tmp_path / "run", "--steps", 4, *SETTINGS)
    assert done.exit_code == 0, done.output
    shown = command("eval", tmp_path / "run").stdout.splitlines()
    assert [line.split("  ")[0] for line in shown[:3]] == ["bits per byte", "NLL", "perplexity"]
    found = json.loads(command("eval", tmp_path / "run", own_language, "--json").stdout)
    assert 0 < found["bits_per_byte"] < 9
    model = api.load(tmp_path / "run")
    for prompt in ("中文，字", "مرحبا", "👩\u200d👩\u200d👧", "\u0301", "<|endoftext|>", "\u3000", "a\u0301 ", ""):
        done = command("generate", tmp_path / "run", "--prompt", prompt, "--max-tokens", 5, "--seed", 2)
        assert done.exit_code == 0, done.output
        assert done.stdout.startswith(prompt)
        if prompt:
            assert model.score(prompt).n_bytes == len(prompt.encode())
        assert len(model.next_tokens(prompt, k=3)) == 3


def test_the_file_of_a_vocabulary_is_read_once_written(files):
    assert tokenizer_file.read(files["letters"]) == LETTERS.to_json()
