"""Every command and snippet that README.md and docs/ show does what it is shown to do.

Blocks are run one after the other, page by page, in a folder with small models, a recipe and a service at the address
that the pages name; what is a Hub there is the double of tests/hub. A word behind a block's language says why a block
is not run so (`NOT_RUN`): ```` ```sh docker ````.
"""

from __future__ import annotations

import importlib.util
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from fastapi.testclient import TestClient
from safetensors.torch import save_file
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import PreTrainedTokenizerFast

from app.cli import main
from app.main import create_app
from merge_core.recipe import Recipe
from tests.conftest import write_checkpoint
from tests.hub import Hub, running_hub
from tests.services import Service, running_service
from workers.jobs import JobStore
from workers.keys import USUAL, KeyRing
from workers.settings import Settings

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
NOT_RUN = {
    "docker": "needs an engine; `make docker-smoke` runs those of the pages in the order in which they stand",
    "gpu": "needs an NVIDIA GPU and its container toolkit",
    "machines": "needs several machines with a PostgreSQL, a Redis and a bucket",
    "make": "takes minutes; that the targets and modules are there is looked up",
    "service": "stays; the service of these tests is started so, and that the options are there is looked up",
    "method": "tests/test_new_method.py adds it to a copy of the project",
}
QUICK = "README.md"
"""The page whose commands every run of the tests tries; those of the others take a minute."""
ADDRESS = "http://127.0.0.1:8000"
RECIPE = {"merge_method": "linear", "models": [{"model": "chat"}, {"model": "code"}], "parameters": {"weight": 0.5}}
CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "num_hidden_layers": 2,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 64,
    "max_position_embeddings": 64,
    "tie_word_embeddings": False,
}
MODELS = ("base", "chat", "code", "a", "b", "clean", "blurred", "llama-3", "llama-3.1", "llama-3-chat")


@dataclass(frozen=True)
class Snippet:
    page: Path
    line: int
    language: str
    mark: str
    text: str

    @property
    def place(self) -> str:
        return f"{self.page.name}:{self.line}"

    @property
    def is_recipe(self) -> bool:
        return self.language == "yaml" and "merge_method" in self.text


def snippets(page: Path) -> list[Snippet]:
    text = page.read_text()
    return [
        Snippet(page, text[: found.start()].count("\n") + 1, found[1], found[2] or "", found[3])
        for found in re.finditer(r"^```(\w*)(?: (\w+))?\n(.*?)^```$", text, re.DOTALL | re.MULTILINE)
    ]


SNIPPETS = [snippet for page in PAGES for snippet in snippets(page)]


def marked(*marks: str) -> list[Any]:
    return [pytest.param(each, id=each.place) for each in SNIPPETS if each.mark in marks]


