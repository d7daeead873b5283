"""What a loader process raised, without the traceback that torch wraps it in."""

from __future__ import annotations

import re


def innermost(error: BaseException) -> str:
    """The message of an error, also where torch made it anew from the traceback of a loader process.

    Its class is the same as there, and the last line that begins with its name begins the message: errors behind it
    come before, and other classes may be named in the message.
    """
    message, kind = str(error), type(error)
    if not message.startswith(f"Caught {kind.__name__} "):
        return message
    return re.split(rf"\n(?:\w+\.)*{re.escape(kind.__qualname__)}: ", message)[-1].strip()
