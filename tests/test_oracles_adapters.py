"""Methods for low-rank adapters against textbook loops."""

from functools import partial

import pytest
from test_oracles import NAMES, assert_follows, close

from idiolect import methods, scope
from idiolect.testing.oracles import adapters
from idiolect.testing.worlds import adapted, network

A = ["0.lora_A.default.weight", "4.lora_A.default.weight"]
B = ["0.lora_B.default.weight", "4.lora_B.default.weight"]


@pytest.mark.parametrize("weighting", ["samples", "uniform"])
def test_fedit(weighting):
    made, _ = assert_follows(methods.fedit(weighting), adapters.fedit)
    assert {*A, *B, "1.weight", "1.running_var", "6.weight"} <= set(made.server["share"])


@pytest.mark.parametrize("weighting", ["samples", "uniform"])
def test_ffa_lora(weighting):
    made, _ = assert_follows(methods.ffa_lora(weighting=weighting), partial(adapters.ffa_lora, constant=A))
    assert {*B, "1.weight", "1.running_var", "6.weight"} <= set(made.server["share"])
    for name in NAMES:
        close(made.memory.get(name)["share"], {n: adapted(network()).state_dict()[n] for n in A}, "A has moved")


@pytest.mark.parametrize("weighting", ["samples", "uniform"])
def test_fedsa_lora(weighting):
    made, _ = assert_follows(methods.fedsa_lora(weighting=weighting), partial(adapters.fedsa_lora, common=A))
    assert set(made.server["share"]) == set(A)


def test_fedsa_lora_with_a_shared_head():
    common = [*A, "6.weight", "6.bias"]
    method = methods.fedsa_lora(scope.lora_a | scope.head)
    assert_follows(method, partial(adapters.fedsa_lora, common=common))
