"""A CUDA device for tests and for .ci/gpu: a GPU, or the emulated one of tests/cuda_on_host. Both give tensors, streams, captures
and replays by the same names, so that one text of a test runs on both.

On the emulated device tensors lie on the CPU. What precond enqueues is captured by the runtime, in pieces: between them an
operation of torch inside ``capture`` runs at once, on what is there, and again in each replay.
"""

from __future__ import annotations

import contextlib
import ctypes
import importlib.util
import os
import sys
import warnings
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch.utils._python_dispatch import TorchDispatchMode


def stand_in_extension(path: str | None = None) -> None:
    """Have another build of the extension stand in for the installed one, by default that of ``PRECOND_TEST_EXTENSION`` if it is
    set. Before precond is imported.
    """
    if path := path or os.environ.get("PRECOND_TEST_EXTENSION"):
        spec = importlib.util.spec_from_file_location("precond._C", path)
        sys.modules["precond._C"] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(sys.modules["precond._C"])


class RealDevice:
    """A GPU."""

    name = "cuda"
    emulated = False

    def new_stream(self) -> torch.cuda.Stream:
        """A stream that waits for the current one."""
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        return stream

    @contextlib.contextmanager
    def on(self, stream: torch.cuda.Stream) -> Iterator[None]:
        """Make a stream current; afterwards the one before waits for it."""
        with torch.cuda.stream(stream):
            yield
        torch.cuda.current_stream().wait_stream(stream)

    def capture(self, step: Callable[[], object]) -> Callable[[], None]:
        """Capture a call into a graph; return what replays it."""
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            step()
        return graph.replay

    def synchronize(self) -> None:
        torch.cuda.synchronize()

    @contextlib.contextmanager
    def waiting_is_an_error(self) -> Iterator[None]:
        """An operation of torch that waits for the device raises."""
        torch.cuda.set_sync_debug_mode("error")
        try:
            yield
        finally:
            torch.cuda.set_sync_debug_mode("default")


#: Kind in tests/cuda_on_host/runtime.h.
KINDS = ("download", "upload", "other copy", "record", "wait for event", "wait for number", "write number", "kernel")


class Traced(NamedTuple):
    """Something that a stream was given."""

    kind: str
    #: The stream works by itself.
    apart: bool
    #: Bytes of a copy, or a number.
    value: int


class EmulatedDevice:
    """The runtime of tests/cuda_on_host, which refuses what a GPU would."""

    name = "cpu"
    emulated = True

    def __init__(self) -> None:
        from precond import _C

        self.hooks = ctypes.CDLL(_C.__file__)
        self.hooks.hook_new_stream.restype = ctypes.c_void_p
        self.current: int | None = None

    def _call(self, name: str, *arguments: object) -> None:
        if error := getattr(self.hooks, f"hook_{name}")(*arguments):
            raise RuntimeError(f"{name}: CUDA error {error}")

    def new_stream(self) -> int:
        return int(self.hooks.hook_new_stream())

    def enqueued(self, stream: int) -> int:
        """How many copies, launches and events a stream was ever given."""
        return int(self.hooks.hook_enqueued(ctypes.c_void_p(stream)))

    @contextlib.contextmanager
    def busy(self) -> Iterator[None]:
        """Streams that were made by themselves stand still."""
        self.hooks.hook_hold(1)
        try:
            yield
        finally:
            self.hooks.hook_hold(0)

    @contextlib.contextmanager
    def failing(self, error: int) -> Iterator[None]:
        """They fail."""
        self.hooks.hook_fail(error)
        try:
            yield
        finally:
            self.hooks.hook_fail(0)

    @contextlib.contextmanager
    def traced(self) -> Iterator[list[Traced]]:
        """What streams are given."""
        found: list[Traced] = []
        self.hooks.hook_trace(1)
        try:
            yield found
        finally:
            self.hooks.hook_trace(0)
            item = (ctypes.c_int64 * 3)()
            for i in range(self.hooks.hook_traced(1 << 30, item)):
                self.hooks.hook_traced(i, item)
                found.append(Traced(KINDS[item[0]], bool(item[1]), item[2]))

    @contextlib.contextmanager
    def on(self, stream: int) -> Iterator[None]:
        with self._current(stream):
            yield
        self._call("synchronize", ctypes.c_void_p(stream))

    @contextlib.contextmanager
    def _current(self, stream: int) -> Iterator[None]:
        from precond._core import backend as _backend

        before, streams = self.current, _backend.current_stream
        self.current, _backend.current_stream = stream, lambda device: stream
        try:
            yield
        finally:
            self.current, _backend.current_stream = before, streams

    def capture(self, step: Callable[[], object]) -> Callable[[], None]:
        stream, pieces = self.new_stream(), Pieces(self)
        pieces.begin(stream)
        try:
            with self._current(stream), pieces:
                step()
        except BaseException:
            warnings.warn("The CUDA Graph is empty.", stacklevel=2)  # as torch does, before the error goes on
            self.hooks.hook_end_capture(ctypes.c_void_p(stream), ctypes.byref(ctypes.c_void_p()))
            raise
        pieces.end()
        return pieces.replay

    def synchronize(self) -> None:
        self._call("synchronize", ctypes.c_void_p(self.current))

    @contextlib.contextmanager
    def waiting_is_an_error(self) -> Iterator[None]:
        warnings.warn("Synchronization debug mode is a prototype feature", stacklevel=2)  # as torch does
        with HostReads():
            yield


