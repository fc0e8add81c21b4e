"""The compiled extension; csrc/python/module.cpp."""

from collections.abc import Callable, Sequence
from typing import Any

version: str
compiler: str
#: What the CUDA kernels were built with; empty if they were not.
cuda: str
cuda_on_host: bool
rules: dict[str, Rule]
#: Those with the parts that ride along with them, "parts" or "ema", by the name of the rule alone.
rules_with_parts: dict[str, dict[str, Rule]]
#: name -> number of a format
formats: dict[str, int]
#: Elements that share a scale.
group: int

def scalars(rule: str, hyper: Sequence[float], step: float, fresh: bool, scalar: float = 0.0) -> list[float]: ...
def advance(rule: str, hyper: Sequence[float], step: float, scalar: float) -> float: ...
def available_isas() -> list[str]: ...
def select_isa(name: str) -> None: ...
def selected_isa() -> str: ...
def openmp_threads() -> int: ...
def bnp(
    weight_grad: int,
    bias_grad: int,
    mean: int,
    scale: int,
    weight_out: int,
    bias_out: int,
    rows: int,
    length: int,
    rows_per_group: int,
    inv_q2: float,
    threads: int,
) -> None: ...
def why_no_cuda() -> str: ...
def why_not_on(device: int) -> str: ...

class Reader:
    def __init__(
        self,
        tensor_types: tuple[type, ...],
        slots_of: Callable[[type], tuple[str, str] | None],
        local: Callable[[Any], Any],
        use_exchange: bool,
    ) -> None: ...
    def alike(self, tensors: list[Any]) -> bool: ...
    def ready(
        self,
        groups: list[tuple[list[Any], tuple[str, ...] | None, tuple[str, ...], bool]],
        inputs: dict[Any, Any],
        state: dict[Any, Any],
        written: list[Any],
        owners: list[tuple[int, str]],
    ) -> list[int | None]: ...
    @property
    def uses_exchange(self) -> bool: ...

class Rule:
    """What a rule says of itself."""

    @property
    def number(self) -> int: ...
    @property
    def states(self) -> int: ...
    #: Those of the states that are second moments.
    @property
    def second_moments(self) -> tuple[int, ...]: ...
    #: The names of its hyper-parameters.
    @property
    def hyper(self) -> tuple[str, ...]: ...
    @property
    def reads_step(self) -> bool: ...
    @property
    def scalar_states(self) -> int: ...
    #: The functor as it is spelled in C++.
    @property
    def type(self) -> str: ...

class Clip:
    def __init__(
        self,
        *,
        total: int = 0,
        grad_norm: int = 0,
        clip_coef: int = 0,
        skipped: int = 0,
        max_norm: float = 0.0,
        classes: int = 1,
        inf: bool = False,
        skip_nonfinite: bool = False,
        measure: bool = False,
    ) -> None: ...

class Extras:
    """What a step does besides updating: addresses of torch's tensors."""

    def __init__(self, *, sums: int = 0, factors: int = 0, only: bool = False) -> None: ...

class Pinned:
    """Pinned memory, as a buffer. In a build with CUDA."""

    def __init__(self, bytes: int) -> None: ...
    @staticmethod
    def has(address: int) -> bool:
        """True for an address within such memory."""

class Link:
    """What goes between a device and the host's threads; csrc/offload/link.h. In a build with CUDA."""

    def __init__(self, device: int, slot: int) -> None: ...
    def join(self, stream: int) -> None: ...
    def wait(self) -> None: ...
    @property
    def reads(self) -> int: ...

class Row:
    """What a group asks for in one step."""

    def __init__(self, *, rule: int, sign: float, hyper: Sequence[float]) -> None: ...
    #: NaN where it is read from a tensor.
    @property
    def hyper(self) -> list[float]: ...
    #: Of those that are read from tensors, by index.
    @property
    def addresses(self) -> dict[int, int]: ...
    def read_from(self, index: int, address: int, is_double: bool) -> None:
        """Take a hyper-parameter from a tensor on the plan's device."""

class Spans:
    def __init__(self, reader: Reader) -> None: ...
    def add(self, tensors: list[Any]) -> list[int]: ...

class Plan:
    def __init__(
        self,
        reader: Reader,
        state_names: dict[int, Sequence[str]],
        step_name: str,
        chunk: int,
        device: int,
        gradients: int | None = None,
    ) -> None: ...
    def add(
        self,
        param: Any,
        state: Any,
        *,
        group: int,
        rule: int,
        fresh: bool,
        counts: bool,
        step_on_device: bool,
        formats: Sequence[int],
        draws: bool,
        place: tuple[int, int, int],
        at: int = -1,
    ) -> None: ...
    def add_ready(
        self,
        params: list[Any],
        state: dict[Any, Any],
        *,
        group: int,
        rule: int,
        counts: bool,
        step_on_device: bool,
    ) -> None: ...
    def defer(self, param: Any, group: int) -> None: ...
    def ignore(self, param: Any, group: int) -> None: ...
    def seal(self, state: dict[Any, Any]) -> None: ...
    def refresh(
        self, param_groups: list[Any], state: dict[Any, Any], inputs: dict[Any, Any], rows: list[Row]
    ) -> bool: ...
    @property
    def newcomers(self) -> list[int]: ...
    @property
    def has_gradients(self) -> bool: ...
    def release(self) -> None: ...
    def set_norm_classes(self, classes: Sequence[int]) -> None: ...
    def norm(self, clip: Clip, threads: int) -> None: ...
    def norm_cuda(self, clip: Clip, stream: int) -> None: ...
    def run(self, grad_coef: float, clip_value: float, clip: Clip, threads: int) -> list[Any]: ...
    def run_cuda(
        self, grad_coef: float, clip_value: float, clip: Clip, grad_scale: int, found_inf: int, stream: int
    ) -> list[Any]: ...
    #: In a build with CUDA.
    def submit(
        self,
        link: Link,
        params: Sequence[int],
        *,
        grad_coef: float,
        clip_value: float,
        clip: Clip,
        grad_scale: int,
        found_inf: int,
        stream: int,
        threads: int,
        extras: Extras,
        held: object,
    ) -> list[Any]: ...
    @property
    def skipped(self) -> bool: ...
    @property
    def launches(self) -> int: ...
    @property
    def was_captured(self) -> bool: ...
