"""Break the arithmetic in every small way and see whether the tests notice: `make mutants`.

    python -m tests.mutants                        all targets; writes docs/mutants.md
    python -m tests.mutants ppo_math --show        one target, survivors with their diff
    python -m tests.mutants ppo_math --list        only what would be tried

A mutant is a module with one change: an operator, a constant, a comparison, a branch, swapped
arguments, a call, a statement or a mask left out. A test that fails kills it. A survivor is a gap in
the tests, unless tests/mutants.toml says why it computes the same; any other one makes the exit code 1.

Libraries do not do this here: mutmut 3.8 leaves decorated functions alone (`@property`,
`@torch.no_grad()`: a third of rollout.py) and knows no masks; cosmic-ray 8.7 starts a process per
mutant, which imports torch for seconds each time. Here the libraries are imported once and every mutant
is a fork of that process, with an import hook in place of a copied tree: nothing is written.
"""

from __future__ import annotations

import argparse
import ast
import copy
import difflib
import gc
import importlib.abc
import importlib.util
import os
import signal
import sys
import time
import tomllib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parents[1]
EXPLAINED = ROOT / "tests" / "mutants.toml"
REPORT = ROOT / "docs" / "mutants.md"


class Target(NamedTuple):
    """A module, the tests that guard it (quick ones first), and the functions meant; empty: all."""

    module: str
    tests: tuple[str, ...]
    only: frozenset[str] = frozenset()

    @property
    def path(self) -> Path:
        return ROOT / (self.module.replace(".", "/") + ".py")


TARGETS = {
    "ppo_math": Target(
        "stages.ppo_math", ("test_ppo_math.py", "test_ppo_exact.py", "test_rollout.py")
    ),
    "rollout": Target(
        "stages.rollout",
        ("test_rollout.py", "test_reward_training.py", "test_generation.py", "test_ppo_exact.py"),
    ),
    "reward_losses": Target(
        "stages.reward_losses", ("test_reward_losses.py", "test_reward_training.py")
    ),
}


@dataclass(frozen=True)
class Mutant:
    """function: where. change: before -> after of the smallest expression or statement around it."""

    function: str
    change: str
    source: str
    line: int

    @property
    def key(self) -> str:
        return f"{self.function}: {self.change}"


# ---- what may change -----------------------------------------------------------------------

_OPERATORS: dict[type[ast.AST], type[ast.AST]] = {
    ast.Add: ast.Sub,
    ast.Sub: ast.Add,
    ast.Mult: ast.Div,
    ast.Div: ast.Mult,
    ast.Pow: ast.Mult,
    ast.FloorDiv: ast.Mult,
    ast.BitAnd: ast.BitOr,
    ast.BitOr: ast.BitAnd,
    ast.And: ast.Or,
    ast.Or: ast.And,
}
_COMPARISONS: dict[type[ast.AST], tuple[type[ast.cmpop], ...]] = {
    ast.Lt: (ast.LtE, ast.Gt),
    ast.LtE: (ast.Lt, ast.Gt),
    ast.Gt: (ast.GtE, ast.Lt),
    ast.GtE: (ast.Gt, ast.Lt),
    ast.Eq: (ast.NotEq,),
    ast.NotEq: (ast.Eq,),
    ast.Is: (ast.IsNot,),
    ast.IsNot: (ast.Is,),
}
_OPPOSITES = {"min": "max", "minimum": "maximum", "amin": "amax", "any": "all", "sum": "mean"}
_OPPOSITES |= {new: old for old, new in _OPPOSITES.items()}
_OPPOSITES |= {"zeros_like": "ones_like", "zeros": "ones", "expm1": "exp"}


