"""Chat templates: conversation -> text in which the template's own characters and the row's stay distinguishable.

A template is Jinja in the dialect of Hugging Face's `apply_chat_template`; its `{% generation %}` blocks say what the
model has to write. Control tokens that a row contains are replaced by placeholders before rendering, so that what the
template writes can't be imitated: afterwards every control token in the text is the template's own.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

from nemotron_recipes.data.messages import BadRow
from nemotron_recipes.errors import Problem, UserError
from nemotron_recipes.spec import sha256_text

NO_TEMPLATE = ""  # the source where nothing is rendered: pretraining
BUILTIN = {"nemotron3": Path(__file__).parent / "templates" / "nemotron3.jinja"}

# Noncharacters: valid in strings, never assigned. A row that contains them has them replaced like control tokens.
_QUOTE, _OPEN, _CLOSE = "\ufdd0", "\ufdd1", "\ufdd2"
_RESERVED = (_QUOTE, _OPEN, _CLOSE)
_PRIVATE = 0xF0000  # placeholder n is QUOTE, chr(PRIVATE + n), QUOTE


class Rendered(NamedTuple):
    """`text` is what the row says in this template. Spans are half-open character ranges of it."""

    text: str
    generated: tuple[tuple[int, int], ...]  # one per generation block
    frame: tuple[tuple[int, int], ...] | None  # the template's own control tokens; None: nobody looked
    quoted: bool  # the row's content contains control tokens, which are to stay text
    controls: int  # how many control tokens the template wrote


@dataclass(frozen=True)
class ChatTemplate:
    """A template and the control tokens to guard: `control` are the strings that the tokenizer gives a meaning."""

    source: str
    control: tuple[str, ...]

    @property
    def digest(self) -> str:
        return sha256_text(self.source)

    @property
    def renders_reasoning(self) -> bool:
        return "reasoning_content" in self.source

    def render(self, messages: list[dict[str, Any]], tools: list[dict[str, Any]], **kwargs: Any) -> Rendered:
        """BadRow: the template refuses the conversation, or takes its text apart."""
        import jinja2

        try:
            text = self._compiled.render(messages=self._quote(messages), tools=self._quote(tools) or None, **kwargs)
        except (jinja2.TemplateError, TypeError, AttributeError, KeyError, ValueError) as error:
            raise BadRow("template_refused", f"{type(error).__name__}: {error}") from None
        return self._scan(text)

    def _quote(self, value: Any) -> Any:
        """The same tree with placeholders for what must not act."""
        if isinstance(value, str):
            return self._guarded.sub(lambda m: f"{_QUOTE}{chr(_PRIVATE + self._index[m.group()])}{_QUOTE}", value)
        if isinstance(value, dict):
            return {self._quote(key): self._quote(item) for key, item in value.items()}
        if isinstance(value, list):
            return [self._quote(item) for item in value]
        return value

    def _scan(self, raw: str) -> Rendered:
        """Undo the placeholders and note where generation blocks and the template's control tokens stand."""
        pieces: list[str] = []
        length = done = 0
        started: int | None = None
        generated: list[tuple[int, int]] = []
        frame: list[tuple[int, int]] = []
        quoted = False
        for match in self._events.finditer(raw):
            found = match.group()
            plain = raw[done : match.start()]
            pieces.append(plain)
            length += len(plain)
            done = match.end()
            if found == _OPEN:
                started = length
            elif found == _CLOSE and started is not None:
                generated.append((started, length))
                started = None
            elif found[0] == _QUOTE and len(found) == 3:
                quoted = True
                text = self._words[ord(found[1]) - _PRIVATE]
                pieces.append(text)
                length += len(text)
            elif found[0] in _RESERVED:
                raise BadRow("template_refused", "the template takes control tokens of the content apart")
            else:
                pieces.append(found)
                frame.append((length, length + len(found)))
                length += len(found)
        pieces.append(raw[done:])
        return Rendered("".join(pieces), tuple(generated), tuple(frame), quoted, len(frame))

    @cached_property
    def _words(self) -> tuple[str, ...]:
        return (*_RESERVED, *self.control)

    @cached_property
    def _index(self) -> dict[str, int]:
        return {word: index for index, word in enumerate(self._words)}

    @cached_property
    def _guarded(self) -> re.Pattern[str]:
        return _any_of(self._words)

    @cached_property
    def _events(self) -> re.Pattern[str]:
        return re.compile(f"{_QUOTE}[^{_QUOTE}]{_QUOTE}|{_any_of(self._words).pattern}")

    @cached_property
    def _compiled(self) -> Any:
        return _compile(self.source)


def template_source(reference: str) -> str:
    """The text of a built-in template, or of a .jinja file. UserError: there is none."""
    if reference in BUILTIN:
        return BUILTIN[reference].read_text(encoding="utf-8")
    path = Path(reference)
    try:
        source = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        fix = f"built in: {', '.join(BUILTIN)}; or the path of a .jinja file"
        raise UserError(Problem(f"data.chat_template: {path} can't be read: {error}", fix=fix)) from None
    if "generation" not in source:
        fix = "put {% generation %}...{% endgeneration %} around what the assistant says"
        raise UserError(Problem(f"data.chat_template: {path} has no generation block, so no loss mask", fix=fix))
    _compile(source, str(path))
    return source


def text_constants(source: str) -> Iterator[str]:
    """The strings that a template can write by itself."""
    import jinja2

    tree = _environment().parse(source)
    for node in tree.find_all((jinja2.nodes.TemplateData, jinja2.nodes.Const)):
        text = node.data if isinstance(node, jinja2.nodes.TemplateData) else node.value
        if isinstance(text, str):
            yield text


def _any_of(words: Iterable[str]) -> re.Pattern[str]:
    """Longest first, as tokenizers match added tokens."""
    return re.compile("|".join(map(re.escape, sorted(words, key=lambda w: (-len(w), w)))))


def _compile(source: str, where: str = "") -> Any:
    import jinja2

    try:
        return _environment().from_string(source)
    except jinja2.TemplateSyntaxError as error:
        what = f"data.chat_template: {error.message}"
        raise UserError(Problem(what, f"{where} line {error.lineno}".strip())) from None


def _environment() -> Any:
    """Hugging Face's dialect, sandboxed. No clock: the same rows must give the same text on every day."""
    import jinja2
    from jinja2.ext import Extension
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class Generation(Extension):
        tags = {"generation"}  # noqa: RUF012  jinja2 declares it like this

        def parse(self, parser: Any) -> Any:
            line = next(parser.stream).lineno
            body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            return jinja2.nodes.CallBlock(self.call_method("_mark"), [], [], body).set_lineno(line)

        def _mark(self, caller: Any) -> str:
            return f"{_OPEN}{caller()}{_CLOSE}"

    def refuse(message: str) -> None:
        raise jinja2.TemplateError(message)

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, "jinja2.ext.loopcontrols"]
    )
    # Jinja's own tojson escapes for HTML; chat templates expect plain JSON.
    environment.filters["tojson"] = _tojson
    environment.globals["raise_exception"] = refuse
    return environment


def _tojson(value: Any, ensure_ascii: bool = False, indent: int | None = None, **options: Any) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, **options)
