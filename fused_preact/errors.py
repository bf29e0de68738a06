"""Errors that are for the person at the keyboard."""


class UserError(Exception):
    """Something the user can put right. Its text is one line: what was expected, what came, what to do next.

    The command line prints it without a traceback and exits with code 2.
    """