class Pieces(TorchDispatchMode):
    """A graph of an emulated stream and of operations of torch, in their order."""

    def __init__(self, device: EmulatedDevice) -> None:
        super().__init__()
        self.device = device
        self.stream = 0
        self.replays: list[Callable[[], object]] = []

    def begin(self, stream: int) -> None:
        self.stream = stream
        self.device._call("begin_capture", ctypes.c_void_p(stream))

    def end(self) -> None:
        graph = ctypes.c_void_p()
        self.device._call("end_capture", ctypes.c_void_p(self.stream), ctypes.byref(graph))
        self.replays.append(lambda: self.device._call("replay", graph))

    def replay(self) -> None:
        for piece in self.replays:
            piece()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        found = func(*args, **kwargs)
        aliases = [result.alias_info for result in func._schema.returns]
        if aliases and all(alias is not None and not alias.is_write for alias in aliases):
            return found  # a view: nothing to do again
        outputs = [t for t in (found if isinstance(found, (tuple, list)) else (found,)) if isinstance(t, torch.Tensor)]

        def again() -> None:
            new = func(*args, **kwargs)
            for old, t in zip(outputs, new if isinstance(new, (tuple, list)) else (new,), strict=False):
                if old is not t:
                    old.copy_(t)

        self.end()
        self.replays.append(again)
        self.begin(self.stream)
        return found


class HostReads(torch.overrides.TorchFunctionMode):
    """Raises where torch would make the host wait for a GPU: where it reads a value, makes a tensor on a device from numbers of
    the host, or copies between the host and a device without ``non_blocking``. On the emulated device, and on fake tensors of
    any device.
    """

    READS = (
        *(getattr(torch.Tensor, f"__{name}__") for name in ("float", "int", "bool")),
        *(getattr(torch.Tensor, name) for name in ("item", "tolist", "numpy", "cpu", "nonzero", "equal", "is_nonzero")),
        *(torch.equal, torch.nonzero, torch.is_nonzero),
    )

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        name = getattr(function, "__name__", str(function))
        if function in self.READS:
            raise RuntimeError(f"the host waits for the device: {name}")
        if function is torch.Tensor.__getitem__ and isinstance(args[1], list):
            raise RuntimeError("the host waits for the device: an index of numbers of the host")
        if function in (torch.tensor, torch.as_tensor) and str(kwargs.get("device", "cpu")) != "cpu":
            raise RuntimeError(f"the host waits for the device: {name} with device={kwargs['device']}")
        result = function(*args, **kwargs)
        if function in (torch.Tensor.to, torch.Tensor.copy_, torch.Tensor.cuda) and not kwargs.get("non_blocking"):
            of = args[1] if function is torch.Tensor.copy_ else args[0]
            if "cpu" in {of.device.type, result.device.type} and of.device != result.device:
                raise RuntimeError(f"the host waits for the device: {name} from {of.device} to {result.device}")
        return result


class NoHostReads(TorchDispatchMode):
    """Raises where the host reads a tensor's value: item, float, int, bool, tolist. In Triton's interpreter of any tensor, on a
    GPU also of those there.
    """

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        assert func is not torch.ops.aten._local_scalar_dense.default, "the host read a tensor"
        return func(*args, **(kwargs or {}))

    @property
    def on_gpu(self):
        return os.environ.get("TRITON_INTERPRET") == "0" and torch.cuda.is_available()

    def __enter__(self):
        if self.on_gpu:
            torch.cuda.set_sync_debug_mode("error")
        return super().__enter__()

    def __exit__(self, *args):
        if self.on_gpu:
            torch.cuda.set_sync_debug_mode("default")
        return super().__exit__(*args)


def device() -> RealDevice | EmulatedDevice | None:
    """The CUDA device of this process, or None."""
    from precond._core import backend as _backend

    if _backend.cuda_on_host():
        return EmulatedDevice()
    return RealDevice() if torch.cuda.is_available() else None
