"""Digests against hashlib, row by row; orders and keys against what they must not depend on."""

import hashlib
import hmac
import json
import struct

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from expunge.core import coins
from expunge.core.digest import array_of, canonical_json, digest_rows, digest_tensors, sha256_hex
from expunge.core.errors import Unsupported


def naive(row, label):
    """The documented digest of one row, by hand: header length, header, row bytes, label bytes."""
    row, label = np.asarray(row), np.asarray(label)
    header = json.dumps(
        [row.dtype.str, list(row.shape), label.dtype.str, list(label.shape)], separators=(",", ":")
    ).encode()
    return hashlib.sha256(struct.pack("<I", len(header)) + header + row.tobytes() + label.tobytes()).digest()


@pytest.mark.parametrize("dtype", [np.uint8, np.float32, np.float64, np.int64, np.bool_])
@pytest.mark.parametrize("shape", [(3,), (2, 5), (1, 2, 2)])
@pytest.mark.parametrize("targets", [(), (1,), (3,)])
def test_rows_against_hashlib(dtype, shape, targets):
    rng = np.random.default_rng(0)
    x = (rng.random((7, *shape)) * 9).astype(dtype)
    y = rng.random((7, *targets)) if targets else rng.integers(0, 5, 7)
    assert [bytes(row) for row in digest_rows(x, y)] == [naive(x[i], y[i]) for i in range(7)]


def test_no_rows_have_no_digests():
    assert digest_rows(np.empty((0, 3)), np.empty(0, np.int64)).shape == (0, 32)


def test_rows_of_other_dtype_or_shape_or_label_differ():
    zero = np.zeros((1, 4), np.float32)
    label = np.zeros(1, np.int64)
    pairs = [(zero, label), (zero.reshape(1, 2, 2), label), (zero.view(np.int32), label), (-zero, label)]
    pairs += [(zero, label + 1), (zero, label.astype(np.float64))]
    assert len({digest_rows(*pair).tobytes() for pair in pairs}) == len(pairs)


def test_digest_does_not_see_the_layout():
    x = torch.arange(24, dtype=torch.float32).reshape(4, 6)
    label = np.arange(4)
    layouts = [x, x.t().contiguous().t(), torch.cat([x, x], 1)[:, :6], x.clone().requires_grad_()]
    assert len({digest_rows(array_of(layout), label).tobytes() for layout in layouts}) == 1


def test_tensor_manifest_by_hand():
    tensors = {"b": torch.tensor([1.0, -0.0]), "a": torch.tensor(3)}
    rows = [
        ["a", "int64", [], hashlib.sha256(struct.pack("<q", 3)).hexdigest()],
        ["b", "float32", [2], hashlib.sha256(struct.pack("<2f", 1.0, -0.0)).hexdigest()],
    ]
    assert digest_tensors(tensors) == sha256_hex(canonical_json({"v": "tensor-manifest/1", "tensors": rows}))
    assert digest_tensors(tensors) == digest_tensors(dict(reversed(tensors.items())))
    assert digest_tensors(tensors) != digest_tensors({**tensors, "b": torch.tensor([1.0, 0.0])})


@pytest.mark.parametrize("change", [torch.Tensor.double, lambda t: t[:, None], lambda t: t + 1])
def test_tensor_digest_sees_dtype_shape_and_values(change):
    tensor = torch.arange(5.0)
    assert digest_tensors({"a": tensor}) != digest_tensors({"a": change(tensor)})
    assert digest_tensors({"a": tensor}) != digest_tensors({"b": tensor})


def test_bfloat16_is_its_sixteen_bits():
    tensor = torch.tensor([1.0, -2.0], dtype=torch.bfloat16)
    assert array_of(tensor).tobytes() == struct.pack("<2H", 0x3F80, 0xC000)
    assert digest_tensors({"a": tensor}) != digest_tensors({"a": tensor.view(torch.int16)})


def test_sparse_tensors_are_refused_in_one_line():
    with pytest.raises(Unsupported, match=r"^digests need dense tensors, got torch.sparse_coo; call .to_dense\(\).*$"):
        digest_tensors({"a": torch.eye(3).to_sparse()})


def test_canonical_json():
    assert canonical_json({"b": [1, 2.5, None], "a": "é"}) == '{"a":"é","b":[1,2.5,null]}'.encode()
    with pytest.raises(ValueError, match=r"not JSON compliant"):
        canonical_json(float("nan"))


def test_child_is_named_and_draws_nothing():
    rng = coins.generator(7)
    before = rng.get_state()
    first, again, other = coins.child(rng, "a", 1), coins.child(rng, "a", 1), coins.child(rng, "a", 2)
    assert torch.equal(rng.get_state(), before)
    assert first.initial_seed() == again.initial_seed() != other.initial_seed()
    torch.rand(3, generator=rng)  # what was drawn before changes no child
    assert coins.child(rng, "a", 1).initial_seed() == first.initial_seed()
    assert coins.child(coins.generator(8), "a", 1).initial_seed() != first.initial_seed()


def test_seed_of_is_the_hash_of_its_names():
    expected = int.from_bytes(hashlib.sha256(b'["a",1]').digest()[:8], "little") >> 1
    assert coins.seed_of("a", 1) == expected
    assert coins.seed_of("a", 1) != coins.seed_of("a", "1")


def test_bucket_against_hmac_and_a_uniform_spread():
    code = hmac.new(b"salt", b"owner", "sha256").digest()
    assert coins.bucket("salt", "owner", 7) == int.from_bytes(code, "big") % 7
    counts = np.bincount([coins.bucket("salt", f"owner-{i}", 10) for i in range(10_000)])
    assert np.square(counts - 1000).sum() / 1000 < 33.7  # chi-squared, 9 degrees: passes with probability 0.9999


@given(st.lists(st.integers(0, 2**64 - 1), min_size=1, max_size=40, unique=True), st.data())
@settings(max_examples=50, deadline=None, print_blob=True)
def test_removing_rows_leaves_the_order_of_the_others(keys, data):
    whole = np.array(keys, dtype=np.uint64)
    kept = np.array(data.draw(st.lists(st.booleans(), min_size=len(keys), max_size=len(keys))))
    order = [key for key in whole[coins.order(whole, 3, "x")] if key in set(whole[kept])]
    assert order == list(whole[kept][coins.order(whole[kept], 3, "x")])
    assert len(set(coins.draw(whole, 3, "x").tolist())) == len(keys)  # a bijection


def test_orders_of_two_names_have_nothing_in_common():
    keys = coins.row_keys([f"o{i}" for i in range(2000)], np.zeros((2000, 32), np.uint8))
    first, second = coins.order(keys, 0, "order", 0), coins.order(keys, 0, "order", 1)
    assert sorted(first) == list(range(2000))
    assert abs(np.corrcoef(np.argsort(first), np.argsort(second))[0, 1]) < 0.1


def test_keys_see_owner_and_content_only():
    digests = np.arange(96, dtype=np.uint8).reshape(3, 32)
    keys = coins.row_keys(["a", "b", "a"], digests)
    assert coins.row_keys(["a", "b"], digests[[2, 1]]).tolist() == keys[[2, 1]].tolist()
    assert coins.row_keys(["b", "b", "a"], digests)[0] != keys[0]
    expected = hashlib.sha256(digests[1].tobytes() + b"b").digest()[:8]
    assert int(keys[1]) == int.from_bytes(expected, "little")
