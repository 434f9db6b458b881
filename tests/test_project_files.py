"""The files that a public project has say what is so: citation, issue forms, workflow, guide."""

from __future__ import annotations

import re
import subprocess

import pytest
import yaml
from click import Group

import fastddim
from fastddim.cli import main

from .support.environment import ROOT

GITHUB = ROOT / ".github"
FORMS = {
    path.stem: path
    for path in sorted((GITHUB / "ISSUE_TEMPLATE").glob("*.yml"))
    if path.stem != "config"
}
PAGES = {
    name: (ROOT / name).read_text(encoding="utf-8")
    for name in (
        ".github/pull_request_template.md",
        *(path.relative_to(ROOT).as_posix() for path in FORMS.values()),
        "CONTRIBUTING.md",
        "SECURITY.md",
    )
}
MAKEFILE = (ROOT / "Makefile").read_text(encoding="utf-8")


def parsed(path):
    return yaml.safe_load(path.read_text(encoding="utf-8"))


def test_the_citation_is_of_this_package():
    citation = parsed(ROOT / "CITATION.cff")
    assert citation["cff-version"] == "1.2.0"
    assert citation["type"] == "software"
    assert citation["message"]
    assert citation["title"] == "fastddim"
    assert citation["version"] == fastddim.__version__
    project = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    assert f'\nlicense = "{citation["license"]}"\n' in project
    for author in citation["authors"]:
        assert f'authors = [{{ name = "{author["name"]}" }}]' in project


def test_the_citation_names_the_paper():
    (paper,) = parsed(ROOT / "CITATION.cff")["references"]
    assert {"type", "title", "authors"} <= set(paper)
    assert paper["title"] == "Denoising Diffusion Implicit Models"
    assert [author["family-names"] for author in paper["authors"]] == ["Song", "Meng", "Ermon"]
    assert paper["year"] == 2021
    assert paper["doi"].endswith("2010.02502")
    assert "2010.02502" in fastddim.__doc__


def test_every_yaml_file_parses():
    files = [path for path in GITHUB.rglob("*") if path.suffix in (".yml", ".yaml")]
    assert len(files) >= 5
    for path in files:
        assert isinstance(parsed(path), dict), path


@pytest.mark.parametrize("name", FORMS)
def test_an_issue_form_has_the_keys_that_github_requires(name):
    form = parsed(FORMS[name])
    assert set(form) <= {"name", "description", "title", "labels", "assignees", "body"}
    assert {"name", "description", "body"} <= set(form)
    fields = [element for element in form["body"] if element["type"] != "markdown"]
    assert fields
    for field in fields:
        assert set(field) <= {"type", "id", "attributes", "validations"}
        assert field["type"] in {"checkboxes", "dropdown", "input", "textarea"}
        assert re.fullmatch(r"[\w-]+", field["id"])
        assert field["attributes"]["label"]
        if field["type"] in {"checkboxes", "dropdown"}:
            assert len(field["attributes"]["options"]) > 1
        assert set(field.get("validations", {})) <= {"required"}
    for unique in ("id", "label"):
        values = [{**field, **field["attributes"]}[unique] for field in fields]
        assert len(set(values)) == len(values)


@pytest.mark.parametrize("name", ["bug", "wrong-result"])
def test_a_report_asks_for_the_environment_and_for_code(name):
    fields = [field for field in parsed(FORMS[name])["body"] if field["type"] == "textarea"]
    required = {
        field["attributes"]["label"]: field["attributes"].get("render")
        for field in fields
        if field["validations"]["required"]
    }
    assert required["Output of `fastddim env`"] == "text"
    assert "python" in required.values()


def test_blank_issues_are_decided():
    config = parsed(GITHUB / "ISSUE_TEMPLATE/config.yml")
    assert set(config) <= {"blank_issues_enabled", "contact_links"}
    assert isinstance(config["blank_issues_enabled"], bool)


def test_the_workflow_runs_what_this_repository_runs():
    workflow = parsed(GITHUB / "workflows/ci.yml")
    assert workflow["permissions"] == {"contents": "read"}
    assert workflow["concurrency"]["group"]
    # YAML 1.1 reads the key `on` as true.
    assert workflow[True] == {"push": {"branches": ["main"]}, "pull_request": None}
    runs = {}
    for name, job in workflow["jobs"].items():
        assert job["runs-on"] == "ubuntu-latest"
        assert job["timeout-minutes"] <= 60
        uses = [step["uses"] for step in job["steps"] if "uses" in step]
        assert all(re.fullmatch(r"actions/[a-z-]+@v\d+", it) for it in uses), uses
        runs[name] = [step["run"] for step in job["steps"] if "run" in step]
    assert runs == {"test": ["bash .ci/run"], "demo": ["make demo"]}
    assert (ROOT / ".ci/run").is_file()


def test_the_demo_runs_with_every_python_that_is_supported():
    versions = parsed(GITHUB / "workflows/ci.yml")["jobs"]["demo"]["strategy"]["matrix"]["python"]
    assert all(isinstance(version, str) for version in versions)  # 3.10 would be 3.1
    oldest = re.search(r'requires-python = ">=(3\.\d+)"', (ROOT / "pyproject.toml").read_text())[1]
    assert versions[0] == oldest
    minors = [int(version.removeprefix("3.")) for version in versions]
    assert minors == list(range(minors[0], minors[-1] + 1))


@pytest.mark.parametrize("page", PAGES)
def test_commands_that_are_named_exist(page):
    targets = set(re.findall(r"^([a-z-]+):", MAKEFILE, re.MULTILINE))
    named = set(re.findall(r"(?:`|^|\n)make ([a-z-]+)", PAGES[page]))
    assert named <= targets, named - targets
    assert isinstance(main, Group)
    commands = set(re.findall(r"`fastddim ([a-z]+)", PAGES[page]))
    assert commands <= set(main.commands), commands - set(main.commands)
    for option in re.findall(r"`fastddim(?: [a-z]+)? (--[a-z]+)", PAGES[page]):
        known = [main, *main.commands.values()]
        assert any(option in it.opts for command in known for it in command.params), option


def test_some_commands_are_named():
    assert "`fastddim env`" in PAGES[".github/ISSUE_TEMPLATE/bug.yml"]
    assert "`make test`" in PAGES[".github/pull_request_template.md"]
    assert "make bench-compare" in PAGES["CONTRIBUTING.md"]


def test_every_target_of_the_makefile_is_in_the_guide():
    listed = set(re.findall(r"^([a-z-]+):.* ## ", MAKEFILE, re.MULTILINE))
    named = set(re.findall(r"make ([a-z-]+)", PAGES["CONTRIBUTING.md"]))
    assert listed - named <= {"help", "clean"}


def test_files_that_are_named_exist():
    for page, text in PAGES.items():
        # Those with a folder, and those of the root, in capitals.
        pattern = r"`((?:[\w.-]+/)+[\w.-]+\.\w+|[A-Z]+\.md)`"
        for name in re.findall(pattern, text):
            assert (ROOT / name).is_file(), f"{page}: {name}"


def test_ci_run_is_a_script():
    result = subprocess.run(["bash", "-n", ROOT / ".ci/run"], check=False)
    assert result.returncode == 0
