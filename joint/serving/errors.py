"""What can be wrong with an export or a request, by name, so that a server can tell them apart."""

from joint.errors import UserError


class ExportError(UserError):
    """An exported folder is incomplete, changed, of mixed versions or of another format."""


class RequestError(UserError):
    """A request lacks a field, has one too many, or holds a value of another kind."""


class CheckError(UserError):
    """An exported folder does not answer its own golden requests as the training forward did."""
