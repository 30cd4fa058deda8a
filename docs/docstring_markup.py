"""The docstrings' markup as Markdown, for mkdocstrings: roles, simple tables and literal blocks."""

import dataclasses
import inspect
import re
from typing import Any

import griffe

_ROLE = re.compile(r":(?:class|func|meth|mod|attr|data):`(~?)([\w.]+)`")
_RULE = re.compile(r"^\s*=+(?:\s+=+)+\s*$")


class DocstringMarkup(griffe.Extension):
    """Rewrites each docstring before it is parsed."""

    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        """Rewrite one docstring."""
        if obj.docstring is not None:
            obj.docstring.value = markdown(obj.docstring.value)

    def on_package(self, *, pkg: griffe.Module, **_: Any) -> None:
        """Give ``Jacobians`` its fields, which are made of the records when the module is imported."""
        from nslightning import Jacobians

        choice = pkg["jacobians.Jacobians"]
        choice.docstring = griffe.Docstring(markdown(inspect.getdoc(Jacobians) or ""), parent=choice)
        choice.bases = []
        keyword = griffe.ParameterKind.keyword_only
        choice["__init__"].parameters = griffe.Parameters(
            griffe.Parameter("self", kind=griffe.ParameterKind.positional_or_keyword),
            *(griffe.Parameter(f.name, kind=keyword, default=repr(f.default)) for f in dataclasses.fields(Jacobians)),
        )


def markdown(text: str) -> str:
    """Turn a docstring's reStructuredText into Markdown.

    Args:
        text: The docstring.

    Returns:
        The same with links in the place of roles, pipes in the place of simple tables, and no ``::``.

    Example:
        >>> markdown("See :class:`~nslightning.Jacobians`::")
        'See <autoref optional identifier="nslightning.Jacobians">`Jacobians`</autoref>:'
    """
    # Of the two words, griffe reads one as code.
    examples = re.sub(r"^(\s*)Example:$", r"\1Examples:", text, flags=re.MULTILINE)
    return re.sub(r"::$", ":", _tables(_ROLE.sub(_link, examples)), flags=re.MULTILINE)


def _link(role: re.Match[str]) -> str:
    short, name = role.groups()
    shown = name.rpartition(".")[2] if short else name
    return f'<autoref optional identifier="{name}">`{shown}`</autoref>'


def _tables(text: str) -> str:
    """Simple tables of two columns, whose rows may go on in further lines."""
    out: list[str] = []
    rows: list[list[str]] | None = None
    split, indent = 0, ""
    for line in text.splitlines():
        if _RULE.match(line):
            if rows is None:
                indent = line[: len(line) - len(line.lstrip())]
                split, rows = line.index(" =", len(indent)) + 1, []
            else:
                out += [f"{indent}| key | meaning |", f"{indent}|---|---|"]
                out += [f"{indent}| {key} | {meaning} |" for key, meaning in rows]
                rows = None
        elif rows is None:
            out.append(line)
        elif line[:split].strip():
            key, meaning = re.match(r"\s*(``.*?``|\S+)\s+(.*)", line).groups()  # type: ignore[union-attr] # each row has a key and a meaning
            rows.append([key, meaning.strip()])
        elif rows:
            rows[-1][1] += f" {line[split:].strip()}"
    return "\n".join(out)
