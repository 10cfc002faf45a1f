"""Writes the real models with their inputs into a folder, for `python -m onnxc.tools.gpu_check --models FOLDER` on a
machine that has neither the tests' packages nor a network. In the folder `tests`:

    python -m models.carry FOLDER
"""

import shutil
from pathlib import Path

import click
import numpy as np

from .zoo import MODELS


@click.command()
@click.argument("folder", type=click.Path(file_okay=False, path_type=Path))
@click.option("--largest", default=16, show_default=True, help="MiB of a model; larger ones are left out.")
@click.option("--only", multiple=True, help="A model's name; all by default. Repeatable.")
def main(folder: Path, largest: int, only: tuple[str, ...]) -> None:
    """One .onnx for each model, one .npz for each of its cases."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, model in MODELS.items():
        if only and name not in only:
            continue
        source = model.source()
        content = source if isinstance(source, bytes) else source.read_bytes()
        external = [] if isinstance(source, bytes) else sorted(source.parent.glob(f"{source.name}.*"))
        if len(content) + sum(file.stat().st_size for file in external) > largest << 20:
            click.echo(f"{name}: {len(content) >> 20} MiB, left out")
            continue
        (folder / f"{name}.onnx").write_bytes(content)
        for file in external:  # a model names the files of its data, so these keep their names
            shutil.copy(file, folder / file.name)
        for case, arrays in model.cases().items():
            np.savez_compressed(folder / f"{name}.{case}.npz", **arrays)
        click.echo(name)


if __name__ == "__main__":
    main()
