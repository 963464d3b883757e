from idiolect import methods, parts, scope
from idiolect.testing.checks import check_identical_clients, parametrize_with_checks


def names(method):
    return {part.name for part in method.parts}


RANDOM = methods.fedfsa(rho=0.05, rho_larger=0.4, alpha=0.5, selection="random", weighting="uniform")
CATALOGUE = [
    methods.fedavg(),
    methods.fedavg(weighting="uniform"),
    methods.fedavg_ft(epochs=1),
    methods.fedavg_ft(scope.head, epochs=1, freeze_statistics=True),
    methods.fedprox(mu=0.3),
    methods.local(),
    methods.fedbn(),
    methods.silobn(),
    methods.bn_only("all"),
    methods.bn_only("affine"),
    methods.bn_only("statistics"),
    methods.fedsam(rho=0.1),
    methods.fedasam(rho=0.5),
    methods.mofedsam(rho=0.1, alpha=0.4),
    methods.fedfsa(rho=0.05, rho_larger=0.4, alpha=0.5, top=1),
    methods.fedfsa(rho=0.05, rho_larger=0.4, alpha=0.5, selection="least", sensitivity="paper"),
    RANDOM,
    methods.scaffold(),
    methods.ditto(strength=0.5),
    methods.fedala(),
    methods.fedbn() + parts.flexible_sam(rho=0.05, rho_larger=0.4, top=2) + parts.server_momentum(0.5),
    methods.fedbn() + parts.sam(0.1) + parts.control_variates(),
    # the server's step, normalised averages, starts, and state that moves with every step
    methods.fedavgm(),
    methods.fedadagrad(),
    methods.fedadam(),
    methods.fedyogi(),
    methods.fednova(),
    methods.fedinit(),
    methods.fedlesam(),
    methods.pfedme(strength=2.0, steps=2),
    methods.apfl(),
    methods.fedbn() + parts.estimated_sam(0.1) + parts.control_variates() + parts.relaxed_start(),
    methods.fedbn() + parts.normalised_average() + parts.server_adaptive("yogi"),
    methods.fedbn() + parts.personal_mixture(),
]


STEPS = "the server goes on from the mean by a step of its own"
EXCEPTIONS = {
    RANDOM: {check_identical_clients: "each client draws its layers: equal clients may perturb different ones"},
    **{m: {check_identical_clients: STEPS} for m in CATALOGUE if {"server_sgd", "server_adaptive"} & names(m)},
}


@parametrize_with_checks(CATALOGUE, EXCEPTIONS)
def test_check(method, check):
    check(method)
