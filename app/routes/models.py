"""The models that recipes may name."""

from __future__ import annotations

import bisect
from typing import Annotated

from fastapi import APIRouter, Query

from app.deps import SettingsDep
from app.local_models import LocalModel, local_models
from app.schemas import ModelPage, ModelRead

MAX_NAME = 4096
router = APIRouter(prefix="/v1/models", tags=["models"])


@router.get("")
def list_models(
    settings: SettingsDep,
    limit: Annotated[int, Query(ge=1, le=100)] = 100,
    after: Annotated[str, Query(max_length=MAX_NAME, description="the `next` of the page before")] = "",
) -> ModelPage:
    """The models in the service's folders, by the names that recipes have for them. Nothing but configs is read."""
    found, was_cut = local_models(settings.roots)
    start = bisect.bisect_right([each.name for each in found], after) if after else 0
    page = [_read(each) for each in found[start : start + limit]]
    more = len(found) > start + limit
    return ModelPage(data=page, has_more=more, next=page[-1].name if more else None, incomplete=was_cut)


def _read(found: LocalModel) -> ModelRead:
    config = found.config()
    names = config.get("architectures")
    names = [*names, config.get("model_type")] if isinstance(names, list) else [config.get("model_type")]
    dtype = config.get("dtype", config.get("torch_dtype"))

    def number(key: str) -> int | None:
        value = config.get(key)
        return value if isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**53 else None

    return ModelRead(
        name=found.name,
        kind=found.kind,
        bytes=found.size,
        architecture=next((name[:200] for name in names if isinstance(name, str)), None),
        dtype=dtype[:40] if isinstance(dtype, str) else None,
        layers=number("num_hidden_layers"),
        hidden_size=number("hidden_size"),
        vocabulary=number("vocab_size"),
    )
