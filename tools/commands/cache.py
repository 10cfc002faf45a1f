"""`onnxc cache`: what is kept of models that were compiled, and how to throw it away."""

from __future__ import annotations

import click


@click.command(short_help="Show or clear what is kept of compiled models.")
@click.option("--clear", is_flag=True, help="Delete all of it.")
@click.option("--limit", metavar="BYTES", help="Delete what was used longest ago until so much is left, such as 2G.")
def command(clear: bool, limit: str | None) -> None:
    """Shows where compiled models and kernels are kept, and how much there is of them.

    A model that was compiled before, with the same options, is loaded from there; a kernel that equals one of another
    model is not compiled again. What was used longest ago goes by itself when there is too much. $ONNXC_CACHE_DIR moves
    the folder; $ONNXC_MODEL_CACHE_BYTES sets how much is kept of models, 0 keeps none.

    \b
    onnxc cache                   the folders, how many files, how many bytes
    onnxc cache --limit 1G        keep the models used last
    onnxc cache --clear           keep nothing
    """
    from ...backends.object_cache import ObjectCache
    from ...compiler.cache import ModelCache
    from ...compiler.limits import format_bytes, parse_bytes
    from ..terminal import console, table_of

    models, objects = ModelCache.default(), ObjectCache.default()
    if clear or limit is not None:
        least = 0 if clear or limit is None else parse_bytes(limit)
        freed = models.prune(least) + (objects.prune(0) if clear else 0)
        click.echo(f"{format_bytes(freed)} freed")
        return
    table = table_of("kept", "files", "size", "at most", "folder")
    for name, sizes, limits, folder in (
        ("models", [size for _, size, _ in models.files()], models.limit, models.folder),
        ("kernels", objects.sizes(), objects.limit, objects.folder),
    ):
        table.add_row(name, str(len(sizes)), format_bytes(sum(sizes)), format_bytes(limits), str(folder))
    console().print(table)
