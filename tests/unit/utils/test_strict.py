import copy
import pickle
from dataclasses import dataclass, field

import pytest

from atom.utils.errors import ConfigError
from atom.utils.strict import StrictConfig, did_you_mean


@dataclass(kw_only=True)
class Sample(StrictConfig):
    size: int = 1
    name: str = ""
    total: int = field(init=False, default=0)


def test_nearest_name():
    assert did_you_mean("max_num_seq", ["max_num_seqs", "seed"]) == " (did you mean 'max_num_seqs'?)"
    assert did_you_mean("qqqq", ["max_num_seqs"]) == ""


def test_unknown_derived_and_positional_arguments():
    with pytest.raises(ConfigError, match=r"Sample: unknown field 'sise' \(did you mean 'size'\?\)"):
        Sample(sise=3)
    with pytest.raises(ConfigError, match="'total' is derived"):
        Sample(total=3)
    with pytest.raises(ConfigError, match="by name"):
        Sample(3)


def test_given_fields_are_remembered_through_copies():
    sample = Sample(size=1)
    for each in (sample, copy.copy(sample), copy.deepcopy(sample), pickle.loads(pickle.dumps(sample))):
        assert each.is_user_set("size")
        assert not each.is_user_set("name")
    assert sample == Sample()
