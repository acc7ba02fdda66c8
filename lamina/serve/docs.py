"""GET /openapi.json and /docs: the interface, described by the types that requests are read into."""

from __future__ import annotations

import ast
import html
import inspect
import textwrap
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

import msgspec
from msgspec import Struct

import lamina
from lamina.serve.exchange import Exchange
from lamina.serve.service import Service

if TYPE_CHECKING:
    from lamina.serve.app import Entry

_REF = "#/components/schemas/{name}"

_STYLE = (
    "body{font:16px/1.5 system-ui,sans-serif;max-width:60rem;margin:2rem auto;padding:0 1rem;color:#222;"
    "background:#fff}code{background:#f3f3f3;padding:.1em .3em}h2{margin-top:2rem;border-top:1px solid #ddd;"
    "padding-top:1rem}table{border-collapse:collapse;width:100%}td,th{text-align:left;vertical-align:top;"
    "padding:.3rem .6rem .3rem 0;border-bottom:1px solid #eee}"
)


class Documentation:
    """Describes a table of endpoints, once."""

    def __init__(self, entries: Iterable[Entry]) -> None:
        self._document = _openapi(entries)
        self._json = msgspec.json.encode(self._document)
        self._page = _page(self._document).encode()

    async def openapi(self, service: Service, exchange: Exchange) -> None:
        """Describe this interface as OpenAPI."""
        await exchange.reply(self._json)

    async def page(self, service: Service, exchange: Exchange) -> None:
        """Describe this interface for people."""
        await exchange.reply(self._page, kind=b"text/html; charset=utf-8")


def _openapi(entries: Iterable[Entry]) -> dict[str, Any]:
    entries = list(entries)
    bodies = {entry.path: _merged(entry.bodies) for entry in entries if entry.bodies}
    structs = {body for entry in entries for body in entry.bodies}
    _, components = msgspec.json.schema_components(sorted(structs, key=lambda s: s.__name__), ref_template=_REF)
    paths: dict[str, Any] = {}
    for entry in entries:
        about: dict[str, Any] = {
            "summary": (inspect.getdoc(entry.handler) or "").splitlines()[0],
            "responses": {
                "200": {"description": "The answer."},
                "default": {
                    "description": "An error.",
                    "content": {"application/json": {"schema": {"$ref": _REF.format(name="Error")}}},
                },
            },
        }
        if entry.bodies:
            about["requestBody"] = {"required": True, "content": {"application/json": {"schema": bodies[entry.path]}}}
        path = entry.path.replace(":path}", "}")
        if "{" in path:
            name = path[path.index("{") + 1 : path.index("}")]
            about["parameters"] = [{"name": name, "in": "path", "required": True, "schema": {"type": "string"}}]
        paths.setdefault(path, {})[entry.method.lower()] = about
    error = {name: {"type": kind} for name, kind in (("message", "string"), ("type", "string"), ("code", "integer"))}
    error["param"] = {"type": ["string", "null"]}  # type: ignore[dict-item]
    components["Error"] = {"type": "object", "properties": {"error": {"type": "object", "properties": error}}}
    return {
        "openapi": "3.1.0",
        "info": {"title": "Lamina", "version": lamina.__version__},
        "paths": paths,
        "components": {
            "schemas": components,
            "securitySchemes": {"key": {"type": "http", "scheme": "bearer"}},
        },
        "security": [{"key": []}, {}],
    }


def _merged(bodies: Iterable[type[Struct]]) -> dict[str, Any]:
    """Return the schema of a body that is read into several structs, with what is said of each field."""
    properties: dict[str, Any] = {}
    required: list[str] = []
    for body in bodies:
        (schema,), components = msgspec.json.schema_components([body], ref_template=_REF)
        whole = components[schema["$ref"].rpartition("/")[2]]
        described = _descriptions(body)
        for name, field in whole["properties"].items():
            properties[name] = field | ({"description": described[name]} if name in described else {})
        required += whole.get("required", [])
    return {"type": "object", "properties": properties, "required": required, "additionalProperties": False}


def _descriptions(struct: type[Struct]) -> dict[str, str]:
    """Return the docstrings of the fields of a struct and its bases."""
    found: dict[str, str] = {}
    for kind in reversed([base for base in struct.__mro__ if issubclass(base, Struct) and base is not Struct]):
        (tree,) = ast.parse(textwrap.dedent(inspect.getsource(kind))).body
        assert isinstance(tree, ast.ClassDef)
        for field, text in zip(tree.body, tree.body[1:], strict=False):
            if (
                isinstance(field, ast.AnnAssign)
                and isinstance(field.target, ast.Name)
                and isinstance(text, ast.Expr)
                and isinstance(text.value, ast.Constant)
            ):
                found[field.target.id] = " ".join(str(text.value.value).split())
    return found


def _page(document: Mapping[str, Any]) -> str:
    """Return the page for people, which needs nothing from elsewhere."""
    parts = [
        '<!doctype html><html lang="en"><meta charset="utf-8"><title>Lamina</title>',
        f"<style>{_STYLE}</style><h1>Lamina {html.escape(document['info']['version'])}</h1>",
        '<p>The interface of this server. As OpenAPI: <a href="openapi.json"><code>/openapi.json</code></a>.</p>',
    ]
    for path, methods in document["paths"].items():
        for method, about in methods.items():
            parts.append(f"<h2><code>{method.upper()} {html.escape(path)}</code></h2><p>{_text(about['summary'])}</p>")
            body = about.get("requestBody")
            if body is not None:
                schema = body["content"]["application/json"]["schema"]
                parts.append("<table><tr><th>parameter<th>type<th>meaning")
                for name, field in schema["properties"].items():
                    needed = " (required)" if name in schema["required"] else ""
                    kind = html.escape(_kind(field))
                    parts.append(f"<tr><td><code>{name}</code>{needed}<td>{kind}<td>{_text(field)}")
                parts.append("</table>")
    return "\n".join(parts) + "\n"


def _text(about: Any) -> str:
    """Return a description with its code marked; for a field, also with its default."""
    if isinstance(about, str):
        return html.escape(about)
    text = html.escape(about.get("description", ""))
    default = about.get("default")
    if default not in (None, [], {}, ""):
        text += f" Default: <code>{html.escape(msgspec.json.encode(default).decode())}</code>."
    return text.strip()


def _kind(field: Mapping[str, Any]) -> str:
    """Return the type of a field in a few words."""
    if "$ref" in field:
        return str(field["$ref"]).rpartition("/")[2]
    if "anyOf" in field:
        return " or ".join(dict.fromkeys(_kind(option) for option in field["anyOf"] if option.get("type") != "null"))
    if "enum" in field:
        return " or ".join(map(repr, field["enum"]))
    kind = str(field.get("type", "any"))
    if kind == "array" and isinstance(field.get("items"), dict):
        return f"list of {_kind(field['items'])}"
    bounds = [f"{sign} {field[key]:g}" for key, sign in _BOUNDS.items() if key in field and abs(field[key]) < 1 << 31]
    return f"{kind} {', '.join(bounds)}".strip()


_BOUNDS = {"minimum": "≥", "exclusiveMinimum": ">", "maximum": "≤", "exclusiveMaximum": "<"}
