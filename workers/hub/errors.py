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
