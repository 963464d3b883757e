from idiolect import methods, parts, scope
from idiolect.testing.checks import (
    check_identical_clients,
    check_nothing_personal_is_sent,
    parametrize_with_checks,
)

RANDOM = methods.fedfsa(rho=0.05, rho_larger=0.4, alpha=0.5, selection="random", weighting="uniform")
FEDAMP, FEDPAC = methods.fedamp(strength=0.5), methods.fedpac(strength=0.7)
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
    # clients that learn from each other; of tensors of three, one of which moves by rounding alone, none is critical
    FEDAMP,
    FEDPAC,
    methods.fedcac(top=0.3, rounds=4),
    methods.pfedsim(warmup=1),
    methods.fedbn() + parts.critical_mix(top=0.3, rounds=4),
    methods.fedbn() + parts.similar_bodies(warmup=1),
    methods.fedbn() + parts.attention(strength=0.5),
]


SENT = "the server compares and mixes whole models: sending the personal one is what the method does"
EXCEPTIONS = {
    FEDAMP: {check_nothing_personal_is_sent: SENT},
    FEDPAC: {check_nothing_personal_is_sent: "personal heads are mixed on the server: each is sent there"},
    CATALOGUE[-1]: {check_nothing_personal_is_sent: SENT},
    RANDOM: {check_identical_clients: "each client draws its layers: equal clients may perturb different ones"},
}


@parametrize_with_checks(CATALOGUE, EXCEPTIONS)
def test_check(method, check):
    check(method)
