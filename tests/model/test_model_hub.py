"""hf:USER/NAME and `push`, by the real huggingface_hub over a stand-in for the hub on this machine."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from helpers import command
from huggingface_hub import ModelCard, constants
from stand_in_hub import stand_in_hub

import flashlm_numba as fl
from flashlm_numba.model.hub import Repository, repository_of
from flashlm_numba.model.hub_folder import FILES
from flashlm_numba.serving.served import load_served
from flashlm_numba.system.errors import UserError

NAME = "somebody/tiny"
WORDS = ("--prompt", "The people", "--max-tokens", 9, "--seed", 3)


@pytest.mark.parametrize("name", ["../x", "a/b--c", "a/.b", "a/" + "b" * 99])
def test_names_that_the_hub_does_not_have_are_told_without_asking(name, monkeypatch):
    monkeypatch.setattr(socket, "getaddrinfo", lambda *arguments, **options: pytest.fail("the hub was asked"))
    assert refused(["generate", f"hf:{name}"], f"hf:{name} names no model on Hugging Face (").count("\n") == 1


@pytest.fixture(scope="module")
def folder(run, tmp_path_factory):
    out = tmp_path_factory.mktemp("hub") / "tiny"
    done = command("export", run, "--hub", out)
    assert done.exit_code == 0, done.output
    return out


def point_to(url, monkeypatch):
    """Make huggingface_hub ask this server, as HF_ENDPOINT does for a new process."""
    monkeypatch.setattr(constants, "ENDPOINT", url)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", url + "/{repo_id}/resolve/{revision}/{filename}")


@pytest.fixture
def hub(folder, tmp_path, monkeypatch):
    """The stand-in with the model, asked by this process, whose cache is empty and which has no token."""
    with stand_in_hub() as hub:
        hub.repositories[NAME] = {path.name: path.read_bytes() for path in folder.iterdir()}
        hub.repositories[NAME] |= {".gitattributes": b"", "pytorch_model.bin": b"\0" * 1000, "logs/x.txt": b"x"}
        point_to(hub.url, monkeypatch)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
        monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "token"))
        monkeypatch.delenv("HF_TOKEN", raising=False)
        yield hub


def generated(path):
    done = command("generate", path, *WORDS)
    assert done.exit_code == 0, done.output
    return done.stdout


def refused(words, sentence):
    done = command(*words)
    assert done.exit_code == 1, done.output
    assert done.stdout == ""
    assert sentence in done.stderr
    assert "Traceback" not in done.output
    return done.stderr


def test_names():
    assert repository_of("hf:a/b") == repository_of(Path("hf:a/b")) == Repository("a/b")
    assert repository_of(Path("hf:a/b@refs/pr/1")) == Repository("a/b", "refs/pr/1")
    assert str(repository_of("hf:a/b@v1")) == "hf:a/b@v1"
    assert repository_of("runs/hf:a/b") is None
    for text in ("hf:", "hf:gpt2", "hf:a/b/c", "hf:a/b@", "hf://a/b", "hf:a/b c", "hf:/a/b"):
        with pytest.raises(UserError, match="names no model on Hugging Face; write hf:USER/NAME"):
            repository_of(text)


def test_every_command_takes_a_name_on_the_hub(hub, folder, corpus, tmp_path):
    path = f"hf:{NAME}"
    done = command("generate", path, *WORDS)
    assert done.exit_code == 0, done.output
    assert done.stdout == generated(folder)
    assert done.stderr.startswith(f"Downloading {path} (")
    scores = [json.loads(command("eval", model, corpus, "--json").stdout) for model in (path, folder)]
    assert scores[0] == scores[1]
    info = json.loads(command("info", path, "--json").stdout)
    assert (info["run"], info["rows"]) == (path, "int8")
    assert fl.load(path).generate(max_tokens=9, seed=1) == fl.load(folder).generate(max_tokens=9, seed=1)
    assert load_served(Path(path), progress=fl.Progress()).name == "tiny"
    settings = ["--set", "phases=2x16", "--set", "validate_every=0", "--set", "sample_tokens=0"]
    done = command("train", corpus, "--init", path, "--steps", 1, "--out", tmp_path / "more", *settings)
    assert done.exit_code == 0, done.output
    init = json.loads((tmp_path / "more" / "config.json").read_text())["init"]
    assert init == f"hf:{NAME}@{hub.sha(NAME)}"
    assert command("export", tmp_path / "more", "--hub", tmp_path / "out").exit_code == 0
    assert ModelCard.load(tmp_path / "out" / "README.md").data.base_model == NAME


def test_only_the_files_of_a_model_are_downloaded_and_only_once(hub):
    assert generated(f"hf:{NAME}") == generated(f"hf:{NAME}")
    fetched = [path.rpartition("/")[2] for method, path in hub.requests if method == "GET" and "/resolve/" in path]
    assert sorted(fetched) == sorted(FILES)


def test_a_revision_is_a_branch_or_a_commit(hub):
    first, old = hub.sha(NAME), generated(f"hf:{NAME}")
    assert generated(f"hf:{NAME}@main") == generated(f"hf:{NAME}@{first}") == old
    assert refused(["info", f"hf:{NAME}@v2"], f"{NAME} has no revision 'v2' on Hugging Face").count("\n") == 1


def test_the_library_downloads_without_a_word(hub, corpus, tmp_path, capfd):
    fl.load(f"hf:{NAME}")
    settings = {"phases": "2x16", "validate_every": 0, "sample_tokens": 0}
    fl.train(corpus, init=f"hf:{NAME}", steps=1, out=tmp_path / "run", settings=settings)
    assert capfd.readouterr() == ("", "")


def environment(hub, tmp_path, **more):
    """Of a process of its own, as a user's."""
    left_out = ("HF_TOKEN", "HF_HUB_OFFLINE")
    own = {name: value for name, value in os.environ.items() if name not in left_out}
    return own | {"HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "home")} | more


def test_processes_that_have_only_the_variables_of_huggingface_hub(hub, folder, tmp_path):
    words = [sys.executable, "-m", "flashlm_numba", "generate", f"hf:{NAME}", *map(str, WORDS)]
    options = {"capture_output": True, "text": True, "encoding": "utf-8"}
    done = subprocess.run(words, env=environment(hub, tmp_path), **options)
    assert done.returncode == 0, done.stderr
    assert done.stdout == generated(folder)
    asked = len(hub.requests)
    offline = subprocess.run(words, env=environment(hub, tmp_path, HF_HUB_OFFLINE="1"), **options)
    assert (offline.returncode, offline.stdout, offline.stderr) == (0, done.stdout, "")
    assert len(hub.requests) == asked
    never = subprocess.run(words, env=environment(hub, tmp_path / "other", HF_HUB_OFFLINE="1"), **options)
    assert (never.returncode, never.stdout) == (1, "")
    assert f"hf:{NAME} has not been downloaded before; check the connection" in never.stderr
    assert len(never.stderr.splitlines()) == 1


def test_what_was_downloaded_is_used_when_the_hub_cannot_be_reached(hub, monkeypatch):
    text = generated(f"hf:{NAME}")
    with socket.socket() as closed:  # a port that nobody listens at
        closed.bind(("127.0.0.1", 0))
        point_to(f"http://127.0.0.1:{closed.getsockname()[1]}", monkeypatch)
        done = command("generate", f"hf:{NAME}", *WORDS)
        assert done.stdout == text
        assert f"hf:{NAME} is as last downloaded" in done.stderr
        sentence = refused(["generate", "hf:somebody/other"], "Hugging Face cannot be reached (")
        assert "hf:somebody/other has not been downloaded before; check the connection, or give a folder" in sentence
        assert sentence.count("\n") == 1


def test_a_private_model_needs_the_token(hub, monkeypatch):
    hub.private.add(NAME)
    for name in (NAME, "nobody/nothing"):  # the hub does not tell these apart
        sentence = refused(["generate", f"hf:{name}"], f"There is no model {name} on Hugging Face that you may read")
        assert "log in with `hf auth login`, or set the variable HF_TOKEN" in sentence
        assert sentence.count("\n") == 1
    monkeypatch.setenv("HF_TOKEN", hub.token)
    generated(f"hf:{NAME}")
    hub.gated.add(NAME)
    refused(["generate", f"hf:{NAME}"], f"{NAME} is open to some only; ask for access at {hub.url}/{NAME}, and log in")


def test_a_repository_without_a_model_of_this_program_is_refused(hub):
    whole = hub.repositories[NAME]
    hub.repositories[NAME] = {"pytorch_model.bin": b"\0", "config.json": b"{}"}
    refused(["generate", f"hf:{NAME}"], f"{NAME} on Hugging Face has no model.safetensors, so it is no model of this")
    hub.repositories[NAME] = {"model.safetensors": b"\0" * 99, "config.json": b'{"model_type": "llama"}'}
    refused(["generate", f"hf:{NAME}"], "has the model_type 'llama', which is no model of this program")
    hub.repositories[NAME] = {"model.safetensors": whole["model.safetensors"]}
    generated(f"hf:{NAME}")


def test_a_transfer_that_breaks_goes_on(hub, folder, monkeypatch):
    monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", 1 << 16)  # of which only whole ones count
    hub.cut, hub.cuts = "model.safetensors", 1
    assert generated(f"hf:{NAME}") == generated(folder)
    (start,) = hub.ranges
    assert start > 1 << 16


def test_a_download_that_is_damaged_names_what_to_delete(hub, folder, tmp_path):
    text = generated(f"hf:{NAME}")
    (path,) = (tmp_path / "cache").glob("models--somebody--tiny/snapshots/*/model.safetensors")
    data = bytearray(path.read_bytes())
    data[-1000] ^= 1
    path.write_bytes(data)
    kept = tmp_path / "cache" / "models--somebody--tiny"
    refused(["generate", f"hf:{NAME}"], f"does not match its SHA-256 in SHA256SUMS; delete {kept} to download it again")
    for each in sorted(kept.rglob("*"), reverse=True):
        each.rmdir() if each.is_dir() and not each.is_symlink() else each.unlink()
    assert generated(f"hf:{NAME}") == text


# --- push ---


def test_a_dry_run_lists_the_files_and_asks_nobody(hub, folder):
    hub.requests.clear()
    done = command("push", folder, "me/mine", "--dry-run", "--private")
    assert done.exit_code == 0, done.output
    assert hub.requests == []
    *listed, last = done.stdout.splitlines()
    found = {words[0]: int(words[1].replace(",", "")) for words in map(str.split, listed)}
    assert found == {name: (folder / name).stat().st_size for name in FILES}
    assert last == f"would be uploaded to {hub.url}/me/mine (private if new)"


@pytest.mark.parametrize("private", [False, True])
def test_what_was_pushed_is_what_others_load(hub, folder, tmp_path, monkeypatch, private):
    monkeypatch.setenv("HF_TOKEN", hub.token)
    done = command("push", folder, "me/mine", *["--private"] * private)
    assert done.exit_code == 0, done.output
    assert f"uploaded to {hub.url}/me/mine" in done.stdout
    asked = hub.created["me/mine"]
    assert private == (asked.get("private") is True or asked.get("visibility") == "private")
    assert hub.repositories["me/mine"] == {name: (folder / name).read_bytes() for name in FILES}
    assert generated("hf:me/mine") == generated(folder)
    assert command("push", folder, "me/mine").exit_code == 0  # again, into the repository that is there


def test_a_push_that_cannot_be_is_one_sentence(hub, run, folder, tmp_path, monkeypatch):
    def told(words, sentence):
        hub.requests.clear()
        assert refused(["push", *words], sentence).count("\n") == 1

    told([folder, "me/mine"], "There is no token to push to Hugging Face with; log in with `hf auth login`, or set")
    assert hub.requests == []
    for name in ("mine", "me/mi ne", "me/mine/x", "me/.."):
        told([folder, name, "--dry-run"], f"'{name}' is no name of a repository on Hugging Face; write USER/NAME")
    told([run, "me/mine"], "has no model.safetensors; give a folder written by `flashlm-numba export RUN --hub")
    damaged = tmp_path / "damaged"
    damaged.mkdir()
    for name in FILES:
        data = bytearray((folder / name).read_bytes())
        data[-1] ^= name == "README.md"
        (damaged / name).write_bytes(data)
    told([damaged, "me/mine", "--dry-run"], f"{damaged / 'README.md'} is damaged")
    monkeypatch.setenv("HF_TOKEN", hub.token)
    assert command("export", run, "--hub", tmp_path / "odd", "--license", "odd-1").exit_code == 0
    told([tmp_path / "odd", "me/mine"], 'README.md ("license" must be one of [mit, ...]); correct them')
    assert "me/mine" not in hub.repositories
    monkeypatch.setenv("HF_TOKEN", "hf_wrong")
    told([folder, "me/mine"], "Your token does not allow to write to me/mine on Hugging Face")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    told([folder, "me/mine"], "The variable HF_HUB_OFFLINE forbids requests; unset it to push")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        point_to(f"http://127.0.0.1:{closed.getsockname()[1]}", monkeypatch)
        told([folder, "me/mine"], "me/mine could not be pushed to Hugging Face (")
