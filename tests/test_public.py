"""The public names, that each says what it is, and that importing them does nothing else."""

import inspect
import json
import os
import subprocess
import sys

import pytest

import expunge

NAMES = [
    "AmnesiacUnlearning",
    "Artefact",
    "BadRecipe",
    "BadRecords",
    "BadTeacher",
    "BoundaryShrink",
    "BudgetExhausted",
    "Claim",
    "CodeNotAllowed",
    "Comparison",
    "Constant",
    "Corrupt",
    "Cost",
    "EmptyRetain",
    "Estimate",
    "ExpungeError",
    "FineTune",
    "FisherForgetting",
    "GradientAscent",
    "Guarantee",
    "Impossible",
    "InfluenceUnlearning",
    "Keep",
    "L1Sparse",
    "Magnitude",
    "Masked",
    "Method",
    "Misuse",
    "Need",
    "NegGradPlus",
    "NeverTrained",
    "NotNow",
    "NothingChanged",
    "OtherBody",
    "Overtaken",
    "Pruned",
    "Pruning",
    "RandomLabels",
    "RandomScores",
    "Recipe",
    "Records",
    "Request",
    "Retrain",
    "RetrainBriefly",
    "RetrainSameMask",
    "Row",
    "SalUn",
    "SaliencyMasked",
    "Scenario",
    "Scrub",
    "SelectiveSynapticDampening",
    "ShardSizes",
    "ShardWarning",
    "Sharding",
    "Sisa",
    "Stopped",
    "Store",
    "Study",
    "StudyResult",
    "SynFlow",
    "Table",
    "Trained",
    "TrainingLog",
    "UnknownRecord",
    "Unlearned",
    "UnreadableFile",
    "UnrollingSGD",
    "Unsupported",
    "Unwritable",
    "__version__",
    "adopt",
    "allow_code",
    "child",
    "compare",
    "generator",
    "load",
    "load_records",
    "measure",
    "run_study",
    "shard_sizes",
    "train",
    "train_many",
]


def test_public_names_are_pinned():
    assert list(expunge.__all__) == NAMES


def test_public_names_are_there_and_in_order():
    assert list(expunge.__all__) == sorted(set(expunge.__all__))
    assert not [name for name in NAMES if not hasattr(expunge, name)]


def undocumented(name, thing):
    """Names, from this one down, of classes, functions, methods and properties that say nothing of themselves."""
    said = (inspect.isclass(thing) or inspect.isfunction(thing)) and (thing.__doc__ or "").strip()
    if said == "" or (said and said.startswith(f"{thing.__name__}(")):  # what a dataclass says of itself
        yield name
    if inspect.isclass(thing):
        for inner, value in vars(thing).items():
            value = getattr(value, "__func__", getattr(value, "fget", value))
            if not inner.startswith("_") and inspect.isfunction(value) and not inspect.getdoc(getattr(thing, inner)):
                yield f"{name}.{inner}"


@pytest.mark.parametrize("name", [name for name in NAMES if name != "__version__"])
def test_public_things_say_what_they_are(name):
    assert list(undocumented(name, getattr(expunge, name))) == []


def test_silence_is_noticed():
    class Silent:
        def speak(self):
            pass

        @classmethod
        def make(cls):
            pass

        @property
        def size(self):
            pass

    def spoken():
        """Says something."""

    assert list(undocumented("Silent", Silent)) == ["Silent", "Silent.speak", "Silent.make", "Silent.size"]
    assert list(undocumented("spoken", spoken)) == []


WATCH = """
import contextlib, io, json, logging, os, pathlib, random, signal, sys, threading
import numpy, torch

def loggers(ours):
    names = [name for name in logging.root.manager.loggerDict if name.partition(".")[0] == "expunge"]
    return [len(logging.getLogger(name).handlers) for name in names] if ours else [len(logging.root.handlers)]

def state():
    numbers = numpy.random.get_state()
    return {
        "python's coins": random.getstate(),
        "numpy's coins": (numbers[1].tolist(), numbers[2]),
        "torch's coins": (torch.get_rng_state().tolist(), torch.initial_seed()),
        "root logger": (loggers(False), logging.root.level),
        "own loggers": sum(loggers(True)),
        "torch": (torch.get_num_threads(), torch.get_default_dtype(), str(torch.get_default_device())),
        "torch's kernels": (torch.are_deterministic_algorithms_enabled(), torch.backends.cudnn.benchmark),
        "environment": (sorted(os.environ.items()), os.getcwd(), sys.excepthook, signal.getsignal(signal.SIGINT)),
        "threads": threading.active_count(),
        "files": sorted(str(path) for place in (".", os.environ["HOME"]) for path in pathlib.Path(place).rglob("*")),
    }

complaints = []
for code in json.loads(sys.argv[1]):
    before, said = state(), io.StringIO()
    with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
        exec(code)
    after = state()
    changed = [name for name in before if before[name] != after[name]]
    complaints.append(changed + (["output"] if said.getvalue() else []))
print(json.dumps(complaints))
"""


def complaints(codes, folder):
    """For each of these pieces of code, run one after the other in a fresh process: what it changed."""
    home, away = folder / "home", folder / "away"
    home.mkdir()
    away.mkdir()
    env = {name: value for name, value in os.environ.items() if not name.startswith(("MPL", "XDG"))}
    done = subprocess.run(
        [sys.executable, "-B", "-W", "error", "-c", WATCH, json.dumps(codes)],
        env={**env, "HOME": str(home), "TMPDIR": str(home), "OMP_NUM_THREADS": "1"},
        cwd=away,
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert len(done.stdout.splitlines()) == 1, done.stdout  # nothing else was printed, by compiled code either
    return json.loads(done.stdout)


def test_importing_is_silent_and_changes_nothing(tmp_path):
    assert complaints(["import expunge"], tmp_path) == [[]]


LIES = {
    "print('hello')": "output",
    "torch.manual_seed(0)": "torch's coins",
    "random.seed(1)": "python's coins",
    "numpy.random.seed(1)": "numpy's coins",
    "logging.basicConfig()": "root logger",
    "logging.getLogger('expunge.x').addHandler(logging.NullHandler())": "own loggers",
    "torch.set_num_threads(3)": "torch",
    "os.environ['OMP_NUM_THREADS'] = '2'": "environment",
    "open('file', 'w').close()": "files",
    "pathlib.Path.home().joinpath('.cache').mkdir()": "files",
    "threading.Thread(target=threading.Event().wait, daemon=True).start()": "threads",
}


def test_what_importing_must_not_do_is_noticed(tmp_path):
    assert complaints(list(LIES), tmp_path) == [[complaint] for complaint in LIES.values()]