def tensors(seed: int) -> dict[str, torch.Tensor]:
    """A Llama of two layers; those of other seeds are tuned from that of seed 0."""
    origin, own = torch.Generator().manual_seed(0), torch.Generator().manual_seed(seed)

    def weight(*shape: int) -> torch.Tensor:
        start = torch.randn(shape, generator=origin)
        return (start + 0.1 * torch.randn(shape, generator=own) * (seed > 0)).bfloat16()

    found = {
        "model.embed_tokens.weight": weight(64, 32),
        "model.norm.weight": weight(32),
        "lm_head.weight": weight(64, 32),
    }
    for layer in range(2):
        shapes = {
            **{"self_attn.q_proj": (32, 32), "self_attn.k_proj": (16, 32), "self_attn.v_proj": (16, 32)},
            **{"self_attn.o_proj": (32, 32), "mlp.gate_proj": (48, 32), "mlp.up_proj": (48, 32)},
            **{"mlp.down_proj": (32, 48), "input_layernorm": (32,), "post_attention_layernorm": (32,)},
        }
        found |= {f"model.layers.{layer}.{name}.weight": weight(*shape) for name, shape in shapes.items()}
    return found


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the pages speak of."""
    folder = tmp_path_factory.mktemp("models")
    for seed, name in enumerate(MODELS):
        write_checkpoint(folder / name, tensors(seed), config=CONFIG)
    words = {f"word{number}": number for number in range(63)} | {"[UNK]": 63}
    tokenizer = Tokenizer(WordLevel(words, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = Whitespace()
    for name in ("base", "chat", "code"):
        PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="[UNK]").save_pretrained(folder / name)
    for name in ("chat", "code", "held-out"):
        (folder / f"{name}.jsonl").write_text('{"text": "word1 word2 word3 word5 word8"}\n' * 4)
    for name in ("all", "forget"):
        save_file({key: value.float().abs() for key, value in tensors(3).items()}, folder / f"{name}.safetensors")
    matrices = {key: value for key, value in tensors(4).items() if value.ndim == 2}
    squares = {key: value.float().T @ value.float() for key, value in matrices.items()}
    save_file(squares, folder / "inputs.safetensors")
    return folder


@pytest.fixture(scope="module")
def hub(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Hub]:
    with running_hub(tmp_path_factory.mktemp("hub")) as hub:
        yield hub


@pytest.fixture(scope="module")
def service(models: Path, hub: Hub, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    settings = {
        "WEIGHTSMITH_AUTH": "none",
        "WEIGHTSMITH_HUB_ENDPOINT": hub.endpoint,
        "WEIGHTSMITH_ENDPOINT_ALLOW": "localhost",
        "WEIGHTSMITH_EVALUATOR_COMMANDS": json.dumps({"score": ["sh", "-c", "echo '{\"accuracy\": 0.5}'"]}),
    }
    with running_service(tmp_path_factory.mktemp("service") / "data", models, **settings) as service:
        yield service


@pytest.fixture(scope="module")
def client(models: Path, hub: Hub, token: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[TestClient]:
    """A service without workers, which plans."""
    settings = Settings(
        data=tmp_path_factory.mktemp("planned"), model_roots=[models], hub_endpoint=hub.endpoint, public_url=ADDRESS
    )
    with TestClient(create_app(settings)) as client:
        client.put("/v1/credentials/hub", json={"kind": "hub-token", "token": token})
        yield client


@pytest.fixture(scope="module")
def token(hub: Hub) -> str:
    """Of a user of the Hub called as the pages call them."""
    return hub.user("me").token


def test_every_block_is_run_or_says_why_not() -> None:
    assert {each.mark for each in SNIPPETS if each.mark} <= NOT_RUN.keys()
    for each in SNIPPETS:
        assert each.language in ("sh", "python", "yaml"), each.place
        assert each.language != "yaml" or not each.mark, each.place
    assert len(SNIPPETS) > 40


@pytest.mark.parametrize("snippet", marked("make"))
def test_targets_and_modules_exist(snippet: Snippet) -> None:
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    for line in snippet.text.splitlines():
        match shlex.split(line, comments=True):
            case ["make", *named]:
                assert set(named) <= targets, line
            case ["python", "-m", module]:
                assert importlib.util.find_spec(module) is not None, line
            case other:
                raise AssertionError(other)


@pytest.mark.parametrize("snippet", marked("service", "machines"))
def test_options_of_what_stays_exist(
    snippet: Snippet, models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "models").symlink_to(models)
    monkeypatch.chdir(tmp_path)
    lines = [re.sub(r"(?<=--models )/models", "models", line) for line in snippet.text.splitlines()]
    ours = [words for line in lines if (words := shlex.split(line, comments=True)) and words[0].endswith("weightsmith")]
    assert ours
    for _, command, *arguments in ours:
        assert main.commands[command].make_context(command, arguments).params["models"]


@pytest.mark.parametrize("snippet", [pytest.param(each, id=each.place) for each in SNIPPETS if each.language == "yaml"])
def test_recipes_plan(snippet: Snippet, client: TestClient) -> None:
    """Those that are no recipes are parts of one."""
    document = {**({} if snippet.is_recipe else RECIPE), **yaml.safe_load(snippet.text)}
    if not snippet.is_recipe:
        Recipe.from_data(document)
        return
    kind = next(
        (kind for key, kind in {"search": "searches", "calibrate": "calibrations"}.items() if key in document), ""
    )
    place = f"/v1/{kind}?dry_run=true" if kind else "/v1/recipes:validate"
    answer = client.post(place, json=document)
    assert answer.status_code == 200, answer.text


def pages() -> list[Any]:
    found = [page for page in PAGES if any(each.page == page and is_run(each) for each in SNIPPETS)]
    return [pytest.param(page, id=page.name, marks=[] if page.name == QUICK else [pytest.mark.slow]) for page in found]


def is_run(snippet: Snippet) -> bool:
    return snippet.language in ("sh", "python") and not snippet.mark


@pytest.mark.xdist_group("service")
@pytest.mark.parametrize("page", pages())
def test_commands_do_what_the_page_says(page: Path, service: Service, models: Path, token: str, tmp_path: Path) -> None:
    place = tmp_path / "place"
    place.mkdir()
    for path in models.iterdir():
        (place / path.name).symlink_to(path)
    (place / "recipe.yml").write_text(yaml.safe_dump(RECIPE))
    data = prepare_data(place / "weightsmith-data") if page.name == "operations.md" else service.data
    environment = commands(tmp_path / "bin") | {
        "WEIGHTSMITH_URL": service.url,
        "WEIGHTSMITH_DATA": str(data),
        "HF_TOKEN": token,
        "HF_HOME": str(tmp_path / "hf"),
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    }
    for snippet in (each for each in SNIPPETS if each.page == page and is_run(each)):
        text = filled(snippet.text, service, token)
        command = ["bash", "-euo", "pipefail", "-c", text] if snippet.language == "sh" else [sys.executable, "-c", text]
        ran = subprocess.run(command, cwd=place, env=environment, capture_output=True, text=True, timeout=300)
        assert ran.returncode == 0, f"{snippet.place}\n{text}\n{ran.stdout[-3000:]}\n{ran.stderr[-3000:]}"


def commands(folder: Path) -> dict[str, str]:
    """An environment in which `weightsmith`, `hf` and `python` are these, and curl fails where it is refused."""
    folder.mkdir()
    said = {
        "weightsmith": f"{sys.executable} -m app.cli",
        "hf": f"{sys.executable} -m huggingface_hub.cli.hf",
        "curl": f"{shutil.which('curl')} --fail-with-body",
    }
    for name, command in said.items():
        (folder / name).write_text(f'#!/bin/sh\nexec {command} "$@"\n')
        (folder / name).chmod(0o755)
    path = os.pathsep.join([str(folder), str(Path(sys.executable).parent), os.environ["PATH"]])
    return os.environ | {"PATH": path, "PYTHONPATH": str(ROOT), "NO_PROXY": "*"}


def prepare_data(folder: Path) -> Path:
    """A data folder with something worth a backup: a key, a sealed credential, an artifact."""
    settings = Settings(data=folder)
    with TestClient(create_app(settings, host="127.0.0.1"), base_url="http://localhost") as client:
        assert client.put("/v1/credentials/hub", json={"kind": "hub-token", "token": "hf_secret"}).is_success
    return folder


def filled(text: str, service: Service, token: str) -> str:
    """A snippet with what stands for addresses, ids and secrets in its place."""
    text = text.replace(ADDRESS, service.url).replace("hf_…", token)
    for stands, kind in (("mrg_01M7ZD…", "merges"), ("viw_01M7ZD…", "views")):
        if stands in text:
            job = service.ended(dict(service.http.post(f"/v1/{kind}", json=RECIPE).json()))
            assert job["status"] == "succeeded", job
            text = text.replace(stands, job["id"])
    if "wsk_…" in text:
        with closing(JobStore(Settings(data=service.data))) as store:
            text = text.replace("wsk_…", KeyRing(store).create("local", set(USUAL))[1])
    return text


def test_what_stands_for_something_is_known() -> None:
    for each in SNIPPETS:
        if is_run(each):
            text = each.text
            for known in ("hf_…", "wsk_…", "mrg_01M7ZD…", "viw_01M7ZD…"):
                text = text.replace(known, "")
            assert "_…" not in text, each.place
