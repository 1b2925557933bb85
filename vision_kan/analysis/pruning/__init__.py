"""A trained KAN with less in its feed-forwards: what matters least, and the smaller model that does without it.

Both feed-forwards are two linear maps of learned features,

    z = W1 f1(n) + b1,    y = W2 f2(z) + b2,

f of a group KAN the channels after phi, of a full-edge KAN the basis values (and silu(u)) of every input
(`layers.feed_forward.Half`). Four things can go: hidden units (`Hidden`, and by another measure `edges`), groups (`Groups`),
grid points (`Points`).

What matters: a change D of W2 raises the loss, to second order, by

    tr(M D C D^T) / 2,    C = E[w f f^T],    M = E[g g^T],

where g is the gradient of the loss at y over tokens, its expectation over labels drawn from the model itself, and w = |g|^2
(mean 1) what a token weighs: the Fisher information, Kronecker-factored (Martens and Grosse, arXiv:1503.05671). A bias
makes up for a mean, so C is the covariance then, as in FLAP (An et al., arXiv:2312.11983). Units are removed one after
another, each the one without which the loss rises least when the weights of those that stay make up for it: the
optimal brain surgeon (Hassibi and Stork, 1992) for whole units, as in EigenDamage (Wang et al., arXiv:1905.05934) and ZipLM
(Kurtic et al., arXiv:2302.04089). As M puts all blocks on one scale, one order holds for the whole model.

Then the blocks are made smaller one after another, each on what the smaller ones before it give, and their linear maps
fitted to the outputs that the block had, by least squares (He et al., arXiv:1707.06168) with a ridge towards the
old weights. A LayerNorm over the hidden units has other statistics when some are gone; its scale and shift of each
unit are fitted to what the unit was before.

Legend for shapes: B images, N tokens, T tokens of all images, D channels, H hidden units, I inputs and O outputs of a map,
P features of an input, G groups.
"""
