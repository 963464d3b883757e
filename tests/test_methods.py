from idiolect import Method, methods, parts, scope
from idiolect.testing.checks import (
    check_identical_clients,
    check_nothing_personal_is_sent,
    parametrize_with_checks,
)


def names(method):
    return {part.name for part in method.parts}


NOISY, GATED = methods.fedcr(strength=0.02, samples=2), methods.fedcp(strength=0.5)
RANDOM = methods.fedfsa(rho=0.05, rho_larger=0.4, alpha=0.5, selection="random", weighting="uniform")
PFEDHN = methods.pfedhn(lr=0.1, width=5)
NORMS = methods.fedbn() + parts.sam(0.1) + parts.hypernetwork(scope.batch_norm, lr=0.1, width=5)
FEDAMP, FEDPAC, FEDSELECT = methods.fedamp(strength=0.5), methods.fedpac(strength=0.7), methods.fedselect()
CATALOG = [
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
    methods.fedgamma(rho=0.1),
    methods.mofedsam(rho=0.1, alpha=0.4),
    methods.fedfsa(rho=0.05, rho_larger=0.4, alpha=0.5, top=1),
    methods.fedfsa(rho=0.05, rho_larger=0.4, alpha=0.5, selection="least", sensitivity="paper"),
    RANDOM,
    methods.scaffold(),
    methods.ditto(strength=0.5),
    methods.fedala(share_of_batches=0.5),
    methods.fedbn() + parts.flexible_sam(rho=0.05, rho_larger=0.4, top=2) + parts.server_momentum(0.5),
    methods.fedbn() + parts.sam(0.1) + parts.control_variates(),
    # split, meta, clusters
    methods.fedper(),
    methods.fedrep(head_epochs=1),
    methods.lg_fedavg(),
    methods.fedbabu(epochs=1),
    methods.per_fedavg(rate=0.1),
    methods.per_fedavg(rate=0.1, variant="hessian_free", steps=2),
    methods.ifca(),
    methods.ifca(count=3, names=scope.head),
    methods.fedrep(head_epochs=1) + parts.flexible_sam(rho=0.05, rho_larger=0.4, top=2),
    methods.fedbn() + parts.clusters(count=3),
    methods.ditto(strength=0.5) + parts.flexible_sam(rho=0.05, rho_larger=0.4, top=2),
    # represent: methods that look at features
    methods.feddbe(strength=2.0, momentum=0.3),
    methods.knnper(neighbors=3, capacity=12),
    methods.fedas(),
    methods.fedbn() + parts.domain_bias(2.0) + parts.feature_alignment() + parts.nearest_neighbors(3, capacity=30),
    methods.fedbn() + parts.sam(0.1) + parts.fisher_weights(),
    GATED,
    methods.gpfl(strength=0.5),
    methods.pfedfda(ridge=0.1),
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
    # clients that learn from each other; of tensors of three, one of which moves by rounding alone, none is critical
    FEDAMP,
    FEDPAC,
    methods.fedcac(top=0.3, rounds=4),
    methods.pfedsim(warmup=1),
    methods.fedbn() + parts.critical_mix(top=0.3, rounds=4),
    methods.fedbn() + parts.similar_bodies(warmup=1),
    methods.fedbn() + parts.attention(strength=0.5),
    # clients that choose models, or values: tensors with two axes all move by more than rounding
    methods.fedfomo(others=2),
    methods.fedfomo(others=1, explore=1.0) + parts.sam(0.1),
    methods.fedbn() + parts.first_order_mix(others=2),
    FEDSELECT,
    methods.fedbn() + parts.sam(0.1) + parts.grown_mask(0.5, every=2),
    # the server's step, normalized averages, starts, and state that moves with every step
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
    methods.fedbn() + parts.normalized_average() + parts.server_adaptive("yogi"),
    methods.fedbn() + parts.personal_mixture(),
    # duals, and SAM in other places
    methods.feddyn(strength=0.3),
    methods.fedspeed(rho=0.1, strength=0.3),
    methods.fedspeed(rho=0.1, strength=0.3, dual_mean="participants"),
    methods.fedsmoo(rho=0.1, strength=0.3),
    methods.fedsmoo(rho=0.1, strength=0.3, report="paper"),
    methods.fedgloss(rho=0.1, strength=0.3, rho_local=0.1),
    methods.fedbn() + parts.consistent_sam(0.1) + parts.server_sam(0.1) + parts.dynamic(0.3),
    methods.sam_on(rho=0.3),
    # predictions that read the unlabeled inputs
    methods.adabn(),
    methods.fedbn() + parts.adapted_statistics(),
    methods.silobn() + parts.sam(0.1) + parts.adapted_statistics(),
    methods.fedthe(),
    methods.fedbn() + parts.sam(0.1) + parts.adapted_statistics() + parts.head_ensemble(epochs=2, steps=5),
    methods.fedbn() + parts.adaptive_sam(0.5, names=scope.normalization),
    methods.hbn(renewal=0.3),
    methods.hbn(renewal=1.0, predict="smoothed") + parts.sam(0.1),
    # adapters of frozen layers
    methods.fedit(),
    methods.ffa_lora(),
    methods.fedsa_lora(),
    methods.feddpa(),
    Method((parts.share(scope.lora_a), parts.sam(0.1), parts.local_adapter(0.3, references=2)), "FedSA-LoRA, mixed"),
    methods.fedsa_lora(scope.lora_a | scope.head, weighting="samples") + parts.sam(0.1),
    # even results, and weights that a network of the server generates
    methods.qfedavg(q=2.0),
    methods.qfedavg(q=0.5, weighting="uniform"),
    methods.fedbn() + parts.sam(0.1) + parts.loss_weights(q=2.0),
    PFEDHN,
    methods.pfedhn(~scope.head, lr=0.1, clip=0.05, width=5),
    NORMS,
]


