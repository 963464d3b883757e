"""Wrong inputs are refused in one line, each kind of input in one place."""

import inspect
import re
from dataclasses import fields

import numpy as np
import pytest
import torch
from scipy.sparse import csr_array, csr_matrix
from torch import nn
from torch.nn import functional as F

import idiolect
from idiolect import ClientData, Metric, Output, Training, UsageError, data, methods, parts, scope
from idiolect.core.calls import written
from idiolect.core.values import settings
from idiolect.data import Iid, Rotation, federate, load
from idiolect.testing.worlds import examples, network, population


def refused(act, line):
    with pytest.raises(UsageError, match=re.escape(line)) as caught:
        act()
    assert "\n" not in str(caught.value)
    return caught.value


def fitted(**more):
    given = {"model": network(), "clients": population(), "method": methods.fedavg(), "rounds": 1}
    return idiolect.fit(**{**given, **more})


@pytest.mark.parametrize(
    ("act", "line"),
    [
        (lambda: Training(local_epoch=2), "Training has no argument 'local_epoch' (did you mean local_epochs?); it is"),
        (lambda: Training(momentum=0.9), "it is Training(lr, local_epochs, batch_size, optimizer, schedule, clip"),
        (lambda: Training(*range(9)), "Training: too many positional arguments"),
        (lambda: idiolect.SGD(lr=0.1), "SGD has no argument 'lr'; it is SGD(momentum=0.0, weight_decay=0.0"),
        (lambda: idiolect.AdamW(beta_1=0.1), "AdamW has no argument 'beta_1' (did you mean beta1?)"),
        (lambda: idiolect.Exponential(), "Exponential: missing a required argument: 'gamma'"),
        (lambda: idiolect.Warmup(), "Warmup: missing a required argument: 'rounds'"),
        (lambda: idiolect.Group(), "Group: missing a required argument: 'names'"),
        (lambda: idiolect.Machine(engin="auto"), "Machine has no argument 'engin' (did you mean engine?)"),
        (lambda: Output(dir="runs"), "Output has no argument 'dir'"),
        (lambda: Metric("error"), "Metric: missing a required argument: 'compute'"),
        (lambda: ClientData(tran=([[1.0]], [0])), "ClientData has no argument 'tran' (did you mean train?)"),
        (lambda: data.Dirichlet(), "Dirichlet: missing a required argument: 'alpha'; it is Dirichlet(alpha, minimum"),
        (lambda: data.TimeBlocks(gaps=1), "TimeBlocks has no argument 'gaps' (did you mean gap?)"),
        (lambda: Rotation(angle=30), "Rotation has no argument 'angle'; it is Rotation(degrees)"),
        (lambda: federate(None, Iid(), clent=3), "federate has no argument 'clent' (did you mean clients?)"),
        (lambda: load(), "load: missing a required argument: 'name'"),
        (lambda: parts.sam(radius=0.1), "sam has no argument 'radius'; it is sam(rho, names=None)"),
        (lambda: idiolect.Method(part=()), "Method has no argument 'part' (did you mean parts?)"),
    ],
)
def test_a_call_with_arguments_that_are_not_there(act, line):
    refused(act, line)


@pytest.mark.parametrize(
    ("act", "line"),
    [
        (lambda: methods.fedfsa(top=1.5), "fedfsa: top=1.5 is not a whole number"),
        (lambda: methods.ditto(None), "ditto: strength=None is not a number"),
        (lambda: methods.fedper(names="fc"), "fedper: names='fc' is not a scope"),
        (lambda: Output("runs", resume="yes"), "Output: resume='yes' is not true or false"),
        (lambda: Metric("error", F.mse_loss, "lower"), "Metric 'error': higher_is_better='lower' is not true or false"),
        (
            lambda: Metric("error", lambda outputs: 0.0),
            "Metric 'error': compute is called with (outputs, targets), but",
        ),
        (lambda: idiolect.SGD(nesterov=1), "SGD: nesterov=1 is not true or false"),
        (lambda: idiolect.Method(parts.share(scope.everything)), "Method: parts is a Part: write Method((share("),
        (lambda: idiolect.Method((1,)), "Method: parts is an int: write Method((share("),
        (lambda: idiolect.Method((parts.share(scope.everything),), 3), "Method: name is text, not an int"),
        (lambda: federate("digits", Iid()), "federate: pool is text, 'digits'; load('digits') and read_table(path)"),
        (lambda: federate(load("digits"), "iid"), "federate: split is text, 'iid'; there are Iid(), Dirichlet(0.5)"),
        (lambda: federate(load("digits"), Iid), "federate: split is the class Iid; there are Iid()"),
        (lambda: federate(load("digits"), Iid(), shift="rotation"), "federate: shift is text, 'rotation'; there are"),
        (lambda: federate(load("digits"), Iid(), shift=Rotation), "federate: shift is the class Rotation; there are"),
        (lambda: scope.named(3), "named takes names of layers or tensors as text, such as named('fc1'), not an int"),
        (lambda: scope.named(), "named takes names of layers or tensors as text"),
        (lambda: idiolect.register_normalization(3), "register_normalization takes a class of modules, not 3"),
    ],
)
def test_an_argument_of_another_type(act, line):
    refused(act, line)


