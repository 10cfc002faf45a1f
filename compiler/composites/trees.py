"""ai.onnx.ml's tree ensembles: their attributes become arrays in which every node asks one kind of question.

All comparisons are put as x <= threshold: x < v as x <= the number before v, x > v and x >= v with the branches
exchanged, x == v as a pair of nodes, and membership in a set as a search among the set's sorted values.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from ...ir.dtypes import F32, F64, I64
from ...ir.errors import ModelError, UnsupportedError
from ...ir.graph import Attribute, Value
from ..expand import Expansions, Nodes
from .scores import Attributes, binary_scores, class_labels, labelled, matrix, transformed

declare = Expansions()

MODES = ("BRANCH_LEQ", "BRANCH_LT", "BRANCH_GTE", "BRANCH_GT", "BRANCH_EQ", "BRANCH_NEQ", "BRANCH_MEMBER", "LEAF")
LEQ, LT, GTE, GT, EQ, NEQ, MEMBER, LEAF = range(8)
AGGREGATES = ("AVERAGE", "SUM", "MIN", "MAX")
TRANSFORMS = ("NONE", "SOFTMAX", "LOGISTIC", "SOFTMAX_ZERO", "PROBIT")


@dataclass
class Forest:
    """All trees' nodes: `children` [nodes, 2] are where false and true lead (leaves: themselves), `missing` whether NaN
    leads to true; an entry k adds weights[k] to targets[k] at leaf nodes[k]. After `normalised`, modes are LEQ or LEAF.
    """

    modes: np.ndarray
    features: np.ndarray
    thresholds: np.ndarray
    children: np.ndarray
    missing: np.ndarray
    roots: np.ndarray
    nodes: np.ndarray
    targets: np.ndarray
    weights: np.ndarray
    members: Sequence[np.ndarray] = ()

    def checked(self) -> Forest:
        """This forest; ModelError where its arrays differ in length or an index lies outside of what it indexes."""
        count = len(self.modes)
        for name in ("features", "thresholds", "children", "missing"):
            if len(getattr(self, name)) != count:
                raise ModelError(f"it has {count} tree nodes, but {len(getattr(self, name))} {name}")
        if not len(self.nodes) == len(self.targets) == len(self.weights):
            raise ModelError("its leaves' nodes, targets and weights differ in number")
        for name, indices, limit in (
            ("child", self.children, count),
            ("root", self.roots, count),
            ("leaf", self.nodes, count),
            ("feature", self.features, 1 << 31),
            ("target", self.targets, 1 << 31),
        ):
            if indices.size and not 0 <= indices.min() <= indices.max() < limit:
                raise ModelError(f"a {name} of its trees is {int(indices.min())} or {int(indices.max())}, of {limit}")
        if not count or not len(self.roots):
            raise ModelError("it has no trees")
        return self

    def normalised(self) -> Forest:
        """The same trees with one kind of comparison."""
        modes, values, missing = self.modes.copy(), self.thresholds.copy(), self.missing.copy()
        swap = np.isin(modes, (GTE, GT, NEQ))
        children = np.where(swap[:, None], self.children[:, ::-1], self.children)
        # Exchanged branches: NaN must now go where it went, which for != is the same whatever the model says.
        missing = np.where(swap, ~missing & (modes != NEQ), missing)
        before = np.isin(modes, (LT, GTE))
        values[before] = np.nextafter(values[before], values.dtype.type(-np.inf))
        modes[before | (modes == GT)] = LEQ
        modes[modes == NEQ] = EQ
        extra = _Nodes(len(modes), self.features, values, children, missing)
        members = iter(self.members)
        for node in np.flatnonzero((modes == EQ) | (modes == MEMBER)):
            wanted = [values[node]] if modes[node] == EQ else next(members)
            extra.member(int(node), np.asarray(wanted, values.dtype))
        modes[modes != LEAF] = LEQ
        modes = np.concatenate([modes, np.full(len(extra.thresholds), LEQ, modes.dtype)])
        return Forest(modes, *extra.arrays(), self.roots, self.nodes, self.targets, self.weights)

    def depths(self) -> np.ndarray:
        """For each tree the number of steps to its deepest leaf. Raises ModelError where nodes form a cycle."""
        found = np.zeros(len(self.roots), np.int64)
        tree, node = np.arange(len(self.roots)), self.roots.astype(np.int64)
        visited = 0
        while True:
            inner = self.modes[node] != LEAF
            tree, node = tree[inner], node[inner]
            if not node.size:
                return found
            found[tree] += 1
            visited += node.size
            if visited > 4 * len(self.modes) * max(len(self.roots), 1) or found.max() > len(self.modes):
                raise ModelError("the nodes of its trees form a cycle")
            pairs = np.stack([np.repeat(tree, 2), self.children[node].reshape(-1)])
            tree, node = np.unique(pairs, axis=1)

    def emit(self, n: Nodes, x: Value, targets: int, aggregate: str) -> Value:
        """The combined weights [rows, targets] of a normalised forest for x [rows, columns]."""
        count, dtype = len(self.modes), self.thresholds.dtype
        if self.targets.size and self.targets.max() >= targets:
            raise ModelError(f"a leaf of its trees adds to target {int(self.targets.max())} of {targets}")
        order = np.argsort(self.nodes, kind="stable")
        nodes, weights, indices = self.nodes[order], self.weights[order].astype(dtype), self.targets[order]
        first = np.searchsorted(nodes, np.arange(count + 1)).astype(np.int32)
        combine = {"MIN": np.minimum, "MAX": np.maximum}.get(aggregate, np.add)
        start = {"MIN": np.inf, "MAX": -np.inf}.get(aggregate, 0.0)
        missing = n.constant(self.missing) if self.missing.any() else None
        depths = self.depths()
        depth, trees = int(depths.max()), np.stack([self.roots, depths], axis=1).astype(np.int32)
        operands: list[Value | np.ndarray | None] = [
            x,
            self.features.astype(np.int32),
            self.thresholds,
            self.children.astype(np.int32),
            trees,
        ]
        if targets == 1:
            single = np.full(count, start, dtype)
            combine.at(single, nodes, weights)
            operands += [single, None, None]
        else:
            operands += [weights, first, indices.astype(np.int32)]
        features = int(self.features.max(initial=0)) + 1
        op = {"MIN": "min", "MAX": "max"}.get(aggregate, "add")
        while missing is None and operands[-1] is None:
            operands.pop()
        if missing is not None:
            operands.append(missing)
        values = [n.constant(o) if isinstance(o, np.ndarray) else o for o in operands]
        return n.several(
            "onnxc.TreeEnsemble", values, 1, targets=targets, features=features, depth=depth, aggregate=op
        )[0]


class _Nodes:
    """Nodes that membership in sets becomes, behind the ones there are."""

    def __init__(self, count: int, features: np.ndarray, values: np.ndarray, children: np.ndarray, missing: np.ndarray):
        self.count, self.old = count, (features.copy(), values, children.copy(), missing)
        self.features: list[int] = []
        self.thresholds: list[float] = []
        self.children: list[tuple[int, int]] = []

    def add(self, feature: int, threshold: float, no: int, yes: int) -> int:
        self.features.append(feature)
        self.thresholds.append(threshold)
        self.children.append((no, yes))
        return self.count + len(self.features) - 1

    def member(self, node: int, wanted: np.ndarray) -> None:
        """Lets a node decide whether its feature is among the wanted values, by a search for the interval it is in."""
        features, values, children, missing = self.old
        no, yes = (int(child) for child in children[node])
        wanted = np.unique(wanted[~np.isnan(wanted)])
        # x lies in (before v, v] where it is v: the ends of these intervals, adjacent ones united.
        below = np.nextafter(wanted, wanted.dtype.type(-np.inf))
        ends = np.stack([below, wanted], axis=1).reshape(-1)
        inner = np.concatenate([[True], ends[1:] != ends[:-1]]) if ends.size else np.zeros(0, bool)
        keep = inner & np.concatenate([inner[1:], [True]]) if ends.size else inner
        ends = ends[keep]
        feature = int(features[node])

        def search(low: int, high: int) -> int:
            """Where to go when the ends before `low` lie below x, and x lies at or below the end `high`."""
            if low == high:
                return yes if low % 2 else no
            middle = (low + high) // 2
            return self.add(feature, float(ends[middle]), search(middle + 1, high), search(low, middle))

        # Behind the last end, and for NaN, the answer is no; this node itself sends NaN where the model wants it.
        values[node] = np.inf
        children[node] = (yes if missing[node] else no, search(0, len(ends)))
        missing[node] = False

    def arrays(self) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        """Features, thresholds, children and missing flags of all nodes."""
        features, values, children, missing = self.old
        new = np.array(self.children, children.dtype).reshape(-1, 2)
        return (
            np.concatenate([features, np.array(self.features, features.dtype)]),
            np.concatenate([values, np.array(self.thresholds, values.dtype)]),
            np.concatenate([children, new]),
            np.concatenate([missing, np.zeros(len(new), bool)]),
        )


def _by_node_ids(given: Attributes, leaves: str, dtype: np.dtype[np.generic]) -> Forest:
    """The forest of TreeEnsembleClassifier (leaves "class") and TreeEnsembleRegressor ("target")."""
    tree, node = given.required("nodes_treeids", I64), given.required("nodes_nodeids", I64)
    spelt = [str(mode) for mode in given.required("nodes_modes")]
    if unknown := set(spelt) - set(MODES):
        raise UnsupportedError(f"tree nodes of mode {sorted(unknown)[0]!r}; there are {', '.join(MODES)}")
    modes = np.array([MODES.index(mode) for mode in spelt], np.int8)
    count = len(modes)
    keys, where = np.unique(np.stack([tree, node]), axis=1, return_index=True)
    if keys.shape[1] < count:
        raise ModelError("two nodes of its trees have the same tree and node number")
    numbered = {(int(t), int(n)): int(place) for (t, n), place in zip(keys.T, where, strict=True)}

    def places(trees: np.ndarray, nodes: np.ndarray) -> np.ndarray:
        try:
            return np.array([numbered[key] for key in zip(trees.tolist(), nodes.tolist(), strict=True)], np.int64)
        except (KeyError, ValueError) as error:
            raise ModelError(f"its trees have no node {error}") from error

    inner = modes != LEAF
    children = np.repeat(np.arange(count), 2).reshape(-1, 2)
    for column, name in enumerate(("nodes_falsenodeids", "nodes_truenodeids")):
        ids = given.required(name, I64)
        if len(ids) != count:
            raise ModelError(f"it has {count} tree nodes, but {len(ids)} {name}")
        children[inner, column] = places(tree[inner], ids[inner])
    roots = np.setdiff1d(np.arange(count), children[inner])
    missing = given.array("nodes_missing_value_tracks_true", I64)
    weights = given.required(f"{leaves}_weights")
    return Forest(
        modes,
        given.required("nodes_featureids", I64) * inner,
        given.required("nodes_values").astype(dtype),
        children,
        np.zeros(count, bool) if missing is None else missing.astype(bool) & inner,
        roots,
        places(given.required(f"{leaves}_treeids", I64), given.required(f"{leaves}_nodeids", I64)),
        given.required(f"{leaves}_ids", I64),
        weights,
    ).checked()


def _by_branches(given: Attributes, dtype: np.dtype[np.generic]) -> Forest:
    """The forest of TreeEnsemble: branches first, then leaves."""
    modes = given.tensor("nodes_modes").astype(np.int8)
    if modes.size and not 0 <= modes.min() <= modes.max() <= MEMBER:
        raise UnsupportedError(f"tree nodes of mode {int(modes.max())}; there are 0 to {MEMBER}")
    count, weights = len(modes), given.tensor("leaf_weights")
    leaves = len(weights)
    leaf = np.repeat(np.arange(count, count + leaves), 2).reshape(-1, 2)
    branches = []
    for name in ("false", "true"):
        ids = given.required(f"nodes_{name}nodeids", I64)
        is_leaf = given.required(f"nodes_{name}leafs", I64).astype(bool)
        if len(ids) != count or len(is_leaf) != count:
            raise ModelError(f"it has {count} tree nodes, but {len(ids)} {name} branches")
        limit = np.where(is_leaf, leaves, count)
        if ((ids < 0) | (ids >= limit)).any():
            raise ModelError(f"a {name} branch of its trees leads nowhere")
        branches.append(ids + np.where(is_leaf, count, 0))
    missing = given.array("nodes_missing_value_tracks_true", I64)
    sets: list[np.ndarray] = []
    if (modes == MEMBER).any():
        members = given.tensor("membership_values").astype(dtype)
        ends = np.flatnonzero(np.isnan(members))
        sets = np.split(members, ends)[: len(ends)] if len(ends) else []
        if len(sets) != (modes == MEMBER).sum():
            raise ModelError(f"it has {(modes == MEMBER).sum()} membership nodes, but {len(sets)} sets of values")
    pad = np.zeros(leaves)
    return Forest(
        np.concatenate([modes, np.full(leaves, LEAF, np.int8)]),
        np.concatenate([given.required("nodes_featureids", I64), pad.astype(np.int64)]),
        np.concatenate([given.tensor("nodes_splits").astype(dtype), pad.astype(dtype)]),
        np.concatenate([np.stack(branches, axis=1), leaf]),
        np.concatenate([np.zeros(count, bool) if missing is None else missing.astype(bool), pad.astype(bool)]),
        given.required("tree_roots", I64),
        np.arange(count, count + leaves),
        given.required("leaf_targetids", I64),
        weights,
        sets,
    ).checked()


def _rows(n: Nodes, x: Value) -> tuple[Value, np.dtype[np.generic]]:
    """The operand as [rows, columns] of floats, and the type to compare in."""
    dtype = F64 if x.dtype == F64 else F32
    return matrix(n, x, dtype), np.dtype(dtype.numpy)


def _combined(n: Nodes, forest: Forest, x: Value, targets: int, aggregate: str) -> Value:
    """The trees' sum, average, minimum or maximum; 0 where no leaf adds to a target."""
    if aggregate not in AGGREGATES:
        raise UnsupportedError(f"the aggregate function {aggregate!r}; there are {', '.join(AGGREGATES)}")
    scores = forest.normalised().emit(n, x, targets, aggregate)
    if aggregate == "AVERAGE":
        return n("Div", scores, len(forest.roots))
    return scores if aggregate == "SUM" else n("Where", n("IsInf", scores), n.like(0, scores), scores)


