"""Takes the memory of tensors from the device to the host and back. May import: torch."""

from __future__ import annotations

from collections.abc import Iterable

import torch


class HostMemory:
    """Holds the values of tensors whose memory on the device is wanted for something else.

    Whole storages move, so that views of one (parameters in a flat buffer, a rank's shard of a parameter) stay what they are. In between
    the tensors keep their shapes and must not be read: `require_present`. Host memory is pinned where a GPU reads it, and kept for the
    next time, because pinning takes longer than copying; torch may round a pinned block up to a power of two. On a CPU the values move
    within host memory.
    """

    def __init__(self) -> None:
        self._held: dict[int, tuple[torch.UntypedStorage, torch.Tensor]] = {}
        self.away = False

    def take(self, tensors: Iterable[torch.Tensor]) -> None:
        """Frees the tensors' storages on the device; a second call before `give_back` does nothing."""
        if self.away:
            return
        storages = {storage_key(tensor): tensor.untyped_storage() for tensor in tensors}
        self._held = {key: (storage, self._room(key, storage)) for key, storage in storages.items()}
        for storage, held in self._held.values():
            held.copy_(_bytes(storage), non_blocking=True)
        _wait(self._held.values())
        for storage, _ in self._held.values():
            storage.resize_(0)
        self.away = True

    def give_back(self) -> None:
        """The tensors are as they were, bit for bit; without a `take` before it does nothing."""
        if not self.away:
            return
        for storage, held in self._held.values():
            storage.resize_(held.numel())
            _bytes(storage).copy_(held, non_blocking=True)
        _wait(self._held.values())
        self.away = False

    def _room(self, key: int, storage: torch.UntypedStorage) -> torch.Tensor:
        known = self._held.get(key)
        if known is not None and known[1].numel() == storage.nbytes():
            return known[1]
        return torch.empty(storage.nbytes(), dtype=torch.uint8, pin_memory=storage.device.type == "cuda")


def storage_key(tensor: torch.Tensor) -> int:
    """The same for all views of one storage, wherever its memory is. Valid while one of them lives."""
    return int(tensor.untyped_storage()._cdata)


def is_present(tensor: torch.Tensor) -> bool:
    return tensor.numel() == 0 or tensor.untyped_storage().nbytes() > 0


def require_present(tensors: Iterable[torch.Tensor], what: str) -> None:
    """Raises RuntimeError where a tensor's memory was taken: reading it would end the process. what: in the message, a plural."""
    if not all(map(is_present, tensors)):
        raise RuntimeError(f"{what} are not on the device (training.offload): bring them back before they are used")


def _bytes(storage: torch.UntypedStorage) -> torch.Tensor:
    return torch.empty(0, dtype=torch.uint8, device=storage.device).set_(storage)


def _wait(pairs: Iterable[tuple[torch.UntypedStorage, torch.Tensor]]) -> None:
    for device in {storage.device for storage, _ in pairs if storage.device.type == "cuda"}:
        torch.cuda.synchronize(device)
