"""Pages of the site that are made, not written: a hook of MkDocs (`mkdocs.yml`).

A page of each command, from click. The front page is README, and CHANGELOG, CONTRIBUTING, SECURITY
and the benchmarks' README are pages too: their links, which lead through the repository, are turned
into links of the site.
"""

import posixpath
import re
from pathlib import Path
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

from rsr.jobs.cli import COMMANDS, COMMANDS_BY_QUESTION

ROOT = Path(__file__).parents[2]

PAGES = {
    "index.md": "README.md",
    "changelog.md": "CHANGELOG.md",
    "contributing.md": "CONTRIBUTING.md",
    "security.md": "SECURITY.md",
    "benchmarks.md": "benchmarks/README.md",
}
"""Files outside of docs/ that are pages, by the name of the page."""

PAGE_OF = {source: page for page, source in PAGES.items()}
LINK = re.compile(r"(?P<text>!?\[[^\]]*\])\((?P<target>[^)\s:]*?)(?P<anchor>#[^)\s]*)?\)")

COMMAND_PAGE = """\
::: mkdocs-click
    :module: {module}
    :command: {attribute}
    :prog_name: rsr {name}
    :style: table
"""


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """Put a list of the commands, by the question that each answers, in the place of `Commands`."""
    assert config.nav is not None, "mkdocs.yml has a nav"
    by_question = [
        {question: [{f"rsr {name}": f"commands/{name}.md"} for name in names]}
        for question, names in COMMANDS_BY_QUESTION.items()
    ]
    commands = {"Commands": by_question}
    config.nav = [commands if entry == "Commands" else entry for entry in config.nav]
    return config


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages that are not in docs/."""
    for page, source in PAGES.items():
        text = (ROOT / source).read_text()
        files.append(File.generated(config, page, content=linked(text, source)))
    for name, place in COMMANDS.items():
        module, attribute = place.split(":")
        content = COMMAND_PAGE.format(name=name, module=module, attribute=attribute)
        files.append(File.generated(config, f"commands/{name}.md", content=content))
    return files


def on_page_markdown(markdown: str, page: Page, **_: Any) -> str:
    """Turn links out of docs/ into links of the site."""
    source = page.file.src_uri
    return markdown if source in PAGES else linked(markdown, f"docs/{source}")


def linked(text: str, source: str) -> str:
    """`text` of the file `source` of the repository, its links as links between pages.

    A file that is no page is named without a link; a link to nothing stays, for MkDocs to refuse.
    """

    def link(found: re.Match[str]) -> str:
        target, anchor = found["target"], found["anchor"] or ""
        if not target:
            return found.group()
        place = posixpath.normpath(posixpath.join(posixpath.dirname(source), target))
        if place in PAGE_OF or place.startswith("docs/"):
            page = PAGE_OF.get(place, place.removeprefix("docs/"))
            return f"{found['text']}({page}{anchor})"
        return found["text"].strip("[]") if (ROOT / place).exists() else found.group()

    return LINK.sub(link, text)