def _with_base(n: Nodes, scores: Value, base: np.ndarray | None) -> Value:
    return scores if base is None else n("Add", scores, base.astype(scores.dtype.numpy))


@declare("ai.onnx.ml.TreeEnsemble")
def tree_ensemble(n: Nodes, x: Value, **attributes: Attribute) -> Value:
    """TreeEnsemble, of version 5."""
    given = Attributes(attributes)
    rows, dtype = _rows(n, x)
    forest = _by_branches(given, dtype)
    aggregate, transform = given.integer("aggregate_function", 1), given.integer("post_transform", 0)
    if not 0 <= aggregate < len(AGGREGATES) or not 0 <= transform < len(TRANSFORMS):
        raise UnsupportedError(f"the aggregate function {aggregate} with the post_transform {transform}")
    targets = given.integer("n_targets", int(forest.targets.max(initial=0)) + 1)
    scores = _combined(n, forest, rows, targets, AGGREGATES[aggregate])
    return n.cast(transformed(n, scores, TRANSFORMS[transform]), x.dtype)


@declare("ai.onnx.ml.TreeEnsembleRegressor")
def tree_regressor(n: Nodes, x: Value, **attributes: Attribute) -> Value:
    """Base values are added to what the trees give."""
    given = Attributes(attributes)
    rows, dtype = _rows(n, x)
    forest, aggregate = _by_node_ids(given, "target", dtype), given.text("aggregate_function", "SUM")
    scores = _combined(n, forest, rows, given.integer("n_targets", 1), aggregate)
    scores = _with_base(n, scores, given.array("base_values"))
    return n.cast(transformed(n, scores, given.text("post_transform", "NONE")), F32)


