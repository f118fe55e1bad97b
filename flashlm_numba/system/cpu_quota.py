"""The CPU quota of this process's cgroups, as set by `docker run --cpus` or Kubernetes."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path


def cpu_quota(root: Path = Path("/")) -> float | None:
    """Cores that this process may keep busy by the quotas of its cgroups, such as 1.5; None without a quota.

    A quota of a cgroup applies to those inside it too, so the smallest counts. Versions 1 and 2 are read.
    root : where /proc and the mounted folders are; another folder in tests
    """
    found = [quota for folder, version in _cgroups(root) if (quota := _quota(folder, version)) is not None]
    return min(found, default=None)


def _cgroups(root: Path) -> Iterator[tuple[Path, int]]:
    """The folder and version of each cgroup of this process that can have a CPU quota, from the innermost outwards."""
    own = _own_paths(root)
    for line in _lines(root / "proc/self/mountinfo"):
        # "36 35 0:30 /docker/1 /sys/fs/cgroup/cpu rw - cgroup cgroup rw,cpu,cpuacct"
        before, _, after = line.partition(" - ")
        fields, kind = before.split(), after.split()
        if len(fields) < 5 or len(kind) < 3 or kind[0] not in ("cgroup", "cgroup2"):
            continue
        version = 2 if kind[0] == "cgroup2" else 1
        if version == 1 and "cpu" not in kind[2].split(","):
            continue
        mount = root / _unescape(fields[4]).lstrip("/")
        inside = _below(own.get("" if version == 2 else "cpu", "/"), _unescape(fields[3]))
        folder = mount / inside
        while True:
            yield folder, version
            if folder == mount or mount not in folder.parents:
                break
            folder = folder.parent


def _own_paths(root: Path) -> dict[str, str]:
    """The path of this process's cgroup by controller, as of its hierarchy's root; "" is version 2."""
    paths = {}
    for line in _lines(root / "proc/self/cgroup"):  # "4:cpu,cpuacct:/docker/1", or "0::/docker/1"
        number, _, rest = line.partition(":")
        controllers, _, path = rest.partition(":")
        for controller in [""] if number == "0" else controllers.split(","):
            paths[controller] = path
    return paths


def _below(path: str, mounted: str) -> str:
    """The path of a cgroup below the folder in which `mounted` of its hierarchy appears; "" if it is not there.

    A container often sees only its own part of the hierarchy, and it may see its path from outside or from inside.
    """
    if mounted != "/" and (path == mounted or path.startswith(mounted + "/")):
        path = path[len(mounted) :]
    parts = path.strip("/").split("/")
    return "" if ".." in parts else "/".join(parts)


def _quota(folder: Path, version: int) -> float | None:
    """Cores by the quota of one cgroup, or None."""
    if version == 2:
        words = " ".join(_lines(folder / "cpu.max")).split()  # "150000 100000", or "max 100000"
    else:
        names = ("cpu.cfs_quota_us", "cpu.cfs_period_us")
        words = [word for name in names for word in _lines(folder / name)]  # -1 is no quota
    try:
        quota, period = (int(word) for word in words)
    except ValueError:
        return None
    return quota / period if quota > 0 and period > 0 else None


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text(encoding="utf-8", errors="surrogateescape").splitlines()
    except OSError:
        return []


def _unescape(path: str) -> str:
    """A path of mountinfo, in which spaces and the like are octal numbers.

    >>> _unescape("/a\\\\040b")
    '/a b'
    """
    for code, character in (("\\040", " "), ("\\011", "\t"), ("\\012", "\n"), ("\\134", "\\")):
        path = path.replace(code, character)
    return path
