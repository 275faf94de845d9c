"""The `expunge` command: words in, one table or one JSON object out, one line for an error.

Exit codes: 0 done; 1 done, and the answer is bad; 2 misuse; 3 unsupported here; 4 interrupted, safe to run again.
"""

from __future__ import annotations

import sys
from typing import Annotated

import click
import typer

from expunge._version import __version__
from expunge.cli.lists import methods, records
from expunge.cli.models import evaluate, forget, train
from expunge.cli.story import demo
from expunge.core.errors import ExpungeError

app = typer.Typer(
    name="expunge",
    help="Secure machine unlearning for PyTorch models.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
for _command in (demo, train, forget, evaluate, records, methods):
    app.command()(_command)


def main() -> None:
    """Run the command line; every expected error ends in one line on standard error and its exit code."""
    try:
        code = app(standalone_mode=False)
    except ExpungeError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
    except click.exceptions.Exit as stop:
        sys.exit(stop.exit_code)
    except (KeyboardInterrupt, click.Abort):
        print("error: interrupted; nothing is half-written, run the same command again", file=sys.stderr)
        sys.exit(4)
    except click.ClickException as error:
        print(f"error: {error.format_message()}", file=sys.stderr)
        sys.exit(2)
    sys.exit(code if isinstance(code, int) else 0)


@app.callback(invoke_without_command=True)
def _root(
    version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False,
) -> None:
    if version:
        print(__version__)
        raise typer.Exit
