"""The tests' own floor: shapes are checked, skips are refused when all tests must run, fresh processes are fresh."""

import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import jaxtyping
import pytest
import torch
from torch import nn

from expunge.learn.ensemble import ShardEnsemble


def test_wrong_shapes_are_caught():
    ensemble = ShardEnsemble([nn.Identity()], 3, "cross_entropy", "mean")
    with pytest.raises(jaxtyping.TypeCheckError, match=r"batch outputs"):
        ensemble(torch.zeros(3))


SKIPS = """
import pytest

@pytest.mark.skip(reason="the reason")
def test_marked(): ...

def test_within():
    pytest.skip("the reason")

@pytest.mark.xfail(reason="known", strict=True)
def test_known():
    raise ValueError

@pytest.mark.gpu
def test_gpu(): ...
"""


def test_skips_fail_when_all_tests_must_run(tmp_path):
    shutil.copy(Path(__file__).with_name("conftest.py"), tmp_path)
    (tmp_path / "pytest.ini").write_text("[pytest]")
    (tmp_path / "test_skips.py").write_text(SKIPS)
    (tmp_path / "test_whole.py").write_text("import pytest\npytest.importorskip('no_such_package')\n")
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-q", "--continue-on-collection-errors", "."],
        cwd=tmp_path,
        env={**os.environ, "EXPUNGE_REQUIRE_ALL": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    gpu = "1 passed" if torch.cuda.is_available() else "1 skipped"
    assert f"1 failed, {gpu}, 1 xfailed, 2 errors" in done.stdout
    for name, reason in (("test_skips.py::test_within", "the reason"), ("test_whole.py", "no_such_package")):
        assert f"{name} would be skipped, and EXPUNGE_REQUIRE_ALL is set:" in done.stdout
        assert reason in done.stdout


def test_fresh_processes_have_one_thread_and_answer(fresh_python, forks):
    code = "import torch\nanswer = [torch.get_num_threads(), given['n'] + 1]"
    assert fresh_python(code, n=1) == forks(code, n=1) == [torch.get_num_threads(), 2] == [1, 2]


def test_forks_tell_errors_and_signals(forks):
    assert forks.run("raise ValueError('no')") == {"error": "ValueError: no"}
    assert forks.run("import os\nos.kill(os.getpid(), 9)") == {"signal": signal.SIGKILL}
    assert forks("answer = 1") == 1
