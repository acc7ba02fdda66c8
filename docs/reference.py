"""Write the parts of the documentation that the code says already: the keys of the cluster file, and the commands.

This is a hook of mkdocs. A page holds the line ``<!-- configuration -->`` or ``<!-- commands -->`` where they belong.
"""

from __future__ import annotations

import ast
import inspect
import types
from collections.abc import Iterator
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

import msgspec
import typer.main
from msgspec import Meta, Struct
from typer.testing import CliRunner

from lamina import cli
from lamina.config import schema
from lamina.config.texts import Text, text_fields

TABLES: tuple[type[Struct], ...] = (
    schema.ModelConfig,
    schema.PipelineConfig,
    schema.ComputeNodeConfig,
    schema.MemoryNodeConfig,
    schema.TransportConfig,
    schema.RdmaConfig,
    schema.RecoveryConfig,
    schema.LogConfig,
)


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Replace the marks of a page; mkdocs calls this for each page."""
    if "<!-- configuration -->" in markdown:
        markdown = markdown.replace("<!-- configuration -->", "\n\n".join(map(_table, TABLES)))
    if "<!-- commands -->" in markdown:
        markdown = markdown.replace("<!-- commands -->", "\n\n".join(_commands()))
    return markdown


# -- the cluster file


def _table(kind: type[Struct]) -> str:
    """A heading, the sentence that describes the table, and a row for each key."""
    name = {"ComputeNodeConfig": "[[node]], compute", "MemoryNodeConfig": "[[node]], memory"}.get(kind.__name__)
    if name is None:
        name = (inspect.getdoc(kind) or "").split("``")[1]
    sentence = _prose(inspect.getdoc(kind) or "").removeprefix(f"`{name}`: ")
    sentence = sentence[0].upper() + sentence[1:]
    lines = [f"## {name}", "", sentence, "", "| key | value | default | meaning |"]
    lines.append("|---|---|---|---|")
    texts = dict(field_texts(kind))
    for field in msgspec.structs.fields(kind):
        lines.append(
            f"| `{field.name}` | {_values(kind, field.name)} | {_default(kind, field)} | {texts[field.name]} |"
        )
    return "\n".join(lines)


def field_texts(kind: type[Struct]) -> Iterator[tuple[str, str]]:
    """Each field with the docstring behind it, those of base classes first."""
    for base in reversed(kind.__mro__):
        if not (isinstance(base, type) and issubclass(base, Struct) and base is not Struct):
            continue
        (tree,) = ast.parse(inspect.getsource(base)).body
        assert isinstance(tree, ast.ClassDef)
        for statement, after in zip(tree.body, [*tree.body[1:], None], strict=True):
            if isinstance(statement, ast.AnnAssign) and isinstance(statement.target, ast.Name):
                text = ""
                if isinstance(after, ast.Expr) and isinstance(after.value, ast.Constant):
                    text = _prose(str(after.value.value)).replace("None: ", "Without it: ")
                yield statement.target.id, text


def _default(kind: type[Struct], field: msgspec.structs.FieldInfo) -> str:
    if field.required:
        return "required"
    if isinstance(field.default, Struct) or field.default is None:
        return ""
    if (text := text_fields(kind).get(field.name)) is not None:
        return f'`"{text.format(field.default)}"`'
    return f"`{msgspec.json.encode(field.default).decode()}`"


def _values(kind: type[Struct], name: str) -> str:
    return _allowed(get_type_hints(kind, include_extras=True)[name])


def _allowed(hint: Any) -> str:
    """What a value of this type may be, in words."""
    if get_origin(hint) in (Union, types.UnionType):
        return " or ".join(_allowed(part) for part in get_args(hint) if part is not type(None))
    if get_origin(hint) is Literal:
        return ", ".join(f'`"{value}"`' for value in get_args(hint))
    if get_origin(hint) is Annotated:
        kind, *marks = get_args(hint)
        for mark in marks:
            if isinstance(mark, Text):
                return mark.expected
        return _allowed(kind) + "".join(_bounds(mark) for mark in marks if isinstance(mark, Meta))
    if isinstance(hint, type) and issubclass(hint, Struct):
        return "table"
    return {bool: "`true`, `false`", int: "integer", float: "number", str: "text"}[hint]


def _bounds(mark: Meta) -> str:
    low = mark.ge if mark.ge is not None else mark.gt
    if low is not None and mark.le is not None:
        return f", {'above ' if mark.gt is not None else ''}{low:g} to {mark.le:g}"
    if low is not None:
        return f", at least {low:g}"
    return f" that matches `{mark.pattern}`" if mark.pattern else ""


def _prose(text: str) -> str:
    return " ".join(text.split()).replace("``", "`").replace("|", "\\|")


# -- the commands


def _commands() -> Iterator[str]:
    """A heading and the help of each command, as the terminal shows it."""
    group = typer.main.get_command(cli.app)
    for name, command in sorted(group.commands.items()):  # type: ignore[attr-defined]
        yield _help("##", name)
        for inner in sorted(getattr(command, "commands", {})):
            yield _help("###", name, inner)


def _help(heading: str, *names: str) -> str:
    shown = CliRunner().invoke(cli.app, [*names, "--help"], prog_name="lamina", env={"COLUMNS": "100", "TERM": "dumb"})
    return "\n".join([f"{heading} lamina {' '.join(names)}", "", "```text", shown.output.strip(), "```"])
