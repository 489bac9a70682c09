"""Tests that errors can be pickled, to be passed between processes."""

from __future__ import annotations

import pickle

from jahubert.errors import AudioError, MissingExtraError


def test_errors_pickle_with_their_attributes():
    error = AudioError("a.wav is empty")
    error.reported = True
    copy = pickle.loads(pickle.dumps(error))
    assert isinstance(copy, AudioError) and str(copy) == "a.wav is empty" and copy.reported
    extra = pickle.loads(pickle.dumps(MissingExtraError("tqdm", "train")))
    assert (extra.package, extra.extra, extra.reported) == ("tqdm", "train", False)
