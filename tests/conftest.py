"""What all tests share: one thread, checked shapes, real data, fresh processes, and no skip that nobody sees."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import types
import typing
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import beartype
import jaxtyping
import pytest
import torch

torch.set_num_threads(1)


def _has_shape(hint: Any) -> bool:
    if isinstance(hint, type) and issubclass(hint, jaxtyping.AbstractArray):
        return True
    return any(_has_shape(inner) for inner in typing.get_args(hint))


def _checked_shapes(function: Any) -> Any:
    """The function with its shapes checked, and nothing else: tests must be able to pass what mypy would not let by."""
    hints = {name: hint for name, hint in function.__annotations__.items() if _has_shape(hint)}
    function.__annotations__ = hints
    return beartype.beartype(function) if hints else function


if os.environ.get("EXPUNGE_SHAPES", "1") != "0":
    checker = types.ModuleType("expunge_shape_checker")
    checker.check = _checked_shapes  # type: ignore[attr-defined]
    sys.modules[checker.__name__] = checker
    rooms = [f"expunge.{room}" for room in ("audit", "calculus", "core", "learn", "testing", "unlearn")]
    jaxtyping.install_import_hook(rooms, f"{checker.__name__}.check")  # those that annotate shapes: it slows all calls

REQUIRE_ALL = "EXPUNGE_REQUIRE_ALL"


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "gpu: needs a CUDA device; may be skipped where there is none")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="no CUDA device"))


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Iterator[None]:
    report = yield
    if report.skipped and not hasattr(report, "wasxfail") and not item.get_closest_marker("gpu"):
        _refuse_skip(report, item.nodeid)
    return report


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report(collector: pytest.Collector) -> Iterator[None]:
    report = yield
    if report.skipped:
        _refuse_skip(report, collector.nodeid)
    return report


def _refuse_skip(report: Any, name: str) -> None:
    if os.environ.get(REQUIRE_ALL):
        reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else report.longrepr
        report.outcome, report.longrepr = "failed", f"{name} would be skipped, and {REQUIRE_ALL} is set: {reason}"


@pytest.fixture(scope="session")
def optdigits() -> Any:
    """3,823 + 1,797 small digits, made of 200 artificial owners."""
    from expunge import datasets

    return datasets.optdigits()


@pytest.fixture(scope="session")
def mnist() -> Any:
    """60,000 + 10,000 digits, made of 200 artificial owners."""
    from expunge import datasets

    return datasets.mnist()


def one_thread() -> dict[str, str]:
    """The environment of a process that makes the same bytes as this one."""
    return {**os.environ, "OMP_NUM_THREADS": "1"}


@pytest.fixture(scope="session")
def fresh_python(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Any]:
    """``fresh_python(code, *flags, **given)`` runs the code in a new interpreter, in an empty folder.

    The code finds `given` (through JSON) as a dictionary, and leaves its answer, plain JSON values too, in `answer`.
    """

    def run(code: str, *flags: str, **given: Any) -> Any:
        whole = f"import json, sys\ngiven = json.load(sys.stdin)\n{code}\nprint('answer:' + json.dumps(answer))"
        done = subprocess.run(
            [sys.executable, *flags, "-c", whole],
            input=json.dumps(given),
            capture_output=True,
            text=True,
            env=one_thread(),
            cwd=tmp_path_factory.mktemp("fresh"),
            check=False,
        )
        assert done.returncode == 0, done.stderr
        said, _, answer = done.stdout.rpartition("answer:")
        assert not said, f"the fresh process printed {said!r}"
        return json.loads(answer)

    return run


_SERVER = """
import json, os, sys
exec(sys.argv[1], {})
for line in sys.stdin:
    code, given = json.loads(line)
    ours, theirs = os.pipe()
    child = os.fork()
    if not child:
        scope = {"given": given}
        try:
            exec(code, scope)
            text = json.dumps({"answer": scope["answer"]})
        except BaseException as error:
            text = json.dumps({"error": f"{type(error).__name__}: {error}"})
        os.write(theirs, text.encode())
        os._exit(0)
    os.close(theirs)
    with os.fdopen(ours, "rb") as pipe:
        text = pipe.read().decode()
    _, status = os.waitpid(child, 0)
    print(text or json.dumps({"signal": os.WTERMSIG(status)}), flush=True)
"""


class Forks:
    """A fresh process that has imported expunge and done nothing else; each call runs in a fork of it.

    So every call is a real process of its own, which can be killed, that has made no tensor before; and torch is
    imported once for all of them, with the part that it imports at the first step of an optimiser.
    """

    def __init__(self, folder: Path) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-c", _SERVER, "import expunge, expunge.datasets, torch._dynamo"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=one_thread(),
            cwd=folder,
        )

    def run(self, code: str, **given: Any) -> dict[str, Any]:
        """``{"answer": ...}``, ``{"error": text}`` if the code raised, or ``{"signal": number}`` if it was killed."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(json.dumps([code, given]) + "\n")
        self.process.stdin.flush()
        answer: dict[str, Any] = json.loads(self.process.stdout.readline())
        return answer

    def __call__(self, code: str, **given: Any) -> Any:
        """What the code left in `answer`."""
        got = self.run(code, **given)
        assert "answer" in got, got
        return got["answer"]

    def close(self) -> None:
        """End the process."""
        self.process.communicate()


@pytest.fixture(scope="session")
def forks(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Forks]:
    """A process to fork: see `Forks`."""
    server = Forks(tmp_path_factory.mktemp("forks"))
    yield server
    server.close()
