"""What a stranger looks for first: a fact that is told twice is told alike."""

import json
import re
import tomllib
from pathlib import Path
from subprocess import CalledProcessError
from types import ModuleType

import pytest
import yaml
from packaging.requirements import Requirement

import labkit

ROOT = Path(__file__).parents[1]
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
PROJECT = PYPROJECT["project"]
CITATION = yaml.safe_load((ROOT / "CITATION.cff").read_text())
RUNS = json.loads((ROOT / "figures/versions.json").read_text())["runs"]
NEEDED = [*PROJECT["dependencies"], *PROJECT["optional-dependencies"]["lab"]]
RANGES = {need.name: need.specifier for need in map(Requirement, NEEDED)}


def test_the_version_is_the_packages_own():
    assert "version" not in PROJECT and "version" in PROJECT["dynamic"]
    assert PYPROJECT["tool"]["setuptools"]["dynamic"]["version"] == {"attr": "labkit.__version__"}
    assert CITATION["version"] == labkit.__version__
    latest = (ROOT / "CHANGELOG.md").read_text().partition("\n## ")[2]
    assert latest.startswith((f"{labkit.__version__},", f"{labkit.__version__}\n"))


def test_the_citation_has_the_address_that_pyproject_has():
    address = PROJECT.get("urls", {}).get("Repository")
    assert address != "" and CITATION.get("repository-code") == address


def test_every_licence_has_its_text():
    assert PROJECT["license"].split(" AND ") == CITATION["license"]
    texts = [path for pattern in PROJECT["license-files"] for path in ROOT.glob(pattern)]
    assert {"LICENSE", "NOTICE", "CC-BY-SA-3.0.txt"} == {path.name for path in texts}
    assert "labkit/mnist.npz" in (ROOT / "NOTICE").read_text()


def test_a_commit_is_checked_by_what_ci_runs():
    hooks = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())["repos"][0]["hooks"]
    lines = (ROOT / ".ci/run").read_text().splitlines()
    checks = [line for line in lines if line.startswith(("ruff", "mypy"))]
    assert [hook["entry"] for hook in hooks] == checks


@pytest.mark.parametrize("run", RUNS, ids=lambda run: f"{run['python']}-{run['set']}")
def test_what_was_run_is_in_the_ranges_that_pyproject_allows(run):
    assert run["python"] in Requirement(f"python{PROJECT['requires-python']}").specifier
    versions = {name: v for name, v in run["versions"].items() if name in RANGES}
    outside = [name for name, v in versions.items() if v not in RANGES[name]]
    assert not outside, "give the range that was run, or run it anew: .ci/versions"


def test_readme_names_the_pythons_that_were_run():
    claimed = re.findall(r"Python (3\.\d+)", (ROOT / "README.md").read_text())
    assert claimed and set(claimed) <= {run["python"].rpartition(".")[0] for run in RUNS}


# -- .ci/versions ----------------------------------------------------------------------------------


@pytest.fixture
def versions(tmp_path):
    path = ROOT / ".ci/versions"
    module = ModuleType("versions")
    module.__file__ = str(path)
    exec(compile(path.read_text(), path, "exec"), module.__dict__)
    module.RESULT = tmp_path / "versions.json"
    return module


def test_the_lowest_is_the_oldest_on_offer_that_is_allowed(versions):
    versions.NEEDED = [Requirement("some>=2,<10")]
    versions.said = lambda *command: "some (10.0)\nAvailable versions: 10.0, 9.1, 2.10, 2.9, 1.9\n"
    assert versions.lowest("python3") == "some==2.9\n"


def test_a_set_that_does_not_install_fails_and_the_others_are_run_and_kept(versions, monkeypatch):
    def run(which, interpreter, tests, folder):
        if (which, interpreter) == ("lowest", "b"):
            raise CalledProcessError(1, "pip")
        return {"python": {"a": "3.11.1", "b": "3.9.1"}[interpreter], "set": which, "failed": 0}

    def exit_code(*asked):
        monkeypatch.setattr("sys.argv", ["versions", *asked])
        return versions.main()

    versions.run = run
    assert exit_code("--python", "a", "--python", "b") == 1
    assert exit_code("--python", "a") == 0  # takes the place of the first result
    rows = json.loads(versions.RESULT.read_text())["runs"]
    kept = [(row["python"], row["set"]) for row in rows]
    sets = [("3.9.1", "newest"), ("3.9.1", "wheel")]
    assert kept == sets + [("3.11.1", which) for which in ("lowest", "newest", "wheel")]
