from __future__ import annotations

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnxc.ir.dims import (
    Dim,
    as_symbol,
    bounds,
    ceildiv,
    dim_max,
    dim_min,
    divide_exactly,
    evaluate,
    floordiv,
    known_le,
    linear,
    mentions,
    modulo,
    parse_dim,
    product,
    remainder_in,
    substitute,
    symbol,
    symbols,
)

from .strategies import ODD_SYMBOLS, SYMBOLS, Tree, bindings, build, calculate, dims, trees

N, M, J, K = SYMBOLS["n"], SYMBOLS["m"], SYMBOLS["j"], symbol("k")
SIGNED = SYMBOLS["i"]
check = settings(deadline=None, max_examples=300)


@check
@given(trees, bindings())
def test_arithmetic_agrees_with_integers(tree: Tree, values: dict[str, int]) -> None:
    assert evaluate(build(tree), values) == calculate(tree, values)


@check
@given(trees, st.sampled_from([2, 8, 24]), bindings())
def test_remainders_are_found_again(tree: Tree, size: int, values: dict[str, int]) -> None:
    """What is taken apart as rest + factor * (a mod n) is the same number; a mod n itself is found."""
    for dim in (build(tree) % size, build(tree) * 3 + build(tree) // 4 % size):
        found = remainder_in(dim)
        if found is not None:
            rest, factor, a, n = (evaluate(part, values) for part in found)
            assert rest + factor * (a % n) == evaluate(dim, values)
    x = symbol("x")
    assert remainder_in(x // 8 % size) == (0, 1, x // 8, size)


@check
@given(trees, bindings())
def test_bounds_hold_every_value(tree: Tree, values: dict[str, int]) -> None:
    lower, upper = bounds(build(tree))
    value = calculate(tree, values)
    assert (-math.inf if lower is None else lower) <= value <= (math.inf if upper is None else upper)


@check
@given(trees, trees, st.booleans(), bindings())
def test_known_le_is_sound(left: Tree, right: Tree, add: bool, values: dict[str, int]) -> None:
    if add:  # so that both answers occur
        right = ("+", left, right)
    if known_le(build(left), build(right)):
        assert calculate(left, values) <= calculate(right, values)


@check
@given(dims, bindings(), st.sets(st.sampled_from(sorted(SYMBOLS))))
def test_substituting_numbers_agrees_with_evaluation(dim: Dim, values: dict[str, int], names: set[str]) -> None:
    rest = substitute(dim, {name: values[name] for name in names})
    assert not names & {symbol.name for symbol in symbols(rest)}
    assert evaluate(rest, values) == evaluate(dim, values)
    assert substitute(dim, dict(values)) == evaluate(dim, values)


@check
@given(dims, trees, bindings())
def test_substituting_a_dim_agrees_with_evaluation(dim: Dim, tree: Tree, values: dict[str, int]) -> None:
    size = dim_max(build(tree), 0)
    assert evaluate(substitute(dim, {"n": size}), values) == evaluate(dim, values | {"n": evaluate(size, values)})


@check
@given(dims)
def test_text_reads_back(dim: Dim) -> None:
    assert parse_dim(str(dim), SYMBOLS) == dim


@pytest.mark.parametrize("odd", ODD_SYMBOLS, ids=str)
def test_any_name_of_a_symbol_reads_back(odd: Dim) -> None:
    dim = floordiv(odd * N + odd, 3) - 2 * odd
    assert parse_dim(str(dim)) == dim
    assert as_symbol(parse_dim(str(odd))) == as_symbol(odd)


@pytest.mark.parametrize(
    "text", ["", "n +", "n.m", "1.5", "True", "min()", "floordiv(n)", "n // 0", "pow(n, 2)", "n = 1", "n m", "(" * 9999]
)
def test_what_is_no_dimension_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="not a dimension"):
        parse_dim(text)


def test_operators_and_functions_that_people_write() -> None:
    assert parse_dim(" 2*(n + 1) - k % 3 ") == 2 * N + 2 - modulo(K, 3)
    assert parse_dim("ceildiv(n, 2)") == parse_dim("(n + 1) // 2") == ceildiv(N, 2)
    assert parse_dim("max(n, 0)") == N and parse_dim("max(n, 0)", {"n": SIGNED}) == dim_max(0, SIGNED) != SIGNED


@check
@given(dims, dims, dims)
def test_equal_polynomials_compare_equal(a: Dim, b: Dim, c: Dim) -> None:
    assert (a + b) * c == a * c + b * c
    assert a + b == b + a and a * b == b * a
    assert (a + b) + c == a + (b + c) and (a * b) * c == a * (b * c)
    assert a - a == 0 and a - b == -(b - a)
    assert hash((a + b) * c) == hash(c * b + c * a)
    assert dim_min(a, dim_min(b, c)) == dim_min(dim_min(c, a), b)


@check
@given(dims, st.integers(1, 9) | st.sampled_from([M, 2 * M, M * M, M + 1, K + 1]))
def test_splitting_and_merging_an_axis_cancels(index: Dim, size: Dim) -> None:
    assert floordiv(index, size) * size + modulo(index, size) == index


@pytest.mark.parametrize("size", [5, K, K + 1, 3 * K, K * M], ids=str)
def test_merging_and_splitting_axes_cancels(size: Dim) -> None:
    outer, inner = symbol("outer"), symbol("inner", 0, size - 1)
    merged = outer * size + inner
    assert floordiv(merged, size) == outer
    assert modulo(merged, size) == inner
    assert floordiv(merged * 4 + 3, 4 * size) == outer


def test_quotients_simplify() -> None:
    assert floordiv(floordiv(N, 2), 3) == floordiv(N, 6)
    assert floordiv(6 * N + 5, 4) == N + floordiv(N + 2, 2)
    assert floordiv(4 * N, 4) == N == floordiv(N * K, K)
    assert floordiv((N + 1) * K, N + 1) == K
    assert modulo(4 * N + modulo(SIGNED, 4), 4) == modulo(SIGNED, 4)
    assert floordiv(J, M) == 0
    with pytest.raises(ZeroDivisionError):
        floordiv(N, 0)
    assert floordiv(N * M * 3, N * 12) == floordiv(M, 4)
    assert floordiv(N * M, N * M) == 1


def test_extrema_simplify() -> None:
    assert dim_min(N, N + 1, N + K) == N
    assert dim_max(J, M) == M
    assert dim_min(M, 8) == M and dim_max(M, 1) == M
    assert dim_max(dim_max(N, K), 3) == dim_max(3, K, N)


def test_bounds_that_index_checks_rely_on() -> None:
    assert bounds(modulo(SIGNED, 5)) == (0, 4)
    assert bounds(3 - 2 * modulo(N, 4)) == (-3, 3)
    assert known_le(J + 1, M) and not known_le(M, J)
    assert known_le(N * 4 + modulo(K, 4), 4 * N + 3)
    assert bounds(dim_min(N, 7)) == (0, 7)
    assert bounds(N) == (0, None)
    assert bounds(SIGNED * SIGNED) == (-16, 16)


@check
@given(dims, st.sampled_from(sorted(SYMBOLS)))
def test_linear_splits_off_a_symbol(dim: Dim, name: str) -> None:
    split = linear(dim, name)
    if not mentions(dim, name):
        assert split == (0, dim)
    if split is not None:
        coefficient, rest = split
        assert coefficient * SYMBOLS[name] + rest == dim
        assert not mentions(coefficient, name) and not mentions(rest, name)


def test_linear_refuses_what_is_not() -> None:
    assert linear(N * N + M, "n") is None and linear(floordiv(N, 2), "n") is None
    assert linear(3 * N * M + K, "n") == (3 * M, K)


@check
@given(dims, st.sampled_from([1, 2, 6, N, 2 * N, N * M, 3 * N + M]))
def test_exact_division(dim: Dim, divisor: Dim) -> None:
    assert divide_exactly(dim * divisor, divisor) == dim
    quotient = divide_exactly(dim, divisor)
    assert quotient is None or quotient * divisor == dim


def test_reading_a_dim() -> None:
    dim = 2 * N * K + floordiv(M, 3)
    assert {symbol.name for symbol in symbols(dim)} == set("nkm")
    assert as_symbol(N) is not None and as_symbol(2 * N) is None and as_symbol(3) is None
    assert product([2, N, K]) == 2 * N * K and product([]) == 1
    with pytest.raises(KeyError, match="k"):
        evaluate(dim, {"n": 1, "m": 2})


def test_exact_division_where_terms_cancel() -> None:
    quotient = N // 2 + M - 3 * N
    assert divide_exactly(quotient * (M + 3 * N), M + 3 * N) == quotient
    assert divide_exactly(N * N - M * M, N + M) == N - M
    assert divide_exactly(N * N + M * M, N + M) is None
