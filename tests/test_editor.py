"""An editor finds its way: a language server resolves every `rsr.…` import in the tree."""

import ast
import json
import os
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import pytest

ROOT = Path(__file__).parents[1]
ROOMS = ("kernels", "engine", "jobs", "benchmarks")
ANSWER_TIMEOUT_S = 120


class LanguageServer:
    """basedpyright over standard input and output, with this repository as its workspace."""

    def __init__(self) -> None:
        command = shutil.which("basedpyright-langserver", path=Path(sys.executable).parent)
        if command is None:
            pytest.skip("needs basedpyright, which the extra dev installs")
        self._process = subprocess.Popen(
            ["timeout", str(ANSWER_TIMEOUT_S), command, "--stdio"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
        )
        self._last_id = 0
        folder = {"uri": ROOT.as_uri(), "name": ROOT.name}
        settings = {"processId": os.getpid(), "capabilities": {}, "workspaceFolders": [folder]}
        self.ask("initialize", settings)
        self.tell("initialized", {})

    def tell(self, method: str, parameters: dict[str, Any]) -> None:
        self._send({"method": method, "params": parameters})

    def ask(self, method: str, parameters: dict[str, Any]) -> Any:
        self._last_id += 1
        self._send({"id": self._last_id, "method": method, "params": parameters})
        while True:
            message = self._receive()
            if "method" in message and "id" in message:
                # A question of the server's own, such as whether it may register something.
                self._send({"id": message["id"], "result": None})
            elif message.get("id") == self._last_id:
                assert "error" not in message, message
                return message["result"]

    def close(self) -> None:
        self._process.kill()
        self._process.communicate()

    def _send(self, message: dict[str, Any]) -> None:
        content = json.dumps({"jsonrpc": "2.0", **message}).encode()
        assert self._process.stdin is not None
        self._process.stdin.write(b"Content-Length: %d\r\n\r\n%b" % (len(content), content))
        self._process.stdin.flush()

    def _receive(self) -> dict[str, Any]:
        output = self._process.stdout
        assert output is not None
        num_bytes = 0
        while (line := output.readline()) != b"\r\n":
            assert line, f"the language server ended, or was silent for {ANSWER_TIMEOUT_S} s"
            name, _, value = line.partition(b":")
            if name.lower() == b"content-length":
                num_bytes = int(value)
        message: dict[str, Any] = json.loads(output.read(num_bytes))
        return message


@pytest.fixture
def language_server() -> Iterator[LanguageServer]:
    server = LanguageServer()
    yield server
    server.close()


def imported_modules() -> dict[str, Path]:
    """The file of each module of the project that a file in the tree imports from."""
    modules = set()
    for room in (*ROOMS, "tests"):
        for path in (ROOT / room).rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_text())):
                if isinstance(node, ast.ImportFrom) and node.module:
                    modules.add(node.module)
                elif isinstance(node, ast.Import):
                    modules |= {alias.name for alias in node.names}
    files = {}
    for module in sorted(m for m in modules if m.startswith("rsr.")):
        path = ROOT.joinpath(*module.split(".")[1:])
        files[module] = path / "__init__.py" if path.is_dir() else path.with_suffix(".py")
    return files


@pytest.mark.slow
def test_each_import_leads_to_the_file_in_the_top_level_folder(language_server):
    files = imported_modules()
    assert len(files) > 50
    document = (ROOT / "tests" / "never_saved.py").as_uri()
    lines = [f"import {module}" for module in files]
    opened = {"uri": document, "languageId": "python", "version": 1, "text": "\n".join(lines)}
    language_server.tell("textDocument/didOpen", {"textDocument": opened})
    found = {}
    for number, (module, line) in enumerate(zip(files, lines, strict=True)):
        position = {"line": number, "character": len(line) - 1}
        where = {"textDocument": {"uri": document}, "position": position}
        places = language_server.ask("textDocument/definition", where) or []
        found[module] = [Path(unquote(urlsplit(place["uri"]).path)).resolve() for place in places]
    assert found == {module: [path] for module, path in files.items()}


def test_there_is_a_link_for_each_top_level_folder():
    mapping = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    packages = {
        f"rsr.{link.name}": str(link.resolve().relative_to(ROOT))
        for link in (ROOT / ".editor" / "rsr").iterdir()
    }
    assert packages == mapping["package-dir"]
