"""Equal nodes merge, unread ones go; nothing else does."""

from __future__ import annotations

import numpy as np
from pass_checks import check, parsed, transformed


def test_equal_nodes_merge_and_unite_their_origins() -> None:
    check(
        "cleanup",
        """
        graph @g(%x: f32[3]) -> (%y: f32[3]) {
          %a = Exp(%x) : f32[3]      // from "first"
          %b = Exp(%x) : f32[3]      // from "second"
          %dead = Log(%b) : f32[3]
          %y = Add(%a, %b) : f32[3]
        }
        // CHECK: graph @g
        // CHECK-NEXT: %a = Exp(%x)
        // CHECK-SAME: // from "first", "second"
        // CHECK-NEXT: %y = Add(%a, %a)
        // CHECK-NEXT: }
        """,
    )


def test_attributes_tell_nodes_apart() -> None:
    check(
        "cleanup",
        """
        graph @g(%x: f32[3]) -> (%y: f32[3]) {
          %a = Elu(%x) {alpha = 0.0} : f32[3]
          %b = Elu(%x) {alpha = -0.0} : f32[3]
          %c = Elu(%x) {alpha = 1.0} : f32[3]
          %y = Sum(%a, %b, %c) : f32[3]
        }
        // CHECK: %y = Sum(%a, %b, %c)
        """,
    )


def test_constants_merge_by_content_and_type() -> None:
    arrays = {"u": np.arange(20, dtype=np.float32), "v": np.arange(20, dtype=np.float32), "w": np.zeros(20, np.float32)}
    check(
        "cleanup",
        """
        graph @g(%x: f32[20]) -> (%y: f32[20]) {
          %u = constant @"u" : f32[20]
          %v = constant @"v" : f32[20]
          %w = constant @"w" : f32[20]
          %y = Sum(%x, %u, %v, %w) : f32[20]
        }
        // CHECK: graph @g
        // CHECK-NEXT: %u = constant @"u"
        // CHECK-NEXT: %w = constant @"w"
        // CHECK-NEXT: %y = Sum(%x, %u, %u, %w)
        """,
        arrays,
    )


REGION = """
  %{name} = If(%c) : f32[3]
    then_branch: graph @{name}yes() -> (%{name}2: f32[3]) {{
      %{name}1 = Exp(%x) : f32[3]
      %{name}2 = {op}(%{name}1) : f32[3]
    }}
    else_branch: graph @{name}no() -> (%{name}3: f32[3]) {{
      %{name}3 = Exp(%x) : f32[3]
    }}
"""


def test_regions_are_compared_by_structure() -> None:
    body = REGION.format(name="a", op="Exp") + REGION.format(name="b", op="Exp") + REGION.format(name="d", op="Log")
    check(
        "cleanup",
        f"""
        graph @g(%c: bool[], %x: f32[3]) -> (%y: f32[3]) {{
          {body}
          %y = Sum(%a, %b, %d) : f32[3]
        }}
        // CHECK: %a = If(%c)
        // CHECK-NOT: %b = If(%c)
        // CHECK: %d = If(%c)
        // CHECK: %y = Sum(%a, %a, %d)
        """,
    )


def test_regions_use_what_is_there_already() -> None:
    check(
        "cleanup",
        f"""
        graph @g(%c: bool[], %x: f32[3]) -> (%y: f32[3], %z: f32[3]) {{
          %z = Exp(%x) : f32[3]
          {REGION.format(name="a", op="Log")}
          %y = Exp(%a) : f32[3]
        }}
        // CHECK: graph @ayes
        // CHECK-NEXT: %a2 = Log(%z)
        // CHECK: graph @ano
        // CHECK-NEXT: %a3 = Exp(%x)
        """,
    )


def test_what_tells_a_size_is_not_dead() -> None:
    """%m is read by nobody, but its shape is the only place where the size m_0 comes from."""
    text = """
    graph @g(%x: f32[1], %m: i64[1]) -> (%y: i64[1]) {
      %e = Expand(%x, %m) : f32[m_0]
      %y = Dims() {values = [m_0 + 1], shape = [1]} : i64[1]
      %dead = Exp(%e) : f32[m_0]
    }
    """
    result = transformed("cleanup", parsed(text))
    assert [node.op for node in result.nodes] == ["Expand", "Dims"]


def test_outputs_stay_apart() -> None:
    check(
        "cleanup",
        """
        graph @g(%x: f32[3]) -> (%y: f32[3], %z: f32[3]) {
          %y = Exp(%x) : f32[3]
          %z = Exp(%x) : f32[3]
        }
        // CHECK: %y = Exp(%x)
        // CHECK: %z = Exp(%x)
        """,
    )
