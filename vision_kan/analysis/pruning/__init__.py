"""Pruning the feed-forwards of a trained KAN: the importance of their parts, and the smaller model without the least important.

A KAN's feed-forward is two linear maps of learned features,

    z = W1 f1(n) + b1,    y = W2 f2(z) + b2,

where f is, in a group KAN, the channels after phi, and in a full-edge KAN the basis values (and silu(u)) of every input
(`layers.feed_forward.Half`). Hidden units (`Hidden`, or by another measure `edges`), groups (`Groups`) or grid points (`Points`)
can be removed.

Importance: a change D of W2 raises the loss, to second order, by

    tr(M D C D^T) / 2,    C = E[w f f^T],    M = E[g g^T],

where g is the gradient of the loss at y over tokens, for labels drawn from the model itself, and w = |g|^2 (mean 1) the weight of
a token: the Kronecker-factored Fisher information (Martens and Grosse, arXiv:1503.05671). A bias absorbs the mean, so with one C
is the covariance, as in FLAP (An et al., arXiv:2312.11983). Units are removed one at a time, each time the unit whose removal
raises the loss least once the remaining weights compensate: the optimal brain surgeon (Hassibi and Stork, 1992) for whole units,
as in EigenDamage (Wang et al., arXiv:1905.05934) and ZipLM (Kurtic et al., arXiv:2302.04089). M puts all blocks on one scale, so
one order holds for the whole model.

Then the blocks are pruned from first to last. Each gets the outputs of the pruned blocks before it, and its linear maps are
fitted to the outputs of the original block by least squares (He et al., arXiv:1707.06168), with a ridge towards the old weights.
A LayerNorm over the hidden units has other statistics once some are removed, so its scale and shift of each unit are fitted to
its old output.

Legend for shapes: B images, N tokens, T tokens of all images, D channels, H hidden units, I inputs and O outputs of a map,
P features of an input, G groups.
"""
