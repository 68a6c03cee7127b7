"""Settings that have moved: what they were called, and what they are called now.

One table, read in the three places where an older name may stand: the command line, a user's YAML files, and the
``config.json`` of a run. Each is rewritten before it meets the schema, with a warning that says the new name, so that
the schema, ``--help`` and everything behind them know the new names alone. It knows names, and nothing of what a
setting does.
"""

from __future__ import annotations

import functools
import json
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import ChoiceSweep, Override, QuotedString
from hydra.errors import HydraException
from omegaconf import OmegaConf

from atp.config.schema import config_dir
from atp.errors import UserError

log = logging.getLogger(__name__)

MOVED = {  # dotted name before -> now; what lies below a name moves with it
    "prune.restore": "prune.repair",
    "optim.distill": "prune.distill.logits",
    "prune.prompt.train": "prompt.train",
    "prune.prompt.inference": "prompt.inference",
    "prune.prompt.text": "prompt.system",
}
LISTS = ("prune.warm_start.criterion",)
"""Settings that were a text with alternatives between bars, and are a list."""

_PROMPT = "prune.prompt."
_METHODS_PROMPT = "collaborative"  # what ``prune.prompt`` switched on where the ``prompt`` group was left at none
_SWITCHES = ("prompt.train", "prompt.inference")
_PARAMETERS = ("hydra", "sweeper", "params")  # a mapping whose keys are dotted names

Flat = dict[tuple[str, ...], Any]


def new_name(name: str) -> str | None:
    """What a dotted name is called now; None for one that did not move."""
    for old, new in MOVED.items():
        if name == old or name.startswith(f"{old}."):
            return new + name.removeprefix(old)
    return None


def with_new_overrides(overrides: Sequence[str], prompt_of: Callable[[list[str]], str]) -> list[str]:
    """Overrides of the command line under the names of now.

    Args:
        overrides: As Hydra takes them; anything else on its command line passes.
        prompt_of: The name of the ``prompt`` that overrides without older names come to.

    Raises:
        UserError: A setting is given under both of its names.
    """
    leaves = [leaf for override in overrides for leaf in _leaves(override)]
    given = [_parts(leaf)[1] for leaf in leaves]
    found, prompt = list[str](), list[str]()
    for leaf in leaves:
        sign, name, value = _parts(leaf)
        new = new_name(name)
        if new is None:
            found.append(_as_list(leaf) if name in LISTS else leaf)
            continue
        _refuse_both(name, new, given)
        _tell(f"{name} is now {new}")
        if (new, value) != ("prompt.system", "null"):
            found.append(f"{sign}{new}" + (f"={value}" if value is not None else ""))
            prompt += found[-1:] if name.startswith(_PROMPT) else []
    if not prompt:
        return found
    return _with_methods_prompt(found, prompt, prompt_of([one for one in found if one not in prompt]))


def with_new_settings(settings: Mapping[str, Any], where: str = "") -> dict[str, Any]:
    """The whole configuration of an earlier run under the names of now.

    Args:
        settings: Nested plain data, as ``config.json`` holds it.
        where: The file, for the warning; without it nothing is told.

    Raises:
        UserError: A setting stands there under both of its names.
    """
    with_prompt = _prompt_of_now(settings)
    flat, moved = _renamed(_flatten(with_prompt), where)
    told = {old: new for old, new in MOVED.items() if any(f"{name}.".startswith(f"{old}.") for name in moved)}
    told |= {name: moved[name] for name in LISTS if name in moved}
    if with_prompt is not settings:
        told["prune.prompt"] = "prompt"
    if told and where:
        _tell(f"{where} has older names: {', '.join(f'{old} is now {new}' for old, new in told.items())}")
    return _nested(flat)


