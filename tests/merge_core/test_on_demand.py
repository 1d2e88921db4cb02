"""A merge that is computed as it is read has the bytes of one that was run, whatever is read of it, in any order."""

from __future__ import annotations

import json
import random
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from merge_core import on_demand as module
from merge_core.alignment.permutations import Permutations
from merge_core.errors import Canceled, IncompatibleModels, RecipeError
from merge_core.merge import merge
from merge_core.on_demand import PREPARED, OnDemand, on_demand
from merge_core.patches.encodings.dense import Dense
from merge_core.recipe import Recipe
from tests.conftest import CONFIG, METHOD_RECIPES, method_recipe, mixed_tensors, write_checkpoint, write_numbers
from tests.merge_core.test_adapters import Q, factors, write_adapter
from tests.merge_core.test_aligned import AXES, SPEC, mlp, permuted
from tests.merge_core.test_deltas import extract
from tests.merge_core.test_patches import changed


def tensors(seed: int) -> dict[str, Tensor]:
    """One of everything, and a tensor of many grains with bf16 ties."""
    own = torch.Generator().manual_seed(seed)
    start = torch.randn(1500, 96, generator=torch.Generator().manual_seed(99))
    tall = (start + 0.01 * (seed > 0) * torch.randn(1500, 96, generator=own)).bfloat16()
    return mixed_tensors(seed) | {"model.tall": tall}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    for seed, name in enumerate(["base", "m0", "m1", "m2"]):
        write_checkpoint(folder / name, tensors(seed), shards=2, config=CONFIG)
    write_checkpoint(folder / "old", tensors(4), config=CONFIG)
    write_numbers(folder, tensors(0))
    write_adapter(folder / "adapter", factors(Q, 24, 24, 4))
    (folder / ".p").mkdir()
    extract(folder / ".p", mixed_tensors(0), changed(5), Dense()).rename(folder / "p")
    for seed, name in enumerate("abc"):
        write_checkpoint(folder / name, permuted(mlp(0), SPEC.random(seed)) if seed else mlp(0))
    found = {name: SPEC.inverse(SPEC.random(seed)) for seed, name in enumerate("bc", 1)}
    Permutations(SPEC, {"a": SPEC.identity(), **found}, {"to": "first"}).save(folder / "found.safetensors")
    for seed, (name, letters) in enumerate({"latin": "abcd", "more": "edcxyz"}.items()):
        write_speaker(folder / name, letters, seed)
    return folder


def write_speaker(folder: Path, letters: str, seed: int) -> None:
    """A model with a vocabulary of its own."""
    own = torch.Generator().manual_seed(seed)
    shapes = {"model.embed_tokens.weight": (len(letters), 8), "model.norm.weight": (8,)}
    tensors = {name: torch.randn(shape, generator=own) for name, shape in shapes.items()}
    config = {"model_type": "tiny", "vocab_size": len(letters), "tie_word_embeddings": True}
    write_checkpoint(folder, tensors, config=config)
    model = {"type": "BPE", "vocab": {letter: i for i, letter in enumerate(letters)}, "merges": []}
    (folder / "tokenizer.json").write_text(json.dumps({"version": "1.0", "added_tokens": [], "model": model}))


TIES = {"merge_method": "ties", "base_model": "base", "parameters": {"weight": 1, "density": 0.3}}
LINEAR = {"merge_method": "linear", "parameters": {"weight": 0.5}}


def of(*names: str) -> list[dict[str, str]]:
    return [{"model": name} for name in names]


