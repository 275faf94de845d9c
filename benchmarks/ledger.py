"""How quick the ledger is: filing against bare commits, proofs at 100,000 entries, registering, bundles.

    python benchmarks/ledger.py --quick                   # under a minute on two cores
    python benchmarks/ledger.py                           # more rounds
    python benchmarks/ledger.py --postgres postgresql+psycopg://user@host/empty

SQLite in /var/tmp, where that is there, as `/tmp` may be memory; then the same on PostgreSQL: the empty database that
is given, or a server started for the time of this run, or not at all if there is none. Two that are compared take
turns; medians over rounds. The last line is one JSON, of PostgreSQL with ``postgres_`` before each name:

    submit_share_of_commit_rate  requests filed one by one / bare commits, a second, in the same rounds
    raw_commits_per_s            one small row a transaction, by sqlite3 or psycopg alone, as durable as the ledger
    submit_per_s                 `requests.submit`, one after the other
    batch_submit_per_s           `requests.submit_many`, 1,000 at once
    entries                      size of the log for the proofs (with --quick on PostgreSQL only 10,000)
    prove_us, verify_us          read one entry and prove it, the tree being in memory; check that proof
    pymerkle_prove_ratio         pymerkle's proof in memory / ours in memory, at the same size; on no database
    pymerkle_verify_ratio        pymerkle's check of such a proof / ours
    register_60000_s             commit to 60,000 rows and anchor the set in the log
    complete_us                  of one request, in a run of many
    bundle_ms, check_bundle_ms   make, and check, a bundle for a model of 60,000 rows
"""

from __future__ import annotations

import argparse
import json
import random
import sqlite3
import statistics
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import count
from pathlib import Path
from typing import Any

import torch
from _timing import paired, seconds

from expunge import Records
from expunge.ledger import check
from expunge.ledger.ledger import Ledger
from expunge.ledger.log import Entry
from expunge.ledger.requests import Submission

sys.path.append(str(Path(__file__).resolve().parent.parent / "tests" / "ledger"))
import kit
from postgres import Missing, Server, plain

ENTRIES, ROWS = 100_000, 60_000
BLOCK = 25
Figures = dict[str, float]


def main() -> None:
    """Run all on each database, print each figure with what it means, and the JSON last."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="fewer rounds")
    parser.add_argument("--postgres", metavar="URL", help="an empty database; what is written stays there")
    words = parser.parse_args()
    torch.set_num_threads(1)
    figures: Figures = {}
    disk = "/var/tmp" if Path("/var/tmp").is_dir() else None
    with tempfile.TemporaryDirectory(prefix="expunge-bench-", dir=disk) as folder:
        url = f"sqlite:///{folder}/ledger.db"
        figures |= measured("SQLite", url, lambda: bare_sqlite(f"{folder}/bare.db"), words.quick)
    try:
        with postgres(words.postgres) as url:
            found = measured("PostgreSQL", url, lambda: bare_postgres(plain(url)), words.quick)
        figures |= {f"postgres_{name}": value for name, value in found.items()}
    except Missing as error:
        print(f"PostgreSQL: {error}")
    print(json.dumps({name: round(value, 4) for name, value in figures.items()}))


@contextmanager
def postgres(url: str | None) -> Iterator[str]:
    """The database that was given, or one of a server that ends with the block."""
    if url is not None:
        yield url
        return
    with Server() as server, server.database() as made:
        yield made


def measured(name: str, url: str, bare: Callable[[], Callable[[], None]], quick: bool) -> Figures:
    """All figures of one database."""
    ledger = Ledger(url, kit.KEYS)
    try:
        figures = {
            **models(ledger, requests=50 if quick else 1000),
            **filing(ledger, bare(), rounds=20 if quick else 100),
            **proofs(ledger, 10_000 if quick and not ledger.database.on_sqlite else ENTRIES, rounds=5 if quick else 21),
        }
    finally:
        ledger.close()
    for figure, value in figures.items():
        print(f"{name:10s} {figure:28s} {value:12,.3f}")
    return figures


def bare_sqlite(path: str) -> Callable[[], None]:
    """One durable transaction of one row, as the ledger's files are set."""
    connection = sqlite3.connect(path, isolation_level=None)
    for pragma in ("journal_mode=WAL", "synchronous=FULL", "secure_delete=ON", "temp_store=MEMORY"):
        connection.execute(f"PRAGMA {pragma}")
    connection.execute("CREATE TABLE bare (x INTEGER)")

    def commit() -> None:
        connection.execute("BEGIN IMMEDIATE")
        connection.execute("INSERT INTO bare VALUES (1)")
        connection.execute("COMMIT")

    return commit


def bare_postgres(conninfo: str) -> Callable[[], None]:
    """One durable transaction of one row in the same database."""
    import psycopg

    connection = psycopg.connect(conninfo)
    connection.execute("CREATE TABLE bare (x INTEGER)")
    connection.commit()

    def commit() -> None:
        connection.execute("INSERT INTO bare VALUES (1)")
        connection.commit()

    return commit


