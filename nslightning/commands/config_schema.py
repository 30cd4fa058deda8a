"""The JSON schema of configs, as jsonargparse makes it of the training commands' parsers."""

from __future__ import annotations

from typing import Any, get_args

from jsonargparse._completions_jsonschema import ParserJsonschema  # what its --print_completion=jsonschema runs
from lightning.pytorch import Callback, LightningDataModule, LightningModule
from lightning.pytorch.loggers import Logger
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from nslightning.commands.training_cli import TASKS, training_parser
from nslightning.commands.twins import TwinsCLI

__all__ = ["config_schema"]

#: Whose arguments an editor completes; of other classes a config names the path and whatever they take.
_DESCRIBED = (Callback, LightningDataModule, LightningModule, Logger, LRScheduler, Optimizer)
#: Fits nothing.
_NOTHING: dict[str, Any] = {"not": {}}
# The arguments of an optimizer or a schedule that the training passes by itself.
_HANDED = ("params", "optimizer")

#: Arguments of a class that an included file names.
_PARTIAL: dict[str, Any] = {
    "additionalProperties": False,
    "properties": {"init_args": {"type": "object"}},
    "required": ["init_args"],
    "type": "object",
}
_INCLUDE = {
    "description": "Config files that this one stands on top of: mappings are merged, and name+ adds to the list name.",
    "items": {"pattern": r"\.ya?ml$", "type": "string"},
    "type": "array",
}

#: Options that Lightning describes.
_LIGHTNING_S = ("trainer", "ckpt_path", "weights_only")


class _Schema(ParserJsonschema):
    """jsonargparse's schema, with bare names and classes of the caller's own, and without what it stumbles over."""

    def __init__(self) -> None:
        super().__init__()
        self.others = set[str]()  # names of the definitions of other packages' classes

    def class_ref(self, class_type: Any, action: Any, subclass: bool) -> dict[str, Any]:
        """A reference to a class that is defined once, with a note of its owner."""
        made: dict[str, Any] = super().class_ref(class_type, action, subclass)
        if not str(getattr(class_type, "__module__", "")).startswith("nslightning."):
            self.others.add(self.def_name(class_type))
        return made

    def callable_schema(self, typehint: Any, action: Any) -> dict[str, Any]:
        """An optimizer or a schedule, which a config describes as a class."""
        returned = get_args(typehint)[-1] if get_args(typehint) else None
        classes = [c for c in (get_args(returned) or (returned,)) if isinstance(c, type)]
        described = [self.class_ref(c, action, subclass=True) for c in classes if issubclass(c, _DESCRIBED)]
        return {"anyOf": [{"type": "string"}, *described]}

    def subclass_def(self, class_type: Any, action: Any) -> dict[str, Any]:
        """Schema of a class by its path or bare name; classes from outside the package are allowed as well."""
        if not (isinstance(class_type, type) and issubclass(class_type, _DESCRIBED)):
            return {"anyOf": [{"type": "string"}, self.unknown_class_path_schema()]}
        made: dict[str, Any] = super().subclass_def(class_type, action)
        made["anyOf"] = forms = [form for form in made.get("anyOf", [made]) if form != _NOTHING]
        known = [name for form in forms for name in form.get("properties", {}).get("class_path", {}).get("enum", ())]
        if known:
            other = self.unknown_class_path_schema()
            other["properties"]["class_path"] = {"type": "string", "not": {"enum": sorted(known)}}
            forms.append(other)
        forms.append(_PARTIAL)
        return made

    def class_path_schema(self, class_path: str, action: Any) -> dict[str, Any]:
        """A class, which its bare name names as well."""
        # jsonargparse 4.53 imports each subclass by its path, and ends in an AttributeError where a module does not
        # hold one: tests/commands/test_schemas.py has the few lines that show it, to be reported upstream.
        try:
            made: dict[str, Any] = super().class_path_schema(class_path, action)
        except (AttributeError, ImportError):  # made while a program runs, as Lightning makes optimizers
            return _NOTHING
        made["properties"]["class_path"] = {"enum": [class_path, class_path.rpartition(".")[2]]}
        arguments = made["properties"]["init_args"]
        for name in _HANDED:
            arguments.get("properties", {}).pop(name, None)
        if "required" in arguments:
            arguments["required"] = [name for name in arguments["required"] if name not in _HANDED]
        if not arguments.get("required"):
            made["required"] = ["class_path"]
        return made


def _bare(node: Any) -> Any:
    """A schema without words and defaults: those of other packages are theirs, and may depend on the machine."""
    if isinstance(node, list):
        return [_bare(item) for item in node]
    if not isinstance(node, dict):
        return node
    return {
        key: {name: _bare(of) for name, of in value.items()} if key == "properties" else _bare(value)
        for key, value in node.items()
        if key not in ("description", "default")
    }


def _own_words(definition: dict[str, Any]) -> dict[str, Any]:
    """The definition of another package's class, in which only this package's subclasses keep their words."""

    def ours(form: dict[str, Any]) -> bool:
        names = form.get("properties", {}).get("class_path", {}).get("enum", ())
        return any(name.startswith("nslightning.") for name in names)

    kept = {"anyOf": [form if ours(form) else _bare(form) for form in definition.get("anyOf", ())]}
    return {**_bare(definition), **(kept if "anyOf" in definition else {})}


def config_schema() -> dict[str, Any]:
    """Make the schema.

    Returns:
        The schema as plain data: a config of one of the tasks or of twins, none of whose options needs to be there,
        since several files add up.
    """
    forms, definitions = [], dict[str, Any]()
    parsers = {task: training_parser(task) for task in TASKS} | {"twins": training_parser("images", TwinsCLI)}
    for task, parser in parsers.items():
        generator = _Schema()
        made: dict[str, Any] = generator.generate(parser)
        for name, definition in made.pop("$defs", {}).items():
            definitions[name] = _own_words(definition) if name in generator.others else definition
        made.pop("required", None)
        made.pop("$schema", None)
        options = made["properties"]
        for name in _LIGHTNING_S:
            options[name] = _bare(options[name])
        options["task"] = {"enum": ["images" if task == "twins" else task]}
        options["include"] = _INCLUDE
        trainer = options["trainer"]["properties"]
        trainer["callbacks+"] = trainer["callbacks"]
        options["model"].pop("required", None)
        if task == "text":
            made["required"] = ["task"]
        elif task == "own":
            made["required"] = ["model"]
        fields = options["model"].get("properties", {})
        if "jacobians" in fields:  # a preset, or relu=1,max_pool=minimal
            fields["jacobians"] = {"anyOf": [{"type": "string"}, fields["jacobians"]]}
        forms.append(made)
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", "anyOf": forms, "$defs": definitions}
