"""Tensors of the pretended device, and what torch's operations do with them: queue, copy, view, refuse, or wait.

Every operation on such a tensor comes here, and where the mode is active also those that make one. The device itself is
given from outside; see device.py.
"""

from collections.abc import Callable, Iterable, Sequence
from functools import cache
from typing import Any, Protocol

import torch
from torch import Tensor
from torch._ops import OpOverload
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

from tests.pretend_cuda.memory import Allocator, Memory
from tests.pretend_cuda.streams import Stream, Timeline, Work

aten = torch.ops.aten
_WAITING = "a hidden wait"
_EMPTY = ("empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided")
_ON_HOST = torch.device("cpu")


class Machine(Protocol):
    """The device and the host's pinned memory."""

    timeline: Timeline
    allocator: Allocator

    def pin(self, tensor: Tensor) -> Tensor:
        """Note that this memory of the host is pinned."""

    def is_pinned(self, tensor: Tensor) -> bool: ...


class PretendTensor(Tensor):
    """On cuda:0, as far as anybody can see. inner: the memory of the host that plays its memory."""

    inner: Tensor
    memory: Memory
    machine: Machine
    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, inner: Tensor, memory: Memory, machine: Machine) -> "PretendTensor":
        tensor: PretendTensor = Tensor._make_wrapper_subclass(
            cls,
            inner.size(),
            strides=inner.stride(),
            storage_offset=inner.storage_offset(),
            dtype=inner.dtype,
            device="cuda:0",
        )
        tensor.inner, tensor.memory, tensor.machine = inner, memory, machine
        return tensor

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        machine = next(leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, PretendTensor)).machine
        return Dispatcher(machine).run(func, args, kwargs or {})

    def __repr__(self, *, tensor_contents: object = None) -> str:
        return f"PretendTensor({tuple(self.shape)}, {self.dtype})"

    def tolist(self) -> Any:
        return self.cpu().tolist()

    def data_ptr(self) -> int:
        return self.inner.data_ptr()

    def untyped_storage(self) -> Any:
        return self.inner.untyped_storage()

    def record_stream(self, stream: Stream) -> None:
        self.memory.users.add(stream)


class PretendMode(TorchDispatchMode):
    """Active in every thread that may make tensors on the device."""

    def __init__(self, machine: Machine) -> None:
        super().__init__()
        self._machine = machine

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return Dispatcher(self._machine, self).run(func, args, kwargs or {})


