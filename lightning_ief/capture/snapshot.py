"""The state that a forward pass starts from: it can be undone, or run again as it was, without a trace."""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from lightning_ief.capture.recorder import version_of
from lightning_ief.capture.types import CaptureError

__all__ = ["Snapshot", "modes_of", "preserved_state"]

# Classes of the attributes of modules that are state, besides parameters and buffers: hidden states, counters, modes.
_CONTAINERS = frozenset({tuple, list, dict})
_INNER = _CONTAINERS | {Tensor}
_PLAIN = _INNER | {bool, int, float, str, type(None)}


class Snapshot:
    """Buffers, plain attributes and random numbers of a model at one moment.

    Args:
        model: The module whose state, and whose devices' generators, are meant.

    Attributes:
        modules: Its modules.
        modes: See `modes_of`.
        switches: The same of the attributes that are bools alone, of which there are few: words may be labels.

    """

    def __init__(self, model: nn.Module) -> None:
        self.modules = _modules_of(model)
        self._buffers = [
            (module._buffers, name, buffer, None if buffer is None else buffer.detach().clone())
            for module in self.modules
            for name, buffer in module._buffers.items()
        ]
        self._attributes = [_plain_attributes(module) for module in self.modules]
        # Tensors among them are not copied on every batch: whether they are as they were, their versions tell.
        tensors, self._entries = _held(self._attributes)
        self._tensors = [(x, version_of(x)) for x in tensors]
        self.modes, self.switches = _hash_of_modes(self._attributes), _hash_of_modes(self._attributes, words=False)
        cuda = torch.cuda.is_initialized()
        self._devices = {p.device for p in model.parameters() if p.device.type == "cuda"} if cuda else set()
        self._random = torch.get_rng_state(), {device: torch.cuda.get_rng_state(device) for device in self._devices}

    def parameter_versions(self) -> list[int]:
        """Version counters of all parameters, frozen ones too, as they are now."""
        return [p._version for module in self.modules for p in module._parameters.values() if p is not None]

    def restore(self) -> None:
        """Put everything back as it was, but for tensors in plain attributes that have been written to."""
        self._restore_random()
        for owner, name, buffer, value in self._buffers:
            # Writing to a buffer would invalidate graphs that hold it.
            if buffer is not None and value is not None and not torch.equal(buffer, value):
                with torch.no_grad():
                    buffer.copy_(value)
            owner[name] = buffer
        for owner, entries in self._entries.values():
            owner.clear()
            owner.extend(entries) if isinstance(owner, list) else owner.update(entries)
        for module, attributes in zip(self.modules, self._attributes, strict=True):
            _set_plain_attributes(module, attributes)

    @property
    def has_other_tensors(self) -> bool:
        """Whether a buffer, or a tensor in a plain attribute, is another object now."""
        known = {id(x) for x, _ in self._tensors}
        present, _ = _held([_plain_attributes(module) for module in self.modules])
        buffers = any(owner[name] is not buffer for owner, name, buffer, _ in self._buffers)
        return buffers or any(id(x) not in known for x in present)

    @property
    def has_drawn(self) -> bool:
        """Whether random numbers have been drawn from torch's generators since."""
        on_cpu = not torch.equal(torch.get_rng_state(), self._random[0])
        return on_cpu or any(not torch.equal(torch.cuda.get_rng_state(d), x) for d, x in self._random[1].items())

    def require_unwritten(self) -> None:
        """Raise CaptureError if a tensor in a plain attribute has been written to."""
        if any(version_of(x) != version for x, version in self._tensors):
            raise CaptureError(
                "A forward pass has written to a tensor in a plain attribute of a module, so that it can't be run "
                "again from where it started. Assign a new tensor there, or make it a buffer: register_buffer()."
            )

    def _restore_random(self) -> None:
        torch.set_rng_state(self._random[0])
        for device, state in self._random[1].items():
            torch.cuda.set_rng_state(state, device)

    @contextmanager
    def replayed(self) -> Iterator[None]:
        """Run a forward pass from this moment, on copies: nothing of the model or the generators changes.

        Yields:
            Nothing.

        """
        self.require_unwritten()
        present = [owner[name] for owner, name, _, _ in self._buffers]
        attributes = [_plain_attributes(module) for module in self.modules]
        with torch.random.fork_rng(devices=self._devices):
            self._restore_random()
            for owner, name, _, value in self._buffers:
                owner[name] = None if value is None else value.clone()
            copies: dict[int, Any] = {}
            for module, started in zip(self.modules, self._attributes, strict=True):
                _set_plain_attributes(module, {name: self._copied(x, copies) for name, x in started.items()})
            try:
                yield
            finally:
                for (owner, name, _, _), buffer in zip(self._buffers, present, strict=True):
                    owner[name] = buffer
                for module, each in zip(self.modules, attributes, strict=True):
                    _set_plain_attributes(module, each)

    def _copied(self, x: Any, copies: dict[int, Any]) -> Any:
        """A copy of an attribute as it was; what stands in several places has one copy."""
        kind = x.__class__
        if kind not in _INNER:
            return x
        if id(x) not in copies:
            if kind is Tensor:
                copies[id(x)] = x.clone()
            elif kind is tuple:
                copies[id(x)] = tuple(self._copied(each, copies) for each in x)
            else:
                entries = self._entries[id(x)][1]
                copies[id(x)] = new = kind()  # before its entries, one of which may be the container itself
                if kind is list:
                    new.extend(self._copied(each, copies) for each in entries)
                else:
                    new.update((name, self._copied(each, copies)) for name, each in entries.items())
        return copies[id(x)]


