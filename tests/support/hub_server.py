"""A Hugging Face hub of the tests' own on loopback, in a process of its own: datasets alone.

`python hub_server.py ROOT` serves ROOT/ORG/NAME/REVISION/… and prints its port. A folder's name
tells who may read it: `private-…` needs the token, without which it is said not to exist; `gated-…`
lists its files to everybody and gives them to nobody. Whoever has the token may create and write
datasets, but for those of the organisation `full`. Every request is a line of ROOT/requests.log.
"""

import base64
import hashlib
import json
import re
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

TOKEN = "hf_of_the_tests"
COMMIT_CHARACTERS = 40

API = re.compile(
    r"/api/datasets/(?P<repository>[^/]+/[^/]+)"
    r"(?:/(?P<what>auth-check|revision|tree|paths-info|preupload|commit)(?:/(?P<revision>[^/]+))?(?P<path>/.*)?)?"
)
RESOLVE = re.compile(
    r"/datasets/(?P<repository>[^/]+/[^/]+)/resolve/(?P<revision>[^/]+)/(?P<path>.+)"
)


def commit_of(folder: Path) -> str:
    """Changes with the names and contents of the files, as a commit does."""
    digest = hashlib.sha1()
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            digest.update(f"{path.relative_to(folder)}\0{blob_of(path)}".encode())
    return digest.hexdigest()


def blob_of(path: Path) -> str:
    return hashlib.sha1(path.read_bytes()).hexdigest()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    root: Path

    def do_GET(self) -> None:
        self._answer()

    do_HEAD = do_POST = do_GET

    def _answer(self) -> None:
        length = int(self.headers.get("content-length", 0))
        body = self.rfile.read(length).decode()
        with (self.root / "requests.log").open("a") as log:
            log.write(f"{self.command} {self.path} {self.headers.get('range', '')}\n")
        url = urlsplit(self.path)
        if url.path == "/api/repos/create":
            return self._create(json.loads(body))
        if url.path == "/api/validate-yaml":
            return self._json({"errors": [], "warnings": []})
        api, resolve = API.fullmatch(url.path), RESOLVE.fullmatch(url.path)
        match = api or resolve
        if match is None:
            return self._error(404, "EntryNotFound")
        repository = self.root / match["repository"]
        is_known = self.headers.get("authorization") == f"Bearer {TOKEN}"
        if not repository.is_dir() or ("private-" in match["repository"] and not is_known):
            return self._error(401, "RepoNotFound")
        what = api["what"] if api else "resolve"
        if what in ("preupload", "commit") and (not is_known or match["repository"][:5] == "full/"):
            return self._error(403, "Forbidden")
        if "gated-" in match["repository"] and what in ("auth-check", "resolve"):
            return self._error(403, "GatedRepo")
        if what == "auth-check":
            return self._json({})
        revisions = {r.name: r for r in repository.iterdir()}
        revisions |= {commit_of(folder): folder for folder in revisions.values()}
        wanted = unquote(match["revision"] or "main")
        folder = revisions.get(wanted)
        if folder is None:
            return self._error(404, "RevisionNotFound")
        if what in (None, "revision"):
            return self._json({"id": match["repository"], "sha": commit_of(folder)})
        if what == "preupload":
            told = [{"path": f["path"]} for f in json.loads(body)["files"]]
            modes = {"uploadMode": "regular", "shouldIgnore": False}
            return self._json({"files": [file | modes for file in told]})
        if what == "commit":
            return self._commit(match["repository"], folder, body)
        inner = unquote(match["path"] or "").strip("/")
        if what == "tree":
            is_deep = parse_qs(url.query).get("recursive") in (["true"], ["True"], ["1"])
            place = folder / inner
            if not place.is_dir():
                return self._error(404, "EntryNotFound")
            found = sorted(place.rglob("*") if is_deep else place.iterdir())
            return self._json([_entry(path, folder) for path in found])
        if what == "paths-info":
            asked = parse_qs(body).get("paths") or json.loads(body)["paths"]
            there = [folder / name for name in asked if (folder / name).exists()]
            return self._json([_entry(path, folder) for path in there])
        if not (folder / inner).is_file():
            return self._error(404, "EntryNotFound")
        return self._file(folder / inner, wanted)

    def _create(self, asked: dict[str, Any]) -> None:
        if self.headers.get("authorization") != f"Bearer {TOKEN}":
            return self._error(401, "Unauthorized")
        folder = self.root / asked["organization"] / asked["name"]
        told = json.dumps({"url": self._url(f"{asked['organization']}/{asked['name']}")})
        if folder.exists():
            return self._send(409, told.encode(), {"content-type": "application/json"})
        (folder / "main").mkdir(parents=True)
        (folder / "main" / ".gitattributes").touch()
        with (self.root / "created.log").open("a") as log:
            log.write(json.dumps(asked) + "\n")
        return self._send(200, told.encode(), {"content-type": "application/json"})

    def _url(self, repository: str) -> str:
        return f"http://{self.headers['host']}/datasets/{repository}"

    def _commit(self, repository: str, folder: Path, body: str) -> None:
        for line in body.splitlines():
            operation = json.loads(line)
            value = operation["value"]
            if operation["key"] == "file":
                path = folder / value["path"]
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(base64.b64decode(value["content"]))
            elif operation["key"] == "deletedFile":
                (folder / value["path"]).unlink()
        commit = commit_of(folder)
        url = f"{self._url(repository)}/commit/{commit}"
        self._json({"success": True, "commitUrl": url, "commitOid": commit})

    def _file(self, path: Path, commit: str) -> None:
        content = path.read_bytes()
        headers = {"etag": f'"{blob_of(path)}"', "x-repo-commit": commit}
        status = 200
        if ranged := re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("range", "")):
            first, last = map(int, ranged.groups())
            headers["content-range"] = f"bytes {first}-{last}/{len(content)}"
            content, status = content[first : last + 1], 206
        self._send(status, content, headers)

    def _json(self, value: Any) -> None:
        self._send(200, json.dumps(value).encode(), {"content-type": "application/json"})

    def _error(self, status: int, code: str) -> None:
        self._send(status, b"{}", {"x-error-code": code, "content-type": "application/json"})

    def _send(self, status: int, content: bytes, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("content-length", str(len(content)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def log_message(self, *_arguments: object) -> None:
        pass


def _entry(path: Path, folder: Path) -> dict[str, Any]:
    name = path.relative_to(folder).as_posix()
    if path.is_dir():
        return {"type": "directory", "oid": "0" * COMMIT_CHARACTERS, "size": 0, "path": name}
    return {"type": "file", "oid": blob_of(path), "size": path.stat().st_size, "path": name}


@contextmanager
def hub_server(root: Path) -> Iterator[str]:
    """The URL of a hub that serves the datasets below `root`, until the block ends."""
    with subprocess.Popen(
        [sys.executable, __file__, str(root)], stdout=subprocess.PIPE, text=True
    ) as process:
        try:
            assert process.stdout is not None
            yield f"http://127.0.0.1:{int(process.stdout.readline())}"
        finally:
            process.terminate()


if __name__ == "__main__":
    _Handler.root = Path(sys.argv[1])
    server = ThreadingHTTPServer(("127.0.0.1", 0), _Handler)
    print(server.server_address[1], flush=True)
    server.serve_forever()