class Dispatcher:
    """Carries out one operation."""

    def __init__(self, machine: Machine, mode: TorchDispatchMode | None = None) -> None:
        self._machine = machine
        self._timeline = machine.timeline
        self._mode = mode

    def run(self, func: OpOverload, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
        special = _SPECIAL.get(func)
        if special is not None:
            return special(self, *args, **kwargs)
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        here = [tensor for tensor in tensors if isinstance(tensor, PretendTensor)]
        is_made_here = _is_cuda(kwargs.get("device"))
        if is_composite(func) and (here or is_made_here):
            return self._decomposed(func, args, kwargs)
        if not here and not is_made_here:
            return self._on_host(func, args, kwargs)
        if kwargs.get("device") is not None and not is_made_here:  # as empty_like(x, device="cpu")
            return self._on_host(func, _inner(args), kwargs)
        return self._on_device(func, args, kwargs, here, tensors)

    def _decomposed(self, func: OpOverload, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
        if self._mode is None:
            return func.decompose(*args, **kwargs)
        with self._mode:
            return func.decompose(*args, **kwargs)

    def _on_host(self, func: OpOverload, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
        if not kwargs.get("pin_memory"):
            return func(*args, **kwargs)
        return self._machine.pin(func(*args, **kwargs | {"pin_memory": False}))

    def _on_device(
        self,
        func: OpOverload,
        args: Sequence[Any],
        kwargs: dict[str, Any],
        here: list[PretendTensor],
        tensors: list[Tensor],
    ) -> Any:
        self._check_devices(func, tensors, here)
        if "device" in kwargs:
            kwargs = kwargs | {"device": _ON_HOST}
        kwargs = {name: value for name, value in kwargs.items() if name != "pin_memory"}
        inner_args, inner_kwargs = _snapshot(_inner((args, kwargs)), here)
        work = _with(func, inner_args, inner_kwargs)
        if func.is_view:
            return self._view(here[0], work)
        written = _written(func, args, kwargs)
        if any(_is_mask(index) for index in _indices(func, args)):
            self._wait("an index that is a mask")
        if written:
            self.queue(work)
            return written[0] if len(written) == 1 else tuple(written)
        return self._new(func, work, inner_args, inner_kwargs)

    def _check_devices(self, func: OpOverload, tensors: list[Tensor], here: list[PretendTensor]) -> None:
        """As CUDA, take the host's numbers (tensors without a dimension), and its indices at the price of a wait."""
        foreign = [tensor for tensor in tensors if not isinstance(tensor, PretendTensor)]
        if not foreign or not here:
            return
        if func in _INDEXING:  # a value without a dimension is copied there, too
            self._wait("an index or a value in the host's memory")
        elif any(tensor.dim() for tensor in foreign):
            raise RuntimeError(f"{func}: expected all tensors to be on the same device, found cuda:0 and cpu")

    def _view(self, base: PretendTensor, work: Callable[[], Any]) -> Any:
        with torch.inference_mode():
            views = work()
        with torch.inference_mode(base.is_inference()):  # a view is what its base is
            return tree_map(lambda view: PretendTensor(view, base.memory, self._machine), views)

    def _new(self, func: OpOverload, work: Callable[[], Any], args: Any, kwargs: Any) -> Any:
        """Take memory for what comes of an operation, and queue it."""
        try:
            shapes = func(*tree_map(_meta, args), **tree_map(_meta, kwargs))
        except (NotImplementedError, RuntimeError):  # the shape depends on numbers that have to be looked at
            self._wait(str(func))
            with torch.inference_mode():
                found = work()
            return tree_map(self.copy_of, found)
        results = tree_map(self.empty, shapes)
        if func.overloadpacket.__name__ not in _EMPTY:
            inners = [result.inner for result in tree_leaves(results)]
            self.queue(lambda: _fill(inners, work()))
        return results

    def empty(self, like: Tensor) -> PretendTensor:
        """Return new memory of the device; like: of any device, its shape, strides and type."""
        with torch.inference_mode():
            inner = torch.empty_strided(like.size(), like.stride(), dtype=like.dtype, device="cpu")
            memory = self._machine.allocator.take(inner)
        return PretendTensor(inner, memory, self._machine)

    def copy_of(self, found: Any) -> Any:
        """Return a number as it is, and a tensor of the host as one of the device, at once."""
        if not isinstance(found, Tensor):
            return found
        result = self.empty(found)
        with torch.inference_mode():
            result.inner.copy_(found)
        return result

    def queue(self, run: Callable[[], Any]) -> None:
        """Put work on the current stream."""
        self._timeline.queue(Work(run), self._timeline.current_stream())

    def _wait(self, why: str) -> None:
        self._timeline.about_to_wait(f"{_WAITING}: {why}")
        self._timeline.current_stream().synchronize()

    # --- what is no ordinary operation --------------------------------------------------------------------------------

    def item(self, tensor: Tensor) -> Any:
        if not isinstance(tensor, PretendTensor):
            return aten._local_scalar_dense.default(tensor)
        self._wait("a number that the host wants to know")
        return aten._local_scalar_dense.default(tensor.inner)

    def equal(self, tensor: Tensor, other: Tensor) -> Any:
        here = [isinstance(one, PretendTensor) for one in (tensor, other)]
        if any(here):
            if not all(here):
                raise RuntimeError("torch.equal: expected all tensors to be on the same device")
            self._wait("torch.equal")
        return aten.equal.default(_inner(tensor), _inner(other))

    def lift_fresh(self, tensor: Tensor) -> Tensor:
        return tensor

    def pin_memory(self, tensor: Tensor, device: object = None) -> Tensor:
        if isinstance(tensor, PretendTensor):
            raise TypeError("only memory of the host can be pinned")
        if self._timeline.capture is not None:
            raise RuntimeError("operation not permitted when stream is capturing: memory is pinned")
        return tensor if self._machine.is_pinned(tensor) else self._machine.pin(tensor.clone())

    def is_pinned(self, tensor: Tensor, device: object = None) -> bool:
        return not isinstance(tensor, PretendTensor) and self._machine.is_pinned(tensor)

    def to_copy(self, source: Tensor, **kwargs: Any) -> Tensor:
        """Copy to a device or to another type; a copy to the host that need not be waited for is pinned, as torch's."""
        device = torch.device(kwargs.pop("device", None) or source.device)
        non_blocking = kwargs.pop("non_blocking", False)
        kwargs.pop("pin_memory", None)
        is_here = isinstance(source, PretendTensor)
        if not is_here and device.type == "cpu":
            return aten._to_copy.default(source, **kwargs)
        shape = aten._to_copy.default(_meta(source.inner if is_here else source), **kwargs)
        if device.type == "cuda":
            target: Tensor = self.empty(shape)
        else:
            target = torch.empty_strided(shape.size(), shape.stride(), dtype=shape.dtype)
            if non_blocking:
                self._machine.pin(target)
        return self.copy(target, source, non_blocking)

    def copy(self, target: Tensor, source: Tensor, non_blocking: bool = False) -> Tensor:
        """Copy over; between host and device, as cudaMemcpyAsync does and torch with it."""
        there, here = isinstance(target, PretendTensor), isinstance(source, PretendTensor)
        to, of = _inner(target), _inner(source)
        if not there and not here:
            return aten.copy_.default(target, source, non_blocking)
        if there and here:
            self.queue(lambda: to.copy_(of))
            return target
        host = of if there else to
        is_plain = to.dtype == of.dtype and to.is_contiguous() and of.is_contiguous() and to.shape == of.shape
        if not (there and not host.dim()) and not (non_blocking and is_plain and self._machine.is_pinned(host)):
            self._timeline.about_to_wait("a copy between the device and memory that is not pinned, or a blocking one")
            self.queue(lambda: to.copy_(of))
            self._timeline.current_stream().synchronize()
            return target
        if there and not host.dim() and not self._machine.is_pinned(host):
            of = of.clone()  # a number goes along with the launch
        elif not there:
            _spoil(host)
        self.queue(lambda: to.copy_(of))
        return target


_SPECIAL: dict[Any, Callable[..., Any]] = {
    aten._local_scalar_dense.default: Dispatcher.item,
    aten.equal.default: Dispatcher.equal,
    aten.lift_fresh.default: Dispatcher.lift_fresh,
    aten.pin_memory.default: Dispatcher.pin_memory,
    aten._pin_memory.default: Dispatcher.pin_memory,
    aten.is_pinned.default: Dispatcher.is_pinned,
    aten._to_copy.default: Dispatcher.to_copy,
    aten.copy_.default: Dispatcher.copy,
}
_INDEXING = {
    aten.index.Tensor,
    aten.index_put.default,
    aten.index_put_.default,
    aten._index_put_impl_.default,
}


@cache
def is_composite(func: OpOverload) -> bool:
    """Whether an operation is nothing but others."""
    return torch._C._dispatch_has_kernel_for_dispatch_key(func.name(), "CompositeImplicitAutograd")


def _is_cuda(device: Any) -> bool:
    return device is not None and torch.device(device).type == "cuda"


def _inner(tree: Any) -> Any:
    return tree_map(lambda leaf: leaf.inner if isinstance(leaf, PretendTensor) else leaf, tree)


def _snapshot(tree: Any, here: list[PretendTensor]) -> Any:
    """Return arguments with the host's tensors as they are now: CUDA sends numbers along with the launch."""
    ours = {id(tensor.inner) for tensor in here}
    return tree_map(lambda leaf: leaf.clone() if isinstance(leaf, Tensor) and id(leaf) not in ours else leaf, tree)


def _with(func: Callable[..., Any], args: Any, kwargs: Any) -> Callable[[], Any]:
    return lambda: func(*args, **kwargs)


def _meta(leaf: Any) -> Any:
    if isinstance(leaf, torch.device):
        return torch.device("meta")
    if not isinstance(leaf, Tensor):
        return leaf
    return torch.empty_strided(leaf.size(), leaf.stride(), dtype=leaf.dtype, device="meta")


def _written(func: OpOverload, args: Sequence[Any], kwargs: dict[str, Any]) -> list[Any]:
    """Return the arguments that an operation writes to."""
    values = dict(zip((argument.name for argument in func._schema.arguments), args, strict=False)) | kwargs
    infos = {argument.name: argument.alias_info for argument in func._schema.arguments}
    return [values[name] for name, info in infos.items() if info is not None and info.is_write and name in values]


def _indices(func: OpOverload, args: Sequence[Any]) -> Iterable[Any]:
    return args[1] if func in _INDEXING else ()


def _is_mask(index: Any) -> bool:
    return isinstance(index, Tensor) and index.dtype in (torch.bool, torch.uint8)


def _fill(inners: list[Tensor], found: Any) -> None:
    for inner, value in zip(inners, tree_leaves(found), strict=True):
        inner.copy_(value)


def _spoil(target: Tensor) -> None:
    """Fill memory of the host that the device is about to write with rubbish, since nobody may read it before."""
    if target.dtype.is_floating_point:
        target.fill_(float("nan"))
    else:
        target.fill_(True if target.dtype == torch.bool else torch.iinfo(target.dtype).max // 3 * 2)
