"""CPU quotas of cgroups, versions 1 and 2, as containers show them: files as Linux writes them, in a folder."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from flashlm_numba.system import threads
from flashlm_numba.system.cpu_quota import cpu_quota

V2 = "30 23 0:26 {root} /sys/fs/cgroup rw,nosuid - cgroup2 cgroup rw,nsdelegate\n"
V1 = "33 31 0:29 {root} {mount} rw,relatime - cgroup cgroup rw,{controllers}\n"


def make(root, cgroup, mountinfo, files):
    for name, text in {"proc/self/cgroup": cgroup, "proc/self/mountinfo": mountinfo, **files}.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return cpu_quota(root)


def v1_files(folder, quota, period=100_000):
    return {f"{folder}/cpu.cfs_quota_us": f"{quota}\n", f"{folder}/cpu.cfs_period_us": f"{period}\n"}


@pytest.mark.parametrize(
    ("text", "cores"),
    [("150000 100000\n", 1.5), ("max 100000\n", None), ("50000 100000", 0.5), ("", None), ("x y", None)],
)
def test_version_2_in_a_container_of_its_own_namespace(tmp_path, text, cores):
    assert make(tmp_path, "0::/\n", V2.format(root="/"), {"sys/fs/cgroup/cpu.max": text}) == cores


def test_version_2_the_smallest_quota_of_the_cgroups_around_counts(tmp_path):
    """As of systemd (CPUQuota=) or Kubernetes: the quota is on a cgroup around."""
    files = {
        "sys/fs/cgroup/a.slice/cpu.max": "200000 100000\n",
        "sys/fs/cgroup/a.slice/b.scope/cpu.max": "max 100000\n",
        "sys/fs/cgroup/cpu.max": "900000 100000\n",
        "sys/fs/cgroup/other/cpu.max": "1000 100000\n",
    }
    assert make(tmp_path, "0::/a.slice/b.scope\n", V2.format(root="/"), files) == 2


@pytest.mark.parametrize("controllers", ["cpu,cpuacct", "cpu", "cpuacct,cpu"])
@pytest.mark.parametrize(("quota", "cores"), [(250_000, 2.5), (-1, None)])
def test_version_1(tmp_path, controllers, quota, cores):
    mount = f"/sys/fs/cgroup/{controllers}"
    info = V1.format(root="/", mount=mount, controllers=controllers)
    info += V1.format(root="/", mount="/sys/fs/cgroup/cpuset", controllers="cpuset")
    cgroup = f"5:{controllers}:/docker/1\n3:cpuset:/docker/1\n0::/\n"
    files = v1_files(f"{mount[1:]}/docker/1", quota) | v1_files("sys/fs/cgroup/cpuset/docker/1", 1_000)
    assert make(tmp_path, cgroup, info, files) == cores


def test_version_1_where_a_container_sees_its_own_part_under_its_outer_path(tmp_path):
    mount = "/sys/fs/cgroup/cpu"
    info = V1.format(root="/docker/1", mount=mount, controllers="cpu")
    assert make(tmp_path, "5:cpu:/docker/1\n", info, v1_files(mount[1:], 100_000)) == 1
    assert make(tmp_path, "5:cpu:/docker/1/in\n", info, v1_files(f"{mount[1:]}/in", 50_000)) == 0.5


def test_a_path_outside_of_what_is_mounted_and_a_mount_with_a_space(tmp_path):
    assert make(tmp_path, "0::/../other\n", V2.format(root="/"), {"sys/fs/cgroup/cpu.max": "100000 100000"}) == 1
    info = V2.format(root="/").replace("/sys/fs/cgroup", "/sys/a\\040b")
    assert make(tmp_path / "2", "0::/c\n", info, {"sys/a b/c/cpu.max": "300000 100000"}) == 3


def test_without_cgroups_there_is_no_quota(tmp_path):
    assert cpu_quota(tmp_path) is None
    assert make(tmp_path, "\n\x00", "nonsense\n- - -\n", {}) is None


@pytest.mark.parametrize(("quota", "cores"), [(None, 4), (1.0, 1), (0.2, 1), (1.5, 2), (3.9, 4), (16.0, 4)], ids=str)
def test_the_quota_limits_the_cores_and_is_rounded_up(monkeypatch, quota, cores):
    monkeypatch.setattr(threads, "cpu_quota", lambda: quota)
    monkeypatch.setattr("os.sched_getaffinity", lambda process: set(range(4)), raising=False)
    assert threads.available_cores() == cores
    assert threads.available_threads() <= cores


PROGRAM = """
import sys
open(sys.argv[1] + "/cgroup.procs", "w").write("0")
import numba
from threadpoolctl import threadpool_info
from flashlm_numba.system.threads import set_threads
for asked in (None, 2):
    used = set_threads(asked)
    blas = max(pool["num_threads"] for pool in threadpool_info() if pool["user_api"] == "blas")
    print(used, numba.get_num_threads(), blas)
"""


@pytest.mark.skipif((os.cpu_count() or 1) < 2, reason="a quota of one core limits nothing")
def test_a_real_quota_limits_the_pools_and_threads_wins():
    """In a cgroup of version 1 or 2 that this test makes, where it may."""
    for parent, name, text in (
        ("/sys/fs/cgroup/cpu", "cpu.cfs_quota_us", "100000"),
        ("/sys/fs/cgroup", "cpu.max", "100000 100000"),
    ):
        folder = Path(parent) / f"flashlm-numba-test-{os.getpid()}"
        if not (Path(parent) / "cgroup.procs").exists():
            continue
        try:
            folder.mkdir()
        except OSError:
            continue
        try:
            (folder / name).write_text(text)
            done = subprocess.run(
                [sys.executable, "-c", PROGRAM, str(folder)], capture_output=True, text=True, check=False
            )
        except OSError:
            continue
        finally:
            folder.rmdir()
        assert done.returncode == 0, done.stderr
        one, two = (line.split() for line in done.stdout.splitlines())
        assert one == ["1", "1", "1"]
        assert two == ["2", "2", "2"]
        return
    pytest.skip("no cgroup can be made here")
