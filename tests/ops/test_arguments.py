"""No op answers an argument of a wrong kind with another error than one of pykv's own."""

import numpy as np
import pytest

from pykv.errors import PykvError
from tests.ops.calls import OPS


@pytest.mark.parametrize("op, arguments", OPS, ids=lambda x: getattr(x, "__name__", ""))
def test_what_is_no_such_array_is_refused(xp, op, arguments):
    given = {
        name: xp.asarray(x) if isinstance(x, np.ndarray) else x for name, x in arguments.items()
    }
    for name, array in given.items():
        if not hasattr(array, "shape"):
            continue
        other = np.float64 if array.dtype != np.float64 else np.float32
        wrong = [None, [1, 2], 3, "text", np.float32(1), object()]
        wrong += [array[..., None], array[0], array.astype(other)]
        for x in wrong:
            with pytest.raises(PykvError, match=f"{op.__name__}: "):
                op(**{**given, name: x})
