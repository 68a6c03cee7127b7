"""A run's prompt, whether it goes through the base's chat template, and where an export trained on turns stops.

Beside :mod:`atp.run.parts.data`, which reads the records that the prompt is put around. It knows nothing of training.
"""

from __future__ import annotations

import copy
import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

from transformers import GenerationConfig, PreTrainedTokenizerBase

from atp.config.schema import TrainConfig
from atp.data.encoding.turn import end_token, is_instruct, template_of, turn_of
from atp.data.prompt import CHAT_NAME, Prompt, from_text
from atp.data.records import ChatRecord, Splits
from atp.data.tasks import find_task, load_tasks
from atp.errors import UserError
from atp.model.stops import stop_ids
from atp.run.parts.base import base_stops

log = logging.getLogger(__name__)


def load_prompt(config: TrainConfig, tokenizer: PreTrainedTokenizerBase) -> Prompt:
    """The prompt of a run, with the instructions of its tasks and, of an instruct model, the tokenizer's chat template.

    Raises:
        ValueError: A file that cannot be read, a template that is not valid, an unknown ``prompt.chat``, or no chat
            template where one is asked for.
    """
    settings = config.prompt
    parts = {"system": settings.system, "template": settings.template}
    if settings.path:
        path = Path(settings.path).expanduser()
        try:
            parts = from_text(path.read_text(encoding="utf-8"), f"prompt.path={path}")
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"prompt.path={path}: cannot be read ({error})") from None
    elif settings.name == "file":
        raise UserError("prompt.path is not set; give your template: prompt=<file>")
    elif settings.name == "collaborative" and not settings.system.strip():
        raise UserError("prompt.system is empty; leave it out for the usual text, or use prompt=none")
    tasks = load_tasks(config.data.tasks_file)
    named = [find_task(name, tasks) for name in config.data.tasks or () if "/" in name]
    known = {task.name: task.instruction for task in (*tasks.values(), *named) if task.instruction}
    prompt = Prompt(
        settings.name,
        **parts,
        instructions={**known, **settings.instructions},
        train=settings.train,
        inference=settings.inference,
    )
    chat = _chat_template(config, prompt, tokenizer)
    name = CHAT_NAME if chat and prompt.is_empty else prompt.name
    return replace(prompt, name=name, chat=chat)


def _chat_template(config: TrainConfig, prompt: Prompt, tokenizer: PreTrainedTokenizerBase) -> str | None:
    """The template that prompts go through, if they do; says why, or why not."""
    way, template = config.prompt.chat, template_of(tokenizer)
    if way not in ("auto", "always", "never"):
        raise UserError(f"prompt.chat is {way!r}; known: auto, always, never")
    if way == "always" and template is None:
        raise UserError(
            "prompt.chat=always, but the tokenizer has no chat template; use prompt.chat=auto or never, take an "
            "instruct model as the base, or write chat_template.jinja into the folder of model.path"
        )
    if way == "never" or template is None:
        return None
    try:
        turn_of(tokenizer, template, bool(prompt.system.strip()))
    except UserError as error:
        if way == "always":
            raise UserError(f"prompt.chat=always, but {error}; use prompt.chat=never") from None
        log.warning("prompts stand as they are: %s", error)
        return None
    instruct = is_instruct(tokenizer, base_stops(config.model))
    if way == "auto" and not instruct and prompt.is_empty:
        log.info(
            "prompts stand as they are: the base has a chat template, but does not stop where that ends a turn, as an "
            "instruct model does; prompt.chat=always puts prompts through it"
        )
        return None
    why = "it is an instruct model" if instruct else f"prompt={prompt.name}" if way == "auto" else "prompt.chat=always"
    log.info("prompts go through the base's chat template (%s), running text does not; prompt.chat=never: plain", why)
    if "strftime_now" in template:
        log.warning("the chat template writes today's date into prompts: a run of another day sees other text")
    return template


def export_generation(
    own: GenerationConfig | None, prompt: Prompt, splits: Splits, tokenizer: PreTrainedTokenizerBase
) -> Any:
    """The base's generation config; where turns were learnt, it also stops at what ends them.

    Args:
        own: The base's.
        prompt: The run's prompt.
        splits: What was trained on.
        tokenizer: The tokenizer.
    """
    config = copy.deepcopy(own)
    learnt = (prompt.chat and prompt.train) or any(isinstance(record, ChatRecord) for record in splits.validation)
    end = end_token(tokenizer) if learnt else None
    if config is not None and end is not None and end not in (known := stop_ids(config)):
        config.eos_token_id = [*known, end]
    return config