def with_new_content(content: Mapping[str, Any], package: str, where: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """A YAML file under the names of now.

    Args:
        content: Nested plain data, with the file's ``defaults`` if it has any.
        package: Dotted name that the content stands under; empty for the root.
        where: The file, for warnings.

    Returns:
        The content, and what has moved out of the package, nested from the root; empty for a file without any.

    Raises:
        UserError: A setting stands there under both of its names.
    """
    prefix = tuple(filter(None, package.split(".")))
    own = {key: value for key, value in content.items() if key != "defaults"}
    flat, moved = _renamed({(*prefix, *path): value for path, value in _flatten(own).items()}, where)
    for old, new in moved.items():
        _tell(f"{where}: {old} is now {new}")
    size = len(prefix)
    inside = {path[size:]: value for path, value in flat.items() if path[:size] == prefix}
    outside = {path: value for path, value in flat.items() if path[:size] != prefix}
    defaults = list(content.get("defaults") or [])
    if any(old.startswith(_PROMPT) for old in moved):
        alone = set(_SWITCHES) - set(moved.values())
        if len(alone) == 1:
            _tell(f"{where}: {alone.pop()} is as prompt={_METHODS_PROMPT} has it; the file does not say")
        chosen = ("override /prompt", "override /prompt@_global_.prompt")
        if not any(isinstance(item, Mapping) and set(chosen) & set(item) for item in defaults):
            defaults.append({chosen[1]: _METHODS_PROMPT})
    return ({"defaults": defaults} if defaults else {}) | _nested(inside), _nested(outside)


def has_older(content: Mapping[str, Any], package: str) -> bool:
    """Whether a YAML file has a name, or a text for a list, that :func:`with_new_content` would change."""
    prefix = tuple(filter(None, package.split(".")))
    named = {".".join((*prefix, *path)): value for path, value in _flatten(content).items()}
    inside = ".".join(_PARAMETERS) + "."
    return any(
        new_name(name.removeprefix(inside)) or (name.removeprefix(inside) in LISTS and isinstance(value, str))
        for name, value in named.items()
    )


def _renamed(flat: Flat, where: str) -> tuple[Flat, dict[str, str]]:
    """Settings under the names of now, and of each that was not what it is now."""
    found: Flat = {}
    moved: dict[str, str] = {}
    parameters = [path[-1] for path in flat if path[:-1] == _PARAMETERS]
    names = [".".join(path) for path in flat]
    for path, value in flat.items():
        is_parameter = path[:-1] == _PARAMETERS
        name = path[-1] if is_parameter else ".".join(path)
        new = new_name(name)
        if new is not None:
            _refuse_both(name, new, parameters if is_parameter else names, f"{where}: ")
            moved[name] = new
            if (new, value) != ("prompt.system", None):
                found[(*_PARAMETERS, new) if is_parameter else tuple(new.split("."))] = value
        elif name in LISTS and isinstance(value, str):
            listed = _as_list(f"{name}={value}").partition("=")[2] if is_parameter else value.split("|")
            found[path] = listed if is_parameter else [one.strip() for one in listed]
            if not is_parameter:
                moved[name] = f"a list, [{', '.join(found[path])}]"
        else:
            found[path] = value
    return found, moved


def _with_methods_prompt(found: list[str], own: list[str], prompt: str) -> list[str]:
    """Overrides in which ``own``, once of ``prune.prompt``, mean the collaborative prompt where no other is chosen."""
    if prompt == _METHODS_PROMPT:
        return found
    if prompt != "none":
        _tell(f"{', '.join(own)} is ignored, as it was under its older name: prompt={prompt} stands")
        return [override for override in found if override not in own]
    given = {_parts(override)[1] for override in found}
    off = [f"{name}=false" for name in _SWITCHES if name not in given]
    at = found.index(own[0])  # in its place, for Hydra takes no overrides on both sides of a flag
    added = [*found[:at], f"prompt={_METHODS_PROMPT}", *off, *found[at:]]
    return [override for override in added if override != "prompt=none"]


def _prompt_of_now(settings: Mapping[str, Any]) -> Mapping[str, Any]:
    """A run's settings with what ``prune.prompt`` did put where the ``prompt`` group has it."""
    prune, prompt = dict(settings.get("prune") or {}), dict(settings.get("prompt") or {})
    own = prune.pop("prompt", None)
    if own is None:
        return settings
    if prompt.get("name", "none") == "none" and (own.get("train") or own.get("inference")):
        text = own.get("text") or _methods_text()
        prompt |= {"name": _METHODS_PROMPT, "system": text}
        prompt |= {name: bool(own.get(name)) for name in ("train", "inference")}
    return {**settings, "prune": prune, "prompt": prompt}


def _methods_text() -> str:
    file = Path(config_dir()) / "prompt" / f"{_METHODS_PROMPT}.yaml"
    preset: Any = OmegaConf.load(file)
    return str(preset.system)


def _as_list(override: str) -> str:
    """An override of a text with bars, or of several, as one of a list."""
    parsed = _parsed(override)
    sign, name, _ = _parts(override)
    value: Any = parsed.value() if parsed is not None else None
    options = value.list if isinstance(value, ChoiceSweep) else [value]
    if not all(isinstance(option, str | QuotedString | list) for option in options):
        return override
    texts = [option if isinstance(option, list) else _plain(option).split("|") for option in options]
    if all(isinstance(option, list) for option in options):
        return override
    listed = ",".join(f"[{','.join(str(_plain(one)).strip() for one in text)}]" for text in texts)
    _tell(f"{name} is now a list, {listed}")
    return f"{sign}{name}={listed}"


def _leaves(override: str) -> Iterator[str]:
    """An override of a mapping that holds older names, one setting at a time; any other as it is."""
    sign, name, value = _parts(override)
    is_above = any(old.startswith(f"{name}.") or old == name for old in (*MOVED, *LISTS))
    parsed = _parsed(override) if value is not None and value.startswith("{") and is_above else None
    content = parsed.value() if parsed is not None else None
    if not isinstance(content, dict):
        yield override
        return
    for path, leaf in _flatten(content).items():
        yield f"{sign}{'.'.join((name, *path))}={json.dumps(_plain(leaf))}"


def _parsed(override: str) -> Override | None:
    try:
        return OverridesParser.create().parse_override(override)
    except HydraException:
        return None  # refused, with its reason, when the configuration is composed


def _plain(value: Any) -> Any:
    if isinstance(value, list):
        return [_plain(one) for one in value]
    return value.text if isinstance(value, QuotedString) else value


def _parts(override: str) -> tuple[str, str, str | None]:
    """Sign, name and value of an override."""
    name = override.lstrip("+~")
    sign = override[: len(override) - len(name)]
    name, equals, value = name.partition("=")
    return sign, name, value if equals else None


def _refuse_both(old: str, new: str, given: Sequence[str], where: str = "") -> None:
    for name in given:
        if name == new or name.startswith(f"{new}.") or ("." in name and new.startswith(f"{name}.")):
            raise UserError(
                f"{where}{old} and {name} are the same setting, the first under its older name; leave it out"
            )


def _flatten(node: Any, path: tuple[str, ...] = ()) -> Flat:
    if not isinstance(node, Mapping) or (path and not node):
        return {path: node}
    return {where: leaf for key, value in node.items() for where, leaf in _flatten(value, (*path, key)).items()}


def _nested(flat: Flat) -> dict[str, Any]:
    root: dict[str, Any] = {}
    for path, value in flat.items():
        node = root
        for key in path[:-1]:
            node = node.setdefault(key, {})
        node[path[-1]] = value
    return root


@functools.cache  # once, however often a configuration is composed
def _tell(message: str) -> None:
    log.warning("%s", message)
