"""Judges an ONNX graph before any library reads it.

Libraries differ in which files they let a graph name, and some read `../secret`. So a graph's own bytes, a protocol
buffer, are walked here: weights may lie in the part's own file only and inside of it, native code is refused wherever
it is, and what is nested too deep or in too many pieces is not walked at all. Field numbers are those of `onnx.proto`;
fields that say nothing about files or operators are passed over.
"""

from __future__ import annotations

from collections.abc import Iterator

MOST_FIELDS = 1_000_000
MOST_DEPTH = 12
MOST_DIMENSION = 1 << 40
MOST_RANK = 32

VARINT, FIXED64, BYTES, FIXED32 = 0, 1, 2, 5

# ModelProto, GraphProto, FunctionProto
GRAPH, TRAINING, FUNCTIONS = 7, 20, 25
NODES, INITIALIZERS, SPARSE_INITIALIZERS = 1, 5, 15
FUNCTION_NODES, FUNCTION_DOMAIN, FUNCTION_ATTRIBUTES = 7, 10, 11
# NodeProto, AttributeProto, SparseTensorProto
OPERATOR, ATTRIBUTES, DOMAIN = 4, 5, 7
ATTRIBUTE_TENSORS, ATTRIBUTE_GRAPHS, ATTRIBUTE_SPARSE = (5, 10), (6, 11), (22, 23)
SPARSE_VALUES, SPARSE_INDICES = 1, 2
# TensorProto, StringStringEntryProto
DIMS, DATA_TYPE, NAME, EXTERNAL_DATA, DATA_LOCATION = 1, 2, 8, 13, 14
KEY, VALUE = 1, 2
EXTERNAL = 1

# By TensorProto.DataType; narrower ones are packed, and no export writes them beside a graph.
ITEM_BYTES = {1: 4, 2: 1, 3: 1, 4: 2, 5: 2, 6: 4, 7: 8, 9: 1, 10: 2, 11: 8, 12: 4, 13: 8, 16: 2}
REQUIRED = {b"location", b"length"}
NATIVE_CODE = b"EPContext"
DOMAINS = (b"", b"ai.onnx", b"com.microsoft")


class RefusedGraph(ValueError):
    """Why a graph is not handed to any library."""


def check_graph(raw: bytes, weights: str, weights_bytes: int) -> None:
    """Refuse a graph that is none, has native code, or has weights anywhere but in `weights`, a file of that size.

    Raises RefusedGraph.
    """
    _Walk(weights, weights_bytes).model(memoryview(raw))


