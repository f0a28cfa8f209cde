"""What goes wrong with the twin, told to the person who called it."""

from __future__ import annotations


class StackError(Exception):
    """The twin cannot be brought where it should be; the message names the part and the next move."""
