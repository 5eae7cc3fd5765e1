"""Equations between axes: products, sums, what cannot hold, and what is dynamic but not locked."""

import itertools
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from graphclone.axes.axis import (
    TOO_MANY_TERMS,
    Axis,
    Equations,
    describe,
    divide,
    find,
    first_lock,
    free_leaves,
    leaves,
    lock,
    multiply,
    product,
    total,
)


def atom(size: int) -> Axis:
    return Axis((size, size))


def atoms(*sizes: int) -> list[Axis]:
    return [atom(size) for size in sizes]


def equated(a: Axis, b: Axis) -> str:
    """Return what the two are once they are one, or the lock that came instead."""
    equations = Equations()
    equations.why = "the test"
    equations.equate(a, b)
    if first_lock(a) or first_lock(b):
        return f"locked: {first_lock(a)}"
    assert [id(leaf) for leaf in leaves(a)] == [id(leaf) for leaf in leaves(b)]
    return describe(a)


# products -------------------------------------------------------------------------------------------------------


def test_an_atom_takes_the_structure_of_a_product():
    assert equated(atom(48), product(atoms(3, 16))) == "(3 16)"


def test_equal_products_are_matched_factor_by_factor():
    heads, width = atoms(3, 16)
    other = product(atoms(3, 16))
    assert equated(product((heads, width)), other) == "(3 16)"
    assert find(heads) is find(other).parts[0] or find(find(other).parts[0]) is find(heads)


def test_a_coarser_factor_is_refined():
    assert equated(product(atoms(6, 8)), product(atoms(3, 16))) in ("(3 (2 8))", "((3 2) 8)")


def test_factors_that_share_no_refinement_lock():
    assert equated(product(atoms(4, 6)), product(atoms(6, 4))) == "locked: the test"


def test_units_vanish_in_products():
    one, three = atoms(1, 3)
    assert product((one, three)) is three
    assert equated(product((atom(3), atom(1), atom(5))), atom(15)) == "(3 5)"


# sums -----------------------------------------------------------------------------------------------------------


def test_an_atom_takes_the_structure_of_a_sum():
    assert equated(atom(45), total(atoms(15, 15, 15))) == "(15 + 15 + 15)"


def test_sums_are_cut_where_either_ends():
    assert equated(total(atoms(10, 20)), total(atoms(15, 15))) == "((10 + 5) + 15)"


def test_a_sum_of_one_axis_with_itself_ties_the_halves():
    half = atom(8)
    whole = total((half, half))
    equations = Equations()
    equations.equate(whole, total(atoms(3, 5, 3, 5)))
    assert describe(half) == "(3 + 5)"
    assert len({id(leaf) for leaf in leaves(whole)}) == 2


def test_a_leading_sum_distributes_over_a_product():
    x, y, r = atoms(2, 3, 5)
    assert (
        equated(product((total((x, y)), r)), total((product(atoms(2, 5)), product(atoms(3, 5))))) == "((2 5) + (3 5))"
    )


def test_fused_heads_inside_a_product():
    heads, width = atoms(4, 8)
    fused = product((heads, total((width, width, width))))
    assert equated(fused, product((atom(4), atom(24)))) == "(4 (8 + 8 + 8))"


def test_falcon_groups():
    groups, queries, width = atoms(2, 3, 8)
    fused = product((groups, total((queries, atom(1), atom(1))), width))
    assert equated(fused, product((atom(2), atom(5), atom(8)))) == "(2 (3 + 1 + 1) 8)"


def test_units_keep_their_place_in_sums_and_empty_parts_vanish():
    first, rest = atoms(1, 11)
    assert describe(total((first, atom(0), rest))) == "(1 + 11)"


def test_more_terms_than_anyone_means_lock():
    many = total(atoms(*[2] * (TOO_MANY_TERMS + 1)))
    assert equated(many, total(atoms(*[1] * 2 * (TOO_MANY_TERMS + 1)))) == "locked: the test"


# locks ----------------------------------------------------------------------------------------------------------


def test_different_sizes_lock_both():
    a, b = atoms(12, 13)
    assert equated(a, b) == "locked: the test"
    assert a.lock and b.lock


def test_a_lock_travels_to_everything_an_atom_becomes():
    whole = atom(48)
    lock(whole, "channels")
    parts = product(atoms(3, 16))
    Equations().equate(whole, parts)
    assert [leaf.lock for leaf in leaves(parts)] == ["channels", "channels"]


