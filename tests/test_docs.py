"""README.md and docs/ tell the truth: their tables are the registries', commands, routes and settings exist.

`python -m tests.test_docs` writes the tables anew.
"""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from click.testing import CliRunner
from fastapi.testclient import TestClient
from prometheus_client.parser import text_string_to_metric_families

from app.cli import main
from app.main import create_app
from merge_core.methods import METHODS
from workers.settings import Settings

ROOT = Path(__file__).parents[1]
README = ROOT / "README.md"
OPERATIONS = ROOT / "docs" / "operations.md"
PAGES = [README, *sorted(ROOT.glob("docs/**/*.md"))]
WRITTEN = "\n".join(page.read_text() for page in PAGES)
_SETTINGS = re.compile(r"(<!-- settings: .*? -->\n).*?(<!-- end of settings -->)", re.DOTALL)
_TABLE = re.compile(r"(<!-- methods: .*? -->\n).*?(<!-- end of methods -->)", re.DOTALL)


def method_table() -> str:
    """The README's table of methods."""
    lines = ["| `merge_method` | what it does | base | models | parameters |", "| --- | --- | --- | --- | --- |"]
    for name, meanings in METHODS.items():
        for semantics, method in meanings.items():
            fewest, most = method.count
            count = str(fewest) if fewest == most else f"{fewest} or more" if most is None else f"{fewest} to {most}"
            title = f"[{method.title}]({method.paper})"
            shown = f"`{name}`" + (", `semantics: paper`" if semantics == "paper" else "")
            base = {"required": "needed", "optional": "if given", "model": "–"}[method.base]
            base += ", and one beside each model" if method.own_bases else ""
            asked = [", ".join(f"`{parameter}`" for parameter in method.parameters())]
            asked += [f"statistics {', '.join(f'`{name}`' for name in method.statistics)}"] if method.statistics else []
            lines.append(f"| {shown} | {title} | {base} | {count} | {'; '.join(filter(None, asked))} |")
    return "\n".join(lines) + "\n"


def settings_table() -> str:
    """The table of settings in the operations page."""
    lines = ["| variable | default | |", "| --- | --- | --- |"]
    for name, variable in Settings.variables().items():
        field = Settings.model_fields[name]
        default = "" if field.default is None or field.default == [] else f"`{field.default}`"
        assert field.description, f"{name} says nothing of itself"
        lines.append(f"| `{variable}` | {default} | {field.description} |")
    lines.append("| `WEIGHTSMITH_KERNELS` | `compiled` | `plain`: torch instead of numba, for the same bytes, slower |")
    return "\n".join(lines) + "\n"


def test_the_table_of_settings_is_what_is_read() -> None:
    written = OPERATIONS.read_text()
    assert written == _SETTINGS.sub(lambda match: match[1] + settings_table() + match[2], written)


def test_the_metrics_that_are_told_of_are_those_there_are(tmp_path: Path) -> None:
    with TestClient(create_app(Settings(data=tmp_path))) as client:
        families = {family.name: family for family in text_string_to_metric_families(client.get("/metrics").text)}
    there = {
        name + ("_total" if family.type == "counter" else "")
        for name, family in families.items()
        # A histogram tells beside its numbers when each was first counted, once there are any.
        if name.startswith("weightsmith_") and not name.endswith("_created")
    }
    told = set(re.findall(r"^\| (`weightsmith_.*?) \|", OPERATIONS.read_text(), re.MULTILINE))
    assert set(re.findall(r"weightsmith_\w+", " ".join(told))) == there


def test_the_table_of_methods_is_the_registry_s() -> None:
    found = _TABLE.search(README.read_text())
    assert found is not None
    assert README.read_text() == _TABLE.sub(lambda match: match[1] + method_table() + match[2], README.read_text())


COMMANDS = sorted(set(re.findall(r"(?:^|`)weightsmith ([a-z-]+)", WRITTEN, re.MULTILINE)))


@pytest.mark.parametrize("command", COMMANDS)
def test_commands_exist(command: str) -> None:
    assert CliRunner().invoke(main, [command, "--help"]).exit_code == 0


def test_routes_exist(tmp_path: Path) -> None:
    paths = create_app(Settings(data=tmp_path)).openapi()["paths"]
    named = re.findall(r"`(GET|POST|PUT|DELETE) (/[^`?]*)[^`]*`", WRITTEN)
    assert len(named) > 20
    for verb, path in named:
        assert verb.lower() in paths[path.replace("{id}", "{job_id}")], path


def test_settings_exist() -> None:
    names = {*Settings.variables().values(), "WEIGHTSMITH_KERNELS", "WEIGHTSMITH_URL", "WEIGHTSMITH_API_KEY"}
    of_the_composition = {"WEIGHTSMITH_MODELS", "WEIGHTSMITH_LISTEN", "WEIGHTSMITH_EXTRAS"}
    for name in re.findall(r"`(WEIGHTSMITH_\w+|\w+_URL)\b", WRITTEN):
        assert name in names | of_the_composition or any(known.startswith(name) for known in names), name


def test_links_in_the_docs_lead_somewhere() -> None:
    for page in PAGES:
        for target in re.findall(r"\]\((?!https?:)([^)#]+)\)", page.read_text()):
            assert (page.parent / target).exists(), f"{page.name}: {target}"


if __name__ == "__main__":
    page = OPERATIONS.read_text()
    OPERATIONS.write_text(_SETTINGS.sub(lambda match: match[1] + settings_table() + match[2], page))
    README.write_text(_TABLE.sub(lambda match: match[1] + method_table() + match[2], README.read_text()))


def test_every_threat_names_tests_that_there_are() -> None:
    tests = {
        name
        for file in (ROOT / "tests").rglob("test_*.py")
        for name in re.findall(r"^def (test_\w+)", file.read_text(), re.M)
    }
    rows = [line for line in (ROOT / "docs" / "threats.md").read_text().splitlines() if line.startswith("|")]
    threats = [line for line in rows if not line.startswith(("| threat |", "| ---"))]
    assert len(threats) > 20
    for line in threats:
        named = set(re.findall(r"`(test_\w+)`", line.rsplit("|", 2)[1]))
        assert named and named <= tests, (line, named - tests)
