"""NonMaxSuppression: per batch and class, boxes by descending score, each kept unless it overlaps one kept before."""

from __future__ import annotations

from collections.abc import Sequence

from ...ir import functions as f
from ...ir import scalars as s
from ...ir.dims import Dim, symbol
from ...ir.dtypes import BOOL, F32, I64
from ...ir.loops import Define, For, If, Let, Statement, Store, While
from ...ir.scalars import Buffer, Scalar, const, load
from ...ir.target import Target
from ...ir.tensors import Indices, Tensor
from ...passes.regions import Lowered, Region
from .calls import Variable, attribute, call, operand, over, present
from .selection import COUNT, bind_count
from .sorting import merge_sort


def _number(region: Region, position: int, default: float | None) -> Scalar | None:
    """An operand of one element."""
    found = operand(region, position)
    if found is None:
        return None if default is None else const(default, F32)
    return found.at((0,) * found.rank)


def _corners(region: Region, boxes: Tensor, batch: Dim, box: Dim) -> list[Scalar]:
    """The least y and x and the greatest y and x of a box, whichever way it is given."""
    a, b, c, d = (boxes.at((batch, box, i)) for i in range(4))
    if attribute(region, "center_point_box"):  # x and y of the centre, width, height
        return [b - d / 2, a - c / 2, b + d / 2, a + c / 2]
    return [f.minimum(a, c), f.minimum(b, d), f.maximum(a, c), f.maximum(b, d)]


def _overlap(one: Sequence[Scalar], other: Sequence[Scalar]) -> Scalar:
    """Intersection over union of two boxes given by their corners."""
    height = f.minimum(one[2], other[2]) - f.maximum(one[0], other[0])
    width = f.minimum(one[3], other[3]) - f.maximum(one[1], other[1])
    common = f.maximum(height, 0) * f.maximum(width, 0)
    areas = [(y1 - y0) * (x1 - x0) for y0, x0, y1, x1 in (one, other)]
    return common / (areas[0] + areas[1] - common)


def non_max_suppression(region: Region, target: Target) -> Lowered:
    """Batches and classes go to threads; the corners of the boxes kept lie together, to be compared in vectors."""
    boxes, scores = present(region, 0), present(region, 1)
    batches, classes, size = scores.shape
    result, tensor = region.outputs[0]
    pairs = batches * classes
    order, selected = Buffer("order", I64, pairs * size * 2), Buffer("selected", I64, pairs * size)
    kept, numbers = Buffer("kept_corners", scores.dtype, pairs * size * 4), Buffer("numbers", I64, pairs)
    limit, least = _number(region, 2, 0), _number(region, 4, None)
    threshold = _number(region, 3, 0.0)
    assert limit is not None and threshold is not None

    def one_class(where: Indices) -> list[Statement]:
        batch, kind = where
        pair = batch * classes + kind
        candidates, count = Variable("candidates"), symbol("count", 0, size)
        box, at = symbol("box", 0, size - 1), Variable("at")
        score = scores.at((batch, kind, box))
        start = pair * size * 2
        listed = (Store(order, start + candidates.index(size - 1), s.index(box)), candidates.add(1))
        listing = For("box", size, listed if least is None else (If(least < score, listed),))
        sorting, source = merge_sort(
            order,
            start,
            size,
            count,
            lambda a, b, first: [first.set(scores.at((batch, kind, b)) < scores.at((batch, kind, a)))],
        )
        found, suppressed = Variable("found"), Variable("suppressed", BOOL)
        here, position = symbol("kept", 0, size), symbol("position", 0, size - 1)
        corners = [Buffer(f"corner{i}", scores.dtype, 1, "register") for i in range(4)]
        mine = [load(corner, 0) for corner in corners]
        other = symbol("other", 0, here - 1)
        rest = [load(kept, (pair * 4 + i) * size + other) for i in range(4)]
        overlaps = threshold < _overlap(mine, rest)
        keep = [
            *(Store(kept, (pair * 4 + i) * size + here, corner) for i, corner in enumerate(mine)),
            Store(selected, pair * size + here, s.index(box)),
            found.add(1),
        ]
        choosing = [
            Let("position", at.value),
            Let("box", load(order, source.index() + position)),
            Let("kept", found.value),
            *(Define(c, v) for c, v in zip(corners, _corners(region, boxes, batch, box), strict=True)),
            suppressed.define(False),
            For("other", here, (suppressed.set(suppressed.value | overlaps),), "vector"),
            If(~suppressed.value, tuple(keep)),
            at.add(1),
        ]
        return [
            candidates.define(0),
            listing,
            Let("count", candidates.value),
            *sorting,
            found.define(0),
            at.define(0),
            While((at.value < s.index(count)) & (found.value < s.cast(limit, I64)), tuple(choosing)),
            Store(numbers, pair, found.value),
        ]

    total, pair = Variable("total"), symbol("pair", 0, pairs - 1)
    counting = [
        total.define(0),
        For("pair", pairs, (total.add(load(numbers, pair)),)),
        Store(COUNT, 0, total.value),
    ]
    row, number = symbol("row", 0, tensor.shape[0] - 1), symbol("number", 0, size)
    triple = (s.index(pair // classes), s.index(pair % classes), load(selected, pair * size + symbol("member", 0)))
    writing = For(
        "pair",
        pairs,
        (
            Let("number", load(numbers, pair)),
            For(
                "member",
                number,
                (
                    Let("row", total.value),
                    *(Store(result, row * 3 + i, value) for i, value in enumerate(triple)),
                    total.add(1),
                ),
            ),
        ),
    )
    scratch = (order, selected, kept, numbers, COUNT)
    return Lowered(
        (
            call(region, "suppress", [over((batches, classes), one_class, "class", size * 64, target)], scratch),
            call(region, "count_boxes", counting, scratch),
            bind_count(tensor.shape[0]),
            call(region, "list_boxes", [total.define(0), writing], scratch),
        ),
        scratch,
    )
