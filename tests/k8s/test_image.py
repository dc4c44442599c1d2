"""The Dockerfile, as far as that shows without building it: its context, its targets, what it installs."""

import re
import shutil
import subprocess
import tomllib
from io import BytesIO

import pytest
from docker.utils.build import exclude_paths
from dockerfile_parse import DockerfileParser
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

from k8s_references import built_images
from k8s_rendered import ROOT

INSTRUCTIONS = DockerfileParser(fileobj=BytesIO((ROOT / "Dockerfile").read_bytes())).structure


def stages() -> dict[str, list[tuple[str, str]]]:
    """Target -> its instructions and those of the stages that it builds on."""
    found: dict[str, list[tuple[str, str]]] = {}
    current: list[tuple[str, str]] = []
    for each in INSTRUCTIONS:
        instruction, value = each["instruction"], each["value"]
        if instruction == "FROM":
            source, _, target = value.split()
            current = found[target] = list(found.get(source, []))
        elif instruction not in ("COMMENT", "ARG") or found:
            current.append((instruction, value))
    return found


@pytest.fixture(scope="module")
def context() -> set[str]:
    """Every path that would be sent to the builder."""
    patterns = [line for line in (ROOT / ".dockerignore").read_text().splitlines() if line and line[0] != "#"]
    return exclude_paths(str(ROOT), patterns)


def test_the_context_is_small_and_holds_only_what_git_knows(context):
    files = {path for path in context if (ROOT / path).is_file()}
    assert sum((ROOT / path).stat().st_size for path in files) < 5e6
    assert {path.split("/")[0] for path in files} <= {
        *("jobs", "msr_dist", "shims", "pyproject.toml", "README.md", "Dockerfile", ".dockerignore"),
        *(file.name for file in ROOT.glob("requirements-*.txt")),
    }
    assert not [path for path in files if "__pycache__" in path or ".egg-info" in path or "/build/" in path]


@pytest.mark.parametrize("target", ["cpu", "gpu", "tracking"])
def test_what_is_copied_is_there(target, context):
    copied = [value.split()[:-1] for instruction, value in stages()[target] if instruction == "COPY"]
    assert copied
    for source in (source for sources in copied for source in sources):
        found = [path.relative_to(ROOT).as_posix() for path in ROOT.glob(source)]
        assert found, source
        assert set(found) <= context, source


@pytest.mark.parametrize("target", ["cpu", "gpu", "tracking"])
def test_every_target_that_is_named_exists_and_is_not_root(target):
    assert target in built_images()
    users = [value for instruction, value in stages()[target] if instruction == "USER"]
    assert users
    assert re.fullmatch(r"[1-9]\d*:[1-9]\d*", users[-1]), "Kubernetes cannot tell whether a user by name is root"


def test_the_jobs_are_where_the_manifests_look_for_them(context):
    assert {"jobs/pipeline.py", "jobs/configs/pipeline-quickstart.toml", "msr_dist/llm/templates"} <= context
    for target in ("cpu", "gpu"):
        assert ("WORKDIR", "/app") in stages()[target]
        assert ("COPY", "jobs jobs") in stages()[target]


def test_the_base_is_pinned_to_a_python_that_the_project_takes():
    (python,) = [each["value"] for each in INSTRUCTIONS if each["instruction"] == "ARG" and "PYTHON=" in each["value"]]
    version = re.fullmatch(r"PYTHON=python:(\d+\.\d+\.\d+)-slim-\w+", python)
    assert version
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert version[1] in SpecifierSet(project["requires-python"])


def test_the_tracking_server_is_the_client_s_version_and_pinned():
    common = (ROOT / "requirements-common.txt").read_text()
    assert f"\nmlflow=={built_images()['tracking'].partition(':')[2]}\n" in common
    (installed,) = [value for instruction, value in stages()["tracking"] if "pip install" in value]
    assert "--constraint requirements-common.txt" in installed
    for word in installed.split("requirements-common.txt")[1].split():
        assert "==" in word or f"\n{word}==" in common, word


@pytest.mark.parametrize("target", ["cpu", "gpu"])
def test_what_is_installed_is_pinned_and_without_tools_for_development(target, tmp_path):
    for file in ROOT.glob("requirements-*.txt"):
        shutil.copy(file, tmp_path)
    (edit,) = [value for instruction, value in stages()[target] if instruction == "RUN" and "sed" in value]
    subprocess.run(["/bin/sh", "-c", edit], cwd=tmp_path, check=True, timeout=60)
    assert (tmp_path / "msr_dist/__init__.py").is_file()
    assert [value for instruction, value in stages()[target] if f"-r requirements-{target}.txt" in value]
    lines = (tmp_path / f"requirements-{target}.txt").read_text().splitlines()
    lines = [line for line in lines if line and line[0] != "#"]
    assert "-c requirements-common.txt" in lines
    assert "-e ." in lines
    assert all("==" in line for line in lines if line[0] not in "-.")

    # Pinned: whatever the project needs, or what that needs in turn.
    pinned = {re.split("==", line)[0].lower() for line in (ROOT / "requirements-common.txt").read_text().splitlines()}
    pinned |= {line.partition("==")[0] for line in lines}
    needed = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]
    names = {Requirement(each).name for each in needed}
    assert {each for each in names if each not in pinned and each.replace("-", "_") not in pinned} <= {"fbgemm-gpu"}
