"""What can be wrong with a Hub and what lies there. Each names the model as the document does."""

from __future__ import annotations

from merge_core.errors import CheckpointError, CheckpointNotFound


class HubNotFound(CheckpointNotFound):
    """There is no such repository, revision or file, or none that the token may see."""


class HubGated(CheckpointError):
    """The repository is there, but who made it lets in only those who asked."""

    code = "model-gated"
    title = "A model is gated"


class HubTokenRefused(CheckpointError):
    """The Hub does not know the token: store a good one under the credential's name."""

    code = "hub-token-refused"
    title = "The Hub does not take the token"


class HubUnavailable(CheckpointError):
    """The Hub does not answer, or says that it is busy. Try again later."""

    code = "hub-unavailable"
    title = "The Hub is not available"
    retryable = True


class HubLied(CheckpointError):
    """The Hub sent what it had not promised: other sizes, other bytes, impossible names."""

    code = "upstream-hub-error"
    title = "The Hub sent something else than it said"
    retryable = True


class HubNotAllowed(CheckpointError):
    """The address is none that this service calls: another Hub than those that are allowed, or where one leads."""

    code = "hub-not-allowed"
    title = "This Hub is not called from here"


class HubForbidden(CheckpointError):
    """The token may not write there: name a credential with one that may, or a repository of your own."""

    code = "hub-forbidden"
    title = "The token may not write to the repository"


class HubConflict(CheckpointError):
    """Others kept committing to the branch while this was to be committed. Try again when they are done."""

    code = "hub-conflict"
    title = "The branch kept moving"
    retryable = True
