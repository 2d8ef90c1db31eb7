"""The errors a user can cause or must hear about, apart from any layer so that all of them may raise them.

Every message answers four questions: what went wrong, what was observed, what was expected, what to do.
``attnbench.cli`` prints the message without a traceback and exits with :attr:`AttnbenchError.exit_code`.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class AttnbenchError(Exception):
    """Base of every error that attnbench reports to a user; exits with code 3 (infrastructure)."""

    exit_code = 3


class UsageError(AttnbenchError):
    """The command, a name or an input file is wrong; nothing was changed. Exits with code 2."""

    exit_code = 2


class AttnbenchWarning(UserWarning):
    """A condition that the user should know of but that does not stop the work."""


def unknown_name(kind: str, name: str, known: Iterable[str], hint: str = "") -> UsageError:
    """Error for a name that is not in ``known``, with the nearest spelling or the list of what exists."""
    names = sorted(known)
    near = difflib.get_close_matches(name, names, n=3, cutoff=0.6)
    if near:
        advice = f"did you mean {' or '.join(near)}?"
    elif len(names) <= 40:
        advice = f"expected one of: {', '.join(names)}."
    else:
        advice = f"expected one of {len(names)} names."
    return UsageError(f"unknown {kind} {name!r}: {advice}{' ' + hint if hint else ''}")
