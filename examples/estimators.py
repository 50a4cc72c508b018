"""One divergence, five ways to know it: what you use depends on what you know of p and q.

python examples/estimators.py
"""

import torch
from torch.distributions import Normal

import rkl

torch.manual_seed(0)
p, q, divergence = Normal(0.0, 1.0), Normal(1.0, 1.5), rkl.JensenShannon()

# Both over a finite vocabulary: exact. Here a fine grid stands for one.
x = torch.linspace(-12, 12, 4001)
print(
    f"exact              {rkl.exact(divergence, p=p.log_prob(x)[None], q=q.log_prob(x)[None]):.4f}"
)

# log p/q at samples from one of them: terms, whose mean is unbiased and has an error.
for name, law in ("p", p), ("q", q):
    at = law.sample((100_000,))
    terms = rkl.monte_carlo(divergence, p.log_prob(at) - q.log_prob(at), sampled_from=name)
    error = terms.std() / len(terms) ** 0.5
    print(f"samples from {name}     {terms.mean():.4f} ± {error:.4f}")

# Samples from both and nothing else: a lower bound, maximised over a score of x.
samples_p, samples_q = p.sample((100_000,)), q.sample((100_000,))
features = torch.tensor([0.0, 0.0, 0.0], requires_grad=True)
optimizer = torch.optim.Adam([features], lr=0.05)


def score(x):
    return features[0] + features[1] * x + features[2] * x**2


for _ in range(200):
    few = torch.randint(100_000, (2_000,))
    bound = rkl.variational_bound(
        divergence, score_p=score(samples_p[few]), score_q=score(samples_q[few])
    )
    optimizer.zero_grad()
    (-bound).backward()
    optimizer.step()
bound = rkl.variational_bound(divergence, score_p=score(samples_p), score_q=score(samples_q))
print(f"samples alone      {bound.item():.4f} or more")

# Both in a family with a closed form: known for the KLs here, and for all on finite laws.
print(f"closed form of KL  {rkl.KL().between(p, q):.4f}")
