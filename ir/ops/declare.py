"""How an operator is declared: one function that defines its outputs as tensors over its inputs.

The definition gives the type rule (shape and element type of what it returns), the meaning for fusion and generic code
(its elements), and with symbolic operands the values that shape arithmetic yields. Heavy operators get better code from
a schedule of a backend; the definition stays what they mean.
"""

from __future__ import annotations

import inspect
import re
import struct
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from types import MappingProxyType
from typing import Any, TypeAlias, TypeVar

from ..dims import Dim, symbol
from ..errors import UnsupportedError
from ..graph import Type
from ..scalars import Scalar
from ..tensors import Tensor, elementwise, view

Definition = TypeVar("Definition", bound=Callable[..., Any])
ScalarDefinition = TypeVar("ScalarDefinition", bound=Callable[..., Scalar])
Static: TypeAlias = tuple[Any, ...]
"""The elements of an operand that decides the shape of the result: dims, or numbers of a float operand."""

SPECTRUM = "spectrum"
CHANNELS_LAST = "channels_last"
"""The attribute `layout` of spatial operators whose images are stored as [N, *spatial, C]."""


@dataclass(frozen=True)
class Context:
    """What a definition may ask for beyond operands and attributes (its parameter named `context`).

    `outputs` holds the names of the outputs, "" for one that nobody wants; `regions` the graphs of control flow;
    `types` the types of all inputs, None for absent ones; `values` the elements of those whose content is known.
    `mark` begins the names of new symbols. `compose(region, *tensors)` are the outputs of a region, by definition, for
    these as its inputs. `draw` are numbers that are others in each run, and in each iteration of a loop.
    """

    outputs: tuple[str, ...] = ("out",)
    regions: Mapping[str, Any] = field(default_factory=dict)
    types: tuple[Type | None, ...] = ()
    values: tuple[tuple[Any, ...] | None, ...] = ()
    mark: str = ""
    compose: Callable[..., tuple[Tensor, ...]] = field(default=lambda region, *tensors: ())
    draw: tuple[Scalar, ...] = ()

    def wanted(self, position: int) -> bool:
        """Whether output number `position` is used."""
        return position < len(self.outputs) and self.outputs[position] != ""

    def fresh(self, stem: str, upper: Dim | None = None) -> Dim:
        """A symbol for a size that only the run tells, named after the first output."""
        return symbol(f"{self.mark}{identifier(self.outputs[0])}_{stem}", 0, upper)


_OTHER = re.compile(r"\W")


def identifier(name: str) -> str:
    """The name with all but letters and digits replaced: what symbols are named after."""
    return _OTHER.sub("_", name)


