"""A GPU that is not there: tensors that say `cuda:0` and hold their numbers in the host's memory.

Everything that a device would refuse is refused: operations between tensors of two devices, and while a graph is captured
whatever waits for the device or copies from ordinary memory. Waits and copies are counted. So code for CUDA is run and
checked on machines that have none; kernels run in Triton's interpreter, or as the reference.

Torch's dispatcher makes no difference between these tensors and real ones. A captured graph is the list of operations that
ran, with the memory that they ran on: replaying it runs them again on the same memory, as on a device, and no Python code.
"""

import contextlib
import ctypes
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

DEVICE = "cuda:0"

_aten = torch.ops.aten
_WAITS = {
    _aten._local_scalar_dense.default,
    _aten.is_nonzero.default,
    _aten.nonzero.default,
    _aten.masked_select.default,
    _aten.equal.default,
    _aten._unique2.default,
    _aten.unique_dim.default,
    _aten.unique_consecutive.default,
}
"""What must know numbers of the device before it returns."""
_PINS = {_aten.pin_memory.default, _aten._pin_memory.default}


class OnDevice(torch.Tensor):
    """A tensor that lies on the device; `host` are its numbers."""

    host: torch.Tensor

    @staticmethod
    def __new__(cls, host: torch.Tensor) -> "OnDevice":
        layout = {"strides": host.stride(), "storage_offset": host.storage_offset(), "dtype": host.dtype}
        made = torch.Tensor._make_wrapper_subclass(cls, host.size(), device=DEVICE, **layout)  # type: ignore[attr-defined]
        made.host = host
        return made

    __torch_function__ = torch._C._disabled_torch_function_impl

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if PretendGPU.entered is None:
            raise RuntimeError(f"{func}: there is no such device outside of PretendGPU")
        return PretendGPU.entered.run(func, args, kwargs)  # of another thread: torch's modes are a thread's own

    def data_ptr(self) -> int:
        return self.host.data_ptr()

    def untyped_storage(self) -> Any:
        return self.host.untyped_storage()

    def tolist(self) -> Any:
        return self.cpu().tolist()

    def __deepcopy__(self, memo: Any) -> Any:
        return self.clone()


class Graph:
    """What `torch.cuda.CUDAGraph` is here."""

    def __init__(self) -> None:
        self.steps: list[Callable[[], object]] = []

    def replay(self) -> None:
        for step in self.steps:
            step()

    def reset(self) -> None:
        self.steps = []


class PretendGPU(TorchDispatchMode):
    """The device, for as long as it is entered.

    Attributes:
        waits, uploads: names of operations that waited for the device, and that copied to it, since they were last cleared.
    """

    entered: ClassVar["PretendGPU | None"] = None

    def __init__(self) -> None:
        super().__init__()
        self.waits: list[str] = []
        self.uploads: list[str] = []
        self.graph: Graph | None = None

    def __enter__(self) -> "PretendGPU":
        self._lifted = torch._C._only_lift_cpu_tensors()
        torch._C._set_only_lift_cpu_tensors(True)
        PretendGPU.entered = self
        super().__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        torch._C._set_only_lift_cpu_tensors(self._lifted)
        super().__exit__(*error)
        PretendGPU.entered = None

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return self.run(func, args, kwargs)

    def run(self, func: Any, args: Any, kwargs: Any) -> Any:
        """An operation, as the device would do it."""
        kwargs = {**(kwargs or {})}
        if func in _PINS:
            return args[0].clone()
        given = [x for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)]
        on_device = [x for x in given if isinstance(x, OnDevice)]
        elsewhere = [x for x in given if not isinstance(x, OnDevice)]
        is_made_here = bool(on_device)
        if (device := kwargs.get("device")) is not None:
            is_made_here = torch.device(device).type == "cuda"
            kwargs["device"] = torch.device("cpu")
            if is_made_here and elsewhere:
                self._copies(str(func))
            elif on_device and not is_made_here:
                self._waits(str(func))
        elif on_device:
            self._check(func, args, elsewhere)
        known = {id(x.host): x for x in on_device}
        host_args, host_kwargs = tree_map(lambda x: x.host if isinstance(x, OnDevice) else x, (args, kwargs))
        result = func(*host_args, **host_kwargs)
        if self.graph is not None and is_made_here:
            self.graph.steps.append(_again(func, host_args, host_kwargs, result))
        if not is_made_here:
            return result

        def wrapped(x: Any) -> Any:
            return known.get(id(x), None) if id(x) in known else OnDevice(x) if isinstance(x, torch.Tensor) else x

        return tree_map(wrapped, result)

    def launched(self, kernel: Callable[[], object]) -> None:
        """Runs a kernel, which reads and writes `host` memory."""
        kernel()
        if self.graph is not None:
            self.graph.steps.append(kernel)

    def _check(self, func: Any, args: Any, elsewhere: list[torch.Tensor]) -> None:
        """What a device does with tensors that are not on it."""
        if func in _WAITS:
            self._waits(str(func))
        if func in (_aten.index.Tensor, _aten.index_put_.default, _aten.index_put.default, _aten._index_put_impl_.default):
            indices = [x for x in args[1] if x is not None]
            if any(x.dtype in (torch.bool, torch.uint8) for x in indices):
                self._waits(f"{func} by a mask")
            if any(not isinstance(x, OnDevice) for x in indices):
                self._copies(f"{func} by an index of the host")
            elsewhere = [x for x in elsewhere if all(x is not index for index in indices)]
        if func is _aten.copy_.default:
            target = args[0]
            (self._copies if isinstance(target, OnDevice) else self._waits)(str(func)) if elsewhere else None
            if elsewhere and elsewhere[0].dim() == 0:
                return
            return
        if any(x.dim() > 0 for x in elsewhere):
            raise RuntimeError(f"{func}: expected all tensors to be on the same device, but found cuda:0 and cpu")

    def _waits(self, what: str) -> None:
        self.waits.append(what)
        self._refuse_in_capture(what)

    def _copies(self, what: str) -> None:
        self.uploads.append(what)
        self._refuse_in_capture(what)

    def _refuse_in_capture(self, what: str) -> None:
        if self.graph is not None:
            raise RuntimeError(f"{what}: operation not permitted when stream is capturing")


