"""The command line is frozen: a new command or option is a decision, not an accident."""

import inspect

import pytest
import typer

from pipeline import cli, errors

SURFACE = {
    "run": ["target", "overrides", "--until", "--dry-run", "--wait"],
    "resume": ["target", "--wait"],
    "tokenizer": ["target", "overrides"],
    "pretrain": ["target", "overrides"],
    "sft": ["target", "overrides"],
    "sample": ["target", "overrides"],
    "reward": ["target", "overrides"],
    "ppo": ["target", "overrides"],
    "dpo": ["target", "overrides"],
    "kto": ["target", "overrides"],
    "grpo": ["target", "overrides"],
    "rloo": ["target", "overrides"],
    "evaluate": ["target", "overrides", "--lm-eval"],
    "rank": ["target", "--host", "--port"],
    "users": [],
    "labels": [],
    "chat": ["target", "--port"],
    "inspect": ["target", "--port"],
    "status": ["target", "--json"],
    "verify": ["target"],
    "lineage": ["target", "--label", "--json"],
    "config": ["target", "overrides", "--fields"],
    "report": ["targets", "--to"],
    "export": ["target", "--to", "--what", "--adapter", "--licence", "--public", "--force"],
    "plan": ["targets", "--fit", "--flops", "--hours", "--json"],
    "doctor": [],
}


def commands():
    return typer.main.get_command(cli.app).commands


def test_the_commands_are_those_of_the_design():
    assert set(commands()) == set(SURFACE)


@pytest.mark.parametrize("name", sorted(SURFACE))
def test_the_options_of_a_command_are_those_of_the_design(name):
    found = [
        param.opts[0] if param.opts[0].startswith("--") else param.name
        for param in commands()[name].params
        if param.name != "help"
    ]
    assert found == SURFACE[name]


@pytest.mark.parametrize("name", sorted(SURFACE))
def test_every_command_teaches_with_an_example(name):
    text = inspect.cleandoc(commands()[name].help)
    assert f"Example:  prefline {name}" in text


def test_the_exit_codes_are_those_of_the_design():
    kinds = {
        errors.StageError: 1,
        errors.ConfigError: 2,
        errors.DataError: 2,
        errors.PeopleNeeded: 3,
        errors.ArtifactError: 4,
        errors.LockedError: 73,
        errors.Stopped: 75,
    }
    assert {kind: kind.exit_code for kind in kinds} == kinds
