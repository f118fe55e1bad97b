"""Names of files of any bytes, and `~`, in every option and message, in terminals of any encoding."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from helpers import TINY

from flashlm_numba.data.manifest import MANIFEST, Manifest
from flashlm_numba.system.paths import from_text, printable, to_text

NAMES = [b"caf\xe9", b"a\nb\x1b[31m", "中文 é".encode(), b"::%s{}[0]~$'\"", b"\xff" * 40]
TEXT = "".join(f"Number {n} of the texts is this one.\n" for n in range(300))


def run(*words, cwd=None, **variables):
    """The command line as a process. Returns its status, standard output and standard error, as bytes."""
    command = [sys.executable, "-P", "-m", "flashlm_numba", *words]
    done = subprocess.run(command, capture_output=True, check=False, cwd=cwd, env=os.environ | variables)
    return done.returncode, done.stdout, done.stderr


UTF8 = {"PYTHONUTF8": "1"}
ASCII = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}


@pytest.mark.parametrize(
    ("name", "terminal", "other"),
    [(name, *((UTF8, ASCII) if n % 2 else (ASCII, UTF8))) for n, name in enumerate(NAMES)],
)
def test_prepare_takes_and_shows_any_name(tmp_path, name, terminal, other):
    folder = os.fsencode(tmp_path) + b"/in-" + name
    os.mkdir(folder)
    for end in (b".txt", b"-2.txt"):
        with open(folder + b"/" + name + end, "wb") as file:
            file.write(TEXT.encode() * (1 + len(end)))
    out = os.fsencode(tmp_path) + b"/out-" + name
    status, _, err = run("prepare", folder, "--out", out, **terminal)
    assert status == 0, err
    assert err.count(b"\n") == 2  # Preparing and Prepared, each on its line
    assert b"\x1b" not in err
    manifest = Manifest.read(Path(os.fsdecode(out)) / MANIFEST)
    (first, *_) = manifest.source["files"]["all"]
    assert os.fsencode(from_text(first["name"])) in (name + b".txt", name + b"-2.txt")
    assert os.fsencode(from_text(manifest.source["name"])) == folder
    # the same names in another locale are the same corpus
    status, _, err = run("prepare", folder, "--out", out, **other)
    assert status == 0, err
    assert b"is already prepared" in err
    status, _, err = run("prepare", folder + b"/none.txt", "--out", out + b"2", **terminal)
    assert (status, err.count(b"\n"), err[:7]) == (1, 1, b"Error: ")


def test_a_run_in_a_folder_of_any_name(corpus, tmp_path):
    name = os.fsdecode(b"caf\xe9\n")
    out = os.fsencode(tmp_path / name / "run")
    data = tmp_path / f"data {name}"
    data.symlink_to(corpus)
    settings = [word for setting in TINY for word in ("--set", setting)]
    settings[settings.index("embedding_init=random")] = "embedding_init=corpus"
    for words in (
        ["train", os.fsencode(data), "--out", out, "--steps", "3", "--threads", "1", *settings],
        ["train", "--resume", out, "--steps", "4"],
        ["info", out],
        ["eval", out, "--json"],
        ["export", out, out + b"/export.safetensors"],
        ["generate", out + b"/export.safetensors", "--max-tokens", "2"],
    ):
        status, standard, err = run(*words)
        assert status == 0, err
        assert name.encode("utf-8", "surrogateescape") not in standard + err
    assert os.path.exists(out + b"/checkpoints/step-4")


def test_a_prompt_is_utf8_in_every_locale(request):
    prompt = "Zurück – 中文".encode()
    words = ["generate", os.fsencode(request.getfixturevalue("run")), "--max-tokens", "6", "--seed", "1", "--prompt"]
    found = set()
    for terminal in (UTF8, ASCII | {"PYTHONIOENCODING": "utf-8"}):
        status, standard, err = run(*words, prompt, **terminal)
        assert status == 0, err
        assert standard.startswith(prompt)
        found.add(standard)
    assert len(found) == 1
    status, standard, err = run(*words, b"caf\xe9", **UTF8)
    assert (status, standard) == (2, b"")
    assert b"Invalid value for '--prompt': it is not UTF-8." in err


def test_tilde_is_the_same_in_every_option(tmp_path):
    home = tmp_path / "home"
    home.mkdir()
    (home / "book.txt").write_text(TEXT)
    (tmp_path / "~draft.txt").write_text(TEXT)
    (tmp_path / "~").mkdir()
    variables = {"HOME": str(home), "XDG_CACHE_HOME": os.environ.get("XDG_CACHE_HOME", str(tmp_path / "cache"))}
    for words in (
        ["~draft.txt", "--out", "one"],
        ["~/book.txt", "--out=~/two"],
        ["sotu", "--max-docs=3", "--validation=~/book.txt", "--out=~nosuchuser-"],
    ):
        status, _, err = run("prepare", *words, cwd=tmp_path, **variables)
        assert status == 0, err
    assert json.loads((home / "two" / MANIFEST).read_text())["source"]["name"] == str(home / "book.txt")
    assert (tmp_path / "~nosuchuser-" / MANIFEST).exists()
    assert not any((tmp_path / "~").iterdir())
    status, _, err = run("prepare", "~nosuchuser/x.txt", "--out", "three", cwd=tmp_path, **variables)
    assert (status, err) == (1, b"Error: There is no file or folder ~nosuchuser/x.txt: check the path.\n")
    status, _, err = run("train", "~/two", "--embeddings=~/e.safetensors", "--steps=1", cwd=tmp_path, **variables)
    assert status == 1
    assert f"{home}/e.safetensors".encode() in err


def test_names_are_kept_reversibly_and_shown_on_one_line():
    for name in NAMES:
        decoded = os.fsdecode(name)
        assert from_text(json.loads(json.dumps(to_text(decoded)))) == decoded
        assert printable(decoded).isprintable()
    assert printable("plain é 中文 🙂") == "plain é 中文 🙂"
    assert printable("\U000e0001") == r"\U000e0001"
