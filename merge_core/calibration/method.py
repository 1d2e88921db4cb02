"""What a way of calibrating is: keys of a document, and what is done with models and data."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field

from merge_core.documents import Keys
from merge_core.errors import Problem
from merge_core.keys import FileName
from merge_core.references import ModelRef

if TYPE_CHECKING:
    from merge_core.calibration.bench import Bench
    from merge_core.plan import Plan
    from merge_core.recipe import Recipe

Task = Literal["language_model", "text_classification", "image_classification"]


class DataFile(Keys):
    """A file of data below the model folders: JSON lines, parquet, or a text for language models."""

    file: FileName
    model: ModelRef | None = Field(None, description="which of the recipe's models it is about (default: all)")
    samples: int | None = Field(None, ge=1, le=1_000_000, description="so many, from the first on")
    text: str = Field("text", description="the field with the text")
    pair: str | None = Field(None, description="the field with a second text")
    image: str = Field("image", description="of images: the field with a file beside it, or its bytes")
    label: str = Field("label", description="the field with the class: its number, or its name in the model's config")
    weight: float = Field(1.0, ge=0, allow_inf_nan=False, description="how much it counts beside the others")


@dataclass(frozen=True)
class Made:
    """What a calibration came to. `statistics`: by the names that the merge method has for them the files that were
    written, one for all models or one for each (None: none for that one). `parameters` go into the recipe's, `beside`
    into those of each model, `told` goes into `calibration.json`.
    """

    statistics: Mapping[str, str | Sequence[str | None]] = field(default_factory=dict)
    parameters: Mapping[str, Any] = field(default_factory=dict)
    beside: Sequence[Mapping[str, Any]] = ()
    told: Mapping[str, Any] = field(default_factory=dict)
    warnings: Sequence[str] = ()


class Calibrator(Keys, ABC):
    """Base class of all ways: subclass it in a file of `merge_core/calibration/methods`, with a field
    `method: Literal["its_name"]`.

    `serves` names the merge methods whose recipes it fills in; `needs_labels`, whether data without the right answers
    are of no use; `gradients`, whether the pass backwards is run; `taught`, whether what models say of their samples is
    kept in files; `second`, the key under which `checks` are.
    """

    title: ClassVar[str]
    paper: ClassVar[str]
    serves: ClassVar[Sequence[str]]
    gradients: ClassVar[bool] = True
    second: ClassVar[str] = "check"
    taught: ClassVar[bool] = False

    method: str
    data: list[DataFile] = Field(min_length=1, max_length=64)
    task: Task = Field("language_model", description="what the models are")
    samples: int | None = Field(None, ge=1, le=1_000_000, description="so many of each file, where it does not say")
    context: int = Field(512, ge=2, le=2**20, description="tokens of a text at most")
    batch: int = Field(1, ge=1, le=1024, description="samples that go through the model at a time")
    place: str = Field(
        "calibrated",
        pattern=r"^[A-Za-z0-9_][A-Za-z0-9_.-]*(/[A-Za-z0-9_][A-Za-z0-9_.-]*)*$",
        max_length=200,
        description="the folder, as recipes see it, that the files will be put into: recipe.yml names them there",
    )
    merge: bool = Field(False, description="make the model too, beside its recipe")

    @property
    def needs_labels(self) -> bool:
        return False

    @property
    def own(self) -> Sequence[str]:
        """Pieces of names of tensors that each model keeps for itself."""
        return ()

    @property
    def checks(self) -> Sequence[DataFile]:
        """Data that are held out, or whatever else `second` says."""
        return ()

    def problems(self, recipe: Recipe) -> Iterator[Problem]:
        """What is wrong with it beside the recipe's models; pointers are into the document."""
        yield from ()

    def template(self, data: dict[str, Any]) -> dict[str, Any]:
        """A recipe, as plain data, that merges the same tensors and needs no statistics."""
        return data

    def written_bytes(self, plan: Plan) -> int:
        """What it writes, at most about."""
        return 2**20

    def held_bytes(self, plan: Plan) -> int:
        """Memory that it needs at least, besides a model that runs and its gradients."""
        return 0

    def check_plan(self, plan: Plan) -> None:
        """Raise `RecipeError` for what only the plan of the merge tells."""

    @abstractmethod
    def run(self, bench: Bench) -> Made:
        """Do the work. Raises `WeightsmithError`."""
