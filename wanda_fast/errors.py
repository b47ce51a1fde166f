"""The one exception that means "the caller can fix this": the command line prints it and exits with code 2."""

from __future__ import annotations


class UserError(ValueError):
    """A mistake that one plain line explains (a wrong path, a ratio out of range, a truncated file)."""
