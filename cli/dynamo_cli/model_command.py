"""`dynamo model tiny`: makes the model that lets a real engine run with nothing downloaded."""

from pathlib import Path
from typing import Annotated

import typer


def tiny(
    out: Annotated[Path, typer.Option(help="Folder to write the model to; made if missing.")],
    seed: Annotated[int, typer.Option(min=0, help="Seed of the random weights.")] = 0,
    force: Annotated[
        bool, typer.Option("--force", help="Write even into a folder that holds other files.")
    ] = False,
) -> None:
    """Write a tiny random Llama with a tokenizer and a chat template.

    The answers of this model mean nothing; it is made for trying and testing everything around an
    engine. Running the command again writes the same bytes.

    Example: dynamo model tiny --out models/tiny && vllm serve models/tiny
    """
    # Imported here: numpy belongs to the extra `worker`, and other commands do without it.
    from dynamo_workers.tiny import is_tiny_model, write_model

    if out.exists() and not out.is_dir():
        raise typer.BadParameter(f"{out} is a file; give a folder", param_hint="--out")
    if not force and out.is_dir() and any(out.iterdir()) and not is_tiny_model(out):
        raise typer.BadParameter(
            f"{out} holds files that this command did not write; "
            "give an empty or new folder, or --force",
            param_hint="--out",
        )
    try:
        write_model(out, seed=seed)
    except OSError as error:
        typer.echo(f"dynamo model tiny: {error.filename or out}: {error.strerror}", err=True)
        raise typer.Exit(1) from None
    size = sum(path.stat().st_size for path in out.iterdir() if path.is_file())
    typer.echo(f"{out}: tiny random Llama, seed {seed}, {size / 1e6:.1f} MB")
