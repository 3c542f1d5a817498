"""Uploads, to a server on this machine that answers as the Hub does."""

import base64
import json
import re
from collections.abc import Iterator
from functools import partial
from hashlib import sha1
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any

import pytest
from huggingface_hub import HfApi, constants

from tests.conftest import settings
from vdrop_cli.commands import export
from vdrop_cli.errors import ConfigError, RunError
from vdrop_cli.sharing import hub as upload

pytest.importorskip("safetensors")
NAMES = {"README.md", "config.json", "model.safetensors", "vocabulary.json"}


class Hub(ThreadingHTTPServer):
    """Repositories by name; each is its files. `status` answers every request with an error."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Answers)
        self.repositories: dict[str, dict[str, bytes]] = {}
        self.private: dict[str, bool] = {}
        self.messages: list[str] = []
        self.tokens: set[str | None] = set()
        self.status: int | None = None

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


class Answers(BaseHTTPRequestHandler):
    """The part of the Hub's interface that an upload needs."""

    server: Hub

    def log_message(self, *_: Any) -> None:
        pass

    def answer(self, content: object, status: int = 200, **headers: str) -> None:
        body = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def handle_request(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        self.server.tokens.add(self.headers.get("Authorization"))
        if self.server.status is not None:
            return self.answer({"error": "no"}, self.server.status)
        path = self.path.partition("?")[0]
        if path == "/api/repos/create":
            return self.create(json.loads(body))
        if path == "/api/validate-yaml":
            return self.answer({"errors": [], "warnings": []})
        if match := re.fullmatch(r"/api/models/([^/]+/[^/]+)(?:/(\w+)/main|/revision/main)?", path):
            return self.repository(match[1], match[2], body)
        if match := re.fullmatch(r"/([^/]+/[^/]+)/resolve/main/(.+)", path):
            content = self.server.repositories[match[1]][match[2]]
            return self.answer(content, ETag=f'"{sha1(content).hexdigest()}"', X_Repo_Commit="1" * 40)
        self.answer({"error": f"{self.command} {self.path} is not answered here"}, 501)

    do_GET = do_POST = do_HEAD = handle_request

    def create(self, request: dict[str, Any]) -> None:
        name = f"{request['organization']}/{request['name']}"
        url = {"url": f"{self.server.url}/{name}"}
        if name in self.server.repositories:
            return self.answer(url, 409)
        self.server.repositories[name] = {".gitattributes": b""}
        self.server.private[name] = request.get("private") or request.get("visibility") == "private"
        self.answer(url)

    def repository(self, name: str, action: str | None, body: bytes) -> None:
        content = self.server.repositories[name]
        if action == "tree":
            return self.answer(
                [
                    {"type": "file", "path": path, "size": len(data), "oid": sha1(data).hexdigest()}
                    for path, data in content.items()
                ]
            )
        if action == "preupload":
            files = [
                {"path": file["path"], "uploadMode": "regular", "shouldIgnore": False}
                for file in json.loads(body)["files"]
            ]
            return self.answer({"files": files})
        if action == "commit":
            for line in map(json.loads, body.splitlines()):
                if line["key"] == "header":
                    self.server.messages.append(line["value"]["summary"])
                else:
                    assert (line["key"], line["value"]["encoding"]) == ("file", "base64")
                    content[line["value"]["path"]] = base64.b64decode(line["value"]["content"])
            return self.answer(
                {"commitUrl": f"{constants.ENDPOINT}/{name}/commit/{'1' * 40}", "commitOid": "1" * 40}
            )
        siblings = [{"rfilename": path} for path in content]
        self.answer({"id": name, "sha": "1" * 40, "siblings": siblings})


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Hub]:
    monkeypatch.chdir(tmp_path)
    with Hub() as server:
        thread = Thread(target=server.serve_forever, args=(0.05,))
        thread.start()
        monkeypatch.setattr(upload, "HfApi", partial(HfApi, endpoint=server.url))
        monkeypatch.setenv("HF_TOKEN", "hf_secret")
        monkeypatch.setenv("NO_PROXY", "127.0.0.1")
        yield server
        server.shutdown()
        thread.join()


