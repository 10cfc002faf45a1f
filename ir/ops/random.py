"""Random numbers as functions of their place: element i of a tensor is a hash of the tensor's key and i.

The key comes from the attribute `seed`, so such an operator gives the same numbers in each run, whatever the number of
threads and whatever is fused with it. Where a model gives no seed the key comes from the name of the result, and from
numbers that are others in each run (`passes.draws`). The hash is SplitMix64 (Steele, Lea & Flood 2014), a generator
that is a function of a counter.
"""

from __future__ import annotations

import hashlib
import math
import struct
from collections.abc import Mapping, Sequence

from ..dims import Dim
from ..dtypes import F32, F64, I32, I64, U64, DType
from ..functions import cast, cos, log, shift_right, sqrt, where
from ..scalars import Scalar, const, index
from ..tensors import Indices, Tensor, compute, flat_offset
from .declare import Context, Registry
from .reduction import best_position, reduce_max

declare = Registry()

_GOLDEN = 0x9E3779B97F4A7C15
_MULTIPLIERS = ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB))


def is_drawn(op: str, attributes: Mapping[str, object]) -> bool:
    """Whether an operator gives other numbers in each run: a random one without a seed."""
    return op in declare.operators and attributes.get("seed") is None


def _key(seed: float | None, context: Context) -> Scalar:
    """64 bits that tell the streams of different seeds apart, and those of different runs where there is no seed."""
    text = context.outputs[0].encode() if seed is None else struct.pack("<d", seed)
    key = const(int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "little"), U64)
    for word in context.draw if seed is None else ():
        key = _mixed(key ^ word * const(_GOLDEN, U64))
    return key


def _mixed(z: Scalar) -> Scalar:
    for shift, multiplier in _MULTIPLIERS:
        z = (z ^ shift_right(z, shift)) * const(multiplier, U64)
    return z ^ shift_right(z, 31)


def bits(key: Scalar, counter: Dim) -> Scalar:
    """The 64 random bits with this number."""
    return _mixed(cast(index(counter), U64) * const(_GOLDEN, U64) + key)


def uniform(key: Scalar, counter: Dim, dtype: DType) -> Scalar:
    """A number in [0, 1) of type f32 or f64, with as many random bits as it has digits."""
    if dtype == F64:
        return cast(cast(shift_right(bits(key, counter), 11), I64), F64) * 2.0**-53
    return cast(cast(shift_right(bits(key, counter), 40), I32), F32) * 2.0**-24


def _computed(shape: Sequence[Dim], dtype: DType, element: object, *sources: Tensor) -> Tensor:
    """element(flat index, indices, type to compute in), in the type wanted."""
    assert callable(element)
    wide = F64 if dtype == F64 else F32

    def at(*i: Dim) -> Scalar:
        found: Scalar = element(flat_offset(i, shape), i, wide)
        return cast(found, dtype)

    return compute(shape, dtype, at, *sources)


def _normal(shape: Sequence[Dim], dtype: DType, key: Scalar, mean: float, scale: float) -> Tensor:
    """By Box and Muller's transform of two uniform numbers each."""

    def element(at: Dim, _: Indices, wide: DType) -> Scalar:
        radius = sqrt(log(-(uniform(key, 2 * at, wide) - 1)) * -2.0)
        return radius * cos(uniform(key, 2 * at + 1, wide) * (2 * math.pi)) * scale + mean

    return _computed(shape, dtype, element)


def _uniform(shape: Sequence[Dim], dtype: DType, key: Scalar, low: float, high: float) -> Tensor:
    return _computed(shape, dtype, lambda at, _, wide: uniform(key, at, wide) * (high - low) + low)


@declare.op("RandomNormal", precise=("result",))
def random_normal(
    *,
    shape: Sequence[int],
    dtype: DType = F32,
    seed: float | None = None,
    mean: float = 0.0,
    scale: float = 1.0,
    context: Context,
) -> Tensor:
    return _normal(shape, dtype, _key(seed, context), mean, scale)


@declare.op("RandomNormalLike", precise=("result",))
def random_normal_like(
    x: Tensor,
    *,
    dtype: DType | None = None,
    seed: float | None = None,
    mean: float = 0.0,
    scale: float = 1.0,
    context: Context,
) -> Tensor:
    return _normal(x.shape, dtype or x.dtype, _key(seed, context), mean, scale)


@declare.op("RandomUniform", precise=("result",))
def random_uniform(
    *,
    shape: Sequence[int],
    dtype: DType = F32,
    seed: float | None = None,
    low: float = 0.0,
    high: float = 1.0,
    context: Context,
) -> Tensor:
    return _uniform(shape, dtype, _key(seed, context), low, high)


@declare.op("RandomUniformLike", precise=("result",))
def random_uniform_like(
    x: Tensor,
    *,
    dtype: DType | None = None,
    seed: float | None = None,
    low: float = 0.0,
    high: float = 1.0,
    context: Context,
) -> Tensor:
    return _uniform(x.shape, dtype or x.dtype, _key(seed, context), low, high)


@declare.op("Bernoulli", precise=("x",))
def bernoulli(x: Tensor, *, dtype: DType | None = None, seed: float | None = None, context: Context) -> Tensor:
    """1 with the probability x, else 0."""
    key, wanted = _key(seed, context), dtype or x.dtype

    def element(*i: Dim) -> Scalar:
        wide = F64 if x.dtype == F64 else F32
        hit = uniform(key, flat_offset(i, x.shape), wide) < cast(x.at(i), wide)
        return where(hit, const(1, wanted), const(0, wanted))

    return compute(x.shape, wanted, element, x)


@declare.op("Multinomial")
def multinomial(
    x: Tensor, *, dtype: DType = I32, sample_size: int = 1, seed: float | None = None, context: Context
) -> Tensor:
    """`sample_size` classes for each row of unnormalised log-probabilities [batch, classes].

    A class is where the row, with a number of Gumbel's distribution added to each element, is greatest (Gumbel 1954).
    """
    key, (batch, classes) = _key(seed, context), x.shape
    shape = (batch, sample_size, classes)

    def disturbed(at: Dim, i: Indices, wide: DType) -> Scalar:
        chance = uniform(key, at, wide) * (1 - 2.0**-23) + 2.0**-24  # neither 0 nor, rounded, 1
        return cast(x.at((i[0], i[2])), wide) - log(-log(chance))

    scores = _computed(shape, F64 if x.dtype == F64 else F32, disturbed, x)
    found = best_position(scores, reduce_max(scores, (2,)), 2)
    return compute(shape[:2], dtype, lambda *i: cast(found.at((*i, 0)), dtype), found)
