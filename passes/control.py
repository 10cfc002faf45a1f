"""Lowering of loops: Loop and Scan bodies become steps that the program repeats."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..ir.dims import Dim, product, symbol
from ..ir.dtypes import BOOL
from ..ir.errors import UnsupportedError
from ..ir.graph import Node, Value
from ..ir.program import Place, Repeat, Step

if TYPE_CHECKING:
    from .lower import Lowering


def lower_loop(lowering: Lowering, node: Node) -> list[Step]:
    raise UnsupportedError(f"{node.where}: loops are not compiled yet")


def lower_scan(lowering: Lowering, node: Node) -> list[Step]:
    raise UnsupportedError(f"{node.where}: scans are not compiled yet")


__all__ = ["BOOL", "Dim", "Place", "Repeat", "Value", "lower_loop", "lower_scan", "product", "symbol"]
