"""The Jinja file a chat template is read from: whether it can be read and is Jinja at all.

Imports nothing that takes time: a mistake in the file is refused before anything else is done.
"""

from pathlib import Path

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser

OWN, NONE = "auto", "none"
"""The values of `ScorerConfig.chat_template` that name no file."""


class _Generation(Extension):
    """The block `{% generation %}`, by which templates mark what a model is to write."""

    tags = {"generation"}  # noqa: RUF012 (jinja2 declares it as an attribute of instances)

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def require_template_file(chat_template: str) -> None:
    """Raises `ValueError` if `chat_template` names a file that is not there or is no Jinja."""
    if chat_template in (OWN, NONE):
        return
    path = Path(chat_template)
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or error
        raise ValueError(
            f"chat template {chat_template} cannot be read: {reason}; expected a Jinja file, "
            f"{OWN} or {NONE}"
        ) from error
    environment = jinja2.Environment(extensions=[_Generation, loopcontrols], autoescape=False)
    try:
        environment.compile(text)
    except jinja2.TemplateSyntaxError as error:
        raise ValueError(
            f"chat template {chat_template} is not Jinja: line {error.lineno}: {error.message}"
        ) from error
