"""Publishing: the real client against a local server that speaks the hub's protocol."""

from __future__ import annotations

import base64
import hashlib
import json
import logging
import re
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import huggingface_hub
import pytest
import torch
import yaml
from huggingface_hub import constants
from safetensors.torch import save_file

from interp_ablate.errors import ExportError
from interp_ablate.export.hub import push_to_hub
from interp_ablate.storage.provenance import weight_digests

CARD = "---\nlicense: mit\n---\n\n# A card\n"
REPO = "me/edited"


class Hub(ThreadingHTTPServer):
    """Repositories, branches, files and large objects, in memory."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server_address[1]}"
        self.repos: dict[str, dict[str, dict[str, bytes]]] = {}
        self.visibility: dict[str, str] = {}
        self.objects: dict[str, bytes] = {}
        self.commits: list[str] = []
        self.requests: list[str] = []
        self.token = "hf_secret"
        self.refuse: tuple[str, int, str] = ("nothing at all", 0, "")  # path, status, message


class Handler(BaseHTTPRequestHandler):
    server: Hub

    def log_message(self, *_: Any) -> None:
        pass

    def answer(self, value: Any = None, status: int = 200, **headers: str) -> None:
        body = json.dumps({} if value is None else value).encode()
        self.send_response(status)
        for key, text in {"Content-Type": "application/json", **headers}.items():
            self.send_header(key.replace("_", "-"), text)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def fail(self, status: int, message: str) -> None:
        self.answer({"error": message}, status, X_Error_Message=message)

    def handle_any(self) -> None:
        hub, path = self.server, unquote(urlsplit(self.path).path)
        length = int(self.headers.get("Content-Length") or 0)
        chunked = self.headers.get("Transfer-Encoding") == "chunked"
        body = b"".join(self.chunks()) if chunked else self.rfile.read(length)
        hub.requests.append(f"{self.command} {path}")
        part, status, message = hub.refuse
        if part in path:
            return self.fail(status, message)
        if self.command == "PUT":
            oid = path.rsplit("/", 1)[1]
            assert hashlib.sha256(body).hexdigest() == oid
            hub.objects[oid] = body
            return self.answer()
        if self.headers.get("Authorization") != f"Bearer {hub.token}":
            return self.fail(401, "Invalid username or password.")
        for pattern, work in ROUTES.items():
            match = re.fullmatch(pattern, path)
            if match:
                return work(self, body, *match.groups())
        return self.fail(404, f"no route {path}")

    do_GET = do_POST = do_PUT = handle_any

    def chunks(self) -> Iterator[bytes]:
        while size := int(self.rfile.readline(), 16):
            yield self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()

    def create(self, body: bytes) -> None:
        given, hub = json.loads(body), self.server
        name = f"{given['organization']}/{given['name']}"
        if given["organization"] != "me":
            return self.fail(
                403, "You don't have the rights to create a model under this namespace"
            )
        url = {"url": f"{hub.url}/{name}"}
        if name in hub.repos:
            return self.answer({"error": "You already created this model repo", **url}, 409)
        hub.repos[name] = {"main": {".gitattributes": b""}}
        hub.visibility[name] = given.get("visibility", "public")
        self.answer(url)

    def branch(self, body: bytes, repo: str, name: str) -> None:
        branches = self.server.repos[repo]
        if name in branches:
            return self.fail(409, "Reference already exists")
        branches[name] = dict(branches["main"])
        self.answer()

    def tree(self, body: bytes, repo: str, revision: str) -> None:
        files = self.server.repos[repo][revision]
        self.answer(
            [{"type": "file", "path": p, "size": len(c), "oid": "0"} for p, c in files.items()]
        )

    def validate(self, body: bytes) -> None:
        text = json.loads(body)["content"]
        try:
            yaml.safe_load(text.split("---")[1])
        except (yaml.YAMLError, IndexError) as error:
            return self.answer({"errors": [{"message": str(error)}], "warnings": []}, 400)
        self.answer({"errors": [], "warnings": []})

    def preupload(self, body: bytes, repo: str, revision: str) -> None:
        files = json.loads(body)["files"]
        large = (".safetensors", ".gguf")
        self.answer(
            {
                "files": [
                    {
                        "path": file["path"],
                        "uploadMode": "lfs" if file["path"].endswith(large) else "regular",
                        "shouldIgnore": False,
                    }
                    for file in files
                ]
            }
        )

    def batch(self, body: bytes, repo: str) -> None:
        wanted = json.loads(body)["objects"]
        href = self.server.url + "/lfs/"
        self.answer(
            {
                "transfer": "basic",
                "objects": [
                    {**item, "actions": {"upload": {"href": href + item["oid"]}}} for item in wanted
                ],
            }
        )

    def commit(self, body: bytes, repo: str, revision: str) -> None:
        hub = self.server
        files = dict(hub.repos[repo][revision])
        for line in body.splitlines():
            entry = json.loads(line)
            value = entry["value"]
            if entry["key"] == "header":
                message = value["summary"]
            elif entry["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif entry["key"] == "lfsFile":
                files[value["path"]] = hub.objects[value["oid"]]
            elif entry["key"] == "deletedFile":
                del files[value["path"]]
            else:
                return self.fail(400, entry["key"])
        hub.repos[repo][revision] = files
        hub.commits.append(message)
        self.answer({"commitUrl": f"{hub.url}/{repo}/commit/{'0' * 40}", "commitOid": "0" * 40})


NAME = r"([\w.-]+/[\w.-]+)"
ROUTES: dict[str, Any] = {
    r"/api/repos/create": Handler.create,
    r"/api/validate-yaml": Handler.validate,
    rf"/api/models/{NAME}/branch/(.+)": Handler.branch,
    rf"/api/models/{NAME}/tree/(.+)": Handler.tree,
    rf"/api/models/{NAME}/preupload/(.+)": Handler.preupload,
    rf"/api/models/{NAME}/commit/(.+)": Handler.commit,
    rf"/{NAME}\.git/info/lfs/objects/batch": Handler.batch,
}


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    server = Hub()
    thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    online(monkeypatch, server.url)
    monkeypatch.setenv("HF_TOKEN", server.token)
    yield server
    server.shutdown()
    server.server_close()
    huggingface_hub.close_session()


def online(monkeypatch: pytest.MonkeyPatch, url: str) -> None:
    """The client reads its environment when it is imported: set what it read."""
    monkeypatch.setattr(constants, "ENDPOINT", url)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    huggingface_hub.close_session()


def make_export(folder: Path, *, shards: int = 1) -> Path:
    """What an export folder holds, with a manifest that names a place of this machine."""
    folder.mkdir()
    source = {"name": "base", "kind": "folder", "path": "/home/me/base", "license": "mit"}
    (folder / "interp_ablate.json").write_text(
        json.dumps({"source": source, "plan": {"edits": []}})
    )
    (folder / "README.md").write_text(CARD)
    (folder / "config.json").write_text("{}")
    names = [f"model-{i + 1:05}-of-{shards:05}.safetensors" for i in range(shards)]
    for i, name in enumerate(names if shards > 1 else ["model.safetensors"]):
        save_file({f"tensor.{i}": torch.full((8,), float(i))}, folder / name)
    if shards > 1:
        index = {"weight_map": {f"tensor.{i}": name for i, name in enumerate(names)}}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    certify(folder)
    return folder


def certify(folder: Path) -> None:
    certificate = {"passed": True, "files": weight_digests(folder)}
    (folder / "certificate.json").write_text(json.dumps(certificate))


def read(folder: Path) -> dict[str, bytes]:
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file()
    }


def stored(hub: Hub, revision: str = "main") -> dict[str, bytes]:
    files = dict(hub.repos[REPO][revision])
    files.pop(".gitattributes")
    return files


# --------------------------------------------------------------------------------- what is published


def test_a_folder_arrives_whole(tmp_path: Path, hub: Hub) -> None:
    folder = make_export(tmp_path / "out", shards=2)
    (folder / "extra").mkdir()
    (folder / "extra" / "note.txt").write_text("kept")
    before = read(folder)
    url = push_to_hub(folder, REPO)
    assert url == f"{hub.url}/{REPO}" and hub.visibility[REPO] == "private"
    found = stored(hub)
    manifest = json.loads(found.pop("interp_ablate.json"))
    assert manifest["source"] == {"name": "base", "kind": "folder", "path": None, "license": "mit"}
    assert manifest["plan"] == {"edits": []}
    assert read(folder) == before
    before.pop("interp_ablate.json")
    assert found == before
    assert hub.commits == ["Upload out, made by interp_ablate"]  # one commit, or none
    assert sum(request.startswith("PUT /lfs/") for request in hub.requests) == 2


def test_options(tmp_path: Path, hub: Hub) -> None:
    folder = make_export(tmp_path / "out")
    hub.token = "hf_other"
    url = push_to_hub(
        folder, REPO, private=False, token="hf_other", revision="v1", commit_message="First"
    )
    assert url == f"{hub.url}/{REPO}/tree/v1" and hub.visibility[REPO] == "public"
    assert stored(hub) == {} and "model.safetensors" in stored(hub, "v1")
    assert hub.commits == ["First"]
    push_to_hub(folder, REPO, token="hf_other", revision="v1")
    assert len(hub.commits) == 2


def test_what_is_no_part_of_the_export_stays_here(tmp_path: Path, hub: Hub) -> None:
    folder = make_export(tmp_path / "out")
    names = set(read(folder))
    for name in (
        ".env",
        ".git/config",
        "a/.cache/x",
        "model.safetensors.tmp",
        "x.partial",
        "y.lock",
    ):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("secret")
    push_to_hub(folder, REPO)
    assert set(stored(hub)) == names


def test_an_older_export_is_replaced(tmp_path: Path, hub: Hub) -> None:
    push_to_hub(make_export(tmp_path / "old", shards=3), REPO)
    hub.repos[REPO]["main"]["figure.png"] = b"the user's own"
    push_to_hub(make_export(tmp_path / "new"), REPO)
    found = stored(hub)
    weights = {name for name in found if "safetensors" in name}
    assert weights == {"model.safetensors"} and found["figure.png"] == b"the user's own"


def test_something_else_is_not_overwritten(tmp_path: Path, hub: Hub) -> None:
    hub.repos[REPO] = {"main": {".gitattributes": b"", "model.safetensors": b"precious"}}
    folder = make_export(tmp_path / "out")
    with pytest.raises(ExportError, match=r"me/edited holds something that .* did not export"):
        push_to_hub(folder, REPO)
    assert stored(hub) == {"model.safetensors": b"precious"} and not hub.commits
    push_to_hub(folder, REPO, force=True)
    assert stored(hub)["model.safetensors"] == (folder / "model.safetensors").read_bytes()


# --------------------------------------------------------------------------------- what is not


def never_called(hub: Hub) -> bool:
    return not hub.requests


def test_a_folder_that_is_not_fit(tmp_path: Path, hub: Hub) -> None:
    for name, message in (
        ("interp_ablate.json", r"has no interp_ablate.json: it is not known what it is"),
        ("certificate.json", r"has no certificate.json"),
        ("README.md", r"has no README.md"),
        ("model.safetensors", r"holds no weights"),
    ):
        folder = make_export(tmp_path / name.replace(".", "-"))
        (folder / name).unlink()
        with pytest.raises(ExportError, match=message):
            push_to_hub(folder, REPO)
        if name in ("README.md", "model.safetensors"):
            with pytest.raises(ExportError, match=message):
                push_to_hub(folder, REPO, force=True)
    assert never_called(hub)
    for name in ("interp_ablate-json", "certificate-json"):
        push_to_hub(tmp_path / name, REPO, force=True)
    assert len(hub.commits) == 2


@pytest.mark.parametrize(
    "text", ('{"passed": false}', '{"passed": 0}', '{"passed": "no"}', "[]", "{")
)
def test_a_failed_certificate_is_never_published(tmp_path: Path, hub: Hub, text: str) -> None:
    folder = make_export(tmp_path / "out")
    (folder / "certificate.json").write_text(text)
    for force in (False, True):
        with pytest.raises(
            ExportError,
            match=r"did not pass|not whole JSON|a JSON object belongs|of the kind that belongs",
        ):
            push_to_hub(folder, REPO, force=force)
    assert never_called(hub)


def test_a_certificate_is_of_these_weights(tmp_path: Path, hub: Hub) -> None:
    folder = make_export(tmp_path / "out")
    save_file({"tensor.0": torch.ones(8)}, folder / "model.safetensors")
    for force in (False, True):
        with pytest.raises(ExportError, match=r"model.safetensors was changed since"):
            push_to_hub(folder, REPO, force=force)
    assert never_called(hub)
    for name in ("another", "without"):
        folder = make_export(tmp_path / name)
        if name == "another":
            save_file({"tensor.0": torch.ones(8)}, folder / "more.safetensors")
        else:
            (folder / "certificate.json").write_text('{"passed": true}')
        with pytest.raises(ExportError, match=r"no digest of it.*pass force"):
            push_to_hub(folder, REPO)
    push_to_hub(folder, REPO, force=True)


def test_a_folder_that_was_never_compared(tmp_path: Path, hub: Hub) -> None:
    folder = make_export(tmp_path / "out")
    (folder / "certificate.json").write_text('{"compared": "no", "passed": null, "limits": {}}')
    with pytest.raises(ExportError, match=r"not compared .*run `interp-ablate verify --write`"):
        push_to_hub(folder, REPO)
    assert never_called(hub)
    push_to_hub(folder, REPO, force=True)
    assert len(hub.commits) == 1


def test_partial_folders(tmp_path: Path, hub: Hub) -> None:
    missing = make_export(tmp_path / "missing", shards=3)
    (missing / "model-00002-of-00003.safetensors").unlink()
    with pytest.raises(ExportError, match=r"not whole: .*index.json names .*00002-of-00003"):
        push_to_hub(missing, REPO)
    cut = make_export(tmp_path / "cut")
    weights = (cut / "model.safetensors").read_bytes()
    (cut / "model.safetensors").write_bytes(weights[:-1])
    with pytest.raises(ExportError, match=r"model.safetensors is not whole"):
        push_to_hub(cut, REPO)
    for name in (".out.x.partial", "nowhere"):
        if name != "nowhere":
            make_export(tmp_path / name)
        with pytest.raises(ExportError, match=r"no finished export"):
            push_to_hub(tmp_path / name, REPO)
    assert never_called(hub)


def test_links_out_of_the_folder(tmp_path: Path, hub: Hub) -> None:
    (tmp_path / "private.txt").write_text("secret")
    folder = make_export(tmp_path / "out")
    (folder / "notes.txt").symlink_to(tmp_path / "private.txt")
    with pytest.raises(ExportError, match=r"links to files outside of it: \['notes.txt'\]"):
        push_to_hub(folder, REPO)
    assert never_called(hub)


@pytest.mark.parametrize("base", ("/home/me/base", "./base", None))
def test_an_adapter_whose_base_is_on_this_machine(tmp_path: Path, hub: Hub, base: Any) -> None:
    folder = make_export(tmp_path / "out")
    config = folder / "adapter_config.json"
    config.write_text(json.dumps({"base_model_name_or_path": base}))
    with pytest.raises(ExportError, match=r"nobody else can load the adapter"):
        push_to_hub(folder, REPO)
    assert never_called(hub)
    config.write_text(json.dumps({"base_model_name_or_path": "owner/base"}))
    push_to_hub(folder, REPO)
    assert len(hub.commits) == 1


# --------------------------------------------------------------------------------- refusals of the hub


def test_no_token(tmp_path: Path, hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HF_TOKEN")
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "no-token"))
    folder = make_export(tmp_path / "out")
    for token in (None, "hf_wrong"):
        with pytest.raises(ExportError, match=r"no valid token.*hf auth login") as caught:
            push_to_hub(folder, REPO, token=token)
        assert "hf_wrong" not in str(caught.value)
    assert not hub.repos


@pytest.mark.parametrize(
    ("refuse", "message"),
    (
        (("/commit/", 403, "Forbidden: read-only token"), r"may not write there.*read-only token"),
        (("/create", 409, "taken by a user"), r"the name not taken"),
        (("/commit/", 500, "boom"), r"nothing was committed.*answered 500"),
        (("/preupload/", 404, "Repository not found"), r"no such repository or branch"),
        (("/lfs/objects", 413, "too big"), r"a file is too large"),
    ),
)
def test_refusals(tmp_path: Path, hub: Hub, refuse: Any, message: str) -> None:
    hub.refuse = refuse
    with pytest.raises(ExportError, match=message):
        push_to_hub(make_export(tmp_path / "out"), REPO)
    assert not hub.commits


def test_another_owners_name(tmp_path: Path, hub: Hub) -> None:
    folder = make_export(tmp_path / "out")
    with pytest.raises(ExportError, match=r"may not write there.*answered 403: You don't have"):
        push_to_hub(folder, "other/edited")
    for name in ("a/b/c", "me/bad name", "me/-x"):
        with pytest.raises(ExportError, match=r"named 'owner/name'"):
            push_to_hub(folder, name)


def test_a_card_that_the_hub_refuses(tmp_path: Path, hub: Hub) -> None:
    folder = make_export(tmp_path / "out")
    (folder / "README.md").write_text("---\nlicense: [mit\n---\n")
    with pytest.raises(ExportError, match=r"Invalid metadata in README.md"):
        push_to_hub(folder, REPO)
    assert not hub.commits


def test_no_network(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = make_export(tmp_path / "out")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    huggingface_hub.close_session()
    with pytest.raises(ExportError, match=r"offline mode is on. Unset HF_HUB_OFFLINE"):
        push_to_hub(folder, REPO, token="hf_secret")
    online(monkeypatch, "http://127.0.0.1:9")
    with pytest.raises(ExportError, match=r"Is the network there"):
        push_to_hub(folder, REPO, token="hf_secret")
    huggingface_hub.close_session()


def test_the_token_is_not_logged(
    tmp_path: Path, hub: Hub, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.DEBUG, logger="interp_ablate"):
        push_to_hub(make_export(tmp_path / "out"), REPO, token=hub.token)
    assert "uploading 5 files" in caplog.text and hub.token not in caplog.text
