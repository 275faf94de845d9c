"""Secure machine unlearning for PyTorch models.

records = expunge.load_records("customers.csv", id="customer_id", owner="customer_id", label="churned")
recipe = expunge.Recipe(model="mlp", epochs=20)
trained = expunge.train(recipe, records, shards=20)
gone = expunge.Sisa()(trained, records, expunge.Request.remove_owner("c-1042"), rng=expunge.generator(0))
print(gone)
"""

from expunge._version import __version__
from expunge.audit import Row, Table, measure
from expunge.core.claim import Claim, Constant, Guarantee
from expunge.core.coins import child, generator
from expunge.core.errors import (
    BadRecipe,
    BadRecords,
    BudgetExhausted,
    CodeNotAllowed,
    Corrupt,
    EmptyRetain,
    ExpungeError,
    Impossible,
    Misuse,
    NeverTrained,
    NothingChanged,
    NotNow,
    OtherBody,
    Overtaken,
    Stopped,
    UnknownRecord,
    UnreadableFile,
    Unsupported,
    Unwritable,
)
from expunge.core.estimate import Estimate
from expunge.core.protocols import Cost, Need, Unlearned
from expunge.core.recipe import Pruning, Recipe, Sharding
from expunge.core.records import Records
from expunge.core.request import Request
from expunge.core.store import Artefact, Store
from expunge.core.trained import Trained, TrainingLog
from expunge.datasets import load_records
from expunge.learn.build import allow_code
from expunge.learn.loop import Keep
from expunge.learn.many import train_many
from expunge.learn.shards import ShardSizes, ShardWarning, shard_sizes
from expunge.learn.training import adopt, load, train
from expunge.study import Comparison, Scenario, Study, StudyResult, compare, run_study
from expunge.unlearn import (
    AmnesiacUnlearning,
    BadTeacher,
    BoundaryShrink,
    FineTune,
    FisherForgetting,
    GradientAscent,
    InfluenceUnlearning,
    L1Sparse,
    Magnitude,
    Masked,
    Method,
    NegGradPlus,
    Pruned,
    RandomLabels,
    RandomScores,
    Retrain,
    RetrainBriefly,
    RetrainSameMask,
    SaliencyMasked,
    SalUn,
    Scrub,
    SelectiveSynapticDampening,
    Sisa,
    SynFlow,
    UnrollingSGD,
)

__all__ = [
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
