"""Decision trees: the nodes of all trees in arrays, which a schedule walks."""

from __future__ import annotations

from ..errors import ShapeError
from ..guards import assume_at_most
from ..tensors import Tensor, opaque_tensor
from .declare import Registry

declare = Registry()
EVERYTHING = ("x", "feature", "threshold", "children", "trees", "weight", "first", "target", "missing", "result")


@declare.op("onnxc.TreeEnsemble", alone=True, precise=EVERYTHING)
def tree_ensemble(
    x: Tensor,
    feature: Tensor,
    threshold: Tensor,
    children: Tensor,
    trees: Tensor,
    weight: Tensor,
    first: Tensor | None = None,
    target: Tensor | None = None,
    missing: Tensor | None = None,
    *,
    targets: int = 1,
    features: int,
    depth: int,
    aggregate: str = "add",
) -> Tensor:
    """The leaves' weights, combined over all trees by `aggregate` (add, min, max): [rows, targets].

    x [rows, columns], of which `features` are read, has the type of the thresholds. Node n goes on to children[n, 1]
    where x[row, feature[n]] <= threshold[n] (or is NaN, where missing[n] is set), else to children[n, 0]; a leaf goes
    on to itself. trees [count, 2] are the root and the steps to the deepest leaf, `depth` at most. Leaf n adds
    weight[n] to the only target; with `first` and `target`, weight[k] to target[k] for first[n] <= k < first[n + 1].
    Where no leaf adds to a target it holds the identity of `aggregate`.
    """
    if isinstance(x.shape[1], int) and x.shape[1] < features:
        raise ShapeError(f"the trees read {features} features, the operand has {x.shape[1]}")
    assume_at_most(features, x.shape[1], "features that the trees read")
    present = [t for t in (x, feature, threshold, children, trees, weight, first, target, missing) if t is not None]
    return opaque_tensor((x.shape[0], targets), weight.dtype, *present)
