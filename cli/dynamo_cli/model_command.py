"""`dynamo model tiny`: makes the model that lets a real engine run with nothing downloaded."""

import re
from pathlib import Path
from typing import Annotated

import typer


def tiny(
    out: Annotated[Path, typer.Option(help="Folder to write the model to; made if missing.")],
    seed: Annotated[int, typer.Option(min=0, help="Seed of the random weights.")] = 0,
    force: Annotated[
        bool, typer.Option("--force", help="Write even into a folder that holds other files.")
    ] = False,
    adapters: Annotated[
        list[str] | None,
        typer.Option(
            "--adapter",
            metavar="NAME",
            help="Write a random LoRA adapter beside it, to OUT-NAME; can be repeated.",
        ),
    ] = None,
) -> None:
    """Write a tiny random Llama with a tokenizer and a chat template.

    The answers of this model mean nothing; it is made for trying and testing everything around an
    engine. Running the command again writes the same bytes.

    Examples:

      dynamo model tiny --out models/tiny && vllm serve models/tiny

      dynamo model tiny --out models/tiny --adapter poet && vllm serve models/tiny --enable-lora
      --lora-modules poet=models/tiny-poet
    """
    # Imported here: numpy belongs to the extra `worker`, and other commands do without it.
    from dynamo_workers.tiny import is_tiny_model, write_adapter, write_model

    for name in adapters or ():
        if not re.fullmatch(r"[A-Za-z0-9._-]+", name):
            raise typer.BadParameter(
                f"{name!r} must consist of letters, digits, '.', '_' and '-'",
                param_hint="--adapter",
            )
    beside = [out.with_name(f"{out.name}-{name}") for name in adapters or ()]
    for folder in (out, *beside):
        if folder.exists() and not folder.is_dir():
            raise typer.BadParameter(f"{folder} is a file; give a folder", param_hint="--out")
        holds = folder.is_dir() and any(folder.iterdir())
        if not force and holds and not is_tiny_model(folder):
            raise typer.BadParameter(
                f"{folder} holds files that this command did not write; "
                "give an empty or new folder, or --force",
                param_hint="--out",
            )
    try:
        write_model(out, seed=seed)
        for number, folder in enumerate(beside):
            write_adapter(folder, seed=seed + number)
    except OSError as error:
        typer.echo(f"dynamo model tiny: {error.filename or out}: {error.strerror}", err=True)
        raise typer.Exit(1) from None
    size = sum(path.stat().st_size for path in out.iterdir() if path.is_file())
    typer.echo(f"{out}: tiny random Llama, seed {seed}, {size / 1e6:.1f} MB")
