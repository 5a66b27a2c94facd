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
        with torch.inference_mode(False):  # wrappers are ordinary tensors, whatever mode they are made in
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

    def __repr__(self, *, tensor_contents: Any = None) -> str:
        return f"OnDevice({self.host})"

    def __format__(self, form: str) -> str:
        return self.host.__format__(form)

    def tolist(self) -> Any:
        return self.cpu().tolist()

    def __deepcopy__(self, memo: Any) -> Any:
        return self.clone()


class Graph:
    """What `torch.cuda.CUDAGraph` is here."""

    def __init__(self) -> None:
        self.steps: list[Callable[[], object]] = []
        self.made: list[torch.Tensor] = []
        self._before: dict[int, tuple[torch.UntypedStorage, torch.UntypedStorage]] = {}

    def remember(self, func: Any, args: Any, kwargs: Any) -> None:
        """What an operation is about to write over: a device computes nothing while it captures."""
        of_names = {argument.name: argument for argument in func._schema.arguments}
        given = [*zip(func._schema.arguments, args, strict=False), *((of_names[name], x) for name, x in kwargs.items())]
        for argument, x in given:
            if argument.alias_info is not None and argument.alias_info.is_write:
                self.keep(tree_leaves(x))

    def keep(self, written: list[Any]) -> None:
        """Tensors that are about to be written over."""
        for x in written:
            storage = x.untyped_storage()
            self._before.setdefault(storage.data_ptr(), (storage, storage.clone()))

    def captured(self) -> None:
        """Puts everything back that capturing has written over; what it has made holds nothing yet."""
        for storage, before in self._before.values():
            storage.copy_(before)
        for made in self.made:
            made.fill_(torch.nan if made.is_floating_point() else 77)

    def replay(self) -> None:
        for step in self.steps:
            step()

    def reset(self) -> None:
        self.steps = []


class PretendGPU(TorchDispatchMode):
    """The device, for as long as it is entered.

    Attributes:
        waits, uploads: names of operations that waited for the device, and that copied to it, since they were last cleared.
        has_kernels: whether attention is Triton's (see `with_kernels`).
    """

    entered: ClassVar["PretendGPU | None"] = None

    def __init__(self) -> None:
        super().__init__()
        self.waits: list[str] = []
        self.uploads: list[str] = []
        self.graph: Graph | None = None
        self.has_kernels = False

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
        moves = False
        if devices := [x for x in tree_leaves((args, kwargs)) if isinstance(x, torch.device)]:
            is_made_here = devices[0].type == "cuda"
            if is_made_here and elsewhere:
                self._copies(str(func))
            elif on_device and not is_made_here:
                self._waits(str(func))
            moves = bool(elsewhere) if is_made_here else bool(on_device)
        elif on_device:
            self._check(func, args, elsewhere)
        known = {id(x.host): x for x in on_device}
        host_args, host_kwargs = tree_map(_on_host, (args, kwargs))
        if self.graph is not None and is_made_here:
            self.graph.remember(func, host_args, host_kwargs)
        result = func(*host_args, **host_kwargs)
        if self.graph is not None and is_made_here:
            again, made = _again(func, host_args, host_kwargs, result)
            self.graph.steps.append(again)
            self.graph.made += made
        if moves and any(result is x for x in host_args):
            result = result.clone()  # the same type on the same host: nothing was to be done, but there are two devices
        if not is_made_here:
            return result

        def wrapped(x: Any) -> Any:
            return known.get(id(x)) if id(x) in known else OnDevice(x) if isinstance(x, torch.Tensor) else x

        return tree_map(wrapped, result)

    def launched(self, kernel: Callable[[], object], given: list[Any]) -> None:
        """Runs a kernel, which reads and writes the memory that it is given."""
        if self.graph is not None:
            self.graph.keep([x for x in given if isinstance(x, torch.Tensor)])
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
            if elsewhere:
                (self._copies if isinstance(args[0], OnDevice) else self._waits)(str(func))
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