def exported(run: Path, *more: str) -> None:
    export.run(settings(f"checkpoint={run}", *more, command="export"))


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_the_folder_is_uploaded_and_again_with_what_was_added(
    hub: Hub, run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    exported(run, "folder=shared", "push=me/model")
    assert hub.repositories["me/model"] == contents(Path("shared")) | {".gitattributes": b""}
    assert capsys.readouterr().out.splitlines()[-1] == f"{hub.url}/me/model"
    assert hub.private == {"me/model": True} and "Bearer hf_secret" in hub.tokens
    assert "epoch 1" in hub.messages[0]
    Path("shared/LICENSE").write_text("mine")
    Path("shared/model.safetensors-standard.json").write_text("{}")
    exported(run, "folder=shared", "push=me/model")
    assert hub.repositories["me/model"]["LICENSE"] == b"mine" and len(hub.messages) == 2
    names = {*NAMES, "LICENSE", ".gitattributes"}
    assert hub.repositories["me/model"].keys() == names, "evaluations stay here"


def test_a_card_that_was_edited_there_is_not_overwritten(hub: Hub, run: Path) -> None:
    exported(run, "push=me/model")
    files = hub.repositories["me/model"]
    files["README.md"] = edited = files["README.md"].replace(b"library_name", b"license: mit\nlibrary_name")
    with pytest.raises(ConfigError, match=r"^push=me/model holds a README\.md that was edited there; export"):
        exported(run, "push=me/model")
    assert files["README.md"] == edited and len(hub.messages) == 1
    exported(run, "folder=shared")
    Path("shared/README.md").write_bytes(edited)
    exported(run, "folder=shared", "push=me/model")
    assert files["README.md"] == edited and len(hub.messages) == 2


def test_without_a_folder_nothing_is_left_on_this_machine(hub: Hub, run: Path) -> None:
    before = set(Path().rglob("*"))
    exported(run, "push=me/open", "private=false")
    assert hub.repositories["me/open"].keys() - {".gitattributes"} == NAMES
    assert hub.private == {"me/open": False} and set(Path().rglob("*")) == before


@pytest.mark.parametrize("name", ["README.md", "config.json"])
def test_a_repository_that_is_no_export_is_not_changed(name: str, hub: Hub, run: Path) -> None:
    hub.repositories["me/other"] = {name: b'{"model_type": "bert"}'}
    with pytest.raises(ConfigError, match=r"^push=me/other holds other files"):
        exported(run, "push=me/other")
    assert hub.repositories["me/other"] == {name: b'{"model_type": "bert"}'} and not hub.messages


@pytest.mark.parametrize(("status", "kind"), [(401, ConfigError), (403, ConfigError), (400, RunError)])
def test_a_refusal_is_one_line(status: int, kind: type[Exception], hub: Hub, run: Path) -> None:
    hub.status = status
    with pytest.raises(kind, match=r"^push=me/model [^\n]+$"):
        exported(run, "folder=shared", "push=me/model")
    assert set(contents(Path("shared"))) == NAMES, "the folder is whole"


def test_no_network_is_one_line(hub: Hub, run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with Hub() as closed:
        url = closed.url
    monkeypatch.setattr(upload, "HfApi", partial(HfApi, endpoint=url))
    with pytest.raises(RunError, match=r"^push=me/model failed [^\n]+check the network"):
        exported(run, "push=me/model")


def test_without_a_token_nothing_is_written(hub: Hub, run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HF_TOKEN")
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", "nowhere")
    with pytest.raises(ConfigError, match=r"^push needs a token [^\n]+HF_TOKEN"):
        exported(run, "folder=shared", "push=me/model")
    assert not Path("shared").exists() and not hub.tokens


@pytest.mark.parametrize("name", ["model", "a/b/c", "me/", "/model", "me/mo del", "http://x/y", "é/x"])
def test_a_wrong_name_is_refused_by_its_setting(name: str) -> None:
    with pytest.raises(ConfigError, match=r"^push must be owner/name"):
        settings("checkpoint=a", f"push='{name}'", command="export")


def test_a_name_that_the_hub_forbids_is_named(hub: Hub, run: Path) -> None:
    for name in ("me/a--b", f"me/{'x' * 100}"):
        with pytest.raises(ConfigError, match=r"^push must be owner/name, got [^\n]+$"):
            exported(run, f"push={name}")
    assert not hub.repositories