class _Walk:
    def __init__(self, weights: str, weights_bytes: int) -> None:
        self._weights = weights.encode()
        self._weights_bytes = weights_bytes
        self._left = MOST_FIELDS
        self._domains = set(DOMAINS)

    def model(self, raw: memoryview) -> None:
        fields = list(self._fields(raw))
        functions = [_message(value) for number, value in fields if number == FUNCTIONS]
        for function in functions:
            fields_of = self._fields(function)
            self._domains |= {bytes(_message(value)) for number, value in fields_of if number == FUNCTION_DOMAIN}
        graphs = [_message(value) for number, value in fields if number == GRAPH]
        if not graphs:
            raise RefusedGraph("is no ONNX graph")
        if any(number == TRAINING for number, _ in fields):
            raise RefusedGraph("brings its own training")
        for function in functions:
            self._function(function)
        for graph in graphs:
            self._graph(graph, 0)

    def _fields(self, raw: memoryview) -> Iterator[tuple[int, int | memoryview]]:
        """Number and value of every field: an int of a varint, a view of bytes; fixed-width numbers are left out."""
        position, end = 0, len(raw)
        while position < end:
            self._left -= 1
            if self._left < 0:
                raise RefusedGraph(f"has more than {MOST_FIELDS} pieces")
            tag, position = (raw[position], position + 1) if raw[position] < 0x80 else _varint(raw, position)
            number, wire = tag >> 3, tag & 7
            if not number:
                raise RefusedGraph("is no ONNX graph")
            if wire == BYTES:
                if position < end and raw[position] < 0x80:  # most are, and this is where the time goes
                    length, position = raw[position], position + 1
                else:
                    length, position = _varint(raw, position)
                if length > end - position:
                    raise RefusedGraph("ends in the middle")
                yield number, raw[position : position + length]
                position += length
            elif wire == VARINT:
                value, position = _varint(raw, position)
                yield number, value
            elif wire in (FIXED64, FIXED32):
                position += 8 if wire == FIXED64 else 4
                if position > end:
                    raise RefusedGraph("ends in the middle")
            else:
                raise RefusedGraph("is no ONNX graph")

    def _graph(self, raw: memoryview, depth: int) -> None:
        if depth > MOST_DEPTH:
            raise RefusedGraph(f"has graphs in graphs, more than {MOST_DEPTH} deep")
        for number, value in self._fields(raw):
            if number == NODES:
                self._node(_message(value), depth)
            elif number == INITIALIZERS:
                self._tensor(_message(value), beside=depth == 0)
            elif number == SPARSE_INITIALIZERS:
                self._sparse(_message(value))

    def _function(self, raw: memoryview) -> None:
        for number, value in self._fields(raw):
            if number == FUNCTION_NODES:
                self._node(_message(value), 0)
            elif number == FUNCTION_ATTRIBUTES:
                self._attribute(_message(value), 0)

    def _node(self, raw: memoryview, depth: int) -> None:
        for number, value in self._fields(raw):
            if number == ATTRIBUTES:
                self._attribute(_message(value), depth)
            elif number == OPERATOR and _message(value) == NATIVE_CODE:
                raise RefusedGraph("carries native code (an EPContext node), which is never run")
            elif number == DOMAIN and bytes(_message(value)) not in self._domains:
                raise RefusedGraph(f"has an operator of {_shown(value)}, which is not known")

    def _attribute(self, raw: memoryview, depth: int) -> None:
        for number, value in self._fields(raw):
            if number in ATTRIBUTE_TENSORS:
                self._tensor(_message(value), beside=False)
            elif number in ATTRIBUTE_GRAPHS:
                self._graph(_message(value), depth + 1)
            elif number in ATTRIBUTE_SPARSE:
                self._sparse(_message(value))

    def _sparse(self, raw: memoryview) -> None:
        for number, value in self._fields(raw):
            if number in (SPARSE_VALUES, SPARSE_INDICES):
                self._tensor(_message(value), beside=False)

    def _tensor(self, raw: memoryview, beside: bool) -> None:
        """`beside` tells whether its values may lie in the file of weights."""
        location, kind, dims, entries, name = 0, 0, [], [], "?"
        for number, value in self._fields(raw):
            if number == DIMS:
                dims += [value] if isinstance(value, int) else _packed(value)
            elif number == DATA_TYPE:
                kind = _number(value)
            elif number == NAME:
                name = _shown(value)
            elif number == EXTERNAL_DATA:
                entries.append(self._entry(_message(value)))
            elif number == DATA_LOCATION:
                location = _number(value)
        if len(dims) > MOST_RANK or any(dim > MOST_DIMENSION for dim in dims):
            raise RefusedGraph(f"has a tensor {name} of no size that could be: {dims[:MOST_RANK]}")
        if location == 0 and not entries:
            return
        if location != EXTERNAL or not beside:
            raise RefusedGraph(f"has a tensor {name} with values in another file, which only weights may have")
        self._check_entries(name, kind, dims, entries)

    def _entry(self, raw: memoryview) -> tuple[bytes, bytes]:
        found = {number: bytes(_message(value)) for number, value in self._fields(raw)}
        return found.get(KEY, b""), found.get(VALUE, b"")

    def _check_entries(self, name: str, kind: int, dims: list[int], entries: list[tuple[bytes, bytes]]) -> None:
        where = dict(entries)
        if len(where) != len(entries) or not REQUIRED <= set(where) <= REQUIRED | {b"offset"}:
            raise RefusedGraph(f"has a tensor {name} that does not say in the usual way where its values lie")
        if where[b"location"] != self._weights:
            raise RefusedGraph(
                f"has a tensor {name} with values in {_shown(where[b'location'])}, expected {self._weights.decode()}"
            )
        offset, length = _decimal(where.get(b"offset", b"0")), _decimal(where[b"length"])
        needed = ITEM_BYTES.get(kind, 0)
        for dim in dims:
            needed = min(needed * dim, self._weights_bytes + 1)
        if kind not in ITEM_BYTES or offset is None or length != needed or offset + length > self._weights_bytes:
            raise RefusedGraph(
                f"has a tensor {name} with {_shown(where[b'length'])} bytes at {_shown(where.get(b'offset', b'0'))}, "
                f"expected {needed}, inside the {self._weights_bytes} of {self._weights.decode()}"
            )


def _varint(raw: memoryview, position: int) -> tuple[int, int]:
    value = shift = 0
    for at in range(position, min(position + 10, len(raw))):
        byte = raw[at]
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, at + 1
        shift += 7
    raise RefusedGraph("ends in the middle" if len(raw) - position < 10 else "is no ONNX graph")


def _packed(raw: memoryview) -> list[int]:
    found: list[int] = []
    position = 0
    while position < len(raw) and len(found) <= MOST_RANK:
        value, position = _varint(raw, position)
        found.append(value)
    return found


def _message(value: int | memoryview) -> memoryview:
    if isinstance(value, int):
        raise RefusedGraph("is no ONNX graph")
    return value


def _number(value: int | memoryview) -> int:
    if not isinstance(value, int):
        raise RefusedGraph("is no ONNX graph")
    return value


def _decimal(text: bytes) -> int | None:
    return int(text) if text.isdigit() and len(text) < 20 else None


def _shown(text: int | memoryview | bytes) -> str:
    """For a message: 40 characters, none that a terminal would obey."""
    raw = text if isinstance(text, bytes) else bytes(_message(text))
    return ascii(raw.decode(errors="replace"))[1:-1][:40]
