"""A published merge is proved by making it again; whatever was changed in it is found, whoever wrote the lock."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from blake3 import blake3
from click.testing import CliRunner
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from app.cli import main
from merge_core.artifact import LOCK_NAME
from merge_core.errors import CheckpointError, CheckpointNotFound, WeightsmithError
from merge_core.layout import INDEX_NAME
from merge_core.merge import merge
from merge_core.recipe import Recipe
from merge_core.references import ModelRef
from merge_core.verify import Outcome, PublishedFolder, Verification, verify
from tests.conftest import CONFIG, mixed_tensors, write_checkpoint
from tests.merge_core.test_on_demand import DOCUMENTS, LINEAR, TIES, models, of  # noqa: F401 — models is a fixture

Q = "model.layers.1.self_attn.q_proj.weight"


def published(document: Any, root: Path, out: Path, **how: Any) -> Path:
    merge(Recipe.from_data(document), out, roots=[root], **how)
    return out


def checked(folder: Path, root: Path, **how: Any) -> Verification:
    return verify(PublishedFolder(folder), roots=[root], **{"sample": None, "threads": 2, **how})


def disagreeing(found: Verification) -> dict[str, Outcome]:
    return {each.name: each.outcome for each in (*found.files, *found.tensors) if each.outcome is not Outcome.AGREES}


def vouch(folder: Path) -> None:
    """Write a lock that is true of the files, whatever they hold."""
    lock = json.loads((folder / LOCK_NAME).read_text())
    for file in lock["files"]:
        data = (folder / file["path"]).read_bytes()
        file |= {"size": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    for path in folder.glob("model*.safetensors"):
        for name, tensor in load_file(path).items():
            data = tensor.reshape(-1).view(torch.uint8).numpy().tobytes()
            lock["tensors"][name] = {"blake3": blake3(data).hexdigest()}
    (folder / LOCK_NAME).write_text(json.dumps(lock))


def change(folder: Path, name: str, by: float) -> None:
    """Add to the first number of a tensor, in its file."""
    file = next(path for path in folder.glob("model*.safetensors") if name in load_file(path))
    tensors = load_file(file)
    flat = tensors[name].reshape(-1)
    flat[0] += by
    save_file(tensors, file)


@pytest.mark.parametrize(
    "title",
    [
        *("ties-model", "iso_cts", "an adapter", "a row map", "permutations to be found"),
        *(
            pytest.param(title, marks=pytest.mark.slow)
            for title in (
                "linear",
                "ties",
                "dare_linear",
                "adapters alone",
                "a patch",
                "a stage",
                "stored permutations",
            )
        ),
    ],
)
def test_what_was_made_is_what_its_lock_says(models: Path, tmp_path: Path, title: str) -> None:  # noqa: F811
    found = checked(published(DOCUMENTS[title], models, tmp_path / "out", max_shard_size=2**16), models)

    assert disagreeing(found) == {} and found.outcome is Outcome.AGREES
    assert len(found.tensors) == found.tensors_total > 0
    assert {each.outcome for each in found.sources} == {Outcome.AGREES}
    assert json.loads(json.dumps(found.to_data()))["outcome"] == "agrees"
    assert "is what its lock says" in found.to_text()


def test_a_sample_reads_no_more_than_it_needs(models: Path, tmp_path: Path) -> None:  # noqa: F811
    """Of each model the files that the chosen tensors are in; the same seed chooses the same."""
    out = published(DOCUMENTS["ties"], models, tmp_path / "out")
    chosen = [[each.name for each in checked(out, models, sample=1, seed=seed).tensors] for seed in (1, 1, 2, 3)]
    assert chosen[0] == chosen[1] and len({name for names in chosen for name in names}) > 1

    shards = [each for each in checked(out, models, sample=1).sources if each.name.endswith(".safetensors")]
    assert len(shards) == 4  # of two files that each of the four models has


@pytest.mark.parametrize("outputs", [{"kind": "delta", "encoding": "sparse"}, {"kind": "adapter", "rank": 2}])
def test_a_difference_is_made_again_as_a_whole(models: Path, tmp_path: Path, outputs: Any) -> None:  # noqa: F811
    out = published(TIES | {"models": of("m0", "m1"), "outputs": outputs}, models, tmp_path / "out")
    assert checked(out, models).outcome is Outcome.AGREES

    lock = json.loads((out / LOCK_NAME).read_text())
    name = next(iter(lock["tensors"]))
    lock["tensors"][name]["blake3"] = "0" * 64
    (out / LOCK_NAME).write_text(json.dumps(lock))
    assert disagreeing(checked(out, models)) == {name: Outcome.DIFFERS}


def test_a_changed_byte_is_found_even_if_the_lock_was_written_anew(models: Path, tmp_path: Path) -> None:  # noqa: F811
    out = published(DOCUMENTS["ties"], models, tmp_path / "out")
    change(out, Q, 0.25)
    assert disagreeing(checked(out, models)) == {"model.safetensors": Outcome.DIFFERS, Q: Outcome.DIFFERS}

    vouch(out)
    found = checked(out, models)
    assert disagreeing(found) == {Q: Outcome.DIFFERS} and found.outcome is Outcome.DIFFERS
    assert f"tensor {Q} differs: the recipe makes other numbers" in found.to_text()


def test_a_source_that_changed_or_is_gone_is_told(models: Path, tmp_path: Path) -> None:  # noqa: F811
    """What was made of it cannot be checked; what was not, can."""
    shutil.copytree(models, tmp_path / "models")
    out = published(DOCUMENTS["linear"], tmp_path / "models", tmp_path / "out")
    changed = mixed_tensors(1) | {name: tensor for name, tensor in load_shards(models / "m0").items() if "tall" in name}
    changed["lm_head.weight"] = changed["lm_head.weight"] + 1
    write_checkpoint(tmp_path / "models" / "m0", changed, shards=2, config=CONFIG)

    found = checked(out, tmp_path / "models")
    assert disagreeing(found) == {"lm_head.weight": Outcome.UNCHECKED} and found.outcome is Outcome.AGREES
    (why,) = {each.why for each in found.tensors if each.why}
    assert "m0/model-00002-of-00002.safetensors is not the file that was read" in why

    (tmp_path / "models" / "m0").rename(tmp_path / "models" / "elsewhere")
    found = checked(out, tmp_path / "models")
    assert found.outcome is Outcome.UNCHECKED and {each.outcome for each in found.tensors} == {Outcome.UNCHECKED}
    assert "m0: is in none of" in found.tensors[0].why

    found = checked(out, tmp_path / "models", sources={"m0": ModelRef(path="elsewhere")})
    assert disagreeing(found) == {"lm_head.weight": Outcome.UNCHECKED}


def load_shards(folder: Path) -> dict[str, Any]:
    return {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}


def test_bytes_that_depend_on_the_machine_may_be_others_and_numbers_not(models: Path, tmp_path: Path) -> None:  # noqa: F811
    out = published(DOCUMENTS["iso_cts"], models, tmp_path / "out")
    change(out, Q, 1e-2)
    vouch(out)
    assert disagreeing(checked(out, models)) == {Q: Outcome.UNCHECKED}

    change(out, Q, 5.0)
    vouch(out)
    assert disagreeing(checked(out, models)) == {Q: Outcome.DIFFERS}


def _renamed(folder: Path) -> str:
    (folder / "README.md").unlink()
    return "README.md"


def _with_code(folder: Path) -> str:
    (folder / "modeling.py").write_text("print('loaded')")
    return "modeling.py"


def _with_another_config(folder: Path) -> str:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"auto_map": {"AutoModel": "evil--model"}}))
    vouch(folder)
    return "config.json"


def _with_a_tensor_more(folder: Path) -> str:
    file = sorted(folder.glob("model-*.safetensors"))[0]
    save_file(load_file(file) | {"model.more": torch.ones(2)}, file)
    lock = json.loads((folder / LOCK_NAME).read_text())
    tensors = lock["tensors"]
    vouch(folder)
    lock = json.loads((folder / LOCK_NAME).read_text()) | {"tensors": tensors}
    (folder / LOCK_NAME).write_text(json.dumps(lock))
    return file.name


def _twice(folder: Path) -> str:
    first, *_, last = sorted(folder.glob("model-*.safetensors"))
    save_file(load_file(last) | load_file(first), last)
    vouch(folder)
    return last.name


def _index_elsewhere(folder: Path) -> str:
    index = json.loads((folder / INDEX_NAME).read_text())
    index["weight_map"][Q] = "elsewhere.safetensors"
    (folder / INDEX_NAME).write_text(json.dumps(index))
    vouch(folder)
    return INDEX_NAME


def _a_lie_in_a_header(folder: Path) -> str:
    file = sorted(folder.glob("model-*.safetensors"))[0]
    data = file.read_bytes()
    file.write_bytes((2**40).to_bytes(8, "little") + data[8:])
    return file.name


def _forgotten(folder: Path) -> str:
    lock = json.loads((folder / LOCK_NAME).read_text())
    del lock["tensors"][Q]
    (folder / LOCK_NAME).write_text(json.dumps(lock))
    return LOCK_NAME


@pytest.mark.parametrize(
    "attack",
    [
        *(_renamed, _with_code, _with_another_config, _with_a_tensor_more, _twice),
        *(_index_elsewhere, _a_lie_in_a_header, _forgotten),
    ],
)
def test_what_the_lock_does_not_cover_differs(models: Path, tmp_path: Path, attack: Callable[[Path], str]) -> None:  # noqa: F811
    out = published(DOCUMENTS["linear"], models, tmp_path / "out", max_shard_size=2**18)
    assert len(list(out.glob("model-*"))) > 1
    where = attack(out)
    found = checked(out, models)
    assert found.outcome is Outcome.DIFFERS and disagreeing(found)[where] is Outcome.DIFFERS


def test_what_has_no_lock_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointNotFound, match=f"no {LOCK_NAME}"):
        verify(PublishedFolder(tmp_path))
    with pytest.raises(CheckpointNotFound, match="no such folder"):
        verify(PublishedFolder(tmp_path / "nowhere"))


@pytest.mark.parametrize(
    ("change", "wrong"),
    [
        ({"version": 2}, "version"),
        ({"files": [{"path": "../secret", "size": 1, "sha256": "0" * 64}]}, "files/0/path"),
        ({"files": [{"path": "x", "size": -1, "sha256": "0" * 64}]}, "files/0/size"),
        ({"files": [{"path": "x", "size": 1, "sha256": "0"}]}, "files/0/sha256"),
        ({"tensors": {"a": {"blake3": 7}}}, "tensors/a/blake3"),
        ({"sources": {"model": "a"}}, "sources"),
        ({"recipe": "merge_method: linear"}, "recipe"),
    ],
)
def test_a_lock_that_is_none_is_refused_by_place(tmp_path: Path, change: Any, wrong: str) -> None:
    good = {"version": 1, "recipe": {}, "sources": [], "files": [], "tensors": {}}
    (tmp_path / LOCK_NAME).write_text(json.dumps(good | change))
    with pytest.raises(CheckpointError, match=wrong):
        verify(PublishedFolder(tmp_path))


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("small")
    for seed, name in enumerate("ab"):
        write_checkpoint(folder / name, {"a.weight": torch.full((2, 3), seed + 0.5)}, config={"model_type": "x"})
    return published(LINEAR | {"models": of("a", "b")}, folder, folder / "out")


JUNK = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=5,
)


def places(data: Any, here: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    inside = data.items() if isinstance(data, dict) else enumerate(data) if isinstance(data, list) else ()
    return [here, *(place for key, value in inside for place in places(value, (*here, key)))]


@settings(max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_hostile_locks_are_bad_input_and_no_traceback(small: Path, data: st.DataObject) -> None:
    """Anything may stand in any place of a lock: it is refused, or the merge differs, or cannot be checked."""
    lock = json.loads((small / LOCK_NAME).read_text())
    place = data.draw(st.sampled_from(places(lock)))
    junk = data.draw(JUNK)
    hostile: Any = json.loads(json.dumps(lock))
    inside = hostile
    for key in place[:-1]:
        inside = inside[key]
    if place:
        inside[place[-1]] = junk
    else:
        hostile = junk
    folder = small.parent / "hostile"
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(small, folder)
    (folder / LOCK_NAME).write_text(json.dumps(hostile))
    try:
        found = verify(PublishedFolder(folder), roots=[small.parent], sample=None, threads=1)
    except WeightsmithError:
        return
    assert json.dumps(found.to_data()) and found.to_text()


# The command line.


def weightsmith(*arguments: object, status: int) -> str:
    ran = CliRunner().invoke(main, [str(each) for each in arguments], catch_exceptions=False)
    assert ran.exit_code == status, ran.output
    return ran.output


def test_the_command_line_s_exit_status_says_what_was_found(
    models: Path,  # noqa: F811
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(models)
    out = tmp_path / "out"
    merge(Recipe.from_data(DOCUMENTS["ties"]), out)
    assert "is what its lock says" in weightsmith("verify", out, "--all", status=0)
    assert json.loads(weightsmith("verify", out, "--sample", 2, "--json", status=0))["tensors_chosen"] == 2

    monkeypatch.chdir(tmp_path)
    assert "could not be checked" in weightsmith("verify", out, status=3)
    where = [part for name in ("base", "m0", "m1", "m2") for part in ("--source", f"{name}={models / name}")]
    assert "3 agree" in weightsmith("verify", out, "--sample", 3, *where, status=0)

    change(out, Q, 1.0)
    assert "is NOT what its lock says" in weightsmith("verify", out, "--all", *where, status=1)
    assert "no such folder" in weightsmith("verify", tmp_path / "nowhere", status=1)
    weightsmith("verify", out, "--source", "base", status=2)
