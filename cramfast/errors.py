"""The exceptions whose message, one line, is meant for the person at the keyboard."""


class UserError(Exception):
    """Bad input: the message names the thing and, where there is one, the fix."""


class TrainingFailed(Exception):
    """Training cannot go on."""
