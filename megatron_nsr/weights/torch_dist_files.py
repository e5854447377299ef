"""Reads and writes the files of megatron-core's torch_dist checkpoints tensor by tensor, without a model or a process group.

May import: torch, types. The format is torch.distributed.checkpoint's: `*.distcp` files, in which torch.save wrote pieces of tensors one
after another, and `.metadata`, a pickle that says where each lies. megatron-core 0.16.1 adds common.pt and metadata.json.
"""

from __future__ import annotations

import io
import json
import mmap
import os
import pickle
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, Metadata, MetadataIndex, TensorProperties, TensorStorageMetadata

from megatron_nsr.types import UserError
from megatron_nsr.weights.sliced_writes import write_sliced

FORMAT = {"sharded_backend": "torch_dist", "sharded_backend_version": 1, "common_backend": "torch", "common_backend_version": 1}
Sizes = tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Piece:
    """A part of the tensor `key`: `tensor` lies at `offset` of a whole of the dimensions `whole`."""

    key: str
    offset: Sizes
    whole: Sizes
    tensor: Tensor


@dataclass(frozen=True, slots=True)
class StoredPiece:
    """A piece that is on disk: `length` bytes from byte `start` of `file`."""

    key: str
    offset: Sizes
    whole: Sizes
    sizes: Sizes
    dtype: str
    file: str
    start: int
    length: int

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> StoredPiece:
        """What `asdict` made, after JSON turned its tuples into lists."""
        fields: dict[str, Any] = {name: tuple(value) if isinstance(value, list) else value for name, value in values.items()}
        return cls(**fields)


def write_pieces(path: Path, pieces: Iterable[Piece]) -> list[StoredPiece]:
    """Writes one file, one piece in memory at a time. Raises OSError where the disk does not take it."""
    stored = []
    with path.open("wb") as file, _without_checksums():
        for piece in pieces:
            start = file.tell()
            _save(_own_storage(piece.tensor), file)
            sizes, dtype = tuple(piece.tensor.shape), str(piece.tensor.dtype).removeprefix("torch.")
            stored.append(StoredPiece(piece.key, piece.offset, piece.whole, sizes, dtype, path.name, start, file.tell() - start))
    return stored


def write_index(directory: Path, stored: Iterable[StoredPiece]) -> None:
    """Makes the files of `directory` a checkpoint: the index of all pieces, and an empty common state."""
    tensors: dict[str, TensorStorageMetadata] = {}
    places: dict[MetadataIndex, _StorageInfo] = {}
    for piece in stored:
        properties = TensorProperties(dtype=getattr(torch, piece.dtype))
        tensor = tensors.setdefault(piece.key, TensorStorageMetadata(properties, torch.Size(piece.whole), []))
        tensor.chunks.append(ChunkStorageMetadata(torch.Size(piece.offset), torch.Size(piece.sizes)))
        places[MetadataIndex(piece.key, torch.Size(piece.offset))] = _StorageInfo(piece.file, piece.start, piece.length)
    torch.save({}, directory / "common.pt")
    (directory / "metadata.json").write_text(json.dumps(FORMAT))
    (directory / ".metadata").write_bytes(pickle.dumps(Metadata(tensors, storage_data=places)))