def _on_host(x: Any) -> Any:
    if isinstance(x, torch.device):
        return torch.device("cpu")
    return x.host if isinstance(x, OnDevice) else x


def _again(func: Any, args: Any, kwargs: Any, result: Any) -> tuple[Callable[[], object], list[torch.Tensor]]:
    """The same operation on the same memory, and the tensors that it makes."""
    results = [x for x in tree_leaves(result) if isinstance(x, torch.Tensor)]
    given = {x.untyped_storage().data_ptr() for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)}
    writes = [x for x in results if x.untyped_storage().data_ptr() not in given]  # else a view, or in place

    def run() -> None:
        got = [x for x in tree_leaves(func(*args, **kwargs)) if isinstance(x, torch.Tensor)]
        for held, x in zip(results, got, strict=True):
            if any(held is w for w in writes):
                held.copy_(x)

    return run, writes


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
            graph.captured()

    class Event:
        def __init__(self, **_: Any) -> None: ...

        def record(self, *_: Any) -> None:
            if device.graph is not None:
                raise RuntimeError("timing events can't be captured")

        def synchronize(self) -> None:
            device._waits("Event.synchronize")

        def elapsed_time(self, _: Any) -> float:
            return 1.0

    def nothing(*_: Any) -> None: ...

    stream = SimpleNamespace(wait_stream=nothing, record_event=Event, wait_event=nothing, synchronize=nothing)
    fakes = {
        "_lazy_init": nothing,
        "is_available": lambda: True,
        "device_count": lambda: 1,
        "get_device_name": lambda *_: "pretended",
        "get_device_capability": lambda *_: (9, 0),
        "get_device_properties": lambda *_: SimpleNamespace(multi_processor_count=2, shared_memory_per_block_optin=227 * 1024),
        "synchronize": lambda *_: device._waits("synchronize"),
        "is_current_stream_capturing": lambda: device.graph is not None,
        "device": lambda _: contextlib.nullcontext(),
        "CUDAGraph": Graph,
        "graph": capture,
        "Event": Event,
        "Stream": lambda *_: stream,
        "stream": lambda _: contextlib.nullcontext(),
        "current_stream": lambda *_: stream,
        "memory_allocated": lambda *_: 0,
        "max_memory_allocated": lambda *_: 0,
        "reset_peak_memory_stats": nothing,
        "empty_cache": nothing,
    }
    with monkeypatch.context() as patch:
        for name, fake in fakes.items():
            patch.setattr(torch.cuda, name, fake)
        patch.setattr(torch.cuda.nvtx, "range_push", nothing)
        patch.setattr(torch.cuda.nvtx, "range_pop", nothing)
        torch.utils._device._device_constructors()  # remembers torch.empty as it is
        empty, generator = torch.empty, torch.Generator
        patch.setattr(torch, "Generator", lambda device="cpu": generator("cpu"))
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


def with_kernels(device: PretendGPU, monkeypatch: pytest.MonkeyPatch) -> None:
    """Attention by the Triton kernels, in their interpreter."""
    from kvfold.kernels import triton
    from kvfold.kernels.triton import encoding, launch, turnover

    class Launched:
        def __init__(self, kernel: Any):
            self.kernel = kernel

        def __getitem__(self, grid: Any) -> Callable[..., None]:
            def run(*args: Any, **kwargs: Any) -> None:
                given = tree_map(_on_host, (args, kwargs))
                device.launched(lambda: self.kernel[grid](*given[0], **given[1]), tree_leaves(given))

            return run

    for module, name in [
        (launch, "attend_kernel"),
        (launch, "mass_kernel"),
        (launch, "merge_kernel"),
        (launch, "received_kernel"),
        (encoding, "encode_kernel"),
        (encoding, "encode_float8_kernel"),
        (turnover, "come_kernel"),
        (turnover, "leave_kernel"),
        (turnover, "exchange_kernel"),
    ]:
        monkeypatch.setattr(module, name, Launched(getattr(module, name)))
    device.has_kernels = True
    monkeypatch.setattr(triton, "chosen", lambda kind: "triton" if kind == "cuda" and device.has_kernels else None)