@pytest.mark.parametrize(
    ("act", "line"),
    [
        (lambda: methods.fedbn() + methods.fedavg(), "FedBN + FedAvg: a method has one share(...) and takes parts"),
        (lambda: methods.fedbn() + parts.sam, "FedBN + sam: write sam(...) with brackets"),
        (lambda: methods.fedbn() + None, "FedBN + ...: what is added is a part, not None"),
        (lambda: parts.sam(0.1) + methods.fedbn(), "sam + ...: put a method first, as in fedavg() + sam(...)"),
        (lambda: parts.sam(0.1) + parts.sam(0.1), "sam + ...: put a method first"),
        (lambda: Rotation(1) + Iid(), "Rotation(degrees=1.0) + ...: an Iid is no shift"),
        (lambda: scope.head & "fc1", "head & ...: text, 'fc1' is no scope; names of layers are named('fc1')"),
        (lambda: scope.head - parts.sam(0.1), "head - ...: a Part is no scope"),
        (lambda: scope.head | None, "head | ...: None is no scope"),
    ],
)
def test_what_cannot_be_combined(act, line):
    refused(act, line)


@pytest.mark.parametrize(
    ("module", "name", "near"),
    [
        (methods, "fedbm", "fedbn"),
        (parts, "smm", "sam"),
        (scope, "hed", "head"),
        (scope, "nammed", "named"),
        (scope, "batchnorm", "batch_norm"),
        (data.augment, "random_cropp", "random_crop"),
        (data.augment, "compos", "compose"),
        (data.augment, "random_flop", "random_flip"),
        (data, "Dirichlett", "Dirichlet"),
        (idiolect, "Trainin", "Training"),
    ],
)
def test_an_unknown_name_of_a_module_says_the_nearest(module, name, near):
    with pytest.raises(AttributeError, match=rf"{module.__name__} has no '{name}' \(did you mean {near}\?\)"):
        getattr(module, name)
    assert not hasattr(module, name)
    assert not hasattr(module, "__wrapped__")


@pytest.mark.parametrize(
    ("given", "line"),
    [
        ({"loss": "mse"}, "loss must be a function (output, target), not text, 'mse'"),
        ({"loss": None}, "loss must be a function (output, target), not None"),
        ({"loss": nn.CrossEntropyLoss}, "not the class CrossEntropyLoss: write CrossEntropyLoss(...)"),
        ({"loss": lambda output: output.mean()}, "loss is called with (output, target), but takes (output)"),
        ({"on_round": lambda run: None}, "on_round is called with (run, record), but takes (run)"),
        ({"on_round": 3}, "on_round must be a function (run, record), not an int"),
        ({"participation": "half"}, "participation must be a number in (0, 1]"),
        *(({"seed": seed}, "seed must be a whole number, at least 0") for seed in (-1, 1.5, "a", None, True)),
        ({"clients": {"": ClientData(examples("a", 8))}}, "client names are text, got ''"),
    ],
)
def test_arguments_of_a_run(given, line):
    refused(lambda: fitted(**given), line)


class Forgetful(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(3, 2)

    def forward(self, x):
        return self.layer({}["x"])


def rows(count, width, dtype=torch.float32):
    return ClientData((torch.ones(count, width, dtype=dtype), torch.arange(count) % 2))


def damaged(value):
    net = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2))
    net[1].running_mean[0] = value
    return net


def wider_test():
    return ClientData((torch.ones(8, 3), torch.arange(8) % 2), test=[(torch.ones(4), 0), (torch.ones(4), 1)])


LINEAR = nn.Linear(3, 2)


