"""TfIdfVectorizer: how often each n-gram of a pool occurs in a row of items."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from ...ir.dtypes import F32, I64
from ...ir.errors import ModelError, UnsupportedError
from ...ir.graph import Attribute, Value
from ..expand import Expansions, Nodes
from .scores import Attributes

declare = Expansions()


@declare("TfIdfVectorizer")
def tfidf_vectorizer(
    n: Nodes,
    x: Value,
    *,
    max_gram_length: int,
    max_skip_count: int,
    min_gram_length: int,
    mode: str,
    ngram_counts: Sequence[int],
    ngram_indexes: Sequence[int],
    pool_int64s: Sequence[int] = (),
    pool_strings: Sequence[str] = (),
    weights: Sequence[float] = (),
) -> Value:
    """Counts (TF), weights of what occurs (IDF) or weighted counts (TFIDF) of n-grams: [rows, columns] or [columns].

    The items of an n-gram stand 1 to max_skip_count + 1 apart; single items count once. Of an n-gram that the pool
    holds twice the last one counts. Rows of text are compared with the pool by Equal, a step on the host.
    """
    given: dict[str, Attribute] = {"pool_strings": tuple(pool_strings), "pool_int64s": tuple(pool_int64s)}
    pool = Attributes(given).array("pool_strings" if pool_strings else "pool_int64s", I64)
    if mode not in ("TF", "IDF", "TFIDF"):
        raise UnsupportedError(f"the mode {mode!r}")
    columns = max(ngram_indexes) + 1
    if pool is None or x.tensor.rank > 2:
        raise ModelError(f"it takes [rows, items] and a pool of n-grams, not {x.type}")
    if x.dtype.kind != "string":
        pool, x = pool.astype(np.int64), n.cast(x, I64)
    items = x if x.tensor.rank else n("Unsqueeze", x, n.dims(0))
    parts: list[Value] = []
    places: list[int] = []
    number, ends = 0, [*ngram_counts[1:], len(pool)]
    for length, (start, end) in enumerate(zip(ngram_counts, ends, strict=True), 1):
        grams = pool[start:end].reshape(-1, length)
        indices = list(ngram_indexes[number : number + len(grams)])
        number += len(grams)
        if len(indices) < len(grams):
            raise ModelError(f"it has {len(ngram_indexes)} n-gram indexes, fewer than n-grams")
        if len(grams) and min_gram_length <= length <= max_gram_length:
            last = {tuple(gram): k for k, gram in enumerate(grams.tolist())}
            kept = sorted(last.values())
            skips = range(1, 2 if length == 1 else max_skip_count + 2)
            counts = [_occurrences(n, items, grams[kept], skip) for skip in skips]
            parts.append(counts[0] if len(counts) == 1 else n("Sum", *counts))
            places += [indices[k] for k in kept]
    if not parts:
        shape = (*items.shape[:-1], columns)
        return n.expand(n.constant(np.zeros((), np.float32)), *shape)
    found = _in_columns(n, n.concat(parts, -1) if len(parts) > 1 else parts[0], places, columns)
    factors = np.array(weights, np.float32) if weights else np.ones(columns, np.float32)
    if mode == "IDF":
        return n("Where", n("Greater", found, 0.0), factors, n.like(0, found))
    return found if mode == "TF" or not weights else n("Mul", found, factors)


def _occurrences(n: Nodes, items: Value, grams: np.ndarray, skip: int) -> Value:
    """How often each of [grams, length] starts at any item of a row, its items `skip` apart: [rows, grams]."""
    count, length = items.shape[-1], grams.shape[1]
    starts = n.positions(count)
    end = n.size(count)
    same: Value | None = None
    for k in range(length):
        if k:
            # Behind the row's end any item will do: the start does not count.
            place = n("Min", n("Add", starts, k * skip), n("Sub", end, 1))
            here = n("Gather", items, place, axis=-1)
        else:
            here = items
        equal = n("Equal", n("Unsqueeze", here, n.dims(-1)), grams[:, k].copy())
        same = equal if same is None else n("And", same, equal)
    assert same is not None
    if length > 1:
        inside = n("Less", n("Add", starts, (length - 1) * skip), end)
        same = n("And", same, n("Unsqueeze", inside, n.dims(-1)))
    return n("ReduceSum", n.cast(same, F32), n.dims(-2), keepdims=0)


def _in_columns(n: Nodes, counts: Value, places: list[int], columns: int) -> Value:
    """Counts put into the columns that their n-grams name, those of several summed; zeros elsewhere."""
    if len(set(places)) == len(places):
        if places == list(range(columns)):
            return counts
        absent = len(places)
        sources = np.full(columns, absent)
        sources[places] = np.arange(absent)
        padded = n("Pad", counts, n.dims(*(0,) * (2 * counts.tensor.rank - 1), 1))
        return n("Gather", padded, sources, axis=-1)
    return n("MatMul", counts, np.eye(columns, dtype=np.float32)[places])
