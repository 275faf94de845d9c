"""The wheel: built, installed into an empty environment, and run there, away from the checkout."""

import os
import subprocess
import sys
import sysconfig
import venv
import zipfile
from pathlib import Path

import pytest

import expunge

ROOT = Path(__file__).parents[1]
SOURCE = ROOT / "src"


def run(*command, cwd, **env):
    clean = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "PYTHONHOME")}
    done = subprocess.run(
        list(map(str, command)), cwd=cwd, env={**clean, **env}, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    folder = tmp_path_factory.mktemp("dist")
    run(sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", folder, ROOT, cwd=folder)
    (path,) = folder.glob("*.whl")
    return path


@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory):
    """The folder of an environment that holds the wheel alone and sees what this one has installed beside it.

    A path in a .pth file is searched for modules, but the .pth files that lie there are not read: so the editable
    install of the checkout cannot be seen, and an import that works comes from the wheel.
    """
    folder = tmp_path_factory.mktemp("empty") / "venv"
    venv.create(folder, with_pip=False)
    python = folder / "bin" / "python"
    run(
        *(sys.executable, "-m", "pip", "--python", python, "install", "--no-deps", "--no-index", "--no-compile", "-q"),
        *("--disable-pip-version-check", wheel),
        cwd=folder,
    )
    (site,) = folder.glob("lib/python*/site-packages")
    (site / "beside.pth").write_text(f"{sysconfig.get_paths()['purelib']}\n{sysconfig.get_paths()['platlib']}\n")
    return folder


def files_of(wheel):
    return {name for name in zipfile.ZipFile(wheel).namelist() if name.startswith("expunge/")}


def test_the_wheel_holds_all_of_the_source_and_nothing_else(wheel):
    source = {
        path.relative_to(SOURCE).as_posix()
        for path in (SOURCE / "expunge").rglob("*")
        if path.is_file() and not any(part.startswith((".", "__pycache__")) for part in path.parts)
    }
    assert files_of(wheel) == source
    assert "expunge/py.typed" in source
    others = {name.split("/")[0] for name in zipfile.ZipFile(wheel).namelist()} - {"expunge"}
    assert others == {f"expunge-{expunge.__version__}.dist-info"}


def test_templates_ship(wheel):
    written = {
        path.relative_to(SOURCE).as_posix() for path in SOURCE.rglob("*") if path.suffix in (".html", ".css", ".js")
    }
    assert written
    assert written <= files_of(wheel)


def test_no_path_of_this_machine_ships(wheel):
    with zipfile.ZipFile(wheel) as archive:
        for name in archive.namelist():
            assert str(ROOT).encode() not in archive.read(name), name


def test_the_command_runs_away_from_the_checkout(installed, tmp_path):
    said = run(installed / "bin" / "expunge", "--version", cwd=tmp_path, OMP_NUM_THREADS="1")
    assert expunge.__version__ in said
    assert list(tmp_path.iterdir()) == []


def test_the_import_comes_from_the_wheel(installed, tmp_path):
    code = "import expunge, importlib.metadata as m; print(expunge.__file__, m.version('expunge'), expunge.__version__)"
    place, *versions = run(installed / "bin" / "python", "-c", code, cwd=tmp_path, OMP_NUM_THREADS="1").split()
    assert Path(place).is_relative_to(installed)
    assert versions == [expunge.__version__] * 2
