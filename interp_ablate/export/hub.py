"""An exported folder uploaded to the Hugging Face Hub, in one commit.

Knows: which folders are fit to publish, and what the hub's refusals mean. Does not know: how the export was made or
measured.
"""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import Any

from interp_ablate.errors import ExportError
from interp_ablate.export.model_card import CARD, CERTIFICATE
from interp_ablate.jobs.bars import waiting
from interp_ablate.storage.incoming_files import incoming_object
from interp_ablate.storage.provenance import MANIFEST, weight_digests
from interp_ablate.storage.strict_json import json_text

logger = logging.getLogger(__name__)


INDEX = ".safetensors.index.json"
WEIGHTS = (".safetensors", ".gguf")
# Temporary files of other programs; names that begin with a dot are never uploaded.
_TEMPORARY = (".tmp", ".partial", ".old", ".lock", ".part", ".incomplete", "~")
# Weights of an earlier export in the repository would be loaded beside the new ones.
_REPLACED = (*WEIGHTS, INDEX)


@waiting("upload")
def push_to_hub(
    folder: str | Path,
    repo_id: str,
    *,
    private: bool = True,
    token: str | None = None,
    revision: str | None = None,
    commit_message: str | None = None,
    force: bool = False,
) -> str:
    """Upload an exported checkpoint, adapter or GGUF folder as one commit; returns its address.

    Weights of an earlier export in the same repository are deleted in that commit. Absolute paths of this
    machine are left out of the manifest that is uploaded; the folder itself is not changed.

    Args:
        repo_id: "owner/name"; made where it does not exist.
        private: of a repository that is made. One that exists keeps what it is.
        token: default is the one of `hf auth login`, or HF_TOKEN.
        revision: the branch, made where it does not exist. Default: main.
        force: upload without a manifest or certificate, or into a repository that holds something else.
            A certificate that failed is never uploaded.

    Raises:
        ExportError: a folder that is not fit to publish, or what the hub refused and what to do.
    """
    from huggingface_hub import HfApi

    folder = Path(folder)
    files = _files_to_publish(folder, force=force)
    message = commit_message or f"Upload {folder.resolve().name}, made by interp_ablate"
    with _plain_errors(f"cannot push {folder} to {repo_id}"):
        api = HfApi(token=token, library_name="interp_ablate")
        url = api.create_repo(repo_id, private=private, exist_ok=True, repo_type="model")
        if revision not in (None, "main"):
            api.create_branch(url.repo_id, branch=revision, exist_ok=True)
        published = api.list_repo_files(url.repo_id, revision=revision)
        contents = _operations(folder, files, _checked(published, repo_id, force=force))
        logger.info("uploading %d files of %s to %s", len(files), folder, url)
        api.create_commit(url.repo_id, contents, commit_message=message, revision=revision)
    return str(url) if revision in (None, "main") else f"{url}/tree/{revision}"


@contextmanager
def _plain_errors(doing: str) -> Iterator[None]:
    """Turn the client's errors into this package's, which say what to do."""
    from huggingface_hub.errors import HTTPError, LocalTokenNotFoundError, OfflineModeIsEnabled

    try:
        yield
    except ExportError:
        raise
    except OfflineModeIsEnabled as error:
        raise ExportError(
            f"{doing}: offline mode is on. Unset HF_HUB_OFFLINE and TRANSFORMERS_OFFLINE and start again"
        ) from error
    except LocalTokenNotFoundError as error:
        raise ExportError(f"{doing}: {_TOKEN_ADVICE}") from error
    except (HTTPError, OSError, ValueError, KeyError) as error:
        raise ExportError(f"{doing}: {_advice(error)}") from error


_TOKEN_ADVICE = (
    "the hub knows no valid token with the right to write. Make one at "
    "https://huggingface.co/settings/tokens, then run `hf auth login` or set HF_TOKEN"
)


