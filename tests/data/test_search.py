"""Which files a folder or a glob has."""

from __future__ import annotations

import os
import time

import pytest

from flashlm_numba.data.search import files_below, files_matching
from flashlm_numba.data.sources import resolve
from flashlm_numba.system.errors import UserError


def make(folder, *names):
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(f"the text of {name}")


def names(found):
    return [name for _, name in found]


def test_links_to_folders_are_followed_in_folder_and_glob_alike(tmp_path):
    make(tmp_path, "real/0.txt", "real/1.txt", "data/own.txt")
    (tmp_path / "data" / "more").symlink_to("../real")
    expected = ["more/0.txt", "more/1.txt", "own.txt"]
    assert names(files_below(tmp_path / "data")) == expected
    assert names(files_matching(str(tmp_path / "data" / "**" / "*.txt"))) == expected
    assert names(files_matching(str(tmp_path / "data" / "*" / "*.txt"))) == expected[:2]
    assert names(files_matching(str(tmp_path / "da*"))) == []
    assert len(list(resolve(str(tmp_path / "data")).documents("all"))) == 3


def test_loops_end_and_each_real_file_is_found_once(tmp_path):
    make(tmp_path, "a.txt", "b/c.txt", "b/d/e.txt")
    for link, target in (("here", "."), ("b/up", ".."), ("b/d/top", "../.."), ("z", "b"), ("y.txt", "a.txt")):
        (tmp_path / link).symlink_to(target)
    began = time.monotonic()
    expected = ["a.txt", "b/c.txt", "b/d/e.txt"]
    assert names(files_below(tmp_path)) == expected
    assert names(files_matching(str(tmp_path / "**" / "*.txt"))) == expected
    assert names(files_matching(str(tmp_path / "**" / "**" / "*.txt"))) == expected
    assert time.monotonic() - began < 5
    assert names(files_matching(str(tmp_path / "z" / "*.txt"))) == ["c.txt"]  # z has no wildcard
    assert names(files_matching(str(tmp_path / "[z]" / "*.txt"))) == ["z/c.txt"]
    assert names(files_matching(str(tmp_path / "y*"))) == ["y.txt"]


def test_a_link_to_itself_is_no_folder(tmp_path):
    make(tmp_path, "a.txt")
    for name in ("self", "notes"):
        (tmp_path / name).symlink_to(name)
    (tmp_path / "there").symlink_to("back")
    (tmp_path / "back").symlink_to("there")
    assert len(list(resolve(str(tmp_path)).documents("all"))) == 1
    assert len(list(resolve(str(tmp_path / "**")).documents("all"))) == 1
    (tmp_path / "b.txt").symlink_to("b.txt")
    with pytest.raises(UserError, match=r"b\.txt is a link to a file that does not exist"):
        resolve(str(tmp_path))


def test_hidden_files_are_found_only_by_name(tmp_path):
    make(tmp_path, ".h/a.txt", ".b.txt", "c.txt", "[x]/d.txt")
    assert names(files_below(tmp_path)) == ["[x]/d.txt", "c.txt"]
    assert names(files_matching(str(tmp_path / "**" / "*.txt"))) == ["[x]/d.txt", "c.txt"]
    assert names(files_matching(str(tmp_path / ".*" / "*.txt"))) == [".h/a.txt"]
    assert names(files_matching(str(tmp_path / "[[]x]" / "*"))) == ["[x]/d.txt"]
    assert names(files_matching(str(tmp_path / "[x]" / "*"))) == ["d.txt"]  # a folder of this name exists


def test_a_folder_without_links_keeps_the_order_of_names(tmp_path):
    make(tmp_path, "b/a.txt", "a/b.txt", "c.txt", "B.txt", "a.txt", "a-b.txt", "é.txt")
    assert names(files_below(tmp_path)) == ["B.txt", "a-b.txt", "a.txt", "a/b.txt", "b/a.txt", "c.txt", "é.txt"]


def test_what_cannot_be_read_is_not_passed_over(tmp_path, monkeypatch):
    make(tmp_path, "a.txt")
    (tmp_path / "b.txt").symlink_to("gone.txt")
    with pytest.raises(UserError, match=r"b\.txt is a link to a file that does not exist: restore"):
        resolve(str(tmp_path))
    (tmp_path / "b.txt").unlink()
    os.mkfifo(tmp_path / "c.txt")
    with pytest.raises(UserError, match=r"c\.txt is not a regular file"):
        resolve(str(tmp_path))
    with pytest.raises(UserError, match=r"c\.txt is neither a file nor a folder"):
        resolve(str(tmp_path / "c.txt"))
    (tmp_path / "c.txt").unlink()

    def refused(folder):
        raise PermissionError(13, "Permission denied", str(folder))

    monkeypatch.setattr(os, "scandir", refused)
    with pytest.raises(UserError, match=r"Cannot read the folder .*: Permission denied"):
        resolve(str(tmp_path))
