"""The one exception whose message is meant for the person at the keyboard."""


class UserError(Exception):
    """Bad input: the message is one line that names the thing and, where there is one, the fix."""
