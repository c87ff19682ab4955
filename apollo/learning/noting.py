"""Has a learner note which elements it changes, under the names that the journal knows.

parameter of the module --same place in the engine's memory--> checkpoint tensor --> its map
"""

from pathlib import Path

from apollo.learning.step import Learner
from apollo.optim.routing import matrix_shape
from apollo.weights.change_maps import ChangeMaps
from apollo.weights.layout import TensorView, WeightLayout
from apollo.weights.names import parameter_views


def note_changes(learner: Learner, layout: WeightLayout, path: Path, generation: int) -> ChangeMaps:
    """Note from now on, in maps that `ChangeMaps.open` finds by `path`; between two steps only.

    The live weights are those of `generation`. A parameter that joins several tensors of the
    checkpoint has no map.
    """
    names = {_place(view): view.name for view in layout}
    parameters = dict(learner.module.named_parameters(remove_duplicate=False))
    views = parameter_views(learner.module, layout)
    found = {
        parameter: names[_place(view)]
        for parameter, view in views.items()
        if _place(view) in names and parameter in parameters
    }
    learned = {parameter for parameter in found if parameters[parameter].requires_grad}
    made = ChangeMaps.create(
        path,
        {found[each]: matrix_shape(tuple(parameters[each].shape)) for each in learned},
        frozenset(name for each, name in found.items() if each not in learned),
        learner.module.device,
        generation,
    )
    # A tied parameter has several names; the optimizer knows it by one of them.
    name_of = learner.optimizer.name_of
    learner.optimizer.changed = {
        name_of(parameters[each]): made.maps[found[each]] for each in learned
    }
    return made


def _place(view: TensorView) -> tuple[object, ...]:
    return view.block, view.offset_bytes, view.shape, view.stride
