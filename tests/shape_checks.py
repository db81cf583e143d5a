"""Checks of the array shapes that annotations state, at every call.

jaxtyping's import hook decorates all functions, nested ones at each definition. Its decorator costs about 30
microseconds per call, which doubles the time of a study of tiny tensors. So functions that state no shape are left
undecorated here; pyright checks their other annotations.
"""

import dataclasses
import typing

import jaxtyping

_decorator = jaxtyping.jaxtyped


def check_shapes(modules: list[str]) -> None:
    """Check the shapes that functions and dataclasses of these modules state; call it before they are imported."""
    jaxtyping.jaxtyped = _where_shapes_are_stated
    jaxtyping.install_import_hook(modules, "beartype.beartype")


def _where_shapes_are_stated(*, typechecker):
    decorate = _decorator(typechecker=typechecker)
    return lambda what: decorate(what) if any(map(_states_a_shape, _annotations(what))) else what


def _annotations(what):
    if isinstance(what, type):
        return [field.type for field in dataclasses.fields(what)] if dataclasses.is_dataclass(what) else []
    function = what.fget if isinstance(what, property) else getattr(what, "__func__", what)
    return function.__annotations__.values()


def _states_a_shape(annotation) -> bool:
    if isinstance(annotation, str):  # which may name a shape
        return True
    if isinstance(annotation, list):  # the arguments of a Callable
        return any(map(_states_a_shape, annotation))
    if isinstance(annotation, type) and issubclass(annotation, jaxtyping.AbstractArray):
        return True
    return any(map(_states_a_shape, typing.get_args(annotation)))
