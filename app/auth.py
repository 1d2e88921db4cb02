"""Who is asking."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from fastapi import Depends

from workers.tables import LOCAL_OWNER


@dataclass(frozen=True)
class Caller:
    """Whoever sent a request: what they make belongs to `owner`, and they see nothing else."""

    owner: str


def _caller() -> Caller:
    return Caller(LOCAL_OWNER)


CallerDep = Annotated[Caller, Depends(_caller)]
