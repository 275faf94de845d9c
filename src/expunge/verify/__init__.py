"""Verification of unlearning: what owners and auditors can find out about a provider that says it deleted."""

from expunge.learn.secret_triggers import TriggerKey, plant
from expunge.learn.trigger_families import Columns, Pixels, SecretTrigger
from expunge.verify.backdoor import BackdoorVerifier, Calibration, verify_backdoor
from expunge.verify.binomial import BinomialTest, Needed, PooledTest, queries_needed
from expunge.verify.coin import Coin, CoinRegistry, Commitments, commit
from expunge.verify.counted import CountedTest
from expunge.verify.rank import rank_p_value
from expunge.verify.recorded import record
from expunge.verify.recorder import Recorder, recording
from expunge.verify.reproduce import Replay, accepted, replay_shards
from expunge.verify.spot import All, Both, Chosen, Random, TopQ, chance_of_missing
from expunge.verify.stage import Share, VerifyStage
from expunge.verify.states import Stepper
from expunge.verify.tolerance import ForgeableWarning, Tolerance, calibrate_tolerance
from expunge.verify.transcript import Contract, Transcript

__all__ = [
    "All",
    "BackdoorVerifier",
    "BinomialTest",
    "Both",
    "Calibration",
    "Chosen",
    "Coin",
    "CoinRegistry",
    "Columns",
    "Commitments",
    "Contract",
    "CountedTest",
    "ForgeableWarning",
    "Needed",
    "Pixels",
    "PooledTest",
    "Random",
    "Recorder",
    "Replay",
    "SecretTrigger",
    "Share",
    "Stepper",
    "Tolerance",
    "TopQ",
    "Transcript",
    "TriggerKey",
    "VerifyStage",
    "accepted",
    "calibrate_tolerance",
    "chance_of_missing",
    "commit",
    "plant",
    "queries_needed",
    "rank_p_value",
    "record",
    "recording",
    "replay_shards",
    "verify_backdoor",
]