def filing(ledger: Ledger, commit: Callable[[], None], rounds: int) -> Figures:
    """Requests one by one, in turn with bare commits; and a thousand at once."""
    numbers = count()

    def submission() -> Submission:
        number = next(numbers)
        return Submission(model="m", kind="remove", body=b'{"owner":"o-%d"}' % number, key=f"bench-{number}")

    def bare() -> None:
        for _ in range(BLOCK):
            commit()

    def submit() -> None:
        for _ in range(BLOCK):
            ledger.requests.submit(submission())

    bare()
    submit()
    one = paired(bare, submit, rounds)
    batches = [[submission() for _ in range(1000)] for _ in range(6)]
    taken = [seconds(lambda batch=batch: ledger.requests.submit_many(batch)) for batch in batches]
    return {
        "submit_share_of_commit_rate": one.ratio,
        "raw_commits_per_s": BLOCK / one.slow_s,
        "submit_per_s": BLOCK / one.quick_s,
        "batch_submit_per_s": 1000 / statistics.median(taken[1:]),
    }


def proofs(ledger: Ledger, size: int, rounds: int) -> Figures:
    """Proofs that entries of a long log are in it, with and without reading them; and another program's."""
    grow(ledger, size)
    log, root = ledger.log, ledger.log.tree().root(size)
    chosen = random.Random(0).sample(range(size), 200)

    def prove(index: int) -> tuple[Entry, list[bytes]]:
        return log.entry(index), log.tree().inclusion(index, size)

    def verify(entry: Entry, proof: list[bytes]) -> None:
        if not check.proves_inclusion(entry.leaf(), entry.index, size, proof, root):
            raise SystemExit("a proof is not good: no speed is worth that")

    proved = [prove(index) for index in chosen]
    read_s = [seconds(lambda: [prove(index) for index in chosen]) for _ in range(rounds)]
    verify_s = [seconds(lambda: [verify(*one) for one in proved]) for _ in range(rounds)]
    figures = {
        "entries": float(size),
        "prove_us": statistics.median(read_s) / len(chosen) * 1e6,
        "verify_us": statistics.median(verify_s) / len(chosen) * 1e6,
    }
    return figures | (against_pymerkle(ledger, chosen, root, rounds) if ledger.database.on_sqlite else {})


def grow(ledger: Ledger, wanted: int) -> None:
    """Append to the log, some thousand at once, until it has so many entries."""
    body = {"body_mac": "0" * 64, "key_mac": "0" * 64, "kind": "remove", "model": "m", "state": "received"}
    while (size := len(ledger.log)) < wanted:
        events = [("received", f"bench-{size + i}", body) for i in range(min(5000, wanted - size))]
        with ledger.database.write() as connection:
            ledger.log.append(connection, events, ledger.database.utc(connection))


def against_pymerkle(ledger: Ledger, chosen: list[int], root: bytes, rounds: int) -> Figures:
    """The same proofs, made and verified in memory by another program; nothing if it is not installed."""
    try:
        import pymerkle
    except ImportError:
        print("pymerkle is not installed, so its proofs are not compared")
        return {}
    ours, size = ledger.log.tree(), ENTRIES
    entries = [check.canonical(entry.to_json()) for entry in ledger.log.entries()][:size]
    theirs = pymerkle.InmemoryTree(algorithm="sha256")
    for entry in entries:
        theirs.append_entry(entry)
    if theirs.get_root(size) != root:
        raise SystemExit("pymerkle has another root: no speed is worth that")
    made = [(ours.leaf(i), theirs.prove_inclusion(i + 1, size), ours.inclusion(i, size), i) for i in chosen]
    prove = paired(
        lambda: [theirs.prove_inclusion(index + 1, size) for index in chosen],
        lambda: [ours.inclusion(index, size) for index in chosen],
        rounds,
    )
    verify = paired(
        lambda: [pymerkle.verify_inclusion(leaf, root, proof) for leaf, proof, _, _ in made],
        lambda: [check.proves_inclusion(leaf, index, size, proof, root) for leaf, _, proof, index in made],
        rounds,
    )
    return {"pymerkle_prove_ratio": prove.ratio, "pymerkle_verify_ratio": verify.ratio}


def models(ledger: Ledger, requests: int) -> Figures:
    """A model of 60,000 rows, and one run that completes many requests about it."""
    pixels = torch.randint(0, 255, (ROWS, 784), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    names = [f"r-{i}" for i in range(ROWS)]
    records = Records(pixels, torch.arange(ROWS) % 10, names, [f"o-{i % 200}" for i in range(ROWS)])
    records.digests()  # training has needed them already
    register_s = seconds(lambda: ledger.models.register("m", "a" * 64, "f1", records))
    filed = ledger.requests.submit_many(
        [Submission(model="m", kind="remove", body=kit.asking(name), key=name) for name in names[:requests]]
    )
    ids = [one.id for one, _ in filed]
    for one in ids:
        ledger.requests.screening(one)
        ledger.requests.screened(one, held=None)
    run = ledger.runs.claim("m", "bench", most=requests)
    while run is not None and run.step != "switched":
        run = kit.advance(ledger, run)
    complete_s = seconds(lambda: kit.finish(ledger, run))
    ledger.certificates.sign()
    ledger.log.checkpoint()
    made: list[Any] = [None] * 20
    bundle_s = [seconds(lambda i=i: made.__setitem__(i, ledger.certificates.bundle(ids[i]))) for i in range(20)]
    check_s = [seconds(lambda one=one: _refuse_bad(one)) for one in made]
    return {
        "register_60000_s": register_s,
        "complete_us": complete_s / requests * 1e6,
        "bundle_ms": statistics.median(bundle_s) * 1e3,
        "check_bundle_ms": statistics.median(check_s) * 1e3,
    }


def _refuse_bad(bundle: bytes) -> None:
    checked = check.check_bundle(bundle, kit.KEYS.trusted)
    if not checked.passed:
        raise SystemExit(f"a bundle is not good: no speed is worth that\n{checked}")


if __name__ == "__main__":
    main()