def replacements(node: ast.AST) -> Iterator[ast.AST]:
    """Every changed form of one expression or statement."""
    match node:
        case ast.BinOp(left, op, right):
            if type(op) in _OPERATORS:
                yield ast.BinOp(left, _OPERATORS[type(op)](), right)  # type: ignore[arg-type]
            yield left
            if not isinstance(left, ast.Constant):
                yield right
        case ast.BoolOp(op, values):
            yield ast.BoolOp(_OPERATORS[type(op)](), values)  # type: ignore[arg-type]
            yield from values
        case ast.Compare(left, [op], [right]):
            for other in _COMPARISONS.get(type(op), ()):
                yield ast.Compare(left, [other()], [right])
        case ast.UnaryOp(ast.USub(), ast.Constant(int(value) | float(value))):
            # one number: as an axis of a matrix, 1 is the same as -1
            yield ast.Constant(-value + 1)
            yield ast.Constant(-value - 1)
        case ast.UnaryOp(ast.USub() | ast.Not() | ast.Invert(), operand):
            yield operand
        case ast.Constant(bool(value)):
            yield ast.Constant(not value)
        case ast.Constant(int(value) | float(value)):
            yield ast.Constant(value + 1)
            yield ast.Constant(-value if value else -1)
            if abs(value) > 1:
                yield ast.Constant(0)
        case ast.IfExp(_, body, other_body):
            yield body
            yield other_body
        case ast.Call(function, args, keywords):
            yield from _changed_calls(function, args, keywords)
        case ast.Subscript(value, ast.Slice(lower, upper, step), ctx) if upper and not step:
            shorter = ast.BinOp(upper, ast.Sub(), ast.Constant(1))
            yield ast.Subscript(value, ast.Slice(lower, shorter, step), ctx)
        case ast.If(_, body, other_lines):
            yield ast.If(ast.Constant(True), body, other_lines)
            yield ast.If(ast.Constant(False), body, other_lines)
        case ast.With(_, body):
            yield ast.If(ast.Constant(True), body, [])
        case ast.Assert() | ast.AugAssign() | ast.Assign():
            yield ast.Pass()
        case ast.Expr(value) if not isinstance(value, ast.Constant):
            yield ast.Pass()
        case ast.FunctionDef(decorator_list=[first, *rest]) if ast.unparse(first) != "property":
            changed = copy.copy(node)
            changed.decorator_list = rest
            yield changed


def _changed_calls(
    function: ast.expr, args: list[ast.expr], keywords: list[ast.keyword]
) -> Iterator[ast.AST]:
    name = function.attr if isinstance(function, ast.Attribute) else getattr(function, "id", "")
    if name in _OPPOSITES:
        other = copy.copy(function)
        setattr(other, "attr" if isinstance(function, ast.Attribute) else "id", _OPPOSITES[name])
        yield ast.Call(other, args, keywords)
    if name == "where" and len(args) == 3:
        yield ast.Call(function, [args[0], args[2], args[1]], keywords)
        yield args[1]  # the mask is left out
    elif len(args) == 2 and not keywords:
        yield ast.Call(function, args[::-1], keywords)
    if isinstance(function, ast.Attribute) and ast.unparse(function.value) not in ("torch", "np"):
        yield function.value  # x.clamp(...) -> x
    for number, keyword in enumerate(keywords):
        # `**options` has no name
        if keyword.arg:
            yield ast.Call(function, args, keywords[:number] + keywords[number + 1 :])


def mutants_of(source: str, only: frozenset[str] = frozenset()) -> list[Mutant]:
    """Every mutant of a module, each once."""
    tree = ast.parse(source)
    original = ast.unparse(tree)
    found: dict[str, Mutant] = {}
    for function, parent, field, index in _places(tree, "module"):
        if only and function.split(".")[-1] not in only:
            continue
        if function == "module" and field == "body":
            continue  # imports, types and names: every test needs them
        slot = getattr(parent, field)
        node = slot if index is None else slot[index]
        for new in replacements(node):
            # put in, write out, take back
            _put(parent, field, index, ast.copy_location(new, node))
            changed = ast.unparse(ast.fix_missing_locations(tree))
            _put(parent, field, index, node)
            if changed in found or changed == original:
                continue
            found[changed] = Mutant(
                function, _describe(original, changed), changed, getattr(node, "lineno", 0)
            )
    return list(found.values())


def _put(parent: ast.AST, field: str, index: int | None, node: ast.AST) -> None:
    if index is None:
        setattr(parent, field, node)
    else:
        getattr(parent, field)[index] = node


