"""Every error that expunge raises on purpose.

    ExpungeError
    |-- Misuse                    what was asked cannot be meant; mend the call            (exit code 2)
    |   |-- BadRecords            rows, labels, ids or owners that cannot be trained on
    |   |-- BadRecipe             a recipe that describes no training
    |   |-- UnknownRecord         an id, owner or class that the data set does not hold
    |   |-- NeverTrained          a record that this model was never trained on
    |   |-- EmptyRetain           a request that would leave nothing to train on
    |   |-- UnreadableFile        a file that is not what it is said to be
    |   |-- CodeNotAllowed        a recipe that names code, without leave to run it
    |   |-- OtherBody             a request under a key that another request was filed under
    |   `-- NotNow                a step that a request in this state cannot take
    |-- Unsupported               not possible here; the message names what is            (exit code 3)
    |-- Impossible                not possible anywhere; the message says why             (exit code 3)
    |-- BudgetExhausted           a privacy budget fixed beforehand is spent              (exit code 3)
    |-- NothingChanged            a method returned the model as it was and called it done
    |-- Corrupt                   stored bytes are not those that were written
    |-- Overtaken                 another worker has taken over; nothing was changed        (exit code 4)
    |-- Unwritable                the disk or database refused; nothing was changed         (exit code 4)
    `-- Stopped                   interrupted; the message says how to go on              (exit code 4)

A message is one line: what was wrong, what was got, what to do instead.
"""

from __future__ import annotations


class ExpungeError(Exception):
    """Root of everything that expunge raises on purpose."""

    exit_code = 2


class Misuse(ExpungeError, ValueError):
    """What was asked cannot be meant: mend the call."""


class BadRecords(Misuse):
    """Rows, labels, ids or owners that cannot be trained on."""


class BadRecipe(Misuse):
    """A recipe that describes no training."""


class UnknownRecord(Misuse):
    """An id, owner or class that the data set does not hold."""


class NeverTrained(Misuse):
    """A record that this model was never trained on, so that there is nothing to remove."""


class EmptyRetain(Misuse):
    """A request that would leave nothing to train on."""


class UnreadableFile(Misuse):
    """A file that is missing, torn, or not of the format that it is said to be."""


class CodeNotAllowed(Misuse):
    """A recipe names code (``package.module:callable``) and nobody has allowed it to run."""


class OtherBody(Misuse):
    """A request under an idempotency key that another request was filed under."""


class NotNow(Misuse):
    """A step that a request cannot take in the state that it is in."""


class Unsupported(ExpungeError):
    """Not possible here, though possible otherwise: the message names what to use."""

    exit_code = 3


class Impossible(ExpungeError):
    """Not possible anywhere: the message says why."""

    exit_code = 3


class BudgetExhausted(ExpungeError):
    """A privacy budget that was fixed beforehand is spent; the message names what can still be done."""

    exit_code = 3


class NothingChanged(ExpungeError):
    """A method was asked to remove rows and returned the model as it was."""


class Corrupt(ExpungeError):
    """Stored bytes are not those that were written."""


class Overtaken(ExpungeError):
    """Another worker has taken over what this one was doing; nothing was changed."""

    exit_code = 4


class Unwritable(ExpungeError):
    """The disk or the database refused to write; nothing was changed, and it is safe to run again."""

    exit_code = 4


class Stopped(ExpungeError):
    """Work was interrupted and can be resumed: the message says how."""

    exit_code = 4