class Layer(nn.Module):
    """A linear layer with a forward pass of its own."""

    def __init__(self, forward):
        super().__init__()
        self.layer, self.run = nn.Linear(3, 2), forward

    def forward(self, x):
        return self.run(self, x)


def only_two(net, x):
    return net.layer(x.view(2, 3))


def only_one(net, x):
    assert len(x) == 1, "one at a time"
    return net.layer(x)


def only_in_evaluation(net, x):
    return net.layer(x if not net.training else x.view(1, 3))


@pytest.mark.parametrize(
    ("model", "client", "line"),
    [
        (
            Forgetful(),
            rows(8, 3),
            "the model (Forgetful) cannot take client 'a''s features of shape (3,): KeyError: 'x' (te",
        ),
        (LINEAR, wider_test(), "cannot take client 'a''s test features of shape (4,)"),
        (LINEAR, rows(8, 3, torch.int64), "; convert x to float32, unless the model embeds it: x.float()"),
        (LINEAR, rows(8, 3, torch.bool), "; convert x to float32, unless the model embeds it: x.float()"),
        (LINEAR, rows(8, 3, torch.complex64), "; complex features: give real numbers, such as torch.view_as_real(x)"),
        (Layer(only_one), rows(8, 3), "cannot take client 'a''s features of shape (3,): AssertionError: one at a time"),
        (
            Layer(only_two),
            rows(8, 3),
            "with 3 examples in place of 2, the model (Layer) cannot take client 'a''s features of shape (3,): Run",
        ),
        (Layer(only_in_evaluation), rows(8, 3), "the model cannot be trained on client 'a''s features: RuntimeError"),
        (damaged(float("nan")), rows(8, 3), "the initial weights are not finite: 1.running_mean is NaN"),
        (damaged(float("inf")), rows(8, 3), "the initial weights are not finite: 1.running_mean is infinite"),
    ],
)
def test_models_and_data_that_do_not_fit(model, client, line):
    error = refused(lambda: fitted(model=model, clients={"a": client}), line)
    assert error.__cause__ is not None or "initial weights" in str(error)


@pytest.mark.parametrize(
    "labels", [["ill", "well"], np.array(["ill", "well"]), (["ill"], ["well"])], ids=["list", "array", "nest"]
)
def test_labels_of_text(labels):
    refused(lambda: ClientData(([[0.0], [1.0]], labels)), "text is no number: give class numbers 0, 1, … for labels")


def test_a_client_may_have_any_name(tmp_path):
    """Names are keys, not paths: nothing is written outside of the folder, and a run on disk goes on."""
    people = {name: rows(8, 3) for name in ("a/b", "../c", "/d", "e\n", " ")}
    machine = idiolect.Machine("sequential", memory="disk")
    net = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2))
    given = {"model": net, "clients": people, "method": methods.fedbn(), "machine": machine, "rounds": 2}
    whole, folder = fitted(**given), tmp_path / "runs" / "one"

    def stop(run, record):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fitted(**given, output=Output(folder, report=False), on_round=stop)
    run = fitted(**given, output=Output(folder, resume=True))
    assert [path.name for path in tmp_path.iterdir()] == ["runs"]
    assert [path.name for path in folder.parent.iterdir()] == ["one"]
    for name in people:
        for one, other in zip(whole.personal(name).parameters(), run.personal(name).parameters(), strict=True):
            assert torch.equal(one, other)


def test_settings_compare_and_print_like_a_dataclass():
    @settings
    class Decay:
        gamma: float
        steps: tuple[int, ...] = ()

        def __post_init__(self):
            if self.gamma < 0:
                raise UsageError(f"gamma is {self.gamma}")

    assert repr(Decay(np.float32(1), (np.int64(2),))) == repr(Decay(1.0, (2,)))
    assert Decay(1) == Decay(1.0)
    assert [field.name for field in fields(Decay)] == ["gamma", "steps"]
    refused(lambda: Decay("fast"), "Decay: gamma='fast' is not a number")
    refused(lambda: Decay(-1), "gamma is -1.0")
    with pytest.raises(AttributeError):
        Decay(1).gamma = 2
    assert written("Decay", inspect.signature(Decay)) == "Decay(gamma, steps=())"


def squares(output, y):
    return ((output - y) ** 2).mean()


