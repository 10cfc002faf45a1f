"""Models drawn by nnsmith 0.1.0 (Liu et al., ASPLOS 2023), written into a folder: run by `make nnsmith`.

    python nnsmith_models.py FOLDER [COUNT [FIRST_SEED]]

Runs in an environment of its own that has nnsmith, torch and onnx, and not onnxc. Each model is FOLDER/SEED.onnx beside
FOLDER/SEED.npz: its inputs as `input:NAME`, and what torch computed for them as `output:NAME`. What is there already is
kept, so that a stopped run goes on.
"""

from __future__ import annotations

import functools
import random
import sys
import time
from pathlib import Path

import numpy as np
import torch

# nnsmith is older than the exporter that became torch's default, which cannot export its modules.
torch.onnx.export = functools.partial(torch.onnx.export, dynamo=False)

from nnsmith import narrow_spec  # noqa: E402
from nnsmith.abstract.extension import activate_ext  # noqa: E402
from nnsmith.graph_gen import model_gen  # noqa: E402
from nnsmith.materialize import Model  # noqa: E402
from nnsmith.util import set_seed  # noqa: E402

MAX_NODES = (5, 8, 12, 20, 30)
"""Of one model each in turn."""


def operators(kind: type[Model]) -> list[type]:
    """The operators that can be exported; nnsmith tries each once and keeps what it found in the user's cache folder.

    A run that failed (without `dynamo=False` every export does) has left an empty list there, which is removed.
    """
    listing = Path(narrow_spec.NNSMITH_CACHE_DIR) / f"{narrow_spec.get_cache_name(kind, None)}.yaml"
    if listing.exists() and not narrow_spec.load_topset(listing):
        listing.unlink()
    found = list(narrow_spec.auto_opset(kind, None))
    if not found:
        listing.unlink()
        sys.exit("nnsmith could export none of its operators")
    return found


def draw(kind: type[Model], opset: list[type], seed: int, path: Path) -> None:
    """Writes the model of a seed, with the inputs and outputs that nnsmith's own check would use."""
    set_seed(seed)
    generator = model_gen(
        opset=opset, method="symbolic-cinit", seed=seed, max_nodes=MAX_NODES[seed % len(MAX_NODES)], timeout_ms=3000
    )
    model = kind.from_gir(generator.make_concrete())
    model.refine_weights()
    oracle = model.make_oracle()
    arrays = {f"input:{name}": np.asarray(array) for name, array in oracle.input.items()}
    arrays |= {f"output:{name}": np.asarray(array) for name, array in (oracle.output or {}).items()}
    np.savez(path.with_suffix(".npz"), **arrays)
    path.write_bytes(model.native_model.SerializeToString())


def main(folder: str, count: str = "1000", first: str = "0") -> None:
    """Draws models until there are `count`; a seed that nnsmith fails on is left out."""
    torch.set_num_threads(1)
    kind = Model.init("onnx", backend_target="cpu")
    kind.add_seed_setter()
    opset = operators(kind)
    activate_ext(opset=opset, factory=None)
    target = Path(folder)
    target.mkdir(parents=True, exist_ok=True)
    seed, made, failed, start = int(first), 0, 0, time.monotonic()
    while made < int(count):
        path = target / f"{seed:05d}.onnx"
        try:
            if not path.exists():
                random.seed(seed)
                draw(kind, opset, seed, path)
            made += 1
        except Exception as error:
            failed += 1
            print(f"seed {seed}: {type(error).__name__}: {str(error).splitlines()[:1]}", flush=True)
        seed += 1
        if made % 50 == 0:
            print(f"{made} models, {failed} seeds failed, {time.monotonic() - start:.0f} s", flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
