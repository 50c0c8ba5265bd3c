"""A graph that runs is ended when its request is cancelled, and no other is."""

from __future__ import annotations

import threading

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from foresight.engines.errors import Cancelled
from foresight.engines.interrupt import WATCH, Watch, stoppable
from foresight.engines.manifest import Part, TensorSpec
from foresight.engines.onnxruntime import OnnxRuntimeBackend, OnnxRuntimeEngine

ENDLESS = 1 << 40


class SetAt:
    """A token that is set from its `looks`-th look on, and says when it has been looked at."""

    def __init__(self, looks: int) -> None:
        self.looks = looks
        self.looked = threading.Event()

    def is_set(self) -> bool:
        self.looks -= 1
        self.looked.set()
        return self.looks < 0


@pytest.fixture(scope="module")
def counter(tmp_path_factory: pytest.TempPathFactory) -> OnnxRuntimeEngine:
    """Counts to `n`, which may take for ever."""
    body = helper.make_graph(
        [helper.make_node("Add", ["sum", "one"], ["more"]), helper.make_node("Identity", ["on"], ["still"])],
        "body",
        [
            helper.make_tensor_value_info("i", TensorProto.INT64, []),
            helper.make_tensor_value_info("on", TensorProto.BOOL, []),
            helper.make_tensor_value_info("sum", TensorProto.INT64, [1]),
        ],
        [
            helper.make_tensor_value_info("still", TensorProto.BOOL, []),
            helper.make_tensor_value_info("more", TensorProto.INT64, [1]),
        ],
    )
    one = helper.make_tensor("one", TensorProto.INT64, [1], [1])
    zero = helper.make_tensor("zero", TensorProto.INT64, [1], [0])
    graph = helper.make_graph(
        [helper.make_node("Loop", ["n", "", "zero"], ["y"], body=body)],
        "counter",
        [helper.make_tensor_value_info("n", TensorProto.INT64, [1])],
        [helper.make_tensor_value_info("y", TensorProto.INT64, [1])],
        [one, zero],
    )
    file = tmp_path_factory.mktemp("counter") / "counter.onnx"
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10), file)
    part = Part(
        name="counter",
        kind="block",
        max_difference=0.0,
        graph=file.name,
        inputs=(TensorSpec(name="n", dtype="int64", shape=(1,)),),
        outputs=(TensorSpec(name="y", dtype="int64", shape=(1,)),),
    )
    return OnnxRuntimeBackend(threads=1).load_graph(file, part)


def count(engine: OnnxRuntimeEngine, to: int) -> int:
    y = np.zeros(1, np.int64)
    engine.run({"n": np.array([to]), "y": y})
    return int(y[0])


def watches() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == WATCH]


def test_a_run_is_ended_when_its_token_is_set(counter: OnnxRuntimeEngine) -> None:
    with Watch(SetAt(3).is_set), pytest.raises(Cancelled, match="request: cancelled while counter ran"):
        count(counter, ENDLESS)
    assert count(counter, 100) == 100
    assert not watches()


def test_other_runs_of_the_same_engine_are_not_ended(counter: OnnxRuntimeEngine) -> None:
    slow, results = SetAt(1 << 40), []

    def other() -> None:
        with Watch(slow.is_set):
            results.append(count(counter, 200_000))

    thread = threading.Thread(target=other)
    thread.start()
    slow.looked.wait(60)  # it runs
    with Watch(SetAt(0).is_set), pytest.raises(Cancelled):
        count(counter, ENDLESS)
    thread.join()
    assert results == [200_000]
    assert not watches()


def test_a_watch_that_sees_nothing_set_changes_nothing(counter: OnnxRuntimeEngine) -> None:
    with Watch(lambda: False):
        assert [count(counter, to) for to in (1, 20_000, 3)] == [1, 20_000, 3]
    assert not watches()


def test_a_token_that_raises_is_left_to_the_request(counter: OnnxRuntimeEngine) -> None:
    asked = threading.Event()

    def broken() -> bool:
        asked.set()
        raise LookupError("injected")

    with Watch(broken), stoppable(lambda: pytest.fail("stopped")):
        assert asked.wait(60)
        assert count(counter, 20_000) == 20_000


def test_a_watch_inside_another_is_the_one_that_counts(counter: OnnxRuntimeEngine) -> None:
    with Watch(lambda: False):
        with Watch(lambda: True), pytest.raises(Cancelled):
            count(counter, ENDLESS)
        assert count(counter, 20_000) == 20_000


def test_a_request_that_runs_nothing_has_no_thread() -> None:
    with Watch(lambda: True):
        assert not watches()
