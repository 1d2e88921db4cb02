"""What an enemy may put into files and recipes: refused in words, at once, in little memory. See docs/threats.md."""

from __future__ import annotations

import json
import os
import pickle
import resource
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import save_file

from merge_core import checkpoint
from merge_core.checkpoint import Checkpoint
from merge_core.documents import MAX_VALUES
from merge_core.errors import CheckpointError, PathNotAllowed, RecipeError, UnsafeFormat, WeightsmithError
from merge_core.headers import MAX_CONFIG_BYTES, MAX_HEADER_BYTES, MAX_INDEX_BYTES, MAX_TENSORS, read_header
from merge_core.merge import merge, plan_only
from merge_core.recipe import Recipe
from tests.conftest import CONFIG, mixed_tensors, write_checkpoint

EMPTY = '{"dtype":"F32","shape":[0],"data_offsets":[0,0]}'
FULL = MAX_HEADER_BYTES - 100


def _many(count: int) -> bytes:
    return ("{" + ",".join(f'"{i}":{EMPTY}' for i in range(count)) + "}").encode()


BOMBS: dict[str, Callable[[], bytes]] = {
    "a million empty tensors": lambda: b"{" + f'"a":{EMPTY},'.encode() * 1_000_000 + b"}",
    "as many empty tensors as fit": lambda: _many(MAX_HEADER_BYTES // 62),
    "one tensor too many": lambda: _many(MAX_TENSORS + 3),
    "lists in lists": lambda: b'{"a":' + b"[" * FULL + b"}",
    "lists beside lists": lambda: b'{"a":[' + b"[]," * (FULL // 3) + b"[]]}",
    "objects beside objects": lambda: b'{"a":[' + b"{}," * (FULL // 3) + b"{}]}",
    "a shape that fills the header": lambda: (
        b'{"a":{"dtype":"U8","shape":[9' + b",9" * (FULL // 2) + b'],"data_offsets":[0,1]}}'
    ),
    "a number that fills the header": lambda: (
        b'{"a":{"dtype":"U8","shape":[' + b"9" * FULL + b'],"data_offsets":[0,1]}}'
    ),
    "metadata that fill the header": lambda: (
        b'{"__metadata__":{' + b",".join(b'"%d":""' % i for i in range(1_600_000)) + b"}}"
    ),
    "a key that fills the header": lambda: b'{"' + b"a" * FULL + b'":' + EMPTY.encode() + b"}",
    "a text that never ends": lambda: b'{"' + b"a" * FULL,
    "escapes that fill the header": lambda: b'{"' + b"\\u0061" * (FULL // 6) + b'":1}',
}
ONE_SECOND, LITTLE_MEMORY = 1.0, 200 * 2**20


def _measured(attack: Callable[[], Any]) -> tuple[float, int, WeightsmithError]:
    """CPU seconds and bytes of memory that it took to refuse, and how it was refused; in a process of its own kind."""
    began, before = time.process_time(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(WeightsmithError) as refused:
        attack()
    taken = time.process_time() - began
    return taken, (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024, refused.value


@pytest.mark.parametrize("title", BOMBS)
def test_a_header_bomb_is_refused_at_once_in_little_memory(tmp_path: Path, title: str) -> None:
    header, path = BOMBS[title](), tmp_path / "a.safetensors"
    path.write_bytes(len(header).to_bytes(8, "little") + header + b"\0")
    del header
    seconds, memory, refused = _measured(lambda: Checkpoint.open(path))
    assert isinstance(refused, CheckpointError) and len(str(refused)) < 1000
    assert seconds < ONE_SECOND and memory < LITTLE_MEMORY


def _header(text: bytes, data: bytes = b"\0") -> bytes:
    return len(text).to_bytes(8, "little") + text + data


GOOD = b'{"a":{"dtype":"U8","shape":[1],"data_offsets":[0,1]}}'
MALFORMED: dict[str, bytes] = {
    "another encoding": _header(GOOD.decode().encode("utf-16-le")),
    "a byte order mark": _header(b"\xef\xbb\xbf" + GOOD),
    "bad UTF-8": _header(GOOD.replace(b'"a"', b'"\xff"')),
    "NaN for a length": _header(GOOD.replace(b"[1]", b"[NaN]")),
    "a key twice in an entry": _header(GOOD.replace(b'"dtype":"U8",', b'"dtype":"U8","dtype":"U8",')),
    "a key twice in the metadata": _header(b'{"__metadata__":{"a":"b","a":"c"},' + GOOD[1:]),
    "metadata twice": _header(b'{"__metadata__":{},"__metadata__":{},' + GOOD[1:]),
    "metadata of numbers": _header(b'{"__metadata__":{"a":1},' + GOOD[1:]),
    "metadata that are a list": _header(b'{"__metadata__":[],' + GOOD[1:]),
    "aliasing tensors": _header(
        b'{"a":{"dtype":"U8","shape":[1],"data_offsets":[0,1]},"b":{"dtype":"U8","shape":[1],"data_offsets":[0,1]}}'
    ),
    "a product beyond 2^63": _header(GOOD.replace(b"[1]", b"[4294967296,4294967296,4294967296]")),
    "a product that wraps around to the size": _header(GOOD.replace(b"[1]", b"[18446744073709551617]")),
    "a name to climb with, and control characters": _header(GOOD.replace(b'"a"', b'"../../etc\\u0000"')),
    "a name that writes backwards": _header(GOOD.replace(b'"a"', b'"a\\u202eb"')),
    "nothing": b"",
    "a length alone": (10).to_bytes(8, "little"),
}


@pytest.mark.parametrize("title", MALFORMED)
def test_a_header_that_is_malformed_is_refused(tmp_path: Path, title: str) -> None:
    path = tmp_path / "a.safetensors"
    path.write_bytes(_header(GOOD))
    Checkpoint.open(path).close()
    path.write_bytes(MALFORMED[title])
    with pytest.raises(CheckpointError, match=r"a\.safetensors"):
        Checkpoint.open(path)


class _Trap:
    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, ("touch /tmp/weightsmith-was-here",)


@pytest.mark.parametrize("name", ["model.bin", "model.pt", "model.pth", "model.ckpt", "model.pkl", "model.safetensors"])
@pytest.mark.parametrize("is_zipped", [True, False])
def test_a_pickle_is_refused_by_any_name_and_runs_nothing(tmp_path: Path, name: str, is_zipped: bool) -> None:
    path = tmp_path / name
    if is_zipped:
        torch.save({"w": _Trap()}, path)
    else:
        path.write_bytes(pickle.dumps({"w": _Trap(), "x": b"x" * 100}))
    for opened in (path, tmp_path):
        with pytest.raises(UnsafeFormat, match="can run code when it is read; convert it to safetensors first"):
            Checkpoint.open(opened)
    assert not Path("/tmp/weightsmith-was-here").exists()


def _index(folder: Path, weight_map: Any) -> Path:
    folder.mkdir(exist_ok=True)
    index = folder / "model.safetensors.index.json"
    index.write_text(weight_map if isinstance(weight_map, str) else json.dumps({"weight_map": weight_map}))
    return folder


def _of_two_files(folder: Path) -> None:
    write_checkpoint(folder, mixed_tensors(0), shards=2)
    index = folder / "model.safetensors.index.json"
    listed = json.loads(index.read_text())["weight_map"]
    files = sorted(set(listed.values()))
    _index(folder, {name: files[1 - files.index(file)] for name, file in listed.items()})


INDEXES: dict[str, tuple[Callable[[Path], object], str]] = {
    "up and out": (lambda folder: _index(folder, {"w": "../../etc/passwd"}), "no shard name"),
    "absolute": (lambda folder: _index(folder, {"w": "/etc/passwd.safetensors"}), "no shard name"),
    "in a folder below": (lambda folder: _index(folder, {"w": "sub/a.safetensors"}), "no shard name"),
    "a dot": (lambda folder: _index(folder, {"w": "."}), "no shard name"),
    "with a NUL": (lambda folder: _index(folder, {"w": "a\0.safetensors"}), ""),
    "with backslashes": (lambda folder: _index(folder, {"w": "..\\a.safetensors"}), "which is not there"),
    "to what is not there": (lambda folder: _index(folder, {"w": "a.safetensors"}), "which is not there"),
    "a tensor twice": (
        lambda folder: _index(folder, '{"weight_map":{"w":"a.safetensors","w":"b.safetensors"}}'),
        "twice",
    ),
    "each tensor in the other file": (_of_two_files, "but the index puts it in"),
    "no map": (lambda folder: _index(folder, ["a.safetensors"]), "no weight_map"),
    "too many tensors": (
        lambda folder: _index(folder, {f"{i}": "a" for i in range(MAX_TENSORS + 1)}),
        "at most 200,000",
    ),
    "too large": (lambda folder: _index(folder, " " * (MAX_INDEX_BYTES + 1)), "larger than"),
    "lists beside lists": (lambda folder: _index(folder, '{"a":[' + "[]," * 8_000_000 + "[]]}"), "parts"),
}


@pytest.mark.parametrize("title", INDEXES)
def test_an_index_that_leads_astray_is_refused_at_once(tmp_path: Path, title: str) -> None:
    make, why = INDEXES[title]
    make(tmp_path / "m")
    seconds, memory, refused = _measured(lambda: Checkpoint.open(tmp_path / "m", roots=[tmp_path]))
    assert why in str(refused) and len(str(refused)) < 1000
    assert seconds < ONE_SECOND and memory < LITTLE_MEMORY


@pytest.mark.parametrize("text", ['{"a":' + "[" * 100_000, " " * (MAX_CONFIG_BYTES + 1), '{"a":1,"a":2}', "[]", "\xff"])
def test_a_config_that_is_a_bomb_is_refused(tmp_path: Path, text: str) -> None:
    write_checkpoint(tmp_path / "m", {"w": torch.ones(1)})
    (tmp_path / "m" / "config.json").write_text(text, encoding="latin-1")
    with pytest.raises(CheckpointError, match=r"config\.json"):
        Checkpoint.open(tmp_path / "m", roots=[tmp_path])


@pytest.mark.parametrize("name", ["model.safetensors", "model.safetensors.index.json", "config.json"])
def test_a_link_put_there_after_the_look_is_not_followed(
    tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A race: the file is what it should be when it is looked at, and a link out of the roots when it is opened."""
    root, secret = tmp_path / "root", tmp_path / "secret"
    sharded = 2 if name.endswith("index.json") else 1
    for folder in (root / "m", secret):
        write_checkpoint(folder, mixed_tensors(0), shards=sharded, config=CONFIG)
    look = checkpoint.check_below

    def look_and_swap(path: Path, roots: Any) -> None:
        look(path, roots)
        if path.name == name:
            path.unlink()
            path.symlink_to(secret / name)

    monkeypatch.setattr(checkpoint, "check_below", look_and_swap)
    with pytest.raises(PathNotAllowed):
        Checkpoint.open(root / "m", roots=[root])


def test_pipes_and_links_to_devices_never_hang(tmp_path: Path) -> None:
    """In a process of its own, so that a hang is seen and nothing else."""
    weights = ["model.safetensors", "model.safetensors.index.json"]
    for name in (*weights, "config.json", "tokenizer.json", "generation_config.json"):
        for kind in ("pipe", "device"):
            folder = tmp_path / f"{name}-{kind}"
            folder.mkdir()
            if name not in weights:
                write_checkpoint(folder, {"w": torch.ones(1)}, config=CONFIG if name != "config.json" else None)
            if kind == "pipe":
                os.mkfifo(folder / name)
            else:
                (folder / name).symlink_to("/dev/zero")
    program = (
        "import sys; from pathlib import Path; from merge_core.checkpoint import Checkpoint\n"
        "from merge_core.errors import WeightsmithError\n"
        "for folder in sorted(Path(sys.argv[1]).iterdir()):\n"
        "    try: print(sorted(Checkpoint.open(folder, roots=[folder.parent]).companions))\n"
        "    except WeightsmithError as error: print('refused', error)\n"
    )
    command = [sys.executable, "-c", program, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert len(lines) == 10
    assert all(line.startswith("refused") or line == "[]" for line in lines), lines
    assert sum(line.startswith("refused") for line in lines) >= 6, lines


def test_no_code_of_a_repository_is_run_or_copied(tmp_path: Path) -> None:
    """`auto_map` and the like name Python files that others load when they are told to trust them."""
    folder = tmp_path / "models" / "a"
    trap = "import os; os.system('touch /tmp/weightsmith-was-here')"
    write_checkpoint(
        folder, mixed_tensors(0), config=CONFIG | {"auto_map": {"AutoModel": "modeling_a.A"}, "trust_remote_code": True}
    )
    for name in ("modeling_a.py", "configuration_a.py", "tokenization_a.py", "__init__.py", "conftest.py"):
        (folder / name).write_text(trap)
    tokenizer = {"auto_map": {"AutoTokenizer": ["tokenization_a.T", None]}, "tokenizer_class": "T"}
    (folder / "tokenizer_config.json").write_text(json.dumps(tokenizer))

    recipe = Recipe.from_data({"merge_method": "linear", "models": [{"model": "a", "parameters": {"weight": 1}}]})
    artifact = merge(recipe, tmp_path / "out", roots=[tmp_path / "models"])

    assert not Path("/tmp/weightsmith-was-here").exists()
    assert not [
        path for path in artifact.folder.rglob("*") if path.suffix not in (".safetensors", ".json", ".yml", ".md")
    ]


LINEAR: dict[str, Any] = {"merge_method": "linear", "models": [{"model": "base", "parameters": {"weight": 1}}]}
TEXT = yaml.safe_dump(LINEAR)
RECIPES: dict[str, str | bytes] = {
    "an alias": "a: &a [x]\nb: [*a, *a]\n",
    "a billion laughs": "a: &a [x, x]\n"
    + "".join(f"{chr(98 + i)}: &{chr(98 + i)} [*{chr(97 + i)}, *{chr(97 + i)}]\n" for i in range(20)),
    "a merge key": TEXT + "<<: {dtype: float32}\n",
    "a Python object": TEXT + "name: !!python/object/apply:os.system ['true']\n",
    "a tag of its own": TEXT + "name: !thing x\n",
    "bytes": TEXT + "name: !!binary aGVsbG8=\n",
    "2,000 deep": "a: " + "[" * 2000 + "]" * 2000,
    "2,000 deep, as JSON": '{"a":' * 2000 + "1" + "}" * 2000,
    "2,000 deep, in block style": "\n".join(" " * i + "a:" for i in range(500)),
    "open brackets": "[" * 250_000,
    "dashes": "- " * 120_000,
    "a key twice": TEXT + "merge_method: ties\n",
    "a key twice, as JSON": '{"merge_method":"linear","merge_method":"ties","models":[]}',
    "a key twice, below": '{"merge_method":"linear","models":[{"model":"base","model":"m0"}]}',
    "a number that is infinite": TEXT + "seed: .inf\n",
    "a number beyond floats": json.dumps(LINEAR).replace('"weight": 1', '"weight": 1e999999'),
    "a text that is infinite": json.dumps(LINEAR).replace('"weight": 1', '"weight": "1e999"'),
    "a text that is no number": json.dumps(LINEAR).replace('"weight": 1', '"weight": "nan"'),
    "NaN in JSON": json.dumps(LINEAR).replace('"weight": 1', '"weight": NaN'),
    "Infinity in JSON": json.dumps(LINEAR).replace('"weight": 1', '"weight": -Infinity'),
    "a number of a quarter million digits": TEXT + "seed: " + "9" * 249_000,
    "the same, as JSON": json.dumps(LINEAR)[:-1] + ', "seed": ' + "9" * 249_000 + "}",
    "the same, in base 16": TEXT + "seed: 0x" + "f" * 249_000,
    "the same, in base 60": TEXT + "seed: 1" + ":59" * 80_000,
    "bad UTF-8": b"merge_method: \xff\xfe",
    "bad UTF-8, as JSON": b'{"merge_method": "\xff"}',
    "a NUL": TEXT + "name: a\0b\n",
    "half a character": TEXT + 'name: "\\ud800"\n',
    "too many bytes": TEXT + "#" * 300_000,
    "too many values": TEXT + "parameters: {weight: [" + "1," * (MAX_VALUES + 1) + "1]}\n",
    "too many keys": "\n".join(f"k{i}: 1" for i in range(25_000)),
    "too many documents": "---\na: 1\n" * 25_000,
    "too many empty documents": "---\n" * 60_000,
    "too many models": json.dumps(LINEAR | {"models": [{"model": f"m{i}"} for i in range(65)]}),
    "too many slices": json.dumps(
        {"merge_method": "passthrough", "slices": [{"sources": [{"model": "base", "layer_range": [0, 1]}]}] * 1001}
    ),
    "a list of nothing": json.dumps([[]] * 60),
    "a number": "1",
    "a key that is a list": "? [a, b]\n: 1\n",
    "a control character": TEXT + "name: \x07\n",
}


@pytest.mark.parametrize("title", RECIPES)
def test_a_recipe_that_is_a_bomb_is_refused_at_once(title: str) -> None:
    text = RECIPES[title]
    seconds, memory, refused = _measured(lambda: Recipe.from_text(text))
    assert isinstance(refused, RecipeError) and len(str(refused)) < 5000
    assert seconds < 2 * ONE_SECOND and memory < LITTLE_MEMORY


def test_what_json_says_is_read_as_json() -> None:
    recipe = Recipe.from_text(json.dumps(LINEAR | {"name": "\N{GRINNING FACE} \\u 1e3"}))
    assert recipe.name == "\N{GRINNING FACE} \\u 1e3"
    assert Recipe.from_text("\ufeff" + json.dumps(LINEAR)).to_data() == Recipe.from_text(TEXT).to_data()
    assert Recipe.from_text("{merge_method: linear, models: [{model: base}]}").merge_method == "linear"


def _stage(name: str, *models: str, **keys: Any) -> dict[str, Any]:
    return {
        "name": name,
        "merge_method": "linear",
        "models": [{"model": each} for each in models],
        "parameters": {"weight": 1},
    } | keys


def _doubling(name: str, model: str, layers: int, times: int) -> dict[str, Any]:
    piece = {"sources": [{"model": model, "layer_range": [0, layers]}]}
    return {"name": name, "merge_method": "passthrough", "slices": [piece] * times}


PLANS: dict[str, tuple[Any, str]] = {
    "stages that read all earlier ones": (
        [_stage("s0", "m0"), *(_stage(f"s{i}", *(f"s{j}" for j in range(i))) for i in range(1, 60))],
        "reads models",
    ),
    "stages that double their layers": (
        [_doubling(f"s{i}", f"s{i - 1}" if i else "m0", 3 * 2**i, 2) for i in range(30)],
        "at most 4,096 are planned",
    ),
    "slices of slices of slices": (
        [_doubling(f"s{i}", f"s{i - 1}" if i else "m0", 3 * 100**i, 100) for i in range(3)],
        "at most 4,096 are planned",
    ),
    "more layers than there are": (_doubling("s", "m0", 10**9, 1), "layers"),
    "a filter for everything": (
        {
            "merge_method": "passthrough",
            "parameters": {"scale": [{"filter": f"a{i}", "value": 1} for i in range(2500)]},
            "slices": [{"sources": [{"model": "m0", "layer_range": [0, 3]}]}] * 1000,
        },
        "are too many; say the same with fewer",
    ),
    "shards of a byte": (LINEAR | {"models": [{"model": "m0"}], "outputs": {"max_shard_size": 0}}, "max_shard_size"),
    "memory without end": (LINEAR | {"limits": {"memory": 2**64}}, "too large"),
    "threads without end": (LINEAR | {"limits": {"threads": 10**6}}, "1024"),
}


@pytest.mark.parametrize("title", PLANS)
def test_a_plan_that_is_a_bomb_is_refused_at_once(models: Path, title: str) -> None:
    data, why = PLANS[title]
    seconds, memory, refused = _measured(lambda: plan_only(Recipe.from_data(data), roots=[models]))
    assert why in str(refused)
    assert seconds < 2 * ONE_SECOND and memory < LITTLE_MEMORY


OUTSIDE = [
    "../secret",
    "m0/../../secret",
    "/etc",
    "/etc/passwd",
    "/proc/self/environ",
    "/dev/zero",
    "~/secret",
    "~root",
    "link",
    "..",
    ".",
    "",
    "a\nb",
    "a\0b",
    "\\\\host\\share",
    "//host/share",
    "file:///etc/passwd",
    "http://169.254.169.254/",
    "hf:org/model",
    "s3://bucket/model",
    "x" * 5000,
    "m0/" * 2000,
    "\ud800",
    "C:\\models",
    "-rf",
    "$(id)",
    "{0.__class__}",
]
"""What names no model below the roots."""
PLACES: dict[str, Callable[[str], dict[str, Any]]] = {
    "a model": lambda ref: LINEAR | {"models": [{"model": ref, "parameters": {"weight": 1}}]},
    "a model's path": lambda ref: (
        LINEAR | {"models": [{"model": {"model": {"path": ref}}}], "parameters": {"weight": 1}}
    ),
    "the base": lambda ref: LINEAR | {"merge_method": "task_arithmetic", "base_model": ref},
    "an adapter or a delta": lambda ref: (
        LINEAR | {"models": [{"model": {"model": "base", "lora": {"path": ref}}}], "parameters": {"weight": 1}}
    ),
    "a patch": lambda ref: LINEAR | {"patches": [{"patch": ref}]},
    "statistics": lambda ref: {
        "merge_method": "ssd",
        "models": [{"model": "base"}],
        "statistics": {"importance": ref, "forget_importance": ref},
    },
    "a tokenizer": lambda ref: LINEAR | {"tokenizer": {"source": {"model": ref}}},
    "permutations": lambda ref: (
        LINEAR
        | {
            "models": [{"model": "base"}, {"model": "m0"}],
            "parameters": {"weight": 1},
            "alignment": {"permutations": ref},
        }
    ),
    "an alignment's spec": lambda ref: (
        LINEAR
        | {"models": [{"model": "base"}, {"model": "m0"}], "parameters": {"weight": 1}, "alignment": {"spec": ref}}
    ),
    "a covariance": lambda ref: {
        "merge_method": "linear",
        "base_model": "base",
        "models": [{"model": "m0"}],
        "parameters": {"weight": 1},
        "outputs": {"kind": "delta", "encoding": "low_rank", "rank": 2, "covariance": ref},
    },
}


@pytest.mark.parametrize("place", PLACES)
def test_no_reference_leads_out_of_the_roots(models: Path, place: str, monkeypatch: pytest.MonkeyPatch) -> None:
    secret = models.parent / "secret"
    write_checkpoint(secret, mixed_tensors(0), config=CONFIG)
    monkeypatch.setenv("HOME", str(models.parent))
    (models / "link").symlink_to(secret)
    for ref in OUTSIDE:
        with pytest.raises(WeightsmithError) as refused:
            plan_only(Recipe.from_data(PLACES[place](ref)), roots=[models])
        assert refused.value.problems, f"{ref[:40]!r} at {place}: {refused.value}"
        assert str(models.parent) not in str(refused.value) and len(str(refused.value)) < 1500
        str(refused.value).encode()


def test_a_file_that_shrinks_under_the_header_reader_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_file({"w": torch.ones(100)}, tmp_path / "a.safetensors")
    found = os.fstat
    monkeypatch.setattr(os, "fstat", lambda descriptor: _shrunk(found(descriptor), descriptor, tmp_path))
    with pytest.raises(CheckpointError, match="became shorter"):
        read_header(tmp_path / "a.safetensors")


def _shrunk(found: os.stat_result, descriptor: int, folder: Path) -> os.stat_result:
    os.truncate(folder / "a.safetensors", 20)
    return found