@declare("ai.onnx.ml.TreeEnsembleClassifier")
def tree_classifier(n: Nodes, x: Value, **attributes: Attribute) -> tuple[Value | None, Value]:
    """The label of the greatest score, and the scores.

    Where leaves add to a single of two classes its score is the positive class's, as in ONNX Runtime (`binary_scores`).
    """
    given = Attributes(attributes)
    rows, dtype = _rows(n, x)
    labels = class_labels(given, "classlabels_int64s")
    forest, transform = _by_node_ids(given, "class", dtype), given.text("post_transform", "NONE")
    base, present = given.array("base_values"), np.unique(forest.targets)
    if len(labels) <= 2 and len(present) == 1:
        forest.targets = np.zeros_like(forest.targets)
        score = _combined(n, forest, rows, 1, "SUM")
        if present[0] == 1 and (base is None or len(base) == 1):
            # The positive class by itself: as ONNX Runtime has it, the other one has nothing, not even a base value.
            half = 0.5 if (forest.weights >= 0).all() else 0.0
            other = n.expand(n.like(0, score), *score.shape)
            chosen = n("Squeeze", n.cast(n("Greater", score, half), I64), n.dims(1))
            scores = transformed(n, n.concat([other, score], 1), transform)
            return labelled(n, labels, chosen), n.cast(scores, F32)
        score = _with_base(n, score, None if base is None else base[-1:])
        positive, negated = bool((forest.weights >= 0).all()), base is not None and len(base) == 2
        scores, chosen = binary_scores(n, score, transform, positive, negated)
    else:
        scores = ranked = _with_base(n, _combined(n, forest, rows, len(labels), "SUM"), base)
        if base is None and len(present) < len(labels):  # a class to which no leaf adds is never the answer
            ranked = n("Where", n.constant(np.isin(np.arange(len(labels)), present)), scores, n.like(-np.inf, scores))
        chosen = n("ArgMax", ranked, axis=1, keepdims=0)
        scores = transformed(n, scores, transform)
    return labelled(n, labels, chosen), n.cast(scores, F32)