def _places(node: ast.AST, function: str) -> Iterator[tuple[str, ast.AST, str, int | None]]:
    """(function, parent, field, index) of all nodes but types, which compute nothing."""
    skipped = {"annotation", "returns", "decorator_list", "bases", "ctx"}
    for field, value in ast.iter_fields(node):
        if field in skipped:
            continue
        for index, child in enumerate(value) if isinstance(value, list) else ((None, value),):
            if not isinstance(child, ast.AST):
                continue
            inner = function
            if isinstance(child, ast.FunctionDef | ast.ClassDef):
                inner = child.name if function == "module" else f"{function}.{child.name}"
            yield inner, node, field, index
            is_negative = isinstance(child, ast.UnaryOp) and isinstance(child.operand, ast.Constant)
            if not is_negative:
                yield from _places(child, inner)


def _describe(before: str, after: str) -> str:
    """The changed lines, `old` -> `new`."""
    old, new = [], []
    for line in difflib.ndiff(before.splitlines(), after.splitlines()):
        if line.startswith("- "):
            old.append(line[2:].strip())
        elif line.startswith("+ "):
            new.append(line[2:].strip())
    return f"`{' '.join(old)}` -> `{' '.join(new)}`"


# ---- try -----------------------------------------------------------------------------------


class _Replaced(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Imports one module from a text."""

    def __init__(self, target: Target, source: str) -> None:
        self.target, self.source = target, source

    def find_spec(self, name: str, _path: Any = None, _target: Any = None) -> Any:
        if name != self.target.module:
            return None
        return importlib.util.spec_from_loader(name, self, origin=str(self.target.path))

    def exec_module(self, module: ModuleType) -> None:
        # inspect and warnings look for it
        module.__file__ = str(self.target.path)
        exec(compile(self.source, self.target.path, "exec"), module.__dict__)


def import_libraries() -> None:
    """What takes seconds, once for all forks; no target, which every fork imports anew."""
    import accelerate  # noqa: F401
    import peft  # noqa: F401
    import pytest  # noqa: F401
    import scipy.stats  # noqa: F401
    import torch
    from transformers import (  # noqa: F401
        GPT2ForSequenceClassification,
        GPT2LMHeadModel,
        LlamaForCausalLM,
        LlamaForSequenceClassification,
    )

    import stages.common  # noqa: F401

    assert not {target.module for target in TARGETS.values()} & set(sys.modules)
    # a fork of a process with worker threads hangs
    torch.set_num_threads(1)
    # plugins and a first garbage collection over all libraries would cost more than the tests
    os.environ["PYTEST_DISABLE_PLUGIN_AUTOLOAD"] = "1"
    gc.collect()
    gc.freeze()


def start_tests(target: Target, source: str) -> int:
    """A fork that runs the target's tests with `source` in place of the module; its pid."""
    pid = os.fork()
    if pid:
        return pid
    import pytest

    code = 3
    try:
        silence = os.open(os.devnull, os.O_WRONLY)
        os.dup2(silence, 1)
        os.dup2(silence, 2)
        sys.meta_path.insert(0, _Replaced(target, source))
        options = ["-x", "-q", "--assert=plain", "-p", "no:cacheprovider", "--rootdir", str(ROOT)]
        # file after file: most mutants die before the slower ones are even imported
        for name in target.tests:
            code = int(pytest.main([*options, str(ROOT / "tests" / "unit" / name)]))
            if code != 0:
                break
    finally:
        os._exit(code)


class Outcome(NamedTuple):
    """survivors: of the mutants tried. seconds: wall time."""

    mutants: list[Mutant]
    survivors: list[Mutant]
    timeouts: int
    seconds: float


def try_all(target: Target, jobs: int, say: Callable[[str], None]) -> Outcome:
    """Run the tests on every mutant of the target, `jobs` at a time."""
    source = target.path.read_text(encoding="utf-8")
    begin = time.monotonic()
    _, code = os.waitpid(start_tests(target, ast.unparse(ast.parse(source))), 0)
    if code != 0:
        raise SystemExit(f"{target.module}: the tests fail without any change: {target.tests}")
    limit = 20 + 5 * (time.monotonic() - begin)
    mutants = mutants_of(source, target.only)
    say(f"{target.module}: {len(mutants)} mutants, {limit / 5:.0f} s of tests each at most")
    waiting, running = list(reversed(mutants)), dict[int, tuple[Mutant, float]]()
    survivors, timeouts, done = [], 0, 0
    while waiting or running:
        while waiting and len(running) < jobs:
            mutant = waiting.pop()
            running[start_tests(target, mutant.source)] = (mutant, time.monotonic() + limit)
        time.sleep(0.02)
        for pid, (mutant, deadline) in list(running.items()):
            ended, status = os.waitpid(pid, os.WNOHANG)
            if not ended and time.monotonic() > deadline:
                os.kill(pid, signal.SIGKILL)
                os.waitpid(pid, 0)
                ended, status, timeouts = pid, 1, timeouts + 1
            if ended:
                del running[pid]
                done += 1
                if status == 0:
                    survivors.append(mutant)
                    say(f"survived  {target.path.name}:{mutant.line} {mutant.key}")
                elif done % 50 == 0:
                    say(f"{done} of {len(mutants)}, {len(survivors)} survived")
    survivors.sort(key=lambda mutant: (mutant.line, mutant.change))
    return Outcome(mutants, survivors, timeouts, time.monotonic() - begin)


# ---- tell ----------------------------------------------------------------------------------


def explanations() -> dict[str, dict[str, str]]:
    """{target: {key of a mutant: why it is no gap}} of tests/mutants.toml."""
    if not EXPLAINED.exists():
        return {}
    return tomllib.loads(EXPLAINED.read_text(encoding="utf-8"))


def report(outcomes: dict[str, Outcome]) -> str:
    """The page docs/mutants.md."""
    lines = [
        "# Mutants",
        "",
        "Every small change of the arithmetic, tried against the tests of that file. Written by",
        "`make mutants` (tests/mutants.py); the reasons stand in tests/mutants.toml.",
        "",
        "| module | mutants | killed | of these by time limit | survived and explained | unexplained"
        " | seconds |",
        "|---|---|---|---|---|---|---|",
    ]
    details = []
    for name, outcome in outcomes.items():
        reasons = explanations().get(name, {})
        unexplained = [m for m in outcome.survivors if m.key not in reasons]
        killed = len(outcome.mutants) - len(outcome.survivors)
        lines.append(
            f"| {TARGETS[name].module} | {len(outcome.mutants)} | {killed} | {outcome.timeouts} |"
            f" {len(outcome.survivors) - len(unexplained)} | {len(unexplained)} |"
            f" {outcome.seconds:.0f} |"
        )
        details += ["", f"## {TARGETS[name].module}", ""]
        for mutant in outcome.survivors:
            why = reasons.get(mutant.key, "**unexplained**")
            details.append(f"- {mutant.key}\n  {why}")
        if not outcome.survivors:
            details.append("None survived.")
    return "\n".join([*lines, *details, ""])


def main() -> None:
    parser = argparse.ArgumentParser(description="mutation run over the arithmetic")
    parser.add_argument("targets", nargs="*", help=f"of {', '.join(TARGETS)}; none: all")
    parser.add_argument("--jobs", type=int, default=2, help="mutants at a time")
    parser.add_argument("--list", action="store_true", help="only print the mutants")
    options = parser.parse_args()
    unknown = set(options.targets) - set(TARGETS)
    if unknown:
        parser.error(f"no target {', '.join(sorted(unknown))}; there are {', '.join(TARGETS)}")
    names = options.targets or list(TARGETS)
    if options.list:
        for name in names:
            for mutant in mutants_of(TARGETS[name].path.read_text(), TARGETS[name].only):
                print(f"{name}:{mutant.line} {mutant.key}")
        return
    import_libraries()
    outcomes = {n: try_all(TARGETS[n], options.jobs, lambda t: print(t, flush=True)) for n in names}
    text = report(outcomes)
    print(text)
    if not options.targets:
        REPORT.parent.mkdir(exist_ok=True)
        REPORT.write_text(text, encoding="utf-8")
    sys.exit("unexplained" in text.replace("| unexplained |", ""))


if __name__ == "__main__":
    main()
