"""The note in a checkpoint about the Jacobian choice under which its weights were trained."""

from __future__ import annotations

import json
import warnings
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch

from nslightning.jacobians import Jacobians
from nslightning.surgery import PatchReport, PatchWarning, Plan, Rule

__all__ = ["CheckpointNote", "plan_of"]

_KEY = "nslightning"


def plan_of(jacobians: Jacobians, sites: Sequence[Rule | dict[str, Any]] | None) -> Plan:
    """Join the choice for all sites and the rules for some of them.

    Args:
        jacobians: The choice for all sites.
        sites: Rules for some sites; later ones win.

    Returns:
        The plan.

    Raises:
        ValueError: If a rule in ``sites`` is for all sites.

    Example:
        >>> plan_of(Jacobians(relu=1.0), [{"stage": "layer1", "relu": 0.5}])
        Plan([Rule(Jacobians(relu=1.0)), Rule({'relu': 0.5}, stage='layer1')])
    """
    plan = Plan([jacobians, *(sites or ())])
    for rule in plan.rules[1:]:
        if rule.unconditional:
            raise ValueError(f"{rule!r} in sites is for all sites: put it into jacobians, or say for which it is")
    return plan


class CheckpointNote:
    """Writes the choice into checkpoints, and compares it with the one that a loaded checkpoint names.

    Args:
        plan: The choice of this run: the first rule for all sites, the others for some.
        on_mismatch: Whether another choice in a checkpoint is a warning or an error.

    Raises:
        ValueError: If ``on_mismatch`` is neither ``"warn"`` nor ``"refuse"``.
    """

    def __init__(self, plan: Plan, on_mismatch: Literal["warn", "refuse"] = "warn") -> None:
        if on_mismatch not in ("warn", "refuse"):
            raise ValueError(f"on_mismatch is 'warn' or 'refuse'; given {on_mismatch!r}")
        self.plan, self.on_mismatch = plan, on_mismatch

    def write(self, checkpoint: dict[str, Any], report: PatchReport, optimizer: str | None) -> None:
        """Note the choice in a checkpoint.

        Args:
            checkpoint: The checkpoint's content; it gets the key ``nslightning``.
            report: The report of the patch that the weights were trained under.
            optimizer: Class name of the optimizer that trains the weights.
        """
        checkpoint[_KEY] = {
            "jacobians": self.plan.base.to_dict(),
            "sites": self.plan.to_list()[1:],
            "fingerprint": report.fingerprint,
            "optimizer": optimizer,
            "torch": str(torch.__version__),  # a subclass of str, which `weights_only` refuses
        }

    def check(self, checkpoint: Mapping[str, Any], report: PatchReport) -> None:
        """Compare a checkpoint's choice with this run's.

        Args:
            checkpoint: The checkpoint's content.
            report: The report of this run's patch.

        Warns:
            PatchWarning: If the choice or the patched sites differ, or the checkpoint names none.

        Raises:
            ValueError: In the same cases, where ``on_mismatch`` is ``"refuse"``.
        """
        difference = self._difference(checkpoint.get(_KEY), report)
        if difference and self.on_mismatch == "refuse":
            raise ValueError(f"{difference}; give the choice that it was made under, or on_mismatch='warn'")
        if difference:
            warnings.warn(difference, PatchWarning, stacklevel=3)

    def _difference(self, made: Mapping[str, Any] | None, report: PatchReport) -> str:
        if made is None:
            return "the checkpoint does not say under which Jacobian choice it was made"
        then, now = made["jacobians"], self.plan.base.to_dict()
        changed = [k for k in now if _plain(then.get(k)) != _plain(now[k])]
        if changed:
            before, here = (", ".join(f"{k}={choice.get(k)!r}" for k in changed) for choice in (then, now))
            return f"the checkpoint was made under {before}, and this run has {here}"
        rules_then, rules_now = map(json.dumps, (made.get("sites", []), self.plan.to_list()[1:]))
        if rules_then != rules_now:
            return f"the checkpoint was made under sites={rules_then}, and this run has sites={rules_now}"
        if made["fingerprint"] != report.fingerprint:
            return f"the checkpoint was made with other patched sites ({made['fingerprint']}, now {report.fingerprint})"
        return ""

    @staticmethod
    def optimizer(checkpoint: Mapping[str, Any]) -> str | None:
        """The class name of the optimizer that a checkpoint's weights were trained with.

        Args:
            checkpoint: The checkpoint's content.

        Returns:
            The name; None where the checkpoint names none.
        """
        name: str | None = checkpoint.get(_KEY, {}).get("optimizer")
        return name


def _plain(value: Any) -> Any:
    """A choice as configs and checkpoints may hold it: with lists for tuples."""
    return tuple(value) if isinstance(value, list) else value
