"""Arguments that several commands of `prefline` take."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

Target = Annotated[
    Path, typer.Argument(metavar="CONFIG|RUN", help="A configuration (.yaml) or a run directory.")
]
RunDir = Annotated[Path, typer.Argument(metavar="RUN", help="A run directory, as runs/demo.")]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(metavar="[KEY=VALUE]...", help="Settings to change, as ppo.kl_coef=0.1."),
]
Wait = Annotated[
    bool | None,
    typer.Option(
        "--wait/--no-wait",
        help="Wait until people have ranked enough, or end with exit code 3. Default: wait in a"
        " terminal.",
        show_default=False,
    ),
]
Json = Annotated[bool, typer.Option("--json", help="For scripts.")]