class TorchDistReader:
    """The tensors of a checkpoint's state folder. Raises UserError naming folder and tensor for what is missing or damaged."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        try:
            metadata = pickle.loads((directory / ".metadata").read_bytes())
            self._tensors: Mapping[str, TensorStorageMetadata] = {
                key: value for key, value in metadata.state_dict_metadata.items() if isinstance(value, TensorStorageMetadata)
            }
            self._places: Mapping[MetadataIndex, _StorageInfo] = metadata.storage_data
        except (OSError, pickle.UnpicklingError, EOFError, AttributeError, ImportError, IndexError, ValueError) as error:
            raise UserError(
                f"checkpoint {directory}: .metadata cannot be read ({type(error).__name__}); is it a torch_dist checkpoint?"
            ) from None
        self._buffer = torch.empty(0, dtype=torch.uint8)
        self._at_index: dict[tuple[str, int], dict[Sizes, list[ChunkStorageMetadata]]] = {}

    def sizes(self) -> dict[str, Sizes]:
        """Every tensor's whole dimensions by its key."""
        return {key: tuple(value.size) for key, value in self._tensors.items()}

    def dtype(self, key: str) -> torch.dtype:
        dtype: torch.dtype = self._tensors[key].properties.dtype
        return dtype

    def read(self, key: str, index: Sizes = ()) -> Tensor:
        """The part of tensor `key` at `index` of its first dimensions, put together from its pieces.

        A single piece is a map of its file. Several are copied into the reader's one buffer, which the next call overwrites: new memory
        each time would cost as much time as the reading.
        """
        size = self._tensors[key].size[len(index) :]
        chunks = self._chunks(key, len(index)).get(index, [])
        if sum(chunk.sizes.numel() for chunk in chunks) != size.numel():
            raise UserError(f"checkpoint {self.directory}: the pieces of {key}{list(index) or ''} do not make up the whole")
        if len(chunks) == 1:
            return self._load(key, chunks[0]).view(size)
        needed = size.numel() * self.dtype(key).itemsize
        if self._buffer.numel() < needed:
            self._buffer = torch.empty(0, dtype=torch.uint8)  # the old one goes before the new one comes
            self._buffer = torch.empty(needed, dtype=torch.uint8)
        whole = self._buffer[:needed].view(self.dtype(key)).view(size)
        for chunk in chunks:
            starts, sizes = chunk.offsets[len(index) :], chunk.sizes[len(index) :]
            place = tuple(slice(start, start + length) for start, length in zip(starts, sizes, strict=True))
            whole[place].copy_(self._load(key, chunk).view(sizes))
        return whole

    def _chunks(self, key: str, depth: int) -> dict[Sizes, list[ChunkStorageMetadata]]:
        """The tensor's pieces by their place in the first `depth` dimensions, in which every piece has the size 1."""
        if (key, depth) not in self._at_index:
            found: defaultdict[Sizes, list[ChunkStorageMetadata]] = defaultdict(list)
            for chunk in self._tensors[key].chunks:
                if any(size != 1 for size in chunk.sizes[:depth]):
                    raise UserError(f"checkpoint {self.directory}: a piece of {key} spans several layers, which is not supported")
                found[tuple(chunk.offsets[:depth])].append(chunk)
            self._at_index[key, depth] = found
        return self._at_index[key, depth]

    def _load(self, key: str, chunk: ChunkStorageMetadata) -> Tensor:
        """The piece: a map of its file where it lies there as it is."""
        try:
            place = self._places[MetadataIndex(key, chunk.offsets)]
            with (self.directory / place.relative_path).open("rb", buffering=0) as file:
                span = _Span(file, place.offset, place.length)
                piece: Tensor = torch.load(span, map_location="meta", weights_only=True)
                dtype = self.dtype(key)
                if piece.shape != chunk.sizes or piece.dtype != dtype:
                    raise ValueError(f"a piece is {tuple(piece.shape)} {piece.dtype}, the index says {tuple(chunk.sizes)} {dtype}")
                start = getattr(piece.untyped_storage(), "_checkpoint_offset", None)
                if start is not None and piece.is_contiguous() and not piece.storage_offset():
                    values = memoryview(_mapped(file))[place.offset + start :]
                    return torch.frombuffer(values, dtype=dtype, count=piece.numel()).view(piece.shape)
                span.seek(0)
                loaded: Tensor = torch.load(span, map_location="cpu", weights_only=True)
                return loaded
        except (OSError, EOFError, KeyError, RuntimeError, ValueError, pickle.UnpicklingError) as error:
            reason = " ".join(str(error).split())[:200]
            raise UserError(f"checkpoint {self.directory}: {key} cannot be read ({type(error).__name__}: {reason})") from None


def _mapped(file: io.FileIO) -> mmap.mmap:
    """Writable, as torch wants it, and private: the file stays as it is."""
    return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)


def _own_storage(tensor: Tensor) -> Tensor:
    """The tensor contiguous and, without a copy, alone in its storage, which torch.save writes whole."""
    tensor = tensor.contiguous()
    if tensor.untyped_storage().nbytes() == tensor.numel() * tensor.element_size():
        return tensor
    return torch.frombuffer(memoryview(tensor.view(-1).view(torch.uint8).numpy()), dtype=tensor.dtype).view(tensor.shape)


@contextmanager
def _without_checksums() -> Iterator[None]:
    """torch.save computes a CRC of all bytes, which torch.load never looks at."""
    before = torch.serialization.get_crc32_options()
    torch.serialization.set_crc32_options(False)
    try:
        yield
    finally:
        torch.serialization.set_crc32_options(before)


def _save(tensor: Tensor, file: BinaryIO) -> None:
    """torch.save, which turns an OSError of its file into one of several others: a full disk must be called so."""
    stream = _RememberingStream(file)
    try:
        torch.save(tensor, stream)
    except Exception:
        if stream.error is not None:
            raise stream.error from None
        raise


class _RememberingStream:
    """Passes writes on and keeps the error that ended them."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self.error: OSError | None = None

    def write(self, data: Any) -> int:
        try:
            return write_sliced(self._file, data)
        except OSError as error:
            self.error = error
            raise

    def flush(self) -> None:
        pass  # the file's owner does


class _Span(io.RawIOBase):
    """Bytes `start` to `start + length` of a file as a file."""

    def __init__(self, file: io.FileIO, start: int, length: int) -> None:
        self._file, self._start, self._length, self._position = file, start, length, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        self._position = offset + {os.SEEK_SET: 0, os.SEEK_CUR: self._position, os.SEEK_END: self._length}[whence]
        return self._position

    def tell(self) -> int:
        return self._position

    def readinto(self, buffer: Any) -> int:
        view = memoryview(buffer).cast("B")[: max(0, self._length - self._position)]
        self._file.seek(self._start + self._position)
        count = self._file.readinto(view) or 0
        self._position += count
        return count
