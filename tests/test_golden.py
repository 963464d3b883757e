"""The library against numbers recorded from the authors' own programs, in float64 on real images."""

from dataclasses import replace

import golden_cases as cases
import pytest

from idiolect import SGD, Training, methods, parts, scope
from idiolect.compute.autograd import Model
from idiolect.compute.metrics import accuracy, evaluate
from idiolect.core.part import Part, part
from idiolect.core.tree import axpy, pick
from idiolect.data import ClientData, Examples
from idiolect.engines.federation import Federation
from idiolect.testing.worlds import sensitive_layers


def federation(case, method, training):
    splits = case.test or [None] * len(case.train)
    clients = {f"{i}": ClientData(train=a, test=b) for i, (a, b) in enumerate(zip(case.train, splits, strict=True))}
    return Federation(Model(case.model), method, training, case.settings["rounds"], 1.0, 0, clients)


@pytest.fixture(scope="module")
def fedfsa():
    return cases.fedfsa_case()


@pytest.fixture(scope="module")
def fedbn():
    return cases.fedbn_case()


def fedfsa_methods(settings):
    rho, larger, alpha, top, pull = (settings[k] for k in ("rho_default", "rho_larger", "alpha", "TopC", "lamb"))
    tuned = parts.finetune(scope.head)
    return {
        "FedAvg": methods.fedavg("uniform") + tuned,
        "MoFedSAM": methods.mofedsam(rho, alpha, "uniform") + tuned,
        "FedFSA": methods.fedfsa(rho, larger, top, alpha, weighting="uniform"),
        "FedSpeed": methods.fedspeed(rho, pull, weighting="uniform") + left_to_decay(pull) + tuned,
    }


LONG = ("MoFedSAM", "FedSpeed")


@part
def left_to_decay(strength: float) -> Part:
    """Leave the weights' share of a pull to the optimizer's decay, which is not clipped."""

    def direction(direction, weights, local):
        return axpy(-strength, pick(weights, direction), direction)

    return Part(direction=direction)


@pytest.mark.parametrize("name", ["FedAvg", "FedFSA", *(pytest.param(n, marks=pytest.mark.slow) for n in LONG)])
def test_fedfsa_code(fedfsa, name):
    settings, expected = fedfsa.settings["args"], fedfsa.expected[name]
    training = Training(lr=settings["lr"], local_epochs=settings["local_ep"], batch_size=None, clip=10.0)
    if name == "FedSpeed":  # in that code decay is a part of the pull, and it stays on while heads are tuned
        training = replace(training, optimizer=SGD(weight_decay=settings["lamb"]))
    made = federation(fedfsa, fedfsa_methods(settings)[name], training)
    names = made.model.structure.trainable.names
    for t, rounds in enumerate(expected["rounds"]):
        made.play()
        for key, gained, numbers in zip(names, fedfsa.gain(made.server["share"], names), rounds, strict=True):
            cases.assert_summary(gained, numbers, f"{name}, round {t}, {key}")
        if name == "FedFSA":
            for i, top in enumerate(expected["top"][t]):
                shown = sensitive_layers(made.memory.get(f"{i}")["flexible_sam"])
                assert shown == [names[k] for k in top], (t, i)
    for i, numbers in enumerate(expected["finetuned_clients"]):
        personal = made.personal(f"{i}")
        for key, gained, summary in zip(names[-2:], fedfsa.gain(personal, names[-2:]), numbers, strict=True):
            cases.assert_summary(gained, summary, f"{name}, fine-tuned client {i}, {key}")
        right = evaluate(made.model, made.model.loss, personal, Examples(*fedfsa.train[i]), [accuracy])["accuracy"]
        assert 100 * right == pytest.approx(expected["finetuned_train_accuracy_percent"][i], abs=1e-9)


@pytest.mark.parametrize("rounds", [1, pytest.param(8, marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", ["fedavg", "fedbn"])
def test_fedbn_code(fedbn, name, rounds):
    settings = fedbn.settings
    training = Training(lr=settings["lr"], local_epochs=settings["local_epochs"], batch_size=None)
    made = federation(fedbn, getattr(methods, name)("uniform"), training)
    assert len(fedbn.expected[name]) == 8
    for t, expected in enumerate(fedbn.expected[name][:rounds]):
        made.play()
        assert set(made.server["share"]) == set(expected["server"])
        for key, numbers in expected["server"].items():
            cases.assert_summary(fedbn.gain(made.server["share"], [key])[0], numbers, f"round {t}, server, {key}")
        for i, client in enumerate(expected["clients"]):
            personal = made.personal(f"{i}")
            state = made.model.tensors(personal)
            for key, numbers in client.items():
                cases.assert_summary(fedbn.gain(state, [key])[0], numbers, f"round {t}, client {i}, {key}")
            assert state["bn1.num_batches_tracked"].item() == expected["counters"][i]
            if t == 7:  # test images cost as much as training; equal weights predict alike
                scores = evaluate(made.model, made.model.loss, personal, Examples(*fedbn.test[i]), [accuracy])
                assert scores["loss"] == pytest.approx(expected["test"][i]["loss"], rel=1e-9)
                assert scores["accuracy"] == pytest.approx(expected["test"][i]["accuracy"], abs=1e-12)
