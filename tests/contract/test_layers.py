"""The laws of the house, read from the sources: who may import whom, and who may read what."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

from pipeline.config import field_paths
from pipeline.plan import STAGES
from pipeline.settings import Settings

ROOT = Path(__file__).resolve().parents[2]
SOURCES = sorted(
    path
    for package in ("pipeline", "stages", "labeling_ui")
    for path in (ROOT / package).rglob("*.py")
)
TREES = {
    path.relative_to(ROOT).as_posix(): ast.parse(path.read_text(encoding="utf-8"))
    for path in SOURCES
}
HEAVY = {"torch", "transformers", "trl", "peft", "datasets", "accelerate", "gradio", "fastapi"}
# only inside the modules that read data, plan or report
NUMERIC = {"pyarrow", "numpy", "scipy", "matplotlib", "jinja2", "markupsafe"}
CORE = {"pydantic", "pydantic_core", "yaml", "typer", "filelock", "pipeline"}
SHARED = (
    "pipeline/records",
    "pipeline/scaling",
    "pipeline/report",
    "pipeline/statistics",
    "pipeline/cards",
)


def imports(tree):
    """Every module name that a source imports, with the names taken from it."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def tops(name):
    return {module.split(".")[0] for module in imports(TREES[name])}


def of(package):
    return [name for name in TREES if name.startswith(f"{package}/")]


@pytest.mark.parametrize("name", of("pipeline"))
def test_the_core_imports_only_light_things(name):
    allowed = CORE | set(sys.stdlib_module_names) | {"__future__"}
    if name.startswith(SHARED):
        allowed |= NUMERIC
    assert tops(name) <= allowed


@pytest.mark.parametrize("name", of("stages"))
def test_the_work_does_not_know_the_humans(name):
    assert not tops(name) & {"labeling_ui", "gradio", "fastapi", "sqlalchemy"}


@pytest.mark.parametrize("name", of("labeling_ui"))
def test_the_humans_do_not_know_the_work(name):
    assert not tops(name) & {"stages", "torch", "transformers", "trl", "peft", "accelerate"}


DRAWING = {"app", "board", "hosting", "lead_page", "lead_parts", "lead_prompts", "lead_tabs"}
DRAWING |= {"playground", "playground_chat", "playground_inspect", "playground_tabs"}


@pytest.mark.parametrize("name", of("labeling_ui"))
def test_only_files_that_draw_import_gradio(name):
    assert Path(name).stem in DRAWING or "gradio" not in tops(name)


@pytest.mark.parametrize("stage", [s for s in STAGES.values() if s.module.startswith("stages.")])
def test_stage_files_never_import_stage_files(stage):
    name = stage.module.replace(".", "/") + ".py"
    others = {other.module for other in STAGES.values() if other is not stage}
    assert not {module for module in imports(TREES[name]) if module in others}
    assert not {m for m in imports(TREES[name]) if m.rpartition(".")[0] in others}


def test_the_arithmetic_of_ppo_imports_torch_only():
    assert tops("stages/ppo_math.py") <= {"torch", "__future__", *sys.stdlib_module_names}


def test_only_the_annotators_the_judge_and_the_watched_gold_know_the_rubric():
    knowing = {
        name for name in TREES if any("demo_rubric" in module for module in imports(TREES[name]))
    }
    # gold is watched; that the rubric may not choose a policy, the settings see to
    assert knowing <= {"labeling_ui/simulate.py", "stages/judges.py", "stages/gold.py"}


@pytest.mark.parametrize("name", sorted(TREES))
def test_no_experimental_part_of_trl_is_imported(name):
    assert not [m for m in imports(TREES[name]) if m.startswith("trl.experimental")]


@pytest.mark.parametrize("name", sorted(TREES))
def test_no_pickle_is_read_or_written(name):
    assert not tops(name) & {"pickle", "dill", "joblib", "shelve"}
    calls = [ast.unparse(node.func) for node in ast.walk(TREES[name]) if isinstance(node, ast.Call)]
    assert "torch.save" not in calls


# ---- settings ------------------------------------------------------------------------------


def settings_read(tree):
    """(section, field) of every `settings.section.field`, and (section, None) of the section."""
    for node in ast.walk(tree):
        if not isinstance(node, ast.Attribute):
            continue
        words = ast.unparse(node).split(".")
        if len(words) >= 2 and words[0] == "settings" and words[1] in Settings.model_fields:
            yield words[1], words[2] if len(words) > 2 else None


@pytest.mark.parametrize("stage", list(STAGES.values()), ids=lambda stage: stage.name)
def test_a_stage_reads_only_the_settings_that_its_fingerprint_covers(stage):
    tree = TREES[stage.module.replace(".", "/") + ".py"]
    # launch is about processes; no fingerprint covers it, because it changes no numbers
    allowed = {*stage.sections, "launch"}
    # of `rank.heldout_fraction` the walk sees `rank` too
    single = {name.split(".")[0] for name in stage.sections if "." in name}
    for section, name in settings_read(tree):
        ours = section in allowed or f"{section}.{name}" in allowed
        ours = ours or (section in single and name is None)
        ours = ours or (section == "run" and name in (None, "seed"))
        assert ours, f"{stage.module} reads settings.{section}.{name or ''}"


def test_every_setting_is_read_somewhere():
    words = set()
    for name, tree in TREES.items():
        if name.startswith("pipeline/settings/"):
            continue
        for node in ast.walk(tree):
            if isinstance(node, ast.Attribute):
                words.add(node.attr)
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                # keys such as "sft.data" are read by name
                words.update(node.value.split("."))
    unread = [key for key in field_paths(Settings) if key.rsplit(".", 1)[-1] not in words]
    assert unread == []


# ---- what is loaded ------------------------------------------------------------------------


@pytest.mark.parametrize(
    "command",
    [["--help"], ["config", "configs/demo.yaml"], ["run", "configs/demo.yaml", "--dry-run"]],
)
def test_light_commands_load_nothing_heavy(command):
    code = (
        "import sys\n"
        "from pipeline import cli\n"
        "try:\n"
        "    cli.main(sys.argv[1:])\n"
        "except SystemExit as end:\n"
        "    assert not end.code, end.code\n"
        f"print('LOADED', sorted({HEAVY!r} & set(sys.modules)))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, *command], cwd=ROOT, capture_output=True, text=True
    )
    assert done.stdout.splitlines()[-1] == "LOADED []", done.stderr
