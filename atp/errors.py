"""The one class of errors that are the user's to mend.

Below everything else; it imports nothing. What a user can put right (a setting, a file, a folder) is raised as
:class:`UserError` where it is found, and the command line prints its message alone. Every other exception is a fault of
ours and keeps its traceback.
"""

from __future__ import annotations


class UserError(ValueError):
    """A mistake of the user's; the message names the setting or file, the value found and the way out."""
