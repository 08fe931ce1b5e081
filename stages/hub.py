"""Push a finished export to a hub (huggingface.co, or what HF_ENDPOINT names).

The token is Hugging Face's own matter: HF_TOKEN, or what `hf auth login` has stored. It is neither
printed nor written anywhere. A repository that is not ours is left alone: its files would be lost.

Command: python -m stages.hub FOLDER OWNER/NAME model|dataset private|public
(called by `prefline export RUN --to hub:OWNER/NAME`).
"""

from __future__ import annotations

import sys
from collections.abc import Iterable
from pathlib import Path

from huggingface_hub import (
    CommitOperationAdd,
    CommitOperationDelete,
    HfApi,
    constants,
    get_token,
)
from huggingface_hub.errors import HfHubHTTPError, HTTPError, OfflineModeIsEnabled

from pipeline.errors import ConfigError, StageError, ToolkitError
from pipeline.export import MARK
from pipeline.files import read_json

# what the hub itself puts into a new repository
_FROM_THE_HUB = {".gitattributes"}
_LOGIN = "Set HF_TOKEN to a token that may write, or log in: hf auth login"


def push(folder: Path, name: str, kind: str, private: bool) -> str:
    """Make the repository if need be, and replace its content by `folder` in one commit; its address.

    Raises:
        ConfigError: no token, a wrong one, or the repository is somebody's work.
        StageError: the hub does not answer, or refuses.
    """
    if not get_token():
        raise ConfigError(f"hub:{name}: there is no token for {constants.ENDPOINT}", _LOGIN)
    api = HfApi()
    try:
        address, held = _repository(api, name, kind, private)
        files = {
            path.relative_to(folder).as_posix(): path
            for path in sorted(folder.rglob("*"))
            if path.is_file()
        }
        # not upload_folder, which may make several commits: people see an export whole or not at all
        api.create_commit(
            name,
            [
                *(CommitOperationAdd(path, files[path]) for path in files),
                *(CommitOperationDelete(path) for path in sorted(held - files.keys())),
            ],
            commit_message=_message(folder),
            repo_type=kind,
        )
    except HfHubHTTPError as error:
        raise _explained(name, error) from None
    except OfflineModeIsEnabled:
        raise ConfigError(
            f"hub:{name}: HF_HUB_OFFLINE is set, so nothing can be pushed", "Unset it."
        ) from None
    except (HTTPError, OSError) as error:
        raise _no_answer(name, error) from None
    except RuntimeError as error:
        # huggingface_hub wraps what stopped the upload of one file
        cause = error.__cause__
        if isinstance(cause, HfHubHTTPError):
            raise _explained(name, cause) from None
        raise _no_answer(name, cause or error) from None
    except ValueError as error:
        first = str(error).strip().splitlines()[-1]
        raise StageError(f"hub:{name}: {constants.ENDPOINT} cannot take it: {first}") from None
    return address


def _repository(api: HfApi, name: str, kind: str, private: bool) -> tuple[str, set[str]]:
    """The address of the repository, new or an earlier export, and the files that it holds of one."""
    try:
        return str(api.create_repo(name, repo_type=kind, private=private)), set()
    except HfHubHTTPError as error:
        if _status(error) != 409:
            raise
    held = set(api.list_repo_files(name, repo_type=kind)) - _FROM_THE_HUB
    if held and MARK not in held:
        raise ConfigError(
            f"hub:{name}: the repository exists and is no export of prefline, so it is not replaced",
            "Choose another name.",
        )
    return f"{constants.ENDPOINT}/{'' if kind == 'model' else f'{kind}s/'}{name}", held


def _message(folder: Path) -> str:
    mark = read_json(folder / MARK)
    return f"{mark['what']} of step {mark['step']}, {mark['digest']}"


def _status(error: HfHubHTTPError) -> int | None:
    return error.response.status_code if error.response is not None else None


def _explained(name: str, error: HfHubHTTPError) -> ToolkitError:
    status = _status(error)
    if status == 401:
        return ConfigError(f"hub:{name}: {constants.ENDPOINT} does not know this token", _LOGIN)
    if status == 403:
        owner = name.partition("/")[0]
        return ConfigError(f"hub:{name}: this token may not write to {owner}", _LOGIN)
    return StageError(
        f"hub:{name}: {constants.ENDPOINT} refused with status {status}",
        "Nothing was changed, or only the empty repository was made; try again.",
    )


def _no_answer(name: str, error: BaseException) -> StageError:
    return StageError(
        f"hub:{name}: {constants.ENDPOINT} does not answer ({type(error).__name__})",
        "Check the network, then give the same command again.",
    )


def main(arguments: Iterable[str]) -> int:
    """Push, and say where to; the exit code."""
    folder, name, kind, visible = arguments
    try:
        address = push(Path(folder), name, kind, private=visible == "private")
    except ToolkitError as error:
        print(f"error: {error}", file=sys.stderr, flush=True)  # noqa: T201 - a program of its own
        return error.exit_code
    print(address, flush=True)  # noqa: T201
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
