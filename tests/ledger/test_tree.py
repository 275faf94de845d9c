"""The log's tree against another program's, and every forged proof refused."""

from __future__ import annotations

import hashlib
from typing import Any

import pymerkle
import pytest

from expunge.core.errors import Misuse
from expunge.ledger import check
from expunge.ledger.tree import Tree

SIZES = range(1, 71)
DATA = [f"entry {i}".encode() for i in range(70)]


@pytest.fixture(scope="module")
def ours() -> Tree:
    """A tree over 70 entries."""
    return Tree(map(check.leaf_hash, DATA))


@pytest.fixture(scope="module")
def theirs() -> Any:
    """pymerkle's tree over the same entries."""
    tree = pymerkle.InmemoryTree(algorithm="sha256")
    for data in DATA:
        tree.append_entry(data)
    return tree


def test_our_hashes_and_roots_are_those_of_the_other_program(ours: Tree, theirs: Any) -> None:
    for size in SIZES:
        root = theirs.get_root(size)
        assert ours.leaf(size - 1) == theirs.get_leaf(size)
        assert ours.root(size) == root
        assert Tree(ours.leaf(i) for i in range(size)).root() == root
        assert check.tree_root([ours.leaf(i) for i in range(size)]) == root


def test_the_empty_tree_has_the_root_of_the_standard() -> None:
    assert Tree().root() == check.tree_root([]) == hashlib.sha256(b"").digest()


def test_our_checker_takes_all_inclusion_proofs_of_the_other_program(ours: Tree, theirs: Any) -> None:
    for size in SIZES:
        for index in range(size):
            made = theirs.prove_inclusion(index + 1, size)
            path = made.path[1:]  # theirs begins with the leaf itself
            assert path == ours.inclusion(index, size)
            assert check.proves_inclusion(ours.leaf(index), index, size, path, theirs.get_root(size))


def test_the_other_program_takes_our_inclusion_proofs_and_refuses_them_for_another_entry(
    ours: Tree, theirs: Any
) -> None:
    for size in SIZES:
        root = theirs.get_root(size)
        for index in range(0, size, 3):
            made = theirs.prove_inclusion(index + 1, size)
            made.path = [ours.leaf(index), *ours.inclusion(index, size)]
            pymerkle.verify_inclusion(ours.leaf(index), root, made)
            with pytest.raises(pymerkle.InvalidProof):
                pymerkle.verify_inclusion(check.leaf_hash(b"another"), root, made)


def test_the_other_program_takes_a_consistency_proof_of_our_hashes(ours: Tree, theirs: Any) -> None:
    for new in SIZES:
        for old in range(1, new + 1, 2):
            made = theirs.prove_consistency(old, new)
            proof = ours.consistency(old, new)
            mine = {node: node for node in (*proof, ours.root(old))}
            assert set(made.path) | {ours.root(old)} == set(mine)
            made.path = [mine[node] for node in made.path]
            pymerkle.verify_consistency(ours.root(old), ours.root(new), made)
            with pytest.raises(pymerkle.InvalidProof):
                pymerkle.verify_consistency(check.leaf_hash(b"another"), ours.root(new), made)


def test_every_other_index_size_leaf_root_or_length_of_an_inclusion_proof_is_refused(ours: Tree) -> None:
    for size in SIZES:
        for index in {0, size // 3, size // 2, size - 1}:
            leaf, proof, root = ours.leaf(index), ours.inclusion(index, size), ours.root(size)
            other = [(leaf, place, size, proof, root) for place in range(-1, size + 1) if place != index]
            other += [(leaf, index, size, proof[:cut] + proof[cut + 1 :], root) for cut in range(len(proof))]
            other += [
                (leaf, index, size, [*proof[:cut], proof[cut][::-1], *proof[cut + 1 :]], root)
                for cut in range(len(proof))
            ]
            other += [
                (leaf, index, size, [*proof, bytes(32)], root),
                (leaf, index, size, [bytes(32), *proof], root),
                (leaf, index, size, proof, bytes(32)),
                (bytes(32), index, size, proof, root),
            ]
            assert not any(check.proves_inclusion(*one) for one in other)


def test_an_inner_node_is_not_taken_for_an_entry(ours: Tree) -> None:
    """The data of a forged entry are the two hashes below a node; without their own first byte they would do."""
    pair, rest = ours.leaf(0) + ours.leaf(1), ours.inclusion(0, 4)[1:]
    assert check.proves_inclusion(hashlib.sha256(b"\x01" + pair).digest(), 0, 2, rest, ours.root(4))
    assert not check.proves_inclusion(check.leaf_hash(pair), 0, 2, rest, ours.root(4))


def test_our_checker_takes_all_consistency_proofs_and_refuses_them_for_another_history(ours: Tree) -> None:
    for new in SIZES:
        for old in range(1, new + 1):
            proof = ours.consistency(old, new)
            assert check.proves_consistency(old, new, ours.root(old), ours.root(new), proof)
            if (new + old) % 5:
                continue
            bad = [proof[:place] + proof[place + 1 :] for place in range(len(proof))]
            bad += [[*proof[:place], bytes(32), *proof[place + 1 :]] for place in range(len(proof))]
            bad += [[*proof, bytes(32)]]
            assert not any(check.proves_consistency(old, new, ours.root(old), ours.root(new), one) for one in bad)
            assert not check.proves_consistency(old, new, ours.root(new), ours.root(old), proof) or old == new


def test_a_log_with_one_entry_changed_is_no_continuation_of_the_first(ours: Tree) -> None:
    for size in (2, 7, 8, 33, 70):
        for changed in {0, size // 2, size - 1}:
            leaves = [ours.leaf(i) for i in range(size)]
            leaves[changed] = check.leaf_hash(b"rewritten")
            other = Tree([*leaves, check.leaf_hash(b"new")])
            for proof in (other.consistency(size), Tree([*map(ours.leaf, range(size)), bytes(32)]).consistency(size)):
                assert not check.proves_consistency(size, size + 1, ours.root(size), other.root(), proof)


@pytest.mark.parametrize(("old", "new"), [(0, 5), (-1, 5), (6, 5), (0, 0)])
def test_a_consistency_proof_from_nothing_or_backwards_is_refused(ours: Tree, old: int, new: int) -> None:
    assert not check.proves_consistency(old, new, ours.root(5), ours.root(5), [])
    with pytest.raises(Misuse):
        ours.consistency(old, new)


@pytest.mark.parametrize(("index", "size"), [(-1, 5), (5, 5), (0, 71), (0, 0)])
def test_no_inclusion_proof_is_made_for_what_is_not_there(ours: Tree, index: int, size: int) -> None:
    with pytest.raises(Misuse):
        ours.inclusion(index, size)


def test_roots_of_sizes_that_never_were_are_refused(ours: Tree) -> None:
    for size in (-1, 71):
        with pytest.raises(Misuse):
            ours.root(size)