DOCUMENTS: dict[str, Any] = {title: method_recipe(title) for title in METHOD_RECIPES} | {
    "an adapter": LINEAR | {"models": of("base+adapter", "m1")},
    "adapters alone": LINEAR | {"models": of("adapter")},
    "other number formats": LINEAR | {"models": of("m0", "m1"), "out_dtype": "float32"},
    "a row map": LINEAR | {"models": of("latin", "more"), "tokenizer": {"source": "union"}},
    "a patch": TIES | {"models": of("m0", "m1"), "patches": [{"patch": "p", "strength": 0.5}]},
    "a stage": [
        TIES | {"models": of("m0", "m1"), "name": "first", "scope": "model"},
        LINEAR | {"models": of("first", "m2")},
    ],
    "stored permutations": LINEAR | {"models": of("a", "b", "c"), "alignment": {"permutations": "found.safetensors"}},
    "permutations to be found": LINEAR | {"models": of("a", "b", "c"), "alignment": {"to": "mean", "spec": AXES}},
}


def opened(document: Any, models: Path, folder: Path, **how: Any) -> Any:
    how = {"threads": 2, "max_shard_size": 2**18, "block_elements": 3 * 2**16} | how
    return on_demand(Recipe.from_data(document), folder, roots=[models], **how)


def written(document: Any, models: Path, out: Path) -> dict[str, bytes]:
    """The files of weights that a merge writes, and their index."""
    merge(Recipe.from_data(document), out, roots=[models], threads=2, max_shard_size=2**18)
    return {path.name: path.read_bytes() for path in out.iterdir() if ".safetensors" in path.name}


def bytes_of(made: OnDemand, file: str, begin: int = 0, end: int | None = None) -> bytes:
    return b"".join(map(bytes, made.read(file, begin, end)))


@pytest.mark.parametrize("title", DOCUMENTS)
def test_any_range_of_any_file_is_what_merge_writes(models: Path, tmp_path: Path, title: str) -> None:
    """For each method, and for sources that are computed; first in pieces, then whole."""
    document, draw = DOCUMENTS[title], random.Random(title)
    files = written(document, models, tmp_path / "out")
    files.pop("alignment.safetensors", None)

    with opened(document, models, tmp_path / "scratch") as made:
        assert made.sizes == {name: len(data) for name, data in files.items()}
        for name, data in sorted(files.items(), key=lambda _: draw.random())[:3]:
            for _ in range(3):
                begin, end = sorted(draw.choices(range(len(data) + 1), k=2))
                assert bytes_of(made, name, begin, end) == data[begin:end], (name, begin, end)
        assert {name: bytes_of(made, name) for name in files} == files


def test_rows_of_a_tensor(models: Path, tmp_path: Path) -> None:
    document = DOCUMENTS["ties"]
    written(document, models, tmp_path / "out")
    whole = {name: found for file in (tmp_path / "out").glob("model-*") for name, found in load_file(file).items()}

    with opened(document, models, tmp_path / "scratch") as made:
        for name, tensor in whole.items():
            assert torch.equal(made.rows(name), tensor), name
        assert torch.equal(made.rows("model.tall", 834, 1345), whole["model.tall"][834:1345])
        assert made.rows("model.tall", 7, 7).shape == (0, 96)
        with pytest.raises(KeyError):
            made.rows("model.other")


