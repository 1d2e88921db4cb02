"""Candidates made side by side: block after block of all of them, so that what they read is read from the disk once.

They are scratch: nothing is hashed, nothing made durable, and there is no lock; weights, config and tokenizer files
have the bytes that `merge` would write.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path

from merge_core.artifact import place_file, small_files
from merge_core.errors import Canceled
from merge_core.on_demand import OnDemand, on_demand
from merge_core.recipe import Recipe

LIBRARIES = 400 * 2**20
"""Bytes of memory that the process has however many candidates there are."""


def merge_together(
    recipes: Sequence[Recipe],
    folders: Sequence[Path],
    *,
    roots: Sequence[Path] | None,
    memory: int,
    threads: int | None,
    stop: Callable[[], bool],
) -> None:
    """Write the files of whole models into folders that are not there yet; all of it within `memory` (bytes).

    What each recipe's methods measure over the whole model is measured for each. Raises `WeightsmithError`.
    """
    share = LIBRARIES + max(0, memory - LIBRARIES) // len(recipes)
    with ExitStack() as stack:
        made = []
        for recipe, folder in zip(recipes, folders, strict=True):
            folder.mkdir()
            beside = folder.with_name(f"{folder.name}.prepared")
            how = on_demand(recipe, beside, roots=roots, memory=share, threads=threads, stop=stop)
            made.append(stack.enter_context(how))
            made[-1].prepare()
        for file in dict.fromkeys(name for each in made for name in each.sizes):
            _write(file, made, folders, stop)
        for each, folder in zip(made, folders, strict=True):
            for name, content in small_files(each.plan, each.inputs).items():
                place_file(content, folder / name)
            each.check_unchanged()


def _write(file: str, made: Sequence[OnDemand], folders: Sequence[Path], stop: Callable[[], bool]) -> None:
    """One file of all candidates that have it, a block of each in turn."""
    with ExitStack() as stack:
        growing: list[tuple[Iterator[memoryview], Callable[[memoryview], object]]] = []
        for each, folder in zip(made, folders, strict=True):
            if file in each.sizes:
                growing.append((each.read(file), stack.enter_context((folder / file).open("wb")).write))
        while growing:
            if stop():
                raise Canceled("the search was canceled")
            for parts, write in list(growing):
                if (part := next(parts, None)) is None:
                    growing.remove((parts, write))
                else:
                    write(part)
