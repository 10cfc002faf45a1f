"""Matrix products of the shapes that transformers and perceptrons have, one node each, beside ONNX Runtime:
`python -m onnxc.tools.bench.shapes [--threads 2]`."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from ..terminal import console, table_of
from .rounds import OWN, Setting, measure

OTHER = "onnxruntime"
Shape = tuple[int, ...]


@dataclass(frozen=True)
class Product:
    """`left` by `right`, which are read transposed where `transposed` says so; the right one may be a constant."""

    left: Shape
    right: Shape
    constant: bool = False
    transposed: tuple[bool, bool] = (False, False)

    def __str__(self) -> str:
        sides = zip((self.left, self.right), self.transposed, strict=True)
        texts = ["x".join(map(str, shape)) + "'" * turned for shape, turned in sides]
        return f"{texts[0]} by {texts[1]}{', constant' * self.constant}"

    @property
    def result(self) -> Shape:
        return (
            *self.left[:-2],
            self.left[-1 if self.transposed[0] else -2],
            self.right[-2 if self.transposed[1] else -1],
        )

    @property
    def operations(self) -> int:
        """Multiplications and additions."""
        return 2 * int(np.prod(self.result)) * self.left[-2 if self.transposed[0] else -1]

    def model(self, random: np.random.Generator) -> onnx.ModelProto:
        """One node: MatMul, or Gemm where something is transposed."""
        turned: dict[str, Any] = dict(zip(("transA", "transB"), map(int, self.transposed), strict=True))
        kind = ("Gemm", turned) if any(self.transposed) else ("MatMul", {})
        shapes = {"a": self.left} if self.constant else {"a": self.left, "b": self.right}
        weights = random.standard_normal(self.right, np.float32) / np.float32(np.sqrt(self.right[-2]))
        graph = helper.make_graph(
            [helper.make_node(kind[0], ["a", "b"], ["y"], **kind[1])],
            "product",
            [helper.make_tensor_value_info(name, TensorProto.FLOAT, shape) for name, shape in shapes.items()],
            [helper.make_tensor_value_info("y", TensorProto.FLOAT, self.result)],
            [numpy_helper.from_array(weights, "b")] if self.constant else [],
        )
        return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)


def products() -> Iterator[Product]:
    """By constants (BERT, MiniLM, ViT, GPT-2, perceptrons, and sizes that fit nothing); batches, as attention has them;
    operands that are transposed in memory."""
    sizes = [(rows, 768, 3072) for rows in (1, 2, 3, 4, 5, 6, 8, 12, 16, 24, 64, 128, 197)]
    sizes += [(rows, 768, 768) for rows in (1, 2, 4, 8, 16, 32, 64, 128, 197, 256)]
    sizes += [(rows, 3072, 768) for rows in (1, 2, 4, 8, 16, 64, 128, 197)]
    sizes += [(64, 768, 2304), (128, 384, 1536), (128, 1536, 384), (1, 784, 256), (64, 784, 256), (8, 2048, 1000)]
    sizes += [(4, 32, 32), (16, 64, 64), (33, 77, 129), (100, 100, 100), (127, 255, 257), (1000, 10, 128)]
    yield from (Product((rows, depth), (depth, columns), True) for rows, depth, columns in sizes)
    batched = [(12, 128, 64, 128), (12, 128, 128, 64), (12, 197, 64, 197), (12, 197, 197, 64), (12, 1, 64, 129)]
    batched += [(12, 1, 129, 64), (64, 16, 16, 16), (8, 49, 32, 49), (2, 512, 512, 512)]
    for count, rows, depth, columns in batched:
        yield Product((count, rows, depth), (count, depth, columns))
    for rows, depth, columns in ((1, 768, 768), (4, 768, 3072), (8, 768, 768), (128, 768, 768), (100, 100, 100)):
        for left, right in ((False, True), (True, False), (True, True)):
            shapes = (depth, rows) if left else (rows, depth), (columns, depth) if right else (depth, columns)
            yield Product(*shapes, transposed=(left, right))


@click.command()
@click.option("--threads", default=1, show_default=True)
@click.option("--rounds", default=5, show_default=True)
@click.option("--seconds", default=0.05, show_default=True, help="Of each engine in each round.")
def main(threads: int, rounds: int, seconds: float) -> None:
    """Times matrix products beside ONNX Runtime: "ratio" is its time over that of onnxc."""
    table = table_of("product", ">us", ">GFLOP/s", ">ratio", ">differs")
    random = np.random.default_rng(0)
    ratios = []
    with tempfile.TemporaryDirectory() as folder:
        for number, product in enumerate(products()):
            path = Path(folder) / f"{number}.onnx"
            onnx.save(product.model(random), path)
            shapes = {"a": product.left} if product.constant else {"a": product.left, "b": product.right}
            inputs = {name: random.standard_normal(shape, np.float32) for name, shape in shapes.items()}
            own, other = measure(Setting(str(path), {}, inputs, threads), (OWN, OTHER), rounds, seconds, cold=False)
            ratios.append(other.ratio(own))
            speed = product.operations / own.median / 1e9
            differs = f"{own.difference:.0e}"
            table.add_row(str(product), f"{1e6 * own.median:.4g}", f"{speed:.1f}", f"{ratios[-1]:.2f}", differs)
    console().print(table)
    click.echo(f"{len(ratios)} products; ratios {min(ratios):.2f} to {max(ratios):.2f}, median {np.median(ratios):.2f}")


if __name__ == "__main__":
    main()
