"""Strategies that damage real files: bytes, JSON, and headers of safetensors."""

import contextlib
import json
import struct
import time
import warnings
from collections.abc import Callable, Iterator
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from hypothesis.errors import HypothesisWarning
from safetensors.torch import load, save
from torch import Tensor

from posmask.errors import OutOfMemory, PosmaskError

amounts = pytest.mark.parametrize("amount", [40, pytest.param(1000, marks=pytest.mark.slow)])
"""Cases of a test in `make test` and in `make test-all`."""
few = pytest.mark.parametrize("amount", [8, pytest.param(200, marks=pytest.mark.slow)])
"""The same for tests whose cases take a tenth of a second or more."""


def run_cases(test: Callable[[Any], None], strategy: st.SearchStrategy[Any], amount: int) -> None:
    """Run a test on this number of values of a strategy, the same ones each time; each may take 20 seconds of CPU."""

    def timed(value):
        started = time.process_time()
        test(value)
        assert time.process_time() - started < 20, "a damaged file takes long"

    quiet = {"database": None, "derandomize": True, "suppress_health_check": list(HealthCheck)}
    quiet["phases"] = [Phase.generate]  # Shrinking a file takes long.
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", HypothesisWarning)  # A failure prints the whole file.
        settings(max_examples=amount, deadline=None, **quiet)(given(strategy)(timed))()


@contextlib.contextmanager
def refused_or_fine(spare_bytes: int | None = 2**31) -> Iterator[None]:
    """Allow an error of posmask with a short message and a remedy. Other errors fail.

    Args:
        spare_bytes: memory that may be taken in addition, where the system can limit it; None sets no limit, as V8
            needs, which draws charts and stays in the process.
    """
    try:
        with _little_memory(spare_bytes) if spare_bytes else contextlib.nullcontext():
            yield
    except OutOfMemory:
        raise
    except PosmaskError as error:
        assert_sentence(str(error))


def assert_sentence(message: str) -> None:
    """Check that a message is short and names a remedy, after a colon or semicolon."""
    assert len(message) < 1500, message
    assert ": " in message or "; " in message, message


@contextlib.contextmanager
def _little_memory(spare_bytes: int) -> Iterator[None]:
    """Limit the process to so many bytes more than it has now."""
    try:
        import resource

        pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[0])
    except (ImportError, OSError):
        yield
        return
    before = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + spare_bytes, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)


_SPELLED = {'"@deep@"': "[" * 100_000 + "]" * 100_000, '"@digits@"': "9" * 5000, '"@infinite@"': "1e999"}
"""Values that Python cannot write as JSON."""
_NOT_FINITE = [float("nan"), float("inf"), float("-inf")]
odd_numbers = st.sampled_from(
    [0, -1, 1, 2, 3, 7, 2**31, 2**63, 10**12, 10**30, 10**400, 0.0, -0.0, 0.5, -1.5, 1e308, 1e-320, *_NOT_FINITE]
)
odd_values = st.one_of(
    odd_numbers,
    st.sampled_from([None, True, False, "", "\ud800", "\0", "a" * 5000, "../../x", [], {}, [None], [[]], {"": None}]),
    st.sampled_from([word.strip('"') for word in _SPELLED]),
    st.integers(),
    st.floats(),
    st.text(max_size=12),
    st.lists(odd_numbers, max_size=4),
)
Place = tuple[Any, ...]


def places(value: Any, place: Place = ()) -> list[Place]:
    """The places of all values in JSON, outermost first."""
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [place, *(deeper for key, entry in inner for deeper in places(entry, (*place, key)))]


@st.composite
def changed_json(draw: Any, text: str) -> str:
    """JSON of which one or two values are odd, missing or have other names."""
    values = json.loads(text)
    for _ in range(draw(st.integers(1, 2))):
        *path, last = draw(st.sampled_from(places(values))) or [None]
        if last is None:
            return _spelled(draw(odd_values))
        parent = values
        for key in path:
            parent = parent[key]
        way = draw(st.sampled_from(["replace", "replace", "replace", "remove", "rename"]))
        if way == "replace":
            parent[last] = deepcopy(draw(odd_values))
        elif way == "remove" or isinstance(parent, list):
            del parent[last]
        else:
            parent[draw(st.text(max_size=8))] = parent.pop(last)
        if not isinstance(values, dict | list):
            break
    return _spelled(values)


def _spelled(values: Any) -> str:
    text = json.dumps(values)
    for word, spelled in _SPELLED.items():
        text = text.replace(word, spelled)
    return text


