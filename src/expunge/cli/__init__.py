"""The `expunge` command: words in, one table or one JSON object out, one line for an error.

Exit codes: 0 done; 1 done, and the answer is bad; 2 misuse; 3 unsupported here; 4 interrupted, safe to run again.
"""

from __future__ import annotations

import os
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Annotated, Any, NoReturn, cast

import typer

from expunge._version import __version__
from expunge.cli.certify import app as certify
from expunge.cli.compare import compare
from expunge.cli.handover import certificate
from expunge.cli.ledger import log, verify_bundle
from expunge.cli.lists import methods, records
from expunge.cli.models import evaluate, forget, train
from expunge.cli.redteam import redteam
from expunge.cli.requests import cancel, deny, extend, identify, release, request
from expunge.cli.standing import export, status
from expunge.cli.story import demo
from expunge.cli.sweeping import sweep
from expunge.cli.verify import app as verify
from expunge.cli.workspace import init, register_model, run
from expunge.core.errors import ExpungeError

app = typer.Typer(
    name="expunge",
    help="Secure machine unlearning for PyTorch models.",
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
_ON_MODELS = (demo, train, forget, evaluate, compare, redteam, records, methods)
_IN_A_WORKSPACE = (
    *(init, register_model, request, status, run, release, deny, cancel, extend, identify),
    *(certificate, verify_bundle, log, sweep, export),
)
for _command in (*_ON_MODELS, *_IN_A_WORKSPACE):
    app.command()(_command)
app.add_typer(certify, name="certify")
app.add_typer(verify, name="verify")

# Some versions of typer bring a click of their own, others use the package: its public name leads to the right one.
_USAGE_ERROR: type[Exception] = typer.BadParameter.__bases__[0]


@cache
def parser() -> Any:
    """The command with all its subcommands; made once in a process, for that takes a while."""
    return typer.main.get_command(app)


def main() -> None:
    """Run the command line; every expected error ends in one line on standard error and its exit code."""
    try:
        with _warnings_of_one_line():
            command = parser()
            # Not `app()`, which turns an interrupt into an exit code of its own.
            with command.make_context("expunge", sys.argv[1:]) as context:
                code = command.invoke(context)
            sys.stdout.flush()
    except ExpungeError as error:
        _fail(str(error), error.exit_code)
    except typer.Exit as stop:
        sys.exit(stop.exit_code)
    except (KeyboardInterrupt, typer.Abort):
        _fail("interrupted; nothing is half-written, so run the same command again", 4)
    except _USAGE_ERROR as error:
        wrong = cast(typer.BadParameter, error)
        where = wrong.ctx.command_path if wrong.ctx is not None else "expunge"
        _fail(f"{wrong.format_message().rstrip('.')}; see: {where} --help", 2)
    except BrokenPipeError:  # the reader, `head` for one, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(0)
    except OSError as error:
        _fail(f"{error.filename or 'a file'} cannot be read or written ({error.strerror or error}); check the path", 2)
    sys.exit(code if isinstance(code, int) else 0)


def _fail(message: str, code: int) -> NoReturn:
    print(f"error: {' '.join(message.split())}", file=sys.stderr)
    sys.exit(code)


@contextmanager
def _warnings_of_one_line() -> Iterator[None]:
    """Within: a warning is one line without the place in the code that it came from."""
    with warnings.catch_warnings():
        warnings.showwarning = lambda message, *_: print(f"warning: {message}", file=sys.stderr)
        yield


@app.callback(invoke_without_command=True)
def _root(
    context: typer.Context,
    version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False,
) -> None:
    if version:
        print(__version__)
    elif context.invoked_subcommand is None:
        print(context.get_help())