def _modules_of(model: nn.Module) -> list[nn.Module]:
    """All modules of a model, in a fraction of the time that `modules()` takes."""
    found = {id(model): model}
    queue = [model]
    for module in queue:
        for child in module._modules.values():
            if child is not None and id(child) not in found:
                found[id(child)] = child
                queue.append(child)
    return queue


def _held(attributes: list[dict[str, Any]]) -> tuple[list[Tensor], dict[int, tuple[Any, Any]]]:
    """The tensors in attributes and their containers; and each list and dict beside its entries, by its id."""
    tensors: list[Tensor] = []
    entries: dict[int, tuple[Any, Any]] = {}

    def look_at(x: Any) -> None:
        kind = x.__class__
        if kind is Tensor:
            tensors.append(x)
        elif kind in _CONTAINERS and id(x) not in entries:
            if kind is not tuple:
                entries[id(x)] = x, x.copy()
            inside = x.values() if kind is dict else x
            if not _INNER.isdisjoint(map(type, inside)):  # sizes of kernels and the like are passed over quickly
                for each in inside:
                    look_at(each)

    for each in attributes:
        for x in each.values():
            if x.__class__ in _INNER:
                look_at(x)
    return tensors, entries


def _plain_attributes(module: nn.Module) -> dict[str, Any]:
    # By the class itself, which takes half the time: every batch looks at every module.
    return {name: x for name, x in vars(module).items() if x.__class__ in _PLAIN and name[0] != "_"}


def _set_plain_attributes(module: nn.Module, attributes: dict[str, Any]) -> None:
    for name in _plain_attributes(module).keys() - attributes.keys():
        del vars(module)[name]
    vars(module).update(attributes)


def _hash_of_modes(attributes: list[dict[str, Any]], words: bool = True) -> int:
    classes = (bool, str) if words else (bool,)
    return hash(tuple(x for each in attributes for x in each.values() if x.__class__ in classes))


def modes_of(model: nn.Module) -> int:
    """A number that tells the modes of a model's modules apart: train or eval, and other switches and words."""
    return _hash_of_modes([_plain_attributes(module) for module in _modules_of(model)])


def preserved_state(model: nn.Module) -> AbstractContextManager[None]:
    """A context in which forward passes leave buffers, plain attributes and torch's random numbers as they are."""
    return Snapshot(model).replayed()
