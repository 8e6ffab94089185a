from __future__ import annotations

import os
import pickle

import numpy as np
import pytest

from tests.data.official import python2
from trimtab.data import pickles
from trimtab.data.formats import refcoco
from trimtab.data.reading import DataError, RowError

FLAG = "TRIMTAB_TEST_PICKLE"
SET = f"__import__('os').environ.__setitem__('{FLAG}','1')"
EVIL = {
    "python 2": f'c__builtin__\neval\n(S"{SET}"\ntR.'.encode(),
    "python 3": pickle.dumps(eval, protocol=4)[:-1] + b"(" + pickle.dumps(SET, protocol=2)[2:-1] + b"tR.",
    "an attribute of what is allowed": b"\x80\x04\x8c\x05numpy\x8c\x0endarray.tofile\x93.",
    "a type that is not needed": b"cnumpy\nmemmap\n.",
    "an object outside": b"Pabc\n.",
}


@pytest.mark.parametrize("name", EVIL)
def test_a_pickle_that_asks_for_a_function_is_refused(name, tmp_path, monkeypatch):
    monkeypatch.delenv(FLAG, raising=False)
    path = tmp_path / "refs.p"
    path.write_bytes(EVIL[name])
    with pytest.raises(pickles.PickleRefused, match="refs.p: refused, it asks for"):
        pickles.read(path, arrays=True, encoding="latin1", types=(object,))
    assert FLAG not in os.environ


def test_these_pickles_do_run_code_when_read_carelessly(monkeypatch):
    """Otherwise the test above would show nothing."""
    for name in ("python 2", "python 3"):
        monkeypatch.delenv(FLAG, raising=False)
        pickle.loads(EVIL[name])
        assert os.environ.pop(FLAG) == "1"


def test_arrays_are_read_only_where_they_are_allowed(tmp_path):
    rows = np.arange(12, dtype=np.uint8).reshape(3, 4)
    path = tmp_path / "batch"
    path.write_bytes(python2({"data": rows, "labels": [2, 0, 1]}))
    found = pickles.read(path, arrays=True, encoding="latin1")
    assert (found["data"] == rows).all() and found["labels"] == [2, 0, 1]
    with pytest.raises(pickles.PickleRefused, match=r"numpy.core.multiarray._reconstruct"):
        pickles.read(path, encoding="latin1")


@pytest.mark.parametrize("content", [b"", b"not a pickle", pickle.dumps([1, 2, 3])[:-4], b"\x80\x02}(U\x03abcK\x01e."])
def test_a_damaged_pickle_is_named(content, tmp_path):
    path = tmp_path / "raw-captions.pkl"
    path.write_bytes(content)
    with pytest.raises(ValueError, match="raw-captions.pkl: expected a pickle of data"):
        pickles.read(path)


def test_a_pickle_of_something_else_is_named(tmp_path):
    path = tmp_path / "refs.p"
    path.write_bytes(pickle.dumps({"a": 1}))
    with pytest.raises(ValueError, match=r"refs.p: expected a pickle of a list, found a dict"):
        pickles.read(path, types=(list,))


def test_values_nested_too_deeply_to_be_shown_are_an_error_of_their_row(tmp_path):
    path = tmp_path / "refs.p"
    path.write_bytes(b"]" * 100_000 + b"a" * 99_999 + b".")
    [ref] = refcoco.refs(path)
    with pytest.raises(RowError, match=r"refs.p, ref \[0\]: expected an object .*nested too deeply"):
        ref.text("split")


def test_faults_of_pickles_are_faults_of_data(tmp_path):
    path = tmp_path / "refs.p"
    for content in (b"]", b"Pabc\n.", b"N."):
        path.write_bytes(content)
        with pytest.raises(DataError, match="refs.p: "):
            pickles.read(path)
