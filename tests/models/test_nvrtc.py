"""What is generated of real models, compiled for real GPUs by NVRTC: nothing spills, and products use tensor cores.

By default each model is compiled in one precision for sm_80 and sm_90; in f32 and f16 where $ONNXC_CUDA_CASES is "all",
as in `make conformance`.
"""

from __future__ import annotations

import os
import re

import pytest
from onnxc.backends.cuda.build import kernel_texts
from onnxc.backends.cuda.nvrtc import compile_kernels, is_available
from onnxc.backends.cuda.source import prelude
from onnxc.compiler.driver import graph_of, program_of
from onnxc.compiler.options import Options
from onnxc.ir import loops as k
from onnxc.ir.intrinsics import MATRIX_OPERANDS
from onnxc.ir.program import Program
from onnxc.ir.target import Target

from .test_cuda import COMPILED
from .zoo import ZooModel

pytestmark = pytest.mark.skipif(not is_available(), reason="NVRTC is not installed: pip install nvidia-cuda-nvrtc")

PRODUCT = re.compile("conv|matmul|gemm|attention|depthwise|_mma_|_lanes_|_few_rows_")
PRODUCTS = {name for name, _ in MATRIX_OPERANDS.values()}
# Ranks that values of inputs decide: these are compiled when the values are known.
WHOLE = [model for model in COMPILED if model.name not in ("silero", "silero_16k_op15", "silero_half")]
ALL = os.environ.get("ONNXC_CUDA_CASES") == "all"
CASES = [
    (model, precision)
    for number, model in enumerate(WHOLE)
    for position, precision in enumerate(("f16", "f32"))
    if ALL or number % 2 == position
]


def lowered(model: ZooModel, precision: str, architecture: str) -> Program:
    options = Options(f"cuda:{architecture}", precision=precision)
    return program_of(graph_of(model.source(), options), Target.parse(f"cuda:{architecture}"))


def uses_tensor_cores(kernel: k.Kernel) -> bool:
    return any(isinstance(st, k.Intrinsic) and st.name in PRODUCTS for st in k.walk(kernel.body))


@pytest.mark.parametrize("architecture", ["sm_80", "sm_90"])
@pytest.mark.parametrize(("model", "precision"), CASES, ids=lambda value: getattr(value, "name", value))
def test_no_kernel_spills(model: ZooModel, precision: str, architecture: str) -> None:
    program = lowered(model, precision, architecture)
    results = compile_kernels(prelude(), kernel_texts(program.kernels), architecture)
    assert results.keys() == program.kernels.keys()
    spilling = {name: bytes for name, result in results.items() if (bytes := result.resources[name].spill_store_bytes)}
    assert not {name for name in spilling if PRODUCT.search(name)}
    # Blocks of 1024 threads leave a row's kernel 64 registers: a word or two may not find one.
    assert max(spilling.values(), default=0) <= 16, spilling
    for name, kernel in program.kernels.items():
        if uses_tensor_cores(kernel):
            assert results[name].resources[name].stack_bytes == 0, name


@pytest.mark.parametrize("name", ["random_resnet50", "khmersm", "random_squeezenet"])
def test_products_of_half_types_use_tensor_cores(name: str) -> None:
    (model,) = (model for model in COMPILED if model.name == name)
    program = lowered(model, "f16", "sm_90")
    with_products = {name: kernel for name, kernel in program.kernels.items() if uses_tensor_cores(kernel)}
    assert len(with_products) >= 5
    chosen = dict(list(with_products.items())[:5])
    for result in compile_kernels(prelude(), kernel_texts(chosen), "compute_90").values():
        text = result.image.decode()
        assert "mma.sync.aligned.m16n8k16" in text and "ldmatrix" in text and "cp.async" in text
