"""The declared operators in a namespace of ``torch.ops``, and the functions of a backend that call them.

A backend's function of an operator takes the tensors in the order of the schema, with the temperature as one argument; the options by
name; and ``needs``, a tuple of what the schema has as ``need_x``. It returns the results, the gradients as one tuple, None
where not needed. So ``info_nce_forward(query, key, negatives, temperature, normalize=..., ..., needs=(True, False, False, True))``
returns ``(loss, lse, (grad_query, None, None, grad_temperature))``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from fastnce import registry
from fastnce.precision import float32_products
from fastnce.registry import Op, Operator

# Options that a caller may leave out.
_DEFAULTS = {"mean": False, "loss_layers": 0, "grad_layers": 0}


class Namespace:
    """``torch.ops.<name>``, in which every operator is defined as soon as it is declared.

    Args:
        name: of the namespace, in which a library's kernels have registered themselves, or register themselves later.
        device: "CPU" or "CUDA", that of the kernels.
        functions: gets the backend's function of every operator, by name: the globals of the backend's module.
    """

    def __init__(self, name: str, device: str, functions: dict[str, object]) -> None:
        self.name, self._device, self._functions = name, device, functions
        self._ops: set[str] = set()
        self._library = torch.library.Library(name, "DEF")
        registry.watch(self._define)

    def has(self, op: str) -> bool:
        """Whether there are kernels for all operators that ``op`` runs."""
        return op in self._ops

    def define(self, schema: str) -> None:
        """An operator of this library alone."""
        self._library.define(schema)

    def _define(self, op: Op, operators: Sequence[Operator]) -> None:
        for operator in operators:
            self.define(operator.schema)
            name = f"{self.name}::{operator.name}"
            torch.library.register_fake(name, operator.fake, lib=self._library)
            self._functions[operator.name] = self._function(operator)
        if all(map(self._has_kernel, op.runs)):
            self._ops.add(op.name)

    def _function(self, operator: Operator) -> Callable | None:
        return function(self.name, operator)

    def _has_kernel(self, operator: str) -> bool:
        name = f"{self.name}::{operator}"
        return torch._C._dispatch_has_kernel_for_dispatch_key(name, self._device)


class PythonNamespace(Namespace):
    """Its operators run the functions ``<operator>`` of a module.

    Called eagerly, an op goes straight to them. While torch.compile traces, it becomes an operator, which the compiler does not
    look into.
    """

    def __init__(self, name: str, kernels: ModuleType, functions: dict[str, object]) -> None:
        self._kernels = kernels
        super().__init__(name, "", functions)

    def _function(self, operator: Operator) -> Callable | None:
        eager = getattr(self._kernels, operator.name, None)
        if eager is None:
            return None
        run = implementation(operator, eager)
        self._library.impl(operator.name, run, "CompositeExplicitAutograd")
        compiled = function(self.name, operator)

        def choose(*arguments: object, **options: object) -> object:
            call = compiled if torch.compiler.is_compiling() else eager
            return call(*arguments, **options)

        return choose

    def _has_kernel(self, operator: str) -> bool:
        return self._functions.get(operator) is not None


def function(namespace: str, operator: Operator) -> Callable:
    """The backend's function of an operator, written out, for it is called for every loss."""
    call = getattr(getattr(torch.ops, namespace), operator.name).default
    names, before = operator.arguments, operator.results_before_gradients
    if "temperature" not in names:
        return call
    rows = names[names[0].startswith("grad")]
    given = {"temperature_tensor": "*_temperature(temperature)"}
    given["bfloat16_products"] = f"_bfloat16_products({rows})"
    passed = [name for name in names if name != "temperature" and name not in operator.needs]
    tensors = [name.replace("_tensor", "") for name in passed if name not in operator.options]
    options = [name for name in passed if name in operator.options and name not in given]
    parameters = [*tensors, *(["*"] if options or operator.needs else [])]
    parameters += [f"{name}={_DEFAULTS[name]}" if name in _DEFAULTS else name for name in options]
    values = [given.get(name, name) for name in passed]
    if operator.needs:
        parameters.append("needs")
        values.append("*needs")
    result = f"call({', '.join(values)})"
    if operator.lists:
        result = f"_in_place({result}, {before}, needs)"
    lines = [f"def {operator.name}({', '.join(parameters)}):", f"    found = {result}"]
    apart = operator.needs and before
    lines.append(f"    return *found[:{before}], found[{before}:]" if apart else "    return found")
    # A scope without a name: of a module's, torch.compile would look for ``call`` in the module.
    helpers = (_temperature, _bfloat16_products, _in_place)
    scope = {"call": call} | {helper.__name__: helper for helper in helpers}
    exec("\n".join(lines), scope)
    return scope[operator.name]


def _temperature(temperature: float | Tensor) -> tuple[Tensor | None, float]:
    if isinstance(temperature, Tensor):
        return temperature, 0.0
    return None, float(temperature)


def _in_place(found: tuple, before: int, needs: Sequence[bool | Sequence[bool]]) -> tuple:
    """Of lists, operators return the gradients that are needed, and functions None for the others."""
    results = list(found)
    for at, need in enumerate(needs, start=before):
        if isinstance(need, Sequence):
            gradients = iter(found[at])
            results[at] = [next(gradients, None) if each else None for each in need]
    return tuple(results)


def implementation(operator: Operator, function: Callable) -> Callable:
    """The operator whose results are those of a ``function`` that a backend has."""

    @torch.no_grad()
    def run(*arguments: object) -> object:
        values: dict[str, Any] = dict(zip(operator.arguments, arguments, strict=True))
        values.pop("bfloat16_products", None)
        temperature = values.pop("temperature_tensor", None)
        if temperature is not None:
            # A float that a compiler keeps variable comes in float64.
            values["temperature"] = temperature.float()
        if operator.needs:
            values["needs"] = tuple(values.pop(name) for name in operator.needs)
        found = function(**values)
        if not isinstance(found, tuple):
            return found
        if operator.needs and operator.results_before_gradients:
            found = (*found[:-1], *found[-1])
        return tuple(_apart(x) if isinstance(x, Sequence) else x for x in found)

    return run


def _apart(tensors: Sequence[Tensor | None]) -> list[Tensor]:
    """Those that are there, and copies of those that share memory: an operator's results must not."""
    found = [x for x in tensors if x is not None]
    return [x if x.untyped_storage().nbytes() == x.nbytes else x.clone() for x in found]


def _bfloat16_products(x: Tensor | list[Tensor]) -> bool:
    """Whether products may round their factors to bfloat16, which costs bfloat16 inputs nothing."""
    x = x if isinstance(x, Tensor) else x[0]
    if x.dtype != torch.float32:
        return x.dtype == torch.bfloat16
    return float32_products(x.device.type) == "medium"
