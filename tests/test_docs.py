"""The README tells the truth: its table is the registry's, its recipes plan, its commands exist.

`python -m tests.test_docs` writes the tables anew.
"""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import yaml
from click.testing import CliRunner
from fastapi.testclient import TestClient
from prometheus_client.parser import text_string_to_metric_families
from pydantic import AliasChoices

from app.cli import main
from app.main import create_app
from merge_core.methods import METHODS
from merge_core.recipe import Recipe
from workers.settings import Settings

ROOT = Path(__file__).parents[1]
README = ROOT / "README.md"
OPERATIONS = ROOT / "docs" / "operations.md"
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
            parameters = ", ".join(f"`{parameter}`" for parameter in method.parameters())
            if method.statistics:
                parameters += f"; statistics {', '.join(f'`{name}`' for name in method.statistics)}"
            lines.append(f"| {shown} | {title} | {base} | {count} | {parameters} |")
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


def test_recipes_in_the_readme_are_recipes() -> None:
    texts = re.findall(r"<<'YAML'\n(.*?)\nYAML", README.read_text(), re.DOTALL)
    texts += [
        text for text in re.findall(r"```yaml\n(.*?)\n```", README.read_text(), re.DOTALL) if "merge_method" in text
    ]
    assert texts
    for text in texts:
        Recipe.from_data(yaml.safe_load(text))


@pytest.mark.parametrize("command", sorted(set(re.findall(r"^weightsmith (\w+)", README.read_text(), re.MULTILINE))))
def test_commands_in_the_readme_exist(command: str) -> None:
    assert CliRunner().invoke(main, [command, "--help"]).exit_code == 0


def test_routes_in_the_readme_exist(tmp_path: Path) -> None:
    paths = create_app(Settings(data=tmp_path)).openapi()["paths"]
    for verb, path in re.findall(r"`(GET|POST|DELETE) (/[^`]*)`", README.read_text()):
        assert verb.lower() in paths[path.replace("{id}", "{job_id}")], path


def test_settings_in_the_readme_exist() -> None:
    names = {f"WEIGHTSMITH_{name.upper()}" for name in Settings.model_fields}
    aliases = [field.validation_alias for field in Settings.model_fields.values()]
    names |= {name for alias in aliases if isinstance(alias, AliasChoices) for name in alias.choices} | {
        "WEIGHTSMITH_KERNELS"
    }
    assert set(re.findall(r"`(WEIGHTSMITH_\w+|\w+_URL)`", README.read_text())) <= names


def test_links_in_the_docs_lead_somewhere() -> None:
    for page in [README, *ROOT.glob("docs/**/*.md")]:
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
