from idiolect import methods, parts, scope
from idiolect.testing.checks import check_identical_clients, parametrize_with_checks

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
    # duals, and SAM in other places
    methods.feddyn(strength=0.3),
    methods.fedspeed(rho=0.1, strength=0.3),
    methods.fedspeed(rho=0.1, strength=0.3, dual_mean="participants"),
    methods.fedsmoo(rho=0.1, strength=0.3),
    methods.fedsmoo(rho=0.1, strength=0.3, report="paper"),
    methods.fedgloss(rho=0.1, strength=0.3, rho_local=0.1),
    methods.fedbn() + parts.consistent_sam(0.1) + parts.server_sam(0.1) + parts.dynamic(0.3),
    methods.sam_on(rho=0.3),
    methods.fedbn() + parts.adaptive_sam(0.5, names=scope.normalisation),
]


EXCEPTIONS = {
    RANDOM: {check_identical_clients: "each client draws its layers: equal clients may perturb different ones"}
} | {
    method: {check_identical_clients: "the server adds the duals to the mean of the weights"}
    for method in CATALOGUE
    if {"dynamic", "server_sam"} & {part.name for part in method.parts}
}


@parametrize_with_checks(CATALOGUE, EXCEPTIONS)
def test_check(method, check):
    check(method)
