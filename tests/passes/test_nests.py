"""The generic schedule: which loops a definition becomes."""

from __future__ import annotations

from onnxc.ir.dims import symbol
from onnxc.ir.dtypes import F32
from onnxc.ir.functions import exp, maximum, sqrt
from onnxc.ir.loops import Kernel, free_sizes
from onnxc.ir.scalars import Buffer, Scalar
from onnxc.ir.tensors import Indices, Tensor, buffer_tensor, compute, reduce_axes, reduce_tensor
from onnxc.passes.nests import build_nests
from pass_checks import filecheck

BATCH = symbol("batch")


def nests(*outputs: Tensor) -> str:
    """The text of the kernel that stores the tensors to y0, y1, ..."""
    pairs = [(Buffer(f"y{i}", t.dtype, t.size), t) for i, t in enumerate(outputs)]
    body = build_nests(pairs)
    return str(Kernel("k", tuple(b for b, _ in pairs), tuple(b.name for b, _ in pairs), free_sizes(body), body))


def test_elementwise_over_all_axes_is_one_flat_loop() -> None:
    x = buffer_tensor("x", F32, (BATCH, 3, 5, 7))
    filecheck(
        """
        // CHECK: parallel for [[C:\\w+]] <
        // CHECK: vector for
        // CHECK-NEXT: y0[{{.*}}] = max(x[{{.*}}], 0.0)
        // CHECK-NOT: for
        """,
        nests(maximum(x, 0.0)),
    )


def test_a_bias_keeps_its_axis() -> None:
    x, bias = buffer_tensor("x", F32, (2, 32, 14, 14)), buffer_tensor("b", F32, (32, 1, 1))
    filecheck(
        """
        // CHECK: for i0 < 2
        // CHECK: for i1 < 32
        // CHECK: vector for i2i3 < 196
        // CHECK-NEXT: (x[6272*i0+196*i1+i2i3] + b[i1])
        """,
        nests(x + bias),
    )


def softmax(x: Tensor, axis: int) -> Tensor:
    e = exp(x - reduce_axes("max", x, (axis,)))
    return e / reduce_axes("add", e, (axis,))


def test_softmax_is_three_passes_over_a_row_and_one_exp() -> None:
    text = nests(softmax(buffer_tensor("x", F32, (BATCH, 128, 768)), 2))
    filecheck(
        """
        // CHECK: parallel for [[R:\\w+]] < 128*batch
        // CHECK: var [[TOP:\\w+]] = -inf
        // CHECK: vector for
        // CHECK: var [[SUM:\\w+]] = 0.0
        // CHECK: vector for
        // CHECK-NEXT: y0[{{.*}}] = exp(
        // CHECK: vector for
        // CHECK-NEXT: y0[{{.*}}] = (y0[
        """,
        text,
    )
    assert text.count("exp(") == 1


def test_softmax_over_channels_runs_along_the_image() -> None:
    """The reduced axis is not the last one: vectors lie along the last, the reduction is serial in each lane."""
    filecheck(
        """
        // CHECK: for i0 < batch
        // CHECK: vector for i2i3 < 196
        // CHECK: serial for {{.*}} < 32
        // CHECK: serial for {{.*}} < 32
        // CHECK: serial for i1 < 32
        """,
        nests(softmax(buffer_tensor("x", F32, (BATCH, 32, 14, 14)), 1)),
    )


def test_layer_norm_needs_no_scratch() -> None:
    x = buffer_tensor("x", F32, (BATCH, 768))
    centred = x - reduce_axes("add", x, (1,)) * (1 / 768)
    variance = reduce_axes("add", centred * centred, (1,)) * (1 / 768)
    text = nests(centred / sqrt(variance + 1e-5))
    assert text.count("vector for") == 3
    assert "stack" not in text


def test_global_average_is_a_vector_reduction_per_channel() -> None:
    filecheck(
        """
        // CHECK: for i0i1 < 32*batch
        // CHECK-NEXT: var
        // CHECK-NEXT: vector for {{.*}} < 196
        // CHECK-NEXT: add
        // CHECK-NEXT: y0[i0i1] =
        """,
        nests(reduce_axes("add", buffer_tensor("x", F32, (BATCH, 32, 14, 14)), (2, 3)) * (1 / 196)),
    )


def test_window_of_channels_last_images_runs_along_channels() -> None:
    x = buffer_tensor("x", F32, (1, 9, 9, 64))
    pooled = reduce_tensor(
        "max", (1, 7, 7, 64), F32, (3, 3), lambda i, r: x.at((i[0], i[1] + r[0], i[2] + r[1], i[3])), x
    )
    filecheck(
        """
        // CHECK: vector for i2i3 < 448
        // CHECK-NEXT: var
        // CHECK-NEXT: serial for {{.*}} < 3
        // CHECK-NEXT: serial for {{.*}} < 3
        """,
        nests(pooled),
    )


def test_two_results_of_one_shape_share_their_loops() -> None:
    x = buffer_tensor("x", F32, (BATCH, 16))
    text = nests(x * 2.0, x + 1.0)
    assert text.count("vector for") == 1


def test_an_empty_result_has_no_loops() -> None:
    x = buffer_tensor("x", F32, (0, 16))
    assert "for" not in nests(x * 2.0)


def test_generated_tensor_has_no_inputs() -> None:
    from onnxc.ir.scalars import cast, index

    filecheck(
        "// CHECK: y0[i0] = f32(i0)",
        nests(compute((5,), F32, lambda i: cast(index(i), F32))),
    )


def test_a_window_is_no_vector_though_an_operand_is_transposed() -> None:
    """A pooling beside an operand in another order of axes: vectors run along the output, not along the window."""
    height, width = symbol("height"), symbol("width")
    x, other = buffer_tensor("x", F32, (BATCH, 8, height, width)), buffer_tensor("o", F32, (BATCH, height, width, 8))

    def window(i: Indices, r: Indices) -> Scalar:
        return x.at((i[0], i[1], i[2] + r[0], i[3] + r[1]))

    pooled = reduce_tensor("add", (BATCH, 8, height - 2, width - 2), F32, (3, 3), window, x)
    filecheck(
        """
        // CHECK: vector for i3
        // CHECK: serial for ir1_1 < 3
        """,
        nests(compute(pooled.shape, F32, lambda *i: pooled.at(i) - other.at((i[0], i[2], i[3], i[1])), pooled, other)),
    )
