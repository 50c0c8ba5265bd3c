"""What peers need and some pipelines lack. A table says of every result whether any of this was done for it."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

from .base import Adapter
from .pipeline import DiffusersPipeline

SECOND_LIST = "temporal_transformer_blocks"
CONTEXT = "cond_uncond"  # as pipelines call it that run both halves at once


def _lacks_context(pipeline: DiffusersPipeline) -> bool:
    call = inspect.unwrap(type(pipeline.pipeline).__call__)
    return "cache_context" not in call.__code__.co_names


def _has_two_lists(pipeline: DiffusersPipeline) -> bool:
    return hasattr(pipeline.transformer, SECOND_LIST)


@contextmanager
def _in_context(pipeline: DiffusersPipeline) -> Iterator[None]:
    with around_calls(pipeline.transformer, lambda inputs: pipeline.transformer.cache_context(CONTEXT)):
        yield


@contextmanager
def _in_one_list(pipeline: DiffusersPipeline) -> Iterator[None]:
    """Each block of the one list runs with the one of the other list that comes after it, as one."""
    from .blocks import paired

    transformer = pipeline.transformer
    first, second = transformer.transformer_blocks, transformer.temporal_transformer_blocks
    pairs = paired(first, second, pipeline.frames, transformer.temp_pos_embed)
    del transformer.temporal_transformer_blocks
    transformer.transformer_blocks, transformer.temporal_transformer_blocks = pairs, [None] * len(second)
    pipeline.options["enable_temporal_attentions"] = False  # which has the pipeline run the first list alone
    try:
        yield
    finally:
        del pipeline.options["enable_temporal_attentions"], transformer.temporal_transformer_blocks
        transformer.transformer_blocks, transformer.temporal_transformer_blocks = first, second


@contextmanager
def around_calls(
    transformer: Any, context: Callable[[dict[str, Any]], AbstractContextManager[object]]
) -> Iterator[None]:
    """Every call of the transformer is made inside a context, made of its arguments."""
    entered: list[AbstractContextManager[object]] = []

    def before(module: Any, arguments: Any, named: dict[str, Any]) -> None:
        entered.append(context(named))
        entered[-1].__enter__()

    def after(*called: Any) -> None:
        if entered:
            entered.pop().__exit__(None, None, None)

    hooks = (
        transformer.register_forward_pre_hook(before, with_kwargs=True),
        transformer.register_forward_hook(after, always_call=True),
    )
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


IN_CONTEXT = Adapter("its calls are put into a cache context", _lacks_context, _in_context)
IN_ONE_LIST = Adapter("its blocks are put into one list, two at a time", _has_two_lists, _in_one_list)
WITH_STEPS = Adapter(
    "it is told latents, step and noise level of every call", lambda pipeline: True, lambda pipeline: nullcontext()
)
