"""The arguments of `fit`: what cannot be used is one line that says what to write."""

import inspect
import re

import pytest
from torch import nn
from torch.nn import functional as F

import idiolect
from idiolect import Machine, Output, UsageError, methods, parts
from idiolect.compute.metrics import accuracy
from idiolect.engines.stacked import Stacked
from idiolect.testing.worlds import examples, network, population


def fitted(method, **more):
    return idiolect.fit(network(), population(), method, **{"rounds": 1, **more})


GIVEN = (network(), population(), methods.fedavg())


@pytest.mark.parametrize(
    ("act", "line"),
    [
        (lambda: Machine(engine="one-by-one"), "no engine 'one-by-one'; there are auto, sequential, threads"),
        (lambda: Machine(engine="thread"), "no engine 'thread' (did you mean threads?); there are auto"),
        (lambda: Machine(engine="flower"), "no engine 'flower'; there are auto"),
        (lambda: Machine(engine=Stacked), "is no engine; there are auto"),
        (lambda: Machine(engine=3), "3 is no engine; there are auto"),
        (lambda: Machine(device=0), "device is text such as 'cpu' or 'cuda', not 0"),
        (lambda: Machine(precision="half"), "precision is 'full' or 'bfloat16', not 'half'"),
        (lambda: Machine(memory="tape"), "memory is 'auto' or 'ram' or 'disk', not 'tape'"),
        (lambda: Output(3), "directory is a path such as 'runs/first', not 3"),
        (lambda: Output(resume=True), "resume needs the directory of the run to go on with: Output(directory=..., r"),
        (lambda: Output(about="mine"), "about is a dict of names to values, not 'mine'"),
        (lambda: idiolect.fit(*GIVEN), "fit: missing a required"),
        (lambda: idiolect.fit(*GIVEN, 3), "fit takes rounds and what follows by name: write rounds=3"),
        (lambda: idiolect.fit(*GIVEN, 3, idiolect.Training(lr=0.5)), "write rounds=3, training=..."),
        (lambda: fitted(GIVEN[2], lr=0.1), "fit has no argument 'lr': write training=Training(lr=0.1)"),
        (lambda: fitted(GIVEN[2], engine="stacked"), "'engine': write machine=Machine(engine='stacked')"),
        (lambda: fitted(GIVEN[2], directory="a"), "'directory': write output=Output(directory='a')"),
        (lambda: fitted(GIVEN[2], about={"x": "y" * 80}), "'about': write output=Output(about=...)"),
        (lambda: fitted(GIVEN[2], local_epoch=2), "(did you mean training=Training(local_epochs=...)?)"),
        (lambda: fitted(GIVEN[2], round=2), "fit has no argument 'round' (did you mean rounds?)"),
        (lambda: fitted(GIVEN[2], zebra=2), "fit has no argument 'zebra'"),
        (
            lambda: fitted(GIVEN[2], training={"lr": 1}),
            "is a dict: write training=Training(lr=..., local_epochs=...)",
        ),
        (
            lambda: fitted(GIVEN[2], machine="cuda"),
            "is text, 'cuda': write machine=Machine(engine=..., device=...)",
        ),
        (
            lambda: fitted(GIVEN[2], output="runs"),
            "is text, 'runs': write output=Output(directory=..., resume=...)",
        ),
        (lambda: fitted(methods.fedbn), "method is the function fedbn: write methods.fedbn() with brackets"),
        (lambda: fitted(parts.sam(0.05)), "method is a Part: put a method first, such as methods.fedavg() + sam(rho="),
        (lambda: fitted(parts.sam), "method is the function sam: call it, sam(...)"),
        (lambda: fitted("fedbn"), "method is text, 'fedbn': write a method such as methods.fedbn()"),
        (lambda: fitted(None), "method is None: give a Method such as methods.fedbn()"),
        (lambda: fitted(GIVEN[2], metrics=accuracy), "write metrics=[Metric('name', function)]"),
        (lambda: fitted(GIVEN[2], metrics=[F.mse_loss]), "write metrics=[Metric('name', function)]"),
        (lambda: idiolect.fit(network, *GIVEN[1:], rounds=1), "model is the function network: write network(...)"),
        (lambda: idiolect.fit(nn.Linear, *GIVEN[1:], rounds=1), "model is the class Linear: write Linear(...)"),
        (lambda: idiolect.fit(3, *GIVEN[1:], rounds=1), "model is an int: give a torch.nn.Module"),
        (lambda: idiolect.fit(GIVEN[0], [1], GIVEN[2], rounds=1), "clients is a list: write {'a': ClientData("),
        (
            lambda: idiolect.fit(GIVEN[0], {"a": examples("a", 8)}, GIVEN[2], rounds=1),
            "client 'a' is a tuple: write ClientData(train=(x, y), test=(x, y))",
        ),
    ],
)
def test_arguments_that_cannot_be_are_one_line_that_says_what_to_write(act, line):
    with pytest.raises(UsageError, match=re.escape(line)) as caught:
        act()
    assert "\n" not in str(caught.value)


def test_the_signature_is_the_one_that_is_written():
    parameters = inspect.signature(idiolect.fit).parameters
    assert list(parameters)[:4] == ["model", "clients", "method", "rounds"]
    assert parameters["machine"].default == Machine()
    assert parameters["output"].default == Output()
    assert all(p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD) for p in parameters.values())