def test_the_first_reason_stays():
    axis = atom(5)
    lock(axis, "first")
    lock(axis, "second")
    assert first_lock(axis) == "first"


def test_an_opaque_axis_locks_without_giving_structure():
    opaque = total(atoms(4, 8))
    lock(opaque, "scan")
    other = product(atoms(3, 4))
    Equations().equate(opaque, other)
    assert {leaf.lock for leaf in leaves(other)} == {"scan"}
    assert [leaf.size[0] for leaf in leaves(other)] == [3, 4]


def test_blocks_that_share_pairs_inside_heads_are_settled_once():
    (heads, pair), (count, part, entry) = atoms(6, 16), atoms(6, 2, 16)
    for axis in (pair, part, entry):
        lock(axis, "whole")
    halves = total((pair, pair))
    equations = Equations()
    for _ in range(2):  # another operator reads the same heads
        equations.equate(product((heads, halves)), product((count, part, entry)))
    assert find(heads) is find(count)
    assert free_leaves(heads) == [find(heads)]
    assert [leaf.size[0] for leaf in leaves(halves)] == [2, 16]


def test_locking_one_part_leaves_the_other_free():
    heads, width = atoms(3, 16)
    merged = product((heads, width))
    lock(width, "pairs")
    assert free_leaves(merged) == [heads]


# dynamic is not locked ------------------------------------------------------------------------------------------


def test_a_dynamic_axis_is_never_free_and_not_locked():
    batch = Axis((2, 3))
    assert free_leaves(batch) == [] and first_lock(batch) is None and describe(batch) == "?"


def test_a_static_factor_of_a_dynamic_axis_is_free():
    merged, width = Axis((128, 192)), atom(64)
    Equations().equate(merged, product((Axis((2, 3)), width)))
    assert free_leaves(merged) == [find(width)]


def test_a_lock_on_a_dynamic_axis_reaches_the_static_factor_found_later():
    merged = Axis((128, 192))
    lock(merged, "picked at run time")
    width = atom(64)
    Equations().equate(merged, product((Axis((2, 3)), width)))
    assert free_leaves(width) == [] and first_lock(width) == "picked at run time"


# sizes ----------------------------------------------------------------------------------------------------------


def test_sizes_multiply_and_divide_by_probe():
    assert multiply([(2, 3), (5, 7)]) == (10, 21)
    assert divide((10, 21), (2, 3)) == (5, 7)
    assert divide((10, 20), (2, 3)) is None


factors = st.lists(st.integers(2, 4), min_size=1, max_size=5)


@given(factors, st.data())
def test_any_two_groupings_of_the_same_factors_become_one(sizes, data):
    def grouped() -> Axis:
        cuts = sorted(data.draw(st.sets(st.integers(1, max(1, len(sizes) - 1)), max_size=3)))
        bounds = [0, *(cut for cut in cuts if cut < len(sizes)), len(sizes)]
        return product([atom(math.prod(sizes[a:b])) for a, b in itertools.pairwise(bounds)])

    one, other = grouped(), grouped()
    result = equated(one, other)
    assert math.prod(leaf.size[0] for leaf in leaves(one)) == math.prod(sizes)
    assert result.startswith("locked") or describe(one) == describe(other)


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 0, 1), (1, 2, 0), (2, 1, 0)])
def test_the_order_of_equations_does_not_matter(order):
    whole, pair, triple = atom(48), product(atoms(3, 16)), product(atoms(3, 2, 8))
    twins = [(whole, pair), (pair, triple), (triple, whole)]
    equations = Equations()
    for index in order:
        equations.equate(*twins[index])
    assert [leaf.size[0] for leaf in leaves(whole)] == [3, 2, 8]
    assert len({id(find(leaf)) for axis in (whole, pair, triple) for leaf in leaves(axis)}) == 3


def test_a_few_units_in_a_row_lock_nothing():
    """Of queries, keys and values in one axis, one is picked after another: each pick is an equation."""
    equations = Equations()
    packed = Axis((3, 3))
    equations.equate(packed, total((Axis((1, 1)), Axis((2, 2)))))
    equations.equate(packed, total((Axis((1, 1)), Axis((1, 1)), Axis((1, 1)))))
    equations.equate(packed, total((Axis((2, 2)), Axis((1, 1)))))
    assert [(leaf.size, leaf.lock) for leaf in leaves(packed)] == [((1, 1), None)] * 3