@st.composite
def changed_bytes(draw: Any, content: bytes) -> bytes:
    """A file that is cut off, or of which a piece is overwritten, left out, doubled or preceded by another."""
    start = draw(st.integers(0, len(content)))
    piece = content[start : start + draw(st.sampled_from([1, 2, 4, 8, 64, 4096]))]
    rest = content[start + len(piece) :]
    way = draw(st.sampled_from(["cut", "bit", "ones", "zeros", "remove", "double", "insert"]))
    if way == "cut":
        return content[:start]
    if way == "bit" and piece:
        new = bytes([piece[0] ^ (1 << draw(st.integers(0, 7)))]) + piece[1:]
    elif way == "insert":
        new = draw(st.binary(max_size=16)) + piece
    else:
        new = {"ones": b"\xff" * len(piece), "zeros": bytes(len(piece)), "double": piece * 2}.get(way, b"")
    return content[:start] + new + rest


@st.composite
def changed_safetensors(draw: Any, content: bytes) -> bytes:
    """A safetensors file whose header has changed, or whose bytes have."""
    if draw(st.integers(0, 2)) == 0:
        return draw(changed_bytes(content))
    (n_header,) = struct.unpack("<Q", content[:8])
    header = draw(changed_json(content[8 : 8 + n_header].decode())).encode()
    return struct.pack("<Q", len(header)) + header + content[8 + n_header :]


def changed_file(path: Path) -> st.SearchStrategy[bytes]:
    """The changed content of a file, according to its format."""
    content = path.read_bytes()
    if path.suffix == ".safetensors":
        return st.one_of(changed_safetensors(content), changed_tensors(content), changed_tensors(content))
    if path.suffix == ".csv":
        return st.one_of(changed_table(content), changed_bytes(content))
    if path.suffix == ".json":
        as_json = changed_json(content.decode()).map(str.encode)
        return st.one_of(as_json, as_json, changed_bytes(content))
    return changed_bytes(content)


def changed_folder(folder: Path, names: list[str]) -> st.SearchStrategy[tuple[str, bytes]]:
    """One of these files of a folder, and its changed content."""
    return st.one_of([st.tuples(st.just(name), changed_file(folder / name)) for name in names])


@st.composite
def changed_tensors(draw: Any, content: bytes) -> bytes:
    """A valid safetensors file of which one tensor has another shape, type or values, or is missing."""
    tensors = load(content)
    name = draw(st.sampled_from(sorted(tensors)))
    tensor = tensors[name]
    ways: dict[str, Callable[[], Tensor]] = {
        "none": lambda: tensor[:0] if tensor.dim() else tensor,
        "fewer": lambda: tensor[:-1] if tensor.dim() else tensor,
        "narrower": lambda: tensor[..., :-1] if tensor.dim() else tensor,
        "more": lambda: torch.cat([tensor, tensor]) if tensor.dim() else tensor[None],
        "deeper": lambda: tensor[None],
        "scalar": lambda: tensor.flatten()[0] if tensor.numel() else tensor,
        "transposed": lambda: tensor.T if tensor.dim() == 2 else tensor,
        "nan": lambda: torch.full(tensor.shape, float("nan")),
        "infinite": lambda: torch.full(tensor.shape, float("-inf")),
        "huge": lambda: torch.full(tensor.shape, 2**31 - 1),
        "negative": lambda: torch.full(tensor.shape, -5),
        "float64": lambda: tensor.double(),
        "int64": lambda: tensor.long(),
        "bool": lambda: tensor.bool(),
    }
    way = draw(st.sampled_from(["missing", "renamed", *ways]))
    rest = {other: kept for other, kept in tensors.items() if other != name}
    if way in ways:
        rest[name] = ways[way]().contiguous()
    elif way == "renamed":
        rest["other"] = tensor
    return save(rest)


@st.composite
def changed_table(draw: Any, content: bytes) -> bytes:
    """A CSV file of which one or two fields are odd."""
    lines = [line.split(",") for line in content.decode().split("\n")]
    odd = ["nan", "inf", "-inf", "-1", "1e999", "9" * 5000, "", "x", "a;b=c", "=1;=", "k=1;k=2", "\0", '"', "2.5", "é"]
    for _ in range(draw(st.integers(1, 2))):
        line = draw(st.sampled_from([line for line in lines if len(line) > 1]))
        line[draw(st.integers(0, len(line) - 1))] = draw(st.sampled_from(odd) | st.text(max_size=8))
    return "\n".join(",".join(line) for line in lines).encode()
