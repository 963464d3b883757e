"""A row that can be read before training and not later, or not at all, is one line with the client and the row."""

import re

import pytest
import torch
from lazy_worlds import rows, run

from idiolect import ClientData, UsageError


class FailsAt(torch.utils.data.Dataset):
    """A data set whose row 7 cannot be read."""

    def __len__(self):
        return 12

    def __getitem__(self, k):
        if k == 7:
            raise OSError("no file 7.png")
        return torch.full((4,), float(k)).double(), k % 2


class StreamFailsAt(torch.utils.data.IterableDataset):
    """The same, row by row."""

    def __iter__(self):
        return (FailsAt()[k] for k in range(12))

    __len__ = FailsAt.__len__


class Uncounted(StreamFailsAt):
    """The same, without a length."""

    __len__ = None


def no_five(x):
    if x[0] == 5:
        raise KeyError("five")
    return x


@pytest.mark.parametrize(
    ("make", "line", "cause"),
    [
        (lambda: ClientData(FailsAt()), "client 'ben': reading row 7 failed: OSError: no file 7.png", OSError),
        (lambda: ClientData(StreamFailsAt()), "client 'ben': reading row 7 failed: OSError: no file 7.png", OSError),
        (lambda: ClientData(Uncounted()), "train: reading row 7 failed: OSError: no file 7.png", OSError),
        (
            lambda: ClientData((torch.arange(12.0).double()[:, None].expand(-1, 4), [0, 1] * 6), transform=no_five),
            "client 'ben': reading a batch of examples failed: KeyError: 'five'",
            KeyError,
        ),
    ],
)
def test_a_row_that_cannot_be_read_in_training_is_one_line_with_its_client(make, line, cause):
    with pytest.raises(UsageError, match=re.escape(line)) as raised:
        run({"ada": ClientData(rows("ada")), "ben": make()})
    assert "\n" not in str(raised.value)
    assert isinstance(raised.value.__cause__, cause)
