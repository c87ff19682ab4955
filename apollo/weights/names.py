"""Which view is which parameter of a Hugging Face module, by transformers' own mapping.

transformers renames tensors while it loads, and joins experts: one parameter of a module may be
many tensors of the checkpoint. What it would copy together is looked for in the engine's memory:

    experts.0.w1, experts.0.w3, experts.1.w1 ...   checkpoint tensors, each a view of w13
        -> stack along 0, concatenate along 1      transformers' operations
        -> experts.gate_up_proj                    one view of w13, or a refusal by name

Knows shapes and names; touches no memory.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from apollo.weights.layout import LayoutError, TensorView, WeightLayout
from apollo.weights.pieces import Piece, merge

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def parameter_views(module: "PreTrainedModel", layout: WeightLayout) -> dict[str, TensorView]:
    """The view of each parameter of `module`, under the parameter's name.

    A tensor for which the module has no place keeps its own name. Raises LayoutError with the name
    of a tensor of which a rank holds a part, and of one that transformers would transform or that
    does not lie in the engine as the module needs it.
    """
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import (
        WeightConverter,
        WeightRenaming,
        dot_natural_key,
        rename_source_key,
    )

    transforms = get_model_conversion_mapping(module)
    renamings = [entry for entry in transforms if isinstance(entry, WeightRenaming)]
    converters = [entry for entry in transforms if isinstance(entry, WeightConverter)]
    of_pattern = {pattern: entry for entry in converters for pattern in entry.source_patterns}
    state, prefix = module.state_dict(), module.base_model_prefix

    found: dict[str, TensorView] = {}
    joined: dict[str, dict[str, list[TensorView]]] = {}
    for view in sorted(layout, key=lambda view: dot_natural_key(view.name)):
        if view.part is not None:
            raise LayoutError(
                f"{view.name}: only a part {view.shape} of {view.part.whole} is in this engine; "
                "one cell is one device"
            )
        name, pattern = rename_source_key(view.name, renamings, converters, prefix, state)
        if name not in state and view.name in state:
            # As transformers does: a name that the module has already is left alone.
            name, pattern = rename_source_key(view.name, [], [], prefix, state)
        if pattern is not None:
            joined.setdefault(name, {}).setdefault(pattern, []).append(view)
        elif name in found:
            raise LayoutError(f"{view.name}: is a second tensor for the module's {name}")
        else:
            found[name if name in state else view.name] = view
    for name, views in joined.items():
        try:
            found[name] = _join(name, views, of_pattern[next(iter(views))])
        except LayoutError as error:
            raise LayoutError(f"{error} (the trainer's module has it in {name})") from None
    return {name: replace(view, name=name) for name, view in found.items()}


def _join(name: str, views: dict[str, list[TensorView]], converter: Any) -> TensorView:
    """One view of all tensors that `converter` makes one parameter of."""
    from transformers.core_model_loading import Concatenate, MergeModulelist

    first = next(iter(views.values()))[0]
    for operation in converter.operations:
        if type(operation) is MergeModulelist:
            views = {pattern: [_stack(some, operation.dim)] for pattern, some in views.items()}
        elif type(operation) is Concatenate:
            # In the converter's order, not in that of the names.
            patterns = [pattern for pattern in converter.source_patterns if pattern in views]
            some = [view for pattern in patterns for view in views[pattern]]
            views = {name: [_concatenate(some, operation.dim)]}
        else:
            raise LayoutError(
                f"{first.name}: transformers changes it by {operation} while loading; "
                "a transformed tensor cannot be taught in place"
            )
    left = [view for some in views.values() for view in some]
    if len(left) != 1:
        raise LayoutError(f"{first.name}: transformers joins it with others in no known order")
    return left[0]


def _stack(views: Sequence[TensorView], axis: int) -> TensorView:
    """All views along a new axis."""
    widened = [
        replace(view, shape=_insert(view.shape, axis, 1), stride=_insert(view.stride, axis, 1))
        for view in views
    ]
    return _concatenate(widened, axis)


def _concatenate(views: Sequence[TensorView], axis: int) -> TensorView:
    """All views along an axis that they have."""
    first, at, pieces = views[0], 0, []
    for view in views:
        if (_without(view.shape, axis), view.dtype) != (_without(first.shape, axis), first.dtype):
            raise LayoutError(f"{view.name}: is not like {first.name}, with which it is joined")
        start = tuple(at if number == axis else 0 for number in range(len(view.shape)))
        strides = tuple(
            step if length > 1 else None
            for step, length in zip(view.stride, view.shape, strict=True)
        )
        pieces.append(Piece(start, view.shape, view.block, view.offset_bytes, strides))
        at += view.shape[axis]
    shape = tuple(at if number == axis else size for number, size in enumerate(first.shape))
    return merge(first.name, shape, first.dtype, pieces)


def _insert(values: tuple[int, ...], axis: int, value: int) -> tuple[int, ...]:
    return values[:axis] + (value,) + values[axis:]


def _without(values: tuple[int, ...], axis: int) -> tuple[int, ...]:
    return values[:axis] + values[axis + 1 :]
