"""Ctrl-C, at whatever moment: exit code 4, one line that says how to go on, nothing half-written."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest

from expunge.learn.resume import Saver
from expunge.learn.training import load
from tests.cli.conftest import QUICK, TABLE

LONG = ("train", "--data", "optdigits", "--model", "mlp", "--epochs", "60")


def stopped(said):
    assert said.code == 4
    assert said.out == ""
    assert said.err.count("\n") == 1
    assert said.err.startswith("error: interrupted")
    return said.err


def started(folder, *words):
    """A real process with this command."""
    return subprocess.Popen(
        [sys.executable, "-m", "expunge.cli", *map(str, words)],
        cwd=folder,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=_hears_interrupts,
    )


def _hears_interrupts():
    """Who is started in the background by a shell ignores interrupts, and hands that on."""
    signal.signal(signal.SIGINT, signal.default_int_handler)


def until(found, process):
    """Wait until something is found, or the process ends."""
    while not found() and process.poll() is None:
        time.sleep(0.005)
    assert process.poll() is None, process.communicate()


def test_an_interrupted_training_goes_on_to_the_same_bytes(expunge, tmp_path):
    longer = (
        *LONG[:-1],
        "250",
    )  # seconds, of which the first save leaves nearly all: the signal must come before the end
    words = (*longer, "--shards", "2", "--resume", "state", "--out", "out", "--json")
    process = started(tmp_path, *words)
    until(lambda: list(tmp_path.glob("state/part-0000/*.safetensors")), process)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate()
    assert (process.returncode, out) == (4, "")
    assert err.startswith("error: interrupted")
    assert err.count("\n") == 1
    assert "--resume state" in err
    assert [path.name for path in tmp_path.iterdir()] == ["state"]
    again = expunge(*words)
    assert again.code == 0
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    undisturbed = expunge(*longer, "--shards", "2", "--out", "calm", "--json")
    assert json.loads(again.out)["digest"] == json.loads(undisturbed.out)["digest"]


def test_a_single_model_is_resumed_too(expunge, tmp_path, monkeypatch):
    saves = []
    save = Saver.save

    def third_time_stopped(self, *args):
        save(self, *args)
        saves.append(args)
        if len(saves) == 3:
            raise KeyboardInterrupt

    words = (*LONG[:-1], "12", "--resume", "state", "--out", "out")
    with monkeypatch.context() as patch:
        patch.setattr(Saver, "save", third_time_stopped)
        message = stopped(expunge(*words))
    assert "at step 600; go on with the same command and --resume state" in message
    assert [path.name for path in tmp_path.iterdir()] == ["state"]
    assert expunge(*words).code == 0
    expunge(*LONG[:-1], "12", "--out", "calm")
    assert load("out").digest() == load("calm").digest()


def test_another_training_is_not_resumed(expunge, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(Saver, "save", interrupt)
        stopped(expunge(*LONG, "--resume", "state", "--out", "out"))
    said = expunge(*LONG, "--seed", "1", "--resume", "state", "--out", "out")
    assert said.code == 2
    assert "state of another training" in said.err


def interrupt(*_args, **_options):
    raise KeyboardInterrupt


@pytest.mark.parametrize(
    "place",
    [
        "expunge.cli.models.read_records",  # while reading
        "expunge.learn.shards.fit",  # while training
        "expunge.core.trained.write_state",  # while writing
    ],
)
def test_forget_leaves_nothing_half_written(expunge, shop, tmp_path, monkeypatch, place):
    monkeypatch.setattr(place, interrupt)
    words = ("--data", shop / "customers.csv", *TABLE, "--owner", "c-1", "--out", "deep/out")
    assert "run the same command again" in stopped(expunge("forget", shop / "sharded", *words))
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []
    assert not (tmp_path / "deep" / "out").exists()


def test_train_without_resume_says_to_run_it_again(expunge, shop, tmp_path, monkeypatch):
    monkeypatch.setattr("expunge.learn.loop._Run._epoch", interrupt)
    words = ("train", "--data", shop / "customers.csv", *TABLE, *QUICK, "--out", "out")
    assert "run the same command again" in stopped(expunge(*words))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("words", [("evaluate", "{shop}/lost", "--before", "{shop}/sharded"), ("records",)])
def test_other_commands(expunge, shop, monkeypatch, words):
    for room in ("models", "lists"):
        monkeypatch.setattr(f"expunge.cli.{room}.read_records", interrupt)
    filled = [word.replace("{shop}", str(shop)) for word in words]
    stopped(expunge(*filled, "--data", shop / "customers.csv", *TABLE))


def test_demo(expunge, tmp_path, monkeypatch):
    monkeypatch.setattr("expunge.demo.story.train", interrupt)
    stopped(expunge("demo", "train", "--workspace", "w"))
    assert list(tmp_path.iterdir()) == []