def test_only_blocks_that_are_touched_are_made(models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made_of: list[tuple[str, tuple[int, int]]] = []
    make = module.MergedWeights.make
    monkeypatch.setattr(
        module.MergedWeights, "make", lambda self, *args: made_of.append((args[0].name, args[1])) or make(self, *args)
    )
    with opened(DOCUMENTS["linear"], models, tmp_path / "scratch", max_shard_size=2**30, block_elements=1) as made:
        file, begin, end = made.place("model.tall")
        bytes_of(made, file, 0, 4096)
        assert made_of == []

        bytes_of(made, file, begin + (end - begin) // 2, begin + (end - begin) // 2 + 1)
        assert made_of == [("model.tall", (1, 2))]


def test_any_number_of_threads_read_at_once(models: Path, tmp_path: Path) -> None:
    """More than there is space for: they take turns, and a reader that stops half-way gives its space back."""
    files = written(DOCUMENTS["ties"], models, tmp_path / "out")

    with opened(DOCUMENTS["ties"], models, tmp_path / "scratch") as made:

        def read(name: str) -> bytes:
            next(made.read(name)).release()
            return bytes_of(made, name)

        with ThreadPoolExecutor(12) as readers:
            names = list(files) * 6
            assert list(readers.map(read, names)) == [files[name] for name in names]


@pytest.mark.parametrize("title", ["ties-model", "a stage", "permutations to be found"])
def test_what_all_tensors_depend_on_is_found_once(
    models: Path, tmp_path: Path, title: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whoever opens the same plan again, in another process too, finds it in the folder, which is small."""
    with opened(DOCUMENTS[title], models, tmp_path / "scratch") as made:
        assert made.needs_preparing
        made.prepare()
        files = {name: bytes_of(made, name) for name in made.sizes}
    assert sum(path.stat().st_size for path in (tmp_path / "scratch").iterdir()) < 10_000

    def never(*_: Any, **__: Any) -> Any:
        raise AssertionError("it is known already")

    with opened(DOCUMENTS[title], models, tmp_path / "scratch") as made, monkeypatch.context() as patch:
        patch.setattr("merge_core.alignment.matching.match_many", never)
        patch.setattr(
            "merge_core.blocks.Blocks.observe" if "ties" in title else "merge_core.blocks.Blocks.check_tied", never
        )
        assert {name: bytes_of(made, name) for name in made.sizes} == files


def test_a_kill_while_preparing_costs_a_pass(models: Path, tmp_path: Path) -> None:
    """And what another plan left does not count."""
    document = DOCUMENTS["ties-model"]
    files = written(document, models, tmp_path / "out")
    phases: list[str] = []

    class Killed(BaseException):
        pass

    def kill(progress: Any) -> None:
        phases.append(progress.phase)
        if len(set(phases)) == 3:
            raise Killed

    with opened(document, models, tmp_path / "scratch") as made, pytest.raises(Killed):
        made.prepare(kill)
    kept = [
        json.loads(line.partition(" ")[2]) for line in (tmp_path / "scratch" / PREPARED).read_text().split("\n") if line
    ]
    assert [line["value"]["stages"] for line in kept if line.get("note") == "measured 0"] == [1]

    for other in ("linear", "ties-model"):
        with opened(DOCUMENTS[other], models, tmp_path / "scratch") as made:
            found = {name: bytes_of(made, name) for name in made.sizes}
    assert found == files


def test_reading_can_be_given_up(models: Path, tmp_path: Path) -> None:
    stop = threading.Event()
    with opened(DOCUMENTS["ties"], models, tmp_path / "scratch", stop=stop.is_set) as made:
        with pytest.raises(Canceled):
            list(made.read(next(iter(made.sizes)), stop=lambda: True))
        stop.set()
        with pytest.raises(Canceled):
            bytes_of(made, next(iter(made.sizes)))


def test_what_differs_where_it_should_not_is_refused_before_the_first_byte(tmp_path: Path) -> None:
    tied = {**mixed_tensors(0), "lm_head.weight": mixed_tensors(1)["lm_head.weight"]}
    for name in ("a", "b"):
        write_checkpoint(tmp_path / name, tied, config={**CONFIG, "tie_word_embeddings": True})
    with opened(LINEAR | {"models": of("a", "b")}, tmp_path, tmp_path / "scratch") as made:
        assert made.needs_preparing
        with pytest.raises(IncompatibleModels, match="ties lm_head"):
            bytes_of(made, "model.safetensors", 0, 8)


def test_a_difference_has_no_size_before_it_is_made(models: Path, tmp_path: Path) -> None:
    document = TIES | {"models": of("m0"), "outputs": {"kind": "delta", "encoding": "sparse"}}
    with pytest.raises(RecipeError, match="run it"), opened(document, models, tmp_path / "scratch"):
        pass
