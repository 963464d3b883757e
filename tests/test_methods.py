from idiolect import methods, parts, scope
from idiolect.testing.checks import check_identical_clients, parametrize_with_checks

NOISY = methods.fedcr(strength=0.02, samples=2)
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
    # losses of their own
    methods.fedlc(tau=0.5),
    methods.fedntd(strength=0.7, temperature=2.0),
    methods.moon(strength=0.6),
    NOISY,
    methods.fedproto(),
    methods.fedavg() + parts.prototypes(0.5, "samples"),
    methods.fedrod(),
    methods.fedavg_ft(scope.head, epochs=1) + parts.sam(0.1) + parts.private_head(),
    methods.fedbn() + parts.sam(0.1) + parts.model_contrast(0.6) + parts.not_true_distillation(0.7),
]


EXCEPTIONS = {
    RANDOM: {check_identical_clients: "each client draws its layers: equal clients may perturb different ones"},
    NOISY: {check_identical_clients: "each client draws its own noise"},
}


@parametrize_with_checks(CATALOGUE, EXCEPTIONS)
def test_check(method, check):
    check(method)