@pytest.mark.parametrize(
    ("loss", "line"),
    [
        (
            F.mse_loss,
            "the loss broadcasts its targets for client 'a', outputs (2, 2) and targets (2,): give targets of",
        ),
        (
            nn.L1Loss(),
            "the loss broadcasts its targets for client 'a', outputs (2, 2) and targets (2,): give targets of",
        ),
        (nn.SmoothL1Loss(), "class numbers need cross_entropy"),
        (squares, "for client 'a', outputs (3, 2) and targets (3,): RuntimeError: The size of tensor"),
        (
            lambda output, y: {"loss": F.cross_entropy(output, y)},
            "the loss must return a tensor, the mean over the batch",
        ),
        (lambda output, y: F.cross_entropy(output, y).item(), "the mean over the batch, not a float"),
        (lambda output, y: None, "the mean over the batch, not None"),
        (
            lambda output, y: 1 / 0,
            "outputs (2, 2) and targets (2,): ZeroDivisionError: division by zero (test_wrong_in",
        ),
        (
            nn.CrossEntropyLoss(reduction="none"),
            "one number, the mean over the batch, not a tensor of shape (2,): redu",
        ),
        (lambda output, y: output[:, 0], "one number, the mean over the batch, not a tensor of shape (2,): redu"),
        (
            lambda output, y: (output.argmax(1) - y).float().mean(),
            "the loss does not depend on the outputs: detach, it",
        ),
    ],
)
def test_losses_that_cannot_be(loss, line):
    refused(lambda: fitted(model=LINEAR, clients={"a": rows(8, 3)}, loss=loss), line)


def test_a_loss_that_broadcasts_every_number_of_examples():
    line = "outputs (2, 1) and targets (2,): give targets of the outputs' shape"
    refused(lambda: fitted(model=nn.Linear(3, 1), clients={"a": rows(8, 3)}, loss=F.mse_loss), line)


@pytest.mark.parametrize("cut", [torch.no_grad()(lambda net, x: net.layer(x)), lambda net, x: net.layer(x).detach()])
def test_outputs_that_do_not_depend_on_the_weights(cut):
    line = "the outputs do not depend on the weights: no_grad or detach in forward?"
    refused(lambda: fitted(model=Layer(cut), clients={"a": rows(8, 3)}), line)


def test_layers_in_a_list_are_named():
    net = nn.Sequential(nn.Linear(3, 2))
    net.blocks, net.known = [nn.Linear(2, 2)], [net[0]]
    notes = fitted(model=net, clients={"a": rows(8, 3)}).notes
    assert (
        "the layers in 'blocks' are not part of the model, and are not trained: use nn.ModuleList or nn.ModuleDict"
        in notes
    )


@pytest.mark.parametrize(
    ("act", "line"),
    [
        (lambda run, path: run.personal(0), "client names are text, such as "),
        (lambda run, path: run.inspect(3), "not an int"),
        (lambda run, path: run.memory(None), "not None"),
        (lambda run, path: run.memory(["a"]), "not a list"),
        (lambda run, path: run.report("/proc/x/r.html"), "cannot write /proc/x/r.html: No such file or directory"),
        (lambda run, path: run.report(path), ": Is a directory; give another path"),
        (lambda run, path: run.report(path / "file" / "r.html"), "; give another path"),
        (lambda run, path: run.report(None), "path is text such as 'report.html', not None"),
        (lambda run, path: fitted(output=Output("/proc/x")), "cannot write /proc/x: No such file or directory"),
        (lambda run, path: fitted(output=Output(path / "file" / "run")), "run: Not a directory; give another path"),
    ],
)
def test_what_a_run_is_asked_for(act, line, tmp_path):
    (tmp_path / "file").write_text("")
    refused(lambda: act(fitted(), tmp_path), line)


@pytest.mark.parametrize(
    "sparse",
    [torch.eye(3).to_sparse(), csr_matrix(np.eye(3)), csr_array(np.eye(3))],
    ids=["torch", "matrix", "array"],
)
def test_sparse_features(sparse):
    refused(lambda: ClientData((sparse, [0, 1, 0])), "a sparse ")


@pytest.mark.parametrize(
    "method", [methods.fedproto(), methods.fedpac(), methods.fedntd(), methods.knnper(), methods.fedrod()], ids=str
)
def test_methods_of_classes_need_classes(method):
    client = ClientData((torch.ones(8, 3), {"y": torch.arange(8) % 2}))
    net = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))

    def loss(output, y):
        return F.cross_entropy(output, y["y"])

    error = refused(lambda: fitted(model=net, clients={"a": client}, method=method, loss=loss), "class label")
    assert "AttributeError" not in str(error)