def _advice(error: Exception) -> str:
    """The hub's answer, and what to do about it."""
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    reason = str(error).strip() or type(error).__name__
    if isinstance(error, HFValidationError):
        return f"{reason}. A repository is named 'owner/name'"
    if isinstance(error, KeyError):
        return f"the answer has no {reason}. Is HF_ENDPOINT a hub, and the name not taken?"
    if not isinstance(error, HfHubHTTPError):
        return f"{reason}. Is the network there, and HF_ENDPOINT right?"
    status = error.response.status_code if error.response is not None else 0
    answer = error.server_message or reason
    advice = {
        401: _TOKEN_ADVICE,
        403: "the token may not write there. Check the owner's name and the token's rights",
        404: "there is no such repository or branch, or the token may not see it",
        409: "the name is taken by something else. Choose another name",
        413: "a file is too large for the hub",
        429: "too many requests. Wait some minutes and run it again",
    }
    other = "try again later: nothing was committed" if status >= 500 else "see its answer"
    return f"{advice.get(status, other)} (the hub answered {status}: {answer})"


def _files_to_publish(folder: Path, *, force: bool) -> list[str]:
    """The names of the files to upload, once the folder is fit for it."""
    if not folder.is_dir() or folder.name.endswith(_TEMPORARY):
        raise ExportError(f"{folder} is no finished export: expected a folder that `export` wrote")
    names = sorted(
        path.relative_to(folder).as_posix()
        for path in folder.rglob("*")
        if not path.is_dir()
        and not _is_left_out(PurePosixPath(path.relative_to(folder).as_posix()))
    )
    inside = Path(os.path.realpath(folder))  # a link to itself leads nowhere, and is no error here
    outside = [n for n in names if inside not in Path(os.path.realpath(folder / n)).parents]
    if outside:
        raise ExportError(
            f"{folder} links to files outside of it: {outside[:4]}. Put copies in their place"
        )
    _check_documents(folder, names, force=force)
    _check_weights(folder, names)
    _check_digests(folder, names, force=force)
    if "adapter_config.json" in names and not force:
        _check_base_of_adapter(folder / "adapter_config.json")
    return names


def _is_left_out(name: PurePosixPath) -> bool:
    hidden = any(part.startswith(".") or part == "__pycache__" for part in name.parts)
    return hidden or name.name.endswith(_TEMPORARY)


def _check_documents(folder: Path, names: list[str], *, force: bool) -> None:
    if CARD not in names:
        raise ExportError(f"{folder} has no {CARD}: a model is not published without its card")
    missing = [name for name in (MANIFEST, CERTIFICATE) if name not in names]
    if missing and not force:
        raise ExportError(
            f"{folder} has no {' and no '.join(missing)}: it is not known what it is. Export it again, "
            "or pass force (--force) to publish it uncertified"
        )
    passed = _read_json(folder / CERTIFICATE).get("passed") if CERTIFICATE in names else None
    if passed is None and not force:
        raise ExportError(
            f"{folder} was not compared with the hooked model: run `interp-ablate verify --write`, or pass force "
            "(--force) to publish it uncertified"
        )
    if passed is not None and passed is not True:
        raise ExportError(
            f"the certificate of {folder} did not pass: it is not the model that was measured. Export "
            "it again; a failed export is not published, by force neither"
        )


def _check_weights(folder: Path, names: list[str]) -> None:
    """Every weight file can be opened, and every shard of an index is there."""
    from safetensors import SafetensorError, safe_open

    weights = [name for name in names if name.endswith(WEIGHTS)]
    for index in (name for name in names if name.endswith(INDEX)):
        shards = set(_read_json(folder / index).get("weight_map", {}).values())
        lacking = sorted(shards - set(weights))
        if lacking:
            raise ExportError(f"{folder} is not whole: {index} names {lacking[:4]}, not there")
    for name in weights:
        if name.endswith(".safetensors"):
            try:
                with safe_open(folder / name, framework="pt"):
                    pass
            except (SafetensorError, OSError) as error:
                raise ExportError(
                    f"{folder / name} is not whole: {error}. Export it again"
                ) from error
    if not weights:
        raise ExportError(f"{folder} holds no weights (*.safetensors, *.gguf): nothing to publish")


