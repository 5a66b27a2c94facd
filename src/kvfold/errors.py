"""The errors that a user can act on: one line each, which says what is wrong and what to do."""


class KvfoldError(Exception):
    """A mistake in the input or the surroundings. The command line prints it as one line and exits with status 2."""


class PlanError(KvfoldError, ValueError):
    """A plan that can't be read or can't work."""


class ModelError(KvfoldError, ValueError):
    """A model that can't be loaded, or whose attention kvfold can't serve."""


class FileError(KvfoldError, OSError):
    """A file or folder that is missing, damaged, foreign or not writable."""
