"""What is installed: three packages, the configurations, one command, pinned versions."""

import re
import tomllib
import zipfile
from pathlib import Path

import pytest

from pipeline import launch

ROOT = Path(__file__).resolve().parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
PINS = {
    line.split("==")[0].lower().replace("_", "-"): line.split("==")[1]
    for line in (ROOT / "constraints.txt").read_text().splitlines()
    if "==" in line
}


def names(requirements):
    return [re.split(r"[<>=\[;]", item)[0].strip().lower() for item in requirements]


def test_every_dependency_is_pinned():
    wanted = names(PROJECT["project"]["dependencies"])
    wanted += names(PROJECT["project"]["optional-dependencies"]["dev"])
    assert [name for name in wanted if name not in PINS] == []
    assert PINS["torch"] == "2.13.0"


def test_the_pins_hold_no_path_and_no_local_version():
    text = (ROOT / "constraints.txt").read_text()
    assert not re.search(r"[@+/]", text.split("\n", 1)[1])


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    from hatchling.builders.wheel import WheelBuilder

    folder = tmp_path_factory.mktemp("wheel")
    path = next(WheelBuilder(str(ROOT)).build(directory=str(folder), versions=["standard"]))
    with zipfile.ZipFile(path) as archive:
        return set(archive.namelist()), archive.read(
            next(name for name in archive.namelist() if name.endswith("entry_points.txt"))
        ).decode()


def test_the_wheel_holds_three_packages_and_nothing_else(wheel):
    files, _ = wheel
    tops = {name.split("/")[0] for name in files if ".dist-info" not in name}
    assert tops == {"pipeline", "stages", "labeling_ui"}


def test_the_wheel_holds_the_configurations_and_the_templates(wheel):
    files, _ = wheel
    assert "pipeline/_configs/demo.yaml" in files
    kept = {p.relative_to(ROOT).as_posix() for p in (ROOT / "pipeline").rglob("*.j2")}
    assert kept <= files
    assert any(name.endswith("licenses/LICENSE") for name in files)


def test_the_wheel_installs_one_command(wheel):
    assert wheel[1].split() == ["[console_scripts]", "prefline", "=", "pipeline.cli:main"]


def test_the_configurations_are_found_in_a_checkout():
    assert (launch.configs() / "demo.yaml").is_file()


def test_every_top_level_package_is_ours():
    assert {path.parent.name for path in ROOT.glob("*/__init__.py")} == {
        "pipeline",
        "stages",
        "labeling_ui",
    }