def _check_digests(folder: Path, names: list[str], *, force: bool) -> None:
    """The weights are the bytes that the certificate was made of."""
    if CERTIFICATE not in names:
        return
    certified = _read_json(folder / CERTIFICATE).get("files")
    certified = certified if isinstance(certified, dict) else {}
    again = "run `interp-ablate verify --write`, or export it again"
    for name, digest in weight_digests(folder).items():
        if name in names and name not in certified and not force:
            raise ExportError(
                f"the certificate of {folder} does not say that it is of {name} (no digest of it): {again}; or "
                "pass force (--force) to publish it uncertified"
            )
        if certified.get(name, digest) != digest:
            raise ExportError(
                f"{folder / name} was changed since its certificate was made: {again}; it is not published, by "
                "force neither"
            )


def _check_base_of_adapter(path: Path) -> None:
    base = _read_json(path).get("base_model_name_or_path")
    if not isinstance(base, str) or Path(base).is_absolute() or base.startswith((".", "~")):
        raise ExportError(
            f"{path} names the base model {base!r}: nobody else can load the adapter with it. Write the "
            "base model's hub name, owner/name, there (or pass force, --force)"
        )


def _read_json(path: Path) -> dict[str, Any]:
    return incoming_object(path, error=ExportError)


def _public_manifest(path: Path) -> bytes:
    """The manifest without absolute paths: they tell a user's name and are of no use elsewhere."""
    manifest = _read_json(path)
    source = manifest.get("source")
    if isinstance(source, dict) and isinstance(source.get("path"), str):
        manifest["source"] = {**source, "path": None}
    if isinstance(manifest.get("run"), dict):
        manifest["run"] = _public_run(manifest["run"])
    return json_text(manifest, indent=1).encode()


# Settings of a run that name a place, or a scorer that may.
_PLACES = ("model", "template", "contrast", "positive", "negative", "expressions", "scorer")


def _public_run(run: dict[str, Any]) -> dict[str, Any]:
    """A run's recipe without what names a place; texts, such as a system prompt, stay as they are."""
    public = dict(run)
    if isinstance(configuration := run.get("configuration"), dict):
        places = {name: _without_places(configuration.get(name)) for name in _PLACES}
        public["configuration"] = configuration | places
    if isinstance(search := run.get("search"), dict):
        public["search"] = search | {"objective": _without_places(search.get("objective") or [])}
    if isinstance(
        made_of := run.get("made_of"), dict
    ):  # others than fingerprints are of older exports
        public["made_of"] = {k: v for k, v in made_of.items() if isinstance(v, str)}
    return public


def _without_places(value: Any) -> Any:
    """Names with every absolute path in them shortened to its last part; a judge's without its server's address."""
    if isinstance(value, list):
        return [_without_places(each) for each in value]
    if not isinstance(value, str):
        return value
    named = re.sub(r"(judge:[^@]*)@[^<>]*", r"\1", value)
    parts = re.split(r"(\b(?!file:)\w+://[^<>]*)", named)  # each second one is an address
    parts[::2] = [_ABSOLUTE.sub("", part) for part in parts[::2]]
    return "".join(parts)


_ABSOLUTE = re.compile(r"(?:(?<!\w)[A-Za-z]:|~\w*)?(?<![\w.])[/\\](?:[^/\\:\n]+[/\\])*")


def _checked(published: list[str], repo_id: str, *, force: bool) -> list[str]:
    """The files of the repository, which is empty or holds an earlier export."""
    others = [name for name in published if name != ".gitattributes"]
    if others and MANIFEST not in others and not force:
        raise ExportError(
            f"{repo_id} holds something that interp_ablate did not export ({others[:3]}): choose another "
            "name, or pass force (--force) to put this on top of it"
        )
    return others


def _operations(folder: Path, names: list[str], published: list[str]) -> list[Any]:
    """One addition a file, and the deletion of earlier weights that are not written again."""
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete

    additions = [
        CommitOperationAdd(
            name, _public_manifest(folder / name) if name == MANIFEST else str(folder / name)
        )
        for name in names
    ]
    stale = [name for name in published if name.endswith(_REPLACED) and name not in names]
    return [*additions, *(CommitOperationDelete(name) for name in stale)]
