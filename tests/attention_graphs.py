"""Attention as graphs: a text whose words stand for types, heads and channels, and the spellings of its scores."""

from __future__ import annotations

import re
from typing import Any

import numpy as np

Array = np.ndarray[Any, Any]

_TEXT = """
graph @g(%q: T[b, l, H*D], %k: T[b, s, G*D], %v: T[b, s, G*E] INPUTS) -> (%y: T[b, l, H, E]) {
  %scale = constant 0.3 : T[]
  %lowest = constant -inf : T[]
  %least = constant LEAST : T[]
  %cap = constant 2.0 : T[]
  %zero = constant 0.0 : T[]
  %q1 = Reshape(%q) {shape = [b, l, H, D]} : T[b, l, H, D]
  %k1 = Reshape(%k) {shape = [b, s, G, D]} : T[b, s, G, D]
  %v1 = Reshape(%v) {shape = [b, s, G, E]} : T[b, s, G, E]
  %q2 = Transpose(%q1) {perm = [0, 2, 1, 3]} : T[b, H, l, D]
  %k2 = Transpose(%k1) {perm = [0, 2, 3, 1]} : T[b, G, D, s]
  %v2 = Transpose(%v1) {perm = [0, 2, 1, 3]} : T[b, G, s, E]
  %k3 = Reshape(%k2) {shape = [b, G, 1, D, s]} : T[b, G, 1, D, s]
  %k4 = Expand(%k3) {shape = [b, G, R, D, s]} : T[b, G, R, D, s]
  %k5 = Reshape(%k4) {shape = [b, H, D, s]} : T[b, H, D, s]
  %v3 = Reshape(%v2) {shape = [b, G, 1, s, E]} : T[b, G, 1, s, E]
  %v4 = Expand(%v3) {shape = [b, G, R, s, E]} : T[b, G, R, s, E]
  %v5 = Reshape(%v4) {shape = [b, H, s, E]} : T[b, H, s, E]
  %products = MatMul(%q2, %k5) : T[b, H, l, s]
  %scaled = Mul(%products, %scale) : T[b, H, l, s]
  SCORES
  %weights = Softmax(%scores) : T[b, H, l, s]
  WEIGHTS
  %heads = MatMul(%whole, %v5) : T[b, H, l, E]
  %y = Transpose(%heads) {perm = [0, 2, 1, 3]} : T[b, l, H, E]
}
"""
_POSITIONS = """
  %rows = Range() {start = [s-l], limit = [s], delta = [1], dtype = i64} : i64[l]
  %row = Reshape(%rows) {shape = [l, 1]} : i64[l, 1]
  %key = Range() {start = [0], limit = [s], delta = [1], dtype = i64} : i64[s]
  %seen = LessOrEqual(%key, %row) : bool[l, s]
  %width = constant 3 : i64[]
  %behind = Sub(%row, %width) : i64[l, 1]
  %near = Less(%behind, %key) : bool[l, s]
  %window = And(%seen, %near) : bool[l, s]
"""
PLAIN = "%scores = Identity(%scaled) : T[b, H, l, s]"
CAUSAL = f"{_POSITIONS} %scores = Where(%seen, %scaled, %lowest) : T[b, H, l, s]"
FINITE = f"{_POSITIONS} %scores = Where(%seen, %scaled, %least) : T[b, H, l, s]"
WINDOW = f"{_POSITIONS} %scores = Where(%window, %scaled, %lowest) : T[b, H, l, s]"
CAPPED = """%a = Div(%scaled, %cap) : T[b, H, l, s]
            %t = Tanh(%a) : T[b, H, l, s]
            %scores = Mul(%t, %cap) : T[b, H, l, s]"""
BIASED = "%scores = Add(%scaled, %m) : T[b, H, l, s]"
CHOSEN = """%bias = Where(%m, %zero, %lowest) : T[b, 1, l, s]
            %scores = Add(%scaled, %bias) : T[b, H, l, s]"""
ZEROED = """%none = IsNaN(%weights) : bool[b, H, l, s]
            %whole = Where(%none, %zero, %weights) : T[b, H, l, s]"""
WHOLE = "%whole = Identity(%weights) : T[b, H, l, s]"


def attention_text(
    type: str,
    heads: int,
    groups: int,
    width: int,
    depth: int,
    scores: str = PLAIN,
    weights: str = WHOLE,
    inputs: str = "",
) -> str:
    """Attention of q [b, l, heads*width], k [b, s, groups*width] and v [b, s, groups*depth]: y is [b, l, heads, depth].

    `scores` are lines that make %scores of %scaled, `weights` lines that make %whole of %weights, `inputs` more inputs.
    """
    words = {"SCORES": scores, "WEIGHTS": weights, "INPUTS": inputs, "LEAST": "-6e4" if type == "f16" else "-3e38"}
    words |= {"T": type, "H": heads, "G": groups, "R": heads // groups, "D": width, "E": depth}  # type: ignore[dict-item]
    text = _TEXT
    for word, value in words.items():
        text = re.sub(rf"\b{word}\b", str(value), text)
    return text


def expected_attention(
    q: Array, k: Array, v: Array, heads: int, groups: int, mask: Any = 0, cap: float = 0, empty: float = np.nan
) -> Array:
    """The same in f64 but for the scores, to which `mask` is added in f32; rows without any score give `empty`."""
    (b, rows), keys = q.shape[:2], k.shape[1]
    q = q.astype(np.float64).reshape(b, rows, heads, q.shape[2] // heads)
    k, v = (x.astype(np.float64).reshape(b, keys, groups, x.shape[2] // groups) for x in (k, v))
    k, v = (np.repeat(x, heads // groups, axis=2) for x in (k, v))
    scores = np.einsum("bqhd,bkhd->bhqk", q, k) * 0.3
    scores = ((np.tanh(scores / cap) * cap if cap else scores) + mask).astype(np.float32).astype(np.float64)
    with np.errstate(invalid="ignore"):
        weights = np.exp(scores - scores.max(-1, keepdims=True, initial=-np.inf))
        weights /= weights.sum(-1, keepdims=True)
    weights = np.where(np.isnan(weights), empty, weights)
    return np.einsum("bhqk,bkhe->bqhe", weights, v)