def _again(func: Any, args: Any, kwargs: Any, result: Any) -> Callable[[], object]:
    """The same operation on the same memory."""
    results = [x for x in tree_leaves(result) if isinstance(x, torch.Tensor)]
    given = {x.untyped_storage().data_ptr() for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)}
    writes = [x for x in results if x.untyped_storage().data_ptr() not in given]  # else a view, or in place

    def run() -> None:
        got = [x for x in tree_leaves(func(*args, **kwargs)) if isinstance(x, torch.Tensor)]
        for held, x in zip(results, got, strict=True):
            if any(held is w for w in writes):
                held.copy_(x)

    return run


@contextlib.contextmanager
def pretend_gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[PretendGPU]:
    """The device in torch, with graphs, events and streams; attention is the reference's."""
    _register_guard()
    device = PretendGPU()

    @contextlib.contextmanager
    def capture(graph: Graph, **_: Any) -> Iterator[None]:
        assert device.graph is None
        device.graph = graph
        try:
            yield
        finally:
            device.graph = None

    class Event:
        def __init__(self, **_: Any) -> None: ...

        def record(self, *_: Any) -> None:
            if device.graph is not None:
                raise RuntimeError("timing events can't be captured")

        def synchronize(self) -> None:
            device._waits("Event.synchronize")

        def elapsed_time(self, _: Any) -> float:
            return 1.0

    stream = SimpleNamespace(wait_stream=lambda _: None, record_event=Event, wait_event=lambda _: None, synchronize=lambda: None)
    fakes = {
        "_lazy_init": lambda: None,
        "is_available": lambda: True,
        "device_count": lambda: 1,
        "get_device_name": lambda *_: "pretended",
        "get_device_capability": lambda *_: (9, 0),
        "get_device_properties": lambda *_: SimpleNamespace(multi_processor_count=2, shared_memory_per_block_optin=227 * 1024),
        "synchronize": lambda *_: device._waits("synchronize"),
        "is_current_stream_capturing": lambda: device.graph is not None,
        "CUDAGraph": Graph,
        "graph": capture,
        "Event": Event,
        "Stream": lambda *_: stream,
        "stream": lambda _: contextlib.nullcontext(),
        "current_stream": lambda *_: stream,
        "memory_allocated": lambda *_: 0,
        "max_memory_allocated": lambda *_: 0,
        "reset_peak_memory_stats": lambda *_: None,
        "empty_cache": lambda: None,
    }
    with monkeypatch.context() as patch:
        for name, fake in fakes.items():
            patch.setattr(torch.cuda, name, fake)
        empty = torch.empty
        patch.setattr(torch, "empty", lambda *sizes, pin_memory=False, **given: empty(*sizes, **given))
        patch.setattr(torch.__future__, "_overwrite_module_params_on_conversion", True)  # `model.to` then makes new parameters
        patch.setenv("KVFOLD_TRITON", "off")
        with device:
            yield device


def _register_guard() -> None:
    """Torch built without CUDA has no guard for its tensors: here the CPU's, which does nothing, serves."""
    library = ctypes.CDLL(str(Path(torch.__file__).parent / "lib" / "libc10.so"))
    registry = (ctypes.c_void_p * 2).in_dll(library, "_ZN3c104impl26device_guard_impl_registryE")
    if not registry[1]:
        registry[1] = registry[0]