@dataclass(frozen=True)
class Operator:
    """A declared operator.

    `static` names the operands whose values decide shapes: the definition gets them as a tuple of dims (or numbers),
    None where absent. `heavy` marks contractions that have schedules and anchor a fused group. `movement` says that
    every output element is one input element. `pointwise` that output element i depends on operand elements i alone.
    `spatial` that operand 0 and the outputs are images [N, C, *spatial], which the attribute `layout` = "channels_last"
    says to be stored as [N, *spatial, C]; all else that the operator means stays the same. `alone` that it is not to be
    fused: a schedule of its own does less work than its definition asks for.

    In narrow precision (`passes.precision`) tensors lie in memory in 16 bits and are widened to f32 when they are read.
    `products` names the operands that are multiplied and summed, which stay narrow: there are instructions for that;
    such an operator has an attribute `result`, the type of what it gives in the end. `precise` names the operands that
    would lose what matters (angles, coordinates, what is rounded or counted), and "result" where a result would: those
    stay f32, with SPECTRUM all from which the first products of a model make the operand.
    """

    name: str
    define: Callable[..., Any]
    static: tuple[str, ...] = ()
    heavy: bool = False
    movement: bool = False
    pointwise: bool = False
    spatial: bool = False
    alone: bool = False
    products: tuple[str, ...] = ()
    precise: tuple[str, ...] = ()

    @cached_property
    def parameters(self) -> list[inspect.Parameter]:
        """The operands, in ONNX's order."""
        kinds = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.VAR_POSITIONAL)
        return [p for p in inspect.signature(self.define).parameters.values() if p.kind in kinds]

    @cached_property
    def attributes(self) -> dict[str, inspect.Parameter]:
        """The attributes with their defaults."""
        kind = inspect.Parameter.KEYWORD_ONLY
        return {n: p for n, p in inspect.signature(self.define).parameters.items() if p.kind == kind}

    @cached_property
    def defaults(self) -> dict[str, float]:
        """The defaults that are floats: f32, as all float attributes are, also where tensors are f64."""
        floats = {name: p.default for name, p in self.attributes.items() if isinstance(p.default, float)}
        return {name: struct.unpack("f", struct.pack("f", value))[0] for name, value in floats.items()}

    def static_positions(self, count: int) -> dict[int, str]:
        """Which of `count` inputs are static, by position."""
        names = [p.name for p in self.parameters]
        return {i: n for i, n in enumerate(names[:count]) if n in self.static}

    def positions(self, names: Sequence[str], count: int) -> tuple[int, ...]:
        """The positions of the operands with these names among `count` inputs; the last name may stand for several."""
        parameters = self.parameters
        last = len(parameters) - 1
        return tuple(i for i in range(count) if parameters and parameters[min(i, last)].name in names)

    def __call__(
        self, operands: Sequence[Any], attributes: Mapping[str, Any], context: Context | None = None
    ) -> tuple[Tensor | Type, ...]:
        """The outputs for the given operands (tensors; tuples for static ones; None where absent)."""
        if self.spatial and "layout" in attributes:
            return self._channels_last(operands, attributes, context)
        declared = self.attributes
        keywords: dict[str, Any] = dict(self.defaults)
        static_names = set(self.static)
        for name, value in attributes.items():
            if name in declared:
                keywords[name] = value
            elif name not in static_names:
                raise UnsupportedError(f"{self.name} has an attribute {name!r} that is not supported")
        if "context" in declared:
            keywords["context"] = context or Context()
        parameters = self.parameters
        variadic = bool(parameters) and parameters[-1].kind == inspect.Parameter.VAR_POSITIONAL
        named: dict[str, Any] = {}
        arguments = list(operands)
        if not variadic:
            for position, parameter in enumerate(parameters):
                value = arguments[position] if position < len(arguments) else None
                if value is None and parameter.name in attributes and parameter.name in static_names:
                    value = attributes[parameter.name]
                if value is None and parameter.default is not inspect.Parameter.empty:
                    value = parameter.default
                elif value is None:
                    raise UnsupportedError(f"{self.name} lacks its operand {parameter.name!r}")
                named[parameter.name] = value
            if len(arguments) > len(parameters) and any(a is not None for a in arguments[len(parameters) :]):
                raise UnsupportedError(f"{self.name} takes at most {len(parameters)} operands, found {len(arguments)}")
            result = self.define(**named, **keywords)
        else:
            result = self.define(*arguments, **keywords)
        return result if isinstance(result, tuple) else (result,)

    def _channels_last(
        self, operands: Sequence[Any], attributes: Mapping[str, Any], context: Context | None
    ) -> tuple[Tensor | Type, ...]:
        if attributes["layout"] != CHANNELS_LAST:
            raise UnsupportedError(
                f"{self.name} has the layout {attributes['layout']!r}, there is {CHANNELS_LAST!r} only"
            )
        plain = {name: value for name, value in attributes.items() if name != "layout"}
        image = operands[0]
        last, spatial = image.rank - 1, range(1, image.rank - 1)
        first = view(
            image,
            (image.shape[0], image.shape[last], *image.shape[1:last]),
            lambda n, c, *where: (n, *where, c),
        )
        outputs = self((first, *operands[1:]), plain, context)
        return tuple(
            view(
                output,
                (output.shape[0], *(output.shape[1 + axis] for axis in spatial), output.shape[1]),
                lambda n, *where: (n, where[-1], *where[:-1]),
            )
            if isinstance(output, Tensor)
            else output
            for output in outputs
        )


class Registry:
    """Collects the declarations of one file (`declare = Registry()`); `ir.ops` joins all files' registries."""

    def __init__(self) -> None:
        self._operators: dict[str, Operator] = {}

    @property
    def operators(self) -> Mapping[str, Operator]:
        return MappingProxyType(self._operators)

    def op(
        self,
        *names: str,
        static: Sequence[str] = (),
        heavy: bool = False,
        movement: bool = False,
        spatial: bool = False,
        alone: bool = False,
        products: Sequence[str] = (),
        precise: Sequence[str] = (),
    ) -> Callable[[Definition], Definition]:
        """Declares operators by a function of tensors: positional parameters are operands, keyword-only attributes."""

        def register(function: Definition) -> Definition:
            for name in names:
                self._operators[name] = Operator(
                    name,
                    function,
                    tuple(static),
                    heavy,
                    movement,
                    spatial=spatial,
                    alone=alone,
                    products=tuple(products),
                    precise=tuple(precise),
                )
            return function

        return register

    def pointwise(self, *names: str, precise: Sequence[str] = ()) -> Callable[[ScalarDefinition], ScalarDefinition]:
        """Declares operators by a function of scalars, applied to broadcast operands."""

        def register(function: ScalarDefinition) -> ScalarDefinition:
            signature = inspect.signature(function)
            for name in names:

                def define(*operands: Any, **attributes: Any) -> Tensor:
                    present = [operand for operand in operands if operand is not None]

                    def element(*scalars: Scalar) -> Scalar:
                        remaining = iter(scalars)
                        return function(*(None if o is None else next(remaining) for o in operands), **attributes)

                    return elementwise(element, *present)

                define.__signature__ = signature  # type: ignore[attr-defined]
                define.__doc__ = function.__doc__
                # Operands arrive by name (see Operator.__call__): put them back in order.
                names_in_order = [p.name for p in signature.parameters.values() if p.kind == p.POSITIONAL_OR_KEYWORD]
                self._operators[name] = Operator(
                    name, _positional(define, names_in_order, signature), pointwise=True, precise=tuple(precise)
                )
            return function

        return register


def _positional(define: Callable[..., Any], names: list[str], signature: inspect.Signature) -> Callable[..., Any]:
    def call(*operands: Any, **keywords: Any) -> Any:
        given = [keywords.pop(name) for name in names if name in keywords]
        return define(*operands, *given, **keywords)

    call.__signature__ = signature  # type: ignore[attr-defined]
    call.__doc__ = define.__doc__
    return call