RANDOM_LAYERS = "each client draws its layers: equal clients may perturb different ones"
SENT = "the server compares and mixes whole models: sending the personal one is what the method does"
STEPS = "the server goes on from the mean by a step of its own"
SHORTER = "the server shortens moves that are long for their loss"
MOVES = "the server learns from how each generated tensor moved: sending that is what the method does"
POOLED = "shared statistics are those of a pass before training, not of training"
OWN = "each client is given tensors of its own, whatever its examples"
DUALS = "the server adds the duals to the mean of the weights"
EXCEPTIONS = {
    RANDOM: {check_identical_clients: RANDOM_LAYERS},
    **{m: {check_nothing_personal_is_sent: SENT} for m in CATALOG if {"attention", "first_order_mix"} & names(m)},
    FEDPAC: {check_nothing_personal_is_sent: "personal heads are mixed on the server: each is sent there"},
    **{m: {check_identical_clients: STEPS} for m in CATALOG if {"server_sgd", "server_adaptive"} & names(m)},
    **{m: {check_identical_clients: SHORTER} for m in CATALOG if "loss_weights" in names(m)},
    **{m: {check_nothing_personal_is_sent: MOVES} for m in CATALOG if "hypernetwork" in names(m)},
    **{m: {check_identical_clients: POOLED} for m in CATALOG if "hybrid_norm" in names(m)},
    NORMS: {check_nothing_personal_is_sent: MOVES, check_identical_clients: OWN},
    FEDSELECT: {check_identical_clients: "personal values travel with the rest, and count in no mean"},
    **{m: {check_identical_clients: "each client draws its own noise"} for m in (NOISY, GATED)},
    **{m: {check_identical_clients: DUALS} for m in CATALOG if {"dynamic", "server_sam"} & names(m)},
}


@parametrize_with_checks(CATALOG, EXCEPTIONS)
def test_check(method, check):
    check(method)
